package main

import (
	"bytes"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"testing/iotest"
)

// TestSeed loads the built-in files, twice, and goes on: numbers, sequences, and the way back to
// the same bytes.
func TestSeed(t *testing.T) {
	a := startApp(t)
	builtIn, err := fs.Sub(seeds, "seeds")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		var out bytes.Buffer
		err := a.store.seed(t.Context(), builtIn, &out)
		want := "loaded 400 users, 2000 urls, 3422 events in "
		if err != nil || !strings.HasPrefix(out.String(), want) {
			t.Fatalf("seed: %v, and says %q", err, &out)
		}
		counts := map[string]int64{"users": 400, "urls": 2000, "events": 3422, "clicks_daily": 0}
		for table, want := range counts {
			if n := countRows(t, a.store, table); n != want {
				t.Errorf("%d rows in %s, want %d", n, table, want)
			}
		}
	}
	diffFiles(t, exportFiles(t, a.store), readFiles(t, builtIn))

	user := get[wireUser](t, a, 201, "POST", "/users", annJSON)
	link := addLink(t, a, "https://example.com/new", "new")
	events := get[[]wireEvent](t, a, 200, "GET", "/events?event_type=created&after=3000", "")
	if user.ID != 401 || link.ID != 2001 || len(events) != 1 || events[0].ID != 3423 {
		t.Errorf("new rows: user %d, link %d, events %+v", user.ID, link.ID, events)
	}
	get[wireUser](t, a, 200, "PUT", "/users/7", `{"username":"renamed"}`)
	if err := a.store.seed(t.Context(), builtIn, io.Discard); err != nil {
		t.Errorf("a third time: %v", err)
	}
	if link := addLink(t, a, "https://example.com/newer", "newer"); link.ID != 2002 {
		t.Errorf("after that a new link has id %d", link.ID)
	}
	if user := get[wireUser](t, a, 200, "GET", "/users/7", ""); user.Username != "renamed" {
		t.Errorf("seed undid a change: %+v", user)
	}
}

// TestSeedRealSet loads a real set and gives it back byte for byte.
func TestSeedRealSet(t *testing.T) {
	dir := os.DirFS(filepath.Join("..", "shared", "mlh"))
	if _, err := fs.Stat(dir, "urls.csv"); err != nil {
		t.Skip("SKIPPED: there is no real set beside the repository")
	}
	store, _ := fileStore(t)
	var out bytes.Buffer
	err := store.seed(t.Context(), dir, &out)
	want := "loaded 400 users, 2000 urls, 3422 events in "
	if err != nil || !strings.HasPrefix(out.String(), want) {
		t.Fatalf("seed: %v, and says %q", err, &out)
	}
	t.Log(strings.TrimSpace(out.String()))
	diffFiles(t, exportFiles(t, store), readFiles(t, dir))
}

// small are files that fit each other, for tests to spoil.
var small = map[string]string{
	"users.csv": `id,username,email,created_at
1,ada,ada@a.example,2025-01-01 00:00:00
2,bob,bob@a.example,2025-01-02 00:00:00
`,
	"urls.csv": `id,user_id,short_code,original_url,title,is_active,created_at,updated_at
1,1,aaaaaa,https://a.example/1,One,True,2025-01-01 00:00:00,2025-01-01 00:00:00
2,,bbbbbb,https://a.example/2,,False,2025-01-01 00:00:00,2025-01-01 00:00:00
`,
	"events.csv": `id,url_id,user_id,event_type,timestamp,details
1,1,1,created,2025-01-01 00:00:00,"{""short_code"":""aaaaaa""}"
2,2,,click,2025-01-01 00:00:00,{}
`,
	"links.csv": `short_code,expires_at,deleted_at,click_count,last_clicked_at
aaaaaa,2099-01-01 00:00:00,,3,2025-02-01 00:00:00
bbbbbb,,2025-03-01 00:00:00,0,
`,
	"clicks.csv": `short_code,day,referrer,clicks,bots
aaaaaa,2025-01-31,,1,0
aaaaaa,2025-02-01,news.example,2,7
`,
}

// smallFiles are those of small, each edited.
func smallFiles(edit func(text string) string) fstest.MapFS {
	files := fstest.MapFS{}
	for name, text := range small {
		files[name] = &fstest.MapFile{Data: []byte(edit(text))}
	}
	return files
}

