"""Processes that work on batches: these go out ahead, what comes back is in the order of the batches."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

from braid.kernels.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """`num` processes, started when first needed; instead of one, a thread of this process, so that it reads and writes
    while the tokenizer library is at work. A context manager."""

    def __init__(self, num: int) -> None:
        self.num = num
        # Spawned, not forked: the tokenizer library has threads, which a fork would leave in an unknown state.
        processes = partial(ProcessPoolExecutor, mp_context=mp.get_context("spawn"), initializer=_start)
        self._pool = processes(num) if num > 1 else ThreadPoolExecutor(1)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def map(
        self, function: Callable[..., Result], items: Iterator[Item], argument: Callable[[Item], object]
    ) -> Iterator[tuple[Item, Result]]:
        """(item, function(argument(item))) in the order of `items`. Some more are taken ahead than there are processes.

        `function`, its argument and result are pickled where there are processes. Raises InputError when one dies."""
        pending: deque = deque()
        try:
            for item in items:
                pending.append((item, self._pool.submit(function, argument(item))))
                if len(pending) > 2 * self.num:
                    item, future = pending.popleft()
                    yield item, future.result()
            for item, future in pending:
                yield item, future.result()
        except BrokenProcessPool as error:
            change = "it may have run out of memory: use fewer --workers; the same command then goes on"
            raise InputError("a tokenising process died", found=str(error), change=change) from error


def _start() -> None:
    """Processes leave Ctrl-C to their parent, and go when it is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are processes already
    parent = mp.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
