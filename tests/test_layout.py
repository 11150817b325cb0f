"""One way through the code: which part may know of which."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("engine", "loaders", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TOP_LEVEL = {"setup.py", "csrc", "engine", "loaders", "bench", "jobs", "tests", "README.md", "docs",
             "Makefile", "pyproject.toml", ".ci", ".gitignore", "LICENSE"}  # fmt: skip
ONLY_IN = {
    "horovod": {"engine.comm.communicator"},
    "nvidia": {"loaders.pipelines.dali", "bench.peers.loaders"},
    "h5py": {"loaders.packs.hdf5", "loaders.packs.shard"},
    "mpi4py": {"loaders.packing.ranks", "engine.comm.communicator"},
    "torchxrayvision": {"loaders.sources.kinds.xray.labels", "bench.peers.xray"},
}


def imports(name, everywhere=True):
    """Modules that `name` imports: anywhere, or only at import time, where a cycle would matter."""
    found = set()
    tree = ast.parse(MODULES[name].read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import hides what depends on what"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_loaders_know_nothing_of_the_engine():
    for name in MODULES:
        if name.startswith("loaders"):
            assert not {target for target in imports(name) if target.split(".")[0] in ("engine", "bench")}, name


def test_the_engine_knows_nothing_of_the_benchmarks():
    for name in MODULES:
        if name.startswith("engine"):
            assert not {target for target in imports(name) if target.split(".")[0] == "bench"}, name


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_named_in_its_own_place_only(library):
    users = {name for name in MODULES if any(target.split(".")[0] == library for target in imports(name))}
    assert users <= ONLY_IN[library]


def test_there_are_no_import_cycles():
    graph = {name: imports(name) & set(MODULES) for name in MODULES}
    done, path = set(), []

    def visit(name):
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in sorted(graph[name]):
            visit(target)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("name", MODULES)
def test_modules_stay_small(name):
    assert len(MODULES[name].read_text().splitlines()) <= 300


def test_the_top_level_is_what_was_agreed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: the tree's own files cannot be told from others")
    assert {path.split("/")[0] for path in listed.stdout.splitlines()} <= TOP_LEVEL
