package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestIdempotentAtOnce sends one create many times at once to two replicas: one link, and every
// answer is the same.
func TestIdempotentAtOnce(t *testing.T) {
	dsn := testDatabase(t)
	replicas := []*app{startApp(t, "DATABASE_URL="+dsn), startApp(t, "DATABASE_URL="+dsn)}
	for _, body := range []string{
		`{"url":"https://example.com/random"}`,
		`{"url":"https://example.com/custom","custom_code":"custom"}`,
	} {
		answers := make([]reply, 40)
		var senders sync.WaitGroup
		for i := range answers {
			senders.Go(func() {
				to := replicas[i%2].url + "/shorten"
				for answers[i].status == 0 || answers[i].status == 503 {
					answers[i], _ = roundTrip("POST", to, body, "Idempotency-Key: one")
				}
			})
		}
		senders.Wait()
		for _, r := range answers {
			if r.status != 201 || r.body != answers[0].body ||
				r.header.Get("ETag") != answers[0].header.Get("ETag") {
				t.Fatalf("%s: %d %s, and before %s", body, r.status, r.body, answers[0].body)
			}
		}
	}
	db := openDB(t, dsn)
	links := scalar[int](t, db, `SELECT count(*) FROM urls`)
	created := scalar[int](t, db, `SELECT count(*) FROM events WHERE event_type = 'created'`)
	if links != 2 || created != 2 {
		t.Errorf("%d links, %d created events", links, created)
	}
}

// TestIdempotencyKeysOfTokens: a key belongs to the token that it was sent with.
func TestIdempotencyKeysOfTokens(t *testing.T) {
	other := strings.Repeat("y", minToken)
	a := startApp(t, "API_TOKEN="+anyToken+","+other)
	codes := map[string]bool{}
	for _, token := range []string{anyToken, other, anyToken} {
		l := get[wireLink](t, a, 201, "POST", "/shorten", `{"url":"https://example.com/"}`,
			"Authorization: Bearer "+token, "Idempotency-Key: one")
		codes[l.ShortCode] = true
	}
	if len(codes) != 2 {
		t.Errorf("two tokens made %d links", len(codes))
	}
}

// TestIdempotentForms sends a create again in another form.
func TestIdempotentForms(t *testing.T) {
	a := startApp(t)
	const key = "Idempotency-Key: one"
	user := get[wireUser](t, a, 201, "POST", "/users", annJSON)
	first := get[wireLink](t, a, 201, "POST", "/urls", fmt.Sprintf(`{"user_id":%d,
		"url":" https://example.com/ü ","expires_at":"2099-01-01T00:00:00Z","is_active":false}`,
		user.ID), key)
	again := get[wireLink](t, a, 201, "POST", "/urls", fmt.Sprintf(
		"user_id=%d&original_url=https://example.com/%%C3%%BC&is_active=no&"+
			"expires_at=2099-01-01T00:00:00", user.ID),
		key, "Content-Type: application/x-www-form-urlencoded")
	if first.ID != again.ID {
		t.Errorf("made %+v, and again %+v", first, again)
	}
}

// TestETagOfConcurrentChanges lets many clients read a link and change it, each naming the version
// that it read: no change is lost.
func TestETagOfConcurrentChanges(t *testing.T) {
	dsn := testDatabase(t)
	replicas := []*app{startApp(t, "DATABASE_URL="+dsn), startApp(t, "DATABASE_URL="+dsn)}
	link := addLink(t, replicas[0], "https://example.com/", "counter")
	path := fmt.Sprintf("/urls/%d", link.ID)
	get[wireLink](t, replicas[0], 200, "PUT", path, `{"title":"0"}`)
	const clients, changes = 6, 5
	var refused atomic.Int64
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			for done := 0; done < changes; {
				url := replicas[(i+done)%2].url + path
				status, err := addOne(url)
				if err != nil || status != 200 && status != 412 {
					t.Errorf("status %d, %v", status, err)
					return
				}
				if status == 200 {
					done++
				} else {
					refused.Add(1)
				}
			}
		})
	}
	all.Wait()
	after := get[wireLink](t, replicas[0], 200, "GET", path, "")
	if *after.Title != fmt.Sprint(clients*changes) || refused.Load() == 0 {
		t.Errorf("the title is %s after %d changes, %d refused", *after.Title, clients*changes,
			refused.Load())
	}
	known := do(t, "GET", replicas[1].url+path, "")
	tag := known.header.Get("ETag")
	same := do(t, "GET", replicas[0].url+path, "", `If-None-Match: "x", W/`+tag)
	if same.status != 304 || same.body != "" || same.header.Get("ETag") != tag {
		t.Errorf("%s again: %d %q", tag, same.status, same.body)
	}
}

// addOne reads the number in a link's title and writes the next one, if nobody else has meanwhile.
func addOne(url string) (status int, err error) {
	read, err := roundTrip("GET", url, "")
	if err != nil {
		return 0, err
	}
	var l struct{ Title string }
	if err := json.Unmarshal([]byte(read.body), &l); err != nil {
		return 0, err
	}
	var n int
	if _, err := fmt.Sscan(l.Title, &n); err != nil {
		return 0, err
	}
	wrote, err := roundTrip("PUT", url, fmt.Sprintf(`{"title":"%d"}`, n+1),
		"If-Match: "+read.header.Get("ETag"))
	return wrote.status, err
}

