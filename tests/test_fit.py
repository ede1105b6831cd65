import threading
import time

import numpy as np
import pytest
import torch
from conftest import GPU, HOST

from napari_innergs.config import SliceConfig
from napari_innergs.fit import combine, engine, field, metrics
from napari_innergs.operators.shear import Adam, sheared_gaussians


def textured(n=5, h=40, w=44, drift=2.0):
    """Blobs that drift by `drift` columns from slice to slice."""
    random = np.random.default_rng(1)
    y, x = np.ogrid[:h, :w]
    spots = random.uniform(5, 35, (12, 2))
    t = np.arange(n)
    planes = [sum(np.exp(-((y - r) ** 2 + (x - c - drift * j) ** 2) / 12) for r, c in spots) for j in t]
    return np.stack(planes)[..., None].astype(np.float32)


def constant_flow(values, drift):
    flow = np.zeros((*values.shape[1:3], 2), np.float32)
    flow[..., 0] = drift
    return [(flow, -flow)] * (len(values) - 1)


def test_field_fits_slices_and_follows_the_shear():
    values = textured()
    positions = np.arange(5.0)
    truth = textured(9, drift=1.0)[1::2]
    scores = {}
    for name, flows in (("sheared", constant_flow(values, 2.0)), ("upright", None)):
        one = field.start_field(values, positions, flows, spacing=2.0, through=0.7)
        losses = [loss for _, loss in field.fit_field(one, values, positions, 30)]
        assert losses[-1] < 0.02 * losses[0]
        between = np.moveaxis(one.render(positions[:-1] + 0.5, (40, 44)).numpy(), 1, -1)
        scores[name] = metrics.psnr(between, truth)
    assert scores["sheared"] > scores["upright"] + 6


def test_additive_field_starts_near_and_fits():
    values = textured()
    positions = np.arange(5.0)
    one = field.start_field(values, positions, None, spacing=2.0, through=0.7, normalised=False)
    for _ in field.fit_field(one, values, positions, 30):
        pass
    picture = np.moveaxis(one.render(positions, (40, 44)).numpy(), 1, -1)
    assert metrics.psnr(picture, values) > 30
    assert float(one.background.abs().max()) == 0


def test_centres_stay_on_their_slice_and_shear_stays():
    values = textured()
    one = field.start_field(values, np.arange(5.0), constant_flow(values, 2.0), spacing=3.0, through=0.7)
    before = one.shear.sum().item(), one.log_through.sum().item()
    for _ in field.fit_field(one, values, np.arange(5.0), 5):
        pass
    assert set(one.mean[:, 0].tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert one.shear.sum().item() == pytest.approx(before[0], rel=1e-5)
    assert one.log_through.sum().item() == pytest.approx(before[1], rel=1e-5)
    for _ in field.fit_field(one, values, np.arange(5.0), 5, free_shape=True):
        pass
    assert one.shear.sum().item() != pytest.approx(before[0], rel=1e-5)


def test_densify_adds_where_the_residual_is():
    values = textured()
    values[2, 10:12, 30:32] += 3
    one = field.start_field(values, np.arange(5.0), None, spacing=5.0, through=0.7)
    count = len(one)
    for _ in field.fit_field(one, values, np.arange(5.0), 30, densify=True):
        pass
    near = (one.mean[:, 0] == 2) & (one.mean[:, 1] - 10.5).abs().lt(3) & (one.mean[:, 2] - 30.5).abs().lt(3)
    assert len(one) > count
    assert near.sum() >= 2
    assert all(len(getattr(one, name)) == len(one) for name in field._ALL)


def test_pixels_without_trust_do_not_count():
    values = textured()
    spoiled = values.copy()
    spoiled[2, 10:20, 20:30] = 3
    trust = np.ones(values.shape[:3], np.float32)
    trust[2, 10:20, 20:30] = 0
    errors = []
    for weights in (trust, None):
        one = field.start_field(values, np.arange(5.0), None, spacing=2.0, through=0.7)
        for _ in field.fit_field(one, spoiled, np.arange(5.0), 20, weights=weights):
            pass
        picture = np.moveaxis(one.render([2.0], (40, 44)).numpy(), 1, -1)[0]
        errors.append(np.abs(picture - values[2])[10:20, 20:30].mean())
    assert errors[0] < 0.2 < 1 < errors[1]


def shear_inputs(dtype=torch.float64, n=7, c=3):
    random = torch.Generator().manual_seed(0)
    shapes = [(n, 2), (n,), (n, 3), (n, c), (n,)]
    return [torch.randn(*s, generator=random, dtype=torch.float64).mul(0.6).to(dtype) for s in shapes]


def test_sheared_gaussians_against_finite_differences():
    inputs = [x.requires_grad_() for x in shear_inputs()]
    assert torch.autograd.gradcheck(lambda *x: sheared_gaussians(*x, backend="reference"), inputs)


@pytest.mark.parametrize("fast", ["cpu", HOST[0], GPU[0]])
def test_sheared_gaussians_backends_agree(fast, use_backend):
    use_backend(fast)
    results = []
    for backend, dtype in (("reference", torch.float64), (fast, torch.float32)):
        inputs = [x.requires_grad_() for x in shear_inputs(dtype)]
        covs, channels = sheared_gaussians(*inputs, backend=backend)
        ramp = torch.arange(covs.numel(), dtype=dtype).reshape(covs.shape) / 10
        ((covs * ramp).sum() + channels.square().sum()).backward()
        results.append([covs.detach(), channels.detach(), *(x.grad for x in inputs)])
    for truth, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast.double(), truth, rtol=1e-4, atol=1e-4)


