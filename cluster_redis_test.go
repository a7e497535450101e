//go:build cluster

package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// Redis with failover: three Sentinels, a primary and a replica. Three hops ask the Sentinels for
// the primary, and the coherence checker writes and asks through them, as in coherence_test.go.

const (
	// sentinelMaster is the name that Sentinels know the primary by.
	sentinelMaster = "mymaster"

	// Sentinels and the replica log in as sentinelUser, and hops as hopUser, so that a partition
	// can shut out the ones and nobody else.
	sentinelUser     = "keeper"
	sentinelPassword = "kept"
	hopUser          = "hop:hopped"

	// downAfter is how long the Sentinels wait for an answer. Debian's own setting is 30 s.
	downAfter = time.Second

	// failoverWithin is how long a failover, or its end, may take. Sentinels look at some things
	// every 10 s only.
	failoverWithin = 40 * time.Second
)

// sentinels is the three of them and the two servers that they watch.
type sentinels struct {
	watchers []*process
	servers  []*process
}

// startSentinels starts all five.
func startSentinels(t *testing.T) *sentinels {
	t.Helper()
	s := &sentinels{}
	for range 2 {
		s.servers = append(s.servers, s.startServer(t))
	}
	eventually(t, failoverWithin, "the replica follows", func() bool {
		return linked(s.servers[1])
	})
	for range 3 {
		s.watchers = append(s.watchers, s.startSentinel(t))
	}
	eventually(t, failoverWithin, "the Sentinels know each other and the replica", s.settled)
	return s
}

// startServer starts a Redis, which follows the first if there is one.
func (s *sentinels) startServer(t *testing.T) *process {
	t.Helper()
	port := freePort(t)
	name, password, _ := strings.Cut(hopUser, ":")
	args := []string{
		"--port", strconv.Itoa(port),
		"--user", "default", "off",
		"--user", name, "on", ">" + password, "~*", "&*", "+@all",
		"--user", sentinelUser, "on", ">" + sentinelPassword, "~*", "&*", "+@all",
		"--masteruser", sentinelUser, "--masterauth", sentinelPassword,
		"--repl-diskless-sync-delay", "0", "--repl-timeout", "5",
	}
	if len(s.servers) > 0 {
		args = append(args, "--replicaof", "127.0.0.1", strconv.Itoa(s.servers[0].port))
	}
	url := fmt.Sprintf("redis://%s@127.0.0.1:%d/0", hopUser, port)
	return startRedisAt(t, port, url, args)
}

// startSentinel starts one Sentinel.
func (s *sentinels) startSentinel(t *testing.T) *process {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "sentinel.conf")
	port := freePort(t)
	text := fmt.Sprintf(`
port %d
bind 127.0.0.1
dir %s
sentinel monitor %[3]s 127.0.0.1 %[4]d 2
sentinel auth-user %[3]s %[5]s
sentinel auth-pass %[3]s %[6]s
sentinel down-after-milliseconds %[3]s %[7]d
sentinel failover-timeout %[3]s 5000
`, port, dir, sentinelMaster, s.servers[0].port, sentinelUser, sentinelPassword,
		downAfter.Milliseconds())
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	bin, err := exec.LookPath("redis-server")
	if err != nil {
		need(t, "redis-server", err)
	}
	p := &process{port: port, url: fmt.Sprintf("redis://127.0.0.1:%d", port)}
	p.command = func() *exec.Cmd { return exec.Command(bin, config, "--sentinel") }
	p.start(t)
	t.Cleanup(p.kill)
	p.waitRedis(t)
	return p
}

// url is the REDIS_URL of the hops.
func (s *sentinels) url() string {
	var hosts []string
	for _, w := range s.watchers {
		hosts = append(hosts, w.hostPort())
	}
	return "redis+sentinel://" + hopUser + "@" + strings.Join(hosts, ",") + "/" + sentinelMaster
}

// about is what a Sentinel says about the primary.
func about(watcher *process) map[string]string {
	c, err := watcher.dialRedis()
	if err != nil {
		return nil
	}
	defer c.Close()
	said, _ := redis.StringMap(c.Do("SENTINEL", "MASTER", sentinelMaster)) // an error is nothing
	return said
}

// settled says whether all Sentinels see the same primary well, with its replica and each other.
func (s *sentinels) settled() bool {
	primary := s.primary()
	for _, w := range s.watchers {
		said := about(w)
		if primary == nil || said["port"] != strconv.Itoa(primary.port) ||
			said["flags"] != "master" || said["num-slaves"] != "1" ||
			said["num-other-sentinels"] != "2" {
			return false
		}
	}
	return linked(s.other(primary))
}

// linked says whether a server follows another and has all of its data.
func linked(server *process) bool {
	c, err := server.dialRedis()
	if err != nil {
		return false
	}
	defer c.Close()
	said, err := redis.String(c.Do("INFO", "replication"))
	return err == nil && strings.Contains(said, "master_link_status:up")
}

// primary is the server that the first Sentinel names, nil if it names none.
func (s *sentinels) primary() *process {
	port := about(s.watchers[0])["port"]
	for _, server := range s.servers {
		if port == strconv.Itoa(server.port) {
			return server
		}
	}
	return nil
}

// other is the server that one is not.
func (s *sentinels) other(one *process) *process {
	if s.servers[0] == one {
		return s.servers[1]
	}
	return s.servers[0]
}

// promoted waits until the Sentinels name another primary than old, and says how long that took.
func (s *sentinels) promoted(t *testing.T, old *process) time.Duration {
	t.Helper()
	began := time.Now()
	eventually(t, failoverWithin, "another primary", func() bool {
		now := s.primary()
		return now != nil && now != old
	})
	return time.Since(began)
}

// ---- the faults ----

