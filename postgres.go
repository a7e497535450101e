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
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// How hop asks PostgreSQL: pools of connections, an end to every wait, a breaker, transactions.
// What it asks is in store.go.
//
// Promise: whatever PostgreSQL and the network do, a question of a request ends within
// answerWithin, one for many links within bulkWithin. A question carries its deadline in its
// context, and timedConn sets it on the socket; nothing below database/sql can wait any longer.
// TestPostgresSick holds this.

const (
	// answerWithin is the longest that a request waits for PostgreSQL: for a free connection, a new
	// one, and all its statements together. A quarter second more and people press reload.
	answerWithin = 550 * time.Millisecond

	// backgroundWithin is the longest for one step that no request waits for: counting a batch of
	// clicks, loading some thousand rows, reading a chunk of links to warm a cache.
	backgroundWithin = 15 * time.Second

	// bulkWithin is the longest that a request for up to maxBulk links waits: a commit of a thousand
	// takes 50 ms on a machine that is idle.
	bulkWithin = 5 * time.Second
	bulkConns  = 2
	maxBulks   = 16 // such requests that may wait

	// connectWithin ends opening a connection: name lookup, dialling, TLS, logging in.
	connectWithin = 2 * time.Second

	// connLifetime closes connections of that age, so that all of them follow an address that now
	// leads to another server. 10 minutes cost nothing: one dial per connection.
	connLifetime = 10 * time.Minute

	// probeEvery is how often PostgreSQL is asked whether it is well, and probeWithin how long it
	// may take to say so. A breaker that opens half a second late costs some requests 550 ms.
	probeEvery  = 500 * time.Millisecond
	probeWithin = 500 * time.Millisecond

	// backgroundConns is one each for the flush of clicks, the poll, the probe, a bulk load, a
	// warm-up and a removal.
	backgroundConns = 6

	// maxAsking is how many questions may wait for a pool's connections or be under way. Cheap ones
	// are all answered in time, a thousand at once too; of dear ones, which lists are, only maxLists
	// may wait: who stands behind them is told at once.
	maxAsking = 1024
	maxLists  = 128
)

// serverState is how PostgreSQL is, as the last probe found it.
type serverState int32

const (
	serverDown     serverState = iota // it does not answer, or was not asked yet
	serverReadOnly                    // it answers but takes no writes: a standby
	serverUp
)

// String is the word that /health uses.
func (s serverState) String() string {
	switch s {
	case serverUp:
		return "up"
	case serverReadOnly:
		return "read_only"
	}
	return "down"
}

// postgres is a PostgreSQL server with pools of connections to it.
type postgres struct {
	requests   *pool // redirects' misses, creates and changes
	readers    *pool // lists and figures: dear ones must not take the connections of the cheap
	bulk       *pool // hundreds of links in one commit
	background *pool // what no request waits for

	addr    string       // for people
	state   atomic.Int32 // a serverState: the breaker is closed while it is serverUp
	latency atomic.Int64 // of the last probe that was answered, in nanoseconds
	suspect chan struct{}
	pooled  atomic.Bool // a pooler keeps brakes from the server, as the log says
	log     *slog.Logger
}

// pool is some connections, how many may ask on them at once, and the longest that one question may
// take.
type pool struct {
	*sql.DB
	pg     *postgres
	asking limiter
	lists  limiter // those of asking that are lists
	within time.Duration

	// changing holds one for each transaction under way, half as many as there are connections.
	// Transactions wait for each other's locks, for which questions must not wait.
	changing chan struct{}
}

// openPostgres prepares the pools. It connects to nothing. conns is the size of the largest.
func openPostgres(config pq.Config, conns int, log *slog.Logger) *postgres {
	pg := &postgres{
		addr:    fmt.Sprintf("%s:%d/%s", config.Host, config.Port, config.Database),
		suspect: make(chan struct{}, 1),
		log:     log,
	}
	pg.requests = pg.openPool(config, conns, answerWithin, maxAsking)
	pg.readers = pg.openPool(config, max(2, conns/2), answerWithin, maxAsking)
	pg.bulk = pg.openPool(config, bulkConns, bulkWithin, maxBulks)
	pg.background = pg.openPool(config, backgroundConns, backgroundWithin, maxAsking)
	return pg
}

