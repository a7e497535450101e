package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// TestCheckerConvictsNaiveCache shows that the coherence checker finds what it looks for. A small
// server stands in for hop, as caches are usually built, and as hop's own is built with one thing
// wrong. Beside each of these stands the same server with that thing right, which must pass.
func TestCheckerConvictsNaiveCache(t *testing.T) {
	for _, k := range []struct {
		design
		fault  fault
		direct bool // writers die after their commit
		wrong  bool
	}{
		{design: design{name: "usual, Redis only"}, wrong: true},
		{design: design{name: "usual, with a local map", local: true}, wrong: true},

		{design: design{name: "holds, not reserved", holds: true}, fault: evictCodes, wrong: true},
		{design: design{name: "holds, reserved", holds: true, reserves: true}, fault: evictCodes},

		{design: design{name: "polls, drops first", local: true, holds: true, reserves: true,
			polls: dropFirst}, direct: true, wrong: true},
		{design: design{name: "polls, holds first", local: true, holds: true, reserves: true,
			polls: holdFirst}, direct: true},
	} {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			c := naiveChecker(t, k.design)
			c.direct = k.direct
			rounds := uint64(6)
			if k.wrong {
				rounds = 40 // until it is found
			}
			for n := range rounds {
				c.run(500*time.Millisecond, *coherenceSeed+n, k.fault)
				c.judge()
				truth := c.truth() // nobody writes now, so what is wrong stays wrong
				if k.wrong {
					c.checkLocal(truth)
					c.checkRedis(truth)
				}
				found := c.stale > 0 && (c.left > 0 || k.fault != nil) // what is left is evicted, too
				if k.wrong && found {
					break
				}
			}
			c.report()
			switch {
			case c.wrong > 0:
				c.verdict()
			case k.wrong && (c.stale == 0 || c.left == 0 && k.fault == nil):
				t.Errorf("%d stale answers and %d wrong entries found", c.stale, c.left)
			case !k.wrong:
				c.verdict()
			}
		})
	}
}

// naiveNames are the names of the small servers' keys.
var naiveNames = keyNames{database: "naive", generation: "1"}

// naiveChecker prepares a run over small servers.
func naiveChecker(t *testing.T, d design) *checker {
	t.Helper()
	dsn := testDatabase(t)
	c := newChecker(t, d.name, dsn)
	c.elsewhere = trustFor
	c.redis = startRedis(t)
	c.names = func() keyNames { return naiveNames }
	for range replicaCount {
		n := newNaive(d, openDB(t, dsn), c)
		listening := httptest.NewServer(n)
		t.Cleanup(listening.Close)
		c.places = append(c.places, &place{url: listening.URL, local: n.entries})
	}
	return c
}

// design says how a small server is built.
type design struct {
	name     string
	local    bool // codes are kept in the process, too
	holds    bool // a change holds the key, before and after its commit; else it deletes the key
	reserves bool // only who has reserved a key fills it; else whoever finds none
	polls    pollOrder
}

// pollOrder is what a poll does with a changed code.
type pollOrder int

const (
	never     pollOrder = iota
	holdFirst           // in Redis, then drop it here
	dropFirst           // the other way round: a reader in between brings the old value back
)

// naive is the small server: GET SET and DEL around a table.
type naive struct {
	*http.ServeMux
	design
	db    *sql.DB
	store *Store
	pool  *redis.Pool

	mu    sync.Mutex        // guards what follows
	kept  map[string]target // the local map
	drops int               // counts drops: noted before a read, compared before its put
}

// newNaive starts a small server, which ends with the test.
func newNaive(d design, db *sql.DB, c *checker) *naive {
	n := &naive{ServeMux: http.NewServeMux(), design: d, db: db, store: c.store,
		kept: map[string]target{}}
	n.pool = &redis.Pool{MaxIdle: 16, Dial: c.redis.dialRedis}
	c.t.Cleanup(func() { n.pool.Close() })
	n.HandleFunc("GET /{code}", n.redirect)
	n.HandleFunc("POST /shorten", n.create)
	n.HandleFunc("PUT /urls/{id}", n.update)
	n.HandleFunc("DELETE /urls/{id}", n.remove)
	if d.polls != never {
		go n.poll(c.t.Context())
	}
	return n
}

// dawdle makes the usual races likely.
func dawdle() { time.Sleep(time.Duration(rand.Int64N(int64(30 * time.Millisecond)))) }

// do sends one command to Redis. An error is no value.
func (n *naive) do(command string, args ...any) any {
	conn := n.pool.Get()
	defer conn.Close()
	reply, _ := conn.Do(command, args...)
	return reply
}

