"""What Qt needs to be told about the life of Python objects."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakMethod

from qtpy.QtCore import QObject

# Slots of `destroyed` live here and not with the object: Python's collector may have emptied what belongs
# to a widget by the time Qt destroys it, and calling an emptied function ends the process.
_waiting: dict[int, Callable[..., None]] = {}
_numbers = count()


def when_destroyed(thing: QObject, action: Callable[[], None]) -> None:
    """Call a function once, when Qt has destroyed an object; the function must not refer to the object."""
    number = next(_numbers)

    def run(*_: Any) -> None:
        if _waiting.pop(number, None) is not None:
            action()

    _waiting[number] = run
    thing.destroyed.connect(run)


def follow_layers(widget: QObject, viewer: Any, callback: Callable[[], None]) -> None:
    """Call a widget's method whenever layers come, go, move or are renamed, while the widget exists.

    A closed dock is destroyed by Qt while Python may still hold the object: its methods must not be called
    then.
    """
    events = viewer.layers.events
    watched = (events.inserted, events.removed, events.reordered, events.renamed)
    method = WeakMethod(callback)

    def tell(event: Any = None) -> None:
        alive = method()
        if alive is not None:
            alive()

    def stop() -> None:
        for event in watched:
            event.disconnect(tell)

    for event in watched:
        event.connect(tell)
    when_destroyed(widget, stop)
