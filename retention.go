package main

import (
	"context"
	"crypto/rand"
	"database/sql"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/lib/pq"
)

// Which clicks have rows in events: KEEP_CLICKS removes the rows of old ones, and some clicks are
// counted without. Counts and figures per day stay for ever, and so does every other event, also a
// click that a client posted, unless its details look like those of the first release's clicks
// (oldRow). What was removed or never there is noted in hop_meta, so that hop verify knows what to
// expect.

// Keys of hop_meta.
const (
	// keptFrom is the first day whose rows of clicks KEEP_CLICKS has not removed.
	keptFrom = "clicks kept from"

	// rowsFrom is the first day after the upgrade from the first release, which noted nothing. The
	// schema step of version 2 sets it.
	rowsFrom = "click rows from"

	// rowless and a day say that clicks of that day were counted without rows.
	rowless = "clicks without rows on "

	// removalTurn is which process removes rows, and when it last did.
	removalTurn = "removal of clicks"
)

// Kinds of click rows, as conditions on events of type click: those that hop counted, of people and
// of bots; those that clients posted, files brought, or the first release counted; and of these the
// last, by the form in which it wrote them.
const (
	personRow   = `(details::text = 'false' OR json_typeof(details) = 'string')`
	botRow      = `(details::text = 'true' OR json_typeof(details) = 'array')`
	reportedRow = `(json_typeof(details) = 'object')`
	oldRow      = `(details::text ~ '^{"short_code":"[0-9A-Za-z_-]+"(,"referrer":"[^"]*")?}$')`
)

const (
	// removalStep is how many events one transaction looks at. It takes some 10 ms.
	removalStep = 2000

	// removalPause is the least pause between two steps, and removalShare how many times as long
	// as the step it is at least: removing takes at most a fifth of one connection's time. That is
	// up to 20,000 rows a second, more than clicks arrive.
	removalPause = 50 * time.Millisecond
	removalShare = 4

	// removalEvery is the pause after all old rows are gone, after a failure, and of a process
	// whose turn it is not. Rows grow old once a day.
	removalEvery = time.Minute

	// removalTurnTime is how long the process that removes may be silent before another goes on,
	// from the first event. A pause is no silence.
	removalTurnTime = 3 * removalEvery
)

// remover removes the rows of old clicks.
type remover struct {
	store *Store
	keep  time.Duration // a row is removed when its day lies that far back
	id    string        // names this process
	log   *slog.Logger

	// Ids of events: the next step begins after at, the next pass after clear. Up to clear no row is
	// left to be removed, now or later; behind it stands the first row that was too young.
	at    int64
	clear int64
}

// newRemover returns the remover of one process. keep is in whole days.
func newRemover(store *Store, keep time.Duration, log *slog.Logger) *remover {
	return &remover{store: store, keep: keep, id: rand.Text(), log: log}
}

