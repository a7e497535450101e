package main

import (
	"context"
	"crypto/rand"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// How a database gets hop's tables, and how an older one is brought up to date.
//
// A start looks first and changes only what is missing: a finished schema needs no lock and no
// right to create anything. Every step can be run again, so a replica that dies half-way, or two
// that start together, do no harm; releases before and after a step work on the same database.

//go:embed schema.sql
var schemaSQL string

// schemaVersion is the number of the last step. Version 1 is the first release, which kept none.
const schemaVersion = 2

// schemaStep brings a database from one version to the next.
type schemaStep struct {
	version    int
	quick      []string // statements that lock a table for an instant
	concurrent []string // indexes, built beside running writes, outside a transaction
}

// schemaSteps are the upgrades of databases older than schema.sql.
var schemaSteps = []schemaStep{{
	version: 2, // small click rows, and the log of changes
	quick: []string{
		`CREATE TABLE IF NOT EXISTS hop_meta (key text PRIMARY KEY, value text NOT NULL)`,
		`ALTER TABLE urls ADD COLUMN IF NOT EXISTS changed xid8`,
		`INSERT INTO hop_meta (key, value)
		 VALUES ('` + rowsFrom + `', ((now() AT TIME ZONE 'UTC')::date + 1)::text)
		 ON CONFLICT DO NOTHING`,
	},
	concurrent: []string{
		`CREATE INDEX CONCURRENTLY IF NOT EXISTS urls_by_target ON urls USING hash (original_url)`,
		`CREATE INDEX CONCURRENTLY IF NOT EXISTS urls_by_change ON urls (changed)
		 WHERE changed IS NOT NULL`,
		`CREATE INDEX CONCURRENTLY IF NOT EXISTS events_by_owner ON events (user_id, id)
		 WHERE user_id IS NOT NULL`,
		`CREATE INDEX CONCURRENTLY IF NOT EXISTS events_by_kind ON events (event_type, id)
		 WHERE event_type <> 'click'`,
		`DROP INDEX CONCURRENTLY IF EXISTS events_by_user`,
		`DROP INDEX CONCURRENTLY IF EXISTS events_by_type`,
	},
}}

const (
	// lockWithin is how long a step waits for a table that is in use. While it waits, every later
	// writer queues behind it; when it gives up, it is tried again a moment later.
	lockWithin = 200 * time.Millisecond

	// buildWithin is the longest that an index of a large table may take to build.
	buildWithin = 2 * time.Hour
)

// Errors that no waiting mends. They tell the operator what to do.
var (
	errForeignTables = errors.New("the database has tables of another program: give hop a " +
		"database of its own, or a schema (?search_path=hop in DATABASE_URL)")
	errNotUTF8 = errors.New("the database's encoding is not UTF8, so that it cannot store every " +
		"title: create one with ENCODING 'UTF8'")
	errNewerSchema = errors.New("the database belongs to a newer release of hop")
)

// schemaState is what a start finds in the database.
type schemaState struct {
	encoding string
	version  int // 0: no tables at all
	foreign  bool
}

// migrate gives the database the newest schema and returns the database's own id, which names it
// in journals and caches. It may take as long as its indexes take to build.
func (s *Store) migrate(ctx context.Context) (databaseID string, err error) {
	state, err := s.schemaState(ctx)
	switch {
	case err != nil:
		return "", err
	case state.encoding != "UTF8":
		return "", errNotUTF8
	case state.foreign:
		return "", errForeignTables
	case state.version > schemaVersion:
		return "", errNewerSchema
	case state.version == 0:
		err = s.createSchema(ctx)
	case state.version < schemaVersion:
		err = s.upgradeSchema(ctx, state.version)
	}
	if err != nil {
		return "", err
	}
	return queryOne(ctx, s.pg.background, func(id *string) []any { return []any{id} },
		`SELECT value FROM hop_meta WHERE key = 'database'`)
}

// schemaState looks at the database without locking anything.
func (s *Store) schemaState(ctx context.Context) (schemaState, error) {
	type row struct {
		encoding           string
		meta, tables, ours bool
	}
	dest := func(r *row) []any { return []any{&r.encoding, &r.meta, &r.tables, &r.ours} }
	// pg_class and pg_attribute show one moment. to_regclass alone may show a later one, in which
	// another replica has just made the tables.
	found, err := queryOne(ctx, s.pg.background, dest, `
		SELECT current_setting('server_encoding'),
		       EXISTS (SELECT 1 FROM pg_class WHERE oid = to_regclass('hop_meta')),
		       EXISTS (SELECT 1 FROM pg_class WHERE oid IN (
		           to_regclass('users'), to_regclass('urls'), to_regclass('events'))),
		       (SELECT count(*) FROM pg_attribute
		        WHERE NOT attisdropped AND (attrelid, attname::text) IN (
		            (to_regclass('users'), 'username'), (to_regclass('urls'), 'short_code'),
		            (to_regclass('urls'), 'last_clicked_at'), (to_regclass('events'), 'url_id'),
		            (to_regclass('clicks_daily'), 'bots'),
		            (to_regclass('click_journals'), 'batch'))) = 6`)
	if err != nil {
		return schemaState{}, err
	}
	state := schemaState{encoding: found.encoding, foreign: found.tables && !found.ours}
	if !found.meta {
		if found.ours {
			state.version = 1
		}
		return state, nil
	}
	text, err := queryOne(ctx, s.pg.background, func(v *string) []any { return []any{v} },
		`SELECT COALESCE(max(value), '1') FROM hop_meta WHERE key = 'schema'`)
	if err != nil {
		return state, err
	}
	state.version, err = strconv.Atoi(text)
	return state, err
}

// createSchema makes the tables of an empty database, unless another replica did so meanwhile.
func (s *Store) createSchema(ctx context.Context) error {
	return s.pg.background.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		if err := txLock(ctx, tx, schemaLock); err != nil {
			return err
		}
		var there bool
		// Not to_regclass: it may still say what was true before the wait for the lock.
		err := txQueryOne(ctx, tx, nil, []any{&there}, `
			SELECT EXISTS (SELECT 1 FROM pg_tables WHERE tablename = 'hop_meta'
			               AND schemaname = ANY (current_schemas(false)))`)
		if err != nil || there {
			return err
		}
		if _, err := tx.ExecContext(ctx, schemaSQL); err != nil {
			return err
		}
		return setVersion(ctx, tx, schemaVersion)
	})
}

