package main

import (
	"bytes"
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// TestPostgresSick asks in every way a PostgreSQL that is sick in every way: each question ends
// within answerWithin, as "unavailable".
func TestPostgresSick(t *testing.T) {
	address := dialledBy(t, testDatabase(t))
	tests := []struct {
		name   string
		sicken func(t *testing.T, p *proxy, pg *postgres)
	}{
		{"hangs with connections open", func(_ *testing.T, p *proxy, _ *postgres) { p.hang() }},
		{"hangs while connecting", func(_ *testing.T, p *proxy, pg *postgres) {
			pg.dropConnections()
			p.hang()
		}},
		{"refuses connections", func(_ *testing.T, p *proxy, _ *postgres) { p.refuse() }},
		{"has no connection free", func(t *testing.T, _ *proxy, pg *postgres) {
			takeAll(t, pg.requests)
		}},
		{"has no connection free and hangs", func(t *testing.T, p *proxy, pg *postgres) {
			takeAll(t, pg.requests)
			p.hang()
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for name, ask := range waysToAsk {
				p := startProxy(t, address.upstream)
				store, _ := testStore(t, address.through(p), 2)
				idle(t, store.pg.requests, 2)
				tt.sicken(t, p, store.pg)
				began := time.Now()
				err := ask(t.Context(), store.pg.requests)
				took := time.Since(began)
				if !errors.Is(err, errUnavailable) || took > inTime {
					t.Errorf("%s: %v after %v", name, err, took)
				}
			}
		})
	}
}

// waysToAsk are all ways in which a question of a request reaches PostgreSQL.
var waysToAsk = map[string]func(ctx context.Context, p *pool) error{
	"queryOne": func(ctx context.Context, p *pool) error {
		_, err := queryOne(ctx, p, oneNumber, `SELECT 1`)
		return err
	},
	"queryAll": func(ctx context.Context, p *pool) error {
		_, err := queryAll(ctx, p, oneNumber, `SELECT 1`)
		return err
	},
	"insertOnce": func(ctx context.Context, p *pool) error {
		_, err := insertOnce(ctx, p, oneNumber,
			`INSERT INTO click_journals (id, batch) VALUES (gen_random_uuid(), 1) RETURNING batch`)
		return err
	},
	"inTx": func(ctx context.Context, p *pool) error {
		return p.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
			_, err := txExec(ctx, tx, `UPDATE click_journals SET batch = 2`)
			return err
		})
	},
}

// oneNumber names the place for a row of one number.
func oneNumber(n *int64) []any { return []any{n} }

// TestProbeLosesSession ends all sessions once during each probe, in the middle of its question if
// it so happens: the server is well, and the breaker stays closed.
func TestProbeLosesSession(t *testing.T) {
	store, db := testStore(t, testDatabase(t), 2)
	for range 300 {
		ended := make(chan error)
		go func() {
			_, err := db.Exec(`
				SELECT pg_terminate_backend(pid) FROM pg_stat_activity
				WHERE datname = current_database() AND pid <> pg_backend_pid()`)
			ended <- err
		}()
		if err := store.pg.probe(t.Context()); err != nil || !store.pg.up() {
			t.Errorf("the server is called lost: %v", err)
		}
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
	}
}

// TestHungInTransaction has PostgreSQL hang between two statements and before a commit.
func TestHungInTransaction(t *testing.T) {
	address := dialledBy(t, testDatabase(t))
	for _, statement := range []string{"", `UPDATE click_journals SET batch = 2`} {
		p := startProxy(t, address.upstream)
		store, _ := testStore(t, address.through(p), 2)
		began := time.Now()
		err := store.pg.requests.inTx(t.Context(), func(ctx context.Context, tx *sql.Tx) error {
			if _, err := txExec(ctx, tx, `SELECT 1`); err != nil {
				return err
			}
			p.hang()
			if statement == "" {
				return nil // to the commit
			}
			_, err := txExec(ctx, tx, statement)
			return err
		})
		if took := time.Since(began); !errors.Is(err, errUnavailable) || took > inTime {
			t.Errorf("hung before %q: %v after %v", statement, err, took)
		}
	}
}

