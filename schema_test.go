package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestMigrate makes the tables of a new database, once and again, and by four replicas at once.
func TestMigrate(t *testing.T) {
	dsn := testDatabase(t)
	db := openDB(t, dsn)
	ids := make([]string, 4)
	var replicas sync.WaitGroup
	for i := range ids {
		store := openTestStore(t, dsn, 2)
		replicas.Go(func() {
			id, err := store.migrate(t.Context())
			if err != nil {
				t.Error(err)
			}
			ids[i] = id
		})
	}
	replicas.Wait()
	for _, id := range ids {
		if id == "" || id != ids[0] {
			t.Errorf("the database has the ids %v, want one for all", ids)
			break
		}
	}
	shape := shapeOf(t, db)
	store := openTestStore(t, dsn, 2)
	id, err := store.migrate(t.Context())
	if err != nil || id != ids[0] || shapeOf(t, db) != shape {
		t.Errorf("a second time: id %s, %v; want %s and nothing changed", id, err, ids[0])
	}
	missing := scalar[sql.NullString](t, db, `
		SELECT string_agg(table_name || '.' || column_name, ', ')
		FROM information_schema.columns
		WHERE table_schema = 'public'
		      AND col_description((table_schema || '.' || table_name)::regclass, ordinal_position)
		          IS NULL`)
	if missing.Valid {
		t.Errorf("columns without a comment: %s", missing.String)
	}
	other, _ := testStore(t, testDatabase(t))
	if otherID, err := other.migrate(t.Context()); err != nil || otherID == ids[0] {
		t.Errorf("another database has the id %s, %v", otherID, err)
	}
}

// TestMigrateRefuses has databases that hop must leave alone.
func TestMigrateRefuses(t *testing.T) {
	tests := []struct {
		name   string
		create string // what is added to CREATE DATABASE
		before string // SQL that runs before
		want   error
	}{
		{"another program's users", "", `CREATE TABLE users (id int, password text)`, errForeignTables},
		{"another program's urls", "", `CREATE TABLE urls (id int, url text)`, errForeignTables},
		{"another program's events", "", `CREATE TABLE events (id int, username text)`,
			errForeignTables},
		{"a newer release's", "", schemaSQL + `; INSERT INTO hop_meta VALUES ('schema', '99')`,
			errNewerSchema},
		{"LATIN1", " ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'", ``,
			errNotUTF8},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dsn := testDatabase(t)
			if tt.create != "" {
				dsn = recreate(t, dsn, tt.create)
			}
			db := openDB(t, dsn)
			execSQL(t, db, tt.before)
			before := shapeOf(t, db)
			_, err := openTestStore(t, dsn, 2).migrate(t.Context())
			if !errors.Is(err, tt.want) {
				t.Errorf("migrate: %v, want %v", err, tt.want)
			}
			if after := shapeOf(t, db); after != before {
				t.Errorf("the database has become\n%s", after)
			}
		})
	}
	t.Run("a schema of hop's own beside them", func(t *testing.T) {
		dsn := testDatabase(t)
		db := openDB(t, dsn)
		execSQL(t, db, `CREATE TABLE users (id int, password text); CREATE SCHEMA hop`)
		store := openTestStore(t, dsn+"&search_path=hop", 2)
		if _, err := store.migrate(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := scalar[int](t, db, `SELECT count(*) FROM hop.users`); n != 0 {
			t.Errorf("%d users", n)
		}
	})
}

// recreate makes the database of a URL anew, with other properties.
func recreate(t *testing.T, dsn, properties string) string {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	admin := openDB(t, os.Getenv("DATABASE_URL"))
	name := strings.TrimPrefix(u.Path, "/")
	execSQL(t, admin, `DROP DATABASE `+name)
	execSQL(t, admin, `CREATE DATABASE `+name+properties)
	return dsn
}

// TestRoleWithoutCreate starts on a finished schema as a role that may only read and write rows.
func TestRoleWithoutCreate(t *testing.T) {
	dsn := testDatabase(t)
	_, db := testStore(t, dsn)
	const role = "hop_test_rows"
	drop := func() {
		if scalar[bool](t, db, `SELECT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = $1)`, role) {
			execSQL(t, db, `DROP OWNED BY `+role)
			execSQL(t, db, `DROP ROLE `+role)
		}
	}
	drop()
	execSQL(t, db, `CREATE ROLE `+role+` LOGIN PASSWORD 'secret'`)
	t.Cleanup(drop)
	execSQL(t, db, `REVOKE CREATE ON SCHEMA public FROM PUBLIC`)
	execSQL(t, db, `GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO `+role)
	pg := openAs(t, dsn, role)
	if err := pg.probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	store := newStore(pg)
	if id, err := store.migrate(t.Context()); err != nil || id == "" {
		t.Errorf("migrate: %q, %v", id, err)
	}
	made, err := store.createLinks(t.Context(), []newLink{{code: "abc", url: "https://a.example/"}})
	if err != nil || made[0].err != nil {
		t.Errorf("createLinks: %v, %v", made, err)
	}
	pg.close()
}

