#!/usr/bin/env bash
# Build an sdist, install it in an environment of its own with an isolated build, and use it from another folder.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

"${PYTHON:-python3}" -m venv "$place/venv"
pip="$place/venv/bin/python -m pip --disable-pip-version-check -q"
$pip install "${TORCH:-torch>=2.10}" build
"$place/venv/bin/python" -m build --sdist --outdir "$place/dist" "$root" >/dev/null
# As the build before it, if there was one: then its objects are in ccache's store.
$pip install --config-settings=cmake.define.SEQKERN_WERROR="${WERROR:-OFF}" "$place"/dist/seqkern-*.tar.gz

cd "$place"
venv/bin/python "$root/tools/installed.py"
venv/bin/seqkern doctor
