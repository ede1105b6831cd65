"""Sample data: shipped, licensed, small, and placed in the world."""

from importlib import resources

import numpy as np
import pytest

from napari_innergs import samples


@pytest.mark.parametrize("name", samples.names())
def test_volume(name):
    sample = samples.volume(name)
    assert sample.data.ndim in (3, 4)
    assert sample.data.std() > 0
    assert sample.affine.shape == (4, 4)
    assert sample.unit in ("mm", "um", "pixel")


def test_unknown_name():
    with pytest.raises(ValueError, match="no sample 'heart'"):
        samples.volume("heart")


def test_every_file_has_its_licence_and_all_is_small():
    folder = resources.files("napari_innergs.samples") / "data"
    notice = (folder / "NOTICE.md").read_text()
    total = 0
    for name in samples.names():
        assert f"`{name}.npz`" in notice
        assert len((folder / f"LICENSE.{name}.txt").read_text()) > 400
        total += len((folder / f"{name}.npz").read_bytes())
    assert total < 2.5 * 2**20


@pytest.mark.parametrize(("make", "k"), [("brain_sparse", 4), ("bone_sparse", 4), ("cells_sparse", 2)])
def test_sparse_layers_lie_on_the_complete_ones(make, k):
    from napari.layers import Image

    layers = [Image(data, **kwargs) for data, kwargs, _ in getattr(samples, make)()]
    complete, sparse = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    for full, few in zip(complete, sparse, strict=True):
        assert not full.visible
        assert few.visible
        assert few.axis_labels == ("z", "y", "x")
        assert few.scale[0] == pytest.approx(k * full.scale[0])
        index = np.array([3, 5, 7])
        place = few.data_to_world(index)
        np.testing.assert_allclose(place, full.data_to_world(index * (k, 1, 1)))
        assert few.data[tuple(index)] == full.data[tuple(index * (k, 1, 1))]
        assert few.units == full.units


def test_thick_stacks_are_means_of_the_complete_volume():
    from napari.layers import Image

    complete, *stacks = [Image(data, **kwargs) for data, kwargs, _ in samples.brain_stacks()]
    assert not complete.visible
    assert [layer.name for layer in stacks] == [
        f"T1 brain {name}" for name in ("axial", "coronal", "sagittal")
    ]
    noise = 0.01 * np.ptp(complete.data)
    for axis, layer in enumerate(stacks):
        assert layer.visible
        assert layer.units == complete.units
        assert layer.metadata["napari-innergs"] == {"thickness": 4.0, "profile": "box"}
        index = np.array([5, 6, 7])
        inside = complete.world_to_data(layer.data_to_world(index))
        first = np.rint(inside - 1.5 * np.eye(3)[axis]).astype(int)
        voxels = complete.data[tuple(slice(at, at + 1 + 3 * (d == axis)) for d, at in enumerate(first))]
        assert voxels.size == 4
        assert abs(layer.data[tuple(index)] - voxels.mean()) < 5 * noise
        # all of it: the error is noise of the stated size, nothing else
        groups = np.moveaxis(complete.data, axis, 0).reshape(layer.data.shape[axis], 4, -1)
        error = np.moveaxis(layer.data, axis, 0).reshape(len(groups), -1) - groups.mean(1)
        assert error.std() == pytest.approx(noise, rel=0.02)
        assert abs(error.mean()) < 0.01 * noise * 2


def test_units_and_channels():
    cells = samples.cells()
    assert len(cells) == 2
    assert {kwargs["units"] for _, kwargs, _ in cells} == {("um",) * 3}
    assert cells[0][1]["colormap"] != cells[1][1]["colormap"]
    assert samples.brain()[0][1]["units"] == ("mm",) * 3


@pytest.mark.parametrize(("make", "kind"), [("cone_scan", "cone"), ("parallel_scan", "parallel")])
def test_scans_are_radiographs_of_the_complete_volume(make, kind):
    from napari.layers import Image

    from napari_innergs.baselines.preprocess import scan_line_integrals
    from napari_innergs.layers.xray import scan_from_layer
    from napari_innergs.operators.project import VoxelProjector

    complete, layer = (Image(data, **kwargs) for data, kwargs, _ in getattr(samples, make)())
    assert not complete.visible
    scan = scan_from_layer(layer)
    assert scan.geometry.kind == kind
    assert scan.is_counts == (kind == "cone")
    assert scan.grid.shape == complete.data.shape
    np.testing.assert_allclose(
        complete.data_to_world((1, 2, 3)), scan.grid.index_to_world(np.array([1, 2, 3]))
    )
    assert scan.geometry.check_covers(scan.grid) is None
    measured = scan_line_integrals(scan).projections
    # another method than the one that made the sample: they differ by noise and by the size of the voxels
    projected = VoxelProjector(scan.geometry, scan.grid).apply(complete.data)
    assert np.sqrt(np.mean((measured - projected) ** 2)) < 0.012
    mirrored = VoxelProjector(scan.geometry, scan.grid).apply(np.ascontiguousarray(complete.data[:, :, ::-1]))
    assert np.sqrt(np.mean((measured - mirrored) ** 2)) > 0.03
    # views lie where the planes of the volume do
    assert layer.translate[0] == complete.translate[0]
    assert layer.scale[0] == complete.scale[0]


def test_noise_of_the_cone_scan_is_that_of_its_counts():
    (_, _, _), (counts, kwargs, _) = samples.cone_scan()
    blank = kwargs["metadata"]["napari-innergs"]["i0"]
    corner = counts[:, :4, :4].astype(float)
    assert corner.mean() == pytest.approx(blank, rel=0.002)
    assert corner.std() == pytest.approx(np.sqrt(blank), rel=0.1)
