"""Print the longest files and functions of the project, for a reader to judge; nothing fails by its length alone.

Usage: python tools/sizes.py [FOLDER ...]
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("prune2deploy", "tests", "tools")
SHOWN = 8


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the length in lines and the name of each function in a file, decorators and docstrings left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body and node.end_lineno else 0
            yield lines, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def longest(entries: list[tuple[int, str]]) -> str:
    return "\n".join(f"  {lines:5d}  {name}" for lines, name in sorted(entries, reverse=True)[:SHOWN])


def main(folders: list[str]) -> None:
    for folder in folders:
        paths = sorted((ROOT / folder).rglob("*.py"))
        if not paths:
            sys.exit(f"sizes: there is no Python file under '{folder}'")
        files = [(len(path.read_text().splitlines()), str(path.relative_to(ROOT))) for path in paths]
        print(f"{folder}: {sum(lines for lines, _ in files)} lines in {len(files)} files; the longest files:")
        print(longest(files))
        print(f"{folder}: the longest functions, in lines of code without the docstring:")
        print(longest([entry for path in paths for entry in functions(path)]))


if __name__ == "__main__":
    main(sys.argv[1:] or list(FOLDERS))
