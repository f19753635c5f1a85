#!/usr/bin/env bash
# Make a virtual environment with mmad in it. Needs Python >= 3.11 and pip; on Debian and Ubuntu it also installs the
# system libraries that Open3D's wheel loads, or says which command does.
set -euo pipefail
venv=${1:-.venv}
cd "$(dirname "$0")/.."

python=
for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: no Python 3.11, 3.12 or 3.13 found; install one or name it: make PYTHON=/path/to/python3.11" >&2
    exit 2
fi

# library file -> Debian package
missing=()
while read -r library package; do
    "$python" - "$library" <<'PY' 2>/dev/null || missing+=("$package")
import ctypes, sys
ctypes.CDLL(sys.argv[1])
PY
done <<'LIBRARIES'
libusb-1.0.so.0 libusb-1.0-0
libGL.so.1 libgl1
libgomp.so.1 libgomp1
libEGL.so.1 libegl1
libX11.so.6 libx11-6
LIBRARIES
if [ "$(uname -s)" = Linux ] && [ ${#missing[@]} -gt 0 ]; then
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    elif command -v apt-get >/dev/null; then
        echo "error: Open3D needs system libraries; run: sudo apt-get install -y ${missing[*]}" >&2
        exit 2
    else
        echo "warning: Open3D needs these system libraries (Debian names): ${missing[*]}" >&2
    fi
fi

if [ ! -x "$venv/bin/python" ]; then
    # Debian splits ensurepip off; virtualenv brings its own pip
    "$python" -m venv "$venv" 2>/dev/null || {
        rm -rf "$venv"
        "$python" -m pip install --quiet --user virtualenv
        "$python" -m virtualenv --quiet "$venv"
    }
fi
echo "installing mmad and its dependencies into $venv; this takes some minutes" >&2
PIP_CONSTRAINT="$PWD/constraints.txt" "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
    --editable '.[dev]'
