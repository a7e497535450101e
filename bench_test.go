//go:build bench

package main

// The measurements of BENCHMARKS.md: hop and what it is measured against run as processes of their own, under wrk, in interleaved
// rounds, so that whatever else the machine does hits all of them. make bench and make growth run them with everything they need.
//
//	BENCH_ROUNDS   5   rounds; what is printed are medians
//	BENCH_SECONDS  6   each server's share of a round
//	BENCH_LONG     30  the run after which every click must have been counted
//	GROWTH_SIZES   10000,100000,300000,1000000
//
// Slow is not an error here, the tables say it; a wrong, lost or miscounted answer is.

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestBenchRedirects compares hop with the floor (net/http alone) and with one Redis GET per request.
func TestBenchRedirects(t *testing.T) {
	printMachine(t)
	redisURL, links := testRedis(t), activeLinks(t, "seeds/urls.csv")
	hop := buildHop(t)
	startOne := func(db int, events string) *process {
		return startBuilt(t, hop, "DATABASE_URL="+seededDatabase(t, hop), "REDIS_URL="+redisDB(t, redisURL, db), "CLICK_EVENTS="+events)
	}
	contenders := []contender{
		{"floor: net/http alone", startServer(t, buildProgram(t, "./bench/floor"), "seeds/urls.csv")},
		{"hop, CLICK_EVENTS=off", startOne(0, "off")},
		{"hop", startOne(1, "on")},
		{"redigo: a pooled GET each", startServer(t, buildProgram(t, "./bench/redigo"), "seeds/urls.csv", redisDB(t, redisURL, 2))},
	}
	for _, c := range contenders {
		checkAnswers(t, c.p.url, links)
	}
	load := redirectLoad(t, codesOf(links))
	for _, conns := range []int{64, 500} {
		results := race(t, load, conns, contenders)
		printRace(fmt.Sprintf("Redirects, %d connections, %d codes", conns, len(links)), contenders, results)
		floor, quiet, full, redigo := results[0], results[1], results[2], results[3]
		goal("events off: requests/s ÷ floor", ratio(quiet, floor, rate), ">=", 0.90)
		goal("events off: CPU ÷ floor", ratio(quiet, floor, cpu), "<=", 1.15)
		goal("events off: p99 ÷ floor", ratio(quiet, floor, p99), "<=", 1.3)
		goal("events on: requests/s ÷ floor", ratio(full, floor, rate), ">=", 0.70)
		goal("events on: p99 ÷ floor", ratio(full, floor, p99), "<=", 1.3)
		goal("events on: requests/s ÷ redigo", ratio(full, redigo, rate), ">=", 2)
	}
}

// TestBenchCounted loads hop for longer and holds it to every click: what it answered is what PostgreSQL has, to the click.
func TestBenchCounted(t *testing.T) {
	hop := buildHop(t)
	dsn, links := seededDatabase(t, hop), activeLinks(t, "seeds/urls.csv")
	db := openDB(t, dsn)
	p := startBuilt(t, hop, "DATABASE_URL="+dsn, "REDIS_URL="+testRedis(t))
	load := redirectLoad(t, codesOf(links))
	const answeredName = `hop_request_duration_seconds_count{route="GET /{code}",status="302"}`
	fmt.Printf("\n### Every click counted, %v, events on\n\n", benchTime("BENCH_LONG", 30))
	fmt.Println("| connections | requests/s | wrk saw | hop answered | counted | counted/answered | event rows | dropped rows | errors | RSS after, MB |")
	fmt.Println("|---|---|---|---|---|---|---|---|---|---|")
	for _, conns := range []int{64, 500} {
		answeredBefore := p.metric(t, answeredName)
		countedBefore := scalar[int64](t, db, `SELECT sum(click_count)::bigint FROM urls`)
		droppedBefore := p.metric(t, "hop_click_events_dropped_total")
		rowsBefore := scalar[int64](t, db, `SELECT count(*) FROM events WHERE event_type = 'click'`)
		r := load.run(t, p.url, conns, benchTime("BENCH_LONG", 30))
		eventually(t, 10*time.Second, "all answered", func() bool { // 1: the request for the metrics
			return p.metric(t, "hop_requests_in_flight") == 1
		})
		eventually(t, 30*time.Second, "flushed", func() bool { // stats count what was answered before they look, or say 503
			return do(t, "GET", p.url+"/stats/"+links[0][0], "").status == 200
		})
		answered := p.metric(t, answeredName) - answeredBefore // wrk drops what is under way at its end: hop knows better
		counted := scalar[int64](t, db, `SELECT sum(click_count)::bigint FROM urls`) - countedBefore
		rows := scalar[int64](t, db, `SELECT count(*) FROM events WHERE event_type = 'click'`) - rowsBefore
		dropped := p.metric(t, "hop_click_events_dropped_total") - droppedBefore
		fmt.Printf("| %d | %.0f | %d | %d | %d | %.6f | %d | %d | %d | %.0f |\n", conns, r.rate(), r.Requests, answered, counted,
			float64(counted)/float64(answered), rows, dropped, r.errors(), p.rss(t))
		if counted != answered {
			t.Errorf("%d connections: answered %d, counted %d", conns, answered, counted)
		}
		if r.Requests-r.Bad > answered {
			t.Errorf("%d connections: wrk has %d answers, hop says it gave %d", conns, r.Requests, answered)
		}
		if rows+dropped != counted {
			t.Errorf("%d connections: %d clicks, but %d event rows and %d dropped", conns, counted, rows, dropped)
		}
	}
	fmt.Println()
	goal("RSS after it, MB", p.rss(t), "<=", 100)
}

