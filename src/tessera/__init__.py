"""Tessera: a bounded, compressed, persistent memory for Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tessera.version import VERSION

if TYPE_CHECKING:
    from tessera import associative as associative
    from tessera import attachment as attachment
    from tessera import attention as attention
    from tessera import cache as cache
    from tessera import codecs as codecs
    from tessera import evaluation as evaluation
    from tessera import kernels as kernels
    from tessera import models as models
    from tessera import spatial as spatial
    from tessera import tensor_cache as tensor_cache
    from tessera import tensor_memory as tensor_memory
    from tessera.adapters import attach, detach, load_memory, save_memory
    from tessera.attention import disable, enable, using
    from tessera.cache import Cache, CacheReport
    from tessera.planning import plan

__version__ = VERSION

__all__ = ["Cache", "CacheReport", "attach", "detach", "disable", "enable", "load_memory", "plan", "save_memory", "using"]

#: The modules of the public names. They are imported at first use, so that the codecs need torch only.
_HOMES = {
    "Cache": "tessera.cache",
    "CacheReport": "tessera.cache",
    "attach": "tessera.adapters",
    "detach": "tessera.adapters",
    "disable": "tessera.attention",
    "enable": "tessera.attention",
    "load_memory": "tessera.adapters",
    "plan": "tessera.planning",
    "save_memory": "tessera.adapters",
    "using": "tessera.attention",
}
#: Packages that are available after `import tessera`. They are imported at first use, too.
_PACKAGES = (
    *("adapters", "attention", "cache", "codecs", "evaluation", "kernels", "models", "tensor_cache", "tensor_memory"),
    *("associative", "attachment", "spatial"),  # the names of version 0.1
)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _PACKAGES:
        return import_module(f"tessera.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'tessera' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PACKAGES})
