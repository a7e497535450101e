package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Config is every setting, read once. The operator's manual in main.go says what each means.
type Config struct {
	Port              int
	BaseURL           string // without a slash at its end
	DatabaseURL       string
	DatabasePublicURL string
	DBConns           int
	RedisURL          string
	APITokens         []string // none leaves the API open to everybody
	ReadTokens        []string
	DataDir           string
	LocalCache        int // links of 400 bytes each; longer targets take more places
	WarmLinks         int
	MaxInFlight       int
	ClickEvents       bool
	KeepClicks        time.Duration // 0 is for ever
	AllowPrivate      bool
	HomeURL           string // where the path / leads, or "" for hop's own page
	LogLevel          slog.Level
	LogFormat         string // "text" or "json"
}

// Bounds of the settings. Numbers beyond them are taken for slips of the hand.
const (
	minToken   = 32     // bytes of a token: hop slows nobody down who guesses
	maxSecret  = 64_000 // bytes of a file that holds a secret, in case it is /dev/zero
	maxDBConns = 1000   // PostgreSQL itself is seldom set up for more
	minCached  = 64     // one link for each part of the local cache
	maxCached  = 100_000_000
	// maxInFlight is the highest MAX_INFLIGHT. Each request holds buffers of its connection, and
	// what waits behind 10,000 others is not answered in time.
	maxInFlight = 10_000
	maxKeepDays = 36_500 // a hundred years; time.Duration ends at 292
)

// loadConfig reads the settings from getenv, which is os.Getenv but for tests, and the files that
// they name. It reports all that are wrong at once and never quotes what may be a secret.
func loadConfig(getenv func(string) string) (Config, error) {
	s := &settings{getenv: getenv}
	c := Config{
		Port:              s.number("PORT", 8080, 0, 65535),
		DatabaseURL:       s.database("DATABASE_URL"),
		DatabasePublicURL: s.database("DATABASE_PUBLIC_URL"),
		DBConns:           s.number("DB_CONNS", defaultDBConns(), 2, maxDBConns),
		RedisURL:          s.redis("REDIS_URL"),
		APITokens:         s.tokens("API_TOKEN"),
		ReadTokens:        s.tokens("READ_TOKEN"),
		DataDir:           s.text("DATA_DIR", "data"),
		LocalCache:        s.number("LOCAL_CACHE", 100_000, minCached, maxCached),
		WarmLinks:         s.number("WARM_LINKS", 1_000_000, 0, maxCached),
		MaxInFlight:       s.number("MAX_INFLIGHT", 4096, 1, maxInFlight),
		ClickEvents:       s.flag("CLICK_EVENTS", true),
		KeepClicks:        s.days("KEEP_CLICKS", maxKeepDays),
		AllowPrivate:      s.flag("ALLOW_PRIVATE", false),
		LogLevel:          s.level("LOG_LEVEL", slog.LevelInfo),
		LogFormat:         s.choice("LOG_FORMAT", "text", "json"),
	}
	c.BaseURL = s.baseURL("BASE_URL", fmt.Sprintf("http://localhost:%d", c.Port))
	c.HomeURL = s.homeURL("HOME_URL", c)
	s.checkReadTokens(c)
	return c, errors.Join(s.errs...)
}

// defaultDBConns is four per core and at least 8, which keeps PostgreSQL busy; more only queue
// inside it.
func defaultDBConns() int { return min(maxDBConns, max(8, 4*runtime.GOMAXPROCS(0))) }

// Open says whether everybody may use the API, for want of a token.
func (c Config) Open() bool { return len(c.APITokens) == 0 }

// BasePath is the path of BaseURL: "" or, where hop shares its host, something like "/s".
func (c Config) BasePath() string {
	u, err := url.Parse(c.BaseURL)
	if err != nil {
		return ""
	}
	return u.EscapedPath()
}

// Origin is the scheme, host and port of BaseURL, as browsers write them in the header Origin.
func (c Config) Origin() string {
	u, err := url.Parse(c.BaseURL)
	if err != nil {
		return ""
	}
	return originOf(u)
}

