"""Gaussian models in files: PLY (as 3D Gaussian splatting viewers read it) and NPZ.

The PLY is binary, little endian, with the property names of Kerbl et al. (2023): x, y, z, normals, f_dc_0..2,
opacity, scale_0..2, rot_0..3, in (x, y, z) order. Colours and opacity there are for the eye only. Our own
properties hold the model: amplitude_0..., log_weight, and the centres in double precision. A comment holds
the rest as JSON. Nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_innergs.geometry.rotation import reverse_quaternion
from napari_innergs.io.files import PathLike, atomic_path, check_size, need_file, suffix_of

__all__ = ["npz_names", "read_gaussians", "read_npz_arrays", "read_ply", "write_gaussians", "write_ply"]

_KEYWORD = "napari-innergs"
_MAX_HEADER = 1 << 16
# zeroth spherical harmonic: colour = 0.5 + C0 f_dc (Kerbl et al. 2023)
_SH_C0 = 0.28209479177387814
_TYPES = {
    "char": "i1",
    "int8": "i1",
    "uchar": "u1",
    "uint8": "u1",
    "short": "<i2",
    "int16": "<i2",
    "ushort": "<u2",
    "uint16": "<u2",
    "int": "<i4",
    "int32": "<i4",
    "uint": "<u4",
    "uint32": "<u4",
    "float": "<f4",
    "float32": "<f4",
    "double": "<f8",
    "float64": "<f8",
}
_NAMES = {"<f4": "float", "<f8": "double"}
_ARRAYS = ("means", "log_scales", "quaternions", "amplitudes", "log_weights")


def write_gaussians(path: PathLike, arrays: dict[str, NDArray[Any]], header: dict[str, Any]) -> None:
    """Write Gaussians; the name's ending, ``.ply`` or ``.npz``, chooses the format.

    Parameters
    ----------
    path : path
        Where.
    arrays : dict of ndarray
        ``means``, ``log_scales``, ``quaternions``, ``amplitudes`` and ``log_weights`` of a `GaussianModel`.
    header : dict
        What else there is to know of the model, as JSON holds it.

    Raises
    ------
    ValueError
        For another ending or a folder that can not be written.
    """
    suffix = suffix_of(path)
    text = json.dumps({"version": 1, **header})
    if suffix == ".ply":
        write_ply(path, _to_table(**arrays), text)
    elif suffix == ".npz":
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, gaussians=np.frombuffer(text.encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    else:
        raise ValueError(f"path: got {str(path)!r}, need a name that ends in .ply or .npz.")


def read_gaussians(path: PathLike) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read Gaussians from a ``.ply`` or ``.npz`` file.

    Parameters
    ----------
    path : path
        A file of :func:`write_gaussians`, or any 3D Gaussian splatting PLY; its colours become amplitudes, its
        opacities weights.

    Returns
    -------
    arrays, header : dict
        As for :func:`write_gaussians`; ``log_weights`` may be missing, and the header empty.

    Raises
    ------
    ValueError
        Naming the file, if it is damaged or not of this kind.
    """
    file = need_file(path)
    suffix = suffix_of(file)
    if suffix == ".ply":
        table, comments = read_ply(file)
        return _from_table(table, comments, file)
    if suffix != ".npz":
        raise ValueError(f"path: got {str(path)!r}, need a file that ends in .ply or .npz.")
    arrays = read_npz_arrays(file)
    missing = {"gaussians", *_ARRAYS[:-1]} - set(arrays)
    if missing:
        raise ValueError(f"path: {str(file)!r} holds no Gaussian model, {sorted(missing)} is missing.")
    header = _parse_header(arrays["gaussians"].tobytes(), file)
    return {name: arrays[name] for name in _ARRAYS if name in arrays}, header


