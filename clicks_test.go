package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	noon  = int64(20_000*86400 + 43_200) // the tests' clicks happen on day 20,000
	slots = 1 << 15                      // of each half, as many as crash copies
)

// TestClicksCounted records and flushes, and looks at what a flush counts.
func TestClicksCounted(t *testing.T) {
	long := strings.Repeat("a", maxHost) + ".example"
	type click struct {
		id, at   int64
		bot      bool
		referrer string
	}
	tests := []struct {
		name   string
		off    bool // CLICK_EVENTS
		clicks []click
		want   tally
	}{
		{"none", false, nil, tally{}},
		{"people, two links", false, []click{{id: 7, at: noon}, {id: 8, at: noon}, {id: 7, at: noon + 1}},
			tally{links: counts{"7": 2, "8": 1}, days: counts{"7 20000 ": 2, "8 20000 ": 1}, events: counts{"7 ": 2, "8 ": 1}}},
		{"bots apart", false, []click{{id: 7, at: noon, bot: true}, {id: 7, at: noon}, {id: 9, at: noon, bot: true}},
			tally{links: counts{"7": 1}, days: counts{"7 20000 ": 1}, bots: counts{"7 20000 ": 1, "9 20000 ": 1}, events: counts{"7 ": 1}}},
		{"referrers", false, []click{{7, noon, false, "a.example"}, {7, noon, false, "b.example"}, {7, noon, false, ""}, {7, noon, true, "a.example"}},
			tally{links: counts{"7": 3}, days: counts{"7 20000 a.example": 1, "7 20000 b.example": 1, "7 20000 ": 1},
				bots: counts{"7 20000 a.example": 1}, events: counts{"7 a.example": 1, "7 b.example": 1, "7 ": 1}}},
		{"a long referrer is cut", false, []click{{7, noon, false, long}},
			tally{links: counts{"7": 1}, days: counts{"7 20000 " + long[:maxHost]: 1}, events: counts{"7 " + long[:maxHost]: 1}}},
		{"midnight", false, []click{{id: 7, at: 20_001*86400 - 1}, {id: 7, at: 20_001 * 86400}, {id: 7, at: 20_001*86400 + 1}},
			tally{links: counts{"7": 3}, days: counts{"7 20000 ": 1, "7 20001 ": 2}, events: counts{"7 ": 3}}},
		{"events off", true, []click{{id: 7, at: noon}, {id: 7, at: noon, bot: true}},
			tally{links: counts{"7": 1}, days: counts{"7 20000 ": 1}, bots: counts{"7 20000 ": 1}}},
		{"largest id and time", false, []click{{id: 1<<63 - 1, at: 1<<32 - 1}},
			tally{links: counts{fmt.Sprint(int64(1<<63 - 1)): 1}, days: counts{fmt.Sprint(int64(1<<63-1), " 49710 "): 1}, events: counts{fmt.Sprint(int64(1<<63-1), " "): 1}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			books := &ledger{}
			c := testClickLog(t, t.TempDir(), books.save, !tt.off)
			for _, k := range tt.clicks {
				c.record(k.id, k.at, k.bot, k.referrer)
			}
			if n := c.pendingClicks(); n != int64(len(tt.clicks)) {
				t.Errorf("%d clicks pending before the flush, want %d", n, len(tt.clicks))
			}
			flushOK(t, c)
			books.check(t, tt.want)
			flushOK(t, c) // nothing new: nothing may be counted
			books.check(t, tt.want)
			if n := c.pendingClicks(); n != 0 {
				t.Errorf("%d clicks pending after the flush", n)
			}
		})
	}
}

