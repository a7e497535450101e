package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/lib/pq"
)

// Lists on a large database: each page is an index range, whatever its filter and however deep.

const (
	listedUsers = 5_000
	manyLinks   = 120_000
	manyEvents  = 400_000
)

// fillLists makes a large database: user 1 owns 1,000 links, link 7 has a fifth of all events, and
// one kind of event is rare.
func fillLists(t *testing.T, db *sql.DB) {
	t.Helper()
	// Without logging it takes half the time, and the plans are the same.
	for _, table := range []string{"urls", "events"} {
		execSQL(t, db, `ALTER TABLE `+table+` SET UNLOGGED`)
	}
	execSQL(t, db, `
		INSERT INTO users (username, email, created_at)
		SELECT 'u' || n, 'u' || n || '@a.example', '2025-01-01' FROM generate_series(1, $1) AS n`,
		listedUsers)
	execSQL(t, db, `
		INSERT INTO urls (user_id, short_code, original_url, title, is_active, created_at,
		                  updated_at, deleted_at, click_count)
		SELECT CASE WHEN n % 120 = 0 THEN 1 WHEN n % 10 = 1 THEN NULL ELSE 2 + n * 7 % 4900 END,
		       'code' || n, 'https://a.example/some/path/' || n, 'title ' || n, n % 6 > 0,
		       '2025-01-01', '2025-01-01', CASE WHEN n % 20 = 3 THEN now() END, n * 7 % 1000
		FROM generate_series(1, $1) AS n`, manyLinks)
	execSQL(t, db, `
		INSERT INTO events (url_id, user_id, event_type, timestamp, details)
		SELECT CASE WHEN n % 5 = 0 THEN 7 WHEN n % 7 = 0 THEN 120 * (1 + n % 1000)
		            ELSE 1 + n::bigint * 31 % $1::bigint END,
		       CASE WHEN n % 3 > 0 THEN NULL ELSE 1 + n * 7 % 5000 END,
		       CASE WHEN n % 5000 = 0 THEN 'deleted' WHEN n % 3 = 0 THEN 'updated' ELSE 'click' END,
		       '2025-01-01',
		       CASE WHEN n % 3 = 0 THEN '{}' WHEN n % 4 = 0 THEN '"x.example"' ELSE 'false' END::json
		FROM generate_series(1, $2) AS n`, manyLinks, manyEvents)
	execSQL(t, db, `ANALYZE`)
}

// TestListPlans explains every list with every filter and at several depths.
func TestListPlans(t *testing.T) {
	if testing.Short() {
		t.Skip("fills a large database")
	}
	dsn := testDatabase(t)
	store, db := testStore(t, dsn)
	fillLists(t, db)
	explained := explainReaders(t, store, dsn)

	much, little, none := int64(1), int64(4321), int64(1<<50)
	busy := int64(7)
	yes, no := true, false
	type list struct {
		name string
		page func(p page) error
		deep int64 // an id near the end
	}
	lists := []list{{"users", func(p page) error {
		_, err := store.listUsers(t.Context(), p)
		return err
	}, listedUsers - 1500}}
	for _, f := range []linkFilter{
		{}, {userID: &much}, {userID: &little}, {userID: &none}, {active: &yes}, {active: &no},
		{code: "code777"}, {code: "none"}, {originalURL: "https://a.example/some/path/777"},
		{originalURL: "https://none.example/"}, {userID: &much, active: &no},
		{userID: &much, code: "code777"}, {sort: byNewest}, {sort: byNewest, userID: &much},
	} {
		lists = append(lists, list{"urls " + jsonText(shownFilter(f)), func(p page) error {
			_, err := store.listLinks(t.Context(), f, p)
			return err
		}, manyLinks - 20_000})
	}
	for _, f := range []eventFilter{
		{}, {urlID: &busy}, {urlID: &little}, {urlID: &none}, {eventType: "click"},
		{eventType: "deleted"}, {eventType: "none"}, {urlID: &busy, eventType: "click"},
		{urlID: &busy, eventType: "deleted"}, {userID: &much}, {userID: &little}, {userID: &none},
		{userID: &much, eventType: "click"}, {userID: &much, eventType: "deleted"},
		{userID: &much, urlID: &busy},
	} {
		lists = append(lists, list{"events " + jsonText(shownEvents(f)), func(p page) error {
			_, err := store.listEvents(t.Context(), f, p)
			return err
		}, manyEvents - 50_000})
	}
	for _, l := range lists {
		t.Run(l.name, func(t *testing.T) {
			cost := map[string]int{}
			sortable := 3.0 * 1001
			readable := 10_000 // 1,000 rows out of 1,000 pages, with their index and their links
			if strings.Contains(l.name, `"user_id":1`) && strings.HasPrefix(l.name, "events") {
				// The clicks of 1,000 links in a range of ids, of which a page is cut.
				sortable = 50_000
				readable = 20_000
			}
			for depth, p := range map[string]page{
				"first": {limit: 1000},
				"deep":  {limit: 1000, after: l.deep},
				"tenth": {limit: 100, offset: 900},
			} {
				if err := l.page(p); err != nil {
					t.Fatalf("%s: %v", depth, err)
				}
				for _, plan := range explained() {
					cost[depth] += plan.Hit + plan.Read
					plan.each(func(node queryPlan) {
						if strings.Contains(node.Node, "Seq Scan") {
							t.Errorf("%s: a whole table is read: %s", depth, plan)
						}
						if node.Node == "Sort" && node.sorted() > sortable {
							t.Errorf("%s: %v rows are sorted: %s", depth, node.sorted(), plan)
						}
					})
				}
			}
			if max(cost["first"], cost["deep"], cost["tenth"]) > readable {
				t.Errorf("pages read %v buffers", cost)
			}
			if cost["deep"] > 2*cost["first"]+100 {
				t.Errorf("deep pages cost more: %v", cost)
			}
		})
	}
}

