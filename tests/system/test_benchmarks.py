"""The programs in bench/ import what is there: no other test starts them, so a renamed class would stay unnoticed."""

import subprocess
import sys
from pathlib import Path

from processes import LIMIT

BENCH = Path(__file__).parents[2] / "bench"
PROGRAM = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"bench/{name}.py: {type(error).__name__}: {error}")
"""


def test_every_benchmark_can_be_imported():
    names = sorted(path.stem for path in BENCH.glob("*.py"))
    assert len(names) > 30
    arguments = [sys.executable, "-c", PROGRAM, str(BENCH), *names]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (result.stdout, result.returncode) == ("", 0), result.stderr