// setVersion notes which version the schema has, and gives a database without an id one.
func setVersion(ctx context.Context, tx *sql.Tx, version int) error {
	_, err := txExec(ctx, tx, `
		INSERT INTO hop_meta (key, value) VALUES ('schema', $1), ('database', $2)
		ON CONFLICT (key) DO UPDATE SET value = excluded.value WHERE hop_meta.key = 'schema'`,
		strconv.Itoa(version), rand.Text())
	return err
}

// upgradeSchema runs the steps after version.
func (s *Store) upgradeSchema(ctx context.Context, version int) error {
	for _, step := range schemaSteps {
		if step.version <= version {
			continue
		}
		s.pg.log.Info("schema upgrade", "to", step.version)
		for _, statement := range step.quick {
			if err := s.runQuick(ctx, statement); err != nil {
				return fmt.Errorf("schema step %d: %w", step.version, err)
			}
		}
		for _, statement := range step.concurrent {
			if err := s.runConcurrent(ctx, statement); err != nil {
				return fmt.Errorf("schema step %d: %w", step.version, err)
			}
		}
		err := s.pg.background.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
			var broken bool
			err := tx.QueryRowContext(ctx, `
				SELECT EXISTS (SELECT 1 FROM pg_index WHERE `+brokenIndex+`)`).Scan(&broken)
			if err == nil && broken {
				err = errIndexInWork
			}
			if err != nil {
				return err
			}
			return setVersion(ctx, tx, step.version)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// brokenIndex is a condition on pg_index: an index that is being built, or whose build broke off.
const brokenIndex = `NOT indisvalid AND indrelid IN (to_regclass('urls'), to_regclass('events'))`

// errIndexInWork keeps a step from being done while another replica is at its index: if that one
// died now, nobody would build it.
var errIndexInWork = errors.New("another replica is building an index")

// runQuick runs one statement that needs a table for itself, and gives up soon if it is in use.
func (s *Store) runQuick(ctx context.Context, statement string) error {
	return s.pg.background.inTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		if err := txLock(ctx, tx, schemaLock); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `SELECT set_config('lock_timeout', $1, true)`,
			milliseconds(lockWithin))
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, statement)
		return err
	})
}

// runConcurrent builds or drops an index while writes go on. An index whose build was broken off is
// there but not valid: it is built again, unless another replica is building it just now.
func (s *Store) runConcurrent(ctx context.Context, statement string) error {
	ctx, cancel := context.WithTimeout(ctx, buildWithin)
	defer cancel()
	conn, err := s.pg.background.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	var broken []string
	rows, err := conn.QueryContext(ctx, `
		SELECT indexrelid::regclass::text FROM pg_index
		WHERE `+brokenIndex+`
		      AND NOT EXISTS (SELECT 1 FROM pg_stat_progress_create_index
		                      WHERE datname = current_database())`)
	if err != nil {
		return err
	}
	broken, err = collect(rows, func(name *string) []any { return []any{name} })
	if err != nil {
		return err
	}
	var statements []string
	if !isPooled(conn) { // what is set for a session of a pooler's, others would get
		statements = append(statements, `SET statement_timeout = 0`)
		// The connection goes back to its pool, and with its usual limit.
		defer conn.ExecContext(ctx,
			`SET statement_timeout = `+milliseconds(backgroundWithin-serverMargin))
	}
	for _, name := range broken {
		statements = append(statements, `DROP INDEX CONCURRENTLY IF EXISTS `+name)
	}
	statements = append(statements, statement)
	for _, statement := range statements {
		if _, err := conn.ExecContext(ctx, statement); err != nil {
			return err
		}
	}
	return nil
}
