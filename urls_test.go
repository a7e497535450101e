package main

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestPutWhatGetGave sends links back whole whose target the rules refuse by now: seeded files and
// earlier settings may have brought them. They may stay, and no other such target may come.
func TestPutWhatGetGave(t *testing.T) {
	dsn := testDatabase(t)
	a := startApp(t, "DATABASE_URL="+dsn)
	db := openDB(t, dsn)
	for _, target := range []string{"http://192.168.1.5/wiki", "http://hop.test/loop", "ftp://a.b/"} {
		id := scalar[int64](t, db, `
			INSERT INTO urls (short_code, original_url, title, created_at, updated_at)
			VALUES (left(md5($1), 10), $1, 'Wiki', now(), now()) RETURNING id`, target)
		path := fmt.Sprintf("%s/urls/%d", a.url, id)
		whole := do(t, "GET", path, "").body
		if r := do(t, "PUT", path, whole); r.status != 200 {
			t.Errorf("PUT of what GET gave: %d %s", r.status, r.body)
		}
		other := strings.Replace(whole, target, "http://192.168.1.6/wiki", 1)
		if r := do(t, "PUT", path, other); r.status != 400 {
			t.Errorf("PUT with another private target: %d %s", r.status, r.body)
		}
	}
}

// TestCreateGivenUp has a create wait so long that its client is told to try again: it is not made
// behind the client's back when its turn comes, and those beside it are.
func TestCreateGivenUp(t *testing.T) {
	queue := &Server{creates: make(chan *creation, 1)} // nobody takes from it
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := httptest.NewRequestWithContext(ctx, "POST", "/shorten", nil)
	f, err := parseObject([]byte(`{"url":"https://example.com/","short_code":"givenup"}`))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := queue.createLink(r, f); !errors.Is(err, errUnavailable) {
		t.Errorf("a create without time: %v", err)
	}
	givenUp := <-queue.creates

	a := startApp(t)
	beside := &creation{
		link: newLink{url: "https://example.com/", code: "beside", custom: true},
		done: make(chan createResult, 1),
	}
	a.creates <- givenUp
	a.creates <- beside
	if made := <-beside.done; made.err != nil {
		t.Errorf("the create beside it: %v", made.err)
	}
	for code, want := range map[string]int{"givenup": 404, "beside": 302} {
		if r := do(t, "GET", a.url+"/"+code, ""); r.status != want {
			t.Errorf("GET /%s: %d, want %d", code, r.status, want)
		}
	}
}
