"""Slices and voxels of Gaussians: every backend against the float64 reference, and their promises."""

import math
import threading

import numpy as np
import pytest
import torch
from conftest import GPU, HOST

from napari_innergs._constants import CUT_3D
from napari_innergs.device import get_threads, set_threads
from napari_innergs.operators.slices import morton_order, render_normalised, render_slices
from napari_innergs.operators.voxels import voxelise, voxelise_normalised

FAST = ["cpu", *HOST, *GPU]
ALL = ["reference", *FAST]
REPEATABLE = ["cpu", *HOST, GPU[1]]
POSITIONS = torch.tensor([-2.0, 1.3, 5.0, 7.7, 8.1, 20.0, 33.0])
SIZE = (37, 45)
# Gaussians by what is difficult about them: number, least and largest standard deviation, channels.
CASES = {
    "ordinary": (80, 0.5, 3.0, 1),
    "two channels": (80, 0.5, 3.0, 2),
    "five channels": (80, 0.5, 3.0, 5),
    "thirteen channels": (40, 0.5, 3.0, 13),
    "tiny": (300, 0.02, 0.3, 2),
    "huge": (12, 20.0, 300.0, 2),
    "needles": (80, 0.5, 10.0, 2),
    "thin needles": (80, 0.1, 2.0, 1),
    "one": (1, 9.0, 12.0, 3),
    "two thousand": (2051, 0.3, 1.5, 2),
}


@pytest.fixture(autouse=True)
def _usable(request, use_backend):
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if backend is not None:
        use_backend(backend)


def gaussians(n, low, high, channels, seed=0, extent=60.0):
    """Return float32 means (some out of sight), covariances in all directions, amplitudes of both signs."""
    g = torch.Generator().manual_seed(seed)
    means = torch.rand(n, 3, generator=g) * extent - 10
    turn = torch.linalg.qr(torch.randn(n, 3, 3, generator=g, dtype=torch.float64))[0]
    # One axis at each end of the range, so that every Gaussian has the full aspect ratio.
    sigma = torch.tensor([low, math.sqrt(low * high), high], dtype=torch.float64).repeat(n, 1)
    s = turn @ torch.diag_embed(sigma**2) @ turn.transpose(1, 2)
    covs = s[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    amps = torch.randn(n, channels, generator=g)
    amps[3::7] = 0
    return means, covs.float(), amps


def run(render, tensors, weights=None):
    """Return the image and the gradients of sum(weights * image)."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = render(*leaves)
    if weights is None:
        return out.detach()
    out.backward(weights.to(out.dtype))
    return out.detach(), [x.grad for x in leaves]


def away_from_rim(render, tensors, cut):
    """Return where no Gaussian ends within rounding: elsewhere the answer may jump."""
    means, covs, amps = (x.double() for x in tensors)
    ones = torch.ones(len(amps), 1, dtype=torch.float64)
    inner, outer = (render(means, covs, ones, cut=cut * f, backend="reference") for f in (0.999, 1.001))
    return inner == outer


_TRUTHS: dict = {}


def reference(key, render, tensors, cut):
    """Return weights that leave out the rim, and the reference's image and gradients; made once for a key."""
    if key not in _TRUTHS:
        clear = away_from_rim(render, tensors, cut)
        assert clear.double().mean() > 0.9
        shape = (*clear.shape[:1], tensors[2].shape[1], *clear.shape[2:])
        if clear.shape[0] == 1:  # voxels: channels come first
            shape = (tensors[2].shape[1], *clear.shape[1:])
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * clear
        truth = run(
            lambda *x: render(*x, cut=cut, backend="reference"), [x.double() for x in tensors], weights
        )
        _TRUTHS[key] = clear, weights, *truth
    return _TRUTHS[key]


def check_parity(key, render, tensors, cut, backend):
    clear, weights, truth, true_grads = reference(key, render, tensors, cut)
    out, grads = run(lambda *x: render(*x, cut=cut, backend=backend), tensors, weights)
    peak = truth.abs().amax()
    assert peak > 0
    assert (((out - truth) * clear).abs().max() / peak) < 1e-4
    for name, grad, true in zip(("means", "covs", "amps"), grads, true_grads, strict=True):
        assert (grad - true).norm() / true.norm() < 1e-3, name
        # And none of them is off on its own.
        scale = true.abs().amax(1, keepdim=True) + 1e-3 * true.abs().max()
        assert ((grad - true).abs() / scale).max() < 2e-2, name


@pytest.mark.parametrize("cut", [9.0, CUT_3D])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", FAST)
def test_slices_match_reference(backend, case, cut):
    def render(*tensors, **options):
        return render_slices(*tensors, POSITIONS, SIZE, **options)

    check_parity(("slices", case, cut), render, gaussians(*CASES[case]), cut, backend)


@pytest.mark.parametrize("case", ["ordinary", "five channels", "tiny", "huge", "needles"])
@pytest.mark.parametrize("backend", FAST)
def test_voxels_match_reference(backend, case):
    def render(*tensors, **options):
        return voxelise(*tensors, (19, 21, 30), **options)

    check_parity(("voxels", case), render, gaussians(*CASES[case], extent=40.0), CUT_3D, backend)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (40, 15), (5, 16), (2, 17), (70, 33), (200, 20)])
