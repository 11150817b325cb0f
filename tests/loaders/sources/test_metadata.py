"""What a file says beside its pixels is decided when it is packed: pixels and metadata fail apart, readers agree."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes
from loaders.pipelines.batches import eval_batches
from loaders.pipelines.heading import fault
from loaders.pipelines.order import EvalPlan
from loaders.pipelines.transform import bit_eval
from loaders.sources.images import check_image
from loaders.sources.metadata import rewritten
from tests.support.pictures import encoded, photo

SIDE = 48
PICTURE = photo(3, SIDE, SIDE)  # square: nothing but its pixels tells that it was turned
TURNED = {  # by the standard: where the first row and the first column of what is stored belong
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
EXIF = b"Exif\0\0"
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="{}"/></rdf:RDF></x:xmpmeta>'


def tiff(orientation, order="<", kind=3, count=1, more=(), second=()):
    """An EXIF block: one entry, then `more`; a thumbnail's in `second`."""

    def directory(entries, after):
        packed = [
            struct.pack(order + "HHI", tag, kind, n) + struct.pack(order + {3: "H2x", 4: "I", 1: "B3x"}[kind], value)
            for tag, kind, n, value in entries
        ]
        return struct.pack(order + "H", len(packed)) + b"".join(packed) + struct.pack(order + "I", after)

    entries = [*([] if orientation is None else [(0x112, kind, count, orientation)]), *more]
    after = 8 + 2 + 12 * len(entries) + 4 if second else 0
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + directory(entries, after) + (directory(second, 0) if second else b"")


def segment(body, marker=0xE1):
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def xmp(orientation):
    return segment(b"http://ns.adobe.com/xap/1.0/\0" + XMP.format(orientation).encode())


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def broken(whole):
    return whole[:-4] + bytes(4)


JPEG, PNG = encoded(PICTURE, quality=95), encoded(PICTURE, "PNG")
SCAN = JPEG.index(b"\xff\xda")


def jpeg(*segments):
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def png(*chunks):
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def exif(*arguments, **others):
    return segment(EXIF + tiff(*arguments, **others))


