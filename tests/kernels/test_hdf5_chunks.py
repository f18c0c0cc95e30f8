"""Packing of chunks, counting of rows and checksums, compared with numpy and zlib."""

import importlib
import sys
import zlib

import numpy as np
import pytest
from example_counts import examples
from file_builder import count
from hypothesis import given, settings
from hypothesis import strategies as st

from larpixdaq import constants, schema
from larpixdaq._native import board_emulator, decoders, hdf5_chunks
from larpixdaq.runtime import record_file

KINDS = ["constant", "slow", "rare", "skewed", "few", "late", "random"]


def planes(kinds: list[str], rows: int, seed: int) -> np.ndarray:
    """Return byte planes like those of real columns, shape (len(kinds), rows)."""
    rng = np.random.default_rng(seed)
    out = np.zeros((len(kinds), rows), np.uint8)
    for plane, kind in zip(out, kinds, strict=True):
        if kind == "constant":
            plane[:] = rng.integers(256)
        elif kind == "slow":
            plane[:] = np.repeat(rng.integers(0, 256, rows), rng.integers(1, 600, rows))[:rows]
        elif kind == "rare":
            plane[:] = np.where(rng.random(rows) < 0.02, rng.integers(0, 256, rows), rng.integers(256))
        elif kind == "skewed":  # codes of many lengths, up to the maximum
            plane[:] = np.minimum(rng.geometric(0.3 + 0.6 * rng.random(), rows), 255)
        elif kind == "few":
            plane[:] = rng.integers(0, rng.integers(2, 70), rows)
        elif kind == "late":  # constant in the first samples
            plane[rows // 3 :] = rng.integers(0, 256, rows - rows // 3)
        else:
            plane[:] = rng.integers(0, 256, rows)
    return out


@settings(max_examples=examples(200))
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=60),
    rows=st.one_of(st.integers(1, 300), st.sampled_from([schema.CHUNK_ROWS, 70_000])),
    seed=st.integers(0, 2**32),
)
def test_packed_chunks_are_shuffled_and_in_zlib_format(kinds, rows, seed):
    if rows > 10_000:
        kinds = kinds[:5]
    made = planes(kinds, rows, seed)
    chunk = np.ascontiguousarray(made.T).reshape(-1)
    chunk.flags.writeable = False
    packer = hdf5_chunks.Packer(rows, len(kinds))
    packed = packer.pack(chunk)
    assert zlib.decompress(packed) == made.tobytes()
    assert packer.pack(chunk) == packed


chunk_kinds = st.lists(st.sampled_from(KINDS), min_size=3, max_size=3)


@settings(max_examples=examples(60))
@given(chunks=st.lists(chunk_kinds, min_size=2, max_size=20), seed=st.integers(0, 2**32))
def test_chunks_of_any_content_follow_each_other(chunks, seed):
    rows = 5000
    packer = hdf5_chunks.Packer(rows, 3)
    for number, kinds in enumerate(chunks):
        made = planes(kinds, rows, seed + number % 3)
        packed = packer.pack(np.ascontiguousarray(made.T).reshape(-1))
        assert zlib.decompress(packed) == made.tobytes()
        assert len(packed) < made.size + 2000


@pytest.mark.parametrize("size", [1, 2, 3, 257, 258, 259, 260, 261, 516, 517, 65_535, 65_536, 131_071])
def test_lengths_at_the_limits_of_repetitions_and_stored_blocks(size):
    random = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    for made in (np.full(size, 7, np.uint8), random, np.append(random[:1], np.full(size - 1, 9, np.uint8))):
        assert zlib.decompress(hdf5_chunks.Packer(size, 1).pack(made)) == made.tobytes()


def test_huffman_codes_longer_than_the_limit_are_shortened():
    """Fibonacci numbers as counts make the longest codes."""
    counts = [1, 1]
    while sum(counts) < 400_000:
        counts.append(counts[-1] + counts[-2])
    made = np.random.default_rng(3).permutation(np.repeat(np.arange(len(counts), dtype=np.uint8), counts))
    packed = hdf5_chunks.Packer(len(made), 1).pack(made)
    assert zlib.decompress(packed) == made.tobytes()
    assert len(packed) < len(zlib.compress(made.tobytes(), 9)) * 1.02


