"""The book: commands, configuration files and examples on its pages are right, and its reference is complete."""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from larpixdaq.cli.detector import PROGRAMS
from larpixdaq.detector_config import DetectorConfig

SOURCES = Path(__file__).parents[2]
PAGES = [SOURCES / "README.md", *sorted((SOURCES / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """Return the page and the text of each example in a language."""
    return [
        (page.name, text)
        for page in PAGES
        for text in re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)
    ]


@pytest.fixture(scope="module")
def conf():
    """Docs/conf.py, which makes the command reference."""
    spec = importlib.util.spec_from_file_location("conf", SOURCES / "docs" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_line_is_understood_by_its_program(conf, capsys):
    parsers = {parser.prog: parser for parser in conf.command_parsers()}
    understood, refused = 0, []
    for page, text in blocks("sh"):
        for line in re.sub(r"\\\n", " ", text).splitlines():
            words = shlex.split(line, comments=True)
            words = words[: next((index for index, word in enumerate(words) if word in ("&", "|", ">", "&&")), None)]
            if not words or words[0] not in parsers or "…" in line:
                continue
            try:
                parsers[words[0]].parse_args(words[1:])
                understood += 1
            except SystemExit:
                refused.append(f"{page}: {line}: {capsys.readouterr().err}")
    assert refused == []
    assert understood > 60


def test_the_reference_has_every_command_and_option(conf):
    lines = [line for parser in conf.command_parsers() for line in conf.reference(parser)]
    text = "\n".join(lines)
    for heading in (
        "## larpixdaq-core",
        "### larpixdaq verify",
        "### larpixdaq-emulator pacman",
        "#### larpixdaq keys join",
    ):
        assert f"{heading}\n" in text
    assert "- `--rotate LIMIT`: begin the next file" in text
    assert "%(" not in text


def test_links_stay_in_the_book(conf):
    assert conf.to_pages("[a](../DECISIONS.md) [b](hosts.md#limits)") == "[a](decisions.md) [b](hosts.md#limits)"
    assert conf.to_pages("[a](docs/web.md#log-in)", ".") == "[a](web.md#log-in)"
    assert (
        conf.to_pages("[a](../docs/log.md) ![b](throughput.png)", "bench")
        == "[a](log.md) ![b](../bench/throughput.png)"
    )
    assert conf.to_pages("[a](https://example.org) [b](#runs)") == "[a](https://example.org) [b](#runs)"


def test_links_lead_to_headings():
    """Also on pages that Sphinx does not read, such as the README."""
    headings = {}
    for page in [*PAGES, *(SOURCES / name for name in ("bench/README.md", "SECURITY.md", "CONTRIBUTING.md"))]:
        found = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
        headings[page.resolve()] = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}
    wrong = []
    for page in list(headings):
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
            other = (page.parent / target).resolve() if target else page
            if not other.exists() or (anchor and other.suffix == ".md" and anchor not in headings.get(other, {anchor})):
                wrong.append(f"{page.name}: {target}#{anchor}")
    assert wrong == []


@pytest.mark.parametrize(("page", "text"), [block for block in blocks("toml") if "[producers" in block[1]])
def test_every_configuration_file_is_valid(page, text, tmp_path):
    (tmp_path / "RUN_CONFIG.json").write_text("{}")
    (tmp_path / "detector.toml").write_text(text if "[detector]" in text else f"[detector]\n{text}")
    DetectorConfig(tmp_path / "detector.toml", PROGRAMS)


def test_every_example_is_whole():
    for page, text in blocks("python"):
        ast.parse(text, page)
    for _, text in blocks("json"):
        json.loads(text)
