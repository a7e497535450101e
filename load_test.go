package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// An open-loop load: requests leave when they are due, however long the others take, and a latency counts from that time, so
// that a stall shows in all it delayed. The client speaks HTTP/1.1 by hand: net/http's would cost more than the server does.

// aim is one request: its bytes, and for a redirect where it must lead.
type aim struct {
	request []byte
	want    string
}

func getAim(path, want string) aim {
	return aim{[]byte("GET " + path + " HTTP/1.1\r\nHost: hop.test\r\n\r\n"), want}
}

func postAim(path, body, want string) aim {
	return aim{fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: hop.test\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body), want}
}

// answer is what a judge needs of a response. body is valid during the call only.
type answer struct {
	status     int
	location   string
	retryAfter bool
	body       []byte
}

// judge returns what is wrong with an answer, or "". It is called by many goroutines.
type judge func(aim, answer) string

// redirects is the judge of known codes.
func redirects(a aim, r answer) string {
	if r.status != 302 {
		return fmt.Sprintf("status %d", r.status)
	}
	if r.location != a.want {
		return "wrong Location"
	}
	return ""
}

// refusals is the judge of requests that nobody can answer now.
func refusals(_ aim, r answer) string {
	if r.status != 503 || !r.retryAfter {
		return fmt.Sprintf("status %d, Retry-After %t", r.status, r.retryAfter)
	}
	return ""
}

// shot is one request that was made. Times are since the load began.
type shot struct {
	due, sent, done time.Duration // sent is 0 when it never left: the connection was refused
	aim             int32
	status          int16  // 0: no answer
	why             string // "" if all was well
}

// unanswered says that the server may have got it and the client does not know.
func (s shot) unanswered() bool { return s.sent > 0 && s.status == 0 }

// load is a running load.
type load struct {
	addr     string
	aims     []aim
	judge    judge
	begin    time.Time
	due      chan job
	stopping chan struct{}
	workers  sync.WaitGroup

	mu    sync.Mutex // guards shots
	shots []shot
}

type job struct {
	due time.Duration
	aim int32
}

// startLoad sends the aims in turn, over and over, rate a second over conns connections, which are open before the first leaves.
func startLoad(t testing.TB, url string, rate, conns int, aims []aim, judge judge) *load {
	t.Helper()
	return beginLoad(t, url, rate, conns, 1<<62, aims, judge)
}

// burst sends one aim n times at once, over n connections.
func burst(t testing.TB, url string, n int, a aim, judge judge) *load {
	t.Helper()
	l := beginLoad(t, url, 1e9, n, n, []aim{a}, judge)
	l.workers.Wait()
	return l
}

// beginLoad is startLoad for at most n requests.
func beginLoad(t testing.TB, url string, rate, conns, n int, aims []aim, judge judge) *load {
	t.Helper()
	l := &load{addr: strings.TrimPrefix(url, "http://"), aims: aims, judge: judge, due: make(chan job, 1<<17), stopping: make(chan struct{})}
	var connected sync.WaitGroup
	connected.Add(conns)
	for range conns {
		l.workers.Add(1)
		go l.work(connected.Done)
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
		if wait := due - time.Since(l.begin); wait > 0 {
			select {
			case <-time.After(wait):
			case <-l.stopping:
				return
			}
		}
		l.due <- job{due, int32(i % len(l.aims))} // has room for half a minute of full load: nothing is answered then anyway
	}
}

// stop lets no more become due, waits for all answers and closes the connections.
func (l *load) stop() {
	select {
	case <-l.stopping:
	default:
		close(l.stopping)
	}
	l.workers.Wait()
}

// work is one connection.
func (l *load) work(connected func()) {
	defer l.workers.Done()
	var c *loadConn
	c, _ = dialLoad(l.addr)
	connected()
	var shots []shot
	for j := range l.due {
		s := shot{due: j.due, aim: j.aim}
		if c == nil {
			var err error
			if c, err = dialLoad(l.addr); err != nil {
				s.why = "refused"
			}
		}
		if c != nil {
			s.sent = max(1, time.Since(l.begin))
			r, reusable, err := c.do(l.aims[j.aim].request)
			if err != nil {
				s.why = "broken: " + plain(err)
			} else {
				s.status, s.why = int16(r.status), l.judge(l.aims[j.aim], r)
			}
			if err != nil || !reusable {
				c.Close()
				c = nil
			}
		}
		s.done = time.Since(l.begin)
		shots = append(shots, s)
	}
	if c != nil {
		c.Close()
	}
	l.mu.Lock()
	l.shots = append(l.shots, shots...)
	l.mu.Unlock()
}

