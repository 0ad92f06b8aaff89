"""Find implementations by looking into their package: adding a file is all it takes to register one."""

import importlib
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


class UserError(ValueError):
    """Report input that the user can mend; the command line prints it without a traceback and exits with 2."""


def nearest(name: str, known: list[str]) -> str:
    """Return the tail of an error message: the closest known name if there is one, and what is allowed."""
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(known)}"


class Registry:
    """Map names to config classes of one noun ("mixer", "task", "model"), found in the modules of a package.

    The first look-up imports every module of the package, and each module registers its classes with
    :meth:`register`, which also stores the name as the class attribute ``kind``.
    """

    def __init__(self, noun: str, package: str):
        self.noun = noun
        self.package = package
        self._classes: dict[str, type] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[C], C]:
        """Return a class decorator that registers the class as `name`; a name taken twice is an error."""

        def decorate(cls: C) -> C:
            if name in self._classes and self._classes[name].__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.noun} {name!r} is registered twice: {self._classes[name]} and {cls}")
            cls.kind = name  # pyright: ignore[reportAttributeAccessIssue]
            self._classes[name] = cls
            return cls

        return decorate

    def _discover(self) -> None:
        if self._discovered:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, self.package + "."):
            importlib.import_module(module.name)
        self._discovered = True

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        self._discover()
        return sorted(self._classes)

    def get(self, name: str) -> Any:
        """Return the class registered as `name`; raise UserError with the nearest known name otherwise."""
        self._discover()
        if name not in self._classes:
            raise UserError(f"unknown {self.noun} {name!r}; {nearest(name, self.names())}")
        return self._classes[name]
