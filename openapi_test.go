package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// openapi.yaml is written by hand, in a small part of YAML that the parser below reads: block maps and lists, one-line scalars,
// >- texts, JSON, [plain, words] and {$ref: '…'}. The tests hold it against the routes, the wire structs, the request fields that
// handlers read, and the statuses that the contract run (rest_test.go) saw.

// node is a part of the document.
type node = map[string]any

// yamlLines are the lines of a document that say something.
type yamlLines []struct {
	indent int
	text   string
}

func parseYAML(src string) any {
	var lines yamlLines
	for line := range strings.Lines(src) {
		line = strings.TrimRight(line, "\n")
		if text := strings.TrimLeft(line, " "); text != "" && text[0] != '#' {
			lines = append(lines, struct {
				indent int
				text   string
			}{len(line) - len(text), text})
		}
	}
	v := lines.block(-1)
	if len(lines) > 0 {
		panic("openapi.yaml: left over: " + lines[0].text)
	}
	return v
}

// block takes the lines that are deeper than outer and returns their value.
func (l *yamlLines) block(outer int) any {
	if len(*l) == 0 || (*l)[0].indent <= outer {
		return nil
	}
	indent := (*l)[0].indent
	object, list := node{}, []any(nil)
	for len(*l) > 0 && (*l)[0].indent == indent {
		text := (*l)[0].text
		if item, ok := strings.CutPrefix(text, "- "); ok {
			if _, _, isMap := strings.Cut(item, ": "); isMap && item[0] != '{' {
				(*l)[0].indent, (*l)[0].text = indent+2, item
				list = append(list, l.block(indent))
				continue
			}
			*l = (*l)[1:]
			list = append(list, yamlScalar(item))
			continue
		}
		key, value, ok := strings.Cut(text, ":")
		if value = strings.TrimPrefix(value, " "); !ok {
			panic("openapi.yaml: no key: " + text)
		}
		key = strings.Trim(key, "'")
		if _, again := object[key]; again {
			panic("openapi.yaml: twice: " + text)
		}
		*l = (*l)[1:]
		switch value {
		case "":
			object[key] = l.block(indent)
		case ">-":
			var words []string
			for len(*l) > 0 && (*l)[0].indent > indent {
				words, *l = append(words, (*l)[0].text), (*l)[1:]
			}
			object[key] = strings.Join(words, " ")
		default:
			object[key] = yamlScalar(value)
		}
	}
	if list != nil {
		return list
	}
	return object
}

func yamlScalar(s string) any {
	var v any
	if json.Unmarshal([]byte(s), &v) == nil {
		return v
	}
	if ref, ok := strings.CutPrefix(s, "{$ref: '"); ok {
		return node{"$ref": strings.TrimSuffix(ref, "'}")}
	}
	if s[0] == '[' {
		list := []any{}
		for word := range strings.SplitSeq(strings.Trim(s, "[]"), ", ") {
			list = append(list, strings.Trim(word, "'"))
		}
		return list
	}
	return strings.Trim(s, "'")
}

// at follows keys into the document and every $ref on the way.
func at(t testing.TB, doc node, from any, keys ...string) any {
	t.Helper()
	for i := 0; ; i++ {
		for object, _ := from.(node); object["$ref"] != nil && len(object) == 1; object, _ = from.(node) {
			from = at(t, doc, doc, strings.Split(strings.TrimPrefix(object["$ref"].(string), "#/"), "/")...)
			if from == nil {
				t.Fatalf("%v leads nowhere", object["$ref"])
			}
		}
		if i == len(keys) {
			return from
		}
		object, _ := from.(node)
		from = object[keys[i]]
	}
}

