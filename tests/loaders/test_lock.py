import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from loaders import lock, pack
from loaders.errors import UserError
from loaders.lock import InUse, Lock
from tests.conftest import ROOT
from tests.support.pictures import folder

HOLDS = "import sys, time\nfrom pathlib import Path\nfrom loaders.lock import held\n"
HOLDS += "with held(Path(sys.argv[1]), 'a', 'wait'):\n    print('held', flush=True)\n    time.sleep(60)"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "lock"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "SILENT_S", 0.5)


def one(path):
    return Lock(path, "the run", "wait for it")


def holder(path):
    process = subprocess.Popen([sys.executable, "-c", HOLDS, path], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_is_there_and_one_that_was_killed_is_not_in_the_way(path):
    process = holder(path)
    said = rf"the run is in use since 20\d\d-\S+ by process {process.pid} on \S+ \(-c .*\); wait for it"
    for wait in (True, False):
        with pytest.raises(InUse, match=said):
            one(path).take(wait)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(InUse):
        one(path).take()  # it may go on
    process.kill()
    process.wait()
    assert path.exists()
    mine = one(path)
    mine.take()
    mine.release()
    assert not list(path.parent.iterdir())


def test_a_process_whose_number_another_has_now_is_gone(path):
    path.parent.mkdir()
    path.write_text(json.dumps(lock._me() | {"started": 1}))
    one(path).take(wait=False)


@pytest.mark.parametrize("elsewhere", [{"host": "n2"}, {"boot": "b"}, {"space": "pid:[1]"}, None])
def test_one_of_another_host_counts_as_gone_after_silence_only(path, short, capsys, elsewhere):
    path.parent.mkdir()
    path.write_text("{" if elsewhere is None else json.dumps(lock._me() | elsewhere))
    with pytest.raises(InUse, match="somebody unknown" if elsewhere is None else "by process"):
        one(path).take(wait=False)
    living = threading.Event()

    def beats():
        while not living.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beats)
    thread.start()
    with pytest.raises(InUse):
        one(path).take()
    living.set()
    thread.join()
    mine = one(path)
    mine.take()
    assert "for a sign of life" in capsys.readouterr().err
    assert not mine.lost()


def test_a_holder_touches_its_file_and_notices_when_it_is_anothers(path, short):
    mine = one(path)
    mine.take()
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before:
        time.sleep(0.01)
    path.write_text(json.dumps(lock._me()))
    assert mine.lost()
    touched = path.stat().st_mtime_ns
    time.sleep(0.2)
    assert path.stat().st_mtime_ns == touched
    mine.release()
    assert path.exists()


def test_of_many_that_find_a_left_over_lock_one_takes_it(path):
    """Each tries once; those that come when it has been released take it too, one after the other."""
    path.parent.mkdir()
    path.write_text(json.dumps(lock._me() | {"started": 1}))
    inside, most, told = [], [], []

    def tries():
        mine = one(path)
        try:
            mine.take()
        except InUse:
            told.append(1)
            return
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        mine.release()

    threads = [threading.Thread(target=tries) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(most) + len(told) == 16


ONE_OF_MANY = """
import os, sys, time
from pathlib import Path
from loaders.lock import InUse, Lock
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40):
    mine = Lock(folder / "lock", "a", "b")
    try:
        mine.take()
    except InUse:
        continue
    os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
    time.sleep(0.002)
    os.unlink(folder / "inside")
    if os.urandom(1)[0] < 64:
        os._exit(0)  # as if killed
    mine.release()
"""


def test_processes_that_take_it_and_are_killed_in_it_are_never_two_inside(tmp_path):
    words = [sys.executable, "-c", ONE_OF_MANY, tmp_path]
    processes = [subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(8)]
    for each in processes:
        assert each.stdout.readline() == b"ready\n"
    for each in processes:
        each.stdin.close()
    assert [each.wait() for each in processes] == [0] * 8
    one(tmp_path / "lock").take()
    assert [each.name for each in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_one_that_was_killed_while_it_took_a_left_over_lock_is_not_in_the_way(path, depth):
    path.parent.mkdir()
    place = path
    for number in range(depth + 1):
        content = json.dumps(lock._me() | {"started": 1, "one": str(number)}).encode()
        place.write_bytes(content)
        (path.parent / f"{path.name}.{number}{lock._NEW}").write_bytes(content)
        place = lock._turn(place, content)
    mine = one(path)
    mine.take()
    assert [each.name for each in path.parent.iterdir()] == ["lock"]
    mine.release()
    assert not list(path.parent.iterdir())


def test_one_whose_turn_it_is_to_take_a_left_over_lock_has_it(path):
    path.parent.mkdir()
    left = json.dumps(lock._me() | {"started": 1}).encode()
    path.write_bytes(left)
    lock._turn(path, left).write_text(json.dumps(lock._me()))
    with pytest.raises(InUse, match=f"by process {os.getpid()}"):
        one(path).take()
    assert path.read_bytes() == left


def test_file_systems_without_links(path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    mine = one(path)
    mine.take()
    with pytest.raises(InUse):
        one(path).take()
    mine.release()
    assert not list(path.parent.iterdir())


def test_a_place_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(UserError, match="link is a link to nothing"):
        one(tmp_path / "link").take()
    with pytest.raises(UserError, match=r"the run cannot be locked: \S+file/lock"):
        one(tmp_path / "file" / "lock").take()


def test_two_packings_to_one_place(tmp_path, capsys):
    folder(tmp_path / "images", per_class=2)
    words = [str(tmp_path / "images"), str(tmp_path / "out.h5"), "--workers", "0"]
    process = holder(tmp_path / ".out.h5.lock")
    (tmp_path / ".out.h5.partial").write_text("the other's")
    assert pack.main(words) == 2
    assert "out.h5 is in use since 20" in capsys.readouterr().err
    assert (tmp_path / ".out.h5.partial").read_text() == "the other's"
    process.kill()
    process.wait()
    assert pack.main(words) == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["images", "out.h5"]
