package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/csv"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
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

// What all tests stand on: real PostgreSQL and Redis, either those of DATABASE_URL and REDIS_URL
// (make test brings throw-away ones) or private ones that a test starts, stops and kills itself.

// need skips a test whose service is missing. Where CI promised the service, the test fails.
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
	u, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	admin, err := sql.Open("postgres", base)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { admin.Close() })
	name := "hop_test_" + strings.ToLower(rand.Text()[:10])
	if _, err := admin.Exec("CREATE DATABASE " + name); err != nil {
		need(t, "PostgreSQL", err)
	}
	t.Cleanup(func() {
		if _, err := admin.Exec("DROP DATABASE IF EXISTS " + name + " WITH (FORCE)"); err != nil {
			t.Logf("%s is left over: %v", name, err)
		}
	})
	u.Path = "/" + name
	return u.String()
}

// testRedis empties the Redis of REDIS_URL and returns its URL. Tests that share it must not run
// in parallel.
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

// execSQL runs a test's own statement.
func execSQL(t testing.TB, db *sql.DB, statement string, args ...any) {
	t.Helper()
	if _, err := db.Exec(statement, args...); err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
}

// scalar is the one value that a query gives.
func scalar[T any](t testing.TB, db *sql.DB, query string, args ...any) T {
	t.Helper()
	var v T
	if err := db.QueryRow(query, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return v
}

// patience is how long tests wait for what must happen, also where others have the cores. It is no
// promise: those have limits of their own.
const patience = 30 * time.Second

// eventually waits for cond, asking every few milliseconds, and fails the test after limit.
func eventually(t testing.TB, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	start := time.Now()
	for !cond() {
		if time.Since(start) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// ---- a hop inside the test process ----

// app is a whole hop inside the test process, listening on a port of its own. url has no slash at
// its end.
type app struct {
	*Server
	url  string
	logs *syncBuffer
	stop func() // ends it as a SIGTERM does, without the draining pause; the test's end calls it too
}

// syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

// Write appends p.
func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// String is all that was written.
func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// startApp runs hop in this process with the given settings ("NAME=value") and waits until it is
// ready. DATABASE_URL defaults to a new empty database; there is no Redis unless REDIS_URL is
// given. DATA_DIR defaults to a directory of the test's own.
func startApp(t testing.TB, settings ...string) *app {
	t.Helper()
	a := launchApp(t, settings...)
	eventually(t, patience, "ready", func() bool { return healthy(a.url) })
	return a
}

// launchApp is startApp without waiting.
func launchApp(t testing.TB, settings ...string) *app {
	t.Helper()
	env := map[string]string{
		"PORT":      "0",
		"BASE_URL":  "http://hop.test",
		"DATA_DIR":  t.TempDir(),
		"LOG_LEVEL": "debug",
	}
	for _, s := range settings {
		name, value, _ := strings.Cut(s, "=")
		env[name] = value
	}
	if env["DATABASE_URL"] == "" {
		env["DATABASE_URL"] = testDatabase(t)
	}
	cfg, err := loadConfig(func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	logs := &syncBuffer{}
	log := slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: cfg.LogLevel}))
	ctx, cancel := context.WithCancel(context.Background())
	h, err := open(ctx, cfg, log)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	h.start(ctx)
	listening := httptest.NewServer(h.server)
	stop := sync.OnceFunc(func() {
		listening.Close()
		h.close(context.Background())
		cancel()
	})
	t.Cleanup(stop)
	return &app{Server: h.server, url: listening.URL, logs: logs, stop: stop}
}

// healthy says whether /health of the hop at url is 200.
func healthy(url string) bool {
	resp, err := client.Get(url + "/health")
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// ---- asking ----

// client does not follow redirects and keeps many connections.
var client = &http.Client{
	CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	},
	Transport: &http.Transport{MaxIdleConnsPerHost: 1000, DisableCompression: true},
	Timeout:   15 * time.Second,
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

// do sends a request. A body is sent as JSON unless a header line ("Name: value") says otherwise.
// A failed round trip fails the test.
func do(t testing.TB, method, url, body string, headers ...string) reply {
	t.Helper()
	r, err := roundTrip(method, url, body, headers...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// roundTrip is do for those who may not fail a test: other goroutines, and whoever expects errors.
func roundTrip(method, url, body string, headers ...string) (reply, error) {
	var sent io.Reader
	if body != "" {
		sent = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, url, sent)
	if err != nil {
		return reply{}, err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	resp, err := client.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return reply{}, err
	}
	return reply{resp.StatusCode, resp.Header, string(b)}, nil
}

// scrape reads /metrics: the value of every series, by its name with labels as it is written.
func scrape(t testing.TB, url string) map[string]float64 {
	t.Helper()
	series := map[string]float64{}
	for line := range strings.Lines(do(t, "GET", url+"/metrics", "").body) {
		at := strings.LastIndexByte(line, ' ')
		if at <= 0 || line[0] == '#' {
			continue
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(line[at:]), 64)
		if err != nil {
			t.Fatalf("/metrics: %q: %v", line, err)
		}
		series[line[:at]] = v
	}
	return series
}

// seedRows are the rows of a built-in CSV file such as "urls.csv", without its header.
func seedRows(t testing.TB, name string) [][]string {
	t.Helper()
	f, err := seeds.Open("seeds/" + name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	return rows[1:]
}

// ---- private services ----

// process is a server of the test's own. It is killed at the test's end.
type process struct {
	port    int
	url     string
	logFile string           // where it logs to; "" for nowhere
	command func() *exec.Cmd // makes the command, for every start anew

	cmd  *exec.Cmd     // the current one
	done chan struct{} // closed when cmd has ended
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
	cmd := p.command()
	cmd.SysProcAttr = dieWithParent(cmd.SysProcAttr)
	if p.logFile != "" {
		log, err := os.OpenFile(p.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close()
		cmd.Stderr = log
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		cmd.Wait()
		close(done)
	}()
	p.cmd = cmd
	p.done = done
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
func (p *process) signal(sig syscall.Signal) {
	p.cmd.Process.Signal(sig)
}

// kill ends the process with SIGKILL and waits until it is gone.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.done
}

// end ends the process with sig and waits until it is gone.
func (p *process) end(sig syscall.Signal) {
	p.signal(sig)
	<-p.done
}

// tree is the pids of the process and its children, the parent first.
func (p *process) tree() []int {
	pids := []int{p.cmd.Process.Pid}
	out, _ := exec.Command("pgrep", "-P", strconv.Itoa(pids[0])).Output() // an error is "none"
	for _, field := range strings.Fields(string(out)) {
		pid, err := strconv.Atoi(field)
		if err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// pause stops the process and all its children, also those that it was just starting: they are hung
// and not dead.
func (p *process) pause() {
	stopped := map[int]bool{}
	for {
		before := len(stopped)
		for _, pid := range p.tree() {
			if !stopped[pid] {
				syscall.Kill(pid, syscall.SIGSTOP)
			}
			stopped[pid] = true
		}
		if len(stopped) == before {
			return
		}
	}
}

// resume ends pause.
func (p *process) resume() {
	for _, pid := range slices.Backward(p.tree()) {
		syscall.Kill(pid, syscall.SIGCONT)
	}
}

// log is what the process has logged, over all its starts.
func (p *process) log(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(p.logFile)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// logged says whether the process has logged text.
func (p *process) logged(t testing.TB, text string) bool {
	t.Helper()
	return strings.Contains(p.log(t), text)
}

// memory is the resident memory of the process, in bytes.
func (p *process) memory(t testing.TB) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "VmRSS:")
	kb, err := strconv.ParseInt(strings.Fields(after)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kb << 10
}

// startRedis starts a private Redis and waits until it answers. More settings are arguments of
// redis-server.
func startRedis(t testing.TB, args ...string) *process {
	t.Helper()
	port := freePort(t)
	url := fmt.Sprintf("redis://127.0.0.1:%d/0", port)
	return startRedisAt(t, port, url, append([]string{"--port", strconv.Itoa(port)}, args...))
}

// startRedisTLS is startRedis for one that speaks TLS only.
func startRedisTLS(t testing.TB, c certificate) *process {
	t.Helper()
	port := freePort(t)
	url := fmt.Sprintf("rediss://127.0.0.1:%d/0", port)
	return startRedisAt(t, port, url, []string{
		"--port", "0", "--tls-port", strconv.Itoa(port), "--tls-auth-clients", "no",
		"--tls-cert-file", c.certFile, "--tls-key-file", c.keyFile,
		"--tls-ca-cert-file", c.certFile,
	})
}

// redisProgram is what startRedis starts. Others that speak its protocol can take its place.
var redisProgram = "redis-server"

// startRedisAt starts a Redis whose arguments say where it listens.
func startRedisAt(t testing.TB, port int, url string, args []string) *process {
	t.Helper()
	bin, err := exec.LookPath(redisProgram)
	if err != nil {
		need(t, redisProgram, err)
	}
	fixed := []string{
		"--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", t.TempDir(),
	}
	p := &process{port: port, url: url}
	p.command = func() *exec.Cmd {
		return exec.Command(bin, slices.Concat(fixed, args)...)
	}
	p.start(t)
	t.Cleanup(p.kill)
	p.waitRedis(t)
	return p
}

// waitRedis waits until it answers, and be it with a refusal.
func (p *process) waitRedis(t testing.TB) {
	t.Helper()
	eventually(t, patience, "Redis answers", func() bool {
		c, err := p.dialRedis()
		if err != nil {
			return false
		}
		defer c.Close()
		_, err = c.Do("PING")
		_, refused := errors.AsType[redis.Error](err)
		return err == nil || refused
	})
}

// dialRedis is a connection for a test's own commands.
func (p *process) dialRedis() (redis.Conn, error) {
	return redis.DialURL(p.url, redis.DialTLSSkipVerify(true),
		redis.DialConnectTimeout(5*time.Second), redis.DialReadTimeout(patience))
}

// redisDo sends one command to a private Redis and returns its answer.
func (p *process) redisDo(t testing.TB, command string, args ...any) any {
	t.Helper()
	c, err := p.dialRedis()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	answer, err := c.Do(command, args...)
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return answer
}

// pgBin finds a PostgreSQL binary: on PATH, else the newest where Debian or Homebrew put them.
func pgBin(t testing.TB, name string) string {
	t.Helper()
	if p, err := exec.LookPath(name); err == nil {
		return p
	}
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin/",
		"/opt/homebrew/opt/postgresql*/bin/",
		"/usr/local/opt/postgresql*/bin/",
	} {
		found, _ := filepath.Glob(pattern + name) // the patterns are good
		if len(found) > 0 {
			return slices.Max(found)
		}
	}
	need(t, name, exec.ErrNotFound)
	return ""
}

// pgAccount is who PostgreSQL's programs run as: they refuse root. Nil is the user of the tests.
func pgAccount(t testing.TB) *syscall.Credential {
	t.Helper()
	if os.Getuid() != 0 {
		return nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := osuser.Lookup(name)
		if err != nil {
			continue
		}
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		gid, err := strconv.ParseUint(u.Gid, 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	need(t, "nobody to run PostgreSQL as", os.ErrNotExist)
	return nil
}

// pgDir makes a directory that PostgreSQL may read and write, until the test's end.
func pgDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "hop-pg-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	givePostgres(t, dir)
	return dir
}

// givePostgres makes a file PostgreSQL's own.
func givePostgres(t testing.TB, name string) {
	t.Helper()
	account := pgAccount(t)
	if account == nil {
		return
	}
	if err := os.Chown(name, int(account.Uid), int(account.Gid)); err != nil {
		t.Fatal(err)
	}
}

// pgCommand is one of PostgreSQL's programs, run by whom it accepts.
func pgCommand(t testing.TB, dir, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(pgBin(t, name), args...)
	cmd.Dir = dir
	account := pgAccount(t)
	if account != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: account}
	}
	return cmd
}

// startPostgres starts a private PostgreSQL and waits until it answers. More settings are arguments
// of postgres; the user hop is its superuser.
func startPostgres(t testing.TB, args ...string) *process {
	t.Helper()
	return startPostgresFrom(t, "", args...)
}

// startPostgresFrom is startPostgres with programs from the directory bin, which ends in a slash.
func startPostgresFrom(t testing.TB, bin string, args ...string) *process {
	t.Helper()
	dir := pgDir(t)
	initdb := pgCommand(t, dir, bin+"initdb", "-D", dir+"/data", "-U", "hop", "-A", "trust", "-N",
		"--no-locale", "-E", "UTF8")
	if out, err := initdb.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v: %s", err, out)
	}
	return servePostgres(t, dir, bin, args...)
}

// startStandby starts a hot standby of a private PostgreSQL: it follows, and refuses writes.
func startStandby(t testing.TB, primary *process) *process {
	t.Helper()
	dir := pgDir(t)
	backup := pgCommand(t, dir, "pg_basebackup", "-D", dir+"/data", "-R", "-h", "127.0.0.1",
		"-p", strconv.Itoa(primary.port), "-U", "hop", "-X", "stream", "-c", "fast", "--no-sync")
	if out, err := backup.CombinedOutput(); err != nil {
		t.Fatalf("pg_basebackup: %v: %s", err, out)
	}
	return servePostgres(t, dir, "")
}

// servePostgres runs PostgreSQL, from bin, on the data of dir, until the test's end.
func servePostgres(t testing.TB, dir, bin string, args ...string) *process {
	t.Helper()
	p := &process{port: freePort(t)}
	p.url = fmt.Sprintf("postgres://hop@127.0.0.1:%d/postgres?sslmode=disable", p.port)
	fixed := []string{
		"-D", dir + "/data", "-p", strconv.Itoa(p.port), "-c", "listen_addresses=127.0.0.1",
		"-c", "unix_socket_directories=", "-c", "max_connections=200",
	}
	p.command = func() *exec.Cmd {
		return pgCommand(t, dir, bin+"postgres", slices.Concat(fixed, args)...)
	}
	p.start(t)
	t.Cleanup(func() {
		p.resume()
		p.stopPostgres()
	})
	p.waitPostgres(t)
	return p
}

// stopPostgres ends PostgreSQL as pg_ctl -m immediate does: with its children, without a
// checkpoint.
func (p *process) stopPostgres() {
	p.end(syscall.SIGQUIT)
}

// waitPostgres waits until it answers.
func (p *process) waitPostgres(t testing.TB) {
	t.Helper()
	db := openDB(t, p.url)
	defer db.Close()
	eventually(t, patience, "PostgreSQL answers", func() bool { return db.Ping() == nil })
}

// certificate is a key and a certificate for 127.0.0.1 that it signed itself, as PEM files.
type certificate struct{ certFile, keyFile string }

// newCertificate makes one that PostgreSQL and Redis may read.
func newCertificate(t testing.TB) certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "hop's tests"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := pgDir(t)
	c := certificate{certFile: dir + "/server.crt", keyFile: dir + "/server.key"}
	for _, file := range []struct {
		name, kind string
		content    []byte
	}{
		{c.certFile, "CERTIFICATE", cert},
		{c.keyFile, "PRIVATE KEY", secret},
	} {
		text := pem.EncodeToMemory(&pem.Block{Type: file.kind, Bytes: file.content})
		if err := os.WriteFile(file.name, text, 0o600); err != nil {
			t.Fatal(err)
		}
		givePostgres(t, file.name)
	}
	return c
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

// startHop starts hop as a process of its own, with settings as startApp takes them and
// DATABASE_URL required, and waits until it is ready. Its log is printed when the test fails.
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
	dir := t.TempDir()
	p := &process{port: freePort(t), logFile: dir + "/hop.log"}
	for _, s := range settings {
		given, ok := strings.CutPrefix(s, "PORT=")
		if !ok {
			continue
		}
		if p.port, err = strconv.Atoi(given); err != nil {
			t.Fatal(err)
		}
	}
	p.url = fmt.Sprintf("http://127.0.0.1:%d", p.port)
	env := append(os.Environ(), "DATABASE_URL=", "REDIS_URL=", "DATA_DIR="+dir+"/data",
		fmt.Sprintf("PORT=%d", p.port))
	env = append(env, settings...)
	p.command = func() *exec.Cmd {
		cmd := exec.Command(bin, "serve")
		cmd.Env = env
		return cmd
	}
	t.Cleanup(func() {
		if p.cmd == nil {
			return
		}
		p.kill()
		if t.Failed() {
			t.Logf("hop on %d:\n%s", p.port, digest(p.log(t)))
		}
	})
	return p
}

// digest is the end of a log: of the lines for requests the last few, of the others and of bugs
// more.
func digest(log string) string {
	const requests, others = 10, 30
	lines := strings.SplitAfter(log, "\n")
	var end []string
	kept := map[bool]int{}
	for _, line := range slices.Backward(lines) {
		isRequest := strings.Contains(line, "msg=request ") &&
			!strings.Contains(line, "status=500")
		kept[isRequest]++
		if isRequest && kept[true] > requests || kept[false] > others {
			continue
		}
		end = append(end, line)
	}
	slices.Reverse(end)
	return strings.Join(end, "")
}

// waitReady waits until /health says 200.
func (p *process) waitReady(t testing.TB) {
	t.Helper()
	eventually(t, patience, "hop is ready", func() bool { return healthy(p.url) })
}

// ---- a network that can be made sick ----

// proxy relays TCP to a server. It begins well; its methods say what it does from then on.
type proxy struct {
	addr string // host:port where it listens, always the same

	mu       sync.Mutex           // guards what follows
	upstream string               // host:port of the server
	listener net.Listener         // nil while it refuses
	conns    map[net.Conn]bool    // all that are open, both sides
	passing  chan struct{}        // closed while bytes may pass
	hung     bool                 // whether passing is open
	delay    func() time.Duration // what each packet waits
}

// startProxy starts a proxy in front of the server at upstream. It ends with the test.
func startProxy(t testing.TB, upstream string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{
		addr:     l.Addr().String(),
		upstream: upstream,
		listener: l,
		conns:    map[net.Conn]bool{},
		passing:  make(chan struct{}),
		delay:    func() time.Duration { return 0 },
	}
	close(p.passing)
	go p.accept(l)
	t.Cleanup(func() {
		p.refuse()
		p.release()
	})
	return p
}

// forward makes it well: it listens, and what was held back passes.
func (p *proxy) forward(t testing.TB) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener == nil {
		l, err := net.Listen("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		p.listener = l
		go p.accept(l)
	}
	p.delay = func() time.Duration { return 0 }
	p.releaseLocked()
}

// refuse lets nobody in: connections are refused, and those that are open are broken.
func (p *proxy) refuse() {
	p.mu.Lock()
	if p.listener != nil {
		p.listener.Close()
		p.listener = nil
	}
	p.mu.Unlock()
	p.cut()
}

// hang accepts connections and passes nothing, neither bytes nor ends: nobody answers, nobody
// refuses. forward passes on what was sent meanwhile.
func (p *proxy) hang() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.hung {
		p.passing = make(chan struct{})
		p.hung = true
	}
}

// slow lets every packet wait for as long as delay says. Many goroutines call delay.
func (p *proxy) slow(delay func() time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = delay
}

// cut breaks all open connections, once.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
}

// lead lets connections made from now on lead to another server.
func (p *proxy) lead(upstream string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.upstream = upstream
}

// release ends hang.
func (p *proxy) release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.releaseLocked()
}

// releaseLocked is release for who holds mu.
func (p *proxy) releaseLocked() {
	if p.hung {
		close(p.passing)
		p.hung = false
	}
}

// accept lets connections in until l is closed.
func (p *proxy) accept(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go p.relay(c.(*net.TCPConn))
	}
}

