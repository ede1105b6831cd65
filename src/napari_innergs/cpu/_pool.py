"""Our own threads for kernels that release the GIL.

numba's ``parallel=True`` needs a threading layer, and the one that is always there aborts when two Python
threads enter it at once, which a plugin with a preview does. Here any number of Python threads may call
:func:`run`.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None
_threads = 0


def _available() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        return os.cpu_count() or 1


def get_threads() -> int:
    """Return the number of threads that kernels use."""
    global _threads
    if _threads == 0:
        limit = os.environ.get("OMP_NUM_THREADS", "")
        _threads = min(_available(), int(limit)) if limit.isdigit() and int(limit) > 0 else _available()
    return _threads


def set_threads(count: int) -> None:
    """Set the number of threads that kernels use.

    Parameters
    ----------
    count : int
        At least 1.
    """
    global _executor, _threads
    if count < 1:
        raise ValueError(f"The number of threads must be at least 1, not {count}.")
    with _lock:
        if count != get_threads() and _executor is not None:
            _executor.shutdown(wait=False)  # calls already under way end on the old threads
            _executor = None
        _threads = int(count)


def _submit(work: Callable[[], None], count: int) -> list[Future[None]]:
    global _executor
    with _lock:
        if _executor is None:
            _executor = ThreadPoolExecutor(max(get_threads() - 1, 1), thread_name_prefix="innergs")
        return [_executor.submit(work) for _ in range(count)]


def run(task: Callable[..., None], arguments: Sequence[tuple]) -> None:
    """Call ``task(*a)`` for each ``a`` of ``arguments``, in any order, on all threads and this one.

    The tasks must write to separate memory. The first exception is raised again once all threads are done.
    """
    helpers = min(get_threads(), len(arguments)) - 1
    if helpers < 1:
        for one in arguments:
            task(*one)
        return
    counter = itertools.count()  # next() is atomic: threads take the next task when they are free

    def work() -> None:
        while (i := next(counter)) < len(arguments):
            task(*arguments[i])

    futures = _submit(work, helpers)
    try:
        work()
    finally:
        for future in futures:
            if not future.cancel():  # one that has not started has nothing left to do
                future.result()


def _after_fork() -> None:
    """Forget threads that a forked child does not have."""
    global _executor, _lock
    _executor = None
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def ranges(total: int, size: int) -> list[tuple[int, int]]:
    """Split ``range(total)`` into pieces of ``size``."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]
