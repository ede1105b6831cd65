"""The command line: ``innergs slices | projections | dual | voxelise | demo | bench | info``.

Exit status: 0; 2 for bad input, with one line on the standard error; 130 when interrupted, after the best state
so far has been saved. Heavy modules are imported by the command that needs them: ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, get_args, get_origin

import typer

if TYPE_CHECKING:
    from napari_innergs.config import SliceConfig
    from napari_innergs.config_projections import ProjectionConfig
    from napari_innergs.data import SliceStack
    from napari_innergs.fit.engine import Event, Preview
    from napari_innergs.result import Reconstruction
    from napari_innergs.scan import Scan

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)

# the same classes whether typer brings its own click or uses the package
_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]
_BAD_INPUT = (ValueError, TypeError, OSError, MemoryError)
# names, without ending, of what a folder of results holds
_OURS = ("volume", "uncertainty", "distance", "model", "transforms", "report", "hu", "tv", "geometry")
_EXTRAS = {"medical": ("nibabel", "pydicom"), "zarr": ("zarr", "ngff_zarr"), "napari": ("napari",)}


class Format(StrEnum):
    """Endings that a volume can be written with."""

    tif = "tif"
    nifti = "nii.gz"
    zarr = "zarr"
    npz = "npz"


class PixelType(StrEnum):
    """Type of the written voxels."""

    input = "input"
    float32 = "float32"


Json = Annotated[bool, typer.Option("--json", help="Print the report to the standard output as JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


class Interrupted(Exception):
    """Ctrl-C was pressed; what there was has been saved and said."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: those of the process.

    Returns
    -------
    int
        0, 1 (a defect of the program, with a traceback), 2 (bad input) or 130 (interrupted).

    Examples
    --------
    >>> main(["voxelise", "nothing.ply", "--spacing", "1", "--output", "x.tif"])
    2
    """
    if not os.environ.get("INNERGS_DEBUG"):
        # libraries warn about files in several lines; what matters is an error of ours
        warnings.simplefilter("ignore")
    try:
        status = app(args=arguments, prog_name="innergs", standalone_mode=False)
    except _USAGE_ERROR as error:
        _complain(error.format_message())
        return 2
    except Interrupted:
        return 130
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except _BAD_INPUT as error:
        if os.environ.get("INNERGS_DEBUG"):
            raise
        _complain(_sentence(error))
        return 2
    if status == 130:
        # some versions of typer turn the interruption into this status themselves
        _complain("interrupted; there was nothing to save yet")
    return status if isinstance(status, int) else 0


def run() -> None:
    """Run a command and leave the process: what ``innergs`` starts."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 130:
        # threads of the engine finish what they are at before Python ends, which may take long
        os._exit(status)
    sys.exit(status)


def _complain(text: str) -> None:
    print(f"innergs: {' '.join(text.split())}", file=sys.stderr)


def _sentence(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"there is not enough memory: {error or 'take a smaller input or a coarser grid'}"
    return str(error) or type(error).__name__


@app.callback()
def _callback() -> None:
    """Dense volumes from sparse image slices. Not for diagnosis."""


@app.command()
def slices(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the results.", show_default=False)
    ],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="INPUT",
            help="Stacks: TIFF, NIfTI, OME-Zarr, NPZ, a DICOM folder; or a folder of them. A volume for each.",
            show_default=False,
        ),
    ] = None,
    stack: Annotated[
        list[Path] | None,
        typer.Option(
            help="Instead of INPUT: one of several stacks of the same object, in any directions; repeat it for "
            "each. One volume is made of all.",
            show_default=False,
        ),
    ] = None,
    thickness: Annotated[
        list[str] | None,
        typer.Option(
            help="Width of a slice in world units: full width of a box, FWHM of a Gaussian. One for all, or one "
            "for each --stack (repeated, or separated by commas). Default: thin slices.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="gaussian (default) or box: how a slice weighs what lies across it. As --thickness.",
            show_default=False,
        ),
    ] = None,
    motion: Annotated[
        str | None,
        typer.Option(
            help="off (default), stack or slice: estimate rigid motion between stacks, or of each slice; the "
            "transforms go to transforms.json.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="fast, balanced (default), best or innergs-paper.", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting, as key=value; may be repeated.", show_default=False),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(help="Spacing instead of the file's: z,y,x or one number for all.", show_default=False),
    ] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="Array axis that counts the slices: 0 (z), 1 (y) or 2 (x). Default: 0, and for NIfTI the one "
            "with the largest spacing. For all, or one for each --stack.",
            show_default=False,
        ),
    ] = None,
    keep_every: Annotated[
        int, typer.Option(help="Keep every k-th slice only, and compare with the others.")
    ] = 1,
    voxel: Annotated[
        float | None,
        typer.Option(help="Edge of the cubic voxels. Default: about the pixel size.", show_default=False),
    ] = None,
    file_format: Annotated[Format, typer.Option("--format", help="Format of the volumes.")] = Format.tif,
    dtype: Annotated[
        PixelType, typer.Option(help="input: the type of the input, rounded and clipped.")
    ] = PixelType.input,
    truth: Annotated[
        Path | None, typer.Option(help="All slices, to compare the result with.", show_default=False)
    ] = None,
    key: Annotated[str, typer.Option(help="Name of the array in NPZ files.")] = "data",
    series: Annotated[
        str | None, typer.Option(help="DICOM series: UID or number.", show_default=False)
    ] = None,
    volume_only: Annotated[
        bool, typer.Option("--volume-only", help="Write the volume and the report, nothing else.")
    ] = False,
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
    given = settings or []
    options = _Options(
        config=_settings(preset, config, given if motion is None else [*given, f"motion={motion}"]),
        reading={"spacing": _numbers(spacing), "key": key, "series": series},
        keep_every=keep_every,
        voxel=voxel,
        suffix=file_format.value,
        restore=dtype is PixelType.input,
        truth=truth,
        volume_only=volume_only,
        device=device,
        seed=seed,
    )
    if keep_every < 1:
        raise ValueError(f"--keep-every: got {keep_every}, need 1 or more")
    if stack:
        if inputs:
            raise ValueError(f"--stack: got the input {str(inputs[0])!r} as well; need all stacks as --stack")
        if len(stack) > 1 and (keep_every > 1 or truth is not None):
            option = "--truth" if truth is not None else "--keep-every"
            raise ValueError(f"{option}: it compares one stack with its own slices, got {len(stack)} stacks")
        jobs, several = [(tuple(stack), output)], False
    elif inputs:
        found, several = _find_jobs(inputs, output)
        jobs = [((path,), folder) for path, folder in found]
    else:
        raise ValueError("INPUT: there is none; name a stack, or several of one object with --stack")
    options.profiles = _profiles(len(stack or (1,)), axis, thickness, profile)
    if truth is not None and several:
        raise ValueError(f"--truth: one truth was given for {len(jobs)} stacks; call once for each")
    _check_format(file_format.value)
    from napari_innergs.io.write import ensure_writable

    for paths, folder in jobs:
        ensure_writable(folder)
        for path in paths:
            if (
                path.exists()
                and path.resolve().parent == folder.resolve()
                and path.name.split(".")[0] in _OURS
            ):
                raise ValueError(f"--output: {str(path)!r} would be overwritten; need another folder")
    reports: list[dict[str, Any]] = []
    failures = 0
    progress = _Progress(sys.stderr)
    try:
        for number, (paths, folder) in enumerate(jobs):
            path = paths[0]
            title = " + ".join(one.name for one in paths)
            progress.title = f"[{number + 1}/{len(jobs)}] {title}" if several else title
            try:
                for report in _reconstruct(paths, folder, options, progress):
                    reports.append(report)
                    if not as_json:
                        _say(report)
            except Exception as error:
                progress.clear()
                if not several or os.environ.get("INNERGS_DEBUG"):
                    raise
                kind = "" if isinstance(error, _BAD_INPUT) else f"{type(error).__name__}: "
                _complain(f"{path}: {kind}{_sentence(error)}")
                reports.append({"input": {"path": str(path)}, "error": _sentence(error)})
                failures += 1
    except Interrupted as error:
        reports.append(error.args[0])
        if as_json:
            _print_json(reports if several else reports[-1])
        raise
    if as_json:
        _print_json(reports if several or len(reports) > 1 else reports[0])
    if failures:
        _complain(f"{failures} of {len(jobs)} inputs failed")
    return 2 if failures else 0