// redirect answers from the local map, Redis or the table.
func (n *naive) redirect(w http.ResponseWriter, r *http.Request) {
	t := n.find(r.PathValue("code"))
	if t.id == 0 {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Location", t.location[0])
	w.WriteHeader(http.StatusFound)
}

// find says what code leads to.
func (n *naive) find(code string) target {
	n.mu.Lock()
	t, ok := n.kept[code]
	drops := n.drops
	n.mu.Unlock()
	if ok {
		return t
	}
	t = n.read(code)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.local && n.drops == drops {
		n.kept[code] = t
	}
	return t
}

// read asks Redis, then the table, and fills Redis.
func (n *naive) read(code string) target {
	key := naiveNames.code(code)
	value, _ := n.do("GET", key).([]byte)
	if t, ok := decodeTarget(value); ok {
		return t
	}
	token := ""
	if n.reserves && value == nil {
		token = "?" + newCode()
		if n.do("SET", key, token, "NX", "PX", reserveTTL.Milliseconds()) == nil {
			token = ""
		}
	}
	t := n.ask(code)
	dawdle()
	filling, ttl := encodeTarget(t)
	switch {
	case !n.reserves:
		n.do("SET", key, filling, "NX", "PX", ttl)
	case token != "":
		n.do("EVAL", fillScript, 1, key, token, filling, ttl)
	}
	return t
}

// ask asks the table.
func (n *naive) ask(code string) target {
	t := target{location: []string{""}}
	err := n.db.QueryRow(`SELECT id, original_url FROM urls WHERE short_code = $1 AND `+isLive,
		code).Scan(&t.id, &t.location[0])
	if err != nil {
		return target{}
	}
	return t
}

// create makes a link.
func (n *naive) create(w http.ResponseWriter, r *http.Request) {
	body := readNaive(r)
	if body.CustomCode == "" {
		body.CustomCode = newCode()
	}
	n.change(w, http.StatusCreated, body.CustomCode, `
		INSERT INTO urls (short_code, original_url, created_at, updated_at)
		VALUES ($1, $2, now(), now())`, body.CustomCode, body.OriginalURL)
}

// update changes a link.
func (n *naive) update(w http.ResponseWriter, r *http.Request) {
	body := readNaive(r)
	n.change(w, http.StatusOK, n.codeOf(r), `
		UPDATE urls SET original_url = COALESCE($2, original_url),
		                is_active = COALESCE($3, is_active)
		WHERE id = $1`, r.PathValue("id"), body.OriginalURL, body.IsActive)
}

// remove hides a link.
func (n *naive) remove(w http.ResponseWriter, r *http.Request) {
	n.change(w, http.StatusNoContent, n.codeOf(r),
		`UPDATE urls SET deleted_at = now() WHERE id = $1`, r.PathValue("id"))
}

// naiveBody is what a small server reads of a body.
type naiveBody struct {
	OriginalURL *string `json:"original_url"`
	CustomCode  string  `json:"custom_code"`
	IsActive    *bool   `json:"is_active"`
}

// readNaive reads a body. What is none is empty.
func readNaive(r *http.Request) naiveBody {
	var body naiveBody
	json.NewDecoder(r.Body).Decode(&body)
	return body
}

// codeOf is the code of the link that a request is about.
func (n *naive) codeOf(r *http.Request) string {
	var code string
	n.db.QueryRow(`SELECT short_code FROM urls WHERE id = $1`, r.PathValue("id")).Scan(&code)
	return code
}

// change runs a statement that changes what code leads to, and answers.
func (n *naive) change(w http.ResponseWriter, status int, code, statement string, args ...any) {
	key := naiveNames.code(code)
	if n.holds {
		n.do("SET", key, holdMark, "PX", holdTTL.Milliseconds())
	}
	var l link
	err := n.db.QueryRow(statement+` RETURNING `+linkCols, args...).Scan(linkDest(&l)...)
	if n.holds {
		n.do("SET", key, holdMark, "PX", holdTTL.Milliseconds())
	} else {
		n.do("DEL", key)
	}
	n.drop(code)
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.WriteHeader(status)
	if status != http.StatusNoContent {
		w.Write([]byte(jsonText(l)))
	}
}

// drop forgets code.
func (n *naive) drop(code string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.drops++
	delete(n.kept, code)
}

// entries are what the local map keeps.
func (n *naive) entries() []codeTarget {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []codeTarget
	for code, t := range n.kept {
		all = append(all, codeTarget{code, t})
	}
	return all
}

// poll asks the table for changes until ctx ends.
func (n *naive) poll(ctx context.Context) {
	seen := map[changedCode]bool{}
	var from uint64
	for ctx.Err() == nil {
		found, err := n.store.changesSince(ctx, from)
		if err == nil {
			from = found.next
		}
		for _, change := range found.codes {
			if !seen[change] {
				n.heard(change.code)
			}
			seen[change] = true
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// heard does with a changed code what the design says.
func (n *naive) heard(code string) {
	hold := func() {
		n.do("SET", naiveNames.code(code), holdMark, "PX", holdTTL.Milliseconds())
	}
	if n.polls == dropFirst {
		n.drop(code)
		dawdle()
		hold()
		return
	}
	hold()
	dawdle()
	n.drop(code)
}
