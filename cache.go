package main

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// Cache keeps redirects off PostgreSQL: a local tier in this process (local.go) in front of Redis
// (redis.go), which the replicas share, in front of PostgreSQL.
//
// Promise: once a change is acknowledged, this replica serves the new target at once, and every
// other replica that reaches PostgreSQL within trustFor (2 s), normally before the answer. A
// replica that reaches only Redis serves it within 2 s if the replica that made the change reached
// Redis, else when Redis's values expire (valueTTL). A 404 is said only when PostgreSQL said so.
// Without Redis all of this stands. TestFault16Coherence holds it.
//
// Two layers keep it, and only the first is relied on. Every replica polls PostgreSQL for the codes
// that changed, and drops them here and in Redis (poll.go). And whoever makes a change drops its
// codes in Redis and tells all replicas by PUBLISH, which is usually faster than the next poll.
type Cache struct {
	local  *localTier
	redis  *redisTier // nil: there is no REDIS_URL
	source linkSource
	loads  *batcher[string, codeTarget]

	waiting limiter // requests that wait for a miss

	mu      sync.Mutex         // guards what follows; a leaf
	flights map[string]*flight // misses under way, one for each code
	changed map[string]int     // changes made here in the last ownFor, one count for each code

	hits, stales               atomic.Int64 // requests, by what answered them
	redisHits, misses, unknown atomic.Int64 // flights; of the misses some are of unknown codes
	unknownFills               budget       // of codes that lead nowhere, into Redis

	firstPoll chan struct{} // closed when the first poll has succeeded
	cold      chan struct{} // says that Redis has a new generation of values, which is empty
}

// linkSource is where the truth about links comes from: *Store.
type linkSource interface {
	targets(ctx context.Context, codes []string) ([]codeTarget, error)
	newestTargets(ctx context.Context, below int64, n int) ([]codeTarget, error)
	changesSince(ctx context.Context, since uint64) (changes, error)
}

const (
	// loaders is how many questions for missed codes are under way at once, each for up to
	// batchSize codes. Two keep PostgreSQL busy while an answer travels, and however many codes
	// strangers invent, they cost it two connections.
	loaders = 2

	// unknownFillRate is how many codes that lead nowhere are kept in Redis per second and replica.
	// They live for a minute, so guessers fill at most 6 MB of it.
	unknownFillRate = 1000

	// ownFor is for how long after its own change a replica does not believe Redis about a code:
	// as long as what was read before may still be written there. A hold forbids that, but a Redis
	// that is full may evict the hold, and the next poll's.
	ownFor = reserveTTL
)

// flight is one miss under way, with all the requests that wait for it.
type flight struct {
	held   atomic.Bool   // Redis says that the code has changed: what was true before is no answer
	done   chan struct{} // closed when target and err are set
	target target
	err    error
}

// newCache returns a cache over its tiers. redis may be nil.
func newCache(redis *redisTier, local *localTier, source linkSource) *Cache {
	c := &Cache{
		local:        local,
		redis:        redis,
		source:       source,
		flights:      map[string]*flight{},
		changed:      map[string]int{},
		waiting:      limiter{max: maxWaiting},
		unknownFills: budget{rate: unknownFillRate},
		firstPoll:    make(chan struct{}),
		cold:         make(chan struct{}, 1),
	}
	c.loads = newBatcher(loaders, c.load)
	local.onDrop = c.forget
	return c
}

// resolve returns what code leads to; the zero target is a 404, and so is one past its end, which
// callers look at (target.live). A hit costs a hash, a read lock and a map lookup.
func (c *Cache) resolve(ctx context.Context, code string, now time.Time) (target, error) {
	if t, ok := c.local.get(code, now); ok {
		c.hits.Add(1)
		return t, nil
	}
	return c.miss(ctx, code, now)
}

// miss waits for what code leads to, at most answerWithin. When neither PostgreSQL nor Redis can
// say, what was true when PostgreSQL was last heard of is the best answer.
func (c *Cache) miss(ctx context.Context, code string, now time.Time) (target, error) {
	if !c.waiting.enter() {
		return target{}, errOverloaded
	}
	defer c.waiting.leave()
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	f := c.join(code)
	var t target
	err := errUnavailable
	select {
	case <-f.done:
		t, err = f.target, f.err
	case <-ctx.Done(): // the flight goes on for others
	}
	if err != nil && !f.held.Load() {
		if old, ok := c.local.stale(code, now); ok {
			c.stales.Add(1)
			return old, nil
		}
	}
	return t, err
}

