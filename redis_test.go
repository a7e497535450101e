package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// The Redis tier on a real Redis of the test's own, with a fake PostgreSQL behind it where none is needed.

func TestRedisValues(t *testing.T) {
	now := time.Now().Unix()
	const any, jitter = int64(0), int64(-1) // TTLs: of no interest; valueTTL ± 10 %
	tests := []struct {
		name  string
		value string
		want  target
		ok    bool
		ttl   int64 // of the encoded want, in ms
	}{
		{"link", "1 0 https://a.example/", target{1, []string{"https://a.example/"}, 0}, true, jitter},
		{"large id", "1y2p0ij32e8e7 0 https://a.example/", target{1<<63 - 1, []string{"https://a.example/"}, 0}, true, jitter},
		{"far expiry", "z 7clzj0g http://a.example/", target{35, []string{"http://a.example/"}, 16000000000}, true, jitter},
		{"sentinel", "-", target{}, true, sentinelTTL.Milliseconds()},
		{"hold", "!", target{}, false, any},
		{"lease", "?TOKEN", target{}, false, any},
		{"empty", "", target{}, false, any},
		{"one word", "1", target{}, false, any},
		{"two words", "1 0", target{}, false, any},
		{"id 0", "0 0 https://a.example/", target{}, false, any},
		{"negative id", "-1 0 https://a.example/", target{}, false, any},
		{"id is no number", "! 0 https://a.example/", target{}, false, any},
		{"id too large", "zzzzzzzzzzzzzzzz 0 https://a.example/", target{}, false, any},
		{"expiry is no number", "1  https://a.example/", target{}, false, any},
		{"another program's", `{"url":"https://a.example/ "}`, target{}, false, any},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := decodeTarget([]byte(tt.value))
			if ok != tt.ok || ok && !reflect.DeepEqual(got, tt.want) {
				t.Errorf("decodeTarget = %+v, %v; want %+v, %v", got, ok, tt.want, tt.ok)
			}
			if !tt.ok {
				return
			}
			seen := map[int64]bool{}
			for range 200 {
				value, ttl := encodeTarget(tt.want)
				if value != tt.value {
					t.Fatalf("encodeTarget = %q", value)
				}
				if base := valueTTL.Milliseconds(); tt.ttl == jitter && (ttl < base*9/10 || ttl > base*11/10) || tt.ttl > 0 && ttl != tt.ttl {
					t.Fatalf("TTL %d ms", ttl)
				}
				seen[ttl] = true
			}
			if tt.ttl == jitter && len(seen) < 5 {
				t.Errorf("only %d different TTLs in 200", len(seen))
			}
		})
	}
	for _, tt := range []struct{ in, low, high int64 }{{30, 28_000, 30_000}, {590, 500_000, 590_000}, {1, 1, 1000}, {0, 1, 1}, {-100, 1, 1}} {
		for range 50 {
			if _, ttl := encodeTarget(target{1, []string{"https://a.example/"}, now + tt.in}); ttl < tt.low || ttl > tt.high {
				t.Errorf("a link that expires in %d s gets %d ms", tt.in, ttl)
			}
		}
	}
}

