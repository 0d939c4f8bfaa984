"""A state machine that runs random operations on a cache and on the oracle, and compares them after every call."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as memoised
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cache_models import VOCAB, make
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracle import Given, LayerOracle, LlamaOracle, Rules
from torch import Tensor

import tessera
from tessera.adapters import attached_memory
from tessera.attention import attention_forward
from tessera.tensor_cache import TensorCacheConfig
from tessera.tensor_memory import TensorMemoryConfig
from tessera.tiers.per_layer import parse

#: Maximum number of rows.
MOST_ROWS = 4
SLIDING = 24
DIM = 16
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


@dataclass(frozen=True)
class Kind:
    """The kind of cache and model that a sequence runs on.

    Attributes:
        spec, prefill: arguments of the cache.
        model: "" for random keys and values, passed to the attention function without a model; "plain" for a
            Llama; "sliding" for one whose layers see `SLIDING` slots (a Mistral); "tc", "tc-rotary", "tc-wedge", "tc-paper" or
            "tm" for a Llama of two layers with that memory.
    """

    spec: str
    prefill: str = "exact"
    model: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.model, self.spec, "" if self.prefill == "exact" else self.prefill)))

    @property
    def most_slots(self) -> int:
        """Return the maximum number of slots, so that the token-by-token oracle stays fast."""
        return 160 if self.model == "tm" else 260 if self.model.startswith("tc") else 420

    @property
    def padding_only(self) -> bool:
        """Whether masks may hide padding only, because a memory cannot remove what it has read."""
        return self.model == "tm" or (self.model.startswith("tc") and bool(parse(self.spec).codecs))

    @property
    def tolerance(self) -> float:
        """Return the maximum error of a token, relative to the root mean square of all. Rounding may change single codes."""
        return 3e-3 if parse(self.spec).codecs else 1e-3 if self.model.startswith("t") else 1e-5


EXACT = [Kind(spec) for spec in ("dense", "window:20", "sink:2 + window:20", "sink:5 + window:64")]
LOSSY = [
    Kind(spec, prefill)
    for spec in (
        "sink:4 + hqmq:4 + recent:16",
        "hqmq:3@128 + recent:16",
        "kivi:4 + recent:32",
        "sink:3 + int:4@64",
        "q4_0",
        "sink:70 + scalar:4 + recent:5",
    )
    for prefill in ("exact", "quantized")
]
#: Several codecs, each for the tokens that leave the one before it.
CHAINS = [
    Kind("sink:2 + hqmq:4@64 + hqmq:3@128 + recent:16"),
    Kind("hqmq:4@64 + kivi:4@64 + q4_0 + recent:8", "quantized"),
]
#: Queries read only the most promising blocks.
SPARSE = [
    Kind("sink:2 + hqmq:4/top:64 + recent:16"),
    Kind("sink:2 + hqmq:3/top:128 + recent:8", "quantized"),
    Kind("hqmq:4_nostats@128/top:64 + hqmq:3/top:64 + recent:8"),
]
PAIRS = [Kind("sink:2 + hqmq:k4v3@128 + recent:16", "quantized")]
LLAMAS = [Kind(spec, model="plain") for spec in ("dense", "sink:2 + window:20")]
SLIDING_LAYERS = [Kind(spec, model="sliding") for spec in ("dense", "sink:2 + hqmq:4 + recent:8")]
TENSOR_CACHES = [
    Kind("sink:2 + window:16 + tc", model="tc"),
    Kind("sink:2 + window:16 + tc", model="tc-rotary"),
    Kind("sink:2 + window:16 + tc", model="tc-wedge"),
    Kind("window:16 + tc", model="tc-paper"),
]
#: Exact, quantised, and then written into the matrix.
DISSOLVED = [
    Kind(spec, model="tc-rotary")
    for spec in ("sink:2 + hqmq:4@64 + recent:16 + tc", "sink:2 + hqmq:4@64 + (k=q8_0,v=hqmq:3)@64 + recent:8 + tc")
]
TENSOR_MEMORIES = [
    Kind(spec, model="tm")
    for spec in (
        "dense",
        "sink:2 + window:20",
        "sink:2 + hqmq:4@64 + hqmq:3 + recent:8",
        "{0: sink:2 + hqmq:5@64 + recent:16; *: sink:4 + (k=q8_0,v=hqmq:3) + recent:8}",
    )
]
#: A spec for each layer.
PER_LAYER = [Kind("{0: sink:2 + hqmq:4@64 + recent:8 + tc; *: sink:2 + window:16 + tc}", model="tc-rotary")]
KINDS = [
    *EXACT,
    *LOSSY,
    *PAIRS,
    *CHAINS,
    *SPARSE,
    *LLAMAS,
    *SLIDING_LAYERS,
    *TENSOR_CACHES,
    *DISSOLVED,
    *TENSOR_MEMORIES,
    *PER_LAYER,
]


@memoised
def model_of(name: str) -> Any:
    """Return a Llama with the memory that `name` selects, always with the same random weights, so that it has an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return _model(name)


