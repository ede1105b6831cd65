"""Radiographs of Gaussians: every backend against the float64 reference, integrals, and their promises."""

import math

import numpy as np
import pytest
import torch
from conftest import GPU, HOST

from napari_innergs._constants import CUT_2D
from napari_innergs.cpu import xray as cpu_xray
from napari_innergs.cuda import xray as cuda_xray
from napari_innergs.device import get_threads, set_threads
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam
from napari_innergs.operators.xray import render_xray

FAST = ["cpu", *HOST, *GPU]
ALL = ["reference", *FAST]
REPEATABLE = ["cpu", HOST[1], GPU[1]]
SIZE = (33, 41)
# Name: number, least and largest standard deviation, channels, distance of the source (None: parallel), exact.
CASES = {
    "cone": (60, 0.7, 4.0, 1, 80.0, True),
    "cone, far source": (60, 0.7, 1.5, 1, 1000.0, True),
    "cone, between": (60, 0.7, 3.0, 1, 250.0, True),
    "two channels": (60, 0.7, 4.0, 2, 250.0, True),
    "seven channels": (40, 0.7, 4.0, 7, 80.0, True),
    "affine": (60, 0.7, 4.0, 1, 80.0, False),
    "parallel": (60, 0.7, 4.0, 1, None, True),
    "parallel, two channels": (60, 0.7, 4.0, 2, None, True),
    "tiny": (300, 0.05, 0.4, 1, 200.0, True),
    "thin needles": (60, 0.1, 6.0, 1, 200.0, True),
    "parallel needles": (60, 0.1, 10.0, 1, None, True),
    "wide": (12, 10.0, 14.0, 1, 200.0, True),
    "parallel, huge": (12, 20.0, 300.0, 2, None, True),
}


@pytest.fixture(autouse=True)
def _usable(request, use_backend):
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if backend is not None:
        use_backend(backend)


def gaussians(n, low, high, channels, seed=0, extent=36.0):
    """Return float32 means about the origin (some out of sight), covariances in all directions, amplitudes."""
    g = torch.Generator().manual_seed(seed)
    means = (torch.rand(n, 3, generator=g) - 0.5) * extent
    turn = torch.linalg.qr(torch.randn(n, 3, 3, generator=g, dtype=torch.float64))[0]
    sigma = torch.tensor([low, math.sqrt(low * high), high], dtype=torch.float64).repeat(n, 1)
    s = turn @ torch.diag_embed(sigma**2) @ turn.transpose(1, 2)
    amps = torch.randn(n, channels, generator=g)
    amps[3::7] = 0
    return means, s[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]].float(), amps


def scan(distance, size=SIZE, angles=(0.7, 2.1, 4.0), pixel=1.4):
    """Return vectors of a skew panel, whose pixels are no squares."""
    rows = []
    for a in angles:
        out, along = np.array([0.04, math.sin(a), math.cos(a)]), np.array([0.05, math.cos(a), -math.sin(a)])
        u, v = pixel * along, np.array([0.9 * pixel, 0.1, -0.05])
        corner = -30.0 * out - 0.5 * (size[1] - 1) * u - 0.5 * (size[0] - 1) * v + np.array([1.0, -2.0, 0.7])
        rows.append(np.concatenate([-out if distance is None else out * distance, corner, u, v]))
    return torch.tensor(np.array(rows))


def kind_of(distance):
    return "parallel" if distance is None else "cone"


