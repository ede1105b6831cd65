"""What a reconstruction is worth against a known truth, and the demonstration on the sample data."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from napari_innergs import samples
from napari_innergs.data import SliceStack
from napari_innergs.fit.engine import Done, Event, Failed, Preview
from napari_innergs.fit.metrics import ssim
from napari_innergs.geometry.grid import Grid
from napari_innergs.io.write import ensure_writable, write_volume
from napari_innergs.operators.acquisition import SliceAcquisition
from napari_innergs.result import Reconstruction
from napari_innergs.tasks.slices import fit_slices

KEEP_EVERY = 4
# Planes of all candidates that are made at a time.
_PLANES = 8
_ZOOM = 3
_FILES = (
    "input.tif",
    "truth.tif",
    "volume.tif",
    "uncertainty.tif",
    "picture.png",
    "report.json",
    "report.md",
)


def compare(result: Reconstruction, stack: SliceStack, truth: SliceStack) -> dict[str, Any]:
    """Compare a reconstruction with slices that it has not seen.

    Parameters
    ----------
    result : Reconstruction
        Of `stack`.
    stack : SliceStack
        The slices that were given.
    truth : SliceStack
        Parallel slices in the same world. Those between the first and the last slice of `stack`, but not on one
        of them, are compared.

    Returns
    -------
    dict
        ``slices`` (how many), ``peak`` (range of the truth), ``psnr`` (dB) and ``ssim`` of the result, means
        over the channels, and ``candidates`` with the same two for each candidate, where the truth has the
        same pixels as the stack.

    Raises
    ------
    ValueError
        If the truth is not parallel, has other channels, or no slice to compare.
    """
    if truth.n_channels != stack.n_channels:
        raise ValueError(f"truth: it has {truth.n_channels} channel(s), the input has {stack.n_channels}")
    to_frame = np.linalg.inv(stack.frame_affine) @ truth.frame_affine
    if np.abs(to_frame[0, 1:3]).max() * max(truth.height, truth.width) > 1e-2 * stack.spacing:
        raise ValueError("truth: its slices are not parallel to the slices of the input")
    at = to_frame[0, 0] * truth.positions + to_frame[0, 3]
    gap = float(np.diff(stack.positions).min())
    off = np.abs(at[:, None] - stack.positions[None]).min(1) > 1e-3 * gap
    chosen = np.flatnonzero(off & (at > stack.positions[0]) & (at < stack.positions[-1]))
    if len(chosen) == 0:
        raise ValueError(
            "truth: none of its slices lies between slices of the input; compare the places of the two"
        )
    same_pixels = (truth.height, truth.width) == (stack.height, stack.width) and np.allclose(
        to_frame[1:3], [[0, 1, 0, 0], [0, 0, 1, 0]], atol=1e-3
    )
    # there when the job was told to keep them
    candidates = getattr(result._state, "candidates", None) if same_pixels else None
    names = [] if candidates is None else list(candidates.names)
    scores: dict[str, _Score] = {name: _Score(truth, chosen) for name in ["combined", *names]}
    for start in range(0, len(chosen), _PLANES):
        part = chosen[start : start + _PLANES]
        real = truth.data[part].astype(np.float32)
        scores["combined"].add(_planes_of(result, truth, part), real)
        if candidates is not None:
            for name, planes in zip(names, candidates.planes(at[part]), strict=True):
                scores[name].add(planes, real)
    out: dict[str, Any] = {"slices": len(chosen), "peak": [float(p) for p in scores["combined"].peak]}
    out |= scores.pop("combined").values()
    out["candidates"] = {name: score.values() for name, score in scores.items()}
    return out


class _Score:
    """Errors summed over planes, so that no volume has to be held for each candidate."""

    def __init__(self, truth: SliceStack, chosen: np.ndarray) -> None:
        data = truth.data[chosen]
        low, high = data.min((0, 1, 2)).astype(float), data.max((0, 1, 2)).astype(float)
        self.peak = np.where(high > low, high - low, 1.0)
        self.square, self.similar, self.pixels, self.planes = 0.0, 0.0, 0, 0

    def add(self, planes: np.ndarray, real: np.ndarray) -> None:
        """Take in planes (m, h, w, c)."""
        self.square = self.square + np.square(planes - real, dtype=np.float64).sum((0, 1, 2))
        for c, peak in enumerate(self.peak):
            value = ssim(planes[..., c], real[..., c], float(peak))
            self.similar += value * len(planes) / len(self.peak)
        self.pixels += int(np.prod(planes.shape[:3]))
        self.planes += len(planes)

    def values(self) -> dict[str, float]:
        """Return PSNR (dB) and SSIM."""
        share = np.maximum(self.square / self.pixels / self.peak**2, 1e-30)
        return {
            "psnr": round(float(np.mean(-10 * np.log10(share))), 3),
            "ssim": round(self.similar / self.planes, 4),
        }


def _planes_of(result: Reconstruction, truth: SliceStack, part: np.ndarray) -> np.ndarray:
    """Return the result at the pixels of some slices of the truth, (m, h, w, c): linear between voxels.

    Thick slices of the truth are compared with averages over their profile.
    """
    from scipy.ndimage import map_coordinates

    matrix = np.linalg.inv(result.grid.affine) @ truth.frame_affine
    volume = result.volume.reshape(*result.grid.shape, -1)
    if truth.thickness > 0 and result.report.get("stacks"):
        seen = SliceAcquisition(truth, result.grid)
        chosen = seen.part(result.grid, part, slice(0, truth.height), slice(0, truth.width))
        return np.stack([chosen.apply(volume[..., c]) for c in range(volume.shape[-1])], -1)
    row, column = np.mgrid[: truth.height, : truth.width]
    out = np.empty((len(part), truth.height, truth.width, volume.shape[-1]), np.float32)
    for m, t in enumerate(truth.positions[part]):
        where = [a[0] * t + a[1] * row + a[2] * column + a[3] for a in matrix[:3]]
        where = [np.where(np.abs(w - np.rint(w)) < 1e-3, np.rint(w), w) for w in where]
        for c in range(volume.shape[-1]):
            out[m, ..., c] = map_coordinates(volume[..., c], where, order=1, mode="nearest", prefilter=False)
    return out


def sample_problem(name: str = "brain") -> tuple[SliceStack, SliceStack]:
    """Return a shipped volume as the sparse stack of every 4th slice, and all of its slices."""
    sample = samples.volume(name)
    count = (len(sample.data) - 1) // KEEP_EVERY * KEEP_EVERY + 1
    truth = SliceStack(sample.data[:count], sample.affine, units=sample.unit, name=sample.title)
    return truth.keep_every(KEEP_EVERY), truth


def run(
    folder: Path, preset: str, device: str, watch: Callable[[Event], None] | None = None
) -> Iterator[Preview | Path]:
    """Reconstruct the sample and write what came of it; yields previews, and the folder when all is written."""
    ensure_writable(folder)
    stack, truth = sample_problem()
    result: Reconstruction | None = None
    for event in fit_slices(stack, None, preset, device=device, keep_candidates=True):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Preview):
            yield event
        if watch is not None:
            watch(event)
        if isinstance(event, Done):
            result = event.result
    assert result is not None
    scores = compare(result, stack, truth)
    result.report["truth"] = scores
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    affine = np.array(stack.frame_affine)
    affine[:3, 0] *= stack.spacing
    kept = Grid((stack.n_slices, stack.height, stack.width), affine, stack.units)
    write_volume(folder / "input.tif", stack.data[..., 0], kept)
    write_volume(folder / "truth.tif", truth.data[..., 0], result.grid)
    write_volume(folder / "volume.tif", stack.restore(result.volume), result.grid)
    if result.uncertainty is not None:
        write_volume(folder / "uncertainty.tif", result.uncertainty, result.grid)
    picture(result, stack, truth, scores).save(folder / "picture.png")
    (folder / "report.json").write_text(json.dumps(result.report, indent=1), encoding="utf-8")
    (folder / "report.md").write_text(_report(result, stack, truth, scores), encoding="utf-8")
    yield folder


def _best_conventional(scores: dict[str, Any]) -> str:
    plain = {k: v["psnr"] for k, v in scores["candidates"].items() if not k.startswith("gaussians")}
    return max(plain, key=plain.__getitem__)


def _report(result: Reconstruction, stack: SliceStack, truth: SliceStack, scores: dict[str, Any]) -> str:
    best = _best_conventional(scores)
    gain = scores["psnr"] - scores["candidates"][best]["psnr"]
    rows = sorted(scores["candidates"].items(), key=lambda item: item[1]["psnr"])
    shares = result.report["contributions"]
    lines = [
        f"# {truth.name}: {stack.n_slices} of {truth.n_slices} slices, the others reconstructed",
        "",
        f"Every {KEEP_EVERY}th slice was given; PSNR (peak = range of the truth, {scores['peak'][0]:g}) and SSIM "
        f"(mean over slices) are measured on the {scores['slices']} slices that were not.",
        "",
        "| | PSNR (dB) | SSIM | mean weight in the combination |",
        "|---|---|---|---|",
        *(f"| {n} | {v['psnr']:.2f} | {v['ssim']:.3f} | {shares.get(n, 0):.2f} |" for n, v in rows),
        f"| **combination (the result)** | **{scores['psnr']:.2f}** | **{scores['ssim']:.3f}** | |",
        "",
        f"Against the best conventional candidate ({best}): {gain:+.2f} dB. The weights were learned from the "
        "given slices alone; the truth was used only to measure.",
        "",
        f"{result.report['seconds']:.0f} s on {platform.machine()}, {result.report['device']['reason']}",
        "",
        "- `picture.png`: two cuts across the slices, with error maps on one scale",
        "- `volume.tif`: the result; `uncertainty.tif`: half-width of the 90 % band of the error",
        "- `input.tif`, `truth.tif`: what was given, and all slices",
        "- `report.json`: settings, versions, and the figures above",
        "",
        "Not for diagnosis.",
    ]
    return "\n".join(lines) + "\n"


def picture(
    result: Reconstruction, stack: SliceStack, truth: SliceStack, scores: dict[str, Any]
) -> Image.Image:
    """Draw two cuts across the slices: input, linear, best conventional, result, truth, and the error maps.

    Parameters
    ----------
    result, stack, truth
        Of `sample_problem`.
    scores : dict
        From `compare`.

    Returns
    -------
    PIL.Image.Image
        RGB.
    """
    candidates = result._state.candidates
    best = _best_conventional(scores)
    planes = candidates.planes(truth.positions)[..., 0]
    real = truth.data[..., 0].astype(np.float32)
    step = truth.n_slices // (stack.n_slices - 1)
    given = np.full(real.shape, np.nan, np.float32)
    given[::step] = real[::step]
    estimates = {
        "linear": planes[candidates.names.index("linear")],
        best: planes[candidates.names.index(best)],
        "result": result.volume,
    }
    window = float(real.min()), float(np.percentile(real, 99.8))
    limit = float(np.percentile(np.abs(estimates["linear"] - real), 99))
    titles = [
        ("input", f"{stack.n_slices} of {truth.n_slices} slices"),
        ("linear", _figures(scores["candidates"]["linear"])),
        (f"best conventional ({best})", _figures(scores["candidates"][best])),
        ("napari-innergs", _figures(scores)),
        ("truth", "all slices"),
    ]
    # cuts through the middle, up = superior
    cuts = [
        ("sagittal cut", lambda v: v[::-1, :, v.shape[2] // 2 - 8]),
        ("coronal cut", lambda v: v[::-1, v.shape[1] // 2, :]),
    ]
    rows: list[tuple[str, list[Image.Image | None]]] = []
    for label, cut in cuts:
        shown = [given, *estimates.values(), real]
        rows.append((label, [_grey(cut(v), window) for v in shown]))
        maps: list[Image.Image | None] = [None]
        maps += [_heat(np.abs(cut(v) - cut(real)), limit) for v in estimates.values()]
        maps.append(None if result.uncertainty is None else _heat(cut(result.uncertainty), limit))
        rows.append(("absolute error", maps))
    return _sheet(rows, titles, f"{truth.name}: every {KEEP_EVERY}th slice given", limit)


def _figures(score: dict[str, float]) -> str:
    return f"{score['psnr']:.2f} dB, SSIM {score['ssim']:.3f}"


def _zoomed(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat(np.repeat(image, _ZOOM, 0), _ZOOM, 1))


def _grey(image: np.ndarray, window: tuple[float, float]) -> Image.Image:
    """Grey levels in a window; what was not given is blue."""
    missing = np.isnan(image)
    level = np.clip((np.nan_to_num(image) - window[0]) / (window[1] - window[0]), 0, 1) * 255
    colour = np.repeat(level[..., None], 3, -1).astype(np.uint8)
    colour[missing] = (24, 32, 58)
    return _zoomed(colour)


# black, purple, red, orange, light yellow: even steps of lightness
_HEAT = np.array([(0, 0, 0), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])


def _heat(image: np.ndarray, limit: float) -> Image.Image:
    level = np.clip(image / limit, 0, 1) * (len(_HEAT) - 1)
    channels = [np.interp(level, np.arange(len(_HEAT)), _HEAT[:, c]) for c in range(3)]
    return _zoomed(np.stack(channels, -1).astype(np.uint8))


def _sheet(
    rows: list[tuple[str, list[Image.Image | None]]],
    titles: list[tuple[str, str]],
    heading: str,
    limit: float,
) -> Image.Image:
    gap, left, top = 10, 16, 96
    width = max(image.width for _, images in rows for image in images if image)
    heights = [max(image.height for image in images if image) for _, images in rows]
    size = (
        left + len(titles) * (width + gap) + 16 - gap,
        top + sum(heights) + gap * (len(rows) - 1) + 24,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    large, normal, small = (ImageFont.load_default(points) for points in (20, 16, 14))
    draw.text((left, 14), heading, fill="black", font=large)
    note = "PSNR and SSIM on the slices that were not given. Not for diagnosis."
    draw.text((left + draw.textlength(heading, font=large) + 24, 19), note, fill=(90, 90, 90), font=small)
    for column, (title, figures) in enumerate(titles):
        x = left + column * (width + gap)
        draw.text((x, 50), title, fill="black", font=normal)
        draw.text((x, 72), figures, fill=(70, 70, 70), font=small)
    y = top
    for (label, images), height in zip(rows, heights, strict=True):
        for column, image in enumerate(images):
            x = left + column * (width + gap)
            if image is not None:
                sheet.paste(image, (x, y))
                continue
            if column == 0:
                _legend(draw, sheet, (x, y), (width, height), limit, (normal, small))
        if label != "absolute error":
            _tag(draw, (left, y), label, small)
        elif images[-1] is not None:
            _tag(draw, (left + (len(titles) - 1) * (width + gap), y), "90 % band of the error", small)
        y += height + gap
    return sheet


def _tag(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, font: Any) -> None:
    x, y = corner
    draw.rectangle((x, y, x + draw.textlength(text, font=font) + 12, y + 22), fill="white")
    draw.text((x, y + 2), text, fill="black", font=font)


def _legend(
    draw: ImageDraw.ImageDraw,
    sheet: Image.Image,
    corner: tuple[int, int],
    size: tuple[int, int],
    limit: float,
    fonts: tuple[Any, Any],
) -> None:
    x, y = corner
    bar = np.linspace(0, limit, size[0] // _ZOOM - 8)[None].repeat(5, 0)
    draw.text((x, y + size[1] // 2 - 44), "absolute error, one scale for all", fill="black", font=fonts[0])
    image = _heat(bar, limit)
    sheet.paste(image, (x, y + size[1] // 2 - 16))
    draw.text((x, y + size[1] // 2 + 4), "0", fill="black", font=fonts[1])
    text = f"{limit:.0f} and more"
    end = x + image.width - draw.textlength(text, font=fonts[1])
    draw.text((end, y + size[1] // 2 + 4), text, fill="black", font=fonts[1])
    draw.text((x, y + size[1] // 2 + 30), "blue above: not given", fill=(70, 70, 70), font=fonts[1])
