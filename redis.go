package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

// redisTier is the cache that replicas share. What a code leads to stands under the key
// hop:<database>:<generation>:<code>, and is one of
//
//	<id> <expires> <url>  what the code leads to (base 36, unix seconds), for valueTTL
//	-                     nowhere, for unknownTTL: spares PostgreSQL the guessers
//	?<token>              a reservation: its reader may fill the key after asking PostgreSQL
//	!                     a hold: a change is under way or just done, and nobody may fill the key
//
// Only the holder of a reservation writes a value, and a hold takes every reservation away. The
// generation is the name of a set of values; a new one leaves all old values unread, to expire.
//
// Without Redis hop still answers correctly. So an error of Redis is never an answer's error: it
// stops hop from reading Redis until the next poll (poll.go) finds it well. All methods that
// requests call work on a nil redisTier, which stands for no REDIS_URL.
type redisTier struct {
	pool *redis.Pool
	dial func() (redis.Conn, error)
	gets *batcher[string, []byte]
	log  *slog.Logger

	fills limiter // reservations and fills under way
	turn  string  // the key of its turn to warm a generation; only the warm-up touches it

	names    atomic.Pointer[keyNames] // nil until the database and a generation are known
	answers  atomic.Bool              // Redis answered lately: changes are told to it
	readable atomic.Bool              // and holds all changes that hop knows of: it may be read
	missed   atomic.Int64             // changes that could not be held, and moves, ever
	address  atomic.Value             // string: the server that all connections lead to
	lost     atomic.Int64             // unix nanoseconds of the last failure
	latency  atomic.Int64             // of the last poll's question, in nanoseconds

	mu       sync.Mutex        // guards refusals; a leaf
	refusals map[string]string // by command: what Redis said when it refused it last
}

const (
	// redisWithin is how long connecting, a TLS handshake, and each answer of Redis may take.
	// PostgreSQL answers faster than a Redis that needs longer.
	redisWithin = 100 * time.Millisecond

	valueTTL   = 10 * time.Minute // ± 10 %: what was filled at once must not expire at once
	unknownTTL = time.Minute      // of codes that lead nowhere
	reserveTTL = 2 * time.Second  // longer than any question to PostgreSQL takes
	holdTTL    = 5 * time.Second  // longer than a reservation: a reader of the old row has lost it

	// namesTTL is how long the keys that describe a generation outlive their last use.
	namesTTL = 24 * time.Hour

	// refusedPause is the time between two attempts at what Redis refuses: rights and settings
	// change by hand.
	refusedPause = 5 * time.Second

	// maxFills is how many reservations and fills are under way at once, each with a connection.
	// What comes on top stays in the local tier alone.
	maxFills = 64

	holdMark    = "!"
	unknownMark = "-"
	getWorkers  = 2 // one sends while the other receives
)

// keyNames are the names of hop's keys, for one database and one generation of values.
type keyNames struct {
	database   string
	generation string
}

// code is the key of a code.
func (n keyNames) code(code string) string {
	return "hop:" + n.database + ":" + n.generation + ":" + code
}

// current is the key that holds the generation, and the server whose data it has.
func (n keyNames) current() string { return "hop:" + n.database + "::generation" }

// cursor is the key that says up to which transaction all changes are held in this generation.
func (n keyNames) cursor() string { return "hop:" + n.database + ":" + n.generation + "::cursor" }

// warm is the key that stands while a replica warms, or has warmed, this generation.
func (n keyNames) warm() string { return "hop:" + n.database + ":" + n.generation + "::warm" }

// lease is a key under which one chunk of a warm-up is written.
func (n keyNames) lease() string {
	return "hop:" + n.database + ":" + n.generation + "::lease:" + rand.Text()
}

// channel is where changes are told.
func (n keyNames) channel() string { return "hop:" + n.database + "::changed" }

// databaseName shortens a database's id to what names its keys: 40 bits tell two databases on one
// Redis apart.
func databaseName(id string) string { return id[:min(8, len(id))] }

// errRedisDown is why Redis is not asked.
var errRedisDown = errors.New("redis is out of reach")

