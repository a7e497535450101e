package main

import (
	"context"
	"crypto/rand"
	"errors"
	"math"
	"strings"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

// How every change reaches every cache, whoever made it and whatever died meanwhile.
//
// PostgreSQL is also the log of changes (Store.changesSince). A poll asks for what changed since
// the last one, holds it in Redis, drops it here, and only then vouches for what the local tier
// keeps. How far Redis has been told stands in Redis itself: a Redis that comes back, be it empty,
// restored from a file, or a replica that missed the last second, says by that what it has missed.
// So nobody has to remember what could not be told.

const (
	// pollEvery is the time between polls. A poll costs PostgreSQL 0.2 ms, and a change that nobody
	// could tell by PUBLISH is old for that long.
	pollEvery = 250 * time.Millisecond

	// pollWithin ends a poll that hangs, in time for another one to succeed within trustFor.
	pollWithin = time.Second
)

// poller keeps a cache true. Its fields belong to the goroutine that polls.
type poller struct {
	cache *Cache

	next    uint64            // ask PostgreSQL from this transaction on; 0: it was not asked yet
	server  string            // the server that next is of
	dropped map[string]uint64 // codes dropped here, with the change they were dropped for
	held    map[string]uint64 // codes held in Redis, likewise, in the generation heldIn
	heldIn  string
	missed  int64      // redisTier.missed when they were held
	lost    int64      // redisTier.lost then
	owed    bool       // a change may have been missed there that no poll has told yet
	told    uint64     // the cursor last seen or written in that generation
	conn    redis.Conn // one poll's connection: the server that was asked is the one that is told
	retryAt time.Time  // Redis refuses: it is not asked before
	polled  bool       // one poll has succeeded
}

// newPoller returns a poller that has seen nothing.
func newPoller(c *Cache) *poller {
	return &poller{cache: c, dropped: map[string]uint64{}, held: map[string]uint64{}}
}

// keepTrue keeps the cache true until ctx ends.
func (c *Cache) keepTrue(ctx context.Context) {
	var listener sync.WaitGroup
	if c.redis != nil {
		listener.Go(func() { c.redis.listen(ctx, c.local.drop) })
	}
	newPoller(c).run(ctx)
	listener.Wait()
}

// run polls until ctx ends.
func (p *poller) run(ctx context.Context) {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		p.poll(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// poll is one poll. The order matters: Redis is asked where it stands, then PostgreSQL what
// changed; that is held in Redis before it is dropped here, or a reader could bring the old value
// back from Redis; and only when all of it is done are the caches trusted.
func (p *poller) poll(ctx context.Context) {
	began := time.Now()
	r := p.cache.redis
	var missed int64
	if r != nil {
		missed = r.missed.Load()
	}
	shared := p.askRedis(began, missed)
	defer p.leaveRedis()
	from := p.start(shared)
	ctx, cancel := context.WithTimeout(ctx, pollWithin)
	defer cancel()
	found, err := p.cache.source.changesSince(ctx, from)
	tooMany := errors.Is(err, errManyChanges)
	if err != nil && !tooMany {
		// PostgreSQL cannot be asked. What Redis knows is then better than nothing, unless it may
		// not know of a change that was made here.
		if !p.owed {
			p.readFrom(shared, missed)
		}
		return
	}
	shared.stale = tooMany
	shared = p.tellRedis(shared, found)
	if tooMany || p.server != found.server || found.next < p.next {
		// More changed than can be dropped one by one; or the server is another one, or has crashed,
		// and may have lost what we have seen; or this is the first poll, which does not show what
		// has changed since the readers of this moment have read.
		p.cache.local.dropAll()
		p.cache.forgetAll()
		p.dropped = map[string]uint64{}
	}
	for _, change := range found.codes {
		// Not only a later transaction: one that waited for a row's lock may have a lower number.
		if p.dropped[change.code] != change.xid {
			p.dropped[change.code] = change.xid
			p.cache.local.drop(change.code)
		}
	}
	forgetBefore(p.dropped, found.next)
	p.server = found.server
	p.next = found.next
	p.cache.local.vouch(began)
	p.readFrom(shared, missed)
	if shared.fresh {
		p.cache.becameCold() // now that Redis may be used
	}
	if !p.polled {
		p.polled = true
		close(p.cache.firstPoll)
	}
}

// start is the transaction to ask PostgreSQL from.
func (p *poller) start(shared sharedState) uint64 {
	from := p.next
	if from == 0 {
		from = math.MaxInt64 // nothing is kept here yet, so that nothing can be old
	}
	if shared.there {
		from = min(from, shared.cursor)
	}
	return from
}

// forgetBefore removes changes that no later poll will show again.
func forgetBefore(seen map[string]uint64, next uint64) {
	for code, xid := range seen {
		if xid < next {
			delete(seen, code)
		}
	}
}

// sharedState is how far Redis has been told.
type sharedState struct {
	answered bool   // Redis answers
	there    bool   // it has a generation of values
	stale    bool   // that generation must not be used any more
	fresh    bool   // this poll has begun it: it holds no values yet
	server   string // whose data the generation has
	cursor   uint64 // all changes of earlier transactions are held in it
}

// askRedis asks Redis for its generation and cursor, and takes over the generation. missed counts
// what Redis was not told, and its moves, up to now.
func (p *poller) askRedis(now time.Time, missed int64) sharedState {
	r := p.cache.redis
	if r == nil || r.names.Load() == nil || now.Before(p.retryAt) {
		return sharedState{}
	}
	lost := r.lost.Load()
	p.conn = r.pool.Get()
	shared, err := r.shared(p.conn)
	if err != nil {
		p.stopReading(err)
		return sharedState{}
	}
	r.latency.Store(int64(time.Since(now)))
	r.answers.Store(true) // changes are told from now on, so that this poll can catch up
	names := r.names.Load()
	if missed != p.missed || lost != p.lost || names.generation != p.heldIn ||
		shared.cursor < p.told {

		// Maybe another server, or another set of values, or a Redis that has gone back in time,
		// which a cursor that long transactions hold back does not show: what was read from it may
		// be older than what was dropped here.
		r.readable.Store(false)
		p.dropped = map[string]uint64{}
		p.held = map[string]uint64{}
		p.heldIn = names.generation
		p.owed = p.owed || missed != p.missed
		p.missed = missed
		p.lost = lost
	}
	p.told = shared.cursor
	return shared
}

// leaveRedis gives the connection of askRedis back.
func (p *poller) leaveRedis() {
	if p.conn != nil {
		p.conn.Close()
		p.conn = nil
	}
}

// stopReading takes note of an error of Redis. Where Redis refuses, it is left alone for a while.
func (p *poller) stopReading(err error) {
	r := p.cache.redis
	r.readable.Store(false)
	if _, refused := errors.AsType[redis.Error](err); refused {
		r.answers.Store(false)
		p.retryAt = time.Now().Add(refusedPause)
	}
}

// tellRedis holds in Redis what changed, and moves its cursor on. Where Redis has no generation, or
// one that must not be used, it begins a new one. It returns the state that Redis is left in.
func (p *poller) tellRedis(shared sharedState, found changes) sharedState {
	if !shared.answered {
		return shared
	}
	r := p.cache.redis
	wentBack := found.next < shared.cursor // which was read before, so that it cannot be ahead
	if !shared.there || shared.stale || wentBack || shared.server != found.server {
		if err := r.newGeneration(p.conn, found); err != nil {
			p.stopReading(err)
			return sharedState{}
		}
		p.held = map[string]uint64{}
		p.heldIn = r.names.Load().generation
		p.told = found.next
		p.owed = false
		shared.there = true
		shared.fresh = true
		return shared
	}
	var codes []string
	for _, change := range found.codes {
		if change.xid >= shared.cursor && p.held[change.code] != change.xid {
			codes = append(codes, change.code)
		}
	}
	if err := r.catchUp(p.conn, codes, found.next); err != nil {
		p.stopReading(err)
		return sharedState{}
	}
	for _, change := range found.codes {
		p.held[change.code] = change.xid
	}
	forgetBefore(p.held, found.next)
	p.told = found.next
	p.owed = false
	return shared
}

// readFrom lets Redis be read, if this poll left it in order and no change was missed since it
// began.
func (p *poller) readFrom(shared sharedState, missed int64) {
	r := p.cache.redis
	if r == nil || !shared.there || r.missed.Load() != missed || !r.answers.Load() {
		return
	}
	known := r.readable.Swap(true)
	if r.missed.Load() != missed || !r.answers.Load() {
		r.readable.Store(false) // it happened just now
		return
	}
	if !known {
		r.log.Info("redis answers")
	}
}

// ---- what stands in Redis ----

// know tells the tier which database it caches. Until then Redis is neither read nor told anything.
func (r *redisTier) know(databaseID string) {
	if r == nil || databaseID == "" {
		return
	}
	name := databaseName(databaseID)
	known := r.names.Load()
	if known == nil || known.database != name {
		r.readable.Store(false)
		r.names.Store(&keyNames{database: name})
	}
}

// shared asks Redis how far it has been told, and makes its generation the tier's. Another one is
// not read before it has been told what this replica knows.
func (r *redisTier) shared(conn redis.Conn) (sharedState, error) {
	names := *r.names.Load()
	state := sharedState{answered: true}
	text, err := redis.String(r.doOn(conn, "GET", names.current()))
	if errors.Is(err, redis.ErrNil) {
		return state, nil
	}
	if err != nil {
		return sharedState{}, err
	}
	generation, server, _ := strings.Cut(text, " ")
	names.generation = generation
	cursor, err := redis.String(r.doOn(conn, "GET", names.cursor()))
	if err != nil && !errors.Is(err, redis.ErrNil) {
		return sharedState{}, err
	}
	if *r.names.Load() != names {
		r.readable.Store(false)
		r.names.Store(&names)
	}
	state.there = err == nil // a generation without a cursor is not to be used
	state.server = server
	state.cursor = parseXID(cursor)
	return state, nil
}

// newGeneration begins a new set of values, as of what a poll has found.
func (r *redisTier) newGeneration(conn redis.Conn, found changes) error {
	names := keyNames{
		database:   r.names.Load().database,
		generation: rand.Text()[:6],
	}
	_, err := r.doOn(conn, "SET", names.cursor(), found.next, "PX", namesTTL.Milliseconds())
	if err != nil {
		return err
	}
	_, err = r.doOn(conn, "SET", names.current(), names.generation+" "+found.server)
	if err != nil {
		return err
	}
	r.names.Store(&names)
	return nil
}

// catchUp holds codes and then moves the cursor on to next: who has the cursor has the holds.
func (r *redisTier) catchUp(conn redis.Conn, codes []string, next uint64) error {
	names := *r.names.Load()
	for _, code := range codes {
		conn.Send("SET", names.code(code), holdMark, "PX", holdTTL.Milliseconds())
	}
	conn.Send("SET", names.cursor(), next, "PX", namesTTL.Milliseconds())
	err := receiveAll(conn, len(codes)+1)
	r.failed("SET", err)
	return err
}
