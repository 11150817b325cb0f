"""The scaling model: against the paper's table, in its limits, and in which way each cause must act."""

import math
from dataclasses import replace

import numpy as np
import pytest

from bench.model import scaling as scaling_model
from bench.model.calibrate import FITTED, calibrate, least_absolute
from bench.model.facts import HERE, read_cluster, read_profile, read_rows
from bench.model.plan import plan
from bench.model.whatif import what_if
from engine.network import family
from loaders.errors import UserError

BOOSTER, SOURCES, PUBLISHED = read_cluster("juwels_booster")
TABLE2 = read_profile(PUBLISHED.profile)
LATER = [gpus for gpus in PUBLISHED.rows if gpus > PUBLISHED.calibrate_up_to]
SIZES = [1, 2, 3, 4, 8, 12, 64, 200, 1024, 3744]
FREE = {"base_us": 0, "nvlink_ring_us": 0, "nvlink_tree_us": 0, "network_us": 0, "contention": 0,
        "rail_gb_per_s": math.inf}  # fmt: skip


def free_network(cluster):
    return replace(cluster, **FREE, gpu=replace(cluster.gpu, nvlink_gb_per_s=math.inf))


def efficiency(profile, cluster, gpus):
    return scaling_model.predict(profile, cluster, gpus).efficiency


def test_the_rows_are_the_papers(shared):
    assert PUBLISHED.rows == read_rows(shared / "reference" / "table2.csv")
    text = (shared / "reference" / "paper.txt").read_text()
    table = text[text.index("Table 2: Scaling behavior in Im/s") :].split("Table 3")[0].replace(",", "")
    for gpus, rate in PUBLISHED.rows.items():
        assert f"{gpus}\t{rate:.2f}" in table


def test_calibrated_on_64_gpus_it_predicts_the_rest_of_table_2():
    early = {gpus: rate for gpus, rate in PUBLISHED.rows.items() if gpus <= 64}
    fitted = calibrate(TABLE2, BOOSTER, early, 64)
    assert LATER == [128, 256, 512, 1024]
    for gpus in LATER:
        found = scaling_model.predict(TABLE2, fitted, gpus).images_per_second
        assert found == pytest.approx(PUBLISHED.rows[gpus], rel=0.025), gpus


def test_later_rows_do_not_enter_the_calibration():
    expected = calibrate(TABLE2, BOOSTER, PUBLISHED.rows, 64)
    nonsense = {gpus: rate / (1 if gpus <= 64 else 7) for gpus, rate in PUBLISHED.rows.items()}
    assert calibrate(TABLE2, BOOSTER, nonsense, 64) == expected
    changed = [name for name in BOOSTER.__dataclass_fields__ if getattr(BOOSTER, name) != getattr(expected, name)]
    assert set(changed) <= set(FITTED)


def test_from_facts_and_the_speed_of_one_gpu_it_predicts_table_2():
    assert TABLE2.images_per_second == PUBLISHED.rows[1]
    for gpus, rate in PUBLISHED.rows.items():
        assert scaling_model.predict(TABLE2, BOOSTER, gpus).images_per_second == pytest.approx(rate, rel=0.04), gpus


def test_the_fit_finds_what_made_the_data():
    truth = replace(BOOSTER, contention=0.5, gpu_spread=0.004, node_jitter=0.002)
    made = {gpus: scaling_model.predict(TABLE2, truth, gpus).images_per_second for gpus in (4, 8, 16, 32, 64)}
    made[16] *= 0.97  # one odd row: least absolute deviations leave it alone
    fitted = calibrate(TABLE2, BOOSTER, made, 64)
    for name in FITTED:
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=1e-4), name
    assert least_absolute(np.array([[1.0], [1.0], [1.0]]), np.array([1.0, 2.0, 50.0])) == pytest.approx([2.0])
    with pytest.raises(UserError, match="2 at least"):
        calibrate(TABLE2, BOOSTER, {1: 129.0, 4: 500.0}, 64)


