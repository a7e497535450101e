//go:build cluster

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// hop on other engines than the one it was built on: PgBouncer, a database that isolates all
// transactions, PostgreSQL 14 to 18, every Redis that this machine has, and a Redis that allows few
// commands. `make engines` runs these tests and installs what they need (scripts/engines.sh); every
// test prints one line of the table in docs/engines.md. ENGINES_SHORT=1 leaves out the fault cases
// and the coherence checker.

// shortEngines says whether only the short form is wanted.
func shortEngines() bool { return os.Getenv("ENGINES_SHORT") != "" }

// engineRun is one engine under test, and the line that is printed.
type engineRun struct {
	*testing.T
	columns []string
}

// newEngineRun begins the line of an engine, which is printed when the test ends.
func newEngineRun(t *testing.T, engine string) *engineRun {
	e := &engineRun{T: t, columns: []string{"ENGINE", engine}}
	t.Cleanup(func() {
		fmt.Println(strings.Join(append(e.columns, verdict(t)), " | "))
	})
	return e
}

// figure adds a column.
func (e *engineRun) figure(format string, args ...any) {
	e.columns = append(e.columns, fmt.Sprintf(format, args...))
}

// mark adds a column that says what must be true, and fails the test when it is not.
func (e *engineRun) mark(ok bool, format string, args ...any) {
	e.Helper()
	what := fmt.Sprintf(format, args...)
	if !ok {
		e.Errorf("missed: %s", what)
		what = "MISSED: " + what
	}
	e.figure("%s", what)
}

// throwAway are arguments of a PostgreSQL that need not survive a crash, so that a busy disk of
// whoever runs these tests costs no answer.
var throwAway = []string{"-c", "fsync=off", "-c", "full_page_writes=off"}

// rest runs the REST cases on a PostgreSQL and a Redis, each in a new database.
func (e *engineRun) rest(postgres, redis string) {
	e.Helper()
	e.Setenv("DATABASE_URL", postgres)
	e.Setenv("REDIS_URL", redis)
	passed, all := runREST(e.T, "up", newRecorder())
	e.mark(passed == all && all > 0, "%d of %d REST cases", passed, all)
}

// ---- PgBouncer ----

const (
	// bouncerFirst is what everybody who runs PgBouncer sets: where it leads, and the mode that
	// is worth having. All else is as in the pgbouncer.ini that comes with it.
	bouncerFirst = `
[databases]
* = host=127.0.0.1 port=%d user=hop

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = any
pool_mode = transaction
`
	// bouncerDrops is what many add for other drivers: such parameters get lost without a word.
	bouncerDrops = `
ignore_startup_parameters = statement_timeout, idle_in_transaction_session_timeout
`
	// bouncerHurries lets PgBouncer try again after a second, instead of 15, when PostgreSQL did
	// not let it in. Without it a restart of PostgreSQL is an outage of 15 s, whoever asks.
	bouncerHurries = `
server_login_retry = 1
`
)

// bouncerProgram finds PgBouncer, which Debian keeps off the PATH of ordinary users.
func bouncerProgram(t testing.TB) string {
	t.Helper()
	for _, name := range []string{"pgbouncer", "/usr/sbin/pgbouncer"} {
		if bin, err := exec.LookPath(name); err == nil {
			return bin
		}
	}
	need(t, "pgbouncer", exec.ErrNotFound)
	return ""
}

// startBouncer starts a PgBouncer in front of a PostgreSQL. Its address is the process's url.
func startBouncer(t testing.TB, pg *process, more string) *process {
	t.Helper()
	bin := bouncerProgram(t)
	dir := pgDir(t)
	p := &process{port: freePort(t), logFile: filepath.Join(t.TempDir(), "pgbouncer.log")}
	p.url = fmt.Sprintf("postgres://hop@127.0.0.1:%d/postgres?sslmode=disable", p.port)
	ini := filepath.Join(dir, "pgbouncer.ini")
	text := fmt.Sprintf(bouncerFirst, pg.port, p.port) + more
	if err := os.WriteFile(ini, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	givePostgres(t, ini)
	p.command = func() *exec.Cmd { return pgCommand(t, dir, bin, ini) }
	p.start(t)
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("PgBouncer:\n%s", digest(p.log(t)))
		}
	})
	p.waitPostgres(t)
	return p
}

