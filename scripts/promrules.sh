#!/usr/bin/env bash
# promrules.sh: has Prometheus's promtool check the alert rules and run their tests. On Debian and
# Ubuntu a missing promtool is taken out of the package prometheus, which is not installed.
set -euo pipefail
cd "$(dirname "$0")/../deploy/prometheus"

promtool=$(command -v promtool || true)
if [ -z "$promtool" ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  fetch() { apt-get download -qq -o APT::Sandbox::User="$(id -un)" prometheus; }
  (cd "$scratch" && { fetch || { apt-get update -qq && fetch; }; })
  dpkg -x "$scratch"/prometheus_*.deb "$scratch/root"
  promtool=$scratch/root/usr/bin/promtool
fi
"$promtool" check rules hop.rules.yml
"$promtool" test rules hop.rules.test.yml
