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
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Everything a stranger can send is judged here, before anything is looked up: codes, targets, JSON bodies, query strings.

const (
	maxTarget   = 2048     // bytes; what browsers and proxies still carry in a Location
	maxText     = 500      // bytes of a title, name or e-mail: generous for people, small for a row
	maxBody     = 16 << 10 // bytes of a JSON body; the largest honest one is a target and a title
	maxBulkBody = 8 << 20  // bytes of a bulk body: maxBulk links of the largest size, with room
	maxBulk     = 1000     // links in one bulk request, also the rows in one list
	maxDepth    = 32       // nesting of a JSON body: people's details are shallow, attacks are deep
	wireTime    = "2006-01-02T15:04:05"
	csvTime     = "2006-01-02 15:04:05"
)

// validCode says whether s can be a short code: 3 to 32 of [0-9A-Za-z_-], the first a letter or digit. Hand-written, since
// it runs on every redirect: 10 ns and no allocation, where a regexp takes 300.
func validCode(s string) bool {
	if len(s) < 3 || len(s) > 32 || s[0] == '-' || s[0] == '_' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '-' || c == '_') {
			return false
		}
	}
	return true
}

// checkCode returns why s cannot be a link's code, or nil. reserved words are those that routes begin with: no redirect could
// be reached under them.
func checkCode(s string) error {
	switch {
	case !validCode(s):
		return errors.New("must be 3 to 32 letters, digits, - or _, the first a letter or digit")
	case reserved[s]:
		return errors.New("is reserved for the service itself")
	}
	return nil
}

// reserved are the first path segments of all routes.
var reserved = map[string]bool{}

func init() { // not in the declaration: routes lead to handlers, and those to checkCode
	for _, rt := range new(Server).routes() {
		_, path, _ := strings.Cut(rt.pattern, " /")
		word, _, _ := strings.Cut(path, "/")
		reserved[word] = true
	}
}

// targetRules decide which targets a link may have.
type targetRules struct {
	ownHost      string // our own host in lower case: a link to ourselves is a loop
	allowPrivate bool   // let links point into private networks and at loopback
}

// privateNets are the ranges netip has no predicate for that still never lead to a public web server (RFC 6890, RFC 6052).
var privateNets = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("240.0.0.0/4"), netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("::/96"),
	netip.MustParsePrefix("2002::/16"), netip.MustParsePrefix("fec0::/10"),
}

// check returns why raw must not be a target, or nil. It refuses what a browser would read differently than it looks.
func (t targetRules) check(raw string) error {
	if len(raw) > maxTarget || !utf8.ValidString(raw) {
		return fmt.Errorf("must be valid UTF-8 of at most %d bytes", maxTarget)
	}
	for _, r := range raw {
		if unicode.IsControl(r) || unicode.IsSpace(r) || unicode.Is(unicode.Cf, r) || strings.ContainsRune("\\\"<>`", r) {
			return fmt.Errorf("must not contain %U", r)
		}
	}
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		return errors.New("must be a URL like https://example.com/page")
	}
	if port, err := strconv.ParseUint(u.Port(), 10, 16); u.Port() != "" && (err != nil || port == 0) || strings.HasSuffix(u.Host, ":") {
		return errors.New("must have a port from 1 to 65535, or none")
	}
	if u.User != nil {
		return errors.New("must not contain a user name or password")
	}
	return t.checkHost(strings.TrimSuffix(strings.ToLower(u.Hostname()), "."))
}

// hostName is one label or more. ASCII only: browsers fold full-width and other look-alike letters to ASCII, so a name that
// passes here as something else could still be localhost there.
var hostName = regexp.MustCompile(`^[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*$`)

// checkHost judges a host in lower case.
func (t targetRules) checkHost(host string) error {
	last := host[strings.LastIndexByte(host, '.')+1:]
	ip, err := netip.ParseAddr(host)
	switch {
	case err == nil && ip.Zone() == "":
		ip = ip.Unmap()
	case !hostName.MatchString(host) || len(host) > 253:
		return errors.New("must have a host of ASCII letters, digits, dots and hyphens (xn--… for others)")
	case '0' <= last[0] && last[0] <= '9': // browsers read 127.1, 0x7f000001 and 2130706433 as IPv4
		return errors.New("must not have a host that only looks like an IP address")
	}
	if own, err := netip.ParseAddr(t.ownHost); host == t.ownHost || err == nil && own.Unmap() == ip {
		return errors.New("must not point back at this service")
	}
	private := last == host || slices.Contains([]string{"localhost", "local", "internal"}, last)
	if ip.IsValid() {
		private = !ip.IsGlobalUnicast() || ip.IsPrivate() || slices.ContainsFunc(privateNets, func(p netip.Prefix) bool { return p.Contains(ip) })
	}
	if private && !t.allowPrivate {
		return errors.New("must not point into a private network")
	}
	return nil
}