def run(tensors, weights, size=SIZE, **options):
    """Return the image and the gradients of sum(weights * image)."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = render_xray(*leaves, size, **options)
    out.backward(weights.to(out))
    return out.detach(), [x.grad for x in leaves]


def integrals(means, covs, amps, vectors, size, kind, rows, columns):
    """Integrate along rays with the trapezium rule, in float64."""
    precision = torch.linalg.inv(covs.double()[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(-1, 3, 3))
    out = []
    for p, corner, u, v in vectors.double().unflatten(1, (4, 3)):
        for row in rows:
            for column in columns:
                pixel = corner + row * v + column * u
                start, d = (p, pixel - p) if kind == "cone" else (pixel, p)
                d = d / d.norm()
                # about the nearest point of each mean; the value there decides where to look
                t0 = (means.double() - start) @ d
                t = t0[:, None] + torch.linspace(-60, 60, 4001, dtype=torch.float64)
                x = start + t[..., None] * d - means.double()[:, None]
                g = torch.exp(-0.5 * torch.einsum("nka,nab,nkb->nk", x, precision, x)).sum(1) * (120 / 4000)
                out.append((amps.double() * g[:, None]).sum(0))
    return torch.stack(out).reshape(len(vectors), len(rows), len(columns), -1).movedim(3, 1)


@pytest.mark.parametrize("distance", [60.0, 400.0, None])
def test_reference_is_the_integral(distance):
    means, covs, amps = gaussians(8, 1.0, 3.0, 2, extent=20.0)
    vectors = scan(distance)
    options = {"kind": kind_of(distance), "cut": 75.0, "backend": "reference"}
    image = render_xray(means.double(), covs.double(), amps.double(), vectors, SIZE, **options)
    rows, columns = [0, 7, 16, 20, 32], [1, 15, 19, 24, 40]
    true = integrals(means, covs, amps, vectors, SIZE, kind_of(distance), rows, columns)
    found = image[:, :, rows][..., columns]
    assert found.abs().max() > 0.3
    torch.testing.assert_close(found, true, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("degrees", [1.0, 3.0, 8.0, 20.0])
@pytest.mark.parametrize("backend", FAST)
def test_integrals_in_float32(backend, degrees):
    """One Gaussian at a time, at the rim of the cone: 1e-5 of its peak against the textbook form in float64."""
    distance = 20.0 / math.tan(math.radians(degrees))
    far = torch.tensor([[18.0, 3.0, 5.0], [4.0, -14.0, 13.0], [-12.0, 12.0, -9.0], [0.5, 0.2, 0.1]])
    covs = gaussians(4, 0.8, 2.4, 1)[1]
    vectors = scan(distance, (96, 96), angles=(0.0, 1.0), pixel=0.7)
    for mean, cov in zip(far, covs, strict=True):
        image = render_xray(mean[None], cov[None], torch.ones(1, 1), vectors, (96, 96), backend=backend)[:, 0]
        precision = torch.linalg.inv(cov.double()[[0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(3, 3))
        for k, (source, corner, u, v) in enumerate(vectors.unflatten(1, (4, 3))):
            steps = torch.arange(96.0, dtype=torch.float64)
            ray = corner - source + steps[:, None, None] * v + steps[None, :, None] * u
            away = mean.double() - source
            a = torch.einsum("rca,ab,rcb->rc", ray, precision, ray)
            b = ray @ precision @ away
            d2 = away @ precision @ away - b * b / a
            true = ray.norm(dim=2) * torch.sqrt(2 * math.pi / a) * torch.exp(-0.5 * d2)
            inside = d2 < 0.999 * CUT_2D
            assert inside.sum() > 20
            assert ((image[k].double() - true).abs() * inside).max() < 1e-5 * true.max()
            assert not (image[k] * (d2 > 1.001 * CUT_2D)).any()


_TRUTHS: dict = {}


def reference(key, tensors, size, cut, options):
    """Return weights that leave out the rim, and the reference's image and gradients; made once for a key."""
    if key not in _TRUTHS:
        doubles = [x.double() for x in tensors]
        ones = torch.ones(len(tensors[2]), 1, dtype=torch.float64)
        inner, outer = (
            render_xray(*doubles[:2], ones, doubles[3], size, cut=cut * f, backend="reference", **options)
            for f in (0.998, 1.002)
        )
        clear = inner == outer
        assert clear.double().mean() > 0.8
        shape = (len(clear), tensors[2].shape[1], *size)
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * clear
        truth = run(doubles, weights, size, cut=cut, backend="reference", **options)
        _TRUTHS[key] = clear, weights, *truth
    return _TRUTHS[key]


