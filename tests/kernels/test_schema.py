"""The names in larpixdaq.schema and the C declarations in ext/ tell one thing twice; here they are held together."""

import re
from pathlib import Path

import numpy as np
import pytest

from larpixdaq import constants, schema
from larpixdaq._native import decoders
from larpixdaq.hdf5 import layout as files_layout

EXT = Path(__file__).resolve().parents[2] / "ext"


def enumerators(file: str, beside: str) -> dict[str, int]:
    """Names and values of the enum in this file that has `beside` in its first line."""
    text = (EXT / file).read_text()
    block = re.search(rf"^cdef enum[^\n]*{re.escape(beside)}[^\n]*\n((?:    [^\n]*\n)+)", text, re.MULTILINE)
    assert block is not None
    values: dict[str, int] = {}
    for name, value in re.findall(r"^    (\w+)(?: = (\d+))?", block[1], re.MULTILINE):
        values[name] = int(value) if value else len(values)
    return values


def test_counts_have_the_order_of_the_compiled_enum() -> None:
    wanted = {**constants.Count.__members__, "N_COUNTS": len(constants.Count)}
    assert enumerators("row_structs.pxd", "constants.Count") == wanted


def test_compiled_decoders_take_exactly_these_counts() -> None:
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


def test_layouts_are_packed_and_found_by_code() -> None:
    sizes = {"1.0": 56, "2.4": 36, "2.4-clock64": 40, "3.0": 43}
    assert {layout.name: layout.dtype.itemsize for layout in schema.LAYOUTS} == sizes
    for layout in schema.LAYOUTS:
        assert schema.layout(layout.code) is layout
        assert layout.dtype.itemsize == sum(layout.dtype[name].itemsize for name in layout.dtype.names)
    with pytest.raises(ValueError, match="unknown layout code 9; known are"):
        schema.layout(9)


def test_every_column_of_a_file_is_described_in_it_and_in_the_documentation(tmp_path):
    documentation = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    described = set()
    for one in schema.LAYOUTS:
        with files_layout.create(tmp_path / f"{one.code}.h5", one, "2") as file:
            for name in ("packets", "run/checksums", *files_layout.CHECKED):
                lines = [[text.decode() for text in line] for line in file[name].attrs["columns"]]
                assert [column for column, _, _ in lines] == list(file[name].dtype.names)
                assert f"`/{name}`" in documentation
                described |= {f"| `{column}` | {unit} | {meaning} |" for column, unit, meaning in lines}
    assert [line for line in described if line not in documentation.splitlines()] == []
