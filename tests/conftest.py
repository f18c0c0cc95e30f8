"""What all tests have: a folder outside of the sources, so that what they start is the installed package; a core."""

import os
import signal
from collections.abc import Iterator

import pytest
from fake_core import core
from hypothesis import settings
from system import System, system

from larpixdaq.operator import Operator

# CI asks for the large profile. A busy computer takes its time for an example; how fast the code is, bench/ measures.
settings.register_profile("small", deadline=None, max_examples=25)
settings.register_profile("large", deadline=None, max_examples=100)
settings.load_profile(os.environ.get("LARPIXDAQ_HYPOTHESIS", "small"))

# Processes inherit what is ignored, as under nohup and behind a script's "&": the tests' ones would not hear it either.
for _ignored in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_ignored, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system for all tests of a file that kill nothing: each of them starts its own producer."""
    with system(tmp_path_factory.mktemp("system")) as made:
        yield made


@pytest.fixture
def running(tmp_path):
    """A core in a thread of this process, on a port of its own."""
    with core(tmp_path / "state") as running:
        yield running


@pytest.fixture
def operator(running):
    with Operator(running.address) as operator:
        yield operator
