"""Messages of the control plane: values that arrive, messages that are refused, and random bytes."""

import re
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
from example_counts import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from msgspec.msgpack import Ext

import larpixdaq
from larpixdaq import schema
from larpixdaq.errors import ProtocolError
from larpixdaq.protocol.control import (
    MAX_ANSWER,
    MAX_DEPTH,
    MAX_REQUEST,
    MAX_TEXT,
    PROTOCOL,
    ActionRequest,
    Answer,
    Heartbeat,
    Open,
    Probe,
    Register,
    Update,
    Welcome,
    content,
    pack,
    packed,
    probe,
    unpack_client,
    unpack_core,
)

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
scalars = st.one_of(
    hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes(sizes=(16, 32, 64)), hnp.boolean_dtypes()
)
dtypes = st.one_of(
    scalars,
    hnp.byte_string_dtypes(min_len=1),
    hnp.unicode_string_dtypes(min_len=1),
    hnp.datetime64_dtypes(),
    hnp.array_dtypes(scalars, allow_subarrays=True),
    st.sampled_from([layout.dtype for layout in schema.LAYOUTS]),
)


def transfer(value):
    """Send a value from a component over the core to an Operator."""
    at_core = unpack_client(pack(Answer(kind="result", value=packed(value))), "a test")
    return content(unpack_core(pack(at_core)))


@given(plain)
def test_values_arrive_unchanged(value):
    assert transfer(value) == value


@settings(max_examples=examples(60))
@given(hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)))
def test_arrays_arrive_unchanged(array):
    arrived = transfer({"array": array, "inside": [array]})["array"]
    assert arrived.dtype == array.dtype
    assert arrived.shape == array.shape
    assert arrived.tobytes() == array.tobytes()
    assert arrived.flags.writeable


def test_arrays_that_are_not_contiguous_and_numpy_scalars():
    array = np.arange(12).reshape(3, 4).T[::2]
    value = transfer({"array": array, "int": np.int64(3), "float": np.float32(0.5), "bool": np.bool_(True)})
    assert np.array_equal(value.pop("array"), array)
    assert value == {"int": 3, "float": 0.5, "bool": True}
    row = np.zeros(2, schema.PACKETS_2_4)
    row["timestamp"] = 5
    assert transfer(row[1]) == row[1]


def test_the_core_passes_on_arrays_in_requests():
    sent = ActionRequest(action="run_routine", params={"args": [np.arange(3)]})
    at_core = unpack_client(pack(sent), "a test")
    assert isinstance(at_core.params["args"][0], Ext)
    assert unpack_core(pack(at_core)).params["args"][0].tolist() == [0, 1, 2]


def test_the_core_unpacks_no_arrays():
    """Numpy takes minutes for a description of 300,000 fields, and all other peers wait."""
    head = msgspec.msgpack.encode(["u1," * 300_000, [0], b""])
    sent = {"type": "request", "action": "a", "params": {"x": Ext(1, head)}}
    assert unpack_client(msgspec.msgpack.encode(sent), "a stranger").params["x"] == Ext(1, head)
    with pytest.raises(ProtocolError, match="its description has 900005 bytes, the limit is 8192"):
        unpack_core(msgspec.msgpack.encode(sent))


def test_descriptions_of_arrays_have_a_limit():
    wide = np.zeros(1, [(f"f{i}", "u1") for i in range(2000)])
    with pytest.raises(ProtocolError, match=r"its 2000 fields has .* the limit is 8192"):
        packed(wide)
    with pytest.raises(ProtocolError, match=r"its description has .* the limit is 8192"):
        content(array_of("u1," * 3000, [0], b""))
    assert transfer(np.zeros(1, [(f"f{i}", "u1") for i in range(500)])).dtype.names[-1] == "f499"


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.zeros(1, [("a", "O")]),
        object(),
        2**64,
        {(1, 2): object()},
        type("T", (), {}),
    ],
)
def test_unsupported_values_raise_an_error_at_the_sender(value):
    with pytest.raises(ProtocolError, match="cannot"):
        packed(value)


