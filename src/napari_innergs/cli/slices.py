"""``innergs slices``: volumes of stacks of slices."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from napari_innergs.cli._options import (
    Config,
    Device,
    FileFormat,
    Format,
    Json,
    Output,
    Settings,
    VolumeOnly,
    argument,
    check_format,
    check_keep_every,
    merged,
    numbers,
    option,
)
from napari_innergs.cli._results import Results, keep_input
from napari_innergs.cli._run import (
    BAD_INPUT,
    Interrupted,
    Progress,
    Run,
    complain,
    print_json,
    print_lines,
    print_result,
    sentence,
)

if TYPE_CHECKING:
    from napari_innergs.config import SliceConfig
    from napari_innergs.data import SliceStack
    from napari_innergs.result import Reconstruction


class PixelType(StrEnum):
    """Type of the written voxels."""

    input = "input"
    float32 = "float32"


@dataclass
class _Choices:
    """What holds for all inputs of one call."""

    config: SliceConfig
    reading: dict[str, Any]
    # axis, thickness and profile of each stack
    profiles: list[dict[str, Any]]
    keep_every: int
    voxel: float | None
    suffix: str
    restore: bool
    truth: Path | None
    volume_only: bool
    device: str
    seed: int


def slices(
    output: Output,
    inputs: Annotated[
        list[Path] | None,
        argument(
            "Stacks: TIFF, NIfTI, OME-Zarr, NPZ, a DICOM folder; or a folder of them. A volume for each.",
            "INPUT",
        ),
    ] = None,
    stack: Annotated[
        list[Path] | None,
        option(
            "Instead of INPUT: one of several stacks of the same object, in any directions; repeat it for "
            "each. One volume is made of all."
        ),
    ] = None,
    thickness: Annotated[
        list[str] | None,
        option(
            "Width of a slice in world units: full width of a box, FWHM of a Gaussian. One for all, or one "
            "for each --stack (repeated, or separated by commas). Default: thin slices."
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        option("gaussian (default) or box: how a slice weighs what lies across it. As --thickness."),
    ] = None,
    motion: Annotated[
        str | None,
        option(
            "off (default), stack or slice: estimate rigid motion between stacks, or of each slice; the "
            "transforms go to transforms.json."
        ),
    ] = None,
    preset: Annotated[str | None, option("fast, balanced (default), best or innergs-paper.")] = None,
    config: Config = None,
    settings: Settings = None,
    spacing: Annotated[
        str | None, option("Spacing instead of the file's: z,y,x or one number for all.")
    ] = None,
    axis: Annotated[
        list[str] | None,
        option(
            "Array axis that counts the slices: 0 (z), 1 (y) or 2 (x). Default: 0, and for NIfTI the one "
            "with the largest spacing. For all, or one for each --stack."
        ),
    ] = None,
    keep_every: Annotated[
        int, typer.Option(help="Keep every k-th slice only, and compare with the others.")
    ] = 1,
    voxel: Annotated[float | None, option("Edge of the cubic voxels. Default: about the pixel size.")] = None,
    file_format: FileFormat = Format.tif,
    dtype: Annotated[
        PixelType, typer.Option(help="input: the type of the input, rounded and clipped.")
    ] = PixelType.input,
    truth: Annotated[Path | None, option("All slices, to compare the result with.")] = None,
    key: Annotated[str, typer.Option(help="Name of the array in NPZ files.")] = "data",
    series: Annotated[str | None, option("DICOM series: UID or number.")] = None,
    volume_only: VolumeOnly = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the noise that learning from noisy stacks adds.")] = 0,
    as_json: Json = False,
) -> int:
    """Reconstruct dense volumes from sparse stacks of slices.

    Several inputs, or a folder of stacks, go to a subfolder each; a stack that can not be read is reported and
    the others go on. A time series gives one volume for each time point, each started from the one before.
    Stacks of one object in several directions are given with --stack and make one volume.

    \b
    Example:
      innergs slices head.nii.gz --output out
      innergs slices stacks/ -o out --preset fast --set iterations=20 --format nii.gz
      innergs slices all.tif -o try --keep-every 4
      innergs slices thick.nii.gz -o out --thickness 5 --profile box
      innergs slices --stack axial.nii.gz --stack coronal.nii.gz --stack sagittal.nii.gz \\
        --thickness 4 --motion slice -o out
    """
    if motion is not None:
        settings = [*(settings or ()), f"motion={motion}"]
    chosen, reading = read_settings(preset, config, settings), {"spacing": numbers(spacing)}
    check_keep_every(keep_every)
    if stack:
        if inputs:
            raise ValueError(f"--stack: got the input {str(inputs[0])!r} as well; need all stacks as --stack")
        if len(stack) > 1 and (keep_every > 1 or truth is not None):
            name = "--truth" if truth is not None else "--keep-every"
            raise ValueError(f"{name}: it compares one stack with its own slices, got {len(stack)} stacks")
        jobs, several = [(tuple(stack), output)], False
    elif inputs:
        found, several = find_jobs(inputs, output)
        jobs = [((path,), folder) for path, folder in found]
    else:
        raise ValueError("INPUT: there is none; name a stack, or several of one object with --stack")
    choices = _Choices(
        config=chosen,
        reading={**reading, "key": key, "series": series},
        profiles=_profiles(len(stack or (1,)), axis, thickness, profile),
        keep_every=keep_every,
        voxel=voxel,
        suffix=file_format.value,
        restore=dtype is PixelType.input,
        truth=truth,
        volume_only=volume_only,
        device=device,
        seed=seed,
    )
    if truth is not None and several:
        raise ValueError(f"--truth: one truth was given for {len(jobs)} stacks; call once for each")
    check_format(file_format.value)
    from napari_innergs.io.write import ensure_writable

    for paths, folder in jobs:
        ensure_writable(folder)
        for path in paths:
            keep_input(path, folder)
    reports: list[dict[str, Any]] = []
    failures = 0
    progress = Progress(sys.stderr)
    try:
        for number, (paths, folder) in enumerate(jobs):
            path = paths[0]
            title = " + ".join(one.name for one in paths)
            progress.title = f"[{number + 1}/{len(jobs)}] {title}" if several else title
            try:
                for report in _reconstruct(paths, folder, choices, progress):
                    reports.append(report)
                    if not as_json:
                        _say(report)
            except Exception as error:
                if not several or os.environ.get("INNERGS_DEBUG"):
                    raise
                kind = "" if isinstance(error, BAD_INPUT) else f"{type(error).__name__}: "
                complain(f"{path}: {kind}{sentence(error)}")
                reports.append({"input": {"path": str(path)}, "error": sentence(error)})
                failures += 1
    except Interrupted as error:
        reports.append(error.args[0])
        if as_json:
            print_json(reports if several else reports[-1])
        raise
    if as_json:
        print_json(reports if several or len(reports) > 1 else reports[0])
    if failures:
        complain(f"{failures} of {len(jobs)} inputs failed")
    return 2 if failures else 0


def read_settings(preset: str | None, path: Path | None, pairs: Sequence[str] | None) -> SliceConfig:
    """Merge a preset, a YAML file and single settings; later ones win."""
    from napari_innergs.config import SliceConfig

    return SliceConfig.coerce(merged(SliceConfig, preset, path, pairs))


def _profiles(
    count: int, axis: list[str] | None, thickness: list[str] | None, profile: list[str] | None
) -> list[dict[str, Any]]:
    """Return keywords for reading each of so many stacks."""
    out: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, texts, kind in (
        ("axis", axis, int),
        ("thickness", thickness, float),
        ("profile", profile, str),
    ):
        parts = [part.strip() for text in texts or () for part in text.split(",")]
        if not parts:
            continue
        if len(parts) not in (1, count):
            raise ValueError(
                f"--{name}: got {len(parts)} values for {count} stack(s), need one, or one for each"
            )
        for keywords, part in zip(out, parts * count if len(parts) == 1 else parts, strict=True):
            try:
                keywords[name] = kind(part)
            except ValueError:
                what = "0, 1 or 2" if name == "axis" else "a number"
                raise ValueError(f"--{name}: got {part!r}, need {what}") from None
    return out


def find_jobs(inputs: Sequence[Path], output: Path) -> tuple[list[tuple[Path, Path]], bool]:
    """List stacks and the folders of their results; also whether there may be several."""
    found: list[Path] = []
    several = len(inputs) > 1
    for path in inputs:
        if path.is_dir() and not _is_one_stack(path):
            inside = [child for child in sorted(path.iterdir()) if _may_be_stack(child)]
            if not inside:
                raise ValueError(f"path: there is no stack in the folder {str(path)!r}")
            found += inside
            several = True
        else:
            found.append(path)
    if not several:
        return [(found[0], output)], False
    from napari_innergs.io.files import suffix_of

    jobs: list[tuple[Path, Path]] = []
    taken: set[str] = set()
    for path in found:
        stem = path.name[: -len(suffix_of(path)) or None] or path.resolve().name
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name)
        jobs.append((path, output / name))
    return jobs, True


def _is_one_stack(folder: Path) -> bool:
    """Tell an OME-Zarr image or a folder with DICOM files from a folder of stacks."""
    from napari_innergs.io.dicom import is_dicom
    from napari_innergs.io.files import suffix_of
    from napari_innergs.io.ome_zarr import is_zarr

    if is_zarr(folder) or suffix_of(folder) in (".zarr", ".ome.zarr"):
        return True
    return any(child.is_file() and is_dicom(child) for child in sorted(folder.iterdir()))


def _may_be_stack(path: Path) -> bool:
    from napari_innergs.io.files import suffix_of
    from napari_innergs.io.read import SUFFIXES

    if path.name.startswith("."):
        return False
    return _is_one_stack(path) if path.is_dir() else suffix_of(path) in SUFFIXES


def _reconstruct(
    paths: Sequence[Path], folder: Path, choices: _Choices, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Reconstruct the time points of one stack or several, write them, and yield their reports."""
    from napari_innergs.geometry.grid import Grid
    from napari_innergs.io.read import count_times, read_times
    from napari_innergs.tasks.slices import fit_slices

    opening = {name: choices.reading[name] for name in ("key", "series")}
    path = paths[0]
    times = [count_times(one, **opening) for one in paths]
    if len(set(times)) > 1:
        counts = ", ".join(f"{str(one)!r} has {n}" for one, n in zip(paths, times, strict=True))
        raise ValueError(f"--stack: the stacks differ in their time points: {counts}; need the same")
    series = times[0] > 1
    own = choices.profiles
    truths = None
    if choices.truth is not None:
        axis = {name: value for name, value in own[0].items() if name == "axis"}
        truths = read_times(choices.truth, **choices.reading, **axis)
    previous: Reconstruction | None = None
    readers = [
        read_times(one, **choices.reading, **keywords) for one, keywords in zip(paths, own, strict=True)
    ]
    for time_point, wholes in enumerate(zip(*readers, strict=True)):
        place = folder / f"t{time_point:03d}" if series else folder
        whole = wholes[0]
        stack = whole.keep_every(choices.keep_every) if choices.keep_every > 1 else whole
        stacks = (stack, *wholes[1:])
        known = whole if choices.keep_every > 1 else None
        if choices.restore and choices.suffix == "tif" and stack.dtype in ("int64", "uint64"):
            raise ValueError(
                f"--format: tif can not hold {stack.dtype}, the type of the input; need --dtype float32, "
                "or another format, such as npz"
            )
        if truths is not None:
            known = next(truths, None)
            if known is None:
                raise ValueError(f"--truth: {choices.truth} has fewer time points than {path}")
        grid = None if choices.voxel is None else Grid.isotropic(choices.voxel, around=stacks)
        if series:
            progress.suffix = f" t{time_point}"
        facts = {
            "task": "slices",
            "input": {"name": stack.name, "shape": list(stack.data.shape), "dtype": str(stack.dtype)},
            "config": choices.config.model_dump(mode="json"),
            "seed": choices.seed,
        }
        run = Run(progress, partial(_save, stack=stack, folder=place, choices=choices), facts)
        with run.guarded():
            run.result = run.follow(
                fit_slices(
                    stack if len(stacks) == 1 else stacks,
                    grid,
                    choices.config,
                    device=choices.device,
                    seed=choices.seed,
                    warm_start=previous if len(stacks) == 1 else None,
                    keep_candidates=known is not None,
                )
            )
            assert run.result is not None
            if known is not None:
                from napari_innergs._demo import compare

                progress.clear()
                run.result.report["truth"] = compare(run.result, stack, known)
        yield run.save(run.result)
        previous = run.result if series else None


