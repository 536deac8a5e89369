#!/bin/bash
# Installs the repository from a wheelhouse, with the package index switched off. The sums are checked
# first; a file that was changed or is missing stops it.
#   bash install/offline.sh FOLDER [ENVIRONMENT]      ENVIRONMENT: default .venv
set -e
[ -f "$1/SHA256SUMS" ] || { echo "$1 holds no SHA256SUMS: make it with install/wheelhouse.sh." >&2; exit 2; }
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
environment=${2:-.venv}
PYTHON=${PYTHON:-python3}
"$PYTHON" - "$folder" <<'END'
import hashlib, pathlib, sys
folder = pathlib.Path(sys.argv[1])
rows = [x.split('  ', 1) for x in (folder/'SHA256SUMS').read_text().splitlines()]
there = {p.name for p in folder.iterdir()} - {'SHA256SUMS'}
bad = [n for s, n in rows if n not in there or hashlib.sha256((folder/n).read_bytes()).hexdigest() != s]
bad += sorted(there - {n for s, n in rows})
if bad: sys.exit(f'{len(bad)} files are missing, changed or strange, the first is {bad[0]}: nothing is installed.')
END
[ -d "$environment" ] || "$PYTHON" -m venv "$environment"
bin="$environment/bin"; [ -d "$bin" ] || bin="$environment/Scripts"
export PIP_NO_INDEX=1 PIP_FIND_LINKS="$folder" PIP_DISABLE_PIP_VERSION_CHECK=1
"$bin/python" -m pip install -q -c install/lock.txt torch==2.13.0 -e '.[dev]'
touch "$environment/.installed"   # make then finds the environment ready
