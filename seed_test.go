package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"testing/iotest"
	"time"
)

var csvNames = []string{"users.csv", "urls.csv", "events.csv"}

// TestSeed loads the built-in files, twice, and goes on: numbers, sequences, and the way back to the same bytes.
func TestSeed(t *testing.T) {
	a := startApp(t)
	db := openDB(t, a.cfg.DatabaseURL)
	builtIn, err := fs.Sub(seeds, "seeds")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		var out bytes.Buffer
		if err := a.store.seed(builtIn, a.rules, &out); err != nil || !strings.HasPrefix(out.String(), "loaded 400 users, 2000 urls, 3422 events in ") {
			t.Fatalf("seed: %v, and says %q", err, &out)
		}
		for table, want := range map[string]int{"users": 400, "urls": 2000, "events": 3422, "clicks_daily": 0} {
			if n := scalar[int](t, db, `SELECT count(*) FROM `+table); n != want {
				t.Errorf("%d rows in %s, want %d", n, table, want)
			}
		}
	}
	first := exportTo(t, a.store)
	for _, name := range csvNames {
		want, err := fs.ReadFile(builtIn, name)
		if err != nil {
			t.Fatal(err)
		}
		diffCSV(t, name, first[name].Data, want)
	}

	t.Run("the sequences go on", func(t *testing.T) {
		r := do(t, "POST", a.url+"/users", `{"username":"new","email":"new@a.example"}`)
		if r.status != 201 || !strings.Contains(r.body, `"id":401,`) {
			t.Errorf("POST /users: %d %s", r.status, r.body)
		}
		r = do(t, "POST", a.url+"/shorten", `{"url":"https://a.example/new","user_id":401}`)
		if r.status != 201 || !strings.Contains(r.body, `"id":2001,`) {
			t.Errorf("POST /shorten: %d %s", r.status, r.body)
		}
		if id := scalar[int](t, db, `SELECT max(id) FROM events`); id != 3423 {
			t.Errorf("the new link's event has id %d, want 3423", id)
		}
		if err := a.store.seed(builtIn, a.rules, io.Discard); err != nil {
			t.Errorf("a third time: %v", err)
		}
		if r := do(t, "POST", a.url+"/shorten", `{"url":"https://a.example/newer"}`); r.status != 201 || !strings.Contains(r.body, `"id":2002,`) {
			t.Errorf("after that, POST /shorten: %d %s", r.status, r.body)
		}
	})
	t.Run("moves to another database", func(t *testing.T) {
		if r := do(t, "DELETE", a.url+"/urls/3", ""); r.status != 204 { // active in the file
			t.Fatalf("DELETE: %d %s", r.status, r.body)
		}
		if r := do(t, "PUT", a.url+"/urls/2", `{"title":"comma, \"quote\" and ünïcode"}`); r.status != 200 {
			t.Fatalf("PUT: %d %s", r.status, r.body)
		}
		if r := do(t, "PUT", a.url+"/urls/4", `{"title":null}`); r.status != 200 {
			t.Fatalf("PUT: %d %s", r.status, r.body)
		}
		files := exportTo(t, a.store)
		other, _ := testStore(t, Config{})
		if err := other.seed(files, a.rules, io.Discard); err != nil {
			t.Fatal(err)
		}
		again := exportTo(t, other)
		for _, name := range csvNames {
			diffCSV(t, name, again[name].Data, files[name].Data)
		}
		if !bytes.Contains(again["urls.csv"].Data, []byte("\n3,6,5CF3Ki,https://docs.example.com/apple/birch/3,Release party comet,False,")) {
			t.Error("the deleted link is not False in the export")
		}
		if got, err := other.target("5CF3Ki"); err != nil || got.id != 0 {
			t.Errorf("the deleted link came back to life: %+v, %v", got, err)
		}
	})
}