class _Options:
    """What holds for all inputs of one call."""

    def __init__(self, **values: Any) -> None:
        self.config: SliceConfig = values["config"]
        self.reading: dict[str, Any] = values["reading"]
        # axis, thickness and profile of each stack
        self.profiles: list[dict[str, Any]] = [{}]
        self.keep_every: int = values["keep_every"]
        self.voxel: float | None = values["voxel"]
        self.suffix: str = values["suffix"]
        self.restore: bool = values["restore"]
        self.truth: Path | None = values["truth"]
        self.volume_only: bool = values["volume_only"]
        self.device: str = values["device"]
        self.seed: int = values["seed"]


def _settings(preset: str | None, path: Path | None, pairs: Sequence[str]) -> SliceConfig:
    """Merge a preset, a YAML file and single settings; later ones win."""
    from napari_innergs.config import SliceConfig

    return SliceConfig.coerce(_merged(SliceConfig, preset, path, pairs))


def _projection_settings(preset: str | None, path: Path | None, pairs: Sequence[str]) -> ProjectionConfig:
    """Do the same for projections."""
    from napari_innergs.config_projections import ProjectionConfig

    values = _merged(ProjectionConfig, preset, path, pairs)
    for name, value in values.items():
        field = ProjectionConfig.model_fields.get(name)
        if value == "" and field is not None and type(None) in get_args(field.annotation):
            values[name] = None
    return ProjectionConfig.coerce(values)


def _merged(model: Any, preset: str | None, path: Path | None, pairs: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise ValueError(f"--config: there is no file {str(path)!r}")
        values = _yaml(path)
    if preset is not None:
        values["preset"] = preset
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set: got {pair!r}, need key=value")
        field = model.model_fields.get(key.strip())
        if field is None:
            known = ", ".join(model.model_fields)
            raise ValueError(f"--set: there is no setting {key.strip()!r}; use one of {known}")
        values[key.strip()] = _parts(text) if get_origin(field.annotation) is tuple else text.strip()
    return values


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config: {path} holds {type(content).__name__}, need a mapping of settings")
    return {str(key): value for key, value in content.items()}


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.strip(" ()[]").split(",") if part.strip())


def _numbers(text: str | None) -> float | tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3):
        raise ValueError(f"--spacing: got {text!r}, need one number, or three as z,y,x")
    return numbers[0] if len(numbers) == 1 else numbers


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


def _check_format(suffix: str) -> None:
    """Find out before the work whether the libraries of a format are there."""
    needs = {"nii.gz": ("nibabel", "medical"), "zarr": ("zarr", "zarr")}
    if suffix in needs and importlib.util.find_spec(needs[suffix][0]) is None:
        library, extra = needs[suffix]
        raise ValueError(
            f"--format: {suffix} needs {library}, which is not installed: pip install 'napari-innergs[{extra}]'"
        )


