"""A pack that is cut off, replaced or removed while a job reads it."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes
from tests.conftest import ROOT
from tests.support.pictures import encoded, photo

READ = """
import os, sys
from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.pipelines.batches import eval_batches
from loaders.pipelines.order import EvalPlan
from loaders.pipelines.transform import natural_eval
import numpy as np
pack = Pack.open(sys.argv[1])
for batch in eval_batches(pack, EvalPlan(np.arange(len(pack)), batch=4), natural_eval(32), backend="host",
                          threads=1, prefetch=1):
    print("batch", flush=True)
    os.truncate(sys.argv[1], 4096)
"""


IN_FLIGHT = """
import os, sys
from loaders.packs.shard import Pack
from loaders.pipelines.bad import BadRecords
path, backend, looks = sys.argv[1:]
Pack.check_files = lambda *_: None  # it was as it should be, a moment ago
if looks == "no":
    BadRecords.look = lambda *_: None
from loaders.pipelines.batches import eval_batches
from loaders.pipelines.order import EvalPlan
from loaders.pipelines.transform import natural_eval
import numpy as np
pack = Pack.open(path)
batches = eval_batches(pack, EvalPlan(np.arange(len(pack)), batch=4), natural_eval(32), backend=backend, threads=2,
                       prefetch=2)
next(batches)
os.truncate(path, 4096)
for batch in batches:
    pass
print("read what is not there")
"""
BUS_ERROR = """
import faulthandler, os, sys
from loaders.packs.mapped import map_file
faulthandler.enable()
array = map_file(sys.argv[1])
os.rename(sys.argv[1], sys.argv[1] + ".other")
os.truncate(sys.argv[1] + ".other", 0)
array.sum()
"""

MANY_AT_ONCE = """
import os, sys, threading
from loaders.packs.mapped import map_file
arrays = [map_file(path) for path in sys.argv[1:]]
start = threading.Barrier(16)

def read(array):
    start.wait()
    array[-4096:].tobytes()  # holding the GIL
    array.sum()              # without

for path in sys.argv[1:]:
    os.truncate(path, 0)
for k in range(16):
    threading.Thread(target=read, args=(arrays[k % len(arrays)],)).start()
"""


def write(path, records):
    with ShardWriter(path, ["a"], new_attributes({}, 1)[0]) as writer:
        for k in range(records):
            writer.add(Record(encoded(photo(k), "PNG"), f"{k}", 0, 40, 60))
        writer.finish()
        writer.publish()
    return path


def test_a_pack_that_is_cut_off_under_a_job_ends_it_with_a_message(tmp_path):
    path = write(tmp_path / "a.h5", 40)
    done = subprocess.run([sys.executable, "-c", READ, path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("batch")
    assert done.returncode == 1, (done.returncode, done.stderr[-800:])  # not killed by SIGBUS
    assert "a.h5 is shorter or longer now (4,096 bytes, before" in done.stderr


@pytest.mark.parametrize("looks", ["yes", "no"], ids=["by us", "by the decoder"])
@pytest.mark.parametrize("backend", ["host", "dali"])
def test_a_pack_that_is_cut_off_while_a_batch_is_read_ends_the_process_with_a_message(tmp_path, backend, looks):
    """Between the look at the file and the reading; by the decoder: in its threads."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    path = write(tmp_path / "a.h5", 60)
    done = subprocess.run([sys.executable, "-c", IN_FLIGHT, path, backend, looks], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 2, (done.returncode, done.stderr[-800:])
    assert f"error: the pack {path} is shorter now (4,096 bytes, before" in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr and "Fatal" not in done.stderr


def test_many_threads_that_read_what_is_gone_end_the_process_with_one_message(tmp_path):
    """The first that comes must not give the signal back while others are on their way: that would be a kill."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for _ in range(10):
        for path in paths:
            path.write_bytes(bytes(1 << 20))
        done = subprocess.run([sys.executable, "-c", MANY_AT_ONCE, *paths], cwd=ROOT, capture_output=True, text=True,
                              timeout=300)  # fmt: skip
        assert done.returncode == 2, (done.returncode, done.stderr[-800:])
        assert done.stderr.count("is shorter now (0 bytes, before 1,048,576)") == 1 == done.stderr.count("\n")


def test_another_bus_error_is_left_to_who_was_there_before(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(9000))
    done = subprocess.run(
        [sys.executable, "-c", BUS_ERROR, path], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGBUS and "Fatal Python error: Bus error" in done.stderr


def cut_off(path):
    os.truncate(path, path.stat().st_size - 1)


def longer(path):
    with open(path, "ab") as file:
        file.write(b"x")


def replaced(path):
    shutil.copy(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


@pytest.mark.parametrize(
    ("change", "said"),
    [(cut_off, "shorter or longer"), (longer, "shorter or longer"), (replaced, "another file"),
     (os.unlink, "cannot be looked at any more: No such file")],
)  # fmt: skip
def test_what_became_of_the_file_is_told(tmp_path, change, said):
    pack = Pack.open([write(tmp_path / "a.h5", 2), write(tmp_path / "b.h5", 3)])
    pack.check_files(np.arange(5))
    change(tmp_path / "b.h5")
    pack.check_files(np.array([0, 1]))  # of the other file
    with pytest.raises(UserError, match=rf"b\.h5 .*{said}"):
        pack.check_files(np.array([0, 2]))
