"""Run states, conditions and the times of the control plane: names that several processes must mean the same by."""

from __future__ import annotations

from typing import Final

STOP: Final = "STOP"
READY: Final = "READY"
RUN: Final = "RUN"
STATES: Final = (STOP, READY, RUN)

#: Kinds of components.
PRODUCER: Final = "producer"
RUN_DATA: Final = "run_data"
STORAGE: Final = "storage"
LOG: Final = "log"

# How far a run has come, as the catalogue says it. Written before the components are told, so that a core that died in
# between finds what it was about to do.
PREPARING: Final = "PREPARING"
BEGINNING: Final = "BEGINNING"
ENDING: Final = "ENDING"
#: Also READY and RUN; these two are over.
ENDED: Final = "ENDED"
CANCELLED: Final = "CANCELLED"

# The condition of a run. RUNNING until it has ended.
RUNNING: Final = "RUNNING"
COMPLETE: Final = "COMPLETE"
#: Everything that reached us is stored, but at the board's side there was a gap.
SUSPECT: Final = "COMPLETE, suspect"
INCOMPLETE: Final = "INCOMPLETE"
INTERRUPTED: Final = "INTERRUPTED"
ABORTED: Final = "ABORTED"
#: From best to worst.
CONDITIONS: Final = (COMPLETE, SUSPECT, INCOMPLETE, INTERRUPTED, ABORTED)

#: Actions of components that only look; all others need control.
LOOKING: Final = frozenset(
    {
        *("list_routines", "packet_rate", "packets", "messages", "adc_histogram", "run_info"),
        *("board_status", "get_boards", "ping", "retrieve_configuration", "retrieve_pixel_layout"),
    }
)
#: Actions of components that only the core itself may ask for.
RUN_ACTIONS: Final = frozenset({"prepare_run", "begin_run", "end_run", "abort_run", "cancel_run", "report_run"})

# Seconds.
HEARTBEAT: Final = 0.25
#: Unheard for this long: lost.
LOST: Final = 1.0
#: Work is queued and progress has not moved for this long: stuck.
STUCK: Final = 1.0
#: An operator who has vanished gives control back after this.
CONTROL_FREE: Final = 5.0
#: A name that still counts as living, or a core that does not answer, is tried again for this long.
PATIENCE: Final = 5.0
#: A core unheard for this long is no core, for an Operator.
NO_CORE: Final = 2.0

#: Storages must have at least this much room on their disk when a run is prepared, bytes.
MIN_FREE: Final = 64 << 20


def worst(*conditions: str) -> str:
    """The worst of these conditions; one that nobody knows counts as INTERRUPTED."""
    known = [one if one in CONDITIONS else INTERRUPTED for one in conditions]
    return max(known, key=CONDITIONS.index)


def best(*conditions: str) -> str:
    """The best of these conditions (several storages are several copies)."""
    known = [one if one in CONDITIONS else INTERRUPTED for one in conditions]
    return min(known, key=CONDITIONS.index)
