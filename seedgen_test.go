package main

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The project's own seeds: seeds/{users,urls,events}.csv are made here, of made-up words. After
// changing the generator, make them anew with
//
//	go test -run TestSeedsAreGenerated -update-seeds
//
// The same function makes the million links of the benchmarks.

// What seeds/ holds. Change these only together with the files.
const (
	genSeed   = 20250607
	genUsers  = 400
	genURLs   = 2000
	genEvents = 3422
)

// The header lines.
const (
	genUsersHeader  = "id,username,email,created_at"
	genURLsHeader   = "id,user_id,short_code,original_url,title,is_active,created_at,updated_at"
	genEventsHeader = "id,url_id,user_id,event_type,timestamp,details"
)

const (
	genLayout   = "2006-01-02 15:04:05"
	genAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	genCodeLen  = 6

	// Of the events after the created ones, 216 of 1,422 are deletions: a fraction, so that other
	// sizes keep the proportion.
	genDeletedNum = 216
	genDeletedDen = 1422

	genInactivePercent = 18 // of the links
)

// Every time lies between genUsersFrom and genEnd. Rows are drawn independently, so a link may be
// older than its owner and an event older than its link: files that people bring are like that, and
// the loader must not mind.
var (
	genUsersFrom = time.Date(2023, 7, 1, 0, 0, 0, 0, time.UTC).Unix()
	genURLsFrom  = time.Date(2024, 7, 1, 0, 0, 0, 0, time.UTC).Unix()
	genEnd       = time.Date(2025, 10, 1, 0, 0, 0, 0, time.UTC).Unix()
)

// Vocabulary. Hosts are under the domains RFC 2606 sets aside, so no seeded
// redirect or address ever reaches a stranger.
var (
	genHosts = []string{
		"example.com", "example.org", "example.net",
		"docs.example.com", "blog.example.org", "shop.example.net",
	}
	genFirst = strings.Fields(`
		apple breezy cozy clever coral dapper early fern frosty gentle golden hazel
		humble indigo jolly kind lilac lofty lunar maple mauve merry misty mossy
		nimble olive pale plucky quaint russet rosy rustic sandy sleepy snowy sunny
		swift thrifty velvet wistful`)
	genSecond = strings.Fields(`
		acorn badger barley birch bramble brook clover comet cricket dune falcon
		finch fjord gecko glade heron hollow juniper kestrel lantern lark linnet
		lynx magpie marten nettle otter pebble petrel plover puffin quill raven
		reed sparrow spruce thicket thistle tundra willow`)
	genTitles = []string{
		"Annual survey", "Bug tracker", "Changelog", "Design sketch", "Field report",
		"Holiday menu", "Meeting minutes", "Newsletter", "Press kit", "Reading list",
		"Release party", "Travel plan", "Tutorial", "Weekly digest",
	}
	genVerbs = strings.Fields(`
		bottled braided carved dusted folded glazed hummed juggled knitted mended
		nudged painted polished sifted stacked stirred tuned whistled`)
	genFields   = []string{"title", "original_url", "is_active"}
	genReasons  = []string{"user_requested", "duplicate", "expired", "policy_cleanup"}
	genReserved = []string{"health", "shorten", "stats", "users", "urls", "events", "metrics"}
)

var genUpdateSeeds = flag.Bool("update-seeds", false, "rewrite seeds/ from the generator")

// writeSeeds writes users.csv, urls.csv and events.csv into dir. The same arguments give the same
// bytes for ever. Each file has its own random stream, so urls.csv does not depend on events;
// events below urls (0, say) writes that many created events and no others. It streams: what it
// remembers is the usernames and, per link, the code and 8 bytes.
func writeSeeds(dir string, seed uint64, users, urls, events int) error {
	negative := users < 0 || urls < 0 || events < 0
	if negative || users == 0 && urls > 0 || urls == 0 && events > 0 {
		return fmt.Errorf("writeSeeds: cannot make %d users, %d urls, %d events", users, urls, events)
	}
	// Past half of all usernames the search for a free one gets slow.
	if limit := len(genFirst) * len(genSecond) * 90 / 2; users > limit {
		return fmt.Errorf("writeSeeds: %d users; there are names for %d", users, limit)
	}
	err := genFile(filepath.Join(dir, "users.csv"), genUsersHeader, func(w *csv.Writer) error {
		genWriteUsers(w, rand.New(rand.NewPCG(seed, 1)), users)
		return nil
	})
	if err != nil {
		return err
	}
	urlsFile := filepath.Join(dir, "urls.csv")
	eventsFile := filepath.Join(dir, "events.csv")
	return genFile(urlsFile, genURLsHeader, func(uw *csv.Writer) error {
		return genFile(eventsFile, genEventsHeader, func(ew *csv.Writer) error {
			owners := genWriteURLs(uw, ew, rand.New(rand.NewPCG(seed, 2)), users, urls, events)
			if events > urls {
				genWriteChanges(ew, rand.New(rand.NewPCG(seed, 3)), owners, events)
			}
			return nil
		})
	})
}

