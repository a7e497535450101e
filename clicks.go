package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Clicks are counted off the redirect's path. record writes a click into the process's journal,
// a mapped file, which takes about 0.1 µs and no system call. One goroutine, run, moves them to
// PostgreSQL in batches, several times a second.
//
// Each click counts exactly once, whatever dies. A batch is a run of a journal's numbered clicks,
// and the transaction that counts it also moves the journal's position in click_journals from the
// number of the batch's first click to that after its last, or else counts nothing. So a batch
// whose answer was lost is simply sent again.
//
// What is lost:
//   - in a kill -9, however often: nothing. A later process on the same DATA_DIR counts what is
//     left, and so does one that is running already, within adoptEvery.
//   - while PostgreSQL is away: nothing up to journalSlots clicks. Clicks beyond them keep their
//     count per link and day, but lose their event and referrer, and are in memory only.
//   - when the machine dies: what the kernel had not written to disk yet, at most 30 s of clicks,
//     but of these only those not counted yet.
//   - without a journal (degraded says so) in a kill: what was not counted yet.
//
// One thing is not guarded against: a file system that is frozen (fsfreeze, as some backups do) or
// a disk that hangs. The kernel then stops the goroutine that writes into the map, and with the
// next garbage collection the whole process, until the disk goes on. prepare keeps redirects from
// waiting for a disk that is only slow.

const (
	// flushEvery is how long other replicas' readers do not see a click. Ten commits a second cost
	// 2 % of a core.
	flushEvery = 100 * time.Millisecond

	// flushPause is the same when flushing keeps PostgreSQL busy. Batches of a longer time would
	// cost memory and save nothing.
	flushPause = 500 * time.Millisecond

	// flushRetry is the pause after a flush that failed.
	flushRetry = 500 * time.Millisecond

	// adoptEvery is how often a process looks for journals whose process has died.
	adoptEvery = 10 * time.Second

	// lastFlush is how long the end of the process waits for its clicks to be counted: less than
	// flushFor, so that the journal is closed in order. What is left then stays in it.
	lastFlush = 4 * time.Second

	// maxBatch is how many clicks one transaction counts. It takes 0.1 to 0.3 s on a small machine.
	// Each failure halves it down to minBatch, so that a PostgreSQL that is too slow for a large
	// transaction is not asked for it for ever.
	maxBatch = 20_000
	minBatch = 500

	// maxOverflow bounds the map of clicks that find the journal full: 10 MB.
	maxOverflow = 100_000

	// maxSyncs is how many readers one flush serves at most; the others wait for the next.
	maxSyncs = 1 << 16
)

// clickLog counts clicks. Any goroutine may call its methods, but only one runs run.
type clickLog struct {
	dir    string
	events bool // counted clicks are rows in events
	save   func(context.Context, clickBatch) (int64, error)
	log    *slog.Logger
	ask    chan chan error // readers who want a flush

	// mu guards what follows, and the writing of own's slots. It is a leaf: nobody waits or does
	// I/O under it, and record holds it for some 30 ns.
	mu         sync.Mutex
	own        *journal // of this process; only run replaces it. Its field counted is guarded too
	next       int64    // number of own's next click
	closed     bool     // own's file is another process's now
	overflow   map[overflowKey]int64
	overflowed int64 // clicks in overflow, and taken out of it but not counted yet
	flushed    int64 // clicks counted in PostgreSQL
	dropped    int64 // clicks lost: damaged in the journal, or beyond maxOverflow
	database   string
	foreign    string // another database that took database's place; "" if none

	failures atomic.Int64 // flushes that failed
	rowless  atomic.Int64 // clicks counted without the event they should have

	// What follows belongs to the goroutine of run.
	batchSize int64
	sums      []clickSum        // of the last batch, reused
	hosts     map[string]string // the hosts of that batch, each allocated once
	adopted   time.Time         // when journals of dead processes were last looked for
	moreLeft  bool              // and they hold more than could be counted in one flush
	warned    map[string]bool   // files that were complained about
	leftFor   string            // database of a journal that was found at the start; "" for none

	// prepare was last called when own's next click was preparedFor, and made the pages ready of
	// those below prepared.
	prepared    int64
	preparedFor int64

	// Clicks from overflow are a journal of their own, in memory: they have its id and numbers.
	overflowID    string
	overflowNext  int64       // number of the first click that is not counted
	overflowBatch *clickBatch // taken out of overflow; sent unchanged until it is counted
}

// overflowKey is what is kept of a click that found the journal full.
type overflowKey struct {
	linkID int64
	day    int64 // since 1970
	bot    bool
}

