#!/usr/bin/env bash
# browser.sh: hop's pages in a real Chromium, with bin/hop and an empty database: `make browser`
# gives it both. Chromium comes from Debian, what drives it from npm, pinned in scripts/browser.
# Screenshots of every page are left in OUT, by default .run/browser.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=scripts/browser

readonly READY_SECONDS=30

OUT=${OUT:-$PWD/.run/browser}
mkdir -p "$OUT"
scripts/services.sh install chromium
if ! (cd "$tools" && npm ls --silent >/dev/null 2>&1); then
  # --ignore-scripts: nothing that a package brings runs before we run it.
  npm ci --prefix "$tools" --ignore-scripts --no-audit --no-fund
fi

API_TOKEN=0123456789abcdef0123456789abcdef
PSQL=$(command -v psql || find /usr/lib/postgresql -name psql | sort -rV | head -n 1)
hops=()
trap '[ ${#hops[@]} = 0 ] || kill "${hops[@]}" 2>/dev/null || true' EXIT

start_hop() { # NAME [SETTING...]: starts one on a free port and waits; its address is in ADDRESS
  local name=$1 port deadline=$((SECONDS + READY_SECONDS))
  shift
  port=$(scripts/services.sh port)
  ADDRESS=http://localhost:$port
  env PORT="$port" BASE_URL="$ADDRESS" ALLOW_PRIVATE=1 DATA_DIR="$WITH_SERVICES_DIR/$name" "$@" \
    bin/hop serve >"$OUT/$name.log" 2>&1 &
  hops+=($!)
  until PORT=$port bin/hop health >/dev/null 2>&1; do
    if [ "$SECONDS" -ge "$deadline" ]; then
      tail -n 20 "$OUT/$name.log" >&2
      exit 1
    fi
    sleep 0.2
  done
}

start_hop open
OPEN=$ADDRESS
start_hop closed API_TOKEN="$API_TOKEN"
CLOSED=$ADDRESS
export OPEN CLOSED API_TOKEN PSQL OUT
node "$tools/browser.js"
