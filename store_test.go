package main

import (
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// What the tests over HTTP cannot see of store.go.

// TestSaveClicksOnce gives batches again and again, in and out of turn.
func TestSaveClicksOnce(t *testing.T) {
	store, db := testStore(t, Config{})
	mustExec(t, store, `INSERT INTO users (id, username, email, created_at) VALUES (1, 'ada', 'ada@a.example', '2025-01-01')`)
	mustExec(t, store, `INSERT INTO urls (id, user_id, short_code, original_url, created_at, updated_at) VALUES
		(1, 1, 'one', 'https://one.example/', '2025-01-01', '2025-01-01'), (2, NULL, 'two', 'https://two.example/', '2025-01-01', '2025-01-01')`)
	batch := func(journal string, number uint64, at int64) clickBatch { // 3 clicks and 2 bots on link 1, 1 click on link 2
		b := clickBatch{journal: journal, number: number}
		b.add(1, at, 1, withEvent, "a.example")
		b.add(1, at-1, 1, withEvent, "")
		b.add(1, at-2, 1, without, "")
		b.add(1, at+9, 2, byBot, "")
		b.add(2, at, 1, withEvent, "")
		return b
	}
	tests := []struct {
		name  string
		batch clickBatch
		fresh bool
		times int64  // how many batches are counted after it
		last  string // last_clicked_at of link 1 after it
	}{
		{"first", batch("a", 1, noon), true, 1, "2024-10-04 12:00:00"},
		{"again", batch("a", 1, noon), false, 1, "2024-10-04 12:00:00"},
		{"next", batch("a", 2, noon+60), true, 2, "2024-10-04 12:01:00"},
		{"lower", batch("a", 1, noon+99), false, 2, "2024-10-04 12:01:00"},
		{"again the next", batch("a", 2, noon+99), false, 2, "2024-10-04 12:01:00"},
		{"numbers left out", batch("a", 900, noon+120), true, 3, "2024-10-04 12:02:00"},
		{"one of those", batch("a", 500, noon+999), false, 3, "2024-10-04 12:02:00"},
		{"another journal, older clicks", batch("b", 1, noon), true, 4, "2024-10-04 12:02:00"},
		{"empty", clickBatch{journal: "a", number: 901}, true, 4, "2024-10-04 12:02:00"},
		{"empty again", clickBatch{journal: "a", number: 901}, false, 4, "2024-10-04 12:02:00"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			fresh, err := store.saveClicks(tt.batch)
			if fresh != tt.fresh || err != nil {
				t.Errorf("saveClicks = %v, %v; want %v", fresh, err, tt.fresh)
			}
			for query, want := range map[string]int64{
				`SELECT click_count FROM urls WHERE id = 1`:                                            3,
				`SELECT click_count FROM urls WHERE id = 2`:                                            1,
				`SELECT sum(clicks) FROM clicks_daily WHERE url_id = 1 AND referrer = ''`:              2,
				`SELECT sum(clicks) FROM clicks_daily WHERE url_id = 1 AND referrer = 'a.example'`:     1,
				`SELECT sum(bots) FROM clicks_daily WHERE url_id = 1`:                                  2,
				`SELECT count(*) FROM events WHERE url_id = 1 AND user_id = 1 AND event_type='click'`:  2,
				`SELECT count(*) FROM events WHERE url_id = 2 AND user_id IS NULL`:                     1,
				`SELECT count(*) FROM events WHERE details::text = '{"short_code":"one"}'`:             1,
				`SELECT count(*) FROM events WHERE details::jsonb @> '{"referrer":"a.example"}'`:       1,
				`SELECT count(*) FROM clicks_daily WHERE day <> '2024-10-04'`:                          0,
				`SELECT count(*) FROM clicks_daily WHERE url_id = 2 AND (clicks, bots) <> (clicks, 0)`: 0,
			} {
				if n := scalar[int64](t, db, query); n != want*tt.times {
					t.Errorf("%s: %d, want %d", query, n, want*tt.times)
				}
			}
			if last := scalar[string](t, db, `SELECT last_clicked_at::text FROM urls WHERE id = 1`); last != tt.last {
				t.Errorf("last clicked at %s, want %s", last, tt.last)
			}
		})
	}
}

// TestSaveClicksTogether gives the same batch by two goroutines at once, as a process and the heir of its journal might.
func TestSaveClicksTogether(t *testing.T) {
	store, db := testStore(t, Config{})
	mustExec(t, store, `INSERT INTO urls (id, short_code, original_url, created_at, updated_at) VALUES (1, 'one', 'https://one.example/', '2025-01-01', '2025-01-01')`)
	const rounds = 20
	for n := range uint64(rounds) {
		b := clickBatch{journal: "a", number: n + 1}
		b.add(1, noon, 1, withEvent, "")
		var counted [2]bool
		var both sync.WaitGroup
		for i := range counted {
			both.Go(func() {
				var err error
				if counted[i], err = store.saveClicks(b); err != nil {
					t.Error(err)
				}
			})
		}
		both.Wait()
		if counted[0] == counted[1] {
			t.Errorf("batch %d: the two saves say %v", n+1, counted)
		}
	}
	for _, query := range []string{`SELECT click_count FROM urls`, `SELECT sum(clicks) FROM clicks_daily`, `SELECT count(*) FROM events`} {
		if n := scalar[int](t, db, query); n != rounds {
			t.Errorf("%s: %d, want %d", query, n, rounds)
		}
	}
}

