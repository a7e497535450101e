package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// What a request may say: its body (JSON or a form), its query string and its path. A body is read
// whole before anything else happens, so that a slow sender holds nothing but its connection.

// Limits of what is read.
const (
	maxBulkBody = 8 << 20 // bytes of a bulk body: maxBulk items of the usual size, with room
	maxSkip     = 100_000 // rows that page and per_page may skip; each is walked over
)

// problems are what was found wrong with a request, by the name of the field or parameter.
type problems map[string]string

// refuse notes what is wrong with a field. The first word on it stands.
func (p problems) refuse(name, problem string) {
	if _, ok := p[name]; !ok {
		p[name] = problem
	}
}

// onlyRefused says whether nothing but the named field is wrong.
func (p problems) onlyRefused(name string) bool {
	_, wrong := p[name]
	return wrong && len(p) == 1
}

// err is nil, or the 400 that names everything refused.
func (p problems) err() error {
	if len(p) == 0 {
		return nil
	}
	refused := badRequest("invalid_request", "some fields are missing or wrong")
	refused.Fields = p
	return refused
}

// ---- bodies ----

// fields is what a JSON object or a form says, and what was found wrong in it. Each getter takes
// one field, so that a handler reads as the list of what it accepts. Fields nobody asks for are
// ignored.
type fields struct {
	problems
	raw    map[string]json.RawMessage
	isForm bool // every value is a string: ids and flags are written as text
}

// readFields reads a body that must be a JSON object. Its errors are apiErrors.
func readFields(w http.ResponseWriter, r *http.Request) (*fields, error) {
	body, err := readBody(w, r, maxBody)
	if err != nil {
		return nil, err
	}
	return parseObject(body)
}

// readFieldsOrForm is readFields for routes that HTML forms are sent to as well. JSON under a
// form's type is JSON: curl sends it that way.
func readFieldsOrForm(w http.ResponseWriter, r *http.Request) (*fields, error) {
	body, err := readBody(w, r, maxBody)
	if err != nil {
		return nil, err
	}
	text := bytes.TrimSpace(body)
	looksLikeJSON := len(text) > 0 && (text[0] == '{' || text[0] == '[')
	if mediaType(r) != "application/x-www-form-urlencoded" || looksLikeJSON {
		return parseObject(body)
	}
	return parseForm(string(body))
}

// readItems reads a body that must be a JSON array of 1 to maxBulk items of at most maxBody bytes.
// It counts before it decodes. Text that is no JSON as hop takes it is refused whole, the rest is
// for itemFields to judge, each item for itself.
func readItems(w http.ResponseWriter, r *http.Request) ([]json.RawMessage, error) {
	body, err := readBody(w, r, maxBulkBody)
	if err != nil {
		return nil, err
	}
	items, err := splitArray(body)
	if err != nil {
		return nil, err
	}
	for i, item := range items {
		if err := checkJSON(item); err != nil {
			return nil, badRequest("invalid_json", fmt.Sprintf("item %d %v", i+1, err))
		}
	}
	return items, nil
}

// itemFields are the fields of one of readItems' items. One that is no object is noted.
func itemFields(item json.RawMessage) *fields {
	f := &fields{problems: problems{}}
	if json.Unmarshal(item, &f.raw) != nil || f.raw == nil {
		f.refuse("item", "must be a JSON object")
	}
	return f
}

// mediaType is the type of a request's body in lower case, without parameters.
func mediaType(r *http.Request) string {
	media, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	return media
}

// readBody reads a whole body of at most limit bytes. Whatever type it claims, it is for the
// reader of the bytes to say whether they make sense; only files come from those who mean another
// route.
func readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	media := mediaType(r)
	if strings.HasPrefix(media, "multipart/") || media == "text/csv" {
		return nil, badRequest("invalid_json", "the body must be JSON, not a file")
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		return nil, bodyError(err)
	}
	if a, ok := w.(*answer); ok && !a.takePlace() {
		return nil, errOverloaded
	}
	return body, nil
}

