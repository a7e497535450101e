#!/usr/bin/env bash
# smoke.sh: seeds, starts hop on a free port, has k6 load it for 20 s and ends it with SIGTERM,
# which must end in exit status 0. `make smoke` gives it the services and bin/hop.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly READY_SECONDS=30 # hop warms its cache before it is ready; the seeds take under a second

PORT=$(scripts/services.sh port)
export PORT BASE_URL=http://127.0.0.1:$PORT
export DATA_DIR=$WITH_SERVICES_DIR/data
log=$WITH_SERVICES_DIR/hop.log

fail() { tail -n 20 "$log" >&2; echo "smoke: $*" >&2; exit 1; }

bin/hop seed
bin/hop serve >"$log" 2>&1 &
hop=$!
trap 'kill "$hop" 2>/dev/null || true' EXIT

deadline=$((SECONDS + READY_SECONDS))
until bin/hop health >/dev/null 2>&1; do
  kill -0 "$hop" 2>/dev/null || fail "hop ended before it was ready"
  [ "$SECONDS" -lt "$deadline" ] || fail "hop was not ready in $READY_SECONDS s"
  sleep 0.2
done

scripts/k6.sh run --quiet -e PROFILE=smoke -e BASE_URL="$BASE_URL" loadtest.js ||
  fail "k6 found failures"

kill -TERM "$hop"
wait "$hop" || fail "hop did not end cleanly on SIGTERM"
echo "smoke: ok"
