"""Read files with other programs' libraries, each in an environment that has it; called by compatibility.py.

    python compatibility_readers.py READER CASE.json

CASE.json names the files. The last line of the output is a JSON object of what the reader found, which compatibility.py
compares with what was written. This file runs on Python 3.8 and imports nothing of larpix-daq.
"""

import contextlib
import json
import os
import sys
import warnings
from importlib import metadata


def sums(rows):
    """Return the sum of each number column of rows with named columns."""
    return {name: int(rows[name].sum()) for name in rows.dtype.names if rows[name].dtype.kind in "uif"}


def read_h5py(case):
    import h5py

    def read(path, **options):
        with h5py.File(path, "r", **options) as file:
            rows = file["packets"][:]
            return {"rows": len(rows), "sums": sums(rows), "datasets": datasets(file)}

    def datasets(file):
        found = []
        file.visititems(lambda name, node: found.append((name, node[()])) if isinstance(node, h5py.Dataset) else None)
        return len(found)

    return {
        "versions": {"h5py": h5py.__version__, "HDF5": h5py.version.hdf5_version},
        "2.4": read(case["v2"]),
        "1.0": read(case["v1"]),
        "3.0": read(case["v3"]),
        "growing": read(case["growing"], swmr=True),
    }


def read_pandas(case):
    import h5py
    import pandas

    tables, two = {}, []
    with h5py.File(case["v2"], "r") as file:
        packets = pandas.DataFrame(file["packets"][:])
        for name in case["tables"]:
            try:
                tables[name] = len(pandas.DataFrame(file[name][:]))
            except ValueError as error:
                two.append([name, str(error)])
        registers = file["configs"][:]
        chips = pandas.DataFrame({name: list(registers[name]) for name in registers.dtype.names})
    try:
        read_hdf = len(pandas.read_hdf(case["v2"], "packets"))
    except Exception as error:
        read_hdf = f"{type(error).__name__}: {error}"
    return {
        "versions": {"pandas": pandas.__version__},
        "2.4": {"rows": len(packets), "sums": {name: int(packets[name].sum()) for name in packets}},
        "tables": tables,
        "refused": two,
        "configs as lists": [len(chips), int(sum(row.sum() for row in chips["registers"]))],
        "read_hdf": read_hdf,
    }


def read_pytables(case):
    import numpy
    import tables

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tables.open_file(case["v2"]) as file:
            rows = file.root.packets.read()
            chosen = sum(1 for _ in file.root.packets.where("(packet_type == 0) & (chip_id == 11)"))
            every = {
                node._v_pathname[1:]: node.nrows for node in file.walk_nodes("/", "Leaf") if node.read() is not None
            }
            registers = file.root.configs.read()["registers"]
    return {
        "versions": {"PyTables": tables.__version__, "HDF5": tables.hdf5_version},
        "2.4": {"rows": len(rows), "sums": sums(rows)},
        "chip 11": chosen,
        "tables": {name: int(every[name]) for name in case["tables"]},
        "configs": [len(registers), int(registers.sum(dtype=numpy.uint64))],
        "warnings": sorted({f"{w.category.__name__}: {w.message}".split("\n")[0] for w in caught}),
    }


def read_larpix_control(case):
    from larpix.format import hdf5format, rawhdf5format

    def read(path, **options):
        found = hdf5format.from_file(path, **options)
        return found["version"], found["packets"], found["configs"]

    version_2, packets, chips = read(case["v2"], load_configs=True)
    kinds = {}
    for packet in packets:
        kinds[type(packet).__name__] = kinds.get(type(packet).__name__, 0) + 1
    data = [packet for packet in packets if type(packet).__name__ == "Packet_v2" and packet.packet_type == 0]
    names = [
        "io_group",
        "io_channel",
        "chip_id",
        "channel_id",
        "timestamp",
        "dataword",
        "local_fifo",
        "shared_fifo",
        "receipt_timestamp",
    ]
    version_1, packets_1, _ = read(case["v1"])
    try:
        read(case["v3"])
        newer = "read"
    except RuntimeError as error:
        newer = str(error)
    raw = rawhdf5format.from_rawfile(case["raw"])
    return {
        "versions": {"larpix-control": metadata.version("larpix-control")},
        "kinds": kinds,
        "sums": {name: int(sum(int(getattr(packet, name)) for packet in data)) for name in names},
        "valid": sum(1 for packet in data if packet.has_valid_parity()),
        "messages": [p.message for p in packets if type(p).__name__ == "MessagePacket"],
        "configs": [len(chips), int(sum(sum(registers(chip)) for chip in chips))],
        "labels": [version_2, version_1],
        "1.0": len(packets_1),
        "3.0": newer,
        "raw": [len(raw["msgs"]), sum(len(message) for message in raw["msgs"])],
    }


