"""Strategies of drawn inputs: every module here is imported, and registers its operations."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
