package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// The picture of a link's clicks per day: bars over the last days, drawn as SVG by web/chart.html.
// Across it is measured in percent and down in pixels, so that it fits every screen and its letters
// keep their size.

// What the picture shows, and where in it.
const (
	chartDays    = 90  // the most; more bars than that are thinner than a line on a phone
	minChartDays = 7   // the fewest; one bar alone would be a wall
	chartTop     = 16  // pixels above the bars, for half a letter
	chartHeight  = 160 // pixels of the highest bar at most
	chartLeft    = 11  // percent beside the bars, for the numbers: 36 pixels on a phone
	barWidth     = 0.8 // of a day's place; the rest parts it from the next
	minBar       = 2   // pixels: one click shows even beside a day with millions
	maxRows      = 4   // lines above the ground
	maxColumns   = 4   // days named under the ground; "27 Nov" four times fits a phone
	wideDays     = 8   // up to so many, the last bar is so wide that its day fits in its middle
)

// chart is a picture of clicks per day, ready for its template. Times are UTC days.
type chart struct {
	From, To string // the first and the last day
	Total    int64
	Peak     int64 // the most clicks of one day
	PeakDay  string
	Days     int // between the edges
	Top      int
	Height   int
	Bars     string       // a path, with a day as its unit across and a pixel down
	Rows     []chartLabel // what the heights mean, from the ground up
	Columns  []chartLabel // what the places mean, from today back
	Table    []dayCount   // the same in numbers: days with clicks, newest first
}

// chartLabel is a number or day beside the bars.
type chartLabel struct {
	At     string // pixels from above for a number, percent from the left for a day
	Text   string
	Anchor string // the edge of a day's text that stands at its place
}

// newChart returns the picture of perDay, which names days with clicks, newest first, up to the day
// of now. It begins with the day on which the link was made, if it is recent. It returns nil when
// nobody came on any of its days.
func newChart(perDay []dayCount, created, now time.Time) *chart {
	today := now.UTC().Truncate(day)
	clicks := make([]int64, chartDays) // by how many days ago
	span := max(minChartDays, daysBetween(created.UTC().Truncate(day), today)+1)
	c := &chart{Top: chartTop, Height: chartHeight}
	for _, d := range perDay {
		when, err := time.Parse(time.DateOnly, d.Day)
		ago := daysBetween(when, today)
		if err != nil || ago < 0 || ago >= chartDays {
			continue
		}
		clicks[ago] = d.Clicks
		span = max(span, ago+1)
		c.Table = append(c.Table, d)
		c.Total += d.Clicks
		if d.Clicks > c.Peak {
			c.Peak = d.Clicks
			c.PeakDay = when.Format(dayForm)
		}
	}
	if c.Total == 0 {
		return nil
	}
	c.Days = min(span, chartDays)
	c.From = today.AddDate(0, 0, 1-c.Days).Format(dayForm)
	c.To = today.Format(dayForm)
	step := rowStep(c.Peak)
	top := (c.Peak + step - 1) / step * step
	c.Rows = chartRows(step, top)
	c.Columns = chartColumns(c.Days, today)
	c.Bars = chartBars(clicks[:c.Days], top)
	return c
}

// How the picture writes days: whole in sentences, short under the bars.
const (
	dayForm      = "2 January 2006"
	shortDayForm = "2 Jan"
)

// daysBetween is how many days from is before to. Both are midnights.
func daysBetween(from, to time.Time) int { return int(to.Sub(from) / day) }

// rowStep is the distance of the lines that show a height of peak: 1, 2 or 5 times a power of ten,
// so that at most maxRows lines reach it.
func rowStep(peak int64) int64 {
	for power := int64(1); ; power *= 10 {
		for _, step := range []int64{power, 2 * power, 5 * power} {
			if step*maxRows >= peak {
				return step
			}
		}
	}
}

// chartRows are the lines at 0, step, … and top, where top is as high as the picture.
func chartRows(step, top int64) []chartLabel {
	var rows []chartLabel
	for value := int64(0); value <= top; value += step {
		height := chartHeight * value / top
		rows = append(rows, chartLabel{
			At:   strconv.FormatInt(chartTop+chartHeight-height, 10),
			Text: roundNumber(value),
		})
	}
	return rows
}

// roundNumber writes a round number in little space: 500, 1.5k, 20M.
func roundNumber(n int64) string {
	unit := ""
	value := float64(n)
	switch {
	case n >= 1e6:
		unit = "M"
		value /= 1e6
	case n >= 1e3:
		unit = "k"
		value /= 1e3
	}
	return strconv.FormatFloat(value, 'f', -1, 64) + unit
}

// chartColumns name today and as many days before it as have room, at equal distances of whole days
// or weeks.
func chartColumns(days int, today time.Time) []chartLabel {
	step := 1
	for _, step = range []int{1, 2, 7, 14, 30} {
		if (days-1)/step < maxColumns {
			break
		}
	}
	var columns []chartLabel
	for ago := 0; ago < days; ago += step {
		label := chartLabel{
			At:     "100",
			Text:   today.AddDate(0, 0, -ago).Format(shortDayForm),
			Anchor: "end",
		}
		if ago > 0 || days <= wideDays {
			middle := float64(days-1-ago) + barWidth/2
			label.At = fmt.Sprintf("%.1f", chartLeft+(100-chartLeft)*middle/float64(days))
			label.Anchor = "middle"
		}
		columns = append(columns, label)
	}
	return columns
}

// chartBars is a path with a bar for each day, which clicks names by how many days ago it was. top
// is as high as the picture.
func chartBars(clicks []int64, top int64) string {
	var path strings.Builder
	for ago, n := range clicks {
		if n == 0 {
			continue
		}
		height := max(minBar, chartHeight*float64(n)/float64(top))
		fmt.Fprintf(&path, "M%d %dv-%.1fh%gv%.1fz",
			len(clicks)-1-ago, chartHeight, height, barWidth, height)
	}
	return path.String()
}