// TestClicksWhenSaveFails loses and doubles nothing while PostgreSQL refuses, and when it counts a batch but the answer is lost.
func TestClicksWhenSaveFails(t *testing.T) {
	books := &ledger{}
	c := testClickLog(t, t.TempDir(), books.save, true)
	want := int64(0)
	for round, answer := range []string{"refuse", "refuse", "lie", "lie", "refuse", "count", "lie", "count"} {
		for range round + 1 {
			c.record(7, noon, false, "")
			want++
		}
		books.answer = answer
		if err := c.flush(); (err == nil) != (answer == "count") {
			t.Errorf("round %d, the save will %s: flush says %v", round, answer, err)
		}
		recorded, flushed, dropped, pending := c.counts()
		if recorded != want || dropped != 0 || flushed+pending != recorded {
			t.Errorf("round %d: %d recorded of %d, %d flushed, %d dropped, %d pending", round, recorded, want, flushed, dropped, pending)
		}
	}
	books.check(t, tally{links: counts{"7": want}, days: counts{"7 20000 ": want}, events: counts{"7 ": want}})
	if n := c.failures.Load(); n != 6 {
		t.Errorf("%d failures noted of 6", n)
	}
}

// TestClicksAfterKill kills the process at every point of a flush (its journal is copied as the kernel would keep it), adopts
// what it left, and counts every click exactly once. Then it goes on, and is killed again before its next flush.
func TestClicksAfterKill(t *testing.T) {
	// Each kill gets a log with 5 clicks in it, and returns the journal left behind and how many clicks were answered till then.
	type kill func(t *testing.T, c *clickLog, books *ledger) (dir string, clicks int64)
	during := func(answer string, more int64, edit func(mem []byte)) kill {
		return func(t *testing.T, c *clickLog, books *ledger) (dir string, clicks int64) {
			books.answer = answer
			books.onSave = func() {
				for range more { // answered while the flush waits for PostgreSQL
					c.record(7, noon, false, "")
				}
				dir = crash(t, c, edit)
			}
			c.flush()
			books.onSave, books.answer = nil, "count"
			return dir, 5 + more
		}
	}
	half := func(mem []byte, h int) []byte { return mem[headerSize+h*halfSlots*slotSize:][:halfSlots*slotSize] }
	tests := []struct {
		name string
		kill kill
	}{
		{"before any flush", func(t *testing.T, c *clickLog, _ *ledger) (string, int64) { return crash(t, c, nil), 5 }},
		{"between swap and state word", func(t *testing.T, c *clickLog, _ *ledger) (string, int64) {
			c.next.Swap(halfBit)
			c.record(7, noon, false, "")
			return crash(t, c, nil), 6
		}},
		{"between swap and state word, in the second half", func(t *testing.T, c *clickLog, _ *ledger) (string, int64) {
			flushOK(t, c)
			c.record(7, noon, false, "")
			c.next.Swap(0)
			c.record(7, noon, false, "")
			return crash(t, c, nil), 7
		}},
		{"before the commit", during("refuse", 0, nil)},
		{"before the commit, clicks going on", during("refuse", 3, nil)},
		{"after the commit, before its answer", during("lie", 0, nil)},
		{"after the commit, clicks going on", during("lie", 3, nil)},
		{"half-way through blanking", during("lie", 3, func(mem []byte) { clear(half(mem, 0)[:2*slotSize]) })},
		{"half-way through blanking a slot", during("lie", 3, func(mem []byte) { clear(half(mem, 0)[:slotSize+8]) })},
		{"half-way through blanking many", func(t *testing.T, c *clickLog, books *ledger) (string, int64) {
			const many = longestGap + 2000
			for range many {
				c.record(7, noon, false, "")
			}
			dir, clicks := during("lie", 3, func(mem []byte) { clear(half(mem, 0)[:(longestGap+1000)*slotSize]) })(t, c, books)
			return dir, clicks + many
		}},
		{"blank, state word still old", during("lie", 3, func(mem []byte) { clear(half(mem, 0)) })},
		{"after a flush", func(t *testing.T, c *clickLog, _ *ledger) (string, int64) { flushOK(t, c); return crash(t, c, nil), 5 }},
		{"after a flush and clicks", func(t *testing.T, c *clickLog, _ *ledger) (string, int64) {
			flushOK(t, c)
			c.record(7, noon, false, "")
			return crash(t, c, nil), 6
		}},
		{"with a click not yet answered", func(t *testing.T, c *clickLog, _ *ledger) (string, int64) {
			c.next.Add(3) // three requests have a slot and have not written it
			c.record(7, noon, false, "")
			return crash(t, c, nil), 6
		}},
		{"with a slot half written", func(t *testing.T, c *clickLog, _ *ledger) (string, int64) {
			v := c.next.Add(1) - 1
			c.halves[0][v*slotSize+8] = 7 // the link's id stands, the header word does not
			c.record(7, noon, false, "")
			return crash(t, c, nil), 6
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			books := &ledger{}
			c := testClickLog(t, t.TempDir(), books.save, true)
			for range 5 {
				c.record(7, noon, false, "")
			}
			dir, clicks := tt.kill(t, c, books)
			for life := range 2 {
				c = testClickLog(t, dir, books.save, true)
				for range life {
					c.record(7, noon, false, "") // before the first flush of this life
					clicks++
				}
				flushOK(t, c)
				books.check(t, tally{links: counts{"7": clicks}, days: counts{"7 20000 ": clicks}, events: counts{"7 ": clicks}})
				if n := c.pendingClicks(); n != 0 {
					t.Errorf("life %d: %d clicks pending after a flush", life, n)
				}
				for h := range c.halves { // what is left there would be counted one day
					if !bytes.Equal(c.halves[h][:slots*slotSize], make([]byte, slots*slotSize)) {
						t.Errorf("life %d: half %d is not blank after a flush", life, h)
					}
				}
				c.record(7, noon, false, "")
				clicks++
				dir = crash(t, c, nil)
			}
		})
	}
}

