package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
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

// The coherence checker: three replicas over one database and one Redis, random writes and redirects on randomly chosen ones,
// under every fault that Redis can have. From outside it notes when each write was sent and acknowledged and what it made true;
// afterwards it judges every redirect by that history, and compares what is left in Redis and in the local tiers with PostgreSQL.
//
//	go test -run '^TestFault16Coherence$' -v                        some 5 s for each fault
//	COHERENCE_SECONDS=60 go test -run '^TestFault16Coherence$' -v   a minute for each
var coherenceSeed = flag.Uint64("coherence.seed", 1, "seed of the coherence checker's random choices")

// coherenceTime is how long clients go on under each fault.
func coherenceTime(short time.Duration) time.Duration {
	if s, err := strconv.Atoi(os.Getenv("COHERENCE_SECONDS")); err == nil && s > 0 {
		return time.Duration(s) * time.Second
	}
	return short
}

const (
	clientCount = 8   // goroutines that read and write
	codeCount   = 240 // codes at the start: 3 of 4 exist, the others are created by the run
	recentCount = 128 // codes written last, some 4 s of them, to which most redirects go: the others only show what caches leave alone
	hotCount    = 16  // the very last of them
)

// version is one write of one code as its client saw it. Times are since the checker's start.
type version struct {
	url         string // what it made true; "" is a 404
	sent, acked time.Duration
	sure        bool // acknowledged; else nobody knows whether it happened, or will
	by          int  // the replica that was asked
	pending     bool // acknowledged, but other replicas may serve the old target until that one reaches Redis again
	repaid      time.Duration
}

// due is when replica must have heard of v at the latest; ok is false if that may take for ever.
func (v *version) due(replica int) (at time.Duration, ok bool) {
	switch {
	case !v.sure:
		return 0, false
	case v.pending && v.by != replica:
		return v.repaid, v.repaid != 0
	}
	return v.acked, true
}

// subject is a code and its history.
type subject struct {
	code     string
	writing  sync.Mutex // one writer at a time, so that the history has one order; guards what follows
	id       int64      // 0: not created, as far as we know
	deleted  bool
	active   bool
	stored   string // its URL, also while it sleeps; known after a sure write only
	writes   int
	versions []*version
}

// look is one answered redirect.
type look struct {
	s         *subject
	replica   int
	sent, got time.Duration
	url       string
}

// place is one replica as the checker reaches it.
type place struct {
	url string
	app *app // nil: not hop
	// entries calls fn for everything the local tier would answer now, and counts what it keeps but would not.
	entries func(fn func(code string, t target)) (dormant map[string]target)
}

// checker is one run.
type checker struct {
	t       *testing.T
	name    string
	allowed time.Duration // how old an answer may be
	places  []*place
	db      *sql.DB
	redis   *process
	began   time.Time
	length  time.Duration // of the run

	mu       sync.Mutex // guards what follows
	subjects []*subject
	recent   [recentCount]*subject
	next     int
	looks    []look
	owed     []*debt
	reached  [3]time.Duration // since when each replica reaches Redis; negative: it does not
	faults   int
	problems []string

	writes, maybes, refused, pendings, wrong, stale, left, compared atomic.Int64
	worst, worstPending                                             time.Duration
	dormant, slowest                                                atomic.Int64
}

// debt is a pending write until its replica has told the others.
type debt struct {
	v       *version
	code    string
	unheard bool // reported as not repaid in time
}

func (c *checker) now() time.Duration { return time.Since(c.began) }

// problem notes a broken promise; all of them fail the test, a few are printed.
func (c *checker) problem(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.problems = append(c.problems, fmt.Sprintf("%9.3f s: ", c.now().Seconds())+fmt.Sprintf(format, args...))
}

// newChecker prepares an empty database with the schema and three quarters of the codes.
func newChecker(t *testing.T, name string, allowed time.Duration, dsn string, rds *process) *checker {
	c := &checker{t: t, name: name, allowed: allowed, db: openDB(t, dsn), redis: rds, began: time.Now()}
	if _, err := c.db.Exec(schema); err != nil {
		t.Fatal(err)
	}
	for i := range codeCount {
		s := &subject{code: fmt.Sprintf("c%s%03d", strings.ReplaceAll(name, " ", ""), i)}
		first := &version{sure: true}
		if i%4 != 0 {
			first.url, s.active = c.target(s), true
			err := c.db.QueryRow(`INSERT INTO urls (short_code, original_url, created_at, updated_at) VALUES ($1, $2, now(), now()) RETURNING id`,
				s.code, first.url).Scan(&s.id)
			if err != nil {
				t.Fatal(err)
			}
		}
		s.versions = append(s.versions, first)
		c.subjects = append(c.subjects, s)
	}
	return c
}

// target is a URL no write used before.
func (c *checker) target(s *subject) string {
	s.writes++
	return fmt.Sprintf("https://v.example.com/%s/%d", s.code, s.writes)
}

