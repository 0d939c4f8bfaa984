"""The entry point of vLLM's plugin loader, which registers the backend.

vLLM's CPU platform asks for the backend named CPU_ATTN and hears no other name, so this name is given to a module that answers
with Tessera's backend where a specification is set, and with vLLM's own where none is. On a GPU the name is CUSTOM
(`--attention-backend CUSTOM`).
"""

from __future__ import annotations

#: Versions of vLLM: the first that was tested, and the first newer one that was not.
SUPPORTED = ((0, 31), (0, 34))


def register() -> None:
    """Make the backend known to vLLM. May be called any number of times, and does nothing else."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    names = AttentionBackendEnum.__members__
    for name, chosen in (("CPU_ATTN", "Decoder"), ("CUSTOM", "Custom"), ("CPU_MLA", "CpuLatent"), ("AMX_MLA", "AmxLatent")):
        if name in names:
            register_backend(names[name], f"tessera.integrations.vllm.chosen.{chosen}")


def version_refusal(version: str) -> str | None:
    """Say why a version of vLLM is not supported, or return None if it is."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    low, high = SUPPORTED
    if low <= numbers < high:
        return None
    first, last = ".".join(map(str, low)), f"{high[0]}.{high[1] - 1}"
    return f"Tessera serves in vLLM {first} to {last}; this is {version}"
