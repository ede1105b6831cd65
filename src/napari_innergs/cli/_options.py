"""Options that commands share, and what they are read into."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer


def argument(text: str, metavar: str | None = None) -> Any:
    """Return an argument without a default worth showing."""
    return typer.Argument(help=text, metavar=metavar, show_default=False)


def option(text: str, *names: str) -> Any:
    """Return an option that is required, or whose help says what holds without it."""
    return typer.Option(*names, help=text, show_default=False)


class Format(StrEnum):
    """Endings that a volume can be written with."""

    tif = "tif"
    nifti = "nii.gz"
    zarr = "zarr"
    npz = "npz"


Output = Annotated[Path, option("Folder for the results.", "--output", "-o")]
Config = Annotated[Path | None, option("YAML file with settings.")]
Settings = Annotated[list[str] | None, option("One setting, as key=value; may be repeated.", "--set")]
FileFormat = Annotated[Format, typer.Option("--format", help="Format of the volumes.")]
VolumeOnly = Annotated[
    bool, typer.Option("--volume-only", help="Write the volume and the report, nothing else.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report to the standard output as JSON.")]


def merged(model: Any, preset: str | None, path: Path | None, pairs: Sequence[str] | None) -> dict[str, Any]:
    """Merge a preset, a YAML file and single settings of a model of settings; later ones win."""
    values: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise ValueError(f"--config: there is no file {str(path)!r}")
        values = _yaml(path)
    if preset is not None:
        values["preset"] = preset
    for pair in pairs or ():
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


def numbers(text: str | None) -> float | tuple[float, ...] | None:
    """Read what ``--spacing`` was given: one number or three."""
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) not in (1, 3):
        raise ValueError(f"--spacing: got {text!r}, need one number, or three as z,y,x")
    return found[0] if len(found) == 1 else found


def check_format(suffix: str) -> None:
    """Find out before the work whether the libraries of a format are there."""
    needs = {"nii.gz": ("nibabel", "medical"), "zarr": ("zarr", "zarr")}
    if suffix in needs and importlib.util.find_spec(needs[suffix][0]) is None:
        library, extra = needs[suffix]
        raise ValueError(
            f"--format: {suffix} needs {library}, which is not installed: pip install 'napari-innergs[{extra}]'"
        )


def check_keep_every(keep_every: int) -> None:
    """Refuse what can not be counted by."""
    if keep_every < 1:
        raise ValueError(f"--keep-every: got {keep_every}, need 1 or more")


def read_json(path: Path, name: str) -> Any:
    """Read the JSON file that an option names."""
    if not path.is_file():
        raise ValueError(f"{name}: there is no file {str(path)!r}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{name}: {str(path)!r} is not JSON") from None


def open_stack(path: Path) -> Any:
    """Read a file whose voxels or geometry are wanted as a `SliceStack`, first axis first."""
    from napari_innergs.io.files import to_stack
    from napari_innergs.io.read import open_volume

    return to_stack(open_volume(path), path, axis=0, time_index=0)