// openRedis prepares the tier. It connects to nothing.
func openRedis(options redisOptions, log *slog.Logger) *redisTier {
	r := &redisTier{log: log, refusals: map[string]string{}, fills: limiter{max: maxFills}}
	r.dial = func() (redis.Conn, error) {
		conn, _, err := dialRedis(options)
		return conn, err
	}
	r.address.Store("")
	r.pool = &redis.Pool{
		Dial:         func() (redis.Conn, error) { return r.dialPlaced(options) },
		MaxIdle:      16, // kept; those beyond are closed after use
		IdleTimeout:  time.Minute,
		TestOnBorrow: r.testIdle,

		// A server that was demoted may leave connections open, and an address lead elsewhere since.
		MaxConnLifetime: time.Minute,
	}
	r.gets = newBatcher(getWorkers, r.getAll)
	return r
}

// placedConn is a connection and the server that it leads to.
type placedConn struct {
	redis.Conn
	address string
}

// dialPlaced opens a connection of the pool. Sentinels may name another server than before, while
// the old one still answers: for a moment there are two masters. Then older connections are used no
// more, and Redis is not read until a poll has told the new one what changed.
func (r *redisTier) dialPlaced(options redisOptions) (redis.Conn, error) {
	conn, address, err := dialRedis(options)
	if err != nil {
		return nil, err
	}
	before := r.address.Swap(address).(string)
	if before != address && before != "" {
		r.missed.Add(1)
		r.readable.Store(false)
		r.log.Warn("redis is another server now", "before", before, "now", address)
	}
	return placedConn{conn, address}, nil
}

// dialRedis opens a connection to Redis, or to the master that the Sentinels name. It also returns
// where that is.
func dialRedis(options redisOptions) (redis.Conn, string, error) {
	address := options.addresses[0]
	if options.master != "" {
		var err error
		address, err = askSentinels(options)
		if err != nil {
			return nil, "", err
		}
	}
	conn, err := redis.Dial("tcp", address, append(dialOptions(options, address),
		redis.DialUsername(options.username),
		redis.DialPassword(options.password),
		redis.DialDatabase(options.db))...)
	return conn, address, err
}

// dialOptions are what connections to Redis and to Sentinels have in common.
func dialOptions(options redisOptions, address string) []redis.DialOption {
	host, _, _ := net.SplitHostPort(address)
	if options.serverName != "" {
		host = options.serverName
	}
	return []redis.DialOption{
		redis.DialConnectTimeout(redisWithin),
		redis.DialReadTimeout(redisWithin),
		redis.DialWriteTimeout(redisWithin),
		redis.DialTLSHandshakeTimeout(redisWithin),
		redis.DialUseTLS(options.tls),
		redis.DialTLSConfig(&tls.Config{
			ServerName:         host,
			InsecureSkipVerify: options.skipVerify, // only when the URL asks for it
		}),
	}
}

// askSentinels returns the address of the master, from the first Sentinel that knows it.
func askSentinels(options redisOptions) (string, error) {
	err := errRedisDown
	for _, sentinel := range options.addresses {
		var conn redis.Conn
		conn, err = redis.Dial("tcp", sentinel, append(dialOptions(options, sentinel),
			redis.DialUsername(options.sentinelUsername),
			redis.DialPassword(options.sentinelPassword))...)
		if err != nil {
			continue
		}
		var parts []string
		parts, err = redis.Strings(conn.Do("SENTINEL", "get-master-addr-by-name", options.master))
		conn.Close()
		if err == nil && len(parts) == 2 {
			return net.JoinHostPort(parts[0], parts[1]), nil
		}
	}
	return "", fmt.Errorf("no Sentinel names the master %s: %w", options.master, err)
}

// testIdle decides whether a pooled connection that idled since then is used. Connections from
// before a failure may lead to a server that is gone, and all must lead to the same server. The
// rest is asked after 10 s only: asking each time would double the round trips.
func (r *redisTier) testIdle(conn redis.Conn, since time.Time) error {
	isElsewhere := conn.(placedConn).address != r.address.Load()
	if isElsewhere || since.UnixNano() <= r.lost.Load() {
		return errRedisDown
	}
	if time.Since(since) < 10*time.Second {
		return nil
	}
	_, err := conn.Do("PING")
	r.failed("PING", err)
	return err
}

