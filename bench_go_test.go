package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"
)

// What single steps of a redirect cost, for benchstat:
//
//	scripts/with-services.sh go test -bench . -benchmem -run '^$' -count 10 . >new.txt
//
// BENCHMARKS.md counts from BenchmarkRedirectServed what hop allocates above bare net/http.

var quiet = slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelError}))

// benchCodes are n codes and what they lead to.
func benchCodes(n int) (codes []string, targets map[string]target) {
	targets = make(map[string]target, n)
	for i := range n {
		code := fmt.Sprintf("code%05d", i)
		codes = append(codes, code)
		targets[code] = target{id: int64(i + 1), location: []string{"https://docs.example.com/lofty/heron/" + code}}
	}
	return codes, targets
}

// warmTier is a local tier of size links that knows targets and trusts them.
func warmTier(size int, targets map[string]target) *localTier {
	l := newLocalTier(size)
	for code, t := range targets {
		l.put(code, t, l.generation(code), time.Hour, false)
	}
	return l
}

func BenchmarkLocalHit(b *testing.B) {
	codes, targets := benchCodes(2000)
	c := newCache(nil, warmTier(100_000, targets), nil)
	now := time.Now()
	hit := func(i int) {
		if t, err := c.resolve(codes[i%len(codes)], now); err != nil || t.id == 0 {
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
		b.RunParallel(func(pb *testing.PB) {
			for i := 0; pb.Next(); i++ {
				hit(i)
			}
		})
	})
}

// BenchmarkMiss asks for codes that the local tier, being tiny, does not hold; PostgreSQL is a map here.
func BenchmarkMiss(b *testing.B) {
	codes, targets := benchCodes(20_000)
	load := func(code string) (target, error) { return targets[code], nil }
	run := func(b *testing.B, c *Cache) {
		miss := func(i int) {
			if t, err := c.resolve(codes[i%len(codes)], time.Now()); err != nil || t.id == 0 {
				panic(fmt.Sprint("not found: ", err))
			}
		}
		b.Run("one", func(b *testing.B) {
			b.ReportAllocs()
			for i := range b.N {
				miss(i)
			}
		})
		b.Run("parallel-64", func(b *testing.B) { // where misses share an MGET
			b.ReportAllocs()
			b.SetParallelism(32)
			b.RunParallel(func(pb *testing.PB) {
				for i := int(time.Now().UnixNano() % 20_000); pb.Next(); i += 7 {
					miss(i)
				}
			})
		})
	}
	b.Run("alone", func(b *testing.B) { run(b, newCache(nil, newLocalTier(64), load)) })
	b.Run("redis", func(b *testing.B) {
		if os.Getenv("REDIS_URL") == "" {
			b.Skip("no REDIS_URL")
		}
		local := newLocalTier(64)
		tier := openRedis(testRedis(b), local, nil, quiet)
		b.Cleanup(func() { tier.pool.Close() })
		ctx, stop := context.WithCancel(b.Context())
		defer stop()
		go tier.track(ctx)
		eventually(b, 5*time.Second, "redis is trusted", tier.usable)
		conn := tier.pool.Get()
		for code, t := range targets {
			value, ttl := encodeTarget(t)
			conn.Send("SET", key(code), value, "PX", ttl)
		}
		if err := receiveAll(conn, len(targets)); err != nil {
			b.Fatal(err)
		}
		conn.Close()
		run(b, newCache(tier, local, load))
	})
}

// benchClicks is a click log on a real journal whose batches go nowhere.
func benchClicks(b *testing.B, events bool) *clickLog {
	c := newClickLog(b.TempDir(), events, func(clickBatch) (bool, error) { return true, nil }, quiet)
	b.Cleanup(func() {
		if c.file != nil {
			c.file.close()
		}
	})
	return c
}

// flushNow keeps the journal from filling up, off the clock.
func flushNow(b *testing.B, c *clickLog, i int) {
	if i%(halfSlots-1) == halfSlots-2 {
		b.StopTimer()
		c.flush()
		b.StartTimer()
	}
}

