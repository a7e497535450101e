package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
	"unicode/utf8"
)

// post is a request with a body of a media type.
func post(media, body string) *http.Request {
	r := httptest.NewRequest("POST", "/", strings.NewReader(body))
	if media != "" {
		r.Header.Set("Content-Type", media)
	}
	return r
}

// jsonFields are the fields of a JSON body that is well formed.
func jsonFields(tb testing.TB, body string) *fields {
	tb.Helper()
	f, err := readFields(httptest.NewRecorder(), post("application/json", body))
	if err != nil {
		tb.Fatalf("%.100q: %v", body, err)
	}
	return f
}

// formFields are the fields of a form that is well formed.
func formFields(tb testing.TB, body string) *fields {
	tb.Helper()
	r := post("application/x-www-form-urlencoded", body)
	f, err := readFieldsOrForm(httptest.NewRecorder(), r)
	if err != nil {
		tb.Fatalf("%.100q: %v", body, err)
	}
	return f
}

// refusal is "status code field field …" of an error, or "" for none.
func refusal(err error) string {
	if err == nil {
		return ""
	}
	api, ok := errors.AsType[*apiError](err)
	if !ok {
		return "no apiError: " + err.Error()
	}
	words := []string{fmt.Sprint(api.status), api.Code}
	words = append(words, slices.Sorted(maps.Keys(api.Fields))...)
	return strings.Join(words, " ")
}

// checkRefusal fails the test unless err is refused as wanted, and repeats little of what was sent.
func checkRefusal(tb testing.TB, what string, err error, want string) {
	tb.Helper()
	if got := refusal(err); got != want {
		tb.Errorf("%.100q: %q (%v), want %q", what, got, err, want)
	}
	if err != nil && len(err.Error()) > 300 {
		tb.Errorf("%.100q: an error of %d bytes", what, len(err.Error()))
	}
}

// ---- bodies ----

// Whatever type a body claims: JSON is read, and what is none is a bad request.
func TestContentTypes(t *testing.T) {
	object := `{"url":"https://example.com/"}`
	form := "url=https%3A%2F%2Fexample.com%2F"
	tests := []struct {
		media, body      string
		asJSON, asEither string // refusals by the two readers
	}{
		{"application/json", object, "", ""},
		{"application/json; charset=utf-8", object, "", ""},
		{"", object, "", ""},
		{"text/plain", object, "", ""},
		{"nonsense; =", object, "", ""},
		{"application/x-www-form-urlencoded", object, "", ""},
		{"application/x-www-form-urlencoded", " \n" + object, "", ""},
		{"application/x-www-form-urlencoded", form, "400 invalid_json", ""},
		{"Application/X-WWW-Form-URLencoded; charset=UTF-8", form, "400 invalid_json", ""},
		{"application/x-www-form-urlencoded", "", "400 invalid_json", ""},
		{"application/x-www-form-urlencoded", "[]", "400 invalid_json", "400 invalid_json"},
		{"application/x-www-form-urlencoded", "a=%zz", "400 invalid_json", "400 invalid_form"},
		{"application/x-www-form-urlencoded", "a=1&a=2", "400 invalid_json", "400 invalid_form"},
		{"application/x-www-form-urlencoded", "a=%00", "400 invalid_json", "400 invalid_form"},
		{"application/x-www-form-urlencoded", "a=%ff", "400 invalid_json", "400 invalid_form"},
		{"", form, "400 invalid_json", "400 invalid_json"},
		{"text/plain", "hello", "400 invalid_json", "400 invalid_json"},
		{"application/xml", "<x/>", "400 invalid_json", "400 invalid_json"},
		{"multipart/form-data; boundary=x", object, "400 invalid_json", "400 invalid_json"},
		{"text/csv", object, "400 invalid_json", "400 invalid_json"},
	}
	for _, test := range tests {
		what := test.media + ": " + test.body
		_, err := readFields(httptest.NewRecorder(), post(test.media, test.body))
		checkRefusal(t, what, err, test.asJSON)
		f, err := readFieldsOrForm(httptest.NewRecorder(), post(test.media, test.body))
		checkRefusal(t, what, err, test.asEither)
		if err == nil && test.body != "" {
			if got := f.target("url", true, testRules); got != "https://example.com/" {
				t.Errorf("%s: %q", what, got)
			}
		}
	}
}

