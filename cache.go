package main

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// Cache keeps redirects off PostgreSQL: a local tier in this process (local.go) in front of Redis (redis.go) in front of load.
//
// Guarantee: after a change was acknowledged, no replica that reaches Redis serves the old target for longer than trustFor
// (2 s), normally not at all; one that does not, for longer than localBlind (1 s) while it reaches PostgreSQL. Only a change whose
// answer said "pending" may stay unseen by other replicas, until Redis is reached again or its values expire (valueTTL, 10 min
// ± 10 %), and after that for staleFor (10 min) if a replica then reaches nothing at all. Without Redis: localAlone (2 s).
// A 404 is only said when PostgreSQL said so. Redis is never needed for a right answer.
type Cache struct {
	local *localTier
	redis *redisTier // nil: no REDIS_URL
	load  func(code string) (target, error)

	waiting limiter // requests that wait for a miss

	mu      sync.Mutex         // guards flights; a leaf
	flights map[string]*flight // misses under way, one per code

	hits, redisHits, misses, sentinels, stales atomic.Int64
}

const (
	maxWaiting = 2048             // requests waiting for misses; each holds a connection and a goroutine, about 20 KB
	localTTL   = 30 * time.Second // of local entries kept fresh by Redis: bounds what a lost push could cost
	localAlone = 2 * time.Second  // of local entries without REDIS_URL, when other replicas' changes cannot be heard
	localBlind = time.Second      // of local entries while Redis is unreachable; made 15,000 misses 2,264 queries
	staleFor   = 10 * time.Minute // how long a known target answers when PostgreSQL and Redis are both gone
)

// flight is one miss under way, with all who wait for it.
type flight struct {
	done   chan struct{} // closed when target and err are set
	target target
	err    error
}

// errOverloaded refuses what would wait in too long a queue.
var errOverloaded = errors.New("overloaded")

// newCache returns a cache over its tiers; redis may be nil.
func newCache(redis *redisTier, local *localTier, load func(string) (target, error)) *Cache {
	c := &Cache{local: local, redis: redis, load: load, flights: map[string]*flight{}, waiting: limiter{max: maxWaiting}}
	local.onDrop = c.forget
	return c
}

// resolve returns what code leads to; the zero target is a 404. A warm one costs a hash, a read lock and a map lookup.
func (c *Cache) resolve(code string, now time.Time) (target, error) {
	if t, ok := c.local.get(code, now); ok {
		c.hits.Add(1)
		return t, nil
	}
	return c.miss(code, now)
}

// miss joins the flight for code, or starts it, and waits at most answerWithin.
func (c *Cache) miss(code string, now time.Time) (target, error) {
	if !c.waiting.enter() {
		return target{}, errOverloaded
	}
	defer c.waiting.leave()
	c.mu.Lock()
	f := c.flights[code]
	if f == nil {
		f = &flight{done: make(chan struct{})}
		c.flights[code] = f
		go c.fly(code, f)
	}
	c.mu.Unlock()
	timeout := time.NewTimer(answerWithin)
	defer timeout.Stop()
	select {
	case <-f.done:
	case <-timeout.C:
		f = &flight{err: errUnavailable} // the real one goes on for others
	}
	if f.err != nil && !c.redis.usable() { // nobody can say what the truth is: what was true minutes ago is the best answer
		if t, ok := c.local.stale(code, now); ok {
			c.stales.Add(1)
			return t, nil
		}
	}
	return f.target, f.err
}

// fly answers one miss from Redis, else from PostgreSQL, and fills what it may.
func (c *Cache) fly(code string, f *flight) {
	began, generation := time.Now(), c.local.generation(code) // before the reads: an invalidation after this line vetoes the fill
	var lease string
	reachable := c.redis.usable()
	if reachable {
		value, err := c.redis.get(code)
		switch {
		case err != nil:
			reachable = false
		case value == nil:
			lease, reachable = c.redis.lease(code)
		default:
			if t, ok := decodeTarget(value); ok {
				c.local.put(code, t, generation, localTTL, true)
				c.redisHits.Add(1)
				c.land(code, f, t, nil)
				return
			}
		}
	}
	c.misses.Add(1)
	t, err := c.load(code)
	switch {
	case err != nil:
	case lease != "":
		c.redis.fill(code, lease, t) // the push that follows vetoes a local fill; the next reader finds it in Redis
	case c.redis == nil:
		c.local.put(code, t, generation, localAlone-time.Since(began), false)
	case !reachable:
		c.local.put(code, t, generation, localBlind-time.Since(began), false)
	}
	if err == nil && t.id == 0 {
		c.sentinels.Add(1)
	}
	c.land(code, f, t, err)
}

// land hands a flight's result to all who wait.
func (c *Cache) land(code string, f *flight, t target, err error) {
	f.target, f.err = t, err
	c.mu.Lock()
	if c.flights[code] == f {
		delete(c.flights, code)
	}
	c.mu.Unlock()
	close(f.done)
}

// forget detaches the flight for code: whoever asks after a change must not join a read from before it.
func (c *Cache) forget(code string) {
	c.mu.Lock()
	delete(c.flights, code)
	c.mu.Unlock()
}

// change runs commit, which changes what codes lead to, between two holds: values that a reader fetched before the commit can
// not be filled in after it. Without Redis in reach the change stands all the same; the codes are owed a hold, and pending says
// that other replicas may serve the old target until then.
func (c *Cache) change(codes []string, commit func() error) (pending bool, err error) {
	c.redis.hold(codes)
	err = commit()
	return c.settle(codes, c.redis.hold(codes)), err // also after an error: whether a lost commit happened is unknown
}

// create is change for codes that nobody can have asked for on purpose. One hold, while the commit is under way, is enough
// against the sentinel of a lucky guess, and costs no time.
func (c *Cache) create(codes []string, commit func() error) (pending bool, err error) {
	held := make(chan bool, 1)
	go func() { held <- c.redis.hold(codes) }()
	err = commit()
	return c.settle(codes, <-held), err
}

// settle ends a change here, held or not.
func (c *Cache) settle(codes []string, held bool) (pending bool) {
	if !held {
		c.redis.owe(codes) // before the drop, or a fill from Redis could slip in between
	}
	for _, code := range codes {
		c.local.drop(code)
	}
	return !held
}

// limiter caps how many do one thing at once.
type limiter struct {
	n   atomic.Int64
	max int64
}

// enter is true if there is room; then leave must follow.
func (l *limiter) enter() bool {
	if l.n.Add(1) > l.max {
		l.n.Add(-1)
		return false
	}
	return true
}

func (l *limiter) leave() { l.n.Add(-1) }

// drain returns first and what else is queued in ch, at most n, without waiting: under load batches grow by themselves.
func drain[T any](ch <-chan T, first T, n int) []T {
	batch := []T{first}
	for len(batch) < n {
		select {
		case v := <-ch:
			batch = append(batch, v)
		default:
			return batch
		}
	}
	return batch
}
