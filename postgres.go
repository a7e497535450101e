package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// How hop talks to PostgreSQL: two pools, deadlines below the driver, and a breaker. The questions it asks are in store.go.

const (
	// stmtTimeout is PostgreSQL's own brake on a statement, netTimeout ours on a server that no longer answers at all (lib/pq
	// ignores contexts then, its issue 620), and answerWithin what a handler ever waits for both and for a free connection.
	stmtTimeout, netTimeout, answerWithin = 400 * time.Millisecond, 500 * time.Millisecond, 550 * time.Millisecond
	// backTimeout is the brake on background work: flushing a whole journal, a bulk load, warming.
	backTimeout = 15 * time.Second
	// probeEvery is how often PostgreSQL is asked whether it lives, also the breaker's only way back.
	probeEvery = 500 * time.Millisecond
	backConns  = 4 // a flush, a probe, a bulk load, a warm-up
)

// Store is PostgreSQL, the truth. Its methods return within answerWithin, whatever the server does, unless they say otherwise.
type Store struct {
	db   *sql.DB // requests: short brakes
	back *sql.DB // background work: a locked table or a full request pool cannot stop it
	addr string  // host:port and database, for people; never the password
	log  *slog.Logger
	bulk limiter // bulk loads: one, so that back has connections left

	down    atomic.Bool  // the breaker: while set, requests fail at once and only probes ask
	latency atomic.Int64 // of the last probe, in ns
}

// openStore prepares the pools. It connects to nothing, so it works before PostgreSQL does; the store is down until a probe.
func openStore(cfg Config, log *slog.Logger) (*Store, error) {
	c, err := pgConfig(cfg)
	if err != nil {
		return nil, err
	}
	s := &Store{log: log, bulk: limiter{max: 1}, addr: fmt.Sprintf("%s:%d/%s", c.Host, c.Port, c.Database)}
	s.down.Store(true)
	if s.db, err = openPool(c, cfg.DBConns, stmtTimeout, netTimeout); err == nil {
		s.back, err = openPool(c, backConns, backTimeout, backTimeout)
	}
	return s, err
}

// pgConfig is DATABASE_URL, else the PG* variables, else DATABASE_PUBLIC_URL; the last also when the first names a host that
// does not resolve, as a hosting platform's internal names do not outside of it.
func pgConfig(cfg Config) (pq.Config, error) {
	dsn, name := cfg.DatabaseURL, "DATABASE_URL"
	if dsn == "" && os.Getenv("PGHOST") == "" && cfg.DatabasePublicURL != "" {
		dsn, name = cfg.DatabasePublicURL, "DATABASE_PUBLIC_URL"
	}
	c, err := pq.NewConfig(dsn)
	if err == nil && dsn == cfg.DatabaseURL && cfg.DatabasePublicURL != "" {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if _, noHost := net.DefaultResolver.LookupHost(ctx, c.Host); noHost != nil {
			name = "DATABASE_PUBLIC_URL"
			c, err = pq.NewConfig(cfg.DatabasePublicURL)
		}
	}
	if err != nil || strings.Contains(c.Database, "@") { // both may quote the password: an unescaped / puts it into the database's name
		return c, fmt.Errorf("%s is neither a postgres:// URL nor a key=value string that lib/pq understands", name)
	}
	if c.SSLMode == "" {
		c.SSLMode = pq.SSLModePrefer // lib/pq's own default, require, fails on every local server
	}
	c.BinaryParameters = true // one round trip instead of two, and no prepared statement that a PgBouncer would lose
	return c, nil
}

// openPool returns a pool of at most conns connections whose statements end within stmt and whose network waits within wait.
func openPool(c pq.Config, conns int, stmt, wait time.Duration) (*sql.DB, error) {
	c = c.Clone()
	c.ConnectTimeout = min(wait, 2*time.Second)
	c.Runtime["statement_timeout"] = fmt.Sprint(stmt.Milliseconds())
	c.Runtime["idle_in_transaction_session_timeout"] = "5000" // a stopped replica must not keep its locks
	connector, err := pq.NewConnectorConfig(c)
	if err != nil {
		return nil, err
	}
	connector.Dialer(deadlineDialer{wait})
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns) // fewer would reconnect under every burst
	db.SetConnMaxIdleTime(5 * time.Minute)
	return db, nil
}

