package main

import (
	"context"
	"errors"
	"net/http/httptest"
	"testing"
)

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
