package main

import (
	"context"
	"database/sql"
	"fmt"
	"net"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What PostgreSQL can do to hop: hang, crash, be locked, be busy, be read-only.

// postgresGone are the answers while PostgreSQL cannot answer and Redis can.
var postgresGone = statuses{create: 503, update: 503, stats: 503, list: 503, health: 200}

// unknownAnswered says whether hop can say again that it does not know a code.
func unknownAnswered(f *faultRun) bool {
	f.Helper()
	return do(f, "GET", f.hop.url+"/u999999", "").status == 404
}

// creating says whether hop can make links.
func creating(f *faultRun) bool {
	f.Helper()
	return ask(f.hop.url, createOne).status == 201
}

func TestFault04PostgresPaused(t *testing.T) {
	pause := full(10*time.Second, 3*time.Second)
	faultCase{
		number: 4,
		what:   fmt.Sprintf("PostgreSQL SIGSTOP %v", pause),
		fault: func(f *faultRun) {
			f.pg.pause()
			end := f.askInTurn(f.hop.url, 4, 20*time.Millisecond, createOne, readStats, readHealth)
			f.wait(pause)
			f.others(postgresGone)
			resumed := time.Now()
			f.pg.resume()
			var during []asked
			wrong := 0
			for _, a := range end() {
				if a.ended.After(resumed) {
					continue
				}
				during = append(during, a)
				right := a.status == 503
				if a.request == readHealth {
					right = a.status == 200
				}
				if !right {
					wrong++
				}
			}
			f.mended()
			f.figure("%s, slowest %s", tally(during), short(slowestOf(during)))
			f.mark(wrong == 0, "creates and stats 503, health 200")
			f.below("each", slowestOf(during), answerLimit)
			f.within(3*time.Second, "creates work again", func() bool { return creating(f) })
			f.statsWorkAgain()
		},
	}.run(t)
}

// statsWorkAgain waits until the clicks are counted that have come while PostgreSQL was away: until
// then whoever asks for figures is refused.
func (f *faultRun) statsWorkAgain() {
	f.Helper()
	f.within(2*time.Second, "stats work again", func() bool {
		return ask(f.hop.url, readStats).status == 200
	})
}

func TestFault05PostgresRestarted(t *testing.T) {
	const restarts = 4
	faultCase{
		number:   5,
		what:     fmt.Sprintf("PostgreSQL immediate restart ×%d at 200 creates/s", restarts),
		unloaded: true,
		fault: func(f *faultRun) {
			c := f.create(f.hop, 200, 50)
			f.wait(time.Second)
			var slowest time.Duration
			for range restarts {
				crashPostgres(f, f.pg)
				back := time.Now()
				before := c.made()
				eventually(f, patience, "creates work again", func() bool {
					return c.made() > before
				})
				slowest = max(slowest, time.Since(back))
				f.wait(full(3*time.Second, 500*time.Millisecond))
			}
			all := c.load.figures(whole)
			f.figure("%s", all.failures())
			f.mark(all.failed == 0 && all.n > 0, "only 201 and 503")
			missing := c.missing(f, f.db)
			f.figure("%d made, %d refused, missing %d, twice %d",
				c.made(), c.denied, missing, c.twice)
			f.figure("creates again after at most %s", short(slowest))
			f.mark(c.made() > 0 && missing == 0, "every 201 present")
			f.mark(c.twice == 0, "no code twice")
		},
	}.run(t)
}

func TestFault06BothPaused(t *testing.T) {
	pause := full(5*time.Second, 3*time.Second)
	faultCase{
		number: 6,
		what:   fmt.Sprintf("PostgreSQL and Redis SIGSTOP %v", pause),
		p99:    func(time.Duration) time.Duration { return 250 * time.Millisecond },
		fault: func(f *faultRun) {
			f.redis.pause()
			f.pg.pause()
			unknown := startLoad(f, f.hop.url, 50, 50, unknownAims(50*60), refusals)
			f.wait(pause)
			f.others(postgresGone) // /health is 200 as long as known links are served
			health := askHealthOf(f, f.hop)
			unknown.stop()
			f.mended()
			f.pg.resume()
			f.redis.resume()
			f.within(5*time.Second, "404 again", func() bool { return unknownAnswered(f) })
			u := unknown.figures(whole)
			f.figure("unknown codes: %s, worst %s", u.failures(), short(u.worst))
			f.mark(u.failed == 0 && u.n > 0 && u.statuses[404] == 0, "unknown 503, never 404")
			f.mark(health.Status == "degraded", "/health says degraded")
			f.mark(f.hop.logged(f, "postgres lost") && f.hop.logged(f, "redis lost"),
				"both were lost")
		},
	}.run(t)
}

func TestFault08PostgresCrashedInFlush(t *testing.T) {
	const crashes = 4
	const failures = "hop_click_flush_failures_total"
	faultCase{
		number: 8,
		what:   fmt.Sprintf("PostgreSQL crashed ×%d during flushes", crashes),
		fault: func(f *faultRun) {
			for k := range crashes {
				f.wait(full(3*time.Second, 500*time.Millisecond))
				if k%2 == 0 {
					const warm = "caches warm" // once more for a PostgreSQL that was started again
					before := strings.Count(f.hop.log(f), warm)
					crashInLock(f)
					eventually(f, patience, warm, func() bool {
						return strings.Count(f.hop.log(f), warm) > before
					})
				} else {
					crashBackend(f)
				}
				f.hop.waitReady(f)
			}
			failed := scrape(f, f.hop.url)[failures]
			f.figure("%.0f flushes failed", failed)
			f.mark(failed >= crashes, "each crash failed a flush")
		},
	}.run(t)
}

// crashInLock crashes PostgreSQL while a flush waits inside its transaction, which has claimed its
// batch: the test holds the lock that it wants.
func crashInLock(f *faultRun) {
	f.Helper()
	tx, err := f.db.Begin()
	if err != nil {
		f.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`SELECT pg_advisory_xact_lock($1)`, clickLock); err != nil {
		f.Fatal(err)
	}
	eventually(f, patience, "a flush waits", func() bool {
		return scalar[bool](f, f.db, `SELECT EXISTS (
			SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)`)
	})
	crashPostgres(f, f.pg)
}

// crashBackend kills the backend of a flush that counts its batch or commits. PostgreSQL then ends
// all others and recovers.
func crashBackend(f *faultRun) {
	f.Helper()
	const failures = "hop_click_flush_failures_total"
	before := scrape(f, f.hop.url)[failures]
	deadline := time.Now().Add(20 * time.Second)
	for scrape(f, f.hop.url)[failures] == before {
		if time.Now().After(deadline) {
			f.Fatal("no flush was hit in 20 s")
		}
		pid, found := flushBackend(f)
		if !found {
			continue
		}
		f.killBackend(pid)
		eventually(f, patience, "recovery", func() bool { return f.db.Ping() == nil })
		f.hop.waitReady(f)
		time.Sleep(500 * time.Millisecond) // the flush may have ended just before: then aim again
	}
}

// killBackend kills one backend and waits until all others have ended for it.
func (f *faultRun) killBackend(pid int) {
	f.Helper()
	witness, err := f.db.Conn(f.Context())
	if err != nil {
		f.Fatal(err)
	}
	defer witness.Close()
	syscall.Kill(pid, syscall.SIGKILL)
	eventually(f, patience, "the crash", func() bool {
		return witness.PingContext(f.Context()) != nil
	})
}

// flushBackend is the pid of the backend that holds the flushes' lock, soon after it got it.
func flushBackend(f *faultRun) (pid int, found bool) {
	f.Helper()
	const holder = `SELECT pid FROM pg_locks
		WHERE locktype = 'advisory' AND granted AND objid = $1`
	for range 2000 {
		err := f.db.QueryRow(holder, clickLock).Scan(&pid)
		if err == nil {
			return pid, true
		}
	}
	return 0, false
}

func TestFault11TableLocked(t *testing.T) {
	hold := full(10*time.Second, 2*time.Second)
	rate := full(500, 100)
	faultCase{
		number: 11,
		what:   fmt.Sprintf("urls locked %v, %d misses/s", hold, rate),
		p99:    func(calm time.Duration) time.Duration { return 2 * calm },
		fault: func(f *faultRun) {
			tx, err := f.db.Begin()
			if err != nil {
				f.Fatal(err)
			}
			defer tx.Rollback()
			if _, err := tx.Exec(`LOCK TABLE urls IN ACCESS EXCLUSIVE MODE`); err != nil {
				f.Fatal(err)
			}
			misses := startLoad(f, f.hop.url, rate, full(500, 100), unknownAims(rate*60), refusals)
			f.wait(hold)
			f.others(postgresGone)
			misses.stop()
			f.mended()
			if err := tx.Rollback(); err != nil {
				f.Fatal(err)
			}
			f.within(3*time.Second, "404 again", func() bool { return unknownAnswered(f) })
			u := misses.figures(whole)
			f.figure("misses: %s, p99 %s, worst %s", u.failures(), short(u.p99), short(u.worst))
			f.mark(u.failed == 0 && u.n > 0, "misses 503")
			f.below("misses", u.worst, answerLimit)
		},
	}.run(t)
}

func TestFault12ColdCode(t *testing.T) {
	const requests = 500
	faultCase{
		number:   12,
		what:     fmt.Sprintf("%d requests at once for one cold code", requests),
		unloaded: true,
		fault: func(f *faultRun) {
			coldBurst(f, "with Redis", f.hop, requests)
			coldBurst(f, "without", startHop(f, f.settings("REDIS_URL=")...), requests)
		},
	}.run(t)
}

// coldBurst asks a hop n times at once for a code that only PostgreSQL knows.
func coldBurst(f *faultRun, name string, hop *process, n int) {
	f.Helper()
	const misses = "hop_cache_misses_total"
	code := "cold-" + strconv.Itoa(hop.port)
	execSQL(f, f.db, `
		INSERT INTO urls (short_code, original_url, created_at, updated_at)
		VALUES ($1, 'https://example.com/cold', now(), now())`, code)
	missed := scrape(f, hop.url)[misses]
	looked := codeLookups(f, f.db)
	l := burst(f, hop.url, n, getAim("/"+code, "https://example.com/cold", 0), redirects)
	all := l.figures(whole)
	missed = scrape(f, hop.url)[misses] - missed
	endBackends(f)
	looked = codeLookups(f, f.db) - looked
	f.figure("%s: %s, %d queries, slowest %s", name, all.failures(), looked, short(all.worst))
	f.mark(all.failed == 0 && all.n == n, "0 failed")
	f.mark(looked >= 1 && looked <= 2 && missed <= 2, "%s at most 2 queries", name)
}

// codeLookups is how often a link was looked up by its code: a redirect's query is the only one
// that does so.
func codeLookups(t testing.TB, db *sql.DB) int {
	t.Helper()
	return scalar[int](t, db, `
		SELECT idx_scan::int FROM pg_stat_user_indexes
		WHERE indexrelname = 'urls_short_code_key'`)
}

// endBackends ends everybody's connections: PostgreSQL's counters are exact only for backends that
// have ended.
func endBackends(f *faultRun) {
	f.Helper()
	execSQL(f, f.db, `
		SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
		WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'`)
}

// hostPort is where a private service listens.
func (p *process) hostPort() string {
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(p.port))
}

