"""What a command says while it works, and what is left of its work after Ctrl-C."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from napari_innergs.fit.engine import Event, Preview
    from napari_innergs.result import Reconstruction

BAD_INPUT = (ValueError, TypeError, OSError, MemoryError)


class Interrupted(BaseException):
    """Ctrl-C was pressed; what there was has been saved and said. Holds the report."""


def complain(text: str) -> None:
    """Write one line to the standard error."""
    print(f"innergs: {' '.join(text.split())}", file=sys.stderr)


def sentence(error: BaseException) -> str:
    """Return what an error says."""
    if isinstance(error, MemoryError):
        return f"there is not enough memory: {error or 'take a smaller input or a coarser grid'}"
    return str(error) or type(error).__name__


def print_json(content: Any) -> None:
    """Write a report to the standard output."""
    print(json.dumps(content, indent=1))


def print_result(report: dict[str, Any], facts: str) -> None:
    """Print where a volume is, its size with facts to go with it, and how long it took."""
    print(report["files"]["volume"])
    size = " x ".join(str(n) for n in report["grid"]["shape"])
    print(f"  {size} voxels{facts}, {report['seconds']:.1f} s")


def print_lines(lines: Iterable[str] | None) -> None:
    """Print what a report has more to say, such as its warnings."""
    for line in lines or ():
        print(f"  {line}")


class Progress:
    """One line on a terminal that is written again and again; nothing where there is no terminal."""

    def __init__(self, stream: TextIO, title: str = "") -> None:
        self.stream = stream
        self.live = stream.isatty()
        self.title, self.suffix = title, ""
        self._shown = self._last = 0.0
        self._started = time.monotonic()
        self._width = 0

    def show(self, event: Event) -> None:
        """Show a step, at most ten times a second."""
        fraction = getattr(event, "fraction", None)
        if not self.live or fraction is None:
            return
        now = time.monotonic()
        if fraction < self._last:
            self._started = now
        self._last = fraction
        if now - self._shown < 0.1:
            return
        self._shown = now
        passed = now - self._started
        left = f", {passed * (1 - fraction) / fraction:.0f} s left" if fraction > 0.05 and passed > 3 else ""
        try:
            columns = os.get_terminal_size(self.stream.fileno()).columns or 80
        except OSError:
            columns = 80
        phase = getattr(event, "phase", "")
        text = f"{self.title}{self.suffix}  {100 * fraction:3.0f} %  {phase}  {passed:.0f} s{left}"
        text = text[: columns - 1]
        self.stream.write("\r" + text.ljust(self._width))
        self.stream.flush()
        self._width = len(text)

    def clear(self) -> None:
        """Take the line away."""
        if self.live and self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self.stream.flush()
            self._width = 0


class Run:
    """One reconstruction, of which Ctrl-C leaves the best state so far.

    Parameters
    ----------
    progress : Progress
        Shows the steps.
    save : callable
        Writes a `Reconstruction` and returns its report.
    facts : dict
        What the report of an unfinished reconstruction says.

    Attributes
    ----------
    last : Preview or None
        The latest volume.
    result : Reconstruction or None
        The whole result, once the command has it.
    """

    def __init__(
        self, progress: Progress, save: Callable[[Reconstruction], dict[str, Any]], facts: dict[str, Any]
    ) -> None:
        self.progress, self.save, self.facts = progress, save, facts
        self.last: Preview | None = None
        self.result: Reconstruction | None = None

    def follow(self, events: Iterable[Event]) -> Any:
        """Show events and return what the last of them brings."""
        from napari_innergs.fit.engine import Done, Failed, Preview

        outcome: Any = None
        for event in events:
            if isinstance(event, Preview):
                self.last = event
            elif isinstance(event, Done):
                outcome = event.result
            elif isinstance(event, Failed):
                raise event.error
            self.progress.show(event)
        return outcome

    @contextmanager
    def guarded(self, best: str = "the best state so far ({state})", as_json: bool = False) -> Iterator[None]:
        """Save the best state when the work inside is interrupted, and say so.

        Raises
        ------
        Interrupted
            With the report of what was saved.
        KeyboardInterrupt
            When there was nothing to save.
        """
        try:
            yield
        except KeyboardInterrupt:
            if self.result is None and self.last is None:
                raise
            report = self.save(self._best())
            self.progress.clear()
            complain(
                f"interrupted; {best.format(state=report['state'])} is saved in {report['files']['volume']}"
            )
            if as_json:
                print_json(report)
            raise Interrupted(report) from None
        finally:
            self.progress.clear()

    def _best(self) -> Reconstruction:
        from napari_innergs.result import Reconstruction
        from napari_innergs.tasks.versions import versions

        result, state = self.result, "complete"
        if result is None:
            assert self.last is not None
            state = f"preview: {self.last.label}"
            facts = {**self.facts, "versions": versions()}
            result = Reconstruction(self.last.volume, self.last.grid, report=facts)
        result.report.update(interrupted=True, state=state)
        return result

    def finish(self, as_json: bool, say: Callable[[dict[str, Any]], None]) -> int:
        """Save the result, print its report, and return the exit status."""
        assert self.result is not None
        report = self.save(self.result)
        if as_json:
            print_json(report)
        else:
            say(report)
        return 0