// badBodies are no JSON objects as hop takes them.
var badBodies = map[string]string{
	"empty":                   "",
	"spaces":                  " \n\t ",
	"bare word":               "hello",
	"form":                    "url=https://example.com",
	"string":                  `"https://example.com"`,
	"number":                  `42`,
	"huge number":             strings.Repeat("9", 400),
	"true":                    `true`,
	"null":                    `null`,
	"array":                   `[]`,
	"array of objects":        `[{}]`,
	"two values":              `{"a":1}{"a":1}`,
	"comma after":             `{"a":1,}`,
	"single quotes":           `{'a':'b'}`,
	"comment":                 `{"a":1/* c */}`,
	"unfinished object":       `{"a":1`,
	"unfinished string":       `{"a":"b`,
	"unfinished escape":       `{"a":"\u00`,
	"bad escape":              `{"a":"\x"}`,
	"raw newline in string":   "{\"a\":\"b\nc\"}",
	"BOM":                     "\ufeff{}",
	"UTF-16":                  "\xff\xfe{\x00}\x00",
	"bad UTF-8":               "{\"a\":\"\xff\xfe\"}",
	"surrogate as UTF-8":      "{\"a\":\"\xed\xa0\x80\"}",
	"raw NUL":                 "{\"a\":\"b\x00c\"}",
	"escaped NUL":             `{"a":"b\u0000c"}`,
	"escaped NUL in a name":   `{"details":{"\u0000":1}}`,
	"lone high surrogate":     `{"a":"\ud800"}`,
	"lone high, then text":    `{"a":"\ud83dx"}`,
	"lone high, then escape":  `{"a":"\ud83d\n"}`,
	"two high surrogates":     `{"a":"\ud83d\ud83d"}`,
	"lone low surrogate":      `{"a":"\uDE00"}`,
	"pair the wrong way":      `{"a":"\ude00\ud83d"}`,
	"lone surrogate in depth": `{"details":{"\udc00":1}}`,
	"number too large":        `{"details":{"a":1e400}}`,
	"number far too large":    `{"details":{"a":-1E+99999999}}`,
	"number too small":        `{"details":{"a":1e-400}}`,
	"repeated name":           `{"url":"a","url":"b"}`,
	"repeated name, escaped":  `{"url":"a","\u0075rl":"b"}`,
	"repeated name in depth":  `{"details":[{"a":1,"b":2,"a":3}]}`,
	"repeated long name": `{"` + strings.Repeat("a", 5000) + `":1,"` +
		strings.Repeat("a", 5000) + `":1}`,
	"deep arrays":  strings.Repeat("[", 8000) + strings.Repeat("]", 8000),
	"deep objects": strings.Repeat(`{"a":`, 2000) + "1" + strings.Repeat("}", 2000),
	"deep details": `{"details":` + strings.Repeat(`[`, maxDepth) +
		strings.Repeat("]", maxDepth) + `}`,
	"never closed": strings.Repeat("[", 16_000),
}

func TestBadBodies(t *testing.T) {
	for name, body := range badBodies {
		_, err := readFields(httptest.NewRecorder(), post("application/json", body))
		checkRefusal(t, name, err, "400 invalid_json")
	}
}

// What is unusual but right is read.
func TestGoodBodies(t *testing.T) {
	for _, body := range []string{
		`{}`,
		" {} \r\n",
		`{"":""}`,
		`{"a":{"a":{"a":[]}},"b":{"a":1}}`,
		`{"a":"\ud83d\ude00 \\u0000 \\ud800 \" \u00e9 \u2028"}`,
		`{"a":[-0,0,0.0,0e-999,1.5e300,1E-300,123456789012345678901234567890.5]}`,
		`{"a":[true,false,null,"x",{"b":[{}]}],"\\":1,"\/":2}`,
		"{\"a\" : [ 1 ,\t2\n,{ \"b\" :\r\n3 } ] , \"c\" : null }",
		`{"details":` + strings.Repeat("[", maxDepth-1) + strings.Repeat("]", maxDepth-1) + `}`,
		`{"a":"` + strings.Repeat("x", maxBody-8) + `"}`,
	} {
		jsonFields(t, body)
	}
}

