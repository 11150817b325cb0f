# shellcheck shell=bash
# JUWELS Booster: sourced by each job, and once on a login node (compute nodes have no internet) to make the environment:
#   source jobs/env/juwels_booster.sh && make env

module --force purge
# Open MPI and CUDA of the stage: the MPI that srun serves, built to read GPU memory.
module load Stages/2025 GCC OpenMPI CUDA Python CMake

# $HOME is small, $SCRATCH is cleaned up: the environment goes to the project's file system.
: "${PROJECT:?jutil env activate -p PROJECT sets PROJECT and SCRATCH}"
export VENV=${VENV:-$PROJECT/$USER/boosterbit/venv}
export BOOSTERBIT_CACHE=${BOOSTERBIT_CACHE:-$PROJECT/$USER/boosterbit/cache}
export HOROVOD_NCCL=1   # all-reduce on the GPUs
export BOOSTERBIT_CUDA=1 # login nodes have no GPU, so the kernel is not built unless told
export PATH=$VENV/bin:$PATH

# The InfiniBand name of a node has an i at its end; the plain one is of the slow administration network.
export RENDEZVOUS_SUFFIX=i
# Bootstrap connections of NCCL and Gloo: their own guess may be that slow network.
export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
