#!/usr/bin/env bash
# Everything that only a GPU can tell, in at most ten minutes, on a machine without a network: build, tests, sanitizers,
# ceilings, the bench against every peer installed.  One folder of results, one summary, one exit code.
#
# The CUDA library is taken as it lies in fastattn/lib (built elsewhere and brought along), else built here with nvcc.
#
#   bench/gpu.sh [--dry-run]
#
# PYTHON  the Python with torch (default python3)      OUT  the folder (default bench/results/gpu-<time>)
# TOTAL   seconds for all steps (default 570)          --dry-run: the same steps on the CPU, on small shapes
# STEPS   "tests", "bench" or both (default); "hopper": the sm_90a kernels, which nothing else here runs: their tests,
#         then their suites: 8-bit operands, and the rest with the exponentials held in place and not
#
# Every step has a time limit of its own and a failed one does not stop the next.  Exit code 0: all steps passed or were
# skipped with a reason; 1: some failed; 2: nothing could be run.
#
# What ten minutes hold: the tests take up to 400 s, so beside them the bench has 170 s or more, at 2 to 3 s a case enough
# for the first suites of its group: every length and width of plain and causal attention, host overhead, biases and
# sparse masks against length, and rotary.  What is compiled takes 10 to 20 s a case; with STEPS=bench there is time
# for most of that as well (114 cases, some 490 s; estimates, not measured).

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-tests bench}
TOTAL=${TOTAL:-570}
DEVICE=cuda
QUICK=()
if [[ ${1:-} == --dry-run ]]; then
  DEVICE=cpu
  QUICK=(--quick)
elif [[ -n ${1:-} ]]; then
  echo "usage: bench/gpu.sh [--dry-run]" >&2
  exit 2
fi
OUT=${OUT:-bench/results/gpu-$(date -u +%Y%m%d-%H%M%S)}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/log.txt
: >"$LOG"
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
export FASTATTN_NATIVE=0 # the simulator has nothing to tell here

declare -a SUMMARY=()
FAILED=0

say() { printf '%s\n' "$*" | tee -a "$LOG"; }
left() { echo $((TOTAL - SECONDS)); }

note() { # name, outcome: one line of the summary
  SUMMARY+=("$(printf '%-14s %-44s %4d s' "$1" "$2" "$SECONDS")")
}

# step NAME LIMIT COMMAND...: run under its own limit, or what is left of the total if that is less
step() {
  local name=$1 limit=$2 status
  shift 2
  if (($(left) < 15)); then
    say "== $name: no time left"
    note "$name" "skipped: no time left"
    FAILED=1
    return 1
  fi
  ((limit > $(left) - 5)) && limit=$(($(left) - 5))
  say ""
  say "== $name (limit $limit s, $SECONDS s so far)"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$LOG"
  status=${PIPESTATUS[0]}
  case $status in
    0) note "$name" "passed" ;;
    124 | 137)
      note "$name" "FAILED: over its limit of $limit s"
      FAILED=1
      ;;
    *)
      note "$name" "FAILED: exit code $status"
      FAILED=1
      ;;
  esac
  return "$status"
}

wanted() { [[ " $STEPS " == *" $1 "* ]]; }

skip() { # name, reason
  say "== $1: skipped, $2"
  note "$1" "skipped: $2"
}

finish() {
  say ""
  say "== summary: $OUT"
  for line in "${SUMMARY[@]}"; do say "$line"; done
  if ((FAILED)); then say "FAILED"; else say "all steps passed"; fi
  exit "$FAILED"
}

for name in $STEPS; do
  if [[ $name != tests && $name != bench && $name != hopper ]]; then
    say "STEPS: expected tests, bench or hopper, got '$name'"
    exit 2
  fi
done
if ! "$PYTHON" -c 'import torch' 2>>"$LOG"; then
  say "no torch in $PYTHON: nothing to run"
  exit 2
