import importlib.util
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from loaders.errors import UserError
from loaders.packs.shard import Pack
from loaders.packs.writer import Record, ShardWriter, new_attributes
from loaders.pipelines.batches import eval_batches, train_batches
from loaders.pipelines.order import Blocks, EvalPlan, TrainPlan
from loaders.pipelines.reading import choose_backend
from loaders.pipelines.transform import bit_train, natural_eval, natural_train, xray_train
from loaders.sources.images import check_image
from tests.support.pictures import encoded, photo

HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
RECORDS = 30


@pytest.fixture(params=["host", "dali"])
def backend(request):
    if request.param == "dali" and not HAS_DALI:
        pytest.skip("DALI is not installed")
    return request.param


def images():
    """JPEG and PNG, colour and gray, some lying on their side, of several sizes."""
    sideways = Image.Exif()
    sideways[0x0112] = 6
    for i in range(RECORDS):
        picture = photo(i, 50 + i, 90 - i, "L" if i % 5 == 4 else "RGB")
        yield encoded(picture, "PNG") if i % 3 == 2 else encoded(picture, exif=sideways if i % 4 == 3 else Image.Exif())


def write(path, broken=None):
    """A pack of 30 images in 2 shards; `broken`: number → what stands there in place of an image."""
    attributes = new_attributes({"source": "made up", "kind": "test"}, 2)
    data = list(images())
    for k in range(2):
        name = path.with_name(f"{path.stem}-{k:05d}-of-00002.h5")
        with ShardWriter(name, ["a", "b"], attributes[k]) as writer:
            for i in range(15 * k, 15 * (k + 1)):
                checked = check_image(data[i])
                stored = (broken or {}).get(i, data[i])
                writer.add(Record(stored, f"image {i}", i % 2, checked.height, checked.width))
            writer.finish()
            writer.publish()
    return Pack.open(path)


def plan(world=1, rank=0, **how):
    return TrainPlan(np.arange(RECORDS), global_batch=8, seed=1, rank=rank, world=world, **how)


def read(pack, transform, first, last, world=1, **how):
    """Global batches of steps [first, last) as (images, labels, ids), put together from all ranks."""
    ranks = [
        list(train_batches(pack, plan(world, rank), transform, first_step=first, last_step=last, **how))
        for rank in range(world)
    ]
    steps = [[batch for micros in step for batch in micros] for step in zip(*ranks, strict=True)]
    return [tuple(torch.cat([getattr(b, f) for b in step]) for f in ("images", "labels", "ids")) for step in steps]