func TestBodyLimits(t *testing.T) {
	read := func(w http.ResponseWriter, r *http.Request) error {
		_, err := readFields(w, r)
		return err
	}
	readEither := func(w http.ResponseWriter, r *http.Request) error {
		_, err := readFieldsOrForm(w, r)
		return err
	}
	readMany := func(w http.ResponseWriter, r *http.Request) error {
		_, err := readItems(w, r)
		return err
	}
	tests := []struct {
		name string
		read func(http.ResponseWriter, *http.Request) error
		size int
		want string
	}{
		{"an object", read, maxBody, "400 invalid_json"},
		{"an object", read, maxBody + 1, "413 payload_too_large"},
		{"a form", readEither, maxBody + 1, "413 payload_too_large"},
		{"items", readMany, maxBulkBody, "400 invalid_json"},
		{"items", readMany, maxBulkBody + 1, "413 payload_too_large"},
	}
	for _, test := range tests {
		r := post("application/x-www-form-urlencoded", "{"+strings.Repeat("x", test.size-1))
		checkRefusal(t, test.name, test.read(httptest.NewRecorder(), r), test.want)
	}
	broken := post("", "")
	broken.Body = io.NopCloser(iotest.ErrReader(io.ErrUnexpectedEOF))
	checkRefusal(t, "a broken body", read(httptest.NewRecorder(), broken), "400 invalid_body")
}

// ---- bulk bodies ----

func TestItems(t *testing.T) {
	thousand := strings.Repeat("{},", maxBulk-1)
	large := `"` + strings.Repeat("x", maxBody-10) + `"`
	tests := []struct {
		body  string
		items int
		want  string
	}{
		{`[{}]`, 1, ""},
		{" [ {} ,\n{\"a\":[1,2]} , \"],[\\\"\" , 5 , null , [ [],{} ] ] ", 6, ""},
		{`["\\",2]`, 2, ""},
		{`[` + thousand + `{}]`, maxBulk, ""},
		{`[` + large + `,` + large + `]`, 2, ""},
		{`[]`, 0, "400 invalid_request"},
		{`[ ]`, 0, "400 invalid_request"},
		{`[` + thousand + `{},{}]`, 0, "400 invalid_request"},
		{`["` + strings.Repeat("x", maxBody) + `"]`, 0, "400 invalid_request"},
		{``, 0, "400 invalid_json"},
		{`[`, 0, "400 invalid_json"},
		{`]`, 0, "400 invalid_json"},
		{`{}`, 0, "400 invalid_json"},
		{`null`, 0, "400 invalid_json"},
		{`[{}`, 0, "400 invalid_json"},
		{`[{}]]`, 0, "400 invalid_json"},
		{`[{}][{}]`, 0, "400 invalid_json"},
		{`[{}]{}`, 0, "400 invalid_json"},
		{`[{},]`, 0, "400 invalid_json"},
		{`[{},`, 0, "400 invalid_json"},
		{`[,{}]`, 0, "400 invalid_json"},
		{`[{} {}]`, 0, "400 invalid_json"},
		{`[{}}]`, 0, "400 invalid_json"},
		{`[{]`, 0, "400 invalid_json"},
		{`[}{]`, 0, "400 invalid_json"},
		{`["]`, 0, "400 invalid_json"},
		{`["\"]`, 0, "400 invalid_json"},
		{`[{"a":1,"a":2}]`, 0, "400 invalid_json"},
		{`[{"a":"\ud800"}]`, 0, "400 invalid_json"},
		{`[{}, 1e999]`, 0, "400 invalid_json"},
		{`[{}, word]`, 0, "400 invalid_json"},
	}
	for _, test := range tests {
		items, err := readItems(httptest.NewRecorder(), post("", test.body))
		checkRefusal(t, test.body, err, test.want)
		if len(items) != test.items {
			t.Errorf("%.100q: %d items", test.body, len(items))
		}
	}
	for _, item := range []string{`5`, `null`, `[]`, `"text"`, `true`} {
		checkRefusal(t, item, itemFields(json.RawMessage(item)).err(), "400 invalid_request item")
	}
	f := itemFields(json.RawMessage(`{"user_id":5}`))
	if f.id("user_id", true) != 5 || f.err() != nil {
		t.Errorf("a good item: %v", f.err())
	}
}

