package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// TestWarm warms the caches from a real PostgreSQL: live links only, newest first.
func TestWarm(t *testing.T) {
	const links = 3500 // of which every tenth is inactive
	const live = 3150
	server := testRedis(t)
	say := sayTo(t, server)
	store, db := testStore(t, testDatabase(t))
	execSQL(t, db, `
		INSERT INTO urls (short_code, original_url, is_active, expires_at, created_at, updated_at)
		SELECT 'code' || n, 'https://a.example/ü' || n, n % 10 <> 0,
		       CASE n WHEN 7 THEN now() AT TIME ZONE 'UTC' + interval '1 minute' END,
		       '2025-01-01', '2025-01-01'
		FROM generate_series(1, $1) AS n`, links)
	c := overStore(t, server, store)
	key := func(code string) string { return c.redis.names.Load().code(code) }
	say("SET", key("code5"), holdMark)
	say("SET", key("code6"), "6 0 https://newer.example/")
	c.warm(t.Context(), links, slog.New(slog.DiscardHandler))
	keys, err := redis.Strings(say("KEYS", key("*")), nil)
	if err != nil || len(keys) < live {
		t.Errorf("%d keys of %d links, %v", len(keys), live, err)
	}
	tests := map[string]string{
		"code1":    "1 0 https://a.example/%C3%BC1",
		"code3499": "2p7 0 https://a.example/%C3%BC3499",
		"code5":    holdMark,
		"code6":    "6 0 https://newer.example/",
		"code10":   "",
		"code3500": "",
	}
	for code, want := range tests {
		if got := text(say("GET", key(code))); got != want {
			t.Errorf("%s: Redis has %q, want %q", code, got, want)
		}
	}
	checkTTL(t, say, key("code7"), 30*time.Second, 61*time.Second)
	checkTTL(t, say, key("code8"), valueTTL*8/10, valueTTL*11/10)
	for _, code := range []string{"code1", "code5", "code7", "code3499"} {
		if got, ok := c.local.get(code, time.Now()); !ok || got.id == 0 {
			t.Errorf("%s in the local tier: %+v, %v", code, got, ok)
		}
	}
	for _, code := range []string{"code10", "none"} {
		if c.local.find(code) != nil {
			t.Errorf("%s, which leads nowhere, is in the local tier", code)
		}
	}
	if n := c.local.len(); n != live {
		t.Errorf("%d links in the local tier, want %d", n, live)
	}
}

// TestWarmIsBounded asks for fewer links than there are, and for more than fit.
func TestWarmIsBounded(t *testing.T) {
	tests := []struct {
		name  string
		redis bool
		size  int // of the local tier
		limit int
		there int
		local int // at least so many are in the local tier, and at most twice as many
		read  int // at most so many are read
	}{
		{"all of them", true, 64_000, 100_000, 5000, 5000, 5000},
		{"a limit", true, 64_000, 2500, 5000, 2500, 2500},
		{"no links wanted", true, 64_000, 0, 5000, 0, 0},
		{"no links there", true, 64_000, 1000, 0, 0, 0},
		{"a small local tier", true, 640, 3000, 5000, 320, 3000},
		{"a small local tier alone", false, 640, 3000, 5000, 320, 640},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			pg := newFakeSource()
			read := 0
			lowest := int64(math.MaxInt64)
			pg.newest = func(below int64, n int) ([]codeTarget, error) {
				chunk := newestOf(tt.there, below, n)
				read += len(chunk)
				for _, l := range chunk {
					if l.id >= lowest {
						t.Errorf("link %d is read after %d", l.id, lowest)
					}
					lowest = l.id
				}
				return chunk, nil
			}
			local := newLocalTier(tt.size)
			var tier *redisTier
			if tt.redis {
				tier = newReplica(t, testRedis(t), pg).redis
			}
			c := newCache(tier, local, pg)
			c.warm(t.Context(), tt.limit, slog.New(slog.DiscardHandler))
			if read > tt.read {
				t.Errorf("%d links are read, want at most %d", read, tt.read)
			}
			if n := local.len(); n < tt.local || n > 2*tt.local {
				t.Errorf("%d links in the local tier, want %d", n, tt.local)
			}
		})
	}
}

