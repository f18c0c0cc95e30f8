"""Program of the online monitor: counts the newest blocks of all producers, and answers requests about them."""

import sys

if __spec__ is None:  # run by its path: its folder would hide the standard library's `operator`
    sys.path[0:1] = []

import argparse
import functools
import inspect
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import zmq

from larpixdaq import config
from larpixdaq.control.node import Call, Node
from larpixdaq.errors import LarpixDaqError
from larpixdaq.monitor.monitor import Monitor
from larpixdaq.monitor.sample_rate import SampleRate
from larpixdaq.protocol.control import Endpoint
from larpixdaq.protocol.packed_rows import PackedRows
from larpixdaq.protocol.reports import MonitorStatus
from larpixdaq.protocol.stream import Block, End, FromProducer
from larpixdaq.runtime.event_loop import Signals, run_main
from larpixdaq.stream import Consumer, jetstream

if TYPE_CHECKING:
    from larpixdaq.stream.downlink import Downlink

log = logging.getLogger("larpixdaq.run_data")  # __name__ is "__main__" in the process

DEFAULT_NAME: Final = "Online monitor"
#: Maximum number of frames of a turn, so that requests are answered in time.
TURN: Final = 64


class RunData:
    """Loop of the monitor. It receives in mode "latest": producers send as many blocks as it has time for."""

    def __init__(self, monitor: Monitor, node: Node, consumer: "Consumer | Downlink") -> None:
        self.monitor = monitor
        self.node = node
        self.consumer = consumer
        self._producers: dict[str, Endpoint] | None = None
        self._frames = 0
        self._sample_rate = SampleRate(len(os.sched_getaffinity(0)))
        self._counting = 0.0  # processor time for frames, s; requests are not in it, since a smaller sample saves none
        self._reported: set[tuple[str, int | None]] = set()

    def turn(self, *, requested: bool = True) -> None:
        """Run actions, connect to new producers, and count a limited number of frames.

        `requested`: the node's fileno() may be readable.
        """
        if requested:
            self.node.dispatch()
        if self.node.producers is not self._producers:
            self._producers = self.node.producers
            self.consumer.session = self.node.session
            self.consumer.connect(self._producers)
        began = time.thread_time()
        for _ in range(TURN):
            received = self.consumer.next()
            if received is None:
                break
            self._receive(*received)
            self._frames += 1
        self._counting += time.thread_time() - began
        self.node.report(self._frames, self.consumer.queued)
        now = time.monotonic()
        if self._sample_rate.due(now):
            self._sample_rate.measure(now, self._counting + self.consumer.processor_time(), *self.monitor.rows())
            self.consumer.sample(self._sample_rate.every)

    def run(self, signals: Signals) -> None:
        poller = zmq.Poller()
        for descriptor in (signals.fileno(), self.node.fileno(), self.consumer.fileno()):
            poller.register(descriptor, zmq.POLLIN)
        while not signals.stop:
            ready = dict(poller.poll(0 if self.consumer.queued else self.node.wait_ms()))
            self.turn(requested=self.node.fileno() in ready)

    def _receive(self, producer: str, frame: FromProducer, payload: memoryview | None, _: PackedRows | None) -> None:
        try:
            if isinstance(frame, Block):
                self.monitor.block(frame, payload)
            elif isinstance(frame, End):
                self.monitor.end(frame)
        except LarpixDaqError as error:
            if (producer, self.monitor.run) not in self._reported:
                self._reported.add((producer, self.monitor.run))
                log.warning("not counted: %s", error)
        # INFO messages need no credit
        if isinstance(frame, Block) and frame.text is None:
            self.consumer.add_credit(producer)


def actions(monitor: Monitor) -> dict[str, Callable[..., Any]]:
    """Return the handlers of all actions of a monitor."""

    def prepare_run(call: Call, run: int, kind: str, comment: str) -> dict[str, Any]:
        """Prepare a run: set all numbers to 0."""
        monitor.start(run, kind, comment)
        return {}

    def begin_run(call: Call, run: int) -> dict[str, Any]:
        """Begin the run."""
        if run != monitor.run:
            monitor.start(run)
        return {}

    def end_run(call: Call, run: int) -> MonitorStatus:
        """End the run. Its numbers stay until the next one is prepared, and later blocks of the run still count."""
        return monitor.status()

    handlers: dict[str, Callable[..., Any]] = {
        handler.__name__: handler for handler in (prepare_run, begin_run, end_run)
    }
    for method in (
        monitor.summary,
        monitor.packet_rate,
        monitor.pixel_map,
        monitor.pixel,
        monitor.adc_histogram,
        monitor.packets,
        monitor.messages,
        monitor.run_info,
    ):
        handlers[method.__name__] = _handler(method)
    return handlers


def _handler(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a handler with the call and the parameters of `method`, so that the node can check the parameters."""

    @functools.wraps(method)
    def handler(call: Call, /, **params: Any) -> Any:
        return method(**params)

    signature = inspect.signature(method)
    call_parameter = inspect.Parameter("call", inspect.Parameter.POSITIONAL_ONLY)
    vars(handler)["__signature__"] = signature.replace(parameters=[call_parameter, *signature.parameters.values()])
    return handler


def argument_parser() -> argparse.ArgumentParser:
    parser = config.ArgumentParser(
        prog="larpixdaq-run-data", description="Launch the data consumer providing the online data monitor"
    )
    config.add_component_arguments(parser, DEFAULT_NAME)
    jetstream.add_arguments(parser, "from whose streams the newest data are read, in place of the producers")
    return parser


def _consumer(name: str, node: Node, brokers: jetstream.Brokers | None) -> "Consumer | Downlink":
    if brokers is None:
        return Consumer(name, node.session, "latest", core=node)
    from larpixdaq.stream.downlink import Downlink  # late, because other monitors need no asyncio

    return Downlink(name, "latest", brokers)


def main(argv: list[str] | None = None) -> int:
    options = argument_parser().parse_args(argv)

    def work() -> None:
        brokers = jetstream.brokers_of(options)
        monitor = Monitor()
        node = Node(
            options.name,
            "run_data",
            options.core,
            actions(monitor),
            info={},
            status=monitor.status,
            module=options.module,
            insecure=options.insecure,
        )
        try:
            with Signals() as signals:
                node.connect(signals=signals)
                consumer = _consumer(options.name, node, brokers)
                try:
                    RunData(monitor, node, consumer).run(signals)
                finally:
                    consumer.close()
        finally:
            node.close()

    return run_main(work, log_level=options.log_level)


if __name__ == "__main__":
    sys.exit(main())
