package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The REST cases. They are text files under testdata/rest, which also read as examples of the API.
// Each file runs from top to bottom on a hop of its own with an empty database, so ids count from
// 1: once without Redis and once with it. A case is a request as it goes over the wire, and what
// the answer must be:
//
//	# What is shown. Stands for all cases until the next such line.
//	POST /shorten
//	Content-Type: text/plain
//	{"original_url": "https://example.com/"}
//	→ 201
//	{"id": "{{id}}", "short_code": "<code>", …}
//
// Header lines may follow both lines. A blank line may part a request's headers from its body. In
// the request, {{id}} is what an earlier answer had in that place and {{x*9}} is nine times x.
// After the status comes what the answer must hold:
//
//	→ 302 https://…          this Location
//	→ 400 code field, field  the error with this code, naming these fields and no others
//	→ 400 invalid_csv words  the same with words in its message
//	{…} or […]               in the next lines: this JSON, the same members and no more
//	~words                   in the next line: text with these words in it
//	nothing                  no body
//
// In JSON, "<time>", "<code>", "<int>", "<number>", "<text>" and "<fields>" stand for a value of
// that kind, "~words" for a text with these words in it, "{{name}}" for a value to be remembered
// or, the next time, repeated, and a member "…" for any more members. All but the last may also
// stand for the value of a header.
//
// A line "setting NAME=value" at the top of a file is a setting of its hop. With a DATABASE_URL of
// its own nobody waits until hop is ready.

// restCase is one case of a file.
type restCase struct {
	title   string
	line    int // of the request line
	method  string
	path    string
	headers []string
	body    string
	status  int
	rest    string // of the line with the status
	want    restAnswer
}

// restAnswer is what a case says of the answer below its status.
type restAnswer struct {
	headers []string
	body    string
}

var (
	restRequest = regexp.MustCompile(`^([A-Z]+) (/\S*)$`)
	restHeader  = regexp.MustCompile(`^[A-Za-z][A-Za-z-]*:( |$)`)
	restPlace   = regexp.MustCompile(`\{\{([^{}]+)\}\}`)
	restRepeat  = regexp.MustCompile(`^(.+)\*([0-9]+)$`)
	restCode    = regexp.MustCompile(`^[0-9A-Za-z]{7}$`)
	restNumber  = regexp.MustCompile(`^(0|[1-9][0-9]*)$`)
)

// restReader reads a file of cases line by line.
type restReader struct {
	lines []string
	at    int // the next line
}

// take returns the next lines for which while is true.
func (f *restReader) take(while func(line string) bool) []string {
	start := f.at
	for f.at < len(f.lines) && while(f.lines[f.at]) {
		f.at++
	}
	return f.lines[start:f.at]
}

// Kinds of lines.
func isTitleLine(line string) bool   { return strings.HasPrefix(line, "# ") }
func isSettingLine(line string) bool { return strings.HasPrefix(line, "setting ") }
func isBodyLine(line string) bool    { return !strings.HasPrefix(line, "→ ") }
func isBlankLine(line string) bool   { return line == "" }
func isFullLine(line string) bool    { return line != "" }

// readCases reads a file of cases and of settings of its hop.
func readCases(t *testing.T, name string) (settings []string, cases []restCase) {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	f := &restReader{lines: strings.Split(string(text), "\n")}
	title := ""
	for {
		f.take(isBlankLine)
		if f.at == len(f.lines) {
			return settings, cases
		}
		if lines := f.take(isSettingLine); len(lines) > 0 {
			for _, line := range lines {
				settings = append(settings, strings.TrimPrefix(line, "setting "))
			}
			continue
		}
		if lines := f.take(isTitleLine); len(lines) > 0 {
			title = strings.Join(lines, "\n")
			continue
		}
		c, err := f.readCase()
		if err != nil {
			t.Fatalf("%s:%d: %v", name, f.at, err)
		}
		c.title = title
		cases = append(cases, c)
	}
}

