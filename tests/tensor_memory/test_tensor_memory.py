"""The fast forms of `TensorMemory` agree with its definition, and each of its options has its effect."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessera.kernels import cpu, dispatch
from tessera.tensor_memory import TensorMemory, TensorMemoryConfig, TensorMemoryState

DIM = 7
BACKENDS = ["reference", *(f"cpu:{level}" for level in cpu.levels())]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {k: v for k, v in TensorMemoryConfig.paper().to_dict().items() if k not in ("grid", "channels", "chunk")},
    "nearest": {"write": "nearest"},
    "nearest, all cells": {"write": "nearest", "update": "all"},
    "separate places": {"coordinates": "separate", "read": "chunk"},
    "pointwise": {"convolution": "pointwise", "projection": "full"},
    "gates from the input": {"gates": "input"},
    "gates from the input, all cells": {"gates": "input", "update": "all", "forget_bias": 0.0},
    "gates from the input, pointwise": {"gates": "input", "convolution": "pointwise"},
    "anchored": {"anchored": True, "coordinates": "shared"},
    "a token a step": {"chunk": 1},
    "a line": {"grid": (5,), "update": "all"},
    "a plane": {"grid": (4, 3)},
    "flat": {"grid": (3, 1, 4), "chunk": 2},
    "one channel": {"channels": 1},
    "many channels": {"channels": 19, "grid": (2, 3, 2)},
}


def make(**options: Any) -> TensorMemory:
    torch.manual_seed(torch.initial_seed())
    memory = TensorMemory(TensorMemoryConfig(**{"channels": 5, "grid": (3, 4, 5), "chunk": 3, **options}), DIM)
    with torch.no_grad():
        for name, p in memory.named_parameters():
            if name in ("taps", "write_bias") or name.startswith("coord_net"):
                p.normal_(0, 0.6)
    return memory


def inputs(memory: TensorMemory, tokens: int, batch: int = 2) -> tuple[Tensor, Tensor | None]:
    x = torch.randn(batch, tokens, DIM)
    return x, torch.rand(batch, tokens, len(memory.config.grid)) * 2 - 1 if memory.config.anchored else None


def compare(form: Any, memory: TensorMemory, tokens: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return outputs, and gradients of all inputs, including the earlier state. Random numbers are the same in each call."""
    drawn = torch.get_rng_state()
    x, places = inputs(memory, tokens)
    shape = (2, memory.config.channels, *memory.config.grid)
    h, c = (torch.randn(shape).tanh().requires_grad_() for _ in range(2))
    held = memory.config.chunk - 1
    waiting = torch.randn(2, held, DIM, requires_grad=True)
    held_places = None if places is None else torch.rand(2, held, len(memory.config.grid))
    x.requires_grad_()
    out, state = form(x, TensorMemoryState(h, c, waiting, held_places), places)
    results = [out, state.h, state.c]
    loss = sum((r * torch.randn_like(r)).sum() for r in results)
    torch.set_rng_state(drawn)
    grads = torch.autograd.grad(loss, [x, h, c, waiting, *memory.parameters()], allow_unused=True)
    return [r.detach() for r in results], list(grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_fast_form_is_the_plain_loop_with_all_gradients(options: dict[str, Any], backend: str) -> None:
    memory = make(**options)
    wanted, wanted_grads = compare(memory.reference, memory, 22)
    found, grads = compare(lambda *a: memory(*a, backend=backend), memory, 22)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    names = ["x", "h", "c", "waiting", *(n for n, _ in memory.named_parameters())]
    for name, a, b in zip(names, grads, wanted_grads, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        if name in ("x", "h", "c", "content_net.weight", "gates_weight", "gates_bias", "out_proj.weight"):
            assert b.any(), name
        torch.testing.assert_close(a.expand_as(b) if not a.any() else a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gates", ["state", "input"])
def test_a_thousand_steps_stay_equal_to_rounding(gates: Any, backend: str) -> None:
    # With initial taps: random ones give a recurrence that amplifies the rounding of every form.
    memory = TensorMemory(TensorMemoryConfig(channels=5, grid=(3, 4, 5), update="all", gates=gates), DIM)
    x, _ = inputs(memory, 1000, 1)
    with torch.no_grad():
        (out, state), (wanted, end) = memory(x, backend=backend), memory.reference(x)
    # Some draws give a recurrence that amplifies rounding to 1e-4; a lost or repeated step gives 0.1.
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(state.c, end.c, rtol=1e-3, atol=1e-3)


def test_the_kernel_runs_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make()
    x, _ = inputs(memory, 9)
    called = []
    form = "cpu_grid" if cpu.MISSING is None else None
    plain = dispatch.recurrent_grid.advance
    monkeypatch.setattr(dispatch.recurrent_grid, "advance", lambda *a, **k: called.append("reference") or plain(*a, **k))
    if form is not None:
        kernel = dispatch.cpu_grid.advance
        monkeypatch.setattr(dispatch.cpu_grid, "advance", lambda *a, **k: called.append("cpu") or kernel(*a, **k))
    memory(x)
    memory(x, backend="reference")
    assert called == ["reference" if form is None else "cpu", "reference"]


def test_without_kernels_pytorch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make()
    x, _ = inputs(memory, 9)
    wanted = memory(x)[0]
    monkeypatch.setattr(cpu, "MISSING", "the C++ kernels are not built")
    dispatch.say_once.cache_clear()
    with pytest.warns(UserWarning, match="Tensor Memory runs in plain PyTorch"):
        torch.testing.assert_close(memory(x)[0], wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: the C\\+\\+ kernels are not built"):
        memory(x, backend="cpu")


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 23), max_size=4),
    chunk=st.integers(1, 5),
    read=st.sampled_from(["token", "chunk"]),
    anchored=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_a_stream_may_be_cut_anywhere(cuts: list[int], chunk: int, read: Any, anchored: bool, backend: str) -> None:
    memory = make(chunk=chunk, read=read, anchored=anchored)
    x, places = inputs(memory, 23)
    whole, end = memory(x, None, places, backend=backend)
    parts, state = [], None
    for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 23], strict=True):
        part, state = memory(x[:, a:b], state, None if places is None else places[:, a:b], backend=backend)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    assert state is not None
    for name, tensor in end.tensors().items():
        torch.testing.assert_close(state.tensors()[name], tensor, rtol=1e-5, atol=1e-5)


