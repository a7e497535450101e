package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// promptly is how fast a request must fail: within 600 ms, and some slack for test machines that have other things to do.
const promptly = 600*time.Millisecond + 150*time.Millisecond

// clearPG unsets the PG* variables of whoever runs the tests.
func clearPG(t *testing.T) {
	for _, name := range []string{"PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE", "PGSSLMODE", "PGSERVICE"} {
		t.Setenv(name, "") // puts it back at the end
		os.Unsetenv(name)
	}
}

func TestPGConfig(t *testing.T) {
	type want struct {
		host               string
		port               int
		user, password, db string
		ssl                string
	}
	const nowhere = "db.railway.invalid" // resolves nowhere, as internal names outside their platform
	tests := []struct {
		name        string
		url, public string
		pg          map[string]string
		want        want
	}{
		{"URL", "postgres://hop:pw@127.0.0.1:5433/links", "", nil, want{"127.0.0.1", 5433, "hop", "pw", "links", "prefer"}},
		{"URL with % and @ escaped", "postgres://hop:p%25a%40b%2F@127.0.0.1/links", "", nil, want{"127.0.0.1", 5432, "hop", "p%a@b/", "links", "prefer"}},
		{"URL with a raw @", "postgres://hop:p@b@127.0.0.1/links", "", nil, want{"127.0.0.1", 5432, "hop", "p@b", "links", "prefer"}},
		{"key=value", "host=127.0.0.1 user=hop password='p%a@b c' dbname=links", "", nil, want{"127.0.0.1", 5432, "hop", "p%a@b c", "links", "prefer"}},
		{"sslmode stays", "postgres://hop@127.0.0.1/links?sslmode=disable", "", nil, want{"127.0.0.1", 5432, "hop", "", "links", "disable"}},
		{"PGSSLMODE stays", "postgres://hop@127.0.0.1/links", "", map[string]string{"PGSSLMODE": "require"},
			want{"127.0.0.1", 5432, "hop", "", "links", "require"}},
		{"PG* alone", "", "", map[string]string{"PGHOST": "127.0.0.2", "PGPORT": "5444", "PGUSER": "u", "PGPASSWORD": "p%a@b", "PGDATABASE": "d"},
			want{"127.0.0.2", 5444, "u", "p%a@b", "d", "prefer"}},
		{"URL before PG*", "postgres://hop:pw@127.0.0.1:5433/links", "", map[string]string{"PGHOST": "127.0.0.2", "PGDATABASE": "d"},
			want{"127.0.0.1", 5433, "hop", "pw", "links", "prefer"}},
		{"PG* before public", "", "postgres://hop:pw@127.0.0.3/links", map[string]string{"PGHOST": "127.0.0.2", "PGUSER": "u", "PGDATABASE": "d"},
			want{"127.0.0.2", 5432, "u", "", "d", "prefer"}},
		{"public alone", "", "postgres://hop:pw@127.0.0.3/links", nil, want{"127.0.0.3", 5432, "hop", "pw", "links", "prefer"}},
		{"URL before public", "postgres://hop:pw@localhost/links", "postgres://x:y@127.0.0.3/z", nil, want{"localhost", 5432, "hop", "pw", "links", "prefer"}},
		{"URL's host does not resolve", "postgres://hop:pw@" + nowhere + "/links", "postgres://x:p%40@127.0.0.3:1/z", nil,
			want{"127.0.0.3", 1, "x", "p@", "z", "prefer"}},
		{"key=value's host does not resolve", "host=" + nowhere + " user=hop dbname=links", "host=127.0.0.3 user=x dbname=z", nil,
			want{"127.0.0.3", 5432, "x", "", "z", "prefer"}},
		{"PGHOST does not resolve", "", "postgres://x:y@127.0.0.3/z", map[string]string{"PGHOST": nowhere}, want{"127.0.0.3", 5432, "x", "y", "z", "prefer"}},
		{"does not resolve, nothing else set", "postgres://hop:pw@" + nowhere + "/links", "", nil, want{nowhere, 5432, "hop", "pw", "links", "prefer"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			clearPG(t)
			for k, v := range tt.pg {
				t.Setenv(k, v)
			}
			c, err := pgConfig(Config{DatabaseURL: tt.url, DatabasePublicURL: tt.public})
			if err != nil {
				t.Fatal(err)
			}
			if got := (want{c.Host, int(c.Port), c.User, c.Password, c.Database, string(c.SSLMode)}); got != tt.want {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
		})
	}
	for _, tt := range []struct{ name, url, public, blames string }{
		{"another kind of URL", "mysql://hop:hunter2@127.0.0.1/x", "", "DATABASE_URL"},
		{"half an escape", "postgres://hop:hunter2%zz@127.0.0.1/x", "", "DATABASE_URL"},
		{"an unescaped slash", "postgres://hop:1/hunter2@127.0.0.1/x", "", "DATABASE_URL"},
		{"unknown key", "host=127.0.0.1 hunter2", "", "DATABASE_URL"},
		{"bad public URL", "", "postgres://hop:hunter2%zz@127.0.0.1/x", "DATABASE_PUBLIC_URL"},
		{"bad fallback", "postgres://hop@" + nowhere + "/x", "postgres://hop:hunter2%zz@127.0.0.1/x", "DATABASE_PUBLIC_URL"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			clearPG(t)
			store, err := openStore(Config{DatabaseURL: tt.url, DatabasePublicURL: tt.public, DBConns: 2}, slog.New(slog.DiscardHandler))
			if err == nil {
				store.close()
			}
			if err == nil || !strings.HasPrefix(err.Error(), tt.blames+" is ") || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("error %v, want one that blames %s and shows no password", err, tt.blames)
			}
		})
	}
}

