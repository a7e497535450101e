//go:build cluster

package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The cluster suite: hop on more than one machine, as far as one machine can show it. The engines
// are Debian's, on loopback, started and ended by the tests: PostgreSQL with a standby, Redis with
// Sentinels, HAProxy. Every case prints one line of the table in docs/scaling.md.
//
//	make cluster                  all of it, about ten minutes
//	CLUSTER=short make cluster    a short form of each case, a minute
//
// This file holds what the cases share and those with several hops; cluster_postgres_test.go and
// cluster_redis_test.go hold the failovers.

// CLUSTER=short asks for the short form.
func init() {
	fullLength = os.Getenv("CLUSTER") != "short"
}

// newClusterRun begins the line of a case.
func newClusterRun(t *testing.T, number int, what string) *faultRun {
	f := newFaultRun(t, number, what)
	f.suite = "CLUSTER"
	return f
}

const (
	// clusterRate is how many redirects a second the cases ask for in full, and clusterCreates how
	// many links they make. Two cores shared with three engines answer these without queues.
	clusterRate    = 1000
	clusterCreates = 100

	// clusterConns is how many connections make them: as many answers may take their 550 ms at once.
	clusterConns = 100
)

// redirectsPerSecond is the rate of redirects.
func redirectsPerSecond() int { return full(clusterRate, clusterRate/3) }

// createsPerSecond is the rate of creates.
func createsPerSecond() int { return full(clusterCreates, clusterCreates/2) }

// killTree ends a process and its children at one instant, as the end of their machine does. The
// children of a PostgreSQL that is killed alone would go on for a moment.
func (p *process) killTree() {
	p.pause()
	for _, pid := range p.tree() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	<-p.done
}

// ---- HAProxy ----

// haproxyHead is what all configurations begin with. Hop itself ends every answer in 15 s.
const haproxyHead = `
defaults
    timeout connect 1s
    timeout client 1m
    timeout server 1m
`

// startHAProxy starts a HAProxy whose configuration goes on as sections say. It listens on port.
func startHAProxy(t testing.TB, port int, sections string) *process {
	t.Helper()
	bin, err := exec.LookPath("haproxy")
	if err != nil {
		bin = "/usr/sbin/haproxy" // which is not on every user's PATH
	}
	if _, err := os.Stat(bin); err != nil {
		need(t, "haproxy", err)
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "haproxy.cfg")
	if err := os.WriteFile(config, []byte(haproxyHead+sections), 0o644); err != nil {
		t.Fatal(err)
	}
	p := &process{
		port:    port,
		url:     fmt.Sprintf("http://127.0.0.1:%d", port),
		logFile: filepath.Join(dir, "haproxy.log"),
	}
	p.command = func() *exec.Cmd { return exec.Command(bin, "-db", "-f", config) }
	p.start(t)
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("haproxy:\n%s", p.log(t))
		}
	})
	return p
}

// agentOf starts a small HTTP server that says 200 while a PostgreSQL answers and takes writes, as
// Patroni's does, and returns its port.
func agentOf(t testing.TB, node *process) int {
	t.Helper()
	config, _, err := databaseConfig(node.url)
	if err != nil {
		t.Fatal(err)
	}
	pg := openPostgres(config, 2, slog.New(slog.DiscardHandler))
	t.Cleanup(pg.close)
	agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := pg.probe(r.Context()); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			io.WriteString(w, err.Error())
		}
	}))
	t.Cleanup(agent.Close)
	_, port, _ := strings.Cut(strings.TrimPrefix(agent.URL, "http://"), ":")
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// ---- what a load saw ----

// firstDone is when the first request that was sent since from was answered with status. It is 0 if
// none was.
func (l *load) firstDone(from time.Duration, status int) time.Duration {
	l.stop()
	var first time.Duration
	for _, s := range l.shots {
		if s.sent < from || int(s.status) != status {
			continue
		}
		if first == 0 || s.done < first {
			first = s.done
		}
	}
	return first
}

// longestGap is the longest time without an answer of that status, from the one before from on.
func (l *load) longestGap(from time.Duration, status int) time.Duration {
	l.stop()
	var done []time.Duration
	for _, s := range l.shots {
		if int(s.status) == status {
			done = append(done, s.done)
		}
	}
	slices.Sort(done)
	var longest time.Duration
	for i := 1; i < len(done); i++ {
		if done[i] >= from {
			longest = max(longest, done[i]-done[i-1])
		}
	}
	return longest
}