// TestRedisLease is the compare-and-set that keeps an old value from coming back.
func TestRedisLease(t *testing.T) {
	server := startRedis(t)
	r, say := testRedisTier(t, server, nil)
	fresh := target{1, []string{"https://a.example/"}, 0}
	value, _ := encodeTarget(fresh)
	tests := []struct {
		name      string
		first     string            // of the key before the lease is asked for; "" is none
		gets      bool              // the lease
		meanwhile func(code string) // between lease and fill
		fill      target
		want      string // the key at the end
	}{
		{"nothing happens", "", true, func(string) {}, fresh, value},
		{"nothing is there", "", true, func(string) {}, target{}, "-"},
		{"held", "!", false, nil, fresh, "!"},
		{"leased to another", "?OTHER", false, nil, fresh, "?OTHER"},
		{"filled by another", "-", false, nil, fresh, "-"},
		{"held meanwhile", "", true, func(code string) { r.hold([]string{"x", code}) }, fresh, "!"},
		{"a not-found overtaken by a creation", "", true, func(code string) { r.hold([]string{code}) }, target{}, "!"},
		{"lease expired", "", true, func(code string) { expire(t, say, key(code)) }, fresh, ""},
		{"lease expired and taken by another", "", true, func(code string) {
			expire(t, say, key(code))
			if token, ok := r.lease(code); token == "" || !ok {
				t.Error("an expired lease cannot be had again")
			}
		}, fresh, "?"},
		{"deleted or flushed", "", true, func(code string) { say("DEL", key(code)) }, fresh, ""},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			code := fmt.Sprint("code", i)
			if tt.first != "" {
				say("SET", key(code), tt.first)
			}
			token, ok := r.lease(code)
			if (token != "") != tt.gets || !ok {
				t.Fatalf("lease = %q, %v; want one: %v", token, ok, tt.gets)
			}
			if tt.gets {
				if ms := redisInt(say("PTTL", key(code))); ms <= 0 || ms > leaseTTL.Milliseconds() {
					t.Errorf("the lease stands for %d ms", ms)
				}
				tt.meanwhile(code)
				r.fill(code, token, tt.fill)
			}
			got, _ := redis.String(say("GET", key(code)), nil)
			if got != tt.want && !(tt.want == "?" && strings.HasPrefix(got, "?") && got != token) {
				t.Errorf("the key holds %q, want %q", got, tt.want)
			}
			if ms := redisInt(say("PTTL", key(code))); got != "" && got == tt.want && tt.first == "" && (ms <= 0 || ms > valueTTL.Milliseconds()*11/10) {
				t.Errorf("%q stands for %d ms", got, ms)
			}
		})
	}
	if token, ok := r.lease("code0"); token != "" || !ok {
		t.Errorf("a filled code is leased again: %q, %v", token, ok)
	}
	if ms := redisInt(say("PTTL", key("code1"))); ms <= 0 || ms > sentinelTTL.Milliseconds() {
		t.Errorf("a sentinel stands for %d ms", ms)
	}
}

// TestRedisGets asks for many codes at once: each gets its own value, whichever batch it was in.
func TestRedisGets(t *testing.T) {
	r, say := testRedisTier(t, startRedis(t), nil)
	const codes = 300
	for i := range codes {
		if i%3 != 0 {
			say("SET", key(fmt.Sprint("code", i)), fmt.Sprint("value", i))
		}
	}
	var all sync.WaitGroup
	for i := range codes {
		all.Go(func() {
			got, err := r.get(fmt.Sprint("code", i))
			if want := fmt.Sprint("value", i); err != nil || i%3 == 0 && got != nil || i%3 != 0 && string(got) != want {
				t.Errorf("get %d = %q, %v", i, got, err)
			}
		})
	}
	all.Wait()
}

