"""Total variation and differences: against the objective, another solver and the definition."""

import numpy as np
import pytest
from skimage.restoration import denoise_tv_chambolle

from napari_innergs.baselines.tv import tv_proximal
from napari_innergs.cpu._pool import get_threads, set_threads
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
    plain = tv_proximal(noisy, 0.7, 8000, scale=np.ones_like(noisy))[0]
    np.testing.assert_allclose(plain, tv_proximal(noisy, 0.7, 2000)[0], atol=2e-3)


@pytest.mark.parametrize("shape", [(19, 6, 21), (1, 5, 7), (2, 1, 9), (3, 4, 1)])
def test_two_steps_at_once_are_those_written_out(shape):
    rng = np.random.default_rng(4)
    volume, limit = rng.standard_normal((2, *shape)).astype(np.float32)
    scale, limit = (0.5 + rng.random(shape)).astype(np.float32), abs(limit)
    field = 0.3 * rng.standard_normal((3, *shape)).astype(np.float32)
    field[0, -1], field[1, :, -1], field[2, :, :, -1] = 0, 0, 0

    def primal(dual):
        spread = sum(np.diff(dual[i], axis=i, prepend=0) for i in range(3))
        return np.maximum(volume + 0.4 * scale * spread, 0)

    joined = scale.copy()
    for i in range(3):
        joined = np.maximum(
            joined, np.concatenate([scale.take(range(1, shape[i]), i), scale.take([-1], i)], i)
        )
    wanted = field.copy()
    for _ in range(2):
        here = primal(wanted)
        wanted += (
            np.stack([np.diff(here, axis=i, append=here.take([-1], i)) for i in range(3)]) / 4.8 / joined
        )
        wanted *= limit / np.maximum(np.sqrt(np.square(wanted).sum(0)), limit)
    before = get_threads()
    try:
        for threads in (1, 3):
            set_threads(threads)
            ours, dual = tv_proximal(volume, 0.4, 2, field.copy(), nonnegative=True, scale=scale, limit=limit)
            np.testing.assert_allclose(dual, wanted, atol=1e-5)
            np.testing.assert_allclose(ours, primal(wanted), atol=1e-5)
    finally:
        set_threads(before)


def test_not_below_zero(noisy):
    bounded, _ = tv_proximal(noisy, 1.0, 100, nonnegative=True)
    assert bounded.min() == 0
    assert np.array_equal(tv_proximal(noisy, 0.0, 5, nonnegative=True)[0], noisy.clip(0))


@pytest.mark.parametrize("weight", [1e-42, 1e-300])
def test_weights_below_the_smallest_number_are_none(noisy, weight):
    for scale in (None, np.ones_like(noisy)):
        np.testing.assert_array_equal(tv_proximal(noisy, weight, 4, scale=scale)[0], noisy)


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
