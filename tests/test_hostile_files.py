"""A damaged or malicious file is refused in one line that names it, or contains something valid.

Numbers in a file are checked before memory is allocated from them, only ValueError may be raised, and nothing may hang.
Whatever is loaded is used once.
"""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import tessera
from tessera import codecs
from tessera.adapters import attached_memory
from tessera.cache_layers.layer_states import state_of
from tessera.cache_layers.stream import TENSOR_MEMORY, Stream
from tessera.codecs import KeyStats, Packed, save_stats
from tessera.codecs.codebooks import direction_path, joint_path, read_directions, read_joint
from tessera.lab.models.vit import ViT, ViTConfig
from tessera.lab.models.vit_state import ViTState
from tessera.tensor_cache import TensorCache, TensorCacheConfig
from tessera.tensor_cache.infini import Infini
from tessera.tensor_memory import TensorMemory, TensorMemoryConfig

#: Maximum bytes that loading a file of some kilobytes may allocate at once.
MOST = 32 << 20
#: Maximum seconds of a case, also on a busy machine.
LONG = 20

TC = TensorCacheConfig(window=24, sink=3, slots=2, top_k=1, slow=(0.9, 0.5), normalise_read=True)
TM = TensorMemoryConfig(channels=4, grid=(3, 4), chunk=2)
SPECS = {
    "cache-hqmq": "sink:4 + hqmq:4 + recent:16",
    "cache-limit": "sink:4 + hqmq:s96_r4_med3@64 + recent:16",
    "cache-kivi": "kivi:4 + recent:16",
    "cache-pair": "(k=q8_0,v=hqmq:3) + recent:16",
    "cache-window": "sink:4 + window:30",
    "cache-dense": "dense",
    "cache-tc": "sink:3 + window:24 + tc",
    "cache-tm": "sink:4 + hqmq:4 + recent:16",
}
CODECS = ("hqmq:3", "hqmq:o21_r3", "hqmq:s24_r3_med3", "q4_0", "q8_0:norot", "int:3", "kivi:2", "scalar:3", "fp8", "fp8:scaled")


class Kind(NamedTuple):
    """A kind of file: functions that write it, read it, and use its contents."""

    path: Path
    load: Callable[[Path], Any]
    use: Callable[[Any], Any]


def llama(memory: Any = None) -> Any:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        return model if memory is None else tessera.attach(model, memory)


def step(model: Any, cache: tessera.Cache) -> None:
    """Run one more token for every row."""
    cache.report()
    layer = cache.layers[0]
    rows, stream, mask = layer.batch or 1, state_of(layer, TENSOR_MEMORY), None
    if isinstance(stream, Stream) and stream.kept is not None:
        mask = torch.cat((stream.kept, torch.ones(rows, 1, dtype=torch.bool)), 1)
    with torch.no_grad():
        try:
            model(torch.ones(rows, 1, dtype=torch.long), attention_mask=mask, past_key_values=cache)
        except ValueError as error:
            # Keys and values that are too large give inputs that a Tensor Memory refuses.
            if stream is None or "tokens must be finite" not in str(error):
                raise


def read_once(model: Any) -> None:
    done = attached_memory(model)
    if done.kind == "TensorCache" or np.prod(done.config.grid) * done.config.channels < 1e5:
        with torch.no_grad():
            model(torch.arange(60)[None])
    tessera.detach(model)


def decode(packed: Packed) -> None:
    if packed.shape[3] < 1e4:  # rotating a longer vector takes more memory than the vector
        assert packed.decode().shape == packed.shape
        assert packed.decode().isfinite().all()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("whole")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(folder)


