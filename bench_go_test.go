package main

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"testing"
	"time"
)

// What the steps of a redirect cost, for benchstat:
//
//	scripts/with-services.sh go test -bench . -benchmem -run '^$' -count 10 . >new.txt
//
// What hop allocates above bare net/http is the difference between the two halves of
// BenchmarkRedirectServed. The clicks of each are written into a real journal, and counted nowhere.

// benchCodes are n codes and what they lead to.
func benchCodes(n int) (codes []string, targets map[string]target) {
	targets = map[string]target{}
	for i := range n {
		code := fmt.Sprintf("code%05d", i)
		codes = append(codes, code)
		url := "https://docs.example.com/lofty/heron/" + code
		targets[code] = target{id: int64(i + 1), location: []string{url}}
	}
	return codes, targets
}

// warmTier is a local tier that knows targets, and may answer for as long as a benchmark takes.
func warmTier(targets map[string]target) *localTier {
	l := newLocalTier(100_000)
	for code, t := range targets {
		keep(l, code, t)
	}
	for i := range l.shards {
		for _, e := range l.shards[i].links {
			e.alone = true
			e.until = int64(24 * time.Hour)
		}
	}
	return l
}

// BenchmarkLocalHit resolves codes that the local tier has.
func BenchmarkLocalHit(b *testing.B) {
	codes, targets := benchCodes(2000)
	c := newCache(nil, warmTier(targets), newFakeSource())
	now := time.Now()
	hit := func(i int) {
		t, err := c.resolve(context.Background(), codes[i%len(codes)], now)
		if err != nil || t.id == 0 {
			panic("no hit")
		}
	}
	b.Run("one", func(b *testing.B) {
		b.ReportAllocs()
		for i := range b.N {
			hit(i)
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(p *testing.PB) {
			for i := 0; p.Next(); i++ {
				hit(i)
			}
		})
	})
}

// BenchmarkMiss resolves codes that the local tier, being tiny, does not have. PostgreSQL is a map
// here, so that this is what hop and Redis take.
func BenchmarkMiss(b *testing.B) {
	codes, targets := benchCodes(20_000)
	pg := newFakeSource()
	pg.known = targets
	run := func(b *testing.B, c *Cache) {
		miss := func(i int) {
			t, err := c.resolve(context.Background(), codes[i%len(codes)], time.Now())
			if err != nil || t.id == 0 {
				panic(fmt.Sprint("not found: ", err))
			}
		}
		b.Run("one", func(b *testing.B) {
			b.ReportAllocs()
			for i := range b.N {
				miss(i)
			}
		})
		b.Run("parallel-64", func(b *testing.B) { // so that misses share round trips
			b.ReportAllocs()
			b.SetParallelism(32)
			b.RunParallel(func(p *testing.PB) {
				i := int(time.Now().UnixNano() % int64(len(codes)))
				for p.Next() {
					miss(i)
					i += 7
				}
			})
		})
	}
	b.Run("alone", func(b *testing.B) { run(b, newCache(nil, newLocalTier(minCached), pg)) })
	b.Run("redis", func(b *testing.B) {
		if os.Getenv("REDIS_URL") == "" {
			b.Skip("no REDIS_URL")
		}
		r := newReplica(b, testRedis(b), pg)
		r.local = newLocalTier(minCached)
		conn := r.redis.pool.Get()
		for code, t := range targets {
			value, ttl := encodeTarget(t)
			conn.Send("SET", r.key(code), value, "PX", ttl)
		}
		if err := receiveAll(conn, len(targets)); err != nil {
			b.Fatal(err)
		}
		conn.Close()
		run(b, r.Cache)
	})
}

// ---- whole redirects ----

// floorHandler is the least that net/http needs for a redirect, as bench/floor is.
func floorHandler(targets map[string]target) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{code}", func(w http.ResponseWriter, r *http.Request) {
		location := targets[r.PathValue("code")].location
		if location == nil {
			http.NotFound(w, r)
			return
		}
		w.Header()["Location"] = location
		w.WriteHeader(http.StatusFound)
	})
	return mux
}