// openPool returns a pool of at most conns connections, for at most asking questions at once.
func (pg *postgres) openPool(config pq.Config, conns int, within time.Duration,
	asking int64) *pool {

	config = config.Clone()
	config.ConnectTimeout = 0 // ours is on the socket already; the driver would lift it
	db := sql.OpenDB(&connector{
		config: config,
		brakes: brakesOf(within),
		pooled: &pg.pooled,
		log:    pg.log,
		born:   &atomic.Int64{},
	})
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns) // fewer would dial again in every burst
	db.SetConnMaxIdleTime(connLifetime / 2)
	db.SetConnMaxLifetime(connLifetime)
	return &pool{
		DB:       db,
		pg:       pg,
		asking:   limiter{max: asking},
		lists:    limiter{max: maxLists},
		within:   within,
		changing: make(chan struct{}, max(1, conns/2)),
	}
}

// connectAhead opens the first connections for requests: on a machine that is short of time, a
// login alone may take longer than a request waits.
func (pg *postgres) connectAhead(ctx context.Context) error {
	const each = 2
	ctx, cancel := context.WithTimeout(ctx, connectWithin)
	defer cancel()
	for _, p := range []*pool{pg.requests, pg.readers} {
		for range each {
			conn, err := p.Conn(ctx)
			if err != nil {
				return err
			}
			defer conn.Close() // at the end, so that the next one is another
		}
	}
	return nil
}

// milliseconds writes d as PostgreSQL's settings want it.
func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

// close ends all pools.
func (pg *postgres) close() {
	pg.requests.Close()
	pg.readers.Close()
	pg.bulk.Close()
	pg.background.Close()
}

// ---- asking ----

// queryOne returns the one row of a query, or errNotFound. dest names the places to scan it into.
func queryOne[T any](ctx context.Context, p *pool, dest func(*T) []any, query string,
	args ...any) (T, error) {

	var row T
	err := p.do(ctx, func(ctx context.Context) error {
		return p.QueryRowContext(ctx, query, args...).Scan(dest(&row)...)
	})
	return row, err
}

// queryAll returns all rows of a query.
func queryAll[T any](ctx context.Context, p *pool, dest func(*T) []any, query string,
	args ...any) ([]T, error) {

	var all []T
	err := p.do(ctx, func(ctx context.Context) error {
		rows, err := p.QueryContext(ctx, query, args...)
		if err != nil {
			return err
		}
		all, err = collect(rows, dest)
		return err
	})
	return all, err
}

// collect scans rows to their end and closes them. Without rows it returns an empty slice.
func collect[T any](rows *sql.Rows, dest func(*T) []any) ([]T, error) {
	defer rows.Close()
	all := []T{}
	for rows.Next() {
		var row T
		if err := rows.Scan(dest(&row)...); err != nil {
			return nil, err
		}
		all = append(all, row)
	}
	return all, rows.Err()
}

