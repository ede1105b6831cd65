"""Total variation and differences: against the objective, another solver and the definition."""

import numpy as np
import pytest
from skimage.restoration import denoise_tv_chambolle

from napari_innergs.baselines.tv import tv_proximal
from napari_innergs.cpu.variation import squared_gradient


@pytest.fixture
def noisy():
    rng = np.random.default_rng(0)
    volume = rng.standard_normal((13, 9, 17)).astype(np.float32)
    volume[4:9, 2:6, 5:12] += 4
    return volume


def differences(volume):
    return [np.diff(volume, axis=a, append=volume.take([-1], a)) for a in range(3)]


def objective(x, volume, weight):
    variation = np.sqrt(sum(d * d for d in differences(x))).sum()
    return 0.5 * np.square(x - volume).sum() + weight * variation


@pytest.mark.parametrize("weight", [0.1, 1.0, 3.0])
def test_reaches_the_minimum(noisy, weight):
    ours, dual = tv_proximal(noisy, weight, 300)
    other = denoise_tv_chambolle(noisy, weight=weight, max_num_iter=2000, eps=1e-8)
    assert objective(ours, noisy, weight) <= objective(other, noisy, weight) * (1 + 1e-5)
    assert np.sqrt(np.square(dual).sum(0)).max() <= 1 + 1e-5
    warm, _ = tv_proximal(noisy, weight, 1, dual.copy())
    assert objective(warm, noisy, weight) <= objective(ours, noisy, weight) * (1 + 1e-4)


def test_scales_and_limits_against_the_objective(noisy):
    rng = np.random.default_rng(3)
    scale = (1 + 0.5 * rng.random(noisy.shape)).astype(np.float32)
    limit = rng.random(noisy.shape).astype(np.float32)

    def weighed(x):
        variation = (limit * np.sqrt(sum(d * d for d in differences(x)))).sum()
        return 0.5 * (np.square(x - noisy) / scale).sum() + 0.7 * variation

    ours, dual = tv_proximal(noisy, 0.7, 2000, scale=scale, limit=limit)
    assert (np.sqrt(np.square(dual).sum(0)) <= limit + 1e-5).all()
    # convex: no worse anywhere near
    for size in (0.3, 0.03):
        near = ours + size * rng.standard_normal(noisy.shape).astype(np.float32)
        assert weighed(ours) < weighed(near)
        assert weighed(ours) < weighed(ours + size * (noisy - ours))
        assert weighed(ours) < weighed(ours + size * (tv_proximal(noisy, 0.7, 300)[0] - ours))
    plain = tv_proximal(noisy, 0.7, 200, scale=np.ones_like(noisy))[0]
    np.testing.assert_allclose(plain, tv_proximal(noisy, 0.7, 200)[0], atol=2e-3)


def test_not_below_zero(noisy):
    bounded, _ = tv_proximal(noisy, 1.0, 100, nonnegative=True)
    assert bounded.min() == 0
    assert np.array_equal(tv_proximal(noisy, 0.0, 5, nonnegative=True)[0], noisy.clip(0))


def test_flat_directions():
    for shape in ((1, 1, 9), (9, 1, 1), (1, 7, 5)):
        volume = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        flat, _ = tv_proximal(volume, 50.0, 500)
        np.testing.assert_allclose(flat, volume.mean(), atol=0.02)


def test_squared_gradient(noisy):
    energy = sum(np.square(d).sum() for d in differences(noisy))
    assert np.isclose(float((noisy * squared_gradient(noisy)).sum()), float(energy), rtol=1e-5)
    rng = np.random.default_rng(2)
    other = rng.standard_normal(noisy.shape).astype(np.float32)
    assert np.isclose(
        np.vdot(other, squared_gradient(noisy)), np.vdot(squared_gradient(other), noisy), rtol=1e-4
    )


def test_bad_input(noisy):
    with pytest.raises(ValueError, match=r"volume: got 2 axes"):
        tv_proximal(noisy[0], 1.0, 1)
    with pytest.raises(ValueError, match=r"weight: got -1"):
        tv_proximal(noisy, -1, 1)
