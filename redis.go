package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

// redisTier is the cache that replicas share. A key u:<code> holds one of
//
//	<id> <expires> <url>  what the code leads to (base 36, unix seconds), for valueTTL
//	-                     nothing, for sentinelTTL: spares PostgreSQL the guessers
//	?<token>              a lease: the one reader who may fill it, after reading PostgreSQL, by compare-and-set on the token
//	!                     a hold: a change is under way or just done; nobody may fill
//
// Nobody writes a value but a leased reader and warm, whose lease is a key of its own. usable and hold work on nil, which is a
// Redis that nobody asked for: never usable, nothing to hold.
type redisTier struct {
	pool  *redis.Pool
	local *localTier
	scan  func(after int64, n int) ([]namedTarget, error)
	log   *slog.Logger

	gets    chan *getRequest
	cold    chan struct{} // Redis answers again or was flushed: it may be empty
	up      atomic.Bool   // the breaker: cleared by an error, set by an answered PING once all debts are paid
	latency atomic.Int64  // of the last PING, in ns
	lost    atomic.Int64  // when the breaker opened last, in unix ns: pooled connections from before may be dead

	mu     sync.Mutex          // guards owed, banned and the setting of up; a leaf but for repay's Redis call
	owed   map[string]struct{} // codes changed while Redis was out of reach
	banned time.Time           // more was owed than is worth remembering: by then every value of that time has expired
}

const (
	redisTimeout = 100 * time.Millisecond // to connect, read and write: PostgreSQL answers faster than a sick Redis
	valueTTL     = 10 * time.Minute       // ± 10 %, so that what was warmed at once does not expire at once
	sentinelTTL  = time.Minute
	leaseTTL     = 2 * time.Second        // longer than any read of PostgreSQL may take
	holdTTL      = 5 * time.Second        // longer than a lease: who read before the change has lost it when the hold ends
	maxOwed      = 100_000                // codes, about 10 MB
	batchSize    = 64                     // keys in one MGET: beyond that batches cost latency and win nothing
	warmChunk    = 1000                   // links in one pipeline: 283,000 SETs/s; larger ones only block Redis longer
	pingEvery    = 500 * time.Millisecond // a quarter of trustFor: one lost PING costs nothing
	retryEvery   = 200 * time.Millisecond // between attempts to connect

	warmKey     = "hop:warm" // stands while Redis is warm: an emptied Redis has lost it
	pushChannel = "__redis__:invalidate"
	hold        = "!"
	noTarget    = "-"
)

// fillScript sets a value if the reader's lease still stands.
const fillScript = `if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end`

// getRequest waits for one value; done is closed when value or err is set.
type getRequest struct {
	code  string
	value []byte
	err   error
	done  chan struct{}
}

var errRedisDown = errors.New("redis is out of reach")

// openRedis prepares the tier for a redis:// URL, connecting to nothing; scan lists live links for warming.
func openRedis(url string, local *localTier, scan func(int64, int) ([]namedTarget, error), log *slog.Logger) *redisTier {
	dial := func() (redis.Conn, error) {
		return redis.DialURL(url, redis.DialConnectTimeout(redisTimeout), redis.DialReadTimeout(redisTimeout), redis.DialWriteTimeout(redisTimeout))
	}
	r := &redisTier{local: local, scan: scan, log: log, gets: make(chan *getRequest, maxWaiting), cold: make(chan struct{}, 1), owed: map[string]struct{}{}}
	r.pool = &redis.Pool{Dial: dial, MaxIdle: 16, IdleTimeout: time.Minute, // as many as there are misses and changes under way
		TestOnBorrow: func(c redis.Conn, idle time.Time) error {
			if time.Since(idle) < 10*time.Second && idle.UnixNano() > r.lost.Load() {
				return nil // a PING each time would double the round trips
			}
			_, err := c.Do("PING")
			return err
		}}
	for range 2 { // one sends while the other receives
		go r.serveGets()
	}
	return r
}

func key(code string) string { return "u:" + code }

