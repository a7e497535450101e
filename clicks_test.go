package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// noon is when the tests' clicks happen: in the middle of day 20,000.
const noon = 20_000*secondsPerDay + secondsPerDay/2

// TestClicksCounted records clicks of all kinds and looks at what a flush counts.
func TestClicksCounted(t *testing.T) {
	long := strings.Repeat("a", maxHost) + ".example"
	tests := []struct {
		name   string
		clicks []clickSum // each recorded count times
		want   []clickSum // what is counted, if it is not the same
	}{
		{name: "none"},
		{name: "people, two links", clicks: []clickSum{
			{linkID: 7, second: noon, count: 2},
			{linkID: 7, second: noon + 1, count: 1},
			{linkID: 8, second: noon, count: 1},
		}},
		{name: "bots apart", clicks: []clickSum{
			{linkID: 7, second: noon, count: 1},
			{linkID: 7, second: noon, count: 3, bot: true},
		}},
		{name: "referrers", clicks: []clickSum{
			{linkID: 7, second: noon, count: 1},
			{linkID: 7, second: noon, count: 2, referrer: "a.example"},
			{linkID: 7, second: noon, count: 1, referrer: "b.example:8080"},
			{linkID: 7, second: noon, count: 1, referrer: "a.example", bot: true},
		}},
		{name: "a long referrer is cut",
			clicks: []clickSum{{linkID: 7, second: noon, count: 1, referrer: long}},
			want:   []clickSum{{linkID: 7, second: noon, count: 1, referrer: long[:maxHost]}},
		},
		{name: "a short referrer where a long one was", clicks: []clickSum{
			{linkID: 7, second: noon, count: 1, referrer: "b.example"},
			{linkID: 7, second: noon, count: 1, referrer: "a-longer.example"},
		}},
		{name: "the ends of time and of ids", clicks: []clickSum{
			{linkID: 1, second: firstSecond, count: 1},
			{linkID: math.MaxInt64, second: lastSecond, count: 1},
		}},
		{name: "a clock that was never set",
			clicks: []clickSum{{linkID: 1, second: 12, count: 1}},
			want:   []clickSum{{linkID: 1, second: firstSecond, count: 1}},
		},
	}
	for _, tt := range tests {
		for _, events := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, events %v", tt.name, events), func(t *testing.T) {
				books := newLedger()
				c := newClickLog(t.TempDir(), events, books.save, testLog(t))
				t.Cleanup(c.close)
				want := tt.want
				if want == nil {
					want = tt.clicks
				}
				var total int64
				for _, click := range slices.Backward(tt.clicks) {
					recordSum(c, click)
					total += click.count
				}
				checkCounts(t, c, total, 0, 0)
				flushOK(t, c)
				flushOK(t, c) // counts nothing more
				books.check(t, events, want)
				checkCounts(t, c, total, total, 0)
			})
		}
	}
}

