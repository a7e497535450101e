package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// What strangers send. Whatever it is: no 5xx, no panic, no row written or changed, and an error envelope.

// hostileBodies are wrong for every route that takes a body.
var hostileBodies = map[string]string{
	"empty":                     "",
	"spaces":                    " \n\t ",
	"bare word":                 "hello",
	"bare URL":                  "https://example.com/",
	"form":                      "url=https://example.com&username=x&email=x@example.com",
	"XML":                       `<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>`,
	"YAML":                      "url: https://example.com\n",
	"SQL":                       `'; DROP TABLE urls; --`,
	"string":                    `"https://example.com"`,
	"empty string":              `""`,
	"number":                    `42`,
	"negative number":           `-1`,
	"float":                     `1.5e300`,
	"huge number":               strings.Repeat("9", 400),
	"infinity":                  `Infinity`,
	"NaN":                       `NaN`,
	"true":                      `true`,
	"false":                     `false`,
	"null":                      `null`,
	"undefined":                 `undefined`,
	"empty array":               `[]`,
	"array of null":             `[null]`,
	"array of strings":          `["a","b"]`,
	"array of numbers":          `[1,2,3]`,
	"array of arrays":           `[[],[[]]]`,
	"array of objects":          `[{}]`,
	"empty object":              `{}`,
	"object with an empty name": `{"":""}`,
	"all null":                  `{"url":null,"original_url":null,"user_id":null,"username":null,"email":null,"event_type":null,"url_id":null,"is_active":null}`,
	"all numbers":               `{"url":1,"original_url":1,"user_id":1.5,"username":1,"email":1,"event_type":1,"url_id":1.5,"is_active":1,"title":1}`,
	"all true":                  `{"url":true,"original_url":true,"user_id":true,"username":true,"email":true,"event_type":true,"url_id":true,"title":true,"expires_at":true}`,
	"all arrays":                `{"url":[],"original_url":[],"user_id":[],"username":[],"email":[],"event_type":[],"url_id":[],"title":[],"details":[]}`,
	"all objects":               `{"url":{},"original_url":{},"user_id":{},"username":{},"email":{},"event_type":{},"url_id":{},"title":{}}`,
	"all empty":                 `{"url":"","original_url":"","user_id":"","username":"","email":"","event_type":"","url_id":""}`,
	"all strings":               `{"url":"x","original_url":"x","user_id":"1","username":" x","email":"x","event_type":" x","url_id":"1","is_active":"true"}`,
	"negative ids":              `{"url":"https://example.com","original_url":"https://example.com","user_id":-1,"url_id":-1,"event_type":"x","is_active":5}`,
	"overflowing ids":           `{"url":"https://example.com","original_url":"https://example.com","user_id":99999999999999999999,"url_id":18446744073709551616,"event_type":"x","is_active":5}`,
	"ids with exponents":        `{"url":"https://example.com","original_url":"https://example.com","user_id":1e0,"url_id":1e0,"event_type":"x","is_active":5}`,
	"duplicate keys":            `{"url":"https://example.com","url":"https://example.org","user_id":1,"user_id":1,"username":"x","username":"y","event_type":"x","event_type":"x","title":"a","title":"b"}`,
	"duplicate keys, escaped":   `{"url":"https://example.com","\u0075rl":"https://example.org","user_id":1,"user\u005fid":1,"username":"x","\u0075sername":"y","event_type":"x","event\u005ftype":"x","title":"a","t\u0069tle":"b"}`,
	"two values":                `{"url":"https://example.com","user_id":1}{"url":"https://example.com","user_id":1}`,
	"comma after":               `{"username":"x","email":"x@example.com","url":"https://example.com","user_id":1,"title":"x",}`,
	"single quotes":             `{'url':'https://example.com'}`,
	"comment":                   `{"username":"x","email":"x@example.com","url":"https://example.com","user_id":1,"title":"x"/* c */}`,
	"unfinished object":         `{"url":"https://example.com"`,
	"unfinished string":         `{"url":"https://exam`,
	"unfinished escape":         `{"url":"\u00`,
	"bad escape":                `{"title":"\x","username":"\q"}`,
	"raw newline in string":     "{\"title\":\"a\nb\",\"username\":\"a\nb\"}",
	"BOM":                       "\ufeff" + `{"username":"x","email":"x@example.com","url":"https://example.com","user_id":1,"title":"x","event_type":"x","url_id":1}`,
	"UTF-16":                    "\xff\xfe{\x00}\x00",
	"bad UTF-8":                 "{\"title\":\"\xff\xfe\",\"username\":\"\xc0\xaf\",\"url\":\"https://example.com/\xff\",\"user_id\":1,\"event_type\":\"\xff\",\"url_id\":1}",
	"surrogate as UTF-8":        "{\"title\":\"\xed\xa0\x80\"}",
	"raw NUL":                   "{\"title\":\"a\x00b\",\"username\":\"a\x00b\"}",
	"only NUL":                  "\x00\x00\x00",
	"escaped NUL":               `{"title":"a\u0000b","username":"a\u0000b","email":"x@example.com","url":"https://example.com","user_id":1,"event_type":"\u0000","url_id":1,"details":{"\u0000":1}}`,
	"control characters":        `{"title":"a\u0007b","username":"a\u001bb","email":"x\r\n@example.com","url":"https://example.com/\r\nSet-Cookie: a=b","original_url":"https://example.com/\u0085","user_id":1,"event_type":"\b","url_id":1}`,
	"deep arrays":               strings.Repeat("[", 8000) + strings.Repeat("]", 8000),
	"deep objects":              strings.Repeat(`{"a":`, 2000) + "1" + strings.Repeat("}", 2000),
	"deep and never closed":     strings.Repeat("[", 16000),
	"deep details":              `{"event_type":"x","url_id":1,"details":` + strings.Repeat(`{"a":`, 40) + "1" + strings.Repeat("}", 41),
	"many names":                "{" + strings.Repeat(`"a":1,`, 2000) + `"b":1}`,
	"long texts":                `{"title":"` + strings.Repeat("t", 501) + `","username":"` + strings.Repeat("u", 501) + `","email":"` + strings.Repeat("e", 501) + `@example.com","url":"https://example.com/` + strings.Repeat("p", 2048) + `","user_id":1,"event_type":"` + strings.Repeat("e", 501) + `","url_id":1}`,
	"17 KiB":                    `{"title":"` + strings.Repeat("x", 17<<10) + `"}`,
	"9 MiB":                     `["` + strings.Repeat("x", 9<<20) + `"]`,
	"CSV formula":               `=cmd|' /C calc'!A0`,
	"JSON pointer to prototype": `{"__proto__":{"is_active":true},"constructor":{"prototype":{}}}`,
	"past expiry":               `{"username":1,"url":"https://example.com","original_url":"https://example.com","user_id":1,"expires_at":"1970-01-01T00:00:00Z","event_type":"x","url_id":0}`,
	"reserved code":             `{"username":1,"url":"https://example.com","user_id":1,"custom_code":"metrics","original_url":"x","event_type":"x","url_id":0}`,
	"code with a slash":         `{"username":1,"url":"https://example.com","user_id":1,"short_code":"../etc","original_url":"x","event_type":"x","url_id":0}`,
}

