"""What only a GPU can show. The shared suites run there too: pytest -m gpu."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from napari_innergs import device
from napari_innergs.fit import field
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam
from napari_innergs.operators import rgb
from napari_innergs.operators.project import VoxelProjector
from napari_innergs.operators.rgb import render_rgb
from napari_innergs.operators.shear import Adam, sheared_gaussians
from napari_innergs.operators.slices import morton_order, render_slices
from napari_innergs.operators.voxels import voxelise
from napari_innergs.operators.xray import render_xray

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu():
    """Return the GPU; skip with the reason where there is none."""
    try:
        return torch.device(device.describe_device("cuda").name)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def deterministic():
    device.set_deterministic(True)
    yield
    device.set_deterministic(False)


def problem(where, n=3000, channels=2):
    g = torch.Generator().manual_seed(0)
    means = torch.rand(n, 3, generator=g) * 60
    root = torch.randn(n, 3, 3, generator=g) + 2 * torch.eye(3)
    s = root @ root.transpose(1, 2) + 0.3 * torch.eye(3)
    covs = s[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    return [x.to(where) for x in (means, covs, torch.randn(n, channels, generator=g))]


def image_and_gradients(tensors, **options):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = render_slices(*leaves, torch.arange(0.0, 60, 4), (70, 61), **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(weights.to(out.device))
    return [out.detach(), *(x.grad for x in leaves)]


def view(where):
    """Return a view of `problem` for X-rays, and for photographs its pose and lens."""
    vectors = torch.tensor([[30.0, -120, 30, -20, 120, -20, 0, 0, 2, 2, 0, 0]], dtype=torch.float64)
    pose = torch.tensor([[0.0, 0, 1, -30], [0, 1, 0, -30], [1, 0, 0, 70], [0, 0, 0, 1]], dtype=torch.float64)
    lens = torch.tensor([[60.0, 0, 25], [0, 60, 22], [0, 0, 1]], dtype=torch.float64)
    return [x.to(where) for x in (vectors, pose, lens)]


def pictures(kind, tensors, **options):
    """Return an X-ray or photograph, and the gradients of Gaussians and view."""
    means, covs, amps = tensors
    vectors, *camera = view(means.device)
    if kind == "xray":
        leaves = [x.clone().requires_grad_() for x in (means, covs, amps, vectors)]
        out = render_xray(*leaves, (45, 51), **options)
    else:
        given = means, covs, amps[:, 0].sigmoid(), amps[:, [0, 1, 0]].sigmoid(), *camera
        leaves = [x.clone().requires_grad_() for x in given]
        out = torch.cat(
            [x.reshape(45, 51, -1) for x in render_rgb(*leaves, (45, 51), depth=True, **options)], 2
        )
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(weights.to(out))
    return [out.detach(), *(x.grad for x in leaves)]


def slices():
    y, x = np.mgrid[:40, :44]
    planes = [np.exp(-((y - 18) ** 2 + (x - 14 - 2 * j) ** 2) / 40) + 0.3 * np.sin(x / 3) for j in range(5)]
    return np.stack(planes)[..., None].astype(np.float32)


def fitted(where, iterations=30, **options):
    values = slices()
    one = field.start_field(values, np.arange(5.0), None, spacing=2.0, through=0.7).to(where)
    losses = [x for _, x in field.fit_field(one, values, np.arange(5.0), iterations, densify=True, **options)]
    return one, losses


def test_tensors_stay_on_the_gpu_and_agree_with_the_cpu(gpu):
    """A few pixels lie on the rim within rounding, where a hard cut may fall on either side."""
    theirs, ours = image_and_gradients(problem("cpu")), image_and_gradients(problem(gpu))
    for a, b in zip(ours, theirs, strict=True):
        assert a.device == gpu
        assert (a.cpu() - b).norm() < 2e-3 * b.norm()


@pytest.mark.parametrize("kind", ["xray", "rgb"])
def test_pictures_agree_with_the_cpu(gpu, kind):
    theirs, ours = (pictures(kind, problem(where)) for where in ("cpu", gpu))
    for a, b in zip(ours, theirs, strict=True):
        assert a.device == gpu
        assert (a.cpu() - b).norm() < 2e-3 * b.norm()


@pytest.mark.parametrize("operator", ["slices", "voxels", "shear", "xray", "rgb"])
def test_gradients_against_finite_differences(gpu, operator, monkeypatch):
    """Along random directions, with so wide a support that nothing crosses its rim."""
    monkeypatch.setattr(rgb, "LEAST", 1e-12)
    monkeypatch.setattr(rgb, "STOP", 0.0)
    g = torch.Generator().manual_seed(2)
    if operator == "shear":
        shapes = [(9, 2), (9,), (9, 3), (9, 2), (9,)]
        inputs = [(0.5 * torch.randn(s, generator=g)).to(gpu) for s in shapes]

        def function(*x):
            covs, channels = sheared_gaussians(*x)
            return covs.sin().sum() + channels.square().sum()
    else:
        inputs = problem(gpu, 40)

        def function(*x):
            if operator == "slices":
                out = render_slices(*x, [10.0, 22.5, 40.0], (50, 50), cut=60.0)
            elif operator == "xray":
                out = render_xray(*x, view(gpu)[0], (45, 51), cut=60.0)
            elif operator == "rgb":
                opacities, colours = 0.9 * x[2][:, 0].sigmoid(), x[2][:, [0, 1, 0]].sigmoid()
                out = render_rgb(*x[:2], opacities, colours, *view(gpu)[1:], (45, 51))[0]
            else:
                out = voxelise(*x, (30, 40, 40), cut=60.0)
            return out.square().double().sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    function(*leaves).backward()
    for i, leaf in enumerate(leaves):
        direction = torch.randn(leaf.shape, generator=g).to(gpu)
        step = 1e-2 if operator != "shear" else 1e-3
        ends = []
        for sign in (1, -1):
            moved = [x.detach() for x in inputs]
            moved[i] = inputs[i] + sign * step * direction
            ends.append(float(function(*moved)))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float((leaf.grad * direction).sum()) == pytest.approx(slope, rel=2e-2)


def test_a_fit_on_a_side_stream(gpu, deterministic):
    expected = fitted(gpu)
    stream = torch.cuda.Stream(gpu)
    # work that the default stream is busy with, so that a kernel on the wrong stream would come too early or late
    busy = torch.randn(4000, 4000, device=gpu)
    for _ in range(20):
        busy = busy @ busy / 4000
    with torch.cuda.stream(stream):
        found = fitted(gpu)
    stream.synchronize()
    assert found[1] == expected[1]
    assert torch.equal(found[0].mean, expected[0].mean)


def test_the_fit_agrees_with_that_of_the_cpu(gpu):
    (_, theirs), (one, ours) = fitted("cpu"), fitted(gpu)
    assert one.mean.device == gpu
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    assert ours[-1] == pytest.approx(theirs[-1], rel=0.1)


def test_same_bits(gpu, deterministic):
    first = image_and_gradients(problem(gpu, 20_000))
    for _ in range(5):
        assert all(
            torch.equal(a, b) for a, b in zip(first, image_and_gradients(problem(gpu, 20_000)), strict=True)
        )


def test_both_forward_passes_agree(gpu):
    fast = render_slices(*problem(gpu), [3.0, 20.0], (60, 61))
    device.set_deterministic(True)
    try:
        same = render_slices(*problem(gpu), [3.0, 20.0], (60, 61))
    finally:
        device.set_deterministic(False)
    torch.testing.assert_close(fast, same, atol=1e-5 * float(fast.abs().max()), rtol=0)


def test_second_gpu(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    results = [image_and_gradients(problem(f"cuda:{i}")) for i in (0, 1)]
    for a, b in zip(*results, strict=True):
        assert b.device.index == 1
        assert (a.cpu() - b.cpu()).norm() < 1e-4 * a.cpu().norm()
    current = torch.cuda.current_device()
    assert render_slices(*problem("cpu"), [3.0], (9, 9), backend="cuda:1").device.type == "cpu"
    assert torch.cuda.current_device() == current


def test_memory_does_not_grow(gpu):
    one, _ = fitted(gpu, 3)
    values, positions = slices(), np.arange(5.0)
    list(field.fit_field(one, values, positions, 20))
    torch.cuda.synchronize(gpu)
    before, reserved = torch.cuda.memory_allocated(gpu), torch.cuda.memory_reserved(gpu)
    free = torch.cuda.mem_get_info(gpu)[0]
    list(field.fit_field(one, values, positions, 1000))
    torch.cuda.synchronize(gpu)
    assert torch.cuda.memory_allocated(gpu) <= before + 2**20
    assert torch.cuda.memory_reserved(gpu) <= reserved + 2**22
    assert torch.cuda.mem_get_info(gpu)[0] >= free - 2**25  # others may use the GPU too


def test_adam_on_a_copy_updates_the_original(gpu):
    """Tensors on the CPU with the GPU asked for: the update must come back."""
    ours, theirs = (torch.linspace(-1, 1, 40).requires_grad_() for _ in range(2))
    for value, backend in ((ours, "cuda"), (theirs, "cpu")):
        optimiser = Adam(backend=backend)
        for _ in range(3):
            value.square().sum().backward()
            optimiser.step({"x": value}, {"x": 0.1})
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_too_little_memory_is_explained(gpu):
    free, _ = torch.cuda.mem_get_info(gpu)
    means, covs, amps = problem(gpu, 10, 1)
    planes = int(4 * free / (4 * 4096 * 4096))
    with pytest.raises(MemoryError, match=r"bytes are free.*smaller preset, or the device 'cpu'"):
        render_slices(means, covs, amps, torch.arange(float(planes)), (4096, 4096))
    # and goes on afterwards
    assert render_slices(means, covs, amps, [3.0], (60, 60)).shape == (1, 1, 60, 60)


def test_a_reconstruction_on_the_gpu():
    import napari_innergs as igs

    stack = igs.SliceStack(slices()[..., 0], affine=np.diag([4.0, 1, 1, 1]), units="mm")
    volumes = [igs.reconstruct_slices(stack, config="fast", device=name) for name in ("cpu", "cuda")]
    assert volumes[1].report["device"]["name"].startswith("cuda:")
    span = float(np.ptp(volumes[0].volume))
    assert np.abs(volumes[0].volume - volumes[1].volume).mean() < 5e-3 * span


def test_a_field_is_copied_whole(gpu):
    one, _ = fitted(gpu, 2)
    back = copy.deepcopy(one).to("cpu")
    assert all(getattr(back, name).device.type == "cpu" for name in (*field._ALL, "background"))
    assert torch.equal(back.mean, one.mean.cpu())


def test_morton_order_on_the_gpu(gpu):
    points = torch.rand(2000, 3) * 64
    assert torch.equal(morton_order(points.to(gpu)).cpu(), morton_order(points))


@pytest.mark.parametrize("kind", ["xray", "rgb"])
def test_same_bits_of_pictures(gpu, deterministic, kind):
    first, second = (pictures(kind, problem(gpu, 20_000)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_projections_of_voxels(gpu):
    """As large as in practice: against the CPU, the transpose, and the same bits."""
    n = 96
    geometry = ConeBeam.circular(
        np.linspace(0, 6, 20),
        source_origin=3.0 * n,
        source_detector=4.5 * n,
        detector_shape=(n, n),
        pixel_size=1.6,
    )
    affine = np.eye(4)
    affine[:3, 3] = -(n - 1) / 2
    ours, theirs = (VoxelProjector(geometry, Grid((n, n, n), affine), name) for name in (str(gpu), "cpu"))
    rng = np.random.default_rng(0)
    volume = rng.random(ours.domain_shape, np.float32)
    data = rng.random(ours.range_shape, np.float32)
    forward, back = ours.apply(volume), ours.adjoint(data)
    np.testing.assert_allclose(forward, theirs.apply(volume), atol=1e-4 * forward.max())
    np.testing.assert_allclose(back, theirs.adjoint(data), atol=1e-4 * back.max())
    assert np.vdot(forward.astype(float), data) == pytest.approx(
        np.vdot(volume, back.astype(float)), rel=1e-5
    )
    np.testing.assert_array_equal(ours.apply(volume), forward)
    np.testing.assert_array_equal(ours.adjoint(data), back)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool):
    """Every kernel in both modes under NVIDIA's checker, with torch's memory pool off so that it sees each array."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        pytest.skip("compute-sanitizer is missing (it comes with the CUDA toolkit)")
    script = Path(__file__).parent / "cuda_host" / "on_gpu.py"
    command = [
        found,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--kernel-name-exclude",
        "kernel_substring=at::",
    ]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ok" in done.stdout
