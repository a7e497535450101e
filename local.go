package main

import (
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"
)

// localTier keeps links in this process: a hit costs 60 ns and allocates nothing, where Redis costs
// 50 µs. It is bounded in links and in bytes.
//
// Its entries are true as of the last poll of PostgreSQL, since a poll drops all that has changed
// (poll.go). So they answer alone for trustFor after the start of a poll that succeeded, and when
// nobody can be asked any more, for staleFor.
type localTier struct {
	shards [shardCount]shard
	seed   maphash.Seed
	start  time.Time    // times in here are nanoseconds since then, on the monotonic clock
	polled atomic.Int64 // when the last successful poll began; 0: there was none
	onDrop func(code string)
}

// shardCount is enough that two cores seldom meet in one shard.
const shardCount = 64

// shard is one part of the tier. Its mutex guards all of it, and orders drops and puts. It is a
// leaf: nothing else is locked under it.
type shard struct {
	mu         sync.RWMutex
	links      map[string]*entry
	unknown    map[string]*entry // codes that lead nowhere: apart, so that guessers displace no link
	bytes      int               // what links costs
	maxBytes   int
	maxLinks   int
	maxUnknown int
	generation uint64   // counts drops: noted before a read, compared before its put
	_          [24]byte // keeps the next shard's lock off this cache line
}

// entry is what is known of a code. It is immutable but for used.
type entry struct {
	target
	until int64       // nanoseconds since the tier's start
	alone bool        // answers until then whether polls succeed or not
	used  atomic.Bool // since evict looked last: hot links survive a scan of cold ones
}

const (
	// trustFor is how long entries answer after the start of the last successful poll. It is the
	// age that the promise allows: a poll every 250 ms fails eight times before they stop.
	trustFor = 2 * time.Second

	// localTTL is how long a link is kept before it is read again. Polls see every change; this
	// bounds what a change by hand that forgot to set urls.changed can cost.
	localTTL = 30 * time.Second

	// aloneTTL is how long an answer is kept that no poll vouches for: a 404, since links with random
	// codes are not in the log of changes, and what Redis says while PostgreSQL cannot be polled.
	aloneTTL = time.Second

	// staleFor is how long known links answer when nobody can say what is true, counted from the
	// last poll that succeeded.
	staleFor = 10 * time.Minute

	// bytesPerLink is the memory that LOCAL_CACHE sets aside for one link: an entry's own
	// entryBytes, its code, and a target of 230 bytes. Longer ones leave room for fewer.
	bytesPerLink = 400
	entryBytes   = 160

	// unknownShare is the part of the tier's links that codes leading nowhere may take beside them.
	unknownShare = 16
)

// newLocalTier returns a tier of at most size links and size × bytesPerLink bytes.
func newLocalTier(size int) *localTier {
	l := &localTier{seed: maphash.MakeSeed(), start: time.Now(), onDrop: func(string) {}}
	for i := range l.shards {
		s := &l.shards[i]
		s.maxLinks = max(1, size/len(l.shards))
		s.maxBytes = s.maxLinks * bytesPerLink
		s.maxUnknown = max(4, s.maxLinks/unknownShare)
		s.links = map[string]*entry{}
		s.unknown = map[string]*entry{}
	}
	return l
}

// shardOf returns the shard of code.
func (l *localTier) shardOf(code string) *shard {
	return &l.shards[maphash.String(l.seed, code)%uint64(len(l.shards))]
}

// since is a moment as the tier counts time.
func (l *localTier) since(now time.Time) int64 { return int64(now.Sub(l.start)) }

// find returns the entry of code, whether it may answer or not, or nil.
func (l *localTier) find(code string) *entry {
	s := l.shardOf(code)
	s.mu.RLock() // 10 ns; a map without a lock would allocate for its key
	e := s.links[code]
	if e == nil {
		e = s.unknown[code]
	}
	s.mu.RUnlock()
	return e
}

// get returns what code leads to, if this process may say so alone.
func (l *localTier) get(code string, now time.Time) (target, bool) {
	e := l.find(code)
	if e == nil {
		return target{}, false
	}
	moment := l.since(now)
	if moment >= e.until || !e.alone && !l.trusted(moment) {
		return target{}, false
	}
	if !e.used.Load() { // a load is shared between cores, a store is not
		e.used.Store(true)
	}
	return e.target, true
}

// trusted says whether the last successful poll is recent enough at moment.
func (l *localTier) trusted(moment int64) bool {
	polled := l.polled.Load()
	return polled != 0 && moment < polled+int64(trustFor)
}