// shownFilter names a filter of links.
func shownFilter(f linkFilter) map[string]any {
	shown := map[string]any{}
	if f.userID != nil {
		shown["user_id"] = *f.userID
	}
	if f.active != nil {
		shown["is_active"] = *f.active
	}
	if f.code != "" {
		shown["short_code"] = f.code
	}
	if f.originalURL != "" {
		shown["original_url"] = f.originalURL
	}
	if f.sort != byID {
		shown["sort"] = f.sort
	}
	return shown
}

// shownEvents names a filter of events.
func shownEvents(f eventFilter) map[string]any {
	shown := map[string]any{}
	if f.userID != nil {
		shown["user_id"] = *f.userID
	}
	if f.urlID != nil {
		shown["url_id"] = *f.urlID
	}
	if f.eventType != "" {
		shown["event_type"] = f.eventType
	}
	return shown
}

// TestSearchIsBounded searches more links than one answer may look at: it stops, says where, and
// goes on from there until every match was found once.
func TestSearchIsBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("fills a large database")
	}
	store, db := testStore(t, testDatabase(t))
	store.pg.readers = store.pg.background // this is about what is read, not about how long it takes
	const links = 2*searchWindow + 1000
	// Matches at the edges of what one answer looks at.
	want := []int64{1, searchWindow, searchWindow + 1, searchWindow + 2, links - 1, links}
	execSQL(t, db, `ALTER TABLE urls SET UNLOGGED`)
	execSQL(t, db, `
		INSERT INTO urls (short_code, original_url, title, click_count, created_at, updated_at)
		SELECT 'code' || n, 'https://a.example/', CASE WHEN n = ANY ($2) THEN 'A Needle' END,
		       n % 97, '2025-01-01', '2025-01-01'
		FROM generate_series(1, $1) AS n`, links, pq.Array(want))
	execSQL(t, db, `ANALYZE urls`)
	for _, sort := range []linkSort{byID, byNewest} {
		var found []int64
		pages := 0
		p := page{limit: 2}
		for {
			got, err := store.listLinks(t.Context(), linkFilter{search: "nEEdle", sort: sort}, p)
			if err != nil {
				t.Fatal(err)
			}
			pages++
			for _, l := range got.rows {
				found = append(found, l.ID)
			}
			switch {
			case got.more:
				p.after = got.lastID()
			case got.stopped != 0:
				p.after = got.stopped
			default:
				p.after = 0
			}
			if p.after == 0 || pages > 20 {
				break
			}
		}
		if sort == byNewest {
			slices.Reverse(found)
		}
		if !slices.Equal(found, want) || pages < 3 {
			t.Errorf("sort %d: found %v in %d pages, want %v", sort, found, pages, want)
		}
	}

	var all []int64 // by clicks: the newest searchWindow links, then the next
	p := page{limit: 1000}
	for range 200 {
		got, err := store.listLinks(t.Context(), linkFilter{sort: byClicks}, p)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range got.rows {
			all = append(all, l.ID)
		}
		switch {
		case got.more:
			p.offset += p.limit
		case got.stopped != 0:
			p = page{limit: p.limit, after: got.stopped}
		default:
			p.limit = 0
		}
		if p.limit == 0 {
			break
		}
	}
	total := len(all)
	slices.Sort(all)
	if n := len(slices.Compact(all)); total != links || n != links {
		t.Errorf("by clicks: %d links listed, %d different ones, want %d", total, n, links)
	}
}

