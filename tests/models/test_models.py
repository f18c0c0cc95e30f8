"""Models of threads and shared memory, which Spin searches completely: all orders of their steps.

A model is worth as much as the mistakes that it finds. So each must find every mutation that is named here.
docs/reliability.md, section "Model", lists the properties. Spin is the Debian package `spin`.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

MUTATIONS = {
    "ring_reader": [
        "NO_PUSH_FENCE",
        "NO_CLAIM_FENCE",
        "CLAIM_LATE",
        "SLOT_BOUND",
        "NO_VIEW_FENCE",
        "NO_COPY_FENCE",
        "NO_SECOND_LOOK",
        "GIVE_BACK_WITHOUT_CLAIM",
    ],
    "producer_killed": [
        "HEAD_FIRST",
        "CHECKPOINT_IN_PLACE",
        "BEGIN_WITHOUT_CHECKPOINT",
        "ENTRY_IN_USE",
        "INFOS_IN_USE_ONLY",
        "GAPS_TWICE",
    ],
    "wake_up": ["NO_SECOND_LOOK", "WAKE_FIRST", "FLAG_FIRST", "KEEPS_OLD_FRAMES"],
}

pytestmark = pytest.mark.skipif(not shutil.which("spin"), reason="needs Spin (Debian package spin)")


def search(model: str, folder: Path, *macros: str) -> str:
    """Search all states of a model. Returns the summary, in which `errors: 0` says that all properties hold."""
    source = Path(__file__).with_name(f"{model}.pml")
    subprocess.run(["spin", *(f"-D{macro}" for macro in macros), "-a", source], cwd=folder, check=True, timeout=60)
    subprocess.run(["cc", "-w", "-DSAFETY", "-DVECTORSZ=4096", "-o", "pan", "pan.c"], cwd=folder, check=True)
    flags = ["-E"] if model == "producer_killed" else []  # what is killed stops anywhere; elsewhere that is a deadlock
    done = subprocess.run(
        ["./pan", "-m1000000", *flags], cwd=folder, check=True, capture_output=True, text=True, timeout=100
    )
    assert "max search depth too small" not in done.stdout
    return done.stdout


@pytest.mark.parametrize("model", MUTATIONS)
def test_all_properties_hold(model: str, tmp_path: Path) -> None:
    found = search(model, tmp_path)
    assert "errors: 0" in found, found


@pytest.mark.parametrize(("model", "macro"), [(model, macro) for model, found in MUTATIONS.items() for macro in found])
def test_each_mistake_is_found(model: str, macro: str, tmp_path: Path) -> None:
    found = search(model, tmp_path, macro)
    assert "errors: 1" in found, found