// TestClicksOfAnotherBoot discards what was written before the machine went down, says so, and starts anew.
func TestClicksOfAnotherBoot(t *testing.T) {
	books, logs := &ledger{}, &syncBuffer{}
	c := testClickLog(t, t.TempDir(), books.save, true)
	flushed := string(c.header[8:24])
	for range 5 {
		c.record(7, noon, false, "")
	}
	dir := crash(t, c, func(mem []byte) { mem[24] ^= 1 })
	c = newClickLog(dir, true, books.save, slog.New(slog.NewTextHandler(logs, nil)))
	t.Cleanup(c.file.close)
	if recorded, flushed, dropped, pending := c.counts(); recorded != 5 || flushed != 0 || dropped != 5 || pending != 0 {
		t.Errorf("%d recorded, %d flushed, %d dropped, %d pending; want 5, 0, 5, 0", recorded, flushed, dropped, pending)
	}
	if !strings.Contains(logs.String(), "another boot") || !strings.Contains(logs.String(), "clicks=5") {
		t.Errorf("the log does not tell: %s", logs)
	}
	if string(c.header[8:24]) == flushed {
		t.Error("the new journal has the old one's id, so its batches would not count")
	}
	c.record(7, noon, false, "")
	flushOK(t, c)
	books.check(t, tally{links: counts{"7": 1}, days: counts{"7 20000 ": 1}, events: counts{"7 ": 1}})
}

