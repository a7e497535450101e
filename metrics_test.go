package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestMetricsAddUp clicks, hangs PostgreSQL, and reads /metrics all the while: every scrape adds
// up, counters never fall, and what the clients know to be recorded is recorded.
func TestMetricsAddUp(t *testing.T) {
	r := newRig(t)
	l := startLoad(t, r.hop.url, full(3000, 500), 50, r.aims, redirects)
	w := &scrapeWatch{url: r.hop.url}
	w.watch(t, time.Second)
	r.pg.pause()
	w.watch(t, 1500*time.Millisecond)
	pending := w.last["hop_clicks_pending"]
	open := w.last[`hop_breaker_open{peer="postgres"}`]
	if pending == 0 || open != 1 {
		t.Errorf("while PostgreSQL hangs: pending %v, breaker %v", pending, open)
	}
	r.pg.resume()
	w.watch(t, time.Second)
	if f := l.figures(whole); f.failed > 0 {
		t.Error(f.failures())
	}
	var clicks float64
	for _, n := range l.answered(302) {
		clicks += float64(n)
	}
	flushClicks(t, r.hop.url)
	m := scrape(t, r.hop.url)
	for name, want := range map[string]float64{
		"hop_clicks_recorded_total": clicks,
		"hop_clicks_flushed_total":  clicks,
		"hop_clicks_pending":        0,
		"hop_clicks_dropped_total":  0,
		`hop_request_duration_seconds_count{route="GET /{code}",status="302"}`: clicks,
	} {
		got, ok := m[name]
		if !ok || got != want {
			t.Errorf("%s is %v after %v clicks, want %v", name, got, clicks, want)
		}
	}
	t.Logf("%d scrapes, %d with clicks pending, %v clicks", w.scrapes, w.pending, clicks)
}

// scrapeWatch reads /metrics over and over and holds each time against the one before.
type scrapeWatch struct {
	url     string
	last    map[string]float64
	scrapes int
	pending int // how many of them saw clicks pending
}

// watch reads for a while.
func (w *scrapeWatch) watch(t *testing.T, d time.Duration) {
	t.Helper()
	end := time.Now().Add(d)
	for time.Now().Before(end) {
		m := scrape(t, w.url)
		w.scrapes++
		if m["hop_clicks_pending"] > 0 {
			w.pending++
		}
		sum := m["hop_clicks_flushed_total"] + m["hop_clicks_dropped_total"] +
			m["hop_clicks_pending"]
		if m["hop_clicks_recorded_total"] != sum || m["hop_clicks_pending"] < 0 {
			t.Errorf("recorded %v, flushed + dropped + pending %v, pending %v",
				m["hop_clicks_recorded_total"], sum, m["hop_clicks_pending"])
		}
		for name, v := range m {
			if isCount(name) && v < w.last[name] {
				t.Errorf("%s fell from %v to %v", name, w.last[name], v)
			}
		}
		w.last = m
	}
}

// isCount says whether a series may only rise.
func isCount(name string) bool {
	return strings.Contains(name, "_total") || strings.Contains(name, "_bucket{") ||
		strings.Contains(name, "_count{")
}

// TestMetricsClickCounts reads the four counts of clicks while several goroutines record and flush,
// also from the middle of a flush: they add up each time, and recorded never falls.
func TestMetricsClickCounts(t *testing.T) {
	const writers = 4
	const each = 5000
	var c *clickLog
	var recordedBefore atomic.Int64
	look := func() {
		before := recordedBefore.Load()
		recorded, flushed, dropped, pending := c.counts()
		if recorded < before || recorded != flushed+dropped+pending || pending < 0 {
			t.Errorf("recorded %d after %d, flushed %d, dropped %d, pending %d",
				recorded, before, flushed, dropped, pending)
		}
		for before < recorded && !recordedBefore.CompareAndSwap(before, recorded) {
			before = recordedBefore.Load()
		}
	}
	save := func(_ context.Context, b clickBatch) (int64, error) {
		look()
		return b.to, nil
	}
	c = newClickLog(t.TempDir(), true, save, slog.New(slog.DiscardHandler))
	t.Cleanup(c.close)
	c.belongsTo("test")
	var recording, others sync.WaitGroup
	var done atomic.Bool
	for w := range writers {
		recording.Go(func() {
			for range each {
				c.record(int64(w+1), 1e9, false, "")
			}
		})
	}
	others.Go(func() {
		for !done.Load() {
			look()
		}
	})
	others.Go(func() {
		for !done.Load() {
			if err := c.flush(t.Context()); err != nil {
				t.Error(err)
			}
		}
	})
	recording.Wait()
	done.Store(true)
	others.Wait()
	if err := c.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	recorded, flushed, dropped, pending := c.counts()
	if recorded != writers*each || flushed != recorded || dropped != 0 || pending != 0 {
		t.Errorf("at the end: recorded %d, flushed %d, dropped %d, pending %d",
			recorded, flushed, dropped, pending)
	}
}

