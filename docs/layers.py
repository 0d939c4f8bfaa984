"""Draw the layers of Tessera's packages from the imports of their files.

Writes docs/images/layers.svg. The order in which packages may import each other is written here, once;
`tests/test_imports.py` holds the imports to it and the picture to the imports.

Example:

    python docs/layers.py
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "tessera"
OUT = ROOT / "docs" / "images" / "layers.svg"

#: Packages from top to bottom; each imports only packages of lower rows. "tessera" is the public interface,
#: `tessera/__init__.py`.
ORDER: tuple[tuple[str, ...], ...] = (
    ("lab",),
    ("cli",),
    ("integrations",),
    ("tessera",),
    ("planning",),
    ("evaluation",),
    ("models", "adapters"),
    ("cache",),
    ("attention",),
    ("cache_layers",),
    ("tiers",),
    ("codecs", "tensor_cache", "tensor_memory"),
    ("kernels",),
    ("modules for all",),
)
#: Names of packages in version 0.1, and their present names.
OLD_NAMES = {"associative": "tensor_cache", "attachment": "adapters", "spatial": "tensor_memory"}
#: Single modules that every package may import; among them only `state` and `finite` import another.
FOR_ALL = (
    "devices",
    "files",
    "finite",
    "grammar",
    "modules",
    "options",
    "quaternion",
    "readback",
    "sealed",
    "state",
    "version",
    "wrapped",
)

#: The caption of each package in the picture, and its column.
WORDS = {
    "lab": ("training, tasks, studies", 1),
    "cli": ("the command tessera", 1),
    "integrations": ("vLLM, lm-eval", 2),
    "planning": ("which cache fits", 2),
    "evaluation": ("compare caches on a text", 1),
    "models": ("the demo model and its text", 0),
    "adapters": ("memories in models", 1),
    "attention": ("one softmax over all tiers", 1),
    "cache": ("the cache of a model", 1),
    "cache_layers": ("tokens of each row", 1),
    "tiers": ("exact, quantised, dissolved", 1),
    "codecs": ("vectors to bytes and back", 0),
    "tensor_cache": ("Tensor Cache", 1),
    "tensor_memory": ("Tensor Memory", 2),
    "kernels": ("PyTorch, C++, Triton", 1),
}


class Import(NamedTuple):
    """An import: the importing module, its line, the imported name, and the packages of both."""

    module: str
    line: int
    name: str
    source: str
    target: str


def package_of(module: str) -> str:
    """Return the name in `ORDER` of the package that a module such as "tessera.tiers.spec" belongs to."""
    parts = module.split(".")
    if len(parts) == 1:
        return parts[0]
    if parts[1] == "__main__":
        return "cli"
    if parts[1] in OLD_NAMES:
        return OLD_NAMES[parts[1]]
    if parts[1] in FOR_ALL:
        return ORDER[-1][0]
    return parts[1] if (SOURCE / parts[1]).is_dir() or (SOURCE / f"{parts[1]}.py").is_file() else parts[0]


def _names(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield line and name of all imports of a file, in functions too; strings that are module names count as imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                base = ".".join([*parts[: len(parts) - node.level + is_package], *filter(None, [node.module])])
            # `from tessera import cache` imports a package, `from tessera import Cache` the public interface.
            yield from ((node.lineno, f"{base}.{alias.name}" if base == "tessera" else base) for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"tessera(\.\w+)+\.?", str(node.value)):
            name = str(node.value).rstrip(".")
            if package_of(name) != "tessera":  # strings with public names, such as "tessera.attach", are text of messages
                yield node.lineno, name


def imports() -> list[Import]:
    """Return the imports between packages, including those in functions, for type checkers and by name."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in _names(tree, module, parts[-1] == "__init__"):
            source, target = package_of(module), package_of(name)
            if name.partition(".")[0] == "tessera" and source != target:
                found.append(Import(module, line, name, source, target))
    return found


def rank(package: str) -> int:
    """Return the row of a package in `ORDER`.

    Raises:
        ValueError: if the package is not in it.
    """
    for row, packages in enumerate(ORDER):
        if package in packages:
            return row
    raise ValueError(f"{package} is not in ORDER of docs/layers.py; say there where it belongs")


