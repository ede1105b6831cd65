"""Settings: one source for widgets, the command line, YAML files and the report of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

Method = Literal["nearest", "linear", "cubic", "pchip", "flow-dis", "flow-tvl1"]
GaussianField = Literal["normalised", "additive"]
Motion = Literal["off", "stack", "slice"]
Combine = Literal["learned", "best", "average"]
PresetName = Literal["fast", "balanced", "best", "innergs-paper"]

METHODS: tuple[Method, ...] = get_args(Method)
PRESETS: tuple[PresetName, ...] = get_args(PresetName)


def _basic(default: Any, title: str, description: str, **limits: Any) -> Any:
    return Field(
        default, title=title, description=description, json_schema_extra={"group": "basic"}, **limits
    )


def _advanced(default: Any, title: str, description: str, **limits: Any) -> Any:
    return Field(
        default, title=title, description=description, json_schema_extra={"group": "advanced"}, **limits
    )


class SliceConfig(BaseModel):
    """Settings of a slices-to-volume reconstruction.

    Every field has a title and a description with its unit; the widgets' forms, the command line's help and the
    YAML files are made from them. Fields are grouped as ``basic`` or ``advanced``.

    Examples
    --------
    >>> SliceConfig.preset("fast").iterations < SliceConfig.preset("best").iterations
    True
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    combine: Combine = _basic(
        "learned",
        "Combination",
        "learned: weights that vary in space, learned from the stack itself; best: the one candidate that "
        "predicts left-out slices best; average: plain mean of all candidates.",
    )
    denoise: Literal["auto", "off"] = _basic(
        "auto",
        "Noise",
        "auto: estimate the noise and denoise the slices (total variation) before interpolating when there is "
        "some; off: trust every pixel.",
    )
    uncertainty: bool = _basic(
        True, "Uncertainty", "Also return the half-width of the 90 % band of the error, in intensity units."
    )
    motion: Motion = _basic(
        "off",
        "Motion",
        "Several stacks: find the rigid motion of each stack (as a whole) or of each slice, together with "
        "the volume.",
    )
    match_intensity: bool = _basic(
        True,
        "Match intensities",
        "Several stacks: bring their contrasts to that of the first by gain and offset.",
    )
    robust: bool = _basic(
        True,
        "Robust",
        "With motion: trust pixels and slices less that no volume explains (artefacts, outliers).",
    )
    methods: tuple[Method, ...] = _advanced(
        METHODS, "Conventional", "Conventional candidates to compute, compare and combine."
    )
    gaussians: tuple[GaussianField, ...] = _advanced(
        ("normalised",), "Gaussian fields", "Gaussian candidates to fit; empty for none."
    )
    gaussian_spacing: float = _advanced(
        2.0, "Spacing", "Distance between Gaussian centres within a slice, in pixels.", ge=1.0, le=16.0
    )
    through_sigma: float = _advanced(
        0.7,
        "Through sigma",
        "Standard deviation of the Gaussians through the plane, in slice gaps.",
        ge=0.2,
        le=1.0,
    )
    volume_spacings: tuple[float, ...] = _advanced(
        (2.0, 2.5, 3.2),
        "Volume spacings",
        "Thick slices: distances between Gaussian centres of the fields that are fitted, in voxels; a field each.",
    )
    iterations: int = _advanced(40, "Iterations", "Adam steps of each Gaussian fit.", ge=0, le=5000)
    densify: bool = _advanced(
        False,
        "Densify",
        "Add Gaussians where the observed slices are not explained, remove those without weight.",
    )
    shear_from_flow: bool = _advanced(
        True, "Flow shear", "Start the Gaussians' shear from the optical flow between neighbouring slices."
    )

    structural_loss: float = _advanced(
        0.0,
        "D-SSIM share",
        "Share of D-SSIM in the loss, the rest being L1; 0 means a squared loss.",
        ge=0.0,
        le=1.0,
    )

    @field_validator("methods", "gaussians")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        # keep the first of each: twice the same candidate is no evidence
        return tuple(dict.fromkeys(value))

    @field_validator("volume_spacings")
    @classmethod
    def _spacings(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 1.2 <= spacing <= 16 for spacing in value):
            raise ValueError("each spacing must be from 1.2 to 16 voxels")
        return tuple(dict.fromkeys(value))

    @field_validator("denoise", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare `off` as false
        return "off" if value is False else value

    @classmethod
    def preset(cls, name: str) -> SliceConfig:
        """Return the settings of a named preset.

        Parameters
        ----------
        name : {"fast", "balanced", "best", "innergs-paper"}
            The preset.

        Raises
        ------
        ValueError
            If there is no preset of that name.
        """
        if name not in _SLICE_PRESETS:
            raise ValueError(f"config: there is no preset {name!r}; use one of {', '.join(_SLICE_PRESETS)}")
        return cls(**_SLICE_PRESETS[name])

    @classmethod
    def coerce(cls, config: SliceConfig | str | dict[str, Any] | None) -> SliceConfig:
        """Turn a preset name, a mapping, None or settings into settings.

        Raises
        ------
        ValueError
            If a field is unknown or out of range; the message names the field.
        """
        if config is None:
            return cls.preset("balanced")
        if isinstance(config, cls):
            return config
        if isinstance(config, str):
            return cls.preset(config)
        if isinstance(config, dict):
            settings = dict(config)
            base = _SLICE_PRESETS.get(str(settings.pop("preset", "balanced")))
            if base is None:
                raise ValueError(
                    f"config: there is no preset {config['preset']!r}; use one of {', '.join(PRESETS)}"
                )
            try:
                return cls(**{**base, **settings})
            except ValidationError as error:
                first = error.errors()[0]
                if first["type"] == "extra_forbidden":
                    known = ", ".join(cls.model_fields)
                    raise ValueError(
                        f"config: there is no setting {first['loc'][0]!r}; use one of {known}"
                    ) from None
                field = ".".join(str(part) for part in first["loc"])
                raise ValueError(f"config: {field} = {first.get('input')!r}: {first['msg']}") from None
        raise TypeError(f"config: expected settings, a preset name or a mapping, got {type(config).__name__}")

    @classmethod
    def from_yaml(cls, path: str | Path) -> SliceConfig:
        """Read settings from a YAML file (`preset` may name the base)."""
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"config: {path} is not YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(content, dict):
            raise ValueError(f"config: {path} holds {type(content).__name__}, expected a mapping of settings")
        return cls.coerce(content)

    def to_yaml(self, path: str | Path) -> None:
        """Write the settings to a YAML file that `from_yaml` reads."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


_SLICE_PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "methods": ("nearest", "linear", "cubic", "pchip", "flow-dis"),
        "gaussian_spacing": 2.5,
        "volume_spacings": (2.5,),
        "iterations": 15,
    },
    "balanced": {},
    "best": {
        "gaussians": ("normalised", "additive"),
        "volume_spacings": (1.7, 2.0, 2.5, 3.2),
        "iterations": 100,
    },
    "innergs-paper": {
        "methods": (),
        "gaussians": ("additive",),
        "combine": "best",
        "denoise": "off",
        "shear_from_flow": False,
        "densify": True,
        "structural_loss": 0.2,
        "iterations": 300,
        "uncertainty": False,
    },
}