// TestFault18Standby: the name of the database server leads to its hot standby, as after a failover
// that went half-way, and then back.
func TestFault18Standby(t *testing.T) {
	hold := full(10*time.Second, 1500*time.Millisecond)
	var standby *process
	var road *proxy
	faultCase{
		number: 18,
		what:   fmt.Sprintf("PostgreSQL's address leads to a standby for %v", hold),
		stores: func(t *testing.T) *rig {
			r := newStores(t, startPostgres(t), startRedis(t))
			standby = startStandby(t, r.pg)
			road = startProxy(t, r.pg.hostPort())
			address := strings.Replace(r.pg.url, r.pg.hostPort(), road.addr, 1)
			r.environment = append(r.environment, "DATABASE_URL="+address)
			return r
		},
		fault: func(f *faultRun) {
			end := f.askInTurn(f.hop.url, 1, 10*time.Millisecond, createOne, updateOne,
				readStats)
			road.lead(standby.hostPort())
			road.cut()
			f.within(3*time.Second, "/health says read_only or down", func() bool {
				return askHealthOf(f, f.hop).Postgres.Status != "up"
			})
			f.wait(hold)
			f.figure("then postgres: %s", askHealthOf(f, f.hop).Postgres.Status)
			for _, r := range []request{createOne, updateOne} {
				a := ask(f.hop.url, r)
				f.mark(a.status == 503, "%s 503", r.name)
			}
			second := prepareHop(f, f.settings()...)
			second.start(f)
			eventually(f, patience, "a second hop listens", func() bool {
				return ask(second.url, readLive).status == 200
			})
			f.wait(time.Second)
			f.mark(ask(second.url, createOne).status == 503, "one started on it makes no links")

			// What is open stays open: nobody but hop itself gives up these connections.
			road.lead(f.pg.hostPort())
			f.within(5*time.Second, "writes again", func() bool { return creating(f) })
			f.within(5*time.Second, "the second writes", func() bool {
				return ask(second.url, createOne).status == 201
			})
			all := end()
			f.figure("%s, slowest %s", tally(all), short(slowestOf(all)))
			f.mark(!strings.Contains(tally(all), " 500 "), "never 500")
			f.below("each", slowestOf(all), answerLimit)
		},
	}.run(t)
}