// request sends one request and reads the answer whole.
func (c *checker) request(method, url string, body map[string]any) (status int, location string, answer []byte, err error) {
	var b []byte
	if body != nil {
		b, _ = json.Marshal(body)
	}
	req, err := http.NewRequest(method, url, bytes.NewReader(b))
	if err != nil {
		return 0, "", nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header.Get("Location"), answer, err
}

// look asks a replica for a code and notes the answer.
func (c *checker) look(s *subject, replica int) {
	l := look{s: s, replica: replica, sent: c.now()}
	status, location, body, err := c.request("GET", c.places[replica].url+"/"+s.code, nil)
	l.got, l.url = c.now(), location
	switch {
	case err == nil && (status == http.StatusFound && location != "" || status == http.StatusNotFound):
		c.mu.Lock()
		c.looks = append(c.looks, l)
		c.mu.Unlock()
	case err == nil && status == http.StatusServiceUnavailable:
		c.refused.Add(1)
		if c.allowed == 0 {
			c.problem("replica %d answered 503 for %s without any fault", replica, s.code)
		}
	default:
		c.problem("replica %d answered %s with %d %q, error %v", replica, s.code, status, body, err)
	}
}

// write changes s, if nobody else does, and notes what happened.
func (c *checker) write(s *subject, replica int, r *rand.Rand) {
	if !s.writing.TryLock() {
		return
	}
	defer s.writing.Unlock()
	if s.deleted {
		return
	}
	certain := s.versions[len(s.versions)-1].sure
	v := &version{by: replica}
	method, to, body := "PUT", fmt.Sprintf("%s/urls/%d", c.places[replica].url, s.id), map[string]any{}
	switch dice := r.IntN(100); {
	case s.id == 0:
		v.url = c.target(s)
		method, to, body = "POST", c.places[replica].url+"/shorten", map[string]any{"original_url": v.url, "custom_code": s.code}
	case dice < 6:
		method, body = "DELETE", nil
	case dice < 25 && s.active:
		body["is_active"] = false
	case dice < 45 && !s.active && certain: // a sleeping link stays a 404
		s.stored = c.target(s)
		body["original_url"] = s.stored
	case dice < 70 && !s.active && certain:
		v.url = s.stored
		body["is_active"] = true
	default: // nobody knows what an unsure write left behind, so the next one says it all
		v.url = c.target(s)
		body["original_url"] = v.url
		if !s.active || !certain {
			body["is_active"] = true
		}
	}
	c.mu.Lock()
	c.wrote(s) // now, so that others ask for it while it changes
	c.mu.Unlock()
	v.sent = c.now() // it may be true from here on
	s.versions = append(s.versions, v)
	status, _, answer, err := c.request(method, to, body)
	acked := c.now()
	c.slowest.Store(max(c.slowest.Load(), int64(acked-v.sent)))
	c.writes.Add(1)
	var row struct {
		ID       int64  `json:"id"`
		URL      string `json:"original_url"`
		IsActive bool   `json:"is_active"`
		Cache    string `json:"cache"`
	}
	switch {
	case err != nil:
		c.problem("%s %s: %v", method, to, err)
		return
	case status == http.StatusServiceUnavailable:
		c.maybes.Add(1)
		if c.allowed == 0 {
			c.problem("%s %s answered 503 without any fault", method, to)
		}
		return
	case status == http.StatusOK || status == http.StatusCreated:
		if err := json.Unmarshal(answer, &row); err != nil {
			c.problem("%s %s answered %q: %v", method, to, answer, err)
			return
		}
		s.id, s.active, s.stored = row.ID, row.IsActive, row.URL
		is := ""
		if row.IsActive {
			is = row.URL
		}
		if is != v.url { // an unsure write came through after a later one was acknowledged
			c.problem("%s %s %v made %q true instead of %q", method, to, body, is, v.url)
			v.url = is
		}
		v.pending = row.Cache == "pending"
	case status == http.StatusNoContent && method == "DELETE":
		s.deleted = true
		v.pending = c.owes(replica, s.code) // there is no body to say so in
	case status == http.StatusNotFound && method != "POST" && !certain: // an unsure delete did happen
		s.deleted = true
	case status == http.StatusConflict && method == "POST" && !certain: // an unsure create did happen
		if err := c.db.QueryRow(`SELECT id, original_url FROM urls WHERE short_code = $1`, s.code).Scan(&s.id, &s.stored); err != nil {
			c.problem("%s is taken, but %v", s.code, err)
			return
		}
		s.active, v.url = true, s.stored
	default:
		c.problem("%s %s %v answered %d %s", method, to, body, status, answer)
		return
	}
	v.sure, v.acked = true, acked
	if v.pending {
		c.pendings.Add(1)
		c.mu.Lock()
		c.owed = append(c.owed, &debt{v: v, code: s.code})
		c.mu.Unlock()
	}
}

// wrote notes that s is being written. Under mu.
func (c *checker) wrote(s *subject) {
	c.recent[c.next%recentCount] = s
	c.next++
}

// pick chooses a code: any, one written lately, and one written just now.
func (c *checker) pick(r *rand.Rand) (cold, warm, hot *subject) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cold, warm, hot = c.subjects[r.IntN(len(c.subjects))], c.recent[r.IntN(recentCount)], c.recent[max(0, c.next-1-r.IntN(hotCount))%recentCount]
	if warm == nil {
		warm = cold
	}
	if hot == nil {
		hot = warm
	}
	return cold, warm, hot
}

