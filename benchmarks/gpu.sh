#!/usr/bin/env bash
# One command for a GPU machine, what says most first. Needs no network, installs nothing.
#
#     benchmarks/gpu.sh             everything but bench; ends inside 9 minutes
#     benchmarks/gpu.sh --quick     instructions, tiles and plans, inside 3
#     benchmarks/gpu.sh --only X    the build and X alone; may be repeated
#     benchmarks/gpu.sh --dry-run   prints the steps and their limits; needs no GPU
#
# The parts, in this order:
#     instructions  each inline instruction beside the emulator's model of it
#     tiles         every tile of every family of kernels beside the reference
#     plans         what the card reaches; eight layers by every plan and tile (plans.py)
#     networks      steps of ResNet-50: dense, compacted, live, eager and compiled (network.py)
#     profile       ncu on the kernels that matter
#     tests         the GPU tests, in six processes where pytest-xdist is there; stopped, they print what failed
#     sanitize      compute-sanitizer's memcheck and racecheck over small problems (sanitize.py)
#     bench         many layers (conv.py), for a run of its own
#
# Environment: OUT (out/gpu), PYTHON (python3), COMMIT where git cannot tell, LIMIT in seconds (520, quick 160), and
# MAX_JOBS and TORCH_CUDA_ARCH_LIST for the build.
# Benchmarks write results as they go, and name what was not run.
# Exit code: 0 all is well, 1 a step failed or found no time, 2 the machine lacks something or an argument is wrong.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' benchmarks/gpu.sh; }
stop() { echo "gpu.sh: $1" >&2; exit 2; }

parts="instructions tiles plans networks profile tests sanitize bench"
quick="" dry="" only=""
while (($#)); do
  case $1 in
    --quick) quick=1 ;;
    --dry-run) dry=1 ;;
    --only)
      [[ -n ${2-} && " $parts " == *" $2 "* ]] || stop "--only: expected one of $parts, got '${2-}'"
      only+=" $2"
      shift
      ;;
    -h | --help) usage; exit ;;
    *) stop "unknown argument '$1', see --help" ;;
  esac
  shift
done

# ---- time: the limit is in seconds from the start; what still runs then gets 10 more seconds to end in order
limit=${LIMIT:-$([[ $quick ]] && echo 160 || echo 520)}
failed=0 summary=""

wanted() {
  [[ $only ]] && { [[ " $only " == *" $1 "* ]]; return; }
  [[ $quick ]] && { [[ $1 =~ ^(instructions|tiles|plans)$ ]]; return; }
  [[ $1 != bench ]]
}
left() { echo $((limit - SECONDS)); }
# share PERCENT MOST: PERCENT of the seconds that are left, at most MOST.
share() { local s=$(($(left) * $1 / 100)); echo $((s < $2 ? s : $2)); }
# minutes SECONDS: for a Python process that may run for SECONDS, the --minutes after which it begins nothing new.
minutes() { local s=$(($1 > 24 ? $1 - 12 : $1 / 2)); printf '%d.%02d' $((s / 60)) $((s % 60 * 100 / 60)); }
note() { summary+=$(printf '%-20s %4s s  %s' "$1" "$2" "$3")$'\n'; }

# step NAME SECONDS COMMAND...: runs the command for at most SECONDS or what is left of the limit; its output goes to
# the log, too. Then it gets SIGINT, at which pytest prints what failed and benchmarks write what they have.
step() {
  local name=$1 most=$2 began=$SECONDS code
  shift 2
  if [[ $dry ]]; then
    printf '%-20s at most %3s s  %s\n' "$name" "$most" "$*"
    return
  fi
  ((most > $(left))) && most=$(left)
  if ((most < 5)); then
    note "$name" 0 "not run: out of time"
    failed=1
    return 1
  fi
  printf '\n=== %s, at most %s s: %s\n' "$name" "$most" "$*" | tee -a "$log"
  timeout -s INT -k 10 "$most" "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  case $code in
    0) note "$name" $((SECONDS - began)) ok ;;
    124 | 130 | 137) note "$name" $((SECONDS - began)) "stopped at its limit" ;;
    *) note "$name" $((SECONDS - began)) "failed, exit code $code" ;;
  esac
  ((code == 0)) || failed=1
  return "$code"
}

