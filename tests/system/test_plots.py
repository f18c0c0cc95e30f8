"""Pictures of runs, and their hot and dead channels: from the command line, with the texts of the axes, of nonsense."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest
import yaml
from file_builder import V1, V3, Feed, board, data_rows, run_info, timed, two_boards, write
from matplotlib.text import Text
from processes import LIMIT, until

from larpixdaq import cli, plots
from larpixdaq.errors import FileError
from larpixdaq.hardware import pixel_layout, register_map
from larpixdaq.hdf5 import hot_channels
from larpixdaq.hdf5.run_summary import summarise
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol import stream


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run of two boards for 10 s, of which channel 1-3-11-5 is hot, and 2-3-12-7 becomes silent after 5 s."""
    return a_run(tmp_path_factory.mktemp("good"))


def a_run(directory, rate=3000, run=42, comment="cosmics, $threshold_20$ \x1b[31m", **info):
    feeds = two_boards() if run == 42 else {1: Feed(run=run, epoch=1)}
    file = RunFile(directory, run_info(run=run, comment=comment, **info))
    for piece in range(100):
        begin = piece / 10
        for io_group, feed in feeds.items():
            rows = data_rows(rate // 10, begin, begin + 0.1, io_group=io_group, seed=2 * piece + io_group)
            silent = (rows["io_group"] == 2) & (rows["chip_id"] == 12) & (rows["channel_id"] == 7) & (piece >= 50)
            rows["channel_id"][silent] = 8
            never = (rows["io_group"] == 2) & (rows["chip_id"] == 12) & (rows["channel_id"] == 9)
            rows["channel_id"][never] = 8
            if io_group == 1:
                rows["chip_id"][:60], rows["channel_id"][:60] = 11, 5
            rows["valid_parity"][-1] = 0
            rows["local_fifo"][-2:] = 3
            file.add(*timed(*feed.block(rows), begin, begin + 0.1))
            sync = np.zeros(1, rows.dtype)
            sync["io_group"], sync["packet_type"], sync["trigger_type"] = io_group, 6, 72
            sync["timestamp"], sync["direction"] = round((begin + 0.1) * 1e7), 1
            if piece % 20 == 19:
                file.add(*timed(*feed.block(sync), begin + 0.1, begin + 0.1))
    for feed in feeds.values():
        file.end(feed.end())
    return file.close().path


def run(*arguments):
    """Run the command. Returns exit status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as error:  # of argparse
            status = error.code
    return status, out.getvalue(), err.getvalue()


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_axes_have_names_and_units(good):
    found = texts(plots.figure([summarise(good)]))
    for expected in (
        "packets per second from each io_group",
        "packets/s, means of 0.2 s",
        "io_group 1: 30,000 packets",
        "ADC value [ADC counts]",
        "data packets read",
        "standard deviation [ADC counts]",
        "data packets/s",
        "chip (io_group-io_channel-chip_id)",
        "clock of each io_group less the hosts' clock",
        "difference modulo 429.497 s [ms]",
        "step [s of 10 MHz ticks]",
        "interval [s of 10 MHz ticks]",
        "packets with wrong parity",
        "fraction",
    ):
        assert expected in found
    assert any(text.startswith("time since 2026-11-22 07:12:51 UTC [s]") for text in found)
    heading = next(text for text in found if text.startswith("run 42 (test), COMPLETE"))
    assert "all 60,010 rows were read" in heading
    assert "cosmics, $threshold_20$ \\x1b[31m" in heading  # neither a formula nor a control character
    quality = next(text for text in found if text.startswith("condition COMPLETE"))
    assert "io_group 2: 30,000 packets read, 100 with wrong parity, 200 with a full FIFO" in quality
    assert "the ledger knows of no loss" in quality
    sync = next(text for text in found if "(heartbeat)" in text)
    assert "io_group 1: 5 words (heartbeat), intervals 2 to 2 s, mean 2 s" in sync


def test_lines_are_the_numbers_of_the_summary(good):
    summary = summarise(good)
    figure = plots.figure([summary], ["rates"])
    (axes,) = figure.axes
    drawn = [patch.get_data() for patch in axes.patches]
    assert len(drawn) == 2
    for stairs, rates in zip(drawn, summary.rates.T, strict=True):
        np.testing.assert_array_equal(stairs.values, rates)
        np.testing.assert_allclose(stairs.edges, summary.edges - summary.start)
    assert axes.get_ylim()[0] == 0


def test_a_sample_is_said_to_be_one(tmp_path):
    file, feeds = RunFile(tmp_path, run_info()), two_boards()
    board(file, feeds, 10.0, 20_000)
    for feed in feeds.values():
        file.end(feed.end())
    path = file.close().path
    found = texts(plots.figure([summarise(path, rows=100_000)], ["rates", "sync"]))
    assert any("of 600,000 rows were read, evenly chosen (" in text for text in found)
    assert any("only where all rows between two of them were read" in text for text in found)


def test_losses_are_told_with_their_places(tmp_path):
    file, feed = RunFile(tmp_path, run_info()), Feed()
    file.add(*timed(*feed.block(data_rows(500, 0, 1)), 0, 1))
    unknown = [stream.UnknownWord(1, 5, 1, b"0123456789abcdef")]
    lost = [stream.LossVerdict(1, "lost", "messages were too large", 9, 0, 0)]
    file.end(feed.end(unknown=unknown, counts={1: {"dropped": 1070, "unknown_words": 3}}, verdicts=lost))
    found = texts(plots.figure([summarise(file.close().path)], ["quality"]))
    lines = next(text for text in found if text.startswith("condition INCOMPLETE")).splitlines()
    assert "ring and spool, io_group 1: 1,070 rows (dropped)" in lines
    assert "decoder, io_group 1: 3 words (unknown words)" in lines
    assert "board and network, io_group 1: at least 9 packets (lost)" in lines
    assert "unknown words kept: 1 of unknown word type" in lines
    assert any("messages were too large" in line for line in lines)


def test_two_runs_side_by_side_have_the_same_scales(tmp_path, good):
    other = summarise(a_run(tmp_path, rate=6000, run=43, comment="hot"))
    figure = plots.figure([summarise(good), other], ["rates", "adc"])
    first, second = (next(a for a in panel.axes if "packets/s" in a.get_ylabel()) for panel in panels(figure)[:2])
    assert first.get_ylim() == second.get_ylim()
    assert first.get_ylim()[1] > 6000
    found = texts(figure)
    assert any(text.startswith("run 42") for text in found)
    assert any(text.startswith("run 43") for text in found)


def panels(figure):
    """Return the panels of a figure, without its heading, in the order of their lines."""
    _, below = figure.subfigs
    return below.subfigs


LAYOUT = {
    "pixels": [[8 * row + column, 4.4 * column, 4.4 * row] for row in range(8) for column in range(8)],
    "chips": [[11, list(range(64))]],
    "x": 0,
    "y": 0,
    "width": 36,
    "height": 36,
}


def test_pixels_are_at_their_places(tmp_path, good):
    (tmp_path / "layout-2.4.0.yaml").write_text(yaml.safe_dump(LAYOUT))
    layout = pixel_layout.read(str(tmp_path / "layout-2.4.0.yaml"))
    summary = summarise(good)
    figure = plots.figure([summary], ["pixels"], layout)
    rates, means = (axes for axes in figure.axes if axes.images)
    assert (rates.get_xlabel(), rates.get_ylabel()) == ("x [mm]", "y [mm]")
    image = np.asarray(rates.images[0].get_array())
    expected = summary.channel_rates()
    # Channel 5 of chip 11, which both boards have, is in the sixth column of the first line; the last board is drawn.
    chips = summary.chips["chip_id"] == 11
    assert image[0, 5] in expected[chips, 5]
    assert image.shape == (8, 8)
    assert means.get_title() == "mean [ADC counts]"
    assert any("2 chips of the run are not drawn" in text for text in texts(figure))
    tiles = {
        "pixel_pitch": 4,
        "chip_channel_to_position": {1000 * chip + i: [i % 8 + chip - 11, i // 8] for chip in (11,) for i in range(64)},
        "tile_chip_to_io": {1: {11: 1003}, 2: {11: 2003}},
        "tile_positions": {1: [-300, 0, 0], 2: [300, 0, 0]},
        "tile_orientations": {1: [1, 1, 1], 2: [1, 1, 1]},
    }
    figure = plots.figure([summary], ["pixels"], pixel_layout.parse(tiles, "two.yaml", "two.yaml"))
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert titles == [f"{name}, z = {z} mm" for name in ("data packets/s", "mean [ADC counts]") for z in (-300, 300)]


# The command


def test_pictures_of_each_kind_and_format(tmp_path, good):
    status, out, err = run("plot", good, "-o", tmp_path / "all.png")
    assert (status, err) == (0, "")
    assert out.strip() == f"{tmp_path}/all.png: rates, adc, pixels, timestamps, sync, quality"
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert run("plot", good, "-o", tmp_path / "two.pdf", "--kind", "sync", "--kind", "adc")[0] == 0
    content = (tmp_path / "two.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert content.count(b"/Type /Page ") + content.count(b"/Type /Page\n") == 2
    # Nothing is overwritten silently, and a refused command leaves the picture as it was.
    status, out, err = run("plot", good, "-o", tmp_path / "two.pdf")
    assert (status, out) == (1, "")
    assert f"{tmp_path}/two.pdf: exists already" in err
    assert (tmp_path / "two.pdf").read_bytes() == content
    assert run("plot", good, "-o", tmp_path / "two.pdf", "--kind", "adc", "--overwrite")[0] == 0
    assert (tmp_path / "two.pdf").read_bytes() != content


def test_the_default_name_is_that_of_the_run(tmp_path, good, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", str(good), "--kind", "rates"]) == 0
    assert capsys.readouterr().out == "run0000042.pdf: rates\n"
    assert (tmp_path / "run0000042.pdf").exists()


@pytest.mark.parametrize("layout", [V1, V3], ids=lambda layout: layout.name)
def test_other_chips(tmp_path, layout):
    path = write(tmp_path, Feed(layout=layout), [20_000])[0].path
    plots.save([summarise(path)], tmp_path / "picture.png")
    found = texts(plots.figure([summarise(path)]))
    assert "ADC value [ADC counts]" in found


def test_a_run_without_packets(tmp_path):
    file, feed = RunFile(tmp_path, run_info()), Feed()
    file.add(*feed.info("Beginning run"))
    file.end(feed.end())
    path = file.close().path
    found = texts(plots.figure([summarise(path)]))
    for expected in ("no packets", "no data packets", "no steps", "no SYNC words were read"):
        assert expected in found
    status, out, _ = run("hot", path, "--dead")
    assert status == 0
    assert "0 channels with data packets\n0 hot channels\n0 dead channels" in out
    assert run("plot", path, "-o", tmp_path / "nothing.png")[0] == 0
    empty = RunFile(tmp_path, run_info(run=43)).close().path
    assert run("plot", empty, "-o", tmp_path / "empty.png", "--compare", path)[0] == 0
    status, _, err = run("hot", empty)
    assert status == 1
    assert "the times of its rows are not known" in err


def test_nonsense(tmp_path, good):
    content = good.read_bytes()
    (tmp_path / "empty.h5").write_bytes(b"")
    (tmp_path / "cut.h5").write_bytes(content[: len(content) // 2])
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["temperature"] = np.arange(5.0)
    for name in ("empty.h5", "cut.h5", "other.h5", "absent.h5"):
        for command in (["plot", "-o", tmp_path / "picture.png"], ["hot"]):
            status, out, err = run(*command, tmp_path / name)
            assert (status, out) == (1, ""), name
            assert err.count("\n") == 1
            assert name in err
    assert not (tmp_path / "picture.png").exists()
    status, _, err = run("plot", good, "-o", tmp_path / "picture.jpg")
    assert status == 2
    assert "expected a name that ends in .png or .pdf" in err
    status, _, err = run("plot", good, "-o", tmp_path / "no such folder" / "picture.png")
    assert status == 1
    assert "cannot be written: No such file or directory" in err
    status, _, err = run("plot", good, "-o", tmp_path / "p.png", "--layout", "no_layout.yaml")
    assert status == 1
    assert "no_layout.yaml" in err
    status, _, err = run("plot", "7", "--state-dir", tmp_path / "state", "-o", tmp_path / "p.png")
    assert status == 1
    assert err.count("\n") == 1
    for wrong in (["--rows", "-1"], ["--kind", "colours"], ["--factor", "nan"]):
        assert run("hot" if "--factor" in wrong else "plot", good, *wrong)[0] == 2
    assert run("plot", good, "")[0] == 2


def test_a_picture_that_cannot_be_written_leaves_no_file(tmp_path, good):
    """A full disk, and standard output that nobody reads."""
    full = "/dev/full"
    if os.path.exists(full):
        os.symlink(full, tmp_path / "picture.png")
        with pytest.raises(FileError, match="cannot be written: No space left on device"):
            plots.save([summarise(good)], tmp_path / "picture.png", kinds=["rates"], overwrite=True)
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "larpixdaq", "hot", str(good), "--above", "1"]
    done = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(written)
    assert (done.returncode, done.stderr) == (1, b"")
    with open(full, "wb", buffering=0) as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == 1
    assert b"cannot write to standard output: No space left on device" in done.stderr


def test_matplotlib_is_imported_for_pictures_alone(good):
    code = (
        "import sys; from larpixdaq import cli; status = cli.main(['hot', sys.argv[1]]); "
        "assert 'matplotlib' not in sys.modules; sys.modules['matplotlib'] = None; "
        "sys.exit(10 * status + cli.main(['plot', sys.argv[1], '-o', 'x.png']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(good)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert 'pip install "larpix-daq[plot]"' in done.stderr


# Hot and dead channels


def test_hot_and_dead_channels(good):
    status, out, _ = run("hot", good, "--dead", "--json")
    assert status == 0
    facts = json.loads(out)
    (hot,) = facts["hot"]
    assert hot["key"] == "1-3-11-5"
    summary = summarise(good)
    expected = summary.channel_rates()[0, 5]
    assert hot["rate"] == pytest.approx(expected)
    assert hot["low"] < expected < hot["high"]
    assert hot["low"] > hot["compared"]
    assert hot["stretches"] == 64
    silent = {dead["key"]: dead for dead in facts["dead"]}
    assert silent.keys() == {"2-3-12-9", "2-3-12-7"}
    assert silent["2-3-12-9"]["packets"] == 0
    assert silent["2-3-12-7"]["last"] == pytest.approx(summary.start + 5, abs=0.3)
    assert facts["seen"] == 1.0
    status, out, _ = run("hot", good, "--above", "600")
    assert status == 0
    assert "0 hot channels" in out
    status, out, _ = run("hot", good, "--above", "100", "--dead")
    assert "1 hot channels:" in out
    assert "above 100 packets/s" in out
    assert "silent since 2026-11-22 07:12:5" in out


def test_masked_channels_and_silent_chips(tmp_path):
    """Those of a run whose chips were configured: channel 9 of chip 1-3-12 is masked, channel 8 dead, 1-3-99 silent."""
    feed, file = Feed(), RunFile(tmp_path, run_info(asic_version="2"))
    chips = np.array([[1, 3, chip] for chip in (11, 12, 99)], np.uint8)
    registers = register_map.ChipRegisters("2")
    values = np.zeros((3, stream.REGISTERS), np.uint8)
    values[:, : registers.count] = registers.defaults
    mask = [0] * 64
    mask[9] = 1
    registers.change(values[1:2, : registers.count], {"channel_mask": mask})
    known = np.full(values.shape, stream.SENT | stream.READ, np.uint8)
    configs = stream.Configurations("2", chips, values, values, known)
    info, rows = feed.info(configs.text())
    file.add(msgspec.structs.replace(info, configs=configs.pack()), rows)
    for piece in range(100):
        rows = data_rows(1000, piece / 10, piece / 10 + 0.1, seed=piece)
        quiet = (rows["chip_id"] == 12) & ((rows["channel_id"] == 8) | (rows["channel_id"] == 9))
        rows["channel_id"][quiet] = 10
        file.add(*timed(*feed.block(rows), piece / 10, piece / 10 + 0.1))
    file.end(feed.end())
    path = file.close().path
    facts = json.loads(run("hot", path, "--dead", "--json")[1])
    assert [dead["key"] for dead in facts["dead"]] == ["1-3-12-8"]
    assert (facts["masked"], facts["silent_chips"]) == (1, ["1-3-99"])
    out = run("hot", path, "--dead")[1]
    assert "1 channels were masked" in out
    assert "1 chips were configured and sent no data packet: 1-3-99" in out


def test_chance_names_no_channel():
    """Poisson numbers of 10^4 channels with one rate, near the threshold and far below."""
    rng = np.random.default_rng(2)
    counts = rng.poisson(20.0, 100_000)
    level = hot_channels.FALSE / len(counts)
    assert not (hot_channels._lower_limit(counts, level) > 20.0).any()
    assert not (hot_channels._upper_limit(counts, level) < 20.0).any()
    assert (hot_channels._lower_limit(rng.poisson(100.0, 1000), level) > 20.0).all()
    np.testing.assert_array_equal(hot_channels._lower_limit(np.zeros(1), level), 0)


def test_limits_are_those_of_poisson():
    """Exact limits by summing probabilities."""
    for count in (1, 3, 10, 100, 1000):
        for level in (0.05, 1e-3, 1e-7):
            low = float(hot_channels._lower_limit(np.array([count]), level)[0])
            high = float(hot_channels._upper_limit(np.array([count]), level)[0])
            if low > 0.1:
                assert level / 5 < at_least(count, low) < 1.5 * level
            assert level / 5 < 1 - at_least(count + 1, high) < 1.5 * level


def at_least(count, mean):
    """Return the probability of `count` or more at this Poisson mean."""
    k = np.arange(0, 3000)
    logs = k * np.log(mean) - mean - np.concatenate(([0.0], np.cumsum(np.log(k[1:]))))
    return float(np.exp(logs[count:]).sum())


# A run in progress, by its number


def test_a_run_by_its_number(line, tmp_path):
    operator = line.start("--fake", "20000", "--io-groups", "2")
    number = operator.prepare_run(comment="pictures").result(LIMIT)["run"]
    operator.begin_run().result(LIMIT)

    state = ("--state-dir", line.folder / "state")
    status, _, err = run("plot", number, *state)
    assert status == 1
    assert f"the files of run {number} are not in the catalogue before it ends" in err
    (part,) = line.data.glob(f"run{number:07d}*.part")

    def drawn():
        status, _, err = run("plot", part, "-o", tmp_path / "now.png", "--overwrite", "--kind", "rates")
        assert status == 0, err
        return summarise(part).io_groups["packets"].sum() > 0

    until(drawn, "a picture of the growing file with packets")
    assert summarise(part).condition == "RUNNING"
    operator.end_run().result(LIMIT)
    status, out, err = run("plot", number, *state, "-o", tmp_path / "after.pdf")
    assert (status, err) == (0, "")
    assert "after.pdf: rates" in out
    status, out, _ = run("hot", number, *state, "--json")
    assert status == 0
    assert json.loads(out)["run"] == number


def test_the_plot_of_the_documentation(good, monkeypatch):
    """That of docs/extending.md."""
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (code,) = re.findall(r"^```python\n(# of larpixdaq/plots.py\n.*?)^```$", text, re.M | re.S)
    names = dict(vars(plots))
    exec(compile(code, "extending.md", "exec"), names)
    monkeypatch.setitem(plots._PANELS, "hits", names["_hits"])
    summary = summarise([good])
    assert f"{int(summary.packets.sum()):,} data packets of {len(summary.chips)} chips" in texts(
        plots.figure([summary], ["hits"])
    )
