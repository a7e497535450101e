// Compare measures hop beside what it is measured against, in interleaved rounds: a shared
// machine's moods then hit all of them. `make bench` runs it with everything it needs:
//
//	compare redirects   requests/s, p99 and CPU beside net/http, the old hop, a Redis GET each
//	compare counted     every click answered is a click counted; what a click row costs
//	compare open        latencies at fixed rates, counted from when a request was due
//	compare creates     POST /shorten beside pgbench with the same INSERT
//	compare growth      start, memory and speed at 10,000, 100,000 and 1,000,000 links
//	compare flood       codes that nobody made, beside redirects
//
// Settings: BENCH_ROUNDS (5), BENCH_SECONDS (6, each server's share of a round), BENCH_OLD (a
// commit to build the old hop from), DATABASE_URL and REDIS_URL (of throw-away servers),
// WRK_THREADS (2).
//
// Slow is no error here, the tables say it. A wrong, lost or miscounted answer is.
package main

import (
	"database/sql"
	"fmt"
	"log"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	_ "github.com/lib/pq"
)

func main() {
	commands := map[string]func(*bench){
		"redirects": compareRedirects,
		"counted":   compareCounted,
		"open":      compareOpen,
		"creates":   compareCreates,
		"growth":    compareGrowth,
		"flood":     compareFlood,
	}
	b := newBench()
	defer b.close()
	printMachine(b)
	for _, name := range os.Args[1:] {
		run, ok := commands[name]
		if !ok {
			log.Fatalf("%s: no such comparison", name)
		}
		run(b)
	}
}

// setting is a number from the environment.
func setting(name string, absent int) int {
	n, err := strconv.Atoi(os.Getenv(name))
	if err != nil || n < 1 {
		return absent
	}
	return n
}

// rounds is how often everything is measured; what is printed are medians.
func rounds() int { return setting("BENCH_ROUNDS", 5) }

// share is how long one server is loaded in one round.
func share() time.Duration { return time.Duration(setting("BENCH_SECONDS", 6)) * time.Second }

// contender is a server that takes part.
type contender struct {
	name string
	*server
}

// sample is what one server did in one round.
type sample struct {
	wrkResult
	cpu float64 // µs of the server's own per request, user and system
}

func rate(s sample) float64 { return s.rate() }
func cpu(s sample) float64  { return s.cpu }
func p99(s sample) float64  { return float64(s.P99) / 1000 }

// compareRedirects races all servers at 64 and at 500 connections. The floor with timeouts tells
// what of hop's distance is the price of not being kept busy by slow clients.
func compareRedirects(b *bench) {
	contenders := []contender{
		{"floor: net/http alone", b.startFloor()},
		{"floor with hop's timeouts", b.startFloor("timeouts")},
		{"hop, CLICK_EVENTS=off", b.startHop(b.hop, "CLICK_EVENTS=off")},
		{"hop", b.startHop(b.hop)},
		{"redigo: a pooled GET each", b.startRedigo()},
	}
	if b.old != "" {
		contenders = append(contenders, contender{"hop before", b.startHop(b.old)})
	}
	for _, conns := range []int{64, 500} {
		results := race(b, conns, contenders)
		fmt.Printf("\n### Redirects, %d connections, medians of %d rounds of %v\n\n",
			conns, rounds(), share())
		printRace(contenders, results)
		floor, rowsOff, rowsOn := results[0], results[2], results[3]
		fmt.Println(goal("rows on: requests/s ÷ floor", ratio(rowsOn, floor, rate), ">=", 0.85))
		fmt.Println(goal("rows off: requests/s ÷ floor", ratio(rowsOff, floor, rate), ">=", 0.95))
		fmt.Println(goal("rows on: p99 ÷ floor", ratio(rowsOn, floor, p99), "<=", 1.3))
		if b.old != "" {
			fmt.Println(goal("requests/s ÷ hop before", ratio(rowsOn, results[5], rate), ">=", 1))
		}
	}
	stopAll(contenders)
}

// race loads each contender in turn, in rounds that begin with another one each.
func race(b *bench, conns int, contenders []contender) [][]sample {
	results := make([][]sample, len(contenders))
	for _, c := range contenders {
		b.redirects.run(c.url, conns, time.Second) // opening connections is in no round
	}
	for round := range rounds() {
		for i := range contenders {
			i = (i + round) % len(contenders)
			before := contenders[i].cpu()
			s := sample{wrkResult: b.redirects.run(contenders[i].url, conns, share())}
			s.cpu = (contenders[i].cpu() - before) * 1e6 / float64(s.Requests)
			results[i] = append(results[i], s)
			time.Sleep(time.Second) // what the last one left to count
		}
	}
	return results
}

