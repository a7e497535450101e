package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
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
// Nobody writes a value but a leased reader and warm, whose lease is a key of its own. All methods work on nil, which is a Redis
// that nobody asked for: never usable, nothing to hold.
type redisTier struct {
	pool  *redis.Pool
	local *localTier
	scan  func(after int64, n int) ([]namedTarget, error)
	log   *slog.Logger

	gets    chan *getRequest
	up      atomic.Bool  // the breaker: cleared by an error, set by an answered PING once all debts are paid
	latency atomic.Int64 // of the last PING, in ns

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

	warmKey     = "hop:warm" // stands while Redis is warm: an emptied Redis has lost it
	pushChannel = "__redis__:invalidate"
	hold        = "!"
	noTarget    = "-"
)

// fillScript sets a value if the reader's lease still stands.
var fillScript = redis.NewScript(1, `
	if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
	redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) return 1`)

// getRequest waits for one value. reply has room for it.
type getRequest struct {
	code  string
	reply chan getReply
}

type getReply struct {
	value []byte
	err   error
}

var errRedisDown = errors.New("redis is out of reach")

// openRedis prepares the tier for a redis:// URL, connecting to nothing; scan lists live links for warming.
func openRedis(url string, local *localTier, scan func(int64, int) ([]namedTarget, error), log *slog.Logger) *redisTier {
	dial := func() (redis.Conn, error) {
		return redis.DialURL(url, redis.DialConnectTimeout(redisTimeout), redis.DialReadTimeout(redisTimeout), redis.DialWriteTimeout(redisTimeout))
	}
	pool := &redis.Pool{Dial: dial, MaxIdle: 16, MaxActive: 64, IdleTimeout: time.Minute,
		TestOnBorrow: func(c redis.Conn, idle time.Time) error {
			if time.Since(idle) < 10*time.Second {
				return nil // a PING each time would double the round trips
			}
			_, err := c.Do("PING")
			return err
		}}
	r := &redisTier{pool: pool, local: local, scan: scan, log: log, gets: make(chan *getRequest, maxWaiting), owed: map[string]struct{}{}}
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
		r.log.Warn("redis lost", "err", err)
	}
}

// get returns the value of code, nil if there is none. Requests of one moment share an MGET.
func (r *redisTier) get(code string) ([]byte, error) {
	req := &getRequest{code, make(chan getReply, 1)}
	select {
	case r.gets <- req:
	default:
		return nil, errOverloaded
	}
	reply := <-req.reply
	return reply.value, reply.err
}

// serveGets answers get requests for ever, each within redisTimeout.
func (r *redisTier) serveGets() {
	for first := range r.gets {
		batch := drain(r.gets, first, batchSize)
		values, err := r.mget(batch)
		r.failed(err)
		for i, req := range batch {
			if err != nil {
				req.reply <- getReply{err: err}
			} else {
				req.reply <- getReply{value: values[i]}
			}
		}
	}
}

// mget asks for a batch in one command.
func (r *redisTier) mget(batch []*getRequest) ([][]byte, error) {
	if !r.up.Load() {
		return nil, errRedisDown
	}
	keys := make([]any, len(batch))
	for i, req := range batch {
		keys[i] = key(req.code)
	}
	conn := r.pool.Get()
	defer conn.Close()
	return redis.ByteSlices(conn.Do("MGET", keys...))
}

// lease tries to become the reader who may fill code: a token, or "" when somebody else is or a hold stands. ok is false when
// Redis could not be asked.
func (r *redisTier) lease(code string) (token string, ok bool) {
	token = "?" + rand.Text()
	conn := r.pool.Get()
	defer conn.Close()
	_, err := redis.String(conn.Do("SET", key(code), token, "NX", "PX", leaseTTL.Milliseconds()))
	if err == redis.ErrNil {
		return "", true
	}
	r.failed(err)
	if err != nil {
		return "", false
	}
	return token, true
}

// fill gives code's value to all replicas, if the lease still stands.
func (r *redisTier) fill(code, lease string, t target) {
	value, ttl := encodeTarget(t)
	conn := r.pool.Get()
	defer conn.Close()
	_, err := fillScript.Do(conn, key(code), lease, value, ttl)
	r.failed(err)
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
	}
	return nil
}

// ---- tracking ----

