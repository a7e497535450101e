package main

import (
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
)

// readAgents returns the user agents of a file in testdata: one a line, # begins a comment.
func readAgents(tb testing.TB, name string) []string {
	tb.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		tb.Fatal(err)
	}
	var agents []string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line != "" && line[0] != '#' {
			agents = append(agents, line)
		}
	}
	return agents
}

// agentHeader is the header of a request from agent.
func agentHeader(agent string) http.Header {
	return http.Header{"User-Agent": {agent}}
}

// Better than 95 % of the listed bots are told from people, and not one of the people is taken for
// a bot.
func TestBotAgents(t *testing.T) {
	bots := readAgents(t, "bots.txt")
	people := readAgents(t, "people.txt")
	if len(bots) < 137 || len(people) < 60 {
		t.Fatalf("only %d bots and %d people", len(bots), len(people))
	}
	caught := 0
	for _, agent := range bots {
		if isBot(agentHeader(agent)) {
			caught++
		} else {
			t.Logf("missed: %s", agent)
		}
	}
	mistaken := 0
	for _, agent := range people {
		if isBot(agentHeader(agent)) {
			mistaken++
			t.Errorf("a person: %s", agent)
		}
	}
	t.Logf("%d of %d bots caught, %d of %d people mistaken for one", caught, len(bots), mistaken,
		len(people))
	if 100*caught <= 95*len(bots) {
		t.Errorf("caught %d of %d, want more than 95 %%", caught, len(bots))
	}
}

// Nobody sees what a browser loads in advance.
func TestPrefetchIsBot(t *testing.T) {
	tests := []struct {
		name, value string
		bot         bool
	}{
		{"Sec-Purpose", "prefetch", true},
		{"Sec-Purpose", "prefetch;prerender", true},
		{"Purpose", "prefetch", true},
		{"X-Purpose", "preview", true},
		{"X-Moz", "prefetch", true},
		{"Sec-Purpose", "", false},
		{"Purpose", "other", false},
		{"Accept", "prefetch", false},
	}
	for _, test := range tests {
		h := agentHeader(readAgents(t, "people.txt")[0])
		h.Set(test.name, test.value)
		if isBot(h) != test.bot {
			t.Errorf("%s: %q: %v", test.name, test.value, !test.bot)
		}
	}
	if isBot(http.Header{}) {
		t.Error("a request that says nothing is a bot")
	}
}

// The search finds words in any case, at both ends and across nothing.
func TestBotWords(t *testing.T) {
	tests := []struct {
		agent string
		bot   bool
	}{
		{"bot", true},
		{"xBOT", true},
		{"Bot/1", true},
		{"bo", false},
		{"", false},
		{"b ot", false},
		{"Cubot", false},
		{"Cubot Googlebot", true},
		{webKit + "bot", true},
		{"bo" + webKit + "t", false},
		{"WhatsApp/2.1", true},
		{"Mozilla/5.0 WhatsApp/2.1", false},
		{"Mozilla/5.0 (compatible; MSIE 9.0; Windows NT 6.1)", false},
		{"Mozilla/5.0 (compatible; Anything/1.0)", true},
		{"\xff\xfebot\x00", true},
	}
	for _, test := range tests {
		if isBotAgent(test.agent) != test.bot {
			t.Errorf("%q: %v", test.agent, !test.bot)
		}
	}
}

// The search passes over an agent only where no word begins: each of them must begin with three
// characters that it tells apart.
func TestBotWordsCanBeFound(t *testing.T) {
	for _, word := range botWords {
		if word != strings.ToLower(word) || !hasBotWord(word) {
			t.Errorf("%q cannot be found", word)
		}
	}
	for _, name := range notBots {
		holds := func(word string) bool { return strings.Contains(name, word) }
		if !slices.ContainsFunc(botWords, holds) {
			t.Errorf("%q holds no word", name)
		}
	}
}

func TestRefererHost(t *testing.T) {
	tests := []struct{ referer, host string }{
		{"https://example.com/page?q#f", "example.com"},
		{"https://example.com", "example.com"},
		{"https://example.com?q", "example.com"},
		{"https://example.com#f", "example.com"},
		{"http://News.Example.com:8080/", "News.Example.com:8080"},
		{"http://[2606:4700::1]:80/", "[2606:4700::1]:80"},
		{"android-app://com.google.android.gm/", "com.google.android.gm"},
		{"https://" + strings.Repeat("a", 50) + ".com/", strings.Repeat("a", maxHost)},
		{"", ""},
		{"example.com", ""},
		{"https:///path", ""},
		{"https://user@example.com/", ""},
		{`https://a"b.com/`, ""},
		{"https://a\x00b.com/", ""},
		{"https://bücher.example/", ""},
	}
	for _, test := range tests {
		host := refererHost(http.Header{"Referer": {test.referer}})
		if host != test.host {
			t.Errorf("%q: %q, want %q", test.referer, host, test.host)
		}
	}
	if host := refererHost(http.Header{}); host != "" {
		t.Errorf("without a header: %q", host)
	}
}

// browserHeader is the header that a browser of today sends.
func browserHeader() http.Header {
	h := agentHeader("Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 " +
		"(KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36")
	for _, name := range []string{"Accept", "Accept-Encoding", "Accept-Language", "Sec-Ch-Ua",
		"Sec-Ch-Ua-Mobile", "Sec-Ch-Ua-Platform", "Sec-Fetch-Dest", "Sec-Fetch-Mode",
		"Sec-Fetch-Site", "Sec-Fetch-User", "Upgrade-Insecure-Requests"} {
		h.Set(name, "x")
	}
	h.Set("Referer", "https://www.example.com/page")
	return h
}

// What every redirect asks allocates nothing.
func TestClickHeadersAllocateNothing(t *testing.T) {
	h := browserHeader()
	allocs := testing.AllocsPerRun(100, func() {
		if isBot(h) || refererHost(h) == "" {
			t.Fatal("wrong")
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

func BenchmarkIsBot(b *testing.B) {
	h := browserHeader()
	b.ReportAllocs()
	for b.Loop() {
		isBot(h)
	}
}

func BenchmarkRefererHost(b *testing.B) {
	h := browserHeader()
	b.ReportAllocs()
	for b.Loop() {
		refererHost(h)
	}
}
