#!/usr/bin/env bash
# apidoc.sh: is openapi.json good OpenAPI, and is every answer as it says? Redocly's and Spectral's
# recommended rules must find nothing in it; then the REST cases run, and ajv compares what they
# were answered with the document. All three come from npm, pinned in scripts/apidoc. The REST cases
# need PostgreSQL and Redis: DATABASE_URL and REDIS_URL, or run this under with-services.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=scripts/apidoc

# No figures of ours to the makers of the tools, and no word on newer versions.
export REDOCLY_TELEMETRY=off REDOCLY_SUPPRESS_UPDATE_NOTICE=true

if ! (cd "$tools" && npm ls --silent >/dev/null 2>&1); then
  # --ignore-scripts: nothing that a package brings runs before we run it.
  npm ci --prefix "$tools" --ignore-scripts --no-audit --no-fund
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# It ends with success when all it finds are warnings, so they are counted here.
"$tools/node_modules/.bin/redocly" lint --config "$tools/redocly.yaml" --format json \
  openapi.json >"$scratch/redocly.json" 2>"$scratch/redocly.log" || true
if ! grep -q '"errors": 0' "$scratch/redocly.json" ||
  ! grep -q '"warnings": 0' "$scratch/redocly.json"; then
  cat "$scratch/redocly.json" "$scratch/redocly.log" >&2
  exit 1
fi
echo "Redocly: nothing found"

"$tools/node_modules/.bin/spectral" lint --ruleset "$tools/spectral.json" --fail-severity hint \
  openapi.json >"$scratch/spectral.log" || { cat "$scratch/spectral.log" >&2; exit 1; }
echo "Spectral: nothing found"

REST_RECORD=$scratch/answers.jsonl go test -count=1 -run '^TestREST$' .
node "$tools/answers.js" openapi.json "$scratch/answers.jsonl"
