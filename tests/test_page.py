"""The page in headless Chromium: sliders, buttons and the picture, against faces drawn independently of the server."""
import base64
import io
import os
import queue
import shutil
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image
from soak import PATIENCE
from test_server import BASE, CPU, FILES, oracle, picture, same, serving, vivid_copy

import gan

MS = PATIENCE * 1000
PIXELS = """image => { const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext('2d').drawImage(image, 0, 0);
    return canvas.toDataURL().split(',')[1]; }"""


class Watched(gan.Site):
    """A site whose /generate requests a test can watch and hold up."""

    def __init__(self, run: Path):
        super().__init__(run, None, CPU)
        self.asked, self.gate, self.inside, self.most = queue.Queue(), threading.Event(), 0, 0
        self.gate.set()

    def respond(self, method: str, target: str) -> gan.Response:
        if not target.startswith("/generate"):
            return super().respond(method, target)
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.asked.put(target)
        assert self.gate.wait(PATIENCE)
        self.inside -= 1
        return super().respond(method, target)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; without it the tests are skipped, or fail where CI must have it."""
    missing = pytest.fail if os.environ.get("CI") else pytest.skip
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        missing("Chromium is not installed")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright, which drives Chromium, is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--no-first-run", "--force-color-profile=srgb"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    return vivid_copy(trained, tmp_path_factory.mktemp("vivid"))


@pytest.fixture(scope="module")
def server(run):
    with serving(Watched(run)) as server:
        yield server


@pytest.fixture
def page(browser, server):
    """A fresh page that shows the face of BASE; it must log no error and ask no other host."""
    server.site.asked, server.site.most = queue.Queue(), 0
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(MS)
    page = context.new_page()
    page.trouble = []
    page.on("console", lambda message: message.type in ("error", "warning") and page.trouble.append(message.text))
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("request", lambda request: request.url.startswith((server.url, "blob:", "data:")) or page.trouble.append(request.url))
    page.goto(server.url + link(BASE))
    page.wait_for_selector("#face[src]")
    yield page
    server.site.gate.set()
    context.close()
    assert page.trouble == []


# ---- what a user sees ----

def link(values) -> str:
    """The address part of a vector: two base-36 digits a number, hundredths above -3."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return "#z=" + "".join(digits[n // 36] + digits[n % 36] for n in (round((v + 3) * 100) for v in values))


def in_link(url: str) -> list[float]:
    digits = parse_qs(urlsplit(url).fragment)["z"][0]
    return [int(digits[i:i + 2], 36) / 100 - 3 for i in range(0, 256, 2)]


def await_shown(page, values, checkpoint="last") -> None:
    """Wait until the address bar holds this vector: the page writes there what it shows."""
    page.wait_for_url(lambda url: np.allclose(in_link(url), values) and url.endswith(f"&c={checkpoint}"))


def seen(page) -> np.ndarray:
    """The picture on the screen, from its pixels."""
    body = base64.b64decode(page.locator("#face").evaluate(PIXELS))
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)


def shows(page, path: Path, values) -> bool:
    """Whether the picture on the screen is this checkpoint's face, four times as large."""
    face = Image.fromarray(oracle(path, values).astype(np.uint8)).resize((128, 128), Image.Resampling.BICUBIC)
    return same(seen(page), np.asarray(face).astype(int), levels=2)


def asked(page, server) -> list[tuple[list[float], str]]:
    """Vector and checkpoint of every /generate request since the last look."""
    found = []
    while not server.site.asked.empty():
        query = parse_qs(urlsplit(server.site.asked.get()).query)
        found.append(([float(v) for v in query["values"][0].split(",")], query["checkpoint"][0]))
    return found


def sliders(page) -> list[float]:
    return page.locator("input[type=range]").evaluate_all("all => all.map(one => one.valueAsNumber)")


def boxes(page) -> list[float]:
    return page.locator("input[type=number]").evaluate_all("all => all.map(one => one.valueAsNumber)")


def changed(*changes: tuple[int, float]) -> list[float]:
    values = list(BASE)
    for i, value in changes:
        values[i] = value
    return values


# ---- tests ----

