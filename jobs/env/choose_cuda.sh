#!/usr/bin/env bash
# Which CUDA the packages are to be built for, decided before anything is downloaded. Prints "MAJOR FOUND", for example
# "12 nvcc 12.6"; with neither toolkit nor driver "13 no CUDA" (what plain pip gives, which runs on CPUs as well).
#   CUDA=auto|12|13    auto: nvcc's version, of CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda; else the driver's
set -euo pipefail

wish=${CUDA:-auto}
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
version() { sed -nE "s/.*$1 ?([0-9]+\.[0-9]+).*/\1/p" | head -n 1; }

case $wish in
auto) ;;
12 | 13) echo "$wish CUDA=$wish"; exit ;;
*) fail "CUDA=$wish; it takes 12, 13, or auto" ;;
esac

nvcc=
for candidate in "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "${CUDA_PATH:+$CUDA_PATH/bin/nvcc}" \
    "$(command -v nvcc || true)" "${BOOSTERBIT_CUDA_ROOT:-/usr/local/cuda}/bin/nvcc"; do
    if [[ -n $candidate && -x $candidate ]]; then nvcc=$candidate; break; fi
done
if [[ -n $nvcc ]]; then
    found=$({ "$nvcc" --version || true; } | version release)
    what="nvcc $found"
    [[ -n $found ]] || fail "$nvcc --version does not tell its version; set CUDA=12 or CUDA=13"
elif command -v nvidia-smi >/dev/null; then
    found=$({ nvidia-smi 2>/dev/null || true; } | version 'CUDA Version:')
    what="driver for CUDA $found"
    [[ -n $found ]] || { echo "13 no CUDA"; exit; } # a login node: the program is there, a GPU is not
else
    echo "13 no CUDA"
    exit
fi

major=${found%%.*}
((major >= 12)) || fail "$what is here, and PyTorch of today is built for CUDA 12 and 13; load another toolkit \
(module load CUDA/13), or say CUDA=12 or CUDA=13 to leave it aside"
echo "$((major > 13 ? 13 : major)) $what"
