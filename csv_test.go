package main

import (
	"io"
	"runtime"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/lib/pq"
)

// TestCSVBounds reads fields and rows that never end: they are refused early, in little memory, and
// little of them is repeated.
func TestCSVBounds(t *testing.T) {
	const tooLong = "line 2, column 1: the row is longer than 262144 bytes"
	tests := []struct{ name, start, again, want string }{
		{"a field", "a,b\n1,", "x", tooLong},
		{"a field of lines", "a,b\n1,\"", "x\n", tooLong},
		{"fields", "a,b\n1", ",x", tooLong},
		{"a name in the header", "\n", "x", tooLong},
		{"a row after a bad one", "a,b\n1,a\"b\n", "x",
			"line 2, column 4: bare \" in non-quoted-field"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			file := io.MultiReader(strings.NewReader(tt.start),
				&endless{text: tt.again, left: 60 << 20})
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			err := readAll(file)
			runtime.ReadMemStats(&after)
			if err == nil || !strings.HasPrefix(err.Error(), tt.want) || len(err.Error()) > 200 {
				t.Errorf("error %v, want %s", err, tt.want)
			}
			if used := after.TotalAlloc - before.TotalAlloc; used > 24<<20 {
				t.Errorf("%d KiB allocated", used>>10)
			}
		})
	}
}

// readAll reads all rows of a file.
func readAll(file io.Reader) error {
	r, err := newCSVReader("", file, false)
	for err == nil {
		_, err = r.read()
	}
	if err == io.EOF {
		return nil
	}
	return err
}

// endless is a reader of a text again and again.
type endless struct {
	text string
	at   int // where in text the next byte is
	left int // bytes
}

// Read gives the text as often as it fits.
func (e *endless) Read(p []byte) (int, error) {
	if e.left <= 0 {
		return 0, io.EOF
	}
	for i := range p {
		p[i] = e.text[e.at]
		e.at = (e.at + 1) % len(e.text)
	}
	e.left -= len(p)
	return len(p), nil
}

// TestSeparator finds out how fields are separated.
func TestSeparator(t *testing.T) {
	for header, want := range map[string]rune{
		"":                          ',',
		"id":                        ',',
		"id,name":                   ',',
		"id;name":                   ';',
		"id\tname":                  '\t',
		"\n\r\nid;name\na,b,c,d":    ';',
		`"a,b,c";d`:                 ';',
		"a;b,c;d":                   ';',
		`"id,name,email";"x";"y,z"`: ';',
	} {
		if got := separatorOf(header); got != want {
			t.Errorf("%q is separated by %q, want %q", header, got, want)
		}
	}
}

// FuzzCSV: whatever the file, the reader says what is wrong in one line, or gives whole rows that
// PostgreSQL takes.
func FuzzCSV(f *testing.F) {
	tables := csvTables()
	for kind, rows := range [][]string{
		{
			"", "1,a,a@example.com,2025-01-01 10:00:00\n",
			"1,\"a\nb\",a@example.com,2025-01-01 10:00:00\r\n", "1,\"a", "1,a\"b,c,d\n",
			"\n\n1,,,\n", "9223372036854775807,a,a@b.c,0000-01-01 10:00:00\n",
			"1,\xff,\x00@a.b,x\n",
		},
		{
			"1,,abcdef,https://example.com/,,True,2025-01-01 10:00:00,2025-01-01 10:00:00\n",
			"1,1,abcdef,https://example.com/,t,False,2025-01-01 10:00:00,2025-01-01 10:00:00\n",
		},
		{
			"1,1,,created,2025-01-01 10:00:00,\"{\"\"a\"\":1}\"\n",
			"1,1,1,click,2025-01-01 10:00:00,{}\n", "1,1,,x,2025-01-01 10:00:00,[]\n",
		},
		{"abcdef,,2025-01-01 10:00:00,1,\n"},
		{"abcdef,2025-01-01,news.example,1,0\n"},
	} {
		var names []string
		for _, c := range tables[kind].columns {
			names = append(names, c.name)
		}
		for _, row := range rows {
			f.Add(uint8(kind), strings.Join(names, ",")+"\n"+row)
			f.Add(uint8(kind), "\ufeff"+strings.Join(names, ";")+"\n"+row)
		}
	}
	f.Fuzz(func(t *testing.T, kind uint8, file string) {
		tables := csvTables()
		table := tables[int(kind)%len(tables)]
		for _, c := range table.columns {
			if c.refers != nil {
				c.refers.add("1")
				c.refers.add("abcdef")
			}
		}
		err := table.parse(strings.NewReader(file), func(c chunk) error {
			for i, values := range c.columns {
				checkColumn(t, i, values, len(c.lines))
			}
			return nil
		})
		if err == nil {
			return
		}
		text := err.Error()
		if strings.Contains(text, "\n") || !strings.HasPrefix(text, table.name+".csv line ") {
			t.Fatalf("%q", err)
		}
	})
}

// checkColumn fails unless a column has as many values as its file has rows, all of them texts that
// PostgreSQL takes.
func checkColumn(t *testing.T, number int, values pq.StringArray, rows int) {
	t.Helper()
	if len(values) != rows {
		t.Fatalf("%d values in column %d of %d rows", len(values), number, rows)
	}
	for _, v := range values {
		if !utf8.ValidString(v) || strings.ContainsRune(v, 0) {
			t.Fatalf("accepted %q in column %d", v, number)
		}
	}
}
