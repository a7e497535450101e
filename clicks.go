package main

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/lib/pq"
)

// Clicks are counted off the redirect's path: record writes one slot of a memory-mapped journal (30 ns, no syscall), and one
// goroutine moves the slots to PostgreSQL every flushEvery, in numbered batches that count exactly once.
//
// What is lost: nothing on kill -9, however often, and nothing while PostgreSQL is away or dies in a flush. When it is away for
// more than halfSlots clicks (65 s at 4,000/s), further clicks lose their event rows, and their counts live in memory only.
// When the machine itself dies, or without a writable DATA_DIR, the clicks since the last flush.

const (
	flushEvery = 100 * time.Millisecond // how long another replica's readers may not see a click; 10 commits/s cost 2 % of a core
	flushPause = 500 * time.Millisecond // and how long under a load that keeps PostgreSQL busy; longer makes batches that cost memory
	halfSlots  = 1 << 18                // slots in each half: 16 MiB, touched only as far as an outage fills them
	slotSize   = 64                     // one cache line: a header word, the link's id, and the referrer's host
	longestGap = 1 << 14                // blank slots that end a half: more than requests in flight (maxInFlight), each of which may leave one
	headerSize = 4096                   // one page: who wrote the file, and how far it was counted
	maxHost    = slotSize - 16          // bytes of a referrer's host; a longer one is cut
	writtenBit = 1 << 63                // of a slot's header word; below it botBit, the host's length, and unix seconds
	botBit     = 1 << 62
	halfBit    = 1 << 63 // of clickLog.next: which half; below it the index of the next free slot
)

// clickLog counts clicks. record may be called by any goroutine; the rest belongs to run's.
type clickLog struct {
	next   atomic.Uint64 // reserves slots; the swap of halves and the last reservation in one are one atomic step
	halves [2][]byte     // the journal's two halves: writers fill one while the other waits to be counted
	header []byte        // journal id, boot id, state word: see adopt
	file   *journalFile  // nil: memory only
	left   []*clickLog   // what other dead processes left in dir, owned by run's goroutine until it is counted
	save   func(clickBatch) (bool, error)
	events bool // write event rows
	log    *slog.Logger

	ask chan chan error // readers who want a flush

	// Owned by run's goroutine.
	pending *clickBatch // taken from the passive half and not known to be counted
	number  uint64      // of the last batch taken
	settled [2]uint64   // slots below belong to a dead process: a blank one will not be written any more

	mu       sync.Mutex             // guards spilled, and a swap against counts; a leaf, taken by record only when a half is full
	spilled  map[spilledClick]int64 // clicks that found no slot
	taken    atomic.Int64           // clicks in halves that were swapped out, ever
	flushed  atomic.Int64           // of these, counted in PostgreSQL
	dropped  atomic.Int64           // clicks lost: a journal of another boot, or memory only at exit
	rowless  atomic.Int64           // clicks counted without their event row
	failures atomic.Int64           // flushes that failed
}

// spilledClick is what is kept of a click that found no slot.
type spilledClick struct{ id, day, kind int64 }

// clickBatch is what one flush counts: columns with a row per click, or per spilled sum of clicks.
type clickBatch struct {
	journal   string
	number    uint64
	half      int
	clicks    int64 // all of them, bots included
	rowless   int64
	ids       pq.Int64Array
	times     pq.Int64Array // unix seconds
	counts    pq.Int64Array
	kinds     pq.Int64Array // withEvent, without, byBot
	referrers pq.StringArray
}

const withEvent, without, byBot = 0, 1, 2

func (b *clickBatch) add(id, at, n, kind int64, referrer string) {
	b.clicks += n
	b.ids, b.times, b.counts = append(b.ids, id), append(b.times, at), append(b.counts, n)
	b.kinds, b.referrers = append(b.kinds, kind), append(b.referrers, referrer)
}

// newClickLog opens the journal in dir, or counts in memory when that cannot be (an empty dir, a full disk): degraded says so.
// save counts a batch exactly once, by journal and number.
func newClickLog(dir string, events bool, save func(clickBatch) (bool, error), log *slog.Logger) *clickLog {
	const size = headerSize + 2*halfSlots*slotSize
	files, err := openJournals(dir, size)
	var all []*clickLog
	for _, file := range append(files, nil) {
		c := &clickLog{file: file, save: save, events: events, log: log, ask: make(chan chan error), spilled: map[spilledClick]int64{}}
		var mem []byte
		if file != nil {
			mem = file.mem
		} else if len(all) == 0 {
			log.Warn("no click journal: a kill loses the clicks since the last flush", "dir", dir, "err", err)
			mem = make([]byte, size)
		} else {
			break
		}
		c.header, c.halves[0], c.halves[1] = mem[:headerSize], mem[headerSize:headerSize+halfSlots*slotSize], mem[headerSize+halfSlots*slotSize:]
		c.adopt()
		all = append(all, c)
	}
	all[0].left = all[1:]
	return all[0]
}

