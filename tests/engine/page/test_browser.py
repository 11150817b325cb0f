"""The page in a browser: headless Chromium, where it is installed."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from engine import report
from tests.engine.page.test_page import run_folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("BOOSTERBIT_NEED_CHROMIUM"), reason="Chromium is not installed"
)
BY_HAND = Path(__file__).with_name("by_hand.js")


def chromium(tmp_path, page, *options):
    """Standard output, and the lines of the console."""
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--no-first-run", "--enable-logging=stderr", "--virtual-time-budget=2000",
             f"--user-data-dir={tmp_path}/profile"]  # fmt: skip
    done = subprocess.run([*words, *options, page.as_uri()], capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    place = tmp_path_factory.mktemp("page")
    runs = [run_folder(place / name, steps) for name, steps in (("a", 20), ("b", 10))]
    report.main(["page", *map(str, runs), "--out", str(place / "page.html"), "--no-inputs"])
    return place / "page.html"


def test_it_says_nothing_on_the_console_asks_for_nothing_and_answers_keys_and_pointer(page, tmp_path):
    handled = tmp_path / "handled.html"
    handled.write_text(page.read_text().replace("</body>", f"<script>{BY_HAND.read_text()}</script></body>"))
    shown, console = chromium(tmp_path, handled, "--dump-dom", "--window-size=1280,900")
    assert console == []
    said = json.loads(re.search(r'<pre id="said">(.*?)</pre>', shown)[1])
    assert said["whole"] == [[20, 10], [4, 2], [4, 2], [20, 10], [20, 10]]  # points of the lines of each chart
    assert said["end"] == "a: 0.1 at 20; b: 0.2 at 10"  # the loss is 2 / step
    assert said["left"] == "a: 0.1053 at 19; b: 0.2 at 10"
    assert said["zoomed"][0] == [7, 1]  # steps 14.25 to 20, and the one before; the other line ends before it
    assert said["zoomed"][3][0] == 7  # with the others
    assert said["escape"] == said["button"] == said["whole"]
    assert said["dragged"][0] == [11, 10]  # steps 1 to 10.5, and the one after
    assert said["hidden"] == [[20], [4], [4], [20], [20]]
    assert [address for address in said["loaded"] if not address.startswith("data:")] == []


@pytest.mark.parametrize("wide", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_is_drawn_in_light_and_dark(page, tmp_path, wide, dark):
    framed = tmp_path / "framed.html"  # a window is never as narrow as a telephone, a frame in it is
    inner = page.read_text().replace(
        "</body>", "<script>parent.postMessage(document.body.scrollWidth, '*')</script></body>"
    )
    (tmp_path / "page.html").write_text(inner)
    framed.write_text(
        f'<body style="margin:0"><iframe src="page.html" style="border:0" width={wide} height=1500></iframe>'
        "<script>onmessage = (e) => { document.body.dataset.wide = e.data; }</script>"
    )
    how = [f"--window-size={max(wide, 500)},1500", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    shown, _ = chromium(tmp_path, framed, "--dump-dom", *how)
    assert int(re.search(r'data-wide="(\d+)"', shown)[1]) <= wide  # nothing but tables is scrolled sideways
    chromium(tmp_path, framed, f"--screenshot={tmp_path}/shot.png", *how)
    shot = Image.open(tmp_path / "shot.png").convert("RGB").crop((0, 0, wide, 1500))
    assert (sum(shot.getpixel((2, 2))) < 150) == dark
    lines = {(86, 180, 233), (255, 140, 66)} if dark else {(0, 114, 178), (213, 94, 0)}
    assert lines <= {colour for _, colour in shot.getcolors(1 << 24)}  # of both runs, as the style has them
