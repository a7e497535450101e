package main

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// seededSays is how hop tells of loading its built-in files.
const seededSays = "loaded 400 users, 2000 urls, 3422 events in "

// TestRun is hop's whole life: seed, serve, answer seeded links from a warm cache without asking
// PostgreSQL, drain, count the last clicks, end.
func TestRun(t *testing.T) {
	dsn := testDatabase(t)
	rd := startRedis(t)
	db := openDB(t, dsn)
	said := capture(t, &os.Stdout)
	if err := run(t.Context(), []string{"seed"}, settingsOf("DATABASE_URL="+dsn)); err != nil {
		t.Fatal(err)
	}
	if out := said(); !strings.HasPrefix(out, seededSays) {
		t.Errorf("hop seed prints %q", out)
	}
	waitAlone(t, db)
	before := codeLookups(t, db)

	served := startRun(t, "DATABASE_URL="+dsn, "REDIS_URL="+rd.url, "LOG_LEVEL=info")
	eventually(t, patience, "hop is ready", func() bool { return healthy(served.url) })
	if err := served.askHealth(); err != nil {
		t.Errorf("hop health: %v", err)
	}
	links := seededLinks(t, 100)
	for code, target := range links {
		r := do(t, "GET", served.url+"/"+code, "")
		if r.status != 302 || r.header.Get("Location") != target {
			t.Errorf("%s leads to %d %s, want %s", code, r.status, r.header.Get("Location"), target)
		}
	}
	const misses = "hop_cache_misses_total"
	if n := scrape(t, served.url)[misses]; n != 0 {
		t.Errorf("%v of %d lookups asked PostgreSQL", n, len(links))
	}
	unknown := served.status("/unseeded")
	if n := scrape(t, served.url)[misses]; unknown != 404 || n != 1 {
		t.Errorf("an unknown code: %d, %v misses", unknown, n)
	}

	served.drain(t, links)
	if err := served.askHealth(); err == nil {
		t.Error("hop health says yes though nobody listens")
	}
	waitAlone(t, db)
	eventually(t, patience, "PostgreSQL has seen the one lookup", func() bool {
		return codeLookups(t, db) > before
	})
	if n := codeLookups(t, db) - before; n != 1 {
		t.Errorf("PostgreSQL has looked up %d codes, want the 1 that is in no cache", n)
	}
	if n := scalar[int](t, db, `SELECT sum(click_count) FROM urls`); n != 2*len(links) {
		t.Errorf("%d clicks counted, want %d", n, 2*len(links))
	}
	logs := served.logs()
	wantInOrder(t, logs, "msg=listening", "msg=ready", "msg=draining", "msg=stopped")
	for code, target := range links {
		if strings.Contains(logs, code) || strings.Contains(logs, target) {
			t.Errorf("%s shows in the log", code)
		}
	}
}

// drain ends hop as SIGTERM does. Who has not heard of it yet is still served, and told to go.
func (r *running) drain(t *testing.T, links map[string]string) {
	t.Helper()
	r.cancel()
	eventually(t, patience, "hop drains", func() bool { return r.status("/health") == 503 })
	if err := r.askHealth(); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("hop health while draining: %v", err)
	}
	for code := range links {
		resp, err := client.Get(r.url + "/" + code)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 302 || !resp.Close {
			t.Errorf("while draining %s: %d, Connection: close %v", code, resp.StatusCode, resp.Close)
		}
	}
	select {
	case err := <-r.done:
		if err != nil {
			t.Errorf("run returns %v", err)
		}
	case <-time.After(drainFor + 5*time.Second):
		t.Fatal("run does not end")
	}
}

// waitAlone waits until nobody else is connected to a database: each connection reports at its end,
// at the latest, what it read.
func waitAlone(t *testing.T, db *sql.DB) {
	t.Helper()
	eventually(t, patience, "hop's connections are closed", func() bool {
		return scalar[int](t, db, `
			SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid()`) == 0
	})
}

// wantInOrder fails the test unless text holds all parts, one after another.
func wantInOrder(t *testing.T, text string, parts ...string) {
	t.Helper()
	rest := text
	for _, part := range parts {
		_, after, found := strings.Cut(rest, part)
		if !found {
			t.Fatalf("%s is not there, or not in its place:\n%s", part, text)
		}
		rest = after
	}
}

