package main

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// The failure suite: what design.md's matrix promises, each promise against real processes that are stopped, killed and starved.
// `make fault` runs it at full length (3,000 requests/s over 500 connections); `go test` runs a short form of each. Every test
// prints one line of the table in RELIABILITY.md. base is the undisturbed part of the same run.

// fullLength is set by the build tag fault.
var fullLength bool

// full is one of two sizes.
func full[T any](long, short T) T {
	if fullLength {
		return long
	}
	return short
}

// noise is what the short form allows every latency on top: it runs beside other tests on small shared machines.
func noise() time.Duration { return full(0, 300*time.Millisecond) }

// verdict is one line of the table.
type verdict struct {
	t       *testing.T
	n       int
	what    string
	figures []string
	marks   []string
}

// newVerdict begins the line of test n, which is printed when the test ends.
func newVerdict(t *testing.T, n int, what string, args ...any) *verdict {
	v := &verdict{t: t, n: n, what: fmt.Sprintf(what, args...)}
	t.Cleanup(func() {
		result := "PASS"
		switch {
		case t.Failed():
			result = "FAIL"
		case t.Skipped():
			result = "SKIPPED"
		}
		columns := slices.Concat([]string{fmt.Sprintf("FAULT %02d", n), v.what}, v.figures, []string{"pass mark: " + strings.Join(v.marks, ", "), result})
		fmt.Println(strings.Join(columns, " | "))
	})
	return v
}

// figure adds a column.
func (v *verdict) figure(format string, args ...any) {
	v.figures = append(v.figures, fmt.Sprintf(format, args...))
}

// mark adds a pass mark, and fails the test when it is missed.
func (v *verdict) mark(ok bool, format string, args ...any) {
	v.t.Helper()
	mark := fmt.Sprintf(format, args...)
	if !slices.Contains(v.marks, mark) {
		v.marks = append(v.marks, mark)
	}
	if !ok {
		v.t.Errorf("missed: %s", mark)
	}
}

// below is a mark for a latency.
func (v *verdict) below(what string, got, limit time.Duration) {
	v.t.Helper()
	v.mark(got < limit+noise(), "%s < %s", what, short(limit+noise()))
}

// noneFailed is a mark for a load and its first figure.
func (v *verdict) noneFailed(f figures) {
	v.t.Helper()
	v.figure("%s", f.failures())
	v.mark(f.failed == 0 && f.n > 0, "0 failed")
}

// cells asks for what is no redirect once each, in the middle of a fault, and marks the statuses and that none takes a second.
func (v *verdict) cells(url string, create, update, stats, list, health int) {
	v.t.Helper()
	for _, c := range []struct {
		what, method, path, body string
		want                     int
	}{
		{"create", "POST", "/shorten", `{"url":"https://example.com/x"}`, create},
		{"update", "PUT", "/urls/1", `{"title":"x"}`, update},
		{"stats", "GET", "/stats/f0000", "", stats},
		{"list", "GET", "/urls?per_page=1", "", list},
		{"health", "GET", "/health", "", health},
	} {
		began := time.Now()
		r := do(v.t, c.method, url+c.path, c.body)
		if took := time.Since(began); took > time.Second+noise() || r.status != c.want || r.status == 503 && c.what != "health" && r.header.Get("Retry-After") == "" {
			v.t.Errorf("%s: %d after %s, %.200s", c.what, r.status, short(took), r.body)
		}
		if pending := strings.Contains(r.body, `"cache":"pending"`); c.what == "update" && pending != (r.status == 200) {
			v.t.Errorf("update without Redis: %s", r.body)
		}
	}
	v.mark(!v.t.Failed(), "create %d, update %d, stats %d, list %d, health %d", create, update, stats, list, health)
}

// rig is a PostgreSQL, a Redis and a hop of the test's own, with links that all caches know.
type rig struct {
	pg, redis, hop *process
	db             *sql.DB
	aims           []aim // one redirect per link
}

const rigLinks = 2000

// newRig starts all three. Link i has the code f0000 + i and the id i+1.
func newRig(t *testing.T, settings ...string) *rig {
	t.Helper()
	r := &rig{pg: startPostgres(t), redis: startRedis(t)}
	r.db = openDB(t, r.pg.url)
	if _, err := r.db.Exec(schema); err != nil {
		t.Fatal(err)
	}
	if _, err := r.db.Exec(`
		INSERT INTO urls (short_code, original_url, created_at, updated_at)
		SELECT 'f' || lpad(i::text, 4, '0'), 'https://example.com/' || i, now(), now() FROM generate_series(0, $1 - 1) AS i ORDER BY i`, rigLinks); err != nil {
		t.Fatal(err)
	}
	for i := range rigLinks {
		r.aims = append(r.aims, getAim(fmt.Sprintf("/f%04d", i), fmt.Sprintf("https://example.com/%d", i)))
	}
	r.hop = startHop(t, r.settings(settings...)...)
	return r
}

// settings are those of a hop on the rig's services.
func (r *rig) settings(more ...string) []string {
	return append([]string{"DATABASE_URL=" + r.pg.url, "REDIS_URL=" + r.redis.url, "BASE_URL=http://hop.test"}, more...)
}

// load is the usual load of redirects: 3,000 a second over 500 connections.
func (r *rig) load(t *testing.T) *load {
	t.Helper()
	l := startLoad(t, r.hop.url, full(3000, 300), full(500, 50), r.aims, redirects)
	l.during(full(time.Second, 200*time.Millisecond)) // not part of any base: the first requests warm everything
	return l
}

