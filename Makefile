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
GOVULNCHECK := go run golang.org/x/vuln/cmd/govulncheck@v1.9.0

# Throw-away services; durable ones where figures or crashes count (bench, growth, smoke).
WITH_SERVICES      := scripts/with-services.sh
WITH_FAST_SERVICES := HOP_PG_OPTS="-c fsync=off -c full_page_writes=off" scripts/with-services.sh

# All files, also those behind build tags; the tagged ones share helpers with the others.
TAGS := -tags bench,fault

.PHONY: help run stop build test check coverage load smoke bench growth fault promcheck fuzz lint vuln clean

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
	$(WITH_FAST_SERVICES) go test -race -timeout 20m -coverprofile=coverage.out ./...
	@$(MAKE) --no-print-directory coverage

check:
	go vet ./...
	go vet $(TAGS) ./...
	$(STATICCHECK) $(TAGS) ./...

coverage:
	@go tool cover -func=coverage.out | awk -v want=$(COVERAGE) '/^total:/ { got = $$3 + 0 } \
		END { printf "coverage %.1f %%, at least %s %% wanted\n", got, want; exit got < want }'

load: ## k6 at full load (3 min 30 s, up to 500 users) on a running, seeded hop at BASE_URL
	scripts/k6.sh run -e PROFILE=full -e BASE_URL=$(BASE_URL) loadtest.js

smoke: build ## seed, serve and 20 s of k6, on throw-away services
	$(WITH_SERVICES) scripts/smoke.sh

bench: ## the measurements in BENCHMARKS (tag bench), with wrk
	scripts/services.sh install wrk
	$(WITH_SERVICES) go test -tags bench -run '^TestBench' -v -timeout 60m .

growth: ## the measurements on large data sets
	scripts/services.sh install wrk
	$(WITH_SERVICES) go test -tags bench -run '^TestGrowth' -v -timeout 60m .

fault: ## the failure suite: it starts, stops and kills PostgreSQL, Redis and hop itself
	scripts/services.sh install
	COHERENCE_SECONDS=$${COHERENCE_SECONDS:-60} go test -tags fault -run '^TestFault' -v -timeout 60m .

promcheck: ## /metrics judged by Prometheus's own parser and linter (not in go.mod)
	PROMCHECK='cd scripts/promcheck && go run .' $(WITH_FAST_SERVICES) go test -count=1 -v -run '^TestMetricsValid$$' .

fuzz: ## every fuzz target for FUZZTIME
	$(WITH_FAST_SERVICES) sh -ec 'list=$$(go test -list "^Fuzz" .); for target in $$(echo "$$list" | grep ^Fuzz); do \
		go test -run "^$$" -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) .; done'

lint: check ## vet, staticcheck, actionlint
	$(ACTIONLINT)

vuln: ## known vulnerabilities in what we use (needs the network)
	$(GOVULNCHECK) ./...

clean: ## remove what was built, and the data of make run
	scripts/run.sh stop
	scripts/services.sh destroy .run
	rm -rf .run bin coverage.out
