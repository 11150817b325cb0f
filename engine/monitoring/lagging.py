"""Which rank the others wait for, told while the run goes on, and why: its input, its own computing, or its link.

In synchronous SGD all ranks take equally long for a step, so the slow one is the one that waits least: what it does
before it waits is compared with the others. A slow link makes all wait equally long; there the ranks send each other a
message in turn, and the one with which both directions take long is found.

A rank is named when the median of the last intervals says so, by more than their noise explains: no hiccup of the
machine names anybody. It is named until that median has fallen to half of what names.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.comm.communicator import Communicator

INTERVALS, ENOUGH, HISTORY = 6, 5, 30
"""Intervals, between logged steps, that are looked at; how many there have to be; and of how many the noise is."""
LATE = 0.06
"""Share of a step by which a rank has to be later than the others: what it costs all of them."""
SURE = 5.0
"""And so many standard errors of the median, by the ranks' own changes from interval to interval."""
PROBES, DOUBTFUL = 5, 2
"""Messages in turn that are sent in a row, one round after each logged interval, before it is left at that; and after
how many it is where no link seems slow."""
PROBING = 0.001
"""Share of the time that such rounds may take in the long run."""
PROBE_NUMEL = 2**20
"""At most, of a message: 4 MiB."""
REASONS = {"input": "its input", "compute": "its own computing", "link": "its link"}
_OWN = "own"


@dataclass(frozen=True)
class Probe:
    """A round of messages, each rank's to all."""

    messages: np.ndarray  # (to, from) seconds
    seconds: float  # that the round took all ranks, with waiting for each other between the messages


@dataclass(frozen=True)
class Late:
    """A rank that the others wait for."""

    rank: int
    reason: str  # input, compute, link
    share: float  # of a step