def _find_jobs(inputs: Sequence[Path], output: Path) -> tuple[list[tuple[Path, Path]], bool]:
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
    paths: Sequence[Path], folder: Path, options: _Options, progress: _Progress
) -> Iterator[dict[str, Any]]:
    """Reconstruct the time points of one stack or several, write them, and yield their reports."""
    from napari_innergs.fit.engine import Done, Failed, Preview
    from napari_innergs.geometry.grid import Grid
    from napari_innergs.io.read import count_times, read_times
    from napari_innergs.tasks.slices import fit_slices

    opening = {name: options.reading[name] for name in ("key", "series")}
    path = paths[0]
    times = [count_times(one, **opening) for one in paths]
    if len(set(times)) > 1:
        counts = ", ".join(f"{str(one)!r} has {n}" for one, n in zip(paths, times, strict=True))
        raise ValueError(f"--stack: the stacks differ in their time points: {counts}; need the same")
    series = times[0] > 1
    own = options.profiles
    truths = (
        None if options.truth is None else read_times(options.truth, **options.reading, **_only_axis(own[0]))
    )
    previous: Reconstruction | None = None
    readers = [
        read_times(one, **options.reading, **keywords) for one, keywords in zip(paths, own, strict=True)
    ]
    for time_point, wholes in enumerate(zip(*readers, strict=True)):
        place = folder / f"t{time_point:03d}" if series else folder
        whole = wholes[0]
        stack = whole.keep_every(options.keep_every) if options.keep_every > 1 else whole
        stacks = (stack, *wholes[1:])
        known = whole if options.keep_every > 1 else None
        if options.restore and options.suffix == "tif" and stack.dtype in ("int64", "uint64"):
            raise ValueError(
                f"--format: tif can not hold {stack.dtype}, the type of the input; need --dtype float32, "
                "or another format, such as npz"
            )
        if truths is not None:
            known = next(truths, None)
            if known is None:
                raise ValueError(f"--truth: {options.truth} has fewer time points than {path}")
        grid = None if options.voxel is None else Grid.isotropic(options.voxel, around=stacks)
        if series:
            progress.suffix = f" t{time_point}"
        last: Preview | None = None
        result: Reconstruction | None = None
        try:
            events = fit_slices(
                stack if len(stacks) == 1 else stacks,
                grid,
                options.config,
                device=options.device,
                seed=options.seed,
                warm_start=previous if len(stacks) == 1 else None,
                keep_candidates=known is not None,
            )
            for event in events:
                if isinstance(event, Preview):
                    last = event
                elif isinstance(event, Done):
                    result = event.result
                elif isinstance(event, Failed):
                    raise event.error
                progress.show(event)
            assert result is not None
            progress.clear()
            if known is not None:
                from napari_innergs._demo import compare

                result.report["truth"] = compare(result, stack, known)
        except KeyboardInterrupt:
            progress.clear()
            if result is None and last is None:
                raise
            raise Interrupted(_save_interrupted(last, result, stack, place, options)) from None
        yield _save(result, stack, place, options)
        previous = result if series else None


def _only_axis(keywords: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if name == "axis"}


def _save(result: Reconstruction, stack: SliceStack, folder: Path, options: _Options) -> dict[str, Any]:
    """Write a result; the report last, so that a folder that has one is complete."""
    from napari_innergs.io.write import ensure_writable, write_volume
    from napari_innergs.result import Reconstruction

    ensure_writable(folder)
    _remove_earlier(folder)
    names = stack.channel_names
    volume = stack.restore(result.volume) if options.restore else result.volume
    report = {**result.report, "files": {}}
    target = folder / f"volume.{options.suffix}"
    write_volume(target, volume, result.grid, channel_names=names)
    report["files"]["volume"] = str(target)
    if not options.volume_only:
        for name, channels in (("uncertainty", names), ("distance", None)):
            values = getattr(result, name)
            if values is not None:
                target = folder / f"{name}.{options.suffix}"
                write_volume(target, values, result.grid, channel_names=channels)
                report["files"][name] = str(target)
        if result.model is not None:
            result.model.save(folder / "model.npz")
            report["files"]["model"] = str(folder / "model.npz")
        motion = report.get("motion") or {}
        if motion.get("transforms"):
            target = folder / "transforms.json"
            _write_text(target, json.dumps(_transforms(report, stack), indent=1))
            report["files"]["transforms"] = str(target)
    content = {"format": 1, "transform": None, "report": report}
    assert isinstance(result, Reconstruction)
    _write_text(folder / "report.json", json.dumps(content, indent=1))
    return report


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


def _remove_earlier(folder: Path) -> None:
    """Remove the files that an earlier report in the folder lists: nothing of it may stay beside a new one."""
    path = folder / "report.json"
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["report"]["files"].items()
        names = [Path(str(file)).name for key, file in listed if Path(str(file)).name.startswith(f"{key}.")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    path.unlink()
    for name in names:
        old = folder / name
        if old.is_dir() and (old / "zarr.json").is_file():
            shutil.rmtree(old)
        elif old.is_file():
            old.unlink()


def _save_interrupted(
    last: Preview | None,
    result: Reconstruction | None,
    stack: SliceStack,
    folder: Path,
    options: _Options,
) -> dict[str, Any]:
    """Write the last preview, which the engine keeps up to date, and say where it is."""
    from napari_innergs.result import Reconstruction
    from napari_innergs.tasks.versions import versions

    state = "complete" if result is not None else f"preview: {last.label}" if last is not None else ""
    if result is None:
        assert last is not None
        result = Reconstruction(last.volume, last.grid)
        result.report.update(
            task="slices",
            input={"name": stack.name, "shape": list(stack.data.shape), "dtype": str(stack.dtype)},
            config=options.config.model_dump(mode="json"),
            seed=options.seed,
            versions=versions(),
        )
    result.report.update(interrupted=True, state=state)
    report = _save(result, stack, folder, options)
    _complain(f"interrupted; the best state so far ({state}) is saved in {report['files']['volume']}")
    return report


def _write_text(path: Path, text: str) -> None:
    from napari_innergs.io.write import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _say(report: dict[str, Any]) -> None:
    """Print what a person wants to know of a result."""
    print(report["files"]["volume"])
    size = " x ".join(str(n) for n in report["grid"]["shape"])
    print(f"  {size} voxels, {report['n_gaussians']} Gaussians, {report['seconds']:.1f} s")
    if len(report.get("stacks") or ()) > 1:
        shares = (f"{one['name']} {one['shape'][0]} slices" for one in report["stacks"])
        print(f"  from {', '.join(shares)}")
    for warning in report.get("warnings") or ():
        print(f"  {warning}")
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


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1))


