#!/usr/bin/env bash
# Everything that needs a GPU, on a fresh machine, in one command: benchmarks/gpu.sh [FOLDER]
#
# Builds and installs the package, runs the GPU tests (some under compute-sanitizer) and the benchmarks. All of it ends
# in FOLDER (default: gpu-report). PYTHON names the interpreter; else it is that of the active environment, else a new
# one in FOLDER/venv. Without a network it builds against the packages there. Exit status: 0, 1 failed, 2 not begun.
set -euo pipefail

BENCHMARKS=(kernels timing peers generation)
SANITIZED="unaligned_rows or in_place_gradient" # tests of tests/test_gpu.py: ends of rows, every branch of the kernel
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
failures=0

fail() {
  echo "gpu.sh: $*" >&2
  exit 2
}

# A step of the report: its output to the terminal and to NAME.txt, its outcome to the list. A failure stops nothing.
step() {
  local name=$1 begun=$SECONDS outcome=passed
  shift
  echo "== $name: $*"
  if ! "$@" 2>&1 | tee "$report/$name.txt"; then
    failures=$((failures + 1)) outcome=FAILED
  fi
  echo "- $name: $outcome, $((SECONDS - begun)) s" >>"$report/report.md"
}

# Fails, too, if tests were only skipped.
run_tests() {
  "$@" | tee /dev/stderr | grep ' passed' >/dev/null
}

describe() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory --format=csv
  nvcc --version | tail -n 2
  "$python" -c 'import platform, torch, abkd_fast
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
print(abkd_fast.build_info())
assert abkd_fast.build_info()["cuda"], "built without CUDA kernels"'
}

command -v nvidia-smi >/dev/null || fail "no nvidia-smi on PATH: this needs an NVIDIA GPU and its driver"
nvidia-smi -L 2>/dev/null | grep -q '^GPU' || fail "nvidia-smi lists no GPU"
# A toolkit's usual place is often not on PATH, where the build and a test look for it.
for home in "${CUDA_HOME:-/usr/local/cuda}" /usr/local/cuda; do
  command -v nvcc >/dev/null || [[ ! -x $home/bin/nvcc ]] || export CUDA_HOME=$home PATH=$home/bin:$PATH
done
command -v nvcc >/dev/null || fail "no nvcc on PATH or in CUDA_HOME: the CUDA kernels can't be built"
mkdir -p "${1:-gpu-report}"
report=$(cd "${1:-gpu-report}" && pwd)

if [[ -n ${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
  python=$(command -v "${PYTHON:-python}") || fail "${PYTHON:-python of the active environment} can't be run"
else # a PyTorch that the machine brought along stays in use
  python=$report/venv/bin/python
  [[ -x $python ]] || python3 -m venv --system-site-packages "$report/venv" ||
    fail "python3 can't create an environment; set PYTHON to one"
fi

pip=("$python" -m pip install --disable-pip-version-check --retries 1 --timeout 15) isolation=()
export ABKD_CUDA=1 # no CUDA kernels, no report
"$python" -c 'import torch' 2>/dev/null || "${pip[@]}" torch || fail "there is no torch, and pip can't install one"
# Not isolated if the tools are there: torch may be outside the environment's own folder.
if "$python" -c 'import ninja, setuptools as s; assert int(s.__version__.split(".")[0]) >= 77' 2>/dev/null; then
  isolation=(--no-build-isolation)
fi
if ! "${pip[@]}" "${isolation[@]}" "$source[test,bench]"; then
  echo "gpu.sh: installing without dependencies, against the packages that are there" >&2
  "${pip[@]}" --no-build-isolation --no-deps "$source" || fail "the package can't be built; pip says why above"
fi
"$python" -c 'import torch; assert torch.cuda.is_available()' || fail "torch sees no GPU"
"$python" -c 'import pytest, hypothesis' || fail "no pytest or hypothesis, and pip can't install them"

cd "$source"
printf '# abkd_fast on %s\n\n' "$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)" >"$report/report.md"
commit=$(git describe --always --dirty 2>/dev/null || echo unknown)
printf '%s, commit %s\n\n' "$(date -u '+%Y-%m-%d %H:%M UTC')" "$commit" >>"$report/report.md"

step machine describe
step tests run_tests "$python" -m pytest -o addopts= -m gpu -q
for tool in memcheck racecheck; do
  if sanitizer=$(command -v compute-sanitizer); then
    # PyTorch's own cache of memory would hide a kernel that writes beyond its tensor.
    step "$tool" run_tests env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      --kernel-regex kns=abkd "$python" -m pytest -o addopts= -q tests/test_gpu.py -k "$SANITIZED"
  else
    echo "- $tool: skipped, no compute-sanitizer on PATH" >>"$report/report.md"
  fi
done
for name in "${BENCHMARKS[@]}"; do
  step "$name" "$python" "benchmarks/$name.py" --out "$report/$name"
done

for name in machine tests memcheck racecheck "${BENCHMARKS[@]}"; do
  [[ -f $report/$name.txt ]] || continue
  [[ " ${BENCHMARKS[*]} " == *" $name "* ]] && lines=+1 || lines=12 # tests: the summary first
  printf '\n## %s\n\n```\n' "$name"
  tail -n "$lines" "$report/$name.txt" | sed 's/\x1b\[[0-9;]*m//g'
  printf '```\n'
  [[ ! -f $report/$name/$name.png ]] || printf '\n![%s](%s/%s.png)\n' "$name" "$name" "$name"
done >>"$report/report.md"
echo "== $failures failed; the report is $report/report.md"
((failures == 0))
