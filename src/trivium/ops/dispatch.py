"""Choose the backend of an operator: once, aloud, and on record.

An operator registers its backends from the slowest to the fastest. "auto" takes the last one that suits the device
and is not missing; what it passed over stands in the reason. A backend asked for by name and missing is an error.
"""

import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trivium.registry import UserError, nearest

__all__ = [
    "Backend",
    "abilities",
    "backends",
    "check_present",
    "choose",
    "chosen",
    "forget",
    "load",
    "observing",
    "operators",
    "register",
    "taken",
]

NAMES = ("auto", "reference", "torch", "native", "triton", "hopper", "fla")

_log = logging.getLogger("trivium")
_registered: dict[str, dict[str, "Backend"]] = {}
_choices: dict[tuple[str, str, str, tuple[tuple[str, Any], ...]], dict[str, str]] = {}
_record: dict[str, dict[str, str]] = {}
_taken: dict[str, list[str]] = {}
_observers: list[Callable[[str, tuple[Any, ...], dict[str, Any]], None]] = []


@dataclass(frozen=True)
class Backend:
    """One way to compute an operator.

    `load` imports and returns the function. `missing` says why it cannot run on this machine, or None. `suits` says
    why "auto" should take it on a device type ("cpu", "cuda"), or None when it should not. `refuses` says why it
    cannot serve a call with the given facts (dtype, widths, whatever the operator tells), or None. `slower` says why
    "auto" leaves such a call to another, though this one could serve it. `remark` says what of such a call a reader of
    the record should know. `lacks` says what of it cannot be had on this machine, though it runs, and what to install.
    """

    load: Callable[[], Callable[..., Any]]
    missing: Callable[[], str | None] = lambda: None
    suits: Callable[[str], str | None] = lambda device_type: None
    refuses: Callable[[Mapping[str, Any]], str | None] = lambda facts: None
    slower: Callable[[Mapping[str, Any]], str | None] = lambda facts: None
    remark: Callable[[Mapping[str, Any]], str | None] = lambda facts: None
    lacks: Callable[[], str | None] = lambda: None


def register(operator: str, name: str, backend: Backend) -> None:
    """Register `backend` as the fastest so far of `operator`."""
    if name not in NAMES[1:]:
        raise ValueError(f"backend {name!r} of {operator}: allowed: {', '.join(NAMES[1:])}")
    _registered.setdefault(operator, {})[name] = backend


def operators() -> list[str]:
    """Return the names of all operators, found in the modules of trivium.ops."""
    package = importlib.import_module("trivium.ops")
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    return sorted(_registered)


def backends(operator: str) -> dict[str, str | None]:
    """Return {backend: None, or why it is missing on this machine}."""
    return {name: backend.missing() for name, backend in _of(operator).items()}


def abilities(operator: str) -> dict[str, str]:
    """Return {backend: "available", with what it lacks all the same, or why it is missing on this machine}."""
    return {name: backend.missing() or _joined("available", backend.lacks()) for name, backend in _of(operator).items()}


def check_present(named: Mapping[str, str]) -> None:
    """Raise UserError if a backend of {operator: backend}, named so in a recipe, is missing on this machine."""
    for operator, backend in named.items():
        found = _of(operator)
        why = None if backend == "auto" or backend not in found else found[backend].missing()
        if why is not None:
            allowed = ", ".join(["auto", *_available(found)])
            raise UserError(f"operator {operator}: backend {backend!r} is missing: {why}; allowed: {allowed}")


def chosen() -> dict[str, dict[str, str]]:
    """Return {operator: {"backend", "reason"}}, the last choice for each operator since `forget`."""
    return {operator: dict(choice) for operator, choice in _record.items()}


def taken() -> dict[str, list[str]]:
    """Return {operator: every backend chosen for it since `forget`}, in the order of their first calls."""
    return {operator: list(names) for operator, names in _taken.items()}


def forget() -> None:
    """Empty what `chosen` and `taken` return: a process may train several runs, and each records its own operators."""
    _record.clear()
    _taken.clear()


def choose(operator: str, requested: str, device_type: str, facts: tuple[tuple[str, Any], ...] = ()) -> str:
    """Return the name of the backend that serves `requested`; raise UserError if it cannot be had.

    `facts` are names and constants of the call that a backend may refuse.
    """
    key = (operator, requested, device_type, facts)
    if key not in _choices:
        name, reason = _decide(operator, requested, device_type, dict(facts))
        _choices[key] = {"backend": name, "reason": reason}
        if _record.get(operator) != _choices[key]:
            _log.info("operator %s on %s: backend %s (%s)", operator, device_type, name, reason)
    _record[operator] = _choices[key]
    name = _choices[key]["backend"]
    if name not in (names := _taken.setdefault(operator, [])):
        names.append(name)
    return name


# torch.compiler.assume_constant_result does this and nothing else, but importing it takes more than a second.
choose.__dict__["_dynamo_marked_constant"] = True


def load(
    operator: str, requested: str, device_type: str, facts: tuple[tuple[str, Any], ...] = ()
) -> Callable[..., Any]:
    """Return the function of the backend that `choose` picks."""
    function = _registered[operator][choose(operator, requested, device_type, facts)].load()
    return function if not _observers else _observed(operator, function)


@contextmanager
def observing(observer: Callable[[str, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Tell `observer` (operator, arguments, keywords) of each call of an operator within, as its backends get them."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _observed(operator: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        for observer in _observers:
            observer(operator, arguments, keywords)
        return function(*arguments, **keywords)

    return call


def _of(operator: str) -> dict[str, Backend]:
    if operator not in _registered and operator not in operators():
        raise UserError(f"unknown operator {operator!r}; {nearest(operator, operators())}")
    return _registered[operator]


def _decide(operator: str, requested: str, device_type: str, facts: Mapping[str, Any]) -> tuple[str, str]:
    found = _of(operator)
    if requested != "auto":
        if requested not in found:
            allowed = nearest(str(requested), ["auto", *_available(found)])
            raise UserError(f"operator {operator}: no backend {requested!r} on this machine; {allowed}")
        check_present({operator: requested})
        why = found[requested].refuses(facts)
        if why is not None:
            raise UserError(
                f"operator {operator}: backend {requested!r} cannot: {why}; backend='auto' finds one that can"
            )
        return requested, _joined("asked for by name", found[requested].remark(facts))
    passed_over = []
    for name, backend in reversed(found.items()):
        suits = backend.suits(device_type)
        if suits is None:
            continue
        why = backend.missing()
        if why is not None:
            passed_over.append(f"{name} is missing: {why}")
            continue
        why = backend.refuses(facts)
        if why is not None:
            passed_over.append(f"{name} cannot: {why}")
            continue
        why = backend.slower(facts)
        if why is not None:
            passed_over.append(f"{name} is slower: {why}")
            continue
        return name, _joined(suits, backend.remark(facts), *passed_over)
    raise UserError(f"operator {operator}: nothing suits {device_type}; allowed: {', '.join(_available(found))}")


def _available(found: Mapping[str, Backend]) -> list[str]:
    # Asked for where an error needs it alone: whether a backend is missing may take seconds to find out.
    return [name for name, backend in found.items() if backend.missing() is None]


def _joined(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)
