package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/lib/pq"
)

// What hop asks PostgreSQL: one method per question, with its SQL beside it. How it asks, and why
// every question ends in time, is in postgres.go.

// Store is the truth about users, links and events.
type Store struct {
	pg        *postgres
	bulkLoads limiter // one at a time: each keeps a background connection for seconds
	uploads   limiter // blocks of uploaded files in memory

	removedRows atomic.Int64 // rows of old clicks that KEEP_CLICKS has removed
}

// Uploaded files are read whole before anything is written, so that a slow sender holds no lock.
// All of them together take 256 MiB at most.
const (
	uploadBlock     = 64 << 10
	maxUploadBlocks = 4096
)

// newStore returns a store over pg.
func newStore(pg *postgres) *Store {
	return &Store{pg: pg, bulkLoads: limiter{max: 1}, uploads: limiter{max: maxUploadBlocks}}
}

// forOneAnswer gives the questions that lead to one answer, all together, the time of one.
func (s *Store) forOneAnswer(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, s.pg.readers.within)
}

// Advisory locks: "hop" in ASCII and a number. Each is held to the end of one transaction.
const (
	clickLock  = 0x686f7001 // flushes of clicks, which touch many rows, one at a time
	userLock   = 0x686f7002 // the check that a user name is free, and the insert after it
	schemaLock = 0x686f7003 // changes of the schema

	// loadLock makes loads wait for each other: two that hold the same rows in other orders would
	// deadlock.
	loadLock = 0x686f7004
)

// Pieces of SQL that several questions share.
const (
	utcNow   = `date_trunc('second', now() AT TIME ZONE 'UTC')`
	utcToday = `(now() AT TIME ZONE 'UTC')::date`
	userCols = `id, username, email, created_at`
	linkCols = `urls.id, urls.user_id, short_code, original_url, title, is_active, created_at,
		updated_at, expires_at`
	nextStamp = `GREATEST(` + utcNow + `, updated_at + interval '1 second')`
	isLive    = `is_active AND deleted_at IS NULL
		AND (expires_at IS NULL OR expires_at > now() AT TIME ZONE 'UTC')`
	targetCols = `id, short_code, original_url,
		COALESCE(EXTRACT(EPOCH FROM expires_at)::bigint, 0)`
)

// userDest names the places for a row of userCols.
func userDest(u *user) []any {
	return []any{&u.ID, &u.Username, &u.Email, &u.CreatedAt}
}

// linkDest names the places for a row of linkCols.
func linkDest(l *link) []any {
	return []any{
		&l.ID, &l.UserID, &l.ShortCode, &l.OriginalURL, &l.Title, &l.IsActive, &l.CreatedAt,
		&l.UpdatedAt, &l.ExpiresAt,
	}
}

// storedURL is a text column that becomes a Location header while it is scanned.
type storedURL struct{ location *[]string }

// Scan takes what the driver gives for a text column.
func (u storedURL) Scan(v any) error {
	switch text := v.(type) {
	case string:
		*u.location = []string{asciiLocation(text)}
	case []byte:
		*u.location = []string{asciiLocation(string(text))}
	default:
		return fmt.Errorf("cannot read %T as a URL", v)
	}
	return nil
}

// targetDest names the places for a row of targetCols.
func targetDest(t *codeTarget) []any {
	return []any{&t.id, &t.code, storedURL{&t.location}, &t.expires}
}

// ---- redirects ----

// targets returns what those of codes that lead somewhere lead to, in any order.
func (s *Store) targets(ctx context.Context, codes []string) ([]codeTarget, error) {
	return queryAll(ctx, s.pg.requests, targetDest, `
		SELECT `+targetCols+` FROM urls WHERE short_code = ANY($1) AND `+isLive,
		pq.StringArray(codes))
}

// newestTargets returns up to n live targets with ids below the given one, newest first, for
// warming caches. It may take as long as backgroundWithin.
func (s *Store) newestTargets(ctx context.Context, below int64, n int) ([]codeTarget, error) {
	return queryAll(ctx, s.pg.background, targetDest, `
		SELECT `+targetCols+` FROM urls WHERE id < $1 AND `+isLive+`
		ORDER BY id DESC LIMIT $2`, below, n)
}

// changedCode is a code whose target changed, and the transaction that changed it.
type changedCode struct {
	code string
	xid  uint64
}

// changes is what the caches must know of PostgreSQL: which codes changed since a moment, and the
// next moment to ask from.
type changes struct {
	server string // names this run of this server: another one means a restart or a failover
	next   uint64 // ask again from this transaction on: older ones have all ended
	codes  []changedCode
}

// maxChanges is how many changed codes one answer holds. Emptying the caches is cheaper than
// holding more: 10,000 holds are a few ms of Redis's time.
const maxChanges = 10_000

// errManyChanges says that more codes changed than one answer holds.
var errManyChanges = errors.New("too many changes to list")

