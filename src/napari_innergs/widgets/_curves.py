"""Loss and held-out PSNR while a job runs. Imports pyqtgraph: import this module only when needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyqtgraph as pg
from napari.settings import get_settings
from napari.utils.theme import get_theme
from qtpy.QtWidgets import QWidget

MAX_POINTS = 600


class Curves(pg.GraphicsLayoutWidget):
    """Two small plots side by side; the horizontal axis is the number of steps."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        # style sheets don't reach the plots
        text = get_theme(get_settings().appearance.theme).text.as_hex()
        self.setBackground(None)
        self.setFixedHeight(130)
        self.setToolTip("Left: loss of each step. Right: PSNR in dB on slices that were left out.")
        self.ci.setContentsMargins(0, 0, 0, 0)
        self._lines = []
        self._plots = []
        for column, (title, colour) in enumerate((("loss", "#e8a33d"), ("held-out PSNR (dB)", "#4aa3df"))):
            plot = self.addPlot(row=0, col=column)
            plot.setTitle(title, size="9pt", color=text)
            plot.setMenuEnabled(False)
            plot.setMouseEnabled(False, False)
            plot.hideButtons()
            plot.setLimits(xMin=-1, minXRange=10, minYRange=0.5 if column else 0)
            for side in ("left", "bottom"):
                axis = plot.getAxis(side)
                axis.setTextPen(text)
                axis.setPen(text)
                axis.setStyle(tickLength=-4, autoExpandTextSpace=True)
            # the dock is narrow
            plot.getAxis("bottom").setTickDensity(0.5)
            symbol = (
                {"symbol": "o", "symbolSize": 4, "symbolBrush": colour, "symbolPen": None} if column else {}
            )
            self._plots.append(plot)
            self._lines.append(plot.plot(pen=pg.mkPen(colour, width=2), **symbol))

    def reset(self) -> None:
        """Empty both plots."""
        for line in self._lines:
            line.setData([], [])

    def show_values(self, loss: Sequence[float], psnr: Sequence[tuple[int, float]]) -> None:
        """Draw the values so far; long series are thinned to what the plot can show."""
        # nothing is held out of projections
        self._plots[1].setVisible(bool(psnr))
        every = max(1, len(loss) // MAX_POINTS)
        self._lines[0].setData(np.arange(len(loss))[::every], np.asarray(loss, float)[::every])
        if psnr:
            # the last value holds until there is a newer one
            steps, values = np.asarray([*psnr, (max(len(loss), psnr[-1][0]), psnr[-1][1])], float).T
            self._lines[1].setData(steps, values)