// base is how long a load runs undisturbed.
func base() time.Duration { return full(10*time.Second, 1500*time.Millisecond) }

// hangProcess stops p and all its children, also those it was just starting.
func hangProcess(t *testing.T, p *process) { p.pause(t); p.pause(t) }

// scrape reads /metrics: series with labels as written, and its value.
func scrape(t testing.TB, url string) map[string]float64 {
	t.Helper()
	series := map[string]float64{}
	for line := range strings.Lines(do(t, "GET", url+"/metrics", "").body) {
		if i := strings.LastIndexByte(line, ' '); i > 0 && line[0] != '#' {
			v, err := strconv.ParseFloat(strings.TrimSpace(line[i:]), 64)
			if err != nil {
				t.Fatalf("/metrics: %q: %v", line, err)
			}
			series[line[:i]] = v
		}
	}
	return series
}

// askStats makes hop flush: it answers when every click before it is counted.
func askStats(t testing.TB, url string) {
	t.Helper()
	eventually(t, 30*time.Second, "all clicks are flushed", func() bool { return do(t, "GET", url+"/stats/f0000", "").status == 200 })
}

// clicks compares what the clients know with what PostgreSQL says, link by link: clicks lost, clicks too many, and whether each
// has its event.
func (r *rig) clicks(t *testing.T, acknowledged map[int32]int64) (acked, lost, surplus, events int64) {
	t.Helper()
	rows, err := r.db.Query(`
		SELECT id - 1, click_count, (SELECT count(*) FROM events WHERE url_id = urls.id AND event_type = 'click') FROM urls WHERE id <= $1`, rigLinks)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	seen := 0
	for rows.Next() {
		var i, counted, n int64
		if err := rows.Scan(&i, &counted, &n); err != nil {
			t.Fatal(err)
		}
		want := acknowledged[int32(i)]
		seen++
		acked += want
		lost += max(0, want-counted)
		surplus += max(0, counted-want)
		events += n
	}
	if err := rows.Err(); err != nil || seen != rigLinks {
		t.Fatalf("%d of %d links: %v", seen, rigLinks, err)
	}
	return acked, lost, surplus, events
}

// sumCounts adds maps of counts.
func sumCounts(all ...map[int32]int64) map[int32]int64 {
	sum := map[int32]int64{}
	for _, one := range all {
		for k, n := range one {
			sum[k] += n
		}
	}
	return sum
}

func sumValues(m map[int]int) (sum int) {
	for _, n := range m {
		sum += n
	}
	return sum
}

// links collects what POST /shorten acknowledged. Its judge takes 201 and 503.
type links struct {
	mu     sync.Mutex
	made   map[string]string // code to target
	twice  int               // codes given out again
	denied int
}

func (m *links) judge(a aim, r answer) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.status == 503 {
		m.denied++
		return ""
	}
	var got struct {
		Code string `json:"short_code"`
		URL  string `json:"original_url"`
	}
	if err := json.Unmarshal(r.body, &got); r.status != 201 || err != nil || got.URL != a.want {
		return fmt.Sprintf("status %d, %.100s", r.status, r.body)
	}
	if m.made == nil {
		m.made = map[string]string{}
	}
	if _, ok := m.made[got.Code]; ok {
		m.twice++
	}
	m.made[got.Code] = got.URL
	return ""
}

// createAims are n distinct links to be made.
func createAims(n int) (aims []aim) {
	for i := range n {
		url := fmt.Sprintf("https://example.com/made/%d", i)
		aims = append(aims, postAim("/shorten", `{"url":"`+url+`"}`, url))
	}
	return aims
}

// missing counts the acknowledged links that PostgreSQL does not have as they were acknowledged.
func (m *links) missing(t *testing.T, db *sql.DB) (n int) {
	t.Helper()
	rows, err := db.Query(`SELECT short_code, original_url FROM urls WHERE id > $1`, rigLinks)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	stored := map[string]string{}
	for rows.Next() {
		var code, url string
		if err := rows.Scan(&code, &url); err != nil {
			t.Fatal(err)
		}
		stored[code] = url
	}
	if rows.Err() != nil {
		t.Fatal(rows.Err())
	}
	for code, url := range m.made {
		if stored[code] != url {
			n++
		}
	}
	return n
}

// crashPostgres ends PostgreSQL as pg_ctl -m immediate does, without a checkpoint, and starts it again.
func crashPostgres(t *testing.T, pg *process) {
	t.Helper()
	pg.signal(syscall.SIGQUIT)
	<-pg.done
	pg.start(t)
	pg.waitPostgres(t)
}

// logged says whether hop's log holds text.
func logged(t *testing.T, p *process, text string) bool {
	t.Helper()
	b, err := os.ReadFile(p.cmd.Stderr.(*os.File).Name())
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(b), text)
}

// ---- 1 to 3: Redis ----

func TestFault01RedisPaused(t *testing.T) {
	pause := full(10*time.Second, 3*time.Second) // longer than trustFor
	v := newVerdict(t, 1, "Redis SIGSTOP %v", pause)
	r := newRig(t)
	l := r.load(t)
	calm := l.during(base())
	from := l.now()
	r.redis.pause(t)
	l.during(pause)
	v.cells(r.hop.url, 201, 200, 200, 200, 200)
	r.redis.resume(t)
	hit := span{from, l.now()}
	eventually(t, 5*time.Second, "Redis is trusted again", func() bool { return scrape(t, r.hop.url)[`hop_breaker_open{peer="redis"}`] == 0 })
	l.during(full(5*time.Second, time.Second))
	b, d := l.figures(calm), l.figures(hit)
	v.noneFailed(l.figures(whole))
	v.figure("base p99 %s", short(b.p99))
	v.figure("during p99 %s", short(d.p99))
	v.below("p99", d.p99, max(5*b.p99, 50*time.Millisecond))
	v.mark(logged(t, r.hop, "redis lost"), "Redis was lost")
}