// countedBody is a body whose bytes take places as they arrive: what a slow sender has not sent yet
// keeps nobody out.
type countedBody struct {
	io.ReadCloser
	places *limiter
	taken  int64
}

// Read reads the body, and ends with errOverloaded when there is no room for what was read.
func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if !b.places.enterAll(int64(n)) {
		return 0, errOverloaded
	}
	b.taken += int64(n)
	return n, err
}

// release gives the places back, once the body is needed no more.
func (b *countedBody) release() { b.places.leaveAll(b.taken) }

// bodyError turns a failed read of a request's body into the client's error.
func bodyError(err error) error {
	if errors.Is(err, errOverloaded) {
		return errOverloaded
	}
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return &apiError{
			status:  http.StatusRequestEntityTooLarge,
			Code:    "payload_too_large",
			Message: fmt.Sprintf("the body must be at most %d bytes", tooLarge.Limit),
		}
	}
	return badRequest("invalid_body", "the body could not be read")
}

// parseObject reads a JSON object.
func parseObject(text []byte) (*fields, error) {
	if err := checkJSON(text); err != nil {
		return nil, badRequest("invalid_json", "the body "+err.Error())
	}
	f := &fields{problems: problems{}}
	if json.Unmarshal(text, &f.raw) != nil || f.raw == nil {
		return nil, badRequest("invalid_json", "the body must be a JSON object")
	}
	return f, nil
}

// parseForm reads an HTML form. A control that was left empty is null.
func parseForm(text string) (*fields, error) {
	values, err := url.ParseQuery(text)
	if err != nil {
		return nil, badRequest("invalid_form", "the form is malformed")
	}
	f := &fields{problems: problems{}, raw: map[string]json.RawMessage{}, isForm: true}
	for name, sent := range values {
		if len(sent) != 1 {
			return nil, badRequest("invalid_form", "the form must not repeat "+excerpt(name))
		}
		if !utf8.ValidString(sent[0]) || strings.Contains(sent[0], "\x00") {
			return nil, badRequest("invalid_form", "the form must be valid UTF-8 without NUL")
		}
		f.raw[name] = json.RawMessage("null")
		if sent[0] != "" {
			f.raw[name], _ = json.Marshal(sent[0]) // a string never fails
		}
	}
	return f, nil
}

// ---- fields ----

// has says whether the field was sent, null included.
func (f *fields) has(name string) bool {
	_, ok := f.raw[name]
	return ok
}

// hasAny says whether one of the fields was sent.
func (f *fields) hasAny(names ...string) bool { return slices.ContainsFunc(names, f.has) }

// null says whether the field is absent or null.
func (f *fields) null(name string) bool {
	return !f.has(name) || string(f.raw[name]) == "null"
}

// given says whether the field has a value. If it has not but must, that is noted.
func (f *fields) given(name string, required bool) bool {
	if f.null(name) && required {
		f.refuse(name, "is required")
	}
	return !f.null(name)
}

// nameOf is for a field of several names: it returns the one that was sent, or the first. Two of
// them may only say the same.
func (f *fields) nameOf(names ...string) string {
	sent := slices.DeleteFunc(slices.Clone(names), f.null)
	for _, name := range sent[min(1, len(sent)):] {
		if !bytes.Equal(f.raw[name], f.raw[sent[0]]) {
			f.refuse(name, "must not differ from "+sent[0])
		}
	}
	if len(sent) > 0 {
		return sent[0]
	}
	if i := slices.IndexFunc(names, f.has); i >= 0 { // it is null
		return names[i]
	}
	return names[0]
}

// targetName is the name under which the target was sent.
func (f *fields) targetName() string { return f.nameOf("original_url", "long_url", "url") }

// codeName is the name under which the code of a new link was sent.
func (f *fields) codeName() string { return f.nameOf("custom_code", "short_code") }

// str takes a string field as it was sent. It says false if there is none.
func (f *fields) str(name string, required bool) (string, bool) {
	if !f.given(name, required) {
		return "", false
	}
	var s string
	if json.Unmarshal(f.raw[name], &s) != nil {
		f.refuse(name, "must be a string")
		return "", false
	}
	return s, true
}