// smallWith is small with one text replaced in one file.
func smallWith(t *testing.T, name, before, after string) fstest.MapFS {
	t.Helper()
	if !strings.Contains(small[name], before) {
		t.Fatalf("no %q in %s", before, name)
	}
	files := smallFiles(strings.Clone)
	files[name].Data = []byte(strings.Replace(small[name], before, after, 1))
	return files
}

// badRows are rows that no file may have. Each is made of small by one replacement.
var badRows = []struct{ name, file, before, after, want string }{
	{"day before month", "users.csv", "2025-01-02 00:00:00", "20-04-2025 09:26", `line 3, ` +
		`column created_at: must be a time like 2026-01-31 12:00:00, not "20-04-2025 09:26"`},
	{"a date that never was", "urls.csv", "2025-01-01", "2025-02-29",
		`line 2, column created_at: must be a time like`},
	{"an hour without its zero", "urls.csv", "00:00:00\n", "0:00:00\n",
		`line 2, column updated_at: must be a time like`},
	{"a fraction of a second", "events.csv", "00:00:00,{}", "00:00:00.5,{}",
		`line 3, column timestamp: must be a time like`},
	{"no date", "events.csv", "2025-01-01 00:00:00,{}", ",{}",
		`line 3, column timestamp: must be a time like 2026-01-31 12:00:00, not ""`},
	{"space before a date", "urls.csv", ",2025-01-01", ", 2025-01-01",
		`line 2, column created_at: must be a time like`},
	{"year 0", "urls.csv", "2025-01-01", "0000-01-01", `line 2, column created_at: must be a time`},
	{"space after a name", "users.csv", "bob,", "bob ,",
		`line 3, column username: must not begin or end with a blank`},
	{"space before an id", "users.csv", "\n2,", "\n 2,",
		`line 3, column id: must be an integer from 1 to`},
	{"space after a bool", "urls.csv", "True", "True ",
		`line 2, column is_active: must be True or False, not "True "`},
	{"bool in lower case", "urls.csv", "False", "false", `line 3, column is_active: must be True`},
	{"bool as a number", "urls.csv", "True", "1", `line 2, column is_active: must be True`},
	{"no bool", "urls.csv", "True", "", `line 2, column is_active: must be True or False, not ""`},
	{"id 0", "users.csv", "\n2,", "\n0,", `line 3, column id: must be an integer from 1 to`},
	{"id with a zero in front", "users.csv", "\n2,", "\n02,",
		`line 3, column id: must be an integer from 1 to`},
	{"id as a float", "urls.csv", "\n2,", "\n2.0,",
		`line 3, column id: must be an integer from 1 to`},
	{"id too large", "urls.csv", "\n2,", "\n9223372036854775807,",
		`line 3, column id: must be an integer from 1 to`},
	{"no id", "events.csv", "\n2,", "\n,", `line 3, column id: must be an integer from 1 to`},
	{"duplicate user", "users.csv", "\n2,", "\n1,",
		`line 3, column id: 1 stands in an earlier row`},
	{"duplicate link", "urls.csv", "\n2,", "\n1,",
		`line 3, column id: 1 stands in an earlier row`},
	{"duplicate event", "events.csv", "\n2,", "\n1,",
		`line 3, column id: 1 stands in an earlier row`},
	{"duplicate code", "urls.csv", "bbbbbb", "aaaaaa",
		`line 3, column short_code: aaaaaa stands in an earlier row`},
	{"link of nobody", "urls.csv", "1,1,aa", "1,3,aa",
		`line 2, column user_id: there is no row 3 in users.csv`},
	{"event of no link", "events.csv", "2,2,,", "2,3,,",
		`line 3, column url_id: there is no row 3 in urls.csv`},
	{"event without a link", "events.csv", "2,2,,", "2,,,",
		`line 3, column url_id: must be an integer from 1 to`},
	{"event by nobody", "events.csv", "2,2,,", "2,2,3,",
		`line 3, column user_id: there is no row 3 in users.csv`},
	{"reserved code", "urls.csv", "bbbbbb", "health",
		`line 3, column short_code: is reserved for the service itself`},
	{"code with a slash", "urls.csv", "bbbbbb", "bbb/bb",
		`line 3, column short_code: must be 3 to 32 letters`},
	{"no code", "urls.csv", "bbbbbb", "", `line 3, column short_code: must be 3 to 32 letters`},
	{"script as a target", "urls.csv", "https://a.example/2", "javascript:alert(1)",
		`line 3, column original_url: must be a URL`},
	{"space in a target", "urls.csv", "https://a.example/2", "https://a.example/2 3",
		`line 3, column original_url: must not contain U+0020`},
	{"password in a target", "urls.csv", "https://a.example/2", "https://u:p@a.example/",
		`line 3, column original_url: must not contain a user name or password`},
	{"e-mail without a domain", "users.csv", "bob@a.example", "bob@",
		`line 3, column email: must be an e-mail address`},
	{"no name", "users.csv", "bob,", ",", `line 3, column username: must not be empty`},
	{"bytes that are no UTF-8", "users.csv", "bob,", "b\xffb,",
		`line 3, column username: must be valid UTF-8`},
	{"NUL", "urls.csv", "One", "O\x00ne", `line 2, column title: must be valid UTF-8`},
	{"newline in a title", "urls.csv", "One", "\"O\nne\"",
		`line 2, column title: must be valid UTF-8`},
	{"details in single quotes", "events.csv", "{}", "{'a':1}",
		`line 3, column details: must be one JSON value`},
	{"details that are a list", "events.csv", "{}", "[]",
		`line 3, column details: must be a JSON object, not "[]"`},
	{"details and more", "events.csv", "{}", "{}{}",
		`line 3, column details: must be one JSON value`},
	{"no details", "events.csv", "{}", "", `line 3, column details: must be a JSON object, not ""`},
	{"a bad row after lines of details", "events.csv", "{}\n",
		"\"{\n\n}\"\n3,1,1,click,2025-01-01 00:00:00,[]\n",
		`line 6, column details: must be a JSON object`},
	{"end of a link that is none", "links.csv", "2099-01-01 00:00:00", "never",
		`line 2, column expires_at: must be a time like`},
	{"count below 0", "links.csv", ",3,", ",-3,",
		`line 2, column click_count: must be an integer from 0 to`},
	{"counts of no link", "links.csv", "bbbbbb", "cccccc",
		`line 3, column short_code: there is no row cccccc in urls.csv`},
	{"counts twice", "links.csv", "bbbbbb", "aaaaaa",
		`line 3, column short_code: aaaaaa stands in an earlier row`},
	{"clicks of no link", "clicks.csv", "aaaaaa", "cccccc",
		`line 2, column short_code: there is no row cccccc in urls.csv`},
	{"day that is none", "clicks.csv", "2025-01-31", "2025-01-32",
		`line 2, column day: must be a day like 2026-01-31`},
	{"no count", "clicks.csv", ",,1,", ",,,",
		`line 2, column clicks: must be an integer from 0 to`},
	{"quotes that do not end", "users.csv", "bob,", `"bob,`, `line 3, column `},
	{"a quote in the middle", "urls.csv", "One", `O"ne`, `line 2, column 33: bare "`},
	{"text after a quote", "urls.csv", "One", `"One"s`, `line 2, column `},
	{"a field too few", "users.csv", "bob,", "", `line 3, column `},
	{"a field too many", "users.csv", "bob,", "bob,bob,", `line 3, column `},
	{"a column missing", "users.csv", "id,username,email,created_at", "id,username,email",
		`line 1, column id: the header must be id,username,email,created_at`},
	{"columns in another order", "users.csv", "id,username,email", "username,id,email",
		`line 1, column id: the header must be id,username,email,created_at`},
	{"a column in capitals", "urls.csv", "short_code", "Short_Code",
		`line 1, column id: the header must be id,user_id,short_code,`},
	{"no header", "users.csv", "id,username,email,created_at\n", "",
		`line 1, column id: the header must be id,username,email,created_at`},
	{"empty file", "events.csv", small["events.csv"], "",
		`line 1, column id: the header must be id,url_id,`},
	{"only a byte order mark", "events.csv", small["events.csv"], "\ufeff",
		`line 1, column id: the header must be id,url_id,`},
	{"UTF-16", "users.csv", "id,", "\xff\xfei\x00d\x00,\x00",
		`line 1, column 1: the file is UTF-16: save it as CSV in UTF-8`},
	{"a long field", "urls.csv", "One", strings.Repeat("x", maxCSVField+1),
		`line 2, column 5: must be at most 65536 bytes`},
	{"a long row", "urls.csv", "One", strings.Repeat("x,", maxCSVRow/2),
		`line 2, column 1: the row is longer than 262144 bytes`},
}