// usable says whether asking is worth while.
func (r *redisTier) usable() bool { return r != nil && r.up.Load() }

// failed opens the breaker, unless Redis itself answered the error.
func (r *redisTier) failed(err error) {
	if answer := redis.Error(""); err != nil && !errors.As(err, &answer) && r.up.CompareAndSwap(true, false) {
		r.lost.Store(time.Now().UnixNano())
		r.log.Warn("redis lost", "err", err)
	}
}

// do sends one command on a pooled connection.
func (r *redisTier) do(command string, args ...any) (any, error) {
	conn := r.pool.Get()
	defer conn.Close()
	reply, err := conn.Do(command, args...)
	r.failed(err)
	return reply, err
}

// get returns the value of code, nil if there is none. Requests of one moment share an MGET.
func (r *redisTier) get(code string) ([]byte, error) {
	req := &getRequest{code: code, done: make(chan struct{})}
	select {
	case r.gets <- req:
		<-req.done
		return req.value, req.err
	default:
		return nil, errOverloaded
	}
}

// serveGets answers get requests for ever, each within redisTimeout.
func (r *redisTier) serveGets() {
	for first := range r.gets {
		batch := drain(r.gets, first, batchSize)
		keys := make([]any, len(batch))
		for i, req := range batch {
			keys[i] = key(req.code)
		}
		values, err := make([][]byte, len(batch)), errRedisDown
		if r.up.Load() { // it may have gone while they queued
			if reply, failure := redis.ByteSlices(r.do("MGET", keys...)); failure == nil {
				values, err = reply, nil
			}
		}
		for i, req := range batch {
			req.value, req.err = values[i], err
			close(req.done)
		}
	}
}

// lease tries to become the reader who may fill code: a token, or "" when somebody else is or a hold stands. ok is false when
// Redis could not be asked.
func (r *redisTier) lease(code string) (token string, ok bool) {
	token = "?" + rand.Text()
	reply, err := r.do("SET", key(code), token, "NX", "PX", leaseTTL.Milliseconds())
	if reply == nil {
		token = ""
	}
	return token, err == nil
}

// fill gives code's value to all replicas, if the lease still stands.
func (r *redisTier) fill(code, lease string, t target) {
	value, ttl := encodeTarget(t)
	r.do("EVAL", fillScript, 1, key(code), lease, value, ttl)
}

// encodeTarget returns the value that stands for t and how many ms it may stand.
func encodeTarget(t target) (string, int64) {
	if t.id == 0 {
		return noTarget, sentinelTTL.Milliseconds()
	}
	ttl := valueTTL.Milliseconds() * (90 + mathrand.Int64N(21)) / 100
	if t.expires != 0 {
		ttl = max(1, min(ttl, time.Until(time.Unix(t.expires, 0)).Milliseconds()))
	}
	b := make([]byte, 0, len(t.location[0])+24)
	b = append(strconv.AppendInt(b, t.id, 36), ' ')
	b = append(strconv.AppendInt(b, t.expires, 36), ' ')
	return string(append(b, t.location[0]...)), ttl
}

// decodeTarget reads a value; ok is false for leases, holds and what it does not understand.
func decodeTarget(value []byte) (t target, ok bool) {
	if string(value) == noTarget {
		return t, true
	}
	id, rest, _ := bytes.Cut(value, []byte(" "))
	expires, url, ok := bytes.Cut(rest, []byte(" "))
	if !ok {
		return t, false
	}
	var err1, err2 error
	t.id, err1 = strconv.ParseInt(string(id), 36, 64)
	t.expires, err2 = strconv.ParseInt(string(expires), 36, 64)
	t.location = []string{string(url)}
	return t, err1 == nil && err2 == nil && t.id > 0
}

// hold vetoes fills of codes for holdTTL and tells every replica to forget them; false if that could not be done.
func (r *redisTier) hold(codes []string) bool {
	if r == nil {
		return true
	}
	return r.up.Load() && r.sendHolds(codes) == nil
}

