package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// How changes reach every cache: the races that could leave an old target behind, each played step
// by step over a real Redis, with polls when the test says so.

// TestReaderOvertakenByPoll has a reader fetch an old target while another replica changes it, and
// both the poll and the drop come before the reader is done.
func TestReaderOvertakenByPoll(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	pg := newFakeSource("abc")
	c := newReplica(t, server, pg)
	gate := make(chan struct{})
	pg.answers(nil, gate)
	read := make(chan int64, 1)
	go func() {
		got, _ := c.resolve(t.Context(), "abc", time.Now())
		read <- got.id
	}()
	eventually(t, patience, "it has read", func() bool { return pg.asked.Load() == 1 })
	pg.change("abc", 2)
	c.poll()
	pg.answers(nil, nil)
	c.resolves(t, "abc", 2, 1) // does not join the flight of before
	close(gate)
	if id := <-read; id != 1 {
		t.Errorf("the reader from before gets %d", id)
	}
	if got := text(say("GET", c.key("abc"))); got != holdMark {
		t.Errorf("the reader from before has filled Redis with %q", got)
	}
	c.resolves(t, "abc", 2, 0)
	expire(t, say, c.key("abc"))
	c.local.drop("abc")
	c.resolves(t, "abc", 2, 1)
	if got := text(say("GET", c.key("abc"))); !strings.HasPrefix(got, "2 ") {
		t.Errorf("after the hold Redis is filled with %q", got)
	}
}

// TestReaderBeforeFirstPoll has a reader fetch an old target before a replica's first poll, which
// cannot show a change from before it: what was read must not be kept.
func TestReaderBeforeFirstPoll(t *testing.T) {
	pg := newFakeSource("abc")
	c := newCache(nil, newLocalTier(640), pg)
	gate := make(chan struct{})
	pg.answers(nil, gate)
	read := make(chan int64, 1)
	go func() {
		got, _ := c.resolve(t.Context(), "abc", time.Now())
		read <- got.id
	}()
	eventually(t, patience, "it has read", func() bool { return pg.asked.Load() == 1 })
	pg.change("abc", 2)
	newPoller(c).poll(t.Context())
	pg.answers(nil, nil)
	close(gate)
	<-read
	got, err := c.resolve(t.Context(), "abc", time.Now())
	if err != nil || got.id != 2 {
		t.Errorf("after the first poll: %+v, %v", got, err)
	}
}

// TestReaderOvertakenByChange has a reader on one replica fetch an old target, or that there is
// none, while another replica changes it. The reader's fill must not come after the change.
func TestReaderOvertakenByChange(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	pg := newFakeSource("known")
	a := newReplica(t, server, pg)
	b := newReplica(t, server, pg)
	for _, code := range []string{"known", "made"} {
		gate := make(chan struct{})
		pg.answers(nil, gate)
		before := pg.asked.Load()
		read := make(chan struct{})
		go func() {
			b.resolve(t.Context(), code, time.Now())
			close(read)
		}()
		eventually(t, patience, "it has read", func() bool {
			return pg.asked.Load() > before
		})
		pg.answers(nil, nil)
		if code == "known" {
			pending, err := a.change(code, func() error {
				pg.change(code, 2)
				return nil
			})
			if pending || err != nil {
				t.Errorf("change = %v, %v", pending, err)
			}
		} else {
			pg.change(code, 2)
			if a.created([]string{code}) {
				t.Error("the creation is pending")
			}
		}
		close(gate)
		<-read
		a.resolves(t, code, 2, 1)
		b.poll()
		b.resolves(t, code, 2, 1)
		if got := text(say("GET", a.key(code))); got != holdMark {
			t.Errorf("%s: after the change Redis holds %q", code, got)
		}
	}
}

