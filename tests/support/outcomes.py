"""Records of what damage did: the facts that each has, in docs/results/."""

import json
import os
import platform
import resource
import shlex
import subprocess
import sys
from importlib import metadata

from engine.monitoring.metrics import processor
from tests.conftest import ROOT

_PACKAGES = ("torch", "nvidia-dali-cuda130", "horovod", "h5py", "hypothesis")


def commit():
    """Of this tree, "-dirty" where it was changed since."""
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip()


def peak_mib():
    """Largest memory of this process or any that it waited for, MiB, shared pages included."""
    return round(
        max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    )


def record(path, begun_at, n, seed, **found):
    """Print a record, and write it to `path` (or nowhere: None); `begun_at`: the commit that was tested."""
    words = [word for k, word in enumerate(sys.argv) if k and "--json" not in sys.argv[k - 1 : k + 1]]
    there = {d.metadata["Name"] for d in metadata.distributions()}
    facts = {
        **found,
        "n": n,
        "seed": seed,
        "spread": f"counts of one run, seed {seed}",
        "command": shlex.join(["python", "-m", _module(), *words]),
        "commit": begun_at,
        "hardware": {"cpu": processor(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version()} | {n: metadata.version(n) for n in _PACKAGES if n in there},
        "supports": ["reliability"],
    }
    print(json.dumps(facts, indent=1))
    if path:
        path.write_text(json.dumps(facts, indent=1) + "\n")


def _module():
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]