// checkText returns why s cannot be stored as one line of people's text, or nil.
func checkText(s string) error {
	if len(s) > maxText || !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		return fmt.Errorf("must be valid UTF-8 of at most %d bytes without control characters", maxText)
	}
	return nil
}

// checkName is checkText for what must not be blank or padded either: user names and event types.
func checkName(s string) error {
	if s == "" || strings.TrimSpace(s) != s {
		return fmt.Errorf("must not be empty or padded with spaces: %q", s)
	}
	return checkText(s)
}

// emailForm is what plausible means. Only a message sent there could tell more.
var emailForm = regexp.MustCompile(`^[^@\s,;<>()"\\]+@[^@\s,;<>()"\\]+\.[^@\s,;<>()"\\.]+$`)

func checkEmail(s string) error {
	if !emailForm.MatchString(s) {
		return fmt.Errorf("must be an e-mail address like name@example.com, not %q", s)
	}
	return checkText(s)
}

// ---- JSON bodies ----

// fields is a JSON object and what was found wrong in it. Each getter takes one field out, so that a handler reads as the list of
// what it accepts; fields nobody asks for are ignored.
type fields struct {
	raw      map[string]json.RawMessage
	problems map[string]string
}

// readFields reads a body that must be a JSON object.
func readFields(w http.ResponseWriter, r *http.Request) (*fields, error) {
	f := &fields{problems: map[string]string{}}
	return f, readJSON(w, r, maxBody, &f.raw)
}

// readJSON reads a JSON body of at most limit bytes into dst, a *map or a *[]json.RawMessage.
// Errors are apiErrors: 415 for another content type, 413 for too much, 400 for the rest.
func readJSON(w http.ResponseWriter, r *http.Request, limit int64, dst any) error {
	if ct := r.Header.Get("Content-Type"); ct != "" {
		if media, _, err := mime.ParseMediaType(ct); err != nil || media != "application/json" {
			return &apiError{http.StatusUnsupportedMediaType, "unsupported_media_type", "Content-Type must be application/json", nil}
		}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		return bodyError(err)
	}
	if err = checkJSON(body); err == nil && (json.Unmarshal(body, dst) != nil || string(bytes.TrimSpace(body)) == "null") {
		err = errors.New("must be a JSON object, or an array of them where many are made")
	}
	if err != nil {
		return &apiError{http.StatusBadRequest, "invalid_json", "the body " + err.Error(), nil}
	}
	return nil
}

// bodyError turns a failed read of a request body into the client's error.
func bodyError(err error) error {
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return &apiError{http.StatusRequestEntityTooLarge, "payload_too_large", fmt.Sprintf("the body must be at most %d bytes", tooLarge.Limit), nil}
	}
	return &apiError{http.StatusBadRequest, "invalid_body", "the body could not be read", nil}
}

// checkJSON returns why body is not one JSON value as we take them. encoding/json would replace bad UTF-8, and PostgreSQL refuses
// an escaped NUL; so does hop (also the rare text that spells \\u0000 out, which nobody will miss).
func checkJSON(body []byte) error {
	switch {
	case !utf8.Valid(body):
		return errors.New("must be valid UTF-8")
	case bytes.Contains(body, []byte(`\u0000`)):
		return errors.New("must not contain NUL")
	case !json.Valid(body):
		return errors.New("must be one JSON value")
	}
	return walkJSON(json.NewDecoder(bytes.NewReader(body)), 0)
}

// walkJSON reads one value of a valid text and refuses deep nesting and repeated names: encoding/json would let the last one win,
// and what one reader ignores another obeys.
func walkJSON(dec *json.Decoder, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("must not be nested deeper than %d", maxDepth)
	}
	open, err := dec.Token()
	if _, nested := open.(json.Delim); err != nil || !nested {
		return err
	}
	for names := map[string]bool{}; dec.More(); {
		if open == json.Delim('{') {
			name, _ := dec.Token()
			if names[name.(string)] {
				return fmt.Errorf("must not repeat the field %q", name)
			}
			names[name.(string)] = true
		}
		if err := walkJSON(dec, depth+1); err != nil {
			return err
		}
	}
	_, err = dec.Token()
	return err
}

