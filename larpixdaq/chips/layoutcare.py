"""What an Operator can ask of pixel layouts: load one, and tell where the channels of chips are."""

from __future__ import annotations

from typing import Any, Final

from larpixdaq.chips import layouts
from larpixdaq.chips.layouts import Layout
from larpixdaq.errors import RequestError

#: Channels of one answer, at most. It goes through the producer's loop: that many take it some 0.1 s.
_MOST_CHANNELS: Final = 500_000


class LayoutCare:
    """Mixed into `actions.Actions`. A layout is read again when it is first needed after the child before has ended."""

    def __init__(self, name: str) -> None:
        """`name`: what was loaded last; "" for nothing."""
        self.layout_name = name
        self._layout: Layout | None = None

    def layout(self) -> Layout:
        """The layout that was loaded last; RequestError when there is none."""
        if self._layout is None:
            if not self.layout_name:
                raise RequestError("no pixel layout is known yet: load_pixel_layout(name) loads one")
            self._layout = layouts.read(self.layout_name)
        return self._layout

    def load_pixel_layout(self, name: Any) -> dict[str, Any]:
        if not isinstance(name, str) or not name:
            raise RequestError(f"load_pixel_layout: expected the name of a layout file, found {name!r:.100}")
        self._layout = layouts.read(name)
        self.layout_name = name
        return self._layout.summary()

    def retrieve_pixel_layout(self, chip: Any = None) -> dict[str, Any]:
        layout = self.layout()
        asked = chip if isinstance(chip, list) and not (chip and isinstance(chip[0], int)) else [chip]
        chips = list(layout.chips) if chip is None else list(dict.fromkeys(map(layout.find, asked)))
        channels = sum(map(layout.channels, chips))
        if channels > _MOST_CHANNELS:
            raise RequestError(
                f"retrieve_pixel_layout: {channels} channels of {len(chips)} chips; "
                f"one answer has {_MOST_CHANNELS} at most: name fewer chips"
            )
        return layout.summary() | {"channels": {one: layout.described(one) for one in chips}}