func TestFault02RedisKilled(t *testing.T) {
	gone := full(5*time.Second, 1500*time.Millisecond)
	v := newVerdict(t, 2, "Redis kill -9, back empty after %v", gone)
	r := newRig(t)
	l := r.load(t)
	calm := l.during(base())
	from := l.now()
	r.redis.kill()
	l.during(gone)
	r.redis.start(t)
	r.redis.waitRedis(t)
	back := time.Now()
	c, err := redis.DialURL(r.redis.url)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	eventually(t, 30*time.Second, "Redis is warm", func() bool {
		n, err := redis.Int(c.Do("DBSIZE"))
		return err == nil && n > rigLinks // all links and hop:warm
	})
	warm := time.Since(back)
	hit := span{from, l.now()}
	l.during(full(5*time.Second, time.Second))
	b, d := l.figures(calm), l.figures(hit)
	v.noneFailed(l.figures(whole))
	v.figure("base p99 %s", short(b.p99))
	v.figure("during p99 %s", short(d.p99))
	v.figure("warm after %s", short(warm))
	v.mark(warm < 5*time.Second, "re-warmed < 5 s")
}

func TestFault03RedisFlushed(t *testing.T) {
	const flushes = 3
	hot := full(rigLinks, 50) // fewer than requests between two flushes
	v := newVerdict(t, 3, "FLUSHALL ×%d under load", flushes)
	r := newRig(t)
	r.aims = r.aims[:hot]
	l := r.load(t)
	calm := l.during(base())
	before := scrape(t, r.hop.url)["hop_cache_misses_total"]
	from := l.now()
	c, err := redis.DialURL(r.redis.url)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range flushes {
		if _, err := c.Do("FLUSHALL"); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "Redis is warm", func() bool {
			n, err := redis.Int(c.Do("DBSIZE"))
			return err == nil && n >= rigLinks
		})
		l.during(full(2*time.Second, 500*time.Millisecond))
	}
	hit := span{from, l.now()}
	queries := scrape(t, r.hop.url)["hop_cache_misses_total"] - before
	l.during(full(5*time.Second, 500*time.Millisecond))
	b, d := l.figures(calm), l.figures(hit)
	v.noneFailed(l.figures(whole))
	v.figure("base p99 %s", short(b.p99))
	v.figure("during p99 %s", short(d.p99))
	v.figure("%.0f lookups asked PostgreSQL", queries)
	v.mark(queries <= float64(flushes*hot), "at most one lookup in PostgreSQL per link and FLUSHALL (%d)", flushes*hot)
}

// ---- 4 to 6: PostgreSQL ----

// timed is one request of askEvery.
type timed struct {
	began, ended time.Time
	what         string
	status       int
}

// askEvery sends requests one after another, each every few milliseconds, until stop is closed.
func askEvery(t *testing.T, wait time.Duration, stop <-chan struct{}, ask func(i int) (what string, r *http.Request)) <-chan []timed {
	out := make(chan []timed, 1)
	go func() {
		var all []timed
		defer func() { out <- all }()
		for i := 0; ; i++ {
			what, req := ask(i)
			one := timed{began: time.Now(), what: what}
			resp, err := client.Do(req)
			if err == nil {
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				one.status = resp.StatusCode
			} else {
				t.Logf("%s: %v", what, err)
			}
			one.ended = time.Now()
			all = append(all, one)
			select {
			case <-stop:
				return
			case <-time.After(wait):
			}
		}
	}()
	return out
}

