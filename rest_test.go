package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// The REST contract, through the real server on real PostgreSQL, once without Redis and once with one. The tables below are the
// contract's own lines: endpoint, case, request, body, status, answer. What needs more than one request to see is in the scenarios
// after them. The wire structs are declared again here, so that a change of the wire breaks a test.

type wireUser struct {
	ID        int64  `json:"id"`
	Username  string `json:"username"`
	Email     string `json:"email"`
	CreatedAt string `json:"created_at"`
}

type wireLink struct {
	ID          int64   `json:"id"`
	UserID      *int64  `json:"user_id"`
	ShortCode   string  `json:"short_code"`
	OriginalURL string  `json:"original_url"`
	Title       *string `json:"title"`
	IsActive    bool    `json:"is_active"`
	CreatedAt   string  `json:"created_at"`
	UpdatedAt   string  `json:"updated_at"`
	ExpiresAt   string  `json:"expires_at,omitempty"`
	ShortURL    string  `json:"short_url,omitempty"` // POST /shorten and the bulk routes
	Cache       string  `json:"cache,omitempty"`     // Redis out of reach
}

type wireEvent struct {
	ID        int64          `json:"id"`
	URLID     int64          `json:"url_id"`
	UserID    *int64         `json:"user_id"`
	EventType string         `json:"event_type"`
	Timestamp string         `json:"timestamp"`
	Details   map[string]any `json:"details"`
}

type wireStats struct {
	wireLink
	ClickCount    int64      `json:"click_count"`
	LastClickedAt *string    `json:"last_clicked_at"`
	BotClicks     int64      `json:"bot_clicks"`
	ClicksPerDay  []wireDay  `json:"clicks_per_day"`
	TopReferrers  []wireHost `json:"top_referrers"`
}

type wireDay struct {
	Day    string `json:"day"`
	Clicks int64  `json:"clicks"`
}

type wireHost struct {
	Referrer string `json:"referrer"`
	Clicks   int64  `json:"clicks"`
}

type wireHealth struct {
	Status   string     `json:"status"`
	Ready    bool       `json:"ready"`
	Draining bool       `json:"draining"`
	Postgres wirePeer   `json:"postgres"`
	Redis    wirePeer   `json:"redis"`
	Clicks   wireClicks `json:"clicks"`
}

type wirePeer struct {
	Status    string  `json:"status"`
	LatencyMS float64 `json:"latency_ms"`
}

type wireClicks struct {
	Journal string `json:"journal"`
	Pending int64  `json:"pending"`
}

type wireError struct {
	Error   string            `json:"error"`
	Message string            `json:"message"`
	Fields  map[string]string `json:"fields,omitempty"`
}

type wireBulk struct {
	Results []wireResult `json:"results"`
}

type wireResult struct {
	Status  int               `json:"status"`
	URL     *wireLink         `json:"url,omitempty"`
	Error   string            `json:"error,omitempty"`
	Message string            `json:"message,omitempty"`
	Fields  map[string]string `json:"fields,omitempty"`
}

// call is one line of a table. request is the request line's method and path, then header lines. want is the answer's body:
//
//	{…} or […]     this JSON, the same members and no more; the strings <time>, <code>, <int>, <number>, <text>, <fields> stand for such values
//	!code a,b      an error envelope with this code, naming these fields and no others
//	-> target      a redirect: no body, and exactly this Location
//	~text          text that contains this
//	nothing        no body, no Location
type call struct {
	endpoint, name, request, body string
	status                        int
	want                          string
}

// group is a table that runs from top to bottom on an app of its own with an empty database, so ids count from 1.
type group struct {
	name     string
	settings []string
	calls    []call
}

const (
	annJSON  = `{"username":"ann","email":"ann@example.com"}`
	annUser  = `{"id":1,"username":"ann","email":"ann@example.com","created_at":"<time>"}`
	linkOne  = `{"id":1,"user_id":1,"short_code":"<code>","original_url":"https://example.com/1","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>"}`
	linkTwo  = `{"id":2,"user_id":1,"short_code":"my-code","original_url":"https://example.com/2","title":"Two","is_active":true,"created_at":"<time>","updated_at":"<time>","expires_at":"2099-01-31T12:00:00"}`
	csvHead  = "id,username,email,created_at\n"
	anyToken = "0123456789abcdef0123456789abcdef"
	ua       = "\nUser-Agent: "
)

// form is a multipart body around a CSV, and its header line.
func form(csv string, before ...string) string {
	var b strings.Builder
	for _, field := range before {
		b.WriteString("--XX\r\nContent-Disposition: form-data; name=\"" + field + "\"\r\n\r\nvalue\r\n")
	}
	return b.String() + "--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"users.csv\"\r\nContent-Type: text/csv\r\n\r\n" + csv +
		"\r\n--XX\r\nContent-Disposition: form-data; name=\"row_count\"\r\n\r\n2\r\n--XX--\r\n"
}

const (
	multi = "POST /users/bulk\nContent-Type: multipart/form-data; boundary=XX"
	raw   = "POST /users/bulk\nContent-Type: text/csv"
)

