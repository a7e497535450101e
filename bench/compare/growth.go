package main

import (
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	// grownCodes is how many codes a load asks for: more would only make wrk large.
	grownCodes = 100_000

	// eventsPerLink is how many events each grown link has, so that 10 M links have 50 M.
	eventsPerLink = 5

	// seedAtMost is the largest number of links that are also exported, and loaded again.
	seedAtMost = 1_000_000
)

// compareGrowth starts hop on ever more links, with a Redis of 256 MB: does anything get slower, or
// larger, than the number of links in use explains? GROWTH_SIZES lists the numbers of links
// (10000,100000,1000000).
func compareGrowth(b *bench) {
	sizes := os.Getenv("GROWTH_SIZES")
	if sizes == "" {
		sizes = "10000,100000,1000000"
	}
	b.boundRedis("256mb")
	fmt.Println("\n### Growth")
	for _, text := range strings.Split(sizes, ",") {
		n, err := strconv.Atoi(text)
		must(err)
		b.growTo(n)
	}
}

// boundRedis gives Redis a bound on its memory, as its operators do: the least used values go.
func (b *bench) boundRedis(size string) {
	conn, err := redis.DialURL(os.Getenv("REDIS_URL"))
	must(err)
	defer conn.Close()
	_, err = conn.Do("CONFIG", "SET", "maxmemory", size, "maxmemory-policy", "allkeys-lru")
	must(err)
}

// growTo measures one size, and prints it as a list.
func (b *bench) growTo(n int) {
	env, dsn := b.hopSettings(b.hop)
	db := openDB(dsn)
	fill := func(query string) {
		_, err := db.Exec(query)
		must(err)
	}
	fill(fmt.Sprintf(`
		INSERT INTO urls (short_code, original_url, created_at, updated_at)
		SELECT 'g' || lpad(i::text, 9, '0'), 'https://grown.example.net/page/' || i, now(), now()
		FROM generate_series(1, %d) AS i`, n))
	fill(fmt.Sprintf(`
		INSERT INTO events (url_id, event_type, timestamp, details)
		SELECT id, 'click', date_trunc('second', now()), 'false'
		FROM urls, generate_series(1, %d)
		WHERE short_code LIKE 'g%%'`, eventsPerLink))
	fill(`VACUUM ANALYZE`) // autovacuum would come by itself, in the middle of what is measured

	began := time.Now()
	s := start(b.hop, env, "/health", "serve")
	ready := time.Since(began)
	fmt.Printf("\n%d links, %d events: ready after %.2f s with %.0f MB\n\n", n, eventsPerLink*n,
		ready.Seconds(), s.rss())

	zipf := rand.NewZipf(rand.New(rand.NewPCG(1, 2)), 1.1, 1, uint64(n-1))
	loads := []struct {
		name string
		pick func(i int) int
	}{
		{"uniform", func(i int) int { return i*n/grownCodes + 1 }},
		{"Zipf", func(int) int { return n - int(zipf.Uint64()) }},
		{"the newest 1,000", func(int) int { return n - rand.IntN(min(n, 1000)) }},
	}
	for i, load := range loads {
		l := b.grownLoad(fmt.Sprintf("grown-%d-%d", n, i), n, load.pick)
		r := l.run(s.url, 64, share())
		fmt.Printf("- redirects, %s: %.0f/s, p99 %.1f ms, %d failed\n", load.name, r.rate(),
			float64(r.P99)/1000, r.errors())
	}
	c := b.creates.run(s.url+"/shorten", 32, share())
	fmt.Printf("- creates: %.0f/s, %d failed\n", c.rate(), c.errors())

	code := fmt.Sprintf("g%09d", n)
	for _, path := range []string{
		"/",
		"/?q=page%2F1",
		"/" + code + "+",
		"/stats/" + code,
		fmt.Sprintf("/urls?per_page=100&after=%d", n/2),
		fmt.Sprintf("/events?per_page=100&after=%d", n),
		"/events?event_type=click&per_page=100",
		"/urls?sort=-clicks&per_page=100",
	} {
		fmt.Printf("- GET %s: first byte after %.1f ms\n", path, s.firstByte(path))
	}
	if n <= seedAtMost {
		b.exportAndSeed(n, env)
	}
	fmt.Printf("- RSS afterwards: %.0f MB\n", s.rss())
	fmt.Println(goal("start to ready, s", ready.Seconds(), "<=", 6))
	fmt.Println(goal("RSS, MB", s.rss(), "<=", 150))
	stopAll([]contender{{"grown", s}})
	db.Close()
}

