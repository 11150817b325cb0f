import pytest
import torch
from torch.nn import functional as F

from engine.network.memory import saved_bytes, saved_bytes_per_image


def storages(*tensors):
    return frozenset(tensor.untyped_storage()._cdata for tensor in tensors)


def test_what_a_product_keeps_is_counted_once():
    x = torch.empty(4, 8, device="meta", requires_grad=True)
    w = torch.empty(16, 8, device="meta", requires_grad=True)
    assert saved_bytes(lambda: F.linear(x, w)) == (4 * 8 + 16 * 8) * 4
    assert saved_bytes(lambda: F.linear(x, w), beside=storages(w)) == 4 * 8 * 4
    # Two products and a view keep the same input.
    assert saved_bytes(lambda: (F.linear(x, w), F.linear(x[:2], w)), beside=storages(w)) == 4 * 8 * 4


def test_storages_that_live_only_in_the_graph_count():
    x = torch.empty(1000, device="meta", requires_grad=True)
    # sin keeps x; exp keeps its result, and the square its input, which are the same storage.
    assert saved_bytes(lambda: x.sin().exp().square()) == 1000 * 4 * 2


def test_nothing_is_kept_where_no_gradient_is_wanted():
    x = torch.empty(1000, device="meta", requires_grad=True)
    with torch.no_grad():
        assert saved_bytes(lambda: x.sin().exp()) == 0


@pytest.mark.parametrize(
    ("name", "recompute", "budget"),
    [
        ("R50x1", "none", 38),
        ("R50x1", "norm", 21),
        ("R50x1", "unit", 15),
        ("R152x4", "none", 325),
        ("R152x4", "norm", 169),
        ("R152x4", "unit", 115),
    ],
)
def test_networks_keep_within_their_budget(name, recompute, budget):
    """MiB an image at 224 px in bf16: inputs of convolutions and of norms, 2 bytes each; of norms; of units."""
    assert saved_bytes_per_image(name, 224, torch.bfloat16, recompute) <= budget * 2**20
    assert not torch.is_autocast_enabled("cuda")
