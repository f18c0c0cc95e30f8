"""Names of larpix-control 2 in routines: each fails with today's name, and extract() finds no unknown names."""

import pytest
from larpix import Configuration, Controller, Packet_v1, Packet_v2, PacketCollection, TimestampPacket

from larpixdaq.routines._former_names import advice, refuse_unknown_names

TODAY = {"adc_counts": "dataword", "channel": "channel_id"}


def error_of(statement):
    names = {"controller": Controller(), "Configuration": Configuration, "packet": Packet_v2()}
    names["chip"] = names["controller"].add_chip("1-1-2")
    with pytest.raises((AttributeError, ImportError)) as caught:
        exec(statement, names)
    return caught.value


@pytest.mark.parametrize(
    ("statement", "today"),
    [
        ("controller.get_chip('1-1-2')", "controller[chip_key]"),
        ("chip.config.global_threshold -= 1", "threshold_global"),
        ("chip.config.periodic_reset = 0", "enable_periodic_reset"),
        (
            "Configuration.global_threshold_address",
            "the register's name, as in write_configuration(chip_key, 'threshold_global')",
        ),
        (
            "Configuration.channel_mask_addresses",
            "the register's name, as in write_configuration(chip_key, 'channel_mask')",
        ),
        ("packet.chipid", "chip_id"),
        (
            "from larpix.quickstart import quickcontroller",
            "Operator.load_board(file) and the routine quickstart of larpix-daq",
        ),
    ],
)
def test_former_names_are_answered_with_todays(statement, today):
    assert advice(error_of(statement)) == f" (today: {today})"


@pytest.mark.parametrize(
    "statement", ["controller.nothing", "object().value", "import nothing_of_this_name", "from larpix import nothing"]
)
def test_other_names_get_no_advice(statement):
    assert advice(error_of(statement)) == ""


@pytest.mark.parametrize("made", [[], [Packet_v2(), TimestampPacket(timestamp=3)]])
def test_extract_refuses_names_that_no_packet_has(made):
    class Collection(PacketCollection):
        extract = PacketCollection.extract

    for _ in range(2):
        refuse_unknown_names(Collection, [Packet_v2(), TimestampPacket()], ["direction"])
    collection = Collection(made)
    assert collection.extract("timestamp") == [packet.timestamp for packet in made]
    assert collection.extract("dataword", channel_id=0, packet_type=0) == [0 for _ in made[:1]]
    assert collection.extract("direction") == []
    for names, selection, missing in ((["adc_counts"], {}, "adc_counts"), (["dataword"], {"channel": 3}, "channel")):
        with pytest.raises(AttributeError, match=f"extract: packets have no '{missing}'") as caught:
            collection.extract(*names, **selection)
        assert advice(caught.value) == f" (today: {TODAY[missing]})"
    for packet in made:
        packet.mine = 1
    if made:
        assert collection.extract("mine") == [1, 1]
    v1 = Collection([Packet_v1()])
    assert v1.extract("fifo_half_flag") == [0]  # a packet in the collection has it