// TestClicksAfterKill kills a process at each point of a flush and of a click. What it left is
// counted exactly once by the next, which is killed before it notes so, and by the one after it.
func TestClicksAfterKill(t *testing.T) {
	// killed gets a log of 5 clicks and returns the DATA_DIR that is left. clicks is how many there
	// are in all.
	tests := []struct {
		name   string
		killed func(t *testing.T, c *clickLog, books *ledger) string
		clicks int64
	}{
		{"before any flush", func(t *testing.T, c *clickLog, _ *ledger) string {
			return crash(t, c)
		}, 5},
		{"after a flush", func(t *testing.T, c *clickLog, _ *ledger) string {
			flushOK(t, c)
			return crash(t, c)
		}, 5},
		{"after a flush and a click", func(t *testing.T, c *clickLog, _ *ledger) string {
			flushOK(t, c)
			recordN(c, 7, 1)
			return crash(t, c)
		}, 6},
		{"while PostgreSQL refuses", func(t *testing.T, c *clickLog, books *ledger) string {
			books.answers(refuse)
			flushFails(t, c)
			recordN(c, 7, 3)
			return crash(t, c)
		}, 8},
		{"after the commit, before its answer", func(t *testing.T, c *clickLog,
			books *ledger) string {

			books.answers(lie)
			flushFails(t, c)
			return crash(t, c)
		}, 5},
		{"after the commit, and clicks", func(t *testing.T, c *clickLog, books *ledger) string {
			books.answers(lie)
			flushFails(t, c)
			recordN(c, 7, 3)
			return crash(t, c)
		}, 8},
		{"before the commit that lands after all", func(t *testing.T, c *clickLog,
			books *ledger) string {

			batch, _, err := c.takeBatch(c.own, c.next)
			if err != nil {
				t.Fatal(err)
			}
			recordN(c, 7, 3)
			dir := crash(t, c)
			books.count(batch)
			return dir
		}, 8},
		{"half-way through a click", func(t *testing.T, c *clickLog, _ *ledger) string {
			recordN(c, 7, 1)
			numberOf(c.own.mem[slotOffset(6):]).Store(0) // all but the number stands
			return crash(t, c)
		}, 5},
		{"half-way through a click over an old one", func(t *testing.T, c *clickLog,
			_ *ledger) string {

			recordN(c, 7, 1)
			numberOf(c.own.mem[slotOffset(6):]).Store(6 + journalSlots)
			return crash(t, c)
		}, 5},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			books := newLedger()
			c := testClickLog(t, t.TempDir(), books)
			recordN(c, 7, 5)
			dir := tt.killed(t, c, books)
			books.answers(count)

			second := testClickLog(t, dir, books)
			recordN(second, 8, 2)
			flushOK(t, second)
			third := testClickLog(t, crashAgain(t, dir, second), books)
			flushOK(t, third)
			books.check(t, true, []clickSum{
				{linkID: 7, second: noon, count: tt.clicks},
				{linkID: 8, second: noon, count: 2},
			})
			if left := journals(t, dir); len(left) != 1 {
				t.Errorf("%v are left of the dead process's and the living one's journal", left)
			}
		})
	}
}

// TestClicksExactlyOnce records, flushes, kills and copies at random, while PostgreSQL refuses,
// counts and says nothing, or answers. Every click is counted once.
func TestClicksExactlyOnce(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 1))
			books := newLedger()
			dir := t.TempDir()
			logs := []*clickLog{testClickLog(t, dir, books), testClickLog(t, dir, books)}
			want := map[int64]int64{}
			for range 200 {
				i := random.IntN(len(logs))
				c := logs[i]
				c.adopted = time.Time{} // look for dead processes in every flush
				switch random.IntN(10) {
				case 0: // killed, and started again
					c.own.close()
					logs[i] = testClickLog(t, dir, books)
				case 1: // its file is copied, and the copy is counted elsewhere too
					twin := testClickLog(t, crash(t, c), books)
					books.answers(random.IntN(3))
					twin.flush(context.Background())
				case 2: // ended
					books.answers(count)
					flushOK(t, c)
					c.close()
					logs[i] = testClickLog(t, dir, books)
				case 3, 4, 5:
					books.answers(random.IntN(3))
					c.batchSize = 1 + random.Int64N(9)
					c.flush(context.Background())
				default:
					link := 1 + random.Int64N(5)
					n := random.IntN(20)
					recordN(c, link, n)
					want[link] += int64(n)
				}
			}
			books.answers(count)
			for _, c := range logs {
				for c.adopted = (time.Time{}); c.adopted.IsZero(); {
					flushOK(t, c)
				}
				checkCounts(t, c, -1, -1, 0)
			}
			var sums []clickSum
			for link, n := range want {
				sums = append(sums, clickSum{linkID: link, second: noon, count: n})
			}
			books.check(t, true, sums)
		})
	}
}