// TestBrakes is what the server does by itself when nobody tells it to stop.
func TestBrakes(t *testing.T) {
	store, _ := testStore(t, testDatabase(t), 2)
	pools := map[*pool]string{
		store.pg.requests:   "400ms",
		store.pg.readers:    "400ms",
		store.pg.background: "14850ms",
	}
	for p, want := range pools {
		var statement, idle string
		err := p.QueryRowContext(t.Context(), `
			SELECT current_setting('statement_timeout'),
			       current_setting('idle_in_transaction_session_timeout')`).
			Scan(&statement, &idle)
		if err != nil || statement != want || idle != "5s" {
			t.Errorf("statement_timeout %s and idle_in_transaction_session_timeout %s, %v; want %s and 5s",
				statement, idle, err, want)
		}
	}
	// A statement that the server stops leaves its connection usable.
	p := store.pg.requests
	pid := func() int64 {
		n, err := queryOne(t.Context(), p, oneNumber, `SELECT pg_backend_pid()`)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	p.SetMaxOpenConns(1)
	before := pid()
	_, err := queryOne(t.Context(), p, oneNumber, `SELECT 1 FROM pg_sleep(10)`)
	if !errors.Is(err, errUnavailable) || pid() != before {
		t.Errorf("a statement over its time: %v, and another connection afterwards: %v",
			err, pid() != before)
	}
}

// TestBrakesBehindPooler is the same where a pooler keeps the brakes from the server: each question
// and each transaction brings them along, and leaves nothing behind for whom the pooler gives the
// connection next.
func TestBrakesBehindPooler(t *testing.T) {
	dsn := testDatabase(t)
	testStore(t, dsn)
	config, _, err := databaseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	pg := openPostgres(config, 1, slog.New(slog.DiscardHandler))
	t.Cleanup(pg.close)
	for _, p := range []*pool{pg.requests, pg.readers, pg.bulk, pg.background} {
		p.Driver().(*connector).plain.Store(true)
		p.SetMaxOpenConns(1)
	}
	if err := pg.probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	const asked = `SELECT current_setting('statement_timeout') || ' ' ||
		current_setting('idle_in_transaction_session_timeout') || ' ' || pg_backend_pid()`
	text := func(s *string) []any { return []any{s} }
	p := pg.bulk
	first, err := queryOne(t.Context(), p, text, asked)
	if err != nil || !strings.HasPrefix(first, "4850ms 5s ") {
		t.Errorf("a question: %s, %v", first, err)
	}
	check := func(what, got string, err error) {
		t.Helper()
		if err != nil || got != first {
			t.Errorf("%s: %s, want %s: %v", what, got, first, err)
		}
	}
	var got string
	inTx := func(ctx context.Context, tx *sql.Tx) error {
		return txQueryOne(ctx, tx, nil, []any{&got}, asked)
	}
	err = p.inTx(t.Context(), inTx)
	check("a transaction", got, err)
	_, err = queryOne(t.Context(), p, text, `SELECT 1 / 0`)
	if failure := pq.As(err); failure == nil || failure.Code != pqerror.DivisionByZero {
		t.Errorf("a question that fails: %v", err)
	}
	all, err := insertOnce(t.Context(), p, text,
		`INSERT INTO hop_meta VALUES ('a', 'b'), ('c', 'd') RETURNING value`)
	if err != nil || !slices.Equal(all, []string{"b", "d"}) {
		t.Errorf("an insert: %v, %v", all, err)
	}
	kept, err := queryAll(t.Context(), pg.readers, text,
		`SELECT value FROM hop_meta WHERE key IN ('a', 'c') ORDER BY key`)
	if err != nil || !slices.Equal(kept, all) {
		t.Errorf("what others see of it: %v, %v", kept, err)
	}
	_, err = p.ExecContext(t.Context(), `DO $$ BEGIN
		ASSERT current_setting('statement_timeout') = '0', 'something is left behind';
	END $$`)
	if err != nil {
		t.Error(err)
	}
	got, err = queryOne(t.Context(), p, text, asked)
	check("later, on the same connection", got, err)
}

// TestBusyIsNotDead has requests fail although PostgreSQL is well: the breaker stays closed.
func TestBusyIsNotDead(t *testing.T) {
	dsn := testDatabase(t)
	store, db := testStore(t, dsn, 2)
	tests := []struct {
		name string
		busy func(t *testing.T)
	}{
		{"no connection free", func(t *testing.T) { takeAll(t, store.pg.requests) }},
		{"a locked table", func(t *testing.T) {
			tx, err := db.Begin()
			if err == nil {
				_, err = tx.Exec(`LOCK TABLE urls, click_journals IN ACCESS EXCLUSIVE MODE`)
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { tx.Rollback() })
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.busy(t)
			began := time.Now()
			_, err := store.targets(t.Context(), []string{"abc"})
			if took := time.Since(began); !errors.Is(err, errUnavailable) || took > inTime {
				t.Errorf("targets: %v after %v", err, took)
			}
			if err := store.pg.probe(t.Context()); err != nil || !store.pg.up() {
				t.Errorf("the breaker is open: %v", err)
			}
		})
	}
	if _, err := store.targets(t.Context(), []string{"abc"}); err != nil {
		t.Errorf("afterwards: %v", err)
	}

	t.Run("no connection left on the server", func(t *testing.T) {
		role := "hop_test_busy"
		execSQL(t, db, `DROP ROLE IF EXISTS `+role)
		execSQL(t, db, `CREATE ROLE `+role+` LOGIN PASSWORD 'secret' CONNECTION LIMIT 1`)
		t.Cleanup(func() { execSQL(t, db, `DROP ROLE `+role) })
		limited := openAs(t, dsn, role)
		if err := limited.probe(t.Context()); err != nil {
			t.Fatal(err)
		}
		takeAll(t, limited.background) // but only one of its six can be had
		_, err := queryOne(t.Context(), limited.requests, oneNumber, `SELECT 1`)
		if !errors.Is(err, errUnavailable) {
			t.Errorf("a request that gets no connection: %v", err)
		}
		if err := limited.probe(t.Context()); err != nil || !limited.up() {
			t.Errorf("the breaker is open: %v", err)
		}
		limited.close()
	})
}

// TestConnectionsEnded ends all of hop's idle connections, as a server's restart or a firewall
// does: nobody notices, not even a writer, who may not try twice.
func TestConnectionsEnded(t *testing.T) {
	const conns = 4
	store, db := testStore(t, testDatabase(t), conns)
	const others = `FROM pg_stat_activity
		WHERE datname = current_database() AND pid <> pg_backend_pid()
		      AND backend_type = 'client backend'`
	for name, ask := range waysToAsk {
		t.Run(name, func(t *testing.T) {
			idle(t, store.pg.requests, conns)
			idle(t, store.pg.background, 1)
			ended := scalar[int](t, db, `SELECT count(pg_terminate_backend(pid)) `+others)
			if ended < conns+1 {
				t.Fatalf("%d connections ended, want %d", ended, conns+1)
			}
			eventually(t, patience, "the connections are gone", func() bool {
				return scalar[int](t, db, `SELECT count(*) `+others) == 0
			})
			for range conns {
				if err := ask(t.Context(), store.pg.requests); err != nil {
					t.Errorf("after its connection was ended: %v", err)
				}
			}
			if err := store.pg.probe(t.Context()); err != nil {
				t.Errorf("the probe: %v", err)
			}
		})
	}
}

// TestBreaker makes a PostgreSQL sick and well again, and looks at what the probe makes of it.
func TestBreaker(t *testing.T) {
	server := startPostgres(t, "-c", "fsync=off")
	address := dialledBy(t, server.url)
	p := startProxy(t, address.upstream)
	store, _ := testStore(t, address.through(p), 2)
	db := openDB(t, server.url)
	ctx, cancel := context.WithCancel(t.Context())
	var monitor sync.WaitGroup
	monitor.Go(func() { store.pg.monitor(ctx) })
	t.Cleanup(func() {
		cancel()
		monitor.Wait()
	})
	readOnly := func(on string) func() {
		return func() {
			execSQL(t, db, `ALTER SYSTEM SET default_transaction_read_only = `+on)
			execSQL(t, db, `SELECT pg_reload_conf()`)
		}
	}
	tests := []struct {
		name  string
		state serverState
		sick  func()
		well  func()
	}{
		{"hangs", serverDown, p.hang, func() { p.forward(t) }},
		{"refuses", serverDown, p.refuse, func() { p.forward(t) }},
		{"takes no writes", serverReadOnly, readOnly("on"), readOnly("off")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.sick()
			eventually(t, patience, "the breaker opens", func() bool {
				return store.pg.current() == tt.state
			})
			began := time.Now()
			for range 10 {
				_, err := store.targets(t.Context(), []string{"abc"})
				if !errors.Is(err, errUnavailable) {
					t.Fatalf("a question while the breaker is open: %v", err)
				}
			}
			if took := time.Since(began); took > inTime/2 {
				t.Errorf("ten questions while the breaker is open take %v", took)
			}
			tt.well()
			eventually(t, patience, "the breaker closes", store.pg.up)
			for range 4 { // more than there are connections: none may lead to what was sick
				_, err := insertOnce(t.Context(), store.pg.requests, oneNumber, `
					INSERT INTO click_journals (id, batch) VALUES (gen_random_uuid(), 1)
					RETURNING batch`)
				if err != nil {
					t.Errorf("a write afterwards: %v", err)
				}
			}
			if store.pg.latency.Load() <= 0 {
				t.Error("it is up, and no latency is known")
			}
		})
	}
}

