#!/bin/bash
# Builds a wheelhouse on a machine with a package index: every package of install/lock.txt that this
# platform and Python need, as wheels, this library among them, and their SHA-256 sums.
#   bash install/wheelhouse.sh FOLDER [options of pip]
set -e
[ -n "$1" ] || { echo 'usage: bash install/wheelhouse.sh FOLDER [options of pip]' >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd); shift
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -m pip wheel -q "$@" -c install/lock.txt -w "$folder" \
    pip setuptools wheel torch==2.13.0 '.[dev]'
cp install/lock.txt "$folder"
"$PYTHON" - "$folder" <<'END'
import hashlib, pathlib, sys
folder = pathlib.Path(sys.argv[1])
files = sorted(p for p in folder.iterdir() if p.name != 'SHA256SUMS')
sums = [f'{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}' for p in files]
(folder/'SHA256SUMS').write_text('\n'.join(sums) + '\n')
size = sum(p.stat().st_size for p in files)
print(f'{len(files)} files, {size/2**20:.0f} MiB in {folder}')
END