// generate makes a link with a code of hop's choice.
func (c *checker) generate(replica int) {
	s := &subject{active: true}
	v := &version{sent: c.now(), by: replica, sure: true, url: fmt.Sprintf("https://v.example.com/new/%d", c.writes.Add(1))}
	status, _, answer, err := c.request("POST", c.places[replica].url+"/shorten", map[string]any{"original_url": v.url})
	v.acked = c.now()
	var row struct {
		ID    int64  `json:"id"`
		Code  string `json:"short_code"`
		Cache string `json:"cache"`
	}
	switch {
	case err == nil && status == http.StatusServiceUnavailable:
		c.maybes.Add(1)
		if c.allowed == 0 {
			c.problem("POST answered 503 without any fault")
		}
	case err != nil || status != http.StatusCreated || json.Unmarshal(answer, &row) != nil:
		c.problem("POST answered %d %q, error %v", status, answer, err)
	default:
		s.id, s.code = row.ID, row.Code
		s.versions = []*version{{sure: true}, v}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.subjects = append(c.subjects, s)
		c.wrote(s)
		if v.pending = row.Cache == "pending"; v.pending {
			c.pendings.Add(1)
			c.owed = append(c.owed, &debt{v: v, code: s.code})
		}
	}
}

// owes says whether a replica still has to hold code.
func (c *checker) owes(replica int, code string) bool {
	a := c.places[replica].app
	if a == nil {
		return false
	}
	a.cache.redis.mu.Lock()
	defer a.cache.redis.mu.Unlock()
	_, ok := a.cache.redis.owed[code]
	return ok
}

// collectDebts notes when pending writes are repaid, and which are not within 2 s of their replica reaching Redis.
func (c *checker) collectDebts() {
	c.mu.Lock()
	owed, reached := slices.Clone(c.owed), c.reached
	c.mu.Unlock()
	var left []*debt
	for _, d := range owed {
		now := c.now()
		if !c.owes(d.v.by, d.code) {
			d.v.repaid = now
			continue
		}
		if since := max(d.v.acked, reached[d.v.by]); reached[d.v.by] >= 0 && now-since > trustFor && !d.unheard {
			d.unheard = true
			c.problem("replica %d has reached Redis for %v and not repaid %s", d.v.by, now-since, d.code)
		}
		left = append(left, d)
	}
	c.mu.Lock()
	c.owed = append(left, c.owed[len(owed):]...)
	c.mu.Unlock()
}

// reach notes that replicas reach Redis from now on, or no longer.
func (c *checker) reach(yes bool, replicas ...int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range replicas {
		if c.reached[r] = -1; yes {
			c.reached[r] = c.now()
		}
	}
	if !yes {
		c.faults++
	}
}

// fault disturbs Redis until stop is closed, and leaves it well.
type fault func(c *checker, r *rand.Rand, stop <-chan struct{})

// run lets clients write and read for length, while fault goes on.
func (c *checker) run(length time.Duration, seed uint64, fault fault) {
	c.length = length
	var clients, others sync.WaitGroup
	stop, done := make(chan struct{}), make(chan struct{})
	others.Go(func() {
		for tick := time.NewTicker(5 * time.Millisecond); ; {
			select {
			case <-tick.C:
				c.collectDebts()
			case <-done:
				tick.Stop()
				return
			}
		}
	})
	for n := range clientCount {
		clients.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(n)))
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Duration(r.Int64N(int64(6 * time.Millisecond)))):
				}
				s, warm, hot := c.pick(r)
				replica, dice := r.IntN(len(c.places)), r.IntN(1000)
				switch {
				case dice < 4:
					c.generate(replica)
					continue
				case dice < 20: // a code that has long been cached, as a rule
				case dice < 40: // a code whose hold still stands
					s = hot
				default:
					switch {
					case dice < 450:
						s = hot
					case dice < 800:
						s = warm
					}
					c.look(s, replica)
					continue
				}
				c.write(s, replica, r)
				for range r.IntN(4) {
					c.look(s, r.IntN(len(c.places)))
				}
			}
		})
	}
	if fault == nil {
		time.Sleep(length)
	} else {
		until := make(chan struct{})
		time.AfterFunc(length, func() { close(until) })
		fault(c, rand.New(rand.NewPCG(seed, clientCount)), until)
	}
	close(stop)
	clients.Wait()
	if fault != nil && c.faults == 0 {
		c.problem("there was no fault")
	}
	// All is well again: debts are paid and Redis is trusted within 2 s.
	for healed := c.now(); ; time.Sleep(5 * time.Millisecond) {
		c.mu.Lock()
		n := len(c.owed)
		c.mu.Unlock()
		down := slices.IndexFunc(c.places, func(p *place) bool { return p.app != nil && !p.app.cache.redis.up.Load() })
		if n == 0 && down < 0 {
			break
		}
		if c.now()-healed > trustFor {
			c.problem("%v after the last fault %d debts are left, and replica %d trusts Redis no more", trustFor, n, down)
			break
		}
	}
	close(done)
	others.Wait()
}

