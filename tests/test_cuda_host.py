"""The CUDA kernels on the CPU: what the shared suites do not reach, sanitizers, and faults that must be found."""

import platform
import shutil
import subprocess

import numpy as np
import pytest
import torch
from cuda_host import engine

from napari_innergs.cuda import _module, _planes, slices, voxels
from napari_innergs.fit import field
from napari_innergs.operators.slices import render_slices

SANITIZERS = {
    # undefined behaviour rides along: both follow fibers made with ucontext
    "memory": (
        "-DHOST_UCONTEXT",
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize-recover=all",
    ),
    "threads": ("-DHOST_THREADS", "-fsanitize=thread", "-pthread"),
    "none": (),
}


def built(name, sanitizer, channels=2, change=("", ""), more=("xray", "rgb", "project")):
    """Return the program made of kernels, with some text of them changed, and the C++ file called ``name``."""
    if name == "check":
        sources = ("prepare", "planes", "shear", *more)
        text = "".join(_module.source(one) for one in sources)
        assert change[0] in text
        text = text.replace(*change) if change[0] else text
    else:
        text = f'#line 1 "faults.cu"\n{(engine.HERE / "faults.cu").read_text()}'
    text += f'#line 1 "{name}.cpp"\n{(engine.HERE / f"{name}.cpp").read_text()}'
    flags = ("-O1", *engine.defines(channels), *SANITIZERS[sanitizer])
    return engine.build(text, flags, f"{name}-{sanitizer}")


def run(path, *words):
    command = [str(path), *words]
    # the thread sanitizer can not lay out its memory where addresses are very random
    if "threads" in path.name and shutil.which("setarch"):
        command = ["setarch", platform.machine(), "-R", *command]
    settings = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120)


@pytest.mark.parametrize(("sanitizer", "channels"), [("memory", 1), ("memory", 4), ("threads", 2)])
def test_sanitizers_find_nothing_in_the_kernels(sanitizer, channels):
    done = run(built("check", sanitizer, channels))
    # the address sanitizer always says this about fibers
    said = [x for x in done.stderr.splitlines() if "fully support makecontext/swapcontext" not in x]
    assert (done.returncode, done.stdout, said) == (0, "ok\n", [])


@pytest.mark.parametrize(
    ("right", "wrong", "sanitizer", "said", "file"),
    [
        ("x1 = greatest_index(centre + half, width)", "x1 = greatest_index(centre + half, width + 1)", "memory",
         "heap-buffer-overflow", "planes.cu"),
        ("        __syncthreads();\n        const int filled", "        const int filled", "threads", "data race",
         "planes.cu"),
        ("if (y >= height || x >= width) return;\n", "", "memory", "heap-buffer-overflow", "planes.cu"),
        ("y1 = greatest_index(s.ey + s.hy, height);", "y1 = greatest_index(s.ey + s.hy, height + 1);", "memory",
         "heap-buffer-overflow", "xray.cu"),
        ("const bool inside = at.y < height && at.x < width;", "const bool inside = true;", "memory",
         "heap-buffer-overflow", "rgb.cu"),
        ("i1 = i + 1 < size_p", "i1 = i < size_p", "memory", "heap-buffer-overflow", "project.cu"),
    ],
)  # fmt: skip
def test_sanitizers_find_faults_planted_in_the_kernels(right, wrong, sanitizer, said, file):
    more = {"xray.cu": ("xray",), "rgb.cu": ("rgb",), "project.cu": ("project",)}.get(file, ())
    path = built("check", sanitizer, change=(right, wrong), more=more)
    done = run(path)
    assert done.returncode != 0
    assert said in done.stderr and file in done.stderr


@pytest.mark.parametrize(
    ("fault", "sanitizer", "said"),
    [
        ("out_of_bounds", "memory", "heap-buffer-overflow"),
        ("overflow", "memory", "signed integer overflow"),
        ("missing_barrier", "threads", "data race"),
        ("divergent_barrier", "none", "divergent barrier"),
        ("divergent_shuffle", "none", "divergent barrier or warp operation"),
    ],
)
def test_planted_faults_are_found(fault, sanitizer, said):
    path = built("faults", sanitizer)
    assert run(path, fault, "0").stdout == "ok\n"
    done = run(path, fault, "1")
    assert done.returncode != 0
    assert said in done.stderr
    assert "faults.cu" in done.stderr or "line" in done.stderr


def test_a_divergent_barrier_is_an_error_in_python(monkeypatch):
    text = (engine.HERE / "faults.cu").read_text()
    monkeypatch.setattr(_module, "source", lambda name: text)
    monkeypatch.setattr(_module, "signatures", _module.signatures.__wrapped__)
    engine.library.cache_clear()
    values, out = torch.ones(63), torch.zeros(63)
    device = torch.device("cpu")
    try:
        engine.launch("faults", "divergent_barrier", 64, (values, 63, 0, out), device=device, block=64)
        assert torch.equal(values, out)
        with pytest.raises(engine.HostError, match="40 threads wait, 24 have ended"):
            engine.launch("faults", "divergent_barrier", 64, (values, 63, 1, out), device=device, block=64)
    finally:
        engine.library.cache_clear()


