package main

import (
	"context"
	"encoding/csv"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestRun is hop's whole life: seed, serve, answer seeded links from a warm cache without asking PostgreSQL, drain, count the
// last clicks, end.
func TestRun(t *testing.T) {
	dsn, rd := testDatabase(t), startRedis(t)
	db := openDB(t, dsn)
	said := capture(t, &os.Stdout)
	if err := run(t.Context(), []string{"seed"}, settingsOf("DATABASE_URL="+dsn)); err != nil {
		t.Fatal(err)
	}
	if out := said(); !strings.HasPrefix(out, "loaded 400 users, 2000 urls, 3422 events in ") {
		t.Errorf("hop seed prints %q", out)
	}
	// alone waits until hop's connections are closed, for each reports at its end, at the latest, what it read. looked is then how
	// often anybody looked a code up in the table: all lookups of codes and nothing else go through this index.
	alone := func() {
		eventually(t, 5*time.Second, "hop's connections are closed", func() bool {
			return scalar[int](t, db, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`) == 0
		})
	}
	looked := func() int64 {
		return scalar[int64](t, db, `SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'urls_short_code_key'`)
	}
	alone()
	before := looked()

	hop := startRun(t, "DATABASE_URL="+dsn, "REDIS_URL="+rd.url, "LOG_LEVEL=info")
	eventually(t, 10*time.Second, "hop is ready", func() bool { return hop.status("/health") == 200 })
	if err := hop.askHealth(); err != nil {
		t.Errorf("hop health: %v", err)
	}
	links := seededLinks(t, 100)
	for code, url := range links {
		if r := do(t, "GET", hop.url+"/"+code, ""); r.status != 302 || r.header.Get("Location") != url {
			t.Errorf("%s leads to %d %s, want %s", code, r.status, r.header.Get("Location"), url)
		}
	}
	misses := func() string { return metric(t, hop.url, "hop_cache_misses_total") }
	if n := misses(); n != "0" {
		t.Errorf("%s of %d lookups asked PostgreSQL", n, len(links))
	}
	if status := hop.status("/unseeded"); status != 404 || misses() != "1" {
		t.Errorf("an unknown code: %d, %s misses", status, misses())
	}

	hop.cancel()
	eventually(t, time.Second, "hop drains", func() bool { return hop.status("/health") == 503 })
	if err := hop.askHealth(); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("hop health while draining: %v", err)
	}
	for code := range links { // who has not heard of it yet is still served, and told to go
		resp, err := client.Get(hop.url + "/" + code)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 302 || !resp.Close {
			t.Errorf("while draining %s: %d, Connection: close %v", code, resp.StatusCode, resp.Close)
		}
	}
	select {
	case err := <-hop.done:
		if err != nil {
			t.Errorf("run returns %v", err)
		}
	case <-time.After(drainFor + 5*time.Second):
		t.Fatal("run does not end")
	}
	if err := hop.askHealth(); err == nil {
		t.Error("hop health says yes though nobody listens")
	}
	alone()
	eventually(t, 2*time.Second, "PostgreSQL has seen the one lookup", func() bool { return looked() > before })
	if n := looked() - before; n != 1 {
		t.Errorf("PostgreSQL has looked up %d codes, want the 1 that is in no cache", n)
	}
	if n := scalar[int](t, db, `SELECT sum(click_count) FROM urls`); n != 2*len(links) {
		t.Errorf("%d clicks counted, want %d", n, 2*len(links))
	}
	logs, at := hop.logs(), 0
	for _, msg := range []string{"msg=listening", `msg="redis warm" links=`, "msg=ready", "msg=draining", "msg=stopped"} {
		i := strings.Index(logs[at:], msg)
		if i < 0 {
			t.Fatalf("%s is not logged, or not in its place:\n%s", msg, logs)
		}
		at += i
	}
	for code, url := range links {
		if strings.Contains(logs, code) || strings.Contains(logs, url) {
			t.Errorf("%s shows in the log", code)
		}
	}
}

// TestRunSeedExport is the way through files: export what is there, load it elsewhere.
func TestRunSeedExport(t *testing.T) {
	from, to, dir := testDatabase(t), testDatabase(t), filepath.Join(t.TempDir(), "out")
	said := capture(t, &os.Stdout)
	for _, step := range []struct {
		dsn  string
		args []string
	}{{from, []string{"seed"}}, {from, []string{"export", dir}}, {to, []string{"seed", dir}}, {to, []string{"seed", dir}}} {
		if err := run(t.Context(), step.args, settingsOf("DATABASE_URL="+step.dsn)); err != nil {
			t.Fatalf("%v: %v", step.args, err)
		}
	}
	if n := strings.Count(said(), "loaded 400 users, 2000 urls, 3422 events in "); n != 3 {
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
	unused := "DATABASE_URL=postgres://hop:hunter2@127.0.0.1:1/x"
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
		{"bad settings", nil, []string{"PORT=x", "DB_CONNS=0"}, "PORT must be a number from 0 to 65535\nDB_CONNS must be"},
		{"bad database", []string{"serve"}, []string{"DATABASE_URL=postgres://hop:hunter2%zz@h/x"}, "DATABASE_URL is neither"},
		{"bad database for seed", []string{"seed"}, []string{"DATABASE_URL=postgres://hop:hunter2%zz@h/x"}, "DATABASE_URL is neither"},
		{"port taken", []string{"serve"}, []string{port, unused, "DATA_DIR=" + t.TempDir()}, "(set PORT to another port)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			err := run(ctx, tt.args, settingsOf(tt.env...))
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

// TestManual asks for help in all the usual ways; it tells of every setting that loadConfig reads.
func TestManual(t *testing.T) {
	var names []string
	if _, err := loadConfig(func(name string) string { names = append(names, name); return "" }); err != nil || len(names) < 10 {
		t.Fatalf("loadConfig reads %v, %v", names, err)
	}
	for _, arg := range []string{"-h", "--help", "help", "-help"} {
		said := capture(t, &os.Stdout)
		if err := run(t.Context(), []string{arg}, settingsOf("PORT=nonsense")); err != nil {
			t.Errorf("%s: %v", arg, err)
		}
		text := said()
		for _, line := range strings.Split(text, "\n") {
			if strings.HasPrefix(line, "//") || strings.HasPrefix(line, "package") {
				t.Errorf("%s prints Go: %s", arg, line)
			}
		}
		for _, want := range append(names, "Hop is a URL shortener", "\thop seed [DIR]", "\thop export DIR", "\thop health", "SIGTERM",
			"postgres://user:password@host:port/name", "redis://host:port", "http://localhost:PORT") {
			if !strings.Contains(text, want) {
				t.Errorf("%s does not tell of %q", arg, want)
			}
		}
	}
}

// TestStartBeforePostgres starts hop with nobody at its database's address: it says so, and is ready soon after somebody is.
func TestStartBeforePostgres(t *testing.T) {
	dsn, rd := testDatabase(t), startRedis(t)
	port := freePort(t)
	cfg, err := pgConfig(Config{DatabaseURL: dsn})
	if err != nil {
		t.Fatal(err)
	}
	behind := fmt.Sprintf("%s:%d", cfg.Host, cfg.Port)
	a := launchApp(t, "DATABASE_URL="+strings.Replace(dsn, behind, fmt.Sprintf("127.0.0.1:%d", port), 1), "REDIS_URL="+rd.url)
	eventually(t, 5*time.Second, "hop says what it waits for", func() bool {
		return strings.Contains(a.logs.String(), "not ready") && strings.Contains(a.logs.String(), fmt.Sprintf("127.0.0.1:%d", port))
	})
	for _, tt := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "/health", "", 503}, {"GET", "/health/live", "", 200}, {"GET", "/abc123", "", 503}, {"GET", "/stats/abc123", "", 503},
		{"GET", "/urls", "", 503}, {"POST", "/shorten", `{"url":"https://a.example/"}`, 503}, {"DELETE", "/urls/1", "", 503},
	} {
		r := do(t, tt.method, a.url+tt.path, tt.body)
		if r.status != tt.status || (r.header.Get("Retry-After") != "") != (tt.status == 503 && tt.path != "/health") {
			t.Errorf("%s %s: %d, Retry-After %q, want %d", tt.method, tt.path, r.status, r.header.Get("Retry-After"), tt.status)
		}
	}
	relay(t, port, behind)
	eventually(t, 5*time.Second, "hop is ready", func() bool { return do(t, "GET", a.url+"/health", "").status == 200 })
	var made struct {
		Code string `json:"short_code"`
	}
	r := do(t, "POST", a.url+"/shorten", `{"url":"https://a.example/"}`)
	r.json(t, &made)
	if r.status != 201 {
		t.Fatalf("POST /shorten: %d %s", r.status, r.body)
	}
	if r := do(t, "GET", a.url+"/"+made.Code, ""); r.status != 302 {
		t.Errorf("GET /%s: %d %s", made.Code, r.status, r.body)
	}
}

// TestRequestLog reads the log as an operator does: a line per request, with its route and nothing of what people sent.
func TestRequestLog(t *testing.T) {
	for _, level := range []string{"info", "debug"} {
		t.Run(level, func(t *testing.T) {
			a := startApp(t, "LOG_LEVEL="+level)
			lines := func() (found []string) {
				for line := range strings.Lines(a.logs.String()) {
					if strings.Contains(line, "msg=request ") {
						found = append(found, line)
					}
				}
				return found
			}
			steps := []struct{ method, path, body, line string }{
				{"POST", "/shorten", `{"url":"https://sekret.example/sekret","custom_code":"sekret"}`, `level=INFO msg=request method=POST route="POST /shorten" status=201 `},
				{"GET", "/sekret", "", `level=DEBUG msg=request method=GET route="GET /{code}" status=302 `},
				{"HEAD", "/sekret", "", `level=DEBUG msg=request method=HEAD route="GET /{code}" status=302 `},
				{"GET", "/sekretx?sekret=1", "", `level=INFO msg=request method=GET route="GET /{code}" status=404 `},
				{"GET", "/stats/sekret", "", `level=INFO msg=request method=GET route="GET /stats/{code}" status=200 `},
				{"POST", "/shorten", `{"url":"sekret"}`, `level=INFO msg=request method=POST route="POST /shorten" status=400 `},
				{"GET", "/sekret/of/nobody", "", `level=INFO msg=request method=GET route=none status=404 `},
				{"DELETE", "/sekret", "", `level=INFO msg=request method=DELETE route=none status=405 `},
				{"GET", "/urls/sekret", "", `level=INFO msg=request method=GET route="GET /urls/{id}" status=404 `},
			}
			for _, s := range steps {
				n := len(lines())
				do(t, s.method, a.url+s.path, s.body)
				if level == "info" && strings.Contains(s.line, "DEBUG") {
					continue
				}
				eventually(t, time.Second, s.method+" "+s.path+" is logged", func() bool { return len(lines()) > n })
				if got := lines()[n]; !strings.Contains(got, s.line) || !strings.Contains(got, " dur=") || !strings.Contains(got, " bytes=") {
					t.Errorf("%s %s: %s want %s", s.method, s.path, got, s.line)
				}
			}
			want := len(steps)
			if level == "info" {
				want -= 2
			}
			if n := len(lines()); n != want {
				t.Errorf("%d lines for %d requests", n, want)
			}
			if level == "info" && strings.Contains(a.logs.String(), "sekret") {
				t.Errorf("what people sent shows:\n%s", a.logs)
			}
		})
	}
}

// TestConnectionsAreCapped holds two connections where two are allowed: a third is closed, and let in when one has gone.
func TestConnectionsAreCapped(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.NotFoundHandler(), ConnState: capConns(2, func(int64) {}), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	go server.Serve(listener)
	defer server.Close()
	ask := func() (net.Conn, bool) {
		c, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		n, _ := c.Read(make([]byte, 1))
		return c, n == 1
	}
	first, ok1 := ask()
	second, ok2 := ask()
	defer second.Close()
	if !ok1 || !ok2 {
		t.Fatal("the first two are not answered")
	}
	for range 3 {
		if c, ok := ask(); ok {
			t.Error("a third is answered")
			c.Close()
		}
	}
	first.Close()
	eventually(t, 5*time.Second, "a new one is answered", func() bool {
		c, ok := ask()
		c.Close()
		return ok
	})
}

// TestTuneGC sets the collector by LOCAL_CACHE, unless the operator did.
func TestTuneGC(t *testing.T) {
	restoreGC(t)
	for _, tt := range []struct {
		gogc, limit string
		percent     int
		bytes       int64
	}{{"", "", 400, memoryBase + 400_000}, {"50", "", 100, memoryBase + 400_000}, {"", "1GiB", 400, math.MaxInt64}} {
		debug.SetGCPercent(100)
		debug.SetMemoryLimit(math.MaxInt64)
		t.Setenv("GOGC", tt.gogc)
		t.Setenv("GOMEMLIMIT", tt.limit)
		tuneGC(Config{LocalCache: 1000}, 0)
		if p, b := debug.SetGCPercent(100), debug.SetMemoryLimit(-1); p != tt.percent || b != tt.bytes {
			t.Errorf("GOGC=%s GOMEMLIMIT=%s: %d %%, %d bytes; want %d %%, %d", tt.gogc, tt.limit, p, b, tt.percent, tt.bytes)
		}
	}
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
	r := &running{url: fmt.Sprintf("http://127.0.0.1:%d", port), port: fmt.Sprint("PORT=", port), done: make(chan error, 1), logs: capture(t, &os.Stderr)}
	getenv := settingsOf(append(settings, r.port, "DATA_DIR="+t.TempDir())...)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	r.cancel = cancel
	go func() { r.done <- run(ctx, []string{"serve"}, getenv); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	return r
}

// status is what GET path answers, 0 if nobody does.
func (r *running) status(path string) int {
	resp, err := client.Get(r.url + path)
	if err != nil {
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
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
	old := *stream
	*stream = f
	t.Cleanup(func() { *stream = old; f.Close() })
	return func() string {
		b, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
}

// restoreGC undoes tuneGC at the test's end.
func restoreGC(t *testing.T) {
	percent, limit := debug.SetGCPercent(100), debug.SetMemoryLimit(-1)
	t.Cleanup(func() { debug.SetGCPercent(percent); debug.SetMemoryLimit(limit) })
}

// metric is one value of /metrics.
func metric(t *testing.T, url, name string) string {
	t.Helper()
	for line := range strings.Lines(do(t, "GET", url+"/metrics", "").body) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("no metric %s", name)
	return ""
}

// seededLinks are n active links of the built-in files, by code.
func seededLinks(t *testing.T, n int) map[string]string {
	t.Helper()
	f, err := seeds.Open("seeds/urls.csv")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	links := map[string]string{}
	for _, row := range slices.Backward(rows) {
		if row[5] == "True" && len(links) < n {
			links[row[2]] = row[3]
		}
	}
	if len(links) != n {
		t.Fatalf("only %d active links", len(links))
	}
	return links
}

// relay forwards a port to an address, until the test's end.
func relay(t *testing.T, port int, to string) {
	t.Helper()
	listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				in.Close()
				continue
			}
			go func() { io.Copy(out, in); out.Close() }()
			go func() { io.Copy(in, out); in.Close() }()
		}
	}()
}