// bouncerVersion is what PgBouncer says of itself.
func bouncerVersion(t testing.TB) string {
	t.Helper()
	out, err := exec.Command(bouncerProgram(t), "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	return first
}

func TestEnginePgBouncerREST(t *testing.T) {
	for _, c := range []struct{ name, more string }{
		{"its own pgbouncer.ini", ""},
		{"the brakes ignored", bouncerDrops},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := newEngineRun(t, fmt.Sprintf("%s, transaction mode, %s", bouncerVersion(t), c.name))
			pg := startPostgres(t, throwAway...)
			e.rest(startBouncer(t, pg, c.more).url, startRedis(t).url)
		})
	}
}

// TestEnginePgBouncerBrakes stops hop while its statement waits for a lock behind PgBouncer:
// nobody but PostgreSQL can end it. The same with a transaction that holds a lock.
func TestEnginePgBouncerBrakes(t *testing.T) {
	for _, c := range []struct{ name, more string }{
		{"its own pgbouncer.ini", ""},
		{"the brakes ignored", bouncerDrops},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := newEngineRun(t, "brakes behind PgBouncer, "+c.name)
			r := newStores(t, startPostgres(t), startRedis(t))
			bouncer := startBouncer(t, r.pg, c.more)
			hop := startHop(t, r.settings("DATABASE_URL="+bouncer.url)...)
			e.lockedTable(r, hop)
			e.stoppedStatement(r, hop)
			e.settings(r, bouncer)
			e.mark(strings.Count(hop.log(t), "a pooler keeps statement_timeout") == 1,
				"said once in the log")
		})
	}
}

// lockTable locks urls until the returned function is called.
func lockTable(t testing.TB, db *sql.DB) (unlock func()) {
	t.Helper()
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tx.Rollback() })
	if _, err := tx.Exec(`LOCK TABLE urls IN ACCESS EXCLUSIVE MODE`); err != nil {
		t.Fatal(err)
	}
	return func() { tx.Rollback() }
}

// waitingMisses counts the misses of redirects that wait for a lock. The poll waits for the same
// one, but has more time.
func waitingMisses(t testing.TB, db *sql.DB) int {
	t.Helper()
	return scalar[int](t, db, `
		SELECT count(*) FROM pg_stat_activity
		WHERE wait_event_type = 'Lock' AND query LIKE '%short_code = ANY%'`)
}

// lockedTable asks for what a locked table keeps.
func (e *engineRun) lockedTable(r *rig, hop *process) {
	e.Helper()
	unlock := lockTable(e, r.db)
	miss := ask(hop.url, request{"miss", "GET", "/" + rand.Text(), ""})
	create := ask(hop.url, createOne)
	slowest := max(miss.took(), create.took())
	e.mark(miss.status == 503 && create.status == 503 && slowest < answerLimit+noise(),
		"locked table: miss and create 503, slowest %s", short(slowest))
	unlock()
	eventually(e, patience, "creates work again", func() bool {
		return ask(hop.url, createOne).status == 201
	})
}

// stoppedStatement stops hop in the middle of a miss, and waits for PostgreSQL to end it.
func (e *engineRun) stoppedStatement(r *rig, hop *process) {
	e.Helper()
	unlock := lockTable(e, r.db)
	defer unlock()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		ask(hop.url, request{"miss", "GET", "/" + rand.Text(), ""})
	}()
	eventually(e, patience, "a miss waits", func() bool { return waitingMisses(e, r.db) > 0 })
	stopped := time.Now()
	hop.pause()
	eventually(e, patience, "PostgreSQL ended the miss", func() bool {
		return waitingMisses(e, r.db) == 0
	})
	took := time.Since(stopped)
	hop.resume()
	<-answered
	e.mark(took < answerWithin+noise(), "hop stopped meanwhile: ended after %s", short(took))
}