// TestWriterDies lets a writer die between its commit and telling anybody. The poll of any replica
// does what was left to do.
func TestWriterDies(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	pg := newFakeSource("abc")
	a := newReplica(t, server, pg)
	b := newReplica(t, server, pg)
	for _, held := range []bool{true, false} { // whether it held the code before its commit
		a.poll()
		b.poll()
		say("DEL", a.key("abc"))
		b.local.drop("abc")
		id := pg.known["abc"].id
		b.resolves(t, "abc", id, 1)
		if held {
			a.redis.hold([]string{"abc"})
		}
		pg.change("abc", id+1)
		var atDrop string // what Redis holds when the old target is dropped
		b.local.onDrop = func(code string) {
			atDrop = text(say("GET", b.key(code)))
			b.forget(code)
		}
		b.poll()
		if atDrop != holdMark {
			t.Errorf("when the target is dropped, Redis holds %q, which a reader could fetch", atDrop)
		}
		checkTTL(t, say, b.key("abc"), holdTTL/2, holdTTL)
		b.resolves(t, "abc", id+1, 1)
	}
}

// TestEachChangeOnce polls again and again while an open transaction keeps the cursor back: a
// change is dropped and held once, or the code could never be cached.
func TestEachChangeOnce(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	pg := newFakeSource("abc")
	c := newReplica(t, server, pg)
	drops := 0
	c.local.onDrop = func(code string) {
		drops++
		c.forget(code)
	}
	open := pg.xid
	pg.change("abc", 2)
	stuck := func() { pg.xid = open } // the snapshot's xmin stays at the open transaction
	for range 3 {
		next := pg.xid
		stuck()
		c.poll()
		pg.xid = next
	}
	if drops != 1 {
		t.Errorf("one change is dropped %d times", drops)
	}
	expire(t, say, c.key("abc"))
	next := pg.xid
	stuck()
	c.poll()
	pg.xid = next
	if got := text(say("GET", c.key("abc"))); got != "" {
		t.Errorf("an old change is held again: %q", got)
	}
	pg.change("abc", 3)
	c.poll()
	if drops != 2 || text(say("GET", c.key("abc"))) != holdMark {
		t.Errorf("the next change: %d drops, Redis holds %q", drops, text(say("GET", c.key("abc"))))
	}
	c.poll()
	if len(c.poller.dropped) != 0 || len(c.poller.held) != 0 {
		t.Errorf("%d and %d changes are remembered that no poll shows again",
			len(c.poller.dropped), len(c.poller.held))
	}
}

// TestRedisGoesBackInTime has Redis lose its last second: it is restored from a file, or a replica
// of it takes over that had not got the last holds. The cursor, which it lost too, says so.
func TestRedisGoesBackInTime(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	pg := newFakeSource("abc")
	a := newReplica(t, server, pg)
	a.resolves(t, "abc", 1, 1)
	cursor := a.redis.names.Load().cursor()
	oldCursor := text(say("GET", cursor))
	oldValue := text(say("GET", a.key("abc")))
	pending, err := a.change("abc", func() error {
		pg.change("abc", 2)
		return nil
	})
	if pending || err != nil {
		t.Errorf("change = %v, %v", pending, err)
	}
	a.poll()

	say("SET", cursor, oldCursor)
	say("SET", a.key("abc"), oldValue)
	b := newReplica(t, server, pg) // a replica that never saw the change
	if got := text(say("GET", b.key("abc"))); got != holdMark {
		t.Errorf("after the first poll of a new replica, Redis holds %q", got)
	}

	say("SET", cursor, oldCursor)
	say("SET", a.key("abc"), oldValue)
	a.poll() // which held the change already, in the Redis of before
	if got := text(say("GET", a.key("abc"))); got != holdMark {
		t.Errorf("after the next poll of the writer, Redis holds %q", got)
	}
	a.resolves(t, "abc", 2, 1)

	say("DEL", cursor) // a generation of which nobody knows how true it is
	generation := a.redis.names.Load().generation
	a.poll()
	if a.redis.names.Load().generation == generation {
		t.Error("a generation without a cursor is used on")
	}
}