fi
if [[ $DEVICE == cuda ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  say "torch sees no CUDA device; bench/gpu.sh --dry-run runs the same steps on the CPU"
  exit 2
fi

environment() {
  date -u
  if command -v nvidia-smi; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv
  fi
  if command -v nvcc; then nvcc --version; fi
  "$PYTHON" --version
  "$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  "$PYTHON" -m pip list 2>/dev/null | grep -i -E '^(torch|triton|flash|xformers|numpy|pytest|hypothesis|rich|matplotlib|ninja|setuptools)' || true
}

install() {
  # no dependencies and no isolation: both would ask the network for what is here already
  local flags=(--no-index --no-deps --no-build-isolation)
  "$PYTHON" -m pip install "${flags[@]}" --editable . && return 0
  echo "an editable install is not possible here: installing a copy into $SITE"
  "$PYTHON" -m pip install "${flags[@]}" --target "$SITE" --upgrade .
}

cuda_library() {
  local library=fastattn/lib/libfastattn_cuda.so
  if [[ -e $library ]]; then
    echo "$library is here"
  else
    FASTATTN_CUDA=1 FASTATTN_CUDA_ARCHS=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}{chr(97) if major >= 9 else str()}")') "$PYTHON" setup.py -q build_ext --inplace || return
  fi
  # where the package was copied instead of installed in place
  if [[ -d $SITE/fastattn ]]; then install -D "$library" "$SITE/$library"; fi
  "$PYTHON" -c '
from fastattn import native
assert native.load_cuda_library(), native.cuda_load_error
print(native.cuda_info())'
}

# Kernels of ours on a few small cases; a tool reports only what it saw, so each gets the same.
sanitize() { # tool
  local report status
  report=$(compute-sanitizer --tool "$1" --kernel-regex kns=fastattn --error-exitcode 86 \
    "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py \
    -k "cuda and (test_attention_composition and float16 and not bfloat16 and 0.2 or stay_inside)" 2>&1)
  status=$?
  printf '%s\n' "$report" | tail -n 40
  if printf '%s' "$report" | grep -qi -E 'device not supported|not supported on this (device|platform)'; then
    echo "compute-sanitizer does not work on this machine; this says nothing about the code"
    return 0
  fi
  return "$status"
}

SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
export -f environment install cuda_library sanitize
export PYTHON SITE

step environment 40 bash -c environment
if ! step install 180 bash -c install; then
  say "the package could not be installed: running from the checkout cannot work either (bench is part of the package)"
fi
# a fallback copy is found here; in the usual case the folder is empty
PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH

if [[ $DEVICE != cuda ]]; then
  skip "CUDA library" "no GPU"
elif [[ -e fastattn/lib/libfastattn_cuda.so ]] || command -v nvcc >/dev/null; then
  step "CUDA library" 240 bash -c cuda_library
else
  skip "CUDA library" "neither built nor an nvcc to build it with"
fi

# compiling the Triton kernels is most of the tests' time, and one process compiles one at a time
PARALLEL=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then PARALLEL=(-n "$(($(nproc) < 12 ? $(nproc) : 12))"); fi

# off unless asked for, so they have a step of their own; a wait that never ends is cut off after a minute
if wanted hopper; then
  if [[ $DEVICE == cuda ]]; then
    FASTATTN_CUDA_HOPPER=1 step "hopper tests" 120 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py \
      -k "sm_90a or float8 or (cuda and (test_attention_composition or stay_inside))" --junitxml="$OUT/hopper.xml" || {
      say "the sm_90a kernels are wrong or hang: not timed"
      finish
    }
  else
    skip "hopper tests" "no GPU"
  fi
  step "hopper bench" "$(left)" "$PYTHON" -m fastattn bench --device "$DEVICE" "${QUICK[@]}" --suite float8 \
    --suite hopper --budget 0.25 --deadline "$(($(left) - 60))" --out "$OUT" --no-report
fi

step info 60 "$PYTHON" -m fastattn info
if wanted tests; then
  step tests 200 "$PYTHON" -m pytest -q -p no:cacheprovider "${PARALLEL[@]}" -m gpu tests --junitxml="$OUT/tests.xml"
  step verify 90 "$PYTHON" -m fastattn verify --device "$DEVICE"
fi
for tool in memcheck racecheck synccheck; do
  if ! wanted tests; then
    skip "$tool" "not among STEPS"
  elif [[ $DEVICE != cuda ]]; then
    skip "$tool" "no GPU"
  elif [[ ! -e fastattn/lib/libfastattn_cuda.so ]]; then
    skip "$tool" "no CUDA library"
  elif ! command -v compute-sanitizer >/dev/null; then
    skip "$tool" "compute-sanitizer is not installed"
  else
    step "$tool" 45 bash -c "sanitize $tool"
  fi
done
step ceilings 40 "$PYTHON" -m fastattn.bench.ceilings --device "$DEVICE" --out "$OUT/ceilings.json"

wanted bench || finish
# The bench takes what is left.  It writes after every case and begins none past its own deadline, which is early enough
# for the last case to end before the limit.
reserve=45
deadline=$(($(left) - reserve - 15))
((deadline < 20)) && deadline=20
step bench "$(left)" "$PYTHON" -m fastattn bench --device "$DEVICE" "${QUICK[@]}" --suite gpu --budget 0.25 \
  --deadline "$deadline" --out "$OUT" --no-report
finish
