"""Dtypes and codes of larpixdaq.schema and constants equal the C declarations in ext/ and the documentation."""

import re
from pathlib import Path

import numpy as np
import pytest

from larpixdaq import constants, schema
from larpixdaq._native import decoders
from larpixdaq.hdf5 import layout as files_layout
from larpixdaq.hdf5.metadata import attributes

EXT = Path(__file__).resolve().parents[2] / "ext"


def enumerators(file: str, comment: str) -> dict[str, int]:
    """Return names and values of the first enum in this file that has `comment` in its first line."""
    text = (EXT / file).read_text()
    block = re.search(rf"^cdef enum[^\n]*{re.escape(comment)}[^\n]*\n((?:    [^\n]*\n)+)", text, re.MULTILINE)
    assert block is not None
    values: dict[str, int] = {}
    for name, value in re.findall(r"^    (\w+)(?: = (\d+))?", block[1], re.MULTILINE):
        values[name] = int(value) if value else len(values)
    return values


def test_counts_have_the_order_of_the_compiled_enum() -> None:
    wanted = {**constants.Count.__members__, "N_COUNTS": len(constants.Count)}
    assert enumerators("row_structs.pxd", "constants.Count") == wanted


def test_decoders_reject_another_number_of_counters() -> None:
    decoder = decoders.PacmanDecoder(1, schema.Asic.V2)
    decoder.start(np.zeros(len(constants.Count), np.uint64))
    with pytest.raises(ValueError, match=f"expected {len(constants.Count)} .* found {len(constants.Count) + 1}"):
        decoder.start(np.zeros(len(constants.Count) + 1, np.uint64))


def test_asic_codes() -> None:
    assert enumerators("row_structs.pxd", "schema.Asic") == {asic.name: asic.value for asic in schema.Asic}


def test_reason_codes() -> None:
    assert sorted(enumerators("row_codec.pxd", "schema.REASONS").values()) == sorted(schema.REASONS)


def test_row_types() -> None:
    types = enumerators("row_codec.pxd", "schema.PacketType")
    assert types == {name: schema.PacketType[name] for name in types}


def test_dtypes_of_the_decoders() -> None:
    decoder = decoders.PacmanDecoder(1, schema.Asic.V2)
    assert decoder.take_unknown().dtype == schema.UNKNOWN_WORD
    assert decoders.split_log(b"")[0].dtype == schema.SPAN
    assert enumerators("decoder_state.pxd", "")["KEPT"] == schema.UNKNOWN_KEPT


def test_layouts_are_packed_and_have_unique_codes() -> None:
    sizes = {"1.0": 56, "2.4": 36, "2.4-clock64": 40, "3.0": 43}
    assert {layout.name: layout.dtype.itemsize for layout in schema.LAYOUTS} == sizes
    for layout in schema.LAYOUTS:
        assert schema.layout(layout.code) is layout
        assert layout.dtype.itemsize == sum(layout.dtype[name].itemsize for name in layout.dtype.names)
    with pytest.raises(ValueError, match="unknown layout code 9; known are"):
        schema.layout(9)


def test_file_and_documentation_describe_every_column(tmp_path):
    documentation = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    described = set()
    for layout in schema.LAYOUTS:
        with files_layout.create(tmp_path / f"{layout.code}.h5", layout, "2") as file:
            for name in ("packets", "run/checksums", *files_layout.CHECKED):
                lines = [[text.decode() for text in line] for line in file[name].attrs["columns"]]
                assert [column for column, _, _ in lines] == list(file[name].dtype.names)
                assert f"`/{name}`" in documentation
                described |= {f"| `{column}` | {unit} | {meaning} |" for column, unit, meaning in lines}
    assert [line for line in described if line not in documentation.splitlines()] == []


def test_documentation_describes_every_attribute(tmp_path):
    documentation = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    with files_layout.create(tmp_path / "a.h5", schema.LAYOUTS[1], "2", attributes(42, 0, "physics")) as file:
        found = {(f"/{name}", attribute) for name in ("_header", "meta") for attribute in file[name].attrs}
        found |= {(f"/{name}", attribute) for name in ("packets", "configs") for attribute in file[name].attrs}
        assert {("/packets", "columns"), ("/configs", "columns")} <= found
        everywhere: list[str] = []
        file.visititems(lambda _, item: everywhere.extend(item.attrs))
    described = set(re.findall(r"^\| `(/\w+)` \| `(\w+)` \|", documentation, re.MULTILINE))
    assert described == {pair for pair in found if pair[1] != "columns"}
    assert set(everywhere) == {attribute for _, attribute in found}