// degraded says why clicks do not survive a kill, or "".
func (c *clickLog) degraded() string {
	if c.file == nil {
		return "memory only: clicks since the last flush are lost in a kill"
	}
	return ""
}

// record counts one click on link id at unix second at. referrer is a host or ""; bots count apart. The header word goes last:
// a slot is either whole or blank, and a click is in the journal before its redirect is answered.
func (c *clickLog) record(id, at int64, bot bool, referrer string) {
	v := c.next.Add(1) - 1
	i := v &^ halfBit
	if i >= halfSlots {
		click := spilledClick{id, at / 86400, without}
		if bot {
			click.kind = byBot
		}
		c.mu.Lock()
		c.spilled[click]++
		c.mu.Unlock()
		return
	}
	slot := c.halves[v>>63][i*slotSize:][:slotSize]
	binary.LittleEndian.PutUint64(slot[8:], uint64(id))
	n := copy(slot[16:], referrer)
	word := writtenBit | uint64(n)<<40 | uint64(at)
	if bot {
		word |= botBit
	}
	wordAt(slot).Store(word)
}

// wordAt is the atomic word at the start of b, which must be 8-byte aligned, as all of the journal is.
func wordAt(b []byte) *atomic.Uint64 { return (*atomic.Uint64)(unsafe.Pointer(&b[0])) }

// The header holds the journal's random id at 8, the boot it was written in at 24, and at 0 the state word: the number of the
// last batch taken, and in its two low bits which half that batch is (1 or 2), 0 once it is counted and its half is blank.

// adopt takes over what an earlier process left in the journal, or starts a new one. A file of another boot is not trusted: the
// machine may have died with pages half written.
func (c *clickLog) adopt() {
	boot := bootID()
	var used, written [2]uint64
	for h, half := range c.halves {
		if c.header[8] == 0 {
			break // a new file: do not touch, and so allocate, its pages
		}
		for i := uint64(0); i < halfSlots && i < used[h]+longestGap; i++ {
			if wordAt(half[i*slotSize:]).Load() != 0 {
				used[h] = i + 1
				written[h]++
			}
		}
	}
	if c.header[8] == 0 || string(c.header[24:60]) != boot {
		if left := written[0] + written[1]; left > 0 {
			c.dropped.Add(int64(left))
			c.taken.Add(int64(left))
			c.log.Error("click journal of another boot discarded", "clicks", left)
		}
		clear(c.header)
		clear(c.halves[0][:used[0]*slotSize])
		clear(c.halves[1][:used[1]*slotSize])
		copy(c.header[8:24], rand.Text())
		copy(c.header[24:60], boot)
		return
	}
	c.settled = used
	state := wordAt(c.header).Load()
	c.number = state >> 2
	switch {
	case state&3 != 0:
		c.settled[state&3-1] = halfSlots // it may have been killed half-way through blanking it
		c.take(int(state&3) - 1)
	case used[0] > 0 && used[1] > 0: // killed between the swap and the state word
		c.number++
		c.take(0)
	}
	active := uint64(0)
	if c.pending == nil && used[0] == 0 || c.pending != nil && c.pending.half == 0 {
		active = 1
	}
	c.next.Store(active<<63 | used[active])
	c.taken.Add(int64(written[active] - used[active])) // a blank slot is no click
	if c.pending != nil {
		c.taken.Add(c.pending.clicks)
	}
}

// take makes the pending batch out of a half that nobody writes to any more, under c.number.
func (c *clickLog) take(half int) {
	wordAt(c.header).Store(c.number<<2 | uint64(half+1))
	used := min(c.settled[half], halfSlots)
	b := &clickBatch{journal: string(c.header[8:24]), number: c.number, half: half, ids: make(pq.Int64Array, 0, used),
		times: make(pq.Int64Array, 0, used), counts: make(pq.Int64Array, 0, used), kinds: make(pq.Int64Array, 0, used),
		referrers: make(pq.StringArray, 0, used)}
	for i := range used {
		slot := c.halves[half][i*slotSize:][:slotSize]
		word, kind := wordAt(slot).Load(), int64(withEvent)
		if word == 0 {
			continue // its writer died before it answered the click
		}
		if !c.events {
			kind = without
		}
		if word&botBit != 0 {
			kind = byBot
		}
		b.add(int64(binary.LittleEndian.Uint64(slot[8:])), int64(word&math.MaxUint32), 1, kind, string(slot[16:16+word>>40&0xff]))
	}
	c.mu.Lock()
	for click, n := range c.spilled {
		b.add(click.id, click.day*86400, n, click.kind, "")
		if c.events && click.kind == without {
			b.rowless += n
		}
	}
	c.spilled = map[spilledClick]int64{}
	c.mu.Unlock()
	c.pending = b
}