def test_page_has_128_sliders_and_boxes(page):
    """Sliders s0..s127 and boxes n0..n127, in order, from -3 to 3."""
    for kind, prefix in (("range", "s"), ("number", "n")):
        found = page.locator(f"input[type={kind}]").evaluate_all("all => all.map(one => [one.id, one.min, one.max])")
        assert found == [[f"{prefix}{i}", "-3", "3"] for i in range(128)]


def test_link_restores_face_and_vector(page, server, run):
    """A link shows its vector in sliders, boxes, request and picture."""
    assert asked(page, server) == [(BASE, "last")]
    assert sliders(page) == boxes(page) == BASE
    assert shows(page, run / "last.pt", BASE)


@pytest.mark.parametrize("bad", ["", "#z=00", "#z=" + "zz" * 128, "#z=" + "<>" * 128])
def test_without_a_valid_link_a_random_face_is_shown(page, server, run, bad):
    """With no link, or one that holds no vector, the page starts with a random one."""
    page.goto("about:blank")
    asked(page, server)
    page.goto(server.url + bad)
    page.wait_for_selector("#face[src]")
    (values, _), = asked(page, server)
    assert np.std(values) > 0.5 and sliders(page) == values
    assert shows(page, run / "last.pt", values)


@pytest.mark.parametrize("i", [0, 57, 127])
def test_slider_i_is_number_i(page, server, run, i):
    """Moving slider i changes number i of the request and no other, and the picture as z[i] does."""
    before = seen(page)
    asked(page, server)
    page.locator(f"#s{i}").fill("2.75")
    await_shown(page, changed((i, 2.75)))
    assert asked(page, server) == [(changed((i, 2.75)), "last")] and boxes(page) == changed((i, 2.75))
    assert shows(page, run / "last.pt", changed((i, 2.75))) and not same(seen(page), before)


