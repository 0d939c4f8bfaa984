"""The Python code of the README and of every tutorial and how-to page runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest
from mktestdocs import check_md_file

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md"] + [
    path for folder in ("tutorials", "howto") for path in sorted((ROOT / "docs" / folder).glob("*.md"))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # pages write files
    check_md_file(page, memory=True)