// TestClicksOfTwins runs two processes on copies of one DATA_DIR, as a cloned volume gives them.
func TestClicksOfTwins(t *testing.T) {
	for _, uncounted := range []int{0, 5} {
		t.Run(fmt.Sprint(uncounted, " clicks copied"), func(t *testing.T) {
			books := newLedger()
			c := testClickLog(t, t.TempDir(), books)
			recordN(c, 7, 3)
			flushOK(t, c)
			recordN(c, 7, uncounted)
			twins := []*clickLog{
				c,
				testClickLog(t, crash(t, c), books),
				testClickLog(t, crash(t, c), books),
			}
			for i, c := range twins { // each goes on with the same number of clicks
				recordN(c, 8+int64(i), 4)
			}
			for _, i := range []int{1, 0, 2, 0, 1} {
				flushOK(t, twins[i])
			}
			want := []clickSum{
				{linkID: 7, second: noon, count: int64(3 + uncounted)},
				{linkID: 8, second: noon, count: 4},
				{linkID: 9, second: noon, count: 4},
				{linkID: 10, second: noon, count: 4},
			}
			books.check(t, true, want)
		})
	}
}

// TestClicksUnderNewID lets PostgreSQL stand where the journal never was. Its clicks are counted
// all the same, once, and the log says so.
func TestClicksUnderNewID(t *testing.T) {
	tests := []struct {
		name     string
		position int64 // of 11 clicks the first 4 are counted: the journal is at 5
	}{
		{"a restored database", 3},
		{"a machine started twice from one snapshot", 20},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			books := newLedger()
			logs := &syncBuffer{}
			log := slog.New(slog.NewTextHandler(logs, nil))
			c := newClickLog(t.TempDir(), true, books.save, log)
			t.Cleanup(c.close)
			recordN(c, 7, 4)
			flushOK(t, c)
			recordN(c, 7, 7)
			old := c.own.id
			books.positions[old] = tt.position
			flushFails(t, c)
			if c.own.id == old || !strings.Contains(logs.String(), "level=ERROR") {
				t.Errorf("the id is %s after %s; logged: %s", c.own.id, old, logs)
			}
			next := testClickLog(t, crash(t, c), books)
			next.flush(context.Background())
			flushOK(t, c)
			books.check(t, true, []clickSum{{linkID: 7, second: noon, count: 11}})
		})
	}
}

// TestClicksOfAnotherDatabase never counts what belongs to another database.
func TestClicksOfAnotherDatabase(t *testing.T) {
	mine, theirs, dir := newLedger(), newLedger(), t.TempDir()
	logs := &syncBuffer{}
	open := func(books *ledger, database string) *clickLog {
		c := newClickLog(dir, true, books.save, slog.New(slog.NewTextHandler(logs, nil)))
		t.Cleanup(c.close)
		if database != "" {
			c.belongsTo(database)
		}
		return c
	}
	dead := open(theirs, "THEIRS")
	flushOK(t, dead)
	recordN(dead, 7, 5)
	dead.own.close()

	c := open(mine, "")
	recordN(c, 8, 1)
	flushOK(t, c) // whose database it is, is not known yet
	c.belongsTo("MINE")
	for range 3 {
		c.adopted = time.Time{}
		flushOK(t, c)
	}
	mine.check(t, true, []clickSum{{linkID: 8, second: noon, count: 1}})
	if n := strings.Count(logs.String(), "belongs to another database"); n != 1 {
		t.Errorf("said %d times that a journal is another's: %s", n, logs)
	}

	c.belongsTo("THEIRS") // DATABASE_URL leads elsewhere now
	recordN(c, 8, 1)
	flushFails(t, c)
	c.belongsTo("MINE")
	flushOK(t, c)
	mine.check(t, true, []clickSum{{linkID: 8, second: noon, count: 2}})

	flushOK(t, open(theirs, "THEIRS"))
	theirs.check(t, true, []clickSum{{linkID: 7, second: noon, count: 5}})
}