def _model(name: str) -> Any:
    family = ("mistral", {"sliding_window": SLIDING}) if name == "sliding" else ("llama", {})
    model = make(family[0], num_key_value_heads=1, num_hidden_layers=2 if name.startswith("t") else 1, **SIZES, **family[1])
    if name.startswith("tc"):
        options: dict[str, Any] = {"window": 16, "sink": 2, "chunk": 16, "decay": (10, 1000)}
        config = {
            "tc": TensorCacheConfig(**options),
            "tc-rotary": TensorCacheConfig(**options, rotary=True),
            "tc-wedge": TensorCacheConfig(**options, rule="wedge"),
            "tc-paper": TensorCacheConfig.paper(window=16),
        }[name]
        tessera.attach(model, config)
    elif name == "tm":
        tessera.attach(model, TensorMemoryConfig(channels=4, grid=(3, 3), chunk=2))
    tessera.enable(model)
    with torch.no_grad():
        done = attached_memory(model)
        for layer in () if done is None else done.layers.values():
            layer.gate_logit.fill_(1.0)
            if name.startswith("tc"):
                layer.out.weight.normal_(0, 0.3)
        if name == "tm":
            # Not larger: a memory that dominates a token's result would amplify the rounding of bfloat16.
            done.shared.out_proj.weight.normal_(0, 0.1)
            done.shared.content_net.weight.normal_(0, 0.5)
            done.shared.coord_net.weight.normal_(0, 0.3)
    return model


@dataclass(frozen=True)
class Layout:
    """The form of a call's mask and positions, for any length.

    Attributes:
        padding: position of the padding within each row of this call.
        structure: "causal"; "quantized": new documents begin within the call; "prefix": a span is bidirectional.
        form: form of the mask: "none" if it is trivial, "2d" as from the tokenizer, "4d" bool, or "additive".
        positions: "slots": made by the model; "counted" without padding; with a "gap"; or a "restart" at 0.
        numbers: random lengths and places, one for each row.
    """

    padding: str
    structure: str
    form: str
    positions: str
    numbers: tuple[int, ...]


PADDINGS = ("no", "no", "left", "right", "middle")
STRUCTURES = ("causal", "causal", "packed", "prefix")
LAYOUTS = st.builds(
    Layout,
    st.sampled_from(PADDINGS),
    st.sampled_from(STRUCTURES),
    st.sampled_from(("none", "2d", "4d", "additive")),
    st.sampled_from(("slots", "counted", "gap", "restart")),
    st.tuples(*[st.integers(0, 80)] * MOST_ROWS),
)


Call = tuple[int, Layout]
#: Short calls, including single tokens.
CALLS: st.SearchStrategy[Call] = st.tuples(st.one_of(st.just(1), st.integers(1, 70)), LAYOUTS)