@pytest.mark.parametrize("gpus", SIZES)
def test_limits(gpus):
    fitted = calibrate(TABLE2, BOOSTER, PUBLISHED.rows, 64)
    for cluster in (BOOSTER, fitted):
        found = scaling_model.predict(TABLE2, cluster, gpus)
        assert 0 < found.efficiency <= 100
        assert found.efficiency + sum(found.lost().values()) == pytest.approx(100)
        ideal = replace(free_network(cluster), gpu_spread=0, node_jitter=0)
        assert efficiency(TABLE2, ideal, gpus) == pytest.approx(100, abs=1e-9)
        alike = replace(free_network(cluster), gpu_spread=0, node_jitter=0.003)  # stragglers stay with a free network
        assert (efficiency(TABLE2, alike, gpus) < 100) == (gpus > 4)
    for name in ("base_us", "network_us"):
        far = efficiency(TABLE2, replace(BOOSTER, **{name: 1e15}), gpus)
        assert far == (pytest.approx(0, abs=1e-3) if gpus > (4 if name == "network_us" else 1) else far)
    assert efficiency(TABLE2, BOOSTER, 1) == 100


def random_cases(n):
    generator = np.random.default_rng(5)
    for _ in range(n):
        change = {
            "rails": int(generator.integers(1, 9)),
            "gpus_per_node": int(generator.choice([1, 2, 4, 8])),
            "rail_gb_per_s": float(generator.uniform(1, 50)),
            "network_us": float(generator.uniform(0, 200)),
            "contention": float(generator.uniform(0, 1)),
            "gpu_spread": float(generator.uniform(0, 0.05)),
            "node_jitter": float(generator.uniform(0, 0.05)),
            "nodes_per_cell": int(generator.integers(1, 200)),
        }
        batch = int(generator.choice([1, 4, 32, 128]))
        yield (
            replace(TABLE2, batch=batch, images_per_second=float(generator.uniform(5, 500))),
            replace(BOOSTER, **change),
        )


@pytest.mark.parametrize("key, better", [("rail_gb_per_s", 2), ("network_us", 0.5), ("base_us", 0.5), ("rails", 2),
                                         ("contention", 0.5), ("gpu_spread", 0.5), ("node_jitter", 0.5),
                                         ("cell_links", 2)])  # fmt: skip
def test_a_better_cluster_is_never_slower(key, better):
    for profile, cluster in random_cases(25):
        improved = replace(cluster, **{key: type(getattr(cluster, key))(getattr(cluster, key) * better)})
        for gpus in SIZES:
            assert efficiency(profile, improved, gpus) >= efficiency(profile, cluster, gpus) - 1e-9


def test_efficiency_falls_and_speed_rises_with_size():
    for profile, cluster in random_cases(25):
        steps = scaling_model.sweep(profile, cluster, 900 * cluster.gpus_per_node)
        for before, after in zip(steps, steps[1:], strict=False):
            assert after.efficiency <= before.efficiency + 1e-9


def test_more_work_per_step_and_smaller_gradients_scale_better():
    for profile, cluster in random_cases(25):
        for gpus in SIZES:
            more = replace(profile, batch=2 * profile.batch)
            assert efficiency(more, cluster, gpus) >= efficiency(profile, cluster, gpus) - 1e-9
            # Half the bytes in slices of half the size: as many slices, ready at the same time.
            half = replace(profile, gradient_bytes=2, slice_mib=profile.slice_mib / 2)
            assert efficiency(half, cluster, gpus) >= efficiency(profile, cluster, gpus) - 1e-9


