"""demo.py's page in a real browser: `pytest -m browser`, with playwright (PyPI) and Debian's chromium."""

import shutil
import subprocess
import tarfile
import time

import pytest
from test_demo import serving

from config import ROOT

pytestmark = pytest.mark.browser
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# red minus blue over the picture, and a number that another picture changes
LOOK = """() => {
  const canvas = document.getElementById("video");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let tint = 0, sum = 0;
  for (let i = 0; i < data.length; i += 4) {
    tint += data[i] - data[i + 2];
    sum = (31 * sum + data[i] + 7 * data[i + 1]) % 1000003;
  }
  return { tint: tint / data.length, sum };
}"""


@pytest.fixture(scope="module")
def port():
    with serving(ROOT / "assets" / "tiny") as (port, _):
        yield port


@pytest.fixture
def open_page(browser, port):
    """A page that streams. What it asks of other machines, and what it complains of, is a failure."""
    opened, wrong = [], []

    def open_page(size=DESKTOP, at=None, **how):
        page = browser.new_context(viewport=size, **how).new_page()
        opened.append(page)
        own = f"//127.0.0.1:{at or port}/"
        page.on("request", lambda r: own in r.url or r.url[:5] in ("blob:", "data:") or wrong.append(r.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"http://127.0.0.1:{at or port}/")
        return page

    yield open_page
    for page in opened:
        page.context.close()
    assert not wrong


def wait(page, condition, seconds=15):
    """Asked from outside: the page's policy forbids what playwright's own waiting would put into it."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"{condition}; it says: {page.inner_text('body')}"
        page.wait_for_timeout(50)


def says(page, words):
    wait(page, f"document.body.innerText.includes({words!r})")


def moves(page):
    """Frames come and differ."""
    wait(page, "document.getElementById('status').textContent === 'live'")
    before = page.evaluate(LOOK)["sum"]
    wait(page, f"({LOOK})().sum !== {before}")


def test_types_switches_looks_inside_and_saves(open_page):
    page = open_page()
    moves(page)
    wait(page, f"({LOOK})().tint > 2")
    page.fill("#prompt", "a blue circle moving left slowly on a black background")
    page.press("#prompt", "Enter")
    wait(page, f"({LOOK})().tint < -2")
    assert int(page.inner_text("#chunk")) > 1, "the stream began anew"
    page.click("text=green")
    wait(page, f"Math.abs(({LOOK})().tint) < 2")
    assert page.input_value("#prompt").startswith("a green circle")
    page.fill("#prompt", "a blue circl")
    page.press("#prompt", "Enter")
    says(page, "did you mean 'circle'?")
    for name in ("Saliency", "Time weight", "Memory", "Rewards"):
        page.click(f"button:text-is('{name}')")
    says(page, "attends to itself")
    wait(page, f"({LOOK})().tint > 2")  # the map is drawn in red and yellow
    page.wait_for_selector("#curve:visible")
    with page.expect_download() as download:
        page.click("text=Save the last")
    assert download.value.path().read_bytes()[4:8] == b"ftyp"


def test_a_clip_and_a_webcam_are_made_over(open_page, tmp_path):
    """At a low strength a red clip stays red in part though the prompt says blue; and not after it stops."""
    page = open_page()
    moves(page)
    wait(page, f"({LOOK})().tint > 2")
    with page.expect_download() as download:
        page.click("text=Save the last")
    download.value.save_as(tmp_path / "red.mp4")
    page.fill("#prompt", "a blue circle moving left slowly on a black background")
    page.press("#prompt", "Enter")
    wait(page, f"({LOOK})().tint < -2")
    page.fill("#strength", "0.1")
    page.set_input_files("#file", tmp_path / "red.mp4")
    says(page, "32 × 32 pixels of red.mp4")
    wait(page, f"({LOOK})().tint > -1")
    page.click("text=Stop")
    wait(page, f"({LOOK})().tint < -2")
    page.click("text=Webcam")
    says(page, "pixels of the webcam")
    moves(page)
    (tmp_path / "no.mp4").write_bytes(b"no clip")
    page.set_input_files("#file", tmp_path / "no.mp4")
    says(page, "No picture: ")
    assert page.inner_text("#webcam") == "Webcam" and page.inner_text("#clip") == "A clip"


def test_survives_a_reload_and_a_killed_server(open_page):
    with serving(ROOT / "assets" / "tiny") as (own, _):
        page = open_page(at=own)
        moves(page)
        page.reload()
        moves(page)
        reached = int(page.inner_text("#chunk"))
    says(page, "trying again")
    assert page.inner_text("#status") != "live"
    with serving(ROOT / "assets" / "tiny", port=own):
        moves(page)
        assert int(page.inner_text("#chunk")) <= reached, "a new server begins a new stream"


def test_two_tabs_and_a_third_in_line(open_page):
    one, two, three = open_page(), open_page(), open_page()
    moves(one), moves(two)
    says(three, "place 1 in line")
    assert three.inner_text("#status") != "live" and one.inner_text("#status") == "live"
    one.close()
    moves(three)
    assert "in line" not in three.inner_text("body")


def test_keyboard_alone(open_page):
    """Tab reaches everything that can be pressed, in an order, and shows where it is."""
    page = open_page()
    moves(page)
    count = page.locator("button:visible, input:visible, select:visible").count()
    seen = []
    for _ in range(count):
        page.keyboard.press("Tab")
        at = page.evaluate("[document.activeElement.id || document.activeElement.textContent, "
                           "getComputedStyle(document.activeElement).outlineStyle]")  # fmt: skip
        seen.append(at[0])
        assert at[1] != "none", f"{at[0]} does not show that it is chosen"
    assert len(set(seen)) == count
    page.focus("#prompt")
    page.keyboard.press("Control+a")
    page.keyboard.type("a blue square moving up")
    page.keyboard.press("Enter")
    wait(page, f"({LOOK})().tint < -2")
    page.focus("#pause")
    page.keyboard.press("Space")
    says(page, "paused")
    page.wait_for_timeout(300)
    still = page.evaluate(LOOK)
    page.wait_for_timeout(500)
    assert page.evaluate(LOOK) == still


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    if not shutil.which("npm"):
        pytest.skip("no npm, which axe-core is fetched with")
    folder = tmp_path_factory.mktemp("axe")
    fetched = subprocess.run(["npm", "pack", "--silent", "axe-core@4.14.1"], cwd=folder, capture_output=True)
    if fetched.returncode:
        pytest.skip("npm pack axe-core failed: no registry?")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


@pytest.mark.parametrize("size, scheme", [(DESKTOP, "dark"), (PHONE, "light")])
def test_accessible_and_no_wider_than_the_screen(open_page, axe, size, scheme):
    """axe-core finds nothing serious, with everything switched on; a phone scrolls up and down alone."""
    page = open_page(size, color_scheme=scheme, bypass_csp=True)
    moves(page)
    for name in ("Saliency", "Memory", "Rewards"):
        page.click(f"button:text-is('{name}')")
    page.fill("#prompt", "xyz " * 45)
    page.press("#prompt", "Enter")
    says(page, "unknown word")
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    assert not [
        (f["id"], [n["html"] for n in f["nodes"]]) for f in found if f["impact"] in ("serious", "critical")
    ]
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
