#!/usr/bin/env bash
# with-services.sh COMMAND...: runs a command with a throw-away PostgreSQL and Redis (DATABASE_URL
# and REDIS_URL exported), and takes both away however it ends: done, failed, ctrl-C or SIGTERM.
# WITH_SERVICES_DIR is its scratch directory, for whatever else should go away afterwards.
# As with services.sh, a DATABASE_URL or REDIS_URL already set is used instead.
set -euo pipefail
services="$(cd "$(dirname "$0")" && pwd)/services.sh"
[ $# -gt 0 ] || { echo "usage: $0 COMMAND..." >&2; exit 2; }

readonly TRIES=3 # a port that was free may be taken by the time the server starts

dir=$(mktemp -d "${TMPDIR:-/tmp}/hop-XXXXXX")
chmod 711 "$dir" # as root the servers run as another user, who must get in
child=

cleanup() {
  trap '' INT TERM HUP
  "$services" destroy "$dir" >&2 || true
  rm -rf "$dir"
}
# The command has a process group of its own (set -m), so that ending it ends its children too,
# such as the test binary under `go test`. A second signal ends it the hard way.
ended_by() { # STATUS
  trap '[ -z "$child" ] || kill -KILL -- "-$child" 2>/dev/null' INT TERM HUP
  if [ -n "$child" ]; then
    kill -TERM -- "-$child" 2>/dev/null || true
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  fi
  exit "$1"
}
trap cleanup EXIT
trap 'ended_by 130' INT
trap 'ended_by 143' TERM HUP

try=1
until "$services" up "$dir" "$("$services" port)" "$("$services" port)" >&2; do
  [ "$try" -lt "$TRIES" ] || exit 1
  try=$((try + 1))
done
eval "$("$services" env "$dir")"
export WITH_SERVICES_DIR=$dir

set -m
"$@" </dev/null &
child=$!
status=0
wait "$child" || status=$?
child=
exit "$status"