// settings looks at what each pool's questions and transactions have, and that nobody else gets it.
func (e *engineRun) settings(r *rig, bouncer *process) {
	e.Helper()
	const asked = `SELECT current_setting('statement_timeout') || ', ' ||
		current_setting('idle_in_transaction_session_timeout')`
	store, _ := testStore(e, bouncer.url, 2)
	for p, want := range map[*pool]string{
		store.pg.requests:   "400ms, 5s",
		store.pg.bulk:       "4850ms, 5s",
		store.pg.background: "14850ms, 5s",
	} {
		got, err := queryOne(e.Context(), p, func(s *string) []any { return []any{s} }, asked)
		if err != nil || got != want {
			e.Errorf("a question has %s, want %s: %v", got, want, err)
		}
		err = p.inTx(e.Context(), func(ctx context.Context, tx *sql.Tx) error {
			return txQueryOne(ctx, tx, nil, []any{&got}, asked)
		})
		if err != nil || got != want {
			e.Errorf("a transaction has %s, want %s: %v", got, want, err)
		}
	}
	start := time.Now()
	_, err := queryOne(e.Context(), store.pg.requests, func(s *string) []any { return []any{s} },
		`SELECT pg_sleep(10)::text`)
	e.mark(errors.Is(err, errUnavailable) && strings.Contains(err.Error(), "57014"),
		"pg_sleep(10) canceled by PostgreSQL after %s", short(time.Since(start)))
	other := openDB(e, bouncer.url)
	for range 10 {
		if got := scalar[string](e, other, asked); got != "0, 0" {
			e.Errorf("another client got hop's %s", got)
		}
	}
}

// TestEnginePgBouncerFaults runs fault cases with a PgBouncer between hop and PostgreSQL.
func TestEnginePgBouncerFaults(t *testing.T) {
	runFaultsBy(t, func(t testing.TB, pg *process) string {
		return startBouncer(t, pg, bouncerHurries).url
	})
}

// runFaultsBy runs the short fault cases that are about PostgreSQL, by a way to it. Those whose own
// proxies or address would take its place are not here, nor is 24: PgBouncer lets nobody in for
// server_login_retry when PostgreSQL had no connection for it.
func runFaultsBy(t *testing.T, way func(t testing.TB, pg *process) string) {
	t.Helper()
	if shortEngines() {
		t.Skip("ENGINES_SHORT")
	}
	wayToPostgres = way
	t.Cleanup(func() { wayToPostgres = nil })
	for _, c := range []struct {
		name string
		test func(t *testing.T)
	}{
		{"04", TestFault04PostgresPaused},
		{"05", TestFault05PostgresRestarted},
		{"06", TestFault06BothPaused},
		{"07", TestFault07HopKilled},
		{"08", TestFault08PostgresCrashedInFlush},
		{"09", TestFault09Replicas},
		{"10", TestFault10RollingRestart},
		{"11", TestFault11TableLocked},
		{"12", TestFault12ColdCode},
		{"20", TestFault20DeleteUser},
		{"21", TestFault21Serializable},
		{"23", TestFault23ValuesRunOut},
	} {
		t.Run(c.name, c.test)
	}
}

// ---- isolation ----

// serializable is the setting.
const serializable = "default_transaction_isolation=serializable"

func TestEngineSerializable(t *testing.T) {
	e := newEngineRun(t, "default_transaction_isolation = serializable")
	pg := startPostgres(t, append(throwAway, "-c", serializable)...)
	e.rest(pg.url, startRedis(t).url) // in databases that it makes, so the server has the setting
}

// TestEngineSerializableFaults runs fault cases on a database that isolates all transactions.
func TestEngineSerializableFaults(t *testing.T) {
	runFaultsBy(t, func(t testing.TB, pg *process) string {
		execSQL(t, openDB(t, pg.url),
			`ALTER DATABASE postgres SET default_transaction_isolation = 'serializable'`)
		return pg.url
	})
}

