"""Layers that are filled while a job runs and become its result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LayerData = tuple[Any, dict[str, Any], str]

__all__ = ["LiveLayers"]


class LiveLayers:
    """Shows layer tuples in a viewer, again and again, in the same layers.

    A layer is found again by object, never by name; one that the user has deleted is made anew. Call it in
    the main thread only.

    Parameters
    ----------
    viewer : napari.Viewer or napari.components.ViewerModel
        Where to show.
    """

    def __init__(self, viewer: Any) -> None:
        self._viewer = viewer
        self._layers: list[Any] = []
        # what was asked for: napari makes names unique, so the layer's own can differ
        self._names: list[str] = []

    @property
    def layers(self) -> list[Any]:
        """The layers that are still in the viewer."""
        return [layer for layer in self._layers if layer in self._viewer.layers]

    def show(self, tuples: Sequence[LayerData]) -> list[Any]:
        """Create or update the layers; contrast and colours of existing ones stay as the user left them.

        Returns
        -------
        list of napari.layers.Layer
            One for each tuple.
        """
        shown = []
        names = [str(kwargs.get("name", "")) for _, kwargs, _ in tuples]
        for index, (data, kwargs, kind) in enumerate(tuples):
            layer = self._layers[index] if index < len(self._layers) else None
            if layer is None or layer not in self._viewer.layers or not _fits(layer, data, kwargs, kind):
                stale = layer if layer is not None and layer in self._viewer.layers else None
                layer = getattr(self._viewer, f"add_{kind}")(data, **kwargs)
                if stale is not None:
                    self._viewer.layers.remove(stale)
            else:
                _update(layer, data, kwargs)
                if index >= len(self._names) or self._names[index] != names[index]:
                    layer.name = names[index]
            shown.append(layer)
        self._layers = shown + self._layers[len(shown) :]
        self._names = names + self._names[len(names) :]
        return shown

    def rename(self, name: str, metadata: dict[str, Any] | None = None) -> None:
        """Rename the layers that are left, `{}` standing for the present name, and add to their metadata."""
        for layer in self.layers:
            layer.name = name.format(layer.name)
            if metadata:
                layer.metadata = {**layer.metadata, **metadata}


def _fits(layer: Any, data: Any, kwargs: dict[str, Any], kind: str) -> bool:
    """Whether a layer can take the data in place."""
    return (
        # napari gives plugins proxies, of which only this is the layer's own
        layer.__class__.__name__.lower() == kind
        and layer.ndim == np.ndim(data) - bool(kwargs.get("rgb"))
        and bool(getattr(layer, "rgb", False)) == bool(kwargs.get("rgb"))
    )


def _update(layer: Any, data: Any, kwargs: dict[str, Any]) -> None:
    """Give a layer new data; everything that is told through events is set only where it differs."""
    if data is layer.data:
        layer.refresh()
    else:
        # napari keeps the contrast limits when data is replaced
        layer.data = data
    ndim = layer.ndim
    place = {
        "scale": np.asarray(kwargs.get("scale", (1.0,) * ndim)),
        "translate": np.asarray(kwargs.get("translate", (0.0,) * ndim)),
        "affine": np.asarray(kwargs.get("affine", np.eye(ndim + 1))),
    }
    for name, value in place.items():
        if not np.allclose(np.asarray(getattr(layer, name)), value, rtol=1e-12, atol=1e-12):
            setattr(layer, name, value)
    if "metadata" in kwargs:
        layer.metadata = {**layer.metadata, **kwargs["metadata"]}
