package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// The tier that replicas share, on a real Redis.

func TestRedisValues(t *testing.T) {
	tests := []struct {
		name  string
		value string
		want  target
		ok    bool
	}{
		{"link", "1 0 https://a.example/", target{1, []string{"https://a.example/"}, 0}, true},
		{"largest id", "1y2p0ij32e8e7 0 https://a.example/",
			target{1<<63 - 1, []string{"https://a.example/"}, 0}, true},
		{"end far away", "z 7clzj0g http://a.example/",
			target{35, []string{"http://a.example/"}, 16_000_000_000}, true},
		{"leads nowhere", "-", target{}, true},
		{"hold", "!", target{}, false},
		{"reservation", "?TOKEN", target{}, false},
		{"nothing", "", target{}, false},
		{"one word", "1", target{}, false},
		{"two words", "1 0", target{}, false},
		{"id 0", "0 0 https://a.example/", target{}, false},
		{"negative id", "-1 0 https://a.example/", target{}, false},
		{"id is no number", "! 0 https://a.example/", target{}, false},
		{"id too large", "zzzzzzzzzzzzzzzz 0 https://a.example/", target{}, false},
		{"end is no number", "1  https://a.example/", target{}, false},
		{"another program's", `{"url":"https://a.example/ "}`, target{}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := decodeTarget([]byte(tt.value))
			if ok != tt.ok || ok && !reflect.DeepEqual(got, tt.want) {
				t.Errorf("decodeTarget = %+v, %v; want %+v, %v", got, ok, tt.want, tt.ok)
			}
			if !tt.ok {
				return
			}
			if value, _ := encodeTarget(tt.want); value != tt.value {
				t.Errorf("encodeTarget = %q", value)
			}
		})
	}
}

// TestRedisTTLs is for how long values stand: never beyond a link's end, and not all equally long.
func TestRedisTTLs(t *testing.T) {
	whole := valueTTL.Milliseconds()
	tests := []struct {
		name      string
		expires   time.Duration // from now; 0 is never
		low, high int64         // ms
	}{
		{"never ends", 0, whole * 9 / 10, whole * 11 / 10},
		{"ends in half a minute", 30 * time.Second, 28_000, 30_000},
		{"ends just before the value would", valueTTL - 10*time.Second, whole * 8 / 10, whole},
		{"ends now", time.Nanosecond, 1, 1},
		{"has ended", -time.Hour, 1, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			link := linkTo(1)
			if tt.expires != 0 {
				link.expires = time.Now().Add(tt.expires).Unix()
			}
			different := map[int64]bool{}
			for range 100 {
				_, ttl := encodeTarget(link)
				if ttl < tt.low || ttl > tt.high {
					t.Fatalf("%d ms, want %d to %d", ttl, tt.low, tt.high)
				}
				different[ttl] = true
			}
			if tt.expires == 0 && len(different) < 5 {
				t.Errorf("only %d different times of 100", len(different))
			}
		})
	}
	if _, ttl := encodeTarget(target{}); ttl != unknownTTL.Milliseconds() {
		t.Errorf("what leads nowhere stands for %d ms", ttl)
	}
}

