package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// The wire as clients see it: the JSON structs are declared again here, so that a change of the
// wire breaks a test. And how tests ask hop and judge what it answers.

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

type wireLoaded struct {
	Imported  int64          `json:"imported"`
	Count     int64          `json:"count"`
	Conflicts []wireConflict `json:"conflicts,omitempty"`
	Unnamed   int64          `json:"more_conflicts,omitempty"`
}

type wireConflict struct {
	Line int64 `json:"line"`
	ID   int64 `json:"id"`
}

type wireHealth struct {
	Status   string     `json:"status"`
	Ready    bool       `json:"ready"`
	Draining bool       `json:"draining"`
	Postgres wirePeer   `json:"postgres"`
	Redis    wirePeer   `json:"redis"`
	Clicks   wireClicks `json:"clicks"`

	StaleSeconds *int64 `json:"stale_seconds,omitempty"` // PostgreSQL is not up
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

// What several tests send.
const (
	annJSON  = `{"username":"ann","email":"ann@example.com"}`
	csvHead  = "id,username,email,created_at\n"
	anyToken = "0123456789abcdef0123456789abcdef"
)

// get sends a request that must be answered with status and returns the answer as a T, which must
// know all its members.
func get[T any](t testing.TB, a *app, status int, method, path, body string, headers ...string) T {
	t.Helper()
	var v T
	r := do(t, method, a.url+path, body, headers...)
	if r.status != status {
		t.Fatalf("%s %s: %d, want %d: %.500s", method, path, r.status, status, r.body)
	}
	if r.body != "" {
		strict(t, r.body, &v)
	}
	return v
}

// addLink makes a link without an owner.
func addLink(t testing.TB, a *app, target, code string) wireLink {
	t.Helper()
	body := fmt.Sprintf(`{"url":%q,"custom_code":%q}`, target, code)
	return get[wireLink](t, a, 201, "POST", "/shorten", body)
}

// follow follows a link and fails the test unless it leads to target.
func follow(t testing.TB, a *app, path, target string) {
	t.Helper()
	r := do(t, "GET", a.url+path, "")
	if got := r.header.Get("Location"); r.status != http.StatusFound || got != target {
		t.Errorf("%s: %d to %q, want %q", path, r.status, got, target)
	}
}

// strict decodes a body into v and refuses members that v does not have.
func strict(t testing.TB, body string, v any) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		t.Fatalf("%v in %.500q", err, body)
	}
}

// decodeAny decodes JSON and keeps numbers as they are written.
func decodeAny(t testing.TB, text string) any {
	t.Helper()
	var v any
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%v in %.500q", err, text)
	}
	return v
}

// checkReply fails unless r has what every answer has.
func checkReply(t testing.TB, r reply) {
	t.Helper()
	if location, sent := r.header["Location"]; sent && r.status/100 != 3 {
		t.Errorf("Location %q with a %d", location, r.status)
	}
	media := r.header.Get("Content-Type")
	if r.body != "" && !strings.HasPrefix(media, "text/") && !strings.HasPrefix(media, "image/") {
		checkJSONType(t, r)
	}
	if r.status == http.StatusFound {
		checkRedirect(t, r)
	}
}

// checkRedirect fails unless r has what every redirect has.
func checkRedirect(t testing.TB, r reply) {
	t.Helper()
	if r.body != "" {
		t.Errorf("a redirect with a body: %.200q", r.body)
	}
	for name, want := range map[string]string{
		"Cache-Control":   "private, max-age=0, no-store",
		"X-Robots-Tag":    "noindex",
		"Referrer-Policy": "strict-origin-when-cross-origin",
		"Set-Cookie":      "",
	} {
		if got := r.header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// checkJSONType fails unless r says that it is JSON and nothing else.
func checkJSONType(t testing.TB, r reply) {
	t.Helper()
	media, sniff := r.header.Get("Content-Type"), r.header.Get("X-Content-Type-Options")
	if media != "application/json" || sniff != "nosniff" {
		t.Errorf("Content-Type %q, X-Content-Type-Options %q", media, sniff)
	}
}

// checkError compares an answer with "code" followed by the fields that it must name, or, of a CSV,
// by what the message must contain.
func checkError(t testing.TB, r reply, want string) {
	t.Helper()
	checkJSONType(t, r)
	var e wireError
	strict(t, r.body, &e)
	code, rest, _ := strings.Cut(want, " ")
	if e.Error != code || e.Message == "" {
		t.Errorf("error %q (%q), want %q", e.Error, e.Message, code)
	}
	needs := map[int]string{
		http.StatusUnauthorized:       "WWW-Authenticate",
		http.StatusMethodNotAllowed:   "Allow",
		http.StatusServiceUnavailable: "Retry-After",
	}
	if name := needs[r.status]; name != "" && r.header.Get(name) == "" {
		t.Errorf("%d without %s", r.status, name)
	}
	if code == "invalid_csv" {
		if !strings.Contains(e.Message, rest) {
			t.Errorf("message %q without %q", e.Message, rest)
		}
		return
	}
	var fields []string
	for field, why := range e.Fields {
		fields = append(fields, field)
		if why == "" {
			t.Errorf("no reason for %s", field)
		}
	}
	slices.Sort(fields)
	if got := strings.Join(fields, ", "); got != rest {
		t.Errorf("fields %q, want %q", got, rest)
	}
}
