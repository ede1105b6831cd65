"""Settings of a reconstruction from photographs and X-rays of one object."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

DualPresetName = Literal["fast", "balanced", "best"]
Reference = Literal["fdk", "tv"]

DUAL_PRESETS: tuple[DualPresetName, ...] = get_args(DualPresetName)


def _basic(default: Any, title: str, description: str, **limits: Any) -> Any:
    return Field(
        default, title=title, description=description, json_schema_extra={"group": "basic"}, **limits
    )


def _advanced(default: Any, title: str, description: str, **limits: Any) -> Any:
    return Field(
        default, title=title, description=description, json_schema_extra={"group": "advanced"}, **limits
    )


class DualConfig(BaseModel):
    """Settings of a reconstruction from photographs and X-rays.

    Every field has a title and a description with its unit; the widgets' forms, the command line's help and the
    YAML files are made from them. Fields are grouped as ``basic`` or ``advanced``.

    Examples
    --------
    >>> DualConfig.preset("fast").photo_steps < DualConfig.preset("best").photo_steps
    True
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    xray: Literal["fast", "balanced", "best"] = _basic(
        "balanced", "X-ray preset", "Preset of the reconstruction of the attenuation."
    )
    photo_steps: int = _basic(
        1200, "Photo steps", "Steps of the fit to the photographs, one photograph each.", ge=1, le=200_000
    )
    joint_steps: int = _basic(
        300,
        "Joint steps",
        "Steps in which photographs and X-rays are fitted together, one photograph and one view each.",
        ge=0,
        le=200_000,
    )
    hull: bool = _basic(
        True,
        "Outline in the X-rays",
        "With fewer than 20 views: no attenuation where the masks see no object.",
    )
    refine_cameras: bool = _basic(
        False, "Refine cameras", "Also refine the cameras' places and directions in the joint steps."
    )
    silhouettes: bool = _advanced(
        True, "Silhouettes", "Refine the alignment on the outlines in the photographs' masks."
    )
    candidate: int = _advanced(
        0,
        "Candidate",
        "Which of several poses that cannot be told apart is taken, 0 being the best.",
        ge=0,
        le=1000,
    )
    harmonics: int = _advanced(
        1,
        "Harmonics",
        "Degree of the spherical harmonics: 0 for colours that look alike from everywhere.",
        ge=0,
        le=3,
    )
    max_splats: int = _advanced(
        20_000, "Most on the surface", "Limit of the number of Gaussians with colour.", ge=100, le=2_000_000
    )
    structural_loss: float = _advanced(
        0.2, "D-SSIM share", "Share of D-SSIM in the loss of photographs, the rest being L1.", ge=0.0, le=1.0
    )
    joint_rate: float = _advanced(
        1.0, "Joint rate", "Factor on the rates of the joint steps.", gt=0.0, le=100.0
    )
    pull: float = _advanced(
        0.05,
        "Pull of the X-rays",
        "How strongly X-rays move Gaussians of the surface, as a share of the photographs' own pull.",
        ge=0.0,
        le=10.0,
    )
    reference_weight: float = _advanced(
        0.0,
        "Reference weight",
        "Weight of a loss that compares sections of the Gaussians with those of a conventional reconstruction.",
        ge=0.0,
        le=100.0,
    )
    reference: Reference = _advanced(
        "tv",
        "Reference",
        "What sections are compared with: filtered backprojection or total variation.",
    )
    shell: float = _advanced(
        1.5, "Shell", "Half the thickness of the coloured shell, voxels.", gt=0.0, le=50.0
    )

    @classmethod
    def preset(cls, name: str) -> DualConfig:
        """Return the settings of a named preset.

        Parameters
        ----------
        name : {"fast", "balanced", "best"}
            The preset.

        Raises
        ------
        ValueError
            If there is no preset of that name.
        """
        if name not in _PRESETS:
            raise ValueError(f"config: there is no preset {name!r}; use one of {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name])

    @classmethod
    def coerce(cls, config: DualConfig | str | dict[str, Any] | None) -> DualConfig:
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
        if not isinstance(config, dict):
            raise TypeError(
                f"config: expected settings, a preset name or a mapping, got {type(config).__name__}"
            )
        settings = dict(config)
        base = str(settings.pop("preset", "balanced"))
        if base not in _PRESETS:
            raise ValueError(f"config: there is no preset {base!r}; use one of {', '.join(_PRESETS)}")
        try:
            return cls(**{**_PRESETS[base], **settings})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                known = ", ".join(cls.model_fields)
                raise ValueError(f"config: there is no setting {name!r}; use one of {known}") from None
            raise ValueError(f"config: {name} = {first.get('input')!r}: {first['msg']}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> DualConfig:
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


_PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "xray": "fast",
        "photo_steps": 500,
        "joint_steps": 100,
        "max_splats": 8000,
        "harmonics": 0,
    },
    "balanced": {},
    "best": {"xray": "best", "photo_steps": 3000, "joint_steps": 600, "max_splats": 40_000, "harmonics": 2},
}
