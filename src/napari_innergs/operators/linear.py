"""What conventional reconstructions need to know of a measurement."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class LinearOperator(Protocol):
    """A linear map from a volume to data, with its exact transpose.

    Arrays are float32 and contiguous.
    """

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """Shape of the volume."""

    @property
    def range_shape(self) -> tuple[int, ...]:
        """Shape of the data."""

    def apply(self, volume: np.ndarray) -> np.ndarray:
        """Return the data of a volume."""

    def adjoint(self, data: np.ndarray) -> np.ndarray:
        """Return the volume that the transpose makes of data."""
