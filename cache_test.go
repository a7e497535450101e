package main

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The cache without Redis, over a fake PostgreSQL. With Redis: redis_test.go.

// TestCacheCoalesces lets 500 requests miss one code at once: PostgreSQL is asked once.
func TestCacheCoalesces(t *testing.T) {
	const requests = 500
	pg := newFakeLoad("abc")
	block := make(chan struct{})
	pg.answer(nil, block)
	c := newCache(nil, newLocalTier(640), pg.load)
	var all sync.WaitGroup
	for range requests {
		all.Go(func() {
			if got, err := c.resolve("abc", time.Now()); err != nil || got.id != 1 {
				t.Errorf("resolve = %+v, %v", got, err)
			}
		})
	}
	eventually(t, 5*time.Second, "all wait", func() bool { return c.waiting.n.Load() == requests })
	close(block)
	all.Wait()
	if n := pg.loads.Load(); n != 1 || c.misses.Load() != 1 || len(c.flights) != 0 || c.waiting.n.Load() != 0 {
		t.Errorf("%d loads, %d misses, %d flights left, %d still waiting; want 1, 1, 0, 0", n, c.misses.Load(), len(c.flights), c.waiting.n.Load())
	}
}

// TestCacheAlone is a replica without Redis: what it loaded, found or not, it answers itself for localAlone and no longer.
func TestCacheAlone(t *testing.T) {
	pg := newFakeLoad("abc")
	c := newCache(nil, newLocalTier(640), pg.load)
	for _, code := range []string{"abc", "unknown"} {
		before := pg.loads.Load()
		for _, step := range []struct {
			after time.Duration
			loads int64
		}{{0, 1}, {0, 1}, {localAlone / 2, 1}, {localAlone + time.Minute, 2}} {
			got, err := c.resolve(code, time.Now().Add(step.after))
			if err != nil || (got.id != 0) != (code == "abc") || pg.loads.Load()-before != step.loads {
				t.Errorf("%s after %v: %+v, %v and %d loads, want %d", code, step.after, got, err, pg.loads.Load()-before, step.loads)
			}
		}
	}
	if c.sentinels.Load() != 2 || c.misses.Load() != 4 || c.hits.Load() != 4 {
		t.Errorf("%d not found, %d misses, %d hits; want 2, 4, 4", c.sentinels.Load(), c.misses.Load(), c.hits.Load())
	}
}