func contractTables(redis string) []group {
	large := `{"username":"` + strings.Repeat("x", 17<<10) + `"}`
	text := "\nContent-Type: text/plain"
	newAnn := call{"POST /users", "201", "POST /users", annJSON, 201, annUser}
	newLink := call{"POST /urls", "201", "POST /urls", `{"user_id":1,"original_url":"https://example.com/1"}`, 201, linkOne}
	return []group{
		{"health", nil, []call{
			{"GET /health", "200 redis " + redis, "GET /health", "", 200, `{"status":"ok","ready":true,"draining":false,"postgres":{"status":"up","latency_ms":"<number>"},"redis":{"status":"` + redis + `","latency_ms":"<number>"},"clicks":{"journal":"disk","pending":"<int>"}}`},
			{"GET /health", "HEAD", "HEAD /health", "", 200, ""},
			{"GET /health", "405", "POST /health", "{}", 405, "!method_not_allowed"},
			{"GET /health/live", "200", "GET /health/live", "", 200, `{"status":"ok"}`},
			{"GET /metrics", "200", "GET /metrics", "", 200, "~hop_ready 1"},
			{"GET /openapi.yaml", "200", "GET /openapi.yaml", "", 200, "~openapi: 3.1"},
			{"errors", "404 no such path", "GET /no/such/path", "", 404, "!not_found"},
			{"errors", "404 trailing slash", "GET /users/", "", 404, "!not_found"},
			{"errors", "404 post nowhere", "POST /no/such/path", "{}", 404, "!not_found"},
			{"errors", "405 delete users", "DELETE /users", "", 405, "!method_not_allowed"},
			{"errors", "405 put shorten", "PUT /shorten", "{}", 405, "!method_not_allowed"},
			{"errors", "405 patch events", "PATCH /events", "{}", 405, "!method_not_allowed"},
			{"errors", "405 post to a code", "POST /abcdef", "{}", 405, "!method_not_allowed"},
			{"errors", "405 put to a code", "PUT /abcdef", "{}", 405, "!method_not_allowed"},
			{"errors", "405 options", "OPTIONS /urls", "", 405, "!method_not_allowed"},
			{"errors", "405 unknown method", "BREW /urls", "", 405, "!method_not_allowed"},
		}},
		{"users", nil, []call{
			{"GET /users", "200 empty", "GET /users", "", 200, `[]`},
			newAnn,
			{"POST /users", "201 next id, unknown fields ignored", "POST /users", `{"username":"bob","email":"bob@example.com","id":77,"admin":true}`, 201, `{"id":2,"username":"bob","email":"bob@example.com","created_at":"<time>"}`},
			{"POST /users", "201 charset", "POST /users\nContent-Type: application/json; charset=utf-8", `{"username":"Зоя","email":"zoya@example.com"}`, 201, `{"id":3,"username":"Зоя","email":"zoya@example.com","created_at":"<time>"}`},
			{"POST /users", "409 same username", "POST /users", `{"username":"ann","email":"other@example.com"}`, 409, "!user_exists"},
			{"POST /users", "409 same email", "POST /users", `{"username":"other","email":"ann@example.com"}`, 409, "!user_exists"},
			{"POST /users", "400 empty object", "POST /users", `{}`, 400, "!invalid_request email,username"},
			{"POST /users", "400 no username", "POST /users", `{"email":"x@example.com"}`, 400, "!invalid_request username"},
			{"POST /users", "400 no email", "POST /users", `{"username":"x"}`, 400, "!invalid_request email"},
			{"POST /users", "400 empty username", "POST /users", `{"username":"","email":"x@example.com"}`, 400, "!invalid_request username"},
			{"POST /users", "400 blank username", "POST /users", `{"username":"  ","email":"x@example.com"}`, 400, "!invalid_request username"},
			{"POST /users", "400 number as username", "POST /users", `{"username":5,"email":"x@example.com"}`, 400, "!invalid_request username"},
			{"POST /users", "400 boolean as username", "POST /users", `{"username":true,"email":"x@example.com"}`, 400, "!invalid_request username"},
			{"POST /users", "400 null username", "POST /users", `{"username":null,"email":"x@example.com"}`, 400, "!invalid_request username"},
			{"POST /users", "400 array as email", "POST /users", `{"username":"x","email":["x@example.com"]}`, 400, "!invalid_request email"},
			{"POST /users", "400 empty email", "POST /users", `{"username":"x","email":""}`, 400, "!invalid_request email"},
			{"POST /users", "400 implausible email", "POST /users", `{"username":"x","email":"nobody"}`, 400, "!invalid_request email"},
			{"POST /users", "400 email without domain", "POST /users", `{"username":"x","email":"x@"}`, 400, "!invalid_request email"},
			{"POST /users", "400 no body", "POST /users\nContent-Type: application/json", "", 400, "!invalid_json"},
			{"POST /users", "400 bare word", "POST /users", `hello`, 400, "!invalid_json"},
			{"POST /users", "400 string", "POST /users", `"hello"`, 400, "!invalid_json"},
			{"POST /users", "400 number", "POST /users", `5`, 400, "!invalid_json"},
			{"POST /users", "400 null", "POST /users", `null`, 400, "!invalid_json"},
			{"POST /users", "400 array", "POST /users", `[` + annJSON + `]`, 400, "!invalid_json"},
			{"POST /users", "400 two values", "POST /users", annJSON + annJSON, 400, "!invalid_json"},
			{"POST /users", "413", "POST /users", large, 413, "!payload_too_large"},
			{"POST /users", "415", "POST /users" + text, annJSON, 415, "!unsupported_media_type"},
			{"POST /users", "415 form", "POST /users\nContent-Type: application/x-www-form-urlencoded", "username=x&email=x@example.com", 415, "!unsupported_media_type"},
			{"GET /users/{id}", "200", "GET /users/1", "", 200, annUser},
			{"GET /users/{id}", "404 unknown", "GET /users/99", "", 404, "!not_found"},
			{"GET /users/{id}", "404 no number", "GET /users/abc", "", 404, "!not_found"},
			{"GET /users/{id}", "404 zero", "GET /users/0", "", 404, "!not_found"},
			{"GET /users/{id}", "404 negative", "GET /users/-1", "", 404, "!not_found"},
			{"GET /users/{id}", "404 overflowing", "GET /users/9223372036854775808", "", 404, "!not_found"},
			{"GET /users", "200 all in id order", "GET /users", "", 200, `[` + annUser + `,{"id":2,"username":"bob","email":"bob@example.com","created_at":"<time>"},{"id":3,"username":"Зоя","email":"zoya@example.com","created_at":"<time>"}]`},
			{"GET /users", "200 page 1", "GET /users?page=1&per_page=1", "", 200, `[` + annUser + `]`},
			{"GET /users", "200 page 2", "GET /users?page=2&per_page=1", "", 200, `[{"id":2,"username":"bob","email":"bob@example.com","created_at":"<time>"}]`},
			{"GET /users", "200 past the end", "GET /users?page=9&per_page=1000", "", 200, `[]`},
			{"GET /users", "200 page without per_page", "GET /users?page=2", "", 200, `[]`},
			{"GET /users", "400 page 0", "GET /users?page=0", "", 400, "!invalid_request page"},
			{"GET /users", "400 page -1", "GET /users?page=-1", "", 400, "!invalid_request page"},
			{"GET /users", "400 page word", "GET /users?page=x", "", 400, "!invalid_request page"},
			{"GET /users", "400 page empty", "GET /users?page=", "", 400, "!invalid_request page"},
			{"GET /users", "400 page overflowing", "GET /users?page=99999999999999999999", "", 400, "!invalid_request page"},
			{"GET /users", "400 per_page 0", "GET /users?per_page=0", "", 400, "!invalid_request per_page"},
			{"GET /users", "400 per_page 1001", "GET /users?per_page=1001", "", 400, "!invalid_request per_page"},
			{"GET /users", "400 after word", "GET /users?after=x", "", 400, "!invalid_request after"},
			{"GET /users", "400 both", "GET /users?page=x&per_page=x", "", 400, "!invalid_request page,per_page"},
			{"GET /users", "400 malformed query", "GET /users?page=%zz", "", 400, "!invalid_request query"},
			{"PUT /users/{id}", "200 username", "PUT /users/1", `{"username":"anna"}`, 200, `{"id":1,"username":"anna","email":"ann@example.com","created_at":"<time>"}`},
			{"PUT /users/{id}", "200 email", "PUT /users/1", `{"email":"anna@example.com"}`, 200, `{"id":1,"username":"anna","email":"anna@example.com","created_at":"<time>"}`},
			{"PUT /users/{id}", "200 both", "PUT /users/1", annJSON, 200, annUser},
			{"PUT /users/{id}", "200 the same again", "PUT /users/1", annJSON, 200, annUser},
			{"PUT /users/{id}", "400 neither", "PUT /users/1", `{}`, 400, "!invalid_request body"},
			{"PUT /users/{id}", "400 empty username", "PUT /users/1", `{"username":""}`, 400, "!invalid_request username"},
			{"PUT /users/{id}", "400 null email", "PUT /users/1", `{"email":null}`, 400, "!invalid_request email"},
			{"PUT /users/{id}", "400 number as username", "PUT /users/1", `{"username":1}`, 400, "!invalid_request username"},
			{"PUT /users/{id}", "400 array", "PUT /users/1", `[]`, 400, "!invalid_json"},
			{"PUT /users/{id}", "404 unknown", "PUT /users/99", annJSON, 404, "!not_found"},
			{"PUT /users/{id}", "404 no number", "PUT /users/abc", annJSON, 404, "!not_found"},
			{"PUT /users/{id}", "409 another's username", "PUT /users/1", `{"username":"bob"}`, 409, "!user_exists"},
			{"PUT /users/{id}", "409 another's email", "PUT /users/1", `{"email":"bob@example.com"}`, 409, "!user_exists"},
			{"PUT /users/{id}", "413", "PUT /users/1", large, 413, "!payload_too_large"},
			{"PUT /users/{id}", "415", "PUT /users/1" + text, annJSON, 415, "!unsupported_media_type"},
			{"GET /users/{id}", "200 unchanged by what was refused", "GET /users/1", "", 200, annUser},
			{"DELETE /users/{id}", "204", "DELETE /users/2", "", 204, ""},
			{"DELETE /users/{id}", "404 deleted before", "DELETE /users/2", "", 404, "!not_found"},
			{"DELETE /users/{id}", "404 no number", "DELETE /users/abc", "", 404, "!not_found"},
			{"GET /users/{id}", "404 deleted", "GET /users/2", "", 404, "!not_found"},
			{"POST /users", "201 name of a deleted user", "POST /users", `{"username":"bob","email":"bob@example.com"}`, 201, `{"id":4,"username":"bob","email":"bob@example.com","created_at":"<time>"}`},
		}},
		{"users bulk", nil, []call{
			{"POST /users/bulk", "201 multipart, duplicate usernames counted", multi, form(csvHead + "1,a,a@example.com,2025-01-01 10:00:00\n2,a,a2@example.com,2025-01-01 10:00:00\n"), 201, `{"imported":2,"count":2}`},
			{"POST /users/bulk", "201 the same again is safe", multi, form(csvHead + "1,a,a@example.com,2025-01-01 10:00:00\n2,a,a2@example.com,2025-01-01 10:00:00\n"), 201, `{"imported":2,"count":2}`},
			{"POST /users/bulk", "201 other form fields before the file", multi, form(csvHead+"3,c,c@example.com,2025-01-01 10:00:00\n", "row_count", "note"), 201, `{"imported":1,"count":1}`},
			{"POST /users/bulk", "201 text/csv", raw, csvHead + "4,d,d@example.com,2025-01-01 10:00:00\n", 201, `{"imported":1,"count":1}`},
			{"POST /users/bulk", "201 text/csv with charset, CRLF and BOM", raw + "; charset=utf-8", "\ufeff" + strings.ReplaceAll(csvHead+"5,e,e@example.com,2025-01-01 10:00:00\n", "\n", "\r\n"), 201, `{"imported":1,"count":1}`},
			{"POST /users/bulk", "201 header only", raw, csvHead, 201, `{"imported":0,"count":0}`},
			{"GET /users", "200 what was loaded", "GET /users", "", 200, `[{"id":1,"username":"a","email":"a@example.com","created_at":"2025-01-01T10:00:00"},{"id":2,"username":"a","email":"a2@example.com","created_at":"2025-01-01T10:00:00"},{"id":3,"username":"c","email":"c@example.com","created_at":"2025-01-01T10:00:00"},{"id":4,"username":"d","email":"d@example.com","created_at":"2025-01-01T10:00:00"},{"id":5,"username":"e","email":"e@example.com","created_at":"2025-01-01T10:00:00"}]`},
			{"POST /users", "201 after the loaded ids", "POST /users", `{"username":"next","email":"next@example.com"}`, 201, `{"id":6,"username":"next","email":"next@example.com","created_at":"<time>"}`},
			{"POST /users", "409 name of a loaded user", "POST /users", `{"username":"a","email":"new@example.com"}`, 409, "!user_exists"},
			{"POST /users/bulk", "400 no file", "POST /users/bulk", `{}`, 400, "!no_file"},
			{"POST /users/bulk", "400 nothing at all", "POST /users/bulk", "", 400, "!no_file"},
			{"POST /users/bulk", "400 form without file", multi, "--XX\r\nContent-Disposition: form-data; name=\"other\"\r\n\r\nx\r\n--XX--\r\n", 400, "!no_file"},
			{"POST /users/bulk", "400 empty form", multi, "--XX--\r\n", 400, "!no_file"},
			{"POST /users/bulk", "400 empty file", raw, "", 400, "!invalid_csv"},
			{"POST /users/bulk", "400 bad header", raw, "id,name,email,created_at\n7,g,g@example.com,2025-01-01 10:00:00\n", 400, "!invalid_csv line 1"},
			{"POST /users/bulk", "400 bad row, with line and column", raw, csvHead + "7,g,g@example.com,2025-01-01 10:00:00\n8,h,nobody,2025-01-01 10:00:00\n", 400, "!invalid_csv line 3, column email"},
			{"POST /users/bulk", "400 bad id", raw, csvHead + "x,g,g@example.com,2025-01-01 10:00:00\n", 400, "!invalid_csv line 2, column id"},
			{"POST /users/bulk", "400 id beyond what sequences count", raw, csvHead + "9223372036854775807,g,g@example.com,2025-01-01 10:00:00\n", 400, "!invalid_csv line 2, column id"},
			{"POST /users/bulk", "400 same id twice", raw, csvHead + "7,g,g@example.com,2025-01-01 10:00:00\n7,h,h@example.com,2025-01-01 10:00:00\n", 400, "!invalid_csv line 3, column id"},
			{"POST /users/bulk", "400 Excel time", raw, csvHead + "7,g,g@example.com,20-04-2025 09:26\n", 400, "!invalid_csv line 2, column created_at"},
			{"POST /users/bulk", "400 year 0", raw, csvHead + "7,g,g@example.com,0000-01-01 10:00:00\n", 400, "!invalid_csv line 2, column created_at"},
			{"POST /users/bulk", "400 stray space", raw, csvHead + "7,g ,g@example.com,2025-01-01 10:00:00\n", 400, "!invalid_csv line 2, column username"},
			{"POST /users/bulk", "400 missing field", raw, csvHead + "7,g,g@example.com\n", 400, "!invalid_csv line 2"},
			{"POST /users/bulk", "400 open quote", raw, csvHead + "7,\"g,g@example.com,2025-01-01 10:00:00\n", 400, "!invalid_csv line"},
			{"POST /users/bulk", "400 form that breaks off", multi, "--XX\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\n" + csvHead + "7,g,g@example.com,2025-01-01 10:00:00\n", 400, "!invalid_body"},
			{"POST /users/bulk", "413", raw, csvHead + strings.Repeat("x", 65<<20), 413, "!payload_too_large"},
			{"GET /users/{id}", "404 nothing imported of a bad file", "GET /users/7", "", 404, "!not_found"},
		}},
		{"urls", nil, []call{
			newAnn,
			{"GET /urls", "200 empty", "GET /urls", "", 200, `[]`},
			newLink,
			{"POST /urls", "201 all fields", "POST /urls", `{"user_id":1,"original_url":"https://example.com/2","title":"Two","short_code":"my-code","expires_at":"2099-01-31T12:00:00Z"}`, 201, linkTwo},
			{"POST /urls", "201 null options", "POST /urls", `{"user_id":1,"original_url":"https://example.com/3","title":null,"short_code":null,"expires_at":null}`, 201, `{"id":3,"user_id":1,"short_code":"<code>","original_url":"https://example.com/3","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>"}`},
			{"GET /events", "200 created", "GET /events?url_id=2", "", 200, `[{"id":2,"url_id":2,"user_id":1,"event_type":"created","timestamp":"<time>","details":{"short_code":"my-code","original_url":"https://example.com/2"}}]`},
			{"POST /urls", "400 empty object", "POST /urls", `{}`, 400, "!invalid_request original_url,user_id"},
			{"POST /urls", "400 no user_id", "POST /urls", `{"original_url":"https://example.com"}`, 400, "!invalid_request user_id"},
			{"POST /urls", "400 user_id string", "POST /urls", `{"user_id":"1","original_url":"https://example.com"}`, 400, "!invalid_request user_id"},
			{"POST /urls", "400 user_id boolean", "POST /urls", `{"user_id":true,"original_url":"https://example.com"}`, 400, "!invalid_request user_id"},
			{"POST /urls", "400 user_id fraction", "POST /urls", `{"user_id":1.5,"original_url":"https://example.com"}`, 400, "!invalid_request user_id"},
			{"POST /urls", "400 user_id overflowing", "POST /urls", `{"user_id":9223372036854775808,"original_url":"https://example.com"}`, 400, "!invalid_request user_id"},
			{"POST /urls", "400 no target", "POST /urls", `{"user_id":1}`, 400, "!invalid_request original_url"},
			{"POST /urls", "400 target number", "POST /urls", `{"user_id":1,"original_url":5}`, 400, "!invalid_request original_url"},
			{"POST /urls", "400 target no URL", "POST /urls", `{"user_id":1,"original_url":"hello"}`, 400, "!invalid_request original_url"},
			{"POST /urls", "400 target javascript", "POST /urls", `{"user_id":1,"original_url":"javascript:alert(1)"}`, 400, "!invalid_request original_url"},
			{"POST /urls", "400 target ourselves", "POST /urls", `{"user_id":1,"original_url":"http://HOP.test/x"}`, 400, "!invalid_request original_url"},
			{"POST /urls", "400 title number", "POST /urls", `{"user_id":1,"original_url":"https://example.com","title":5}`, 400, "!invalid_request title"},
			{"POST /urls", "400 bad code", "POST /urls", `{"user_id":1,"original_url":"https://example.com","short_code":"a b"}`, 400, "!invalid_request short_code"},
			{"POST /urls", "400 reserved code", "POST /urls", `{"user_id":1,"original_url":"https://example.com","short_code":"health"}`, 400, "!invalid_request short_code"},
			{"POST /urls", "400 expired before it begins", "POST /urls", `{"user_id":1,"original_url":"https://example.com","expires_at":"2020-01-01T00:00:00Z"}`, 400, "!invalid_request expires_at"},
			{"POST /urls", "400 expires after the last year", "POST /urls", `{"user_id":1,"original_url":"https://example.com","expires_at":"9999-12-31T23:59:59-01:00"}`, 400, "!invalid_request expires_at"},
			{"POST /urls", "400 array", "POST /urls", `[]`, 400, "!invalid_json"},
			{"POST /urls", "404 unknown user", "POST /urls", `{"user_id":99,"original_url":"https://example.com"}`, 404, "!user_not_found"},
			{"POST /urls", "409 code taken", "POST /urls", `{"user_id":1,"original_url":"https://example.com","short_code":"my-code"}`, 409, "!code_taken"},
			{"POST /urls", "413", "POST /urls", large, 413, "!payload_too_large"},
			{"POST /urls", "415", "POST /urls" + text, `{"user_id":1,"original_url":"https://example.com"}`, 415, "!unsupported_media_type"},
			{"GET /urls", "200 nothing left by what was refused", "GET /urls?after=2", "", 200, `[{"id":3,"user_id":1,"short_code":"<code>","original_url":"https://example.com/3","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>"}]`},
			{"GET /urls/{id}", "200", "GET /urls/2", "", 200, linkTwo},
			{"GET /urls/{id}", "404 unknown", "GET /urls/99", "", 404, "!not_found"},
			{"GET /urls/{id}", "404 no number", "GET /urls/my-code", "", 404, "!not_found"},
			{"PATCH /urls/{id}", "200 title", "PATCH /urls/3", `{"title":"Three"}`, 200, `{"id":3,"user_id":1,"short_code":"<code>","original_url":"https://example.com/3","title":"Three","is_active":true,"created_at":"<time>","updated_at":"<time>"}`},
			{"PATCH /urls/{id}", "200 null clears the title", "PATCH /urls/3", `{"title":null}`, 200, `{"id":3,"user_id":1,"short_code":"<code>","original_url":"https://example.com/3","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>"}`},
			{"PUT /urls/{id}", "200 every field", "PUT /urls/3", `{"title":"Drei","is_active":false,"original_url":"https://example.org/drei","expires_at":"2099-01-31T12:00:00"}`, 200, `{"id":3,"user_id":1,"short_code":"<code>","original_url":"https://example.org/drei","title":"Drei","is_active":false,"created_at":"<time>","updated_at":"<time>","expires_at":"2099-01-31T12:00:00"}`},
			{"PUT /urls/{id}", "200 one updated event per changed field", "GET /events?url_id=3&event_type=updated", "", 200, `[
				{"id":"<int>","url_id":3,"user_id":1,"event_type":"updated","timestamp":"<time>","details":{"field":"title","new_value":"Three"}},
				{"id":"<int>","url_id":3,"user_id":1,"event_type":"updated","timestamp":"<time>","details":{"field":"title","new_value":""}},
				{"id":"<int>","url_id":3,"user_id":1,"event_type":"updated","timestamp":"<time>","details":{"field":"original_url","new_value":"https://example.org/drei"}},
				{"id":"<int>","url_id":3,"user_id":1,"event_type":"updated","timestamp":"<time>","details":{"field":"title","new_value":"Drei"}},
				{"id":"<int>","url_id":3,"user_id":1,"event_type":"updated","timestamp":"<time>","details":{"field":"is_active","new_value":"false"}},
				{"id":"<int>","url_id":3,"user_id":1,"event_type":"updated","timestamp":"<time>","details":{"field":"expires_at","new_value":"2099-01-31T12:00:00"}}]`},
			{"PUT /urls/{id}", "200 expires_at removed", "PUT /urls/3", `{"expires_at":null}`, 200, `{"id":3,"user_id":1,"short_code":"<code>","original_url":"https://example.org/drei","title":"Drei","is_active":false,"created_at":"<time>","updated_at":"<time>"}`},
			{"PUT /urls/{id}", "400 nothing to change", "PUT /urls/3", `{"short_code":"other"}`, 400, "!invalid_request body"},
			{"PUT /urls/{id}", "400 is_active string", "PUT /urls/3", `{"is_active":"false"}`, 400, "!invalid_request is_active"},
			{"PUT /urls/{id}", "400 is_active null", "PUT /urls/3", `{"is_active":null}`, 400, "!invalid_request is_active"},
			{"PUT /urls/{id}", "400 is_active number", "PUT /urls/3", `{"is_active":0}`, 400, "!invalid_request is_active"},
			{"PUT /urls/{id}", "400 bad target", "PUT /urls/3", `{"original_url":"ftp://example.com"}`, 400, "!invalid_request original_url"},
			{"PUT /urls/{id}", "400 null target", "PUT /urls/3", `{"original_url":null}`, 400, "!invalid_request original_url"},
			{"PUT /urls/{id}", "400 array", "PUT /urls/3", `[]`, 400, "!invalid_json"},
			{"PATCH /urls/{id}", "400 one bad field stops all", "PATCH /urls/3", `{"title":"new","is_active":"x"}`, 400, "!invalid_request is_active"},
			{"PUT /urls/{id}", "404 unknown", "PUT /urls/99", `{"title":"x"}`, 404, "!not_found"},
			{"PATCH /urls/{id}", "404 unknown", "PATCH /urls/99", `{"title":"x"}`, 404, "!not_found"},
			{"PUT /urls/{id}", "413", "PUT /urls/3", large, 413, "!payload_too_large"},
			{"PATCH /urls/{id}", "413", "PATCH /urls/3", large, 413, "!payload_too_large"},
			{"PUT /urls/{id}", "415", "PUT /urls/3" + text, `{"title":"x"}`, 415, "!unsupported_media_type"},
			{"PATCH /urls/{id}", "415", "PATCH /urls/3" + text, `{"title":"x"}`, 415, "!unsupported_media_type"},
			{"GET /urls/{id}", "200 unchanged by what was refused", "GET /urls/3", "", 200, `{"id":3,"user_id":1,"short_code":"<code>","original_url":"https://example.org/drei","title":"Drei","is_active":false,"created_at":"<time>","updated_at":"<time>"}`},
			{"GET /urls", "200 by short_code", "GET /urls?short_code=my-code", "", 200, `[` + linkTwo + `]`},
			{"GET /urls", "200 codes are case-sensitive", "GET /urls?short_code=MY-code", "", 200, `[]`},
			{"GET /urls", "200 by is_active=false", "GET /urls?is_active=false", "", 200, `[{"id":3,"user_id":1,"short_code":"<code>","original_url":"https://example.org/drei","title":"Drei","is_active":false,"created_at":"<time>","updated_at":"<time>"}]`},
			{"GET /urls", "200 by is_active=True and user_id", "GET /urls?is_active=True&user_id=1&per_page=1&page=2", "", 200, `[` + linkTwo + `]`},
			{"GET /urls", "200 by unknown user_id", "GET /urls?user_id=99", "", 200, `[]`},
			{"GET /urls", "200 by all filters", "GET /urls?user_id=1&is_active=true&short_code=my-code", "", 200, `[` + linkTwo + `]`},
			{"GET /urls", "400 user_id word", "GET /urls?user_id=abc", "", 400, "!invalid_request user_id"},
			{"GET /urls", "400 user_id empty", "GET /urls?user_id=", "", 400, "!invalid_request user_id"},
			{"GET /urls", "400 user_id overflowing", "GET /urls?user_id=9223372036854775808", "", 400, "!invalid_request user_id"},
			{"GET /urls", "400 is_active word", "GET /urls?is_active=maybe", "", 400, "!invalid_request is_active"},
			{"GET /urls", "400 bad short_code", "GET /urls?short_code=a%20b", "", 400, "!invalid_request short_code"},
			{"GET /urls", "400 bad paging", "GET /urls?page=0&per_page=x", "", 400, "!invalid_request page,per_page"},
			{"DELETE /urls/{id}", "204", "DELETE /urls/2", "", 204, ""},
			{"DELETE /urls/{id}", "200 deleted event", "GET /events?url_id=2&event_type=deleted", "", 200, `[{"id":"<int>","url_id":2,"user_id":1,"event_type":"deleted","timestamp":"<time>","details":{"reason":"user_requested"}}]`},
			{"DELETE /urls/{id}", "404 deleted before", "DELETE /urls/2", "", 404, "!not_found"},
			{"DELETE /urls/{id}", "404 unknown", "DELETE /urls/99", "", 404, "!not_found"},
			{"DELETE /urls/{id}", "404 no number", "DELETE /urls/my-code", "", 404, "!not_found"},
			{"GET /urls/{id}", "404 deleted", "GET /urls/2", "", 404, "!not_found"},
			{"PUT /urls/{id}", "404 deleted", "PUT /urls/2", `{"title":"x"}`, 404, "!not_found"},
			{"GET /urls", "200 without the deleted", "GET /urls?short_code=my-code", "", 200, `[]`},
			{"POST /urls", "409 code of a deleted link", "POST /urls", `{"user_id":1,"original_url":"https://example.com","short_code":"my-code"}`, 409, "!code_taken"},
			{"POST /shorten", "409 code of a deleted link", "POST /shorten", `{"url":"https://example.com","custom_code":"my-code"}`, 409, "!code_taken"},
		}},
		{"shorten", nil, []call{
			newAnn,
			{"POST /shorten", "201 original_url", "POST /shorten", `{"original_url":"https://example.com/1"}`, 201, `{"id":1,"user_id":null,"short_code":"<code>","original_url":"https://example.com/1","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>","short_url":"<text>"}`},
			{"POST /shorten", "201 long_url, custom_code, user_id", "POST /shorten", `{"long_url":"https://example.com/2","custom_code":"two","user_id":1,"title":"T"}`, 201, `{"id":2,"user_id":1,"short_code":"two","original_url":"https://example.com/2","title":"T","is_active":true,"created_at":"<time>","updated_at":"<time>","short_url":"http://hop.test/two"}`},
			{"POST /shorten", "201 url, short_code, expires_at", "POST /shorten", `{"url":"https://example.com/3","short_code":"Two","expires_at":"2099-01-31T14:00:00+02:00"}`, 201, `{"id":3,"user_id":null,"short_code":"Two","original_url":"https://example.com/3","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>","expires_at":"2099-01-31T12:00:00","short_url":"http://hop.test/Two"}`},
			{"POST /shorten", "201 without Content-Type", "POST /shorten\nContent-Type: ", `{"url":"https://example.com/4","custom_code":"four"}`, 201, `{"id":4,"user_id":null,"short_code":"four","original_url":"https://example.com/4","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>","short_url":"http://hop.test/four"}`},
			{"GET /events", "200 created", "GET /events?url_id=2", "", 200, `[{"id":2,"url_id":2,"user_id":1,"event_type":"created","timestamp":"<time>","details":{"short_code":"two","original_url":"https://example.com/2"}}]`},
			{"POST /shorten", "400 no target", "POST /shorten", `{"title":"x"}`, 400, "!invalid_request original_url"},
			{"POST /shorten", "400 bad target", "POST /shorten", `{"url":"nope"}`, 400, "!invalid_request url"},
			{"POST /shorten", "400 private target", "POST /shorten", `{"url":"http://127.0.0.1/"}`, 400, "!invalid_request url"},
			{"POST /shorten", "400 bad code", "POST /shorten", `{"url":"https://example.com","custom_code":"a/b"}`, 400, "!invalid_request custom_code"},
			{"POST /shorten", "400 code too short", "POST /shorten", `{"url":"https://example.com","custom_code":"ab"}`, 400, "!invalid_request custom_code"},
			{"POST /shorten", "400 reserved code", "POST /shorten", `{"url":"https://example.com","custom_code":"users"}`, 400, "!invalid_request custom_code"},
			{"POST /shorten", "400 code number", "POST /shorten", `{"url":"https://example.com","custom_code":123456}`, 400, "!invalid_request custom_code"},
			{"POST /shorten", "400 user_id string", "POST /shorten", `{"url":"https://example.com","user_id":"1"}`, 400, "!invalid_request user_id"},
			{"POST /shorten", "400 bad expires_at", "POST /shorten", `{"url":"https://example.com","expires_at":"tomorrow"}`, 400, "!invalid_request expires_at"},
			{"POST /shorten", "400 bare word", "POST /shorten", `https://example.com`, 400, "!invalid_json"},
			{"POST /shorten", "400 array", "POST /shorten", `[{"url":"https://example.com"}]`, 400, "!invalid_json"},
			{"POST /shorten", "404 unknown user", "POST /shorten", `{"url":"https://example.com","user_id":99}`, 404, "!user_not_found"},
			{"POST /shorten", "409 code taken", "POST /shorten", `{"url":"https://example.com","custom_code":"two"}`, 409, "!code_taken"},
			{"POST /shorten", "413", "POST /shorten", large, 413, "!payload_too_large"},
			{"POST /shorten", "415", "POST /shorten" + text, `{"url":"https://example.com"}`, 415, "!unsupported_media_type"},
			{"GET /urls", "200 nothing left by what was refused", "GET /urls?after=4", "", 200, `[]`},
		}},
		{"bulk links", nil, []call{
			newAnn,
			{"POST /urls/bulk", "200 each item for itself", "POST /urls/bulk", `[{"user_id":1,"original_url":"https://example.com/a","short_code":"aaa"},{"user_id":1,"original_url":"nope"},{"user_id":99,"original_url":"https://example.com"},{"user_id":1,"original_url":"https://example.com","short_code":"aaa"},5,{"original_url":"https://example.com"},null,[]]`, 200, `{"results":[
				{"status":201,"url":{"id":1,"user_id":1,"short_code":"aaa","original_url":"https://example.com/a","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>","short_url":"http://hop.test/aaa"}},
				{"status":400,"error":"invalid_request","message":"<text>","fields":{"original_url":"<text>"}},
				{"status":404,"error":"user_not_found","message":"<text>"},
				{"status":409,"error":"code_taken","message":"<text>"},
				{"status":400,"error":"invalid_request","message":"<text>","fields":"<fields>"},
				{"status":400,"error":"invalid_request","message":"<text>","fields":{"user_id":"<text>"}},
				{"status":400,"error":"invalid_request","message":"<text>","fields":"<fields>"},
				{"status":400,"error":"invalid_request","message":"<text>","fields":"<fields>"}]}`},
			{"POST /urls/bulk", "400 a field twice in one item", "POST /urls/bulk", `[{"user_id":1,"user_id":1}]`, 400, "!invalid_json"},
			{"POST /shorten/bulk", "200 user_id is optional", "POST /shorten/bulk", `[{"url":"https://example.com/b","custom_code":"bbb"},{"url":"https://example.com","custom_code":"aaa"}]`, 200, `{"results":[
				{"status":201,"url":{"id":"<int>","user_id":null,"short_code":"bbb","original_url":"https://example.com/b","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>","short_url":"http://hop.test/bbb"}},
				{"status":409,"error":"code_taken","message":"<text>"}]}`},
			{"GET /{code}", "302 made in bulk", "GET /aaa", "", 302, "-> https://example.com/a"},
			{"GET /events", "200 created by bulk", "GET /events?event_type=created", "", 200, `[
				{"id":"<int>","url_id":1,"user_id":1,"event_type":"created","timestamp":"<time>","details":{"short_code":"aaa","original_url":"https://example.com/a"}},
				{"id":"<int>","url_id":"<int>","user_id":null,"event_type":"created","timestamp":"<time>","details":{"short_code":"bbb","original_url":"https://example.com/b"}}]`},
			{"POST /urls/bulk", "400 empty", "POST /urls/bulk", `[]`, 400, "!invalid_request"},
			{"POST /urls/bulk", "400 1,001 links", "POST /urls/bulk", `[` + strings.Repeat(`{},`, 1000) + `{}]`, 400, "!invalid_request"},
			{"POST /urls/bulk", "400 object", "POST /urls/bulk", `{"user_id":1,"original_url":"https://example.com"}`, 400, "!invalid_json"},
			{"POST /urls/bulk", "400 null", "POST /urls/bulk", `null`, 400, "!invalid_json"},
			{"POST /urls/bulk", "413", "POST /urls/bulk", `["` + strings.Repeat("x", 9<<20) + `"]`, 413, "!payload_too_large"},
			{"POST /urls/bulk", "415", "POST /urls/bulk" + text, `[]`, 415, "!unsupported_media_type"},
			{"POST /shorten/bulk", "400 object", "POST /shorten/bulk", `{}`, 400, "!invalid_json"},
			{"POST /shorten/bulk", "413", "POST /shorten/bulk", `["` + strings.Repeat("x", 9<<20) + `"]`, 413, "!payload_too_large"},
			{"POST /shorten/bulk", "415", "POST /shorten/bulk" + text, `[]`, 415, "!unsupported_media_type"},
		}},
		{"redirects", nil, []call{
			newAnn,
			{"POST /urls", "201 target with unusual bytes", "POST /urls", `{"user_id":1,"original_url":"HTTPS://Example.COM:443/a//b/../c%2F%7e?q=1&&r=%20#Frag-é","short_code":"first"}`, 201, `{"id":1,"user_id":1,"short_code":"first","original_url":"HTTPS://Example.COM:443/a//b/../c%2F%7e?q=1&&r=%20#Frag-é","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>"}`},
			{"GET /{code}", "302 byte for byte", "GET /first", "", 302, "-> HTTPS://Example.COM:443/a//b/../c%2F%7e?q=1&&r=%20#Frag-é"},
			{"GET /urls/{code}/redirect", "302 byte for byte", "GET /urls/first/redirect\nReferer: https://news.example:8443/page?x", "", 302, "-> HTTPS://Example.COM:443/a//b/../c%2F%7e?q=1&&r=%20#Frag-é"},
			{"GET /{code}", "302 query and escapes of the request do not matter", "GET /%66irst?utm=1", "", 302, "-> HTTPS://Example.COM:443/a//b/../c%2F%7e?q=1&&r=%20#Frag-é"},
			{"GET /events", "200 click visible at once", "GET /events?event_type=click", "", 200, `[
				{"id":"<int>","url_id":1,"user_id":1,"event_type":"click","timestamp":"<time>","details":{"short_code":"first"}},
				{"id":"<int>","url_id":1,"user_id":1,"event_type":"click","timestamp":"<time>","details":{"short_code":"first","referrer":"news.example:8443"}},
				{"id":"<int>","url_id":1,"user_id":1,"event_type":"click","timestamp":"<time>","details":{"short_code":"first"}}]`},
			{"HEAD /{code}", "302 not counted", "HEAD /first", "", 302, "-> HTTPS://Example.COM:443/a//b/../c%2F%7e?q=1&&r=%20#Frag-é"},
			{"HEAD /urls/{code}/redirect", "302 not counted", "HEAD /urls/first/redirect", "", 302, "-> HTTPS://Example.COM:443/a//b/../c%2F%7e?q=1&&r=%20#Frag-é"},
			{"HEAD /{code}", "404", "HEAD /unknown", "", 404, ""},
			{"GET /{code}", "302 prefetch not counted", "GET /first\nSec-Purpose: prefetch;prerender", "", 302, "-> HTTPS://Example.COM:443/a//b/../c%2F%7e?q=1&&r=%20#Frag-é"},
			{"GET /{code}", "302 bot not counted", "GET /first" + ua + "Mozilla/5.0 (compatible; Googlebot/2.1)", "", 302, "-> HTTPS://Example.COM:443/a//b/../c%2F%7e?q=1&&r=%20#Frag-é"},
			{"GET /urls/{code}/redirect", "302 bot not counted", "GET /urls/first/redirect" + ua + "facebookexternalhit/1.1", "", 302, "-> HTTPS://Example.COM:443/a//b/../c%2F%7e?q=1&&r=%20#Frag-é"},
			{"GET /stats/{code}", "200 people, bots and days", "GET /stats/first", "", 200, `{"id":1,"user_id":1,"short_code":"first","original_url":"HTTPS://Example.COM:443/a//b/../c%2F%7e?q=1&&r=%20#Frag-é","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>",
				"click_count":3,"last_clicked_at":"<time>","bot_clicks":3,"clicks_per_day":[{"day":"<text>","clicks":3}],"top_referrers":[{"referrer":"news.example:8443","clicks":1}]}`},
			{"GET /{code}", "404 unknown", "GET /unknown", "", 404, "!not_found"},
			{"GET /{code}", "404 other case", "GET /First", "", 404, "!not_found"},
			{"GET /{code}", "404 too short", "GET /ab", "", 404, "!not_found"},
			{"GET /{code}", "404 too long", "GET /" + strings.Repeat("a", 33), "", 404, "!not_found"},
			{"GET /{code}", "404 reserved word", "GET /shorten", "", 404, "!not_found"},
			{"GET /urls/{code}/redirect", "404 unknown", "GET /urls/unknown/redirect", "", 404, "!not_found"},
			{"GET /urls/{code}/redirect", "404 id is no code", "GET /urls/1/redirect", "", 404, "!not_found"},
			{"PUT /urls/{id}", "200 sleeps", "PUT /urls/1", `{"is_active":false}`, 200, `{"id":1,"user_id":1,"short_code":"first","original_url":"HTTPS://Example.COM:443/a//b/../c%2F%7e?q=1&&r=%20#Frag-é","title":null,"is_active":false,"created_at":"<time>","updated_at":"<time>"}`},
			{"GET /{code}", "404 inactive", "GET /first", "", 404, "!not_found"},
			{"GET /urls/{code}/redirect", "404 inactive", "GET /urls/first/redirect", "", 404, "!not_found"},
			{"GET /{code}", "404 inactive leaves no event", "GET /events?url_id=1&event_type=click&page=4&per_page=1", "", 200, `[]`},
			{"GET /stats/{code}", "200 of a sleeping link, not counted", "GET /stats/first", "", 200, `{"id":1,"user_id":1,"short_code":"first","original_url":"HTTPS://Example.COM:443/a//b/../c%2F%7e?q=1&&r=%20#Frag-é","title":null,"is_active":false,"created_at":"<time>","updated_at":"<time>",
				"click_count":3,"last_clicked_at":"<time>","bot_clicks":3,"clicks_per_day":[{"day":"<text>","clicks":3}],"top_referrers":[{"referrer":"news.example:8443","clicks":1}]}`},
			{"PUT /urls/{id}", "200 wakes with another target", "PUT /urls/1", `{"is_active":true,"original_url":"https://example.org/new"}`, 200, `{"id":1,"user_id":1,"short_code":"first","original_url":"https://example.org/new","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>"}`},
			{"GET /{code}", "302 the new target at once", "GET /first", "", 302, "-> https://example.org/new"},
			{"DELETE /urls/{id}", "204", "DELETE /urls/1", "", 204, ""},
			{"GET /{code}", "404 deleted", "GET /first", "", 404, "!not_found"},
			{"GET /urls/{code}/redirect", "404 deleted", "GET /urls/first/redirect", "", 404, "!not_found"},
			{"GET /stats/{code}", "404 deleted", "GET /stats/first", "", 404, "!not_found"},
			{"GET /stats/{code}", "404 unknown", "GET /stats/unknown", "", 404, "!not_found"},
			{"GET /stats/{code}", "404 no code", "GET /stats/a%20b", "", 404, "!not_found"},
			{"GET /events", "200 events of a deleted link stay", "GET /events?url_id=1&event_type=click&after=1&page=4&per_page=1", "", 200, `[{"id":"<int>","url_id":1,"user_id":1,"event_type":"click","timestamp":"<time>","details":{"short_code":"first"}}]`},
			{"GET /{code}", "404 was asked before it was made", "GET /later", "", 404, "!not_found"},
			{"POST /shorten", "201 after a 404 for its code", "POST /shorten", `{"url":"https://example.com/later","custom_code":"later"}`, 201, `{"id":2,"user_id":null,"short_code":"later","original_url":"https://example.com/later","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>","short_url":"http://hop.test/later"}`},
			{"GET /{code}", "302 after a 404 for its code", "GET /later", "", 302, "-> https://example.com/later"},
			{"GET /stats/{code}", "200 exact", "GET /stats/later", "", 200, `{"id":2,"user_id":null,"short_code":"later","original_url":"https://example.com/later","title":null,"is_active":true,"created_at":"<time>","updated_at":"<time>","click_count":1,"last_clicked_at":"<time>","bot_clicks":0,"clicks_per_day":[{"day":"<text>","clicks":1}],"top_referrers":[]}`},
		}},
		{"events", nil, []call{
			{"GET /events", "200 empty", "GET /events", "", 200, `[]`},
			newAnn,
			newLink,
			{"POST /events", "201", "POST /events", `{"event_type":"seen","url_id":1,"user_id":1,"details":{"a":[1,{"b":null}],"c":"<&>"}}`, 201, `{"id":2,"url_id":1,"user_id":1,"event_type":"seen","timestamp":"<time>","details":{"a":[1,{"b":null}],"c":"<&>"}}`},
			{"POST /events", "201 without user and details", "POST /events", `{"event_type":"click","url_id":1}`, 201, `{"id":3,"url_id":1,"user_id":null,"event_type":"click","timestamp":"<time>","details":{}}`},
			{"POST /events", "201 null user and details", "POST /events", `{"event_type":"x","url_id":1,"user_id":null,"details":null}`, 201, `{"id":4,"url_id":1,"user_id":null,"event_type":"x","timestamp":"<time>","details":{}}`},
			{"POST /events", "400 empty object", "POST /events", `{}`, 400, "!invalid_request event_type,url_id"},
			{"POST /events", "400 no type", "POST /events", `{"url_id":1}`, 400, "!invalid_request event_type"},
			{"POST /events", "400 empty type", "POST /events", `{"event_type":"","url_id":1}`, 400, "!invalid_request event_type"},
			{"POST /events", "400 number as type", "POST /events", `{"event_type":1,"url_id":1}`, 400, "!invalid_request event_type"},
			{"POST /events", "400 no url_id", "POST /events", `{"event_type":"x"}`, 400, "!invalid_request url_id"},
			{"POST /events", "400 url_id string", "POST /events", `{"event_type":"x","url_id":"1"}`, 400, "!invalid_request url_id"},
			{"POST /events", "400 url_id boolean", "POST /events", `{"event_type":"x","url_id":true}`, 400, "!invalid_request url_id"},
			{"POST /events", "400 url_id fraction", "POST /events", `{"event_type":"x","url_id":1.0}`, 400, "!invalid_request url_id"},
			{"POST /events", "400 url_id zero", "POST /events", `{"event_type":"x","url_id":0}`, 400, "!invalid_request url_id"},
			{"POST /events", "400 user_id boolean", "POST /events", `{"event_type":"x","url_id":1,"user_id":false}`, 400, "!invalid_request user_id"},
			{"POST /events", "400 user_id string", "POST /events", `{"event_type":"x","url_id":1,"user_id":"1"}`, 400, "!invalid_request user_id"},
			{"POST /events", "400 details string", "POST /events", `{"event_type":"x","url_id":1,"details":"{}"}`, 400, "!invalid_request details"},
			{"POST /events", "400 details array", "POST /events", `{"event_type":"x","url_id":1,"details":[]}`, 400, "!invalid_request details"},
			{"POST /events", "400 details number", "POST /events", `{"event_type":"x","url_id":1,"details":5}`, 400, "!invalid_request details"},
			{"POST /events", "400 details with NUL", "POST /events", `{"event_type":"x","url_id":1,"details":{"a":"\u0000"}}`, 400, "!invalid_json"},
			{"POST /events", "400 array", "POST /events", `[{"event_type":"x","url_id":1}]`, 400, "!invalid_json"},
			{"POST /events", "400 string", "POST /events", `"click"`, 400, "!invalid_json"},
			{"POST /events", "404 unknown url", "POST /events", `{"event_type":"x","url_id":99}`, 404, "!url_not_found"},
			{"POST /events", "404 unknown user", "POST /events", `{"event_type":"x","url_id":1,"user_id":99}`, 404, "!user_not_found"},
			{"POST /events", "413", "POST /events", large, 413, "!payload_too_large"},
			{"POST /events", "415", "POST /events" + text, `{"event_type":"x","url_id":1}`, 415, "!unsupported_media_type"},
			{"GET /events", "200 by url_id and event_type", "GET /events?url_id=1&event_type=seen", "", 200, `[{"id":2,"url_id":1,"user_id":1,"event_type":"seen","timestamp":"<time>","details":{"a":[1,{"b":null}],"c":"<&>"}}]`},
			{"GET /events", "200 by user_id", "GET /events?user_id=1&page=2&per_page=1", "", 200, `[{"id":2,"url_id":1,"user_id":1,"event_type":"seen","timestamp":"<time>","details":{"a":[1,{"b":null}],"c":"<&>"}}]`},
			{"GET /events", "200 nothing left by what was refused", "GET /events?after=4", "", 200, `[]`},
			{"GET /events", "200 unknown filters find nothing", "GET /events?url_id=99", "", 200, `[]`},
			{"GET /events", "400 url_id word", "GET /events?url_id=abc", "", 400, "!invalid_request url_id"},
			{"GET /events", "400 url_id fraction", "GET /events?url_id=1.5", "", 400, "!invalid_request url_id"},
			{"GET /events", "400 user_id empty", "GET /events?user_id=", "", 400, "!invalid_request user_id"},
			{"GET /events", "400 user_id boolean", "GET /events?user_id=true", "", 400, "!invalid_request user_id"},
			{"GET /events", "400 event_type empty", "GET /events?event_type=", "", 400, "!invalid_request event_type"},
			{"GET /events", "400 event_type NUL", "GET /events?event_type=%00", "", 400, "!invalid_request event_type"},
			{"GET /events", "400 bad paging", "GET /events?page=x&per_page=1001", "", 400, "!invalid_request page,per_page"},
			{"DELETE /urls/{id}", "204", "DELETE /urls/1", "", 204, ""},
			{"POST /events", "404 deleted url", "POST /events", `{"event_type":"x","url_id":1}`, 404, "!url_not_found"},
		}},
		{"cross-origin", nil, []call{
			{"cross-origin", "403 cross-site", "POST /users\nSec-Fetch-Site: cross-site", annJSON, 403, "!cross_origin"},
			{"cross-origin", "403 same site, other origin", "POST /users\nSec-Fetch-Site: same-site", annJSON, 403, "!cross_origin"},
			{"cross-origin", "403 other Origin", "POST /users\nOrigin: https://evil.example", annJSON, 403, "!cross_origin"},
			{"cross-origin", "403 null Origin", "POST /users\nOrigin: null", annJSON, 403, "!cross_origin"},
			{"cross-origin", "403 delete", "DELETE /users/1\nSec-Fetch-Site: cross-site", "", 403, "!cross_origin"},
			{"cross-origin", "200 reads", "GET /users\nSec-Fetch-Site: cross-site", "", 200, `[]`},
			{"cross-origin", "404 redirects are for other sites", "GET /unknown\nSec-Fetch-Site: cross-site", "", 404, "!not_found"},
			{"cross-origin", "201 same-origin", "POST /users\nSec-Fetch-Site: same-origin", annJSON, 201, annUser},
			{"cross-origin", "201 no browser", "POST /users", `{"username":"bob","email":"bob@example.com"}`, 201, `{"id":2,"username":"bob","email":"bob@example.com","created_at":"<time>"}`},
		}},
		{"API_TOKEN", []string{"API_TOKEN=" + strings.ToUpper(anyToken) + ", " + anyToken}, []call{
			{"API_TOKEN", "401 none", "GET /users", "", 401, "!unauthorized"},
			{"API_TOKEN", "401 wrong", "GET /users\nAuthorization: Bearer " + anyToken + "x", "", 401, "!unauthorized"},
			{"API_TOKEN", "401 empty", "GET /users\nAuthorization: Bearer ", "", 401, "!unauthorized"},
			{"API_TOKEN", "401 write", "POST /users", annJSON, 401, "!unauthorized"},
			{"API_TOKEN", "200 first token", "GET /users\nAuthorization: Bearer " + strings.ToUpper(anyToken), "", 200, `[]`},
			{"API_TOKEN", "201 second token", "POST /users\nAuthorization: Bearer " + anyToken, annJSON, 201, annUser},
			{"API_TOKEN", "200 health is open", "GET /health/live", "", 200, `{"status":"ok"}`},
			{"API_TOKEN", "404 redirects are open", "GET /unknown", "", 404, "!not_found"},
			{"API_TOKEN", "404 unknown paths say nothing more", "GET /no/such/path", "", 404, "!not_found"},
		}},
	}
}