// TestClicksOfDeadNeighbours runs several processes on one DATA_DIR: each has a journal of its own, and who comes later counts
// what dead ones left and gives their files back.
func TestClicksOfDeadNeighbours(t *testing.T) {
	books, dir := &ledger{}, t.TempDir()
	open := func() *clickLog { return newClickLog(dir, true, books.save, slog.New(slog.DiscardHandler)) }
	name := func(c *clickLog) string { return filepath.Base(c.file.file.Name()) }
	a, b, c := open(), open(), open()
	if got := []string{name(a), name(b), name(c)}; !reflect.DeepEqual(got, []string{"clicks-0.journal", "clicks-1.journal", "clicks-2.journal"}) {
		t.Fatalf("three processes hold %v", got)
	}
	for range 3 {
		a.record(1, noon, false, "")
		b.record(2, noon, false, "")
	}
	c.record(3, noon, false, "")
	flushOK(t, c)
	books.check(t, tally{links: counts{"3": 1}, days: counts{"3 20000 ": 1}, events: counts{"3 ": 1}}) // a and b live: theirs is theirs
	a.file.close()
	b.file.close()

	d := open()
	defer d.file.close()
	defer c.file.close()
	if name(d) != "clicks-0.journal" || len(d.left) != 1 || name(d.left[0]) != "clicks-1.journal" {
		t.Fatalf("the next process holds %s and %d others", name(d), len(d.left))
	}
	books.answer = "refuse"
	if d.flush() == nil || len(d.left) != 1 {
		t.Error("a failed flush has dropped a dead process's journal")
	}
	books.answer = "count"
	flushOK(t, d)
	want := tally{links: counts{"1": 3, "2": 3, "3": 1}, days: counts{"1 20000 ": 3, "2 20000 ": 3, "3 20000 ": 1}, events: counts{"1 ": 3, "2 ": 3, "3 ": 1}}
	books.check(t, want)
	if recorded, flushed, dropped, pending := d.counts(); recorded != 6 || flushed != 6 || dropped+pending != 0 || len(d.left) != 0 {
		t.Errorf("%d recorded, %d flushed, %d dropped, %d pending, %d journals left; want 6, 6, 0, 0, 0", recorded, flushed, dropped, pending, len(d.left))
	}
	e := open()
	defer e.file.close()
	if name(e) != "clicks-1.journal" {
		t.Errorf("the given-back journal is not used again, but %s", name(e))
	}
	flushOK(t, e)
	books.check(t, want)
}

// TestClicksWhenFull fills both halves while PostgreSQL is away. What comes then loses its event row and nothing else.
func TestClicksWhenFull(t *testing.T) {
	const over = 1000
	for _, events := range []bool{true, false} {
		t.Run(fmt.Sprint("events ", events), func(t *testing.T) {
			books := &ledger{answer: "refuse"}
			c := testClickLog(t, t.TempDir(), books.save, events)
			c.record(7, noon, false, "")
			if c.flush() == nil {
				t.Fatal("the save was to fail")
			}
			for range halfSlots {
				c.record(7, noon, false, "")
			}
			for i := range int64(over) {
				c.record(8, noon+i%2*86400, i%4 == 3, "a.example") // on two days, every fourth a bot
			}
			if c.flush() == nil {
				t.Fatal("the save was to fail")
			}
			if recorded, flushed, dropped, pending := c.counts(); recorded != halfSlots+1+over || pending != recorded || flushed+dropped != 0 {
				t.Errorf("%d recorded, %d flushed, %d dropped, %d pending; want all %d pending", recorded, flushed, dropped, pending, halfSlots+1+over)
			}
			books.answer = "count"
			flushOK(t, c)
			want := tally{links: counts{"7": halfSlots + 1, "8": 750}, days: counts{"7 20000 ": halfSlots + 1, "8 20000 ": 500, "8 20001 ": 250},
				bots: counts{"8 20001 ": 250}}
			rowless := int64(0)
			if events {
				want.events, rowless = counts{"7 ": halfSlots + 1}, 750
			}
			books.check(t, want)
			if got := c.rowless.Load(); got != rowless {
				t.Errorf("%d clicks without their event row, want %d", got, rowless)
			}
			if n := c.pendingClicks(); n != 0 {
				t.Errorf("%d clicks pending", n)
			}
			c.record(8, noon, false, "") // there is room again
			flushOK(t, c)
			if books.link(8) != 751 || c.rowless.Load() != rowless {
				t.Errorf("after the flood: %d clicks on link 8, %d without a row", books.link(8), c.rowless.Load())
			}
		})
	}
}

// TestClicksInMemory counts all the same where no journal can be.
func TestClicksInMemory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"", file, filepath.Join(file, "below")} {
		books, logs := &ledger{}, &syncBuffer{}
		c := newClickLog(dir, true, books.save, slog.New(slog.NewTextHandler(logs, nil)))
		if c.file != nil || !strings.Contains(c.degraded(), "memory only") || !strings.Contains(logs.String(), "no click journal") {
			t.Errorf("DATA_DIR %q: degraded() = %q, log %s", dir, c.degraded(), logs)
		}
		for range 3 {
			c.record(7, noon, false, "")
			flushOK(t, c)
		}
		books.check(t, tally{links: counts{"7": 3}, days: counts{"7 20000 ": 3}, events: counts{"7 ": 3}})
	}
	if c := testClickLog(t, filepath.Join(t.TempDir(), "new", "dir"), (&ledger{}).save, true); c.degraded() != "" {
		t.Errorf("a DATA_DIR that can be made: %s", c.degraded())
	}
}