// TestSeedRefuses plants one bad row at a time: it is named, shortly, and nothing at all is loaded.
func TestSeedRefuses(t *testing.T) {
	store, db := fileStore(t)
	for _, tt := range badRows {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			err := store.seed(t.Context(), smallWith(t, tt.file, tt.before, tt.after), &out)
			want := fmt.Sprintf("nothing loaded: %s %s", tt.file, tt.want)
			if !strings.HasPrefix(fmt.Sprint(err), want) || out.Len() > 0 {
				t.Errorf("error %v\nwant  %s\nprinted %q", err, want, &out)
			}
			if len(err.Error()) > 300 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			if n := rowsOfAll(t, db); n != 0 {
				t.Fatalf("%d rows are there", n)
			}
		})
	}
	t.Run("a file missing", func(t *testing.T) {
		files := smallFiles(strings.Clone)
		delete(files, "events.csv")
		err := store.seed(t.Context(), files, io.Discard)
		if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "events.csv") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("a day twice", func(t *testing.T) {
		files := smallWith(t, "clicks.csv", "2025-02-01,news.example", "2025-01-31,")
		err := store.seed(t.Context(), files, io.Discard)
		if err == nil || !strings.Contains(err.Error(), "clicks.csv lines 2-3: ") {
			t.Errorf("error %v", err)
		}
	})
	if n := rowsOfAll(t, db); n != 0 {
		t.Errorf("%d rows are there", n)
	}
	if err := store.seed(t.Context(), smallFiles(strings.Clone), io.Discard); err != nil {
		t.Errorf("what all this was made from is refused too: %v", err)
	}
}

