"""Photographs of Gaussians: every backend against the float64 reference, the formula, and their promises."""

import math

import numpy as np
import pytest
import torch
from conftest import GPU, HOST

from napari_innergs.device import get_threads, set_threads
from napari_innergs.geometry.camera import Camera
from napari_innergs.operators import rgb
from napari_innergs.operators.rgb import evaluate_harmonics, render_rgb

FAST = ["cpu", *HOST, *GPU]
ALL = ["reference", *FAST]
REPEATABLE = ["cpu", HOST[1], GPU[1]]
SIZE = (33, 41)
# Name: number, least and largest standard deviation, distance of the camera, terms of the harmonics, antialias.
CASES = {
    "plain colours": (60, 0.4, 3.0, 60.0, 0, True),
    "wide angle": (60, 0.4, 3.0, 25.0, 0, True),
    "plain dilation": (60, 0.4, 3.0, 60.0, 0, False),
    "harmonics": (40, 0.4, 3.0, 60.0, 16, True),
    "tiny": (400, 0.05, 0.3, 60.0, 4, True),
    "thin needles": (60, 0.05, 10.0, 80.0, 0, False),
    "huge": (12, 5.0, 15.0, 150.0, 9, True),
    "dense": (900, 0.7, 2.0, 45.0, 0, True),
}
POSE = torch.tensor([[0.0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 50], [0, 0, 0, 1]], dtype=torch.float64)
LENS = torch.tensor([[50.0, 0, 20], [0, 50, 16], [0, 0, 1]], dtype=torch.float64)
BALL = torch.tensor([[4.0, 0, 0, 4, 0, 4]])


@pytest.fixture(autouse=True)
def _usable(request, use_backend):
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if backend is not None:
        use_backend(backend)


def scene(n, low, high, distance, terms=0, seed=0, extent=30.0):
    """Return float32 Gaussians in all directions and a camera that looks at them from a skew place, float64."""
    g = torch.Generator().manual_seed(seed)
    means = (torch.rand(n, 3, generator=g) - 0.5) * extent
    turn = torch.linalg.qr(torch.randn(n, 3, 3, generator=g, dtype=torch.float64))[0]
    sigma = torch.tensor([low, math.sqrt(low * high), high], dtype=torch.float64).repeat(n, 1)
    s = turn @ torch.diag_embed(sigma**2) @ turn.transpose(1, 2)
    opacities = torch.rand(n, generator=g) * 1.02  # some beyond the limit of a pixel
    colours = 0.5 * torch.randn(n, terms, 3, generator=g) if terms else torch.rand(n, 3, generator=g)
    view = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0]
    view[0] *= -torch.linalg.det(view).sign()  # world axes are reversed
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3], pose[:3, 3] = view, torch.tensor([0.5, -0.3, distance])
    lens = torch.tensor([[0.9 * distance, 0.3, 19.6], [0, distance, 16.4], [0, 0, 1]], dtype=torch.float64)
    upper = s[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]].float()
    return means, upper, opacities, colours, pose, lens


