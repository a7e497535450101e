package main

import (
	"context"
	"database/sql"
	"embed"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
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

// column is one column of a file and of its table. cast is its SQL type; from is what an export selects, if not just the name.
type column struct {
	name, cast string
	check      func(string) error
	nullable   bool // an empty field is NULL
	from       string
}

// csvTable is one of the files. refs are the columns that must name a row of another file.
type csvTable struct {
	name    string
	columns []column
	refs    map[string]string
}

// csvTables are the three files in the order that foreign keys need.
func csvTables(rules targetRules) []csvTable {
	id := column{name: "id", cast: "bigint", check: checkID}
	at := func(name string) column { return column{name: name, cast: "timestamp", check: checkCSVTime} }
	ref := func(name string, nullable bool) column {
		return column{name: name, cast: "bigint", check: checkID, nullable: nullable}
	}
	return []csvTable{
		{"users", []column{id, {name: "username", cast: "text", check: checkName}, {name: "email", cast: "text", check: checkEmail}, at("created_at")}, nil},
		{"urls", []column{id, ref("user_id", true), {name: "short_code", cast: "text", check: checkCode},
			{name: "original_url", cast: "text", check: rules.check}, {name: "title", cast: "text", check: checkTitle, nullable: true},
			{name: "is_active", cast: "boolean", check: checkCSVBool, // a deleted link must not come back to life
				from: `CASE WHEN is_active AND deleted_at IS NULL THEN 'True' ELSE 'False' END`},
			at("created_at"), at("updated_at")}, map[string]string{"user_id": "users"}},
		{"events", []column{id, ref("url_id", false), ref("user_id", true), {name: "event_type", cast: "text", check: checkName},
			at("timestamp"), {name: "details", cast: "json", check: checkDetails}}, map[string]string{"url_id": "urls", "user_id": "users"}},
	}
}

func checkID(s string) error {
	if n, err := strconv.ParseInt(s, 10, 64); err != nil || n < 1 || strconv.FormatInt(n, 10) != s {
		return fmt.Errorf("must be a positive integer, not %q", s)
	}
	return nil
}

func checkCSVTime(s string) error {
	if t, err := time.Parse(csvTime, s); err != nil || t.Format(csvTime) != s {
		return fmt.Errorf("must be a time like 2026-01-31 12:00:00, not %q", s)
	}
	return nil
}

func checkCSVBool(s string) error {
	if s != "True" && s != "False" {
		return fmt.Errorf("must be True or False, not %q", s)
	}
	return nil
}

func checkTitle(s string) error {
	if strings.TrimSpace(s) != s {
		return errors.New("must not be padded with spaces")
	}
	return checkText(s)
}

func checkDetails(s string) error {
	if !strings.HasPrefix(s, "{") {
		return errors.New("must be a JSON object")
	}
	return checkJSON([]byte(s))
}

// rowError is a bad row: nothing was loaded.
type rowError struct {
	file           string
	line           int
	column, reason string
}

func (e *rowError) Error() string {
	where := fmt.Sprintf("%s.csv line %d", e.file, e.line)
	if e.column != "" {
		where += ", column " + e.column
	}
	return where + ": " + e.reason
}

// idSet is a set of ids: one bit each where they are dense, as ids are.
type idSet map[int64]uint64

// add is false if id was there.
func (s idSet) add(id int64) bool {
	was := s.has(id)
	s[id>>6] |= 1 << (id & 63)
	return !was
}

func (s idSet) has(id int64) bool { return s[id>>6]>>(id&63)&1 == 1 }

// loader reads files into one transaction.
type loader struct {
	tx       *sql.Tx
	ids      map[string]idSet // by file, of those read before
	progress func(file string, rows int)
}

// rows are some parsed rows of a file as columns, ready for unnest, and the line each came from.
type rows struct {
	columns []pq.StringArray
	lines   []int
}

// load reads one file to its end and returns how many rows it has. Rows whose id is there already are left as they are.
func (l *loader) load(t csvTable, file io.Reader) (n int, err error) {
	chunks, fail, quit := make(chan rows, 1), make(chan error, 1), make(chan struct{})
	go func() { fail <- l.parse(t, file, chunks, quit); close(chunks) }() // the next chunk is parsed while PostgreSQL inserts this one
	defer func() {
		close(quit)
		for range chunks {
		}
	}()
	for chunk := range chunks {
		if err := l.insert(t, chunk); err != nil {
			return n, err
		}
		n += len(chunk.lines)
		l.progress(t.name, n)
	}
	if err := <-fail; err != nil {
		return n, err
	}
	_, err = l.tx.Exec(fmt.Sprintf(`
		SELECT setval('%[1]s_id_seq', top) FROM (SELECT max(id) AS top FROM %[1]s) AS t
		WHERE top >= (SELECT last_value FROM %[1]s_id_seq)`, t.name))
	return n, err
}

// parse sends the rows of a file in chunks, all of them valid, or returns the first rowError.
func (l *loader) parse(t csvTable, file io.Reader, chunks chan<- rows, quit <-chan struct{}) error {
	r := csv.NewReader(file)
	r.ReuseRecord = true
	bad := func(line int, column, reason string) error { return &rowError{t.name, line, column, reason} }
	header, err := r.Read()
	if err != nil && err != io.EOF {
		return l.readError(t, err)
	}
	var want []string
	for _, c := range t.columns {
		want = append(want, c.name)
	}
	if got := strings.TrimPrefix(strings.Join(header, ","), "\ufeff"); got != strings.Join(want, ",") { // Excel writes the BOM
		return bad(1, "", fmt.Sprintf("the header must be %s", strings.Join(want, ",")))
	}
	ids, codes := idSet{}, map[string]bool{}
	l.ids[t.name] = ids
	for end := false; !end; {
		chunk := rows{columns: make([]pq.StringArray, len(want))}
		for len(chunk.lines) < chunkRows {
			record, err := r.Read()
			if end = err == io.EOF; end {
				break
			}
			if err != nil {
				return l.readError(t, err)
			}
			line, _ := r.FieldPos(0)
			for i, c := range t.columns {
				v := record[i]
				if err := c.check(v); err != nil && !(v == "" && c.nullable) {
					return bad(line, c.name, err.Error())
				}
				if other, ok := t.refs[c.name]; ok && v != "" {
					if id, _ := strconv.ParseInt(v, 10, 64); !l.ids[other].has(id) {
						return bad(line, c.name, fmt.Sprintf("there is no row %s in %s.csv", v, other))
					}
				}
				if c.name == "short_code" && codes[v] {
					return bad(line, c.name, fmt.Sprintf("%q stands in an earlier row", v))
				} else if c.name == "short_code" {
					codes[strings.Clone(v)] = true
				}
				chunk.columns[i] = append(chunk.columns[i], strings.Clone(v)) // the reader's buffer holds the whole row
			}
			if id, _ := strconv.ParseInt(record[0], 10, 64); !ids.add(id) {
				return bad(line, "id", "stands in an earlier row")
			}
			chunk.lines = append(chunk.lines, line)
		}
		select {
		case chunks <- chunk:
		case <-quit:
			return nil
		}
	}
	return nil
}

// readError turns what encoding/csv says into a rowError; a failed read stays what it is.
func (l *loader) readError(t csvTable, err error) error {
	if parse := (*csv.ParseError)(nil); errors.As(err, &parse) {
		return &rowError{t.name, parse.Line, "", parse.Err.Error()}
	}
	return err
}

// insert adds the rows of a chunk that are not there yet. A row that is neither new nor the one that is there is refused.
func (l *loader) insert(t csvTable, chunk rows) error {
	if len(chunk.lines) == 0 {
		return nil
	}
	var names, values, params []string
	var args []any
	for i, c := range t.columns {
		names = append(names, c.name)
		values = append(values, fmt.Sprintf("NULLIF(%s, '')::%s", c.name, c.cast))
		params = append(params, fmt.Sprintf("$%d::text[]", i+1))
		args = append(args, chunk.columns[i])
	}
	from := fmt.Sprintf("unnest(%s) AS r (%s)", strings.Join(params, ", "), strings.Join(names, ", "))
	result, err := l.tx.Exec(fmt.Sprintf(`INSERT INTO %s (%s) SELECT %s FROM %s ON CONFLICT DO NOTHING`,
		t.name, strings.Join(names, ", "), strings.Join(values, ", "), from), args...)
	if err != nil {
		return fmt.Errorf("%s.csv lines %d-%d: %w", t.name, chunk.lines[0], chunk.lines[len(chunk.lines)-1], err)
	}
	if n, _ := result.RowsAffected(); t.name != "urls" || n == int64(len(chunk.lines)) {
		return nil
	}
	var at int
	err = l.tx.QueryRow(`
		SELECT n FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS r (id, code, n)
		WHERE NOT EXISTS (SELECT 1 FROM urls WHERE urls.id = r.id::bigint AND urls.short_code = r.code) ORDER BY n LIMIT 1`,
		chunk.columns[0], chunk.columns[2]).Scan(&at)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err != nil {
		return err
	}
	return &rowError{t.name, chunk.lines[at-1], "short_code", "the database has another link with this id or this code"}
}

// loadUsers loads one users.csv, all of it or nothing, one file at a time.
func (s *Store) loadUsers(file io.Reader) (int, error) {
	if s.down.Load() {
		return 0, errUnavailable
	}
	if !s.bulk.enter() {
		return 0, errOverloaded
	}
	defer s.bulk.leave()
	n, err := inTx(context.Background(), s.back, func(tx *sql.Tx) (int, error) {
		l := loader{tx: tx, ids: map[string]idSet{}, progress: func(string, int) {}}
		return l.load(csvTables(targetRules{})[0], file)
	})
	if bad := (*rowError)(nil); errors.As(err, &bad) || errors.As(err, new(*http.MaxBytesError)) {
		return 0, err
	}
	return n, s.classify(err)
}

// seed loads the three files of dir, all or nothing, and prints what it did. Rows that are there already stay as they are.
func (s *Store) seed(dir fs.FS, rules targetRules, out io.Writer) error {
	start := time.Now()
	counts, err := inTx(context.Background(), s.back, func(tx *sql.Tx) (counts []string, err error) {
		l := loader{tx: tx, ids: map[string]idSet{}, progress: func(file string, n int) {
			if n%100_000 == 0 {
				fmt.Fprintf(out, "%s.csv: %d rows, %v\n", file, n, time.Since(start).Round(time.Second))
			}
		}}
		for _, t := range csvTables(rules) {
			f, err := dir.Open(t.name + ".csv")
			if err != nil {
				return nil, err
			}
			n, err := l.load(t, f)
			f.Close()
			if err != nil {
				return nil, err
			}
			counts = append(counts, fmt.Sprintf("%d %s", n, t.name))
		}
		return counts, nil
	})
	if err != nil {
		return fmt.Errorf("nothing loaded: %w", err)
	}
	fmt.Fprintf(out, "loaded %s in %v\n", strings.Join(counts, ", "), time.Since(start).Round(time.Millisecond))
	return nil
}

// export writes the three files to dir as of one moment.
func (s *Store) export(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	_, err := inTx(context.Background(), s.back, func(tx *sql.Tx) (none struct{}, err error) {
		if _, err := tx.Exec(`SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY`); err != nil {
			return none, err
		}
		if _, err := tx.Exec(`SET LOCAL statement_timeout = 0`); err != nil { // a statement lasts as long as its rows are written
			return none, err
		}
		for _, t := range csvTables(targetRules{}) {
			if err := exportTable(tx, t, filepath.Join(dir, t.name+".csv")); err != nil {
				return none, err
			}
		}
		return none, nil
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
		record[i], dest[i], exprs[i] = c.name, &record[i], c.from
		if c.from == "" {
			exprs[i] = fmt.Sprintf("COALESCE(%s::text, '')", c.name)
		}
	}
	w.Write(record)
	rows, err := tx.Query(fmt.Sprintf(`SELECT %s FROM %s ORDER BY id`, strings.Join(exprs, ", "), t.name))
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := rows.Scan(dest...); err != nil {
			return err
		}
		w.Write(record)
	}
	w.Flush()
	return errors.Join(rows.Err(), w.Error(), f.Close())
}
