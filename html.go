package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"html/template"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// How pages are written: the templates and files of web/, the headers of every page, and the page
// that says why there is none. Everything a stranger wrote is escaped by html/template; what a page
// loads comes from here, and it has no code in it (pagePolicy).

//go:embed web
var webFiles embed.FS

// pageTemplates are the templates of web/, by the names that they define.
var pageTemplates = template.Must(template.New("").
	Funcs(template.FuncMap{"number": groupDigits}).
	ParseFS(webFiles, "web/*.html"))

// webFile is a file of web/ that pages load.
type webFile struct {
	content []byte
	media   string
}

// newWebFile reads an embedded file.
func newWebFile(name, media string) webFile {
	content, err := webFiles.ReadFile("web/" + name)
	if err != nil {
		panic(err) // it was there when hop was built
	}
	return webFile{content, media}
}

// The files that pages load, and robots.txt.
var (
	styleFile  = newWebFile("style.css", "text/css; charset=utf-8")
	scriptFile = newWebFile("copy.js", "text/javascript; charset=utf-8")
	iconFile   = newWebFile("icon.svg", "image/svg+xml")
	robotsFile = newWebFile("robots.txt", "text/plain; charset=utf-8")
)

// filesVersion names the style and the script of this build: their addresses carry it, so that
// browsers keep them until they change.
var filesVersion = func() string {
	sum := sha256.New()
	sum.Write(styleFile.content)
	sum.Write(scriptFile.content)
	return hex.EncodeToString(sum.Sum(nil)[:6])
}()

// pagePolicy is the Content-Security-Policy of every page: style, script and icon from here and
// nothing else from anywhere, forms to here, no frames around it.
const pagePolicy = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; " +
	"form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

// takesPages says whether who asks is a browser, which gets pages where others get JSON.
func takesPages(r *http.Request) bool { return prefers(r, "text/html") }

// prefers says whether the Accept header names media, and before JSON or everything.
func prefers(r *http.Request, media string) bool {
	for _, header := range r.Header["Accept"] {
		for accepted := range strings.SplitSeq(header, ",") {
			accepted, _, _ = strings.Cut(accepted, ";")
			switch strings.ToLower(strings.TrimSpace(accepted)) {
			case media:
				return true
			case "application/json", "*/*":
				return false
			}
		}
	}
	return false
}

// frame is what all pages have.
type frame struct {
	Title   string
	Base    string // what local addresses begin with: the path of BASE_URL
	Home    string // the address of the start page
	Version string // of the files that pages load
}

// newFrame returns the frame of a page.
func newFrame(cfg Config, title string) frame {
	f := frame{Title: title, Base: cfg.BasePath(), Home: cfg.HomeURL, Version: filesVersion}
	if f.Home == "" {
		f.Home = f.Base + "/"
	}
	return f
}

// writePage answers with a page. It fails before anything is sent, or not at all.
func writePage(w http.ResponseWriter, status int, name string, data any) error {
	var text bytes.Buffer
	if err := pageTemplates.ExecuteTemplate(&text, name, data); err != nil {
		return fmt.Errorf("page %s: %w", name, err)
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", pagePolicy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	// Not no-referrer: with it, browsers hide from hop where its own forms come from.
	h.Set("Referrer-Policy", "same-origin")
	w.WriteHeader(status)
	w.Write(text.Bytes()) // an error means that the client is gone
	return nil
}

// writeFile answers with a file that pages load. Browsers keep it for as long as maxAge seconds.
func writeFile(w http.ResponseWriter, file webFile, maxAge int) {
	h := w.Header()
	h.Set("Content-Type", file.media)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "public, max-age="+strconv.Itoa(maxAge))
	w.Write(file.content)
}

// ---- why there is no page ----

// errorPage is what a browser gets where programs get an error as JSON.
type errorPage struct {
	frame
	Text     string
	Problems map[string]string // what is wrong with a field or parameter, by its name
	Retry    bool              // asking again may help
}

// errorTitles are the headings of error pages. Statuses that are not listed have errorTitle.
var errorTitles = map[int]string{
	http.StatusUnauthorized:       "A token is needed",
	http.StatusForbidden:          "Not from another site",
	http.StatusNotFound:           "Nothing is here",
	http.StatusMethodNotAllowed:   "That cannot be done here",
	http.StatusConflict:           "Already taken",
	http.StatusPreconditionFailed: "Changed meanwhile",
	http.StatusServiceUnavailable: "Not now",
}

const errorTitle = "That did not work"

// errorTexts say in plain words what an error means to a person. Where none is listed, the error's
// own message must do.
var errorTexts = map[string]string{
	"not_found": "This address leads nowhere. It may be mistyped, or the link was switched off, " +
		"has expired or was deleted.",
	"unauthorized": "When your browser asks, give any name, and the token as the password.",
	"unavailable":  "The database does not answer at the moment. Links that are in use go on working.",
	"overloaded":   "Too many people ask at once.",
	"internal":     "Something went wrong here. It has been noted.",
}

// newErrorPage returns the page for an error of this status and code. Message and problems are what
// programs are told.
func newErrorPage(cfg Config, status int, code, message string,
	problems map[string]string) errorPage {

	return errorPage{
		frame:    newFrame(cfg, cmp.Or(errorTitles[status], errorTitle)),
		Text:     cmp.Or(errorTexts[code], sentence(message)),
		Problems: problems,
	}
}

// sentence is an error's message as a sentence.
func sentence(message string) string {
	if message == "" {
		return ""
	}
	return strings.ToUpper(message[:1]) + message[1:] + "."
}

// ---- how pages write things ----

// moment is a time as pages write it, with how far it is from now.
type moment struct{ at, now time.Time }

// Text is the time in UTC to the minute.
func (m moment) Text() string { return m.at.UTC().Format("2006-01-02 15:04") }

// Ago is how far from now it is, in words.
func (m moment) Ago() string {
	distance := m.now.Sub(m.at)
	if distance.Abs() < time.Minute {
		return "just now"
	}
	const month, year = 30 * day, 365 * day
	units := []struct {
		length time.Duration
		name   string
	}{
		{year, "year"}, {month, "month"}, {day, "day"}, {time.Hour, "hour"}, {time.Minute, "minute"},
	}
	for _, unit := range units {
		n := int64(distance.Abs() / unit.length)
		if n == 0 {
			continue
		}
		words := groupDigits(n) + " " + unit.name
		if n > 1 {
			words += "s"
		}
		if distance < 0 {
			return "in " + words
		}
		return words + " ago"
	}
	return ""
}

// groupDigits writes a number with commas between thousands.
func groupDigits(n int64) string {
	text := strconv.FormatInt(n, 10)
	for at := len(text) - 3; at > 0 && text[at-1] != '-'; at -= 3 {
		text = text[:at] + "," + text[at:]
	}
	return text
}

// cutText is s, or its first limit characters and an ellipsis.
func cutText(s string, limit int) string {
	n := 0
	for at := range s {
		if n == limit {
			return s[:at] + "…"
		}
		n++
	}
	return s
}
