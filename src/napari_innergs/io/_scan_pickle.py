"""Numbers out of a pickle, without running anything in it.

A pickle names functions to call. Here no name leads to a function of Python or NumPy: the few that arrays need
lead to the recorders below, every other one is refused.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["as_array", "load_plain"]

_CODES = re.compile(r"b1|[iu][1248]|f[248]")


class _Type:
    """A number's type: its code and byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        text = code.decode("latin-1") if isinstance(code, bytes) else code
        if not isinstance(text, str) or not _CODES.fullmatch(text.lstrip("<>|=")):
            raise pickle.UnpicklingError(f"arrays of type {code!r} are refused")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if isinstance(order, bytes):
            order = order.decode("latin-1")
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("an array has an unknown byte order")
        if order == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """An array whose bytes are not yet looked at."""

    def __init__(self, *_: Any) -> None:
        self.value: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array is damaged")
        _, shape, dtype, fortran, raw = state
        self.value = _build(raw, dtype, shape, "F" if fortran else "C")


def _build(raw: Any, dtype: Any, shape: Any, order: str) -> NDArray[Any]:
    if isinstance(raw, str):
        raw = raw.encode("latin-1")
    if not isinstance(dtype, _Type) or not isinstance(raw, (bytes, bytearray)):
        raise pickle.UnpicklingError("an array holds Python objects, which are never loaded")
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise pickle.UnpicklingError("an array has a damaged shape")
    if math.prod(shape) * dtype.dtype.itemsize != len(raw):
        raise pickle.UnpicklingError("an array announces another number of bytes than it has")
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> _Array:
    out = _Array()
    out.value = _build(raw, dtype, shape, str(order))
    return out


def _scalar(dtype: Any, raw: Any) -> Any:
    return _build(raw, dtype, (), "C").item()


def _encode(text: Any, coding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or coding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("an unusual coding is refused")
    return text.encode("latin-1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
}
for _core in ("numpy.core", "numpy._core"):
    _KNOWN[(f"{_core}.multiarray", "_reconstruct")] = _Array
    _KNOWN[(f"{_core}.multiarray", "scalar")] = _scalar
    _KNOWN[(f"{_core}.numeric", "_frombuffer")] = _from_buffer


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _KNOWN[(module_name, global_name)]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module_name}.{global_name}, which could run code and is refused"
            ) from None


def _check_memo(stream: BinaryIO, size: int) -> None:
    """Refuse a memo that the file is too short for: its numbers are how much memory the reader sets aside."""
    for code, number, _ in pickletools.genops(stream):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= number < size:  # type: ignore[operator]
            raise pickle.UnpicklingError("it numbers more objects than it can hold")


def load_plain(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of numbers, texts, lists and arrays; nothing in the file is run.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    dict
        Arrays in it are given to :func:`as_array`.

    Raises
    ------
    ValueError
        Naming the file, if it is damaged, is no dictionary, or names anything else.
    """
    try:
        with path.open("rb") as stream:
            _check_memo(stream, path.stat().st_size)
            stream.seek(0)
            found = _Reader(stream).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"path: the pickle {str(path)!r} can not be read: {error or 'damaged'}.") from error
    if type(found) not in (dict, OrderedDict):
        raise ValueError(f"path: the pickle {str(path)!r} holds a {type(found).__name__}, need a dictionary.")
    return dict(found)


def as_array(value: Any, name: str) -> NDArray[Any]:
    """Make an array of a value from :func:`load_plain`.

    Parameters
    ----------
    value : object
        An array, number, or flat list of numbers of the file.
    name : str
        For the error.

    Returns
    -------
    ndarray
        Of numbers.

    Raises
    ------
    ValueError
        If it is something else.
    """
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, _Array) for item in value):
        images = [item.value for item in value]
        if all(image is not None and image.shape == images[0].shape for image in images):
            return np.stack(images)
    if isinstance(value, (int, float, list, tuple)):
        flat = value if isinstance(value, (list, tuple)) else [value]
        if all(isinstance(item, (int, float)) for item in flat):
            return np.asarray(value, dtype=np.float64)
    raise ValueError(f"{name}: got {type(value).__name__}, need numbers.")