// relay serves one connection.
func (p *proxy) relay(near *net.TCPConn) {
	p.enter(near)
	defer p.leave(near)
	p.pass()
	p.mu.Lock()
	upstream := p.upstream
	p.mu.Unlock()
	c, err := net.Dial("tcp", upstream)
	if err != nil {
		return
	}
	far := c.(*net.TCPConn)
	p.enter(far)
	defer p.leave(far)
	var directions sync.WaitGroup
	directions.Go(func() { p.pump(far, near) })
	directions.Go(func() { p.pump(near, far) })
	directions.Wait()
}

// enter notes an open connection, for cut.
func (p *proxy) enter(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns[c] = true
}

// open is how many clients are connected.
func (p *proxy) open() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.conns) / 2 // both sides of each
}

// leave closes a connection.
func (p *proxy) leave(c net.Conn) {
	c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

// pass waits until a packet may pass.
func (p *proxy) pass() {
	p.mu.Lock()
	delay := p.delay
	p.mu.Unlock()
	time.Sleep(delay())
	p.mu.Lock()
	passing := p.passing
	p.mu.Unlock()
	<-passing
}

// pump copies one direction until it ends, and passes the end on.
func (p *proxy) pump(dst, src *net.TCPConn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		p.pass()
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				src.Close()
				return
			}
		}
		if err == io.EOF {
			dst.CloseWrite()
			return
		}
		if err != nil {
			dst.Close()
			return
		}
	}
}