// sendHolds holds codes in one pipeline.
func (r *redisTier) sendHolds(codes []string) error {
	conn := r.pool.Get()
	defer conn.Close()
	for _, code := range codes {
		conn.Send("SET", key(code), hold, "PX", holdTTL.Milliseconds())
	}
	err := receiveAll(conn, len(codes))
	r.failed(err)
	return err
}

// receiveAll flushes a pipeline and returns the first error among its n replies, which Do("") would hide.
func receiveAll(conn redis.Conn, n int) error {
	err := conn.Flush()
	for range n {
		if _, replyErr := conn.Receive(); err == nil {
			err = replyErr
		}
	}
	return err
}

// owe remembers codes that were changed but not held. This replica does not trust Redis again before they are.
func (r *redisTier) owe(codes []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.up.Store(false)
	for _, code := range codes {
		r.owed[code] = struct{}{}
	}
	if len(r.owed) > maxOwed {
		clear(r.owed)
		r.banned = time.Now().Add(valueTTL * 11 / 10)
	}
}

// repay holds what is owed and then trusts Redis again. Called when Redis has just answered.
func (r *redisTier) repay() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.owed) > 0 {
		codes := make([]string, 0, warmChunk)
		for code := range r.owed {
			if codes = append(codes, code); len(codes) == warmChunk {
				break
			}
		}
		if err := r.sendHolds(codes); err != nil {
			return err
		}
		for _, code := range codes {
			delete(r.owed, code)
		}
	}
	if time.Now().After(r.banned) && r.up.CompareAndSwap(false, true) {
		r.log.Info("redis answers")
		r.emptied()
	}
	return nil
}

// ---- tracking ----

// track keeps the local tier coherent until ctx ends: Redis tells of every change to u:* on a connection that redirects its
// invalidations to itself (two connections go deaf when the tracking one dies), and answered PINGs on the same connection prove
// that it still does.
func (r *redisTier) track(ctx context.Context) {
	for ctx.Err() == nil {
		err := r.trackOnce(ctx)
		r.local.distrust()
		if ctx.Err() == nil {
			r.failed(err)
		}
		select {
		case <-time.After(retryEvery):
		case <-ctx.Done():
		}
	}
}

// trackOnce is one connection's life.
func (r *redisTier) trackOnce(ctx context.Context) error {
	conn, err := r.pool.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	id, err := conn.Do("CLIENT", "ID")
	if err == nil {
		_, err = conn.Do("CLIENT", "TRACKING", "ON", "REDIRECT", id, "BCAST", "PREFIX", key(""))
	}
	if err == nil {
		_, err = conn.Do("SUBSCRIBE", pushChannel)
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r.local.distrust() // what was filled while nobody listened
	go r.ping(ctx, conn)
	for {
		reply, err := redis.Values(redis.ReceiveWithTimeout(conn, trustFor))
		if err == nil {
			err = r.hear(reply)
		}
		if err != nil {
			return err
		}
	}
}

// hear takes one message: the answer to a PING, or keys that changed.
func (r *redisTier) hear(message []any) error {
	switch kind, _ := redis.String(message[0], nil); {
	case kind == "pong":
		ns, err := redis.Int64(message[1], nil)
		if err == nil {
			err = r.repay()
		}
		if err != nil {
			return err
		}
		sent := r.local.start.Add(time.Duration(ns))
		r.latency.Store(int64(time.Since(sent)))
		r.local.trust(sent)
	case kind == "message" && message[2] == nil: // FLUSHALL
		r.local.distrust()
		r.emptied()
	case kind == "message":
		keys, err := redis.Strings(message[2], nil)
		for _, k := range keys {
			r.local.drop(strings.TrimPrefix(k, key("")))
		}
		return err
	}
	return nil
}

// emptied wakes keepWarm.
func (r *redisTier) emptied() {
	select {
	case r.cold <- struct{}{}:
	default:
	}
}

// ping sends the time on conn every pingEvery, the first at once, and closes it when ctx ends or a send fails.
func (r *redisTier) ping(ctx context.Context, conn redis.Conn) {
	defer conn.Close()
	for tick := time.NewTicker(pingEvery); ; {
		conn.Send("PING", int64(time.Since(r.local.start)))
		if conn.Flush() != nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			tick.Stop()
			return
		}
	}
}

