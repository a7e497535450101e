package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"testing/fstest"
	"time"
)

// TestRoundTrip makes users, links and events through the API, with all that it accepts, exports
// them and loads them into an empty database of a hop with other settings: every list and every
// figure is equal, and every code answers as before.
func TestRoundTrip(t *testing.T) {
	a := startApp(t, "ALLOW_PRIVATE=on")
	w := &world{app: a, r: rand.New(rand.NewPCG(1, 2))}
	w.makeUsers(t)
	w.makeLinks(t)
	w.changeLinks(t)
	w.click(t)
	w.makeEvents(t)
	w.removeUsers(t)

	lists := w.lists(t, a)
	files := exportFiles(t, a.store)
	if len(files) != 5 {
		t.Fatalf("%d files exported, want 5", len(files))
	}
	for range 2 {
		store, url := seededStore(t, files)
		diffFiles(t, exportFiles(t, store), files)
		b := startApp(t, "DATABASE_URL="+url, "BASE_URL=https://own.example")
		for path, want := range lists {
			if got := askUntilAnswered(t, b.url+path).body; got != want {
				t.Errorf("%s: %s\nwant %s", path, got, want)
			}
		}
		smallClicks := `SELECT count(*) FROM events WHERE event_type = 'click'
			AND json_typeof(details) <> 'object'`
		was := scalar[int](t, a.store.pg.readers.DB, smallClicks)
		is := scalar[int](t, b.store.pg.readers.DB, smallClicks)
		if was == 0 || is < was {
			t.Errorf("%d clicks are stored small, of %d before", is, was)
		}
		for _, code := range append(w.codes, "unknown") {
			want := askUntilAnswered(t, a.url+"/"+code)
			got := askUntilAnswered(t, b.url+"/"+code)
			before := want.header.Get("Location")
			after := got.header.Get("Location")
			if got.status != want.status || before != after {
				t.Errorf("/%s: %d to %q, before %d to %q", code, got.status, after, want.status,
					before)
			}
		}
		lists = w.lists(t, b) // with the clicks just made
		files = exportFiles(t, store)
		b.stop()
	}
}

// world is what the test has made.
type world struct {
	*app
	r     *rand.Rand
	users []int64
	links []int64
	codes []string
}

// roundTexts are titles and names that files could trip over.
var roundTexts = []string{
	"plain", "comma, semicolon; tab and 'quotes'", `"quoted"`, `back\slash`, "=SUM(A1:A9)",
	"#hash", "True", "NULL", "0", "1e3", "ünïcode", strings.Repeat("日本", 250), "👩‍👩‍👧", `\.`,
	"\u202eturned",
	"-", "<b>&amp;</b>", `{"a":1}`, "no\u00a0break",
}

