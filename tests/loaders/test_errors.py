"""What the system refuses is told as what it is, and is not called damage; the refusals are the system's own."""

import errno
import os
import struct
from pathlib import Path

import h5py
import pytest
from scipy.io import savemat

from loaders import pack, view
from loaders.errors import SystemRefusal, UserError, in_words, is_passing, told
from loaders.packs.shard import Pack
from loaders.sources.listing import FileRange
from tests.support import pictures, refusals
from tests.support.packing import run

BLAME = ("damage", "pack it again", "download", "not a pack", "does not decode", "truncated", "complete?")


def test_errors_in_words(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "there.h5")
    assert in_words(full) == "there.h5: No space left on device (free some, or name another place)"
    assert in_words(full, "writing there.h5") == "No space left on device (free some, or name another place)"
    assert in_words(OSError(errno.EXDEV, "Cross-device link", "a", None, "b")).startswith("a → b: ")
    assert in_words(UserError("as it is")) == in_words(OSError("as it is")) == "as it is"
    assert "ulimit -n" in in_words(OSError(errno.EMFILE, "Too many open files"))
    with pytest.raises(SystemRefusal, match="x cannot be read: Stale file handle"), told("x cannot be read"):
        raise OSError(errno.ESTALE, "Stale file handle", "x")
    with pytest.raises(OSError, match="of a library"), told("x"):
        raise OSError("of a library")
    assert is_passing(OSError(errno.ESTALE, "")) and not is_passing(OSError(errno.ENOENT, ""))


def csv_table(root):
    (root / "list.csv").write_text("path,label\ncat/0.jpg,cat\n")
    return root / "list.csv"


def tar(root):
    pictures.tar_of(root / "images.tar", {"cat/0.jpg": b"x"})
    return root / "images.tar"


def tfrecord(root):
    (root / "a.tfrecord").write_bytes(struct.pack("<Q", 0) + b"\0" * 8)
    return root / "a.tfrecord"


def cifar(root):
    (root / "cifar").mkdir()
    (root / "cifar/test_batch.bin").write_bytes(bytes(3073))
    (root / "cifar/batches.meta.txt").write_text("a\n")
    return root / "cifar"


def flowers(root):
    (root / "flowers/jpg").mkdir(parents=True)
    for name in ("imagelabels", "setid"):
        savemat(root / f"flowers/{name}.mat", {"labels": [1]})
    return root / "flowers"


def pets(root):
    for place in ("images", "annotations"):
        (root / "pets" / place).mkdir(parents=True)
    for part in ("trainval", "test"):
        (root / f"pets/annotations/{part}.txt").write_text("a_1 1 1 1\n")
    return root / "pets"


def folder(root):
    pictures.folder(root / "images", per_class=1)
    return root / "images"


def covidx(root):
    (root / "covidx").mkdir()
    for part in ("train", "test"):
        (root / f"covidx/{part}.txt").write_text("1 a.png positive x\n")
    return f"xray:covidx:{root / 'covidx'}"


SOURCES = (csv_table, tar, tfrecord, cifar, flowers, pets, folder, covidx)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("refusal", ["descriptors", "permission"])
def test_a_source_that_may_not_be_read(tmp_path, capsys, source, refusal):
    place = source(tmp_path)
    run("sklearn:digits", tmp_path / "warm.h5", "--workers", "0", "--classes", "0", "--part", "test")  # imports
    listing = place if source is not covidx else tmp_path / "covidx/train.txt"
    capsys.readouterr()
    if refusal == "descriptors":
        with refusals.no_descriptor_left():
            code = run(place, tmp_path / "out.h5", "--workers", "0")
        said = "Too many open files"
    else:
        with refusals.no_permission(listing):
            code = run(place, tmp_path / "out.h5", "--workers", "0")
        said = "Permission denied"
    err = capsys.readouterr().err
    assert code == 2 and said in err and "Traceback" not in err
    assert not any(word in err for word in BLAME), err
    assert not (tmp_path / "out.h5").exists()


def made_pack(path, shards=1):
    run("sklearn:digits", path, "--workers", "0", "--classes", "0,1", "--part", "test", "--shards", shards)
    return path


