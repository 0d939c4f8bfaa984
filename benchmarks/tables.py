"""Write the tables of the README and of docs/ from the JSON in docs/results/.

A table is placed between two comments and replaced as a whole:

    <!-- table: compare demo streaming -->
    <!-- end -->

The first word names a function of this file, the others are its arguments.

Example:

    python benchmarks/tables.py            # write
    python benchmarks/tables.py --check    # exit with 1 if a table differs from the JSON
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from transformers import LlamaConfig

import run
import tessera
from tessera.evaluation.records import Comparison, Row, load_all
from tessera.evaluation.table import caption, markdown, markdown_table, size
from tessera.files import atomic_path
from tessera.lab.evaluation import long_context
from tessera.lab.evaluation.recall import config_of
from tessera.lab.training.recall_training import state_bytes
from tessera.planning import plan_table as plans

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
#: The call that most models make, among the dense ways of decode_attention.py.
USUAL = "bfloat16, sdpa, enable_gqa"
_BLOCK = re.compile(r"(<!-- table: ([^\n]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def benchmarks() -> str:
    """Make the table of all benchmarks: command, machine, date and where it is shown."""
    parts = []
    for each in run.BENCHMARKS:
        facts = [f"command: `python benchmarks/run.py {each.name}`, which takes {each.takes}"]
        if each.needs:
            facts.append(f"needs: {each.needs}")
        made = [name for name in each.results if (RESULTS / name).is_file()]
        if made:
            facts.append(f"measured: {_measured(each, made[0])}")
            facts.append("results: " + ", ".join(f"`docs/results/{name}`" for name in made))
        elif each.results:
            facts.append("measured: not yet")
        if each.shown:
            facts.append("shown in: " + ", ".join(f"[{page}]({page})" for page in each.shown))
        lines = "\n".join(f"- {fact}" for fact in facts)
        parts.append(f"## {each.name}\n\n{each.measures[0].upper()}{each.measures[1:]}.\n\n{lines}")
    return "\n\n".join(parts)


def _measured(each: run.Benchmark, name: str) -> str:
    """Return the day, processor and versions of a result, as far as known."""
    data = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    if "comparisons" in data:
        data = data["comparisons"][0]
    about = data.get("environment") or data.get("versions") or {}
    words = [about.get("date") or each.measured, about.get("device"), about.get("processor")]
    words += [f"{about['threads']} thread{'s' * (about['threads'] != '1')}" if "threads" in about else None]
    words += [f"{key} {about[key]}" for key in ("kernels", "torch", "transformers") if key in about]
    return ", ".join(word for word in words if word)


def compare(name: str, protocol: str) -> str:
    """Make the table of `tessera compare --out docs/results/NAME` under one protocol."""
    return markdown(Comparison.load(RESULTS / name / "compare.json"), protocol)


def real_models(protocol: str) -> str:
    """Make the table of SmolLM2 and, if measured in the same run, of the model with rescaled keys."""
    # A long context is measured in several runs, whose exact rows are the same.
    runs = [load_all(path) for path in sorted((RESULTS / "real_models").glob(f"{protocol}*.json"))]
    rows = {row.spec: row for run in runs for row in run[0].rows}
    first, *others = [replace(runs[0][0], rows=tuple(rows.values())), *runs[0][1:]]
    head = ["cache", "bits", "in all", "perplexity", "KL", "top-1"] + ["rescaled: perplexity", "rescaled: KL"] * bool(others)
    lines = []
    for row in first.rows:
        if row.spec != "dense":
            cells = [f"`{row.spec}`", f"{row.codec_bits:.3f}", f"{row.bits:.2f}", *_change(row), f"{row.top1:.1%}"]
            lines.append(cells + [cell for other in others for r in other.rows if r.spec == row.spec for cell in _change(r)])
    return caption(first) + "\n\n" + markdown_table(head, lines)


#: The codecs in the README's tables: well-known ones at about four bits, and Tessera's most used ones.
README = ("hqmq:5", "hqmq:4", "hqmq:3", "q4_0", "kivi:4", "scalar:4", "int:4", "fp8")


def readme_model() -> str:
    """Make a table of a few rows of `real_models streaming`, without its caption."""
    runs = [load_all(path) for path in sorted((RESULTS / "real_models").glob("streaming*.json"))]
    rows = {row.spec: row for run in runs for row in run[0].rows}
    lines = []
    for codec in README:
        row = rows[f"sink:4 + {codec} + recent:128"]
        lines.append((f"`{row.spec}`", f"{row.codec_bits:.2f}", f"{row.bits:.2f}", *_change(row), f"{row.top1:.1%}"))
    return markdown_table(("cache", "bits", "in all", "perplexity", "KL", "top-1"), lines)


def readme_rescaled() -> str:
    """Make a table of a few rows of `real_models paper`: the model, and the one with rescaled keys."""
    one, other = load_all(RESULTS / "real_models" / "paper.json")
    rows = [{row.spec: row for row in each.rows} for each in (one, other)]
    lines = []
    for codec in README:
        first, second = (each[f"sink:4 + {codec}"] for each in rows)
        lines.append((f"`{codec}`", f"{first.codec_bits:.2f}", *(cell for row in (first, second) for cell in _change(row))))
    return markdown_table(("codec", "bits", "perplexity", "KL", "rescaled: perplexity", "rescaled: KL"), lines)


def readme_speed() -> str:
    """Make the table of one token's attention over 32,768 in one layer, against dense attention, llama.cpp and transformers."""
    lines = [
        [name, *(cell for peer, ours in pairs for cell in (f"{peer:.1f}", f"{ours:.1f}", f"**{peer / ours:.1f}x**"))]
        for name, pairs in _speeds(("", "_avx2")).items()
    ]
    sets = [f"{name}: {cell}" for name in ("AVX-512", "AVX2") for cell in ("ms", "`hqmq:4`, ms", "faster")]
    return markdown_table(("one token's attention, against", *sets), lines)


