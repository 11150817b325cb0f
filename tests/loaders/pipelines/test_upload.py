"""What travels to a device, and what becomes of it there. On a CPU `meta` stands for the device; copies are counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes
from loaders.pipelines.batches import eval_batches, train_batches
from loaders.pipelines.order import EvalPlan, TrainPlan
from loaders.pipelines.reading import Reading, chosen
from loaders.pipelines.request import request
from loaders.pipelines.transform import Affine, bit_train, natural_eval, natural_train, xray_eval, xray_train
from loaders.pipelines.upload import Upload
from tests.loaders.pipelines.test_batches import backend as backend  # a fixture
from tests.support.pictures import encoded, gray16, photo

RECORDS = 12
TRANSFORMS = {
    "natural": natural_train(32),
    "evaluation": natural_eval(32),
    "crop": bit_train(40, 32),
    "strong": natural_train(32, (2, 9)),
    "xray": xray_train(32),
    "xray, evaluation": xray_eval(32),
}
PUBLISHED = {
    "area": replace(natural_train(32), downscale="area"),
    "area, xray": replace(xray_train(32), downscale="area", affine=Affine(outside="reflect")),
}


def packed(path, deep):
    with ShardWriter(path, ["a"], new_attributes({"source": "made up", "kind": "test"}, 1)[0]) as writer:
        for i in range(RECORDS):
            data = encoded(photo(i, 50 + i, 90 - i), quality=95)
            if deep:
                data = encoded(Image.fromarray(gray16(i, 50 + i, 90 - i)), "PNG")
            writer.add(Record(data, f"image {i}", 0, 50 + i, 90 - i))
        writer.finish()
        writer.publish()
    return Pack.open(path)


@pytest.fixture(scope="module", params=[False, True], ids=["8 bits", "16 bits"])
def pack(request, tmp_path_factory):
    return packed(tmp_path_factory.mktemp("upload") / "p.h5", request.param)


class Travels(TorchDispatchMode):
    """Counts the bytes that are copied from the host to another device."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        if function is torch.ops.aten._to_copy.default and made.device != arguments[0].device:
            self.bytes += arguments[0].nbytes
        return made


def read(pack, transform, backend, **how):
    order = TrainPlan(np.arange(RECORDS), global_batch=6, seed=1)
    with train_batches(pack, order, transform, last_step=3, backend=backend, **how) as batches:
        return [step[0] for step in batches]


@pytest.mark.parametrize("name", TRANSFORMS | PUBLISHED)
def test_a_byte_for_each_pixel_and_channel_travels(pack, backend, name):
    transform = (TRANSFORMS | PUBLISHED)[name]
    with (
        train_batches(
            pack, TrainPlan(np.arange(RECORDS), 6, seed=1), transform, last_step=2, backend=backend, device="meta"
        ) as batches,
        Travels() as seen,
    ):
        found = [step[0] for step in batches]
    channels = 1 if transform.gray else 3
    deep = pack.bits > 8 and transform.randaugment is None  # float32: more than 256 levels
    each = 32 * 32 * channels * (4 if deep else 1) + 8 + 8 + 1  # its label, number, and whether it counts
    assert seen.bytes == 2 * 6 * each
    for batch in found:
        assert {tensor.device.type for tensor in batch} == {"meta"}
        assert batch.images.shape == (6, 3, 32, 32)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", TRANSFORMS | PUBLISHED)
def test_what_is_normalized_on_the_device_is_what_it_was(pack, backend, name, monkeypatch):
    expected = read(pack, (TRANSFORMS | PUBLISHED)[name], backend)
    for module in ("host", *(["dali"] if backend == "dali" else [])):
        monkeypatch.setattr(f"loaders.pipelines.{module}.Upload", lambda *how: Upload(*how[:3], torch.device("cpu")))
    found = read(pack, (TRANSFORMS | PUBLISHED)[name], backend, device="meta")
    for one, other in zip(found, expected, strict=True):
        assert one.images.device.type == "cpu"
        torch.testing.assert_close(one.images, other.images, rtol=1e-6, atol=2e-6)


def test_evaluation_travels_as_bytes_too(tmp_path, backend):
    pack, order = packed(tmp_path / "p.h5", deep=False), EvalPlan(np.arange(RECORDS), batch=8)
    with eval_batches(pack, order, natural_eval(32), backend=backend, device="meta") as batches, Travels() as seen:
        assert len(list(batches)) == 2
    assert seen.bytes == 2 * 8 * (32 * 32 * 3 + 17)


@pytest.mark.parametrize("decode", ["gpu", "mixed"])
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_decoding_on_a_gpu_takes_a_gpu_and_dali(decode, device, monkeypatch):
    for present in (True, False):
        monkeypatch.setattr("loaders.pipelines.reading.choose_backend", lambda _, p=present: "dali" if p else "host")
        how = Reading(device=device, decode=decode)
        if present and device != "cpu":
            assert chosen(how).decode == decode
            continue
        with pytest.raises(UserError, match=f"data.decode={decode} takes DALI and a GPU"):
            chosen(how)


def test_where_images_are_decoded_unless_told(monkeypatch):
    monkeypatch.setattr("loaders.pipelines.reading.choose_backend", lambda backend: backend)
    places = {(b, d): chosen(Reading(backend=b, device=d)).decode for b in ("dali", "host") for d in ("cpu", "cuda")}
    assert places.pop(("dali", "cuda")) == "gpu"
    assert set(places.values()) == {"cpu"}
    assert chosen(Reading(backend="dali", device="cuda", decode="cpu")).decode == "cpu"
    for wrong in ({"decode": "tpu"}, {"region": "half"}):
        with pytest.raises(UserError, match="there are:"):
            Reading(**wrong)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_batch_half_decoded_elsewhere_is_the_same_batch(pack, name, monkeypatch):
    """The graph of data.decode=mixed, whose branch for the GPU is given the CPU."""
    dali = pytest.importorskip("loaders.pipelines.dali", reason="DALI is not installed")
    from nvidia.dali.data_node import DataNode

    transform, order, seen = TRANSFORMS[name], TrainPlan(np.arange(RECORDS), 6, seed=1), []
    real = dali._decode

    def on_cpu(*how):
        seen.append(how[4])
        return real(*how[:4], "cpu", *how[5:])

    def graph(*how, **options):
        return real_graph(how[0], how[1], "mixed", *how[3:5], dali._NORMALIZED, **options)

    real_graph = dali._graph
    expected = read(pack, transform, "dali")
    monkeypatch.setattr(dali, "_decode", on_cpu)
    monkeypatch.setattr(dali, "_graph", graph)
    monkeypatch.setattr(DataNode, "gpu", lambda node: node)
    monkeypatch.setattr(dali.Finisher, "suits", lambda transform: False)
    part = order.step(0)[0]
    pipeline = dali.DaliPipeline(
        pack, transform, iter([request(pack, transform, part.ids, part.draws)]), 6, replace(Reading(), decode="cpu")
    )
    pipeline._mixed = True
    found = pipeline.next_images()
    pipeline.close()
    assert seen == ["mixed", "cpu"]
    assert (found - expected[0].images).abs().mean() < 0.02  # DALI resizes here, elsewhere torch


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_gpu_is_given_the_pictures_of_the_cpu(pack, backend, name):
    """Also while it works on others: what runs there must wait for the copy."""
    expected = read(pack, TRANSFORMS[name], backend)
    busy = torch.rand(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy / 4096
    found = read(pack, TRANSFORMS[name], backend, device="cuda", decode="cpu", prefetch=1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.images.cpu(), other.images, rtol=1e-5, atol=1e-5)