// TestBenchCreates compares POST /shorten with pgbench committing the same rows, both with 32 clients on one server.
func TestBenchCreates(t *testing.T) {
	const clients = 32
	hop := buildHop(t)
	dsn := seededDatabase(t, hop)
	db := openDB(t, dsn)
	p := startBuilt(t, hop, "DATABASE_URL="+dsn, "REDIS_URL="+testRedis(t))
	load := newLoad(t, wrkCreates, nil)
	script := writeFile(t, "create.sql", pgbenchCreate)
	var hopRates, pgRates, ratios, p99s []float64
	var failed int64
	for range benchNumber("BENCH_ROUNDS", 5) {
		before := scalar[int64](t, db, `SELECT count(*) FROM urls`)
		r := load.run(t, p.url+"/shorten", clients, benchTime("BENCH_SECONDS", 6))
		eventually(t, 10*time.Second, "all answered", func() bool { return p.metric(t, "hop_requests_in_flight") == 1 })
		rows := scalar[int64](t, db, `SELECT count(*) FROM urls`) - before
		if good := r.Requests - r.Bad; rows < good || rows > good+clients { // up to clients were under way when wrk left
			t.Errorf("%d answers of 201, %d rows", good, rows)
		}
		failed += r.errors()
		pg := pgbench(t, dsn, script, clients, benchTime("BENCH_SECONDS", 6))
		hopRates, pgRates, p99s = append(hopRates, r.rate()), append(pgRates, pg), append(p99s, float64(r.P99)/1000)
		ratios = append(ratios, r.rate()/pg)
	}
	fmt.Printf("\n### Creates, %d connections, medians of %d rounds\n\n", clients, len(ratios))
	fmt.Println("| POST /shorten, 201/s | p99, ms | errors | pgbench, the same INSERT, tps | ratio |")
	fmt.Println("|---|---|---|---|---|")
	fmt.Printf("| %.0f | %.1f | %d | %.0f | %.2f |\n\n", median(hopRates), median(p99s), failed, median(pgRates), median(ratios))
	goal("creates ÷ pgbench", median(ratios), ">=", 0.8)
}

// TestBenchTuning shows what default.pgo and the GC settings of tuneGC are worth: the first row is hop as it is built.
func TestBenchTuning(t *testing.T) {
	redisURL, links := testRedis(t), activeLinks(t, "seeds/urls.csv")
	hop := buildHop(t)
	startOne := func(db int, bin string, env ...string) *process {
		return startBuilt(t, bin, append(env, "DATABASE_URL="+seededDatabase(t, hop), "REDIS_URL="+redisDB(t, redisURL, db))...)
	}
	contenders := []contender{{"hop as built", startOne(0, hop)}, {"GOGC=100", startOne(1, hop, "GOGC=100")}}
	if _, err := os.Stat("default.pgo"); err == nil {
		contenders = append(contenders, contender{"-pgo=off", startOne(2, buildProgram(t, ".", "-pgo=off"))})
	} else {
		fmt.Println("\nNo default.pgo: nothing to compare -pgo=off with.")
	}
	load := redirectLoad(t, codesOf(links))
	printRace("Tuning, 64 connections", contenders, race(t, load, 64, contenders))
}