// newClickLog makes a journal in dir, or counts from memory if there can be none. events says
// whether clicks become rows in events. save counts a batch if the journal stands at b.from in
// PostgreSQL, and returns where it stands now: b.to if the batch was counted. It must not keep the
// batch.
func newClickLog(dir string, events bool, save func(context.Context, clickBatch) (int64, error),
	log *slog.Logger) *clickLog {

	c := &clickLog{
		dir:          dir,
		events:       events,
		save:         save,
		log:          log,
		ask:          make(chan chan error),
		next:         1,
		overflow:     map[overflowKey]int64{},
		batchSize:    maxBatch,
		hosts:        map[string]string{},
		warned:       map[string]bool{},
		overflowID:   rand.Text(),
		overflowNext: 1,
	}
	c.tidy() // first: it may make room on the disk
	own, err := createJournal(dir)
	if err != nil {
		log.Warn("no click journal: a kill loses the clicks since the last flush",
			"dir", dir, "err", err)
		own = memoryJournal()
	}
	c.own = own
	return c
}

// degraded says why clicks do not survive a kill, or "".
func (c *clickLog) degraded() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.own.file == nil {
		return "memory only: clicks since the last flush are lost in a kill"
	}
	return ""
}

// heldBytes is what the journal takes of the heap: nothing if it is a file.
func (c *clickLog) heldBytes() int64 {
	if c.degraded() == "" {
		return 0
	}
	return journalSize
}

// ---- recording ----

// record counts one click on a link at a unix second. referrer is what refererHost returned. The
// click is in the journal when record returns. It never allocates, unless the journal is full.
func (c *clickLog) record(linkID, second int64, bot bool, referrer string) {
	second = min(max(second, firstSecond), lastSecond) // a clock that was never set
	c.mu.Lock()
	if c.next-c.own.counted < journalSlots && !c.closed {
		c.own.write(c.next, linkID, second, bot, referrer)
		c.next++
	} else {
		c.recordOverflow(overflowKey{linkID, second / secondsPerDay, bot})
	}
	c.mu.Unlock()
}

// recordOverflow counts a click in memory. mu must be held.
func (c *clickLog) recordOverflow(key overflowKey) {
	n := c.overflow[key]
	if n == 0 && len(c.overflow) >= maxOverflow {
		c.dropped++
		return
	}
	c.overflow[key] = n + 1
	c.overflowed++
}

// counts are totals since the start for /metrics: recorded = flushed + dropped + pending. Clicks
// that dead processes left are in recorded when they are counted.
func (c *clickLog) counts() (recorded, flushed, dropped, pending int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	pending = c.next - c.own.counted + c.overflowed
	return c.flushed + c.dropped + pending, c.flushed, c.dropped, pending
}

// pendingClicks is how many recorded clicks are not known to be in PostgreSQL yet.
func (c *clickLog) pendingClicks() int64 {
	_, _, _, pending := c.counts()
	return pending
}

// ---- flushing ----

// belongsTo says which database save counts in. Until it is called, clicks that dead processes left
// are not counted. If it names another database later, nothing is counted until the first is back:
// the same link ids are other links there. databaseID is visible ASCII, at most 64 bytes.
func (c *clickLog) belongsTo(databaseID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.database == "" {
		c.database = databaseID
	}
	c.foreign = ""
	if databaseID != c.database {
		c.foreign = databaseID
	}
}

// run flushes every flushEvery, and at once for readers, until ctx is done; then once more. The
// pause grows with what a flush takes, up to flushPause: flushing is a tenth of PostgreSQL's time,
// and more when a flush takes longer than 50 ms.
func (c *clickLog) run(ctx context.Context) {
	// The end of ctx does not end a flush that is under way, but limits it.
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	context.AfterFunc(ctx, func() { time.AfterFunc(lastFlush, cancel) })

	timer := time.NewTimer(flushEvery)
	defer timer.Stop()
	failing := false
	for {
		var readers []chan error
		select {
		case <-ctx.Done():
			if err := c.flush(work); err != nil {
				c.log.Error("clicks are left uncounted", "clicks", c.pendingClicks(),
					"journal", c.own.name(), "err", err)
			}
			return
		case <-timer.C:
		case first := <-c.ask:
			readers = takeQueued(c.ask, first, maxSyncs)
		}
		start := time.Now()
		err := c.flush(work)
		pause := min(max(flushEvery, 10*time.Since(start)), flushPause)
		if c.moreLeft {
			pause = flushEvery
		}
		if err != nil {
			pause = flushRetry
		}
		if err != nil && !failing {
			c.log.Warn("clicks wait to be counted", "clicks", c.pendingClicks(), "err", err)
		}
		if err == nil && failing {
			c.log.Info("clicks are counted again")
		}
		failing = err != nil
		c.prepare()
		timer.Reset(pause)
		for _, reader := range readers {
			reader <- err
		}
	}
}

