package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// openapi.json is written by hand. The tests hold it against the routes, the wire structs, the
// fields and parameters that handlers read, and the statuses that the REST cases saw. What only
// others can judge, scripts/apidoc.sh asks them: whether the document is good OpenAPI, and whether
// every answer is as the document says.

// node is an object of the document.
type node = map[string]any

// readOpenAPI reads the document.
func readOpenAPI(t testing.TB) node {
	t.Helper()
	text, err := os.ReadFile("openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	var doc node
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	return doc
}

// resolve follows the $ref of v, if it is one, and so on.
func resolve(t testing.TB, doc node, v any) any {
	t.Helper()
	for {
		object, _ := v.(node)
		ref, isRef := object["$ref"].(string)
		if !isRef {
			return v
		}
		v = at(t, doc, doc, strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
		if v == nil {
			t.Fatalf("%s leads nowhere", ref)
		}
	}
}

// at follows keys from a part of the document, and every $ref on the way. What is not there is nil.
func at(t testing.TB, doc node, from any, keys ...string) any {
	t.Helper()
	from = resolve(t, doc, from)
	for _, key := range keys {
		object, _ := from.(node)
		from = resolve(t, doc, object[key])
	}
	return from
}

// operation is the documented operation of a route.
func operation(t testing.TB, doc node, pattern string) node {
	t.Helper()
	method, route, _ := strings.Cut(pattern, " ")
	op, _ := at(t, doc, doc, "paths", route, strings.ToLower(method)).(node)
	return op
}

// elements is a part of the document as an array; what is not there is empty.
func elements(v any) []any {
	all, _ := v.([]any)
	return all
}

// properties are the names of a schema's members, those of its allOf included.
func properties(t testing.TB, doc node, schema any) []string {
	t.Helper()
	object, _ := at(t, doc, schema, "properties").(node)
	names := slices.Collect(maps.Keys(object))
	for _, part := range elements(at(t, doc, schema, "allOf")) {
		names = append(names, properties(t, doc, part)...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// required are the names of the members that a schema requires, those of its allOf included.
func required(t testing.TB, doc node, schema any) []string {
	t.Helper()
	var names []string
	for _, name := range elements(at(t, doc, schema, "required")) {
		names = append(names, name.(string))
	}
	for _, part := range elements(at(t, doc, schema, "allOf")) {
		names = append(names, required(t, doc, part)...)
	}
	slices.Sort(names)
	return names
}

// members are the JSON names of a struct's fields, those of embedded structs included; always are
// those that are never left out.
func members(typ reflect.Type) (all, always []string) {
	for typ.Kind() != reflect.Struct {
		typ = typ.Elem()
	}
	for i := range typ.NumField() {
		field := typ.Field(i)
		name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
		if name == "" && field.Anonymous {
			inner, needed := members(field.Type)
			all = append(all, inner...)
			always = append(always, needed...)
			continue
		}
		all = append(all, name)
		if options != "omitempty" {
			always = append(always, name)
		}
	}
	slices.Sort(all)
	slices.Sort(always)
	return all, always
}

func TestOpenAPIRoutes(t *testing.T) {
	doc := readOpenAPI(t)
	if doc["openapi"] != "3.1.0" {
		t.Errorf("openapi: %v", doc["openapi"])
	}
	documented := map[string]bool{}
	for route, item := range at(t, doc, doc, "paths").(node) {
		for method := range item.(node) {
			documented[strings.ToUpper(method)+" "+route] = true
		}
	}
	ids := map[any]bool{}
	for _, rt := range new(Server).routes() {
		if !documented[rt.pattern] {
			t.Errorf("%s is not in openapi.json", rt.pattern)
			continue
		}
		delete(documented, rt.pattern)
		op := operation(t, doc, rt.pattern)
		if op["operationId"] == nil || ids[op["operationId"]] || op["summary"] == nil {
			t.Errorf("%s: operationId %v, summary %v", rt.pattern, op["operationId"], op["summary"])
		}
		ids[op["operationId"]] = true
		var inPath []string
		for _, p := range elements(op["parameters"]) {
			if at(t, doc, p, "in") == "path" {
				inPath = append(inPath, fmt.Sprintf("{%s}", at(t, doc, p, "name")))
			}
		}
		var inPattern []string
		for word := range strings.SplitSeq(rt.pattern, "/") {
			if strings.HasPrefix(word, "{") {
				inPattern = append(inPattern, word)
			}
		}
		if !slices.Equal(inPath, inPattern) {
			t.Errorf("%s has the path parameters %v", rt.pattern, inPath)
		}
	}
	for pattern := range documented {
		t.Errorf("openapi.json has %s, routes do not", pattern)
	}
}

func TestOpenAPISchemas(t *testing.T) {
	doc := readOpenAPI(t)
	schema := func(keys ...string) any {
		return at(t, doc, doc, append([]string{"components", "schemas"}, keys...)...)
	}
	figures := elements(at(t, doc, schema("Stats"), "allOf"))[1]
	for _, c := range []struct {
		name   string
		schema any
		typ    reflect.Type
	}{
		{"User", schema("User"), reflect.TypeFor[wireUser]()},
		{"Link", schema("Link"), reflect.TypeFor[wireLink]()},
		{"BulkResult", schema("BulkResult"), reflect.TypeFor[wireResult]()},
		{"Loaded", schema("Loaded"), reflect.TypeFor[wireLoaded]()},
		{"Loaded.conflicts", schema("Loaded", "properties", "conflicts", "items"),
			reflect.TypeFor[wireConflict]()},
		{"Stats", schema("Stats"), reflect.TypeFor[wireStats]()},
		{"Stats.clicks_per_day", at(t, doc, figures, "properties", "clicks_per_day", "items"),
			reflect.TypeFor[wireDay]()},
		{"Stats.top_referrers", at(t, doc, figures, "properties", "top_referrers", "items"),
			reflect.TypeFor[wireHost]()},
		{"Event", schema("Event"), reflect.TypeFor[wireEvent]()},
		{"Health", schema("Health"), reflect.TypeFor[wireHealth]()},
		{"Health.clicks", schema("Health", "properties", "clicks"), reflect.TypeFor[wireClicks]()},
		{"Peer", schema("Peer"), reflect.TypeFor[wirePeer]()},
		{"Error", schema("Error"), reflect.TypeFor[wireError]()},
	} {
		all, always := members(c.typ)
		if got := properties(t, doc, c.schema); !slices.Equal(got, all) {
			t.Errorf("%s has %v, the type %v", c.name, got, all)
		}
		if got := required(t, doc, c.schema); !slices.Equal(got, always) {
			t.Errorf("%s requires %v, the type always has %v", c.name, got, always)
		}
	}
}

// TestOpenAPIAnswers reads every example answer as the wire struct that it is an example of.
func TestOpenAPIAnswers(t *testing.T) {
	doc := readOpenAPI(t)
	check := func(example, dst any) {
		t.Helper()
		text, err := json.Marshal(example)
		if err != nil || example == nil {
			t.Fatalf("%v, %v", example, err)
		}
		strict(t, string(text), dst)
	}
	for name, dst := range map[string]any{
		"User":       new(wireUser),
		"Link":       new(wireLink),
		"BulkResult": new(wireResult),
		"Loaded":     new(wireLoaded),
		"Event":      new(wireEvent),
		"Health":     new(wireHealth),
	} {
		check(elements(at(t, doc, doc, "components", "schemas", name, "examples"))[0], dst)
	}
	for _, response := range at(t, doc, doc, "components", "responses").(node) {
		example := at(t, doc, response, "content", "application/json", "example")
		if example != nil {
			check(example, new(wireError))
		}
	}
	for pattern, c := range map[string]struct {
		status string
		dst    any
	}{
		"GET /stats/{code}": {"200", new(wireStats)},
		"POST /shorten":     {"201", new(wireLink)},
	} {
		op := operation(t, doc, pattern)
		check(at(t, doc, op, "responses", c.status, "content", "application/json", "example"), c.dst)
	}
}

// TestOpenAPIRequests sends every example request, and every documented field and parameter with a
// wrong value: the answer must name it.
func TestOpenAPIRequests(t *testing.T) {
	doc := readOpenAPI(t)
	a := startApp(t)
	get[wireUser](t, a, 201, "POST", "/users", annJSON)
	addLink(t, a, "https://example.com/", "first")
	for _, rt := range a.routes() {
		method, route, _ := strings.Cut(rt.pattern, " ")
		target := a.url + strings.NewReplacer("{id}", "1", "{code}", "first").Replace(route)
		op := operation(t, doc, rt.pattern)
		for _, p := range elements(op["parameters"]) {
			name := at(t, doc, p, "name").(string)
			if at(t, doc, p, "in") != "query" {
				continue
			}
			r := do(t, method, target+"?"+name+"=%01", "")
			if got := refusedFields(t, r); got[name] == "" {
				t.Errorf("%s does not read %s: %d %s", rt.pattern, name, r.status, r.body)
			}
		}
		content, _ := at(t, doc, op, "requestBody", "content").(node)
		for media, c := range content {
			example := at(t, doc, c, "example")
			if media == "multipart/form-data" { // has no text form; the REST cases send it
				continue
			}
			r := do(t, method, target, bodyOf(t, media, example), "Content-Type: "+media)
			documented := at(t, doc, op, "responses", strconv.Itoa(r.status))
			if r.status >= 300 || documented == nil {
				t.Errorf("%s with its example as %s: %d %s", rt.pattern, media, r.status, r.body)
			}
			if media == "application/json" {
				checkRequestFields(t, doc, method, target, c)
			}
		}
	}
}

// bodyOf is an example as a body of a media type.
func bodyOf(t testing.TB, media string, example any) string {
	t.Helper()
	if text, isText := example.(string); isText {
		return text
	}
	if media == "application/x-www-form-urlencoded" {
		form := url.Values{}
		for name, value := range example.(node) {
			form.Set(name, fmt.Sprint(value))
		}
		return form.Encode()
	}
	text, err := json.Marshal(example)
	if err != nil || example == nil {
		t.Fatalf("%s: %v, %v", media, example, err)
	}
	return string(text)
}

// checkRequestFields sends the example of a request with each of its fields in turn as an array of
// numbers, which no field may be.
func checkRequestFields(t *testing.T, doc node, method, target string, content any) {
	t.Helper()
	example := at(t, doc, content, "example")
	schema := at(t, doc, content, "schema")
	items := elements(example)
	if len(items) > 0 {
		example = items[0]
		schema = at(t, doc, schema, "items")
	}
	names := properties(t, doc, schema)
	if len(names) == 0 {
		t.Errorf("%s %s has no request fields", method, target)
	}
	for _, name := range names {
		wrong := maps.Clone(example.(node))
		wrong[name] = []any{1}
		body := bodyOf(t, "application/json", wrong)
		if len(items) > 0 {
			body = "[" + body + "]"
		}
		r := do(t, method, target, body)
		if why := refusedFields(t, r)[name]; why == "" || why == "is required" {
			t.Errorf("%s %s does not read %s: %d %s", method, target, name, r.status, r.body)
		}
	}
}

// refusedFields are the fields that an answer finds fault with, or the first item of a bulk answer.
func refusedFields(t testing.TB, r reply) map[string]string {
	t.Helper()
	var bulk wireBulk
	r.json(t, &bulk)
	if len(bulk.Results) > 0 {
		return bulk.Results[0].Fields
	}
	var e wireError
	r.json(t, &e)
	return e.Fields
}

// fieldGetters are the methods that take a field or a parameter by its name.
var fieldGetters = []string{
	"expiry", "flag", "flagOrNull", "future", "has", "hasAny", "id", "int", "nameOf", "null",
	"object", "target", "text", "unchanged", "Get",
}

// TestOpenAPINames finds the names of all fields and parameters in the handlers' source, as the
// string literals that they give to the getters, and looks for them in the document.
func TestOpenAPINames(t *testing.T) {
	doc := readOpenAPI(t)
	known := map[string]bool{}
	for name := range at(t, doc, doc, "components", "parameters").(node) {
		known[name] = true
	}
	for _, item := range at(t, doc, doc, "paths").(node) {
		for _, op := range item.(node) {
			for _, p := range elements(at(t, doc, op, "parameters")) {
				known[at(t, doc, p, "name").(string)] = true
			}
			content, _ := at(t, doc, op, "requestBody", "content").(node)
			for _, c := range content {
				schema := at(t, doc, c, "schema")
				for _, s := range []any{schema, at(t, doc, schema, "items")} {
					for _, name := range properties(t, doc, s) {
						known[name] = true
					}
				}
			}
		}
	}
	read := map[string]string{}
	for _, file := range []string{"input.go", "urls.go", "users.go", "events.go"} {
		tree, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(tree, func(n ast.Node) bool {
			for _, name := range namesTaken(n) {
				read[name] = file
			}
			return true
		})
	}
	if len(read) < 20 {
		t.Errorf("only %v found", read)
	}
	for name, file := range read {
		if !known[name] {
			t.Errorf("%s reads %q, which is not in openapi.json", file, name)
		}
	}
}

// namesTaken are the field names that n, if it is a call of a getter, gives to it.
func namesTaken(n ast.Node) []string {
	call, isCall := n.(*ast.CallExpr)
	if !isCall {
		return nil
	}
	method, isMethod := call.Fun.(*ast.SelectorExpr)
	if !isMethod || !slices.Contains(fieldGetters, method.Sel.Name) {
		return nil
	}
	var names []string
	for _, arg := range call.Args {
		literal, isLiteral := arg.(*ast.BasicLit)
		if !isLiteral || literal.Kind != token.STRING {
			continue
		}
		name, err := strconv.Unquote(literal.Value)
		if err == nil && strings.ToLower(name) == name { // header names are not
			names = append(names, name)
		}
	}
	return names
}

// ---- what the REST cases saw ----

// recorded is one answer and the request for it, for scripts/apidoc.sh to judge.
type recorded struct {
	Case        string      `json:"case"`  // file and line
	Route       string      `json:"route"` // "METHOD /path" of the API document, "page" or "none"
	Path        string      `json:"path"`
	RequestType string      `json:"request_type"`
	Request     string      `json:"request"`
	Status      int         `json:"status"`
	Header      http.Header `json:"header"`
	Body        string      `json:"body"`
}

// maxRecorded is the longest request that is kept, in bytes. Longer ones are those that are refused
// for their size.
const maxRecorded = 64 << 10

// recorder keeps all answers of a run.
type recorder struct {
	mux     *http.ServeMux // knows of a request which route it is for
	pages   map[string]bool
	answers []recorded
}

// newRecorder returns a recorder that has seen nothing.
func newRecorder() *recorder {
	rec := &recorder{mux: http.NewServeMux(), pages: map[string]bool{}}
	for _, rt := range new(Server).routes() {
		rec.mux.Handle(rt.pattern, http.NotFoundHandler())
	}
	for _, rt := range new(Server).pages() {
		rec.mux.Handle(rt.pattern, http.NotFoundHandler())
		rec.pages[rt.pattern] = true
	}
	return rec
}

// add keeps one answer.
func (rec *recorder) add(name, method, target string, headers []string, body string, r reply) {
	if len(body) > maxRecorded {
		body = ""
	}
	answer := recorded{
		Case:    name,
		Route:   rec.route(method, target),
		Path:    target,
		Request: body,
		Status:  r.status,
		Header:  r.header,
		Body:    r.body,
	}
	if body != "" {
		answer.RequestType = "application/json"
	}
	for _, h := range headers {
		if media, ok := strings.CutPrefix(h, "Content-Type: "); ok {
			answer.RequestType = media
		}
	}
	rec.answers = append(rec.answers, answer)
}

// route is the documented route of a request, "page" for what only browsers ask for, or "none". The
// mux would clean paths, hop does not; but hop leaves off a slash after a code.
func (rec *recorder) route(method, target string) string {
	req, err := http.NewRequest(method, "http://hop.test"+target, nil)
	if err != nil {
		return "none"
	}
	if req.URL.Path != path.Clean(req.URL.Path) {
		req.URL.Path = strings.TrimSuffix(req.URL.Path, "/")
		_, pattern := rec.mux.Handler(req)
		if req.URL.Path == path.Clean(req.URL.Path) && pattern == "GET /{code}" {
			return pattern
		}
		return "none"
	}
	_, pattern := rec.mux.Handler(req)
	switch {
	case pattern == "":
		return "none"
	case rec.pages[pattern]:
		return "page"
	}
	return pattern
}

// statuses are the statuses that each route answered.
func (rec *recorder) statuses() map[string]map[string]bool {
	all := map[string]map[string]bool{}
	for _, a := range rec.answers {
		if all[a.Route] == nil {
			all[a.Route] = map[string]bool{}
		}
		all[a.Route][strconv.Itoa(a.Status)] = true
	}
	return all
}

// save writes what was recorded to the file that REST_RECORD names, one answer a line.
func (rec *recorder) save(t *testing.T) {
	t.Helper()
	name := os.Getenv("REST_RECORD")
	if name == "" {
		return
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	for _, a := range rec.answers {
		if err := enc.Encode(a); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(name, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

// checkStatuses compares what each route answered with what is documented, both ways.
func checkStatuses(t *testing.T, rec *recorder) {
	if strings.Contains(flag.Lookup("test.run").Value.String(), "/") {
		t.Skip("only a part of the cases was run")
	}
	doc := readOpenAPI(t)
	seen := rec.statuses()
	compare := func(route string, op any) {
		responses, _ := at(t, doc, op, "responses").(node)
		for status := range seen[route] {
			if responses[status] == nil {
				t.Errorf("%s answered %s, which is not in openapi.json", route, status)
			}
		}
		for status := range responses {
			if status != "default" && !seen[route][status] {
				t.Errorf("%s never answered the %s of openapi.json", route, status)
			}
		}
	}
	for _, rt := range new(Server).routes() {
		compare(rt.pattern, operation(t, doc, rt.pattern))
	}
	compare("none", doc["x-unlisted"])
}

// ---- what guards every route ----

// checkGuards asks every route without a token, with one that only reads, as a browser from another
// site, with headers that are too large, and while too much is in flight.
func checkGuards(t *testing.T, redis string, rec *recorder) {
	const reader = "reader-reader-reader-reader-reader"
	doc := readOpenAPI(t)
	a := startREST(t, redis, []string{"API_TOKEN=" + anyToken, "READ_TOKEN=" + reader})
	filled := strings.NewReplacer("{code}", "unknown", "{id}", "99")
	for _, rt := range a.routes() {
		method, route, _ := strings.Cut(rt.pattern, " ")
		target := filled.Replace(route)
		ask := func(headers ...string) reply {
			r := do(t, method, a.url+target, "", headers...)
			rec.add("guards", method, target, headers, "", r)
			return r
		}
		op := operation(t, doc, rt.pattern)
		_, own := op["security"]
		open := own && len(elements(op["security"])) == 0
		if r := ask(); open == (r.status == http.StatusUnauthorized) {
			t.Errorf("%s without a token: %d, documented as open: %v", rt.pattern, r.status, open)
		} else if !open {
			checkError(t, r, "unauthorized")
		}
		if r := ask("Authorization: Bearer " + reader); own == (r.status == http.StatusUnauthorized) {
			t.Errorf("%s with the token that reads: %d, documented: %v", rt.pattern, r.status, own)
		}
		token := "Authorization: Bearer " + anyToken
		if r := ask(token); r.status == http.StatusUnauthorized {
			t.Errorf("%s with a token: %d", rt.pattern, r.status)
		}
		if method != "GET" {
			r := ask("Sec-Fetch-Site: cross-site")
			if r.status != http.StatusForbidden {
				t.Errorf("%s from another site: %d", rt.pattern, r.status)
			}
			checkError(t, r, "cross_origin")
		}
		large := fmt.Sprintf("%s %s HTTP/1.1\nX-A: %s\n\n", method, target, strings.Repeat("a", 2<<20))
		r := sendRaw(t, a, large)
		rec.add("guards", method, target, nil, "", r)
		if r.status != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("%s with large headers: %d", rt.pattern, r.status)
		}
		a.inflight.n.Add(1 << 20)
		r = ask(token)
		a.inflight.n.Add(-1 << 20)
		if strings.HasPrefix(route, "/health") {
			if r.status != http.StatusOK {
				t.Errorf("%s with too much in flight: %d", rt.pattern, r.status)
			}
			continue
		}
		if r.status != http.StatusServiceUnavailable {
			t.Errorf("%s with too much in flight: %d", rt.pattern, r.status)
		}
		checkError(t, r, "overloaded")
	}
}
