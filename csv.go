package main

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// How hop reads CSV files, whoever wrote them: people, spreadsheets or programs. What the columns
// mean is said by tables.go and import.go.

// Bounds of what is held of a file at a time. Without them one open quote makes all that follows
// one field.
const (
	maxCSVField = 64 << 10  // bytes; four times the largest body that the API takes for one event
	maxCSVRow   = 256 << 10 // bytes
)

// rowError is a row that cannot be taken: nothing of its file was loaded.
type rowError struct {
	file   string // "" where only one file can be meant
	line   int    // the first is 1
	column string // its name; its number where the row cannot be taken apart
	reason string
}

// Error says where the row is and what is wrong with it, in one line.
func (e *rowError) Error() string {
	text := fmt.Sprintf("line %d, column %s: %s", e.line, e.column, e.reason)
	if e.file != "" {
		text = e.file + " " + text
	}
	return text
}

// csvReader reads the rows of one file: fields separated by commas, semicolons or tabs, with or
// without a byte order mark, lines ended by LF or CRLF.
type csvReader struct {
	file  string // for errors; may be ""
	guard *rowGuard
	rows  *csv.Reader
}

// newCSVReader prepares the reading of a file and finds out how its fields are separated. The first
// row that is read is the header. All rows must be as long as the header, unless anyLength is set.
func newCSVReader(name string, file io.Reader, anyLength bool) (*csvReader, error) {
	const peeked = 4096 // bytes; enough for any header
	guard := &rowGuard{file: file, name: name, line: 1, start: 1}
	buffered := bufio.NewReaderSize(guard, 64<<10)
	head, err := buffered.Peek(peeked)
	if err != nil && err != io.EOF {
		return nil, err
	}
	if bytes.HasPrefix(head, []byte("\xff\xfe")) || bytes.HasPrefix(head, []byte("\xfe\xff")) {
		return nil, &rowError{name, 1, "1", "the file is UTF-16: save it as CSV in UTF-8"}
	}
	if mark := []byte("\ufeff"); bytes.HasPrefix(head, mark) {
		buffered.Discard(len(mark))
		head = head[len(mark):]
	}
	rows := csv.NewReader(buffered)
	rows.Comma = separatorOf(string(head))
	rows.ReuseRecord = true
	if anyLength {
		rows.FieldsPerRecord = -1
	}
	return &csvReader{name, guard, rows}, nil
}

// separatorOf returns what separates the names of a header: a comma, a semicolon or a tab,
// whichever is the most frequent outside quotes. Without any it is the comma.
func separatorOf(head string) rune {
	header, _, _ := strings.Cut(strings.TrimLeft(head, "\r\n"), "\n")
	separator := ','
	found := map[rune]int{}
	quoted := false
	for _, c := range header {
		switch c {
		case '"':
			quoted = !quoted
		case ',', ';', '\t':
			if quoted {
				continue
			}
			found[c]++
			if found[c] > found[separator] {
				separator = c
			}
		}
	}
	return separator
}

// read returns the next row, which is valid until the next call. The error is io.EOF at the end of
// the file, a *rowError for a bad row, or that of the file itself.
func (r *csvReader) read() ([]string, error) {
	row, err := r.rows.Read()
	if r.guard.err != nil {
		return nil, r.guard.err
	}
	if err != nil {
		bad, ok := errors.AsType[*csv.ParseError](err)
		if !ok {
			return nil, err
		}
		return nil, &rowError{r.file, bad.Line, strconv.Itoa(bad.Column), bad.Err.Error()}
	}
	for i, field := range row {
		if len(field) > maxCSVField {
			reason := fmt.Sprintf("must be at most %d bytes", maxCSVField)
			return nil, &rowError{r.file, r.line(), strconv.Itoa(i + 1), reason}
		}
	}
	return row, nil
}

// line is where the row that was read last begins.
func (r *csvReader) line() int {
	line, _ := r.rows.FieldPos(0)
	return line
}

// rowGuard passes a file on until a row of it is longer than maxCSVRow: encoding/csv would hold a
// field of any length.
type rowGuard struct {
	file   io.Reader
	name   string
	line   int   // where it reads
	start  int   // the line in which the row begins
	length int   // bytes of the row so far
	quoted bool  // inside quotes a line break does not end a row; a doubled quote is out and in
	err    error // why it stopped, unless that is the end of the file
}

// Read passes on what the file gives.
func (g *rowGuard) Read(p []byte) (int, error) {
	if g.err != nil {
		return 0, g.err
	}
	n, err := g.file.Read(p)
	if err != nil && err != io.EOF {
		g.err = err
	}
	for _, c := range p[:n] {
		g.length++
		switch c {
		case '"':
			g.quoted = !g.quoted
		case '\n':
			g.line++
			if !g.quoted {
				g.length = 0
				g.start = g.line
			}
		}
		if g.length > maxCSVRow {
			reason := fmt.Sprintf("the row is longer than %d bytes: is a quote left open?",
				maxCSVRow)
			g.err = &rowError{g.name, g.start, "1", reason}
			return 0, g.err
		}
	}
	return n, err
}
