package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// What the REST contract says that takes more to see than one request after the other: two at once,
// waiting, thousands of rows. Each is run without Redis and with it.

// bothWays runs check on a hop without Redis and on one with it, each on an empty database.
func bothWays(t *testing.T, check func(t *testing.T, a *app)) {
	t.Helper()
	for _, redis := range []string{"disabled", "up"} {
		t.Run("redis "+redis, func(t *testing.T) {
			check(t, startREST(t, redis, nil))
		})
	}
}

// A process that is about to end says so to balancers, and goes on serving.
func TestRESTDraining(t *testing.T) {
	bothWays(t, func(t *testing.T, a *app) {
		addLink(t, a, "https://example.com/", "draining")
		a.draining.Store(true)
		h := get[wireHealth](t, a, 503, "GET", "/health", "")
		if h.Status != "unavailable" || !h.Draining {
			t.Errorf("draining: %+v", h)
		}
		if r := do(t, "GET", a.url+"/health/live", ""); r.status != http.StatusOK {
			t.Errorf("live while draining: %d", r.status)
		}
		follow(t, a, "/draining", "https://example.com/")
	})
}

// Of two users who are made at once with the same name, or the same e-mail, one wins.
func TestRESTTwoUsersAtOnce(t *testing.T) {
	bothWays(t, func(t *testing.T, a *app) {
		const rounds = 5
		for i := range rounds {
			bodies := []string{
				fmt.Sprintf(`{"username":"twin%d","email":"twin%d-a@example.com"}`, i, i),
				fmt.Sprintf(`{"username":"twin%d","email":"twin%d-b@example.com"}`, i, i),
				fmt.Sprintf(`{"username":"pair%d-a","email":"pair%d@example.com"}`, i, i),
				fmt.Sprintf(`{"username":"pair%d-b","email":"pair%d@example.com"}`, i, i),
			}
			statuses := make([]int, len(bodies))
			var wg sync.WaitGroup
			for n, body := range bodies {
				wg.Go(func() {
					r, err := roundTrip("POST", a.url+"/users", body)
					if err != nil {
						t.Error(err)
					}
					statuses[n] = r.status
				})
			}
			wg.Wait()
			for _, pair := range [][]int{statuses[:2], statuses[2:]} {
				slices.Sort(pair)
				if !slices.Equal(pair, []int{201, 409}) {
					t.Errorf("two at once: %v", pair)
				}
			}
		}
		if n := len(get[[]wireUser](t, a, 200, "GET", "/users", "")); n != 2*rounds {
			t.Errorf("%d users, want %d", n, 2*rounds)
		}
	})
}

// updated_at moves on with every change, also within one second. A change that changes nothing
// leaves no event.
func TestRESTUpdatedAt(t *testing.T) {
	bothWays(t, func(t *testing.T, a *app) {
		l := addLink(t, a, "https://example.com/", "version")
		path := fmt.Sprintf("/urls/%d", l.ID)
		for i, method := range []string{"PUT", "PATCH", "PUT", "PUT"} {
			body := fmt.Sprintf(`{"title":"v%d"}`, i/2)
			next := get[wireLink](t, a, 200, method, path, body)
			if next.UpdatedAt <= l.UpdatedAt || next.CreatedAt != l.CreatedAt {
				t.Errorf("%s after %s, created %s", next.UpdatedAt, l.UpdatedAt, next.CreatedAt)
			}
			l = next
		}
		list := fmt.Sprintf("/events?url_id=%d&event_type=updated", l.ID)
		if events := get[[]wireEvent](t, a, 200, "GET", list, ""); len(events) != 2 {
			t.Errorf("%d updated events, want 2: %+v", len(events), events)
		}
	})
}