// TestCacheOverRedis follows one code through two replicas that share a Redis.
func TestCacheOverRedis(t *testing.T) {
	server := startRedis(t)
	pg := newFakeLoad("known")
	ra, say := testRedisTier(t, server, nil)
	rb, _ := testRedisTier(t, server, nil)
	a, b := newCache(ra, ra.local, pg.load), newCache(rb, rb.local, pg.load)
	// resolve asks c and expects id, after so many loads of PostgreSQL.
	resolve := func(c *Cache, code string, id, loads int64) {
		t.Helper()
		before := pg.loads.Load()
		got, err := c.resolve(code, time.Now())
		if n := pg.loads.Load() - before; err != nil || got.id != id || n != loads {
			t.Errorf("%s = %+v, %v after %d loads; want id %d after %d", code, got, err, n, id, loads)
		}
	}
	for code, id := range map[string]int64{"known": 1, "unknown": 0} {
		resolve(a, code, id, 1)
		resolve(a, code, id, 0)
		resolve(b, code, id, 0) // a filled Redis
	}
	if a.misses.Load() != 2 || b.misses.Load() != 0 || b.redisHits.Load() != 2 || a.sentinels.Load() != 1 {
		t.Errorf("misses %d and %d, Redis hits of b %d, sentinels of a %d", a.misses.Load(), b.misses.Load(), b.redisHits.Load(), a.sentinels.Load())
	}

	t.Run("a created code never hides behind a sentinel", func(t *testing.T) {
		pending, err := a.change([]string{"unknown"}, func() error {
			if got := fmt.Sprintf("%s", say("GET", key("unknown"))); got != hold { // should the writer die now, nobody fills what was
				t.Errorf("during the commit Redis holds %q", got)
			}
			pg.set("unknown", 5)
			return nil
		})
		if pending || err != nil {
			t.Errorf("change = %v, %v", pending, err)
		}
		resolve(b, "unknown", 5, 1) // held: answered from PostgreSQL and not kept
		resolve(a, "unknown", 5, 1)
		if ms := redisInt(say("PTTL", key("unknown"))); ms <= 0 || ms > holdTTL.Milliseconds() {
			t.Errorf("the hold stands for %d ms", ms)
		}
		expire(t, say, key("unknown"))
		resolve(b, "unknown", 5, 1)
		resolve(a, "unknown", 5, 0)
	})
	t.Run("a not-found read before the creation", func(t *testing.T) {
		old := make(chan struct{})
		pg.answer(nil, old)
		before, done := pg.loads.Load(), make(chan struct{})
		go func() {
			defer close(done)
			if got, err := b.resolve("new", time.Now()); err != nil || got.id != 0 {
				t.Errorf("the reader from before: %+v, %v", got, err)
			}
		}()
		eventually(t, 5*time.Second, "the reader has read", func() bool { return pg.loads.Load() == before+1 })
		pg.answer(nil, nil)
		if pending, err := a.change([]string{"new"}, func() error { pg.set("new", 6); return nil }); pending || err != nil {
			t.Errorf("change = %v, %v", pending, err)
		}
		close(old)
		<-done
		resolve(a, "new", 6, 1)
		expire(t, say, key("new"))
		resolve(a, "new", 6, 1)
		if got := fmt.Sprintf("%s", say("GET", key("new"))); !strings.HasPrefix(got, "6 ") {
			t.Errorf("Redis holds %q", got)
		}
	})
	t.Run("what is not ours", func(t *testing.T) {
		pg.set("foreign", 7)
		say("SET", key("foreign"), "http://evil.example/")
		resolve(a, "foreign", 7, 1)
		resolve(b, "foreign", 7, 1)
		say("DEL", key("foreign"))
		say("RPUSH", key("foreign"), "a list")
		resolve(a, "foreign", 7, 1)
		if got := fmt.Sprintf("%s", say("TYPE", key("foreign"))); got != "list" {
			t.Errorf("another program's key was overwritten by a %s", got)
		}
	})
	t.Run("a link about to expire", func(t *testing.T) {
		soon := time.Now().Add(20 * time.Second).Unix()
		a.load = func(string) (target, error) { return target{8, []string{"https://a.example/"}, soon}, nil }
		resolve(a, "soon", 8, 0)
		if ms := redisInt(say("PTTL", key("soon"))); ms <= 0 || ms > 20_000 {
			t.Errorf("its value stands for %d ms", ms)
		}
		resolve(b, "soon", 8, 0)
		if got, _ := b.resolve("soon", time.Now()); got.expires != soon {
			t.Errorf("through Redis it expires at %d, want %d", got.expires, soon)
		}
	})
}

