package main

import (
	"bytes"
	"cmp"
	"fmt"
	"net/http"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// GET /metrics, in Prometheus's text format. Labels are route patterns and statuses, never paths:
// strangers must not be able to make series.

// metrics counts requests and how long they took.
type metrics struct {
	redirected histogram // GET /{code} with 302: 95 % of all requests, found without a lookup
	others     sync.Map  // series to *histogram: written once for each, then read without a lock
}

// series is a route and a status.
type series struct {
	route  string
	status int
}

// redirectRoute is the pattern of almost all requests.
const redirectRoute = "GET /{code}"

// buckets are upper bounds in nanoseconds: a warm redirect takes 10 µs, nothing may take a second.
var buckets = [...]int64{
	100e3, 250e3, 500e3, 1e6, 2500e3, 5e6, 10e6, 25e6, 50e6, 100e6, 250e6, 500e6, 1e9,
}

// histogram counts durations by bucket. The last bucket is for the rest.
type histogram struct {
	counts [len(buckets) + 1]atomic.Int64
	sum    atomic.Int64 // nanoseconds
}

// observe counts one request. Two atomic adds, 10 ns.
func (m *metrics) observe(route string, status int, took time.Duration) {
	h := &m.redirected
	if status != http.StatusFound || route != redirectRoute {
		key := series{route, status}
		found, ok := m.others.Load(key)
		if !ok {
			found, _ = m.others.LoadOrStore(key, new(histogram))
		}
		h = found.(*histogram)
	}
	i := 0
	for i < len(buckets) && int64(took) > buckets[i] {
		i++
	}
	h.counts[i].Add(1)
	h.sum.Add(int64(took))
}

// exposition is text in Prometheus's format.
type exposition struct{ text bytes.Buffer }

// family begins a metric.
func (m *exposition) family(name, kind, help string) {
	fmt.Fprintf(&m.text, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// sample writes one value of the metric that family began. labels is "" or like {peer="redis"}.
func (m *exposition) sample(name, labels string, value int64) {
	fmt.Fprintf(&m.text, "%s%s %d\n", name, labels, value)
}

// counter writes a metric that only grows.
func (m *exposition) counter(name, help string, value int64) {
	m.family(name, "counter", help)
	m.sample(name, "", value)
}

// gauge writes a metric that goes up and down.
func (m *exposition) gauge(name, help string, value int64) {
	m.family(name, "gauge", help)
	m.sample(name, "", value)
}

// asNumber is 1 for true.
func asNumber(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// histogram writes one series of a histogram.
func (m *exposition) histogram(name string, of series, h *histogram) {
	labels := fmt.Sprintf(`route=%q,status="%d"`, of.route, of.status)
	var n int64
	for i := range h.counts {
		n += h.counts[i].Load()
		bound := "+Inf"
		if i < len(buckets) {
			bound = fmt.Sprint(float64(buckets[i]) / 1e9)
		}
		fmt.Fprintf(&m.text, "%s_bucket{%s,le=\"%s\"} %d\n", name, labels, bound, n)
	}
	fmt.Fprintf(&m.text, "%s_sum{%s} %g\n", name, labels, float64(h.sum.Load())/1e9)
	fmt.Fprintf(&m.text, "%s_count{%s} %d\n", name, labels, n)
}

// release is the name of the release, such as v1.2.3. The linker sets it where releases are built:
// -ldflags "-X main.release=v1.2.3".
var release string

// version is the release's name, or else the commit that was built.
func version() string { return cmp.Or(release, commit(), "unknown") }

// commit is the commit that was built, with + at its end if files differed from it; "" where the
// build could not see the repository.
func commit() string {
	build, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	var revision, mark string
	for _, setting := range build.Settings {
		switch {
		case setting.Key == "vcs.revision":
			revision = setting.Value
		case setting.Key == "vcs.modified" && setting.Value == "true":
			mark = "+"
		}
	}
	return revision + mark
}
