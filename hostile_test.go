package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"
)

// What strangers send. Whatever it is: no 5xx, no panic, no row written or changed, an error
// envelope, and no long text of theirs repeated. What has an exact answer is in testdata/rest.

// hostileBodies are wrong for every route that takes a body, under every Content-Type.
var hostileBodies = map[string]string{
	"empty":              "",
	"spaces":             " \n\t ",
	"bare word":          "hello",
	"bare URL":           "https://example.com/",
	"form":               "url=nope&username=x&email=x@example.com",
	"form, bad escape":   "url=%zz&original_url=%",
	"form, semicolons":   "url=https://example.com;user_id=1",
	"form, twice":        "url=https://example.com/1&url=https://example.com/2",
	"form, bad UTF-8":    "url=https://example.com/%ff",
	"form, NUL":          "url=https://example.com/%00",
	"XML":                `<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:">]><x>&e;</x>`,
	"YAML":               "url: https://example.com\n",
	"SQL":                `'; DROP TABLE urls; --`,
	"CSV formula":        `=cmd|' /C calc'!A0`,
	"string":             `"https://example.com"`,
	"empty string":       `""`,
	"number":             `42`,
	"negative number":    `-1`,
	"float":              `1.5e300`,
	"number beyond all":  `1e400`,
	"huge number":        strings.Repeat("9", 400),
	"infinity":           `Infinity`,
	"NaN":                `NaN`,
	"true":               `true`,
	"false":              `false`,
	"null":               `null`,
	"undefined":          `undefined`,
	"empty array":        `[]`,
	"array of null":      `[null]`,
	"array of strings":   `["a","b"]`,
	"array of numbers":   `[1,2,3]`,
	"array of arrays":    `[[],[[]]]`,
	"array of objects":   `[{}]`,
	"1,001 items":        "[" + strings.Repeat("{},", 1000) + "{}]",
	"millions of items":  "[" + strings.Repeat("0,", 4_000_000) + "0]",
	"millions of braces": "[" + strings.Repeat(`{"":0},`, 1_100_000) + "{}]",
	"empty object":       `{}`,
	"empty name":         `{"":""}`,
	"prototype":          `{"__proto__":{"is_active":true},"constructor":{"prototype":{}}}`,
	"all null": `{"url":null,"original_url":null,"user_id":null,"username":null,"email":null,
		"event_type":null,"url_id":null,"is_active":null}`,
	"all numbers": `{"url":1,"original_url":1,"user_id":1.5,"username":1,"email":1,
		"event_type":1,"url_id":1.5,"is_active":1,"title":1}`,
	"all true": `{"url":true,"original_url":true,"user_id":true,"username":true,"email":true,
		"event_type":true,"url_id":true,"title":true,"expires_at":true}`,
	"all arrays": `{"url":[],"original_url":[],"user_id":[],"username":[],"email":[],
		"event_type":[],"url_id":[],"title":[],"details":[]}`,
	"all objects": `{"url":{},"original_url":{},"user_id":{},"username":{},"email":{},
		"event_type":{},"url_id":{},"title":{}}`,
	"all empty": `{"url":"","original_url":"","user_id":"","username":"","email":"",
		"event_type":"","url_id":""}`,
	"all strings": `{"url":"x","original_url":"x","user_id":"1","username":" x","email":"x",
		"event_type":" x","url_id":"1","is_active":"true"}`,
	"negative ids": `{"url":"https://example.com","user_id":-1,"url_id":-1,"event_type":"x",
		"is_active":5}`,
	"overflowing ids": `{"url":"https://example.com","user_id":99999999999999999999,
		"url_id":18446744073709551616,"event_type":"x","is_active":5}`,
	"unsafe ids": `{"url":"https://example.com","user_id":9007199254740993,
		"url_id":9007199254740993,"event_type":"x","is_active":5}`,
	"ids with exponents": `{"url":"https://example.com","user_id":1e0,"url_id":1e0,
		"event_type":"x","is_active":5}`,
	"duplicate keys": `{"url":"https://example.com","url":"https://example.org","user_id":1,
		"username":"x","username":"y","event_type":"x","event_type":"x","title":"a","title":"b"}`,
	"duplicate keys, escaped": `{"url":"https://example.com","\u0075rl":"https://example.org",
		"user_id":1,"username":"x","\u0075sername":"y","event_type":"x","event\u005ftype":"x",
		"title":"a","t\u0069tle":"b"}`,
	"two values":        `{"url":"https://example.com"}{"url":"https://example.com"}`,
	"comma after":       goodEverywhere[:len(goodEverywhere)-1] + ",}",
	"comment":           goodEverywhere[:len(goodEverywhere)-1] + "/* c */}",
	"BOM":               "\ufeff" + goodEverywhere,
	"single quotes":     `{'url':'https://example.com'}`,
	"unfinished object": `{"url":"https://example.com"`,
	"unfinished string": `{"url":"https://exam`,
	"unfinished escape": `{"url":"\u00`,
	"bad escape":        `{"title":"\x","username":"\q"}`,
	"half a surrogate": `{"title":"\ud800","username":"\ud800","url":"https://example.com/\udc00",
		"event_type":"\udfff","url_id":1}`,
	"raw newline in string": "{\"title\":\"a\nb\",\"username\":\"a\nb\"}",
	"UTF-16":                "\xff\xfe{\x00}\x00",
	"bad UTF-8": "{\"title\":\"\xff\xfe\",\"username\":\"\xc0\xaf\"," +
		"\"url\":\"https://example.com/\xff\",\"event_type\":\"\xff\",\"url_id\":1}",
	"surrogate as UTF-8": "{\"title\":\"\xed\xa0\x80\"}",
	"raw NUL":            "{\"title\":\"a\x00b\",\"username\":\"a\x00b\"}",
	"only NUL":           "\x00\x00\x00",
	"escaped NUL": `{"title":"a\u0000b","username":"a\u0000b","email":"x@example.com",
		"url":"https://example.com","event_type":"\u0000","url_id":1,"details":{"\u0000":1}}`,
	"control characters": `{"title":"a\u0007b","username":"a\u001bb","email":"x\r\n@example.com",
		"url":"https://example.com/\r\nSet-Cookie: a=b","event_type":"\b","url_id":1}`,
	"deep arrays":           strings.Repeat("[", 8000) + strings.Repeat("]", 8000),
	"deep objects":          strings.Repeat(`{"a":`, 2000) + "1" + strings.Repeat("}", 2000),
	"deep and never closed": strings.Repeat("[", 16000),
	"deep details": `{"event_type":"x","url_id":1,"details":` +
		strings.Repeat(`{"a":`, 40) + "1" + strings.Repeat("}", 41),
	"many names":  "{" + strings.Repeat(`"a":1,`, 2000) + `"b":1}`,
	"long name":   `{"` + strings.Repeat("n", 10_000) + `":1,"title":5}`,
	"long number": `{"user_id":` + strings.Repeat("1", 10_000) + `,"title":5}`,
	"long texts": `{"title":"` + strings.Repeat("t", 501) + `","username":"` +
		strings.Repeat("u", 501) + `","email":"` + strings.Repeat("e", 501) +
		`@example.com","url":"https://example.com/` + strings.Repeat("p", 2048) +
		`","event_type":"` + strings.Repeat("e", 501) + `","url_id":1}`,
	"17 KiB": `{"title":"` + strings.Repeat("x", 17<<10) + `"}`,
	"9 MiB":  `["` + strings.Repeat("x", 9<<20) + `"]`,
	"impossible expiry": `{"username":1,"url":"https://example.com","event_type":"x","url_id":0,
		"expires_at":"2025-02-30T00:00:00Z"}`,
	"reserved code": `{"username":1,"custom_code":"metrics","original_url":"x","event_type":"x",
		"url_id":0}`,
	"code with a slash": `{"username":1,"short_code":"../etc","original_url":"x","event_type":"x",
		"url_id":0}`,
}

