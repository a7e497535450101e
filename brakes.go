package main

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Brakes on the server's side: what PostgreSQL itself ends when hop cannot, because hop was
// stopped, or its connection died, while a statement waited for a lock or a transaction held one.
//
// They are parameters of a connection's start. A pooler such as PgBouncer hands the same connection
// of PostgreSQL to one client after the other, and refuses such parameters or drops them without a
// word. So every new connection asks PostgreSQL whether they arrived. Where they did not, each
// question becomes a transaction that begins with SET LOCAL, which holds for this transaction
// alone, whoever has the connection next. That costs two round trips more.

const (
	// serverMargin is how much earlier the server's own brake on a statement acts than the
	// socket's deadline: a statement it cancels leaves the connection usable.
	serverMargin = 150 * time.Millisecond

	// idleInTransaction is how long the server keeps a transaction open for a replica that was
	// stopped in the middle of it, with its locks.
	idleInTransaction = 5 * time.Second
)

// brake is a setting of PostgreSQL.
type brake struct {
	name  string
	after time.Duration
}

// brakes are those of one pool.
type brakes []brake

// brakesOf returns the brakes for questions that may take as long as within.
func brakesOf(within time.Duration) brakes {
	return brakes{
		{"statement_timeout", within - serverMargin},
		{"idle_in_transaction_session_timeout", idleInTransaction},
	}
}

// refusedBy says whether err is a pooler's refusal of one of the brakes. A refusal of a parameter
// that the operator gave, such as search_path, is for the operator to read.
func (all brakes) refusedBy(err error) bool {
	return slices.ContainsFunc(all, func(b brake) bool {
		return strings.Contains(err.Error(), "unsupported startup parameter: "+b.name)
	})
}

// setLocal returns the statements that give the brakes to the transaction they stand in.
func (all brakes) setLocal() string {
	var statements []string
	for _, b := range all {
		statements = append(statements,
			fmt.Sprintf("SET LOCAL %s = %d", b.name, b.after.Milliseconds()))
	}
	return strings.Join(statements, "; ")
}

// reached asks PostgreSQL whether it has the brakes.
func (all brakes) reached(conn driver.QueryerContext) (bool, error) {
	var same []string
	for _, b := range all {
		same = append(same, fmt.Sprintf("current_setting('%s')::interval = '%d ms'",
			b.name, b.after.Milliseconds()))
	}
	rows, err := conn.QueryContext(context.Background(),
		"SELECT "+strings.Join(same, " AND "), nil)
	if err != nil {
		return false, err
	}
	kept, err := keepRows(rows)
	if err != nil {
		return false, err
	}
	return len(kept.rows) == 1 && kept.rows[0][0] == true, nil
}

// keptRows are the rows of a query, read to their end.
type keptRows struct {
	columns []string
	rows    [][]driver.Value
	next    int
}

// keepRows reads all rows and closes them.
func keepRows(rows driver.Rows) (*keptRows, error) {
	defer rows.Close()
	kept := &keptRows{columns: rows.Columns()}
	for {
		row := make([]driver.Value, len(kept.columns))
		err := rows.Next(row)
		if errors.Is(err, io.EOF) {
			return kept, nil
		}
		if err != nil {
			return nil, err
		}
		for i, value := range row {
			if b, isBytes := value.([]byte); isBytes {
				row[i] = slices.Clone(b) // the driver may use its memory again
			}
		}
		kept.rows = append(kept.rows, row)
	}
}

// Columns returns the columns' names.
func (k *keptRows) Columns() []string { return k.columns }

// Close does nothing: the rows were read already.
func (k *keptRows) Close() error { return nil }

// Next gives the next row.
func (k *keptRows) Next(dest []driver.Value) error {
	if k.next == len(k.rows) {
		return io.EOF
	}
	copy(dest, k.rows[k.next])
	k.next++
	return nil
}
