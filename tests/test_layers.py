"""Per-layer measurement gives each layer the exact model's inputs, and compares attention weights with the exact ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tessera
from tessera import codecs
from tessera.cli import app
from tessera.evaluation import Comparison, load
from tessera.evaluation.layers import measure_layers
from tessera.evaluation.records import LayerRow
from tessera.tensor_cache import TensorCacheConfig

sys.path.insert(0, str(Path(__file__).parent / "cache"))
import cache_models


def recorded(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return queries, keys and values of every layer of a Llama, computed by its modules from the layer's inputs."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    hidden = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    rotated = model.model.rotary_emb(hidden[0], torch.arange(ids.shape[1])[None])
    found = []
    for layer, x in zip(model.model.layers, hidden[:-1], strict=True):
        x, own = layer.input_layernorm(x), layer.self_attn
        q, k, v = (p(x).view(1, ids.shape[1], -1, own.head_dim).transpose(1, 2) for p in (own.q_proj, own.k_proj, own.v_proj))
        found.append((*apply_rotary_pos_emb(q, k, *rotated), v))
    return found


def weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf")).log_softmax(-1)


def at(rows: list[LayerRow], spec: str, layer: int) -> LayerRow:
    return next(r for r in rows if (r.spec, r.layer) == (spec, layer))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [192, 200, 40])
def test_everything_quantised_is_what_the_codec_does_to_keys_and_values(tokens: int) -> None:
    model, ids = cache_models.make("llama"), cache_models.tokens(1, tokens)
    rows = measure_layers(model, ids, ["dense", "q4_0", "int:4"], "paper", 64)
    assert [(r.spec, r.layer) for r in rows] == [(s, i) for s in ("q4_0", "int:4") for i in (0, 1)]
    for layer, (q, k, v) in enumerate(recorded(model, ids)):
        for spec in ("q4_0", "int:4"):
            codec = codecs.get(spec)
            k_, v_ = codec.encode(k, "key", layer).decode(), codec.encode(v, "value", layer).decode()
            p, p_ = weights(q, k), weights(q, k_)
            kl = torch.where(p > -torch.inf, p.exp() * (p - p_), 0.0).sum(-1).mean()
            out, out_ = (w.exp() @ x.repeat_interleave(2, 1) for w, x in ((p, v), (p_, v_)))
            found = at(rows, spec, layer)
            assert found.kl == pytest.approx(float(kl), rel=1e-3)
            assert found.error == pytest.approx(float((out_ - out).norm() / out.norm()), rel=1e-2)


@torch.no_grad()
def test_while_streaming_only_what_is_older_is_quantised() -> None:
    model, ids = cache_models.make("llama"), cache_models.tokens(1, 200)
    rows = measure_layers(model, ids, ["sink:4 + q4_0 + recent:32", "q4_0 + recent:4096"], "streaming", 50)
    for layer, (q, k, _) in enumerate(recorded(model, ids)):
        total = 0.0
        p, k_ = weights(q, k), codecs.get("q4_0").encode(k, "key", layer).decode()
        for start in range(0, 200, 50):
            mixed = k.clone()
            # Whole blocks after the sinks, once 32 newer tokens have been read in earlier calls.
            end = 4 + max(0, start - 4 - 32) // 64 * 64
            mixed[:, :, 4:end] = k_[:, :, 4:end]
            own = slice(start, start + 50)
            total += float(torch.where(p > -torch.inf, p.exp() * (p - weights(q, mixed)), 0.0)[:, :, own].sum())
        assert at(rows, "sink:4 + q4_0 + recent:32", layer).kl == pytest.approx(total / (4 * 200), rel=1e-3)
        unused = at(rows, "q4_0 + recent:4096", layer)
        assert unused.kl == pytest.approx(0, abs=1e-6)
        assert unused.error < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt-oss", "gpt-neox"])
@pytest.mark.parametrize("protocol", ["streaming", "paper"])
def test_families_give_nothing_away_where_nothing_is_lost(family: str, protocol: str) -> None:
    model, ids = cache_models.make(family), cache_models.tokens(1, 150)
    for row in measure_layers(model, ids, ["q8_0", "int:2"], protocol, 64):
        assert row.kl is not None
        if row.spec == "q8_0":
            assert row.kl < 1e-4
            assert row.error < 0.02
        else:
            assert row.kl > 1e-3
            assert row.error > 0.05


def test_what_a_window_drops_has_no_divergence_but_an_error() -> None:
    model, ids = cache_models.make("llama"), cache_models.tokens(1, 200)
    rows = measure_layers(model, ids, ["window:190", "sink:4 + window:200", "int:8@64"], "streaming", 64)
    for layer in (0, 1):
        assert at(rows, "window:190", layer).kl is None
        assert at(rows, "window:190", layer).error > 1e-3
        assert at(rows, "sink:4 + window:200", layer).kl == pytest.approx(0, abs=1e-6)
        assert at(rows, "sink:4 + window:200", layer).error < 1e-5
        assert at(rows, "int:8@64", layer).kl is None


def test_memories_are_refused() -> None:
    model = cache_models.make("llama")
    tessera.attach(model, TensorCacheConfig(window=16, sink=2))
    with pytest.raises(ValueError, match="a model with an attached memory reads a memory that has none"):
        measure_layers(model, cache_models.tokens(1, 64), ["q4_0"], "paper", 64)
    with pytest.raises(ValueError, match=r"'sink:2 \+ window:16 \+ tc' reads a memory that has none"):
        measure_layers(model, cache_models.tokens(1, 64), ["sink:2 + window:16 + tc"], "streaming", 64)


def test_attention_is_what_it_was_after_a_failure() -> None:
    from transformers import AttentionInterface

    from tessera.attention import attention_forward

    model = cache_models.make("llama")
    with pytest.raises(ValueError, match="calls its attention in parts"):
        measure_layers(model, cache_models.tokens(2, 64), ["q4_0"], "paper", 64)
    assert AttentionInterface()["tessera"] is attention_forward


def test_the_command_shows_saves_and_draws_layers(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    words = ["compare", "--model", str(small_model), "--text", str(small_text), "--specs", "sink:4 + q4_0", "window:32"]
    words += ["--context", "128", "--windows", "1", "--layers", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = Comparison.load(tmp_path / "compare.json").layers
    assert [(r.protocol, r.spec, r.layer) for r in found] == [
        ("streaming", "sink:4 + q4_0", 0),
        ("streaming", "sink:4 + q4_0", 1),
        ("streaming", "window:32", 0),
        ("streaming", "window:32", 1),
        ("paper", "sink:4 + q4_0", 0),
        ("paper", "sink:4 + q4_0", 1),
    ]
    for row in found:
        assert (f"{row.kl:.5f}" if row.kl is not None else "dropped") in result.stdout
        assert f"{row.error:.2%}" in result.stdout
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert load(str(small_model)).context == 512
    code = CliRunner().invoke(app, ["compare", "--specs", "sink:4 + window:256 + tc", "--layers", "--context", "64"])
    assert code.exit_code == 2
    assert code.stderr.startswith("error: layers are measured by their attention weights over keys")
