"""Packages import only lower packages, and the core does not import the lab."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def layers() -> Any:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "docs" / "layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layers"] = module
    spec.loader.exec_module(module)
    return module


def test_arrows_point_down(layers: Any) -> None:
    found = layers.imports()
    assert len(found) > 100
    wrong = [
        f"{each.module}, line {each.line}: imports {each.name}"
        for each in found
        if layers.rank(each.source) >= layers.rank(each.target)
    ]
    assert wrong == []


def test_the_core_does_not_import_the_lab(layers: Any) -> None:
    assert [each for each in layers.imports() if each.target == "lab"] == []


@pytest.mark.parametrize(
    ("line", "noticed"),
    [
        ("import tessera.lab.models.small_gpt", "lab"),
        ("def f():\n    from tessera.lab.models import GPT", "lab"),
        ("if TYPE_CHECKING:\n    from tessera.lab import models", "lab"),
        ("from importlib import import_module\nimport_module('tessera.lab.models')", "lab"),
        ("name = 'gpt'\nimport_module(f'tessera.lab.models.{name}')", "lab"),
        ("from tessera import evaluation", "evaluation"),
        ("from ..lab import models", "lab"),
        ("from tessera import Cache", "tessera"),
        ('"""See `tessera.lab.models`."""', None),
    ],
)
def test_every_way_to_import_is_noticed(layers: Any, line: str, noticed: str | None) -> None:
    import ast

    names = [name for _, name in layers._names(ast.parse(line), "tessera.cache.new", False)]
    packages = {layers.package_of(name) for name in names if name.startswith("tessera")}
    assert packages == ({noticed} if noticed else set())


def test_no_two_files_have_the_same_name(layers: Any) -> None:
    """A file name is thus unambiguous in searches and tracebacks."""
    names = Counter(path.name for path in layers.SOURCE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_the_picture_is_of_these_imports(layers: Any) -> None:
    assert layers.OUT.read_text(encoding="utf-8") == layers.picture(), "run python docs/layers.py"


def _fresh(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "expression",
    [
        "tessera.codecs.get('hqmq:4')",
        "tessera.kernels.attend",
        "tessera.tensor_cache.TensorCacheConfig()",
        "tessera.tensor_memory.TensorMemoryConfig()",
        "tessera.adapters.attach",
        "tessera.attention.enable",
        "tessera.cache.parse('dense')",
        "tessera.evaluation.compare",
        "tessera.models.demo_path()",
        "tessera.Cache",
    ],
)
def test_importing_tessera_is_enough(expression: str) -> None:
    """Importing tessera loads torch only on first use, and never the lab."""
    _fresh(
        f"import sys, tessera; assert 'torch' not in sys.modules; {expression}; "
        "assert not any(name.startswith('tessera.lab') for name in sys.modules)"
    )


@pytest.mark.parametrize(
    "line",
    [
        "from tessera.models import ViT, ViTConfig; ViT(ViTConfig(classes=2, num_hidden_layers=1))",
        "from tessera.models.gpt import GPT, GPTConfig; GPTConfig(attention='window:8 + tc')",
        "import tessera; tessera.models.ViT",
        "from tessera.models import heldout_files; assert heldout_files()",
    ],
)
def test_names_that_went_to_the_lab_are_where_they_were(line: str) -> None:
    _fresh(line)


def test_what_there_is_can_be_listed_and_anything_else_is_an_error() -> None:
    import tessera

    assert {"Cache", "codecs", "kernels", "associative", "spatial"} <= set(dir(tessera))
    for module in (tessera, tessera.models):
        with pytest.raises(AttributeError, match="nothing"):
            module.nothing  # noqa: B018