// roundTargets are targets that a hop with ALLOW_PRIVATE takes. Some lead to where the second hop
// says that it is itself.
var roundTargets = []string{
	"https://example.com/", "example.com/page?a=b,c;d", "http://127.0.0.1:9999/x",
	"http://[::1]/", "http://printer/", "https://own.example/back", "https://example.com/é?q=日本",
	`https://example.com/?q="<>` + "`" + `\`, "https://example.com/100%", "HTTPS://EXAMPLE.com#x",
	"https://example.com/" + strings.Repeat("x", 2028), "https://example.com/a\u200db",
	"https://example.com/$1&x=y'z",
}

// roundDetails are details of events, as clients may send them.
var roundDetails = []string{
	`{}`, `{"a":[1,2.50,-3e2,null,true,"x"]}`, `{"text":"comma, \"quote\", \\ and \u00e9 é"}`,
	"{\r\n\t\"lines\": \"of\\nJSON\"\r\n}", `{"short_code":"mine"}`, `{"<script>":"&"}`,
	`{"deep":{"er":{"and":{"er":[[[]]]}}}}`,
}

// makeUsers makes users one by one and from a file.
func (w *world) makeUsers(t *testing.T) {
	for i, name := range roundTexts {
		body := jsonText(map[string]string{
			"username": name,
			"email":    fmt.Sprintf("u+%d'é@example.com", i),
		})
		w.users = append(w.users, get[wireUser](t, w.app, 201, "POST", "/users", body).ID)
	}
	file := csvHead + "700,same,same@example.com,2020-02-29 23:59:59\n" +
		"701,same,same@example.com,0001-01-01 00:00:00\n" +
		fmt.Sprintf("%d,far,far@example.com,9999-12-31 23:59:59\n", maxUploadedID)
	get[wireLoaded](t, w.app, 201, "POST", "/users/bulk", file, "Content-Type: text/csv")
	w.users = append(w.users, 700, 701, maxUploadedID)
	w.users = append(w.users, get[wireUser](t, w.app, 201, "POST", "/users", annJSON).ID)
}

// makeLinks makes links of all kinds.
func (w *world) makeLinks(t *testing.T) {
	for i := range 80 {
		body := map[string]any{"original_url": roundTargets[i%len(roundTargets)]}
		if w.r.IntN(2) == 0 {
			body["title"] = " " + roundTexts[w.r.IntN(len(roundTexts))] + " "
		}
		if w.r.IntN(2) == 0 {
			body["short_code"] = fmt.Sprintf("%d-_%d", i, i)
		}
		if w.r.IntN(3) > 0 {
			body["user_id"] = w.users[w.r.IntN(len(w.users))]
		}
		if w.r.IntN(4) == 0 {
			body["expires_at"] = "2099-12-31T23:59:59.5+02:00"
		}
		if w.r.IntN(5) == 0 {
			body["is_active"] = false
		}
		path := []string{"/urls", "/shorten"}[i%2]
		link := get[wireLink](t, w.app, 201, "POST", path, jsonText(body))
		w.links = append(w.links, link.ID)
		w.codes = append(w.codes, link.ShortCode)
	}
}

// changeLinks changes some links, lets some end and deletes some.
func (w *world) changeLinks(t *testing.T) {
	past := time.Now().Add(-time.Hour).UTC().Format(wireTime)
	changes := []string{
		`{"title":null}`, `{"title":"new, \"title\""}`, `{"is_active":false}`, `{"is_active":true}`,
		`{"original_url":"http://10.0.0.1/new"}`, `{"expires_at":null}`,
		`{"expires_at":"2031-01-31T12:00"}`, `{"expires_at":"` + past + `"}`,
	}
	for i, change := range changes {
		path := fmt.Sprintf("/urls/%d", w.links[3*i])
		get[wireLink](t, w.app, 200, "PATCH", path, change)
	}
	for i := range 8 {
		do(t, "DELETE", fmt.Sprintf("%s/urls/%d", w.url, w.links[3*i+1]), "")
	}
}

// click follows all links, as people and as bots, with and without a referrer.
func (w *world) click(t *testing.T) {
	agents := []string{
		"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
		"User-Agent: Googlebot/2.1",
	}
	for i, code := range w.codes {
		for n := range 1 + i%3 {
			headers := []string{agents[w.r.IntN(len(agents))]}
			if n > 0 {
				headers = append(headers, fmt.Sprintf("Referer: https://r%d.example/page", i%4))
			}
			do(t, "GET", w.url+"/"+code, "", headers...)
		}
	}
}

// makeEvents reports events, some of which look nearly, or exactly, like counted clicks.
func (w *world) makeEvents(t *testing.T) {
	links := get[[]wireLink](t, w.app, 200, "GET", "/urls", "")
	for i, link := range links {
		details := roundDetails[i%len(roundDetails)]
		kind := roundTexts[i%len(roundTexts)]
		userID := w.users[i%len(w.users)]
		switch i % 4 {
		case 1:
			kind = "click"
		case 2:
			kind = "click"
			details = jsonText(map[string]any{
				"short_code": link.ShortCode, "original_url": link.OriginalURL,
			})
		case 3:
			kind = "click"
			details = string(createdDetails(link.ShortCode, link.OriginalURL))
			if link.UserID != nil {
				userID = *link.UserID
			}
		}
		body := fmt.Sprintf(`{"event_type":%s,"url_id":%d,"user_id":%d,"details":%s}`,
			jsonText(kind), link.ID, userID, details)
		get[wireEvent](t, w.app, 201, "POST", "/events", body)
	}
}

// removeUsers removes some users who have links and events.
func (w *world) removeUsers(t *testing.T) {
	for _, id := range w.users[2:6] {
		r := do(t, "DELETE", fmt.Sprintf("%s/users/%d", w.url, id), "")
		if r.status != 204 {
			t.Fatalf("DELETE user %d: %d %s", id, r.status, r.body)
		}
	}
}

// lists are the answers to all that can be asked about what was made.
func (w *world) lists(t *testing.T, a *app) map[string]string {
	t.Helper()
	askUntilAnswered(t, a.url+"/events") // counts the last clicks
	paths := []string{
		"/users", "/urls", "/urls?sort=-clicks", "/urls?sort=-created", "/urls?is_active=true",
		"/urls?is_active=false", "/urls?q=example", "/events", "/events?event_type=click",
		"/events?event_type=created", "/events?event_type=updated", "/events?event_type=deleted",
	}
	for _, id := range w.users {
		paths = append(paths, fmt.Sprintf("/users/%d", id), fmt.Sprintf("/urls?user_id=%d", id),
			fmt.Sprintf("/events?user_id=%d", id))
	}
	for i, id := range w.links {
		paths = append(paths, fmt.Sprintf("/urls/%d", id), fmt.Sprintf("/events?url_id=%d", id),
			"/stats/"+w.codes[i], "/urls?short_code="+w.codes[i])
	}
	answers := map[string]string{}
	for _, path := range paths {
		answers[path] = askUntilAnswered(t, a.url+path).body
	}
	return answers
}

// askUntilAnswered asks again where a busy machine made hop say that it cannot answer now.
func askUntilAnswered(t *testing.T, url string) reply {
	t.Helper()
	var r reply
	eventually(t, patience, "an answer to "+url, func() bool {
		r = do(t, "GET", url, "")
		return r.status != http.StatusServiceUnavailable
	})
	return r
}

// seededStore loads files into an empty database and returns its store and its URL.
func seededStore(t *testing.T, files fstest.MapFS) (*Store, string) {
	t.Helper()
	url := testDatabase(t)
	store, _ := storeAt(t, url)
	if err := store.seed(t.Context(), files, io.Discard); err != nil {
		t.Fatal(err)
	}
	return store, url
}
