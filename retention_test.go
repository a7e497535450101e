package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestRetention removes the rows of clicks that are older than three days, and nothing else, across
// several steps.
func TestRetention(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	const rows = 6 * removalStep
	execSQL(t, db, `
		INSERT INTO events (url_id, event_type, timestamp, details)
		SELECT 1, kind, now() AT TIME ZONE 'UTC' - interval '5 days', details::json
		FROM (VALUES
		    ('created', '{"short_code":"link1"}'),
		    ('click', '{"app":"mail"}'),
		    ('click', '{"short_code":"link1","referrer":"news.example"}'),
		    ('click', '{"short_code":"link1"}')
		) AS stored (kind, details)`)
	fillClicks(t, store, 6, rows)
	said, err := verifyBooks(t, store)
	if err != nil {
		t.Fatalf("before: %v, %s", err, said)
	}
	counts := clickTotals(t, store)

	r := newRemover(store, 3*day, testLog(t))
	steps := removeAll(t, r)
	if steps < 3 {
		t.Errorf("%d rows in %d steps", rows, steps)
	}
	old := scalar[int64](t, db, `
		SELECT count(*) FROM events WHERE event_type = 'click'
		AND timestamp < (now() AT TIME ZONE 'UTC')::date - 3 AND details::text IS DISTINCT FROM
		    '{"app":"mail"}'`)
	kept := scalar[int64](t, db, `SELECT count(*) FROM events WHERE event_type = 'click'`)
	others := scalar[int64](t, db, `SELECT count(*) FROM events WHERE id <= 4`)
	// Six days of clicks, of which today and the three days before stay.
	if old != 0 || kept != rows*4/6+1 || others != 2 {
		t.Errorf("%d old rows left, %d of %d kept, %d others", old, kept, rows, others)
	}
	if after := clickTotals(t, store); after != counts {
		t.Errorf("counts and days were %s, and are %s", counts, after)
	}
	said, err = verifyBooks(t, store)
	if err != nil || !strings.HasPrefix(said, "days before ") {
		t.Errorf("after: %v, %s", err, said)
	}
	if store.removedRows.Load() != rows*2/6+2 {
		t.Errorf("%d rows removed", store.removedRows.Load())
	}
	if steps := removeAll(t, r); steps != 1 {
		t.Errorf("again: %d steps", steps)
	}
}

// TestRetentionOutOfOrder removes old rows that stand behind young ones, when those have grown old
// too, and rows that are loaded with low ids.
func TestRetentionOutOfOrder(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	click := func(id, age int) {
		execSQL(t, db, `INSERT INTO events (id, url_id, event_type, timestamp, details)
			VALUES ($1, 1, 'click', now() AT TIME ZONE 'UTC' - $2 * interval '1 day', 'false')`, id, age)
	}
	left := func() (ids string) {
		return scalar[string](t, db, `SELECT COALESCE(string_agg(id::text, ' ' ORDER BY id), '')
			FROM events`)
	}
	click(10, 9)
	click(11, 2)
	click(12, 9)
	r := newRemover(store, 5*day, testLog(t))
	removeAll(t, r)
	if ids := left(); ids != "11" {
		t.Errorf("left: %s", ids)
	}
	click(13, 9)
	removeAll(t, r)
	if ids := left(); ids != "11" {
		t.Errorf("left behind a young one: %s", ids)
	}
	click(1, 9)
	removeAll(t, newRemover(store, 5*day, testLog(t)))
	if ids := left(); ids != "1 11" {
		t.Errorf("another process, whose turn it is not, left: %s", ids)
	}
	execSQL(t, db, `UPDATE hop_meta SET value = 'nobody 0' WHERE key = $1`, removalTurn)
	removeAll(t, newRemover(store, 5*day, testLog(t)))
	if ids := left(); ids != "11" {
		t.Errorf("another process, whose turn it is, left: %s", ids)
	}
}

// TestRetentionInTurn runs the removers of three replicas: one works at a time, and when it is gone
// another goes on.
func TestRetentionInTurn(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	fillClicks(t, store, 10, 2*removalStep)
	removers := []*remover{
		newRemover(store, day, testLog(t)),
		newRemover(store, day, testLog(t)),
		newRemover(store, day, testLog(t)),
	}
	for range 3 {
		for i, r := range removers {
			result, err := r.step(t.Context())
			if err != nil || result.waits != (i > 0) {
				t.Fatalf("replica %d: %+v, %v", i, result, err)
			}
		}
	}
	execSQL(t, db, `UPDATE hop_meta SET value = split_part(value, ' ', 1) || ' 0' WHERE key = $1`,
		removalTurn)
	result, err := removers[2].step(t.Context())
	if err != nil || result.waits {
		t.Errorf("the one that goes on: %+v, %v", result, err)
	}
	if result, _ := removers[0].step(t.Context()); !result.waits {
		t.Errorf("the one that was silent goes on as well: %+v", result)
	}
}

