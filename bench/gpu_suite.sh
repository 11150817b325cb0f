#!/usr/bin/env bash
# Builds, checks and measures on a machine with a GPU, in under 10 minutes: bench/gpu_suite.sh [FOLDER for results]
# Needs Python with torch (for CUDA), h5py, timm and pytest, and nvcc; neither DALI nor Horovod. The steps go on after
# one fails, and the last lines say what held; the exit code is 1 unless all did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
OUT=${1:-runs/gpu-suite}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
SUMMARY=()
FAILED=0

# step NAME SECONDS COMMAND…: its output is in FOLDER/NAME.log, the end of it here too where it fails
step() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    printf '▸ %s\n' "$name"
    if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then
        SUMMARY+=("ok      $name ($((SECONDS - start)) s)")
    else
        local code=$?
        tail -n 15 "$OUT/$name.log"
        SUMMARY+=("FAILED  $name (exit $code after $((SECONDS - start)) s): $OUT/$name.log")
        FAILED=1
    fi
}

CAPABILITY=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null) || {
    echo "error: $PYTHON has no torch with a usable GPU; set PYTHON, or run this on a GPU node" >&2
    exit 2
}
nvidia-smi >"$OUT/nvidia-smi.txt" 2>&1

TORCH_CUDA_ARCH_LIST=$CAPABILITY BOOSTERBIT_CUDA=1 step build 120 "$PYTHON" setup.py build_ext --inplace

KERNEL_TESTS=(tests/test_gpu.py tests/engine/optim/test_ops.py tests/engine/optim/test_fused.py tests/engine/optim/test_standardized.py)
step pytest 120 "$PYTHON" -m pytest -q -m gpu "${KERNEL_TESTS[@]}"

SANITIZER=$(command -v compute-sanitizer || find /usr/local/cuda*/bin/ -name compute-sanitizer 2>/dev/null | head -n 1)
if [[ -n $SANITIZER ]]; then
    # Only our kernel is instrumented; the chosen tests reach every size class, dtype and path of it.
    CHOSEN=(-m gpu tests/engine/optim/test_fused.py tests/engine/optim/test_ops.py -k "half_gradients or opcheck_copy or any_size")
    for tool in memcheck racecheck synccheck; do
        step "sanitizer-$tool" 60 "$SANITIZER" --tool "$tool" --kernel-regex kns=agc_sgd --error-exitcode 9 \
            "$PYTHON" -m pytest -q -x -p no:cacheprovider "${CHOSEN[@]}"
    done
else
    SUMMARY+=("ABSENT  compute-sanitizer: not on PATH, not in /usr/local/cuda*/bin")
    FAILED=1
fi

step kernel-R50x1 40 "$PYTHON" -m bench.kernel --model R50x1 --device cuda --repeats 50 --json "$OUT/kernel_R50x1.json"
step kernel-R152x4 80 "$PYTHON" -m bench.kernel --model R152x4 --device cuda --repeats 20 --json "$OUT/kernel_R152x4.json"
if "$PYTHON" -c 'import omegaconf, sklearn' 2>/dev/null; then
    step train-step 60 "$PYTHON" -m bench.train_step --model R50x1 --device cuda --json "$OUT/train_step_R50x1.json"
else
    SUMMARY+=("ABSENT  omegaconf or scikit-learn: the whole training step was not measured")
fi

printf '\n'
cat "$OUT"/kernel-*.log
printf '\n%s\n' "${SUMMARY[@]}" "took $SECONDS s; results in $OUT"
exit "$FAILED"