def make(folder: Path) -> dict[str, Kind]:
    found = {}
    for name, spec in SPECS.items():
        model = llama({"cache-tc": TC, "cache-tm": TM}.get(name))
        cache, ids = tessera.Cache(spec, model), torch.randint(3, 97, (3, 150))
        mask = torch.ones_like(ids)
        mask[1, :70] = 0
        mask[2] = 0
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
        if name == "cache-tm":
            cache.crop(-3)  # so that tokens must be read again
        cache.save(folder / name)
        found[name] = Kind(
            folder / name,
            lambda path, model=model: tessera.Cache.load(path, model),
            lambda cache, model=model: step(model, cache),
        )
    model = llama()
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    save_stats(
        [KeyStats.measure(torch.rand(1, heads, 64, dim), torch.randn(1, heads, 64, dim)) for _ in range(2)], folder / "stats"
    )
    found["stats"] = Kind(
        folder / "stats",
        lambda path, model=model: tessera.Cache("sink:2 + hqmq:4 + recent:16", model, stats=path),
        lambda cache, model=model: step(model, cache),
    )
    for name, config in (("memory-tc", TC), ("memory-tm", TM)):
        tessera.save_memory(llama(config), folder / name)
        model = llama()
        found[name] = Kind(folder / name, lambda path, model=model: tessera.load_memory(model, path), read_once)
    for spec in CODECS:
        for role in codecs.Role.__args__:
            name = f"packed-{spec}-{role}"
            codecs.get(spec).encode(torch.randn(2, 2, 70, 36) * torch.rand(70, 1).exp(), role, 1).slice(3, 68).save(
                folder / name
            )
            found[name] = Kind(folder / name, Packed.load, decode)
    keys = torch.randn(4, 2, 2, 40, 8)
    states: dict[str, Any] = {
        "state-tc": TensorCache(TC, 2, 8)(*keys[:3])[1],
        "state-tm": TensorMemory(TensorMemoryConfig(channels=4, grid=(3, 4), chunk=4, anchored=True), 8)(
            torch.randn(2, 6, 8), places=torch.rand(6, 2)
        )[1],
        "state-infini": Infini(16, 2)(keys[0], keys[1], keys[2], keys[3], keys[1])[1],
    }
    for name, state in states.items():
        state.save(folder / name)
        found[name] = Kind(folder / name, type(state).load, lambda state: state.reset(torch.ones(2, dtype=torch.bool)))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vit = ViT(ViTConfig(attention="window:2", memory=TM.to_dict(), **sizes)).eval()
    with torch.no_grad():
        vit(torch.rand(2, 3, 1, 8, 8)).state.save(folder / "state-vit")
    found["state-vit"] = Kind(folder / "state-vit", ViTState.load, lambda state: state.select(torch.zeros(1, dtype=torch.long)))
    for name, path, load in (
        ("codebook-joint", joint_path(8), lambda path: read_joint(path, 8)),
        ("codebook-directions", direction_path(), read_directions),
    ):
        (folder / name).write_bytes(path.read_bytes())
        found[name] = Kind(folder / name, load, lambda _: None)
    return found


# Kinds of damage

NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    64,
    10**5,
    10**9,
    10**12,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    0.5,
    -0.0,
    1e300,
)
OTHERS = (
    None,
    True,
    False,
    "",
    "x",
    "float64",
    "bfloat16",
    "float8_e4m3fn",
    "1,2,3,4",
    "a\nb",
    [],
    {},
    [[]],
    [0, 0],
    [10**12],
    {"a": 1},
)
#: Inserted into a header as text, because JSON cannot express them.
RAW = ("NaN", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '"\\ud800"', '"' + "y" * 9000 + '"')
MARK = "@@mark@@"
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e5m2)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: dict[str, Any] | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += places(child, (*path, key))
    return found


def changed(table: Any, rng: random.Random) -> str:
    """Change some values, or the structure, of a JSON object."""
    table = copy.deepcopy(table)
    raw = None
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.choice(places(table) or [()])
        if not at:
            continue
        parent = table
        for key in at[:-1]:
            parent = parent[key]
        what = rng.randrange(8)
        if what < 3:
            parent[at[-1]] = rng.choice(NUMBERS)
        elif what == 3:
            parent[at[-1]] = rng.choice(OTHERS)
        elif what == 4 and raw is None:
            raw = rng.choice(RAW)
            parent[at[-1]] = MARK
        elif what == 5:
            del parent[at[-1]]
        elif what == 6:
            if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[at[-1]]))
            else:
                parent[rng.choice(("x", "seen", "dtype", "rows"))] = copy.deepcopy(parent[at[-1]])
        else:
            old = parent[at[-1]]
            if isinstance(old, int | float) and not isinstance(old, bool):
                parent[at[-1]] = old + rng.choice((-1, 1, 64, 10**12))
            else:
                parent[at[-1]] = [old, old]
    text = json.dumps(table)
    return text if raw is None else text.replace(f'"{MARK}"', raw)


