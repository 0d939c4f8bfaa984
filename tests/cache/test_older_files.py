"""Files written by version 0.1, in `tests/data`, can still be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cache_models import make, padding

import tessera

DATA = Path(__file__).parent.parent / "data"
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@torch.no_grad()
@pytest.mark.parametrize("name", ["exact", "quantised", "tensor_cache"])
def test_a_cache_of_version_0_1_goes_on_as_one_filled_now(name: str) -> None:
    model = make(**SMALL)
    if name == "tensor_cache":
        tessera.load_memory(model, DATA / "memory_0_1.safetensors")
    # The contents that the files were filled with.
    ids, mask = (torch.arange(200).view(2, 100) * 7) % 90 + 3, padding((0, 13), 100)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    old = tessera.Cache.load(DATA / f"{name}_0_1.safetensors", model)
    # Keys in older files were quantised without statistics, and so are the keys that follow.
    new = tessera.Cache(str(old.spec).replace("hqmq:4", "hqmq:4_nostats"), model)
    model(ids[:, :90], attention_mask=mask[:, :90], position_ids=places[:, :90], past_key_values=new)
    assert [layer.held() for layer in old.layers] == [layer.held() for layer in new.layers]
    rest = {"attention_mask": mask, "position_ids": places[:, 90:]}
    found, wanted = (model(ids[:, 90:], past_key_values=cache, **rest).logits for cache in (old, new))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