// fillHeavy makes rows that weigh as much as a row can: 1,000 users and 1,000 links, whose letters
// become six bytes each in JSON, and 500 events, between which are clicks.
func fillHeavy(t *testing.T, a *app, db *sql.DB) {
	t.Helper()
	execSQL(t, db, `
		INSERT INTO users (username, email, created_at)
		SELECT repeat(U&'\2028', 494) || lpad(n::text, 6, '0'),
		       repeat('e', 482) || lpad(n::text, 6, '0') || '@a.example', '2025-01-01'
		FROM generate_series(1, 1000) AS n`)
	execSQL(t, db, `
		INSERT INTO urls (user_id, short_code, original_url, title, created_at, updated_at,
		                  click_count)
		SELECT 1, 'heavy' || n, rpad('https://a.example/?' || n, 2048, '"'), repeat(U&'\2028', 500),
		       '2025-01-01', '2025-01-01', n * 7 % 1000
		FROM generate_series(1, 1000) AS n`)
	const event = `{"event_type":"big","url_id":1,"user_id":1,"details":{"a":"%s"}}`
	padding := strings.Repeat("x", maxBody-len(event)+len("%s"))
	body := fmt.Sprintf(event, padding)
	if r := do(t, "POST", a.url+"/events", body+" "); r.status != 413 {
		t.Fatalf("a larger event: %d", r.status)
	}
	if r := do(t, "POST", a.url+"/events", body); r.status != 201 {
		t.Fatalf("the largest event: %d %s", r.status, r.body)
	}
	execSQL(t, db, `
		INSERT INTO events (url_id, user_id, event_type, timestamp, details)
		SELECT url_id, CASE WHEN n % 3 > 0 THEN 1 END,
		       CASE WHEN n % 3 > 0 THEN 'big' ELSE 'click' END, timestamp,
		       CASE WHEN n % 3 > 0 THEN details ELSE '"x.example"' END
		FROM events, generate_series(1, 749) AS n`)
	execSQL(t, db, `ANALYZE`)
}

// TestListsAreBounded pages through lists of the heaviest rows. No answer is larger than maxListed,
// and by the Link header every row comes once.
func TestListsAreBounded(t *testing.T) {
	dsn := testDatabase(t)
	a := startApp(t, "DATABASE_URL="+dsn)
	a.store.pg.readers = a.store.pg.background // this is about bytes, also on a slow machine
	fillHeavy(t, a, openDB(t, dsn))
	for path, want := range map[string]int{
		"/users":                              1000,
		"/urls":                               1000,
		"/urls?user_id=1&per_page=700":        1000,
		"/urls?sort=-created":                 1000,
		"/urls?sort=-clicks":                  1000,
		"/urls?sort=-clicks&per_page=400":     1000,
		"/urls?sort=-clicks&per_page=997":     1000,
		"/urls?sort=-clicks&after=501&page=1": 500,
		"/urls?q=heavy":                       1000,
		"/events":                             750,
		"/events?url_id=1":                    750,
		"/events?user_id=1":                   750,
		"/events?event_type=big":              501,
		"/events?event_type=click":            249,
		"/events?per_page=50&event_type=big":  501,
	} {
		seen := map[int64]int{}
		largest, answers := 0, 0
		for next := path; next != ""; answers++ {
			r := do(t, "GET", a.url+next, "")
			if r.status != 200 {
				t.Fatalf("%s: %d %s", next, r.status, r.body)
			}
			largest = max(largest, len(r.body))
			var rows []struct{ ID int64 }
			r.json(t, &rows)
			for _, row := range rows {
				seen[row.ID]++
			}
			next, _, _ = strings.Cut(strings.TrimPrefix(r.header.Get("Link"), "<"), ">")
		}
		for id, times := range seen {
			if times > 1 {
				t.Errorf("%s: %d comes %d times", path, id, times)
			}
		}
		if len(seen) != want || largest > maxListed {
			t.Errorf("%s: %d rows, want %d; largest answer %d bytes", path, len(seen), want, largest)
		}
		t.Logf("%-36s %d rows in %d answers, the largest of %d bytes", path, len(seen), answers,
			largest)
	}
}

