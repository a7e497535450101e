package main

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// What the coherence checker does to Redis, to PostgreSQL and to the replicas.

// coherenceCase is one way of running three replicas.
type coherenceCase struct {
	name  string
	fault fault // nil: nothing is disturbed while they run

	// elsewhere is how old answers of other replicas than the writer's may be; 0 is trustFor. The
	// writer's own replica may never be wrong.
	elsewhere time.Duration

	noRedis bool
	mute    bool // Redis lets nobody publish or subscribe
	cutOff  bool // replicas are cut off from PostgreSQL
	direct  bool // writes go to PostgreSQL only: their writers die after the commit
	mortal  bool // replica 0 is a process of its own, which may be killed
}

// coherenceCases are all of them.
var coherenceCases = []coherenceCase{
	{name: "none", elsewhere: calmElsewhere},
	{name: "evicting", elsewhere: calmElsewhere, fault: evictCodes},
	{name: "evictany", fault: evictAnything},
	{name: "unheard", fault: killSubscribers},
	{name: "flushed", fault: flushRedis},
	{name: "paused", fault: pauseRedis},
	{name: "restarted", fault: restartRedis},
	{name: "restored", fault: restoreRedis},
	{name: "cutredis", fault: cutFromRedis},
	{name: "cutpostgres", cutOff: true, fault: cutFromPostgres},
	{name: "noredis", noRedis: true},
	{name: "mute", mute: true},
	{name: "deadwriter", direct: true},
	{name: "deadreplica", mortal: true, fault: killReplica},
}

func TestFault16Coherence(t *testing.T) {
	t.Logf("-coherence.seed=%d", *coherenceSeed)
	var turn sync.Mutex // keeps the faults apart, while the holds of those before expire
	for n, k := range coherenceCases {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			c := k.disturb(t, &turn, *coherenceSeed+uint64(n)<<32)
			if len(c.problems) == 0 {
				c.settle()
			}
			c.report()
			c.verdict()
		})
	}
}

// disturb runs a case up to the judgement of all redirects, in its turn.
func (k coherenceCase) disturb(t *testing.T, turn *sync.Mutex, seed uint64) *checker {
	turn.Lock()
	defer turn.Unlock()
	c := k.start(t)
	c.run(coherenceTime(4*time.Second), seed, k.fault)
	c.judge()
	return c
}

// start starts the services and the replicas, and waits until all is in use.
func (k coherenceCase) start(t *testing.T) *checker {
	t.Helper()
	dsn := testDatabase(t)
	c := newChecker(t, k.name, dsn)
	c.elsewhere = k.elsewhere
	c.calm = k.elsewhere != 0
	if !c.calm {
		c.elsewhere = trustFor
	}
	c.cutOff = k.cutOff
	c.direct = k.direct
	if !k.noRedis {
		c.redis = startRedis(t)
		c.names = c.currentNames
	}
	for n := range replicaCount {
		settings := []string{
			"DATABASE_URL=" + c.slowPostgres(dsn), "CLICK_EVENTS=off", "LOG_LEVEL=info",
			"BASE_URL=http://hop.test",
		}
		if !k.noRedis {
			settings = append(settings, "REDIS_URL="+c.slowRedis(k.mute))
		}
		if k.mortal && n == 0 {
			c.victim = startHop(t, settings...)
			c.places = append(c.places, &place{url: c.victim.url, mortal: true})
			continue
		}
		a := startApp(t, settings...)
		c.places = append(c.places, &place{url: a.url, app: a, local: a.localEntries})
	}
	c.awaitPolls()
	c.awaitRedis()
	return c
}

// slowPostgres is the address of PostgreSQL as one replica reaches it: slowly at times.
func (c *checker) slowPostgres(dsn string) string {
	u, err := url.Parse(dsn)
	if err != nil {
		c.t.Fatal(err)
	}
	p := startProxy(c.t, u.Host)
	p.slow(atTimes)
	c.toPostgres = append(c.toPostgres, p)
	u.Host = p.addr
	return u.String()
}

