//go:build cluster

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Whether hops add up: redirects a second of one, two and three, each held to a part of a core, so
// that the load and the stores have room on the same machine.

const (
	// hopCPU is the part of a core that each hop gets, in percent: three of them and what their
	// redirects cost the load and PostgreSQL fit on two cores.
	hopCPU = 8

	// addUp is how much of three times one hop's redirects three hops must answer.
	addUp = 0.8
)

// cpuGroup makes a control group whose processes get percent of a core, and returns the file that
// pids are written to. Version 1 and 2 of the kernel's interface are known.
func cpuGroup(t testing.TB, percent int) string {
	t.Helper()
	const period = 100_000 // µs, the kernel's own
	name := fmt.Sprintf("hop-test-%d-%d", os.Getpid(), time.Now().UnixNano())
	quota := percent * period / 100
	var failures error
	for _, version := range []struct{ root, file, value string }{
		{"/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", strconv.Itoa(quota)},
		{"/sys/fs/cgroup", "cpu.max", fmt.Sprintf("%d %d", quota, period)},
	} {
		dir := filepath.Join(version.root, name)
		err := os.Mkdir(dir, 0o755)
		if err == nil {
			t.Cleanup(func() { os.Remove(dir) })
			err = writeExisting(filepath.Join(dir, version.file), version.value)
		}
		if err == nil {
			return filepath.Join(dir, "cgroup.procs")
		}
		failures = errors.Join(failures, err)
	}
	t.Skipf("SKIPPED, no control groups to limit a hop with: %v", failures)
	return ""
}

// writeExisting writes to a file that exists.
func writeExisting(name, text string) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(text)
	return err
}

// cpuTime is what a process and its children have used so far.
func (p *process) cpuTime() time.Duration {
	const tick = 10 * time.Millisecond // of /proc, on every Linux
	var ticks int
	for _, pid := range p.tree() {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue // it has ended: its parent has its time
		}
		_, after, _ := strings.Cut(string(text), ") ")
		fields := strings.Fields(after)
		for _, field := range fields[11:15] { // user and system, own and of ended children
			n, _ := strconv.Atoi(field)
			ticks += n
		}
	}
	return time.Duration(ticks) * tick
}

// TestClusterScale lets ever more hops answer as many redirects as they can.
func TestClusterScale(t *testing.T) {
	if !fullLength {
		t.Skip("SKIPPED: the short form measures nothing")
	}
	f := newClusterRun(t, 50, fmt.Sprintf("redirects/s of 1, 2 and 3 hops on %d %% of a core each",
		hopCPU))
	groups := make([]string, hopCount)
	for i := range groups {
		groups[i] = cpuGroup(t, hopCPU)
	}
	f.rig = newStores(t, startPostgres(t), startRedis(t))
	var hops []*process
	for range hopCount {
		hops = append(hops, startHop(t, f.settings()...))
	}
	for i, hop := range hops {
		if err := writeExisting(groups[i], strconv.Itoa(hop.cmd.Process.Pid)); err != nil {
			t.Skipf("SKIPPED, no control groups to limit a hop with: %v", err)
		}
	}
	var rates []float64
	for n := 1; n <= hopCount; n++ {
		rates = append(rates, f.saturate(hops[:n]))
	}
	f.figure("%.2f and %.2f times one hop", rates[1]/rates[0], rates[2]/rates[0])
	f.mark(rates[2] > addUp*hopCount*rates[0], "three hops answer %.1f times one at least",
		addUp*hopCount)
}

// saturate asks hops for as many redirects as they answer, and tells how many that is a second and
// what it costs the stores.
func (f *faultRun) saturate(hops []*process) float64 {
	f.Helper()
	const conns = 16 // to each hop
	stop := make(chan struct{})
	var answered, failed atomic.Int64
	var clients sync.WaitGroup
	for _, hop := range hops {
		for n := range conns {
			first := n * len(f.aims) / conns
			clients.Go(func() { f.askOn(hop, first, stop, &answered, &failed) })
		}
	}
	f.wait(time.Second)
	began := time.Now()
	before := answered.Load()
	postgres := f.pg.cpuTime()
	redis := f.redis.cpuTime()
	f.wait(full(8*time.Second, 2*time.Second))
	took := time.Since(began).Seconds()
	rate := float64(answered.Load()-before) / took
	postgres = f.pg.cpuTime() - postgres
	redis = f.redis.cpuTime() - redis
	close(stop)
	clients.Wait()
	f.figure("%d: %.0f/s, PostgreSQL %.0f %% of a core, Redis %.0f %%", len(hops), rate,
		100*postgres.Seconds()/took, 100*redis.Seconds()/took)
	f.mark(failed.Load() == 0 && rate > 0, "0 failed")
	return rate
}

// askOn is one client: it asks for one link after another until stop is closed.
func (f *faultRun) askOn(hop *process, first int, stop <-chan struct{},
	answered, failed *atomic.Int64) {

	c, err := dialLoad(hop.hostPort())
	if err != nil {
		failed.Add(1)
		return
	}
	defer c.Close()
	for i := first; ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		a := f.aims[i%len(f.aims)]
		r, reusable, err := c.do(a.request)
		if err != nil || !reusable || redirects(a, r) != "" {
			failed.Add(1)
			return
		}
		answered.Add(1)
	}
}