def _speeds(suffixes: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Return milliseconds of each baseline and of `hqmq:4` in the same run, for each suffix of the result files."""
    found: dict[str, list[tuple[float, float]]] = {}
    for suffix in suffixes:
        rows = _load(f"decode_attention{suffix}")["rows"]
        times = {r["name"]: r["milliseconds"] for r in rows if r["shape"] == "32,8,128" and r["tokens"] == 32768}
        ours = times["hqmq:4, 16-bit queries"]
        fastest = min(ms for name, ms in times.items() if name.startswith(("bfloat16", "float16", "float32")))
        found.setdefault("the fastest dense way of PyTorch", []).append((fastest, ours))
        found.setdefault("its usual way, `scaled_dot_product_attention`", []).append((times[USUAL], ours))
        for file, peers in (
            ("llamacpp_attention", ("llama.cpp, f16", "llama.cpp, q4_0")),
            ("cache_attention", ("DynamicCache", "QuantizedCache, quanto")),
        ):
            data = _load(file + suffix)
            times = {r["cache"]: r["attention_ms"] / data["layers"] for r in data["rows"] if r["tokens"] == 32768}
            for peer in peers:
                found.setdefault(f"`{peer}`", []).append((times[peer], times["sink:4 + hqmq:4 + recent:128"]))
    return found


def _change(row: Row) -> tuple[str, str]:
    # A ruined model's perplexity is unreadable in percent.
    change = f"{row.delta:+.2%} ± {row.delta_error:.2%}" if row.delta < 10 else f"{1 + row.delta:,.0f} times"
    digits = 4 if row.kl > 0.002 else 5
    return change, f"{row.kl:.{digits}f} ± {row.kl_error:.{digits}f}"


def frontier() -> str:
    """Make the table of loss and recall against total bytes, by model and length."""
    rows = _load("frontier")["rows"]
    rows.sort(key=lambda row: (row["model"] == "demo model", row["model"], row["length"], row["nbytes"]))
    lines: list[tuple[str, ...]] = []
    before = None
    for row in rows:
        about = (row["model"], f"{row['length']:,}")
        if about != before:
            lines.append((*about, "nothing to recall: at first sight", "", "", f"{row['first']:.1%}"))
            before = about
        loss = f"{row['loss']:+.4f} ± {row['error']:.4f}"
        lines.append((*about, f"`{row['spec']}`", f"{row['nbytes'] / 2**20:.2f}", loss, f"{row['recall']:.1%}"))
    head = ("model", "tokens", "cache", "MiB", "loss over the exact cache's, nats", "repeated tokens predicted")
    return markdown_table(head, lines)


def sparse_speed() -> str:
    """Make the table of one token's attention, reading all blocks and the best."""
    lines = [
        (
            f"{row['tokens']:,}",
            f"{row['ms']['all']:.2f}",
            f"{row['ms']['best']:.2f}",
            f"{row['ms']['all'] / row['ms']['best']:.1f}",
        )
        for row in _load("sparse_reading")["speed"]
    ]
    top = _load("sparse_reading")["speed"][0]["top"]
    return markdown_table(("tokens", "all read, ms", f"the best {top:,}, chosen and read, ms", "times as fast"), lines)


def sparse_needles() -> str:
    """How much of planted passages sparse reading reads."""
    rows = _load("sparse_reading")["needles"]
    lengths = sorted({row["tokens"] for row in rows})
    kept = {(row["drift"], row["passage"], row["tokens"]): row["kept"] for row in rows}
    kinds = sorted({(row["drift"], row["passage"]) for row in rows})
    names = {0.0: "independent", 1.0: "half of their variance in common"}
    lines = [
        (names[drift], str(passage), *(f"{kept[drift, passage, tokens]:.0%}" for tokens in lengths)) for drift, passage in kinds
    ]
    return markdown_table(("keys of a block", "tokens of the passage", *(f"read, of {n:,}" for n in lengths)), lines)


def sparse_quality() -> str:
    """Make the table of loss and recall by tokens read and weight of a block's width."""
    lines = [
        (
            f"{row['top']:,} of {row['length']:,}" if row["top"] else "everything",
            f"{row['spread']:g}" if row["top"] else "",
            f"{row['loss']:+.4f} ± {row['error']:.4f}",
            f"{row['recall']:.1%}",
        )
        for row in _load("sparse_reading")["quality"]
    ]
    head = ("tokens read", "weight of a block's width", "loss over the exact cache's, nats", "repeated tokens predicted")
    return markdown_table(head, lines)


def codec_error(inputs: str, head_dim: str) -> str:
    """Make the table of bits and error of every codec on one kind of vectors, by bits."""
    rows = [r for r in _load("codec_error")["rows"] if r["inputs"] == inputs and r["head_dim"] == int(head_dim)]
    rows.sort(key=lambda row: (row["bits"], row["nmse"]))
    return markdown_table(
        ("codec", "bits", "error"), [(f"`{r['spec']}`", f"{r['bits']:.4f}", f"{r['nmse']:.5f}") for r in rows]
    )


def codec_bars() -> str:
    """Say for each bar whether the codecs meet it."""
    return "\n".join(f"- {bar['sentence']}" for bar in _load("codec_error")["bars"])


def decode_attention(shape: str) -> str:
    """Make the table of attention times of one new token, for one shape, by length."""
    rows = [r for r in _load("decode_attention")["rows"] if r["shape"] == shape]
    shown = [r for tokens in dict.fromkeys(r["tokens"] for r in rows) for r in _fastest_dense(rows, tokens)]
    cells = [
        (
            r["name"],
            f"{r['tokens']:,}",
            f"{r['milliseconds']:.2f}",
            f"{r['times_the_peer']:.2f}x",
            f"{r['bytes_of_dense']:.2f}",
        )
        for r in shown
    ]
    return markdown_table(("way", "tokens", "ms", "speed of the fastest dense way", "bytes of bfloat16"), cells)


def _fastest_dense(rows: Sequence[Any], tokens: int) -> list[Any]:
    """Return the rows of one length without the dense ones that neither are the fastest of their dtype nor the usual call."""
    rows = [r for r in rows if r["tokens"] == tokens]
    dense: dict[str, list[Any]] = {}
    for r in rows:
        if r["dense"]:
            dense.setdefault(r["name"].partition(",")[0], []).append(r)
    kept = [min(group, key=lambda r: r["milliseconds"])["name"] for group in dense.values()]
    return [r for r in rows if not r["dense"] or r["name"] in (*kept, USUAL)]


def decode_avx2() -> str:
    """Make the table of attention restricted to AVX2, by shape and length."""
    rows = _load("decode_attention_avx2")["rows"]
    cells = [
        (r["shape"].replace(",", "/"), f"{r['tokens']:,}", r["name"], f"{r['milliseconds']:.2f}", f"{r['times_the_peer']:.2f}x")
        for r in rows
        if r["name"] in (r["peer"], "hqmq:4, 16-bit queries", "hqmq:3, 16-bit queries", "q4_0")
    ]
    return markdown_table(("heads, key heads, head_dim", "tokens", "way", "ms", "speed of the fastest dense way"), cells)


def vllm_pool() -> str:
    """Make the table of a pool's capacity, also relative to the dense cache, by length of requests."""
    rows = _load("vllm_engine")["rows"]
    dense = next(r for r in rows if r["cache"] == "dense")
    cells = [
        [f"`{r['cache']}`", f"{r['blocks']:,}", f"{r['blocks'] / dense['blocks']:.2f}x"]
        + [f"{held:,.0f} ({held / dense['held'][n]:.2f}x)" for n, held in r["held"].items()]
        for r in rows
        if "blocks" in r
    ]
    head = ("cache", "blocks", "of dense", *(f"requests of {int(n):,}" for n in dense["held"]))
    return markdown_table(head, cells)


def vllm_quality() -> str:
    """Make the table of an engine's quality, by cache."""
    rows = _load("vllm_engine")["rows"]
    cells = [
        (
            f"`{r['cache']}`",
            f"{r['perplexity']:.2f}",
            f"{r['kl']:.4f}" if "kl" in r else "",
            f"{r['top1']:.1%}" if "top1" in r else "",
            f"{r['recall']['right']:.1%}",
            f"{r['recall']['logprob']:.3f}",
        )
        for r in rows
        if "perplexity" in r
    ]
    return markdown_table(("cache", "perplexity", "KL", "top-1", "words again", "their log-probability"), cells)


def vllm_speed() -> str:
    """Make the table of the engines' speed, by cache."""
    record = _load("vllm_engine")
    many, few, prompt, long = (record[name] for name in ("requests", "few", "prompt", "long"))
    cells = [
        [f"`{r['cache']}`", f"{r['first']['first']:.2f}", f"{r['many']['all_first']:.1f}"]
        + [f"{count / r[name]['step']:.1f}" for name, count in (("many", many), ("long", few))]
        for r in record["rows"]
        if "many" in r
    ]
    head = ("cache", f"first token of {long:,}, s", f"all first of {many} x {prompt:,}, s")
    return markdown_table(head + tuple(f"tokens/s, {n} x {size:,}" for n, size in ((many, prompt), (few, long))), cells)


def vllm_server(part: str) -> str:
    """Return the transcript of a server, "packed" or "dense": its command, its log and its metrics."""
    found = _load("vllm_serve")[part]
    return "\n".join(
        ("```", f"$ {found['command']}", *found["log"], "$ curl --silent localhost:8000/metrics", *found["metrics"], "```")
    )


def vllm_client(part: str) -> str:
    """Return the output of the clients of a server, "packed" or "dense"."""
    lines = _load("vllm_serve")[part]["client"]
    return "\n".join(("```", "$ python docs/vllm_client.py http://localhost:8000/v1 article.txt", *lines, "```"))


def source(path: str) -> str:
    """Return the text of a program of the repository."""
    return "\n".join(("```python", (ROOT / path).read_text(encoding="utf-8").rstrip(), "```"))


def vllm_kernels() -> str:
    """Make the table of one layer's attention by block table, packed and dense."""
    cells = [
        (
            r["shape"],
            str(r["requests"]),
            f"{r['tokens']:,}",
            f"{r['new']:,}",
            f"{1e3 * r['dense']:.2f}",
            f"{1e3 * r['packed']:.2f}",
            f"{r['dense'] / r['packed']:.2f}x",
        )
        for r in _load("vllm_engine")["kernels"]
    ]
    head = ("heads, key heads, head_dim", "requests", "tokens each", "new", "vLLM's dense, ms", "packed, ms", "speed of dense")
    return markdown_table(head, cells)


def query_limbs() -> str:
    """Make the table of perplexity by number of query limbs on the demo model."""
    rows = _load("query_limbs")["rows"]
    cells = [
        (f"`{r['spec']}`", r["queries"], f"{r['perplexity']:.4f}", f"{r['delta']:+.3%}", f"{r['kl']:.6f}", f"{r['top1']:.2%}")
        for r in rows
    ]
    return markdown_table(("cache", "queries", "perplexity", "change", "KL", "top-1"), cells)


def encode() -> str:
    """Make the table of the nearest-codeword search on one core, and of encoding a token."""
    data = _load("encode")
    levels = data["instructions"]
    cells = []
    for row, cost in zip(data["search"], data["token"], strict=True):
        ns = row["nanoseconds"]
        cells.append(
            (
                f"`{row['spec']}`",
                f"{row['codewords']:,}",
                f"{ns['brute force']:,.0f}",
                *(f"{ns[level]:.0f}" if level in ns else "" for level in levels),
                str(row["other_indices"]),
                f"{cost['milliseconds']['64']:.2f}",
            )
        )
    head = (
        "codec",
        "codewords",
        "brute force, ns",
        *(f"{level}, ns" for level in levels),
        "faster",
        "other indices",
        "ms a token",
    )
    return markdown_table(head, cells)


def encode_vectors() -> str:
    """Make the table of whole encoding on one core, with the best instruction set, with AVX2 and in PyTorch."""
    data = _load("encode")
    best = data["instructions"][-1]
    ways = {f", {best}": best, ", avx2": "avx2", ", PyTorch": "PyTorch"}
    kinds = {"keys": "key", "keys, weighed": "weighed key", "values": "value"}
    rows = []
    for row in data["whole"]:
        found = row["nanoseconds"]
        cells = (
            f"{found[name]:.0f}" if (name := f"{kind}, {way}") in found else ""
            for kind in kinds.values()
            for way in ways.values()
        )
        rows.append((f"`{row['spec']}`", " x ".join(f"{n:,}" for n in row["shape"][1:]), *cells))
    return markdown_table(("codec", "vectors", *(kind + way for kind in kinds for way in ways)), rows)


def triton_static() -> str:
    """Make the table of the compiled Triton attention."""
    rows = _load("triton_static")["rows"]
    counts = ("registers", "spilled", "shared", "instructions", "while dense is read", "while codes are read")
    cells = [
        (f"`{r['spec']}`", str(r["dim"]), str(r["rows"]), r["lookup"], str(r["warps"]), *(f"{r[count]:,}" for count in counts))
        for r in rows
    ]
    return markdown_table(("codec", "head_dim", "rows", "lookup", "warps", *counts), cells)


def generation(tokens: str = "") -> str:
    """Make the table of a whole model's step, by cache and length, or at one length."""
    cells = [
        (
            f"`{r['cache']}`",
            f"{r['tokens']:,}",
            f"{r['step_ms']:.1f}",
            f"{r['attention_ms']:.1f}",
            f"{r['tokens_per_second']:.1f}",
            size(r["peak_growth"]),
        )
        for r in _load("generation")["rows"]
        if tokens in ("", str(r["tokens"]))
    ]
    return markdown_table(("cache", "tokens", "ms a step", "of them for the context", "tokens/s", "peak memory"), cells)


def prefill_attention() -> str:
    """Make the table of attention of many queries, by keys, heads and implementation."""
    rows = _load("prefill_attention")["rows"]
    names = list(dict.fromkeys(name for r in rows for name in r["processor_ms"]))
    cells = [
        (
            r["spec"] if r["spec"] == "exact" else f"`{r['spec']}`",
            "/".join(map(str, r["shape"])),
            str(r["queries"]),
            *(f"{r['processor_ms'][name]:.2f}" if name in r["processor_ms"] else "-" for name in names),
        )
        for r in rows
    ]
    return markdown_table(("keys", "heads", "queries", *names), cells)


def model_generation(record: str = "model_generation") -> str:
    """Make the table of a pretrained model's first token, steps and memory, relative to DynamicCache."""
    rows = _load(record)["rows"]
    base = {(r["tokens"], r["chunk"]): r for r in rows if r["cache"] == "DynamicCache"}
    cells = []
    for r in rows:
        peer = base[r["tokens"], r["chunk"]]
        keys = ("prefill_s", "step_ms", "slowest_step_ms")
        figures = [f"{r[key]:.2f} ({r[key] / peer[key]:.2f})" for key in keys]
        held = size(r["peak_growth"]) if "peak_growth" in r else "-"
        cells.append((f"`{r['cache']}`", f"{r['tokens']:,}", f"{r['chunk']:,}", *figures, held))
    head = ("cache", "prompt", "tokens a call", "prefill, s", "step, ms", "slowest step, ms", "peak memory")
    return markdown_table(head, cells)


def side_by_side() -> str:
    """Make the table of two simultaneous generations against two in sequence."""
    cells = [
        (
            f"`{r['cache']}`",
            f"{r['one_after_the_other_s']:.1f}",
            *(f"{r[key]:.1f} ({r[key] / r['one_after_the_other_s']:.2f})" for key in ("at_once_half_s", "at_once_all_s")),
        )
        for r in _load("model_generation")["side_by_side"]
    ]
    return markdown_table(
        ("cache", "one after the other, s", "at once, half of the threads each", "at once, all threads each"), cells
    )


def overheads() -> str:
    """Make the table of a step's time by part of a layer."""
    rows = [r for r in _load("generation")["rows"] if "breakdown" in r]
    parts = ("kernel", "attention", "update", "compress")
    cells = [(f"`{r['cache']}`", f"{r['tokens']:,}", *(f"{r['breakdown'][part]:.3f}" for part in parts)) for r in rows]
    return markdown_table(("cache", "tokens", "kernel", "rest of attention", "taking in", "compressing"), cells)


def llamacpp() -> str:
    """Make the table of a step's attention, Tessera's and llama.cpp's."""
    data = _load("llamacpp_attention")
    peer = {r["tokens"]: r["attention_ms"] for r in data["rows"] if r["cache"] == "llama.cpp, q4_0"}
    cells = [
        (
            f"`{r['cache']}`",
            f"{r['tokens']:,}",
            f"{r['attention_ms'] / data['layers']:.2f}",
            f"{peer[r['tokens']] / r['attention_ms']:.1f}x",
        )
        for r in data["rows"]
    ]
    return markdown_table(("cache", "tokens", "attention, ms a layer", "speed of llama.cpp's q4_0"), cells)


def language() -> str:
    """Make the table of loss by distance from the start, with a memory behind the window and without."""
    data = _load("language_memory")
    return _stretches(data["rows"], data["edges"], ("name",), ("attention",))


def language_trained(name: str) -> str:
    """Make the table of models trained with one attention each, "tuned" or from "scratch": losses by position, mean and
    spread over seeds."""
    data = _load(f"language_{name}")
    return _stretches(data["rows"], data["edges"], ("arm", "steps"), ("attention", "steps"))


def memory_options() -> str:
    """Make the table of options of an attached Tensor Cache after a short training."""
    data = _load("memory_options")
    return _stretches(data["rows"], data["edges"], ("option", "steps"), ("option", "steps"))


def _stretches(rows: list[dict[str, Any]], edges: list[int], by: tuple[str, ...], head: tuple[str, ...]) -> str:
    """Make the columns of losses by position, in total, and beyond the window: means over seeds; the last with its spread."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in rows:
        found.setdefault(tuple(r[name] for name in by), []).append(r)
    cells = []
    for what, own in found.items():
        losses = [mean(r["losses"][i] for r in own) for i in range(len(edges) - 1)]
        beyond = [r["beyond"] for r in own]
        apart = f" ± {stdev(beyond):.4f}" if len(set(beyond)) > 1 else ""
        numbers = (f"{x:.4f}" for x in (*losses, mean(r["all"] for r in own)))
        cells.append((*map(str, what), str(len(own)), *numbers, f"{mean(beyond):.4f}{apart}"))
    stretches = (f"{a:,}–{b:,}" for a, b in itertools.pairwise(edges))
    return markdown_table((*head, "seeds", *stretches, "all", "beyond the window"), cells)


def recall() -> str:
    """Make the table of recall beyond the window: lowest and highest accuracy over seeds, and the mean by gap."""
    head, cells = ("attention", "seeds", "accuracy"), []
    for name, own in _recall_by_method().items():
        head = ("attention", "seeds", "accuracy", *(f"gap {gap}" for gap in own[0]["by_gap"]))
        cells.append((name, str(len(own)), _range(own), *(f"{_at_gap(own, gap):.3f}" for gap in own[0]["by_gap"])))
    return markdown_table(head, cells)


def recall_state() -> str:
    """Make the table of pairs recalled per KiB of state, by gap."""
    head, cells = ("attention",), []
    for name, own in _recall_by_method().items():
        config, gaps = config_of(own[0]), list(own[0]["by_gap"])
        kept = [state_bytes(config, replace(config.task, gap=int(gap)).length) / 1024 for gap in gaps]
        worth = [f"{config.task.pairs * _at_gap(own, gap) / kib:.3f}" for gap, kib in zip(gaps, kept, strict=True)]
        sizes = f"{kept[0]:.0f}" if kept[0] == kept[-1] else f"{kept[0]:.0f}–{kept[-1]:.0f}"
        head = ("attention", "KiB kept", *(f"gap {gap}" for gap in gaps))
        cells.append((name, sizes, *worth))
    return markdown_table(head, cells)


def recall_limits() -> str:
    """Make the table of the hard cases of recall: more pairs, narrower heads, rewritten keys."""
    rows = _load("recall")["rows"]
    tasks = list(dict.fromkeys((r["pairs"], r["dim"], r["rewrites"]) for r in rows))
    found: dict[str, dict[tuple[int, ...], list[dict[str, Any]]]] = {}
    for r in rows:
        found.setdefault(r["method"], {}).setdefault((r["pairs"], r["dim"], r["rewrites"]), []).append(r)
    head = [f"{pairs} pairs, d {dim}" + (f", {again} rewritten" if again else "") for pairs, dim, again in tasks]
    cells = [(n, *(_range(own[t]) if t in own else "" for t in tasks)) for n, own in found.items() if len(own) > 1]
    return markdown_table(("attention", *head), cells)


def _recall_by_method() -> dict[str, list[dict[str, Any]]]:
    """Return the runs of the task that all methods were trained on, by method."""
    found: dict[str, list[dict[str, Any]]] = {}
    for r in _load("recall")["rows"]:
        if (r["pairs"], r["dim"], r["rewrites"]) == (16, 64, 0):
            found.setdefault(r["method"], []).append(r)
    return found


def _at_gap(rows: list[dict[str, Any]], gap: str) -> float:
    return sum(r["by_gap"][gap] for r in rows) / len(rows)


def _range(rows: list[dict[str, Any]]) -> str:
    """Format the lowest and highest accuracy, as one number if they are equal."""
    low, high = (f"{pick(r['accuracy'] for r in rows):.3f}" for pick in (min, max))
    return low if low == high else f"{low}–{high}"


def capacity(dim: str) -> str:
    """Make the table of recalled pairs by pairs stored in one matrix."""
    rows = [r for r in _load("capacity")["rows"] if r["dim"] == int(dim)]
    names = list(dict.fromkeys(r["setting"] for r in rows))
    cells = []
    for pairs in sorted({r["pairs"] for r in rows}):
        cells.append((str(pairs), *(f"{r['recalled']:.2f}" for r in rows if r["pairs"] == pairs)))
    return markdown_table(("pairs", *names), cells)


def scan() -> str:
    """Make the table of the fast forms of the associative recurrence against the token loop."""
    cells = []
    for r in _load("associative_cost")["scan"]:
        ms = (f"{r['loop_ms']:.0f}", f"{r['scan_ms']:.1f}", f"{r['kernel_ms']:.1f}")
        cells.append((f"{r['tokens']:,}", r["rule"], r["way"], *ms, f"{r['scan_times']:.0f}x", f"{r['kernel_times']:.0f}x"))
    return markdown_table(("tokens", "rule", "way", "loop, ms", "scan, ms", "C++, ms", "scan, faster", "C++, faster"), cells)


def streams() -> str:
    """Make the table of state and speed of streams, by length."""
    cells = [
        (f"`{r['spec']}`", f"{r['tokens']:,}", size(r["nbytes"]), f"{r['tokens_per_second']:,.0f}", size(r["process_growth"]))
        for r in _load("associative_cost")["stream"]
    ]
    return markdown_table(("cache", "tokens", "state", "tokens/s", "growth of the process"), cells)


def long_run() -> str:
    """Make the table of the error of float32 and bfloat16 states after many writes."""
    rows = [r for r in _load("long_run")["rows"] if r["steps"] in (10_000, 1_000_000)]
    cells = [
        (
            r["rule"],
            f"{r['steps']:,}",
            str(r["decay"]),
            f"{r['float32_error']:.1e}",
            f"{r['bfloat16_error']:.1%}",
            f"{r['share_of_bound']:.3f}",
        )
        for r in rows
    ]
    return markdown_table(("rule", "writes", "decay", "error, float32", "error, bfloat16", "norm, of the bound"), cells)


def tensor_memory_cost() -> str:
    """Make the table of the forms of a Tensor Memory against the plain loop."""
    rows = _load("tensor_memory_cost")["rows"]
    keys = list(
        dict.fromkeys((r["batch"], r["tokens"], r["channels"], tuple(r["grid"]), r["chunk"], r["setting"]) for r in rows)
    )
    cells = []
    for key in keys:
        batch, tokens, channels, grid, chunk, setting = key
        own = [r for r in rows if (r["batch"], r["tokens"], r["channels"], r["setting"]) == (batch, tokens, channels, setting)]
        size = f"{batch} x {tokens:,}, {channels} x {'x'.join(map(str, grid))}, {chunk}"
        for way in ("forward", "backward"):
            ms = {r["form"]: r["ms"] for r in own if r["way"] == way}
            times = [r["times"] for r in own if r["way"] == way and r["form"] != "plain loop"]
            cells.append((size, setting, way, *(f"{x:.1f}" for x in ms.values()), *(f"{x:.1f}x" for x in times)))
    forms = [
        r["form"]
        for r in rows
        if r["way"] == "forward" and r["setting"] == rows[0]["setting"] and r["batch"] == rows[0]["batch"]
    ]
    head = ("batch x tokens, channels x grid, chunk", "setting", "way", *(f"{form}, ms" for form in forms))
    return markdown_table((*head, *(f"{form}, faster" for form in forms[1:])), cells)


def retention(what: str) -> str:
    """Make the table of retention in a Tensor Memory: the "recovered" share of a write, or its "gradient"."""
    data = _load("retention")
    lags = (1, *data["lags"]) if what == "recovered" else data["lags"]
    form = "{:.2f}" if what == "recovered" else "{:.2g}"
    cells = [(r["setting"], *(form.format(x) for x in r[what])) for r in data["rows"]]
    return markdown_table(("setting", *(f"{lag:,} steps" if lag > 1 else "1 step" for lag in lags)), cells)


def diagnostics(what: str) -> str:
    """Make a table of accuracy on tasks that need a memory: by "kinds" of backbone, on the paper's "originals", by "settings"
    of the memory, its "ablations", "delays" or "gates"."""
    from tessera.lab.evaluation.diagnostics import ALONE, ablation_cells, cells, delay_cells, gate_cells, setting_cells

    made = {"settings": setting_cells, "ablations": ablation_cells, "delays": delay_cells, "gates": gate_cells}.get(what, cells)
    rows = _load("diagnostics")["rows"]
    if what in ("kinds", "originals"):
        rows = [r for r in rows if (r["attention"] == ALONE) == (what == "kinds")]
    return markdown_table(*made(rows))


def pictures() -> str:
    """Make the table of digits classified and filled in, with a memory and without."""
    rows = _load("pictures")["rows"]
    cells = [
        (arm, *(_spread([r["score"] for r in rows if (r["arm"], r["ask"]) == (arm, ask)]) for ask in ("label", "pixels")))
        for arm in dict.fromkeys(r["arm"] for r in rows)
    ]
    return markdown_table(("", "named", "hidden pixels, share of the variance"), cells)


def video(stay: str) -> str:
    """Make the table of hidden digits: clips, and streams by stretch, for a number of hidden frames."""
    data = _load("video")
    rows = [r for r in data["rows"] if r["stay"] == int(stay)]
    stretches = [f"frames {a + 1}–{b}" for a, b in itertools.pairwise(data["edges"])]
    lines = []
    for arm in dict.fromkeys(r["arm"] for r in rows):
        own = [r for r in rows if r["arm"] == arm]
        ways = {arm: "streams", f"{arm}; each frame four times": "slow", f"{arm}; its reads switched off": "reads off"}
        for name, key in ways.items():
            if key != "streams" and key not in own[0]:
                continue
            streams = zip(*(r[key] for r in own), strict=True) if key in own[0] else [[]] * len(stretches)
            clips = [r["clips"] for r in own] if key == "streams" else []
            lines.append((name, *(_spread(part) for part in (clips, *streams))))
    return markdown_table(("patches see", "clips", *stretches), lines)


#: Outcomes of `families.py`, in the words of the documents.
_OUTCOMES = {"served": "served", "decoded": "served by decoding", "refused": "refused", "not tried": "not tried"}
_PARTS = {"cache": "`tessera.Cache`", "tensor_cache": "Tensor Cache", "tensor_memory": "Tensor Memory"}


def families(what: str) -> str:
    """Make the table of families: the "counts" of outcomes, or outcome and cause for one of `_PARTS`."""
    rows = _load("families")["rows"]
    if what == "counts":
        found = {part: [row[part]["outcome"] for row in rows if part in row] for part in _PARTS}
        cells = [(name, *(str(found[part].count(outcome)) for outcome in _OUTCOMES)) for part, name in _PARTS.items()]
        return markdown_table(("", *_OUTCOMES.values()), cells)
    causes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if what in row:
            causes.setdefault((row[what]["outcome"], _cause(row[what])), []).append(row["family"])
    order = sorted(causes, key=lambda pair: (list(_OUTCOMES).index(pair[0]), -len(causes[pair]), pair[1]))
    cells = [(_OUTCOMES[pair[0]], pair[1], str(len(causes[pair])), ", ".join(causes[pair])) for pair in order]
    return markdown_table(("outcome", "cause", "families", "which"), cells)


def reliability() -> str:
    """Make the table of the number of tests of each promise."""
    rows = _load("reliability")["rows"]
    cells = [(r["promise"], str(r["always"]), str(r["slow"]), ", ".join(f"`{path}`" for path in r["tests"])) for r in rows]
    return markdown_table(("promise", "always", "slow", "in"), cells)


def _cause(found: dict[str, str]) -> str:
    """Return the reason without the names of the family and its classes."""
    if found["outcome"] == "not tried":
        return found["reason"].partition(":")[0]
    reason = re.sub(r"^tessera\.\w+: |does not support [\w-]+: |^[\w-]+: | \((?:[^()]|\([^()]*\))*\)", "", found["reason"])
    reason = re.sub(r"^tessera\.Cache |\w+ cannot be given a memory: ", "", reason)
    reason = re.sub(r"\b[A-Z]\w*(Attention|Layer|LM|LMHeadModel|Generation|Model|Decoder|Block)\b", "it", reason)
    reason = re.sub(r"\d+ stacks of \d+ layers", "no single stack of layers", reason)
    reason = re.sub(r"of type '[^']+'(, '[^']+')*", "of another type", reason)
    return re.sub(r"\bits it\b", "its attention", reason).strip()


def _spread(values: Sequence[float]) -> str:
    """Format the mean ± standard deviation over seeds."""
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def resident_memory() -> str:
    """Make the table of a process's resident memory and the bytes that the cache reports."""
    data = _load("resident_memory")
    rows = [
        (f"`{r['spec']}`", size(r["rss_growth"]), size(r["report_bytes"]), f"{r['ratio_to_exact']:.2f}x") for r in data["rows"]
    ]
    return markdown_table(("cache", "growth of the process", "the cache's report", "smaller"), rows)


def training() -> str:
    """Make the table of the demo model's loss on held-out modules during training."""
    rows = _load("demo_training")["held_out"]
    chosen = rows[:: max(1, len(rows) // 8)]
    if chosen[-1] is not rows[-1]:
        chosen.append(rows[-1])
    cells = [
        (
            f"{r['step']:,}",
            f"{r['tokens'] / 1e6:.1f} M",
            f"{r['seconds'] / 60:.0f}",
            f"{r['held_out_loss']:.3f}",
            f"{r['held_out_perplexity']:.2f}",
            f"{r['held_out_bits_per_byte']:.3f}",
        )
        for r in chosen
    ]
    return markdown_table(("step", "tokens", "minutes", "held-out loss", "perplexity", "bits per byte"), cells)


#: The shape of a Llama of eight billion parameters, from its config.json.
EIGHT_BILLION = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "dtype": "bfloat16",
}


def plan(context: str, budget: str, bandwidth: str) -> str:
    """Return what `tessera plan` prints for a Llama of eight billion parameters."""
    found = tessera.plan(LlamaConfig(**EIGHT_BILLION), context=context, budget=budget, bandwidth=bandwidth)
    rows = [(f"`{row[0]}`", *row[1:]) for row in map(plans.cells, found.rows)]
    table = markdown_table(plans.header(found), rows)
    return "\n\n".join((table, plans.caption(found, "Llama, 8 billion parameters"), f"`{plans.advice(found)}`"))


def needle() -> str:
    """Make the table of needles found by SmolLM2, for each cache and length over all depths."""
    rows = _load("long_context/needle")["rows"]
    return _with_remarks(rows, "length", markdown_table(*long_context.grid(rows, "length")))


def ruler(length: str) -> str:
    """Make the table of RULER's tasks on SmolLM2, for each cache and task at one length."""
    rows = [row for row in _load("long_context/ruler")["rows"] if row["length"] == int(length)]
    return _with_remarks(rows, "task", markdown_table(*long_context.grid(rows, "task")))


def _with_remarks(rows: list[dict[str, Any]], columns: str, table: str) -> str:
    return "\n\n".join([table, *long_context.remarks(rows, columns)])


TABLES: dict[str, Callable[..., str]] = {
    "benchmarks": benchmarks,
    "readme-model": readme_model,
    "readme-rescaled": readme_rescaled,
    "readme-speed": readme_speed,
    "plan": plan,
    "real_models": real_models,
    "compare": compare,
    "capacity": capacity,
    "long-run": long_run,
    "codec-error": codec_error,
    "codec-bars": codec_bars,
    "decode-attention": decode_attention,
    "decode-avx2": decode_avx2,
    "diagnostics": diagnostics,
    "encode": encode,
    "encode-vectors": encode_vectors,
    "families": families,
    "reliability": reliability,
    "generation": generation,
    "prefill-attention": prefill_attention,
    "model-generation": model_generation,
    "side-by-side": side_by_side,
    "language": language,
    "language-trained": language_trained,
    "llamacpp": llamacpp,
    "overheads": overheads,
    "pictures": pictures,
    "memory-options": memory_options,
    "needle": needle,
    "query-limbs": query_limbs,
    "recall": recall,
    "recall-limits": recall_limits,
    "frontier": frontier,
    "sparse-speed": sparse_speed,
    "sparse-needles": sparse_needles,
    "sparse-quality": sparse_quality,
    "recall-state": recall_state,
    "resident-memory": resident_memory,
    "retention": retention,
    "ruler": ruler,
    "scan": scan,
    "streams": streams,
    "tensor-memory-cost": tensor_memory_cost,
    "triton-static": triton_static,
    "training": training,
    "video": video,
    "source": source,
    "vllm-client": vllm_client,
    "vllm-kernels": vllm_kernels,
    "vllm-pool": vllm_pool,
    "vllm-quality": vllm_quality,
    "vllm-server": vllm_server,
    "vllm-speed": vllm_speed,
}


def _load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def render(text: str) -> str:
    """Return a document with all its tables regenerated.

    Raises:
        ValueError: if the kind of a table is unknown.
    """

    def block(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; there are {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[name](*arguments)}\n{match[4]}"

    return _BLOCK.sub(block, text)


def documents() -> list[Path]:
    """Return every document that may have tables."""
    return [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "src" / "tessera" / "models" / "demo" / "README.md",
    ]


def main() -> int:
    """Write or check all tables, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say which documents are out of date")
    check = parser.parse_args().check
    stale = []
    for path in filter(Path.is_file, documents()):
        text = path.read_text(encoding="utf-8")
        made = render(text)
        if made != text:
            stale.append(path.relative_to(ROOT))
            if not check:
                with atomic_path(path) as temporary:
                    temporary.write_text(made, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'out of date; run python benchmarks/tables.py' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
