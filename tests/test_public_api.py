"""The public names are fixed here, because users' code depends on them."""

from __future__ import annotations

import subprocess
import sys

import tessera
from tessera import (
    adapters,
    associative,
    attachment,
    cache,
    codecs,
    evaluation,
    kernels,
    models,
    planning,
    spatial,
    tensor_cache,
    tensor_memory,
)


def test_names_are_these() -> None:
    assert tessera.__all__ == [
        *("Cache", "CacheReport", "attach", "detach", "disable", "enable", "load_memory", "plan", "save_memory"),
        "using",
    ]
    assert sorted(codecs.__all__) == [
        *("Blocks", "Codec", "FP8", "HQMQ", "Int", "JointHQMQ", "KeyStats", "Kivi", "Packed", "Pair", "Role", "Scalar"),
        *("examples", "get", "load_stats", "names", "save_stats"),
    ]
    assert cache.__all__ == ["BLOCK", "Cache", "CacheReport", "PerLayer", "Prefill", "Spec", "TruncatedBPTTCache", "parse"]
    assert evaluation.__all__ == ["Comparison", "Row", "Source", "compare", "load", "load_all", "read_text", "save_all"]
    assert tensor_cache.__all__ == ["TensorCache", "TensorCacheConfig", "TensorCacheState"]
    assert tensor_memory.__all__ == ["TensorMemory", "TensorMemoryConfig", "TensorMemoryState"]
    assert adapters.__all__ == [
        *("AttachedMemory", "attach", "attached_memory", "attention_modules", "detach", "install", "load_memory"),
        *("memory_parameters", "reading", "save_memory", "tensor_cache"),
    ]
    assert planning.__all__ == ["Plan", "PlanRow", "parse_bytes", "parse_rate", "parse_tokens", "plan"]
    assert models.__all__ == [
        *(
            "GPT",
            "GPTConfig",
            "ViT",
            "ViTConfig",
            "demo_memory_path",
            "demo_path",
            "heldout_files",
            "heldout_text",
            "load_demo",
        ),
    ]
    assert kernels.__all__ == ["AttendParams", "CompressedKV", "attend", "decode", "merge", "nearest", "nearest_directions"]
    assert kernels.Pages is kernels.CompressedKV


def test_every_name_is_there() -> None:
    for module in (tessera, adapters, codecs, cache, evaluation, kernels, models, planning, tensor_cache, tensor_memory):
        for name in module.__all__:
            assert getattr(module, name) is not None


def test_codecs_can_be_used_without_transformers() -> None:
    """Codecs import torch only; a process that has used one has not loaded transformers."""
    script = (
        "import sys, torch, tessera.codecs as c; p = c.get('hqmq:3').encode(torch.randn(1, 1, 2, 64)); p.decode(); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_packages_go_by_their_names_of_0_1_too() -> None:
    for old, new in ((associative, tensor_cache), (spatial, tensor_memory), (attachment, adapters)):
        assert {name: getattr(new, name) for name in old.__all__} == {name: getattr(old, name) for name in old.__all__}
