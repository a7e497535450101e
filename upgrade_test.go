package main

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Upgrades and restores: the same links, clicks and events before and after, whatever takes over
// from whom while people click.

// firstRelease is the commit of the first release.
const firstRelease = "be1dc69"

// buildRelease builds hop as it was at a commit, or skips the test where the history is not there.
func buildRelease(t testing.TB, commit string) string {
	t.Helper()
	dir := t.TempDir()
	archive := filepath.Join(dir, "hop.tar")
	out, err := exec.Command("git", "archive", "-o", archive, commit).CombinedOutput()
	if err != nil {
		t.Skipf("SKIPPED: no git history back to %s (a shallow clone, or no repository): %s",
			commit, out)
	}
	source := filepath.Join(dir, "source")
	if err := os.Mkdir(source, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("tar", "-xf", archive, "-C", source).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	build := exec.Command("go", "build", "-o", "hop", ".")
	build.Dir = source
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("the release of %s does not build: %v: %s", commit, err, out)
	}
	return filepath.Join(source, "hop")
}

// startRelease starts a hop of another release, and waits until it says that it is ready. Its port
// may be shared with one that runs.
func startRelease(t testing.TB, binary string, settings ...string) *process {
	t.Helper()
	p := prepareHop(t, settings...)
	current := p.command
	p.command = func() *exec.Cmd {
		cmd := current()
		cmd.Path = binary
		return cmd
	}
	p.start(t)
	p.waitLogged(t, "msg=ready")
	return p
}

// waitLogged waits until the process has logged text.
func (p *process) waitLogged(t testing.TB, text string) {
	t.Helper()
	eventually(t, patience, "the log says "+text, func() bool { return p.logged(t, text) })
}

// TestRollingUpgrade lets the new release take over from the first one, which then takes over
// again, and at last the new one: on the same port, directory and database, while people click and
// make links. None of them is refused, and nothing is lost.
func TestRollingUpgrade(t *testing.T) {
	old := buildRelease(t, firstRelease)
	current, err := hopBinary()
	if err != nil {
		t.Fatal(err)
	}
	f := newFaultRun(t, 30, "upgrade from the first release, roll back, upgrade again")
	pg := startPostgres(t)
	redis := startRedis(t)
	settings := []string{
		"DATABASE_URL=" + pg.url, "REDIS_URL=" + redis.url, "BASE_URL=http://hop.test",
		"DATA_DIR=" + t.TempDir(), fmt.Sprintf("PORT=%d", freePort(t)),
	}
	hop := startRelease(t, old, settings...)
	f.rig = &rig{pg: pg, redis: redis, hop: hop, db: openDB(t, pg.url)}
	f.fillLinks(t)

	f.redirectAt(f.hop, full(2000, 200), full(200, 50), f.aims)
	conns := full(20, 4) // each is used several times while hop drains, and told to close
	made := f.create(f.hop, full(100, 20), conns)
	f.wait(full(3*time.Second, time.Second))
	for _, binary := range []string{current, old, current} {
		next := startRelease(t, binary, settings...)
		f.hop.end(syscall.SIGTERM)
		f.logRefusals(f.hop)
		f.hop = next
		f.wait(full(3*time.Second, time.Second))
		if binary == old {
			f.readsOnFirstRelease()
		}
	}
	created := made.figures(whole)
	missing := made.missing(t, f.db)
	f.figure("creates: %s, %d made, %d refused, missing %d", created.failures(), made.made(),
		made.denied, missing)
	allowed := full(0, created.n/50) // a small machine under other tests answers some too late
	f.mark(made.denied <= allowed && made.made() > 0, "creates are made")
	f.mark(created.failed == closedIdle(created) && created.failed <= conns,
		"a create fails only if it meets the end of an idle connection")
	f.mark(missing == 0 && made.twice == 0, "no link is lost")
	f.hops = []*process{f.hop}
	f.judge(faultCase{mayFail: !fullLength})
	f.logRefusals(f.hop)
	redirected := f.loads[0].figures(whole)
	f.mark(redirected.failed <= full(0, redirected.n/50), "no redirect fails")
	f.mark(balanced(t, pg.url), "the books balance")
}

// closedIdle counts the requests that left on a connection which the server was about to close, for
// it was idle and the server ends. HTTP/1.1 cannot rule that out (RFC 9112, 9.3.1): clients send
// such a request again if it is a GET, or has an Idempotency-Key.
func closedIdle(sum figures) int {
	n := 0
	for why, times := range sum.whys {
		if strings.HasPrefix(why, "broken: ") {
			n += times
		}
	}
	return n
}

