"""Inspection of attention modules' code: whether they change the cached keys or values, and whether they know windows."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn


def touches(module: nn.Module) -> str | None:
    """Find what a module's `forward` does to the cached keys or values before it calls its attention function.

    The source code is inspected, because running a model could take minutes, and needs all processes of a sharded model.

    Args:
        module: an attention module of the model.

    Returns:
        the expression as written there; None if there is none, or no source code.
    """
    tree = _code(type(module).forward)
    if tree is None:
        return None
    updates = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and _updates(node)]
    if not updates:
        return None
    names = {part.id for node in updates for part in ast.walk(node.targets[0]) if isinstance(part, ast.Name)}
    since = min(node.lineno for node in updates)
    asked = set(_assigned(tree, "ATTENTION_FUNCTIONS"))
    other = {"_attn_implementation", *_assigned(tree, "_attn_implementation")}
    for parent, child in _edges(tree, module, other):
        if not (isinstance(child, ast.Name) and child.id in names and isinstance(child.ctx, ast.Load) and child.lineno > since):
            continue
        handed = parent.value if isinstance(parent, ast.keyword) else child
        given = isinstance(parent, ast.Call) and handed in parent.args and isinstance(parent.func, ast.Name)
        if isinstance(parent, ast.keyword) or (given and parent.func.id in asked):  # type: ignore[attr-defined]
            continue
        if any(child is part for node in updates for part in ast.walk(node)):
            continue
        return ast.unparse(parent).split("\\n")[0][:80]
    return None


def windowed(module: nn.Module) -> bool:
    """Whether a module's code knows a sliding window, or its file makes masks with one; True if there is no source code."""
    if hasattr(module, "sliding_window"):
        return True
    try:
        own = inspect.getsource(type(module))
        file = inspect.getsource(sys.modules[type(module).__module__])
    except (KeyError, OSError, TypeError):
        return True
    return "sliding_window" in own or "create_sliding_window" in file or "create_masks_for_generate" in file


@cache
def _code(function: Callable[..., Any]) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None


def _updates(node: ast.Assign) -> bool:
    """Whether it is `keys, values = cache.update(keys, values, index)`."""
    target, call = node.targets[0], node.value
    pair = isinstance(target, ast.Tuple) and len(target.elts) == 2
    return pair and isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "update"


def _assigned(tree: ast.AST, word: str) -> Iterator[str]:
    """Variables that are given a value in which a word occurs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and word in ast.unparse(node.value):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name):
                yield target.id


def _edges(node: ast.AST, module: nn.Module, other: set[str]) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Walk over all parents and children, without code that an option or another attention disables, and without stores."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and (_off(child.test, module) or any(word in ast.unparse(child.test) for word in other)):
            continue
        if isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Subscript) and isinstance(child.value, ast.Tuple):
            continue
        yield node, child
        yield from _edges(child, module, other)


def _off(test: ast.AST, module: nn.Module) -> bool:
    """Whether it tests an attribute, as `self.x` or `self.x is not None`, that this module lacks or has switched off."""
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot) and ast.unparse(test.comparators[0]) == "None":
        test = test.left
    if not (isinstance(test, ast.Attribute) and isinstance(test.value, ast.Name) and test.value.id == "self"):
        return False
    found = getattr(module, test.attr, None)
    return found is None or found is False