// TestHungHost names two hosts of which the first accepts and never answers, as a primary that was
// stopped does until it is fenced: the second is reached, by the probe and by a request, in time.
func TestHungHost(t *testing.T) {
	address := dialledBy(t, testDatabase(t))
	hung := startProxy(t, address.upstream)
	hung.hang()
	well := startProxy(t, address.upstream)
	dsn := strings.Replace(address.through(hung), hung.addr, hung.addr+","+well.addr, 1)
	pg := openAs(t, dsn, "hop")
	if err := pg.probe(t.Context()); err != nil {
		t.Fatalf("the probe: %v", err)
	}
	began := time.Now()
	_, err := queryOne(t.Context(), pg.requests, oneNumber, `SELECT 1`)
	if err != nil {
		t.Errorf("a request: %v", err)
	}
	if took := time.Since(began); took > inTime {
		t.Errorf("a request took %v", took)
	}
}

// TestWaitsDoNotAddUp slows every packet down so that each question of /stats by itself ends in
// time, and all three in turn do not: an answer that takes several has the time of one.
func TestWaitsDoNotAddUp(t *testing.T) {
	address := dialledBy(t, testDatabase(t))
	p := startProxy(t, address.upstream)
	a := startApp(t, "DATABASE_URL="+address.through(p))
	addLink(t, a, "https://example.com/", "slow")
	p.slow(func() time.Duration { return answerWithin / 5 })
	began := time.Now()
	r := do(t, "GET", a.url+"/stats/slow", "")
	if took := time.Since(began); r.status != 503 || took > inTime {
		t.Errorf("%d after %v", r.status, took)
	}
}