// insertOnce runs one statement that writes and returns its rows. Unlike queryAll it never runs the
// statement again on another connection: whether a lost answer was a commit is unknown.
func insertOnce[T any](ctx context.Context, p *pool, dest func(*T) []any, query string,
	args ...any) ([]T, error) {

	var all []T
	err := p.do(ctx, func(ctx context.Context) error {
		conn, err := p.Conn(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		rows, err := conn.QueryContext(ctx, query, args...)
		if err != nil {
			return err
		}
		all, err = collect(rows, dest)
		return err
	})
	return all, err
}

// inTx runs fn in one transaction and commits it, unless fn fails or ctx has ended: a commit that
// nobody waits for any more could undo a later change that was acknowledged.
func (p *pool) inTx(ctx context.Context, fn func(ctx context.Context, tx *sql.Tx) error) error {
	return p.do(ctx, func(ctx context.Context) error {
		select {
		case p.changing <- struct{}{}:
			defer func() { <-p.changing }()
		case <-ctx.Done():
			return errOverloaded
		}
		tx, err := p.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		if err := fn(ctx, tx); err != nil {
			return err
		}
		return tx.Commit()
	})
}

// txQueryOne scans the one row of a query in a transaction into dest. No row is the error none.
func txQueryOne(ctx context.Context, tx *sql.Tx, none error, dest []any, query string,
	args ...any) error {

	err := tx.QueryRowContext(ctx, query, args...).Scan(dest...)
	if errors.Is(err, sql.ErrNoRows) {
		return none
	}
	return err
}

// txExec runs a statement in a transaction and returns how many rows it touched.
func txExec(ctx context.Context, tx *sql.Tx, query string, args ...any) (int64, error) {
	result, err := tx.ExecContext(ctx, query, args...)
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

// txLock takes an advisory lock until the end of the transaction.
func txLock(ctx context.Context, tx *sql.Tx, key int64) error {
	_, err := tx.ExecContext(ctx, `SELECT pg_advisory_xact_lock($1)`, key)
	return err
}

// do runs one question within the pool's time, unless the breaker is open, and translates its
// error. What a transaction that collided with another may not do is tried again while there is
// time: nothing of it happened.
func (p *pool) do(ctx context.Context, question func(ctx context.Context) error) error {
	if !p.pg.up() {
		return errUnavailable
	}
	if !p.asking.enter() {
		return errOverloaded
	}
	defer p.asking.leave()
	ctx, cancel := context.WithTimeout(ctx, p.within)
	defer cancel()
	for {
		err := question(ctx)
		if errors.Is(err, sql.ErrTxDone) && errors.Is(ctx.Err(), context.Canceled) {
			err = context.Canceled // the client left, which database/sql was quicker to see
		}
		if !collided(err) || ctx.Err() != nil {
			return p.pg.classify(err)
		}
	}
}

// collided says whether a transaction failed only because of another: a serialization failure or a
// deadlock.
func collided(err error) bool {
	failure := pq.As(err)
	return failure != nil && (failure.Code == pqerror.TRSerializationFailure ||
		failure.Code == pqerror.TRDeadlockDetected)
}

// ---- what an error means ----

// ours are the errors that need no translation.
var ours = []error{
	errNotFound, errNoUser, errNoLink, errCodeTaken, errUserExists, errChanged,
	errUnavailable, errOverloaded,
}

// classify turns an error of the driver into one of ours. What looks like a sick server is not
// believed at once: the next probe, which it hurries, says so.
func (pg *postgres) classify(err error) error {
	if err == nil {
		return nil
	}
	for _, own := range ours {
		if errors.Is(err, own) {
			return err
		}
	}
	if errors.Is(err, sql.ErrNoRows) {
		return errNotFound
	}
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("%w: %w", errUnavailable, err) // the client is gone
	}
	if isBroken(err) {
		pg.hurryProbe()
		return fmt.Errorf("%w: %w", errUnavailable, err)
	}
	failure := pq.As(err)
	if failure == nil {
		return err
	}
	switch failure.Code {
	case pqerror.ReadOnlySQLTransaction, pqerror.FeatureNotSupported:
		pg.dropConnections() // they lead to a standby, whatever the address leads to by now
		pg.hurryProbe()
		return fmt.Errorf("%w: %w", errUnavailable, err)
	case pqerror.ForeignKeyViolation, pqerror.UniqueViolation, pqerror.LockNotAvailable:
		// Something else was removed or loaded at the same moment.
		return fmt.Errorf("%w: %w", errUnavailable, err)
	}
	switch failure.Code.Class() {
	case pqerror.ClassConnectionException:
		pg.hurryProbe()
		return fmt.Errorf("%w: %w", errUnavailable, err)
	case pqerror.ClassInsufficientResources, pqerror.ClassTransactionRollback,
		pqerror.ClassOperatorIntervention:
		// The server is busy, or ends this one session or statement. It is well.
		return fmt.Errorf("%w: %w", errUnavailable, err)
	}
	return err
}

// connectError is why there is no new connection.
type connectError struct{ error }

// Unwrap lets errors.Is and errors.As see the cause.
func (e connectError) Unwrap() error { return e.error }

// isBroken says whether err is about the connection: there is none, or it failed, or no answer came
// in time.
func isBroken(err error) bool {
	if _, ok := errors.AsType[connectError](err); ok {
		return true
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return true
	}
	for _, broken := range []error{
		driver.ErrBadConn, sql.ErrConnDone, sql.ErrTxDone, io.EOF, io.ErrUnexpectedEOF,
		context.DeadlineExceeded, os.ErrDeadlineExceeded,
	} {
		if errors.Is(err, broken) {
			return true
		}
	}
	return false
}

// ---- is the server well? ----

// current is the state that the last probe found.
func (pg *postgres) current() serverState { return serverState(pg.state.Load()) }

// up says whether questions may be asked.
func (pg *postgres) up() bool { return pg.current() == serverUp }

// hurryProbe asks for a probe now.
func (pg *postgres) hurryProbe() {
	select {
	case pg.suspect <- struct{}{}:
	default: // one is asked for already
	}
}

// dropConnections has every open connection closed when it is next taken or given back.
func (pg *postgres) dropConnections() {
	now := time.Now().UnixNano()
	for _, p := range []*pool{pg.requests, pg.readers, pg.bulk, pg.background} {
		p.Driver().(*connector).born.Store(now)
	}
}

// probe asks the server whether it is well and takes writes, and sets the breaker by the answer.
// The error says why it is not well.
func (pg *postgres) probe(asked context.Context) error {
	ctx, cancel := context.WithTimeout(asked, probeWithin)
	defer cancel()
	start := time.Now()
	readOnly, err := pg.askReadOnly(ctx)
	if err != nil && ctx.Err() == nil {
		// Maybe only this one session was ended, which says nothing about the server.
		readOnly, err = pg.askReadOnly(ctx)
	}
	if err == nil && !readOnly {
		pg.latency.Store(int64(time.Since(start)))
		pg.become(serverUp, nil)
		return nil
	}
	if ended := asked.Err(); ended != nil {
		return ended // whoever asked is leaving; it says nothing about the server
	}
	if pg.busy(err) {
		return nil
	}
	pg.dropConnections()
	if readOnly || err != nil && refusesWrites(err) {
		err = errors.New("it takes no writes: is it a standby?")
		pg.become(serverReadOnly, err)
	} else {
		pg.become(serverDown, err)
	}
	return fmt.Errorf("PostgreSQL at %s: %w (set DATABASE_URL, or PGHOST, PGPORT, …)", pg.addr, err)
}

// askReadOnly asks the server whether it takes no writes.
func (pg *postgres) askReadOnly(ctx context.Context) (readOnly bool, err error) {
	err = pg.background.QueryRowContext(ctx, `
		SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean`).
		Scan(&readOnly)
	return readOnly, err
}

// refusesWrites says whether the driver gave a connection up because its server is read-only.
func refusesWrites(err error) bool {
	return strings.Contains(err.Error(), "read-only") ||
		strings.Contains(err.Error(), "hot standby")
}

// busy says whether the probe failed because the server has more to do than it can, which is no
// reason to stop asking. A server that never answered is not busy.
func (pg *postgres) busy(err error) bool {
	if err == nil || !pg.up() {
		return false
	}
	failure := pq.As(err)
	if failure == nil {
		return false
	}
	switch failure.Code {
	case pqerror.TooManyConnections, pqerror.QueryCanceled:
		return true
	}
	return false
}

// become sets the state and logs a change of it.
func (pg *postgres) become(state serverState, cause error) {
	before := serverState(pg.state.Swap(int32(state)))
	switch {
	case before == state:
	case state == serverUp:
		pg.log.Info("postgres answers", "addr", pg.addr)
	default:
		pg.log.Warn("postgres lost", "addr", pg.addr, "state", state.String(), "err", cause)
	}
}

// monitor probes until ctx ends, every probeEvery and whenever a request had reason to doubt.
func (pg *postgres) monitor(ctx context.Context) {
	const pause = 50 * time.Millisecond // between hurried probes: 20/s cost nothing
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-pg.suspect:
		case <-ctx.Done():
			return
		}
		pg.probe(ctx)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

// ---- connections ----

// connector opens connections for database/sql. Each has a dialler of its own, which is how hop
// gets hold of the socket under the driver.
type connector struct {
	config pq.Config
	brakes brakes
	log    *slog.Logger
	plain  atomic.Bool   // a pooler refuses the brakes at the start of a connection: send none
	pooled *atomic.Bool  // the log says already that a pooler keeps them from the server
	born   *atomic.Int64 // connections opened before this time (unix nanoseconds) are not used
}

// Connect opens one connection within connectWithin, or within what is left of ctx.
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectWithin)
	defer cancel()
	conn, err := c.connect(ctx)
	if err != nil && !c.plain.Load() && c.brakes.refusedBy(err) {
		c.plain.Store(true)
		conn, err = c.connect(ctx)
	}
	if err != nil {
		return nil, connectError{err}
	}
	return conn, nil
}

