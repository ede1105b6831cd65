"""Folders of results: never over the input, nothing left of an earlier result, the report last."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

# names, without ending, of what a folder of results holds
_OURS = ("volume", "uncertainty", "distance", "model", "transforms", "report", "hu", "tv", "geometry")


def keep_input(path: Path, folder: Path) -> None:
    """Refuse a folder for the results in which the input would be overwritten."""
    if path.exists() and path.resolve().parent == folder.resolve() and path.name.split(".")[0] in _OURS:
        raise ValueError(f"--output: {str(path)!r} would be overwritten; need another folder")


def attenuation_unit(grid: Any) -> str:
    """Return the unit of what X-rays lose on their way."""
    return f"1/{grid.units[0] if grid.units else 'pixel'}"


class Results:
    """What is written of one reconstruction to a folder.

    Parameters
    ----------
    folder : Path
        Made when it does not exist; files of an earlier result in it are removed.
    suffix : str
        Ending of the volumes.
    result : Reconstruction
        Its report, with the files that are written, becomes the attribute `report`.
    facts
        More entries of the report.
    """

    def __init__(self, folder: Path, suffix: str, result: Any, **facts: Any) -> None:
        from napari_innergs.io.write import ensure_writable

        self.folder, self.suffix, self.result = folder, suffix, result
        self.report: dict[str, Any] = {**result.report, **facts, "files": {}}
        ensure_writable(folder)
        _remove_earlier(folder)

    def volume(self, name: str, values: Any, channel_names: Any = None) -> None:
        """Write a volume on the grid of the result, if it is there."""
        from napari_innergs.io.write import write_volume

        if values is not None:
            path = self._list(f"{name}.{self.suffix}")
            write_volume(path, values, self.result.grid, channel_names=channel_names)

    def gaussians(self, file: str, model: Any) -> None:
        """Write Gaussians, if they are there."""
        if model is not None:
            model.save(self._list(file))

    def json(self, file: str, content: Any, indent: int | None = None) -> None:
        """Write what other programs, or a later call, can read."""
        self._write(self._list(file), content, indent)

    def finish(self) -> dict[str, Any]:
        """Write the report last, so that a folder that has one is complete, and return it."""
        transform = None if self.result.transform is None else self.result.transform.tolist()
        content = {"format": 1, "transform": transform, "report": self.report}
        self._write(self.folder / "report.json", content, 1)
        return self.report

    def _list(self, file: str) -> Path:
        path = self.folder / file
        self.report["files"][file.split(".")[0]] = str(path)
        return path

    @staticmethod
    def _write(path: Path, content: Any, indent: int | None) -> None:
        from napari_innergs.io.write import atomic_path

        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


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
