"""Results in IPython: text histograms and maps in a terminal; tables and pictures in a notebook, all escaped."""

import base64
import re
import struct
import xml.dom.minidom
import zlib

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from larpixdaq.control import result_views
from larpixdaq.control.client import Request, Response
from larpixdaq.control.result_views import view_of
from larpixdaq.errors import RequestError

CHIPS = np.dtype([("io_group", "u1"), ("io_channel", "u1"), ("chip_id", "u1")])
SCRIPT = "<script>alert('x')</script>"


def histogram(counts, **changes):
    counts = np.asarray(counts, np.uint64)
    entries = int(counts.sum())
    adc = np.arange(len(counts))
    mean = float(counts @ adc / entries) if entries else None
    std = float(np.sqrt(counts @ (adc - mean) ** 2 / entries)) if entries else None
    answer = {"io_group": 1, "io_channel": None, "chip": None, "channel": None, "run": 7, "counts": counts}
    return answer | {"entries": entries, "mean": mean, "std": std, "seen": 1.0, "merged_channels": 0} | changes


def filled(**values):
    counts = np.zeros(256, np.uint64)
    for name, value in values.items():
        counts[int(name[1:])] = value
    return counts


def answered(action, value):
    request = Request(action, lambda: 0.0)
    request.take(Response("result", value=value))
    return request


def parsed(html):
    """Parse HTML as XML, so that each tag has its end, and there is no script."""
    closed = re.sub(r"(<img [^>]*)>", r"\1/>", html)
    document = xml.dom.minidom.parseString(f"<div>{closed}</div>")
    assert not document.getElementsByTagName("script")
    for element in document.getElementsByTagName("*"):
        assert not [name for name in element.attributes.keys() if name.startswith("on")]  # noqa: SIM118
    return document


def test_a_histogram_as_text():
    text = answered("adc_histogram", histogram(filled(a30=10, a31=400, a33=100))).readable(1)
    lines = text.splitlines()
    assert lines[0].startswith("run 7; io_group 1; 510 data packets; mean 31.37, standard deviation 0.82 ADC counts")
    assert [line.split()[:2] for line in lines[1:]] == [
        ["ADC", "packets"],
        ["30", "10"],
        ["31", "400"],
        ["32", "0"],
        ["33", "100"],
    ]
    bars = [line.partition("  ")[2].split()[-1] for line in lines[2:]]
    assert len(bars[1]) == 50
    assert len(bars[0]) in (1, 2)


@given(st.lists(st.tuples(st.integers(0, 1023), st.integers(1, 2**40)), min_size=1, max_size=50))
def test_a_histogram_shows_all_packets(entries):
    counts = np.zeros(1024, np.uint64)
    for place, number in entries:
        counts[place] = number
    lines = view_of("adc_histogram", None).text(histogram(counts)).splitlines()[2:]
    assert len(lines) <= 24
    assert sum(int(line.split()[1]) for line in lines) == int(counts.sum())
    first, last = np.flatnonzero(counts)[[0, -1]]
    assert lines[0].split()[0].split("-")[0] == str(first)
    assert lines[-1].split()[0].split("-")[-1] == str(last)
    for line in lines:  # nothing above 0 is without a bar
        assert (len(line.split()) == 3) == (line.split()[1] != "0")


def test_a_histogram_as_a_picture():
    html = answered("adc_histogram", histogram(filled(a30=10, a31=400, a200=1), seen=0.25))._repr_html_()
    document = parsed(html)
    (svg,) = document.getElementsByTagName("svg")
    texts = [text.firstChild.data for text in svg.getElementsByTagName("text")]
    assert "ADC value [ADC counts]; data packets upwards" in texts
    assert "400" in texts
    assert "25.0% of the rows were seen" in html
    corners = svg.getElementsByTagName("polygon")[0].getAttribute("points").split()
    assert len(corners) == 2 * (200 - 30 + 1) + 2