// redisFailover is one way of losing the primary. sick begins it, and well ends it when another
// one is the primary. Both get the old primary.
type redisFailover struct {
	name string
	sick func(t *testing.T, old *process)
	well func(t *testing.T, old *process)
}

// redisFailovers are all of them. The short form has the first.
var redisFailovers = []redisFailover{
	{
		name: "partition with two primaries",
		sick: shutOut,
		well: func(t *testing.T, old *process) {
			old.redisDo(t, "ACL", "SETUSER", sentinelUser, "on")
			// Sentinels that could not log in would not try again for 15 s.
			old.redisDo(t, "CLIENT", "KILL", "USER", "default")
		},
	},
	{
		name: "kill -9 of the primary",
		sick: func(_ *testing.T, old *process) { old.kill() },
		well: func(t *testing.T, old *process) {
			old.start(t) // empty, and a primary in its own eyes, until the Sentinels tell it
			old.waitRedis(t)
		},
	},
	{
		name: "frozen primary",
		sick: func(_ *testing.T, old *process) { old.pause() },
		well: func(_ *testing.T, old *process) { old.resume() },
	},
}

// shutOut keeps the Sentinels and the replica from a server, which goes on to serve the hops.
func shutOut(t *testing.T, server *process) {
	t.Helper()
	server.redisDo(t, "ACL", "SETUSER", sentinelUser, "off")
	server.redisDo(t, "CLIENT", "KILL", "USER", sentinelUser)
	server.redisDo(t, "CLIENT", "KILL", "TYPE", "replica")
}

// TestClusterRedis loses the primary again and again while three hops are written to and asked.
func TestClusterRedis(t *testing.T) {
	for i, k := range redisFailovers[:full(len(redisFailovers), 1)] {
		t.Run(k.name, func(t *testing.T) {
			f := newClusterRun(t, 30+i, "Redis with Sentinel, "+k.name)
			s := startSentinels(t)
			c := newSentinelChecker(t, k.name, s)
			var took []time.Duration
			length := full(40*time.Second, 3*time.Second)
			c.run(length, *coherenceSeed, func(c *checker, r *rand.Rand, stop <-chan struct{}) {
				for pause(r, 300*time.Millisecond, 900*time.Millisecond, stop) {
					took = append(took, s.failOver(t, k, r, stop))
					c.faults.Add(1)
				}
			})
			c.redis = s.primary()
			c.judge()
			if len(c.problems) == 0 {
				c.settle()
			}
			c.report()
			f.judgeCoherence(c, took)
		})
	}
}

// failOver loses the primary once, leaves it so for a while, and waits until all is well. It
// returns how long nobody was the primary, or in a partition, only the old one.
func (s *sentinels) failOver(t *testing.T, k redisFailover, r *rand.Rand,
	stop <-chan struct{}) time.Duration {

	t.Helper()
	old := s.primary()
	k.sick(t, old)
	took := s.promoted(t, old)
	for range 4 {
		if !pause(r, 100*time.Millisecond, 700*time.Millisecond, stop) {
			break
		}
		s.breakOne(old, r)
	}
	k.well(t, old)
	eventually(t, failoverWithin, "the Sentinels are content", s.settled)
	return took
}

// breakOne breaks one connection of a hop to a server that is not the primary any more but still
// answers: that hop then finds the new one, and the others stay. A server that does not answer is
// left alone.
func (s *sentinels) breakOne(old *process, r *rand.Rand) {
	c, err := old.dialRedis()
	if err != nil {
		return
	}
	defer c.Close()
	list, err := redis.String(c.Do("CLIENT", "LIST", "TYPE", "normal"))
	if err != nil {
		return
	}
	lines := strings.Split(strings.TrimSpace(list), "\n")
	id, _, _ := strings.Cut(strings.TrimPrefix(lines[r.IntN(len(lines))], "id="), " ")
	c.Do("CLIENT", "KILL", "ID", id) // it may have gone by itself
}

// newSentinelChecker starts the checker's PostgreSQL and three hops on the Sentinels.
func newSentinelChecker(t *testing.T, name string, s *sentinels) *checker {
	t.Helper()
	pg := startPostgres(t, "-c", "fsync=off")
	c := newChecker(t, name, pg.url)
	c.elsewhere = trustFor
	c.redis = s.servers[0]
	c.names = c.currentNames
	for range replicaCount {
		a := startApp(t, "DATABASE_URL="+pg.url, "REDIS_URL="+s.url(), "CLICK_EVENTS=off",
			"LOG_LEVEL=info", "BASE_URL=http://hop.test")
		c.places = append(c.places, &place{url: a.url, app: a, local: a.localEntries})
	}
	c.awaitPolls()
	c.awaitRedis()
	return c
}

// judgeCoherence makes a line of the checker's findings.
func (f *faultRun) judgeCoherence(c *checker, took []time.Duration) {
	f.Helper()
	var slowest time.Duration
	for _, d := range took {
		slowest = max(slowest, d)
	}
	f.figure("%d failovers, each within %s", len(took), short(slowest))
	f.figure("redirects failed %d of %d", c.refused.Load(), c.compared+c.refused.Load())
	f.figure("%d writes, %d unsure", c.writes.Load(), c.maybes.Load())
	f.figure("old elsewhere at most %s, on the writer's own %s", short(c.worstElsewhere),
		short(c.worstOwn))
	f.figure("wrong %d, left in caches %d", c.wrong, c.left)
	f.mark(len(took) > 0, "there was a failover")
	f.mark(c.refused.Load() == 0 && c.compared > 0, "0 redirects failed")
	f.mark(c.stale == 0, "nothing older than %s", short(c.elsewhere))
	f.mark(c.wrong == 0 && c.left == 0, "all is true at the end")
	c.verdict()
}
