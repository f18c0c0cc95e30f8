"""The online monitor: looks at the newest blocks of all producers and answers what a shifter asks."""

import sys

if __spec__ is None:  # run by its path: its folder would shadow the standard library's `operator`
    sys.path[0:1] = []

import argparse
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, Final

import zmq

from larpixdaq import config
from larpixdaq.control.node import Call, Node
from larpixdaq.errors import LarpixDaqError
from larpixdaq.monitor.monitor import Monitor
from larpixdaq.protocol.reports import MonitorStatus
from larpixdaq.protocol.stream import Block, End, FromProducer
from larpixdaq.runtime.event_loop import Signals, run_main
from larpixdaq.stream import Consumer

log = logging.getLogger(__name__)

DEFAULT_NAME: Final = "Online monitor"
#: Frames dealt with before actions have their turn again.
TURN: Final = 64


class RunData:
    """Feeds the monitor from the stream, mode "latest": what it has no time for is skipped, and nobody waits for it."""

    def __init__(self, monitor: Monitor, node: Node, consumer: Consumer) -> None:
        self.monitor = monitor
        self.node = node
        self.consumer = consumer
        self._producers: dict[str, str] | None = None
        self._frames = 0
        self._complained: set[tuple[str, int | None]] = set()

    def turn(self) -> None:
        """What there is to do now: actions, changes of the producers, and a bounded number of frames."""
        self.node.dispatch()
        if self.node.producers is not self._producers:
            self._producers = self.node.producers
            self.consumer.session = self.node.session
            self.consumer.connect(self._producers)
        for _ in range(TURN):
            received = self.consumer.next()
            if received is None:
                break
            self._receive(*received)
            self._frames += 1
        self.node.report(self._frames, self.consumer.queued)

    def run(self, signals: Signals) -> None:
        """Turn until a signal comes."""
        poller = zmq.Poller()
        for descriptor in (signals.fileno(), self.node.fileno(), self.consumer.fileno()):
            poller.register(descriptor, zmq.POLLIN)
        while not signals.stop:
            poller.poll(0 if self.consumer.queued else self.node.wait_ms())
            self.turn()

    def _receive(self, producer: str, frame: FromProducer, payload: memoryview | None) -> None:
        try:
            if isinstance(frame, Block):
                self.monitor.block(frame, payload)
            elif isinstance(frame, End):
                self.monitor.end(frame)
        except LarpixDaqError as error:
            # Once a run and producer: the same again would help nobody.
            if (producer, self.monitor.run) not in self._complained:
                self._complained.add((producer, self.monitor.run))
                log.warning("not counted: %s", error)
        # INFO messages come beside the credit.
        if isinstance(frame, Block) and frame.text is None:
            self.consumer.add_credit(producer)


def actions(monitor: Monitor) -> dict[str, Callable[..., Any]]:
    """The handlers of everything that core and operators may ask of a monitor."""

    def prepare_run(call: Call, run: int, kind: str, comment: str) -> dict[str, Any]:
        """A run is being prepared: all numbers start afresh."""
        monitor.start(run, kind, comment)
        return {}

    def begin_run(call: Call, run: int) -> dict[str, Any]:
        """The run begins."""
        if run != monitor.run:
            monitor.start(run)
        return {}

    def end_run(call: Call, run: int) -> MonitorStatus:
        """The run is over; its numbers stay until the next is prepared, and what is still on its way counts."""
        return monitor.status()

    handlers: dict[str, Callable[..., Any]] = {
        handler.__name__: handler for handler in (prepare_run, begin_run, end_run)
    }
    for method in (monitor.packet_rate, monitor.packets, monitor.messages, monitor.adc_histogram, monitor.run_info):
        handlers[method.__name__] = _handler(method)
    return handlers


def _handler(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` as a handler: with the call in front, and its own parameters, so that the node can check them."""

    @functools.wraps(method)
    def handler(call: Call, /, **params: Any) -> Any:
        return method(**params)

    signature = inspect.signature(method)
    first = inspect.Parameter("call", inspect.Parameter.POSITIONAL_ONLY)
    vars(handler)["__signature__"] = signature.replace(parameters=[first, *signature.parameters.values()])
    return handler


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="larpixdaq-run-data", description="Launch the data consumer providing the online data monitor"
    )
    config.add_component_arguments(parser, DEFAULT_NAME)
    options = parser.parse_args(argv)

    def work() -> None:
        monitor = Monitor()
        node = Node(options.name, "run_data", options.core, actions(monitor), info={}, status=monitor.status)
        try:
            with Signals() as signals:
                node.connect(signals=signals)
                consumer = Consumer(options.name, node.session, "latest", core=node)
                try:
                    RunData(monitor, node, consumer).run(signals)
                finally:
                    consumer.close()
        finally:
            node.close()

    return run_main(work)


if __name__ == "__main__":
    sys.exit(main())