def test_an_empty_histogram():
    empty = histogram(np.zeros(256))
    assert answered("adc_histogram", empty).readable(1) == "run 7; io_group 1; 0 data packets"
    parsed(answered("adc_histogram", empty)._repr_html_())


NETWORK = {
    "ok": False,
    "file": "found.json",
    "chips": 4,
    "missing": 2,
    "faults": ["io_group 1 tile 0: no answer from chip 16", SCRIPT],
    "state": "reset",
    "seconds": 1.5,
    "tiles": [
        {
            "io_group": 1, "tile": 0, "rows": 2, "columns": 3, "first_id": 11, "row_step": 3, "faults": 2,
            "network": [[11, 1, 0], [14, 2, 0], [12, 1, 11], [13, 1, 12]], "excluded": [15],
            "broken": [], "one_way": [[14, 11]], "bad_links": [[-1, 15]],
        }
    ],
}  # fmt: skip


def test_a_network_as_a_picture():
    lines = answered("discover_network", NETWORK).readable(1).splitlines()
    assert lines[0] == "4 chips found on 1 tiles, 2 positions without a chip, 2 faults, 1.5 s"
    assert lines[2:4] == NETWORK["faults"]
    at = lines.index("io_group 1 tile 0: 4 of 6 chips (io_channel 1: 3, io_channel 2: 1)")
    assert lines[at + 1 : at + 4] == ["   11 =1-1-1", "       ^", "   14 =2 x ."]
    document = parsed(answered("discover_network", NETWORK)._repr_html_())
    assert len(document.getElementsByTagName("circle")) == 6 + 1  # chips, and the end of the link that hears


@pytest.mark.parametrize(
    "value",
    [
        {"counts": "none"},
        histogram(filled(a1=1)) | {"counts": np.zeros((2, 2))},
        histogram(filled(a1=1), seen=None),
        [1, 2],
        SCRIPT,
        None,
        {"values": np.zeros((2, 2)), "chips": []},
    ],
)
def test_another_form_is_shown_like_any_result(value):
    for action in ("adc_histogram", "pixel_map", "discover_network"):
        view = view_of(action, None)
        assert view.text(value)
        parsed(view.html(value))


def test_texts_are_escaped():
    answer = {
        "run": 7,
        SCRIPT: SCRIPT,
        "files": [SCRIPT, "red \x1b[31m"],
        "rows": [{"name": SCRIPT, "<b>": 1}, {"name": "\u202e", "<b>": 2}],
    }
    html = answered("run_info", answer)._repr_html_()
    parsed(html)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    status = Request("status", lambda: 0.0, lambda value: f"{value} {SCRIPT}\nnext")
    status.take(Response("result", value=1))
    assert status._repr_html_() == f"<pre>1 {SCRIPT}\nnext</pre>".replace(
        SCRIPT, "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;"
    )


@settings(max_examples=examples(60))
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    )
)
def test_any_value(value):
    for action in ("status", "adc_histogram", "pixel_map", "discover_network"):
        html = view_of(action, None).html(value)
        assert not set(re.findall(r"</?([a-zA-Z]+)", html)) - {"pre", "table", "tr", "th", "td", "div", "b"}


def test_tables():
    rows = np.zeros(100, np.dtype([("io_group", "u1"), ("rate", "<f8"), ("unused", "u1")]))
    rows["rate"] = np.arange(100)
    html = answered("packet_rate", {"run": 3, "rate": 5.0, "chips": rows, "none": rows[:0]})._repr_html_()
    document = parsed(html)
    tables = document.getElementsByTagName("table")
    heads = [[head.firstChild.data for head in table.getElementsByTagName("th")] for table in tables]
    assert heads[1] == ["io_group", "rate"]
    assert "… 80 more …" in html
    assert "chips</b> (100)" in html


def test_plain_values_are_shown_as_text():
    assert answered("state", "STOP")._repr_html_() is None
    assert answered("state", 5)._repr_html_() is None
    failed = Request("state", lambda: 0.0)
    failed.take(Response("error", error=RequestError("it broke")))
    assert failed._repr_html_() is None


