package main

import (
	"bytes"
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"github.com/lib/pq"
)

// Loading CSV files: hop seed loads all of them in one transaction, POST /users/bulk one of them.
// A bad row stops the load, and nothing of it stays. What the files are is said in tables.go.

// seeds are the files that hop seed loads when it is given no directory.
//
//go:embed seeds/*.csv
var seeds embed.FS

// chunkRows go into one INSERT: enough to make the round trip cheap, few enough to keep memory
// flat.
const chunkRows = 5000

// loader reads files into one transaction.
type loader struct {
	tx       *sql.Tx
	taken    func(t csvTable, line int, id int64) error // told of each row that is another's
	progress func(file string, rows int)
}

// chunk is some rows of a file, all of them valid, as columns ready for unnest.
type chunk struct {
	columns []pq.StringArray // those of the file, then the derived ones
	lines   []int            // where each row begins
}

// load reads one file to its end and returns how many rows it has. Rows that are there already stay
// as they are. The next chunk is read while PostgreSQL inserts the one before.
func (l *loader) load(ctx context.Context, t csvTable, file io.Reader) (int, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	chunks := make(chan chunk, 1)
	read := make(chan error, 1)
	go func() {
		read <- t.parse(file, func(c chunk) error {
			select {
			case chunks <- c:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		close(chunks)
	}()
	count := 0
	for c := range chunks {
		err := l.insert(ctx, t, c)
		if err != nil {
			cancel()
			<-read
			return count, err
		}
		count += len(c.lines)
		l.progress(t.name, count)
	}
	err := <-read
	if err != nil {
		return count, err
	}
	return count, l.moveSequence(ctx, t)
}

// moveSequence lets new rows of a table go on from its largest id.
func (l *loader) moveSequence(ctx context.Context, t csvTable) error {
	if t.optional {
		return nil // its rows have no ids of their own
	}
	_, err := txExec(ctx, l.tx, fmt.Sprintf(`
		SELECT setval('%[1]s_id_seq', top)
		FROM %[1]s_id_seq, (SELECT max(id) AS top FROM %[1]s) AS t
		WHERE top > last_value OR top = last_value AND NOT is_called`, t.name))
	return err
}

// parse reads a file and gives emit its rows in chunks. It ends with the file, with the first error
// of emit, or with a *rowError.
func (t csvTable) parse(file io.Reader, emit func(chunk) error) error {
	r, err := newCSVReader(t.name+".csv", file, false)
	if err != nil {
		return err
	}
	if err := t.readHeader(r); err != nil {
		return err
	}
	for {
		c, err := t.readChunk(r)
		if err != nil && err != io.EOF {
			return err
		}
		if len(c.lines) > 0 {
			if err := emit(c); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
	}
}

// readHeader reads the first row, which must name the columns in their order.
func (t csvTable) readHeader(r *csvReader) error {
	header, err := r.read()
	if err != nil && err != io.EOF {
		return err
	}
	var names []string
	for _, c := range t.columns {
		names = append(names, c.name)
	}
	want := strings.Join(names, ",")
	if len(header) != len(names) || strings.Join(header, ",") != want {
		return &rowError{t.name + ".csv", 1, names[0], "the header must be " + want}
	}
	return nil
}

// readChunk reads and checks the next rows. Its error is io.EOF when they are the last.
func (t csvTable) readChunk(r *csvReader) (chunk, error) {
	c := chunk{columns: make([]pq.StringArray, len(t.columns)+len(t.derived))}
	for len(c.lines) < chunkRows {
		row, err := r.read()
		if err != nil {
			return c, err
		}
		for i, column := range t.columns {
			row[i], err = column.read(row[i])
			if err != nil {
				return c, &rowError{t.name + ".csv", r.line(), column.name, err.Error()}
			}
		}
		if t.derive != nil {
			row = append(row, t.derive(row)...)
		}
		for i, field := range row {
			c.columns[i] = append(c.columns[i], field)
		}
		c.lines = append(c.lines, r.line())
	}
	return c, nil
}

// read returns a field as it is to be stored, or what is wrong with it by itself or beside what the
// files had before it. "" is NULL in a nullable column.
func (c column) read(field string) (string, error) {
	if field == "" && c.nullable {
		return "", nil
	}
	value, err := c.check(field)
	if err != nil {
		return "", err
	}
	if c.unique != nil && !c.unique.add(value) {
		return "", fmt.Errorf("%s stands in an earlier row", value)
	}
	if c.refers != nil && !c.refers.has(value) {
		return "", fmt.Errorf("there is no row %s in %s", value, c.refers.file)
	}
	return value, nil
}

// withRows returns a statement in which ROWS stands for a chunk, given as the parameters from $1
// on.
func (t csvTable) withRows(statement string) string {
	var names, params, values []string
	add := func(name, value string) {
		names = append(names, name)
		params = append(params, fmt.Sprintf("$%d::text[]", len(names)))
		values = append(values, value+" AS "+name)
	}
	for _, c := range t.columns {
		value := c.name
		if c.nullable {
			value = fmt.Sprintf("NULLIF(%s, '')", c.name)
		}
		add(c.name, value+"::"+c.cast)
	}
	for _, name := range t.derived {
		add(name, name)
	}
	rows := fmt.Sprintf(`(SELECT %s, n FROM unnest(%s) WITH ORDINALITY AS field (%s, n)) AS row`,
		strings.Join(values, ", "), strings.Join(params, ", "), strings.Join(names, ", "))
	return strings.Replace(statement, "ROWS", rows, 1)
}

// args are the parameters for withRows.
func (c chunk) args() []any {
	args := make([]any, len(c.columns))
	for i, values := range c.columns {
		args[i] = values
	}
	return args
}

// insert adds the rows of a chunk that are not there yet, and tells of those whose place is taken.
func (l *loader) insert(ctx context.Context, t csvTable, c chunk) error {
	inserted, err := txExec(ctx, l.tx, t.withRows(t.insert), c.args()...)
	if err != nil {
		last := len(c.lines) - 1
		return fmt.Errorf("%s.csv lines %d-%d: %w", t.name, c.lines[0], c.lines[last], err)
	}
	if t.same == "" || inserted == int64(len(c.lines)) {
		return nil
	}
	type place struct{ number, id int64 }
	rows, err := l.tx.QueryContext(ctx, t.withRows(`
		SELECT n, id FROM ROWS WHERE NOT EXISTS (SELECT 1 FROM `+t.name+` WHERE `+t.same+`)
		ORDER BY n`), c.args()...)
	if err != nil {
		return err
	}
	strangers, err := collect(rows, func(p *place) []any { return []any{&p.number, &p.id} })
	if err != nil {
		return err
	}
	for _, p := range strangers {
		if err := l.taken(t, c.lines[p.number-1], p.id); err != nil {
			return err
		}
	}
	return nil
}

// refuseTaken ends a load at a row whose place is taken.
func refuseTaken(t csvTable, line int, _ int64) error {
	return &rowError{t.name + ".csv", line, t.taken.column, t.taken.reason}
}

// lockLoads waits until no other load is under way, in the whole database.
func lockLoads(ctx context.Context, tx *sql.Tx) error {
	return txLock(ctx, tx, loadLock)
}

// seed loads the files of dir, all or nothing, and prints to out how far it is and what it did. It
// can be run again: rows that are there stay as they are. A row whose id or code has become
// another's is an error.
func (s *Store) seed(ctx context.Context, dir fs.FS, out io.Writer) error {
	start := time.Now()
	counts := map[string]int{}
	progress := func(file string, rows int) {
		counts[file] = rows
		if rows%100_000 == 0 {
			took := time.Since(start).Round(time.Second)
			fmt.Fprintf(out, "%s.csv: %d rows, %v\n", file, rows, took)
		}
	}
	err := s.inLongTx(ctx, nil, func(tx *sql.Tx) error {
		if err := lockLoads(ctx, tx); err != nil {
			return err
		}
		l := loader{tx: tx, taken: refuseTaken, progress: progress}
		for _, t := range csvTables() {
			if err := l.loadFrom(ctx, dir, t); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("nothing loaded: %w", err)
	}
	if err := s.analyze(ctx); err != nil {
		return err
	}
	fmt.Fprintf(out, "loaded %d users, %d urls, %d events in %v\n", counts["users"],
		counts["urls"], counts["events"], time.Since(start).Round(time.Millisecond))
	return nil
}

// analyze brings the statistics of the tables up to date after a load: without them, plans sort a
// whole table for each page of it.
func (s *Store) analyze(ctx context.Context) error {
	_, err := s.pg.background.ExecContext(ctx, `ANALYZE users, urls, events, clicks_daily`)
	return err
}

// loadFrom loads a file of dir. An optional one may be missing.
func (l *loader) loadFrom(ctx context.Context, dir fs.FS, t csvTable) error {
	file, err := dir.Open(t.name + ".csv")
	if t.optional && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = l.load(ctx, t, file)
	return err
}

// ---- an upload of users ----

// maxConflicts is how many rows of an upload are named; the rest is counted.
const maxConflicts = 100

// bulkUsers is what became of an uploaded users.csv.
type bulkUsers struct {
	Imported  int           `json:"imported"` // rows of the file
	Count     int           `json:"count"`    // the same
	Conflicts []rowConflict `json:"conflicts,omitempty"`
	Unnamed   int           `json:"more_conflicts,omitempty"` // beyond maxConflicts
}

// rowConflict is a row that changed nothing, since another user has its id.
type rowConflict struct {
	Line int   `json:"line"`
	ID   int64 `json:"id"`
}

// loadUsers loads an uploaded users.csv, all of it or nothing. The whole file is read first, so
// that a slow sender keeps neither rows nor a connection; it is held in memory until the end, and
// the caller bounds it. Then it is checked, and only then written, one file at a time; a chunk may
// take as long as backgroundWithin. The error is a *rowError for a bad row, that of file when it
// cannot be read, or one of the store's.
func (s *Store) loadUsers(ctx context.Context, file io.Reader) (bulkUsers, error) {
	blocks, err := s.readBlocks(file)
	defer func() { s.uploads.leaveAll(int64(len(blocks))) }()
	if err != nil {
		return bulkUsers{}, err
	}
	if !s.bulkLoads.enter() {
		return bulkUsers{}, errOverloaded
	}
	defer s.bulkLoads.leave()
	checkOnly := func(chunk) error { return nil }
	err = usersTable(newIDSet("users.csv"), maxUploadedID).parse(blockReader(blocks), checkOnly)
	if err != nil {
		return bulkUsers{}, err
	}
	var result bulkUsers
	err = s.inLongTx(ctx, nil, func(tx *sql.Tx) error {
		if err := lockLoads(ctx, tx); err != nil {
			return err
		}
		result, err = uploadUsers(ctx, tx, blockReader(blocks))
		return err
	})
	if err != nil {
		return bulkUsers{}, s.pg.classify(err)
	}
	return result, nil
}

// uploadUsers loads users and notes each row that did not become what it says: an uploader is told
// of changes too, where seed only stops at strangers.
func uploadUsers(ctx context.Context, tx *sql.Tx, file io.Reader) (bulkUsers, error) {
	var result bulkUsers
	t := usersTable(newIDSet("users.csv"), maxUploadedID)
	t.same = `users.id = row.id AND users.username = row.username AND users.email = row.email
		AND users.created_at = row.created_at`
	l := loader{
		tx:       tx,
		progress: func(string, int) {},
		taken: func(_ csvTable, line int, id int64) error {
			if len(result.Conflicts) < maxConflicts {
				result.Conflicts = append(result.Conflicts, rowConflict{line, id})
			} else {
				result.Unnamed++
			}
			return nil
		},
	}
	count, err := l.load(ctx, t, file)
	result.Imported = count
	result.Count = count
	return result, err
}

// readBlocks reads a file to its end, into blocks that need no copying as it grows. Each returned
// block has a place in uploads, also with an error: the caller gives them back.
func (s *Store) readBlocks(file io.Reader) ([][]byte, error) {
	var blocks [][]byte
	for {
		if !s.uploads.enter() {
			return blocks, errOverloaded
		}
		block := make([]byte, 0, uploadBlock)
		blocks = append(blocks, nil)
		for len(block) < uploadBlock {
			n, err := file.Read(block[len(block):uploadBlock])
			block = block[:len(block)+n]
			blocks[len(blocks)-1] = block
			if err == io.EOF {
				return blocks, nil
			}
			if err != nil {
				return blocks, err
			}
		}
	}
}

// blockReader reads blocks again.
func blockReader(blocks [][]byte) io.Reader {
	readers := make([]io.Reader, len(blocks))
	for i, block := range blocks {
		readers[i] = bytes.NewReader(block)
	}
	return io.MultiReader(readers...)
}