@pytest.mark.parametrize("refusal", [refusals.no_descriptor_left, refusals.no_permission, refusals.locked])
@pytest.mark.parametrize("command", ["verify", "info", "view"])
def test_a_pack_that_may_not_be_read_is_not_called_damaged(tmp_path, capsys, refusal, command):
    path = made_pack(tmp_path / "a.h5")
    words = [command, str(path)] if command != "view" else [str(path), "--backend", "host", "--out", os.devnull]
    program = view if command == "view" else pack
    if command == "view":
        view.main(words)  # imports
    capsys.readouterr()
    with refusal(*(() if refusal is refusals.no_descriptor_left else (path,))):
        code = program.main(words)
    err = capsys.readouterr().err
    expected = {"no_descriptor_left": "ulimit -n", "no_permission": "Permission denied", "locked": "lock"}
    assert code == 2 and expected[refusal.__name__] in err and str(path) in err
    assert not any(word in err for word in BLAME), err


@pytest.mark.parametrize("chunked", [False, True])
def test_no_descriptor_is_kept_for_a_shard(tmp_path, chunked):
    """With room for few files, a pack of many shards is opened and read; nothing of it stays open."""
    path = made_pack(tmp_path / "a.h5", shards=24)
    whole = [Pack.open(path).record(i).tobytes() for i in range(0, 72, 2)]
    for shard in sorted(tmp_path.glob("a-*")) if chunked else ():
        with h5py.File(shard, "r+") as file:
            data = file["images/bytes"][...]
            del file["images/bytes"], file["index_crc32"]
            file.create_dataset("images/bytes", data=data, chunks=True)
    with refusals.no_descriptor_left(spare=19):
        opened = Pack.open(path)
        assert [opened.record(i).tobytes() for i in range(0, 72, 2)] == whole
    names = [link.readlink().name for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert sum(name.startswith("a-000") for name in names) <= (16 if chunked else 0)


def test_mapped_memory_is_given_back(tmp_path):
    path = made_pack(tmp_path / "a.h5")
    maps = lambda: Path("/proc/self/maps").read_text().count(str(path))  # noqa: E731
    opened = Pack.open(path)
    kept = opened.record(3)
    data = kept.tobytes()
    assert maps() == 1
    del opened
    assert kept.tobytes() == data and maps() == 1  # a view holds it
    del kept
    assert maps() == 0


def test_an_image_that_the_machine_cannot_read_now_is_not_left_out(tmp_path, capsys, monkeypatch):
    """What would have met every file stops the packing; what is one file's own fault leaves out that file."""
    place, read = folder(tmp_path), FileRange.read

    def failing(number):
        def fails(self):
            if "cat/0" in f"{self.path}":
                raise OSError(number, os.strerror(number), self.path)
            return read(self)

        return fails

    monkeypatch.setattr(FileRange, "read", failing(errno.ESTALE))
    assert run(place, tmp_path / "out.h5", "--workers", "0", "--skip-bad") == 2
    assert "Stale file handle" in capsys.readouterr().err and not list(tmp_path.glob("*out*"))
    monkeypatch.setattr(FileRange, "read", failing(errno.EIO))
    assert run(place, tmp_path / "out.h5", "--workers", "0", "--skip-bad") == 0
    assert "bad: cat/0.jpg: " in (err := capsys.readouterr().err) and "Input/output error" in err


def test_finished_shards_that_cannot_be_opened_now_are_not_removed(tmp_path, capsys):
    place = folder(tmp_path)
    words = (place, tmp_path / "out.h5", "--workers", "0", "--shards", "3")
    assert run(*words) == 0
    staged = tmp_path / ".out-00000-of-00003.h5.done"
    (tmp_path / "out-00000-of-00003.h5").rename(staged)  # as a kill leaves it before the last rename
    for shard in tmp_path.glob("out-*"):
        shard.unlink()
    with refusals.locked(staged):
        assert run(*words) == 2
    assert "lock" in capsys.readouterr().err
    assert run(*words) == 0
    assert "1 of 3 shards were finished before" in capsys.readouterr().out


def test_a_pack_that_grows_too_long_leaves_the_old_one(tmp_path, capsys):
    path = made_pack(tmp_path / "a.h5")
    old = path.read_bytes()
    with refusals.small_files(4096):
        assert run("sklearn:digits", path, "--workers", "0", "--force") == 2
    assert "File too large" in capsys.readouterr().err
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.h5"]