def check_parity(key, tensors, size, cut, backend, **options):
    clear, weights, truth, true_grads = reference(key, tensors, size, cut, options)
    out, grads = run(tensors, weights, size, cut=cut, backend=backend, **options)
    peak = truth.abs().amax()
    assert peak > 0
    assert (((out - truth) * clear).abs().max() / peak) < 1e-4
    for name, grad, true in zip(("means", "covs", "amps", "vectors"), grads, true_grads, strict=True):
        assert (grad - true).norm() / true.norm() < 1e-3, name
        # And none of them is off on its own.
        scale = true.abs().amax(1, keepdim=True) + 1e-3 * true.abs().max()
        assert ((grad - true).abs() / scale).max() < 2e-2, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", FAST)
def test_matches_reference(backend, case):
    *shape, distance, exact = CASES[case]
    tensors = (*gaussians(*shape), scan(distance))
    check_parity(case, tensors, SIZE, CUT_2D, backend, kind=kind_of(distance), exact=exact)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (40, 15), (5, 16), (2, 17), (70, 33)])
@pytest.mark.parametrize("backend", FAST)
def test_sizes_that_fit_no_block(backend, size):
    tensors = (*gaussians(80, 2.0, 6.0, 2, extent=30.0), scan(300.0, size))
    check_parity(size, tensors, size, 9.0, backend)


@pytest.mark.parametrize("kind", ["cone", "parallel", "affine"])
def test_reference_gradients_match_finite_differences(kind):
    distance = None if kind == "parallel" else 60.0
    means, covs, amps = (x.double().requires_grad_() for x in gaussians(3, 1.5, 2.5, 2, extent=8.0))
    vectors = scan(distance, (5, 6), angles=(0.3, 1.9), pixel=2.5).requires_grad_()

    def render(*x):
        # So wide a support that the jump at its rim is below rounding.
        options = {"kind": kind_of(distance), "exact": kind != "affine", "cut": 75.0, "backend": "reference"}
        return render_xray(*x, (5, 6), **options)

    assert torch.autograd.gradcheck(render, (means, covs, amps, vectors), eps=1e-5, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_lost_mass(backend):
    covs = torch.tensor([[20.0, 5.0, -3.0, 14.0, 4.0, 17.0]])
    full = torch.tensor([[20.0, 5, -3], [5, 14, 4], [-3, 4, 17]]).double()
    mass = (2 * math.pi) ** 1.5 * float(torch.linalg.det(full)) ** 0.5
    view = torch.tensor([[0.0, 2.0, 0, -24, 0, -24, 0, 0, 1, 1, 0, 0]])
    for cut, lost in ((CUT_2D, 0.001), (9.0, 0.0111)):
        image = render_xray(
            torch.full((1, 3), 0.3),
            covs,
            torch.ones(1, 1),
            view,
            (49, 49),
            kind="parallel",
            cut=cut,
            backend=backend,
        )
        assert 1 - float(image.double().sum()) / mass == pytest.approx(lost, rel=0.03)


@pytest.mark.parametrize("backend", ALL)
def test_scans_of_the_geometry(backend):
    """A small Gaussian lands where the geometry says, with its integral in voxels."""
    angles = np.linspace(0, 2 * math.pi, 5)[:-1]
    point = np.array([1.3, -2.1, 0.9])
    for geometry in (
        ConeBeam.circular(
            angles,
            source_origin=60,
            source_detector=90,
            detector_shape=(40, 50),
            pixel_size=0.4,
            detector_offset=(1.5, -2),
        ),
        ParallelBeam.circular(angles, detector_shape=(40, 50), pixel_size=0.4),
    ):
        grid = geometry.default_grid((24, 24, 24), 0.5)
        inverse = grid.inverse_affine
        means = torch.tensor((inverse[:3, :3] @ point + inverse[:3, 3])[None]).float()
        covs = torch.tensor([[1.0, 0, 0, 1.0, 0, 1.0]]) * 0.6**2
        vectors = torch.from_numpy(geometry.to_index_frame(grid))
        options = {"kind": geometry.kind, "backend": backend}
        image = render_xray(means, covs, torch.ones(1, 1), vectors, (40, 50), **options)
        rows, columns = torch.arange(40.0)[:, None], torch.arange(50.0)
        total = image[:, 0].sum((1, 2))
        found = torch.stack([(image[:, 0] * x).sum((1, 2)) / total for x in (rows, columns)], 1)
        expected = torch.tensor(geometry.project(point[None]).reshape(4, 2))
        torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0)
        peak = 0.6 * math.sqrt(2 * math.pi)
        assert 0.8 * peak < float(image.max()) < 1.001 * peak