// TestBulkBodiesAreBounded has many bulk requests in memory: those beyond the bound are refused
// until there is room again, and a slow sender keeps only the room that its bytes take.
func TestBulkBodiesAreBounded(t *testing.T) {
	a := startApp(t)
	a.bodies.max = 2000
	bulk := func(title int) reply {
		body := `[{"url":"https://example.com/","title":"` + strings.Repeat("x", title) + `"}]`
		return do(t, "POST", a.url+"/urls/bulk", body)
	}
	body, sender := io.Pipe()
	answered := make(chan int, 1)
	go func() {
		resp, err := client.Post(a.url+"/urls/bulk", "application/json", body)
		if err != nil {
			t.Error(err)
			answered <- 0
			return
		}
		resp.Body.Close()
		answered <- resp.StatusCode
	}()
	io.WriteString(sender, `[{"url":"https://example.com/"}`+strings.Repeat(" ", 1500))
	eventually(t, patience, "the bytes have arrived", func() bool { return a.bodies.n.Load() > 1500 })
	if r := bulk(10); r.status != 200 {
		t.Errorf("where there is room: %d %s", r.status, r.body)
	}
	r := bulk(450)
	if r.status != 503 {
		t.Errorf("where there is none: %d %s", r.status, r.body)
	}
	checkError(t, r, "overloaded")
	io.WriteString(sender, "]")
	sender.Close()
	if status := <-answered; status != 200 {
		t.Errorf("the slow sender: %d", status)
	}
	if r := bulk(450); r.status != 200 {
		t.Errorf("after the slow sender: %d %s", r.status, r.body)
	}
	eventually(t, patience, "nothing is kept", func() bool { return a.bodies.n.Load() == 0 })
}

// An array of millions of items is refused at the 1,001st: nothing behind it is looked at, not even
// what is no JSON, and nothing is decoded.
func TestJunkItemsAreNotRead(t *testing.T) {
	junk := []byte("[" + strings.Repeat("1,", maxBulk) + strings.Repeat(`,{["]`, maxBulkBody/5))
	if _, err := splitArray(junk); refusal(err) != "400 invalid_request" {
		t.Errorf("junk behind the last item: %v", err)
	}
	many := []byte("[" + strings.Repeat("1,", maxBulkBody/2-1) + "1]")
	var err error
	allocs := testing.AllocsPerRun(5, func() { _, err = splitArray(many) })
	if refusal(err) != "400 invalid_request" || allocs > 50 {
		t.Errorf("%d items: %v with %v allocations", maxBulkBody/2, err, allocs)
	}
	item := []byte(`[{"a":"` + strings.Repeat("x", maxBulkBody) + `"}]`)
	if _, err := splitArray(item); refusal(err) != "400 invalid_request" {
		t.Errorf("an endless item: %v", err)
	}
}

// ---- fields ----

func TestTextField(t *testing.T) {
	tests := []struct {
		body     string
		required bool
		want     string
		refused  bool
	}{
		{`{"title":"Sale"}`, false, "Sale", false},
		{`{"title":" Sale\t"}`, false, "Sale", false},
		{`{"title":"  "}`, false, "", false},
		{`{"title":""}`, false, "", false},
		{`{"title":null}`, false, "", false},
		{`{}`, false, "", false},
		{`{"title":"  "}`, true, "", true},
		{`{"title":""}`, true, "", true},
		{`{"title":null}`, true, "", true},
		{`{}`, true, "", true},
		{`{"title":5}`, false, "", true},
		{`{"title":true}`, false, "", true},
		{`{"title":["x"]}`, false, "", true},
		{`{"title":{}}`, false, "", true},
		{`{"title":"a\nb"}`, false, "a\nb", true},
	}
	for _, test := range tests {
		f := jsonFields(t, test.body)
		got := f.text("title", test.required, checkText)
		if got != test.want || (f.err() != nil) != test.refused {
			t.Errorf("%s: %q %v", test.body, got, f.err())
		}
	}
}

func TestIDField(t *testing.T) {
	tests := []struct {
		json, form string
		want       int64
		refused    bool
	}{
		{`1`, "1", 1, false},
		{`9007199254740991`, "9007199254740991", maxID, false},
		{`null`, "", 0, false},
		{`0`, "0", 0, true},
		{`-1`, "-1", 0, true},
		{`9007199254740992`, "9007199254740992", 0, true},
		{`99999999999999999999`, "99999999999999999999", 0, true},
		{`1.0`, "1.0", 0, true},
		{`1e0`, "1e0", 0, true},
		{`true`, "true", 0, true},
		{`"1"`, `"1"`, 0, true},
		{`[1]`, "%2B1", 0, true},
		{`{}`, "+1", 0, true},
	}
	for _, test := range tests {
		for _, f := range []*fields{
			jsonFields(t, `{"user_id":`+test.json+`}`),
			formFields(t, "user_id="+test.form),
		} {
			got := f.id("user_id", false)
			if got != test.want || (f.err() != nil) != test.refused {
				t.Errorf("%s (form %v): %d %v", test.json, f.isForm, got, f.err())
			}
		}
	}
	f := jsonFields(t, `{}`)
	f.id("url_id", true)
	checkRefusal(t, "no id", f.err(), "400 invalid_request url_id")
}

