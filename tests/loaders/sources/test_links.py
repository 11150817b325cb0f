"""Links in folders and tars, and folders that cannot be read: nothing is left out without a word."""

import io
import os
import tarfile

import pytest

from tests.support.packing import packed, refused, run
from tests.support.pictures import encoded, folder, photo, tar_of


def tar_with_links(path, members, symbolic=(), hard=()):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind, links in ((tarfile.SYMTYPE, symbolic), (tarfile.LNKTYPE, hard)):
            for name, target in links:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                tar.addfile(info)
    return path


IMAGES = {f"cat/{i}.jpg": encoded(photo(i)) for i in range(3)}


def test_links_in_a_tar_are_followed_as_tar_unpacks_them(tmp_path):
    symbolic = [("dog/0.jpg", "../cat/0.jpg"), ("dog/1.jpg", "0.jpg"), ("puma", "cat"), ("lynx", "./puma/"),
                ("bear/all", "../lynx"), ("kennel", "dog"),
                (".venv/python", "/usr/bin/python"), ("cat/9.jpg", "/cat/2.jpg"),
                ("README.txt", "/etc/nothing")]  # fmt: skip
    source = tar_with_links(
        tmp_path / "a.tar", IMAGES, symbolic, [("hard/0.jpg", "cat/1.jpg"), ("./dog/2.jpg", "dog/1.jpg")]
    )
    found, _ = packed(source, tmp_path)
    with tarfile.open(source) as tar:  # the program that is not ours
        members = [member for member in tar if member.name not in ("README.txt", "cat/9.jpg", ".venv/python")]
        trusting = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}  # before 3.11.4
        tar.extractall(tmp_path / "out", members, **trusting)
    (tmp_path / "out/cat/9.jpg").symlink_to("2.jpg")  # an absolute one, within the archive
    assert packed(tmp_path / "out", tmp_path)[0] == found
    assert len(found) == 4 + 3 + 3 + 4 + 4 + 4 + 1


@pytest.mark.parametrize(
    ("links", "said"),
    [([("dog/0.jpg", "../gone.jpg")], "1 links lead to nothing"), ([("dog", "/data/dog")], "dog → data/dog"),
     ([("dog", "../../dog")], "--dereference"), ([("a", "b"), ("b", "a")], "2 links"),
     ([("cat/self", "../cat")], "a folder that holds it"),
     ([("dog/self", "../dog"), ("dog/x.jpg", "../cat/0.jpg")], "holds it"),
     ([("a/b", "../c"), ("c/d", "../a"), ("a/x.jpg", "../cat/0.jpg")], "holds it")],
)  # fmt: skip
def test_links_that_lead_nowhere_are_named(tmp_path, capsys, links, said):
    assert said in refused(capsys, tar_with_links(tmp_path / "a.tar", IMAGES, links), tmp_path)
    hard = [(name, target) for name, target in links if target == "../gone.jpg"]
    if hard:
        assert said in refused(capsys, tar_with_links(tmp_path / "b.tar", IMAGES, hard=hard), tmp_path)


def test_labels_of_webdataset_may_be_links(tmp_path):
    members = {"a.jpg": encoded(photo(1)), "a.cls": b"1"}
    source = tar_with_links(tmp_path / "a.tar", members, [("b.jpg", "a.jpg")], [("b.cls", "a.cls")])
    assert packed(source, tmp_path)[1].labels.tolist() == [1, 1]


def test_a_file_with_holes_in_a_tar_is_named(tmp_path, capsys):
    tar_of(tmp_path / "a.tar", IMAGES)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[156] = ord("S")  # the type of the first member: GNU's sparse file
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    assert "without --sparse" in refused(capsys, tmp_path / "a.tar", tmp_path)


def test_links_in_folders(tmp_path, capsys):
    files = folder(tmp_path / "in")
    (tmp_path / "in/puma").symlink_to("cat")
    found, _ = packed(tmp_path / "in", tmp_path)
    assert len(found) == len(files) + 4
    (tmp_path / "in/cat/up").symlink_to("..")
    assert "a link to a folder that holds it" in refused(capsys, tmp_path / "in", tmp_path)