// TestEngineSerializableMix creates, clicks and changes at once, much of it the same rows. Where a
// machine that others use too stood still for half a second, it is given another try, and says so.
func TestEngineSerializableMix(t *testing.T) {
	const tries = 3
	e := newEngineRun(t, "ALTER DATABASE … SET default_transaction_isolation = 'serializable'")
	head := e.columns
	for n := range tries {
		e.columns = head
		if n > 0 {
			e.figure("try %d", n+1)
		}
		if refused := e.mix(); refused == 0 {
			e.figure("no 5xx")
			return
		}
	}
	e.Error("missed: no 5xx")
}

// mix is one try. It returns how many answers were 5xx or none.
func (e *engineRun) mix() int {
	e.Helper()
	r := newStores(e, startPostgres(e, throwAway...), startRedis(e))
	execSQL(e, r.db, `ALTER DATABASE postgres SET default_transaction_isolation = 'serializable'`)
	f := &faultRun{T: e.T, rig: r}
	f.hop = startHop(e, r.settings()...)
	clicks := f.redirectAt(f.hop, 200, 20, r.aims[:10]) // the links that are changed
	made := f.create(f.hop, 50, 10)
	var askers []func() []asked
	for i := range 6 { // three links, each changed by two
		path := fmt.Sprintf("/urls/%d", 1+i/2)
		askers = append(askers, f.askInTurn(f.hop.url, 1, 20*time.Millisecond,
			request{"update", "PATCH", path, fmt.Sprintf(`{"title":"by %d"}`, i)},
			request{"stats", "GET", "/stats/f0000", ""},
			request{"bulk", "POST", "/shorten/bulk", `[{"url":"https://example.com/y"}]`},
			request{"event", "POST", "/events", `{"event_type":"seen","url_id":1}`},
		))
	}
	f.wait(10 * time.Second)
	var all []asked
	for _, end := range askers {
		all = append(all, end()...)
	}
	missing := made.missing(e, r.db) // which ends the creates
	wrong := slices.DeleteFunc(slices.Clone(all), asked.worked)
	for _, a := range wrong {
		e.Logf("%s: %s: %d after %s, %.200s", a.began.Format(time.StampMilli), a.name, a.status,
			short(a.took()), a.body)
	}
	creates := made.load.figures(whole)
	redirects := clicks.figures(whole)
	e.figure("%s, slowest %s", tally(all), short(slowestOf(all)))
	e.figure("creates: %s, %d refused", creates.failures(), made.denied)
	e.figure("redirects: %s", redirects.failures())
	e.mark(missing == 0, "no link missing")
	flushClicks(e, f.hop.url)
	sum := r.countedClicks(e, clicks.answered(302))
	e.mark(sum.acknowledged > 0 && sum.lost+sum.surplus == 0, "%d clicks, lost %d, surplus %d",
		sum.acknowledged, sum.lost, sum.surplus)
	return len(wrong) + creates.failed + made.denied + redirects.failed
}

// ---- releases of PostgreSQL ----

// TestEnginePostgres runs the REST cases on each release that PostgreSQL supports.
func TestEnginePostgres(t *testing.T) {
	for _, major := range []string{"14", "15", "16", "17", "18"} {
		t.Run(major, func(t *testing.T) {
			bin := filepath.Join(os.Getenv("HOP_ENGINES"), "node_modules", "postgresql-"+major,
				"native", "bin") + "/"
			out, err := exec.Command(bin+"postgres", "--version").Output()
			if err != nil {
				need(t, "PostgreSQL "+major+" (scripts/engines.sh)", err)
			}
			fields := strings.Fields(string(out)) // "postgres (PostgreSQL) 14.23"
			e := newEngineRun(t, "PostgreSQL "+fields[len(fields)-1])
			e.rest(startPostgresFrom(t, bin, throwAway...).url, startRedis(t).url)
		})
	}
}

// ---- servers that speak Redis's protocol ----

