"""Steps of the wall clock by an hour during a run, ahead and back, have no effect on the run."""

import time
from contextlib import closing
from datetime import datetime
from pathlib import Path

import h5py
import numpy as np
import pytest
from processes import LIMIT, until
from system import system
from wall_clock import Clock

from larpixdaq.hdf5.verify import verify

RATE = 20_000


def test_steps_of_the_wall_clock_do_not_disturb_a_run(tmp_path: Path) -> None:
    with closing(Clock(tmp_path)) as wall, system(tmp_path) as line:
        line.env = dict.fromkeys(("core", "log", "offline_storage", "run_data", "producer"), wall.env)
        line.launch_core()
        line.launch_log()
        line.launch_storage()
        line.launch_monitor()
        line.launch_producer("--fake", str(RATE))
        operator = line.operator()
        line.await_kinds(operator, "log", "storage", "run_data", "producer")
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)

        def taken() -> int:
            return int(line.status_of(operator, "producer").get("packets", 0))

        def alive() -> list[tuple[str, bool]]:
            return [(component["name"], component["alive"]) for component in operator.components().result(LIMIT)]

        until(lambda: taken() > RATE, "a second of packets")
        before = alive()
        operator.take_control().result(LIMIT)
        for step in (3600, -3600):  # from the right time
            wall.step(step)
            stepped_at = taken()
            until(lambda at=stepped_at: taken() > at + 2 * RATE, "two seconds of packets after the step")
            rates = operator.packet_rate(channels=False).result(LIMIT)
            # The run lasts seconds. If the step counted, the mean rate would be a thousandth of this, or negative.
            assert 0 < rates["seconds"] < 600
            assert rates["mean_rate"] > RATE / 20
            assert rates["rate"] > RATE / 20
            assert rates["io_groups"]["mean_rate"].sum() == pytest.approx(rates["mean_rate"])
            assert alive() == before
            assert operator.status().result(LIMIT)["control"] is not None
        ended = operator.end_run().result(2 * LIMIT)
        assert (ended["condition"], ended["reasons"]) == ("COMPLETE", [])
        log = (tmp_path / "state" / "log.txt").read_text()
        assert " is lost" not in log
        last = datetime.fromisoformat(log.splitlines()[-1].split()[0].replace("Z", "+00:00"))
        assert last.timestamp() - time.time() == pytest.approx(step, abs=600), "the clock was not stepped"
    (path,) = ended["files"]
    assert verify(Path(path)).ok, verify(Path(path)).findings
    with h5py.File(path, "r") as file:
        times = file["run/blocks"]["first_ns"].astype(np.int64)
        assert (np.diff(times) >= 0).all()
        assert times[-1] - times[0] < 600e9
