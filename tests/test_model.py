import numpy as np
import pytest

from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.rotation import quaternion_to_matrix, rotation_vector_to_matrix
from napari_innergs.model import GaussianModel

OBLIQUE = np.array([[1.9, 0.1, 0.2, -7.0], [0.3, 0.9, -0.4, 3.0], [-0.2, 0.3, 0.7, 11.0], [0, 0, 0, 1]])


def make(count=6, channels=2, seed=0, **options):
    rng = np.random.default_rng(seed)
    return GaussianModel(
        rng.uniform(2, 8, (count, 3)),
        rng.normal(0, 0.4, (count, 3)),
        rng.normal(size=(count, 4)),
        rng.normal(0, 50, (count, channels)),
        rng.normal(size=count),
        **options,
    )


def field_at(model, points, cut=np.inf):
    """The formulas, written out."""
    delta = points[..., None, :] - model.means
    q = np.einsum("...ni,nij,...nj->...n", delta, np.linalg.inv(model.covariances()), delta)
    g = np.exp(-q / 2) * (q <= cut)
    if model.field == "additive":
        return g @ model.amplitudes
    w = np.exp(model.log_weights) * g
    return (w @ model.amplitudes + model.eps * model.background) / (w.sum(-1, keepdims=True) + model.eps)


def points_of(grid):
    return grid.index_to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1))


def test_covariance_axes_are_the_columns_of_the_rotation():
    # long axis along world x (index 2), turned a little about z
    rotation = rotation_vector_to_matrix([0.3, 0, 0])
    model = GaussianModel([[0, 0, 0]], np.log([[1, 1, 5]]), [[np.cos(0.15), np.sin(0.15), 0, 0]], [1.0])
    covariance = model.covariances()[0]
    np.testing.assert_allclose(covariance, rotation @ np.diag([1, 1, 25]) @ rotation.T, atol=1e-12)
    np.testing.assert_allclose(covariance @ rotation[:, 2], 25 * rotation[:, 2], atol=1e-12)


