"""The engine: events, and work in the background that can be paused and cancelled at any moment.

A fit is a generator of events. Whoever consumes it is in control: not asking for the next event pauses the
fit, closing the generator cancels it. Nothing here blocks for longer than `HEARTBEAT_S`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

HEARTBEAT_S = 0.1
# Steps of a fit are taken together for so many seconds.
_WHILE_S = 0.25


@dataclass(frozen=True)
class Step:
    """Progress of a fit.

    Attributes
    ----------
    phase : str
        What is being done, in plain words.
    fraction : float
        Share of the whole job that is done, 0 to 1.
    iteration, total : int
        Position within an iterative phase; 0, 0 elsewhere.
    loss : float or None
        Loss of the present iteration.
    psnr_heldout : float or None
        Latest PSNR on slices that were left out, dB.
    """

    phase: str
    fraction: float = 0.0
    iteration: int = 0
    total: int = 0
    loss: float | None = None
    psnr_heldout: float | None = None


@dataclass(frozen=True)
class Preview:
    """A first or better volume on the output grid: (z, y, x) or (z, y, x, c), intensity units of the input."""

    volume: np.ndarray
    grid: Any
    label: str = ""


@dataclass(frozen=True)
class Done:
    """The end of a fit, with its result."""

    result: Any


@dataclass(frozen=True)
class Failed:
    """The end of a fit that could not go on; `best` is the best state so far, or None."""

    error: Exception
    best: Any = None


Event = Step | Preview | Done | Failed


def thread_count() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Progress:
    """Maps the progress of phases to the share of the whole job."""

    phase: str = ""
    start: float = 0.0
    end: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)
    announced: str = ""
    reached: float = 0.0

    def enter(self, phase: str, end: float) -> None:
        """Begin a phase that takes the job from where it stands to `end`."""
        self.start, self.end, self.phase = (self.end if self.phase else 0.0), end, phase

    def step(self, done: float, **values: Any) -> Step:
        """Return a `Step` for the share `done` of the present phase."""
        self.extra.update({k: v for k, v in values.items() if k == "psnr_heldout" and v is not None})
        self.announced = self.phase
        share = self.start + (self.end - self.start) * min(max(done, 0.0), 1.0)
        # a second task of a phase does not take the bar back
        self.reached = max(self.reached, share)
        return Step(self.phase, self.reached, **{**self.extra, **values})


def background(
    tasks: Iterable[Callable[[], Any]],
    progress: Progress,
    *,
    total: int | None = None,
    workers: int | None = None,
) -> Generator[Step, None, list[Any]]:
    """Run tasks in threads, in order of submission, yielding a `Step` at least every `HEARTBEAT_S`.

    At most `workers` tasks are in flight, so that a consumer that stops asking pauses the work and one that
    closes the generator ends it; tasks should therefore be short.

    Returns
    -------
    list
        The tasks' results, in order.
    """
    workers = workers or thread_count()
    source: Iterator[tuple[int, Callable[[], Any]]] = enumerate(tasks)
    results: dict[int, Any] = {}
    pool = ThreadPoolExecutor(workers)
    pending: dict[Future[Any], int] = {}
    last = time.monotonic()
    try:
        if progress.announced != progress.phase:
            yield progress.step(0.0)
        while True:
            while len(pending) < workers:
                item = next(source, None)
                if item is None:
                    break
                pending[pool.submit(item[1])] = item[0]
            if not pending:
                break
            finished, _ = wait(pending, timeout=HEARTBEAT_S, return_when=FIRST_COMPLETED)
            for future in finished:
                results[pending.pop(future)] = future.result()
            if not finished or time.monotonic() - last > HEARTBEAT_S:
                last = time.monotonic()
                yield progress.step(len(results) / total if total else 0.0)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [results[index] for index in range(len(results))]


def advance(steps: Generator[Any, None, Any], most: int | None = None) -> Any:
    """Take steps for a while, at most so many, and return what the last one yielded; None at the end."""
    last, started = None, time.monotonic()
    for latest in islice(steps, most):
        last = latest
        if time.monotonic() - started > _WHILE_S:
            break
    return last


def drive(
    steps: Generator[int, None, Any] | Generator[tuple[int, float], None, Any], progress: Progress, total: int
) -> Generator[Step, None, int]:
    """Take the steps of a fit, which yield their number or that and a loss, and return how many there were."""
    done = 0
    while True:
        (last,) = yield from background([partial(advance, steps)], progress)
        if last is None:
            return done
        done, loss = last if isinstance(last, tuple) else (last, None)
        yield progress.step(done / total, iteration=done, total=total, loss=loss)
