package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// TestVerify lets people, bots and clients click, holds the books against each other, and then
// damages each of them in turn.
func TestVerify(t *testing.T) {
	a := startApp(t)
	first := addLink(t, a, "https://example.com/first", "first")
	addLink(t, a, "https://example.com/second", "second")
	for range 3 {
		follow(t, a, "/first", "https://example.com/first")
	}
	bot := do(t, "GET", a.url+"/first", "", "User-Agent: Googlebot/2.1")
	referred := do(t, "GET", a.url+"/second", "", "Referer: https://news.example/")
	if bot.status != 302 || referred.status != 302 {
		t.Fatalf("clicks: %d, %d", bot.status, referred.status)
	}
	get[wireEvent](t, a, 201, "POST", "/events",
		fmt.Sprintf(`{"url_id":%d,"event_type":"click","details":{"app":"mail"}}`, first.ID))
	flushApp(t, a, "first")
	db := openDB(t, a.cfg.DatabaseURL)
	said, err := verifyBooks(t, a.store)
	want := "2 links, 4 clicks counted, 4 on days, 6 rows of clicks\nbalanced, verified in "
	if err != nil || !strings.HasPrefix(said, want) {
		t.Fatalf("%v, %s", err, said)
	}

	const today = `(now() AT TIME ZONE 'UTC')::date`
	rowOf := func(kind string) string {
		return `(SELECT min(id) FROM events WHERE event_type = 'click' AND ` + kind + `)`
	}
	for _, c := range []struct {
		name, damage string
		want         []string
	}{
		{"a count", `UPDATE urls SET click_count = 5 WHERE short_code = 'first'`,
			[]string{"first (id 1): click_count is 5, its days add up to 3"}},
		{"a day", `UPDATE clicks_daily SET clicks = 4 WHERE url_id = 1`,
			[]string{"first (id 1): click_count is 3, its days add up to 4"}},
		{"a row too many", `INSERT INTO events (url_id, event_type, timestamp, details)
			VALUES (2, 'click', now() AT TIME ZONE 'UTC', 'false')`,
			[]string{"second on DAY (id 2): 1 clicks are counted, but 2 rows of such are in events"}},
		{"a row missing", `DELETE FROM events WHERE id = ` + rowOf(`url_id = 2`),
			[]string{"second on DAY (id 2): 1 clicks are counted, but 0 rows of such are in events"}},
		{"bots' rows", `INSERT INTO events (url_id, event_type, timestamp, details)
			VALUES (1, 'click', now() AT TIME ZONE 'UTC', 'true')`,
			[]string{"first on DAY (id 1): 1 clicks of bots are counted, but 2 rows of such are in"}},
		{"no such link", `INSERT INTO clicks_daily VALUES (99, ` + today + `, '', 1, 0)`,
			[]string{"no link (id 99): click_count is 0, its days add up to 1",
				"no link on DAY (id 99): 1 clicks are counted, but 0 rows of such are in events"}},
		{"many", `UPDATE urls SET click_count = click_count + 1`,
			[]string{"first (id 1): ", "second (id 2): ", "\n2 differences"}},

		// What posted clicks may make up for, and what is noted, is no difference.
		{"a reported row", `DELETE FROM events WHERE id = ` + rowOf(`url_id = 1`), nil},
		{"rows removed", `WITH gone AS (DELETE FROM events WHERE event_type = 'click')
			INSERT INTO hop_meta VALUES ('` + keptFrom + `', (` + today + ` + 1)::text)`, nil},
		{"the first release", `WITH gone AS (DELETE FROM events WHERE event_type = 'click')
			INSERT INTO hop_meta VALUES ('` + rowsFrom + `', (` + today + ` + 1)::text)`, nil},
		{"no rows written", `WITH gone AS (DELETE FROM events WHERE event_type = 'click')
			INSERT INTO hop_meta VALUES ('` + rowless + `' || ` + today + `, '')`, nil},
		{"bots without rows", `DELETE FROM events WHERE details::text = 'true'`, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			execSQL(t, db, `CREATE TABLE kept_urls AS TABLE urls`)
			execSQL(t, db, `CREATE TABLE kept_days AS TABLE clicks_daily`)
			execSQL(t, db, `CREATE TABLE kept_events AS TABLE events`)
			execSQL(t, db, c.damage)
			said, err := verifyBooks(t, a.store)
			if errors.Is(err, errUnbalanced) != (c.want != nil) {
				t.Errorf("%v, %s", err, said)
			}
			day := scalar[string](t, db, `SELECT `+today+`::text`)
			for _, want := range c.want {
				if !strings.Contains(said, strings.ReplaceAll(want, "DAY", day)) {
					t.Errorf("no %q in\n%s", want, said)
				}
			}
			for _, mended := range []string{
				`TRUNCATE urls, clicks_daily, events`,
				`INSERT INTO urls TABLE kept_urls`,
				`INSERT INTO clicks_daily TABLE kept_days`,
				`INSERT INTO events TABLE kept_events`,
				`DROP TABLE kept_urls, kept_days, kept_events`,
				`DELETE FROM hop_meta WHERE key LIKE '%click%'`,
			} {
				execSQL(t, db, mended)
			}
		})
	}
	if said, err := verifyBooks(t, a.store); err != nil {
		t.Errorf("mended: %v, %s", err, said)
	}
}