// TestPostgresRefused asks a port where nobody listens: people learn where hop knocked and what to set, and no password.
func TestPostgresRefused(t *testing.T) {
	port := freePort(t)
	dsn := fmt.Sprintf("postgres://hop:hunter2%%40@127.0.0.1:%d/links?sslmode=disable", port)
	for name, try := range map[string]func() error{
		"probe": func() error {
			store, err := openStore(Config{DatabaseURL: dsn, DBConns: 2}, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			defer store.close()
			return store.probe(probeEvery)
		},
		"hop seed": func() error { return run(t.Context(), []string{"seed"}, settingsOf("DATABASE_URL="+dsn)) },
		"hop export": func() error {
			return run(t.Context(), []string{"export", t.TempDir()}, settingsOf("DATABASE_URL="+dsn))
		},
	} {
		t.Run(name, func(t *testing.T) {
			said := fmt.Sprint(try())
			for _, word := range []string{fmt.Sprintf("127.0.0.1:%d/links", port), "refused", "DATABASE_URL", "PGHOST"} {
				if !strings.Contains(said, word) {
					t.Errorf("the error does not name %s: %s", word, said)
				}
			}
			if strings.Contains(said, "hunter2") {
				t.Errorf("the error shows the password: %s", said)
			}
		})
	}
}

// TestPostgresHung stops a server without closing its connections, which lib/pq alone would wait for.
func TestPostgresHung(t *testing.T) {
	pg := startPostgres(t)
	store, _ := testStore(t, Config{DatabaseURL: pg.url, DBConns: 2})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	idle(t, store.db, 2)
	pg.pause(t)
	wantUnavailable(t, store, promptly, "the server hangs")
	ended := make(chan error, 1) // what requests leave behind must end too, or they pile up
	go func() {
		_, err := onConn(context.Background(), store.db, func(c *sql.Conn) (sql.Result, error) { return c.ExecContext(context.Background(), `SELECT 1`) })
		ended <- err
	}()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a hung server answers")
		}
	case <-time.After(2 * promptly):
		t.Error("a statement to a hung server waits for ever")
	}
	go store.monitor(ctx)
	eventually(t, 3*time.Second, "the breaker opens", store.down.Load)
	for range 3 {
		wantUnavailable(t, store, 50*time.Millisecond, "the breaker is open")
	}
	pg.resume(t)
	eventually(t, 5*time.Second, "the store recovers", func() bool { _, err := store.target("abc"); return err == nil })
	if store.down.Load() || store.latency.Load() <= 0 {
		t.Error("the store answers, but the breaker is open or no latency is known")
	}
}

