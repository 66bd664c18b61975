"""The page in a real browser: a file in, words with times and confidence, corrections, downloads, recording, faults."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from running import FakeModel, Running, numbered, serving, wait_until, wav
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=900,900",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
    "--disable-features=DialMediaRouteProvider,OptimizationHints",
)


class Page:
    """The page, opened in a browser."""

    def __init__(self, driver: webdriver.Chrome, running: Running, downloads: Path) -> None:
        self.driver, self.running, self.downloads = driver, running, downloads

    def open(self, language: str = "en") -> None:
        getter = f"{{configurable: true, get: () => '{language}'}}"
        source = f"Object.defineProperty(navigator, 'language', {getter})"
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
        self.driver.get(self.running.url)
        self.faults()  # those of the tests before
        self.wait(lambda: self.one("#model").text == "mini")

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition: Callable[[], bool]) -> None:
        wait_until(condition)

    def send(self, path: Path) -> None:
        self.one("#file").send_keys(str(path))

    def send_and_wait(self, path: Path) -> None:
        self.send(path)
        self.wait(lambda: self.one("#status").text.startswith("Done"))

    def saved(self, kind: str) -> str:
        self.one(f"[data-save={kind}]").click()
        path = self.downloads / f"speech.{kind}"
        self.wait(path.exists)
        return path.read_text(encoding="utf-8")

    def faults(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(FakeModel()) as running:
        yield running


@pytest.fixture(scope="module")
def page(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    tmp_path = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    try:
        yield Page(driver, running, downloads)
    finally:
        driver.quit()


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    path.write_bytes(wav(numbered(5, 2.5)))
    return path


def test_a_file_is_shown_corrected_and_saved(page: Page, sound: Path) -> None:
    page.open()
    page.send_and_wait(sound)
    assert [text.text for text in page.all(".text")] == ["5番。"] * 3
    assert [time.text for time in page.all(".time")][1] == "00:01.0 – 00:02.0"
    words = page.all(".text span")
    assert [(word.text, word.get_attribute("class")) for word in words[:2]] == [("5", "high"), ("番", "low")]
    assert words[1].get_attribute("title") == "00:00.50 · sure: 40 %"

    words[3].click()  # 番 of the second segment
    page.wait(lambda: page.driver.execute_script("return document.getElementById('player').currentTime") >= 1.5)

    last = page.all(".text")[2]
    last.send_keys(Keys.END, Keys.ARROW_LEFT, "目")
    assert [word.get_attribute("class") for word in last.find_elements(By.TAG_NAME, "span")] == ["high", "high"]
    last.send_keys(Keys.BACKSPACE)

    second = page.all(".text")[1]
    second.send_keys(Keys.CONTROL, "a")
    second.send_keys("第五番 <b>、", Keys.ENTER, "です")
    colours = "return [...arguments[0].querySelectorAll('*')].map((e) => getComputedStyle(e).color)"
    plain = page.driver.execute_script("return getComputedStyle(arguments[0]).color", second)
    assert set(page.driver.execute_script(colours, second)) <= {plain}
    assert page.saved("txt") == "5番。\n第五番 <b>、です\n5番。\n"
    assert "2\n00:00:01,000 --> 00:00:02,000\n第五番 <b>、です\n\n3\n" in page.saved("srt")
    vtt = page.saved("vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n5番。\n\n")
    assert "第五番 &lt;b&gt;、です" in vtt
    record = json.loads(page.saved("json"))
    assert (record["text"], record["duration_s"]) == ("5番。第五番 <b>、です5番。", 2.5)
    assert [segment["flags"] for segment in record["segments"]] == [[], ["corrected"], ["corrected"]]
    assert [len(segment["words"]) for segment in record["segments"]] == [2, 0, 0]
    assert page.faults() == []


def test_the_page_speaks_japanese(page: Page, sound: Path) -> None:
    page.open("ja-JP")
    assert page.one("html").get_attribute("lang") == "ja"
    assert page.one("#record").text == "録音"
    page.send(sound)
    page.wait(lambda: page.one("#status").text.endswith("秒で終わりました。"))
    assert page.one("#result-title").text == "文字起こし"
    assert page.one("#segments").get_attribute("lang") == "ja"


def test_a_recording_is_sent_as_wav(page: Page) -> None:
    page.open()
    page.one("#record").send_keys(Keys.SPACE)  # by keyboard
    page.wait(lambda: page.one("#record").get_attribute("aria-pressed") == "true")
    page.wait(lambda: "1 s" in page.one("#status").text)
    page.one("#record").click()
    page.wait(lambda: page.one("#status").text.startswith(("Done", "No speech")))
    assert page.one("#record").get_attribute("aria-pressed") == "false"
    assert page.all("li")
    assert page.faults() == []


def test_what_the_server_does_not_read_is_unpacked_in_the_page(page: Page, sound: Path) -> None:
    page.open()
    page.send_and_wait(sound.rename(sound.with_suffix(".bin")))
    assert [text.text for text in page.all(".text")] == ["5番。"] * 3
    nothing = sound.with_name("b.m4a")
    nothing.write_bytes(b"no sound")
    page.send(nothing)
    page.wait(lambda: page.one("#status").text == "This file cannot be read as a sound.")
    assert not page.one("#result").is_displayed()


def test_refusals_are_shown(page: Page, sound: Path) -> None:
    page.open()
    sound.write_bytes(sound.read_bytes()[:1000])
    page.send(sound)
    page.wait(lambda: "is cut short" in page.one("#status").text)
    assert page.one("#status").get_attribute("class") == "error"
    assert not page.one("#cancel").is_displayed()


def test_a_silent_sound_and_one_that_is_cancelled(page: Page, sound: Path) -> None:
    page.open()
    silent = sound.with_name("silent.wav")
    silent.write_bytes(wav(numbered(0)))
    page.send(silent)
    page.wait(lambda: page.one("#status").text == "No speech was found.")
    assert page.one(".flags").text == "no speech"
    model = page.running.service.batches._recognizer
    assert isinstance(model, FakeModel)
    model.gate.clear()
    page.send(sound)
    page.wait(lambda: page.running.service.places.taken == 1)
    page.one("#cancel").click()
    page.wait(lambda: page.one("#status").text == "Cancelled.")
    page.running.wait_free()
    model.gate.set()
    page.send_and_wait(sound)


def test_a_file_can_be_dropped_on_the_page(page: Page) -> None:
    page.open()
    numbers = list(wav(numbered(9, 0.5)))
    page.driver.execute_script(
        "const data = new DataTransfer(); data.items.add(new File([new Uint8Array(arguments[0])], 'speech.wav'));"
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));",
        numbers,
    )
    page.wait(lambda: any(text.text for text in page.all(".text")))
    assert [text.text for text in page.all(".text")] == ["9番。"]


def test_every_control_has_a_name_and_the_keyboard_reaches_all(page: Page, sound: Path) -> None:
    page.open()
    page.send_and_wait(sound)
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = {"button", "textbox", "progressbar"}
    named = [
        (node["role"]["value"], node.get("name", {}).get("value"))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in controls
    ]
    assert ("button", "Play from 00:01.0") in named
    assert ("textbox", "Text from 00:01.0") in named
    assert ("textbox", "Words to listen for (names, terms), with blanks between") in named
    assert all(name for _, name in named), named
    reached = set()
    for _ in range(40):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        element = page.driver.switch_to.active_element
        reached.add(element.get_attribute("id") or element.get_attribute("class") or element.text)
    assert {"record", "file", "words", "player", "time", "text", "copy", "txt"} <= reached
