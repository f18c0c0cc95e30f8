"""What storages say of the files that they have closed: it goes into the catalogue, and may say more about old runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec

from larpixdaq.control.catalogue import Catalogue, Run
from larpixdaq.control.peers import MOST_COMPONENTS, Component
from larpixdaq.control.reports import FinishedFile
from larpixdaq.errors import FileError
from larpixdaq.states import ENDED, INCOMPLETE, INTERRUPTED

_log = logging.getLogger("larpixdaq.core")


class Deliveries:
    """`take()` is for every heartbeat: it looks only at what is new in it."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._seen: dict[str, Any] = {}  # by storage, as it came

    def take(self, component: Component) -> list[Run]:
        """The runs that are over, and of which this storage now has more than it reported."""
        told = component.status.get("finished")
        before = self._seen.get(component.name)
        if not told or told == before:
            return []
        while len(self._seen) > MOST_COMPONENTS:
            del self._seen[next(iter(self._seen))]
        self._seen[component.name] = told
        try:
            files = msgspec.convert(told, list[FinishedFile])
            known = msgspec.convert(before or [], list[FinishedFile])
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            _log.error("%s: what it says of finished files is not understood: %s", component.name, error)
            return []
        runs: dict[int, Run] = {}
        for one in files:
            if one not in known and (run := self._new(component, one)) is not None:
                runs[run.run] = run
        return list(runs.values())

    def _new(self, component: Component, file: FinishedFile) -> Run | None:
        path = str(Path(str(component.info.get("directory", ""))) / file.file)
        try:
            new = self._catalogue.add_file(component.name, path, file.run, file.bytes, file.sha256, file.condition)
            run = self._catalogue.find(file.run) if new else None
        except FileError as error:
            _log.error("run %d: %s", file.run, error)
            return None
        if run is None or run.phase != ENDED or component.name not in run.storages:
            return None
        reported = {Path(one).name for one in run.reports.get(component.name, {}).get("files", [])}
        return run if may_say_more(run, component.name) or Path(path).name not in reported else None


def may_say_more(run: Run, storage: str) -> bool:
    """Whether a run that is over may turn out better once this storage is asked, or it never had its say."""
    open_question = run.condition in (INTERRUPTED, INCOMPLETE) or storage not in run.reports
    return run.phase == ENDED and storage in run.storages and open_question
