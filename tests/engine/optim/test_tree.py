"""The tree of a sum: which numbers meet which, and that nothing of it depends on the number of ranks."""

import pytest
import torch
from torch import nn

from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.optim.flat import FlatParameters
from engine.optim.tree import TreeSum, check_ranks, merges, sum_over_ranks_
from engine.optim.tree import waiting as waiting_at_most
from loaders.errors import UserError
from tests.support.thread_ranks import on_ranks

ALONE = Communicator(Launch("alone"))
FP32 = torch.float32


def halved(parts):
    """The sum as the module says it: of the sums of two halves."""
    if len(parts) == 1:
        return parts[0]
    return halved(parts[: len(parts) // 2]) + halved(parts[len(parts) // 2 :])


class Term(str):
    """A sum that shows what was added to what, whichever came first."""

    def __add__(self, other):
        return Term(f"({' '.join(sorted((self, other)))})")


def numbers(count, length):
    """Rows whose sum depends on the order."""
    random = torch.Generator().manual_seed(count)
    return torch.randn(count, length, generator=random) * 10 ** torch.randn(count, length, generator=random)


@pytest.mark.parametrize("leaves", range(1, 34))
def test_leaves_that_come_in_order_make_the_tree_of_halves(leaves):
    terms, waiting, most = [Term(f"{k:02}") for k in range(leaves)], [], 0
    for term, count in zip(terms, merges(leaves), strict=True):
        for _ in range(count):
            term += waiting.pop()  # noqa: PLW2901
        waiting.append(term)
        most = max(most, len(waiting))
    assert waiting == [halved(terms)]
    assert waiting_at_most(leaves) == (most if leaves > 1 else 0)  # the last one has nobody to wait for


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [1, 3, 7, 1000])
def test_ranks_sum_as_one_does_to_the_bit(ranks, length):
    """Also fewer numbers than there are ranks, which halving leaves without any."""
    rows = numbers(ranks, length)

    def body(comm):
        mine = rows[comm.rank].clone()
        sum_over_ranks_(mine, torch.empty(-(-length // 2)), comm, "sum")
        return mine

    for found in on_ranks(ranks, body):
        assert torch.equal(found, halved(list(rows)))
    if (ranks, length) == (8, 1000):
        assert not torch.equal(halved(list(rows)), rows.sum(0))  # what another order gives


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(700)), nn.Parameter(torch.zeros(3, 100))


def summed(ranks, rows, slice_bytes, steps=1):
    """The buffer after `steps` steps whose micro-batches have `rows` as gradients, and say how many labels they had."""

    def body(comm):
        model = Two()
        flat = FlatParameters(model, channels_last=True)
        gradients = TreeSum(flat, comm, slice_bytes, FP32, len(rows))
        each = len(rows) // ranks
        for _ in range(steps):
            for index, row in enumerate(rows[comm.rank * each : (comm.rank + 1) * each]):
                gradients.start(first=index == 0)
                flat.count += 7
                flat.loss += row[0]
                with gradients.during_backward(first=index == 0, last=index == each - 1):
                    (model.a @ row[:700] + model.b.flatten() @ row[700:]).backward()
        return torch.cat([model.a.grad, model.b.grad.flatten(), flat.count, flat.loss])

    return on_ranks(ranks, body)


@pytest.mark.parametrize("leaves", [4, 12, 20])
@pytest.mark.parametrize("slice_bytes", [1, 10**6])
def test_gradients_are_the_same_bits_on_any_number_of_ranks(leaves, slice_bytes):
    rows = numbers(leaves, 1000)
    expected = torch.cat([halved(list(rows)), torch.tensor([7.0 * leaves]), halved([row[:1] for row in rows])])
    for ranks in (1, 2, 4):
        for found in summed(ranks, rows, slice_bytes, steps=2):
            assert torch.equal(found, expected), ranks


def test_a_step_that_broke_off_leaves_nothing_to_the_next():
    model, rows = Two(), numbers(3, 700)
    flat = FlatParameters(model, channels_last=True)
    gradients = TreeSum(flat, ALONE, 2**20, FP32, 3)
    for begun in (2, 3):
        for index, row in enumerate(rows[:begun]):
            gradients.start(first=index == 0)
            with gradients.during_backward(first=index == 0, last=index == 2):
                (model.a @ row).backward()
    assert torch.equal(model.a.grad, halved(list(rows)))
    assert not model.b.grad.any()


@pytest.mark.parametrize(
    ("leaves", "ranks", "possible"), [(8, 3, "1, 2, 4, 8"), (12, 8, "1, 2, 4"), (7, 2, "1"), (4, 8, "1, 2, 4")]
)
def test_ranks_that_do_not_fit_the_tree_are_refused_with_those_that_do(leaves, ranks, possible):
    with pytest.raises(UserError, match=f"{leaves} micro-batches a step on {ranks} ranks.* divides them: {possible};"):
        check_ranks(leaves, ranks)


def test_sums_that_are_rounded_on_their_way_are_refused():
    with pytest.raises(UserError, match="comm.gradients=bf16.*choose comm.gradients=fp32"):
        TreeSum(FlatParameters(Two(), channels_last=True), ALONE, 2**20, torch.bfloat16, 2)
