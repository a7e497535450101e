package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Server answers HTTP. Here is what surrounds every handler, and the redirect, for which the rest
// exists. The table of all routes is in routes.go.
type Server struct {
	cfg    Config
	store  *Store
	cache  *Cache
	clicks *clickLog
	log    *slog.Logger
	port   *sharedPort // nil where somebody else listens

	mux     *http.ServeMux
	cross   *http.CrossOriginProtection
	rules   targetRules
	metrics metrics
	creates chan *creation // links on their way to the database

	inflight limiter     // requests being answered
	unread   limiter     // bytes of lists that their clients have not read yet
	bodies   limiter     // bytes of bulk requests
	ready    atomic.Bool // the caches are warm: balancers may send requests
	draining atomic.Bool // the process is about to end: balancers should stop
}

// heldBytes is how much memory things take that may live for seconds: bodies and files that arrive,
// lists that nobody reads, a journal without a disk.
func (s *Server) heldBytes() int64 {
	return s.unread.n.Load() + s.bodies.n.Load() + s.store.uploads.n.Load()*uploadBlock +
		s.clicks.heldBytes()
}

// creation is a link on its way through the queue.
type creation struct {
	link newLink
	done chan createResult
	gone atomic.Bool // its client was told that there was no time: it will try again
}

// maxQueued is how many creates may wait: about what PostgreSQL commits within answerWithin.
const maxQueued = 2048

// handler answers a request, or returns why not. Errors become answers in one place, fail.
type handler func(http.ResponseWriter, *http.Request) error

// access is who may use a route when tokens are set.
type access int

const (
	public  access = iota // everybody
	reading               // holders of an API_TOKEN or a READ_TOKEN
	writing               // holders of an API_TOKEN
)

// route is one line of the API.
type route struct {
	pattern string
	access  access
	handle  handler
}

// adapt makes a route's handler an http.Handler: who may use it, and what a failure looks like.
func (s *Server) adapt(rt route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		err := s.authorize(rt.access, r)
		if err == nil {
			err = rt.handle(w, r)
		}
		if err != nil {
			s.fail(w, err)
		}
	})
}

// ---- who may ----

var errUnauthorized = &apiError{
	status:  http.StatusUnauthorized,
	Code:    "unauthorized",
	Message: "this needs Authorization: Bearer and a valid token",
}

// authorize checks the token of a request, if the route needs one and one is set.
func (s *Server) authorize(who access, r *http.Request) error {
	if who == public || s.cfg.Open() {
		return nil
	}
	given := requestToken(r)
	if isOneOf(s.cfg.APITokens, given) {
		return nil
	}
	if who == reading && isOneOf(s.cfg.ReadTokens, given) {
		return nil
	}
	return errUnauthorized
}

// requestToken is the token that a request brings: as a bearer, or as the password of the prompt
// that browsers show, with any name.
func requestToken(r *http.Request) string {
	if _, password, ok := r.BasicAuth(); ok {
		return password
	}
	return bearerToken(r.Header.Get("Authorization"))
}

// bearsToken says whether a request brings an API_TOKEN in a way in which no browser sends one by
// itself.
func (s *Server) bearsToken(r *http.Request) bool {
	return isOneOf(s.cfg.APITokens, bearerToken(r.Header.Get("Authorization")))
}

// bearerToken is the token of an Authorization header (RFC 9110 section 11.1: the scheme in any
// case, then blanks), or "".
func bearerToken(header string) string {
	scheme, token, found := strings.Cut(header, " ")
	if !found || !strings.EqualFold(scheme, "bearer") {
		return ""
	}
	return strings.Trim(token, " ")
}

// isOneOf says whether given is one of tokens. Hashes are compared, so that the time it takes tells
// nothing about them.
func isOneOf(tokens []string, given string) bool {
	hash := sha256.Sum256([]byte(given))
	found := 0
	for _, token := range tokens {
		want := sha256.Sum256([]byte(token))
		found |= subtle.ConstantTimeCompare(hash[:], want[:])
	}
	return found == 1
}