func TestFlagField(t *testing.T) {
	yes, no := true, false
	tests := []struct {
		f       *fields
		want    *bool
		refused bool
	}{
		{jsonFields(t, `{"a":true}`), &yes, false},
		{jsonFields(t, `{"a":false}`), &no, false},
		{jsonFields(t, `{}`), nil, false},
		{jsonFields(t, `{"a":null}`), nil, true},
		{jsonFields(t, `{"a":"true"}`), nil, true},
		{jsonFields(t, `{"a":1}`), nil, true},
		{jsonFields(t, `{"a":[]}`), nil, true},
		{formFields(t, "a=on"), &yes, false},
		{formFields(t, "a=True"), &yes, false},
		{formFields(t, "a=1"), &yes, false},
		{formFields(t, "a=off"), &no, false},
		{formFields(t, "a=false"), &no, false},
		{formFields(t, "b=1"), nil, false},
		{formFields(t, "a=maybe"), nil, true},
	}
	for _, test := range tests {
		got := test.f.flag("a")
		same := got == nil && test.want == nil ||
			got != nil && test.want != nil && *got == *test.want
		if !same || (test.f.err() != nil) != test.refused {
			t.Errorf("%s: %v %v", test.f.raw["a"], got, test.f.err())
		}
	}
	for _, f := range []*fields{jsonFields(t, `{"a":null}`), formFields(t, "a=")} {
		if got := f.flagOrNull("a"); got != nil || f.err() != nil {
			t.Errorf("null: %v %v", got, f.err())
		}
	}
}

// The target and the code have the same names everywhere. Two of them may not contradict.
func TestFieldNames(t *testing.T) {
	tests := []struct {
		body, target, code string
		want               string
	}{
		{`{"original_url":"x"}`, "original_url", "custom_code", ""},
		{`{"long_url":"x","short_code":"y"}`, "long_url", "short_code", ""},
		{`{"url":"x","custom_code":"y"}`, "url", "custom_code", ""},
		{`{"url":"x","long_url":null,"original_url":null}`, "url", "custom_code", ""},
		{`{"url":null}`, "url", "custom_code", ""},
		{`{}`, "original_url", "custom_code", ""},
		{`{"url":"x","original_url":"x"}`, "original_url", "custom_code", ""},
		{`{"url":"x","original_url":"y"}`, "original_url", "custom_code", "400 invalid_request url"},
		{`{"custom_code":"x","short_code":"y"}`, "original_url", "custom_code",
			"400 invalid_request short_code"},
	}
	for _, test := range tests {
		f := jsonFields(t, test.body)
		if target, code := f.targetName(), f.codeName(); target != test.target || code != test.code {
			t.Errorf("%s: %s, %s", test.body, target, code)
		}
		checkRefusal(t, test.body, f.err(), test.want)
	}
}

func TestTargetField(t *testing.T) {
	f := jsonFields(t, `{"a":" example.com/x ","b":"nope","c":5,"d":null,"e":""}`)
	if got := f.target("a", true, testRules); got != "https://example.com/x" || f.err() != nil {
		t.Errorf("%q %v", got, f.err())
	}
	if got := f.target("d", false, testRules); got != "" || f.err() != nil {
		t.Errorf("null: %q %v", got, f.err())
	}
	for _, name := range []string{"b", "c", "d", "e", "f"} {
		f.target(name, true, testRules)
	}
	checkRefusal(t, "bad targets", f.err(), "400 invalid_request b c d e f")
}

func TestObjectField(t *testing.T) {
	f := jsonFields(t, `{"a":{ "x" : [ 1 , 2.50 ] , "é":"<&>" },"b":null,"c":"{}","d":[],"e":5}`)
	if got := string(f.object("a")); got != `{"x":[1,2.50],"é":"<&>"}` {
		t.Errorf("%s", got)
	}
	if got := string(f.object("b")) + string(f.object("absent")); got != "{}{}" {
		t.Errorf("%s", got)
	}
	for _, name := range []string{"c", "d", "e"} {
		f.object(name)
	}
	checkRefusal(t, "no objects", f.err(), "400 invalid_request c d e")
}