def test_schur_complement_is_the_in_plane_covariance():
    inputs = shear_inputs()
    covs, _ = sheared_gaussians(*inputs, backend="reference")
    matrix = covs[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(-1, 3, 3)
    schur = matrix[:, 1:, 1:] - matrix[:, 1:, :1] @ matrix[:, :1, 1:] / matrix[:, :1, :1]
    factor = torch.zeros(7, 2, 2, dtype=torch.float64)
    factor[:, 0, 0], factor[:, 1, 0], factor[:, 1, 1] = (
        inputs[2][:, 0].exp(),
        inputs[2][:, 1],
        inputs[2][:, 2].exp(),
    )
    torch.testing.assert_close(schur, factor @ factor.mT)
    torch.testing.assert_close(matrix[:, 1:, 0] / matrix[:, :1, 0], inputs[0])


@pytest.mark.parametrize("backend", ["cpu", "reference", HOST[0], GPU[0]])
def test_adam_is_torch_adam(backend, use_backend):
    use_backend(backend)
    start = torch.linspace(-2, 2, 9)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    fused = Adam(backend=backend)
    oracle = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99), eps=1e-12)
    for _ in range(6):
        for value in (ours, theirs):
            value.grad = None
            (value**2 + value).sum().backward()
        oracle.step()
        fused.step({"x": ours}, {"x": 0.1})
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-4, atol=1e-5)


def test_least_error_weights():
    independent = combine.least_error_weights(np.diag([1.0, 4.0]), ridge=0)
    np.testing.assert_allclose(independent, [0.8, 0.2], atol=1e-6)
    # a strongly correlated, worse candidate would get a negative weight: it gets none
    np.testing.assert_allclose(combine.least_error_weights(np.array([[1, 1.9], [1.9, 4.0]]), ridge=0), [1, 0])


def fake_candidates(seed=0, m=6, spoilt=0):
    random = np.random.default_rng(seed)
    truth = random.uniform(0, 1, (m, 40, 40, 1)).astype(np.float32)
    sizes = [0.05, 0.05, 0.2]
    planes = np.stack([truth + random.normal(0, s, truth.shape).astype(np.float32) for s in sizes])
    return ["linear", "flow-dis", "nearest"], planes, truth


def test_combiner_beats_every_candidate_and_knows_its_error():
    names, planes, truth = fake_candidates()
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    combiner = combine.learn(names, planes, truth, one, zero)
    assert combiner.rms["combined"] < 0.8 * min(combiner.rms[name] for name in names)
    _, fresh, answer = fake_candidates(seed=5)
    estimate, band = combiner.apply(fresh)
    assert metrics.psnr(estimate, answer) > max(metrics.psnr(p, answer) for p in fresh) + 2
    assert 0.8 < np.mean(np.abs(estimate - answer) <= band) < 0.97
    assert sum(combiner.mean_weights().values()) == pytest.approx(1)


def test_combiner_modes_and_trust():
    names, planes, truth = fake_candidates()
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    assert combine.learn(names, planes, truth, one, zero, mode="average").mean_weights()[
        "nearest"
    ] == pytest.approx(1 / 3)
    best = combine.learn(names, planes, truth, one, zero, mode="best").mean_weights()
    assert sorted(best.values()) == pytest.approx([0, 0, 1])
    spoilt = planes.copy()
    spoilt[0, :, :20] += 9
    trust = np.ones(truth.shape[:3], np.float32)
    trust[:, :20] = 0
    weights = combine.learn(names, spoilt, truth, one, zero, trust).mean_weights()
    assert weights["linear"] > 0.3
    assert combine.learn(names, spoilt, truth, one, zero).mean_weights()["linear"] < 0.1