class _Progress:
    """One line on a terminal that is written again and again; nothing where there is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.live = stream.isatty()
        self.title = self.suffix = ""
        self._shown = self._last = 0.0
        self._started = time.monotonic()
        self._width = 0

    def show(self, event: Event) -> None:
        """Show a step, at most ten times a second."""
        fraction = getattr(event, "fraction", None)
        if not self.live or fraction is None:
            return
        now = time.monotonic()
        if fraction < self._last:
            self._started = now
        self._last = fraction
        if now - self._shown < 0.1:
            return
        self._shown = now
        passed = now - self._started
        left = f", {passed * (1 - fraction) / fraction:.0f} s left" if fraction > 0.05 and passed > 3 else ""
        try:
            columns = os.get_terminal_size(self.stream.fileno()).columns or 80
        except OSError:
            columns = 80
        phase = getattr(event, "phase", "")
        text = f"{self.title}{self.suffix}  {100 * fraction:3.0f} %  {phase}  {passed:.0f} s{left}"
        text = text[: columns - 1]
        self.stream.write("\r" + text.ljust(self._width))
        self.stream.flush()
        self._width = len(text)

    def clear(self) -> None:
        """Take the line away."""
        if self.live and self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self.stream.flush()
            self._width = 0


@app.command()
def projections(
    scan: Annotated[
        Path,
        typer.Argument(
            help="Scan: JSON + NPZ, R2-Gaussian or NAF, Nikon .xtekct, DXchange HDF5, RTK XML; or TIFF images, NPY "
            "or NPZ with --geometry.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the results.", show_default=False)
    ],
    array: Annotated[
        str | None,
        typer.Option(
            help="Which of the file's arrays are the projections. Default: the usual one.", show_default=False
        ),
    ] = None,
    geometry: Annotated[
        Path | None,
        typer.Option(
            help="JSON file that describes the scan, instead of what the scan file says: DSO, DSD, dDetector, "
            "angles_rad and so on, or vectors.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--projections", help="For RTK XML: the projections, TIFF or NPY.", show_default=False),
    ] = None,
    pixel_size: Annotated[
        float | None,
        typer.Option(help="For RTK XML: distance between pixel centres.", show_default=False),
    ] = None,
    i0: Annotated[
        float | None,
        typer.Option(
            help="Counts of the blank scan: the projections are counts. Default: line integrals, or as the file "
            "says.",
            show_default=False,
        ),
    ] = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Let the angles run the other way, before all else.")
    ] = False,
    centre: Annotated[
        bool,
        typer.Option(
            "--find-centre", help="Find the column on which the rotation axis is seen, and move the panel."
        ),
    ] = False,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Find offset and roll of the panel, and angle and shift of each view, from all projections first.",
        ),
    ] = False,
    keep_every: Annotated[int, typer.Option(help="Keep every k-th view only, and predict the others.")] = 1,
    voxel: Annotated[
        float | None,
        typer.Option(
            help="Edge of the cubic voxels. Default: the file's grid, or the pixel size over the magnification.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="fast, balanced (default), best or r2-paper.", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting, as key=value; may be repeated.", show_default=False),
    ] = None,
    hounsfield: Annotated[
        bool, typer.Option("--hu", help="Also write the volume in Hounsfield units (hu).")
    ] = False,
    water: Annotated[
        float | None,
        typer.Option(
            help="For --hu: attenuation of water per unit of length. Default: 0.0206 per mm, right for about 60 keV.",
            show_default=False,
        ),
    ] = None,
    tv: Annotated[
        bool, typer.Option("--tv", help="Also write the volume of the total variation alone (tv).")
    ] = False,
    file_format: Annotated[Format, typer.Option("--format", help="Format of the volumes.")] = Format.tif,
    volume_only: Annotated[
        bool, typer.Option("--volume-only", help="Write the volume and the report, nothing else.")
    ] = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the places of the Gaussians and the order of the views.")] = 0,
    as_json: Json = False,
) -> int:
    """Reconstruct a volume of attenuation from X-ray projections.

    Values are attenuation per unit of length (1/mm where the scan is in mm). The geometry is checked on every
    run; --reverse, --find-centre and --refine correct it, in this order, and write geometry.json for --geometry.

    \b
    Example:
      innergs projections scan.json --output out
      innergs projections scan.json --output out --find-centre --refine --hu
      innergs projections scan.json -o out --array counts --i0 100000 --preset fast
      innergs projections images/ -o out --geometry scan.json --keep-every 2 --json
    """
    from napari_innergs.fit.engine import Done, Failed, Preview
    from napari_innergs.io.write import ensure_writable

    chosen = _projection_settings(preset, config, settings or [])
    if keep_every < 1:
        raise ValueError(f"--keep-every: got {keep_every}, need 1 or more")
    _check_format(file_format.value)
    if scan.resolve().parent == output.resolve() and scan.name.split(".")[0] in _OURS:
        raise ValueError(f"--output: {str(scan)!r} would be overwritten; need another folder")
    whole = _read_projections(scan, array, geometry, images, pixel_size, i0)
    if water is not None and not hounsfield:
        raise ValueError(f"--water: got {water:g} without --hu; give both")
    if hounsfield:
        from napari_innergs.layers.xray import water_attenuation

        water = water_attenuation(whole.geometry.units, water)
    if keep_every > 1 and len(range(0, whole.n_views, keep_every)) == whole.n_views:
        raise ValueError(
            f"--keep-every: got {keep_every} for {whole.n_views} view(s), no view would be left out"
        )
    grid = whole.grid if voxel is None else _coarser(whole, voxel)
    ensure_writable(output)
    # imports torch: not before the input is known to be good
    from napari_innergs.tasks.scan_checks import fit_checked

    progress = _Progress(sys.stderr)
    progress.title = scan.name
    last: Preview | None = None
    result: Reconstruction | None = None
    extra = _Extra(water)
    try:
        whole = _corrected(whole, grid, reverse, centre, refine, extra, progress)
        kept = whole if keep_every == 1 else whole.subset(slice(None, None, keep_every))
        if voxel is not None:
            grid = _coarser(kept, voxel)
        for event in fit_checked(kept, grid, chosen, device=device, seed=seed):
            if isinstance(event, Preview):
                last = event
            elif isinstance(event, Done):
                result = event.result.result
                extra.tv = event.result.tv if tv else None
            elif isinstance(event, Failed):
                raise event.error
            progress.show(event)
        assert result is not None
        if tv and extra.tv is None:
            result.report["warnings"].append("These settings make no volume of total variation (--tv).")
        if keep_every > 1:
            result.report["views_left_out"] = _left_out(result, whole, keep_every)
    except KeyboardInterrupt:
        if result is None and last is None:
            raise
        state = "complete" if result is not None else f"preview: {last.label}" if last is not None else ""
        if result is None:
            from napari_innergs.result import Reconstruction as Partial
            from napari_innergs.tasks.versions import versions

            assert last is not None
            facts = {"config": chosen.model_dump(mode="json"), "seed": seed, "versions": versions()}
            result = Partial(last.volume, last.grid, report={"task": "projections", **facts})
        result.report.update(interrupted=True, state=state)
        report = _save_projections(result, output, file_format.value, volume_only, extra)
        progress.clear()
        _complain(f"interrupted; the best state so far ({state}) is saved in {report['files']['volume']}")
        if as_json:
            _print_json(report)
        raise Interrupted(report) from None
    finally:
        progress.clear()
    report = _save_projections(result, output, file_format.value, volume_only, extra)
    if as_json:
        _print_json(report)
    else:
        _say_projections(report)
    return 0


class _Extra:
    """What is written beside a reconstruction on request."""

    def __init__(self, water: float | None) -> None:
        self.water = water
        self.tv: Any = None
        # corrections of the geometry, and what they made of it
        self.corrections: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.geometry: dict[str, Any] | None = None


def _corrected(
    scan: Scan, grid: Any, reverse: bool, centre: bool, refine: bool, extra: _Extra, progress: _Progress
) -> Scan:
    """Correct the geometry of a scan as asked, and note what was done."""
    from napari_innergs.fit.engine import Done
    from napari_innergs.tasks import scan_checks

    if not (reverse or centre or refine):
        return scan
    if reverse:
        scan = scan.with_geometry(scan_checks.reverse_rotation(scan.geometry))
        extra.corrections.append({"kind": "reversed rotation"})
        extra.said.append("The rotation was reversed.")
    if centre:
        found = scan_checks.find_centre(scan)
        scan = scan.with_geometry(found.corrected(scan.geometry))
        fact = {"kind": "rotation centre", "column": found.column, "shift": found.shift}
        extra.corrections.append(fact)
        extra.said.append(scan_checks.describe_centre(found))
    if refine:
        # the geometry of a view is its own, so those that are left out later need it too
        for event in scan_checks.refine_steps(scan, grid):
            progress.show(event)
            if isinstance(event, Done):
                extra.said.append(scan_checks.describe_refinement(event.result))
                if scan_checks.improves(event.result):
                    scan = scan.with_geometry(event.result.geometry)
                    extra.corrections.append({"kind": "refined geometry", **event.result.summary()})
    extra.geometry = scan_checks.geometry_description(scan.geometry, scan.grid)
    return scan


def _read_projections(
    path: Path,
    array: str | None,
    geometry: Path | None,
    images: Path | None,
    pixel_size: float | None,
    i0: float | None,
) -> Scan:
    """Read a scan; a description in another file replaces its own."""
    from napari_innergs.io.scans import read_scan

    description: Any = None
    if geometry is not None:
        if not geometry.is_file():
            raise ValueError(f"--geometry: there is no file {str(geometry)!r}")
        try:
            description = json.loads(geometry.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise ValueError(f"--geometry: {str(geometry)!r} is not JSON") from None
        if not isinstance(description, dict):
            raise ValueError(f"--geometry: {str(geometry)!r} holds no JSON object that describes a scan")
    return read_scan(path, array, geometry=description, projections=images, pixel_size=pixel_size, i0=i0)


def _coarser(scan: Scan, voxel: float) -> Any:
    """Return a grid with voxels of another size in the same place: the scan's own, or what the panel sees."""
    import numpy as np

    from napari_innergs.geometry.grid import Grid

    if not (np.isfinite(voxel) and voxel > 0):
        raise ValueError(f"--voxel: got {voxel}, need a positive length")
    if scan.grid is None:
        return scan.geometry.default_grid(spacing=voxel)
    own = scan.grid
    shape = np.maximum(np.round(own.spacing * own.shape / voxel), 1).astype(int)
    affine = np.array(own.affine)
    affine[:3, :3] *= voxel / own.spacing
    middle = own.index_to_world(0.5 * (np.array(own.shape) - 1))
    affine[:3, 3] = middle - affine[:3, :3] @ (0.5 * (shape - 1))
    return Grid(shape.tolist(), affine, own.units)


