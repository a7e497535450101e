package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The cache over a PostgreSQL that a test drives by hand, since what matters is who asks when. With
// a real Redis between them: redis_test.go, poll_test.go and warm_test.go.

// inTime is how long a test lets a promise of answerWithin take: other tests run beside it.
const inTime = answerWithin + 450*time.Millisecond

// TestFlightsAreShared lets 200 requests miss one code at once: they share a question.
func TestFlightsAreShared(t *testing.T) {
	const requests = 200
	pg := newFakeSource("abc")
	gate := make(chan struct{})
	pg.answers(nil, gate)
	c := newCache(nil, newLocalTier(640), pg)
	var all sync.WaitGroup
	for range requests {
		all.Go(func() {
			got, err := c.resolve(t.Context(), "abc", time.Now())
			if err != nil || got.id != 1 {
				t.Errorf("resolve = %+v, %v", got, err)
			}
		})
	}
	eventually(t, patience, "all wait", func() bool { return c.waiting.n.Load() == requests })
	close(gate)
	all.Wait()
	// Some may have come to the gate only when the first flight had landed.
	if asked := pg.asked.Load(); asked > requests/20 || c.misses.Load() != asked {
		t.Errorf("PostgreSQL is asked %d times, %d misses are counted", asked, c.misses.Load())
	}
	if len(c.flights) != 0 || c.waiting.n.Load() != 0 {
		t.Errorf("%d flights and %d waiters are left", len(c.flights), c.waiting.n.Load())
	}
}

// TestCacheWithoutRedis is a replica that polls PostgreSQL and has no Redis.
func TestCacheWithoutRedis(t *testing.T) {
	pg := newFakeSource("abc")
	c := newCache(nil, newLocalTier(640), pg)
	start := time.Now()
	steps := []struct {
		code  string
		after time.Duration
		poll  bool
		asked int64 // PostgreSQL is asked so often
		id    int64
	}{
		{code: "abc", poll: true, asked: 1, id: 1},
		{code: "abc", asked: 0, id: 1},
		{code: "none", asked: 1},
		{code: "none", asked: 0},
		{code: "none", after: aloneTTL + time.Second, asked: 1},
		{code: "abc", after: 20 * time.Second, poll: true, asked: 0, id: 1},
		{code: "abc", after: 20*time.Second + trustFor, asked: 1, id: 1},
	}
	for i, step := range steps {
		now := start.Add(step.after)
		if step.poll {
			c.local.vouch(now)
		}
		before := pg.asked.Load()
		got, err := c.resolve(t.Context(), step.code, now)
		asked := pg.asked.Load() - before
		if err != nil || got.id != step.id || asked != step.asked {
			t.Errorf("step %d, %s after %v: %+v, %v, asked %d times, want %d times",
				i, step.code, step.after, got, err, asked, step.asked)
		}
	}
	if c.hits.Load() != 3 || c.misses.Load() != 4 || c.unknown.Load() != 2 {
		t.Errorf("%d hits, %d misses, %d unknown; want 3, 4, 2",
			c.hits.Load(), c.misses.Load(), c.unknown.Load())
	}
	if c.created([]string{"abc"}) || c.created(nil) {
		t.Error("a creation is called pending though there is no Redis to tell")
	}
}

// TestWhenSourceFails answers with what was true lately, never with a 404 that nobody vouches for.
func TestWhenSourceFails(t *testing.T) {
	pg := newFakeSource("known", "gone")
	c := newCache(nil, newLocalTier(640), pg)
	start := time.Now()
	c.local.vouch(start)
	for _, code := range []string{"known", "none", "gone"} {
		if _, err := c.resolve(t.Context(), code, start); err != nil {
			t.Fatal(err)
		}
	}
	c.local.drop("gone")
	pg.set("known", 9) // so that an answer from PostgreSQL would show
	tests := []struct {
		name   string
		code   string
		after  time.Duration
		hangs  bool
		stale  bool
		served bool
	}{
		{name: "fresh", code: "known", served: true},
		{name: "stale", code: "known", after: time.Minute, stale: true, served: true},
		{name: "nearly too stale", code: "known", after: staleFor - time.Second, stale: true,
			served: true},
		{name: "too stale", code: "known", after: staleFor},
		{name: "never seen", code: "new", after: time.Minute},
		{name: "a 404 of long ago", code: "none", after: time.Minute},
		{name: "dropped", code: "gone"},
		{name: "stale, PostgreSQL hangs", code: "known", after: time.Minute, hangs: true,
			stale: true, served: true},
		{name: "never seen, PostgreSQL hangs", code: "new", after: time.Minute, hangs: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			pg.answers(errUnavailable, nil)
			if tt.hangs {
				gate := make(chan struct{})
				defer close(gate)
				pg.answers(errUnavailable, gate)
			}
			stales := c.stales.Load()
			began := time.Now()
			got, err := c.resolve(t.Context(), tt.code, start.Add(tt.after))
			took := time.Since(began)
			if tt.served && (err != nil || got.id != 1) {
				t.Errorf("resolve = %+v, %v; want what was known", got, err)
			}
			if !tt.served && !errors.Is(err, errUnavailable) {
				t.Errorf("resolve = %+v, %v; want %v", got, err, errUnavailable)
			}
			if counted := c.stales.Load() > stales; counted != tt.stale {
				t.Errorf("counted as stale: %v, want %v", counted, tt.stale)
			}
			if took > inTime {
				t.Errorf("answered after %v", took)
			}
		})
	}
}

