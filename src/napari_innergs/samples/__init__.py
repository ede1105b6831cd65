"""Sample data: small, real, licensed data shipped with the package, and scans made of them or of a phantom."""

from napari_innergs.samples._dual import tooth
from napari_innergs.samples._scans import cone_scan, parallel_scan
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
    "cone_scan",
    "layers",
    "names",
    "parallel_scan",
    "tooth",
    "volume",
]
