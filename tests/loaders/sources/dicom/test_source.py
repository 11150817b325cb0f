"""Folders of DICOM become packs: which files, under which names, with which labels, and nothing of their headers."""

import csv
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import JPEGLSLossless

from loaders.errors import SystemRefusal
from loaders.packing import kinds
from loaders.packs.shard import Pack
from loaders.sources import checking
from loaders.sources.checking import check_items
from loaders.sources.images import check_image
from loaders.sources.kinds.dicom import listing
from loaders.sources.kinds.dicom.identity import Pseudonyms
from loaders.sources.listing import UNKNOWN
from tests.support.dicom import WHO, encoded, gradient, header, image, write
from tests.support.packing import refused, run
from tests.support.pictures import encoded as pictures_encoded
from tests.support.pictures import photo


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(bytes(range(32)))
    return path


@pytest.fixture
def clinic(tmp_path):
    """Two patients in folders as a PACS exports them, with what else lies there; the identifiers of each file."""
    root = tmp_path / "export"
    names = {}
    for k, (patient, study) in enumerate([("A", "1.2.1"), ("A", "1.2.2"), ("B", "1.2.3"), ("B", "1.2.3")]):
        name = f"{patient}/ST{study[-1]}/IM{k}" + (".dcm" if k % 2 else "")
        tags = {"PatientID": patient, "StudyInstanceUID": study, "SOPInstanceUID": f"1.3.{k}"}
        write(root / name, image(gradient(white=1000 + k), 12, **tags))
        names[name] = tags
    write(root / "DICOMDIR", header(SOPClassUID="1.2.840.10008.1.3.10"))
    write(root / "A/ST1/SR0", header(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11"))
    (root / "A/ST1/VIEWER.EXE").write_bytes(b"MZ" + bytes(400))
    (root / "LIESMICH.TXT").write_text("export of today")
    (root / ".cache").mkdir()
    shutil.copy(root / "A/ST1/IM0", root / ".cache/IM0")
    return root, names


def opened(tmp_path, source, *options):
    assert run(source, tmp_path / "out.h5", "--workers", "0", "--force", *options) == 0
    return Pack.open(tmp_path / "out.h5")


def settings(**values):
    return {name: str(value) for name, value in values.items()}


def table(path, *rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    return path


def test_a_folder_of_dicom_is_found_as_such_and_packed(clinic, tmp_path, capsys):
    root, names = clinic
    pack = opened(tmp_path, root)
    said = capsys.readouterr().out
    assert len(pack) == len(names) and pack.bits == 16 and pack.attributes["kind"] == "dicom"
    assert "ignored 3 files that are not images, such as A/ST1/SR0" in said
    for k in range(len(pack)):
        pixels = np.asarray(Image.open(io.BytesIO(pack.record(k).tobytes())))
        white = round(int(pixels.max()) * 4095 / 65535)
        np.testing.assert_array_equal(pixels, np.rint(gradient(white=white) * (65535 / 4095)))
    assert pack.labels.tolist() == [UNKNOWN] * len(names)


def test_one_file_or_a_part_of_the_folder_may_be_taken(clinic, tmp_path, capsys):
    root, _ = clinic
    assert len(opened(tmp_path, root / "B/ST3/IM2")) == 1
    assert len(opened(tmp_path, root, "--under", "A")) == 2
    assert "has no folder 'C'" in refused(capsys, root, tmp_path, "--under", "C")


@pytest.mark.parametrize("name", ["a.png", "b.JPG"])
def test_a_folder_of_common_images_is_not_taken_for_dicom(tmp_path, name):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / name).write_bytes(pictures_encoded(photo(1)))
    write(tmp_path / "cat/z.dcm", image(gradient()))
    assert not kinds()["dicom"].accepts(str(tmp_path))
    assert not kinds()["dicom"].accepts(str(tmp_path / "cat" / name))
    assert kinds()["dicom"].accepts(str(tmp_path / "cat/z.dcm"))
    assert not kinds()["dicom"].accepts(str(tmp_path / "gone"))


def test_a_folder_without_dicom_says_what_it_holds(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert "holds no DICOM images (it is empty)" in refused(capsys, tmp_path / "in", tmp_path, "--kind", "dicom")
    (tmp_path / "in/a.txt").write_text("x")
    assert "(only 1 other files, such as a.txt)" in refused(capsys, tmp_path / "in", tmp_path, "--kind", "dicom")


# Who it is


def everything_said(dataset):
    """All values of a header, but numbers of few digits and words of the standard."""
    for element in dataset.iterall():
        if element.VR not in ("OB", "OW", "SQ", "US", "SS", "CS"):
            yield from (str(value) for value in (element.value if element.VM > 1 else [element.value]))


@pytest.mark.parametrize("options", [(), ("--set", "frames=first", "--shards", "2")])
def test_nothing_that_tells_who_it_is_goes_into_a_pack(tmp_path, secret, options):
    root = tmp_path / "VANDERBERG QUIRINA 1947" / "export"
    said = set(WHO.values())
    rows = [("path", "label")]
    for k in range(4):
        name = f"PID-7734191/20191107/IM-SECRETNAME-{k}.dcm"
        dataset = image(np.stack([gradient(), gradient()]), 12, **WHO)
        item = Dataset()
        item.PatientID, item.PersonName = "NESTED-3391", "NESTED^NAME"
        dataset.OtherPatientIDsSequence = [item]
        dataset.add_new(0x00091001, "LO", "PRIVATE-VALUE-8")
        said |= {value for value in everything_said(dataset) if len(value) > 5}
        write(root / name, dataset)
        rows.append((name, "ab"[k % 2]))
    damaged = root / "PID-7734191/20191107/IM-SECRETNAME-9.dcm"
    data = encoded(image(gradient(), 12, **WHO))
    damaged.write_bytes(data[: data.index(b"VANDERBERG")])
    truncated = root / "PID-7734191/20191107/IM-SECRETNAME-8.dcm"
    truncated.write_bytes(data[:-100])
    rows.append(("PID-7734191/20191107/IM-SECRETNAME-8.dcm", "a"))
    rows[1:] = [(f"export/{name}", label) for name, label in rows[1:]]  # within SOURCE, whatever part of it is taken
    labels = table(root.parent / "labels-of-VANDERBERG.csv", *rows)
    words = [
        "--under",
        "export",
        "--workers",
        "0",
        "--skip-bad",
        "--set",
        f"labels={labels}",
        "--set",
        f"secret={secret}",
    ]
    assert run(root.parent, tmp_path / "out.h5", *words, *options) == 0
    written = b"".join(path.read_bytes() for path in tmp_path.glob("out*.h5"))
    said |= {
        "VANDERBERG",
        "QUIRINA",
        "SECRETNAME",
        "export",
        "7734191",
        "NESTED",
        "PRIVATE-VALUE",
        str(tmp_path),
    }
    assert len(said) > 30
    for value in said:
        for coded in (value.encode(), value.lower().encode(), value.encode("utf-16-le")):
            assert coded not in written, value
    pack = Pack.open(tmp_path / "out.h5")
    assert len(pack) == (4 if options else 8)
    assert json.loads(pack.attributes["selection"]).get("settings", {}).keys() <= {"frames"}


def test_groups_are_patients_and_keys_studies_for_whoever_has_the_secret(clinic, tmp_path, secret):
    root, names = clinic
    pack = opened(tmp_path, root, "--set", f"secret={secret}", "--set", f"table={tmp_path}/who.csv")
    again = opened(tmp_path, root / "B", "--set", f"secret={secret}")
    with open(tmp_path / "who.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["path"] for row in rows} == set(names)
    assert stat.S_IMODE(os.stat(tmp_path / "who.csv").st_mode) == 0o600
    by_key = dict(zip(pack.keys, pack.groups.tolist(), strict=True))
    groups, studies = {}, {}
    for row in rows:
        tags = names[row["path"]]
        assert by_key[row["key"]] == int(row["group"])
        groups.setdefault(tags["PatientID"], set()).add(int(row["group"]))
        studies.setdefault(tags["StudyInstanceUID"], set()).add(tuple(row["key"].split("/")[:2]))
    assert [len(found) for found in (*groups.values(), *studies.values())] == [1] * 5
    assert len({*groups["A"], *groups["B"]}) == 2 and len(set(map(str, studies.values()))) == 3
    assert set(again.groups.tolist()) == groups["B"] and set(again.keys) <= set(pack.keys)
    assert min(pack.groups) >= 0 and max(pack.groups) < 2**53


def test_without_a_secret_each_pack_has_names_of_its_own(clinic, tmp_path, capsys):
    root, _ = clinic
    one, other = (opened(tmp_path, root) for _ in range(2))
    assert not {*one.groups.tolist()} & {*other.groups.tolist()} and not {*one.keys} & {*other.keys}
    assert len(set(one.groups.tolist())) == 2
    assert "a random key, for this pack alone (--set secret=FILE for several)" in capsys.readouterr().out


def test_hashes_are_hmac_sha_256():
    """RFC 4231, test case 1, has this key; its digests here are of openssl dgst -sha256 -mac HMAC."""
    names = Pseudonyms(bytes([11]) * 20)

    def by_hand(message):
        pad = (bytes([11]) * 20).ljust(64, b"\0")
        inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in pad) + message).digest()
        return hashlib.sha256(bytes(byte ^ 0x5C for byte in pad) + inner).digest()

    digest = by_hand(b"patient\0P")
    assert names.key("P", "", "i") == f"{digest[:8].hex()}/unknown/{by_hand(b'image' + bytes(1) + b'i')[:8].hex()}"
    assert names.group("P", "S") == int(digest[:8].hex(), 16) >> 11
    assert names.group("", "S") == int(by_hand(b"study\0S")[:8].hex(), 16) >> 11
    assert names.group("", "") == -1


def test_patients_stay_on_one_side(tmp_path, secret):
    for k in range(20):
        write(tmp_path / f"in/{k}", image(gradient(), 12, PatientID=f"P{k % 5}"))
    sides = [opened(tmp_path, tmp_path / "in", "--part", part, "--holdout", "0.4", "--set", f"secret={secret}")
             for part in ("train", "test")]  # fmt: skip
    groups = [set(pack.groups.tolist()) for pack in sides]
    assert groups[0] and groups[1] and not groups[0] & groups[1]


@pytest.mark.parametrize("content", [None, b"", b"short", bytes(5000), "folder"])
def test_secrets_that_are_none_are_refused(clinic, tmp_path, capsys, content):
    path = tmp_path / "s"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    said = refused(capsys, clinic[0], tmp_path, "--set", f"secret={path}")
    assert "make one with: head -c 32 /dev/urandom" in said


def test_who_is_not_told_is_told(tmp_path, capsys):
    write(tmp_path / "in/0", image(gradient(), 12, PatientID=None, StudyInstanceUID="1.2"))
    write(tmp_path / "in/1", image(gradient(), 12, PatientID=" ", StudyInstanceUID="1.2"))
    write(tmp_path / "in/2", image(gradient(), 12, PatientID=None, StudyInstanceUID=None, BurnedInAnnotation="YES"))
    write(tmp_path / "in/3", image(gradient(), 12, PresentationLUTShape="INVERSE"))
    groups = opened(tmp_path, tmp_path / "in").groups.tolist()
    said = capsys.readouterr().out
    assert groups.count(-1) == 1 and len(set(groups)) == 3
    assert "3 files name no patient: their study is the group" in said
    assert "1 files name neither patient nor study: no group" in said
    assert "1 files say that text is burned into their pixels" in said
    assert "1 files contradict themselves on what is inverted" in said
    assert "4 files say no window" in said


def test_copies_are_left_out_and_other_images_of_the_same_uid_kept(tmp_path, capsys):
    tags = {"SOPInstanceUID": "1.2.3", "StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3"}
    write(tmp_path / "in/a", image(gradient(), 12, **tags))
    shutil.copy(tmp_path / "in/a", tmp_path / "in/b")
    write(tmp_path / "in/c", image(gradient(white=7), 12, **tags))
    assert len(set(opened(tmp_path, tmp_path / "in").keys)) == 2
    said = capsys.readouterr().out
    assert "1 files are copies of others and left out, such as b" in said
    assert "warning: 1 files have the SOP Instance UID of another, such as c" in said


# Frames, labels


def test_frames_are_all_images_or_the_first_is(tmp_path, capsys):
    frames = np.stack([gradient(white=white) for white in range(1000, 1011)])
    write(tmp_path / "in/a", image(frames, 12))
    write(tmp_path / "in/b", image(gradient(), 12))
    pack = opened(tmp_path, tmp_path / "in")
    assert "1 files have several frames, 11 in all; all are taken" in capsys.readouterr().out
    assert sorted(key.split("/")[3] for key in pack.keys if key.count("/") == 3) == [f"{k:02d}" for k in range(1, 12)]
    white = {key: np.asarray(Image.open(io.BytesIO(pack.record(k).tobytes()))).max() for k, key in enumerate(pack.keys)}
    assert [white[key] for key in sorted(white) if key.count("/") == 3] == [
        np.rint(white * (65535 / 4095)) for white in range(1000, 1011)
    ]
    first = opened(tmp_path, tmp_path / "in", "--set", "frames=first")
    assert len(first) == 2 and all(key.count("/") == 2 for key in first.keys)
    assert "11 in all; the first is taken" in capsys.readouterr().out


def labels_of(tmp_path, root, rows, *options):
    """Path → label, and the pack."""
    path = table(tmp_path / "labels.csv", *rows)
    words = ("--set", f"labels={path}", "--set", f"table={tmp_path}/who.csv", *options)
    pack = opened(tmp_path, root, *words)
    with open(tmp_path / "who.csv", newline="") as file:
        names = {row["key"]: row["path"] for row in csv.DictReader(file)}
    return {names[key]: label for key, label in zip(pack.keys, pack.labels.tolist(), strict=True)}, pack


def test_a_class_is_joined_by_path_or_uid(clinic, tmp_path):
    root, names = clinic
    by_path = [("path", "label"), *((f"./{name}", "ab"[k % 2]) for k, name in enumerate(names))]
    uids = [tags["SOPInstanceUID"] for tags in names.values()]
    by_uid = [("label", "SOPInstanceUID"), *(("ab"[k % 2], uid) for k, uid in enumerate(uids))]
    absolute = [("image", "class"), *((root / name, k % 2) for k, name in enumerate(names))]
    expected = {name: k % 2 for k, name in enumerate(names)}
    for rows, classes in ((by_path, ["a", "b"]), (by_uid, ["a", "b"]), (absolute, ["0", "1"])):
        found, pack = labels_of(tmp_path, root, rows)
        assert found == expected and pack.class_names == classes


@pytest.mark.parametrize("prefix", ["", "label:"])
def test_several_labels_are_1_0_or_unknown(clinic, tmp_path, prefix):
    root, names = clinic
    values = [("1", "0"), ("", "1.0"), ("-1", "0"), ("0", "nan")]
    rows = [("path", f"{prefix}Mass", f"{prefix}Node", "split"),
            *((name, *value, "train") for name, value in zip(names, values, strict=True))]  # fmt: skip
    found, pack = labels_of(tmp_path, root, rows)
    nan = float("nan")
    np.testing.assert_array_equal([found[name] for name in names], [[1, 0], [nan, 1], [nan, 0], [0, nan]])
    assert pack.class_names == ["Mass", "Node"]
    one, pack = labels_of(tmp_path, root, rows, "--set", "columns=Node")
    np.testing.assert_array_equal([one[name] for name in names], [[0], [1], [0], [nan]])
    assert pack.class_names == ["Node"]


def test_files_without_a_label_are_told_left_out_or_kept(clinic, tmp_path, capsys):
    root, names = clinic
    first, *others = names
    rows = [("path", "label"), (first, "ill"), (others[0], ""), ("gone", "ill")]
    path = table(tmp_path / "labels.csv", *rows)
    said = refused(capsys, root, tmp_path, "--set", f"labels={path}")
    assert "has no label for 3 of 4 files" in said and "unlabelled=skip leaves them out, unlabelled=keep" in said
    assert labels_of(tmp_path, root, rows, "--set", "unlabelled=skip")[0] == {first: 0}
    said = capsys.readouterr().out
    assert "3 files without a label are left out" in said
    assert "1 lines of" in said and "are of no file here, such as line 4" in said
    kept, pack = labels_of(tmp_path, root, rows, "--set", "unlabelled=keep")
    assert kept == {first: 0} | dict.fromkeys(others, UNKNOWN) and pack.class_names == ["ill"]
    several = [("path", "x", "y"), (first, 1, 0)]
    kept, _ = labels_of(tmp_path, root, several, "--set", "unlabelled=keep")
    np.testing.assert_array_equal([kept[name] for name in others], np.full((3, 2), np.nan))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("name", "label"), ("x", "a")], "no column that says which image is meant: it has name, label"),
        ([("path",), ("x",)], "no column of labels: it has path; name it label, or label:NAME"),
        ([("path", "file", "label"), ("x", "y", "a")], "the columns path and file may both be the path"),
        ([("path", "age"), ("A/ST1/IM0", 45)], "line 2, column age: '45' is no label; expected 1, 0, or nothing"),
        ([("path", "label"), ("A/ST1/IM0", "a"), ("A/ST1/IM0", "b")], "line 3: A/ST1/IM0 has another label"),
        ([("path", "label"), ("A/ST1/IM0", "a", "b")], "line 2: more values than the first line names"),
        ([("path", "label"), ("", "a")], "line 2: neither a path nor a UID"),
        ([("path", "label"), ("elsewhere", "a")], "has a label for none of 4 files"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_joined_are_refused(clinic, tmp_path, capsys, rows, said):
    path = table(tmp_path / "labels.csv", *rows)
    unlabelled = ("--set", "unlabelled=skip")
    assert said in refused(capsys, clinic[0], tmp_path, "--set", f"labels={path}", *unlabelled)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("frames=some", "no value of --set frames 'some'; "), ("window=lung", "expected file, full, extremes, or"),
        ("window=1,0", "the width 1 or more"), ("window=nan,5", "to be finite"), ("unlabelled=skip", "is for --set"),
        ("columns=a", "is for --set labels=FILE"), ("labels=/gone.csv", "there is no table at /gone.csv"),
        ("table=/proc/x.csv", "/proc/x.csv cannot be written"), ("windows=1,2", "did you mean 'window'"),
    ],
)  # fmt: skip
def test_settings_that_there_are_not(clinic, tmp_path, capsys, word, said):
    assert said in refused(capsys, clinic[0], tmp_path, "--set", word)


