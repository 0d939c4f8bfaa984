"""The model and the prompts of the engine tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.models import demo_path, heldout_text


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the demo model to a folder without its memory, whose weights vLLM would load as the model's."""
    folder = tmp_path_factory.mktemp("demo")
    for file in demo_path().iterdir():
        if file.suffix in (".json", ".safetensors") and file.name != "memory.safetensors":
            (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="session")
def prompts(demo: Path) -> list[list[int]]:
    """Return held-out code of lengths just below and above those of a page and a block."""
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(demo / "tokenizer.json")).encode(heldout_text(40_000)).ids
    lengths = [3, 64, 65, 127, 128, 300, 513, 700]
    return [tokens[1000 * i : 1000 * i + n] for i, n in enumerate(lengths)]
