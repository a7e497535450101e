package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// What Redis can do to hop: hang, die, forget, refuse, speak another protocol.

// keysInRedis is how many keys Redis holds, -1 if it does not say.
func keysInRedis(p *process) int {
	c, err := p.dialRedis()
	if err != nil {
		return -1
	}
	defer c.Close()
	n, err := redis.Int(c.Do("DBSIZE"))
	if err != nil {
		return -1
	}
	return n
}

// withoutRedis are the answers while Redis is away: all works.
var withoutRedis = statuses{
	create: 201, update: 200, stats: 200, list: 200, health: 200, pending: true,
}

func TestFault01RedisPaused(t *testing.T) {
	pause := full(10*time.Second, 3*time.Second)
	faultCase{
		number: 1,
		what:   fmt.Sprintf("Redis SIGSTOP %v", pause),
		p99: func(calm time.Duration) time.Duration {
			return max(5*calm, 50*time.Millisecond)
		},
		fault: func(f *faultRun) {
			f.redis.pause()
			f.wait(pause)
			f.others(withoutRedis)
			f.redis.resume()
			f.mended()
			f.within(5*time.Second, "Redis is used again", func() bool {
				return !f.breakerOpen("redis")
			})
			f.mark(f.hop.logged(f, "redis lost"), "Redis was lost")
		},
	}.run(t)
}

func TestFault02RedisKilled(t *testing.T) {
	gone := full(5*time.Second, 1500*time.Millisecond)
	faultCase{
		number: 2,
		what:   fmt.Sprintf("Redis kill -9, back empty after %v", gone),
		p99: func(calm time.Duration) time.Duration {
			return max(5*calm, 50*time.Millisecond)
		},
		fault: func(f *faultRun) {
			f.redis.kill()
			f.wait(gone)
			f.others(withoutRedis)
			f.redis.start(f)
			f.redis.waitRedis(f)
			f.within(5*time.Second, "Redis is warm", func() bool {
				return keysInRedis(f.redis) >= rigLinks
			})
		},
	}.run(t)
}

func TestFault03RedisFlushed(t *testing.T) {
	const flushes = 3
	hot := full(rigLinks, 50) // fewer than requests between two flushes
	faultCase{
		number: 3,
		what:   fmt.Sprintf("FLUSHALL ×%d under load", flushes),
		hot:    hot,
		fault: func(f *faultRun) {
			before := scrape(f, f.hop.url)["hop_cache_misses_total"]
			for range flushes {
				f.redis.redisDo(f, "FLUSHALL")
				eventually(f, patience, "Redis is warm", func() bool {
					return keysInRedis(f.redis) >= rigLinks
				})
				f.wait(full(2*time.Second, 500*time.Millisecond))
			}
			misses := scrape(f, f.hop.url)["hop_cache_misses_total"] - before
			most := flushes * hot
			f.figure("%.0f lookups asked PostgreSQL", misses)
			f.mark(misses <= float64(most),
				"at most one lookup in PostgreSQL per link and FLUSHALL (%d)", most)
		},
	}.run(t)
}

// TestFault17RedisTLS: the driver's own limit for a TLS handshake is ten seconds.
func TestFault17RedisTLS(t *testing.T) {
	t.Run("stopped", func(t *testing.T) {
		pause := full(10*time.Second, 3*time.Second)
		trusted := newCertificate(t)
		faultCase{
			number: 17,
			what:   fmt.Sprintf("Redis over TLS, SIGSTOP %v", pause),
			stores: func(t *testing.T) *rig {
				return newStores(t, startPostgres(t), startRedisTLS(t, trusted))
			},
			settings: []string{"SSL_CERT_FILE=" + trusted.certFile},
			p99: func(calm time.Duration) time.Duration {
				return max(5*calm, 50*time.Millisecond)
			},
			fault: func(f *faultRun) {
				f.mark(keysInRedis(f.redis) >= rigLinks, "Redis is used over TLS")
				f.redis.pause()
				end := f.askInTurn(f.hop.url, 1, 20*time.Millisecond, createOne, updateOne,
					readStats)
				f.wait(pause)
				f.others(withoutRedis)
				all := end()
				f.redis.resume()
				f.mended()
				f.within(5*time.Second, "Redis is used again", func() bool {
					return !f.breakerOpen("redis")
				})
				f.figure("%s, slowest %s", tally(all), short(slowestOf(all)))
				f.below("creates, updates, stats", slowestOf(all), answerLimit)
				refused := 0
				for _, a := range all {
					if a.status == 503 {
						refused++
					}
				}
				f.mark(few(refused, len(all)), "all work")
			},
		}.run(t)
	})
	t.Run("none", func(t *testing.T) {
		faultCase{
			number: 17,
			what:   "a Redis that speaks no TLS, asked for it",
			stores: func(t *testing.T) *rig {
				r := newStores(t, startPostgres(t), startRedis(t))
				address := strings.Replace(r.redis.url, "redis://", "rediss://", 1)
				r.environment = append(r.environment, "REDIS_URL="+address)
				return r
			},
			bare: true,
			fault: func(f *faultRun) {
				f.hop = prepareHop(f, f.settings()...)
				f.hop.start(f)
				f.within(5*time.Second, "ready", func() bool { return healthy(f.hop.url) })
				f.begin()
				f.allWork("without a handshake")
			},
		}.run(t)
	})
}

