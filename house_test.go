package main

import (
	"fmt"
	"go/ast"
	"go/build"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"
)

// How the source is built: what may know what, how it is laid out, and whether what is written on
// it is still true.

// housePlan are the files from the ground up. A file knows only what stands above it here, so that
// they can be read in this order.
var housePlan = []string{
	"model.go", "rules.go", "bots.go", "dsn.go", "dsn_postgres.go", "dsn_redis.go", "config.go",
	"limiter.go", "log.go",
	"platform_linux.go", "platform_other.go", "port.go",
	"brakes.go", "postgres.go", "store.go", "store_users.go", "store_links.go", "store_events.go",
	"retention.go", "store_clicks.go", "verify.go", "schema.go",
	"local.go", "redis.go", "cache.go", "warm.go", "poll.go",
	"journal.go", "clicks.go",
	"cors.go", "html.go", "metrics.go", "handlers.go", "json.go", "input.go",
	"etag.go", "idempotency.go", "urls.go", "events.go",
	"csv.go", "tables.go", "seed.go", "export.go", "import.go", "users.go",
	"status.go", "chart.go", "pages.go", "routes.go",
	"main.go",
}

// checkedPackage is the package, parsed and type-checked.
type checkedPackage struct {
	fset  *token.FileSet
	files map[string]*ast.File // by name
	types *types.Package
	info  *types.Info
}