// TestPostgresBusy keeps a request from its answer though the server lives: it fails in time, and others go on.
func TestPostgresBusy(t *testing.T) {
	store, db := testStore(t, Config{DBConns: 2})
	for _, tt := range []struct {
		name string
		busy func(t *testing.T) (release func())
	}{
		{"full pool", func(t *testing.T) func() {
			a, err1 := store.db.Conn(t.Context())
			b, err2 := store.db.Conn(t.Context())
			if err := errors.Join(err1, err2); err != nil {
				t.Fatal(err)
			}
			return func() { a.Close(); b.Close() }
		}},
		{"locked table", func(t *testing.T) func() {
			tx, err := db.Begin()
			if err == nil {
				_, err = tx.Exec(`LOCK TABLE urls IN ACCESS EXCLUSIVE MODE`)
			}
			if err != nil {
				t.Fatal(err)
			}
			return func() { tx.Rollback() }
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			release := tt.busy(t)
			wantUnavailable(t, store, promptly, tt.name)
			start := time.Now()
			if _, err := store.createLinks([]newLink{{code: "abcdef", url: "https://a.example/"}}); !errors.Is(err, errUnavailable) || time.Since(start) > promptly {
				t.Errorf("createLinks: %v after %v", err, time.Since(start))
			}
			if err := store.probe(probeEvery); err != nil || store.down.Load() {
				t.Errorf("the server lives, yet the breaker is open: %v", err)
			}
			release()
			eventually(t, 2*time.Second, "the store answers again", func() bool { _, err := store.target("abc"); return err == nil })
		})
	}
	if n := scalar[int](t, db, `SELECT count(*) FROM urls`); n != 0 {
		t.Errorf("%d links were made by calls that failed", n)
	}
}

// TestPostgresConnectionLost ends all of hop's idle connections, as a server's restart or a firewall does: no reader notices.
func TestPostgresConnectionLost(t *testing.T) {
	store, db := testStore(t, Config{DBConns: 4})
	target := func() error { _, err := store.target("abc"); return err }
	for name, call := range map[string]func() error{
		"target":  target,
		"probe":   func() error { return store.probe(probeEvery) },
		"targets": func() error { _, err := store.targets(0, 10); return err },
	} {
		t.Run(name, func(t *testing.T) {
			idle(t, store.db, 4)
			idle(t, store.back, 4)
			others := `FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`
			if n := scalar[int](t, db, `SELECT count(pg_terminate_backend(pid)) `+others); n != 8 {
				t.Fatalf("%d connections ended of 8", n)
			}
			eventually(t, 5*time.Second, "the connections are gone", func() bool { return scalar[int](t, db, `SELECT count(*) `+others) == 0 })
			if err := call(); err != nil || store.down.Load() {
				t.Errorf("after all connections were ended: %v, breaker open: %v", err, store.down.Load())
			}
			if err := errors.Join(store.probe(probeEvery), target()); err != nil { // and makes room for the next case
				t.Error(err)
			}
		})
	}
}

