package main

import (
	"encoding/base64"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"
)

// What a browser sends, and what an attacker hopes for.
const (
	asBrowser = "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
	asForm    = "Content-Type: application/x-www-form-urlencoded"
	attack    = `"><script>alert(1)</script>`
)

// withPassword is what a browser sends that asked for a name and a password.
func withPassword(password string) string {
	return "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("ann:"+password))
}

// browse asks for a page as a browser and fails the test unless it is one, with this status.
func browse(t testing.TB, a *app, status int, path string, headers ...string) string {
	t.Helper()
	r := do(t, "GET", a.url+path, "", append(headers, asBrowser)...)
	checkPage(t, r, status, path)
	return r.body
}

// submit sends a form as a browser does. The answer is a page with this status, or leads on.
func submit(t testing.TB, a *app, status int, path string, form url.Values,
	headers ...string) reply {

	t.Helper()
	headers = append(headers, asBrowser, asForm, "Sec-Fetch-Site: same-origin")
	r := do(t, "POST", a.url+path, form.Encode(), headers...)
	if status == http.StatusSeeOther {
		if r.status != status || r.body != "" {
			t.Fatalf("POST %s: %d, want %d: %.2000s", path, r.status, status, r.body)
		}
		return r
	}
	checkPage(t, r, status, path)
	return r
}

// checkPage fails unless r is a page with what every page has.
func checkPage(t testing.TB, r reply, status int, what string) {
	t.Helper()
	if r.status != status {
		t.Fatalf("%s: %d, want %d: %.2000s", what, r.status, status, r.body)
	}
	for name, want := range map[string]string{
		"Content-Type":                "text/html; charset=utf-8",
		"Content-Security-Policy":     pagePolicy,
		"X-Content-Type-Options":      "nosniff",
		"Referrer-Policy":             "same-origin",
		"Cache-Control":               "no-store",
		"Set-Cookie":                  "",
		"Access-Control-Allow-Origin": "",
	} {
		if got := r.header.Get(name); got != want {
			t.Errorf("%s: %s: %q, want %q", what, name, got, want)
		}
	}
	if !strings.HasPrefix(r.body, "<!doctype html>\n") || !strings.HasSuffix(r.body, "</html>\n") {
		t.Errorf("%s is no whole page: %s", what, r.body)
	}
	for _, never := range []string{"<script>", "alert(1)<", " style=", "<style", "ZgotmplZ"} {
		if strings.Contains(r.body, never) {
			t.Errorf("%s holds %s: %s", what, never, r.body)
		}
	}
}

// hasAll fails the test unless the page has all these pieces, in this order.
func hasAll(t testing.TB, page string, pieces ...string) {
	t.Helper()
	rest := page
	for _, piece := range pieces {
		_, after, found := strings.Cut(rest, piece)
		if !found {
			t.Errorf("%q is missing, or not in its place: %.3000s", piece, rest)
			return
		}
		rest = after
	}
}

// hasNone fails the test if the page has one of these pieces.
func hasNone(t testing.TB, page string, pieces ...string) {
	t.Helper()
	for _, piece := range pieces {
		if strings.Contains(page, piece) {
			t.Errorf("%q should not be there: %s", piece, page)
		}
	}
}

