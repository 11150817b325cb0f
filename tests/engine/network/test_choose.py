"""Networks of timm: the classifier is known by name, for clipping and for transfer."""

import copy
import json

import pytest
import timm
import torch
from timm.utils.agc import adaptive_clip_grad

from engine import finetune, pretrain
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.config.loading import load
from engine.config.schema import FinetuneConfig, PretrainConfig
from engine.network import choose, weights
from engine.optim import AgcSgd, named_groups, standardized
from engine.optim.flat import FlatParameters
from engine.saving import checkpoint
from loaders.errors import UserError

ALONE = Communicator(Launch("alone"))


@pytest.mark.parametrize(("name", "size"), [("resnet10t", 64), ("test_vit", 160), ("test_efficientnet", 64)])
def test_the_classifier_is_exchanged_and_starts_at_zero(name, size):
    model = choose.build(f"timm/{name}", 3, size)
    own = choose.head(model)
    assert model.get_submodule(own) is model.get_classifier()
    assert model.training
    assert not any(parameter.any() for parameter in model.get_classifier().parameters())
    kept = choose.build(f"timm/{name}", 3, size, zero_head=False)
    assert kept.get_classifier().weight.any()
    state = timm.create_model(name, num_classes=7).state_dict()
    weights.apply(kept, state, new_head=True, head=f"{own}.")
    after = kept.state_dict()
    for key, value in state.items():
        assert key.startswith(f"{own}.") or torch.equal(after[key], value), key
    assert len(after[f"{own}.weight"]) == 3


@pytest.mark.parametrize("implementation", ["foreach", "auto"])
def test_a_step_is_that_of_timms_clipping_and_torchs_sgd(implementation):
    torch.manual_seed(0)
    ours = choose.build("timm/test_vit", 5, 160, zero_head=False).double().float()
    theirs = copy.deepcopy(ours)
    groups = named_groups(ours, 1e-4, "norm_bias", choose.head(ours))
    optimizer = AgcSgd(groups, lr=0.1, implementation=implementation)
    bare = [p for p in theirs.parameters() if p.ndim < 2]
    rest = [p for p in theirs.parameters() if p.ndim >= 2]
    reference = torch.optim.SGD(
        [{"params": rest, "weight_decay": 1e-4}, {"params": bare, "weight_decay": 0.0}],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
    )
    head = {id(p) for p in theirs.get_classifier().parameters()}
    images, labels = torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 2, 3])
    for _ in range(2):
        for model in (ours, theirs):
            model.zero_grad()
            (100 * torch.nn.functional.cross_entropy(model(images), labels)).backward()
        optimizer.step()
        adaptive_clip_grad([p for p in theirs.parameters() if id(p) not in head], clip_factor=0.01)
        reference.step()
    for (name, mine), yours in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-3, atol=1e-5, msg=name)


def test_a_network_of_timm_is_trained_kept_and_transferred(digits, tmp_path, capsys):
    """With batch norm, whose running statistics are of the state too."""
    small = ["data.size=32", "data.resize=32", "model.name=timm/test_efficientnet", f"folder={tmp_path / 'run'}"]
    packs = [f"data.train={digits / 'low-train.h5'}", f"data.val={digits / 'low-test.h5'}"]
    words = [*packs, *small, "schedule.epochs=null", "schedule.steps=3", "schedule.warmup_steps=1"]
    pretrain.pretrain(load(PretrainConfig, "demo", words, "pretrain"), ALONE)
    folder = checkpoint.find(tmp_path / "run")
    assert checkpoint.describe(folder)["network"] == "timm/test_efficientnet"
    state = weights.load(folder / checkpoint.WEIGHTS)
    assert state["bn2.num_batches_tracked"].item() == 3
    words = [
        f"data.train={digits / 'high-train.h5'}",
        f"data.test={digits / 'high-test.h5'}",
        f"from={tmp_path / 'run'}",
    ]
    words += ["data.size=32", "data.resize=36", "rule.steps=2", "shots=1", f"results={tmp_path / 'r.jsonl'}"]
    config = load(FinetuneConfig, "demo", words, "finetune")
    finetune.finetune(config, ALONE, dry_run=True)
    said = capsys.readouterr().out
    assert "peak memory" in said
    assert "GFLOP" not in said  # counted for the family only
    line = finetune.finetune(config, ALONE, quiet=True)
    assert line["network"] == "timm/test_efficientnet"
    assert json.loads((tmp_path / "r.jsonl").read_text()) == line


def test_what_only_the_family_has_is_refused():
    with pytest.raises(UserError, match="recompute=norm is for networks of the BiT family"):
        choose.build("timm/test_vit", 5, 160, recompute="norm")
    model = choose.build("timm/test_vit", 5, 160)
    flat = FlatParameters(model, channels_last=False)
    assert standardized.choose(model, flat, torch.float32) is None
    with pytest.raises(UserError, match="this network standardizes no weights"):
        standardized.choose(model, flat, torch.float32, "optimizer")


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [("timm/resnet51", 64, "timm has no network 'resnet51'; the nearest is timm/resnet51q"),
     ("timm/resnetv2_50x1_bit.goog_in21k", 64, "is R50x1 of the BiT family; say R50x1"),
     ("timm/test_vit", 100, "does not take images of 100 pixels a side"),
     ("timm/", 64, "timm has no network ''"),
     ("timm/hf-hub:someone/model", 64, "timm has no network"),
     ("timm/deit_tiny_distilled_patch16_224", 224, "no single classifier")],
)  # fmt: skip
def test_networks_that_cannot_be_are_refused(name, size, said):
    with pytest.raises(UserError) as error:
        choose.build(name, 5, size)
    assert said in str(error.value)