// genFile creates path, writes the header, lets rows write the rest, and closes it. Rows need not
// check their writes: the csv.Writer keeps the first error, and it is returned here.
func genFile(path, header string, rows func(*csv.Writer) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close() // for the early returns; the Close that counts is below
	w := csv.NewWriter(bufio.NewWriterSize(f, 1<<16))
	w.Write(strings.Split(header, ","))
	if err := rows(w); err != nil {
		return err
	}
	w.Flush()
	if err := w.Error(); err != nil {
		return err
	}
	return f.Close()
}

// genWriteUsers writes n users. Usernames are unique but for one pair, which differs in its email:
// files that people bring have such pairs, and the loader must take them.
func genWriteUsers(w *csv.Writer, r *rand.Rand, n int) {
	original := 0
	twin := 0
	if n >= 2 {
		original = 1 + r.IntN(n-1)
		twin = original + 1 + r.IntN(n-original)
	}
	var twinName string
	var twinHost int
	used := make(map[string]bool, n)
	for id := 1; id <= n; id++ {
		name := genUsername(r, used)
		host := r.IntN(len(genHosts))
		switch id {
		case original:
			twinName = name
			twinHost = (host + 1) % len(genHosts)
		case twin:
			name = twinName
			host = twinHost
		}
		w.Write([]string{strconv.Itoa(id), name, name + "@" + genHosts[host],
			genTime(genBetween(r, genUsersFrom, genEnd))})
	}
}

// genUsername returns word+word+two digits, not yet in used, and adds it there.
func genUsername(r *rand.Rand, used map[string]bool) string {
	for {
		name := genPick(r, genFirst) + genPick(r, genSecond) + strconv.Itoa(10+r.IntN(90))
		if !used[name] {
			used[name] = true
			return name
		}
	}
}

// genWriteURLs writes n links to uw and beside each, to ew, its created event (the first maxEvents
// of them). It returns the owner of link id at [id-1].
func genWriteURLs(uw, ew *csv.Writer, r *rand.Rand, users, n, maxEvents int) []int32 {
	owners := make([]int32, n)
	codes := make(map[uint64]struct{}, n)
	// Selection sampling: exactly this many are inactive, wherever they fall.
	inactive := (n*genInactivePercent + 50) / 100
	for id := 1; id <= n; id++ {
		owner := 1 + r.IntN(users)
		owners[id-1] = int32(owner)
		code := genCode(r, codes)
		target := "https://" + genPick(r, genHosts) + "/" + genPick(r, genFirst) + "/" +
			genPick(r, genSecond) + "/" + strconv.Itoa(id)
		title := genPick(r, genTitles) + " " + genPick(r, genSecond)
		active := "True"
		if r.IntN(n-id+1) < inactive {
			active = "False"
			inactive--
		}
		created := genBetween(r, genURLsFrom, genEnd)
		updated := genBetween(r, created, genEnd)

		row := strconv.Itoa(id)
		user := strconv.Itoa(owner)
		at := genTime(created)
		uw.Write([]string{row, user, code, target, title, active, at, genTime(updated)})
		if id <= maxEvents {
			ew.Write([]string{row, row, user, "created", at,
				`{"short_code":"` + code + `","original_url":"` + target + `"}`})
		}
	}
	return owners
}

// genCode returns a code not yet in used, nor a reserved word, and adds it there. Codes are kept as
// numbers: a third of what strings would cost.
func genCode(r *rand.Rand, used map[uint64]struct{}) string {
	const all = 62 * 62 * 62 * 62 * 62 * 62
	for {
		v := r.Uint64N(all)
		if _, ok := used[v]; ok {
			continue
		}
		used[v] = struct{}{}
		var b [genCodeLen]byte
		for i := range b {
			b[i] = genAlphabet[v%62]
			v /= 62
		}
		if code := string(b[:]); !slices.Contains(genReserved, code) {
			return code
		}
	}
}

// genWriteChanges writes the events after the created ones: the updated, then the deleted, each
// kind spread over as many different links as there are. They say nothing about urls.csv, and must
// not be replayed.
func genWriteChanges(w *csv.Writer, r *rand.Rand, owners []int32, events int) {
	n := len(owners)
	deleted := (events - n) * genDeletedNum / genDeletedDen
	links := make([]int32, n)
	for i := range links {
		links[i] = int32(i + 1)
	}
	shuffle := func() {
		r.Shuffle(n, func(i, j int) { links[i], links[j] = links[j], links[i] })
	}
	shuffle()
	k := 0
	for id := n + 1; id <= events; id++ {
		kind := "updated"
		if id > events-deleted {
			kind = "deleted"
		}
		if id == events-deleted+1 {
			shuffle()
			k = 0
		}
		link := links[k%n]
		owner := owners[link-1]
		w.Write([]string{strconv.Itoa(id), strconv.Itoa(int(link)), strconv.Itoa(int(owner)),
			kind, genTime(genBetween(r, genURLsFrom, genEnd)), genDetails(r, kind)})
		k++
	}
}