def test_dragging_a_slider(page, server, run):
    """Dragging with the mouse moves the number to where the thumb is; at the right end it is 3."""
    slider = page.locator("#s5")
    slider.scroll_into_view_if_needed()
    at = slider.bounding_box()
    middle = at["y"] + at["height"] / 2
    asked(page, server)
    page.mouse.move(at["x"] + at["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(at["x"] + at["width"] * 0.8, middle, steps=5)
    assert 1 < sliders(page)[5] < 3
    page.mouse.move(at["x"] + at["width"], middle, steps=5)
    page.mouse.up()
    await_shown(page, changed((5, 3)))
    requests = asked(page, server)
    assert requests[-1] == (changed((5, 3)), "last")
    assert all(changed((5, values[5])) == values for values, _ in requests)
    assert shows(page, run / "last.pt", changed((5, 3)))


def test_number_boxes(page):
    """A number typed into box i moves slider i, clamped to the limits; what is no number changes nothing."""
    values = list(BASE)
    for i, (typed, value) in enumerate([("1.25", 1.25), ("-0.5", -0.5), ("99", 3), ("-3.004", -3), ("1e0", 1), ("", None),
                                        ("-", None)], start=60):
        box = page.locator(f"#n{i}")
        box.fill("")
        box.press_sequentially(typed)
        box.press("Enter")
        box.blur()
        values[i] = BASE[i] if value is None else value
        await_shown(page, values)
        assert sliders(page) == boxes(page) == values


def test_random_and_reset(page, server, run):
    """Random draws a new face each time, from the standard normal distribution; Reset sets all numbers to 0."""
    drawn = []
    for _ in range(5):
        asked(page, server)
        page.locator("#random").click()
        await_shown(page, sliders(page))
        (values, _), = asked(page, server)
        assert sliders(page) == values and shows(page, run / "last.pt", values)
        drawn += values
    assert len(set(drawn)) > 200 and abs(np.mean(drawn)) < 0.2 and 0.85 < np.std(drawn) < 1.15
    page.locator("#reset").click()
    await_shown(page, [0] * 128)
    assert sliders(page) == boxes(page) == [0] * 128
    assert shows(page, run / "last.pt", [0] * 128)


def test_keys_and_double_click(page):
    """R is Random, 0 is Reset, not while a number is typed; a double click sets one slider to 0."""
    page.locator("#s3").dblclick()
    await_shown(page, changed((3, 0)))
    page.locator("#n3").fill("")
    page.keyboard.type("0.05")
    page.keyboard.press("Enter")
    await_shown(page, changed((3, 0.05)))
    page.locator("h1").click()
    page.keyboard.press("0")
    await_shown(page, [0] * 128)
    page.keyboard.press("r")
    assert np.std(sliders(page)) > 0.5


def test_save_png(page, run, tmp_path):
    """Save PNG downloads the picture of the shown vector."""
    with page.expect_download() as download:
        page.locator("#save").click()
    download.value.save_as(tmp_path / "saved")
    assert download.value.suggested_filename.endswith(".png")
    assert same(picture((tmp_path / "saved").read_bytes()), seen(page)) and shows(page, run / "last.pt", BASE)


def test_checkpoint_menu(page, server, run):
    """Choosing a checkpoint draws the same vector with it."""
    assert page.locator("#checkpoint option").evaluate_all("all => all.map(one => one.value)") == list(FILES)
    for name in ("2", "4", "last"):
        asked(page, server)
        page.locator("#checkpoint").select_option(name)
        await_shown(page, BASE, name)
        assert asked(page, server) == [(BASE, name)]
        assert shows(page, run / FILES[name], BASE)


def test_checkpoint_menu_tells_what_the_judge_says(page, run):
    """The distance to real faces of those that were judged."""
    log = (run / "log.jsonl").read_bytes()
    try:
        (run / "log.jsonl").write_text('{"epoch": 2, "scores": {"frechet": 12.34}}\n')
        page.reload()
        await_shown(page, BASE)
        labels = page.locator("#checkpoint option").all_inner_texts()
        assert sorted(labels) == sorted(["epoch 4 (last)", "epoch 2 · distance 12.3", "epoch 4"])
    finally:
        (run / "log.jsonl").write_bytes(log)


def test_one_request_in_flight_and_the_newest_next(page, server, run):
    """While one face is drawn the page asks for no other; then it asks for the newest vector alone."""
    asked(page, server)
    server.site.gate.clear()
    page.locator("#s1").fill("1")
    assert "values=" in server.site.asked.get(timeout=PATIENCE)  # the server has it and holds it up
    for number in range(10):
        page.locator("#s2").fill(str(number / 10))
    page.locator("#random").click()
    page.locator("#reset").click()
    page.locator("#s3").fill("-1.5")
    newest = [0, 0, 0, -1.5] + [0] * 124
    assert sliders(page) == newest and server.site.asked.empty()
    server.site.gate.set()
    await_shown(page, newest)
    assert asked(page, server) == [(newest, "last")] and server.site.most == 1
    assert shows(page, run / "last.pt", newest)


def test_server_gone_and_back(page, server, run):
    """Without the server the page says so and keeps its face; the next change tries again."""
    before = seen(page)
    page.context.set_offline(True)
    page.locator("#s1").fill("1")
    page.locator("#status.bad", has_text="Server gone").wait_for()
    assert same(seen(page), before) and sliders(page) == changed((1, 1))
    assert all("ERR_INTERNET_DISCONNECTED" in line for line in page.trouble)
    page.trouble.clear()
    page.context.set_offline(False)
    page.locator("#s2").fill("1")
    await_shown(page, changed((1, 1), (2, 1)))
    assert page.locator("#status.bad").count() == 0
    assert shows(page, run / "last.pt", changed((1, 1), (2, 1)))


def test_refusal_is_shown(page):
    """What the server says of a request that it refuses stands on the page, as text."""
    page.route("**/generate?*", lambda route: route.fulfill(status=400, body="value 3 is <b>bad</b>\nmore"))
    page.locator("#s1").fill("1")
    page.locator("#status.bad").wait_for()
    assert page.locator("#status").text_content() == "value 3 is <b>bad</b>"
    page.trouble.clear()  # the browser itself logs the 400


def test_all_sliders_fit_a_phone(page):
    """On a narrow screen nothing is wider than the screen."""
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