// TestSeedAccepts reads what spreadsheets make of the files, and files with nothing in them.
func TestSeedAccepts(t *testing.T) {
	asIs := smallFiles(strings.Clone)
	replace := func(before, after string) fstest.MapFS {
		return smallFiles(func(s string) string { return strings.ReplaceAll(s, before, after) })
	}
	headers := smallFiles(func(s string) string {
		header, _, _ := strings.Cut(s, "\n")
		return header + "\n"
	})
	threeHeaders := maps.Clone(headers)
	delete(threeHeaders, "links.csv")
	delete(threeHeaders, "clicks.csv")
	twoFiles := maps.Clone(asIs)
	delete(twoFiles, "links.csv")
	delete(twoFiles, "clicks.csv")
	crlf := func(s string) string { return strings.ReplaceAll(s, "\n", "\r\n") }
	mark := func(s string) string { return "\ufeff" + s }
	markCRLF := func(s string) string { return mark(crlf(s)) }
	quoteHeader := func(s string) string {
		header, rows, _ := strings.Cut(s, "\n")
		return "\ufeff\"" + strings.ReplaceAll(header, ",", `","`) + "\"\n" + rows
	}
	bobFirst := smallWith(t, "users.csv", "1,ada,ada@a.example,2025-01-01 00:00:00\n2,bob,bob"+
		"@a.example,2025-01-02 00:00:00\n", "2,bob,bob@a.example,2025-01-02 00:00:00\n1,ada,ada"+
		"@a.example,2025-01-01 00:00:00\n")
	equalNames := smallWith(t, "users.csv", "bob,bob@", "ada,ada@")
	noScheme := smallWith(t, "urls.csv", "https://a.example/1", "a.example/1")
	private := smallWith(t, "urls.csv", "https://a.example/2", "http://192.168.0.1/")
	largeID := smallWith(t, "users.csv", "2,bob", "9007199254740993,bob")
	tests := []struct {
		name  string
		files fstest.MapFS
		gives fstest.MapFS
	}{
		{"as they are", asIs, asIs},
		{"without the figures", twoFiles, twoFiles},
		{"CRLF", smallFiles(crlf), asIs},
		{"a byte order mark", smallFiles(mark), asIs},
		{"a byte order mark and CRLF", smallFiles(markCRLF), asIs},
		{"a byte order mark before a quoted header", smallFiles(quoteHeader), asIs},
		{"semicolons", replace(",", ";"), asIs},
		{"tabs", replace(",", "\t"), asIs},
		{"no newline at the end", smallFiles(strings.TrimSpace), asIs},
		{"blank lines", replace("\n", "\n\n"), asIs},
		{"needless quotes", replace("True", `"True"`), asIs},
		{"only headers", headers, threeHeaders},
		{"equal names", equalNames, equalNames},
		{"rows in any order", bobFirst, asIs},
		{"a padded title", smallWith(t, "urls.csv", "One", " One "), asIs},
		{"a target without a scheme", noScheme, asIs},
		{"a private target", private, private},
		{"an id that JavaScript cannot read", largeID, largeID},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			store, _ := fileStore(t)
			if err := store.seed(t.Context(), tt.files, io.Discard); err != nil {
				t.Fatal(err)
			}
			diffFiles(t, exportFiles(t, store), tt.gives)
			if err := store.seed(t.Context(), tt.files, io.Discard); err != nil {
				t.Errorf("again: %v", err)
			}
			diffFiles(t, exportFiles(t, store), tt.gives)
		})
	}
}