// TestSeedRealSet loads the platform's own files in under 2 s and gives them back byte for byte.
func TestSeedRealSet(t *testing.T) {
	dir := os.DirFS("../shared/mlh")
	if _, err := fs.Stat(dir, "urls.csv"); err != nil {
		t.Skip("SKIPPED: the platform's set is not here, in ../shared/mlh")
	}
	store, _ := testStore(t, Config{})
	var out bytes.Buffer
	start := time.Now()
	err := store.seed(dir, targetRules{ownHost: "localhost"}, &out)
	if took := time.Since(start); err != nil || !strings.HasPrefix(out.String(), "loaded 400 users, 2000 urls, 3422 events in ") || took > 2*time.Second {
		t.Fatalf("seed: %v after %v, and says %q", err, took, &out)
	}
	files := exportTo(t, store)
	for _, name := range csvNames {
		want, err := fs.ReadFile(dir, name)
		if err != nil {
			t.Fatal(err)
		}
		diffCSV(t, name, files[name].Data, want)
	}
}

// small are three files that fit each other, for tests to spoil.
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
}

// smallWith is small with one text replaced in one file.
func smallWith(name, old, new string) fstest.MapFS {
	files := fstest.MapFS{}
	for n, text := range small {
		if n == name {
			if !strings.Contains(text, old) {
				panic("no " + old + " in " + name)
			}
			text = strings.Replace(text, old, new, 1)
		}
		files[n] = &fstest.MapFile{Data: []byte(text)}
	}
	return files
}

