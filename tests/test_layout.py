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
    "h5py": {"loaders.packs.file", "loaders.packs.hdf5"},
    "mpi4py": {"loaders.packing.ranks", "engine.comm.horovod"},
    "pyarrow": {"engine.predicting.parquet"},
    "onnxruntime": {"engine.exporting.onnx_file"},
    "pynvml": {"engine.monitoring.gpu"},
    "torchxrayvision": {"loaders.sources.kinds.xray.labels", "bench.peers.xray"},
    "pydicom": {"loaders.sources.kinds.dicom.reading", "bench.peers.dicom"},
}
ROOMS = {
    # room: the rooms that it may import from; `FOR_ALL` are for all
    "loaders.sources.wire": set(),
    "loaders.sources.kinds.xray": {"loaders.sources"},
    "loaders.sources.kinds.dicom": {"loaders.sources"},
    "loaders.sources.kinds": {"loaders.sources", "loaders.sources.wire", "loaders.sources.kinds.xray",
                              "loaders.sources.kinds.dicom"},
    "loaders.sources": set(),
    "loaders.packs": {"loaders.sources"},
    "loaders.packing": {"loaders.packs", "loaders.sources", "loaders.sources.kinds"},
    "loaders.pipelines": {"loaders.packs"},
    "engine.config": set(),
    "engine.network": set(),
    "engine.comm": set(),
    "engine.optim": {"engine.network", "engine.comm"},
    "engine.statistics": set(),
    "engine.saving": {"engine.network", "engine.comm"},
    "engine.monitoring": {"engine.comm"},
    "engine.tuning": {"engine.network", "engine.comm", "engine.optim"},
    "engine.training": {"engine.config", "engine.network", "engine.optim", "engine.comm", "engine.saving",
                        "engine.monitoring", "engine.statistics", "engine.tuning", "loaders.packs",
                        "loaders.pipelines"},
    "engine.transfer": {"engine.config", "engine.network", "engine.comm", "engine.monitoring", "engine.training",
                        "loaders.packs", "loaders.pipelines"},
    "engine.page": {"engine.config", "engine.monitoring", "engine.training", "engine.transfer", "loaders.packs",
                    "loaders.pipelines"},
    "bench.model": {"engine.config", "engine.network", "engine.page"},
    "engine.predicting": {"engine.comm", "engine.network", "engine.monitoring", "engine.saving", "engine.training",
                          "loaders.packing", "loaders.packs", "loaders.pipelines", "loaders.sources"},
    "engine.exporting": {"engine.network", "engine.predicting", "loaders.packs", "loaders.pipelines"},
    "engine.evaluating": {"engine.monitoring", "engine.predicting", "engine.statistics"},
    "bench.measured": {"bench.model", "bench.peers", "engine.comm", "engine.monitoring", "engine.network",
                       "engine.optim", "engine.saving", "engine.training", "loaders.packs", "loaders.pipelines",
                       "loaders.sources"},
    "bench.disturbed": {"bench.measured", "engine.comm", "engine.monitoring", "engine.network", "engine.optim",
                        "engine.saving", "engine.training", "loaders.pipelines"},
    "bench.peers": {"loaders.packing", "loaders.packs", "loaders.pipelines"},
    "bench.paper": {"engine.transfer"},
}  # fmt: skip
"""The rooms, and what each may know of. The commands at the top of engine, loaders, bench and jobs may know of all."""
FOR_ALL = {"engine.compiled", "engine.whole", "loaders.arguments", "loaders.errors", "loaders.lock", "loaders.output"}
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


JOBS = {f"jobs.{name}": ROOT / "jobs" / f"{name}.py" for name in ("submit", "supervise")}
PRODUCT = {**MODULES, **JOBS, "setup": ROOT / "setup.py"}
OPENERS = {"open": 1, "read_text": None, "write_text": None, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0}
"""What opens text files → which of its arguments is the mode (one earlier for the method of a path)."""
OTHERS = {"Pack", "Image", "PIL", "os", "tarfile", "lmdb", "archive"}  # whose `open` opens no text


def without_encoding(tree):
    """Line numbers of calls that read or write text in whatever encoding the locale has."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        name, on = (
            (node.func.attr, node.func.value)
            if isinstance(node.func, ast.Attribute)
            else (getattr(node.func, "id", ""), None)
        )
        if "text" in given or "universal_newlines" in given:  # of subprocess, which takes an encoding instead
            yield node.lineno
        if name not in OPENERS or "encoding" in given or (name == "open" and getattr(on, "id", "") in OTHERS):
            continue
        place = OPENERS[name]
        if place is not None and name == "open" and on is not None:
            place = 0
        found = given.get("mode", node.args[place] if place is not None and len(node.args) > place else None)
        if not (isinstance(found, ast.Constant) and "b" in str(found.value)):
            yield node.lineno


@pytest.mark.parametrize("name", PRODUCT)
def test_text_files_are_utf_8_whatever_the_locale_says(name):
    assert list(without_encoding(ast.parse(PRODUCT[name].read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("code", "fine"),
    [
        ("open(a)", False), ("open(a, 'w')", False), ("open(a, mode='a')", False), ("open(a, 'rb')", True),
        ("path.open()", False), ("path.open('wb')", True), ("path.read_text()", False), ("os.fdopen(n, 'w')", False),
        ("p.write_text(t, encoding='utf-8')", True), ("run(words, text=True)", False), ("Image.open(path)", True),
    ],
)  # fmt: skip
def test_text_without_an_encoding_is_found(code, fine):
    assert fine is not bool(list(without_encoding(ast.parse(code))))


def test_every_command_prints_on_any_terminal():
    """Its `main` runs in `as_command`, alone under `if __name__ == "__main__"` but for signals."""
    commands = {name: path.read_text(encoding="utf-8") for name, path in PRODUCT.items() if name != "setup"}
    commands = {name: text for name, text in commands.items() if '__name__ == "__main__"' in text}
    assert len(commands) > 10
    assert [name for name, text in commands.items() if not text.endswith("    as_command(main)\n")] == []