// TestSeedConflicts seeds over rows that were there before. Those that are strangers are named,
// with file and line, and nothing is loaded; rows that have only been changed since stay as they
// are.
func TestSeedConflicts(t *testing.T) {
	const user = `INSERT INTO users (id, username, email, created_at) VALUES `
	const link = `INSERT INTO urls (id, short_code, original_url, created_at, updated_at) VALUES `
	const event = `INSERT INTO events (id, url_id, event_type, timestamp, details) VALUES `
	tests := []struct{ name, row, want string }{
		{"user's id taken", user + `(2, 'eve', 'eve@a.example', '2025-01-02')`,
			"users.csv line 3, column id: the database has another user with this id"},
		{"user of another time", user + `(1, 'ada', 'ada@a.example', '2025-01-02')`,
			"users.csv line 2, column id: the database has another user with this id"},
		{"user renamed since", user + `(1, 'Ada L.', 'ada@a.example', '2025-01-01')`, ""},
		{"user with a new address since", user + `(1, 'ada', 'l@a.example', '2025-01-01')`, ""},
		{"another user", user + `(3, 'ada', 'ada@a.example', '2025-01-01')`, ""},
		{"code taken", link + `(500, 'bbbbbb', 'https://me.example/', '2025-01-01', '2025-01-01')`,
			"urls.csv line 3, column short_code: the database has another link"},
		{"link's id taken", link + `(1, 'mine', 'https://me.example/', '2025-01-01', '2025-01-01')`,
			"urls.csv line 2, column short_code: the database has another link"},
		{"link changed since",
			link + `(1, 'aaaaaa', 'https://me.example/', '2025-01-01', '2025-01-01')`, ""},
		{"another link", link + `(500, 'mine', 'https://me.example/', '2025-01-01', '2025-01-01')`,
			""},
		{"event's id taken", event + `(2, 2, 'click', '2025-01-02', '{}')`,
			"events.csv line 3, column id: the database has another event with this id"},
		{"another event", event + `(3, 2, 'click', '2025-01-02', '{}')`, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			store, db := fileStore(t)
			execSQL(t, db, tt.row)
			before := exportFiles(t, store)
			err := store.seed(t.Context(), smallFiles(strings.Clone), io.Discard)
			if tt.want != "" {
				if !strings.HasPrefix(fmt.Sprint(err), "nothing loaded: "+tt.want) {
					t.Errorf("error %v, want %q", err, tt.want)
				}
				diffFiles(t, exportFiles(t, store), before)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			after := exportFiles(t, store)
			for name, file := range before {
				for line := range strings.Lines(string(file.Data)) {
					if !strings.Contains(string(after[name].Data), line) {
						t.Errorf("%s: a row that was there has changed: %s", name, line)
					}
				}
			}
		})
	}
}

// TestSeedKeepsFigures seeds an export over a link that was clicked since: counts, figures and the
// link's end stay as they are.
func TestSeedKeepsFigures(t *testing.T) {
	store, db := fileStore(t)
	if err := store.seed(t.Context(), smallFiles(strings.Clone), io.Discard); err != nil {
		t.Fatal(err)
	}
	execSQL(t, db, `UPDATE urls SET click_count = 5, expires_at = NULL WHERE id = 1`)
	execSQL(t, db, `UPDATE clicks_daily SET clicks = 4 WHERE referrer <> ''`)
	before := exportFiles(t, store)
	if err := store.seed(t.Context(), smallFiles(strings.Clone), io.Discard); err != nil {
		t.Fatal(err)
	}
	diffFiles(t, exportFiles(t, store), before)
}

