package main

import (
	"cmp"
	"errors"
	"net"
	"slices"
	"strconv"
	"strings"
)

// What connection strings for Redis become: see dsn.go.

// Errors about strings for Redis.
var (
	errNoRedis = errors.New("must be a redis:// or rediss:// URL, or one of Sentinels, " +
		"redis+sentinel://host1,host2/mymaster")
	errRedisHosts = errors.New("must name one host; several are Sentinels and written " +
		"redis+sentinel://host1,host2/mymaster")
	errRedisDB     = errors.New("must end in the number of a database, or in nothing: /0")
	errNoMaster    = errors.New("must name the master that the Sentinels watch: /mymaster")
	errRedisTLS    = errors.New("asks for TLS by a parameter: begin it with rediss:// instead")
	errClusterMode = errors.New("asks for Redis Cluster, which hop does not speak: " +
		"name one Redis, or its Sentinels")
)

// redisOptions is the way to Redis.
type redisOptions struct {
	addresses  []string // host:port of Redis; with a master, of its Sentinels
	master     string   // the name that Sentinels know the master by, or ""
	tls        bool     // also to the Sentinels
	skipVerify bool     // with TLS: whoever answers is believed
	serverName string   // that the certificate must have; "" is the host that is dialled
	username   string
	password   string
	db         int

	sentinelUsername string // Sentinels have passwords of their own, or none
	sentinelPassword string

	notes []string // what was left out or changed
}

// redisSchemes are the schemes that redisConfig reads, those of Valkey apart.
var redisSchemes = []string{"redis", "rediss", "redis+sentinel", "rediss+sentinel"}

// redisConfig turns a URL into the way to Redis. The forms are redis://[user:password@]host[:port]
// [/db], the same with rediss:// for TLS, and redis+sentinel:// or rediss+sentinel:// with
// [user:password@]host[:port],…/master[/db]. valkey:// is as redis://.
func redisConfig(raw string) (redisOptions, error) {
	scheme := strings.Replace(schemeOf(raw), "valkey", "redis", 1)
	switch {
	case quoted(raw):
		return redisOptions{}, errQuoted
	case strings.HasSuffix(scheme, "+cluster") || strings.HasSuffix(scheme, "-cluster"):
		return redisOptions{}, errClusterMode
	case !slices.Contains(redisSchemes, scheme):
		return redisOptions{}, errNoRedis
	}
	u, err := splitURL(raw)
	if err != nil {
		return redisOptions{}, err
	}
	o := redisOptions{
		tls:      strings.HasPrefix(scheme, "rediss"),
		username: u.user,
		password: u.password,
	}
	if u.password == "" && !u.colon {
		// A lone word before the @ is the password, as redis-cli has it.
		o.username, o.password = "", u.user
	}
	for _, p := range u.query {
		if err := o.take(p); err != nil {
			return redisOptions{}, err
		}
	}
	db, port := u.path, "6379"
	if strings.HasSuffix(scheme, "+sentinel") {
		o.master, db, _ = strings.Cut(u.path, "/")
		o.master = unescape(o.master)
		port = "26379"
		if o.master == "" {
			return redisOptions{}, errNoMaster
		}
	} else if len(u.hosts) > 1 {
		return redisOptions{}, errRedisHosts
	}
	if db != "" {
		if o.db, err = databaseNumber(db); err != nil {
			return redisOptions{}, err
		}
	}
	for _, h := range u.hosts {
		if !isHost(h.name) {
			return redisOptions{}, errHost
		}
		o.addresses = append(o.addresses, net.JoinHostPort(h.name, cmp.Or(h.port, port)))
	}
	if o.master == "" {
		o.serverName = u.hosts[0].name
	}
	if !o.tls && strings.HasSuffix(o.serverName, ".upstash.io") {
		o.tls = true
		o.notes = append(o.notes, "is taken as rediss://: Upstash speaks nothing but TLS")
	}
	return o, nil
}

// databaseNumber reads the number of one of Redis's databases.
func databaseNumber(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return 0, errRedisDB
	}
	return int(n), nil
}

// take reads a parameter of the URL.
func (o *redisOptions) take(p parameter) (err error) {
	asksNotToCheck := slices.Contains(skipParameters, p.name) && isOn(p.value) ||
		p.name == "ssl_cert_reqs" && strings.HasSuffix(strings.ToLower(p.value), "none")
	switch {
	case p.name == "db":
		o.db, err = databaseNumber(p.value)
	case p.name == "sentinel_username":
		o.sentinelUsername = p.value
	case p.name == "sentinel_password":
		o.sentinelPassword = p.value
	case asksNotToCheck:
		o.skipVerify = true
		o.notes = append(o.notes, "has the parameter "+p.name+": the certificate is not checked")
	case (p.name == "ssl" || p.name == "tls") && isOn(p.value) && !o.tls:
		return errRedisTLS
	case slices.Contains(foreignRedisParameters, p.name), slices.Contains(skipParameters, p.name):
		o.notes = append(o.notes, "has the parameter "+p.name+", which is left out")
	default:
		err = unknownParameter(p.name, o.sentinelPassword != "")
	}
	return err
}

// Parameters of Redis URLs: skipParameters ask not to check certificates, foreignRedisParameters
// are those of other clients that hop does without.
var (
	skipParameters         = []string{"skip_verify", "insecure_skip_verify", "insecure"}
	foreignRedisParameters = strings.Fields(`
		ssl_cert_reqs ssl_check_hostname ssl tls family protocol client_name max_connections
		socket_timeout socket_connect_timeout socket_keepalive retry_on_timeout
		health_check_interval decode_responses encoding timeout dial_timeout read_timeout
		write_timeout pool_timeout pool_size min_idle_conns max_idle_conns conn_max_idle_time
		conn_max_lifetime max_retries connectTimeout keepAlive allowUsernameInURI virtual_host
		maxRetriesPerRequest enableReadyCheck`)
)
