"""Single photographs and masks from files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_innergs.geometry.camera import Camera, Lens
from napari_innergs.io.files import check_size, need_file
from napari_innergs.io.tiff import listen
from napari_innergs.photographs import as_unit

__all__ = [
    "PICTURE_SUFFIXES",
    "Folder",
    "picture_size",
    "read_mask",
    "read_picture",
    "sampling",
    "straighten",
]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
"""Endings of photographs; where a file's name has none, they are tried in this order."""
_TIFF = (".tif", ".tiff")

Sampling = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]


class Folder:
    """Finds pictures in a folder by names that may come from another computer.

    Parameters
    ----------
    root : Path
        The folder.
    given : bool
        Whether the user chose it: then leading folders of a name need not be there.
    """

    def __init__(self, root: Path, *, given: bool = False) -> None:
        self.root = root
        self.given = given
        self._files: dict[str, Path] | None = None
        self._outside: dict[Path, Folder] = {}

    @property
    def files(self) -> dict[str, Path]:
        """All pictures below the folder, by their path in lower case."""
        if self._files is None:
            self._files = {
                place.relative_to(self.root).as_posix().lower(): place
                for place in sorted(self.root.rglob("*"))
                if place.suffix.lower() in PICTURE_SUFFIXES and place.is_file()
            }
        return self._files

    def find(self, name: str, *, other_endings: bool = False) -> Path | None:
        """Look for a picture.

        Parameters
        ----------
        name : str
            Path below the folder, with forward slashes. A missing ending, other capitals, and the folders of an
            absolute path of another computer are forgiven.
        other_endings : bool
            Whether a file that differs in its ending only will do.

        Returns
        -------
        Path or None
            The file.
        """
        place = self.root / name
        # names such as "r_0.5" have a suffix that is no ending
        if place.suffix.lower() in PICTURE_SUFFIXES and place.is_file():
            return place
        parts = name.lower().split("/")
        if ".." in parts and not self.given:
            outside = self._outside.setdefault(place.parent, Folder(place.parent))
            return outside.find(place.name, other_endings=other_endings)
        # C:/photos/set/a.png: what of it is below the folder is not known
        foreign = self.given or parts[0] == "" or parts[0].endswith(":")
        for first in range(len(parts) if foreign else 1):
            wanted = "/".join(parts[first:])
            suffix = Path(wanted).suffix
            bare = suffix not in PICTURE_SUFFIXES
            stem = wanted if bare else wanted[: -len(suffix)]
            tries = [] if bare else [wanted]
            if bare or other_endings:
                tries += [stem + ending for ending in PICTURE_SUFFIXES]
            found = next((self.files[one] for one in tries if one in self.files), None)
            if found is not None:
                return found
        return None


def _failed(file: Path, error: BaseException) -> ValueError:
    return ValueError(f"path: can not read the picture {str(file)!r}: {error}.")


def picture_size(file: Path) -> tuple[int, int]:
    """Give height and width without reading pixels.

    Parameters
    ----------
    file : Path
        The picture.

    Returns
    -------
    (int, int)
        Height and width.

    Raises
    ------
    ValueError
        Naming the file.
    """
    height, width, _ = _header(need_file(file))
    return height, width


def _header(file: Path) -> tuple[int, int, int]:
    """Give height, width and bytes of a value; PIL knows no TIFF files with more than eight bits and colours."""
    if file.suffix.lower() in _TIFF:
        import tifffile

        try:
            with listen() as complaints, tifffile.TiffFile(file) as tiff:
                page: Any = tiff.pages[0]
                found = (int(page.imagelength), int(page.imagewidth), int(np.dtype(page.dtype).itemsize))
        except Exception as error:  # tifffile raises many kinds on damaged files
            raise _failed(file, error) from error
        if complaints:
            raise _failed(file, ValueError(complaints[0]))
        return found
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # the limit that counts is the memory
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                width, height = image.size
        with file.open("rb") as stream:
            head = stream.read(25)
    except Exception as error:
        raise _failed(file, error) from error
    deep = head.startswith(b"\x89PNG") and head[24:25] == b"\x10"
    return height, width, 2 if deep else 1