// TestRunSeedExport is the way through files: export what is there, load it elsewhere.
func TestRunSeedExport(t *testing.T) {
	from := testDatabase(t)
	to := testDatabase(t)
	dir := filepath.Join(t.TempDir(), "out")
	said := capture(t, &os.Stdout)
	for _, step := range []struct {
		dsn  string
		args []string
	}{
		{from, []string{"seed"}},
		{from, []string{"export", dir}},
		{to, []string{"seed", dir}},
		{to, []string{"seed", dir}},
	} {
		err := run(t.Context(), step.args, settingsOf("DATABASE_URL="+step.dsn))
		if err != nil {
			t.Fatalf("%v: %v", step.args, err)
		}
	}
	for _, name := range []string{"users.csv", "urls.csv", "events.csv"} {
		file, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if mode := file.Mode().Perm(); mode != 0o600 { // addresses of people are in it
			t.Errorf("%s is exported with mode %v", name, mode)
		}
	}
	if n := strings.Count(said(), seededSays); n != 3 {
		t.Errorf("of 3 loads %d are told", n)
	}
	if err := os.WriteFile(filepath.Join(dir, "users.csv"), []byte("id\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := run(t.Context(), []string{"seed", dir}, settingsOf("DATABASE_URL="+to))
	if err == nil || !strings.HasPrefix(err.Error(), "nothing loaded: users.csv line 1") {
		t.Errorf("a bad file: %v", err)
	}
}

// TestRunRefuses is what run says no to before it touches anything.
func TestRunRefuses(t *testing.T) {
	taken, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := fmt.Sprint("PORT=", taken.Addr().(*net.TCPAddr).Port)
	const unused = "DATABASE_URL=postgres://hop:hunter2@127.0.0.1:1/x"
	const bad = "DATABASE_URL=postgres://hop:hunter2%zz@h/x"
	for _, tt := range []struct {
		name string
		args []string
		env  []string
		want string
	}{
		{"no such command", []string{"srve"}, nil, "srve : no such command, see hop -h"},
		{"case counts", []string{"Serve"}, nil, "no such command"},
		{"serve what", []string{"serve", "now"}, nil, "serve now: no such command"},
		{"health of whom", []string{"health", "8080"}, nil, "no such command"},
		{"seed two", []string{"seed", "a", "b"}, nil, "seed a b: no such command"},
		{"export where", []string{"export"}, nil, "no such command"},
		{"export twice", []string{"export", "a", "b"}, nil, "no such command"},
		{"bad settings", nil, []string{"PORT=x", "DB_CONNS=0"},
			"PORT must be a number from 0 to 65535\nDB_CONNS must be"},
		{"bad database", []string{"serve"}, []string{bad}, "DATABASE_URL"},
		{"bad database for seed", []string{"seed"}, []string{bad}, "DATABASE_URL"},
		{"port taken", []string{"serve"}, []string{port, unused, "DATA_DIR=" + t.TempDir()},
			"(set PORT to another port)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			err := run(ctx, tt.args, settingsOf(tt.env...))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error %v, want %q", err, tt.want)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%v tells the password", err)
			}
		})
	}
}

// TestManual asks for help in all the usual ways; it tells of every setting that loadConfig reads.
func TestManual(t *testing.T) {
	var names []string
	_, err := loadConfig(func(name string) string {
		names = append(names, name)
		return ""
	})
	if err != nil || len(names) < 10 {
		t.Fatalf("loadConfig reads %v, %v", names, err)
	}
	var wanted []string
	for _, name := range names {
		base, isFile := strings.CutSuffix(name, "_FILE")
		if isFile {
			name = base + " *" // the manual's mark for those that a file may hold
		}
		wanted = append(wanted, name)
	}
	wanted = append(wanted, "Hop is a URL shortener", "\thop seed [DIR]", "\thop export DIR",
		"\thop health", "SIGTERM", "postgres://user:password@host:port/name", "redis://host:port",
		"http://localhost:PORT")
	for _, arg := range []string{"-h", "--help", "help", "-help"} {
		said := capture(t, &os.Stdout)
		if err := run(t.Context(), []string{arg}, settingsOf("PORT=nonsense")); err != nil {
			t.Errorf("%s: %v", arg, err)
		}
		text := said()
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, "//") || strings.HasPrefix(line, "package") {
				t.Errorf("%s prints Go: %s", arg, line)
			}
		}
		for _, want := range wanted {
			if !strings.Contains(text, want) {
				t.Errorf("%s does not tell of %q", arg, want)
			}
		}
	}
}