def _left_out(result: Reconstruction, whole: Scan, keep_every: int) -> dict[str, Any]:
    """Compare the views that were not given with those the volume predicts."""
    import numpy as np

    from napari_innergs.baselines.preprocess import scan_line_integrals
    from napari_innergs.operators.project import VoxelProjector

    others = whole.subset(np.arange(whole.n_views) % keep_every != 0)
    measured = scan_line_integrals(others).projections
    error = VoxelProjector(others.geometry, result.grid).apply(result.volume) - measured
    rms, signal = (float(np.sqrt(np.mean(np.square(part, dtype=np.float64)))) for part in (error, measured))
    return {"views": others.n_views, "rms": float(f"{rms:.6g}"), "signal_rms": float(f"{signal:.6g}")}


def _save_projections(
    result: Reconstruction, folder: Path, suffix: str, volume_only: bool, extra: _Extra
) -> dict[str, Any]:
    """Write a result; the report last, so that a folder that has one is complete."""
    from napari_innergs.io.write import ensure_writable, write_volume
    from napari_innergs.layers.xray import to_hounsfield

    ensure_writable(folder)
    _remove_earlier(folder)
    unit = result.grid.units
    report: dict[str, Any] = {**result.report, "unit": f"1/{unit[0] if unit else 'pixel'}", "files": {}}
    if extra.water is not None:
        report["hounsfield"] = {"water": extra.water}
    if extra.said:
        report["corrections"] = extra.corrections
        report["said"] = extra.said
    volumes = {
        "volume": result.volume,
        "uncertainty": None if volume_only else result.uncertainty,
        "hu": None if extra.water is None else to_hounsfield(result.volume, extra.water),
        "tv": extra.tv,
    }
    for name, values in volumes.items():
        if values is not None:
            target = folder / f"{name}.{suffix}"
            write_volume(target, values, result.grid)
            report["files"][name] = str(target)
    if result.model is not None and not volume_only:
        result.model.save(folder / "model.npz")
        report["files"]["model"] = str(folder / "model.npz")
    if extra.geometry is not None:
        _write_text(folder / "geometry.json", json.dumps(extra.geometry))
        report["files"]["geometry"] = str(folder / "geometry.json")
    content = {"format": 1, "transform": None, "report": report}
    _write_text(folder / "report.json", json.dumps(content, indent=1))
    return report