// TestClicksConcurrently flushes all the time while many record, some flushes failing.
func TestClicksConcurrently(t *testing.T) {
	const people, each = 8, 5000
	books := &ledger{}
	c := testClickLog(t, t.TempDir(), books.save, true)
	var recorders sync.WaitGroup
	for p := range int64(people) {
		recorders.Go(func() {
			for range each {
				c.record(p, noon, false, "")
			}
		})
	}
	done := make(chan struct{})
	go func() { recorders.Wait(); close(done) }()
	for i, running := 0, true; running; i++ {
		books.answer = []string{"count", "lie", "count", "refuse"}[i%4]
		c.flush()
		if _, flushed, dropped, pending := c.counts(); flushed < 0 || dropped != 0 || pending < 0 || flushed > people*each {
			t.Fatalf("%d flushed, %d dropped, %d pending", flushed, dropped, pending)
		}
		select {
		case <-done:
			running = false
		default:
		}
	}
	books.answer = "count"
	flushOK(t, c)
	want := tally{links: counts{}, days: counts{}, events: counts{}}
	for p := range int64(people) {
		want.links[fmt.Sprint(p)], want.days[fmt.Sprint(p, " 20000 ")], want.events[fmt.Sprint(p, " ")] = each, each, each
	}
	books.check(t, want)
	if recorded, flushed, dropped, pending := c.counts(); recorded != people*each || flushed != recorded || dropped+pending != 0 {
		t.Errorf("%d recorded, %d flushed, %d dropped, %d pending; want %d, all flushed", recorded, flushed, dropped, pending, people*each)
	}
}

// TestClicksWaitForWriters flushes while a request has its slot and has not filled it: the flush waits for it.
func TestClicksWaitForWriters(t *testing.T) {
	books := &ledger{}
	c := testClickLog(t, t.TempDir(), books.save, true)
	i := c.next.Add(1) - 1
	flushed := make(chan error, 1)
	go func() { flushed <- c.flush() }()
	eventually(t, 5*time.Second, "the halves are swapped", func() bool { return c.next.Load() == halfBit })
	c.record(8, noon, false, "") // goes into the other half
	slot := c.halves[0][i*slotSize:][:slotSize]
	slot[8] = 7
	wordAt(slot).Store(writtenBit | uint64(noon))
	if err := <-flushed; err != nil {
		t.Fatal(err)
	}
	books.check(t, tally{links: counts{"7": 1}, days: counts{"7 20000 ": 1}, events: counts{"7 ": 1}})
	flushOK(t, c)
	books.check(t, tally{links: counts{"7": 1, "8": 1}, days: counts{"7 20000 ": 1, "8 20000 ": 1}, events: counts{"7 ": 1, "8 ": 1}})
}