// seenStatuses is which statuses each route answered in a contract run.
type seenStatuses map[string]map[int]bool

func (s seenStatuses) add(route string, status int) {
	if s[route] == nil {
		s[route] = map[int]bool{}
	}
	s[route][status] = true
}

// seenPattern finds routes and statuses in what GET /metrics says.
var seenPattern = regexp.MustCompile(`hop_request_duration_seconds_count\{route="([^"]*)",status="([0-9]+)"\}`)

func TestContract(t *testing.T) {
	for _, redis := range []string{"absent", "present"} {
		t.Run("redis "+redis, func(t *testing.T) {
			state, seen := map[string]string{"absent": "disabled", "present": "up"}[redis], seenStatuses{}
			start := func(t testing.TB, settings ...string) *app {
				if redis == "present" {
					settings = append(settings, "REDIS_URL="+startRedis(t).url)
				}
				a := startApp(t, settings...)
				eventually(t, 5*time.Second, "redis is "+redis, func() bool { return a.cache.redis.usable() == (redis == "present") })
				t.Cleanup(func() {
					metrics := do(t, "GET", a.url+"/metrics", "", "Authorization: Bearer "+anyToken)
					for _, m := range seenPattern.FindAllStringSubmatch(metrics.body, -1) {
						status, _ := strconv.Atoi(m[2])
						seen.add(m[1], status)
					}
				})
				return a
			}
			for _, g := range contractTables(state) {
				t.Run(g.name, func(t *testing.T) {
					a := start(t, g.settings...)
					for _, c := range g.calls {
						t.Run(c.endpoint+"/"+c.name, func(t *testing.T) { a.check(t, c) })
					}
				})
			}
			for _, sc := range scenarios {
				t.Run(sc.name, func(t *testing.T) { sc.run(t, start(t)) })
			}
			t.Run("every route: 401 403 503", func(t *testing.T) { testGuards(t, start(t, "API_TOKEN="+anyToken), seen) })
			t.Run("statuses as openapi.yaml has them", func(t *testing.T) { checkStatuses(t, seen) })
		})
	}
}