def run(tensors, weights, size=SIZE, **options):
    """Return image with alpha and depth, (5, rows, columns), and the gradients of sum(weights * these)."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    image, alpha, depth = render_rgb(*leaves, size, depth=True, background=(0.3, 0.6, 0.1), **options)
    out = torch.cat([image.movedim(2, 0), alpha[None], depth[None]])
    (out * weights.to(out)).sum().backward()
    return out.detach(), [x.grad for x in leaves]


def naive(means, covs, opacities, colours, pose, lens, size):
    """Draw one Gaussian after the other at each pixel, with the textbook's matrices."""
    world = np.asarray(pose)[:3, :3]
    splats = []
    for m, c, o, colour in zip(
        *(np.asarray(x, float) for x in (means, covs, opacities, colours)), strict=True
    ):
        x, y, z = world @ m + np.asarray(pose)[:3, 3]
        fx, fy, s = lens[0, 0], lens[1, 1], lens[0, 1]
        jacobian = np.array([[fx, s, -(fx * x + s * y) / z], [0, fy, -fy * y / z]]) / z
        spread = jacobian @ world @ c[[0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(3, 3) @ (jacobian @ world).T
        wide = spread + 0.3 * np.eye(2)
        o = o * math.sqrt(np.linalg.det(spread) / np.linalg.det(wide))
        u, v = (fx * x + s * y) / z + lens[0, 2], fy * y / z + lens[1, 2]
        splats.append((z, u, v, np.linalg.inv(wide), o, colour))
    out = np.zeros((*size, 4))
    for row in range(size[0]):
        for column in range(size[1]):
            through = 1.0
            for _, u, v, precision, o, colour in sorted(splats, key=lambda s: s[0]):
                d = np.array([column - u, row - v])
                a = min(0.99, o * math.exp(-0.5 * d @ precision @ d))
                if a >= 1 / 255 and through >= 1e-4:
                    out[row, column] += through * a * np.array([*colour, 1])
                    through *= 1 - a
    return out


def test_reference_is_the_formula():
    tensors = [x.double() for x in scene(25, 1.0, 3.0, 60.0, extent=20.0)]
    image, alpha = render_rgb(*tensors, SIZE, backend="reference")
    expected = naive(*tensors, SIZE)
    assert 0.5 < expected[..., 3].max() < 1
    np.testing.assert_allclose(torch.cat([image, alpha[..., None]], 2).numpy(), expected, atol=1e-12)


_TRUTHS: dict = {}


def reference(case, monkeypatch):
    """Return a case's inputs, weights that leave out the rims, and the reference's results; made once."""
    if case not in _TRUTHS:
        n, low, high, distance, terms, antialias = CASES[case]
        tensors = scene(n, low, high, distance, terms)
        doubles = [x.double() for x in tensors]
        options = {"antialias": antialias, "backend": "reference"}
        ends = []
        for factor in (0.999, 1.001):
            with monkeypatch.context() as patch:
                patch.setattr(rgb, "LEAST", rgb.LEAST * factor)
                patch.setattr(rgb, "STOP", rgb.STOP * factor)
                ends.append(render_rgb(*doubles, SIZE, **options)[0])
        clear = (ends[0] == ends[1]).all(2)
        assert clear.double().mean() > 0.5
        weights = torch.randn(5, *SIZE, generator=torch.Generator().manual_seed(3)) * clear
        weights[4] *= 0.02
        _TRUTHS[case] = tensors, antialias, clear, weights, *run(doubles, weights, **options)
    return _TRUTHS[case]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, backend, monkeypatch):
    tensors, antialias, clear, weights, truth, true_grads = reference(case, monkeypatch)
    out, grads = run(tensors, weights, antialias=antialias, backend=backend)
    assert float(truth[3].max()) > 0.15
    for ours, theirs in zip(out, truth, strict=True):
        assert ((ours - theirs).abs() * clear).max() < 1e-4 * theirs.abs().max()
    for ours, theirs in zip(grads, true_grads, strict=True):
        assert theirs.any()
        assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("terms", [0, 1, 4, 9, 16])
def test_gradients_of_the_reference(terms, monkeypatch):
    """Against differences along random directions, without the decisions that make steps."""
    monkeypatch.setattr(rgb, "LEAST", 1e-30)
    monkeypatch.setattr(rgb, "STOP", 0.0)
    monkeypatch.setattr(rgb, "MARGIN", 1e3)
    tensors = [x.double() for x in scene(12, 1.0, 3.0, 60.0, terms, extent=20.0)]
    tensors[2] = 0.2 + 0.7 * tensors[2]
    g = torch.Generator().manual_seed(5)
    shifts, background = (torch.rand(12, 2, generator=g).double(), torch.rand(3, generator=g).double())
    weights = torch.randn(5, 12, 14, generator=g)
    weights[4] *= 0.1

    def value(*x):
        image, alpha, depth = render_rgb(
            *x[:6], (12, 14), shifts=x[6], background=x[7], depth=True, backend="reference"
        )
        return (torch.cat([image.movedim(2, 0), alpha[None], depth[None]]) * weights).sum()

    leaves = [x.requires_grad_() for x in (*tensors, shifts, background)]
    value(*leaves).backward()
    for i, leaf in enumerate(leaves):
        direction = torch.randn(leaf.shape, generator=g, dtype=torch.float64)
        if i == 4:
            direction[3] = 0
        elif i == 5:
            direction[2] = direction[1, 0] = 0
        ends = []
        for sign in (1, -1):
            moved = [x.detach() for x in leaves]
            moved[i] = moved[i] + sign * 1e-6 * direction
            ends.append(float(value(*moved)))
        slope = (ends[0] - ends[1]) / 2e-6
        assert float((leaf.grad * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_harmonics():
    """An orthonormal basis, with the signs of splat files; colours are never negative."""
    points, weights = np.polynomial.legendre.leggauss(12)
    turn = np.arange(16) * (math.pi / 8)
    z, angle = (x.ravel() for x in np.meshgrid(points, turn, indexing="ij"))
    ring = np.sqrt(1 - z * z)
    directions = torch.tensor(np.stack([z, ring * np.sin(angle), ring * np.cos(angle)], 1))
    one = torch.zeros(len(z), 16, 16, 3, dtype=torch.float64)
    one[:, range(16), range(16), 0] = 0.1
    values = [(evaluate_harmonics(one[:, k], 3 * directions)[:, 0] - 0.5) / 0.1 for k in range(16)]
    area = torch.tensor(np.repeat(weights, 16)) * math.pi / 8
    basis = torch.stack(values)
    torch.testing.assert_close((basis * area) @ basis.T, torch.eye(16).double(), atol=1e-12, rtol=0)
    y, x = directions[:, 1], directions[:, 2]
    for k, axis in ((1, -y), (2, directions[:, 0]), (3, -x)):
        torch.testing.assert_close(basis[k], 0.4886025119029199 * axis)
    # the first of each degree and the last, which tell the order and the sign
    torch.testing.assert_close(basis[4], 1.0925484305920792 * x * y)
    torch.testing.assert_close(basis[8], 0.5462742152960396 * (x * x - y * y))
    torch.testing.assert_close(basis[9], -0.5900435899266435 * y * (3 * x * x - y * y))
    torch.testing.assert_close(basis[15], -0.5900435899266435 * x * (x * x - 3 * y * y))
    dark = torch.full((1, 1, 3), -5.0)
    assert not evaluate_harmonics(dark, torch.ones(1, 3)).any()


def test_colours_of_harmonics_turn_with_the_camera():
    """The direction is that from the camera to the Gaussian, in the world's axes."""
    colours = torch.zeros(1, 4, 3)
    colours[0, 1:] = torch.eye(3)
    for place in ((-50.0, 0, 0), (30.0, -40, 0)):
        towards = -np.array(place) / 50
        side = np.cross(towards, [0.0, 0.0, 1.0])
        pose = torch.eye(4).double()
        pose[:3, :3] = torch.tensor(np.stack([side, np.cross(towards, side), towards]))
        pose[:3, 3] = -pose[:3, :3] @ torch.tensor(place).double()
        image, alpha = render_rgb(torch.zeros(1, 3), BALL, torch.ones(1), colours, pose, LENS, SIZE)
        z, y, x = towards
        expected = 0.5 + 0.4886025119029199 * np.array([-y, z, -x])
        found = image[16, 20] / alpha[16, 20]
        torch.testing.assert_close(found.double(), torch.tensor(expected).clamp_min(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ALL)
def test_nearer_ones_cover_the_others(backend):
    means = torch.tensor([[10.0, 0, 0], [-10.0, 0, 0], [-10.0, 0, 0]])
    colours = torch.eye(3)
    image, alpha = render_rgb(
        means,
        BALL.repeat(3, 1),
        torch.full((3,), 0.5),
        colours,
        POSE,
        LENS,
        SIZE,
        backend=backend,
        antialias=False,
    )
    # of two at one depth the first is in front
    expected = torch.tensor([0.125, 0.5, 0.25])
    torch.testing.assert_close(image[16, 20], expected, atol=1e-5, rtol=0)
    assert float(alpha[16, 20]) == pytest.approx(0.875, abs=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_light_is_kept_by_antialiasing(backend):
    """The sum over pixels of a small Gaussian is that of its projection, wherever it falls."""
    for sigma in (0.2, 0.6):
        means = torch.tensor([[0.0, 0.21, 0.4]])
        image, alpha = render_rgb(
            means, BALL * (sigma / 2) ** 2, torch.ones(1), torch.ones(1, 3), POSE, LENS, SIZE, backend=backend
        )
        assert float(alpha.sum()) == pytest.approx(2 * math.pi * sigma**2, rel=0.08)
        rows, columns = torch.arange(33.0)[:, None], torch.arange(41.0)
        centre = [float((image[..., 0] * x).sum() / image[..., 0].sum()) for x in (rows, columns)]
        assert centre == pytest.approx([16.21, 20.4], abs=0.05)


@pytest.mark.parametrize("backend", ALL)
def test_a_wall_is_opaque_and_what_is_behind_does_not_count(backend):
    g = torch.Generator().manual_seed(0)
    means = torch.cat([torch.rand(3000, 3, generator=g) * 40 - 20, torch.rand(300, 3, generator=g) * 20 - 10])
    means[:, 0] = torch.cat([torch.rand(3000, generator=g), 5 + torch.rand(300, generator=g)])
    inputs = (
        means,
        BALL.repeat(3300, 1),
        torch.full((3300,), 0.9),
        torch.rand(3300, 3, generator=g),
        POSE,
        LENS,
    )
    leaves = [x.clone().requires_grad_() for x in inputs]
    image, alpha = render_rgb(*leaves, SIZE, backend=backend)
    assert alpha.min() >= 1 - 1e-4
    image.sum().backward()
    for leaf in leaves[:4]:
        assert not leaf.grad[3000:].any() and leaf.grad[:3000].any()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("terms", [0, 9])
def test_unusable_gaussians_are_left_out(backend, terms):
    tensors = list(scene(16, 1.0, 3.0, 60.0, terms, extent=16.0))
    weights = torch.ones(5, *SIZE)
    good = run([*(x[12:] for x in tensors[:4]), *tensors[4:]], weights, backend=backend)
    means, covs, opacities, colours = tensors[:4]
    means[0, 1] = math.nan
    covs[1, 4] = math.inf
    covs[2] = torch.tensor([1.0, 0, 0, 1.0, 1.0, 1.0])  # singular
    covs[3] = torch.tensor([-1.0, 0, 0, 1.0, 0, 1.0])
    covs[4] = BALL * 1e6  # the camera is inside
    covs[5] = BALL * 1e38
    covs[6] = 0
    means[7] = 1e30
    means[8] = math.inf
    opacities[9] = 0
    opacities[10] = math.nan
    colours[11, 1] = math.inf
    out, grads = run(tensors, weights, backend=backend)
    torch.testing.assert_close(out, good[0], atol=1e-5, rtol=1e-5)
    for grad in grads[:4]:
        assert not grad[:12].any() and grad[12:].any()
    for ours, theirs in zip(grads[4:], good[1][4:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("harmonic", [False, True])
def test_behind_and_around_the_camera(backend, harmonic):
    colours = torch.ones(1, 4, 3) if harmonic else torch.ones(1, 3)
    for z, seen in (
        (0.0, True),
        (3000.0, False),
        (-44.0, False),
        (-50.0, False),
        (-57.0, False),
        (-500.0, False),
    ):
        tensors = torch.tensor([[z, 0, 0]]), BALL, torch.ones(1), colours, POSE, LENS
        out, grads = run(tensors, torch.ones(5, *SIZE), backend=backend)
        assert bool(out[3].any()) == seen
        assert all(torch.isfinite(grad).all() and (seen or not grad.any()) for grad in grads)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("variance", [1e-44, 1e-19, 1e-6, 180.0, 1e12, 1e19])
def test_extreme_variances_stay_finite(backend, variance):
    pose = POSE.clone()
    pose[2, 3] = 50 if variance < 1e3 else 1e3 * math.sqrt(variance)
    for antialias in (True, False):
        tensors = torch.zeros(1, 3), BALL / 4 * variance, torch.ones(1), torch.ones(1, 3), pose, LENS
        out, grads = run(tensors, torch.ones(5, *SIZE), backend=backend, antialias=antialias)
        assert torch.isfinite(out).all() and all(torch.isfinite(x).all() for x in grads)
        assert bool(out[3].any()) == (variance > 1e-3 or (variance > 1e-20 and not antialias))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (66, 3), (32, 64)])
def test_images_of_all_sizes(backend, size):
    tensors = scene(80, 0.5, 3.0, 60.0, seed=4)
    lens = tensors[5].clone()
    lens[:2, 2] = torch.tensor([size[1] / 2, size[0] / 2])
    out = render_rgb(*tensors[:5], lens, size, backend=backend)
    truth = render_rgb(*(x.double() for x in (*tensors[:5], lens)), size, backend="reference")
    assert out[0].shape == (*size, 3) and truth[1].any()
    for a, b in zip(out, truth, strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-3, rtol=0)  # rims are within


@pytest.mark.parametrize("backend", ALL)
def test_nothing_to_draw(backend):
    empty = [torch.zeros(*shape, requires_grad=True) for shape in ((0, 3), (0, 6), (0,), (0, 3))]
    background = torch.tensor([0.2, 0.4, 0.6], requires_grad=True)
    image, alpha = render_rgb(*empty, POSE, LENS, (5, 40), background=background, backend=backend)
    assert not alpha.any() and torch.equal(image, background.detach().expand(5, 40, 3))
    image.sum().backward()
    assert torch.equal(background.grad, torch.full((3,), 200.0))


@pytest.mark.parametrize("backend", REPEATABLE)
def test_same_bits_every_time(backend):
    tensors = scene(2500, 0.4, 2.0, 60.0, seed=2)
    before = get_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            out, grads = run(tensors, torch.ones(5, 90, 71), (90, 71), backend=backend)
            results.append([out, *grads])
    finally:
        set_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ALL)
def test_cameras_of_the_package(backend):
    """A small Gaussian lands where the camera says, at its depth."""
    lens = [[60.0, 0, 20.3], [0, 66, 15.8], [0, 0, 1]]
    for centre in ((-50.0, 20, 10), (5.0, 60, -20)):
        camera = Camera.looking_at(centre, (0.0, 1, 2), lens, SIZE)
        point = torch.tensor([[1.3, -2.1, 0.9]])
        place, distance = camera.project(point.double().numpy())
        pose, intrinsics = torch.tensor(camera.world_to_camera), torch.tensor(camera.intrinsics)
        image, alpha, depth = render_rgb(
            point,
            BALL / 4,
            torch.ones(1),
            torch.ones(1, 3),
            pose,
            intrinsics,
            SIZE,
            depth=True,
            backend=backend,
        )
        rows, columns = torch.arange(33.0)[:, None], torch.arange(41.0)
        found = [float((image[..., 1] * x).sum() / alpha.sum()) for x in (rows, columns)]
        assert found == pytest.approx(place[0], abs=0.02)
        assert float(depth.max()) == pytest.approx(distance[0], rel=1e-5)


def test_shifts_move_the_image():
    tensors = scene(20, 0.6, 2.0, 60.0)
    lens = tensors[5].clone()
    lens[0, 2] += 3
    lens[1, 2] -= 2
    shifts = torch.tensor([[-2.0, 3]]).repeat(20, 1).requires_grad_()
    a = render_rgb(*tensors[:5], lens, SIZE)[0]
    b = render_rgb(*tensors, SIZE, shifts=shifts)[0]
    torch.testing.assert_close(a[:30, 12:], b[:30, 12:], atol=5e-3, rtol=0)
    b.square().sum().backward()
    assert shifts.grad.any()


def test_a_camera_is_found():
    """The gradient to the camera leads back to its place."""
    tensors = scene(80, 0.8, 2.0, 60.0)
    true = render_rgb(*tensors, SIZE)[0]
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    off = torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64)
    optimizer = torch.optim.Adam([shift], 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        pose = tensors[4].clone()
        pose[:3, 3] = pose[:3, 3] + off + shift
        (render_rgb(*tensors[:4], pose, tensors[5], SIZE)[0] - true).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(shift.detach(), -off, atol=0.03, rtol=0)


def test_what_is_wrong_is_said():
    names = ("means", "covs", "opacities", "colours", "world_to_camera", "intrinsics")
    good = dict(zip(names, scene(3, 1, 2, 60.0), strict=True)) | {"size": SIZE}
    for change, match in (
        ({"means": torch.zeros(3, 2)}, "means must have shape"),
        ({"opacities": torch.zeros(3, 1)}, r"opacities must have shape \(3,\)"),
        ({"opacities": torch.zeros(3).long()}, "floating point"),
        ({"colours": torch.zeros(3, 5, 3)}, "colours must have shape"),
        ({"colours": torch.zeros(3, 4)}, "colours must have shape"),
        ({"colours": torch.zeros(3, 3).long()}, "colours must be floating point"),
        ({"world_to_camera": torch.eye(3)}, r"world_to_camera: .* need floating point \(4, 4\)"),
        ({"world_to_camera": torch.eye(4) * math.nan}, "not finite"),
        ({"intrinsics": torch.eye(3).long()}, "intrinsics: got torch.int64"),
        ({"intrinsics": torch.zeros(3, 3)}, "focal length"),
        ({"size": (0, 5)}, r"size: got \(0, 5\)"),
        ({"background": (1.0, 2.0)}, "background"),
        ({"shifts": torch.zeros(2, 2)}, r"shifts must have shape \(3, 2\)"),
        ({"backend": "gpu"}, "Unknown backend"),
    ):
        with pytest.raises(ValueError, match=match):
            render_rgb(**good | change)
