package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// An open-loop load: requests leave when they are due, however long the others take, and a latency
// counts from that time, so that a stall shows in all that it delayed. The client speaks HTTP/1.1
// by hand: net/http's would cost more than the server does.

// aim is one request of a load.
type aim struct {
	request []byte
	want    string // where a redirect must lead, or the target of a link that is made
	link    int    // number of the link that is asked for; answers are counted by it
}

// getAim asks for path, which leads to want.
func getAim(path, want string, link int) aim {
	return aim{
		request: []byte("GET " + path + " HTTP/1.1\r\nHost: hop.test\r\n\r\n"),
		want:    want,
		link:    link,
	}
}

// postAim sends body, which is JSON, to path.
func postAim(path, body, want string) aim {
	const head = "POST %s HTTP/1.1\r\nHost: hop.test\r\n" +
		"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
	return aim{request: fmt.Appendf(nil, head, path, len(body), body), want: want}
}

// loadAnswer is what a judge needs of a response. body is valid during the call only.
type loadAnswer struct {
	status     int
	location   string
	retryAfter bool
	body       []byte
}

// judge returns what is wrong with an answer, or "". It is called by many goroutines.
type judge func(aim, loadAnswer) string

// redirects is the judge of known codes.
func redirects(a aim, r loadAnswer) string {
	if r.status != 302 {
		return fmt.Sprintf("status %d", r.status)
	}
	if r.location != a.want {
		return "wrong Location"
	}
	return ""
}

// refusals is the judge of requests that nobody can answer now.
func refusals(_ aim, r loadAnswer) string {
	if r.status != 503 || !r.retryAfter {
		return fmt.Sprintf("status %d, Retry-After %t", r.status, r.retryAfter)
	}
	return ""
}

// notFounds is the judge of codes that PostgreSQL was asked for and does not have.
func notFounds(_ aim, r loadAnswer) string {
	if r.status != 404 {
		return fmt.Sprintf("status %d", r.status)
	}
	return ""
}

// shot is one request that was made. Times are since the load began.
type shot struct {
	due    time.Duration
	sent   time.Duration // 0 when it never left: the connection was refused
	done   time.Duration
	aim    int32
	status int16  // 0: no answer
	why    string // what is wrong; "" if all is well
}

// unanswered says that the server may have got the request and the client does not know.
func (s shot) unanswered() bool {
	return s.sent > 0 && s.status == 0
}

// load is a running load.
type load struct {
	addr     string
	aims     []aim
	judge    judge
	begin    time.Time
	due      chan job
	stopping chan struct{}
	stopOnce sync.Once
	workers  sync.WaitGroup

	mu    sync.Mutex // guards shots
	shots []shot
}

// job is a request that is due.
type job struct {
	due time.Duration
	aim int32
}

// startLoad sends the aims in turn, over and over, rate a second over conns connections, which are
// open before the first leaves.
func startLoad(t testing.TB, url string, rate, conns int, aims []aim, judge judge) *load {
	t.Helper()
	return beginLoad(t, url, rate, conns, 1<<62, aims, judge)
}

// burst sends one aim n times at once, over n connections, and waits for all answers.
func burst(t testing.TB, url string, n int, a aim, judge judge) *load {
	t.Helper()
	l := beginLoad(t, url, 1e9, n, n, []aim{a}, judge)
	l.workers.Wait()
	return l
}

// beginLoad is startLoad for at most n requests.
func beginLoad(t testing.TB, url string, rate, conns, n int, aims []aim, judge judge) *load {
	t.Helper()
	l := &load{
		addr:     strings.TrimPrefix(url, "http://"),
		aims:     aims,
		judge:    judge,
		due:      make(chan job, 1<<17),
		stopping: make(chan struct{}),
	}
	var connected sync.WaitGroup
	connected.Add(conns)
	for range conns {
		l.workers.Go(func() { l.work(connected.Done) })
	}
	connected.Wait()
	l.begin = time.Now()
	go l.schedule(rate, n)
	t.Cleanup(l.stop)
	return l
}

// schedule makes n requests due, or fewer if the load is stopped.
func (l *load) schedule(rate, n int) {
	defer close(l.due)
	for i := range n {
		due := time.Duration(i) * time.Second / time.Duration(rate)
		wait := due - time.Since(l.begin)
		if wait > 0 {
			select {
			case <-time.After(wait):
			case <-l.stopping:
				return
			}
		}
		// The channel has room for half a minute of the full load: it blocks only when nothing at
		// all is answered.
		l.due <- job{due, int32(i % len(l.aims))}
	}
}

// stop lets no more become due, waits for all answers and closes the connections.
func (l *load) stop() {
	l.stopOnce.Do(func() { close(l.stopping) })
	l.workers.Wait()
}

