package main

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// linkTo is a target with the given id.
func linkTo(id int64) target {
	return target{id: id, location: []string{fmt.Sprintf("https://%d.example/", id)}}
}

// keep puts a target into a tier, as a reader does whom nobody disturbs.
func keep(l *localTier, code string, t target) { l.put(code, t, l.generation(code)) }

// TestLocalTierBounded puts far more into tiers than LOCAL_CACHE allows; what is asked for stays.
func TestLocalTierBounded(t *testing.T) {
	for _, size := range []int{64, 640, 1000} {
		l := newLocalTier(size)
		now := time.Now()
		l.vouch(now)
		hot := codesInOwnShards(l, 16)
		for _, code := range hot {
			keep(l, code, linkTo(1))
		}
		for i := range 20 * size {
			for _, code := range hot {
				if _, ok := l.get(code, now); !ok && size >= 640 {
					t.Fatalf("size %d: %s is gone after %d cold ones, though used between any two",
						size, code, i)
				}
			}
			keep(l, fmt.Sprint("cold", i), linkTo(2))
			if i%16 == 0 && l.len() > size {
				t.Fatalf("size %d: %d links", size, l.len())
			}
		}
		if n := l.len(); n < size/2 {
			t.Errorf("size %d: only %d links are kept", size, n)
		}
		if _, ok := l.get("cold0", now); ok {
			t.Errorf("size %d: the first of %d cold links is still there", size, 20*size)
		}
		generations := l.generations()
		l.putRead(codeTarget{"read", linkTo(3)}, generations)
		if l.find("read") != nil {
			t.Errorf("size %d: a link that was only read displaces another", size)
		}
		if got := l.capacity(); got > size || got < size/2 {
			t.Errorf("size %d has a capacity of %d", size, got)
		}
	}
}

// codesInOwnShards are n codes of which no two share a shard: in small tiers they would evict each
// other.
func codesInOwnShards(l *localTier, n int) []string {
	var codes []string
	taken := map[*shard]bool{}
	for i := 0; len(codes) < n; i++ {
		code := fmt.Sprint("hot", i)
		if s := l.shardOf(code); !taken[s] {
			taken[s] = true
			codes = append(codes, code)
		}
	}
	return codes
}

// TestLocalTierAllUsed fills a tier with links that are all asked for: some must go all the same.
func TestLocalTierAllUsed(t *testing.T) {
	l := newLocalTier(640)
	l.vouch(time.Now())
	for i := range 2000 {
		code := fmt.Sprint("used", i)
		keep(l, code, linkTo(1))
		l.get(code, time.Now())
	}
	if n := l.len(); n > 640 {
		t.Errorf("%d links in a tier of 640", n)
	}
}

// TestLocalTierBytes fills a tier with the longest targets: its bytes are bounded, not only its
// links.
func TestLocalTierBytes(t *testing.T) {
	const size = 6400
	long := target{id: 1, location: []string{"https://a.example/" + strings.Repeat("x", maxTarget-18)}}
	l := newLocalTier(size)
	for i := range 2 * size {
		keep(l, fmt.Sprint("long", i), long)
	}
	total := 0
	for i := range l.shards {
		s := &l.shards[i]
		total += s.bytes
		counted := 0
		for code, e := range s.links {
			counted += e.cost(code)
		}
		if counted != s.bytes || s.bytes > s.maxBytes {
			t.Errorf("a shard says %d bytes of at most %d, and has %d", s.bytes, s.maxBytes, counted)
		}
	}
	if total > size*bytesPerLink {
		t.Errorf("%d bytes, at most %d are allowed", total, size*bytesPerLink)
	}
	if want := size * bytesPerLink / (maxTarget + entryBytes + 100); l.len() < want/2 {
		t.Errorf("%d links are kept, though some %d fit", l.len(), want)
	}
	for i := range 2 * size {
		l.drop(fmt.Sprint("long", i))
	}
	for i := range l.shards {
		if bytes := l.shards[i].bytes; bytes != 0 {
			t.Fatalf("an empty shard counts %d bytes", bytes)
		}
	}
}