def _save(result: Reconstruction, stack: SliceStack, folder: Path, choices: _Choices) -> dict[str, Any]:
    """Write a result and return its report."""
    names = stack.channel_names
    out = Results(folder, choices.suffix, result)
    out.volume("volume", stack.restore(result.volume) if choices.restore else result.volume, names)
    if not choices.volume_only:
        out.volume("uncertainty", result.uncertainty, names)
        out.volume("distance", result.distance)
        out.gaussians("model.npz", result.model)
        if (out.report.get("motion") or {}).get("transforms"):
            out.json("transforms.json", _transforms(out.report, stack), indent=1)
    return out.finish()


def _transforms(report: dict[str, Any], stack: SliceStack) -> dict[str, Any]:
    """Return the motion of slices in a form that other programs can read."""
    motion = report["motion"]
    names = [one["name"] for one in report["stacks"]]
    return {
        "format": 1,
        "axes": "world z, y, x; 4 x 4 matrices that map where a slice was said to be to where it was taken",
        "units": stack.units,
        **{name: value for name, value in motion.items() if name != "transforms"},
        "stacks": [
            {"name": name, "transforms": matrices}
            for name, matrices in zip(names, motion["transforms"], strict=True)
        ],
    }


def _say(report: dict[str, Any]) -> None:
    """Print what a person wants to know of a result."""
    print_result(report, f", {report['n_gaussians']} Gaussians")
    if len(report.get("stacks") or ()) > 1:
        shares = (f"{one['name']} {one['shape'][0]} slices" for one in report["stacks"])
        print(f"  from {', '.join(shares)}")
    print_lines(report.get("warnings"))
    if report.get("psnr_heldout") is not None:
        baseline = report.get("baseline")
        against = f"; {baseline} alone {report['baseline_psnr_heldout']:.2f} dB" if baseline else ""
        # thick slices: single pixels, or thinner slices at half the resolution
        what = "what was held out" if "stacks" in report else "slices left out"
        print(f"  {what} for learning: {report['psnr_heldout']:.2f} dB{against}")
    if "truth" in report:
        found = report["truth"]
        print(
            f"  truth, {found['slices']} slices not given: {found['psnr']:.2f} dB, SSIM {found['ssim']:.3f}"
        )
        for name, score in sorted(found["candidates"].items(), key=lambda item: -item[1]["psnr"]):
            print(f"    {name}: {score['psnr']:.2f} dB, SSIM {score['ssim']:.3f}")