// newRequest is for URLs that are always right.
func newRequest(method, url, body string) *http.Request {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		panic(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	return req
}

func TestFault04PostgresPaused(t *testing.T) {
	pause := full(10*time.Second, 3*time.Second)
	v := newVerdict(t, 4, "PostgreSQL SIGSTOP %v", pause)
	r := newRig(t)
	l := r.load(t)
	calm := l.during(base())
	from := l.now()
	hangProcess(t, r.pg)
	hungAt := time.Now()
	stop := make(chan struct{})
	var answers []<-chan []timed
	for range 4 {
		answers = append(answers, askEvery(t, 20*time.Millisecond, stop, func(i int) (string, *http.Request) {
			switch i % 3 {
			case 0:
				return "create", newRequest("POST", r.hop.url+"/shorten", `{"url":"https://example.com/x"}`)
			case 1:
				return "stats", newRequest("GET", r.hop.url+"/stats/f0001", "")
			}
			return "health", newRequest("GET", r.hop.url+"/health", "")
		}))
	}
	l.during(pause)
	v.cells(r.hop.url, 503, 503, 503, 503, 200)
	resumedAt := time.Now()
	r.pg.resume(t)
	close(stop)
	hit := span{from, l.now()}
	var worst time.Duration
	wrong, asked := map[string]int{}, 0
	for _, ch := range answers {
		for _, a := range <-ch {
			worst = max(worst, a.ended.Sub(a.began))
			asked++
			want := map[string]int{"create": 503, "stats": 503, "health": 200}[a.what]
			if a.status != want && a.ended.Before(resumedAt) {
				wrong[fmt.Sprintf("%s %d after %v", a.what, a.status, a.began.Sub(hungAt).Round(100*time.Millisecond))]++
			}
		}
	}
	eventually(t, 3*time.Second, "creates work again", func() bool {
		return do(t, "POST", r.hop.url+"/shorten", `{"url":"https://example.com/x"}`).status == 201
	})
	l.during(full(5*time.Second, time.Second))
	b, d := l.figures(calm), l.figures(hit)
	v.noneFailed(l.figures(whole))
	v.figure("base p99 %s", short(b.p99))
	v.figure("during p99 %s", short(d.p99))
	v.figure("%d creates, stats, healths, slowest %s", asked, short(worst))
	v.mark(len(wrong) == 0, "so all %d", asked)
	v.below("each", worst, time.Second)
	if len(wrong) > 0 {
		t.Errorf("wrong: %v", wrong)
	}
	askStats(t, r.hop.url)
	acked, lost, surplus, _ := r.clicks(t, l.count(302))
	v.figure("%d clicks, lost %d, surplus %d", acked, lost, surplus)
	v.mark(lost == 0 && surplus == 0, "clicks exact")
}

func TestFault05PostgresRestarted(t *testing.T) {
	const restarts = 4
	v := newVerdict(t, 5, "PostgreSQL immediate restart ×%d at 200 creates/s", restarts)
	r := newRig(t)
	var m links
	l := startLoad(t, r.hop.url, 200, 50, createAims(200*120), m.judge)
	l.during(time.Second)
	made := func() int { m.mu.Lock(); defer m.mu.Unlock(); return len(m.made) }
	var slowest time.Duration
	for range restarts {
		crashPostgres(t, r.pg)
		back, n := time.Now(), made()
		eventually(t, 10*time.Second, "creates work again", func() bool { return made() > n })
		slowest = max(slowest, time.Since(back))
		l.during(full(3*time.Second, 500*time.Millisecond))
	}
	f := l.figures(whole)
	v.figure("%s", f.failures())
	v.mark(f.failed == 0 && f.n > 0, "only 201 and 503")
	missing := m.missing(t, r.db)
	v.figure("%d made, %d refused, missing %d, twice %d", len(m.made), m.denied, missing, m.twice)
	v.figure("creates again after at most %s", short(slowest))
	v.mark(len(m.made) > 0 && missing == 0, "every 201 present")
	v.mark(m.twice == 0, "no code twice")
}

func TestFault06BothPaused(t *testing.T) {
	pause := full(5*time.Second, 3*time.Second)
	v := newVerdict(t, 6, "PostgreSQL and Redis SIGSTOP %v", pause)
	r := newRig(t)
	l := r.load(t)
	calm := l.during(base())
	from := l.now()
	r.redis.pause(t)
	hangProcess(t, r.pg)
	unknown := startLoad(t, r.hop.url, 50, 50, unknownAims(50*60), refusals)
	l.during(pause)
	v.cells(r.hop.url, 503, 503, 503, 503, 503)
	unknown.stop()
	hit := span{from, l.now()}
	r.pg.resume(t)
	r.redis.resume(t)
	eventually(t, 5*time.Second, "an unknown code is a 404 again", func() bool { return do(t, "GET", r.hop.url+"/u999999", "").status == 404 })
	l.during(full(5*time.Second, time.Second))
	b, d, u := l.figures(calm), l.figures(hit), unknown.figures(whole)
	v.noneFailed(l.figures(whole))
	v.figure("base p99 %s", short(b.p99))
	v.figure("during p99 %s, worst %s", short(d.p99), short(d.worst))
	v.figure("unknown codes: %s, worst %s", u.failures(), short(u.worst))
	v.below("p99", d.p99, 250*time.Millisecond)
	v.mark(u.failed == 0 && u.n > 0 && u.statuses[404] == 0, "unknown 503, never 404")
	v.mark(logged(t, r.hop, "postgres lost") && logged(t, r.hop, "redis lost"), "both were lost")
}

// unknownAims are n codes that nobody has.
func unknownAims(n int) (aims []aim) {
	for i := range n {
		aims = append(aims, getAim(fmt.Sprintf("/u%05d", i), ""))
	}
	return aims
}

// ---- 7 to 9: clicks ----

func TestFault07HopKilled(t *testing.T) {
	kills, rate, conns := full(15, 4), full(4000, 400), full(500, 50)
	every, pause := full(2*time.Second, time.Second), full(10*time.Second, 2500*time.Millisecond)
	v := newVerdict(t, 7, "hop kill -9 ×%d at %d clicks/s, PostgreSQL stopped %v in the middle", kills, rate, pause)
	r := newRig(t)
	l := startLoad(t, r.hop.url, rate, conns, r.aims, redirects)
	var m links
	creates := startLoad(t, r.hop.url, 20, 4, createAims(20*300), m.judge)
	var killed []time.Duration // when hop was surely dead
	var resumed sync.WaitGroup
	var alone span // hop was started while PostgreSQL was stopped
	for k := range kills {
		l.during(every)
		if k == kills/2 {
			hangProcess(t, r.pg)
			resumed.Go(func() { time.Sleep(pause); alone.to = l.now(); r.pg.resume(t) })
		}
		r.hop.kill()
		killed = append(killed, l.now())
		if k == kills/2 {
			alone.from = l.now()
		}
		r.hop.start(t)
	}
	resumed.Wait()
	r.hop.waitReady(t)
	l.during(every)
	creates.stop()
	all := l.figures(whole)
	var inFlight int64
	for _, s := range l.shots {
		if s.unanswered() && slices.ContainsFunc(killed, func(k time.Duration) bool { return s.sent < k && s.done > k-100*time.Millisecond }) {
			inFlight++
		}
	}
	for why, n := range all.whys {
		if !strings.HasPrefix(why, "refused") && !strings.HasPrefix(why, "broken") && why != "status 503" {
			t.Errorf("%d × %s", n, why)
		}
	}
	askStats(t, r.hop.url)
	acked, lost, surplus, events := r.clicks(t, l.count(302))
	missing := m.missing(t, r.db)
	v.figure("%d of %d clicks acknowledged, lost %d, surplus %d, in flight %d, events %d", acked, all.n, lost, surplus, inFlight, events)
	v.figure("%d links acknowledged, lost %d", len(m.made), missing)
	v.mark(len(m.made) > 0 && missing == 0, "links lost 0")
	v.mark(acked > 0 && lost == 0, "clicks lost 0")
	v.mark(surplus <= inFlight, "surplus ≤ in flight")
	v.mark(events == acked+surplus, "one event per click")
	served := l.figures(alone)
	v.figure("%d of %d answered by hops started while PostgreSQL was stopped", served.statuses[302], served.n)
	v.mark(served.statuses[302] > 0, "Redis alone serves known links")
}

func TestFault08PostgresCrashedInFlush(t *testing.T) {
	const crashes = 4
	v := newVerdict(t, 8, "PostgreSQL crashed ×%d during flushes", crashes)
	r := newRig(t)
	l := r.load(t)
	for k := range crashes {
		l.during(full(3*time.Second, 500*time.Millisecond))
		if k%2 == 0 { // inside the transaction, after the batch was claimed: we hold the lock it wants
			crashInLock(t, r)
		} else { // wherever it is, mostly in its INSERT or COMMIT: the backend alone dies, and takes the server with it
			crashBackend(t, r)
		}
		r.hop.waitReady(t)
	}
	l.during(full(2*time.Second, 500*time.Millisecond))
	f := l.figures(whole)
	v.noneFailed(f)
	failures := scrape(t, r.hop.url)["hop_click_flush_failures_total"]
	askStats(t, r.hop.url)
	acked, lost, surplus, events := r.clicks(t, l.count(302))
	v.figure("%d clicks, lost %d, surplus %d, events %d, %.0f flushes failed", acked, lost, surplus, events, failures)
	v.mark(acked > 0 && lost == 0 && surplus == 0 && events == acked, "counted = acknowledged")
	v.mark(failures >= crashes, "each crash failed a flush")
}

// crashInLock crashes PostgreSQL while a flush waits inside its transaction.
func crashInLock(t *testing.T, r *rig) {
	t.Helper()
	tx, err := r.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`SELECT pg_advisory_xact_lock($1)`, clickLock); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "a flush waits", func() bool {
		return scalar[bool](t, r.db, `SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)`)
	})
	crashPostgres(t, r.pg)
}