// TestSeedRefuses plants one bad row at a time: it is named, and nothing at all is loaded.
func TestSeedRefuses(t *testing.T) {
	store, db := testStore(t, Config{})
	const notTime = " must be a time like 2026-01-31 12:00:00, not "
	tests := []struct{ name, file, old, new, want string }{
		{"the platform's bad date", "users.csv", "2025-01-02 00:00:00", "20-04-2025 09:26", `users.csv line 3, column created_at:` + notTime + `"20-04-2025 09:26"`},
		{"a date that never was", "urls.csv", "2025-01-01", "2025-02-29", `urls.csv line 2, column created_at:` + notTime + `"2025-02-29 00:00:00"`},
		{"an hour without its zero", "urls.csv", "00:00:00\n", "0:00:00\n", `urls.csv line 2, column updated_at:` + notTime + `"2025-01-01 0:00:00"`},
		{"a fraction of a second", "events.csv", "00:00:00,{}", "00:00:00.5,{}", `events.csv line 3, column timestamp:` + notTime + `"2025-01-01 00:00:00.5"`},
		{"no date", "events.csv", "2025-01-01 00:00:00,{}", ",{}", `events.csv line 3, column timestamp:` + notTime + `""`},
		{"space before a date", "urls.csv", ",2025-01-01", ", 2025-01-01", `urls.csv line 2, column created_at:` + notTime + `" 2025-01-01 00:00:00"`},
		{"space after a name", "users.csv", "bob,", "bob ,", `users.csv line 3, column username: must not be empty or padded with spaces`},
		{"space before a title", "urls.csv", "One", " One", `urls.csv line 2, column title: must not be padded with spaces: " One"`},
		{"space before an id", "users.csv", "\n2,", "\n 2,", `users.csv line 3, column id: must be a positive integer, not " 2"`},
		{"space after a bool", "urls.csv", "True", "True ", `urls.csv line 2, column is_active: must be True or False, not "True "`},
		{"bool in lower case", "urls.csv", "False", "false", `urls.csv line 3, column is_active: must be True or False, not "false"`},
		{"bool as a number", "urls.csv", "True", "1", `urls.csv line 2, column is_active: must be True or False, not "1"`},
		{"no bool", "urls.csv", "True", "", `urls.csv line 2, column is_active: must be True or False, not ""`},
		{"id 0", "users.csv", "\n2,", "\n0,", `users.csv line 3, column id: must be a positive integer, not "0"`},
		{"id with a zero in front", "users.csv", "\n2,", "\n02,", `users.csv line 3, column id: must be a positive integer, not "02"`},
		{"id as a float", "urls.csv", "\n2,", "\n2.0,", `urls.csv line 3, column id: must be a positive integer, not "2.0"`},
		{"id too large", "urls.csv", "\n2,", "\n9223372036854775808,", `urls.csv line 3, column id: must be a positive integer, not "9223372036854775808"`},
		{"no id", "events.csv", "\n2,", "\n,", `events.csv line 3, column id: must be a positive integer, not ""`},
		{"duplicate user", "users.csv", "\n2,", "\n1,", `users.csv line 3, column id: 1 stands in an earlier row`},
		{"duplicate link", "urls.csv", "\n2,", "\n1,", `urls.csv line 3, column id: 1 stands in an earlier row`},
		{"duplicate event", "events.csv", "\n2,", "\n1,", `events.csv line 3, column id: 1 stands in an earlier row`},
		{"duplicate code", "urls.csv", "bbbbbb", "aaaaaa", `urls.csv line 3, column short_code: aaaaaa stands in an earlier row`},
		{"link of nobody", "urls.csv", "1,1,aa", "1,3,aa", `urls.csv line 2, column user_id: there is no row 3 in users.csv`},
		{"event of no link", "events.csv", "2,2,,", "2,3,,", `events.csv line 3, column url_id: there is no row 3 in urls.csv`},
		{"event without a link", "events.csv", "2,2,,", "2,,,", `events.csv line 3, column url_id: must be a positive integer, not ""`},
		{"event by nobody", "events.csv", "2,2,,", "2,2,3,", `events.csv line 3, column user_id: there is no row 3 in users.csv`},
		{"reserved code", "urls.csv", "bbbbbb", "health", `urls.csv line 3, column short_code: is reserved for the service itself`},
		{"code with a slash", "urls.csv", "bbbbbb", "bbb/bb", `urls.csv line 3, column short_code: must be 3 to 32 letters`},
		{"no code", "urls.csv", "bbbbbb", "", `urls.csv line 3, column short_code: must be 3 to 32 letters`},
		{"private target", "urls.csv", "https://a.example/2", "http://192.168.0.1/", `urls.csv line 3, column original_url: must not point into a private network`},
		{"target at ourselves", "urls.csv", "https://a.example/2", "https://hop.example/aaaaaa", `urls.csv line 3, column original_url: must not point back at this service`},
		{"script as a target", "urls.csv", "https://a.example/2", "javascript:alert(1)", `urls.csv line 3, column original_url: must be a URL`},
		{"space after a target", "urls.csv", "https://a.example/2", "https://a.example/2 ", `urls.csv line 3, column original_url: must not contain U+0020`},
		{"e-mail without a domain", "users.csv", "bob@a.example", "bob@", `users.csv line 3, column email: must be an e-mail address`},
		{"no name", "users.csv", "bob,", ",", `users.csv line 3, column username: must not be empty`},
		{"bytes that are no UTF-8", "users.csv", "bob,", "b\xffb,", `users.csv line 3, column username: must be valid UTF-8`},
		{"NUL", "urls.csv", "One", "O\x00ne", `urls.csv line 2, column title: must be valid UTF-8 of at most 500 bytes without control characters`},
		{"newline in a title", "urls.csv", "One", "\"O\nne\"", `urls.csv line 2, column title: must be valid UTF-8 of at most 500 bytes without control characters`},
		{"details in single quotes", "events.csv", "{}", "{'a':1}", `events.csv line 3, column details: must be one JSON value`},
		{"details that are a list", "events.csv", "{}", "[]", `events.csv line 3, column details: must be a JSON object, not "[]"`},
		{"details and more", "events.csv", "{}", "{}{}", `events.csv line 3, column details: must be one JSON value`},
		{"no details", "events.csv", "{}", "", `events.csv line 3, column details: must be a JSON object, not ""`},
		{"NUL in details", "events.csv", "{}", `"{""a"":""\u0000""}"`, `events.csv line 3, column details: must not contain NUL`},
		{"details after lines of details", "events.csv", "{}\n", "\"{\n\n}\"\n3,1,1,click,2025-01-01 00:00:00,[]\n", `events.csv line 6, column details: must be a JSON object`},
		{"quotes that do not end", "users.csv", "bob,", `"bob,`, `users.csv line 3, column `},
		{"a quote in the middle", "urls.csv", "One", `O"ne`, `urls.csv line 2, column 33: bare "`},
		{"text after a quote", "urls.csv", "One", `"One"s`, `urls.csv line 2, column `},
		{"a field too few", "users.csv", "bob,", "", `users.csv line 3, column `},
		{"a field too many", "users.csv", "bob,", "bob,bob,", `users.csv line 3, column `},
		{"a column missing", "users.csv", "id,username,email,created_at", "id,username,email", `users.csv line 1, column id: the header must be id,username,email,created_at`},
		{"columns in another order", "users.csv", "id,username,email", "username,id,email", `users.csv line 1, column id: the header must be id,username,email,created_at`},
		{"a column in capitals", "urls.csv", "short_code", "Short_Code", `urls.csv line 1, column id: the header must be id,user_id,short_code,`},
		{"no header", "users.csv", "id,username,email,created_at\n", "", `users.csv line 1, column id: the header must be id,username,email,created_at`},
		{"empty file", "events.csv", small["events.csv"], "", `events.csv line 1, column id: the header must be id,url_id,`},
		{"only a BOM", "events.csv", small["events.csv"], "\ufeff", `events.csv line 1, column id: the header must be id,url_id,`},
	}
	rules := targetRules{ownHost: "hop.example"}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			err := store.seed(smallWith(tt.file, tt.old, tt.new), rules, &out)
			if !strings.HasPrefix(fmt.Sprint(err), "nothing loaded: "+tt.want) || out.Len() > 0 {
				t.Errorf("error %v\nwant  nothing loaded: %s\nprinted %q", err, tt.want, &out)
			}
			if n := scalar[int](t, db, `SELECT (SELECT count(*) FROM users) + (SELECT count(*) FROM urls) + (SELECT count(*) FROM events)`); n != 0 {
				t.Fatalf("%d rows are there", n)
			}
		})
	}
	t.Run("a file missing", func(t *testing.T) {
		files := smallWith("users.csv", "", "")
		delete(files, "events.csv")
		if err := store.seed(files, rules, io.Discard); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "events.csv") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("an upload that breaks off", func(t *testing.T) {
		file := bodyReader{io.MultiReader(strings.NewReader(small["users.csv"]), iotest.ErrReader(io.ErrUnexpectedEOF))}
		if _, err := store.loadUsers(file); !errors.As(err, new(*apiError)) || store.down.Load() {
			t.Errorf("an upload that broke off: %v, breaker open: %v", err, store.down.Load())
		}
	})
	if n := scalar[int](t, db, `SELECT count(*) FROM users`); n != 0 {
		t.Errorf("%d users are there", n)
	}
	if err := store.seed(smallWith("users.csv", "", ""), rules, io.Discard); err != nil {
		t.Errorf("what all this was made from is refused too: %v", err)
	}
}

