"""Builds BoosterBiT and its extension module `engine._C` from csrc/.

    python setup.py build_ext --inplace       the normal route: the module lands beside engine/compiled.py
    pip install --no-build-isolation .        an installed copy, with the program `boosterbit`
    pip wheel --no-build-isolation --no-deps .    the same as a wheel, for machines with this torch

Whether the CUDA kernel is built is decided by BOOSTERBIT_CUDA and by the compiler that is there, never by whether
this machine has a GPU (login nodes have none), and the decision is printed:

    BOOSTERBIT_CUDA=1      build it, or stop and say what is missing
    BOOSTERBIT_CUDA=0      CPU only
    not set                build it where nvcc and torch fit together, else CPU only

BOOSTERBIT_BUILT=1 takes the module beside engine/compiled.py as it is, for a wheel within seconds.
TORCH_CUDA_ARCH_LIST chooses the GPU architectures; without it: sm_80 (A100), sm_90 (H100, H200) and PTX for later.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Distribution, find_packages, setup

ARCHITECTURES = "8.0;9.0+PTX"
CPU_SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
CUDA_SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cu"))
REQUIRED = [
    "torch>=2.11",
    "numpy",
    "scipy",
    "h5py",
    "pillow",
    "omegaconf",
    "pyyaml",
    "jinja2",
    "lazy_loader",
    "safetensors",
    "scikit-learn",
    "tensorboard",
    "matplotlib",
    "tqdm",
]
EXTRAS = {
    "dali": ["nvidia-dali-cuda130"],
    "dali-cuda12": ["nvidia-dali-cuda120"],
    "horovod": ["horovod", "cloudpickle", "psutil", "mpi4py"],  # compiled; jobs/env/build_horovod.sh for today's torch
    "mpi": ["mpi4py"],
    "xray": ["torchxrayvision"],
    "dicom": ["pydicom"],
    "parquet": ["pyarrow"],
    "timm": ["timm"],
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
}
"""What some commands want besides; where it is missing they say so, or take torch.distributed and Pillow."""


@dataclass(frozen=True)
class CudaChoice:
    """Whether the CUDA kernel is built, and why."""

    build: bool
    home: str | None
    """Root of the toolkit, None without CUDA."""
    reason: str
    """One line for the person who builds."""


def toolkit_root(nvcc: str) -> str | None:
    """Root of the toolkit that `nvcc` belongs to, as nvcc itself reports it (a wrapper script may stand before it)."""
    answer = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, encoding="utf-8", errors="replace"
    )
    top = re.search(r"^#\$ TOP=(.+)$", answer.stderr, re.MULTILINE)
    return os.path.realpath(top.group(1).strip()) if top else None


def toolkit_version(nvcc: str) -> tuple[int, int] | None:
    """(major, minor) of `nvcc`."""
    answer = subprocess.run([nvcc, "--version"], capture_output=True, encoding="utf-8", errors="replace")
    found = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    return (int(found.group(1)), int(found.group(2))) if found else None


def find_nvcc(environ) -> str | None:
    """Path of nvcc: CUDA_HOME, CUDA_PATH, the search path, /usr/local/cuda, in this order."""
    roots = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    for candidate in [*(f"{root}/bin/nvcc" for root in roots), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    return None


def choose_cuda(environ, torch_cuda: str | None) -> CudaChoice:
    """What to build, from the environment and the CUDA version that torch was built with (None: a CPU-only torch).

    Raises SystemExit with a message where BOOSTERBIT_CUDA asks for what this machine cannot build.
    """
    wish = environ.get("BOOSTERBIT_CUDA", "").strip()
    if wish not in ("", "0", "1"):
        raise SystemExit(f"error: BOOSTERBIT_CUDA={wish!r}; it takes 1 (with CUDA), 0 (CPU only), or is left unset")
    if wish == "0":
        return CudaChoice(False, None, "BOOSTERBIT_CUDA=0")
    nvcc = find_nvcc(environ)
    problem = None
    home = version = None
    if nvcc is None:
        problem = "no nvcc in CUDA_HOME, on PATH, or in /usr/local/cuda"
        remedy = "load or install a CUDA toolkit (for example `module load CUDA`), or set CUDA_HOME to its root"
    elif torch_cuda is None:
        problem = "this torch is a CPU-only build"
        remedy = "install a torch with CUDA"
    else:
        home, version = toolkit_root(nvcc), toolkit_version(nvcc)
        remedy = f"use a toolkit of CUDA {torch_cuda.split('.')[0]}, or a torch built for the toolkit that is there"
        if home is None or version is None:
            problem = f"{nvcc} does not tell its toolkit or version"
        elif version[0] != int(torch_cuda.split(".")[0]):
            problem = f"nvcc is CUDA {version[0]}.{version[1]} and torch was built with CUDA {torch_cuda}"
    if problem is None:
        return CudaChoice(True, home, f"nvcc {version[0]}.{version[1]} in {home}, torch for CUDA {torch_cuda}")
    if wish == "1":
        raise SystemExit(
            f"error: BOOSTERBIT_CUDA=1, but {problem}.\n{remedy}; or build for the CPU only: BOOSTERBIT_CUDA=0"
        )
    return CudaChoice(False, None, problem)


def extension(choice: CudaChoice):
    """The extension module and its build command for `choice`."""
    if choice.build:
        os.environ["CUDA_HOME"] = choice.home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    # After CUDA_HOME is set: torch looks for the toolkit when this module is imported.
    from torch.utils import cpp_extension

    # -ffp-contract=off: login and compute nodes round alike, whichever vector width they have. -fno-math-errno: roots
    # are instructions, and so vectors of them; nobody asks for their errno.
    flags = {"cxx": ["-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall"]}
    sources, define = CPU_SOURCES, []
    kind = cpp_extension.CppExtension
    if choice.build:
        kind, sources, define = cpp_extension.CUDAExtension, CPU_SOURCES + CUDA_SOURCES, [("BOOSTERBIT_CUDA", "1")]
        flags["nvcc"] = ["-O3", "-Xptxas", "-warn-spills"]
    module = kind(
        "engine._C",
        sources,
        define_macros=define,
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
    )
    return module, cpp_extension.BuildExtension


class Compiled(Distribution):
    """One with a module that was compiled before: of this platform only."""

    def has_ext_modules(self) -> bool:
        """So that the wheel says for what it is."""
        return True


def main() -> None:
    """What setuptools runs."""
    os.chdir(Path(__file__).resolve().parent)
    options = {}
    built = sorted(Path("engine").glob("_C*.so")) if os.environ.get("BOOSTERBIT_BUILT") == "1" else []
    if built:
        options = {"distclass": Compiled}
    elif not {"egg_info", "dist_info", "--help", "--version", "--name"} & set(sys.argv):
        import torch

        choice = choose_cuda(os.environ, torch.version.cuda)
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        device = f"with CUDA ({architectures})" if choice.build else "CPU only"
        print(f"boosterbit: building engine._C {device}: {choice.reason}", flush=True)
        module, command = extension(choice)
        options = {"ext_modules": [module], "cmdclass": {"build_ext": command}}
    setup(
        name="boosterbit",
        version="0.1.0",
        description="High-throughput pre-training and transfer of BiT ResNets",
        python_requires=">=3.11",
        packages=[*find_packages(include=["engine*", "loaders*"]), "jobs", "jobs.env"],
        package_data={
            "": ["*.pyi", "py.typed"],
            "engine": [path.name for path in built],
            "engine.config": ["recipes/*/*.yaml"],
            "engine.page": ["page.*"],
            "jobs": ["*.yaml", "*.sh", "*.sbatch"],
            "jobs.env": ["*.sh", "*.txt"],
        },
        entry_points={"console_scripts": ["boosterbit = engine.cli:boosterbit"]},
        install_requires=REQUIRED,
        extras_require=EXTRAS,
        **options,
    )


if __name__ == "__main__":
    main()
