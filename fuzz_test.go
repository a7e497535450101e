package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"unicode/utf8"
)

var publicRules = targetRules{ownHost: "hop.test"}

// goodTargets must be accepted; hostileTargets must not: a browser would read them differently than they look, they lead into a
// private network or back to us, or they are no http URL at all.
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
	"https://hop.test.example.com/not-us",
	"https://nothop.test/not-us",
	"https://localhost.example.com/",
	"https://10.0.0.1.example.com/",
	"https://a.b-c.d--e.museum/",
	"https://example.com/" + strings.Repeat("a", 2048-20),
}

var hostileTargets = []string{
	// no http URL
	"", "/", "example.com", "//example.com/", "/path", "?q", "#f", "http:", "http:/", "http://", "http:///path", "http:example.com",
	"http:/example.com", "://example.com", "http//example.com", "javascript:alert(1)", "JaVaScRiPt:alert(1)//http://example.com",
	"data:text/html,<script>alert(1)</script>", "file:///etc/passwd", "ftp://example.com/", "mailto:a@example.com", "vbscript:x",
	"blob:https://example.com/x", "view-source:https://example.com", "about:blank", "intent://example.com#Intent;end", "ws://example.com/",
	"http://?q", "http://#f", "http://:80/", "https://example.com:/", "https://example.com:0/", "https://example.com:65536/", "https://example.com:99999999999/",
	"https://example.com:-1/", "https://example.com:8o/", "https://example.com:80:80/", "https://example.com/%zz", "https://example.com/%",
	"https://example.com/" + strings.Repeat("a", 2048),
	// bytes that end, hide or turn what follows
	" https://example.com/", "https://example.com/ ", "https://example.com/a b", "https://exa mple.com/", "https://example.com/\t", "\thttps://example.com/",
	"https://example.com/\r\nSet-Cookie: a=b", "https://example.com/\n", "https://example.com/\x00", "https://exam\x00ple.com/", "https://example.com/\x1b[2J",
	"https://example.com/\x7f", "https://example.com/\u0085", "https://example.com/\u00a0", "https://example.com/\u2028", "https://example.com/\u3000",
	"https://example.com/\u200b", "https://example.com/\u202egpj.exe", "https://example.com/\u2066x\u2069", "\ufeffhttps://example.com/", "https://exa\u00admple.com/",
	"https://example.com/\xff", "https://example.com/\xed\xa0\x80", "https://example.com/<script>", `https://example.com/"onclick="x`, "https://example.com/`x`",
	// whose host is it?
	`https:\\example.com`, `https://example.com\@evil.example`, `https://evil.example\.example.com/`, "https://user@example.com/", "https://user:pass@example.com/",
	"https://example.com@evil.example/", "https://:@example.com/", "https://@example.com/", "https://example.com%2f@evil.example/", "https://example%2ecom/",
	"https://example.com%00.evil.example/", "https://exámple.com/", "https://ｅxample.com/", "https://example。com/", "https://ⓔxample.com/", "https://example.com⁄evil/",
	"https://.example.com/", "https://example..com/", "https://example.com../", "https://./", "https://../", "https://exam!ple.com/", "https://example.com,evil.example/",
	"https://" + strings.Repeat("a", 64) + ".com/", "https://" + strings.Repeat("a.", 130) + "com/",
	// back to us
	"http://hop.test", "https://hop.test/abc", "http://HOP.TEST/", "http://hop.test./", "http://hop.test:8080/x", "http://HoP.tEsT.:443/?x", "http://hop%2etest/", "http://ｈop.test/", "http://hop.test:0080/",
	// private networks by name
	"http://localhost", "http://LOCALHOST:8080/", "http://localhost./", "http://foo.localhost/", "http://printer.local/", "http://metadata.google.internal/", "http://intranet/", "http://postgres:5432/",
	// IPv4 as browsers read it
	"http://127.0.0.1/", "http://127.0.0.1./", "http://127.1/", "http://127.0.1/", "http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://0x7F.0x0.0x0.0x1/", "http://0177.0.0.1/", "http://017700000001/", "http://0x/",
	"http://0/", "http://0.0.0.0/", "http://1/", "http://127.0.0.1.1/", "http://256.256.256.256/", "http://08.8.8.8/", "http://8.8.8.08/", "http://1.2.3/", "http://1.2.3.4.5/", "http://example.123/", "http://example.0x1/", "http://１２７.0.0.1/", "http://①②⑦.0.0.1/",
	"http://10.0.0.1/", "http://172.16.0.1/", "http://172.31.255.255/", "http://192.168.1.1/", "http://169.254.169.254/latest/meta-data/", "http://100.64.0.1/", "http://192.0.0.1/", "http://198.18.0.1/", "http://224.0.0.1/", "http://240.0.0.1/", "http://255.255.255.255/", "http://0.1.2.3/",
	// IPv6
	"http://[::1]/", "http://[::]/", "http://[0:0:0:0:0:0:0:1]/", "http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "http://[::ffff:10.0.0.1]:80/", "http://[fe80::1]/", "http://[fe80::1%25eth0]/", "http://[2606:4700::1%25eth0]/", "http://[fc00::1]/", "http://[fd12:3456::1]/", "http://[fec0::1]/", "http://[ff02::1]/",
	"http://[64:ff9b::7f00:1]/", "http://[64:ff9b::10.0.0.1]/", "http://[2002:7f00:1::]/", "http://[::127.0.0.1]/", "http://[::7f00:1]/", "http://[::1", "http://::1/", "http://[]/", "http://[1::2::3]/", "http://[::1]x/", "http://[127.0.0.1]/", "http://[example.com]/", "http://[::g]/", "http://2606:4700::1/",
}