// crashBackend kills the backend of a flush under way. PostgreSQL then ends all others and recovers.
func crashBackend(t *testing.T, r *rig) {
	t.Helper()
	before := scrape(t, r.hop.url)["hop_click_flush_failures_total"]
	for end := time.Now().Add(20 * time.Second); ; {
		if time.Now().After(end) {
			t.Fatal("no flush was hit in 20 s")
		}
		var pid int
		err := r.db.QueryRow(`
			SELECT pid FROM pg_stat_activity WHERE state <> 'idle' AND pid <> pg_backend_pid()
			AND (query LIKE '%clicks_daily%' OR query LIKE '%''click''%' OR query LIKE '%AS c (id, n, last)%' OR query = 'COMMIT')`).Scan(&pid)
		if err != nil {
			continue
		}
		syscall.Kill(pid, syscall.SIGKILL)
		eventually(t, 30*time.Second, "recovery", func() bool { return r.db.Ping() == nil })
		for try := 0; try < 100 && scrape(t, r.hop.url)["hop_click_flush_failures_total"] == before; try++ {
			time.Sleep(10 * time.Millisecond) // it may have finished just before: then aim again
		}
		if scrape(t, r.hop.url)["hop_click_flush_failures_total"] > before {
			return
		}
	}
}

func TestFault09Replicas(t *testing.T) {
	const replicas = 4
	v := newVerdict(t, 9, "%d replicas flush overlapping codes", replicas)
	r := newRig(t)
	hops := []*process{r.hop}
	for range replicas - 1 {
		hops = append(hops, startHop(t, r.settings()...))
	}
	var loads []*load
	for i, hop := range hops { // each in an order of its own
		aims := slices.Concat(r.aims[i*rigLinks/replicas:], r.aims[:i*rigLinks/replicas])
		loads = append(loads, startLoad(t, hop.url, full(3000, 400)/replicas, full(500, 40)/replicas, aims, redirects))
	}
	loads[0].during(full(30*time.Second, 3*time.Second))
	var all figures
	counts := map[int32]int64{}
	for i, l := range loads {
		f := l.figures(whole)
		all.n, all.failed = all.n+f.n, all.failed+f.failed
		for k, n := range l.count(302) {
			counts[(k+int32(i*rigLinks/replicas))%rigLinks] += n
		}
	}
	v.noneFailed(all)
	var flushFailures float64
	for _, hop := range hops {
		flushFailures += scrape(t, hop.url)["hop_click_flush_failures_total"]
	}
	for _, hop := range hops { // the last flush is that of a clean exit
		hop.signal(syscall.SIGTERM)
	}
	for _, hop := range hops {
		<-hop.done
	}
	acked, lost, surplus, events := r.clicks(t, counts)
	deadlocks := scalar[int](t, r.db, `SELECT sum(deadlocks)::int FROM pg_stat_database`)
	v.figure("%d clicks, lost %d, surplus %d, events %d, deadlocks %d, %.0f flushes failed", acked, lost, surplus, events, deadlocks, flushFailures)
	v.mark(deadlocks == 0 && flushFailures == 0, "0 deadlocks")
	v.mark(acked > 0 && lost == 0 && surplus == 0 && events == acked, "sum exact")
}