@pytest.mark.parametrize("backend", FAST)
def test_sizes_that_fit_no_block(backend, size):
    def render(*tensors, **options):
        return render_slices(*tensors, POSITIONS, size, **options)

    tensors = gaussians(150, 0.8, 4.0, 2, extent=30.0)
    clear, weights, truth, true_grads = reference(size, render, tensors, 9.0)
    out, grads = run(lambda *x: render(*x, cut=9.0, backend=backend), tensors, weights)
    assert ((out - truth) * clear).abs().max() < 1e-4 * max(1.0, float(truth.abs().max()))
    for grad, true in zip(grads, true_grads, strict=True):
        assert (grad - true).norm() < 1e-3 * (true.norm() + 1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_tall_gaussians(backend):
    """Stepping down hundreds of rows must not pile up rounding errors."""
    means = torch.tensor([[0.5, 600.0, 12.0], [-0.5, 580.0, 3.0]])
    covs = torch.tensor([[1.0, 0.0, 0.0, 31000.0, 0.0, 9.0], [1.0, 5.0, 0.0, 35000.0, 100.0, 16.0]])

    def render(*tensors, **options):
        return render_slices(*tensors, torch.linspace(-2, 2, 33), (1200, 20), **options)

    check_parity("tall", render, (means, covs, torch.ones(2, 1)), CUT_3D, backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("variance", [1e-44, 1e-21, 1e-19, 1e19, 1e21, 3e38])
def test_extreme_variances_stay_finite(backend, variance):
    tensors = (
        torch.tensor([[1.0, 5.0, 5.0]]),
        torch.tensor([[1.0, 0, 0, 1, 0, 1]]) * variance,
        torch.ones(1, 1),
    )
    out, grads = run(
        lambda *x: render_slices(*x, [0.0, 1.0], (9, 20), backend=backend), tensors, torch.ones(2, 1, 9, 20)
    )
    drawn = {1e-19: 1, 1e19: 360}.get(variance, 0)
    assert int((out == 1).sum()) == drawn
    assert torch.isfinite(grads[0]).all() and float(grads[2].sum()) == drawn


def test_reference_is_the_formula():
    """One pixel at a time, straight from the definition."""
    means, covs, amps = (x.double().numpy() for x in gaussians(6, 1.0, 4.0, 2, extent=30.0))
    image = render_slices(
        *map(torch.from_numpy, (means, covs, amps)), [3.0, 11.0], (12, 14), backend="reference"
    )
    for m, t in enumerate((3.0, 11.0)):
        for y, x in ((0, 0), (4, 9), (11, 13)):
            expected = np.zeros(2)
            for mean, (tt, tr, tc, rr, rc, cc), amp in zip(means, covs, amps, strict=True):
                d = np.array([t, y, x]) - mean
                d2 = d @ np.linalg.solve([[tt, tr, tc], [tr, rr, rc], [tc, rc, cc]], d)
                expected += amp * np.exp(-d2 / 2) * (d2 <= CUT_3D)
            np.testing.assert_allclose(image[m, :, y, x].numpy(), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("operator", ["slices", "voxels", "normalised slices", "normalised voxels"])
def test_reference_gradients_match_finite_differences(operator):
    means, covs, amps = (x.double().requires_grad_() for x in gaussians(3, 1.0, 2.5, 2, extent=16.0))
    weights = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    # So wide a support that the jump at its rim is below rounding.
    options = {"cut": 70.0, "backend": "reference"}
    inputs = [means, covs, amps]
    if operator.startswith("normalised"):
        inputs.append(weights)
    functions = {
        "slices": lambda *x: render_slices(*x, [1.0, 4.5], (5, 6), **options),
        "voxels": lambda *x: voxelise(*x, (3, 4, 5), **options),
        "normalised slices": lambda *x: render_normalised(*x, [1.0, 4.5], (5, 6), 0.2, **options),
        "normalised voxels": lambda *x: voxelise_normalised(*x, (3, 4, 5), 0.2, **options),
    }
    assert torch.autograd.gradcheck(functions[operator], inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_lost_mass(backend):
    means = torch.tensor([[24.3, 23.8, 24.1]])
    covs = torch.tensor([[20.0, 5.0, -3.0, 14.0, 4.0, 17.0]])
    full = torch.tensor([[20.0, 5, -3], [5, 14, 4], [-3, 4, 17]]).double()
    mass = (2 * math.pi) ** 1.5 * float(torch.linalg.det(full)) ** 0.5
    for cut, lost in ((CUT_3D, 0.001), (9.0, 0.0293)):
        volume = voxelise(means, covs, torch.ones(1, 1), (48, 48, 48), cut=cut, backend=backend)
        assert 1 - float(volume.double().sum()) / mass == pytest.approx(lost, rel=0.03)


@pytest.mark.parametrize("backend", ALL)
def test_slices_and_voxels_are_one_field(backend):
    tensors = gaussians(60, 0.7, 4.0, 2, extent=40.0)
    volume = voxelise(*tensors, (20, 22, 25), backend=backend)
    slices = render_slices(*tensors, torch.arange(20.0), (22, 25), backend=backend)
    torch.testing.assert_close(slices.transpose(0, 1), volume, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", ALL)
def test_shift(backend):
    means, covs, amps = gaussians(60, 0.7, 4.0, 2, extent=40.0)
    shift = torch.tensor([512.0, 3.0, 18.0])
    base = render_slices(means, covs, amps, [4.0, 9.0], (20, 20), cut=60.0, backend=backend)
    moved = render_slices(means + shift, covs, amps, [516.0, 521.0], (23, 38), cut=60.0, backend=backend)
    torch.testing.assert_close(moved[..., 3:, 18:], base, atol=1e-4 * float(base.abs().max()), rtol=0)


@pytest.mark.parametrize("backend", ALL)
def test_unit_of_the_normal(backend):
    """The unit along the normal is free: means, covariances and positions scale together."""
    means, covs, amps = gaussians(60, 0.7, 4.0, 1, extent=40.0)
    base = render_slices(means, covs, amps, [4.0, 9.0], (20, 20), cut=60.0, backend=backend)
    scale, covs_scale = torch.tensor([0.25, 1, 1]), torch.tensor([0.0625, 0.25, 0.25, 1, 1, 1])
    scaled = render_slices(
        means * scale, covs * covs_scale, amps, [1.0, 2.25], (20, 20), cut=60.0, backend=backend
    )
    torch.testing.assert_close(scaled, base, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ALL)
def test_positions_in_any_order(backend):
    tensors = gaussians(60, 0.7, 4.0, 1, extent=40.0)
    positions = torch.tensor([9.0, -3.0, 4.25, 9.0, 30.0])
    together = render_slices(*tensors, positions, (20, 21), backend=backend)
    for one, image in zip(positions, together, strict=True):
        alone = render_slices(*tensors, [float(one)], (20, 21), backend=backend)[0]
        torch.testing.assert_close(image, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ALL)
def test_slabs_make_the_volume(backend):
    tensors = gaussians(200, 0.7, 4.0, 2, extent=60.0)
    whole = voxelise(*tensors, (37, 40, 40), backend=backend)
    parts = [
        voxelise(*tensors, (37, 40, 40), z_range=(a, min(a + 10, 37)), backend=backend)
        for a in range(0, 37, 10)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", ALL)
def test_nothing_to_draw(backend):
    empty = [torch.zeros(0, k, requires_grad=True) for k in (3, 6, 2)]
    out = render_slices(*empty, [0.0, 1.0], (5, 20), backend=backend)
    assert out.shape == (2, 2, 5, 20) and not out.any()
    out.sum().backward()
    assert voxelise(*empty, (2, 3, 4), backend=backend).shape == (2, 2, 3, 4)
    tensors = [x.requires_grad_() for x in gaussians(5, 1, 2, 2)]
    none = render_slices(*tensors, [], (5, 20), backend=backend)
    assert none.shape == (0, 2, 5, 20)
    none.sum().backward()
    assert not tensors[0].grad.any()
    away = render_slices(tensors[0] + 1e4, *tensors[1:], [0.0], (5, 20), backend=backend)
    assert not away.any()
    away.sum().backward()
    assert all(torch.isfinite(x.grad).all() and not x.grad.any() for x in tensors)


@pytest.mark.parametrize("backend", ALL)
def test_unusable_gaussians_are_left_out(backend):
    means, covs, amps = gaussians(9, 1.0, 3.0, 2, extent=30.0)
    good = run(
        lambda *x: render_slices(*x, [5.0, 9.0], (30, 30), backend=backend), (means[5:], covs[5:], amps[5:])
    )
    means[0, 1] = math.nan
    covs[1, 4] = math.inf
    covs[2] = torch.tensor([1.0, 0, 0, 1.0, 1.0, 1.0])  # singular
    covs[3] = torch.tensor([-1.0, 0, 0, 1.0, 0, 1.0])
    covs[4] = torch.tensor([1.0, 2.0, 0, 1.0, 0, 1.0])  # indefinite
    render = lambda *x: render_slices(*x, [5.0, 9.0], (30, 30), backend=backend)  # noqa: E731
    out, grads = run(render, (means, covs, amps), torch.ones(2, 2, 30, 30))
    torch.testing.assert_close(out, good, atol=1e-6, rtol=0)
    for grad in grads:
        assert not grad[:5].any() and grad[5:].any()


@pytest.mark.parametrize("backend", REPEATABLE)
def test_same_bits_every_time(backend):
    def everything():
        out, grads = run(
            lambda *x: render_slices(*x, POSITIONS, (300, 45), backend=backend),
            gaussians(3000, 0.5, 3.0, 2),
            torch.ones(len(POSITIONS), 2, 300, 45),
        )
        return [out, *grads]

    before = get_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            set_threads(threads)
            results.append(everything())
    finally:
        set_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", REPEATABLE)
def test_two_python_threads_at_once(backend):
    inputs = [gaussians(2000, 0.5, 3.0, 2, seed=seed) for seed in range(3)]
    weights = torch.ones(len(POSITIONS), 2, 60, 60)

    def work(tensors):
        out, grads = run(lambda *x: render_slices(*x, POSITIONS, (60, 60), backend=backend), tensors, weights)
        return [out, *grads]

    alone = [work(tensors) for tensors in inputs]
    together: list = [None] * len(inputs)

    def repeat(i):
        for _ in range(5):
            together[i] = work(inputs[i])

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", ALL)
def test_strides_and_types(backend):
    means, covs, amps = gaussians(30, 0.8, 3.0, 2, extent=30.0)
    base = render_slices(means, covs, amps, [4.0], (20, 21), backend=backend)
    strided = [torch.stack([x, x + 1], 2)[..., 0] for x in (means, covs, amps)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(render_slices(*strided, [4.0], (20, 21), backend=backend), base)
    doubles = [x.double().requires_grad_() for x in (means, covs, amps)]
    out = render_slices(*doubles, [4.0], (20, 21), backend=backend)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), base, atol=1e-5, rtol=0)
    out.transpose(2, 3).sum().backward()  # an expanded, transposed gradient
    assert doubles[0].grad.dtype == torch.float64 and doubles[0].grad.any()


@pytest.mark.parametrize("backend", FAST)
def test_change_in_place_is_noticed(backend):
    means, covs, amps = gaussians(30, 0.8, 3.0, 2)
    amps.requires_grad_()
    out = render_slices(means, covs, amps, [4.0], (20, 21), backend=backend)
    covs.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ALL)
def test_normalised_field(backend):
    means, covs, _ = gaussians(200, 1.0, 3.0, 2, extent=40.0)
    weights = torch.linspace(-2, 2, len(means))
    flat = torch.full((len(means), 2), 3.5)
    image = render_normalised(means, covs, flat, weights, [4.0, 9.0], (20, 21), 3.5, backend=backend)
    torch.testing.assert_close(image, torch.full((2, 2, 20, 21), 3.5), atol=1e-4, rtol=0)
    volume = voxelise_normalised(means, covs, flat, weights, (5, 20, 21), 3.5, backend=backend)
    torch.testing.assert_close(volume, torch.full((2, 5, 20, 21), 3.5), atol=1e-4, rtol=0)
    # Where nothing reaches, the background; a tensor is broadcast.
    background = torch.arange(21.0)
    far = render_normalised(means + 1e3, covs, flat, weights, [4.0], (20, 21), background, backend=backend)
    torch.testing.assert_close(far, background.expand(1, 2, 20, 21))
    # Against the definition.
    amps = torch.randn(len(means), 2)
    w = torch.exp(weights)[:, None]
    top = render_slices(means, covs, w * amps, [4.0], (20, 21), backend=backend)
    bottom = render_slices(means, covs, w, [4.0], (20, 21), backend=backend)
    expected = (top + 0.01 * 2.0) / (bottom + 0.01)
    out = render_normalised(means, covs, amps, weights, [4.0], (20, 21), 2.0, 0.01, backend=backend)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_morton_order_keeps_neighbours_together():
    points = torch.rand(4096, 3) * 128
    order = morton_order(points)
    assert torch.equal(order.sort().values, torch.arange(4096))
    shuffled = (points[1:] - points[:-1]).norm(dim=1).mean()
    along = (points[order][1:] - points[order][:-1]).norm(dim=1).mean()
    assert along < 0.25 * shuffled
    # Order of the eight octants by hand: the first axis is the slowest.
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    assert torch.equal(morton_order(corners.flip(0), cell=0.6), torch.arange(7, -1, -1))
    assert len(morton_order(torch.zeros(0, 3))) == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"means": torch.zeros(4, 2)}, "means must have shape"),
        ({"covs": torch.zeros(3, 6)}, "covs must have shape"),
        ({"amps": torch.zeros(4)}, "amps must have shape"),
        ({"amps": torch.zeros(4, 1, dtype=torch.int32)}, "floating point"),
        ({"positions": [math.nan]}, "finite"),
        ({"size": (0, 5)}, "size must be"),
        ({"cut": -1.0}, "cut is a squared radius"),
        ({"backend": "abacus"}, "Unknown backend 'abacus'"),
    ],
)
def test_wrong_arguments_of_slices(change, match):
    arguments = {
        "means": torch.zeros(4, 3), "covs": torch.ones(4, 6), "amps": torch.zeros(4, 1), "positions": [0.0],
        "size": (5, 5), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=match):
        render_slices(**arguments)


def test_wrong_arguments_of_the_others():
    tensors = torch.zeros(4, 3), torch.ones(4, 6), torch.zeros(4, 1)
    with pytest.raises(ValueError, match="shape must be"):
        voxelise(*tensors, (0, 3, 3))
    with pytest.raises(ValueError, match="z_range"):
        voxelise(*tensors, (4, 3, 3), z_range=(2, 5))
    with pytest.raises(ValueError, match="log_weights must hold 4"):
        render_normalised(*tensors, torch.zeros(3), [0.0], (5, 5))
    with pytest.raises(ValueError, match="eps must be positive"):
        render_normalised(*tensors, torch.zeros(4), [0.0], (5, 5), eps=0.0)
