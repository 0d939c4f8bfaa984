"""`tessera prefill` reads a text into a file, `tessera generate --from` continues it, and unsuitable files are refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import tessera
from tessera.cli import app
from tessera.evaluation import Source, load
from tessera.evaluation.identity import Identity
from tessera.evaluation.prefill_file import load_prefilled, prefill, read_prefilled, save_prefilled, text_hash
from tessera.sealed import OPEN, SEAL, check_seal
from tessera.tensor_cache import TensorCacheConfig

PACKED = "sink:4 + hqmq:4 + recent:32"


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def prompt(small_text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(small_text.read_text()[:380])
    return path


def logits(source: Source, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return source.model(ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("chunk", [1000, 150])
@pytest.mark.parametrize(
    "spec", ["dense", PACKED, "sink:4 + window:64", "sink:4 + hqmq:3@128 + recent:16", "kivi:4 + recent:16"]
)
def test_what_is_loaded_goes_on_bit_for_bit(spec: str, chunk: int, small_model: Path, prompt: Path, tmp_path: Path) -> None:
    source, path = load(str(small_model)), tmp_path / "book.cache"
    cache, about = prefill(source, prompt.read_text(), spec, chunk=chunk)
    save_prefilled(cache, about, path)
    found, same = load_prefilled(path, load(str(small_model)))
    assert same == about == read_prefilled(path)
    ids = torch.randint(1, 200, (1, 60))
    assert torch.equal(logits(source, found, ids), logits(source, cache, ids))


def test_with_an_exact_cache_it_is_as_if_all_had_been_read_in_one_go(small_model: Path, prompt: Path, tmp_path: Path) -> None:
    source, path = load(str(small_model)), tmp_path / "book.cache"
    later = torch.randint(1, 200, (1, 60))
    ids = source.tokenizer(prompt.read_text(), return_tensors="pt")["input_ids"]
    whole = logits(source, None, torch.cat((ids, later), 1))[:, ids.shape[1] :]
    for chunk in (1000, 64):
        save_prefilled(*prefill(source, prompt.read_text(), "dense", chunk=chunk), path)
        torch.testing.assert_close(logits(source, load_prefilled(path, source)[0], later), whole, rtol=1e-4, atol=1e-5)


def test_a_text_in_one_chunk_is_read_as_in_one_call(small_model: Path, prompt: Path, tmp_path: Path) -> None:
    source, path = load(str(small_model)), tmp_path / "book.cache"
    save_prefilled(*prefill(source, prompt.read_text(), PACKED), path)
    ids = source.tokenizer(prompt.read_text(), return_tensors="pt")["input_ids"]
    cache, later = tessera.Cache(PACKED, source.model), torch.randint(1, 200, (1, 30))
    logits(source, cache, ids)
    assert torch.equal(logits(source, load_prefilled(path, source)[0], later), logits(source, cache, later))


def test_the_file_says_what_it_is_of(small_model: Path, prompt: Path, tmp_path: Path) -> None:
    source, path, seen = load(str(small_model)), tmp_path / "book.cache", []
    cache, about = prefill(source, prompt.read_text(), PACKED, chunk=100, progress=lambda *step: seen.append(step))
    ids = source.tokenizer(prompt.read_text(), return_tensors="pt")["input_ids"]
    count = ids.shape[1]
    assert seen == [(100, count), (200, count), (300, count), (count, count)]
    assert (about.spec, about.tokens, about.text) == (PACKED, count, text_hash(ids[0]))
    save_prefilled(cache, about, path)
    with safe_open(path, "pt") as file:
        assert file.metadata()[SEAL] != OPEN
        assert not any(tensor.dtype == torch.int64 for tensor in map(file.get_tensor, file.keys()))  # no tokens of the text
    # The file is also an ordinary saved cache.
    assert tessera.Cache.load(path, source.model).get_seq_length() == count


def test_the_commands_do_it_end_to_end(small_model: Path, prompt: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.cache"
    words = ("--model", small_model)
    code, out, err = run("prefill", *words, "--prompt-file", prompt, "--out", path, "--cache", PACKED, "--chunk", 128)
    assert code == 0, err
    assert f"Saved {path}, {path.stat().st_size:,} bytes" in out
    assert "381 tokens in" in out
    source = load(str(small_model))
    cache, _ = prefill(source, prompt.read_text(), PACKED, chunk=128)
    ids = source.tokenizer("line 12:", return_tensors="pt", add_special_tokens=False)["input_ids"]
    expected: list[int] = []
    step = ids
    for _ in range(40):
        step = logits(source, cache, step)[:, -1:].argmax(-1)
        expected.append(int(step))
    code, out, err = run("generate", *words, "--from", path, "--prompt", "line 12:", "--max-new-tokens", 40)
    assert code == 0, err
    assert out == "line 12:" + source.tokenizer.decode(expected, clean_up_tokenization_spaces=False) + "\n"
    assert "428 tokens in" in err  # 381 of the text, 8 of the prompt, 39 of the 40 new ones
    code, again, _ = run(
        "generate", *words, "--from", path, "--prompt", "line 12:", "--max-new-tokens", 40, "--cache", PACKED.replace(" ", "")
    )
    assert (code, again) == (0, out)


def test_statistics_of_another_text_come_with_the_file(
    small_model: Path, small_text: Path, prompt: Path, tmp_path: Path
) -> None:
    stats, path = tmp_path / "stats.safetensors", tmp_path / "book.cache"
    words = ("--model", small_model)
    assert run("stats", *words, "--text", small_text, "--tokens", 200, "--out", stats)[0] == 0
    assert run("prefill", *words, "--prompt-file", prompt, "--out", path, "--stats", stats)[0] == 0
    cache, _ = load_prefilled(path, load(str(small_model)))
    assert cache.layers[0].policy.stats is not None
    assert run("generate", *words, "--from", path, "--prompt", "x", "--max-new-tokens", 3)[0] == 0
    code, _, err = run("generate", *words, "--from", path, "--prompt", "x", "--stats", stats)
    assert code == 2
    assert "has its statistics already" in err


def test_a_cache_with_a_memory_is_kept_with_it(small_model: Path, prompt: Path, tmp_path: Path) -> None:
    spec, path = "sink:4 + window:64 + tc", tmp_path / "book.cache"
    source = load(str(small_model))
    for name in ("one", "other"):
        torch.manual_seed(len(name))
        tessera.attach(source.model, TensorCacheConfig(window=64, sink=4))
        with torch.no_grad():
            for parameter in source.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        tessera.save_memory(source.model, tmp_path / name)
        tessera.detach(source.model)
    words = ("--model", small_model)
    one, other = tmp_path / "one", tmp_path / "other"
    assert run("prefill", *words, "--prompt-file", prompt, "--out", path, "--cache", spec, "--memory", one)[0] == 0
    ask = ("generate", *words, "--from", path, "--prompt", "x", "--max-new-tokens", 3)
    assert run(*ask, "--memory", one)[0] == 0
    assert "it has another memory attached" in run(*ask, "--memory", other)[2]
    assert "it has no memory attached" in run(*ask)[2]


def changed(change: Callable[[Any], None], small_model: Path, folder: Path) -> Path:
    source = load(str(small_model))
    with torch.no_grad():
        change(source.model)
    source.model.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    return folder


def _train(model: Any) -> None:
    for parameter in model.parameters():
        parameter.add_(1e-5 * torch.randn_like(parameter))


def _theta(model: Any) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("change", "message"),
    [(_train, "other weights: another revision, or trained further"), (_theta, "LlamaForCausalLM of another configuration")],
)
def test_another_model_of_the_same_shape_is_refused(
    change: Callable[[Any], None], message: str, small_model: Path, prompt: Path, tmp_path: Path
) -> None:
    path = tmp_path / "book.cache"
    save_prefilled(*prefill(load(str(small_model)), prompt.read_text(), PACKED), path)
    other = changed(change, small_model, tmp_path / "changed")
    code, _, err = run("generate", "--model", other, "--from", path, "--prompt", "x")
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    code, _, err = run("generate", "--from", path, "--prompt", "x")  # the demo model
    assert code == 2
    assert f"made with the model '{small_model.name}' (LlamaForCausalLM)" in err


def test_the_same_model_in_another_precision_goes_on(small_model: Path, prompt: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.cache"
    save_prefilled(*prefill(load(str(small_model)), prompt.read_text(), PACKED), path)
    code, _, err = run(
        "generate", "--model", small_model, "--dtype", "bfloat16", "--from", path, "--prompt", "x", "--max-new-tokens", 3
    )
    assert code == 0, err


def test_identities_are_of_the_class_the_config_and_the_weights(small_model: Path) -> None:
    source = load(str(small_model))
    one = Identity.of(source.model, "one")
    assert one.difference(Identity.of(source.model, "other")) is None
    assert Identity.read(json.loads(json.dumps(one.to_dict()))) == one
    tessera.enable(source.model)
    assert one.difference(Identity.of(source.model)) is None
    for found in (None, {}, {**one.to_dict(), "name": 3}, {**one.to_dict(), "weights": {"a": ["b"]}}):
        with pytest.raises(ValueError, match=r"identity|text|sample"):
            Identity.read(found)


@pytest.mark.parametrize("where", [0, 9, 300, -1, -2000])
@pytest.mark.parametrize("how", ["cut", "bit"])
def test_a_file_that_was_cut_or_altered_is_refused(
    where: int, how: str, small_model: Path, prompt: Path, tmp_path: Path
) -> None:
    path = tmp_path / "book.cache"
    save_prefilled(*prefill(load(str(small_model)), prompt.read_text(), PACKED), path)
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: where or 5]
    else:
        data[where] ^= 4
    path.write_bytes(data)
    code, _, err = run("generate", "--model", small_model, "--from", path, "--prompt", "x")
    assert code == 2
    assert "cut short" in err or "altered" in err or "no file that" in err
    assert err.count("\n") == 1


def test_every_byte_is_under_the_seal(small_model: Path, prompt: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.cache"
    save_prefilled(*prefill(load(str(small_model)), prompt.read_text()[:40], "sink:4 + window:8"), path)
    data = path.read_bytes()
    check_seal(path, "is nothing")
    for place in torch.randint(len(data), (200,)).tolist():
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"cut short|altered|no seal|place for a seal"):
            check_seal(path, "is nothing")


def test_other_files_are_refused(small_model: Path, prompt: Path, tmp_path: Path) -> None:
    source = load(str(small_model))
    plain, noise = tmp_path / "plain.cache", tmp_path / "noise.cache"
    cache, about = prefill(source, prompt.read_text(), PACKED)
    cache.save(plain)
    noise.write_bytes(struct.pack("<Q", 1 << 60) + b"noise")
    ask = ("generate", "--model", small_model, "--prompt", "x", "--from")
    for path, message in ((plain, "it has no seal"), (noise, "no file that"), (tmp_path, "a folder"), (tmp_path / "x", "x")):
        code, _, err = run(*ask, path)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    sealed = tmp_path / "sealed.cache"
    save_prefilled(cache, about, sealed)
    code, _, err = run(*ask, sealed, "--cache", "dense")
    assert code == 2
    assert f"holds a cache of '{PACKED}', not of 'dense'" in err
    code, _, err = run(*ask, sealed, "--max-new-tokens", 200)
    assert code == 2
    assert "behind 381 that are saved are more than the 512" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt-file", "{tmp}/nothing.txt"], "there is no text file"),
        (["--prompt-file", "{tmp}/long.txt"], "made for 512"),
        (["--prompt-file", "{tmp}/book.txt", "--cache", "hqmk:4"], "did you mean 'hqmq'"),
        (["--prompt-file", "{tmp}/book.txt", "--cache", "window:8 + tc"], "needs a Tensor Cache attached"),
        (["--prompt-file", "{tmp}/book.txt", "--memory", "x"], "has no 'tc'"),
        (["--prompt-file", "{tmp}/book.txt", "--out", "{tmp}"], "is a folder"),
    ],
)
def test_bad_input_writes_nothing(words: list[str], message: str, small_model: Path, prompt: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * 600)
    out = tmp_path / "out.cache"
    code, _, err = run("prefill", "--model", small_model, "--out", out, *(word.format(tmp=tmp_path) for word in words))
    assert code == 2
    assert message in err
    assert not out.exists()
