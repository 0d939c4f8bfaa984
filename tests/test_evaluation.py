"""`tessera compare` measures caches correctly, and records and shows the results."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from rich.console import Console

from tessera.evaluation import Comparison, Row, Source, compare, load, load_all, read_text, save_all
from tessera.evaluation.comparison import default_specs, paper_spec
from tessera.evaluation.loading import encode, windows
from tessera.evaluation.methods import method, short
from tessera.evaluation.plot import pareto
from tessera.evaluation.table import COLUMNS, advice, best, caption, cells, differences, markdown, tables
from tessera.kernels import CompressedKV, dispatch
from tessera.tiers.spec import parse

SPECS = ("hqmq:4 + recent:64", "sink:4 + hqmq:2 + recent:64", "hqmq:4 + recent:4096", "window:64")


@pytest.fixture(scope="module")
def source(small_model: Path) -> Source:
    return load(str(small_model))


@pytest.fixture(scope="module")
def text(small_text: Path) -> str:
    return read_text([small_text])[0]


@pytest.fixture(scope="module")
def result(source: Source, text: str) -> Comparison:
    return compare(source, text, SPECS, context=256, chunk=50, count=3, batch=2, text_name="squares")


def row(result: Comparison, protocol: str, spec: str) -> Row:
    return next(r for r in result.rows if (r.protocol, r.spec) == (protocol, spec))


def test_exact_rows_are_the_model_itself(source: Source, text: str, result: Comparison) -> None:
    ids = windows(encode(source.tokenizer, text), 256, 3, bos=0)
    with torch.no_grad():
        logp = source.model(ids, use_cache=False).logits.log_softmax(-1)
    nll = -logp[:, :-1].gather(-1, ids[:, 1:, None])
    for protocol in ("streaming", "paper"):
        exact = row(result, protocol, "dense")
        assert exact.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-4)
        assert (exact.delta, exact.kl, exact.top1) == (0.0, 0.0, 1.0)
        assert exact.bits == exact.codec_bits == 32.0
        assert exact.nbytes == 2 * 2 * 2 * 32 * 4 * 256
    assert result.tokens == nll.numel() == 3 * 255
    assert result.context == 256


def test_a_codec_that_is_never_used_changes_nothing(result: Comparison) -> None:
    unused = row(result, "streaming", "hqmq:4 + recent:4096")
    assert abs(unused.delta) < 1e-5
    assert abs(unused.kl) < 1e-6


def test_fewer_bits_cost_more(result: Comparison) -> None:
    fine, coarse = row(result, "paper", "hqmq:4"), row(result, "paper", "sink:4 + hqmq:2")
    assert 0 < fine.kl < coarse.kl
    assert coarse.top1 < fine.top1 <= 1
    # A scale byte per vector of 32, key centres of 16/64 bits, and a statistics byte per channel for all tokens.
    assert fine.codec_bits == 4 + (8 + 8 + 8) / 64 + 8 / (2 * 256)
    assert coarse.codec_bits == fine.codec_bits - 2


def test_keys_and_values_apart_are_measured_like_any_other(source: Source, text: str) -> None:
    rows = compare(source, text, ("(k=q8_0,v=hqmq:2) + recent:64", "hqmq:k4v2"), context=256, count=1).rows
    assert [r.spec for r in rows] == [
        "dense",
        "(k=q8_0,v=hqmq:2) + recent:64",
        "hqmq:k4v2",
        "dense",
        "(k=q8_0,v=hqmq:2)",
        "hqmq:k4v2",
    ]
    for r in rows:
        if r.spec.startswith("(k=q8_0"):
            assert r.codec_bits == (8.5 + 2 + 8 / 32) / 2
        elif r.spec != "dense":
            known = 8 / 256  # a statistics byte per key channel
            assert r.codec_bits == pytest.approx((4 + 8 / 32 + 16 / 64 + known + 2 + 8 / 32) / 2)
    assert all(r.kl > 0 for r in rows if r.spec != "dense")


def test_paper_protocol_leaves_nothing_exact_but_sinks(result: Comparison) -> None:
    assert {r.spec for r in result.rows if r.protocol == "paper"} == {"dense", "hqmq:4", "sink:4 + hqmq:2"}
    assert paper_spec("sink:4 + hqmq:4@512 + recent:128") == "sink:4 + hqmq:4"
    assert (paper_spec("dense"), paper_spec("sink:4 + window:8"), paper_spec("recent:64 + q4_0")) == ("dense", None, "q4_0")
    assert {parse(spec).sink for spec in default_specs(2048, "paper")} == {0}
    assert {parse(spec).sink for spec in default_specs(2048)} == {0, 4}
    assert row(result, "paper", "hqmq:4").kl > row(result, "streaming", "hqmq:4 + recent:64").kl


@pytest.mark.parametrize("context", [256, 250, 70, 20])
def test_paper_protocol_quantises_every_token_but_sinks(source: Source, text: str, context: int) -> None:
    seen: list[tuple[int, int]] = []
    attend, attend_exact = dispatch.attend, dispatch.attend_exact

    def packed(q: torch.Tensor, pages: CompressedKV, *rest: object, **options: object) -> object:
        seen.append((0, pages.shape[2]))
        return attend(q, pages, *rest, **options)  # type: ignore[arg-type]

    def exact(q: torch.Tensor, k: torch.Tensor, *rest: object, **options: object) -> object:
        seen.append((k.shape[2], 0))
        return attend_exact(q, k, *rest, **options)  # type: ignore[arg-type]

    with patch.multiple(dispatch, attend=packed, attend_exact=exact):
        found = compare(source, text, ("sink:4 + q8_0",), protocols=("paper",), context=context, count=1)
    quantised = -(-(context - 4) // 64) * 64
    assert seen == [(4, 0), (0, quantised)] * 2
    spec = found.rows[1]
    assert spec.spec == "sink:4 + q8_0"
    assert 0 < spec.kl < 1e-3
    assert found.tokens == context - 1


def test_perplexity_and_its_difference_agree(result: Comparison) -> None:
    for r in result.rows:
        exact = row(result, r.protocol, "dense")
        assert r.perplexity / exact.perplexity - 1 == pytest.approx(r.delta, abs=1e-6)
        assert r.delta_error >= 0
        assert r.tokens_per_second > 0


def test_errors_are_of_differences_at_the_same_tokens(result: Comparison) -> None:
    for r in result.rows:
        assert r.nll_gap is not None
        assert r.nll_gap_error is not None
        assert r.kl_error is not None
        assert math.expm1(r.nll_gap) == pytest.approx(r.delta, abs=1e-9)
        assert r.delta_error == pytest.approx(r.nll_gap_error * math.exp(r.nll_gap))
        assert (0 < r.kl_error < r.kl) if method(r.spec) != "exact" and r.kl > 1e-6 else r.kl_error < 1e-6
        exact = "" if r.spec == "dense" else f"{r.kl:.5f} ± {r.kl_error:.5f}"
        assert cells(r)[3] == exact


def test_every_two_specs_are_compared_token_by_token(result: Comparison) -> None:
    assert [(p.spec, p.other) for p in result.pairs if p.protocol == "paper"] == [("hqmq:4", "sink:4 + hqmq:2")]
    assert sum(p.protocol == "streaming" for p in result.pairs) == 6
    for pair in result.pairs:
        one, other = (row(result, pair.protocol, spec) for spec in (pair.spec, pair.other))
        assert one.kl - other.kl == pytest.approx(pair.kl, abs=1e-12)
        assert one.nll_gap is not None
        assert other.nll_gap is not None
        assert one.nll_gap - other.nll_gap == pytest.approx(pair.nll, abs=1e-12)
        assert pair.kl_error > 0
        assert pair.nll_error > 0
    (line,) = differences(result)  # none of the six pairs of the other protocol is printed
    assert line.startswith("paper, hqmq:4 less sink:4 + hqmq:2: KL -0.")


def test_bytes_are_those_of_one_sequence(source: Source, text: str) -> None:
    one, two = (compare(source, text, ("hqmq:4 + recent:64",), context=256, count=n, batch=2).rows[1] for n in (1, 2))
    assert one.nbytes == two.nbytes
    assert one.bits == two.bits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 1}, "context must be at least 2, got 1"),
        ({"context": 513}, "513 tokens is longer than the 512"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"count": 0}, "windows must be at least 1"),
        ({"skip": -1}, "skip must be at least 0, got -1"),
        ({"skip": 9999}, "nothing to predict is left behind the 9999 that are skipped"),
        ({"protocols": ("offline",)}, "no protocol 'offline'; there are streaming and paper"),
        ({"specs": ("snk:4",)}, "did you mean 'sink'"),
    ],
)
def test_wrong_arguments_are_named(source: Source, text: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(source, text, **{"specs": ("dense",), **changes})  # type: ignore[arg-type]


def test_windows_begin_as_a_text_does() -> None:
    ids = torch.tensor([0, 5, 6, 7, 8, 9])
    assert windows(ids, 3, 9, bos=0).tolist() == [[0, 5, 6], [0, 7, 8]]
    assert windows(ids[1:], 3, 9, bos=0).tolist() == [[0, 5, 6], [0, 7, 8]]
    assert windows(ids, 3, 1, bos=None).tolist() == [[0, 5, 6]]
    assert windows(ids, 99, 9, bos=None).tolist() == [ids.tolist()]
    assert windows(ids, 3, 9, bos=0, skip=2).tolist() == [[0, 7, 8]]
    assert windows(ids[1:], 3, 1, bos=None, skip=2).tolist() == [[7, 8, 9]]
    assert windows(ids[1:], 9, 1, bos=None, skip=3).tolist() == [[8, 9]]
    with pytest.raises(ValueError, match="the text has 5 tokens; nothing to predict is left behind the 4"):
        windows(ids[1:], 9, 1, bos=None, skip=4)
    with pytest.raises(ValueError, match="too few"):
        windows(torch.tensor([5]), 99, 1, bos=None)


def test_record_is_read_back(result: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "compare.json"
    result.save(path)
    assert Comparison.load(path) == result
    assert result.environment.keys() >= {"torch", "transformers", "processor", "threads"}
    path.write_text('{"rows": [{"spec": 1}]}')
    with pytest.raises(ValueError, match="holds no comparison"):
        Comparison.load(path)


def test_skipped_tokens_are_not_read(source: Source, text: str) -> None:
    skipped = compare(source, text, ("q4_0",), protocols=("paper",), context=128, count=2, skip=255)
    # A window has 127 tokens after the start token; the tokenizer is one of bytes.
    behind = compare(source, text.encode()[255:].decode(), ("q4_0",), protocols=("paper",), context=128, count=2)
    whole = compare(source, text, ("q4_0",), protocols=("paper",), context=128, count=2)
    assert [r.kl for r in skipped.rows] == pytest.approx([r.kl for r in behind.rows])
    assert skipped.rows[0].perplexity == pytest.approx(behind.rows[0].perplexity)
    assert skipped.rows[0].perplexity != pytest.approx(whole.rows[0].perplexity)
    assert (skipped.skip, whole.skip) == (255, 0)
    assert "without its first 255 tokens" in caption(skipped)
    assert "without its first" not in caption(whole)


def test_several_models_are_one_file(result: Comparison, tmp_path: Path) -> None:
    other = replace(result, model="other", rows=result.rows[:2])
    path = tmp_path / "compare.json"
    save_all([result, other], path)
    assert load_all(path) == [result, other]
    with pytest.raises(ValueError, match="holds comparisons of 2 models"):
        Comparison.load(path)
    save_all([other], path)
    assert Comparison.load(path) == other
    assert load_all(path) == [other]
    assert [table.title for table in tables(other, named=True)] == [f"other, {table.title}" for table in tables(other)]
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no comparison"):
        load_all(path)


def test_every_record_in_the_documents_is_read() -> None:
    paths = sorted((Path(__file__).resolve().parent.parent / "docs" / "results").glob("*/compare.json"))
    assert len(paths) >= 4
    for path in paths:
        assert Comparison.load(path).rows[0].spec == "dense"


def test_records_of_before_are_read(result: Comparison, tmp_path: Path) -> None:
    old = tmp_path / "compare.json"
    result.save(old)
    data = json.loads(old.read_text())
    del data["pairs"]
    for r in data["rows"]:
        del r["kl_error"], r["nll_gap"], r["nll_gap_error"]
    old.write_text(json.dumps(data))
    found = Comparison.load(old)
    assert found.pairs == ()
    assert [r.kl for r in found.rows] == [r.kl for r in result.rows]
    assert "blocks of" in caption(result)
    assert "blocks of" not in caption(found)
    assert cells(found.rows[1])[3] == f"{found.rows[1].kl:.5f}"


def test_tables_hold_every_row(result: Comparison) -> None:
    shown = tables(result)
    assert [table.row_count for table in shown] == [5, 3]
    text = markdown(result)
    for r in result.rows:
        assert "| " + " | ".join((f"`{r.spec}`", *cells(r)[1:])) + " |" in text
    assert "765 tokens in windows of 256" in caption(result)


@pytest.mark.parametrize("width", [80, 100, 120, 150])
def test_tables_fit_the_terminal_and_cut_no_number(result: Comparison, width: int) -> None:
    chain = "sink:4 + hqmq:4@32768 + hqmq:3@131072 + recent:128"
    rows = [replace(r, spec=chain) if r.spec == "sink:4 + hqmq:2 + recent:64" else r for r in result.rows]
    (table, _), out = tables(replace(result, rows=rows), width=width), Console(width=width, file=io.StringIO())
    out.print(table)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    shown = [str(column.header) for column in table.columns]
    assert shown[0] == "cache"
    assert {"Δ", "KL", "cache size"} <= set(shown)
    assert (len(shown) == len(COLUMNS)) == (width >= 140)
    assert all(word in text for word in chain.split())
    for r in rows:
        told = dict(zip(COLUMNS, cells(r), strict=True))
        assert r.protocol != "streaming" or all(told[column] in text for column in shown[1:])
    assert all(column in shown or column in text.split("no room for:")[1] for column in COLUMNS)


def test_advice_names_the_smallest_cache_that_is_good(result: Comparison) -> None:
    rows = [
        replace(row(result, "streaming", "hqmq:4 + recent:64"), delta=0.004, nbytes=100, compression=4.0),
        replace(row(result, "streaming", "sink:4 + hqmq:2 + recent:64"), delta=0.02, nbytes=50, compression=8.0),
    ]
    few = replace(result, rows=tuple(rows))
    assert best(few) == rows[0]
    assert '"hqmq:4 + recent:64"' in advice(few)
    assert "No cache" in advice(replace(result, rows=(rows[1],)))
    assert "--protocol streaming" in advice(replace(result, rows=tuple(r for r in result.rows if r.protocol == "paper")))


def test_picture_is_a_png(result: Comparison, tmp_path: Path) -> None:
    pareto(result, tmp_path / "compare.png")
    data = (tmp_path / "compare.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000


def test_picture_has_a_row_for_each_model_and_protocol(result: Comparison, tmp_path: Path) -> None:
    from matplotlib.image import imread

    pareto(result, tmp_path / "one.png")
    pareto([result, replace(result, model="other")], tmp_path / "two.png")
    one, two = (imread(tmp_path / f"{name}.png").shape for name in ("one", "two"))
    assert two[0] == pytest.approx(2 * one[0], rel=0.01)
    assert two[1] == one[1]


def test_picture_of_windows_alone_shows_what_they_lose(result: Comparison, tmp_path: Path) -> None:
    rows = [r for r in result.rows if r.spec in ("dense", "window:64")]
    pareto(replace(result, rows=rows), tmp_path / "one.png")
    pareto(replace(result, rows=[replace(r, kl=2 * r.kl + 1) for r in rows]), tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_every_kind_of_spec_has_a_method() -> None:
    assert method("sink:4 + hqmq:4 + recent:8") == method("hqmq:3.5_nocentre") == "HQMQ, Tessera's"
    assert method("hqmq:s96_r4_med3") == "HQMQ, the paper's"
    assert method("hqmq:k4.5v3.5@128") == "HQMQ, Tessera's"
    assert method("(k=q8_0,v=hqmq:3) + recent:8") == "keys and values apart"
    assert short("sink:4 + (k=hqmq:4,v=hqmq:3) + recent:8") == "hqmq:k4v3"
    assert (method("dense"), method("sink:4 + window:8")) == ("exact", "window")
    assert (short("sink:4 + hqmq:4 + recent:8"), short("dense"), short("window:8")) == ("hqmq:4", "dense", "window:8")


def test_texts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text file .*nothing\.txt"):
        read_text([tmp_path / "nothing.txt"])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        read_text([tmp_path / "empty.txt"])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"no UTF-8 text \(byte 3\)"):
        read_text([tmp_path / "latin.txt"])


def test_models_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    with pytest.raises(FileNotFoundError, match="no model folder"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="no dtype 'int4'"):
        load(dtype="int4")
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a BertForMaskedLM, not a causal language model"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load"):
        load(str(tmp_path))
