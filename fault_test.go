package main

import (
	"bytes"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// The failure suite: what RELIABILITY.md promises, each promise against real processes that are
// stopped, killed and starved. `make fault` runs it at full length (3,000 requests/s over 500
// connections); `go test` runs a short form of each. This file holds what the cases share; the
// cases are in fault_redis_test.go, fault_postgres_test.go and fault_hop_test.go. Every case prints
// one line of the table in RELIABILITY.md.

// fullLength is set by the build tag fault.
var fullLength bool

// full is one of two sizes.
func full[T any](long, short T) T {
	if fullLength {
		return long
	}
	return short
}

// noise is what the short form allows every latency on top: it runs beside other tests on small
// shared machines.
func noise() time.Duration {
	return full(0, 300*time.Millisecond)
}

// answerLimit is the longest that any request may take, whatever is sick. Hop's own deadline is
// 550 ms; the rest is the way.
const answerLimit = 600 * time.Millisecond

// wayToPostgres, where it is not nil, starts what is between hop and PostgreSQL in all cases, and
// returns the address.
var wayToPostgres func(t testing.TB, pg *process) string

// faultCase is one promise: what is broken under which load, and what is allowed meanwhile. The
// usual load is redirects of all links of the rig.
type faultCase struct {
	number   int
	what     string
	stores   func(t *testing.T) *rig // other services than a PostgreSQL and a Redis
	settings []string                // of hop
	bare     bool                    // hop is not started, the case does it
	unloaded bool                    // there is no usual load
	hot      int                     // how many of the links the load asks for; 0 is all

	// fault breaks something, holds it, looks at what only this case promises, and mends it. The
	// load runs meanwhile.
	fault func(f *faultRun)

	// p99 says how slow 99 of 100 redirects may be during the fault, given the calm part of the
	// same run. Nil allows everything.
	p99 func(calm time.Duration) time.Duration

	mayFail bool // redirects may fail: hop itself is killed
	// surplus says how many clicks may be counted beyond those acknowledged. Nil is none.
	surplus func(f *faultRun) int64

	after func(f *faultRun) // looks at what is known only when the load has ended
}

// faultRun is a case under way: the services, the load, and the line that is printed.
type faultRun struct {
	*testing.T
	*rig
	load  *load   // the usual one
	loads []*load // all loads of redirects whose failures and clicks are judged
	hops  []*process

	calm span // the undisturbed part of the usual load
	hurt span // the fault

	suite   string // FAULT, or CLUSTER
	number  int
	what    string
	figures []string
	marks   []string
}

// verdict is how a test ended, for the line that is printed of it.
func verdict(t *testing.T) string {
	switch {
	case t.Failed():
		return "FAIL"
	case t.Skipped():
		return "SKIPPED"
	}
	return "PASS"
}

// newFaultRun begins the line of a case, which is printed when the test ends.
func newFaultRun(t *testing.T, number int, what string) *faultRun {
	f := &faultRun{T: t, suite: "FAULT", number: number, what: what}
	t.Cleanup(func() {
		columns := []string{fmt.Sprintf("%s %02d", f.suite, number), f.what}
		columns = append(columns, f.figures...)
		columns = append(columns, "pass mark: "+strings.Join(f.marks, ", "), verdict(t))
		fmt.Println(strings.Join(columns, " | "))
	})
	return f
}

// run runs the case: a calm part, the fault, a part in which all is well again, and the judgement.
func (c faultCase) run(t *testing.T) {
	t.Helper()
	f := newFaultRun(t, c.number, c.what)
	if c.stores != nil {
		f.rig = c.stores(t)
	} else {
		f.rig = newStores(t, startPostgres(t), startRedis(t))
	}
	if wayToPostgres != nil {
		f.environment = append(f.environment, "DATABASE_URL="+wayToPostgres(t, f.pg))
	}
	if c.hot > 0 {
		f.aims = f.aims[:c.hot]
	}
	if !c.bare {
		f.hop = startHop(t, f.settings(c.settings...)...)
	}
	if !c.bare && !c.unloaded {
		f.begin()
	}
	c.fault(f)
	if f.load != nil {
		f.mended()
		f.wait(full(5*time.Second, 500*time.Millisecond))
	}
	f.judge(c)
}

// begin starts the usual load and lets it run undisturbed for a while. A bare case calls it when
// hop serves.
func (f *faultRun) begin() {
	f.Helper()
	f.load = f.redirect(f.hop)
	f.wait(full(time.Second, 200*time.Millisecond)) // the first requests warm everything
	f.calm = f.load.during(full(10*time.Second, 1500*time.Millisecond))
	f.hurt.from = f.load.now()
}

// judge ends the loads and holds what came of them against what the case allows.
func (f *faultRun) judge(c faultCase) {
	f.Helper()
	own := f.figures // those of the case itself come after the usual ones
	f.figures = nil
	var all figures
	for _, l := range f.loads {
		all = all.add(l.figures(whole))
	}
	if len(f.loads) > 0 {
		f.figure("%s", all.failures())
		f.mark(c.mayFail || all.failed == 0 && all.n > 0, "%s", f.failureMark(c))
	}
	if f.load != nil && !c.mayFail {
		calm := f.load.figures(f.calm)
		hurt := f.load.figures(f.hurt)
		f.figure("base p99 %s", short(calm.p99))
		f.figure("during p99 %s, worst %s", short(hurt.p99), short(hurt.worst))
		if c.p99 != nil {
			f.below("p99", hurt.p99, c.p99(calm.p99))
		}
	}
	f.figures = append(f.figures, own...)
	if c.after != nil {
		c.after(f)
	}
	if len(f.loads) > 0 {
		f.judgeClicks(c)
	}
}

// failureMark is the pass mark for redirects.
func (f *faultRun) failureMark(c faultCase) string {
	if c.mayFail {
		return "redirects fail only while nobody listens"
	}
	return "0 failed"
}

// judgeClicks compares what the clients know with what PostgreSQL says, link by link.
func (f *faultRun) judgeClicks(c faultCase) {
	f.Helper()
	for _, hop := range f.hops {
		flushClicks(f, hop.url)
	}
	acknowledged := map[int]int64{}
	for _, l := range f.loads {
		for link, n := range l.answered(302) {
			acknowledged[link] += n
		}
	}
	sum := f.countedClicks(f.T, acknowledged)
	f.figure("%d clicks, lost %d, surplus %d, events %d",
		sum.acknowledged, sum.lost, sum.surplus, sum.events)
	f.mark(sum.acknowledged > 0 && sum.lost == 0, "clicks lost 0")
	allowed := int64(0)
	if c.surplus == nil {
		f.mark(sum.surplus == 0, "none counted twice")
	} else {
		allowed = c.surplus(f)
		f.mark(sum.surplus <= allowed, "surplus ≤ %d in flight", allowed)
	}
	f.mark(sum.events == sum.acknowledged-sum.lost+sum.surplus, "one event per click")
	f.mark(balanced(f, f.pg.url), "the books balance")
}

// figure adds a column.
func (f *faultRun) figure(format string, args ...any) {
	f.figures = append(f.figures, fmt.Sprintf(format, args...))
}

// mark adds a pass mark, and fails the test when it is missed.
func (f *faultRun) mark(ok bool, format string, args ...any) {
	f.Helper()
	mark := fmt.Sprintf(format, args...)
	if !slices.Contains(f.marks, mark) {
		f.marks = append(f.marks, mark)
	}
	if !ok {
		f.Errorf("missed: %s", mark)
	}
}

// below is a mark for a duration.
func (f *faultRun) below(what string, got, limit time.Duration) {
	f.Helper()
	limit += noise()
	f.mark(got < limit, "%s < %s", what, short(limit))
	if got >= limit {
		f.Logf("%s is %s", what, short(got))
	}
}

// few says whether at most a few of n failed: none, or in the short form, where others may have the
// cores, one in twenty.
func few(failed, n int) bool {
	return n > 0 && failed <= full(0, n/20)
}

// within waits for cond, which is a mark: it is given limit. The short form waits for longer and
// says what it took: how soon is a matter of the full length on a quiet machine.
func (f *faultRun) within(limit time.Duration, what string, cond func() bool) {
	f.Helper()
	limit = full(limit, patience)
	began := time.Now()
	eventually(f, limit, what, cond)
	f.mark(true, "%s < %s", what, short(limit))
	f.figure("%s after %s", what, short(time.Since(began)))
}

// mended says that the fault is over. The end of faultCase.fault says so too.
func (f *faultRun) mended() {
	if f.hurt.to == 0 && f.load != nil {
		f.hurt.to = f.load.now()
	}
}

// wait lets the loads run.
func (f *faultRun) wait(d time.Duration) {
	time.Sleep(d)
}

// redirect starts the usual load on a hop.
func (f *faultRun) redirect(hop *process) *load {
	f.Helper()
	return f.redirectAt(hop, full(3000, 300), full(500, 50), f.aims)
}

// redirectAt starts a load of redirects of which none may fail and all clicks must be counted.
func (f *faultRun) redirectAt(hop *process, rate, conns int, aims []aim) *load {
	f.Helper()
	l := startLoad(f, hop.url, rate, conns, aims, redirects)
	f.loads = append(f.loads, l)
	if !slices.Contains(f.hops, hop) {
		f.hops = append(f.hops, hop)
	}
	return l
}

// breakerOpen says whether hop has stopped asking a peer: "postgres" or "redis".
func (f *faultRun) breakerOpen(peer string) bool {
	f.Helper()
	return scrape(f, f.hop.url)[fmt.Sprintf(`hop_breaker_open{peer=%q}`, peer)] == 1
}

// healthReport is what /health says.
type healthReport struct {
	httpStatus int

	Status   string
	Ready    bool
	Draining bool
	Postgres struct{ Status string }
	Redis    struct{ Status string }
	Clicks   struct {
		Journal string
		Pending int64
	}
}

// askHealthOf is what /health of a hop says.
func askHealthOf(t testing.TB, hop *process) healthReport {
	t.Helper()
	var h healthReport
	r := do(t, "GET", hop.url+"/health", "")
	r.json(t, &h)
	h.httpStatus = r.status
	return h
}

// flushClicks makes hop flush: when it returns, every click answered before is counted.
func flushClicks(t testing.TB, url string) {
	t.Helper()
	eventually(t, patience, "all clicks are flushed", func() bool {
		return do(t, "GET", url+"/stats/f0000", "").status == 200
	})
}

// ---- the services ----

// rig is a PostgreSQL, a Redis and a hop of the test's own, with links that all caches know.
type rig struct {
	pg, redis, hop *process
	db             *sql.DB  // to PostgreSQL itself, whatever is between it and hop
	environment    []string // where hop finds the services
	aims           []aim    // one redirect per link
}

const (
	// rigLinks is how many links a rig has. Link i has the code f0000 + i and the id i + 1.
	rigLinks = 2000

	// spareLink is one link more, which no load asks for: a change takes a link out of the caches.
	spareLink = "/urls/2001"
)

// newRig starts all three.
func newRig(t testing.TB, settings ...string) *rig {
	t.Helper()
	r := newStores(t, startPostgres(t), startRedis(t))
	r.hop = startHop(t, r.settings(settings...)...)
	return r
}

// newStores makes a rig without a hop yet, and loads the links.
func newStores(t testing.TB, pg, redis *process) *rig {
	t.Helper()
	r := &rig{pg: pg, redis: redis, db: openDB(t, pg.url)}
	r.environment = []string{"DATABASE_URL=" + pg.url, "REDIS_URL=" + redis.url}
	applySchema(t, pg.url)
	r.fillLinks(t)
	return r
}

// fillLinks makes the rig's links, and an aim for each.
func (r *rig) fillLinks(t testing.TB) {
	t.Helper()
	execSQL(t, r.db, `
		INSERT INTO urls (short_code, original_url, created_at, updated_at)
		SELECT 'f' || lpad(i::text, 4, '0'), 'https://example.com/' || i, now(), now()
		FROM generate_series(0, $1) AS i ORDER BY i`, rigLinks)
	for i := range rigLinks {
		path := fmt.Sprintf("/f%04d", i)
		r.aims = append(r.aims, getAim(path, fmt.Sprintf("https://example.com/%d", i), i))
	}
}

// applySchema makes hop's tables in an empty database.
func applySchema(t testing.TB, dsn string) {
	t.Helper()
	args := []string{"export", t.TempDir()}
	if err := run(t.Context(), args, settingsOf("DATABASE_URL="+dsn)); err != nil {
		t.Fatal(err)
	}
}

// settings are those of a hop on the rig's services. Later ones win.
func (r *rig) settings(more ...string) []string {
	return slices.Concat(r.environment, []string{"BASE_URL=http://hop.test"}, more)
}

// clickCount compares clicks that clients know with those that PostgreSQL has.
type clickCount struct{ acknowledged, lost, surplus, events int64 }

// countedClicks sums up over all links of the rig. acknowledged is by link.
func (r *rig) countedClicks(t testing.TB, acknowledged map[int]int64) clickCount {
	t.Helper()
	rows, err := r.db.Query(`
		SELECT id - 1, click_count,
		       (SELECT count(*) FROM events WHERE url_id = urls.id AND event_type = 'click')
		FROM urls WHERE id <= $1`, rigLinks)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var sum clickCount
	seen := 0
	for rows.Next() {
		var link int
		var counted, events int64
		if err := rows.Scan(&link, &counted, &events); err != nil {
			t.Fatal(err)
		}
		want := acknowledged[link]
		sum.acknowledged += want
		sum.lost += max(0, want-counted)
		sum.surplus += max(0, counted-want)
		sum.events += events
		seen++
	}
	if err := rows.Err(); err != nil || seen != rigLinks {
		t.Fatalf("%d of %d links: %v", seen, rigLinks, err)
	}
	return sum
}

// crashPostgres ends PostgreSQL without a checkpoint and starts it again.
func crashPostgres(t testing.TB, pg *process) {
	t.Helper()
	pg.stopPostgres()
	pg.start(t)
	pg.waitPostgres(t)
}

// unknownAims are n codes that nobody has.
func unknownAims(n int) []aim {
	var aims []aim
	for i := range n {
		aims = append(aims, getAim(fmt.Sprintf("/u%06d", i), "", 0))
	}
	return aims
}

// ---- creates under way ----

// creates is a load of POST /shorten and what it acknowledged.
type creates struct {
	*load
	mu      sync.Mutex        // guards what follows
	targets map[string]string // of the links made, by code
	ids     map[int64]bool    // of the links made
	twice   int               // codes given out again
	reused  int               // ids given out again
	denied  int               // answers 503
}

// create starts a load of distinct links to be made.
func (f *faultRun) create(hop *process, rate, conns int) *creates {
	f.Helper()
	var aims []aim
	for i := range rate * 300 { // five minutes of them
		target := fmt.Sprintf("https://example.com/made/%d", i)
		aims = append(aims, postAim("/shorten", `{"url":"`+target+`"}`, target))
	}
	c := &creates{targets: map[string]string{}, ids: map[int64]bool{}}
	c.load = startLoad(f, hop.url, rate, conns, aims, c.note)
	return c
}

// note is the judge: 201 and 503 are right.
func (c *creates) note(a aim, r loadAnswer) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.status == 503 {
		c.denied++
		return ""
	}
	var got struct {
		ID   int64  `json:"id"`
		Code string `json:"short_code"`
		URL  string `json:"original_url"`
	}
	err := json.Unmarshal(r.body, &got)
	if r.status != 201 || err != nil || got.URL != a.want {
		return fmt.Sprintf("status %d, %.100s", r.status, r.body)
	}
	if _, known := c.targets[got.Code]; known {
		c.twice++
	}
	if c.ids[got.ID] {
		c.reused++
	}
	c.targets[got.Code] = got.URL
	c.ids[got.ID] = true
	return ""
}

