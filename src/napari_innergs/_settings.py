"""What the settings of all tasks share: presets, mappings and YAML, one sentence for what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError


def basic(default: Any, title: str, description: str, **limits: Any) -> Any:
    """Return a field that forms show at once."""
    return Field(
        default, title=title, description=description, json_schema_extra={"group": "basic"}, **limits
    )


def advanced(default: Any, title: str, description: str, **limits: Any) -> Any:
    """Return a field that forms show on request."""
    return Field(
        default, title=title, description=description, json_schema_extra={"group": "advanced"}, **limits
    )


class Settings(BaseModel):
    """Immutable settings with named presets, of which "balanced" is the default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: What differs from the defaults, by the name of the preset.
    presets: ClassVar[dict[str, dict[str, Any]]] = {"balanced": {}}

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return the settings of a named preset.

        Parameters
        ----------
        name : str
            One of `presets`.

        Raises
        ------
        ValueError
            If there is no preset of that name.
        """
        return cls(**cls._base(name))

    @classmethod
    def _base(cls, name: str) -> dict[str, Any]:
        if name not in cls.presets:
            raise ValueError(f"config: there is no preset {name!r}; use one of {', '.join(cls.presets)}")
        return cls.presets[name]

    @classmethod
    def coerce(cls, config: Settings | str | dict[str, Any] | None) -> Self:
        """Turn a preset name, a mapping, None or settings into settings.

        Raises
        ------
        ValueError
            If a field is unknown or out of range; the message names the field.
        TypeError
            If it is none of these, or the settings of another task.
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
        base = cls._base(str(settings.pop("preset", "balanced")))
        try:
            return cls(**{**base, **settings})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                known = ", ".join(cls.model_fields)
                raise ValueError(f"config: there is no setting {name!r}; use one of {known}") from None
            raise ValueError(f"config: {name} = {first.get('input')!r}: {first['msg']}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
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
