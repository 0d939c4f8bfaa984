"""LoRA adapters around parts of a memory are trained, take effect and are saved with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_models import make, tokens
from safetensors.torch import load_file
from torch import Tensor

import tessera
from tessera.adapters import attached_memory
from tessera.adapters.attached import fingerprint
from tessera.tensor_cache import TensorCacheConfig
from tessera.tensor_memory import TensorMemoryConfig

peft = pytest.importorskip("peft")

TC = TensorCacheConfig(window=24, sink=3, gate="token")
TM = TensorMemoryConfig(channels=4, grid=(3, 3), chunk=2, projection="full", coordinates="separate")
MEMORIES = pytest.mark.parametrize("config", [TC, TM], ids=["tc", "tm"])
#: The modules of each memory that LoRA wraps.
WRAPPED = {
    "TensorCache": {"out"},
    "TensorMemory": {"coord_net", "write_coord_net", "write_proj", "content_net", "sigma_net", "out_proj"},
}
#: Variants of LoRA.
WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rs": {"r": 3, "lora_alpha": 7, "use_rslora": True},
}


def attached(config: Any) -> Any:
    """Make a model with a memory whose output is nonzero."""
    model = tessera.attach(make(), config)
    numbers = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in attached_memory(model).modules().values():
            for _, p in sorted(part.named_parameters()):
                p.add_(torch.randn(p.shape, generator=numbers), alpha=0.3)
    return model


def adapted(model: Any, **options: Any) -> Any:
    """Wrap a model, with nonzero adapters of the memory and zero adapters elsewhere."""
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    )
    numbers = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for part in attached_memory(model).modules().values():
            for name, p in sorted(part.named_parameters()):
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=numbers) * 0.3 + ("magnitude" in name))
    return wrapped.eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@MEMORIES
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_what_lora_adds_to_a_memory_is_saved_with_it(config: Any, options: dict[str, Any], tmp_path: Path) -> None:
    ids, model = tokens(2, 80), attached(config)
    without = logits(model, ids)
    wrapped = adapted(model, **options)
    wanted = logits(wrapped, ids)
    assert (wanted - without).abs().max() > 0.05
    for source in (wrapped, model):
        tessera.save_memory(source, tmp_path / "m")
        loaded = tessera.load_memory(make(), tmp_path / "m")
        torch.testing.assert_close(logits(loaded, ids), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(wrapped, ids), wanted)


@MEMORIES
def test_a_file_of_a_wrapped_memory_has_the_names_of_a_plain_one_and_goes_back_into_the_wrapped_model(
    config: Any, tmp_path: Path
) -> None:
    ids, model = tokens(2, 80), attached(config)
    tessera.save_memory(model, tmp_path / "plain")
    wrapped = adapted(model)
    wanted = logits(wrapped, ids)
    tessera.save_memory(wrapped, tmp_path / "m")
    assert load_file(tmp_path / "m").keys() == load_file(tmp_path / "plain").keys()
    for outer in (model, wrapped):
        tessera.detach(outer)
        assert attached_memory(model) is None
        tessera.load_memory(outer, tmp_path / "m")
        torch.testing.assert_close(logits(wrapped, ids), wanted, rtol=1e-4, atol=1e-4)


@MEMORIES
def test_lora_around_a_memory_learns(config: Any) -> None:
    model = attached(config)
    wrapped = adapted(model).train()
    ids = tokens(2, 80)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    met = set()
    for part in attached_memory(model).modules().values():
        for name, p in part.named_parameters():
            if "lora_" in name:
                assert p.grad is not None, name
                assert p.grad.abs().max() > 0, name
                met.add(name.split(".")[0])
    assert met == WRAPPED[attached_memory(model).kind]


def _disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def _merge(model: Any) -> None:
    model.merge_adapter()


def _unload(model: Any) -> None:
    model.merge_and_unload()


def _second(model: Any) -> None:
    model.add_adapter("second", peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("second")


@MEMORIES
@pytest.mark.parametrize("change", [_disable, _merge, _unload, _second])
def test_what_is_saved_is_what_the_model_computes_now(config: Any, change: Callable[[Any], None], tmp_path: Path) -> None:
    """Adapters of the base model are zero, because the memory's file does not contain them."""
    ids, model = tokens(2, 80), attached(config)
    wrapped = adapted(model)
    change(wrapped)
    memory = {id(p) for part in attached_memory(model).modules().values() for p in part.parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name and id(p) not in memory:
                p.zero_()
    wanted = logits(model, ids)
    tessera.save_memory(model, tmp_path / "m")
    loaded = tessera.load_memory(make(), tmp_path / "m")
    torch.testing.assert_close(logits(loaded, ids), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, ids), wanted)


def test_what_cannot_be_merged_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "m"
    kept = adapted(attached(TM), target_modules=["q_proj"], modules_to_save=["norm"])
    with pytest.raises(ValueError, match=r"save_memory: 'norm\..*layer 0.*merge_and_unload") as error:
        tessera.save_memory(kept, path)
    assert len(str(error.value).splitlines()) == 1
    biased = adapted(attached(TC), lora_bias=True, target_modules=["out"])
    with pytest.raises(ValueError, match=r"around 'out' cannot be merged into it: Impossible to merge LoRA"):
        tessera.save_memory(biased, path)
    assert not path.exists()


@MEMORIES
def test_a_memory_is_attached_to_a_wrapped_model_and_taken_away(config: Any, tmp_path: Path) -> None:
    ids = tokens(2, 80)
    wrapped = peft.get_peft_model(make(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    before = logits(wrapped, ids)
    assert tessera.attach(wrapped, config) is wrapped
    assert attached_memory(wrapped) is attached_memory(wrapped.get_base_model())
    assert attached_memory(wrapped) is not None
    tessera.save_memory(wrapped, tmp_path / "m")
    tessera.load_memory(make(), tmp_path / "m")
    tessera.detach(wrapped)
    assert attached_memory(wrapped) is None
    assert torch.equal(logits(wrapped, ids), before)


def test_adapters_do_not_make_a_model_another_one() -> None:
    plain = fingerprint(make())
    wrapped = adapted(attached(TC))
    assert fingerprint(wrapped) == plain
    assert fingerprint(wrapped.get_base_model()) == plain