// TestRedisGoesBackUnseen is the same while a long transaction keeps the cursor where it was, so
// that it says nothing: then a connection that failed does.
func TestRedisGoesBackUnseen(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	pg := newFakeSource("abc")
	a := newReplica(t, server, pg)
	a.resolves(t, "abc", 1, 1)
	oldValue := text(say("GET", a.key("abc")))
	pg.keepCursor(pg.xid) // a transaction goes on that began before the change
	pg.change("abc", 2)
	a.poll()
	if got := text(say("GET", a.key("abc"))); got != holdMark {
		t.Fatalf("after a poll Redis holds %q", got)
	}
	say("SET", a.key("abc"), oldValue)
	a.redis.failed("GET", io.EOF)
	a.poll()
	if got := text(say("GET", a.key("abc"))); got != holdMark {
		t.Errorf("after a failure and a poll Redis holds %q", got)
	}
	a.resolves(t, "abc", 2, 1)
}

// TestHoldMissedDuringPoll has a change that could not be held while a poll was under way: the poll
// may not have seen it, so Redis is not read before the next one.
func TestHoldMissedDuringPoll(t *testing.T) {
	server := testRedis(t)
	pg := newFakeSource("abc")
	c := newReplica(t, server, pg)
	pg.onPoll = func() {
		c.redis.answers.Store(false) // it has failed in between
		if !c.created([]string{"abc"}) {
			t.Error("a hold that was not sent is not pending")
		}
		c.redis.answers.Store(true)
	}
	c.poll()
	if c.redis.usable() {
		t.Error("Redis is read although a hold was missed")
	}
	pg.onPoll = func() {}
	c.poll()
	if !c.redis.usable() {
		t.Error("Redis is not read after a poll that missed nothing")
	}
}

// TestRedisIsFlushed empties Redis under two replicas: they begin one new generation together, and
// one of them is told to warm it.
func TestRedisIsFlushed(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	pg := newFakeSource("abc")
	a := newReplica(t, server, pg)
	b := newReplica(t, server, pg)
	<-a.cold // the first generation was new as well
	if *a.redis.names.Load() != *b.redis.names.Load() || len(b.cold) != 0 {
		t.Error("the second replica does not share the first one's generation")
	}
	before := *a.redis.names.Load()
	say("FLUSHALL")
	b.poll()
	a.poll()
	after := *a.redis.names.Load()
	if after != *b.redis.names.Load() || after == before {
		t.Errorf("generations: before %v, now %v and %v", before, after, *b.redis.names.Load())
	}
	if len(a.cold) != 0 || len(b.cold) != 1 {
		t.Error("not exactly the replica that began the generation is told to warm it")
	}
	if !a.redis.takeWarmUp() || b.redis.takeWarmUp() {
		t.Error("not exactly one replica warms the generation")
	}
	a.redis.leaveWarmUp()
	if !b.redis.takeWarmUp() {
		t.Error("a warm-up that failed is left to nobody")
	}
}

// TestAnotherServer has PostgreSQL fail over, or restart: it may have lost what the caches hold.
func TestAnotherServer(t *testing.T) {
	server := testRedis(t)
	pg := newFakeSource("abc")
	a := newReplica(t, server, pg)
	b := newReplica(t, server, pg)
	a.resolves(t, "abc", 1, 1)
	b.resolves(t, "abc", 1, 0)
	pg.set("abc", 2) // the new server never saw the commit that led to 1
	pg.polled("another server", nil)
	a.poll()
	a.resolves(t, "abc", 2, 1)
	generation := a.redis.names.Load().generation
	b.poll()
	b.resolves(t, "abc", 2, 0) // from what a has filled
	if b.redis.names.Load().generation != generation {
		t.Error("the second replica begins a generation of its own")
	}
}

// TestManyChanges has more changes than one poll lists: all that is kept is forgotten.
func TestManyChanges(t *testing.T) {
	server := testRedis(t)
	pg := newFakeSource("abc")
	c := newReplica(t, server, pg)
	c.resolves(t, "abc", 1, 1)
	generation := c.redis.names.Load().generation
	pg.set("abc", 2)
	pg.polled("server", errManyChanges)
	c.poll()
	c.resolves(t, "abc", 2, 1)
	if c.redis.names.Load().generation == generation || !c.redis.usable() {
		t.Error("the values of before are still in use, or Redis is not used")
	}
}

