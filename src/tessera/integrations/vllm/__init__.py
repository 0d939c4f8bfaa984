"""vLLM with packed pages: `TESSERA_SPEC="sink:4 + hqmq:4" vllm serve MODEL`.

vLLM calls `register` in each of its processes. Where no specification is given nothing changes; where one is given, models'
keys and values lie in the codec's bytes in vLLM's own pool, and attention reads them there. `docs/vllm.md` says how to use it,
`settings.py` what can be set, and `refusals.py` what cannot be served.
"""

from tessera.integrations.vllm.plugin import register

__all__ = ["register"]
