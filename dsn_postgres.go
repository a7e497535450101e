package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/lib/pq"
)

// What connection strings for PostgreSQL become: see dsn.go. The driver reads them too, but quotes
// passwords in its errors, takes a raw / in one for the end of the host, and fails on what only
// libpq or a provider knows. So they are cut into parameters here, and the driver gets those that
// it knows.

// Errors about strings for PostgreSQL.
var (
	errNoDatabase = errors.New("is neither a postgres:// URL nor a key=value string: " +
		"write postgres://user:password@host:port/name")
	errJDBC = errors.New("is a JDBC URL: write postgres://user:password@host:port/name")
	errADO  = errors.New("is a string for .NET, with semicolons: " +
		"write postgres://user:password@host:port/name")
	errDatabasePath = errors.New("has more than the name of a database in its path")
	errKeyValue     = errors.New("is no key=value string: put values that hold blanks into " +
		"single quotes, and write ' and \\ within them as \\' and \\\\")
	errNoValue      = errors.New("has a key without a value: write '' for an empty one")
	errDoubleQuotes = errors.New("has a value in double quotes: use single quotes")
	errTogether     = errors.New("has values that do not go together: look at the number of " +
		"hosts and ports, at sslmode with sslrootcert or sslnegotiation, at client_encoding, " +
		"datestyle and service, and whether there is a user")
	// errEnvironment begins the errors that are not about the string but about a PG… variable.
	errEnvironment = errors.New("the environment variable")
)

// lookupWithin is how long a host's name may take to resolve before hop goes by the other URL.
const lookupWithin = 2 * time.Second

// lookupHost finds the addresses of a host, as net.Resolver's LookupHost does.
type lookupHost func(ctx context.Context, host string) ([]string, error)

// chooseDatabase returns the way to PostgreSQL: raw (DATABASE_URL), else the PG… variables, else
// public (DATABASE_PUBLIC_URL). The last is also used when no host of the first resolves within
// lookupWithin, as a provider's internal names do not outside of it. The notes say what was left
// out or changed; errors name the setting that is wrong.
func chooseDatabase(ctx context.Context, raw, public string, lookup lookupHost) (
	pq.Config, []string, error) {

	if raw == "" && public != "" && !environmentNamesServer() {
		return namedDatabase("DATABASE_PUBLIC_URL", public)
	}
	config, notes, err := namedDatabase("DATABASE_URL", raw)
	if err != nil || public == "" {
		return config, notes, err
	}
	ctx, cancel := context.WithTimeout(ctx, lookupWithin)
	defer cancel()
	if anyResolves(ctx, config, lookup) {
		return config, notes, nil
	}
	config, notes, err = namedDatabase("DATABASE_PUBLIC_URL", public)
	if err == nil {
		notes = append(notes, "DATABASE_PUBLIC_URL is used: the host of the other does not resolve")
	}
	return config, notes, err
}

// namedDatabase is databaseConfig with the setting's name in front of its notes and errors.
func namedDatabase(name, raw string) (pq.Config, []string, error) {
	config, notes, err := databaseConfig(raw)
	for i := range notes {
		notes[i] = name + " " + notes[i]
	}
	if err != nil && !errors.Is(err, errEnvironment) {
		err = fmt.Errorf("%s %w", name, err)
	}
	return config, notes, err
}

// environmentNamesServer says whether the PG… variables say where PostgreSQL is.
func environmentNamesServer() bool {
	return os.Getenv("PGHOST") != "" || os.Getenv("PGHOSTADDR") != "" ||
		os.Getenv("PGSERVICE") != ""
}

// anyResolves says whether one of the hosts has an address or needs none.
func anyResolves(ctx context.Context, config pq.Config, lookup lookupHost) bool {
	if config.Hostaddr.IsValid() {
		return true
	}
	hosts := []string{config.Host}
	for _, more := range config.Multi {
		hosts = append(hosts, more.Host)
	}
	return slices.ContainsFunc(hosts, func(host string) bool {
		if _, err := netip.ParseAddr(host); err == nil || isSocket(host) {
			return true
		}
		_, err := lookup(ctx, host)
		return err == nil
	})
}