// text takes a string field without the blanks at its ends, if it passes check. It is "" if it is
// absent, null or blank, which a required one must not be.
func (f *fields) text(name string, required bool, check func(string) error) string {
	s, ok := f.str(name, required)
	s = cleanText(s)
	if !ok {
		return ""
	}
	if s == "" {
		if required {
			f.refuse(name, "must not be empty")
		}
		return ""
	}
	if err := check(s); err != nil {
		f.refuse(name, err.Error())
	}
	return s
}

// target takes a link's target as it is to be stored, or as it was sent if it must not be one.
func (f *fields) target(name string, required bool, rules targetRules) string {
	s, ok := f.str(name, required)
	if !ok {
		return ""
	}
	clean, err := rules.check(s)
	if err != nil {
		f.refuse(name, err.Error())
		return cleanText(s)
	}
	return clean
}

// id takes an integer from 1 to maxID. It is 0 if it is absent or null. 1.0 and true are no
// integers, nor is "1" outside a form.
func (f *fields) id(name string, required bool) int64 {
	if !f.given(name, required) {
		return 0
	}
	text := string(f.raw[name])
	if f.isForm {
		text, _ = f.str(name, required)
	}
	n := parseID(text)
	if n == 0 {
		f.refuse(name, fmt.Sprintf("must be an integer from 1 to %d", int64(maxID)))
	}
	return n
}

// flag takes a boolean. It is nil if it is absent, or null, which is no boolean and noted as such.
func (f *fields) flag(name string) *bool {
	if f.has(name) && f.null(name) {
		f.refuse(name, "must be true or false")
	}
	return f.flagOrNull(name)
}

// flagOrNull takes a boolean. It is nil if it is absent or null.
func (f *fields) flagOrNull(name string) *bool {
	if f.null(name) {
		return nil
	}
	text := string(f.raw[name])
	if f.isForm {
		text, _ = f.str(name, false)
	}
	value, ok := parseFlag(text, f.isForm)
	if !ok {
		f.refuse(name, "must be true or false")
		return nil
	}
	return &value
}

// parseFlag reads a boolean, leniently where all there is is text.
func parseFlag(text string, lenient bool) (value, ok bool) {
	if text == "true" || text == "false" {
		return text == "true", true
	}
	if !lenient {
		return false, false
	}
	switch strings.ToLower(text) {
	case "true", "on", "yes", "1":
		return true, true
	case "false", "off", "no", "0":
		return false, true
	}
	return false, false
}

// object takes an object as compact JSON. An absent or null one is {}.
func (f *fields) object(name string) json.RawMessage {
	if !f.given(name, false) {
		return json.RawMessage("{}")
	}
	var compact bytes.Buffer
	raw := f.raw[name]
	if raw[0] != '{' || json.Compact(&compact, raw) != nil {
		f.refuse(name, "must be a JSON object")
		return nil
	}
	return compact.Bytes()
}

// time takes a time. It says false if the field is absent, null or no time.
func (f *fields) time(name string) (time.Time, bool) {
	s, ok := f.str(name, false)
	if !ok {
		return time.Time{}, false
	}
	t, err := parseTime(cleanText(s))
	if err != nil {
		f.refuse(name, err.Error())
		return time.Time{}, false
	}
	return t, true
}

// future takes a time after now. An absent or null one is the zero time.
func (f *fields) future(name string, now time.Time) time.Time {
	t, ok := f.time(name)
	if ok && !t.After(now) {
		f.refuse(name, "must be in the future")
	}
	return t
}

// expiry takes the time at which a link that exists shall end. Old is its time so far, nil for
// none. The result is nil if that does not change, the zero time if the link shall never end, and
// now for any time that is past.
func (f *fields) expiry(name string, old *stamp, now time.Time) *time.Time {
	if !f.has(name) {
		return nil
	}
	if f.null(name) {
		if old == nil {
			return nil
		}
		return &time.Time{}
	}
	t, ok := f.time(name)
	if !ok || old != nil && t.Equal(old.Truncate(time.Second)) {
		return nil
	}
	if t.Before(now) {
		t = now.UTC().Truncate(time.Second)
	}
	return &t
}