// TestEngineRedis runs the REST cases and the coherence checker on each that this machine has.
func TestEngineRedis(t *testing.T) {
	pg := startPostgres(t, throwAway...)
	for _, program := range []string{"redis-server", "valkey-server", "keydb-server", "dragonfly"} {
		t.Run(program, func(t *testing.T) {
			bin, err := exec.LookPath(program)
			if err != nil && program != "redis-server" {
				fmt.Printf("ENGINE | %s | none for this machine | SKIPPED\n", program)
				t.Skip(err) // not every release of Debian and Ubuntu has each
			}
			out, err := exec.Command(bin, "--version").Output()
			if err != nil {
				need(t, program, err)
			}
			redisProgram = bin
			t.Cleanup(func() { redisProgram = "redis-server" })
			version, _, _ := strings.Cut(string(out), " sha")
			e := newEngineRun(t, strings.TrimSpace(version))
			e.rest(pg.url, startRedis(t).url)
			if shortEngines() {
				return
			}
			e.mark(t.Run("coherence", TestFault16Coherence), "%d coherence cases, 0 stale, 0 wrong",
				len(coherenceCases))
		})
	}
}

// ---- a Redis that allows few commands ----

// hopCommands are all that the README says an ACL must allow.
var hopCommands = []string{"get", "set", "mget", "del", "eval", "ping", "watch", "unwatch", "multi",
	"exec", "publish", "subscribe"}

// TestEngineRedisACL takes one command after the other away from hop, and looks at what still
// works.
func TestEngineRedisACL(t *testing.T) {
	pg := startPostgres(t, throwAway...)
	for _, without := range []string{"", "subscribe", "publish", "eval", "watch", "unwatch",
		"multi", "exec", "mget", "get", "set", "del", "ping"} {
		t.Run("without "+without, func(t *testing.T) {
			name := "a Redis with the commands that the README lists"
			if without != "" {
				name = "without " + strings.ToUpper(without)
			}
			e := newEngineRun(t, name)
			server := startRedis(t)
			url := narrowUser(t, server, without)
			t.Setenv("DATABASE_URL", pg.url)
			e.replicas(server, url, without)
			e.restNarrow(pg.url, url, without)
		})
	}
}

// narrowUser makes a user of Redis who may run hop's commands but one, and returns the URL.
func narrowUser(t testing.TB, server *process, without string) string {
	t.Helper()
	rules := []any{"SETUSER", "hop", "on", ">secret", "resetkeys", "~hop:*", "&hop:*", "-@all"}
	for _, command := range hopCommands {
		if command != without {
			rules = append(rules, "+"+command)
		}
	}
	rules = append(rules, "+flushall") // for the tests: each begins with an empty Redis
	server.redisDo(t, "ACL", rules...)
	return strings.Replace(server.url, "redis://", "redis://hop:secret@", 1)
}

// replicas runs some of them with one Redis and looks at what reaches where. The third begins with
// nothing in its own cache, so that what it is asked goes to Redis.
func (e *engineRun) replicas(server *process, redisURL, without string) {
	e.Helper()
	const links = 200
	settings := []string{"DATABASE_URL=" + testDatabase(e), "REDIS_URL=" + redisURL}
	first := startApp(e, settings...)
	for i := range links {
		body := fmt.Sprintf(`{"url":"https://example.com/%d","custom_code":"code%d"}`, i, i)
		if r := do(e, "POST", first.url+"/shorten", body); r.status != 201 {
			e.Fatalf("create: %d %s", r.status, r.body)
		}
	}
	time.Sleep(holdTTL) // until then nobody may fill what was just made
	second := startApp(e, settings...)
	server.redisDo(e, "FLUSHALL") // polls find it empty, and one of the two warms it
	e.figure("warm-up: %s in Redis", someOf(filled(e, server, links, warmedWithin), links))
	reader := startApp(e, append(settings, "WARM_LINKS=0")...)
	evict(e, server)
	for i := range links {
		want := fmt.Sprintf("https://example.com/%d", i)
		for _, a := range []*app{first, second, reader} {
			r := do(e, "GET", fmt.Sprintf("%s/code%d", a.url, i), "")
			if r.status != 302 || r.header.Get("Location") != want {
				e.Errorf("code%d: %d %s", i, r.status, r.header.Get("Location"))
			}
		}
	}
	e.figure("reads: %s in Redis", someOf(filled(e, server, links, 0), links))
	e.changes(first, second)
	before := len(refusedCommands(first, second, reader))
	time.Sleep(2 * time.Second)
	e.changes(first, second)
	said := refusedCommands(first, second, reader)
	e.mark(len(said) == before, "the log does not grow")
	// DEL follows a warm-up that failed, PING a connection that idled for 10 s.
	rare := without == "" || without == "del" || without == "ping"
	e.mark(len(said) > 0 || rare, "said by three replicas: %s",
		cmp.Or(strings.Join(said, ", "), "nothing"))
}

