"""What a run says of itself before it begins."""

from types import SimpleNamespace

import pytest
import torch

from engine.training import run


@pytest.mark.parametrize(("audit", "said"), [(False, "gradients and momentum 3.00"),
                                             (True, "gradients with sums that wait and momentum 6.00")])  # fmt: skip
def test_memory_is_counted_in_bytes_and_said_in_powers_of_1024(monkeypatch, audit, said):
    """32 images of 32 MiB, and three float32 copies of 2**28 parameters; of five micro-batches three more."""
    parts = SimpleNamespace(
        network="R50x1",
        recompute="none",
        precision=SimpleNamespace(compute_dtype=torch.bfloat16, reproducible=audit),
        flat=SimpleNamespace(values=torch.empty(2**28, device="meta")),
        feed=SimpleNamespace(
            plan=SimpleNamespace(micro_batch=32, mine=range(5)), test_transform=SimpleNamespace(size=224)
        ),
    )
    asked = {("R50x1", 224, torch.bfloat16, "none"): 2**25}
    monkeypatch.setattr(run, "saved_bytes_per_image", lambda *what: asked[what])
    assert run._counted_memory(SimpleNamespace(parts=parts)) == (
        "counted: 32.0 MiB an image kept for the backward pass, 1.00 GiB for a micro-batch of 32; "
        f"parameters, {said} GiB"
    )