def test_all_reduce_by_hand():
    # One node: the chain of a ring of 4, 2 * 3 steps, each of a quarter of the bytes.
    assert scaling_model.ring(4e9, 4, BOOSTER) == pytest.approx(6e9 / 240e9 + 1e-6 * (8.4 + 6 * 3.4))
    # 4 nodes: 30 steps, 6 of them over the network; 4 rails of 25 GB/s.
    assert scaling_model.ring(1.6e9, 16, BOOSTER) == pytest.approx(3e9 / 100e9 + 1e-6 * (8.4 + 24 * 3.4 + 6 * 14))
    # Two levels of a tree over 4 nodes, 3 steps within a node, up and down.
    assert scaling_model.tree(1e9, 16, BOOSTER) == pytest.approx(2e9 / 92e9 + 1e-6 * (8.4 + 2 * (3 * 4 + 2 * 14)))
    # Beyond a cell 12 edges of a quarter of a node's 4 rails, each the speed of a link, share 10 links.
    across, within = (scaling_model.tree(1e12, n, BOOSTER) for n in (4 * 49, 4 * 48))
    assert across / within == pytest.approx(1.2, rel=1e-3)
    # Small messages prefer the tree, large ones the ring.
    assert scaling_model.tree(1e3, 1024, BOOSTER) < scaling_model.ring(1e3, 1024, BOOSTER)
    assert scaling_model.tree(1e12, 16, BOOSTER) > scaling_model.ring(1e12, 16, BOOSTER)


@pytest.mark.parametrize(("copies", "passes"), [(False, 0), (True, scaling_model.FUSION_MEMORY_PASSES)])
def test_the_traffic_through_memory_by_hand(copies, passes):
    """The gradients, as often as a ring of 2, 4 or 8 passes them, and once more into and out of a fusion buffer."""
    profile = replace(TABLE2, gradient_bytes=2, fusion_copies=copies)
    gradients = 2 * family.cost(profile.network, profile.num_classes, profile.size).parameters
    seconds = gradients / (1e9 * BOOSTER.gpu.memory_gb_per_s)
    for gpus, share in ((2, 1 / 2), (4, 3 / 4), (8, 7 / 8)):
        expected = (scaling_model.RING_MEMORY_PASSES * share + passes) * seconds
        assert scaling_model.memory_time(profile, BOOSTER, gpus) == pytest.approx(expected)
    assert scaling_model.memory_time(profile, BOOSTER, 1) == 0


def test_slices_are_those_of_the_engine():
    torch = pytest.importorskip("torch")
    from engine.network import bit
    from engine.optim.flat import FlatParameters
    from engine.optim.gradients import slices

    slice_bytes = 2**20
    flat = FlatParameters(bit.build("R50x1", 1000), channels_last=False)
    expected = [(part.end - part.begin) * 4 for part in slices(flat, slice_bytes)]
    profile = replace(TABLE2, network="R50x1", slice_mib=1)
    found = scaling_model.slices(profile)
    assert sum(size for size, _ in found) == 4 * sum(p.numel() for p in flat.parameters)
    # The engine cuts between any two parameters and pads them, the model between layers.
    assert len(found) == pytest.approx(len(expected), abs=2)
    assert [size for size, _ in found][:3] == pytest.approx(expected[:3], rel=0.01)
    shares = [share for _, share in found]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert torch.is_tensor(flat.grads)


