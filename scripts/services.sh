#!/usr/bin/env bash
# shellcheck disable=SC2174 # mkdir -m is meant for the last directory only
# services.sh: a private PostgreSQL and Redis for hop, so that `make run` and `make test` need
# nothing prepared and touch nothing that already runs on the machine.
#
#   services.sh install [TOOL...]         installs what is missing: postgresql, redis, wrk, gcc ...
#                                         (default: postgresql redis)
#   services.sh up DIR PGPORT REDISPORT   starts both, data under DIR; again: does nothing
#   services.sh env DIR                   prints `export DATABASE_URL=... REDIS_URL=...`
#   services.sh down DIR                  ends what `up DIR` started; the data stays
#   services.sh destroy DIR               down, and the data goes too
#   services.sh port                      prints a free port
#
# DATABASE_URL or REDIS_URL set in the environment: that service is used and none of ours is
# started. HOP_PG_OPTS adds options for the PostgreSQL server, such as "-c fsync=off" for a
# throw-away one.
#
# Both listen on 127.0.0.1 only and ask for no password (initdb --auth=trust): whoever can log in
# to this machine may use them. They are for development; production brings its own DATABASE_URL.
# No unix sockets: everything goes over loopback, and socket paths have a limit of some 100 bytes.
set -euo pipefail

# A locale that is not installed makes initdb refuse.
export LC_ALL=C
# PGHOST, PGOPTIONS ... of the user's own server must not lead our tools astray.
unset "${!PG@}"

# A first start on a slow disk; a normal one takes under a second.
readonly WAIT_SECONDS=60
# Then SIGKILL: PostgreSQL recovers from its log, Redis holds nothing of worth.
readonly STOP_SECONDS=20
# The tests run several hops at once, each with a pool of its own.
readonly PG_CONNECTIONS=200
# As in compose.yaml: a full cache evicts the least used, it never refuses.
readonly REDIS_MEMORY=256mb

say() { echo "services: $*"; }
die() { echo "services: $*" >&2; exit 1; }
is_root() { [ "$(id -u)" = 0 ]; }

# PostgreSQL refuses to run as root, and Redis need not, so as root both run as this user.
service_user() { if id postgres >/dev/null 2>&1; then echo postgres; else echo nobody; fi; }

as_service() {
  if ! is_root; then "$@"
  elif command -v runuser >/dev/null; then runuser -u "$(service_user)" -- "$@"
  else su -s /bin/sh "$(service_user)" -c "$(printf '%q ' "$@")"; fi
}

# ---- what is on the machine -------------------------------------------------------------------

# The directory with all the PostgreSQL programs we use: PATH, else Debian's newest, else
# Homebrew's.
pg_bin() {
  local dir
  for dir in "$(dirname "$(command -v initdb || echo /-/-)")" \
             $(find /usr/lib/postgresql -maxdepth 2 -name bin 2>/dev/null | sort -rV) \
             "$(brew --prefix postgresql@16 2>/dev/null)/bin"; do
    if [ -x "$dir/initdb" ] && [ -x "$dir/pg_ctl" ] &&
       [ -x "$dir/pg_isready" ] && [ -x "$dir/createdb" ]; then
      echo "$dir"; return
    fi
  done
  return 1
}

have() {
  case $1 in
    postgresql) pg_bin >/dev/null ;;
    redis)      command -v redis-server >/dev/null && command -v redis-cli >/dev/null ;;
    haproxy)    command -v haproxy >/dev/null || [ -x /usr/sbin/haproxy ] ;; # not on users' PATH
    *)          command -v "$1" >/dev/null ;;
  esac
}

# Installing a Debian package starts its service and has it start at boot. We only want the
# programs: policy-rc.d (exit 101 = "don't") stops the first, update-rc.d undoes the second.
# Runs as root, for packages that were missing before, so nobody else's service is switched off.
# shellcheck disable=SC2016 # expanded by the inner shell
readonly APT_INSTALL='
  set -e
  export DEBIAN_FRONTEND=noninteractive
  policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    trap "rm -f $policy" EXIT
    printf "#!/bin/sh\nexit 101\n" >$policy
    chmod 755 $policy
  fi
  apt-get update -qq -o Acquire::Retries=5
  apt-get install -y -qq -o Acquire::Retries=5 --no-install-recommends "$@"
  for package in "$@"; do
    if [ -e "/etc/init.d/$package" ]; then update-rc.d "$package" disable || true; fi
  done'

