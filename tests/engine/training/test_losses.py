import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from engine.training.losses import cross_entropy, masked_bce, mixup, mixup_share
from engine.training.objective import class_weights


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


def test_weighted_losses():
    """Of classes, against torch's mean and a sum over probabilities; of 0 and 1 of labels, against scikit-learn's."""
    rng = np.random.RandomState(2)
    logits, labels, weights = rng.randn(40, 4), rng.randint(0, 4, 40), np.array([0.5, 2.0, 0.0, 1.0])
    tensors = [torch.from_numpy(each) for each in (logits, labels, weights)]
    total, count = cross_entropy(tensors[0], tensors[1], weights=tensors[2])
    expected = torch.nn.functional.cross_entropy(*tensors)
    assert (total / count).item() == pytest.approx(expected.item(), rel=1e-12)
    valid = torch.from_numpy(rng.rand(40) < 0.5)
    part = cross_entropy(tensors[0], tensors[1], valid, tensors[2])
    alone = cross_entropy(tensors[0][valid], tensors[1][valid], weights=tensors[2])
    assert [each.item() for each in part] == pytest.approx([each.item() for each in alone])
    order = torch.from_numpy(rng.permutation(40))
    _, mixed = mixup(torch.zeros(40, 1), tensors[1], torch.zeros(40, 1), tensors[1][order], 0.3, 4)
    both = [cross_entropy(tensors[0], each, weights=tensors[2]) for each in (tensors[1], tensors[1][order])]
    found = cross_entropy(tensors[0], mixed, weights=tensors[2])
    for k in range(2):
        assert found[k].item() == pytest.approx(0.3 * both[0][k].item() + 0.7 * both[1][k].item(), rel=1e-5)
    vectors = (rng.rand(40, 4) < 0.3).astype(float)
    vectors[rng.rand(40, 4) < 0.2] = np.nan
    each = np.array([[1.0, 3.0], [0.2, 1.0], [1.0, 1.0], [2.0, 0.0]])
    total, count = masked_bce(tensors[0], torch.from_numpy(vectors), weights=torch.from_numpy(each))
    rows, columns = np.nonzero(~np.isnan(vectors))
    truth = vectors[rows, columns]
    weight = each[columns, truth.astype(int)]
    probability = 1 / (1 + np.exp(-logits[rows, columns]))
    assert (total / count).item() == pytest.approx(log_loss(truth, probability, sample_weight=weight))
    assert count.item() == pytest.approx(weight.sum())


def test_weights_against_frequency():
    labels = np.array([0, 0, 0, 1, 3, 3])
    by_class = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    np.testing.assert_allclose(class_weights(labels, 4), [*by_class[:2], 0, by_class[2]], rtol=1e-6)
    vectors = np.array([[1, 0, np.nan], [0, np.nan, np.nan], [0, 0, np.nan], [0, 0, np.nan]])
    first = compute_class_weight("balanced", classes=np.array([0, 1]), y=vectors[:, 0])
    np.testing.assert_allclose(class_weights(vectors, 3), [first, [1, 0], [0, 0]], rtol=1e-6)


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
    images, labels = torch.randn(2, 4, 3, 2, 2), torch.tensor([[0, 1, 2, 1], [2, 1, 0, 0]])
    mixed, targets = mixup(images[0], labels[0], images[1], labels[1], 0.7, num_classes=3)
    torch.testing.assert_close(mixed, 0.7 * images[0] + 0.3 * images[1])
    logits = torch.randn(4, 3)
    expected = 0.7 * cross_entropy(logits, labels[0])[0] + 0.3 * cross_entropy(logits, labels[1])[0]
    torch.testing.assert_close(cross_entropy(logits, targets)[0], expected)


def test_mixup_of_label_vectors_is_the_mixture_of_two_masked_losses():
    """As the published code has it; both means are over as many labels, for partners are a permutation."""
    rng = np.random.RandomState(1)
    logits, labels = rng.randn(30, 5) * 4, rng.randint(0, 2, (30, 5)).astype(np.float64)
    labels[rng.rand(30, 5) < 0.4] = np.nan
    order, share = rng.permutation(30), 0.7

    def masked_mean(truth):
        probability = 1 / (1 + np.exp(-logits))
        return np.nanmean(
            -np.log(np.where(np.isnan(truth), np.nan, np.where(truth == 1, probability, 1 - probability)))
        )

    none = torch.zeros(30, 1)
    _, targets = mixup(none, torch.from_numpy(labels), none, torch.from_numpy(labels[order]), share)
    tensor = torch.from_numpy(logits).requires_grad_()
    total, count = masked_bce(tensor, targets)
    assert count.item() == pytest.approx((~np.isnan(labels)).sum())
    assert (total / count).item() == pytest.approx(
        share * masked_mean(labels) + (1 - share) * masked_mean(labels[order])
    )
    total.backward()
    unknown = np.isnan(labels) & np.isnan(labels[order])
    assert unknown.any()
    assert torch.equal(tensor.grad == 0, torch.from_numpy(unknown))


def test_mixup_shares_are_beta_distributed():
    shares = [mixup_share(0.1, u) for u in np.random.RandomState(0).rand(4000)]
    assert stats.kstest(shares, stats.beta(0.1, 0.1).cdf).pvalue > 0.01
    assert mixup_share(0.0, 0.3) == 1.0
    assert 0 <= mixup_share(0.1, 0.0) <= mixup_share(0.1, 1 - 2**-53) <= 1