def test_columns_of_labels_are_named_as_the_table_has_them(clinic, tmp_path, capsys):
    path = table(tmp_path / "labels.csv", ("path", "Mass"), ("A/ST1/IM0", 1))
    for words, said in (("columns=mass", "no column 'mass'; did you mean 'Mass'"), ("columns=Mass,Mass", "twice")):
        assert said in refused(capsys, clinic[0], tmp_path, "--set", f"labels={path}", "--set", words)


# Files that cannot be read


def test_unreadable_files_are_listed_and_counted_and_the_rest_is_packed(clinic, tmp_path, capsys):
    root, names = clinic
    data = (root / "A/ST1/IM0").read_bytes()
    (root / "A/broken").write_bytes(data[:300])
    (root / "A/cut.dcm").write_bytes(data[:-9])
    assert run(root, tmp_path / "out.h5", "--workers", "0", "--set", f"table={tmp_path}/who.csv") == 1
    out, err = capsys.readouterr()
    assert "1 files cannot be read: A/broken; of the first: its header ends early" in out
    with open(tmp_path / "who.csv", newline="") as file:
        names_of = {row["key"]: row["path"] for row in csv.DictReader(file)}
    bad = dict(line.removeprefix("bad: ").split(": ", 1) for line in err.splitlines() if line.startswith("bad: "))
    assert {names_of[key]: reason for key, reason in bad.items()} == {
        "A/broken": "its header ends early, or has no rows and columns",
        "A/cut.dcm": "its pixels end early: 631 bytes of 640",
    }
    assert len(Pack.open(tmp_path / "out.h5")) == len(names)