// goodEverywhere would do something on every route that takes an object.
const goodEverywhere = `{"username":"x","email":"x@example.com","url":"https://example.com",` +
	`"title":"x","event_type":"x","url_id":1}`

// hostileRequests are a request line, header lines, and after an empty line a body; \n is sent as
// \r\n. net/http's client would refuse or clean most of them.
var hostileRequests = map[string]string{
	"path of NUL":                   "GET /%00 HTTP/1.1\n\n",
	"redirect with NUL":             "GET /urls/%00/redirect HTTP/1.1\n\n",
	"stats with NUL":                "GET /stats/%00%00%00 HTTP/1.1\n\n",
	"delete with NUL":               "DELETE /urls/1%00 HTTP/1.1\n\n",
	"id with an encoded slash":      "GET /users%2F1 HTTP/1.1\n\n",
	"delete with an encoded slash":  "DELETE /urls%2F1 HTTP/1.1\n\n",
	"redirect with encoded slashes": "GET /urls%2Fknown%2Fredirect HTTP/1.1\n\n",
	"only an encoded slash":         "GET /%2F HTTP/1.1\n\n",
	"encoded dot segment":           "GET /users/%2e%2e HTTP/1.1\n\n",
	"backslash":                     "GET /\\evil.example HTTP/1.1\n\n",
	"encoded bad UTF-8":             "GET /%ff%fe%c0%af HTTP/1.1\n\n",
	"raw bad UTF-8":                 "GET /\xff\xfe\xc0\xaf HTTP/1.1\n\n",
	"raw UTF-8":                     "GET /ключ HTTP/1.1\n\n",
	"emoji":                         "GET /%F0%9F%92%A9 HTTP/1.1\n\n",
	"only what is left off":         "GET /.../ HTTP/1.1\n\n",
	"bad escape":                    "GET /%zz HTTP/1.1\n\n",
	"cut escape":                    "GET /known% HTTP/1.1\n\n",
	"asterisk":                      "GET * HTTP/1.1\n\n",
	"no slash":                      "GET known HTTP/1.1\n\n",
	"long path":                     "GET /" + strings.Repeat("a", 12_000) + " HTTP/1.1\n\n",
	"long path of dots":             "GET /" + strings.Repeat(".", 12_000) + " HTTP/1.1\n\n",
	"long id":                       "GET /users/" + strings.Repeat("9", 5000) + " HTTP/1.1\n\n",
	"long filter":                   "GET /urls?user_id=" + strings.Repeat("9", 999) + " HTTP/1.1\n\n",
	"long search":                   "GET /urls?q=" + strings.Repeat("%25", 4000) + " HTTP/1.1\n\n",
	"negative id":                   "DELETE /urls/-1 HTTP/1.1\n\n",
	"overflowing id":                "DELETE /urls/18446744073709551617 HTTP/1.1\n\n",
	"id with exponent":              "DELETE /urls/1e0 HTTP/1.1\n\n",
	"id with spaces":                "DELETE /urls/%201 HTTP/1.1\n\n",
	"SQL in an id":                  "DELETE /urls/1%20OR%201=1 HTTP/1.1\n\n",
	"SQL in a code filter":          "GET /urls?short_code=%27%3BDROP%20TABLE%20urls-- HTTP/1.1\n\n",
	"SQL in the order":              "GET /urls?sort=id%3BDROP%20TABLE%20urls-- HTTP/1.1\n\n",
	"NUL in a type filter":          "GET /events?event_type=a%00b HTTP/1.1\n\n",
	"raw bad UTF-8 in a filter":     "GET /events?event_type=\xff HTTP/1.1\n\n",
	"bad escape in a filter":        "GET /events?event_type=%zz HTTP/1.1\n\n",
	"huge after":                    "GET /users?after=9223372036854775807 HTTP/1.1\n\n",
	"negative after":                "GET /users?after=-1 HTTP/1.1\n\n",
	"absolute-form, not here":       "GET http://evil.example/no/such HTTP/1.1\n\n",
	"absolute-form, credentials":    "GET http://a:b@evil.example/no/such HTTP/1.1\n\n",
	"authority-form":                "CONNECT evil.example:443 HTTP/1.1\n\n",
	"CONNECT to a path":             "CONNECT /users HTTP/1.1\n\n",
	"TRACE":                         "TRACE /users HTTP/1.1\n\n",
	"unknown method":                "DROP /urls HTTP/1.1\n\n",
	"long method":                   strings.Repeat("A", 3000) + " /urls HTTP/1.1\n\n",
	"method override":               "GET /no/such HTTP/1.1\nX-HTTP-Method-Override: DELETE\n\n",

	// What breaks HTTP itself: net/http answers, in plain text.
	"NUL in the request line":    "GET /\x00 HTTP/1.1\n\n",
	"space in the request line":  "GET /a b HTTP/1.1\n\n",
	"no version":                 "GET /known\n\n",
	"unknown version":            "GET /known HTTP/9.9\n\n",
	"no host":                    "GET /known HTTP/1.1\nX-No-Host:\n\n",
	"two hosts":                  "GET /known HTTP/1.1\nHost: a\nHost: b\n\n",
	"bad host":                   "GET /known HTTP/1.1\nHost: a b\n\n",
	"header without colon":       "GET /known HTTP/1.1\nbroken\n\n",
	"header with spaces in name": "GET /known HTTP/1.1\nBad Name: x\n\n",
	"folded first header":        "GET /known HTTP/1.1\n x: y\n\n",
	"NUL in a header":            "GET /known HTTP/1.1\nX-A: a\x00b\n\n",
	"huge header":                "GET /known HTTP/1.1\nX-A: " + strings.Repeat("a", 2<<20) + "\n\n",
	"many headers": "GET /known HTTP/1.1\n" +
		strings.Repeat("X-A: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n", 40_000) + "\n",
	"not HTTP": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n",

	// Bodies that are not what their headers say.
	"two lengths":             rawPost("/users", "Content-Length: 5\nContent-Length: 6", "{}"),
	"negative length":         rawPost("/users", "Content-Length: -1", "{}"),
	"overflowing length":      rawPost("/users", "Content-Length: 99999999999999999999", "{}"),
	"length and chunked":      rawPost("/users", "Content-Length: 3\n"+chunked, "0\n\n"),
	"unknown transfer coding": rawPost("/users", "Transfer-Encoding: gzip", "{}"),
	"bad chunk length":        rawPost("/users", jsonMedia+chunked, "zz\n{}\n0\n\n"),
	"negative chunk length":   rawPost("/shorten", chunked, "-1\n{}\n0\n\n"),
	"overflowing chunk":       rawPost("/events", chunked, "fffffffffffffffff\n{}\n0\n\n"),
	"chunk without an end":    rawPost("/users", chunked, "5\n{}xxxxxxxx\n0\n\n"),
	"CSV with a bad chunk": rawPost("/users/bulk", "Content-Type: text/csv\n"+chunked,
		"1e\nid,username,email,created_at\r\n\nzz\n"),
	"form with a bad chunk": rawPost("/users/bulk",
		"Content-Type: multipart/form-data; boundary=X\n"+chunked, "5\n--X\r\n\nzz\n"),
	"compressed body": rawPost("/users",
		jsonMedia+"Content-Encoding: gzip\nContent-Length: 4", "\x1f\x8b\x08\x00"),
	"impossible expectation": rawPost("/users", "Expect: miracles\nContent-Length: 2", "{}"),
	"other content type":     rawPost("/users", "Content-Type: text/html\nContent-Length: 2", "{}"),
	"type without a slash":   rawPost("/users", "Content-Type: json\nContent-Length: 2", "{}"),
	"broken content type": rawPost("/users",
		"Content-Type: application/json; =\nContent-Length: 2", "{}"),
	"form without a boundary": rawPost("/users/bulk",
		"Content-Type: multipart/form-data\nContent-Length: 2", "{}"),
	"form with a bad part": rawPost("/users/bulk",
		"Content-Type: multipart/form-data; boundary=X\nContent-Length: 20", "--X\nbroken\n\nxxxxxxxx"),
	"nested form": rawPost("/users/bulk",
		"Content-Type: multipart/mixed; boundary=X\nContent-Length: 6", "--X--\n"),
	"XML to the CSV route": rawPost("/users/bulk",
		"Content-Type: application/xml\nContent-Length: 4", "<x/>"),

	// Files that would be half right.
	"CSV of NULs": rawPost("/users/bulk",
		"Content-Type: text/csv\nContent-Length: 4", "\x00\x00\x00\x00"),
	"CSV with a header of one field": rawPost("/users/bulk",
		"Content-Type: text/csv\nContent-Length: 34", "\"id,username,email,created_at\"\n1\n"),
	"CSV with NUL in a name":       rawCSV("1,a\x00b,a@example.com,2025-01-01 10:00:00"),
	"CSV with bad UTF-8":           rawCSV("1,\xff,a@example.com,2025-01-01 10:00:00"),
	"CSV with an impossible day":   rawCSV("1,a,a@example.com,2025-02-30 10:00:00"),
	"CSV with the year 0":          rawCSV("1,a,a@example.com,0000-01-01 10:00:00"),
	"CSV with a negative id":       rawCSV("-1,a,a@example.com,2025-01-01 10:00:00"),
	"CSV with an unsafe id":        rawCSV("9007199254740993,a,a@example.com,2025-01-01 10:00:00"),
	"CSV with an id too large":     rawCSV("9223372036854775808,a,a@example.com,2025-01-01 10:00:00"),
	"CSV with a quote inside":      rawCSV("1,a\"b,a@example.com,2025-01-01 10:00:00"),
	"CSV with a newline in a name": rawCSV("1,\"a\nb\",a@example.com,2025-01-01 10:00:00"),
	"CSV with too many fields":     rawCSV("1,a,a@example.com,2025-01-01 10:00:00,x"),
	"CSV good and then bad": rawCSV("1001,a,a@example.com,2025-01-01 10:00:00\n" +
		"1002,b,b,2025-01-01 10:00:00"),
	"CSV with one long field": rawCSV("1," + strings.Repeat("a", 8<<20)),
	"CSV with one long quoted field": rawCSV("1,\"" +
		strings.Repeat("a\n", 4<<20) + "\",a@example.com,2025-01-01 10:00:00"),

	"cross-site write":              "DELETE /urls/1 HTTP/1.1\nSec-Fetch-Site: cross-site\n\n",
	"cross-site write, old browser": "DELETE /users/1 HTTP/1.1\nOrigin: http://evil.example\n\n",
}