func TestPageHome(t *testing.T) {
	a := startApp(t)
	hasAll(t, browse(t, a, 200, "/"), "Make a short link", `action="/shorten"`,
		"There is no link yet.")

	for i := range listedLinks + 1 {
		addLink(t, a, fmt.Sprintf("https://example.com/%d", i), fmt.Sprintf("code-%d", i))
	}
	follow(t, a, "/code-20", "https://example.com/20")
	get[wireStats](t, a, 200, "GET", "/stats/code-20", "")
	page := browse(t, a, 200, "/")
	hasAll(t, page, `<li id="link-21">`, `<a href="code-20">code-20</a>`,
		`<a href="code-20+">1 click</a>`, "https://example.com/20", " UTC ", "(just now)",
		`<li id="link-20">`, `<a href="code-19+">0 clicks</a>`, `<li id="link-2">`,
		`href="/?after=2#links" rel="next">Older links`)
	hasNone(t, page, `<li id="link-1">`, "Newest links", "is ready")

	page = browse(t, a, 200, "/?after=2")
	hasAll(t, page, `<li id="link-1">`, "Newest links")
	hasNone(t, page, `<li id="link-2">`, "Older links")

	// A search, by what the API calls it too.
	page = browse(t, a, 200, "/?q=MPLE.COM%2F13&is_active=")
	hasAll(t, page, `value="MPLE.COM/13"`, `<li id="link-14">`)
	hasNone(t, page, `<li id="link-13">`)
	hasAll(t, browse(t, a, 200, "/?q=nowhere"), "No link fits.", `<a href="/">Show all links</a>`)
	page = browse(t, a, 200, "/?q=code&is_active=true")
	hasAll(t, page, `<option value="true" selected>`, `name="back" value="is_active=true&amp;q=code"`,
		`href="/?after=2&amp;is_active=true&amp;q=code#links"`)
	get[wireLink](t, a, 200, "PATCH", "/urls/14", `{"is_active":false}`)
	page = browse(t, a, 200, "/?is_active=false")
	hasAll(t, page, `<option value="false" selected>`, `<li id="link-14">`, "<b>disabled</b>",
		`value="true" aria-label="Enable code-13"`)
	hasNone(t, page, `<li id="link-13">`, "Older links")
	hasAll(t, browse(t, a, 400, "/?after=x&is_active=perhaps"), "<li>after must be an integer",
		"<li>is_active must be true or false")

	// A bookmark fills in the form.
	page = browse(t, a, 200, "/?url=https%3A%2F%2Fexample.com%2F%3Fa%3D%22b&title=A+%3Ctitle%3E")
	hasAll(t, page, `value="https://example.com/?a=&#34;b"`, `value="A &lt;title&gt;"`,
		"javascript:location.href=&#39;http://hop.test/?url=&#39;")
}

// TestPageSearchStops: a search ends in time, says so, and goes on from there.
func TestPageSearchStops(t *testing.T) {
	dsn := testDatabase(t)
	a := startApp(t, "DATABASE_URL="+dsn)
	addLink(t, a, "https://example.com/needle", "needle")
	execSQL(t, openDB(t, dsn), `
		INSERT INTO urls (short_code, original_url, created_at, updated_at)
		SELECT 'hay' || n, 'https://example.com/hay', now(), now() FROM generate_series(1, $1) AS n`,
		searchWindow+10)
	page := browse(t, a, 200, "/?q=needle")
	hasAll(t, page, "No link fits so far.", "Only part of the links was searched", `href="/?after=`)
	next := regexp.MustCompile(`href="(/\?after=[^"#]*)`).FindStringSubmatch(page)[1]
	page = browse(t, a, 200, strings.ReplaceAll(next, "&amp;", "&"))
	hasAll(t, page, `value="needle"`, `<a href="needle">`)
	hasNone(t, page, "Only part")
}