def test_worker_processes_read_it_too(clinic, tmp_path, secret):
    words = ("--set", f"secret={secret}", "--set", "window=500,1000")
    assert run(clinic[0], tmp_path / "two.h5", "--workers", "2", *words) == 0
    one, two = opened(tmp_path, clinic[0], *words), Pack.open(tmp_path / "two.h5")
    assert [one.record(k).tobytes() for k in range(4)] == [two.record(k).tobytes() for k in range(4)]


def test_a_file_whose_header_is_mended_after_listing_is_still_left_out(tmp_path):
    data = encoded(image(gradient(), 12))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_bytes(data[:300])
    write(tmp_path / "in/b", image(gradient(), 12))
    found = listing(str(tmp_path / "in"))
    (tmp_path / "in/a").write_bytes(data)
    with check_items(list(found.items), None, 90, 0) as checked:
        reasons = [each for each in checked if isinstance(each, str)]
    assert reasons == ["its header could not be read when the images were listed"]


def test_what_the_machine_is_to_blame_for_ends_the_packing(clinic, monkeypatch):
    def busy(path):
        raise OSError(24, "Too many open files", path)

    monkeypatch.setattr("loaders.sources.kinds.dicom.source.heading", busy)
    with pytest.raises(SystemRefusal, match="cannot be read: Too many open files"):
        listing(str(clinic[0]))


