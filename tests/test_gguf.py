"""Models in GGUF files load correctly, or are refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gguf_files import write
from tessera.cli import app
from tessera.evaluation import Comparison, gguf, load


@pytest.fixture(scope="module")
def model_file(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    source = load(str(small_model))
    write(source.model, source.tokenizer, path)
    return path


def test_a_file_is_the_model_that_it_was_written_from(small_model: Path, model_file: Path) -> None:
    wanted, found = load(str(small_model)), load(str(model_file))
    assert found.name == "small"
    assert found.context == wanted.context == 512
    text = "the square of 12 is 144\n"
    ids = wanted.tokenizer(text, return_tensors="pt")["input_ids"]
    assert found.tokenizer(text)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(found.model(ids).logits, wanted.model(ids).logits)
    assert found.model.dtype == torch.float32
    assert not found.model.training


def test_a_folder_with_one_file_is_that_model(model_file: Path, tmp_path: Path) -> None:
    shutil.copy(model_file, tmp_path / "one.GGUF")
    (tmp_path / "README.md").write_text("a model")
    assert load(str(tmp_path), dtype="bfloat16").model.dtype == torch.bfloat16
    shutil.copy(model_file, tmp_path / "two.gguf")
    with pytest.raises(ValueError, match=r"has 2 GGUF files; name one of them, as in .*one\.GGUF"):
        load(str(tmp_path))


def test_a_folder_with_a_config_is_not_searched_for_files(small_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_model, tmp_path / "model")
    (folder / "other.gguf").write_bytes(b"nothing")
    assert load(str(folder)).name == "model"


def test_commands_take_a_file(model_file: Path, small_text: Path, tmp_path: Path) -> None:
    words = ["--model", str(model_file)]
    compared = ["compare", *words, "--text", str(small_text), "--specs", "q4_0", "--context", "64", "--windows", "1"]
    result = CliRunner().invoke(app, [*compared, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert Comparison.load(tmp_path / "compare.json").model == "small"
    result = CliRunner().invoke(app, ["generate", *words, "--prompt", "the square of", "--max-new-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("the square of")


@pytest.mark.parametrize("damage", ["magic", "empty", "header", "half", "architecture"])
def test_a_damaged_file_is_refused_in_one_line(damage: str, model_file: Path, tmp_path: Path) -> None:
    data = bytearray(model_file.read_bytes())
    if damage == "magic":
        data[:4] = b"GGML"
    elif damage == "empty":
        data = bytearray()
    elif damage == "header":
        data[8:24] = b"\xff" * 16
    elif damage == "half":
        del data[len(data) // 2 :]
    else:
        at = data.index(b"llama")
        data[at : at + 5] = b"lemma"
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    result = CliRunner().invoke(app, ["generate", "--model", str(path), "--prompt", "x"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "damaged.gguf" in result.stderr


def test_a_missing_package_and_a_missing_file_are_named(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model folder or GGUF file nothing\.gguf"):
        load("nothing.gguf")
    with pytest.raises(ValueError, match=r"no config\.json and no GGUF file"):
        load(str(tmp_path))
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ValueError, match=r"the package gguf is needed: pip install 'tessera\[gguf\]'"):
        load(str(model_file))
