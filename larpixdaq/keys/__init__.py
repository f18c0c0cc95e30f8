"""Keys of CURVE: who may connect to a socket, the core's store of keys, and where a process finds its own key."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

#: A public or secret key as Z85 text, 40 characters.
Key = Annotated[str, Meta(min_length=40, max_length=40, pattern=r"^[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]+$")]