// printRace prints a race as a table. Ratios are to the first contender, taken in each round.
func printRace(contenders []contender, results [][]sample) {
	fmt.Println("| server | requests/s | p50, ms | p99, ms | errors | CPU, µs | RSS, MB " +
		"| requests/s ÷ 1st | CPU ÷ 1st | p99 ÷ 1st |")
	fmt.Println("|---|---|---|---|---|---|---|---|---|---|")
	p50 := func(s sample) float64 { return float64(s.P50) / 1000 }
	for i, c := range contenders {
		r := results[i]
		fmt.Printf("| %s | %.0f | %.2f | %.2f | %d | %.1f | %.0f | %.2f | %.2f | %.2f |\n",
			c.name, medianOf(r, rate), medianOf(r, p50), medianOf(r, p99), failures(r),
			medianOf(r, cpu), c.rss(), ratio(r, results[0], rate), ratio(r, results[0], cpu),
			ratio(r, results[0], p99))
	}
	fmt.Println()
}

// failures is how many requests failed in all rounds.
func failures(samples []sample) (n int64) {
	for _, s := range samples {
		n += s.errors()
	}
	return n
}

// compareCounted holds hop to every click, and measures what a row for each costs all processes
// together, and on disk.
func compareCounted(b *bench) {
	fmt.Printf("\n### Every click counted, medians of %d rounds of %v\n\n", rounds(), share())
	fmt.Println("| connections | answered | counted | counted ÷ answered | event rows " +
		"| rows dropped | bytes per row | CPU per click row beyond rows off, µs | RSS, MB |")
	fmt.Println("|---|---|---|---|---|---|---|---|---|")
	var goals []string
	for _, conns := range []int{64, 500} {
		on := b.startHop(b.hop)
		off := b.startHop(b.hop, "CLICK_EVENTS=off")
		var costs []float64
		for range rounds() {
			cheap := b.clickCost(off, conns)
			costs = append(costs, b.clickCost(on, conns)-cheap)
		}
		answered := on.metric(answeredRedirects)
		counted := scalar[int64](on.db, `SELECT sum(click_count)::bigint FROM urls`)
		rows := scalar[int64](on.db, `SELECT count(*) FROM events WHERE event_type = 'click'`)
		dropped := on.metric("hop_click_events_dropped_total")
		size := scalar[int64](on.db, `SELECT pg_total_relation_size('events')`)
		all := scalar[int64](on.db, `SELECT count(*) FROM events`)
		fmt.Printf("| %d | %d | %d | %.6f | %d | %d | %.0f | %.1f | %.0f |\n", conns, answered,
			counted, float64(counted)/float64(answered), rows, dropped,
			float64(size)/float64(all), median(costs), on.rss())
		if counted != answered || rows+dropped != counted {
			log.Fatalf("answered %d, counted %d, rows %d, dropped %d", answered, counted, rows,
				dropped)
		}
		at := fmt.Sprintf("%d connections: ", conns)
		goals = append(goals,
			goal(at+"CPU per click row, µs", median(costs), "<=", 7),
			goal(at+"bytes per click row", float64(size)/float64(all), "<=", 160))
		stopAll([]contender{{"on", on}, {"off", off}})
	}
	fmt.Println("\n" + strings.Join(goals, "\n"))
}

// clickCost loads s and returns the µs of CPU that it and the stores spent for each click until
// every click was counted. PostgreSQL and Redis serve both hops, of which one is idle. What hop
// says it answered must be what wrk received, and at most one answer more for each connection that
// wrk closed at its end.
func (b *bench) clickCost(s *server, conns int) float64 {
	before := s.cpu() + b.storesCPU()
	answered := s.metric(answeredRedirects)
	r := b.redirects.run(s.url, conns, share())
	s.waitCounted()
	clicks := s.metric(answeredRedirects) - answered
	if good := r.Requests - r.Bad; clicks < good || clicks > good+int64(conns) {
		log.Fatalf("wrk received %d redirects, hop says %d", good, clicks)
	}
	return (s.cpu() + b.storesCPU() - before) * 1e6 / float64(clicks)
}

// answeredRedirects is the metric that counts redirects.
const answeredRedirects = `hop_request_duration_seconds_count{route="GET /{code}",status="302"}`

// compareOpen measures latencies at fixed rates.
func compareOpen(b *bench) {
	contenders := []contender{
		{"floor: net/http alone", b.startFloor()},
		{"hop", b.startHop(b.hop)},
	}
	fmt.Printf("\n### Latencies in an open loop, 64 connections, medians of %d rounds of %v\n\n",
		rounds(), share())
	fmt.Println("| requests/s | server | p50, ms | p99, ms | p99.9, ms | failed |")
	fmt.Println("|---|---|---|---|---|---|")
	var ratios []string
	for _, perSecond := range []int{1000, 5000, 20_000} {
		results := make([][]latencies, len(contenders))
		for round := range rounds() {
			for i := range contenders {
				i = (i + round) % len(contenders)
				l := openLoop(contenders[i].addr, b.codes, perSecond, 64, share())
				results[i] = append(results[i], l)
			}
		}
		var tails [2]float64
		for i, c := range contenders {
			p50 := medianOf(results[i], func(l latencies) float64 { return l.p50 })
			p99 := medianOf(results[i], func(l latencies) float64 { return l.p99 })
			tails[i] = medianOf(results[i], func(l latencies) float64 { return l.p999 })
			failed := 0
			for _, l := range results[i] {
				failed += l.failed
			}
			fmt.Printf("| %d | %s | %.2f | %.2f | %.2f | %d |\n", perSecond, c.name, p50, p99,
				tails[i], failed)
		}
		ratios = append(ratios, fmt.Sprintf("at %d/s p99.9 ÷ floor's %.2f", perSecond,
			tails[1]/tails[0]))
	}
	fmt.Printf("\n- %s (wanted at 5000/s: <= 1.5)\n", strings.Join(ratios, ", "))
	stopAll(contenders)
}