// connect is one attempt of Connect.
func (c *connector) connect(ctx context.Context) (driver.Conn, error) {
	config := c.config.Clone()
	if !c.plain.Load() {
		for _, b := range c.brakes {
			config.Runtime[b.name] = milliseconds(b.after)
		}
	}
	inner, err := pq.NewConnectorConfig(config)
	if err != nil {
		return nil, err
	}
	dialer := &socketDialer{hosts: 1 + len(config.Multi)}
	inner.Dialer(dialer)
	conn, err := inner.Connect(ctx)
	if err != nil {
		return nil, err
	}
	timed := &timedConn{
		driverConn: conn.(driverConn),
		socket:     dialer.socket,
		opened:     time.Now().UnixNano(),
		born:       c.born,
	}
	reached, err := c.brakes.reached(timed.driverConn)
	if err != nil {
		conn.Close()
		return nil, err
	}
	if !reached {
		timed.setBrakes = c.brakes.setLocal()
		if !c.pooled.Swap(true) {
			c.log.Info("a pooler keeps statement_timeout from PostgreSQL: every transaction sets it")
		}
	}
	return timed, nil
}

// Driver returns the connector itself, which is how dropConnections finds it.
func (c *connector) Driver() driver.Driver { return c }

// Open is never called: connections are opened by Connect.
func (c *connector) Open(string) (driver.Conn, error) {
	return nil, errors.New("use Connect")
}

