package main

import (
	"bytes"
	"fmt"
	"net/http"
	"runtime"
	"runtime/debug"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// metrics counts requests for GET /metrics, in Prometheus's text format. Labels are route patterns and statuses, never paths.
type metrics struct {
	series sync.Map                     // seriesKey to *histogram; written once per key, then only read: no lock on the redirect's path
	warm   [2]atomic.Pointer[histogram] // of GET /{code} with 302, 404: 95 % of all lookups
}

type seriesKey struct {
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

// observe counts one request: two atomic adds, no allocation.
func (m *metrics) observe(route string, status int, took time.Duration) {
	var h *histogram
	if status == http.StatusFound && route == "GET /{code}" {
		if h = m.warm[0].Load(); h == nil {
			h = m.histogram(seriesKey{route, status})
			m.warm[0].Store(h)
		}
	} else {
		h = m.histogram(seriesKey{route, status})
	}
	i := 0
	for i < len(buckets) && took.Seconds() > buckets[i] {
		i++
	}
	h.counts[i].Add(1)
	h.ns.Add(int64(took))
}

// histogram returns the series of k.
func (m *metrics) histogram(k seriesKey) *histogram {
	h, ok := m.series.Load(k)
	if !ok {
		h, _ = m.series.LoadOrStore(k, new(histogram))
	}
	return h.(*histogram)
}

// handleMetrics writes all that is counted.
func (s *Server) handleMetrics(w http.ResponseWriter, _ *http.Request) error {
	var b bytes.Buffer
	s.metrics.writeRequests(&b)
	one := func(name, kind, help string, value any) {
		family(&b, name, kind, help)
		fmt.Fprintf(&b, "%s %v\n", name, value)
	}
	flag := func(on bool) int {
		if on {
			return 1
		}
		return 0
	}
	c := s.cache
	family(&b, "hop_cache_hits_total", "counter", "Lookups answered by a cache, by tier.")
	fmt.Fprintf(&b, "hop_cache_hits_total{tier=\"local\"} %d\nhop_cache_hits_total{tier=\"redis\"} %d\nhop_cache_hits_total{tier=\"stale\"} %d\n",
		c.hits.Load(), c.redisHits.Load(), c.stales.Load())
	one("hop_cache_misses_total", "counter", "Lookups that asked PostgreSQL.", c.misses.Load())
	one("hop_cache_sentinels_total", "counter", "Lookups that PostgreSQL answered with not found.", c.sentinels.Load())
	one("hop_cache_local_links", "gauge", "Links in the local tier.", c.local.len())
	recorded, flushed, dropped, pending := s.clicks.counts()
	one("hop_clicks_recorded_total", "counter", "Clicks recorded: flushed + pending + dropped.", recorded)
	one("hop_clicks_flushed_total", "counter", "Clicks counted in PostgreSQL.", flushed)
	one("hop_clicks_dropped_total", "counter", "Clicks lost.", dropped)
	one("hop_clicks_pending", "gauge", "Clicks not in PostgreSQL yet.", pending)
	one("hop_click_events_dropped_total", "counter", "Clicks counted without an event row, the journal being full.", s.clicks.rowless.Load())
	one("hop_click_flush_failures_total", "counter", "Flushes that failed and were or will be tried again.", s.clicks.failures.Load())
	one("hop_click_journal_degraded", "gauge", "1 when a kill would lose clicks.", flag(s.clicks.degraded() != ""))
	family(&b, "hop_breaker_open", "gauge", "1 while a dependency is not asked.")
	fmt.Fprintf(&b, "hop_breaker_open{peer=\"postgres\"} %d\n", flag(s.store.down.Load()))
	if c.redis != nil {
		fmt.Fprintf(&b, "hop_breaker_open{peer=\"redis\"} %d\n", flag(!c.redis.up.Load()))
	}
	db := s.store.db.Stats()
	one("hop_db_connections_open", "gauge", "Connections in the request pool.", db.OpenConnections)
	one("hop_db_connections_in_use", "gauge", "Of these, busy.", db.InUse)
	one("hop_db_waits_total", "counter", "Requests that waited for a connection.", db.WaitCount)
	one("hop_requests_in_flight", "gauge", "Requests being answered.", s.inflight.n.Load())
	one("hop_ready", "gauge", "1 when the service may get requests.", flag(s.ready.Load() && !s.draining.Load()))
	one("go_goroutines", "gauge", "Goroutines.", runtime.NumGoroutine())
	version := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		version = info.Main.Version
	}
	family(&b, "hop_build_info", "gauge", "1, with the build as labels.")
	fmt.Fprintf(&b, "hop_build_info{version=%q,go=%q} 1\n", version, runtime.Version())
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, err := w.Write(b.Bytes())
	return err
}

func family(b *bytes.Buffer, name, kind, help string) {
	fmt.Fprintf(b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// writeRequests writes the request histograms, in a stable order.
func (m *metrics) writeRequests(b *bytes.Buffer) {
	all := map[string]*histogram{}
	m.series.Range(func(k, h any) bool {
		key := k.(seriesKey)
		all[fmt.Sprintf("route=%q,status=\"%d\"", key.route, key.status)] = h.(*histogram)
		return true
	})
	labels := make([]string, 0, len(all))
	for l := range all {
		labels = append(labels, l)
	}
	sort.Strings(labels)
	family(b, "hop_request_duration_seconds", "histogram", "Requests answered, by route and status.")
	for _, l := range labels {
		var n int64
		for i := range all[l].counts {
			n += all[l].counts[i].Load()
			bound := "+Inf"
			if i < len(buckets) {
				bound = strings.TrimSuffix(fmt.Sprint(buckets[i]), ".0")
			}
			fmt.Fprintf(b, "hop_request_duration_seconds_bucket{%s,le=\"%s\"} %d\n", l, bound, n)
		}
		fmt.Fprintf(b, "hop_request_duration_seconds_sum{%s} %g\n", l, float64(all[l].ns.Load())/1e9)
		fmt.Fprintf(b, "hop_request_duration_seconds_count{%s} %d\n", l, n)
	}
}