// TestDeleteUsersDuringFlushes lets flushes and deletions of users touch the same links in opposite orders: no deadlock, and
// every click counts.
func TestDeleteUsersDuringFlushes(t *testing.T) {
	dsn := testDatabase(t)
	admin := openDB(t, dsn)
	if _, err := admin.Exec(`ALTER DATABASE ` + scalar[string](t, admin, `SELECT current_database()`) + ` SET deadlock_timeout = '5ms'`); err != nil {
		t.Fatal(err) // PostgreSQL would look for one after 1 s only, when deleteUser has long been stopped
	}
	store, db := testStore(t, Config{DatabaseURL: dsn})
	const users, links = 12, 40
	mustExec(t, store, fmt.Sprintf(`INSERT INTO users (id, username, email, created_at) SELECT n, 'u' || n, 'u' || n || '@a.example', '2025-01-01' FROM generate_series(1, %d) AS n`, users))
	mustExec(t, store, fmt.Sprintf(`INSERT INTO urls (id, user_id, short_code, original_url, created_at, updated_at)
		SELECT n, n %% %d + 1, 'code' || n, 'https://a.example/', '2025-01-01', '2025-01-01' FROM generate_series(%d, 1, -1) AS n`, users, users*links))
	var all sync.WaitGroup
	const flushes = 15
	for replica := range 2 {
		all.Go(func() {
			for number := range uint64(flushes) {
				b := clickBatch{journal: fmt.Sprint(replica), number: number + 1}
				for id := range int64(users * links) {
					if replica == 1 {
						id = users*links - 1 - id
					}
					b.add(id+1, noon, 1, withEvent, "")
				}
				if _, err := store.saveClicks(b); err != nil {
					t.Errorf("flush: %v", err)
				}
			}
		})
	}
	all.Go(func() {
		for id := range int64(users) {
			err := store.deleteUser(id + 1)
			for start := time.Now(); err != nil && time.Since(start) < 10*time.Second; err = store.deleteUser(id + 1) {
				if !errors.Is(err, errUnavailable) || strings.Contains(err.Error(), "deadlock") { // else: a flush held the lock for long
					t.Errorf("deleteUser: %v", err)
					return
				}
			}
			if err != nil {
				t.Errorf("deleteUser %d: %v", id+1, err)
			}
		}
	})
	all.Wait()
	if n := scalar[int](t, db, `SELECT sum(click_count) FROM urls`); n != 2*flushes*users*links {
		t.Errorf("%d clicks counted of %d", n, 2*flushes*users*links)
	}
	for _, query := range []string{`SELECT count(*) FROM users`, `SELECT count(user_id) FROM urls`, `SELECT count(user_id) FROM events`} {
		if n := scalar[int](t, db, query); n != 0 {
			t.Errorf("%s: %d although all users are deleted", query, n)
		}
	}
}

