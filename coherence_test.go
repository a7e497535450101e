package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// The coherence checker: three replicas over one database and one Redis, clients that write and ask
// at random, and a fault. From outside it notes when each write was sent and acknowledged and what
// it made true. Afterwards it judges every redirect by that history, and compares what is left in
// Redis and in the local tiers with PostgreSQL. The faults are in coherence_faults_test.go, and
// naive_test.go shows that it finds what it looks for.
//
//	go test -run '^TestFault16Coherence$' -v                        some seconds for each fault
//	COHERENCE_SECONDS=60 go test -run '^TestFault16Coherence$' -v   a minute for each
var coherenceSeed = flag.Uint64("coherence.seed", 1, "seed of the checker's random choices")

// coherenceTime is how long clients go on under each fault.
func coherenceTime(short time.Duration) time.Duration {
	seconds, err := strconv.Atoi(os.Getenv("COHERENCE_SECONDS"))
	if err != nil || seconds <= 0 {
		return short
	}
	return time.Duration(seconds) * time.Second
}

const (
	replicaCount = 3   // how many there are
	clientCount  = 8   // goroutines that read and write
	codeCount    = 240 // codes at the start: 3 of 4 exist, the others are created by the run

	// recentCount is how many codes written last get most redirects: the others only show what
	// caches leave alone. hotCount are the very last of them.
	recentCount = 128
	hotCount    = 16

	// calmElsewhere is how old the answers of other replicas may be without any fault. The message
	// is sent before the answer, so this is its way through Redis and the scheduler.
	calmElsewhere = 50 * time.Millisecond

	// mostStall is for how long the machine may not run the test when that shall prove anything:
	// a quarter of trustFor. Polls come as late as that.
	mostStall = 500 * time.Millisecond

	// settleWithin is for how long what was broken may need to be used again. A Redis that was
	// loading when it was asked is left alone for refusedPause; the rest is for a busy machine.
	settleWithin = refusedPause + 5*time.Second

	// nobody is the replica of a write that no living replica has made.
	nobody = -1
)

// revision is one write of one code as its client saw it. Times are since the checker's start.
type revision struct {
	url   string // what it made true; "" is a 404
	sent  time.Duration
	acked time.Duration
	sure  bool // acknowledged; else nobody knows whether it happened, or will
	by    int  // the replica that made it, or nobody
}

// subject is a code and its history.
type subject struct {
	code string

	writing  sync.Mutex // one writer at a time: the history has one order; guards what follows
	id       int64      // 0: not created, as far as we know
	deleted  bool
	active   bool
	stored   string // its URL, also while it sleeps; known after a sure write only
	writes   int
	versions []*revision
}

// look is one answered redirect.
type look struct {
	s       *subject
	replica int
	sent    time.Duration
	got     time.Duration
	url     string
	alone   time.Duration // for how long the replica had not reached PostgreSQL, if that is known
}

// place is one replica as the checker reaches it.
type place struct {
	url    string
	app    *app                // nil: it is another process, or no hop
	local  func() []codeTarget // what its local tier keeps; nil if that cannot be seen
	mortal bool                // it may be killed: connections to it may fail
}

// alone is for how long the replica's polls of PostgreSQL have not succeeded.
func (p *place) alone() time.Duration {
	if p.app == nil {
		return 0
	}
	tier := p.app.cache.local
	return time.Duration(tier.since(time.Now()) - tier.polled.Load())
}