func readOpenAPI(t testing.TB) node {
	t.Helper()
	b, err := os.ReadFile("openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return parseYAML(string(b)).(node)
}

// operation is the documented operation of a route.
func operation(t testing.TB, doc node, pattern string) any {
	method, path, _ := strings.Cut(pattern, " ")
	return at(t, doc, doc, "paths", path, strings.ToLower(method))
}

// properties are the names of a schema's members, those of its allOf included.
func properties(t testing.TB, doc node, schema any) []string {
	t.Helper()
	object, _ := at(t, doc, schema).(node)
	props, _ := object["properties"].(node)
	names := slices.Collect(maps.Keys(props))
	all, _ := object["allOf"].([]any)
	for _, part := range all {
		names = append(names, properties(t, doc, part)...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// members are the JSON names of a struct's fields, those of embedded structs included; required are those that are always there.
func members(typ reflect.Type) (all, required []string) {
	for typ.Kind() != reflect.Struct {
		typ = typ.Elem()
	}
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, options, tagged := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "-":
		case name != "":
			all = append(all, name)
			if options != "omitempty" {
				required = append(required, name)
			}
		case f.Anonymous && !tagged:
			inner, needed := members(f.Type)
			if all = append(all, inner...); f.Type.Kind() == reflect.Struct {
				required = append(required, needed...)
			}
		}
	}
	slices.Sort(all)
	slices.Sort(required)
	return all, required
}

func TestOpenAPIRoutes(t *testing.T) {
	doc := readOpenAPI(t)
	if v := doc["openapi"]; v != "3.1.0" {
		t.Errorf("openapi: %v", v)
	}
	documented := map[string]bool{}
	for path, item := range at(t, doc, doc, "paths").(node) {
		for method := range item.(node) {
			documented[strings.ToUpper(method)+" "+path] = true
		}
	}
	ids := map[any]bool{}
	for _, rt := range new(Server).routes() {
		if !documented[rt.pattern] {
			t.Errorf("%s is not in openapi.yaml", rt.pattern)
			continue
		}
		delete(documented, rt.pattern)
		op := operation(t, doc, rt.pattern).(node)
		if ids[op["operationId"]] || op["operationId"] == nil || op["summary"] == nil {
			t.Errorf("%s: operationId %v, summary %v", rt.pattern, op["operationId"], op["summary"])
		}
		ids[op["operationId"]] = true
		if open := op["security"] != nil; open != rt.open {
			t.Errorf("%s: open is %v in openapi.yaml, %v in routes", rt.pattern, open, rt.open)
		}
		params, _ := op["parameters"].([]any)
		inPath := ""
		for _, p := range params {
			if at(t, doc, p, "in") == "path" {
				inPath += fmt.Sprintf("{%s}", at(t, doc, p, "name"))
			}
		}
		if _, rest, _ := strings.Cut(rt.pattern, "{"); strings.Contains(rt.pattern, "{") != (inPath != "") || inPath != "" && !strings.HasPrefix("{"+rest, inPath) {
			t.Errorf("%s has the path parameters %q", rt.pattern, inPath)
		}
	}
	for pattern := range documented {
		t.Errorf("openapi.yaml has %s, routes do not", pattern)
	}
}

func TestOpenAPISchemas(t *testing.T) {
	doc := readOpenAPI(t)
	schema := func(keys ...string) any {
		return at(t, doc, doc, append([]string{"components", "schemas"}, keys...)...)
	}
	item := func(list string) any {
		return at(t, doc, schema("Stats", "allOf").([]any)[1], "properties", list, "items")
	}
	for _, c := range []struct {
		name   string
		schema any
		typ    reflect.Type
	}{
		{"User", schema("User"), reflect.TypeFor[wireUser]()},
		{"Link", schema("Link"), reflect.TypeFor[wireLink]()},
		{"BulkResult", schema("BulkResult"), reflect.TypeFor[wireResult]()},
		{"Stats", schema("Stats"), reflect.TypeFor[wireStats]()},
		{"clicks_per_day", item("clicks_per_day"), reflect.TypeFor[wireDay]()},
		{"top_referrers", item("top_referrers"), reflect.TypeFor[wireHost]()},
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
		var required []string
		parts := []any{c.schema}
		if all, ok := at(t, doc, c.schema, "allOf").([]any); ok {
			parts = all
		}
		for _, part := range parts {
			for _, name := range at(t, doc, part, "required").([]any) {
				required = append(required, name.(string))
			}
		}
		if slices.Sort(required); !slices.Equal(required, always) {
			t.Errorf("%s requires %v, the type always has %v", c.name, required, always)
		}
	}
}

// TestOpenAPIExamples sends every example request, compares every example answer with the wire structs, and sends every
// documented request field and parameter with a wrong value: the answer must name it.
func TestOpenAPIExamples(t *testing.T) {
	doc := readOpenAPI(t)
	for name, dst := range map[string]any{"User": new(wireUser), "Link": new(wireLink), "BulkResult": &new(wireBulk).Results, "Event": new(wireEvent), "Health": new(wireHealth)} {
		example := at(t, doc, doc, "components", "schemas", name, "example")
		if name == "BulkResult" {
			example = []any{example}
		}
		strict(t, jsonText(example), dst)
	}
	for name := range at(t, doc, doc, "components", "responses").(node) {
		if example := at(t, doc, doc, "components", "responses", name, "content", "application/json", "example"); example != nil {
			strict(t, jsonText(example), new(wireError))
		}
	}
	strict(t, jsonText(at(t, doc, operation(t, doc, "GET /stats/{code}"), "responses", "200", "content", "application/json", "example")), new(wireStats))
	strict(t, jsonText(at(t, doc, operation(t, doc, "POST /shorten"), "responses", "201", "content", "application/json", "example")), new(wireLink))

	a := startApp(t)
	get[wireUser](t, a, 201, "POST", "/users", annJSON)
	addLink(t, a, "https://example.com/", "first")
	known := map[string]bool{}
	for _, rt := range a.routes() {
		method, path, _ := strings.Cut(rt.pattern, " ")
		url := a.url + strings.NewReplacer("{id}", "1", "{code}", "first").Replace(path)
		op := operation(t, doc, rt.pattern)
		params, _ := at(t, doc, op, "parameters").([]any)
		for _, p := range params {
			name := at(t, doc, p, "name").(string)
			if known[name] = true; at(t, doc, p, "in") != "query" {
				continue
			}
			r := do(t, method, url+"?"+name+"=%01", "")
			var e wireError
			if r.json(t, &e); r.status != 400 || e.Fields[name] == "" {
				t.Errorf("%s does not read %s: %d %s", rt.pattern, name, r.status, r.body)
			}
		}
		content, _ := at(t, doc, op, "requestBody", "content").(node)
		for media, c := range content {
			example := at(t, doc, c, "example")
			if example == nil {
				if media != "multipart/form-data" { // has no text form; the contract run sends it
					t.Errorf("%s has no example in %s", rt.pattern, media)
				}
				continue
			}
			body, isText := example.(string)
			if !isText {
				body = jsonText(example)
			}
			responses := at(t, doc, op, "responses").(node)
			if r := do(t, method, url, body, "Content-Type: "+media); r.status >= 300 || responses[strconv.Itoa(r.status)] == nil {
				t.Errorf("%s with its example: %d %s", rt.pattern, r.status, r.body)
			}
			if media != "application/json" {
				continue
			}
			schema := at(t, doc, c, "schema")
			bulk := at(t, doc, schema, "type") == "array"
			if bulk {
				schema = at(t, doc, schema, "items")
			}
			names := properties(t, doc, schema)
			if len(names) == 0 {
				t.Errorf("%s has no request fields", rt.pattern)
			}
			for _, name := range names {
				known[name] = true
				body := fmt.Sprintf(`{%q:[]}`, name)
				if bulk {
					body = "[" + body + "]"
				}
				r := do(t, method, url, body)
				fields := wireError{}.Fields
				if bulk {
					var e wireBulk
					r.json(t, &e)
					if len(e.Results) == 1 {
						fields = e.Results[0].Fields
					}
				} else {
					var e wireError
					r.json(t, &e)
					fields = e.Fields
				}
				if why := fields[name]; why == "" || why == "is required" {
					t.Errorf("%s does not read %s: %d %s", rt.pattern, name, r.status, r.body)
				}
			}
		}
	}
	for name, where := range fieldsRead(t) {
		if !known[name] {
			t.Errorf("%s reads %q, which is not in openapi.yaml", where, name)
		}
	}
}

// fieldsRead finds the names of request fields and parameters in the handlers' source: the string literals they give to the
// getters of fields and query, and to readLink's name.
func fieldsRead(t testing.TB) map[string]string {
	t.Helper()
	getters := map[string]bool{"text": true, "id": true, "flag": true, "object": true, "future": true, "has": true, "int": true, "filterInt": true, "Has": true, "name": true}
	found := map[string]string{}
	for _, file := range []string{"urls.go", "users.go", "events.go", "input.go"} {
		tree, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(tree, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			callee := ""
			switch f := call.Fun.(type) {
			case *ast.SelectorExpr:
				callee = f.Sel.Name
			case *ast.Ident:
				callee = f.Name
			}
			if getters[callee] {
				for _, arg := range call.Args {
					if lit, ok := arg.(*ast.BasicLit); ok && lit.Kind == token.STRING {
						name, _ := strconv.Unquote(lit.Value)
						found[name] = file
					}
				}
			}
			return true
		})
	}
	if len(found) < 15 {
		t.Fatalf("only %v found", found)
	}
	return found
}

// checkStatuses compares what each route answered in a contract run with what is documented, both ways.
func checkStatuses(t *testing.T, seen seenStatuses) {
	if strings.Contains(flag.Lookup("test.run").Value.String(), "/") {
		t.Skip("only a part of the contract was run")
	}
	doc := readOpenAPI(t)
	compare := func(route string, op any, saw map[int]bool) {
		documented := map[string]bool{}
		for status := range at(t, doc, op, "responses").(node) {
			if documented[status] = true; at(t, doc, op, "responses", status, "description") == nil {
				t.Errorf("%s: %s has no description", route, status)
			}
		}
		for status := range saw {
			if !documented[strconv.Itoa(status)] {
				t.Errorf("%s answered %d, which is not in openapi.yaml", route, status)
			}
			delete(documented, strconv.Itoa(status))
		}
		for status := range documented {
			if status != "default" {
				t.Errorf("%s never answered the %s of openapi.yaml", route, status)
			}
		}
	}
	for _, rt := range new(Server).routes() {
		compare(rt.pattern, operation(t, doc, rt.pattern), seen[rt.pattern])
	}
	compare("none", doc["x-unlisted"], seen["none"])
	if seen[""][http.StatusInternalServerError] || len(seen) == 0 {
		t.Errorf("%v", seen)
	}
}