// judge holds every redirect since the last call against the history. Nobody may be writing.
func (c *checker) judge() {
	looks := c.looks
	c.looks = nil
	for _, l := range looks {
		age, owedAge := time.Duration(-1), time.Duration(0)
		for i, v := range l.s.versions {
			if v.url != l.url || v.sent > l.got {
				continue
			}
			old, owing := time.Duration(0), time.Duration(0) // since when v may no longer be served here
			for _, later := range l.s.versions[i+1:] {
				if at, ok := later.due(l.replica); ok {
					old = max(old, l.sent-at)
				}
				if later.sure {
					owing = max(owing, l.sent-later.acked)
				}
			}
			if age < 0 || old < age {
				age, owedAge = old, owing
			}
		}
		switch {
		case age < 0:
			c.wrong.Add(1)
			c.problem("replica %d at %v answered %q for %s, which was never true%s", l.replica, l.sent, l.url, l.s.code, l.s.history())
		case age > c.allowed:
			c.stale.Add(1)
			c.problem("replica %d at %v answered %q for %s, %v too old%s", l.replica, l.sent, l.url, l.s.code, age, l.s.history())
		}
		c.worst = max(c.worst, age)
		c.worstPending = max(c.worstPending, owedAge)
	}
	c.compared.Add(int64(len(looks)))
}

// history is what is known of s, for people.
func (s *subject) history() string {
	var b strings.Builder
	for _, v := range s.versions[max(0, len(s.versions)-6):] {
		fmt.Fprintf(&b, "\n\t\t%+v", *v)
	}
	return b.String()
}

// truth is what every code leads to, says PostgreSQL.
func (c *checker) truth() map[string]target {
	rows, err := c.db.Query(`SELECT short_code, id, original_url FROM urls WHERE ` + isLive)
	if err != nil {
		c.t.Fatal(err)
	}
	defer rows.Close()
	truth := map[string]target{}
	for rows.Next() {
		var code string
		t := target{location: []string{""}}
		if err := rows.Scan(&code, &t.id, &t.location[0]); err != nil {
			c.t.Fatal(err)
		}
		truth[code] = t
	}
	if rows.Err() != nil || len(truth) == 0 {
		c.t.Fatal("no truth: ", rows.Err())
	}
	return truth
}

// compare holds all that is cached against the truth: how many values it saw in Redis and locally, and how many holds or leases.
func (c *checker) compare(truth map[string]target) (inRedis, inLocal, vetoes int) {
	check := func(where, code string, got target) {
		want := truth[code]
		if got.id != want.id || want.id != 0 && got.location[0] != want.location[0] {
			c.left.Add(1)
			c.problem("wrong entry left in %s: %s leads to %v, in truth to %v", where, code, got, want)
		}
	}
	for i, p := range c.places {
		dormant := p.entries(func(code string, t target) {
			inLocal++
			check(fmt.Sprintf("the local tier of replica %d", i), code, t)
		})
		for code, t := range dormant {
			if want := truth[code]; t.id != want.id || want.id != 0 && t.location[0] != want.location[0] {
				c.dormant.Add(1)
			}
		}
	}
	conn, err := redis.DialURL(c.redis.url)
	if err != nil {
		c.t.Fatal(err)
	}
	defer conn.Close()
	for cursor := "0"; ; {
		page, err := redis.Values(conn.Do("SCAN", cursor, "MATCH", key("*"), "COUNT", 1000))
		if err != nil {
			c.t.Fatal(err)
		}
		cursor, _ = redis.String(page[0], nil)
		keys, _ := redis.Strings(page[1], nil)
		for _, k := range keys {
			value, err := redis.Bytes(conn.Do("GET", k))
			if err == redis.ErrNil {
				continue
			}
			if t, ok := decodeTarget(value); ok {
				inRedis++
				check("Redis", strings.TrimPrefix(k, key("")), t)
			} else {
				vetoes++
			}
		}
		if cursor == "0" {
			return inRedis, inLocal, vetoes
		}
	}
}

// settle waits until the holds of the last writes are gone, in which time everything cached must be true, and asks all replicas
// for all codes at the end.
func (c *checker) settle() {
	time.Sleep(max(0, c.allowed-c.sinceLastWrite()) + 50*time.Millisecond) // what a lost push may have left answers no longer than that
	truth := c.truth()
	var inRedis, inLocal, vetoes, sawLocal int
	for start := time.Now(); ; time.Sleep(250 * time.Millisecond) {
		before := c.left.Load()
		inRedis, inLocal, vetoes = c.compare(truth)
		sawLocal = max(sawLocal, inLocal)
		if vetoes == 0 || c.left.Load() > before {
			break
		}
		if time.Since(start) > holdTTL+leaseTTL {
			c.problem("%d holds and leases stand %v after the last write", vetoes, time.Since(start))
			break
		}
	}
	for _, s := range c.subjects {
		for i, p := range c.places {
			status, location, _, err := c.request("GET", p.url+"/"+s.code, nil)
			want := truth[s.code]
			if status == http.StatusServiceUnavailable && c.allowed > 0 {
				c.refused.Add(1)
				continue
			}
			if err != nil || want.id == 0 && status != http.StatusNotFound || want.id != 0 && (status != http.StatusFound || location != want.location[0]) {
				c.wrong.Add(1)
				c.problem("at the end replica %d answers %d %q for %s, in truth %v (%v)", i, status, location, s.code, want, err)
			}
		}
	}
	if c.left.Load() == 0 { // once more with all codes cached
		again, local, _ := c.compare(truth)
		inRedis, sawLocal = max(inRedis, again), max(sawLocal, local)
	}
	if inRedis == 0 || sawLocal == 0 && c.places[0].app != nil {
		c.problem("nothing was cached: %d in Redis, %d locally", inRedis, sawLocal)
	}
	c.t.Logf("%s: compared %d values in Redis and %d local entries; %d dormant ones were wrong", c.name, inRedis, sawLocal, c.dormant.Load())
}