// TestStartBeforePostgres starts hop with nobody at its database's address: it says so, and is
// ready soon after somebody is.
func TestStartBeforePostgres(t *testing.T) {
	dsn := testDatabase(t)
	server := hostOf(t, dsn)
	road := startProxy(t, server)
	road.refuse()
	address := strings.Replace(dsn, server, road.addr, 1)
	a := launchApp(t, "DATABASE_URL="+address, "REDIS_URL="+startRedis(t).url)
	eventually(t, patience, "hop says what it waits for", func() bool {
		logs := a.logs.String()
		return strings.Contains(logs, "not ready") && strings.Contains(logs, road.addr)
	})
	for _, r := range everyRoute() {
		answer := ask(a.url, r)
		if !answer.refused() {
			t.Errorf("%s: %d %s", r.name, answer.status, answer.body)
		}
	}
	if r := ask(a.url, readHealth); r.status != 503 {
		t.Errorf("/health %d", r.status)
	}
	if r := ask(a.url, readLive); r.status != 200 {
		t.Errorf("/health/live %d", r.status)
	}
	road.forward(t)
	eventually(t, patience, "hop is ready", func() bool { return healthy(a.url) })
	made := do(t, "POST", a.url+"/shorten", `{"url":"https://example.com/"}`)
	var link struct {
		Code string `json:"short_code"`
	}
	made.json(t, &link)
	if made.status != 201 {
		t.Fatalf("POST /shorten: %d %s", made.status, made.body)
	}
	if r := do(t, "GET", a.url+"/"+link.Code, ""); r.status != 302 {
		t.Errorf("GET /%s: %d %s", link.Code, r.status, r.body)
	}
}

// TestStopInProbe stops hop while it asks PostgreSQL whether it is well: that the question was
// given up is no reason to leave the last clicks uncounted.
func TestStopInProbe(t *testing.T) {
	dsn := startPostgres(t).url
	a := startApp(t, "DATABASE_URL="+dsn)
	made := do(t, "POST", a.url+"/shorten", `{"url":"https://example.com/"}`)
	var link struct {
		ID   int64
		Code string `json:"short_code"`
	}
	made.json(t, &link)
	const clicks = 10
	for range clicks {
		do(t, "GET", a.url+"/"+link.Code, "")
	}
	givenUp, cancel := context.WithCancel(t.Context())
	cancel()
	a.store.pg.probe(givenUp) // its error is that of the context
	if !a.store.pg.up() {
		t.Error("PostgreSQL is called lost because hop stops")
	}
	a.stop()
	n := scalar[int](t, openDB(t, dsn), `SELECT click_count FROM urls WHERE id = $1`, link.ID)
	if n != clicks {
		t.Errorf("%d of %d clicks are counted at the end:\n%s", n, clicks, a.logs)
	}
}

// hostOf is the host:port that a database URL names.
func hostOf(t *testing.T, dsn string) string {
	t.Helper()
	_, rest, _ := strings.Cut(dsn, "://")
	authority, _, _ := strings.Cut(rest, "/")
	host := authority[strings.LastIndexByte(authority, '@')+1:]
	if !strings.Contains(host, ":") {
		t.Skipf("SKIPPED: %s has no port", host)
	}
	return host
}

// TestRequestLog reads the log as an operator does: a line per request, with its route and nothing
// of what people sent. Redirects, unknown codes and probes are logged at debug only.
func TestRequestLog(t *testing.T) {
	steps := []struct {
		method, path, body string
		level              string
		route              string
		status             int
	}{
		{"POST", "/shorten", `{"url":"https://sekret.example/sekret","custom_code":"sekret"}`,
			"INFO", `"POST /shorten"`, 201},
		{"GET", "/sekret", "", "DEBUG", `"GET /{code}"`, 302},
		{"HEAD", "/sekret", "", "DEBUG", `"GET /{code}"`, 302},
		{"GET", "/sekretx?sekret=1", "", "DEBUG", `"GET /{code}"`, 404},
		{"GET", "/stats/sekret", "", "INFO", `"GET /stats/{code}"`, 200},
		{"POST", "/shorten", `{"url":"ftp://sekret"}`, "INFO", `"POST /shorten"`, 400},
		{"GET", "/sekret/of/nobody", "", "DEBUG", "/", 404},
		{"DELETE", "/sekret", "", "INFO", "/", 405},
		{"GET", "/urls/sekret", "", "DEBUG", `"GET /urls/{id}"`, 404},
		{"GET", "/health", "", "DEBUG", `"GET /health"`, 200},
		{"GET", "/health/live", "", "DEBUG", `"GET /health/live"`, 200},
	}
	for _, level := range []string{"info", "debug"} {
		t.Run(level, func(t *testing.T) {
			a := launchApp(t, "LOG_LEVEL="+level)
			eventually(t, patience, "ready", func() bool {
				return strings.Contains(a.logs.String(), "msg=ready")
			})
			want := 0
			for _, s := range steps {
				before := len(requestLines(a))
				do(t, s.method, a.url+s.path, s.body)
				if level == "info" && s.level == "DEBUG" {
					continue
				}
				want++
				eventually(t, patience, s.method+" "+s.path+" is logged", func() bool {
					return len(requestLines(a)) > before
				})
				got := requestLines(a)[before]
				line := fmt.Sprintf("level=%s msg=request method=%s route=%s status=%d ",
					s.level, s.method, s.route, s.status)
				for _, part := range []string{line, " dur=", " bytes="} {
					if !strings.Contains(got, part) {
						t.Errorf("%s %s: %s without %s", s.method, s.path, got, part)
					}
				}
			}
			if n := len(requestLines(a)); n != want {
				t.Errorf("%d lines for %d requests", n, want)
			}
			if level == "info" && strings.Contains(a.logs.String(), "sekret") {
				t.Errorf("what people sent shows:\n%s", a.logs)
			}
		})
	}
}