// unchanged is for a field that nobody can change: it may be sent back as it is, which want says in
// Go's terms, or be left out.
func (f *fields) unchanged(name string, want any) {
	if !f.has(name) {
		return
	}
	wanted, err := json.Marshal(want)
	if err != nil || !sameJSON(f.raw[name], wanted) {
		f.refuse(name, "cannot be changed")
	}
}

// sameJSON says whether two JSON texts mean the same.
func sameJSON(a, b []byte) bool {
	return reflect.DeepEqual(decodeExactly(a), decodeExactly(b))
}

// decodeExactly decodes a valid JSON text without rounding its numbers.
func decodeExactly(text []byte) any {
	var value any
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	decoder.Decode(&value) // it is valid
	return value
}

// ---- query strings and paths ----

// query reads typed values from a query string and notes what is wrong with them, as fields does
// for bodies. An empty value is a value; parameters nobody asks for are ignored.
type query struct {
	problems
	values url.Values
}

// newQuery parses r's query string. A malformed one is noted, and err then says so.
func newQuery(r *http.Request) *query {
	values, err := url.ParseQuery(r.URL.RawQuery)
	q := &query{problems: problems{}, values: values}
	if err != nil {
		q.refuse("query", "is malformed")
	}
	return q
}

// get returns a parameter and whether it was sent. It may be sent once.
func (q *query) get(name string) (string, bool) {
	sent := q.values[name]
	if len(sent) > 1 {
		q.refuse(name, "must not be repeated")
	}
	return q.values.Get(name), len(sent) > 0
}

// int takes an integer from low to high. An absent one is absent.
func (q *query) int(name string, low, high, absent int64) int64 {
	text, ok := q.get(name)
	if !ok {
		return absent
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < low || n > high {
		q.refuse(name, fmt.Sprintf("must be an integer from %d to %d", low, high))
		return absent
	}
	return n
}

// id takes an integer, however senseless as an id: a list may be empty. It is nil if it is absent.
func (q *query) id(name string) *int64 {
	if !q.values.Has(name) {
		return nil
	}
	n := q.int(name, math.MinInt64, math.MaxInt64, 0)
	return &n
}

// flag takes a boolean. It is nil if it is absent.
func (q *query) flag(name string) *bool {
	text, ok := q.get(name)
	if !ok {
		return nil
	}
	value, ok := parseFlag(text, true)
	if !ok {
		q.refuse(name, "must be true or false")
		return nil
	}
	return &value
}

// text takes a text that passes check. It is "" if it is absent.
func (q *query) text(name string, check func(string) error) string {
	text, ok := q.get(name)
	if !ok {
		return ""
	}
	if err := check(text); err != nil {
		q.refuse(name, err.Error())
		return ""
	}
	return text
}

// page takes page, per_page, skip, which is how many rows come before the first one wanted, and
// after, the id of the row before it. Rows before a page are walked over, those before an id are
// not: so pages end where walking gets dear. Of a page beyond that only one row is asked for: it is
// empty if there is none, and else refused.
func (q *query) page() page {
	const maxPage = math.MaxInt32 // times maxBulk it fits into 64 bits
	size := q.int("per_page", 1, maxBulk, maxBulk)
	skip := (q.int("page", 1, maxPage, 1)-1)*size + q.int("skip", 0, maxSkip, 0)
	after := q.int("after", 0, maxID, 0)
	if skip > maxSkip {
		return page{limit: 1, offset: maxSkip + 1, after: after, beyond: true}
	}
	return page{limit: int(size), offset: int(skip), after: after}
}

// pathID is the {id} of a path. What is no positive integer is 0, which no row has.
func pathID(r *http.Request) int64 {
	return parseID(r.PathValue("id"))
}

// parseID reads an id in digits. It is 0 for what is no integer from 1 to maxID.
func parseID(text string) int64 {
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil || n > maxID {
		return 0
	}
	return int64(n)
}
