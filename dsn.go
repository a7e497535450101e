package main

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// What connection strings become: here what those for PostgreSQL and for Redis have in common, in
// dsn_postgres.go and dsn_redis.go the rest. Nothing in them connects to anything.
//
// Providers, frameworks and people write these strings in many forms. Each is taken as it was
// meant, taken with a note about what was left out or changed, or refused with the way to mend it.
// A string that is guessed at could lead to another server, or carry a piece of the password into a
// log or a DNS query. So neither an error nor a note ever holds a value: they name settings and
// parameters only, and read on from the name of the setting ("DATABASE_URL" + " has …").

// Errors about strings of both kinds.
var (
	errQuoted = errors.New("has quotes around it: leave them out, they belong to the syntax " +
		"of the file that it stands in")
	errRawCharacter = errors.New("has a raw @, / ? or # where none can stand: percent-encode " +
		"them in user, password and parameters (@ is %40, / is %2F, ? is %3F, # is %23)")
	errRawPercent = errors.New("has a % that begins no escape: write % itself as %25")
	errRawBlank   = errors.New("has a blank or control character in it: percent-encode it " +
		"(a blank is %20)")
	errHost      = errors.New("has a host that is neither a name nor an address")
	errPort      = errors.New("has a port that is no number from 1 to 65535")
	errParameter = errors.New("has a parameter without a name and a value: " +
		"write & itself as %26")
	errAfterPassword = errors.New("has an unknown parameter after the password: if it is part of " +
		"the password, escape blanks and & in that (in a URL as %20 and %26)")
)

// parameter is a part of a connection string.
type parameter struct{ name, value string }

// parameterName is what a parameter's name looks like.
var parameterName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_.]{0,62}$`)

// unknownParameter is the error about a parameter that nobody knows. After a password no name is
// told: a blank or & that was not escaped would make the rest of the password look like one.
func unknownParameter(name string, afterPassword bool) error {
	switch {
	case afterPassword:
		return errAfterPassword
	case !parameterName.MatchString(name):
		return errParameter
	}
	return fmt.Errorf("has the parameter %s, which hop does not know", name)
}

// isOn says whether a parameter that is a switch, such as ssl, is on. Also ssl=require means so.
func isOn(value string) bool {
	switch strings.ToLower(value) {
	case "1", "true", "on", "yes", "require":
		return true
	}
	return false
}

// hostOnly is what a log may show of a connection string: hosts and path, and only "set" of
// whatever is not clearly a URL.
func hostOnly(raw string) string {
	if raw == "" {
		return ""
	}
	u, err := splitURL(raw)
	if err != nil {
		return "set"
	}
	for _, h := range u.hosts {
		if !isHost(h.name) {
			return "set"
		}
	}
	if u.path != "" {
		return u.servers + "/" + u.path
	}
	return u.servers
}

// ---- URLs ----

// connectionURL is a URL in its parts. servers and path are as they stand there, the rest has no
// escapes any more.
type connectionURL struct {
	user     string
	password string
	colon    bool // stands behind the user
	servers  string
	hosts    []hostPort // the same, one by one
	path     string     // without the slash that it begins with
	query    []parameter
}

// hostPort is a server. Both may be empty.
type hostPort struct {
	name string // without brackets
	port string
}

// schemePattern is how a URL with hosts begins.
var schemePattern = regexp.MustCompile(`^([A-Za-z][A-Za-z0-9+.-]*)://`)

// schemeOf returns the scheme of a URL in lower case, or "".
func schemeOf(raw string) string {
	found := schemePattern.FindStringSubmatch(raw)
	if found == nil {
		return ""
	}
	return strings.ToLower(found[1])
}

// badEscape finds a % that begins no escape.
var badEscape = regexp.MustCompile(`(?s)%(.?$|[^0-9A-Fa-f]|.[^0-9A-Fa-f])`)