// TestRedisDown takes Redis away: all is answered as before, from PostgreSQL; changes are owed, and paid before Redis is trusted.
func TestRedisDown(t *testing.T) {
	server := startRedis(t)
	r, _ := testRedisTier(t, server, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go r.track(ctx)
	pg := newFakeLoad("known", "other")
	c := newCache(r, r.local, pg.load)
	if _, err := c.resolve("known", time.Now()); err != nil {
		t.Fatal(err)
	}
	server.kill()
	if got, err := c.resolve("other", time.Now()); err != nil || got.id != 1 {
		t.Errorf("without Redis: %+v, %v", got, err)
	}
	pending, err := c.change([]string{"known", "third"}, func() error { pg.set("known", 2); return nil })
	if !pending || err != nil {
		t.Errorf("change without Redis = %v, %v; want true, nil", pending, err)
	}
	if r.usable() {
		t.Error("Redis is called usable")
	}
	for _, step := range []struct{ after, loads int64 }{{0, 1}, {0, 0}, {int64(localBlind) * 2, 1}} { // kept for localBlind, since nobody tells of changes
		before := pg.loads.Load()
		got, err := c.resolve("known", time.Now().Add(time.Duration(step.after)))
		if n := pg.loads.Load() - before; err != nil || got.id != 2 || n != step.loads {
			t.Errorf("after the change: %+v, %v, %d loads, want %d", got, err, n, step.loads)
		}
	}

	server.start(t)
	server.waitRedis(t)
	say := redisSay(t, server)
	eventually(t, 10*time.Second, "Redis is trusted again", r.usable)
	for _, code := range []string{"known", "third"} {
		if got := fmt.Sprintf("%s", say("GET", key(code))); got != hold {
			t.Errorf("%s was changed without Redis, which now holds %q", code, got)
		}
	}
	if len(r.owed) != 0 {
		t.Errorf("still owed: %v", r.owed)
	}
	if pending, err := c.change([]string{"known"}, func() error { return nil }); pending || err != nil {
		t.Errorf("change = %v, %v", pending, err)
	}
}

// TestRedisDebts is what happens when more is owed than one pipeline, or than memory, should hold.
func TestRedisDebts(t *testing.T) {
	r, say := testRedisTier(t, startRedis(t), nil)
	owe := func(from, to int) {
		var codes []string
		for i := from; i < to; i++ {
			codes = append(codes, fmt.Sprint("code", i))
		}
		r.owe(codes)
	}
	owe(0, 2500)
	if r.usable() {
		t.Error("Redis is trusted although it is owed holds")
	}
	if err := r.repay(); err != nil || !r.usable() || len(r.owed) != 0 || redisInt(say("DBSIZE")) != 2500 {
		t.Errorf("repay: %v; trusted %v, %d still owed, %d keys held", err, r.usable(), len(r.owed), redisInt(say("DBSIZE")))
	}
	owe(0, maxOwed+1)
	if err := r.repay(); err != nil || r.usable() || len(r.owed) != 0 {
		t.Errorf("more is owed than remembered: repay says %v, trusted %v, %d still owed", err, r.usable(), len(r.owed))
	}
	if wait := time.Until(r.banned); wait < valueTTL || wait > valueTTL*12/10 {
		t.Errorf("Redis is banned for %v, values live for at most %v", wait, valueTTL*11/10)
	}
	r.banned = time.Now()
	if err := r.repay(); err != nil || !r.usable() {
		t.Errorf("after the ban: %v, trusted %v", err, r.usable())
	}
}

// TestNoRedis asks the tier that nobody asked for, and one whose Redis never was.
func TestNoRedis(t *testing.T) {
	var none *redisTier
	if none.usable() || !none.hold([]string{"abc"}) {
		t.Error("the nil tier is usable, or cannot hold")
	}
	local := newLocalTier(640)
	r := openRedis(fmt.Sprintf("redis://127.0.0.1:%d", freePort(t)), local, nil, slog.New(slog.DiscardHandler))
	defer r.pool.Close()
	r.up.Store(true) // as if it had been there a moment ago
	pg := newFakeLoad("known")
	c := newCache(r, local, pg.load)
	if got, err := c.resolve("known", time.Now()); err != nil || got.id != 1 || r.usable() {
		t.Errorf("resolve = %+v, %v, usable %v", got, err, r.usable())
	}
	r.up.Store(true)
	if token, ok := r.lease("known"); token != "" || ok || r.usable() {
		t.Errorf("lease = %q, %v, usable %v", token, ok, r.usable())
	}
	if pending, err := c.change([]string{"known"}, func() error { return nil }); !pending || err != nil {
		t.Errorf("change = %v, %v", pending, err)
	}
	if codes := r.warm(10); codes != nil {
		t.Errorf("warmed %v", codes)
	}
	r.fillLocal([]string{"known"})
	if n := local.len(); n != 0 {
		t.Errorf("%d local links from nowhere", n)
	}
}

// TestRedisWarm warms 3,150 live ones of 3,500 links, from a real PostgreSQL.
func TestRedisWarm(t *testing.T) {
	store, _ := testStore(t, Config{})
	mustExec(t, store, `INSERT INTO urls (short_code, original_url, is_active, expires_at, created_at, updated_at)
		SELECT 'code' || n, 'https://a.example/' || n, n % 10 <> 0, CASE n WHEN 7 THEN now() AT TIME ZONE 'UTC' + interval '1 minute' END, '2025-01-01', '2025-01-01'
		FROM generate_series(1, 3500) AS n`)
	const live = 3150
	r, say := testRedisTier(t, startRedis(t), store.targets)
	say("SET", key("code5"), hold)
	say("SET", key("code6"), "6 0 https://newer.example/")
	codes := r.warm(2000)
	if len(codes) != 2000 || codes[0] != "code1" || codes[9] != "code11" {
		t.Errorf("%d codes for the local tier, from %q", len(codes), codes[:min(10, len(codes))])
	}
	keys, _ := redis.Strings(say("KEYS", "u:*"), nil)
	if len(keys) != live {
		t.Errorf("%d keys, want %d", len(keys), live)
	}
	for _, tt := range []struct{ code, want string }{{"code1", "1 0 https://a.example/1"}, {"code3499", "2p7 0 https://a.example/3499"}, {"code2001", "1jl 0 https://a.example/2001"},
		{"code5", hold}, {"code6", "6 0 https://newer.example/"}, {"code10", ""}, {"code3500", ""}} {
		if got, _ := redis.String(say("GET", key(tt.code)), nil); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.code, got, tt.want)
		}
	}
	if ms := redisInt(say("PTTL", key("code7"))); ms <= 0 || ms > 61_000 { // whole seconds, rounded
		t.Errorf("a link that expires in a minute is warm for %d ms", ms)
	}
	if ms := redisInt(say("PTTL", key("code8"))); ms < valueTTL.Milliseconds()*8/10 || ms > valueTTL.Milliseconds()*11/10 {
		t.Errorf("a link that does not expire is warm for %d ms", ms)
	}

	r.fillLocal([]string{"code1", "code5", "code10", "code2001"})
	r.local.trust(time.Now())
	for code, want := range map[string]int64{"code1": 1, "code5": 0, "code10": 0, "code2001": 2001, "code2": 0} {
		if got, ok := r.local.get(code, time.Now()); got.id != want || ok != (want != 0) {
			t.Errorf("%s in the local tier: %+v, %v", code, got, ok)
		}
	}
}