// TestMetricsValid asks for all sorts of paths and reads the exposition strictly: no label holds
// what people sent. PROMCHECK, a command such as `go run .` in scripts/promcheck or `promtool check
// metrics`, gives it to Prometheus's own parser and linter too: make promcheck.
func TestMetricsValid(t *testing.T) {
	a := startApp(t)
	made := do(t, "POST", a.url+"/shorten", `{"url":"https://example.com/secret-target"}`)
	var link struct {
		Code string `json:"short_code"`
	}
	made.json(t, &link)
	paths := []string{
		"/" + link.Code, "/nosuchcode", "/stats/nosuchcode", "/urls/999999", "/urls/not-a-number",
		"/users/424242", "/a/b/c", "//x", "/q%22uo%5Cte", "/%00", "/" + strings.Repeat("x", 200),
		"/events?page=7", "/health", "/metrics", "/openapi.json",
	}
	for _, path := range paths {
		for _, method := range []string{"GET", "HEAD", "DELETE", "BREW"} {
			do(t, method, a.url+path, "")
		}
	}
	text := do(t, "GET", a.url+"/metrics", "")
	contentType := text.header.Get("Content-Type")
	if !strings.HasPrefix(contentType, "text/plain; version=0.0.4") {
		t.Errorf("Content-Type %q", contentType)
	}
	for _, sent := range []string{
		link.Code, "nosuchcode", "secret-target", "999999", "not-a-number", "424242", "/a/b", "xxx",
		"uo", "page=7",
	} {
		if strings.Contains(text.body, sent) {
			t.Errorf("%q is in /metrics", sent)
		}
	}
	// "/" is what no route took, "" what was refused before the routes were asked.
	known := map[string]bool{"/": true, "": true}
	for _, rt := range a.routes() {
		known[rt.pattern] = true
	}
	seen := map[string]bool{}
	for _, m := range routeLabel.FindAllStringSubmatch(text.body, -1) {
		seen[m[1]] = true
		if !known[m[1]] {
			t.Errorf("route %q is no pattern", m[1])
		}
	}
	if !seen["GET /{code}"] || !seen["/"] {
		t.Errorf("routes are missing: %v", slices.Sorted(maps.Keys(seen)))
	}
	for _, problem := range lintMetrics(text.body) {
		t.Error(problem)
	}
	if check := os.Getenv("PROMCHECK"); check != "" {
		cmd := exec.Command("sh", "-c", check)
		cmd.Stdin = strings.NewReader(text.body)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", check, err, out)
		}
		t.Logf("%s: %d bytes, %s", check, len(text.body), out)
	}
}

// TestMetricsLint proves the reader of TestMetricsValid: each of these is wrong.
func TestMetricsLint(t *testing.T) {
	const gauge = "# HELP a A.\n# TYPE a gauge\n"
	const histogram = "# HELP h H.\n# TYPE h histogram\n"
	for _, text := range []string{
		"a_total 1\n",
		gauge + "a 1",
		gauge + "a one\n",
		gauge + "a 1\na 2\n",
		"# HELP a A.\n# TYPE a counter\na 1\n",
		"# HELP a_total A.\n# TYPE a_total counter\na_total -1\n",
		gauge + "a{b=\"c} 1\n",
		gauge + "a 1\n# HELP b B.\n# TYPE b gauge\nb 1\na{c=\"d\"} 1\n",
		histogram + "h_bucket{le=\"1\"} 2\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n",
		histogram + "h_bucket{le=\"1\"} 1\nh_sum 1\nh_count 1\n",
		histogram + "h_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 2\n",
	} {
		if len(lintMetrics(text)) == 0 {
			t.Errorf("passes: %q", text)
		}
	}
	if problems := lintMetrics(gauge + "a 1\n"); len(problems) > 0 {
		t.Errorf("does not pass: %v", problems)
	}
}