// A link that ends is 404 from that second on, is not counted then, and may be given more time.
func TestRESTExpiry(t *testing.T) {
	bothWays(t, func(t *testing.T, a *app) {
		end := time.Now().UTC().Truncate(time.Second).Add(4 * time.Second)
		l := get[wireLink](t, a, 201, "POST", "/shorten", fmt.Sprintf(
			`{"url":"https://example.com/","custom_code":"brief","expires_at":%q}`,
			end.Format(time.RFC3339)))
		if l.ExpiresAt != end.Format(wireTime) {
			t.Errorf("expires_at %q", l.ExpiresAt)
		}
		eventually(t, patience, "the link has ended", func() bool {
			asked := time.Now()
			r := do(t, "GET", a.url+"/brief", "")
			if r.status == http.StatusNotFound && time.Now().Before(end) {
				t.Fatalf("404 %v before the end", time.Until(end))
			}
			if r.status == http.StatusFound && asked.After(end.Add(time.Second)) {
				t.Fatalf("302 %v after the end", asked.Sub(end))
			}
			return r.status == http.StatusNotFound
		})
		checkError(t, do(t, "GET", a.url+"/urls/brief/redirect", ""), "not_found")
		before := get[wireStats](t, a, 200, "GET", "/stats/brief", "").ClickCount
		checkError(t, do(t, "GET", a.url+"/brief", ""), "not_found")
		after := get[wireStats](t, a, 200, "GET", "/stats/brief", "").ClickCount
		if after != before || before == 0 {
			t.Errorf("clicks %d, then %d", before, after)
		}
		get[wireLink](t, a, 200, "PUT", fmt.Sprintf("/urls/%d", l.ID), `{"expires_at":null}`)
		follow(t, a, "/brief", "https://example.com/")
	})
}

// GET /events and GET /stats see every redirect that was answered before, also while others keep
// the counting busy.
func TestRESTClicksAtOnce(t *testing.T) {
	bothWays(t, func(t *testing.T, a *app) {
		l := addLink(t, a, "https://example.com/", "counted")
		addLink(t, a, "https://example.com/", "other")
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
				}
				if _, err := roundTrip("GET", a.url+"/other", ""); err != nil {
					t.Error(err)
				}
			}
		})
		defer wg.Wait()
		defer close(stop)
		list := fmt.Sprintf("/events?url_id=%d&event_type=click", l.ID)
		for i := 1; i <= 40; i++ {
			follow(t, a, []string{"/counted", "/urls/counted/redirect"}[i%2], "https://example.com/")
			if i%3 == 0 {
				st := get[wireStats](t, a, 200, "GET", "/stats/counted", "")
				if st.ClickCount != int64(i) {
					t.Fatalf("stats: %d after %d redirects", st.ClickCount, i)
				}
				continue
			}
			if n := len(get[[]wireEvent](t, a, 200, "GET", list, "")); n != i {
				t.Fatalf("events: %d after %d redirects", n, i)
			}
		}
	})
}

// Whoever follows the Link header of a list gets every row once, in order, in pages of at most
// 1,000 rows.
func TestRESTLists(t *testing.T) {
	dsn := testDatabase(t)
	a := startApp(t, "DATABASE_URL="+dsn)
	db := openDB(t, dsn)
	for _, statement := range []string{
		`INSERT INTO users (username, email, created_at)
		 SELECT 'u' || i, 'u' || i || '@example.com', now() FROM generate_series(1, 2050) AS i`,
		`INSERT INTO urls (user_id, short_code, original_url, is_active, created_at, updated_at)
		 SELECT 1 + i % 2, 'code' || i, 'https://example.com/', i % 3 > 0, now(), now()
		 FROM generate_series(1, 2050) AS i`,
		`INSERT INTO events (url_id, user_id, event_type, timestamp, details)
		 SELECT 1, 1 + i % 2, 'seen', now(), '{}' FROM generate_series(1, 2050) AS i`,
	} {
		execSQL(t, db, statement)
	}
	for _, c := range []struct {
		path        string
		rows, pages int
	}{
		{"/users", 2050, 3},
		{"/urls", 2050, 3},
		{"/events", 2050, 3},
		{"/users?per_page=410", 2050, 5}, // the last page is full, so it has no next one
		{"/urls?user_id=1&per_page=500", 1025, 3},
		{"/urls?is_active=false&user_id=2", 342, 1},
		{"/urls?is_active=true", 1367, 2},
		{"/urls?short_code=code7", 1, 1},
		{"/urls?original_url=https://example.com/", 2050, 3},
		{"/urls?q=code&per_page=1000", 2050, 3},
		{"/events?url_id=1&user_id=2&event_type=seen", 1025, 2},
		{"/events?event_type=seen&page=2&per_page=1000", 1050, 2},
		{"/events?page=3&per_page=1000&event_type=seen", 50, 1},
		{"/events?event_type=seen&after=2049&per_page=10", 1, 1},
	} {
		ids, pages := walkList(t, a, c.path)
		if len(ids) != c.rows || pages != c.pages || !slices.IsSorted(ids) {
			t.Errorf("%s: %d rows on %d pages, want %d on %d; sorted: %v",
				c.path, len(ids), pages, c.rows, c.pages, slices.IsSorted(ids))
		}
	}
	newest, pages := walkList(t, a, "/urls?sort=-created")
	slices.Reverse(newest)
	if len(newest) != 2050 || pages != 3 || !slices.IsSorted(newest) {
		t.Errorf("newest first: %d rows on %d pages", len(newest), pages)
	}
	if clicks, pages := walkList(t, a, "/urls?sort=-clicks"); len(clicks) != 2050 || pages != 3 {
		t.Errorf("most clicks first: %d rows on %d pages", len(clicks), pages)
	}
}