install() {
  local tool packages="" missing="" log status=0
  for tool in "$@"; do
    have "$tool" && continue
    missing="$missing $tool"
    case $tool in
      redis) packages="$packages redis-server" ;;
      gcc)   packages="$packages gcc libc6-dev" ;; # go test -race needs a C compiler
      *)     packages="$packages $tool" ;;
    esac
  done
  [ -n "$missing" ] || return 0
  say "installing$missing"
  log=$(mktemp)
  # shellcheck disable=SC2086 # the packages are words
  if command -v apt-get >/dev/null && is_root; then
    sh -c "$APT_INSTALL" apt $packages >"$log" 2>&1 || status=$?
  elif command -v apt-get >/dev/null && command -v sudo >/dev/null; then
    # shellcheck disable=SC2024 # the log is ours
    sudo sh -c "$APT_INSTALL" apt $packages >"$log" 2>&1 || status=$?
  elif command -v brew >/dev/null; then
    # Homebrew starts nothing by itself.
    brew install ${missing/postgresql/postgresql@16} >"$log" 2>&1 || status=$?
  else
    echo "neither apt-get (as root or with sudo) nor brew can be used here" >"$log"
    status=1
  fi
  [ "$status" = 0 ] || { tail -n 5 "$log" >&2; say "could not install$missing" >&2; }
  rm -f "$log"
  return "$status"
}

# ---- ports, processes -------------------------------------------------------------------------

port_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Below 32768, where Linux begins to hand out ports to outgoing connections.
free_port() {
  local port
  while port=$((20000 + RANDOM % 12000)); port_taken "$port"; do :; done
  echo "$port"
}

must_be_free() { # PORT VARIABLE
  ! port_taken "$1" ||
    die "port $1 is taken by another program:" \
      "choose another with $2, as in \`make run $2=$(free_port)\`"
}

wait_until() { # COMMAND... ; polls, and gives up after WAIT_SECONDS
  local deadline=$((SECONDS + WAIT_SECONDS))
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$deadline" ] || return 1
    sleep 0.1
  done
}

# Prints the pid in the file if that process runs in DIR: both servers make their data directory
# their working directory. A pid file left by a crash may name a stranger's process by now; it
# never passes, so it is never signalled. (As the service user too: root in a container may not
# look.)
running_in() { # PIDFILE DIR
  local pid cwd
  pid=$(head -n 1 "$1" 2>/dev/null) && [ -n "$pid" ] || return 1
  if [ -d /proc/self ]; then
    cwd=$(readlink "/proc/$pid/cwd" 2>/dev/null ||
      as_service readlink "/proc/$pid/cwd" 2>/dev/null) || return 1
  else
    cwd=$(lsof -a -p "$pid" -d cwd -Fn 2>/dev/null | sed -n 's/^n//p')
  fi
  [ "$cwd" = "$2" ] && echo "$pid"
}

stop() { # NAME PIDFILE DIR SIGNAL
  local pid deadline=$((SECONDS + STOP_SECONDS))
  pid=$(running_in "$2" "$3") || return 0
  kill -s "$4" "$pid" 2>/dev/null || true
  kill -s CONT "$pid" 2>/dev/null || true # a stopped process (kill -STOP) would never see it
  while running_in "$2" "$3" >/dev/null; do
    if [ "$SECONDS" -ge "$deadline" ]; then
      kill -s KILL "$pid" 2>/dev/null || true
      deadline=$((SECONDS + STOP_SECONDS))
    fi
    sleep 0.1
  done
  say "$1 stopped"
}

# ---- where the data is ------------------------------------------------------------------------