def test_folders_that_cannot_be_read_are_named(tmp_path, capsys, monkeypatch):
    """As for somebody else than root, for whom permissions mean nothing."""
    folder(tmp_path / "in")
    (tmp_path / "in/lost+found").mkdir()
    for name in ("x", "y"):
        (tmp_path / "tars" / name).mkdir(parents=True)
        tar_of(tmp_path / "tars" / name / "a.tar", IMAGES)
    real, closed = os.scandir, {"lost+found"}

    def scandir(path="."):
        if os.path.basename(path) in closed:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert len(packed(tmp_path / "in", tmp_path)[0]) == 12
    closed |= {"dog", "y"}
    assert "in/dog cannot be read: Permission denied" in refused(capsys, tmp_path / "in", tmp_path)
    assert "tars/y cannot be read" in refused(capsys, tmp_path / "tars/*/a.tar", tmp_path)
    assert "tars/y cannot be read" in refused(capsys, tmp_path / "tars/**/a.tar", tmp_path)


def two_tars(root):
    """Bytes of two tars of a class each."""
    for name in ("bird", "cat"):
        tar_of(root / f"{name}.tar", {f"{name}/{k}.jpg": encoded(photo(k)) for k in range(3)})
    return (root / "bird.tar").read_bytes(), (root / "cat.tar").read_bytes()


def test_tars_that_were_joined_by_cat_are_refused(tmp_path, capsys):
    """Python's tarfile, and tar itself, stop at the end of the first one."""
    (tmp_path / "both.tar").write_bytes(b"".join(two_tars(tmp_path)))
    assert "tar --concatenate" in refused(capsys, tmp_path / "both.tar", tmp_path)
    (tmp_path / "both.tar").unlink()
    assert packed(tmp_path / "*.tar", tmp_path)[1].class_names == ["bird", "cat"]


@pytest.mark.parametrize("at", [0, 100, 300])
def test_a_tar_that_is_damaged_between_its_files_is_refused(tmp_path, capsys, at):
    first, _ = two_tars(tmp_path)
    second = first.index(b"bird/1.jpg") + at  # the header of the second file
    (tmp_path / "broken.tar").write_bytes(first[:second] + b"\xff" * 9 + first[second + 9 :])
    assert "damaged" in refused(capsys, tmp_path / "broken.tar", tmp_path)


def test_a_tar_without_its_end_is_told(tmp_path, capsys):
    first, _ = two_tars(tmp_path)
    (tmp_path / "cut.tar").write_bytes(first[: first.index(b"bird/2.jpg")])
    assert len(packed(tmp_path / "cut.tar", tmp_path)[0]) == 2
    assert "warning: " in (said := capsys.readouterr().out) and "no end mark" in said


def test_names_that_come_again_in_a_tar_are_counted(tmp_path, capsys):
    with tarfile.open(tmp_path / "again.tar", "w") as tar:
        for number in (1, 2):
            for name, data in (("a.jpg", encoded(photo(number))), ("a.cls", b"3")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    found, _ = packed(tmp_path / "again.tar", tmp_path)
    assert found["a.jpg"][0] == encoded(photo(2))
    assert "2 files of" in (said := capsys.readouterr().out) and "such as a.jpg" in said


def test_a_pipe_in_a_folder_is_no_image_and_no_trap(tmp_path, capsys):
    folder(tmp_path / "images", per_class=1)
    os.mkfifo(tmp_path / "images/cat/pipe.jpg")
    assert run(tmp_path / "images", tmp_path / "out.h5", "--workers", "0", "--skip-bad") == 0
    assert "bad: cat/pipe.jpg: it is no file, but a pipe" in capsys.readouterr().err


def test_a_comma_in_a_path_does_not_become_a_label(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("path,label\n1.jpg,cat\nbig, red/2.jpg,cat\n")
    assert "line 3: 3 values, but the first line names 2" in refused(capsys, tmp_path / "a.csv", tmp_path)