// walkList follows a list's Link headers to the end, and returns the ids of its rows, none of them
// twice, and the number of pages.
func walkList(t *testing.T, a *app, path string) (ids []int64, pages int) {
	t.Helper()
	seen := map[int64]bool{}
	for path != "" {
		r := do(t, "GET", a.url+path, "")
		if r.status != http.StatusOK {
			t.Fatalf("%s: %d %s", path, r.status, r.body)
		}
		var rows []struct{ ID int64 }
		r.json(t, &rows)
		if len(rows) > 1000 {
			t.Fatalf("%s: %d rows", path, len(rows))
		}
		for _, row := range rows {
			if seen[row.ID] {
				t.Fatalf("%s: %d again", path, row.ID)
			}
			seen[row.ID] = true
			ids = append(ids, row.ID)
		}
		pages++
		link := r.header.Get("Link")
		target, isNext := strings.CutSuffix(link, `>; rel="next"`)
		next, isLink := strings.CutPrefix(target, "<http://hop.test")
		if !isLink {
			next, isLink = strings.CutPrefix(target, "<")
		}
		if link != "" && !(isNext && isLink) {
			t.Fatalf("%s: Link %q", path, link)
		}
		path = next
	}
	return ids, pages
}

// A users.csv of 100,000 rows is loaded in seconds, and new users come after it.
func TestRESTManyUsers(t *testing.T) {
	bothWays(t, func(t *testing.T, a *app) {
		const rows = 100_000
		var file strings.Builder
		file.WriteString(csvHead)
		padding := strings.Repeat("x", 100)
		for i := 1; i <= rows; i++ {
			fmt.Fprintf(&file, "%d,user%d-%s,user%d@example.com,2025-01-01 10:00:00\n",
				i, i%99_000, padding, i)
		}
		patient := &http.Client{Timeout: 2 * time.Minute}
		start := time.Now()
		resp, err := patient.Post(a.url+"/users/bulk", "text/csv", strings.NewReader(file.String()))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		took := time.Since(start)
		t.Logf("%d users in %v", rows, took)
		var loaded wireLoaded
		err = json.NewDecoder(resp.Body).Decode(&loaded)
		if err != nil || resp.StatusCode != http.StatusCreated || loaded.Imported != rows {
			t.Errorf("%d, %v: %+v", resp.StatusCode, err, loaded)
		}
		if took > time.Minute { // a few seconds where nothing else runs
			t.Errorf("took %v", took)
		}
		if u := get[wireUser](t, a, 201, "POST", "/users", annJSON); u.ID != rows+1 {
			t.Errorf("next id %d", u.ID)
		}
	})
}