// TestClassify is what the driver's errors become, and which of them open the breaker.
func TestClassify(t *testing.T) {
	sqlstate := func(severity, code string) error {
		return fmt.Errorf("wrapped: %w", &pq.Error{Severity: severity, Code: pqerror.Code(code)})
	}
	same := errors.New("the error as it was")
	tests := []struct {
		name      string
		err, want error // same: not translated
		down      bool
	}{
		{"none", nil, nil, false},
		{"ours", errNoUser, same, false},
		{"no row", sql.ErrNoRows, errNotFound, false},
		{"statement over its time", sqlstate("ERROR", "57014"), errUnavailable, false},
		{"deadlock", sqlstate("ERROR", "40P01"), errUnavailable, false},
		{"out of memory", sqlstate("ERROR", "53200"), errUnavailable, false},
		{"full pool", context.DeadlineExceeded, errUnavailable, false},
		{"our own mistake", sqlstate("ERROR", "42601"), same, false},
		{"too many connections", sqlstate("FATAL", "53300"), errUnavailable, true},
		{"shutting down", sqlstate("FATAL", "57P01"), errUnavailable, true},
		{"starting up", sqlstate("FATAL", "57P03"), errUnavailable, true},
		{"dead connection", driver.ErrBadConn, errUnavailable, true},
		{"refused", syscall.ECONNREFUSED, errUnavailable, true},
		{"silence", os.ErrDeadlineExceeded, errUnavailable, true},
		{"cut off", io.ErrUnexpectedEOF, errUnavailable, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := &Store{log: slog.New(slog.DiscardHandler)}
			got := s.classify(tt.err)
			if want := tt.want; want == same && got != tt.err || want != same && !errors.Is(got, want) || want == nil && got != nil {
				t.Errorf("classify = %v, want %v", got, want)
			}
			if s.down.Load() != tt.down {
				t.Errorf("breaker open: %v, want %v", s.down.Load(), tt.down)
			}
		})
	}
}

// TestMigrateTogether starts eight replicas on an empty database at once.
func TestMigrateTogether(t *testing.T) {
	dsn := testDatabase(t)
	db := openDB(t, dsn)
	var replicas sync.WaitGroup
	start := make(chan struct{})
	for range 8 {
		store, err := openStore(Config{DatabaseURL: dsn, DBConns: 2}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(store.close)
		replicas.Go(func() {
			<-start
			if err := store.migrate(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	close(start)
	replicas.Wait()
	if n := scalar[int](t, db, `SELECT count(*) FROM pg_tables WHERE schemaname = 'public'`); n != 5 {
		t.Errorf("%d tables, want 5", n)
	}
	missing := scalar[sql.NullString](t, db, `
		SELECT string_agg(table_name || '.' || column_name, ', ') FROM information_schema.columns
		WHERE table_schema = 'public' AND col_description((table_schema || '.' || table_name)::regclass, ordinal_position) IS NULL`)
	if missing.Valid {
		t.Errorf("columns without a comment: %s", missing.String)
	}
}

// ---- helpers ----

// testStore opens a store that is up, on a database of its own unless cfg names one, and gives a pool for the test's own SQL.
func testStore(t *testing.T, cfg Config) (*Store, *sql.DB) {
	t.Helper()
	if cfg.DatabaseURL == "" {
		cfg.DatabaseURL = testDatabase(t)
	}
	if cfg.DBConns == 0 {
		cfg.DBConns = defaultConns()
	}
	if u, err := url.Parse(cfg.DatabaseURL); err != nil || u.Host == "" {
		t.Fatalf("a test database must be given as a URL, not %q", cfg.DatabaseURL)
	}
	store, err := openStore(cfg, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.close)
	if err := errors.Join(store.probe(5*time.Second), store.migrate(t.Context())); err != nil {
		t.Fatal(err)
	}
	return store, openDB(t, cfg.DatabaseURL)
}

// idle makes n idle connections in a pool.
func idle(t *testing.T, pool *sql.DB, n int) {
	t.Helper()
	for range n {
		c, err := pool.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
}

// wantUnavailable reads and must be refused within limit.
func wantUnavailable(t *testing.T, store *Store, limit time.Duration, why string) {
	t.Helper()
	start := time.Now()
	_, err := store.target("abc")
	if took := time.Since(start); !errors.Is(err, errUnavailable) || took > limit {
		t.Errorf("%s: target says %v after %v, want %v within %v", why, err, took, errUnavailable, limit)
	}
}