// databaseConfig turns a postgres:// URL or a key=value string into the driver's configuration.
// What it leaves open comes from the PG… variables of the environment; an empty raw leaves open
// everything. TLS is used where the server offers it, and only a server that takes writes will do,
// unless raw or the environment say otherwise. The notes say what was left out or changed.
func databaseConfig(raw string) (pq.Config, []string, error) {
	parameters, notes, err := databaseParameters(raw)
	if err != nil {
		return pq.Config{}, nil, err
	}
	dropped, err := dropVariables()
	if err != nil {
		return pq.Config{}, nil, err
	}
	notes = append(notes, dropped...)
	config, err := pq.NewConfig(keyValueString(parameters))
	if err != nil {
		return pq.Config{}, nil, driverError(err)
	}
	namesServer := func(p parameter) bool {
		return p.name == "host" || p.name == "hostaddr" || p.name == "service"
	}
	if !slices.ContainsFunc(parameters, namesServer) && !environmentNamesServer() {
		notes = append(notes, "names no host: it is localhost")
	}
	if config.SSLMode == "" {
		config.SSLMode = pq.SSLModePrefer // the driver's own, require, fails on most local servers
		if config.SSLNegotiation == pq.SSLNegotiationDirect {
			config.SSLMode = pq.SSLModeRequire // direct has no way back to plain text
		}
	}
	if config.TargetSessionAttrs == "" {
		// After a failover the address may lead to a standby, which refuses all that hop writes.
		config.TargetSessionAttrs = pq.TargetSessionAttrsReadWrite
	}
	// One round trip instead of two, and no prepared statement that a PgBouncer would lose.
	config.BinaryParameters = true
	return config, notes, nil
}

