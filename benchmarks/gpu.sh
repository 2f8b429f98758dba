#!/usr/bin/env bash
# Everything that needs a GPU, in one command and ten minutes: benchmarks/gpu.sh [--quick] [FOLDER [PART...]]
#
# Builds the kernels in the source folder, then runs the parts below, the most important first, or those that are named.
# A part that fails or exceeds its limit loses only itself. Its result is in FOLDER (default: gpu-report) at once.
# --quick: tiny sizes and five times the limits, to see whether everything runs.
# WHEELS: a folder with wheels of what is missing; no network is asked then.
# PYTHON: the interpreter; else that of the active environment, else a new one in FOLDER/venv.
# Exit status: 0, 1 a part failed, 2 not begun.
set -euo pipefail

SMALLEST="every_divergence and (1003 or 50257)"  # tests of tests/test_gpu.py: each kernel in each type
SANITIZED="unaligned_rows or in_place_gradient"  # the same: ends of rows, every branch of the kernel
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
failures=0 patience=1 sizes=() scale=()

fail() {
  echo "gpu.sh: $*" >&2
  exit 2
}

# Installs what is missing and builds, unless that was done before: it takes seconds the second time.
build() {
  set -euo pipefail
  local pip=("$python" -m pip install -q --disable-pip-version-check --retries 1 --timeout 15) needed each nvcc sources
  mapfile -t needed < <(sed -n '/^dependencies/,/^]/s/^  "\(.*\)",$/\1/p' pyproject.toml)
  needed+=(pytest hypothesis 'setuptools>=77' ninja)
  "${pip[@]}" "${needed[@]}" || for each in "${needed[@]}"; do
    "${pip[@]}" "$each" || echo "gpu.sh: $each can't be had; what needs it will fail"
  done
  sources=$(find csrc setup.py -type f -print0 | sort -z | xargs -0 cat | sha256sum)
  if [[ $(cat build/gpu-sources 2>/dev/null) != "$sources" ]] || ! "$python" -c "$is_built" 2>/dev/null; then
    nvcc=$("$python" -c 'import build_backend; print(*build_backend.get_requires_for_build_wheel())')
    # shellcheck disable=SC2086 # one word for each requirement
    [[ -z $nvcc ]] || "${pip[@]}" $nvcc
    ABKD_CUDA=1 "$python" setup.py -q build_ext --inplace
    "$python" -c "$is_built"
    echo "$sources" >build/gpu-sources
  fi
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.max.memory --format=csv,noheader
  "$python" -m abkd_fast.info
}

