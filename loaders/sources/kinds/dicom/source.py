"""A folder of DICOM files becomes a list of images, whose names are nobody's."""

import csv
import filecmp
import functools
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from loaders.errors import SystemRefusal, UserError, in_words, shorten, told
from loaders.sources.classes import as_meant, is_image_name, with_classes
from loaders.sources.folders import files_below, is_hidden
from loaders.sources.images import encode_image
from loaders.sources.kinds.dicom.choice import PRIVATE, SETTINGS, Choice, read_choice
from loaders.sources.kinds.dicom.frames import frame
from loaders.sources.kinds.dicom.identity import Pseudonyms
from loaders.sources.kinds.dicom.labels import Label, Labels, read_labels
from loaders.sources.kinds.dicom.reading import INSTALL, Heading, Unusable, heading, is_dicom, library
from loaders.sources.kinds.dicom.values import Window, shown
from loaders.sources.listing import UNKNOWN, Listing, Table, TableBuilder
from loaders.sources.names import as_text

__all__ = ["HELP", "KIND", "SETTINGS", "accepts", "listing"]
KIND = "dicom"
HELP = (
    "a folder with DICOM files, nested as a PACS exports them, or one such file; patients and studies become groups and"
    " keys by a keyed hash, and no header goes into the pack"
)
_LOOKED_AT = 64  # files of a folder, for one that is DICOM


@dataclass(frozen=True)
class Frame:
    """A frame of a file: gray of 8 or 16 bits, or RGB."""

    path: str
    index: int
    """From 0; -1 for a file whose header could not be read."""
    window: Window

    def read(self) -> bytes:
        return encode_image(self.image()).data

    def image(self) -> Image.Image:
        if self.index < 0:
            heading(self.path)  # says why
            raise Unusable("its header could not be read when the images were listed")
        values, tags, kind = frame(self.path, self.index)
        return Image.fromarray(shown(values, tags, kind, self.index, self.window))


def frame_of(place: str, key: str, offset: int, size: int, window: Window) -> Frame:
    """Reader of frame `offset` of the file `place`."""
    return Frame(place, offset, window)


@dataclass(frozen=True)
class _File:
    """A file that holds an image, or should."""

    name: str
    """Path within the source, as the system has it."""
    path: str
    about: Heading | None
    """None: it cannot be read."""


def accepts(source: str) -> bool:
    """Whether it is a DICOM file, or of the first files below the folder one is, before any that is a common image."""
    if os.path.isfile(source):
        return is_dicom(source)
    looked = 0
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(names):
            looked += 1
            if is_image_name(name) or looked > _LOOKED_AT:
                return False
            if is_dicom(os.path.join(folder, name)):
                return True
    return False


def listing(source: str, under: str | None = None, settings: Mapping[str, str] | None = None) -> Listing:
    library()
    choice = read_choice(settings or {})
    root = Path(source)
    if under and not (root / under).is_dir():
        raise UserError(f"{source} has no folder {under!r} (--under)")
    files, ignored, notes = _read(root, under)
    if not files:
        found = f"only {len(ignored):,} other files, such as {ignored[0]}" if ignored else "it is empty"
        raise UserError(f"{source} holds no DICOM images{f' under {under!r}' if under else ''} ({found})")
    _check_plugins([file.about.syntax for file in files if file.about])
    images, more = _apart(files)
    table = read_labels(choice.labels, root, choice.columns) if choice.labels else None
    given, about_labels = _labelled(images, table, choice)
    items, names, written = _items(given, table, choice)
    if choice.table:
        _write(choice.table, written)
    kept = [file for file, _, _ in given]
    return Listing(items, names, ignored, (*notes, *more, *about_labels, *_remarks(kept, choice)), PRIVATE)


def _read(root: Path, under: str | None) -> tuple[list[_File], tuple[str, ...], list[str]]:
    """The files that hold images, or should; others; and what to say of those that cannot be read."""
    inside = root / under if under else root
    if root.is_dir():
        names = [name for name, *_ in files_below(inside) if not name.endswith("/") and not is_hidden(name)]
    else:
        root, names = root.parent, [root.name]
        inside = root
    files: list[_File] = []
    ignored: list[str] = []
    unreadable: list[str] = []
    reason = ""
    for name in tqdm(sorted(names), desc="reading headers", unit=" files", disable=None):
        path, name = os.path.join(inside, name), os.path.relpath(os.path.join(inside, name), root)
        if os.path.basename(name).upper() == "DICOMDIR":
            continue
        try:
            about = heading(path)
        except Unusable as error:
            about = None
            unreadable.append(as_text(name))
            reason = reason or str(error)
        except OSError as error:
            raise SystemRefusal(f"{path} cannot be read: {in_words(error, path)}") from error
        else:
            if about is None:
                ignored.append(as_text(name))
                continue
        files.append(_File(name, path, about))
    notes = [f"{len(unreadable):,} files cannot be read: {shorten(unreadable)}; of the first: {reason}"]
    return files, tuple(ignored), notes if unreadable else []


def _check_plugins(syntaxes: Iterable[str]) -> None:
    """UserError where images are compressed in a way that pydicom knows, and has no plug-in for."""
    dicom = library()
    for syntax, count in Counter(syntaxes).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            uid = dicom.uid.UID(syntax)
            try:
                missing = not dicom.pixels.get_decoder(uid).is_available
            except NotImplementedError:
                continue  # of these images it is said when they are read
        if missing:
            raise UserError(
                f"{count:,} images are compressed as {uid.name}, for which pydicom has no plug-in here: {INSTALL}"
            )