def array_of(descr, shape, data):
    """An answer with an array of this description, shape and bytes."""
    inner = msgspec.msgpack.encode([descr, shape, data])
    return Answer(kind="result", value=msgspec.Raw(msgspec.msgpack.encode(Ext(1, inner))))


@pytest.mark.parametrize(
    ("descr", "shape", "data"),
    [
        ("|O", [1], b"\0" * 8),
        ([["a", "|O"]], [1], b"\0" * 8),
        ("<u4", [2], b"\0" * 4),
        ("<u4", [2**62, 4], b""),
        ("<u4", [-1], b""),
        ("nonsense", [1], b"\0"),
        ([["a"]], [1], b"\0"),
        ([[]], [1], b""),
        ([["a", "<u4"], ["a", "<u4"]], [1], b"\0" * 8),
        ("V0", [2**40], b""),
        ("", [0], b""),
        (",,,", [0], b""),
        ([["a", [["b", "<u4", [-3]]]]], [1], b"\0"),
        ([["a", "<u1", [2**31, 2**31]]], [0], b""),
        ("<u1", [1] * 33, b"\0"),
        ("<u1", [1] * 65, b"\0"),
    ],
)
def test_impossible_arrays_are_refused(descr, shape, data):
    with pytest.raises(ProtocolError, match=r"array|value"):
        content(array_of(descr, shape, data))


def test_an_unknown_extension_is_refused():
    raw = msgspec.Raw(msgspec.msgpack.encode(Ext(9, b"x")))
    with pytest.raises(ProtocolError, match="extension 9"):
        content(Answer(kind="result", value=raw))


def nested(depth):
    value = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def test_depth_is_limited():
    assert unpack_client(pack(ActionRequest(action="a", params=nested(MAX_DEPTH))), "a test")
    for sent in (ActionRequest(action="a", params=nested(MAX_DEPTH + 2)), Heartbeat(status=nested(300))):
        with pytest.raises(ProtocolError, match=f"{MAX_DEPTH} containers"):
            unpack_client(pack(sent), "a test")
    deep = msgspec.Raw(b"\x91" * 100_000 + b"\xc0")
    with pytest.raises(ProtocolError):
        content(Answer(kind="result", value=deep))
    with pytest.raises(ProtocolError):
        unpack_client(pack(Heartbeat())[:-1] + b"\x91" * 100_000 + b"\xc0", "a test")


def test_sizes_of_registrations_and_heartbeats_are_limited():
    groups = {str(group): "suspect" for group in range(256)}
    boards = [
        {"io_group": group, "name": "n" * 100, "problem": "p" * 200, "setup": ["s" * 500]} for group in range(255)
    ]
    producer = {"verdicts": groups, "subscribers": ["s" * 64] * 100, "boards": boards}
    assert unpack_client(pack(Heartbeat(status=producer)), "a test").status == producer
    for large in (
        Register(name="n", kind="log", instance="1", info={"x": "y" * (1 << 18)}),
        Heartbeat(status={"x": "y" * (1 << 18)}),
    ):
        with pytest.raises(ProtocolError, match=r"262\d* bytes .* the limit is 262144"):
            pack(large)
        with pytest.raises(ProtocolError, match="the limit is 262144"):
            unpack_client(msgspec.msgpack.encode(large), "a test")


def test_every_socket_that_receives_has_a_limit():
    """Without a limit, libzmq allocates memory for a message of any size."""
    for path in Path(larpixdaq.__file__).parent.rglob("*.py"):
        text = path.read_text()
        kinds = set(re.findall(r"\.socket\(zmq\.(\w+)\)", text))
        assert not kinds or "zmq.MAXMSGSIZE" in text, (path, kinds)


def test_messages_are_received_in_one_place():
    """keys/curve.py limits their parts and bytes. The others read sockets of child processes, and the emulator's."""
    package = Path(larpixdaq.__file__).parent
    found = [path for path in package.rglob("*.py") if re.search(r"\.recv(_\w+)?\(", path.read_text())]
    assert {str(path.relative_to(package)) for path in found} == {
        "keys/curve.py",
        "runtime/child_process.py",
        "hardware/child.py",
        "sources/io_class_child.py",
        "emulators/board.py",
        "storage/convert.py",
        "stream/uplink_child.py",
    }