def test_arguments_are_checked_against_the_kernel():
    good = torch.zeros(4), torch.zeros(4), torch.zeros(4), torch.zeros(4), 0.9, 0.99, 0.1, 1e-12, 4
    values = _module.convert("shear", "adam", good)
    assert [type(x) for x in values] == [np.uint64] * 4 + [np.float32] * 4 + [np.int64]
    for place, wrong, match in (
        (0, torch.zeros(4, dtype=torch.float64), "contiguous tensor of torch.float32"),
        (1, torch.zeros(8)[::2], "contiguous"),
        (2, 1.0, "contiguous tensor"),
        (8, 4.5, "count must be int64"),
        (8, torch.tensor(4), "count must be int64"),
    ):
        with pytest.raises(TypeError, match=match):
            _module.convert("shear", "adam", (*good[:place], wrong, *good[place + 1 :]))
    with pytest.raises(TypeError, match="takes 9 arguments, not 8"):
        _module.convert("shear", "adam", good[:-1])
    with pytest.raises(OverflowError):
        _module.convert("prepare", "count_tiles", (*good[:2], 0, 2**31, 1, 1, 1.0, 1, torch.zeros(1).long()))


def test_lines_of_errors_are_those_of_the_files():
    for name in _module.SOURCES:
        path = _module.resources.files("napari_innergs.cuda") / "kernels" / f"{name}.cu"
        lines = path.read_text().splitlines()
        line, file = 0, None
        for text in _module.source(name).splitlines():
            if text.startswith("#line"):
                line, file = int(text.split()[1]), text.split('"')[1]
                continue
            if file == f"{name}.cu" and text:
                assert lines[line - 1] == text
            line += 1


def problem(channels=2, n=60):
    g = torch.Generator().manual_seed(1)
    means = torch.rand(n, 3, generator=g) * 40
    covs = torch.tensor([4.0, 1.0, 0.5, 6.0, -1.0, 5.0]).repeat(n, 1)
    return means, covs, torch.randn(n, channels, generator=g)


def test_offsets_beyond_32_bits(monkeypatch):
    monkeypatch.setattr(_module, "launch", engine.launch)
    means, covs, amps = problem()
    prepared = _planes.prepare(means, covs, amps, torch.tensor([5.0]), 40, 40, 9.0)
    right = _planes.forward(prepared, 1)[0, 1].numpy()
    # The second channel is written alone, from an address so far below it that only a 64-bit product reaches it.
    far = 2**32 + 64
    out = np.zeros((40, 40), np.float32)
    arguments = (prepared.records, amps, 2, 1, prepared.t, 40, 40, 9.0, len(means), torch.zeros(1), 0, far)
    values = [x.item() for x in _module.convert("planes", "splat", arguments)]
    values[9] = out.ctypes.data - 4 * far
    assert engine.library("planes", 1).host_splat(-(-len(means) * 32 // 128), 128, *values) is None
    np.testing.assert_array_equal(out, right)


def test_long_lists_are_done_in_parts(monkeypatch):
    monkeypatch.setattr(_module, "launch", engine.launch)
    means, covs, amps = problem()
    t = torch.arange(0.0, 40, 3)
    whole, _ = slices.forward(means, covs, amps, t, 40, 33, 16.3)
    monkeypatch.setattr(_module, "_deterministic", True)
    tiled, _ = slices.forward(means, covs, amps, t, 40, 33, 16.3)
    monkeypatch.setattr(_planes, "MAX_ENTRIES", 40)
    parts, _ = slices.forward(means, covs, amps, t, 40, 33, 16.3)
    assert torch.equal(tiled, parts)
    torch.testing.assert_close(whole, tiled, atol=1e-5, rtol=0)
    volume, _ = voxels.forward(means, covs, amps, (5, 40, 33), 16.3, 3)
    same, _ = slices.forward(means, covs, amps, torch.arange(3.0, 8), 40, 33, 16.3)
    assert torch.equal(volume, same.transpose(0, 1))


def test_torchs_own_setting_is_followed():
    assert not _module.is_deterministic()
    torch.use_deterministic_algorithms(True)
    try:
        assert _module.is_deterministic()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", ["host", "host-deterministic"])
def test_a_fit_is_that_of_the_cpu(mode, use_backend):
    use_backend(mode)
    y, x = np.mgrid[:20, :26]
    values = np.stack([np.exp(-((y - 9) ** 2 + (x - 8 - 2 * j) ** 2) / 18) for j in range(3)])
    values = values[..., None].astype(np.float32)
    fields, losses = [], []
    for backend in ("cpu", mode):
        one = field.start_field(values, np.arange(3.0), None, spacing=3.0, through=0.7)
        steps = field.fit_field(
            one, values, np.arange(3.0), 12, densify=True, structural=0.2, backend=backend
        )
        losses.append([loss for _, loss in steps])
        fields.append(one)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert losses[0][-1] < 0.5 * losses[0][0]
    pictures = [one.render([0.0, 0.5], (20, 26)) for one in fields]
    torch.testing.assert_close(pictures[1], pictures[0], atol=1e-3, rtol=0)


def test_a_field_moves():
    values = np.ones((2, 8, 8, 1), np.float32)
    one = field.start_field(values, np.arange(2.0), None, spacing=4.0, through=0.7)
    assert one.to("auto") is one
    there = one.to("cpu")
    assert torch.equal(there.mean, one.mean) and there.background.device.type == "cpu" and there.normalised


def test_memory_error_says_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise torch.cuda.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has more words."
        )

    monkeypatch.setattr(_planes, "prepare", fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (5, 8_000_000_000))
    with pytest.raises(MemoryError, match=r"20.00 GiB more .* 5 of 8,000,000,000 bytes .*'cpu'"):
        slices.forward(*problem(), torch.zeros(1), 4, 4, 9.0)


def test_the_kernels_are_found_by_the_operators(use_backend):
    use_backend("host")
    image = render_slices(*problem(), [5.0], (9, 9), backend="host")
    assert image.abs().max() > 0.01