// checker is one run.
type checker struct {
	t         *testing.T
	name      string
	elsewhere time.Duration // how old answers of other replicas than the writer's may be
	calm      bool          // nothing is broken: few answers may be 503
	cutOff    bool          // replicas are cut off from PostgreSQL
	direct    bool          // writes go to PostgreSQL only, as those of a writer that died after it
	places    []*place
	store     *Store  // to PostgreSQL itself
	db        *sql.DB // likewise
	redis     *process
	names     func() keyNames // of the keys that are in use in Redis
	began     time.Time
	length    time.Duration // of the run

	database   string   // what its keys in Redis are named after
	toPostgres []*proxy // how each replica reaches PostgreSQL
	toRedis    []*proxy // likewise Redis; none where nothing may be late
	victim     *process // the replica that may be killed

	mu       sync.Mutex // guards what follows
	subjects []*subject
	recent   [recentCount]*subject
	next     int
	looks    []look
	delays   []time.Duration // of watched changes: when other replicas still served the old target
	problems []string
	slowest  time.Duration // of all writes
	stalled  time.Duration // the longest that the machine or PostgreSQL stood still

	writes, maybes, refused      atomic.Int64
	faults                       atomic.Int64
	compared, wrong, stale, left int64
	worstOwn, worstElsewhere     time.Duration
	loneliest                    time.Duration // the longest look.alone
}

// now is the time since the checker's start.
func (c *checker) now() time.Duration { return time.Since(c.began) }

// problem notes a broken promise. All of them fail the test; a few are printed.
func (c *checker) problem(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := fmt.Sprintf("%9.3f s: ", c.now().Seconds()) + fmt.Sprintf(format, args...)
	c.problems = append(c.problems, text)
}

// newChecker prepares an empty database with the tables and three quarters of the codes.
func newChecker(t *testing.T, name, dsn string) *checker {
	c := &checker{t: t, name: name, began: time.Now(), db: openDB(t, dsn)}
	c.openStore(dsn)
	for i := range codeCount {
		s := &subject{code: fmt.Sprintf("c%03d", i)}
		first := &revision{sure: true, by: nobody}
		if i%4 != 0 {
			first.url = s.newTarget()
			s.active = true
			s.stored = first.url
			s.id = scalar[int64](t, c.db, `
				INSERT INTO urls (short_code, original_url, created_at, updated_at)
				VALUES ($1, $2, now(), now()) RETURNING id`, s.code, first.url)
		}
		s.versions = append(s.versions, first)
		c.subjects = append(c.subjects, s)
	}
	return c
}