// genDetails returns the details of an updated or a deleted event. The new value of is_active is a
// word that means nothing.
func genDetails(r *rand.Rand, kind string) string {
	if kind == "deleted" {
		return `{"reason":"` + genPick(r, genReasons) + `"}`
	}
	field := genPick(r, genFields)
	value := genPick(r, genVerbs)
	if field == "original_url" {
		value = "https://" + genPick(r, genHosts) + "/" + genPick(r, genSecond) + "/" +
			strconv.Itoa(1+r.IntN(9999))
	}
	return `{"field":"` + field + `","new_value":"` + value + `"}`
}

// genPick returns one of words.
func genPick(r *rand.Rand, words []string) string { return words[r.IntN(len(words))] }

// genBetween returns a Unix time in [from, to).
func genBetween(r *rand.Rand, from, to int64) int64 { return from + r.Int64N(to-from) }

// genTime writes a Unix time as the CSVs do.
func genTime(sec int64) string { return time.Unix(sec, 0).UTC().Format(genLayout) }

// TestSeedsAreGenerated holds seeds/ to be exactly what the generator makes; with -update-seeds it
// makes it so.
func TestSeedsAreGenerated(t *testing.T) {
	dir := t.TempDir()
	if err := writeSeeds(dir, genSeed, genUsers, genURLs, genEvents); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"users.csv", "urls.csv", "events.csv"} {
		want, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join("seeds", name)
		if *genUpdateSeeds {
			if err := os.WriteFile(path, want, 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what the generator makes: "+
				"go test -run TestSeedsAreGenerated -update-seeds", path)
		}
	}
}

// TestSeedShape reads seeds/ as a stranger would and checks every fact that is said of such files,
// and the one pair of equal usernames.
func TestSeedShape(t *testing.T) {
	users := genRead(t, "users.csv", genUsersHeader, genUsers)
	urls := genRead(t, "urls.csv", genURLsHeader, genURLs)
	events := genRead(t, "events.csv", genEventsHeader, genEvents)
	t.Run("users", func(t *testing.T) { genCheckUsers(t, users) })
	t.Run("urls", func(t *testing.T) { genCheckURLs(t, urls) })
	t.Run("events", func(t *testing.T) { genCheckEvents(t, events, urls) })
}

// genRead returns the rows of seeds/name below its header, having checked what holds for all three
// files: bytes, header, count, gapless ids, no empty field.
func genRead(t *testing.T, name, header string, count int) [][]string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("seeds", name))
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range raw {
		if b != '\n' && (b < ' ' || b > '~') { // CR, tabs and a BOM are caught here too
			t.Fatalf("%s: byte %#x at offset %d", name, b, i)
		}
	}
	if !bytes.HasPrefix(raw, []byte(header+"\n")) || !bytes.HasSuffix(raw, []byte("\n")) {
		t.Fatalf("%s: first line is not %q, or the last one is cut", name, header)
	}
	rows, err := csv.NewReader(bytes.NewReader(raw)).ReadAll()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	rows = rows[1:]
	if len(rows) != count {
		t.Fatalf("%s: %d rows, want %d", name, len(rows), count)
	}
	for i, row := range rows {
		if row[0] != strconv.Itoa(i+1) {
			t.Fatalf("%s: row %d has id %s", name, i+1, row[0])
		}
		for _, field := range row {
			if field == "" || field != strings.TrimSpace(field) {
				t.Fatalf("%s: row %d has an empty or padded field: %q", name, i+1, row)
			}
		}
	}
	return rows
}

// genCheckTime fails the test unless s is a time as the CSVs write it.
func genCheckTime(t *testing.T, s string) {
	t.Helper()
	at, err := time.Parse(genLayout, s)
	if err != nil || at.Format(genLayout) != s {
		t.Errorf("bad time %q", s)
	}
}

// genCheckSorted fails the test if a column of times happens to be in order: nothing may come to
// rely on it.
func genCheckSorted(t *testing.T, rows [][]string, column int) {
	t.Helper()
	byColumn := func(a, b []string) int { return strings.Compare(a[column], b[column]) }
	if slices.IsSortedFunc(rows, byColumn) {
		t.Errorf("column %d is in order", column)
	}
}