// TestUpgrade brings a database of the first release up to date while its writers go on. Then it
// has the shape of a new one, and all its rows.
func TestUpgrade(t *testing.T) {
	_, fresh := testStore(t, testDatabase(t))
	want := shapeOf(t, fresh)

	dsn, db := firstReleaseDatabase(t)
	writing, stop := context.WithCancel(t.Context())
	var writers sync.WaitGroup
	written := 0
	started := make(chan struct{})
	writers.Go(func() {
		for writing.Err() == nil {
			execSQL(t, db, `UPDATE urls SET click_count = click_count + 1 WHERE id = 2`)
			execSQL(t, db, `INSERT INTO events (url_id, user_id, event_type, timestamp, details)
				VALUES (2, 2, 'click', now(), '{"short_code":"asleep"}')`)
			written++
			if written == 1 {
				close(started)
			}
		}
	})
	<-started
	// Two replicas start together. Their builds of indexes may collide: then one tries again.
	var replicas sync.WaitGroup
	for range 2 {
		store := openTestStore(t, dsn, 2)
		replicas.Go(func() {
			began := time.Now()
			_, err := store.migrate(t.Context())
			for err != nil && time.Since(began) < 30*time.Second {
				_, err = store.migrate(t.Context())
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	replicas.Wait()
	stop()
	writers.Wait()

	checkShape(t, db, want)
	store := openTestStore(t, dsn, 2)
	id, err := store.migrate(t.Context())
	if err != nil || id == "" {
		t.Errorf("once more: %q, %v", id, err)
	}
	counted := scalar[int](t, db, `SELECT click_count FROM urls WHERE id = 2`)
	events := scalar[int](t, db, `SELECT count(*) FROM events WHERE url_id = 2`)
	if counted != written || events != written {
		t.Errorf("%d writes went on, %d and %d are there", written, counted, events)
	}
	st, err := store.stats(t.Context(), "plain")
	if err != nil || st.ClickCount != 2 || st.Title == nil || *st.Title != "A title" {
		t.Errorf("figures of an old link: %+v, %v", st, err)
	}
	urlID := int64(1)
	found, err := store.listEvents(t.Context(), eventFilter{urlID: &urlID}, page{limit: 10})
	rows := found.rows
	if err != nil || len(rows) != 3 || string(rows[1].Details) != `{"short_code":"plain"}` {
		t.Errorf("events of an old link: %+v, %v", rows, err)
	}
}

// TestUpgradeBrokenOff goes on after an upgrade that died while it built an index, and after a
// table was in use for long.
func TestUpgradeBrokenOff(t *testing.T) {
	_, fresh := testStore(t, testDatabase(t))
	dsn, db := firstReleaseDatabase(t)
	store := openTestStore(t, dsn, 2)

	tx, err := db.Begin()
	if err == nil {
		_, err = tx.Exec(`UPDATE urls SET title = 'in use' WHERE id = 3`)
	}
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	_, err = store.migrate(t.Context())
	if took := time.Since(began); !errors.Is(err, errUnavailable) || took > 10*lockWithin {
		t.Errorf("while a table is in use: %v after %v", err, took)
	}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}

	execSQL(t, db, `ALTER TABLE urls ADD COLUMN IF NOT EXISTS changed xid8`)
	execSQL(t, db, `CREATE INDEX urls_by_change ON urls (changed) WHERE changed IS NOT NULL`)
	execSQL(t, db, `UPDATE pg_index SET indisvalid = false
		WHERE indexrelid = 'urls_by_change'::regclass`)
	if _, err := store.migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkShape(t, db, shapeOf(t, fresh))
	var timeout string
	err = store.pg.background.QueryRowContext(t.Context(), `SHOW statement_timeout`).Scan(&timeout)
	if err != nil || timeout == "0" {
		t.Errorf("after the upgrade statements may take %s, %v", timeout, err)
	}
}

// TestUpgradeBesideAnother comes to an index that another replica is building: the step is not done
// before it is built, since the other one may die. When nobody builds it, it is built here.
func TestUpgradeBesideAnother(t *testing.T) {
	_, fresh := testStore(t, testDatabase(t))
	dsn, db := firstReleaseDatabase(t)
	// PostgreSQL tells that something is built, and which indexes are not valid: so an index that
	// waits for a table in use stands for the other replica's work.
	execSQL(t, db, `CREATE TABLE other (id int)`)
	tx, err := db.Begin()
	if err == nil {
		_, err = tx.Exec(`INSERT INTO other VALUES (1)`)
	}
	if err != nil {
		t.Fatal(err)
	}
	built := make(chan error, 1)
	go func() {
		_, err := db.Exec(`CREATE INDEX CONCURRENTLY other_index ON other (id)`)
		built <- err
	}()
	eventually(t, patience, "an index is being built", func() bool {
		return scalar[int](t, db, `SELECT count(*) FROM pg_stat_progress_create_index
			WHERE datname = current_database()`) == 1
	})
	execSQL(t, db, `CREATE INDEX urls_by_target ON urls USING hash (original_url)`)
	execSQL(t, db, `UPDATE pg_index SET indisvalid = false
		WHERE indexrelid = 'urls_by_target'::regclass`)

	store := openTestStore(t, dsn, 2)
	if _, err := store.migrate(t.Context()); !errors.Is(err, errIndexInWork) {
		t.Errorf("beside another replica: %v", err)
	}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	if err := <-built; err != nil {
		t.Fatal(err)
	}
	execSQL(t, db, `DROP TABLE other`)
	if _, err := store.migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkShape(t, db, shapeOf(t, fresh))
}

// TestStopDuringUpgrade stops hop while it builds an index, which may take hours: it does not wait
// for that.
func TestStopDuringUpgrade(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	dsn, db := firstReleaseDatabase(t)
	// A build waits for whoever looks at the database as it was before.
	tx, err := db.BeginTx(t.Context(), &sql.TxOptions{Isolation: sql.LevelRepeatableRead})
	if err == nil {
		_, err = tx.Exec(`SELECT count(*) FROM pg_class`)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	hop := prepareHop(t, "DATABASE_URL="+dsn)
	hop.start(t)
	eventually(t, patience, "an index waits", func() bool {
		return scalar[int](t, db, `SELECT count(*) FROM pg_stat_progress_create_index
			WHERE datname = current_database() AND phase LIKE 'waiting%'`) == 1
	})
	hop.signal(syscall.SIGTERM)
	select {
	case <-hop.done:
	case <-time.After(patience):
		t.Error("it waits for the index")
	}
}

// firstReleaseDatabase is a new database as the first release made it.
func firstReleaseDatabase(t testing.TB) (dsn string, db *sql.DB) {
	t.Helper()
	old, err := os.ReadFile("testdata/schema/v1.sql")
	if err != nil {
		t.Fatal(err)
	}
	dsn = testDatabase(t)
	db = openDB(t, dsn)
	execSQL(t, db, string(old))
	return dsn, db
}

// checkShape compares the tables of an upgraded database with those of a new one, which shapeOf has
// described.
func checkShape(t testing.TB, db *sql.DB, want string) {
	t.Helper()
	if got := shapeOf(t, db); got != want {
		t.Errorf("the upgraded database differs from a new one: %s", differingLines(got, want))
	}
}

// shapeOf describes the tables of a database: columns, constraints and indexes, in the order of
// their names.
func shapeOf(t testing.TB, db *sql.DB) string {
	t.Helper()
	return scalar[string](t, db, `
		SELECT COALESCE(string_agg(line, E'\n' ORDER BY line), '') FROM (
		    SELECT format('%s.%s %s %s %s', table_name, column_name, data_type, is_nullable,
		                  datetime_precision) AS line
		    FROM information_schema.columns WHERE table_schema = 'public'
		    UNION ALL
		    SELECT format('%s: %s', conrelid::regclass, pg_get_constraintdef(oid))
		    FROM pg_constraint WHERE connamespace = 'public'::regnamespace
		    UNION ALL
		    SELECT format('%s, valid: %s', pg_get_indexdef(indexrelid), indisvalid)
		    FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
		    WHERE relnamespace = 'public'::regnamespace
		    UNION ALL
		    SELECT format('%s: %s', relname, reloptions)
		    FROM pg_class WHERE relnamespace = 'public'::regnamespace AND reloptions IS NOT NULL
		) AS lines`)
}

// differingLines are the lines that only one of two texts has.
func differingLines(got, want string) string {
	var b strings.Builder
	for line := range strings.Lines(got) {
		if !strings.Contains(want+"\n", strings.TrimSuffix(line, "\n")+"\n") {
			fmt.Fprintf(&b, "\nmore: %s", line)
		}
	}
	for line := range strings.Lines(want) {
		if !strings.Contains(got+"\n", strings.TrimSuffix(line, "\n")+"\n") {
			fmt.Fprintf(&b, "\nless: %s", line)
		}
	}
	return b.String()
}