// watchedSocket remembers that a read or a write failed. The driver forgets some of these errors,
// and would then hand out a connection that is in the middle of an answer.
type watchedSocket struct {
	net.Conn
	failed atomic.Bool
}

// Read reads.
func (s *watchedSocket) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if err != nil {
		s.failed.Store(true)
	}
	return n, err
}

// Write writes.
func (s *watchedSocket) Write(p []byte) (int, error) {
	n, err := s.Conn.Write(p)
	if err != nil {
		s.failed.Store(true)
	}
	return n, err
}

// socketDialer dials one connection, keeps its socket, and gives it a deadline. The driver asks it
// for one host after another until one is as wanted, and for a host that has no TLS twice.
type socketDialer struct {
	socket   *watchedSocket
	hosts    int       // that were not dialled yet
	addr     string    // dialled last
	deadline time.Time // for addr
}

// DialContext dials addr. The driver then logs in under the same deadline. Each host may take an
// equal share of the time that is left: one that hangs must not keep the driver from the next.
func (d *socketDialer) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	if d.socket != nil {
		d.socket.Close() // the driver leaves it open when it goes on without TLS
	}
	deadline, _ := ctx.Deadline()
	if addr == d.addr {
		deadline = d.deadline
	} else if d.hosts > 1 {
		deadline = time.Now().Add(time.Until(deadline) / time.Duration(d.hosts))
		d.hosts--
	}
	d.addr = addr
	d.deadline = deadline
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	socket, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	d.socket = &watchedSocket{Conn: socket}
	return d.socket, socket.SetDeadline(deadline)
}

// Dial makes socketDialer a pq.Dialer; the driver prefers DialContext.
func (d *socketDialer) Dial(network, addr string) (net.Conn, error) {
	return d.DialTimeout(network, addr, connectWithin)
}

// DialTimeout is as Dial.
func (d *socketDialer) DialTimeout(network, addr string, t time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), t)
	defer cancel()
	return d.DialContext(ctx, network, addr)
}

// driverConn is what the driver's connections can do, as far as database/sql makes use of it.
type driverConn interface {
	driver.Conn
	driver.ConnBeginTx
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.NamedValueChecker
	driver.Pinger
	driver.QueryerContext
	driver.SessionResetter
	driver.Validator
}

// timedConn is a connection on which a question's deadline is the socket's deadline. The driver
// alone would wait for a server that has stopped answering as long as that server likes, and at the
// end of a context it would dial another connection to cancel the statement; so it is given no
// context that ends.
type timedConn struct {
	driverConn
	socket *watchedSocket
	opened int64         // unix nanoseconds
	born   *atomic.Int64 // the connector's

	setBrakes string // gives a transaction its brakes; "" where the server has them anyway
	inTx      bool   // between BeginTx and the transaction's end
}