// genCheckUsers checks names, emails and times of users.csv.
func genCheckUsers(t *testing.T, users [][]string) {
	username := regexp.MustCompile(`^[a-z]+[0-9]{2}$`)
	names := map[string]bool{}
	emails := map[string]bool{}
	for _, u := range users {
		host, ok := strings.CutPrefix(u[2], u[1]+"@")
		if !ok || !slices.Contains(genHosts, host) {
			t.Errorf("user %s: email %q", u[0], u[2])
		}
		if !username.MatchString(u[1]) {
			t.Errorf("user %s: username %q", u[0], u[1])
		}
		genCheckTime(t, u[3])
		names[u[1]] = true
		emails[u[2]] = true
	}
	if len(names) != len(users)-1 {
		t.Errorf("%d different usernames among %d, want one pair of equal ones", len(names),
			len(users))
	}
	if len(emails) != len(users) {
		t.Errorf("%d different emails among %d", len(emails), len(users))
	}
	genCheckSorted(t, users, 3)
}

// genCheckURLs checks owners, codes, targets, the share of inactive links and the times of
// urls.csv.
func genCheckURLs(t *testing.T, urls [][]string) {
	code := regexp.MustCompile(`^[A-Za-z0-9]{6}$`)
	title := regexp.MustCompile(`^[A-Z][a-z]+( [a-z]+){1,2}$`)
	codes := map[string]bool{}
	inactive := 0
	for _, u := range urls {
		owner, err := strconv.Atoi(u[1])
		if err != nil || owner < 1 || owner > genUsers {
			t.Errorf("url %s: no user %q", u[0], u[1])
		}
		if !code.MatchString(u[2]) || codes[u[2]] || slices.Contains(genReserved, u[2]) {
			t.Errorf("url %s: code %q is malformed, used twice or reserved", u[0], u[2])
		}
		codes[u[2]] = true
		target, err := url.Parse(u[3])
		if err != nil || target.Scheme != "https" || target.String() != u[3] ||
			!slices.Contains(genHosts, target.Host) {

			t.Errorf("url %s: target %q", u[0], u[3])
		}
		if !title.MatchString(u[4]) {
			t.Errorf("url %s: title %q", u[0], u[4])
		}
		switch u[5] {
		case "True":
		case "False":
			inactive++
		default:
			t.Errorf("url %s: is_active %q", u[0], u[5])
		}
		genCheckTime(t, u[6])
		genCheckTime(t, u[7])
		if u[7] < u[6] {
			t.Errorf("url %s: updated %s before it was created, %s", u[0], u[7], u[6])
		}
	}
	if inactive*100 < 16*len(urls) || inactive*100 > 20*len(urls) {
		t.Errorf("%d of %d links inactive, want 16-20 %%", inactive, len(urls))
	}
	genCheckSorted(t, urls, 6)
	genCheckSorted(t, urls, 7)
}

// genCheckEvents checks that every event belongs to a link and its owner, that the first ones
// repeat urls.csv, and the counts and details of each type.
func genCheckEvents(t *testing.T, events, urls [][]string) {
	count := map[string]int{}
	for i, e := range events {
		id, err := strconv.Atoi(e[1])
		if err != nil || id < 1 || id > len(urls) {
			t.Fatalf("event %s: no url %q", e[0], e[1])
		}
		link := urls[id-1]
		if e[2] != link[1] {
			t.Errorf("event %s: user %s, but url %s belongs to %s", e[0], e[2], e[1], link[1])
		}
		genCheckTime(t, e[4])
		if (i < len(urls)) != (e[3] == "created") {
			t.Errorf("event %s is %s; the created ones come first", e[0], e[3])
		}
		count[e[3]]++

		var d map[string]string // strings only: an is_active is not a boolean here
		err = json.Unmarshal([]byte(e[5]), &d)
		if err != nil || strings.Contains(e[5], " ") {
			t.Errorf("event %s: details %q are not compact JSON: %v", e[0], e[5], err)
		}
		ok := false
		switch e[3] {
		case "created":
			ok = len(d) == 2 && d["short_code"] == link[2] && d["original_url"] == link[3] &&
				e[0] == e[1] && e[4] == link[6]
		case "updated":
			ok = len(d) == 2 && slices.Contains(genFields, d["field"]) && d["new_value"] != ""
		case "deleted":
			ok = len(d) == 1 && slices.Contains(genReasons, d["reason"])
		}
		if !ok {
			t.Errorf("event %s: %s with details %q", e[0], e[3], e[5])
		}
	}
	want := map[string]int{"created": 2000, "updated": 1206, "deleted": 216}
	if !maps.Equal(count, want) {
		t.Errorf("events by type: %v, want %v", count, want)
	}
	genCheckSorted(t, events, 4)
}