// run removes rows as they grow old, until ctx ends. Every process runs it, and one at a time
// removes.
func (r *remover) run(ctx context.Context) {
	total := int64(0)
	failing := false
	for {
		start := time.Now()
		result, err := r.step(ctx)
		total += result.removed
		pause := max(removalPause, removalShare*time.Since(start))
		if err != nil || result.waits || result.done {
			pause = removalEvery
		}
		if err != nil && !failing && ctx.Err() == nil {
			r.log.Warn("rows of old clicks are not removed", "err", err)
		}
		failing = err != nil
		if result.done && total > 0 {
			r.log.Info("removed rows of old clicks", "rows", total)
			total = 0
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

// removal is what one step did.
type removal struct {
	removed int64
	waits   bool // it is another process's turn
	done    bool // no old row is left
}

// step looks at the next removalStep events and removes the old rows of clicks among them.
//
// Ids grow with time: when all events of a step are young, those beyond it are too, and the pass is
// done. What is out of this order, such as a click that waited for days in the journal of a dead
// process, is removed when the events around it have grown old as well. A new process begins at
// the first event, so that rows that were loaded with low ids go too.
func (r *remover) step(ctx context.Context) (removal, error) {
	var result removal
	var seen seenEvents
	err := r.store.pg.background.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		mine, err := r.takeTurn(ctx, tx)
		result = removal{waits: !mine}
		if err != nil || !mine {
			return err
		}
		first, err := r.moveHorizon(ctx, tx)
		if err != nil {
			return err
		}
		seen, err = removeBefore(ctx, tx, first, r.at)
		return err
	})
	if err != nil || result.waits {
		return result, err
	}
	result.removed = seen.removed
	result.done = seen.count < removalStep || !seen.anyOld
	r.moveOn(seen, result.done)
	r.store.removedRows.Add(seen.removed)
	return result, nil
}

// takeTurn says whether this process removes. The turn goes to another one when whose it is has
// been silent for removalTurnTime. Until the end of the transaction nobody else can take it.
func (r *remover) takeTurn(ctx context.Context, tx *sql.Tx) (bool, error) {
	taken, err := txExec(ctx, tx, `
		INSERT INTO hop_meta (key, value)
		VALUES ($1, $2 || ' ' || EXTRACT(EPOCH FROM now())::bigint)
		ON CONFLICT (key) DO UPDATE SET value = excluded.value
		WHERE split_part(hop_meta.value, ' ', 1) = $2
		      OR split_part(hop_meta.value, ' ', 2)::bigint < EXTRACT(EPOCH FROM now()) - $3`,
		removalTurn, r.id, int64(removalTurnTime.Seconds()))
	return taken == 1, err
}

// moveHorizon returns the first day whose rows stay. It notes that those before it do not.
func (r *remover) moveHorizon(ctx context.Context, tx *sql.Tx) (string, error) {
	var first string
	err := txQueryOne(ctx, tx, errNotFound, []any{&first},
		`SELECT ((now() AT TIME ZONE 'UTC')::date - $1::int)::text`, int64(r.keep/day))
	if err != nil {
		return "", err
	}
	_, err = txExec(ctx, tx, `
		INSERT INTO hop_meta (key, value) VALUES ($1, $2)
		ON CONFLICT (key) DO UPDATE SET value = excluded.value
		WHERE hop_meta.value < excluded.value`, keptFrom, first)
	return first, err
}

// seenEvents is what removeBefore looked at.
type seenEvents struct {
	count   int64
	removed int64
	anyOld  bool          // some events are from before the day, of whatever type
	last    sql.NullInt64 // id of the last
	young   sql.NullInt64 // id of the first that is not old
}

// removeBefore removes the rows of clicks from before a day among the next removalStep events after
// an id.
func removeBefore(ctx context.Context, tx *sql.Tx, first string, after int64) (seenEvents, error) {
	var seen seenEvents
	dest := []any{&seen.count, &seen.removed, &seen.anyOld, &seen.last, &seen.young}
	err := txQueryOne(ctx, tx, errNotFound, dest, `
		WITH seen AS MATERIALIZED (
		    SELECT id, timestamp < $2::timestamp AS old,
		           event_type = 'click' AND (`+personRow+` OR `+botRow+` OR `+oldRow+`) AS click
		    FROM events WHERE id > $1 ORDER BY id LIMIT $3
		), gone AS (
		    DELETE FROM events USING seen WHERE events.id = seen.id AND old AND click
		    RETURNING 1
		)
		SELECT count(*), (SELECT count(*) FROM gone), COALESCE(bool_or(old), false), max(id),
		       min(id) FILTER (WHERE NOT old)
		FROM seen`, after, first, removalStep)
	return seen, err
}

// moveOn notes how far a step has come.
func (r *remover) moveOn(seen seenEvents, done bool) {
	if r.clear == r.at { // nothing has been left behind in this pass
		switch {
		case seen.young.Valid:
			r.clear = seen.young.Int64 - 1
		case seen.last.Valid:
			r.clear = seen.last.Int64
		}
	}
	if seen.last.Valid {
		r.at = seen.last.Int64
	}
	if done {
		r.at = r.clear
	}
}

// ---- what verify may expect ----

// noteRowless notes that clicks of these days, in days since 1970, are counted without rows.
func noteRowless(ctx context.Context, tx *sql.Tx, days pq.Int64Array) error {
	_, err := txExec(ctx, tx, `
		INSERT INTO hop_meta (key, value)
		SELECT DISTINCT $1 || (date '1970-01-01' + day::int), ''
		FROM unnest($2::bigint[]) AS click (day)
		ON CONFLICT DO NOTHING`, rowless, days)
	return err
}

// rowGaps are the days whose clicks need not all have rows.
type rowGaps struct {
	from string   // all days before it; "-infinity" is none
	days []string // and these
}

// readRowGaps reads what is noted.
func readRowGaps(ctx context.Context, tx *sql.Tx) (rowGaps, error) {
	type note struct{ key, value string }
	rows, err := tx.QueryContext(ctx, `
		SELECT key, value FROM hop_meta
		WHERE key IN ($1, $2) OR starts_with(key, $3) ORDER BY key`, keptFrom, rowsFrom, rowless)
	if err != nil {
		return rowGaps{}, err
	}
	notes, err := collect(rows, func(n *note) []any { return []any{&n.key, &n.value} })
	if err != nil {
		return rowGaps{}, err
	}
	gaps := rowGaps{from: "-infinity", days: []string{}} // nil would be NULL
	for _, n := range notes {
		on, isDay := strings.CutPrefix(n.key, rowless)
		switch {
		case isDay:
			gaps.days = append(gaps.days, on)
		case gaps.from == "-infinity" || n.value > gaps.from:
			gaps.from = n.value
		}
	}
	return gaps, nil
}

// print says which days verify cannot hold rows against.
func (g rowGaps) print(out io.Writer) {
	if g.from != "-infinity" {
		fmt.Fprintf(out, "days before %s may lack rows of clicks\n", g.from)
	}
	if len(g.days) > 0 {
		fmt.Fprintf(out, "%d days may lack rows of clicks, the last of them %s\n", len(g.days),
			g.days[len(g.days)-1])
	}
}
