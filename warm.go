package main

import (
	"context"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

// Warm-up: links are brought into the local tier and into Redis before anybody asks for them, the
// newest first, since those are asked for most.

const (
	// warmWithin is how long a start waits for warm caches. What is left goes on in the background.
	warmWithin = 5 * time.Second

	// warmChunk is how many links travel in one pipeline: 283,000 SETs a second. Larger ones only
	// keep Redis from others for longer.
	warmChunk = 1000

	// warmWorkers is how many chunks are under way: one is read from PostgreSQL while another is
	// written to Redis and a third waits for its answers.
	warmWorkers = 3

	// warmLease is how long after its first read a chunk may still be written: no longer than a
	// reservation lasts, which ownFor relies on.
	warmLease = reserveTTL

	// warmTurn is how long a replica that warms Redis may be silent before another that starts, or
	// meets a new generation, may do it.
	warmTurn = time.Minute
)

// warmer brings links into the caches. It serves one warm-up.
type warmer struct {
	cache *Cache
	limit int // how many links at most
	redis bool
	log   *slog.Logger

	mu      sync.Mutex // guards what follows; held while a chunk is read, so that reads take turns
	below   int64      // the next chunk has ids below this
	links   int
	done    bool
	failure error
}

// warmUp warms the caches, and waits for them at most warmWithin. Afterwards, until ctx ends, Redis
// is warmed again whenever its values were lost.
func (c *Cache) warmUp(ctx context.Context, limit int, log *slog.Logger) {
	warm := make(chan struct{})
	go func() {
		select {
		case <-c.firstPoll: // before it, nothing that is kept may answer
		case <-ctx.Done():
			return
		}
		c.warm(ctx, limit, log)
		close(warm)
		for {
			select {
			case <-c.cold:
				c.warm(ctx, limit, log)
			case <-ctx.Done():
				return
			}
		}
	}()
	select {
	case <-warm:
	case <-time.After(warmWithin):
	case <-ctx.Done():
	}
}

// becameCold says that Redis has lost its values.
func (c *Cache) becameCold() {
	select {
	case c.cold <- struct{}{}:
	default: // it is known already
	}
}

// warm brings the newest links, at most limit, into the local tier, and into Redis if no other
// replica does so. It ends when ctx does, at the latest.
func (c *Cache) warm(ctx context.Context, limit int, log *slog.Logger) {
	w := &warmer{cache: c, limit: limit, log: log, below: math.MaxInt64}
	w.redis = c.redis.takeWarmUp()
	if !w.redis {
		// Links beyond the local tier's room would be read for nothing.
		w.limit = min(limit, c.local.capacity())
	}
	began := time.Now()
	var workers sync.WaitGroup
	for range warmWorkers {
		workers.Go(func() { w.work(ctx) })
	}
	workers.Wait()
	if w.failure != nil {
		log.Warn("caches not warm", "links", w.links, "err", w.failure)
		if w.redis {
			c.redis.leaveWarmUp()
		}
		return
	}
	if w.redis {
		c.redis.endWarmUp()
	}
	log.Info("caches warm", "links", w.links, "redis", w.redis, "took", time.Since(began))
}

// work brings in chunk after chunk.
func (w *warmer) work(ctx context.Context) {
	var conn redis.Conn
	if w.redis {
		conn = w.cache.redis.pool.Get()
		defer conn.Close()
		// A lease that stays watched, when it expires, would undo the next warm-up of whoever gets
		// the connection. The driver says UNWATCH too, but not when Redis refuses it.
		defer w.cache.redis.doOn(conn, "UNWATCH")
	}
	for {
		var names keyNames // a chunk that was read for one generation must not go into the next
		if w.redis {
			names = *w.cache.redis.names.Load()
		}
		chunk, more := w.read(ctx, conn, names)
		if len(chunk) > 0 && conn != nil {
			if err := w.cache.redis.setChunk(conn, names, chunk); err != nil {
				w.fail(err)
				return
			}
		}
		if !more {
			return
		}
	}
}

// fail ends the warm-up.
func (w *warmer) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done = true
	w.failure = err
}

// read returns the next chunk, put into the local tier already, and whether there are more. With
// conn, the chunk is read under a lease that setChunk relies on.
func (w *warmer) read(ctx context.Context, conn redis.Conn, names keyNames) (
	chunk []codeTarget, more bool) {

	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		return nil, false
	}
	size := min(warmChunk, w.limit-w.links)
	if conn != nil {
		w.failure = w.cache.redis.beginChunk(conn, names)
	}
	generations := w.cache.local.generations()
	if w.failure == nil && size > 0 {
		chunk, w.failure = w.cache.source.newestTargets(ctx, w.below, size)
	}
	w.links += len(chunk)
	w.done = w.failure != nil || len(chunk) < size || w.links >= w.limit
	if w.failure != nil {
		return nil, false
	}
	for _, t := range chunk {
		w.below = t.id
		w.cache.local.putRead(t, generations)
	}
	return chunk, !w.done
}

// takeWarmUp says whether this replica is the one to warm Redis.
func (r *redisTier) takeWarmUp() bool {
	if !r.usable() {
		return false
	}
	r.turn = r.names.Load().warm()
	reply, err := r.do("SET", r.turn, 1, "NX", "PX", warmTurn.Milliseconds())
	return err == nil && reply != nil
}

// endWarmUp says that the generation is warm for which the turn was taken. One that began meanwhile
// is not.
func (r *redisTier) endWarmUp() { r.do("SET", r.turn, 1, "PX", namesTTL.Milliseconds()) }

// leaveWarmUp lets another attempt warm Redis.
func (r *redisTier) leaveWarmUp() { r.do("DEL", r.turn) }

// beginChunk keeps the turn to warm, takes a lease and watches it. A chunk is true as of its read;
// when a Redis that hung takes it later than warmLease, a change may have come and its hold gone.
func (r *redisTier) beginChunk(conn redis.Conn, names keyNames) error {
	lease := names.lease()
	conn.Send("SET", r.turn, 1, "PX", warmTurn.Milliseconds())
	conn.Send("SET", lease, 1, "PX", warmLease.Milliseconds())
	conn.Send("WATCH", lease)
	err := receiveAll(conn, 3)
	r.failed("WATCH", err)
	return err
}

// setChunk sets those links of chunk that Redis does not have, in one pipelined transaction. It
// fails as a whole, without an error, when the watched lease has expired. Nothing is sent before
// MULTI was taken: a Redis that refuses it would set the links at once, whatever the lease is.
func (r *redisTier) setChunk(conn redis.Conn, names keyNames, chunk []codeTarget) error {
	if _, err := r.doOn(conn, "MULTI"); err != nil {
		return err
	}
	for _, t := range chunk {
		value, ttl := encodeTarget(t.target)
		conn.Send("SET", names.code(t.code), value, "NX", "PX", ttl)
	}
	conn.Send("EXEC")
	err := receiveAll(conn, len(chunk)+1)
	r.failed("EXEC", err)
	return err
}