// made is how many links were made so far.
func (c *creates) made() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.targets)
}

// missing stops the load and counts the acknowledged links that PostgreSQL does not have as they
// were acknowledged.
func (c *creates) missing(t testing.TB, db *sql.DB) int {
	t.Helper()
	return len(c.missingCodes(t, db))
}

// missingCodes is missing, as the codes.
func (c *creates) missingCodes(t testing.TB, db *sql.DB) []string {
	t.Helper()
	c.stop()
	rows, err := db.Query(`SELECT short_code, original_url FROM urls WHERE id > $1`, rigLinks)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	stored := map[string]string{}
	for rows.Next() {
		var code, target string
		if err := rows.Scan(&code, &target); err != nil {
			t.Fatal(err)
		}
		stored[code] = target
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	var missing []string
	for code, target := range c.targets {
		if stored[code] != target {
			missing = append(missing, code)
		}
	}
	return missing
}

// ---- everything that is no redirect ----

// request is one that is made by name.
type request struct{ name, method, path, sent string }

// asked is a request that was answered, or not: then its status is 0.
type asked struct {
	request
	began, ended time.Time
	reply
}

// took is how long the answer took.
func (a asked) took() time.Duration {
	return a.ended.Sub(a.began)
}

// refused says that hop could not do it now, and said so as it should.
func (a asked) refused() bool {
	return a.status == 503 && a.header.Get("Retry-After") != ""
}

// worked says that hop did it, or refused it for a reason that no waiting mends. Of many links to
// be made each has a status of its own.
func (a asked) worked() bool {
	return a.status > 0 && a.status < 500 && !strings.Contains(a.body, `"status":503`)
}

// ask makes one request and notes how long the answer takes. Of the body it keeps the beginning.
func ask(url string, r request) asked {
	a := asked{request: r, began: time.Now()}
	answer, err := roundTrip(r.method, url+r.path, r.sent)
	a.ended = time.Now()
	if err != nil {
		answer.body = err.Error()
	}
	answer.body = strings.Clone(answer.body[:min(len(answer.body), 400)])
	a.reply = answer
	return a
}

// askInTurn lets clients make the requests one after another, over and over, pause after each,
// until the returned function is called. It returns all that were made.
func (f *faultRun) askInTurn(url string, clients int, pause time.Duration,
	all ...request) func() []asked {

	stop := make(chan struct{})
	var mu sync.Mutex // guards result
	var result []asked
	var running sync.WaitGroup
	for range clients {
		running.Go(func() {
			done := askUntil(stop, url, pause, all)
			mu.Lock()
			defer mu.Unlock()
			result = append(result, done...)
		})
	}
	end := sync.OnceValue(func() []asked {
		close(stop)
		running.Wait()
		return result
	})
	f.Cleanup(func() { end() })
	return end
}

// askUntil is one client of askInTurn.
func askUntil(stop <-chan struct{}, url string, pause time.Duration, all []request) []asked {
	var done []asked
	for i := 0; ; i++ {
		done = append(done, ask(url, all[i%len(all)]))
		select {
		case <-stop:
			return done
		case <-time.After(pause):
		}
	}
}

// The requests that cases make by name.
var (
	createOne  = request{"create", "POST", "/shorten", `{"url":"https://example.com/x"}`}
	updateOne  = request{"update", "PUT", spareLink, `{"title":"x"}`}
	readStats  = request{"stats", "GET", "/stats/f0000", ""}
	listLinks  = request{"list", "GET", "/urls?per_page=1", ""}
	readHealth = request{"health", "GET", "/health", ""}
	readLive   = request{"live", "GET", "/health/live", ""}
)

// everyRoute is a request for each kind of thing that hop does with PostgreSQL. The unknown code is
// another one each time: hop may remember that there is none.
func everyRoute() []request {
	return []request{
		createOne,
		{"create many", "POST", "/shorten/bulk", `[{"url":"https://example.com/y"}]`},
		{"create a link", "POST", "/urls", `{"original_url":"https://example.com/z"}`},
		updateOne,
		{"read a link", "GET", "/urls/2", ""},
		listLinks,
		readStats,
		{"list events", "GET", "/events?per_page=1", ""},
		{"post an event", "POST", "/events", `{"event_type":"seen","url_id":1}`},
		{"list users", "GET", "/users?per_page=1", ""},
		{"unknown code", "GET", "/" + rand.Text(), ""},
		{"unknown user", "GET", "/users/999999", ""},
		{"delete nothing", "DELETE", "/urls/999999", ""},
	}
}

// allWork asks everything once while PostgreSQL is well, and marks that all of it works in time.
func (f *faultRun) allWork(when string) {
	f.Helper()
	ok := f.everything(when, asked.worked)
	for range full(0, 2) { // others may have the cores just now
		ok = ok || f.everything(when+", again", asked.worked)
	}
	f.mark(ok, "all routes work within %s", short(answerLimit+noise()))
}

// allRefused asks everything once while PostgreSQL cannot answer, and marks that all of it is
// refused in time.
func (f *faultRun) allRefused(when string) {
	f.Helper()
	f.mark(f.everything(when, asked.refused), "all routes 503 with Retry-After within %s",
		short(answerLimit+noise()))
}

// everything asks all routes once and says whether all answers were right and in time.
func (f *faultRun) everything(when string, right func(asked) bool) bool {
	f.Helper()
	limit := answerLimit + noise()
	var slowest asked
	ok := true
	for _, r := range everyRoute() {
		a := ask(f.hop.url, r)
		if a.took() > slowest.took() {
			slowest = a
		}
		if !right(a) || a.took() > limit {
			f.Logf("%s: %s: %d after %s, %.200s", when, a.name, a.status, short(a.took()), a.body)
			ok = false
		}
	}
	live := ask(f.hop.url, readLive)
	if live.status != 200 || live.took() > limit {
		f.Logf("%s: /health/live: %d after %s", when, live.status, short(live.took()))
		ok = false
	}
	f.figure("%s: slowest %s (%s)", when, short(slowest.took()), slowest.name)
	return ok
}

// statuses are what the usual requests must be answered with.
type statuses struct {
	create, update, stats, list, health int
	pending                             bool // the update says that caches do not know of it yet
}

// others asks for what is no redirect once each, in the middle of a fault, and marks the statuses
// and that none is late.
func (f *faultRun) others(want statuses) {
	f.Helper()
	limit := answerLimit + noise()
	ok := true
	for _, c := range []struct {
		request
		status int
	}{
		{createOne, want.create},
		{updateOne, want.update},
		{readStats, want.stats},
		{listLinks, want.list},
		{readHealth, want.health},
	} {
		a := ask(f.hop.url, c.request)
		late := a.took() > limit
		noRetry := a.status == 503 && c.request != readHealth && a.header.Get("Retry-After") == ""
		if a.status != c.status || late || noRetry {
			f.Logf("%s: %d after %s, %.200s", a.name, a.status, short(a.took()), a.body)
			ok = false
		}
		pending := strings.Contains(a.body, `"cache":"pending"`)
		if c.request == updateOne && pending != want.pending {
			f.Logf("update: pending %t: %s", pending, a.body)
			ok = false
		}
	}
	f.mark(ok, "create %d, update %d, stats %d, list %d, health %d within %s", want.create,
		want.update, want.stats, want.list, want.health, short(limit))
}

// tally is how often each name was answered with each status: "create 201 ×12, create 503 ×1".
func tally(all []asked) string {
	counts := map[string]int{}
	for _, a := range all {
		counts[fmt.Sprintf("%s %d", a.name, a.status)]++
	}
	var b bytes.Buffer
	for i, key := range slices.Sorted(maps.Keys(counts)) {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%s ×%d", key, counts[key])
	}
	return b.String()
}

// slowestOf is the longest that an answer took.
func slowestOf(all []asked) time.Duration {
	var slowest time.Duration
	for _, a := range all {
		slowest = max(slowest, a.took())
	}
	return slowest
}