// TestClicksOfDeadNeighbours runs several processes on one DATA_DIR. Each has a journal, and a
// living one counts what a dead one left, after its start too, and removes it.
func TestClicksOfDeadNeighbours(t *testing.T) {
	books, dir := newLedger(), t.TempDir()
	a, b := testClickLog(t, dir, books), testClickLog(t, dir, books)
	if got := journals(t, dir); !slices.Equal(got, []string{"clicks-0.ring", "clicks-1.ring"}) {
		t.Fatalf("two processes hold %v", got)
	}
	recordN(a, 7, 3)
	recordN(b, 8, 4)
	flushOK(t, b) // it looks, but a lives
	books.check(t, true, []clickSum{{linkID: 8, second: noon, count: 4}})
	a.own.close()
	flushOK(t, b) // it does not look again so soon
	books.check(t, true, []clickSum{{linkID: 8, second: noon, count: 4}})
	b.adopted = b.adopted.Add(-adoptEvery)
	books.answers(refuse)
	flushFails(t, b)
	books.answers(count)
	flushOK(t, b) // a look that failed is repeated at once
	books.check(t, true, []clickSum{
		{linkID: 7, second: noon, count: 3},
		{linkID: 8, second: noon, count: 4},
	})
	checkCounts(t, b, 7, 7, 0)
	if got := journals(t, dir); !slices.Equal(got, []string{"clicks-1.ring"}) {
		t.Errorf("%v are left, want the living process's", got)
	}
	b.close()
	if got := journals(t, dir); len(got) != 0 {
		t.Errorf("%v are left, and all is counted", got)
	}
}

// TestClicksOfTheDeadInTurn counts a large journal that a dead process left: a batch in each flush,
// so that nobody who asks for figures waits for all of it.
func TestClicksOfTheDeadInTurn(t *testing.T) {
	books := newLedger()
	dead := testClickLog(t, t.TempDir(), books)
	const left = 2*maxBatch + 5
	recordN(dead, 7, left)
	dir := crash(t, dead)
	c := testClickLog(t, dir, books)
	for _, counted := range []int64{maxBatch, 2 * maxBatch, left} {
		flushOK(t, c)
		books.check(t, true, []clickSum{{linkID: 7, second: noon, count: counted}})
		if c.moreLeft != (counted < left) {
			t.Errorf("after %d of %d clicks, more are left: %v", counted, left, c.moreLeft)
		}
	}
	if got := journals(t, dir); len(got) != 1 || got[0] == "clicks-0.ring" {
		t.Errorf("%v are left, want the living process's", got)
	}
}

// TestClicksWhenFull fills the journal while PostgreSQL is away. Further clicks keep their count
// and lose their event, and there is room again after the flush.
func TestClicksWhenFull(t *testing.T) {
	const full = journalSlots
	for _, events := range []bool{true, false} {
		t.Run(fmt.Sprint("events ", events), func(t *testing.T) {
			books := newLedger()
			c := newClickLog(t.TempDir(), events, books.save, testLog(t))
			t.Cleanup(c.close)
			recordN(c, 7, full)
			for i := range int64(1000) {
				c.record(8+i%2, noon+i%2*secondsPerDay, i%4 == 3, "a.example")
			}
			books.answers(refuse)
			flushFails(t, c)
			checkCounts(t, c, full+1000, 0, 0)

			books.answers(count)
			flushedJournal := c.flushJournal(context.Background(), c.own, c.next)
			if flushedJournal != nil {
				t.Fatal(flushedJournal)
			}
			for range 3 { // the answer for the overflow is lost, and more clicks come
				books.answers(lie)
				flushFails(t, c)
				recordN(c, 7, 1)
			}
			books.answers(count)
			flushOK(t, c)
			checkCounts(t, c, full+1003, full+1003, 0)
			const day = noon - noon%secondsPerDay
			books.check(t, events, []clickSum{
				{linkID: 7, second: noon, count: full + 3},
				{linkID: 8, second: day, count: 500, noEvent: true},
				{linkID: 9, second: day + secondsPerDay, count: 250, noEvent: true},
				{linkID: 9, second: day + secondsPerDay, count: 250, noEvent: true, bot: true},
			})
			rowless := int64(0)
			if events {
				rowless = 1000
			}
			if got := c.rowless.Load(); got != rowless {
				t.Errorf("%d clicks without their event, want %d", got, rowless)
			}
		})
	}
}

