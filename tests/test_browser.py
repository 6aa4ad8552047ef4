"""Pages and the demo in a real browser, without a screen: nothing is missing, nothing complains, and sound plays."""

import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from build_page import build_page
from conftest import ROOT, TINY
from pages import card, cards, write_page
from playwright.sync_api import sync_playwright
from test_study import Played, whole, written

from llama_mimi.audio.reading import read_audio
from llama_mimi.study.config import read_study

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HEARD = "[...document.querySelectorAll('audio')].map(a => [a.currentTime, a.duration, a.error && a.error.message])"


@contextmanager
def opened(width):
    """A page of a browser, and what it complains about."""
    assert CHROMIUM, "these tests need Chromium: apt-get install chromium"
    complaints = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        # What the page itself ends, such as a stream that it has heard, is "aborted".
        page.on(
            "requestfailed",
            lambda request: (
                "ERR_ABORTED" in str(request.failure) or complaints.append(f"{request.url}: {request.failure}")
            ),
        )
        yield page, complaints
        browser.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_opens_from_a_disk_and_plays(tmp_path, width):
    samples_S = read_audio(TINY / "prompt.wav", 24_000).samples_S
    clips = [card(f"clip {number}", samples_S, 24_000, ["said"], 0.5) for number in range(5)]
    write_page(tmp_path / "a.html", "A page", [cards(clips)])
    with opened(width) as (page, complaints):
        page.goto(f"file://{tmp_path}/a.html")
        page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth)")
        lengths = page.evaluate("[...document.querySelectorAll('audio')].map(a => a.duration)")
        assert lengths == pytest.approx([len(samples_S) / 24_000] * 5, abs=0.1)  # frames of MP3
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        columns = page.evaluate("new Set([...document.querySelectorAll('.card')].map(c => c.offsetLeft)).size")
        assert columns == (1 if width == 360 else 4)
        page.keyboard.press("Tab")  # the first player, by the keyboard alone
        assert page.evaluate("document.activeElement.tagName") == "AUDIO"
        page.keyboard.press("Space")
        page.wait_for_function("document.querySelector('audio').currentTime > 0.3")
        assert complaints == []


def test_a_study_opens_from_a_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(written(tmp_path))
    whole(Played(study))
    build_page(page=study.output_dir / "page.html", study=study.path)
    with opened(360) as (page, complaints):
        for width in (360, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(f"file://{study.output_dir}/page.html")
            page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth)")
            assert page.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll by themselves
            assert page.locator("table").count() == 5
        page.get_by_label("SALMon speaker consistency (n = 20), flattened, 40 steps: 5").click()
        assert page.url.endswith("results/salmon/flattened-tiny-q4-uniform-40-seed5/official.json")
        assert complaints == []


def test_the_demo_plays_before_it_is_done(model_folder, tmp_path):
    """A prompt is uploaded, and sound of the continuation is heard while it is still being made."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "scripts" / "demo.py", "--model_name", model_folder, "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while "Running on local URL" not in (tmp_path / "log").read_text():
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        with opened(1280) as (page, complaints):
            page.goto(f"http://127.0.0.1:{port}")
            page.set_input_files("input[type=file]", TINY / "prompt.wav")
            page.get_by_label("Trim audio to selection").wait_for()  # of a prompt that has arrived
            page.get_by_role("button", name="Continue").click()
            page.wait_for_function(f"{HEARD}.some(([at]) => at > 0.2)", timeout=90_000)
            before = page.locator("#state textarea").input_value()
            assert "new after" in before and "The end" not in before, before
            page.wait_for_function(
                "document.querySelector('#state textarea').value.includes('The end')", timeout=120_000
            )
            state = page.locator("#state textarea").input_value()
            first, last = (float(re.search(rf"{text} ([\d.]+) s", state)[1]) for text in ("sent after", "new after"))
            assert first < last
            tokens = page.locator("#tokens textarea").input_value().splitlines()
            assert len(tokens) == 24 and all(re.fullmatch(r"(<\d+_0><\d+_1><\d+_2><\d+_3>)", line) for line in tokens)
            assert page.locator("img").count() >= 1 and complaints == []
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_tensors_that_are_not_speech_make_a_page(tmp_path):
    for number, samples_S in enumerate((torch.zeros(240), torch.ones(24_000) * 2, torch.rand(24_000 * 61))):
        write_page(tmp_path / f"{number}.html", "odd", [card("x", samples_S, 24_000)])
