package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"
)

// settingsOf is a getenv that knows "NAME=value" and nothing else.
func settingsOf(settings ...string) func(string) string {
	env := map[string]string{}
	for _, s := range settings {
		k, v, _ := strings.Cut(s, "=")
		env[k] = v
	}
	return func(name string) string { return env[name] }
}

var tokenA, tokenB = strings.Repeat("A", 32), strings.Repeat("B", 40)

func TestConfigValues(t *testing.T) {
	defaults := Config{Port: 8080, BaseURL: "http://localhost:8080", DBConns: defaultConns(), DataDir: "data", LocalCache: 100_000,
		MaxInFlight: 4096, ClickEvents: true, LogLevel: slog.LevelInfo}
	with := func(change func(*Config)) Config { c := defaults; change(&c); return c }
	tests := []struct {
		name string
		env  []string
		want Config
	}{
		{"nothing set", nil, defaults},
		{"blank is not set", []string{"PORT=", "DATA_DIR=  ", "API_TOKEN= , ,", "LOG_LEVEL=\t"}, defaults},
		{"everything set", []string{"PORT=80", "BASE_URL=https://hop.example", "DATABASE_URL=postgres://a@db/x", "DATABASE_PUBLIC_URL=host=public",
			"DB_CONNS=7", "REDIS_URL=rediss://r:6379/1", "API_TOKEN=" + tokenA + ", " + tokenB, "DATA_DIR=/var/lib/hop", "LOCAL_CACHE=640",
			"MAX_INFLIGHT=10", "CLICK_EVENTS=off", "ALLOW_PRIVATE=1", "LOG_LEVEL=debug"},
			Config{80, "https://hop.example", "postgres://a@db/x", "host=public", 7, "rediss://r:6379/1", []string{tokenA, tokenB}, "/var/lib/hop",
				640, 10, false, true, slog.LevelDebug}},
		{"spaces around a value", []string{"PORT= 81 ", "DATABASE_URL= host=x "},
			with(func(c *Config) { c.Port, c.BaseURL, c.DatabaseURL = 81, "http://localhost:81", "host=x" })},
		{"slash after BASE_URL", []string{"BASE_URL=http://hop.test/"}, with(func(c *Config) { c.BaseURL = "http://hop.test" })},
		{"path in BASE_URL", []string{"BASE_URL=http://hop.test/s/"}, with(func(c *Config) { c.BaseURL = "http://hop.test/s" })},
		{"lowest", []string{"PORT=0", "DB_CONNS=2", "LOCAL_CACHE=64", "MAX_INFLIGHT=1"},
			with(func(c *Config) {
				c.Port, c.BaseURL, c.DBConns, c.LocalCache, c.MaxInFlight = 0, "http://localhost:0", 2, 64, 1
			})},
		{"highest", []string{"PORT=65535", "DB_CONNS=1000", "LOCAL_CACHE=100000000", "MAX_INFLIGHT=10000"},
			with(func(c *Config) {
				c.Port, c.BaseURL, c.DBConns, c.LocalCache, c.MaxInFlight = 65535, "http://localhost:65535", 1000, 100_000_000, 10_000
			})},
		{"log level in capitals", []string{"LOG_LEVEL=WARN"}, with(func(c *Config) { c.LogLevel = slog.LevelWarn })},
		{"a token with a trailing comma", []string{"API_TOKEN=" + tokenA + ","}, with(func(c *Config) { c.APITokens = []string{tokenA} })},
	}
	for _, word := range []string{"1", "true", "on", "yes", "ON", "True"} {
		tests = append(tests, struct {
			name string
			env  []string
			want Config
		}{"on as " + word, []string{"ALLOW_PRIVATE=" + word}, with(func(c *Config) { c.AllowPrivate = true })})
	}
	for _, word := range []string{"0", "false", "off", "no", "OFF"} {
		tests = append(tests, struct {
			name string
			env  []string
			want Config
		}{"off as " + word, []string{"CLICK_EVENTS=" + word}, with(func(c *Config) { c.ClickEvents = false })})
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := loadConfig(settingsOf(tt.env...))
			if err != nil || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("loadConfig = %+v, %v\nwant %+v", got, err, tt.want)
			}
		})
	}
}