// changesSince returns the codes that transactions from number since on have changed. PostgreSQL
// itself keeps this log: urls.changed holds the transaction that last changed a row, and xmin of a
// snapshot is the first transaction that may not have ended yet. Whatever is not visible now is of
// that transaction or a later one, so asking again from there misses nothing, however late a commit
// lands and whatever the clocks say. When more than maxChanges codes changed, the error is
// errManyChanges and codes is empty.
func (s *Store) changesSince(ctx context.Context, since uint64) (changes, error) {
	type row struct {
		server string
		next   string
		code   sql.NullString
		xid    sql.NullString
	}
	dest := func(r *row) []any { return []any{&r.server, &r.next, &r.code, &r.xid} }
	rows, err := queryAll(ctx, s.pg.background, dest, `
		SELECT EXTRACT(EPOCH FROM pg_postmaster_start_time())::text,
		       pg_snapshot_xmin(now_seen)::text, short_code, changed::text
		FROM pg_current_snapshot() AS now_seen LEFT JOIN urls
		     ON changed >= $1::text::xid8 AND changed < pg_snapshot_xmax(now_seen)
		LIMIT $2`, fmt.Sprint(since), maxChanges+1)
	if err != nil {
		return changes{}, err
	}
	result := changes{server: rows[0].server, next: parseXID(rows[0].next)}
	if len(rows) > maxChanges {
		return result, errManyChanges
	}
	for _, r := range rows {
		if r.code.Valid {
			result.codes = append(result.codes, changedCode{r.code.String, parseXID(r.xid.String)})
		}
	}
	return result, nil
}

// parseXID reads a transaction number. Those of PostgreSQL are always numbers.
func parseXID(text string) uint64 {
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// ---- lists ----

// listQuery is the SELECT of a list. The page is cut out of table first, and then joined.
type listQuery struct {
	columns string
	table   string
	join    string
	conds   []string
	args    []any
	sort    linkSort
}

// where adds a condition in which ? stands for value.
func (q *listQuery) where(cond string, value any) {
	q.conds = append(q.conds, strings.ReplaceAll(cond, "?", q.arg(value)))
}

// arg adds an argument and returns the parameter that stands for it.
func (q *listQuery) arg(value any) string {
	q.args = append(q.args, value)
	return fmt.Sprintf("$%d", len(q.args))
}

// list returns one page of a list: as many of its rows as maxListed bytes hold. One row more is
// asked for, to know of a next page.
func list[T listable](ctx context.Context, p *pool, dest func(*T) []any, q listQuery,
	part page) (listed[T], error) {

	if !p.lists.enter() {
		return listed[T]{}, errOverloaded
	}
	defer p.lists.leave()
	query, args := q.text(part)
	var found listed[T]
	err := p.do(ctx, func(ctx context.Context) error {
		rows, err := p.QueryContext(ctx, query, args...)
		if err != nil {
			return err
		}
		found, err = collectPage(rows, dest, part.limit)
		return err
	})
	if err == nil && part.beyond && len(found.rows) > 0 {
		return listed[T]{}, errBeyond
	}
	return found, err
}

// collectPage scans the rows of a page and closes them.
func collectPage[T listable](rows *sql.Rows, dest func(*T) []any, limit int) (listed[T], error) {
	defer rows.Close()
	found := listed[T]{rows: []T{}}
	weight := len("[]\n")
	for rows.Next() {
		var row T
		if err := rows.Scan(dest(&row)...); err != nil {
			return listed[T]{}, err
		}
		weight += row.weight()
		isFull := len(found.rows) == limit || weight > maxListed
		if isFull && len(found.rows) > 0 {
			found.more = true
			return found, nil
		}
		found.rows = append(found.rows, row)
	}
	return found, rows.Err()
}

// text is the SELECT of a page and one row more, with its arguments. In id order every page is an
// index range; to find a page by its number the index is walked.
func (q listQuery) text(part page) (string, []any) {
	order := "id"
	switch {
	case q.sort == byClicks:
		order = "click_count DESC, id"
	case q.sort == byNewest:
		order = "id DESC"
		if part.after > 0 {
			q.where("id < ?", part.after)
		}
	default:
		q.where("id > ?", part.after)
	}
	where := ""
	if len(q.conds) > 0 {
		where = "WHERE " + strings.Join(q.conds, " AND ")
	}
	name := q.table[strings.LastIndexByte(q.table, ' ')+1:] // of "users" or "(SELECT …) AS events"
	query := fmt.Sprintf(`
		SELECT %s FROM (
		    SELECT * FROM %s %s ORDER BY %s LIMIT %s OFFSET %s
		) AS %s %s ORDER BY %s`,
		q.columns, q.table, where, order, q.arg(part.limit+1), q.arg(part.offset),
		name, q.join, name+"."+order)
	return query, q.args
}

// ---- long transactions ----

// inLongTx runs fn in one transaction of the background. Each statement ends within
// backgroundWithin or with the deadline of ctx; the transaction may take as long as its files.
func (s *Store) inLongTx(ctx context.Context, options *sql.TxOptions,
	fn func(tx *sql.Tx) error) error {

	if !s.pg.up() {
		return errUnavailable
	}
	tx, err := s.pg.background.BeginTx(ctx, options)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	// Disks have their moments: the server must not take a pause for a lost client.
	_, err = txExec(ctx, tx,
		`SELECT set_config('idle_in_transaction_session_timeout', '60s', true)`)
	if err != nil {
		return err
	}
	if err := fn(tx); err != nil {
		return err
	}
	return tx.Commit()
}

// inSnapshot runs fn in one long transaction that only reads, all of it as of one moment. A
// statement may last as long as its rows are read, until the deadline of ctx.
func (s *Store) inSnapshot(ctx context.Context, fn func(tx *sql.Tx) error) error {
	options := &sql.TxOptions{Isolation: sql.LevelRepeatableRead, ReadOnly: true}
	return s.inLongTx(ctx, options, func(tx *sql.Tx) error {
		_, err := txExec(ctx, tx, `SELECT set_config('statement_timeout', '0', true)`)
		if err != nil {
			return err
		}
		return fn(tx)
	})
}
