package main

import (
	"cmp"
	_ "embed"
	"fmt"
	"net/http"
	"runtime"
	"time"
)

// How hop and its dependencies are, and what the API is.

// peerHealth is the last known state of a dependency.
type peerHealth struct {
	Status    string  `json:"status"` // up, down, disabled, or read_only
	LatencyMS float64 `json:"latency_ms"`
}

// health is the answer of GET /health.
type health struct {
	Status   string       `json:"status"` // ok, degraded or unavailable
	Ready    bool         `json:"ready"`
	Draining bool         `json:"draining"`
	Postgres peerHealth   `json:"postgres"`
	Redis    peerHealth   `json:"redis"`
	Clicks   clicksHealth `json:"clicks"`

	// StaleSeconds is for how much longer known links are answered from memory, when neither
	// PostgreSQL nor Redis can say what is true. It is left out while PostgreSQL is well.
	StaleSeconds *int `json:"stale_seconds,omitempty"`
}

// clicksHealth is how clicks are kept until they are counted.
type clicksHealth struct {
	Journal string `json:"journal"` // disk, or why a kill would lose clicks
	Pending int64  `json:"pending"`
}

// handleHealth says whether links are served. It answers from memory: probes run by themselves.
func (s *Server) handleHealth(w http.ResponseWriter, _ *http.Request) error {
	h := s.health()
	status := http.StatusOK
	if h.Status == "unavailable" {
		status = http.StatusServiceUnavailable
	}
	return writeJSON(w, status, h)
}

// health is the state of everything, as it was last seen.
func (s *Server) health() health {
	h := health{
		Status:   "ok",
		Ready:    s.ready.Load(),
		Draining: s.draining.Load(),
		Postgres: s.postgresHealth(),
		Redis:    s.redisHealth(),
		Clicks: clicksHealth{
			Journal: cmp.Or(s.clicks.degraded(), "disk"),
			Pending: s.clicks.pendingClicks(),
		},
	}
	left := s.cache.local.staleLeft(time.Now())
	if h.Postgres.Status != "up" {
		h.StaleSeconds = new(int(max(0, left).Seconds()))
	}
	switch {
	case !h.Ready || h.Draining:
		h.Status = "unavailable"
	case h.Postgres.Status == "up" || h.Redis.Status == "up":
	case left > 0:
		h.Status = "degraded"
	default:
		h.Status = "unavailable"
	}
	return h
}

// postgresHealth is how the last probe found PostgreSQL.
func (s *Server) postgresHealth() peerHealth {
	pg := s.store.pg
	if !pg.up() {
		return peerHealth{Status: pg.current().String()}
	}
	return peerHealth{"up", inMilliseconds(pg.latency.Load())}
}

// redisHealth is how the last poll found Redis.
func (s *Server) redisHealth() peerHealth {
	r := s.cache.redis
	switch {
	case r == nil:
		return peerHealth{Status: "disabled"}
	case !r.usable():
		return peerHealth{Status: "down"}
	}
	return peerHealth{"up", inMilliseconds(r.latency.Load())}
}

// inMilliseconds turns nanoseconds into milliseconds with three decimals.
func inMilliseconds(ns int64) float64 { return float64(ns/1000) / 1000 }

// handleLive says that the process runs, whatever else does not: a restart would not help.
func (s *Server) handleLive(w http.ResponseWriter, _ *http.Request) error {
	return writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
}

//go:embed openapi.json
var openAPI []byte

// handleOpenAPI gives out the document that describes the API.
func (s *Server) handleOpenAPI(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	shareAnswer(w.Header())
	_, err := w.Write(openAPI)
	return err
}

// ---- figures for Prometheus ----

// handleMetrics writes all that is counted.
func (s *Server) handleMetrics(w http.ResponseWriter, _ *http.Request) error {
	var m exposition
	s.writeRequests(&m)
	s.writeCache(&m)
	s.writeClicks(&m)
	s.writeDatabase(&m)
	s.writeProcess(&m)
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	shareAnswer(w.Header())
	_, err := w.Write(m.text.Bytes())
	return err
}