// readCase reads one case, from its request line to the blank line behind it.
func (f *restReader) readCase() (restCase, error) {
	line := f.lines[f.at]
	f.at++
	c := restCase{line: f.at}
	request := restRequest.FindStringSubmatch(line)
	if request == nil {
		return c, fmt.Errorf("no request line: %q", line)
	}
	c.method, c.path = request[1], request[2]
	c.headers = f.take(restHeader.MatchString)
	if f.at < len(f.lines) && isBlankLine(f.lines[f.at]) {
		f.at++
	}
	c.body = strings.Join(f.take(isBodyLine), "\n")
	if f.at == len(f.lines) {
		return c, errors.New("no answer")
	}
	answer := strings.TrimPrefix(f.lines[f.at], "→ ")
	f.at++
	status, rest, _ := strings.Cut(answer, " ")
	c.rest = rest
	c.want.headers = f.take(restHeader.MatchString)
	c.want.body = strings.Join(f.take(isFullLine), "\n")
	var err error
	c.status, err = strconv.Atoi(status)
	return c, err
}

// restRun is one run of a file: its hop, and the values its answers had in {{places}}.
type restRun struct {
	app   *app
	file  string
	saved map[string]any
	seen  *recorder
}

// TestREST runs every file of cases, and then holds what was answered against the API document.
func TestREST(t *testing.T) {
	seen := newRecorder()
	for _, redis := range []string{"disabled", "up"} {
		runREST(t, redis, seen)
		t.Run("guards with redis "+redis, func(t *testing.T) { checkGuards(t, redis, seen) })
	}
	seen.save(t)
	t.Run("answers as documented", func(t *testing.T) { checkStatuses(t, seen) })
}

// runREST runs all files of cases and returns how many cases passed and how many there are.
func runREST(t *testing.T, redis string, seen *recorder) (passed, all int) {
	t.Helper()
	files, err := filepath.Glob("testdata/rest/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".txt")
		t.Run(name+" with redis "+redis, func(t *testing.T) {
			settings, cases := readCases(t, file)
			all += len(cases)
			run := restRun{
				app:   startREST(t, redis, settings),
				file:  filepath.Base(file),
				saved: map[string]any{"redis": redis, "cr": "\r", "bom": "\ufeff"},
				seen:  seen,
			}
			for _, c := range cases {
				if t.Run(fmt.Sprintf("line %d", c.line), func(t *testing.T) { run.try(t, c) }) {
					passed++
				}
			}
		})
	}
	return passed, all
}

// startREST starts a hop for a file of cases, and waits until its Redis is as it should be.
func startREST(t *testing.T, redis string, settings []string) *app {
	t.Helper()
	if redis == "up" {
		settings = append(settings, "REDIS_URL="+testRedis(t))
	}
	for _, s := range settings {
		if strings.HasPrefix(s, "DATABASE_URL=") {
			return launchApp(t, settings...)
		}
	}
	a := startApp(t, settings...)
	eventually(t, patience, "redis is "+redis, func() bool {
		var h wireHealth
		do(t, "GET", a.url+"/health", "").json(t, &h)
		return h.Redis.Status == redis
	})
	return a
}

// try sends a case's request and compares the answer.
func (run *restRun) try(t *testing.T, c restCase) {
	target := run.expand(t, c.path)
	body := run.expand(t, c.body)
	var headers []string
	for _, h := range c.headers {
		name, value, _ := strings.Cut(run.expand(t, h), ":")
		headers = append(headers, name+": "+strings.TrimSpace(value))
	}
	r := do(t, c.method, run.app.url+target, body, headers...)
	run.seen.add(fmt.Sprintf("%s:%d", run.file, c.line), c.method, target, headers, body, r)
	if r.status != c.status {
		t.Fatalf("%s:%d, %s\n%s %.200s: %d, want %d: %.500s",
			run.file, c.line, c.title, c.method, target, r.status, c.status, r.body)
	}
	defer func() {
		if t.Failed() {
			t.Logf("%s:%d, %s\n%s %.200s\n%.2000s",
				run.file, c.line, c.title, c.method, target, r.body)
		}
	}()
	checkReply(t, r)
	rest := run.expand(t, c.rest)
	switch {
	case c.status == http.StatusFound || c.status == http.StatusSeeOther:
		if got := r.header.Get("Location"); got != rest {
			t.Errorf("Location %q, want %q", got, rest)
		}
	case rest != "":
		checkError(t, r, rest)
	case c.want.body == "":
		if r.body != "" {
			t.Errorf("a body where none belongs")
		}
	case c.want.body[0] == '~':
		if words := c.want.body[1:]; !strings.Contains(r.body, words) {
			t.Errorf("no %q in the answer", words)
		}
	default:
		err := run.match(t, decodeAny(t, c.want.body), decodeAny(t, r.body), "body")
		if err != nil {
			t.Error(err)
		}
	}
	for _, h := range c.want.headers {
		name, want, _ := strings.Cut(h, ":")
		if got := r.header.Get(name); !run.matchText(t, strings.TrimSpace(want), got) {
			t.Errorf("%s: %q, want %s", name, got, want)
		}
	}
}

