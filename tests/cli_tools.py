"""What the tests of the command line share."""

import os
import signal

from napari_innergs.cli._run import Progress
from napari_innergs.fit.engine import Preview


def error_line(capsys):
    """Return the only line on the standard error."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("innergs: ")
    return captured.err


def interrupt_at_previews(monkeypatch):
    """Press Ctrl-C whenever there is a better volume."""

    def show(self, event):
        if isinstance(event, Preview):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "show", show)