// TestGuessersDisplaceNothing asks for 100,000 codes that lead nowhere: all links stay, and the
// memory that guessers may take is bounded.
func TestGuessersDisplaceNothing(t *testing.T) {
	const size = 640
	l := newLocalTier(size)
	l.vouch(time.Now())
	for i := range size / 4 {
		keep(l, fmt.Sprint("known", i), linkTo(1))
	}
	links := l.len()
	for i := range 100_000 {
		keep(l, fmt.Sprint("guess", i), target{})
	}
	if l.len() != links {
		t.Errorf("%d links of %d are left", l.len(), links)
	}
	unknown := 0
	for i := range l.shards {
		unknown += len(l.shards[i].unknown)
	}
	if unknown > size {
		t.Errorf("%d codes that lead nowhere are kept", unknown)
	}
}

// TestLocalTierTrust is who may answer when: get alone, stale when nobody else can.
func TestLocalTierTrust(t *testing.T) {
	start := time.Now()
	tests := []struct {
		name    string
		put     target
		polled  time.Duration // when the poll before the put began, seen from the test's start
		without bool          // no poll before the put
		again   time.Duration // when a poll after the put began; 0 is none
		after   time.Duration // when it is asked for
		alone   bool          // get answers
		stale   bool
	}{
		{name: "fresh", put: linkTo(1), alone: true, stale: true},
		{name: "nearly too long after the poll", put: linkTo(1), after: trustFor - 100*time.Millisecond,
			alone: true, stale: true},
		{name: "too long after the poll", put: linkTo(1), after: trustFor, stale: true},
		{name: "polled again", put: linkTo(1), again: 20 * time.Second, after: 21 * time.Second,
			alone: true, stale: true},
		{name: "polled again, but too old", put: linkTo(1), again: localTTL,
			after: localTTL + time.Second, stale: true},
		{name: "put without a poll", put: linkTo(1), without: true, after: aloneTTL / 2, alone: true},
		{name: "put without a poll, later", put: linkTo(1), without: true, after: aloneTTL + time.Second},
		{name: "put when the poll was too old", put: linkTo(1), polled: -trustFor - time.Second,
			after: aloneTTL / 2, alone: true, stale: true},
		{name: "the same, later", put: linkTo(1), polled: -trustFor - time.Second,
			after: aloneTTL + time.Second, stale: true},
		{name: "a 404", put: target{}, after: aloneTTL / 2, alone: true},
		{name: "a 404, later", put: target{}, after: aloneTTL + time.Second},
		{name: "a 404, polled again", put: target{}, again: aloneTTL, after: aloneTTL + time.Second},
		{name: "nearly too stale", put: linkTo(1), after: staleFor - time.Second, stale: true},
		{name: "too stale", put: linkTo(1), after: staleFor},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLocalTier(640)
			l.start = start.Add(-time.Hour) // so that a poll may have been long ago
			if !tt.without {
				l.vouch(start.Add(tt.polled))
			}
			keep(l, "abc", tt.put)
			if tt.again != 0 {
				l.vouch(start.Add(tt.again))
			}
			now := start.Add(tt.after)
			got, ok := l.get("abc", now)
			if ok != tt.alone || got.id != 0 && got.id != tt.put.id {
				t.Errorf("get = %+v, %v; want %v", got, ok, tt.alone)
			}
			if _, ok := l.stale("abc", now); ok != tt.stale {
				t.Errorf("stale answers: %v, want %v", ok, tt.stale)
			}
			if left := l.staleLeft(now) > 0; tt.put.id != 0 && left != tt.stale && !tt.without {
				t.Errorf("staleLeft says %v, want %v", left, tt.stale)
			}
		})
	}
}