// check sends a call and compares the answer.
func (a *app) check(t *testing.T, c call) {
	line, headers, _ := strings.Cut(c.request, "\n")
	method, path, _ := strings.Cut(line, " ")
	var lines []string
	if headers != "" {
		lines = strings.Split(headers, "\n")
	}
	r := do(t, method, a.url+path, c.body, lines...)
	if r.status != c.status {
		t.Fatalf("%s: %d, want %d: %.300s", line, r.status, c.status, r.body)
	}
	if location, want := r.header.Get("Location"), strings.TrimPrefix(c.want, "-> "); c.status == http.StatusFound && location != want {
		t.Errorf("Location %q, want %q", location, want)
	} else if c.status != http.StatusFound && r.header["Location"] != nil {
		t.Errorf("Location %q with a %d", location, r.status)
	}
	if c.status == http.StatusFound {
		for name, want := range map[string]string{"Cache-Control": "private, max-age=0, no-store", "X-Robots-Tag": "noindex", "Referrer-Policy": "strict-origin-when-cross-origin", "Set-Cookie": ""} {
			if got := r.header.Get(name); got != want {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
	}
	switch {
	case c.want == "" || strings.HasPrefix(c.want, "-> "):
		if r.body != "" {
			t.Errorf("a body where none belongs: %q", r.body)
		}
	case c.want[0] == '~':
		if !strings.Contains(r.body, c.want[1:]) {
			t.Errorf("no %q in %.300q", c.want[1:], r.body)
		}
	case c.want[0] == '!':
		checkError(t, r, c.want[1:])
	default:
		checkJSONType(t, r)
		if err := match(decodeAny(t, c.want), decodeAny(t, r.body), "body"); err != nil {
			t.Errorf("%v\n got %s", err, r.body)
		}
	}
}

func checkJSONType(t *testing.T, r reply) {
	t.Helper()
	if got := r.header.Get("Content-Type"); got != "application/json" || r.header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("Content-Type %q, X-Content-Type-Options %q", got, r.header.Get("X-Content-Type-Options"))
	}
}

// checkError compares an answer to "code" followed by the fields it must name, or, for CSVs, by what the message must contain.
func checkError(t *testing.T, r reply, want string) {
	t.Helper()
	checkJSONType(t, r)
	var e wireError
	strict(t, r.body, &e)
	code, rest, _ := strings.Cut(want, " ")
	if e.Error != code || e.Message == "" {
		t.Errorf("error %q (%q), want %q", e.Error, e.Message, code)
	}
	if code == "invalid_csv" {
		if !strings.Contains(e.Message, rest) {
			t.Errorf("message %q without %q", e.Message, rest)
		}
		return
	}
	var fields []string
	for f, why := range e.Fields {
		if fields = append(fields, f); why == "" {
			t.Errorf("no reason for %s", f)
		}
	}
	slices.Sort(fields)
	if got := strings.Join(fields, ","); got != rest {
		t.Errorf("fields %q, want %q", got, rest)
	}
	if (r.status == http.StatusServiceUnavailable) != (r.header.Get("Retry-After") != "") {
		t.Errorf("%d with Retry-After %q", r.status, r.header.Get("Retry-After"))
	}
	if r.status == http.StatusMethodNotAllowed && r.header.Get("Allow") == "" {
		t.Error("405 without Allow")
	}
	if r.status == http.StatusUnauthorized && r.header.Get("WWW-Authenticate") == "" {
		t.Error("401 without WWW-Authenticate")
	}
}

// strict decodes a body into v and refuses members v does not have.
func strict(t testing.TB, body string, v any) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		t.Fatalf("%v in %.500q", err, body)
	}
}

