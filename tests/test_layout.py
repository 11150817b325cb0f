"""One way through the code: which part may know of which."""

import ast
import re
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("engine", "loaders", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TOP_LEVEL = {"setup.py", "csrc", "engine", "loaders", "bench", "jobs", "tests", "README.md", "docs",
             "Makefile", "pyproject.toml", ".ci", ".gitignore", ".pre-commit-config.yaml", "LICENSE"}  # fmt: skip
ONLY_IN = {
    "horovod": {"engine.comm.horovod"},
    "nvidia": {"loaders.pipelines.dali", "bench.peers.loaders"},
    "h5py": {"loaders.packs.hdf5", "loaders.packs.shard"},
    "mpi4py": {"loaders.packing.ranks", "engine.comm.horovod"},
    "torchxrayvision": {"loaders.sources.kinds.xray.labels", "bench.peers.xray"},
}
ROOMS = {
    # room: the rooms that it may import from; `FOR_ALL` are for all
    "loaders.sources.wire": set(),
    "loaders.sources.kinds.xray": {"loaders.sources"},
    "loaders.sources.kinds": {"loaders.sources", "loaders.sources.wire", "loaders.sources.kinds.xray"},
    "loaders.sources": set(),
    "loaders.packs": {"loaders.sources"},
    "loaders.packing": {"loaders.packs", "loaders.sources", "loaders.sources.kinds"},
    "loaders.pipelines": {"loaders.packs"},
    "engine.config": set(),
    "engine.network": set(),
    "engine.comm": set(),
    "engine.optim": {"engine.network", "engine.comm"},
    "engine.training": {"engine.config", "engine.network", "engine.optim", "engine.comm", "loaders.packs",
                        "loaders.pipelines"},
    "engine.transfer": {"engine.config", "engine.network", "engine.comm", "engine.training", "loaders.packs",
                        "loaders.pipelines"},
    "bench.model": {"engine.config", "engine.network"},
    "bench.measured": {"bench.model", "bench.peers", "engine.comm", "engine.network", "engine.optim",
                       "engine.training", "loaders.packs", "loaders.pipelines", "loaders.sources"},
    "bench.peers": {"loaders.packing", "loaders.packs", "loaders.pipelines"},
    "bench.paper": {"engine.transfer"},
}  # fmt: skip
"""The rooms, and what each may know of. The commands at the top of engine, loaders, bench and jobs may know of all."""
FOR_ALL = {"engine.compiled", "engine.whole", "loaders.errors"}
COMMANDS = {"engine", "loaders", "bench", "jobs"}
MOST_FILES = 14


def imports(name):
    """Modules that `name` imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
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


def room_of(name):
    """The folder of a module, as a dotted name."""
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_of_the_rooms_below_it(room):
    for name in MODULES:
        if room_of(name) != room:
            continue
        known = {target for target in imports(name) if target in MODULES} - FOR_ALL - COMMANDS
        strange = {target for target in known if room_of(target) not in ROOMS[room] | {room}}
        assert not strange, f"{name} imports {sorted(strange)}"


def test_there_is_no_cycle_between_rooms():
    order = TopologicalSorter(ROOMS).static_order()  # raises CycleError
    assert set(order) == set(ROOMS)


def test_every_folder_is_a_room():
    assert {room_of(name) for name in MODULES} == {*ROOMS, *COMMANDS - {"jobs"}}


def test_a_room_says_what_it_is_for_and_holds_about_a_dozen_files():
    for room in {*ROOMS, *COMMANDS - {"jobs"}}:
        inside = [name for name in MODULES if room_of(name) == room]
        assert len(inside) <= MOST_FILES, f"{room}: {len(inside)} files"
        assert ast.get_docstring(ast.parse(MODULES[room].read_text())), room


@pytest.mark.parametrize("name", MODULES)
def test_modules_stay_small(name):
    assert len(MODULES[name].read_text().splitlines()) <= 300


def test_the_page_of_the_architecture_names_what_is_there():
    """A path from the root, or one in or beside a folder that the same line names before it."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set()
    for line in page.splitlines():
        folders = [ROOT]
        for path in re.findall(r"`([\w./]+(?:/|\.(?:py|yaml|cpp|h|txt|md)))`", line):
            place = next((folder / path for folder in folders if (folder / path).exists()), None)
            assert place, f"{path}, in: {line}"
            if place.is_dir():
                folders += [place, place.parent]
                named.add(".".join(place.relative_to(ROOT).parts))
    assert named >= set(ROOMS)


def test_the_top_level_is_what_was_agreed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: the tree's own files cannot be told from others")
    assert {path.split("/")[0] for path in listed.stdout.splitlines()} <= TOP_LEVEL
