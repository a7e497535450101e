//go:build bench

package main

import (
	"bytes"
	"cmp"
	"encoding/csv"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestGrowth shows what ten times the links cost, twice: seeding beside psql's \copy of the same files, exporting, starting with
// an empty Redis beside redis-benchmark, and redirects over all links, uniform and by Zipf's law. Each size has a database, a
// Redis and a hop of its own.
func TestGrowth(t *testing.T) {
	printMachine(t)
	hop := buildHop(t)
	var grown []growth
	for word := range strings.SplitSeq(cmp.Or(os.Getenv("GROWTH_SIZES"), "10000,100000,300000,1000000"), ",") {
		n, err := strconv.Atoi(strings.TrimSpace(word))
		if err != nil {
			t.Fatal(err)
		}
		t.Run(word, func(t *testing.T) { grown = append(grown, grow(t, hop, n)) })
	}
	if t.Failed() {
		return
	}
	fmt.Printf("\n### Growth: 64 connections, %v each, LOCAL_CACHE as it is by default (100,000)\n", benchTime("BENCH_SECONDS", 6))
	table := func(head string, row func(g growth) string) {
		fmt.Printf("\n| links | %s |\n|%s\n", head, strings.Repeat("---|", strings.Count(head, "|")+2))
		for _, g := range grown {
			fmt.Printf("| %d | %s |\n", g.links, row(g))
		}
	}
	table(`rows in three files | hop seed, s | psql \copy, s | speed ÷ \copy | hop export, s | start to ready, s | warm-up, s | links/s warmed | redis-benchmark, the same SETs/s | ratio | redis-benchmark -t set, SETs/s | ratio`,
		func(g growth) string {
			return fmt.Sprintf("%d | %.2f | %.2f | %.2f | %.2f | %.2f | %.2f | %.0f | %.0f | %.2f | %.0f | %.2f", g.rows, g.seed.Seconds(), g.copy.Seconds(),
				g.copy.Seconds()/g.seed.Seconds(), g.export.Seconds(), g.start.Seconds(), g.warm.Seconds(), g.warmRate(), g.sameRate, g.warmRate()/g.sameRate, g.redisRate, g.warmRate()/g.redisRate)
		})
	table("RSS when warm, MB | uniform, requests/s | p99, ms | CPU, µs | from local tier | errors | RSS after, MB | Zipf, requests/s | p99, ms | CPU, µs | from local tier | errors | RSS after, MB",
		func(g growth) string {
			load := func(l growthLoad) string {
				return fmt.Sprintf("%.0f | %.2f | %.1f | %.0f %% | %d | %.0f", l.rate(), p99(l.sample), l.cpu, 100*l.local, l.errors(), l.rss)
			}
			return fmt.Sprintf("%.0f | %s | %s", g.rss, load(g.uniform), load(g.zipf))
		})
	fmt.Println()
	last := grown[len(grown)-1]
	goal("warm-up ÷ redis-benchmark -t set", last.warmRate()/last.redisRate, ">=", 0.6)
	goal("warm-up ÷ redis-benchmark with the same SETs", last.warmRate()/last.sameRate, ">=", 0.6)
	goal(`seeding ÷ \copy`, last.copy.Seconds()/last.seed.Seconds(), ">=", 0.5)
	if before := grown[max(0, len(grown)-2)]; before.warmed > 100_000 { // from here on the local tier is full
		goal(fmt.Sprintf("RSS after load, %d ÷ %d links", last.links, before.links), max(last.uniform.rss, last.zipf.rss)/max(before.uniform.rss, before.zipf.rss), "<=", 1.1)
	}
}

// growth is what one size costs.
type growth struct {
	links, rows               int
	seed, copy, export, start time.Duration
	warm                      time.Duration
	warmed                    int
	redisRate, sameRate, rss  float64
	uniform, zipf             growthLoad
}

func (g growth) warmRate() float64 { return float64(g.warmed) / g.warm.Seconds() }

// growthLoad is one load on all links; local is the share that the local tier answered.
type growthLoad struct {
	sample
	local float64
}

// grow measures one size. Events and users are as many as in seeds/, in proportion, as far as there are names for users.
func grow(t *testing.T, hop string, n int) (g growth) {
	dir, redisURL := t.TempDir(), testRedis(t)
	if err := writeSeeds(dir, uint64(n), min(n/5, 50_000), n, n*3422/2000); err != nil {
		t.Fatal(err)
	}
	g.links = n

	dsn, other := testDatabase(t), testDatabase(t)
	g.copy = copyFiles(t, hop, other, dir)
	prepareTables(t, hop, dsn)
	start := time.Now()
	runHop(t, hop, dsn, "seed", dir)
	g.seed = time.Since(start)
	const count = `SELECT (SELECT count(*) FROM users) + (SELECT count(*) FROM urls) + (SELECT count(*) FROM events)`
	g.rows = int(scalar[int64](t, openDB(t, dsn), count))
	if copied := scalar[int64](t, openDB(t, other), count); copied != int64(g.rows) {
		t.Fatalf("seed loaded %d rows, \\copy %d", g.rows, copied)
	}
	out := t.TempDir()
	start = time.Now()
	runHop(t, hop, dsn, "export", out)
	g.export = time.Since(start)
	for _, file := range []string{"users.csv", "urls.csv", "events.csv"} {
		want, err1 := os.ReadFile(filepath.Join(dir, file))
		got, err2 := os.ReadFile(filepath.Join(out, file))
		if err1 != nil || err2 != nil || !bytes.Equal(got, want) {
			t.Errorf("the exported %s is not the one that was loaded: %v %v", file, err1, err2)
		}
	}
	os.RemoveAll(out)

	g.redisRate = redisBenchmark(t, redisURL, "-t", "set")
	g.sameRate = redisBenchmark(t, redisURL, "-r", "1000000", "SET", "u:__rand_int__", "1aaa 0 https://docs.example.com/lofty/heron/123456", "NX", "PX", "600000")
	testRedis(t) // empty again
	start = time.Now()
	p := startBuilt(t, hop, "DATABASE_URL="+dsn, "REDIS_URL="+redisURL)
	g.start = time.Since(start)
	m := regexp.MustCompile(`msg="redis warm" links=(\d+) took=(\S+)`).FindStringSubmatch(p.log(t))
	if m == nil {
		t.Fatalf("no word of warming in hop's log")
	}
	g.warmed, _ = strconv.Atoi(m[1])
	g.warm, _ = time.ParseDuration(m[2])
	g.rss = p.rss(t)

	links := activeLinks(t, filepath.Join(dir, "urls.csv"))
	if g.warmed != len(links) {
		t.Errorf("%d links warmed, %d are active", g.warmed, len(links))
	}
	random := rand.New(rand.NewPCG(1, uint64(n)))
	random.Shuffle(len(links), func(i, j int) { links[i], links[j] = links[j], links[i] })
	checkAnswers(t, p.url, links[:min(200, len(links))])
	codes := codesOf(links)
	g.uniform = loadGrown(t, p, codes)
	g.zipf = loadGrown(t, p, zipf(random, codes, 500_000))
	p.kill()
	return g
}

// loadGrown loads hop with the codes, one after the other.
func loadGrown(t *testing.T, p *process, codes []string) (l growthLoad) {
	load := redirectLoad(t, codes)
	local, before := p.metric(t, `hop_cache_hits_total{tier="local"}`), p.cpu(t)
	l.wrkResult = load.run(t, p.url, 64, benchTime("BENCH_SECONDS", 6))
	l.cpu, l.rss = (p.cpu(t)-before)*1e6/float64(l.Requests), p.rss(t)
	l.local = float64(p.metric(t, `hop_cache_hits_total{tier="local"}`)-local) / float64(l.Requests)
	return l
}

// zipf draws n codes, the k-th of them with a probability of 1/k: the exponent that web requests are found to have is just what
// rand.Zipf refuses.
func zipf(r *rand.Rand, codes []string, n int) []string {
	sums, sum := make([]float64, len(codes)), 0.0
	for i := range codes {
		sum += 1 / float64(i+1)
		sums[i] = sum
	}
	drawn := make([]string, n)
	for i := range drawn {
		at, _ := slices.BinarySearch(sums, r.Float64()*sum)
		drawn[i] = codes[min(at, len(codes)-1)]
	}
	return drawn
}

// prepareTables applies hop's schema to an empty database, and has PostgreSQL write out what earlier tests left to write.
func prepareTables(t *testing.T, hop, dsn string) {
	t.Helper()
	runHop(t, hop, dsn, "export", t.TempDir())
	openDB(t, dsn).Exec("CHECKPOINT") // refused to who is no superuser, then the figures scatter more
}

// copyFiles loads the three files with psql, in one session, and returns how long it took.
func copyFiles(t *testing.T, hop, dsn, dir string) time.Duration {
	t.Helper()
	prepareTables(t, hop, dsn)
	args := []string{"-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn}
	for _, name := range []string{"users", "urls", "events"} {
		file := filepath.Join(dir, name+".csv")
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		header, err := csv.NewReader(f).Read()
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, "-c", fmt.Sprintf(`\copy %s (%s) FROM '%s' CSV HEADER`, name, strings.Join(header, ","), file))
	}
	start := time.Now()
	if out, err := exec.Command(pgBin(t, "psql"), args...).CombinedOutput(); err != nil {
		t.Fatalf("psql: %v: %s", err, out)
	}
	return time.Since(start)
}

// redisBenchmark is how many SETs a second Redis takes in pipelines of 100. -t set sends the same 3 bytes to one key again and
// again, from C; the same SETs as hop's, to different keys with values as long and an expiry, are several times the work.
func redisBenchmark(t *testing.T, redisURL string, what ...string) float64 {
	t.Helper()
	u, err := url.Parse(redisURL)
	if err != nil {
		t.Fatal(err)
	}
	host, port, err := net.SplitHostPort(u.Host)
	if err != nil {
		host, port = u.Host, "6379"
	}
	args := []string{"-h", host, "-p", port, "-P", "100", "-n", "1000000", "-q"}
	if password, ok := u.User.Password(); ok {
		args = append(args, "-a", password)
	}
	out, err := exec.Command("redis-benchmark", append(args, what...)...).CombinedOutput()
	all := regexp.MustCompile(`SET.*: ([0-9.]+) requests per second`).FindAllSubmatch(out, -1)
	if err != nil || all == nil {
		t.Fatalf("redis-benchmark: %v: %s", err, out)
	}
	rate, _ := strconv.ParseFloat(string(all[len(all)-1][1]), 64)
	return rate
}