// openStore opens a store of the checker's own, and makes the newest tables.
func (c *checker) openStore(dsn string) {
	c.t.Helper()
	config, _, err := databaseConfig(dsn)
	if err != nil {
		c.t.Fatal(err)
	}
	pg := openPostgres(config, defaultDBConns(), slog.New(slog.DiscardHandler))
	c.t.Cleanup(pg.close)
	c.store = newStore(pg)
	if err := pg.probe(c.t.Context()); err != nil {
		c.t.Fatal(err)
	}
	id, err := c.store.migrate(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	c.database = databaseName(id)
}

// newTarget is a URL that no write used before.
func (s *subject) newTarget() string {
	s.writes++
	return fmt.Sprintf("https://v.example.com/%s/%d", s.code, s.writes)
}

// ---- asking ----

// look asks a replica for a code and notes the answer. ok is false if there was none.
func (c *checker) look(s *subject, replica int) (l look, ok bool) {
	p := c.places[replica]
	l = look{s: s, replica: replica, sent: c.now(), alone: p.alone()}
	r, err := roundTrip("GET", p.url+"/"+s.code, "")
	l.got = c.now()
	switch {
	case err != nil && p.mortal:
		return l, false
	case err != nil:
		c.problem("replica %d answered %s with %v", replica, s.code, err)
		return l, false
	case r.status == http.StatusFound || r.status == http.StatusNotFound:
		l.url = r.header.Get("Location")
		c.mu.Lock()
		c.looks = append(c.looks, l)
		c.mu.Unlock()
		return l, true
	case r.status == http.StatusServiceUnavailable:
		c.refused.Add(1)
	default:
		c.problem("replica %d answered %s with %d %q", replica, s.code, r.status, r.body)
	}
	return l, false
}

// ---- writing ----

// intent is one change of one code that is to be made. Nil fields stay as they are.
type intent struct {
	create bool
	remove bool
	url    *string
	active *bool
	makes  string // what it makes true
}

// outcome is what became of a write.
type outcome int

const (
	writeMade    outcome = iota
	writeUnknown         // there was no answer, or a 503
	writeGone            // there is no such link
	writeTaken           // there is one already
	writeRefused         // anything else: a failure
)

// written is the answer to a write.
type written struct {
	outcome outcome
	link    link   // when it was made and not removed
	text    string // for people
}

// plan decides how s is changed next. Its lock is held.
func (s *subject) plan(r *rand.Rand) intent {
	certain := s.versions[len(s.versions)-1].sure
	dice := r.IntN(100)
	switch {
	case s.id == 0:
		url := s.newTarget()
		return intent{create: true, url: &url, makes: url}
	case dice < 6:
		return intent{remove: true}
	case dice < 25 && s.active:
		return intent{active: new(false)}
	case dice < 45 && !s.active && certain: // a sleeping link stays a 404
		s.stored = s.newTarget()
		return intent{url: new(s.stored)}
	case dice < 70 && !s.active && certain:
		return intent{active: new(true), makes: s.stored}
	}
	// Nobody knows what an unsure write left behind, so this one says it all.
	w := intent{makes: s.newTarget()}
	w.url = &w.makes
	if !s.active || !certain {
		w.active = new(true)
	}
	return w
}

// change changes s, if nobody else does just now.
func (c *checker) change(s *subject, replica int, r *rand.Rand) {
	if !s.writing.TryLock() {
		return
	}
	defer s.writing.Unlock()
	c.changeLocked(s, replica, r)
}

// changeLocked makes a change of s and notes it. It returns nil if there was none, or if nobody
// knows whether there was.
func (c *checker) changeLocked(s *subject, replica int, r *rand.Rand) *revision {
	if s.deleted {
		return nil
	}
	certain := s.versions[len(s.versions)-1].sure
	w := s.plan(r)
	c.mu.Lock()
	c.wrote(s) // now, so that others ask for it while it changes
	c.mu.Unlock()
	v := &revision{url: w.makes, by: replica, sent: c.now()} // it may be true from here on
	s.versions = append(s.versions, v)
	var done written
	if c.direct {
		v.by = nobody
		done = c.commit(s, w, replica, r)
	} else {
		done = c.send(s, w, replica)
	}
	acked := c.now()
	c.writes.Add(1)
	switch {
	case done.outcome == writeUnknown:
		c.maybes.Add(1)
		return nil
	case done.outcome == writeMade && w.remove:
		s.deleted = true
	case done.outcome == writeMade:
		c.became(s, v, done)
	case done.outcome == writeGone && !w.create && !certain: // an unsure removal did happen
		s.deleted = true
		v.url = ""
		v.by = nobody // not by this replica, at least
	case done.outcome == writeTaken && w.create && !certain: // an unsure create did happen
		err := c.db.QueryRow(`SELECT `+linkCols+` FROM urls WHERE short_code = $1`, s.code).
			Scan(linkDest(&done.link)...)
		if err != nil {
			c.problem("%s is taken, but %v", s.code, err)
			return nil
		}
		v.url = done.link.OriginalURL
		v.by = nobody
		c.became(s, v, done)
	default:
		c.problem("%s", done.text)
		return nil
	}
	v.sure = true
	v.acked = acked
	c.mu.Lock()
	c.slowest = max(c.slowest, acked-v.sent)
	c.mu.Unlock()
	return v
}

// became notes what a link is after a write, and that v says so.
func (c *checker) became(s *subject, v *revision, done written) {
	s.id = done.link.ID
	s.active = done.link.IsActive
	s.stored = done.link.OriginalURL
	is := ""
	if s.active {
		is = s.stored
	}
	if is != v.url { // an unsure write came through after a later one was acknowledged
		c.problem("%s made %q true instead of %q", done.text, is, v.url)
		v.url = is
	}
}

// send has a replica make a write.
func (c *checker) send(s *subject, w intent, replica int) written {
	body := map[string]any{}
	if w.url != nil {
		body["original_url"] = *w.url
	}
	if w.active != nil {
		body["is_active"] = *w.active
	}
	method := "PUT"
	path := fmt.Sprintf("/urls/%d", s.id)
	sent := ""
	switch {
	case w.create:
		method = "POST"
		path = "/shorten"
		body["custom_code"] = s.code
		sent = jsonText(body)
	case w.remove:
		method = "DELETE"
	default:
		sent = jsonText(body)
	}
	p := c.places[replica]
	r, err := roundTrip(method, p.url+path, sent)
	answer := written{text: fmt.Sprintf("replica %d: %s %s %s: %d %s %v",
		replica, method, path, sent, r.status, r.body, err)}
	answer.outcome = outcomeOf(r, err, p.mortal)
	if answer.outcome == writeMade && !w.remove {
		var l wireLink
		if err := json.Unmarshal([]byte(r.body), &l); err != nil {
			answer.outcome = writeRefused
			answer.text += err.Error()
		}
		answer.link = link{ID: l.ID, OriginalURL: l.OriginalURL, IsActive: l.IsActive}
	}
	return answer
}

// outcomeOf says what an answer means. A mortal replica may break off.
func outcomeOf(r reply, err error, mortal bool) outcome {
	switch {
	case err != nil && mortal:
		return writeUnknown
	case err != nil:
		return writeRefused
	case r.status/100 == 2:
		return writeMade
	case r.status == http.StatusServiceUnavailable:
		return writeUnknown
	case r.status == http.StatusNotFound:
		return writeGone
	case r.status == http.StatusConflict:
		return writeTaken
	}
	return writeRefused
}

// commit makes a write in PostgreSQL alone: what a replica leaves that dies between its commit and
// its message. One time in two it had held the code before.
func (c *checker) commit(s *subject, w intent, replica int, r *rand.Rand) written {
	p := c.places[replica]
	if p.app != nil && r.IntN(2) == 0 {
		p.app.cache.redis.hold([]string{s.code})
	}
	ctx := context.Background()
	var after link
	var err error
	switch {
	case w.create:
		var results []createResult
		links := []newLink{{code: s.code, custom: true, url: *w.url}}
		results, err = c.store.createLinks(ctx, links)
		if err == nil {
			after = results[0].link
			err = results[0].err
		}
	case w.remove:
		_, err = c.store.deleteLink(ctx, s.id, func(link) error { return nil })
	default:
		after, err = c.store.updateLink(ctx, s.id, func(link) (linkChange, error) {
			return linkChange{url: w.url, active: w.active}, nil
		})
	}
	answer := written{link: after, text: fmt.Sprintf("commit %s %+v: %v", s.code, w, err)}
	switch {
	case err == nil:
		answer.outcome = writeMade
	case errors.Is(err, errUnavailable):
		answer.outcome = writeUnknown
	case errors.Is(err, errNotFound):
		answer.outcome = writeGone
	case errors.Is(err, errCodeTaken):
		answer.outcome = writeTaken
	default:
		answer.outcome = writeRefused
	}
	return answer
}

// wrote notes that s is being written. c.mu is held.
func (c *checker) wrote(s *subject) {
	c.recent[c.next%recentCount] = s
	c.next++
}

// pick chooses a code: any, one written lately, and one written just now.
func (c *checker) pick(r *rand.Rand) (cold, warm, hot *subject) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cold = c.subjects[r.IntN(len(c.subjects))]
	warm = c.recent[r.IntN(recentCount)]
	if warm == nil {
		warm = cold
	}
	hot = c.recent[max(0, c.next-1-r.IntN(hotCount))%recentCount]
	if hot == nil {
		hot = warm
	}
	return cold, warm, hot
}