// TestWarmLate lets a chunk come to Redis later than its lease lasts: what was read may not be true
// any more, and none of it is written.
func TestWarmLate(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	pg := newFakeSource()
	c := newReplica(t, server, pg)
	pg.newest = func(below int64, n int) ([]codeTarget, error) {
		if below == 1501 { // the second chunk of three
			leases, err := redis.Strings(say("KEYS", "hop:*::lease:*"), nil)
			if err != nil || len(leases) == 0 {
				t.Errorf("no lease to lose: %v", err)
			}
			for _, lease := range leases {
				expire(t, say, lease)
			}
		}
		return newestOf(2500, below, n), nil
	}
	c.warm(t.Context(), 2500, slog.New(slog.DiscardHandler))
	tests := map[string]bool{
		"code501":  false,
		"code1000": false,
		"code1500": false,
		"code500":  true,
		"code1":    true,
	}
	for code, want := range tests {
		if there := say("EXISTS", c.key(code)) == int64(1); there != want {
			t.Errorf("%s is in Redis: %v, want %v", code, there, want)
		}
	}
}

// TestWarmBesideANewGeneration empties Redis in the middle of a warm-up: the values that a poll
// then begins are not warm, and somebody warms them.
func TestWarmBesideANewGeneration(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	pg := newFakeSource()
	c := newReplica(t, server, pg)
	pg.newest = func(below int64, n int) ([]codeTarget, error) {
		if below == 5501 { // the second chunk of seven
			say("FLUSHALL")
			c.poll()
		}
		return newestOf(6500, below, n), nil
	}
	c.warm(t.Context(), 6500, slog.New(slog.DiscardHandler))
	if !c.redis.takeWarmUp() {
		t.Error("the new generation counts as warm")
	}
}

// TestWarmRefused warms a Redis that refuses a part of the transaction that a chunk is: nothing may
// be set outside of it, where no lease guards it.
func TestWarmRefused(t *testing.T) {
	for _, command := range []string{"watch", "multi", "exec", "unwatch"} {
		t.Run(command, func(t *testing.T) {
			server := startRedis(t)
			say := sayTo(t, server.url)
			say("ACL", "SETUSER", "hop", "on", ">secret", "~hop:*", "&hop:*", "+@all", "-"+command)
			url := strings.Replace(server.url, "redis://", "redis://hop:secret@", 1)
			logs := &syncBuffer{}
			pg := newFakeSource()
			c := newReplica(t, url, pg)
			c.redis.log = slog.New(slog.NewTextHandler(logs, nil))
			pg.newest = func(below int64, n int) ([]codeTarget, error) {
				return newestOf(10, below, n), nil
			}
			c.warm(t.Context(), 10, slog.New(slog.DiscardHandler))
			for i := 1; i <= 10; i++ {
				key := c.key(fmt.Sprintf("code%d", i))
				there := say("EXISTS", key) == int64(1)
				if there != (command == "unwatch") { // which comes after it
					t.Errorf("%s is there: %v", key, there)
				}
			}
			word := "command=" + strings.ToUpper(command)
			if strings.Count(logs.String(), word) != 1 {
				t.Errorf("%s is not in the log:\n%s", word, logs)
			}
		})
	}
}

// TestWarmVetoed changes a link between the read of a chunk and its use: the local tier does not
// keep what was read.
func TestWarmVetoed(t *testing.T) {
	server := testRedis(t)
	pg := newFakeSource()
	c := newReplica(t, server, pg)
	pg.newest = func(below int64, n int) ([]codeTarget, error) {
		chunk := newestOf(5, below, n)
		c.change("code3", func() error { return nil })
		return chunk, nil
	}
	c.warm(t.Context(), 10, slog.New(slog.DiscardHandler))
	if c.local.find("code3") != nil {
		t.Error("a link that changed while it was read is kept")
	}
	if got := text(sayTo(t, server)("GET", c.key("code3"))); got != holdMark {
		t.Errorf("Redis holds %q, want the change's hold", got)
	}
}

