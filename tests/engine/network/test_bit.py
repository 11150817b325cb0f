import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.network import bit, family
from loaders.errors import UserError

PUBLISHED = {  # BiT's own table, and the paper's heads
    ("R50x1", 1000): 25_549_352,
    ("R50x1", 21_842): 68_254_610,
    ("R50x1", 13): 23_526_989,
    ("R50x1", 7): 23_514_695,
    ("R152x4", 1000): 936_533_224,
    ("R152x4", 21_842): 1_107_291_730,
    ("R152x4", 13): 928_446_733,
    ("R152x4", 7): 928_397_575,
    ("R50x3", 1000): 217_319_080,
    ("R101x1", 1000): 44_541_480,
    ("R101x3", 1000): 387_934_888,
    ("R152x2", 1000): 236_335_208,
}

SMALL = [name for name in bit.MEMBERS if name.endswith("px")]


def on_meta(name, num_classes):
    with torch.device("meta"):
        return bit.build(name, num_classes)


def randomize(model):
    """No parameter at 0 or 1, so that a mix-up of any two shows."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.3 + 0.1
    return model


def timm_names(state):
    """Our names → timm's, by the rules of timm's own reader of the official files."""
    names = {}
    for name in state:
        new = name.replace("root.conv", "stem.conv").replace("head.gn", "norm").replace("head.conv", "head.fc")
        new = new.replace("downsample", "downsample.conv").replace(".gn", ".norm")
        if new.startswith("body."):
            _, block, unit, rest = new.split(".", 3)
            new = f"stages.{int(block[5:]) - 1}.blocks.{int(unit[4:]) - 1}.{rest}"
        names[name] = new
    return names


@pytest.mark.parametrize(("name", "classes"), PUBLISHED)
def test_parameter_counts(name, classes):
    model = on_meta(name, classes)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name, classes]
    assert bit.cost(name, classes).parameters == PUBLISHED[name, classes]


@pytest.mark.parametrize("size", [64, 75])
@pytest.mark.parametrize("name", ["R50x1", "R101x3", *SMALL])
def test_cost_is_what_torch_counts(name, size):
    model = on_meta(name, 10)
    images = torch.empty(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as forward:
        logits = model(images)
    with FlopCounterMode(display=False) as both:
        model(images).sum().backward()
    cost = bit.cost(name, 10, size)
    assert logits.shape == (1, 10)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.forward_flops == forward.get_total_flops()
    assert cost.training_flops == both.get_total_flops()


@pytest.mark.parametrize(("name", "gflop"), [("R50x1", 24.3), ("R152x4", 1096)])
def test_published_training_cost(name, gflop):
    assert bit.cost(name, 1000).training_flops == pytest.approx(gflop * 1e9, rel=0.01)


@pytest.mark.parametrize("size", [64, 75])
def test_equals_timm(size):
    timm = pytest.importorskip("timm", reason="timm, the reference, is not installed")
    ours = randomize(bit.build("R50x1", 17)).eval()
    theirs = timm.create_model("resnetv2_50x1_bit", num_classes=17).eval()
    names = timm_names(ours.state_dict())
    theirs.load_state_dict({names[k]: v for k, v in ours.state_dict().items()})
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = theirs(images)
        assert (ours(images) - expected).abs().max() <= 1e-4 * expected.abs().max()
        channels_last = ours.to(memory_format=torch.channels_last)
        actual = channels_last(images.to(memory_format=torch.channels_last))
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_parameter_names_are_the_published_ones():
    names = set(on_meta("R50x1", 5).state_dict())
    unit = {
        f"{layer}{i}.{leaf}" for i in "123" for layer, leaf in (("gn", "weight"), ("gn", "bias"), ("conv", "weight"))
    }
    expected = {"root.conv.weight"} | {f"head.{m}.{leaf}" for m in ("gn", "conv") for leaf in ("weight", "bias")}
    for block, depth in enumerate((3, 4, 6, 3), start=1):
        expected |= {f"body.block{block}.unit{j:02d}.{key}" for j in range(1, depth + 1) for key in unit}
        expected.add(f"body.block{block}.unit01.downsample.weight")
    assert names == expected


def test_root_pads_with_zeros_and_strides_are_on_the_3x3():
    model = on_meta("R50x1", 5)
    assert (model.root.pad.padding, model.root.pad.value) == ((1, 1, 1, 1), 0.0)
    assert (model.root.pool.kernel_size, model.root.pool.stride, model.root.pool.padding) == (3, 2, 0)
    unit = model.body.block2.unit01
    assert (unit.conv1.stride, unit.conv2.stride, unit.conv3.stride) == ((1, 1), (2, 2), (1, 1))
    assert unit.gn1.eps == 1e-5
    assert {unit.gn1.num_groups, model.head.gn.num_groups} == {32}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(5, 3, 7, 7), (4, 8, 1, 1), (2, 3, 3, 3)])
def test_standardize_and_its_gradient(shape, layout):
    weight = (torch.randn(shape, dtype=torch.float64) * 0.01 + 3).to(memory_format=layout).requires_grad_()
    mean = weight.mean((1, 2, 3), keepdim=True)
    variance = ((weight - mean) ** 2).mean((1, 2, 3), keepdim=True)
    expected = (weight - mean) / (variance + 1e-10).sqrt()
    cotangent = torch.randn(shape, dtype=torch.float64)
    (expected_grad,) = torch.autograd.grad(expected, weight, cotangent)
    actual = bit.standardize(weight)
    (grad,) = torch.autograd.grad(actual, weight, cotangent)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-8)
    assert actual.is_contiguous(memory_format=layout)


def test_standardization_keeps_fp32_under_autocast():
    weight = torch.randn(8, 4, 3, 3) * 1e-3 + 5
    expected = bit.standardize(weight)
    with torch.autocast("cpu", torch.bfloat16):
        actual = bit.standardize(weight)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    half = bit.standardize(weight.half())
    wide = bit.standardize(weight.half().float())
    assert torch.equal(half, wide.half())


def test_standardized_weights_are_taken_as_they_are():
    conv = bit.StdConv2d(3, 4, 3, bias=False)
    x = torch.randn(2, 3, 8, 8)
    expected = conv(x)
    conv.standardized = bit.standardize(conv.weight.data)
    torch.testing.assert_close(conv(x), expected)
    assert set(conv.state_dict()) == {"weight"}
    assert bit.StdConv2d(3, 4, 3).standardized is None


def test_new_head_is_zero_and_every_parameter_learns():
    model = bit.build("R8x0.25-8px", 4)
    assert torch.count_nonzero(model(torch.randn(2, 3, 8, 8))) == 0
    model = bit.build("R8x0.25-8px", 4, zero_head=False)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_small_members_take_other_sizes(name):
    model = bit.build(name, 3, zero_head=False)
    for size in (8, 32, 65):
        assert model(torch.randn(1, 3, size, size)).shape == (1, 3)


def test_autocast_logits_are_close():
    model = randomize(bit.build("R11x0.25-32px", 5))
    x = torch.randn(4, 3, 32, 32)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(x)
    assert (actual.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_traces_without_graph_breaks():
    model = bit.build("R8x0.25-8px", 3, zero_head=False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8)
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(x), model(x))


def test_bad_requests():
    with pytest.raises(UserError, match="R50x2.*nearest.*R50x"):
        bit.build("R50x2", 10)
    with pytest.raises(UserError, match="nearest is 'R50x1'"):
        bit.cost("r50x1", 10)
    with pytest.raises(UserError, match="num_classes is 0"):
        bit.build("R50x1", 0)


def test_layers_are_those_of_the_network():
    """The scaling model takes its slices of gradients from this list: names, order and sizes must be the network's."""
    found = {layer.name: layer.parameters for layer in family.layers("R152x4", 21_842)}
    expected = {}
    for name, parameter in on_meta("R152x4", 21_842).named_parameters():
        layer = name.rpartition(".")[0]
        expected[layer] = expected.get(layer, 0) + parameter.numel()
    assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet50", "R50x1"), ("resnetv2_50x3_bit", "R50x3"), ("BiT-M-R101x1", "R101x1"), ("resnet152", "R152x2"),
     ("r50x1", "R50x1"), ("ResNet-101x4", "R101x3"), ("R20-32px", "R20x0.5-32px")],
)  # fmt: skip
def test_names_of_other_libraries_lead_to_the_network_of_as_many_layers(name, nearest):
    with pytest.raises(UserError, match=f"the nearest is '{nearest}'"):
        family.member(name)


@pytest.mark.parametrize("name", family.MEMBERS)
def test_names_say_the_layers_and_the_width(name):
    """Three convolutions in each unit, the root and the classifier, as ResNets are counted (arXiv 1512.03385)."""
    spec = family.member(name)
    layers, width = name.partition("-")[0].removeprefix("R").split("x")
    assert 3 * sum(spec.depths) + 2 == int(layers)
    assert spec.width == float(width)
