"""Numbers of random examples, as per cent of the number in the hypothesis profile."""

from hypothesis import settings


def examples(percent: int) -> int:
    """Return `percent` of the profile's number of examples, at least 1."""
    return max(1, settings.default.max_examples * percent // 100)