// logRefusals logs what a hop has refused, and why.
func (f *faultRun) logRefusals(hop *process) {
	f.Helper()
	for line := range strings.Lines(hop.log(f)) {
		if strings.Contains(line, "status=503") || strings.Contains(line, "level=WARN") {
			f.Log(strings.TrimSpace(line))
		}
	}
}

// readsOnFirstRelease asks the first release for what the new one has written.
func (f *faultRun) readsOnFirstRelease() {
	f.Helper()
	for _, path := range []string{"/urls?per_page=10", "/stats/f0000", "/events?per_page=1000",
		"/events?event_type=click&per_page=1000", "/urls/1", "/health"} {
		r := do(f, "GET", f.hop.url+path, "")
		f.mark(r.status == http.StatusOK, "the first release reads what the new one wrote")
		if r.status != http.StatusOK {
			f.Logf("GET %s: %d %s", path, r.status, r.body)
		}
	}
}

// TestBackup dumps the database while people click and make links, restores it elsewhere, and
// starts hop on it: what was in the dump is there, and the books balance.
func TestBackup(t *testing.T) {
	pg := startPostgres(t)
	redis := startRedis(t)
	f := newFaultRun(t, 31, "pg_dump under load, restored elsewhere")
	f.rig = newStores(t, pg, redis)
	f.hop = startHop(t, f.settings()...)
	clicks := f.redirectAt(f.hop, full(2000, 200), full(200, 50), f.aims)
	made := f.create(f.hop, full(200, 50), 20)
	f.wait(full(3*time.Second, 500*time.Millisecond))
	flushClicks(t, f.hop.url)
	before := made.made()
	dump := filepath.Join(t.TempDir(), "hop.dump")
	runTool(t, "pg_dump", "--format=custom", "--file="+dump, pg.url)
	f.wait(full(2*time.Second, 200*time.Millisecond))
	clicks.stop()
	made.stop()

	other := startPostgres(t)
	runTool(t, "pg_restore", "--exit-on-error", "--no-owner", "--dbname="+other.url, dump)
	f.mark(balanced(t, other.url), "the restored books balance")
	restored := openDB(t, other.url)
	// Two databases must not have one name: Redis and journals tell them apart by it.
	execSQL(t, restored,
		`UPDATE hop_meta SET value = md5(random()::text) WHERE key = 'database'`)
	links := scalar[int](t, restored, `SELECT count(*) FROM urls`)
	counted := scalar[int64](t, restored, `SELECT sum(click_count)::bigint FROM urls`)
	hop := startHop(t, "DATABASE_URL="+other.url, "REDIS_URL="+redis.url)
	r := do(t, "GET", hop.url+"/f0007", "")
	after := do(t, "POST", hop.url+"/shorten", `{"url":"https://example.com/after"}`)
	f.figure("%d links made before the dump, %d in it, %d clicks in it", before,
		links-rigLinks, counted)
	f.mark(links >= rigLinks+before && counted > 0, "all links made before are there")
	f.mark(r.header.Get("Location") == "https://example.com/7" && after.status == 201,
		"redirects and creates work")
	flushClicks(t, hop.url)
	f.mark(scalar[int64](t, restored, `SELECT sum(click_count)::bigint FROM urls`) == counted+1,
		"clicks are counted on")
	f.mark(balanced(t, other.url), "the books still balance")
}

// runTool runs one of PostgreSQL's client programs.
func runTool(t testing.TB, name string, args ...string) {
	t.Helper()
	out, err := exec.Command(pgBin(t, name), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
}

// TestReproducible builds the binary as releases do, in two directories, and compares the bytes.
func TestReproducible(t *testing.T) {
	var built [2][]byte
	for i := range built {
		dir := t.TempDir()
		copySources(t, dir)
		build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w",
			"-o", "hop.out", ".")
		build.Dir = dir
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		var err error
		built[i], err = os.ReadFile(filepath.Join(dir, "hop.out"))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(built[i]), dir) {
			t.Errorf("the binary knows that it was built in %s", dir)
		}
	}
	if string(built[0]) != string(built[1]) {
		t.Error("two builds of the same files differ")
	}
}

// copySources copies all files that hop is built from.
func copySources(t testing.TB, dir string) {
	t.Helper()
	const format = "{{range .GoFiles}}{{.}}\n{{end}}{{range .EmbedFiles}}{{.}}\n{{end}}"
	list, err := exec.Command("go", "list", "-f", format, ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append(strings.Fields(string(list)), "go.mod", "go.sum", "default.pgo") {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