// serverWithout is a hop that knows targets and has no database.
func serverWithout(t testing.TB, targets map[string]target, clicks *clickLog) http.Handler {
	t.Helper()
	cfg, err := loadConfig(func(string) string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	cache := newCache(nil, warmTier(targets), newFakeSource())
	store := newStore(openAs(t, "postgres://hop@127.0.0.1:1/none", "hop"))
	s, err := newServer(cfg, store, cache, clicks, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// blank is a ResponseWriter that keeps only the headers.
type blank struct{ header http.Header }

// Header makes blank a ResponseWriter.
func (w *blank) Header() http.Header { return w.header }

// Write makes blank a ResponseWriter.
func (w *blank) Write(p []byte) (int, error) { return len(p), nil }

// WriteHeader makes blank a ResponseWriter.
func (w *blank) WriteHeader(int) {}

// BenchmarkRedirectHandler is a redirect without what net/http does around it.
func BenchmarkRedirectHandler(b *testing.B) {
	codes, targets := benchCodes(2000)
	var requests []*http.Request
	for _, code := range codes {
		requests = append(requests, httptest.NewRequest("GET", "/"+code, nil))
	}
	handled := func(b *testing.B, h http.Handler, emptied func(i int)) {
		w := &blank{http.Header{}}
		b.ReportAllocs()
		for i := range b.N {
			clear(w.header)
			h.ServeHTTP(w, requests[i%len(requests)])
			if w.header["Location"] == nil {
				b.Fatal("no redirect")
			}
			emptied(i)
		}
	}
	againstFloor(b, targets, handled)
}

// againstFloor measures bare net/http and then hop.
func againstFloor(b *testing.B, targets map[string]target,
	measure func(b *testing.B, h http.Handler, emptied func(i int))) {

	b.Run("floor", func(b *testing.B) { measure(b, floorHandler(targets), func(int) {}) })
	b.Run("hop", func(b *testing.B) {
		clicks := benchClickLog(b)
		measure(b, serverWithout(b, targets, clicks), func(i int) {
			if i%(journalSlots/2) == journalSlots/2-1 { // or the journal would be full one day
				b.StopTimer()
				flushOK(b, clicks)
				b.StartTimer()
			}
		})
	})
}

// BenchmarkRedirectServed is a redirect with all of net/http, over loopback. The client, in this
// process too, allocates nothing.
func BenchmarkRedirectServed(b *testing.B) {
	codes, targets := benchCodes(2000)
	var requests [][]byte
	for _, code := range codes {
		request := "GET /" + code + " HTTP/1.1\r\nHost: localhost\r\n\r\n"
		requests = append(requests, []byte(request))
	}
	served := func(b *testing.B, h http.Handler, emptied func(i int)) {
		server := httptest.NewServer(h)
		defer server.Close()
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		answer := make([]byte, 4096)
		b.ReportAllocs()
		b.ResetTimer()
		for i := range b.N {
			if _, err := conn.Write(requests[i%len(requests)]); err != nil {
				b.Fatal(err)
			}
			n, err := conn.Read(answer) // one packet: it has no body
			if err != nil || n < 12 || string(answer[9:12]) != "302" {
				b.Fatalf("%q %v", answer[:n], err)
			}
			emptied(i)
		}
		b.StopTimer()
	}
	againstFloor(b, targets, served)
}

// TestRedirectAllocates holds hop's own part of a redirect to what the handler of bare net/http
// allocates: one slice, for the path's wildcard.
func TestRedirectAllocates(t *testing.T) {
	_, targets := benchCodes(1)
	h := serverWithout(t, targets, testClickLog(t, t.TempDir(), newLedger()))
	request := httptest.NewRequest("GET", "/code00000", nil)
	w := &blank{http.Header{}}
	allocs := testing.AllocsPerRun(1000, func() {
		clear(w.header)
		h.ServeHTTP(w, request)
	})
	if w.header["Location"] == nil || allocs > 1 {
		t.Errorf("a redirect allocates %v times in the handler, want 1", allocs)
	}
}

// TestWriteProfile makes default.pgo, which go build finds by its name: a CPU profile of hop under
// redirects at 64 connections. It runs only when told where to write:
//
//	WRITE_PGO=$PWD/default.pgo scripts/with-services.sh go test -run '^TestWriteProfile$' .
func TestWriteProfile(t *testing.T) {
	name := os.Getenv("WRITE_PGO")
	if name == "" {
		t.Skip("no WRITE_PGO")
	}
	a := startApp(t, "REDIS_URL="+testRedis(t), "LOG_LEVEL=error")
	dir, err := fs.Sub(seeds, "seeds")
	if err != nil {
		t.Fatal(err)
	}
	if err := a.store.seed(t.Context(), dir, io.Discard); err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(t.TempDir(), "redirects.lua")
	var lines strings.Builder
	lines.WriteString("local codes, i = {")
	for code := range seededLinks(t, 1000) {
		fmt.Fprintf(&lines, "%q,", "/"+code)
	}
	lines.WriteString("}, 0\nfunction request() i = i % #codes + 1; " +
		"return wrk.format('GET', codes[i]) end\n")
	if err := os.WriteFile(script, []byte(lines.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	file, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := pprof.StartCPUProfile(file); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("wrk", "-t2", "-c64", "-d20s", "-s", script, a.url).CombinedOutput()
	pprof.StopCPUProfile()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("%s", out)
}