// TestClicksOverflow bounds what is kept of clicks that find the journal full.
func TestClicksOverflow(t *testing.T) {
	books := newLedger()
	c := testClickLog(t, t.TempDir(), books)
	c.next += journalSlots // as if full
	for i := range int64(maxOverflow + 10) {
		c.record(1+i, noon, false, "")
	}
	c.record(1, noon, false, "") // this one is in the map already
	checkCounts(t, c, journalSlots+maxOverflow+11, 0, 10)
	c.next -= journalSlots
	books.positions[c.overflowID] = 5 // a restored database
	flushFails(t, c)
	flushOK(t, c)
	if n := books.total(); n != maxOverflow+1 || books.largest > maxBatch {
		t.Errorf("%d clicks counted in batches of up to %d sums", n, books.largest)
	}
	checkCounts(t, c, maxOverflow+11, maxOverflow+1, 10)
}

// TestClicksBatches splits what is to be flushed, into smaller batches after each failure.
func TestClicksBatches(t *testing.T) {
	books := newLedger()
	c := testClickLog(t, t.TempDir(), books)
	for i := range int64(3 * maxBatch) {
		c.record(1+i, noon, false, "")
	}
	books.slowAt = 2000 // a PostgreSQL that never ends a batch of so many
	failures := 0
	for c.pendingClicks() > 0 {
		if c.flush(context.Background()) != nil {
			failures++
		}
		if failures > 1000 {
			t.Fatal("it never ends")
		}
	}
	if n := books.total(); n != 3*maxBatch {
		t.Errorf("%d clicks counted of %d", n, 3*maxBatch)
	}
	if int64(failures) != c.failures.Load() {
		t.Errorf("%d failures noted of %d", c.failures.Load(), failures)
	}
	books.slowAt = 0
	recordN(c, 7, 3*maxBatch)
	flushOK(t, c)
	if c.batchSize != maxBatch {
		t.Errorf("batches hold %d clicks after PostgreSQL is fast again", c.batchSize)
	}
}

// TestClicksInMemory counts all the same where there can be no journal.
func TestClicksInMemory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"", file, filepath.Join(file, "below"), "/proc"} {
		books := newLedger()
		logs := &syncBuffer{}
		c := newClickLog(dir, true, books.save, slog.New(slog.NewTextHandler(logs, nil)))
		c.belongsTo("ours")
		if c.degraded() == "" || strings.Count(logs.String(), "no click journal") != 1 {
			t.Errorf("DATA_DIR %q: degraded() = %q, log %s", dir, c.degraded(), logs)
		}
		for range 3 {
			recordN(c, 7, 1)
			flushOK(t, c)
		}
		books.check(t, true, []clickSum{{linkID: 7, second: noon, count: 3}})
		c.close()
	}
	c := testClickLog(t, filepath.Join(t.TempDir(), "new", "dir"), newLedger())
	if c.degraded() != "" {
		t.Errorf("a DATA_DIR that can be made: %s", c.degraded())
	}
}

// TestClicksLeaveMemory makes room for the journal of a process that began without one, while
// clicks come in during each flush: it goes on in a file, and counts all of them.
func TestClicksLeaveMemory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	books := newLedger()
	var c *clickLog
	total := int64(0)
	save := func(ctx context.Context, b clickBatch) (int64, error) {
		recordN(c, 7, 10)
		total += 10
		return books.save(ctx, b)
	}
	c = newClickLog(dir, true, save, slog.New(slog.DiscardHandler))
	c.belongsTo("ours")
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	recordN(c, 7, 10)
	total += 10
	flushOK(t, c)
	if c.degraded() != "" {
		t.Fatalf("with room on the disk: %s", c.degraded())
	}
	c.save = books.save
	flushOK(t, c)
	books.check(t, true, []clickSum{{linkID: 7, second: noon, count: total}})
	c.close()
}