// writeRequests writes the histograms of requests.
func (s *Server) writeRequests(m *exposition) {
	const name = "hop_request_duration_seconds"
	m.family(name, "histogram", "Requests answered, by route and status.")
	m.histogram(name, series{redirectRoute, http.StatusFound}, &s.metrics.redirected)
	s.metrics.others.Range(func(key, value any) bool {
		m.histogram(name, key.(series), value.(*histogram))
		return true
	})
	m.gauge("hop_requests_in_flight", "Requests being answered.", s.inflight.n.Load())
}

// writeCache writes how lookups were answered.
func (s *Server) writeCache(m *exposition) {
	c := s.cache
	m.family("hop_cache_hits_total", "counter", "Lookups answered by a cache, by tier.")
	m.sample("hop_cache_hits_total", `{tier="local"}`, c.hits.Load())
	m.sample("hop_cache_hits_total", `{tier="redis"}`, c.redisHits.Load())
	m.sample("hop_cache_hits_total", `{tier="stale"}`, c.stales.Load())
	m.counter("hop_cache_misses_total", "Lookups that asked PostgreSQL.", c.misses.Load())
	m.counter("hop_cache_unknown_total", "Lookups that PostgreSQL knew no link for.",
		c.unknown.Load())
	m.gauge("hop_cache_local_links", "Links in the local tier.", int64(c.local.len()))
}

// writeClicks writes how many clicks were recorded and what became of them.
func (s *Server) writeClicks(m *exposition) {
	recorded, flushed, dropped, pending := s.clicks.counts()
	m.counter("hop_clicks_recorded_total", "Clicks recorded: flushed + pending + dropped.",
		recorded)
	m.counter("hop_clicks_flushed_total", "Clicks counted in PostgreSQL.", flushed)
	m.counter("hop_clicks_dropped_total", "Clicks lost.", dropped)
	m.gauge("hop_clicks_pending", "Clicks not in PostgreSQL yet.", pending)
	m.counter("hop_click_events_dropped_total",
		"Clicks counted without an event row, the journal being full.", s.clicks.rowless.Load())
	m.counter("hop_click_flush_failures_total", "Flushes that failed and are tried again.",
		s.clicks.failures.Load())
	m.counter("hop_click_events_removed_total",
		"Event rows of old clicks that KEEP_CLICKS removed.",
		s.store.removedRows.Load())
	m.gauge("hop_click_journal_degraded", "1 when a kill would lose clicks.",
		asNumber(s.clicks.degraded() != ""))
}

// writeDatabase writes how the dependencies are.
func (s *Server) writeDatabase(m *exposition) {
	redisDown := s.cache.redis != nil && !s.cache.redis.usable()
	m.family("hop_breaker_open", "gauge", "1 while a dependency is not asked.")
	m.sample("hop_breaker_open", `{peer="postgres"}`, asNumber(!s.store.pg.up()))
	m.sample("hop_breaker_open", `{peer="redis"}`, asNumber(redisDown))
	db := s.store.pg.requests.Stats()
	m.gauge("hop_db_connections_open", "Connections in the request pool.",
		int64(db.OpenConnections))
	m.gauge("hop_db_connections_in_use", "Of these, busy.", int64(db.InUse))
	m.counter("hop_db_waits_total", "Requests that waited for a connection.", db.WaitCount)
}

// writeProcess writes what the process is.
func (s *Server) writeProcess(m *exposition) {
	m.gauge("hop_ready", "1 when the service may get requests.",
		asNumber(s.ready.Load() && !s.draining.Load()))
	m.gauge("go_goroutines", "Goroutines.", int64(runtime.NumGoroutine()))
	m.family("hop_build_info", "gauge", "1, with the build as labels.")
	m.sample("hop_build_info", fmt.Sprintf("{version=%q,go=%q}", version(), runtime.Version()), 1)
}