// TestPagesEnd asks for pages that are further than hop walks: where rows are, it is refused with
// the way to them, and where none are, the page is empty.
func TestPagesEnd(t *testing.T) {
	dsn := testDatabase(t)
	a := startApp(t, "DATABASE_URL="+dsn)
	db := openDB(t, dsn)
	execSQL(t, db, `
		INSERT INTO users (username, email, created_at)
		SELECT 'u' || n, n || '@example.com', now() FROM generate_series(1, $1::int) AS n`,
		maxSkip+2)
	const refused = -1
	for path, rows := range map[string]int{
		"/users?page=101":               2,
		"/users?page=102":               refused,
		"/users?page=100002&per_page=1": refused,
		"/urls?page=102":                0,
		"/events?page=102":              0,
		"/events?user_id=1&page=102":    0,
	} {
		r := do(t, "GET", a.url+path, "")
		if rows == refused {
			if r.status != 400 || !strings.Contains(r.body, "Link header") {
				t.Errorf("GET %s: %d %s", path, r.status, r.body)
			}
			checkError(t, r, "invalid_request page")
			continue
		}
		var got []any
		r.json(t, &got)
		if r.status != 200 || len(got) != rows {
			t.Errorf("GET %s: %d with %d rows, want %d", path, r.status, len(got), rows)
		}
	}
	execSQL(t, db, `DELETE FROM users WHERE id = $1`, maxSkip+2)
	if r := do(t, "GET", a.url+"/users?page=100002&per_page=1", ""); r.body != "[]\n" {
		t.Errorf("behind the last row: %d %s", r.status, r.body)
	}
}

// TestListsKeepNobodyOut: when as many lists wait as may, one row is still read.
func TestListsKeepNobodyOut(t *testing.T) {
	a := startApp(t)
	lists := &a.store.pg.readers.lists
	if !lists.enterAll(maxLists) {
		t.Fatal("fewer than maxLists find room")
	}
	r := do(t, "GET", a.url+"/users", "")
	if r.status != 503 {
		t.Errorf("a list beside %d others: %d", maxLists, r.status)
	}
	checkError(t, r, "overloaded")
	if r := do(t, "GET", a.url+"/users/1", ""); r.status != 404 {
		t.Errorf("one row beside them: %d %s", r.status, r.body)
	}
	lists.leaveAll(maxLists)
	if r := do(t, "GET", a.url+"/users", ""); r.status != 200 {
		t.Errorf("a list when there is room: %d", r.status)
	}
}

// TestUnreadLists has clients ask for the heaviest lists and not read them. What they keep in
// memory is bounded, others get a 503 meanwhile, and it ends when they leave.
func TestUnreadLists(t *testing.T) {
	dsn := testDatabase(t)
	a := startApp(t, "DATABASE_URL="+dsn)
	const limit = maxUnread / 8 // so that it is reached soon
	a.unread.max = limit
	fillHeavy(t, a, openDB(t, dsn))
	live := func() int64 {
		runtime.GC()
		runtime.GC() // what lies in a sync.Pool goes with the second
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := live()
	small := func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4<<10)
		})
	}
	dialer := net.Dialer{Control: small}
	ask := func() net.Conn {
		c, err := dialer.Dial("tcp", strings.TrimPrefix(a.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "GET /events?event_type=big HTTP/1.1\r\nHost: hop.test\r\n\r\n")
		return c
	}
	var readers []net.Conn
	var most int64
	refused := func() bool {
		return do(t, "GET", a.url+"/events?event_type=big", "").status == 503
	}
	// The kernel takes some of what is sent, and more on one machine than on another.
	for a.unread.n.Load() < limit-maxListed || !refused() {
		if len(readers) > 2000 {
			t.Fatalf("%d readers keep %d bytes only", len(readers), a.unread.n.Load())
		}
		for range 8 {
			readers = append(readers, ask())
		}
		time.Sleep(50 * time.Millisecond) // more at once are refused sooner: for want of connections
		most = max(most, a.unread.n.Load())
	}
	most = max(most, a.unread.n.Load())
	grown := live() - before
	t.Logf("%d readers, %d MiB of lists unread, the heap has grown by %d MiB", len(readers),
		most>>20, grown>>20)
	if most > limit || grown > limit+16<<20 {
		t.Errorf("at most %d MiB are meant, and 16 for connections", limit>>20)
	}
	if r := do(t, "GET", a.url+"/events/none", ""); r.status != 404 {
		t.Errorf("another request: %d", r.status)
	}
	for _, c := range readers {
		c.Close()
	}
	eventually(t, patience, "lists are answered again", func() bool { return !refused() })
	eventually(t, patience, "nothing is unread", func() bool { return a.unread.n.Load() == 0 })
}

