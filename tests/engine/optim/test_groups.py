"""The optimizer and its groups with networks of others, as who has never seen ours would use them."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from engine.optim import AgcSgd, named_groups
from loaders.errors import UserError

NETWORKS = {
    "resnet18": ("fc", lambda: torchvision.models.resnet18(num_classes=5)),
    "densenet": ("classifier", lambda: torchvision.models.densenet121(num_classes=5)),
    "vgg": ("classifier.6", lambda: torchvision.models.vgg11_bn(num_classes=5)),
    "vit": ("head", lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32)),
    "convnext": ("head.fc", lambda: timm.create_model("convnext_atto", num_classes=5)),
    "efficientnet": ("classifier", lambda: timm.create_model("efficientnet_b0", num_classes=5)),
    "timm's bit": ("head.fc", lambda: timm.create_model("resnetv2_50x1_bit", num_classes=5)),
}
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@pytest.fixture(params=NETWORKS)
def network(request):
    head, build = NETWORKS[request.param]
    with torch.device("meta"):
        return head, build()


def test_classifiers_norms_and_biases_of_others_are_found(network):
    head, model = network
    groups = named_groups(model, 1e-4, "norm_bias")
    unclipped = {name for group in groups if "clipping" in group for name in group["names"]}
    assert unclipped == {f"{head}.{name}" for name, _ in model.get_submodule(head).named_parameters()}
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        kept = parameter.ndim > 1 and leaf != "bias" and not isinstance(model.get_submodule(module), NORMS)
        assert decays.pop(name) == (1e-4 if kept else 0.0)
    assert not decays


@pytest.mark.parametrize(
    ("build", "last"),
    [
        (lambda: timm.create_model("resnet18", num_classes=0), "'layer4.1.bn2', is a BatchNorm2d"),
        (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0), "'norm', is a LayerNorm"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "'0', is a Conv2d"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Embedding(4, 2)), "'1', is a Embedding"),
        (lambda: nn.Linear(2, 2), "the model itself, is a Linear"),
        (nn.ReLU, "there are no parameters"),
    ],
)
def test_a_model_whose_classifier_cannot_be_told(build, last):
    with torch.device("meta"):
        model = build()
    with pytest.raises(UserError, match=rf"would be the classifier.*{last}.*head='NAME'.*head='' where the model has"):
        named_groups(model, 1e-4)
    assert all("clipping" not in group for group in named_groups(model, 1e-4, head=""))


def test_clipping_by_names(network):
    head, model = network
    first = next(name for name, _ in model.named_parameters())
    groups = named_groups(model, 0.0, clipping={first: None, "*.bias": 0.5, "*1*": 0.25})
    found = {name: group.get("clipping", "own") for group in groups for name in group["names"]}
    for name, _ in model.named_parameters():
        inside = ["1" in name[:at] for at, letter in enumerate(name + ".") if letter == "."]
        expected = None if name.startswith(f"{head}.") or name == first else "own"
        if expected == "own" and name.endswith(".bias"):
            expected = 0.5
        elif expected == "own" and any(inside):
            expected = 0.25
        assert found.pop(name) == expected, name
    assert not found
    optimizer = AgcSgd(groups)
    assert {group["clipping"] for group in optimizer.param_groups} == {group.get("clipping", 0.01) for group in groups}


def test_patterns_are_of_whole_names_and_fit_something():
    model = torchvision.models.resnet18(num_classes=5)
    body, layer, _ = named_groups(model, 0.0, clipping={"layer4": 0.02})
    assert layer["clipping"] == 0.02
    assert set(layer["names"]) == {name for name, _ in model.named_parameters() if name.startswith("layer4.")}
    assert "clipping" not in body
    with pytest.raises(UserError, match=r"nothing with trainable parameters is named 'layer5'; did you mean 'layer4'"):
        named_groups(model, 0.0, clipping={"layer5": 0.02})
    with pytest.raises(UserError, match=r"'fc' is only the classifier.*head=''"):
        named_groups(model, 0.0, clipping={"fc": 0.02})
    (_, head) = named_groups(model, 0.0, head="", clipping={"fc": 0.02})
    assert (head["clipping"], head["names"]) == (0.02, ["fc.weight", "fc.bias"])
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    assert len(named_groups(wrapped, 0.0, clipping={"layer4.*.bn?": None})) == 2
    with pytest.raises(ValueError, match="clipping is -1"):
        AgcSgd(named_groups(model, 0.0, clipping={"layer4": -1}))


def test_what_wrappers_put_in_names_does_not_matter():
    model = torchvision.models.resnet18(num_classes=5)
    plain = named_groups(model, 1e-4, "norm_bias", head="fc")
    wrapped = named_groups(torch.compile(nn.DataParallel(model), backend="eager"), 1e-4, "norm_bias", head="fc")
    assert [list(map(id, group["params"])) for group in wrapped] == [list(map(id, group["params"])) for group in plain]


@pytest.mark.parametrize("implementation", ["auto", "foreach"])
def test_a_plain_loop_learns_with_what_torchs_sgd_is_given(implementation):
    """Defaults, a schedule that turns momentum too, a copy, a state of SGD."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4))
    optimizer = AgcSgd(named_groups(model, 1e-4, "norm_bias"), implementation=implementation)
    assert [group["lr"] for group in optimizer.param_groups] == [torch.optim.SGD([torch.ones(1)]).defaults["lr"]] * 4
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=40)
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    again = copy.deepcopy(optimizer)
    again.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("implementation", ["auto", "fused", "foreach"])
@pytest.mark.parametrize("empty", [0, 1])
def test_a_group_may_be_empty(implementation, empty):
    """As where a list of names matches nothing; torch's SGD takes it."""
    first, second = ([nn.Parameter(torch.ones(3))] for _ in range(2))
    groups = [{"params": first}, {"params": second}]
    groups.insert(empty, {"params": [], "lr": 0.5})
    if implementation == "fused":
        pytest.importorskip("engine._C", reason="the extension is not built")
    optimizer = AgcSgd(groups, implementation=implementation)
    reference = AgcSgd([copy.deepcopy(first[0]), copy.deepcopy(second[0])], implementation="foreach")
    for one in (optimizer, reference):
        params = [p for group in one.param_groups for p in group["params"]]
        for p in params:
            p.grad = torch.full_like(p, 2.0)
        one.step()
    found = [p for group in optimizer.param_groups for p in group["params"]]
    for ours, theirs in zip(found, reference.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_group_at_all_is_refused_as_torch_does():
    with pytest.raises(ValueError, match="empty parameter list"):
        AgcSgd([])


def test_all_groups_empty_takes_a_step_and_then_more_parameters():
    optimizer = AgcSgd([{"params": []}])
    optimizer.step()
    weight = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [weight]})
    weight.grad = torch.ones(3)
    optimizer.step()
    assert (weight < 1).all()