// Header lines of hostileRequests.
const (
	chunked   = "Transfer-Encoding: chunked"
	jsonMedia = "Content-Type: application/json\n"
)

// rawPost is a raw POST.
func rawPost(path, headers, body string) string {
	return "POST " + path + " HTTP/1.1\n" + headers + "\n\n" + body
}

// rawCSV is a raw upload of a users.csv with these rows.
func rawCSV(rows string) string {
	body := csvHead + rows
	length := len(body) + strings.Count(body, "\n") // each \n becomes \r\n on the way
	headers := fmt.Sprintf("Content-Type: text/csv\nContent-Length: %d", length)
	return rawPost("/users/bulk", headers, body)
}

// hostileApp is a hop with one user, one link and one event, and a function that fails the test if
// any row has changed since.
func hostileApp(t *testing.T) (*app, func(t *testing.T, what string)) {
	t.Helper()
	dsn := testDatabase(t)
	a := startApp(t, "DATABASE_URL="+dsn)
	get[wireUser](t, a, 201, "POST", "/users", annJSON)
	get[wireLink](t, a, 201, "POST", "/urls", `{"user_id":1,"original_url":"https://example.com/",
		"short_code":"known","title":"a title"}`)
	db := openDB(t, dsn)
	rows := func() string {
		var all strings.Builder
		for _, table := range []string{"users", "urls", "events"} {
			all.WriteString(scalar[string](t, db, fmt.Sprintf(`
				SELECT count(*) || ' %[1]s ' ||
				       COALESCE(string_agg(md5(t::text), ',' ORDER BY id), '') || E'\n'
				FROM %[1]s AS t`, table)))
		}
		return all.String()
	}
	before := rows()
	return a, func(t *testing.T, what string) {
		t.Helper()
		if after := rows(); after != before {
			t.Errorf("%s left something behind:\n%s instead of\n%s", what, after, before)
			before = after
		}
	}
}