// sync returns once every click recorded before the call is counted. It waits until ctx is done at
// most, which should have a deadline. All errors are errUnavailable. Readers who wait at the same
// time share a flush.
func (c *clickLog) sync(ctx context.Context) error {
	done := make(chan error, 1)
	select {
	case c.ask <- done:
	case <-ctx.Done():
		return fmt.Errorf("%w: a flush of clicks takes long", errUnavailable)
	}
	select {
	case err := <-done:
		if err != nil {
			return errors.Join(errUnavailable, err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: a flush of clicks takes long", errUnavailable)
	}
}

// close lets go of the journal when run has ended and no request is left: it removes the file if
// all its clicks are counted, and otherwise leaves it to the next process.
func (c *clickLog) close() {
	c.mu.Lock()
	again := c.closed
	c.closed = true
	done := c.own.counted == c.next
	c.mu.Unlock()
	if again || c.own.file == nil {
		return
	}
	if done {
		c.own.remove()
	} else {
		c.own.close()
	}
}

// flush counts every click recorded before the call, and now and then some of what dead processes
// left.
func (c *clickLog) flush(ctx context.Context) error {
	err := c.flushAll(ctx)
	if err != nil {
		c.failures.Add(1)
		c.batchSize = max(c.batchSize/2, minBatch)
	}
	return err
}

// flushAll is flush without its bookkeeping of failures.
func (c *clickLog) flushAll(ctx context.Context) error {
	c.mu.Lock()
	next := c.next
	database := c.database
	foreign := c.foreign
	c.mu.Unlock()
	if foreign != "" {
		return fmt.Errorf("the clicks belong to database %s, and this is %s: restart hop if that "+
			"is meant", database, foreign)
	}
	if c.own.database != database {
		if err := c.own.setDatabase(database); err != nil {
			c.warnOnce(c.own.name(), "the click journal's header cannot be written", "err", err)
		}
	}
	if err := c.flushJournal(ctx, c.own, next); err != nil {
		return err
	}
	if err := c.flushOverflow(ctx); err != nil {
		return err
	}
	if database == "" || time.Since(c.adopted) < adoptEvery {
		return nil
	}
	if err := c.adopt(ctx, database); err != nil || c.moreLeft {
		return err
	}
	c.adopted = time.Now()
	c.leaveMemory()
	return nil
}

// leaveMemory goes on in a file, if the process could not make one at its start: what dead
// processes left is counted by now, and its room on the disk is free. It takes along the clicks
// that have come since the flush began, unless they are too many to hold up redirects for; then it
// is tried again later.
func (c *clickLog) leaveMemory() {
	if c.own.file != nil || c.dir == "" {
		return
	}
	own, err := createJournal(c.dir)
	if err != nil {
		return
	}
	own.prepare(1, maxBatch) // the disk is waited for here, not under the lock
	c.mu.Lock()
	moves := c.next-c.own.counted < maxBatch && !c.closed
	if moves {
		c.next = own.takeOver(c.own, c.next)
		c.own = own
		c.prepared = 0
		c.preparedFor = 0
	}
	c.mu.Unlock()
	if !moves {
		own.unmap()
		own.remove()
		return
	}
	c.log.Info("clicks are kept in a journal again", "file", own.name())
}

// flushJournal counts the clicks of a journal, from where it is counted up to number next.
func (c *clickLog) flushJournal(ctx context.Context, j *journal, next int64) error {
	for j.counted < next {
		batch, damaged, err := c.takeBatch(j, min(j.counted+c.batchSize, next))
		if err != nil {
			return err
		}
		position, err := c.save(ctx, batch)
		if err != nil {
			return err
		}
		if position != batch.to {
			damaged = 0 // they were dropped by whoever counted the batch
		}
		if err := c.moveOn(j, batch, position, next, damaged); err != nil {
			return err
		}
		c.batchSize = min(2*c.batchSize, maxBatch)
	}
	return nil
}

// moveOn takes PostgreSQL's word for how far a journal is counted. position is the answer to batch,
// next the number after the journal's last click that we know, damaged how many of the batch's
// clicks were lost.
//
// Since only one process ever wrote the journal, a position beyond batch.from is always right, even
// if we never sent a batch that far: a process sent it and died before it noted so, the machine
// died and the kernel had not written the note, or the file was copied and the copy is counted too.
// All of these counted the very clicks that we have. A copy may also know fewer clicks than the
// original.
//
// A position that is not beyond batch.from was lost by PostgreSQL: a backup was restored, or a
// standby promoted that lacked the last commits. And one beyond the clicks that this process itself
// wrote comes from a twin with our memory, such as a machine started twice from one snapshot. Then
// the journal goes on under a new id, with all clicks that are not counted.
func (c *clickLog) moveOn(j *journal, batch clickBatch, position, next, damaged int64) error {
	isTwin := j == c.own && position > c.written()
	if position <= batch.from || isTwin {
		id := j.id
		if err := j.renew(); err != nil {
			return err
		}
		c.log.Error("PostgreSQL knows the click journal at a place where it never was: a restored "+
			"database or a copied machine. Its clicks are counted under a new id",
			"journal", j.name(), "id", id, "known", position, "counted", batch.from, "new", j.id)
		return fmt.Errorf("click journal %s was at %d, not at %d", id, position, batch.from)
	}
	position = min(position, next)
	if damaged > 0 {
		c.log.Error("damaged clicks dropped", "journal", j.name(), "clicks", damaged)
	}
	// In the file first: once counted has moved, record writes over these slots. If the note cannot
	// be written, the next process hears from PostgreSQL where the journal is.
	if err := j.setCounted(position); err != nil {
		c.warnOnce(j.name(), "the click journal's header cannot be written", "err", err)
	}
	c.mu.Lock()
	c.flushed += position - batch.from - damaged
	c.dropped += damaged
	j.counted = position
	c.mu.Unlock()
	return nil
}

// prepare makes the pages ready that the next clicks go to, twice as many as since the last call,
// so that record does not wait for the file system to do it.
func (c *clickLog) prepare() {
	next := c.written()
	ahead := 2 * max(next-c.preparedFor, 64)
	c.own.prepare(max(c.prepared, next), next+ahead)
	c.prepared = max(c.prepared, next+ahead)
	c.preparedFor = next
}

// written is the number of own's next click.
func (c *clickLog) written() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.next
}

// takeBatch makes a batch of a journal's clicks, from where it is counted up to number to. They are
// sorted, so that equal ones stand side by side and become one sum. damaged is how many slots hold
// no valid click; the batch goes without them.
func (c *clickLog) takeBatch(j *journal, to int64) (batch clickBatch, damaged int64, err error) {
	c.sums = c.sums[:0]
	clear(c.hosts)
	var buf [slotSize]byte
	for n := j.counted; n < to; n++ {
		slot, err := j.slot(n, &buf)
		if err != nil {
			return clickBatch{}, 0, err
		}
		click, host, ok := readSlot(slot, n)
		if !ok {
			damaged++
			continue
		}
		click.referrer = c.hostText(host)
		click.noEvent = !c.events
		c.sums = append(c.sums, click)
	}
	slices.SortFunc(c.sums, compareClicks)
	c.sums = mergeEqual(c.sums)
	return clickBatch{journal: j.id, from: j.counted, to: to, sums: c.sums}, damaged, nil
}

// hostText is host as a string, allocated once per batch.
func (c *clickLog) hostText(host []byte) string {
	if len(host) == 0 {
		return ""
	}
	text, ok := c.hosts[string(host)]
	if !ok {
		text = string(host)
		c.hosts[text] = text
	}
	return text
}

// compareClicks orders clicks by link, second, kind and referrer.
func compareClicks(a, b clickSum) int {
	if a.linkID != b.linkID {
		return cmp.Compare(a.linkID, b.linkID)
	}
	if a.second != b.second {
		return cmp.Compare(a.second, b.second)
	}
	if a.bot != b.bot {
		if b.bot {
			return -1
		}
		return 1
	}
	return cmp.Compare(a.referrer, b.referrer)
}

// mergeEqual adds up neighbours that are equal but for their count, in place.
func mergeEqual(sums []clickSum) []clickSum {
	merged := sums[:0]
	for _, click := range sums {
		last := len(merged) - 1
		if last >= 0 && compareClicks(merged[last], click) == 0 {
			merged[last].count += click.count
		} else {
			merged = append(merged, click)
		}
	}
	return merged
}

// flushOverflow counts the clicks that found the journal full.
func (c *clickLog) flushOverflow(ctx context.Context) error {
	for {
		if c.overflowBatch == nil {
			c.overflowBatch = c.takeOverflow()
		}
		batch := c.overflowBatch
		if batch == nil {
			return nil
		}
		position, err := c.save(ctx, *batch)
		if err != nil {
			return err
		}
		if position != batch.to { // a restored database or a twin, as in moveOn
			c.overflowID = rand.Text()
			batch.journal = c.overflowID
			return fmt.Errorf("overflowed clicks are at %d, not at %d", position, batch.from)
		}
		n := batch.to - batch.from
		c.mu.Lock()
		c.overflowed -= n
		c.flushed += n
		c.mu.Unlock()
		if c.events {
			c.rowless.Add(n)
		}
		c.overflowNext = batch.to
		c.overflowBatch = nil
	}
}

// takeOverflow takes up to maxBatch sums out of overflow, or returns nil if it is empty.
func (c *clickLog) takeOverflow() *clickBatch {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.overflow) == 0 {
		return nil
	}
	batch := &clickBatch{journal: c.overflowID, from: c.overflowNext, to: c.overflowNext}
	for key, n := range c.overflow {
		batch.sums = append(batch.sums, clickSum{
			linkID:  key.linkID,
			second:  key.day * secondsPerDay,
			count:   n,
			bot:     key.bot,
			noEvent: true,
		})
		batch.to += n
		delete(c.overflow, key)
		if len(batch.sums) == maxBatch {
			break
		}
	}
	slices.SortFunc(batch.sums, compareClicks)
	return batch
}

