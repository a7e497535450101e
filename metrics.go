package main

import (
	"bytes"
	"fmt"
	"net/http"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// metrics counts requests for GET /metrics, in Prometheus's text format. Labels are route patterns and statuses, never paths.
type metrics struct {
	series     sync.Map  // series to *histogram; written once per key, then only read, so without a lock
	redirected histogram // the series of 95 % of all requests, without a lookup
}

type series struct {
	route  string
	status int
}

// buckets are upper bounds in seconds: a warm redirect takes 10 µs, nothing may take a second.
var buckets = [...]float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1}

// histogram counts durations per bucket; the last is for the rest.
type histogram struct {
	counts [len(buckets) + 1]atomic.Int64
	ns     atomic.Int64
}

// observe counts one request: two atomic adds.
func (m *metrics) observe(route string, status int, took time.Duration) {
	h := &m.redirected
	if status != http.StatusFound || route != "GET /{code}" {
		v, ok := m.series.Load(series{route, status})
		if !ok {
			v, _ = m.series.LoadOrStore(series{route, status}, new(histogram))
		}
		h = v.(*histogram)
	}
	i := 0
	for i < len(buckets) && took.Seconds() > buckets[i] {
		i++
	}
	h.counts[i].Add(1)
	h.ns.Add(int64(took))
}

// handleMetrics writes all that is counted.
func (s *Server) handleMetrics(w http.ResponseWriter, _ *http.Request) error {
	var b bytes.Buffer
	s.metrics.write(&b)
	sample := func(name, kind, help string, values ...any) { // one value, or pairs of labels and a value
		family(&b, name, kind, help)
		if len(values) == 1 {
			values = []any{"", values[0]}
		}
		for i := 0; i < len(values); i += 2 {
			if on, is := values[i+1].(bool); is && on {
				values[i+1] = 1
			} else if is {
				values[i+1] = 0
			}
			fmt.Fprintf(&b, "%s%s %v\n", name, values[i], values[i+1])
		}
	}
	c, db := s.cache, s.store.db.Stats()
	recorded, flushed, dropped, pending := s.clicks.counts()
	sample("hop_cache_hits_total", "counter", "Lookups answered by a cache, by tier.",
		`{tier="local"}`, c.hits.Load(), `{tier="redis"}`, c.redisHits.Load(), `{tier="stale"}`, c.stales.Load())
	sample("hop_cache_misses_total", "counter", "Lookups that asked PostgreSQL.", c.misses.Load())
	sample("hop_cache_sentinels_total", "counter", "Lookups that PostgreSQL answered with not found.", c.sentinels.Load())
	sample("hop_cache_local_links", "gauge", "Links in the local tier.", c.local.len())
	sample("hop_clicks_recorded_total", "counter", "Clicks recorded: flushed + pending + dropped.", recorded)
	sample("hop_clicks_flushed_total", "counter", "Clicks counted in PostgreSQL.", flushed)
	sample("hop_clicks_dropped_total", "counter", "Clicks lost.", dropped)
	sample("hop_clicks_pending", "gauge", "Clicks not in PostgreSQL yet.", pending)
	sample("hop_click_events_dropped_total", "counter", "Clicks counted without an event row, the journal being full.", s.clicks.rowless.Load())
	sample("hop_click_flush_failures_total", "counter", "Flushes that failed and are tried again.", s.clicks.failures.Load())
	sample("hop_click_journal_degraded", "gauge", "1 when a kill would lose clicks.", s.clicks.degraded() != "")
	sample("hop_breaker_open", "gauge", "1 while a dependency is not asked.",
		`{peer="postgres"}`, s.store.down.Load(), `{peer="redis"}`, c.redis != nil && !c.redis.up.Load())
	sample("hop_db_connections_open", "gauge", "Connections in the request pool.", db.OpenConnections)
	sample("hop_db_connections_in_use", "gauge", "Of these, busy.", db.InUse)
	sample("hop_db_waits_total", "counter", "Requests that waited for a connection.", db.WaitCount)
	sample("hop_requests_in_flight", "gauge", "Requests being answered.", s.inflight.n.Load())
	sample("hop_ready", "gauge", "1 when the service may get requests.", s.ready.Load() && !s.draining.Load())
	sample("go_goroutines", "gauge", "Goroutines.", runtime.NumGoroutine())
	build, _ := debug.ReadBuildInfo()
	sample("hop_build_info", "gauge", "1, with the build as labels.", fmt.Sprintf("{version=%q,go=%q}", build.Main.Version, runtime.Version()), 1)
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, err := w.Write(b.Bytes())
	return err
}

func family(b *bytes.Buffer, name, kind, help string) {
	fmt.Fprintf(b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// write writes the request histograms.
func (m *metrics) write(b *bytes.Buffer) {
	const name = "hop_request_duration_seconds"
	family(b, name, "histogram", "Requests answered, by route and status.")
	one := func(k, v any) bool {
		labels, h, n := fmt.Sprintf(`route=%q,status="%d"`, k.(series).route, k.(series).status), v.(*histogram), int64(0)
		for i := range h.counts {
			n += h.counts[i].Load()
			bound := "+Inf"
			if i < len(buckets) {
				bound = fmt.Sprint(buckets[i])
			}
			fmt.Fprintf(b, "%s_bucket{%s,le=\"%s\"} %d\n", name, labels, bound, n)
		}
		fmt.Fprintf(b, "%s_sum{%s} %g\n%s_count{%s} %d\n", name, labels, float64(h.ns.Load())/1e9, name, labels, n)
		return true
	}
	one(series{"GET /{code}", http.StatusFound}, &m.redirected)
	m.series.Range(one)
}
