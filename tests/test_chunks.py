"""Byte shuffle, counts of rows, CRC and compression: against numpy and zlib."""

import importlib
import sys
import zlib

import numpy as np
import pytest
from filling import count
from hypothesis import given, settings
from hypothesis import strategies as st

from larpixdaq import deflate, schema
from larpixdaq._native import chunks


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 70), rows=st.integers(0, 700), seed=st.integers(0, 2**32))
def test_shuffle_is_the_transposition_of_bytes(size, rows, seed):
    data = np.random.default_rng(seed).integers(0, 256, rows * size, dtype=np.uint8)
    data.flags.writeable = False
    out = np.zeros_like(data)
    chunks.shuffle(data, size, out)
    assert np.array_equal(out, data.reshape(rows, size).T.reshape(-1))


def test_shuffle_refuses_what_does_not_fit():
    data = np.zeros(72, np.uint8)
    with pytest.raises(ValueError, match="72 bytes are no whole number of items of 35"):
        chunks.shuffle(data, 35, np.zeros(72, np.uint8))
    with pytest.raises(ValueError, match="0 bytes"):
        chunks.shuffle(data, 0, np.zeros(72, np.uint8))
    with pytest.raises(ValueError, match="expected room for 72 bytes, found 71"):
        chunks.shuffle(data, 36, np.zeros(71, np.uint8))
    with pytest.raises(ValueError, match="overlap"):
        chunks.shuffle(data, 36, data)
    with pytest.raises(ValueError, match="Buffer dtype mismatch"):
        chunks.shuffle(np.zeros(72, np.uint16), 36, data)


@pytest.mark.parametrize("layout", schema.LAYOUTS, ids=lambda layout: layout.name)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 200), seed=st.integers(0, 2**32))
def test_tally_counts_as_numpy_does(layout, rows, seed):
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 256, rows * layout.dtype.itemsize, dtype=np.uint8).view(layout.dtype)
    made["type" if layout.code == 1 else "packet_type"] = rng.integers(0, 10, rows)
    made["direction"] = rng.integers(0, 2, rows)
    made["valid_parity"] = rng.integers(0, 2, rows)
    if layout.code == 1:
        keys = [b"", b"1-2-3", b"17-1-255", b"255-255-255"]
        made["chip_key"] = [keys[i] for i in rng.integers(0, 4, rows)]
    counts = np.zeros((256, len(chunks.TALLY)), np.uint64)
    chunks.tally(made.view(np.uint8), layout.code, counts)
    expected = count(made)
    for group in range(256):
        numbers = dict(zip(chunks.TALLY, counts[group].tolist(), strict=True))
        assert numbers == expected.get(group, dict.fromkeys(chunks.TALLY, 0))


def test_tally_refuses_what_does_not_fit():
    counts = np.zeros((256, len(chunks.TALLY)), np.uint64)
    with pytest.raises(ValueError, match="unknown layout code 9"):
        chunks.tally(np.zeros(36, np.uint8), 9, counts)
    for layout in schema.LAYOUTS:
        size = layout.dtype.itemsize
        with pytest.raises(ValueError, match=f"no whole number of rows of {size} bytes"):
            chunks.tally(np.zeros(size + 1, np.uint8), layout.code, counts)
    with pytest.raises(ValueError, match="expected counts of shape"):
        chunks.tally(np.zeros(36, np.uint8), 2, counts[:255])


def test_the_first_columns_of_a_tally_are_the_ledgers():
    assert set(chunks.TALLY[:6]) <= set(schema.COUNTS)


def test_a_chunk_of_every_layout_fits_into_the_cache_of_old_hdf5():
    largest = max(layout.dtype.itemsize for layout in schema.LAYOUTS)
    assert largest * schema.CHUNK_ROWS <= 1 << 20


@pytest.mark.parametrize("library", ["isal", "zlib"])
def test_deflate_is_zlibs_format_with_either_library(library, monkeypatch):
    module = deflate
    if library == "zlib":
        monkeypatch.setitem(sys.modules, "isal", None)
        spec = importlib.util.find_spec("larpixdaq.deflate")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        pytest.importorskip("isal")
    data = np.random.default_rng(1).integers(0, 4, 100_000, dtype=np.uint8)
    name = module.NAME
    assert name == f"{library} 1"
    assert zlib.decompress(module.compress(data)) == data.tobytes()
    assert module.crc32(data) == zlib.crc32(data)
    assert module.crc32(data[500:], module.crc32(data[:500])) == zlib.crc32(data)
