package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What happens to hop itself: it is killed, restarted, started first, has no disk, and is pressed
// by its clients.

func TestFault07HopKilled(t *testing.T) {
	kills := full(15, 4)
	rate := full(4000, 400)
	every := full(2*time.Second, time.Second)
	pause := full(10*time.Second, 2500*time.Millisecond)
	var l *load
	var killed []span // from before the signal until hop was surely dead
	faultCase{
		number: 7,
		what: fmt.Sprintf("hop kill -9 ×%d at %d clicks/s, PostgreSQL stopped %v in the middle",
			kills, rate, pause),
		unloaded: true,
		mayFail:  true,
		fault: func(f *faultRun) {
			l = f.redirectAt(f.hop, rate, full(500, 50), f.aims)
			c := f.create(f.hop, 20, 4)
			var alone span // hop was started while PostgreSQL was stopped
			var resumed sync.WaitGroup
			for k := range kills {
				f.wait(every)
				middle := k == kills/2
				if middle {
					f.pg.pause()
					resumed.Go(func() {
						time.Sleep(pause)
						alone.to = l.now()
						f.pg.resume()
					})
				}
				before := l.now()
				f.hop.kill()
				killed = append(killed, span{before, l.now()})
				if middle {
					alone.from = l.now()
				}
				f.hop.start(f)
			}
			resumed.Wait()
			f.hop.waitReady(f)
			f.wait(every)
			missing := c.missing(f, f.db)
			f.figure("%d links acknowledged, lost %d", c.made(), missing)
			f.mark(c.made() > 0 && missing == 0, "links lost 0")
			served := l.figures(alone)
			f.figure("%d of %d answered by hops started while PostgreSQL was stopped",
				served.statuses[302], served.n)
			f.mark(served.statuses[302] > 0, "Redis alone serves known links")
			for why, n := range l.figures(whole).whys {
				nobody := strings.HasPrefix(why, "refused") || strings.HasPrefix(why, "broken")
				if !nobody && why != "status 503" {
					f.Errorf("%d × %s", n, why)
				}
			}
		},
		surplus: func(*faultRun) int64 { return inFlight(l, killed) },
	}.run(t)
}

// inFlight is how many requests were under way when hop was killed: whether their clicks count,
// nobody knows.
func inFlight(l *load, killed []span) int64 {
	var n int64
	for _, s := range l.shots {
		cutShort := slices.ContainsFunc(killed, func(k span) bool {
			return s.sent < k.to && s.done > k.from
		})
		if s.unanswered() && cutShort {
			n++
		}
	}
	return n
}

func TestFault09Replicas(t *testing.T) {
	const replicas = 4
	faultCase{
		number:   9,
		what:     fmt.Sprintf("%d replicas flush overlapping codes", replicas),
		unloaded: true,
		fault: func(f *faultRun) {
			for range replicas - 1 {
				f.hops = append(f.hops, startHop(f, f.settings()...))
			}
			f.hops = append(f.hops, f.hop)
			for i, hop := range f.hops { // each in an order of its own
				first := i * rigLinks / replicas
				aims := slices.Concat(f.aims[first:], f.aims[:first])
				f.redirectAt(hop, full(3000, 400)/replicas, full(500, 40)/replicas, aims)
			}
			f.wait(full(30*time.Second, 3*time.Second))
			for _, l := range f.loads {
				l.stop()
			}
			var failed float64
			for _, hop := range f.hops {
				failed += scrape(f, hop.url)["hop_click_flush_failures_total"]
			}
			for _, hop := range f.hops {
				hop.signal(syscall.SIGTERM)
			}
			for _, hop := range f.hops {
				<-hop.done
			}
			f.hops = nil // the last flush is that of a clean exit
			deadlocks := scalar[int](f, f.db, `SELECT sum(deadlocks)::int FROM pg_stat_database`)
			f.figure("deadlocks %d, %.0f flushes failed", deadlocks, failed)
			f.mark(deadlocks == 0 && failed == 0, "0 deadlocks")
		},
	}.run(t)
}

