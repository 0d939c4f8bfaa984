"""The backend behind a name of vLLM in this process; vLLM imports these names when it builds a model's layers."""

from __future__ import annotations

from typing import Any

from tessera.integrations.vllm.plugin import version_refusal
from tessera.integrations.vllm.settings import configured

#: vLLM's own backends, for models or settings without Tessera.
_OWN = {
    "Decoder": "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend",
    "CpuLatent": "vllm.v1.attention.backends.mla.cpu_mla.CPUMLABackend",
    "AmxLatent": "vllm.v1.attention.backends.mla.amx_mla.AMXMLABackend",
}


def __getattr__(name: str) -> Any:
    if name not in (*_OWN, "Custom"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.utils.import_utils import resolve_obj_by_qualname

    settings = configured()
    if settings is None:
        if name in _OWN:
            return resolve_obj_by_qualname(_OWN[name])
        raise ValueError("the attention backend CUSTOM is Tessera's: set TESSERA_SPEC, as in TESSERA_SPEC='sink:4 + hqmq:4'")
    import vllm

    why = version_refusal(vllm.__version__)  # first, because the backend imports names that other versions may not have
    if why is not None:
        raise ValueError(f"{settings.text!r} is set, but {why}")
    if name.endswith("Latent"):
        raise ValueError(f"Tessera cannot serve this model with {settings.text!r}: its layers keep latent vectors (MLA)")
    from tessera.integrations.vllm.backend import backend

    return backend(settings)