// TestNoSocketIsLeft dials a server without TLS as sslmode=prefer does, twice for each connection:
// the first socket is closed.
func TestNoSocketIsLeft(t *testing.T) {
	address := dialledBy(t, testDatabase(t))
	p := startProxy(t, address.upstream)
	store, _ := testStore(t, strings.Replace(address.through(p), "disable", "prefer", 1), 2)
	const conns = 2
	idle(t, store.pg.requests, conns)
	eventually(t, patience, "each connection has one socket", func() bool {
		return p.open() == store.pg.openConns()
	})
}

// openConns is how many connections all pools have.
func (pg *postgres) openConns() int {
	n := 0
	for _, pool := range []*pool{pg.requests, pg.readers, pg.bulk, pg.background} {
		n += pool.Stats().OpenConnections
	}
	return n
}

// TestPostgresRefused asks a port where nobody listens: people learn where hop knocked and what to
// set, and no password.
func TestPostgresRefused(t *testing.T) {
	port := freePort(t)
	dsn := fmt.Sprintf("postgres://hop:hunter2%%40@127.0.0.1:%d/links?sslmode=disable", port)
	said := fmt.Sprint(openAs(t, dsn, "hop").probe(t.Context()))
	place := fmt.Sprintf("127.0.0.1:%d/links", port)
	for _, word := range []string{place, "refused", "DATABASE_URL", "PGHOST"} {
		if !strings.Contains(said, word) {
			t.Errorf("the error does not name %s: %s", word, said)
		}
	}
	if strings.Contains(said, "hunter2") {
		t.Errorf("the error shows the password: %s", said)
	}
}

