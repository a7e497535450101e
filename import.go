package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"
)

// Links that come from other services: hop import reads the CSV files of Bitly, YOURLS, Kutt,
// Shlink and plain sheets.

// importField is something that a file may say of a link.
type importField int

const (
	importCode importField = iota
	importTarget
	importTitle
	importClicks
	importCreated
	importExpires
	importFields // how many there are
)

// importNames are what people call the fields, and the names that columns have for them, in small
// letters and without blanks and punctuation. Of several columns for one field the first in this
// order is read.
var importNames = [importFields]struct {
	called string
	names  []string
}{
	importCode: {"code", []string{
		"shortcode", "code", "slug", "keyword", "address", "alias", "customcode", "backhalf",
		"custombackhalf", "shorturl", "shortlink", "bitlink", "short", "link", // "link" is Bitly's
	}},
	importTarget: {"target", []string{
		"longurl", "originalurl", "target", "targeturl", "destination", "destinationurl",
		"longlink", "url",
	}},
	importTitle: {"title", []string{"title", "name", "description"}},
	importClicks: {"clicks", []string{
		"clicks", "clickcount", "totalclicks", "visits", "visitcount", "visitscount",
		"engagements", "totalengagements", "hits",
	}},
	importCreated: {"time of creation", []string{
		"created", "createdat", "datecreated", "creationdate", "createddate", "timestamp", "date",
	}},
	importExpires: {"end", []string{
		"expires", "expiresat", "expirein", "expiry", "expirationdate", "expiredate", "validuntil",
		"expirationtime",
	}},
}

// importTimes are the ways to write a time that parseTime does not read, as other services write
// it.
var importTimes = []string{
	"2006-01-02",
	"2006-01-02 15:04",
	"2006-01-02T15:04:05-0700",
	"2006-01-02 15:04:05 -0700 MST",
}

const (
	// maxImportLines is how many lines of an import are named; all are counted.
	maxImportLines = 50

	// maxImportFile bounds what an import holds in memory: some three million links.
	maxImportFile = 1 << 30
)

// importRow is one link of a file.
type importRow struct {
	line    int
	code    string
	target  string
	title   string
	clicks  int64
	created string // as csvTime; "" is now
	expires string // as csvTime; "" is never
}

// importReport counts what an import finds and names the lines that it does not take.
type importReport struct {
	out     io.Writer
	fresh   int // links that are not there yet
	same    int // links that are there, with the same target
	taken   int // codes that have another target
	refused int
	named   int
}

// say names a line, if not too many were named before.
func (r *importReport) say(line int, what, reason string) {
	r.named++
	if r.named <= maxImportLines {
		fmt.Fprintf(r.out, "line %d: %s: %s\n", line, what, reason)
	}
	if r.named == maxImportLines+1 {
		fmt.Fprintln(r.out, "… and more")
	}
}

// refuse counts and names a row that can be no link.
func (r *importReport) refuse(line int, reason string) {
	r.refused++
	r.say(line, "refused", reason)
}

// importLinks reads a CSV file of links and prints to out what importing them would do: which are
// new, the same as here, taken by another target, or refused. With apply it then does it, all or
// nothing: one row that is taken or refused is an error, and nothing is imported. It can be run
// again. Clicks become counts, without events; they are put on the day of the import.
func (s *Store) importLinks(ctx context.Context, file io.Reader, rules targetRules, apply bool,
	out io.Writer) error {

	report := &importReport{out: out}
	limited := &io.LimitedReader{R: file, N: maxImportFile + 1}
	rows, err := readImport(limited, rules, report)
	if limited.N == 0 { // and where it was cut off is no fault of the file
		err = fmt.Errorf("the file is larger than %d bytes: split it", maxImportFile)
	}
	if err != nil {
		return err
	}
	err = s.inLongTx(ctx, nil, func(tx *sql.Tx) error {
		if err := lockLoads(ctx, tx); err != nil {
			return err
		}
		fresh, err := compareImport(ctx, tx, rows, report)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "new %d, same %d, taken %d, refused %d\n", report.fresh, report.same,
			report.taken, report.refused)
		if !apply {
			fmt.Fprintln(out, "nothing was changed: --apply imports them")
			return nil
		}
		if report.taken+report.refused > 0 {
			return errors.New("nothing imported: some rows are taken or refused")
		}
		return insertImport(ctx, tx, fresh)
	})
	if err != nil || !apply {
		return err
	}
	fmt.Fprintf(out, "imported %d links\n", report.fresh)
	return s.analyze(ctx)
}

// ---- reading ----

