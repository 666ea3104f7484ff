"""Values out of a mapping that a file holds: checked, remembered, and a wrong one told with its place."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from maestrale.errors import ConfigError, shown

MAX_SIZE = (1 << 31) - 1  # no dimension, nor a text, comes near; keeps every product inside 64 bits
T = TypeVar("T")


def whole(name: str, value: Any, source: str = "", limit: int = MAX_SIZE) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
        where = f"{source}: " if source else ""
        raise ConfigError(f"{where}{name} = {shown(value)}: expected a whole number from 1 to {limit}")
    return value


class ValueReader:
    """Takes values out of a mapping, remembers which, and says where a wrong one stands."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = ""):
        self.values, self.source, self.prefix = values, source, prefix
        self.used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.used.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, key: str, why: str) -> None:
        if self.get(key) not in (None, False):
            raise ConfigError(f"{self.source}: {self.prefix}{key} is set: {why}")

    def whole(self, key: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
        value = self.get(key, default)
        if value is None:
            raise ConfigError(f"{self.source}: {self.prefix}{key} is missing: expected a whole number")
        return whole(self.prefix + key, value, self.source, limit)

    def optional_whole(self, *keys: str) -> int | None:
        found = [value for key in keys if (value := self.get(key)) is not None]
        return whole(keys[0], found[0], self.source) if found else None

    def number(self, key: str, default: float) -> float:
        return self.as_number(key, self.get(key), default)

    def as_number(self, key: str, value: Any, default: float) -> float:
        self.used.add(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{self.source}: {self.prefix}{key} = {shown(value)}: expected a finite number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.source}: {self.prefix}{key} = {shown(value)}: expected true or false")
        return value

    def mapping(self, key: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.source}: {self.prefix}{key} = {shown(value)}: expected an object")
        return value

    def build(self, kind: Callable[..., T], **values: Any) -> T:
        """kind(**values), whose errors get the file's name."""
        try:
            return kind(**values)
        except ConfigError as error:
            raise ConfigError(f"{self.source}: {error}") from None

    def warn_unknown(self, *silent: str) -> None:
        unknown = sorted(set(self.values) - self.used - set(silent))
        if unknown:
            names = ", ".join(self.prefix + name for name in unknown)
            warnings.warn(f"{self.source}: ignoring unknown keys: {names}", stacklevel=3)