// TestTooManyAsk has more questions than may wait for connections: the rest is refused at once.
func TestTooManyAsk(t *testing.T) {
	store, _ := testStore(t, testDatabase(t), 2)
	p := store.pg.requests
	p.asking.max = 1
	entered := make(chan struct{})
	leave := make(chan struct{})
	var first sync.WaitGroup
	first.Go(func() {
		err := p.inTx(t.Context(), func(context.Context, *sql.Tx) error {
			close(entered)
			<-leave
			return nil
		})
		if err != nil {
			t.Errorf("the one that asks: %v", err)
		}
	})
	<-entered
	if _, err := queryOne(t.Context(), p, oneNumber, `SELECT 1`); err != errOverloaded {
		t.Errorf("one too many is told %v, want %v", err, errOverloaded)
	}
	close(leave)
	first.Wait()
	if _, err := queryOne(t.Context(), p, oneNumber, `SELECT 1`); err != nil {
		t.Errorf("when there is room again: %v", err)
	}
}

// TestConnectAhead: a start opens connections before the first request needs one.
func TestConnectAhead(t *testing.T) {
	a := startApp(t)
	for name, p := range map[string]*pool{
		"requests": a.store.pg.requests, "readers": a.store.pg.readers,
	} {
		if n := p.Stats().OpenConnections; n < 2 {
			t.Errorf("%s: %d connections are open", name, n)
		}
	}
}

// startPooler stands in for a PgBouncer that knows nothing of our limits: it refuses who names one
// when connecting, and passes on everybody else.
func startPooler(t *testing.T, upstream string) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go poolerServes(c, upstream)
		}
	}()
	return listener.Addr().String()
}

// poolerServes is one connection of startPooler's.
func poolerServes(c net.Conn, upstream string) {
	defer c.Close()
	const sslRequest = "\x04\xd2\x16\x2f"
	var startup []byte
	for startup == nil || string(startup[4:8]) == sslRequest {
		if startup != nil {
			io.WriteString(c, "N") // it speaks no TLS
		}
		var size [4]byte
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return
		}
		startup = append(size[:], make([]byte, binary.BigEndian.Uint32(size[:])-4)...)
		if _, err := io.ReadFull(c, startup[4:]); err != nil {
			return
		}
	}
	if bytes.Contains(startup, []byte("statement_timeout\x00")) {
		refusal := "SFATAL\x00C08P01\x00Munsupported startup parameter: statement_timeout\x00\x00"
		answer := append([]byte{'E'}, binary.BigEndian.AppendUint32(nil, uint32(4+len(refusal)))...)
		c.Write(append(answer, refusal...))
		return
	}
	server, err := net.Dial("tcp", upstream)
	if err != nil {
		return
	}
	defer server.Close()
	server.Write(startup)
	go io.Copy(server, c)
	io.Copy(c, server)
}

