"""`larpixdaq shell` in a pseudo-terminal: IPython with an Operator, completion, and the state of the run."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from fake_core import core
from processes import LIMIT, until

pytest.importorskip("IPython")
_ESCAPES = re.compile(rb"\x1b(\[[0-9;?>=]*[A-Za-z]|\][^\x07]*\x07|[=>()][0-9A-Z]?)")


class Terminal:
    """A command in a pseudo-terminal of 40 lines of 120 characters."""

    def __init__(self, *command, env):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "larpixdaq", *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", **env},
            start_new_session=True,
        )
        os.close(slave)
        self.shown = b""
        self.read_to = 0

    def type(self, text):
        self.read_to = len(self.shown)
        os.write(self.master, text.encode())

    def read(self, seconds=0.05):
        while select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # the other side is closed
                return
            if not data:
                return
            self.shown += data
            for _ in range(data.count(b"\x1b[6n")):  # where is the cursor?
                os.write(self.master, b"\x1b[1;1R")
            seconds = 0

    @property
    def text(self):
        """What was shown since the last input, without escape sequences."""
        return _ESCAPES.sub(b"", self.shown[self.read_to :]).decode("utf-8", "replace").replace("\r", "")

    def wait_for(self, *texts):
        def found():
            self.read()
            return all(text in self.text for text in texts)

        try:
            until(found, f"{texts} in the terminal", 2 * LIMIT)
        except AssertionError as error:
            raise AssertionError(f"{error}; it shows {self.text[-2000:]!r}") from None

    def wait(self):
        end = time.monotonic() + LIMIT
        while self.process.poll() is None and time.monotonic() < end:
            self.read()
        assert self.process.poll() is not None, f"the shell did not end; it shows {self.text[-2000:]!r}"
        self.read()
        return self.process.returncode

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(LIMIT)
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def start(*command, **env):
        opened.append(Terminal(*command, env={"IPYTHONDIR": str(tmp_path / "ipython"), **env}))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_a_run_by_typing(line, terminal):
    operator = line.start("--fake", "20000", "--io-groups", "2")
    shell = terminal("shell", "--core", line.core)
    shell.wait_for("the Operator is `o`", "In [1]:", "STOP")
    shell.type('o.prepare_run(comment="typed").result(10)["run"]\r')
    shell.wait_for("Out[1]:", "READY")
    number = operator.run_info().result(LIMIT)["run"]
    shell.wait_for(f"READY {number}")
    # A routine and its parameters.
    shell.type('o.run_routine("hello_w\t')
    shell.wait_for("hello_world")
    shell.type("\x15")  # clears the line
    shell.type("o.run_routine('hot_channels', above\t")
    shell.wait_for("above_hz=")
    shell.type("\x15")
    shell.type("o.set_log_level('info', 'Offl\t")
    shell.wait_for("Offline storage")
    shell.type("')\r")
    shell.wait_for("levels  Offline storage INFO")
    shell.type("o.begin_run().result(10)\r")
    shell.wait_for("Out[3]:")
    until(lambda: operator.state().result(LIMIT) == "RUN", "the run")
    shell.type("\x0c")  # draws the line of the state as a whole, of which only what has changed was sent
    shell.wait_for(f"RUN {number}")
    until(lambda: operator.packet_rate(channels=False).result(LIMIT)["packets"] > 1000, "packets")
    shell.type("o.adc_histogram(io_group=1)\r")
    shell.wait_for("data packets", "ADC  packets", "█")
    # Ctrl-C ends a cell, again and again, and neither the shell nor the run.
    for _ in range(2):
        shell.type("import time; print('bu' + 'sy'); time.sleep(60)\r")
        shell.wait_for("busy")
        os.kill(shell.process.pid, signal.SIGINT)
        shell.wait_for("KeyboardInterrupt", "In [")
    # The line below the prompt changes without a key.
    shell.type("")
    operator.take_control().result(LIMIT)
    operator.end_run().result(LIMIT)
    shell.wait_for("STOP")
    shell.type("exit\r")
    assert shell.wait() == 0


def test_without_a_core(terminal):
    shell = terminal("shell", "--core", "tcp://127.0.0.1:1", "--timeout", "0.2")
    assert shell.wait() == 1
    assert "no core answers at tcp://127.0.0.1:1" in shell.text


def test_a_core_that_goes_away(terminal, tmp_path):
    with core(tmp_path / "state") as running:
        shell = terminal("shell", "--core", running.address)
        shell.wait_for("In [1]:", "STOP")
        shell.type("o.state()\r")
        shell.wait_for("'STOP'")
    shell.wait_for("no core is heard")
    shell.type("o.state()\r")
    shell.wait_for("NoCore: state: no core is heard")
    shell.type("exit\r")
    assert shell.wait() == 0
    assert "failed and nobody looked at it" not in shell.text


def test_a_simple_terminal_has_the_state_in_the_prompt(terminal, running):
    shell = terminal("shell", "--core", running.address, TERM="dumb")
    shell.wait_for("[STOP] In [1]:")
    shell.type("exit\n")
    assert shell.wait() == 0


def test_without_ipython(tmp_path):
    (tmp_path / "IPython.py").write_text("raise ImportError('No module named IPython')")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from larpixdaq import cli; sys.exit(cli.main(['shell']))"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert 'pip install "larpix-daq[shell]"' in done.stderr
    assert done.stderr.count("\n") == 1


def test_commands_from_a_pipe(running):
    command = [sys.executable, "-m", "larpixdaq", "shell", "--core", running.address]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
        out, _ = process.communicate(b"print(6 * 7, o.state().result(5))\nexit\n", timeout=60)
    assert process.returncode == 0
    assert b"42 STOP" in out