// slowRedis is likewise for Redis, unless nothing may be late. A mute one has an account for the
// replicas that may use no channels.
func (c *checker) slowRedis(mute bool) string {
	u := url.URL{Scheme: "redis", Host: fmt.Sprintf("127.0.0.1:%d", c.redis.port), Path: "/0"}
	if mute {
		c.redis.redisDo(c.t, "ACL", "SETUSER", "hop", "on", ">pw", "~*", "&*", "+@all",
			"-subscribe", "-publish")
		u.User = url.UserPassword("hop", "pw")
	}
	if !c.calm {
		p := startProxy(c.t, u.Host)
		p.slow(atTimes)
		c.toRedis = append(c.toRedis, p)
		u.Host = p.addr
	}
	return u.String()
}

// atTimes makes every third packet late, so that what was read is old when it is used.
func atTimes() time.Duration {
	if rand.IntN(3) > 0 {
		return 0
	}
	return time.Duration(rand.Int64N(int64(12 * time.Millisecond)))
}

// currentNames are the names of the keys that are in use in Redis now.
func (c *checker) currentNames() keyNames {
	names := keyNames{database: c.database}
	conn, err := c.redis.dialRedis()
	if err != nil {
		return names
	}
	defer conn.Close()
	text, err := redis.String(conn.Do("GET", names.current()))
	if err != nil {
		return names
	}
	names.generation, _, _ = strings.Cut(text, " ")
	return names
}

// ---- Redis forgets ----

// evictCodes removes single codes' keys, values as well as holds and reservations, as a full Redis
// does. Those that were written just now are hit most.
func evictCodes(c *checker, r *rand.Rand, stop <-chan struct{}) {
	conn, err := c.redis.dialRedis()
	if err != nil {
		c.problem("%v", err)
		return
	}
	defer conn.Close()
	for pause(r, time.Millisecond, 8*time.Millisecond, stop) {
		c.evictSome(conn, r)
	}
}

// evictAnything also removes the keys that say what is in use, now and then.
func evictAnything(c *checker, r *rand.Rand, stop <-chan struct{}) {
	conn, err := c.redis.dialRedis()
	if err != nil {
		c.problem("%v", err)
		return
	}
	defer conn.Close()
	for pause(r, time.Millisecond, 8*time.Millisecond, stop) {
		names := c.names()
		switch r.IntN(100) {
		case 0:
			c.unlink(conn, names.current())
		case 1:
			c.unlink(conn, names.cursor())
		case 2:
			c.unlink(conn, names.warm())
		default:
			c.evictSome(conn, r)
		}
	}
}

// evictSome removes the keys of the codes that were written last, and of one more.
func (c *checker) evictSome(conn redis.Conn, r *rand.Rand) {
	const last = 4
	names := c.names()
	cold, warm, _ := c.pick(r)
	keys := []any{names.code(cold.code), names.code(warm.code)}
	c.mu.Lock()
	for n := max(0, c.next-last); n < c.next; n++ {
		keys = append(keys, names.code(c.recent[n%recentCount].code))
	}
	c.mu.Unlock()
	c.unlink(conn, keys...)
}

// unlink removes keys.
func (c *checker) unlink(conn redis.Conn, keys ...any) {
	if _, err := conn.Do("UNLINK", keys...); err != nil {
		c.problem("UNLINK: %v", err)
	}
	c.faults.Add(1)
}

// flushRedis empties Redis.
func flushRedis(c *checker, r *rand.Rand, stop <-chan struct{}) {
	for pause(r, 100*time.Millisecond, 600*time.Millisecond, stop) {
		c.redis.redisDo(c.t, "FLUSHALL")
		c.faults.Add(1)
	}
}

