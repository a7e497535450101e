//go:build linux

package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestPortOfAnotherDatabase starts a hop of another service on the port of one that serves: it
// ends, says why, and nobody has got an answer from it.
func TestPortOfAnotherDatabase(t *testing.T) {
	first := startHop(t, "DATABASE_URL="+testDatabase(t))
	made := do(t, "POST", first.url+"/shorten", `{"original_url":"https://first.example/",
		"custom_code":"first"}`)
	if made.status != http.StatusCreated {
		t.Fatal(made)
	}
	stop := make(chan struct{})
	asked := make(chan string)
	var wrong atomic.Int64
	go func() {
		answers := 0
		for {
			select {
			case <-stop:
				asked <- fmt.Sprintf("%d answers, %d of them wrong", answers, wrong.Load())
				return
			default:
			}
			// A connection each, since the kernel deals out connections and not requests.
			r, err := roundTrip("GET", first.url+"/first", "", "Connection: close")
			if err != nil || r.header.Get("Location") != "https://first.example/" {
				wrong.Add(1)
			}
			answers++
		}
	}()
	second := prepareHop(t, "DATABASE_URL="+testDatabase(t), fmt.Sprintf("PORT=%d", first.port))
	second.start(t)
	select {
	case <-second.done:
	case <-time.After(10 * time.Second):
		t.Error("the second goes on")
	}
	time.Sleep(100 * time.Millisecond)
	close(stop)
	t.Log(<-asked)
	if wrong.Load() > 0 {
		t.Error("users of the first got something else")
	}
	says := fmt.Sprintf("hop: PORT %d belongs to a hop with another database", first.port)
	if code := second.cmd.ProcessState.ExitCode(); code != 1 || !second.logged(t, says) {
		t.Errorf("exit status %d:\n%s", code, second.log(t))
	}
	if second.logged(t, "msg=listening") {
		t.Error("the second has listened")
	}
}

// TestPortOfOneDatabase is what a rolling restart needs: a second hop of the same database listens
// on the port, is ready, and serves alone when the first is gone. One that starts while the
// database is away waits for its turn, and has it when the first is gone.
func TestPortOfOneDatabase(t *testing.T) {
	dsn := "DATABASE_URL=" + testDatabase(t)
	first := startHop(t, dsn)
	do(t, "POST", first.url+"/shorten", `{"original_url":"https://a.example/","custom_code":"both"}`)
	port := fmt.Sprintf("PORT=%d", first.port)
	second := prepareHop(t, dsn, port)
	second.start(t)
	eventually(t, patience, "the second is ready", func() bool {
		return second.logged(t, "msg=ready")
	})
	first.end(syscall.SIGTERM)
	if r := do(t, "GET", second.url+"/both", ""); r.status != http.StatusFound {
		t.Errorf("the second answers %d", r.status)
	}

	lost := prepareHop(t, "DATABASE_URL=postgres://hop@127.0.0.1:1/lost", port)
	lost.start(t)
	eventually(t, patience, "the third waits", func() bool {
		return lost.logged(t, "not ready")
	})
	if lost.logged(t, "msg=listening") {
		t.Error("it listens, and does not know for whom")
	}
	second.end(syscall.SIGTERM)
	eventually(t, patience, "the third listens", func() bool {
		r, err := roundTrip("GET", lost.url+"/both", "")
		return err == nil && r.status == http.StatusServiceUnavailable
	})
}

// TestClaimPort has hops come to a port in all orders.
func TestClaimPort(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	number := freePort(t)
	join := func() *sharedPort {
		p := joinPort(number, log)
		t.Cleanup(p.close)
		return p
	}
	claim := func(p *sharedPort, database string, want error) {
		t.Helper()
		if err := p.claim(t.Context(), database); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", database, err, want)
		}
	}
	first, second := join(), join()
	if !first.isFirst() || second.isFirst() {
		t.Errorf("first %v, second %v", first.isFirst(), second.isFirst())
	}
	claim(second, "a", errPortUnclear) // it listens no sooner than the first knows
	claim(first, "a", nil)
	claim(second, "a", nil)
	third := join()
	if third.isFirst() {
		t.Error("the third is first")
	}
	claim(third, "b", errPortTaken)
	if err := <-third.failed; !strings.Contains(err.Error(), fmt.Sprintf("PORT %d belongs", number)) {
		t.Errorf("it ends with %v", err)
	}
	first.close()
	claim(third, "b", errPortTaken)
	second.close()
	if !third.isFirst() {
		t.Error("nobody is left, and the third is not first")
	}
	claim(third, "b", nil)

	// Nobody else can learn the id of a database.
	names, err := heldNames(third.prefix())
	if err != nil || len(names) != 1 || strings.HasSuffix(names[0], "/b") {
		t.Errorf("held: %q, %v", names, err)
	}
	var nobodys *sharedPort
	claim(nobodys, "a", nil)
	for _, database := range []string{"a", "b"} { // the kernel gives each a port of its own
		p := joinPort(0, log)
		t.Cleanup(p.close)
		claim(p, database, nil)
	}
}