def test_gradients_flow_from_clip_to_clip() -> None:
    memory = make()
    x, _ = inputs(memory, 20)
    grads = []
    for cut in (20, 8):
        x = x.detach().requires_grad_()
        first, state = memory(x[:, :cut])
        second, _ = memory(x[:, cut:], state)
        weights = torch.linspace(-1, 1, 20)[:, None]
        grads.append(torch.autograd.grad((torch.cat((first, second), dim=1) * weights).sum(), x)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 19), options=st.sampled_from(list(OPTIONS.values())))
def test_a_late_token_changes_nothing_before_the_next_chunk(place: int, options: dict[str, Any]) -> None:
    memory = make(**options)
    x, places = inputs(memory, 20)
    other = x.clone()
    other[:, place] += 1
    with torch.no_grad():
        changed = (memory(other, None, places)[0] - memory(x, None, places)[0]).abs().amax((0, 2)) > 0
    assert not changed[:place].any()
    chunk = memory.config.chunk
    if memory.config.read == "token":
        # Within its chunk only the token itself reads at another position.
        assert not changed[place + 1 : place // chunk * chunk + chunk].any()


def test_a_state_threaded_through_layers_shows_the_future_and_states_of_their_own_do_not() -> None:
    memory = make(chunk=1, update="all")
    x, _ = inputs(memory, 20)
    other = x.clone()
    other[:, -1] += 1

    def two_layers(x: Tensor, threaded: bool) -> Tensor:
        out, state = memory(x)
        return memory(x + out, state if threaded else None)[0]

    with torch.no_grad():
        own, shared = ((two_layers(other, t) - two_layers(x, t)).abs().amax((0, 2)) for t in (False, True))
    assert not own[:-1].any()
    assert shared[0] > 0


def test_cells_outside_the_footprint_are_kept_exactly() -> None:
    memory = make(grid=(9, 9), chunk=1, sigma_init=0.2, update="footprint")
    with torch.no_grad():
        memory.sigma_net.weight.zero_()
    x, _ = inputs(memory, 12)
    with torch.no_grad():
        _, before = memory(x[:, :11])
        _, after = memory(x[:, 11:], before)
        factors = memory.footprint(memory.writes(x[:, 11:, None], None, memory.coordinates(x[:, 11:, None])))
    touched = (factors[0][:, 0, :, None] * factors[1][:, 0, None, :] > 0)[:, None].expand_as(after.h)
    assert 0 < touched.float().mean() < 0.6
    for a, b in ((before.h, after.h), (before.c, after.c)):
        assert torch.equal(a[~touched], b[~touched])
        assert (a != b)[touched].float().mean() > 0.9


@pytest.mark.parametrize("gates", ["state", "input"])
@pytest.mark.parametrize("later", [8, 32, 128, 1024])
def test_a_write_is_read_however_much_later_if_nothing_covers_it(later: int, gates: Any) -> None:
    config = TensorMemoryConfig(channels=4, grid=(12, 12), update="footprint", sigma_init=0.1, anchored=True, gates=gates)
    memory = TensorMemory(config, DIM)
    x, places = torch.randn(1, later + 1, DIM), torch.rand(1, later + 1, 2) - 1  # one quarter of the plane,
    places[:, 0] = 0.8  # and the first token in another
    places[:, -1] = 0.8
    with torch.no_grad():
        memory.sigma_net.weight.zero_()
        out, _ = memory(x, None, places)
        _, first = memory(x[:, :1], None, places[:, :1])
        at_once, _ = memory(x[:, -1:], first, places[:, -1:])
        nothing, _ = memory(x[:, -1:], None, places[:, -1:])
    torch.testing.assert_close(out[:, -1:], at_once)
    assert (at_once - nothing).abs().max() > 1e-3


def test_the_paper_forgets_everywhere_at_every_step() -> None:
    memory = TensorMemory(TensorMemoryConfig.paper(channels=5, grid=(4, 4, 4)), DIM)
    x, _ = inputs(memory, 1)
    with torch.no_grad():
        memory.gates_weight.zero_()
        h = torch.randn(2, 5, 4, 4, 4)
        _, after = memory(x, TensorMemoryState(h, h, torch.zeros(2, 0, DIM)))
    torch.testing.assert_close(after.c, h / 2)


def test_reads_and_writes_of_a_token_agree() -> None:
    x = torch.randn(2, 6, 1, DIM)
    for coordinates, agree in (("agree", True), ("shared", False), ("separate", False)):
        memory = make(chunk=1, coordinates=coordinates, projection="full")
        at = memory.coordinates(x)
        assert torch.equal(memory.writes(x, None, at).at, at[:, :, 0]) == agree


def test_an_anchored_token_reads_and_writes_at_its_place_at_first() -> None:
    memory = TensorMemory(TensorMemoryConfig(channels=5, grid=(4, 4), anchored=True), DIM)
    x, places = torch.randn(2, 6, 1, DIM), torch.rand(2, 6, 1, 2) * 2 - 1
    at = memory.coordinates(x, places)
    torch.testing.assert_close(at, places)
    torch.testing.assert_close(memory.writes(x, places, at).at, places[:, :, 0])
    with torch.no_grad():
        memory.coord_net.weight.normal_(0, 100)
    moved = memory.coordinates(x, places)
    assert 0 < (moved - places).abs().max() <= 0.5
    assert moved.abs().max() <= 1


def test_parameters_start_as_documented() -> None:
    paper = TensorMemory(TensorMemoryConfig.paper(channels=16, chunk=4), 24)
    assert paper.sigma_net.bias.item() == pytest.approx(1.0)
    assert not paper.gates_bias.any()
    assert paper.write_proj.weight.shape == (24, 96)
    assert torch.equal(paper.taps, torch.tensor([0.0, 1.0, 0.0]).expand(3, 32, 3))
    ours = TensorMemory(TensorMemoryConfig(chunk=4), 24)
    assert ours.gates_bias.view(4, 16)[1].tolist() == [3.0] * 16
    x = torch.randn(2, 5, 4, 24)
    ours.sigma_net.weight.data.zero_()
    writes = ours.writes(x, None, ours.coordinates(x))
    torch.testing.assert_close(writes.sigma, torch.full((2, 5), 0.3))
    torch.testing.assert_close(writes.content, ours.content_net(x.mean(2)))


def test_flushing_writes_what_waits_with_zeros_behind() -> None:
    memory = make(chunk=4)
    x, _ = inputs(memory, 10)
    _, state = memory(x)
    assert state.waiting.shape[1] == 2
    flushed = memory.flush(state)
    _, wanted = memory(torch.cat((x, torch.zeros(2, 2, DIM)), dim=1))
    for name, tensor in wanted.tensors().items():
        torch.testing.assert_close(flushed.tensors()[name], tensor, rtol=1e-5, atol=1e-6)
    assert memory.flush(flushed) is flushed


def test_a_state_is_saved_restored_selected_and_reset(tmp_path: Path) -> None:
    memory = make(chunk=1, anchored=True)
    x, places = inputs(memory, 12)
    _, state = memory(x, None, places)
    state.save(tmp_path / "s.safetensors")
    loaded = TensorMemoryState.load(tmp_path / "s.safetensors")
    assert loaded.tensors().keys() == state.tensors().keys()
    for name, tensor in state.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
    assert state.nbytes == 2 * 2 * 5 * 60 * 4
    more, where = inputs(memory, 9)
    assert where is not None
    after = memory(more, loaded, where)[0]
    swapped = memory(more.flip(0), state.select(torch.tensor([1, 0])), where.flip(0))[0]
    torch.testing.assert_close(swapped, after.flip(0))
    mixed = memory(more, state.reset(torch.tensor([True, False])), where)[0]
    torch.testing.assert_close(mixed[1], after[1])
    torch.testing.assert_close(mixed[0], memory(more, None, where)[0][0])
    assert not state.detach().h.requires_grad
    assert state.to("cpu").h.device.type == "cpu"


def test_a_foreign_file_is_no_state(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"h": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no state of a Tensor Memory"):
        TensorMemoryState.load(tmp_path / "a.safetensors")
    save_file({"h": torch.zeros(1)}, tmp_path / "b.safetensors", {"tessera": "tensor_memory_state"})
    with pytest.raises(ValueError, match="is damaged"):
        TensorMemoryState.load(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="holds no state of a Tensor Memory: "):
        TensorMemoryState.load(tmp_path / "c.safetensors")


def test_a_state_that_no_stream_can_go_on_with_is_not_loaded(tmp_path: Path) -> None:
    h, waiting = torch.zeros(2, 3, 4), torch.zeros(2, 0, 7)
    for bad, message in (
        (TensorMemoryState(h * torch.nan, h, waiting), "h must be finite"),
        (TensorMemoryState(h, h[:, :2], waiting), "h and c are"),
        (TensorMemoryState(h[:, :0], h[:, :0], waiting), "h and c are"),
        (TensorMemoryState(h[:, :, 0], h[:, :, 0], waiting), "h and c are"),
        (TensorMemoryState(h, h, waiting[:1]), "as many rows"),
        (TensorMemoryState(h[0, 0, 0], h, waiting), "as many rows"),
    ):
        bad.save(tmp_path / "state.safetensors")
        with pytest.raises(ValueError, match=f"is damaged: .*{message}"):
            TensorMemoryState.load(tmp_path / "state.safetensors")


@pytest.mark.parametrize("name", ["coord_net.weight", "content_net.bias", "sigma_net.weight", "gates_weight", "gates_bias"])
def test_weights_and_states_that_are_not_finite_are_refused(name: str) -> None:
    memory = make()
    x, _ = inputs(memory, 10)
    _, state = memory(x)
    broken = TensorMemoryState(state.h.masked_fill(state.h == state.h.max(), torch.nan), state.c, state.waiting)
    with pytest.raises(ValueError, match="h of the state must be finite"):
        memory(x, broken)
    with torch.no_grad():
        memory.get_parameter(name).view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="training has diverged"):
        memory(x, state)


def test_the_state_is_float32_under_autocast_and_in_bfloat16() -> None:
    memory = make()
    x, _ = inputs(memory, 12)
    exact = memory(x.bfloat16().float())[1]
    with torch.autocast("cpu", torch.bfloat16):
        out, state = memory(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert state.h.dtype == torch.float32
    torch.testing.assert_close(state.c, exact.c)
    assert memory.bfloat16()(x.bfloat16())[1].c.dtype == torch.float32


def test_no_tokens_change_nothing() -> None:
    memory = make()
    x, _ = inputs(memory, 10)
    _, state = memory(x)
    out, same = memory(x[:, :0], state)
    assert out.shape == (2, 0, DIM)
    assert same is state
    assert memory(x[:0])[0].shape == (0, 10, DIM)


def test_other_sequences_of_the_batch_do_not_matter() -> None:
    memory = make()
    x, _ = inputs(memory, 14, 5)
    together = memory(x)[0]
    for i in range(5):
        torch.testing.assert_close(memory(x[i : i + 1])[0], together[i : i + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (4, 0, 4)}, "each axis of grid must be a whole number of at least 1, got 0"),
        ({"grid": ()}, "one, two or three axes, got 0"),
        ({"grid": (2, 2, 2, 2)}, "one, two or three axes, got 4"),
        ({"channels": 0}, "channels must be a whole number of at least 1, got 0"),
        ({"chunk": 2.0}, "chunk must be a whole number of at least 1, got 2.0"),
        ({"write": "point"}, "write must be one of 'gaussian', 'nearest', got 'point'"),
        ({"gates": "none"}, "gates must be one of 'state', 'input', got 'none'"),
        ({"sigma_init": 0.0}, "sigma_init must be more than 0.0001, got 0.0"),
        ({"forget_bias": float("nan")}, "forget_bias must be finite"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorMemoryConfig(**options)


def test_a_config_is_read_back_from_what_json_has_of_it() -> None:
    import json

    for config in (TensorMemoryConfig(), TensorMemoryConfig.paper(grid=(3, 4), chunk=2)):
        assert TensorMemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="has no 'sigma'"):
        TensorMemoryConfig.from_dict({"sigma": 1.0})
    with pytest.raises(ValueError, match="a dim of at least 1, got 0"):
        TensorMemory(TensorMemoryConfig(), 0)


def test_bad_input_is_refused_and_the_state_unharmed() -> None:
    memory = make()
    x, _ = inputs(memory, 10)
    _, state = memory(x)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    for bad in (torch.nan, torch.inf):
        broken = x.clone()
        broken[1, 3, 2] = bad
        with pytest.raises(ValueError, match="tokens must be finite"):
            memory(broken, state)
    other = make(channels=4)(x)[1]
    places = torch.zeros(2, 10, 3)
    for arguments, message in (
        ((x[..., :4], state), r"tokens \(2, 10, 4\) do not fit: expected \(batch, tokens, 7\)"),
        ((x[0], state), r"tokens \(10, 7\) do not fit"),
        ((x[:1], state), r"h of \(2, 5, 3, 4, 5\) does not fit: expected \(1, 5, 3, 4, 5\)"),
        ((x, other), r"h of \(2, 4, 3, 4, 5\) does not fit: expected \(2, 5, 3, 4, 5\)"),
        ((x, make(chunk=5)(x[:, :4])[1]), r"\(2, 4, 7\) wait does not fit: expected \(2, less than 3, 7\)"),
        ((x, TensorMemoryState(state.h.bfloat16(), state.c, state.waiting)), "float32"),
        ((x, state, places), "anchored=True"),
        ((x, make(anchored=True)(x, None, places)[1]), "with other options"),
    ):
        with pytest.raises(ValueError, match=message):
            memory(*arguments)
    anchored = make(anchored=True)
    for arguments, message in (
        ((x,), "needs the places"),
        ((x, None, places[:, :4]), r"places \(2, 4, 3\) do not fit: expected \(2, 10, 3\)"),
        ((x, None, places + 2), "between -1 and 1"),
        ((x, None, places * torch.nan), "between -1 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            anchored(*arguments)
    for name, tensor in before.items():
        assert torch.equal(state.tensors()[name], tensor)
    with pytest.raises(ValueError, match="reset takes 2 booleans"):
        state.reset(torch.tensor([True]))


def test_options_change_what_is_computed() -> None:
    """Each option has an effect."""
    x = torch.randn(2, 12, DIM)
    plain = {"channels": 4, "grid": (4, 4, 4), "chunk": 3}
    seen = []
    for name, words in {
        "write": ("gaussian", "nearest"),
        "update": ("footprint", "all"),
        "coordinates": ("agree", "shared", "separate"),
        "read": ("token", "chunk"),
        "convolution": ("factorised", "pointwise"),
        "gates": ("state", "input"),
    }.items():
        outs = [make(**plain, **{name: word})(x)[0] for word in words]
        seen += [torch.equal(a, b) for a, b in itertools.combinations(outs, 2)]
    assert not any(seen)
