"""Settings of a model: a JSON file whose fields are checked as they are taken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm_buildhost.errors import BuildError

FETCH_AGAIN = "fetch the directory again from where the model was published"
MOST = 1 << 24
"""No size of a model is above this; what follows from a size must not grow without bound."""
_SUPPORTED_ELSEWHERE = "choose another model"


class Settings:
    """A JSON object of a file, or an object inside it; every complaint names the file and the field."""

    def __init__(self, path: Path, fields: Mapping[str, Any], inside: str = "") -> None:
        """The object `fields` of `path`, which lies under `inside`, as in `text_config.`."""
        self.path = path
        self._fields = fields
        self._inside = inside

    @classmethod
    def read(cls, path: Path) -> Settings:
        """The whole file; raises BuildError when it is missing or holds no JSON object."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BuildError(f"{path}: missing", "give a directory that holds a whole model") from None
        except (ValueError, RecursionError) as error:
            raise BuildError(f"{path}: not JSON: {error}", FETCH_AGAIN) from error
        if not isinstance(value, dict):
            raise BuildError(f"{path}: should hold a JSON object", FETCH_AGAIN)
        return cls(path, value)

    @classmethod
    def read_if_there(cls, path: Path) -> Settings:
        """As `read`, without fields where there is no such file."""
        return cls.read(path) if path.exists() else cls(path, {})

    def with_defaults(self, defaults: Mapping[str, Any]) -> Settings:
        """The same settings, with `defaults` for fields that are absent; a null is not absent."""
        return Settings(self.path, {**defaults, **self._fields}, self._inside)

    def with_fields(self, fields: Mapping[str, Any]) -> Settings:
        """The same settings, with these fields in place of their own."""
        return Settings(self.path, {**self._fields, **fields}, self._inside)

    def get(self, field: str) -> Any:
        """The value as it is, None where it is absent or null."""
        return self._fields.get(field)

    def section(self, field: str) -> Settings | None:
        """The object of that name, None where it is absent, null or empty."""
        value = self._fields.get(field)
        if not value:
            return None
        if not isinstance(value, dict):
            raise self.wrong(field, "an object")
        return Settings(self.path, value, f"{self._inside}{field}.")

    def text(self, field: str) -> str:
        """A string."""
        value = self._fields.get(field)
        if not isinstance(value, str):
            raise self.wrong(field, "a text")
        return value

    def texts(self, field: str) -> tuple[str, ...] | None:
        """A list of strings, None where it is absent or null."""
        value = self._fields.get(field)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(field, "a list of texts")
        return tuple(value)

    def positive(self, field: str, default: int | None = None, *, most: int = MOST) -> int:
        """An integer from 1 to `most`; null counts as absent."""
        value = self._fields.get(field)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.wrong(field, "a positive integer")
        if value > most:
            raise self.wrong(field, f"at most {most}")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A finite number above 0; null counts as absent."""
        value = self.optional_number(field)
        value = default if value is None else value
        if value is None:
            raise self.wrong(field, "a positive number")
        return value

    def optional_number(self, field: str) -> float | None:
        """A finite number above 0, or None where it is absent or null."""
        value = self._fields.get(field)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.wrong(field, "a positive number")
        return float(value)

    def flag(self, field: str) -> bool:
        """True or false; absent and null are false."""
        value = self._fields.get(field)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(field, "true or false")
        return bool(value)

    def must_be(self, field: str, allowed: tuple[object, ...]) -> None:
        """Raises BuildError if the field has a value that is not `allowed`; absent counts as the first."""
        value = self._fields.get(field, allowed[0])
        if value not in allowed:
            names = ", ".join(str(item) for item in allowed if item is not None)
            supported = f"supported: {names}; " if names else ""
            raise self.error(field, f"{value!r} is not supported", f"{supported}{_SUPPORTED_ELSEWHERE}")

    def wrong(self, field: str, expected: str) -> BuildError:
        """The error for a value of another kind."""
        return self.error(field, f"should be {expected}, found {self._fields.get(field)!r}")

    def error(self, field: str, message: str, hint: str = FETCH_AGAIN) -> BuildError:
        """An error that begins with the file and the field."""
        return BuildError(f"{self.path}: {self._inside}{field} {message}", hint)
