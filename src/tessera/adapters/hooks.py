"""The hooks by which a Tensor Memory works in a model: see `tessera.adapters.add_tensor_memory` for what they compute.

The state of one call is kept on a stack of the thread that runs it, from the hook before a module to the one after it, whether
it returns or raises. So threads may share a model, and calls may be nested.
"""

from __future__ import annotations

import inspect
import threading
import uuid
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache as TransformersCache

from tessera.adapters.streams import advance_documents, known_stream, stream_of, tokens_back
from tessera.adapters.tokens import PACKED, Tokens, read_tokens
from tessera.cache_layers.cache_layer import TesseraLayer
from tessera.cache_layers.layer_states import stateful
from tessera.cache_layers.stream import Stream
from tessera.finite import FiniteCheck
from tessera.tensor_memory.gated_layer import TensorMemoryLayer
from tessera.tensor_memory.tensor_memory import TensorMemory
from tessera.tensor_memory.tensor_memory_state import TensorMemoryState


class Call:
    """A call of the module that runs the layers."""

    def __init__(self) -> None:
        self.tokens = Tokens()
        #: In encoders: the state after the layers so far, and the last of them that has a memory.
        self.state: TensorMemoryState | None = None
        self.after = -1


class Visit:
    """A call of one layer within `call`."""

    def __init__(self, index: int, call: Call, cache: TransformersCache | None) -> None:
        self.index, self.call, self.cache = index, call, cache
        self.added: Tensor | None = None


class CallStack(threading.local):
    """The calls that this thread is in, innermost last. In a copy of a model it is empty."""

    def __init__(self) -> None:
        self.frames: list[Call | Visit] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return CallStack, ()