// ---- contenders ----

// contender is a server that takes part in a race.
type contender struct {
	name string
	p    *process
}

// sample is one server's share of one round.
type sample struct {
	wrkResult
	cpu, rss float64 // µs per request, user and system; MB
}

func rate(s sample) float64 { return s.rate() }
func cpu(s sample) float64  { return s.cpu }
func rss(s sample) float64  { return s.rss }
func p50(s sample) float64  { return float64(s.P50) / 1000 }
func p99(s sample) float64  { return float64(s.P99) / 1000 }

// race loads each contender in turn, in rounds that begin with another one each, and returns all samples by contender.
func race(t *testing.T, load wrkLoad, conns int, contenders []contender) [][]sample {
	t.Helper()
	results := make([][]sample, len(contenders))
	for _, c := range contenders {
		load.run(t, c.p.url, conns, time.Second) // what happens once only, such as opening 500 connections, is in no round
	}
	for round := range benchNumber("BENCH_ROUNDS", 5) {
		for i := range contenders {
			i = (i + round) % len(contenders)
			p := contenders[i].p
			before := p.cpu(t)
			s := sample{wrkResult: load.run(t, p.url, conns, benchTime("BENCH_SECONDS", 6))}
			s.cpu, s.rss = (p.cpu(t)-before)*1e6/float64(s.Requests), p.rss(t)
			results[i] = append(results[i], s)
		}
	}
	return results
}

// printRace prints a race as a table; ratios are to the first contender, taken in each round.
func printRace(title string, contenders []contender, results [][]sample) {
	fmt.Printf("\n### %s, medians of %d rounds of %v\n\n", title, len(results[0]), benchTime("BENCH_SECONDS", 6))
	fmt.Println("| server | requests/s | p50, ms | p99, ms | errors | CPU, µs/request | RSS, MB | requests/s ÷ 1st | CPU ÷ 1st | p99 ÷ 1st |")
	fmt.Println("|---|---|---|---|---|---|---|---|---|---|")
	for i, c := range contenders {
		r, errors := results[i], int64(0)
		for _, s := range r {
			errors += s.errors()
		}
		fmt.Printf("| %s | %.0f | %.2f | %.2f | %d | %.1f | %.0f | %.2f | %.2f | %.2f |\n", c.name, medianOf(r, rate), medianOf(r, p50),
			medianOf(r, p99), errors, medianOf(r, cpu), medianOf(r, rss), ratio(r, results[0], rate), ratio(r, results[0], cpu), ratio(r, results[0], p99))
	}
	fmt.Println()
}

// goal prints what issue 4 asked for and whether this run has it.
func goal(what string, got float64, op string, want float64) {
	verdict := "met"
	if op == ">=" && got < want || op == "<=" && got > want {
		verdict = "MISSED"
	}
	fmt.Printf("- %s: %.2f, wanted %s %g: %s\n", what, got, op, want, verdict)
}

// ratio is the median over rounds of what a has by what b has in the same round.
func ratio(a, b []sample, of func(sample) float64) float64 {
	all := make([]float64, len(a))
	for i := range a {
		all[i] = of(a[i]) / of(b[i])
	}
	return median(all)
}

func medianOf(samples []sample, of func(sample) float64) float64 {
	all := make([]float64, len(samples))
	for i, s := range samples {
		all[i] = of(s)
	}
	return median(all)
}

func median(all []float64) float64 {
	all = slices.Sorted(slices.Values(all))
	return (all[(len(all)-1)/2] + all[len(all)/2]) / 2
}

// buildProgram builds a package as make build does and returns the binary.
func buildProgram(t testing.TB, pkg string, flags ...string) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "program")
	args := append(append([]string{"build", "-trimpath", "-o", bin}, flags...), pkg)
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v: %s", args, err, out)
	}
	return bin
}