// sinceLastWrite is how long ago the last write was acknowledged or repaid.
func (c *checker) sinceLastWrite() time.Duration {
	var last time.Duration
	for _, s := range c.subjects {
		v := s.versions[len(s.versions)-1]
		last = max(last, v.sent, v.acked, v.repaid)
	}
	return c.now() - last
}

// report prints the counts.
func (c *checker) report() {
	c.t.Logf("%-8s faults %3d, redirects checked %6d, writes %5d (slowest %v), maybe %3d, pending %3d, 503 %3d, worst staleness %.1f ms (pending: %.1f ms), "+
		"stale answers %d, wrong answers %d, wrong entries left %d", c.name, c.faults, c.compared.Load(), c.writes.Load(),
		time.Duration(c.slowest.Load()).Round(time.Millisecond), c.maybes.Load(), c.pendings.Load(), c.refused.Load(),
		float64(c.worst.Microseconds())/1000, float64(c.worstPending.Microseconds())/1000, c.stale.Load(), c.wrong.Load(), c.left.Load())
}

// ---- the faults ----

// pause waits between and to, or until stop: then it is false.
func pause(r *rand.Rand, between, to time.Duration, stop <-chan struct{}) bool {
	select {
	case <-time.After(between + time.Duration(r.Int64N(int64(to-between)))):
		return true
	case <-stop:
		return false
	}
}

var everyone = []int{0, 1, 2}

// killTracking kills the connections on which replicas hear invalidations.
func killTracking(c *checker, r *rand.Rand, stop <-chan struct{}) {
	conn, err := redis.DialURL(c.redis.url)
	if err != nil {
		c.problem("%v", err)
		return
	}
	defer conn.Close()
	for pause(r, 150*time.Millisecond, 700*time.Millisecond, stop) {
		list, err := redis.String(conn.Do("CLIENT", "LIST"))
		if err != nil {
			c.problem("%v", err)
			return
		}
		for line := range strings.Lines(list) {
			var id string
			var tracking bool
			for _, field := range strings.Fields(line) {
				if v, ok := strings.CutPrefix(field, "id="); ok {
					id = v
				}
				if v, ok := strings.CutPrefix(field, "flags="); ok {
					tracking = strings.ContainsAny(v, "tP")
				}
			}
			if tracking && r.IntN(3) > 0 { // often all of them, often not
				if _, err := conn.Do("CLIENT", "KILL", "ID", id); err == nil {
					c.faults++
				}
			}
		}
	}
}

// evict removes single keys, values as well as holds and leases, as a full Redis does. That is no fault: nothing may be stale.
func evict(c *checker, r *rand.Rand, stop <-chan struct{}) {
	conn, err := redis.DialURL(c.redis.url)
	if err != nil {
		c.problem("%v", err)
		return
	}
	defer conn.Close()
	for pause(r, time.Millisecond, 8*time.Millisecond, stop) {
		s, _, hot := c.pick(r)
		if r.IntN(4) > 0 {
			s = hot
		}
		if _, err := conn.Do("UNLINK", key(s.code)); err != nil {
			c.problem("%v", err)
			return
		}
		c.faults++
	}
}

// flushAll empties Redis.
func flushAll(c *checker, r *rand.Rand, stop <-chan struct{}) {
	conn, err := redis.DialURL(c.redis.url)
	if err != nil {
		c.problem("%v", err)
		return
	}
	defer conn.Close()
	for pause(r, 100*time.Millisecond, 600*time.Millisecond, stop) {
		if _, err := conn.Do("FLUSHALL"); err != nil {
			c.problem("%v", err)
			return
		}
		c.faults++
	}
}

// hangRedis stops Redis and lets it go on.
func hangRedis(c *checker, r *rand.Rand, stop <-chan struct{}) {
	for pause(r, 300*time.Millisecond, 1500*time.Millisecond, stop) {
		c.reach(false, everyone...)
		c.redis.signal(syscall.SIGSTOP)
		pause(r, 300*time.Millisecond, 3*time.Second, stop)
		c.redis.signal(syscall.SIGCONT)
		c.reach(true, everyone...)
	}
}

