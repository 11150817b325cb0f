"""Parameters and gradients that the optimizer's tests share, and the oracle that they are held to."""

import torch
from torch import nn

from engine.optim import ops
from engine.optim.flat import FlatParameters

ROWS = [1, 2, 3, 5, 31, 64, 147, 255, 576, 1151, 1152, 1153, 2304, 2307, 4609, 9216, 18431, 18432, 18433, 20000]
SETTINGS = {"momentum": 0.9, "weight_decay": 1e-3, "nesterov": True, "clipping": 0.01, "eps": 1e-3}


class Bag(nn.Module):
    """Parameters of every sort, as if of a network."""

    def __init__(self, shapes, seed=0, channels_last=False):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.values = nn.ParameterList()
        for shape in shapes:
            value = torch.randn(shape, generator=random)
            if channels_last and value.ndim == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            self.values.append(value)


def odd_shapes():
    """Row lengths from 1 to past what fits on chip, whole-tensor units, 0-D, and nothing at all."""
    shapes = [(3, n) for n in ROWS]
    return shapes + [(), (1,), (7,), (0,), (0, 4), (3, 0), (1, 20), (2, 3, 4), (25000,), (6, 5, 1, 1), (4, 3, 3, 3)]


def gradients(params, step, dtype=torch.float32, device="cpu"):
    """Rows far over the limit and far under it, some zero: in their parameters' layout."""
    random = torch.Generator().manual_seed(1000 + step)
    found = []
    for p in params:
        size = (len(p), *[1] * (p.ndim - 1)) if p.ndim else ()
        scale = 10 ** torch.empty(size).uniform_(-6, 1, generator=random)
        g = torch.randn(p.shape, generator=random) * scale
        if p.ndim > 1 and len(p) > 1 and step % 3 == 0:
            g[1] = 0
        found.append(torch.empty_like(p, dtype=dtype, device=device).copy_(g))
    return found


class Oracle:
    """`ops.eager_step` in float64 over a list of parameters; `standardized`: epsilon per parameter, or None."""

    def __init__(self, params, lr, settings, standardized=None):
        self.params = [p.detach().cpu().double() for p in params]
        self.momenta = [torch.zeros_like(p) for p in self.params]
        self.copies = list(self.params)
        self.lr = lr
        eps = standardized or [None] * len(self.params)
        self.hyper = [ops.hyper_row(settings, value) for value in eps]

    def step(self, grads, grad_scale=1.0):
        for i, g in enumerate(grads):
            self.params[i], self.momenta[i], self.copies[i] = ops.eager_step(
                self.params[i], g.cpu(), self.momenta[i], lr=self.lr, hyper=self.hyper[i], grad_scale=grad_scale
            )


def assert_close(found, expected, tolerance, what=""):
    """Each unit (row, or whole tensor) within `tolerance` of its norm, and each element of the unit's largest."""
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        if not a.numel():
            continue
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        rows = len(b) if b.ndim > 1 else 1
        a, b = a.reshape(rows, -1), b.reshape(rows, -1)
        assert torch.isfinite(a).all(), f"{what} {index}"
        wrong = (a - b).norm(dim=1) > tolerance * b.norm(dim=1)
        assert not wrong.any(), f"{what} {index} of shape {tuple(found[index].shape)}: rows {wrong.nonzero().flatten()}"
        assert ((a - b).abs() <= 2 * tolerance * b.abs().amax(1, keepdim=True)).all(), f"{what} {index}"


def arrange(bag, layout, device="cpu"):
    """The parameters as `flat` views of one buffer, or as a `list` of tensors of their own."""
    bag.to(device)
    if layout == "list":
        return list(bag.parameters())
    flat = FlatParameters(bag, channels_last=any(p.ndim == 4 and not p.is_contiguous() for p in bag.parameters()))
    return list(reversed(flat.parameters))


def give(params, grads, layout):
    """Hand out gradients: into the flat buffer, or as new tensors."""
    for p, g in zip(params, grads, strict=True):
        if layout == "flat":
            p.grad.copy_(g)
        else:
            p.grad_dtype = g.dtype
            p.grad = g


def apart(tensors, dtype, shift=0):
    """Copies of tensors in memory of their own, `shift` elements past where an allocation begins."""
    found = []
    for tensor in tensors:
        buffer = torch.empty(tensor.numel() + shift, dtype=dtype)
        found.append(buffer[shift:].view(tensor.shape).copy_(tensor))
    return found


def clipped_rows(params, grads, hyper):
    """How many units of each parameter AGC scales down, in float64; `hyper`: a row for each parameter."""
    found = []
    for p, g, (_, _, clipping, eps, _, standardize_eps) in zip(params, grads, hyper, strict=True):
        p, g = p.detach().double(), g.double()
        if standardize_eps >= 0:
            leaf = p.clone().requires_grad_()
            (g,) = torch.autograd.grad(ops.eager_standardize(leaf, standardize_eps), leaf, g)
        p, g = ((x if x.ndim > 1 else x[None]).flatten(1) if x.ndim else x[None, None] for x in (p, g))
        found.append(int((g.norm(dim=1) > clipping * p.norm(dim=1).clamp(min=eps)).sum()))
    return found


ADAMW = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "clipping": 0.01, "clip_eps": 1e-3,
         "ema_decay": 0.99}  # fmt: skip


class AdamWOracle:
    """`ops.eager_adamw_step` in float64 over a list of parameters; `standardized`: epsilon per parameter, or -1."""

    def __init__(self, params, settings, standardized=None):
        self.params = [p.detach().cpu().double() for p in params]
        self.states = [[torch.zeros_like(p), torch.zeros_like(p), p.clone()] for p in self.params]
        self.copies, self.settings, self.steps = list(self.params), settings, 0
        self.eps = standardized or [-1.0] * len(self.params)

    def step(self, grads, grad_scale=1.0):
        self.steps += 1
        for i, g in enumerate(grads):
            self.params[i], self.states[i], self.copies[i] = ops.eager_adamw_step(
                self.params[i], g.cpu(), self.states[i], self.settings, step=self.steps,
                standardize_eps=self.eps[i], grad_scale=grad_scale,
            )  # fmt: skip


def assert_states_close(found, expected, index):
    """State `index` of AdamW. In units of few elements the gradients of two steps may cancel out in the first: there
    nothing is asked of it."""
    few = [index == 0 and (t.numel() < 64 or t.ndim > 1 and t.numel() // len(t) < 64) for t in expected]
    kept = [[t for t, skip in zip(tensors, few, strict=True) if not skip] for tensors in (found, expected)]
    assert_close(*kept, 1e-6, f"state {index}")