// LogValue is Config without secrets: of connection strings it holds host and path only, of
// tokens how many there are.
func (c Config) LogValue() slog.Value {
	keep := "for ever"
	if c.KeepClicks > 0 {
		keep = fmt.Sprintf("%dd", int(c.KeepClicks/day))
	}
	return slog.GroupValue(
		slog.Int("port", c.Port),
		slog.String("base_url", c.BaseURL),
		slog.String("database", hostOnly(c.DatabaseURL)),
		slog.String("database_public", hostOnly(c.DatabasePublicURL)),
		slog.Int("db_conns", c.DBConns),
		slog.String("redis", hostOnly(c.RedisURL)),
		slog.Int("api_tokens", len(c.APITokens)),
		slog.Int("read_tokens", len(c.ReadTokens)),
		slog.String("data_dir", c.DataDir),
		slog.Int("local_cache", c.LocalCache),
		slog.Int("warm_links", c.WarmLinks),
		slog.Int("max_inflight", c.MaxInFlight),
		slog.Bool("click_events", c.ClickEvents),
		slog.String("keep_clicks", keep),
		slog.Bool("allow_private", c.AllowPrivate),
		slog.String("home_url", c.HomeURL),
		slog.String("log_level", c.LogLevel.String()),
		slog.String("log_format", c.LogFormat),
	)
}

// settings reads settings one by one and collects what is wrong with them. Where one is wrong, its
// method returns the default: the program does not start then.
type settings struct {
	getenv func(string) string
	errs   []error
}

// must notes that the setting name is not what it must be.
func (s *settings) must(name, be string) {
	s.errs = append(s.errs, fmt.Errorf("%s must be %s", name, be))
}

// text reads a text. Blanks around it are cut, and a blank one is as good as none.
func (s *settings) text(name, fallback string) string {
	value := strings.TrimSpace(s.getenv(name))
	if value == "" {
		return fallback
	}
	if quoted(value) {
		s.errs = append(s.errs, fmt.Errorf("%s %w", name, errQuoted))
		return fallback
	}
	return value
}

// number reads a whole number from low to high.
func (s *settings) number(name string, fallback, low, high int) int {
	n, err := strconv.Atoi(s.text(name, strconv.Itoa(fallback)))
	if err != nil || n < low || n > high {
		s.must(name, fmt.Sprintf("a number from %d to %d", low, high))
		return fallback
	}
	return n
}

// flag reads on or off, or one of their other names.
func (s *settings) flag(name string, fallback bool) bool {
	switch strings.ToLower(s.text(name, strconv.FormatBool(fallback))) {
	case "1", "true", "on", "yes":
		return true
	case "0", "false", "off", "no":
		return false
	}
	s.must(name, "on or off")
	return fallback
}

// choice reads one of two words. The first is the default.
func (s *settings) choice(name, first, second string) string {
	switch word := strings.ToLower(s.text(name, first)); word {
	case first, second:
		return word
	}
	s.must(name, first+" or "+second)
	return first
}

// level reads a log level.
func (s *settings) level(name string, fallback slog.Level) slog.Level {
	var level slog.Level
	if level.UnmarshalText([]byte(s.text(name, fallback.String()))) != nil {
		s.must(name, "debug, info, warn or error")
		return fallback
	}
	return level
}

// day is a UTC day: none is longer or shorter.
const day = 24 * time.Hour

// days reads a number of days such as 90d, at most limit. None is 0.
func (s *settings) days(name string, limit int) time.Duration {
	value := s.text(name, "")
	if value == "" {
		return 0
	}
	number, ok := strings.CutSuffix(strings.ToLower(value), "d")
	n, err := strconv.Atoi(number)
	if !ok || err != nil || n < 1 || n > limit {
		s.must(name, fmt.Sprintf("a number of days from 1d to %dd, such as 90d", limit))
		return 0
	}
	return time.Duration(n) * day
}

// secret reads a text from the setting name, or from the file that the setting name_FILE names.
// given tells a blank one from none. An error does not quote the path: it may be the secret,
// written into the wrong setting.
func (s *settings) secret(name string) (value string, given bool) {
	value = s.text(name, "")
	file := s.text(name+"_FILE", "")
	if file == "" {
		return value, s.getenv(name) != "" || s.getenv(name+"_FILE") != ""
	}
	if value != "" {
		s.errs = append(s.errs, fmt.Errorf("%s and %s_FILE are both set: set one of them", name, name))
		return "", false
	}
	value, err := readSecret(file)
	if err != nil {
		s.errs = append(s.errs, fmt.Errorf("%s_FILE names a file that %w", name, err))
		return "", false
	}
	if quoted(value) {
		s.errs = append(s.errs, fmt.Errorf("%s_FILE names a file that %w", name, errQuoted))
		return "", false
	}
	return value, true
}

// readSecret returns the text of a file without the blanks around it. It reads on after "a file
// that …" when it fails.
func readSecret(name string) (string, error) {
	file, err := os.Open(name)
	if err != nil {
		return "", unreadable(err)
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, maxSecret+1))
	if err != nil {
		return "", unreadable(err)
	}
	if len(content) > maxSecret {
		return "", errors.New("is too large for a secret")
	}
	value := strings.TrimSpace(string(content))
	if value == "" {
		return "", errors.New("is empty")
	}
	return value, nil
}