// usable says whether Redis may be read.
func (r *redisTier) usable() bool { return r != nil && r.readable.Load() }

// failed takes note of an error. When the connection failed, Redis is neither read nor told
// anything until a poll finds it well. When Redis refused one command, it is logged once.
func (r *redisTier) failed(command string, err error) {
	if err == nil || errors.Is(err, redis.ErrNil) {
		return
	}
	if refusal, ok := errors.AsType[redis.Error](err); ok {
		r.refused(command, refusal)
		return
	}
	r.lost.Store(time.Now().UnixNano())
	answered := r.answers.Swap(false)
	r.readable.Store(false)
	if answered {
		r.log.Warn("redis lost", "err", err)
	}
}

// refused logs that Redis refuses a command, once for each thing it says about it.
func (r *redisTier) refused(command string, refusal redis.Error) {
	word, _, _ := strings.Cut(refusal.Error(), " ")
	r.mu.Lock()
	known := r.refusals[command] == word
	r.refusals[command] = word
	r.mu.Unlock()
	if !known {
		r.log.Warn("redis refuses, hop works without it", "command", command,
			"err", refusal.Error())
	}
}

// do sends one command.
func (r *redisTier) do(command string, args ...any) (any, error) {
	conn := r.pool.Get()
	defer conn.Close()
	return r.doOn(conn, command, args...)
}

// doOn is do on a connection of the caller's.
func (r *redisTier) doOn(conn redis.Conn, command string, args ...any) (any, error) {
	reply, err := conn.Do(command, args...)
	r.failed(command, err)
	return reply, err
}

// ---- reading ----

// get returns the value of code, or nil if there is none. Questions of one moment share an MGET.
func (r *redisTier) get(ctx context.Context, code string) ([]byte, error) {
	return r.gets.ask(ctx, code)
}

// getAll is get for many codes.
func (r *redisTier) getAll(_ context.Context, codes []string) ([][]byte, error) {
	if !r.readable.Load() {
		return nil, errRedisDown // it went while they queued
	}
	conn := r.pool.Get()
	defer conn.Close()
	names := r.names.Load()
	if !r.readable.Load() || names == nil {
		return nil, errRedisDown // the connection leads to another server
	}
	keys := make([]any, len(codes))
	for i, code := range codes {
		keys[i] = names.code(code)
	}
	return redis.ByteSlices(r.doOn(conn, "MGET", keys...))
}

// encodeTarget returns the value that stands for t, and for how many ms it may stand.
func encodeTarget(t target) (value string, ttl int64) {
	if t.id == 0 {
		return unknownMark, unknownTTL.Milliseconds()
	}
	ttl = valueTTL.Milliseconds() * (90 + mathrand.Int64N(21)) / 100
	if t.expires != 0 {
		left := time.Until(time.Unix(t.expires, 0)).Milliseconds()
		ttl = max(1, min(ttl, left))
	}
	b := make([]byte, 0, len(t.location[0])+24)
	b = strconv.AppendInt(b, t.id, 36)
	b = append(b, ' ')
	b = strconv.AppendInt(b, t.expires, 36)
	b = append(b, ' ')
	b = append(b, t.location[0]...)
	return string(b), ttl
}

// decodeTarget reads a value. ok is false for no value, reservations, holds and what it does not
// understand.
func decodeTarget(value []byte) (t target, ok bool) {
	if string(value) == unknownMark {
		return target{}, true
	}
	id, rest, _ := bytes.Cut(value, []byte(" "))
	expires, url, found := bytes.Cut(rest, []byte(" "))
	if !found {
		return target{}, false
	}
	var err error
	t.id, err = strconv.ParseInt(string(id), 36, 64)
	if err != nil || t.id <= 0 {
		return target{}, false
	}
	t.expires, err = strconv.ParseInt(string(expires), 36, 64)
	if err != nil {
		return target{}, false
	}
	t.location = []string{string(url)}
	return t, true
}

// ---- filling ----