// ---- 10 to 13: load ----

func TestFault10RollingRestart(t *testing.T) {
	rounds := full(3, 2)
	v := newVerdict(t, 10, "rolling restart ×%d", rounds)
	dir := t.TempDir()
	r := newRig(t, "DATA_DIR="+dir)
	l := r.load(t)
	old := r.hop
	for range rounds {
		next := prepareHop(t, r.settings("DATA_DIR="+dir, fmt.Sprintf("PORT=%d", old.port))...)
		next.start(t)
		eventually(t, 10*time.Second, "the new one is ready", func() bool { return logged(t, next, "msg=ready") })
		old.signal(syscall.SIGTERM)
		<-old.done
		if code := old.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("exit status %d", code)
		}
		old = next
	}
	if l.now() < full(10*time.Second, 0) {
		l.during(10*time.Second - l.now())
	}
	f := l.figures(whole)
	v.noneFailed(f)
	v.figure("p99 %s, worst %s", short(f.p99), short(f.worst))
	v.mark(f.n >= full(30_000, 1_000), "of at least %d", full(30_000, 1_000))
	askStats(t, old.url)
	acked, lost, surplus, _ := r.clicks(t, l.count(302))
	v.figure("%d clicks, lost %d, surplus %d", acked, lost, surplus)
	v.mark(lost == 0 && surplus == 0, "clicks exact")
}

func TestFault11TableLocked(t *testing.T) {
	hold := full(10*time.Second, 2*time.Second)
	v := newVerdict(t, 11, "urls locked %v, %d misses/s", hold, full(500, 100))
	r := newRig(t)
	l := r.load(t)
	calm := l.during(base())
	from := l.now()
	tx, err := r.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`LOCK TABLE urls IN ACCESS EXCLUSIVE MODE`); err != nil {
		t.Fatal(err)
	}
	misses := startLoad(t, r.hop.url, full(500, 100), full(500, 100), unknownAims(500*60), refusals)
	l.during(hold)
	v.cells(r.hop.url, 503, 503, 503, 503, 200)
	misses.stop()
	hit := span{from, l.now()}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 3*time.Second, "an unknown code is a 404 again", func() bool { return do(t, "GET", r.hop.url+"/u999999", "").status == 404 })
	l.during(full(5*time.Second, time.Second))
	b, d, u := l.figures(calm), l.figures(hit), misses.figures(whole)
	v.noneFailed(l.figures(whole))
	v.figure("base p99 %s", short(b.p99))
	v.figure("during p99 %s", short(d.p99))
	v.figure("misses: %s, p99 %s, worst %s", u.failures(), short(u.p99), short(u.worst))
	v.below("warm p99", d.p99, 2*b.p99)
	v.mark(u.failed == 0 && u.n > 0, "misses 503")
	v.below("within", u.worst, 600*time.Millisecond)
}

func TestFault12ColdCode(t *testing.T) {
	const requests = 500
	v := newVerdict(t, 12, "%d requests at once for one cold code", requests)
	r := newRig(t)
	for i, name := range []string{"with Redis", "without"} {
		hop := r.hop
		if i == 1 {
			hop = startHop(t, r.settings("REDIS_URL=")...)
		}
		code := fmt.Sprintf("cold%d", i)
		if _, err := r.db.Exec(`
			INSERT INTO urls (short_code, original_url, created_at, updated_at)
			VALUES ($1, 'https://example.com/cold', now(), now())`, code); err != nil {
			t.Fatal(err)
		}
		before, scans := scrape(t, hop.url)["hop_cache_misses_total"], codeLookups(t, r.db)
		l := burst(t, hop.url, requests, getAim("/"+code, "https://example.com/cold"), redirects)
		f, misses := l.figures(whole), scrape(t, hop.url)["hop_cache_misses_total"]-before
		endBackends(t, r.db)
		queries := codeLookups(t, r.db) - scans
		v.noneFailed(f)
		v.figure("%s: %d queries, slowest %s", name, queries, short(f.worst))
		v.mark(f.n == requests && queries >= 1 && queries <= 2 && misses <= 2, "%s at most 2 queries", name)
	}
}

// codeLookups is how often urls was searched by code: a redirect's query is the only one that does.
func codeLookups(t *testing.T, db *sql.DB) int {
	t.Helper()
	return scalar[int](t, db, `SELECT idx_scan::int FROM pg_stat_user_indexes WHERE indexrelname = 'urls_short_code_key'`)
}

// endBackends ends everybody's connections: PostgreSQL's counters are exact only for backends that have ended.
func endBackends(t *testing.T, db *sql.DB) {
	t.Helper()
	const others = `FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'`
	if _, err := db.Exec(`SELECT pg_terminate_backend(pid, 5000) ` + others); err != nil {
		t.Fatal(err)
	}
}