func TestPageForms(t *testing.T) {
	a := startApp(t)
	form := url.Values{
		"original_url": {"example.com/long"}, "custom_code": {"mine"}, "title": {"My " + attack},
		"expires_at": {"2099-01-31T12:00"},
	}
	r := submit(t, a, 303, "/shorten", form)
	if got := r.header.Get("Location"); got != "/?made=mine" {
		t.Fatalf("leads to %s", got)
	}
	hasAll(t, browse(t, a, 200, "/?made=mine"), "Your short link is ready",
		`<a href="http://hop.test/mine">http://hop.test/mine</a>`, "https://example.com/long",
		`<li id="link-1">`, "My &#34;&gt;&lt;script&gt;")
	hasNone(t, browse(t, a, 200, "/?made=other"), "is ready")
	l := get[wireLink](t, a, 200, "GET", "/urls/1", "")
	if l.ExpiresAt != "2099-01-31T12:00:00" || *l.Title != "My "+attack {
		t.Errorf("made %+v", l)
	}

	// What is wrong stands beside its field, and what was typed stays.
	r = submit(t, a, 409, "/shorten", form)
	hasAll(t, r.body, `value="example.com/long"`, `value="mine"`, `aria-invalid="true"`,
		`id="code-problem">was given out before`, `value="My &#34;&gt;&lt;script&gt;`,
		`value="2099-01-31T12:00"`)
	r = submit(t, a, 400, "/shorten", url.Values{
		"original_url": {"nope" + attack}, "custom_code": {"x"}, "title": {strings.Repeat("t", 501)},
		"expires_at": {"2001-01-01T00:00"},
	})
	hasAll(t, r.body, `value="nope&#34;&gt;`, `id="target-problem">must be a URL`,
		`id="code-problem">must be 3 to 32`, `id="title-problem">must be valid`,
		`id="expires-problem">must be in the future`)
	hasNone(t, r.body, `role="alert"`, `id="links"`)
	r = submit(t, a, 404, "/urls", url.Values{"original_url": {"example.com"}, "user_id": {"7"}})
	hasAll(t, r.body, `role="alert">There is no such user.`, `value="example.com"`)
	hasAll(t, submit(t, a, 400, "/urls", url.Values{}).body, `id="target-problem">is required`)
	hasAll(t, submit(t, a, 400, "/shorten", url.Values{"title": {"a", "b"}}).body,
		"The form must not repeat")

	// Disable, enable, delete: back to where the form was, and to nowhere else.
	for back, want := range map[string]string{
		"":                                    "/?#link-1",
		"q=a%26b&is_active=true&after=7":      "/?after=7&is_active=true&q=a%26b#link-1",
		"//evil.example":                      "/?#link-1",
		"after=//evil.example&next=https://x": "/?#link-1",
		"q=%":                                 "/?#link-1",
	} {
		r = submit(t, a, 303, "/urls/1", url.Values{"is_active": {"false"}, "back": {back}})
		if got := r.header.Get("Location"); got != want {
			t.Errorf("back to %q: %s, want %s", back, got, want)
		}
	}
	browse(t, a, 404, "/mine")
	submit(t, a, 303, "/urls/1", url.Values{"is_active": {"true"}})
	follow(t, a, "/mine", "https://example.com/long")
	hasAll(t, submit(t, a, 400, "/urls/1", url.Values{}).body, "<li>body must have")
	r = submit(t, a, 303, "/urls/1/delete", url.Values{"back": {"q=mine"}})
	if got := r.header.Get("Location"); got != "/?q=mine#links" {
		t.Errorf("deleted, and leads to %s", got)
	}
	browse(t, a, 404, "/mine")
	hasAll(t, submit(t, a, 404, "/urls/1", url.Values{"is_active": {"true"}}).body, "Nothing is here")
	hasAll(t, submit(t, a, 404, "/urls/1/delete", nil).body, "Nothing is here")
}

func TestPageLink(t *testing.T) {
	dsn := testDatabase(t)
	a := startApp(t, "DATABASE_URL="+dsn)
	body := fmt.Sprintf(`{"url":%q,"custom_code":"evil","title":%q,"expires_at":"2099-01-31T12:00"}`,
		"https://example.com/?"+attack, attack)
	get[wireLink](t, a, 201, "POST", "/shorten", body)
	page := browse(t, a, 200, "/evil+")
	hasAll(t, page, "http://hop.test/evil", "&#34;&gt;&lt;script&gt;", "Leads to",
		"https://<b>example.com</b>/?&#34;&gt;&lt;script&gt;", `href="http://hop.test/evil"`,
		`class="count">0<`, "(just now)", "2099-01-31 12:00 UTC", "(in 72 years)",
		"Nobody came yet.")
	hasNone(t, page, "<svg", "Last click", "Where people came from", "needs a token")

	for range 3 {
		r := do(t, "GET", a.url+"/evil", "", "Referer: https://news.example/x")
		if r.status != http.StatusFound {
			t.Fatalf("%d %s", r.status, r.body)
		}
	}
	do(t, "GET", a.url+"/evil", "", "User-Agent: Googlebot/2.1")
	execSQL(t, openDB(t, dsn), `
		INSERT INTO clicks_daily (url_id, day, referrer, clicks, bots)
		VALUES (1, CURRENT_DATE - 1, $1, 1234567, 0)`, attack)
	page = browse(t, a, 200, "/evil+")
	hasAll(t, page, `class="count">3<`, "Last click", "(just now)", "counted apart</dt><dd>1<",
		"<svg", `role="img" aria-labelledby="chart-title chart-text"`, "<title", "<desc", "1.5M",
		"1,234,570 clicks from", "Most: 1,234,567 on", "<table>",
		time.Now().UTC().Format(time.DateOnly)+"</td><td>3<", "<td>1,234,567<",
		"Where people came from", "&#34;&gt;&lt;script&gt;", "<td>1,234,567<",
		"news.example</bdi></td><td>3<")
	robots := do(t, "GET", a.url+"/evil+", "", asBrowser).header.Get("X-Robots-Tag")
	if robots != "noindex" {
		t.Errorf("X-Robots-Tag %q", robots)
	}

	// To be looked at is not to be followed.
	st := get[wireStats](t, a, 200, "GET", "/stats/evil", "")
	if st.ClickCount != 3 || st.BotClicks != 1 {
		t.Errorf("%d clicks, %d of bots", st.ClickCount, st.BotClicks)
	}
	execSQL(t, openDB(t, dsn), `UPDATE clicks_daily SET day = day - 90`)
	hasAll(t, browse(t, a, 200, "/evil+"), "Nobody came in the last 90 days.")

	// A sleeping link is shown to who may read the list, with its state.
	get[wireLink](t, a, 200, "PATCH", "/urls/1", `{"is_active":false}`)
	page = browse(t, a, 200, "/evil+")
	hasAll(t, page, "This link is disabled")
	hasNone(t, page, "Follow the link")
	execSQL(t, openDB(t, dsn), `UPDATE urls SET is_active = true, expires_at = '2001-01-01'`)
	hasAll(t, browse(t, a, 200, "/evil+"), "This link is expired", "2001-01-01 00:00 UTC", "years ago")
	get[wireLink](t, a, 204, "DELETE", "/urls/1", "")
	browse(t, a, 404, "/evil+")
}