def read_picture(file: Path) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Read a photograph.

    Parameters
    ----------
    file : Path
        PNG, JPEG, TIFF and others; grey or colour, 8 or 16 bits or floating point from 0 to 1, perhaps with alpha.

    Returns
    -------
    colours : ndarray (H, W, 3) of uint8 or float32
        Display values, not multiplied by alpha; uint8 if the file has eight bits.
    alpha : ndarray (H, W) of float32, or None
        From 0 to 1.

    Raises
    ------
    ValueError
        Naming the file, if it is damaged or has other channels.
    """
    height, width, depth = _header(need_file(file))
    check_size(height * width * 4 * 4, file)
    try:
        if depth == 1:
            pixels = _read_pil(file)
        elif file.suffix.lower() in _TIFF:
            return _read_tiff(file)
        else:
            pixels = _read_deep_png(file)
    except ValueError as error:
        if str(error).startswith("path:"):
            raise
        raise _failed(file, error) from error
    except Exception as error:  # decoders raise many kinds on damaged files
        raise _failed(file, error) from error
    return _split(pixels, file)


def _read_pil(file: Path) -> NDArray[Any]:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            image.load()
            see_through = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
            return np.array(image.convert("RGBA" if see_through else "RGB"))


def _read_deep_png(file: Path) -> NDArray[Any]:
    import cv2
    from PIL import Image

    # OpenCV gives what it could decode of a truncated file; PIL finds out that it is one
    with Image.open(file) as image:
        image.load()
    found = cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None:
        raise ValueError("it is damaged")
    if found.ndim == 2:
        return found[..., np.newaxis]
    return found[..., [2, 1, 0, 3][: found.shape[2]]]


def _read_tiff(file: Path) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    import tifffile

    with listen() as complaints, tifffile.TiffFile(file) as tiff:
        page: Any = tiff.pages[0]
        pixels = page.asarray()
        axes = page.axes
        premultiplied = 1 in [int(kind) for kind in getattr(page, "extrasamples", ()) or ()]
    if complaints:
        raise ValueError(complaints[0])
    if axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    elif axes == "YX":
        pixels = pixels[..., np.newaxis]
    colours, alpha = _split(pixels, file)
    if alpha is not None and premultiplied:
        # undone, as all that follows expects straight alpha
        colours = np.clip(colours / np.maximum(alpha, np.float32(1e-6))[..., np.newaxis], 0, 1)
    return colours, alpha


def _split(pixels: NDArray[Any], file: Path) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4:
        raise ValueError(f"path: {str(file)!r} has pixels of shape {pixels.shape}, need grey, RGB or RGBA.")
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
            raise ValueError(
                f"path: {str(file)!r} has values from {pixels.min():.4g} to {pixels.max():.4g}, "
                "need 0 to 1 in floating point."
            )
        pixels = pixels.astype(np.float32, copy=False)
    elif pixels.dtype in (np.uint16, np.uint32):
        pixels = pixels / np.float32(np.iinfo(pixels.dtype).max)
        pixels = pixels.astype(np.float32, copy=False)
    elif pixels.dtype != np.uint8:
        raise ValueError(
            f"path: {str(file)!r} has values of type {pixels.dtype}, need 8 or 16 bits, or 0 to 1."
        )
    count = pixels.shape[2]
    alpha = None
    if count in (2, 4):
        alpha = as_unit(pixels[..., -1])
    colours = pixels[..., :3] if count >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
    return np.ascontiguousarray(colours), alpha


def read_mask(file: Path) -> NDArray[np.float32]:
    """Read a mask: its alpha if it has one that says something, else its brightness.

    Parameters
    ----------
    file : Path
        The picture.

    Returns
    -------
    ndarray (H, W) of float32
        From 0 to 1.

    Raises
    ------
    ValueError
        Naming the file.
    """
    colours, alpha = read_picture(file)
    if alpha is not None and (alpha < 1).any():
        return alpha
    values = colours.max(axis=2)
    if values.dtype != np.uint8:
        return values  # type: ignore[no-any-return]
    # 0 and 1 in eight bits are no and yes, not nearly black
    return (values / np.float32(1 if values.max() == 1 else 255)).astype(np.float32)


def sampling(lens: Lens, camera: Camera) -> Sampling:
    """Find where the pixels of straight pictures are in those of a lens.

    Parameters
    ----------
    lens : Lens
        The distortion.
    camera : Camera
        Of the pictures, before and after.

    Returns
    -------
    columns, rows : ndarray (H, W) of float32
        The places, far outside where there is none.
    valid : ndarray (H, W) of bool
        Where there is one.
    """
    pixels, valid = lens.source_pixels(camera)
    pixels[~valid] = -1e4
    columns, rows = (np.ascontiguousarray(pixels[..., axis], np.float32) for axis in (1, 0))
    return columns, rows, valid


def straighten(layer: NDArray[np.float32], places: Sampling) -> NDArray[np.float32]:
    """Take the lens's distortion out of a picture.

    Parameters
    ----------
    layer : ndarray (H, W) or (H, W, 3) of float32
        From 0 to 1; colours multiplied by their mask.
    places : tuple of ndarray
        From :func:`sampling`.

    Returns
    -------
    ndarray
        The same shape, by cubic interpolation, 0 where nothing was photographed.
    """
    import cv2

    columns, rows, valid = places
    # half a pixel at the rim has only one neighbour
    found: Any = cv2.remap(layer, columns, rows, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    found = np.clip(found, 0, 1)
    found[~valid] = 0
    return found  # type: ignore[no-any-return]
