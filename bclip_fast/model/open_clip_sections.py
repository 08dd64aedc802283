"""Tables of an open_clip_config.json, of which no key may be ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bclip_fast.errors import UserError

from .tower_config import Json

CONFIG_FILE = "open_clip_config.json"


class Section:
    """A table of the file. Keys that remain when reading finishes are an error, so that no setting is ignored."""

    _REQUIRED = object()

    def __init__(self, name: str, content: Json) -> None:
        self.name = name
        self.remaining = dict(content)

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Take a key. Raises UserError if it is missing and has no default."""
        if key not in self.remaining and default is self._REQUIRED:
            raise UserError(f"{CONFIG_FILE}: {self.name} lacks {key}")
        return self.remaining.pop(key, default)

    def take_table(self, key: str) -> Json:
        """Take a key whose value must be a table."""
        return table({key: self.take(key)}, key)

    def take_either(self, key: str, old_key: str, default: Any) -> Any:
        """Take a key that open_clip renamed in 2.23."""
        value, old_value = self.take(key, None), self.take(old_key, None)
        if value is not None and old_value is not None and value != old_value:
            raise UserError(f"{CONFIG_FILE}: {self.name}.{key}={value!r} contradicts {old_key}={old_value!r}")
        return next((item for item in (value, old_value) if item is not None), default)

    def expect(self, key: str, *values: Any) -> None:
        """Take a key whose value must be one of `values`. The first is the meaning of a missing key."""
        value = self.take(key, values[0])
        if value not in values or isinstance(value, bool) != isinstance(values[0], bool):
            supported = " or ".join(repr(value) for value in values)
            raise UserError(f"{CONFIG_FILE}: {self.name}.{key}={value!r} must be {supported}")

    def finish(self) -> None:
        """Raise UserError if a key remains."""
        if self.remaining:
            names = ", ".join(sorted(map(str, self.remaining)))
            raise UserError(f"{CONFIG_FILE}: {self.name} has unsupported keys: {names}")


def table(config: Any, key: str) -> Json:
    """The table under a key. Raises UserError if it is missing."""
    value = config.get(key) if isinstance(config, Mapping) else None
    if not isinstance(value, dict):
        raise UserError(f"{CONFIG_FILE}: {key} is missing or isn't a table")
    return value
