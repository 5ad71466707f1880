#!/usr/bin/env bash
# Whether the torch layer compiles with the headers of the oldest torch that pyproject.toml allows:
# what only a later one declares would break the installation beside that one, and no other check
# would see it. Headers alone are taken from its wheel, and nothing is linked.
#
#     tools/check_oldest_torch.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
folder=build/oldest-torch
mkdir -p "$folder"

version=$(sed -nE 's/^ *"torch>=([0-9.]+)".*/\1/p' pyproject.toml)
[ -n "$version" ] || { echo "pyproject.toml names no oldest torch"; exit 1; }
include=$folder/$version/torch/include
if [ ! -d "$include" ]; then
  rm -rf "$folder/wheel"
  if ! "$python" -m pip --disable-pip-version-check download -q --no-deps --no-cache-dir --only-binary=:all: \
    "torch==$version.*" -d "$folder/wheel" > "$folder/download.log" 2>&1; then
    echo "torch $version could not be downloaded ($folder/download.log): NOT checked against its headers"
    exit 0
  fi
  "$python" - "$folder" "$version" << 'EXTRACT'
import pathlib
import sys
import zipfile

folder, version = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = (folder / "wheel").glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    names = [name for name in archive.namelist() if name.startswith("torch/include/")]
    archive.extractall(folder / f"{version}.part", names)
(folder / f"{version}.part").rename(folder / version)
wheel.unlink()
EXTRACT
fi

flags=(-std=c++20 -fsyntax-only -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020a000000000000 -Icsrc
  -isystem "$include")
backends=(CPU)
if nvcc=$(command -v nvcc); then
  toolkit=$("$nvcc" --dryrun -x cu -c /dev/null 2>&1 | sed -nE 's/^#\$ _TARGET_DIR_=//p; s/^#\$ TOP=//p' | head -1)
  for cuda in /usr/local/cuda/include "$(dirname "$nvcc")/../include" "$toolkit"/include "$toolkit"/targets/*/include; do
    if [ -f "$cuda/cuda_runtime.h" ]; then
      backends=(CPU CUDA)
      flags+=(-isystem "$cuda")
      break
    fi
  done
fi
# module.cpp is pybind11's and knows no torch.
for backend in "${backends[@]}"; do
  for file in csrc/torch/*.cpp; do
    [ "$file" = csrc/torch/module.cpp ] || printf '%s\0' "-DSEQKERN_BACKEND_$backend $file"
  done
done | xargs -0 -P "$(nproc)" -I{} sh -c 'exec "${CXX:-c++}" "$@" {}' sh "${flags[@]}"
echo "the torch layer (${backends[*]}) compiles with the headers of torch $version"