// generate makes a link with a code of hop's choice.
func (c *checker) generate(replica int) {
	p := c.places[replica]
	v := &revision{by: replica, sure: true, sent: c.now()}
	v.url = fmt.Sprintf("https://v.example.com/new/%d", c.writes.Add(1))
	r, err := roundTrip("POST", p.url+"/shorten", jsonText(map[string]any{"original_url": v.url}))
	v.acked = c.now()
	switch outcomeOf(r, err, p.mortal) {
	case writeMade:
	case writeUnknown:
		c.maybes.Add(1)
		return
	default:
		c.problem("POST answered %d %q %v", r.status, r.body, err)
		return
	}
	var l wireLink
	if err := json.Unmarshal([]byte(r.body), &l); err != nil {
		c.problem("POST answered %q: %v", r.body, err)
		return
	}
	s := &subject{code: l.ShortCode, id: l.ID, active: true, stored: v.url}
	s.versions = []*revision{{sure: true, by: nobody}, v}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.subjects = append(c.subjects, s)
	c.wrote(s)
}

// watch changes s where all replicas know it, and asks the others until they serve the change. It
// notes when each of them served the old target last.
func (c *checker) watch(s *subject, replica int, r *rand.Rand) {
	if !s.writing.TryLock() {
		return
	}
	defer s.writing.Unlock()
	for n := range c.places {
		c.look(s, n)
	}
	v := c.changeLocked(s, replica, r)
	if v == nil {
		return
	}
	oldUntil := map[int]time.Duration{} // by the replicas that may serve the old target
	for n := range c.places {
		if n != v.by {
			oldUntil[n] = 0
		}
	}
	var delays []time.Duration
	for len(oldUntil) > 0 && c.now()-v.acked < 2*trustFor {
		for n := range oldUntil {
			l, ok := c.look(s, n)
			switch {
			case !ok && c.places[n].mortal:
				delete(oldUntil, n)
			case ok && l.url == v.url:
				delays = append(delays, oldUntil[n])
				delete(oldUntil, n)
			case ok:
				oldUntil[n] = l.sent - v.acked
			}
		}
		time.Sleep(time.Millisecond)
	}
	c.mu.Lock()
	c.delays = append(c.delays, delays...)
	c.mu.Unlock()
}

