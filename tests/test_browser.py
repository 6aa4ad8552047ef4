"""Pages and the demo in a headless browser: everything loads without errors, and audio plays."""

import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT, TINY
from playwright.sync_api import sync_playwright

from llama_mimi.audio.reading import read_audio
from llama_mimi.report.document import Picture, Section, Table, pyplot, save_picture, write_html
from llama_mimi.report.pages import make_clip

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def opened(width):
    """Yield a browser page and the list of its errors."""
    assert CHROMIUM, "these tests need Chromium: apt-get install chromium"
    errors, failures = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: failures.append(f"{request.url}: {request.failure}"))
        yield page, errors
        # If the page ends a request itself, for example after a stream, it is "aborted".
        assert all("ERR_ABORTED" in failure for failure in failures)
        browser.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_opens_from_a_disk(tmp_path, width):
    """Audio is on the first screen and plays. Nothing is cut off, and names of metrics stay visible."""
    samples_S = read_audio(TINY / "prompt.wav", 24_000).samples_S
    clips = [make_clip(f"clip {number}", samples_S, 24_000, ["text"], 0.5) for number in range(5)]
    figure, axes = pyplot().subplots()
    axes.set_ylabel("a label\n" * 8)
    table = Table(["measure", *["a column with a heading"] * 5], [["perplexity", *["55.1 (50.2 to 60.3)"] * 5]])
    report = Section("Report", ["a" * 200], [Picture("a.png", save_picture(figure), "curves")], [table])
    write_html("A page", [Section("Clips", clips=clips), report, Section("Notes")], tmp_path / "a.html")
    with opened(width) as (page, errors):
        page.goto(f"file://{tmp_path}/a.html")
        page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth)")
        lengths = page.evaluate("[...document.querySelectorAll('audio')].map(a => a.duration)")
        assert lengths == pytest.approx([len(samples_S) / 24_000] * 5, abs=0.1)  # MP3 frames
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        columns = page.evaluate("new Set([...document.querySelectorAll('.card')].map(c => c.offsetLeft)).size")
        assert columns == (1 if width == 390 else 4)
        assert page.evaluate("document.querySelector('audio').getBoundingClientRect().bottom") < 844
        page.evaluate("document.querySelector('.wide').scrollLeft = 10000")
        name = page.get_by_role("rowheader", name="perplexity").bounding_box()
        assert 0 <= name["x"] and name["width"] > 50
        page.get_by_role("link", name="Report").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("scrollY") > 0
        page.locator("audio").first.focus()
        page.keyboard.press("Space")  # play with the keyboard only
        page.wait_for_function("document.querySelector('audio').currentTime > 0.3")
        assert errors == []


def test_the_demo_plays_before_it_is_done(model_folder, tmp_path):
    """A prompt is uploaded, and the continuation plays while it is still being generated."""
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
        with opened(1280) as (page, errors):
            page.goto(f"http://127.0.0.1:{port}")
            page.set_input_files("input[type=file]", TINY / "prompt.wav")
            page.get_by_label("Trim audio to selection").wait_for()  # the prompt was uploaded
            page.get_by_role("button", name="Continue").click()
            is_playing = "[...document.querySelectorAll('audio')].some(audio => audio.currentTime > 0.2)"
            page.wait_for_function(is_playing, timeout=90_000)
            before = page.locator("#state textarea").input_value()
            assert "of new audio after" in before and "stopped" not in before, before
            is_done = "document.querySelector('#state textarea').value.includes('Generation stopped')"
            page.wait_for_function(is_done, timeout=120_000)
            state = page.locator("#state textarea").input_value()
            first, last = (float(re.search(rf"{text} audio after ([\d.]+) s", state)[1]) for text in ("first", "new"))
            assert first < last
            assert errors == []
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_tensors_that_are_not_speech_make_a_page(tmp_path):
    odd = (torch.zeros(240), torch.ones(24_000) * 2, torch.rand(24_000 * 61))
    write_html("odd", [Section("odd", clips=[make_clip("x", samples_S, 24_000) for samples_S in odd])], tmp_path / "a")