// limit gives the socket the deadline of ctx. It holds for all that follows until the next call:
// reading rows, commit, rollback.
func (c *timedConn) limit(ctx context.Context) error {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(backgroundWithin)
	}
	return c.socket.SetDeadline(deadline)
}

// QueryContext runs a query that ends with the deadline of ctx.
func (c *timedConn) QueryContext(ctx context.Context, query string,
	args []driver.NamedValue) (driver.Rows, error) {

	if err := c.limit(ctx); err != nil {
		return nil, err
	}
	if c.setBrakes != "" && !c.inTx {
		return c.queryBraked(query, args)
	}
	return c.driverConn.QueryContext(context.Background(), query, args)
}

// ExecContext runs a statement that ends with the deadline of ctx. Outside a transaction it sets no
// brakes: only ANALYZE, which ends with the socket's deadline, and the building of indexes come
// here.
func (c *timedConn) ExecContext(ctx context.Context, query string,
	args []driver.NamedValue) (driver.Result, error) {

	if err := c.limit(ctx); err != nil {
		return nil, err
	}
	return c.driverConn.ExecContext(context.Background(), query, args)
}

// BeginTx starts a transaction. Its commit ends with the deadline of ctx too.
func (c *timedConn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	if err := c.limit(ctx); err != nil {
		return nil, err
	}
	tx, err := c.driverConn.BeginTx(context.Background(), opts)
	if err != nil || c.setBrakes == "" {
		return tx, err
	}
	if _, err := c.driverConn.ExecContext(context.Background(), c.setBrakes, nil); err != nil {
		tx.Rollback()
		return nil, err
	}
	c.inTx = true
	return brakedTx{tx, c}, nil
}

// ResetSession is called when the connection is taken out of the pool. One that is too old, or
// whose server has gone, is replaced by database/sql: a restart of PostgreSQL must not fail the
// first write of every pooled connection. The look costs one system call, 0.3 µs.
func (c *timedConn) ResetSession(ctx context.Context) error {
	if !c.IsValid() || connDead(c.socket.Conn) {
		return driver.ErrBadConn
	}
	return c.driverConn.ResetSession(ctx)
}

// IsValid says whether the pool may keep the connection.
func (c *timedConn) IsValid() bool {
	return c.opened >= c.born.Load() && !c.socket.failed.Load() && c.driverConn.IsValid()
}

// queryBraked runs one query in a transaction of its own that has brakes. It reads all rows before
// it commits, so that whoever has the rows knows that the commit took place.
func (c *timedConn) queryBraked(query string, args []driver.NamedValue) (driver.Rows, error) {
	ctx := context.Background() // the socket has the deadline
	_, err := c.driverConn.ExecContext(ctx, "BEGIN; "+c.setBrakes, nil)
	if err != nil {
		return nil, c.rollback(err)
	}
	rows, err := c.driverConn.QueryContext(ctx, query, args)
	if err != nil {
		return nil, c.rollback(err)
	}
	kept, err := keepRows(rows)
	if err != nil {
		return nil, c.rollback(err)
	}
	if _, err := c.driverConn.ExecContext(ctx, "COMMIT", nil); err != nil {
		return nil, err
	}
	return kept, nil
}

// rollback ends a transaction that failed with cause, which it returns. A connection that cannot
// roll back is not used again.
func (c *timedConn) rollback(cause error) error {
	if _, err := c.driverConn.ExecContext(context.Background(), "ROLLBACK", nil); err != nil {
		c.socket.failed.Store(true)
	}
	return cause
}

// brakedTx is a transaction with brakes of its own. After its end the connection sets them again.
type brakedTx struct {
	driver.Tx
	conn *timedConn
}

// Commit commits.
func (tx brakedTx) Commit() error {
	tx.conn.inTx = false
	return tx.Tx.Commit()
}

// Rollback rolls back.
func (tx brakedTx) Rollback() error {
	tx.conn.inTx = false
	return tx.Tx.Rollback()
}

// isPooled says whether a pooler is between conn and PostgreSQL, for all that hop can see.
func isPooled(conn *sql.Conn) bool {
	pooled := false
	conn.Raw(func(c any) error {
		timed, ok := c.(*timedConn)
		pooled = ok && timed.setBrakes != ""
		return nil
	})
	return pooled
}