// ---- redirects ----

// Headers of every redirect, made once: the header map is given these slices, and nothing is
// allocated.
var (
	noStore    = []string{"private, max-age=0, no-store"} // a stored one would not be counted
	noIndex    = []string{"noindex"}
	referrerTo = []string{"strict-origin-when-cross-origin"}
	closing    = []string{"close"}
)

// handleRedirect answers GET and HEAD of a short code.
func (s *Server) handleRedirect(w http.ResponseWriter, r *http.Request) error {
	return s.redirect(w, r, r.PathValue("code"))
}

// redirect sends the client where code leads. The click is in the journal before the answer is on
// the wire.
func (s *Server) redirect(w http.ResponseWriter, r *http.Request, code string) error {
	if !validCode(code) {
		clean := trimCode(code) // links copied out of running text end in commas and brackets
		if !validCode(clean) || clean+"+" == code {
			return errNotFound // code+ is a page
		}
		code = clean
	}
	now := w.(*answer).start
	t, err := s.cache.resolve(r.Context(), code, now)
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
	h["Location"] = t.location
	h["Cache-Control"] = noStore
	h["X-Robots-Tag"] = noIndex
	h["Referrer-Policy"] = referrerTo
	w.WriteHeader(http.StatusFound)
	return nil
}

// ---- answers ----

// apiError is a failure that the client is told about, as it stands.
type apiError struct {
	status  int
	Code    string            `json:"error"`
	Message string            `json:"message"`
	Fields  map[string]string `json:"fields,omitempty"`
}

// Error makes apiError an error.
func (e *apiError) Error() string { return e.Code + ": " + e.Message }

// failures turn the errors of the store and the cache into the client's. What is not listed is a
// bug: the client gets a 500, and the cause goes to the log only.
var failures = []struct {
	err error
	api apiError
}{
	{errNotFound, apiError{http.StatusNotFound, "not_found", "there is nothing here", nil}},
	{errNoUser, apiError{http.StatusNotFound, "user_not_found", "there is no such user", nil}},
	{errNoLink, apiError{http.StatusNotFound, "url_not_found", "there is no such link", nil}},
	{errCodeTaken, apiError{http.StatusConflict, "code_taken",
		"this code was given out before", nil}},
	{errKeyReused, apiError{http.StatusConflict, "idempotency_conflict",
		"this Idempotency-Key made another link, or one that was deleted", nil}},
	{errUserExists, apiError{http.StatusConflict, "user_exists",
		"another user has this username or email", nil}},
	{errChanged, apiError{http.StatusPreconditionFailed, "changed_meanwhile",
		"the link is another version than If-Match names", nil}},
	{errBeyond, apiError{http.StatusBadRequest, "invalid_request", "some fields are wrong",
		map[string]string{"page": "begins further back than pages reach: follow the Link header"}}},
	{errUnavailable, apiError{http.StatusServiceUnavailable, "unavailable",
		"the database cannot answer now, try again", nil}},
	{errOverloaded, apiError{http.StatusServiceUnavailable, "overloaded",
		"too many requests at once, try again", nil}},
}

// asAPIError finds what the client is told of err.
func asAPIError(err error) *apiError {
	if api, ok := errors.AsType[*apiError](err); ok {
		return api
	}
	for i := range failures {
		if errors.Is(err, failures[i].err) {
			return &failures[i].api
		}
	}
	return &apiError{
		status:  http.StatusInternalServerError,
		Code:    "internal",
		Message: "something went wrong here",
	}
}

// fail answers with an error, a browser with a page, and keeps its cause for the log line.
func (s *Server) fail(w http.ResponseWriter, err error) {
	a := w.(*answer)
	a.err = err
	page := takesPages(a.request)
	api := asAPIError(err)
	h := w.Header()
	h["Vary"] = varyAccept
	switch {
	case api.status == http.StatusServiceUnavailable:
		h.Set("Retry-After", "1")
	case api.status == http.StatusUnauthorized && page:
		h.Set("WWW-Authenticate", `Basic realm="hop", charset="UTF-8"`)
	case api.status == http.StatusUnauthorized:
		h.Set("WWW-Authenticate", `Bearer realm="hop"`)
	}
	if page && s.writeErrorPage(w, a.request, api) == nil {
		return
	}
	writeJSON(w, api.status, api)
}