@pytest.mark.parametrize("backend", ALL)
def test_unusable_gaussians_are_left_out(backend):
    means, covs, amps = gaussians(12, 1.0, 3.0, 2, extent=16.0)
    vectors = scan(60.0)
    good = run((means[9:], covs[9:], amps[9:], vectors), torch.ones(3, 2, *SIZE), backend=backend)
    means[0, 1] = math.nan
    covs[1, 4] = math.inf
    covs[2] = torch.tensor([1.0, 0, 0, 1.0, 1.0, 1.0])  # singular
    covs[3] = torch.tensor([-1.0, 0, 0, 1.0, 0, 1.0])
    covs[4] = torch.tensor([1.0, 2.0, 0, 1.0, 0, 1.0])  # indefinite
    covs[5] = torch.tensor([1.0, 0, 0, 1.0, 0, 1.0]) * 1e6  # the sources are inside
    covs[6] = torch.tensor([1.0, 0, 0, 1.0, 0, 1.0]) * 3e38
    covs[7] = 0
    means[8] = 1e30
    out, grads = run((means, covs, amps, vectors), torch.ones(3, 2, *SIZE), backend=backend)
    torch.testing.assert_close(out, good[0], atol=1e-6, rtol=0)
    for grad in grads[:3]:
        assert not grad[:9].any() and grad[9:].any()
    torch.testing.assert_close(grads[3], good[1][3], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ALL)
def test_behind_and_around_the_source(backend):
    view = torch.tensor([[0.0, 50, 0, -8, -30, -8, 0, 0, 1, 1, 0, 0]])
    covs = torch.tensor([[4.0, 0, 0, 4, 0, 4]])
    for y, seen in ((0.0, True), (-200.0, True), (45.0, False), (50.0, False), (56.0, False), (200.0, False)):
        image, grads = run(
            (torch.tensor([[0.0, y, 0]]), covs, torch.ones(1, 1), view),
            torch.ones(1, 1, 17, 17),
            (17, 17),
            backend=backend,
        )
        assert bool(image.any()) == seen
        for grad in grads:
            assert torch.isfinite(grad).all() and (seen or not grad.any())


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("kind", ["cone", "parallel"])
@pytest.mark.parametrize("variance", [1e-44, 1e-21, 1e-19, 1e19, 1e21])
def test_extreme_variances_stay_finite(backend, variance, kind):
    covs = torch.tensor([[1.0, 0, 0, 1, 0, 1]]) * variance
    view = torch.tensor([[0.0, 50, 0, -8, -30, -8, 0, 0, 1, 1, 0, 0]])
    out, grads = run(
        (torch.zeros(1, 3), covs, torch.ones(1, 1), view),
        torch.ones(1, 1, 17, 17),
        (17, 17),
        kind=kind,
        backend=backend,
    )
    assert torch.isfinite(out).all() and all(torch.isfinite(x).all() for x in grads)
    wide = variance == 1e19 and kind == "parallel"
    assert int((out > 0).sum()) == {1e-19: 1}.get(variance, 289 * wide)


@pytest.mark.parametrize("backend", ALL)
def test_nothing_to_draw(backend):
    empty = [torch.zeros(0, k, requires_grad=True) for k in (3, 6, 2)]
    vectors = scan(60.0).requires_grad_()
    out = render_xray(*empty, vectors, (5, 20), backend=backend)
    assert out.shape == (3, 2, 5, 20) and not out.any()
    out.sum().backward()
    assert not vectors.grad.any()
    tensors = [x.requires_grad_() for x in gaussians(5, 1, 2, 2)]
    none = render_xray(*tensors, scan(60.0)[:0], (5, 20), backend=backend)
    assert none.shape == (0, 2, 5, 20)
    none.sum().backward()
    assert not tensors[0].grad.any()