// TestSeedKeepsSequences loads files again after the ids have moved on: none is given twice, not
// even one whose row is gone.
func TestSeedKeepsSequences(t *testing.T) {
	store, db := fileStore(t)
	next := func() int64 { return scalar[int64](t, db, `SELECT nextval('users_id_seq')`) }
	load := func() {
		t.Helper()
		if err := store.seed(t.Context(), smallFiles(strings.Clone), io.Discard); err != nil {
			t.Fatal(err)
		}
	}
	load()
	most := scalar[int64](t, db, `SELECT max(id) FROM users`)
	if id := next(); id != most+1 {
		t.Errorf("after ids up to %d comes %d", most, id)
	}
	execSQL(t, db, `SELECT setval('users_id_seq', 5000)`)
	load()
	if id := next(); id != 5001 {
		t.Errorf("after 5000, and files with ids up to %d, comes %d", most, id)
	}
}

// TestSeedLarge loads a file of many chunks, telling how far it is; the last row is bad, and of the
// others nothing stays.
func TestSeedLarge(t *testing.T) {
	const rows = 100_000
	store, db := fileStore(t)
	files := smallFiles(strings.Clone)
	files["users.csv"].Data = []byte(manyUsers(rows) + "17,u,u@a.example,2025-01-01 00:00:00\n")
	var out bytes.Buffer
	err := store.seed(t.Context(), files, &out)
	want := fmt.Sprintf("nothing loaded: users.csv line %d, column id: 17 stands in an earlier row",
		rows+2)
	if fmt.Sprint(err) != want {
		t.Errorf("error %v, want %s", err, want)
	}
	said := out.String()
	if !strings.HasPrefix(said, "users.csv: 100000 rows, ") || strings.Count(said, "\n") != 1 {
		t.Errorf("on the way it says %q", said)
	}
	if n := rowsOfAll(t, db); n != 0 {
		t.Errorf("%d rows stay", n)
	}
}

// TestUploadUsers loads uploaded files: rows that are there, rows of others, and a sender that
// breaks off.
func TestUploadUsers(t *testing.T) {
	store, db := fileStore(t)
	load := func(file string) bulkUsers {
		t.Helper()
		loaded, err := store.loadUsers(t.Context(), strings.NewReader(file))
		if err != nil {
			t.Fatal(err)
		}
		return loaded
	}
	const first = csvHead + "1,ada,ada@a.example,2025-01-01 00:00:00\n" +
		"2,bob,bob@a.example,2025-01-02 00:00:00\n"
	for range 2 {
		if got := load(first); got.Imported != 2 || got.Count != 2 || got.Conflicts != nil {
			t.Errorf("loaded %+v", got)
		}
	}
	got := load(csvHead + "3,eve,eve@a.example,2025-01-01 00:00:00\n" +
		"2,rob,bob@a.example,2025-01-02 00:00:00\n1,ada,ada@a.example,2025-01-01 00:00:00\n")
	want := []rowConflict{{Line: 3, ID: 2}}
	if got.Imported != 3 || !slices.Equal(got.Conflicts, want) || got.Unnamed != 0 {
		t.Errorf("loaded %+v, want the conflicts %v", got, want)
	}
	got = load(strings.ReplaceAll(manyUsers(12_000), ",u,", ",v,"))
	if got.Imported != 12_000 || len(got.Conflicts) != 3 {
		t.Errorf("loaded %d rows with %d conflicts", got.Imported, len(got.Conflicts))
	}
	got = load(manyUsers(12_000))
	if got.Conflicts[99].Line != 101 || len(got.Conflicts) != 100 || got.Unnamed != 11_900 {
		t.Errorf("%d conflicts, %d unnamed", len(got.Conflicts), got.Unnamed)
	}
	if n := scalar[int](t, db, `SELECT count(*) FROM users`); n != 12_000 {
		t.Errorf("%d users", n)
	}

	brokenOff := iotest.ErrReader(io.ErrUnexpectedEOF)
	body := bodyReader{io.MultiReader(strings.NewReader(first), brokenOff)}
	_, err := store.loadUsers(t.Context(), body)
	if _, ours := errors.AsType[*apiError](err); !ours || !store.pg.up() {
		t.Errorf("an upload that broke off: %v, PostgreSQL %v", err, store.pg.current())
	}
	_, err = store.loadUsers(t.Context(), strings.NewReader(csvHead+"1,ada\n"))
	if bad, ok := errors.AsType[*rowError](err); !ok || bad.line != 2 {
		t.Errorf("a bad row: %v", err)
	}
}

