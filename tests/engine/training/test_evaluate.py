import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, recall_score, roc_auc_score
from torch import nn

from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.training import objective
from engine.training.evaluate import evaluate, per_class_auc, without_auc
from engine.training.precision import Precision
from loaders.pipelines.batches import Batch

COMM = Communicator(Launch("alone"))
FP32 = Precision("fp32", torch.device("cpu"))


def batches(images, labels, size):
    """As the loaders give them: the last batch filled up with repeats that do not count."""
    for start in range(0, len(images), size):
        ids = torch.arange(start, start + size)
        valid = ids < len(images)
        ids = torch.where(valid, ids, 0)
        yield Batch(images[ids], labels[ids], ids, valid)


class Flat(nn.Module):
    """Logits are the first values of the image."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        return images.flatten(1)[:, : self.classes]


def test_classes_against_scikit_learn():
    torch.manual_seed(0)
    images, labels = torch.randn(53, 3, 2, 2), torch.randint(0, 5, (53,))
    found = evaluate(Flat(5), batches(images, labels, 16), objective.choose(labels.numpy()), COMM, FP32)
    logits = images.flatten(1)[:, :5]
    assert found["images"] == 53
    assert found["top1"] == pytest.approx(100 * accuracy_score(labels, logits.argmax(1)))
    expected = log_loss(labels, logits.double().softmax(1), labels=range(5))
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_single_classes_and_an_interval_where_they_are_asked_for():
    """Recall by scikit-learn; the area of each class where that is the score. Padding does not count."""
    torch.manual_seed(0)
    images, labels, names = torch.randn(53, 3, 2, 2), torch.randint(0, 4, (53,)), ["a", "b", "c", "d", "none"]
    chosen = objective.choose(labels.numpy())
    found = evaluate(Flat(5), batches(images, labels, 16), chosen, COMM, FP32, class_names=names)
    logits = images.flatten(1)[:, :5]
    recalls = recall_score(labels, logits.argmax(1), labels=range(4), average=None)
    assert [found[f"class/{name}"] for name in names[:4]] == pytest.approx(100 * recalls)
    assert np.isnan(found["class/none"])
    assert found["low"] < found["top1"] < found["high"]
    areas = evaluate(Flat(5), batches(images, labels, 16), chosen, COMM, FP32, mean_auc=True, class_names=names)
    expected = roc_auc_score(labels == 2, logits.softmax(1)[:, 2])
    assert areas["class/c"] == pytest.approx(100 * expected)
    assert areas["low"] < areas["mean_auc"] < areas["high"]
    plain = evaluate(Flat(5), batches(images, labels, 16), chosen, COMM, FP32)
    assert set(plain) == {"loss", "images", "top1"}


def test_label_vectors_with_unknowns_against_scikit_learn():
    torch.manual_seed(0)
    images = torch.randn(61, 3, 2, 2)
    labels = torch.randint(0, 2, (61, 4)).float()
    labels[torch.rand(61, 4) < 0.3] = float("nan")
    labels[:, 3] = 1.0  # only positives: this one has no area
    found = evaluate(Flat(4), batches(images, labels, 16), objective.choose(labels.numpy()), COMM, FP32)
    scores = images.flatten(1)[:, :4]
    known = ~labels.isnan()
    areas = [roc_auc_score(labels[known[:, k], k], scores[known[:, k], k]) for k in range(3)]
    assert found["mean_auc"] == pytest.approx(100 * np.mean(areas))
    assert found["auc_classes"] == 3
    assert found["images"] == 61
    flat_labels, flat_scores = labels[known].double(), scores[known].double()
    expected = nn.functional.binary_cross_entropy_with_logits(flat_scores, flat_labels)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_single_labels_by_mean_auc_against_scikit_learn():
    """As PadChest-cl is scored; the class 3 is in no sample."""
    torch.manual_seed(0)
    images, labels = torch.randn(53, 3, 2, 2), torch.tensor([0, 1, 2, 4])[torch.randint(0, 4, (53,))]
    found = evaluate(Flat(5), batches(images, labels, 16), objective.choose(labels.numpy()), COMM, FP32, mean_auc=True)
    chances = images.flatten(1)[:, :5].double().softmax(1)
    areas = [roc_auc_score(labels == k, chances[:, k]) for k in (0, 1, 2, 4)]
    assert found["mean_auc"] == pytest.approx(100 * np.mean(areas))
    assert found["auc_classes"] == 4
    assert found["top1"] == pytest.approx(100 * accuracy_score(labels, chances.argmax(1)))


def test_labels_without_an_area_are_named():
    nan = float("nan")
    vectors = np.array([[1, 0, nan, 1, nan], [0, 0, nan, 1, 1], [nan, nan, nan, 1, 0]])
    assert without_auc(vectors, ["both", "none", "unknown", "all", "known pair"]) == ["none", "unknown", "all"]
    assert without_auc(np.array([0, 2, 2]), ["a", "b", "c"]) == ["b"]
    assert without_auc(np.array([1, 1]), ["a", "b"]) == ["a", "b"]
    areas = per_class_auc(vectors, np.zeros(vectors.shape))
    assert np.isnan(areas).tolist() == [False, True, True, True, False]


def test_without_any_known_pair_there_is_no_auc():
    labels = np.array([[np.nan, 1.0], [np.nan, 1.0]])
    assert np.isnan(per_class_auc(labels, np.zeros((2, 2)))).all()


def test_ties_count_half():
    assert per_class_auc(np.array([[0.0], [1.0]]), np.zeros((2, 1))) == [0.5]


def test_the_network_goes_on_training_afterwards():
    model = Flat(2).train()
    evaluate(model, batches(torch.randn(3, 3, 1, 1), torch.tensor([0, 1, 1]), 2), objective.choose(np.zeros(3)),
             COMM, FP32)  # fmt: skip
    assert model.training