func buildHop(t testing.TB) string { return buildProgram(t, ".") }

// startServer starts a server that takes its port as first argument.
func startServer(t testing.TB, bin string, args ...string) *process {
	t.Helper()
	port := freePort(t)
	p := &process{port: port, url: fmt.Sprintf("http://127.0.0.1:%d", port)}
	p.args = func() *exec.Cmd {
		cmd := exec.Command(bin, append([]string{strconv.Itoa(port)}, args...)...)
		cmd.Stderr = os.Stderr
		return cmd
	}
	p.start(t)
	t.Cleanup(p.kill)
	eventually(t, 10*time.Second, bin+" listens", func() bool {
		c, err := net.Dial("tcp", p.url[len("http://"):])
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return p
}

// startBuilt is startHop with a binary of the caller's, and more patience: warming a million links takes its time.
func startBuilt(t testing.TB, bin string, settings ...string) *process {
	t.Helper()
	p := prepareHop(t, append([]string{"API_TOKEN="}, settings...)...)
	args := p.args
	p.args = func() *exec.Cmd {
		cmd := args()
		cmd.Path = bin
		return cmd
	}
	p.start(t)
	eventually(t, 2*time.Minute, "hop is ready", func() bool {
		resp, err := client.Get(p.url + "/health")
		if err == nil {
			resp.Body.Close()
		}
		return err == nil && resp.StatusCode == 200
	})
	return p
}

// cpu is the seconds of user and system time the process has used.
func (p *process) cpu(t testing.TB) float64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+2:])) // the name before it may have spaces
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100 // USER_HZ is 100 on every Linux of today
}

// rss is the process's resident memory in MB (10^6 bytes), the pages of the click journal that it has touched included.
func (p *process) rss(t testing.TB) float64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, _ := strconv.ParseFloat(strings.Fields(string(b))[1], 64)
	return pages * float64(os.Getpagesize()) / 1e6
}

// metric is the value of one line of /metrics, 0 if it is not there yet.
func (p *process) metric(t testing.TB, name string) int64 {
	t.Helper()
	for line := range strings.Lines(do(t, "GET", p.url+"/metrics", "").body) {
		if v, ok := strings.CutPrefix(line, name+" "); ok {
			f, _ := strconv.ParseFloat(strings.TrimSpace(v), 64)
			return int64(f)
		}
	}
	return 0
}

