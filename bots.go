package main

import (
	"net/http"
	"strings"
)

// Who is no person: crawlers, programs that fetch a preview of a link, monitors, and browsers that
// load a page before anybody asks for it. Their clicks are counted apart. Plain HTTP clients such
// as curl are no bots: somebody types their commands.

// maxHost is how many bytes of a referrer's host are kept: a counted click must fit a fixed slot.
const maxHost = 40

// isBot says whether a request is no person's click. It runs on every redirect and allocates
// nothing.
func isBot(h http.Header) bool {
	if agent := h["User-Agent"]; len(agent) > 0 && isBotAgent(agent[0]) {
		return true
	}
	return beginsWith(h["Sec-Purpose"], "prefetch") || // browsers of today
		beginsWith(h["Purpose"], "prefetch") || // older Chrome and Safari
		beginsWith(h["X-Purpose"], "preview") || // Safari's top sites
		beginsWith(h["X-Moz"], "prefetch") // older Firefox
}

// beginsWith says whether a header's first value begins with prefix.
func beginsWith(values []string, prefix string) bool {
	return len(values) > 0 && strings.HasPrefix(values[0], prefix)
}

// botPrefixes begin agents that only fetch previews. In the middle of an agent the same words name
// the browser inside that app, with a person in front.
var botPrefixes = []string{"WhatsApp", "Viber", "Tumblr/", "Mastodon", "Pinterest/", "Bluesky",
	"NING/"}

// botWords are what agents of bots are known by, anywhere and in any case. Each has three
// characters at least, and its first three are letters or among + . - and the blank. They had
// better not begin as words of browsers do ("app", "win", "lin"): see botStarts.
var botWords = []string{
	// what most call themselves
	"bot", "crawl", "spider", "slurp", "scrap", "fetch", "preview", "-indexer", "harvest",
	"archiv", "validator", "check", "monitor", "uptime", "synthetic", "screenshot", "radar",
	"thumbnail", "favicon", "unfurl", "expander", "expanding", "resolver", "proxy", "scanner",
	"scanning", "research", "analyzer", "survey", "siteaudit", "extractor", "feed", "parser",
	"finder", "copier", "sucker", "lookup", "classifier", "prerender",
	// how to reach their owner
	"http://", "https://", "www.", ".com", "mailto:", "compatible; ", "compatible;+",
	// previews and social networks
	"externalhit", "meta-external", "facebookcatalog", "embedly", "iframely", "vkshare",
	"forum onebox", "cardyb", "synapse", "hubspot", "outbrain", "newspaper", "hatena", "-camo",
	"fastmailua", "ips-agent",
	// search engines, artificial intelligence
	"google-", "-google", "googleother", "googleagent", "googleassociation",
	"claude-", "anthropic", "cohere-ai", "chatgpt", "-openai", "perplexity", "yandex.", "nutch",
	"heritrix", "httrack", "larbin", "htdig", "libwww-perl", "lwp-", "wordpress", "daumoa",
	// browsers without a person
	"headless", "phantomjs", "puppeteer", "playwright", "selenium", "lighthouse", "ptst",
	"gtmetrix", "dareboost", "pingdom", "statuscake", "site24x7", "ghost inspector", "catchpoint",
	"kube-probe", "googlehc", "elb-health", "datadog", "newrelic", "neustar wpm", "thousandeyes",
	"cloudflare-", "cloudfront", "zabbix", "updown", "xenu ",
	// those who look for holes
	"zgrab", "zmeu", "openvas", "whatweb", "hardenize", "nuclei", "nikto", "nmap",
	"masscan", "sqlmap", "censys", "acunetix", "netcraft",
}

// notBots hold a word of botWords and are people's: a maker of phones, a tool that drives a browser
// for a person who tests a page, HTTP clients, and old browsers.
var notBots = []string{
	"cubot", "robotframework", "https://k6.io", "node-fetch",
	"+https://github.com/bitinn/node-fetch",
	"compatible; msie", "compatible; konqueror", "compatible; linux", "compatible; windows",
	"compatible; opera",
}

