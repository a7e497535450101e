package main

import (
	"database/sql"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lib/pq"
)

// importRules are those of a service at https://hop.example.
func importRules(t *testing.T) targetRules {
	t.Helper()
	rules, err := newTargetRules("https://hop.example", false)
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

// importText imports a file given as text and returns what it says.
func importText(t *testing.T, store *Store, file string, apply bool) (string, error) {
	t.Helper()
	var out strings.Builder
	err := store.importLinks(t.Context(), strings.NewReader(file), importRules(t), apply, &out)
	return out.String(), err
}

// TestImport reads files of other services: a dry run says what there is and changes nothing, and
// --apply imports a file that has no fault, once.
func TestImport(t *testing.T) {
	for _, tt := range importFiles {
		t.Run(tt.name, func(t *testing.T) {
			store, db := fileStore(t)
			file, err := os.ReadFile(filepath.Join("testdata", "import", tt.name+".csv"))
			if err != nil {
				t.Fatal(err)
			}
			said, err := importText(t, store, string(file), false)
			want := tt.says + "\nnothing was changed: --apply imports them\n"
			if err != nil || said != want {
				t.Errorf("a dry run: %v, and says\n%s\nwant\n%s", err, said, want)
			}
			_, err = importText(t, store, string(file), true)
			if tt.links == nil {
				if err == nil || rowsOfAll(t, db) != 0 {
					t.Errorf("imported with faults: %v, %d rows", err, rowsOfAll(t, db))
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := importedLinks(t, db); !slices.Equal(got, tt.links) {
				t.Errorf("imported\n%s\nwant\n%s", strings.Join(got, "\n"),
					strings.Join(tt.links, "\n"))
			}
			said, err = importText(t, store, string(file), true)
			again := fmt.Sprintf("new 0, same %d, taken 0, refused 0\nimported 0 links\n",
				len(tt.links))
			if err != nil || !strings.HasSuffix(said, again) {
				t.Errorf("again: %v, and says\n%s", err, said)
			}
			unbalanced := scalar[int](t, db, `SELECT count(*) FROM urls WHERE click_count <> (
				SELECT COALESCE(sum(clicks), 0) FROM clicks_daily WHERE url_id = urls.id)`)
			if unbalanced != 0 {
				t.Errorf("the clicks per day of %d links are not their count", unbalanced)
			}
		})
	}
}

// importFiles are files under testdata/import, what a dry run says of them, and the links that they
// make: none where something in them is refused.
var importFiles = []struct {
	name, says string
	links      []string
}{
	{"bitly", `"Link" is the code, "Long URL" is the target, "Title" is the title, ` +
		`"Clicks" is the clicks, "Created" is the time of creation
not read: "Tags"
new 3, same 0, taken 0, refused 0`, []string{
		"3AbCdEf https://example.com/spring?utm_source=mail&utm_medium=x 'Spring sale, 2024' " +
			"1204 2024-03-01 09:30:00 -",
		"spring-sale https://example.com/spring 'Spring' 7 2024-03-01 09:31:00 -",
		"team https://example.com/team '' 0 2024-05-06 07:08:09 -",
	}},
	{"yourls", `"keyword" is the code, "url" is the target, "title" is the title, ` +
		`"clicks" is the clicks, "timestamp" is the time of creation
not read: "ip"
line 4: refused: "keyword": must be 3 to 32 letters, digits, - or _, the first a letter or digit
line 5: refused: "url": must not point into a private network
line 6: refused: "url": must not point back at this service
new 1, same 0, taken 0, refused 3`, nil},
	{"kutt", `"address" is the code, "target" is the target, "description" is the title, ` +
		`"visit_count" is the clicks, "created_at" is the time of creation, "expire_in" is the end
not read: "id", "banned"
new 2, same 0, taken 0, refused 0`, []string{
		"kutt1 https://example.com/kutt 'First' 5 2023-01-02 03:04:05 2099-01-01 00:00:00",
		"kutt2 https://example.com/kutt2 '' 0 2023-01-02 03:04:06 -",
	}},
	{"shlink", `"shortCode" is the code, "longUrl" is the target, "title" is the title, ` +
		`"visits" is the clicks, "createdAt" is the time of creation
not read: "shortUrl", "domain", "tags"
new 2, same 0, taken 0, refused 0`, []string{
		"rYmO1 https://example.com/shlink 'Shlink' 12 2024-06-07 08:00:00 -",
		"docs-page https://example.com/docs '' 3 2024-06-07 08:00:01 -",
	}},
	{"plain", `"Slug" is the code, "Destination URL" is the target, "Visits" is the clicks, ` +
		`"Expires" is the end
line 4: refused: line 2 has the code welcome for another target
line 5: refused: "Slug": is reserved for the service itself
line 6: refused: "Visits": must be a number of clicks, not "1,5"
line 7: refused: has 2 fields, the header 4
line 8: refused: "Expires": must be a time like 2027-01-31T12:00:00Z, not "next week"
line 9: refused: "Slug": must be 3 to 32 letters, digits, - or _, the first a letter or digit
line 10: refused: "Destination URL": must be a URL like https://example.com/page
new 1, same 1, taken 0, refused 7`, nil},
}

// importedLinks are all links as lines.
func importedLinks(t *testing.T, db *sql.DB) []string {
	t.Helper()
	return scalar[pq.StringArray](t, db, `
		SELECT array_agg(concat_ws(' ', short_code, original_url,
		                 '''' || COALESCE(title, '') || '''', click_count, created_at,
		                 COALESCE(expires_at::text, '-')) ORDER BY id)
		FROM urls`)
}

// TestImportBesideLinks imports over links that are there: the same, with another target, deleted.
func TestImportBesideLinks(t *testing.T) {
	store, db := fileStore(t)
	execSQL(t, db, `INSERT INTO urls (short_code, original_url, created_at, updated_at, deleted_at)
		VALUES ('same', 'https://example.com/', now(), now(), NULL),
		       ('taken', 'https://example.com/mine', now(), now(), NULL),
		       ('gone', 'https://example.com/', now(), now(), now())`)
	const file = "code,url\nsame,https://example.com/\nfresh,https://example.com/\n"
	const taken = "taken,https://example.com/\ngone,https://example.com/\n"
	said, err := importText(t, store, file+taken, true)
	for _, want := range []string{
		`line 4: taken: taken leads to "https://example.com/mine"`,
		`line 5: taken: gone was a link that has been deleted`,
		`new 1, same 1, taken 2, refused 0`,
	} {
		if !strings.Contains(said, want+"\n") {
			t.Errorf("says\n%s\nwithout %s", said, want)
		}
	}
	if err == nil || scalar[int](t, db, `SELECT count(*) FROM urls`) != 3 {
		t.Errorf("imported beside what is taken: %v", err)
	}
	if _, err := importText(t, store, file, true); err != nil {
		t.Fatal(err)
	}
	const fresh = `SELECT count(*) FROM urls WHERE short_code = 'fresh' AND changed IS NOT NULL
		AND is_active AND deleted_at IS NULL`
	if scalar[int](t, db, fresh) != 1 {
		t.Error("the new link is not there, or not marked as changed")
	}
	target, err := store.targets(t.Context(), []string{"fresh"})
	if err != nil || len(target) != 1 || target[0].location[0] != "https://example.com/" {
		t.Errorf("the new link leads to %+v, %v", target, err)
	}
}

// TestImportRefusesFiles holds what is said of files that are no lists of links.
func TestImportRefusesFiles(t *testing.T) {
	store, _ := fileStore(t)
	for _, tt := range []struct{ name, file, want string }{
		{"empty", "", "line 1, column 1: the header must name the code: one of "},
		{"no code", "url,title\n", "line 1, column 1: the header must name the code: one of "},
		{"no target", "code,title\n", "line 1, column 1: the header must name the target: one of "},
		{"open quote", "code,url\n\"abc,https://example.com/\n", "line 2, column 27: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			said, err := importText(t, store, tt.file, false)
			if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("error %v, want %s; says %s", err, tt.want, said)
			}
		})
	}
}

// TestImportLarge imports many links: the lines it names are few, all are counted, and it is quick.
func TestImportLarge(t *testing.T) {
	const links = 100_000
	store, db := fileStore(t)
	var file strings.Builder
	file.WriteString("code,url,clicks\n")
	for i := range links {
		fmt.Fprintf(&file, "code-%d,https://example.com/page/%d,%d\n", i, i, i%3)
	}
	bad := strings.Repeat("x,nowhere,\n", 70)
	said, err := importText(t, store, file.String()+bad, false)
	named := strings.Count(said, "refused: ")
	if err != nil || named != maxImportLines || !strings.Contains(said, "… and more\n") ||
		!strings.Contains(said, "new 100000, same 0, taken 0, refused 70\n") {

		t.Errorf("a dry run: %v, names %d lines and ends with %s", err, named, said[len(said)-200:])
	}
	start := time.Now()
	_, err = importText(t, store, file.String(), true)
	t.Logf("%d links in %v", links, time.Since(start))
	if n := scalar[int](t, db, `SELECT count(*) FROM urls`); err != nil || n != links {
		t.Errorf("%d links imported: %v", n, err)
	}
}

// TestExportMap writes what nginx redirects by, and lets nginx read it where there is one.
func TestExportMap(t *testing.T) {
	store, db := fileStore(t)
	long := "https://example.com/" + strings.Repeat("é", 1000)
	execSQL(t, db, `INSERT INTO urls (short_code, original_url, created_at, updated_at, is_active,
			expires_at)
		VALUES ('plain', 'https://example.com/a;b?c={d}&e=''f''#g', now(), now(), true, NULL),
		       ('ABC', 'https://example.com/upper', now(), now(), true, NULL),
		       ('Asleep', 'https://example.com/asleep', now(), now(), false, NULL),
		       ('asleep', 'https://example.com/awake', now(), now(), true, NULL),
		       ('abc', 'https://example.com/lower', now(), now(), true, NULL),
		       ('Default', 'https://example.com/$var/é?q="<\', now(), now(), true, NULL),
		       ('sleeping', 'https://example.com/', now(), now(), false, NULL),
		       ('ended', 'https://example.com/', now(), now(), true, '2020-01-01'),
		       ('long', $1, now(), now(), true, NULL)`, long)
	var out strings.Builder
	if err := store.exportMap(t.Context(), &out); err != nil {
		t.Fatal(err)
	}
	const want = `plain "https://example.com/a;b?c={d}&e='f'#g";
"~^ABC$" "https://example.com/upper";
"~^asleep$" "https://example.com/awake";
"~^abc$" "https://example.com/lower";
\Default "https://example.com/%24var/%C3%A9?q=%22%3C%5C";
# long: the target is too long for nginx
`
	if out.String() != want {
		t.Errorf("wrote\n%s\nwant\n%s", &out, want)
	}
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		t.Skip("SKIPPED: there is no nginx to read it")
	}
	checkWithNginx(t, nginx, out.String())
}