# ---- the machine
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/gpu}
log=$OUT/log.txt
: "${COMMIT:=$(git describe --always --dirty '--exclude=*' 2>/dev/null || echo unknown)}"
card=$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0 2>/dev/null | head -1)
if [[ ! $dry ]]; then
  [[ $card ]] || stop "nvidia-smi finds no GPU here"
  command -v "$PYTHON" >/dev/null || stop "no $PYTHON"
  { mkdir -p "$OUT" && : >"$log"; } || stop "cannot write $OUT"
fi
# "NVIDIA H100 80GB HBM3" becomes h100-80gb-hbm3.
machine=$(echo "${card:-gpu}" | tr '[:upper:]' '[:lower:]' |
  sed -E 's/nvidia|geforce//g; s/[^a-z0-9]+/-/g; s/^-+|-+$//g')
base=$OUT/$(date +%F)-$machine-${COMMIT//[^A-Za-z0-9_.-]/-}${quick:+-quick}
export PYTHON COMMIT PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 CUDA_MODULE_LOADING=LAZY
export MAX_JOBS=${MAX_JOBS:-$(nproc)}

# nvcc on PATH may be a wrapper outside the toolkit.
if [[ ! $dry ]]; then
  CUDA_HOME=$("$PYTHON" csrc/find_toolkit.py) || stop "$CUDA_HOME"
  export CUDA_HOME PATH=$CUDA_HOME/bin:$PATH
fi

header() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,temperature.gpu,utilization.gpu --format=csv
  nvcc --version | tail -2
  echo "commit $COMMIT, $(nproc) processors, $(date -Is)"
  "$PYTHON" - <<'END'
import importlib.util
import sys

needed, useful = ("torch", "numpy", "setuptools"), ("ninja", "pybind11", "pytest")
missing = [name for name in (*needed, *useful) if importlib.util.find_spec(name) is None]
print("missing Python packages:", ", ".join(missing) or "none")
if set(needed) & set(missing):
    sys.exit("cannot do without " + ", ".join(needed))
import torch

print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)
if not torch.cuda.is_available():
    sys.exit("this torch finds no CUDA device")
print("cudnn", torch.backends.cudnn.version(), torch.cuda.get_device_properties(0))
END
}
export -f header

# The card's compute capability; the instructions that only Hopper has need 9.0a.
architecture() {
  "$PYTHON" -c 'import torch; v = torch.cuda.get_device_capability(); print("%d.%d" % v + "a" * (v[0] == 9))'
}

# ---- the steps
# pytest_step NAME SECONDS ARGUMENTS...: pytest, where it is there.
pytest_step() {
  local name=$1 seconds=$2
  shift 2
  if [[ ! $dry && ! -f python_tests/cuda/test_conv.py ]]; then
    note "$name" 0 "not run: no python_tests/cuda/test_conv.py"
    failed=1
  elif [[ $dry ]] || "$PYTHON" -c 'import pytest' 2>/dev/null; then
    step "$name" "$seconds" "$PYTHON" -m pytest -q --maxfail=25 "$@"
  else
    note "$name" 0 "no pytest here"
    failed=1
  fi
}

instructions() { pytest_step instructions "$(share 25 80)" python_tests/cuda/test_instructions.py; }

tiles() { pytest_step tiles "$(share 25 60)" python_tests/cuda/test_conv.py -k test_every; }

plans() {
  local seconds
  seconds=$(share 45 110)
  step plans "$seconds" "$PYTHON" benchmarks/plans.py --device cuda --dtype bfloat16 --seconds 0.1 \
    --minutes "$(minutes "$seconds")" --json "$base-plans.json"
}

networks() {
  local seconds
  seconds=$(share 50 130)
  step networks "$seconds" "$PYTHON" benchmarks/network.py --device cuda --suite resnet50 --batch 128 --dtype bfloat16 \
    --masks joint --kept 0.5 --pass train --keep-going --minutes "$(minutes "$seconds")" \
    --contenders compacted live small dense+compile compacted+compile \
    --json "$base-networks.json" --md "$base-networks.md"
}

profile() {
  if [[ ! $dry && ! -x $(command -v ncu) ]]; then
    note profile 0 "not run: no ncu"
    return
  fi
  # The card is not ours alone: its clocks stay as they are.
  step profile "$(share 40 45)" ncu --clock-control none --target-processes all --set detailed --launch-count 10 \
    --kernel-name "regex:igemm_fwd|igemm_grad_weight|unpack_grad_weight|scatter_channels" \
    --log-file "$base-ncu.txt" \
    "$PYTHON" benchmarks/plans.py --device cuda --clock events --seconds 0.001 --minutes 0.4
}

