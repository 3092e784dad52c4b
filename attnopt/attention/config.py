"""What all configs share: their name, their JSON, checks of their values, defaults filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

BACKENDS = ("auto", "triton", "eager", "reference")


def check_count(name: str, value: Any, minimum: int) -> None:
    """Raise a ValueError for anything but a whole number of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}; got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a ValueError for anything that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise a ValueError for anything but True and False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")


@dataclass(frozen=True)
class Config:
    """What replaces a layer's attention: a frozen dataclass that travels as JSON.

    A subclass says its name, by which it is read back, and what implements it: the class of its
    `AttentionMechanism`, or "module:class", which is imported when a layer is first built.
    """

    mechanism: ClassVar[str]
    implementation: ClassVar[Any]

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON types; `config_from_dict` reads it back."""
        return {"mechanism": self.mechanism, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """Read back the fields that `to_dict` wrote.

        Args:
            data: the fields by name, as Python or JSON made them.

        Returns:
            The config; equal to the one written.

        Raises:
            ValueError: an unknown or missing field, or a value the config refuses.
        """
        return build_from_fields(cls, cls.mechanism, data)

    def _default(self, **values: Any) -> None:
        """Fill in what was left out, that is None."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


def build_from_fields(cls: Any, name: str, data: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from its fields.

    Args:
        cls: the dataclass.
        name: what messages call it.
        data: the fields by name.

    Returns:
        The instance.

    Raises:
        ValueError: an unknown or missing field, or a value the class refuses.
    """
    known = [field.name for field in fields(cls)]
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"{name} has the fields {', '.join(known)}; got {', '.join(unknown)}")
    try:
        return cls(**data)
    except TypeError as error:
        raise ValueError(f"{name} needs the fields {', '.join(known)}; got {data}") from error