// track keeps the local tier coherent until ctx ends: Redis tells of every change to u:* on a connection that redirects its
// invalidations to itself (two connections go deaf when the tracking one dies), and answered PINGs on the same connection prove
// that it still does. trusted is called at the first one.
func (r *redisTier) track(ctx context.Context, trusted func()) {
	for wait := 50 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, time.Second) {
		err := r.trackOnce(ctx, func() { wait = 50 * time.Millisecond; trusted() })
		r.local.distrust()
		if ctx.Err() == nil {
			r.failed(err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// trackOnce is one connection's life.
func (r *redisTier) trackOnce(ctx context.Context, trusted func()) error {
	conn, err := r.pool.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	id, err := redis.Int64(conn.Do("CLIENT", "ID"))
	if err != nil {
		return err
	}
	if _, err = conn.Do("CLIENT", "TRACKING", "ON", "REDIRECT", id, "BCAST", "PREFIX", key("")); err != nil {
		return err
	}
	if _, err = conn.Do("SUBSCRIBE", pushChannel); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go r.ping(ctx, conn)
	for first := true; ; {
		reply, err := redis.Values(redis.ReceiveWithTimeout(conn, trustFor))
		if err != nil {
			return err
		}
		kind, _ := redis.String(reply[0], nil)
		switch {
		case kind == "pong" && len(reply) == 2:
			sent, err := redis.Int64(reply[1], nil)
			if err != nil {
				return err
			}
			if err := r.repay(); err != nil {
				return err
			}
			at := r.local.start.Add(time.Duration(sent))
			r.latency.Store(int64(time.Since(at)))
			r.local.trust(at)
			if first {
				first = false
				go trusted()
			}
		case kind == "message" && len(reply) == 3 && reply[2] == nil: // FLUSHALL
			r.local.distrust()
			go trusted()
		case kind == "message" && len(reply) == 3:
			keys, err := redis.Strings(reply[2], nil)
			if err != nil {
				return err
			}
			for _, k := range keys {
				r.local.drop(strings.TrimPrefix(k, key("")))
			}
		}
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

// claimWarm is true if Redis is not warm and nobody else is about to warm it.
func (r *redisTier) claimWarm() bool {
	conn := r.pool.Get()
	defer conn.Close()
	_, err := redis.String(conn.Do("SET", warmKey, 1, "NX", "PX", valueTTL.Milliseconds()))
	return err == nil
}

// warm gives every live link to Redis that has no key there, in pipelines of warmChunk SETs, and returns how many there are and
// the first keep codes. Each chunk is read from PostgreSQL under a lease of its own, watched by the transaction that sets it: a
// chunk that arrives too late to be true is not set at all. Memory does not grow with the number of links.
func (r *redisTier) warm(keep int) (n int, codes []string, err error) {
	var mu sync.Mutex // guards what follows and serialises the reads, while other workers set what they read before
	var last int64
	var more = true
	work := func() error {
		conn := r.pool.Get()
		defer conn.Close()
		for {
			mu.Lock()
			if !more || err != nil {
				mu.Unlock()
				return nil
			}
			lease := "hop:lease:" + rand.Text()
			conn.Send("SET", lease, 1, "PX", leaseTTL.Milliseconds())
			conn.Send("WATCH", lease)
			failure := receiveAll(conn, 2)
			var chunk []namedTarget
			if failure == nil {
				chunk, failure = r.scan(last, warmChunk)
			}
			if len(chunk) > 0 {
				last = chunk[len(chunk)-1].id
			}
			for i := 0; i < len(chunk) && len(codes) < keep; i++ {
				codes = append(codes, chunk[i].code)
			}
			more, n = len(chunk) == warmChunk, n+len(chunk)
			mu.Unlock()
			if failure == nil {
				failure = setChunk(conn, chunk)
			}
			if failure != nil {
				return failure
			}
		}
	}
	var workers sync.WaitGroup
	for range 3 { // one reads PostgreSQL, one writes to Redis, one waits for its answers
		workers.Go(func() {
			if failure := work(); failure != nil {
				mu.Lock()
				err = fmt.Errorf("warming: %w", failure)
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	return n, codes, err
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
func (r *redisTier) fillLocal(codes []string) error {
	conn := r.pool.Get()
	defer conn.Close()
	for len(codes) > 0 {
		chunk := codes[:min(warmChunk, len(codes))]
		codes = codes[len(chunk):]
		keys, generations := make([]any, len(chunk)), make([]uint64, len(chunk))
		for i, code := range chunk {
			keys[i], generations[i] = key(code), r.local.generation(code)
		}
		values, err := redis.ByteSlices(conn.Do("MGET", keys...))
		if err != nil {
			return err
		}
		for i, code := range chunk {
			if t, ok := decodeTarget(values[i]); ok && t.id != 0 {
				r.local.put(code, t, generations[i], localTTL, true)
			}
		}
	}
	return nil
}