// TestClicksRun runs the loop itself: readers see what was recorded before they asked, and the last clicks are counted at the end.
func TestClicksRun(t *testing.T) {
	books := &ledger{}
	c := testClickLog(t, t.TempDir(), books.save, true)
	start := time.Now()
	if err := c.sync(); !errors.Is(err, errUnavailable) || time.Since(start) < answerWithin {
		t.Errorf("nobody flushes, yet sync says %v after %v", err, time.Since(start))
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { c.run(stop); close(stopped) }()
	for i := range int64(20) {
		c.record(7, noon, false, "")
		if err := c.sync(); err != nil || books.link(7) != i+1 {
			t.Fatalf("after %d clicks sync says %v and %d are counted", i+1, err, books.link(7))
		}
	}
	c.record(7, noon, false, "")
	eventually(t, 5*time.Second, "a click is counted without anybody asking", func() bool { return books.link(7) == 21 })

	books.set("refuse")
	c.record(7, noon, false, "")
	if err := c.sync(); !errors.Is(err, errUnavailable) {
		t.Errorf("sync says %v although the save fails", err)
	}
	books.set("count")
	c.record(7, noon, false, "")
	close(stop)
	<-stopped
	if n := books.link(7); n != 23 {
		t.Errorf("%d clicks are counted at the end, want 23", n)
	}
}

// ---- helpers and fakes ----

// testClickLog opens a journal in dir until the test's end.
func testClickLog(t *testing.T, dir string, save func(clickBatch) (bool, error), events bool) *clickLog {
	t.Helper()
	c := newClickLog(dir, events, save, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if c.file == nil {
		t.Fatal("no journal")
	}
	t.Cleanup(c.file.close)
	return c
}

func flushOK(t *testing.T, c *clickLog) {
	t.Helper()
	if err := c.flush(); err != nil {
		t.Fatalf("flush: %v", err)
	}
}

// crash copies c's journal as it is at this moment, which is what a kill would leave, into a new directory; edit may go on
// where the process stopped. Of each half only the first slots are copied.
func crash(t *testing.T, c *clickLog, edit func(mem []byte)) (dir string) {
	t.Helper()
	dir = t.TempDir()
	mem, second := c.file.mem, headerSize+halfSlots*slotSize
	if edit != nil {
		mem = bytes.Clone(mem)
		edit(mem)
	}
	f, err := os.Create(filepath.Join(dir, "clicks-0.journal"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, at := range []int{0, second} { // the rest is a hole
		if _, err := f.WriteAt(mem[at:][:headerSize+slots*slotSize], int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// counts is how many of each.
type counts map[string]int64

// tally is what was counted: people per link; people and bots per "link day referrer"; event rows per "link referrer".
type tally struct{ links, days, bots, events counts }

// ledger is the PostgreSQL of these tests: it counts a batch once, by journal and number, however often it is given.
type ledger struct {
	mu sync.Mutex
	tally
	last   map[string]uint64 // batch number by journal
	answer string            // "refuse": fail and count nothing; "lie": count, but fail; else count
	onSave func()            // called after all that
}

func (l *ledger) save(b clickBatch) (bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.onSave != nil {
		defer l.onSave()
	}
	if l.answer == "refuse" {
		return false, errors.New("refused")
	}
	if l.last == nil {
		l.last, l.tally = map[string]uint64{}, tally{counts{}, counts{}, counts{}, counts{}}
	}
	fresh := b.number > l.last[b.journal]
	if fresh {
		l.last[b.journal] = b.number
		l.add(b)
	}
	if l.answer == "lie" {
		return false, errors.New("the answer to COMMIT is lost")
	}
	return fresh, nil
}

// add counts a batch as Store.saveClicks does.
func (l *ledger) add(b clickBatch) {
	var day, referrer string
	for i, id := range b.ids {
		if i == 0 || id != b.ids[i-1] || b.times[i] != b.times[i-1] || b.referrers[i] != b.referrers[i-1] { // a full half is one link's
			day, referrer = fmt.Sprint(id, " ", b.times[i]/86400, " ", b.referrers[i]), fmt.Sprint(id, " ", b.referrers[i])
		}
		switch b.kinds[i] {
		case byBot:
			l.bots[day] += b.counts[i]
			continue
		case withEvent:
			l.events[referrer] += b.counts[i]
		}
		l.links[strconv.FormatInt(id, 10)] += b.counts[i]
		l.days[day] += b.counts[i]
	}
}

func (l *ledger) set(answer string) { l.mu.Lock(); l.answer = answer; l.mu.Unlock() }

func (l *ledger) link(id int64) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.links[fmt.Sprint(id)]
}

// check compares all that was counted with want, in which nil is nothing.
func (l *ledger) check(t *testing.T, want tally) {
	t.Helper()
	for _, c := range []struct {
		what      string
		got, want counts
	}{{"links", l.links, want.links}, {"days", l.days, want.days}, {"bots", l.bots, want.bots}, {"events", l.events, want.events}} {
		if !maps.Equal(c.got, c.want) {
			t.Errorf("%s: counted %v, want %v", c.what, c.got, c.want)
		}
	}
}
