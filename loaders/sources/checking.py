"""Decodes the images of a source in worker processes, in order, with a bounded number in flight."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from loaders.errors import SystemRefusal, UserError, in_words, is_passing
from loaders.sources.images import Checked, check_image, encode_image
from loaders.sources.listing import Decoding, Item

Job = TypeVar("Job")
Result = TypeVar("Result")
_CHUNK = 32  # images per task of a worker, at most
_SHARE = 8  # tasks of each worker, at least: the last ones end at about the same time
_AHEAD = 3  # tasks in flight per worker


@contextmanager
def check_items(
    items: Sequence[Item], resize: int | None, quality: int, workers: int
) -> Iterator[Iterator[Checked | str]]:
    """For each item the checked image, or the reason why it cannot be used; `workers` 0 decodes in this process.

    UserError when a worker is killed, or where the state of the machine keeps a file from being read.
    """
    size = max(1, min(_CHUNK, len(items) // (_SHARE * max(workers, 1))))
    chunks = (items[i : i + size] for i in range(0, len(items), size))
    if not workers:
        yield (result for chunk in chunks for result in _Check(resize, quality)(chunk))
        return
    with closing(in_processes(_Check(resize, quality), chunks, workers, _AHEAD * workers)) as results:
        yield (result for chunk in results for result in chunk)


def in_processes(
    work: Callable[[Job], Result], jobs: Iterable[Job], workers: int, ahead: int = 0
) -> Generator[Result, None, None]:
    """`map` in worker processes, in order, with at most `ahead` jobs in flight besides the one waited for.

    `work` and the jobs must pickle. UserError when a worker is killed.
    """
    # Not fork: a library may have started threads in this process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["loaders.sources.images"])
    pool = ProcessPoolExecutor(workers, context, _ignore_interrupt)
    flying: deque[Future] = deque()
    try:
        for job in jobs:
            flying.append(pool.submit(work, job))
            if len(flying) > max(ahead, workers):
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, perhaps for want of memory; take fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers


@dataclass(frozen=True)
class _Check:
    """Checks a chunk of items."""

    resize: int | None
    quality: int

    def __call__(self, items: Sequence[Item]) -> list[Checked | str]:
        return [_check(item, self.resize, self.quality) for item in items]


def _check(item: Item, resize: int | None, quality: int) -> Checked | str:
    try:
        if isinstance(item.reader, Decoding):
            return encode_image(item.reader.image(), resize)
        return check_image(item.reader.read(), resize, quality)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_passing(error):
            raise SystemRefusal(f"{item.key} cannot be read: {in_words(error)}; the same command goes on") from error
        return in_words(error)