// TestFault20DeleteUser removes a user who owns all that the load clicks, and much more.
func TestFault20DeleteUser(t *testing.T) {
	const owned = 40_000
	faultCase{
		number: 20,
		what:   fmt.Sprintf("DELETE of a user with %d links and their events", owned),
		fault: func(f *faultRun) {
			user := scalar[int64](f, f.db, `
				INSERT INTO users (username, email, created_at)
				VALUES ('owner', 'owner@example.com', now()) RETURNING id`)
			execSQL(f, f.db, `UPDATE urls SET user_id = $1`, user)
			execSQL(f, f.db, `
				INSERT INTO urls (user_id, short_code, original_url, created_at, updated_at)
				SELECT $1, 'o' || lpad(i::text, 6, '0'), 'https://example.com/o', now(), now()
				FROM generate_series(1, $2) AS i`, user, owned-rigLinks-1)
			execSQL(f, f.db, `
				INSERT INTO events (url_id, user_id, event_type, timestamp, details)
				SELECT id, user_id, 'created', now(), '{}' FROM urls`)
			began := time.Now()
			remove := request{"delete", "DELETE", fmt.Sprintf("/users/%d", user), ""}
			var all []asked
			f.within(30*time.Second, "the user is removed", func() bool {
				a := ask(f.hop.url, remove)
				all = append(all, a)
				if a.status != 204 && a.status != 404 && a.status != 503 {
					f.Errorf("%d %s", a.status, a.body)
				}
				return a.status == 204 || a.status == 404
			})
			f.figure("%s in %s", tally(all), short(time.Since(began)))
			left := scalar[int](f, f.db, `
				SELECT (SELECT count(*) FROM urls WHERE user_id = $1)
				     + (SELECT count(*) FROM events WHERE user_id = $1)
				     + (SELECT count(*) FROM users WHERE id = $1)`, user)
			f.mark(left == 0, "nothing is left with its name")
			links := scalar[int](f, f.db, `SELECT count(*) FROM urls`)
			f.mark(links == owned, "all links are left")
		},
	}.run(t)
}