// someOf says how many of all there are, roughly where it is some.
func someOf(n, all int) string {
	switch {
	case n == 0:
		return "none"
	case n >= all:
		return "all"
	}
	return fmt.Sprintf("%d of %d", n, all)
}

// warmedWithin is how long a warm-up may take to begin: it is tried again every few seconds.
const warmedWithin = 8 * time.Second

// filled is how many values Redis holds when all are there, or after within.
func filled(t testing.TB, server *process, all int, within time.Duration) int {
	t.Helper()
	start := time.Now()
	for {
		n := valuesInRedis(t, server)
		if n >= all || time.Since(start) > within {
			return n
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// evict takes what codes lead to out of Redis, as a Redis that is full does.
func evict(t testing.TB, server *process) {
	t.Helper()
	keys := server.redisDo(t, "KEYS", "hop:*:code*").([]any)
	if len(keys) > 0 {
		server.redisDo(t, "DEL", keys...)
	}
}

// valuesInRedis counts the keys that hold what a code leads to.
func valuesInRedis(t testing.TB, server *process) int {
	t.Helper()
	conn, err := server.dialRedis()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	keys, err := redis.Strings(conn.Do("KEYS", "hop:*:code*"))
	if err != nil {
		t.Fatal(err)
	}
	values := 0
	for _, key := range keys {
		value, _ := redis.Bytes(conn.Do("GET", key))
		if _, ok := decodeTarget(value); ok {
			values++
		}
	}
	return values
}

// changes changes links on one replica and waits for them on the other.
func (e *engineRun) changes(first, second *app) {
	e.Helper()
	var slowest time.Duration
	pending, wrong := 0, 0
	const changes = 10
	for i := range changes {
		target := "https://example.com/" + rand.Text()
		path := fmt.Sprintf("/urls/%d", i+1)
		r := do(e, "PUT", first.url+path, `{"original_url":"`+target+`"}`)
		changed := time.Now()
		if r.status != 200 {
			e.Fatalf("PUT: %d %s", r.status, r.body)
		}
		if strings.Contains(r.body, `"cache":"pending"`) {
			pending++
		}
		leads := func(a *app) string {
			return do(e, "GET", fmt.Sprintf("%s/code%d", a.url, i), "").header.Get("Location")
		}
		if leads(first) != target {
			wrong++
		}
		eventually(e, trustFor+noise(), "the other replica serves the change", func() bool {
			return leads(second) == target
		})
		slowest = max(slowest, time.Since(changed))
	}
	e.mark(wrong == 0 && slowest < trustFor+noise(), "%d of %d changes pending, elsewhere after %s",
		pending, changes, short(slowest))
}

// refusedCommands are the commands that some hops said Redis refuses, in order.
func refusedCommands(all ...*app) []string {
	var commands []string
	for _, a := range all {
		for line := range strings.Lines(a.logs.String()) {
			if !strings.Contains(line, "redis refuses") {
				continue
			}
			_, after, _ := strings.Cut(line, "command=")
			command, _, _ := strings.Cut(after, " ")
			commands = append(commands, command)
		}
	}
	slices.Sort(commands)
	return commands
}

// restNarrow runs the REST cases with such a Redis.
func (e *engineRun) restNarrow(postgres, redisURL, without string) {
	e.Helper()
	if without == "get" || without == "set" {
		return // hop calls that Redis down, and for the REST cases without one there is TestREST
	}
	if shortEngines() && without != "" && without != "eval" {
		return
	}
	e.rest(postgres, redisURL)
}