// TestReservations is the compare-and-set that keeps an old value from coming back.
func TestReservations(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	r := newReplica(t, server, newFakeSource()).redis
	key := func(code string) string { return r.names.Load().code(code) }
	fresh := linkTo(1)
	value, _ := encodeTarget(fresh)
	nothing := func(string) {}
	tests := []struct {
		name      string
		first     string            // what stands under the key before
		refused   bool              // there is no reservation to be had
		meanwhile func(code string) // between reservation and fill
		fill      target
		want      string // what stands under the key at the end; "?" is another's reservation
	}{
		{name: "undisturbed", meanwhile: nothing, fill: fresh, want: value},
		{name: "leads nowhere", meanwhile: nothing, fill: target{}, want: unknownMark},
		{name: "held", first: holdMark, refused: true, want: holdMark},
		{name: "reserved by another", first: "?OTHER", refused: true, want: "?OTHER"},
		{name: "filled by another", first: unknownMark, refused: true, want: unknownMark},
		{name: "held meanwhile", fill: fresh, want: holdMark,
			meanwhile: func(code string) { r.hold([]string{"other", code}) }},
		{name: "made meanwhile", fill: target{}, want: holdMark,
			meanwhile: func(code string) { r.holdAndTell([]string{code}) }},
		{name: "flushed meanwhile", fill: fresh, want: "",
			meanwhile: func(code string) { say("DEL", key(code)) }},
		{name: "expired meanwhile", fill: fresh, want: "",
			meanwhile: func(code string) { expire(t, say, key(code)) }},
		{name: "expired and reserved by another", fill: fresh, want: "?",
			meanwhile: func(code string) {
				expire(t, say, key(code))
				if r.reserve(code) == "" {
					t.Error("after its end it cannot be reserved again")
				}
			}},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			code := fmt.Sprint("code", i)
			if tt.first != "" {
				say("SET", key(code), tt.first)
			}
			token := r.reserve(code)
			if (token == "") != tt.refused {
				t.Fatalf("reserve = %q, refused: want %v", token, tt.refused)
			}
			if !tt.refused {
				checkTTL(t, say, key(code), time.Millisecond, reserveTTL)
				tt.meanwhile(code)
				r.fill(code, token, tt.fill)
			}
			got := text(say("GET", key(code)))
			others := tt.want == "?" && strings.HasPrefix(got, "?") && got != token
			if got != tt.want && !others {
				t.Errorf("the key holds %q, want %q", got, tt.want)
			}
			switch got {
			case value:
				checkTTL(t, say, key(code), valueTTL*8/10, valueTTL*11/10)
			case unknownMark:
				if tt.first == "" {
					checkTTL(t, say, key(code), time.Second, unknownTTL)
				}
			case holdMark:
				if tt.first == "" {
					checkTTL(t, say, key(code), time.Second, holdTTL)
				}
			}
		})
	}
	if holdTTL <= reserveTTL || reserveTTL <= 2*answerWithin {
		t.Error("a hold must outlive reservations, and they the questions under them")
	}
}

// TestFillsAreBounded has as many fills under way as there may be: what comes on top is answered,
// and Redis does not get it.
func TestFillsAreBounded(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	c := newReplica(t, server, newFakeSource("one", "two"))
	if !c.redis.fills.enterAll(maxFills) {
		t.Fatal("fewer than maxFills find room")
	}
	c.resolves(t, "one", 1, 1)
	if got := text(say("GET", c.key("one"))); got != "" {
		t.Errorf("beyond maxFills Redis holds %q", got)
	}
	if token := c.redis.reserve("two"); token != "" {
		t.Error("beyond maxFills a code is reserved, which nobody will fill")
	}
	c.redis.fills.leaveAll(maxFills)
	c.resolves(t, "two", 1, 1)
	if got := text(say("GET", c.key("two"))); got == "" {
		t.Error("when there is room again, Redis gets nothing")
	}
}

// TestRedisGets asks for many codes at once: each gets its own value, whichever batch it was in.
func TestRedisGets(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	r := newReplica(t, server, newFakeSource()).redis
	const codes = 300
	for i := range codes {
		if i%3 != 0 {
			say("SET", r.names.Load().code(fmt.Sprint("code", i)), fmt.Sprint("value", i))
		}
	}
	var all sync.WaitGroup
	for i := range codes {
		all.Go(func() {
			got, err := r.get(t.Context(), fmt.Sprint("code", i))
			want := fmt.Sprint("value", i)
			if err != nil || i%3 == 0 && got != nil || i%3 != 0 && string(got) != want {
				t.Errorf("get %d = %q, %v", i, got, err)
			}
		})
	}
	all.Wait()
}

