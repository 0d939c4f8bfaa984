"""Versions, dependency ranges and CI commands agree between the project's files."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import tessera

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def pins(name: str) -> dict[str, set[str]]:
    """Return the pinned versions of a constraints file, by package."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            found.setdefault(requirement.name.lower(), set()).add(specifier.version)
    return found


def test_the_oldest_versions_are_the_lower_bounds_of_the_ranges() -> None:
    oldest = pins("constraints-oldest.txt")
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        (bound,) = (each.version for each in requirement.specifier if each.operator == ">=")
        (version,) = oldest[requirement.name]
        assert version == bound or version.startswith(f"{bound}."), line


def test_pinned_versions_are_within_the_ranges() -> None:
    pinned = pins("constraints.txt")
    lines = PROJECT["dependencies"] + [
        line for name in ("lab", "test", "docs") for line in PROJECT["optional-dependencies"][name]
    ]
    for line in lines:
        requirement = Requirement(line)
        if requirement.name != "tessera":
            assert pinned[requirement.name], line
            assert all(requirement.specifier.contains(version) for version in pinned[requirement.name]), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_of_the_makefile(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert lines
    for line in lines:
        if line.startswith("make "):
            assert line.split()[1] in targets, line


def test_tests_that_the_makefile_names_exist() -> None:
    found = re.findall(r"(?<= )(?:tests|benchmarks|docs)/[\w./-]+", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert "tests/cache" in found
    assert not [path for path in found if not (ROOT / path).exists()]


def test_ci_tries_every_python_that_is_promised() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    said = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert matrix["python"] == said
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(version) for version in said)
    for row in matrix["include"]:
        assert Path(ROOT / row["constraints"]).exists()


def test_the_version_is_that_of_the_package() -> None:
    assert tessera.__version__ == PROJECT["version"]


def test_the_citation_is_of_this_version_and_names_the_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == PROJECT["version"]
    documents = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    assert len(citation["references"]) == 3
    for each in citation["references"]:
        assert each["url"] in documents


#: Names of the first design, for which the field has better ones; other packages' and a file format's own names are theirs.
NOT_NAMES = frozenset(["lane", "turn", "handle", "link", "admit", "dismiss", "settle", "carry", "plug"])
FOREIGN = {"RemovableHandle", "get_legend_handles_labels"}


def test_identifiers_are_words_of_the_field() -> None:
    """Of the Python files of the library: vectors of the C++ kernels have lanes, and documents have links."""
    found = set()
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [getattr(node, field, None) for field in ("id", "attr", "name", "arg")]
            for name in (name for name in names if isinstance(name, str) and name not in FOREIGN):
                words = {word.removesuffix("s").removesuffix("ed") for word in re.findall("[a-z]+", name.lower())}
                found |= {f"{path.name}: {name}" for _ in words & NOT_NAMES}
    assert found == set()
