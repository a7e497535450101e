package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	osuser "os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/lib/pq"
)

// What all tests stand on: real PostgreSQL and Redis, either those of DATABASE_URL and REDIS_URL (make test brings throw-away
// ones) or private ones that a test starts, stops and kills itself, by pid.

// need skips a test whose service is missing; where CI promised it, the test fails.
func need(t testing.TB, what string, err error) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("%s: %v", what, err)
	}
	t.Skipf("SKIPPED, %s: %v (make test brings what is missing)", what, err)
}

// testDatabase creates an empty database of the test's own and returns its URL.
func testDatabase(t testing.TB) string {
	t.Helper()
	base := os.Getenv("DATABASE_URL")
	if base == "" {
		need(t, "no DATABASE_URL", os.ErrNotExist)
	}
	admin, err := sql.Open("postgres", base)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	name := "hop_test_" + strings.ToLower(rand.Text()[:10])
	if _, err := admin.Exec("CREATE DATABASE " + name); err != nil {
		need(t, "PostgreSQL", err)
	}
	t.Cleanup(func() {
		admin, _ := sql.Open("postgres", base)
		defer admin.Close()
		admin.Exec("DROP DATABASE IF EXISTS " + name + " WITH (FORCE)")
	})
	u, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/" + name
	return u.String()
}

// testRedis empties the Redis of REDIS_URL and returns its URL. Tests that share it must not be parallel.
func testRedis(t testing.TB) string {
	t.Helper()
	u := os.Getenv("REDIS_URL")
	if u == "" {
		need(t, "no REDIS_URL", os.ErrNotExist)
	}
	c, err := redis.DialURL(u)
	if err != nil {
		need(t, "Redis", err)
	}
	defer c.Close()
	if _, err := c.Do("FLUSHALL"); err != nil {
		t.Fatal(err)
	}
	return u
}

// openDB opens a pool for a test's own SQL.
func openDB(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	c, err := pq.NewConnector(dsn)
	if err != nil {
		t.Fatal(err)
	}
	db := sql.OpenDB(c)
	t.Cleanup(func() { db.Close() })
	return db
}

// scalar is the one value a query gives.
func scalar[T any](t testing.TB, db *sql.DB, query string, args ...any) (v T) {
	t.Helper()
	if err := db.QueryRow(query, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return v
}

// eventually waits for cond, asking every few milliseconds, and fails after limit.
func eventually(t testing.TB, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	for start := time.Now(); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Since(start) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// app is a whole hop inside the test process, listening on a port of its own. url has no slash at its end.
type app struct {
	*Server
	url  string
	logs *syncBuffer
	stop func() // ends it as a SIGTERM would, without the draining pause; called at the test's end too
}

// syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}
func (b *syncBuffer) String() string { b.mu.Lock(); defer b.mu.Unlock(); return b.b.String() }

// startApp runs hop in this process with the given settings ("NAME=value") and waits until it is ready. DATABASE_URL defaults to
// a new empty database; there is no Redis unless REDIS_URL is given. DATA_DIR defaults to a directory of the test's own.
func startApp(t testing.TB, settings ...string) *app {
	t.Helper()
	a := launchApp(t, settings...)
	eventually(t, 10*time.Second, "ready", func() bool { return a.ready.Load() })
	return a
}

// launchApp is startApp without waiting.
func launchApp(t testing.TB, settings ...string) *app {
	t.Helper()
	env := map[string]string{"PORT": "0", "BASE_URL": "http://hop.test", "DATA_DIR": t.TempDir(), "LOG_LEVEL": "debug"}
	for _, s := range settings {
		k, v, _ := strings.Cut(s, "=")
		env[k] = v
	}
	if env["DATABASE_URL"] == "" {
		env["DATABASE_URL"] = testDatabase(t)
	}
	cfg, err := loadConfig(func(k string) string { return env[k] })
	if err != nil {
		t.Fatal(err)
	}
	logs := &syncBuffer{}
	log := slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: cfg.LogLevel}))
	store, err := openStore(cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	local := newLocalTier(cfg.LocalCache)
	var tier *redisTier
	if cfg.RedisURL != "" {
		tier = openRedis(cfg.RedisURL, local, store.targets, log)
	}
	clicks := newClickLog(cfg.DataDir, cfg.ClickEvents, store.saveClicks, log)
	s := newServer(cfg, store, newCache(tier, local, store.target), clicks, log)
	ctx, cancel := context.WithCancel(context.Background())
	stopClicks, clicksDone := make(chan struct{}), make(chan struct{})
	go func() { clicks.run(stopClicks); close(clicksDone) }()
	go s.start(ctx)
	h := httptest.NewServer(s)
	a := &app{Server: s, url: h.URL, logs: logs}
	a.stop = sync.OnceFunc(func() {
		h.Close()
		close(stopClicks)
		<-clicksDone
		cancel()
		store.close()
		if tier != nil {
			tier.pool.Close()
		}
		if clicks.file != nil {
			clicks.file.close()
		}
	})
	t.Cleanup(a.stop)
	return a
}