func TestTargets(t *testing.T) {
	if len(hostileTargets) < 65 || len(goodTargets) < 20 {
		t.Errorf("only %d hostile and %d good ones", len(hostileTargets), len(goodTargets))
	}
	for _, target := range hostileTargets {
		if publicRules.check(target) == nil {
			t.Errorf("accepted: %.100q", target)
		}
	}
	for _, target := range goodTargets {
		if err := publicRules.check(target); err != nil {
			t.Errorf("refused: %.100q %v", target, err)
		}
	}
	private := targetRules{ownHost: "203.0.113.7", allowPrivate: true}
	for _, target := range []string{"http://localhost:3000/", "http://intranet/", "http://127.0.0.1/", "http://[::1]:8080/", "http://192.168.0.1/", "http://printer.local/"} {
		if err := private.check(target); err != nil {
			t.Errorf("ALLOW_PRIVATE refused %s: %v", target, err)
		}
	}
	for _, target := range []string{"http://203.0.113.7/", "http://203.0.113.7.:80/", "http://[::ffff:203.0.113.7]/", "http://[::ffff:cb00:7107]/", "http://0x7f000001/", "http://127.1/", "javascript:x"} {
		if private.check(target) == nil {
			t.Errorf("ALLOW_PRIVATE accepted %s", target)
		}
	}
}

// FuzzTarget: what is accepted is an http URL whose bytes survive a Location header and whose host Go and a browser agree on.
func FuzzTarget(f *testing.F) {
	for _, list := range [][]string{goodTargets, hostileTargets} {
		for _, target := range list {
			if len(target) < 300 { // the fuzzer would minimize the long ones for minutes
				f.Add(target)
			}
		}
	}
	f.Fuzz(func(t *testing.T, target string) {
		if publicRules.check(target) != nil {
			return
		}
		u, err := url.Parse(target)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil {
			t.Fatalf("accepted %q: %+v %v", target, u, err)
		}
		if len(target) > 2048 || !utf8.ValidString(target) {
			t.Fatalf("accepted %d bytes: %q", len(target), target)
		}
		for i := range len(target) {
			if c := target[i]; c <= ' ' || c == 0x7f || c == '\\' {
				t.Fatalf("accepted byte %#x in %q", c, target)
			}
		}
		for _, c := range u.Host {
			if c >= utf8.RuneSelf {
				t.Fatalf("accepted the host %q", u.Host)
			}
		}
		var wire strings.Builder
		if err := (http.Header{"Location": {target}}).Write(&wire); err != nil || wire.String() != "Location: "+target+"\r\n" {
			t.Fatalf("on the wire %q becomes %q", target, wire.String())
		}
		if strings.EqualFold(strings.TrimSuffix(u.Hostname(), "."), publicRules.ownHost) {
			t.Fatalf("accepted our own host: %q", target)
		}
	})
}