class MemoryHooks:
    """The state that all hooks of a model share, apart from the state of calls.

    Args:
        owner: the module that calls the layers.
        layers: layers of the model, in the order in which they run.
        norms: the norm between attention and MLP of each layer.
        causal: whether no output may depend on a later token.
        window: window of the model's sliding layers, in tokens, or None.
        memory: the memory that all layers share.
        added: the module added to each layer, by index.
        threaded: see `TensorMemoryConfig`.
    """

    def __init__(
        self,
        owner: nn.Module,
        layers: list[nn.Module],
        norms: list[nn.Module],
        causal: bool,
        window: int | None,
        memory: TensorMemory,
        added: dict[int, TensorMemoryLayer],
        threaded: bool,
    ) -> None:
        self.memory, self.added = memory, added
        self.causal, self.threaded, self.window = causal, threaded, window
        self.name = uuid.uuid4().hex
        self.first, self.last, self.end = min(added), max(added), len(layers) - 1
        self.stack = CallStack()
        # The hook before a module runs first, and the one after it runs last, after everything that may fail.
        self.registered: list[Any] = []
        if causal:
            self.registered.append(owner.register_forward_pre_hook(self.open, prepend=True))
            named = inspect.signature(owner.forward)
            self.registered.append(owner.register_forward_pre_hook(partial(self.read, named), with_kwargs=True))
            self.registered.append(owner.register_forward_hook(self.close, always_call=True))
        for index, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
            # A threaded call ends with its last layer, whether that has a memory or not.
            if index in added or not causal:
                enter, leave = partial(self.enter, index), partial(self.leave, index)
                self.registered.append(layer.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
                self.registered.append(layer.register_forward_hook(leave, always_call=True))
            if index in added:
                self.registered.append(norm.register_forward_pre_hook(partial(self.add, index)))

    # Hooks of the module that calls the layers

    def open(self, *_: Any) -> None:
        """Hook before a call of a causal model."""
        self.stack.frames.append(Call())

    def read(self, named: inspect.Signature, owner: nn.Module, args: Any, kwargs: Any) -> Any:
        """Read what the call says about its tokens, before anything has changed, and give it a mask that has been read."""
        given = dict(named.bind_partial(*args, **kwargs).arguments)
        for name, parameter in named.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        cache = next((value for value in given.values() if isinstance(value, TransformersCache)), None)
        past = 0 if cache is None else int(cache.get_seq_length())
        known: Stream | None = None

        def kept() -> Tensor | None:
            nonlocal known
            known = known_stream(cache, self.first, self.name) if past else None
            return None if known is None else known.kept

        made = given.get("use_cache")
        made = getattr(getattr(owner, "config", None), "use_cache", False) if made is None else made
        call = self.stack.frames[-1]
        assert isinstance(call, Call)
        call.tokens = read_tokens(given, cache is not None or bool(made), kept, past, self.window)
        if known is not None:
            known.finite.read()
        if call.tokens.mask is None or "attention_mask" not in kwargs:
            return None
        return args, {**kwargs, "attention_mask": call.tokens.mask}

    def close(self, *_: Any) -> None:
        """Hook after the call."""
        frames = self.stack.frames
        while frames and not isinstance(frames.pop(), Call):
            pass

    # Of layers

    def enter(self, index: int, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """Hook before a layer."""
        frames = self.stack.frames
        if not self.causal and index == 0:
            if frames and isinstance(frames[-1], Call):
                # The earlier call stopped before its last layer.
                frames.pop()
            frames.append(Call())
        call = frames[-1] if frames and isinstance(frames[-1], Call) else Call()
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, TransformersCache)), None)
        frames.append(Visit(index, call, cache))
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise ValueError(
                "a Tensor Memory and gradient checkpointing do not go together: layers run again without their state"
            )

    def add(self, index: int, _: nn.Module, args: Any) -> Any:
        """Hook before the norm: add the memory's contribution to its input x."""
        visit = self.stack.frames[-1] if self.stack.frames else None
        if not isinstance(visit, Visit) or visit.index != index:
            # The norm was called outside a layer.
            return None
        x: Tensor = args[0]
        visit.added = self._causal(visit, x) if self.causal else self._threaded(visit, x)
        return (x + visit.added, *args[1:])

    def leave(self, index: int, _: nn.Module, __: Any, output: Any) -> Any:
        """Hook after a layer: add the memory's contribution to its output; `output` is None where it raised."""
        frames = self.stack.frames
        added = None
        if frames and isinstance(visit := frames[-1], Visit) and visit.index == index:
            added = visit.added
            frames.pop()
        if not self.causal and frames and (output is None or index == self.end):
            frames.pop()
        if output is None or added is None:
            return None
        if isinstance(output, tuple):
            return (output[0] + added, *output[1:])
        return output + added

    # The contribution

    def _causal(self, visit: Visit, x: Tensor) -> Tensor:
        index, cache, tokens = visit.index, visit.cache, visit.call.tokens
        layer, memory = self.added[index], self.memory
        finite: FiniteCheck | None = None

        def run(part: Tensor, state: TensorMemoryState | None) -> tuple[Tensor, TensorMemoryState]:
            return layer(memory, part, None if state is None else state.to(memory.device), finite=finite)

        rows, count = x.shape[0], x.shape[1]
        if tokens.shape not in (None, (rows, count)):
            raise ValueError(f"the model was called with tokens {tokens.shape}, and a layer of it with {(rows, count)}")
        if cache is None:
            if tokens.begins is not None:
                return advance_documents(run, x, tokens.real, tokens.begins)
            return Stream(rows).advance(run, x, tokens.real)
        if tokens.begins is not None:
            raise ValueError(PACKED)
        past = int(cache.get_seq_length(index)) - count
        stream = stream_of(cache, index, rows, past, self.name, memory.config)
        finite = self._check_of(cache)
        if index == self.first:
            stream.note(count, tokens.real)
        added = stream.advance(run, x, tokens.real, tokens_back(cache, stream))
        stateful(cache.layers[index]).used()
        return added

    def _check_of(self, cache: TransformersCache) -> FiniteCheck | None:
        """Return the check for finite numbers that all layers share: the cache's own, or that of the first stream."""
        if isinstance(cache.layers[0], TesseraLayer):
            return cache.layers[0].policy.finite
        first = known_stream(cache, self.first, self.name)
        return None if first is None else first.finite

    def _threaded(self, visit: Visit, x: Tensor) -> Tensor:
        index, call = visit.index, visit.call
        before = max((other for other in self.added if other < index), default=-1)
        if self.threaded and call.after != before:
            raise ValueError(
                f"layer {index} ran without layer {before} before it; gradient checkpointing cannot be used with a memory"
            )
        added, state = self.added[index](self.memory, x, call.state if self.threaded else None)
        call.after = index
        call.state = self.memory.flush(state) if self.threaded and index != self.last else None
        return added