// client does not follow redirects and keeps many connections.
var client = &http.Client{
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	Transport:     &http.Transport{MaxIdleConnsPerHost: 1000, MaxConnsPerHost: 0, DisableCompression: true},
	Timeout:       15 * time.Second,
}

// reply is an answer read whole.
type reply struct {
	status int
	header http.Header
	body   string
}

// json decodes the body into v.
func (r reply) json(t testing.TB, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(r.body), v); err != nil {
		t.Fatalf("%v in %q", err, r.body)
	}
}

// do sends a request; a body is sent as JSON unless a header line ("Name: value") says else. A failed round trip fails the test.
func do(t testing.TB, method, url, body string, headers ...string) reply {
	t.Helper()
	var reader io.Reader
	if body != "" {
		reader = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, url, reader)
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		req.Header.Set(k, v)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{resp.StatusCode, resp.Header, string(b)}
}

// ---- private services ----

// process is a server of the test's own. It is killed at the test's end.
type process struct {
	cmd  *exec.Cmd
	port int
	url  string
	args func() *exec.Cmd // makes the command again, for restart
	done chan struct{}    // closed when the current cmd has ended
}

// freePort is a TCP port that nobody listens on now.
func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// start starts the process, or starts it again on the same port and data.
func (p *process) start(t testing.TB) {
	t.Helper()
	p.cmd, p.done = p.args(), make(chan struct{})
	p.cmd.SysProcAttr = dieWithParent(p.cmd.SysProcAttr)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func(cmd *exec.Cmd, done chan struct{}) { cmd.Wait(); close(done) }(p.cmd, p.done)
}

// dieWithParent makes a child die with the test binary.
func dieWithParent(attr *syscall.SysProcAttr) *syscall.SysProcAttr {
	if attr == nil {
		attr = &syscall.SysProcAttr{}
	}
	attr.Pdeathsig = syscall.SIGKILL
	return attr
}

// signal sends sig to the process.
func (p *process) signal(sig syscall.Signal) { p.cmd.Process.Signal(sig) }

// kill ends it with SIGKILL and waits until it is gone.
func (p *process) kill() { p.signal(syscall.SIGKILL); p.signal(syscall.SIGCONT); <-p.done }

