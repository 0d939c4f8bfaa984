"""The documents say what the measurements say, and point at files that exist."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def tables() -> Any:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_what_the_measurements_say(tables: Any) -> None:
    found = 0
    for path in tables.documents():
        text = path.read_text(encoding="utf-8")
        found += text.count("<!-- table:")
        assert tables.render(text) == text, f"{path.name}: run python benchmarks/tables.py"
    assert found >= 5


def test_a_changed_figure_is_noticed(tables: Any) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| `sink:4 \+ hqmq:4.*$", text, re.MULTILINE)
    assert row is not None
    assert tables.render(text.replace(row[0], row[0].replace("| ", "| 9", 1))) == text


def test_an_unknown_table_is_an_error(tables: Any) -> None:
    with pytest.raises(ValueError, match="no table 'nothing'"):
        tables.render("<!-- table: nothing -->\n<!-- end -->")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_promises_name_tests_that_there_are(request: pytest.FixtureRequest) -> None:
    spec = importlib.util.spec_from_file_location("reliability", ROOT / "benchmarks" / "reliability.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    noted = json.loads(module.OUT.read_text(encoding="utf-8"))["rows"]
    assert [row["promise"] for row in noted] == [*module.PROMISES, "everything else"]
    for places in module.PROMISES.values():
        assert all((ROOT / place).exists() for place in places)
    items = module.count_items(request.session.items)
    if len({file for file, _ in items}) < 60:
        pytest.skip("the counts can be compared where all tests are collected only")
    for row, wanted in zip(noted, module.rows(items), strict=True):
        # How many cases there are of kernels depends on the processor.
        if "tests/kernels" not in row["tests"] and row["promise"] != "everything else":
            assert row == wanted, "run python benchmarks/reliability.py, then python benchmarks/tables.py"