// TestPageNotFound: whoever follows a link that leads nowhere gets the same status as ever, and a
// way home.
func TestPageNotFound(t *testing.T) {
	a := startApp(t)
	for i, change := range []string{`{"is_active":false}`, `{"expires_at":"2001-01-01T00:00"}`, ""} {
		code := fmt.Sprintf("gone%d", i)
		l := addLink(t, a, "https://example.com/", code)
		at := fmt.Sprintf("/urls/%d", l.ID)
		if change == "" {
			get[wireLink](t, a, 204, "DELETE", at, "")
			continue
		}
		get[wireLink](t, a, 200, "PATCH", at, change)
	}
	want := browse(t, a, 404, "/unknown")
	hasAll(t, want, "Nothing is here", "mistyped", `<a href="/">Go to the start page</a>`)
	for _, path := range []string{
		"/gone0", "/gone1", "/gone2", "/gone0.", "/no/such/path", "/unknown+", "/+", "/a+", "//x",
		"/urls/gone0/redirect", "/urls/99",
	} {
		if got := browse(t, a, 404, path); got != want {
			t.Errorf("%s: %s", path, got)
		}
		if r := do(t, "GET", a.url+path, ""); r.status != 404 {
			t.Errorf("%s: %d without a browser", path, r.status)
		} else {
			checkError(t, r, "not_found")
		}
	}
	if r := do(t, "HEAD", a.url+"/unknown", "", asBrowser); r.status != 404 || r.body != "" {
		t.Errorf("HEAD: %d %q", r.status, r.body)
	}
}

func TestPageErrors(t *testing.T) {
	a := startApp(t)
	for _, c := range []struct {
		method, path, site string
		status             int
		piece              string
	}{
		{"DELETE", "/", "none", 405, "That cannot be done here"},
		{"DELETE", "/users", "none", 405, "Allowed here: GET, HEAD, POST."},
		{"POST", "/shorten", "cross-site", 403, "Not from another site"},
		{"POST", "/shorten/bulk", "none", 400, "The body must be a JSON array."},
		{"GET", "/users?page=x", "none", 400, "<li>page must be an integer"},
		{"GET", "/?q=%01", "none", 400, "<li>q must be"},
	} {
		r := do(t, c.method, a.url+c.path, "", asBrowser, "Sec-Fetch-Site: "+c.site)
		checkPage(t, r, c.status, c.method+" "+c.path)
		hasAll(t, r.body, c.piece, "Go to the start page")
	}
	a.inflight.n.Add(1 << 20)
	r := do(t, "GET", a.url+"/", "", asBrowser)
	a.inflight.n.Add(-1 << 20)
	checkPage(t, r, 503, "with too much in flight")
	hasAll(t, r.body, "Not now", `href="">Try again`)
	if r.header.Get("Retry-After") == "" {
		t.Error("503 without Retry-After")
	}
}

