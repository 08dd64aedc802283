"""Classes of the user's own, which a setting names as module:Class."""

from __future__ import annotations

import importlib
from typing import TypeVar

from bclip_fast.errors import UserError, first_line

T = TypeVar("T")


def import_class(setting: str, name: str, base: type[T], public: str) -> type[T]:
    """Return the class `name`, module:Class.

    Args:
        setting: name of the setting, for messages.
        base, public: class from which it must be derived, and the name by which users know it.

    Raises:
        UserError: it cannot be imported, or is not derived from `base`. Importing runs the user's code, so any of its
            exceptions counts.
    """
    module, _, attribute = name.partition(":")
    try:
        own = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{setting}={name} cannot be imported: {error}; set PYTHONPATH to its folder") from error
    except Exception as error:
        raise UserError(
            f"{setting}={name} cannot be imported: {type(error).__name__}: {first_line(error)}; mend the module, and "
            "check its name"
        ) from error
    if not (isinstance(own, type) and issubclass(own, base)):
        raise UserError(f"{setting}={name} must be a class derived from {public}")
    return own