// TestDropVetoes drops between a read and its put: what was read may be older than the change.
func TestDropVetoes(t *testing.T) {
	tests := []struct {
		name   string
		drop   func(l *localTier)
		vetoed bool
	}{
		{"nothing", func(*localTier) {}, false},
		{"the code", func(l *localTier) { l.drop("abc") }, true},
		{"a code of the same shard", func(l *localTier) { l.drop(neighbour(l, "abc")) }, true},
		{"everything", func(l *localTier) { l.dropAll() }, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLocalTier(640)
			l.vouch(time.Now())
			var told []string
			l.onDrop = func(code string) { told = append(told, code) }
			generation := l.generation("abc")
			generations := l.generations()
			tt.drop(l)
			l.put("abc", linkTo(1), generation)
			if kept := l.len() == 1; kept == tt.vetoed {
				t.Errorf("put keeps it: %v", kept)
			}
			l.putRead(codeTarget{"abc", linkTo(1)}, generations)
			if kept := l.len() == 1; kept == tt.vetoed {
				t.Errorf("putRead keeps it: %v", kept)
			}
			if tt.name == "the code" && !slices.Equal(told, []string{"abc"}) {
				t.Errorf("told of %v dropped", told)
			}
		})
	}
	t.Run("what was kept", func(t *testing.T) {
		l := newLocalTier(640)
		l.vouch(time.Now())
		for _, code := range []string{"abc", "xyz", "new"} {
			keep(l, code, linkTo(1))
		}
		keep(l, "none", target{})
		l.drop("abc")
		l.drop("none")
		if l.find("abc") != nil || l.find("none") != nil || l.find("xyz") == nil {
			t.Error("drop does not forget its code alone")
		}
		l.dropAll()
		if l.len() != 0 || l.find("xyz") != nil {
			t.Error("dropAll leaves something")
		}
	})
}

// neighbour is another code in the shard of code.
func neighbour(l *localTier, code string) string {
	for i := 0; ; i++ {
		other := fmt.Sprint("other", i)
		if l.shardOf(other) == l.shardOf(code) {
			return other
		}
	}
}

// TestLocalTierChangesKind lets a code that led nowhere become a link, and back.
func TestLocalTierChangesKind(t *testing.T) {
	l := newLocalTier(640)
	l.vouch(time.Now())
	for _, want := range []target{{}, linkTo(1), {}, linkTo(2)} {
		keep(l, "abc", want)
		got, ok := l.get("abc", time.Now())
		if !ok || got.id != want.id {
			t.Errorf("get = %+v, %v; want %+v", got, ok, want)
		}
	}
}

// TestLocalTierConcurrently has readers, writers and droppers at once, for the race detector. After
// a drop nobody gets what was read before it.
func TestLocalTierConcurrently(t *testing.T) {
	l := newLocalTier(64)
	l.vouch(time.Now())
	var mu sync.Mutex // guards version, which is what PostgreSQL would say
	version := int64(1)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 2000 {
				mu.Lock()
				before := version
				mu.Unlock()
				if got, ok := l.get("abc", time.Now()); ok && got.id < before {
					t.Errorf("version %d is answered after %d was acknowledged", got.id, before)
					return
				}
				generation := l.generation("abc")
				mu.Lock()
				read := version
				mu.Unlock()
				l.put("abc", linkTo(read), generation)
			}
		})
	}
	all.Go(func() {
		for next := int64(2); next < 500; next++ {
			mu.Lock()
			version = next
			l.drop("abc") // before anybody hears of the new version
			mu.Unlock()
		}
	})
	all.Wait()
}

// TestLocalHitAllocatesNothing holds what the tier is for.
func TestLocalHitAllocatesNothing(t *testing.T) {
	l := newLocalTier(640)
	l.vouch(time.Now())
	keep(l, "abc", linkTo(1))
	now := time.Now()
	if n := testing.AllocsPerRun(1000, func() { l.get("abc", now) }); n != 0 {
		t.Errorf("a hit allocates %v times", n)
	}
}