// TestRedisWarmLate loses a chunk's lease between reading PostgreSQL and writing Redis: what was read may no longer be true, and
// none of it is written.
func TestRedisWarmLate(t *testing.T) {
	server := startRedis(t)
	say := redisSay(t, server)
	var pages int
	scan := func(after int64, n int) (chunk []namedTarget, err error) {
		for id := after + 1; id <= 2500 && len(chunk) < n; id++ {
			chunk = append(chunk, namedTarget{fmt.Sprint("code", id), target{id, []string{"https://a.example/"}, 0}})
		}
		if pages++; pages == 2 {
			leases, _ := redis.Strings(say("KEYS", "hop:lease:*"), nil)
			for _, lease := range leases {
				expire(t, say, lease)
			}
		}
		return chunk, nil
	}
	r, _ := testRedisTier(t, server, scan)
	r.warm(0)
	for code, want := range map[string]bool{"code1001": false, "code1500": false, "code2000": false, "code2001": true, "code2500": true} {
		if got := redisInt(say("EXISTS", key(code))) == 1; got != want {
			t.Errorf("%s is warm: %v, want %v", code, got, want)
		}
	}
	t.Run("PostgreSQL fails", func(t *testing.T) {
		say("FLUSHALL")
		logs := &syncBuffer{}
		r, _ := testRedisTier(t, server, func(after int64, n int) ([]namedTarget, error) {
			if after > 0 {
				return nil, errUnavailable
			}
			return scan(after, n)
		})
		r.log = slog.New(slog.NewTextHandler(logs, nil))
		if codes := r.warm(10); len(codes) != 10 || !strings.Contains(logs.String(), "redis not warm") || redisInt(say("EXISTS", key("code1"))) != 1 {
			t.Errorf("warm gives %d codes and logs %s", len(codes), logs)
		}
	})
}