def read_npz_arrays(path: PathLike, keys: tuple[str, ...] | None = None) -> dict[str, NDArray[Any]]:
    """Read arrays of numbers from an NPZ or NPY file; sizes are checked before anything is allocated.

    Parameters
    ----------
    path : path
        The file. Pickled objects in it are refused.
    keys : tuple of str, optional
        Which arrays; default: all.

    Returns
    -------
    dict of ndarray
        By name; an NPY file has the one name ``"data"``.

    Raises
    ------
    ValueError
        Naming the file, if it is damaged, holds objects, or does not fit in memory.
    """
    file = need_file(path)
    try:
        if not zipfile.is_zipfile(file):
            with file.open("rb") as stream:
                if stream.read(6) != b"\x93NUMPY":
                    raise ValueError("it is neither NPY nor NPZ")
            mapped = np.load(file, mmap_mode="r", allow_pickle=False)
            if not isinstance(mapped, np.ndarray):
                raise ValueError("it is neither NPY nor NPZ")
            check_size(mapped.nbytes, file)
            return {"data": np.array(mapped)}
        out = {}
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name == member.filename or (keys is not None and name not in keys):
                    continue
                with archive.open(member) as stream:
                    shape, dtype = _npy_header(stream)
                    if dtype.hasobject:
                        raise ValueError(f"array {name!r} holds Python objects, which are never loaded")
                    nbytes = math.prod(shape) * dtype.itemsize
                    if nbytes > member.file_size:
                        raise ValueError(f"array {name!r} announces more than the file holds")
                    check_size(nbytes, file)
                with archive.open(member) as stream:
                    out[name] = np.lib.format.read_array(stream, allow_pickle=False)
        return out
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
    ) as error:
        if isinstance(error, ValueError) and str(error).startswith("path:"):
            raise
        raise ValueError(f"path: can not read {str(file)!r}: {error}.") from error
    except Exception as error:  # zlib.error, SyntaxError from a header that is not a literal
        raise ValueError(f"path: {str(file)!r} is damaged: {error}.") from error


def npz_names(path: PathLike) -> list[str]:
    """Name the arrays of an NPZ or NPY file without reading them.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    list of str
        In alphabetical order.
    """
    if not zipfile.is_zipfile(path):
        return ["data"]
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return sorted(name.removesuffix(".npy") for name in names if name.endswith(".npy"))


def _npy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"NPY version {version} is not known")
    return shape, dtype


def write_ply(path: PathLike, table: NDArray[Any], comment: str | None = None) -> None:
    """Write a table as the vertices of a binary little-endian PLY.

    Parameters
    ----------
    path : path
        Where.
    table : structured ndarray (N,)
        Fields of float32 or float64, little endian.
    comment : str, optional
        One line for the header.

    Raises
    ------
    ValueError
        If the folder can not be written.
    """
    assert table.dtype.names is not None
    lines = ["ply", "format binary_little_endian 1.0"]
    if comment is not None:
        lines.append(f"comment {_KEYWORD} {comment}")
    lines.append(f"element vertex {len(table)}")
    lines += [f"property {_NAMES[table.dtype[name].str]} {name}" for name in table.dtype.names]
    lines += ["end_header", ""]
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write("\n".join(lines).encode("ascii"))
        stream.write(table.tobytes())


def read_ply(path: PathLike) -> tuple[NDArray[Any], list[str]]:
    """Read the vertices of a binary little-endian PLY.

    Parameters
    ----------
    path : path
        The file; what its header says is believed only as far as the file is large enough for it.

    Returns
    -------
    table : structured ndarray (N,)
        One field for each property.
    comments : list of str
        The header's comments.

    Raises
    ------
    ValueError
        Naming the file, if the header is damaged or the file too short.
    """
    file = need_file(path)
    size = file.stat().st_size
    where = f"path: {str(file)!r} is not a PLY file that can be read"
    with file.open("rb") as stream:
        lines: list[str] = []
        length = 0
        while True:
            line = stream.readline(_MAX_HEADER - length + 1)
            length += len(line)
            if not line.endswith(b"\n") or length > _MAX_HEADER:
                raise ValueError(f"{where}: its header does not end.")
            text = line.decode("latin-1").strip()
            if not lines and text != "ply":
                raise ValueError(f"{where}: it does not start with 'ply'.")
            if text == "end_header":
                break
            lines.append(text)
        comments = [text[len("comment") :].strip() for text in lines if text.startswith("comment")]
        formats = [text.split()[1:] for text in lines if text.split()[:1] == ["format"]]
        if formats != [["binary_little_endian", "1.0"]]:
            raise ValueError(f"{where}: its format is {formats}, need binary_little_endian 1.0.")
        count, fields, element = None, [], ""
        for text in lines:
            words = text.split()
            if words[:1] == ["element"]:
                if len(words) != 3 or not (words[2].isascii() and words[2].isdigit()) or len(words[2]) > 15:
                    raise ValueError(f"{where}: bad header line {text[:80]!r}.")
                element = words[1]
                if count is None and element != "vertex":
                    raise ValueError(f"{where}: its first element is {element[:40]!r}, need 'vertex'.")
                if element == "vertex":
                    if count is not None:
                        raise ValueError(f"{where}: it has two elements called 'vertex'.")
                    count = int(words[2])
            elif words[:1] == ["property"] and element == "vertex":
                if len(words) != 3 or words[1] not in _TYPES:
                    raise ValueError(f"{where}: a property of unknown type in {text[:80]!r}.")
                fields.append((words[2], _TYPES[words[1]]))
        names = [name for name, _ in fields]
        if count is None or not fields or len(set(names)) != len(names):
            raise ValueError(f"{where}: its vertices have no properties, or two of one name.")
        dtype = np.dtype(fields)
        if count * dtype.itemsize > size - length:
            raise ValueError(
                f"{where}: its header announces {count} vertices of {dtype.itemsize} bytes, "
                f"but only {size - length} bytes follow."
            )
        check_size(count * dtype.itemsize, file)
        table = np.frombuffer(stream.read(count * dtype.itemsize), dtype)
    return table, comments