// TestPoolerRefusesBrakes starts hop behind a pooler that refuses the brakes: it says once that
// every transaction sets them, and works.
func TestPoolerRefusesBrakes(t *testing.T) {
	u, err := url.Parse(testDatabase(t))
	if err != nil {
		t.Fatal(err)
	}
	u.Host = startPooler(t, u.Host)
	a := startApp(t, "DATABASE_URL="+u.String())
	r := do(t, "POST", a.url+"/shorten", `{"original_url":"https://a.example/"}`)
	said := strings.Count(a.logs.String(), "a pooler keeps statement_timeout from PostgreSQL")
	if r.status != 201 || said != 1 {
		t.Errorf("%d; said %d times; the log:\n%s", r.status, said, a.logs)
	}
}

// TestCollisionsAreTriedAgain has transactions that the server breaks off because of others.
func TestCollisionsAreTriedAgain(t *testing.T) {
	store, db := testStore(t, testDatabase(t), 4)
	execSQL(t, db, `INSERT INTO click_journals (id, batch) VALUES ('a', 1)`)
	tries := 0
	err := store.pg.requests.inTx(t.Context(), func(ctx context.Context, tx *sql.Tx) error {
		tries++
		if _, err := txExec(ctx, tx, `SET TRANSACTION ISOLATION LEVEL SERIALIZABLE`); err != nil {
			return err
		}
		var batch int64
		err := txQueryOne(ctx, tx, errNotFound, oneNumber(&batch), `SELECT batch FROM click_journals`)
		if err != nil {
			return err
		}
		if tries == 1 { // somebody else is faster
			execSQL(t, db, `UPDATE click_journals SET batch = 10`)
		}
		_, err = txExec(ctx, tx, `UPDATE click_journals SET batch = $1`, batch+1)
		return err
	})
	batch := scalar[int](t, db, `SELECT batch FROM click_journals`)
	if err != nil || tries != 2 || batch != 11 {
		t.Errorf("%v after %d tries, the row says %d; want 11 after 2", err, tries, batch)
	}

	always := 0
	began := time.Now()
	err = store.pg.requests.inTx(t.Context(), func(ctx context.Context, tx *sql.Tx) error {
		always++
		_, err := txExec(ctx, tx, `DO $$ BEGIN RAISE 'no luck' USING ERRCODE = '40001'; END $$`)
		return err
	})
	if took := time.Since(began); !errors.Is(err, errUnavailable) || always < 2 || took > inTime {
		t.Errorf("one that always collides: %v after %d tries and %v", err, always, took)
	}
}

// TestGoneClientCommitsNothing ends a request's context in the middle of its transaction.
func TestGoneClientCommitsNothing(t *testing.T) {
	store, db := testStore(t, testDatabase(t), 2)
	ctx, leave := context.WithCancel(t.Context())
	err := store.pg.requests.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		_, err := txExec(ctx, tx, `INSERT INTO click_journals (id, batch) VALUES ('a', 1)`)
		leave()
		return err
	})
	if !errors.Is(err, errUnavailable) {
		t.Errorf("who left is told %v", err)
	}
	if n := scalar[int](t, db, `SELECT count(*) FROM click_journals`); n != 0 {
		t.Error("the transaction was committed")
	}
	if len(store.pg.suspect) != 0 {
		t.Error("a client that leaves makes PostgreSQL suspect")
	}
	if _, err := queryOne(ctx, store.pg.requests, oneNumber, `SELECT 1`); err == nil {
		t.Error("a question of a client that has left is answered")
	}
}