func decodeAny(t testing.TB, s string) (v any) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(s))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%v in %.500q", err, s)
	}
	return v
}

var (
	intPattern  = regexp.MustCompile(`^(0|[1-9][0-9]*)$`)
	codePattern = regexp.MustCompile(`^[0-9A-Za-z]{7}$`)
)

// match says where got differs from want, whose <…> strings stand for values of a kind.
func match(want, got any, at string) error {
	number, isNumber := got.(json.Number)
	text, _ := got.(string)
	ok := false
	switch w := want.(type) {
	case map[string]any:
		g, isObject := got.(map[string]any)
		for name := range g {
			if _, known := w[name]; !known {
				return fmt.Errorf("%s.%s should not be there", at, name)
			}
		}
		for name := range w {
			if _, there := g[name]; !there {
				return fmt.Errorf("%s.%s is missing", at, name)
			}
			if err := match(w[name], g[name], at+"."+name); err != nil {
				return err
			}
		}
		ok = isObject
	case []any:
		g, isArray := got.([]any)
		if len(g) != len(w) {
			return fmt.Errorf("%s has %d elements, want %d", at, len(g), len(w))
		}
		for i := range w {
			if err := match(w[i], g[i], fmt.Sprintf("%s[%d]", at, i)); err != nil {
				return err
			}
		}
		ok = isArray
	case string:
		switch w {
		case "<time>":
			when, err := time.Parse("2006-01-02T15:04:05", text)
			ok = err == nil && when.Format("2006-01-02T15:04:05") == text && time.Since(when).Abs() < 2*time.Minute
		case "<code>":
			ok = codePattern.MatchString(text)
		case "<fields>":
			fields, isObject := got.(map[string]any)
			ok = isObject && len(fields) > 0
		case "<text>":
			ok = text != ""
		case "<int>":
			ok = isNumber && intPattern.MatchString(number.String())
		case "<number>":
			ok = isNumber
		default:
			ok = text == w
		}
	default:
		ok = reflect.DeepEqual(want, got)
	}
	if !ok {
		return fmt.Errorf("%s is %v, want %v", at, got, want)
	}
	return nil
}