class Lagging:
    """The sequential test. The same on all ranks, which are told the same figures. hosts: of each rank."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.named: Late | None = None
        # Of a node's link only what leaves it tells. Two ranks, or two nodes, share one.
        several = len(set(hosts)) > 1
        self._apart = np.array([[a != b for b in hosts] for a in hosts]) if several else ~np.eye(len(hosts), dtype=bool)
        self._probes = len(set(hosts) if several else hosts) > 2
        self._excess: deque[Mapping[str, np.ndarray]] = deque(maxlen=INTERVALS)  # shares of a step, by rank
        self._links: deque[np.ndarray] = deque(maxlen=INTERVALS)
        self._own: deque[np.ndarray] = deque(maxlen=HISTORY)  # steps, by rank: what comes before waiting
        self._rounds, self._since, self._cost = 0, 0.0, 0.0

    def wants_probe(self, own: np.ndarray, wait: np.ndarray, steps: float) -> bool:
        """Whether the link may be to blame: all ranks wait, so none is late by itself, and a probe is affordable.

        own, wait: (ranks,) seconds a step; steps: in the interval.
        """
        step = float(np.median(own + wait))
        self._since += steps * step
        if not self._probes or not wait.min() >= LATE * step:
            return False
        if self._rounds >= PROBES and self._cost < PROBING * self._since:
            self._rounds, self._cost, self._since = 0, 0.0, 0.0
            self._links.clear()
        return self._rounds < PROBES

    def see(
        self,
        phases: Mapping[str, np.ndarray],
        wait: np.ndarray,
        probed: Probe | None = None,
        per_step: float = 1.0,
    ) -> Late | None:
        """An interval: the rank that is named after it, if any.

        phases: of `input` and `compute`, (ranks,) seconds a step; wait: the same of waiting for others. probed: if that
        was done; a step's gradients are `per_step` of its messages.
        """
        own = phases["input"] + phases["compute"]
        step = float(np.median(own + wait))
        self._own.append(own / step)
        self._excess.append({name: _excess(each) / step for name, each in {**phases, _OWN: own}.items()})
        if probed is not None:
            self._rounds += 1
            self._cost += probed.seconds
            self._links.append(_slow_link(np.where(self._apart, probed.messages, np.nan)) * per_step / step)
            if len(self._links) == DOUBTFUL and np.median(self._links, axis=0).max() <= LATE:
                self._rounds = PROBES  # no link is slow
        elif not wait.min() >= LATE / 2 * step:
            self._links.clear()  # nobody waits for a link any more
        self.named = self._late_itself() or self._late_by_link()
        return self.named

    def _late_itself(self) -> Late | None:
        if len(self._excess) < ENOUGH or len(self._own[0]) < 2:
            return None
        middle = {name: np.median([each[name] for each in self._excess], axis=0) for name in self._excess[0]}
        own = middle.pop(_OWN)
        rank = int(own.argmax())
        changes = np.abs(np.diff(np.stack(self._own), axis=0))  # of lasting differences, and of one that begins, free
        noise = 1.4826 / 2**0.5 * float(np.median(changes))
        if not self._beyond(rank, float(own[rank]), noise, len(self._excess), link=False):
            return None
        return Late(rank, max(middle, key=lambda name: middle[name][rank]), float(own[rank]))

    def _late_by_link(self) -> Late | None:
        if len(self._links) < ENOUGH:
            return None
        shares = np.stack(self._links)
        middle = np.median(shares, axis=0)
        rank = int(middle.argmax())
        noise = 1.4826 * float(np.median(np.abs(shares - middle)))
        if not self._beyond(rank, float(middle[rank]), noise, len(shares), link=True):
            return None
        return Late(rank, "link", min(float(middle[rank]), 1.0))

    def _beyond(self, rank: int, share: float, noise: float, intervals: int, link: bool) -> bool:
        """Whether a median over intervals is more than LATE and noise; half of that of who is named."""
        error = 1.25 * noise / intervals**0.5  # of the median of normal deviates
        before = self.named
        again = before is not None and before.rank == rank and (before.reason == "link") == link
        return share > max(LATE, SURE * error) / (2 if again else 1)


def _excess(each: np.ndarray) -> np.ndarray:
    """By how much each rank's figure is above the median of the others'; of one alone, 0."""
    if len(each) < 2:
        return np.zeros(1)
    return np.array([value - np.median(np.delete(each, rank)) for rank, value in enumerate(each)])


def _slow_link(messages: np.ndarray) -> np.ndarray:
    """Seconds that even the quickest messages to and from each rank take longer than others'; NaN do not tell.

    A slow sender makes all wait, a slow receiver only itself: so of a sound rank some message is quick. A ring sends
    and receives a step's gradients once for their sum and once for its way back, at the same time.
    """
    return _excess(np.nanmin(messages, axis=0) + np.nanmin(messages, axis=1))


def probe(comm: Communicator, message: torch.Tensor) -> Probe:
    """A round of messages, the same figures on all ranks, which call it together.

    Waits for the device, and for all ranks.
    """
    ready, taken = torch.zeros(1), np.zeros((1, comm.size + 1))
    begun = time.perf_counter()
    for root in range(comm.size):
        comm.sum_(ready, "probe.ready")
        start = time.perf_counter()
        comm.broadcast_(message, "probe", root)
        if message.is_cuda:
            torch.cuda.synchronize(message.device)
        taken[0, root] = time.perf_counter() - start
    taken[0, -1] = time.perf_counter() - begun
    rows = comm.gather(taken, "probe.taken")
    return Probe(rows[:, :-1], float(rows[:, -1].max()))


def in_words(late: Late, host: str) -> str:
    """A line for people, of a rank that is named."""
    look = {
        "input": f"look at its storage and at what else runs on {host}",
        "compute": f"look at what else runs on {host}, and at clock and temperature of its GPU",
        "link": f"look at the network of {host}",
    }[late.reason]
    return (
        f"rank {late.rank} on {host} lags: all wait for {REASONS[late.reason]}, {late.share:.0%} of each step; {look}, "
        "or leave the node out"
    )