// writeErrorPage answers a browser with an error. It fails before anything is sent, or not at all.
func (s *Server) writeErrorPage(w http.ResponseWriter, r *http.Request, api *apiError) error {
	page := newErrorPage(s.cfg, api.status, api.Code, api.Message, api.Fields)
	mayPass := api.status == http.StatusUnauthorized || api.status == http.StatusServiceUnavailable
	page.Retry = mayPass && r.Method == http.MethodGet
	return writePage(w, api.status, "error", page)
}

// varyAccept tells caches that browsers get another answer to the same request.
var varyAccept = []string{"Accept"}

// writeJSON answers with v.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	var text bytes.Buffer
	writeJSONText(&text, v)
	text.WriteByte('\n')
	return sendJSON(w, status, text.Bytes())
}

// askAgain keeps caches from answering for hop, also with a 404 of before a link was made.
const askAgain = "private, no-cache"

// sendJSON answers with what is JSON already.
func sendJSON(w http.ResponseWriter, status int, text []byte) error {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", askAgain)
	shareAnswer(h)
	w.WriteHeader(status)
	w.Write(text) // an error means that the client is gone
	return nil
}

// answerRest answers what no route does: a code with more behind it than codes have, a path that
// does not exist, or a method that the path does not take.
func (s *Server) answerRest(w http.ResponseWriter, r *http.Request) {
	if allowed := s.allowedMethods(r); allowed != "" {
		w.Header().Set("Allow", allowed)
		s.fail(w, &apiError{
			status:  http.StatusMethodNotAllowed,
			Code:    "method_not_allowed",
			Message: "allowed here: " + allowed,
		})
		return
	}
	code := trimCode(strings.TrimPrefix(r.URL.Path, "/"))
	if (r.Method == http.MethodGet || r.Method == http.MethodHead) && validCode(code) {
		if err := s.redirect(w, r, code); err != nil {
			s.fail(w, err)
		}
		return
	}
	s.fail(w, errNotFound)
}

// allowedMethods lists the methods that the path of r takes, or "" if it takes none.
func (s *Server) allowedMethods(r *http.Request) string {
	var allowed []string
	other := *r
	for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} {
		other.Method = method
		if _, pattern := s.mux.Handler(&other); pattern != "/" {
			allowed = append(allowed, method)
		}
	}
	return strings.Join(allowed, ", ")
}

// ---- what surrounds every request ----

// answer is the ResponseWriter that all handlers get. It remembers what was answered. They are
// pooled: a redirect does not allocate one.
type answer struct {
	http.ResponseWriter
	request *http.Request
	start   time.Time
	status  int // 0: none yet
	bytes   int
	err     error // why it is no success

	places   *limiter // of requests being answered
	hasPlace bool
}

var answers = sync.Pool{New: func() any { return new(answer) }}

// takePlace makes the request one of those being answered, or says that they are too many. It costs
// one atomic add, 10 ns, for a bounded memory.
func (a *answer) takePlace() bool {
	if !a.hasPlace {
		a.hasPlace = a.places.enter()
	}
	return a.hasPlace
}

// Unwrap lets http.ResponseController through.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// WriteHeader notes the status.
func (a *answer) WriteHeader(status int) {
	if a.status == 0 {
		a.status = status
		a.ResponseWriter.WriteHeader(status)
	}
}

// Write counts bytes.
func (a *answer) Write(p []byte) (int, error) {
	if a.status == 0 {
		a.WriteHeader(http.StatusOK)
	}
	n, err := a.ResponseWriter.Write(p)
	a.bytes += n
	return n, err
}