func TestConfigRefusesBadValues(t *testing.T) {
	const (
		port, conns, cache, inflight = "a number from 0 to 65535", "a number from 2 to 1000", "a number from 64 to 100000000", "a number from 1 to 10000"
		onOff, baseURL, redisURL     = "on or off", "an http:// or https:// URL", "a redis:// or rediss:// URL"
		token, level                 = "one or more tokens of at least 32 bytes, separated by commas", "debug, info, warn or error"
	)
	tests := []struct{ name, value, want string }{
		{"PORT", "-1", port}, {"PORT", "65536", port}, {"PORT", "http", port}, {"PORT", "80 80", port}, {"PORT", "8080.0", port},
		{"DB_CONNS", "1", conns}, {"DB_CONNS", "1001", conns}, {"DB_CONNS", "many", conns},
		{"LOCAL_CACHE", "63", cache}, {"LOCAL_CACHE", "100000001", cache}, {"LOCAL_CACHE", "1e6", cache},
		{"MAX_INFLIGHT", "0", inflight}, {"MAX_INFLIGHT", "10001", inflight}, {"MAX_INFLIGHT", "99999999999999999999", inflight},
		{"CLICK_EVENTS", "maybe", onOff}, {"ALLOW_PRIVATE", "2", onOff},
		{"BASE_URL", "hop.example", baseURL}, {"BASE_URL", "ftp://hop.example", baseURL}, {"BASE_URL", "http://", baseURL},
		{"BASE_URL", "http://:80", baseURL}, {"BASE_URL", "http://[::1", baseURL},
		{"REDIS_URL", "localhost:6379", redisURL}, {"REDIS_URL", "http://localhost:6379", redisURL}, {"REDIS_URL", "redis://", redisURL},
		{"REDIS_URL", "redis://:pw@/0", redisURL}, {"REDIS_URL", "redis://h:port", redisURL},
		{"API_TOKEN", "short", token}, {"API_TOKEN", tokenA[1:], token}, {"API_TOKEN", tokenA + ",short", token},
		{"LOG_LEVEL", "loud", level},
	}
	var all []string
	seen := map[string]bool{}
	for _, tt := range tests {
		t.Run(tt.name+"="+tt.value, func(t *testing.T) {
			_, err := loadConfig(settingsOf(tt.name + "=" + tt.value))
			if want := tt.name + " must be " + tt.want; err == nil || err.Error() != want {
				t.Errorf("error %v, want %s", err, want)
			}
		})
		if !seen[tt.name] {
			seen[tt.name] = true
			all = append(all, tt.name+"="+tt.value)
		}
	}

	t.Run("all at once", func(t *testing.T) {
		_, err := loadConfig(settingsOf(all...))
		lines := strings.Split(fmt.Sprint(err), "\n")
		if len(lines) != len(all) {
			t.Errorf("%d settings are wrong, %d reported:\n%v", len(all), len(lines), err)
		}
		for _, setting := range all {
			name, _, _ := strings.Cut(setting, "=")
			if !strings.Contains(err.Error(), name+" must be ") {
				t.Errorf("%s is not reported", name)
			}
		}
	})
}

// TestConfigKeepsSecrets puts a secret where people put theirs, well-formed and not, and looks for it in the start's log line
// and in every error on the way to the pools.
func TestConfigKeepsSecrets(t *testing.T) {
	const secret = "hunter2pass"
	token := secret + strings.Repeat("x", 32)
	tests := []struct{ name, setting, shows string }{
		{"database URL", "DATABASE_URL=postgres://hop:" + secret + "@db.example:5432/links", "db.example:5432/links"},
		{"database URL with options", "DATABASE_URL=postgres://hop@db.example/links?password=" + secret, "db.example"},
		{"database key=value", "DATABASE_URL=host=db.example user=hop password=" + secret, "database=set"},
		{"database URL, half an escape", "DATABASE_URL=postgres://hop:" + secret + "%zz@db.example/links", "database=set"},
		{"database URL, slash in the password", "DATABASE_URL=postgres://hop:12/" + secret + "@db.example/links", "database=set"},
		{"database URL, hash in the password", "DATABASE_URL=postgres://hop:12#" + secret + "@db.example/links", "database=set"},
		{"database URL, space", "DATABASE_URL=postgres://hop:" + secret + " @db.example/links", "database=set"},
		{"database of another kind", "DATABASE_URL=mysql://hop:" + secret + "@db.example/links", "db.example"},
		{"public URL", "DATABASE_PUBLIC_URL=postgres://hop:" + secret + "@public.example:1/links", "public.example:1/links"},
		{"public URL, nonsense", "DATABASE_PUBLIC_URL=" + secret, "database_public=set"},
		{"redis URL", "REDIS_URL=redis://:" + secret + "@cache.example:6379/0", "cache.example:6379/0"},
		{"redis URL, wrong scheme", "REDIS_URL=http://:" + secret + "@cache.example:6379/0", "cache.example:6379/0"},
		{"redis URL, half an escape", "REDIS_URL=redis://:" + secret + "%zz@cache.example/0", "redis=set"},
		{"token", "API_TOKEN=" + token, "api_tokens=1"},
		{"short token", "API_TOKEN=" + secret, "api_tokens=0"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			clearPG(t) // or pgConfig would not look at DATABASE_PUBLIC_URL
			cfg, err := loadConfig(settingsOf(tt.setting))
			var out bytes.Buffer
			slog.New(slog.NewTextHandler(&out, nil)).Info("listening", "config", cfg)
			if !strings.Contains(out.String(), tt.shows) {
				t.Errorf("the log does not show %q: %s", tt.shows, &out)
			}
			slog.New(slog.NewJSONHandler(&out, nil)).Info("listening", "config", cfg)
			_, pgErr := pgConfig(cfg)
			if said := fmt.Sprint(out.String(), err, pgErr); strings.Contains(said, secret) {
				t.Errorf("the secret shows: %s", said)
			}
		})
	}
}

func TestConfigRules(t *testing.T) {
	cfg, err := loadConfig(settingsOf("BASE_URL=https://Hop.Example:8443/s", "ALLOW_PRIVATE=off"))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := cfg.rules(), (targetRules{"hop.example", false}); got != want {
		t.Errorf("rules() = %+v, want %+v", got, want)
	}
	if cfg.rules().check("https://hop.example/abc") == nil {
		t.Error("a link may point back at this service")
	}
	cfg.AllowPrivate = true
	if err := cfg.rules().check("http://10.0.0.1/"); err != nil {
		t.Errorf("ALLOW_PRIVATE is on, still: %v", err)
	}
}