// restartRedis kills Redis and starts it again, empty.
func restartRedis(c *checker, r *rand.Rand, stop <-chan struct{}) {
	for pause(r, 300*time.Millisecond, 1500*time.Millisecond, stop) {
		c.reach(false, everyone...)
		c.redis.kill()
		pause(r, time.Millisecond, time.Second, stop)
		c.redis.start(c.t)
		c.redis.waitRedis(c.t)
		c.reach(true, everyone...)
	}
}

// cutOff withholds all bytes between one replica and Redis.
func cutOff(proxies []*proxy) fault {
	return func(c *checker, r *rand.Rand, stop <-chan struct{}) {
		for pause(r, 100*time.Millisecond, 1200*time.Millisecond, stop) {
			n := r.IntN(len(proxies))
			c.reach(false, n)
			proxies[n].cut()
			pause(r, 500*time.Millisecond, min(5*time.Second, c.length*3/4), stop) // short runs want more than one, too
			proxies[n].heal()
			c.reach(true, n)
		}
	}
}

// proxy passes TCP on, with delays, and not while it is cut: then it closes nothing and passes nothing, neither bytes nor ends.
type proxy struct {
	addr  string
	delay func(*rand.Rand) time.Duration
	mu    sync.Mutex
	open  chan struct{} // closed while bytes may pass
}

func startProxy(t testing.TB, upstream string, seed uint64, delay func(*rand.Rand) time.Duration) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	p := &proxy{addr: l.Addr().String(), delay: delay, open: make(chan struct{})}
	close(p.open)
	go func() {
		for n := seed << 32; ; n += 2 {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", upstream)
			if err != nil {
				near.Close()
				continue
			}
			go p.pump(far.(*net.TCPConn), near.(*net.TCPConn), rand.New(rand.NewPCG(n, 0)))
			go p.pump(near.(*net.TCPConn), far.(*net.TCPConn), rand.New(rand.NewPCG(n, 1)))
		}
	}()
	return p
}

func (p *proxy) cut() { p.mu.Lock(); p.open = make(chan struct{}); p.mu.Unlock() }
func (p *proxy) heal() {
	p.mu.Lock()
	close(p.open)
	p.mu.Unlock()
}

// pump copies one direction.
func (p *proxy) pump(dst, src *net.TCPConn, r *rand.Rand) {
	for buf := make([]byte, 32<<10); ; {
		n, err := src.Read(buf)
		time.Sleep(p.delay(r))
		p.mu.Lock()
		open := p.open
		p.mu.Unlock()
		<-open
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				src.Close()
				return
			}
		}
		if err != nil {
			dst.CloseWrite()
			if err != io.EOF {
				dst.Close()
			}
			return
		}
	}
}

// slowly makes every third packet late, so that what was read is old when it is used.
func slowly(r *rand.Rand) time.Duration {
	if r.IntN(3) > 0 {
		return 0
	}
	return time.Duration(r.Int64N(int64(12 * time.Millisecond)))
}

// ---- the tests ----

// oneAtATime keeps the faults apart, while the holds of those before expire.
var oneAtATime sync.Mutex

func TestFault16Coherence(t *testing.T) {
	if os.Getenv("DATABASE_URL") == "" {
		t.Setenv("DATABASE_URL", startPostgres(t).url)
	}
	t.Logf("-coherence.seed=%d", *coherenceSeed)
	for n, f := range []struct {
		name    string
		allowed time.Duration
		fault   fault
	}{
		{"none", 0, nil}, {"evicting", 0, evict}, {"clientkill", trustFor, killTracking}, {"flushall", trustFor, flushAll},
		{"paused", trustFor, hangRedis}, {"restarted", trustFor, restartRedis}, {"cutoff", trustFor, nil}, // its fault needs what checkHop makes
	} {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			oneAtATime.Lock()
			c := func() *checker {
				defer oneAtATime.Unlock()
				return checkHop(t, f.name, f.allowed, *coherenceSeed+uint64(n)<<32, f.fault)
			}()
			if len(c.problems) == 0 {
				c.settle()
			}
			c.report()
			c.verdict()
		})
	}
}

// verdict fails the test if anything was found.
func (c *checker) verdict() {
	for _, p := range c.problems[:min(len(c.problems), 12)] {
		c.t.Error(p)
	}
	if len(c.problems) > 12 {
		c.t.Errorf("and %d more", len(c.problems)-12)
	}
	if c.t.Failed() {
		for i, p := range c.places {
			if p.app != nil {
				var lines []string
				for line := range strings.Lines(p.app.logs.String()) {
					if !strings.Contains(line, "msg=request") || strings.Contains(line, "status=50") {
						lines = append(lines, line)
					}
				}
				c.t.Logf("replica %d:\n%s", i, strings.Join(lines[max(0, len(lines)-40):], ""))
			}
		}
	}
}

