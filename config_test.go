package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// settingsOf is a getenv that knows "NAME=value" and nothing else.
func settingsOf(settings ...string) func(string) string {
	env := map[string]string{}
	for _, s := range settings {
		name, value, _ := strings.Cut(s, "=")
		env[name] = value
	}
	return func(name string) string { return env[name] }
}

// Two tokens of a good length.
var (
	tokenA = strings.Repeat("A", 32)
	tokenB = strings.Repeat("B", 40)
)

// defaultConfig is Config where nothing is set.
func defaultConfig() Config {
	return Config{
		Port:        8080,
		BaseURL:     "http://localhost:8080",
		DBConns:     defaultDBConns(),
		DataDir:     "data",
		LocalCache:  100_000,
		WarmLinks:   1_000_000,
		MaxInFlight: 4096,
		ClickEvents: true,
		LogFormat:   "text",
	}
}

// TestConfigValues is what good settings become.
func TestConfigValues(t *testing.T) {
	with := func(change func(*Config)) Config {
		c := defaultConfig()
		change(&c)
		return c
	}
	full := Config{
		Port:              80,
		BaseURL:           "https://hop.example",
		DatabaseURL:       "postgres://a@db/x",
		DatabasePublicURL: "host=public",
		DBConns:           7,
		RedisURL:          "rediss://r:6379/1",
		APITokens:         []string{tokenA, tokenB},
		ReadTokens:        []string{strings.Repeat("C", 32)},
		DataDir:           "/var/lib/hop",
		LocalCache:        640,
		WarmLinks:         5,
		MaxInFlight:       10,
		KeepClicks:        90 * 24 * time.Hour,
		AllowPrivate:      true,
		HomeURL:           "https://www.example.com/?from=hop#top",
		LogLevel:          slog.LevelDebug,
		LogFormat:         "json",
	}
	type test struct {
		name string
		env  []string
		want Config
	}
	tests := []test{
		{"nothing set", nil, defaultConfig()},
		{"blank is not set", []string{"PORT=", "DATA_DIR=  ", "API_TOKEN=", "LOG_LEVEL=\t",
			"DATABASE_URL= ", "KEEP_CLICKS= "}, defaultConfig()},
		{"everything set", []string{"PORT=80", "BASE_URL=https://hop.example",
			"DATABASE_URL=postgres://a@db/x", "DATABASE_PUBLIC_URL=host=public", "DB_CONNS=7",
			"REDIS_URL=rediss://r:6379/1", "API_TOKEN=" + tokenA + ", " + tokenB,
			"READ_TOKEN=" + strings.Repeat("C", 32), "DATA_DIR=/var/lib/hop", "LOCAL_CACHE=640",
			"WARM_LINKS=5", "MAX_INFLIGHT=10", "CLICK_EVENTS=off", "KEEP_CLICKS=90d",
			"ALLOW_PRIVATE=1", "HOME_URL=https://www.example.com/?from=hop#top",
			"LOG_LEVEL=debug", "LOG_FORMAT=JSON"}, full},
		{"spaces around a value", []string{"PORT= 81 ", "DATABASE_URL= host=x "},
			with(func(c *Config) {
				c.Port = 81
				c.BaseURL = "http://localhost:81"
				c.DatabaseURL = "host=x"
			})},
		{"slash after BASE_URL", []string{"BASE_URL=http://hop.test/"},
			with(func(c *Config) { c.BaseURL = "http://hop.test" })},
		{"path in BASE_URL", []string{"BASE_URL=http://hop.test/s/"},
			with(func(c *Config) { c.BaseURL = "http://hop.test/s" })},
		{"lowest", []string{"PORT=0", "DB_CONNS=2", "LOCAL_CACHE=64", "WARM_LINKS=0",
			"MAX_INFLIGHT=1", "KEEP_CLICKS=1d"}, with(func(c *Config) {
			c.Port = 0
			c.BaseURL = "http://localhost:0"
			c.DBConns = 2
			c.LocalCache = 64
			c.WarmLinks = 0
			c.MaxInFlight = 1
			c.KeepClicks = 24 * time.Hour
		})},
		{"highest", []string{"PORT=65535", "DB_CONNS=1000", "LOCAL_CACHE=100000000",
			"WARM_LINKS=100000000", "MAX_INFLIGHT=10000", "KEEP_CLICKS=36500D"},
			with(func(c *Config) {
				c.Port = 65535
				c.BaseURL = "http://localhost:65535"
				c.DBConns = 1000
				c.LocalCache = 100_000_000
				c.WarmLinks = 100_000_000
				c.MaxInFlight = 10_000
				c.KeepClicks = 36_500 * 24 * time.Hour
			})},
		{"log level in capitals", []string{"LOG_LEVEL=WARN"},
			with(func(c *Config) { c.LogLevel = slog.LevelWarn })},
		{"a token with a comma after it", []string{"API_TOKEN=" + tokenA + ","},
			with(func(c *Config) { c.APITokens = []string{tokenA} })},
		{"another page of our host", []string{"BASE_URL=https://x.test/s", "HOME_URL=https://x.test/"},
			with(func(c *Config) {
				c.BaseURL = "https://x.test/s"
				c.HomeURL = "https://x.test/"
			})},
	}
	for _, word := range []string{"1", "true", "on", "yes", "ON", "True"} {
		tests = append(tests, test{"on as " + word, []string{"ALLOW_PRIVATE=" + word},
			with(func(c *Config) { c.AllowPrivate = true })})
	}
	for _, word := range []string{"0", "false", "off", "no", "OFF"} {
		tests = append(tests, test{"off as " + word, []string{"CLICK_EVENTS=" + word},
			with(func(c *Config) { c.ClickEvents = false })})
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

// TestConfigRefusesBadValues is what is said about bad settings, one by one and all at once.
func TestConfigRefusesBadValues(t *testing.T) {
	const (
		port    = "must be a number from 0 to 65535"
		conns   = "must be a number from 2 to 1000"
		local   = "must be a number from 64 to 100000000"
		warm    = "must be a number from 0 to 100000000"
		request = "must be a number from 1 to 10000"
		keep    = "must be a number of days from 1d to 36500d, such as 90d"
		onOff   = "must be on or off"
		baseURL = "must be an http:// or https:// URL of a host and at most a path, " +
			"such as https://hop.example or https://www.example.com/s"
		homeURL  = "must be an http:// or https:// URL in ASCII"
		homeLoop = "must be another page than BASE_URL, which would lead to itself"
		token    = "must be one or more tokens of at least 32 bytes without blanks, " +
			"separated by commas"
		level  = "must be debug, info, warn or error"
		format = "must be text or json"
	)
	quotes := errQuoted.Error()
	tests := []struct{ name, value, want string }{
		{"PORT", "-1", port},
		{"PORT", "65536", port},
		{"PORT", "http", port},
		{"PORT", "80 80", port},
		{"PORT", "8080.0", port},
		{"PORT", `"8080"`, quotes},
		{"DB_CONNS", "1", conns},
		{"DB_CONNS", "1001", conns},
		{"DB_CONNS", "many", conns},
		{"LOCAL_CACHE", "63", local},
		{"LOCAL_CACHE", "100000001", local},
		{"LOCAL_CACHE", "1e6", local},
		{"WARM_LINKS", "-1", warm},
		{"MAX_INFLIGHT", "0", request},
		{"MAX_INFLIGHT", "10001", request},
		{"MAX_INFLIGHT", "99999999999999999999", request},
		{"KEEP_CLICKS", "90", keep},
		{"KEEP_CLICKS", "0d", keep},
		{"KEEP_CLICKS", "-1d", keep},
		{"KEEP_CLICKS", "36501d", keep},
		{"KEEP_CLICKS", "2160h", keep},
		{"KEEP_CLICKS", "d", keep},
		{"CLICK_EVENTS", "maybe", onOff},
		{"CLICK_EVENTS", "'on'", quotes},
		{"ALLOW_PRIVATE", "2", onOff},
		{"BASE_URL", "hop.example", baseURL},
		{"BASE_URL", "/", baseURL},
		{"BASE_URL", "ftp://hop.example", baseURL},
		{"BASE_URL", "http://", baseURL},
		{"BASE_URL", "http://:80", baseURL},
		{"BASE_URL", "http://hop.example:", baseURL},
		{"BASE_URL", "http://hop.example:0", baseURL},
		{"BASE_URL", "http://hop.example:65536", baseURL},
		{"BASE_URL", "http://[::1", baseURL},
		{"BASE_URL", "http://hop.example//", baseURL},
		{"BASE_URL", "http://hop.example/s//", baseURL},
		{"BASE_URL", "http://hop.example/a//b", baseURL},
		{"BASE_URL", "http://hop.example/a/../b", baseURL},
		{"BASE_URL", "http://hop.example/?a=b", baseURL},
		{"BASE_URL", "http://hop.example?", baseURL},
		{"BASE_URL", "http://hop.example/#", baseURL},
		{"BASE_URL", "http://hop.example/#top", baseURL},
		{"BASE_URL", "http://me@hop.example", baseURL},
		{"BASE_URL", "http://me:" + plain + "@hop.example", baseURL},
		{"BASE_URL", "http://hop.example /s", baseURL},
		{"BASE_URL", "http://hop.example/a b", baseURL},
		{"BASE_URL", `http://hop.example/a\b`, baseURL},
		{"BASE_URL", "http://höp.example", baseURL},
		{"BASE_URL", `"http://hop.example"`, quotes},
		{"HOME_URL", "www.example.com", homeURL},
		{"HOME_URL", "javascript:alert(1)", homeURL},
		{"HOME_URL", "https://me@www.example.com", homeURL},
		{"HOME_URL", "https://www.example.com/ü", homeURL},
		{"HOME_URL", "http://localhost:8080", homeLoop},
		{"HOME_URL", "http://LocalHost:8080/?x=y", homeLoop},
		{"REDIS_URL", "localhost:6379", errNoRedis.Error()},
		{"REDIS_URL", "http://localhost:6379", errNoRedis.Error()},
		{"REDIS_URL", `"redis://localhost"`, quotes},
		{"DATABASE_URL", "localhost", errNoDatabase.Error()},
		{"DATABASE_URL", `"postgres://hop@db/x"`, quotes},
		{"DATABASE_PUBLIC_URL", "jdbc:postgresql://db/x", errJDBC.Error()},
		{"API_TOKEN", "short", token},
		{"API_TOKEN", tokenA[1:], token},
		{"API_TOKEN", tokenA + ",short", token},
		{"API_TOKEN", tokenA + " " + tokenB, token},
		{"API_TOKEN", ",", token},
		{"API_TOKEN", " , , ", token},
		{"API_TOKEN", "  ", token},
		{"API_TOKEN", `"` + tokenA + `"`, quotes},
		{"API_TOKEN_FILE", " ", token},
		{"READ_TOKEN", tokenA, "needs API_TOKEN: without one, everybody may write"},
		{"LOG_LEVEL", "loud", level},
		{"LOG_FORMAT", "xml", format},
	}
	var all []string
	seen := map[string]bool{}
	for _, tt := range tests {
		t.Run(tt.name+"="+tt.value, func(t *testing.T) {
			_, err := loadConfig(settingsOf(tt.name + "=" + tt.value))
			name := strings.TrimSuffix(tt.name, "_FILE")
			want := name + " " + tt.want
			if tt.value == `"`+tokenA+`"` {
				want += "\n" + name + " " + token // it holds no token then
			}
			if err == nil || err.Error() != want {
				t.Errorf("error %v, want %s", err, want)
			}
		})
		if name := strings.TrimSuffix(tt.name, "_FILE"); !seen[name] && name != "READ_TOKEN" {
			seen[name] = true
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
			if !strings.Contains(err.Error(), name+" ") {
				t.Errorf("%s is not reported", name)
			}
		}
	})
}

// TestConfigReadToken holds tokens that read and tokens that write apart.
func TestConfigReadToken(t *testing.T) {
	_, err := loadConfig(settingsOf("API_TOKEN="+tokenA, "READ_TOKEN="+tokenB+","+tokenA))
	want := "READ_TOKEN must differ from API_TOKEN: its holders could write"
	if err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	for _, token := range []string{"", tokenA} {
		cfg, err := loadConfig(settingsOf("API_TOKEN=" + token))
		if err != nil || cfg.Open() != (token == "") {
			t.Errorf("API_TOKEN=%s: open is %v, %v", token, cfg.Open(), err)
		}
	}
}

// TestConfigSecretFiles reads every secret from a file.
func TestConfigSecretFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(content string) string {
		file := filepath.Join(dir, fmt.Sprint(len(content))+plain)
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	got, err := loadConfig(settingsOf(
		"DATABASE_URL_FILE="+write("postgres://a@db/x\n"),
		"DATABASE_PUBLIC_URL_FILE="+write("  host=public\r\n"),
		"REDIS_URL_FILE="+write("redis://r"),
		"API_TOKEN_FILE="+write(tokenA+","+tokenB+"\n"),
		"READ_TOKEN_FILE="+write(strings.Repeat("C", 33))))
	want := defaultConfig()
	want.DatabaseURL = "postgres://a@db/x"
	want.DatabasePublicURL = "host=public"
	want.RedisURL = "redis://r"
	want.APITokens = []string{tokenA, tokenB}
	want.ReadTokens = []string{strings.Repeat("C", 33)}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("loadConfig = %+v, %v\nwant %+v", got, err, want)
	}

	for _, tt := range []struct {
		name string
		env  []string
		want string
	}{
		{"both", []string{"API_TOKEN=" + tokenA, "API_TOKEN_FILE=" + write(tokenB)},
			"API_TOKEN and API_TOKEN_FILE are both set: set one of them"},
		{"none there", []string{"REDIS_URL_FILE=" + dir + "/none" + plain},
			"REDIS_URL_FILE names a file that cannot be read: no such file or directory"},
		{"a folder", []string{"REDIS_URL_FILE=" + dir},
			"REDIS_URL_FILE names a file that cannot be read: is a directory"},
		{"the secret itself", []string{"API_TOKEN_FILE=" + plain + tokenA},
			"API_TOKEN_FILE names a file that cannot be read: no such file or directory"},
		{"empty", []string{"API_TOKEN_FILE=" + write("\n")},
			"API_TOKEN_FILE names a file that is empty"},
		{"endless", []string{"API_TOKEN_FILE=/dev/zero"},
			"API_TOKEN_FILE names a file that is too large for a secret"},
		{"quotes", []string{"DATABASE_URL_FILE=" + write(`"host=x"`)},
			"DATABASE_URL_FILE names a file that " + errQuoted.Error()},
		{"nonsense", []string{"DATABASE_URL_FILE=" + write(plain+plain)},
			"DATABASE_URL " + errNoDatabase.Error()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := loadConfig(settingsOf(tt.env...))
			if err == nil || err.Error() != tt.want {
				t.Errorf("error %v\nwant %s", err, tt.want)
			}
			if strings.Contains(fmt.Sprint(err), plain) {
				t.Errorf("the secret is shown: %v", err)
			}
		})
	}
}

