#!/usr/bin/env bash
# release.sh TAG DIR: what a release consists of. For each architecture an archive with the static
# binary, deploy/ and the documents, and SHA256SUMS of all. Two runs on one commit give the same
# bytes: nothing in them is of the machine or the moment.
set -euo pipefail
[ $# = 2 ] || { echo "usage: $0 TAG DIR" >&2; exit 2; }
tag=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."

moment=$(git log -1 --format=%ct)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

for arch in amd64 arm64; do
  name=hop-$tag-linux-$arch
  mkdir "$scratch/$name"
  CGO_ENABLED=0 GOOS=linux GOARCH=$arch GOFLAGS='' go build -trimpath \
    -ldflags "-s -w -X main.release=$tag" -o "$scratch/$name/hop" .
  cp -r LICENSE README.md RELIABILITY.md BENCHMARKS.md docs deploy "$scratch/$name/"
  # Owners, modes and times that are the same everywhere; gzip -n leaves out the time.
  tar --directory "$scratch" --sort=name --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
    --mtime="@$moment" -cf - "$name" | gzip -n -9 >"$out/$name.tar.gz"
done
cd "$out"
sha256sum hop-"$tag"-linux-*.tar.gz >SHA256SUMS
cat SHA256SUMS