// ---- warming ----

// keepWarm warms Redis until ctx ends whenever it may have been emptied, one replica doing it for all. The first time it also
// brings codes into the local tier, and then closes ready.
func (r *redisTier) keepWarm(ctx context.Context, codes []string, ready chan<- struct{}) {
	for {
		select {
		case <-r.cold:
		case <-ctx.Done():
			return
		}
		if reply, _ := r.do("SET", warmKey, 1, "NX", "PX", valueTTL.Milliseconds()); reply != nil && codes == nil {
			r.warm(0)
		}
		if ready != nil {
			r.fillLocal(codes)
			close(ready)
			codes, ready = nil, nil
		}
	}
}

// warm gives every live link to Redis that has no key there, in pipelines of warmChunk SETs, and returns the first keep codes.
// Each chunk is read from PostgreSQL under a lease of its own, watched by the transaction that sets it: a chunk that arrives too
// late to be true is not set at all. Memory does not grow with the number of links.
func (r *redisTier) warm(keep int) (codes []string) {
	var mu sync.Mutex // guards what follows and serialises the reads, while other workers set what they read before
	var last, links int64
	var failure error
	var done bool
	work := func() error {
		conn := r.pool.Get()
		defer conn.Close()
		for {
			mu.Lock()
			if done {
				mu.Unlock()
				return nil
			}
			lease := "hop:lease:" + rand.Text()
			conn.Send("SET", lease, 1, "PX", leaseTTL.Milliseconds())
			conn.Send("WATCH", lease)
			err := receiveAll(conn, 2)
			var chunk []namedTarget
			if err == nil {
				chunk, err = r.scan(last, warmChunk)
			}
			done, links = len(chunk) < warmChunk, links+int64(len(chunk))
			for _, t := range chunk {
				if last = t.id; len(codes) < keep {
					codes = append(codes, t.code)
				}
			}
			mu.Unlock()
			if err == nil {
				err = setChunk(conn, chunk)
			}
			if err != nil {
				return err
			}
		}
	}
	start := time.Now()
	var workers sync.WaitGroup
	for range 3 { // one reads PostgreSQL, one writes to Redis, one waits for its answers
		workers.Go(func() {
			if err := work(); err != nil {
				mu.Lock()
				failure, done = err, true
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	if failure != nil {
		r.log.Warn("redis not warm", "links", links, "err", failure)
		r.do("DEL", warmKey) // whoever hears of Redis next may try again
		return codes
	}
	r.log.Info("redis warm", "links", links, "took", time.Since(start))
	return codes
}

// setChunk sets the missing ones of chunk in one transaction, which fails as a whole when the watched lease has expired.
func setChunk(conn redis.Conn, chunk []namedTarget) error {
	conn.Send("MULTI")
	for _, t := range chunk {
		value, ttl := encodeTarget(t.target)
		conn.Send("SET", key(t.code), value, "NX", "PX", ttl)
	}
	conn.Send("EXEC")
	return receiveAll(conn, len(chunk)+2)
}

// fillLocal brings codes from Redis into the local tier.
func (r *redisTier) fillLocal(codes []string) {
	for chunk := range slices.Chunk(codes, warmChunk) {
		keys, generations := make([]any, len(chunk)), make([]uint64, len(chunk))
		for i, code := range chunk {
			keys[i], generations[i] = key(code), r.local.generation(code)
		}
		values, _ := redis.ByteSlices(r.do("MGET", keys...)) // none after an error: it only leaves us colder
		for i, value := range values {
			if t, ok := decodeTarget(value); ok && t.id != 0 {
				r.local.put(chunk[i], t, generations[i], localTTL, true)
			}
		}
	}
}