// TestPostgresCannotBePolled leaves a replica with Redis alone. What Redis says is then kept for a
// second, and without Redis what was known answers for a while.
func TestPostgresCannotBePolled(t *testing.T) {
	server := startRedis(t)
	pg := newFakeSource("abc")
	writer := newReplica(t, server.url, pg)
	c := newReplica(t, server.url, pg)
	writer.resolves(t, "abc", 1, 1)
	c.resolves(t, "abc", 1, 0)

	alone := newFakeSource()
	alone.polled("server", errUnavailable)
	alone.answers(errUnavailable, nil)
	c.source = alone
	c.pg = alone
	c.poll()
	now := time.Now().Add(trustFor)
	if _, ok := c.local.get("abc", now); ok {
		t.Error("the local tier answers although no poll vouches for it any more")
	}
	got, err := c.resolve(t.Context(), "abc", now)
	if err != nil || got.id != 1 || c.redisHits.Load() != 2 {
		t.Errorf("with Redis alone: %+v, %v", got, err)
	}

	writer.change("abc", func() error {
		pg.change("abc", 2)
		return nil
	})
	writer.resolves(t, "abc", 2, 1)
	say := sayTo(t, server.url)
	eventually(t, patience, "the writer asks Redis again", func() bool {
		return !writer.changedHere("abc")
	})
	expire(t, say, writer.key("abc"))
	writer.local.drop("abc")
	writer.resolves(t, "abc", 2, 1) // and fills Redis
	got, err = c.resolve(t.Context(), "abc", time.Now().Add(trustFor+aloneTTL))
	if err != nil || got.id != 2 {
		t.Errorf("a second after a change that Redis knows of: %+v, %v", got, err)
	}

	server.kill()
	got, err = c.resolve(t.Context(), "abc", time.Now().Add(time.Minute))
	if err != nil || got.id != 2 || c.stales.Load() != 1 {
		t.Errorf("with neither: %+v, %v, %d stale answers", got, err, c.stales.Load())
	}
	if _, err := c.resolve(t.Context(), "none", time.Now()); !errors.Is(err, errUnavailable) {
		t.Errorf("an unknown code with neither: %v", err)
	}
}

// TestRedisIsOwedAChange has Redis miss a change, and then PostgreSQL go away: the replica that
// made the change must not read the old target from Redis. It reads Redis again when a poll has
// told it.
func TestRedisIsOwedAChange(t *testing.T) {
	server := startRedis(t)
	pg := newFakeSource("abc")
	c := newReplica(t, server.url, pg)
	c.resolves(t, "abc", 1, 1)
	c.redis.answers.Store(false) // as after a connection that failed
	c.change("abc", func() error {
		pg.change("abc", 2)
		return nil
	})
	alone := newFakeSource()
	alone.polled("server", errUnavailable)
	c.source = alone
	for range 2 {
		c.poll()
		if c.redis.usable() {
			t.Error("Redis is read, and has the old target")
		}
	}
	c.source = pg
	c.poll()
	if !c.redis.usable() {
		t.Error("Redis is not read although it was told")
	}
	c.resolves(t, "abc", 2, 1)
}

// TestPollStarts is from where a poll asks: at first from nowhere, since nothing is kept yet, and
// with a Redis from where its cursor stands.
func TestPollStarts(t *testing.T) {
	server := testRedis(t)
	pg := newFakeSource("abc")
	newReplica(t, server, pg) // leaves a cursor behind
	first := pg.xid
	pg.change("abc", 2)
	pg.polls = nil
	b := newReplica(t, server, pg)
	second := pg.xid
	b.poll()
	pg.polled("server", errUnavailable)
	pg.change("abc", 3)
	b.poll()
	pg.polled("server", nil)
	b.poll() // asks for what the failed one should have found
	if want := []uint64{first, second, second, second}; !slices.Equal(pg.polls, want) {
		t.Errorf("polls ask from %v, want %v", pg.polls, want)
	}
	pg.polls = nil
	newPoller(newCache(nil, newLocalTier(640), pg)).poll(t.Context())
	if len(pg.polls) != 1 || pg.polls[0] < math.MaxInt64 {
		t.Errorf("a new replica without Redis asks from %v", pg.polls)
	}
}

