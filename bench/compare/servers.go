package main

import (
	"bytes"
	"crypto/rand"
	"database/sql"
	"encoding/csv"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// bench is what all comparisons share: binaries, loads, and the two stores.
type bench struct {
	dir   string // scratch
	hop   string // binaries
	old   string // "" without BENCH_OLD
	admin *sql.DB
	codes []string // of links that redirect

	redirects wrkLoad
	creates   wrkLoad
	databases int // of Redis, handed out so far: hops must not share a cache
}

// newBench builds the binaries.
func newBench() *bench {
	dir, err := os.MkdirTemp("", "hop-bench-")
	must(err)
	b := &bench{dir: dir, hop: build(dir, "hop", ".")}
	if commit := os.Getenv("BENCH_OLD"); commit != "" {
		b.old = buildCommit(dir, commit)
	}
	b.admin = openDB(os.Getenv("DATABASE_URL"))
	b.codes = activeCodes("seeds/urls.csv")
	b.redirects = newLoad(dir, "redirects.lua", wrkRedirects, b.codes)
	b.creates = newLoad(dir, "creates.lua", wrkCreates, nil)
	return b
}

// close removes what the measurements left.
func (b *bench) close() { os.RemoveAll(b.dir) }

// must ends the program where it cannot go on.
func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// build builds a package of the working directory as `make build` does.
func build(dir, name, pkg string) string {
	bin := filepath.Join(dir, name)
	out, err := exec.Command("go", "build", "-trimpath", "-o", bin, pkg).CombinedOutput()
	if err != nil {
		log.Fatalf("building %s: %v: %s", pkg, err, out)
	}
	return bin
}

// buildCommit builds hop as it was at a commit.
func buildCommit(dir, commit string) string {
	tree := filepath.Join(dir, "old")
	must(os.Mkdir(tree, 0o755))
	script := fmt.Sprintf("git archive %s | tar -x -C %s && cd %s && go build -trimpath -o hop .",
		commit, tree, tree)
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		log.Fatalf("building %s: %v: %s", commit, err, out)
	}
	return filepath.Join(tree, "hop")
}

// openDB opens a database.
func openDB(dsn string) *sql.DB {
	db, err := sql.Open("postgres", dsn)
	must(err)
	must(db.Ping())
	return db
}

// activeCodes are the codes of a urls.csv that redirect.
func activeCodes(name string) (codes []string) {
	f, err := os.Open(name)
	must(err)
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	must(err)
	for _, row := range rows {
		if row[5] == "True" {
			codes = append(codes, row[2])
		}
	}
	return codes
}

// server is a process under measurement.
type server struct {
	cmd  *exec.Cmd
	addr string
	url  string
	dsn  string  // of its database
	db   *sql.DB // nil for servers without one
}