// A users.csv with a bad row near its end leaves nothing behind, not even used-up ids.
func TestRESTBulkAllOrNothing(t *testing.T) {
	bothWays(t, func(t *testing.T, a *app) {
		var file strings.Builder
		file.WriteString(csvHead)
		for i := 1; i <= 12_000; i++ {
			email := "a@example.com"
			if i == 11_999 {
				email = "nobody"
			}
			fmt.Fprintf(&file, "%d,u%d,%s,2025-01-01 10:00:00\n", i, i, email)
		}
		r := do(t, "POST", a.url+"/users/bulk", file.String(), "Content-Type: text/csv")
		if r.status != http.StatusBadRequest {
			t.Fatalf("%d %s", r.status, r.body)
		}
		checkError(t, r, "invalid_csv line 12000, column email")
		if left := get[[]wireUser](t, a, 200, "GET", "/users", ""); len(left) != 0 {
			t.Errorf("%d users left", len(left))
		}
		if u := get[wireUser](t, a, 201, "POST", "/users", annJSON); u.ID != 1 {
			t.Errorf("the sequence moved to %d", u.ID)
		}
	})
}

// 1,000 links and their events are made by one statement and one commit.
func TestRESTManyLinks(t *testing.T) {
	dsn := testDatabase(t)
	a := startApp(t, "DATABASE_URL="+dsn)
	get[wireUser](t, a, 201, "POST", "/users", annJSON)
	const item = `{"user_id":1,"title":"A title",` +
		`"original_url":"https://example.com/a/rather/ordinary/path?with=query"},`
	body := "[" + strings.Repeat(item, 999) + `{"original_url":"https://example.com/last"}]`
	start := time.Now()
	answer := get[wireBulk](t, a, 200, "POST", "/urls/bulk", body)
	t.Logf("1,000 links in %v", time.Since(start))
	codes := map[string]bool{}
	for i, r := range answer.Results {
		if r.Status != http.StatusCreated || r.URL == nil || r.Error != "" ||
			r.URL.ShortURL != "http://hop.test/"+r.URL.ShortCode {
			t.Fatalf("item %d: %+v", i, r)
		}
		codes[r.URL.ShortCode] = true
	}
	last := answer.Results[len(answer.Results)-1].URL.OriginalURL
	if len(codes) != 1000 || last != "https://example.com/last" {
		t.Errorf("%d codes, the last item is %s", len(codes), last)
	}
	db := openDB(t, dsn)
	for what, c := range map[string]struct {
		query string
		want  int
	}{
		"statements that made the links": {`
			SELECT count(DISTINCT xmin::text || ' ' || cmin::text) FROM urls`, 1},
		"transactions that made links and events": {`
			SELECT count(DISTINCT e.xmin::text) FROM events AS e
			JOIN urls AS u ON u.id = e.url_id AND u.xmin = e.xmin`, 1},
		"created events": {`SELECT count(*) FROM events WHERE event_type = 'created'`, 1000},
	} {
		if n := scalar[int](t, db, c.query); n != c.want {
			t.Errorf("%s: %d, want %d", what, n, c.want)
		}
	}
}

// A link leads to its target as soon as it is made, also when many are made at once.
func TestRESTVisibleAtOnce(t *testing.T) {
	bothWays(t, func(t *testing.T, a *app) {
		var wg sync.WaitGroup
		for n := range 8 { // creates that share a commit
			wg.Go(func() {
				for i := range 10 {
					code := fmt.Sprintf("code-%d-%d", n, i)
					target := "https://example.com/" + code
					body := fmt.Sprintf(`{"url":%q,"custom_code":%q}`, target, code)
					made, err := roundTrip("POST", a.url+"/shorten", body)
					if err != nil || made.status != http.StatusCreated {
						t.Errorf("%v, %d %s", err, made.status, made.body)
					}
					r, err := roundTrip("GET", a.url+"/"+code, "")
					if err != nil || r.header.Get("Location") != target {
						t.Errorf("%s: %v, %d", code, err, r.status)
					}
				}
			})
		}
		wg.Wait()
	})
}