// readImport reads the file. Rows that can be no link are refused in the report; the error is that
// of a file that cannot be read at all.
func readImport(file io.Reader, rules targetRules, report *importReport) ([]importRow, error) {
	r, err := newCSVReader("", file, true)
	if err != nil {
		return nil, err
	}
	header, err := r.read()
	if err != nil && err != io.EOF {
		return nil, err
	}
	columns, err := findColumns(header, report.out)
	if err != nil {
		return nil, err
	}
	first := map[string]importRow{}
	var rows []importRow
	for {
		fields, err := r.read()
		if err == io.EOF {
			return rows, nil
		}
		if err != nil {
			return nil, err
		}
		row, err := columns.readRow(fields, rules)
		row.line = r.line()
		before, again := first[row.code]
		switch {
		case err != nil:
			report.refuse(row.line, err.Error())
		case !again:
			first[row.code] = row
			rows = append(rows, row)
		case before.target == row.target:
			report.same++
		default:
			report.refuse(row.line, fmt.Sprintf("line %d has the code %s for another target",
				before.line, row.code))
		}
	}
}

// importColumns are the columns that are read: for each field the index of its column, or -1, and
// that column's name.
type importColumns struct {
	width int // how many columns the header has
	index [importFields]int
	names [importFields]string
}

// findColumns finds out what the columns of a file are, and prints which it reads and which not.
func findColumns(header []string, out io.Writer) (importColumns, error) {
	columns := importColumns{width: len(header)}
	used := make([]bool, len(header))
	var read, unread []string
	for field, known := range importNames {
		columns.index[field] = findColumn(header, known.names)
		i := columns.index[field]
		if i >= 0 {
			columns.names[field] = strings.TrimSpace(header[i])
			used[i] = true
			read = append(read, fmt.Sprintf("%s is the %s", excerpt(header[i]), known.called))
		}
	}
	for i, name := range header {
		if !used[i] {
			unread = append(unread, excerpt(name))
		}
	}
	for _, field := range []importField{importCode, importTarget} {
		if columns.index[field] < 0 {
			known := importNames[field]
			reason := fmt.Sprintf("the header must name the %s: one of %s", known.called,
				strings.Join(known.names, ", "))
			return columns, &rowError{"", 1, "1", reason}
		}
	}
	fmt.Fprintln(out, strings.Join(read, ", "))
	if len(unread) > 0 {
		fmt.Fprintln(out, "not read:", strings.Join(unread[:min(len(unread), 20)], ", "))
	}
	return columns, nil
}

// findColumn returns which column has the first of names that the header knows, or -1.
func findColumn(header, names []string) int {
	for _, name := range names {
		for i, title := range header {
			if plainName(title) == name {
				return i
			}
		}
	}
	return -1
}

// plainName is a column's name in small letters, without all that is no letter.
func plainName(title string) string {
	return strings.Map(func(r rune) rune {
		if r < 'a' || r > 'z' {
			return -1
		}
		return r
	}, strings.ToLower(title))
}

// field returns a field without blanks at its ends, or "" if its column is not there or databases
// wrote that it has no value.
func (c importColumns) field(fields []string, which importField) string {
	if c.index[which] < 0 {
		return ""
	}
	field := strings.TrimSpace(fields[c.index[which]])
	if strings.EqualFold(field, "null") || field == `\N` {
		return ""
	}
	return field
}

// readRow reads a link, or says in which column it can be none.
func (c importColumns) readRow(fields []string, rules targetRules) (importRow, error) {
	var row importRow
	if len(fields) != c.width {
		return row, fmt.Errorf("has %d fields, the header %d", len(fields), c.width)
	}
	readers := [importFields]func(string) error{
		importCode: func(s string) error {
			row.code = codeOf(s)
			return checkCode(row.code)
		},
		importTarget: func(s string) error {
			var err error
			row.target, err = rules.check(s)
			return err
		},
		importTitle: func(s string) error {
			row.title = strings.Join(strings.Fields(s), " ") // as browsers show it
			return checkText(row.title)
		},
		importClicks: func(s string) error {
			var err error
			row.clicks, err = readClicks(s)
			return err
		},
		importCreated: func(s string) error {
			var err error
			row.created, err = readImportTime(s)
			return err
		},
		importExpires: func(s string) error {
			var err error
			row.expires, err = readImportTime(s)
			return err
		},
	}
	for which, read := range readers {
		if err := read(c.field(fields, importField(which))); err != nil {
			return row, fmt.Errorf("%s: %w", excerpt(c.names[which]), err)
		}
	}
	return row, nil
}

// codeOf returns the code of a short link, which is the last part of its path, or of a code alone.
func codeOf(s string) string {
	if end := strings.IndexAny(s, "?#"); end >= 0 {
		s = s[:end]
	}
	s = strings.TrimRight(s, "/")
	return s[strings.LastIndexByte(s, '/')+1:]
}