// defaultConns is DB_CONNS where it is not set: about four per core keep PostgreSQL busy, more only queue there.
func defaultConns() int { return max(8, 4*runtime.GOMAXPROCS(0)) }

// deadlineDialer dials connections on which no single Read or Write takes longer than limit.
type deadlineDialer struct{ limit time.Duration }

func (d deadlineDialer) Dial(network, addr string) (net.Conn, error) {
	return d.DialTimeout(network, addr, d.limit)
}

func (d deadlineDialer) DialTimeout(network, addr string, limit time.Duration) (net.Conn, error) {
	c, err := net.DialTimeout(network, addr, limit)
	return deadlineConn{c, d.limit}, err
}

// deadlineConn sets a deadline before each Read and Write; where that fails, the Read or Write does too.
type deadlineConn struct {
	net.Conn
	limit time.Duration
}

func (c deadlineConn) Read(p []byte) (int, error) {
	c.SetReadDeadline(time.Now().Add(c.limit))
	return c.Conn.Read(p)
}

func (c deadlineConn) Write(p []byte) (int, error) {
	c.SetWriteDeadline(time.Now().Add(c.limit))
	return c.Conn.Write(p)
}

// within runs fn in a goroutine and waits for it at most limit. The goroutine may outlive the wait, so fn hands its result over
// instead of writing to what the caller sees. ctx is fn's for waiting in queues only.
func within[T any](limit time.Duration, fn func(ctx context.Context) (T, error)) (v T, err error) {
	type result struct {
		value T
		err   error
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	done := make(chan result, 1)
	go func() { v, err := fn(ctx); done <- result{v, err} }()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		return v, ctx.Err()
	}
}

// read runs fn on a connection of the request pool.
func read[T any](s *Store, fn func(*sql.Conn) (T, error)) (T, error) {
	return ask(s, func(ctx context.Context) (T, error) { return onLive(ctx, s.db, fn) })
}

// onLive is onConn for an fn that does not write, which could happen twice: where a connection is found dead, all idle ones are
// dropped, since they die together and unseen when the server restarts, and fn runs on a new one.
func onLive[T any](ctx context.Context, db *sql.DB, fn func(*sql.Conn) (T, error)) (v T, err error) {
	v, err = onConn(ctx, db, fn)
	if errors.Is(err, driver.ErrBadConn) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.EOF) {
		dropIdle(db)
		v, err = onConn(ctx, db, fn)
	}
	return v, err
}

// write runs fn as one transaction, never again: whether a lost commit happened is unknown.
func write[T any](s *Store, fn func(*txn) T) (T, error) {
	return ask(s, func(ctx context.Context) (T, error) { return inTx(ctx, s.db, fn) })
}

// ask is within for requests, unless the breaker is open.
func ask[T any](s *Store, fn func(context.Context) (T, error)) (v T, err error) {
	if s.down.Load() {
		return v, errUnavailable
	}
	v, err = within(answerWithin, fn)
	return v, s.classify(err)
}

// onConn runs fn on one connection. ctx bounds only the wait for a free one: lib/pq would answer its end by dialling a cancel
// request. Taking the connection by hand keeps database/sql from running a statement again behind our back.
func onConn[T any](ctx context.Context, db *sql.DB, fn func(*sql.Conn) (T, error)) (v T, err error) {
	conn, err := db.Conn(ctx)
	if err != nil {
		return v, err
	}
	defer conn.Close()
	return fn(conn)
}

// txn is a transaction that does nothing more once a statement failed; err says why.
type txn struct {
	*sql.Tx
	err error
}

