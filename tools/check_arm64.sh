#!/usr/bin/env bash
# The extension built for 64-bit ARM and tested, on a machine that is none: a cross compiler and an emulator of the
# processor, with Debian's Python and the oldest torch (a wheel without CUDA) for it. Says what it lacks.
#
#     tools/check_arm64.sh PYTHON [TESTS AND OPTIONS OF PYTEST]
#
# It tells whether results are right; of speed it says nothing, and of the order in which cores see each other's
# memory only what this machine's own order lets happen.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
shift
folder=$PWD/build/arm64
mkdir -p "$folder"

for program in aarch64-linux-gnu-g++:g++-aarch64-linux-gnu qemu-aarch64-static:qemu-user-static debootstrap:debootstrap; do
  command -v "${program%%:*}" > /dev/null ||
    { echo "no ${program%%:*} (package ${program##*:}): NOT checked on 64-bit ARM"; exit 0; }
done

# Debian's packages unpacked, none of them set up.
root=$folder/root
if [ ! -d "$root" ]; then
  rm -rf "$root.part"
  if ! debootstrap --foreign --arch=arm64 --variant=minbase --include=python3-minimal,libpython3.11-dev,libgomp1 \
    bookworm "$root.part" > "$folder/debootstrap.log" 2>&1; then
    echo "Debian for arm64 could not be had ($folder/debootstrap.log): NOT checked on 64-bit ARM"
    exit 0
  fi
  for package in "$root.part"/var/cache/apt/archives/*.deb; do dpkg -x "$package" "$root.part"; done
  mv "$root.part" "$root"
fi

# Python packages of pyproject.toml's lists, in torch's place the oldest version that it allows, without what CUDA needs.
packages=$root/usr/local/lib/python3.11/dist-packages
version=$(sed -nE 's/^ *"torch>=([0-9.]+)".*/\1/p' pyproject.toml)
if [ ! -d "$packages/torch" ]; then
  have=(--target "$packages" --python-version 3.11 --only-binary=:all: -q
    --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64)
  "$python" build_backend/requires.py build run test |
    grep -E '^(pybind11|numpy|safetensors|tqdm|pytest|expecttest)[<>=]' > "$folder/requires.txt"
  if ! { "$python" -m pip --disable-pip-version-check install "${have[@]}" -r "$folder/requires.txt" \
    filelock typing-extensions sympy networkx jinja2 fsspec setuptools &&
    "$python" -m pip --disable-pip-version-check install "${have[@]}" --no-deps "torch==$version.*"; } \
    > "$folder/pip.log" 2>&1; then
    echo "packages for arm64 could not be had ($folder/pip.log): NOT checked on 64-bit ARM"
    exit 0
  fi
fi

cat > "$folder/python" << RUN
#!/bin/sh
exec qemu-aarch64-static -cpu neoverse-n1 -L "$root" "$root/usr/bin/python3.11" "\$@"
RUN
chmod +x "$folder/python"
cat > "$folder/toolchain.cmake" << 'TOOLCHAIN'
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
TOOLCHAIN
# Python's header of its configuration lies beside the system's own headers, which are the compiler's.
mkdir -p "$folder/include"
ln -sfn "$root/usr/include/aarch64-linux-gnu" "$folder/include/aarch64-linux-gnu"
cmake -S . -B "$folder/build" -G Ninja -DCMAKE_BUILD_TYPE=Release "-DCMAKE_TOOLCHAIN_FILE=$folder/toolchain.cmake" \
  -DSEQKERN_WERROR="${WERROR:-OFF}" -DSEQKERN_CUDA=OFF "-DPython_EXECUTABLE=$folder/python" \
  "-DPython_INCLUDE_DIR=$root/usr/include/python3.11" "-DCMAKE_CXX_FLAGS=-isystem $folder/include" \
  "-DPython_LIBRARY=$root/usr/lib/aarch64-linux-gnu/libpython3.11.so" > "$folder/cmake.log" ||
  { cat "$folder/cmake.log"; exit 1; }
cmake --build "$folder/build" --target _C

site=$folder/site
rm -rf "$site"
mkdir -p "$site/seqkern-0.dist-info"
cp -r python/seqkern "$site"
cp "$folder"/build/_C*.so "$site/seqkern"
printf 'Metadata-Version: 2.1\nName: seqkern\nVersion: 0\n' > "$site/seqkern-0.dist-info/METADATA"
PYTHONPATH=$site OMP_NUM_THREADS=1 "$folder/python" -m pytest -p no:cacheprovider "$@"