// work is one connection.
func (l *load) work(connected func()) {
	c, _ := dialLoad(l.addr) // whoever is refused tries again with each request
	connected()
	var shots []shot
	for j := range l.due {
		var s shot
		s, c = l.shoot(c, j)
		shots = append(shots, s)
	}
	if c != nil {
		c.Close()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shots = append(l.shots, shots...)
}

// shoot makes one request over c, or over a new connection if c is nil. It returns the connection
// for the next request, nil if there is none.
func (l *load) shoot(c *loadConn, j job) (shot, *loadConn) {
	s := shot{due: j.due, aim: j.aim}
	if c == nil {
		var err error
		if c, err = dialLoad(l.addr); err != nil {
			s.why = "refused"
			s.done = time.Since(l.begin)
			return s, nil
		}
	}
	s.sent = max(1, time.Since(l.begin))
	a := l.aims[j.aim]
	r, reusable, err := c.do(a.request)
	if err != nil {
		s.why = "broken: " + innermost(err).Error()
	} else {
		s.status = int16(r.status)
		s.why = l.judge(a, r)
	}
	s.done = time.Since(l.begin)
	if !reusable {
		c.Close()
		c = nil
	}
	return s, c
}

// innermost is an error without what wraps it: without addresses, so that equal ones add up.
func innermost(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}

// loadConn is a connection with its buffers.
type loadConn struct {
	net.Conn
	in   *bufio.Reader
	body []byte
}

// dialLoad connects to addr.
func dialLoad(addr string) (*loadConn, error) {
	c, err := net.DialTimeout("tcp", addr, 2*time.Second)
	if err != nil {
		return nil, err
	}
	return &loadConn{Conn: c, in: bufio.NewReaderSize(c, 2048)}, nil
}

// do makes one request. reusable is false after an error, and when the server said that it will
// close.
func (c *loadConn) do(request []byte) (r loadAnswer, reusable bool, err error) {
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write(request); err != nil {
		return r, false, err
	}
	line, err := c.in.ReadSlice('\n')
	if err != nil {
		return r, false, err
	}
	if len(line) < 13 {
		return r, false, errors.New("no status line")
	}
	r.status, err = strconv.Atoi(string(line[9:12]))
	if err != nil {
		return r, false, err
	}
	length := 0
	reusable = true
	for {
		line, err := c.in.ReadSlice('\n')
		if err != nil {
			return r, false, err
		}
		name, value, ok := bytes.Cut(bytes.TrimRight(line, "\r\n"), []byte(": "))
		if !ok {
			break
		}
		switch textproto.CanonicalMIMEHeaderKey(string(name)) { // HAProxy writes small letters
		case "Location":
			r.location = string(value)
		case "Retry-After":
			r.retryAfter = true
		case "Connection":
			if string(value) == "close" {
				reusable = false
			}
		case "Transfer-Encoding": // chunks are not read
			reusable = false
		case "Content-Length":
			length, err = strconv.Atoi(string(value))
			if err != nil {
				return r, false, err
			}
		}
	}
	c.body = slices.Grow(c.body[:0], length)[:length]
	if _, err := io.ReadFull(c.in, c.body); err != nil {
		return r, false, err
	}
	r.body = c.body
	return r, reusable, nil
}

// span is a part of a load.
type span struct{ from, to time.Duration }

// whole is the span of everything.
var whole = span{0, 1 << 62}

// now is how long the load runs.
func (l *load) now() time.Duration {
	return time.Since(l.begin)
}

// during runs the load for d more and returns that span of it.
func (l *load) during(d time.Duration) span {
	from := l.now()
	time.Sleep(d)
	return span{from, l.now()}
}

// figures are what came of the requests of a span.
type figures struct {
	n, failed       int
	p50, p99, worst time.Duration
	statuses        map[int]int
	whys            map[string]int
}

// figures stops the load and counts the requests that were due in a span.
func (l *load) figures(s span) figures {
	l.stop()
	f := figures{statuses: map[int]int{}, whys: map[string]int{}}
	var took []time.Duration
	for _, shot := range l.shots {
		if shot.due < s.from || shot.due >= s.to {
			continue
		}
		f.n++
		f.statuses[int(shot.status)]++
		if shot.why != "" {
			f.failed++
			f.whys[shot.why]++
		}
		took = append(took, shot.done-shot.due)
	}
	if f.n == 0 {
		return f
	}
	slices.Sort(took)
	f.p50 = took[f.n/2]
	f.p99 = took[f.n*99/100]
	f.worst = took[f.n-1]
	return f
}

// add adds the counts of another load. Latencies are those of the slower one.
func (f figures) add(other figures) figures {
	sum := figures{
		n:        f.n + other.n,
		failed:   f.failed + other.failed,
		p50:      max(f.p50, other.p50),
		p99:      max(f.p99, other.p99),
		worst:    max(f.worst, other.worst),
		statuses: map[int]int{},
		whys:     map[string]int{},
	}
	for _, one := range []figures{f, other} {
		for status, n := range one.statuses {
			sum.statuses[status] += n
		}
		for why, n := range one.whys {
			sum.whys[why] += n
		}
	}
	return sum
}

// failures is "failed 3 of 60000", and why.
func (f figures) failures() string {
	text := fmt.Sprintf("failed %d of %d", f.failed, f.n)
	for _, why := range slices.Sorted(maps.Keys(f.whys)) {
		text += fmt.Sprintf(" (%d %s)", f.whys[why], why)
	}
	return text
}

// answered stops the load and counts, by link, the requests that were answered with status.
func (l *load) answered(status int) map[int]int64 {
	l.stop()
	n := map[int]int64{}
	for _, s := range l.shots {
		if int(s.status) == status {
			n[l.aims[s.aim].link]++
		}
	}
	return n
}

// short is a duration for people.
func short(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.2f ms", float64(d)/1e6)
	case d < time.Second:
		return fmt.Sprintf("%.0f ms", float64(d)/1e6)
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