def _parse_header(text: bytes | str, file: Path) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: {str(file)!r} has a damaged header: {error}.") from error
    if not isinstance(header, dict) or header.get("version") != 1:
        raise ValueError(f"path: {str(file)!r} has a header of an unknown version, need version 1.")
    return header


def _to_table(
    means: NDArray[Any],
    log_scales: NDArray[Any],
    quaternions: NDArray[Any],
    amplitudes: NDArray[Any],
    log_weights: NDArray[Any],
) -> NDArray[Any]:
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"]
    names += [f"scale_{i}" for i in range(3)] + [f"rot_{i}" for i in range(4)]
    channels = amplitudes.shape[1]
    own = ["center_x", "center_y", "center_z", "log_weight"] + [f"amplitude_{c}" for c in range(channels)]
    table = np.zeros(len(means), [(name, "<f4") for name in names] + [(name, "<f8") for name in own])
    rotations = reverse_quaternion(quaternions)
    for i, name in enumerate("xyz"):
        table[name] = table[f"center_{name}"] = means[:, 2 - i]
        table[f"scale_{i}"] = log_scales[:, 2 - i]
    for i in range(4):
        table[f"rot_{i}"] = rotations[:, i]
    table["log_weight"] = log_weights
    for c in range(channels):
        table[f"amplitude_{c}"] = amplitudes[:, c]
    if len(means):
        # for viewers: grey or colour over the range of the amplitudes, bright ones more solid
        low, high = amplitudes.min(), amplitudes.max()
        grey = (amplitudes - low) / (high - low if high > low else 1.0)
        for i in range(3):
            table[f"f_dc_{i}"] = (grey[:, i if channels >= 3 else 0] - 0.5) / _SH_C0
        solid = np.clip(grey.mean(axis=1), 0.01, 0.99)
        table["opacity"] = np.log(solid / (1 - solid))
    return table


def _from_table(
    table: NDArray[Any], comments: list[str], file: Path
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    names = set(table.dtype.names or ())
    needed = {"x", "y", "z", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))}
    if needed - names:
        raise ValueError(f"path: {str(file)!r} holds no Gaussians, {sorted(needed - names)} is missing.")

    def columns(*wanted: str) -> NDArray[np.float64]:
        return np.stack([table[name].astype(np.float64) for name in wanted], axis=1)

    means = columns("z", "y", "x")
    fine = ("center_z", "center_y", "center_x")
    if names.issuperset(fine):
        precise = columns(*fine)
        # somebody may have moved x, y, z in a splat editor: then those hold
        with np.errstate(over="ignore"):
            same = precise.astype(np.float32) == means.astype(np.float32)
        means = np.where(same, precise, means)
    values: dict[str, NDArray[Any]] = {
        "means": means,
        "log_scales": columns("scale_2", "scale_1", "scale_0"),
        "quaternions": reverse_quaternion(columns("rot_0", "rot_1", "rot_2", "rot_3")),
    }
    ours = [text[len(_KEYWORD) :] for text in comments if text.startswith(_KEYWORD + " ")]
    header = _parse_header(ours[0], file) if ours else {}
    amplitudes: list[str] = []
    while f"amplitude_{len(amplitudes)}" in names:
        amplitudes.append(f"amplitude_{len(amplitudes)}")
    if amplitudes:
        values["amplitudes"] = columns(*amplitudes)
    elif names.issuperset(("f_dc_0", "f_dc_1", "f_dc_2")):
        values["amplitudes"] = 0.5 + _SH_C0 * columns("f_dc_0", "f_dc_1", "f_dc_2")
    else:
        raise ValueError(f"path: {str(file)!r} has neither amplitudes nor colours.")
    if "log_weight" in names:
        values["log_weights"] = columns("log_weight")[:, 0]
    elif "opacity" in names:
        # log of the logistic function, without overflow
        values["log_weights"] = -np.logaddexp(0.0, -columns("opacity")[:, 0])
    return values, header