// TestClassify is what the driver's errors become, and which of them make the server suspect.
func TestClassify(t *testing.T) {
	sqlstate := func(code string) error {
		return fmt.Errorf("wrapped: %w", &pq.Error{Code: pqerror.Code(code)})
	}
	same := errors.New("the error as it was")
	tests := []struct {
		name    string
		err     error
		want    error // same: not translated
		suspect bool
		drop    bool // connections are given up
	}{
		{name: "none"},
		{name: "ours", err: errNoUser, want: same},
		{name: "ours, wrapped", err: fmt.Errorf("why: %w", errChanged), want: same},
		{name: "no row", err: sql.ErrNoRows, want: errNotFound},
		{name: "our own mistake", err: sqlstate("42601"), want: same},
		{name: "a check fails", err: sqlstate("23514"), want: same},
		{name: "the client is gone", err: context.Canceled, want: errUnavailable},

		{name: "statement over its time", err: sqlstate("57014"), want: errUnavailable},
		{name: "deadlock", err: sqlstate("40P01"), want: errUnavailable},
		{name: "serialization failure", err: sqlstate("40001"), want: errUnavailable},
		{name: "out of memory", err: sqlstate("53200"), want: errUnavailable},
		{name: "too many connections", err: sqlstate("53300"), want: errUnavailable},
		{name: "this session is ended", err: sqlstate("57P01"), want: errUnavailable},
		{name: "removed meanwhile", err: sqlstate("23503"), want: errUnavailable},
		{name: "loaded meanwhile", err: sqlstate("23505"), want: errUnavailable},
		{name: "table in use", err: sqlstate("55P03"), want: errUnavailable},

		{name: "no answer in time", err: context.DeadlineExceeded, want: errUnavailable, suspect: true},
		{name: "silence", err: os.ErrDeadlineExceeded, want: errUnavailable, suspect: true},
		{name: "dead connection", err: driver.ErrBadConn, want: errUnavailable, suspect: true},
		{name: "refused", err: &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED},
			want: errUnavailable, suspect: true},
		{name: "cut off", err: io.ErrUnexpectedEOF, want: errUnavailable, suspect: true},
		{name: "starting up", err: connectError{sqlstate("57P03")}, want: errUnavailable,
			suspect: true},
		{name: "the server's own words for a lost connection", err: sqlstate("08006"),
			want: errUnavailable, suspect: true},
		{name: "a standby", err: sqlstate("25006"), want: errUnavailable, suspect: true, drop: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			pg := openAs(t, "postgres://hop@127.0.0.1:1/none", "hop")
			got := pg.classify(tt.err)
			switch {
			case tt.want == same && got != tt.err:
				t.Errorf("classify = %v, want it unchanged", got)
			case tt.want != same && !errors.Is(got, tt.want):
				t.Errorf("classify = %v, want %v", got, tt.want)
			case tt.err != nil && tt.want == errUnavailable && !errors.Is(got, tt.err):
				t.Errorf("%v hides its cause", got)
			}
			if suspect := len(pg.suspect) == 1; suspect != tt.suspect {
				t.Errorf("suspect: %v, want %v", suspect, tt.suspect)
			}
			born := pg.requests.Driver().(*connector).born.Load()
			if dropped := born > 0; dropped != tt.drop {
				t.Errorf("connections dropped: %v, want %v", dropped, tt.drop)
			}
		})
	}
}

// ---- helpers ----

// testStore opens a store that is up, on the newest schema, and a pool for the test's own SQL.
// conns is the size of its largest pool, 4 if it is not given.
func testStore(t testing.TB, dsn string, conns ...int) (*Store, *sql.DB) {
	t.Helper()
	size := 4
	if len(conns) > 0 {
		size = conns[0]
	}
	store := openTestStore(t, dsn, size)
	if _, err := store.migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	return store, openDB(t, dsn)
}