// reserve makes the caller the one reader who may fill code. It returns a token for fill, or ""
// when somebody else is filling it, or a change is under way, or Redis cannot say.
func (r *redisTier) reserve(code string) string {
	names := r.names.Load()
	if names == nil {
		return ""
	}
	if !r.fills.enter() {
		return ""
	}
	defer r.fills.leave()
	token := "?" + rand.Text()
	reply, err := r.do("SET", names.code(code), token, "NX", "PX", reserveTTL.Milliseconds())
	if err != nil || reply == nil {
		return ""
	}
	return token
}

// fillScript sets a value if the reservation still stands. A Redis that hung meanwhile has let it
// expire, so that a value that waited in its queue is not set.
const fillScript = `
	if redis.call('GET', KEYS[1]) == ARGV[1] then
	    redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
	end`

// fill gives code's value to all replicas, if the reservation that token stands for still does.
func (r *redisTier) fill(code, token string, t target) {
	names := r.names.Load()
	if names == nil {
		return
	}
	if !r.fills.enter() {
		return
	}
	defer r.fills.leave()
	value, ttl := encodeTarget(t)
	r.do("EVAL", fillScript, 1, names.code(code), token, value, ttl)
}

// ---- changes ----

// hold keeps everybody from filling codes for holdTTL. It returns false if that could not be done.
func (r *redisTier) hold(codes []string) bool { return r.holdAll(codes, false) }

// holdAndTell is hold, and tells all replicas by PUBLISH to forget codes.
func (r *redisTier) holdAndTell(codes []string) bool { return r.holdAll(codes, true) }

// holdAll holds codes in one pipeline. Nothing rests on the message: a Redis that refuses it has
// still taken the holds.
func (r *redisTier) holdAll(codes []string, tell bool) bool {
	if r == nil {
		return true // there is nothing to hold them in
	}
	names := r.names.Load()
	if names == nil || !r.answers.Load() || !r.sendHolds(*names, codes, tell) {
		r.missed.Add(1)
		r.readable.Store(false) // until a poll has held what changed; see readFrom for the order
		return false
	}
	return true
}

// sendHolds sends what holdAll describes and says whether Redis took the holds.
func (r *redisTier) sendHolds(names keyNames, codes []string, tell bool) bool {
	conn := r.pool.Get()
	defer conn.Close()
	for _, code := range codes {
		conn.Send("SET", names.code(code), holdMark, "PX", holdTTL.Milliseconds())
	}
	if tell {
		conn.Send("PUBLISH", names.channel(), strings.Join(codes, " "))
	}
	err := receiveAll(conn, len(codes))
	if err != nil {
		r.failed("SET", err)
		return false
	}
	if tell {
		_, err := conn.Receive()
		r.failed("PUBLISH", err)
	}
	return true
}

// receiveAll flushes a pipeline and returns the first error among its next n replies, which
// redigo's Do("") would hide.
func receiveAll(conn redis.Conn, n int) error {
	err := conn.Flush()
	for range n {
		_, replyErr := conn.Receive()
		if err == nil {
			err = replyErr
		}
	}
	return err
}

// listen calls forget for every code that some replica says has changed, until ctx ends. It hurries
// what the next poll would find anyway, so a message that is lost costs nothing but time.
func (r *redisTier) listen(ctx context.Context, forget func(code string)) {
	for ctx.Err() == nil {
		pause := redisWithin * 2
		err := r.listenOnce(ctx, forget)
		if refusal, ok := errors.AsType[redis.Error](err); ok {
			r.refused("SUBSCRIBE", refusal)
			pause = refusedPause
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// listenOnce is one connection's life. A silent connection is given up after a while: its other end
// may have gone without a word.
func (r *redisTier) listenOnce(ctx context.Context, forget func(code string)) error {
	const silence = 30 * time.Second
	names := r.names.Load()
	if names == nil || !r.answers.Load() {
		return errRedisDown
	}
	conn, err := r.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	subscription := redis.PubSubConn{Conn: conn}
	if err := subscription.Subscribe(names.channel()); err != nil {
		return err
	}
	for {
		switch message := subscription.ReceiveWithTimeout(silence).(type) {
		case redis.Message:
			for code := range strings.FieldsSeq(string(message.Data)) {
				forget(code)
			}
		case error:
			return message
		}
	}
}