// TestRetentionRuns sets KEEP_CLICKS on a whole hop.
func TestRetentionRuns(t *testing.T) {
	dsn := testDatabase(t)
	store, db := testStore(t, dsn)
	fillClicks(t, store, 10, 1000)
	a := startApp(t, "DATABASE_URL="+dsn, "KEEP_CLICKS=4d")
	eventually(t, patience, "old rows are removed", func() bool {
		return scalar[int64](t, db, `SELECT count(*) FROM events WHERE event_type = 'click'`) == 500
	})
	eventually(t, patience, "and counted", func() bool {
		return scrape(t, a.url)["hop_click_events_removed_total"] == 500
	})
	eventually(t, patience, "and said", func() bool {
		return strings.Contains(a.logs.String(), "removed rows of old clicks")
	})
}

// TestFault32Retention has one replica remove old rows while people click on another. At full
// length RETENTION_ROWS says how many, a multiple of ten.
func TestFault32Retention(t *testing.T) {
	rows := full(10_000_000, 20_000)
	if wanted, err := strconv.Atoi(os.Getenv("RETENTION_ROWS")); err == nil && fullLength {
		rows = wanted
	}
	faultCase{
		number: 32,
		what:   fmt.Sprintf("KEEP_CLICKS removes %d rows", rows),
		stores: func(t *testing.T) *rig {
			r := newStores(t, startPostgres(t), startRedis(t))
			fillOldClicks(t, r, rows)
			return r
		},
		p99: func(calm time.Duration) time.Duration { return 2 * calm },
		fault: func(f *faultRun) {
			other := startHop(f, f.settings("KEEP_CLICKS=30d")...)
			f.hurt.from = f.load.now()
			began := time.Now()
			eventually(f, full(40*time.Minute, time.Minute), "all old rows are removed", func() bool {
				time.Sleep(100 * time.Millisecond) // a scrape in between costs nothing then
				return scrape(f, other.url)["hop_click_events_removed_total"] == float64(rows)
			})
			took := time.Since(began)
			f.mended()
			f.figure("removed in %s, %.0f rows/s", short(took), float64(rows)/took.Seconds())
			old := scalar[int](f.T, f.db, `SELECT count(*) FROM events WHERE url_id > $1`, rigLinks)
			f.mark(old == 0, "no old row is left")
		},
	}.run(t)
}

// fillOldClicks makes a link that was clicked on for ten days, two months ago.
func fillOldClicks(t testing.TB, r *rig, rows int) {
	t.Helper()
	for _, statement := range []string{
		`INSERT INTO urls (short_code, original_url, created_at, updated_at, click_count)
		 SELECT 'old', 'https://example.com/', now(), now(), $1::bigint`,
		`INSERT INTO clicks_daily (url_id, day, referrer, clicks, bots)
		 SELECT id, CURRENT_DATE - 60 - n, '', $1::bigint / 10, 0
		 FROM urls, generate_series(0, 9) AS n WHERE short_code = 'old'`,
		`INSERT INTO events (url_id, event_type, timestamp, details)
		 SELECT id, 'click', CURRENT_DATE - 60 - n % 10, 'false'
		 FROM urls, generate_series(1, $1::int) AS n WHERE short_code = 'old'`,
	} {
		execSQL(t, r.db, statement, rows)
	}
}

// fillClicks makes ten links and lets hop count rows clicks on them, evenly on today and the days
// before.
func fillClicks(t testing.TB, store *Store, days, rows int) {
	t.Helper()
	_, err := store.pg.background.ExecContext(t.Context(), `
		INSERT INTO urls (short_code, original_url, created_at, updated_at)
		SELECT 'link' || i, 'https://example.com/', now(), now() FROM generate_series(1, 10) AS i`)
	if err != nil {
		t.Fatal(err)
	}
	today := time.Now().Unix() / secondsPerDay * secondsPerDay
	batch := clickBatch{journal: "fill", from: 1, to: 1}
	for back := days - 1; back >= 0; back-- {
		for link := int64(1); link <= 10; link++ {
			second := today - int64(back)*secondsPerDay
			count := int64(rows / days / 10)
			batch.sums = append(batch.sums, clickSum{linkID: link, second: second, count: count})
			batch.to += count
		}
	}
	position, err := store.saveClicks(t.Context(), batch)
	if err != nil || position != batch.to {
		t.Fatalf("%d, %v", position, err)
	}
}

// clickTotals are all counts and figures per day.
func clickTotals(t testing.TB, store *Store) string {
	t.Helper()
	type totals struct{ counts, clicks, days int64 }
	sum, err := queryOne(t.Context(), store.pg.background,
		func(s *totals) []any { return []any{&s.counts, &s.clicks, &s.days} }, `
		SELECT (SELECT sum(click_count) FROM urls), sum(clicks), count(*) FROM clicks_daily`)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(sum)
}

// removeAll steps until nothing old is left, or until it is another's turn, and returns how many
// steps it took.
func removeAll(t testing.TB, r *remover) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for steps := 1; ; steps++ {
		result, err := r.step(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if result.done || result.waits {
			return steps
		}
	}
}
