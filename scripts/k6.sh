#!/usr/bin/env bash
# k6.sh ARGUMENT...: k6, the machine's own or else built by Go (two minutes the first time).
set -euo pipefail
export K6_NO_USAGE_REPORT=true # a load test has no reason to call home
if command -v k6 >/dev/null; then exec k6 "$@"; fi
exec go run go.k6.io/k6@v1.8.1 "$@"