// TestSeedAccepts reads what spreadsheets make of the files, and files with nothing in them; all give the same rows.
func TestSeedAccepts(t *testing.T) {
	each := func(edit func(string) string) fstest.MapFS {
		files := fstest.MapFS{}
		for name, text := range small {
			files[name] = &fstest.MapFile{Data: []byte(edit(text))}
		}
		return files
	}
	header := func(text string) string { line, _, _ := strings.Cut(text, "\n"); return line + "\n" }
	tests := []struct {
		name         string
		files, gives fstest.MapFS
	}{
		{"as they are", each(strings.Clone), each(strings.Clone)},
		{"CRLF", each(func(s string) string { return strings.ReplaceAll(s, "\n", "\r\n") }), each(strings.Clone)},
		{"BOM", each(func(s string) string { return "\ufeff" + s }), each(strings.Clone)},
		{"BOM and CRLF", each(func(s string) string { return "\ufeff" + strings.ReplaceAll(s, "\n", "\r\n") }), each(strings.Clone)},
		{"no newline at the end", each(strings.TrimSpace), each(strings.Clone)},
		{"blank lines", each(func(s string) string { return strings.ReplaceAll(s, "\n", "\n\n") }), each(strings.Clone)},
		{"needless quotes", each(func(s string) string { return strings.ReplaceAll(s, "True", `"True"`) }), each(strings.Clone)},
		{"only headers", each(header), each(header)},
		{"equal names", smallWith("users.csv", "bob,bob@", "ada,ada@"), smallWith("users.csv", "bob,bob@", "ada,ada@")},
		{"rows in any order", smallWith("users.csv", "1,ada,ada@a.example,2025-01-01 00:00:00\n2,bob,bob@a.example,2025-01-02 00:00:00\n",
			"2,bob,bob@a.example,2025-01-02 00:00:00\n1,ada,ada@a.example,2025-01-01 00:00:00\n"), each(strings.Clone)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			store, _ := testStore(t, Config{})
			if err := store.seed(tt.files, targetRules{}, io.Discard); err != nil {
				t.Fatal(err)
			}
			got := exportTo(t, store)
			for _, name := range csvNames {
				diffCSV(t, name, got[name].Data, tt.gives[name].Data)
			}
		})
	}
}

