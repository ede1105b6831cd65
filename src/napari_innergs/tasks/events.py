"""What every task does with the events of its job: errors explained, and the events taken to the end."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol

from napari_innergs.device import explain_error
from napari_innergs.fit.engine import Done, Event, Failed, Preview
from napari_innergs.result import Reconstruction

Events = Generator[Event, None, None]


class Job(Protocol):
    """A fit that runs as a generator of events."""

    def run(self) -> Events:
        """Run to the end."""

    def best(self) -> Reconstruction | None:
        """Return the best state so far."""


def guarded(job: Job) -> Events:
    """Run a job; an error becomes a `Failed` that explains it and keeps the best state so far."""
    try:
        yield from job.run()
    except Exception as error:
        yield Failed(explain_error(error), job.best())


def to_the_end(events: Events, task: str, progress: Callable[[Event], Any] | None) -> Reconstruction:
    """Take events until there is a result.

    Raises
    ------
    KeyboardInterrupt
        When interrupted; its attribute `best` is the best state so far as a Reconstruction, or None.
    """
    best: Reconstruction | None = None
    try:
        for event in events:
            if progress is not None:
                progress(event)
            if isinstance(event, Preview):
                best = Reconstruction(event.volume, event.grid, report={"task": task, "interrupted": True})
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Done):
                result: Reconstruction = event.result
                return result
    except KeyboardInterrupt as stop:
        stop.best = best  # type: ignore[attr-defined]
        raise
    finally:
        events.close()
    raise RuntimeError("the reconstruction ended without a result")
