"""Finds a function of the user's by the name that a setting gives it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from aepo_fast.config.errors import ConfigError


def import_function(key: str, name: str) -> Callable[..., Any]:
    """Import "module:function", the value of the setting `key`; raises ConfigError.

    Modules of the working directory are found too.
    """
    module_name, function_name = name.split(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when imported
        reason = f"importing {module_name!r} failed: {type(error).__name__}: {error}"
        fix = "Correct the module, or run where it can be imported"
        raise ConfigError(key, name, reason, fix) from error
    function = vars(module).get(function_name)
    if not callable(function):
        reason = f"the module {module_name!r} has no function {function_name!r}"
        raise ConfigError(key, name, reason, "Correct the name")
    return function