func TestFutureField(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 500, time.UTC)
	second := now.Truncate(time.Second)
	tests := []struct {
		f       *fields
		want    time.Time
		refused bool
	}{
		{jsonFields(t, `{"a":"2026-01-01T00:00:01Z"}`), second.Add(time.Second), false},
		{formFields(t, "a=2027-01-31T12:00"), time.Date(2027, 1, 31, 12, 0, 0, 0, time.UTC), false},
		{jsonFields(t, `{}`), time.Time{}, false},
		{jsonFields(t, `{"a":null}`), time.Time{}, false},
		{formFields(t, "a="), time.Time{}, false},
		{jsonFields(t, `{"a":"2026-01-01T00:00:00Z"}`), second, true},
		{jsonFields(t, `{"a":"tomorrow"}`), time.Time{}, true},
		{jsonFields(t, `{"a":1800000000}`), time.Time{}, true},
	}
	for _, test := range tests {
		got := test.f.future("a", now)
		if !got.Equal(test.want) || (test.f.err() != nil) != test.refused {
			t.Errorf("%s: %v %v", test.f.raw["a"], got, test.f.err())
		}
	}
}

// An update may send an end back as it was, also a past one. Another past time means now.
func TestExpiryField(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 500, time.UTC)
	ended := now.Truncate(time.Second)
	past := &stamp{ended.Add(-time.Hour)}
	later := time.Date(2027, 1, 31, 12, 0, 0, 0, time.UTC)
	never := time.Time{}
	tests := []struct {
		body    string
		old     *stamp
		want    *time.Time
		refused bool
	}{
		{`{}`, past, nil, false},
		{`{"a":"2025-12-31T23:00:00"}`, past, nil, false},
		{`{"a":"2026-01-01T00:00:00+01:00"}`, past, nil, false},
		{`{"a":"2025-12-31T22:00:00"}`, past, &ended, false},
		{`{"a":"2025-12-31T23:00:00"}`, nil, &ended, false},
		{`{"a":"2027-01-31 12:00:00"}`, past, &later, false},
		{`{"a":null}`, past, &never, false},
		{`{"a":null}`, nil, nil, false},
		{`{"a":"soon"}`, past, nil, true},
		{`{"a":5}`, nil, nil, true},
	}
	for _, test := range tests {
		f := jsonFields(t, test.body)
		got := f.expiry("a", test.old, now)
		same := got == nil && test.want == nil ||
			got != nil && test.want != nil && got.Equal(*test.want)
		if !same || (f.err() != nil) != test.refused {
			t.Errorf("%s: %v %v", test.body, got, f.err())
		}
	}
}

// What cannot change may be sent as GET gave it.
func TestUnchangedField(t *testing.T) {
	code, owner := "abc", int64(5)
	tests := []struct {
		json    string
		want    any
		refused bool
	}{
		{`"abc"`, code, false},
		{`"\u0061bc"`, code, false},
		{`"other"`, code, true},
		{`null`, code, true},
		{`5`, &owner, false},
		{`6`, &owner, true},
		{`"5"`, &owner, true},
		{`5.0`, &owner, true},
		{`null`, (*int64)(nil), false},
		{`5`, (*int64)(nil), true},
		{`"2026-01-01T00:00:00"`, stamp{time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}, false},
		{`"2026-01-01T00:00:01"`, stamp{time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}, true},
		{`[{"day":"x","clicks":1}]`, []dayCount{{Day: "x", Clicks: 1}}, false},
	}
	for _, test := range tests {
		f := jsonFields(t, `{"a":`+test.json+`}`)
		f.unchanged("a", test.want)
		f.unchanged("absent", test.want)
		if (f.err() != nil) != test.refused {
			t.Errorf("%s: %v", test.json, f.err())
		}
	}
}

// Every field that is wrong is named, each with the first word on it.
func TestProblems(t *testing.T) {
	f := jsonFields(t, `{"username":5,"email":"nobody"}`)
	f.text("username", true, checkName)
	f.text("email", true, checkEmail)
	f.refuse("email", "a second word")
	err := f.err()
	checkRefusal(t, "a user", err, "400 invalid_request email username")
	api, _ := errors.AsType[*apiError](err)
	if strings.Contains(api.Fields["email"], "second") {
		t.Error("the first word does not stand")
	}
}

// ---- query strings and paths ----

func TestQuery(t *testing.T) {
	q := newQuery(httptest.NewRequest("GET",
		"/?user_id=-5&url_id=0&is_active=True&q=a%20b&short_code=&n=7", nil))
	if id := q.id("user_id"); id == nil || *id != -5 {
		t.Errorf("user_id: %v", id)
	}
	if id := q.id("url_id"); id == nil || *id != 0 {
		t.Errorf("url_id: %v", id)
	}
	if flag := q.flag("is_active"); flag == nil || !*flag {
		t.Errorf("is_active: %v", flag)
	}
	if text := q.text("q", checkSearch); text != "a b" {
		t.Errorf("q: %q", text)
	}
	if n := q.int("n", 1, 7, 3); n != 7 {
		t.Errorf("n: %d", n)
	}
	if q.id("x") != nil || q.flag("x") != nil || q.text("x", checkName) != "" ||
		q.int("x", 1, 7, 3) != 3 || q.err() != nil {
		t.Errorf("absent: %v", q.err())
	}
	q.text("short_code", checkCode)
	q.int("n", 1, 6, 3)
	checkRefusal(t, "", q.err(), "400 invalid_request n short_code")
}