// checkPackage type-checks the files that this machine builds. What they import is read from what
// the compiler made of it.
func checkPackage(t *testing.T) checkedPackage {
	t.Helper()
	here, err := build.ImportDir(".", 0)
	if err != nil {
		t.Fatal(err)
	}
	p := checkedPackage{fset: token.NewFileSet(), files: map[string]*ast.File{}}
	var files []*ast.File
	for _, name := range here.GoFiles {
		file, err := parser.ParseFile(p.fset, name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		p.files[name] = file
		files = append(files, file)
	}
	out, err := exec.Command("go", "list", "-export", "-deps",
		"-f", "{{.ImportPath}} {{.Export}}", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	compiled := map[string]string{}
	for line := range strings.Lines(string(out)) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		compiled[path] = file
	}
	open := func(path string) (io.ReadCloser, error) { return os.Open(compiled[path]) }
	p.info = &types.Info{
		Defs:       map[*ast.Ident]types.Object{},
		Uses:       map[*ast.Ident]types.Object{},
		Selections: map[*ast.SelectorExpr]*types.Selection{},
	}
	config := types.Config{Importer: importer.ForCompiler(p.fset, "gc", open)}
	p.types, err = config.Check("hop", p.fset, files, p.info)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestHouse looks for arrows that run back up the plan: a file that uses what is declared in a
// later one. A method or a field counts where it is declared, whatever its type.
func TestHouse(t *testing.T) {
	p := checkPackage(t)
	for name := range p.files {
		if !slices.Contains(housePlan, name) {
			t.Errorf("%s is not in the plan of the house", name)
		}
	}
	for _, name := range housePlan {
		if _, err := os.Stat(name); err != nil {
			t.Errorf("the plan of the house has %s, which does not exist", name)
		}
	}
	arrows := map[string][]string{} // "file -> later file" to the names used
	for ident, object := range p.info.Uses {
		if object.Pkg() != p.types || !object.Pos().IsValid() {
			continue
		}
		user := p.fset.Position(ident.Pos()).Filename
		owner := p.fset.Position(object.Pos()).Filename
		if slices.Index(housePlan, owner) <= slices.Index(housePlan, user) {
			continue
		}
		arrow := user + " -> " + owner
		if !slices.Contains(arrows[arrow], object.Name()) {
			arrows[arrow] = append(arrows[arrow], object.Name())
		}
	}
	for arrow, names := range arrows {
		slices.Sort(names)
		t.Errorf("%s: %s", arrow, strings.Join(names, ", "))
	}
}

// TestColumns holds lines to 100 columns. A tab counts as one.
func TestColumns(t *testing.T) {
	kinds := []string{".go", ".sql", ".sh", ".html", ".css", ".txt"}
	foreign := []string{".git", "node_modules", "fuzz", "bin"}
	long := []string{"bots.txt", "people.txt"} // lists of what others send
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() && slices.Contains(foreign, entry.Name()) {
			return filepath.SkipDir
		}
		if entry.IsDir() || !slices.Contains(kinds, filepath.Ext(path)) ||
			slices.Contains(long, entry.Name()) {
			return nil
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		number := 0
		for line := range strings.Lines(string(content)) {
			number++
			if n := utf8.RuneCountInString(strings.TrimRight(line, "\n")); n > 100 {
				t.Errorf("%s:%d has %d columns", path, number, n)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestReservedWords holds the words that no code may be to the routes, where such a code could not
// be reached.
func TestReservedWords(t *testing.T) {
	room := []string{"admin", "api", "docs", "favicon.ico", "login", "openapi.yaml", "robots.txt",
		"static"}
	routed := map[string]bool{}
	for _, route := range new(Server).routes() {
		_, path, _ := strings.Cut(route.pattern, " ")
		first, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
		if first != "" && !strings.HasPrefix(first, "{") {
			routed[first] = true
		}
	}
	for word := range routed {
		if !reservedWords[word] {
			t.Errorf("the route /%s is not reserved", word)
		}
	}
	for word := range reservedWords {
		if !routed[word] && !slices.Contains(room, word) {
			t.Errorf("%s is reserved, and neither a route nor room for one", word)
		}
	}
}

// TestReadingNames looks up what the documents name: files, types, methods, fields, functions,
// constants, columns of tables, settings, and tests.
func TestReadingNames(t *testing.T) {
	p := checkPackage(t)
	for document, least := range map[string]int{
		"docs/reading.md": 50, "docs/faults.md": 80,
	} {
		names := namesIn(t, document)
		if len(names) < least {
			t.Errorf("only %d names are found in %s", len(names), document)
		}
		for _, name := range names {
			if !p.knows(t, name) {
				t.Errorf("%s names `%s`, which does not exist", document, name)
			}
		}
	}
	for _, document := range []string{
		"README.md", "RELIABILITY.md", "BENCHMARKS.md", "docs/operations.md",
	} {
		for _, name := range namesIn(t, document) { // most are commands and answers
			if testName.MatchString(name) && !p.knows(t, name) {
				t.Errorf("%s names `%s`, which does not exist", document, name)
			}
		}
	}
}

// namesIn are what stands in backquotes in a document.
func namesIn(t *testing.T, document string) []string {
	t.Helper()
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, found := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(string(text), -1) {
		names = append(names, found[1])
	}
	return names
}

// TestFaultsAreHeld finds a test, or cases of TestREST, for each fault that docs/faults.md numbers.
func TestFaultsAreHeld(t *testing.T) {
	text, err := os.ReadFile("docs/faults.md")
	if err != nil {
		t.Fatal(err)
	}
	const faults = 51
	rows := regexp.MustCompile(`(?m)^\| (\d+) \| (.+) \| (.+) \|$`).FindAllStringSubmatch(
		string(text), -1)
	if len(rows) != faults {
		t.Fatalf("%d faults, want %d", len(rows), faults)
	}
	for i, row := range rows {
		if row[1] != fmt.Sprint(i+1) {
			t.Errorf("fault %s stands where %d should", row[1], i+1)
		}
		if !strings.Contains(row[3], "`Test") && !strings.Contains(row[3], "`testdata/rest/") {
			t.Errorf("nothing holds fault %s: %s", row[1], row[2])
		}
	}
}

// testFunction is how a test begins.
var testFunction = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)\w+)\(`)

// testNames are the tests of all files, whatever their build tags. They are read once.
var testNames = sync.OnceValues(func() (map[string]bool, error) {
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		return nil, err
	}
	names := map[string]bool{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		for _, found := range testFunction.FindAllStringSubmatch(string(text), -1) {
			names[found[1]] = true
		}
	}
	return names, nil
})

var (
	fileName    = regexp.MustCompile(`^[a-z_0-9/-]+\.(go|sql|txt|md|html)$`)
	testName    = regexp.MustCompile(`^(Test|Fuzz|Benchmark)\w+$`)
	settingName = regexp.MustCompile(`^[A-Z_]+$`)
	singleName  = regexp.MustCompile(`^[A-Za-z_]\w*$`)
	dottedName  = regexp.MustCompile(`^([A-Za-z_]\w*)\.([A-Za-z_]\w*)$`)
)

// knows says whether a name is one of something that exists. What is no name, such as a command or
// a request, is not looked up.
func (p checkedPackage) knows(t *testing.T, name string) bool {
	t.Helper()
	switch {
	case fileName.MatchString(name):
		_, err := os.Stat(name)
		return err == nil
	case testName.MatchString(name):
		tests, err := testNames()
		if err != nil {
			t.Fatal(err)
		}
		return tests[name]
	case settingName.MatchString(name):
		return strings.Contains(manual, name)
	case singleName.MatchString(name):
		return p.types.Scope().Lookup(name) != nil
	}
	parts := dottedName.FindStringSubmatch(name)
	if parts == nil {
		return true
	}
	owner := p.types.Scope().Lookup(parts[1])
	if owner == nil {
		table := regexp.MustCompile(fmt.Sprintf(`CREATE TABLE %s \([^;]*\n    %s `,
			parts[1], parts[2]))
		return table.MatchString(schemaSQL)
	}
	member, _, _ := types.LookupFieldOrMethod(owner.Type(), true, p.types, parts[2])
	return member != nil
}
