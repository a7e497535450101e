#!/usr/bin/env bash
# run.sh start|stop: `make run` and `make stop`. start brings up the services under .run/, seeds a
# new database and becomes hop, in the foreground; ctrl-C ends hop and leaves the services up.
# stop ends that hop, if it still runs, and the services.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly STOP_SECONDS=20 # hop drains 2 s, then gives requests 10 s
root=$(pwd -P)
pid_file=.run/hop.pid
export PORT=${PORT:-8080}

# The pid of the hop we started; a pid file left behind names some other program by now.
hop_pid() {
  local pid
  pid=$(cat "$pid_file" 2>/dev/null) || return 1
  [ "$(ps -ww -o args= -p "$pid" 2>/dev/null)" = "$root/bin/hop serve" ] && echo "$pid"
}

start() {
  local seeded code url=http://localhost:$PORT
  if hop_pid >/dev/null; then
    echo "hop runs already (pid $(hop_pid)): make stop ends it" >&2
    exit 1
  fi
  mkdir -p .run
  scripts/services.sh up .run "${PG_PORT:-54329}" "${REDIS_PORT:-63799}"
  eval "$(scripts/services.sh env .run)"
  export DATA_DIR=${DATA_DIR:-.run/data} # the click journal belongs to this database

  # Once per database: seeding again is harmless, but would bring back what was deleted since.
  seeded=.run/seeded-$(printf %s "$DATABASE_URL" | cksum | cut -d ' ' -f 1)
  if [ ! -e "$seeded" ]; then bin/hop seed && touch "$seeded"; fi

  code=$(grep -m 1 ',True,' seeds/urls.csv | cut -d , -f 3)
  cat <<TRY

hop is at $url. To try in another terminal (make stop ends everything):

  curl -i $url/$code
  curl -s -H 'Content-Type: application/json' \
-d '{"original_url":"https://go.dev/doc/"}' $url/shorten
  curl -s $url/stats/$code
  curl -s $url/health

TRY
  echo $$ >"$pid_file" # exec keeps the pid
  exec "$root/bin/hop" serve
}

stop() {
  local pid deadline=$((SECONDS + STOP_SECONDS))
  if pid=$(hop_pid); then
    kill -TERM "$pid"
    while hop_pid >/dev/null; do
      [ "$SECONDS" -lt "$deadline" ] || { kill -KILL "$pid"; break; }
      sleep 0.1
    done
    echo "hop stopped"
  fi
  rm -f "$pid_file"
  scripts/services.sh down .run
}

case ${1:-} in
  start|stop) "$1" ;;
  *) echo "usage: $0 start|stop" >&2; exit 2 ;;
esac