// TestOwnChangeNeedsNoHold loses the hold of a change, and has Redis get the old target from a read
// that was older: the replica that made the change does not believe it.
func TestOwnChangeNeedsNoHold(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	c := newReplica(t, server, newFakeSource())
	c.pg.set("abc", 1)
	c.resolves(t, "abc", 1, 1)
	old, _ := encodeTarget(linkTo(1))
	if _, err := c.change("abc", func() error {
		c.pg.set("abc", 2)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	say("SET", c.key("abc"), old)
	c.resolves(t, "abc", 2, 1)
	eventually(t, patience, "Redis is believed again", func() bool { return !c.changedHere("abc") })
}

// TestRefusedCreatesTouchNothing asks for codes that are taken, all in one: what is known of them
// stays known, and nobody asks PostgreSQL for it.
func TestRefusedCreatesTouchNothing(t *testing.T) {
	a := startApp(t, "REDIS_URL="+testRedis(t))
	var items []string
	for n := range maxBulk {
		items = append(items, fmt.Sprintf(
			`{"original_url":"https://a.example/","custom_code":"taken%d"}`, n))
	}
	body := "[" + strings.Join(items, ",") + "]"
	const misses = "hop_cache_misses_total"
	follow := func() float64 { // returns how many of them asked PostgreSQL
		t.Helper()
		before := scrape(t, a.url)[misses]
		for n := range maxBulk {
			if r := do(t, "GET", fmt.Sprintf("%s/taken%d", a.url, n), ""); r.status != 302 {
				t.Fatalf("taken%d: %d", n, r.status)
			}
		}
		return scrape(t, a.url)[misses] - before
	}
	made := do(t, "POST", a.url+"/urls/bulk", body).body
	// The next poll drops what was made, once more: nothing is asked for twice in a row.
	quiet := 0
	eventually(t, patience, "all are known", func() bool {
		quiet++
		if follow() != 0 {
			quiet = 0
		}
		return quiet == 2
	})
	refused := do(t, "POST", a.url+"/urls/bulk", body).body
	if strings.Count(made, `"status":201`) != maxBulk ||
		strings.Count(refused, `"status":409`) != maxBulk {
		t.Fatalf("made %.200s, refused %.200s", made, refused)
	}
	if asked := follow(); asked != 0 {
		t.Errorf("%v redirects asked PostgreSQL", asked)
	}
}

// TestMissesAreLimited fills the room for those who wait for misses: more are refused at once, warm
// codes are not.
func TestMissesAreLimited(t *testing.T) {
	pg := newFakeSource("warm", "a", "b", "c")
	c := newCache(nil, newLocalTier(640), pg)
	c.waiting.max = 2
	now := time.Now()
	c.local.vouch(now)
	resolve := func(code string) error {
		got, err := c.resolve(t.Context(), code, now)
		if err == nil && got.id == 0 {
			t.Errorf("%s leads nowhere", code)
		}
		return err
	}
	if err := resolve("warm"); err != nil {
		t.Fatal(err)
	}
	gate := make(chan struct{})
	pg.answers(nil, gate)
	var two sync.WaitGroup
	for _, code := range []string{"a", "b"} {
		two.Go(func() {
			if err := resolve(code); err != nil {
				t.Errorf("%s: %v", code, err)
			}
		})
	}
	eventually(t, patience, "two wait", func() bool { return c.waiting.n.Load() == 2 })
	if err := resolve("c"); err != errOverloaded {
		t.Errorf("the third is told %v, want %v", err, errOverloaded)
	}
	if err := resolve("warm"); err != nil {
		t.Errorf("the warm code: %v", err)
	}
	close(gate)
	two.Wait()
	if err := resolve("c"); err != nil {
		t.Errorf("when there is room again: %v", err)
	}
}

// TestClientGone has a client that leaves while its miss is under way: it is let go, and the flight
// goes on for others.
func TestClientGone(t *testing.T) {
	pg := newFakeSource("abc")
	gate := make(chan struct{})
	pg.answers(nil, gate)
	c := newCache(nil, newLocalTier(640), pg)
	c.local.vouch(time.Now())
	ctx, leave := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() {
		_, err := c.resolve(ctx, "abc", time.Now())
		gone <- err
	}()
	eventually(t, patience, "it waits", func() bool { return pg.asked.Load() == 1 })
	leave()
	if err := <-gone; !errors.Is(err, errUnavailable) {
		t.Errorf("who left is told %v", err)
	}
	close(gate)
	eventually(t, patience, "the flight has landed", func() bool {
		return c.local.find("abc") != nil
	})
	if got, err := c.resolve(t.Context(), "abc", time.Now()); err != nil || got.id != 1 {
		t.Errorf("the next one gets %+v, %v", got, err)
	}
	if asked := pg.asked.Load(); asked != 1 {
		t.Errorf("PostgreSQL is asked %d times", asked)
	}
}

// TestChangeDuringFlight changes a code while a reader fetches its old target. Who asks after the
// change gets the new one, and the old one is not kept.
func TestChangeDuringFlight(t *testing.T) {
	failed := errors.New("no commit, or an answer that was lost")
	for _, commit := range []error{nil, failed} {
		pg := newFakeSource("abc")
		c := newCache(nil, newLocalTier(640), pg)
		c.local.vouch(time.Now())
		gate := make(chan struct{})
		pg.answers(nil, gate)
		before := make(chan int64, 1)
		go func() {
			got, _ := c.resolve(t.Context(), "abc", time.Now())
			before <- got.id
		}()
		eventually(t, patience, "it has read", func() bool { return pg.asked.Load() == 1 })
		pending, err := c.change("abc", func() error {
			pg.set("abc", 2)
			return commit
		})
		if pending || err != commit {
			t.Errorf("change = %v, %v; want false, %v", pending, err, commit)
		}
		pg.answers(nil, nil)
		if got, err := c.resolve(t.Context(), "abc", time.Now()); err != nil || got.id != 2 {
			t.Errorf("the first after the change gets %+v, %v", got, err)
		}
		close(gate)
		if id := <-before; id != 1 {
			t.Errorf("the reader from before gets %d", id)
		}
		if got, err := c.resolve(t.Context(), "abc", time.Now()); err != nil || got.id != 2 {
			t.Errorf("later: %+v, %v", got, err)
		}
		if asked := pg.asked.Load(); asked != 2 {
			t.Errorf("PostgreSQL is asked %d times, want 2", asked)
		}
	}
}

// TestCacheOverRedis follows codes through two replicas that share a Redis.
func TestCacheOverRedis(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	pg := newFakeSource("known")
	a := newReplica(t, server, pg)
	b := newReplica(t, server, pg)
	a.resolves(t, "known", 1, 1)
	a.resolves(t, "known", 1, 0)
	b.resolves(t, "known", 1, 0) // from Redis
	a.resolves(t, "none", 0, 1)
	b.resolves(t, "none", 0, 0)
	if a.misses.Load() != 2 || b.misses.Load() != 0 || b.redisHits.Load() != 2 {
		t.Errorf("%d misses of a, %d of b, %d of b's lookups answered by Redis; want 2, 0, 2",
			a.misses.Load(), b.misses.Load(), b.redisHits.Load())
	}
	checkTTL(t, say, a.key("known"), valueTTL*8/10, valueTTL*11/10)
	checkTTL(t, say, a.key("none"), unknownTTL*8/10, unknownTTL)

	t.Run("a link about to expire", func(t *testing.T) {
		soon := time.Now().Add(20 * time.Second).Unix()
		pg.setTarget("soon", target{8, []string{"https://a.example/"}, soon})
		a.resolves(t, "soon", 8, 1)
		checkTTL(t, say, a.key("soon"), 5*time.Second, 20*time.Second)
		if got, err := b.resolve(t.Context(), "soon", time.Now()); err != nil || got.expires != soon {
			t.Errorf("through Redis it is %+v, %v; want its end at %d", got, err, soon)
		}
		now := time.Unix(soon, 0)
		if got, _ := b.local.get("soon", time.Now()); got.live(now.Unix()) {
			t.Error("it is live at its end")
		}
	})
	t.Run("what is not ours", func(t *testing.T) {
		pg.set("foreign", 7)
		say("SET", a.key("foreign"), "https://evil.example/")
		a.resolves(t, "foreign", 7, 1)
		say("DEL", a.key("foreign"))
		say("RPUSH", a.key("foreign"), "a list")
		b.resolves(t, "foreign", 7, 1)
		if kind := fmt.Sprint(say("TYPE", a.key("foreign"))); kind != "list" {
			t.Errorf("another program's list has become a %s", kind)
		}
	})
	t.Run("guessers", func(t *testing.T) {
		a.unknownFills.rate = 0 // all of this second's are spent
		if _, err := a.resolve(t.Context(), "guess", time.Now()); err != nil {
			t.Fatal(err)
		}
		value := ""
		eventually(t, patience, "the reservation ends", func() bool {
			value = text(say("GET", a.key("guess")))
			return !strings.HasPrefix(value, "?")
		})
		if value != "" {
			t.Errorf("Redis keeps %q for a guess beyond the budget", value)
		}
	})
}

// TestRedisDies takes Redis away and gives it back: all is answered meanwhile, and what changed is
// held before Redis is read again.
func TestRedisDies(t *testing.T) {
	server := startRedis(t)
	pg := newFakeSource("known", "other")
	c := newReplica(t, server.url, pg)
	c.resolves(t, "known", 1, 1)
	key := c.key("known")
	server.kill()
	c.resolves(t, "other", 1, 1)
	if c.redis.usable() {
		t.Error("a dead Redis is called usable")
	}
	c.poll()
	c.resolves(t, "known", 1, 0) // the poll vouches for it, Redis or not
	pending, err := c.change("known", func() error {
		pg.change("known", 2)
		return nil
	})
	if !pending || err != nil {
		t.Errorf("a change without Redis = %v, %v; want true, nil", pending, err)
	}
	c.resolves(t, "known", 2, 1)
	c.resolves(t, "known", 2, 0)
	if !c.created([]string{"custom"}) {
		t.Error("a creation without Redis is not pending")
	}

	server.start(t)
	server.waitRedis(t)
	c.poll()
	if !c.redis.usable() {
		t.Fatal("Redis is back and is not used")
	}
	if c.key("known") == key {
		t.Error("an empty Redis has the generation of before")
	}
	pending, err = c.change("known", func() error { return nil })
	if pending || err != nil {
		t.Errorf("a change with Redis = %v, %v; want false, nil", pending, err)
	}
}

// TestNoRedisEver has a Redis in the settings that was never there, and none at all.
func TestNoRedisEver(t *testing.T) {
	var none *redisTier
	none.know("database")
	if none.usable() || none.takeWarmUp() || !none.hold([]string{"abc"}) {
		t.Error("no Redis at all is usable, or cannot be told")
	}
	pg := newFakeSource("known")
	r := openTier(t, fmt.Sprintf("redis://127.0.0.1:%d", freePort(t)))
	c := newCache(r, newLocalTier(640), pg)
	r.know("database")
	newPoller(c).poll(t.Context())
	for range 2 {
		got, err := c.resolve(t.Context(), "known", time.Now())
		if err != nil || got.id != 1 || r.usable() {
			t.Errorf("resolve = %+v, %v; usable %v", got, err, r.usable())
		}
	}
	if asked := pg.asked.Load(); asked != 1 {
		t.Errorf("PostgreSQL is asked %d times, want once: its poll vouches for the answer", asked)
	}
	if pending, err := c.change("known", func() error { return nil }); !pending || err != nil {
		t.Errorf("change = %v, %v; want true, nil", pending, err)
	}
}

// ---- helpers ----

// fakeSource is the PostgreSQL of these tests.
type fakeSource struct {
	asked atomic.Int64 // codes that were asked for

	mu      sync.Mutex // guards what follows
	known   map[string]target
	err     error
	gate    chan struct{} // targets has read, and answers when this is closed; nil: at once
	log     []changedCode // what polls find
	xid     uint64        // of the next change
	oldest  uint64        // transaction that goes on, before which polls cannot move; 0: none
	server  string
	pollErr error
	onPoll  func() // called after a poll has read
	polls   []uint64
	newest  func(below int64, n int) ([]codeTarget, error)
}

// newFakeSource knows codes, under id 1.
func newFakeSource(codes ...string) *fakeSource {
	f := &fakeSource{known: map[string]target{}, xid: 100, server: "server", onPoll: func() {}}
	for _, code := range codes {
		f.set(code, 1)
	}
	return f
}

// setTarget lets code lead to t, without a trace in the log.
func (f *fakeSource) setTarget(code string, t target) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.known[code] = t
}

// set is setTarget with any target of that id.
func (f *fakeSource) set(code string, id int64) { f.setTarget(code, linkTo(id)) }

// change lets code lead to another target, as a commit does.
func (f *fakeSource) change(code string, id int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.known[code] = linkTo(id)
	f.log = append(f.log, changedCode{code, f.xid})
	f.xid++
}

// answers says what becomes of questions from now on: err, or if that is nil an answer. With a gate
// they have read, and wait until it is closed.
func (f *fakeSource) answers(err error, gate chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
	f.gate = gate
}

// polled says what becomes of polls from now on.
func (f *fakeSource) polled(server string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.server = server
	f.pollErr = err
}

// keepCursor lets a transaction go on, from xid, that polls must look back to.
func (f *fakeSource) keepCursor(xid uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.oldest = xid
}

// targets makes fakeSource a linkSource.
func (f *fakeSource) targets(_ context.Context, codes []string) ([]codeTarget, error) {
	f.mu.Lock()
	var found []codeTarget
	for _, code := range codes {
		if t, ok := f.known[code]; ok {
			found = append(found, codeTarget{code, t})
		}
	}
	gate := f.gate
	err := f.err
	f.mu.Unlock()
	f.asked.Add(int64(len(codes)))
	if gate != nil {
		<-gate
	}
	return found, err
}

// newestTargets makes fakeSource a linkSource.
func (f *fakeSource) newestTargets(_ context.Context, below int64, n int) ([]codeTarget, error) {
	return f.newest(below, n)
}

// changesSince makes fakeSource a linkSource.
func (f *fakeSource) changesSince(_ context.Context, since uint64) (changes, error) {
	f.mu.Lock()
	found := changes{server: f.server, next: f.xid}
	if f.oldest != 0 {
		found.next = f.oldest
	}
	for _, change := range f.log {
		if change.xid >= since {
			found.codes = append(found.codes, change)
		}
	}
	f.polls = append(f.polls, since)
	err := f.pollErr
	onPoll := f.onPoll
	f.mu.Unlock()
	onPoll()
	if err != nil && !errors.Is(err, errManyChanges) {
		return changes{}, err
	}
	return found, err
}

// replica is a cache over Redis and a fake PostgreSQL, which polls when the test says so.
type replica struct {
	*Cache
	pg     *fakeSource
	poller *poller
}

// newReplica has polled once, and uses its Redis.
func newReplica(t testing.TB, redisURL string, pg *fakeSource) *replica {
	t.Helper()
	tier := openTier(t, redisURL)
	tier.know("database")
	c := newCache(tier, newLocalTier(6400), pg)
	r := &replica{Cache: c, pg: pg, poller: newPoller(c)}
	r.poll()
	if !tier.usable() {
		t.Fatal("Redis is there and is not used")
	}
	return r
}

// poll polls once.
func (r *replica) poll() { r.poller.poll(context.Background()) }

// key is the key of a code in the replica's generation.
func (r *replica) key(code string) string { return r.redis.names.Load().code(code) }

// resolves asks for code, and expects an id (0: nowhere) after so many questions to PostgreSQL. It
// returns when Redis is filled.
func (r *replica) resolves(t testing.TB, code string, id, asked int64) {
	t.Helper()
	before := r.pg.asked.Load()
	got, err := r.resolve(t.Context(), code, time.Now())
	n := r.pg.asked.Load() - before
	if err != nil || got.id != id || n != asked {
		t.Errorf("%s leads to %+v, %v after %d questions; want id %d after %d",
			code, got, err, n, id, asked)
	}
	if !r.redis.usable() {
		return
	}
	eventually(t, patience, code+" is no longer reserved", func() bool {
		value, err := r.redis.get(t.Context(), code)
		return err != nil || len(value) == 0 || value[0] != '?'
	})
}

// openTier opens a tier that is quiet.
func openTier(t testing.TB, redisURL string) *redisTier {
	t.Helper()
	options, err := redisConfig(redisURL)
	if err != nil {
		t.Fatal(err)
	}
	r := openRedis(options, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { r.pool.Close() })
	return r
}
