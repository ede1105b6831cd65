"""The one place that decides where the computing is done."""

from __future__ import annotations

from dataclasses import dataclass

#: Names that a user may ask for.
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class DeviceChoice:
    """What was chosen, and a sentence that tells the user why.

    Attributes
    ----------
    name : str
        "cpu" or "cuda".
    reason : str
        A full sentence.
    """

    name: str
    reason: str


def describe_device(requested: str = "auto") -> DeviceChoice:
    """Choose a device and say why.

    Parameters
    ----------
    requested : str
        "auto", "cpu" or "cuda".

    Returns
    -------
    DeviceChoice

    Raises
    ------
    ValueError
        If the name is unknown.
    RuntimeError
        If "cuda" is asked for and cannot be used.

    Examples
    --------
    >>> describe_device("cpu").name
    'cpu'
    """
    if requested not in DEVICES:
        raise ValueError(f"Unknown device {requested!r}: choose one of {', '.join(DEVICES)}.")
    if requested == "cpu":
        return DeviceChoice("cpu", "The CPU is used because it was asked for.")
    if requested == "cuda":
        raise RuntimeError(
            "This version of napari-innergs has no CUDA kernels: use the device 'cpu' or 'auto'."
        )
    return DeviceChoice("cpu", "The CPU is used because this version has no CUDA kernels.")


def set_threads(count: int) -> None:
    """Set the number of CPU threads that the kernels use (by default all, or ``OMP_NUM_THREADS``)."""
    from napari_innergs.cpu import _pool

    _pool.set_threads(count)


def get_threads() -> int:
    """Return the number of CPU threads that the kernels use."""
    from napari_innergs.cpu import _pool

    return _pool.get_threads()
