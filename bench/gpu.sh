#!/usr/bin/env bash
# Tests and measurements on an NVIDIA GPU, the most telling first, in at most $DANLU_SECONDS (560) seconds. Takes the
# modules of `make prebuilt` if they serve here, else builds for the card that is here, in build/gpu; then runs
# bench/gpu.py. Needs python3 (or $PYTHON) with torch and pytest; to build also pybind11, Python.h, a C++ compiler, nvcc
# and cmake; no network. Results go to $DANLU_OUT, else to bench/results. `--help` lists options.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
command -v "$python" >/dev/null || {
  echo "bench/gpu.sh: $python is not installed" >&2
  exit 1
}
# the process ends itself in time unless it hangs where Python cannot interrupt it
exec timeout --foreground --signal=KILL "${DANLU_SECONDS:-560}" "$python" bench/gpu_setup.py --started "$started" "$@"
