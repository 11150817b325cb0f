"""Run on several ranks by test_ranks.py: each collective against what the ranks' numbers must give."""

import sys

import numpy as np
import torch

from engine.comm.choose import connect
from engine.comm.communicator import SharedError
from loaders.errors import UserError

comm = connect(sys.argv[1])
rank, size = comm.rank, comm.size
assert size == int(sys.argv[2]), f"{size} ranks"
assert comm.leads == (rank == 0)

for dtype in (torch.float32, torch.float64):
    values = torch.arange(1000, dtype=dtype) * (rank + 1)
    comm.sum_(values, f"sum.{dtype}")
    assert torch.equal(values, torch.arange(1000, dtype=dtype) * sum(range(1, size + 1)))

# In flight together, waited for in another order than they were started in.
several = [torch.full((n,), float(rank)) for n in (5, 70_000, 1)]
handles = [comm.start_sum_(tensor, f"several.{index}") for index, tensor in enumerate(several)]
for handle in reversed(handles):
    handle.wait()
assert all((tensor == sum(range(size))).all() for tensor in several)

# In pairs; who has none sends nothing to itself.
peer = rank ^ 1 if rank ^ 1 < size else rank
sent = torch.arange(0 if peer == rank else 5 + rank, dtype=torch.float32)  # of different lengths
received = torch.full((0 if peer == rank else 5 + peer,), -1.0)
comm.swap(sent, received, peer, "swap")
assert torch.equal(received, torch.arange(len(received), dtype=torch.float32))

mine = torch.full((10,), float(rank + 7))
comm.broadcast_(mine)
assert (mine == 7).all()

for root in range(size):
    mine = torch.full((10,), float(rank + 7))
    comm.broadcast_(mine, "from each", root)
    assert (mine == root + 7).all()

rows = comm.gather(np.full((2, 3), rank, dtype=np.float32))
assert rows.shape == (2 * size, 3)
assert rows[:, 0].tolist() == [float(r) for r in range(size) for _ in range(2)]

said = comm.exchange({"rank": rank, "text": "x" * (10 * rank)})  # of different lengths
assert [entry["rank"] for entry in said] == list(range(size))
assert said[-1]["text"] == "x" * (10 * (size - 1))

try:
    with comm.together():
        if rank == size - 1:
            raise UserError("only here")
    raise AssertionError("the other ranks' error was not heard of")
except SharedError as error:
    assert "only here" in str(error)
    assert f"rank {size - 1} of {size}" in str(error)
with comm.together():
    pass

# One write, so that the ranks' words are not mixed.
sys.stdout.write(f"rank {rank} of {size} agrees over {comm.name}\n")
sys.stdout.flush()
comm.close()
