"""Decodes the images of a source in worker processes, in order, with a bounded number in flight."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from loaders.errors import UserError
from loaders.images import Checked, check_image
from loaders.sources import Item

_CHUNK = 32  # images per task of a worker
_AHEAD = 3  # tasks in flight per worker


@contextmanager
def check_items(items: Sequence[Item], resize: int | None, workers: int) -> Iterator[Iterator[Checked | str]]:
    """For each item the checked image, or the reason why it cannot be used; `workers` 0 decodes in this process.

    UserError when a worker is killed.
    """
    chunks = (items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK))
    if not workers:
        yield (result for chunk in chunks for result in _check_chunk(chunk, resize))
        return
    # Not fork: a library may have started threads in this process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["loaders.images"])
    pool = ProcessPoolExecutor(workers, context, _ignore_interrupt)
    try:
        yield _in_order(pool, chunks, resize, _AHEAD * workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, chunks: Iterator, resize: int | None, ahead: int) -> Iterator[Checked | str]:
    flying = deque()
    try:
        for chunk in chunks:
            flying.append(pool.submit(_check_chunk, chunk, resize))
            if len(flying) > ahead:
                yield from flying.popleft().result()
        while flying:
            yield from flying.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, perhaps for want of memory; take fewer --workers") from error


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers


def _check_chunk(items: Sequence[Item], resize: int | None) -> list[Checked | str]:
    return [_check(item, resize) for item in items]


def _check(item: Item, resize: int | None) -> Checked | str:
    try:
        return check_image(item.reader.read(), resize)
    except (OSError, ValueError) as error:
        return str(error)