// start starts a server and waits until it answers 200 or 404 on path.
func start(bin string, env []string, path string, args ...string) *server {
	s := &server{addr: freeAddr()}
	s.url = "http://" + s.addr
	_, port, _ := net.SplitHostPort(s.addr)
	for i, arg := range args {
		args[i] = strings.ReplaceAll(arg, "PORT", port)
	}
	s.cmd = exec.Command(bin, args...)
	s.cmd.Env = append(append(os.Environ(), "PORT="+port), env...)
	s.cmd.Stderr = os.Stderr
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(s.cmd.Start())
	for range 1200 {
		resp, err := http.Get(s.url + path)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode < 500 {
				return s
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	log.Fatalf("%s does not answer", bin)
	return nil
}

// freeAddr is an address that nobody listens on now.
func freeAddr() string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	defer l.Close()
	return l.Addr().String()
}

// startFloor starts bare net/http, with what options add to it.
func (b *bench) startFloor(options ...string) *server {
	args := append([]string{"PORT", "seeds/urls.csv"}, options...)
	return start(build(b.dir, "floor", "./bench/floor"), nil, "/none", args...)
}

// startRedigo starts a server that asks Redis for each redirect.
func (b *bench) startRedigo() *server {
	bin := build(b.dir, "redigo", "./bench/redigo")
	return start(bin, nil, "/none", "PORT", "seeds/urls.csv", b.redisURL())
}

// startHop starts a hop on a new, seeded database of its own.
func (b *bench) startHop(bin string, settings ...string) *server {
	env, dsn := b.hopSettings(bin, settings...)
	s := start(bin, env, "/health", "serve")
	s.dsn = dsn
	s.db = openDB(dsn)
	return s
}

// emptyDatabase makes a database for a hop. It returns its address and its name.
func (b *bench) emptyDatabase() (database, name string) {
	name = "hop_bench_" + strings.ToLower(rand.Text()[:10])
	_, err := b.admin.Exec("CREATE DATABASE " + name)
	must(err)
	dsn, err := url.Parse(os.Getenv("DATABASE_URL"))
	must(err)
	dsn.Path = "/" + name
	return dsn.String(), name
}

// hopSettings makes a new, seeded database for a hop, and returns the hop's settings.
func (b *bench) hopSettings(bin string, settings ...string) (env []string, database string) {
	database, name := b.emptyDatabase()
	env = append([]string{
		"DATABASE_URL=" + database,
		"REDIS_URL=" + b.redisURL(),
		"DATA_DIR=" + filepath.Join(b.dir, name),
		"LOG_LEVEL=error",
		"API_TOKEN=",
	}, settings...)
	seed := exec.Command(bin, "seed")
	seed.Env = append(os.Environ(), env...)
	if out, err := seed.CombinedOutput(); err != nil {
		log.Fatalf("hop seed: %v: %s", err, out)
	}
	return env, database
}

// redisURL is a Redis database that nobody uses.
func (b *bench) redisURL() string {
	u, err := url.Parse(os.Getenv("REDIS_URL"))
	must(err)
	u.Path = "/" + strconv.Itoa(b.databases%16)
	b.databases++
	return u.String()
}

// stop ends the server.
func (s *server) stop() {
	s.cmd.Process.Signal(syscall.SIGTERM)
	s.cmd.Wait()
}

// stopAll ends all of them.
func stopAll(contenders []contender) {
	for _, c := range contenders {
		c.cmd.Process.Kill()
		c.cmd.Wait()
	}
}

// cpu is the seconds of user and system time that the server has used.
func (s *server) cpu() float64 { return processCPU(s.cmd.Process.Pid) }

// processCPU is the user and system time of a process and of its children that have ended.
func processCPU(pid int) float64 {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0 // it has ended
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+2:])) // names have blanks
	var ticks float64
	for _, field := range fields[11:15] {
		n, _ := strconv.ParseFloat(field, 64)
		ticks += n
	}
	return ticks / 100 // USER_HZ is 100 on every Linux of today
}

// storesCPU is the time that PostgreSQL, with all its processes, and Redis have used. Other servers
// of this machine are not asked for theirs.
func (b *bench) storesCPU() float64 {
	backend := scalar[int](b.admin, `SELECT pg_backend_pid()`)
	postmaster := pids("ps", "-o", "ppid=", "-p", strconv.Itoa(backend))[0]
	redis, err := url.Parse(os.Getenv("REDIS_URL"))
	must(err)
	sum := processCPU(postmaster)
	for _, pid := range pids("pgrep", "-P", strconv.Itoa(postmaster)) {
		sum += processCPU(pid)
	}
	for _, pid := range pids("pgrep", "-f", "redis-server .*:"+redis.Port()) {
		sum += processCPU(pid)
	}
	return sum
}

// pids are the process ids that a command prints.
func pids(name string, args ...string) (all []int) {
	out, _ := exec.Command(name, args...).Output() // pgrep exits with 1 when it finds none
	for _, field := range strings.Fields(string(out)) {
		pid, err := strconv.Atoi(field)
		must(err)
		all = append(all, pid)
	}
	return all
}

// rss is the server's resident memory in MB (10^6 bytes).
func (s *server) rss() float64 {
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", s.cmd.Process.Pid))
	must(err)
	pages, _ := strconv.ParseFloat(strings.Fields(string(statm))[1], 64)
	return pages * float64(os.Getpagesize()) / 1e6
}

// get is the body of an answer.
func (s *server) get(path string) string {
	resp, err := http.Get(s.url + path)
	must(err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(err)
	return string(body)
}

// metric is the value of one line of /metrics, 0 if it is not there yet.
func (s *server) metric(name string) int64 {
	for line := range strings.Lines(s.get("/metrics")) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			f, _ := strconv.ParseFloat(strings.TrimSpace(value), 64)
			return int64(f)
		}
	}
	return 0
}

// statements is how many transactions PostgreSQL has committed in the server's database, as far as
// its sessions have reported them: each does so once a second.
func (s *server) statements() int64 {
	return scalar[int64](s.db, `
		SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()`)
}

// waitIdle waits until every request is answered but the one for the metrics, and no other comes
// for a while: what a client sent before it left is answered too.
func (s *server) waitIdle() {
	const looks, pause = 5, 20 * time.Millisecond
	for idle := 0; idle < looks; time.Sleep(pause) {
		idle++
		if s.metric("hop_requests_in_flight") > 1 {
			idle = 0
		}
	}
}

// waitCounted waits until every redirect that was answered is counted in PostgreSQL.
func (s *server) waitCounted() {
	s.waitIdle()
	for s.metric("hop_clicks_pending") > 0 {
		time.Sleep(50 * time.Millisecond)
	}
}
