"""A real browser without a screen and without a network, driven by Selenium: Debian's chromium and its driver."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import LIMIT, until
from selenium import webdriver
from selenium.common.exceptions import JavascriptException, NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

#: Programs that a browser needs, and the packages of Debian that have them.
PROGRAMS = {"chromium": "chromium", "chromedriver": "chromium-driver"}


def missing() -> str:
    """Return one line that names the package of a missing program; "" when all are there."""
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            return f"{program} is not installed: apt-get install {package}"
    return ""


class Browser:
    """A page of a web server, and what a person does with it."""

    def __init__(self, driver: webdriver.Chrome, link: str) -> None:
        self.driver = driver
        self.origin = link.partition("/login")[0]
        driver.get(link)
        self._await_state()

    def reload(self) -> None:
        self.run("window.old = true")
        self.driver.refresh()
        self.wait(lambda: not self.run("return window.old"), "the page to be loaded again")
        self._await_state()

    def _await_state(self) -> None:
        self.wait(lambda: self.text("#state-word") not in ("", "…", "UNKNOWN"), "the state in the page")

    # Looking.

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Return the text of an element as a person sees it; "" if there is none."""
        try:
            return self.find(selector).text
        except (NoSuchElementException, StaleElementReferenceException):
            return ""

    def wait(self, condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
        """Wait for a condition of the page, which may change while it is looked at. Returns its value."""

        def looked() -> Any:
            try:
                return condition()
            except (NoSuchElementException, StaleElementReferenceException, JavascriptException):
                return None

        return until(looked, what, limit)

    def wait_text(self, selector: str, part: str, limit: float = LIMIT) -> str:
        """Wait until an element has this part in its text. Returns the text."""
        try:
            self.wait(lambda: part in self.text(selector), f"{part!r} in {selector}", limit)
        except AssertionError as error:
            raise AssertionError(f"{error}; it shows {self.text(selector)!r}") from None
        return self.text(selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def canvas_colour(self, selector: str, x: float, y: float) -> list[int]:
        """Return red, green, blue and alpha of a canvas at a point, in CSS pixels."""
        script = """
            const canvas = document.querySelector(arguments[0]);
            const ratio = canvas.width / canvas.clientWidth;
            const context = canvas.getContext("2d");
            const [x, y] = [arguments[1], arguments[2]].map((place) => Math.floor(place * ratio));
            return [...context.getImageData(x, y, 1, 1).data];
        """
        colour: list[int] = self.run(script, selector, x, y)
        return colour

    def picture(self, selector: str) -> bytes:
        """Return the picture (PNG) of an element as it is on the screen."""
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        return element.screenshot_as_png

    # Doing.

    def button(self, text: str, within: str = "body") -> WebElement:
        """Return the visible button with this text, which may end in "…"."""
        for element in self.all(f"{within} button"):
            if element.text.rstrip("…") == text.rstrip("…") and element.is_displayed():
                return element
        raise NoSuchElementException(f"no button {text!r} in {within}")

    def button_exists(self, text: str, within: str = "body") -> bool:
        """Return whether there is a visible button with this text."""
        try:
            self.button(text, within)
        except (NoSuchElementException, StaleElementReferenceException):
            return False
        return True

    def click(self, text: str, within: str = "body") -> None:
        """Click a button, once it can be clicked."""

        def clicked() -> bool:
            element = self.button(text, within)
            if not element.is_enabled():
                return False
            self.run("arguments[0].scrollIntoView({block: 'center'})", element)
            element.click()
            return True

        self.wait(clicked, f"the button {text!r} in {within}")

    def click_on(self, selector: str) -> None:
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def confirm(self, text: str) -> None:
        """Click a button of the open dialog."""
        self.wait(lambda: self.all("dialog[open]"), "a dialog")
        self.click(text, "dialog[open]")
        self.wait(lambda: not self.all("dialog[open]"), "the end of the dialog")

    def tab(self, name: str) -> None:
        self.find(f"#tab-{name}").click()
        self.wait(lambda: self.find(f"#panel-{name}").is_displayed(), f"the tab {name}")

    def fill(self, label: str, text: str, within: str = "body") -> WebElement:
        """Write a text into the field with this label."""

        def field() -> WebElement | None:
            for element in self.all(f"{within} label"):
                if element.text == label and element.is_displayed():
                    return self.find(f"#{element.get_attribute('for')}")
            return None

        entry: WebElement = self.wait(field, f"the field {label!r} in {within}")
        self.run("arguments[0].scrollIntoView({block: 'center'})", entry)
        if entry.get_attribute("type") != "file":
            entry.send_keys(Keys.CONTROL, "a")
            entry.send_keys(Keys.DELETE)
        entry.send_keys(text)
        return entry

    def choose(self, selector: str, value: str) -> None:
        """Choose the option with this value."""
        script = """
            const [list, value] = arguments;
            list.value = value;
            for (const name of ["input", "change"]) list.dispatchEvent(new Event(name, {bubbles: true}));
        """
        self.run(script, self.find(selector), value)

    def size(self, width: int, height: int) -> None:
        """Set the size of the page in CSS pixels, which may be larger than the screen."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def colours(self, scheme: str) -> None:
        """Set the colours of the system to "dark" or "light"."""
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    # What the browser has noted.

    def console(self) -> list[str]:
        """Return what was written to the console since the last call: also violations of the page's policy."""
        lines = [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]
        return [line for line in lines if "willReadFrequently" not in line]  # of canvas_colour()

    def requested(self) -> set[str]:
        """Return the addresses to which the page has made requests since the last call, also failed ones."""
        found = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.add(message["params"]["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                found.add(message["params"]["url"])
        return found


@contextmanager
def browsers(downloads: Path, width: int = 1280, height: int = 900) -> Iterator[Callable[[str], Browser]]:
    """Yield a function that opens a browser of its own, with its own cookies, at a link. All are closed at the end."""
    if problem := missing():
        pytest.fail(problem)
    opened: list[webdriver.Chrome] = []

    def open_browser(link: str) -> Browser:
        driver = make_driver(width, height, downloads)
        opened.append(driver)
        return Browser(driver, link)

    try:
        yield open_browser
    finally:
        for driver in opened:
            driver.quit()


def make_driver(width: int, height: int, downloads: Path) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in (
        "--headless=new",
        "--no-sandbox",  # root has none
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
        "--disable-features=Translate,OptimizationHints,MediaRouter",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
        "--force-device-scale-factor=1",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.page_load_strategy = "none"  # the page of the log-in goes on to another one by itself
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(LIMIT)
    driver.set_page_load_timeout(LIMIT)
    return driver
