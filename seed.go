package main

import (
	"cmp"
	"context"
	"database/sql"
	"embed"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"
)

// The platform's CSVs: hop seed loads the three files in one transaction, hop export writes them back byte for byte, and
// POST /users/bulk reads one of them with the same reader. A bad row stops the load, and nothing of it stays.

//go:embed seeds/*.csv
var seeds embed.FS

// chunkRows go into one INSERT: enough to make the round trip cheap, few enough to keep memory flat.
const chunkRows = 5000

// column is a column of a file and of its table.
type column struct {
	name, cast string // cast is its SQL type
	check      func(string) error
	refers     string // to the ids of this file; an empty field is then NULL
	export     string // what an export selects, if not just the column
}

// csvTable is one of the files.
type csvTable struct {
	name    string
	columns []column
}

// csvTables are the three files, in the order that their references need.
func csvTables(rules targetRules) []csvTable {
	at := func(name string) column { return column{name: name, cast: "timestamp", check: checkCSVTime} }
	text := func(name string, check func(string) error) column {
		return column{name: name, cast: "text", check: check}
	}
	ref := func(name, file string) column {
		return column{name: name, cast: "bigint", check: checkID, refers: file}
	}
	id := column{name: "id", cast: "bigint", check: checkID}
	active := column{name: "is_active", cast: "boolean", check: checkCSVBool, // a deleted link must not come back to life
		export: `CASE WHEN is_active AND deleted_at IS NULL THEN 'True' ELSE 'False' END`}
	details := column{name: "details", cast: "json", check: checkDetails}
	return []csvTable{
		{"users", []column{id, text("username", checkName), text("email", checkEmail), at("created_at")}},
		{"urls", []column{id, ref("user_id", "users"), text("short_code", checkCode), text("original_url", rules.check),
			text("title", checkTitle), active, at("created_at"), at("updated_at")}},
		{"events", []column{id, ref("url_id", "urls"), ref("user_id", "users"), text("event_type", checkName), at("timestamp"), details}},
	}
}

func checkID(s string) error {
	n, err := strconv.ParseInt(s, 10, 64)
	return expect(err == nil && n > 0 && n < 1<<53 && strconv.FormatInt(n, 10) == s, // leaves the sequence room
		"must be a positive integer, not %q", s)
}

func checkCSVTime(s string) error {
	t, err := time.Parse(csvTime, s)
	return expect(err == nil && t.Year() > 0 && t.Format(csvTime) == s, "must be a time like 2026-01-31 12:00:00, not %q", s)
}

func checkCSVBool(s string) error {
	return expect(s == "True" || s == "False", "must be True or False, not %q", s)
}

func checkTitle(s string) error {
	return cmp.Or(expect(strings.TrimSpace(s) == s, "must not be padded with spaces: %q", s), checkText(s))
}

func checkDetails(s string) error {
	return cmp.Or(expect(strings.HasPrefix(s, "{"), "must be a JSON object, not %q", s), checkJSON([]byte(s)))
}

// expect is nil if ok, else the error that format makes of s.
func expect(ok bool, format, s string) error {
	if ok {
		return nil
	}
	return fmt.Errorf(format, s)
}

// rowError is a bad row: nothing was loaded.
type rowError struct {
	file           string
	line           int
	column, reason string
}

func (e *rowError) Error() string {
	return fmt.Sprintf("%s.csv line %d, column %s: %s", e.file, e.line, e.column, e.reason)
}

// idSet is a set of ids: one bit each where they are dense, as ids are.
type idSet map[int64]uint64

// add is false if id was there.
func (s idSet) add(id int64) bool { was := s.has(id); s[id>>6] |= 1 << (id & 63); return !was }

func (s idSet) has(id int64) bool { return s[id>>6]>>(id&63)&1 == 1 }

// loader reads files into one transaction.
type loader struct {
	tx       *txn
	ids      map[string]idSet // by file, of those read so far
	progress func(file string, rows int)
}

// rows are some parsed rows of a file as columns, ready for unnest, and the line each came from.
type rows struct {
	columns []pq.StringArray
	lines   []int
}

