package main

import (
	"context"
	"database/sql"

	"github.com/lib/pq"
)

// How PostgreSQL counts clicks: each batch of a journal exactly once.

// maxReferrers is how many referring hosts one link keeps on one day. Referer headers are free to
// invent, and each new host is a row for ever; the rest is counted under otherReferrers.
const (
	maxReferrers   = 100
	otherReferrers = "(other)"
)

// saveClicks counts a batch of a journal's clicks exactly once, however often it is sent, and
// returns the number of the journal's first click that is not counted. That is b.to when the batch
// was counted now. If the journal does not stand at b.from, nothing is counted, and the result says
// where it stands. One that PostgreSQL does not know is taken to stand there. It may take as long
// as backgroundWithin.
func (s *Store) saveClicks(ctx context.Context, b clickBatch) (int64, error) {
	position := b.to
	err := s.pg.background.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		claimed, err := txExec(ctx, tx, `
			INSERT INTO click_journals (id, batch) VALUES ($1, $3)
			ON CONFLICT (id) DO UPDATE SET batch = $3 WHERE click_journals.batch = $2`,
			b.journal, b.from, b.to)
		if err != nil {
			return err
		}
		if claimed == 0 {
			return txQueryOne(ctx, tx, errNotFound, []any{&position},
				`SELECT batch FROM click_journals WHERE id = $1`, b.journal)
		}
		// Flushes of several replicas touch the same rows in different orders: side by side they
		// deadlock, one after the other they do not. 25 replicas can flush twice a second.
		if err := txLock(ctx, tx, clickLock); err != nil {
			return err
		}
		return s.countClicks(ctx, tx, b.sums)
	})
	return position, err
}

// countClicks adds sums to the links' counts and to the figures per day, and writes a row into
// events for each click.
func (s *Store) countClicks(ctx context.Context, tx *sql.Tx, sums []clickSum) error {
	n := len(sums)
	ids := make(pq.Int64Array, n)
	seconds := make(pq.Int64Array, n)
	days := make(pq.Int64Array, n)
	counts := make(pq.Int64Array, n)
	bots := make(pq.BoolArray, n)
	referrers := make(pq.StringArray, n)
	var eventIDs, eventSeconds, eventCounts pq.Int64Array
	var eventDetails pq.StringArray
	var rowlessDays pq.Int64Array
	for i, c := range sums {
		ids[i] = c.linkID
		seconds[i] = c.second
		days[i] = c.second / secondsPerDay
		counts[i] = c.count
		bots[i] = c.bot
		referrers[i] = c.referrer
		if !c.noEvent {
			eventIDs = append(eventIDs, c.linkID)
			eventSeconds = append(eventSeconds, c.second)
			eventCounts = append(eventCounts, c.count)
			eventDetails = append(eventDetails, clickDetails(c.referrer, c.bot))
		} else {
			rowlessDays = append(rowlessDays, days[i])
		}
	}
	if len(rowlessDays) > 0 {
		if err := noteRowless(ctx, tx, rowlessDays); err != nil {
			return err
		}
	}
	_, err := txExec(ctx, tx, countClicksSQL, ids, seconds, days, counts, bots, referrers,
		maxReferrers, otherReferrers)
	if err != nil || len(eventIDs) == 0 {
		return err
	}
	_, err = txExec(ctx, tx, `
		INSERT INTO events (url_id, event_type, timestamp, details)
		SELECT id, 'click', to_timestamp(second) AT TIME ZONE 'UTC', details::json
		FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::text[])
		     AS click (id, second, n, details),
		     generate_series(1, n)`,
		eventIDs, eventSeconds, eventCounts, eventDetails)
	return err
}

const secondsPerDay = 24 * 60 * 60

// countClicksSQL adds the sums of $1 to $6 to urls and clicks_daily. Most (link, day, referrer)
// rows exist: they are updated first, and only for those that do not is it counted how many
// referrers their link has on that day. Beyond $7 the rest is counted under $8.
const countClicksSQL = `
	WITH click AS MATERIALIZED (
	    SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[],
	                         $5::boolean[], $6::text[])
	         AS c (id, second, day, n, bot, referrer)
	), counted AS (
	    UPDATE urls SET click_count = click_count + c.n,
	        last_clicked_at = GREATEST(last_clicked_at, to_timestamp(c.last) AT TIME ZONE 'UTC')
	    FROM (SELECT id, sum(n) AS n, max(second) AS last FROM click
	          WHERE NOT bot GROUP BY id) AS c
	    WHERE urls.id = c.id
	), daily AS MATERIALIZED (
	    SELECT id, date '1970-01-01' + day::int AS day, referrer,
	           COALESCE(sum(n) FILTER (WHERE NOT bot), 0) AS clicks,
	           COALESCE(sum(n) FILTER (WHERE bot), 0) AS bots
	    FROM click GROUP BY id, click.day, referrer
	), updated AS (
	    UPDATE clicks_daily AS d SET clicks = d.clicks + daily.clicks, bots = d.bots + daily.bots
	    FROM daily
	    WHERE d.url_id = daily.id AND d.day = daily.day AND d.referrer = daily.referrer
	    RETURNING d.url_id AS id, d.day, d.referrer
	), fresh AS (
	    SELECT daily.* FROM daily LEFT JOIN updated USING (id, day, referrer)
	    WHERE updated.id IS NULL
	), held AS (
	    SELECT f.id, f.day, (SELECT count(*) FROM clicks_daily AS d
	                         WHERE d.url_id = f.id AND d.day = f.day
	                               AND d.referrer NOT IN ('', $8)) AS n
	    FROM (SELECT DISTINCT id, day FROM fresh) AS f
	), placed AS (
	    SELECT id, day, clicks, bots,
	           CASE WHEN referrer = '' OR held.n + row_number() OVER (
	                    PARTITION BY id, day, referrer = ''
	                    ORDER BY clicks + bots DESC, referrer) <= $7
	                THEN referrer ELSE $8 END AS referrer
	    FROM fresh JOIN held USING (id, day)
	)
	INSERT INTO clicks_daily (url_id, day, referrer, clicks, bots)
	SELECT id, day, referrer, sum(clicks), sum(bots) FROM placed GROUP BY id, day, referrer
	ON CONFLICT (url_id, day, referrer) DO UPDATE
	SET clicks = clicks_daily.clicks + excluded.clicks, bots = clicks_daily.bots + excluded.bots`