// join returns the flight for code, and starts it if there is none.
func (c *Cache) join(code string) *flight {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.flights[code]
	if f == nil {
		f = &flight{done: make(chan struct{})}
		c.flights[code] = f
		go c.fly(code, f)
	}
	return f
}

// fly answers one miss from Redis, else from PostgreSQL, and fills what it may. It has a context of
// its own: those who wait for it come and go.
func (c *Cache) fly(code string, f *flight) {
	ctx, cancel := context.WithTimeout(context.Background(), answerWithin)
	defer cancel()
	generation := c.local.generation(code) // before the reads: a drop after this vetoes the put
	reservation := ""
	if c.redis.usable() && !c.changedHere(code) {
		value, err := c.redis.get(ctx, code)
		if t, ok := decodeTarget(value); ok && err == nil {
			c.redisHits.Add(1)
			c.local.put(code, t, generation)
			c.land(code, f, t, nil)
			return
		}
		if err == nil && value == nil {
			reservation = c.redis.reserve(code)
		}
		f.held.Store(string(value) == holdMark)
	}
	c.misses.Add(1)
	t, err := c.loads.ask(ctx, code)
	if err == nil {
		c.local.put(code, t.target, generation)
	} else if f.held.Load() {
		c.local.drop(code) // Redis says it changed: nobody may be given the old one as stale
	}
	if err == nil && t.id == 0 {
		c.unknown.Add(1)
	}
	c.land(code, f, t.target, err)
	if err != nil {
		return
	}
	if reservation != "" && (t.id != 0 || c.unknownFills.spend(time.Now())) {
		c.redis.fill(code, reservation, t.target)
	}
}

// load asks PostgreSQL for what codes lead to. Those that lead nowhere get the zero target.
func (c *Cache) load(ctx context.Context, codes []string) ([]codeTarget, error) {
	found, err := c.source.targets(ctx, codes)
	if err != nil {
		return nil, err
	}
	byCode := make(map[string]codeTarget, len(found))
	for _, t := range found {
		byCode[t.code] = t
	}
	answers := make([]codeTarget, len(codes))
	for i, code := range codes {
		answers[i] = byCode[code]
	}
	return answers, nil
}

// land hands a flight's result to all who wait for it.
func (c *Cache) land(code string, f *flight, t target, err error) {
	f.target = t
	f.err = err
	c.mu.Lock()
	if c.flights[code] == f {
		delete(c.flights, code)
	}
	c.mu.Unlock()
	close(f.done)
}

// forget detaches the flight for code: who asks after a change must not join a read from before it.
func (c *Cache) forget(code string) {
	c.mu.Lock()
	delete(c.flights, code)
	c.mu.Unlock()
}

// forgetAll detaches all flights.
func (c *Cache) forgetAll() {
	c.mu.Lock()
	c.flights = map[string]*flight{}
	c.mu.Unlock()
}

// noteChange has codes asked of PostgreSQL, and not of Redis, for ownFor.
func (c *Cache) noteChange(codes []string) {
	count := func(by int) {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, code := range codes {
			c.changed[code] += by
			if c.changed[code] == 0 {
				delete(c.changed, code)
			}
		}
	}
	count(1)
	time.AfterFunc(ownFor, func() { count(-1) })
}

// changedHere says whether code was changed here in the last ownFor.
func (c *Cache) changedHere(code string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed[code] != 0
}

// change runs commit, which changes what code leads to, and makes the change known. It holds the
// code in Redis before the commit and after it: what a reader fetched before the commit cannot be
// filled in later. When Redis cannot be told, the change stands all the same; then pending says
// that other replicas learn of it from their next poll. Without a Redis they always do.
func (c *Cache) change(code string, commit func() error) (pending bool, err error) {
	codes := []string{code}
	c.redis.hold(codes)
	err = commit()
	pending = !c.redis.holdAndTell(codes) // also after an error: the commit may have happened
	c.noteChange(codes)
	c.local.drop(code)
	return pending, err
}

// created makes new codes of clients' choice known. It is called after their commit, with those
// that were made only: one hold then overwrites a remembered 404, and a later one cannot be
// remembered. Random codes need none of it: that somebody asked for one in the minute before it was
// made has a chance of one in a million while 30,000 codes are guessed per second.
func (c *Cache) created(codes []string) (pending bool) {
	if len(codes) == 0 {
		return false
	}
	pending = !c.redis.holdAndTell(codes)
	c.noteChange(codes)
	for _, code := range codes {
		c.local.drop(code)
	}
	return pending
}