def test_realistic_rows_shrink_to_less_than_a_fifth():
    """Also with the codes of earlier chunks, which cost less than 0.5 %."""
    board = board_emulator.PacmanBoard(schema.Asic.V2, rate=1e6, seed=1, words=65_535)
    decoder = decoders.PacmanDecoder(1, schema.Asic.V2)
    decoder.start(np.zeros(len(constants.COUNTS), np.uint64))
    rows = np.zeros(schema.CHUNK_ROWS, schema.PACKETS_2_4)
    packer = hdf5_chunks.Packer(*rows.shape, rows.itemsize)
    sizes = []
    for _ in range(20):
        decoder.feed(board.buffer, board.spans[: board.fill(schema.CHUNK_ROWS, 1000)])
        assert decoder.decode(rows) == len(rows)
        packed, alone = (each.pack(rows.view(np.uint8)) for each in (packer, hdf5_chunks.Packer(*rows.shape, 36)))
        assert len(packed) < rows.nbytes / 5
        assert zlib.decompress(packed) == rows.view(np.uint8).reshape(len(rows), -1).T.tobytes()
        while decoder.decode(rows):
            pass
        sizes.append((len(packed), len(alone)))
    assert sum(size for size, _ in sizes) < 1.005 * sum(size for _, size in sizes)


def test_packer_rejects_wrong_sizes_and_dtypes():
    for rows, size in ((0, 36), (36, 0), (1 << 25, 36), (36, 4097)):
        with pytest.raises(ValueError, match=f"expected 1 to 2\\^24 rows of 1 to 4096 bytes, found {rows} of {size}"):
            hdf5_chunks.Packer(rows, size)
    packer = hdf5_chunks.Packer(2, 36)
    with pytest.raises(ValueError, match="expected 1 to 2 rows of 36 bytes, found 71 bytes"):
        packer.pack(np.zeros(71, np.uint8))
    with pytest.raises(ValueError, match="Buffer dtype mismatch"):
        packer.pack(np.zeros(36, np.uint16))


@settings(max_examples=examples(200))
@given(data=st.data())
def test_rows_are_gathered_from_planes_like_by_numpy(data):
    """Any columns of any rows, with no room to spare, and nothing is written behind the rows."""
    size, rows = data.draw(st.integers(1, 60), "size"), data.draw(st.integers(1, 300), "rows")
    wide = data.draw(st.booleans(), "wide")
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    planes = rng.integers(0, 256, (size, rows), dtype=np.uint8)
    columns = rng.integers(0, size, 300 if wide else data.draw(st.integers(1, 50), "columns")).astype(np.int32)
    share = data.draw(st.sampled_from([None, 0.0, 0.1, 0.9, 1.0]), "share")
    chosen = None if share is None else (rng.random(rows) < share).astype(np.uint8)
    expected = planes[columns].T if chosen is None else planes[columns].T[chosen == 1]
    room = data.draw(st.sampled_from([0, 1, 5000]), "room")
    out = np.full(expected.size + room, 7, np.uint8)
    assert hdf5_chunks.gather(planes.reshape(-1), rows, columns, out, chosen) == len(expected)
    assert np.array_equal(out[: expected.size], expected.reshape(-1))
    tail = out[expected.size :]
    assert len(tail) == room
    if room < 16:  # further bytes may be used
        assert (tail == 7).all()