func TestFault10RollingRestart(t *testing.T) {
	rounds := full(3, 2)
	dir := "DATA_DIR=" + t.TempDir()
	faultCase{
		number:   10,
		what:     fmt.Sprintf("rolling restart ×%d", rounds),
		settings: []string{dir},
		fault: func(f *faultRun) {
			port := fmt.Sprintf("PORT=%d", f.hop.port)
			for range rounds {
				next := prepareHop(f, f.settings(dir, port)...)
				next.start(f)
				eventually(f, patience, "the new one is ready", func() bool {
					return next.logged(f, "msg=ready")
				})
				f.hop.end(syscall.SIGTERM)
				if code := f.hop.cmd.ProcessState.ExitCode(); code != 0 {
					f.Errorf("exit status %d", code)
				}
				f.hop = next
			}
			f.hops = []*process{f.hop}
		},
		after: func(f *faultRun) {
			n := f.load.figures(whole).n
			f.mark(n >= full(30_000, 1_000), "of at least %d", full(30_000, 1_000))
		},
	}.run(t)
}

// ---- clients that are slow, idle, or many ----

// halfOpen is a client that sends a byte now and then.
type halfOpen struct {
	kind string // what it never ends: headers or bodies
	head string
	drip string
}

// The two kinds of half-open clients.
var (
	slowHeaders = halfOpen{
		kind: "headers",
		head: "GET /f0001 HTTP/1.1\r\nHost: hop.test\r\n",
		drip: "X-Slow: 1\r\n",
	}
	slowBodies = halfOpen{
		kind: "bodies",
		head: "POST /shorten HTTP/1.1\r\nHost: hop.test\r\nContent-Type: application/json\r\n" +
			"Content-Length: 1000\r\n\r\n{",
		drip: " ",
	}
)

// connect lives until the server closes the connection or stop is closed. It says how long it lived
// and whether it was the server that ended it.
func (h halfOpen) connect(addr string, stop <-chan struct{}) (time.Duration, bool, error) {
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return 0, false, err
	}
	defer c.Close()
	start := time.Now()
	if _, err := io.WriteString(c, h.head); err != nil {
		return 0, false, err
	}
	gone := make(chan struct{})
	go func() {
		io.Copy(io.Discard, c)
		close(gone)
	}()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			io.WriteString(c, h.drip) // an error shows as the end too
		case <-gone:
			return time.Since(start), true, nil
		case <-stop:
			return time.Since(start), false, nil
		}
	}
}

// slowCrowd is what came of many half-open clients.
type slowCrowd struct {
	unopened, unclosed atomic.Int64

	mu    sync.Mutex               // guards lived
	lived map[string]time.Duration // the longest of each kind
}

// crowd lets n half-open clients come to a hop and waits until all are gone. meanwhile is called
// now and then.
func crowd(hop *process, n int, meanwhile func()) *slowCrowd {
	const longest = 12 * time.Second // headers may take 5 s, bodies 10 s
	s := &slowCrowd{lived: map[string]time.Duration{}}
	stop := make(chan struct{})
	time.AfterFunc(longest, func() { close(stop) })
	// Not all at one instant: they share this process and its cores with the load.
	arrive := time.NewTicker(time.Millisecond)
	defer arrive.Stop()
	var clients sync.WaitGroup
	for i := range n {
		<-arrive.C
		kind := slowHeaders
		if i%2 == 1 {
			kind = slowBodies
		}
		clients.Go(func() { s.join(hop, kind, stop) })
	}
	gone := make(chan struct{})
	go func() {
		clients.Wait()
		close(gone)
	}()
	for {
		select {
		case <-gone:
			return s
		case <-time.After(250 * time.Millisecond):
			meanwhile()
		}
	}
}