// load reads one file to its end and returns how many rows it has. Rows that are there already stay as they are.
func (l *loader) load(t csvTable, file io.Reader) (n int, err error) {
	chunks, done := make(chan rows, 1), make(chan struct{})
	var parseErr error
	go func() { defer close(chunks); parseErr = l.parse(t, file, chunks, done) }() // while PostgreSQL inserts the chunk before
	for chunk := range chunks {
		if err == nil {
			if err = l.insert(t, chunk); err != nil {
				close(done)
			}
			n += len(chunk.lines)
			l.progress(t.name, n)
		}
	}
	if err = cmp.Or(err, parseErr); err == nil {
		l.tx.exec(fmt.Sprintf(`
			SELECT setval('%[1]s_id_seq', top) FROM (SELECT max(id) AS top FROM %[1]s) AS t
			WHERE top >= (SELECT last_value FROM %[1]s_id_seq)`, t.name))
		err = l.tx.err
	}
	return n, err
}

// parse sends the rows of a file in chunks, all of them valid, until done is closed; or returns the first rowError.
func (l *loader) parse(t csvTable, file io.Reader, chunks chan<- rows, done <-chan struct{}) error {
	r := csv.NewReader(file)
	r.ReuseRecord = true
	header, err := r.Read()
	if err != nil && err != io.EOF {
		return t.readError(err)
	}
	var names []string
	for _, c := range t.columns {
		names = append(names, c.name)
	}
	got := strings.TrimPrefix(strings.Join(header, ","), "\ufeff") // Excel writes the BOM
	if len(header) != len(names) || got != strings.Join(names, ",") {
		return &rowError{t.name, 1, "id", fmt.Sprintf("the header must be %s", strings.Join(names, ","))}
	}
	codes := map[string]bool{}
	l.ids[t.name] = idSet{}
	for err == nil {
		chunk := rows{columns: make([]pq.StringArray, len(names))}
		for len(chunk.lines) < chunkRows {
			var record []string
			if record, err = r.Read(); err == io.EOF {
				break
			} else if err != nil {
				return t.readError(err)
			}
			line, _ := r.FieldPos(0)
			for i, c := range t.columns {
				v := strings.Clone(record[i]) // the reader's buffer holds the whole row
				if err := l.check(t, c, v, codes); err != nil {
					return &rowError{t.name, line, c.name, err.Error()}
				}
				chunk.columns[i] = append(chunk.columns[i], v)
			}
			chunk.lines = append(chunk.lines, line)
		}
		select {
		case chunks <- chunk:
		case <-done:
			return nil
		}
	}
	return nil
}

// check judges one field, by itself and by what the files had before it.
func (l *loader) check(t csvTable, c column, v string, codes map[string]bool) error {
	if v == "" && (c.refers != "" || c.name == "title") && c.name != "url_id" {
		return nil // NULL: an owner who was deleted, a link without a title
	}
	if err := c.check(v); err != nil {
		return err
	}
	id, _ := strconv.ParseInt(v, 10, 64)
	if c.name == "short_code" {
		defer func() { codes[v] = true }()
	}
	if c.name == "id" && !l.ids[t.name].add(id) || codes[v] && c.name == "short_code" {
		return fmt.Errorf("%s stands in an earlier row", v)
	}
	return expect(c.refers == "" || l.ids[c.refers].has(id), "there is no row %s in "+c.refers+".csv", v)
}

// readError turns what encoding/csv says into a rowError; a failed read stays what it is.
func (t csvTable) readError(err error) error {
	if bad := (*csv.ParseError)(nil); errors.As(err, &bad) {
		return &rowError{t.name, bad.Line, fmt.Sprint(bad.Column), bad.Err.Error()}
	}
	return err
}

// insert adds the rows of a chunk that are not there yet. A link that is neither new nor the one that is there is refused.
func (l *loader) insert(t csvTable, chunk rows) error {
	if len(chunk.lines) == 0 {
		return nil
	}
	var names, values, params []string
	var args []any
	for i, c := range t.columns {
		names, values = append(names, c.name), append(values, fmt.Sprintf("NULLIF(%s, '')::%s", c.name, c.cast))
		params, args = append(params, fmt.Sprintf("$%d::text[]", i+1)), append(args, chunk.columns[i])
	}
	n := l.tx.exec(fmt.Sprintf(`INSERT INTO %s (%[2]s) SELECT %s FROM unnest(%s) AS r (%[2]s) ON CONFLICT DO NOTHING`,
		t.name, strings.Join(names, ", "), strings.Join(values, ", "), strings.Join(params, ", ")), args...)
	if l.tx.err != nil {
		return fmt.Errorf("%s.csv lines %d-%d: %w", t.name, chunk.lines[0], chunk.lines[len(chunk.lines)-1], l.tx.err)
	}
	if t.name != "urls" || n == int64(len(chunk.lines)) {
		return nil
	}
	var at int
	l.tx.row(nil, []any{&at}, `
		SELECT n FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS r (id, code, n)
		WHERE NOT EXISTS (SELECT 1 FROM urls WHERE urls.id = r.id::bigint AND urls.short_code = r.code) ORDER BY n LIMIT 1`,
		chunk.columns[0], chunk.columns[2])
	if at == 0 || l.tx.err != nil {
		return l.tx.err
	}
	return &rowError{t.name, chunk.lines[at-1], "short_code", "the database has another link with this id or this code"}
}