def test_from_covariances_is_the_inverse_and_deterministic():
    model = make(50)
    covariances = model.covariances()
    made = GaussianModel.from_covariances(model.means, covariances, model.amplitudes, model.log_weights)
    np.testing.assert_allclose(made.covariances(), covariances, rtol=1e-10, atol=1e-12)
    assert (np.diff(made.log_scales, axis=1) >= 0).all()
    np.testing.assert_allclose(np.linalg.det(quaternion_to_matrix(made.quaternions)), 1)
    six = covariances[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    again = GaussianModel.from_covariances(model.means, six, model.amplitudes)
    np.testing.assert_allclose(again.quaternions, made.quaternions, atol=1e-9)
    # round balls and needles
    special = np.stack([np.eye(3), np.diag([1e-6, 1e4, 1.0])])
    np.testing.assert_allclose(
        GaussianModel.from_covariances(np.zeros((2, 3)), special, [1, 1]).covariances(), special, atol=1e-8
    )


def test_transformed_moves_the_field():
    shear = OBLIQUE.copy()
    shear[:3, 1] *= -1  # a reflection as well
    points = np.random.default_rng(1).uniform(0, 9, (40, 3))
    for field in ("additive", "normalised"):
        model = make(field=field, background=[3.0, -1.0], units="mm")
        moved = model.transformed(shear)
        np.testing.assert_allclose(
            field_at(moved, points @ shear[:3, :3].T + shear[:3, 3]), field_at(model, points), atol=1e-6
        )
        assert moved.units == ("mm",) * 3 and moved.field == field


def test_bounds_hold_the_support():
    model = make(3)
    low, high = model.bounds(3.0)
    rng = np.random.default_rng(2)
    sphere = rng.normal(size=(4000, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    shell = np.concatenate(
        [
            m + 3 * (sphere * s) @ r.T
            for m, s, r in zip(model.means, model.scales, model.rotations, strict=True)
        ]
    )
    assert (shell >= low - 1e-9).all() and (shell <= high + 1e-9).all()
    np.testing.assert_allclose([shell.min(0), shell.max(0)], [low, high], atol=0.02 * (high - low).max())


@pytest.mark.parametrize("field", ["additive", "normalised"])
@pytest.mark.parametrize("channels", [1, 3])
def test_voxelise_on_an_oblique_grid(field, channels):
    model = make(8, channels, field=field, background=np.arange(channels) * 10.0, eps=0.01)
    linear = rotation_vector_to_matrix([0.2, -0.5, 0.3]) @ np.diag([0.9, 0.5, 0.7])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, (1.0, 0.5, 2.0)
    grid = Grid((9, 14, 11), affine)
    found = model.voxelise(grid)
    assert found.dtype == np.float32 and found.shape == grid.shape + ((channels,) if channels > 1 else ())
    wanted = field_at(model, points_of(grid), cut=16.3)
    # voxels at the rim of a support may fall on either side of it
    close = np.abs(found.reshape(wanted.shape) - wanted) < 1e-3 * np.abs(model.amplitudes).max()
    assert close.mean() > 0.999


def test_voxelise_takes_a_background_volume_and_works_in_slabs(monkeypatch):
    from napari_innergs import model as module

    model = make(2, 1, eps=1e-3)
    grid = Grid((40, 10, 10))
    background = np.arange(4000.0).reshape(40, 10, 10)
    volume = model.voxelise(grid, background=background)
    assert volume[39, 0, 0] == pytest.approx(3900, rel=1e-5)  # far from all Gaussians
    monkeypatch.setattr(module, "_SLAB_BYTES", 1)
    np.testing.assert_allclose(model.voxelise(grid, background=background), volume, rtol=1e-5)
    with pytest.raises(ValueError, match="background: got shape"):
        model.voxelise(grid, background=np.zeros((3, 10, 10)))


def test_voxelise_refuses_other_units_and_too_large_grids():
    model = make(units="mm")
    with pytest.raises(ValueError, match="units"):
        model.voxelise(Grid((4, 4, 4), units="um"))
    with pytest.raises(ValueError, match="largest grid"):
        model.voxelise(Grid((100000, 100000, 100000)))


def test_empty_model():
    model = GaussianModel(
        np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 4)), np.zeros((0, 1)), background=4.0
    )
    assert len(model) == 0 and model.covariances().shape == (0, 3, 3)
    np.testing.assert_allclose(model.voxelise(Grid((2, 3, 4))), 4.0)
    with pytest.raises(ValueError, match="no Gaussians"):
        model.bounds()


def test_is_immutable():
    model = make()
    with pytest.raises(AttributeError, match="immutable"):
        model.eps = 1.0
    with pytest.raises(ValueError, match="read-only"):
        model.means[0] = 0
    assert len(model.subset([1, 3])) == 2
    np.testing.assert_array_equal(model.subset(slice(1, 3)).means, model.means[1:3])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"means": np.zeros((2, 2))}, "means"),
        ({"means": [[0, 0, np.nan]] * 2}, "means: 2 values"),
        ({"log_scales": np.zeros((3, 3))}, "log_scales"),
        ({"log_scales": np.full((2, 3), 400.0)}, "log_scales"),
        ({"quaternions": np.zeros((2, 4))}, "quaternion"),
        ({"quaternions": np.ones((2, 3))}, "quaternions"),
        ({"amplitudes": np.ones((3, 1))}, "amplitudes"),
        ({"amplitudes": "bright"}, "amplitudes"),
        ({"log_weights": np.ones(3)}, "log_weights"),
        ({"field": "alpha"}, "field"),
        ({"background": [1, 2]}, "background"),
        ({"eps": 0.0}, "eps"),
        ({"units": ("mm", "mm")}, "units"),
    ],
)
def test_bad_input_is_named(change, match):
    good = {
        "means": np.zeros((2, 3)),
        "log_scales": np.zeros((2, 3)),
        "quaternions": np.ones((2, 4)),
        "amplitudes": np.ones((2, 1)),
    }
    with pytest.raises(ValueError, match=match):
        GaussianModel(**{**good, **change})


def test_bad_covariances():
    with pytest.raises(ValueError, match="number 1 has eigenvalue"):
        GaussianModel.from_covariances(np.zeros((2, 3)), [np.eye(3), np.diag([1, 1, -1])], [1, 1])
    with pytest.raises(ValueError, match="not symmetric"):
        GaussianModel.from_covariances(np.zeros((1, 3)), [np.eye(3) + np.eye(3, k=1)], [1])
    with pytest.raises(ValueError, match="affine"):
        make().transformed(np.diag([1, 1, 0, 1]))
