//go:build cluster

package main

import (
	"bytes"
	"encoding/csv"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Several hops behind HAProxy, over one PostgreSQL and one Redis.

const (
	// hopCount is how many there are.
	hopCount = 3

	// upWithin is how long a hop that is back may need until HAProxy sends it requests.
	upWithin = 10 * time.Second
)

// fleet is the hops and the balancer in front of them.
type fleet struct {
	hops     []*process
	balancer *process
	stats    string // where the balancer tells what it has done
}

// balancerConfig is deploy/proxy/haproxy.cfg with another port and other servers, and a page of
// figures on statsPort.
func balancerConfig(t testing.TB, port, statsPort int, servers string) string {
	t.Helper()
	text := readText(t, "deploy/proxy/haproxy.cfg")
	deployed, _, found := strings.Cut(text, "    # ---- the servers ----\n")
	listens := "bind :8080\n"
	if !found || !strings.Contains(deployed, listens) {
		t.Fatal("deploy/proxy/haproxy.cfg has changed its form")
	}
	deployed = strings.Replace(deployed, listens, fmt.Sprintf("bind 127.0.0.1:%d\n", port), 1)
	return deployed + servers + fmt.Sprintf(`
listen stats
    bind 127.0.0.1:%d
    stats enable
    stats uri /
`, statsPort)
}

// startFleet starts hopCount hops on the rig, as prepare makes them, and the balancer.
func (f *faultRun) startFleet(prepare func(i int) *process) *fleet {
	f.Helper()
	fl := &fleet{}
	var servers strings.Builder
	for i := range hopCount {
		hop := prepare(i)
		hop.start(f)
		fl.hops = append(fl.hops, hop)
		fmt.Fprintf(&servers, "    server hop%d %s\n", i, hop.hostPort())
	}
	for _, hop := range fl.hops {
		hop.waitReady(f)
	}
	port := freePort(f)
	statsPort := freePort(f)
	fl.stats = fmt.Sprintf("http://127.0.0.1:%d/;csv", statsPort)
	fl.balancer = startHAProxy(f, port, balancerConfig(f, port, statsPort, servers.String()))
	eventually(f, upWithin, "the balancer answers", func() bool { return healthy(fl.balancer.url) })
	return fl
}

// plainHops makes hops that differ in nothing.
func (f *faultRun) plainHops() func(int) *process {
	return func(int) *process { return prepareHop(f, f.settings()...) }
}

// stat is the sum of a column of the balancer's figures, over all hops.
func (fl *fleet) stat(t testing.TB, column string) int {
	t.Helper()
	sum := 0
	for _, row := range fl.rows(t) {
		n, _ := strconv.Atoi(row[column]) // an empty one is 0
		sum += n
	}
	return sum
}

// rows are the balancer's figures, one row for each hop.
func (fl *fleet) rows(t testing.TB) []map[string]string {
	t.Helper()
	text := strings.TrimPrefix(do(t, "GET", fl.stats, "").body, "# ")
	reader := csv.NewReader(strings.NewReader(text))
	reader.FieldsPerRecord = -1
	records, err := reader.ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	var rows []map[string]string
	for _, record := range records[1:] {
		row := map[string]string{}
		for i, name := range records[0] {
			if i < len(record) {
				row[name] = record[i]
			}
		}
		if strings.HasPrefix(row["svname"], "hop") {
			rows = append(rows, row)
		}
	}
	return rows
}

// waitUp waits until the balancer sends requests to all hops.
func (fl *fleet) waitUp(t testing.TB) {
	t.Helper()
	for _, hop := range fl.hops {
		hop.waitReady(t)
	}
	eventually(t, upWithin, "the balancer sees all hops up", func() bool {
		return !slices.ContainsFunc(fl.rows(t), func(row map[string]string) bool {
			return row["status"] != "UP"
		})
	})
}

// fleetCase is what happens to one of several hops.
type fleetCase struct {
	name  string
	do    func(f *faultRun, fl *fleet)
	crash bool // redirects under way may be counted by two hops
}

// fleetCases are those in which all hops are alike. The short form has the first.
var fleetCases = []fleetCase{
	{
		name: "one killed, back after 2 s",
		do: func(f *faultRun, fl *fleet) {
			fl.hops[0].kill()
			f.wait(2 * time.Second)
			fl.hops[0].start(f)
			fl.waitUp(f)
		},
		crash: true,
	},
	{
		name: "rolling restart",
		do: func(f *faultRun, fl *fleet) {
			for _, hop := range fl.hops {
				hop.end(syscall.SIGTERM)
				hop.start(f)
				fl.waitUp(f)
			}
		},
	},
	{
		name: "one frozen for 10 s",
		do: func(f *faultRun, fl *fleet) {
			fl.hops[0].pause()
			f.wait(10 * time.Second)
			fl.hops[0].resume()
			fl.waitUp(f)
		},
		crash: true,
	},
}

// TestClusterHops stops, kills and freezes one of three hops while all are asked.
func TestClusterHops(t *testing.T) {
	for i, c := range fleetCases[:full(len(fleetCases), 1)] {
		t.Run(c.name, func(t *testing.T) {
			f := newClusterRun(t, 40+i, "three hops behind HAProxy, "+c.name)
			f.rig = newStores(t, startPostgres(t), startRedis(t))
			fl := f.startFleet(f.plainHops())
			f.loadFleet(fl)
			writes := f.create(fl.balancer, createsPerSecond()/2, clusterConns)
			f.hurt.from = f.load.now()
			c.do(f, fl)
			f.mended()
			f.wait(full(2*time.Second, 500*time.Millisecond))
			f.judgeRedirects()
			made := writes.figures(whole)
			f.figure("creates %d: 201 ×%d, 502 ×%d, 503 ×%d", made.n, made.statuses[201],
				made.statuses[502], made.statuses[503])
			f.mark(c.crash || made.failed == 0, "creates fail only with the hop that makes them")
			f.mark(writes.missing(f, f.db) == 0 && writes.made() > 0, "links lost 0")
			f.judgeFleetClicks(fl, c.crash)
		})
	}
}

// loadFleet starts the load of redirects on the balancer, and lets it run undisturbed for a while.
func (f *faultRun) loadFleet(fl *fleet) {
	f.Helper()
	f.load = startLoad(f, fl.balancer.url, redirectsPerSecond(), clusterConns, f.aims, redirects)
	f.loads = append(f.loads, f.load)
	f.hops = fl.hops
	f.wait(full(time.Second, 200*time.Millisecond))
	f.calm = f.load.during(full(3*time.Second, 500*time.Millisecond))
}

// judgeFleetClicks is judgeClicks. After a crash, a redirect that the balancer asked for again may
// be counted by both hops.
func (f *faultRun) judgeFleetClicks(fl *fleet, crash bool) {
	f.Helper()
	again := fl.stat(f, "wretr")
	f.figure("the balancer asked again %d times", again)
	var surplus func(*faultRun) int64
	if crash {
		surplus = func(*faultRun) int64 { return int64(again) }
	}
	f.judgeClicks(faultCase{surplus: surplus})
}

// ---- a wrong clock ----

// clockOff is how far the clock of one hop is ahead.
const clockOff = 5 * time.Minute

// wrongHop builds a hop whose clock is off: time.Now of its standard library adds clockOff. No
// library that is preloaded reaches a Go program's clock, and time namespaces have no wall clock.
func wrongHop(t testing.TB) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(strings.TrimSpace(string(out)), "src/time/time.go")
	text, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	const read = "	sec, nsec, mono := runtimeNow()\n"
	now := bytes.Index(text, []byte("func Now() Time {\n"))
	at := bytes.Index(text[max(0, now):], []byte(read))
	if now < 0 || at < 0 {
		t.Fatalf("%s reads the clock in another way", source)
	}
	at += now + len(read)
	wrong := slices.Concat(text[:at], fmt.Appendf(nil, "	sec += %.0f\n", clockOff.Seconds()),
		text[at:])
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/time.go", wrong, 0o644); err != nil {
		t.Fatal(err)
	}
	overlay := jsonText(map[string]any{"Replace": map[string]string{source: dir + "/time.go"}})
	if err := os.WriteFile(dir+"/overlay.json", []byte(overlay), 0o644); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-overlay", dir+"/overlay.json", "-o", dir+"/hop", ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return dir + "/hop"
}