// TestClicksConcurrently records from eight goroutines, more than a lap of the journal, while
// flushes succeed and fail.
func TestClicksConcurrently(t *testing.T) {
	const people, each = 8, 80_000
	for _, dir := range []string{t.TempDir(), ""} { // the race detector sees memory, not a map
		books := newLedger()
		c := testClickLog(t, dir, books)
		var recorders sync.WaitGroup
		for p := range int64(people) {
			recorders.Go(func() { recordN(c, 1+p, each) })
		}
		done := make(chan struct{})
		go func() {
			recorders.Wait()
			close(done)
		}()
		var before int64
		for running := true; running; {
			books.answers([]int{count, count, lie, refuse}[rand.IntN(4)])
			c.flush(context.Background())
			recorded, flushed, dropped, pending := c.counts()
			if recorded < before || dropped != 0 || flushed > recorded || pending < 0 {
				t.Fatalf("%d recorded after %d, %d flushed, %d dropped, %d pending",
					recorded, before, flushed, dropped, pending)
			}
			before = recorded
			select {
			case <-done:
				running = false
			default:
			}
		}
		books.answers(count)
		flushOK(t, c)
		checkCounts(t, c, people*each, people*each, 0)
		for p := range int64(people) {
			if n := books.link(1 + p); n != each {
				t.Errorf("%d clicks counted on link %d, want %d", n, 1+p, each)
			}
		}
	}
}

