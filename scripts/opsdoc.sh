#!/usr/bin/env bash
# opsdoc.sh: runs the blocks of docs/operations.md that are marked `sh run`, from top to bottom in
# one shell, as a new operator would, and fails with the first command that does. It needs root, and
# installs and changes what the document says: for a machine of its own, or, with --overlay, on top
# of this one in a throw-away overlay, of which nothing stays.
#
# Where systemd does not run (in containers), a stand-in for systemctl starts and stops what the
# document asks for, hop with the settings and credentials of its unit.
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "opsdoc: needs root" >&2; exit 1; }
here=$(cd "$(dirname "$0")/.." && pwd)

if [ "${1:-}" = --overlay ]; then
  lower=$(mktemp -d)
  # Processes started inside end with the pid namespace.
  unshare --mount --pid --fork --kill-child bash -euc '
    mount -t tmpfs tmpfs "$1"
    mkdir "$1/upper" "$1/work" "$1/root"
    mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
    mount --rbind /dev "$1/root/dev"
    mount -t proc proc "$1/root/proc"
    mount -t tmpfs tmpfs "$1/root/tmp"
    mkdir -p "$1/root/$2"
    mount --rbind "$2" "$1/root/$2"
    chroot "$1/root" env PATH="$PATH" "$2/scripts/opsdoc.sh"' - "$lower" "$here"
  rmdir "$lower"
  exit
fi

# What a release's archive holds.
archive=$(mktemp -d)
chmod 755 "$archive" # PostgreSQL's own programs run as another user
trap 'rm -rf "$archive"' EXIT
cd "$here"
CGO_ENABLED=0 go build -trimpath -buildvcs=false \
  -ldflags "-s -w -X main.release=v0.0.0-opsdoc" -o "$archive/hop" .
cp -r deploy docs "$archive/"
awk '/^```sh run$/ { on = 1; print "echo \"opsdoc: line " NR "\" >&2"; next }
  /^```$/ { on = 0 }
  on' \
  docs/operations.md >"$archive/blocks.sh"

if [ ! -d /run/systemd/system ]; then
  mkdir "$archive/bin"
  cat >"$archive/bin/systemctl" <<'STANDIN'
#!/usr/bin/env bash
# A stand-in for systemctl where systemd does not run.
set -euo pipefail
action=$1
shift
[ "${1:-}" != --now ] || { now=yes; shift; }
stop_hop() {
  [ -s /run/hop.pid ] || return 0
  kill "$(cat /run/hop.pid)" 2>/dev/null || true
  while kill -0 "$(cat /run/hop.pid)" 2>/dev/null; do sleep 0.1; done
}
start_hop() {
  mkdir -p -m 700 /var/lib/hop
  (
    umask 077
    set -a
    . /etc/hop/hop.env
    DATA_DIR=/var/lib/hop
    DATABASE_URL_FILE=/etc/hop/database_url
    API_TOKEN_FILE=/etc/hop/api_token
    READ_TOKEN_FILE=/etc/hop/read_token
    exec setsid /usr/local/bin/hop serve >>/var/log/hop.log 2>&1 </dev/null
  ) &
  echo $! >/run/hop.pid
}
for unit in "$@"; do
  case $action:$unit in
    enable:hop) [ -z "${now:-}" ] || start_hop ;;
    restart:hop) stop_hop; start_hop ;;
    enable:*) [ -z "${now:-}" ] || service "$unit" start ;;
    restart:*) service "$unit" restart ;;
  esac
done
STANDIN
  chmod 755 "$archive/bin/systemctl"
  export PATH="$archive/bin:$PATH"
  echo "opsdoc: no systemd here, a stand-in starts the services"
fi
cd "$archive"
DEBIAN_FRONTEND=noninteractive bash -euo pipefail blocks.sh
echo "opsdoc: every command ran"