// checkHostile fails unless r is a client's error with our envelope, and short.
func checkHostile(t *testing.T, what string, r reply) {
	t.Helper()
	if r.status < 400 || r.status > 499 {
		t.Errorf("%s: %d %.300s", what, r.status, r.body)
		return
	}
	var e wireError
	strict(t, r.body, &e)
	if e.Error == "" || e.Message == "" {
		t.Errorf("%s: %d without an error: %.300s", what, r.status, r.body)
	}
	checkShort(t, what, e.Message, e.Fields)
	checkReply(t, r)
}

// checkShort fails if an error repeats more than 80 bytes of what was sent: with words around them
// and each byte quoted as four, that makes 500.
func checkShort(t *testing.T, what, message string, fields map[string]string) {
	t.Helper()
	if len(message) > 500 {
		t.Errorf("%s: a message of %d bytes: %.600s", what, len(message), message)
	}
	for name, why := range fields {
		if len(name)+len(why) > 500 {
			t.Errorf("%s: %d bytes on a field: %.600s", what, len(name)+len(why), name+why)
		}
	}
}

func TestHostileBodies(t *testing.T) {
	a, unchanged := hostileApp(t)
	routes := []string{
		"POST /shorten", "POST /users", "POST /urls", "POST /events", "PUT /users/1", "PUT /urls/1",
		"PATCH /urls/1", "POST /shorten/bulk", "POST /urls/bulk", "POST /users/bulk",
	}
	types := []string{
		"application/json", "text/plain", "text/csv", "multipart/form-data; boundary=X",
		"application/x-www-form-urlencoded", "",
	}
	for name, body := range hostileBodies {
		t.Run(name, func(t *testing.T) {
			for _, route := range routes {
				for _, media := range types {
					method, path, _ := strings.Cut(route, " ")
					r := do(t, method, a.url+path, body, "Content-Type: "+media)
					what := route + " as " + media
					if r.status != http.StatusOK || !strings.HasSuffix(path, "/bulk") {
						checkHostile(t, what, r)
						continue
					}
					var bulk wireBulk
					strict(t, r.body, &bulk)
					for _, item := range bulk.Results {
						if item.Status < 400 || item.Status > 499 || item.Error == "" {
							t.Errorf("%s: item %+v", what, item)
						}
						checkShort(t, what, item.Message, item.Fields)
					}
				}
			}
			unchanged(t, name)
		})
	}
	noPanic(t, a)
}