// get sends a request that must be answered with status and returns the answer as a T, which must know all its members.
func get[T any](t testing.TB, a *app, status int, method, path, body string, headers ...string) (v T) {
	t.Helper()
	r := do(t, method, a.url+path, body, headers...)
	if r.status != status {
		t.Fatalf("%s %s: %d, want %d: %.500s", method, path, r.status, status, r.body)
	}
	if r.body != "" {
		strict(t, r.body, &v)
	}
	return v
}

// addLink makes an anonymous link.
func addLink(t testing.TB, a *app, target, code string) wireLink {
	t.Helper()
	return get[wireLink](t, a, 201, "POST", "/shorten", fmt.Sprintf(`{"url":%q,"custom_code":%q}`, target, code))
}

// scenarios are the contract's sentences that take more than a request and its answer.
var scenarios = []struct {
	name string
	run  func(*testing.T, *app)
}{
	{"GET /health 503 when links can not be served", func(t *testing.T, a *app) {
		type state struct{ Status string }
		a.draining.Store(true)
		r := do(t, "GET", a.url+"/health", "")
		var s state
		if r.json(t, &s); r.status != 503 || s.Status != "unavailable" {
			t.Errorf("draining: %d %s", r.status, r.body)
		}
		if live := do(t, "GET", a.url+"/health/live", ""); live.status != 200 {
			t.Errorf("live while draining: %d", live.status)
		}
		lost := launchApp(t, "DATABASE_URL=postgres://hop@127.0.0.1:1/none?sslmode=disable")
		r = do(t, "GET", lost.url+"/health", "")
		if r.json(t, &s); r.status != 503 || s.Status != "unavailable" || !strings.Contains(r.body, `"postgres":{"status":"down"`) {
			t.Errorf("without PostgreSQL: %d %s", r.status, r.body)
		}
		if r := do(t, "GET", lost.url+"/users", ""); r.status != 503 {
			t.Errorf("list without PostgreSQL: %d %s", r.status, r.body)
		} else {
			checkError(t, r, "unavailable")
		}
	}},
	{"POST /shorten the same original_url twice gives two links with two codes", func(t *testing.T, a *app) {
		one := get[wireLink](t, a, 201, "POST", "/shorten", `{"original_url":"https://example.com/same"}`)
		two := get[wireLink](t, a, 201, "POST", "/shorten", `{"original_url":"https://example.com/same"}`)
		if one.ID == two.ID || one.ShortCode == two.ShortCode {
			t.Errorf("%+v and %+v", one, two)
		}
		if one.ShortURL != "http://hop.test/"+one.ShortCode {
			t.Errorf("short_url %q of %q", one.ShortURL, one.ShortCode)
		}
		for _, l := range []wireLink{one, two} {
			if r := do(t, "GET", a.url+"/"+l.ShortCode, ""); r.status != 302 || r.header.Get("Location") != "https://example.com/same" {
				t.Errorf("%s: %d %s", l.ShortCode, r.status, r.header.Get("Location"))
			}
		}
	}},
	{"POST /users two at once of the same name: one 201, one 409", func(t *testing.T, a *app) {
		for i := range 5 {
			var wg sync.WaitGroup
			statuses := make([]int, 4)
			for n := range statuses {
				wg.Go(func() {
					body := fmt.Sprintf(`{"username":"twin%d","email":"twin%d-%d@example.com"}`, i, i, n)
					if n%2 == 1 { // the same email under other names
						body = fmt.Sprintf(`{"username":"pair%d-%d","email":"pair%d@example.com"}`, i, n, i)
					}
					statuses[n] = do(t, "POST", a.url+"/users", body).status
				})
			}
			wg.Wait()
			for n := range 2 {
				pair := []int{statuses[n], statuses[n+2]}
				if slices.Sort(pair); !slices.Equal(pair, []int{201, 409}) {
					t.Errorf("two at once: %v", pair)
				}
			}
		}
		if n := len(get[[]wireUser](t, a, 200, "GET", "/users", "")); n != 10 {
			t.Errorf("%d users, want 10", n)
		}
	}},
	{"DELETE /users/{id} keeps links and events, with user_id null", func(t *testing.T, a *app) {
		u := get[wireUser](t, a, 201, "POST", "/users", annJSON)
		l := get[wireLink](t, a, 201, "POST", "/urls", fmt.Sprintf(`{"user_id":%d,"original_url":"https://example.com/","short_code":"orphan"}`, u.ID))
		if r := do(t, "GET", a.url+"/orphan", ""); r.status != 302 {
			t.Fatal(r.status)
		}
		if owned := get[[]wireEvent](t, a, 200, "GET", fmt.Sprintf("/events?user_id=%d", u.ID), ""); len(owned) != 2 {
			t.Fatalf("before: %+v", owned)
		}
		get[any](t, a, 204, "DELETE", fmt.Sprintf("/users/%d", u.ID), "")
		if l = get[wireLink](t, a, 200, "GET", fmt.Sprintf("/urls/%d", l.ID), ""); l.UserID != nil || !l.IsActive {
			t.Errorf("link %+v", l)
		}
		if r := do(t, "GET", a.url+"/orphan", ""); r.status != 302 {
			t.Errorf("redirect %d", r.status)
		}
		events := get[[]wireEvent](t, a, 200, "GET", fmt.Sprintf("/events?url_id=%d", l.ID), "")
		if len(events) != 3 {
			t.Errorf("%d events, want created and two clicks", len(events))
		}
		for _, e := range events {
			if e.UserID != nil {
				t.Errorf("event %+v", e)
			}
		}
	}},
	{"PUT /urls/{id} advances updated_at even within the same second", func(t *testing.T, a *app) {
		l := addLink(t, a, "https://example.com/", "version")
		for i, method := range []string{"PUT", "PATCH", "PUT", "PUT"} {
			next := get[wireLink](t, a, 200, method, fmt.Sprintf("/urls/%d", l.ID), fmt.Sprintf(`{"title":"v%d"}`, i/2))
			if next.UpdatedAt <= l.UpdatedAt || next.CreatedAt != l.CreatedAt {
				t.Errorf("%s after %s, created %s", next.UpdatedAt, l.UpdatedAt, next.CreatedAt)
			}
			l = next
		}
		events := get[[]wireEvent](t, a, 200, "GET", fmt.Sprintf("/events?url_id=%d&event_type=updated", l.ID), "")
		if len(events) != 2 { // every second change changed nothing
			t.Errorf("%d updated events, want 2: %+v", len(events), events)
		}
	}},
	{"GET /{code} 404 from the second a link expires on", func(t *testing.T, a *app) {
		end := time.Now().UTC().Truncate(time.Second).Add(2 * time.Second)
		body := fmt.Sprintf(`{"url":"https://example.com/","custom_code":"brief","expires_at":%q}`, end.Format(time.RFC3339))
		if l := get[wireLink](t, a, 201, "POST", "/shorten", body); l.ExpiresAt != end.Format("2006-01-02T15:04:05") {
			t.Errorf("expires_at %q", l.ExpiresAt)
		}
		for {
			r := do(t, "GET", a.url+"/brief", "")
			now := time.Now()
			if r.status == 404 && now.After(end) {
				checkError(t, r, "not_found")
				break
			}
			if r.status != 302 || now.After(end.Add(time.Second)) {
				t.Fatalf("%d, %v before the end", r.status, end.Sub(now))
			}
			time.Sleep(20 * time.Millisecond)
		}
		if r := do(t, "GET", a.url+"/urls/brief/redirect", ""); r.status != 404 || r.header["Location"] != nil {
			t.Errorf("second path: %d", r.status)
		}
		before := get[wireStats](t, a, 200, "GET", "/stats/brief", "").ClickCount
		do(t, "GET", a.url+"/brief", "")
		if after := get[wireStats](t, a, 200, "GET", "/stats/brief", "").ClickCount; after != before || before == 0 {
			t.Errorf("clicks %d, then %d", before, after)
		}
		id := get[wireLink](t, a, 200, "PUT", fmt.Sprintf("/urls/%d", get[[]wireLink](t, a, 200, "GET", "/urls?short_code=brief", "")[0].ID), `{"expires_at":null}`).ID
		if r := do(t, "GET", a.url+"/brief", ""); r.status != 302 {
			t.Errorf("link %d does not live again: %d", id, r.status)
		}
	}},
	{"GET /events and GET /stats see every redirect answered before", func(t *testing.T, a *app) {
		l := addLink(t, a, "https://example.com/", "counted")
		other := addLink(t, a, "https://example.com/", "other")
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() { // someone else's clicks keep the flusher busy
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
					do(t, "GET", a.url+"/"+other.ShortCode, "")
				}
			}
		})
		for i := 1; i <= 40; i++ {
			path := []string{"/counted", "/urls/counted/redirect"}[i%2]
			if r := do(t, "GET", a.url+path, ""); r.status != 302 {
				t.Fatal(r.status)
			}
			if i%3 == 0 {
				if n := get[wireStats](t, a, 200, "GET", "/stats/counted", "").ClickCount; n != int64(i) {
					t.Fatalf("stats: %d after %d redirects", n, i)
				}
			} else if n := len(get[[]wireEvent](t, a, 200, "GET", fmt.Sprintf("/events?url_id=%d&event_type=click", l.ID), "")); n != i {
				t.Fatalf("events: %d after %d redirects", n, i)
			}
		}
		t.Log(strings.Count(a.logs.String(), "status=302"), "redirects in all")
		close(stop)
		wg.Wait()
	}},
	{"lists follow Link to the end, in id order, nothing twice", func(t *testing.T, a *app) {
		db := openDB(t, a.cfg.DatabaseURL)
		for _, q := range []string{
			`INSERT INTO users (username, email, created_at) SELECT 'u' || i, 'u' || i || '@example.com', now() FROM generate_series(1, 2050) i`,
			`INSERT INTO urls (user_id, short_code, original_url, is_active, created_at, updated_at) SELECT 1 + i % 2, 'code' || i, 'https://example.com/', i % 3 > 0, now(), now() FROM generate_series(1, 2050) i`,
			`INSERT INTO events (url_id, user_id, event_type, timestamp, details) SELECT 1, 1 + i % 2, 'click', now(), '{}' FROM generate_series(1, 2050) i`,
		} {
			if _, err := db.Exec(q); err != nil {
				t.Fatal(err)
			}
		}
		type row struct{ ID int64 }
		for path, want := range map[string]struct{ rows, pages int }{
			"/users": {2050, 3}, "/urls": {2050, 3}, "/events": {2050, 3},
			"/users?per_page=410":                             {2050, 5}, // the last page is full, so it has no next one
			"/urls?user_id=1&per_page=500":                    {1025, 3},
			"/urls?is_active=false&user_id=2":                 {342, 1},
			"/urls?is_active=true":                            {1367, 2},
			"/events?url_id=1&user_id=2&event_type=click":     {1025, 2},
			"/events?event_type=click&page=2&per_page=1000":   {1050, 2},
			"/events?page=3&per_page=1000&event_type=click":   {50, 1},
			"/events?event_type=click&after=2049&per_page=10": {1, 1},
			"/urls?short_code=code7":                          {1, 1},
		} {
			rows, pages, last := 0, 0, int64(0)
			for next := path; next != ""; {
				r := do(t, "GET", a.url+next, "")
				if r.status != 200 {
					t.Fatalf("%s: %d %s", next, r.status, r.body)
				}
				var page []row
				r.json(t, &page)
				if len(page) > 1000 {
					t.Fatalf("%s: %d rows", next, len(page))
				}
				for _, p := range page {
					if p.ID <= last {
						t.Fatalf("%s: %d after %d", next, p.ID, last)
					}
					last = p.ID
				}
				rows, pages, next = rows+len(page), pages+1, ""
				if link := r.header.Get("Link"); link != "" {
					target, ok := strings.CutSuffix(link, `>; rel="next"`)
					if next, _ = strings.CutPrefix(target, "<"); !ok || next == target {
						t.Fatalf("Link: %q", link)
					}
				}
			}
			if rows != want.rows || pages != want.pages {
				t.Errorf("%s: %d rows on %d pages, want %d on %d", path, rows, pages, want.rows, want.pages)
			}
		}
	}},
	{"POST /users/bulk 100,000 rows in seconds, in constant memory", func(t *testing.T, a *app) {
		const rows, early, late = 100_000, 20_000, 95_000
		heap := func() int64 { // the least of some looks, while the rows sent before are inserted
			least := int64(math.MaxInt64)
			for range 12 {
				time.Sleep(50 * time.Millisecond)
				var m runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&m)
				least = min(least, int64(m.HeapAlloc))
			}
			return least
		}
		var at20, at95 int64
		var looked time.Duration
		body, file := io.Pipe()
		go func() {
			fmt.Fprint(file, csvHead)
			padding := strings.Repeat("x", 100)
			for i := 1; i <= rows; i++ {
				fmt.Fprintf(file, "%d,user%d-%s,user%d@example.com,2025-01-01 10:00:00\n", i, i%99_000, padding, i)
				before := time.Now()
				switch i {
				case early:
					at20 = heap()
				case late:
					at95 = heap()
				default:
					continue
				}
				looked += time.Since(before)
			}
			file.Close()
		}()
		start := time.Now()
		req, _ := http.NewRequest("POST", a.url+"/users/bulk", body)
		req.Header.Set("Content-Type", "text/csv")
		resp, err := (&http.Client{Timeout: time.Minute}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		answer, _ := io.ReadAll(resp.Body)
		took := time.Since(start) - looked
		if want := `{"count":100000,"imported":100000}` + "\n"; resp.StatusCode != 201 || string(answer) != want {
			t.Fatalf("%d %s", resp.StatusCode, answer)
		}
		t.Logf("100,000 users in %v, heap %d KiB at 20,000 rows, %d KiB at 95,000", took, at20>>10, at95>>10)
		if took > 20*time.Second {
			t.Errorf("took %v", took)
		}
		if growth := at95 - at20; growth > 6<<20 { // the 75,000 rows between are 10 MiB of text, 15 as strings
			t.Errorf("the heap grew by %d KiB", growth>>10)
		}
		if u := get[wireUser](t, a, 201, "POST", "/users", annJSON); u.ID != rows+1 {
			t.Errorf("next id %d", u.ID)
		}
	}},
	{"POST /users/bulk all or nothing", func(t *testing.T, a *app) {
		var file strings.Builder
		file.WriteString(csvHead)
		for i := 1; i <= 12_000; i++ { // the bad row comes long after the first chunk was inserted
			email := "a@example.com"
			if i == 11_999 {
				email = "nobody"
			}
			fmt.Fprintf(&file, "%d,u%d,%s,2025-01-01 10:00:00\n", i, i, email)
		}
		r := do(t, "POST", a.url+"/users/bulk", file.String(), "Content-Type: text/csv")
		if r.status != 400 {
			t.Fatalf("%d %s", r.status, r.body)
		}
		checkError(t, r, "invalid_csv line 12000, column email")
		if left := get[[]wireUser](t, a, 200, "GET", "/users", ""); len(left) != 0 {
			t.Errorf("%d users left", len(left))
		}
		if u := get[wireUser](t, a, 201, "POST", "/users", annJSON); u.ID != 1 {
			t.Errorf("the sequence moved to %d", u.ID)
		}
	}},
	{"POST /urls/bulk 1,000 links in one statement", func(t *testing.T, a *app) {
		get[wireUser](t, a, 201, "POST", "/users", annJSON)
		body := `[` + strings.Repeat(`{"user_id":1,"original_url":"https://example.com/a/rather/ordinary/path?with=query","title":"A title"},`, 999) +
			`{"user_id":1,"original_url":"https://example.com/last"}]`
		start := time.Now()
		answer := get[wireBulk](t, a, 200, "POST", "/urls/bulk", body)
		t.Logf("1,000 links in %v", time.Since(start))
		codes := map[string]bool{}
		for i, r := range answer.Results {
			if r.Status != 201 || r.URL == nil || r.Error != "" || r.URL.ShortURL != "http://hop.test/"+r.URL.ShortCode {
				t.Fatalf("item %d: %+v", i, r)
			}
			codes[r.URL.ShortCode] = true
		}
		if last := answer.Results[len(answer.Results)-1].URL.OriginalURL; len(codes) != 1000 || last != "https://example.com/last" {
			t.Errorf("%d codes, the last item is %s", len(codes), last)
		}
		db := openDB(t, a.cfg.DatabaseURL)
		if n := scalar[int](t, db, `SELECT count(DISTINCT xmin::text || ' ' || cmin::text) FROM urls`); n != 1 {
			t.Errorf("the links were made by %d statements", n)
		}
		if n := scalar[int](t, db, `SELECT count(DISTINCT e.xmin::text) FROM events e JOIN urls u ON u.id = e.url_id AND u.xmin = e.xmin`); n != 1 {
			t.Errorf("links and events were made by %d transactions", n)
		}
		if n := scalar[int](t, db, `SELECT count(*) FROM events WHERE event_type = 'created'`); n != 1000 {
			t.Errorf("%d created events", n)
		}
	}},
	{"POST /shorten the answer is durable and visible before it is sent", func(t *testing.T, a *app) {
		var wg sync.WaitGroup
		for n := range 8 { // creates that share a commit
			wg.Go(func() {
				for i := range 10 {
					code := fmt.Sprintf("code-%d-%d", n, i)
					if r := do(t, "POST", a.url+"/shorten", fmt.Sprintf(`{"url":"https://example.com/%d/%d","custom_code":%q}`, n, i, code)); r.status != 201 {
						t.Errorf("%d %s", r.status, r.body)
					}
					if r := do(t, "GET", a.url+"/"+code, ""); r.status != 302 || r.header.Get("Location") != fmt.Sprintf("https://example.com/%d/%d", n, i) {
						t.Errorf("%s: %d", code, r.status)
					}
				}
			})
		}
		wg.Wait()
	}},
}