// TestETagOfOwner: the removal of a link's owner is a new version.
func TestETagOfOwner(t *testing.T) {
	a := startApp(t)
	user := get[wireUser](t, a, 201, "POST", "/users", annJSON)
	made := do(t, "POST", a.url+"/urls",
		fmt.Sprintf(`{"user_id":%d,"url":"https://example.com/"}`, user.ID))
	do(t, "DELETE", fmt.Sprintf("%s/users/%d", a.url, user.ID), "")
	read := do(t, "GET", a.url+"/urls/1", "", "If-None-Match: "+made.header.Get("ETag"))
	if made.status != 201 || read.status != 200 {
		t.Errorf("made: %d; read after its owner was removed: %d", made.status, read.status)
	}
}

// ---- creates while everything dies ----

// TestIdempotentThroughKills makes links with keys, 200 a second, on two replicas, while these are
// killed and PostgreSQL crashes. Who gets no 201 sends the same request again to the other replica,
// and some of those who got one do too, as if they had not seen it. In the end there is one link
// for each key.
func TestIdempotentThroughKills(t *testing.T) {
	rate := full(200, 50)
	rounds := full(12, 2)
	pause := full(2*time.Second, 700*time.Millisecond)
	pg := startPostgres(t)
	redis := startRedis(t)
	settings := []string{
		"DATABASE_URL=" + pg.url, "REDIS_URL=" + redis.url, "BASE_URL=http://hop.test",
	}
	replicas := []*process{startHop(t, settings...), startHop(t, settings...)}
	c := &keyedClients{urls: []string{replicas[0].url, replicas[1].url}}
	c.start(rate)
	for round := range rounds {
		time.Sleep(pause)
		switch round % 3 {
		case 0:
			replicas[round/3%2].kill()
			time.Sleep(pause / 4)
			replicas[round/3%2].start(t)
		case 1:
			crashPostgres(t, pg)
		case 2:
			replicas[0].kill()
			replicas[1].kill()
			crashPostgres(t, pg)
			replicas[0].start(t)
			replicas[1].start(t)
		}
	}
	time.Sleep(pause)
	c.stop()

	db := openDB(t, pg.url)
	links := scalar[int64](t, db, `SELECT count(*) FROM urls`)
	targets := scalar[int64](t, db, `SELECT count(DISTINCT original_url) FROM urls`)
	events := scalar[int64](t, db, `SELECT count(*) FROM events WHERE event_type = 'created'`)
	keys := c.keys.Load()
	fmt.Printf("IDEMPOTENCY | %d keys, %d links, %d targets, %d created events | %d requests, "+
		"%d broken or 503, %d sent again after a 201, %d answered differently\n",
		keys, links, targets, events, c.sent.Load(), c.failed.Load(), c.repeated.Load(),
		c.different.Load())
	if links != keys || targets != keys || events != keys || c.different.Load() != 0 {
		t.Error("links and keys differ")
	}
	if c.failed.Load() == 0 || c.repeated.Load() == 0 {
		t.Error("nothing was disturbed")
	}
	if wrong := c.wrong(); wrong != "" {
		t.Errorf("answered: %s", wrong)
	}
	replicas[0].end(syscall.SIGTERM)
	replicas[1].end(syscall.SIGTERM)
	if !balanced(t, pg.url) {
		t.Error("the books do not balance")
	}
}

// keyedClients make links, each with a key of its own, and do not rest until they have a 201.
type keyedClients struct {
	urls []string // of the replicas

	keys, sent, failed, repeated, different atomic.Int64

	ending  chan struct{}
	running sync.WaitGroup

	mu    sync.Mutex // guards first
	first string     // answer that should not have been
}

// start makes rate links a second until stop.
func (c *keyedClients) start(rate int) {
	c.ending = make(chan struct{})
	c.running.Go(func() {
		tick := time.NewTicker(time.Second / time.Duration(rate))
		defer tick.Stop()
		for n := 0; ; n++ {
			select {
			case <-tick.C:
				c.keys.Add(1)
				c.running.Go(func() { c.make(n) })
			case <-c.ending:
				return
			}
		}
	})
}

// stop lets no more begin, and waits until all have their link.
func (c *keyedClients) stop() {
	close(c.ending)
	c.running.Wait()
}

// make makes link n. Every fifth is asked for once more after it was made, and every third has a
// code of the client's choice.
func (c *keyedClients) make(n int) {
	body := fmt.Sprintf(`{"url":"https://example.com/keyed/%d"}`, n)
	if n%3 == 0 {
		body = fmt.Sprintf(`{"url":"https://example.com/keyed/%d","custom_code":"k%d"}`, n, n+100)
	}
	first := c.insist(n, n, body)
	if n%5 == 0 {
		c.repeated.Add(1)
		if c.insist(n, n+1, body) != first {
			c.different.Add(1)
		}
	}
}

// insist sends a create until it is answered with 201, and returns that answer's body. to chooses
// the replica that is asked first.
func (c *keyedClients) insist(n, to int, body string) string {
	const insistFor = 3 * time.Minute
	wait := 50 * time.Millisecond
	for began := time.Now(); time.Since(began) < insistFor; to++ {
		c.sent.Add(1)
		r, err := roundTrip("POST", c.urls[to%len(c.urls)]+"/shorten", body,
			fmt.Sprintf("Idempotency-Key: key %d", n))
		if err == nil && r.status == 201 {
			return strings.Replace(r.body, `,"cache":"pending"`, "", 1)
		}
		if err == nil && r.status != 503 {
			c.note(fmt.Sprintf("%d %s", r.status, r.body))
		}
		c.failed.Add(1)
		time.Sleep(wait)
		wait = min(2*wait, time.Second) // what Retry-After says
	}
	c.note("nobody answers")
	return ""
}

// note keeps the first wrong answer.
func (c *keyedClients) note(answer string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.first == "" {
		c.first = answer
	}
}

// wrong is the first wrong answer, or "".
func (c *keyedClients) wrong() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.first
}
