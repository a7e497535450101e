package main

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	_ "embed"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Server answers HTTP. Its routes are the API's table of contents, handleRedirect is what the rest exists for.
type Server struct {
	cfg    Config
	store  *Store
	cache  *Cache
	clicks *clickLog
	log    *slog.Logger

	mux     *http.ServeMux
	cross   *http.CrossOriginProtection
	rules   targetRules
	metrics metrics
	queue   chan *creation

	inflight, creates, reads limiter     // all requests; changes; stats and lists: redirects go on while these are full
	ready, draining          atomic.Bool // may balancers send requests?
}

// handler answers a request or returns why not; failures are written in one place, by fail.
type handler func(http.ResponseWriter, *http.Request) error

// route is one line of the API. A nil limit is for what costs next to nothing, open needs no API_TOKEN.
type route struct {
	pattern string
	limit   *limiter
	open    bool
	handle  handler
}

func (s *Server) routes() []route {
	return []route{
		{"GET /{code}", nil, true, s.handleRedirect},
		{"GET /urls/{code}/redirect", nil, true, s.handleRedirect},
		{"POST /shorten", &s.creates, false, s.handleShorten},
		{"POST /shorten/bulk", &s.creates, false, s.handleBulk},
		{"GET /stats/{code}", &s.reads, false, s.handleStats},
		{"GET /users", &s.reads, false, s.handleListUsers},
		{"POST /users", &s.creates, false, s.handleCreateUser},
		{"POST /users/bulk", &s.creates, false, s.handleBulkUsers},
		{"GET /users/{id}", &s.reads, false, s.handleGetUser},
		{"PUT /users/{id}", &s.creates, false, s.handleUpdateUser},
		{"DELETE /users/{id}", &s.creates, false, s.handleDeleteUser},
		{"GET /urls", &s.reads, false, s.handleListLinks},
		{"POST /urls", &s.creates, false, s.handleCreateLink},
		{"POST /urls/bulk", &s.creates, false, s.handleBulk},
		{"GET /urls/{id}", &s.reads, false, s.handleGetLink},
		{"PUT /urls/{id}", &s.creates, false, s.handleUpdateLink},
		{"PATCH /urls/{id}", &s.creates, false, s.handleUpdateLink},
		{"DELETE /urls/{id}", &s.creates, false, s.handleDeleteLink},
		{"GET /events", &s.reads, false, s.handleListEvents},
		{"POST /events", &s.creates, false, s.handleCreateEvent},
		{"GET /health", nil, true, s.handleHealth},
		{"GET /health/live", nil, true, s.handleLive},
		{"GET /metrics", nil, false, s.handleMetrics},
		{"GET /openapi.yaml", nil, true, s.handleOpenAPI},
	}
}

// newServer wires the routes. It is not ready until told.
func newServer(cfg Config, store *Store, cache *Cache, clicks *clickLog, log *slog.Logger) *Server {
	s := &Server{cfg: cfg, store: store, cache: cache, clicks: clicks, log: log, mux: http.NewServeMux(),
		cross: http.NewCrossOriginProtection(), rules: cfg.rules(), queue: make(chan *creation, maxCreates)}
	s.inflight.max, s.creates.max, s.reads.max = int64(cfg.MaxInFlight), maxCreates, maxReads
	for _, rt := range s.routes() {
		s.mux.Handle(rt.pattern, s.adapt(rt))
	}
	go s.createQueued()
	return s
}

const (
	maxCreates = 256 // changes under way: 32 already saturate PostgreSQL's commits
	maxReads   = 128 // stats and lists under way: each may cost a flush and a thousand rows
)