tests() {
  local workers=""
  [[ ! $dry ]] && "$PYTHON" -c 'import xdist' 2>/dev/null && workers="-n 6"
  # shellcheck disable=SC2086
  pytest_step tests "$(share 60 120)" $workers \
    python_tests/cuda/test_conv.py python_tests/cuda/test_steps.py python_tests/cuda/test_step_ops.py
}

sanitize() {
  local tool=compute-sanitizer options="" seconds
  # First without a sanitizer: it reports no error either where the kernels that it should watch never run.
  seconds=$(share 30 30)
  step "kernels that run" "$seconds" "$PYTHON" benchmarks/sanitize.py --kernels --minutes "$(minutes "$seconds")"
  if [[ ! $dry && ! -x $(command -v $tool) ]]; then
    note sanitizer 0 "not run: no compute-sanitizer"
    failed=1
    return
  fi
  # Only this package's kernels: watching the libraries' as well takes too long.
  [[ $dry ]] || $tool --help 2>&1 | grep -q -- --kernel-name && options="--kernel-name kns=prunekernels"
  seconds=$(share 45 50)
  # Without the caching allocator every tensor has an allocation of its own, and an access beside it is seen.
  # shellcheck disable=SC2086
  step memcheck "$seconds" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    $tool --tool memcheck --report-api-errors no --error-exitcode 9 --print-limit 20 $options \
    "$PYTHON" benchmarks/sanitize.py --minutes "$(minutes "$seconds")"
  # shellcheck disable=SC2086
  step racecheck "$seconds" \
    $tool --tool racecheck --error-exitcode 9 --print-limit 20 $options \
    "$PYTHON" benchmarks/sanitize.py --minutes "$(minutes "$seconds")"
}

# conv NAME SECONDS OPTIONS...: runs conv.py; where the device is lost, a new process goes on with the rest.
conv() {
  local name=$1 end=$((SECONDS + $2)) seconds code
  shift 2
  rm -f "$base-$name".{json,md}
  for _ in 1 2 3; do
    seconds=$((end - SECONDS))
    ((seconds > 15)) || { note "bench $name" 0 "not run: out of time"; failed=1; return; }
    step "bench $name" "$seconds" "$PYTHON" benchmarks/conv.py --device cuda --keep-going --resume --seconds 0.1 \
      --baselines compaction limit --minutes "$(minutes "$seconds")" "$@" \
      --json "$base-$name.json" --md "$base-$name.md"
    code=$?
    ((code == 3)) || return
  done
}

bench() {
  # The keep ratios that say most come first; the batches make most kernels take more than 50 us.
  local most all="--suite resnet50 vgg16_cifar --mask filter block kernel --side both out in --kept 0.5 0.9 0.3 0.7 1.0"
  most=$(left)
  # shellcheck disable=SC2086
  conv bf16 $((most * 60 / 100)) $all --dtype bfloat16 --layout channels_last --batch resnet50=128 vgg16_cifar=512
  # shellcheck disable=SC2086
  conv fp32 $(($(left) - 35)) $all --dtype float32 --batch resnet50=64 vgg16_cifar=256
  # Beside the times of CUDA graphs: the times of calls from Python, launches included.
  step "bench calls" 35 "$PYTHON" benchmarks/conv.py --device cuda --clock events --keep-going --seconds 0.1 \
    --suite gpu_quick --dtype bfloat16 --layout channels_last --baselines compaction limit --kept 0.5 --minutes 0.3 \
    --md "$base-calls.md"
}

step header 60 bash -c header || stop "this machine lacks something, see above"
[[ $dry ]] || export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(architecture)}
if ! step build 260 env PRUNEKERNELS_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace; then
  printf '\n%s' "$summary"
  exit 1
fi
for part in $parts; do
  wanted $part && $part
done
[[ $dry ]] && exit
{
  printf '\n=== %s, %s, %s s\n%s' "$machine" "$COMMIT" "$SECONDS" "$summary"
  ls -l "$OUT"
} | tee -a "$log"
exit $failed