// TestKeyNames lets two databases share a Redis: neither sees what the other keeps.
func TestKeyNames(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	ids := []string{"AAAAAAAAAAAAAAAAAAAAAAAAAA", "BBBBBBBBBBBBBBBBBBBBBBBBBB"}
	var caches []*replica
	for i, id := range ids {
		pg := newFakeSource()
		pg.set("same", int64(i+1))
		tier := openTier(t, server)
		tier.know(id)
		c := newCache(tier, newLocalTier(640), pg)
		r := &replica{Cache: c, pg: pg, poller: newPoller(c)}
		r.poll()
		caches = append(caches, r)
	}
	for i, r := range caches {
		r.resolves(t, "same", int64(i+1), 1)
	}
	caches[0].change("same", func() error { return nil })
	if got := text(say("GET", caches[1].key("same"))); !strings.HasPrefix(got, "2 ") {
		t.Errorf("a change in one database leaves %q in the other's", got)
	}
	keys, err := redis.Strings(say("KEYS", "*"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range keys {
		first := strings.HasPrefix(key, "hop:AAAAAAAA:")
		second := strings.HasPrefix(key, "hop:BBBBBBBB:")
		if !first && !second {
			t.Errorf("the key %q does not name its database", key)
		}
	}
	caches[0].redis.know(ids[1])
	if caches[0].redis.usable() {
		t.Error("after its database has become another, Redis is read without a poll")
	}
	// A code cannot be mistaken for the keys beside it: it holds no colon.
	n := keyNames{database: "d", generation: "g"}
	for _, name := range []string{n.current(), n.cursor(), n.warm(), n.lease(), n.channel()} {
		if code, found := strings.CutPrefix(name, n.code("")); found && validCode(code) {
			t.Errorf("%q is also the key of the code %q", name, code)
		}
	}
}

// TestRedisRefuses takes commands away from hop's user: each is logged once, with Redis's words,
// and hop does without.
func TestRedisRefuses(t *testing.T) {
	server := startRedis(t)
	say := sayTo(t, server.url)
	say("ACL", "SETUSER", "hop", "on", ">secret", "~hop:*", "&hop:*", "+@all", "-publish")
	url := strings.Replace(server.url, "redis://", "redis://hop:secret@", 1)
	logs := &syncBuffer{}
	pg := newFakeSource("abc")
	c := newReplica(t, url, pg)
	c.redis.log = slog.New(slog.NewTextHandler(logs, nil))
	for range 3 {
		pending, err := c.change("abc", func() error { return nil })
		if pending || err != nil {
			t.Errorf("without PUBLISH a change is pending: %v, %v; its hold stands", pending, err)
		}
	}
	if got := text(say("GET", c.key("abc"))); got != holdMark || !c.redis.usable() {
		t.Errorf("Redis holds %q, usable %v", got, c.redis.usable())
	}
	say("ACL", "SETUSER", "hop", "-set")
	for range 3 {
		pending, err := c.change("abc", func() error { return nil })
		if !pending || err != nil {
			t.Errorf("without SET, change = %v, %v; want true, nil", pending, err)
		}
		c.poll()
	}
	if c.redis.usable() {
		t.Error("a Redis that takes no holds is read")
	}
	c.resolves(t, "abc", 1, 1)
	lines := strings.Split(strings.TrimSpace(logs.String()), "\n")
	if len(lines) != 2 || strings.Count(logs.String(), "NOPERM") != 2 {
		t.Errorf("want one line for each of two commands:\n%s", logs)
	}

	say("ACL", "SETUSER", "hop", "+set")
	c.poll()
	if c.redis.usable() {
		t.Error("what Redis refused is tried again at once")
	}
	c.poller.retryAt = time.Time{}
	c.poll()
	if !c.redis.usable() {
		t.Error("Redis refuses nothing any more, and is not used")
	}
}

// TestListen tells a replica of changes, through a Redis that cuts its connections.
func TestListen(t *testing.T) {
	server := testRedis(t)
	say := sayTo(t, server)
	c := newReplica(t, server, newFakeSource())
	var mu sync.Mutex // guards heard
	var heard []string
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		c.redis.listen(ctx, func(code string) {
			mu.Lock()
			defer mu.Unlock()
			heard = append(heard, code)
		})
		close(done)
	}()
	hears := func(codes ...string) func() bool {
		return func() bool {
			c.redis.holdAndTell(codes)
			mu.Lock()
			defer mu.Unlock()
			return len(heard) >= len(codes) && slices.Equal(heard[len(heard)-len(codes):], codes)
		}
	}
	eventually(t, patience, "it hears", hears("one"))
	eventually(t, patience, "it hears several", hears("two", "three"))
	say("CLIENT", "KILL", "TYPE", "pubsub")
	eventually(t, patience, "it hears again", hears("four"))
	cancel()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Error("it listens on although its context has ended")
	}
}

