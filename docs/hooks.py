"""Hooks of mkdocs that turn links to symbols into links to source lines, and insert the help of commands.

A document links to a symbol of the source by its name, as ``../src/tessera/codecs/hqmq.py#HQMQ.directions``. On the site the
file is a page with numbered lines and the link leads to the line where the symbol is defined now; on a page that shows the
repository's files it leads to the file. ``tests/test_docs.py`` checks that every such name exists. A line ``<!-- help: compare
-->`` is replaced by the output of ``tessera compare --help``.
"""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
_LINK = re.compile(r"\]\(([^)\s]*\.\./[^)\s#]*)(?:#([^)\s]*))?\)")
_HELP = re.compile(r"^<!-- help: ([\w -]*?) *-->$", re.MULTILINE)
#: Suffixes of the source files that get a page on the site.
SHOWN = {".py": "python", ".hpp": "cpp", ".cpp": "cpp", ".md": "markdown", ".toml": "toml", ".txt": "text", ".yml": "yaml"}


@cache
def _definitions(path: Path) -> dict[str, int]:
    """Return the line of every class, function, method and constant of a file, by its dotted name."""
    found: dict[str, int] = {}

    def visit(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.setdefault(prefix + node.name, node.lineno)
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        found.setdefault(prefix + target.id, node.lineno)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.setdefault(prefix + node.target.id, node.lineno)

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def line_of(path: Path, symbol: str) -> int:
    """Return the line where a file defines a symbol.

    Args:
        path: of a Python file.
        symbol: as ``HQMQ.directions``.

    Raises:
        ValueError: if the file does not define it.
    """
    try:
        return _definitions(path)[symbol]
    except KeyError:
        raise ValueError(f"{path.relative_to(ROOT)} does not define {symbol}") from None


def links(page: Path, text: str) -> list[tuple[re.Match[str], Path, str | None]]:
    """Yield the links of a document to files outside of docs/.

    Args:
        page: the document's file.
        text: what is in it.

    Returns:
        the match, the file, and the symbol if one is named.
    """
    found = []
    for match in _LINK.finditer(text):
        target = Path(os.path.normpath(page.parent / match[1]))
        if DOCS not in target.parents and target != DOCS:
            found.append((match, target, match[2]))
    return found


def _page_of(target: Path) -> str:
    """Return where the site shows a file: a path in docs/ that no document has."""
    return f"source/{target.relative_to(ROOT).as_posix()}.md"


def help_of(command: str) -> str:
    """Return the output of ``tessera COMMAND --help`` as a block of Markdown."""
    from typer.testing import CliRunner

    from tessera.cli.app import app

    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "100"}, terminal_width=100)
    if result.exit_code:
        raise ValueError(f"tessera {command} --help fails: {result.output}")
    return f"```text\n{result.output.strip()}\n```"


def on_files(files: Any, config: Any) -> Any:
    """Add a page for every file outside of docs/ that a document links to."""
    from mkdocs.structure.files import File, InclusionLevel

    targets = set()
    for path in sorted(DOCS.rglob("*.md")):
        targets |= {target for _, target, _ in links(path, path.read_text(encoding="utf-8")) if target.is_file()}
    for target in sorted(targets):
        if target.suffix in SHOWN or target.name == "LICENSE":
            name = target.relative_to(ROOT).as_posix()
            kind = SHOWN.get(target.suffix, "text")
            code = target.read_text(encoding="utf-8")
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", code)), default=0))
            page = f'# {name}\n\n{fence}{{.{kind} linenums="1"}}\n{code}\n{fence}\n'
            files.append(File.generated(config, _page_of(target), content=page, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links into the source into links to pages and lines, and fill in the help of commands."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    here = DOCS / uri
    for match, target, symbol in reversed(links(here, markdown)):
        shown = _page_of(target)
        if files.get_file_from_path(shown) is None:
            continue  # mkdocs reports that the page does not exist
        path = os.path.relpath(DOCS / shown, here.parent)
        anchor = f"#__codelineno-0-{line_of(target, symbol)}" if symbol else ""
        markdown = f"{markdown[: match.start()]}]({path}{anchor}){markdown[match.end() :]}"
    return _HELP.sub(lambda found: help_of(found[1]), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Add anchors for the linked lines, since mkdocs finds none in code blocks."""
    page.present_anchor_ids |= set(re.findall(r'"(__codelineno-[\d-]+)"', html))
    return html