# Sets DIR (absolute) and DATA: DIR itself, or, where the service user cannot enter it (a clone
# under /root), a directory under /var/tmp named after it. DIR/home remembers which.
locate() {
  mkdir -p -m 711 "$1"
  DIR=$(cd "$1" && pwd -P)
  cd / # the service user may not be allowed where we stand
  ID=hop-$(printf %s "$DIR" | cksum | cut -d ' ' -f 1)
  DATA=$DIR
  if [ -s "$DIR/home" ]; then DATA=$(cat "$DIR/home")
  elif is_root && ! as_service test -x "$DIR"; then DATA=/var/tmp/$ID; fi
}

make_home() {
  [ "$DATA" != "$DIR" ] || return 0
  say "$(service_user) cannot enter $DIR: the data is in $DATA"
  mkdir -p -m 711 "$DATA"
  [ -O "$DATA" ] || die "$DATA belongs to somebody else" # /var/tmp is open to all
  echo "$DATA" >"$DIR/home"
}

own_dir() { # DIR: a directory only the service user can read
  mkdir -p -m 700 "$1"
  ! is_root || chown "$(service_user)" "$1"
}

# ---- Docker, where nothing can be installed ---------------------------------------------------

docker_up() { # SERVICE PORT INNERPORT [OPTION...] IMAGE [ARGUMENT...]
  local name=$ID-$1 port_file=$DATA/$1.port port=$2 inner=$3
  shift 3
  docker info >/dev/null 2>&1 ||
    die "no way to get it: no package manager usable, no Docker engine running"
  touch "$DATA/docker"
  [ "$(docker inspect -f '{{.State.Running}}' "$name" 2>/dev/null)" != true ] || return 0
  docker run -d --rm --name "$name" -p "127.0.0.1:$port:$inner" "$@" >/dev/null
  echo "$port" >"$port_file"
}

docker_down() {
  [ -e "$DATA/docker" ] || return 0
  docker stop "$ID-pg" "$ID-redis" >/dev/null 2>&1 || true
}

# ---- the two services -------------------------------------------------------------------------

up_postgres() { # PORT
  local pg=$DATA/pg log=$DATA/pg/server.log port bin options
  [ -z "${DATABASE_URL:-}" ] || { say "PostgreSQL: yours, as DATABASE_URL says"; return; }
  if port=$(cat "$DATA/pg.port" 2>/dev/null) &&
     running_in "$pg/postmaster.pid" "$pg" >/dev/null; then
    say "PostgreSQL is up on 127.0.0.1:$port"; return
  fi
  if ! install postgresql; then
    docker_up pg "$1" 5432 -v "$ID:/var/lib/postgresql/data" -e POSTGRES_USER=hop \
      -e POSTGRES_HOST_AUTH_METHOD=trust postgres:16 -c max_connections=$PG_CONNECTIONS
    # Over TCP: while it initialises, the image runs a server that answers on its socket only.
    wait_until docker exec "$ID-pg" pg_isready -q -h 127.0.0.1 -U hop -d hop ||
      die "PostgreSQL: see docker logs $ID-pg"
    say "PostgreSQL is up in Docker on 127.0.0.1:$(cat "$DATA/pg.port")"; return
  fi
  must_be_free "$1" PG_PORT
  bin=$(pg_bin)
  own_dir "$pg"
  [ -s "$pg/PG_VERSION" ] ||
    as_service "$bin/initdb" -D "$pg" -U hop --auth=trust -E UTF8 --no-locale >/dev/null ||
    die "initdb failed in $pg"
  # We are not running, as seen above. A pid file left by a crash is PostgreSQL's to judge (some of
  # its processes may still be ending), unless that pid is a stranger's now: then it would refuse.
  if ps -p "$(head -n 1 "$pg/postmaster.pid" 2>/dev/null || echo 0)" >/dev/null 2>&1; then
    rm -f "$pg/postmaster.pid"
  fi
  options="-p $1 -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
  options="$options -c max_connections=$PG_CONNECTIONS ${HOP_PG_OPTS:-}"
  as_service "$bin/pg_ctl" -D "$pg" -l "$log" -t "$WAIT_SECONDS" -w start \
    -o "$options" >/dev/null ||
    { tail -n 5 "$log" >&2 || true; die "PostgreSQL did not start: $log"; }
  wait_until "$bin/pg_isready" -q -h 127.0.0.1 -p "$1" || die "PostgreSQL does not answer: $log"
  # An error here is a database that exists, or the next command's to report.
  "$bin/createdb" -h 127.0.0.1 -p "$1" -U hop -w hop 2>/dev/null || true
  echo "$1" >"$DATA/pg.port"
  say "PostgreSQL started on 127.0.0.1:$1"
}