// keyValueString writes parameters as the driver reads them.
func keyValueString(parameters []parameter) string {
	escape := strings.NewReplacer(`'`, `\'`, `\`, `\\`)
	var b strings.Builder
	for _, p := range parameters {
		fmt.Fprintf(&b, "%s='%s' ", p.name, escape.Replace(p.value))
	}
	return b.String()
}

// The driver's errors quote values. This finds the name before the value.
var driverErrorForm = regexp.MustCompile(`^pq: wrong value for (?:\$([A-Z_]+)|"([a-z_]+)"):`)

// driverError is what may be told of an error of pq.NewConfig.
func driverError(err error) error {
	found := driverErrorForm.FindStringSubmatch(err.Error())
	switch {
	case found == nil:
		return errTogether
	case found[1] != "":
		return fmt.Errorf("%w %s has a wrong value", errEnvironment, found[1])
	}
	return fmt.Errorf("has a wrong value for the parameter %s", found[2])
}

// ---- parameters ----

// databaseParameters reads raw, drops or changes what only other programs know, and refuses what
// nobody knows. It looks at nothing but raw.
func databaseParameters(raw string) ([]parameter, []string, error) {
	all, err := splitDatabase(raw)
	if err != nil {
		return nil, nil, err
	}
	var kept []parameter
	var notes []string
	if _, driver, ok := strings.Cut(schemeOf(raw), "+"); ok && driver != "" {
		notes = append(notes, "names the driver of another language, which is left out")
	}
	afterPassword := false
	for _, given := range all {
		p, note, err := adaptParameter(given, afterPassword)
		if err != nil {
			return nil, nil, err
		}
		if note != "" {
			notes = append(notes, note)
		}
		switch {
		case p.value == "":
		case given.name == "ssl":
			kept = slices.Insert(kept, 0, p) // what sslmode says counts more
		default:
			kept = append(kept, p)
		}
		afterPassword = afterPassword || p.name == "password"
	}
	return kept, notes, checkServers(kept)
}

// adaptParameter returns p as the driver wants it, without a value where it is to be left out, and
// a note where p is not what was given.
func adaptParameter(p parameter, afterPassword bool) (parameter, string, error) {
	has := "has the parameter " + p.name + ", which "
	switch {
	case p.name == "sslmode" && p.value == "no-verify":
		note := "has sslmode=no-verify, which is taken as require: the certificate is not checked"
		return parameter{"sslmode", "require"}, note, nil
	case p.name == "ssl" && isOn(p.value):
		return parameter{"sslmode", "require"}, has + "is taken as sslmode=require", nil
	case (p.name == "schema" || p.name == "currentSchema") && p.value != "public":
		return parameter{"search_path", p.value}, has + "is taken as search_path", nil
	case slices.Contains(ownParameters, strings.ToLower(p.name)):
		return parameter{}, has + "is left out: hop sets its own", nil
	case isDriverParameter(p.name):
		return p, "", nil
	case slices.Contains(foreignParameters, p.name):
		return parameter{}, has + "is left out: the driver does not know it", nil
	case slices.Contains(strictParameters, p.name):
		return parameter{}, "", errors.New(has + "hop cannot keep to: " +
			"leave it out if you can do without")
	}
	return parameter{}, "", unknownParameter(p.name, afterPassword)
}

// isDriverParameter says whether the driver takes a parameter, for itself or for the server.
func isDriverParameter(name string) bool {
	return slices.Contains(driverParameters, name) ||
		slices.Contains(serverParameters, strings.ToLower(name))
}

// checkServers refuses hosts that no DNS could know, so that none is asked for them, and ports
// that are none.
func checkServers(parameters []parameter) error {
	for _, p := range parameters {
		for part := range strings.SplitSeq(p.value, ",") {
			switch {
			case part == "":
			case p.name == "host" && !isSocket(part) && !isHost(part):
				return errHost
			case p.name == "port" && !isPort(part):
				return errPort
			}
		}
	}
	return nil
}

// ownParameters are set by hop itself: see brakes.go and postgres.go.
var ownParameters = strings.Fields(`
	statement_timeout idle_in_transaction_session_timeout connect_timeout binary_parameters`)

// driverParameters are those of lib/pq.
var driverParameters = strings.Fields(`
	host hostaddr port dbname database user password passfile options application_name
	fallback_application_name sslmode sslnegotiation sslcert sslkey sslrootcert sslsni
	ssl_min_protocol_version ssl_max_protocol_version sslinline krbsrvname krbspn connect_timeout
	binary_parameters disable_prepared_binary_result client_encoding datestyle tz geqo
	target_session_attrs load_balance_hosts min_protocol_version max_protocol_version service`)

// serverParameters are those of PostgreSQL that people set per connection, in lower case. The
// driver sends them when it connects.
var serverParameters = strings.Fields(`
	search_path role timezone statement_timeout lock_timeout transaction_timeout
	idle_in_transaction_session_timeout idle_session_timeout default_transaction_isolation
	default_transaction_read_only synchronous_commit client_min_messages work_mem temp_buffers
	maintenance_work_mem jit plan_cache_mode random_page_cost effective_cache_size row_security
	extra_float_digits intervalstyle log_statement log_min_duration_statement tcp_keepalives_idle
	tcp_keepalives_interval tcp_keepalives_count default_tablespace standard_conforming_strings
	commit_delay`)

// foreignParameters are known to other programs only, and hop does without them: those of libpq;
// of Prisma, and what poolers' own pages tell people to add; of Node; of Python; of Ruby and
// Elixir; of Go and Rust; of PHP and others.
var foreignParameters = strings.Fields(`
	channel_binding gssencmode gssdelegation gsslib keepalives keepalives_idle keepalives_interval
	keepalives_count tcp_user_timeout sslcompression sslcertmode sslkeylogfile servicefile
	scram_client_key scram_server_key

	schema currentSchema pgbouncer connection_limit pool_timeout socket_timeout
	statement_cache_size sslaccept sslidentity pool pooled supa workaround

	ssl uselibpqcompat max query_timeout keepAlive

	prepared_statement_cache_size prepared_statement_name_func command_timeout conn_max_age
	pool_size max_overflow pool_pre_ping pool_recycle prepare_threshold

	prepared_statements reaping_frequency checkout_timeout timeout advisory_locks encoding
	reconnect variables adapter idle_timeout

	pool_max_conns pool_min_conns pool_min_idle_conns pool_max_conn_lifetime
	pool_max_conn_lifetime_jitter pool_max_conn_idle_time pool_health_check_period
	default_query_exec_mode statement_cache_mode statement_cache_capacity
	description_cache_capacity prefer_simple_protocol statement-cache-capacity

	serverVersion charset ApplicationName tcpKeepAlive socketTimeout loginTimeout connectTimeout
	prepareThreshold reWriteBatchedInserts load_balance topology_keys`)

// strictParameters are known to libpq only, and demand a protection that would be gone without
// them, or a secret that they would leave unused.
var strictParameters = strings.Fields(`
	require_auth requirepeer requiressl sslcrl sslcrldir sslpassword replication oauth_issuer
	oauth_client_id oauth_client_secret oauth_scope`)

// Variables of libpq that make the driver fail: as the parameters of the same names.
var (
	foreignVariables = strings.Fields(`PGCHANNELBINDING PGGSSENCMODE PGGSSDELEGATION PGGSSLIB
		PGSSLCERTMODE PGSSLCOMPRESSION PGREALM PGKRBSRVNAME`)
	strictVariables = strings.Fields(`PGREQUIREAUTH PGREQUIREPEER PGREQUIRESSL PGSSLCRL
		PGSSLCRLDIR`)
)

// dropVariables looks at the PG… variables before the driver does, which fails on some that it
// does not know, even empty. Those that hop does without are taken out of this process's
// environment, with a note each. An error names one that hop cannot do without.
func dropVariables() ([]string, error) {
	var notes []string
	for _, name := range slices.Concat(foreignVariables, strictVariables) {
		isSet := os.Getenv(name) != ""
		if isSet && slices.Contains(strictVariables, name) {
			return nil, fmt.Errorf("%w %s is set, which hop cannot keep to: "+
				"unset it if you can do without", errEnvironment, name)
		}
		if isSet {
			notes = append(notes, "comes with the environment variable "+name+
				", which is left out: the driver does not know it")
		}
		os.Unsetenv(name)
	}
	return notes, nil
}

// ---- cutting strings into parameters ----

// splitDatabase cuts raw into parameters, in its own order.
func splitDatabase(raw string) ([]parameter, error) {
	scheme := schemeOf(raw)
	base, _, _ := strings.Cut(scheme, "+")
	switch {
	case raw == "":
		return nil, nil
	case quoted(raw):
		return nil, errQuoted
	case strings.HasPrefix(strings.ToLower(raw), "jdbc:"):
		return nil, errJDBC
	case base == "postgres" || base == "postgresql":
		return splitDatabaseURL(raw)
	case semicolons.MatchString(raw):
		return nil, errADO
	case scheme != "" || !startsWithKey(raw):
		return nil, errNoDatabase
	}
	return splitKeyValues(raw)
}

// semicolons is how a string for .NET begins.
var semicolons = regexp.MustCompile(`(?i)^(host|server|user id|username|database)=[^\s;]*;`)

// startsWithKey says whether raw begins as a key=value string does. A mere = is not enough: many a
// password ends in one.
func startsWithKey(raw string) bool {
	name, _, ok := strings.Cut(raw, "=")
	name = strings.TrimSpace(name)
	return ok && (isDriverParameter(name) || slices.Contains(foreignParameters, name))
}

// splitDatabaseURL cuts a postgres:// URL into parameters. What the query says counts more than
// what stands before it.
func splitDatabaseURL(raw string) ([]parameter, error) {
	u, err := splitURL(raw)
	if err != nil {
		return nil, err
	}
	if strings.Contains(u.path, "/") {
		return nil, errDatabasePath
	}
	var hosts, ports []string
	for _, h := range u.hosts {
		if h.name == "" && len(u.hosts) > 1 {
			return nil, errHost
		}
		hosts = append(hosts, h.name)
		ports = append(ports, cmp.Or(h.port, "5432"))
	}
	if !slices.ContainsFunc(u.hosts, func(h hostPort) bool { return h.port != "" }) {
		ports = nil // a port of the query, or PGPORT
	}
	parameters := u.query
	for _, p := range []parameter{
		{"host", strings.Join(hosts, ",")},
		{"port", strings.Join(ports, ",")},
		{"dbname", unescape(u.path)},
		{"user", u.user},
		{"password", u.password},
	} {
		isSame := func(q parameter) bool { return q.name == p.name }
		if !slices.ContainsFunc(u.query, isSame) {
			parameters = append(parameters, p)
		}
	}
	return parameters, nil
}

// keyValue is a key, its blanks and its value, by the rules of libpq: a backslash takes the next
// character as it is, and blanks stand only in single quotes or behind a backslash.
var keyValue = regexp.MustCompile(`(?s)^([A-Za-z][A-Za-z0-9_.]{0,62})[\s\v]*=([\s\v]*)` +
	`(?:'((?:[^'\\]|\\.)*)'|((?:[^'\s\v\\]|\\.)(?:[^\s\v\\]|\\.)*)|)(?:[\s\v]+|$)`)

// escaped is a backslash and what it takes as it is.
var escaped = regexp.MustCompile(`(?s)\\(.)`)

// splitKeyValues cuts a key=value string into parameters.
func splitKeyValues(raw string) ([]parameter, error) {
	var parameters []parameter
	for rest := strings.TrimSpace(raw); rest != ""; {
		found := keyValue.FindStringSubmatch(rest)
		if found == nil {
			return nil, errKeyValue
		}
		name, blanks, inQuotes, plain := found[1], found[2], found[3], found[4]
		plain = escaped.ReplaceAllString(plain, "$1")
		value := plain + escaped.ReplaceAllString(inQuotes, "$1")
		switch {
		case strings.HasPrefix(plain, `"`):
			return nil, errDoubleQuotes // they would become a part of the value
		case blanks != "" && startsWithKey(value):
			return nil, errNoValue // blanks may follow =, so the next key would be the value
		}
		parameters = append(parameters, parameter{name, value})
		rest = rest[len(found[0]):]
	}
	return parameters, nil
}