// TestSeedConflicts seeds over links that were made by the API: what has another link's id or code is refused.
func TestSeedConflicts(t *testing.T) {
	tests := []struct{ name, link, want string }{
		{"code taken", `(500, 'bbbbbb', 'https://mine.example/', '2025-01-01', '2025-01-01')`, "urls.csv line 3, column short_code: the database has another link"},
		{"id taken", `(1, 'mine', 'https://mine.example/', '2025-01-01', '2025-01-01')`, "urls.csv line 2, column short_code: the database has another link"},
		{"the same link, changed since", `(1, 'aaaaaa', 'https://mine.example/', '2025-01-01', '2025-01-01')`, ""},
		{"another link", `(500, 'mine', 'https://mine.example/', '2025-01-01', '2025-01-01')`, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			store, db := testStore(t, Config{})
			mustExec(t, store, `INSERT INTO urls (id, short_code, original_url, created_at, updated_at) VALUES `+tt.link)
			err := store.seed(smallWith("users.csv", "", ""), targetRules{}, io.Discard)
			if tt.want == "" && err != nil || !strings.Contains(fmt.Sprint(err), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if n := scalar[int](t, db, `SELECT count(*) FROM urls WHERE original_url = 'https://mine.example/'`); n != 1 {
				t.Error("the link that was there has changed")
			}
			if n := scalar[int](t, db, `SELECT count(*) FROM users`); (n == 0) != (tt.want != "") {
				t.Errorf("%d users loaded, error %v", n, err)
			}
		})
	}
}

// TestSeedLarge loads a file of many chunks, telling how far it is; the last row is bad, and of the others nothing stays.
func TestSeedLarge(t *testing.T) {
	const rows = 100_000
	store, db := testStore(t, Config{})
	var users strings.Builder
	users.WriteString("id,username,email,created_at\n")
	for id := 1; id <= rows; id++ {
		fmt.Fprintf(&users, "%d,u,u@a.example,2025-01-01 00:00:00\n", id)
	}
	users.WriteString("17,u,u@a.example,2025-01-01 00:00:00\n")
	files := smallWith("users.csv", small["users.csv"], users.String())
	var out bytes.Buffer
	err := store.seed(files, targetRules{}, &out)
	if want := fmt.Sprintf("nothing loaded: users.csv line %d, column id: 17 stands in an earlier row", rows+2); fmt.Sprint(err) != want {
		t.Errorf("error %v, want %s", err, want)
	}
	if !strings.HasPrefix(out.String(), "users.csv: 100000 rows, ") || strings.Count(out.String(), "\n") != 1 {
		t.Errorf("on the way it says %q", &out)
	}
	if n := scalar[int](t, db, `SELECT count(*) FROM users`); n != 0 {
		t.Errorf("%d users stay", n)
	}
}

// ---- helpers ----

// exportTo exports and reads the three files back.
func exportTo(t *testing.T, store *Store) fstest.MapFS {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "a new", "dir")
	if err := store.export(dir); err != nil {
		t.Fatal(err)
	}
	files := fstest.MapFS{}
	for _, name := range csvNames {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		files[name] = &fstest.MapFile{Data: b}
	}
	if names, _ := fs.ReadDir(os.DirFS(dir), "."); len(names) != len(csvNames) {
		t.Errorf("%d files exported", len(names))
	}
	return files
}

// diffCSV compares two files byte by byte and shows the first line in which they differ.
func diffCSV(t *testing.T, name string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	g, w := strings.SplitAfter(string(got), "\n"), strings.SplitAfter(string(want), "\n")
	for i := range max(len(g), len(w)) {
		if i >= len(g) || i >= len(w) || g[i] != w[i] {
			t.Errorf("%s differs in line %d:\n%q\nwant\n%q", name, i+1, strings.Join(g[min(i, len(g)):min(i+1, len(g))], ""), strings.Join(w[min(i, len(w)):min(i+1, len(w))], ""))
			return
		}
	}
}
