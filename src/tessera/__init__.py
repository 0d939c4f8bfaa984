"""Tessera: a bounded, compressed, persistent memory for Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tessera.attachment import attach, detach, load_memory, save_memory
    from tessera.attention import disable, enable
    from tessera.cache import Cache, CacheReport
    from tessera.planning import plan

__version__ = "0.1.0"

__all__ = ["Cache", "CacheReport", "attach", "detach", "disable", "enable", "load_memory", "plan", "save_memory"]

#: Where the public names are. They are imported when first used, so that the codecs need torch only.
_HOMES = {
    "Cache": "tessera.cache",
    "CacheReport": "tessera.cache",
    "attach": "tessera.attachment",
    "detach": "tessera.attachment",
    "disable": "tessera.attention",
    "enable": "tessera.attention",
    "load_memory": "tessera.attachment",
    "plan": "tessera.planning",
    "save_memory": "tessera.attachment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tessera' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