// isBotAgent says whether a User-Agent is that of a bot.
func isBotAgent(agent string) bool {
	for _, prefix := range botPrefixes {
		if strings.HasPrefix(agent, prefix) {
			return true
		}
	}
	return hasBotWord(agent)
}

// The search for botWords reads an agent once, whatever their number. It turns each character into
// 5 bits; three of them are a trigram, and botStarts knows the trigrams that words begin with.
// Nearly all of a browser's agent is passed over that way, in about 1 ns a character.
const (
	trigrams    = 1 << 15
	wordsPerRow = 64 // bits of a row of botStarts
)

// letterBits are the 5 bits of each character: 1 to 26 for a letter in any case, 27 to 30 for
// + . - and the blank, 0 for all others.
var letterBits = func() (bits [256]uint16) {
	for c := byte('a'); c <= 'z'; c++ {
		bits[c] = uint16(c-'a') + 1
		bits[c-'a'+'A'] = bits[c]
	}
	for i, c := range []byte("+.- ") {
		bits[c] = uint16(27 + i)
	}
	return bits
}()

// botStarts is the set of the trigrams that botWords begin with, one bit each.
var botStarts = func() (set [trigrams / wordsPerRow]uint64) {
	for _, word := range botWords {
		var t uint16
		for i := range 3 {
			t = nextTrigram(t, word[i])
		}
		set[t/wordsPerRow] |= 1 << (t % wordsPerRow)
	}
	return set
}()

// nextTrigram is the trigram that ends with c, after the one that ended before it.
func nextTrigram(t uint16, c byte) uint16 { return (t<<5 | letterBits[c]) % trigrams }

// webKit stands in nearly every browser's agent and is a third of it.
const webKit = "AppleWebKit/537.36 (KHTML, like Gecko)"

// hasBotWord says whether one of botWords stands in agent.
func hasBotWord(agent string) bool {
	before, after, _ := strings.Cut(agent, webKit)
	return hasBotWordIn(before) || hasBotWordIn(after)
}

// hasBotWordIn says whether one of botWords stands in text, a part of an agent.
func hasBotWordIn(text string) bool {
	var t uint16
	for i := range len(text) {
		t = nextTrigram(t, text[i])
		if botStarts[t/wordsPerRow]&(1<<(t%wordsPerRow)) != 0 && isBotWord(text, i-2) {
			return true
		}
	}
	return false
}

// isBotWord says whether one of botWords begins at start in agent, and is no part of notBots.
func isBotWord(agent string, start int) bool {
	for _, word := range botWords {
		if hasWordAt(agent, word, start) {
			return !isInside(agent, word, start)
		}
	}
	return false
}

// isInside says whether the word at start in agent is a part of one of notBots.
func isInside(agent, word string, start int) bool {
	for _, name := range notBots {
		offset := strings.Index(name, word)
		if offset >= 0 && hasWordAt(agent, name, start-offset) {
			return true
		}
	}
	return false
}

// hasWordAt says whether word, in any case, begins at start in agent.
func hasWordAt(agent, word string, start int) bool {
	end := start + len(word)
	return start >= 0 && end <= len(agent) && strings.EqualFold(agent[start:end], word)
}

// refererHost is the host that a request's Referer names, at most maxHost bytes of it. It is "" for
// none, and for one with bytes that could not stand in JSON as they are.
func refererHost(h http.Header) string {
	v := h["Referer"]
	if len(v) == 0 {
		return ""
	}
	_, host, _ := strings.Cut(v[0], "://")
	for i := range len(host) {
		c := host[i]
		if c == '/' || c == '?' || c == '#' {
			host = host[:i]
			break
		}
		if !isLetterOrDigit(c) && strings.IndexByte("-.:[]_", c) < 0 {
			return ""
		}
	}
	return host[:min(len(host), maxHost)]
}