// join is one client of the crowd.
func (s *slowCrowd) join(hop *process, kind halfOpen, stop <-chan struct{}) {
	lived, closed, err := kind.connect(hop.hostPort(), stop)
	if err != nil {
		s.unopened.Add(1)
	} else if !closed {
		s.unclosed.Add(1)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lived[kind.kind] = max(s.lived[kind.kind], lived)
}

func TestFault13SlowClients(t *testing.T) {
	const mb = 1 << 20
	slow := full(2000, 400)
	idle := full(10_000, 500)
	var idleSpan span
	faultCase{
		number: 13,
		what:   fmt.Sprintf("%d half-open slow clients, then %d idle connections", slow, idle),
		p99:    func(calm time.Duration) time.Duration { return 3 * calm },
		fault: func(f *faultRun) {
			memory := f.hop.memory(f)
			end := f.askInTurn(f.hop.url, 1, 50*time.Millisecond, createOne)
			peak := memory
			c := crowd(f.hop, slow, func() { peak = max(peak, f.hop.memory(f)) })
			eventually(f, patience, "creates work again", func() bool { return creating(f) })
			creates := end()
			f.mended()

			conns := idleConnections(f, idle)
			idleSpan = f.load.during(full(5*time.Second, time.Second))
			idlePeak := f.hop.memory(f)
			for _, c := range conns {
				c.Close()
			}
			f.figure("slow headers closed after at most %s, bodies %s; %d not closed, %d not opened",
				short(c.lived["headers"]), short(c.lived["bodies"]),
				c.unclosed.Load(), c.unopened.Load())
			f.mark(c.unclosed.Load() == 0 && c.unopened.Load() == 0 &&
				c.lived["headers"] < 7*time.Second, "all closed in time")
			f.figure("creates meanwhile: %s", tally(creates))
			f.mark(!strings.Contains(tally(creates), " 0 "), "creates 201 or 503, then 201")
			f.figure("RSS %d MB, with slow clients %d MB, with idle ones %d MB (%d KB each)",
				memory/mb, peak/mb, idlePeak/mb, (idlePeak-memory)/int64(idle)>>10)
			room := memory + 16*mb
			f.mark(peak < room+int64(slow)*40<<10 && idlePeak < room+int64(idle)*40<<10,
				"at most 40 KB per connection")
		},
		after: func(f *faultRun) {
			calm := f.load.figures(f.calm)
			during := f.load.figures(idleSpan)
			f.figure("with idle ones p99 %s", short(during.p99))
			f.below("p99 with idle connections", during.p99, 3*calm.p99)
		},
	}.run(t)
}

// idleConnections are n connections that have each made a request, as a browser has.
func idleConnections(f *faultRun, n int) []*loadConn {
	f.Helper()
	var conns []*loadConn
	for range n {
		c, err := dialLoad(f.hop.hostPort())
		if err != nil {
			f.Fatal(err)
		}
		conns = append(conns, c)
		a, _, err := c.do([]byte("HEAD /f0000 HTTP/1.1\r\nHost: hop.test\r\n\r\n"))
		if err != nil || a.status != 302 {
			f.Fatalf("%d %v", a.status, err)
		}
	}
	return conns
}

// TestFault25DearReads: readers of lists and figures, as many as may read at once, and behind a
// locked table, do not keep links from being made or found.
func TestFault25DearReads(t *testing.T) {
	const readers = 128
	length := full(10*time.Second, 2*time.Second)
	faultCase{
		number:   25,
		what:     fmt.Sprintf("%d readers of dear lists, then of a locked table", readers),
		unloaded: true,
		fault: func(f *faultRun) {
			execSQL(f, f.db, `
				INSERT INTO events (url_id, event_type, timestamp, details)
				SELECT 1 + i % $1, 'seen', now(), '{}' FROM generate_series(1, 100000) AS i`,
				rigLinks)
			f.whileReading(readers, length, "dear lists",
				request{"links", "GET", "/urls?per_page=1000", ""},
				request{"events", "GET", "/events?per_page=1000&page=50", ""},
				request{"search", "GET", "/urls?q=nothing-has-this", ""})
			tx, err := f.db.Begin()
			if err != nil {
				f.Fatal(err)
			}
			defer tx.Rollback()
			if _, err := tx.Exec(`LOCK TABLE clicks_daily IN ACCESS EXCLUSIVE MODE`); err != nil {
				f.Fatal(err)
			}
			f.whileReading(readers, length, "locked figures", readStats)
		},
	}.run(t)
}

// whileReading lets n readers read without pause and marks that creates and misses go on.
func (f *faultRun) whileReading(n int, length time.Duration, what string, reads ...request) {
	f.Helper()
	end := f.askInTurn(f.hop.url, n, 0, reads...)
	f.wait(200 * time.Millisecond)
	const second = 50 // requests of each kind
	var unknown []aim
	for i := range 60 * second {
		unknown = append(unknown, getAim(fmt.Sprintf("/n%06d", i), "", 0))
	}
	misses := startLoad(f, f.hop.url, second, 10, unknown, notFounds)
	c := f.create(f.hop, second, 10)
	f.wait(length)
	found := misses.figures(whole)
	made := c.load.figures(whole)
	all := end()
	f.figure("%s: %s", what, tally(all))
	f.mark(!strings.Contains(tally(all), " 500 "), "never 500")
	f.figure("misses %s, p99 %s", found.failures(), short(found.p99))
	f.figure("creates %s, %d refused, p99 %s", made.failures(), c.denied, short(made.p99))
	f.mark(few(found.failed, found.n), "no miss refused")
	f.mark(few(made.failed+c.denied, made.n), "no create refused")
}

// TestFault26UnsentBodies: senders that stop half-way, more of them than hop answers at once, keep
// no place that others need.
func TestFault26UnsentBodies(t *testing.T) {
	senders := full(2000, 400)
	most := senders / 2
	hold := full(10*time.Second, 3*time.Second)
	heads := []string{
		"POST /shorten HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 9000",
		"POST /shorten/bulk HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 900000",
		"POST /users/bulk HTTP/1.1\r\nContent-Type: text/csv\r\nContent-Length: 9000000",
		"PUT " + spareLink + " HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 9000",
	}
	faultCase{
		number:   26,
		what:     fmt.Sprintf("%d senders stop half-way, MAX_INFLIGHT=%d", senders, most),
		settings: []string{fmt.Sprintf("MAX_INFLIGHT=%d", most)},
		fault: func(f *faultRun) {
			var conns []net.Conn
			defer func() {
				for _, c := range conns {
					c.Close()
				}
			}()
			for i := range senders {
				c, err := net.DialTimeout("tcp", f.hop.hostPort(), 5*time.Second)
				if err != nil {
					f.Fatal(err)
				}
				conns = append(conns, c)
				head := heads[i%len(heads)] + "\r\nHost: hop.test\r\n\r\n"
				if _, err := io.WriteString(c, head+strings.Repeat(" ", 5000)); err != nil {
					f.Fatal(err)
				}
			}
			work := f.askInTurn(f.hop.url, 1, 10*time.Millisecond, createOne, updateOne, readStats)
			alive := f.askInTurn(f.hop.url, 1, 10*time.Millisecond, readLive, readHealth)
			f.wait(hold)
			all := work()
			lives := alive()
			wrong := 0
			for _, a := range slices.Concat(all, lives) {
				if a.status != 200 && a.status != 201 {
					wrong++
				}
			}
			f.figure("%s, %s, slowest %s", tally(all), tally(lives), short(slowestOf(all)))
			f.mark(few(wrong, len(all)) && len(all) > 0, "all else is answered as ever")
			f.below("each", max(slowestOf(all), slowestOf(lives)), answerLimit)
		},
	}.run(t)
}

// ---- the start ----

func TestFault14StartedFirst(t *testing.T) {
	absent := full(10*time.Second, 2*time.Second)
	faultCase{
		number: 14,
		what:   fmt.Sprintf("hop started %v before PostgreSQL and Redis", absent),
		bare:   true,
		fault: func(f *faultRun) {
			f.redis.kill()
			f.pg.stopPostgres()
			f.hop = prepareHop(f, f.settings()...)
			f.hop.start(f)
			f.within(2*time.Second, "hop listens", func() bool {
				return ask(f.hop.url, readLive).status == 200
			})
			var wrong []asked
			until := time.Now().Add(absent)
			for time.Now().Before(until) {
				for _, r := range everyRoute() {
					if a := ask(f.hop.url, r); !a.refused() {
						wrong = append(wrong, a)
					}
				}
				if a := ask(f.hop.url, readHealth); a.status != 503 {
					wrong = append(wrong, a)
				}
				if a := ask(f.hop.url, readLive); a.status != 200 {
					wrong = append(wrong, a)
				}
				time.Sleep(20 * time.Millisecond)
			}
			f.figure("%d wrong answers before %s", len(wrong), tally(wrong))
			f.mark(len(wrong) == 0, "503 until then, /health/live 200")
			f.pg.start(f)
			f.redis.start(f)
			f.pg.waitPostgres(f)
			f.redis.waitRedis(f)
			f.within(3*time.Second, "ready", func() bool { return healthy(f.hop.url) })
			f.allWork("then")
		},
	}.run(t)
}

// TestFault22Mute puts something that accepts and never answers in the place of each service, for
// each protocol that hop speaks with it: at hop's start, and later in the middle of its work.
func TestFault22Mute(t *testing.T) {
	trusted := newCertificate(t)
	for _, c := range []struct {
		name     string
		postgres bool // else Redis is mute
		tls      bool
	}{
		{"PostgreSQL", true, false},
		{"PostgreSQL over TLS", true, true},
		{"Redis", false, false},
		{"Redis over TLS", false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			var road *proxy
			faultCase{
				number: 22,
				what:   c.name + " accepts and never answers, at the start and later",
				bare:   true,
				stores: func(t *testing.T) *rig {
					r := storesWithTLS(t, trusted, c.postgres && c.tls, !c.postgres && c.tls)
					service := r.redis
					if c.postgres {
						service = r.pg
					}
					road = startProxy(t, service.hostPort())
					for i, setting := range r.environment {
						r.environment[i] = strings.Replace(setting, service.hostPort(), road.addr, 1)
					}
					return r
				},
				fault: func(f *faultRun) {
					if c.postgres {
						f.mutePostgres(road)
					} else {
						f.muteRedis(road)
					}
				},
			}.run(t)
		})
	}
}