def flip(content: bytes, rng: random.Random) -> bytes:
    """Change some bytes, often in the header."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(min(len(data), rng.choice((16, 400, len(data)))))] = rng.choice((0, 255, 128, rng.randrange(256)))
    return bytes(data)


def cut(content: bytes, rng: random.Random) -> bytes:
    """Remove a part, or append something."""
    what = rng.randrange(3)
    at = rng.randrange(len(content) + 1)
    if what == 0:
        return content[:at]
    return content[:at] + content[at + rng.randrange(1, 64) :] if what == 1 else content + bytes(rng.randrange(1, 64))


def lie_about_tensors(content: bytes, rng: random.Random) -> bytes:
    """Change the header of safetensors itself."""
    header, data = split(content)
    about = header.pop("__metadata__", {})
    text = changed(header, rng)
    return joined(
        '{"__metadata__": ' + json.dumps(about) + ("," + text[1:] if text.startswith("{") and len(text) > 2 else "}"), data
    )


def lie_in_words(content: bytes, rng: random.Random) -> bytes:
    """Change the file's metadata, including the JSON within the header."""
    header, data = split(content)
    about = header["__metadata__"]
    key = rng.choice(sorted(about))
    try:
        about[key] = changed(json.loads(about[key]), rng)
    except (json.JSONDecodeError, TypeError):
        about[key] = str(rng.choice((*NUMBERS, *OTHERS, *RAW)))
    return joined(header, data)