up_redis() { # PORT
  local redis=$DATA/redis port
  local policy="--maxmemory $REDIS_MEMORY --maxmemory-policy allkeys-lru"
  [ -z "${REDIS_URL:-}" ] || { say "Redis: yours, as REDIS_URL says"; return; }
  if port=$(cat "$DATA/redis.port" 2>/dev/null) &&
     running_in "$redis/redis.pid" "$redis" >/dev/null; then
    say "Redis is up on 127.0.0.1:$port"; return
  fi
  # A cache, so nothing is saved: hop fills it from PostgreSQL at start.
  # shellcheck disable=SC2086 # a list of words
  if install redis; then
    must_be_free "$1" REDIS_PORT
    own_dir "$redis"
    as_service redis-server --bind 127.0.0.1 --port "$1" --dir "$redis" \
      --pidfile "$redis/redis.pid" --logfile "$redis/server.log" \
      --daemonize yes --save "" --appendonly no $policy >/dev/null
    wait_until redis-cli -h 127.0.0.1 -p "$1" ping || die "Redis does not answer: $redis/server.log"
    echo "$1" >"$DATA/redis.port"
    say "Redis started on 127.0.0.1:$1"
  else
    docker_up redis "$1" 6379 redis:7 redis-server --save "" --appendonly no $policy
    wait_until docker exec "$ID-redis" redis-cli ping || die "Redis: see docker logs $ID-redis"
    say "Redis is up in Docker on 127.0.0.1:$(cat "$DATA/redis.port")"
  fi
}

print_env() {
  local pg redis
  pg=$(cat "$DATA/pg.port" 2>/dev/null) || [ -n "${DATABASE_URL:-}" ] ||
    die "no PostgreSQL under $DIR: run \`services.sh up\` first"
  redis=$(cat "$DATA/redis.port" 2>/dev/null) || [ -n "${REDIS_URL:-}" ] ||
    die "no Redis under $DIR: run \`services.sh up\` first"
  printf 'export DATABASE_URL=%q REDIS_URL=%q\n' \
    "${DATABASE_URL:-postgres://hop@127.0.0.1:$pg/hop?sslmode=disable}" \
    "${REDIS_URL:-redis://127.0.0.1:$redis/0}"
}

down() {
  stop Redis "$DATA/redis/redis.pid" "$DATA/redis" TERM
  # INT is "fast": it ends sessions and writes a checkpoint.
  stop PostgreSQL "$DATA/pg/postmaster.pid" "$DATA/pg" INT
  docker_down
}

destroy() {
  down
  [ ! -e "$DATA/docker" ] || docker volume rm "$ID" >/dev/null 2>&1 || true
  rm -rf "$DATA/pg" "$DATA/redis"
  rm -f "$DATA/pg.port" "$DATA/redis.port" "$DATA/docker" "$DIR/home"
  [ "$DATA" = "$DIR" ] || rmdir "$DATA" 2>/dev/null || true
}

usage() { sed -n '3,/^set /{ /^set /d; s/^# \{0,1\}//p; }' "$0"; exit 2; }

case "${1:-}:$#" in
  install:1) install postgresql redis ;;
  install:*) shift; install "$@" ;;
  up:4)      locate "$2"; make_home; up_postgres "$3"; up_redis "$4" ;;
  env:2)     locate "$2"; print_env ;;
  down:2)    locate "$2"; down ;;
  destroy:2) locate "$2"; destroy ;;
  port:1)    free_port ;;
  *)         usage ;;
esac
