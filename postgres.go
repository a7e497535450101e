package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// How hop talks to PostgreSQL: two pools, deadlines below the driver, and a breaker. The queries are in store.go.

const (
	// stmtTimeout is PostgreSQL's own brake on a statement, netTimeout ours on a server that no longer answers at all (lib/pq
	// ignores contexts then, its issue 620), and answerWithin what a handler ever waits for both and for a free connection.
	stmtTimeout, netTimeout, answerWithin = 400 * time.Millisecond, 500 * time.Millisecond, 550 * time.Millisecond
	// backTimeout is the brake on background work: flushing a whole journal, a bulk load, warming.
	backTimeout = 60 * time.Second
	// probeEvery is how often PostgreSQL is asked whether it lives, also the breaker's only way back.
	probeEvery = 500 * time.Millisecond
)

// Store is PostgreSQL, the truth. Every method returns within answerWithin, whatever the server does, unless it says otherwise.
type Store struct {
	db   *sql.DB // requests: short brakes
	back *sql.DB // flushes, probes, warming, bulk loads: so that a locked table or a full pool cannot stop them
	addr string  // host:port and database, for people; never the password
	log  *slog.Logger
	bulk limiter // bulk loads: one, so that back has connections left for flushes

	down    atomic.Bool  // the breaker: while set, requests fail at once and only probes ask
	latency atomic.Int64 // of the last probe, in ns
}

// openStore prepares the pools; it connects to nothing, so it works before PostgreSQL does. conns caps the request pool: about
// four per core keep PostgreSQL busy, more only queue there (design.md, section 4). The store is down until a probe says else.
func openStore(cfg Config, log *slog.Logger) (*Store, error) {
	pgConfig, err := pgConfig(cfg)
	if err != nil {
		return nil, err
	}
	s := &Store{log: log, bulk: limiter{max: 1}, addr: fmt.Sprintf("%s:%d/%s", pgConfig.Host, pgConfig.Port, pgConfig.Database)}
	if s.db, err = openPool(pgConfig, cfg.DBConns, stmtTimeout, netTimeout); err != nil {
		return nil, err
	}
	s.back, err = openPool(pgConfig, 4, backTimeout, backTimeout)
	s.down.Store(true)
	return s, err
}

// pgConfig is DATABASE_URL, else the PG* variables, else DATABASE_PUBLIC_URL; the last also when the first names a host that
// does not resolve, as a hosting platform's internal names do not outside of it.
func pgConfig(cfg Config) (pq.Config, error) {
	parse := func(name, dsn string) (pq.Config, error) {
		c, err := pq.NewConfig(dsn)
		if err != nil {
			return c, fmt.Errorf("%s is neither a postgres:// URL nor a key=value string lib/pq understands", name) // err may quote the password
		}
		return c, nil
	}
	dsn, name := cfg.DatabaseURL, "DATABASE_URL"
	if dsn == "" && os.Getenv("PGHOST") == "" && cfg.DatabasePublicURL != "" {
		dsn, name = cfg.DatabasePublicURL, "DATABASE_PUBLIC_URL"
	}
	c, err := parse(name, dsn)
	if err == nil && dsn == cfg.DatabaseURL && cfg.DatabasePublicURL != "" {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if _, lookupErr := net.DefaultResolver.LookupHost(ctx, c.Host); lookupErr != nil {
			c, err = parse("DATABASE_PUBLIC_URL", cfg.DatabasePublicURL)
		}
	}
	if c.SSLMode == "" {
		c.SSLMode = pq.SSLModePrefer // lib/pq's own default, require, fails on every local server
	}
	c.BinaryParameters = true // one round trip instead of two, and no prepared statement that a PgBouncer would lose
	return c, err
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

// deadlineDialer dials connections on which no single Read or Write takes longer than limit.
type deadlineDialer struct{ limit time.Duration }

func (d deadlineDialer) Dial(network, addr string) (net.Conn, error) {
	return d.DialTimeout(network, addr, d.limit)
}

func (d deadlineDialer) DialTimeout(network, addr string, limit time.Duration) (net.Conn, error) {
	c, err := net.DialTimeout(network, addr, limit)
	return deadlineConn{c, d.limit}, err
}

type deadlineConn struct {
	net.Conn
	limit time.Duration
}

func (c deadlineConn) Read(p []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.limit)); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

func (c deadlineConn) Write(p []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.limit)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// read runs fn on a pooled connection and waits for it no longer than answerWithin. The goroutine may outlive the wait, so fn
// hands its result over instead of writing to what the caller can see. A connection found dead is replaced once: idle ones die
// unseen when the server restarts. fn must not be a write, which could then run twice.
func read[T any](s *Store, fn func(*sql.Conn) (T, error)) (T, error) {
	return within(s, func(ctx context.Context) (v T, err error) {
		for range 2 {
			if v, err = onConn(ctx, s.db, fn); !errors.Is(err, driver.ErrBadConn) {
				break
			}
		}
		return v, err
	})
}