// TestCreateLinksMixed makes good and bad links in one statement: each stands for itself.
func TestCreateLinksMixed(t *testing.T) {
	store, db := testStore(t, Config{})
	mustExec(t, store, `INSERT INTO users (id, username, email, created_at) VALUES (7, 'ada', 'ada@a.example', '2025-01-01')`)
	mustExec(t, store, `INSERT INTO urls (short_code, original_url, created_at, updated_at, deleted_at) VALUES
		('taken', 'https://old.example/', '2025-01-01', '2025-01-01', NULL), ('deleted', 'https://old.example/', '2025-01-01', '2025-01-01', '2025-01-02')`)
	expires := time.Date(2099, 12, 31, 23, 59, 59, 0, time.UTC)
	links := []struct {
		newLink
		err error
	}{
		{newLink{userID: 7, code: "whole", url: "https://a.example/?q=\"'&x", title: "A 'title' with, commas and \"quotes\"", expires: expires}, nil},
		{newLink{userID: 99, code: "nouser", url: "https://a.example/"}, errNoUser},
		{newLink{code: "taken", url: "https://a.example/"}, errCodeTaken},
		{newLink{userID: 99, code: "taken2", url: "https://a.example/"}, errNoUser},
		{newLink{code: "deleted", url: "https://a.example/"}, errCodeTaken},
		{newLink{code: "bare", url: "https://a.example/#{}\\NULL"}, nil},
		{newLink{code: "Bare", url: "https://a.example/"}, nil},
	}
	var batch []newLink
	for _, l := range links {
		batch = append(batch, l.newLink)
	}
	results, err := store.createLinks(batch)
	if err != nil || len(results) != len(links) {
		t.Fatalf("createLinks: %d results, %v", len(results), err)
	}
	for i, want := range links {
		m := results[i]
		if m.err != want.err {
			t.Errorf("%s: %v, want %v", want.code, m.err, want.err)
		}
		if want.err != nil {
			continue
		}
		stored, err := store.link(m.link.ID)
		if got, row := jsonText(m.link), jsonText(stored); err != nil || got != row {
			t.Errorf("%s: createLinks says\n%s, the table\n%s %v", want.code, got, row, err)
		}
		if stored.OriginalURL != want.url || stored.ShortCode != want.code || (stored.UserID != nil) != (want.userID == 7) ||
			(stored.Title != nil) != (want.title != "") || (stored.ExpiresAt != nil) != !want.expires.IsZero() {
			t.Errorf("%s: stored as %s", want.code, jsonText(stored))
		}
		details := scalar[string](t, db, `SELECT details FROM events WHERE url_id = $1 AND event_type = 'created' AND user_id IS NOT DISTINCT FROM $2`, m.link.ID, stored.UserID)
		if details != fmt.Sprintf(`{"short_code":%s,"original_url":%s}`, jsonText(want.code), jsonText(want.url)) {
			t.Errorf("%s: created event %s", want.code, details)
		}
	}
	if n := scalar[int](t, db, `SELECT (SELECT count(*) FROM urls) * 100 + (SELECT count(*) FROM events)`); n != 503 {
		t.Errorf("links × 100 + events = %d, want 503: the 2 from before and 3 new ones", n)
	}
}

// TestTargets asks for links in every state by code, and pages through them all as warming does.
func TestStoreTargets(t *testing.T) {
	store, _ := testStore(t, Config{})
	future := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	rows := []struct {
		code             string
		active           bool
		expires, deleted sql.NullTime
		live             bool
	}{
		{"plain", true, sql.NullTime{}, sql.NullTime{}, true},
		{"inactive", false, sql.NullTime{}, sql.NullTime{}, false},
		{"later", true, sql.NullTime{Time: future, Valid: true}, sql.NullTime{}, true},
		{"expired", true, sql.NullTime{Time: time.Now().Add(-2 * time.Second).UTC(), Valid: true}, sql.NullTime{}, false},
		{"deleted", true, sql.NullTime{}, sql.NullTime{Time: time.Now().UTC(), Valid: true}, false},
		{"Plain", true, sql.NullTime{}, sql.NullTime{}, true},
	}
	for _, r := range rows {
		_, err := store.db.Exec(`INSERT INTO urls (short_code, original_url, is_active, expires_at, deleted_at, created_at, updated_at)
			VALUES ($1, $2, $3, $4, $5, '2025-01-01', '2025-01-01')`, r.code, "https://a.example/"+r.code, r.active, r.expires, r.deleted)
		if err != nil {
			t.Fatal(err)
		}
	}
	var live []string
	for _, r := range rows {
		got, err := store.target(r.code)
		if err != nil || (got.id != 0) != r.live {
			t.Errorf("%s: %+v, %v; want live: %v", r.code, got, err, r.live)
			continue
		}
		if !r.live {
			continue
		}
		live = append(live, r.code)
		expires := int64(0)
		if r.expires.Valid {
			expires = r.expires.Time.Unix()
		}
		if !slices.Equal(got.location, []string{"https://a.example/" + r.code}) || got.expires != expires {
			t.Errorf("%s leads to %+v, want expires %d", r.code, got, expires)
		}
	}
	if got, err := store.target("unknown"); got.id != 0 || err != nil {
		t.Errorf("unknown: %+v, %v", got, err)
	}

	for _, size := range []int{1, 2, len(live), 100} {
		var codes []string
		for after, pages := int64(0), 0; ; pages++ {
			page, err := store.targets(after, size)
			if err != nil || len(page) > size || pages > len(rows) {
				t.Fatalf("page %d by %d: %d links, %v", pages, size, len(page), err)
			}
			if len(page) == 0 {
				break
			}
			for _, n := range page {
				codes, after = append(codes, n.code), n.id
				if one, err := store.target(n.code); err != nil || fmt.Sprint(one) != fmt.Sprint(n.target) {
					t.Errorf("%s: targets has %v, target %v %v", n.code, n.target, one, err)
				}
			}
		}
		if !slices.Equal(codes, live) {
			t.Errorf("pages of %d give %v, want %v", size, codes, live)
		}
	}
}

// mustExec runs a test's own SQL.
func mustExec(t *testing.T, store *Store, query string) {
	t.Helper()
	if _, err := store.db.Exec(query); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}