// ServeHTTP is outermost, so that it sees the pattern that the mux finds. It counts, caps, guards
// against writes from other sites' pages, and logs.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a := answers.Get().(*answer)
	*a = answer{ResponseWriter: w, request: r, start: time.Now(), places: &s.inflight}
	defer s.finish(a)
	// A request that brings a body takes its place when that is read: who sends slowly keeps nobody
	// else out.
	if !bringsBody(r) && !a.takePlace() && !isHealth(r.URL.Path) {
		s.fail(a, errOverloaded)
		return
	}
	if s.draining.Load() {
		w.Header()["Connection"] = closing
	}
	if !isClean(r.URL.Path) {
		s.fail(a, errNotFound) // the mux would redirect to another path, in HTML
		return
	}
	if r.Method != http.MethodGet && !s.admit(a, r) {
		return
	}
	s.mux.ServeHTTP(a, r)
}

// bringsBody says whether a request has a body that its handler reads.
func bringsBody(r *http.Request) bool {
	switch r.Method {
	case http.MethodPost, http.MethodPut, http.MethodPatch:
		return r.Body != http.NoBody
	}
	return false
}

// admit says whether a request that may change something comes from where it may. If not, it is
// answered. Pages of other sites may do what the token allows that they were given; the password
// that a browser remembers is none of theirs.
func (s *Server) admit(a *answer, r *http.Request) bool {
	if isPreflight(r) {
		answerPreflight(a)
		return false
	}
	if s.cross.Check(r) == nil {
		return true
	}
	if s.bearsToken(r) {
		shareAnswer(a.Header())
		return true
	}
	s.fail(a, &apiError{
		status:  http.StatusForbidden,
		Code:    "cross_origin",
		Message: "browsers may not write here from another site",
	})
	return false
}

// isHealth says whether path is one that balancers ask: they are answered however busy hop is.
func isHealth(path string) bool { return path == "/health" || path == "/health/live" }

// isClean says whether path is as the mux takes it: with one slash between segments, and no dots
// for segments.
func isClean(path string) bool {
	return strings.HasPrefix(path, "/") && !strings.Contains(path, "//") &&
		!strings.Contains(path, "/./") && !strings.Contains(path, "/../") &&
		!strings.HasSuffix(path, "/.") && !strings.HasSuffix(path, "/..")
}

// statusClientGone is what a request is counted under whose client left before its answer, so that
// nobody is woken by a 5xx that nobody got. The number is nginx's.
const statusClientGone = 499

// finish ends a request: a panic becomes a 500, the request is counted, and one line is logged.
func (s *Server) finish(a *answer) {
	if p := recover(); p != nil {
		if p == http.ErrAbortHandler {
			panic(p)
		}
		s.log.Error("panic", "value", p)
		a.err = errors.New("panic")
		if a.status == 0 {
			s.fail(a, a.err)
		}
	}
	if a.status >= http.StatusInternalServerError && a.request.Context().Err() != nil {
		a.status = statusClientGone
	}
	took := time.Since(a.start)
	s.metrics.observe(a.request.Pattern, a.status, took)
	s.logRequest(a, took)
	if a.hasPlace {
		a.places.leave()
	}
	*a = answer{}
	answers.Put(a)
}

// logRequest logs one line for a request. Redirects, of which each is an event already, probes,
// 404s, of which scanners make thousands, and clients that left are logged at debug level only.
func (s *Server) logRequest(a *answer, took time.Duration) {
	level := slog.LevelInfo
	switch {
	case a.status == http.StatusFound || a.status == http.StatusNotFound ||
		a.status == statusClientGone || isHealth(a.request.URL.Path):
		level = slog.LevelDebug
	case a.status >= http.StatusInternalServerError:
		level = slog.LevelError
	}
	ctx := a.request.Context()
	if !s.log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("method", a.request.Method),
		slog.String("route", a.request.Pattern),
		slog.Int("status", a.status),
		slog.Duration("dur", took),
		slog.Int("bytes", a.bytes),
	}
	if a.status >= http.StatusInternalServerError {
		attrs = append(attrs, slog.Any("err", a.err))
	}
	s.log.LogAttrs(ctx, level, "request", attrs...)
}
