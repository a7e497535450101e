#!/usr/bin/env bash
# engines.sh: hop on other engines than the one it was built on: engines_test.go, with what that
# needs. PgBouncer and every Redis that this machine's Debian or Ubuntu has come from apt, the
# servers of PostgreSQL 14 to 18 from npm, pinned in scripts/engines.
#
#   engines.sh install         installs them
#   engines.sh test [FLAG...]  installs them and runs the tests
#
# The servers lie in HOP_ENGINES, by default a directory under /var/tmp: PostgreSQL does not run as
# root, and the account that it runs as cannot enter a clone under /root.
set -euo pipefail
cd "$(dirname "$0")/.."

export HOP_ENGINES=${HOP_ENGINES:-/var/tmp/hop-engines-$(id -u)}

# Servers that speak Redis's protocol, as Debian and Ubuntu call them. Not every release has each.
readonly LIKE_REDIS="valkey-server keydb-server"

install() {
  scripts/services.sh install postgresql redis pgbouncer
  for package in $LIKE_REDIS; do
    if apt-cache show "$package" >/dev/null 2>&1; then scripts/services.sh install "$package"; fi
  done
  if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
    echo "engines: no PostgreSQL 14 to 18 for this kind of machine"
    return
  fi
  command -v npm >/dev/null || scripts/services.sh install npm
  mkdir -p "$HOP_ENGINES"
  if [ ! -O "$HOP_ENGINES" ]; then # /var/tmp is open to all
    echo "engines: $HOP_ENGINES belongs to somebody else" >&2
    exit 1
  fi
  if cmp -s scripts/engines/package-lock.json "$HOP_ENGINES/installed"; then return; fi
  cp scripts/engines/package.json scripts/engines/package-lock.json "$HOP_ENGINES"
  # --ignore-scripts: nothing that a package brings runs before we run it.
  npm ci --prefix "$HOP_ENGINES" --ignore-scripts --no-audit --no-fund
  for package in "$HOP_ENGINES"/node_modules/postgresql-*; do
    # npm's archives hold no links. This makes those of the libraries.
    (cd "$package" && node scripts/hydrate-symlinks.js)
  done
  chmod -R a+rX "$HOP_ENGINES"
  cp scripts/engines/package-lock.json "$HOP_ENGINES/installed"
}

case "${1:-}" in
  install) install ;;
  test)
    shift
    install
    go test -tags cluster -run '^TestEngine' -count=1 -v -timeout 60m "$@" .
    ;;
  *) sed -n '2,/^set /{ /^set /d; s/^# \{0,1\}//p; }' "$0"; exit 2 ;;
esac