def arrows() -> list[tuple[str, str]]:
    """Return the arrows of the picture, without those that longer paths imply."""
    edges = {(each.source, each.target) for each in imports() if each.source in WORDS and each.target in WORDS}
    edges = {(a, b) for a, b in edges if rank(a) < rank(b)}

    def reaches(start: str, end: str) -> bool:
        return any(b == end or reaches(b, end) for a, b in edges if a == start)

    return sorted((a, b) for a, b in edges if not any(reaches(c, b) for d, c in edges if d == a and c != b))


WIDTH, HEIGHT, WIDE, GAP_X, GAP_Y, LEFT, TOP = 190, 52, 760, 60, 38, 35, 76


def _box(name: str) -> tuple[int, int]:
    """Return the left and top of a box."""
    rows = [row for row in ORDER if any(package in WORDS for package in row)]
    row = next(i for i, packages in enumerate(rows) if name in packages)
    return LEFT + WORDS[name][1] * (WIDTH + GAP_X), TOP + row * (HEIGHT + GAP_Y)


def _arrow(points: list[tuple[float, float]]) -> str:
    path = " L ".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="M {path}" fill="none" stroke="#444444" stroke-width="1.5" marker-end="url(#head)"/>'


def _route(a: str, b: str) -> list[tuple[float, float]]:
    """Return the corners of an arrow between two boxes."""
    (ax, ay), (bx, by) = _box(a), _box(b)
    middle = WIDTH / 2
    between = [name for name in WORDS if _box(name)[0] == bx and ay < _box(name)[1] < by]
    if ax < bx and between:  # out of the side, round the boxes of the other column, and into the side
        aside, start, end = bx + WIDTH + 18, ay + HEIGHT / 2, by + HEIGHT / 2
        return [(ax + WIDTH, start), (aside, start), (aside, end), (bx + WIDTH, end)]
    if ax > bx and between:  # out of the side, down between the columns, and into the side
        aside, start, end = bx + WIDTH + GAP_X / 2, ay + HEIGHT / 2, by + HEIGHT / 2
        return [(ax, start), (aside, start), (aside, end), (bx + WIDTH, end)]
    if ax != bx and by - ay > HEIGHT + GAP_Y:  # out of the side, and then down
        return [(ax + WIDTH if bx > ax else ax, ay + HEIGHT / 2), (bx + middle, ay + HEIGHT / 2), (bx + middle, by)]
    # Arrows to one box end beside each other.
    lean = 0.28 * WIDTH * ((bx > ax) - (bx < ax))
    return [(ax + middle + lean, ay + HEIGHT), (bx + middle - lean, by)]


def _text(x: float, y: float, words: str, size: int = 12, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{style}>{words}</text>'


def picture() -> str:
    """Return the picture as SVG."""
    centred = ' text-anchor="middle"'
    bottom = max(_box(name)[1] for name in WORDS) + HEIGHT + GAP_Y
    parts = [
        _text(LEFT, 28, "Imports between packages", 17, ' font-weight="bold"'),
        _text(LEFT, 50, "Arrows that longer paths imply are left out."),
    ]
    parts += [_arrow(_route(a, b)) for a, b in arrows()]
    for name, (words, _) in WORDS.items():
        x, y = _box(name)
        fill = "#FDF1E3" if name == "lab" else "#E8F1FA"
        parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="#444444"/>')
        parts.append(_text(x + WIDTH / 2, y + 22, name, 14, centred + ' font-weight="bold"'))
        parts.append(_text(x + WIDTH / 2, y + 41, words, 12, centred))
    across = 3 * WIDTH + 2 * GAP_X
    parts.append(f'<rect x="{LEFT}" y="{bottom}" width="{across}" height="{HEIGHT}" rx="6" fill="#F2F2F2" stroke="#444444"/>')
    parts.append(_text(LEFT + across / 2, bottom + 22, "modules that all may import", 14, centred + ' font-weight="bold"'))
    parts.append(_text(LEFT + across / 2, bottom + 41, ", ".join(FOR_ALL), 12, centred))
    head = (
        '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M 0 0 L 10 5 L 0 10 z" fill="#444444"/></marker>'
    )
    high = bottom + HEIGHT + 24
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDE}" height="{high}" viewBox="0 0 {WIDE} {high}" '
        f'font-family="DejaVu Sans, Verdana, sans-serif" fill="#222222">\n'
        f'<defs>{head}</defs>\n<rect width="{WIDE}" height="{high}" fill="white"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    """Write the picture."""
    OUT.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
