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


def test_units_and_channels():
    cells = samples.cells()
    assert len(cells) == 2
    assert {kwargs["units"] for _, kwargs, _ in cells} == {("um",) * 3}
    assert cells[0][1]["colormap"] != cells[1][1]["colormap"]
    assert samples.brain()[0][1]["units"] == ("mm",) * 3