// log is what hop has logged.
func (p *process) log(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(p.cmd.Stderr.(*os.File).Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// ---- data ----

// benchNumber is a setting of a measurement from the environment.
func benchNumber(name string, def int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil && n > 0 {
		return n
	}
	return def
}

// benchTime is benchNumber in seconds.
func benchTime(name string, def int) time.Duration {
	return time.Duration(benchNumber(name, def)) * time.Second
}

// seededDatabase is a new database with the built-in seeds.
func seededDatabase(t testing.TB, bin string) string {
	t.Helper()
	dsn := testDatabase(t)
	runHop(t, bin, dsn, "seed")
	return dsn
}

// runHop runs a hop command to its end.
func runHop(t testing.TB, bin, dsn string, args ...string) {
	t.Helper()
	cmd := exec.Command(bin, args...)
	cmd.Env = append(os.Environ(), "DATABASE_URL="+dsn, "REDIS_URL=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("hop %s: %v: %s", args, err, out)
	}
}

// redisDB is database n of the server of u: hops with databases of their own must not share a cache.
func redisDB(t testing.TB, u string, n int) string {
	t.Helper()
	parsed, err := url.Parse(u)
	if err != nil {
		t.Fatal(err)
	}
	parsed.Path = "/" + strconv.Itoa(n)
	return parsed.String()
}

// activeLinks are the links of a urls.csv that redirect: code and target.
func activeLinks(t testing.TB, name string) (links [][2]string) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := csv.NewReader(f); ; {
		row, err := r.Read()
		if err == io.EOF {
			return links
		}
		if err != nil {
			t.Fatal(err)
		}
		if row[5] == "True" {
			links = append(links, [2]string{row[2], row[3]})
		}
	}
}

func codesOf(links [][2]string) (codes []string) {
	for _, l := range links {
		codes = append(codes, l[0])
	}
	return codes
}

// checkAnswers makes sure that what is fast is also right.
func checkAnswers(t testing.TB, url string, links [][2]string) {
	t.Helper()
	for _, l := range links {
		if r := do(t, "GET", url+"/"+l[0], ""); r.status != 302 || r.header.Get("Location") != l[1] || r.body != "" {
			t.Fatalf("%s/%s: %d %q %q, want 302 %q", url, l[0], r.status, r.header.Get("Location"), r.body, l[1])
		}
	}
}

// writeFile writes a file of the test's own.
func writeFile(t testing.TB, name, text string) string {
	t.Helper()
	name = filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// printMachine prints once what the figures depend on.
func printMachine(t testing.TB) {
	machineOnce.Do(func() {
		version := func(name string, args ...string) string {
			out, _ := exec.Command(name, args...).CombinedOutput() // wrk -v exits with 1
			line, _, _ := strings.Cut(string(out), "\n")
			return line
		}
		cpuinfo, _ := os.ReadFile("/proc/cpuinfo")
		model := regexp.MustCompile(`model name\s*: (.*)`).FindSubmatch(cpuinfo)
		if model == nil {
			model = [][]byte{nil, []byte(runtime.GOARCH)}
		}
		fmt.Printf("\n%s, %d × %s, %s, %s, PostgreSQL %s, Redis: %s\n", time.Now().Format(time.DateOnly), runtime.NumCPU(), model[1], runtime.Version(),
			version("wrk", "-v"), scalar[string](t, openDB(t, os.Getenv("DATABASE_URL")), `SHOW server_version`), version("redis-server", "--version"))
	})
}

var machineOnce sync.Once

// ---- wrk and pgbench ----

// wrkRedirects asks for the codes in the file LINES, one after the other; each thread begins elsewhere. The codes are not in the
// script, since LuaJIT keeps no more than 65,536 constants per function.
const wrkRedirects = `
local started = 0
setup = function(thread) thread:set("first", started); started = started + 1 end
local requests, n, at = {}, 0, 0
init = function()
  for code in io.lines(os.getenv("LINES_FILE")) do
    n = n + 1
    requests[n] = wrk.format("GET", "/" .. code)
  end
  at = math.floor(first * n / 2)
end
request = function() at = at % n + 1; return requests[at] end` + wrkDone

// wrkCreates makes links, each to a target of its own.
const wrkCreates = `
local started = 0
setup = function(thread) thread:set("first", started); started = started + 1 end
local headers, n = {["Content-Type"] = "application/json"}, 0
request = function()
  n = n + 1
  return wrk.format("POST", nil, headers, '{"url":"https://shop.example.net/bench/' .. first .. "/" .. n .. '"}')
end` + wrkDone

// pgbenchCreate is what hop's createLinks does for one link: the row, its created event, and nothing if the code is taken. The
// code is cheaper to make than hop's.
const pgbenchCreate = `WITH made AS (
  INSERT INTO urls (user_id, short_code, original_url, title, expires_at, created_at, updated_at)
  VALUES (NULL, substr(md5(random()::text), 1, 10), 'https://shop.example.net/bench/' || :client_id, NULL, NULL,
    date_trunc('second', now() AT TIME ZONE 'UTC'), date_trunc('second', now() AT TIME ZONE 'UTC'))
  ON CONFLICT (short_code) DO NOTHING
  RETURNING id, user_id, short_code, original_url, created_at
), logged AS (
  INSERT INTO events (url_id, user_id, event_type, timestamp, details)
  SELECT id, user_id, 'created', created_at, ('{"short_code":"' || short_code || '","original_url":"' || original_url || '"}')::json FROM made
)
SELECT id, created_at FROM made;
`

// wrkDone makes wrk print what it measured as one line of JSON.
const wrkDone = `
done = function(summary, latency)
  io.write(string.format('WRK {"requests":%d,"us":%d,"bad":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d,"p50":%d,"p99":%d,"max":%d}\n',
    summary.requests, summary.duration, summary.errors.status, summary.errors.connect, summary.errors.read, summary.errors.write,
    summary.errors.timeout, latency:percentile(50), latency:percentile(99), latency.max))
end`

// wrkResult is what wrk measured: times in µs, bad are answers that are neither 2xx nor 3xx.
type wrkResult struct {
	Requests, Us, Bad, Connect, Read, Write, Timeout, P50, P99, Max int64
}

func (r wrkResult) rate() float64 { return float64(r.Requests-r.Bad) / float64(r.Us) * 1e6 }

func (r wrkResult) errors() int64 { return r.Bad + r.Connect + r.Read + r.Write + r.Timeout }

// wrkLoad is a script for wrk and the file of lines it reads.
type wrkLoad struct{ script, lines string }

func newLoad(t testing.TB, script string, lines []string) wrkLoad {
	t.Helper()
	if _, err := exec.LookPath("wrk"); err != nil {
		need(t, "wrk", err)
	}
	return wrkLoad{writeFile(t, "wrk.lua", script), writeFile(t, "lines", strings.Join(lines, "\n")+"\n")}
}

func redirectLoad(t testing.TB, codes []string) wrkLoad { return newLoad(t, wrkRedirects, codes) }

// run loads url with two threads.
func (l wrkLoad) run(t testing.TB, url string, conns int, d time.Duration) (r wrkResult) {
	t.Helper()
	cmd := exec.Command("wrk", "-t2", "-c"+strconv.Itoa(conns), fmt.Sprintf("-d%ds", int(d.Seconds())), "--timeout", "5s", "-s", l.script, url)
	cmd.Env = append(os.Environ(), "LINES_FILE="+l.lines)
	cmd.SysProcAttr = dieWithParent(nil)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("wrk: %v: %s", err, out)
	}
	_, line, _ := strings.Cut(string(out), "WRK ")
	if json.Unmarshal([]byte(line), &r) != nil || r.Requests == 0 {
		t.Fatalf("wrk: %s", out)
	}
	return r
}

// pgbench runs a script and returns the transactions per second. -M prepared is its fastest mode.
func pgbench(t testing.TB, dsn, script string, clients int, d time.Duration) float64 {
	t.Helper()
	out, err := exec.Command(pgBin(t, "pgbench"), "-n", "-M", "prepared", "-c", strconv.Itoa(clients), "-j", "2", "-T", strconv.Itoa(int(d.Seconds())),
		"-f", script, dsn).CombinedOutput()
	m := regexp.MustCompile(`tps = ([0-9.]+)`).FindSubmatch(out)
	if err != nil || m == nil {
		t.Fatalf("pgbench: %v: %s", err, out)
	}
	tps, _ := strconv.ParseFloat(string(m[1]), 64)
	return tps
}

// TestBenchProfile makes default.pgo, which go build finds by its name: a CPU profile of hop answering redirects at 64 connections.
// hop has no pprof endpoint and gets none, so all of serve runs in this process. It runs only when told where to write:
//
//	WRITE_PGO=$PWD/default.pgo BENCH_SECONDS=30 scripts/with-services.sh go test -tags bench -run '^TestBenchProfile$' -v .
func TestBenchProfile(t *testing.T) {
	name := os.Getenv("WRITE_PGO")
	if name == "" {
		t.Skip("no WRITE_PGO")
	}
	port := freePort(t)
	env := map[string]string{"DATABASE_URL": seededDatabase(t, buildHop(t)), "REDIS_URL": testRedis(t), "PORT": strconv.Itoa(port),
		"DATA_DIR": t.TempDir(), "CLICK_EVENTS": os.Getenv("CLICK_EVENTS")}
	cfg, err := loadConfig(func(k string) string { return env[k] })
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- serve(ctx, cfg, slog.New(slog.NewTextHandler(io.Discard, nil))) }()
	p := &process{port: port, url: fmt.Sprintf("http://127.0.0.1:%d", port)}
	p.waitReady(t)
	load := redirectLoad(t, codesOf(activeLinks(t, "seeds/urls.csv")))
	load.run(t, p.url, 64, time.Second)
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		t.Fatal(err)
	}
	r := load.run(t, p.url, 64, benchTime("BENCH_SECONDS", 6))
	pprof.StopCPUProfile()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	fmt.Printf("%s: %.0f requests/s while profiled\n", name, r.rate())
	stop()
	if err := <-served; err != nil {
		t.Fatal(err)
	}
}