// checkHop runs the checker over three replicas of hop, up to the judgement of all redirects.
func checkHop(t *testing.T, name string, allowed time.Duration, seed uint64, f fault) *checker {
	dsn, rds := testDatabase(t), startRedis(t)
	c := newChecker(t, name, allowed, dsn, rds)
	var proxies []*proxy
	for n := range everyone {
		slow, at := dsn, rds.url
		if u, err := url.Parse(dsn); err == nil && u.Hostname() != "" {
			port := u.Port()
			if port == "" {
				port = "5432"
			}
			u.Host = startProxy(t, net.JoinHostPort(u.Hostname(), port), seed+uint64(n), slowly).addr
			slow = u.String()
		}
		if allowed > 0 { // else what Redis tells comes as late as the delay
			p := startProxy(t, fmt.Sprintf("127.0.0.1:%d", rds.port), seed, slowly)
			proxies, at = append(proxies, p), "redis://"+p.addr+"/0"
		}
		a := startApp(t, "DATABASE_URL="+slow, "REDIS_URL="+at, "CLICK_EVENTS=off", "LOG_LEVEL=info")
		c.places = append(c.places, &place{url: a.url, app: a, entries: a.localEntries})
	}
	if name == "cutoff" {
		f = cutOff(proxies)
	}
	for start := time.Now(); slices.ContainsFunc(c.places, func(p *place) bool { return !p.app.cache.redis.up.Load() || p.app.cache.local.len() == 0 }); {
		if time.Sleep(5 * time.Millisecond); time.Since(start) > 5*time.Second {
			c.problem("not all replicas trust Redis and are warm after %v", time.Since(start))
			return c
		}
	}
	c.run(coherenceTime(3*time.Second), seed, f)
	c.judge()
	return c
}

// localEntries are the place's entries of hop.
func (a *app) localEntries(fn func(code string, t target)) map[string]target {
	l, now, dormant := a.cache.local, time.Now(), map[string]target{}
	for i := range l.shards {
		l.shards[i].mu.RLock()
		entries := make(map[string]target, len(l.shards[i].entries))
		for code, e := range l.shards[i].entries {
			entries[code] = e.target
		}
		l.shards[i].mu.RUnlock()
		for code, t := range entries {
			if fresh, ok := l.get(code, now); ok {
				fn(code, fresh)
			} else {
				dormant[code] = t
			}
		}
	}
	return dormant
}

// TestCheckerConvictsNaiveCache shows that the checker can find what it looks for: in the usual design, no fault needed.
func TestCheckerConvictsNaiveCache(t *testing.T) {
	if os.Getenv("DATABASE_URL") == "" {
		t.Setenv("DATABASE_URL", startPostgres(t).url)
	}
	for name, localTTL := range map[string]time.Duration{"redis only": 0, "local map": 30 * time.Second} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dsn, rds := testDatabase(t), startRedis(t)
			c := newChecker(t, name, 0, dsn, rds)
			for n := range everyone {
				s := newNaive(openDB(t, dsn), rds.url, localTTL, uint64(n))
				h := httptest.NewServer(s)
				t.Cleanup(func() { h.Close(); s.pool.Close() })
				c.places = append(c.places, &place{url: h.URL, entries: s.entries})
			}
			for round := uint64(0); round < 20 && (c.stale.Load() == 0 || c.left.Load() == 0); round++ {
				c.run(500*time.Millisecond, *coherenceSeed+round, nil)
				c.judge()
				c.compare(c.truth()) // nobody writes now, so what is wrong stays wrong
			}
			c.report()
			if c.wrong.Load() > 0 {
				t.Errorf("%d answers that were never true: the checker lost count", c.wrong.Load())
			}
			if c.stale.Load() == 0 {
				t.Error("no stale answer found")
			}
			if c.left.Load() == 0 {
				t.Error("no wrong entry found")
			}
		})
	}
}

