"""Work beside the form: errors that become sentences, fits that are passed on, views that follow numbers."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

from napari.qt.threading import create_worker
from qtpy.QtCore import QObject, QTimer

from napari_innergs.fit.engine import Done, Event, Failed

FOLLOW_DELAY_MS = 150


def attempt(make: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a worker; what is wrong is a sentence, never an exception."""
    try:
        return make(*arguments)
    except Exception as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__


def until_done(events: Generator[Event, None, None]) -> Generator[Event, None, Any]:
    """Pass on the events of a fit, and return what `Done` carries; None if it failed, which is passed on too."""
    with closing(events):
        for event in events:
            if isinstance(event, Done):
                return event.result
            yield event
            if isinstance(event, Failed):
                return None
    return None


class Follower(QObject):
    """Makes a view anew in the background, soon after its numbers have changed and with those of now.

    Parameters
    ----------
    owner : QWidget
        While it exists, views are made.
    next_view : callable
        Returns what makes the view, or None when there is nothing to follow; ValueError with a sentence.
    take : callable
        Is given what was made.
    say : callable
        Is given a sentence about what is wrong.
    """

    def __init__(
        self,
        owner: QObject,
        next_view: Callable[[], Callable[[], Any] | None],
        take: Callable[[Any], None],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(owner)
        self._next_view, self._take, self._say = next_view, take, say
        self._busy = self._again = False
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(FOLLOW_DELAY_MS)
        self._timer.timeout.connect(self._start)

    def ask(self, *_: Any) -> None:
        """Take note that a number has changed."""
        self._timer.start()

    def _start(self) -> None:
        try:
            make = self._next_view()
        except ValueError as error:
            self._say(str(error))
            return
        if make is None:
            return
        self._again = self._busy
        if not self._busy:
            self._busy = True
            create_worker(attempt, make, _connect={"returned": self._finished})

    def _finished(self, made: Any) -> None:
        self._busy = False
        if isinstance(made, str):
            self._say(made)
        else:
            self._take(made)
        if self._again:
            self._again = False
            self._start()