// expand fills in the {{places}} of a text.
func (run *restRun) expand(t *testing.T, text string) string {
	t.Helper()
	return restPlace.ReplaceAllStringFunc(text, func(place string) string {
		name := place[2 : len(place)-2]
		if v, known := run.saved[name]; known {
			return fmt.Sprint(v)
		}
		repeat := restRepeat.FindStringSubmatch(name)
		if repeat == nil {
			t.Fatalf("nothing is known of %s", place)
		}
		n, err := strconv.Atoi(repeat[2])
		if err != nil {
			t.Fatal(err)
		}
		return strings.Repeat(repeat[1], n)
	})
}

// match says where got differs from want, or returns nil.
func (run *restRun) match(t *testing.T, want, got any, at string) error {
	t.Helper()
	switch want := want.(type) {
	case map[string]any:
		object, isObject := got.(map[string]any)
		if !isObject {
			return fmt.Errorf("%s is %v, want an object", at, got)
		}
		return run.matchObject(t, want, object, at)
	case []any:
		array, isArray := got.([]any)
		if !isArray || len(array) != len(want) {
			return fmt.Errorf("%s is %v, want %d elements", at, got, len(want))
		}
		for i := range want {
			err := run.match(t, want[i], array[i], fmt.Sprintf("%s[%d]", at, i))
			if err != nil {
				return err
			}
		}
		return nil
	case string:
		if !run.matchText(t, want, got) {
			return fmt.Errorf("%s is %#v, want %s", at, got, want)
		}
		return nil
	}
	if !reflect.DeepEqual(want, got) {
		return fmt.Errorf("%s is %#v, want %#v", at, got, want)
	}
	return nil
}

// matchObject is match for objects. Members are taken in order of their names, so that what one
// remembers the next may repeat.
func (run *restRun) matchObject(t *testing.T, want, got map[string]any, at string) error {
	t.Helper()
	_, more := want["…"]
	for name := range got {
		if _, known := want[name]; !known && !more {
			return fmt.Errorf("%s.%s should not be there", at, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if name == "…" {
			continue
		}
		value, there := got[name]
		if !there {
			return fmt.Errorf("%s.%s is missing", at, name)
		}
		if err := run.match(t, want[name], value, at+"."+name); err != nil {
			return err
		}
	}
	return nil
}

// matchText is match for texts, which may stand for values of a kind.
func (run *restRun) matchText(t *testing.T, want string, got any) bool {
	t.Helper()
	text, isText := got.(string)
	number, isNumber := got.(json.Number)
	switch want {
	case "<time>":
		when, err := time.Parse(wireTime, text)
		return err == nil && when.Format(wireTime) == text && time.Since(when).Abs() < 2*time.Minute
	case "<code>":
		return restCode.MatchString(text)
	case "<fields>":
		fields, isObject := got.(map[string]any)
		return isObject && len(fields) > 0
	case "<text>":
		return text != ""
	case "<int>":
		return isNumber && restNumber.MatchString(number.String())
	case "<number>":
		return isNumber
	}
	if place := restPlace.FindStringSubmatch(want); place != nil && place[0] == want {
		name := place[1]
		if v, known := run.saved[name]; known {
			return reflect.DeepEqual(v, got)
		}
		if !restRepeat.MatchString(name) {
			run.saved[name] = got
			return isText || isNumber
		}
	}
	want = run.expand(t, want)
	if words, ok := strings.CutPrefix(want, "~"); ok {
		return strings.Contains(text, words)
	}
	return isText && text == want
}
