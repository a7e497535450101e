package main

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// What may be stored: short codes, targets, texts, e-mail addresses and times. All of it is pure:
// nothing is looked up, and no target is ever fetched.

// Limits of what is stored.
const (
	minCode    = 3         // characters; shorter ones could be tried out
	maxCode    = 32        // characters; longer ones are no short links
	maxTarget  = 2048      // bytes; what browsers and proxies still carry in a Location
	maxText    = 500       // characters of a title, name or e-mail
	maxExcerpt = 80        // bytes of a stranger's text that an error may repeat
	maxID      = 1<<53 - 1 // beyond it JavaScript reads another number than was written
)

// ---- codes ----

// codeAlphabet are the characters of codes that hop makes: letters and digits without 0 O 1 I l,
// which people confuse.
const codeAlphabet = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"

// The lengths of the codes that hop makes.
const (
	randomCode = 7  // 57^7 is 2 × 10^12: who guesses finds nothing
	keyedCode  = 10 // 57^10 is 4 × 10^17: two keys never meet
)

// reservedWords are codes that no link may have.
var reservedWords = map[string]bool{
	// The first words of hop's own paths, where no redirect could be reached. A test holds them to
	// the routes.
	"events": true, "health": true, "metrics": true, "openapi.json": true, "openapi.yaml": true,
	"robots.txt": true, "shorten": true, "stats": true, "urls": true, "users": true,
	// Room for paths to come.
	"admin": true, "api": true, "docs": true, "favicon.ico": true, "login": true, "static": true,
}

// validCode says whether s can be a short code: 3 to 32 of [0-9A-Za-z_-], the first a letter or
// digit. It runs on every redirect: written by hand it takes 10 ns, a regexp 300.
func validCode(s string) bool {
	if len(s) < minCode || len(s) > maxCode || s[0] == '-' || s[0] == '_' {
		return false
	}
	for i := range len(s) {
		if !isCodeByte(s[i]) {
			return false
		}
	}
	return true
}

// isCodeByte says whether a code may hold c.
func isCodeByte(c byte) bool {
	return isLetterOrDigit(c) || c == '-' || c == '_'
}