// swap lets writers go on in the other half, which is blank, and takes theirs. It waits for the writers that have a slot and
// have not filled it yet: nanoseconds, unless the scheduler stopped one.
func (c *clickLog) swap() {
	c.mu.Lock() // so that counts sees both or neither
	old := c.next.Load()
	if old&^halfBit == 0 && len(c.spilled) == 0 {
		c.mu.Unlock()
		return
	}
	old = c.next.Swap(^old & halfBit)
	c.taken.Add(int64(old &^ halfBit))
	c.mu.Unlock()
	half, used := int(old>>63), min(old&^halfBit, halfSlots)
	for i := c.settled[half]; i < used; i++ {
		for wordAt(c.halves[half][i*slotSize:]).Load() == 0 {
			runtime.Gosched()
		}
	}
	c.settled[half] = used
	c.number++
	c.take(half)
}

// flush counts what is pending, what was recorded before the call, and what dead processes left.
func (c *clickLog) flush() error {
	if err := c.settle(); err != nil {
		return err
	}
	c.swap()
	if err := c.settle(); err != nil {
		return err
	}
	for len(c.left) > 0 {
		heritage := c.left[0]
		if err := heritage.flush(); err != nil {
			return err
		}
		heritage.file.close()
		c.taken.Add(heritage.taken.Load())
		c.flushed.Add(heritage.flushed.Load())
		c.dropped.Add(heritage.dropped.Load())
		c.left = c.left[1:]
	}
	return nil
}

// settle counts the pending batch, if there is one, and blanks its half.
func (c *clickLog) settle() error {
	b := c.pending
	if b == nil {
		return nil
	}
	if _, err := c.save(*b); err != nil {
		c.failures.Add(1)
		return err
	}
	clear(c.halves[b.half][:c.settled[b.half]*slotSize])
	c.settled[b.half] = 0
	wordAt(c.header).Store(c.number << 2) // only now: until here a restart asks again under the same number, and counts nothing
	c.pending = nil
	c.flushed.Add(b.clicks)
	c.rowless.Add(b.rowless)
	return nil
}

// run flushes every flushEvery, and for readers at once, until stop is closed; then once more. The pause grows with what a flush
// takes, so that flushing is a tenth of PostgreSQL's time at most, up to flushPause; a larger batch costs less per click.
func (c *clickLog) run(stop <-chan struct{}) {
	var failing bool
	for timer := time.NewTimer(flushEvery); ; {
		var waiting []chan error
		select {
		case <-timer.C:
		case w := <-c.ask:
			waiting = drain(c.ask, w, 1<<16) // one flush serves all who asked before it
		case <-stop:
			if err := c.flush(); err != nil {
				c.log.Error("clicks left unflushed", "clicks", c.pendingClicks(), "err", err)
			}
			return
		}
		start := time.Now()
		err := c.flush()
		pause := min(max(flushEvery, 10*time.Since(start)), flushPause)
		if err != nil {
			pause = probeEvery // as often as the breaker asks
			if !failing {
				c.log.Warn("clicks wait for PostgreSQL", "err", err)
			}
		}
		timer.Reset(pause)
		failing = err != nil
		for _, w := range waiting {
			w <- err
		}
	}
}

// sync returns once every click recorded before the call is in PostgreSQL, or with an error after answerWithin.
func (c *clickLog) sync() error {
	done, timeout := make(chan error, 1), time.After(answerWithin)
	select {
	case c.ask <- done:
	case <-timeout:
		return fmt.Errorf("%w: a flush takes long", errUnavailable)
	}
	select {
	case err := <-done:
		if err != nil {
			err = errors.Join(errUnavailable, err)
		}
		return err
	case <-timeout:
		return fmt.Errorf("%w: a flush takes long", errUnavailable)
	}
}

// counts are the totals for /metrics: recorded = flushed + dropped + pending, clicks under way apart.
func (c *clickLog) counts() (recorded, flushed, dropped, pending int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	flushed, dropped = c.flushed.Load(), c.dropped.Load()
	recorded = c.taken.Load() + int64(c.next.Load()&^halfBit)
	return recorded, flushed, dropped, recorded - flushed - dropped
}

// pendingClicks is how many recorded clicks are not in PostgreSQL yet.
func (c *clickLog) pendingClicks() int64 { _, _, _, pending := c.counts(); return pending }
