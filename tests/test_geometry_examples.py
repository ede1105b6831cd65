import doctest
import importlib

import pytest

MODULES = [
    *("geometry.frames", "geometry.grid", "geometry.slices", "geometry.rotation", "data", "model"),
    *(
        "io.files",
        "io.read",
        "io.write",
        "io.ply",
        "io.npz",
        "io.tiff",
        "io.nifti",
        "io.dicom",
        "io.ome_zarr",
    ),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(f"napari_innergs.{name}")).failed == 0