def test_the_wait_for_both_forms_is_one(monkeypatch):
    monkeypatch.setattr("larpixdaq.control.client._SHOW", 0.2)
    waits = []
    request = Request("state", lambda: 0.0)
    monkeypatch.setattr(request, "_wait", lambda limit, timeout: waits.append(timeout) or original(limit, timeout))
    original = Request._wait.__get__(request)

    class Printer:
        def text(self, text):
            self.shown = text

    printer = Printer()
    request._repr_pretty_(printer, False)
    assert printer.shown == "<Request state: no answer yet>"
    waits.clear()
    assert request._repr_html_() is None
    assert set(waits) == {0.0}


def test_in_ipython_s_formatters():
    pytest.importorskip("IPython")
    from IPython.core.formatters import DisplayFormatter

    formatter = DisplayFormatter()
    formatter.active_types = list(formatter.formatters)
    data, _ = formatter.format(answered("adc_histogram", histogram(filled(a3=1))))
    assert set(data) == {"text/plain", "text/html"}
    assert "<svg" in data["text/html"]
    assert "1 data packets" in data["text/plain"]
    data, _ = formatter.format(answered("state", "STOP"))
    assert data == {"text/plain": "'STOP'"}


# Maps of pixels


def pixel_map(chips, values, **changes):
    table = np.array(chips, CHIPS)
    answer = {
        "run": 7,
        "quantity": "rate",
        "time": 1.0,
        "seen": 0.5,
        "chips": table,
        "values": np.asarray(values, np.uint8),
    }
    return answer | {"scale": {"low": 0.1, "high": 1000.0}} | changes


def test_a_map_as_text():
    values = np.zeros((3, 64), np.uint8)
    values[0, 5], values[1, 9] = 255, 1
    text = answered("pixel_map", pixel_map([(2, 1, 11), (1, 1, 12), (1, 1, 11)], values)).readable(1)
    lines = text.splitlines()
    assert lines[0].startswith(
        "run 7; rate; 3 chips, 2 channels with packets; from 0.1 to 1000 packets/s, logarithmic;"
    )
    assert lines[0].endswith("50.0% of the rows were seen")
    assert lines[2:] == ["io_group 1   | .|", "io_group 2   |@|"]


def test_a_map_of_a_large_detector_fits_on_a_screen():
    chips = [(group, channel, chip) for group in range(1, 9) for channel in range(1, 33) for chip in range(11, 36)]
    text = answered("pixel_map", pixel_map(chips, np.full((6400, 64), 100))).readable(1)
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) < 130


def test_a_map_as_a_picture():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 256, (50, 64)).astype(np.uint8)
    html = answered("pixel_map", pixel_map([(1, 1, chip) for chip in range(50)], values))._repr_html_()
    (image,) = parsed(html).getElementsByTagName("img")
    data = base64.b64decode(image.getAttribute("src").removeprefix("data:image/png;base64,"))
    assert np.array_equal(pixels_of(data), values.T)


def pixels_of(data):
    """Decode a PNG of one byte a pixel without filters."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    place, found = 8, {}
    while place < len(data):
        (size,) = struct.unpack_from(">I", data, place)
        name, content = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert struct.unpack_from(">I", data, place + 8 + size)[0] == zlib.crc32(name + content)
        found[name] = content
        place += 12 + size
    width, height = struct.unpack_from(">II", found[b"IHDR"])
    assert len(found[b"PLTE"]) == 3 * 256
    lines = np.frombuffer(zlib.decompress(found[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def test_a_terminal_without_utf_8_has_plain_bars(monkeypatch):
    class Stdout:
        encoding = "latin-1"

    monkeypatch.setattr(result_views.sys, "stdout", Stdout())
    text = view_of("adc_histogram", None).text(histogram(filled(a3=1)))
    monkeypatch.undo()
    assert "#" * 50 in text
    text.encode("latin-1")