// ---- a run ----

// fault disturbs something until stop is closed, and leaves it well.
type fault func(c *checker, r *rand.Rand, stop <-chan struct{})

// run lets clients write and ask for length, while fault goes on.
func (c *checker) run(length time.Duration, seed uint64, disturb fault) {
	c.length = length
	stop := make(chan struct{})
	var clients sync.WaitGroup
	clients.Go(func() { c.watchStalls(stop, func() {}) })
	clients.Go(func() { c.watchStalls(stop, func() { c.db.Exec(`SELECT 1`) }) })
	for n := range clientCount {
		r := rand.New(rand.NewPCG(seed, uint64(n)))
		clients.Go(func() {
			for pause(r, 0, 6*time.Millisecond, stop) {
				c.step(r)
			}
		})
	}
	if disturb == nil {
		time.Sleep(length)
	} else {
		over := make(chan struct{})
		time.AfterFunc(length, func() { close(over) })
		disturb(c, rand.New(rand.NewPCG(seed, clientCount)), over)
		if c.faults.Load() == 0 {
			c.problem("there was no fault")
		}
	}
	close(stop)
	clients.Wait()
}

// step is one thing that a client does.
func (c *checker) step(r *rand.Rand) {
	cold, warm, hot := c.pick(r)
	replica := r.IntN(len(c.places))
	dice := r.IntN(1000)
	switch {
	case dice < 4:
		c.generate(replica)
		return
	case dice < 20: // a code that has long been cached, as a rule
		c.change(cold, replica, r)
	case dice < 40: // a code whose hold still stands
		c.change(hot, replica, r)
		cold = hot
	case dice < 60:
		c.watch(cold, replica, r)
		return
	case dice < 450:
		c.look(hot, replica)
		return
	case dice < 800:
		c.look(warm, replica)
		return
	default:
		c.look(cold, replica)
		return
	}
	for range r.IntN(4) {
		c.look(cold, r.IntN(len(c.places)))
	}
}

// pause waits for between to to, or until stop: then it is false.
func pause(r *rand.Rand, between, to time.Duration, stop <-chan struct{}) bool {
	select {
	case <-time.After(between + time.Duration(r.Int64N(int64(to-between)))):
		return true
	case <-stop:
		return false
	}
}

// watchStalls notes how late the machine lets a goroutine run that wants to every 10 ms, and how
// late PostgreSQL answers that. What is late because of it says nothing about hop.
func (c *checker) watchStalls(stop <-chan struct{}, do func()) {
	const tick = 10 * time.Millisecond
	for {
		before := time.Now()
		select {
		case <-time.After(tick):
		case <-stop:
			return
		}
		do()
		late := time.Since(before) - tick
		c.mu.Lock()
		c.stalled = max(c.stalled, late)
		c.mu.Unlock()
	}
}