// hostileRequests are a request line, header lines, and after an empty line a body; \n is sent as \r\n.
var hostileRequests = map[string]string{
	// paths that net/http's client would refuse or clean
	"path with NUL":                 "GET /abc%00def HTTP/1.1\n\n",
	"path of NUL":                   "GET /%00 HTTP/1.1\n\n",
	"id with NUL":                   "GET /users/1%00 HTTP/1.1\n\n",
	"redirect with NUL":             "GET /urls/%00/redirect HTTP/1.1\n\n",
	"stats with NUL":                "GET /stats/%00%00%00 HTTP/1.1\n\n",
	"delete with NUL":               "DELETE /urls/1%00 HTTP/1.1\n\n",
	"path with an encoded slash":    "GET /known%2Fx HTTP/1.1\n\n",
	"id with an encoded slash":      "GET /users%2F1 HTTP/1.1\n\n",
	"delete with an encoded slash":  "DELETE /urls%2F1 HTTP/1.1\n\n",
	"redirect with encoded slashes": "GET /urls%2Fknown%2Fredirect HTTP/1.1\n\n",
	"only an encoded slash":         "GET /%2F HTTP/1.1\n\n",
	"encoded dots":                  "GET /%2e%2e%2f%2e%2e%2fetc%2fpasswd HTTP/1.1\n\n",
	"encoded dot segment":           "GET /users/%2e%2e HTTP/1.1\n\n",
	"encoded backslash":             "GET /%5C%5Cevil.example HTTP/1.1\n\n",
	"backslash":                     "GET /\\evil.example HTTP/1.1\n\n",
	"encoded newline":               "GET /known%0d%0aSet-Cookie:%20a=b HTTP/1.1\n\n",
	"encoded space":                 "GET /known%20 HTTP/1.1\n\n",
	"encoded bad UTF-8":             "GET /%ff%fe%c0%af HTTP/1.1\n\n",
	"raw bad UTF-8":                 "GET /\xff\xfe\xc0\xaf HTTP/1.1\n\n",
	"raw UTF-8":                     "GET /ключ HTTP/1.1\n\n",
	"emoji":                         "GET /%F0%9F%92%A9 HTTP/1.1\n\n",
	"full-width code":               "GET /%EF%BD%8Bnown HTTP/1.1\n\n",
	"bad escape":                    "GET /%zz HTTP/1.1\n\n",
	"cut escape":                    "GET /known% HTTP/1.1\n\n",
	"double encoded":                "GET /%2525252e HTTP/1.1\n\n",
	"asterisk":                      "GET * HTTP/1.1\n\n",
	"no slash":                      "GET known HTTP/1.1\n\n",
	"long path":                     "GET /" + strings.Repeat("a", 12_000) + " HTTP/1.1\n\n",
	"long id":                       "GET /users/" + strings.Repeat("9", 5000) + " HTTP/1.1\n\n",
	"negative id":                   "DELETE /urls/-1 HTTP/1.1\n\n",
	"overflowing id":                "DELETE /urls/18446744073709551617 HTTP/1.1\n\n",
	"hex id":                        "DELETE /urls/0x1 HTTP/1.1\n\n",
	"id with exponent":              "DELETE /urls/1e0 HTTP/1.1\n\n",
	"id with spaces":                "DELETE /urls/%201 HTTP/1.1\n\n",
	"id in other digits":            "DELETE /urls/%D9%A1 HTTP/1.1\n\n",
	"SQL in an id":                  "DELETE /urls/1%20OR%201=1 HTTP/1.1\n\n",
	"SQL in a filter":               "GET /urls?user_id=1%27%20OR%201=1-- HTTP/1.1\n\n",
	"SQL in a code filter":          "GET /urls?short_code=%27%3BDROP%20TABLE%20urls-- HTTP/1.1\n\n",
	"NUL in a filter":               "GET /urls?short_code=a%00b HTTP/1.1\n\n",
	"NUL in a type filter":          "GET /events?event_type=a%00b HTTP/1.1\n\n",
	"bad UTF-8 in a filter":         "GET /events?event_type=%ff HTTP/1.1\n\n",
	"raw bad UTF-8 in a filter":     "GET /events?event_type=\xff HTTP/1.1\n\n",
	"bad escape in a filter":        "GET /events?event_type=%zz HTTP/1.1\n\n",
	"semicolon in a query":          "GET /users?page=1;per_page=1 HTTP/1.1\n\n",
	"huge page":                     "GET /users?page=2147483649 HTTP/1.1\n\n",
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
	// what breaks HTTP itself: net/http answers, in plain text
	"NUL in the request line":        "GET /\x00 HTTP/1.1\n\n",
	"space in the request line":      "GET /a b HTTP/1.1\n\n",
	"no version":                     "GET /known\n\n",
	"unknown version":                "GET /known HTTP/9.9\n\n",
	"no host":                        "GET /known HTTP/1.1\nX-No-Host:\n\n",
	"two hosts":                      "GET /known HTTP/1.1\nHost: a\nHost: b\n\n",
	"bad host":                       "GET /known HTTP/1.1\nHost: a b\n\n",
	"header without colon":           "GET /known HTTP/1.1\nbroken\n\n",
	"header with spaces in name":     "GET /known HTTP/1.1\nBad Name: x\n\n",
	"folded first header":            "GET /known HTTP/1.1\n x: y\n\n",
	"NUL in a header":                "GET /known HTTP/1.1\nX-A: a\x00b\n\n",
	"huge header":                    "GET /known HTTP/1.1\nX-A: " + strings.Repeat("a", 2<<20) + "\n\n",
	"many headers":                   "GET /known HTTP/1.1\n" + strings.Repeat("X-A: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n", 40_000) + "\n",
	"not HTTP":                       "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n",
	"two lengths":                    "POST /users HTTP/1.1\nContent-Length: 5\nContent-Length: 6\n\n{}",
	"negative length":                "POST /users HTTP/1.1\nContent-Length: -1\n\n{}",
	"overflowing length":             "POST /users HTTP/1.1\nContent-Length: 99999999999999999999\n\n{}",
	"length and chunked":             "POST /users HTTP/1.1\nContent-Length: 3\nTransfer-Encoding: chunked\n\n0\n\n",
	"unknown transfer coding":        "POST /users HTTP/1.1\nTransfer-Encoding: gzip\n\n{}",
	"bad chunk length":               "POST /users HTTP/1.1\nContent-Type: application/json\nTransfer-Encoding: chunked\n\nzz\n{}\n0\n\n",
	"bad chunk length, any type":     "POST /shorten HTTP/1.1\nTransfer-Encoding: chunked\n\n-1\n{}\n0\n\n",
	"overflowing chunk length":       "POST /events HTTP/1.1\nTransfer-Encoding: chunked\n\nfffffffffffffffff\n{}\n0\n\n",
	"chunk without an end":           "PUT /users/1 HTTP/1.1\nTransfer-Encoding: chunked\n\n5\n{}xxxxxxxx\n0\n\n",
	"CSV with a bad chunk":           "POST /users/bulk HTTP/1.1\nContent-Type: text/csv\nTransfer-Encoding: chunked\n\n1e\nid,username,email,created_at\r\n\nzz\n",
	"form with a bad chunk":          "POST /users/bulk HTTP/1.1\nContent-Type: multipart/form-data; boundary=X\nTransfer-Encoding: chunked\n\n5\n--X\r\n\nzz\n",
	"compressed body":                "POST /users HTTP/1.1\nContent-Encoding: gzip\nContent-Type: application/json\nContent-Length: 4\n\n\x1f\x8b\x08\x00",
	"impossible expectation":         "POST /users HTTP/1.1\nExpect: miracles\nContent-Length: 2\n\n{}",
	"wrong content type":             "POST /users HTTP/1.1\nContent-Type: text/html\nContent-Length: 2\n\n{}",
	"content type without a slash":   "POST /users HTTP/1.1\nContent-Type: json\nContent-Length: 2\n\n{}",
	"broken content type":            "POST /users HTTP/1.1\nContent-Type: application/json; =\nContent-Length: 2\n\n{}",
	"form without a boundary":        "POST /users/bulk HTTP/1.1\nContent-Type: multipart/form-data\nContent-Length: 2\n\n{}",
	"form with a bad part":           "POST /users/bulk HTTP/1.1\nContent-Type: multipart/form-data; boundary=X\nContent-Length: 20\n\n--X\nbroken\n\nxxxxxxxx",
	"nested form":                    "POST /users/bulk HTTP/1.1\nContent-Type: multipart/mixed; boundary=X\nContent-Length: 6\n\n--X--\n",
	"CSV of NULs":                    "POST /users/bulk HTTP/1.1\nContent-Type: text/csv\nContent-Length: 4\n\n\x00\x00\x00\x00",
	"CSV with a header of one field": "POST /users/bulk HTTP/1.1\nContent-Type: text/csv\nContent-Length: 34\n\n\"id,username,email,created_at\"\n1\n",
	"CSV with NUL in a name":         csvRequest("1,a\x00b,a@example.com,2025-01-01 10:00:00"),
	"CSV with bad UTF-8":             csvRequest("1,\xff,a@example.com,2025-01-01 10:00:00"),
	"CSV with an impossible day":     csvRequest("1,a,a@example.com,2025-02-30 10:00:00"),
	"CSV with the year 0":            csvRequest("1,a,a@example.com,0000-01-01 10:00:00"),
	"CSV with a negative id":         csvRequest("-1,a,a@example.com,2025-01-01 10:00:00"),
	"CSV with the last id":           csvRequest("9223372036854775807,a,a@example.com,2025-01-01 10:00:00"),
	"CSV with an id too large":       csvRequest("9223372036854775808,a,a@example.com,2025-01-01 10:00:00"),
	"CSV with a quote inside":        csvRequest("1,a\"b,a@example.com,2025-01-01 10:00:00"),
	"CSV with a newline in a name":   csvRequest("1,\"a\nb\",a@example.com,2025-01-01 10:00:00"),
	"CSV with too many fields":       csvRequest("1,a,a@example.com,2025-01-01 10:00:00,x"),
	"CSV good and then bad":          csvRequest("1001,a,a@example.com,2025-01-01 10:00:00\n1002,b,b,2025-01-01 10:00:00"),
	"XML to the CSV route":           "POST /users/bulk HTTP/1.1\nContent-Type: application/xml\nContent-Length: 4\n\n<x/>",
	"cross-site write":               "DELETE /urls/1 HTTP/1.1\nSec-Fetch-Site: cross-site\n\n",
	"cross-site write, old browser":  "DELETE /users/1 HTTP/1.1\nOrigin: http://evil.example\n\n",
}