// stale returns what code led to when PostgreSQL was last heard of, at most staleFor ago. It never
// says that a code leads nowhere.
func (l *localTier) stale(code string, now time.Time) (target, bool) {
	if l.staleLeft(now) <= 0 {
		return target{}, false
	}
	e := l.find(code)
	if e == nil || e.id == 0 {
		return target{}, false
	}
	return e.target, true
}

// staleLeft is for how much longer stale answers.
func (l *localTier) staleLeft(now time.Time) time.Duration {
	polled := l.polled.Load()
	if polled == 0 {
		return 0
	}
	return time.Duration(polled+int64(staleFor)-l.since(now)) * time.Nanosecond
}

// vouch says that a poll which began at began has succeeded, and that all it found is dropped.
func (l *localTier) vouch(began time.Time) { l.polled.Store(l.since(began)) }

// generation is to be noted before reading what put will be given.
func (l *localTier) generation(code string) uint64 {
	s := l.shardOf(code)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.generation
}

// put keeps what code leads to, unless something in its shard was dropped since generation was
// noted: the read that found t may be older than that change.
func (l *localTier) put(code string, t target, generation uint64) {
	now := time.Now()
	e := &entry{target: t, until: l.since(now.Add(localTTL))}
	if t.id == 0 || !l.trusted(l.since(now)) {
		e.alone = true
		e.until = l.since(now.Add(aloneTTL))
	}
	s := l.shardOf(code)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.generation != generation {
		return
	}
	s.remove(code)
	if t.id == 0 {
		s.makeRoomForUnknown()
		s.unknown[code] = e
		return
	}
	s.bytes += e.cost(code)
	for len(s.links) > 0 && (len(s.links) >= s.maxLinks || s.bytes > s.maxBytes) {
		s.evict()
	}
	s.links[code] = e
}

// cost is how many bytes an entry takes, with its code.
func (e *entry) cost(code string) int {
	return entryBytes + len(code) + len(e.location[0])
}

// remove forgets code. The lock is held.
func (s *shard) remove(code string) {
	if e := s.links[code]; e != nil {
		s.bytes -= e.cost(code)
		delete(s.links, code)
	}
	delete(s.unknown, code)
}

// evict removes one link: of the few that the map happens to show first, one that nobody asked for
// lately. The lock is held.
func (s *shard) evict() {
	const looks = 8
	seen := 0
	for code, e := range s.links {
		seen++
		wasUsed := e.used.Swap(false)
		if !wasUsed || seen == looks || seen == len(s.links) {
			s.remove(code)
			return
		}
	}
}

// makeRoomForUnknown removes any one code that leads nowhere, if they are too many.
func (s *shard) makeRoomForUnknown() {
	if len(s.unknown) < s.maxUnknown {
		return
	}
	for code := range s.unknown {
		delete(s.unknown, code)
		return
	}
}

// drop forgets code, and vetoes every put in its shard whose read began before.
func (l *localTier) drop(code string) {
	s := l.shardOf(code)
	s.mu.Lock()
	s.generation++
	s.remove(code)
	s.mu.Unlock()
	l.onDrop(code)
}

// dropAll forgets everything, and vetoes every put whose read began before.
func (l *localTier) dropAll() {
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.Lock()
		s.generation++
		s.links = map[string]*entry{}
		s.unknown = map[string]*entry{}
		s.bytes = 0
		s.mu.Unlock()
	}
}

// len is how many links are kept.
func (l *localTier) len() int {
	n := 0
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.RLock()
		n += len(s.links)
		s.mu.RUnlock()
	}
	return n
}

// capacity is about how many links fit.
func (l *localTier) capacity() int { return len(l.shards) * l.shards[0].maxLinks }

// generations are those of all shards, to be noted before reading what putRead will be given.
func (l *localTier) generations() [shardCount]uint64 {
	var noted [shardCount]uint64
	for i := range l.shards {
		l.shards[i].mu.RLock()
		noted[i] = l.shards[i].generation
		l.shards[i].mu.RUnlock()
	}
	return noted
}

// putRead is put for one of many links read together after noting generations. It displaces
// nothing: the warm-up, which it serves, reads the newest links first.
func (l *localTier) putRead(t codeTarget, noted [shardCount]uint64) {
	i := maphash.String(l.seed, t.code) % uint64(len(l.shards))
	if l.shards[i].hasRoom() {
		l.put(t.code, t.target, noted[i])
	}
}

// hasRoom says whether another link fits without another's leaving.
func (s *shard) hasRoom() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.links) < s.maxLinks && s.bytes < s.maxBytes
}