// TestHostileCost: the largest body of junk costs little more than its own bytes: reading stops at
// the first item too many, and a field has an end.
func TestHostileCost(t *testing.T) {
	a, unchanged := hostileApp(t)
	const asJSON, asCSV = "application/json", "text/csv"
	a60 := strings.Repeat("a", 60e6)
	for name, c := range map[string]struct{ route, media, body string }{
		"millions of items":  {"/shorten/bulk", asJSON, hostileBodies["millions of items"]},
		"millions of braces": {"/urls/bulk", asJSON, hostileBodies["millions of braces"]},
		"one long item":      {"/urls/bulk", asJSON, `["` + a60[:8e6] + `"]`},
		"one long field":     {"/users/bulk", asCSV, csvHead + "1," + a60},
		"one quoted field":   {"/users/bulk", asCSV, csvHead + "1,\"" + a60 + "\n"},
		"millions of rows":   {"/users/bulk", asCSV, csvHead + strings.Repeat("1\n", 30e6)},
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start := time.Now()
			r := do(t, "POST", a.url+c.route, c.body, "Content-Type: "+c.media)
			took := time.Since(start)
			runtime.ReadMemStats(&after)
			spent := (after.TotalAlloc - before.TotalAlloc) >> 20
			t.Logf("%d MB of junk: %d MB allocated, %v", len(c.body)/1e6, spent, took)
			checkHostile(t, name, r)
			if spent > 128 || took > 5*time.Second { // the body itself is up to 60 of it
				t.Errorf("%d MB allocated, %v", spent, took)
			}
		})
	}
	unchanged(t, "junk")
}