// TestCoherenceAcrossReconnects: what was filled while nobody listened for changes must not be trusted when somebody does again.
func TestCoherenceAcrossReconnects(t *testing.T) {
	rds := startRedis(t)
	a := startApp(t, "REDIS_URL="+rds.url)
	tier, local := a.cache.redis, a.cache.local
	eventually(t, 5*time.Second, "redis is trusted", tier.up.Load)
	conn, err := redis.DialURL(rds.url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	epoch := local.epoch.Load()
	if n, err := redis.Int(conn.Do("CLIENT", "KILL", "TYPE", "pubsub")); n != 1 || err != nil {
		t.Fatalf("killed %d tracking connections, error %v", n, err)
	}
	eventually(t, time.Second, "the loss is noticed", func() bool { return local.epoch.Load() > epoch })
	// A read that began now, as that of fillLocal or of a miss which looked at up just before, finds what may change unheard.
	put := func() {
		local.put("between", target{id: 1, location: []string{"https://example.com/"}}, local.generation("between"), localTTL, true)
	}
	put()
	eventually(t, 5*time.Second, "redis is trusted again", tier.up.Load)
	if _, ok := local.get("between", time.Now()); ok {
		t.Error("an entry from before the connection is answered")
	}
	put()
	if _, ok := local.get("between", time.Now()); !ok {
		t.Error("an entry from after it is not")
	}
}

// TestCoherenceOwedBeforeDropped: between the two a miss could fill the old value from a Redis that is trusted and not held.
func TestCoherenceOwedBeforeDropped(t *testing.T) {
	rds := startRedis(t)
	a := startApp(t, "REDIS_URL="+rds.url)
	tier := a.cache.redis
	eventually(t, 5*time.Second, "redis is trusted", tier.up.Load)
	dropped, owed := 0, 0
	forget := a.cache.local.onDrop
	a.cache.local.onDrop = func(code string) {
		if code == "changed" {
			dropped++
			tier.mu.Lock()
			if _, ok := tier.owed[code]; ok {
				owed++
			}
			tier.mu.Unlock()
		}
		forget(code)
	}
	rds.kill()
	pending, err := a.cache.change([]string{"changed"}, func() error { return nil })
	if !pending || err != nil || dropped != 1 || owed != 1 {
		t.Errorf("pending %v, error %v, dropped %d times, of those owed %d", pending, err, dropped, owed)
	}
}

// naive is the usual design: SET NX after reading PostgreSQL, DEL after the commit, and a local map with a TTL.
type naive struct {
	*http.ServeMux
	db   *sql.DB
	pool *redis.Pool
	ttl  time.Duration

	mu    sync.Mutex
	rand  *rand.Rand
	local map[string]naiveEntry
}

type naiveEntry struct {
	t     target
	until time.Time
}

func newNaive(db *sql.DB, redisURL string, ttl time.Duration, seed uint64) *naive {
	n := &naive{ServeMux: http.NewServeMux(), db: db, ttl: ttl, rand: rand.New(rand.NewPCG(seed, 0)), local: map[string]naiveEntry{}}
	n.pool = &redis.Pool{MaxIdle: 16, Dial: func() (redis.Conn, error) { return redis.DialURL(redisURL) }}
	n.HandleFunc("GET /{code}", n.redirect)
	n.HandleFunc("POST /shorten", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			URL  string `json:"original_url"`
			Code string `json:"custom_code"`
		}
		json.NewDecoder(r.Body).Decode(&in)
		if in.Code == "" {
			in.Code = newCode()
		}
		n.change(w, http.StatusCreated, `INSERT INTO urls (short_code, original_url, created_at, updated_at) VALUES ($1, $2, now(), now())`, in.Code, in.URL)
	})
	n.HandleFunc("PUT /urls/{id}", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			URL      *string `json:"original_url"`
			IsActive *bool   `json:"is_active"`
		}
		json.NewDecoder(r.Body).Decode(&in)
		n.change(w, http.StatusOK, `UPDATE urls SET original_url = COALESCE($2, original_url), is_active = COALESCE($3, is_active) WHERE id = $1`,
			r.PathValue("id"), in.URL, in.IsActive)
	})
	n.HandleFunc("DELETE /urls/{id}", func(w http.ResponseWriter, r *http.Request) {
		n.change(w, http.StatusNoContent, `UPDATE urls SET deleted_at = now() WHERE id = $1`, r.PathValue("id"))
	})
	return n
}

// dawdle makes the usual races likely.
func (n *naive) dawdle() {
	n.mu.Lock()
	d := time.Duration(n.rand.Int64N(int64(30 * time.Millisecond)))
	n.mu.Unlock()
	time.Sleep(d)
}

func (n *naive) redirect(w http.ResponseWriter, r *http.Request) {
	code := r.PathValue("code")
	n.mu.Lock()
	e, ok := n.local[code]
	n.mu.Unlock()
	if ok && time.Now().Before(e.until) {
		n.answer(w, e.t)
		return
	}
	conn := n.pool.Get()
	defer conn.Close()
	value, _ := redis.Bytes(conn.Do("GET", key(code)))
	t, ok := decodeTarget(value)
	if !ok {
		t = target{location: []string{""}}
		if n.db.QueryRow(`SELECT id, original_url FROM urls WHERE short_code = $1 AND `+isLive, code).Scan(&t.id, &t.location[0]) != nil {
			t = target{}
		}
		n.dawdle()
		value, ttl := encodeTarget(t)
		conn.Do("SET", key(code), value, "NX", "PX", ttl)
	}
	n.mu.Lock()
	n.local[code] = naiveEntry{t, time.Now().Add(n.ttl)}
	n.mu.Unlock()
	n.answer(w, t)
}

func (n *naive) answer(w http.ResponseWriter, t target) {
	if t.id == 0 {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Location", t.location[0])
	w.WriteHeader(http.StatusFound)
}

func (n *naive) change(w http.ResponseWriter, status int, query string, args ...any) {
	var l link
	err := n.db.QueryRowContext(context.Background(), query+` RETURNING `+linkCols, args...).Scan(linkDest(&l)...)
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	conn := n.pool.Get()
	defer conn.Close()
	conn.Do("DEL", key(l.ShortCode))
	n.mu.Lock()
	delete(n.local, l.ShortCode)
	n.mu.Unlock()
	w.WriteHeader(status)
	if status != http.StatusNoContent {
		json.NewEncoder(w).Encode(l)
	}
}

func (n *naive) entries(fn func(string, target)) map[string]target {
	n.mu.Lock()
	defer n.mu.Unlock()
	for code, e := range n.local {
		if time.Now().Before(e.until) {
			fn(code, e.t)
		}
	}
	return nil
}
