import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import log_loss

from engine.training.losses import cross_entropy, masked_bce, mixup, mixup_share


def test_cross_entropy_is_scikit_learns():
    logits, labels = torch.randn(50, 7) * 3, torch.arange(50) % 7
    total, count = cross_entropy(logits, labels)
    expected = log_loss(labels, logits.double().softmax(1), labels=range(7), normalize=False)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert count.item() == 50


def test_cross_entropy_of_probabilities():
    logits = torch.randn(20, 5, dtype=torch.float64)
    targets = torch.rand(20, 5, dtype=torch.float64)
    targets /= targets.sum(1, keepdim=True)
    total, _ = cross_entropy(logits, targets)
    values = logits.numpy()
    expected = (targets.numpy() * (np.log(np.exp(values).sum(1, keepdims=True)) - values)).sum()
    assert total.item() == pytest.approx(expected, rel=1e-12)


def test_parts_add_up():
    logits, labels = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 3
    whole = cross_entropy(logits, labels)
    parts = [cross_entropy(logits[i : i + 5], labels[i : i + 5]) for i in range(0, 12, 5)]
    for k in range(2):
        assert sum(part[k] for part in parts).item() == pytest.approx(whole[k].item(), rel=1e-12)


def test_invalid_samples_do_not_count():
    logits = torch.randn(6, 3, requires_grad=True)
    labels, valid = torch.arange(6) % 3, torch.tensor([True, False, True, True, False, True])
    total, count = cross_entropy(logits, labels, valid)
    expected, number = cross_entropy(logits[valid], labels[valid])
    assert (total.item(), count.item()) == (pytest.approx(expected.item()), number.item())
    total.backward()
    assert (logits.grad.abs().sum(1) > 0).tolist() == valid.tolist()
    known = torch.zeros(6, 2)
    assert masked_bce(torch.zeros(6, 2), known, valid)[1].item() == 8


def test_masked_bce_is_a_plain_loop():
    rng = np.random.RandomState(0)
    logits, labels = rng.randn(40, 6) * 5, rng.randint(0, 2, (40, 6)).astype(np.float64)
    labels[rng.rand(40, 6) < 0.3] = np.nan
    expected, number = 0.0, 0
    for row, truths in zip(logits, labels, strict=True):
        for x, y in zip(row, truths, strict=True):
            if not np.isnan(y):
                p = 1 / (1 + np.exp(-x))
                expected -= y * np.log(p) + (1 - y) * np.log(1 - p)
                number += 1
    total, count = masked_bce(torch.from_numpy(logits), torch.from_numpy(labels))
    assert total.item() == pytest.approx(expected, rel=1e-10)
    assert count.item() == number
    total, _ = masked_bce(torch.from_numpy(logits).float(), torch.from_numpy(labels).float())
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_unknown_labels_have_no_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    labels = torch.tensor([[1.0, 0.0, float("nan"), 1.0]] * 3)
    masked_bce(logits, labels)[0].backward()
    assert torch.count_nonzero(logits.grad[:, 2]) == 0
    assert torch.count_nonzero(logits.grad) == 9


def test_nothing_known_is_zero_and_finite():
    logits = torch.tensor([[1e4, -1e4], [0.0, 3.0]], requires_grad=True)
    total, count = masked_bce(logits, torch.full((2, 2), float("nan")))
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert torch.equal(logits.grad, torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_widened(dtype):
    logits = torch.randn(300, 10).to(dtype)
    labels = torch.arange(300) % 10
    assert torch.equal(cross_entropy(logits, labels)[0], cross_entropy(logits.float(), labels)[0])
    many = torch.zeros(300, 10)
    assert torch.equal(masked_bce(logits, many)[0], masked_bce(logits.float(), many)[0])
    assert cross_entropy(logits, labels)[0].dtype == torch.float32


def test_mixup_mixes_loss_as_well_as_images():
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])
    order = torch.tensor([2, 3, 0, 1])
    mixed, targets = mixup(images, labels, 0.7, order, num_classes=3)
    torch.testing.assert_close(mixed[1], 0.7 * images[1] + 0.3 * images[3])
    logits = torch.randn(4, 3)
    expected = 0.7 * cross_entropy(logits, labels)[0] + 0.3 * cross_entropy(logits, labels[order])[0]
    torch.testing.assert_close(cross_entropy(logits, targets)[0], expected)


def test_mixup_of_unknown_labels_is_unknown():
    labels = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    _, targets = mixup(torch.zeros(2, 1), labels, 0.25, torch.tensor([1, 0]))
    assert targets[:, 0].tolist() == [0.25, 0.75]
    assert targets[:, 1].isnan().all()


def test_mixup_shares_are_beta_distributed():
    shares = [mixup_share(0.1, u) for u in np.random.RandomState(0).rand(4000)]
    assert stats.kstest(shares, stats.beta(0.1, 0.1).cdf).pvalue > 0.01
    assert mixup_share(0.0, 0.3) == 1.0
    assert 0 <= mixup_share(0.1, 0.0) <= mixup_share(0.1, 1 - 2**-53) <= 1