def test_size_is_limited():
    with pytest.raises(ProtocolError, match=str(MAX_REQUEST)):
        pack(ActionRequest(action="a", params={"x": b"1" * MAX_REQUEST}))
    with pytest.raises(ProtocolError, match="limit"):
        packed(b"1" * MAX_ANSWER)
    large = msgspec.msgpack.encode(ActionRequest(action="a", params={"x": b"1" * MAX_REQUEST}))
    with pytest.raises(ProtocolError, match=str(MAX_REQUEST)):
        unpack_client(large, "a test")
    with pytest.raises(ProtocolError, match=str(MAX_ANSWER)):
        unpack_client(b"1" * (MAX_ANSWER + 1), "a test")
    assert len(content(unpack_client(pack(Answer(kind="result", value=packed(b"1" * (8 << 20)))), "a test"))) == 8 << 20


@pytest.mark.parametrize("text", ["", "a\nb", "x" * 65, "\x7f"])
def test_names_are_limited(text):
    data = msgspec.msgpack.encode({"type": "register", "name": text, "kind": "log", "instance": "1"})
    with pytest.raises(ProtocolError, match="name"):
        unpack_client(data, "a test")


def test_a_text_that_is_too_long_is_cut_and_not_refused():
    found = unpack_client(pack(Answer(request="1", kind="error", text="x" * 100_000)), "test")
    assert found.text == "x" * (MAX_TEXT - 4) + " ..."


def test_another_version_is_reported_before_other_errors():
    data = msgspec.msgpack.encode({"type": "from the future", "version": 9, "request": "r7"})
    with pytest.raises(ProtocolError, match="protocol version 9, here it is 1"):
        unpack_client(data, "a test")
    assert probe(data) == Probe(9, "r7", "from the future")
    assert probe(b"\xc1") == Probe(PROTOCOL)
    data = pack(Open(name="o", instance="i", version=2))
    with pytest.raises(ProtocolError, match="protocol version 2"):
        unpack_client(data, "a test")


def test_a_registration_of_an_earlier_version_has_no_module():
    earlier = {"type": "register", "version": PROTOCOL, "name": "n", "kind": "log", "instance": "i"}
    assert unpack_client(msgspec.msgpack.encode(earlier), "a test").module == ""
    with pytest.raises(ProtocolError, match="module"):
        unpack_client(msgspec.msgpack.encode(earlier | {"module": "x" * 65}), "a test")


def test_messages_in_the_wrong_direction_are_refused():
    with pytest.raises(ProtocolError, match="welcome"):
        unpack_client(pack(Welcome()), "a test")
    with pytest.raises(ProtocolError, match="heartbeat"):
        unpack_core(pack(Heartbeat()))


SAMPLES = [
    pack(Register(name="n", kind="storage", instance="i", actions=["a"], info={"x": [1]}, run=3, module="m")),
    pack(Heartbeat(progress=1, queued=2, status={"a": np.arange(3)})),
    pack(Answer(kind="result", value=packed({"a": np.zeros(2, schema.PACKETS_2_4)}))),
    pack(ActionRequest(action="a", params={"x": 1.5})),
    pack(Update(state="RUN", run=4, producers={"a": "tcp://b"})),
]


@given(st.binary(max_size=200))
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xdf\xff\xff\xff\xff")
def test_random_bytes_are_refused(data):
    for unpack in (lambda: unpack_client(data, "a test"), lambda: unpack_core(data)):
        with pytest.raises(ProtocolError):
            unpack()
    probe(data)


@given(st.sampled_from(SAMPLES), st.data())
def test_damaged_messages_do_no_harm(sample, data):
    damaged = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    for unpack in (lambda: unpack_client(damaged, "a test"), lambda: unpack_core(damaged)):
        with suppress(ProtocolError):
            message = unpack()
            if isinstance(message, Answer):
                content(message)