def other_tensors(content: bytes, rng: random.Random) -> bytes:
    """Replace tensors by ones of other shapes, dtypes and values, and remove or add some."""
    from safetensors.torch import load, save

    tensors, about = load(content), split(content)[0]["__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        if not tensors:
            break
        name = rng.choice(sorted(tensors))
        x = tensors[name]
        what = rng.randrange(9)
        if what == 0:
            del tensors[name]
        elif what == 1:
            tensors[rng.choice(("stranger", name + ".x", "0.0.recent.keys"))] = x.clone()
        elif what == 2:
            tensors[name] = x.float().to(rng.choice(DTYPES))
        elif what == 3:
            tensors[name] = x.unsqueeze(rng.randrange(x.ndim + 1))
        elif what == 4 and x.ndim:
            tensors[name] = x.narrow(rng.randrange(x.ndim), 0, 0).clone() if x.numel() else x.new_zeros(3)
        elif what == 5 and x.numel():
            tensors[name] = torch.cat((x, x), rng.randrange(x.ndim)) if x.ndim else x.expand(2).clone()
        elif what == 6 and x.is_floating_point() and x.numel():
            flat = x.clone().flatten()
            flat[rng.randrange(x.numel())] = rng.choice((float("nan"), float("inf"), 1e38))
            tensors[name] = flat.view(x.shape)
        elif what == 7:
            tensors[name] = x.new_zeros((0, 10**12) if rng.random() < 0.5 else (*x.shape[:-1], 0))
        elif x.dtype == torch.uint8:
            tensors[name] = torch.full_like(x, 255)
        elif x.dtype == torch.int64:
            tensors[name] = torch.full_like(x, rng.choice((-1, 2**62, -(2**63))))
        else:
            tensors[name] = (
                ~x if x.dtype == torch.bool else -x if x.dtype in (torch.float32, torch.int16) else x.flip(0) if x.ndim else x
            )
    return save(tensors, about)


def other_archive(content: bytes, rng: random.Random) -> bytes:
    """Write an archive whose arrays have other headers, are missing, or are Python objects."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            data = old.read(name)
            if name == chosen:
                what = rng.randrange(6)
                if what == 0:
                    continue
                start = 10 + struct.unpack("<H", data[8:10])[0]
                shape = rng.choice(("(10000000000000,)", "(-1, 4)", "(2**70,)", "(0, 4)", "((((", "(1,), 'x': 1"))
                descr = rng.choice(("'<i2'", "'|O'", "'<f4'", "[('a', '<f8')]", "'<U99999999'", "__import__('os')"))
                if what == 1:
                    buffer = io.BytesIO()
                    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
                    data = buffer.getvalue()
                elif what == 2:
                    data = data[: rng.randrange(len(data))]
                elif what == 3:
                    data = data[:start] + bytes(50_000_000)  # compressed to some kilobytes
                else:
                    header = (
                        f"{{'descr': {descr}, 'fortran_order': {rng.choice((True, False, 3))}, 'shape': {shape}, }}\n".encode()
                    )
                    data = data[:8] + struct.pack("<H", len(header)) + header + data[start:]
            new.writestr(name, data)
    return out.getvalue()


class Bounded(TorchDispatchMode):
    """A mode in which no tensor of more than `MOST` bytes may be made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and not x.is_meta and x.untyped_storage().nbytes() > MOST:
                raise AssertionError(f"{func} made a tensor of {x.untyped_storage().nbytes()} bytes")
        return out


def outcome(kind: Kind, path: Path) -> str:
    """Read a file and use its contents. Return "loaded", or the message of the refusal; anything else raises."""
    begin = time.monotonic()
    tracemalloc.start()
    try:
        with Bounded():
            try:
                loaded = kind.load(path)
            except ValueError as error:
                message = str(error)
                assert path.name in message, f"the message does not name the file: {message}"
                assert len(message.splitlines()) == 1, f"the message has several lines: {message!r}"
                assert len(message) < 2000, f"the message has {len(message)} characters"
                return message
            kind.use(loaded)
        return "loaded"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST, f"{peak} bytes were taken"
        assert time.monotonic() - begin < LONG, "it took too long"


def fuzz(kinds: dict[str, Kind], folder: Path, seed: int, count: int) -> dict[str, int]:
    """Damage `count` files, each in a way determined by its number and the seed."""
    met = {"loaded": 0, "refused": 0}
    contents = {name: kind.path.read_bytes() for name, kind in kinds.items()}
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        name = rng.choice(sorted(kinds))
        ways = [
            flip,
            cut,
            *([other_archive] * 2 if "codebook" in name else [lie_about_tensors, lie_in_words, lie_in_words, other_tensors]),
        ]
        way = rng.choice(ways)
        path = folder / f"hostile-{number % 8}"
        path.write_bytes(way(contents[name], rng))
        try:
            met["loaded" if outcome(kinds[name], path) == "loaded" else "refused"] += 1
        except BaseException as error:
            raise AssertionError(
                f"seed {seed}, case {number}: {name}, {way.__name__}: {type(error).__name__}: {error}"
            ) from error
    return met


def test_whole_files_are_loaded(kinds: dict[str, Kind]) -> None:
    assert {name: outcome(kind, kind.path) for name, kind in kinds.items()} == dict.fromkeys(kinds, "loaded")


def test_hostile_files_are_refused_or_hold_something_valid(kinds: dict[str, Kind], tmp_path: Path) -> None:
    met = fuzz(kinds, tmp_path, seed=0, count=300)
    assert met["refused"] > 150
    assert met["loaded"] > 10


@pytest.mark.slow
def test_ten_thousand_hostile_files_are_refused_or_hold_something_valid(kinds: dict[str, Kind], tmp_path: Path) -> None:
    met = fuzz(kinds, tmp_path, seed=1, count=10_000)
    assert met["refused"] > 5000


# Consistent forgeries

Lie = Callable[[dict[str, Any], dict[str, Tensor]], None]


def told(content: bytes, key: str, lie: Callable[[Any, dict[str, Tensor]], None]) -> bytes:
    """Change the metadata under `key` (JSON; all of it if empty) and the tensors of a file."""
    from safetensors.torch import load, save

    about, tensors = split(content)[0]["__metadata__"], load(content)
    words = json.loads(about[key]) if key else about
    lie(words, tensors)
    return save(tensors, {**about, key: json.dumps(words)} if key else words)


def everywhere(**changes: Any) -> Lie:
    """Change every layer of a cache: numbers are added, other values replaced."""

    def lie(words: dict[str, Any], _: dict[str, Tensor]) -> None:
        for layer in words["layers"]:
            for table in (layer, *layer["lanes"]):
                for name, value in changes.items():
                    if name in table:
                        table[name] = table[name] + value if isinstance(value, int) else value

    return lie


def along(**changes: Any) -> Lie:
    """Change the state of a Tensor Memory in every layer."""
    return lambda words, _: [layer["tensor_memory"].update(changes) for layer in words["layers"]] and None


def without(part: str) -> Lie:
    def lie(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return lie


def twice(part: str) -> Lie:
    """Write two matrices for a memory that has one."""

    def lie(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if part in name and name.endswith((".a", ".slow", ".z")):
                tensors[name] = torch.cat((tensors[name], tensors[name]), 1)

    return lie


def config(**changes: Any) -> Lie:
    return lambda words, _: words["config"].update(changes)


def no_tokens(shape: tuple[int, ...]) -> Lie:
    """Write empty packed tensors with huge dimensions whose product is zero."""

    def lie(words: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        words["shape"] = ",".join(map(str, shape))
        for name, (rest, dtype) in codecs.get(words["codec"]).kept(shape[1], shape[3], words["role"]).items():
            tensors[name] = torch.zeros((*shape[:3], *rest), dtype=dtype)

    return lie


CACHE, MEMORY = "tessera_cache", "tessera_memory"
LIES: list[tuple[str, str, Lie]] = [
    ("cache-dense", CACHE, everywhere(batch=10**12)),
    ("cache-dense", CACHE, everywhere(seen=10**13, pad=10**13)),
    ("cache-dense", CACHE, everywhere(seen=10**9, length=10**9, dropped=10**9)),
    ("cache-dense", CACHE, everywhere(seen=7, length=7, dropped=7)),
    ("cache-window", CACHE, everywhere(seen=-7, length=-7, dropped=-7)),
    ("cache-window", CACHE, everywhere(seen=10**13, length=10**13, dropped=10**13)),
    ("cache-kivi", CACHE, everywhere(dtype="float64")),
    ("cache-kivi", CACHE, everywhere(rows=[0, 0])),
    ("cache-kivi", CACHE, everywhere(rows=[0, 1, 2])),
    ("cache-kivi", CACHE, everywhere(rows=list(range(100_000)))),
    ("cache-tc", CACHE, without(".tc.")),
    ("cache-tc", CACHE, without(".tc.slow")),
    ("cache-tc", CACHE, twice(".tc.")),
    ("cache-tm", CACHE, without(".tm.")),
    ("cache-tm", CACHE, without(".tm.read0.x")),
    ("cache-tm", CACHE, along(behind=False)),
    ("cache-tm", CACHE, along(log=[])),
    ("cache-tm", CACHE, along(log=[{"start": 10**12, "groups": []}])),
    ("cache-tm", CACHE, lambda words, _: words["layers"][1].pop("tensor_memory")),
    ("cache-tm", CACHE, lambda words, _: words.pop("tensor_memory")),
    ("cache-tm", CACHE, lambda words, _: words.update(tensor_memory="{}")),
    ("cache-tm", CACHE, lambda words, _: words["layers"][0]["tensor_memory"]["log"][-1].update(start=1)),
    ("cache-tm", CACHE, lambda words, _: words["layers"][0]["tensor_memory"]["log"][0]["groups"].pop()),
    ("cache-tm", CACHE, lambda words, _: words["layers"][0]["tensor_memory"]["log"][0]["groups"][0].update(rows=[0, 1, 2])),
    ("cache-tm", CACHE, lambda words, x: x.update({name: t[..., :1].clone() for name, t in x.items() if name.endswith(".h")})),
    ("cache-tm", CACHE, lambda words, x: x.update({name: t.half() for name, t in x.items() if name.endswith(".waiting")})),
    ("cache-tm", CACHE, lambda words, x: x.update({name: t * torch.nan for name, t in x.items() if name.endswith(".x")})),
    ("packed-kivi:2-key", "", lambda words, _: words.update(shape="1000000000000,2,65,36")),
    ("packed-kivi:2-key", "", lambda words, _: words.update(shape="2,2,65," + "9" * 400)),
    ("packed-kivi:2-key", "", lambda words, _: words.update(offset="32")),
    ("packed-hqmq:3-key", "", lambda words, _: words.update(layer=str(10**30))),
    ("packed-hqmq:3-key", "", lambda words, x: x.update(codes=torch.full_like(x["codes"], 255))),
    ("packed-hqmq:3-key", "", lambda words, x: x.update(centre=torch.full_like(x["centre"], 0x7C00))),
    ("packed-hqmq:s24_r3_med3-key", "", lambda words, x: x.update(codes=torch.full_like(x["codes"], 255))),
    ("packed-q4_0-key", "", lambda words, x: x.update(blocks=torch.full_like(x["blocks"], 255))),
    ("packed-fp8-key", "", lambda words, x: x.update(codes=torch.full_like(x["codes"], 255))),
    ("packed-scalar:3-key", "", lambda words, x: x.update(scale=torch.full_like(x["scale"], float("inf")))),
    ("memory-tc", MEMORY, config(slots=10**12)),
    ("memory-tc", MEMORY, config(slots=10**30)),
    ("memory-tc", MEMORY, config(window=10**12, sink="x")),
    ("memory-tc", MEMORY, config(decay=[1e-320, 1.0])),
    ("memory-tc", MEMORY, config(decay=[1, 10**400])),
    ("memory-tc", MEMORY, config(layers=["0"])),
    ("memory-tc", MEMORY, config(layers=[0.5])),
    ("memory-tc", MEMORY, config(layers=[10**12])),
    ("memory-tc", MEMORY, config(normalise_keys="yes")),
    ("memory-tc", MEMORY, lambda words, _: words.update(config=[["window", 3]])),
    ("memory-tc", MEMORY, lambda words, _: words.update(kind=["TensorCache"])),
    ("memory-tc", MEMORY, lambda words, _: words.update(weights={name: [10**400] for name in words["weights"]})),
    ("memory-tm", MEMORY, config(channels=10**9)),
    ("memory-tm", MEMORY, config(chunk=10**12)),
    ("memory-tm", MEMORY, config(grid=[10**5, 10**5])),
    ("memory-tm", MEMORY, config(every=10**12)),
    ("memory-tm", MEMORY, config(sigma_init=1e308, forget_bias=10**400)),
    ("state-tc", "", lambda words, x: x.update(seen=x["seen"] + 2**62)),
    ("state-tc", "", lambda words, x: x.update(seen=-x["seen"])),
    ("state-tc", "", lambda words, x: x.update(a=x["a"].double())),
    ("state-tc", "", lambda words, x: x.update(a=x["a"][:, :3].clone())),
    ("state-tc", "", lambda words, x: x.update(live=x["live"][:, :1].clone())),
    ("state-tm", "", lambda words, x: x.update(waiting=x["waiting"][:, :1].clone())),
    ("state-tm", "", lambda words, x: x.update(places=x["places"].repeat(1, 1, 2))),
    ("state-tm", "", lambda words, x: x.update(h=x["h"].long())),
    ("state-infini", "", lambda words, x: x.update(k=x["k"][..., :-1].clone())),
    ("state-infini", "", lambda words, x: x.update(m=x["m"].half())),
    ("state-vit", "", lambda words, x: words.update(frames=str(-1))),
    ("state-vit", "", lambda words, x: words.update(frames="9" * 5000)),
]


@pytest.mark.parametrize("number", range(len(LIES)))
def test_a_lie_is_refused_even_if_all_its_parts_fit(number: int, kinds: dict[str, Kind], tmp_path: Path) -> None:
    name, key, lie = LIES[number]
    path = tmp_path / "hostile"
    path.write_bytes(told(kinds[name].path.read_bytes(), key, lie))
    assert outcome(kinds[name], path) != "loaded"


@pytest.mark.parametrize("shape", [(0, 10**12, 3, 36), (2, 10**6, 0, 36), (2, 2, 0, 10**9), (10**12, 2, 0, 8)])
@pytest.mark.parametrize("spec", CODECS)
def test_nothing_in_absurd_dimensions_takes_no_memory(
    spec: str, shape: tuple[int, ...], kinds: dict[str, Kind], tmp_path: Path
) -> None:
    kind = kinds[f"packed-{spec}-value"]
    path = tmp_path / "hostile"

    def lie(words: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        no_tokens(shape)(words, tensors)
        words["offset"] = "0"
        if "kept" in tensors:
            tensors["kept"] = torch.zeros((0, 4), dtype=torch.float16)

    path.write_bytes(told(kind.path.read_bytes(), "", lie))
    used = Kind(kind.path, kind.load, lambda packed: packed.decode().shape == shape or pytest.fail("another shape"))
    assert outcome(used, path) == "loaded"


def test_a_folder_and_a_file_that_is_not_there_are_told_apart(kinds: dict[str, Kind], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for kind in kinds.values():
        with pytest.raises(ValueError, match="folder"):
            kind.load(tmp_path / "folder")
        with pytest.raises(FileNotFoundError):
            kind.load(tmp_path / "nothing")
