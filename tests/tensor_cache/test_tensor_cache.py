"""The three forms of `TensorCache` agree, and each of its options has its effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize

from tessera.attention import attention_forward
from tessera.tensor_cache import TensorCache, TensorCacheConfig, TensorCacheState
from tessera.tensor_cache.gated_read import MemoryCall, TensorCacheLayer

HEADS, GROUP, DIM = 2, 3, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "outer": {"rule": "outer"},
    "wedge": {"rule": "wedge"},
    "paper": {**TensorCacheConfig.paper(window=5).to_dict(), "chunk": 7},
    "read first": {"order": "read_first"},
    "token rates": {"rates": "token"},
    "no normalisation": {"rule": "outer", "normalise_keys": False, "normalise_queries": False, "value_scale": 0.3},
    "normalised read": {"normalise_read": True},
    "two timescales": {"slow": (0.9995, 0.01)},
    "slots": {"slots": 3, "top_k": 2},
    "all at once": {"slots": 2, "slow": (0.99, 0.1), "normalise_read": True, "rates": "token", "rule": "outer"},
}


def make(window: int = 5, **options: Any) -> TensorCache:
    torch.manual_seed(torch.initial_seed())
    memory = TensorCache(TensorCacheConfig(**{"window": window, "sink": 2, "chunk": 4, **options}), HEADS, DIM)
    with torch.no_grad():
        for name, p in memory.named_parameters():
            if name in ("rate_weight", "slow_share"):
                p.normal_(0, 0.3)
    return memory


def inputs(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, HEADS * GROUP, tokens, DIM)
    return q, torch.randn(batch, HEADS, tokens, DIM), torch.randn(batch, HEADS, tokens, DIM)


def by_steps(memory: TensorCache, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, TensorCacheState]:
    """Compute the stream explicitly, with a list as the window and a step for every token."""
    state = memory.initial_state(q.shape[0], k)
    config, reads = memory.config, []
    for t in range(q.shape[2]):
        e = t - config.window
        leaves = e >= config.sink
        pair = (k[:, :, e : e + 1], v[:, :, e : e + 1]) if leaves else (None, None)
        read, state = memory.step(q[:, :, t : t + 1], *pair, state)
        reads.append(read)
    return torch.cat(reads, dim=2), state


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_steps_equal_the_parallel_form(options: dict[str, Any]) -> None:
    memory = make(**options)
    q, k, v = inputs(33)
    read, state = memory(q, k, v)
    wanted, end = by_steps(memory, q, k, v)
    torch.testing.assert_close(read, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.a, end.a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradients_of_both_forms_agree_for_every_parameter(options: dict[str, Any]) -> None:
    memory = make(**options)
    found = []
    drawn = torch.get_rng_state()
    for form in (memory, lambda *x: by_steps(memory, *x)):
        torch.set_rng_state(drawn)
        q, k, v = (x.requires_grad_() for x in inputs(21))
        read, state = form(q, k, v)
        loss = (read * torch.randn_like(read)).sum() + (state.a * torch.randn_like(state.a)).sum()
        found.append(torch.autograd.grad(loss, [q, k, v, *memory.parameters()], allow_unused=True))
    for a, b, name in zip(*found, ["q", "k", "v", *(n for n, _ in memory.named_parameters())], strict=True):
        assert a is not None, name
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=4), window=st.integers(1, 12))
def test_a_stream_may_be_cut_anywhere(cuts: list[int], window: int) -> None:
    memory = make(window)
    q, k, v = inputs(30)
    whole, end = memory(q, k, v)
    reads, state = [], None
    for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 30], strict=True):
        read, state = memory(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], state)
        reads.append(read)
    torch.testing.assert_close(torch.cat(reads, dim=2), whole, rtol=1e-4, atol=1e-5)
    for name, tensor in end.tensors().items():
        torch.testing.assert_close(state.tensors()[name], tensor, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 24), window=st.integers(1, 8), sink=st.integers(0, 4), early=st.booleans())
def test_every_pair_is_in_exactly_one_of_window_sinks_and_matrix(place: int, window: int, sink: int, early: bool) -> None:
    memory = make(window, sink=sink, order="read_first" if early else "write_first")
    q, k, v = inputs(25)
    read, _ = memory(q, k, v)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, place] += 1
    v2[:, :, place] -= 1
    changed = ((memory(q, k2, v2)[0] - read).abs().amax((0, 1, 3)) > 1e-7).nonzero().flatten().tolist()
    first = place + window + early
    assert changed == ([] if place < sink else list(range(first, 25)))


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 24), window=st.integers(1, 8), sink=st.integers(0, 4))
def test_a_token_reaches_each_later_one_through_attention_or_memory_and_never_both(place: int, window: int, sink: int) -> None:
    module = nn.Module()
    module.tensor_cache = TensorCacheLayer(TensorCacheConfig(window=window, sink=sink, chunk=4), 4, 2, 8, 16)
    nn.init.normal_(module.tensor_cache.out.weight)

    def both(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        call = MemoryCall(module.tensor_cache, None, None, 0)
        local, _ = attention_forward(module, q, k, v, None, memory_call=call)
        assert call.added is not None
        return local[0].flatten(1), call.added[0]

    q, k, v = torch.randn(1, 4, 25, 8), torch.randn(1, 2, 25, 8), torch.randn(1, 2, 25, 8)
    before = both(k, v)
    k[:, :, place], v[:, :, place] = torch.randn(2, 1, 2, 8)
    by_attention, by_memory = ((a - b).abs().amax(1) > 1e-6 for a, b in zip(both(k, v), before, strict=True))
    later = torch.arange(25) - place
    near = (later >= 0) & ((later < window) | (place < sink))
    assert by_attention.tolist() == near.tolist()
    assert by_memory.tolist() == ((later >= 0) & ~near).tolist()


def test_the_read_of_a_stored_key_is_its_value() -> None:
    memory = make(4, sink=0, decay=0.9999999, write_rate=0.999999, order="write_first")
    keys = torch.linalg.qr(torch.randn(DIM, DIM))[0]
    k = torch.cat((keys, torch.zeros(4, DIM))).expand(1, HEADS, -1, -1)
    v = torch.randn(1, HEADS, DIM + 4, DIM)
    q = keys[3].expand(1, HEADS, DIM + 4, DIM)
    read, _ = memory(q, k, v)
    torch.testing.assert_close(read[:, :, -1], v[:, :, 3], rtol=1e-3, atol=1e-3)


def test_the_delta_rule_overwrites_and_the_outer_rule_adds() -> None:
    key = normalize(torch.randn(DIM), dim=-1)
    k = key.expand(1, HEADS, 3, DIM)
    v = torch.randn(1, HEADS, 3, DIM)
    reads = {}
    for rule in ("delta", "outer"):
        memory = make(1, sink=0, rule=rule, decay=0.9999999, write_rate=0.999999)
        reads[rule] = memory(k, k, v)[0][:, :, 2]
    torch.testing.assert_close(reads["delta"], v[:, :, 1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reads["outer"], v[:, :, 0] + v[:, :, 1], rtol=1e-3, atol=1e-3)


def test_padding_is_never_written() -> None:
    memory = make()
    q, k, v = inputs(20)
    alone, _ = memory(q[:1], k[:1], v[:1])
    real = torch.ones(2, 26, dtype=torch.bool)
    real[0, :6] = False
    padded = [torch.cat((torch.randn(2, x.shape[1], 6, DIM), x), dim=2) for x in (q, k, v)]
    read, state = memory(*padded, real=real)
    torch.testing.assert_close(read[:1, :, 6:], alone, rtol=1e-4, atol=1e-5)
    assert state.seen.tolist() == [20, 26]


def test_decays_and_state_are_float32_under_autocast_and_in_bfloat16() -> None:
    memory = make(1, sink=0, rule="outer", decay=0.9995, write_rate=0.01)
    q, k, v = (x.bfloat16() for x in inputs(2000, 1))
    with torch.autocast("cpu", torch.bfloat16):
        read, state = memory(q, k, v)
    assert read.dtype == torch.bfloat16
    assert state.a.dtype == torch.float32
    exact = make(1, sink=0, rule="outer", decay=0.9995, write_rate=0.01)(q.float(), k.float(), v.float())[1]
    torch.testing.assert_close(state.a, exact.a, rtol=1e-4, atol=1e-5)
    # In bfloat16 the decay would be 1 and the matrix twice as large.
    assert torch.tensor(0.9995).bfloat16() == 1


def test_chunk_means_write_products_of_tokens_that_never_met() -> None:
    chunk = DIM
    k = torch.eye(DIM).expand(1, HEADS, -1, -1)
    v = k.clone()
    counts = {}
    for form in ("pairs", "chunk_means"):
        memory = make(1, sink=0, rule="outer", write=form, chunk=chunk, decay=0.999999)
        live = torch.ones(1, chunk, dtype=torch.bool)
        _, state = memory.advance(k, k, v, live, memory.initial_state(1))
        counts[form] = int((state.a[0, 0].abs() > 1e-6).sum())
    assert counts["pairs"] == chunk
    assert counts["chunk_means"] - counts["pairs"] == chunk**2 - chunk


def test_routing_without_noise_is_the_same_every_time() -> None:
    memory = make(slots=4, slot_noise=1.0).eval()
    q, k, v = inputs(20)
    assert torch.equal(memory(q, k, v)[0], memory(q, k, v)[0])
    memory.train()
    assert not torch.equal(memory(q, k, v)[0], memory(q, k, v)[0])


def test_half_lives_are_spread_over_the_heads() -> None:
    memory = TensorCache(TensorCacheConfig(decay=(100, 100_000)), 4, DIM)
    half_lives = (torch.log(torch.tensor(0.5)) / memory.decay.double().log()).tolist()
    assert half_lives == pytest.approx([100, 1000, 10_000, 100_000], rel=2e-2)
    assert torch.allclose(TensorCache(TensorCacheConfig.paper(), 3, DIM).decay, torch.tensor(0.995))
    assert torch.allclose(TensorCache(TensorCacheConfig.paper(), 3, DIM).write_rate, torch.tensor(0.05))


def test_a_state_is_saved_restored_selected_and_reset(tmp_path: Path) -> None:
    memory = make(slow=(0.99, 0.1), normalise_read=True)
    q, k, v = inputs(20)
    _, state = memory(q, k, v)
    state.save(tmp_path / "s.safetensors")
    loaded = TensorCacheState.load(tmp_path / "s.safetensors")
    for name, tensor in state.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
    assert state.nbytes == sum(t.numel() * t.element_size() for t in state.tensors().values())
    more = inputs(9)
    after = memory(*more, state)[0]
    torch.testing.assert_close(memory(*(x.flip(0) for x in more), state.select(torch.tensor([1, 0])))[0], after.flip(0))
    fresh = memory(*more)[0]
    mixed = memory(*more, state.reset(torch.tensor([True, False])))[0]
    torch.testing.assert_close(mixed[1], after[1])
    torch.testing.assert_close(mixed[0], fresh[0], rtol=1e-4, atol=1e-5)
    assert not state.detach().a.requires_grad


def test_no_tokens_change_nothing() -> None:
    memory = make()
    q, k, v = inputs(12)
    _, state = memory(q, k, v)
    read, same = memory(q[:, :, :0], k[:, :, :0], v[:, :, :0], state)
    assert read.shape == (2, HEADS * GROUP, 0, DIM)
    for name, tensor in state.tensors().items():
        assert torch.equal(same.tensors()[name], tensor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"rule": "oja"}, "rule must be one of 'outer', 'delta', 'wedge', got 'oja'"),
        ({"decay": 1.0}, "decay must lie between 0 and 1"),
        ({"decay": (100.0, 10.0)}, "a shortest and a longest half-life"),
        ({"top_k": 2}, "top_k 2 is more than there are slots, 1"),
        ({"normalise_keys": False}, "stable for keys of length 1"),
        ({"write": "chunk_means"}, "rule 'outer'"),
        ({"value_scale": 0.0}, "value_scale must be positive"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorCacheConfig(**options)
    with pytest.raises(ValueError, match="has no 'windows'"):
        TensorCacheConfig.from_dict({"windows": 3})


def test_bad_input_is_refused_and_the_state_unharmed() -> None:
    memory = make()
    q, k, v = inputs(12)
    _, state = memory(q, k, v)
    before = state.a.clone()
    broken = k.clone()
    broken[0, 0, 3, 2] = torch.nan
    for arguments, message in (
        ((q, broken, v), "keys must be finite"),
        ((q, k, broken), "values must be finite"),
        ((q[..., :4], k, v), "queries .* do not fit"),
        ((q, k[:, :1], v), "keys .* do not fit"),
        ((q[:, :, :5], k, v), "5 queries and 12 keys"),
    ):
        with pytest.raises(ValueError, match=message):
            memory(*arguments, state)
    with pytest.raises(ValueError, match="state of matrices"):
        memory(q[:1], k[:1], v[:1], state)
    with pytest.raises(ValueError, match="one of them is missing"):
        memory.step(q[:, :, :1], k[:, :, :1], None, state)
    assert torch.equal(state.a, before)
    assert TensorCacheConfig.from_dict(memory.config.to_dict()) == memory.config


def test_a_mask_of_another_shape_is_refused() -> None:
    memory = TensorCache(TensorCacheConfig(window=4), 2, 8)
    q = torch.randn(1, 2, 20, 8)
    with pytest.raises(ValueError, match=r"real \(1, 10\) does not fit: expected \(1, 20\)"):
        memory(q, q, q, real=torch.ones(1, 10, dtype=torch.bool))


def test_chunks_are_short_enough_for_the_decays_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of decay is read from a parameter once, and again after the parameter has changed."""
    monkeypatch.setenv("TESSERA_BACKEND", "reference")
    memory = TensorCache(TensorCacheConfig(window=1, sink=0, chunk=64), num_heads=2, head_dim=8)
    q, k, v = (torch.randn(1, 2, 200, 8) for _ in range(3))
    live = torch.ones(1, 200, dtype=torch.bool)
    for value in (5.0, -30.0, -3.0, -60.0):
        with torch.no_grad():
            memory.decay_logit.fill_(value)
            found, end = memory.advance(q, k, v, live, memory.initial_state(1, k))
            wanted, state = memory.advance(q, k, v, live, memory.initial_state(1, k), by_loop=True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(end.a, state.a, rtol=1e-4, atol=1e-5)