// loadAll loads the files that open gives, all or nothing, and returns the rows of each.
func (s *Store) loadAll(tables []csvTable, open func(name string) (io.ReadCloser, error), progress func(string, int)) ([]int, error) {
	return inTx(context.Background(), s.back, func(tx *txn) (counts []int) {
		tx.exec(`SET LOCAL idle_in_transaction_session_timeout = '60s'`) // rows may come from a slow client
		l := loader{tx: tx, ids: map[string]idSet{}, progress: progress}
		for _, t := range tables {
			f, err := open(t.name + ".csv")
			if err == nil {
				defer f.Close()
				var n int
				n, err = l.load(t, f)
				counts = append(counts, n)
			}
			if err != nil {
				tx.err = err
				break
			}
		}
		return counts
	})
}

// loadUsers loads one users.csv, all of it or nothing, one file at a time. It may take as long as backTimeout per chunk.
func (s *Store) loadUsers(file io.Reader) (int, error) {
	if s.down.Load() {
		return 0, errUnavailable
	}
	if !s.bulk.enter() {
		return 0, errOverloaded
	}
	defer s.bulk.leave()
	open := func(string) (io.ReadCloser, error) { return io.NopCloser(file), nil }
	counts, err := s.loadAll(csvTables(targetRules{})[:1], open, func(string, int) {})
	if errors.As(err, new(*rowError)) || errors.As(err, new(*apiError)) {
		return 0, err
	} else if err != nil {
		return 0, s.classify(err)
	}
	return counts[0], nil
}

// seed loads the three files of dir, all or nothing, and prints what it did.
func (s *Store) seed(dir fs.FS, rules targetRules, out io.Writer) error {
	start := time.Now()
	open := func(name string) (io.ReadCloser, error) { return dir.Open(name) }
	counts, err := s.loadAll(csvTables(rules), open, func(file string, n int) {
		if n%100_000 == 0 {
			fmt.Fprintf(out, "%s.csv: %d rows, %v\n", file, n, time.Since(start).Round(time.Second))
		}
	})
	if err != nil {
		return fmt.Errorf("nothing loaded: %w", err)
	}
	if _, err := s.back.Exec(`ANALYZE`); err != nil { // a plan without statistics sorts the whole table for each page
		return err
	}
	fmt.Fprintf(out, "loaded %d users, %d urls, %d events in %v\n", counts[0], counts[1], counts[2], time.Since(start).Round(time.Millisecond))
	return nil
}

// export writes the three files to dir as of one moment.
func (s *Store) export(dir string) error {
	_, err := inTx(context.Background(), s.back, func(t *txn) (none struct{}) {
		t.exec(`SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY`)
		t.exec(`SET LOCAL statement_timeout = 0`) // a statement lasts as long as its rows are written
		t.err = errors.Join(t.err, os.MkdirAll(dir, 0o755))
		for _, table := range csvTables(targetRules{}) {
			if t.err == nil {
				t.err = exportTable(t.Tx, table, filepath.Join(dir, table.name+".csv"))
			}
		}
		return none
	})
	return err
}

// exportTable writes one file.
func exportTable(tx *sql.Tx, t csvTable, name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	w := csv.NewWriter(f)
	record, exprs, dest := make([]string, len(t.columns)), make([]string, len(t.columns)), make([]any, len(t.columns))
	for i, c := range t.columns {
		record[i], dest[i], exprs[i] = c.name, &record[i], c.export
		if c.export == "" {
			exprs[i] = fmt.Sprintf("COALESCE(%s::text, '')", c.name)
		}
	}
	rows, err := tx.Query(fmt.Sprintf(`SELECT %s FROM %s ORDER BY id`, strings.Join(exprs, ", "), t.name))
	if err != nil {
		return err
	}
	defer rows.Close()
	for w.Write(record); rows.Next(); w.Write(record) {
		if err := rows.Scan(dest...); err != nil {
			return err
		}
	}
	w.Flush()
	return errors.Join(rows.Err(), w.Error(), f.Close())
}