def test_gather_rejects_what_does_not_fit():
    planes, columns, out = np.zeros(30, np.uint8), np.arange(3, dtype=np.int32), np.zeros(30, np.uint8)
    for arguments, line in (
        ((planes, 0, columns, out), "30 bytes of planes of 0 rows"),
        ((planes, 7, columns, out), "30 bytes of planes of 7 rows"),
        ((planes, 10, columns[:0], out), "0 bytes of a row are wanted"),
        ((planes, 10, np.zeros(4097, np.int32), out), "4097 bytes of a row"),
        ((planes, 10, columns, out[1:]), "10 rows of 3 bytes are chosen, there is room for 29 bytes"),
        ((planes, 10, columns + 1, out), "plane 3 of 3"),
        ((planes, 10, columns - 1, out), "plane -1 of 3"),
        ((planes, 10, columns, out, np.ones(9, np.uint8)), "10 rows, 9 of them"),
    ):
        with pytest.raises(ValueError, match=line):
            hdf5_chunks.gather(*arguments)
    assert hdf5_chunks.gather(planes, 10, columns, out[:0], np.zeros(10, np.uint8)) == 0


@pytest.mark.parametrize("layout", schema.LAYOUTS, ids=lambda layout: layout.name)
@settings(max_examples=examples(25))
@given(rows=st.integers(0, 200), seed=st.integers(0, 2**32), run=st.sampled_from([1, 30]))
def test_tally_counts_like_numpy(layout, rows, seed, run):
    """Rows of one kind come in runs of about this length."""
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 256, rows * layout.dtype.itemsize, dtype=np.uint8).view(layout.dtype)
    made["type" if layout.code == 1 else "packet_type"] = rng.integers(0, 10, rows)
    made["direction"] = rng.integers(0, 2, rows)
    made = made[np.arange(rows) // run * run]
    made["valid_parity"] = rng.integers(0, 2, rows)
    if layout.code == 1:
        keys = [b"", b"1-2-3", b"17-1-255", b"255-255-255"]
        made["chip_key"] = [keys[i] for i in rng.integers(0, 4, rows)]
    counts = np.zeros((256, len(hdf5_chunks.TALLY)), np.uint64)
    hdf5_chunks.tally(made.view(np.uint8), layout.code, counts)
    expected = count(made)
    for group in range(256):
        numbers = dict(zip(hdf5_chunks.TALLY, counts[group].tolist(), strict=True))
        assert numbers == expected.get(group, dict.fromkeys(hdf5_chunks.TALLY, 0))


def test_tally_rejects_wrong_layouts_and_sizes():
    counts = np.zeros((256, len(hdf5_chunks.TALLY)), np.uint64)
    with pytest.raises(ValueError, match="unknown layout code 9"):
        hdf5_chunks.tally(np.zeros(36, np.uint8), 9, counts)
    for layout in schema.LAYOUTS:
        size = layout.dtype.itemsize
        with pytest.raises(ValueError, match=f"no whole number of rows of {size} bytes"):
            hdf5_chunks.tally(np.zeros(size + 1, np.uint8), layout.code, counts)
    with pytest.raises(ValueError, match="expected counts of shape"):
        hdf5_chunks.tally(np.zeros(36, np.uint8), 2, counts[:255])


def test_first_columns_of_a_tally_are_ledger_counters():
    assert set(hdf5_chunks.TALLY[:6]) <= set(constants.COUNTS)


def test_chunks_of_every_layout_fit_the_cache_of_old_hdf5_versions():
    largest = max(layout.dtype.itemsize for layout in schema.LAYOUTS)
    assert largest * schema.CHUNK_ROWS <= 1 << 20


@pytest.mark.parametrize("library", ["isal", "zlib"])
def test_crc32_is_the_same_with_isal_and_zlib(library, monkeypatch):
    module = record_file
    if library == "zlib":
        monkeypatch.setitem(sys.modules, "isal", None)
        spec = importlib.util.find_spec("larpixdaq.runtime.record_file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        pytest.importorskip("isal")
    data = np.random.default_rng(1).integers(0, 4, 100_000, dtype=np.uint8)
    assert module.zlib_library.__name__ == {"isal": "isal.isal_zlib", "zlib": "zlib"}[library]
    assert module.crc32(data) == zlib.crc32(data)
    assert module.crc32(data[500:], module.crc32(data[:500])) == zlib.crc32(data)