// isLetterOrDigit says whether c is an ASCII letter or digit.
func isLetterOrDigit(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// trimCode cuts off the end of s what no code can hold: links copied out of running text bring a
// full stop, a bracket or an invisible character along. It allocates nothing. Call it only when
// validCode has refused s, so that a clean code costs nothing; the result may still be no code.
func trimCode(s string) string {
	end := len(s)
	for end > 0 && !isCodeByte(s[end-1]) {
		end--
	}
	return s[:end]
}

// checkCode returns why s cannot be a link's code, or nil.
func checkCode(s string) error {
	if !validCode(s) {
		return errors.New("must be 3 to 32 letters, digits, - or _, the first a letter or digit")
	}
	if reservedWords[s] {
		return errors.New("is reserved for the service itself")
	}
	return nil
}

// newCode returns 7 random characters of codeAlphabet.
func newCode() string {
	code := make([]byte, 0, randomCode)
	random := make([]byte, 2*randomCode)
	for {
		for len(code) < randomCode {
			rand.Read(random)
			code = appendCode(code, random, randomCode)
		}
		if !reservedWords[string(code)] {
			return string(code)
		}
		code = code[:0]
	}
}

// codeFromKey returns the 10 characters of codeAlphabet that belong to a key which its client made
// up. Who does not know the secret cannot tell the code; where no token is set, there is no
// secret. The same pair always gives the same code.
func codeFromKey(secret, key string) string {
	secretSum := sha256.Sum256([]byte(secret)) // of fixed length: no secret and key run together
	seed := append(secretSum[:], key...)
	var code []byte
	for len(code) < keyedCode { // one round is enough but once in 10^13
		sum := sha256.Sum256(seed)
		code = appendCode(code, sum[:], keyedCode)
		seed = sum[:]
	}
	return string(code)
}

// appendCode appends random bytes to code as characters of codeAlphabet until it has length of
// them. It skips the bytes that would favour the alphabet's first characters.
func appendCode(code, random []byte, length int) []byte {
	const fair = 256 / len(codeAlphabet) * len(codeAlphabet)
	for _, b := range random {
		if len(code) < length && int(b) < fair {
			code = append(code, codeAlphabet[int(b)%len(codeAlphabet)])
		}
	}
	return code
}

// ---- targets ----

// targetRules decide which targets a link may have.
type targetRules struct {
	base         *url.URL // what short links begin with: a target under it is a loop; nil is none
	allowPrivate bool     // let links point into private networks and at loopback
}

// newTargetRules returns the rules of a service whose short links begin with baseURL.
func newTargetRules(baseURL string, allowPrivate bool) (targetRules, error) {
	base, err := url.Parse(baseURL)
	if err != nil {
		return targetRules{}, err
	}
	return targetRules{base: base, allowPrivate: allowPrivate}, nil
}

// errNoURL refuses what is no web address at all.
var errNoURL = errors.New("must be a URL like https://example.com/page")

// bareHost is the beginning of a web address that was typed without https://.
var bareHost = regexp.MustCompile(
	`^(?i)([a-z0-9_-]+\.)+(xn--[a-z0-9-]+|[a-z]{2,})\.?(:[0-9]+)?([/?#]|$)`)

// check returns raw as it is to be stored, or why it must not be a target. Blanks at its ends are
// cut and a missing https:// is added; nothing else is changed. It refuses what a browser would
// read differently than it looks.
func (t targetRules) check(raw string) (string, error) {
	clean := strings.TrimSpace(raw)
	if bareHost.MatchString(clean) {
		clean = "https://" + clean
	}
	if len(clean) > maxTarget || !utf8.ValidString(clean) {
		return "", fmt.Errorf("must be valid UTF-8 of at most %d bytes", maxTarget)
	}
	for _, r := range clean {
		if isHidden(r) {
			return "", fmt.Errorf("must not contain %U", r)
		}
	}
	scheme, rest, _ := strings.Cut(clean, "://")
	scheme = strings.ToLower(scheme)
	if scheme != "http" && scheme != "https" {
		return "", errNoURL
	}
	authority, tail := rest, ""
	if end := strings.IndexAny(rest, "/?#"); end >= 0 {
		authority, tail = rest[:end], rest[end:]
	}
	if authority == "" {
		return "", errNoURL
	}
	pathPart := tail
	if end := strings.IndexAny(tail, "?#"); end >= 0 {
		pathPart = tail[:end]
	}
	if strings.Contains(pathPart, `\`) { // browsers read it as a slash
		return "", errors.New(`must not contain \ in the path`)
	}
	host, port, err := splitAuthority(scheme, authority)
	if err != nil {
		return "", err
	}
	ip, err := checkHost(host)
	if err != nil {
		return "", err
	}
	if t.isLoop(host, ip, port, pathPart) {
		return "", errors.New("must not point back at this service")
	}
	if !t.allowPrivate && isPrivate(host, ip) {
		return "", errors.New("must not point into a private network")
	}
	return clean, nil
}

// isHidden says whether r, inside a URL, ends it, hides or turns what follows. The two joiners,
// which words of some scripts and emoji need, are allowed.
func isHidden(r rune) bool {
	if r == '\u200c' || r == '\u200d' {
		return false
	}
	return unicode.IsControl(r) || unicode.IsSpace(r) || unicode.Is(unicode.Cf, r)
}

// splitAuthority takes the part of a URL between :// and the path apart. The host comes back in
// lower case, without brackets and without a dot at its end, the port is that of the scheme if
// none is given.
func splitAuthority(scheme, authority string) (host string, port uint64, err error) {
	if strings.Contains(authority, "@") {
		return "", 0, errors.New("must not contain a user name or password")
	}
	port = 80
	if scheme == "https" {
		port = 443
	}
	host = strings.ToLower(authority)
	inBrackets := strings.HasPrefix(host, "[")
	if colon := strings.LastIndexByte(host, ':'); colon > strings.LastIndexByte(host, ']') {
		port, err = strconv.ParseUint(host[colon+1:], 10, 16)
		if err != nil || port == 0 {
			return "", 0, errors.New("must have a port from 1 to 65535, or none")
		}
		host = host[:colon]
	}
	if inBrackets {
		address, closed := strings.CutSuffix(host[1:], "]")
		if ip, err := netip.ParseAddr(address); !closed || err != nil || !ip.Is6() {
			return "", 0, errors.New("must have an IPv6 address in the brackets")
		}
		return address, port, nil
	}
	if strings.Contains(host, ":") {
		return "", 0, errors.New("must have an IPv6 address in brackets")
	}
	return strings.TrimSuffix(host, "."), port, nil
}

// hostName is one label or more. ASCII only: browsers fold full-width and other look-alike letters
// to ASCII, so a name that passes here as something else could still be localhost there.
var hostName = regexp.MustCompile(`^[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*$`)

// checkHost judges a host in lower case. It returns its address if it is one.
func checkHost(host string) (netip.Addr, error) {
	if ip, err := netip.ParseAddr(host); err == nil {
		if ip.Zone() != "" {
			return netip.Addr{}, errors.New("must not have an IPv6 address with a zone")
		}
		return ip.Unmap(), nil
	}
	if !hostName.MatchString(host) || len(host) > 253 {
		return netip.Addr{}, errors.New(
			"must have a host of ASCII letters, digits, dots and hyphens (xn--… for others)")
	}
	last := host[strings.LastIndexByte(host, '.')+1:]
	if '0' <= last[0] && last[0] <= '9' { // browsers read 127.1, 0x7f000001, 2130706433 as IPv4
		return netip.Addr{}, errors.New("must not have a host that only looks like an IP address")
	}
	return netip.Addr{}, nil
}

// isLoop says whether a target leads back to this service: the same host, the same port and a path
// below that of base, however they are spelled. The ports 80 and 443 are one: nearly every server
// leads from one to the other.
func (t targetRules) isLoop(host string, ip netip.Addr, port uint64, pathPart string) bool {
	if t.base == nil {
		return false
	}
	ownHost, ownPort, err := splitAuthority(strings.ToLower(t.base.Scheme), t.base.Host)
	if err != nil {
		return false
	}
	ownIP, err := netip.ParseAddr(ownHost)
	sameHost := host == ownHost || err == nil && ip == ownIP.Unmap()
	isDefault := func(p uint64) bool { return p == 80 || p == 443 }
	if !sameHost || port != ownPort && !(isDefault(port) && isDefault(ownPort)) {
		return false
	}
	own := strings.TrimRight(t.base.Path, "/")
	return strings.HasPrefix(cleanPath(pathPart)+"/", own+"/")
}

// cleanPath returns the path that servers see: decoded, without dot segments and double slashes.
func cleanPath(pathPart string) string {
	decoded, err := url.PathUnescape(encodeBarePercents(pathPart))
	if err != nil {
		decoded = pathPart
	}
	return strings.TrimRight(path.Clean("/"+decoded), "/")
}

// privateNames are endings of names that no public web server has.
var privateNames = []string{
	".corp", ".home", ".home.arpa", ".internal", ".lan", ".local", ".localdomain", ".localhost",
}

// privateNets are the ranges netip has no predicate for that never lead to a public web server
// (RFC 6890), and those of IPv6 that hide an IPv4 address.
var privateNets = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"),  // carriers' own
	netip.MustParsePrefix("192.0.0.0/24"),   // protocols'
	netip.MustParsePrefix("192.88.99.0/24"), // 6to4 relays
	netip.MustParsePrefix("198.18.0.0/15"),  // benchmarks
	netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("::/96"),          // IPv4-compatible
	netip.MustParsePrefix("64:ff9b::/96"),   // NAT64
	netip.MustParsePrefix("64:ff9b:1::/48"), // NAT64, local
	netip.MustParsePrefix("100::/64"),       // discard
	netip.MustParsePrefix("2001::/32"),      // Teredo
	netip.MustParsePrefix("2002::/16"),      // 6to4
	netip.MustParsePrefix("fec0::/10"),      // site-local
}

// isPrivate says whether a host is one of a private network, or this machine. The address is
// invalid for a name.
func isPrivate(host string, ip netip.Addr) bool {
	if ip.IsValid() {
		inNet := func(p netip.Prefix) bool { return p.Contains(ip) }
		return !ip.IsGlobalUnicast() || ip.IsPrivate() || slices.ContainsFunc(privateNets, inNet)
	}
	if !strings.Contains(host, ".") {
		return true
	}
	endsIn := func(name string) bool { return strings.HasSuffix(host, name) }
	return slices.ContainsFunc(privateNames, endsIn)
}

// asciiLocation returns a checked target as a Location header carries it: bytes that are no
// printable ASCII, and those that no URL may hold, are percent-encoded. A target without them is
// returned itself, without an allocation.
func asciiLocation(target string) string {
	return percentEncode(target, func(c byte) bool {
		return c <= ' ' || c >= 0x7f || strings.IndexByte("\"<>\\`", c) >= 0
	})
}

// encodeBarePercents encodes only each % that begins no percent-encoded byte.
func encodeBarePercents(s string) string {
	return percentEncode(s, func(byte) bool { return false })
}

// percentEncode encodes the bytes that mustEncode chooses, and each % without two hexadecimal
// digits behind it.
func percentEncode(s string, mustEncode func(byte) bool) string {
	const digits = "0123456789ABCDEF"
	var encoded []byte
	kept := 0 // what stands before it is in encoded
	for i := range len(s) {
		c := s[i]
		if c == '%' {
			if i+2 < len(s) && isHex(s[i+1]) && isHex(s[i+2]) {
				continue
			}
		} else if !mustEncode(c) {
			continue
		}
		encoded = append(encoded, s[kept:i]...)
		encoded = append(encoded, '%', digits[c>>4], digits[c&15])
		kept = i + 1
	}
	if kept == 0 {
		return s
	}
	return string(append(encoded, s[kept:]...))
}

// isHex says whether c is a hexadecimal digit.
func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

// ---- texts and times ----

// cleanText returns s without blanks at its ends. A title that is "" then is none.
func cleanText(s string) string { return strings.TrimSpace(s) }

// checkText returns why s cannot be stored as one line of people's text, or nil.
func checkText(s string) error {
	valid := utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
	if !valid || utf8.RuneCountInString(s) > maxText {
		return fmt.Errorf("must be valid UTF-8 of at most %d characters, none of them control"+
			" characters", maxText)
	}
	return nil
}

// checkSearch returns why s cannot be a part of a stored text or target, or nil.
func checkSearch(s string) error {
	if !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) || len(s) > maxTarget {
		return fmt.Errorf("must be valid UTF-8 of at most %d bytes, none of them control characters",
			maxTarget)
	}
	return nil
}

