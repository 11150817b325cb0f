#!/usr/bin/env bash
# Builds, measures and checks on a machine with one GPU: bench/gpu_suite.sh [FOLDER for results]
#
# In the order of what is missed most where time runs out: build, parity, benches (each result is printed and saved as it
# comes), sanitizers last. The limits of the steps add up to 8 minutes; a step that fails does not stop the others, and
# the last lines say what held. The exit code is 1 unless all held and nothing was left out.
# Needs Python with torch (for CUDA), h5py, timm and pytest, and nvcc; neither DALI nor Horovod, and no network.
#
#   bench/gpu_suite.sh bundle FOLDER   where there is a network: lays what such a machine may lack into FOLDER; then there
#                                      PYTHONPATH=FOLDER bench/gpu_suite.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}

if [[ ${1:-} == bundle ]]; then
    : "${2:?bench/gpu_suite.sh bundle FOLDER}"
    # Pure Python, or small: what the engine imports beside torch and its like.
    exec "$PYTHON" -m pip install --quiet --target "$2" --no-deps \
        omegaconf pyyaml lazy_loader packaging safetensors tqdm
fi

OUT=${1:-runs/gpu-suite}
mkdir -p "$OUT"
SUMMARY=()
FAILED=0

# step NAME SECONDS COMMAND…: its output is in FOLDER/NAME.log, and its end is shown at once
step() {
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    printf '▸ %s (at most %d s)\n' "$name" "$limit"
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    tail -n 15 "$OUT/$name.log"
    if [[ $code == 0 ]]; then
        SUMMARY+=("ok      $name ($((SECONDS - start)) s)")
    else
        SUMMARY+=("FAILED  $name (exit $code after $((SECONDS - start)) s): $OUT/$name.log")
        FAILED=1
    fi
    printf '%s\n' "${SUMMARY[@]}" >"$OUT/summary.txt" # what is known so far, should the whole be cut off
}

absent() {
    SUMMARY+=("ABSENT  $1")
    FAILED=1
}

CAPABILITY=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null) || {
    echo "error: $PYTHON has no torch with a usable GPU; set PYTHON, or run this on a GPU node" >&2
    exit 2
}
nvidia-smi >"$OUT/nvidia-smi.txt" 2>&1

TORCH_CUDA_ARCH_LIST=$CAPABILITY BOOSTERBIT_CUDA=1 step build 90 "$PYTHON" setup.py build_ext --inplace

KERNEL_TESTS=(tests/test_gpu.py tests/engine/network/test_norm_gpu.py tests/engine/optim/test_ops.py tests/engine/optim/test_fused.py tests/engine/optim/test_agc_adamw.py tests/engine/optim/test_standardized.py)
step parity 75 "$PYTHON" -m pytest -q -m gpu "${KERNEL_TESTS[@]}"

step kernel-R50x1 30 "$PYTHON" -m bench.kernel --model R50x1 --device cuda --repeats 50 --json "$OUT/kernel_R50x1.json"
step kernel-norm-R50x1 30 "$PYTHON" -m bench.kernel --op group_norm_relu --model R50x1 --device cuda --json "$OUT/norm_R50x1.json"
if "$PYTHON" -c 'import omegaconf, lazy_loader, safetensors' 2>/dev/null; then
    step train-R50x1 60 "$PYTHON" -m bench.train_step --model R50x1 --batch 128 --device cuda --json "$OUT/train_R50x1.json"
    step train-R152x4 45 "$PYTHON" -m bench.train_step --model R152x4 --batch 16 --device cuda --json "$OUT/train_R152x4.json"
else
    absent "omegaconf, lazy_loader or safetensors: the training step was not measured; bench/gpu_suite.sh bundle FOLDER"
fi
step kernel-R152x4 60 "$PYTHON" -m bench.kernel --model R152x4 --device cuda --repeats 20 --json "$OUT/kernel_R152x4.json"

SANITIZER=$(command -v compute-sanitizer || find /usr/local/cuda*/bin/ -name compute-sanitizer 2>/dev/null | head -n 1)
if [[ -n $SANITIZER ]]; then
    # Only our kernels are instrumented; the chosen tests reach every size class, dtype and path of it. Most of the time
    # goes to the tool's loading of torch.
    CHOSEN=(-m gpu tests/engine/optim/test_fused.py tests/engine/optim/test_ops.py -k "half_gradients or opcheck_copy or any_size")
    for tool in memcheck racecheck synccheck; do
        step "sanitizer-$tool" 30 "$SANITIZER" --tool "$tool" --kernel-regex kns=agc_ --error-exitcode 9 \
            "$PYTHON" -m pytest -q -x -p no:cacheprovider "${CHOSEN[@]}"
    done
else
    absent "compute-sanitizer: not on PATH, not in /usr/local/cuda*/bin"
fi

printf '\n%s\n' "${SUMMARY[@]}" "took $SECONDS s; results in $OUT"
exit "$FAILED"