// TestCacheWhenLoadFails answers with what was true lately, never with a 404 that nobody vouches for.
func TestCacheWhenLoadFails(t *testing.T) {
	pg := newFakeLoad("known", "gone")
	c := newCache(nil, newLocalTier(640), pg.load)
	for _, code := range []string{"known", "unknown", "gone"} {
		if _, err := c.resolve(code, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	c.local.drop("gone")
	pg.set("known", 9) // so that an answer from PostgreSQL would show
	for _, tt := range []struct {
		name   string
		code   string
		after  time.Duration
		hang   bool
		stale  bool
		served bool
	}{
		{"fresh", "known", 0, false, false, true},
		{"stale", "known", time.Minute, false, true, true},
		{"nearly too stale", "known", staleFor - time.Second, false, true, true},
		{"too stale", "known", staleFor + time.Minute, false, false, false},
		{"never seen", "new", time.Minute, false, false, false},
		{"a 404 that has gone stale", "unknown", time.Minute, false, false, false},
		{"dropped", "gone", 0, false, false, false},
		{"stale, PostgreSQL hangs", "known", time.Minute, true, true, true},
		{"never seen, PostgreSQL hangs", "new", time.Minute, true, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pg.answer(errUnavailable, nil)
			if tt.hang {
				block := make(chan struct{})
				defer close(block)
				pg.answer(errUnavailable, block)
			}
			stales, start := c.stales.Load(), time.Now()
			got, err := c.resolve(tt.code, start.Add(tt.after))
			if tt.served && (err != nil || got.id != 1) || !tt.served && !errors.Is(err, errUnavailable) {
				t.Errorf("resolve = %+v, %v; want it served: %v", got, err, tt.served)
			}
			if (c.stales.Load() > stales) != tt.stale {
				t.Errorf("counted as stale: %v, want %v", c.stales.Load() > stales, tt.stale)
			}
			if took := time.Since(start); took > promptly {
				t.Errorf("answered after %v", took)
			}
		})
	}
}

// TestCacheOverload fills the queue of misses: more are refused at once, warm codes are not.
func TestCacheOverload(t *testing.T) {
	pg := newFakeLoad("warm", "a", "b", "c")
	c := newCache(nil, newLocalTier(640), pg.load)
	c.waiting.max = 2
	if _, err := c.resolve("warm", time.Now()); err != nil {
		t.Fatal(err)
	}
	block := make(chan struct{})
	pg.answer(nil, block)
	var two sync.WaitGroup
	for _, code := range []string{"a", "b"} {
		two.Go(func() {
			if _, err := c.resolve(code, time.Now()); err != nil {
				t.Errorf("%s: %v", code, err)
			}
		})
	}
	eventually(t, 5*time.Second, "two wait", func() bool { return c.waiting.n.Load() == 2 && pg.loads.Load() == 3 })
	start := time.Now()
	if _, err := c.resolve("c", start); err != errOverloaded || time.Since(start) > answerWithin/2 {
		t.Errorf("the third is told %v after %v", err, time.Since(start))
	}
	if got, err := c.resolve("warm", time.Now()); err != nil || got.id == 0 {
		t.Errorf("the warm code: %+v, %v", got, err)
	}
	close(block)
	two.Wait()
	if got, err := c.resolve("c", time.Now()); err != nil || got.id == 0 {
		t.Errorf("when there is room again: %+v, %v", got, err)
	}
}

// TestCacheChange changes a code while a reader fetches its old target. Who asks after the change gets the new one, and the old
// one is not kept.
func TestCacheChange(t *testing.T) {
	pg := newFakeLoad("abc")
	c := newCache(nil, newLocalTier(640), pg.load)
	old, oldDone := make(chan struct{}), make(chan struct{})
	pg.answer(nil, old)
	go func() {
		defer close(oldDone)
		if got, err := c.resolve("abc", time.Now()); err != nil || got.id != 1 {
			t.Errorf("the reader from before: %+v, %v", got, err)
		}
	}()
	eventually(t, 5*time.Second, "the reader has read", func() bool { return pg.loads.Load() == 1 })
	failed := errors.New("no commit")
	for _, commit := range []error{failed, nil} {
		pending, err := c.change([]string{"other", "abc"}, func() error { pg.set("abc", 2); return commit })
		if pending || err != commit {
			t.Errorf("change = %v, %v; want false, %v", pending, err, commit)
		}
	}
	pg.answer(nil, nil)
	if got, err := c.resolve("abc", time.Now()); err != nil || got.id != 2 {
		t.Errorf("the first after the change: %+v, %v", got, err)
	}
	close(old)
	<-oldDone
	if got, err := c.resolve("abc", time.Now()); err != nil || got.id != 2 || pg.loads.Load() != 2 {
		t.Errorf("later: %+v, %v after %d loads", got, err, pg.loads.Load())
	}
}

// TestLocalTierBounded puts far more into the tier than LOCAL_CACHE allows; what is asked for stays.
func TestLocalTierBounded(t *testing.T) {
	for _, size := range []int{64, 640, 1000} {
		l := newLocalTier(size)
		hot := make([]string, 0, 16)
		taken := map[*shard]bool{}
		for i := 0; len(hot) < cap(hot); i++ { // one in a shard, or hot codes would evict each other in small tiers
			code := fmt.Sprint("hot", i)
			if s := l.shard(code); !taken[s] {
				taken[s], hot = true, append(hot, code)
			}
		}
		put := func(code string) { l.put(code, target{id: 1}, l.generation(code), time.Hour, false) }
		for _, code := range hot {
			put(code)
		}
		for i := range 20 * size {
			for _, code := range hot {
				if _, ok := l.get(code, time.Now()); !ok && size >= 640 {
					t.Fatalf("size %d: %s is gone after %d cold ones, though used between any two", size, code, i)
				}
			}
			put(fmt.Sprint("cold", i))
			if i%16 == 0 && l.len() > size {
				t.Fatalf("size %d: %d links", size, l.len())
			}
		}
		if n := l.len(); n < size/2 {
			t.Errorf("size %d: only %d links are kept", size, n)
		}
		if _, ok := l.get("cold0", time.Now()); ok {
			t.Errorf("size %d: the first of %d cold links is still there", size, 20*size)
		}
	}
	l := newLocalTier(640)
	for i := range 2000 { // all used: somebody has to go all the same
		code := fmt.Sprint("used", i)
		l.put(code, target{id: 1}, l.generation(code), time.Hour, false)
		l.get(code, time.Now())
	}
	if n := l.len(); n > 640 {
		t.Errorf("%d links, all used, in a tier of 640", n)
	}
}

// TestLocalTierTrust is when entries answer: own ones until their time, tracked ones only while Redis is heard.
func TestLocalTierTrust(t *testing.T) {
	const ttl = 30 * time.Second
	nothing, distrust := func(*localTier, time.Time) {}, func(l *localTier, _ time.Time) { l.distrust() }
	tests := []struct {
		name     string
		tracked  bool
		then     func(l *localTier, now time.Time)
		after    time.Duration
		ok, keep bool // get answers; stale still does
	}{
		{"own", false, nothing, 0, true, true},
		{"own, in time", false, nothing, ttl - time.Second, true, true},
		{"own, too late", false, nothing, ttl + time.Second, false, true},
		{"own, distrusted", false, distrust, 0, true, true},
		{"tracked, never trusted", true, nothing, 0, false, true},
		{"tracked", true, func(l *localTier, now time.Time) { l.trust(now) }, trustFor - time.Second, true, true},
		{"tracked, silence", true, func(l *localTier, now time.Time) { l.trust(now) }, trustFor + time.Second, false, true},
		{"tracked, trusted again", true, func(l *localTier, now time.Time) { l.trust(now); l.trust(now.Add(time.Minute)) }, ttl - time.Second, true, true},
		{"tracked, too late", true, func(l *localTier, now time.Time) { l.trust(now.Add(time.Minute)) }, ttl + time.Second, false, true},
		{"tracked, distrusted", true, func(l *localTier, now time.Time) { l.trust(now); l.distrust() }, 0, false, true},
		{"tracked, distrusted, then trusted", true, func(l *localTier, now time.Time) { l.distrust(); l.trust(now) }, 0, false, true},
		{"dropped", false, func(l *localTier, now time.Time) { l.drop("abc") }, 0, false, false},
		{"another dropped", false, func(l *localTier, now time.Time) { l.drop("xyz") }, 0, true, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLocalTier(640)
			l.put("abc", target{id: 1}, l.generation("abc"), ttl, tt.tracked)
			now := time.Now()
			tt.then(l, now)
			if _, ok := l.get("abc", now.Add(tt.after)); ok != tt.ok {
				t.Errorf("get answers: %v, want %v", ok, tt.ok)
			}
			if _, ok := l.stale("abc", now.Add(tt.after)); ok != tt.keep {
				t.Errorf("stale answers: %v, want %v", ok, tt.keep)
			}
		})
	}
	for name, then := range map[string]func(l *localTier){"drop": func(l *localTier) { l.drop("abc") }, "distrust": (*localTier).distrust} {
		l := newLocalTier(640)
		var dropped []string
		l.onDrop = func(code string) { dropped = append(dropped, code) }
		generation := l.generation("abc")
		then(l)
		l.put("abc", target{id: 1}, generation, ttl, false)
		if l.len() != 0 {
			t.Errorf("%s does not veto a fill that was read before it", name)
		}
		if name == "drop" && !slices.Equal(dropped, []string{"abc"}) {
			t.Errorf("told of %v dropped", dropped)
		}
	}
}

// ---- fakes ----

// fakeLoad is the PostgreSQL of these tests: codes lead to https://<code>.example/.
type fakeLoad struct {
	loads atomic.Int64

	mu    sync.Mutex
	ids   map[string]int64
	err   error         // what load returns
	block chan struct{} // load has read and answers when it is closed; nil does not wait
}

// newFakeLoad knows codes, under ids from 1.
func newFakeLoad(codes ...string) *fakeLoad {
	f := &fakeLoad{ids: map[string]int64{}}
	for _, code := range codes {
		f.ids[code] = 1
	}
	return f
}

func (f *fakeLoad) set(code string, id int64) { f.mu.Lock(); f.ids[code] = id; f.mu.Unlock() }

func (f *fakeLoad) answer(err error, block chan struct{}) {
	f.mu.Lock()
	f.err, f.block = err, block
	f.mu.Unlock()
}

func (f *fakeLoad) load(code string) (target, error) {
	f.mu.Lock()
	id, block, err := f.ids[code], f.block, f.err
	f.mu.Unlock()
	f.loads.Add(1)
	if block != nil {
		<-block
	}
	if err != nil || id == 0 {
		return target{}, err
	}
	return target{id: id, location: []string{"https://" + code + ".example/"}}, nil
}