// ---- judging ----

// judge holds every redirect since the last call against the history. Nobody may be writing.
func (c *checker) judge() {
	looks := c.looks
	c.looks = nil
	c.compared += int64(len(looks))
	c.judgeRefusals()
	for _, l := range looks {
		j, known := l.judge()
		if !known {
			c.wrong++
			c.problem("replica %d at %v answered %q for %s, which was never true%s",
				l.replica, l.sent, l.url, l.s.code, l.s.history())
			continue
		}
		c.worstOwn = max(c.worstOwn, j.own)
		c.worstElsewhere = max(c.worstElsewhere, j.elsewhere)
		c.loneliest = max(c.loneliest, l.alone)
		if j.tooOld(c.elsewhere) {
			c.stale++
			c.problem("replica %d at %v answered %q for %s, %v after a change of its own, "+
				"%v after one elsewhere; it had reached PostgreSQL %v before%s",
				l.replica, l.sent, l.url, l.s.code, j.own, j.elsewhere, l.alone, l.s.history())
		}
	}
}

// judgeRefusals allows some answers of 503 where nothing is broken: a machine that is busy with
// something else may need longer than hop waits.
func (c *checker) judgeRefusals() {
	refused := c.refused.Load() + c.maybes.Load()
	all := c.compared + c.refused.Load() + c.writes.Load()
	if c.calm && refused*4 > all {
		c.problem("%d of %d answers were 503 without any fault", refused, all)
	}
}

// judgement is how old an answer is: for how long it was no longer true, because of a change that
// the same replica made, and because of one that another made.
type judgement struct{ own, elsewhere time.Duration }

// tooOld says whether the answer broke the promise.
func (j judgement) tooOld(elsewhere time.Duration) bool {
	return j.own > 0 || j.elsewhere > elsewhere
}

// younger says whether j is a milder judgement than other.
func (j judgement) younger(other judgement) bool {
	if j.own != other.own {
		return j.own < other.own
	}
	return j.elsewhere < other.elsewhere
}

// judge says how old an answer is at least: a link may have led to the same target twice. known is
// false if the answer was never true.
func (l look) judge() (best judgement, known bool) {
	for i, v := range l.s.versions {
		if v.url != l.url || v.sent > l.got {
			continue
		}
		var j judgement
		for _, later := range l.s.versions[i+1:] {
			if !later.sure {
				continue
			}
			age := l.sent - later.acked
			if later.by == l.replica {
				j.own = max(j.own, age)
			} else {
				j.elsewhere = max(j.elsewhere, age)
			}
		}
		if !known || j.younger(best) {
			best = j
		}
		known = true
	}
	return best, known
}

// history is what is known of s, for people.
func (s *subject) history() string {
	var b strings.Builder
	for _, v := range s.versions[max(0, len(s.versions)-6):] {
		fmt.Fprintf(&b, "\n\t\t%+v", *v)
	}
	return b.String()
}

// ---- what is left at the end ----

// truth is what every code leads to, as PostgreSQL says.
func (c *checker) truth() map[string]target {
	rows, err := c.db.Query(`SELECT ` + targetCols + ` FROM urls WHERE ` + isLive)
	if err != nil {
		c.t.Fatal(err)
	}
	found, err := collect(rows, targetDest)
	if err != nil {
		c.t.Fatal(err)
	}
	truth := map[string]target{}
	for _, t := range found {
		truth[t.code] = t.target
	}
	return truth
}

// sameTarget says whether two targets lead to the same place.
func sameTarget(a, b target) bool {
	return a.id == b.id && (a.id == 0 || a.location[0] == b.location[0])
}

// check holds a cached target against the truth.
func (c *checker) check(where string, cached codeTarget, truth map[string]target) {
	if sameTarget(cached.target, truth[cached.code]) {
		return
	}
	c.left++
	c.problem("left in %s: %s leads to %v, in truth to %v",
		where, cached.code, cached.target, truth[cached.code])
}