// Lines of the text format.
var (
	sampleLine = regexp.MustCompile(`^([a-zA-Z_:][a-zA-Z0-9_:]*)` +
		`(?:\{((?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)$`)
	routeLabel = regexp.MustCompile(`route="([^"]*)"`)
)

// metricsLinter reads an exposition line by line.
type metricsLinter struct {
	problems []string
	current  string                 // the family of the last HELP
	helped   map[string]bool        // families with a HELP
	kinds    map[string]string      // TYPE of each family
	seen     map[string]bool        // samples, with their labels
	buckets  map[string]bucketSoFar // of each histogram, by family and other labels
}

// bucketSoFar is the last bucket of a histogram that was read.
type bucketSoFar struct{ bound, count float64 }

// lintMetrics reads an exposition in the text format and returns what is wrong with it.
func lintMetrics(text string) []string {
	l := &metricsLinter{
		helped:  map[string]bool{},
		kinds:   map[string]string{},
		seen:    map[string]bool{},
		buckets: map[string]bucketSoFar{},
	}
	if !strings.HasSuffix(text, "\n") {
		l.bad(text[max(0, len(text)-20):], "no line end")
	}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		help, isHelp := strings.CutPrefix(line, "# HELP ")
		kind, isType := strings.CutPrefix(line, "# TYPE ")
		switch {
		case isHelp:
			l.help(line, help)
		case isType:
			l.kind(line, kind)
		default:
			l.sample(line)
		}
	}
	return l.problems
}

// bad notes a problem.
func (l *metricsLinter) bad(line, why string) {
	l.problems = append(l.problems, fmt.Sprintf("%q: %s", line, why))
}

// help reads what follows "# HELP ".
func (l *metricsLinter) help(line, rest string) {
	name, text, _ := strings.Cut(rest, " ")
	if l.helped[name] || text == "" {
		l.bad(line, "a second or empty HELP")
	}
	l.helped[name] = true
	l.current = name
}

// kind reads what follows "# TYPE ".
func (l *metricsLinter) kind(line, rest string) {
	name, kind, _ := strings.Cut(rest, " ")
	known := slices.Contains([]string{"counter", "gauge", "histogram"}, kind)
	if l.kinds[name] != "" || name != l.current || !known {
		l.bad(line, "TYPE")
	}
	if (kind == "counter") != strings.HasSuffix(name, "_total") {
		l.bad(line, "counters end in _total, others do not")
	}
	l.kinds[name] = kind
}

// sample reads a value.
func (l *metricsLinter) sample(line string) {
	m := sampleLine.FindStringSubmatch(line)
	if m == nil {
		l.bad(line, "no sample")
		return
	}
	name, labels := m[1], m[2]
	v, err := strconv.ParseFloat(m[3], 64)
	family := name
	if l.kinds[l.current] == "histogram" {
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			family = strings.TrimSuffix(family, suffix)
		}
	}
	switch {
	case err != nil || math.IsNaN(v):
		l.bad(line, "no number")
	case family != l.current || l.kinds[family] == "":
		l.bad(line, "not below its HELP and TYPE")
	case l.seen[name+labels]:
		l.bad(line, "twice")
	case l.kinds[family] != "gauge" && v < 0:
		l.bad(line, "a negative count")
	}
	l.seen[name+labels] = true
	if l.kinds[family] == "histogram" {
		l.histogram(line, family, strings.TrimPrefix(name, family), labels, v)
	}
}

// histogram reads one sample of a histogram; part is _bucket, _sum or _count.
func (l *metricsLinter) histogram(line, family, part, labels string, v float64) {
	others, bound, _ := strings.Cut(labels, `le="`)
	key := family + strings.TrimSuffix(others, ",")
	last, known := l.buckets[key]
	switch part {
	case "_bucket":
		le, err := strconv.ParseFloat(strings.TrimSuffix(bound, `"`), 64)
		if err != nil || known && (le <= last.bound || v < last.count) {
			l.bad(line, "buckets must rise")
		}
		l.buckets[key] = bucketSoFar{le, v}
	case "_count":
		if !known || !math.IsInf(last.bound, 1) || last.count != v {
			l.bad(line, "the last bucket is +Inf and the count")
		}
	}
}
