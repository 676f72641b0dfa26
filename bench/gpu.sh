#!/usr/bin/env bash
# Tests and measurements on an NVIDIA GPU: builds danlu for the card that is here, in build/gpu, and runs
# bench/gpu.py. Needs python3 (or $PYTHON) with torch, pybind11, pytest, matplotlib and rich, a C++ compiler,
# nvcc and cmake; no network. Results go to $DANLU_OUT, else to bench/results.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
root=$PWD
build=$root/build/gpu
package=$build/package
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1

fail() {
  echo "bench/gpu.sh: $*" >&2
  exit 1
}

command -v "$python" >/dev/null || fail "$python is not installed"
for module in torch pybind11 pytest matplotlib rich; do
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" ||
    fail "$python has no module $module"
done
capability=$("$python" -c '
import torch
if torch.cuda.is_available():
    print("%d%d" % torch.cuda.get_device_capability())')
[ -n "$capability" ] || fail "there is no NVIDIA GPU: torch sees no CUDA device"

# what may be installed beside the interpreter, or where CUDA's own installer puts it
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
export PATH="$scripts:$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
command -v nvcc >/dev/null || fail "nvcc is not installed"
command -v cmake >/dev/null || fail "cmake is not installed"
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi

# the package, away from the checkout's, which may hold modules for another Python
rm -rf "$package"
mkdir -p "$package"
cp -R python/danlu "$package/danlu"
cp -R triton_kernels "$package/danlu/triton_kernels"
find "$package" \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -rf {} +

echo "building for compute capability $capability"
cmake -S . -B "$build" ${generator[@]+"${generator[@]}"} \
  -DDANLU_CUDA=1 "-DDANLU_CUDA_ARCHS=$capability-real" "-DCMAKE_CUDA_COMPILER=$(command -v nvcc)" \
  "-DPython_EXECUTABLE=$("$python" -c 'import sys; print(sys.executable)')" \
  "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" \
  "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$package/danlu"
cmake --build "$build" --parallel "$(nproc)"
echo "built after $(($(date +%s) - started)) s"

export PYTHONPATH="$package:$root/bench:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" bench/gpu.py --started "$started" --out "${DANLU_OUT:-bench/results}"
