package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strconv"
	"strings"
)

// Config is every setting, read once. The operator's manual in main.go says what each means.
type Config struct {
	Port              int
	BaseURL           string
	DatabaseURL       string
	DatabasePublicURL string
	DBConns           int
	RedisURL          string
	APITokens         []string
	DataDir           string
	LocalCache        int
	MaxInFlight       int
	ClickEvents       bool
	AllowPrivate      bool
	LogLevel          slog.Level
}

// maxInFlight is the highest MAX_INFLIGHT: the journal's longestGap relies on it.
const maxInFlight = 10_000

// loadConfig reads the settings and reports all that are wrong at once, without quoting what may be a secret.
func loadConfig(getenv func(string) string) (Config, error) {
	var errs []error
	bad := func(name, want string) { errs = append(errs, fmt.Errorf("%s must be %s", name, want)) }
	or := func(name, def string) string {
		if v := strings.TrimSpace(getenv(name)); v != "" {
			return v
		}
		return def
	}
	number := func(name string, def, low, high int) int {
		n, err := strconv.Atoi(or(name, strconv.Itoa(def)))
		if err != nil || n < low || n > high {
			bad(name, fmt.Sprintf("a number from %d to %d", low, high))
			return def
		}
		return n
	}
	flag := func(name, def string) bool {
		switch v := strings.ToLower(or(name, def)); v {
		case "1", "true", "on", "yes":
			return true
		case "0", "false", "off", "no":
		default:
			bad(name, "on or off")
		}
		return false
	}
	c := Config{
		Port:              number("PORT", 8080, 0, 65535),
		DatabaseURL:       or("DATABASE_URL", ""),
		DatabasePublicURL: or("DATABASE_PUBLIC_URL", ""),
		DBConns:           number("DB_CONNS", defaultConns(), 2, 1000),
		RedisURL:          or("REDIS_URL", ""),
		DataDir:           or("DATA_DIR", "data"),
		LocalCache:        number("LOCAL_CACHE", 100_000, 64, 100_000_000),
		MaxInFlight:       number("MAX_INFLIGHT", 4096, 1, maxInFlight),
		ClickEvents:       flag("CLICK_EVENTS", "on"),
		AllowPrivate:      flag("ALLOW_PRIVATE", "off"),
	}
	c.BaseURL = strings.TrimSuffix(or("BASE_URL", fmt.Sprintf("http://localhost:%d", c.Port)), "/")
	if u, err := url.Parse(c.BaseURL); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		bad("BASE_URL", "an http:// or https:// URL")
	}
	if u, err := url.Parse(c.RedisURL); c.RedisURL != "" && (err != nil || u.Scheme != "redis" && u.Scheme != "rediss" || u.Host == "") {
		bad("REDIS_URL", "a redis:// or rediss:// URL")
	}
	for token := range strings.SplitSeq(or("API_TOKEN", ""), ",") {
		if token = strings.TrimSpace(token); token != "" && len(token) < 32 {
			bad("API_TOKEN", "one or more tokens of at least 32 bytes, separated by commas")
		} else if token != "" {
			c.APITokens = append(c.APITokens, token)
		}
	}
	if c.LogLevel.UnmarshalText([]byte(or("LOG_LEVEL", "info"))) != nil {
		bad("LOG_LEVEL", "debug, info, warn or error")
	}
	return c, errors.Join(errs...)
}

// rules are the rules for targets under these settings.
func (c Config) rules() targetRules {
	u, _ := url.Parse(c.BaseURL)
	return targetRules{strings.ToLower(u.Hostname()), c.AllowPrivate}
}

// LogValue is Config without secrets: of the URLs only hosts, of the tokens only how many.
func (c Config) LogValue() slog.Value {
	host := func(raw string) string {
		if u, err := url.Parse(raw); err == nil && u.Host != "" && (u.User != nil || !strings.Contains(raw, "@")) { // else a raw / or # in a password
			return net.JoinHostPort(u.Hostname(), u.Port()) + u.Path
		}
		if raw == "" {
			return ""
		}
		return "set"
	}
	return slog.GroupValue(slog.Int("port", c.Port), slog.String("base_url", c.BaseURL), slog.String("database", host(c.DatabaseURL)),
		slog.String("database_public", host(c.DatabasePublicURL)), slog.Int("db_conns", c.DBConns), slog.String("redis", host(c.RedisURL)),
		slog.Int("api_tokens", len(c.APITokens)), slog.String("data_dir", c.DataDir), slog.Int("local_cache", c.LocalCache),
		slog.Int("max_inflight", c.MaxInFlight), slog.Bool("click_events", c.ClickEvents), slog.Bool("allow_private", c.AllowPrivate))
}