// checkName is checkText for what must not be empty or padded: user names and event types.
func checkName(s string) error {
	if cleanText(s) != s {
		return errors.New("must not begin or end with a blank")
	}
	if !strings.ContainsFunc(s, isVisible) {
		return errors.New("must not be empty")
	}
	return checkText(s)
}

// isVisible says whether r shows: to Unicode fillers are letters, and to people nothing.
func isVisible(r rune) bool {
	return unicode.IsGraphic(r) && !unicode.IsSpace(r) &&
		!unicode.Is(unicode.Other_Default_Ignorable_Code_Point, r)
}

// emailForm is what plausible means. Only a message sent there could tell more.
var emailForm = regexp.MustCompile(`^[^@\s,;<>()"\\]+@[^@\s,;<>()"\\]+\.[^@\s,;<>()"\\.]+$`)

// checkEmail returns why s cannot be an e-mail address, or nil.
func checkEmail(s string) error {
	if !emailForm.MatchString(s) || strings.HasPrefix(s, ".") || strings.Contains(s, "..") {
		return errors.New("must be an e-mail address like name@example.com")
	}
	return checkText(s)
}

// timeForms are the ways to write a time that parseTime reads. One without a zone is UTC. Those
// with seconds also stand for themselves with a fraction of one.
var timeForms = []string{
	time.RFC3339,
	wireTime,
	csvTime,
	"2006-01-02T15:04",          // what an HTML form sends
	"2006-01-02T15:04Z07:00",    // the same with a zone
	"2006-01-02 15:04:05Z07:00", // what Python prints
	"2006-01-02T15:04:05Z0700",  // what date +%FT%T%z prints
}

// parseTime reads a time as people and programs write it. It returns whole seconds in UTC, in the
// years 1 to 9999.
func parseTime(s string) (time.Time, error) {
	for _, form := range timeForms {
		t, err := time.Parse(form, s)
		if err != nil {
			continue
		}
		t = t.UTC().Truncate(time.Second)
		if t.Year() >= 1 && t.Year() <= 9999 {
			return t, nil
		}
	}
	return time.Time{}, errors.New("must be a time like 2027-01-31T12:00:00Z")
}

// excerpt quotes the beginning of a stranger's text for an error: 80 bytes at most.
func excerpt(s string) string {
	if len(s) <= maxExcerpt {
		return strconv.Quote(s)
	}
	return strconv.Quote(strings.ToValidUTF8(s[:maxExcerpt], "")) + "…"
}
