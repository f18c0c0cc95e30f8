"""The page in a real browser, with real processes: what a person sees and does."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from emulated_board import Emulator
from fake_core import Actor, all_running, producer_status, storage_status
from processes import LIMIT, until
from selenium.webdriver.common.keys import Keys
from system import System
from web_browser import Browser, browsers
from web_viewer import launch_web, link_of

from larpixdaq.operator import Operator

#: A channel of the emulated board with ten times the noise of others.
HOT = "1-1-11-7"
#: Global threshold at which only that channel triggers: 20 sigmas of the others' noise, and about 2 of its own.
THRESHOLD = 96
#: What a text must never become: an element of the page.
SCRIPT = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
#: Maximum seconds until files are read, in a process of low priority.
READ = 60.0
TABS = ("run", "monitor", "configuration", "routines", "runs")
Open = Callable[[str], Browser]


@pytest.fixture(scope="module")
def board() -> Iterator[Emulator]:
    emulator = Emulator(
        "--chips", "4", "--asic", "2b", "--power-on", "--pps", "--hot-channels", HOT, "--write-network", "tile.json"
    )
    yield emulator
    emulator.close()


@pytest.fixture(scope="module")
def operator(line: System, board: Emulator) -> Operator:
    (line.folder / "routines").mkdir()
    (line.folder / "routines" / "broken.py").write_text("from larpix import nothing\n")
    (line.folder / "routines" / "slow.py").write_text(
        "from larpixdaq.routines import Routine\n"
        "def _slow(controller, send_data, send_info, steps: int = 3, name: str = ''):\n"
        "    '''Counts STEPS steps.'''\n"
        "    for step in range(steps):\n"
        "        send_info(f'step {step} {name}', step, steps)\n"
        "    return controller, {'chips': {'1-1-11': {'mean': [float(i % 9) for i in range(64)]}}, 'name': name}\n"
        "registration = {'slow': Routine('slow', _slow)}\n"
    )
    line.launch_core()
    line.launch_log()
    return line.start("--pacman", *board.addresses, "--asic", "2b", "--routines", line.folder / "routines")


@pytest.fixture(scope="module")
def web(line: System, operator: Operator) -> str:
    return link_of(launch_web(line))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    with browsers(tmp_path_factory.mktemp("downloads")) as open_browser:
        yield open_browser


@pytest.fixture(scope="module")
def shared(opened: Open, web: str) -> Browser:
    return opened(web)


@pytest.fixture(scope="module")
def chips(operator: Operator) -> None:
    """All chips are configured, and the hot channel triggers."""
    operator.take_control().result(LIMIT)  # a test before may have left it with the page
    operator.load_board(str(Path("tile.json").absolute())).result(LIMIT)
    assert operator.configure_network().result(LIMIT)["ok"]
    registers = {"threshold_global": THRESHOLD, "channel_mask": [0] * 64}
    operator.send_configuration({"all": registers}).result(LIMIT)
    operator.release_control().result(LIMIT)


@pytest.fixture
def page(shared: Browser, operator: Operator) -> Iterator[Browser]:
    """The page on the tab Run, in STOP, with control free. At the end its console must be empty."""
    operator.take_control().result(LIMIT)
    operator.release_control().result(LIMIT)
    shared.reload()
    shared.tab("run")
    shared.console()
    yield shared
    assert shared.console() == []
    if operator.state().result(LIMIT) != "STOP":
        operator.take_control().result(LIMIT)
        operator.abort_run().result(LIMIT)


def begin_by_clicking(page: Browser, comment: str = "from the page") -> None:
    page.fill("Comment of the next run", comment)
    page.click("Prepare run")
    page.confirm("Prepare run")
    page.wait_text("#state-word", "READY")
    page.click("Begin run")
    page.confirm("Begin run")
    page.wait_text("#state-word", "RUN")


def losses(operator: Operator) -> str:
    """What the page says of losses: on a busy machine the emulated board may be late, and its data are suspect."""
    producers = [one for one in operator.components().result(LIMIT) if one["kind"] == "producer"]
    good = all(verdict == "complete" for one in producers for verdict in one["status"]["verdicts"].values())
    return "no loss seen" if good else "suspect"


def end_by_clicking(page: Browser) -> None:
    page.click("End run")
    page.confirm("End run")
    page.wait_text("#state-word", "STOP")


def test_whole_run(page: Browser, operator: Operator, line: System) -> None:
    """Configure the chips, take a run and look at it, all by clicking."""
    page.tab("configuration")
    page.fill("Board file, on the producer's machine", str(Path("tile.json").absolute()))
    page.click("Load board file")
    page.confirm("Load board file")
    page.wait_text(".board-control .facts", "4 of generation")
    page.click("Bring up networks")
    page.confirm("Bring up networks")
    page.wait_text(".compare .facts", "every register that was read has its wanted value")
    page.fill("Chip", "1-1-11", ".registers")
    page.click("Show known values", ".registers")
    for name, value in (("threshold_global", str(THRESHOLD)), ("channel_mask", "64 x 0")):
        page.wait(lambda name=name: page.find(f"input[data-register={name}]"), name)
        page.find(f"input[data-register={name}]").send_keys(value)
    page.click_on(".registers input[type=checkbox]")
    page.click("Write 2 registers", ".registers")
    page.confirm("Write")
    page.wait_text("#requests .latest", "read back 1-1-11: done")
    page.wait_text(".registers table", f"threshold_global {THRESHOLD} {THRESHOLD}")
    found = operator.retrieve_configuration(None, "threshold_global").result(LIMIT)
    assert {chip["wanted"]["threshold_global"] for chip in found.values()} == {THRESHOLD}

    page.tab("run")
    begin_by_clicking(page, "hot channel")
    assert "run 1" in page.text("#state-text")
    page.wait(lambda: page.text("#rate")[:1] in "123456789" and "OLD" not in page.text("#rate-note"), "a rate")
    page.wait(lambda: page.text("#loss") == losses(operator), "the losses as the producer judges them")
    page.wait_text(".boards table", "connected")

    page.tab("monitor")
    page.wait_text(".hottest table", HOT)
    page.wait(lambda: page.find(".map canvas").get_attribute("data-shown"), "the map")
    for label, value in zip(("io_group", "io_channel", "chip", "channel"), HOT.split("-"), strict=True):
        page.fill(label, value, ".adc")
    page.click("Show", ".adc")
    exact = page.wait_text(".map-info", "packets seen")
    assert "io_group 1, io_channel 1" in exact
    assert "chip 11, channel 7" in exact

    def is_the_monitors() -> bool:
        """Whether the rate in the page is about that of the monitor, which changes meanwhile."""
        rate = operator.packet_rate().result(LIMIT)["channels"]
        hottest = rate[(rate["chip_id"] == 11) & (rate["channel_id"] == 7)]["rate"][0]
        exact = page.text(".map-info")
        if "about " not in exact:
            return False
        shown = float(exact.split("about ")[1].split(" ")[0].replace(",", "")) * (1e3 if " k packets" in exact else 1)
        return bool(shown == pytest.approx(hottest, rel=0.35))

    page.wait(is_the_monitors, "the rate of the channel")
    at = page.wait(lambda: page.find(".map canvas").get_attribute("data-cursor"), "the cursor")
    hot = page.canvas_colour(".map canvas", *map(float, at.split(",")))
    assert hot[3] == 255
    page.find(".map canvas").send_keys(Keys.ARROW_DOWN)
    page.wait_text(".map-info", "chip 11, channel 8")
    before = at
    at = page.wait(
        lambda: page.find(".map canvas").get_attribute("data-cursor").replace(before, ""), "the cursor moved"
    )
    silent = page.canvas_colour(".map canvas", *map(float, at.split(",")))
    assert silent != hot
    page.wait_text(".adc .facts", "ADC counts")

    # plots move
    for selector in (".rates .chart", ".adc .chart"):
        page.wait(lambda selector=selector: page.run(CANVASES, page.find(selector)) > 0, f"the plot {selector}")
        before = page.picture(selector)
        page.wait(lambda selector=selector, before=before: page.picture(selector) != before, f"{selector} to move")
    page.wait_text(".packets table", "data")
    page.wait_text(".clocks table", "s")
    page.wait_text(".ledger table", "LArPix board")
    page.wait_text(".messages", "Beginning run")

    page.tab("run")
    page.fill("Comment on the run, for the e-log", "beam is back")
    page.click("Add to the e-log")
    page.wait_text("#requests .latest", "comment: done")
    end_by_clicking(page)
    assert "run 1: COMPLETE" in page.wait_text(".outcome", "COMPLETE")

    page.tab("runs")
    page.wait_text(".run-list table", "hot channel")
    page.wait_text(".elog", "beam is back")
    page.wait_text(".run-detail table", ".h5")
    page.click("Read the files and plot")
    page.wait(lambda: page.run(CANVASES, page.find(".run-plots .plots")) > 2, "the plots of the run", READ)
    page.wait_text(".run-plots table", "COMPLETE")


#: Number of drawn canvases in an element, also those of Bokeh, which are in shadow trees.
CANVASES = """
    const drawn = (one) => (one.tagName === "CANVAS" && one.width > 50) + (one.shadowRoot ? count(one.shadowRoot) : 0);
    const count = (node) => [...node.querySelectorAll("*")].reduce((sum, one) => sum + drawn(one), 0);
    return count(arguments[0]);