// openTestStore opens a store that is up, and leaves the schema alone.
func openTestStore(t testing.TB, dsn string, conns int) *Store {
	t.Helper()
	config, _, err := databaseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	store := newStore(openPostgres(config, conns, slog.New(slog.DiscardHandler)))
	t.Cleanup(store.pg.close)
	eventually(t, patience, "PostgreSQL is up", func() bool {
		return store.pg.probe(t.Context()) == nil && store.pg.up()
	})
	return store
}

// TestLocksKeepNobodyOut has more changes wait for a lock than there are connections: cold codes
// and creates, which wait for no lock, are answered meanwhile.
func TestLocksKeepNobodyOut(t *testing.T) {
	dsn := testDatabase(t)
	a := startApp(t, "DATABASE_URL="+dsn, "DB_CONNS=4")
	db := openDB(t, dsn)
	execSQL(t, db, `INSERT INTO urls (short_code, original_url, created_at, updated_at)
		VALUES ('coldcode', 'https://example.com/', now(), now())`)
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if err := txLock(t.Context(), tx, userLock); err != nil {
		t.Fatal(err)
	}
	const waiting = 20
	statuses := make(chan int, waiting)
	for n := range waiting {
		go func() {
			r, err := roundTrip("POST", a.url+"/users",
				fmt.Sprintf(`{"username":"u%d","email":"u%d@example.com"}`, n, n))
			if err != nil {
				t.Error(err)
			}
			statuses <- r.status
		}()
	}
	asking := &a.store.pg.requests.asking
	eventually(t, patience, "they wait", func() bool { return asking.n.Load() == waiting })
	if r := do(t, "GET", a.url+"/coldcode", ""); r.status != 302 {
		t.Errorf("a cold code: %d %s", r.status, r.body)
	}
	if r := do(t, "POST", a.url+"/shorten", `{"url":"https://example.com/"}`); r.status != 201 {
		t.Errorf("a create: %d %s", r.status, r.body)
	}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	for range waiting {
		if status := <-statuses; status != 201 && status != 503 { // 503 if all of it took long
			t.Errorf("a change that waited: %d", status)
		}
	}
	r := do(t, "POST", a.url+"/users", `{"username":"z","email":"z@example.com"}`)
	if r.status != 201 {
		t.Errorf("a change afterwards: %d %s", r.status, r.body)
	}
}

// openAs prepares connections for another user than the URL names.
func openAs(t testing.TB, dsn, user string) *postgres {
	t.Helper()
	config, _, err := databaseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	if user != config.User {
		config.User = user
		config.Password = "secret"
	}
	pg := openPostgres(config, 2, slog.New(slog.DiscardHandler))
	t.Cleanup(pg.close)
	return pg
}

// pgAddress is a database's URL, taken apart for a proxy.
type pgAddress struct{ dsn, upstream string }

// dialledBy finds where the database of a URL is.
func dialledBy(t testing.TB, dsn string) pgAddress {
	t.Helper()
	config, _, err := databaseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	return pgAddress{dsn, net.JoinHostPort(config.Host, fmt.Sprint(config.Port))}
}

// through is the URL of the same database behind a proxy.
func (a pgAddress) through(p *proxy) string {
	return strings.Replace(a.dsn, a.upstream, p.addr, 1)
}

// idle makes n idle connections in a pool.
func idle(t testing.TB, p *pool, n int) {
	t.Helper()
	for range n {
		conn, err := p.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
}

// takeAll takes all connections of a pool that can be had, until the test's end.
func takeAll(t testing.TB, p *pool) {
	t.Helper()
	for range p.Stats().MaxOpenConnections {
		conn, err := p.Conn(t.Context())
		if err != nil {
			return
		}
		t.Cleanup(func() { conn.Close() })
	}
}
