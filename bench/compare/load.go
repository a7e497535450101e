package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/textproto"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// ---- closed loop: wrk ----

// wrkRedirects asks for the codes in LINES_FILE, one after the other; each thread begins elsewhere.
// The codes are not in the script: LuaJIT keeps no more than 65,536 constants per function.
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
  local url = "https://shop.example.net/bench/" .. first .. "/" .. n
  return wrk.format("POST", nil, headers, '{"url":"' .. url .. '"}')
end` + wrkDone

// wrkDone makes wrk print what it measured as one line of JSON.
const wrkDone = `
done = function(summary, latency)
  io.write(string.format('WRK {"requests":%d,"us":%d,"bad":%d,"other":%d,"p50":%d,"p99":%d}\n',
    summary.requests, summary.duration, summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end`

// wrkResult is what wrk measured: times in µs; bad are answers that are neither 2xx nor 3xx.
type wrkResult struct{ Requests, Us, Bad, Other, P50, P99 int64 }

func (r wrkResult) rate() float64 { return float64(r.Requests-r.Bad) / float64(r.Us) * 1e6 }
func (r wrkResult) errors() int64 { return r.Bad + r.Other }

// wrkLoad is a script for wrk and the file of lines that it reads.
type wrkLoad struct{ script, lines string }

// newLoad writes both files.
func newLoad(dir, name, script string, lines []string) wrkLoad {
	l := wrkLoad{filepath.Join(dir, name), filepath.Join(dir, name+".lines")}
	must(os.WriteFile(l.script, []byte(script), 0o644))
	must(os.WriteFile(l.lines, []byte(strings.Join(lines, "\n")+"\n"), 0o644))
	return l
}

// run loads url.
func (l wrkLoad) run(url string, conns int, d time.Duration) wrkResult {
	threads := min(setting("WRK_THREADS", 2), conns)
	cmd := exec.Command("wrk", fmt.Sprintf("-t%d", threads), fmt.Sprintf("-c%d", conns),
		fmt.Sprintf("-d%ds", int(d.Seconds())), "--timeout", "5s", "-s", l.script, url)
	cmd.Env = append(os.Environ(), "LINES_FILE="+l.lines)
	out, err := cmd.CombinedOutput()
	if err != nil {
		log.Fatalf("wrk: %v: %s", err, out)
	}
	var r wrkResult
	_, line, _ := strings.Cut(string(out), "WRK ")
	if json.Unmarshal([]byte(line), &r) != nil || r.Requests == 0 {
		log.Fatalf("wrk: %s", out)
	}
	return r
}

// pgbenchCreate is what hop's insertLink does: the row, its created event, and nothing if the code
// is taken. The code is cheaper to make than hop's.
const pgbenchCreate = `WITH made AS (
  INSERT INTO urls (user_id, short_code, original_url, title, expires_at, created_at, updated_at)
  VALUES (NULL, substr(md5(random()::text), 1, 10),
    'https://shop.example.net/bench/' || :client_id || '/' || md5(random()::text), NULL, NULL,
    date_trunc('second', now() AT TIME ZONE 'UTC'), date_trunc('second', now() AT TIME ZONE 'UTC'))
  ON CONFLICT (short_code) DO NOTHING
  RETURNING id, user_id, short_code, original_url, created_at
)
INSERT INTO events (url_id, user_id, event_type, timestamp, details)
SELECT id, user_id, 'created', created_at, ('{"short_code":"' || short_code ||
  '","original_url":"' || original_url || '"}')::json FROM made
RETURNING url_id, timestamp;
`

// pgbench returns how often per second that statement is committed. Prepared statements are its
// fastest mode.
func (b *bench) pgbench(dsn string, clients int, d time.Duration) float64 {
	script := filepath.Join(b.dir, "create.sql")
	must(os.WriteFile(script, []byte(pgbenchCreate), 0o644))
	bin := "pgbench"
	if found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pgbench"); len(found) > 0 {
		bin = found[len(found)-1]
	}
	out, err := exec.Command(bin, "-n", "-M", "prepared", "-c", strconv.Itoa(clients), "-j",
		strconv.Itoa(min(2, clients)), "-T", strconv.Itoa(int(d.Seconds())), "-f", script,
		dsn).CombinedOutput()
	found := regexp.MustCompile(`tps = ([0-9.]+)`).FindSubmatch(out)
	if err != nil || found == nil {
		log.Fatalf("pgbench: %v: %s", err, out)
	}
	tps, _ := strconv.ParseFloat(string(found[1]), 64)
	return tps
}

// ---- open loop ----

// latencies are in ms, counted from when a request was due.
type latencies struct {
	p50, p99, p999 float64
	failed         int
}

// openLoop asks for codes at a fixed rate, whether answers come or not, over conns connections
// that take turns. A request that has to wait for its connection has waited all the same.
func openLoop(addr string, codes []string, perSecond, conns int, d time.Duration) latencies {
	total := int(d.Seconds()) * perSecond
	interval := time.Second / time.Duration(perSecond)
	took := make([]time.Duration, total)
	begin := time.Now().Add(100 * time.Millisecond)
	var workers sync.WaitGroup
	for n := range conns {
		workers.Go(func() {
			conn, err := net.Dial("tcp", addr)
			must(err)
			defer conn.Close()
			answers := textproto.NewReader(bufio.NewReader(conn))
			for i := n; i < total; i += conns {
				due := begin.Add(time.Duration(i) * interval)
				time.Sleep(time.Until(due))
				if ask(conn, answers, addr, codes[i%len(codes)]) {
					took[i] = time.Since(due)
				} else {
					took[i] = -1
				}
			}
		})
	}
	workers.Wait()
	return summarise(took)
}

// ask sends one request and says whether its answer is a redirect.
func ask(conn net.Conn, answers *textproto.Reader, addr, code string) bool {
	_, err := fmt.Fprintf(conn, "GET /%s HTTP/1.1\r\nHost: %s\r\n\r\n", code, addr)
	must(err)
	status, err := answers.ReadLine()
	must(err)
	_, err = answers.ReadMIMEHeader()
	must(err)
	return strings.HasPrefix(status, "HTTP/1.1 302")
}

// summarise finds the percentiles. Failed requests are those below 0.
func summarise(took []time.Duration) latencies {
	slices.Sort(took)
	failed := 0
	for failed < len(took) && took[failed] < 0 {
		failed++
	}
	good := took[failed:]
	if len(good) == 0 {
		return latencies{failed: failed}
	}
	at := func(p float64) float64 {
		return float64(good[min(len(good)-1, int(p*float64(len(good))))].Microseconds()) / 1000
	}
	return latencies{p50: at(0.5), p99: at(0.99), p999: at(0.999), failed: failed}
}
