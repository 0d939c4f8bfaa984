"""A slow reference implementation: it keeps all keys and values of every row, and computes each query by the definition.

It shares no storage or grouping with the library. A row is the list of its real tokens; a token's place is the number of real
tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tessera import codecs
from tessera.cache import BLOCK
from tessera.codecs.channel_stats import KeyStats
from tessera.tiers.per_layer import layer_specs, parse

#: Additional exact tokens of a cache that records its past.
RECORDED = 512
#: Weight of the deviation in the choice of blocks.
SPREAD = 1.5
#: Number of a row's first tokens from which key statistics are measured.
LEARN = 128


@dataclass(frozen=True)
class Rules:
    """The meaning of a specification for a layer.

    Attributes:
        sink, recent, window: fields of `tessera.tiers.spec.Spec`.
        codecs: also from there, and for each `limits`, the maximum number of its tokens, and `tops`, that of those which a
            query reads.
        matrix: whether tokens that leave the window, or the last codec, are written into a Tensor Cache.
        packed_prefill: whether a call's queries read the tokens that it quantises in quantised form.
        sliding: size of the model's own sliding window in slots, which the mask applies; None: no window.
        layer: its index, for codebooks that differ by layer.
    """

    sink: int
    recent: int
    codecs: tuple[codecs.Codec, ...]
    limits: tuple[int | None, ...]
    tops: tuple[int | None, ...]
    window: int | None
    matrix: bool
    packed_prefill: bool
    sliding: int | None = None
    layer: int = 0

    @property
    def learns(self) -> int:
        """Return the number of tokens whose queries are needed before a key is quantised."""
        return max(LEARN, self.sink + BLOCK) if any(codec.weighs for codec in self.codecs) else 0

    @property
    def limit(self) -> int | None:
        """Return the maximum number of tokens of the last codec, after which tokens are dropped."""
        return self.limits[-1] if self.limits else None

    @property
    def dissolves(self) -> bool:
        """Whether tokens that leave the last codec are decoded and written to the Tensor Cache."""
        return self.matrix and self.window is None

    @property
    def by_document(self) -> bool:
        """Whether each document has its own window and sinks."""
        return self.window is not None and self.sliding is None

    @staticmethod
    def of(text: str, prefill: str = "exact", sliding: int | None = None, layer: int = 0, layers: int = 1) -> Rules:
        spec = layer_specs(parse(text), layers)[layer]
        used, limits = tuple(codecs.get(name) for name, _ in spec.codecs), tuple(limit for _, limit in spec.codecs)
        tops = tuple(spec.top(name) for name, _ in spec.codecs)
        # A layer with a sliding window needs neither sinks outside of it nor more exact tokens than it sees.
        sink, recent = (spec.sink, spec.recent) if sliding is None else (0, min(spec.recent, sliding - 1))
        packed = prefill == "quantized"
        return Rules(sink, recent, used, limits, tops, spec.window, spec.tensor_cache, packed, sliding, layer)


@dataclass(frozen=True)
class Row:
    """The state of one batch row in one layer. It is never changed in place, so that rows can be repeated.

    Attributes:
        real: for each slot, whether it is a token.
        k, v: (kv_heads, tokens, head_dim) float32 of the real tokens, in their present, possibly dequantised, form.
        bare: the keys in the form that is written to the matrix.
        quantised: the place up to which tokens after the sinks are quantised.
        passed: for each codec but the last, the place up to which its tokens have moved to the next.
        summaries: of the blocks of codecs that are read sparsely, by the place of their first token: the mean of their keys
            (kv_heads, head_dim) and its deviation (kv_heads,), as the codec gives them, in the scale of coded keys.
        dropped: the place up to which tokens after the sinks have been dropped.
        kept: the place from which tokens after the sinks are certainly stored.
        asked: queries of the first tokens, (q_heads, tokens, head_dim).
        stats: key statistics, once they are fixed.
        begins: for a window, the place of the first token of each token's document.
        matrices: for a window, the matrix (kv_heads, head_dim, head_dim) after each token, and the number of pairs written.
        dissolved: behind codecs, the matrix; None: nothing has been written.
    """

    real: tuple[bool, ...]
    k: Tensor
    v: Tensor
    bare: Tensor
    quantised: int
    dropped: int
    kept: int
    passed: tuple[int, ...] = ()
    asked: Tensor | None = None
    stats: KeyStats | None = None
    begins: tuple[int, ...] = ()
    matrices: tuple[tuple[Tensor, int], ...] = ()
    dissolved: Tensor | None = None
    summaries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.k.shape[1]


@dataclass(frozen=True)
class Given:
    """The inputs of a layer in one call.

    Attributes:
        q: (batch, heads, n, head_dim); k, v: (batch, kv_heads, n, head_dim).
        visible: (batch, n, slots) bool, all slots so far and the new ones; False everywhere for padding.
        bare_q, bare_k: queries and keys in the form that a Tensor Cache uses; None: unchanged.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor
    bare_q: Tensor | None = None
    bare_k: Tensor | None = None