// TestPageTokens: with API_TOKEN set, pages that make or list ask for it with a browser's own
// prompt. Where a link leads everybody may see.
func TestPageTokens(t *testing.T) {
	const reader = "reader-reader-reader-reader-reader"
	a := startApp(t, "API_TOKEN="+anyToken, "READ_TOKEN="+reader)
	token := "Authorization: Bearer " + anyToken
	get[wireLink](t, a, 201, "POST", "/shorten",
		`{"url":"https://example.com/ü?a=1","custom_code":"code","title":"Secret"}`, token)

	asks := func(r reply, what string) {
		t.Helper()
		checkPage(t, r, 401, what)
		want := `Basic realm="hop", charset="UTF-8"`
		if got := r.header.Get("WWW-Authenticate"); got != want {
			t.Errorf("%s: WWW-Authenticate %q", what, got)
		}
		hasAll(t, r.body, "A token is needed", "the token as the password")
		hasNone(t, r.body, "Secret", "example.com")
	}
	for _, path := range []string{"/", "/?q=code", "/code+?figures", "/none+?figures", "/urls"} {
		asks(do(t, "GET", a.url+path, "", asBrowser), path)
		asks(do(t, "GET", a.url+path, "", asBrowser, withPassword(anyToken+"x")), path)
	}
	for _, path := range []string{"/shorten", "/urls", "/urls/1", "/urls/1/delete"} {
		asks(do(t, "POST", a.url+path, "is_active=false", asBrowser, asForm), path)
		r := do(t, "POST", a.url+path, "is_active=false", asBrowser, asForm, withPassword(reader))
		asks(r, path+" as a reader")
	}

	page := browse(t, a, 200, "/code+")
	hasAll(t, page, "https://<b>example.com</b>/%C3%BC?a=1", `href="?figures"`, "needs a token")
	hasNone(t, page, "Secret", "<dl>", "Created")
	for _, password := range []string{anyToken, reader} {
		for _, path := range []string{"/code+", "/code+?figures"} {
			page = browse(t, a, 200, path, withPassword(password))
			hasAll(t, page, "Secret", "https://<b>example.com</b>/ü?a=1", "<dl>")
			hasNone(t, page, "needs a token")
		}
	}
	hasAll(t, browse(t, a, 200, "/", withPassword(anyToken)), `action="/shorten"`, "Secret",
		"Disable", "Delete")
	page = browse(t, a, 200, "/", withPassword(reader))
	hasAll(t, page, "Your token only reads", "Secret")
	hasNone(t, page, `action="/shorten"`, "<button formaction")
	submit(t, a, 303, "/urls/1", url.Values{"is_active": {"false"}}, withPassword(anyToken))
	browse(t, a, 404, "/code+")
	hasAll(t, browse(t, a, 200, "/code+", withPassword(reader)), "This link is disabled")

	// A browser's password is none of other sites' forms.
	r := do(t, "POST", a.url+"/urls/1", "is_active=true", asBrowser, asForm, withPassword(anyToken),
		"Sec-Fetch-Site: cross-site")
	checkPage(t, r, 403, "another site's form")
}

// TestPageOutage: where a link leads is told as long as the link works.
func TestPageOutage(t *testing.T) {
	pg := startPostgres(t)
	a := startApp(t, "DATABASE_URL="+pg.url)
	addLink(t, a, "https://example.com/", "known")
	follow(t, a, "/known", "https://example.com/")
	pg.stopPostgres()
	eventually(t, patience, "hop sees that its database is gone", func() bool {
		return do(t, "GET", a.url+"/urls", "").status == http.StatusServiceUnavailable
	})
	hasAll(t, browse(t, a, 200, "/known+"), "https://<b>example.com</b>/", "cannot be read now")
	hasAll(t, browse(t, a, 503, "/"), "Not now", "Links that are in use go on working.")
	r := submit(t, a, 503, "/shorten", url.Values{"original_url": {"https://example.com/typed"}})
	hasAll(t, r.body, `role="alert">The database cannot answer now`, "https://example.com/typed")
}

