package main

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// ---- codes ----

func TestCodes(t *testing.T) {
	tests := []struct {
		code            string
		valid, storable bool
	}{
		{"abc", true, true},
		{"Ab3-_x", true, true},
		{"0-_", true, true},
		{strings.Repeat("a", maxCode), true, true},
		{strings.Repeat("a", maxCode+1), false, false},
		{"ab", false, false},
		{"", false, false},
		{"-abc", false, false},
		{"_abc", false, false},
		{"a/b", false, false},
		{"a b", false, false},
		{"abc.", false, false},
		{"abc\x00", false, false},
		{"日本語", false, false},
		{"\xff\xfe\xfd", false, false},
		{"health", true, false},
		{"users", true, false},
		{"Health", true, true},
		{"events2", true, true},
	}
	for _, test := range tests {
		if validCode(test.code) != test.valid {
			t.Errorf("validCode(%q): %v", test.code, !test.valid)
		}
		if err := checkCode(test.code); (err == nil) != test.storable {
			t.Errorf("checkCode(%q): %v", test.code, err)
		}
	}
}

// A link copied out of a text is found in spite of what the text put behind it.
func TestTrimCode(t *testing.T) {
	tests := []struct{ sent, code string }{
		{"code/", "code"},
		{"code.", "code"},
		{"code,", "code"},
		{"code)", "code"},
		{"code!", "code"},
		{"code).", "code"},
		{"code ", "code"},
		{"code\u200b", "code"},
		{"code\u00a0…»", "code"},
		{"code\xff\x00", "code"},
		{"code-_", "code-_"},
		{"code", "code"},
		{"a.b", "a.b"},
		{".code", ".code"},
		{"...", ""},
		{"", ""},
	}
	for _, test := range tests {
		if got := trimCode(test.sent); got != test.code {
			t.Errorf("%q: %q, want %q", test.sent, got, test.code)
		}
	}
	if n := testing.AllocsPerRun(100, func() { _ = trimCode("code)\u200b") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestNewCode(t *testing.T) {
	seen := map[string]bool{}
	letters := map[rune]int{}
	for range 10_000 {
		code := newCode()
		if len(code) != randomCode || checkCode(code) != nil || seen[code] {
			t.Fatalf("%q", code)
		}
		seen[code] = true
		for _, c := range code {
			letters[c]++
		}
	}
	for c := range letters {
		if strings.ContainsRune("0O1Il", c) {
			t.Errorf("%c looks like another letter", c)
		}
	}
	// 70,000 letters: each 1,228 times, give or take 35. Six times that never happens by chance.
	mean := 10_000 * randomCode / len(codeAlphabet)
	for _, c := range codeAlphabet {
		if n := letters[c]; n < mean-210 || n > mean+210 {
			t.Errorf("%c came %d times, want about %d", c, n, mean)
		}
	}
}

func TestCodeFromKey(t *testing.T) {
	code := codeFromKey("secret", "key")
	if len(code) != keyedCode || checkCode(code) != nil || strings.ContainsAny(code, "0O1Il") {
		t.Errorf("%q", code)
	}
	if again := codeFromKey("secret", "key"); again != code {
		t.Errorf("%q and then %q", code, again)
	}
	others := [][2]string{{"secret2", "key"}, {"secret", "key2"}, {"secretk", "ey"}, {"", "secretkey"}}
	for _, other := range others {
		if codeFromKey(other[0], other[1]) == code {
			t.Errorf("%q has the same code", other)
		}
	}
}

// ---- targets ----

// testRules are those of a service at http://hop.test.
var testRules = mustTargetRules("http://hop.test", false)

// mustTargetRules is newTargetRules for a base that is well formed.
func mustTargetRules(base string, allowPrivate bool) targetRules {
	rules, err := newTargetRules(base, allowPrivate)
	if err != nil {
		panic(err)
	}
	return rules
}

// goodTargets must be accepted as they are.
var goodTargets = []string{
	"http://example.com",
	"https://example.com/",
	"HTTPS://EXAMPLE.COM/Path?Query#Fragment",
	"https://example.com:8443/a/b/../c/./d//e",
	"https://sub.domain.example.co.uk/a%20b%2Fc?x=%C3%A9&y=a+b&&z",
	"https://example.com?query-without-path=1",
	"https://example.com#fragment-without-path",
	"https://example.com/?next=https://user:pass@evil.example/",
	"https://example.com/@handle/a:b;c,d!$&'()*+=~_-.|{}^[]",
	"https://example.com/путь/日本語?ключ=значение#é",
	"https://xn--bcher-kva.example/",
	"https://under_score.example.com/",
	"https://example.com./",
	"http://93.184.216.34/",
	"http://93.184.216.34:8080/x",
	"http://8.8.8.8",
	"http://[2606:2800:220:1:248:1893:25c8:1946]/",
	"http://[2606:4700:4700::1111]:8080/x?y#z",
	"http://[64:ff9c::1]/",
	"https://hop.test.example.com/not-us",
	"https://nothop.test/not-us",
	"http://hop.test:8080/another-port",
	"https://localhost.example.com/",
	"https://10.0.0.1.example.com/",
	"https://home.example.com/",
	"https://corporate.example/",
	"https://a.b-c.d--e.museum/",
	"https://example.com/" + strings.Repeat("a", maxTarget-20),
	// browsers take these, and Location has them percent-encoded
	`https://example.com/?q="a"&b=<c>&d=` + "`e`",
	`https://example.com/<b>"x"` + "`y`",
	`https://example.com/?path=C:\dir#a\b`,
	"https://example.com/می\u200cخواهم/👨\u200d👩\u200d👧",
	"https://example.com/100%",
	"https://example.com/%zz?50%#5%",
}

// hostileTargets must be refused: a browser would read them differently than they look, they lead
// into a private network or back to us, or they are no web address at all.
var hostileTargets = []string{
	// no web address
	"", "/", "example", "//example.com/", "/path", "?q", "#f", "http:", "http:/", "http://",
	"http:///path", "http:example.com", "http:/example.com", "://example.com",
	"http//example.com", "javascript:alert(1)", "JaVaScRiPt:alert(1)//http://example.com",
	"data:text/html,<script>alert(1)</script>", "file:///etc/passwd", "ftp://example.com/",
	"mailto:a@example.com", "a@example.com", "vbscript:x", "blob:https://example.com/x",
	"view-source:https://example.com", "about:blank", "intent://example.com#Intent;end",
	"ws://example.com/", "http://?q", "http://#f", "http://:80/", "https://example.com:/",
	"https://example.com:0/", "https://example.com:65536/", "https://example.com:99999999999/",
	"https://example.com:-1/", "https://example.com:+1/", "https://example.com:8o/",
	"https://example.com:80:80/", "https://example.com/" + strings.Repeat("a", maxTarget),
	"example.com:0/", "example.com:80a/", "1.2.3.4/x", "bücher.example/",
	// bytes that end, hide or turn what follows
	"https://example.com/a b", "https://exa mple.com/", "https://example.com/a\tb",
	"https://example.com/\r\nSet-Cookie: a=b", "https://example.com/\x00",
	"https://exam\x00ple.com/", "https://example.com/\x1b[2J", "https://example.com/\x7f",
	"https://example.com/\u0085x", "https://example.com/\u00a0x", "https://example.com/\u2028x",
	"https://example.com/\u3000x", "https://example.com/\u200b", "https://example.com/\u202egpj.exe",
	"https://example.com/\u2066x\u2069", "\ufeffhttps://example.com/", "https://exa\u00admple.com/",
	"https://example.com/\xff", "https://example.com/\xed\xa0\x80",
	// whose host is it?
	`https:\\example.com`, `https://example.com\@evil.example`, `https://evil.example\.example.com/`,
	`https://example.com/a\b`, `https://example.com/\evil.example`, "https://user@example.com/",
	"https://user:pass@example.com/", "https://example.com@evil.example/", "https://:@example.com/",
	"https://@example.com/", "https://example.com%2f@evil.example/", "https://example%2ecom/",
	"https://example.com%00.evil.example/", "https://example.com%", "https://exámple.com/",
	"https://ｅxample.com/", "https://example。com/", "https://ⓔxample.com/",
	"https://example.com⁄evil/", "https://exam\u200cple.com/", "https://exam\u200dple.com/",
	"https://.example.com/", "https://example..com/", "https://example.com../", "https://./",
	"https://../", "https://exam!ple.com/", "https://example.com,evil.example/",
	`https://exa"mple.com/`, "https://exa<mple.com/", "https://exa`mple.com/",
	"https://" + strings.Repeat("a", 64) + ".com/", "https://" + strings.Repeat("a.", 130) + "com/",
	// back to us
	"http://hop.test", "https://hop.test/abc", "http://HOP.TEST/", "http://hop.test./",
	"http://hop.test:80/x", "http://HoP.tEsT.:443/?x", "http://hop%2etest/", "http://ｈop.test/",
	"http://hop.test:0080/", "hop.test/abc",
	// private networks by name
	"http://localhost", "http://LOCALHOST:8080/", "http://localhost./", "http://foo.localhost/",
	"http://localhost.localdomain/", "http://printer.local/", "http://router.lan/",
	"http://nas.home/", "http://wiki.corp/", "http://hub.home.arpa/",
	"http://metadata.google.internal/", "http://intranet/", "http://postgres:5432/",
	// IPv4 as browsers read it
	"http://127.0.0.1/", "http://127.0.0.1./", "http://127.1/", "http://127.0.1/",
	"http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://0x7F.0x0.0x0.0x1/",
	"http://0177.0.0.1/", "http://017700000001/", "http://0x/", "http://0/", "http://0.0.0.0/",
	"http://1/", "http://127.0.0.1.1/", "http://256.256.256.256/", "http://08.8.8.8/",
	"http://8.8.8.08/", "http://1.2.3/", "http://1.2.3.4.5/", "http://example.123/",
	"http://example.0x1/", "http://１２７.0.0.1/", "http://①②⑦.0.0.1/", "http://10.0.0.1/",
	"http://172.16.0.1/", "http://172.31.255.255/", "http://192.168.1.1/",
	"http://169.254.169.254/latest/meta-data/", "http://100.64.0.1/", "http://192.0.0.1/",
	"http://192.88.99.1/", "http://198.18.0.1/", "http://224.0.0.1/", "http://240.0.0.1/",
	"http://255.255.255.255/", "http://0.1.2.3/",
	// IPv6
	"http://[::1]/", "http://[::]/", "http://[0:0:0:0:0:0:0:1]/", "http://[::ffff:127.0.0.1]/",
	"http://[::ffff:7f00:1]/", "http://[::ffff:10.0.0.1]:80/", "http://[fe80::1]/",
	"http://[fe80::1%25eth0]/", "http://[2606:4700::1%25eth0]/", "http://[2606:4700::1%eth0]/",
	"http://[fc00::1]/", "http://[fd12:3456::1]/", "http://[fec0::1]/", "http://[ff02::1]/",
	"http://[64:ff9b::7f00:1]/", "http://[64:ff9b::10.0.0.1]/", "http://[64:ff9b::808:808]/",
	"http://[64:ff9b:1::1]/", "http://[100::1]/", "http://[2001::1]/",
	"http://[2001:0:ac10:1::1]/", "http://[2002:7f00:1::]/", "http://[::127.0.0.1]/",
	"http://[::7f00:1]/", "http://[::1", "http://::1/", "http://[]/", "http://[1::2::3]/",
	"http://[::1]x/", "http://[127.0.0.1]/", "http://[example.com]/", "http://[::g]/",
	"http://2606:4700::1/", "http://x[2606:4700::1]/", "http://[2606:4700::1]]/",
	"http://[2606:4700::1]:/",
}

func TestTargets(t *testing.T) {
	for _, target := range hostileTargets {
		if clean, err := testRules.check(target); err == nil {
			t.Errorf("accepted: %.100q as %.100q", target, clean)
		}
	}
	for _, target := range goodTargets {
		clean, err := testRules.check(target)
		if err != nil || clean != target {
			t.Errorf("refused: %.100q (%.100q) %v", target, clean, err)
		}
	}
}

// What people type and paste becomes the address they mean.
func TestTargetsAreCleaned(t *testing.T) {
	tests := []struct{ sent, stored string }{
		{" https://example.com/ ", "https://example.com/"},
		{"\thttps://example.com/\r\n", "https://example.com/"},
		{"\u00a0https://example.com/\u3000", "https://example.com/"},
		{"example.com", "https://example.com"},
		{"example.com/page?q#f", "https://example.com/page?q#f"},
		{" Example.COM./page ", "https://Example.COM./page"},
		{"www.example.co.uk:8443/", "https://www.example.co.uk:8443/"},
		{"example.com?next=http://a.example/", "https://example.com?next=http://a.example/"},
		{"xn--bcher-kva.xn--p1ai/", "https://xn--bcher-kva.xn--p1ai/"},
	}
	for _, test := range tests {
		clean, err := testRules.check(test.sent)
		if err != nil || clean != test.stored {
			t.Errorf("%q: %q %v, want %q", test.sent, clean, err, test.stored)
		}
	}
}

// A loop is what leads under the address that short links begin with, and nothing else.
func TestTargetLoops(t *testing.T) {
	tests := []struct {
		base, target string
		loop         bool
	}{
		{"https://www.example.com/s", "https://www.example.com/s", true},
		{"https://www.example.com/s", "https://www.example.com/s/", true},
		{"https://www.example.com/s", "https://www.example.com/s/abc", true},
		{"https://www.example.com/s", "https://WWW.Example.COM.:443/s/abc?x#y", true},
		{"https://www.example.com/s", "http://www.example.com/s/abc", true},
		{"https://www.example.com/s", "http://www.example.com:80/s?x", true},
		{"https://www.example.com/s", "https://www.example.com/%73/abc", true},
		{"https://www.example.com/s", "https://www.example.com/s%2Fabc", true},
		{"https://www.example.com/s", "https://www.example.com//s/abc", true},
		{"https://www.example.com/s", "https://www.example.com/x/../s/abc", true},
		{"https://www.example.com/s", "https://www.example.com/x/%2e%2E/./s/abc", true},
		{"https://www.example.com/s", "https://www.example.com/s/%", true},
		{"https://www.example.com/s", "www.example.com/s/abc", true},
		{"https://www.example.com/s/", "https://www.example.com/s", true},
		{"https://www.example.com/s", "https://www.example.com", false},
		{"https://www.example.com/s", "https://www.example.com/", false},
		{"https://www.example.com/s", "https://www.example.com/shop", false},
		{"https://www.example.com/s", "https://www.example.com/S/abc", false},
		{"https://www.example.com/s", "https://www.example.com/s/../blog", false},
		{"https://www.example.com/s", "https://www.example.com/blog?x=/s/", false},
		{"https://www.example.com/s", "https://www.example.com:8443/s/abc", false},
		{"https://www.example.com/s", "https://example.com/s/abc", false},
		{"https://example.com", "https://example.com", true},
		{"https://example.com", "https://example.com?q", true},
		{"https://example.com", "https://example.com/a/b", true},
		{"https://example.com", "https://example.com:8080/a", false},
		{"https://example.com:8443", "https://example.com:8443/a", true},
		{"https://example.com:8443", "https://example.com/a", false},
		{"https://EXAMPLE.com.", "https://example.com/a", true},
		{"http://203.0.113.7", "http://203.0.113.7/a", true},
		{"http://203.0.113.7", "http://203.0.113.7./a", true},
		{"http://203.0.113.7", "http://[::ffff:203.0.113.7]/a", true},
		{"http://203.0.113.7", "http://[::ffff:cb00:7107]/a", true},
		{"http://[2606:4700::1]", "http://[2606:4700:0:0:0:0:0:1]/a", true},
		{"http://203.0.113.7", "http://203.0.113.8/a", false},
	}
	for _, test := range tests {
		_, err := mustTargetRules(test.base, true).check(test.target)
		if (err != nil) != test.loop {
			t.Errorf("%s under %s: %v", test.target, test.base, err)
		}
	}
	if _, err := (targetRules{}).check("https://example.com/"); err != nil {
		t.Errorf("without a base: %v", err)
	}
}

// Who wants to may point into private networks, but not at what only looks like an address.
func TestPrivateTargets(t *testing.T) {
	rules := mustTargetRules("http://hop.test", true)
	for _, target := range []string{
		"http://localhost:3000/", "http://intranet/", "http://127.0.0.1/", "http://[::1]:8080/",
		"http://192.168.0.1/", "http://printer.local/", "http://[64:ff9b::1]/",
	} {
		if _, err := rules.check(target); err != nil {
			t.Errorf("refused %s: %v", target, err)
		}
	}
	for _, target := range []string{"http://0x7f000001/", "http://127.1/", "javascript:x"} {
		if _, err := rules.check(target); err == nil {
			t.Errorf("accepted %s", target)
		}
	}
}

func TestASCIILocation(t *testing.T) {
	tests := []struct{ target, location string }{
		{"https://example.com/café/ü?q=é#ß", "https://example.com/caf%C3%A9/%C3%BC?q=%C3%A9#%C3%9F"},
		{"https://example.com/%C3%A9?a=%20", "https://example.com/%C3%A9?a=%20"},
		{"https://example.com/100%", "https://example.com/100%25"},
		{"https://example.com/%zz%4", "https://example.com/%25zz%254"},
		{"https://example.com/%%41", "https://example.com/%25%41"},
		{`https://example.com/?"<>\` + "`", "https://example.com/?%22%3C%3E%5C%60"},
		{"https://example.com/a\u200db", "https://example.com/a%E2%80%8Db"},
		{"https://example.com/{}|^[]'", "https://example.com/{}|^[]'"},
		{"é", "%C3%A9"},
		{"", ""},
	}
	for _, test := range tests {
		if got := asciiLocation(test.target); got != test.location {
			t.Errorf("%q: %q, want %q", test.target, got, test.location)
		}
		if again := asciiLocation(test.location); again != test.location {
			t.Errorf("%q is changed again: %q", test.location, again)
		}
	}
	plain := "https://example.com/%20?a=b#c"
	if n := testing.AllocsPerRun(100, func() { asciiLocation(plain) }); n != 0 {
		t.Errorf("%v allocations for a plain target", n)
	}
}

// ---- texts and times ----

func TestTexts(t *testing.T) {
	long := strings.Repeat("語", maxText)
	tests := []struct {
		name  string
		check func(string) error
		good  []string
		bad   []string
	}{
		{
			"text", checkText,
			[]string{"", "Sale", " a ", "a 'b' \"c\" <d>", "日本語 é 👩\u200d🚀", long},
			[]string{long + "x", "a\nb", "a\x00b", "a\u0085b", "\x7f", "\xff", "\xed\xa0\x80"},
		},
		{
			"name", checkName,
			[]string{"ann", "Ann Lee", "Зоя", long},
			[]string{"", " ", " ann", "ann ", "\tann", "\u00a0ann", "a\nb", long + "x",
				"\u200b", "\u3164", "\u200d \u2060"},
		},
		{
			"email", checkEmail,
			[]string{"a@b.c", "first.last+tag@sub.example.com", "ü@bücher.example"},
			[]string{
				"", "a", "a@", "@b.c", "a@b", "a@b.", "a b@c.d", "a@b@c.d", "a,b@c.d", "<a@b.c>",
				" a@b.c", "a@b.c\n", "a@b.c\x00", "a..b@c.d", "a@b..c", ".a@b.c",
				strings.Repeat("a", maxText) + "@b.c",
			},
		},
		{
			"search", checkSearch,
			[]string{"", "x", "https://example.com/é", strings.Repeat("x", maxTarget)},
			[]string{"a\x00", "\xff", "a\nb", strings.Repeat("x", maxTarget+1)},
		},
	}
	for _, test := range tests {
		for _, s := range test.good {
			if err := test.check(s); err != nil {
				t.Errorf("%s %.40q: %v", test.name, s, err)
			}
		}
		for _, s := range test.bad {
			if test.check(s) == nil {
				t.Errorf("%s %.40q is accepted", test.name, s)
			}
		}
	}
	if got := cleanText(" \u3000Sale\n"); got != "Sale" {
		t.Errorf("cleaned: %q", got)
	}
}

func TestParseTime(t *testing.T) {
	noon := time.Date(2027, 1, 31, 12, 0, 0, 0, time.UTC)
	good := map[string]time.Time{
		"2027-01-31T12:00:00Z":             noon,
		"2027-01-31T14:00:00+02:00":        noon,
		"2027-01-31T12:00:00":              noon,
		"2027-01-31T12:00":                 noon,
		"2027-01-31T12:00Z":                noon,
		"2027-01-31T14:00+02:00":           noon,
		"2027-01-31T14:00:00+0200":         noon,
		"2027-01-31 12:00:00":              noon,
		"2027-01-31 14:00:00+02:00":        noon,
		"2027-01-31 12:00:00.123456":       noon,
		"2027-01-31T12:00:00.999999+00:00": noon,
		"9999-12-31T23:59:59Z":             time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		"0001-01-01T00:00:00Z":             time.Date(1, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	for s, want := range good {
		got, err := parseTime(s)
		if err != nil || got != want {
			t.Errorf("%s: %v %v", s, got, err)
		}
	}
	bad := []string{
		"", "now", "tomorrow", "2027-01-31", "12:00", "31.01.2027 12:00", "01/31/2027 12:00",
		"2027-02-30T12:00:00Z", "2027-01-31T24:00:00Z", "2027-01-31T12:00:00 Europe/Berlin",
		"1800000000", "9999-12-31T23:59:59-01:00", "10000-01-01T00:00:00Z", "0000-01-01T00:00:00Z",
		"-2027-01-31T12:00:00Z", " 2027-01-31T12:00:00Z",
	}
	for _, s := range bad {
		if got, err := parseTime(s); err == nil {
			t.Errorf("%s: %v", s, got)
		}
	}
}

// However much a stranger sends, an error repeats little of it.
func TestExcerpt(t *testing.T) {
	tests := []struct{ sent, want string }{
		{"short", `"short"`},
		{"a\nb", `"a\nb"`},
		{strings.Repeat("x", 80), `"` + strings.Repeat("x", 80) + `"`},
		{strings.Repeat("x", 10_000), `"` + strings.Repeat("x", 80) + `"…`},
		{strings.Repeat("語", 100), `"` + strings.Repeat("語", 26) + `"…`},
	}
	for _, test := range tests {
		if got := excerpt(test.sent); got != test.want {
			t.Errorf("%.20q: %q", test.sent, got)
		}
	}
}

// ---- fuzzing ----

// FuzzTarget: what is accepted is a web address whose Location is plain ASCII, and Go finds the
// host in it that the rules have judged. Once cleaned it stays as it is.
func FuzzTarget(f *testing.F) {
	for _, list := range [][]string{goodTargets, hostileTargets} {
		for _, target := range list {
			if len(target) < 300 { // the fuzzer would minimize the long ones for minutes
				f.Add(target)
			}
		}
	}
	f.Fuzz(func(t *testing.T, sent string) {
		target, err := testRules.check(sent)
		if err != nil {
			return
		}
		if again, err := testRules.check(target); err != nil || again != target {
			t.Fatalf("%q is stored as %q, and then %q %v", sent, target, again, err)
		}
		if len(target) > maxTarget || !utf8.ValidString(target) {
			t.Fatalf("accepted %d bytes: %q", len(target), target)
		}
		location := asciiLocation(target)
		for i := range len(location) {
			if c := location[i]; c <= ' ' || c >= 0x7f || c == '\\' {
				t.Fatalf("byte %#x in the Location of %q", c, target)
			}
		}
		u, err := url.Parse(location)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.User != nil {
			t.Fatalf("accepted %q: %+v %v", target, u, err)
		}
		host, _, err := splitAuthority(u.Scheme, u.Host)
		if err != nil || strings.TrimSuffix(strings.ToLower(u.Hostname()), ".") != host {
			t.Fatalf("the host of %q is %q, or %q %v", target, u.Hostname(), host, err)
		}
		if u.Port() == "" && host == testRules.base.Host {
			t.Fatalf("accepted our own host: %q", target)
		}
		var wire strings.Builder
		err = http.Header{"Location": {location}}.Write(&wire)
		if err != nil || wire.String() != "Location: "+location+"\r\n" {
			t.Fatalf("on the wire %q becomes %q", target, wire.String())
		}
	})
}

// FuzzCode: what is accepted fits a path as it stands, and what is cut off an end is no code's.
func FuzzCode(f *testing.F) {
	for _, code := range []string{"abc", "ab", "Ab3-_x", "-abc", "_abc", "health", "users", "metrics",
		"openapi.yaml", strings.Repeat("a", 32), strings.Repeat("a", 33), "a/b", "a%2Fb", "a b",
		"日本語", "abc\x00", "abc\n", "abc).", "\xff\xfe\xfd", ""} {
		f.Add(code)
	}
	const letters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
	f.Fuzz(func(t *testing.T, code string) {
		want := len(code) >= 3 && len(code) <= 32 && strings.Trim(code[:1], "-_") != "" &&
			strings.Trim(code, letters) == ""
		if validCode(code) != want {
			t.Fatalf("validCode(%q) = %v", code, !want)
		}
		trimmed := trimCode(code)
		if !strings.HasPrefix(code, trimmed) || want && trimmed != code ||
			strings.ContainsAny(code[len(trimmed):], letters) {
			t.Fatalf("trimCode(%q) = %q", code, trimmed)
		}
		if checkCode(code) != nil {
			return
		}
		u, err := url.Parse("http://hop.test/" + code)
		if err != nil || u.Path != "/"+code || u.EscapedPath() != "/"+code {
			t.Fatalf("accepted %q, in a URL it is %v %v", code, u, err)
		}
	})
}