def _say_projections(report: dict[str, Any]) -> None:
    """Print what a person wants to know of a result."""
    print(report["files"]["volume"])
    size = " x ".join(str(n) for n in report["grid"]["shape"])
    views = report["scan"]["shape"][0]
    print(f"  {size} voxels from {views} views, {report['n_gaussians']} Gaussians, {report['seconds']:.1f} s")
    for sentence in report.get("said") or ():
        print(f"  {sentence}")
    for warning in report.get("warnings") or ():
        print(f"  {warning}")
    residuals = report.get("residual_rms") or {}
    if residuals:
        print(
            "  weighted residuals of the line integrals: "
            + ", ".join(f"{k} {v:.4g}" for k, v in residuals.items())
        )
    if "views_left_out" in report:
        found = report["views_left_out"]
        share = 100 * found["rms"] / (found["signal_rms"] or 1)
        print(
            f"  {found['views']} views not given: predicted to {found['rms']:.4g} RMS, {share:.1f} % of theirs"
        )


@app.command()
def dual(
    xrays: Annotated[
        Path,
        typer.Argument(
            help="Scan, as for projections; with --volume a volume: TIFF, NIfTI, DICOM, OME-Zarr, NPZ.",
            show_default=False,
        ),
    ],
    photographs: Annotated[
        Path,
        typer.Argument(
            help="Cameras: folder of a COLMAP model, or transforms.json; photographs beside it.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the results.", show_default=False)
    ],
    is_volume: Annotated[
        bool, typer.Option("--volume", help="The X-rays are a volume already, not projections.")
    ] = False,
    array: Annotated[
        str | None,
        typer.Option(
            help="Which of the scan file's arrays are the projections. Default: the usual one.",
            show_default=False,
        ),
    ] = None,
    geometry: Annotated[
        Path | None,
        typer.Option(help="JSON file that describes the scan, as for projections.", show_default=False),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the photographs, if elsewhere.", show_default=False)
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="Folder of their masks. Default: alpha, if there is any.", show_default=False),
    ] = None,
    factor: Annotated[int, typer.Option(help="Make the photographs smaller by so much along a side.")] = 1,
    voxel: Annotated[
        float | None,
        typer.Option(help="Edge of the cubic voxels. Default: as for projections.", show_default=False),
    ] = None,
    landmarks: Annotated[
        Path | None,
        typer.Option(
            help='JSON file with "photo" and "xray": the same places in both worlds, [z, y, x] each; instead of the '
            "automatic alignment.",
            show_default=False,
        ),
    ] = None,
    transform: Annotated[
        Path | None,
        typer.Option(
            help='JSON file with the 4x4 "transform" from the photographs to the X-rays, (z, y, x), such as the '
            "report.json of an earlier result: no alignment is made.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="fast, balanced (default) or best.", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting, as key=value; may be repeated.", show_default=False),
    ] = None,
    file_format: Annotated[Format, typer.Option("--format", help="Format of the volumes.")] = Format.tif,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of all random choices.")] = 0,
    as_json: Json = False,
) -> int:
    """Join photographs and X-rays of one object: attenuation inside, colour outside, one set of Gaussians.

    The photographs' world may be any: the similarity between both worlds is found from the surfaces. splats.ply
    opens in ordinary viewers of Gaussian splats.

    \b
    Example:
      innergs dual scan.json photos/ --output out
      innergs dual scan.json transforms.json -o out --preset fast --set refine_cameras=true
      innergs dual ct.nii.gz photos/ -o out --volume --landmarks landmarks.json
    """
    from napari_innergs.config_dual import DualConfig
    from napari_innergs.fit.engine import Done, Failed, Preview
    from napari_innergs.io.cameras import read_photographs
    from napari_innergs.io.write import ensure_writable

    chosen = DualConfig.coerce(_merged(DualConfig, preset, config, settings or []))
    _check_format(file_format.value)
    options: dict[str, Any] = {"device": device, "seed": seed}
    if landmarks is not None:
        pairs = _json_object(landmarks, "--landmarks", ("photo", "xray"))
        options["landmarks"] = (pairs["photo"], pairs["xray"])
    if transform is not None:
        options["transform"] = _json_object(transform, "--transform", ("transform",))["transform"]
    scan: Scan | None = None
    if is_volume:
        options["volume"], grid = _attenuation(xrays)
    else:
        scan = _read_projections(xrays, array, geometry, None, None, None)
        grid = scan.grid if voxel is None else _coarser(scan, voxel)
    pictures = read_photographs(photographs, images, masks, factor=factor)
    ensure_writable(output)
    from napari_innergs.tasks.dual import fit_dual

    progress = _Progress(sys.stderr)
    progress.title = xrays.name
    last: Preview | None = None
    result: Reconstruction | None = None
    try:
        for event in fit_dual(scan, None, pictures, None, grid, chosen, **options):
            if isinstance(event, Preview):
                last = event
            elif isinstance(event, Done):
                result = event.result
            elif isinstance(event, Failed):
                raise event.error
            progress.show(event)
        assert result is not None
    except KeyboardInterrupt:
        if result is None and last is None:
            raise
        if result is None:
            from napari_innergs.result import Reconstruction as Partial

            assert last is not None
            facts = {"config": chosen.model_dump(mode="json"), "seed": seed}
            result = Partial(last.volume, last.grid, report={"task": "dual", **facts})
        result.report.update(interrupted=True)
        report = _save_dual(result, output, file_format.value)
        progress.clear()
        _complain(f"interrupted; the best state so far is saved in {report['files']['volume']}")
        if as_json:
            _print_json(report)
        raise Interrupted(report) from None
    finally:
        progress.clear()
    report = _save_dual(result, output, file_format.value)
    if as_json:
        _print_json(report)
    else:
        _say_dual(report)
    return 0