def test_without_pydicom_it_is_said_how_to_get_it(clinic, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    said = refused(capsys, clinic[0], tmp_path)
    assert "DICOM needs pydicom and, for compressed images, its plug-ins: pip install pydicom pylibjpeg" in said


def test_without_a_plug_in_it_is_said_before_anything_is_read(tmp_path, capsys, monkeypatch):
    dataset = image(gradient(), 12)
    dataset.PixelData = encapsulate([b"\xff\xd8\xff\xf7"])
    dataset["PixelData"].is_undefined_length = True
    write(tmp_path / "in/a", dataset, JPEGLSLossless)
    monkeypatch.setattr(get_decoder(JPEGLSLossless), "_available", {})
    said = refused(capsys, tmp_path / "in", tmp_path)
    assert "1 images are compressed as JPEG-LS Lossless Image Compression, for which pydicom has no plug-in" in said
    assert "pip install pydicom pylibjpeg pylibjpeg-libjpeg" in said


def test_importing_the_kind_imports_no_pydicom():
    code = "import sys, loaders.packing.find as f; f.kinds(); sys.exit('pydicom' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, "colour"])
def test_resizing_is_what_it_is_for_files(tmp_path, secret, kind):
    """An image that is made small before it is encoded is the one of a PNG of full size."""
    pixels = np.asarray(photo(3, 40, 60)) if kind == "colour" else gradient(40, 60, np.iinfo(kind).max, kind)
    write(tmp_path / "in/a", image(pixels))
    whole, small = (opened(tmp_path, tmp_path / "in", "--set", f"secret={secret}", *words).record(0).tobytes()
                    for words in ((), ("--resize", "20")))  # fmt: skip
    expected = check_image(whole, 20)
    found = check_image(small)
    assert (found.height, found.width, found.change) == (20, 30, "")
    decoded = [np.asarray(Image.open(io.BytesIO(each.data))) for each in (found, expected)]
    np.testing.assert_array_equal(*decoded)


@pytest.mark.parametrize(("images", "workers", "tasks"), [(24, 2, 24), (64, 2, 16), (1000, 2, 32), (3, 16, 3)])
def test_a_few_large_images_are_shared_among_all_workers(monkeypatch, images, workers, tasks):
    given = []
    monkeypatch.setattr(checking, "in_processes", lambda work, jobs, *_: (given.append(len(job)) or [] for job in jobs))
    with check_items([None] * images, None, 90, workers) as found:
        assert list(found) == []
    assert len(given) == tasks and sum(given) == images