// TestClientGoneIsNoError leaves while PostgreSQL is kept from answering: that is no failure of
// ours, and neither the log nor the metrics call it one.
func TestClientGoneIsNoError(t *testing.T) {
	dsn := testDatabase(t)
	a := launchApp(t, "DATABASE_URL="+dsn, "LOG_LEVEL=debug")
	eventually(t, patience, "ready", func() bool {
		return strings.Contains(a.logs.String(), "msg=ready")
	})
	tx, err := openDB(t, dsn).Begin()
	if err == nil {
		_, err = tx.Exec(`LOCK TABLE urls`)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	ctx, leave := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer leave()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.url+"/nobody7", nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := http.DefaultClient.Do(req); err == nil {
		t.Fatalf("answered %d while the table is locked", resp.StatusCode)
	}
	line := `level=DEBUG msg=request method=GET route="GET /{code}" status=499 `
	eventually(t, patience, "it is logged", func() bool {
		return strings.Contains(a.logs.String(), line)
	})
	if strings.Contains(a.logs.String(), "level=ERROR") {
		t.Errorf("a client that leaves is an error:\n%s", a.logs)
	}
	counted := `hop_request_duration_seconds_count{route="GET /{code}",status="499"}`
	if n := scrape(t, a.url)[counted]; n != 1 {
		t.Errorf("%s is %v", counted, n)
	}
}

// requestLines are the lines of the log that tell of requests.
func requestLines(a *app) []string {
	var found []string
	for line := range strings.Lines(a.logs.String()) {
		if strings.Contains(line, "msg=request ") {
			found = append(found, line)
		}
	}
	return found
}

// TestConnectionsAreCapped holds two connections where two are allowed: a third is closed, and let
// in when one has gone.
func TestConnectionsAreCapped(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{
		Handler:   http.NotFoundHandler(),
		ConnState: capConns(2, new(atomic.Int64)),
		ErrorLog:  slog.NewLogLogger(slog.DiscardHandler, 0),
	}
	go server.Serve(listener)
	defer server.Close()
	// enter connects, asks, and says whether there was an answer.
	enter := func() (net.Conn, bool) {
		c, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		n, _ := c.Read(make([]byte, 1)) // an error is no answer
		return c, n == 1
	}
	first, firstIn := enter()
	second, secondIn := enter()
	defer second.Close()
	if !firstIn || !secondIn {
		t.Fatal("the first two are not answered")
	}
	for range 3 {
		c, in := enter()
		c.Close()
		if in {
			t.Error("a third is answered")
		}
	}
	first.Close()
	eventually(t, patience, "a new one is answered", func() bool {
		c, in := enter()
		c.Close()
		return in
	})
}

// TestTuneGC sets the collector by LOCAL_CACHE and open connections, unless the operator did.
func TestTuneGC(t *testing.T) {
	restoreGC(t)
	const links = 1000
	const held = 500 * connBytes
	const computed = memoryBase + links*bytesPerLink + held
	for _, tt := range []struct {
		gogc, limit string
		percent     int
		bytes       int64
	}{
		{"", "", 400, computed},
		{"50", "", 100, computed},
		{"", "1GiB", 400, math.MaxInt64},
		{"50", "1GiB", 100, math.MaxInt64},
	} {
		debug.SetGCPercent(100)
		debug.SetMemoryLimit(math.MaxInt64)
		t.Setenv("GOGC", tt.gogc)
		t.Setenv("GOMEMLIMIT", tt.limit)
		tuneGC(Config{LocalCache: links}, held)
		percent := debug.SetGCPercent(100)
		bytes := debug.SetMemoryLimit(-1)
		if percent != tt.percent || bytes != tt.bytes {
			t.Errorf("GOGC=%s GOMEMLIMIT=%s: %d %%, %d bytes; want %d %%, %d",
				tt.gogc, tt.limit, percent, bytes, tt.percent, tt.bytes)
		}
	}
}

// TestHeldMemoryIsAllowed has a client send half of a large file, and a process without a journal
// on disk: what lives for that is no reason to collect garbage without end.
func TestHeldMemoryIsAllowed(t *testing.T) {
	restoreGC(t)
	a := startApp(t, "DATA_DIR=/dev/null/none")
	const links = 1000
	const base = memoryBase + links*bytesPerLink
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		keepTuned(ctx, Config{LocalCache: links}, a.heldBytes)
		close(ended)
	}()
	defer func() {
		cancel()
		<-ended
	}()
	limit := func() int64 { return debug.SetMemoryLimit(-1) }
	eventually(t, patience, "the journal in memory is allowed for", func() bool {
		return limit() == base+journalSize
	})
	body, sender := io.Pipe()
	answered := make(chan error, 1)
	go func() {
		resp, err := client.Post(a.url+"/users/bulk", "text/csv", body)
		if err == nil {
			resp.Body.Close()
		}
		answered <- err
	}()
	io.WriteString(sender, csvHead+strings.Repeat("x", 4<<20))
	eventually(t, patience, "the half file is allowed for", func() bool {
		return limit() > base+journalSize+4<<20
	})
	sender.Close()
	if err := <-answered; err != nil {
		t.Error(err)
	}
	eventually(t, patience, "it is no more", func() bool { return limit() == base+journalSize })
}

