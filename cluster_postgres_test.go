//go:build cluster

package main

import (
	"database/sql"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// PostgreSQL with failover: a primary and a streaming standby. The test is the failover manager: it
// decides that the primary is gone, promotes the standby and fences what is left. Hop finds the
// primary through HAProxy, or by a DATABASE_URL that names both hosts.

// writesAgainWithin is how soon after a new primary takes writes hop must make links again.
const writesAgainWithin = 5 * time.Second

// pair is the two servers, and the way from one to the other.
type pair struct {
	primary, standby *process
	road             *proxy // on which the standby follows
}

// newPair starts both on the rig's links. A synchronous pair acknowledges a commit when both have
// it.
func newPair(t *testing.T, r *rig, synchronous bool) *pair {
	t.Helper()
	p := &pair{primary: r.pg, road: startProxy(t, r.pg.hostPort())}
	followed := *r.pg
	followed.port = portOf(t, p.road.addr)
	p.standby = startStandby(t, &followed)
	if synchronous {
		p.waitForStandby(t)
	}
	return p
}

// portOf is the port of host:port.
func portOf(t testing.TB, address string) int {
	t.Helper()
	var port int
	if _, err := fmt.Sscanf(address, "127.0.0.1:%d", &port); err != nil {
		t.Fatal(err)
	}
	return port
}

// waitForStandby makes the primary wait for its standby with every commit.
func (p *pair) waitForStandby(t testing.TB) {
	t.Helper()
	db := openDB(t, p.primary.url)
	execSQL(t, db, `ALTER SYSTEM SET synchronous_standby_names = '*'`)
	execSQL(t, db, `SELECT pg_reload_conf()`)
	eventually(t, patience, "the standby follows synchronously", func() bool {
		return scalar[int](t, db, `
			SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'`) == 1
	})
}

// promote makes the standby the primary and returns when it takes writes.
func (p *pair) promote(t testing.TB) {
	t.Helper()
	db := openDB(t, p.standby.url)
	if !scalar[bool](t, db, `SELECT pg_promote(true, 30)`) {
		t.Fatal("the standby was not promoted in 30 s")
	}
	p.primary, p.standby = p.standby, p.primary
}

// follow starts the old primary as the standby of the new one, after a clean end.
func (p *pair) follow(t testing.TB) {
	t.Helper()
	db := openDB(t, p.primary.url)
	dir := p.standby.dataDir()
	line := fmt.Sprintf("primary_conninfo = 'host=127.0.0.1 port=%d user=hop'\n", p.primary.port)
	conf, err := os.OpenFile(dir+"/postgresql.auto.conf", os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer conf.Close()
	if _, err := conf.WriteString(line); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/standby.signal", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	givePostgres(t, dir+"/standby.signal")
	p.standby.start(t)
	p.standby.waitPostgres(t)
	eventually(t, patience, "the old primary follows", func() bool {
		return scalar[int](t, db, `SELECT count(*) FROM pg_stat_replication`) == 1
	})
}

// dataDir is where a private PostgreSQL keeps its data.
func (p *process) dataDir() string {
	args := p.command().Args
	return args[slices.Index(args, "-D")+1]
}

// ---- the ways to the primary ----

// throughHAProxy is a DATABASE_URL that leads to a balancer, which asks the two agents.
func (p *pair) throughHAProxy(t *testing.T) string {
	t.Helper()
	port := freePort(t)
	startHAProxy(t, port, fmt.Sprintf(`
listen postgres
    mode tcp
    bind 127.0.0.1:%d
    option httpchk GET /
    timeout check 1s
    default-server check inter 300ms fall 2 rise 1 on-marked-down shutdown-sessions
    server a %s port %d
    server b %s port %d
`, port, p.primary.hostPort(), agentOf(t, p.primary), p.standby.hostPort(), agentOf(t, p.standby)))
	return strings.Replace(p.primary.url, p.primary.hostPort(), fmt.Sprintf("127.0.0.1:%d", port), 1)
}

// asTwoHosts is a DATABASE_URL that names both.
func (p *pair) asTwoHosts(*testing.T) string {
	both := p.primary.hostPort() + "," + p.standby.hostPort()
	return strings.Replace(p.primary.url, p.primary.hostPort(), both, 1) +
		"&target_session_attrs=read-write"
}

// road is a way by which hop finds the primary.
type road struct {
	name string
	url  func(p *pair, t *testing.T) string
}

// The two ways.
var (
	byHAProxy = road{"HAProxy", (*pair).throughHAProxy}
	byHosts   = road{"two hosts in DATABASE_URL", (*pair).asTwoHosts}
)

// ---- the failovers ----

// failover is one way of changing the primary. It calls promoted when the new one takes writes.
type failover struct {
	name string
	do   func(f *faultRun, p *pair, promoted func())
}

// detectAfter is what a failover manager needs to be sure.
func detectAfter() time.Duration { return full(3*time.Second, time.Second) }

// The failovers.
var (
	primaryKilled = failover{"kill -9 of the primary", func(f *faultRun, p *pair, promoted func()) {
		p.primary.killTree()
		f.wait(detectAfter())
		p.promote(f)
		promoted()
	}}
	switchover = failover{"planned switchover", func(f *faultRun, p *pair, promoted func()) {
		p.primary.end(syscall.SIGINT) // "fast": the standby gets all that was committed
		p.promote(f)
		promoted()
		p.follow(f)
	}}
	primaryFrozen = failover{"frozen primary, fenced later",
		func(f *faultRun, p *pair, promoted func()) {
			p.primary.pause()
			f.wait(detectAfter())
			p.promote(f)
			promoted()
			f.wait(full(6*time.Second, 3*time.Second))
			p.standby.killTree()
		}}
)

// TestClusterPostgres changes the primary under load, with synchronous replication: nothing that
// was acknowledged is lost.
func TestClusterPostgres(t *testing.T) {
	cases := []struct {
		road
		failover
	}{
		{byHosts, primaryFrozen},
	}
	if fullLength {
		cases = append(cases, []struct {
			road
			failover
		}{
			{byHAProxy, primaryFrozen},
			{byHosts, primaryKilled},
			{byHAProxy, primaryKilled},
			{byHosts, switchover},
			{byHAProxy, switchover},
		}...)
	}
	for i, c := range cases {
		what := fmt.Sprintf("PostgreSQL, %s, by %s, synchronous", c.failover.name, c.road.name)
		t.Run(c.failover.name+" by "+c.road.name, func(t *testing.T) {
			f := newClusterRun(t, 10+i, what)
			p := f.overPair(c.road, true)
			l := f.failOver(p, c.failover)
			f.judgeRedirects()
			l.judge(f)
			missing := l.creates.missing(f, f.db)
			f.figure("%d links acknowledged, lost %d", l.creates.made(), missing)
			f.mark(l.creates.made() > 0 && missing == 0, "links lost 0")
			f.mark(l.creates.reused == 0, "no id twice")
			f.judgeClicks(faultCase{})
		})
	}
}

// overPair starts a pair and a hop that finds its primary by the road.
func (f *faultRun) overPair(way road, synchronous bool) *pair {
	f.Helper()
	f.rig = newStores(f.T, startPostgres(f), startRedis(f))
	p := newPair(f.T, f.rig, synchronous)
	f.environment = append(f.environment, "DATABASE_URL="+way.url(p, f.T))
	f.hop = startHop(f, f.settings()...)
	return p
}

// clusterLoad is what writes met in a failover. Times are since the load of creates began.
type clusterLoad struct {
	creates  *creates
	fault    time.Duration // when it began
	promoted time.Duration // when the new primary took writes
}

// failOver runs the load, changes the primary in its middle, and ends with all well again. From
// then on the rig's PostgreSQL is the new primary.
func (f *faultRun) failOver(p *pair, change failover) *clusterLoad {
	f.Helper()
	f.load = f.redirectAt(f.hop, redirectsPerSecond(), clusterConns, f.aims)
	l := &clusterLoad{creates: f.create(f.hop, createsPerSecond(), clusterConns)}
	f.wait(full(time.Second, 200*time.Millisecond))
	f.calm = f.load.during(full(5*time.Second, time.Second))
	f.hurt.from = f.load.now()
	l.fault = l.creates.now()
	change.do(f, p, func() { l.promoted = l.creates.now() })
	f.use(p.primary)
	made := l.creates.made()
	eventually(f, 2*writesAgainWithin, "links are made again", func() bool {
		return l.creates.made() > made
	})
	f.mended()
	f.wait(full(5*time.Second, time.Second))
	return l
}

// use makes a server the one that the rig's books are read from.
func (f *faultRun) use(pg *process) {
	f.Helper()
	f.pg = pg
	f.db = openDB(f, pg.url)
}

// judgeRedirects marks that no redirect failed.
func (f *faultRun) judgeRedirects() {
	f.Helper()
	all := f.load.figures(whole)
	hurt := f.load.figures(f.hurt)
	f.figure("redirects %s", all.failures())
	f.figure("base p99 %s, during p99 %s, worst %s", short(f.load.figures(f.calm).p99),
		short(hurt.p99), short(hurt.worst))
	f.mark(all.failed == 0 && all.n > 0, "0 redirects failed")
}

// judge marks what became of creates.
func (l *clusterLoad) judge(f *faultRun) {
	f.Helper()
	all := l.creates.figures(whole)
	first := l.creates.firstDone(l.promoted, 201)
	gap := l.creates.longestGap(l.fault, 201)
	f.figure("creates %s, %d refused, slowest %s", all.failures(), l.creates.denied,
		short(all.worst))
	f.figure("no link made for %s, again %s after the new primary", short(gap),
		short(max(0, first-l.promoted)))
	f.mark(all.failed == 0, "creates 201 or 503")
	f.mark(first > 0 && first-l.promoted < writesAgainWithin, "writes again < %s",
		short(writesAgainWithin))
	f.mark(l.creates.twice == 0, "no code twice")
}

// ---- asynchronous replication ----

// TestClusterPostgresAsync kills a primary whose standby is behind: what the engine lost is gone,
// and nothing else.
func TestClusterPostgresAsync(t *testing.T) {
	behind := full(2*time.Second, 700*time.Millisecond)
	f := newClusterRun(t, 20, fmt.Sprintf(
		"PostgreSQL, kill -9 of the primary, by HAProxy, asynchronous, standby %v behind", behind))
	p := f.overPair(byHAProxy, false)
	old := f.pg
	var standbyClicks int64
	l := f.failOver(p, failover{"kill", func(f *faultRun, p *pair, promoted func()) {
		p.road.hang()
		f.wait(behind)
		p.primary.killTree()
		p.road.refuse() // what was on its way is gone
		f.wait(detectAfter())
		standbyClicks = p.caughtUp(f)
		p.promote(f)
		promoted()
	}})
	f.judgeRedirects()
	l.judge(f)
	missing := l.creates.missingCodes(f, f.db)
	flushClicks(f, f.hop.url)
	f.hop.end(syscall.SIGTERM) // it must not meet the old primary, which is started now
	sum := f.countedClicks(f.T, f.load.answered(302))

	old.start(f)
	old.waitPostgres(f)
	oldDB := openDB(f, old.url)
	f.judgeLost(l, missing, oldDB)
	engine := countClicks(f, oldDB) - standbyClicks
	f.figure("%d clicks answered, lost %d, the engine lost %d", sum.acknowledged, sum.lost, engine)
	f.mark(sum.lost > 0 && sum.lost <= engine, "clicks lost: those that the engine lost")
	f.mark(sum.surplus == 0, "none counted twice")
	f.mark(sum.events == sum.acknowledged-sum.lost, "one event per click")
	f.mark(balanced(f, f.pg.url), "the books balance")
}

// caughtUp waits until a standby whose primary is gone has replayed all that it got, and returns
// the clicks that it knows.
func (p *pair) caughtUp(t testing.TB) int64 {
	t.Helper()
	db := openDB(t, p.standby.url)
	eventually(t, patience, "the standby has replayed", func() bool {
		return scalar[bool](t, db, `
			SELECT pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn()
			   AND NOT EXISTS (SELECT 1 FROM pg_stat_wal_receiver WHERE status = 'streaming')`)
	})
	return countClicks(t, db)
}

// countClicks is how many clicks a server has counted.
func countClicks(t testing.TB, db *sql.DB) int64 {
	t.Helper()
	return scalar[int64](t, db, `SELECT sum(click_count)::bigint FROM urls`)
}

// judgeLost holds the acknowledged links that are missing against the old primary, which has them
// all.
func (f *faultRun) judgeLost(l *clusterLoad, missing []string, old *sql.DB) {
	f.Helper()
	engine := 0
	for _, code := range missing {
		engine += scalar[int](f, old, `SELECT count(*) FROM urls WHERE short_code = $1`, code)
	}
	f.figure("%d links acknowledged, lost %d, of these the old primary has %d",
		l.creates.made(), len(missing), engine)
	f.figure("%d ids of lost links given to new ones", l.creates.reused)
	f.mark(len(missing) > 0 && engine == len(missing), "links lost: those that the engine lost")
	f.mark(l.creates.reused <= len(missing), "no other id twice")
}
