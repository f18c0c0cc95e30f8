"""What a storage before this one has left in its directory."""

from __future__ import annotations

import logging
from pathlib import Path

from larpixdaq.errors import FileError, FileLocked
from larpixdaq.files import names
from larpixdaq.files.positions import unfinished
from larpixdaq.files.recover import prepare
from larpixdaq.storing.finishing import Finisher

log = logging.getLogger(__name__)


def take_up(directory: Path, storage: str, finisher: Finisher) -> list[int]:
    """Have the parts recovered that were being written, and see to it that finished files of runs that may go on have
    their sidecars; the numbers of these runs. Older files are left alone: there may be thousands.

    Parts say from now on where their sources stand; the recovery itself, which reads every row, is the finisher's.
    FileError when the directory cannot be read; what is wrong with a file goes to the log.
    """
    going_on = unfinished(directory, storage)
    for path in names.parts(directory, storage):
        try:
            found = prepare(path)
        except FileLocked as error:  # a recovery by hand, or a reader that looks whether the part is being written
            log.warning("%s", error)
            finisher.mend(path, str(error))
        except FileError as error:
            log.error("%s", error)
            finisher.mend(path, str(error))
        else:
            if found is None:
                finisher.mend(path)
            else:
                log.log(logging.ERROR if found.damaged else logging.WARNING, "%s", found.text)
    for run in going_on:
        for _, _, ending, path in names.parts_of(directory, storage, run):
            if ending == names.FINISHED:
                finisher.adopt(path)
    return going_on