func TestBadQueries(t *testing.T) {
	tests := []struct{ query, want string }{
		{"user_id=", "user_id"},
		{"user_id=x", "user_id"},
		{"user_id=1.0", "user_id"},
		{"user_id=1%20OR%201=1", "user_id"},
		{"user_id=9223372036854775808", "user_id"},
		{"user_id=1&user_id=2", "user_id"},
		{"is_active=", "is_active"},
		{"is_active=maybe", "is_active"},
		{"q=a%00", "q"},
		{"q=%ff", "q"},
		{"q=%zz", "query"},
		{"q=a;b", "query"},
	}
	for _, test := range tests {
		q := newQuery(httptest.NewRequest("GET", "/?"+test.query, nil))
		q.id("user_id")
		q.flag("is_active")
		q.text("q", checkSearch)
		checkRefusal(t, test.query, q.err(), "400 invalid_request "+test.want)
	}
}

func TestPages(t *testing.T) {
	beyond := page{limit: 1, offset: 100_001, beyond: true}
	tests := []struct {
		query string
		want  page
		fails string
	}{
		{"", page{limit: 1000}, ""},
		{"per_page=1", page{limit: 1}, ""},
		{"page=3&per_page=10", page{limit: 10, offset: 20}, ""},
		{"page=100&per_page=1000", page{limit: 1000, offset: 99_000}, ""},
		{"after=77&per_page=10", page{limit: 10, after: 77}, ""},
		{"skip=283", page{limit: 1000, offset: 283}, ""},
		{"skip=283&page=2&per_page=10", page{limit: 10, offset: 293}, ""},
		{"skip=100000", page{limit: 1000, offset: 100_000}, ""},
		{"skip=100001", page{}, "skip"},
		{"skip=-1", page{}, "skip"},
		{"after=9007199254740991", page{limit: 1000, after: maxID}, ""},
		{"page=101&per_page=1000", page{limit: 1000, offset: 100_000}, ""},
		{"page=100002&per_page=1", beyond, ""},
		{"page=2147483647&per_page=1000", beyond, ""},
		{"page=2&skip=99001", beyond, ""},
		{"page=2147483648", page{}, "page"},
		{"page=99999999999999999999", page{}, "page"},
		{"page=0", page{}, "page"},
		{"page=-1", page{}, "page"},
		{"page=", page{}, "page"},
		{"page=x&per_page=x", page{}, "page per_page"},
		{"per_page=0", page{}, "per_page"},
		{"per_page=1001", page{}, "per_page"},
		{"after=x", page{}, "after"},
		{"after=-1", page{}, "after"},
		{"after=9007199254740992", page{}, "after"},
	}
	for _, test := range tests {
		q := newQuery(httptest.NewRequest("GET", "/?"+test.query, nil))
		got := q.page()
		if test.fails != "" {
			checkRefusal(t, test.query, q.err(), "400 invalid_request "+test.fails)
		} else if got != test.want || q.err() != nil {
			t.Errorf("%s: %+v %v", test.query, got, q.err())
		}
	}
}

func TestPathID(t *testing.T) {
	tests := map[string]int64{
		"1":                    1,
		"9007199254740991":     maxID,
		"0":                    0,
		"-1":                   0,
		"+1":                   0,
		"9007199254740992":     0,
		"18446744073709551617": 0,
		"1.0":                  0,
		"1e0":                  0,
		"0x1":                  0,
		" 1":                   0,
		"1\x00":                0,
		"١":                    0,
		"abc":                  0,
		"":                     0,
	}
	for text, want := range tests {
		r := httptest.NewRequest("GET", "/", nil)
		r.SetPathValue("id", text)
		if got := pathID(r); got != want {
			t.Errorf("%q: %d", text, got)
		}
	}
}

// ---- fuzzing ----