def _apart(files: Sequence[_File]) -> tuple[list[tuple[_File, str]], list[str]]:
    """Each file with a name that no other has, its SOP Instance UID; without files that are another's copy."""
    first: dict[str, str] = {}
    kept, copies, alike = [], [], []
    for file in files:
        image = file.about.instance if file.about else ""
        if image and first.setdefault(image, file.path) != file.path:
            if _equal(first[image], file.path):
                copies.append(as_text(file.name))
                continue
            alike.append(as_text(file.name))
            image = ""
        kept.append((file, image or f"path\0{file.name}"))
    notes = []
    if copies:
        notes.append(f"{len(copies):,} files are copies of others and left out, such as {copies[0]}")
    if alike:
        notes.append(
            f"warning: {len(alike):,} files have the SOP Instance UID of another, such as {alike[0]}; their keys are of"
            " their paths"
        )
    return kept, notes


def _equal(one: str, other: str) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _labelled(
    images: Sequence[tuple[_File, str]], table: Labels | None, choice: Choice
) -> tuple[list[tuple[_File, str, Label | None]], list[str]]:
    """Each file that is taken, with its label."""
    if table is None:
        return [(*each, None) for each in images], []
    given, missing = [], []
    for file, image in images:
        label = table.of(Path(file.name).as_posix(), file.about.instance if file.about else "")
        if label is None and file.about:
            missing.append(as_text(file.name))
            if choice.unlabelled == "skip":
                continue
        given.append((file, image, label))
    if missing and choice.unlabelled == "error":
        raise UserError(
            f"{choice.labels} has no label for {len(missing):,} of {len(images):,} files: {shorten(missing)}; --set"
            " unlabelled=skip leaves them out, unlabelled=keep takes them without a label"
        )
    if not any(label is not None for *_, label in given):
        raise UserError(f"{choice.labels} has a label for none of {len(images):,} files, such as {missing[0]}")
    done = "left out" if choice.unlabelled == "skip" else "taken without"
    notes = [f"{len(missing):,} files without a label are {done}, such as {missing[0]}"] if missing else []
    if table.unused:
        notes.append(
            f"{len(table.unused):,} lines of {choice.labels} are of no file here, such as line {min(table.unused)}"
        )
    return given, notes


def _items(
    given: Sequence[tuple[_File, str, Label | None]], table: Labels | None, choice: Choice
) -> tuple[Table, tuple[str, ...], list[tuple[str, str, int]]]:
    """The images, the names of their classes or labels; and path, key and group of each."""
    names, several = Pseudonyms(choice.secret), table.names if table else ()
    builder = TableBuilder(functools.partial(frame_of, window=choice.window))
    classes: dict[str, int] = {}
    written = []
    for file, image, label in given:
        patient, study = (file.about.patient, file.about.study) if file.about else ("", "")
        key, group = names.key(patient, study, image), names.group(patient, study)
        if several:
            value: int | Sequence[float] = label if isinstance(label, tuple) else [math.nan] * len(several)
        else:
            value = UNKNOWN if label is None else classes.setdefault(str(label), len(classes))
        frames = file.about.frames if file.about else 1
        for index in range(frames if choice.all_frames else 1):
            own = f"{key}/{index + 1:0{len(str(frames))}d}" if frames > 1 and choice.all_frames else key
            written.append((as_text(file.name), own, group))
            builder.add(own, value, file.path, index if file.about else -1, group=group)
    if several or not classes:
        return builder.table(), several, written
    found, class_names = with_classes(builder.table(), as_meant(list(classes), str(choice.labels)), str(choice.labels))
    return found, class_names, written


def _remarks(files: Sequence[_File], choice: Choice) -> Iterator[str]:
    """What whoever packs these should know."""
    about = [file.about for file in files if file.about]
    several = [each.frames for each in about if each.frames > 1]
    if several:
        taken = "all are taken (--set frames=first takes one of each)" if choice.all_frames else "the first is taken"
        yield f"{len(several):,} files have several frames, {sum(several):,} in all; {taken}"
    without = sum(not each.windowed for each in about)
    if without and choice.window == "file":
        yield (
            f"{without:,} files say no window: from black to white is all that they can store (--set window=extremes or"
            " CENTER,WIDTH)"
        )
    for count, said in (
        (sum(each.contradictory for each in about), "contradict themselves on what is inverted; their photometric"
         " interpretation counts"),
        (sum(not each.patient for each in about), "name no patient: their study is the group"),
        (sum(not (each.patient or each.study) for each in about), "name neither patient nor study: no group"),
        (sum(each.burned_in for each in about), "say that text is burned into their pixels: look whether it names"
         " anybody"),
    ):  # fmt: skip
        if count:
            yield f"warning: {count:,} files {said}"
    if not choice.kept:
        yield "keys and groups are hashed with a random key, for this pack alone (--set secret=FILE for several)"


def _write(path: Path, rows: Sequence[tuple[str, str, int]]) -> None:
    """The table that leads from keys back to files, whole, for its owner alone."""
    partial = path.with_name(f".{path.name}.partial")
    with told(f"{path} cannot be written"):
        partial.unlink(missing_ok=True)
        with open(
            os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", newline="", encoding="utf-8"
        ) as file:
            table = csv.writer(file)
            table.writerow(("path", "key", "group"))
            table.writerows(rows)
        os.replace(partial, path)