// readClicks reads a number of clicks. None is 0.
func readClicks(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > maxID {
		return 0, fmt.Errorf("must be a number of clicks, not %s", excerpt(s))
	}
	return n, nil
}

// readImportTime reads a time as other services write it and returns it as csvTime, or "" for none.
func readImportTime(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	t, err := parseTime(s)
	if err == nil {
		return t.Format(csvTime), nil
	}
	for _, form := range importTimes {
		t, err := time.Parse(form, s)
		t = t.UTC()
		if err == nil && t.Year() > 0 && t.Year() <= 9999 {
			return t.Format(csvTime), nil
		}
	}
	return "", fmt.Errorf("%w, not %s", err, excerpt(s))
}

// ---- comparing and inserting ----

// knownLink is a link that is there already.
type knownLink struct {
	code    string
	target  string
	deleted bool
}

// compareImport holds rows to the links that are there, counts and names what it finds, and returns
// the new ones.
func compareImport(ctx context.Context, tx *sql.Tx, rows []importRow,
	report *importReport) ([]importRow, error) {

	var fresh []importRow
	for part := range slices.Chunk(rows, chunkRows) {
		known, err := knownLinks(ctx, tx, part)
		if err != nil {
			return nil, err
		}
		for _, row := range part {
			there, ok := known[row.code]
			switch {
			case !ok:
				report.fresh++
				fresh = append(fresh, row)
			case there.deleted:
				report.taken++
				report.say(row.line, "taken", row.code+" was a link that has been deleted")
			case there.target != row.target:
				report.taken++
				report.say(row.line, "taken", row.code+" leads to "+excerpt(there.target))
			default:
				report.same++
			}
		}
	}
	return fresh, nil
}

// knownLinks returns the links, deleted ones too, that have the codes of rows.
func knownLinks(ctx context.Context, tx *sql.Tx, rows []importRow) (map[string]knownLink, error) {
	codes := make(pq.StringArray, len(rows))
	for i, row := range rows {
		codes[i] = row.code
	}
	found, err := tx.QueryContext(ctx, `
		SELECT short_code, original_url, deleted_at IS NOT NULL FROM urls
		WHERE short_code = ANY($1)`, codes)
	if err != nil {
		return nil, err
	}
	links, err := collect(found, func(l *knownLink) []any {
		return []any{&l.code, &l.target, &l.deleted}
	})
	known := map[string]knownLink{}
	for _, l := range links {
		known[l.code] = l
	}
	return known, err
}

// insertImport makes the links. Their codes were chosen elsewhere, and somebody may have asked for
// one before: the rows are marked as changed, so that caches forget what they did not know.
func insertImport(ctx context.Context, tx *sql.Tx, rows []importRow) error {
	for part := range slices.Chunk(rows, chunkRows) {
		var codes, targets, titles, created, expires pq.StringArray
		var clicks pq.Int64Array
		for _, row := range part {
			codes = append(codes, row.code)
			targets = append(targets, row.target)
			titles = append(titles, row.title)
			created = append(created, row.created)
			expires = append(expires, row.expires)
			clicks = append(clicks, row.clicks)
		}
		var made int
		err := txQueryOne(ctx, tx, errNotFound, []any{&made}, `
			WITH row AS (
			    SELECT *, COALESCE(NULLIF(created, '')::timestamp, `+utcNow+`) AS at
			    FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[],
			                $6::bigint[])
			         AS field (code, target, title, created, expires, clicks)
			), made AS (
			    INSERT INTO urls (short_code, original_url, title, created_at, updated_at,
			                      expires_at, click_count, changed)
			    SELECT code, target, NULLIF(title, ''), at, at, NULLIF(expires, '')::timestamp,
			           clicks, pg_current_xact_id()
			    FROM row ON CONFLICT DO NOTHING RETURNING id, click_count
			), counted AS (
			    INSERT INTO clicks_daily (url_id, day, referrer, clicks, bots)
			    SELECT id, (`+utcNow+`)::date, '', click_count, 0 FROM made WHERE click_count > 0
			), noted AS (
			    INSERT INTO hop_meta (key, value)
			    SELECT DISTINCT '`+rowless+`' || (`+utcNow+`)::date, '' FROM made
			    WHERE click_count > 0 ON CONFLICT DO NOTHING
			)
			SELECT count(*) FROM made`, codes, targets, titles, created, expires, clicks)
		if err != nil {
			return err
		}
		if made < len(part) {
			return errors.New("nothing imported: a code was taken meanwhile; try again")
		}
	}
	return nil
}