def test_the_slowest_of_many_against_drawn_numbers():
    generator = np.random.default_rng(1)
    for n in (2, 4, 64, 1000):
        normal = generator.standard_normal((20_000_000 // n // 10, n)).max(1)
        assert scaling_model.slowest_normal(n) == pytest.approx(
            normal.mean(), abs=5 * normal.std() / len(normal) ** 0.5
        )
        delays = generator.exponential(size=(20_000_000 // n // 10, n)).max(1) - 1
        found = scaling_model.slowest_exponential(n)
        assert found == pytest.approx(delays.mean(), abs=5 * delays.std() / len(delays) ** 0.5)
    assert scaling_model.slowest_normal(1) == scaling_model.slowest_exponential(1) == 0


def test_the_exposed_part_by_hand():
    """Slices of equal size, so slow that they queue from the first on: what is exposed is the queue's end."""
    slow = replace(BOOSTER, rail_gb_per_s=0.01)
    first = scaling_model.slices(TABLE2)[0][1]
    backward = scaling_model.phases(TABLE2, slow).backward
    queue = sum(scaling_model.all_reduce(size, 64, slow) for size, _ in scaling_model.slices(TABLE2))
    assert scaling_model.exposed(TABLE2, slow, 64) == pytest.approx(first * backward + queue - backward)


def test_input_limits():
    starved = replace(TABLE2, input_images_per_second=64.57)  # half of what the network takes
    assert scaling_model.predict(starved, BOOSTER, 1).images_per_second == pytest.approx(64.57)
    assert scaling_model.predict(starved, BOOSTER, 1024).images_per_second == pytest.approx(1024 * 64.57, rel=1e-3)
    stored = replace(TABLE2, image_bytes=110_000)  # 1024 GPUs read 14 GB/s
    few = replace(BOOSTER, storage_gb_per_s=5)
    assert scaling_model.predict(stored, few, 1024).images_per_second == pytest.approx(5e9 / 110_000)
    assert scaling_model.predict(stored, few, 64).lost()["input"] == pytest.approx(0, abs=1e-9)
    assert scaling_model.predict(starved, BOOSTER, 1024).efficiency == pytest.approx(100)


def test_a_rate_seen_on_many_gpus_is_given_back_on_as_many():
    for name in ("r152x4_81h", "r50x1_13h"):
        profile = read_profile(name)
        found = scaling_model.predict(profile, BOOSTER, profile.at_gpus)
        assert found.images_per_second / profile.at_gpus == pytest.approx(profile.images_per_second)
    with pytest.raises(UserError, match="more than this cluster"):
        scaling_model.on_one_gpu(profile, replace(BOOSTER, network_us=1e7))


@pytest.mark.parametrize("recipe, gpus, hours", [("imagenet21k_r152x4", 256, 81), ("imagenet21k_r50x1", 128, 13.5)])
def test_plans_give_the_papers_hours(recipe, gpus, hours):
    found = plan(recipe, BOOSTER)
    assert found.gpus == gpus
    assert found.hours == pytest.approx(hours, rel=0.01)
    assert found.gpu_hours == pytest.approx(hours * gpus, rel=0.01)
    assert found.megawatt_hours == pytest.approx(hours * gpus * 471e-6, rel=0.01)
    assert plan("demo", BOOSTER) is None


@pytest.mark.parametrize("network", ["r50x1", "r152x4"])
def test_x_rays_are_planned_on_the_gpus_they_were_published_with(network):
    """64, where natural images had 128 and 256 (arXiv 2106.00116, section 3.1)."""
    assert plan(f"chexpert_{network}", BOOSTER).gpus == 64
    assert plan(f"chexpert_{network}", BOOSTER, gpus=8).gpus == 8


def test_what_if():
    both, _ = what_if("gradients=bf16", TABLE2, BOOSTER)
    assert both.gradient_bytes == 2
    assert what_if("rails=2", TABLE2, BOOSTER)[1].rails == 2
    assert what_if("slice_mib=16", TABLE2, BOOSTER)[0].slice_mib == 16
    faster, cluster = what_if("gpu=h100", TABLE2, BOOSTER)
    assert cluster.gpu.name == "h100-sxm5-80gb"
    assert faster.images_per_second == pytest.approx(129.14 * 3350 / 1555)
    assert "estimate" in faster.source
    unusable = {"railz=2": "rails", "rails": "key=value", "rails=-1": "more than 0", "rails=1.5": "whole",
                "gpu=tpu": "a100", "gradients=int8": "bf16", "slice_mib=x": "number", "network_us=nan": "number",
                "batch=0": "more than 0"}  # fmt: skip
    for text, said in unusable.items():
        with pytest.raises(UserError, match=said):
            what_if(text, TABLE2, BOOSTER)


def test_each_fact_names_its_source():
    for path in (HERE / "clusters").glob("*.yaml"):
        if path.stem != "gpus":
            cluster, sources, _ = read_cluster(path.stem)
            assert set(sources) == set(cluster.__dataclass_fields__) - {"name"}
            assert all(len(source) > 5 for source in sources.values())