// ---- explaining ----

// queryPlan is what EXPLAIN says of a step of a query.
type queryPlan struct {
	Node    string      `json:"Node Type"`
	Index   string      `json:"Index Name"`
	Rows    float64     `json:"Actual Rows"`
	Loops   float64     `json:"Actual Loops"`
	Hit     int         `json:"Shared Hit Blocks"`
	Read    int         `json:"Shared Read Blocks"`
	Removed float64     `json:"Rows Removed by Filter"`
	Plans   []queryPlan `json:"Plans"`
}

// each calls f for a step and all below it.
func (p queryPlan) each(f func(queryPlan)) {
	f(p)
	for _, below := range p.Plans {
		below.each(f)
	}
}

// sorted is how many rows come into a sort.
func (p queryPlan) sorted() float64 {
	rows := 0.0
	for _, below := range p.Plans {
		rows += below.Rows * below.Loops
	}
	return rows
}

// String shows a plan in one line.
func (p queryPlan) String() string {
	var b strings.Builder
	p.each(func(p queryPlan) {
		fmt.Fprintf(&b, "%s %s (%v rows × %v, %v removed, %d buffers); ",
			p.Node, p.Index, p.Rows, p.Loops, p.Removed, p.Hit+p.Read)
	})
	return b.String()
}

// explainReaders lets the store's readers explain each query before they run it. The function that
// it returns gives the plans since its last call.
func explainReaders(t *testing.T, store *Store, dsn string) func() []queryPlan {
	t.Helper()
	inner, err := pq.NewConnector(dsn)
	if err != nil {
		t.Fatal(err)
	}
	e := &explainer{Connector: inner}
	db := sql.OpenDB(e)
	t.Cleanup(func() { db.Close() })
	store.pg.readers.DB.Close()
	store.pg.readers.DB = db
	store.pg.readers.within = backgroundWithin // explaining is slow
	return e.taken
}

// explainer opens connections that explain what they are asked.
type explainer struct {
	driver.Connector
	mu    sync.Mutex // guards plans
	plans []queryPlan
}

// taken returns the plans since the last call.
func (e *explainer) taken() []queryPlan {
	e.mu.Lock()
	defer e.mu.Unlock()
	plans := e.plans
	e.plans = nil
	return plans
}

// Connect makes explainer a driver.Connector.
func (e *explainer) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := e.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return explainedConn{conn.(driverConn), e}, nil
}

// explainedConn is a connection that explains each query before it runs it.
type explainedConn struct {
	driverConn
	explainer *explainer
}

// QueryContext makes explainedConn a driver.QueryerContext.
func (c explainedConn) QueryContext(ctx context.Context, query string,
	args []driver.NamedValue) (driver.Rows, error) {

	rows, err := c.driverConn.QueryContext(ctx,
		"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) "+query, args)
	if err != nil {
		return nil, err
	}
	row := make([]driver.Value, 1)
	err = errors.Join(rows.Next(row), rows.Close())
	if err != nil {
		return nil, err
	}
	text, ok := row[0].([]byte)
	if !ok {
		text = []byte(row[0].(string))
	}
	var out []struct{ Plan queryPlan }
	if err := json.Unmarshal(text, &out); err != nil {
		return nil, err
	}
	c.explainer.mu.Lock()
	c.explainer.plans = append(c.explainer.plans, out[0].Plan)
	c.explainer.mu.Unlock()
	return c.driverConn.QueryContext(ctx, query, args)
}