// has says whether the field was sent, null included.
func (f *fields) has(name string) bool { _, ok := f.raw[name]; return ok }

// null says whether the field is absent or null.
func (f *fields) null(name string) bool { return !f.has(name) || string(f.raw[name]) == "null" }

// refuse notes what is wrong with a field; the first word on it stands.
func (f *fields) refuse(name, problem string) {
	if _, ok := f.problems[name]; !ok {
		f.problems[name] = problem
	}
}

// given says whether the field has a value; if it has not but must, that is noted.
func (f *fields) given(name string, required bool) bool {
	if f.null(name) && required {
		f.refuse(name, "is required")
	}
	return !f.null(name)
}

// text takes a string field that passes check; an absent or null one is "".
func (f *fields) text(name string, required bool, check func(string) error) (s string) {
	if !f.given(name, required) {
		return ""
	}
	if json.Unmarshal(f.raw[name], &s) != nil {
		f.refuse(name, "must be a string")
	} else if err := check(s); err != nil {
		f.refuse(name, err.Error())
	}
	return s
}

// id takes a positive integer field; an absent or null one is 0. 1.0, "1" and true are no integers.
func (f *fields) id(name string, required bool) (n int64) {
	if f.given(name, required) {
		var err error
		if n, err = strconv.ParseInt(string(f.raw[name]), 10, 64); err != nil || n < 1 {
			f.refuse(name, "must be a positive integer")
		}
	}
	return n
}

// flag takes a boolean field.
func (f *fields) flag(name string) bool {
	s := string(f.raw[name])
	if s != "true" && s != "false" {
		f.refuse(name, "must be true or false")
	}
	return s == "true"
}

// object takes an object field as compact JSON; an absent or null one is {}.
func (f *fields) object(name string) string {
	b := bytes.NewBuffer(nil)
	if !f.given(name, false) {
		return "{}"
	}
	if raw := f.raw[name]; raw[0] != '{' || json.Compact(b, raw) != nil {
		f.refuse(name, "must be a JSON object")
	}
	return b.String()
}

// future takes a time after now, RFC 3339 or without a zone in UTC; an absent or null one is the zero time.
func (f *fields) future(name string, now time.Time) time.Time {
	s := f.text(name, false, checkText)
	if f.null(name) {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		t, err = time.Parse(wireTime, s)
	}
	if err != nil || !t.After(now) || t.UTC().Year() > 9999 {
		f.refuse(name, "must be a time in the future like 2027-01-31T12:00:00Z")
	}
	return t.UTC().Truncate(time.Second)
}

// err is nil, or the 400 that names every refused field.
func (f *fields) err() error {
	if len(f.problems) == 0 {
		return nil
	}
	return &apiError{http.StatusBadRequest, "invalid_request", "some fields are missing or wrong", f.problems}
}

// ---- query strings ----

// page is which part of a list is wanted: limit rows (plus one, to know of more) after offset rows and after the id after.
type page struct {
	limit, offset int
	after         int64
}

// query reads typed values from a query string and notes what is wrong with them, as fields does for bodies.
type query struct {
	values url.Values
	fields
}

// newQuery parses r's query string; a malformed one is refused whole.
func newQuery(r *http.Request) *query {
	values, err := url.ParseQuery(r.URL.RawQuery)
	q := &query{values, fields{problems: map[string]string{}}}
	if err != nil {
		q.refuse("query", "is malformed")
	}
	return q
}

// int takes an integer parameter between low and high; an absent one is def.
func (q *query) int(name string, low, high, def int64) int64 {
	if !q.values.Has(name) {
		return def
	}
	n, err := strconv.ParseInt(q.values.Get(name), 10, 64)
	if err != nil || n < low || n > high {
		q.refuse(name, fmt.Sprintf("must be an integer from %d to %d", low, high))
	}
	return n
}

// page takes page, per_page and after: the last is the id that a Link: rel="next" goes on from, however deep.
func (q *query) page() page {
	const maxPage = 1 << 31 // keeps page × per_page inside 64 bits
	size := q.int("per_page", 1, maxBulk, maxBulk)
	return page{int(size), int((q.int("page", 1, maxPage, 1) - 1) * size), q.int("after", 0, 1<<62, 0)}
}

// filterInt narrows f to an integer column that was asked for.
func (q *query) filterInt(f *filter, column string) {
	if q.values.Has(column) {
		f.and(column+" = ?", q.int(column, math.MinInt64, math.MaxInt64, 0))
	}
}
