import numpy as np
import pytest
from scipy.interpolate import CubicSpline, PchipInterpolator

from napari_innergs.baselines import denoise, flow, interpolate


@pytest.mark.parametrize("n", [3, 4, 7])
@pytest.mark.parametrize("method", ["cubic", "pchip"])
def test_slopes_agree_with_scipy(n, method):
    random = np.random.default_rng(n)
    positions = np.cumsum(random.uniform(0.5, 3, n))
    values = random.normal(size=(n, 5, 4)).astype(np.float32)
    slopes = interpolate.slopes(values, positions, method)
    oracle = (CubicSpline if method == "cubic" else PchipInterpolator)(positions, values.astype(float))
    for gap in range(n - 1):
        for share in (0.0, 0.3, 1.0):
            at = positions[gap] + share * (positions[gap + 1] - positions[gap])
            plane = interpolate.plane(values, positions, gap, share, method, slopes)
            np.testing.assert_allclose(plane, oracle(at), atol=3e-5)


def test_two_slices_are_joined_by_a_line():
    values = np.array([[[0.0]], [[6.0]]], np.float32)
    for method in ("linear", "cubic", "pchip"):
        slopes = interpolate.slopes(values, np.array([0.0, 3.0]), method)
        assert interpolate.plane(
            values, np.array([0.0, 3.0]), 0, 1 / 3, method, slopes
        ).item() == pytest.approx(2)


def test_nearest_copies():
    values = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    plane = interpolate.plane(values, np.array([0.0, 1.0]), 0, 0.7, "nearest")
    assert np.array_equal(plane, values[1])
    plane[:] = -1
    assert values[1].min() >= 0


def blob(row, column, shape=(48, 56)):
    y, x = np.ogrid[: shape[0], : shape[1]]
    return np.exp(-((y - row) ** 2 + (x - column) ** 2) / 40).astype(np.float32)


@pytest.mark.parametrize("method", ["flow-dis", "flow-tvl1"])
def test_flow_finds_direction_and_interpolates(method):
    first, second = blob(20, 22), blob(22, 27)
    forward = flow.pair_flow(first, second, method, (0, 1))
    backward = flow.pair_flow(second, first, method, (0, 1))
    assert forward[20, 22] == pytest.approx((5, 2), abs=0.6)  # (column, row)
    to_low, to_high = flow.towards(forward, backward, 0.5)
    middle = 0.5 * flow.warp(first, to_low) + 0.5 * flow.warp(second, to_high)
    truth = blob(21, 24.5)
    linear = (first + second) / 2
    assert np.mean((middle - truth) ** 2) < 0.2 * np.mean((linear - truth) ** 2)


def test_flow_of_large_slices_has_the_same_unit():
    first, second = (blob(r, c, (321, 401)) for r, c in ((150, 200), (152, 205)))
    wide = np.ones((5, 5), np.float32) / 25
    from scipy.ndimage import convolve

    first, second = convolve(first, wide), convolve(second, wide)
    flow_large = flow.pair_flow(first, second, "flow-tvl1", (0, 1))
    assert flow_large.shape == (321, 401, 2)
    assert flow_large[150, 200] == pytest.approx((5, 2), abs=0.7)


def test_flow_of_tiny_images_is_zero():
    assert not flow.pair_flow(np.ones((5, 40)), np.ones((5, 40)), "flow-dis", (0, 1)).any()


def test_warp_many_channels():
    image = np.stack([blob(20, 20) * (c + 1) for c in range(6)], -1)
    shift = np.zeros((48, 56, 2), np.float32)
    shift[..., 0] = 3
    moved = flow.warp(image, shift)
    assert moved.shape == image.shape
    np.testing.assert_allclose(moved[:, :50, 5], 6 * blob(20, 17)[:, :50], atol=1e-3)


def test_noise_level_and_denoising():
    random = np.random.default_rng(0)
    clean = np.kron(random.uniform(0, 1, (6, 6)), np.ones((20, 20))).astype(np.float32)
    noisy = clean + random.normal(0, 0.05, clean.shape).astype(np.float32)
    sigma = denoise.noise_level(noisy)
    assert sigma == pytest.approx(0.05, rel=0.15)
    better = denoise.denoise(noisy, sigma)
    assert np.mean((better - clean) ** 2) < 0.4 * np.mean((noisy - clean) ** 2)
    assert denoise.noise_level(np.ones((2, 9))) == 0
    assert np.array_equal(denoise.denoise(clean, 0.0), clean)


def test_window_of_a_constant_image():
    low, high = flow.intensity_window(np.full((2, 8, 8), 3.0, np.float32))
    assert high > low