// adapt makes a route's handler an http.Handler: who may, how many at once, and what a failure looks like.
func (s *Server) adapt(rt route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !rt.open && !s.authorized(r) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="hop"`)
			s.fail(w, &apiError{http.StatusUnauthorized, "unauthorized", "this needs Authorization: Bearer and a valid token", nil})
			return
		}
		if rt.limit != nil {
			if r.ContentLength != 0 { // read before it takes a place: who sends slowly keeps nobody else from writing
				head, _ := io.ReadAll(io.LimitReader(r.Body, maxBody+1)) // an error comes again with the next read
				r.Body = struct {
					io.Reader
					io.Closer
				}{io.MultiReader(bytes.NewReader(head), r.Body), r.Body}
			}
			if !rt.limit.enter() {
				s.fail(w, errOverloaded)
				return
			}
			defer rt.limit.leave()
		}
		if err := rt.handle(w, r); err != nil {
			s.fail(w, err)
		}
	})
}

// authorized checks the API token, if one is set. Hashes are compared, so that the time taken tells nothing.
func (s *Server) authorized(r *http.Request) bool {
	given := sha256.Sum256([]byte(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")))
	ok := len(s.cfg.APITokens) == 0
	for _, token := range s.cfg.APITokens {
		want := sha256.Sum256([]byte(token))
		ok = subtle.ConstantTimeCompare(given[:], want[:]) == 1 || ok
	}
	return ok
}

// ---- redirects ----

// Headers of every redirect, made once: the header map is given these slices and nothing is allocated.
var (
	noStore    = []string{"private, max-age=0, no-store"} // a cached redirect would be neither counted nor taken down
	noIndex    = []string{"noindex"}
	referrerTo = []string{"strict-origin-when-cross-origin"}
	closing    = []string{"close"}
)

// handleRedirect answers GET and HEAD of a short code. The click is in the journal before the answer is on the wire.
func (s *Server) handleRedirect(w http.ResponseWriter, r *http.Request) error {
	code, now := r.PathValue("code"), w.(*response).start
	if !validCode(code) {
		return errNotFound
	}
	t, err := s.cache.resolve(code, now)
	if err != nil {
		return err
	}
	if !t.live(now.Unix()) {
		return errNotFound
	}
	if r.Method == http.MethodGet {
		s.clicks.record(t.id, now.Unix(), isBot(r.Header), refererHost(r.Header))
	}
	h := w.Header()
	h["Location"], h["Cache-Control"], h["X-Robots-Tag"], h["Referrer-Policy"] = t.location, noStore, noIndex, referrerTo
	w.WriteHeader(http.StatusFound)
	return nil
}

// isBot says whether a request names itself a known crawler, preview fetcher or prefetcher: none of them is a person's click.
func isBot(h http.Header) bool {
	if v := h["Sec-Purpose"]; len(v) > 0 && strings.HasPrefix(v[0], "prefetch") {
		return true
	}
	v := h["User-Agent"]
	if len(v) == 0 {
		return false
	}
	for _, word := range [...]string{"bot", "Bot", "crawl", "pider", "facebookexternalhit", "Slurp", "Preview"} {
		if strings.Contains(v[0], word) {
			return true
		}
	}
	return false
}

// refererHost is the host a request's Referer names, or "" for none or one with unusual bytes: it goes into JSON unescaped.
func refererHost(h http.Header) string {
	v := h["Referer"]
	if len(v) == 0 {
		return ""
	}
	_, host, _ := strings.Cut(v[0], "://")
	if end := strings.IndexAny(host, "/?#"); end >= 0 {
		host = host[:end]
	}
	for i := range len(host) {
		if c := host[i]; !('0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || strings.IndexByte("-.:[]_", c) >= 0) {
			return ""
		}
	}
	return host[:min(len(host), maxHost)]
}

// ---- stats, health, pages ----

// handleStats counts what was clicked before it looks.
func (s *Server) handleStats(w http.ResponseWriter, r *http.Request) error {
	code := r.PathValue("code")
	if !validCode(code) {
		return errNotFound
	}
	if err := s.clicks.sync(); err != nil {
		return err
	}
	st, err := s.store.stats(code)
	return respond(w, http.StatusOK, st, err)
}

// peerHealth is the last known state of a dependency: up, down or disabled.
type peerHealth struct {
	Status    string  `json:"status"`
	LatencyMS float64 `json:"latency_ms"`
}

func peer(up bool, latency int64) peerHealth {
	if up {
		return peerHealth{"up", float64(latency/1000) / 1000}
	}
	return peerHealth{"down", 0}
}

// handleHealth answers from memory; probes run in the background. ok means that links are served.
func (s *Server) handleHealth(w http.ResponseWriter, _ *http.Request) error {
	ready, draining, rt, journal := s.ready.Load(), s.draining.Load(), s.cache.redis, cmp.Or(s.clicks.degraded(), "disk")
	postgres, redis := peer(!s.store.down.Load(), s.store.latency.Load()), peerHealth{Status: "disabled"}
	if rt != nil {
		redis = peer(rt.up.Load(), rt.latency.Load())
	}
	word, status := "ok", http.StatusOK
	if !ready || draining || postgres.Status != "up" && redis.Status != "up" {
		word, status = "unavailable", http.StatusServiceUnavailable
	}
	return respond(w, status, map[string]any{"status": word, "ready": ready, "draining": draining, "postgres": postgres, "redis": redis,
		"clicks": map[string]any{"journal": journal, "pending": s.clicks.pendingClicks()}}, nil)
}

// handleLive says that the process runs, whatever else does not: a restart would not help.
func (s *Server) handleLive(w http.ResponseWriter, _ *http.Request) error {
	return respond(w, http.StatusOK, map[string]string{"status": "ok"}, nil)
}

//go:embed openapi.yaml
var openAPI []byte

func (s *Server) handleOpenAPI(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Type", "application/yaml")
	_, err := w.Write(openAPI)
	return err
}

// ---- answers ----

// apiError is a failure the client is told about, as it stands.
type apiError struct {
	status  int
	Code    string            `json:"error"`
	Message string            `json:"message"`
	Fields  map[string]string `json:"fields,omitempty"`
}

func (e *apiError) Error() string { return e.Code + ": " + e.Message }

// failures turn our errors into the client's. What is not listed is a bug: 500, with its cause in the log only.
var failures = []struct {
	err error
	api apiError
}{
	{errNotFound, apiError{http.StatusNotFound, "not_found", "there is nothing here", nil}},
	{errNoUser, apiError{http.StatusNotFound, "user_not_found", "there is no such user", nil}},
	{errNoLink, apiError{http.StatusNotFound, "url_not_found", "there is no such link", nil}},
	{errCodeTaken, apiError{http.StatusConflict, "code_taken", "this code was given out before", nil}},
	{errUserExists, apiError{http.StatusConflict, "user_exists", "another user has this username or email", nil}},
	{errUnavailable, apiError{http.StatusServiceUnavailable, "unavailable", "the database cannot answer now, try again", nil}},
	{errOverloaded, apiError{http.StatusServiceUnavailable, "overloaded", "too many requests at once, try again", nil}},
}

// asAPIError finds what the client is told of err.
func asAPIError(err error) *apiError {
	if api := (*apiError)(nil); errors.As(err, &api) {
		return api
	}
	for i := range failures {
		if errors.Is(err, failures[i].err) {
			return &failures[i].api
		}
	}
	return &apiError{http.StatusInternalServerError, "internal", "something went wrong here", nil}
}

// fail answers with an error and keeps its cause for the log line.
func (s *Server) fail(w http.ResponseWriter, err error) {
	api := asAPIError(err)
	if resp, ok := w.(*response); ok {
		resp.err = err
	}
	if api.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	respond(w, api.status, api, nil)
}

// respond writes v, or returns err for fail to write. 204 has no body.
func respond(w http.ResponseWriter, status int, v any, err error) error {
	if err != nil {
		return err
	}
	if status == http.StatusNoContent {
		w.WriteHeader(status)
		return nil
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	w.Write([]byte(jsonText(v) + "\n")) // an error is the client's, gone
	return nil
}

// jsonText is v as compact JSON, with <, > and & as they are.
func jsonText(v any) string {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic(err) // our own types always encode
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// response is the ResponseWriter that all handlers get: it remembers what was answered, and gives the mux's own plain-text 404
// and 405, which it writes before any route is known, the JSON envelope. Pooled, so that a redirect does not allocate one.
type response struct {
	http.ResponseWriter
	request *http.Request
	start   time.Time
	status  int
	bytes   int
	err     error
	muted   bool // the rest of the mux's text
}

var responses = sync.Pool{New: func() any { return new(response) }}

// Unwrap lets http.ResponseController through.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *response) WriteHeader(status int) {
	if w.status != 0 {
		return
	}
	w.status = status
	if w.request.Pattern != "" || status < 400 || w.err != nil { // not the mux's
		w.ResponseWriter.WriteHeader(status)
		return
	}
	api := &apiError{status, "not_found", "there is nothing here", nil}
	if status == http.StatusMethodNotAllowed {
		api.Code, api.Message = "method_not_allowed", "allowed here: "+w.Header().Get("Allow")
	}
	w.status = 0
	w.request.Pattern = "none"
	respond(w, status, api, nil)
	w.muted = true
}

func (w *response) Write(p []byte) (int, error) {
	if w.muted {
		return len(p), nil
	}
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	n, err := w.ResponseWriter.Write(p)
	w.bytes += n
	return n, err
}

// ServeHTTP is outermost, so that it sees r.Pattern: it counts, caps, guards against cross-site writes, and logs.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	resp := responses.Get().(*response)
	*resp = response{ResponseWriter: w, request: r, start: time.Now()}
	defer s.finish(resp)
	defer s.inflight.leave() // one atomic add each way, shared by all cores: 20 ns for a bounded memory
	if s.inflight.n.Add(1) > s.inflight.max {
		s.fail(resp, errOverloaded)
		return
	}
	if s.draining.Load() {
		w.Header()["Connection"] = closing
	}
	if r.Method != http.MethodGet {
		if s.cross.Check(r) != nil {
			s.fail(resp, &apiError{http.StatusForbidden, "cross_origin", "browsers may not write here from another site", nil})
			return
		}
	}
	s.mux.ServeHTTP(resp, r)
}

// finish ends a request: a panic becomes a 500, and one line is logged. Redirects are logged at Debug only: they are 95 % of all
// requests, and each is an event in the database already.
func (s *Server) finish(w *response) {
	if p := recover(); p != nil {
		if p == http.ErrAbortHandler {
			panic(p)
		}
		w.err = errors.New("panic")
		s.log.Error("panic", "value", p)
		if w.status == 0 {
			s.fail(w, w.err)
		}
	}
	took, route := time.Since(w.start), w.request.Pattern
	s.metrics.observe(route, w.status, took)
	level := slog.LevelInfo
	switch {
	case w.status == http.StatusFound:
		level = slog.LevelDebug
	case w.status >= 500:
		level = slog.LevelError
	}
	ctx := w.request.Context()
	if s.log.Enabled(ctx, level) {
		attrs := []slog.Attr{slog.String("method", w.request.Method), slog.String("route", route), slog.Int("status", w.status),
			slog.Duration("dur", took), slog.Int("bytes", w.bytes)}
		if w.status >= 500 {
			attrs = append(attrs, slog.Any("err", w.err))
		}
		s.log.LogAttrs(ctx, level, "request", attrs...)
	}
	*w = response{}
	responses.Put(w)
}

// newCode returns 7 random letters and digits: 3.5 × 10^12 of them, so that guessing finds nothing.
func newCode() string {
	const alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	code, random := make([]byte, 0, 7), make([]byte, 16)
	for len(code) < cap(code) {
		rand.Read(random)
		for _, b := range random {
			if int(b) < 256/62*62 && len(code) < cap(code) { // the rest would favour the first letters
				code = append(code, alphabet[b%62])
			}
		}
	}
	return string(code)
}