// TestPageAddresses: where hop is a part of a site, or has a home of its own, its pages lead there.
func TestPageAddresses(t *testing.T) {
	a := startApp(t, "BASE_URL=https://www.example.com/s")
	r := submit(t, a, 303, "/shorten", url.Values{"original_url": {"example.org"},
		"custom_code": {"one"}})
	if got := r.header.Get("Location"); got != "/s/?made=one" {
		t.Errorf("leads to %s", got)
	}
	page := browse(t, a, 200, "/?made=one")
	hasAll(t, page, `href="/s/style.css?v=`, `href="/s/favicon.ico"`, `<a href="/s/">hop</a>`,
		`href="https://www.example.com/s/one"`, `action="/s/shorten"`, `action="/s/"`)
	if local := regexp.MustCompile(`(href|src|action)="/[^s]`).FindString(page); local != "" {
		t.Errorf("%s leads out of /s", local)
	}

	a = startApp(t, "HOME_URL=https://www.example.com/links", "API_TOKEN="+anyToken)
	for _, accept := range []string{asBrowser, "Accept: */*"} {
		r := do(t, "GET", a.url+"/", "", accept)
		got := r.header.Get("Location")
		if r.status != http.StatusFound || got != "https://www.example.com/links" {
			t.Errorf("%s: %d to %s", accept, r.status, got)
		}
	}
	hasAll(t, browse(t, a, 404, "/unknown"),
		`<a href="https://www.example.com/links">Go to the start page</a>`)
	r = submit(t, a, 303, "/shorten", url.Values{"original_url": {"example.org"},
		"custom_code": {"two"}}, withPassword(anyToken))
	if got := r.header.Get("Location"); got != "/two+" {
		t.Errorf("made, and leads to %s", got)
	}
}

func TestPageFiles(t *testing.T) {
	a := startApp(t)
	version := "?v=" + filesVersion
	for _, c := range []struct{ path, media, cache string }{
		{"/style.css" + version, "text/css; charset=utf-8", "public, max-age=31536000"},
		{"/style.css?v=older", "text/css; charset=utf-8", "public, max-age=0"},
		{"/copy.js" + version, "text/javascript; charset=utf-8", "public, max-age=31536000"},
		{"/copy.js", "text/javascript; charset=utf-8", "public, max-age=0"},
		{"/favicon.ico", "image/svg+xml", "public, max-age=86400"},
		{"/robots.txt", "text/plain; charset=utf-8", "public, max-age=86400"},
	} {
		r := do(t, "GET", a.url+c.path, "")
		if r.status != 200 || r.body == "" || r.header.Get("Content-Type") != c.media ||
			r.header.Get("Cache-Control") != c.cache ||
			r.header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: %d %v", c.path, r.status, r.header)
		}
	}
	hasAll(t, browse(t, a, 200, "/"), "/style.css"+version, "/copy.js"+version)
}

// maxPage is the most bytes of a page with its style and script: a second on a bad line.
const maxPage = 20 << 10

// TestPageSizes: pages stay small, also with as much on them as there can be.
func TestPageSizes(t *testing.T) {
	dsn := testDatabase(t)
	a := startApp(t, "DATABASE_URL="+dsn)
	db := openDB(t, dsn)
	execSQL(t, db, `
		INSERT INTO urls (short_code, original_url, title, click_count, last_clicked_at, expires_at,
		                  created_at, updated_at)
		SELECT 'code' || 1000000 + n, rpad('https://example.com/', 2048, 'x'), repeat('t', 500),
		       1234567 + n, now(), now() + interval '1 year', now() - interval '1 year', now()
		FROM generate_series(1, 100) AS n`)
	execSQL(t, db, `
		INSERT INTO clicks_daily (url_id, day, referrer, clicks, bots)
		SELECT 1, CURRENT_DATE - n, rpad(n || '.example', 40, 'x'), 1234567 + n, 7
		FROM generate_series(0, 89) AS n`)
	files := len(styleFile.content) + len(scriptFile.content)
	for path, status := range map[string]int{
		"/": 200, "/?made=code1000100": 200, "/code1000001+": 200, "/unknown": 404,
	} {
		page := browse(t, a, status, path)
		t.Logf("%s: %d bytes, with style and script %d", path, len(page), len(page)+files)
		if len(page)+files > maxPage {
			t.Errorf("%s has %d bytes and %d of files", path, len(page), files)
		}
	}
}