// inTx runs fn in one transaction of db and commits, unless t.err is set.
func inTx[T any](ctx context.Context, db *sql.DB, fn func(t *txn) T) (T, error) {
	return onConn(ctx, db, func(conn *sql.Conn) (v T, err error) {
		tx, err := conn.BeginTx(context.Background(), nil)
		if err != nil {
			return v, err
		}
		defer tx.Rollback()
		t := &txn{Tx: tx}
		if v = fn(t); t.err == nil {
			t.err = ctx.Err() // nobody waits any more: a commit now could undo a later change that was acknowledged
		}
		if t.err != nil {
			return v, t.err
		}
		return v, tx.Commit()
	})
}

// exec runs a statement and returns how many rows it touched.
func (t *txn) exec(query string, args ...any) (n int64) {
	if t.err != nil {
		return 0
	}
	result, err := t.Exec(query, args...)
	if t.err = err; err == nil {
		n, _ = result.RowsAffected()
	}
	return n
}

// row scans the one row of a query into dest; no row is the error none.
func (t *txn) row(none error, dest []any, query string, args ...any) {
	if t.err != nil {
		return
	}
	if t.err = t.QueryRow(query, args...).Scan(dest...); errors.Is(t.err, sql.ErrNoRows) {
		t.err = none
	}
}

// lock takes an advisory lock until the end of the transaction.
func (t *txn) lock(key int64) { t.exec(`SELECT pg_advisory_xact_lock($1)`, key) }

// classify turns an error of the driver into one of ours, and opens the breaker when the server is at fault.
func (s *Store) classify(err error) error {
	switch e := pq.As(err); {
	case err == nil || isOurs(err):
		return err
	case errors.Is(err, sql.ErrNoRows):
		return errNotFound
	case e != nil && !e.Fatal():
		switch e.Code.Class() { // the last is a statement over its time: the table is busy, the server lives
		case pqerror.ClassInsufficientResources, pqerror.ClassTransactionRollback, pqerror.ClassOperatorIntervention:
			return fmt.Errorf("%w: %w", errUnavailable, err)
		}
		if pq.As(err, pqerror.ForeignKeyViolation, pqerror.UniqueViolation) != nil { // a user deleted, an id loaded at the same moment
			return fmt.Errorf("%w: %w", errUnavailable, err)
		}
		return err
	case !errors.Is(err, context.DeadlineExceeded): // that is the full pool's
		s.lost(err)
	}
	return fmt.Errorf("%w: %w", errUnavailable, err)
}

// lost opens the breaker.
func (s *Store) lost(err error) {
	if s.down.CompareAndSwap(false, true) {
		s.log.Warn("postgres lost", "addr", s.addr, "err", err)
	}
}

// probe asks PostgreSQL for a sign of life within limit and sets the breaker by the answer.
func (s *Store) probe(limit time.Duration) error {
	start := time.Now()
	_, err := within(limit, func(ctx context.Context) (sql.Result, error) {
		return onLive(ctx, s.back, func(c *sql.Conn) (sql.Result, error) { return c.ExecContext(context.Background(), `SELECT 1`) })
	})
	if err != nil {
		dropIdle(s.back) // a dead connection must not fail the next probe too
		s.lost(err)
		return fmt.Errorf("PostgreSQL at %s does not answer: %w (set DATABASE_URL, or PGHOST, PGPORT, …)", s.addr, err)
	}
	s.latency.Store(int64(time.Since(start)))
	if s.down.Load() {
		dropIdle(s.db)
		s.down.Store(false)
		s.log.Info("postgres answers", "addr", s.addr)
	}
	return nil
}

// dropIdle closes the idle connections of db.
func dropIdle(db *sql.DB) { db.SetMaxIdleConns(0); db.SetMaxIdleConns(db.Stats().MaxOpenConnections) }

// monitor probes until ctx ends.
func (s *Store) monitor(ctx context.Context) {
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	for ctx.Err() == nil {
		s.probe(probeEvery)
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// migrate applies the schema. It may take as long as backTimeout.
func (s *Store) migrate(ctx context.Context) error {
	_, err := inTx(ctx, s.back, func(t *txn) int64 { t.lock(schemaLock); return t.exec(schema) })
	return err
}

// close ends both pools.
func (s *Store) close() { s.db.Close(); s.back.Close() }
