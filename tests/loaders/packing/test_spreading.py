"""Packing at scale: whole shards to processes, MPI ranks, going on after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from loaders import pack
from loaders.errors import UserError
from loaders.packing import spreading as packing
from loaders.packs.shard import Pack
from loaders.packs.writer import staged_path
from loaders.sources.listing import FileRange, Item, Listing, Table, TableBuilder, file_in_folder
from tests.support.pictures import encoded, folder, photo

ROOT = Path(__file__).parents[3]


def run(*words):
    return pack.main([str(word) for word in words])


def contents(path):
    opened = Pack.open(path)
    assert opened.verify() == []
    return {opened.keys[i]: (opened.record(i).tobytes(), int(opened.labels[i])) for i in range(len(opened))}


@pytest.mark.parametrize("options", [["--workers", "2", "--shards", "5"], ["--workers", "0", "--shards", "3"]])
def test_whole_shards_go_to_processes(tmp_path, options):
    files = folder(tmp_path / "images", per_class=5)
    (tmp_path / "images/cat/bad.jpg").write_bytes(b"no image")
    assert run(tmp_path / "images", tmp_path / "out.h5", "--skip-bad", *options) == 0
    found = contents(tmp_path / "out.h5")
    assert {key: data for key, (data, _) in found.items()} == files
    assert list(found) == sorted(found)


@pytest.mark.parametrize("shards", [1, 2, 5, 7, 11, 12])
def test_shards_hold_all_images_in_order_and_equally_many(tmp_path, shards):
    files = folder(tmp_path / "images", height=8, width=8)
    assert run(tmp_path / "images", tmp_path / "out.h5", "--workers", "0", "--shards", shards) == 0
    opened = Pack.open(tmp_path / "out.h5")
    assert list(opened.keys) == sorted(files)
    counts = np.diff([*opened.starts, len(opened)])
    assert len(counts) == shards
    assert set(counts.tolist()) <= {12 // shards, -(-12 // shards)}
    for i, key in enumerate(sorted(files)):
        assert opened.record(i).tobytes() == files[key]
    assert opened.image_bytes == opened.nbytes == sum(map(len, files.values()))


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [("--shards", [1, 12], [0, 13]), ("--workers", [0, 1], [-1]), ("--resize", [1], [0]),
     ("--quality", [1, 95], [0, 96]), ("--holdout", [0.01, 0.6], [0, 1])],
)  # fmt: skip
def test_options_at_the_ends_of_their_ranges(tmp_path, capsys, option, good, bad):
    folder(tmp_path / "images", height=8, width=8)
    words = [tmp_path / "images", tmp_path / "out.h5", "--force", *(["--part", "train"] if "hold" in option else [])]
    for value in good:
        assert run(*words, *([] if option == "--workers" else ["--workers", "0"]), option, value) == 0
    for value in bad:
        assert run(*words, option, value) == 2
        assert option in capsys.readouterr().err.replace("fill 13 shards", "--shards")


@pytest.mark.parametrize("wrong", [{"shards": 0}, {"workers": -1}, {"resize": 0}, {"quality": 0}, {"quality": 96}])
def test_options_beyond_their_ranges_are_refused_from_python_too(tmp_path, wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        packing.pack("sklearn:digits", tmp_path / "d.h5", packing.Options(**wrong))


@pytest.mark.parametrize("ranks", [2, 3])
def test_mpi_ranks_share_the_shards(tmp_path, launch, ranks):
    files = folder(tmp_path / "images", per_class=5)
    (tmp_path / "images/cat/bad.jpg").write_bytes(b"no image")
    words = ["-m", "loaders.pack", tmp_path / "images", tmp_path / "out.h5", "--mpi", "--shards", "5", "--workers", "1"]
    done = launch(ranks, "mpirun", words)
    assert done.returncode == 1, done.stderr  # one bad file
    assert done.stderr.count("cat/bad.jpg") == 1
    assert done.stdout.count("verified") == 1
    assert {key: data for key, (data, _) in contents(tmp_path / "out.h5").items()} == files
    assert not list(tmp_path.glob(".*"))
    refused = launch(ranks, "mpirun", words)
    assert refused.returncode == 2
    assert refused.stderr.count("--force") == 1


def _places(tmp_path):
    return [str(tmp_path / "images"), str(tmp_path / "out.h5")]


WAITS = """
import sys, time
from loaders import pack
from loaders.sources.listing import FileRange
read = FileRange.read
FileRange.read = lambda self: time.sleep(600) if self.path == sys.argv[1] else read(self)
sys.exit(pack.main(sys.argv[2:]))
"""


def killed(tmp_path, shards):
    """Pack a folder whose 10th image never comes, until the shards before it are finished; then kill -9."""
    files = folder(tmp_path / "images", per_class=4)
    slow = tmp_path / "images" / sorted(files)[9]
    words = ["-c", WAITS, str(slow), *_places(tmp_path), "--shards", str(shards), "--workers", "0"]
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, start_new_session=True)
    before = 9 * shards // 12
    ready = [staged_path(tmp_path / f"out-{k:05d}-of-{shards:05d}.h5") for k in range(before)]
    deadline = time.monotonic() + 300
    while not all(path.exists() for path in ready):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return files, ready


@pytest.mark.parametrize("ranks", [1, 2])
def test_after_a_kill_finished_shards_are_kept(tmp_path, launch, ranks):
    files, ready = killed(tmp_path, 6)
    assert not list(tmp_path.glob("out*"))  # nothing under its own name
    before = [path.stat().st_ino for path in ready]
    words = ["-m", "loaders.pack", *_places(tmp_path), "--shards", "6", "--workers", "0"]
    again = launch(ranks, "mpirun", [*words, "--mpi"])
    assert again.returncode == 0, again.stderr
    assert "4 of 6 shards were finished before" in again.stdout
    after = [(tmp_path / f"out-{k:05d}-of-00006.h5").stat().st_ino for k in range(len(ready))]
    assert after == before
    assert {key: data for key, (data, _) in contents(tmp_path / "out.h5").items()} == files
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("change", ["--restart", "--resize", "source", "truncated", "shards"])
def test_shards_of_another_packing_are_not_kept(tmp_path, capsys, change):
    _, ready = killed(tmp_path, 6)
    options = {"--restart": ["--restart"], "--resize": ["--resize", 20]}.get(change, [])
    if change == "source":
        (tmp_path / "images/cat/new.png").write_bytes(encoded(photo(77), "PNG"))
    if change == "truncated":
        os.truncate(ready[0], 700)
    shards = 2 if change == "shards" else 6
    assert run(*_places(tmp_path), "--shards", shards, "--workers", 0, *options) == 0
    said = capsys.readouterr().out
    assert ("3 of 6 shards" in said) == (change == "truncated")
    assert "4 of 6" not in said
    assert len(contents(tmp_path / "out.h5")) == 12 + (change == "source")
    assert not list(tmp_path.glob(".*"))


def test_shuffled_packs_hold_the_same_in_an_order_without_classes(tmp_path):
    folder(tmp_path / "images", per_class=40, height=8, width=8)
    for name, options in (("plain", []), ("mixed", ["--shuffle"]), ("again", ["--shuffle", "--shards", "3"])):
        assert run(tmp_path / "images", tmp_path / f"{name}.h5", *options) == 0
    plain, mixed, again = (contents(tmp_path / f"{name}.h5") for name in ("plain", "mixed", "again"))
    assert plain == mixed == again
    assert list(mixed) == list(again) != list(plain)
    labels = np.array([label for _, label in mixed.values()])
    assert np.count_nonzero(np.diff(labels)) > 60  # in order of class: 2


def test_a_table_gives_back_its_items_in_few_bytes():
    builder = TableBuilder(file_in_folder)
    for i in range(20_000):
        builder.add(f"class {i % 7}/{i:05d}.jpg", i % 7, f"/data/class {i % 7}", group=i // 2)
    table = builder.table()
    assert len(table) == 20_000
    expected = sorted((f"class {i % 7}/{i:05d}.jpg", i) for i in range(20_000))
    for at in (0, 1, 9_999, 19_999, -1):
        key, i = expected[at]
        assert table[at] == Item(key, FileRange(f"/data/{key}"), i % 7, i // 2)
    assert [item.key for item in table[5:8]] == [key for key, _ in expected[5:8]]
    columns = [table.keys, table.labels, table.groups, *table._where]
    assert sum(column.nbytes for column in columns) / len(table) <= 36 + table.keys.itemsize
    items = [Item("b", FileRange("x"), (1.0, 0.0)), Item("c", FileRange("y", 3, 4), (0.0, 1.0), 5)]
    assert list(Listing(items, ("p", "q")).table) == items
    assert list(Table.of(items).take(np.array([1]))) == items[1:]


def test_many_bad_files_are_all_remembered(tmp_path, capsys):
    """More names than HDF5 keeps in an object's header: 64 KiB."""
    folder(tmp_path / "images", per_class=1)
    for i in range(1500):
        (tmp_path / f"images/cat/{i:040d}.jpg").write_bytes(b"no image")
    assert run(tmp_path / "images", tmp_path / "out.h5", "--workers", 0) == 1
    assert capsys.readouterr().err.count("bad: cat/0") == 1500
    assert len(contents(tmp_path / "out.h5")) == 3
