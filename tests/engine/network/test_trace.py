"""What a network does on a GPU, traced on fake CUDA tensors: no GPU is needed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine import compiled
from engine.network import bit, norm

pytestmark = pytest.mark.skipif(
    not compiled.loaded(), reason="engine._C is not built: python setup.py build_ext --inplace"
)
aten, own = torch.ops.aten, torch.ops.boosterbit
BATCH = 2


class Calls(TorchDispatchMode):
    """Notes each operation, its arguments, and its results.

    Convolutions answer in the layout of what they are given, as cuDNN does: without a GPU torch asks another backend.
    """

    def __init__(self):
        super().__init__()
        self.all = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function == aten.convolution.default and args[0].is_contiguous(memory_format=torch.channels_last):
            found = torch.empty_like(found, memory_format=torch.channels_last)
        results = [t for t in (found if isinstance(found, tuple | list) else [found]) if isinstance(t, torch.Tensor)]
        self.all.append((function, args, results))
        return found


@pytest.fixture(scope="module")
def traced():
    """R50x1's forward pass in bf16, with kernels that the optimizer standardizes: its calls, and the mode."""
    mode = FakeTensorMode()
    with mode:
        with torch.device("cuda"):
            model = bit.build("R50x1", 1000)
            images = torch.empty(BATCH, 3, 224, 224, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
            for module in model.modules():
                if isinstance(module, bit.StdConv2d):
                    kernel = torch.empty_like(module.weight, dtype=torch.bfloat16)
                    module.standardized = kernel.to(memory_format=torch.channels_last)
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with Calls() as calls:
                assert model(images).dtype == torch.bfloat16
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
            torch.clear_autocast_cache()
    return calls.all, mode


def is_activation(tensor):
    return tensor.is_floating_point() and tensor.ndim == 4 and tensor.shape[0] == BATCH


def test_activations_stay_as_they_are(traced):
    calls, _ = traced
    activations = [t for _, _, results in calls for t in results if is_activation(t)]
    assert len(activations) > 100
    for tensor in activations:
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous(memory_format=torch.channels_last), (tensor.shape, tensor.stride())


def test_nothing_is_copied_between_convolutions(traced):
    calls, _ = traced
    functions = [function for function, _, _ in calls]
    last = max(i for i, function in enumerate(functions) if function == own.group_norm_relu.default)
    assert functions[:last].count(own.group_norm_relu.default) == 48
    copies = {aten._to_copy.default, aten.copy_.default, aten.clone.default, aten.contiguous.default}
    assert not copies & set(functions[:last])
    assert not {aten.native_group_norm.default, aten.relu_.default, aten.relu.default} & set(functions)


def test_backward_functions_keep_dtype_and_layout(traced):
    calls, mode = traced
    shapes = set()
    norms = [call[1:] for call in calls if call[0] == own.group_norm_relu.default]
    for args, (output, mean, inverse) in norms:
        x, weight, bias, groups, _ = args
        with mode:
            grad_output = torch.empty_like(output).detach()
        with mode, Calls() as backward:
            own.group_norm_relu_backward(grad_output, x, weight, bias, mean, inverse, groups)
        ((grad, *others),) = [results for _, _, results in backward.all if results]  # of one operation
        assert (grad.dtype, grad.shape, grad.stride()) == (x.dtype, x.shape, x.stride())
        assert all(t.dtype == torch.float32 and t.shape == weight.shape for t in others)
        shapes.add(tuple(x.shape))
    assert len(shapes) >= 9


def test_fake_tensors_take_the_operator_for_any_device():
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            x, weight = torch.empty(2, 8, 3, 3, device=device), torch.empty(8, device=device)
            assert norm.fits(x, weight, weight)
            assert not norm.fits(x.double(), weight, weight)