def registers(chip):
    """Return the bytes of a chip's registers."""
    return [int(bits.to01()[::-1], 2) if hasattr(bits, "to01") else int(bits) for bits in chip.config.all_data()]


def read_larpix_control_raw(case):
    """Convert the raw file with the script of the checkout, and read the result."""
    import subprocess

    import h5py

    out = os.path.join(case["folder"], "converted.h5")
    script = os.path.join(case["checkout"], "scripts", "convert_rawhdf5_to_hdf5.py")
    subprocess.run([sys.executable, script, "-i", case["raw"], "-o", out], check=True, stdout=subprocess.DEVNULL)
    with h5py.File(out, "r") as file:
        rows = file["packets"][:]
    received = rows[rows["packet_type"] == 0]
    return {"rows": len(rows), "sums": sums(received[list(case["word columns"])])}


def read_larpixparser(case):
    import h5py
    from LarpixParser import event_parser, hit_parser, util

    run_config, geometry = util.detector_configuration("2x2")
    with h5py.File(case["v2"], "r") as file:
        packets = file["packets"][:]
    # The parser does not know that clocks are reset, so it gets the time between two resets of both boards.
    packets = packets[: (packets["packet_type"] == 6).nonzero()[0][2]]
    known = [
        packet["packet_type"] == 0
        and tuple(int(packet[name]) for name in ("io_group", "io_channel", "chip_id", "channel_id")) in geometry
        for packet in packets
    ]
    chosen = packets[known]
    t0 = event_parser.get_t0(packets, run_config)
    x, y, z, charge = hit_parser.hit_parser_charge(t0[0], chosen, geometry, run_config)
    return {
        "versions": {"LarpixParser": metadata.version("LarpixParser")},
        "events": len(t0),
        "hits": len(chosen),
        "positions": len(x) == len(y) == len(z) == len(chosen),
        "charge": len(charge),
    }


def read_larpix_monitor(case):
    """Make the plots of larpix-monitor of a packet file, and of the raw file as its run_monitor.py does."""
    import h5py
    from monitor.plotter import Plotter
    from monitor.plotting_functions import available_plots

    made, failed = [], []
    with h5py.File(case["v2"], "r") as file:
        for plot in sorted(name for name in available_plots if "Plotly" not in name):
            try:
                figures = Plotter([plot], 1800.0)([(case["v2"], file)])
                figures[0][next(iter(figures[0]))].savefig(os.path.join(case["folder"], plot + ".png"))
                made.append(plot)
            except Exception as error:
                failed.append([plot, f"{type(error).__name__}: {error}".split("\n")[0][:200]])
    from monitor.file_parser import FileParser

    parser = FileParser(case["folder"], sampling=False, max_msgs=-1, clean_up_interval=1800.0)
    raw = parser([case["raw"]])[0]
    rows = len(raw["packets"])
    with contextlib.suppress(AttributeError):
        raw.close()
    return {"made": made, "failed": failed, "raw rows": rows}


def read_ndlar_flow(case):
    """Build events of charge with a workflow of ndlar_flow, in the folder of its checkout."""
    import subprocess

    import h5py

    results = {}
    for name, workflow, path in case["flows"]:
        out = os.path.join(case["folder"], f"flow_{len(results)}.h5")
        done = subprocess.run(
            [sys.executable, "-c", "import h5flow; h5flow.main()", "--nompi", "-c", workflow, "-i", path, "-o", out],
            cwd=case["checkout"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            results[name] = done.stderr.strip().splitlines()[-1][:300]
            continue
        with h5py.File(out, "r") as file:
            hits = file["charge/raw_events/ref/charge/packets/ref"].shape[0]
            field = float(file["run_info"].attrs["e_field"])
            results[name] = [len(file["charge/raw_events/data"]), hits, field]
    return results


if __name__ == "__main__":
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # has a monitor.py, as larpix-monitor
    reader, path = sys.argv[1:]
    with open(path) as source:
        case = json.load(source)
    found = globals()["read_" + reader](case)
    print()
    print(json.dumps(found))
