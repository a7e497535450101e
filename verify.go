package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/lib/pq"
)

// The books: every click that hop counts is written down three times, in urls.click_count, in
// clicks_daily, and as a row in events. hop verify holds the three against each other.
//
// What must be true, as of one moment:
//
//   - A link's click_count is the sum of its clicks_daily.clicks. There is no exception.
//   - Per link and day, there are no more rows of counted clicks than clicks_daily counts, of
//     people and of bots.
//   - Per link and day, each click of a person that clicks_daily counts is a row. The exceptions
//     are days whose rows KEEP_CLICKS has removed, those on which clicks were counted without rows
//     (CLICK_EVENTS=off, a full journal, counts that came with files), and the days of the first
//     release; hop_meta names them. A click that a client posted cannot be told from one that the
//     first release counted: where there are such, this only finds what they do not make up for.
//
// A bot's row may be missing: the first release wrote none.

// verifyWithin ends a verify whose server has stopped answering. 100 M rows take some minutes.
const verifyWithin = 2 * time.Hour

// maxDifferences is how many differences are named; all are counted.
const maxDifferences = 50

// errUnbalanced is what verify ends with when something differs.
var errUnbalanced = errors.New("the books do not balance")

// difference is one place where two of the books say different things.
type difference struct {
	linkID int64
	code   sql.NullString // not there for an id that no link has
	day    string
	what   string
	said   int64 // by the first book
	found  int64 // in the second
}

// differenceDest names the places for a row of the queries of verify.
func differenceDest(d *difference) []any {
	return []any{&d.linkID, &d.code, &d.day, &d.what, &d.said, &d.found}
}

// String is the difference for people.
func (d difference) String() string {
	name := "no link"
	if d.code.Valid {
		name = d.code.String
	}
	if d.day != "" {
		name += " on " + d.day
	}
	return fmt.Sprintf("%s (id %d): "+d.what, name, d.linkID, d.said, d.found)
}

// verifyCounts finds links whose click_count is not the sum of its days.
const verifyCounts = `
	SELECT COALESCE(urls.id, d.url_id), short_code, '',
	       'click_count is %d, its days add up to %d',
	       COALESCE(click_count, 0), COALESCE(d.clicks, 0)
	FROM urls FULL JOIN (
	    SELECT url_id, sum(clicks)::bigint AS clicks FROM clicks_daily GROUP BY url_id
	) AS d ON d.url_id = urls.id
	WHERE COALESCE(click_count, 0) <> COALESCE(d.clicks, 0)
	ORDER BY 1`

// verifyRows finds links and days whose rows do not fit their figures. Rows must be whole from day
// $1 on, but on those of $2.
const verifyRows = `
	WITH counted AS (
	    SELECT url_id, day, sum(clicks)::bigint AS clicks, sum(bots)::bigint AS bots
	    FROM clicks_daily GROUP BY url_id, day
	), stored AS (
	    SELECT url_id, timestamp::date AS day,
	           count(*) FILTER (WHERE ` + personRow + `) AS people,
	           count(*) FILTER (WHERE ` + botRow + `) AS bots,
	           count(*) FILTER (WHERE ` + reportedRow + `) AS reported
	    FROM events WHERE event_type = 'click' GROUP BY url_id, timestamp::date
	), both_books AS (
	    SELECT url_id, day, COALESCE(counted.clicks, 0) AS clicks,
	           COALESCE(counted.bots, 0) AS bots, COALESCE(stored.people, 0) AS people_rows,
	           COALESCE(stored.bots, 0) AS bot_rows, COALESCE(stored.reported, 0) AS reported
	    FROM counted FULL JOIN stored USING (url_id, day)
	)
	SELECT url_id, short_code, day::text, what, said, found
	FROM both_books LEFT JOIN urls ON urls.id = url_id CROSS JOIN LATERAL (VALUES
	    ('%d clicks are counted, but %d rows of such are in events', clicks, people_rows,
	     people_rows > clicks
	         OR clicks > people_rows + reported AND day >= $1::date AND day <> ALL ($2::date[])),
	    ('%d clicks of bots are counted, but %d rows of such are in events', bots, bot_rows,
	     bot_rows > bots)
	) AS judged (what, said, found, wrong)
	WHERE wrong
	ORDER BY url_id, day`

// verify holds the books against each other and prints to out what differs, at most maxDifferences
// of it. The error is errUnbalanced when something does. It looks at one moment, and locks nothing.
func (s *Store) verify(ctx context.Context, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, verifyWithin)
	defer cancel()
	start := time.Now()
	found := 0
	err := s.inSnapshot(ctx, func(tx *sql.Tx) error {
		gaps, err := readRowGaps(ctx, tx)
		if err != nil {
			return err
		}
		gaps.print(out)
		counts, err := printDifferences(ctx, tx, out, 0, verifyCounts)
		if err != nil {
			return err
		}
		rows, err := printDifferences(ctx, tx, out, counts, verifyRows, gaps.from,
			pq.StringArray(gaps.days))
		if err != nil {
			return err
		}
		found = counts + rows
		return printTotals(ctx, tx, out)
	})
	if err != nil {
		return err
	}
	took := time.Since(start).Round(time.Millisecond)
	if found > 0 {
		fmt.Fprintf(out, "%d differences, looked for in %v\n", found, took)
		return errUnbalanced
	}
	fmt.Fprintf(out, "balanced, verified in %v\n", took)
	return nil
}

// printDifferences runs a query of verify, prints the differences that it finds as long as no more
// than maxDifferences are printed in all, and returns how many there are. before is how many were
// found earlier.
func printDifferences(ctx context.Context, tx *sql.Tx, out io.Writer, before int, query string,
	args ...any) (int, error) {

	rows, err := tx.QueryContext(ctx, query, args...)
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	found := 0
	for rows.Next() {
		var d difference
		if err := rows.Scan(differenceDest(&d)...); err != nil {
			return 0, err
		}
		found++
		if before+found <= maxDifferences {
			fmt.Fprintln(out, d)
		}
		if before+found == maxDifferences+1 {
			fmt.Fprintln(out, "… and more")
		}
	}
	return found, rows.Err()
}

// printTotals prints how much there is in each book.
func printTotals(ctx context.Context, tx *sql.Tx, out io.Writer) error {
	var links, clicks, days, rows int64
	err := txQueryOne(ctx, tx, errNotFound, []any{&links, &clicks, &days, &rows}, `
		SELECT (SELECT count(*) FROM urls),
		       (SELECT COALESCE(sum(click_count), 0) FROM urls)::bigint,
		       (SELECT COALESCE(sum(clicks), 0) FROM clicks_daily)::bigint,
		       (SELECT count(*) FROM events WHERE event_type = 'click')`)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%d links, %d clicks counted, %d on days, %d rows of clicks\n",
		links, clicks, days, rows)
	return nil
}