// testGuards asks every route without a token, as a browser from another site, and while too much is in flight.
func testGuards(t *testing.T, a *app, seen seenStatuses) {
	path := strings.NewReplacer("{code}", "unknown", "{id}", "99")
	for _, rt := range a.routes() {
		method, p, _ := strings.Cut(rt.pattern, " ")
		url := a.url + path.Replace(p)
		r := do(t, method, url, "")
		if rt.open == (r.status == 401) {
			t.Errorf("%s without a token: %d, open: %v", rt.pattern, r.status, rt.open)
		}
		if r.status == 401 {
			checkError(t, r, "unauthorized")
		}
		if r = do(t, method, url, "", "Authorization: Bearer "+anyToken); r.status == 401 {
			t.Errorf("%s with a token: %d", rt.pattern, r.status)
		}
		if method != "GET" {
			if r = do(t, method, url, "", "Sec-Fetch-Site: cross-site", "Authorization: Bearer "+anyToken); r.status != 403 {
				t.Errorf("%s from another site: %d", rt.pattern, r.status)
			}
			checkError(t, r, "cross_origin")
			seen.add(rt.pattern, r.status) // refused before the mux knows the route
		}
		a.inflight.n.Add(1 << 20)
		r = do(t, method, url, "", "Authorization: Bearer "+anyToken)
		a.inflight.n.Add(-1 << 20)
		if r.status != 503 {
			t.Errorf("%s with too much in flight: %d", rt.pattern, r.status)
		}
		checkError(t, r, "overloaded")
		seen.add(rt.pattern, r.status)
		if rt.limit != nil {
			rt.limit.n.Add(1 << 20)
			r = do(t, method, url, "", "Authorization: Bearer "+anyToken)
			rt.limit.n.Add(-1 << 20)
			if r.status != 503 {
				t.Errorf("%s beyond its limit: %d", rt.pattern, r.status)
			}
		}
	}
}

// TestContractCoversRoutes fails when a route has no line in the tables.
func TestContractCoversRoutes(t *testing.T) {
	covered := map[string]bool{}
	for _, g := range contractTables("") {
		for _, c := range g.calls {
			covered[c.endpoint] = true
		}
	}
	for _, rt := range new(Server).routes() {
		if !covered[rt.pattern] {
			t.Errorf("no line for %s", rt.pattern)
		}
	}
}