// TestFault19RedisRefuses: Redis answers, but not as a Redis of hop's own would. One replica ran
// before that, another is started into it.
func TestFault19RedisRefuses(t *testing.T) {
	type command []any
	for _, c := range []struct {
		name     string
		words    string // of Redis, in hop's warning
		commands []command
	}{
		{"no channels allowed", "NOPERM", []command{
			{"ACL", "SETUSER", "default", "resetchannels", "-@pubsub"},
		}},
		{"no scripts allowed", "NOPERM", []command{
			{"ACL", "SETUSER", "default", "-@scripting"},
		}},
		{"demoted to a replica", "READONLY", []command{
			{"REPLICAOF", "127.0.0.1", "1"}, // nobody is there: it keeps what it has
		}},
		{"full and not evicting", "OOM", []command{
			{"CONFIG", "SET", "maxmemory-policy", "noeviction"},
			{"CONFIG", "SET", "maxmemory", "1mb"},
		}},
		{"wants a password", "NOAUTH", []command{
			{"CONFIG", "SET", "requirepass", "secret"},
			{"CLIENT", "KILL", "TYPE", "normal"},
			{"CLIENT", "KILL", "TYPE", "pubsub"},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			faultCase{
				number: 19,
				what:   "Redis refuses: " + c.name,
				fault: func(f *faultRun) {
					makeMoving(f)
					conn, err := f.redis.dialRedis()
					if err != nil {
						f.Fatal(err)
					}
					defer conn.Close()
					for _, command := range c.commands {
						if _, err := conn.Do(command[0].(string), command[1:]...); err != nil {
							f.Fatalf("%v: %v", command, err)
						}
					}
					f.whileRefused(c.words)
				},
			}.run(t)
		})
	}
}

// movingCode is the code of a link whose target changes.
const movingCode = "moving"

// makeMoving makes that link.
func makeMoving(f *faultRun) {
	f.Helper()
	r := do(f, "POST", f.hop.url+"/shorten",
		`{"url":"https://example.com/moved/0","custom_code":"`+movingCode+`"}`)
	if r.status != 201 {
		f.Fatalf("%d %s", r.status, r.body)
	}
}

// leadsTo is where a redirect of the moving link leads on a hop.
func leadsTo(f *faultRun, hop *process) string {
	f.Helper()
	return do(f, "HEAD", hop.url+"/"+movingCode, "").header.Get("Location")
}

// whileRefused starts a second replica and marks that both work, that changes made on one show on
// the other, and that neither fills its log.
func (f *faultRun) whileRefused(words string) {
	f.Helper()
	second := prepareHop(f, f.settings()...)
	second.start(f)
	f.within(5*time.Second, "a second replica is ready", func() bool { return healthy(second.url) })
	f.allWork("refused")
	id := scalar[int64](f, f.db, `SELECT id FROM urls WHERE short_code = $1`, movingCode)
	var slowest time.Duration
	for i := range full(10, 3) {
		leadsTo(f, second) // it is in its caches
		target := fmt.Sprintf("https://example.com/moved/%d", i+1)
		path := fmt.Sprintf("/urls/%d", id)
		r := do(f, "PUT", f.hop.url+path, `{"original_url":"`+target+`"}`)
		changed := time.Now()
		if r.status != 200 {
			f.Fatalf("PUT %s: %d %s", path, r.status, r.body)
		}
		if got := leadsTo(f, f.hop); got != target {
			f.Errorf("the writer's replica serves %s after %s", got, target)
		}
		eventually(f, 2*time.Second+noise(), "the other replica serves the change", func() bool {
			return leadsTo(f, second) == target
		})
		slowest = max(slowest, time.Since(changed))
	}
	f.figure("a change shows elsewhere after at most %s", short(slowest))
	f.below("changes elsewhere", slowest, 2*time.Second)
	before := redisWarnings(f, f.hop, second)
	f.wait(full(15*time.Second, 2*time.Second))
	after := redisWarnings(f, f.hop, second)
	f.figure("%d lines in two logs", len(after))
	const most = 2 * 3 // one for each command that is refused
	f.mark(len(after) == len(before) && len(after) <= most, "no growing log")
	f.mark(strings.Contains(strings.Join(after, ""), words), "Redis's own words are logged")
	if f.Failed() {
		f.Logf("warnings:\n%s", strings.Join(after[:min(len(after), 10)], ""))
	}
}

// redisWarnings are the lines above level info that speak of Redis.
func redisWarnings(f *faultRun, hops ...*process) []string {
	f.Helper()
	var warnings []string
	for _, hop := range hops {
		for line := range strings.Lines(hop.log(f)) {
			loud := strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR")
			if loud && strings.Contains(strings.ToLower(line), "redis") {
				warnings = append(warnings, line)
			}
		}
	}
	return warnings
}