// TestPageTemplates: templates are short, and hold no code, no style and nothing from elsewhere.
func TestPageTemplates(t *testing.T) {
	const maxLines = 60
	names, err := fs.Glob(webFiles, "web/*")
	if err != nil || len(names) < 8 {
		t.Fatalf("%v, %v", names, err)
	}
	inline := regexp.MustCompile(`(?i)<style|\sstyle=|\son[a-z]+=|<script(>|[^>]* src="[^{])`)
	elsewhere := regexp.MustCompile(`(?i)(src|href|action|url\(|@import)\S*//`)
	for _, name := range names {
		text, err := webFiles.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Count(string(text), "\n")
		if strings.HasSuffix(name, ".html") && lines >= maxLines {
			t.Errorf("%s has %d lines", name, lines)
		}
		for _, never := range []*regexp.Regexp{inline, elsewhere} {
			if found := never.Find(text); found != nil && !strings.HasSuffix(name, ".svg") {
				t.Errorf("%s holds %q", name, found)
			}
		}
	}
}

func TestPrefers(t *testing.T) {
	for accept, want := range map[string]string{
		"": "", "*/*": "", "text/html": "page", "TEXT/HTML;q=0.9, */*": "page",
		"application/xhtml+xml,text/html": "page", "application/json, text/html": "",
		"*/*, text/html": "", "text/plain": "text", "text/plain, */*; q=0.01": "text",
		"application/json, text/plain, */*": "", "text/htmlx": "", ",,": "",
	} {
		r := &http.Request{Header: http.Header{"Accept": {accept}}}
		got := ""
		switch {
		case takesPages(r):
			got = "page"
		case prefers(r, "text/plain"):
			got = "text"
		}
		if got != want {
			t.Errorf("%q: %q, want %q", accept, got, want)
		}
	}
}

func TestMoment(t *testing.T) {
	now := time.Date(2026, time.November, 27, 12, 0, 0, 0, time.UTC)
	for distance, want := range map[time.Duration]string{
		0:                        "just now",
		-59 * time.Second:        "just now",
		59 * time.Second:         "just now",
		time.Minute:              "1 minute ago",
		119 * time.Minute:        "1 hour ago",
		2 * time.Hour:            "2 hours ago",
		day:                      "1 day ago",
		29 * day:                 "29 days ago",
		60 * day:                 "2 months ago",
		364 * day:                "12 months ago",
		365 * day:                "1 year ago",
		2 * 365 * day:            "2 years ago",
		-90 * time.Minute:        "in 1 hour",
		-3 * day:                 "in 3 days",
		-100 * 365 * day:         "in 100 years",
		50 * 5 * 365 * day:       "250 years ago",
		-(day - time.Nanosecond): "in 23 hours",
	} {
		if got := (moment{now.Add(-distance), now}).Ago(); got != want {
			t.Errorf("%v: %s, want %s", distance, got, want)
		}
	}
	if got := (moment{now.In(time.FixedZone("", 3600)), now}).Text(); got != "2026-11-27 12:00" {
		t.Error(got)
	}
}

func TestPageTexts(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0", 999: "999", 1000: "1,000", 123456: "123,456", 10_000_000: "10,000,000",
		-1000: "-1,000", -100: "-100",
	} {
		if got := groupDigits(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
	for _, c := range [][2]string{{"", ""}, {"äöü", "äöü"}, {"äöüß", "äöü…"}} {
		if got := cutText(c[0], 3); got != c[1] {
			t.Errorf("%s: %s, want %s", c[0], got, c[1])
		}
	}
	for target, want := range map[string]targetParts{
		"https://example.com":            {"https://", "example.com", ""},
		"HTTP://example.com:80?a//b":     {"HTTP://", "example.com:80", "?a//b"},
		"https://[2001:db8::1]/a://b#c":  {"https://", "[2001:db8::1]", "/a://b#c"},
		"https://example.com#x/y":        {"https://", "example.com", "#x/y"},
		"https://a.example/b.example/c?": {"https://", "a.example", "/b.example/c?"},
	} {
		if got := splitAtHost(target); got != want {
			t.Errorf("%s: %q", target, got)
		}
	}
}