// firstByte is the median of five times, in ms, until a browser has the first byte of a page.
func (s *server) firstByte(path string) float64 {
	var all []float64
	for range 5 {
		req, err := http.NewRequest(http.MethodGet, s.url+path, nil)
		must(err)
		req.Header.Set("Accept", "text/html, application/json;q=0.9")
		began := time.Now()
		resp, err := http.DefaultClient.Do(req)
		must(err)
		_, err = resp.Body.Read(make([]byte, 1))
		if err != nil && err != io.EOF {
			must(err)
		}
		all = append(all, float64(time.Since(began).Microseconds())/1000)
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return math.NaN()
		}
	}
	return median(all)
}

// exportAndSeed exports all links and events, and loads them into an empty database.
func (b *bench) exportAndSeed(n int, env []string) {
	dir := filepath.Join(b.dir, fmt.Sprintf("export-%d", n))
	defer os.RemoveAll(dir)
	run := func(env []string, args ...string) time.Duration {
		cmd := exec.Command(b.hop, args...)
		cmd.Env = append(os.Environ(), env...)
		cmd.Stderr = os.Stderr
		began := time.Now()
		must(cmd.Run())
		return time.Since(began)
	}
	export := run(env, "export", dir)
	empty, _ := b.emptyDatabase()
	seed := run(slices.Concat(env, []string{"DATABASE_URL=" + empty}), "seed", dir)
	fmt.Printf("- export: %.1f s; seed of what it wrote: %.1f s\n", export.Seconds(),
		seed.Seconds())
}

// grownLoad asks for codes of grown links; pick says which link is the i-th to be asked for.
func (b *bench) grownLoad(name string, n int, pick func(i int) int) wrkLoad {
	codes := make([]string, grownCodes)
	for i := range codes {
		codes[i] = fmt.Sprintf("g%09d", min(n, max(1, pick(i))))
	}
	return newLoad(b.dir, name+".lua", wrkRedirects, codes)
}

// compareFlood lets guessers ask for codes that nobody made, as fast as they can, beside people
// who follow links: what do the guesses cost them, PostgreSQL and Redis?
func compareFlood(b *bench) {
	s := b.startHop(b.hop)
	guesses := make([]string, grownCodes)
	fmt.Printf("\n### A flood of codes that nobody made, medians of %d rounds of %v\n\n", rounds(),
		share())
	var quiet, flooded []sample
	var guessed, asked, missed []float64
	b.redirects.run(s.url, 32, time.Second)
	for round := range rounds() {
		for i := range guesses {
			guesses[i] = fmt.Sprintf("x%d%07d", round, rand.IntN(10_000_000))
		}
		flood := newLoad(b.dir, fmt.Sprintf("guesses-%d.lua", round), wrkRedirects, guesses)
		quiet = append(quiet, sample{wrkResult: b.redirects.run(s.url, 32, share())})

		statements := s.statements()
		misses := s.metric("hop_cache_misses_total")
		done := make(chan wrkResult)
		go func() { done <- flood.run(s.url, 32, share()) }()
		flooded = append(flooded, sample{wrkResult: b.redirects.run(s.url, 32, share())})
		r := <-done
		guessed = append(guessed, float64(r.Bad)/share().Seconds())
		asked = append(asked, float64(s.statements()-statements)/share().Seconds())
		misses = s.metric("hop_cache_misses_total") - misses
		missed = append(missed, float64(misses)/share().Seconds())
	}
	fmt.Printf("- people alone: %.0f redirects/s, p99 %.1f ms\n", medianOf(quiet, rate),
		medianOf(quiet, p99))
	fmt.Printf("- beside %.0f guesses/s: %.0f redirects/s, p99 %.1f ms, %d failed\n",
		median(guessed), medianOf(flooded, rate), medianOf(flooded, p99), failures(flooded))
	fmt.Printf("- PostgreSQL: %.0f look-ups/s in %.0f transactions/s\n", median(missed),
		median(asked))
	stopAll([]contender{{"flooded", s}})
}
