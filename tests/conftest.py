"""Fixtures of all tests. They run in a folder outside of the sources, so that they start the installed package."""

import os
import signal
from collections.abc import Iterator

import pytest
from fake_core import core
from hypothesis import settings
from system import System, system

from larpixdaq.operator import Operator

# CI uses the fixed and large profiles, whose examples are the same in each run, so that a failure is that of the
# change. Examples have no deadline, because bench/ measures the speed.
settings.register_profile("small", deadline=None, max_examples=25)
settings.register_profile("fixed", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("large", deadline=None, max_examples=50, derandomize=True)
settings.load_profile(os.environ.get("LARPIXDAQ_HYPOTHESIS", "small"))

# Processes inherit ignored signals, for example under nohup or after a script's "&"; those of the tests must get them.
for _ignored in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_ignored, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("xdg"))  # where cores leave their connection files
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system that all tests of a file share. Each test starts its own producer and kills no other process."""
    with system(tmp_path_factory.mktemp("system")) as line:
        yield line


@pytest.fixture
def running(tmp_path):
    """A core in a thread of this process, on its own port."""
    with core(tmp_path / "state") as running:
        yield running


@pytest.fixture
def operator(running):
    with Operator(running.address) as operator:
        yield operator