// storesWithTLS are stores of which one speaks TLS.
func storesWithTLS(t *testing.T, trusted certificate, postgres, redis bool) *rig {
	t.Helper()
	var pg *process
	if postgres {
		pg = startPostgres(t, "-c", "ssl=on", "-c", "ssl_cert_file="+trusted.certFile,
			"-c", "ssl_key_file="+trusted.keyFile)
		pg.url = strings.Replace(pg.url, "sslmode=disable", "sslmode=require", 1)
	} else {
		pg = startPostgres(t)
	}
	var cache *process
	if redis {
		cache = startRedisTLS(t, trusted)
	} else {
		cache = startRedis(t)
	}
	r := newStores(t, pg, cache)
	r.environment = append(r.environment, "SSL_CERT_FILE="+trusted.certFile)
	return r
}

// mutePostgres starts hop while PostgreSQL is mute behind road, and makes it mute again later.
func (f *faultRun) mutePostgres(road *proxy) {
	f.Helper()
	hold := full(5*time.Second, 1500*time.Millisecond)
	road.hang()
	f.hop = prepareHop(f, f.settings()...)
	f.hop.start(f)
	f.within(2*time.Second, "hop listens", func() bool {
		return ask(f.hop.url, readLive).status == 200
	})
	f.allRefused("at the start")
	f.wait(hold)
	f.allRefused("later")
	health := ask(f.hop.url, readHealth)
	f.mark(health.status == 503, "/health 503 before the first answer")
	road.forward(f)
	f.within(5*time.Second, "ready", func() bool { return healthy(f.hop.url) })
	f.begin()
	f.allWork("when well")
	road.hang()
	f.allRefused("mute again")
	f.wait(hold)
	f.allRefused("still mute")
	f.mark(askHealthOf(f, f.hop).httpStatus == 200, "/health 200 while known links are served")
	road.forward(f)
	f.within(5*time.Second, "creates work again", func() bool { return creating(f) })
	f.statsWorkAgain()
	f.allWork("after it")
}

