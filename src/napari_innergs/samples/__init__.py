"""Sample data: small, real, licensed volumes shipped with the package."""

from napari_innergs.samples._volumes import (
    Sample,
    bone,
    bone_sparse,
    brain,
    brain_sparse,
    brain_stacks,
    cells,
    cells_sparse,
    layers,
    names,
    volume,
)

__all__ = [
    "Sample",
    "bone",
    "bone_sparse",
    "brain",
    "brain_sparse",
    "brain_stacks",
    "cells",
    "cells_sparse",
    "layers",
    "names",
    "volume",
]