// noPanic fails if a handler panicked.
func noPanic(t *testing.T, a *app) {
	t.Helper()
	if strings.Contains(a.logs.String(), "panic") {
		t.Error("a handler panicked")
	}
}

func TestHostileRequests(t *testing.T) {
	a, unchanged := hostileApp(t)
	for name, request := range hostileRequests {
		t.Run(name, func(t *testing.T) {
			r := sendRaw(t, a, request)
			media, closed := r.header.Get("Content-Type"), r.header.Get("Connection") == "close"
			switch {
			case media == "text/plain; charset=utf-8" && closed:
				// net/http refuses what is no HTTP before anybody sees it
				if r.status < 400 || r.status > 505 || r.status == 500 {
					t.Errorf("%d %s", r.status, r.body)
				}
			case r.status == http.StatusNotImplemented || r.status == http.StatusExpectationFailed:
				// likewise, without a body
				if r.body != "" && !closed {
					t.Errorf("%d %s", r.status, r.body)
				}
			default:
				checkHostile(t, name, r)
			}
			unchanged(t, name)
		})
	}
	noPanic(t, a)
}

// TestHostilePaths: a path that would have to be cleaned first leads nowhere, whatever the method,
// and least of all to another host.
func TestHostilePaths(t *testing.T) {
	a, unchanged := hostileApp(t)
	for _, path := range []string{
		"//evil.example", "///evil.example/x", "//evil.example/%2e%2e", "/users/../known",
		"/./known", "//known", "//users", "/urls//1", "/x/../..//y", "/users/./1",
	} {
		for _, method := range []string{"GET", "HEAD", "POST", "DELETE"} {
			r := sendRaw(t, a, method+" "+path+" HTTP/1.1\n\n")
			if r.status != http.StatusNotFound || r.header.Get("Location") != "" {
				t.Errorf("%s %s: %d to %q", method, path, r.status, r.header.Get("Location"))
			}
			if method != "HEAD" {
				checkError(t, r, "not_found")
			}
		}
	}
	unchanged(t, "cleaning")
	// An absolute form names another host; the path alone counts.
	r := sendRaw(t, a, "GET http://evil.example/known HTTP/1.1\n\n")
	if got := r.header.Get("Location"); r.status != 302 || got != "https://example.com/" {
		t.Errorf("absolute form: %d to %q", r.status, got)
	}
}

