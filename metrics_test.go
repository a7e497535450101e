package main

import (
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestMetricsAddUp clicks, hangs PostgreSQL, and reads /metrics all the while: every scrape adds up, counters never fall, and
// what the clients know to be recorded is recorded.
func TestMetricsAddUp(t *testing.T) {
	r := newRig(t)
	l := startLoad(t, r.hop.url, full(3000, 500), 50, r.aims, redirects)
	var scrapes, pendingSeen int
	last := map[string]float64{}
	look := func(d time.Duration) {
		for end := time.Now().Add(d); time.Now().Before(end); scrapes++ {
			m := scrape(t, r.hop.url)
			recorded, flushed, dropped, pending := m["hop_clicks_recorded_total"], m["hop_clicks_flushed_total"], m["hop_clicks_dropped_total"], m["hop_clicks_pending"]
			if recorded != flushed+dropped+pending || pending < 0 {
				t.Errorf("recorded %v, flushed %v, dropped %v, pending %v", recorded, flushed, dropped, pending)
			}
			if pending > 0 {
				pendingSeen++
			}
			for name, v := range m {
				if counts := strings.Contains(name, "_total") || strings.Contains(name, "_bucket{") || strings.Contains(name, "_count{"); counts && v < last[name] {
					t.Errorf("%s fell from %v to %v", name, last[name], v)
				}
			}
			last = m
		}
	}
	look(time.Second)
	hangProcess(t, r.pg)
	look(1500 * time.Millisecond)
	if last["hop_clicks_pending"] == 0 || last[`hop_breaker_open{peer="postgres"}`] != 1 {
		t.Errorf("while PostgreSQL hangs: pending %v, breaker %v", last["hop_clicks_pending"], last[`hop_breaker_open{peer="postgres"}`])
	}
	r.pg.resume(t)
	look(time.Second)
	if f := l.figures(whole); f.failed > 0 {
		t.Error(f.failures())
	}
	var clicks int64
	for _, n := range l.count(302) {
		clicks += n
	}
	askStats(t, r.hop.url)
	m := scrape(t, r.hop.url)
	if want := float64(clicks); m["hop_clicks_recorded_total"] != want || m["hop_clicks_flushed_total"] != want || m["hop_clicks_pending"] != 0 ||
		m[`hop_request_duration_seconds_count{route="GET /{code}",status="302"}`] != want {
		t.Errorf("%d clicks, but %v", clicks, m)
	}
	t.Logf("%d scrapes, %d with clicks pending, %d clicks", scrapes, pendingSeen, clicks)
}

// TestMetricsRecordedNeverFalls looks in the middle of a swap of the journal's halves, which waits for a writer.
func TestMetricsRecordedNeverFalls(t *testing.T) {
	c := newClickLog(t.TempDir(), true, func(clickBatch) (bool, error) { return true, nil }, slog.New(slog.NewTextHandler(io.Discard, nil)))
	for range 10 {
		c.record(1, 1e9, false, "")
	}
	slow := c.next.Add(1) - 1 // has its slot and has not written it
	before, _, _, _ := c.counts()
	flushed := make(chan error)
	go func() { flushed <- c.flush() }()
	eventually(t, 5*time.Second, "the halves are swapped", func() bool { return c.next.Load()&halfBit != slow&halfBit })
	if recorded, flushed, dropped, pending := c.counts(); recorded != before || pending != 11 || flushed+dropped != 0 {
		t.Errorf("in the swap: recorded %d after %d, flushed %d, dropped %d, pending %d", recorded, before, flushed, dropped, pending)
	}
	wordAt(c.halves[0][slow*slotSize:]).Store(writtenBit | 1_000_000_000)
	if err := <-flushed; err != nil {
		t.Fatal(err)
	}
	if recorded, flushed, _, pending := c.counts(); recorded != 11 || flushed != 11 || pending != 0 {
		t.Errorf("after it: recorded %d, flushed %d, pending %d", recorded, flushed, pending)
	}
}

// TestMetricsValid asks for all sorts of paths and reads the exposition strictly. PROMCHECK, a command such as `go run .` in
// scripts/promcheck or `promtool check metrics`, gives it to Prometheus's own parser and linter too: make promcheck.
func TestMetricsValid(t *testing.T) {
	a := startApp(t)
	made := do(t, "POST", a.url+"/shorten", `{"url":"https://example.com/secret-target"}`)
	var link struct{ Short_Code string }
	made.json(t, &link)
	for _, path := range []string{"/" + link.Short_Code, "/nosuchcode", "/stats/nosuchcode", "/urls/999999", "/urls/not-a-number", "/users/424242",
		"/a/b/c", "//x", `/q"uo\te`, "/%00", "/" + strings.Repeat("x", 200), "/events?page=7", "/health", "/metrics", "/openapi.yaml"} {
		for _, method := range []string{"GET", "HEAD", "DELETE", "BREW"} {
			do(t, method, a.url+strings.ReplaceAll(strings.ReplaceAll(path, `"`, "%22"), `\`, "%5C"), "")
		}
	}
	text := do(t, "GET", a.url+"/metrics", "")
	if got := text.header.Get("Content-Type"); !strings.HasPrefix(got, "text/plain; version=0.0.4") {
		t.Errorf("Content-Type %q", got)
	}
	for _, path := range []string{link.Short_Code, "nosuchcode", "secret-target", "999999", "not-a-number", "424242", "/a/b", "xxx", "uo", "page=7"} {
		if strings.Contains(text.body, path) {
			t.Errorf("%q is in /metrics", path)
		}
	}
	routes := map[string]bool{"none": true, "": true} // what the mux did not know, what was refused before it was asked
	for _, rt := range a.routes() {
		routes[rt.pattern] = true
	}
	seen := map[string]bool{}
	for _, m := range regexp.MustCompile(`route="([^"]*)"`).FindAllStringSubmatch(text.body, -1) {
		seen[m[1]] = true
		if !routes[m[1]] {
			t.Errorf("route %q is no pattern", m[1])
		}
	}
	if !seen["GET /{code}"] || !seen["none"] {
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
	for _, text := range []string{
		"a_total 1\n",
		"# HELP a A.\n# TYPE a gauge\na 1",
		"# HELP a A.\n# TYPE a gauge\na one\n",
		"# HELP a A.\n# TYPE a gauge\na 1\na 2\n",
		"# HELP a A.\n# TYPE a counter\na 1\n",
		"# HELP a_total A.\n# TYPE a_total counter\na_total -1\n",
		"# HELP a A.\n# TYPE a gauge\na{b=\"c} 1\n",
		"# HELP a A.\n# TYPE a gauge\na 1\n# HELP b B.\n# TYPE b gauge\nb 1\na{c=\"d\"} 1\n",
		"# HELP h H.\n# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n",
		"# HELP h H.\n# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_sum 1\nh_count 1\n",
		"# HELP h H.\n# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 2\n",
	} {
		if len(lintMetrics(text)) == 0 {
			t.Errorf("passes: %q", text)
		}
	}
}

var sampleLine = regexp.MustCompile(`^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)$`)

// lintMetrics reads an exposition in the text format and returns what is wrong with it.
func lintMetrics(text string) (problems []string) {
	bad := func(line, why string) { problems = append(problems, fmt.Sprintf("%q: %s", line, why)) }
	if !strings.HasSuffix(text, "\n") {
		bad(text[max(0, len(text)-20):], "no line end")
	}
	helps, kinds, seen, buckets := map[string]bool{}, map[string]string{}, map[string]bool{}, map[string][2]float64{}
	current := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if name, ok := strings.CutPrefix(line, "# HELP "); ok {
			name, help, _ := strings.Cut(name, " ")
			if helps[name] || help == "" {
				bad(line, "a second or empty HELP")
			}
			helps[name], current = true, name
			continue
		}
		if name, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, kind, _ := strings.Cut(name, " ")
			if kinds[name] != "" || name != current || !slices.Contains([]string{"counter", "gauge", "histogram"}, kind) {
				bad(line, "TYPE")
			}
			if kind == "counter" != strings.HasSuffix(name, "_total") {
				bad(line, "counters end in _total, others do not")
			}
			kinds[name] = kind
			continue
		}
		m := sampleLine.FindStringSubmatch(line)
		if m == nil {
			bad(line, "no sample")
			continue
		}
		name, labels := m[1], m[2]
		v, err := strconv.ParseFloat(m[3], 64)
		family := name
		if kinds[current] == "histogram" {
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				family = strings.TrimSuffix(family, suffix)
			}
		}
		switch {
		case err != nil || math.IsNaN(v):
			bad(line, "no number")
		case family != current || kinds[family] == "":
			bad(line, "not below its HELP and TYPE")
		case seen[name+labels]:
			bad(line, "twice")
		case kinds[family] != "gauge" && v < 0:
			bad(line, "a negative count")
		}
		seen[name+labels] = true
		if kinds[family] != "histogram" {
			continue
		}
		rest, bound, _ := strings.Cut(labels, `le="`)
		key := family + strings.TrimSuffix(rest, ",")
		state, known := buckets[key] // the last bound and its count
		switch strings.TrimPrefix(name, family) {
		case "_bucket":
			le, err := strconv.ParseFloat(strings.TrimSuffix(bound, `"`), 64)
			if err != nil || known && (le <= state[0] || v < state[1]) {
				bad(line, "buckets must rise")
			}
			buckets[key] = [2]float64{le, v}
		case "_count":
			if !known || !math.IsInf(state[0], 1) || state[1] != v {
				bad(line, "the last bucket is +Inf and the count")
			}
		}
	}
	return problems
}