// ---- helpers ----

// sayTo returns a function that sends commands to Redis; an error of Redis fails the test.
func sayTo(t testing.TB, url string) func(command string, args ...any) any {
	t.Helper()
	conn, err := redis.DialURL(url, redis.DialReadTimeout(5*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	var mu sync.Mutex // one command at a time
	return func(command string, args ...any) any {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		reply, err := conn.Do(command, args...)
		if err != nil && !errors.Is(err, redis.ErrNil) {
			t.Errorf("%s %v: %v", command, args, err)
		}
		return reply
	}
}

// text is a reply as text, "" for none.
func text(reply any) string {
	s, _ := redis.String(reply, nil) // an error is "none"
	return s
}

// expire lets a key reach its end.
func expire(t testing.TB, say func(string, ...any) any, key string) {
	t.Helper()
	say("PEXPIRE", key, 1)
	eventually(t, patience, key+" ends", func() bool { return say("EXISTS", key) == int64(0) })
}

// checkTTL holds what is left of a key's time against bounds.
func checkTTL(t testing.TB, say func(string, ...any) any, key string, low, high time.Duration) {
	t.Helper()
	ms, _ := say("PTTL", key).(int64)
	left := time.Duration(ms) * time.Millisecond
	if left < low || left > high {
		t.Errorf("%s has %v left, want %v to %v", key, left, low, high)
	}
}

// TestRedisMoves: the Sentinels name another server while the old one still answers. From the first
// connection to the new one on, Redis is not read until a poll, and no connection leads to the old.
func TestRedisMoves(t *testing.T) {
	servers := []*process{startRedis(t), startRedis(t)}
	var named atomic.Int64
	sentinel := startSentinelStub(t, func() int { return servers[named.Load()].port })
	r := openTier(t, "redis+sentinel://"+sentinel+"/mymaster")
	r.names.Store(&keyNames{database: "d", generation: "g"})
	for i, server := range servers {
		server.redisDo(t, "SET", "server", i)
		server.redisDo(t, "SET", r.names.Load().code("abc"), fmt.Sprintf("1 0 https://%d/", i))
	}
	r.readable.Store(true)
	value, err := r.get(t.Context(), "abc")
	if err != nil || string(value) != "1 0 https://0/" {
		t.Fatalf("%q, %v", value, err)
	}
	taken := r.pool.Get() // the first server's; the next one must be dialled
	named.Store(1)
	if value, err := r.get(t.Context(), "abc"); !errors.Is(err, errRedisDown) {
		t.Errorf("read before a poll: %q, %v", value, err)
	}
	if r.missed.Load() == 0 || r.readable.Load() {
		t.Error("the next poll will not know that Redis has moved")
	}
	taken.Close()
	for range 3 {
		conn := r.pool.Get()
		defer conn.Close()
		if n, err := redis.Int(conn.Do("GET", "server")); n != 1 || err != nil {
			t.Errorf("a connection leads to server %d, %v", n, err)
		}
	}
}

// startSentinelStub starts a server that names the port that primary says to whoever asks, and
// returns its address.
func startSentinelStub(t *testing.T, primary func() int) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Read(make([]byte, 1024)) // one question a connection
			port := fmt.Sprint(primary())
			fmt.Fprintf(c, "*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%s\r\n", len(port), port)
			c.Close()
		}
	}()
	return l.Addr().String()
}