// TestUploadWaitsForNobody holds that a sender who dawdles keeps no place: another one is served.
func TestUploadWaitsForNobody(t *testing.T) {
	store, _ := fileStore(t)
	slow, sender := io.Pipe()
	dawdling := make(chan error, 1)
	go func() {
		_, err := store.loadUsers(t.Context(), slow)
		dawdling <- err
	}()
	io.WriteString(sender, csvHead+"1,ada,ada@a.example,2025-01-01 00:00:00\n")
	other := strings.NewReader(csvHead + "1,ada,ada@a.example,2025-01-01 00:00:00\n")
	if _, err := store.loadUsers(t.Context(), other); err != nil {
		t.Errorf("beside a dawdling sender: %v", err)
	}
	sender.Close()
	if err := <-dawdling; err != nil {
		t.Errorf("the dawdling sender: %v", err)
	}
}

// ---- helpers ----

// fileStore returns a store on an empty database of the test's own.
func fileStore(t *testing.T) (*Store, *sql.DB) {
	t.Helper()
	return storeAt(t, testDatabase(t))
}

// storeAt returns a store on the database at url, which it gives the newest schema, and a pool for
// the test's own SQL.
func storeAt(t *testing.T, url string) (*Store, *sql.DB) {
	t.Helper()
	config, _, err := databaseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	store := newStore(openPostgres(config, defaultDBConns(), log))
	t.Cleanup(store.pg.close)
	eventually(t, patience, "PostgreSQL answers", func() bool {
		return store.pg.probe(t.Context()) == nil
	})
	if _, err := store.migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	return store, openDB(t, url)
}

// countRows is how many rows a table has.
func countRows(t *testing.T, store *Store, table string) int64 {
	t.Helper()
	return scalar[int64](t, store.pg.readers.DB, `SELECT count(*) FROM `+table)
}

// rowsOfAll is how many rows all tables have that files are loaded into.
func rowsOfAll(t *testing.T, db *sql.DB) int {
	t.Helper()
	return scalar[int](t, db, `SELECT (SELECT count(*) FROM users) + (SELECT count(*) FROM urls)
		+ (SELECT count(*) FROM events) + (SELECT count(*) FROM clicks_daily)`)
}

// manyUsers is a users.csv of n rows.
func manyUsers(n int) string {
	var file strings.Builder
	file.WriteString(csvHead)
	for id := 1; id <= n; id++ {
		fmt.Fprintf(&file, "%d,u,u@a.example,2025-01-01 00:00:00\n", id)
	}
	return file.String()
}

// exportFiles exports and reads the files back.
func exportFiles(t *testing.T, store *Store) fstest.MapFS {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "a new", "dir")
	if err := store.export(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	return readFiles(t, os.DirFS(dir))
}

// readFiles reads all files of dir.
func readFiles(t *testing.T, dir fs.FS) fstest.MapFS {
	t.Helper()
	names, err := fs.Glob(dir, "*")
	if err != nil {
		t.Fatal(err)
	}
	files := fstest.MapFS{}
	for _, name := range names {
		data, err := fs.ReadFile(dir, name)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = &fstest.MapFile{Data: data}
	}
	return files
}

// diffFiles compares files byte by byte and shows the first line in which each differs.
func diffFiles(t *testing.T, got, want fstest.MapFS) {
	t.Helper()
	gotNames := slices.Sorted(maps.Keys(got))
	wantNames := slices.Sorted(maps.Keys(want))
	if !slices.Equal(gotNames, wantNames) {
		t.Errorf("files %v, want %v", gotNames, wantNames)
		return
	}
	for _, name := range wantNames {
		gotLines := strings.SplitAfter(string(got[name].Data), "\n")
		wantLines := strings.SplitAfter(string(want[name].Data), "\n")
		for i := range max(len(gotLines), len(wantLines)) {
			line := func(lines []string) string {
				if i < len(lines) {
					return lines[i]
				}
				return "(no line)"
			}
			if line(gotLines) != line(wantLines) {
				t.Errorf("%s differs in line %d:\n%q\nwant\n%q", name, i+1, line(gotLines),
					line(wantLines))
				break
			}
		}
	}
}
