"""Ranks that are threads of this process: as exact as others, and started in no time."""

import threading

import numpy as np
import torch

from engine.comm.communicator import Communicator
from engine.comm.launch import Launch


class _Table:
    """Where all ranks lay something, and then take what the others laid."""

    def __init__(self, size):
        self.places, self.barrier = [None] * size, threading.Barrier(size)


class ThreadRank(Communicator):
    name = "threads"

    def __init__(self, rank, table):
        super().__init__(Launch("threads", rank, len(table.places)))
        self._table = table

    def exchange(self, value):
        self._table.places[self.rank] = value
        self._table.barrier.wait()
        found = list(self._table.places)
        self._table.barrier.wait()
        return found

    def start_sum_(self, tensor, name):
        tensor.copy_(torch.stack(self.exchange(tensor.clone())).sum(0))
        return super().start_sum_(tensor, name)

    def swap(self, tensor, received, peer, name):
        said = self.exchange((peer, name, tensor.clone()))
        assert said[peer][:2] == (self.rank, name), f"rank {self.rank} wants {peer}, which wants {said[peer][:2]}"
        received.copy_(said[peer][2])

    def broadcast_(self, tensor, name="broadcast"):
        tensor.copy_(self.exchange(tensor.clone())[0])

    def gather(self, array, name="gather"):
        return np.concatenate(self.exchange(array))


def on_ranks(size, body):
    """What `body(communicator)` returns on each rank. Each has one thread to compute with, also a single one."""
    table = _Table(size)
    found, errors = [None] * size, []

    def rank(number):
        torch.set_num_threads(1)  # of this thread
        try:
            found[number] = body(ThreadRank(number, table))
        except threading.BrokenBarrierError:
            pass  # another one's error
        except BaseException as error:
            errors.append(error)
            table.barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found