// TestVerifyNamesSome damages more links than are named: all are counted.
func TestVerifyNamesSome(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	execSQL(t, db, `
		INSERT INTO urls (short_code, original_url, created_at, updated_at, click_count)
		SELECT 'link' || i, 'https://example.com/', now(), now(), 1
		FROM generate_series(1, 1000) AS i`)
	said, err := verifyBooks(t, store)
	named := strings.Count(said, "click_count is 1, its days add up to 0")
	if !errors.Is(err, errUnbalanced) || named != maxDifferences ||
		!strings.Contains(said, "… and more\n") || !strings.Contains(said, "1000 differences") {
		t.Errorf("%v, %d named: %s", err, named, said)
	}
}

// TestVerifyCommand runs hop verify on a balanced database and on one that is not.
func TestVerifyCommand(t *testing.T) {
	dsn := testDatabase(t)
	settings := settingsOf("DATABASE_URL=" + dsn)
	if err := run(t.Context(), []string{"verify"}, settings); err != nil {
		t.Errorf("empty: %v", err)
	}
	execSQL(t, openDB(t, dsn), `INSERT INTO clicks_daily VALUES (1, '2026-01-31', '', 1, 0)`)
	if err := run(t.Context(), []string{"verify"}, settings); !errors.Is(err, errUnbalanced) {
		t.Errorf("damaged: %v", err)
	}
}

// TestVerifyWithoutRows counts clicks with CLICK_EVENTS=off, then with rows again: verify knows
// that the first have none.
func TestVerifyWithoutRows(t *testing.T) {
	dsn := testDatabase(t)
	for _, events := range []string{"off", "on"} {
		a := startApp(t, "DATABASE_URL="+dsn, "CLICK_EVENTS="+events)
		if events == "off" {
			addLink(t, a, "https://example.com/", "link")
		}
		follow(t, a, "/link", "https://example.com/")
		flushApp(t, a, "link")
		said, err := verifyBooks(t, a.store)
		if err != nil || !strings.HasPrefix(said, "1 days may lack rows of clicks, the last of ") {
			t.Errorf("CLICK_EVENTS=%s: %v, %s", events, err, said)
		}
		a.stop()
	}
}

// flushApp has all clicks counted that were answered before. code is any link's.
func flushApp(t testing.TB, a *app, code string) {
	t.Helper()
	get[wireStats](t, a, 200, "GET", "/stats/"+code, "")
}

// verifyBooks is what verify says, and its error.
func verifyBooks(t testing.TB, store *Store) (string, error) {
	t.Helper()
	var said bytes.Buffer
	err := store.verify(t.Context(), &said)
	return said.String(), err
}

// balanced says whether the books of a database balance, and logs what does not.
func balanced(t testing.TB, dsn string) bool {
	t.Helper()
	said, err := verifyBooks(t, openTestStore(t, dsn, 2))
	if err != nil {
		t.Logf("hop verify: %v: %s", err, said)
	}
	return err == nil
}
