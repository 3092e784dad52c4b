"""What all configs share: checks of their values, JSON, defaults that are filled in."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
class Mechanism:
    """A config of one mechanism, by whose name it is read back."""

    mechanism: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON types; `config_from_dict` reads it back."""
        return {"mechanism": self.mechanism, **asdict(self)}

    def _default(self, **values: Any) -> None:
        """Fill in what was left out, that is None."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