// fuzzBodies are seeds: bodies that some route takes, and bad ones that are not too long.
func fuzzBodies() []string {
	bodies := []string{
		`{"url":"https://example.com/","custom_code":"abc","title":"t","user_id":1,` +
			`"expires_at":"2099-01-01T00:00:00Z"}`,
		`{"username":"ann","email":"ann@example.com"}`,
		`{"user_id":1,"original_url":"https://example.com/"}`,
		`{"event_type":"x","url_id":1,"user_id":1,"details":{"a":[1,null,"\ud800"]}}`,
		`{"username":"b","email":"b@example.com"}`,
		`{"title":null,"is_active":true,"expires_at":null}`,
		`[{"url":"https://example.com/"},5,null]`,
	}
	for _, name := range slices.Sorted(maps.Keys(badBodies)) {
		if len(badBodies[name]) < 1000 {
			bodies = append(bodies, badBodies[name])
		}
	}
	return bodies
}

// FuzzBody: whatever the body, reading it ends in fields or in a short client's error. What is
// accepted holds nothing that PostgreSQL or another reader of JSON would not take.
func FuzzBody(f *testing.F) {
	for _, body := range fuzzBodies() {
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body string) {
		read, err := readFields(httptest.NewRecorder(), post("", body))
		if err == nil {
			checkAccepted(t, body, read)
		} else if !strings.HasPrefix(refusal(err), "4") || len(err.Error()) > 1000 {
			t.Fatalf("%q: %v", body, err)
		}
		items, err := readItems(httptest.NewRecorder(), post("", body))
		if err == nil && (!json.Valid([]byte(body)) || len(items) == 0 || len(items) > maxBulk) {
			t.Fatalf("%q: %d items", body, len(items))
		}
		if err != nil && !strings.HasPrefix(refusal(err), "4") {
			t.Fatalf("%q: %v", body, err)
		}
		for _, item := range items {
			itemFields(item).id("user_id", true)
		}
	})
}

// checkAccepted fails the test if an accepted body is not what other readers take it for.
func checkAccepted(t *testing.T, body string, f *fields) {
	t.Helper()
	var decoded map[string]any
	if err := json.Unmarshal([]byte(body), &decoded); err != nil || len(decoded) != len(f.raw) {
		t.Fatalf("accepted %q: %v", body, err)
	}
	if details := f.object("details"); details != nil && !json.Valid(details) {
		t.Fatalf("%q has the details %q", body, details)
	}
	text := f.text("title", false, checkText)
	if f.problems["title"] == "" && (!utf8.ValidString(text) || strings.ContainsRune(text, 0) ||
		strings.ContainsRune(text, utf8.RuneError) && !strings.ContainsRune(body, utf8.RuneError) &&
			!strings.Contains(strings.ToLower(body), `\ufffd`)) {
		t.Fatalf("%q has the title %q", body, text)
	}
	if id := f.id("url_id", true); id < 0 || id > 1<<53-1 || id == 0 && f.problems["url_id"] == "" {
		t.Fatalf("%q has the id %d", body, id)
	}
	if end := f.future("expires_at", time.Unix(math.MinInt32, 0)); end.Year() > 9999 {
		t.Fatalf("%q has the time %v", body, end)
	}
	f.unchanged("short_code", "abc")
	f.target(f.targetName(), true, testRules)
	f.flag("is_active")
}

// FuzzJSON: whatever the body, every route that takes one answers without a 5xx.
func FuzzJSON(f *testing.F) {
	a := startApp(f, "LOG_LEVEL=error")
	get[wireUser](f, a, 201, "POST", "/users", annJSON)
	addLink(f, a, "https://example.com/", "known")
	routes := []string{"POST /shorten", "POST /users", "POST /urls", "POST /events", "PUT /users/1",
		"PUT /urls/1", "POST /shorten/bulk"}
	for i, body := range fuzzBodies() {
		f.Add(uint8(i), body)
	}
	f.Fuzz(func(t *testing.T, route uint8, body string) {
		method, path, _ := strings.Cut(routes[int(route)%len(routes)], " ")
		r := httptest.NewRequest(method, path, strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		a.ServeHTTP(w, r)
		answer := w.Body.String()
		if w.Code >= 500 || !utf8.ValidString(answer) {
			t.Fatalf("%s %s with %q: %d %s", method, path, body, w.Code, answer)
		}
		if w.Code >= 400 {
			var e wireError
			if strict(t, answer, &e); e.Error == "" {
				t.Fatalf("%d %s", w.Code, answer)
			}
		}
		if w.Code != http.StatusOK || path != "/shorten/bulk" {
			return
		}
		var bulk wireBulk
		strict(t, answer, &bulk)
		for _, item := range bulk.Results {
			if item.Status >= 500 || (item.Status < 400) == (item.URL == nil) {
				t.Fatalf("%q: %+v", body, item)
			}
		}
	})
}