// startRedis starts a private Redis and waits until it answers. More settings are redis-server arguments.
func startRedis(t testing.TB, args ...string) *process {
	t.Helper()
	bin, err := exec.LookPath("redis-server")
	if err != nil {
		need(t, "redis-server", err)
	}
	port, dir := freePort(t), t.TempDir()
	p := &process{port: port, url: fmt.Sprintf("redis://127.0.0.1:%d/0", port)}
	p.args = func() *exec.Cmd {
		return exec.Command(bin, append([]string{"--port", strconv.Itoa(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", dir}, args...)...)
	}
	p.start(t)
	t.Cleanup(p.kill)
	p.waitRedis(t)
	return p
}

// waitRedis waits until it answers.
func (p *process) waitRedis(t testing.TB) {
	t.Helper()
	eventually(t, 10*time.Second, "redis answers", func() bool {
		c, err := redis.DialURL(p.url, redis.DialConnectTimeout(time.Second), redis.DialReadTimeout(time.Second))
		if err != nil {
			return false
		}
		defer c.Close()
		_, err = c.Do("PING")
		return err == nil
	})
}

// pgBin finds a PostgreSQL binary: on PATH, else the newest Debian or Homebrew puts elsewhere.
func pgBin(t testing.TB, name string) string {
	t.Helper()
	if p, err := exec.LookPath(name); err == nil {
		return p
	}
	for _, pattern := range []string{"/usr/lib/postgresql/*/bin/", "/opt/homebrew/opt/postgresql*/bin/", "/usr/local/opt/postgresql*/bin/"} {
		if found, _ := filepath.Glob(pattern + name); len(found) > 0 {
			return slices.Max(found)
		}
	}
	need(t, name, exec.ErrNotFound)
	return ""
}

// startPostgres starts a private PostgreSQL and waits until it answers. It refuses root, so root starts it as another user.
func startPostgres(t testing.TB) *process {
	t.Helper()
	initdb, server := pgBin(t, "initdb"), pgBin(t, "postgres")
	dir, err := os.MkdirTemp("/var/tmp", "hop-pg-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	var attr *syscall.SysProcAttr
	if os.Getuid() == 0 {
		for _, name := range []string{"postgres", "nobody"} {
			if u, err := osuser.Lookup(name); err == nil {
				uid, _ := strconv.Atoi(u.Uid)
				gid, _ := strconv.Atoi(u.Gid)
				attr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
				os.Chown(dir, uid, gid)
				break
			}
		}
	}
	as := func(bin string, args ...string) *exec.Cmd {
		cmd := exec.Command(bin, args...)
		cmd.Dir = dir
		if attr != nil {
			copied := *attr
			cmd.SysProcAttr = &copied
		}
		return cmd
	}
	if out, err := as(initdb, "-D", dir+"/data", "-U", "hop", "-A", "trust", "-N", "--no-locale", "-E", "UTF8").CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v: %s", err, out)
	}
	p := &process{port: freePort(t)}
	p.url = fmt.Sprintf("postgres://hop@127.0.0.1:%d/postgres?sslmode=disable", p.port)
	p.args = func() *exec.Cmd {
		return as(server, "-D", dir+"/data", "-p", strconv.Itoa(p.port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "max_connections=200")
	}
	p.start(t)
	t.Cleanup(func() { // SIGQUIT: immediate shutdown, which also ends its children
		p.resume(t)
		p.signal(syscall.SIGQUIT)
		<-p.done
	})
	p.waitPostgres(t)
	return p
}

// waitPostgres waits until it answers.
func (p *process) waitPostgres(t testing.TB) {
	t.Helper()
	db := openDB(t, p.url)
	defer db.Close()
	eventually(t, 30*time.Second, "postgres answers", func() bool { return db.Ping() == nil })
}

// tree is the process and its children's pids, the parent first.
func (p *process) tree() []int {
	pids := []int{p.cmd.Process.Pid}
	out, _ := exec.Command("pgrep", "-P", strconv.Itoa(pids[0])).Output()
	for _, f := range strings.Fields(string(out)) {
		pid, _ := strconv.Atoi(f)
		pids = append(pids, pid)
	}
	return pids
}

// pause stops the process and all its children: hung, not dead.
func (p *process) pause(t testing.TB) {
	for _, pid := range p.tree() {
		syscall.Kill(pid, syscall.SIGSTOP)
	}
}

// resume ends pause.
func (p *process) resume(t testing.TB) {
	for _, pid := range slices.Backward(p.tree()) {
		syscall.Kill(pid, syscall.SIGCONT)
	}
}

// hopBinary builds hop once and returns its path.
var hopBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "hop-bin-")
	if err != nil {
		return "", err
	}
	out, err := exec.Command("go", "build", "-o", dir+"/hop", ".").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return dir + "/hop", nil
})

// startHop starts hop as a process of its own, with settings as startApp takes them and DATABASE_URL required, and waits until it
// is ready. Its log goes to a file in DATA_DIR's parent and is printed when the test fails.
func startHop(t testing.TB, settings ...string) *process {
	t.Helper()
	p := prepareHop(t, settings...)
	p.start(t)
	p.waitReady(t)
	return p
}

// prepareHop is startHop without starting.
func prepareHop(t testing.TB, settings ...string) *process {
	t.Helper()
	bin, err := hopBinary()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{port: freePort(t)}
	dir := t.TempDir()
	env := append(os.Environ(), "DATABASE_URL=", "REDIS_URL=", "DATA_DIR="+dir+"/data", fmt.Sprintf("PORT=%d", p.port))
	env = append(env, settings...)
	for _, s := range settings {
		if v, ok := strings.CutPrefix(s, "PORT="); ok {
			p.port, _ = strconv.Atoi(v)
		}
	}
	p.url = fmt.Sprintf("http://127.0.0.1:%d", p.port)
	logName := dir + "/hop.log"
	p.args = func() *exec.Cmd {
		cmd := exec.Command(bin, "serve")
		cmd.Env = env
		f, err := os.OpenFile(logName, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err == nil {
			cmd.Stderr = f
		}
		return cmd
	}
	t.Cleanup(func() {
		if p.cmd != nil {
			p.kill()
		}
		if t.Failed() {
			b, _ := os.ReadFile(logName)
			t.Logf("hop on %d:\n%s", p.port, b[max(0, len(b)-8000):])
		}
	})
	return p
}

// waitReady waits until /health says 200.
func (p *process) waitReady(t testing.TB) {
	t.Helper()
	eventually(t, 15*time.Second, "hop is ready", func() bool {
		resp, err := client.Get(p.url + "/health")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
}