// muteRedis starts hop while Redis is mute behind road, and makes it mute again later.
func (f *faultRun) muteRedis(road *proxy) {
	f.Helper()
	hold := full(5*time.Second, 1500*time.Millisecond)
	road.hang()
	f.hop = prepareHop(f, f.settings()...)
	f.hop.start(f)
	f.within(5*time.Second, "ready", func() bool { return healthy(f.hop.url) })
	f.allWork("at the start")
	f.wait(hold)
	f.allWork("later")
	road.forward(f)
	f.within(5*time.Second, "Redis is used", func() bool { return !f.breakerOpen("redis") })
	f.begin()
	f.allWork("when well")
	road.hang()
	f.allWork("mute again")
	f.wait(hold)
	f.others(withoutRedis)
	road.forward(f)
	f.within(5*time.Second, "Redis is used again", func() bool { return !f.breakerOpen("redis") })
	f.allWork("after it")
}

// ---- the disk ----

func TestFault15DiskFull(t *testing.T) {
	faultCase{
		number: 15,
		what:   "full disk under DATA_DIR",
		bare:   true,
		fault: func(f *faultRun) {
			disk := f.TempDir()
			err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=34m") // room for one journal
			if err != nil {
				diskFullByLimit(f, err)
				return
			}
			const detach = 2 // MNT_DETACH
			f.Cleanup(func() { syscall.Unmount(disk, detach) })
			diskFull(f, disk)
		},
	}.run(t)
}