class LayerOracle:
    """The reference of one attention layer.

    Args:
        rules: rules of its cache.
        memory: the model's `TensorCacheLayer`, whose parameters are read, for a spec with "tc".
        partner: of each channel of a key the one that the model's rotary embedding mixes it with.
    """

    def __init__(self, rules: Rules, memory: Any = None, partner: tuple[int, ...] | None = None) -> None:
        self.rules = rules
        self.memory = memory
        self.partner = partner
        self.rows: list[Row] = []
        self.recording = False
        #: After a crop of recorded tokens: "next" until the next call, "now" until the next crop or call.
        self.expecting = ""

    def step(self, given: Given) -> tuple[Tensor, Tensor]:
        """Run one call. Return the results of attention and of the matrix, (batch, n, heads, head_dim) each, zero at
        padding."""
        batch, heads, n, dim = given.q.shape
        self.expecting = "now" if self.expecting == "next" else ""
        if not self.rows:
            nothing = torch.zeros(given.k.shape[1], 0, dim)
            at = self.rules.sink
            passed = (at,) * max(0, len(self.rules.codecs) - 1)
            self.rows = [Row((), nothing, nothing, nothing, at, at, at, passed) for _ in range(batch)]
        out, read = torch.zeros(2, batch, n, heads, dim).unbind(0)
        for b in range(batch):
            row, past = self.rows[b], len(self.rows[b].real)
            # A slot is padding if no query of the same call sees it.
            new = given.visible[b, :, past:].any(0)
            old = row.tokens
            row = replace(
                row,
                real=(*row.real, *new.tolist()),
                k=torch.cat((row.k, given.k[b, :, new].float()), 1),
                v=torch.cat((row.v, given.v[b, :, new].float()), 1),
                bare=torch.cat((row.bare, (given.k if given.bare_k is None else given.bare_k)[b, :, new].float()), 1),
            )
            if self.rules.learns and row.stats is None:
                told = given.q[b, :, new].float()
                told = told if row.asked is None else torch.cat((row.asked, told), 1)
                row = replace(row, asked=told[:, :LEARN])
            spare = RECORDED if self.recording or self.expecting else 0
            if self.rules.packed_prefill:
                row = self._quantise(row, spare)
            if row.tokens > old:
                seen = given.visible[b][new][:, torch.tensor(row.real)]
                row = self._documents(row, seen, old) if self.rules.by_document else row
                queries = given.q[b, :, new].float()
                out[b, new] = self._attend(row, queries, self._chosen(row, queries, self._visible(row, seen, old)))
                if self.rules.matrix:
                    queries = (given.q if given.bare_q is None else given.bare_q)[b, :, new].float()
                    row, read[b, new] = self._recall(row, self._asked(queries), old)
            self.rows[b] = self._end(row, spare, row.tokens > old)
        return out, read

    def _visible(self, row: Row, seen: Tensor, old: int) -> Tensor:
        """Return (queries, tokens): what the mask shows, without what the specification hides. Its window is a lower bound
        only."""
        rules, place = self.rules, torch.arange(row.tokens)
        query = place[old:, None]
        if rules.window is not None:
            sinks = place - torch.tensor(row.begins) < rules.sink if rules.by_document else place < rules.sink
            seen = seen & ((place > query - rules.window) | sinks)
        return seen & ~((place >= rules.sink) & (place < row.dropped))

    def _chosen(self, row: Row, q: Tensor, seen: Tensor) -> Tensor:
        """Hide the blocks of each sparsely read codec that do not promise most for any query of the group: of those that the
        query sees at all, the ones with the highest score of the mean plus a multiple of what a deviation may add."""
        kv_heads, places = row.k.shape[0], (row.quantised, *row.passed, max(self.rules.sink, row.dropped))
        seen = seen.expand(q.shape[0], -1, -1).clone()
        for tier, top in enumerate(self.rules.tops):
            begins = range(max(places[tier + 1], places[-1]), places[tier], BLOCK)
            if top is None or top >= len(begins) * BLOCK:
                continue
            narrow = row.stats.widths if row.stats is not None and self.rules.codecs[tier].weighs else torch.ones(1)
            grouped = q.unflatten(0, (kv_heads, -1)) / narrow.reshape(-1, 1, 1, narrow.shape[-1])
            promises = []
            for begin in begins:
                mean, deviation = row.summaries[begin]
                promise = (grouped * mean[:, None, None]).sum(-1)
                promise = promise + SPREAD * grouped.norm(dim=-1) * deviation[:, None, None]
                hidden = ~seen[:, :, begin : begin + BLOCK].any(-1).unflatten(0, (kv_heads, -1))
                promises.append(promise.masked_fill(hidden, -math.inf).amax(1))  # (kv_heads, queries)
            order = torch.stack(promises).argsort(0, descending=True).argsort(0)
            for rank, begin in zip(order, begins, strict=True):
                left_out = (rank >= top // BLOCK).repeat_interleave(q.shape[0] // kv_heads, 0)
                seen[:, :, begin : begin + BLOCK] &= ~left_out[..., None]
        return seen

    @staticmethod
    def _attend(row: Row, q: Tensor, seen: Tensor) -> Tensor:
        """Compute attention in float64. q: (heads, queries, head_dim), seen: (heads, queries, tokens) -> (queries, heads,
        head_dim)."""
        group = q.shape[0] // row.k.shape[0]
        k, v = (x.double().repeat_interleave(group, 0) for x in (row.k, row.v))
        scores = q.double() @ k.mT / math.sqrt(q.shape[-1])
        return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(0, 1).float()

    @staticmethod
    def _documents(row: Row, seen: Tensor, old: int) -> Row:
        """Return document numbers: a token that sees no earlier one begins a document, others belong to that of the newest
        seen."""
        begins = list(row.begins)
        for place, sees in enumerate(seen, start=old):
            before = sees[:place].nonzero().flatten()
            begins.append(begins[int(before[-1])] if len(before) else place)
        return replace(row, begins=tuple(begins))

    def _recall(self, row: Row, q: Tensor, old: int) -> tuple[Row, Tensor]:
        """Run the recurrence for each token: a pair leaves the window, is written to the matrix, and the query reads."""
        nothing, matrices, reads = torch.zeros(*row.k.shape[::2], row.k.shape[2]), list(row.matrices), []
        if self.rules.dissolves:
            a = nothing if row.dissolved is None else row.dissolved
            return row, torch.stack([(each.unflatten(0, (a.shape[0], -1)) @ a).flatten(0, 1) for each in q.unbind(1)])
        assert self.rules.window is not None
        for place in range(old, row.tokens):
            begin, leaves = row.begins[place], place - self.rules.window
            a, count = matrices[-1] if place > begin else (nothing, 0)
            before = a
            if leaves - begin >= self.rules.sink:
                a, count = self._written(a, row.bare[:, leaves], row.v[:, leaves]), count + 1
            matrices.append((a, count))
            grouped = q[:, place - old].unflatten(0, (a.shape[0], -1))
            reads.append((grouped @ (a if self.memory.config.order == "write_first" else before)).flatten(0, 1))
        return replace(row, matrices=tuple(matrices)), torch.stack(reads)

    def _asked(self, q: Tensor) -> Tensor:
        """Queries as the matrix is asked them."""
        return q / q.norm(dim=-1, keepdim=True).clamp(min=1e-12) if self.memory.config.normalise_queries else q

    def _written(self, a: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the matrix after a pair has been written. key, value: (kv_heads, head_dim)."""
        config, memory = self.memory.config, self.memory.memory
        decay, rate = (x.detach()[:, None, None] for x in (memory.decay, memory.write_rate))
        if config.rule == "delta":
            rate = torch.minimum(rate, decay)
        k, v = key[..., None], value[:, None] * config.value_scale
        if config.normalise_keys:
            k = k / k.norm(dim=1, keepdim=True).clamp(min=1e-12)
        if config.rule == "delta":
            v = v - k.mT @ a
        pair = k @ v
        return decay * a + rate * (pair - pair.mT if config.rule == "wedge" else pair)

    def _end(self, row: Row, spare: int, called: bool = False) -> Row:
        """Quantise, pass on and drop the oldest tokens after a call, or after a crop, which writes nothing into a matrix."""
        row = self._pass_on(self._quantise(row, spare))
        held, limit = (row.passed[-1] if row.passed else row.quantised) - row.dropped, self.rules.limit
        if limit is not None and held > limit and (called or not self.rules.dissolves):
            before, row = row.dropped, replace(row, dropped=row.dropped - (limit - held) // BLOCK * BLOCK)
            if self.rules.dissolves:
                a = torch.zeros(*row.k.shape[::2], row.k.shape[2]) if row.dissolved is None else row.dissolved
                for place in range(before, row.dropped):
                    a = self._written(a, row.k[:, place], row.v[:, place])
                row = replace(row, dissolved=a)
        return replace(row, kept=max(row.kept, row.dropped, self._oldest(row.real) - spare))

    def _oldest(self, real: tuple[bool, ...]) -> int:
        """Return the place of the oldest token, except sinks, that the next query of such a row sees."""
        rules, tokens = self.rules, sum(real)
        if rules.sliding is not None:
            return tokens - sum(real[max(0, len(real) - rules.sliding + 1) :])
        return 0 if rules.window is None else tokens - rules.window + 1

    def _quantise(self, row: Row, spare: int) -> Row:
        """Quantise whole blocks, counted from the end of the sinks, once `recent` tokens follow them."""
        rules = self.rules
        if not rules.codecs:
            return row
        begin = row.quantised
        count = max(0, row.tokens - begin - rules.recent - spare) // BLOCK * BLOCK
        if not count:
            return row
        if row.stats is None and rules.learns:
            if row.tokens - spare < rules.learns:
                return row
            # Without the sinks, and as the mean over a group of query heads.
            assert row.asked is not None
            squares = row.asked.square().unflatten(0, (row.k.shape[0], -1)).mean(1)
            keys = row.k[:, rules.sink : rules.learns]
            row = replace(row, stats=KeyStats.measure(squares[None], keys[None], self.partner), asked=None)
        return replace(self._coded(row, begin, begin + count, 0), quantised=begin + count)

    def _coded(self, row: Row, begin: int, end: int, tier: int) -> Row:
        """Return the tokens of these places after encoding and decoding by the codec of a tier."""
        rules, span = self.rules, slice(begin, end)
        codec = rules.codecs[tier]
        k, v = row.k.clone(), row.v.clone()
        one = torch.ones(1, *k.shape[::2])
        known = row.stats if codec.weighs else None
        widths, weights = (one, None) if known is None else (known.widths, known.weights)
        coded = codec.encode(k[None, :, span] * widths[:, :, None], "key", rules.layer, weights=weights)
        k[:, span] = (codec.decode(coded) / widths[:, :, None])[0]
        v[:, span] = codec.decode(codec.encode(v[None, :, span], "value", rules.layer))[0]
        summaries = row.summaries
        if rules.tops[tier] is not None:
            means, deviations = (x[0].unbind(1) for x in codec.summary([coded]))
            summaries = {**summaries, **dict(zip(range(begin, end, BLOCK), zip(means, deviations, strict=True), strict=True))}
        return replace(row, k=k, v=v, summaries=summaries)

    def _pass_on(self, row: Row) -> Row:
        """Move the tokens beyond a codec's limit to the next one, in whole blocks, oldest first."""
        newest = row.quantised
        for tier, oldest in enumerate(row.passed):
            limit = self.rules.limits[tier]
            assert limit is not None
            over = max(0, -(-(newest - max(oldest, row.dropped) - limit) // BLOCK) * BLOCK)
            if over:
                end = max(oldest, row.dropped) + over
                row = self._coded(row, end - over, end, tier + 1)
                row = replace(row, passed=(*row.passed[:tier], end, *row.passed[tier + 1 :]))
            newest = row.passed[tier]
        return row

    def may_refuse(self, slots: int) -> bool:
        """Whether a crop of the newest `slots` slots may be refused, because tokens that the next query needs may be gone."""
        return any(self._lost(row, slots) for row in self.rows)

    def _lost(self, row: Row, slots: int) -> bool:
        real, rules = row.real[: len(row.real) - slots], self.rules
        rest = sum(real)
        if rest == row.tokens:
            return False
        if rules.by_document and (row.begins[rest - 1] if rest else 0) != row.begins[-1]:
            return True
        if rules.matrix and not rules.dissolves and row.matrices[-1][1] != (row.matrices[rest - 1][1] if rest else 0):
            return True
        # Only those of a codec's tokens are needed that the crop exposes.
        oldest = rest if rules.limit is not None else self._oldest(real)
        if rules.sliding is not None:
            # It may also count tokens, for a later call may come without a mask that hides more.
            oldest = min(oldest, rest - rules.sliding + 1)
        return row.kept > rules.sink and oldest < row.kept

    def crop(self, slots: int) -> None:
        """Remove the newest `slots` slots of every row."""
        self.expecting = "next" if self.recording or self.expecting else ""
        self.recording = False
        for b, row in enumerate(self.rows):
            real = row.real[: len(row.real) - slots]
            rest, sink = sum(real), self.rules.sink
            # The remaining tokens of a split block are unquantised again, with the error they already have.
            whole = row.quantised if rest >= row.quantised else max(sink, sink + (rest - sink) // BLOCK * BLOCK)
            cut = replace(
                row,
                real=real,
                k=row.k[:, :rest],
                v=row.v[:, :rest],
                bare=row.bare[:, :rest],
                quantised=whole,
                passed=tuple(min(place, whole) for place in row.passed),
                dropped=min(row.dropped, whole),
                kept=min(row.kept, max(rest, sink)),
                asked=None if row.asked is None else row.asked[:, :rest],
                stats=row.stats if rest else None,  # an empty row starts again
                begins=row.begins[:rest],
                matrices=row.matrices[:rest],
                dissolved=row.dissolved if rest else None,
            )
            self.rows[b] = self._end(cut, 0)

    def select(self, rows: list[int]) -> None:
        """Replace row i by row rows[i]."""
        self.rows = [self.rows[b] for b in rows] if self.rows else []

    def reset(self) -> None:
        """Reset all state."""
        self.rows = []
        self.expecting = ""

    def held(self) -> tuple[int, int]:
        """Return the minimum and maximum number of stored tokens, over all rows."""
        rules = self.rules
        # Only whole blocks are dropped; a matrix still needs a pair that leaves the window at a step; and a sliding window
        # may be counted in slots or in tokens.
        slack = 0 if rules.window is None else BLOCK + int(rules.matrix)
        if rules.matrix and not rules.dissolves and (self.recording or self.expecting):
            slack += RECORDED  # pairs that left at tokens that may be cropped have not been written yet
        slack = slack if rules.sliding is None else 2 * BLOCK + rules.sliding
        least = most = 0
        for row in self.rows:
            # Nothing of earlier documents is stored.
            begin = row.begins[-1] if rules.by_document and row.begins else 0
            tokens = row.tokens - begin
            kept = tokens - max(0, row.kept - rules.sink - begin)
            least += kept
            most += min(tokens, kept + slack)
        return least, most


@dataclass
class LlamaOracle:
    """A reference Llama computed from a model's weights, with attention by `LayerOracle`, and attached memories.

    Args:
        model: a `LlamaForCausalLM` in float32; only its parameters are read.
        layers: the oracle of each layer.
        tensor_memory: an attached Tensor Memory; its `reference` is run on each row's real tokens.
    """

    model: Any
    layers: list[LayerOracle]
    tensor_memory: Any = None
    #: For each layer and row, the tokens that the Tensor Memory has read.
    states: list[list[Any]] = field(default_factory=list)
    #: For each layer and row, its inputs, (1, tokens, dim).
    read: list[list[Any]] = field(default_factory=list)

    @torch.no_grad()
    def step(self, ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Run one call. ids, positions: (batch, n); visible: (batch, n, slots). Return logits (batch, n, vocabulary)."""
        config, body = self.model.config, self.model.model
        batch, n = ids.shape
        real = visible[:, :, visible.shape[2] - n :].any(1)
        if self.tensor_memory is not None and not self.states:
            self.states = [[None] * batch for _ in self.layers]
            self.read = [[None] * batch for _ in self.layers]
        x = body.embed_tokens.weight[ids]
        for index, (layer, oracle) in enumerate(zip(body.layers, self.layers, strict=True)):
            h = _rms(x, layer.input_layernorm)
            attention = layer.self_attn
            q, k, v = (
                (h @ linear.weight.T).view(batch, n, -1, config.head_dim).transpose(1, 2)
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            rotated_q, rotated_k = (_rotated(y, positions, config) for y in (q, k))
            # The matrix gets keys without rotary phase, unless it is configured to keep it.
            bare = (q, k) if oracle.memory is not None and not oracle.memory.config.rotary else (None, None)
            out, read = oracle.step(Given(rotated_q, rotated_k, v, visible, *bare))
            x = x + out.flatten(2) @ attention.o_proj.weight.T
            if oracle.rules.matrix:
                x = x + torch.sigmoid(oracle.memory.gate_logit) * (read.flatten(2) @ oracle.memory.out.weight.T)
            if self.tensor_memory is not None:
                x = x + self._remember(index, x, real)
            h = _rms(x, layer.post_attention_layernorm)
            mlp = layer.mlp
            gate = torch.nn.functional.silu(h @ mlp.gate_proj.weight.T)
            x = x + (gate * (h @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
        return _rms(x, body.norm) @ self.model.lm_head.weight.T

    def _remember(self, index: int, x: Tensor, real: Tensor) -> Tensor:
        memory, own = self.tensor_memory.shared, self.tensor_memory.layers[index]
        added = torch.zeros_like(x)
        for b in range(len(x)):
            if real[b].any():
                given = own.norm(x[b : b + 1, real[b]])
                read, self.states[index][b] = memory.reference(given, self.states[index][b])
                old = self.read[index][b]
                self.read[index][b] = given if old is None else torch.cat((old, given), 1)
                added[b, real[b]] = torch.sigmoid(own.gate_logit) * read[0]
        return added

    def __iter__(self) -> Iterator[LayerOracle]:
        return iter(self.layers)

    def select(self, rows: list[int]) -> None:
        """Replace row i by row rows[i]."""
        for layer in self.layers:
            layer.select(rows)
        self.states = [[states[b] for b in rows] for states in self.states]
        self.read = [[given[b] for b in rows] for given in self.read]

    def crop(self, slots: int) -> None:
        """Remove the newest `slots` slots of every row; a memory rereads the rest."""
        for index, layer in enumerate(self.layers):
            layer.crop(slots)
            for b, given in enumerate(self.read[index] if self.read else ()):
                tokens = layer.rows[b].tokens if layer.rows else 0
                left = None if given is None or not tokens else given[:, :tokens]
                self.read[index][b] = left
                self.states[index][b] = None if left is None else self.tensor_memory.shared.reference(left)[1]

    def reset(self) -> None:
        """Reset all state."""
        self.states, self.read = [], []
        for layer in self.layers:
            layer.reset()


def _rms(x: Tensor, norm: Any) -> Tensor:
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def _rotated(x: Tensor, positions: Tensor, config: Any) -> Tensor:
    """x: (batch, heads, n, head_dim); its halves rotated by position · θ^(-2i / head_dim)."""
    half = x.shape[-1] // 2
    theta = config.rope_parameters["rope_theta"]
    angle = positions[:, None, :, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
