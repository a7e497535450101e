package main

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// What the tests over HTTP cannot see of the store.

// addLinks adds links with the ids 1 to n and the codes code1 to coden.
func addLinks(t testing.TB, db *sql.DB, n int) {
	t.Helper()
	execSQL(t, db, `
		INSERT INTO urls (id, short_code, original_url, created_at, updated_at)
		SELECT n, 'code' || n, 'https://a.example/' || n, '2025-01-01', '2025-01-01'
		FROM generate_series(1, $1) AS n`, n)
	execSQL(t, db, `SELECT setval(pg_get_serial_sequence('urls', 'id'), $1)`, n)
}

// addUser adds a user.
func addUser(t testing.TB, db *sql.DB, id int) {
	t.Helper()
	execSQL(t, db, `
		INSERT INTO users (id, username, email, created_at)
		VALUES ($1, format('u%s', $1::bigint), format('u%s@a.example', $1::bigint), '2025-01-01')`, id)
}

// ---- redirects ----

// TestStoreTargets asks for links in every state by code, and pages through them as warming does.
func TestStoreTargets(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	later := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	rows := []struct {
		code    string
		active  bool
		expires any
		deleted any
		live    bool
	}{
		{"plain", true, nil, nil, true},
		{"asleep", false, nil, nil, false},
		{"ends", true, later, nil, true},
		{"ended", true, time.Now().Add(-2 * time.Second).UTC(), nil, false},
		{"deleted", true, nil, time.Now().UTC(), false},
		{"Plain", true, nil, nil, true},
	}
	var codes, live []string
	for _, r := range rows {
		execSQL(t, db, `
			INSERT INTO urls (short_code, original_url, is_active, expires_at, deleted_at,
			                  created_at, updated_at)
			VALUES ($1, $2, $3, $4, $5, '2025-01-01', '2025-01-01')`,
			r.code, "https://a.example/ü/"+r.code, r.active, r.expires, r.deleted)
		codes = append(codes, r.code)
		if r.live {
			live = append(live, r.code)
		}
	}
	found, err := store.targets(t.Context(), append(codes, "none"))
	if err != nil || len(found) != len(live) {
		t.Errorf("targets finds %v, %v; want %v", found, err, live)
	}
	for _, got := range found {
		expires := int64(0)
		if got.code == "ends" {
			expires = later.Unix()
		}
		want := "https://a.example/%C3%BC/" + got.code
		if !slices.Contains(live, got.code) || got.expires != expires || got.location[0] != want {
			t.Errorf("%+v is not as it was stored", got)
		}
	}
	slices.Reverse(live)
	for _, size := range []int{1, 2, 100} {
		var paged []string
		below := int64(1 << 60)
		for {
			chunk, err := store.newestTargets(t.Context(), below, size)
			if err != nil {
				t.Fatal(err)
			}
			if len(chunk) == 0 {
				break
			}
			for _, l := range chunk {
				paged = append(paged, l.code)
				below = l.id
			}
		}
		if !slices.Equal(paged, live) {
			t.Errorf("in chunks of %d: %v, want %v", size, paged, live)
		}
	}
}

// TestChangesAreLogged makes every kind of change, and asks which of them the log shows.
func TestChangesAreLogged(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	ctx := t.Context()
	addLinks(t, db, 3)
	start, err := store.changesSince(ctx, 0)
	if err != nil || len(start.codes) != 0 || start.next == 0 || start.server == "" {
		t.Fatalf("at the start: %+v, %v", start, err)
	}
	steps := []struct {
		name   string
		change func() error
		want   []string // codes that the log shows since the last step
	}{
		{"nothing", func() error { return nil }, nil},
		{"an update", func() error {
			_, err := store.updateLink(ctx, 1, func(link) (linkChange, error) {
				return linkChange{url: new("https://b.example/")}, nil
			})
			return err
		}, []string{"code1"}},
		{"a delete", func() error {
			_, err := store.deleteLink(ctx, 2, func(link) error { return nil })
			return err
		}, []string{"code2"}},
		{"creates", func() error {
			_, err := store.createLinks(ctx, []newLink{
				{code: "chosen", custom: true, url: "https://a.example/"},
				{code: "random", url: "https://a.example/"},
			})
			return err
		}, []string{"chosen"}},
		{"clicks", func() error {
			_, err := store.saveClicks(ctx, clickBatch{journal: "a", from: 1, to: 2,
				sums: []clickSum{{linkID: 1, second: noon, count: 1}}})
			return err
		}, nil},
		{"by hand", func() error {
			_, err := db.Exec(`UPDATE urls SET original_url = 'https://c.example/',
				changed = pg_current_xact_id() WHERE id = 3`)
			return err
		}, []string{"code3"}},
	}
	next := start.next
	for _, step := range steps {
		if err := step.change(); err != nil {
			t.Fatal(err)
		}
		found, err := store.changesSince(ctx, next)
		var codes []string
		for _, c := range found.codes {
			codes = append(codes, c.code)
		}
		if err != nil || !slices.Equal(codes, step.want) || found.server != start.server {
			t.Errorf("%s: %+v, %v; want %v", step.name, found, err, step.want)
		}
		next = found.next
	}
}