// TestRedisKeepsWarm empties Redis under a running tier: it is warmed again, by one replica for all.
func TestRedisKeepsWarm(t *testing.T) {
	server := startRedis(t)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	scans := make(chan string, 100)
	replica := func(name string) *redisTier {
		r := openRedis(server.url, newLocalTier(640), func(after int64, n int) ([]namedTarget, error) {
			scans <- name
			return []namedTarget{{"abc", target{1, []string{"https://a.example/"}, 0}}}, nil
		}, slog.New(slog.DiscardHandler))
		t.Cleanup(func() { r.pool.Close() })
		ready := make(chan struct{})
		codes := r.warm(10)
		running.Go(func() { r.keepWarm(ctx, codes, ready) })
		running.Go(func() { r.track(ctx) })
		<-ready
		return r
	}
	a, b, say := replica("a"), replica("b"), redisSay(t, server)
	for _, r := range []*redisTier{a, b} {
		eventually(t, 5*time.Second, "the local tier is warm and trusted", func() bool { _, ok := r.local.get("abc", time.Now()); return ok })
	}
	if <-scans != "a" || <-scans != "b" || len(scans) != 0 {
		t.Errorf("at the start each replica warms once, not %d times more", len(scans))
	}
	for round := range 2 {
		say("FLUSHALL")
		for _, r := range []*redisTier{a, b} {
			eventually(t, 5*time.Second, "the local tier forgets", func() bool { _, ok := r.local.get("abc", time.Now()); return !ok })
		}
		eventually(t, 5*time.Second, "Redis is warm again", func() bool { return redisInt(say("EXISTS", key("abc"))) == 1 })
		<-scans
		if len(scans) != 0 {
			t.Errorf("round %d: both replicas warm", round)
		}
	}
}

// ---- helpers ----

// testRedisTier opens a tier on server that trusts it, and a connection for the test's own commands.
func testRedisTier(t *testing.T, server *process, scan func(int64, int) ([]namedTarget, error)) (*redisTier, func(string, ...any) any) {
	t.Helper()
	r := openRedis(server.url, newLocalTier(6400), scan, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { r.pool.Close() })
	if err := r.repay(); err != nil || !r.usable() {
		t.Fatalf("the tier does not trust its Redis: %v", err)
	}
	return r, redisSay(t, server)
}

// redisSay sends commands on a connection of its own; an error of Redis fails the test.
func redisSay(t *testing.T, server *process) func(command string, args ...any) any {
	t.Helper()
	conn, err := redis.DialURL(server.url, redis.DialReadTimeout(5*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	var mu sync.Mutex
	return func(command string, args ...any) any {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		reply, err := conn.Do(command, args...)
		if err != nil && !errors.Is(err, redis.ErrNil) {
			t.Errorf("%s %v: %v", command, args, err)
		}
		return reply
	}
}

// redisInt is a reply that is a number.
func redisInt(reply any) int64 { n, _ := reply.(int64); return n }

// expire lets a key reach its time to live.
func expire(t *testing.T, say func(string, ...any) any, name string) {
	t.Helper()
	say("PEXPIRE", name, 1)
	eventually(t, 5*time.Second, name+" expires", func() bool { return redisInt(say("PTTL", name)) == -2 })
}