// compareCreates races POST /shorten against pgbench, with 32 clients and with one.
func compareCreates(b *bench) {
	s := b.startHop(b.hop)
	var old *server
	if b.old != "" {
		old = b.startHop(b.old)
	}
	fmt.Printf("\n### Creates, medians of %d rounds of %v\n\n", rounds(), share())
	fmt.Println("| clients | POST /shorten, 201/s | pgbench, tps | hop ÷ pgbench | hop before ÷ " +
		"pgbench | hop p50, ms | pgbench latency, ms |")
	fmt.Println("|---|---|---|---|---|---|---|")
	var goals []string
	for _, clients := range []int{32, 1} {
		var made, tps, ratios, before, p50s, alone []float64
		for range rounds() {
			rows := scalar[int64](s.db, `SELECT count(*) FROM urls`)
			r := b.creates.run(s.url+"/shorten", clients, share())
			s.waitIdle()
			rows = scalar[int64](s.db, `SELECT count(*) FROM urls`) - rows
			if good := r.Requests - r.Bad; rows < good || rows > good+int64(clients) {
				log.Fatalf("%d answers of 201, %d rows", good, rows)
			}
			pg := b.pgbench(s.dsn, clients, share())
			made = append(made, r.rate())
			tps = append(tps, pg)
			ratios = append(ratios, r.rate()/pg)
			p50s = append(p50s, float64(r.P50)/1000)
			alone = append(alone, float64(clients)*1000/pg)
			if old != nil {
				before = append(before, b.creates.run(old.url+"/shorten", clients, share()).rate()/pg)
			}
		}
		fmt.Printf("| %d | %.0f | %.0f | %.2f | %.2f | %.2f | %.2f |\n", clients, median(made),
			median(tps), median(ratios), median(before), median(p50s), median(alone))
		if clients > 1 {
			goals = append(goals,
				goal("creates ÷ pgbench, 32 clients", median(ratios), ">=", 0.95))
		} else {
			goals = append(goals,
				goal("alone: mean latency ÷ pgbench's", 1/median(ratios), "<=", 1.2))
		}
	}
	fmt.Println("\n" + strings.Join(goals, "\n"))
	s.stop()
	if old != nil {
		old.stop()
	}
}

// ---- figures ----

// goal says what is wanted and whether this run has it.
func goal(what string, got float64, op string, want float64) string {
	verdict := "met"
	if op == ">=" && got < want || op == "<=" && got > want {
		verdict = "MISSED"
	}
	return fmt.Sprintf("- %s: %.2f, wanted %s %g: %s", what, got, op, want, verdict)
}

// ratio is the median over rounds of what a has by what b has in the same round.
func ratio[T any](a, b []T, of func(T) float64) float64 {
	all := make([]float64, len(a))
	for i := range a {
		all[i] = of(a[i]) / of(b[i])
	}
	return median(all)
}

// medianOf is the median of one figure of all samples.
func medianOf[T any](samples []T, of func(T) float64) float64 {
	all := make([]float64, len(samples))
	for i, s := range samples {
		all[i] = of(s)
	}
	return median(all)
}

// median is 0 without figures.
func median(all []float64) float64 {
	if len(all) == 0 {
		return 0
	}
	all = slices.Sorted(slices.Values(all))
	return (all[(len(all)-1)/2] + all[len(all)/2]) / 2
}

// scalar is the one value that a query gives.
func scalar[T any](db *sql.DB, query string) T {
	var v T
	if err := db.QueryRow(query).Scan(&v); err != nil {
		log.Fatalf("%s: %v", query, err)
	}
	return v
}

// printMachine prints what the figures depend on.
func printMachine(b *bench) {
	info, _ := os.ReadFile("/proc/cpuinfo")
	model := runtime.GOARCH
	if found := regexp.MustCompile(`model name\s*: (.*)`).FindSubmatch(info); found != nil {
		model = string(found[1])
	}
	wrk, _ := exec.Command("wrk", "-v").CombinedOutput() // it exits with 1
	line, _, _ := strings.Cut(string(wrk), "\n")
	fmt.Printf("\n%s, %d × %s, %s, PostgreSQL %s, %s\n", time.Now().Format(time.DateOnly),
		runtime.NumCPU(), model, runtime.Version(),
		scalar[string](b.admin, `SHOW server_version`), line)
}