// checkWithNginx runs nginx on a map and asks it for some codes.
func checkWithNginx(t *testing.T, nginx, lines string) {
	t.Helper()
	dir := pgDir(t)
	port := freePort(t)
	settings := fmt.Sprintf(`
		pid %[1]s/pid; error_log %[1]s/log; daemon off; master_process off; events {}
		http {
			access_log off; client_body_temp_path %[1]s; proxy_temp_path %[1]s;
			fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
			map $code $target { default ""; include %[1]s/hop.map; }
			server {
				listen 127.0.0.1:%[2]d;
				location ~ ^/(?<code>[0-9A-Za-z_-]+)$ {
					if ($target = "") { return 404; }
					return 302 $target;
				}
			}
		}`, dir, port)
	for name, text := range map[string]string{"hop.map": lines, "nginx.conf": settings} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p := &process{port: port, url: fmt.Sprintf("http://127.0.0.1:%d", port)}
	p.command = func() *exec.Cmd {
		return exec.Command(nginx, "-p", dir, "-c", filepath.Join(dir, "nginx.conf"))
	}
	p.start(t)
	t.Cleanup(p.kill)
	eventually(t, patience, "nginx answers", func() bool {
		_, err := roundTrip("GET", p.url+"/", "")
		return err == nil
	})
	for code, want := range map[string]string{
		"plain":    "https://example.com/a;b?c={d}&e='f'#g",
		"ABC":      "https://example.com/upper",
		"abc":      "https://example.com/lower",
		"Abc":      "",
		"Default":  "https://example.com/%24var/%C3%A9?q=%22%3C%5C",
		"sleeping": "",
		"unknown":  "",
	} {
		if got := do(t, "GET", p.url+"/"+code, "").header.Get("Location"); got != want {
			t.Errorf("nginx sends /%s to %q, want %q", code, got, want)
		}
	}
}