// TestClusterClock has one of three hops run with a clock that is five minutes ahead.
func TestClusterClock(t *testing.T) {
	if !fullLength {
		t.Skip("SKIPPED: the short form does not build a standard library")
	}
	f := newClusterRun(t, 43, fmt.Sprintf("three hops behind HAProxy, one's clock %v ahead", clockOff))
	f.rig = newStores(t, startPostgres(t), startRedis(t))
	wrong := wrongHop(t)
	fl := f.startFleet(func(i int) *process {
		hop := prepareHop(f, f.settings()...)
		if i == 0 {
			right := hop.command
			hop.command = func() *exec.Cmd {
				cmd := right()
				cmd.Path = wrong
				return cmd
			}
		}
		return hop
	})
	f.loadFleet(fl)
	f.hurt.from = f.load.now()
	f.mark(f.aheadOf(fl.hops[0]) > clockOff-time.Minute, "its clock is ahead")
	r := f.readWrites(fl)
	f.figure("%s", r)
	f.mark(r.longest < trustFor, "nothing older than %v", trustFor)
	f.expiring(fl)
	f.mended()
	f.judgeRedirects()
	f.judgeFleetClicks(fl, false)
}

// aheadOf is how far a hop's clock is ahead of ours, by the Date of its answers.
func (f *faultRun) aheadOf(hop *process) time.Duration {
	f.Helper()
	date, err := time.Parse(time.RFC1123, do(f, "GET", hop.url+"/health", "").header.Get("Date"))
	if err != nil {
		f.Fatal(err)
	}
	return time.Until(date)
}

