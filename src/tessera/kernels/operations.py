"""The choice of an operation's implementation: the fastest that can run, or the one that is requested.

An operation has a definition in PyTorch ("reference") and implementations of other families, each with a function of the
operation's arguments that says why it cannot run, or None. One rule applies to all operations:

- "auto": the first family, in the order given, for the tensors' device that can run; else the definition. Where that is slow
  and only an installation is missing, a warning says so once;
- a family by name: it runs. If it cannot, that is an error, or, for the small operations beside the main ones
  (`strict` false), the definition runs. An operation that the family does not have is left to the definition.

`tessera info` prints all operations by family.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tessera.kernels import cpu, triton

#: The values of TESSERA_BACKEND and `backend`.
BACKENDS = ("auto", "reference", "cpu", *(f"cpu:{level}" for level in cpu.LEVELS), "triton")
#: The device of each family of kernels.
DEVICES = {"cpu": "cpu", "triton": "cuda"}

#: All operations, by name.
OPERATIONS: dict[str, Operation] = {}


@dataclass(frozen=True)
class Implementation:
    """An implementation of an operation.

    Attributes:
        family: "reference", "cpu" or "triton".
        module, name: the function's module and name, looked up when it runs.
        refusal: a function of the operation's positional arguments that says why it cannot run, or None.
        levels: whether the function takes `level`, an instruction set, by name.
        asked: whether it runs only where its family is requested.
    """

    family: str
    module: ModuleType
    name: str
    refusal: Callable[..., str | None] = lambda *_: None
    levels: bool = False
    asked: bool = False

    def run(self, *args: Any, level: str | None = None, **options: Any) -> Any:
        """Call the implementation."""
        function = getattr(self.module, self.name)
        return function(*args, level=level, **options) if self.levels else function(*args, **options)


class Operation:
    """A function with several implementations; registered under its name.

    Args:
        name: name of the operation.
        what: a short description.
        definition: the implementation in PyTorch, which can always run.
        implementations: implementations of other families, the preferred first.
        strict: whether it is an error if a requested family cannot run.
        quiet: whether the definition is fast enough to run without a warning.
    """

    def __init__(
        self,
        name: str,
        what: str,
        definition: Implementation,
        implementations: Sequence[Implementation],
        *,
        strict: bool = True,
        quiet: bool = False,
    ) -> None:
        self.name, self.what, self.definition = name, what, definition
        self.implementations = {one.family: one for one in implementations}
        self.strict, self.quiet = strict, quiet
        OPERATIONS[name] = self

    def choose(self, backend: str | None, *args: Any) -> tuple[Implementation, str | None]:
        """The implementation that runs for such arguments, and the instruction set asked for.

        Raises:
            ValueError: if a requested backend cannot run, saying why, or is unknown.
        """
        name = chosen(backend)
        family, _, level = name.partition(":")
        if family == "auto":
            device = _device(args)
            for one in self.implementations.values():
                if DEVICES[one.family] == device and not one.asked and one.refusal(*args) is None:
                    return one, None
            if not self.quiet:
                self._say(device)
        elif family in self.implementations:
            one = self.implementations[family]
            why = one.refusal(*args)
            if why is None:
                return one, level or None
            if self.strict:
                raise ValueError(f"backend {name!r} cannot run: {why}")
        return self.definition, None

    def _say(self, device: str) -> None:
        for family in self.implementations:
            why = missing(family)
            if DEVICES[family] == device and why is not None:
                say_once(self.what, why)

    def __call__(self, *args: Any, backend: str | None = None, **options: Any) -> Any:
        """Run the chosen implementation. args: arguments that the choice depends on; options: further arguments."""
        one, level = self.choose(backend, *args)
        return one.run(*args, level=level, **options)


def chosen(backend: str | None) -> str:
    """Return the backend requested by argument, or else by the environment, or "auto".

    Raises:
        ValueError: if the backend is unknown, or the processor lacks its instructions.
    """
    name = backend or os.environ.get("TESSERA_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"no backend {name!r}; there are {', '.join(BACKENDS)}")
    level = name.partition(":")[2]
    if level and level not in cpu.levels():
        why = cpu.MISSING or f"this processor has {', '.join(cpu.levels())}"
        raise ValueError(f"backend {name!r} cannot run: {why}")
    return name


def missing(family: str) -> str | None:
    """Say why a family's kernels cannot run here for any operation, or return None if they can."""
    return cpu.MISSING if family == "cpu" else triton.missing()


def _device(args: Sequence[Any]) -> str:
    """Return the type of the device of the first tensor or pages."""
    first = args[0]
    while not isinstance(first, Tensor) and isinstance(first, Sequence):
        first = first[0]
    device = first.device
    return device.type if isinstance(device, torch.device) else str(device)


@cache
def say_once(what: str, why: str) -> None:
    """Warn that an operation runs in plain PyTorch, and why; once for each operation and reason."""
    warnings.warn(f"{what} runs in plain PyTorch, which is slow: {why}", stacklevel=6)