func csvRequest(rows string) string {
	body := strings.ReplaceAll("id,username,email,created_at\n"+rows, "\n", "\r\n")
	return fmt.Sprintf("POST /users/bulk HTTP/1.1\nContent-Type: text/csv\nContent-Length: %d\n\n%s", len(body), strings.ReplaceAll(body, "\r\n", "\n"))
}

// hostileApp is an app with one user, one link and an event, and a function that fails the test if any row changed since.
func hostileApp(t *testing.T) (*app, func(t *testing.T, what string)) {
	a := startApp(t)
	get[wireUser](t, a, 201, "POST", "/users", annJSON)
	get[wireLink](t, a, 201, "POST", "/urls", `{"user_id":1,"original_url":"https://example.com/","short_code":"known","title":"a title"}`)
	db := openDB(t, a.cfg.DatabaseURL)
	rows := func() (all string) {
		for _, table := range []string{"users", "urls", "events"} {
			all += scalar[string](t, db, `SELECT count(*) || ' `+table+` ' || COALESCE(string_agg(md5(t::text), ',' ORDER BY id), '') || E'\n' FROM `+table+` t`)
		}
		return all
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

func TestHostileBodies(t *testing.T) {
	a, unchanged := hostileApp(t)
	if n := len(hostileBodies); n < 60 {
		t.Errorf("only %d bodies", n)
	}
	for name, body := range hostileBodies {
		t.Run(name, func(t *testing.T) {
			for _, route := range []string{"POST /shorten", "POST /users", "POST /urls", "POST /events", "PUT /users/1", "PUT /urls/1", "PATCH /urls/1", "POST /shorten/bulk", "POST /urls/bulk", "POST /users/bulk"} {
				for _, media := range []string{"application/json", "text/csv", "multipart/form-data; boundary=X", "application/x-www-form-urlencoded", ""} {
					method, path, _ := strings.Cut(route, " ")
					r := do(t, method, a.url+path, body, "Content-Type: "+media)
					if r.status == 200 && strings.HasSuffix(path, "/bulk") { // each item for itself
						var bulk wireBulk
						strict(t, r.body, &bulk)
						for _, item := range bulk.Results {
							if item.Status < 400 || item.Status > 499 || item.Error == "" {
								t.Errorf("%s: item %+v", route, item)
							}
						}
						continue
					}
					checkHostile(t, route+" as "+media, r)
				}
			}
			unchanged(t, name)
		})
	}
}

// checkHostile fails unless r is a client's error with our envelope.
func checkHostile(t *testing.T, what string, r reply) {
	t.Helper()
	var e wireError
	if r.status < 400 || r.status > 499 {
		t.Errorf("%s: %d %.300s", what, r.status, r.body)
	} else if strict(t, r.body, &e); e.Error == "" || e.Message == "" {
		t.Errorf("%s: %d without an error: %.300s", what, r.status, r.body)
	}
	checkJSONType(t, r)
}

func TestHostileRequests(t *testing.T) {
	a, unchanged := hostileApp(t)
	for name, request := range hostileRequests {
		t.Run(name, func(t *testing.T) {
			r := sendRaw(t, a, request)
			if r.header.Get("Content-Type") == "text/plain; charset=utf-8" && r.header.Get("Connection") == "close" {
				// net/http refuses what is no HTTP before anybody sees it
				if r.status < 400 || r.status > 505 || r.status == 500 {
					t.Errorf("%d %s", r.status, r.body)
				}
			} else if r.status == http.StatusNotImplemented || r.status == http.StatusExpectationFailed { // likewise, without a body
				if r.body != "" && r.header.Get("Connection") != "close" {
					t.Errorf("%d %s", r.status, r.body)
				}
			} else {
				checkHostile(t, name, r)
			}
			unchanged(t, name)
		})
	}
	if strings.Contains(a.logs.String(), "panic") {
		t.Error("a handler panicked")
	}
}

// TestHostileCleaning: net/http's mux redirects paths with double slashes and dots to their clean form. That must not lead away.
func TestHostileCleaning(t *testing.T) {
	a, unchanged := hostileApp(t)
	for path, want := range map[string]string{
		"//evil.example":    "/evil.example",
		"///evil.example/x": "/evil.example/x",
		"/users/../known":   "/known",
		"/./known":          "/known",
		"//users":           "/users",
		"/urls//1":          "/urls/1",
		"/x/../..//y":       "/y",
	} {
		for _, method := range []string{"GET", "POST", "DELETE"} {
			r := sendRaw(t, a, method+" "+path+" HTTP/1.1\n\n")
			if got := r.header.Get("Location"); r.status/100 != 3 || got != want {
				if r.status < 400 || r.status > 499 || got != "" { // not cleaned is as good
					t.Errorf("%s %s: %d to %q, want %q", method, path, r.status, got, want)
				}
			}
		}
	}
	unchanged(t, "cleaning")
	// absolute-form names another host; the path alone counts
	if r := sendRaw(t, a, "GET http://evil.example/known HTTP/1.1\n\n"); r.status != 302 || r.header.Get("Location") != "https://example.com/" {
		t.Errorf("absolute-form: %d %s", r.status, r.header.Get("Location"))
	}
}

// TestSlowUpload: a client that pauses longer than PostgreSQL lets a transaction idle gets its file loaded, and a client that
// hangs up gets nothing; neither looks like a failure of PostgreSQL.
func TestSlowUpload(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	a, unchanged := hostileApp(t)
	var file strings.Builder
	for i := 10_001; i <= 16_000; i++ {
		fmt.Fprintf(&file, "%d,u%d,u@example.com,2025-01-01 10:00:00\n", i, i)
	}
	for _, hangUp := range []bool{true, false} {
		body, w := io.Pipe()
		go func() {
			io.WriteString(w, csvHead+file.String())
			if hangUp {
				time.Sleep(100 * time.Millisecond)
				w.CloseWithError(io.ErrClosedPipe)
				return
			}
			time.Sleep(6 * time.Second)
			io.WriteString(w, "16001,late,late@example.com,2025-01-01 10:00:00\n")
			w.Close()
		}()
		req, _ := http.NewRequest("POST", a.url+"/users/bulk", body)
		req.Header.Set("Content-Type", "text/csv")
		resp, err := client.Do(req)
		if hangUp {
			if err == nil {
				t.Errorf("%d after hanging up", resp.StatusCode)
			}
			eventually(t, 5*time.Second, "the load has ended", func() bool { return a.store.bulk.n.Load() == 0 })
			unchanged(t, "an upload that broke off")
		} else if err != nil {
			t.Error(err)
		} else if b, _ := io.ReadAll(resp.Body); resp.StatusCode != 201 {
			t.Errorf("slow upload: %d %s", resp.StatusCode, b)
		}
		if a.store.down.Load() || strings.Contains(a.logs.String(), "postgres lost") {
			t.Errorf("hang-up %v: a client opened the breaker", hangUp)
		}
	}
	if u := get[wireUser](t, a, 200, "GET", "/users/16001", ""); u.Username != "late" {
		t.Errorf("%+v", u)
	}
}

// sendRaw sends a request as it stands, but \n sent as \r\n, and with a Host if it names none.
func sendRaw(t *testing.T, a *app, request string) reply {
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