// splitURL cuts a connection URL into its parts. net/url would refuse lists of hosts and half of
// what passwords consist of, and quote both in its errors. Passwords with raw characters do not get
// through: the only @ of a URL stands behind the password, before any / ? or #.
func splitURL(raw string) (connectionURL, error) {
	scheme := schemeOf(raw)
	if scheme == "" {
		return connectionURL{}, errors.New("is no URL")
	}
	if strings.ContainsFunc(raw, isSpaceOrControl) {
		return connectionURL{}, errRawBlank
	}
	authority := raw[len(scheme)+len("://"):]
	rest := ""
	if end := strings.IndexAny(authority, "/?#"); end >= 0 {
		authority, rest = authority[:end], authority[end:]
	}
	if strings.Count(authority, "@") > 1 || strings.ContainsAny(rest, "@#") {
		return connectionURL{}, errRawCharacter
	}
	if badEscape.MatchString(raw) {
		return connectionURL{}, errRawPercent
	}
	path, query, _ := strings.Cut(rest, "?")
	account, servers, found := strings.Cut(authority, "@")
	if !found {
		account, servers = "", authority
	}
	user, password, colon := strings.Cut(account, ":")
	u := connectionURL{
		user:     unescape(user),
		password: unescape(password),
		colon:    colon,
		servers:  servers,
		path:     strings.TrimPrefix(path, "/"),
	}
	if err := u.splitServers(); err != nil {
		return connectionURL{}, err
	}
	return u, u.splitQuery(query)
}

// unescape replaces the escapes of a text in which badEscape has found nothing.
func unescape(s string) string {
	text, err := url.PathUnescape(s)
	if err != nil {
		return ""
	}
	return text
}

// splitServers reads the list of servers, each host or host:port.
func (u *connectionURL) splitServers() error {
	for server := range strings.SplitSeq(u.servers, ",") {
		name, port := cutPort(server)
		name = unescape(name)
		if port != "" && !isPort(port) {
			return errPort
		}
		if name != "" && !isSocket(name) && !isHost(name) {
			return errHost
		}
		u.hosts = append(u.hosts, hostPort{name, port})
	}
	return nil
}

// cutPort cuts host:port at its colon, and takes the brackets off an IPv6 address.
func cutPort(s string) (name, port string) {
	if inside, ok := strings.CutPrefix(s, "["); ok {
		address, rest, closed := strings.Cut(inside, "]")
		if closed && (rest == "" || rest[0] == ':') {
			return address, strings.TrimPrefix(rest, ":")
		}
		return s, "" // which is no host
	}
	name, port, _ = strings.Cut(s, ":")
	return name, port
}

// splitQuery reads name=value&name=value, and keeps its order.
func (u *connectionURL) splitQuery(query string) error {
	for part := range strings.SplitSeq(query, "&") {
		if part == "" {
			continue
		}
		name, value, ok := strings.Cut(strings.ReplaceAll(part, "+", " "), "=")
		if !ok {
			return errParameter
		}
		u.query = append(u.query, parameter{unescape(name), unescape(value)})
	}
	return nil
}

// ---- what a text looks like ----

// hostPattern is what a host's name looks like. Underscores are for the names of containers.
var hostPattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,252})$`)

// isHost says whether s is the name or the address of a host.
func isHost(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil || hostPattern.MatchString(s)
}

// isSocket says whether host is the folder of a Unix socket, or an abstract one.
func isSocket(host string) bool { return filepath.IsAbs(host) || strings.HasPrefix(host, "@") }

// isPort says whether s is the number of a port.
func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

// quoted says whether s stands in quotes.
func quoted(s string) bool {
	if len(s) < 2 {
		return false
	}
	first, last := s[0], s[len(s)-1]
	return first == last && (first == '"' || first == '\'' || first == '`')
}

// isSpaceOrControl says whether r is a blank or a control character of ASCII.
func isSpaceOrControl(r rune) bool { return r <= ' ' || r == 0x7f }
