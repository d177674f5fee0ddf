#!/usr/bin/env bash
# Format, lint and types: ruff format, ruff check, mypy on the package. `bash scripts/check.sh --fix` mends what ruff can.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
command -v ruff >/dev/null 2>&1 || { echo "check: ruff is not installed; run bash scripts/setup.sh" >&2; exit 2; }

case "${1:-}" in
    "") ;;
    -h|--help) sed -n '2s/^# //p' scripts/check.sh; exit 0 ;;
    --fix) ruff format . && ruff check --fix . ;;
    *) echo "check: unknown option '$1'; known: --fix" >&2; exit 2 ;;
esac
status=0
echo "== ruff format"; ruff format --check . || status=1
echo "== ruff check"; ruff check . || status=1
echo "== mypy"; mypy || status=1
exit "$status"