// checkLocal holds what the local tiers keep against the truth, and returns how much it is.
func (c *checker) checkLocal(truth map[string]target) (entries int) {
	for n, p := range c.places {
		if p.local == nil {
			continue
		}
		for _, t := range p.local() {
			entries++
			c.check(fmt.Sprintf("the local tier of replica %d", n), t, truth)
		}
	}
	return entries
}

// checkRedis holds what Redis keeps against the truth, and returns how many values that is, and how
// many holds and reservations there are.
func (c *checker) checkRedis(truth map[string]target) (values, vetoes int) {
	if c.redis == nil {
		return 0, 0
	}
	conn, err := c.redis.dialRedis()
	if err != nil {
		c.t.Fatal(err)
	}
	defer conn.Close()
	prefix := c.names().code("")
	for _, key := range scanKeys(c.t, conn, prefix+"*") {
		value, err := redis.Bytes(conn.Do("GET", key))
		code := strings.TrimPrefix(key, prefix)
		if err != nil || strings.HasPrefix(code, ":") {
			continue // it has expired, or is no code's
		}
		t, ok := decodeTarget(value)
		if !ok {
			vetoes++
			continue
		}
		values++
		c.check("Redis", codeTarget{code, t}, truth)
	}
	return values, vetoes
}

// scanKeys are all keys that match.
func scanKeys(t *testing.T, conn redis.Conn, pattern string) []string {
	t.Helper()
	var all []string
	cursor := "0"
	for {
		page, err := redis.Values(conn.Do("SCAN", cursor, "MATCH", pattern, "COUNT", 1000))
		if err != nil {
			t.Fatal(err)
		}
		var keys []string
		if _, err := redis.Scan(page, &cursor, &keys); err != nil {
			t.Fatal(err)
		}
		all = append(all, keys...)
		if cursor == "0" {
			return all
		}
	}
}

// settle waits until the last writes are everywhere. From then on all that is cached must be true,
// holds and reservations must go, and all replicas must answer the truth.
func (c *checker) settle() {
	c.awaitPolls()
	c.awaitRedis()
	truth := c.truth()
	local := c.checkLocal(truth)
	_, vetoes := c.checkRedis(truth)
	for began := time.Now(); vetoes > 0 && c.left == 0; time.Sleep(250 * time.Millisecond) {
		if time.Since(began) > holdTTL+reserveTTL {
			c.problem("%d holds and reservations stand %v after the last write",
				vetoes, time.Since(began))
			break
		}
		_, vetoes = c.checkRedis(truth)
	}
	c.askAll(truth)
	local = max(local, c.checkLocal(truth)) // once more, with all codes cached
	values, _ := c.checkRedis(truth)
	if c.redis != nil && values == 0 || local == 0 {
		c.problem("nothing was cached: %d in Redis, %d locally", values, local)
	}
	c.t.Logf("%s: compared %d values in Redis and %d local entries", c.name, values, local)
}

