"""Program of each process in `test_tensor_parallel.py`: torchrun starts it for each rank; run alone, it has the whole model."""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM

import tessera

SPECS = ("dense", "sink:4 + int:4 + recent:32", "sink:4 + hqmq:4 + recent:32", "sink:4 + window:64")


def generate(model: Any, cache: tessera.Cache) -> list[list[int]]:
    """Generate after two prompts, one of which is padded."""
    torch.manual_seed(0)
    ids = torch.randint(3, 97, (2, 300))
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    made = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=10, do_sample=False, pad_token_id=0)
    return made[:, 300:].tolist()


def refused(call: Any) -> str:
    """Return the message of the error that a call raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path, out: Path) -> None:
    """Generate with every cache, and write the results by process."""
    rank, spread = int(os.environ.get("RANK", "0")), "RANK" in os.environ
    found: dict[str, Any] = {"tokens": {}, "own": {}, "all": {}}
    options: dict[str, Any] = {}
    if spread:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_plan="auto", tp_size=int(os.environ["WORLD_SIZE"]))
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    for spec in SPECS:
        cache = tessera.Cache(spec, model)
        found["tokens"][spec] = generate(model, cache)
        found["own"][spec] = asdict(cache.report())
        found["all"][spec] = asdict(cache.report(all_ranks=True))
        found["said"] = str(cache.report())
    found["heads"] = cache.layers[0].shape[0]
    path = out / f"cache{rank}.safetensors"
    cache.save(path)
    assert tessera.Cache.load(path, model).report().elements == cache.report().elements
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert other.report() == cache.report()
    # Every process gets the statistics of the whole model, and selects those of its heads.
    stats = tessera.codecs.load_stats(out / "stats.safetensors")
    cache = tessera.Cache("sink:4 + hqmq:4 + recent:32", model, stats=stats)
    found["tokens"]["stats"] = generate(model, cache)
    if spread:
        distributed.barrier()
        found["other"] = refused(lambda: tessera.Cache.load(out / f"cache{1 - rank}.safetensors", model))
        found["config"] = refused(lambda: generate(model, tessera.Cache("dense", model.config)))
        found["memory"] = refused(lambda: tessera.attach(model, tessera.tensor_cache.TensorCacheConfig(window=32)))
    name = f"rank{rank}.json" if spread else "whole.json"
    (out / name).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