// TestClicksRun runs the loop itself: readers see what was recorded before they asked, and the last
// clicks are counted at the end.
func TestClicksRun(t *testing.T) {
	books, dir := newLedger(), t.TempDir()
	dead := testClickLog(t, dir, books)
	recordN(dead, 7, 2)
	dead.own.close()
	c := testClickLog(t, dir, books)
	short := func() context.Context {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		t.Cleanup(cancel)
		return ctx
	}
	if err := c.sync(short()); !errors.Is(err, errUnavailable) {
		t.Errorf("nobody flushes, yet sync says %v", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { c.run(ctx) })
	var readers sync.WaitGroup
	for range 20 {
		recordN(c, 7, 1)
		readers.Go(func() {
			if err := c.sync(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	readers.Wait()
	if n := books.link(7); n != 22 {
		t.Errorf("%d clicks are counted when all readers are answered, want 22", n)
	}
	recordN(c, 7, 1)
	eventually(t, patience, "a click is counted without anybody asking", func() bool {
		return books.link(7) == 23
	})

	books.answers(refuse)
	recordN(c, 7, 1)
	if err := c.sync(context.Background()); !errors.Is(err, errUnavailable) {
		t.Errorf("sync says %v although PostgreSQL refuses", err)
	}
	books.answers(hang)
	if err := c.sync(short()); !errors.Is(err, errUnavailable) {
		t.Errorf("sync says %v although PostgreSQL hangs", err)
	}
	books.answers(count)
	close(books.hung)
	recordN(c, 7, 1)
	stop()
	running.Wait()
	if n := books.link(7); n != 25 {
		t.Errorf("%d clicks are counted at the end, want 25", n)
	}
	c.close()
	recordN(c, 7, 1) // a late request: it must not crash
	if got := journals(t, dir); len(got) != 0 {
		t.Errorf("%v are left, and all is counted", got)
	}
}

// TestClicksAllocate records without allocating, and flushes with a few allocations per batch.
func TestClicksAllocate(t *testing.T) {
	c := testClickLog(t, t.TempDir(), newLedger())
	n := testing.AllocsPerRun(1000, func() { c.record(7, noon, true, "a.example") })
	if n != 0 {
		t.Errorf("record allocates %v times", n)
	}
}

// ---- helpers ----

// testLog writes to the test's own output.
func testLog(t testing.TB) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

// testClickLog opens a journal in dir that counts in books.
func testClickLog(t testing.TB, dir string, books *ledger) *clickLog {
	t.Helper()
	c := newClickLog(dir, true, books.save, testLog(t))
	if c.degraded() != "" && dir != "" {
		t.Fatal(c.degraded())
	}
	c.belongsTo("ours")
	t.Cleanup(c.close)
	return c
}

// recordN records n clicks of people on a link.
func recordN(c *clickLog, link int64, n int) {
	for range n {
		c.record(link, noon, false, "")
	}
}

// recordSum records the clicks of a sum.
func recordSum(c *clickLog, sum clickSum) {
	for range sum.count {
		c.record(sum.linkID, sum.second, sum.bot, sum.referrer)
	}
}

// flushOK flushes, which must succeed.
func flushOK(t testing.TB, c *clickLog) {
	t.Helper()
	if err := c.flush(context.Background()); err != nil {
		t.Fatalf("flush: %v", err)
	}
}

// flushFails flushes, which must fail.
func flushFails(t testing.TB, c *clickLog) {
	t.Helper()
	if err := c.flush(context.Background()); err == nil {
		t.Fatal("a flush succeeded that was to fail")
	}
}

// checkCounts compares the figures of c; recorded and flushed may be -1 for any.
func checkCounts(t testing.TB, c *clickLog, recorded, flushed, dropped int64) {
	t.Helper()
	gotRecorded, gotFlushed, gotDropped, gotPending := c.counts()
	if gotRecorded != gotFlushed+gotDropped+gotPending || gotDropped != dropped ||
		recorded >= 0 && gotRecorded != recorded || flushed >= 0 && gotFlushed != flushed {
		t.Errorf("%d recorded, %d flushed, %d dropped, %d pending; want %d, %d, %d",
			gotRecorded, gotFlushed, gotDropped, gotPending, recorded, flushed, dropped)
	}
}

// journals are the names of the files in dir.
func journals(t testing.TB, dir string) []string {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, file := range files {
		names = append(names, file.Name())
	}
	return names
}

// crash returns a new DATA_DIR with a copy of c's journal as it is at this moment, which is what
// the kernel keeps of a process that is killed.
func crash(t testing.TB, c *clickLog) string {
	t.Helper()
	dir := t.TempDir()
	copyJournal(t, c, filepath.Join(dir, "clicks-0.ring"))
	return dir
}

// crashAgain returns a new DATA_DIR with a copy of c's journal, and with what else is in dir.
func crashAgain(t testing.TB, dir string, c *clickLog) string {
	t.Helper()
	again := crash(t, c)
	for i, name := range journals(t, dir) {
		if filepath.Join(dir, name) == c.own.name() {
			continue
		}
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		err = os.WriteFile(journalPath(again, 1+i), content, 0o600)
		if err != nil {
			t.Fatal(err)
		}
	}
	return again
}

// copyJournal copies c's journal to path. The slots that were never used become a hole.
func copyJournal(t testing.TB, c *clickLog, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	used := headerSize + min(c.next+10, journalSlots)*slotSize
	if _, err := f.Write(c.own.mem[:used]); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(journalSize); err != nil {
		t.Fatal(err)
	}
}

// What a ledger answers.
const (
	count  = iota // counts and says so
	lie           // counts, but the answer is lost
	refuse        // counts nothing
	hang          // nothing until hung is closed
)

// ledger keeps the books as saveClicks does, but in memory. That the SQL does the same is tested
// with the store.
type ledger struct {
	mu        sync.Mutex // guards all but hung
	answer    int
	slowAt    int64            // batches of so many clicks fail; 0 is none
	positions map[string]int64 // click_journals
	counted   map[clickSum]int64
	largest   int           // sums of a batch
	wrong     string        // what a batch broke
	hung      chan struct{} // closed to end a hang
}

func newLedger() *ledger {
	return &ledger{
		positions: map[string]int64{},
		counted:   map[clickSum]int64{},
		hung:      make(chan struct{}),
	}
}

// answers sets what save does from now on.
func (l *ledger) answers(answer int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answer = answer
}

// save is newClickLog's save.
func (l *ledger) save(ctx context.Context, b clickBatch) (int64, error) {
	l.mu.Lock()
	answer := l.answer
	l.mu.Unlock()
	if answer == hang {
		select {
		case <-l.hung:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	if answer == refuse {
		return 0, errors.New("refused")
	}
	if l.slowAt > 0 && b.to-b.from >= l.slowAt {
		return 0, errors.New("too slow")
	}
	position := l.count(b)
	if answer == lie {
		return 0, errors.New("the answer to COMMIT is lost")
	}
	return position, nil
}

// count is the transaction.
func (l *ledger) count(b clickBatch) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	position, known := l.positions[b.journal]
	if known && position != b.from {
		return position
	}
	l.positions[b.journal] = b.to
	l.largest = max(l.largest, len(b.sums))
	if !slices.IsSortedFunc(b.sums, compareClicks) || b.to <= b.from {
		l.wrong = fmt.Sprintf("a batch from %d to %d, or not sorted", b.from, b.to)
	}
	for _, sum := range b.sums {
		key := sum
		key.count = 0
		l.counted[key] += sum.count
	}
	return b.to
}

// link is how many people clicked a link.
func (l *ledger) link(id int64) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	var n int64
	for sum, count := range l.counted {
		if sum.linkID == id && !sum.bot {
			n += count
		}
	}
	return n
}

// total is how many clicks were counted.
func (l *ledger) total() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	var n int64
	for _, count := range l.counted {
		n += count
	}
	return n
}

// check compares what was counted with want. Without events no sum has one.
func (l *ledger) check(t testing.TB, events bool, want []clickSum) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	wanted := map[clickSum]int64{}
	for _, sum := range want {
		n := sum.count
		sum.count = 0
		sum.noEvent = sum.noEvent || !events
		if n > 0 {
			wanted[sum] = n
		}
	}
	if !maps.Equal(l.counted, wanted) {
		t.Errorf("counted %v\nwant    %v", l.counted, wanted)
	}
	if l.wrong != "" {
		t.Error(l.wrong)
	}
}

// ---- benchmarks ----

// benchClickLog is a log that counts nowhere.
func benchClickLog(b *testing.B) *clickLog {
	save := func(_ context.Context, batch clickBatch) (int64, error) { return batch.to, nil }
	c := newClickLog(b.TempDir(), true, save, slog.New(slog.NewTextHandler(io.Discard, nil)))
	b.Cleanup(c.close)
	return c
}

// BenchmarkClickRecord records clicks as redirects do, from as many goroutines as -cpu says, on
// pages that prepare made ready, as it does while run runs, and on fresh ones. Only the first lap
// of the journal has fresh pages: use -benchtime 500000x.
func BenchmarkClickRecord(b *testing.B) {
	for _, prepared := range []bool{true, false} {
		b.Run(fmt.Sprint("prepared ", prepared), func(b *testing.B) {
			c := benchClickLog(b)
			c.own.counted = math.MaxInt64 / 2 // never full
			if prepared {
				c.own.prepare(1, journalSlots)
			}
			b.ReportAllocs()
			b.ResetTimer()
			b.RunParallel(func(p *testing.PB) {
				for p.Next() {
					c.record(7, noon, false, "a.example")
				}
			})
		})
	}
}

// BenchmarkClickFlush makes batches of clicks and merges them, without PostgreSQL. An operation is
// one click; its record is in it.
func BenchmarkClickFlush(b *testing.B) {
	hosts := []string{"", "", "", "a.example", "www.b.example", "news.c.example", "d.example"}
	for _, links := range []int64{1, 1640, 100_000} {
		b.Run(fmt.Sprint(links, " links"), func(b *testing.B) {
			c := benchClickLog(b)
			b.ReportAllocs()
			for i := range int64(b.N) {
				c.record(1+i*7919%links, noon+i/10_000, false, hosts[i%int64(len(hosts))])
				if i%maxBatch == maxBatch-1 {
					flushOK(b, c)
				}
			}
		})
	}
}