// awaitPolls waits until every replica has polled after the last write.
func (c *checker) awaitPolls() {
	written := time.Now()
	for n, p := range c.places {
		if p.app == nil {
			continue
		}
		tier := p.app.cache.local
		for tier.polled.Load() <= tier.since(written) {
			if time.Since(written) > settleWithin {
				c.problem("replica %d has not polled for %v after the last fault", n, settleWithin)
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// awaitRedis waits until every replica reads Redis, and all the same generation.
func (c *checker) awaitRedis() {
	if c.redis == nil {
		return
	}
	began := time.Now()
	inUse := func(p *place) bool {
		if p.app == nil {
			return true
		}
		r := p.app.cache.redis
		return r.readable.Load() && *r.names.Load() == c.names()
	}
	for n, p := range c.places {
		for !inUse(p) {
			if time.Since(began) > settleWithin {
				c.problem("replica %d does not use Redis %v after the last fault",
					n, time.Since(began))
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// askAll asks all replicas for all codes.
func (c *checker) askAll(truth map[string]target) {
	for _, s := range c.subjects {
		want := truth[s.code]
		for n, p := range c.places {
			r, err := p.settled(s.code)
			location := r.header.Get("Location")
			right := r.status == http.StatusNotFound && want.id == 0 ||
				r.status == http.StatusFound && want.id != 0 && location == want.location[0]
			if err != nil || !right {
				c.wrong++
				c.problem("at the end replica %d answers %d %q for %s, in truth %v (%v)%s",
					n, r.status, location, s.code, want, err, s.history())
			}
		}
	}
}

// settled is what the replica says about code. A busy one is asked again.
func (p *place) settled(code string) (reply, error) {
	began := time.Now()
	for {
		r, err := roundTrip("GET", p.url+"/"+code, "")
		busy := err == nil && r.status == http.StatusServiceUnavailable
		if !busy || time.Since(began) > settleWithin {
			return r, err
		}
	}
}

// localEntries are all links that hop's local tier keeps, whether they answer at the moment or not:
// what does not answer now may do so when PostgreSQL and Redis are away. Codes that lead nowhere
// are among them while they answer.
func (a *app) localEntries() []codeTarget {
	l := a.cache.local
	var all []codeTarget
	var unknown []string
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.RLock()
		for code, e := range s.links {
			all = append(all, codeTarget{code, e.target})
		}
		for code := range s.unknown {
			unknown = append(unknown, code)
		}
		s.mu.RUnlock()
	}
	for _, code := range unknown {
		if t, ok := l.get(code, time.Now()); ok {
			all = append(all, codeTarget{code, t})
		}
	}
	return all
}

// ---- what is told ----

// report prints the figures.
func (c *checker) report() {
	slices.Sort(c.delays)
	var median, most time.Duration
	if len(c.delays) > 0 {
		median = c.delays[len(c.delays)/2]
		most = c.delays[len(c.delays)-1]
	}
	columns := []string{
		"COHERENCE", c.name, fmt.Sprintf("%d faults", c.faults.Load()),
		fmt.Sprintf("%d redirects, %d times 503", c.compared, c.refused.Load()),
		fmt.Sprintf("%d writes, %d unsure, slowest %s",
			c.writes.Load(), c.maybes.Load(), short(c.slowest)),
		fmt.Sprintf("old elsewhere: median %s, most %s of %d watched, %s of all",
			short(median), short(most), len(c.delays), short(c.worstElsewhere)),
		fmt.Sprintf("old on the writer's replica: %s", short(c.worstOwn)),
		fmt.Sprintf("stale %d, wrong %d, left %d", c.stale, c.wrong, c.left),
		fmt.Sprintf("stalled %s, polls %s apart", short(c.stalled), short(c.loneliest)),
	}
	fmt.Println(strings.Join(columns, " | "))
}

// verdict fails the test if anything was found. On a machine that stood still for a good part of
// what is allowed, only what the writer's own replica did, and what is left, is certain.
func (c *checker) verdict() {
	const printed = 12
	if len(c.problems) == 0 {
		return
	}
	stalled := c.stalled
	if !c.cutOff {
		stalled = max(stalled, c.loneliest-pollEvery) // nothing but the machine delays a poll
	}
	certain := c.worstOwn > 0 || c.left > 0
	if !certain && stalled > min(mostStall, c.elsewhere/4) {
		c.t.Errorf("inconclusive: the machine stalled for %v", stalled)
	}
	for _, p := range c.problems[:min(len(c.problems), printed)] {
		c.t.Error(p)
	}
	if len(c.problems) > printed {
		c.t.Errorf("and %d more", len(c.problems)-printed)
	}
	for n, p := range c.places {
		if p.app != nil {
			c.t.Logf("replica %d:\n%s", n, notable(p.app.logs.String()))
		}
	}
}

// notable are the last lines of a log that are about no request that went well.
func notable(log string) string {
	var lines []string
	for line := range strings.Lines(log) {
		request := strings.Contains(line, "msg=request")
		failed := strings.Contains(line, "status=50") && !strings.Contains(line, "/health")
		if !request || failed {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-40):], "")
}