def test_prior_for_two_slices():
    weights = combine.prior_weights(["nearest", "linear", "flow-dis", "flow-tvl1", "gaussians-normalised"])
    assert weights.sum() == pytest.approx(1)
    assert weights[0] == 0
    assert weights[2] == weights[3]
    assert combine.unlearned(["nearest"], 2, "learned").weights.shape == (1, 2, 1)


def test_metrics():
    truth = np.random.default_rng(0).uniform(0, 2, (3, 20, 20)).astype(np.float32)
    truth[0, 0, :2] = 0, 2
    assert metrics.psnr(truth + 0.02, truth) == pytest.approx(40, abs=0.01)
    assert metrics.psnr(truth, truth) == np.inf
    from skimage.metrics import structural_similarity

    noisy = truth + np.random.default_rng(1).normal(0, 0.2, truth.shape).astype(np.float32)
    options = {"data_range": 2.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    theirs = np.mean([structural_similarity(a, b, **options) for a, b in zip(noisy, truth, strict=True)])
    assert metrics.ssim(noisy, truth, 2.0) == pytest.approx(theirs, abs=0.01)


def test_background_runs_in_order_and_stops_when_closed():
    progress = engine.Progress()
    progress.enter("work", 0.5)
    work = engine.background((lambda i=i: i * i for i in range(20)), progress, total=20)
    try:
        while True:
            next(work)
    except StopIteration as end:
        assert end.value == [i * i for i in range(20)]
    ran = []

    def slow(i):
        time.sleep(0.15)
        ran.append(i)

    steps = engine.background((lambda i=i: slow(i) for i in range(50)), progress, total=50, workers=2)
    step = next(steps)
    assert step.phase == "work" and 0 <= step.fraction <= 0.5
    started = time.perf_counter()
    steps.close()
    assert time.perf_counter() - started < 0.1
    time.sleep(0.4)
    assert len(ran) < 6


def test_background_pauses_with_its_consumer():
    ran = []
    steps = engine.background(
        (lambda i=i: (time.sleep(0.05), ran.append(i)) for i in range(100)), engine.Progress(), workers=2
    )
    next(steps)
    time.sleep(0.3)
    count = len(ran)
    time.sleep(0.3)
    assert len(ran) == count
    steps.close()


def test_background_passes_errors_on():
    def fail():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        for _ in engine.background([fail], engine.Progress()):
            pass
    assert threading.active_count() < 30


def test_config():
    assert SliceConfig.coerce(None) == SliceConfig.preset("balanced") == SliceConfig.coerce("balanced")
    assert SliceConfig.coerce({"preset": "fast", "iterations": 3}).iterations == 3
    with pytest.raises(ValueError, match=r"no preset 'quick'.*balanced"):
        SliceConfig.coerce("quick")
    with pytest.raises(ValueError, match="no preset 'quick'"):
        SliceConfig.coerce({"preset": "quick"})
    with pytest.raises(ValueError, match="config: iterations = -1"):
        SliceConfig.coerce({"iterations": -1})
    with pytest.raises(ValueError, match="no setting 'iteration'"):
        SliceConfig.coerce({"iteration": 1})
    with pytest.raises(TypeError, match="got int"):
        SliceConfig.coerce(3)


def test_config_files(tmp_path):
    settings = SliceConfig.preset("best")
    settings.to_yaml(tmp_path / "a.yaml")
    assert SliceConfig.from_yaml(tmp_path / "a.yaml") == settings
    (tmp_path / "off.yaml").write_text("preset: fast\ndenoise: off")
    assert SliceConfig.from_yaml(tmp_path / "off.yaml").denoise == "off"
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="expected a mapping"):
        SliceConfig.from_yaml(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="not YAML"):
        SliceConfig.from_yaml(tmp_path / "c.yaml")


def test_a_single_candidate_has_a_band():
    random = np.random.default_rng(0)
    truth = random.random((6, 40, 40, 1)).astype(np.float32)
    planes = truth[None] + random.normal(0, 0.1, (1, *truth.shape)).astype(np.float32)
    combiner = combine.learn(["linear"], planes, truth, np.ones(1, np.float32), np.zeros(1, np.float32))
    estimate, band = combiner.apply(planes)
    assert 0.85 < np.mean(np.abs(estimate - truth) <= band) < 0.95
