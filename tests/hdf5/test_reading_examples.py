"""The examples of docs/reading.md run as they stand there."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
from file_builder import Feed, data_rows, run_info

from larpixdaq.hdf5.writer import RunFile

PAGE = Path(__file__).resolve().parents[2] / "docs/reading.md"


def test_the_examples_run(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    feed, file = Feed(), RunFile(folder, run_info())
    assert file.final.name == "run0000042_20261122T071251Z_000.h5"
    file.add(*feed.info("Beginning run"))
    rows = data_rows(5000, 0, 1)
    rows["io_channel"] = 1
    file.add(*feed.block(rows))
    file.end(feed.end())
    file.close()
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(examples) == 4
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        for example in examples:
            exec(compile(example, str(PAGE), "exec"), names)
    printed = shown.getvalue().splitlines()
    assert printed[0].startswith("COMPLETE 5001 [")
    assert printed[1] == f"5000 {rows['dataword'].mean()}"
    assert len(names["hits"]) == np.count_nonzero(rows["chip_id"] == 11)
    assert len(names["adc"]) == np.count_nonzero(rows["channel_id"] < 32)
    assert "LArPix board 1 5000 0" in printed
