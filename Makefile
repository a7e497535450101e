# The project's commands: `make help`. CI runs the same ones. Each brings what it needs; set
# DATABASE_URL or REDIS_URL and that service is used instead of one of our own.

# Not PostgreSQL's and Redis's own ports, so that servers on the machine are left alone.
export PG_PORT    ?= 54329
export REDIS_PORT ?= 63799

BASE_URL ?= http://localhost:8080
COVERAGE ?= 80
FUZZTIME ?= 10s

# Pinned, outside go.mod: hop itself depends on two drivers and nothing else.
STATICCHECK := go run honnef.co/go/tools/cmd/staticcheck@v0.8.2
ACTIONLINT  := go run github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
GOTESTSUM   := go run gotest.tools/gotestsum@v1.13.0
GOVULNCHECK := go run golang.org/x/vuln/cmd/govulncheck@v1.9.0

# The tests kill servers and look at the clock, on machines that others use too: one that fails runs
# again, alone, and what every run said is printed. Three failures are a fault, and so is a data race.
RERUN := --rerun-fails=2 --rerun-fails-run-root-test --rerun-fails-abort-on-data-race

# Throw-away services; durable ones where figures or crashes count (bench, growth, smoke).
WITH_SERVICES      := scripts/with-services.sh
WITH_FAST_SERVICES := HOP_PG_OPTS="-c fsync=off -c full_page_writes=off" scripts/with-services.sh

# All files, also those behind build tags; the tagged ones share helpers with the others.
TAGS := -tags fault,cluster

.PHONY: help run stop build test check width coverage load smoke bench growth fault cluster engines \
	promcheck apidoc browser opsdoc fuzz lint vuln clean

help: ## print this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: build ## PostgreSQL, Redis, seeds and hop on :8080; the data stays for the next time
	@scripts/run.sh start

stop: ## end what make run started
	@scripts/run.sh stop

build: ## bin/hop
	go build -trimpath -o bin/hop .

test: check ## vet, staticcheck, all tests with the race detector, coverage of at least COVERAGE %
	scripts/services.sh install postgresql redis gcc
	@rm -rf .cover && mkdir .cover
	$(WITH_FAST_SERVICES) $(GOTESTSUM) --format standard-quiet $(RERUN) --packages ./... \
		-- -race -timeout 35m -cover -args "-test.gocoverdir=$(CURDIR)/.cover"
	@$(MAKE) --no-print-directory coverage

check: width
	go vet ./...
	go vet $(TAGS) ./...
	$(STATICCHECK) $(TAGS) ./...

# A line that is wider than 100 columns is two thoughts.
width:
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo "run gofmt on these"; exit 1; }
	@! git ls-files '*.go' '*.sql' '*.html' '*.css' 'testdata/rest/*' \
		| LC_ALL=C.UTF-8 xargs grep -nE '^.{101,}' || { echo "wider than 100 columns"; exit 1; }

coverage:
	@go tool covdata textfmt -i=.cover -o=coverage.out
	@go tool cover -func=coverage.out | awk -v want=$(COVERAGE) '/^total:/ { got = $$3 + 0 } \
		END { printf "coverage %.1f %%, at least %s %% wanted\n", got, want; exit got < want }'

load: ## k6 at full load (3 min 30 s, up to 500 users) on a running, seeded hop at BASE_URL
	scripts/k6.sh run -e PROFILE=full -e BASE_URL=$(BASE_URL) loadtest.js

smoke: build ## seed, serve and 20 s of k6, on throw-away services
	$(WITH_SERVICES) scripts/smoke.sh

bench: ## the measurements in BENCHMARKS, with wrk; BENCH_OLD=COMMIT runs an older hop beside it
	scripts/services.sh install wrk
	$(WITH_SERVICES) go run ./bench/compare redirects counted open creates

growth: ## the measurements on large data sets
	scripts/services.sh install wrk
	$(WITH_SERVICES) go run ./bench/compare growth flood

fault: ## the failure suite: it starts, stops and kills PostgreSQL, Redis and hop itself
	scripts/services.sh install
	CI=true COHERENCE_SECONDS=$${COHERENCE_SECONDS:-60} $(WITH_FAST_SERVICES) \
		go test -tags fault -count=1 -run '^(TestFault|TestRollingUpgrade|TestBackup)' -v -timeout 90m .

cluster: ## failovers, a balancer, several hops; CLUSTER=short takes a minute
	scripts/services.sh install postgresql redis haproxy
	go test -tags cluster -count=1 -run '^TestCluster' -v -timeout 30m .

promcheck: ## /metrics and the alert rules judged by Prometheus's own parser, linter and promtool
	scripts/promrules.sh
	PROMCHECK='cd scripts/promcheck && go run .' $(WITH_FAST_SERVICES) go test -count=1 -v -run '^TestMetricsValid$$' .

apidoc: ## openapi.json judged by Redocly and Spectral, and live answers by a validator (npm)
	$(WITH_FAST_SERVICES) scripts/apidoc.sh

browser: build ## the pages in a real Chromium, with axe (npm and Debian's chromium)
	$(WITH_FAST_SERVICES) scripts/browser.sh

opsdoc: ## docs/operations.md run line by line as root, in an overlay of which nothing stays
	scripts/opsdoc.sh --overlay

engines: ## hop on PgBouncer, PostgreSQL 14 to 18, other Redis (apt, npm); ENGINES_SHORT=1 takes 5 minutes
	scripts/engines.sh test

fuzz: ## every fuzz target for FUZZTIME
	$(WITH_FAST_SERVICES) sh -ec 'list=$$(go test -list "^Fuzz" .); for target in $$(echo "$$list" | grep ^Fuzz); do \
		go test -run "^$$" -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) .; done'

lint: check ## vet, staticcheck, width, actionlint
	$(ACTIONLINT)

vuln: ## known vulnerabilities in what we use (needs the network)
	$(GOVULNCHECK) ./...

clean: ## remove what was built, and the data of make run
	scripts/run.sh stop
	scripts/services.sh destroy .run
	rm -rf .run bin .cover coverage.out
