"""How many examples hypothesis takes, and how often other tests try what chance decides: as the profile says."""

from hypothesis import settings


def examples(percent: int) -> int:
    """Return `percent` of the number of examples that the profile has, and at least 1."""
    return max(1, settings.default.max_examples * percent // 100)