// TestRunningReplicas lets two replicas poll and listen by themselves, while changes are made
// through both, and Redis and its subscribers come and go.
func TestRunningReplicas(t *testing.T) {
	server := startRedis(t)
	pg := newFakeSource()
	codes := 20
	for i := range codes {
		pg.set(fmt.Sprint("code", i), 1)
	}
	var replicas []*replica
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	for range 2 {
		tier := openTier(t, server.url)
		tier.know("database")
		c := newCache(tier, newLocalTier(6400), pg)
		running.Go(func() { c.keepTrue(ctx) })
		<-c.firstPoll
		replicas = append(replicas, &replica{Cache: c, pg: pg})
	}
	for version := int64(2); version < 10; version++ {
		switch version {
		case 4:
			server.redisDo(t, "CLIENT", "KILL", "TYPE", "pubsub")
		case 6:
			server.redisDo(t, "FLUSHALL")
		case 8:
			server.kill()
			server.start(t)
		}
		for i := range codes {
			code := fmt.Sprint("code", i)
			writer := replicas[i%2]
			other := replicas[1-i%2]
			_, err := writer.change(code, func() error {
				pg.change(code, version)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			committed := time.Now()
			got, err := writer.resolve(t.Context(), code, time.Now())
			if err != nil || got.id != version {
				t.Errorf("the writer itself answers version %d of %d, %v", got.id, version, err)
			}
			eventually(t, trustFor+5*time.Second, "the other replica knows", func() bool {
				asked := time.Now()
				got, err := other.resolve(t.Context(), code, asked)
				if got.id != version && asked.Sub(committed) > trustFor {
					t.Errorf("%v after the change the other replica answers version %d, %v",
						asked.Sub(committed), got.id, err)
				}
				return got.id == version
			})
		}
	}
}

// TestOneGenerationForAll has two replicas reach one PostgreSQL under two of its addresses. They
// must not take it for two servers, and begin generation after generation.
func TestOneGenerationForAll(t *testing.T) {
	pg := startPostgres(t, "-c", "listen_addresses=127.0.0.1,127.0.0.2", "-c", "fsync=off")
	server := testRedis(t)
	var pollers []*poller
	var tiers []*redisTier
	for _, host := range []string{"127.0.0.1", "127.0.0.2"} {
		store, _ := testStore(t, strings.Replace(pg.url, "127.0.0.1", host, 1))
		tier := openTier(t, server)
		tier.know("database")
		pollers = append(pollers, newPoller(newCache(tier, newLocalTier(640), store)))
		tiers = append(tiers, tier)
	}
	generations := map[string]bool{}
	for range 3 {
		for i, p := range pollers {
			p.poll(t.Context())
			if !tiers[i].usable() {
				t.Fatal("Redis is not used")
			}
			generations[tiers[i].names.Load().generation] = true
		}
	}
	if len(generations) != 1 {
		t.Errorf("%d generations in six polls", len(generations))
	}
}

// TestPollRefused has a Redis that answers and refuses, as one does that is loading its data: hop
// does without, and asks again only after a while.
func TestPollRefused(t *testing.T) {
	server := startRedis(t)
	say := sayTo(t, server.url)
	pg := newFakeSource("abc")
	c := newReplica(t, server.url, pg)
	say("CONFIG", "SET", "min-replicas-to-write", "1") // NOREPLICAS to every write
	pg.change("abc", 2)
	c.poll()
	if c.redis.usable() || !c.poller.retryAt.After(time.Now()) {
		t.Errorf("usable %v, asked again at %v", c.redis.usable(), c.poller.retryAt)
	}
	if pending, err := c.change("abc", func() error { return nil }); !pending || err != nil {
		t.Errorf("change = %v, %v; want true, nil", pending, err)
	}
	c.resolves(t, "abc", 2, 1)
	say("CONFIG", "SET", "min-replicas-to-write", "0")
	c.poller.retryAt = time.Time{}
	c.poll()
	held, err := redis.String(say("GET", c.key("abc")), nil)
	if !c.redis.usable() || held != holdMark {
		t.Errorf("when it takes writes again: usable %v, holds %q, %v", c.redis.usable(), held, err)
	}
}