// ---- what dead processes left ----

// tidy frees the disk space of journals that dead processes left, as far as they do not use it, and
// says if there are clicks that only an old release can count.
func (c *clickLog) tidy() {
	if c.dir == "" {
		return
	}
	for n := range maxJournals {
		if old := oldJournalPath(c.dir, n); holdsOldClicks(old) {
			c.log.Warn("an older release left clicks that are not counted: start that release on "+
				"this DATA_DIR once, or delete the file", "file", old)
		}
		c.visit(n, func(j *journal) error {
			c.leftFor = cmp.Or(j.database, c.leftFor)
			next, err := j.next()
			if err != nil {
				return err
			}
			if next == j.counted {
				j.remove()
				return nil
			}
			return j.trim(next)
		})
	}
}

// adopt counts clicks that dead processes left in dir, and removes journals that are counted. It
// takes one batch of each, since readers of figures wait for the flush that calls it; moreLeft then
// says that the next flush has to go on.
func (c *clickLog) adopt(ctx context.Context, database string) error {
	c.moreLeft = false
	if c.dir == "" {
		return nil
	}
	for n := range maxJournals {
		err := c.visit(n, func(j *journal) error {
			if j.database != "" && j.database != database {
				c.warnOnce(j.name(), "a click journal belongs to another database: it stays",
					"file", j.name(), "database", j.database)
				return nil
			}
			return c.inherit(ctx, j)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// inherit counts a batch of what a journal holds, and removes it when nothing is left.
func (c *clickLog) inherit(ctx context.Context, j *journal) error {
	next, err := j.next()
	if err != nil {
		return err
	}
	before := j.counted
	if err := c.flushJournal(ctx, j, min(next, before+c.batchSize)); err != nil {
		return err
	}
	if j.counted < next {
		c.moreLeft = true
	} else {
		j.remove()
	}
	if j.counted > before {
		c.log.Info("counted what a dead process left", "file", j.name(),
			"clicks", j.counted-before, "left", next-j.counted)
	}
	return nil
}

// visit opens journal n if a dead process left it, and closes it after use. It returns the errors
// of use that come from PostgreSQL. A file that cannot be read is complained about, once, and stays
// as it is.
func (c *clickLog) visit(n int, use func(*journal) error) error {
	path := journalPath(c.dir, n)
	j, err := openLeftJournal(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errJournalHeld) {
		return nil
	}
	if err != nil {
		c.warnOnce(path, "a file of clicks cannot be read", "file", path, "err", err)
		return nil
	}
	defer j.close()
	if j.short() {
		c.warnOnce(path, "a click journal has lost its end, and maybe clicks", "file", path)
	}
	err = use(j)
	if _, isFileError := errors.AsType[*fs.PathError](err); isFileError {
		c.warnOnce(path, "a file of clicks cannot be read", "file", path, "err", err)
		return nil
	}
	return err
}

// warnOnce logs a warning, once per file.
func (c *clickLog) warnOnce(path, message string, args ...any) {
	if !c.warned[path] {
		c.warned[path] = true
		c.log.Warn(message, args...)
	}
}
