package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// chartNow is the noon at which the pictures of these tests are drawn.
var chartNow = time.Date(2026, time.November, 27, 12, 0, 0, 0, time.UTC)

// clicksPerDay are n clicks on each of the last days before chartNow, newest first.
func clicksPerDay(days int, n int64) []dayCount {
	var all []dayCount
	for ago := range days {
		all = append(all, dayCount{chartNow.AddDate(0, 0, -ago).Format(time.DateOnly), n})
	}
	return all
}

// labelTexts are the texts of labels.
func labelTexts(labels []chartLabel) []string {
	var texts []string
	for _, l := range labels {
		texts = append(texts, l.Text)
	}
	return texts
}

// TestChartDays: the days under the bars, for links of any age.
func TestChartDays(t *testing.T) {
	for _, c := range []struct {
		age     int // days since the link was made
		clicked int // days with clicks
		days    int
		from    string
		columns []string
	}{
		{0, 1, 7, "21 November 2026", []string{"27 Nov", "25 Nov", "23 Nov", "21 Nov"}},
		{6, 7, 7, "21 November 2026", []string{"27 Nov", "25 Nov", "23 Nov", "21 Nov"}},
		{7, 1, 8, "20 November 2026", []string{"27 Nov", "25 Nov", "23 Nov", "21 Nov"}},
		{8, 8, 9, "19 November 2026", []string{"27 Nov", "20 Nov"}},
		{27, 2, 28, "31 October 2026", []string{"27 Nov", "20 Nov", "13 Nov", "6 Nov"}},
		{28, 2, 29, "30 October 2026", []string{"27 Nov", "13 Nov", "30 Oct"}},
		{60, 2, 61, "28 September 2026", []string{"27 Nov", "28 Oct", "28 Sep"}},
		{89, 90, 90, "30 August 2026", []string{"27 Nov", "28 Oct", "28 Sep"}},
		{4000, 400, 90, "30 August 2026", []string{"27 Nov", "28 Oct", "28 Sep"}},
		{0, 30, 30, "29 October 2026", []string{"27 Nov", "13 Nov", "30 Oct"}}, // older than it says
	} {
		created := chartNow.AddDate(0, 0, -c.age)
		got := newChart(clicksPerDay(c.clicked, 3), created, chartNow)
		if got.Days != c.days || got.From != c.from || got.To != "27 November 2026" {
			t.Errorf("age %d: %d days from %s to %s, want %d from %s",
				c.age, got.Days, got.From, got.To, c.days, c.from)
		}
		if texts := labelTexts(got.Columns); !slices.Equal(texts, c.columns) {
			t.Errorf("age %d: days %q, want %q", c.age, texts, c.columns)
		}
		shown := min(c.clicked, chartDays)
		if len(got.Table) != shown || got.Total != int64(3*shown) {
			t.Errorf("age %d: %d rows, %d clicks, want %d", c.age, len(got.Table), got.Total, shown)
		}
	}
}

// TestChartEmpty: without clicks in its days there is no picture.
func TestChartEmpty(t *testing.T) {
	for name, days := range map[string][]dayCount{
		"none":       nil,
		"long ago":   {{"2026-08-29", 5}, {"2020-01-01", 7}},
		"tomorrow":   {{"2026-11-28", 5}},
		"unreadable": {{"", 5}},
	} {
		if c := newChart(days, chartNow.AddDate(-9, 0, 0), chartNow); c != nil {
			t.Errorf("%s: %+v", name, c)
		}
	}
}

// TestChartHeights: the numbers beside the bars, for 1 to 10 million clicks.
func TestChartHeights(t *testing.T) {
	for peak, want := range map[int64]string{
		1:          "0 1",
		2:          "0 1 2",
		3:          "0 1 2 3",
		4:          "0 1 2 3 4",
		5:          "0 2 4 6",
		7:          "0 2 4 6 8",
		10:         "0 5 10",
		11:         "0 5 10 15",
		99:         "0 50 100",
		100:        "0 50 100",
		101:        "0 50 100 150",
		999:        "0 500 1k",
		1_000:      "0 500 1k",
		1_001:      "0 500 1k 1.5k",
		7_777:      "0 2k 4k 6k 8k",
		10_000:     "0 5k 10k",
		123_456:    "0 50k 100k 150k",
		1_000_000:  "0 500k 1M",
		1_234_567:  "0 500k 1M 1.5M",
		9_999_999:  "0 5M 10M",
		10_000_000: "0 5M 10M",
	} {
		days := []dayCount{{"2026-11-27", peak}, {"2026-11-25", 1}}
		c := newChart(days, chartNow, chartNow)
		if got := strings.Join(labelTexts(c.Rows), " "); got != want {
			t.Errorf("%d: %s, want %s", peak, got, want)
		}
		if c.Peak != peak || c.PeakDay != "27 November 2026" {
			t.Errorf("%d: the most are %d on %s", peak, c.Peak, c.PeakDay)
		}
		if ground := c.Rows[0].At; ground != fmt.Sprint(chartTop+chartHeight) {
			t.Errorf("%d: 0 is at %s", peak, ground)
		}
		if top := c.Rows[len(c.Rows)-1].At; top != fmt.Sprint(chartTop) {
			t.Errorf("%d: the highest line is at %s", peak, top)
		}
	}
}

// TestChartBars: each day's bar stands in its place, and the smallest can be seen.
func TestChartBars(t *testing.T) {
	days := []dayCount{{"2026-11-27", 5_000_000}, {"2026-11-24", 1}, {"2026-11-21", 10_000_000}}
	c := newChart(days, chartNow, chartNow)
	want := "M6 160v-80.0h0.8v80.0z" + "M3 160v-2.0h0.8v2.0z" + "M0 160v-160.0h0.8v160.0z"
	if c.Bars != want {
		t.Errorf("%s, want %s", c.Bars, want)
	}
}