// TestLateCommit changes a link in a transaction that stays open over several polls, while others
// begin and end: the change is shown when it lands, and not before.
func TestLateCommit(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	addLinks(t, db, 2)
	start, err := store.changesSince(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	next := start.next
	poll := func() []string {
		found, err := store.changesSince(t.Context(), next)
		if err != nil {
			t.Fatal(err)
		}
		if found.next < next {
			t.Errorf("the next poll would begin at %d, this one began at %d", found.next, next)
		}
		next = found.next
		var codes []string
		for _, c := range found.codes {
			codes = append(codes, c.code)
		}
		slices.Sort(codes)
		return codes
	}
	late, err := db.Begin()
	if err == nil {
		_, err = late.Exec(`UPDATE urls SET changed = pg_current_xact_id() WHERE id = 1`)
	}
	if err != nil {
		t.Fatal(err)
	}
	execSQL(t, db, `UPDATE urls SET changed = pg_current_xact_id() WHERE id = 2`)
	if got := poll(); !slices.Equal(got, []string{"code2"}) {
		t.Errorf("while it is open the log shows %v", got)
	}
	poll()
	if err := late.Commit(); err != nil {
		t.Fatal(err)
	}
	if got := poll(); !slices.Contains(got, "code1") {
		t.Errorf("when it has landed the log shows %v", got)
	}
	if got := poll(); len(got) != 0 {
		t.Errorf("later the log shows %v once more", got)
	}
}

// TestNoChangeIsMissed lets writers change links in transactions of random lengths while a poller
// asks: in the end it has seen the last change of every link.
func TestNoChangeIsMissed(t *testing.T) {
	const links = 50
	store, db := testStore(t, testDatabase(t), 8)
	addLinks(t, db, links)
	start, err := store.changesSince(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]uint64{}
	next := start.next
	poll := func() {
		found, err := store.changesSince(t.Context(), next)
		if err != nil {
			t.Error(err)
			return
		}
		for _, c := range found.codes {
			seen[c.code] = c.xid
		}
		next = found.next
	}
	var writers sync.WaitGroup
	for range 4 {
		writers.Go(func() {
			for range 40 {
				tx, err := db.Begin()
				if err != nil {
					t.Error(err)
					return
				}
				_, err = tx.Exec(`UPDATE urls SET changed = pg_current_xact_id() WHERE id = $1`,
					1+rand.IntN(links))
				time.Sleep(time.Duration(rand.IntN(5)) * time.Millisecond)
				if err = errors.Join(err, tx.Commit()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() {
		writers.Wait()
		close(done)
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		poll()
	}
	rows, err := db.Query(`SELECT short_code, changed::text FROM urls WHERE changed IS NOT NULL`)
	if err != nil {
		t.Fatal(err)
	}
	type row struct{ code, xid string }
	changed, err := collect(rows, func(r *row) []any { return []any{&r.code, &r.xid} })
	if err != nil || len(changed) < links/2 {
		t.Fatalf("%d links changed, %v", len(changed), err)
	}
	for _, r := range changed {
		if seen[r.code] != parseXID(r.xid) {
			t.Errorf("%s was changed by %s, the poller saw %d", r.code, r.xid, seen[r.code])
		}
	}
}

// TestTooManyChanges changes one link more than an answer holds.
func TestTooManyChanges(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	addLinks(t, db, maxChanges+1)
	start, err := store.changesSince(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	execSQL(t, db, `UPDATE urls SET changed = pg_current_xact_id() WHERE id <= $1`, maxChanges)
	found, err := store.changesSince(t.Context(), start.next)
	if err != nil || len(found.codes) != maxChanges {
		t.Errorf("%d changes of %d, %v", len(found.codes), maxChanges, err)
	}
	execSQL(t, db, `UPDATE urls SET changed = pg_current_xact_id() WHERE id > $1`, maxChanges)
	found, err = store.changesSince(t.Context(), start.next)
	if err != errManyChanges || len(found.codes) != 0 || found.next <= start.next {
		t.Errorf("one more: %d changes, next %d, %v", len(found.codes), found.next, err)
	}
	found, err = store.changesSince(t.Context(), found.next)
	if err != nil || len(found.codes) != 0 {
		t.Errorf("after that: %d changes, %v", len(found.codes), err)
	}
}

// ---- links ----

// TestCreateLinksMixed makes good and bad links, in one statement and one by one: each stands for
// itself.
func TestCreateLinksMixed(t *testing.T) {
	together := func(store *Store, links []newLink) ([]createResult, error) {
		return store.createLinks(t.Context(), links)
	}
	alone := func(store *Store, links []newLink) (results []createResult, err error) {
		for _, l := range links {
			one, err := store.createLinks(t.Context(), []newLink{l})
			if err != nil {
				return nil, err
			}
			results = append(results, one...)
		}
		return results, nil
	}
	t.Run("together", func(t *testing.T) { createMixed(t, together) })
	t.Run("alone", func(t *testing.T) { createMixed(t, alone) })
}

// createMixed is TestCreateLinksMixed for one way to create.
func createMixed(t *testing.T, create func(*Store, []newLink) ([]createResult, error)) {
	store, db := testStore(t, testDatabase(t))
	addUser(t, db, 7)
	execSQL(t, db, `
		INSERT INTO urls (short_code, original_url, created_at, updated_at, deleted_at) VALUES
		    ('taken', 'https://old.example/', '2025-01-01', '2025-01-01', NULL),
		    ('deleted', 'https://old.example/', '2025-01-01', '2025-01-01', '2025-01-02')`)
	links := []struct {
		newLink
		err error
	}{
		{newLink{
			userID:  7,
			code:    "whole",
			url:     `https://a.example/?q="'&x`,
			title:   `A 'title' with, commas and "quotes" \ ü`,
			expires: time.Date(2099, 12, 31, 23, 59, 59, 0, time.UTC),
		}, nil},
		{newLink{userID: 99, code: "nouser", url: "https://a.example/"}, errNoUser},
		{newLink{code: "taken", url: "https://a.example/"}, errCodeTaken},
		{newLink{userID: 99, code: "taken2", url: "https://a.example/"}, errNoUser},
		{newLink{code: "deleted", url: "https://a.example/"}, errCodeTaken},
		{newLink{code: "bare", url: `https://a.example/#{}\NULL<>&`}, nil},
		{newLink{code: "Bare", url: "https://a.example/", inactive: true}, nil},
		{newLink{code: "custom", url: "https://a.example/", custom: true}, nil},
	}
	var batch []newLink
	for _, l := range links {
		batch = append(batch, l.newLink)
	}
	results, err := create(store, batch)
	if err != nil || len(results) != len(links) {
		t.Fatalf("createLinks: %d results, %v", len(results), err)
	}
	for i, want := range links {
		got := results[i]
		if got.err != want.err {
			t.Errorf("%s: %v, want %v", want.code, got.err, want.err)
		}
		if want.err == nil {
			checkMade(t, store, db, want.newLink, got.link)
		}
	}
	made := scalar[int](t, db, `SELECT count(*) FROM urls`)
	events := scalar[int](t, db, `SELECT count(*) FROM events`)
	if made != 6 || events != 4 {
		t.Errorf("%d links and %d events, want the 2 from before, 4 new ones, and 4 events",
			made, events)
	}
	polled := scalar[string](t, db, `SELECT string_agg(short_code, ' ') FROM urls
		WHERE changed IS NOT NULL`)
	if polled != "custom" {
		t.Errorf("polls find %s, want only the code that somebody may have asked for", polled)
	}
}

// checkMade compares what was asked for, what was answered, and what stands in the tables.
func checkMade(t *testing.T, store *Store, db *sql.DB, want newLink, got link) {
	t.Helper()
	stored, err := store.link(t.Context(), got.ID)
	if err != nil || jsonText(got) != jsonText(stored) {
		t.Errorf("%s: answered as\n%s, stored as\n%s, %v",
			want.code, jsonText(got), jsonText(stored), err)
	}
	again := want.made(stored.ID, stored.CreatedAt)
	if jsonText(again) != jsonText(stored) {
		t.Errorf("%s: stored as\n%s, asked for\n%s", want.code, jsonText(stored), jsonText(again))
	}
	if byCode, err := store.linkOf(t.Context(), want.code); err != nil || byCode.ID != got.ID {
		t.Errorf("%s: by its code it is %+v, %v", want.code, byCode, err)
	}
	details := scalar[string](t, db, `
		SELECT details FROM events
		WHERE url_id = $1 AND event_type = 'created' AND user_id IS NOT DISTINCT FROM $2`,
		got.ID, stored.UserID)
	wanted := fmt.Sprintf(`{"short_code":%s,"original_url":%s}`,
		jsonText(want.code), jsonText(want.url))
	if details != wanted {
		t.Errorf("%s: its created event says %s", want.code, details)
	}
}

// TestUnstorableLinkFailsAlone has one link of a batch that PostgreSQL cannot store.
func TestUnstorableLinkFailsAlone(t *testing.T) {
	store, _ := testStore(t, testDatabase(t))
	bad := map[string]newLink{
		"a check of the table": {code: "bad!", url: "https://a.example/"},
		"a NUL":                {code: "nul", url: "https://a.example/", title: "a\x00b"},
	}
	for name, l := range bad {
		t.Run(name, func(t *testing.T) {
			good := func(part string) newLink {
				return newLink{code: part + l.code[:3], url: "https://a.example/"}
			}
			results, err := store.createLinks(t.Context(), []newLink{good("one"), l, good("two")})
			if err != nil || len(results) != 3 {
				t.Fatalf("%d results, %v", len(results), err)
			}
			if results[0].err != nil || results[2].err != nil {
				t.Errorf("the good ones: %v and %v", results[0].err, results[2].err)
			}
			if results[1].err == nil || errors.Is(results[1].err, errUnavailable) {
				t.Errorf("the bad one: %v", results[1].err)
			}
		})
	}
}

// TestOppositeBatches makes the same codes in opposite orders at once: no deadlock, and each code
// is given out once.
func TestOppositeBatches(t *testing.T) {
	store, _ := testStore(t, testDatabase(t))
	idle(t, store.pg.requests, 2)
	for round := range 10 {
		var up []newLink
		for i := range 60 {
			code := fmt.Sprintf("r%di%02d", round, i)
			up = append(up, newLink{code: code, url: "https://a.example/"})
		}
		down := slices.Clone(up)
		slices.Reverse(down)
		made := make([]int, 2)
		var both sync.WaitGroup
		for i, batch := range [][]newLink{up, down} {
			both.Go(func() {
				results, err := store.createLinks(t.Context(), batch)
				if err != nil {
					t.Errorf("round %d: %v", round, err)
				}
				for _, r := range results {
					if r.err == nil {
						made[i]++
					} else if r.err != errCodeTaken {
						t.Errorf("round %d: %v", round, r.err)
					}
				}
			})
		}
		both.Wait()
		if made[0]+made[1] != len(up) {
			t.Errorf("round %d: %v of %d codes are given out", round, made, len(up))
		}
	}
}

// TestUpdateLink changes fields: one event for each whose value is another one now.
func TestUpdateLink(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	addUser(t, db, 7)
	addLinks(t, db, 1)
	execSQL(t, db, `UPDATE urls SET user_id = 7, title = 'Old'`)
	ends := time.Date(2099, 1, 2, 3, 4, 5, 0, time.UTC)
	url := `{"field":"original_url","new_value":"https://b.example/"}`
	tests := []struct {
		name   string
		change linkChange
		events []string // details
	}{
		{"nothing", linkChange{}, nil},
		{"what it is", linkChange{title: new("Old"), active: new(true)}, nil},
		{"the target", linkChange{url: new("https://b.example/")}, []string{url}},
		{"a title", linkChange{title: new(`"New"`)},
			[]string{`{"field":"title","new_value":"\"New\""}`}},
		{"no title", linkChange{title: new("")}, []string{`{"field":"title","new_value":""}`}},
		{"an end, and asleep", linkChange{expires: &ends, active: new(false)}, []string{
			`{"field":"is_active","new_value":"false"}`,
			`{"field":"expires_at","new_value":"2099-01-02T03:04:05"}`,
		}},
		{"no end", linkChange{expires: &time.Time{}},
			[]string{`{"field":"expires_at","new_value":""}`}},
	}
	last := scalar[time.Time](t, db, `SELECT updated_at FROM urls`)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			execSQL(t, db, `DELETE FROM events`)
			got, err := store.updateLink(t.Context(), 1, func(link) (linkChange, error) {
				return tt.change, nil
			})
			if err != nil || !got.UpdatedAt.After(last) {
				t.Errorf("updated at %v, before it was %v; %v", got.UpdatedAt, last, err)
			}
			last = got.UpdatedAt.Time
			stored, err := store.link(t.Context(), 1)
			if err != nil || jsonText(stored) != jsonText(got) {
				t.Errorf("answered as\n%s, stored as\n%s, %v", jsonText(got), jsonText(stored), err)
			}
			rows, err := db.Query(`
				SELECT details FROM events WHERE event_type = 'updated' AND user_id = 7
				ORDER BY id`)
			if err != nil {
				t.Fatal(err)
			}
			logged, err := collect(rows, func(s *string) []any { return []any{s} })
			if err != nil || !slices.Equal(logged, tt.events) {
				t.Errorf("logged %v, %v; want %v", logged, err, tt.events)
			}
		})
	}
	refused := errors.New("refused")
	execSQL(t, db, `DELETE FROM events`)
	_, err := store.updateLink(t.Context(), 1, func(link) (linkChange, error) {
		return linkChange{title: new("Never")}, refused
	})
	stored, _ := store.link(t.Context(), 1)
	if !errors.Is(err, refused) || stored.Title != nil {
		t.Errorf("a change that was refused: %v, the title is %v", err, stored.Title)
	}
	if _, err := store.deleteLink(t.Context(), 1, func(link) error { return nil }); err != nil {
		t.Fatal(err)
	}
	_, err = store.deleteLink(t.Context(), 1, func(link) error { return nil })
	if err != errNotFound {
		t.Errorf("deleted twice: %v", err)
	}
	if n := scalar[int](t, db, `SELECT count(*) FROM events`); n != 1 {
		t.Errorf("%d events of one delete", n)
	}
}

// ---- users ----

// TestDeleteUser removes a user who has more events and links than one step takes.
func TestDeleteUser(t *testing.T) {
	const rows = 5000
	store, db := testStore(t, testDatabase(t))
	addUser(t, db, 1)
	addUser(t, db, 2)
	addLinks(t, db, rows)
	execSQL(t, db, `UPDATE urls SET user_id = CASE WHEN id % 10 = 0 THEN 2 ELSE 1 END`)
	execSQL(t, db, `
		INSERT INTO events (url_id, user_id, event_type, timestamp, details)
		SELECT id, user_id, 'created', created_at, '{}' FROM urls`)
	if err := store.deleteUser(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	checks := map[string]int{
		`SELECT count(*) FROM users`:                                1,
		`SELECT count(*) FROM urls`:                                 rows,
		`SELECT count(*) FROM events`:                               rows,
		`SELECT count(*) FROM urls WHERE user_id IS NULL`:           rows * 9 / 10,
		`SELECT count(*) FROM events WHERE user_id IS NULL`:         rows * 9 / 10,
		`SELECT count(*) FROM events WHERE user_id = 2`:             rows / 10,
		`SELECT count(*) FROM urls WHERE changed IS NOT NULL`:       0,
		`SELECT count(*) FROM urls WHERE updated_at > '2025-01-01'`: 0,
	}
	for query, want := range checks {
		if n := scalar[int](t, db, query); n != want {
			t.Errorf("%s: %d, want %d", query, n, want)
		}
	}
	if err := store.deleteUser(t.Context(), 1); err != errNotFound {
		t.Errorf("deleted twice: %v", err)
	}
}

// TestEventDuringDeleteUser logs an event that names a user while the user is being removed.
func TestEventDuringDeleteUser(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	addUser(t, db, 1)
	addLinks(t, db, 1)
	tx, err := db.Begin()
	if err == nil {
		_, err = tx.Exec(`SELECT 1 FROM users WHERE id = 1 FOR KEY SHARE`) // as createEvent does
	}
	if err == nil {
		_, err = tx.Exec(`INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			VALUES (1, 1, 'posted', now(), '{}')`)
	}
	if err != nil {
		t.Fatal(err)
	}
	deleted := make(chan error, 1)
	go func() { deleted <- store.deleteUser(t.Context(), 1) }()
	eventually(t, patience, "the removal waits for the event", func() bool {
		return scalar[bool](t, db, `SELECT EXISTS (
			SELECT 1 FROM pg_stat_activity
			WHERE wait_event_type = 'Lock' AND query LIKE 'DELETE FROM users%'
			      AND datname = current_database())`)
	})
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := <-deleted; err != nil {
		t.Fatal(err)
	}
	if n := scalar[int](t, db, `SELECT count(*) FROM events WHERE user_id IS NOT NULL`); n != 0 {
		t.Error("an event names a user who is gone")
	}
}

// ---- clicks ----

// TestSaveClicks gives batches in and out of turn, again and again: each click counts once.
func TestSaveClicks(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	addUser(t, db, 1)
	addLinks(t, db, 2)
	execSQL(t, db, `UPDATE urls SET user_id = 1 WHERE id = 1`)
	// A batch has 3 clicks of people and 2 of bots on link 1, and 1 click on link 2.
	sums := func(second int64) []clickSum {
		return []clickSum{
			{linkID: 1, second: second, count: 1, referrer: "a.example"},
			{linkID: 1, second: second - 1, count: 1},
			{linkID: 1, second: second - 2, count: 1, noEvent: true},
			{linkID: 1, second: second + 9, count: 2, bot: true},
			{linkID: 2, second: second, count: 1},
		}
	}
	const a, b, c = "JOURNALA", "JOURNALB", "JOURNALC"
	tests := []struct {
		name     string
		batch    clickBatch
		position int64
		times    int64  // how many batches are counted after it
		last     string // when link 1 was clicked last
	}{
		{"a new journal", clickBatch{a, 1, 7, sums(noon)}, 7, 1, "2024-10-04 12:00:00"},
		{"again", clickBatch{a, 1, 7, sums(noon)}, 7, 1, "2024-10-04 12:00:00"},
		{"the next", clickBatch{a, 7, 13, sums(noon + 60)}, 13, 2, "2024-10-04 12:01:00"},
		{"the next again", clickBatch{a, 7, 13, sums(noon + 99)}, 13, 2, "2024-10-04 12:01:00"},
		{"behind", clickBatch{a, 1, 19, sums(noon + 99)}, 13, 2, "2024-10-04 12:01:00"},
		{"ahead", clickBatch{a, 19, 25, sums(noon + 99)}, 13, 2, "2024-10-04 12:01:00"},
		{"in turn again", clickBatch{a, 13, 19, sums(noon + 120)}, 19, 3, "2024-10-04 12:02:00"},
		{"another journal, older clicks", clickBatch{b, 1, 7, sums(noon)}, 7, 4,
			"2024-10-04 12:02:00"},
		{"a journal whose beginning is lost", clickBatch{c, 501, 507, sums(noon)}, 507, 5,
			"2024-10-04 12:02:00"},
		{"nothing but damaged slots", clickBatch{a, 19, 23, nil}, 23, 5, "2024-10-04 12:02:00"},
	}
	figures := map[string]int64{ // of one batch
		`SELECT click_count FROM urls WHERE id = 1`:                                        3,
		`SELECT click_count FROM urls WHERE id = 2`:                                        1,
		`SELECT sum(clicks) FROM clicks_daily WHERE url_id = 1 AND referrer = ''`:          2,
		`SELECT sum(clicks) FROM clicks_daily WHERE referrer = 'a.example'`:                1,
		`SELECT sum(bots) FROM clicks_daily WHERE url_id = 1`:                              2,
		`SELECT count(*) FROM clicks_daily WHERE day <> '2024-10-04'`:                      0,
		`SELECT count(*) FROM events WHERE url_id = 1`:                                     4,
		`SELECT count(*) FROM events WHERE url_id = 2`:                                     1,
		`SELECT count(*) FROM events WHERE details::text = 'false'`:                        2,
		`SELECT count(*) FROM events WHERE details::text = 'true'`:                         2,
		`SELECT count(*) FROM events WHERE details::text = '"a.example"'`:                  1,
		`SELECT count(*) FROM events WHERE event_type <> 'click' OR user_id IS NOT NULL`:   0,
		`SELECT count(*) FROM events WHERE timestamp::date <> '2024-10-04'`:                0,
		`SELECT count(*) FROM urls WHERE changed IS NOT NULL OR updated_at > '2025-01-01'`: 0,
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			position, err := store.saveClicks(t.Context(), tt.batch)
			if position != tt.position || err != nil {
				t.Errorf("saveClicks = %d, %v; want %d", position, err, tt.position)
			}
			for query, want := range figures {
				if n := scalar[int64](t, db, query); n != want*tt.times {
					t.Errorf("%s: %d, want %d", query, n, want*tt.times)
				}
			}
			last := scalar[string](t, db, `SELECT last_clicked_at::text FROM urls WHERE id = 1`)
			if last != tt.last {
				t.Errorf("link 1 was clicked last at %s, want %s", last, tt.last)
			}
		})
	}
}

// TestSaveClicksTogether gives each batch by two at once, as a process and the heir of its journal
// might.
func TestSaveClicksTogether(t *testing.T) {
	const rounds = 20
	store, db := testStore(t, testDatabase(t))
	addLinks(t, db, 1)
	for n := range int64(rounds) {
		batch := clickBatch{journal: "a", from: 3*n + 1, to: 3*n + 4, sums: []clickSum{
			{linkID: 1, second: noon, count: 3},
		}}
		var both sync.WaitGroup
		for range 2 {
			both.Go(func() {
				position, err := store.saveClicks(t.Context(), batch)
				if err != nil || position != batch.to {
					t.Errorf("batch %d: %d, %v", n, position, err)
				}
			})
		}
		both.Wait()
	}
	for _, query := range []string{
		`SELECT click_count FROM urls`,
		`SELECT sum(clicks) FROM clicks_daily`,
		`SELECT count(*) FROM events`,
	} {
		if n := scalar[int](t, db, query); n != 3*rounds {
			t.Errorf("%s: %d, want %d", query, n, 3*rounds)
		}
	}
}

// TestReferrersAreBounded invents a referrer for each click, within one flush and over many: a link
// keeps 100 hosts a day, and no click is lost.
func TestReferrersAreBounded(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	addLinks(t, db, 3)
	position := int64(1)
	flush := func(sums ...clickSum) {
		t.Helper()
		n := int64(0)
		for i := range sums {
			sums[i].noEvent = true
			n += sums[i].count
		}
		batch := clickBatch{"a", position, position + n, sums}
		if got, err := store.saveClicks(t.Context(), batch); err != nil || got != batch.to {
			t.Fatalf("saveClicks = %d, %v", got, err)
		}
		position = batch.to
	}
	host := func(i int) string { return fmt.Sprintf("h%04d.example", i) }
	var many []clickSum
	for i := range 1000 {
		many = append(many, clickSum{linkID: 1, second: noon, count: 1, referrer: host(i)})
	}
	many = append(many, clickSum{linkID: 1, second: noon, count: 500, referrer: "busy.example"},
		clickSum{linkID: 1, second: noon, count: 7})
	flush(many...)
	for i := range 300 {
		flush(clickSum{linkID: 2, second: noon, count: 1, referrer: host(i)})
	}
	flush(clickSum{linkID: 2, second: noon, count: 1, referrer: host(5)}, // known: has its row
		clickSum{linkID: 2, second: noon, count: 1}, // without a referrer
		clickSum{linkID: 2, second: noon, count: 4, bot: true, referrer: host(999)},
		clickSum{linkID: 2, second: noon + secondsPerDay, count: 1, referrer: host(999)})
	rows := func(link int) int {
		return scalar[int](t, db, `SELECT count(*) FROM clicks_daily
			WHERE url_id = $1 AND day = '2024-10-04' AND referrer NOT IN ('', $2)`,
			link, otherReferrers)
	}
	of := func(link int, referrer string) int {
		return scalar[int](t, db, `SELECT COALESCE(sum(clicks), 0) FROM clicks_daily
			WHERE url_id = $1 AND referrer = $2`, link, referrer)
	}
	for link := 1; link <= 2; link++ {
		if n := rows(link); n > maxReferrers || n < maxReferrers-2 {
			t.Errorf("link %d keeps %d hosts, want %d", link, n, maxReferrers)
		}
	}
	if n := of(1, "busy.example"); n != 500 {
		t.Errorf("the busiest host has %d clicks, want 500", n)
	}
	if n := of(1, ""); n != 7 {
		t.Errorf("%d clicks without a referrer, want 7", n)
	}
	if n := of(1, otherReferrers); n < 900 {
		t.Errorf("%d clicks are counted as %s", n, otherReferrers)
	}
	if n := of(2, host(5)); n != 2 {
		t.Errorf("a host that has its row has %d clicks, want 2", n)
	}
	if n := of(2, host(999)); n != 1 {
		t.Errorf("on another day a host has %d clicks, want 1", n)
	}
	lost := scalar[int](t, db, `SELECT count(*) FROM urls WHERE click_count <> COALESCE((
		SELECT sum(clicks) FROM clicks_daily WHERE url_id = urls.id), 0)`)
	if total := of(1, "") + 1500; lost != 0 || total != 1507 {
		t.Errorf("%d links whose days do not add up", lost)
	}
	bots := scalar[int](t, db, `SELECT sum(bots) FROM clicks_daily WHERE url_id = 2`)
	if bots != 4 {
		t.Errorf("%d clicks of bots, want 4", bots)
	}
}

// TestDeleteUsersDuringFlushes lets flushes and removals of users touch the same links in opposite
// orders: no deadlock is an error, and every click counts.
func TestDeleteUsersDuringFlushes(t *testing.T) {
	const users, links, flushes = 6, 40, 10
	dsn := testDatabase(t)
	admin := openDB(t, dsn)
	// PostgreSQL would look for a deadlock after 1 s only, when a request has long been answered.
	execSQL(t, admin, `ALTER DATABASE `+scalar[string](t, admin, `SELECT current_database()`)+
		` SET deadlock_timeout = '5ms'`)
	store, db := testStore(t, dsn)
	for id := range users {
		addUser(t, db, id+1)
	}
	addLinks(t, db, users*links)
	execSQL(t, db, `UPDATE urls SET user_id = id % $1 + 1`, users)
	var all sync.WaitGroup
	for replica := range 2 {
		all.Go(func() {
			for n := range int64(flushes) {
				batch := clickBatch{journal: fmt.Sprint(replica), from: n + 1, to: n + 2}
				for id := range int64(users * links) {
					if replica == 1 {
						id = users*links - 1 - id
					}
					batch.sums = append(batch.sums, clickSum{linkID: id + 1, second: noon, count: 1})
				}
				if _, err := store.saveClicks(t.Context(), batch); err != nil {
					t.Errorf("flush: %v", err)
				}
			}
		})
	}
	all.Go(func() {
		for id := range int64(users) {
			began := time.Now()
			err := store.deleteUser(t.Context(), id+1)
			for errors.Is(err, errUnavailable) && time.Since(began) < 20*time.Second {
				err = store.deleteUser(t.Context(), id+1) // a flush held a row for long
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
	left := scalar[int](t, db, `SELECT (SELECT count(*) FROM users) +
		(SELECT count(user_id) FROM urls) + (SELECT count(user_id) FROM events)`)
	if left != 0 {
		t.Errorf("%d users, or rows that name one, are left", left)
	}
}

// ---- events ----

// TestClickDetails stores every kind of click small and reads it whole.
func TestClickDetails(t *testing.T) {
	owner := int64(7)
	tests := []struct {
		referrer string
		bot      bool
		stored   string
		whole    string // what readers get beside the link
	}{
		{"", false, `false`, ``},
		{"", true, `true`, `,"bot":true`},
		{"a.example", false, `"a.example"`, `,"referrer":"a.example"`},
		{"a.example", true, `["a.example",true]`, `,"referrer":"a.example","bot":true`},
		{"true", false, `"true"`, `,"referrer":"true"`},
		{"true", true, `["true",true]`, `,"referrer":"true","bot":true`},
		{"[::1]:80", true, `["[::1]:80",true]`, `,"referrer":"[::1]:80","bot":true`},
	}
	for _, tt := range tests {
		stored := clickDetails(tt.referrer, tt.bot)
		if stored != tt.stored {
			t.Errorf("%q, bot %v: stored as %q", tt.referrer, tt.bot, stored)
		}
		referrer, bot := readClickDetails(json.RawMessage(stored))
		if referrer != tt.referrer || bot != tt.bot {
			t.Errorf("%q, bot %v: read as %q, %v", tt.referrer, tt.bot, referrer, bot)
		}
		e := storedEvent{
			event: &event{EventType: "click", Details: json.RawMessage(stored)},
			owner: &owner,
			code:  sql.NullString{String: "abc", Valid: true},
			url:   sql.NullString{String: "https://a.example/?a=b&c", Valid: true},
		}
		got := e.whole()
		want := `{"short_code":"abc","original_url":"https://a.example/?a=b&c"` + tt.whole + `}`
		if string(got.Details) != want || got.UserID != &owner {
			t.Errorf("read whole as %s of user %v, want %s", got.Details, got.UserID, want)
		}
	}
	for _, sent := range []event{
		{EventType: "click", Details: json.RawMessage(`{"campaign":"x"}`)},
		{EventType: "share", Details: json.RawMessage(`{}`)},
	} {
		got := storedEvent{event: &sent, owner: &owner}.whole()
		if string(got.Details) != string(sent.Details) || got.UserID != nil {
			t.Errorf("what a client sent has become %s of user %v", got.Details, got.UserID)
		}
	}
}

// TestEventsOfUser lists what names a user, merged with the counted clicks of the user's links.
func TestEventsOfUser(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	ctx := t.Context()
	addUser(t, db, 1)
	addUser(t, db, 2)
	addLinks(t, db, 3)
	execSQL(t, db, `UPDATE urls SET user_id = CASE id WHEN 3 THEN 2 ELSE 1 END`)
	type row struct {
		link, user int64 // user 0: none
		kind       string
		details    string
		ours       bool // is in the list of user 1
	}
	rows := []row{
		{1, 1, "created", `{}`, true},
		{1, 0, "click", `false`, true},
		{3, 0, "click", `"a.example"`, false},         // of another's link
		{3, 1, "click", `{"campaign":"x"}`, true},     // posted by user 1 of another's link
		{2, 0, "click", `"a.example"`, true},          //
		{2, 0, "click", `{"campaign":"x"}`, false},    // posted by nobody
		{2, 2, "share", `{}`, false},                  // posted by another
		{2, 0, "click", `["a.example",true]`, true},   //
		{1, 1, "updated", `{}`, true},                 //
		{1, 0, "share", `{}`, false},                  // posted by nobody
		{2, 1, "click", `{"short_code":"old"}`, true}, // of the first release
	}
	var want []int64
	for _, r := range rows {
		id := scalar[int64](t, db, `
			INSERT INTO events (url_id, user_id, event_type, timestamp, details)
			VALUES ($1, NULLIF($2::bigint, 0), $3, '2025-01-01', $4)
			RETURNING id`, r.link, r.user, r.kind, r.details)
		if r.ours {
			want = append(want, id)
		}
	}
	user := int64(1)
	list := func(f eventFilter, p page) (ids []int64, more bool) {
		f.userID = &user
		events, err := store.listEvents(ctx, f, p)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events.rows {
			ids = append(ids, e.ID)
			if e.UserID == nil || *e.UserID != user || !strings.HasPrefix(string(e.Details), "{") {
				t.Errorf("event %d is of user %v, with details %s", e.ID, e.UserID, e.Details)
			}
		}
		return ids, events.more
	}
	if got, _ := list(eventFilter{}, page{limit: 100}); !slices.Equal(got, want) {
		t.Errorf("the events of user 1 are %v, want %v", got, want)
	}
	var paged []int64
	for after := int64(0); ; after = paged[len(paged)-1] {
		got, more := list(eventFilter{}, page{limit: 2, after: after})
		paged = append(paged, got...)
		if !more {
			break
		}
	}
	if !slices.Equal(paged, want) {
		t.Errorf("in pages of two: %v, want %v", paged, want)
	}
	if got, _ := list(eventFilter{}, page{limit: 2, offset: 4}); !slices.Equal(got, want[4:6]) {
		t.Errorf("from the fifth on: %v, want %v", got, want[4:6])
	}
	if got, _ := list(eventFilter{eventType: "click"}, page{limit: 100}); len(got) != 5 {
		t.Errorf("clicks: %v, want 5", got)
	}
	if got, _ := list(eventFilter{eventType: "created"}, page{limit: 100}); len(got) != 1 {
		t.Errorf("created: %v, want 1", got)
	}
	link := int64(2)
	got, _ := list(eventFilter{eventType: "click", urlID: &link}, page{limit: 100})
	if len(got) != 3 {
		t.Errorf("clicks of one link: %v, want 3", got)
	}
}

// TestCreateEvent logs events of links and users that exist, and refuses others.
func TestCreateEvent(t *testing.T) {
	store, db := testStore(t, testDatabase(t))
	addUser(t, db, 1)
	addLinks(t, db, 2)
	execSQL(t, db, `UPDATE urls SET deleted_at = now() WHERE id = 2`)
	tests := []struct {
		link, user int64
		want       error
	}{
		{1, 1, nil}, {1, 0, nil}, {1, 2, errNoUser}, {2, 1, errNoLink}, {9, 1, errNoLink},
	}
	for _, tt := range tests {
		e, err := store.createEvent(t.Context(), tt.link, tt.user, "share", `{"a": 1}`)
		if err != tt.want {
			t.Errorf("link %d, user %d: %v, want %v", tt.link, tt.user, err, tt.want)
		}
		if err == nil && (e.URLID != tt.link || string(e.Details) != `{"a": 1}`) {
			t.Errorf("link %d, user %d: logged as %s", tt.link, tt.user, jsonText(e))
		}
	}
	if n := scalar[int](t, db, `SELECT count(*) FROM events`); n != 2 {
		t.Errorf("%d events, want 2", n)
	}
}
