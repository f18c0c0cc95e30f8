"""Inputs that bench/fuzz.py has found: each kind of them once more, in tests/corpus/TARGET."""

from pathlib import Path

import fuzz_targets
import pytest

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
CHECKS = {name: check for group in fuzz_targets.TARGETS.values() for name, check in group.items()}


def test_every_target_has_a_corpus():
    assert {path.name for path in CORPUS.iterdir()} == CHECKS.keys()


@pytest.mark.parametrize("target", CHECKS)
def test_the_corpus(target):
    inputs = sorted((CORPUS / target).iterdir())
    assert inputs
    for path in inputs:
        print(path.name)  # a sanitizer ends the process
        CHECKS[target](path.read_bytes())


@pytest.mark.parametrize("group", fuzz_targets.SEEDS)
def test_the_seeds(group):
    """The inputs from which a search begins; most pass the first checks of their target."""
    for target, seeds in fuzz_targets.SEEDS[group]().items():
        for seed in seeds:
            CHECKS[target](seed)