// ---- helpers ----

// running is a hop serve inside this process.
type running struct {
	url    string
	port   string // PORT=…
	cancel func() // as a SIGTERM does
	done   chan error
	logs   func() string // what it wrote to stderr
}

// startRun runs hop serve on a free port.
func startRun(t *testing.T, settings ...string) *running {
	t.Helper()
	restoreGC(t)
	port := freePort(t)
	r := &running{
		url:  fmt.Sprintf("http://127.0.0.1:%d", port),
		port: fmt.Sprint("PORT=", port),
		done: make(chan error, 1),
		logs: capture(t, &os.Stderr),
	}
	getenv := settingsOf(append(settings, r.port, "DATA_DIR="+t.TempDir())...)
	ctx, cancel := context.WithCancel(t.Context())
	r.cancel = cancel
	ended := make(chan struct{})
	go func() {
		r.done <- run(ctx, []string{"serve"}, getenv)
		close(ended)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return r
}

// status is what GET path answers, 0 if nobody does.
func (r *running) status(path string) int {
	answer, err := roundTrip("GET", r.url+path, "")
	if err != nil {
		return 0
	}
	return answer.status
}

// askHealth is hop health.
func (r *running) askHealth() error {
	return run(context.Background(), []string{"health"}, settingsOf(r.port))
}

// capture sends a standard stream to a file until the test's end, and returns what reads it.
func capture(t *testing.T, stream **os.File) func() string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "captured")
	if err != nil {
		t.Fatal(err)
	}
	before := *stream
	*stream = f
	t.Cleanup(func() {
		*stream = before
		f.Close()
	})
	return func() string {
		b, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
}

// restoreGC gives the collector its settings back at the test's end.
func restoreGC(t *testing.T) {
	t.Helper()
	percent := debug.SetGCPercent(100)
	limit := debug.SetMemoryLimit(math.MaxInt64)
	t.Cleanup(func() {
		debug.SetGCPercent(percent)
		debug.SetMemoryLimit(limit)
	})
}

// seededLinks are n active links of the built-in files, by code.
func seededLinks(t *testing.T, n int) map[string]string {
	t.Helper()
	const code, target, active = 2, 3, 5 // columns
	links := map[string]string{}
	for _, row := range seedRows(t, "urls.csv") {
		if row[active] == "True" && len(links) < n {
			links[row[code]] = row[target]
		}
	}
	if len(links) != n {
		t.Fatalf("only %d active links", len(links))
	}
	return links
}