RAW = EXIF + tiff(6)
# What is packed, and how it is displayed: as Pillow reads it, or where Pillow fails over the rest, as its EXIF says.
CASES = {
    **{f"JPEG {n}": (jpeg(exif(n)), n) for n in TURNED},
    **{f"JPEG {n}, big-endian": (jpeg(exif(n, ">")), n) for n in TURNED},
    **{f"PNG {n}": (png(chunk(b"eXIf", tiff(n))), n) for n in TURNED},
    "0": (jpeg(exif(0)), 1),
    "9": (jpeg(exif(9)), 1),
    "JPEG with none": (JPEG, 1),
    "PNG with none": (PNG, 1),
    "XMP alone": (jpeg(xmp(6)), 6),
    "XMP beside EXIF without": (jpeg(xmp(6), exif(None)), 6),
    "XMP against EXIF": (jpeg(xmp(6), exif(8)), 8),
    "XMP, broken": (jpeg(segment(b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<<<")), 1),
    "doubled, alike": (jpeg(exif(6), exif(6)), 6),
    "doubled, 6 and 1": (jpeg(exif(6), exif(1)), 6),
    "doubled, 1 and 6": (jpeg(exif(1), exif(6)), 1),
    "a long": (jpeg(exif(6, kind=4)), 6),
    "a long, big-endian": (jpeg(exif(6, ">", kind=4)), 6),
    "a byte": (jpeg(exif(6, kind=1)), 1),
    "two values": (jpeg(exif(6, count=2)), 6),
    "no value": (jpeg(exif(6, count=0)), 1),
    "twice in a block": (jpeg(exif(6, more=[(0x112, 3, 1, 1)])), 6),
    "of the thumbnail alone": (jpeg(exif(None, second=[(0x112, 3, 1, 6)])), 1),
    "thumbnail beyond the end": (jpeg(exif(6, second=[(0x201, 4, 1, 60_000), (0x202, 4, 1, 60_000)])), 6),
    "cut off": (jpeg(segment(EXIF + tiff(6)[:-8])), 1),
    "no end of the directory": (jpeg(segment(EXIF + tiff(6)[:-4])), 6),
    "a false count": (jpeg(segment(EXIF + b"II*\0\x08\0\0\0\xff\xff" + tiff(6)[10:])), 6),
    "garbage": (jpeg(segment(EXIF + b"garbage " * 9)), 1),
    "empty": (jpeg(segment(EXIF)), 1),
    "late": (JPEG[:SCAN] + exif(6) + JPEG[SCAN:], 6),
    "JFIF, short": (jpeg(segment(b"JFIF\0", 0xE0), exif(6)), 6),
    "Adobe, short": (jpeg(segment(b"Adobe", 0xEE), exif(3)), 3),
    "profile, empty": (jpeg(segment(b"ICC_PROFILE\0", 0xE2), exif(8)), 8),
    "profile, cut": (jpeg(segment(b"ICC_PROFILE\0\1\2", 0xE2)), 1),
    "Photoshop, broken": (jpeg(segment(b"Photoshop 3.0\x008BIM\4\4\0", 0xED)), 1),
    "many pictures, broken": (jpeg(segment(b"MPF\0garbage " * 2, 0xE2)), 1),
    "PNG: garbage": (png(chunk(b"eXIf", b"garbage " * 3)), 1),
    "PNG: empty": (png(chunk(b"eXIf", b"")), 1),
    "PNG: as in a JPEG": (png(chunk(b"eXIf", RAW)), 6),
    "PNG: two": (png(chunk(b"eXIf", tiff(6)), chunk(b"eXIf", tiff(1))), 1),
    "PNG: late": (PNG[:-12] + chunk(b"eXIf", tiff(6)) + PNG[-12:], 6),
    "PNG: broken": (png(broken(chunk(b"eXIf", tiff(6)))), 6),
    "PNG: XMP": (png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.format(6).encode())), 6),
    "PNG: raw profile": (
        png(chunk(b"tEXt", f"Raw profile type exif\0\nexif\n{len(RAW):8}\n{RAW.hex()}\n".encode())),
        6,
    ),
    "PNG: text, broken": (png(broken(chunk(b"tEXt", b"a\0b")), chunk(b"eXIf", tiff(6))), 6),
    "PNG: text of another packing": (png(chunk(b"zTXt", b"a\0\7abc")), 1),
    "PNG: too much text": (png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000)))), 1),
    "PNG: profile": (png(chunk(b"iCCP", b"x\0\0garbage")), 1),
    **{
        f"PNG: {name.decode()}, empty": (png(chunk(name, b""), chunk(b"eXIf", tiff(8))), 8)
        for name in (b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"tIME", b"bKGD", b"sBIT", b"tRNS", b"hIST", b"acTL", b"fcTL")
    },
}