// TestBodyThatNobodyReads has requests whose body no handler reads: they count among those that
// MAX_INFLIGHT bounds, as those without one.
func TestBodyThatNobodyReads(t *testing.T) {
	a := startApp(t, "MAX_INFLIGHT=1")
	if !a.inflight.enter() {
		t.Fatal("no place for the first")
	}
	for _, method := range []string{"GET", "DELETE"} {
		r := do(t, method, a.url+"/urls/1", "{}")
		if r.status != 503 {
			t.Errorf("%s beside one that is being answered: %d %s", method, r.status, r.body)
		}
		checkError(t, r, "overloaded")
	}
	a.inflight.leave()
	for _, method := range []string{"GET", "DELETE"} {
		if r := do(t, method, a.url+"/urls/1", "{}"); r.status != 404 {
			t.Errorf("%s alone: %d %s", method, r.status, r.body)
		}
	}
}

// TestSlowUpload: a client that pauses longer than PostgreSQL lets a transaction idle gets its file
// loaded, and a client that hangs up gets nothing; neither looks like a failure of PostgreSQL.
func TestSlowUpload(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	a, unchanged := hostileApp(t)
	var rows strings.Builder
	for i := 10_001; i <= 16_000; i++ {
		fmt.Fprintf(&rows, "%d,u%d,u@example.com,2025-01-01 10:00:00\n", i, i)
	}
	upload := func(rest func(w *io.PipeWriter)) (*http.Response, error) {
		body, w := io.Pipe()
		go func() {
			io.WriteString(w, csvHead+rows.String())
			rest(w)
		}()
		req, err := http.NewRequest("POST", a.url+"/users/bulk", body)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "text/csv")
		return client.Do(req)
	}
	well := func(what string) {
		t.Helper()
		h := get[wireHealth](t, a, 200, "GET", "/health", "")
		if h.Postgres.Status != "up" || strings.Contains(a.logs.String(), "postgres lost") {
			t.Errorf("%s looks like a failure of PostgreSQL: %+v", what, h)
		}
	}

	resp, err := upload(func(w *io.PipeWriter) {
		w.CloseWithError(io.ErrClosedPipe)
	})
	if err == nil {
		t.Errorf("%d after hanging up", resp.StatusCode)
	}
	well("an upload that broke off")
	unchanged(t, "an upload that broke off")

	resp, err = upload(func(w *io.PipeWriter) {
		time.Sleep(6 * time.Second) // more than idle_in_transaction_session_timeout
		io.WriteString(w, "16001,late,late@example.com,2025-01-01 10:00:00\n")
		w.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if answer, _ := io.ReadAll(resp.Body); resp.StatusCode != 201 {
		t.Errorf("slow upload: %d %s", resp.StatusCode, answer)
	}
	well("a slow upload")
	u := get[wireUser](t, a, 200, "GET", "/users/16001", "")
	if u.Username != "late" {
		t.Errorf("%+v", u)
	}
}

// sendRaw sends a request as it stands, but \n sent as \r\n, and with a Host if it names none.
func sendRaw(t testing.TB, a *app, request string) reply {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(a.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	line, rest, _ := strings.Cut(request, "\n")
	if !strings.Contains(rest, "Host:") {
		rest = "Host: hop.test\n" + rest
	}
	request = strings.ReplaceAll(line+"\n"+rest, "\n", "\r\n")
	go io.WriteString(conn, request) // the server may answer, and close, before it has read all
	method, _, _ := strings.Cut(line, " ")
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	defer resp.Body.Close()
	if resp.Close {
		resp.Header.Set("Connection", "close")
	}
	b, _ := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, string(b)}
}
