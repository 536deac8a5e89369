#!/bin/bash
# Writes install/lock.txt from settings.ini and constraints.txt, for every platform and Python from
# 3.11 on. It needs uv (pip install uv) and the package index.
cd "$(dirname "$0")/.." || exit 2
exec "${UV:-uv}" pip compile setup.py --extra dev -c constraints.txt --universal \
    --python-version 3.11.0 --no-annotate --no-progress --quiet \
    --custom-compile-command 'bash install/lock.sh' -o install/lock.txt "$@"