// write is read for one transaction. It is never tried again: whether a lost commit happened is unknown.
func write[T any](s *Store, fn func(*sql.Tx) (T, error)) (T, error) {
	return within(s, func(ctx context.Context) (T, error) { return inTx(ctx, s.db, fn) })
}

// within runs fn in a goroutine, at most answerWithin long, unless the breaker is open.
func within[T any](s *Store, fn func(context.Context) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	var none T
	if s.down.Load() {
		return none, errUnavailable
	}
	ctx, cancel := context.WithTimeout(context.Background(), answerWithin)
	defer cancel()
	done := make(chan result, 1)
	go func() {
		v, err := fn(ctx)
		done <- result{v, s.classify(err)}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		return none, errUnavailable
	}
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

// inTx runs fn in one transaction.
func inTx[T any](ctx context.Context, db *sql.DB, fn func(*sql.Tx) (T, error)) (T, error) {
	return onConn(ctx, db, func(conn *sql.Conn) (v T, err error) {
		tx, err := conn.BeginTx(context.Background(), nil)
		if err != nil {
			return v, err
		}
		defer tx.Rollback()
		if v, err = fn(tx); err != nil {
			return v, err
		}
		return v, tx.Commit()
	})
}

// classify turns an error of the driver into one of ours and opens the breaker when the server is at fault.
func (s *Store) classify(err error) error {
	if err == nil || errors.Is(err, errNotFound) || errors.Is(err, errNoUser) || errors.Is(err, errNoLink) || errors.Is(err, errUserExists) {
		return err
	}
	if errors.Is(err, sql.ErrNoRows) {
		return errNotFound
	}
	if e := pq.As(err); e != nil && !e.Fatal() {
		switch e.Code.Class() {
		case pqerror.ClassInsufficientResources, pqerror.ClassTransactionRollback:
			return fmt.Errorf("%w: %w", errUnavailable, err)
		case pqerror.ClassOperatorIntervention: // a statement over its time: the table is busy, the server lives
			return fmt.Errorf("%w: %w", errUnavailable, err)
		}
		return err
	}
	if !errors.Is(err, context.DeadlineExceeded) && s.down.CompareAndSwap(false, true) { // the deadline is the full pool's
		s.log.Warn("postgres lost", "addr", s.addr, "err", err)
	}
	return fmt.Errorf("%w: %w", errUnavailable, err)
}

// probe asks PostgreSQL for a sign of life within limit and sets the breaker by the answer.
func (s *Store) probe(limit time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	start := time.Now()
	done := make(chan error, 1)
	go func() {
		_, err := onConn(ctx, s.back, func(c *sql.Conn) (struct{}, error) {
			_, err := c.ExecContext(context.Background(), `SELECT 1`)
			return struct{}{}, err
		})
		done <- err
	}()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		err = fmt.Errorf("no answer within %v", limit)
	}
	if err != nil {
		dropIdle(s.back, 4) // a dead connection must not fail the next probe too
		if s.down.CompareAndSwap(false, true) {
			s.log.Warn("postgres lost", "addr", s.addr, "err", err)
		}
		return fmt.Errorf("PostgreSQL at %s does not answer: %w (set DATABASE_URL, or PGHOST, PGPORT, …)", s.addr, err)
	}
	s.latency.Store(int64(time.Since(start)))
	if s.down.Load() {
		dropIdle(s.db, s.db.Stats().MaxOpenConnections)
		s.down.Store(false)
		s.log.Info("postgres answers", "addr", s.addr)
	}
	return nil
}

// dropIdle closes the idle connections of db, which keeps at most conns.
func dropIdle(db *sql.DB, conns int) { db.SetMaxIdleConns(0); db.SetMaxIdleConns(conns) }

// monitor probes until ctx ends.
func (s *Store) monitor(ctx context.Context) {
	for tick := time.NewTicker(probeEvery); ; {
		select {
		case <-tick.C:
			s.probe(probeEvery)
		case <-ctx.Done():
			tick.Stop()
			return
		}
	}
}

// migrate applies the schema. It may take as long as backTimeout.
func (s *Store) migrate(ctx context.Context) error {
	_, err := inTx(ctx, s.back, func(tx *sql.Tx) (struct{}, error) {
		if err := lock(tx, schemaLock); err != nil {
			return struct{}{}, err
		}
		_, err := tx.Exec(schema)
		return struct{}{}, err
	})
	return err
}

// lock takes an advisory lock until the end of the transaction.
func lock(tx *sql.Tx, key int64) error {
	_, err := tx.Exec(`SELECT pg_advisory_xact_lock($1)`, key)
	return err
}

// close ends both pools.
func (s *Store) close() { s.db.Close(); s.back.Close() }

// defaultConns is the request pool's size when DB_CONNS is not set.
func defaultConns() int { return max(8, 4*runtime.GOMAXPROCS(0)) }