// TestConfigLog looks at the line that the start logs: all settings, and no secret among them.
// What connection strings show is TestConnectionStringsKeepSecrets's.
func TestConfigLog(t *testing.T) {
	cfg, err := loadConfig(settingsOf("API_TOKEN="+plain+tokenA, "READ_TOKEN="+plain+tokenB,
		"DATABASE_URL=postgres://hop:"+plain+"@db.example:5432/links?sslmode=require",
		"REDIS_URL=rediss://:"+plain+"@cache.example/1", "KEEP_CLICKS=90d"))
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("listening", "config", cfg)
	for _, word := range []string{"config.database=db.example:5432/links", "config.api_tokens=1",
		"config.redis=cache.example/1", "config.read_tokens=1", "config.keep_clicks=90d"} {

		if !strings.Contains(log.String(), word) {
			t.Errorf("no %s in %s", word, &log)
		}
	}
	if strings.Contains(log.String(), plain) {
		t.Errorf("a secret is shown: %s", &log)
	}
	fields := reflect.TypeFor[Config]().NumField()
	if logged := len(cfg.LogValue().Group()); logged != fields {
		t.Errorf("%d settings, %d logged", fields, logged)
	}
}

// TestConfigBase takes BASE_URL apart.
func TestConfigBase(t *testing.T) {
	for _, tt := range []struct{ baseURL, origin, path string }{
		{"https://hop.example", "https://hop.example", ""},
		{"https://www.example.com/s/", "https://www.example.com", "/s"},
		{"https://Hop.Example:8443/a/b%20c", "https://hop.example:8443", "/a/b%20c"},
		{"https://hop.example:443", "https://hop.example", ""},
		{"http://hop.example:80", "http://hop.example", ""},
		{"http://[::1]/s", "http://[::1]", "/s"},
		{"http://[::1]:8080", "http://[::1]:8080", ""},
	} {
		cfg, err := loadConfig(settingsOf("BASE_URL=" + tt.baseURL))
		if err != nil || cfg.Origin() != tt.origin || cfg.BasePath() != tt.path {
			t.Errorf("%s: origin %s, path %s, %v", tt.baseURL, cfg.Origin(), cfg.BasePath(), err)
		}
	}
}
