package main

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// What stands around hop (deploy/, docs/operations.md) names its metrics, settings, paths and
// commands. These tests hold the names against hop.

// TestDeployMetrics compares the metrics that the alerts and the dashboard ask for with those that
// a hop with Redis and clicks exposes.
func TestDeployMetrics(t *testing.T) {
	a := startApp(t, "REDIS_URL="+testRedis(t))
	addLink(t, a, "https://example.com/", "link")
	follow(t, a, "/link", "https://example.com/")
	exposed := map[string]bool{}
	for series := range scrape(t, a.url) {
		name, _, _ := strings.Cut(series, "{")
		exposed[name] = true
	}
	metric := regexp.MustCompile(`\bhop_[a-z_]+`)
	others := []string{"hop_meta", "hop_restored", "hop_read_token"} // a table, a database, a file
	asked := map[string]bool{}
	for _, file := range []string{
		"deploy/prometheus/hop.rules.yml", "deploy/prometheus/hop.rules.test.yml",
		"deploy/grafana/hop.json", "docs/operations.md",
	} {
		names := metric.FindAllString(readText(t, file), -1)
		for _, name := range names {
			asked[name] = true
			if !exposed[name] && !slices.Contains(others, name) {
				t.Errorf("%s: there is no metric %s", file, name)
			}
		}
		if len(names) == 0 {
			t.Errorf("%s names no metric", file)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(exposed)) {
		if strings.HasPrefix(name, "hop_") && !asked[name] {
			t.Errorf("nothing shows or watches %s", name)
		}
	}
}

// TestDeployJSON reads the JSON files, and the dashboard as Grafana does: each panel has a number
// and something to show.
func TestDeployJSON(t *testing.T) {
	var board struct {
		Title  string
		Panels []struct {
			ID      int
			Type    string
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal([]byte(readText(t, "deploy/grafana/hop.json")), &board); err != nil {
		t.Fatal(err)
	}
	numbers := map[int]bool{}
	for _, p := range board.Panels {
		if p.ID == 0 || numbers[p.ID] || p.Title == "" {
			t.Errorf("panel %q has number %d", p.Title, p.ID)
		}
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %q shows nothing", p.Title)
		}
		numbers[p.ID] = true
	}
	var railway struct {
		Deploy struct{ StartCommand, HealthcheckPath string }
	}
	if err := json.Unmarshal([]byte(readText(t, "railway.json")), &railway); err != nil {
		t.Fatal(err)
	}
	if railway.Deploy.HealthcheckPath != "/health" || railway.Deploy.StartCommand != "/hop serve" {
		t.Errorf("railway.json: %+v", railway)
	}
}

// TestDeploySettings looks up every setting that the files name in hop's own.
func TestDeploySettings(t *testing.T) {
	known := map[string]bool{}
	_, err := loadConfig(func(name string) string {
		known[name] = true
		return ""
	})
	if err != nil {
		t.Fatal(err)
	}
	setting := regexp.MustCompile(`(?m)^\s*(?:Environment=|- )?([A-Z][A-Z_]+[A-Z])(?:=|: )`)
	for _, file := range []string{
		"deploy/hop.service", "deploy/hop.env", "deploy/kubernetes/hop.yaml", "docs/operations.md",
	} {
		for _, found := range setting.FindAllStringSubmatch(readText(t, file), -1) {
			if !known[found[1]] {
				t.Errorf("%s: hop has no setting %s", file, found[1])
			}
		}
	}
}

// TestComposeCluster holds what compose.cluster.yaml names against what it has: services, settings,
// the balancer's servers, and the hosts of URLs.
func TestComposeCluster(t *testing.T) {
	text := readText(t, "compose.cluster.yaml")
	shared, services, found := strings.Cut(text, "\nservices:\n")
	if !found || strings.Contains(text, "\t") {
		t.Fatal("no services, or tabs")
	}
	there := map[string]bool{}
	for _, service := range regexp.MustCompile(`(?m)^  ([a-z0-9-]+):`).
		FindAllStringSubmatch(services, -1) {

		there[service[1]] = true
	}
	named := regexp.MustCompile(`\b(hop|sentinel|redis)-\d+\b|@postgres\b`)
	for _, file := range []string{text, readText(t, "deploy/proxy/haproxy.cfg")} {
		for _, name := range named.FindAllString(file, -1) {
			if !there[strings.TrimPrefix(name, "@")] {
				t.Errorf("%s is named, and no service", name)
			}
		}
	}
	setting := regexp.MustCompile(`(?m)^    ([A-Z_]+): (.*)$`)
	settings := map[string]string{}
	for _, s := range setting.FindAllStringSubmatch(shared, -1) {
		settings[s[1]] = s[2]
	}
	asked := map[string]bool{}
	_, err := loadConfig(func(name string) string {
		asked[name] = true
		if strings.HasPrefix(settings[name], "$") {
			return "" // docker compose fills it in
		}
		return settings[name]
	})
	if err != nil {
		t.Error(err)
	}
	for name := range settings {
		if !asked[name] {
			t.Errorf("hop has no setting %s", name)
		}
	}
	if exec.Command("docker", "compose", "version").Run() != nil {
		t.Skip("SKIPPED the rest: no docker compose here")
	}
	out, err := exec.Command("docker", "compose", "-f", "compose.cluster.yaml", "config", "-q").
		CombinedOutput()
	if err != nil {
		t.Errorf("docker compose config: %v: %s", err, out)
	}
}

// TestUnitIsHardened asks systemd how exposed the service is: 10 is everything, 0 nothing.
func TestUnitIsHardened(t *testing.T) {
	bin, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("SKIPPED: no systemd here")
	}
	out, err := exec.Command(bin, "security", "--offline=true", "--threshold=20",
		"deploy/hop.service").CombinedOutput()
	if strings.Contains(string(out), "unrecognized option") {
		t.Skip("SKIPPED: this systemd cannot look at files")
	}
	if err != nil {
		t.Errorf("exposed at 2.0 or more: %v: %s", err, out)
	}
}

// TestScriptsAreExecutable: whoever clones the repository can run them.
func TestScriptsAreExecutable(t *testing.T) {
	scripts, err := filepath.Glob("scripts/*.sh")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("%v, %v", scripts, err)
	}
	for _, script := range scripts {
		info, err := os.Stat(script)
		if err != nil || info.Mode()&0o111 == 0 {
			t.Errorf("%s is not executable: %v", script, err)
		}
	}
}

// readText is a file of the repository.
func readText(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