# The row kernel with blocks of 768 threads, from a copy of the sources.
threads() {
  set -euo pipefail
  local folder=$report/threads/source
  mkdir -p "$folder"
  cp -r csrc abkd_fast setup.py build_backend.py pyproject.toml "$folder"
  rm -f "$folder"/abkd_fast/losses/*.so
  (cd "$folder" && ABKD_CUDA=1 ABKD_CUDA_THREADS=768 "$python" setup.py -q build_ext --inplace)
  PYTHONPATH=$folder "$python" benchmarks/kernels.py --only rows "$@" --out "$report/threads"
}

is_wanted() {
  [[ -z $wanted || $wanted == *" $1 "* || $1 == build ]]
}

# part NAME LIMIT COMMAND...: output to the terminal and to NAME.txt, outcome and result to the report.
part() {
  local name=$1 limit=$(($2 * patience)) begun=$SECONDS status=0 outcome=passed file
  shift 2
  is_wanted "$name" || return 0
  rm -rf "${report:?}/$name"
  echo "== $name, at most $limit s"
  timeout --signal=INT --kill-after=5 $((limit - 5)) "$@" 2>&1 | tee "$report/$name.txt" || status=${PIPESTATUS[0]}
  if ((status == 124 || status == 137)); then
    outcome="STOPPED at its limit"
  elif ((status)) || { [[ $* == *"-m pytest"* ]] && ! grep -q ' passed' "$report/$name.txt"; }; then
    outcome=FAILED # tests that were only skipped fail, too
  fi
  [[ $outcome == passed ]] || failures=$((failures + 1))
  {
    printf '\n## %s: %s, %s s\n\n' "$name" "$outcome" $((SECONDS - begun))
    for file in "$report/$name"/*.md; do
      [[ ! -f $file ]] || sed "s|\](\([^/)]*\.png)\)|]($name/\1|" "$file"
    done
    # A benchmark that got to its end has said all in its tables.
    [[ -f $file && $outcome == passed ]] || printf '```\n%s\n```\n' "$(tail -n 15 "$report/$name.txt" | cut -c 1-300)"
  } >>"$report/report.md"
  [[ $outcome == passed ]]
}

sanitize() {
  local sanitizer
  is_wanted "$1" || return 0
  sanitizer=$(command -v compute-sanitizer) || {
    printf '\n## %s: skipped, no compute-sanitizer on PATH\n' "$1" >>"$report/report.md"
    return 0
  }
  # PyTorch's own cache of memory would hide a kernel that writes beyond its tensor.
  part "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 9 \
    --kernel-regex kns=abkd "${tests[@]}" -k "$SANITIZED" tests/test_gpu.py
}

if [[ ${1:-} == --quick ]]; then
  patience=5 sizes=(--quick) scale=(--scale tiny)
  shift
fi
command -v nvidia-smi >/dev/null || fail "no nvidia-smi on PATH: this needs an NVIDIA GPU and its driver"
nvidia-smi -L 2>/dev/null | grep -q '^GPU' || fail "nvidia-smi lists no GPU"
# A toolkit's usual place is often not on PATH, where the build and a test look for it.
for home in "${CUDA_HOME:-/usr/local/cuda}" /usr/local/cuda; do
  command -v nvcc >/dev/null || [[ ! -x $home/bin/nvcc ]] || export CUDA_HOME=$home PATH=$home/bin:$PATH
done
mkdir -p "${1:-gpu-report}"
report=$(cd "${1:-gpu-report}" && pwd)
wanted=${2:+" ${*:2} "}
if [[ -n ${WHEELS:-} ]]; then
  PIP_FIND_LINKS=$(cd "$WHEELS" && pwd) || fail "WHEELS is $WHEELS, which is no folder"
  export PIP_FIND_LINKS PIP_NO_INDEX=1
fi

if [[ -n ${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
  python=$(command -v "${PYTHON:-python}") || fail "${PYTHON:-python of the active environment} can't be run"
else # a PyTorch that the machine brought along stays in use
  python=$report/venv/bin/python
  [[ -x $python ]] || python3 -m venv --system-site-packages "$report/venv" ||
    fail "python3 can't create an environment; set PYTHON to one"
fi
# Gigabytes: this is not within the ten minutes.
"$python" -c 'import torch' 2>/dev/null || "$python" -m pip install torch || fail "no torch, and pip can't install one"
card=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || fail "torch sees no GPU"

cd "$source"
export python PYTHONPATH=$source${PYTHONPATH:+:$PYTHONPATH} ABKD_CUDA_ARCHS=${ABKD_CUDA_ARCHS:-$card}
export is_built="import abkd_fast; assert {*'$ABKD_CUDA_ARCHS'.split(';')} <= {*abkd_fast.build_info()['cuda_archs']}"
export -f build threads
export report
tests=("$python" -m pytest -o addopts= -q)
commit=$(git describe --always --dirty 2>/dev/null || echo unknown)
printf '# abkd_fast on %s\n\n' "$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)" >"$report/report.md"
printf '%s, commit %s\n' "$(date -u '+%Y-%m-%d %H:%M UTC')" "$commit" >>"$report/report.md"

kernels() {
  part "$1" "$2" "$python" benchmarks/kernels.py --only "$1" "${sizes[@]}" --out "$report/$1" || true
}
train_steps() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" benchmarks/timing.py "${scale[@]}" --out "$report/$name" "$@" || true
}

# The limits add up to 600 seconds.
part build 75 bash -c build || fail "the kernels can't be built; the reason is above, and in $report/report.md"
part check 35 "${tests[@]}" -m gpu -k "$SMALLEST" tests/test_gpu.py || true
kernels products 20
kernels rows 20
kernels fused 35
part threads 50 bash -c 'threads "$@"' threads "${sizes[@]}" || true
train_steps steps 110 --methods ABKD --minutes 1
train_steps methods 95 --methods KD AlphaNet GKD DISTILLM MiniLLM --minutes 1
part generation 40 "$python" benchmarks/generation.py --only full ending "${sizes[@]}" --out "$report/generation" || true
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests) # reading all tests takes longer than running these
part tests 50 "${tests[@]}" -m gpu "${files[@]}" || true
sanitize memcheck 35 || true
sanitize racecheck 35 || true
echo "== $failures failed; the report is $report/report.md"
((failures == 0))