// FuzzCode: what is accepted fits a path as it stands, and the schema's CHECK.
func FuzzCode(f *testing.F) {
	for _, code := range []string{"abc", "ab", "Ab3-_x", "-abc", "_abc", "health", "users", "metrics", "openapi.yaml", strings.Repeat("a", 32), strings.Repeat("a", 33), "a/b", "a%2Fb", "a b", "日本語", "abc\x00", "abc\n", "\xff\xfe\xfd", ""} {
		f.Add(code)
	}
	f.Fuzz(func(t *testing.T, code string) {
		err := checkCode(code)
		if validCode(code) != (len(code) >= 3 && len(code) <= 32 && strings.Trim(code[:1], "-_") != "" &&
			strings.Trim(code, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_") == "") {
			t.Fatalf("validCode(%q) = %v", code, validCode(code))
		}
		if err != nil {
			return
		}
		if u, err := url.Parse("http://hop.test/" + code); err != nil || u.Path != "/"+code || u.EscapedPath() != "/"+code || url.PathEscape(code) != code {
			t.Fatalf("accepted %q, in a URL it is %v %v", code, u, err)
		}
		for _, rt := range new(Server).routes() {
			if _, path, _ := strings.Cut(rt.pattern, " /"); path == code || strings.HasPrefix(path, code+"/") {
				t.Fatalf("accepted %q, which %s needs", code, rt.pattern)
			}
		}
	})
}

// FuzzCSV: whatever the file, the reader says what is wrong in one line, or gives whole rows that PostgreSQL takes.
func FuzzCSV(f *testing.F) {
	heads := []string{csvHead, "id,user_id,short_code,original_url,title,is_active,created_at,updated_at\n", "id,url_id,user_id,event_type,timestamp,details\n"}
	for kind, rows := range [][]string{
		{"", "1,a,a@example.com,2025-01-01 10:00:00\n", "1,\"a\nb\",a@example.com,2025-01-01 10:00:00\r\n", "1,\"a", "1,a\"b,c,d\n", "\n\n1,,,\n", "9223372036854775807,a,a@b.c,0000-01-01 10:00:00\n", "1,\xff,\x00@a.b,x\n"},
		{"1,,abcdef,https://example.com/,,True,2025-01-01 10:00:00,2025-01-01 10:00:00\n", "1,1,abcdef,https://example.com/,t,False,2025-01-01 10:00:00,2025-01-01 10:00:00\n"},
		{"1,1,,created,2025-01-01 10:00:00,\"{\"\"a\"\":1}\"\n", "1,1,1,x,2025-01-01 10:00:00,{}\n", "1,1,,x,2025-01-01 10:00:00,[]\n"},
	} {
		for _, r := range rows {
			f.Add(uint8(kind), heads[kind]+r)
		}
	}
	f.Add(uint8(0), "\ufeff"+csvHead)
	f.Add(uint8(0), "\"id,username,email,created_at\"\n1\n")
	f.Fuzz(func(t *testing.T, kind uint8, file string) {
		table := csvTables(publicRules)[int(kind)%3]
		known := idSet{}
		known.add(1)
		l := loader{ids: map[string]idSet{"users": known, "urls": known}}
		chunks, done := make(chan rows), make(chan struct{})
		var err error
		go func() {
			err = l.parse(table, strings.NewReader(file), chunks, done)
			close(chunks)
		}()
		for chunk := range chunks {
			for i, values := range chunk.columns {
				if len(values) != len(chunk.lines) {
					t.Fatalf("%d %s for %d rows", len(values), table.columns[i].name, len(chunk.lines))
				}
				for _, v := range values {
					if !utf8.ValidString(v) || strings.ContainsRune(v, 0) {
						t.Fatalf("accepted %q as %s", v, table.columns[i].name)
					}
				}
			}
		}
		if err != nil && (strings.Contains(err.Error(), "\n") || !strings.HasPrefix(err.Error(), table.name+".csv line ")) {
			t.Fatalf("%q", err)
		}
	})
}

// FuzzJSON: whatever the body, every route that takes one answers without a 5xx.
func FuzzJSON(f *testing.F) {
	a := startApp(f, "LOG_LEVEL=error")
	get[wireUser](f, a, 201, "POST", "/users", annJSON)
	addLink(f, a, "https://example.com/", "known")
	routes := []string{"POST /shorten", "POST /users", "POST /urls", "POST /events", "PUT /users/1", "PUT /urls/1", "POST /shorten/bulk"}
	for i, body := range []string{
		`{"url":"https://example.com/","custom_code":"abc","title":"t","user_id":1,"expires_at":"2099-01-01T00:00:00Z"}`, annJSON,
		`{"user_id":1,"original_url":"https://example.com/"}`, `{"event_type":"x","url_id":1,"user_id":1,"details":{"a":[1,null,"\ud800"]}}`,
		`{"username":"b","email":"b@example.com"}`, `{"title":null,"is_active":true,"expires_at":null}`, `[{"url":"https://example.com/"},5,null]`,
	} {
		f.Add(uint8(i), body)
	}
	for name, body := range hostileBodies {
		if len(body) < 1000 {
			f.Add(uint8(len(name)), body)
		}
	}
	f.Fuzz(func(t *testing.T, route uint8, body string) {
		method, path, _ := strings.Cut(routes[int(route)%len(routes)], " ")
		r := httptest.NewRequest(method, path, strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		a.ServeHTTP(w, r)
		answer, _ := io.ReadAll(w.Result().Body)
		if w.Code >= 500 || !utf8.Valid(answer) {
			t.Fatalf("%s %s with %q: %d %s", method, path, body, w.Code, answer)
		}
		if w.Code >= 400 {
			var e wireError
			if strict(t, string(answer), &e); e.Error == "" {
				t.Fatalf("%d %s", w.Code, answer)
			}
		}
		if w.Code == 200 && path == "/shorten/bulk" {
			var bulk wireBulk
			strict(t, string(answer), &bulk)
			for _, item := range bulk.Results {
				if item.Status >= 500 || (item.Status < 400) == (item.URL == nil) {
					t.Fatalf("%q: %+v", body, item)
				}
			}
		}
	})
}