"""


def test_two_runs_beside_each_other(page: Browser, tmp_path: Path, chips: None) -> None:
    for _ in range(2):
        begin_by_clicking(page)
        page.tab("monitor")
        page.wait_text(".hottest table", HOT)
        page.tab("run")
        end_by_clicking(page)
    page.tab("runs")
    page.wait(lambda: len(page.all(".run-list tbody tr")) >= 2, "two runs")
    run = page.text(".run-list tbody tr:nth-child(2) a")
    page.click("with", ".run-list tbody tr:nth-child(2)")
    page.wait_text(".run-plots table", f"run {run}", READ)
    page.wait(lambda: page.run(CANVASES, page.find(".run-plots .plots")) > 1, "plots of both", READ)
    page.wait(lambda: len(page.all(".run-maps canvas")) == 2, "maps of both", READ)
    (tmp_path / "<b>scope 1.txt").write_text("trace")
    page.fill("File, of at most 64 MiB", str(tmp_path / "<b>scope 1.txt"))
    page.click("Attach")
    assert "5 bytes" in page.wait_text(".attachments", "<b>scope 1.txt")
    script = """
        const [done] = arguments;
        fetch(document.querySelector(".attachments a").href).then((answer) => answer.text()).then(done);
    """
    assert page.driver.execute_async_script(script) == "trace"


def test_routine(page: Browser) -> None:
    page.tab("routines")
    page.wait(lambda: page.find(".routine-list option[value=slow]"), "the routine")
    page.choose(".routine-list select[size]", "slow")
    page.fill("name", SCRIPT, ".routine-form")
    page.fill("steps", "5", ".routine-form")
    page.click("Run", ".routine-form")
    page.confirm("Run")
    page.wait_text(".routine-state", "done in")
    assert f"step 4 {SCRIPT}" in page.text(".routine-progress .log")
    assert SCRIPT in page.text(".routine-result .facts")
    page.wait(lambda: page.run(CANVASES, page.find(".routine-result .plots")) > 0, "the plot of the result")
    assert not page.all(".routine-result img")
    assert page.text(".routine-list option[value='broken.py']") == "broken.py: not loaded"
    page.choose(".routine-list select[size]", "broken.py")
    page.wait_text(".routine-list", "broken.py: ImportError: cannot import name 'nothing'")


def test_wrong_requests_are_refused_by_the_core(page: Browser) -> None:
    page.tab("configuration")
    page.wait(lambda: page.find(".any-action option[value=core]"), "the actions")
    page.choose(".any-action select:first-of-type", "core")
    page.run("document.querySelector('.any-action .row .field:nth-child(2) select').value = 'begin_run'")
    page.click("Request", ".any-action")
    page.confirm("Request")
    page.wait_text(".any-action .problem", "begin_run is not allowed in STOP")
    page.fill("Parameters, as a JSON object", "{", ".any-action")
    page.click("Request", ".any-action")
    page.wait_text("#requests .latest", "expected a JSON object")


def test_script_in_every_text_is_shown_as_text(page: Browser, operator: Operator) -> None:
    operator.shifter = SCRIPT[:100]
    page.fill("Kind", SCRIPT[:60])
    begin_by_clicking(page, SCRIPT)
    page.fill("Comment on the run, for the e-log", SCRIPT)
    page.click("Add to the e-log")
    page.wait_text(".control .facts", SCRIPT)
    page.wait_text("#state-more", SCRIPT[:20])
    end_by_clicking(page)
    page.tab("runs")
    page.wait_text(".run-list table", SCRIPT[:40])
    page.wait_text(".elog", SCRIPT)
    for tab in TABS:
        page.tab(tab)
        page.wait(lambda tab=tab: write_everywhere(page, tab), f"all fields of {tab}")
    page.tab("configuration")
    page.click("Load board file")
    assert SCRIPT in page.wait_text("dialog[open]", SCRIPT)
    page.confirm("Load board file")
    page.wait_text("#requests .latest", "FAILED")
    assert "onerror" in page.text("#requests .latest")
    assert not page.all("img")
    assert "owned" not in page.driver.title
    operator.shifter = ""


def write_everywhere(page: Browser, tab: str) -> bool:
    """Write a script into every field of a tab. (A field that vanishes meanwhile lets the caller try again.)"""
    for entry in page.all(f"#panel-{tab} input[type=text], #panel-{tab} textarea"):
        if entry.is_displayed() and entry.is_enabled():
            entry.send_keys(SCRIPT, Keys.TAB)
    return True


def test_killed_component_and_gone_monitor(page: Browser, line: System, operator: Operator) -> None:
    begin_by_clicking(page)
    page.tab("monitor")
    page.wait_text(".io-groups table", "packets/s")
    line.processes["run_data"].popen.send_signal(signal.SIGKILL)
    page.wait_text("#panel-monitor .stale-word", "OLD")
    assert page.find("#panel-monitor > .old")
    page.wait_text("#alarm", "warning")
    page.wait_text("#rate", "not known")
    page.tab("run")
    page.wait_text(".components table", "LOST")
    page.wait_text(".alarm-panel table", "Online monitor")
    line.processes.pop("run_data").kill()
    line.launch_monitor()
    line.await_kinds(operator, "run_data")
    page.tab("monitor")
    page.wait(lambda: not page.find(".stale-word").is_displayed(), "the monitor's figures again")
    page.tab("run")
    page.click("Acknowledge", ".alarm-panel")
    page.wait(lambda: page.all("dialog[open]"), "the question")
    page.fill("Comment", "killed by the test", "dialog[open]")
    page.confirm("Acknowledge")
    page.wait_text("#requests .latest", "done")
    end_by_clicking(page)


def test_two_browsers_and_control(page: Browser, opened: Open, web: str) -> None:
    other = opened(web)
    begin_by_clicking(page, "seen by two")
    other.wait_text("#state-word", "RUN")
    other.wait_text("#state-more", "seen by two")
    assert other.console() == []
    end_by_clicking(page)
    other.wait_text("#state-word", "STOP")
    other.driver.quit()


def test_observer_looks_only(page: Browser, opened: Open, line: System) -> None:
    link = line_link(line, "observer")
    other = opened(link)
    other.wait_text("#viewer", "observer")
    assert not other.button("Prepare run").is_enabled()
    assert "allows to look" in other.text("#why-not")
    other.tab("configuration")
    for text in ("Power up", "Find the network", "Save a snapshot"):
        assert not other.button(text, "#panel-configuration").is_enabled(), text
    script = """
        const [done] = [arguments[arguments.length - 1]];
        const socket = new WebSocket(`ws://${location.host}/live`);
        socket.onmessage = (event) => {
          const message = typeof event.data === "string" ? JSON.parse(event.data) : {};
          const request = {type: "request", id: "x", action: "prepare_run"};
          if (message.type === "snapshot") socket.send(JSON.stringify(request));
          if (message.kind === "error") { socket.close(); done(message.text); }
        };
    """
    assert "allows to look, not to change" in other.driver.execute_async_script(script)
    other.driver.quit()


def line_link(line: System, role: str) -> str:
    """Make a log-in link as `larpixdaq web-link` does."""
    import subprocess

    from larpixdaq.runtime.launcher import command

    made = subprocess.run(
        [*command("cli", "web-link", "--role", role, "--core", line.core)], capture_output=True, text=True, check=True
    )
    return made.stdout.strip().splitlines()[-1]


def test_reload_in_the_middle(page: Browser) -> None:
    begin_by_clicking(page, "reloaded")
    number = page.text("#state-text")
    page.reload()
    page.wait_text("#state-word", "RUN")
    assert page.text("#state-text") == number
    page.wait_text("#viewer", "in control")
    end_by_clicking(page)


def test_core_that_is_gone_and_back(page: Browser, line: System, operator: Operator) -> None:
    begin_by_clicking(page)
    line.processes["core"].popen.send_signal(signal.SIGSTOP)
    try:
        page.wait_text("#link", "NO CORE")
        assert page.find("body.stale")
        page.wait_text("#problems", "the core has not been heard")
        assert page.find("#state").get_attribute("data-level") == "stale"
    finally:
        line.processes["core"].popen.send_signal(signal.SIGCONT)
    page.wait_text("#link", "live")
    page.wait(lambda: page.find("#state").get_attribute("data-level") == "run", "the state again")
    end_by_clicking(page)


def test_web_server_that_is_gone_and_back(opened: Open, line: System, operator: Operator) -> None:
    web = launch_web(line, key="second web")
    page = opened(link_of(web))
    port = urlsplit(page.origin).port
    web.stop()
    page.wait_text("#link", "NOT CONNECTED")
    page.wait_text("#problems", "no connection to the web server")
    line.launch("web", "--core", line.core, "--address", f"127.0.0.1:{port}", key="second web")
    page.wait_text("#link", "live")
    page.wait(lambda: not page.find("body").get_attribute("class"), "the state again")
    page.driver.quit()


def test_keyboard_alone(page: Browser, operator: Operator, chips: None) -> None:
    """A whole run without a mouse, and every tab, from the first Tab key on."""

    def press(*keys: str) -> None:
        page.driver.switch_to.active_element.send_keys(*keys)

    def go_to(what: str, condition: Callable[[], bool], most: int = 60) -> None:
        for _ in range(most):
            if condition():
                return
            press(Keys.TAB)
        raise AssertionError(f"{most} Tab keys do not reach {what}")

    def focused() -> str:
        return str(page.run("return document.activeElement.textContent")).rstrip("…")

    page.reload()
    press(Keys.TAB)
    assert focused() == "Skip to the tab"
    outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    for text, state in (("Prepare run", "READY"), ("Begin run", "RUN"), ("End run", "STOP")):
        page.wait(lambda text=text: page.button(text).is_enabled(), text)
        go_to(text, lambda text=text: focused() == text)
        press(Keys.ENTER)
        page.wait(lambda: page.all("dialog[open]"), "the question")
        assert page.run("return document.activeElement.closest('dialog') !== null")
        press(Keys.ENTER)
        page.wait_text("#state-word", state)
        if state == "RUN":
            until(lambda: operator.summary().result(LIMIT)["hottest"], "packets of the hot channel")
    page.click("Abort run")
    press(Keys.ESCAPE)
    page.wait(lambda: not page.all("dialog"), "the end of the dialog")

    page.run("document.activeElement.blur()")
    go_to("the tabs", lambda: page.run("return document.activeElement.role") == "tab")
    for name in (*TABS[1:], TABS[0]):
        press(Keys.ARROW_RIGHT)
        assert page.run("return document.activeElement.id") == f"tab-{name}"
        assert page.find(f"#panel-{name}").is_displayed()
    press(Keys.ARROW_RIGHT)
    go_to("the map", lambda: page.run("return document.activeElement.tagName") == "CANVAS")


def test_labels(page: Browser) -> None:
    """Everything that can be focused has a name, and every picture a description."""
    script = """
        const label = (one) => document.getElementById(one.getAttribute("aria-labelledby"))?.textContent;
        const named = (one) => one.getAttribute("aria-label") || one.textContent.trim() || label(one) || one.title
            || one.labels?.[0]?.textContent.trim();
        const kinds = ["button", "input", "select", "textarea", "a", "canvas", "table", "progress", "[role=img]",
            "[role=tabpanel]", "[tabindex]"];
        return [...document.querySelectorAll(kinds.join())]
            .filter((one) => !one.closest("[hidden]") && one.tagName !== "MAIN" && !named(one))
            .map((one) => one.outerHTML.slice(0, 200));
    """
    for tab in TABS:
        page.tab(tab)
        assert page.run(script) == [], tab
    assert page.run("return document.documentElement.lang") == "en"
    ids = page.run("return [...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))


def test_policy_and_no_request_to_others(page: Browser) -> None:
    page.requested()
    page.reload()
    for tab in TABS:
        page.tab(tab)
    page.tab("monitor")
    page.wait(lambda: page.run("return Boolean(window.Bokeh)"), "BokehJS")
    requested = page.requested()
    assert len(requested) > 10
    own = urlsplit(page.origin).netloc
    assert [url for url in requested if urlsplit(url).netloc != own and not url.startswith(("data:", "blob:"))] == []
    headers = page.driver.execute_async_script(
        "const done = arguments[0]; fetch('/').then((answer) => done(answer.headers.get('content-security-policy')))"
    )
    assert "script-src 'self';" in headers
    assert "unsafe-eval" not in headers
    # the policy holds: neither an inline script nor eval runs
    assert page.driver.execute_async_script(
        """
        const done = arguments[0];
        const script = document.createElement("script");
        script.textContent = "window.broken = true";
        document.head.append(script);
        setTimeout("window.broken = true", 0);
        setTimeout(() => done(window.broken === undefined), 50);
        """
    )
    console = page.console()
    assert console
    assert all("Content Security Policy" in line for line in console)


def test_strange_addresses_open_the_first_tab(page: Browser) -> None:
    for fragment in ("constructor", "__proto__", "%3Cscript%3E"):
        page.run("location.hash = arguments[0]", fragment)
        page.reload()
        assert page.find("#panel-run").is_displayed()


def test_hidden_page_asks_for_nothing(page: Browser) -> None:
    """Only what the open tab shows is asked for."""
    sent = """
        window.sent = [];
        const send = WebSocket.prototype.send;
        WebSocket.prototype.send = function (text) {
          window.sent.push(JSON.parse(text));
          return send.call(this, text);
        };
    """
    page.run(sent)
    page.tab("monitor")
    page.tab("run")
    watched = [frame for frame in page.run("return window.sent") if frame["type"] == "watch"]
    assert [frame["pixels"] for frame in watched] == ["rate", None]
    assert watched[-1] == {"type": "watch", "pixels": None, "histogram": None, "packets": None}


def test_snapshots_of_the_catalogue(page: Browser, operator: Operator, chips: None) -> None:
    page.tab("configuration")
    page.wait_text(".board-control .facts", "4 of generation")
    for name, comment in (("calibrated", SCRIPT), ("cold", "")):
        page.fill("Name", name, ".snapshots")
        page.fill("Comment", comment, ".snapshots")
        page.click("Save a snapshot", ".snapshots")
        page.wait_text(".snapshots .facts", f"{name}: 4 chips")
        operator.send_configuration({"1-1-11": {"threshold_global": 200}}).result(LIMIT)
        operator.release_control().result(LIMIT)
    assert SCRIPT in page.wait_text(".snapshots table", "cold")
    assert [(one["name"], one["chips"]) for one in operator.snapshots().result(LIMIT)] == [
        ("calibrated", 4), ("cold", 4)
    ]  # fmt: skip
    page.choose(".snapshots select[aria-label=Snapshot]", "calibrated")
    for other, differs in (("cold", "differ"), ("", "differ"), ("calibrated", "are the same")):
        page.choose(".snapshots select[aria-label='Compare with']", other)
        page.click("Compare", ".snapshots")
        page.wait_text(".snapshots .facts", f"calibrated and {other or 'the wanted values of now'} {differs}")
        if differs == "differ":
            page.wait_text(".snapshots table[aria-label^=Differences]", f"1-1-11 threshold_global {THRESHOLD} 200")
    page.click("Load", ".snapshots")
    page.confirm("Load")
    page.wait_text(".snapshots .facts", "calibrated: every register has its value")
    page.wait_text(".compare .facts", "every register that was read has its wanted value")
    found = operator.retrieve_configuration("1-1-11", "threshold_global").result(LIMIT)
    assert found["1-1-11"] == {"wanted": {"threshold_global": THRESHOLD}, "confirmed": {"threshold_global": THRESHOLD}}
    page.click("Remove", ".snapshots")
    page.confirm("Remove")
    page.wait(lambda: "calibrated" not in page.text(".snapshots .scroll-box table"), "the removal")
    page.fill("Name", "a/b", ".snapshots")
    page.click("Save a snapshot", ".snapshots")
    page.wait_text("#requests .latest", "FAILED")
    assert [one["name"] for one in operator.snapshots().result(LIMIT)] == ["cold"]


def test_power_up_and_the_network_of_a_tile(page: Browser, operator: Operator, tmp_path: Path) -> None:
    """A tile from power off to a network that was found, by clicking: also one that fails, and one that is aborted."""
    page.tab("configuration")
    page.wait_text(".board-control .facts", "generation")
    page.fill("tiles", "0", ".board-control")
    page.click("Power off", ".board-control")
    page.confirm("Power off")
    page.wait_text("#requests .latest", "power off: done")
    page.fill("VDDA DAC", "46000", ".board-control")
    page.fill("VDDD DAC", "31000", ".board-control")
    page.fill("limits of the power-up", "vdda_mv", ".board-control")
    page.click("Power up", ".board-control")
    page.wait_text("#requests .latest", "limits: expected vdda_ma=600 or vdda_mv=1700-1900, found vdda_mv")
    for limits, tiles, remark in (
        ("vdda_mv=1-100", "0 of 1 tile on", "above its limit of 100"),
        ("", "1 of 1 tile on", "on"),
    ):
        page.fill("limits of the power-up", limits, ".board-control")
        page.click("Power up", ".board-control")
        page.confirm("Power up")
        page.wait_text(".board-control .progress-line", tiles, READ)
        page.wait_text(".board-status table", remark)
        level = page.find(".board-control .progress-line").get_attribute("data-level")
        assert level == ("alarm" if limits else None)
    assert page.text(".board-status table tbody tr td:first-child") == "1"

    page.fill("shape", '{"rows": 2}', ".network")
    page.click("Find the network", ".network")
    page.confirm("Find the network")
    page.wait_text(".network .progress-line[data-level=alarm]", "shape")
    page.fill("shape", '{"rows": 2, "columns": 2, "roots": [11, 13]}', ".network")
    page.fill("New board file, on the producer's machine", str(tmp_path / "found.json"), ".network")
    page.click("Find the network", ".network")
    page.confirm("Find the network")
    page.wait_text(".network .facts", "4 chips on 1 tile", READ)
    assert page.text(".network .progress-line") == "done"
    assert "all chips have their power-up configuration" in page.text(".network .facts")
    assert len(page.all(".network svg circle.chip")) == 4
    assert len(page.all(".network svg path.used")) == 4
    assert not page.button_exists("Abort", ".network")
    page.click("Bring up networks")
    page.confirm("Bring up networks")
    page.wait_text(".compare .facts", "every register that was read has its wanted value")
    assert json.loads((tmp_path / "found.json").read_text())["asic_version"] == "2b"

    page.fill("VDDA DAC", "60000", ".board-control")
    page.click("Power off", ".board-control")
    page.confirm("Power off")
    page.wait_text("#requests .latest", "power off: done")
    page.click("Power up", ".board-control")
    page.confirm("Power up")
    page.wait_text(".board-control .progress-line", "vdda DAC")
    page.click("Abort", ".board-control")
    page.confirm("Abort")
    page.wait_text(".board-control .progress-line[data-level=alarm]", "abort")
    until(lambda: operator.board_status().result(LIMIT)[0]["tiles"] == [], "the tile to be off")


def test_components_in_groups(page: Browser, line: System) -> None:
    """Components with modules are in groups that fold, the worst first; what is around them does not move."""

    def order() -> list[str]:
        found = [one.get_attribute("aria-label") for one in page.all(".components .group")]
        return [name for name in found if name.startswith("module")]  # other components are in a group of this host

    def places() -> list[float]:
        panels = [".components .groups", ".boards", ".log-panel", ".components .group:first-child > header"]
        return page.run("return arguments[0].map((one) => document.querySelector(one).offsetTop)", panels) + page.run(
            "return arguments[0].map((one) => document.querySelector(one).offsetHeight)", panels
        )

    def shown(module: str) -> list[str]:
        return [one.text for one in page.all(f".components .group[aria-label='{module}'] tbody td:first-child")]

    stores = [
        Actor(line.core, f"disk {number}", "storage", {"directory": SCRIPT}, {}, module=f"module {number % 3}")
        for number in range(9)
    ]
    with all_running(*stores):
        page.wait(lambda: order() == [f"module {number}" for number in range(3)], "the groups")
        before = places()
        assert len(page.all(".group[aria-label^=module] .members[hidden]")) == 3
        stores[5].status = storage_status(paused="no space left")
        page.wait(lambda: order() == ["module 2", "module 0", "module 1"], "the group with a problem first")
        page.wait(lambda: shown("module 2") == ["disk 5"], "the component with the problem")
        assert "PAUSED: disk 5 is not writing: no space left" in page.text(".group[aria-label='module 2'] tbody")
        header = page.text(".group[aria-label='module 2'] header").split("\n")
        assert header[:3] == ["module 2", "ALARM", "3 components alive"]
        page.wait_text("#problems", "module 2: 3 components alive; disk 5: ALARM")
        page.wait_text(".components .note", "of 4 groups with a problem")
        page.wait(lambda: page.find("#problems").is_displayed(), "the problems")
        after = places()
        assert after[4:] == before[4:]  # heights
        moved = {now - then for now, then in zip(after[:4], before[:4], strict=True)}
        assert len(moved) == 1, moved  # the line above moves all of the page alike
        page.click("Show 2 more", ".group[aria-label='module 2']")
        page.wait(lambda: shown("module 2") == ["disk 5", "disk 2", "disk 8"], "the whole group")
        page.click("module 1", ".components .groups")
        page.wait(lambda: shown("module 1") == ["disk 1", "disk 4", "disk 7"], "a group without a problem, unfolded")
        # Who points at the groups does not have them move away.
        page.run("""
            const box = document.querySelector(".components .groups");
            const point = () => box.dispatchEvent(new PointerEvent("pointermove"));
            point();
            window.pointing = setInterval(point, 500);
        """)
        stores[5].status = storage_status()
        stores[1].status = storage_status(paused="no space left")
        page.wait_text(".group[aria-label='module 1'] header", "ALARM")
        assert order() == ["module 2", "module 0", "module 1"]
        page.run("clearInterval(window.pointing)")
        page.wait(lambda: order()[0] == "module 1", "the order of now")
        page.click("Unfold all", ".components")
        page.wait(lambda: len(shown("module 0")) == 3, "all groups unfolded")
        page.click("Fold", ".components")
        page.wait(lambda: shown("module 1") == ["disk 1"], "all groups folded")
    page.wait(lambda: not page.find(".components .groups").is_displayed(), "a line for each component again")


def test_boards_and_alarms_in_groups(page: Browser, line: System) -> None:
    """Many boards and many alarms are in the groups of their components, and fold by the keyboard, too."""

    def boards(module: int, **changed: Any) -> list[dict[str, Any]]:
        names = {io_group: f"board {io_group}" for io_group in range(10 * module + 1, 10 * module + 8)}
        return [{"io_group": io_group, "name": name} | changed for io_group, name in names.items()]

    def header(panel: str, place: int) -> list[str]:
        return page.text(f"{panel} .group:nth-child({place}) > header").split("\n")

    def rows(panel: str, module: str) -> list[str]:
        return [one.text for one in page.all(f"{panel} .group[aria-label='{module}'] tbody tr")]

    info = {"stream": ["tcp://127.0.0.1:1", ""], "layout": 2, "asic": "2b", "source": "none"}
    producers = [
        Actor(
            line.core, f"boards {module}", "producer", info | {"epoch": module, "io_groups": []}, {},
            module=f"module {module}",
        )
        for module in (1, 2)
    ]  # fmt: skip
    disk = Actor(line.core, "disk", "storage", {"directory": "/data"}, {}, module="module 2")
    disk.status = storage_status()
    for module, producer in enumerate(producers, 1):
        producer.status = producer_status(boards=boards(module))
    with all_running(*producers, disk):
        page.wait(lambda: len(page.all(".boards .group")) == 3, "groups of boards: of two modules and of this host")
        assert [header(".boards", place)[:2] for place in (2, 3)] == [
            [f"module {module}", "7 boards connected"] for module in (1, 2)
        ]
        assert len(page.all(".boards .members[hidden]")) == 3
        assert not page.find(".alarm-panel .groups").is_displayed()
        height = page.run("return document.querySelector('.alarm-panel').offsetHeight")
        away, *others = boards(1, setup=[SCRIPT])
        producers[0].status = producer_status(boards=[*others, away | {"setup": [], "away_since": 1.0}])
        producers[1].status = producer_status(boards=boards(2, setup=[SCRIPT]))
        disk.status = storage_status(paused="no space left")

        page.wait(lambda: header(".boards", 1)[:2] == ["module 1", "ALARM"], "the worst boards first")
        assert header(".boards", 1)[2] == "7 boards: 1 NOT CONNECTED, 6 connected"
        assert header(".boards", 2)[:3] == ["module 2", "WARNING", "7 boards connected"]
        assert "board 11" in rows(".boards", "module 1")[0]
        assert [len(rows(".boards", f"module {module}")) for module in (1, 2)] == [7, 7]
        page.wait_text(".boards > header", "1 NOT CONNECTED")

        page.wait(
            lambda: (
                header(".alarm-panel", 1)[:3] == ["module 2", "ALARM", "1 alarm, 7 warnings"]
                and header(".alarm-panel", 2)[:3] == ["module 1", "WARNING", "7 warnings"]
            ),
            "the worst alarms first",
        )
        assert header(".alarm-panel", 1)[3] == "PAUSED: disk is not writing: no space left"
        assert page.run("return document.querySelector('.alarm-panel').offsetHeight") == height
        page.run("document.querySelector('.alarm-panel .groups').focus()")
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        toggle = page.driver.switch_to.active_element
        assert toggle.text == "module 2"
        for expanded, number in (("true", 8), ("false", 0), ("true", 8)):
            toggle.send_keys(Keys.ENTER)
            assert toggle.get_attribute("aria-expanded") == expanded
            shown = [row for row in rows(".alarm-panel", "module 2") if row]
            assert len(shown) == number
            assert toggle == page.driver.switch_to.active_element
        page.click("Acknowledge", ".alarm-panel .group[aria-label='module 2']")
        page.confirm("Acknowledge")
        page.wait(
            lambda: any("7 warnings, 1 acknowledged" in header(".alarm-panel", place) for place in (1, 2, 3)),
            "the acknowledged alarm",
        )
        assert len(rows(".alarm-panel", "module 2")) == 8
        page.click("Unfold all", ".alarm-panel")
        page.wait(lambda: len(rows(".alarm-panel", "module 1")) == 7, "all groups unfolded")
    page.wait(lambda: not page.find(".boards .groups").is_displayed(), "a line for each board again")


def test_chromium_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import web_browser

    monkeypatch.setenv("PATH", os.fspath(Path("/nonexistent")))
    assert web_browser.missing() == "chromium is not installed: apt-get install chromium"