// TestFault21Serializable runs hop on a database that isolates every transaction from all others.
func TestFault21Serializable(t *testing.T) {
	length := full(20*time.Second, 3*time.Second)
	faultCase{
		number: 21,
		what:   "default_transaction_isolation = serializable",
		stores: func(t *testing.T) *rig {
			r := newStores(t, startPostgres(t), startRedis(t))
			execSQL(t, r.db, `
				ALTER DATABASE postgres SET default_transaction_isolation = 'serializable'`)
			return r
		},
		fault: func(f *faultRun) {
			c := f.create(f.hop, full(100, 30), 10)
			var askers []func() []asked
			for i := range 4 { // two of them change the same link
				path := fmt.Sprintf("/urls/%d", 1+i/2)
				change := request{"update", "PATCH", path, fmt.Sprintf(`{"title":"by %d"}`, i)}
				again := request{"update", "PATCH", path, fmt.Sprintf(`{"title":"of %d"}`, i)}
				end := f.askInTurn(f.hop.url, 1, 10*time.Millisecond, change, again, readStats)
				askers = append(askers, end)
			}
			f.wait(length)
			all := c.load.figures(whole)
			f.figure("creates: %s, %d refused", all.failures(), c.denied)
			f.mark(few(all.failed+c.denied, all.n) && c.missing(f, f.db) == 0, "all links made")
			var changes []asked
			for _, end := range askers {
				changes = append(changes, end()...)
			}
			wrong := 0
			for _, a := range changes {
				if a.status != 200 {
					wrong++
				}
			}
			f.figure("%s", tally(changes))
			f.mark(few(wrong, len(changes)), "all updates and stats 200")
			f.figure("%.0f flushes failed",
				scrape(f, f.hop.url)["hop_click_flush_failures_total"])
		},
	}.run(t)
}