// diskFull fills a disk after one hop has taken its room, and before another starts.
func diskFull(f *faultRun, disk string) {
	f.Helper()
	length := full(10*time.Second, 1500*time.Millisecond)
	// A disk that fills up later takes nothing from a journal that has its room. After a kill the
	// next process counts what is left, and then has that room for a journal of its own.
	first := startHop(f, f.settings("DATA_DIR="+disk+"/data")...)
	had := askHealthOf(f, first).Clicks.Journal
	if err := fillDisk(filepath.Join(disk, "fill")); err != nil {
		f.Fatal(err)
	}
	f.redirect(first).during(length)
	f.loads[0].stop()
	first.kill()
	first.start(f)
	first.waitReady(f)
	var has string
	f.within(5*time.Second, "the journal's room is used again", func() bool {
		has = askHealthOf(f, first).Clicks.Journal
		return has == "disk"
	})
	// Another replica finds no room.
	second := startHop(f, f.settings("DATA_DIR="+disk+"/data")...)
	says := askHealthOf(f, second).Clicks.Journal
	degraded := scrape(f, second.url)["hop_click_journal_degraded"]
	f.redirect(second).during(length)
	f.figure("/health: filled later %q, filled before %q", has, says)
	f.mark(had == "disk" && has == "disk", "a journal that has room keeps it")
	f.mark(says != "disk" && says != "" && degraded == 1, "one without is degraded and says so")
}

// fillDisk writes a file until the disk is full.
func fillDisk(name string) error {
	file, err := os.Create(name)
	if err != nil {
		return err
	}
	defer file.Close()
	block := make([]byte, 1<<16)
	for len(block) > 0 {
		if _, err := file.Write(block); err != nil {
			block = block[:len(block)/2]
		}
	}
	return nil
}

// diskFullByLimit stands in where nothing can be mounted: no file may grow beyond 1 MiB, so that
// the journal gets no room.
func diskFullByLimit(f *faultRun, cause error) {
	f.Helper()
	prlimit, err := exec.LookPath("prlimit")
	if err != nil {
		need(f, "cannot mount a tmpfs ("+cause.Error()+"), no prlimit", err)
	}
	f.what += " (by RLIMIT_FSIZE)"
	f.hop = prepareHop(f, f.settings()...)
	unlimited := f.hop.command
	f.hop.command = func() *exec.Cmd {
		cmd := unlimited()
		args := append([]string{"--fsize=1048576", "--", cmd.Path}, cmd.Args[1:]...)
		limited := exec.Command(prlimit, args...)
		limited.Env = cmd.Env
		return limited
	}
	f.hop.start(f)
	f.hop.waitReady(f)
	says := askHealthOf(f, f.hop).Clicks.Journal
	degraded := scrape(f, f.hop.url)["hop_click_journal_degraded"]
	f.redirect(f.hop).during(full(10*time.Second, 1500*time.Millisecond))
	f.figure("/health: %q", says)
	f.mark(says != "disk" && says != "" && degraded == 1, "degraded and says so")
}