@pytest.mark.parametrize("backend", FAST)
def test_many_views_are_done_in_turns(backend, monkeypatch):
    tensors = (*gaussians(60, 0.7, 4.0, 2), scan(200.0, angles=np.arange(5.0)))
    weights = torch.randn(5, 2, *SIZE, generator=torch.Generator().manual_seed(0))
    whole = run(tensors, weights, backend=backend)
    monkeypatch.setattr(cpu_xray, "PAIRS", 130)
    monkeypatch.setattr(cuda_xray, "PAIRS", 130)
    monkeypatch.setattr(cuda_xray, "MAX_ENTRIES", 200)
    parts = run(tensors, weights, backend=backend)
    torch.testing.assert_close(whole[0], parts[0], atol=1e-5, rtol=0)
    for a, b in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(a.abs().max()), rtol=0)


@pytest.mark.parametrize("backend", REPEATABLE)
def test_same_bits_every_time(backend):
    tensors = (*gaussians(2500, 0.7, 3.0, 2), scan(300.0, (90, 41)))
    before = get_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            out, grads = run(tensors, torch.ones(3, 2, 90, 41), (90, 41), backend=backend)
            results.append([out, *grads])
    finally:
        set_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_far_source_is_a_parallel_beam():
    means, covs, amps = gaussians(30, 1.0, 3.0, 1, extent=16.0)
    parallel, cone = scan(None), scan(None)
    cone[:, :3] = cone[:, 3:6] + 16 * cone[:, 9:] + 20 * cone[:, 6:9] - 1e6 * cone[:, :3]
    a = render_xray(means, covs, amps, parallel, SIZE, kind="parallel")
    b = render_xray(means, covs, amps, cone, SIZE)
    torch.testing.assert_close(a, b, atol=1e-3 * float(a.abs().max()), rtol=0)


def test_geometry_is_fitted():
    """The gradient to the views leads back to the offset of a panel."""
    means, covs, amps = gaussians(60, 1.0, 3.0, 1, extent=24.0)
    vectors = scan(150.0)
    true = render_xray(means, covs, amps, vectors, SIZE)
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    corner = torch.tensor([0.4, -0.6], dtype=torch.float64)
    optimizer = torch.optim.LBFGS([shift], max_iter=30, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        moved = vectors[:, 3:6] + (corner + shift)[0] * vectors[:, 6:9] + (corner + shift)[1] * vectors[:, 9:]
        image = render_xray(means, covs, amps, torch.cat([vectors[:, :3], moved, vectors[:, 6:]], 1), SIZE)
        value = (image - true).square().mean().double()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(shift.detach(), -corner, atol=1e-3, rtol=0)


def test_what_is_wrong_is_said():
    tensors, vectors = gaussians(3, 1, 2, 1), scan(60.0)
    for change, match in (
        ({"kind": "fan"}, "kind: got 'fan'"),
        ({"vectors": vectors[:, :9]}, "need floating point \\(n, 12\\)"),
        ({"vectors": vectors.long()}, "vectors: got torch.int64"),
        ({"vectors": vectors * math.nan}, "not finite"),
        ({"vectors": torch.cat([vectors[:, :9], vectors[:, 6:9]], 1)}, "view 0 has a panel without area"),
        ({"detector_shape": (0, 5)}, "detector_shape: got \\(0, 5\\)"),
        ({"cut": -1.0}, "cut"),
        ({"backend": "gpu"}, "Unknown backend"),
    ):
        options = {"vectors": vectors, "detector_shape": SIZE} | change
        with pytest.raises(ValueError, match=match):
            render_xray(*tensors, **options)
    with pytest.raises(ValueError, match="means must have shape"):
        render_xray(tensors[0][:, :2], *tensors[1:], vectors, SIZE)