// expiring makes a link that ends soon, and looks at what each hop says about it.
func (f *faultRun) expiring(fl *fleet) {
	f.Helper()
	ends := time.Now().Add(clockOff / 2).UTC().Format(time.RFC3339)
	made := do(f, "POST", fl.hops[1].url+"/shorten",
		`{"url":"https://example.com/ends","expires_at":"`+ends+`"}`)
	var l wireLink
	made.json(f, &l)
	var said []string
	for _, hop := range fl.hops {
		said = append(said, strconv.Itoa(do(f, "GET", hop.url+"/"+l.ShortCode, "").status))
	}
	f.figure("a link that ends in %v: the wrong clock says %s, the others %s", clockOff/2, said[0],
		strings.Join(said[1:], " and "))
}

// ---- reading what was written ----

// readings is how old answers were that followed a change at once, through the balancer.
type readings struct {
	changes int
	old     int           // changes after which some hop still served the old target
	longest time.Duration // that it did so
	delays  []time.Duration
}

// String is the readings for people.
func (r readings) String() string {
	median := time.Duration(0)
	if len(r.delays) > 0 {
		slices.Sort(r.delays)
		median = r.delays[len(r.delays)/2]
	}
	return fmt.Sprintf("%d changes read at once through the balancer: "+
		"old after %d of them (%.1f %%), asked for up to %s after the change in the median, %s at most",
		r.changes, r.old, 100*float64(r.old)/float64(r.changes), short(median), short(r.longest))
}

// readWrites changes a link through the balancer and reads it at once, over and over. Every hop
// knows the link before.
func (f *faultRun) readWrites(fl *fleet) readings {
	f.Helper()
	var r readings
	const link = "/f2000" // the one that no load asks for
	for r.changes < full(200, 100) {
		for range 2 * hopCount {
			do(f, "GET", fl.balancer.url+link, "")
		}
		want := fmt.Sprintf("https://example.com/changed/%d", r.changes)
		eventually(f, upWithin, "the link is changed", func() bool { // a disk may stall
			body := `{"original_url":"` + want + `"}`
			return do(f, "PUT", fl.balancer.url+spareLink, body).status == 200
		})
		acked := time.Now()
		r.changes++
		var oldest time.Duration
		for right := 0; right < hopCount; {
			sent := time.Since(acked)
			if do(f, "GET", fl.balancer.url+link, "").header.Get("Location") == want {
				right++
				continue
			}
			right = 0
			oldest = max(oldest, sent)
			if sent > 2*trustFor {
				f.Fatalf("still old after %v", sent)
			}
		}
		if oldest > 0 {
			r.old++
			r.delays = append(r.delays, oldest)
			r.longest = max(r.longest, oldest)
		}
	}
	return r
}

// TestClusterReadYourWrites measures how often the request that follows a change meets a hop that
// does not know of it yet: with Redis, whose messages tell the others, and without.
func TestClusterReadYourWrites(t *testing.T) {
	for i, redis := range []string{"with Redis", "without Redis"}[:full(2, 1)] {
		t.Run(redis, func(t *testing.T) {
			f := newClusterRun(t, 44+i, "three hops behind HAProxy, reading what was written, "+redis)
			f.rig = newStores(t, startPostgres(t), startRedis(t))
			if i == 1 {
				f.environment = append(f.environment, "REDIS_URL=")
			}
			r := f.readWrites(f.startFleet(f.plainHops()))
			f.figure("%s", r)
			f.mark(r.longest < trustFor, "nothing older than %v", trustFor)
		})
	}
}