def same(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def test_a_batch_is_what_the_network_expects(tmp_path, backend):
    pack = write(tmp_path / "p.h5")
    with train_batches(pack, plan(accumulate=2), natural_train(32), last_step=3, backend=backend) as batches:
        assert batches.backend == backend
        steps = list(batches)
    assert [len(step) for step in steps] == [2, 2, 2]
    for number, step in enumerate(steps):
        for part, batch in zip(plan(accumulate=2).step(number), step, strict=True):
            assert batch.images.shape == (4, 3, 32, 32)
            assert batch.images.dtype == torch.float32
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.ids.tolist() == part.ids.tolist()
            assert batch.labels.tolist() == (part.ids % 2).tolist()
            assert batch.labels.dtype == torch.int64
            assert batch.valid.all()
            assert 0.2 < batch.images.std() < 3


@pytest.mark.parametrize("transform", [natural_train(32, (2, 9)), xray_train(32), bit_train(40, 32)])
def test_a_run_resumes_within_an_epoch_bit_for_bit_on_any_number_of_ranks(tmp_path, backend, transform):
    pack = write(tmp_path / "p.h5")
    straight = read(pack, transform, 0, 6, backend=backend)
    slow = transform.randaugment is not None  # DALI takes half a second to build each of these pipelines
    for stop, world in ((3, 2),) if slow else ((1, 2), (2, 1), (5, 4), (3, 8)):
        first = train_batches(pack, plan(), transform, backend=backend)
        for _ in range(stop):
            next(first)
        assert first.position == stop
        first.close()
        same(read(pack, transform, first.position, 6, world, backend=backend), straight[stop:])


def test_threads_prefetching_and_checking_do_not_change_what_is_read(tmp_path, backend):
    pack = write(tmp_path / "p.h5")
    expected = read(pack, natural_train(32), 0, 4, backend=backend)
    same(read(pack, natural_train(32), 0, 4, backend=backend, threads=3, prefetch=4, check=0.5), expected)


def test_blocks_reach_the_batches(tmp_path):
    pack = write(tmp_path / "p.h5")
    assert pack.starts == (0, 15)
    blocks = plan(blocks=Blocks(5, 1), starts=pack.starts)
    ids = next(train_batches(pack, blocks, natural_train(32), backend="host"))[0].ids.numpy()
    assert np.ptp(ids[:3]) < 5


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_gives_every_sample_once(tmp_path, backend, world):
    pack = write(tmp_path / "p.h5")
    seen = []
    for rank in range(world):
        whole = EvalPlan(np.arange(RECORDS), batch=4, rank=rank, world=world)
        for batch in eval_batches(pack, whole, natural_eval(32), backend=backend):
            assert batch.images.shape == (4, 3, 32, 32)
            seen += batch.ids[batch.valid].tolist()
    assert sorted(seen) == list(range(RECORDS))


BROKEN = {4: b"no image at all", 21: next(images())[:200]}


def blinded(data):
    """A JPEG or PNG whose head and end are in order, and which does not decode."""
    if data[:2] == b"\xff\xd8":
        tables = data.index(b"\xff\xc4")  # without its codes no pixel can be read
        return data[: tables + 5] + bytes([255] * 16) + data[tables + 21 :]
    pixels = data.index(b"IDAT") + 4
    return data[:pixels] + b"\0" * 20 + data[pixels + 20 :]


def test_bad_records_are_replaced_reported_and_counted(tmp_path, backend, caplog):
    """All other samples of the batch stay what they would have been."""
    sound, broken = write(tmp_path / "sound.h5"), write(tmp_path / "broken.h5", BROKEN)
    assert broken.verify() == []  # the checksums are those of the broken bytes
    transform = natural_train(32)
    expected = read(sound, transform, 0, 8, backend=backend)
    batches = train_batches(broken, plan(), transform, last_step=8, backend=backend, prefetch=3)
    with caplog.at_level(logging.WARNING):
        found = [step[0] for step in batches]
    assert set(batches.bad) == {4, 21}
    for record in ("record 4 (image 4)", "record 21 (image 21)"):
        assert record in caplog.text
    assert len(found) == 8
    for batch, (pictures, _, ids) in zip(found, expected, strict=True):
        good = ~torch.isin(ids, torch.tensor([4, 21]))
        assert torch.equal(batch.images[good], pictures[good])
        assert torch.equal(batch.ids[good], ids[good])
        assert torch.equal(batch.labels, batch.ids % 2)
        assert batch.ids[~good].tolist() == (ids[~good] + 1).tolist()
        assert batch.images.isfinite().all()
    assert sum(int(torch.isin(ids, torch.tensor([4, 21])).sum()) for _, _, ids in expected) >= 4


def test_bad_records_do_not_count_in_evaluation(tmp_path, backend):
    pack = write(tmp_path / "p.h5", BROKEN)
    whole = EvalPlan(np.arange(RECORDS), batch=8)
    seen = [i for b in eval_batches(pack, whole, natural_eval(32), backend=backend) for i in b.ids[b.valid].tolist()]
    assert sorted(seen) == sorted(set(range(RECORDS)) - {4, 21})


def test_too_many_bad_records_end_the_run(tmp_path, backend):
    pack = write(tmp_path / "p.h5", BROKEN)
    with pytest.raises(UserError, match=r"data\.bad_budget=1") as stopped:
        list(train_batches(pack, plan(), natural_train(32), last_step=8, backend=backend, bad_budget=1))
    assert "verify" in str(stopped.value)
    everything = write(tmp_path / "q.h5", dict.fromkeys(range(RECORDS), b"nothing"))
    with pytest.raises(UserError, match="none of the selected"):
        next(train_batches(everything, plan(), natural_train(32), backend=backend, bad_budget=99))


@pytest.mark.parametrize("micro", [1, 2, 8, 24])
def test_a_decoder_that_always_fails_ends_the_run_with_its_own_words(tmp_path, backend, monkeypatch, caplog, micro):
    """And blames no record: also in micro-batches of one, and in those that are larger than the budget."""
    pack = write(tmp_path / "p.h5")
    where = f"loaders.pipelines.{backend}.{'HostPipeline' if backend == 'host' else 'DaliPipeline'}.next_images"
    tried = []

    def fails(self):
        tried.append(next(self._requests).ids.tolist())
        raise RuntimeError("Critical error in pipeline:\nerror 8: no codec can decode the region\nstack")

    monkeypatch.setattr(where, fails)
    order = TrainPlan(np.arange(RECORDS), global_batch=micro, seed=1)
    batches = train_batches(pack, order, natural_train(32), backend=backend)
    with pytest.raises(UserError, match="error 8: no codec can decode the region") as stopped:
        next(batches)
    assert "bad_budget" not in str(stopped.value)
    assert "data.backend=" in str(stopped.value)
    assert not batches.bad
    assert not caplog.records
    assert 2 < len(tried) <= 1 + 16


def test_a_bad_record_in_a_micro_batch_of_one_is_told_from_a_decoder_that_fails(tmp_path, backend):
    pack = write(tmp_path / "p.h5", {21: blinded(list(images())[21])})
    order = EvalPlan(np.array([20, 21, 22]), batch=1)
    with eval_batches(pack, order, natural_eval(32), backend=backend) as batches:
        assert [batch.ids.tolist() for batch in batches] == [[20], [22], [22]]
        assert set(batches.bad) == {21}
    alone = eval_batches(pack, EvalPlan(np.array([21]), batch=1), natural_eval(32), backend=backend)
    with pytest.raises(UserError, match="none of the selected"):
        next(alone)


def test_a_flipped_bit_that_decodes_is_found_by_checking(tmp_path, backend):
    """JPEG decoders take wrong bits in the middle of a picture for another picture."""
    pack = write(tmp_path / "p.h5")
    path = tmp_path / "p-00000-of-00002.h5"
    record = bytes(pack.record(6))
    at = path.read_bytes().index(record) + len(record) // 2
    with open(path, "r+b") as file:
        file.seek(at)
        flipped = file.read(1)[0] ^ 4
        file.seek(at)
        file.write(bytes([flipped]))
    pack = Pack.open(path, alone=True)
    whole = EvalPlan(np.arange(15), batch=5)
    for check, bad in ((0.0, set()), (1.0, {6}), (0.34, {6})):  # 0.34: records 2, 5, 8, … of the order
        order = EvalPlan(np.array([0, 1, 6, 3, 4, 5]), batch=6) if check == 0.34 else whole
        batches = eval_batches(pack, order, natural_eval(32), backend=backend, check=check)
        seen = [i for b in batches for i in b.ids[b.valid].tolist()]
        assert set(batches.bad) == bad
        assert (6 in seen) == (not bad)


def test_reading_that_cannot_be_is_refused(tmp_path):
    pack = write(tmp_path / "p.h5")
    for how in ({"threads": 0}, {"prefetch": 0}, {"check": 1.5}, {"bad_budget": -1}, {"backend": "ffcv"}):
        with pytest.raises(UserError):
            train_batches(pack, plan(), natural_train(32), **{"backend": "host", **how})
    assert choose_backend("host") == "host"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
@pytest.mark.parametrize("decode", ["gpu", "mixed", "cpu"])
def test_on_a_gpu_bad_records_are_replaced_and_resuming_is_exact(tmp_path, decode):
    whole = list(images())
    pack = write(tmp_path / "p.h5", {i: blinded(whole[i]) for i in (4, 21)})
    how = {"backend": "dali", "device": "cuda", "decode": decode}
    straight = read(pack, natural_train(32), 0, 6, **how)
    same(read(pack, natural_train(32), 3, 6, **how), straight[3:])
    assert not {4, 21} & {int(i) for _, _, ids in straight for i in ids}
    assert all(pictures.isfinite().all() for pictures, _, _ in straight)