// TestFault23ValuesRunOut: PostgreSQL hangs, and then Redis loses what it knew, as it does when all
// values have reached the end of their life. What was known is served as before.
func TestFault23ValuesRunOut(t *testing.T) {
	hold := full(60*time.Second, 4*time.Second) // at full length longer than local entries live
	faultCase{
		number: 23,
		what:   fmt.Sprintf("PostgreSQL SIGSTOP %v, Redis emptied meanwhile", hold),
		p99:    func(time.Duration) time.Duration { return 250 * time.Millisecond },
		fault: func(f *faultRun) {
			f.pg.pause()
			f.wait(hold / 4)
			for range 3 {
				f.redis.redisDo(f, "FLUSHALL")
				f.wait(hold / 4)
			}
			f.others(postgresGone)
			health := askHealthOf(f, f.hop)
			f.figure("/health: %s, postgres %s", health.Status, health.Postgres.Status)
			f.mark(health.Postgres.Status == "down", "/health says that PostgreSQL is down")
			unknown := ask(f.hop.url, request{"unknown", "GET", "/u999999", ""})
			f.mark(unknown.status == 503, "unknown 503")
			f.pg.resume()
			f.mended()
			f.within(5*time.Second, "404 again", func() bool { return unknownAnswered(f) })
		},
	}.run(t)
}

// TestFault24BusyNotDead: a server that has no more connections to give, or that ended one of ours,
// is well. Nobody stops asking it.
func TestFault24BusyNotDead(t *testing.T) {
	hold := full(10*time.Second, 2*time.Second)
	faultCase{
		number: 24,
		what:   fmt.Sprintf("no more connections (53300) for %v, then one ended at a time", hold),
		stores: func(t *testing.T) *rig {
			return newStores(t, startPostgres(t, "-c", "max_connections=40"), startRedis(t))
		},
		settings: []string{"DB_CONNS=8"},
		fault: func(f *faultRun) {
			aims := unknownAims(100_000)
			crowd := startLoad(f, f.hop.url, 1000, 50, aims, notFounds) // opens connections
			f.wait(time.Second)
			crowd.stop()
			own, err := f.db.Conn(f.Context())
			if err != nil {
				f.Fatal(err)
			}
			defer own.Close()

			taken := takeConnections(f)
			misses := startLoad(f, f.hop.url, 100, 10, aims[50_000:], notFounds)
			f.wait(hold)
			f.mark(!f.breakerOpen("postgres"), "the breaker stays closed")
			crowded := misses.figures(whole)
			for _, c := range taken {
				c.Close()
			}
			f.figure("%d connections taken, misses: %s, worst %s", len(taken),
				crowded.failures(), short(crowded.worst))
			f.mark(crowded.n > 0 && crowded.failed == 0, "misses go on")

			misses = startLoad(f, f.hop.url, 100, 10, aims[70_000:], notFounds)
			ended := 0
			until := time.Now().Add(hold)
			for time.Now().Before(until) {
				_, err := own.ExecContext(f.Context(), `
					SELECT pg_terminate_backend(pid) FROM pg_stat_activity
					WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'
					ORDER BY random() LIMIT 1`)
				if err != nil {
					f.Fatal(err)
				}
				ended++
				f.mark(!f.breakerOpen("postgres"), "the breaker stays closed")
				time.Sleep(100 * time.Millisecond)
			}
			killed := misses.figures(whole)
			f.figure("%d connections ended, misses: %s", ended, killed.failures())
			f.mark(killed.n > 0 && killed.failed <= ended, "at most one miss lost with each")
			f.mark(!f.hop.logged(f, "postgres lost"), "PostgreSQL is not called lost")
		},
	}.run(t)
}

// takeConnections opens connections until the server has no more.
func takeConnections(f *faultRun) []*sql.Conn {
	f.Helper()
	db := openDB(f, f.pg.url)
	var taken []*sql.Conn
	for {
		c, err := db.Conn(context.Background())
		if err != nil {
			if !strings.Contains(err.Error(), "too many clients") {
				f.Fatal(err)
			}
			return taken
		}
		taken = append(taken, c)
	}
}