def then_a_call(**strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """A rule followed by a call, because only a call shows the effect of an operation."""

    def decorate(operation: Callable[..., None]) -> Any:
        def both(self: CacheMachine, call: Call, **drawn: Any) -> None:
            operation(self, **drawn)
            self.run(call)

        both.__name__ = operation.__name__
        return rule(call=CALLS, **strategies)(both)

    return decorate


class CacheMachine(RuleBasedStateMachine):
    """The state machine described in the module's docstring. Subclasses set `kind`."""

    kind: ClassVar[Kind]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.calls = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(rows=st.integers(1, 3), n=st.integers(1, 150), layout=LAYOUTS)
    def begin(self, rows: int, n: int, layout: Layout) -> None:
        kind = self.kind
        self.model = model_of(kind.model)
        self.cache = self.new_cache()
        self.batch = rows
        done = attached_memory(self.model)
        layers, sliding = [], SLIDING if kind.model == "sliding" else None
        for index in range(len(self.cache.layers)):
            memory = done.layers[index] if done is not None and done.kind == "TensorCache" else None
            rules = Rules.of(kind.spec, kind.prefill, sliding, index, len(self.cache.layers))
            layers.append(LayerOracle(rules, memory, tuple((i + DIM // 2) % DIM for i in range(DIM))))
        self.truth = LlamaOracle(self.model, layers, done if kind.model == "tm" else None)
        self.begin_anew()
        self.run((n, layout))

    def begin_anew(self) -> None:
        # For each row: which slots are tokens, of which document, and the offset of positions from the count.
        self.real: list[list[bool]] = [[] for _ in range(self.batch)]
        self.document: list[list[int]] = [[] for _ in range(self.batch)]
        self.ahead = [0] * self.batch
        self.recording = self.rough = False

    @property
    def slots(self) -> int:
        return len(self.real[0])

    # Calls

    @rule(calls=st.lists(CALLS, min_size=1, max_size=4), inference=st.booleans())
    def call(self, calls: list[Call], inference: bool) -> None:
        for n, layout in calls:
            self.run((n, layout), inference=inference)

    @rule(n=st.integers(65, 200), layout=LAYOUTS)
    def long_call(self, n: int, layout: Layout) -> None:
        self.run((n, layout))

    @rule(call=CALLS, dtype=st.sampled_from(("half", "autocast")))
    def call_in_half_precision(self, call: Call, dtype: str) -> None:
        """Call as under autocast, with keys in float32 and values in bfloat16, or with both in bfloat16."""
        self.run(call, dtype)

    def run(self, call: Call, dtype: str = "float32", inference: bool = False) -> None:
        n, layout = call
        if self.slots + n > self.kind.most_slots:
            return
        self.rough = self.rough or dtype != "float32"
        visible, mask, positions = self.laid_out(n, layout)
        self.calls += 1
        torch.manual_seed(self.calls)
        with torch.inference_mode() if inference else torch.no_grad():
            found, wanted = (self.through_attention if not self.kind.model else self.through_model)(
                n, visible, mask, positions, dtype
            )
        real = torch.tensor(self.real)[:, self.slots - n :]
        if real.any():
            error = (found.float() - wanted)[real].flatten(1).square().mean(1).sqrt().max()
            error = float(error / wanted[real].square().mean().sqrt())
            tolerance = max(self.kind.tolerance, 0.06 if self.rough else 0)
            assert error < tolerance, f"a token's result is off by {error:.2g} of what is right"

    def through_attention(
        self, n: int, visible: Tensor, mask: Tensor | None, positions: Tensor | None, dtype: str
    ) -> tuple[Tensor, Tensor]:
        """Pass random queries, keys and values to the cache and to the attention function, as a model does."""
        q = torch.randn(self.batch, 2, n, DIM)
        k, v = torch.randn(2, self.batch, 1, n, DIM).unbind(0)
        if dtype == "half":
            q, k, v = (x.bfloat16() for x in (q, k, v))
        elif dtype == "autocast":
            v = v.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
            deferred = self.cache.update(k, v, 0)
            found, _ = attention_forward(torch.nn.Module(), q, *deferred, mask)
        wanted = self.truth.layers[0].step(Given(q, k, v, visible))[0]
        write_anew(k, v, mask)
        return found, wanted

    def through_model(
        self, n: int, visible: Tensor, mask: Tensor | None, positions: Tensor | None, dtype: str
    ) -> tuple[Tensor, Tensor]:
        """Run random tokens through the model and through the oracle."""
        ids = torch.randint(3, VOCAB, (self.batch, n))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != "float32"):
            found = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache).logits
        counted = torch.arange(self.slots - n, self.slots).expand(self.batch, -1) if positions is None else positions
        wanted = self.truth.step(ids, counted, visible)
        write_anew(mask, positions)
        return found, wanted

    def laid_out(self, n: int, layout: Layout) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Lengthen the rows by `n` slots.

        Returns:
            visible (batch, n, slots); the mask in the form that is passed; positions (batch, n) as passed.
        """
        numbers, past = layout.numbers, self.slots
        spans = torch.zeros(self.batch, past + n, dtype=torch.long)
        for b in range(self.batch):
            length = min(numbers[b], n)
            begin = {"left": 0, "right": n - length, "middle": numbers[-1 - b] % n}.get(layout.padding, n)
            new = [not begin <= i < begin + length for i in range(n)]
            last = self.document[b][-1] if past else 0
            starts = {numbers[b] % n, numbers[-1 - b] % n} if self.structured(layout) == "packed" else set()
            self.document[b] += [last + sum(start <= i for start in starts) for i in range(n)]
            self.real[b] += new
            if self.structured(layout) == "prefix":
                begin = numbers[-1 - b] % n
                spans[b, past + begin : past + begin + 12] = 1
        real, document = torch.tensor(self.real), torch.tensor(self.document)
        slot = torch.arange(past + n)
        shown = (slot <= slot[past:, None]) | ((spans[:, past:, None] == spans[:, None]) & (spans[:, None] > 0))
        shown = shown & (document[:, past:, None] == document[:, None])
        if self.kind.model == "sliding":
            shown = shown & (slot > slot[past:, None] - SLIDING)
        visible = shown & real[:, past:, None] & real[:, None]
        mask, positions = self.mask(visible, real, document, layout), self.positions(real, n, layout)
        if self.kind.model == "tm" and positions is not None and bool((positions.diff(dim=1) < 1).any()):
            mask = real.long()  # without a mask, such positions would mean packed documents
        return visible, mask, positions

    def structured(self, layout: Layout) -> str:
        return "causal" if self.kind.padding_only else layout.structure

    def mask(self, visible: Tensor, real: Tensor, document: Tensor, layout: Layout) -> Tensor | None:
        # A form is used only for masks that it can express.
        causal = self.structured(layout) != "prefix" and not document.any()
        if causal and bool(real.all()) and layout.form in ("none", "4d" if self.kind.model == "tm" else "none"):
            return None
        if self.kind.model and causal and (layout.form in ("none", "2d") or self.kind.model == "tm"):
            return real.clone() if layout.form == "additive" or sum(layout.numbers) % 2 else real.long()
        visible = visible[:, :, self.cache.get_mask_sizes(visible.shape[1], 0)[1] :]
        given = visible[:1] if bool((visible == visible[:1]).all()) else visible
        if layout.form != "additive":
            return given[:, None].clone()
        return torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)[:, None]

    def positions(self, real: Tensor, n: int, layout: Layout) -> Tensor | None:
        counted = real.long().cumsum(1)[:, self.slots - n :] - 1
        if layout.positions == "slots" and not any(self.ahead) and bool(real.all()):
            return None
        if layout.positions == "gap":
            self.ahead = [far + number for far, number in zip(self.ahead, layout.numbers, strict=False)]
        if layout.positions == "restart":
            self.ahead = [-int(counted[b, 0].clamp(min=0)) for b in range(self.batch)]
        return (counted + torch.tensor(self.ahead)[:, None]).clamp(min=0)

    # Other operations

    @then_a_call(slots=st.one_of(st.integers(0, 40), st.integers(40, 200)), by_length=st.booleans())
    def crop(self, slots: int, by_length: bool) -> None:
        self.forget_newest(slots, by_length)

    @then_a_call(draft=CALLS, slots=st.integers(0, 70), record=st.sampled_from((False, False, False, True)))
    def speculate(self, draft: Call, slots: int, record: bool) -> None:
        """Read draft tokens and crop some of them."""
        if record:
            self.recording = True
            self.again()
        self.run(draft)
        self.forget_newest(min(slots, draft[0]), False)

    def forget_newest(self, slots: int, by_length: bool) -> None:
        slots = min(slots, self.slots)
        rest = self.slots - slots
        try:
            self.cache.crop(rest if by_length and rest else -slots)
        except ValueError:
            # A Tensor Memory can be cropped by a limited number of tokens.
            read = self.kind.model == "tm" and slots
            assert read or any(layer.may_refuse(slots) for layer in self.truth), "what could be forgotten was not"
            return
        self.recording = False
        with torch.no_grad():
            self.truth.crop(slots)
        self.real, self.document = ([row[:rest] for row in rows] for rows in (self.real, self.document))

    def again(self) -> None:
        # A file does not store whether the past is recorded; it is set again after loading.
        if self.recording:
            self.cache.activate_past_recording()
        for layer in self.truth:
            layer.recording = self.recording

    @then_a_call(
        how=st.sampled_from(("order", "repeat", "choose", "mark")),
        rows=st.lists(st.integers(0, 59), min_size=1, max_size=MOST_ROWS),
    )
    def change_rows(self, how: str, rows: list[int]) -> None:
        chosen = [row % self.batch for row in rows]
        if how == "order":
            chosen = (chosen * self.batch)[: self.batch]
            self.cache.reorder_cache(torch.tensor(chosen))
        elif how == "repeat":
            times = 2 if self.batch * 2 <= MOST_ROWS else 1
            chosen = [row for row in range(self.batch) for _ in range(times)]
            self.cache.batch_repeat_interleave(times)
        elif how == "choose":
            self.cache.batch_select_indices(torch.tensor(chosen))
        else:
            chosen = sorted(set(chosen))
            self.cache.batch_select_indices(torch.tensor([row in chosen for row in range(self.batch)]))
        self.select(chosen)

    def select(self, rows: list[int]) -> None:
        self.truth.select(rows)
        self.real, self.document = ([list(all_rows[b]) for b in rows] for all_rows in (self.real, self.document))
        self.ahead = [self.ahead[b] for b in rows]
        self.batch = len(rows)

    @then_a_call(anew=st.booleans())
    def reset(self, anew: bool) -> None:
        """Reset the cache, or replace it by a new one, which does not record yet."""
        if anew:
            self.cache, self.recording = self.new_cache(), False
        self.forget()

    def new_cache(self) -> tessera.Cache:
        return tessera.Cache(self.kind.spec, self.model, prefill=self.kind.prefill)  # type: ignore[arg-type]

    def forget(self) -> None:
        self.cache.reset()
        self.truth.reset()
        recording = self.recording
        self.begin_anew()
        self.recording = recording
        self.again()

    @then_a_call(how=st.sampled_from(("file", "copy", "original", "device")), n=st.integers(1, 70))
    def keep(self, how: str, n: int) -> None:
        """Apply operations that do not change a cache's contents."""
        if how == "file":
            self.save_and_load()
        elif how == "device":
            self.move()
        else:
            self.copy_it(how == "copy", n)

    def save_and_load(self) -> None:
        path = self.folder / "cache.safetensors"
        self.cache.save(path)
        self.cache = tessera.Cache.load(path, self.model)
        for layer in self.truth:
            layer.expecting = ""
        self.again()

    def copy_it(self, go_on_with_the_copy: bool, n: int) -> None:
        """A copy and its original do not affect each other."""
        twin = copy.deepcopy(self.cache)
        self.cache, other = (twin, self.cache) if go_on_with_the_copy else (self.cache, twin)
        real, document = (
            torch.tensor([row + [last] * n for row, last in zip(rows, lasts, strict=True)])
            for rows, lasts in (
                (self.real, [True] * self.batch),
                (self.document, [row[-1] if row else 0 for row in self.document]),
            )
        )
        slot = torch.arange(self.slots + n)
        visible = (slot <= slot[-n:, None]) & real[:, None] & (document[:, -n:, None] == document[:, None])
        self.feed(other, self.batch, n, self.mask(visible, real, document, Layout("no", "causal", "2d", "counted", ())))
        other.reset()

    def move(self) -> None:
        for layer in self.cache.layers:
            layer.offload()
            layer.prefetch()
        self.cache.to("cpu")

    @torch.no_grad()
    def feed(self, cache: tessera.Cache, rows: int, n: int, mask: Tensor | None = None) -> None:
        """Make a call and ignore its results."""
        if self.kind.model:
            self.model(torch.full((rows, n), 5), attention_mask=mask, past_key_values=cache)
        else:
            deferred = cache.update(*torch.ones(2, rows, 1, n, DIM).unbind(0), 0)
            attention_forward(torch.nn.Module(), torch.ones(rows, 2, n, DIM), *deferred, mask)

    @then_a_call(n=st.integers(1, 70))
    def refuse_another_batch(self, n: int) -> None:
        # A Tensor Memory that has seen padding requires a mask.
        with pytest.raises(ValueError, match=rf"{self.batch}\b|had padding"):
            self.feed(self.cache, self.batch + 1, n)

    # Invariants

    @invariant()
    def the_length_is_right(self) -> None:
        assert self.cache.get_seq_length() == self.slots

    @invariant()
    def every_token_is_held_once(self) -> None:
        for layer, oracle in zip(self.cache.layers, self.truth, strict=True):
            least, most = oracle.held()
            held = sum(layer.held().values())
            assert least <= held <= most, f"{held} tokens are held, which should be {least} to {most}"

    @invariant()
    def every_token_is_in_one_tier(self) -> None:
        for group in (group for layer in self.cache.layers for group in layer.groups):
            chain = group.chain
            assert chain.dropped + sum(tier.tokens for tier in chain.tiers) == group.length
            at = 0
            for source in chain.sources():
                assert source.start in (at, chain.sink.tokens + chain.dropped)
                at = source.start + source.tokens
            assert at == group.length or not chain.recent.tokens

    @invariant()
    def all_bytes_are_reported(self) -> None:
        report = self.cache.report()
        found: dict[int, Tensor] = {}
        for layer in self.cache.layers:
            tensors_in(layer, found, set())
        # Counted by storage: kernels view the same bytes in other shapes, and a view keeps its whole storage alive.
        assert report.nbytes == sum(report.tiers.values())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found.values() if t.numel()}
        assert report.nbytes == sum(storages.values()), f"{report.nbytes} bytes are reported, {sum(storages.values())} kept"
        assert report.tokens == self.slots


def write_anew(*given: Tensor | None) -> None:
    """Overwrite the arguments of the call, since callers may reuse their buffers."""
    for tensor in given:
        if tensor is not None:
            tensor.zero_()


def tensors_in(thing: object, found: dict[int, Tensor], done: set[int]) -> None:
    """Return every reachable tensor by identity, except codecs' tables and the model's tensors."""
    if id(thing) in done:
        return
    done.add(id(thing))
    if isinstance(thing, Tensor):
        found[id(thing)] = thing
    elif isinstance(thing, dict):
        for value in thing.values():
            tensors_in(value, found, done)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            tensors_in(value, found, done)
    elif type(thing).__module__.startswith("tessera.") and not isinstance(thing, tessera.codecs.Codec):
        tensors_in(getattr(thing, "__dict__", {}), found, done)