// TestWarmFails has PostgreSQL or Redis fail in the middle: what was warmed stays, the rest is left
// to another attempt.
func TestWarmFails(t *testing.T) {
	server := startRedis(t)
	pg := newFakeSource()
	c := newReplica(t, server.url, pg)
	logs := &syncBuffer{}
	log := slog.New(slog.NewTextHandler(logs, nil))
	pg.newest = func(below int64, n int) ([]codeTarget, error) {
		if below <= 1501 {
			return nil, errUnavailable
		}
		return newestOf(2500, below, n), nil
	}
	c.warm(t.Context(), 2500, log)
	if c.local.len() != 1000 || !strings.Contains(logs.String(), "not warm") {
		t.Errorf("%d links, log: %s", c.local.len(), logs)
	}
	if !c.redis.takeWarmUp() {
		t.Error("after a warm-up that failed nobody may try again")
	}
	c.redis.leaveWarmUp()
	pg.newest = func(below int64, n int) ([]codeTarget, error) {
		chunk := newestOf(2500, below, n)
		if below <= 1501 {
			server.kill()
		}
		return chunk, nil
	}
	c.warm(t.Context(), 2500, log) // ends
	if strings.Count(logs.String(), "not warm") != 2 {
		t.Errorf("a Redis that dies is not logged: %s", logs)
	}
}

// TestWarmUpWaits is what a start waits for: a poll, and then warm caches, but not for ever; and
// what comes later is a Redis that has lost its values.
func TestWarmUpWaits(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	pg := newFakeSource()
	reading := make(chan struct{}, 10)
	goOn := make(chan struct{}, 10)
	pg.newest = func(below int64, n int) ([]codeTarget, error) {
		reading <- struct{}{}
		<-goOn
		return newestOf(10, below, n), nil
	}
	tier := openTier(t, server)
	tier.know("database")
	c := newCache(tier, newLocalTier(640), pg)
	p := newPoller(c)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	warm := make(chan struct{})
	go func() {
		c.warmUp(ctx, 1000, slog.New(slog.DiscardHandler))
		close(warm)
	}()
	p.poll(ctx)
	<-reading
	select {
	case <-warm:
		t.Error("a start does not wait for warm caches")
	default:
	}
	goOn <- struct{}{}
	<-warm
	if got, ok := c.local.get("code10", time.Now()); !ok || got.id != 10 {
		t.Errorf("after the warm-up: %+v, %v", got, ok)
	}
	<-reading // the first generation was a new one, which is warmed again at most once
	goOn <- struct{}{}

	say("FLUSHALL")
	goOn <- struct{}{}
	p.poll(ctx)
	<-reading
	key := tier.names.Load().code("code10")
	eventually(t, patience, "Redis is warm again", func() bool {
		return say("EXISTS", key) == int64(1)
	})
}

// TestWarmUpIsLeft ends a start that waits for a PostgreSQL that never answers.
func TestWarmUpIsLeft(t *testing.T) {
	c := newCache(nil, newLocalTier(640), newFakeSource())
	ctx, cancel := context.WithCancel(t.Context())
	var start sync.WaitGroup
	start.Go(func() { c.warmUp(ctx, 1000, slog.New(slog.DiscardHandler)) })
	cancel()
	start.Wait()
	pg := newFakeSource()
	pg.newest = func(int64, int) ([]codeTarget, error) {
		<-ctx.Done()
		return nil, errors.New("hangs no longer")
	}
	c = newCache(nil, newLocalTier(640), pg)
	c.warm(ctx, 1000, slog.New(slog.DiscardHandler))
}

// ---- helpers ----

// newestOf is a chunk of links with the ids from 1 to highest, newest first.
func newestOf(highest int, below int64, n int) []codeTarget {
	var chunk []codeTarget
	for id := min(int64(highest), below-1); id > 0 && len(chunk) < n; id-- {
		chunk = append(chunk, codeTarget{fmt.Sprint("code", id), linkTo(id)})
	}
	return chunk
}

// overStore is a cache over Redis and a real PostgreSQL that has polled once.
func overStore(t testing.TB, redisURL string, store *Store) *Cache {
	t.Helper()
	tier := openTier(t, redisURL)
	tier.know("database")
	c := newCache(tier, newLocalTier(100_000), store)
	newPoller(c).poll(context.Background())
	if !tier.usable() {
		t.Fatal("Redis is there and is not used")
	}
	return c
}