// restartRedis kills Redis and starts it again, empty.
func restartRedis(c *checker, r *rand.Rand, stop <-chan struct{}) {
	for pause(r, 300*time.Millisecond, 1500*time.Millisecond, stop) {
		c.redis.kill()
		pause(r, time.Millisecond, time.Second, stop)
		c.redis.start(c.t)
		c.redis.waitRedis(c.t)
		c.faults.Add(1)
	}
}

// restoreRedis kills Redis and starts it again with what it held some time before: old values, and
// an old word of what it has been told. At times it is away so briefly that no poll sees it gone.
func restoreRedis(c *checker, r *rand.Rand, stop <-chan struct{}) {
	c.redis.redisDo(c.t, "SAVE")
	for pause(r, 300*time.Millisecond, 1200*time.Millisecond, stop) {
		if r.IntN(2) == 0 {
			c.redis.redisDo(c.t, "SAVE")
			pause(r, time.Millisecond, 400*time.Millisecond, stop)
		}
		c.redis.kill()
		if r.IntN(2) == 0 {
			pause(r, time.Millisecond, 600*time.Millisecond, stop)
		}
		c.redis.start(c.t)
		c.redis.waitRedis(c.t)
		c.faults.Add(1)
	}
}

// ---- what is out of reach ----

// killSubscribers breaks the connections on which changes are heard, so often that most are not.
func killSubscribers(c *checker, r *rand.Rand, stop <-chan struct{}) {
	for pause(r, time.Millisecond, 300*time.Millisecond, stop) {
		c.redis.redisDo(c.t, "CLIENT", "KILL", "TYPE", "pubsub")
		c.faults.Add(1)
	}
}

// pauseRedis stops Redis and lets it go on.
func pauseRedis(c *checker, r *rand.Rand, stop <-chan struct{}) {
	for pause(r, 300*time.Millisecond, 1500*time.Millisecond, stop) {
		c.redis.signal(syscall.SIGSTOP)
		pause(r, 100*time.Millisecond, 2500*time.Millisecond, stop)
		c.redis.signal(syscall.SIGCONT)
		c.faults.Add(1)
	}
}

// cutFromRedis cuts one replica off from Redis.
func cutFromRedis(c *checker, r *rand.Rand, stop <-chan struct{}) {
	c.hangWays(c.toRedis, r, stop)
}

// cutFromPostgres cuts one replica off from PostgreSQL: for that time it knows what Redis knows.
func cutFromPostgres(c *checker, r *rand.Rand, stop <-chan struct{}) {
	c.hangWays(c.toPostgres, r, stop)
}

// hangWays withholds all bytes on one replica's way to a service, for so long that it gives up what
// it keeps, and passes them on afterwards, or breaks the connections.
func (c *checker) hangWays(ways []*proxy, r *rand.Rand, stop <-chan struct{}) {
	longest := min(5*time.Second, c.length*3/4) // short runs want more than one, too
	for pause(r, 100*time.Millisecond, time.Second, stop) {
		way := ways[r.IntN(len(ways))]
		way.hang()
		pause(r, 500*time.Millisecond, longest, stop)
		if r.IntN(2) == 0 {
			way.cut()
		}
		way.release()
		c.faults.Add(1)
	}
}

// killReplica stops Redis for some changes, kills the replica that made a third of them, and lets
// Redis go on with its old values. Nobody is left who knows what could not be told.
func killReplica(c *checker, r *rand.Rand, stop <-chan struct{}) {
	for pause(r, 300*time.Millisecond, time.Second, stop) {
		c.redis.signal(syscall.SIGSTOP)
		pause(r, 200*time.Millisecond, 600*time.Millisecond, stop)
		c.victim.kill()
		c.redis.signal(syscall.SIGCONT)
		c.faults.Add(1)
		pause(r, time.Millisecond, time.Second, stop)
		c.victim.start(c.t)
		c.victim.waitReady(c.t)
	}
}
