"""Program of each process in `test_training_in_processes.py`: it trains a memory of a frozen model with DDP or FSDP2."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import tessera
from tessera.adapters import memory_parameters
from tessera.tensor_cache import TensorCacheConfig
from tessera.tensor_memory import TensorMemoryConfig

STEPS, BATCH, TOKENS = 6, 4, 96
CONFIGS: dict[str, Any] = {
    "tc": TensorCacheConfig(window=16, sink=2),
    "tm": TensorMemoryConfig(channels=4, grid=(3, 3, 3)),
}


def make(kind: str) -> Any:
    """Make the same small model and memory in every process; the memory has an effect from the first step."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, initializer_range=0.1, **sizes))
    tessera.attach(model, CONFIGS[kind])
    with torch.no_grad():
        for group in memory_parameters(model):
            for parameter in group["params"]:
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.1)
    return model


def main(kind: str, how: str, out: Path) -> None:
    """Train, and write the mean losses of all processes, and the memory."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        distributed.init_process_group("gloo")
    bare = make(kind)
    model: nn.Module = bare
    memory = [parameter for group in memory_parameters(bare) for parameter in group["params"]]
    if how == "ddp":
        model = DistributedDataParallel(bare)
    elif how == "fsdp2":
        # The frozen model is sharded; the memory, which is small, is whole in every process.
        mesh = distributed.init_device_mesh("cpu", (world,))
        for part in (*bare.model.layers, bare):
            fully_shard(part, mesh=mesh, ignored_params=set(memory))
        assert isinstance(bare.model.layers[0].mlp.up_proj.weight, DTensor)
    optimizer = torch.optim.AdamW(memory_parameters(bare), lr=1e-2)
    losses = []
    ids = torch.randint(1, 61, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        share = ids.chunk(world)[rank]
        loss = model(input_ids=share, labels=share, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        if how == "fsdp2":
            for parameter in memory:
                if parameter.grad is not None:
                    distributed.all_reduce(parameter.grad)
                    parameter.grad /= world
        optimizer.step()
        mean = loss.detach().clone()
        if world > 1:
            distributed.all_reduce(mean)
        losses.append(float(mean) / world)
    tessera.save_memory(model, out / f"{kind}_{how}{rank}.safetensors")
    (out / f"{kind}_{how}{rank}.json").write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
