"""The optimizers: Muon for hidden matrices, AdamW for the rest, with a separate group for gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tessera.tensor_cache.gated_read import is_gate


def make_optimizers(
    model: nn.Module, *, muon_lr: float, adamw_lr: float, gate_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a model's trainable parameters; every group has its peak learning rate as ``peak_lr``.

    Embeddings and the output layer are matrices too, but their rows are looked up one by one, so they take AdamW.

    Args:
        model: parameters that require no gradient are left out.
        muon_lr: learning rate of the hidden matrices.
        adamw_lr: learning rate of embeddings, norms and biases.
        gate_lr: learning rate of gates, decays and write rates (`tessera.tensor_cache.gated_read.is_gate`), which never decay.
        weight_decay: weight decay of matrices.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        tables.add(id(output.weight))
    gates = [p for name, p in model.named_parameters() if p.requires_grad and is_gate(name)]
    known = {id(p) for p in gates}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    hidden = [p for p in parameters if p.ndim == 2 and id(p) not in tables]
    others = [p for p in parameters if p.ndim >= 2 and not (p.ndim == 2 and id(p) not in tables)]
    vectors = [p for p in parameters if p.ndim < 2]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    groups: list[dict[str, Any]] = [
        {"params": others, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": gates, "weight_decay": 0.0, "lr": gate_lr},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=adamw_lr, betas=(0.9, 0.98), eps=1e-8))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