// slowClient is a connection that sends a byte now and then. It ends when the server closes it.
func slowClient(addr, head, drip string, stop <-chan struct{}) (lived time.Duration, closed bool, err error) {
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return 0, false, err
	}
	defer c.Close()
	start := time.Now()
	if _, err := io.WriteString(c, head); err != nil {
		return 0, false, err
	}
	gone := make(chan struct{})
	go func() { io.Copy(io.Discard, c); close(gone) }()
	for tick := time.NewTicker(time.Second); ; {
		select {
		case <-tick.C:
			if drip != "" {
				io.WriteString(c, drip)
			}
		case <-gone:
			return time.Since(start), true, nil
		case <-stop:
			return time.Since(start), false, nil
		}
	}
}

// processRSS is the memory of a process, in bytes.
func processRSS(t *testing.T, p *process) int64 {
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

func TestFault13SlowClients(t *testing.T) {
	slow, idle := full(2000, 400), full(10_000, 500)
	v := newVerdict(t, 13, "%d half-open slow clients, then %d idle connections", slow, idle)
	r := newRig(t)
	l := r.load(t)
	calm := l.during(base())
	memory := processRSS(t, r.hop)
	from := l.now()
	const longest = 12 * time.Second // headers may take 5 s, bodies 10 s
	stop := make(chan struct{})
	time.AfterFunc(longest, func() { close(stop) })
	var clients sync.WaitGroup
	var open, failed atomic.Int64
	var mu sync.Mutex // guards lived
	lived := map[string]time.Duration{}
	arrive := time.NewTicker(time.Millisecond) // not all at one instant: they share this process and its two cores with the load
	defer arrive.Stop()
	for i := range slow {
		<-arrive.C
		clients.Go(func() {
			kind, head, drip := "headers", "GET /f0001 HTTP/1.1\r\nHost: hop.test\r\n", "X-Slow: 1\r\n"
			if i%2 == 1 {
				kind, head, drip = "bodies", "POST /shorten HTTP/1.1\r\nHost: hop.test\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{", " "
			}
			d, closed, err := slowClient(strings.TrimPrefix(r.hop.url, "http://"), head, drip, stop)
			if err != nil {
				failed.Add(1)
			} else if !closed {
				open.Add(1)
			}
			mu.Lock()
			lived[kind] = max(lived[kind], d)
			mu.Unlock()
		})
	}
	end := make(chan struct{})
	creates := askEvery(t, 50*time.Millisecond, end, func(int) (string, *http.Request) {
		return "create", newRequest("POST", r.hop.url+"/shorten", `{"url":"https://example.com/x"}`)
	})
	var peak int64
	clientsDone := make(chan struct{})
	go func() { clients.Wait(); close(clientsDone) }()
	for ended := false; !ended; {
		peak = max(peak, processRSS(t, r.hop))
		select {
		case <-clientsDone:
			ended = true
		case <-time.After(250 * time.Millisecond):
		}
	}
	eventually(t, time.Second, "creates work again", func() bool {
		return do(t, "POST", r.hop.url+"/shorten", `{"url":"https://example.com/x"}`).status == 201
	})
	close(end)
	made := map[int]int{}
	for _, a := range <-creates {
		made[a.status]++
	}
	hit := span{from, l.now()}

	conns, addr := make([]net.Conn, 0, idle), strings.TrimPrefix(r.hop.url, "http://")
	for range idle { // each has made a request, as a browser has
		c, err := dialLoad(addr)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		if a, _, err := c.do(r.aims[0].request); err != nil || a.status != 302 {
			t.Fatalf("%d %v", a.status, err)
		}
	}
	idleFrom := l.now()
	l.during(full(5*time.Second, time.Second))
	idleSpan := span{idleFrom, l.now()}
	idlePeak := processRSS(t, r.hop)
	for _, c := range conns {
		c.Close()
	}
	b, d, i := l.figures(calm), l.figures(hit), l.figures(idleSpan)
	perConn := (idlePeak - memory) / int64(idle)
	const mb = 1 << 20
	v.noneFailed(l.figures(whole))
	v.figure("base p99 %s", short(b.p99))
	v.figure("during p99 %s, with idle ones %s", short(d.p99), short(i.p99))
	v.figure("slow headers closed after at most %s, bodies %s; %d not closed, %d not opened", short(lived["headers"]), short(lived["bodies"]), open.Load(), failed.Load())
	v.figure("creates meanwhile: %d made, %d refused", made[201], made[503])
	v.figure("RSS %d MB, with slow clients %d MB, with idle ones %d MB (%d KB each)", memory/mb, peak/mb, idlePeak/mb, perConn>>10)
	v.below("p99", max(d.p99, i.p99), 3*b.p99)
	v.mark(open.Load() == 0 && failed.Load() == 0 && lived["headers"] < 7*time.Second, "all closed in time")
	v.mark(idlePeak < memory+int64(idle)*40<<10+16*mb && peak < memory+int64(slow)*40<<10+16*mb, "at most 40 KB per connection")
	v.mark(made[201] > 0 && made[201]+made[503] == sumValues(made), "creates 201 or 503, then 201")
}

// ---- 14 and 15: the start, the disk ----

func TestFault14StartedFirst(t *testing.T) {
	absent := full(10*time.Second, 2*time.Second)
	v := newVerdict(t, 14, "hop started %v before PostgreSQL and Redis", absent)
	pg, rd := startPostgres(t), startRedis(t)
	rd.kill()
	pg.signal(syscall.SIGQUIT)
	<-pg.done
	hop := prepareHop(t, "DATABASE_URL="+pg.url, "REDIS_URL="+rd.url)
	hop.start(t)
	eventually(t, 2*time.Second, "hop listens", func() bool {
		resp, err := client.Get(hop.url + "/health/live")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == 200
	})
	wrong := 0
	for end := time.Now().Add(absent); time.Now().Before(end); {
		began := time.Now()
		for _, r := range []reply{
			do(t, "GET", hop.url+"/health", ""), do(t, "GET", hop.url+"/abc123", ""), do(t, "GET", hop.url+"/stats/abc123", ""),
			do(t, "POST", hop.url+"/shorten", `{"url":"https://example.com/"}`), do(t, "GET", hop.url+"/urls", ""),
		} {
			if r.status != 503 {
				wrong++
			}
		}
		if do(t, "GET", hop.url+"/health/live", "").status != 200 {
			wrong++
		}
		time.Sleep(max(0, 100*time.Millisecond-time.Since(began)))
	}
	pg.start(t)
	rd.start(t)
	pg.waitPostgres(t)
	rd.waitRedis(t)
	up := time.Now()
	hop.waitReady(t)
	ready := time.Since(up)
	made := do(t, "POST", hop.url+"/shorten", `{"url":"https://example.com/"}`)
	v.figure("ready after %s", short(ready))
	v.figure("%d wrong answers before", wrong)
	v.mark(ready < 3*time.Second, "ready < 3 s")
	v.mark(wrong == 0, "503 until then, /health/live 200")
	v.mark(made.status == 201, "then works")
}

func TestFault15DiskFull(t *testing.T) {
	v := newVerdict(t, 15, "full disk under DATA_DIR")
	r := newRig(t)
	disk := t.TempDir()
	err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=34m") // room for one journal
	if err != nil {
		diskFullByLimit(t, v, r, err)
		return
	}
	t.Cleanup(func() { syscall.Unmount(disk, 2) }) // MNT_DETACH
	// A disk that fills up later takes nothing from a journal that has its room, also not over a kill.
	first := startHop(t, r.settings("DATA_DIR="+disk+"/data")...)
	had := journalHealth(t, first)
	if err := fill(filepath.Join(disk, "fill")); err != nil {
		t.Fatal(err)
	}
	l := startLoad(t, first.url, full(3000, 300), full(500, 50), r.aims, redirects)
	l.during(base())
	one := l.figures(whole)
	first.kill()
	first.start(t)
	first.waitReady(t)
	has := journalHealth(t, first)
	// Another replica finds no room.
	second := startHop(t, r.settings("DATA_DIR="+disk+"/data")...)
	says := journalHealth(t, second)
	degraded := scrape(t, second.url)["hop_click_journal_degraded"]
	l2 := startLoad(t, second.url, full(3000, 300), full(500, 50), r.aims, redirects)
	l2.during(base())
	two := l2.figures(whole)
	askStats(t, first.url)
	askStats(t, second.url)
	acked, lost, surplus, _ := r.clicks(t, sumCounts(l.count(302), l2.count(302)))
	v.figure("failed %d of %d", one.failed+two.failed, one.n+two.n)
	v.mark(one.failed+two.failed == 0 && one.n > 0 && two.n > 0, "0 failed")
	v.figure("/health: filled later %q, filled before %q", has, says)
	v.figure("%d clicks, lost %d, surplus %d", acked, lost, surplus)
	v.mark(had == "disk" && has == "disk", "a journal that has room keeps it")
	v.mark(says != "disk" && says != "" && degraded == 1, "one without is degraded and says so")
	v.mark(lost == 0 && surplus == 0, "no crash, clicks exact")
}

// journalHealth is what /health says of the click journal.
func journalHealth(t *testing.T, hop *process) string {
	t.Helper()
	var h struct{ Clicks struct{ Journal string } }
	do(t, "GET", hop.url+"/health", "").json(t, &h)
	return h.Clicks.Journal
}

// fill writes a file until the disk is full.
func fill(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	for block := make([]byte, 1<<16); len(block) > 0; {
		if _, err := f.Write(block); err != nil {
			block = block[:len(block)/2]
		}
	}
	return nil
}

// diskFullByLimit stands in where nothing can be mounted: no file may grow beyond 1 MiB, so that the journal gets no room.
func diskFullByLimit(t *testing.T, v *verdict, r *rig, cause error) {
	prlimit, err := exec.LookPath("prlimit")
	if err != nil {
		need(t, "cannot mount a tmpfs ("+cause.Error()+"), no prlimit", err)
	}
	v.what += " (by RLIMIT_FSIZE)"
	hop := prepareHop(t, r.settings()...)
	args := hop.args
	hop.args = func() *exec.Cmd {
		cmd := args()
		limited := exec.Command(prlimit, append([]string{"--fsize=1048576", "--", cmd.Path}, cmd.Args[1:]...)...)
		limited.Env, limited.Stderr = cmd.Env, cmd.Stderr
		return limited
	}
	hop.start(t)
	hop.waitReady(t)
	says := journalHealth(t, hop)
	l := startLoad(t, hop.url, full(3000, 300), full(500, 50), r.aims, redirects)
	l.during(base())
	v.noneFailed(l.figures(whole))
	askStats(t, hop.url)
	acked, lost, surplus, _ := r.clicks(t, l.count(302))
	v.figure("/health: %q", says)
	v.figure("%d clicks, lost %d, surplus %d", acked, lost, surplus)
	v.mark(says != "disk" && says != "" && scrape(t, hop.url)["hop_click_journal_degraded"] == 1, "degraded and says so")
	v.mark(lost == 0 && surplus == 0, "no crash, clicks exact")
}
