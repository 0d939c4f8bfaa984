"""The documents agree with the measurements, and their links lead to existing files."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def tables() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as when run as a script
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


def test_the_readme_is_read_in_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_an_unknown_table_is_an_error(tables: Any) -> None:
    with pytest.raises(ValueError, match="no table 'nothing'"):
        tables.render("<!-- table: nothing -->\n<!-- end -->")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
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
        # The number of kernel cases depends on the processor.
        if "tests/kernels" not in row["tests"] and row["promise"] != "everything else":
            assert row == wanted, "run python benchmarks/reliability.py, then python benchmarks/tables.py"


@pytest.fixture(scope="module")
def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_symbols_that_documents_link_to_are_defined(hooks: Any) -> None:
    found = 0
    for path in DOCUMENTS:
        for _, target, symbol in hooks.links(path, path.read_text(encoding="utf-8")):
            if symbol is not None and target.suffix == ".py":
                assert hooks.line_of(target, symbol) > 0
                found += 1
    assert found > 30


def test_a_symbol_is_found_at_its_line(hooks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    file = tmp_path / "module.py"
    file.write_text("A = 1\n\nclass B:\n    c: int = 2\n\n    @property\n    def d(self):\n        pass\n")
    assert [hooks.line_of(file, name) for name in ("A", "B", "B.c", "B.d")] == [1, 3, 4, 7]
    with pytest.raises(ValueError, match=r"module\.py does not define B\.e"):
        hooks.line_of(file, "B.e")


def test_the_picture_of_a_tokens_life_is_what_its_script_draws(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("token_life", ROOT / "docs" / "token_life.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.draw(tmp_path / "life.svg")
    import matplotlib

    drawn, kept = (tmp_path / "life.svg").read_text(encoding="utf-8"), module.OUT.read_text(encoding="utf-8")
    if f"Matplotlib v{matplotlib.__version__}" in kept:  # other versions of matplotlib write other numbers
        assert drawn == kept


def test_every_document_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        assert f" {path.relative_to(ROOT / 'docs').as_posix()}" in navigation, path


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the docs extra (mkdocs) is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = tmp_path / "site" / "source" / "src" / "tessera" / "codecs" / "hqmq_joint.py" / "index.html"
    assert "__codelineno-0-1" in page.read_text(encoding="utf-8")  # code with linkable lines