// plain is an error without addresses, so that equal ones add up.
func plain(err error) string {
	for inner := err; inner != nil; inner = errors.Unwrap(inner) {
		err = inner
	}
	return err.Error()
}

// loadConn is a connection with its buffers.
type loadConn struct {
	net.Conn
	in   *bufio.Reader
	body []byte
}

func dialLoad(addr string) (*loadConn, error) {
	c, err := net.DialTimeout("tcp", addr, 2*time.Second)
	if err != nil {
		return nil, err
	}
	return &loadConn{Conn: c, in: bufio.NewReaderSize(c, 2048)}, nil
}

// do makes one request. reusable is false when the server said that it will close.
func (c *loadConn) do(request []byte) (r answer, reusable bool, err error) {
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err = c.Write(request); err != nil {
		return r, false, err
	}
	line, err := c.in.ReadSlice('\n')
	if err != nil {
		return r, false, err
	}
	if len(line) < 13 {
		return r, false, errors.New("no status line")
	}
	if r.status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return r, false, err
	}
	length, reusable := 0, true
	for {
		if line, err = c.in.ReadSlice('\n'); err != nil {
			return r, false, err
		}
		name, value, ok := bytes.Cut(bytes.TrimRight(line, "\r\n"), []byte(": "))
		if !ok {
			break
		}
		switch string(name) {
		case "Location":
			r.location = string(value)
		case "Retry-After":
			r.retryAfter = true
		case "Connection":
			reusable = reusable && string(value) != "close"
		case "Transfer-Encoding": // chunks are not read
			reusable = false
		case "Content-Length":
			length, _ = strconv.Atoi(string(value))
		}
	}
	c.body = slices.Grow(c.body[:0], length)[:length]
	_, err = io.ReadFull(c.in, c.body)
	r.body = c.body
	return r, reusable, err
}

// span is a part of a load.
type span struct{ from, to time.Duration }

// now is how long the load runs.
func (l *load) now() time.Duration { return time.Since(l.begin) }

// during runs the load for d more and returns that span of it.
func (l *load) during(d time.Duration) span {
	from := l.now()
	time.Sleep(d)
	return span{from, l.now()}
}

// whole is the span of everything.
var whole = span{0, 1 << 62}

// figures are what came of the requests of a span. They exist once the load is stopped.
type figures struct {
	n, failed       int
	p50, p99, worst time.Duration
	statuses        map[int]int
	whys            map[string]int
}

// figures counts the requests that were due in a span.
func (l *load) figures(s span) (f figures) {
	l.stop()
	f.statuses, f.whys = map[int]int{}, map[string]int{}
	var took []time.Duration
	for _, s1 := range l.shots {
		if s1.due < s.from || s1.due >= s.to {
			continue
		}
		f.n++
		f.statuses[int(s1.status)]++
		if s1.why != "" {
			f.failed++
			f.whys[s1.why]++
		}
		took = append(took, s1.done-s1.due)
	}
	slices.Sort(took)
	if n := len(took); n > 0 {
		f.p50, f.p99, f.worst = took[n/2], took[n*99/100], took[n-1]
	}
	return f
}

// failures is "failed 3 of 60000", and why.
func (f figures) failures() string {
	text := fmt.Sprintf("failed %d of %d", f.failed, f.n)
	for _, why := range slices.Sorted(maps.Keys(f.whys)) {
		text += fmt.Sprintf(" (%d %s)", f.whys[why], why)
	}
	return text
}

// count is how many requests were answered with status, per aim.
func (l *load) count(status int) map[int32]int64 {
	l.stop()
	n := map[int32]int64{}
	for _, s := range l.shots {
		if int(s.status) == status {
			n[s.aim]++
		}
	}
	return n
}

// short is d for people.
func short(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.2f ms", float64(d)/1e6)
	case d < time.Second:
		return fmt.Sprintf("%.0f ms", float64(d)/1e6)
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