def _json_object(path: Path, option: str, keys: Sequence[str]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{option}: there is no file {str(path)!r}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{option}: {str(path)!r} is not JSON") from None
    missing = [key for key in keys if not isinstance(content, dict) or content.get(key) is None]
    if missing:
        raise ValueError(f"{option}: {str(path)!r} has no {missing[0]!r}; need {', '.join(keys)}")
    return dict(content)


def _attenuation(path: Path) -> tuple[Any, Any]:
    """Read a volume that says how large its voxels are."""
    import numpy as np

    from napari_innergs.geometry.grid import Grid
    from napari_innergs.io.files import to_stack
    from napari_innergs.io.read import open_volume

    stack = to_stack(open_volume(path), path, axis=0, time_index=0)
    if stack.units is None:
        raise ValueError(
            f"XRAYS: {str(path)!r} does not say how far apart its voxels are; need a file with spacing and unit"
        )
    values = np.asarray(stack.data)
    if values.ndim != 3:
        raise ValueError(f"XRAYS: {str(path)!r} has shape {values.shape}, need one channel (z, y, x)")
    return values, Grid(values.shape, stack.affine, stack.units)


def _save_dual(result: Reconstruction, folder: Path, suffix: str) -> dict[str, Any]:
    """Write a result; the report last, so that a folder that has one is complete."""
    from napari_innergs.io.write import ensure_writable, write_volume

    ensure_writable(folder)
    _remove_earlier(folder)
    unit = result.grid.units
    report: dict[str, Any] = {**result.report, "unit": f"1/{unit[0] if unit else 'pixel'}", "files": {}}
    volumes = {"volume": result.volume, "uncertainty": result.uncertainty, "colour": result.colour}
    for name, values in volumes.items():
        if values is not None:
            target = folder / f"{name}.{suffix}"
            names = ("red", "green", "blue") if name == "colour" else None
            write_volume(target, values, result.grid, channel_names=names)
            report["files"][name] = str(target)
    if result.model is not None:
        result.model.save(folder / "model.npz")
        report["files"]["model"] = str(folder / "model.npz")
    if result.splats is not None:
        result.splats.save(folder / "splats.ply")
        report["files"]["splats"] = str(folder / "splats.ply")
    matrix = None if result.transform is None else result.transform.tolist()
    content = {"format": 1, "transform": matrix, "report": report}
    _write_text(folder / "report.json", json.dumps(content, indent=1))
    return report


def _say_dual(report: dict[str, Any]) -> None:
    """Print what a person wants to know of a result."""
    print(report["files"]["volume"])
    size = " x ".join(str(n) for n in report["grid"]["shape"])
    print(
        f"  {size} voxels, {report['n_gaussians']} Gaussians, {report['n_surface']} of them on the surface, "
        f"{report['seconds']:.1f} s"
    )
    found = report["alignment"]
    errors = [
        f"{label} {found[key]:.2g}{unit}"
        for label, key, unit in (
            ("rotation", "rotation_error_degrees", " degrees"),
            ("scale", "scale_error", ""),
            ("shift", "shift_error", ""),
        )
        if found[key] is not None
    ]
    known = f", errors: {', '.join(errors)}" if errors else ""
    print(f"  alignment: score {found['score']:.3f}, scale {found['scale']:.5g}{known}")
    for warning in report.get("warnings") or ():
        print(f"  {warning}")


@app.command()
def voxelise(
    model: Annotated[Path, typer.Argument(help="Gaussians: .ply or .npz.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Volume: .tif, .nii.gz, .zarr or .npz.", show_default=False),
    ],
    spacing: Annotated[
        str | None,
        typer.Option(help="Voxel size in the model's unit: z,y,x or one number.", show_default=False),
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Take the grid of this image instead.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """Sample a file of Gaussians on a grid of voxels.

    The grid encloses the centres of a normalised field, and the support (3 standard deviations) of an additive
    one.

    \b
    Example:
      innergs voxelise out/model.npz --spacing 0.5 --output volume.tif
      innergs voxelise model.ply --like scan.nii.gz --output volume.nii.gz
    """
    from napari_innergs.io.write import check_output, write_volume
    from napari_innergs.model import GaussianModel

    if (spacing is None) == (like is None):
        raise ValueError("--spacing, --like: give one of them")
    check_output(output)
    steps = _numbers(spacing)
    gaussians = GaussianModel.load(model)
    if len(gaussians) == 0:
        raise ValueError(f"model: {str(model)!r} holds no Gaussians")
    grid = _grid_like(like) if like is not None else _grid_around(gaussians, steps)
    started = time.perf_counter()
    volume = gaussians.voxelise(grid)
    write_volume(output, volume, grid)
    report = {
        "task": "voxelise",
        "n_gaussians": len(gaussians),
        "field": gaussians.field,
        "grid": {"shape": list(grid.shape), "affine": grid.affine.tolist()},
        "seconds": round(time.perf_counter() - started, 3),
        "files": {"volume": str(output)},
    }
    if as_json:
        _print_json(report)
    else:
        size = " x ".join(str(n) for n in grid.shape)
        print(f"{output}\n  {size} voxels from {len(gaussians)} Gaussians, {report['seconds']:.1f} s")
    return 0


def _grid_like(path: Path) -> Any:
    from napari_innergs.geometry.grid import Grid
    from napari_innergs.io.files import to_stack
    from napari_innergs.io.read import open_volume

    stack = to_stack(open_volume(path), path, axis=0, time_index=0)
    return Grid((stack.n_slices, stack.height, stack.width), stack.affine, stack.units)


def _grid_around(gaussians: Any, steps: float | tuple[float, ...] | None) -> Any:
    import numpy as np

    from napari_innergs.geometry.grid import Grid

    size = np.broadcast_to(np.asarray(steps, dtype=float), 3)
    if not (np.isfinite(size).all() and (size > 0).all()):
        raise ValueError(f"--spacing: got {steps}, need positive numbers")
    if gaussians.field == "normalised":
        low, high = gaussians.means.min(axis=0), gaussians.means.max(axis=0)
    else:
        low, high = gaussians.bounds(3.0)
    affine = np.diag([*size, 1.0])
    affine[:3, 3] = low
    counts = np.floor((high - low) / size + 1e-6) + 1
    return Grid([int(n) for n in counts], affine, gaussians.units)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "demo-output"
    ),
    preset: Annotated[str, typer.Option(help="fast, balanced or best.")] = "balanced",
    device: Device = "auto",
    as_json: Json = False,
) -> int:
    """Reconstruct sample data from every 4th slice and compare with the others.

    Writes the volume, a picture with error maps, and a report. Takes about a minute.

    \b
    Example:
      innergs demo --output demo-output
    """
    from napari_innergs.io.write import ensure_writable

    ensure_writable(output)
    progress = _Progress(sys.stderr)
    progress.title = "demo"
    from napari_innergs import _demo
    from napari_innergs.fit.engine import Preview
    from napari_innergs.io.write import write_volume

    last: Preview | None = None
    try:
        for event in _demo.run(output, preset, device, progress.show):
            if isinstance(event, Preview):
                last = event
    except KeyboardInterrupt:
        progress.clear()
        if last is None:
            raise
        write_volume(output / "volume.tif", last.volume, last.grid)
        _complain(f"interrupted; the best state so far ({last.label}) is saved in {output / 'volume.tif'}")
        raise Interrupted({}) from None
    progress.clear()
    if as_json:
        print((output / "report.json").read_text(encoding="utf-8"))
    else:
        print((output / "report.md").read_text(encoding="utf-8"))
        print(f"picture: {output / 'picture.png'}")
    return 0


@app.command()
def bench(
    gaussians: Annotated[int, typer.Option(help="How many Gaussians.", min=1)] = 20_000,
    rounds: Annotated[int, typer.Option(help="Repetitions; the median counts.", min=1)] = 5,
    as_json: Json = False,
) -> int:
    """Time the kernels on the devices of this computer.

    Whole calls of the public operators, forward and backward, on a fixed random problem.

    \b
    Example:
      innergs bench --gaussians 20000
    """
    import torch

    from napari_innergs.device import describe_device, get_threads
    from napari_innergs.operators.slices import morton_order, render_slices
    from napari_innergs.operators.voxels import voxelise as sample

    generator = torch.Generator().manual_seed(0)
    means = torch.rand(gaussians, 3, generator=generator) * 96
    means = means[morton_order(means)]
    widths = 1 + torch.rand(gaussians, 3, generator=generator)
    covariances = torch.zeros(gaussians, 6)
    covariances[:, [0, 3, 5]] = widths**2
    amplitudes = torch.rand(gaussians, 1, generator=generator)
    positions = torch.arange(0, 96, 4.0)
    tasks: dict[str, Callable[..., torch.Tensor]] = {
        "slices, 24 of 96 x 96": lambda m, s, a, b: render_slices(m, s, a, positions, (96, 96), backend=b),
        "voxels, 96 x 96 x 96": lambda m, s, a, b: sample(m, s, a, (96, 96, 96), backend=b),
    }
    rows = []
    for device in _devices():
        # a GPU works on by itself after a call has returned
        wait = partial(torch.cuda.synchronize, device) if device != "cpu" else lambda: None
        for label, operator in tasks.items():
            forward, backward = [], []
            # the first call compiles
            for number in range(rounds + 1):
                inputs = [x.to(device).clone().requires_grad_() for x in (means, covariances, amplitudes)]
                wait()
                start = time.perf_counter()
                out = operator(*inputs, device)
                wait()
                middle = time.perf_counter()
                out.sum().backward()
                wait()
                if number:
                    forward.append(middle - start)
                    backward.append(time.perf_counter() - middle)
            for name, times in (("forward", forward), ("backward", backward)):
                median = sorted(times)[len(times) // 2]
                rows.append({"device": device, "operator": label, "pass": name, "ms": round(median * 1e3, 2)})
    report = {"gaussians": gaussians, "rounds": rounds, "threads": get_threads(), "results": rows}
    if as_json:
        _print_json(report)
        return 0
    print(f"{gaussians} Gaussians, median of {rounds}, {get_threads()} threads")
    print(describe_device().reason)
    print(f"{'device':8}{'operator':26}{'pass':10}{'ms':>10}")
    for row in rows:
        print(f"{row['device']:8}{row['operator']:26}{row['pass']:10}{row['ms']:10.2f}")
    return 0


def _devices() -> list[str]:
    """Devices that can be used here."""
    from napari_innergs.device import describe_device, find_cuda

    found = ["cpu"]
    for index in range(len(find_cuda().gpus)):
        with suppress(RuntimeError):
            found.append(describe_device(f"cuda:{index}").name)
    return found


@app.command()
def info(as_json: Json = False) -> int:
    """Print versions, device and memory: what to add to a problem report.

    \b
    Example:
      innergs info --json
    """
    from napari_innergs.device import describe_device, find_cuda, get_threads
    from napari_innergs.geometry.grid import available_memory, format_bytes
    from napari_innergs.tasks.versions import versions

    choice = describe_device()
    cuda = dataclasses.asdict(find_cuda())
    free = available_memory()
    extras = {
        name: all(importlib.util.find_spec(module) is not None for module in modules)
        for name, modules in _EXTRAS.items()
    }
    report = {
        "versions": versions(),
        "device": {"name": choice.name, "reason": choice.reason},
        "devices": _devices(),
        "cuda": cuda,
        "threads": get_threads(),
        "memory_available": free,
        "extras": extras,
    }
    if as_json:
        _print_json(report)
        return 0
    for name, version in versions().items():
        print(f"{name:24}{version}")
    print(f"{'device':24}{choice.name}: {choice.reason}")
    for name in ("torch_cuda", "cupy", "cupy_cuda", "driver_cuda"):
        if cuda[name]:
            print(f"{name.replace('_cuda', ' for CUDA'):24}{cuda[name]}")
    for gpu in cuda["gpus"]:
        print(f"{'gpu':24}{gpu}")
    print(f"{'threads':24}{get_threads()}")
    print(f"{'memory available':24}{format_bytes(free)}")
    for name, present in extras.items():
        print(f"{name:24}{'installed' if present else 'not installed'}")
    return 0


if __name__ == "__main__":
    run()
