"""Configuration of Sphinx, which makes the book of these pages: `sphinx-build -W -b html docs build/book`.

It needs `pip install -e ".[docs]"`. Pages outside of this folder (decisions, changes, benchmarks) become pages of the
book. The reference of commands is made from the argument parsers of the installed programs, that of the Operator from
its docstrings. autodoc is not used, because it reads the stubs of compiled modules in their place.
"""

from __future__ import annotations

import argparse
import fnmatch
import inspect
import os
import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from larpixdaq.operator import Operator
from larpixdaq.version import VERSION

project = "larpix-daq"
release = version = VERSION
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"larpix-daq {VERSION}"
html_copy_source = False
myst_heading_anchors = 4
exclude_patterns = ["grafana/*"]

#: Files of the repository that are pages of the book under another name: page -> file.
OUTSIDE = {
    "changes": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "decisions": "DECISIONS.md",
    "performance": "bench/README.md",
    "reporting": "SECURITY.md",
}
DOCS = Path(__file__).parent
ROOT = DOCS.parent


def to_pages(text: str, folder: str = "docs") -> str:
    """Change links to files of the repository, in a text of this folder, to links to pages of the book."""
    pages = {str(ROOT / file): f"{page}.md" for page, file in OUTSIDE.items()}

    def to_page(link: re.Match[str]) -> str:
        path = (ROOT / folder / link[1]).resolve()
        if path.parent == DOCS:
            return f"]({path.name}{link[2] or ''})"
        if str(path) in pages:
            return f"]({pages[str(path)]}{link[2] or ''})"
        return f"]({os.path.relpath(path, DOCS)}{link[2] or ''})"

    return re.sub(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", to_page, text)


def command_parsers() -> Iterator[argparse.ArgumentParser]:
    """Yield the argument parser of each program that larpix-daq installs, in the order of their names."""
    for program in sorted(entry_points(group="console_scripts"), key=lambda program: program.name):
        if program.dist is not None and program.dist.name == "larpix-daq":
            module = inspect.getmodule(program.load())
            yield module.argument_parser()


def reference(parser: argparse.ArgumentParser, about: str = "", level: int = 2) -> Iterator[str]:
    """Yield the lines of a command's reference, and of its subcommands."""
    yield f"{'#' * level} {parser.prog}\n"
    yield f"{markdown(parser.description or about)}\n"
    yield f"```text\n{parser.format_usage().strip()}\n```\n"
    commands: list[tuple[argparse.ArgumentParser, str]] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            commands += [(child, helps.get(name, "")) for name, child in action.choices.items()]
        elif action.help != argparse.SUPPRESS and action.dest != "help":
            yield f"- {invocation(action)}: {markdown((action.help or '') % {**vars(action), 'prog': parser.prog})}"
    yield ""
    for child, text in commands:
        yield from reference(child, text, min(level + 1, 4))


def methods() -> Iterator[str]:
    """Yield the lines of the reference of an Operator's methods, in the order of its class."""
    for name, method in vars(Operator).items():
        if name.startswith("_") or not inspect.isfunction(method):
            continue
        signature = inspect.signature(method)
        own = [each.replace(annotation=each.empty) for each in list(signature.parameters.values())[1:]]
        signature = signature.replace(parameters=own, return_annotation=signature.empty)
        yield f"### {name}\n\n```python\no.{name}{signature}\n```\n\n{markdown(inspect.getdoc(method) or '')}\n"


def invocation(action: argparse.Action) -> str:
    """Return how an option or a positional argument is written on the command line."""
    formatter = argparse.HelpFormatter("")
    value = "" if action.nargs == 0 else formatter._format_args(action, action.dest.upper()).replace("`", "'")
    if not action.option_strings:
        return f"`{value}`"
    return ", ".join(f"`{option} {value}`" if value else f"`{option}`" for option in action.option_strings)


def markdown(text: str) -> str:
    """Escape what is no Markdown in a help text, outside of backticks."""
    parts = text.split("`")
    return "`".join(part if index % 2 else re.sub(r"([\\*_<>\[\]])", r"\\\1", part) for index, part in enumerate(parts))


def read_page(app: Any, page: str, source: list[str]) -> None:
    """Fill in the pages that are made from other files or from the programs, and make links stay in the book."""
    if page in OUTSIDE:
        file = ROOT / OUTSIDE[page]
        app.env.note_dependency(str(file))
        source[0] = to_pages(file.read_text(), str(file.parent.relative_to(ROOT)))
        return
    if page == "index":  # without the places for pages that are not there
        there = [path.stem for path in DOCS.glob("*.md")]
        lines = source[0].splitlines()
        source[0] = "\n".join(line for line in lines if not line.endswith("*") or fnmatch.filter(there, line))
    elif page == "commands":
        source[0] += "\n".join(line for parser in command_parsers() for line in reference(parser))
    elif page == "operator":
        source[0] += "\n".join(methods())
    source[0] = to_pages(source[0])


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", read_page)
    return {"parallel_read_safe": True}