func BenchmarkClickRecord(b *testing.B) {
	for _, referrer := range []string{"", "news.example.org"} {
		b.Run(fmt.Sprintf("referrer=%q", referrer), func(b *testing.B) {
			c := benchClicks(b, true)
			b.ReportAllocs()
			for i := range b.N {
				c.record(int64(i%2000+1), 1_800_000_000, false, referrer)
				flushNow(b, c, i)
			}
		})
	}
}

// BenchmarkClickFlush is what taking clicks out of the journal costs, per click, up to PostgreSQL.
func BenchmarkClickFlush(b *testing.B) {
	const clicks = 5000
	c := benchClicks(b, true)
	b.ReportAllocs()
	for range b.N {
		b.StopTimer()
		for i := range clicks {
			c.record(int64(i%1640+1), 1_800_000_000, false, "")
		}
		b.StartTimer()
		c.flush()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/clicks, "ns/click")
}

func BenchmarkNewCode(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		newCode()
	}
}

func BenchmarkValidCode(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if !validCode("Ab3xY9z") {
			b.Fatal("invalid")
		}
	}
}

func BenchmarkCheckTarget(b *testing.B) {
	rules := targetRules{ownHost: "hop.example.com"}
	for name, target := range map[string]string{
		"short": "https://docs.example.com/lofty/heron/17",
		"long":  "https://docs.example.com/search?q=" + strings.Repeat("heron+", 300),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := rules.check(target); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// ---- whole redirects ----

// floorHandler is that of bench/floor.
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

// benchServer is a hop that knows targets and has no database.
func benchServer(b *testing.B, targets map[string]target, events bool) *Server {
	cfg, err := loadConfig(func(string) string { return "" })
	if err != nil {
		b.Fatal(err)
	}
	return newServer(cfg, nil, newCache(nil, warmTier(100_000, targets), nil), benchClicks(b, events), quiet)
}

// blank is a ResponseWriter that keeps only the headers.
type blank struct{ header http.Header }

func (w *blank) Header() http.Header         { return w.header }
func (w *blank) Write(p []byte) (int, error) { return len(p), nil }
func (w *blank) WriteHeader(int)             {}

// BenchmarkRedirectHandler is a redirect without net/http's part of it.
func BenchmarkRedirectHandler(b *testing.B) {
	codes, targets := benchCodes(2000)
	var requests []*http.Request
	for _, code := range codes {
		requests = append(requests, httptest.NewRequest("GET", "/"+code, nil))
	}
	run := func(b *testing.B, h http.Handler, c *clickLog) {
		w := &blank{http.Header{}}
		b.ReportAllocs()
		for i := range b.N {
			clear(w.header)
			h.ServeHTTP(w, requests[i%len(requests)])
			if w.header["Location"] == nil {
				b.Fatal("no redirect")
			}
			if c != nil {
				flushNow(b, c, i)
			}
		}
	}
	b.Run("floor", func(b *testing.B) { run(b, floorHandler(targets), nil) })
	b.Run("hop", func(b *testing.B) {
		s := benchServer(b, targets, true)
		run(b, s, s.clicks)
	})
}

// BenchmarkRedirectServed is a redirect with all of net/http, over loopback; the client, in this process too, allocates nothing.
// What hop allocates above the floor is the difference.
func BenchmarkRedirectServed(b *testing.B) {
	codes, targets := benchCodes(2000)
	var requests [][]byte
	for _, code := range codes {
		requests = append(requests, []byte("GET /"+code+" HTTP/1.1\r\nHost: localhost\r\n\r\n"))
	}
	run := func(b *testing.B, h http.Handler, c *clickLog) {
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
			if c != nil {
				flushNow(b, c, i)
			}
		}
		b.StopTimer()
	}
	b.Run("floor", func(b *testing.B) { run(b, floorHandler(targets), nil) })
	b.Run("hop", func(b *testing.B) {
		s := benchServer(b, targets, true)
		run(b, s, s.clicks)
	})
}