def displayed(data):
    """The pixels of `data` as it stores them, by Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def pack_of(path, records):
    with ShardWriter(path, ["a"], new_attributes({"source": "", "kind": "test"}, 1)[0]) as writer:
        for number, (data, height, width) in enumerate(records):
            writer.add(Record(data, f"{number:04}", 0, height, width))
        writer.finish()
        writer.publish()
    return Pack.open(path)


def pixels(pack, backend):
    """(n, SIDE, SIDE, 3) as a network is given them, in 0..255."""
    plan = EvalPlan(np.arange(len(pack)), batch=len(pack))
    with eval_batches(pack, plan, bit_eval(SIDE), backend=backend, bad_budget=0) as batches:
        return 255 * (next(batches).images.permute(0, 2, 3, 1).numpy() / 2 + 0.5)


def test_square_images_are_turned_alike_by_both_pipelines(tmp_path):
    checked = {name: check_image(data) for name, (data, _) in CASES.items()}
    pack = pack_of(tmp_path / "p.h5", [(each.data, each.height, each.width) for each in checked.values()])
    host, dali = pixels(pack, "host"), pixels(pack, "dali")
    for number, (name, (data, orientation)) in enumerate(CASES.items()):
        wanted = TURNED[orientation](displayed(JPEG if data.startswith(b"\xff") else PNG).astype(float))
        assert np.abs(host[number] - wanted).mean() < 1, name
        assert np.abs(dali[number] - wanted).mean() < 2, name  # decoders of JPEG differ by that
        assert fault(np.frombuffer(checked[name].data, np.uint8), SIDE, SIDE) is None, name


def test_what_readers_agree_on_is_kept_byte_for_byte():
    kept = {name for name, (data, _) in CASES.items() if check_image(data).data == data}
    kinds = ("JPEG {}", "JPEG {}, big-endian", "PNG {}")
    plain = {kind.format(n) for kind in kinds for n in TURNED}
    plain |= {"0", "JPEG with none", "PNG with none", "XMP against EXIF", "of the thumbnail alone"}
    assert plain <= kept
    assert not kept & {"XMP alone", "doubled, 6 and 1", "a byte", "a false count", "PNG: garbage", "PNG: acTL, empty"}
    assert check_image(CASES["XMP alone"][0]).change == "without metadata that readers take differently"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "1"])
def test_rewriting_leaves_the_pixels_bit_for_bit(kind, mode):
    if kind == "JPEG" and mode in ("P", "RGBA", "1"):
        pytest.skip("JPEG has no such pixels")
    options = {"transparency": 3} if mode == "P" else {"progressive": True} if kind == "JPEG" else {}
    data = encoded(photo(1).convert(mode), kind, **options)
    again = rewritten(data, 6)
    before, after = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(again))
    np.testing.assert_array_equal(np.asarray(before.convert("RGBA")), np.asarray(after.convert("RGBA")))
    assert after.getexif() == {0x112: 6} and after.mode == before.mode
    assert rewritten(again, 6) == again


def test_damage_anywhere_neither_escapes_nor_is_told_twice():
    """Whatever is done to what lies before the pixels, an image is taken with its pixels, or refused with a reason."""
    chance, taken = random.Random(5), 0
    for start, whole in ((2, jpeg(xmp(6), exif(6))), (33, png(chunk(b"eXIf", tiff(6)), chunk(b"gAMA", bytes(4))))):
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(start, start + 150)] = chance.randrange(256)
            try:
                checked = check_image(bytes(data))
            except ValueError as error:
                assert str(error)
                continue
            taken += 1
            again = check_image(checked.data)
            assert (again.data, again.height, again.width) == (checked.data, checked.height, checked.width)
    assert taken > 300


def test_what_is_between_the_parts_of_a_jpeg_is_gone_afterwards():
    """Pillow passes over it; what is read before decoding, and other decoders, do not."""
    checked = check_image(JPEG[:2] + exif(6) + b"between" + JPEG[2:])
    assert fault(np.frombuffer(checked.data, np.uint8), SIDE, SIDE) is None
    assert checked.change == "JPEG whose parts do not add up"
    assert np.abs(TURNED[6](displayed(JPEG).astype(float)) - displayed(checked.data)).mean() < 3


def test_packs_of_before_are_read_as_they_were(tmp_path):
    """Bytes as they came, and sizes as Pillow displays them: both pipelines go on to read the EXIF block."""
    records = [(CASES[f"JPEG {n}"][0], SIDE, SIDE) for n in TURNED]
    pack = pack_of(tmp_path / "p.h5", records)
    for backend in ("host", "dali"):
        for found, (n, turn) in zip(pixels(pack, backend), TURNED.items(), strict=True):
            assert np.abs(found - turn(displayed(JPEG).astype(float))).mean() < 2, (backend, n)