// unreadable is err without the path that it quotes.
func unreadable(err error) error {
	if failed, ok := errors.AsType[*fs.PathError](err); ok {
		err = failed.Err
	}
	return fmt.Errorf("cannot be read: %w", err)
}

// database reads a connection string for PostgreSQL.
func (s *settings) database(name string) string {
	value, _ := s.secret(name)
	if _, _, err := databaseParameters(value); err != nil {
		s.errs = append(s.errs, fmt.Errorf("%s %w", name, err))
	}
	return value
}

// redis reads a connection string for Redis.
func (s *settings) redis(name string) string {
	value, _ := s.secret(name)
	if value == "" {
		return ""
	}
	if _, err := redisConfig(value); err != nil {
		s.errs = append(s.errs, fmt.Errorf("%s %w", name, err))
	}
	return value
}

// tokens reads a list of tokens with commas between. A list that holds none is an error: whoever
// sets it wants hop closed, and without a token it is open.
func (s *settings) tokens(name string) []string {
	value, given := s.secret(name)
	if !given {
		return nil
	}
	var tokens []string
	for token := range strings.SplitSeq(value, ",") {
		token = strings.TrimSpace(token)
		if token == "" {
			continue // a comma at the end
		}
		if len(token) < minToken || strings.ContainsFunc(token, isSpaceOrControl) {
			tokens = nil
			break
		}
		tokens = append(tokens, token)
	}
	if tokens == nil {
		s.must(name, fmt.Sprintf("one or more tokens of at least %d bytes without blanks, "+
			"separated by commas", minToken))
	}
	return tokens
}

// checkReadTokens refuses read tokens that do not do what they are for.
func (s *settings) checkReadTokens(c Config) {
	if len(c.ReadTokens) == 0 {
		return
	}
	if s.getenv("API_TOKEN") == "" && s.getenv("API_TOKEN_FILE") == "" {
		s.errs = append(s.errs, errors.New("READ_TOKEN needs API_TOKEN: without one, "+
			"everybody may write"))
	}
	for _, token := range c.ReadTokens {
		if slices.Contains(c.APITokens, token) {
			s.errs = append(s.errs, errors.New("READ_TOKEN must differ from API_TOKEN: "+
				"its holders could write"))
			return
		}
	}
}

// baseURL reads what short links begin with.
func (s *settings) baseURL(name, fallback string) string {
	value := s.text(name, "")
	if value == "" {
		return fallback
	}
	value = strings.TrimSuffix(value, "/")
	u, ok := parseWebURL(value)
	if !ok || strings.ContainsAny(value, "?#") || !isBasePath(u.Path) {
		s.must(name, "an http:// or https:// URL of a host and at most a path, "+
			"such as https://hop.example or https://www.example.com/s")
		return fallback
	}
	return value
}

// isBasePath says whether p can stand before the codes of short links: it is empty, or /a/b without
// a part that browsers or proxies leave out.
func isBasePath(p string) bool {
	return p == "" || p != "/" && path.Clean(p) == p
}

// homeURL reads where the path / leads. c has the BaseURL, to which it must not lead back.
func (s *settings) homeURL(name string, c Config) string {
	value := s.text(name, "")
	if value == "" {
		return ""
	}
	u, ok := parseWebURL(value)
	if !ok {
		s.must(name, "an http:// or https:// URL in ASCII")
		return ""
	}
	if originOf(u) == c.Origin() && strings.TrimRight(u.EscapedPath(), "/") == c.BasePath() {
		s.must(name, "another page than BASE_URL, which would lead to itself")
		return ""
	}
	return value
}

// parseWebURL parses the URL of a page: http or https, a host, no user, and nothing that is not
// written in printable ASCII.
func parseWebURL(raw string) (*url.URL, bool) {
	beyond := func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '\\' }
	if strings.ContainsFunc(raw, beyond) {
		return nil, false
	}
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.User != nil {
		return nil, false
	}
	if !isHost(u.Hostname()) || strings.HasSuffix(u.Host, ":") {
		return nil, false
	}
	if u.Port() != "" && !isPort(u.Port()) {
		return nil, false
	}
	return u, true
}

// originOf is the scheme, host and port of u as browsers write them.
func originOf(u *url.URL) string {
	host := strings.ToLower(u.Hostname())
	port := u.Port()
	if port == "80" && u.Scheme == "http" || port == "443" && u.Scheme == "https" {
		port = ""
	}
	switch {
	case port != "":
		host = net.JoinHostPort(host, port)
	case strings.Contains(host, ":"):
		host = "[" + host + "]"
	}
	return u.Scheme + "://" + host
}
