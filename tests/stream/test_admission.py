"""Which consumers may subscribe: by key and session, as the core says."""

import zmq
from stream_harness import STORAGE, Line

from larpixdaq.keys.curve import Admission, new_pair
from larpixdaq.protocol.control import ConsumerSession, Update, session_digest
from larpixdaq.protocol.stream import STREAM_VERSION, Hello
from larpixdaq.stream import publisher


def test_one_key_does_not_take_the_places_of_others_that_wait_for_the_core() -> None:
    pair, greedy, other = new_pair(), new_pair().public, new_pair().public
    context = zmq.Context()
    admission = Admission(context, pair, "stream")
    line = Line(admission=admission)
    try:
        keys = {greedy: "Greedy", other: "Other monitor"}
        line.publisher.admit(Update(keys=keys))
        hello = Hello(STREAM_VERSION, "Other monitor", "session", "latest", [])
        line.publisher._handle(b"other", hello, other)
        for number in range(3 * publisher.MAX_SUBSCRIBERS):
            made_up = Hello(STREAM_VERSION, f"name {number}", "made up", "latest", [])
            line.publisher._handle(b"greedy %d" % number, made_up, greedy)
        assert len(line.publisher._unconfirmed) == publisher.MAX_UNCONFIRMED + 1
        _, _, limits = line.publisher.refusals()
        assert [(one.peer, one.limit) for one in limits] == [("Greedy", "8 unconfirmed subscriptions")]
        subscribed = []
        line.publisher._subscribe = lambda route, hello: subscribed.append(route)  # type: ignore[method-assign]
        sessions = {"Other monitor": ConsumerSession(other, session_digest("session"))}
        line.publisher.admit(Update(keys=keys, consumers=sessions))
        assert subscribed == [b"other"]
    finally:
        line.close()
        admission.door.close()
        context.destroy(0)


def test_a_hello_that_was_on_its_way_when_its_key_was_revoked_does_not_subscribe() -> None:
    pair, key = new_pair(), new_pair().public
    context = zmq.Context()
    admission = Admission(context, pair, "stream")
    line = Line(admission=admission)
    try:
        sessions = {STORAGE: ConsumerSession(key, session_digest("session"))}
        line.publisher.admit(Update(keys={key: STORAGE}, consumers=sessions))
        line.publisher.admit(Update())
        subscribed = []
        line.publisher._subscribe = lambda route, hello: subscribed.append(route)  # type: ignore[method-assign]
        line.publisher._handle(b"route", Hello(STREAM_VERSION, STORAGE, "session", "all", []), key)
        assert subscribed == []
    finally:
        line.close()
        admission.door.close()
        context.destroy(0)
