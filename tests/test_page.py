"""The page in headless Chromium: sliders, buttons and the picture, against faces generated without the server."""
import base64
import io
import json
import math
import os
import queue
import shutil
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from conftest import CPU, FILES, cartoon_face
from PIL import Image
from soak import PATIENCE
from test_server import BASE, oracle, same, serving

import gan

MS = PATIENCE * 1000
ENLARGED = """async ([body, pixels]) => {
    const image = new Image(), [small, large] = ['canvas', 'canvas'].map(name => document.createElement(name));
    image.src = 'data:image/png;base64,' + body;
    await image.decode();
    small.width = small.height = image.naturalWidth;  // Chromium enlarges an <img> otherwise than a canvas or bitmap
    small.getContext('2d').drawImage(image, 0, 0);
    large.width = large.height = pixels;
    const pen = large.getContext('2d');
    pen.imageSmoothingQuality = 'high';
    pen.drawImage(small, 0, 0, pixels, pixels);
    return large.toDataURL().split(',')[1]; }"""
FACE = 640  # pixels of the canvas that shows the face


class Watched(gan.Site):
    """A site whose /generate requests a test can watch and hold up."""

    def __init__(self, run: Path):
        super().__init__(run, None, CPU)
        self.vectors_asked, self.gate, self.inside, self.most = queue.Queue(), threading.Event(), 0, 0
        self.gate.set()

    def respond(self, method: str, target: str, body: bytes = b"") -> gan.Response:
        if not target.startswith("/generate"):
            return super().respond(method, target, body)
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.vectors_asked.put(target)
        assert self.gate.wait(PATIENCE)
        self.inside -= 1
        return super().respond(method, target)


@pytest.fixture(scope="session")
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
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--no-first-run", "--force-color-profile=srgb", "--use-fake-device-for-media-stream",
            "--use-fake-ui-for-media-stream"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server(run):
    with serving(Watched(run)) as server:
        yield server


def open_page(browser, *own: str):
    """A page whose `trouble` lists the errors that it logs and the addresses beside its own that it asks."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(MS)
    page = context.new_page()
    page.trouble = []
    page.on("console", lambda message: message.type in ("error", "warning") and page.trouble.append(message.text))
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("request", lambda request: request.url.startswith(own) or page.trouble.append(request.url))
    return page


@pytest.fixture
def page(browser, server):
    """A fresh page that shows the face of BASE; it must log no error and ask no other host."""
    server.site.vectors_asked, server.site.most = queue.Queue(), 0
    page = open_page(browser, server.url, "blob:", "data:")
    page.goto(server.url + link(BASE))
    await_shown(page, BASE)
    page.locator("#numbers summary").click()
    yield page
    server.site.gate.set()
    page.context.close()
    assert page.trouble == []


# ---- what a user sees ----

def link(values) -> str:
    """The address part of a vector: two base-36 digits a number, hundredths above -3."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return "#z=" + "".join(digits[n // 36] + digits[n % 36] for n in (round((v + 3) * 100) for v in values))


def in_link(url: str) -> list[float]:
    digits = parse_qs(urlsplit(url).fragment)["z"][0]
    return [int(digits[i:i + 2], 36) / 100 - 3 for i in range(0, 256, 2)]


def identity(page, checkpoint: str) -> str:
    """What a checkpoint of this name is known by."""
    return page.evaluate("name => named(name)", checkpoint)


def await_shown(page, values, checkpoint="last") -> None:
    """Wait until the address bar holds this vector: the page writes there what it shows."""
    page.locator("#save:not([aria-disabled=true])").wait_for()
    known = identity(page, checkpoint)
    page.wait_for_url(lambda url: np.allclose(in_link(url), values) and url.endswith(f"&c={known}"))


def pixels_of(body: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB")).astype(int)


def seen(page, canvas="#face") -> np.ndarray:
    """The picture on the screen, from its pixels."""
    return pixels_of(page.locator(canvas).evaluate("canvas => canvas.toDataURL().split(',')[1]"))


def enlarged(page, path: Path, values, pixels=FACE) -> np.ndarray:
    """This checkpoint's face, generated without the server and enlarged by the same browser."""
    png = gan.png_bytes(Image.fromarray(oracle(path, values).astype(np.uint8)))
    return pixels_of(page.evaluate(ENLARGED, [base64.b64encode(png).decode(), pixels]))


def shows(page, path: Path, values) -> bool:
    """Whether the picture on the screen is this checkpoint's face."""
    return same(seen(page), enlarged(page, path, values), levels=3)


def asked(page, server) -> list[tuple[list[float], str]]:
    """Vector and checkpoint's name of every /generate request since the last look."""
    found, names = [], page.evaluate("typeof tool === 'string' ? Object.fromEntries(model.checkpoints.map(({ id, name }) => [id, name])) : {}")
    while not server.site.vectors_asked.empty():
        query = parse_qs(urlsplit(server.site.vectors_asked.get()).query)
        found.append(([float(v) for v in query["values"][0].split(",")], names.get(query["checkpoint"][0])))
    return found


def sliders(page) -> list[float]:
    return page.locator("#sliders input[type=range]").evaluate_all("all => all.map(one => one.valueAsNumber)")


def boxes(page) -> list[float]:
    return page.locator("#sliders input[type=number]").evaluate_all("all => all.map(one => one.valueAsNumber)")


def changed(*changes: tuple[int, float]) -> list[float]:
    values = list(BASE)
    for i, value in changes:
        values[i] = value
    return values


def average(server) -> list[float]:
    """The average face's vector, to the hundredths that the page has."""
    return [rounded(v) for v in json.loads(server.site.respond("GET", "/api/average").body)["values"]]


def rounded(value: float) -> float:
    """To hundredths within the limits, halves upwards, as JavaScript rounds; Python's round would make 1.62 of 1.625."""
    return math.floor(float(np.clip(value, -3, 3)) * 100 + 0.5) / 100


# ---- tests ----

def test_page_has_128_sliders_and_boxes(page):
    """Sliders s0..s127 and boxes n0..n127, in order, from -3 to 3."""
    for kind, prefix in (("range", "s"), ("number", "n")):
        found = page.locator(f"#sliders input[type={kind}]").evaluate_all(
            "all => all.map(one => [one.id, one.min, one.max])")
        assert found == [[f"{prefix}{i}", "-3", "3"] for i in range(128)]


def test_link_restores_face_and_vector(page, server, run):
    """A link shows its vector in sliders, boxes, request and picture."""
    assert asked(page, server) == [(BASE, "last")]
    assert sliders(page) == boxes(page) == BASE
    assert shows(page, run / "last.pt", BASE)


@pytest.mark.parametrize("bad, good", [("", None), ("#z=" + "8c" * 127, 127), ("#z=" + "zz" * 128, 0), ("#z=" + "<>" * 128, 0)])
def test_without_a_valid_link_a_random_face_is_shown(page, server, run, bad, good):
    """With no link, or one that holds no vector, which is said, the page starts with a random one."""
    page.goto("about:blank")
    asked(page, server)
    page.goto(server.url + bad)
    page.locator("#save:not([aria-disabled=true])").wait_for()
    (values, _), = asked(page, server)
    assert np.std(values) > 0.5 and sliders(page) == values
    assert shows(page, run / "last.pt", values)
    assert page.locator("#status.bad", has_text=f"{good} of its 128 numbers").count() == (good is not None)


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
    page.locator("#touch .strip").nth(4).wait_for()  # they push it down
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


def touch_screen(page):
    """A function that sends an event of one finger, as a screen does."""
    devices = page.context.new_cdp_session(page)
    devices.send("Emulation.setTouchEmulationEnabled", {"enabled": True})
    return lambda kind, *at: devices.send("Input.dispatchTouchEvent", {
        "type": kind, "touchPoints": [{"x": at[0], "y": at[1]}] if at else []})


def test_a_drag_ends_when_the_pointer_does(page):
    """Also where it ends where it began, of which a slider says nothing: what waits for rest comes."""
    slider = page.locator("#touch .strip input[type=range]").first
    slider.hover()  # once it stays where it is
    box = slider.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    for to in (x + 60, x):
        page.mouse.move(to, y, steps=3)
    assert page.evaluate("dragging") and page.locator("#overlay.faded").count() == 1
    page.mouse.up()
    page.locator("#tool-directions").click()
    page.locator("#directions .strip").nth(11).wait_for()


def test_a_finger_that_scrolls_sets_no_slider(page):
    """One that moves along it does, and so does one that only presses it."""
    page.set_viewport_size({"width": 390, "height": 600})
    touch, slider = touch_screen(page), page.locator("#touch .strip input[type=range]").first
    slider.scroll_into_view_if_needed()
    for way, by in ((1, (0, -12)), (2, (12, 0)), (1, (0, 0))):
        box = slider.bounding_box()
        x, y = box["x"] + box["width"] * way / 4, box["y"] + box["height"] / 2
        before, scrolled = page.evaluate("[doc.z, past.length]"), page.evaluate("document.querySelector('aside').scrollTop")
        touch("touchStart", x, y)
        for step in range(1, 13 if any(by) else 1):
            touch("touchMove", x + step * by[0] / 2, y + step * by[1])
        touch("touchEnd")
        if by[1]:
            page.wait_for_function("before => document.querySelector('aside').scrollTop > before + 20", arg=scrolled)
            assert page.evaluate("[doc.z, past.length]") == before
            slider.scroll_into_view_if_needed()
        else:
            page.wait_for_function("count => past.length === count + 1 && !dragging", arg=before[1])


def test_number_boxes(page):
    """A number typed into box i moves slider i; one out of range is refused with a word, and what is none changes
    nothing."""
    values = list(BASE)
    for i, (typed, value) in enumerate([("1.25", 1.25), ("-0.5", -0.5), ("4", None), ("1e0", 1), ("", None),
                                        ("-", None)], start=60):
        box = page.locator(f"#n{i}")
        box.fill("")
        box.press_sequentially(typed)
        assert not page.evaluate("dragging")
        page.evaluate("render()")
        box.press("Enter")
        box.blur()
        values[i] = BASE[i] if value is None else value
        assert (page.locator("#status.bad").count() == 1) == (typed == "4")
        await_shown(page, values)
        assert sliders(page) == boxes(page) == values


def test_random_and_reset(page, server, run):
    """Random makes a new face each time, from the standard normal distribution; Reset leads to the average face."""
    found = []
    for _ in range(5):
        asked(page, server)
        page.locator("#random").click()
        await_shown(page, sliders(page))
        (values, _), = asked(page, server)
        assert sliders(page) == values and shows(page, run / "last.pt", values)
        found += values
    assert len(set(found)) > 200 and abs(np.mean(found)) < 0.2 and 0.85 < np.std(found) < 1.15
    page.locator("#reset").click()
    middle = average(server)
    await_shown(page, middle)
    assert sliders(page) == boxes(page) == middle and shows(page, run / "last.pt", middle)


def test_keys_and_double_click(page, server):
    """R is Random, 0 is Reset, not while a number is typed; a double click sets one slider to 0."""
    page.locator("#s3").dblclick()
    await_shown(page, changed((3, 0)))
    page.locator("#n3").fill("")
    page.keyboard.type("0.05")
    page.keyboard.press("Enter")
    await_shown(page, changed((3, 0.05)))
    page.locator("h1").click()
    page.keyboard.press("0")
    await_shown(page, average(server))
    page.keyboard.press("r")
    assert np.std(sliders(page)) > 0.5


@pytest.mark.parametrize("scale", [1, 4, 8])
def test_save_png(page, run, tmp_path, scale):
    """Save PNG downloads the picture of the shown vector at the chosen size; dropped again it is that face."""
    page.locator("#scale").select_option(str(scale))
    with page.expect_download() as download:
        page.locator("#save").click()
    download.value.save_as(tmp_path / "saved")
    assert download.value.suggested_filename.endswith(".png")
    saved = pixels_of(base64.b64encode((tmp_path / "saved").read_bytes()))
    assert saved.shape == (32 * scale, 32 * scale, 3)
    assert same(saved, enlarged(page, run / "last.pt", BASE, 32 * scale), levels=3)
    page.locator("#random").click()
    await_changed(page, BASE)
    drop(page, (tmp_path / "saved").read_bytes(), "face.png", "image/png")
    await_shown(page, BASE)


def drop(page, body: bytes, name: str, kind: str) -> None:
    """Drop a file onto the page."""
    page.evaluate("""([body, name, type]) => { const dropped = new DataTransfer();
        dropped.items.add(new File([Uint8Array.from(atob(body), letter => letter.charCodeAt(0))], name, { type }));
        dispatchEvent(new DragEvent('drop', { dataTransfer: dropped })); }""", [base64.b64encode(body).decode(), name, kind])


def test_checkpoint_menu(page, server, run):
    """Choosing a checkpoint shows the same vector's face of it."""
    assert page.locator("#checkpoint option").evaluate_all("all => all.map(one => one.value)") == [
        identity(page, name) for name in FILES]
    for name in ("2", "4", "last"):
        asked(page, server)
        page.locator("#checkpoint").select_option(identity(page, name))
        await_shown(page, BASE, name)
        assert asked(page, server) == [(BASE, name)]
        assert shows(page, run / FILES[name], BASE)


def test_checkpoint_menu_tells_what_the_judge_says(page, run):
    """The distance to real faces of those that were judged."""
    log = (run / "log.jsonl").read_bytes()
    try:
        (run / "log.jsonl").write_text('{"epoch": 2, "scores": {"distance": 12.34}}\n')
        page.reload()
        page.locator("#save:not([aria-disabled=true])").wait_for()
        labels = page.locator("#checkpoint option").all_text_contents()
        assert sorted(labels) == sorted(["epoch 4 · last", "epoch 2 · distance 12.3", "epoch 4"])
    finally:
        (run / "log.jsonl").write_bytes(log)


def test_one_request_in_flight_and_the_newest_next(page, server, run):
    """While one face is being made the page asks for no other; then it asks for the newest vector alone."""
    asked(page, server)
    server.site.gate.clear()
    page.locator("#s1").fill("1")
    assert "values=" in server.site.vectors_asked.get(timeout=PATIENCE)  # the server has it and holds it up
    for number in range(10):
        page.locator("#s2").fill(str(number / 10))
    page.locator("#random").click()
    page.locator("#undo").click()
    page.locator("#s3").fill("-1.5")
    newest = changed((1, 1), (2, 0.9), (3, -1.5))
    assert sliders(page) == newest and server.site.vectors_asked.empty()
    server.site.gate.set()
    await_shown(page, newest)
    assert asked(page, server) == [(newest, "last")] and server.site.most == 1
    assert shows(page, run / "last.pt", newest)


def test_server_gone_and_back(page, server, run):
    """Without the server the page says so, keeps its face and lets nothing be kept that is not seen; it asks again after
    1, 2, 4, 8, 16 and 30 seconds and then shows what was asked for."""
    page.clock.install()
    page.reload()
    await_shown(page, BASE)
    page.locator("#numbers summary").click()
    page.clock.pause_at(page.evaluate("Date.now() / 1000 + 5"))
    page.evaluate("poll()")  # none is on its way when the server goes
    before = seen(page)
    page.context.set_offline(True)
    page.locator("#s1").fill("1")
    page.locator("#status.bad", has_text="Server gone").wait_for()
    assert same(seen(page), before) and sliders(page) == changed((1, 1))
    for button in ("keep", "save", "link", "vector"):
        assert page.locator(f"#{button}").get_attribute("aria-disabled") == "true"
    page.keyboard.press("k")
    assert page.locator("#shelf .drop").count() == 0
    for pause in (1, 2, 4, 8, 16):
        page.locator("#status", has_text=f"every {pause} s").wait_for()
        with page.expect_event("requestfailed", lambda request: "/api/model" in request.url):
            page.clock.run_for(1000 * pause)
    page.locator("#status", has_text="every 30 s").wait_for()
    page.context.set_offline(False)  # any good answer ends it
    page.clock.resume()
    await_shown(page, changed((1, 1)))
    assert page.locator("#status.bad").count() == 0
    assert shows(page, run / "last.pt", changed((1, 1)))
    assert all("ERR_INTERNET_DISCONNECTED" in line for line in page.trouble)
    page.trouble.clear()


@pytest.fixture
def training(browser, run, tmp_path):
    """A fresh page on a run of its own whose checkpoints a test may change, and that run's folder."""
    folder = shutil.copytree(run, tmp_path / "run")
    with serving(gan.Site(folder, None, CPU)) as server:
        page = open_page(browser, server.url, "blob:", "data:")
        page.goto(server.url)
        page.locator("#save:not([aria-disabled=true])").wait_for()
        yield page, folder
        page.context.close()
        page.trouble = [line for line in page.trouble if "404" not in line]  # a checkpoint that is gone
        assert page.trouble == []


def test_a_page_that_only_watches_follows_the_training(training):
    """A newer checkpoint's face takes the place of the one before, of the same numbers, and is no step of undo; also after
    a reload."""
    page, run = training
    page.locator("#numbers summary").click()
    values = sliders(page)
    page.wait_for_function("() => location.hash.includes('z=')")
    page.reload()
    shutil.copy(run / "epoch-00002.pt", run / "best.pt")
    page.wait_for_function("() => tool && named('best')")
    await_shown(page, values, "best")
    assert shows(page, run / "best.pt", values) and page.locator("#take-offer").is_hidden()
    assert page.locator("#undo").get_attribute("aria-disabled") == "true"


def test_a_newer_checkpoint_is_offered(training):
    """To who works on a face: it stays as it was, of the network whose file is gone, until the newer one is taken; undo
    leads back."""
    page, run = training
    page.locator("#numbers summary").click()
    page.locator("#s1").fill("1")
    values, first = sliders(page), identity(page, "last")
    shutil.copy(run / "last.pt", run / "kept.pt")
    os.replace(run / "epoch-00002.pt", run / "last.pt")
    page.locator("#take-offer", has_text="Use epoch 2, which is judged best").wait_for()
    status, frame = (page.locator(one).bounding_box() for one in ("#status", "#frame"))
    assert frame["y"] + frame["height"] <= status["y"]
    page.locator("#decline").click()
    page.locator("#take-offer").wait_for(state="hidden")
    page.evaluate("() => { seen = ''; render(); }")
    page.locator("#s1").fill("2")
    values[1] = 2
    page.wait_for_url(lambda url: np.allclose(in_link(url), values) and url.endswith(first))
    assert shows(page, run / "kept.pt", values)
    page.locator("#take-offer").click()
    await_shown(page, values)
    assert shows(page, run / "last.pt", values) and page.locator("#take-offer").is_hidden()
    page.locator("#undo").click()
    page.wait_for_url(lambda url: url.endswith(first))
    assert shows(page, run / "kept.pt", values)


def test_a_server_that_fails_once_is_asked_again(training):
    """As one that does not answer; no checkpoint is taken for gone."""
    page, _ = training
    page.route("**/api/model*", lambda route: route.fulfill(status=500, body="failed at this\n"), times=1)
    page.locator("#status.bad", has_text="asked again every 1 s").wait_for()
    page.locator("#status.bad").wait_for(state="detached")
    page.trouble.clear()


def test_an_answer_that_breaks_off_is_a_server_that_is_gone(page, run):
    """Also in the middle of its body; the page asks again and then shows what was asked for."""
    page.evaluate("""() => {
        const real = fetch;
        globalThis.fetch = async (...request) => {
            const answer = await real(...request);
            globalThis.fetch = real;
            return new Response(new ReadableStream({ pull: stream => stream.error(new Error('cut')) }), answer);
        };
        place(doc.z.with(1, 1));
    }""")
    page.locator("#status.bad", has_text="Server gone").wait_for()
    await_shown(page, changed((1, 1)))
    assert page.locator("#status.bad").count() == 0 and shows(page, run / "last.pt", changed((1, 1)))


def test_a_link_to_a_network_that_is_gone_says_so(training):
    """And shows the same numbers' face of the default checkpoint; a link to one that is there, that one's."""
    page, _ = training
    url = page.url.partition("#")[0]
    for asked, told, shown in (("7-12345678", "epoch 7 is no longer there: this is epoch 4", "last"),
                               ("foo", "A network “foo” is no longer there: this is epoch 4", "last"),
                               (identity(page, "2"), "Press or brush", "2"), ("4", "Press or brush", "4")):
        page.goto("about:blank")
        page.goto(f"{url}{link(BASE)}&c={asked}")
        page.locator("#status", has_text=told).wait_for()
        await_shown(page, BASE, shown)


def test_another_run_on_the_port_gets_a_page_of_its_own(page):
    """And no shelf of the run before."""
    with page.expect_navigation():
        page.evaluate("() => { model = { ...model, run: 'other' }; poll(); }")
    await_shown(page, BASE)
    page.locator("#keep").click()
    assert page.evaluate("Object.keys(localStorage).filter(key => key.startsWith('faces '))") == [page.evaluate("`faces ${model.run}`")]


def test_a_run_without_grids_offers_nothing_to_press(training):
    """In Learning there is a sentence."""
    page, run = training
    shutil.rmtree(run / "samples")
    page.locator("#tool-learn").click()
    page.get_by_text("Training has written no faces here").wait_for()
    assert page.locator("#lessons").is_hidden()


def test_refusal_is_shown(page):
    """What the server says of a request that it refuses stands on the page, as text."""
    page.route("**/generate?*", lambda route: route.fulfill(status=400, body="value 3 is <b>bad</b>\nmore"))
    page.locator("#s1").fill("1")
    page.locator("#status.bad").wait_for()
    assert page.locator("#status").text_content() == "value 3 is <b>bad</b>"
    page.evaluate("render()")
    assert len(page.trouble) == 1  # the browser itself logs the 400; nothing is asked again that would be refused again
    page.trouble.clear()


def test_all_sliders_fit_a_phone(page):
    """On a narrow screen nothing is wider than the screen, and all tools are seen."""
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.querySelector('#tools').scrollWidth") <= 360 - 2 * 12


# ---- touch, paint, directions ----

def await_changed(page, values) -> list[float]:
    """Wait for a face other than that of these values and give its vector."""
    page.wait_for_url(lambda url: not np.allclose(in_link(url), values))
    return in_link(page.url)


def post(server, path, **body) -> dict:
    answer = gan.Site.respond(server.site, "POST", path, json.dumps(body).encode())
    assert answer.status == 200, answer.body
    return json.loads(answer.body)


def moved(vector, amount) -> list[float]:
    return [rounded(v + amount * d) for v, d in zip(BASE, vector)]


def push_to_the_end(page, panel, i) -> float:
    """Put a strip's slider at its right end, with the keyboard; its value."""
    slider = page.locator(f"{panel} .strips input[type=range]").nth(i)
    slider.press("End")
    return slider.evaluate("one => one.valueAsNumber")


def press_face(page, x, y) -> None:
    box = page.locator("#face").bounding_box()
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])


def brush_face(page, x, y) -> None:
    box = page.locator("#face").bounding_box()
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + (x + 0.2) * box["width"], box["y"] + y * box["height"], steps=4)
    page.mouse.up()


def test_touch_a_region(page, server, run):
    """The part under the pointer lights up; a press brings its sliders, and they move along the server's vectors."""
    page.locator("#parts button").first.wait_for()
    regions = post(server, "/api/regions", values=BASE)
    assert page.locator("#parts button").count() == len(regions["regions"])
    page.locator("#overlay").hover(position={"x": 40, "y": 40})
    assert page.locator("#overlay").evaluate(
        "canvas => new Set(canvas.getContext('2d').getImageData(0, 0, 640, 640).data.filter((_, i) => i % 4 === 3)).size") > 2
    press_face(page, 0.5, 0.25)
    k = next(k for k, part in enumerate(regions["regions"]) if regions["map"][8 * 32 + 16] in part["numbers"])
    page.locator(f"#parts button[aria-pressed=true]:nth-child({k + 1})").wait_for()
    sliders_there = regions["regions"][k]["sliders"]
    assert page.locator("#touch .strip").count() == len(sliders_there)
    assert page.locator("#touched").text_content() == regions["regions"][k]["name"]
    page.mouse.move(1, 1)
    page.locator("#overlay.faded").wait_for()  # the outline is in the way
    expected = moved(sliders_there[1]["vector"], push_to_the_end(page, "#touch", 1))
    await_shown(page, expected)
    assert sliders(page) == expected and shows(page, run / "last.pt", expected)


def test_brush_a_region(page, server):
    """A stroke over the face brings the sliders of what it covered."""
    page.locator("#parts button").first.wait_for()
    with page.expect_request("**/api/region") as asked_for:
        brush_face(page, 0.3, 0.5)
    mask = np.reshape(asked_for.value.post_data_json["mask"], (32, 32))
    assert mask[16, 10] == mask[16, 15] == 1 and mask[:8].max() == mask[24:].max() == 0
    page.locator("#touched", has_text="What you brushed").wait_for()
    assert page.locator("#parts [aria-pressed=true]").count() == 0
    expected = moved(post(server, "/api/region", **asked_for.value.post_data_json)["sliders"][0]["vector"],
                     push_to_the_end(page, "#touch", 0))
    await_shown(page, expected)
    server.site.gate.clear()  # a press on a face that is still being made counts
    page.locator("#random").click()
    with page.expect_request("**/api/region") as asked_for:
        press_face(page, 0.3, 0.5)
    assert asked_for.value.post_data_json["values"] == sliders(page)
    server.site.gate.set()


def test_paint(page):
    """Brushing with Darker makes what is under the brush darker; it is one step of undo."""
    before = seen(page)
    page.locator("#tool-paint").click()
    page.locator("[data-paint=dark]").click()
    brush_face(page, 0.4, 0.5)
    await_changed(page, BASE)
    page.locator("#undo").click()
    await_shown(page, BASE)
    page.locator("#redo").click()
    await_changed(page, BASE)
    assert seen(page)[280:360, 256:384].mean() < before[280:360, 256:384].mean()


def names(page) -> list[str]:
    """What stands in the boxes of the directions."""
    return page.locator("#directions input[type=text]").evaluate_all("all => all.map(one => one.value)")


def kept_names(page) -> dict[str, list[float]]:
    """Name -> direction, as the browser keeps them."""
    found = page.evaluate("Object.entries(localStorage).filter(([key]) => key.startsWith('names ')).map(([, text]) => text)")
    return {kept["name"]: kept["vector"] for text in found for kept in json.loads(text)}


def give_name(page, i, name) -> None:
    box = page.locator("#directions input[type=text]").nth(i)
    box.fill(name)
    box.press("Enter")
    page.locator("h1").click()


def test_directions_and_their_names(page, server):
    """Directions with strips; their sliders move along them; one without a name may be given one, which stays in this browser,
    and undo covers it."""
    page.locator("#tool-directions").click()
    page.locator("#directions .strip").nth(11).wait_for()
    found = json.loads(server.site.respond("GET", "/api/directions").body)["directions"]
    free = [i for i, one in enumerate(found) if "name" not in one]
    vector = found[free[2]]["vector"]
    expected = moved(vector, push_to_the_end(page, "#directions", free[2]))
    await_shown(page, expected)
    page.locator("#directions input[type=text]").nth(2).press_sequentially("half")
    page.evaluate("render()")  # as at each answer of the server
    assert names(page)[2] == "half"
    give_name(page, 2, " smile <b> ")
    given = ["", "", "smile <b>"] + [""] * (len(free) - 3)
    assert names(page) == given and kept_names(page) == {"smile <b>": vector}
    for press, kept in (("z", {}), ("y", {"smile <b>": vector})):
        page.keyboard.press(f"Control+{press}")
        assert names(page)[2] == "".join(kept) and kept_names(page) == kept
    page.reload()
    page.locator("#tool-directions").click()
    page.locator("#directions .strip").nth(11).wait_for()
    assert names(page) == given


def test_the_ends_of_a_named_slider_are_the_same_for_all_faces(page):
    """It stands where this face is, and ends where its words hold; a word for either end, no box for a name. A strip shows
    the way from one end to the other."""
    vector, measure = np.eye(128)[3], 0.9 * np.eye(128)[3]
    page.route("**/api/directions?*", lambda route: route.fulfill(json={"directions": [
        {"name": "smile", "words": ["serious", "laughing"], "vector": list(vector), "measure": list(measure), "reach": 2.5,
         "effect": 0.8, "strength": 3}, {"vector": list(np.eye(128)[9]), "strength": 1, "reach": 4}]}))
    page.locator("#tool-directions").click()
    page.locator("#directions .strip").nth(1).wait_for()
    slider = page.locator("#directions [type=range]").first
    assert slider.get_attribute("aria-label") == "smile: serious to laughing" and names(page) == [""]
    assert page.locator("#directions .ends").first.inner_text().lower().split() == ["serious", "laughing"]
    at = 0.9 * page.evaluate("doc.z")[3]
    assert float(slider.get_attribute("min")) == pytest.approx(-2.5 - at, abs=0.03)
    assert float(slider.get_attribute("max")) == pytest.approx(2.5 - at, abs=0.03)
    before, moved_by = page.evaluate("doc.z")[3], push_to_the_end(page, "#directions", 0)
    assert page.evaluate("doc.z")[3] == pytest.approx(min(3, before + moved_by), abs=0.02)
    assert moved_by == pytest.approx(2.5 - at, abs=0.03)


def test_a_name_stays_with_what_training_makes_of_a_direction(page):
    """What is nearly parallel in another checkpoint has the name, to be changed or taken away there; what is not has
    none. What somebody else left in the browser's memory is no name and no fault."""
    axes = np.eye(128)
    directions = {"last": axes[:3], "2": [0.8 * axes[0] + 0.6 * axes[5], -axes[1], 0.95 * axes[2] + 0.3 * axes[6]]}
    names_of = {identity(page, name): name for name in directions}
    page.route("**/api/directions?*", lambda route: route.fulfill(json={"directions": [
        {"vector": list(one), "strength": 1, "reach": 4} for one in directions[names_of[parse_qs(urlsplit(route.request.url).query)["checkpoint"][0]]]]}))

    def choose(checkpoint, expected):
        page.locator("#checkpoint").select_option(identity(page, checkpoint))
        page.wait_for_function("id => doc.panel && doc.panel.sliders === directions[id]", arg=identity(page, checkpoint))
        assert names(page) == expected
    page.evaluate("localStorage.setItem(`names ${model.run}`, '[null, 3, {\"name\": \"x\", \"vector\": [1]}]')")
    page.reload()
    page.locator("#numbers summary").click()
    page.locator("#tool-directions").click()
    page.locator("#directions .strip").nth(2).wait_for()
    assert names(page) == [""] * 3
    for i, name in enumerate(("one", "two", "three")):
        give_name(page, i, name)
    choose("2", ["", "", "three"])
    give_name(page, 2, "four")
    assert set(kept_names(page)) == {"one", "two", "four"}
    choose("last", ["one", "two", "four"])
    give_name(page, 2, "")
    assert names(page) == ["one", "two", ""] and set(kept_names(page)) == {"one", "two"}
    page.locator("#undo").click()
    assert names(page) == ["one", "two", "four"] and set(kept_names(page)) == {"one", "two", "four"}


# ---- photo ----

def photo_file() -> dict:
    """A photo of one cartoon face for a file input."""
    image = Image.fromarray(cartoon_face(3, 7, 128)).resize((300, 300))
    body = io.BytesIO()
    image.save(body, "JPEG")
    return {"name": "me.jpg", "mimeType": "image/jpeg", "buffer": body.getvalue()}


def photo_answer(server, box: str) -> dict:
    """What the server makes of a square of that photo."""
    return json.loads(gan.Site.respond(server.site, "POST", f"/api/photo?box={box}", photo_file()["buffer"]).body)


def test_photo_by_a_square(page, server):
    """Where no face is found the person sets a square; the search then shows its steps and ends in a face to touch."""
    note = "Drag the square over the face."
    none = {**photo_answer(server, "0,0,300,300"), "faces": [], "note": note}
    page.route("**/api/photo?*", lambda route: route.continue_() if "box=" in route.request.url else
               route.fulfill(json=none))
    page.locator("#tool-photo").click()
    page.locator("#file").set_input_files(photo_file())
    page.locator("#use").wait_for()
    assert page.locator("#note").text_content() == note
    page.locator("#side").fill("0.5")
    left = page.locator("#square").evaluate("one => one.scrollLeft")
    page.locator("#square").press("ArrowLeft")
    page.wait_for_function("before => document.getElementById('square').scrollLeft < before - 30", arg=left)
    with page.expect_request("**/api/photo?*box=*") as sent:
        page.locator("#use").click()
    left, top, right, bottom = map(int, parse_qs(urlsplit(sent.value.url).query)["box"][0].split(","))
    assert right - left == bottom - top == 150 and top == 75 and 50 < left < 70
    page.locator("#note", has_text="Found").wait_for()
    await_changed(page, BASE)
    page.locator("#undo").click()  # the whole search is one step
    await_shown(page, BASE)


def test_photo_of_several_faces(page, server):
    """Of several faces the person picks one, and that one is looked for."""
    answer, other = photo_answer(server, "0,0,300,300"), photo_answer(server, "90,90,200,200")
    two = {**answer, "faces": answer["faces"] + other["faces"], "note": ""}
    page.route("**/api/photo?*", lambda route: route.fulfill(json=two))
    page.locator("#tool-photo").click()
    page.locator("#file").set_input_files(photo_file())
    with page.expect_request("**/api/invert") as sent:
        page.locator("#found button").nth(1).click()
    assert sent.value.post_data_json["target"] == other["faces"][0]["target"]
    page.locator("#note", has_text="Found").wait_for()


def touch_photo(page, server, file=None, faces=("45,45,255,255",), angle=0.0) -> None:
    """Open a photo in which faces lie in these squares, and wait for the likeness of the first."""
    found = [photo_answer(server, box)["faces"][0] | {"angle": angle} for box in faces]
    page.route("**/api/photo?*", lambda route: route.fulfill(json=photo_answer(server, faces[0]) | {"faces": found}))
    page.locator("#tool-photo").click()
    page.locator("#file").set_input_files(file or photo_file())
    if len(faces) > 1:
        page.locator("#found button").first.click()
    page.locator("#note", has_text="Found").wait_for()
    page.wait_for_function("() => isOf(shown) && search === null")


def square_of(page) -> np.ndarray:
    """The photo's square as large as the face on the screen."""
    return pixels_of(page.evaluate("resized(doc.photo.square, 640).toDataURL().split(',')[1]"))


def saved_photo(page) -> np.ndarray:
    page.locator("#tool-photo").click()
    with page.expect_download() as download:
        page.locator("#save-photo").click()
    return np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)


def test_the_stage_shows_the_photo_and_a_slider_its_part(page, server, run):
    """The likeness found, the photo is seen to a grey level, though the network's face is far from it; a slider that moves
    a part of the network's face, and the rest by a fifth of that, changes the part of the photo at least five times as much
    as the rest; undo brings the photo back to the bit."""
    touch_photo(page, server)
    photo, before, vector = square_of(page), seen(page), page.evaluate("doc.z")  # the address follows later
    assert np.abs(before - photo).mean() < 1
    page.locator("#bare").click()
    assert np.abs(seen(page) - photo).mean() > 5
    page.locator("#bare").click()
    face = oracle(run / "last.pt", vector)
    part = np.zeros((32, 32, 1))
    part[20:26, 10:22] = 1
    moved = np.where(face > 128, face - 40, face + 40) * part + np.where(face > 128, face - 8, face + 8) * (1 - part)
    page.route("**/generate?*", lambda route: route.fulfill(body=gan.png_bytes(Image.fromarray(moved.astype(np.uint8)))))
    page.locator("#s5").fill("2.5")
    page.wait_for_function("() => isOf(shown)")
    change, inside = np.abs(seen(page) - before).mean(2), np.kron(part[..., 0], np.ones((20, 20))) > 0
    assert change[inside].mean() > 20 and change[inside].mean() > 5 * change[~inside].mean()
    page.unroute("**/generate?*")
    page.keyboard.down("b")
    assert same(seen(page), photo, levels=1)
    page.keyboard.up("b")
    assert not same(seen(page), photo, levels=1)
    page.locator("#undo").click()
    await_shown(page, vector)
    assert (seen(page) == before).all()


def test_a_held_face_shows_the_photo_before(page, server):
    """As long as mouse or finger is down, with any tool; what is held is not touched."""
    touch_photo(page, server)
    page.locator("#s5").fill("2.5")
    page.wait_for_function("() => isOf(shown)")
    changed, photo = seen(page), square_of(page)
    for tool in ("photo", "touch"):
        page.locator(f"#tool-{tool}").click()
        page.locator("#overlay").hover()
        page.mouse.down()
        page.wait_for_function("() => before")
        assert same(seen(page), photo, levels=1)
        page.mouse.up()
        assert (seen(page) == changed).all() and not page.evaluate("before")
    assert page.evaluate("doc.panel?.name ?? 'mouth'") == "mouth"


@pytest.mark.parametrize("angle", [0.0, 20.0])
def test_a_face_is_put_back_into_its_photo(page, server, angle):
    """Also a tilted one: outside the square nothing of a PNG differs, and inside it the face does; unchanged, the whole is
    the file. The next face of the photo leaves the first one as it was made."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.paste(Image.fromarray(cartoon_face(3, 7, 128)), (20, 20))
    image.paste(Image.fromarray(cartoon_face(4, 7, 128)), (160, 160))
    body = io.BytesIO()
    image.save(body, "PNG")
    original, rows = np.asarray(image).astype(int), np.mgrid[:300, :300] + 0.5
    touch_photo(page, server, {"name": "two.png", "mimeType": "image/png", "buffer": body.getvalue()},
                ("20,20,148,148", "160,160,288,288"), angle)
    saved = saved_photo(page)
    assert (saved == original).all()
    turn = np.exp(-1j * math.radians(angle))
    for number, middle in ((0, 84), (1, 224)):
        if number:
            page.locator("#found button").nth(1).click()
            page.locator("#note", has_text="Found").wait_for()
            page.wait_for_function("() => isOf(shown) && search === null")
            assert (saved_photo(page) == saved).all()
        page.locator(f"#s{number}").fill("3")
        page.wait_for_function("() => isOf(shown)")
        saved, last = saved_photo(page), saved
        at = (rows[1] - middle + 1j * (rows[0] - middle)) * turn
        outside = np.maximum(abs(at.real), abs(at.imag)) > 64
        assert (saved == last)[outside].all() and not (saved == last).all()


def test_a_photo_turned_by_its_exif_is_saved_upright(page, server):
    """As high and wide as it is seen."""
    image, body = Image.fromarray(cartoon_face(3, 7, 128)).resize((300, 200)), io.BytesIO()
    exif = Image.Exif()
    exif[0x112] = 6
    image.save(body, "JPEG", exif=exif)
    touch_photo(page, server, {"name": "me.jpg", "mimeType": "image/jpeg", "buffer": body.getvalue()}, ("10,10,190,190",))
    assert np.abs(saved_photo(page) - np.asarray(image.rotate(-90, expand=True)).astype(int)).mean() < 6


def test_a_large_photo_is_reduced_before_it_travels(page, server):
    """And the square is still cut from the file as it is; a pasted picture is one that was chosen."""
    image, body = Image.fromarray(cartoon_face(3, 7, 128)).resize((4000, 3000)), io.BytesIO()
    image.save(body, "JPEG")
    with page.expect_request("**/api/photo?*") as sent:
        touch_photo(page, server, {"name": "me.jpg", "mimeType": "image/jpeg", "buffer": body.getvalue()})
    assert Image.open(io.BytesIO(sent.value.post_data_buffer)).size == (1600, 1200)
    assert page.evaluate("doc.photo.box[2] - doc.photo.box[0]") == pytest.approx(210 * 4000 / 300)
    assert page.evaluate("doc.photo.square.width") == 1280
    page.locator("#random").click()
    assert page.evaluate("doc.photo") is None
    page.evaluate("""() => { const files = new DataTransfer();
        files.items.add(new File([opened.sent], 'pasted.jpg', { type: 'image/jpeg' }));
        dispatchEvent(new ClipboardEvent('paste', { clipboardData: files })); }""")
    page.locator("#note", has_text="Found").wait_for()


def test_the_same_file_twice_and_a_search_that_breaks_off(page, server):
    """Each is looked at anew; a server that fails in mid-search is told beside the photo, and no step goes on for ever."""
    touch_photo(page, server)
    page.locator("#random").click()
    page.route("**/api/invert", lambda route: route.fulfill(status=500, body="the server failed at this\n"))
    with page.expect_file_chooser() as chooser:
        page.locator("#file").click()
    chooser.value.set_files(files=[photo_file()])
    page.locator("#note", has_text="The search was broken off: the server failed at this").wait_for()
    page.unroute("**/api/invert")
    with page.expect_file_chooser() as chooser:
        page.locator("#file").click()
    chooser.value.set_files(files=[photo_file()])
    page.locator("#note", has_text="Found").wait_for()
    page.trouble.clear()


def test_photo_that_is_none(page):
    """What the server says of a file that is no photo stands beside the choice of the file."""
    page.locator("#tool-photo").click()
    page.locator("#file").set_input_files({"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"no photo"})
    page.locator("#note", has_text="Looking").wait_for(state="detached")
    page.locator("#note").filter(has_not_text="Looking").wait_for()
    assert page.locator("#note").text_content()
    page.trouble.clear()


def test_camera(page):
    """A picture from the camera is sent as a photo."""
    page.locator("#tool-photo").click()
    page.locator("#camera-on").click()
    page.locator("#shoot").wait_for()
    with page.expect_request("**/api/photo?*") as sent:
        page.locator("#shoot").click()
    assert sent.value.response().status == 200 and page.locator("#camera").is_hidden()


# ---- mix, keep, learn, copy ----

def test_mix_slider_and_family(page):
    """The slider goes from one face to the other over the sphere; a child becomes the face and the first parent."""
    page.locator("#random").click()
    await_changed(page, BASE)
    page.locator("#tool-mix").click()
    page.locator("#undo").click()  # the second face was there before, too
    await_shown(page, BASE)
    page.locator("#between").fill("1")
    other = await_changed(page, BASE)
    page.locator("#between").fill("0.5")
    middle = await_changed(page, other)
    ends = np.array([BASE, other], np.float32)
    for a, b, at in ((*ends, 2), (ends[0], -ends[0], 1), (ends[0], 0 * ends[0], 3)):
        on_the_way = gan.interpolate(gan.torch.tensor(np.stack([a, b])), 4)[at].numpy()
        assert np.allclose(page.evaluate("([a, b, t]) => between(a, b, t)", [a.tolist(), b.tolist(), at / 4]), on_the_way, atol=1e-4)
    assert np.allclose(middle, gan.interpolate(gan.torch.tensor(ends), 4)[2].clip(-3, 3), atol=0.006)
    page.locator("#family").click()
    page.locator("#children button").nth(8).wait_for()
    page.locator("#children button").nth(4).click()
    child = await_changed(page, middle)
    near = np.minimum(np.abs(np.array(child) - BASE), np.abs(np.array(child) - other))
    assert np.median(near) < np.median(np.abs(np.array(BASE) - other)) and 8 < np.linalg.norm(child) < 15
    assert page.locator("#between").input_value() == "0"


def test_a_drag_over_folded_numbers(page):
    """Once the face rests, the folded boxes and the address hold its vector."""
    page.locator("#numbers summary").click()
    page.locator("#tool-mix").click()
    between = page.locator("#between")
    between.evaluate("range => { range.value = 0.5; range.dispatchEvent(new Event('input')); }")
    between.evaluate("range => range.dispatchEvent(new Event('change', { bubbles: true }))")
    page.wait_for_url(lambda url: not np.allclose(in_link(url), BASE))
    boxes = [float(page.locator(f"#n{i}").input_value()) for i in range(128)]
    assert np.allclose(boxes, in_link(page.url))


def test_undo_and_redo_bring_everything_back(page):
    """Faces, numbers, checkpoint and shelf; a drag is one step; a new change forgets what was undone."""
    page.locator("#s3").fill("1")
    await_shown(page, changed((3, 1)))
    page.locator("#checkpoint").select_option(identity(page, "2"))
    page.locator("#keep").click()
    page.locator("#shelf button.drop").wait_for()
    for back in ("#shelf-hint", "#undo"):
        page.locator("#undo").click()
        page.locator(back).wait_for()
    await_shown(page, changed((3, 1)))
    page.keyboard.press("Control+z")
    await_shown(page, BASE)
    for _ in range(3):
        page.keyboard.press("Control+y")
    await_shown(page, changed((3, 1)), "2")
    page.locator("#shelf button.drop").wait_for()
    page.locator("#undo").click()
    page.locator("#s4").fill("1")
    assert page.locator("#redo").is_disabled()


def test_shelf_sheet_film_and_vector(page, run, tmp_path):
    """Kept faces survive a reload; a press shows one; sheet, film and numbers are saved, and numbers come back."""
    for told in ("Kept: 1 face on", "Taken off: 0 faces", "Kept: 1 face on"):
        page.locator("#keep").click()
        page.locator("#status", has_text=told).wait_for()
    page.locator("#random").click()
    other = await_changed(page, BASE)
    page.locator("#keep").click()
    page.reload()
    page.locator("#shelf .drop").nth(1).wait_for()

    def saved(button) -> Path:
        with page.expect_download() as download:
            page.locator(button).click()
        download.value.save_as(tmp_path / download.value.suggested_filename)
        return tmp_path / download.value.suggested_filename

    page.locator("#scale").select_option("2")
    sheet = pixels_of(base64.b64encode(saved("#sheet").read_bytes()))
    face = enlarged(page, run / "last.pt", BASE, 64)
    assert sheet.shape == (64, 128, 3)
    assert np.abs(sheet[:, :64] - face).mean() < 3 and np.abs(sheet[:, 64:] - face).mean() > 20
    for kind in ("webp", "gif"):
        page.locator("#film-kind").select_option(kind)
        with Image.open(saved("#film")) as film:
            assert film.format == kind.upper() and film.n_frames > 10
    numbers = saved("#vector")
    assert np.allclose(json.loads(numbers.read_text())["values"], other)
    page.locator("#shelf button:not(.drop)").first.click()
    await_shown(page, BASE)
    drop(page, numbers.read_bytes(), "face.json", "application/json")
    await_shown(page, other)
    page.locator("#random").click()
    await_changed(page, other)
    page.evaluate("edit({ shelf: Array.from({ length: 60 }, (_, i) => faceOf(i)) })")
    page.locator("#keep").click()
    page.locator("#status.bad", has_text="The shelf holds 60 faces").wait_for()
    page.route("**/api/film", lambda route: None)  # it would take a while
    with page.expect_request("**/api/film") as film:
        page.locator("#film").click()
        page.locator("#status", has_text="of the 32 faces that were kept last").wait_for()
    assert len(film.value.post_data_json["vectors"]) == 32


def test_a_full_storage_loses_nothing_while_the_page_is_open(page):
    """Which is said; what another tab keeps comes to it."""
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
    page.locator("#keep").click()
    page.locator("#status.bad", has_text="no room").wait_for()
    page.locator("#shelf .drop").wait_for()  # drawn once the server has made its picture
    page.evaluate("dispatchEvent(new StorageEvent('storage'))")
    assert page.evaluate("doc.shelf.length") == 1
    page.locator("#shelf .drop").wait_for()


def test_seed_and_length(page, server):
    """A seed gives the same face again, also where something arrives while it is typed; what is none is refused with a
    word; plainer and bolder move on the line from the average face."""
    page.locator("#seed").fill("")
    page.locator("#seed").press_sequentially("4")
    page.evaluate("render()")
    page.locator("#seed").press_sequentially("2")
    page.locator("#seed").press("Enter")
    first = await_changed(page, BASE)
    page.locator("#random").click()
    await_changed(page, first)
    assert page.locator("#seed").input_value() not in ("", "42")
    page.locator("#seed").fill("")
    page.locator("#seed").press_sequentially("42")
    page.locator("#seed").press("Enter")
    await_shown(page, first)
    for typed in ("-1", "4294967296", "1.5", ""):
        page.locator("#seed").fill(typed)
        page.locator("#seed").press("Enter")
        page.locator("#status.bad", has_text=f"“{typed}” is not taken").wait_for()
        assert np.allclose(sliders(page), first) and page.locator("#seed").input_value() == "42"
    page.locator("#length").fill("0.5")
    middle = np.array(average(server))
    away = (first - middle) / np.linalg.norm(first - middle)
    assert np.allclose(await_changed(page, first), (middle + 0.5 * 256 ** 0.5 * away).clip(-3, 3), atol=0.02)


def test_watch_it_learn(page, run):
    """The epoch slider shows training's grids; a press loads that epoch's checkpoint; a film of them can be saved."""
    page.locator("#tool-learn").click()
    page.locator("#epoch-text", has_text="Epoch 4").wait_for()
    page.locator("#epoch").press("Home")
    page.locator("#epoch-text", has_text="Epoch 0").wait_for()
    assert page.locator("#load").get_attribute("aria-disabled") == "true"
    grid = Image.open(run / "samples" / "epoch-00000.png").convert("RGB")
    page.wait_for_function("width => $('grid').width === width", arg=grid.width)
    page.wait_for_function("() => drawnFrom.grid[0] === 0")
    assert same(seen(page, "#grid"), np.asarray(grid).astype(int))
    for _ in range(2):
        page.locator("#epoch").press("ArrowRight")
    page.locator("#epoch-text", has_text="Epoch 2").wait_for()
    page.locator("#load").click()
    await_shown(page, BASE, "2")
    with page.expect_download() as film:
        page.locator("#learn a").click()
    assert Path(film.value.path()).read_bytes()[8:12] == b"WEBP"


def test_is_it_a_copy(page):
    """The nearest training faces of the face shown, with a verdict in words."""
    page.locator("#tool-copy").click()
    page.locator("#compare").click()
    page.locator("#near").wait_for()
    assert page.locator("#near").evaluate("image => image.naturalWidth") == 5 * 32
    assert "nearest training face is" in page.locator("#verdict").text_content()


def test_a_run_that_is_trained_says_how_far_it_is(page, server, monkeypatch):
    """Epoch, epochs and the time left, as /api/model tells; nothing once it is over."""
    told = {"epoch": 3, "epochs": 12, "seconds_left": 110}
    monkeypatch.setattr(gan, "training_under_way", lambda run, most: told)
    page.get_by_text("it learns: epoch 3 of 12, 2 minutes left").wait_for()
    told |= {"epoch": 4, "seconds_left": None}
    page.get_by_text("it learns: epoch 4 of 12", exact=False).wait_for()
    assert "left" not in page.locator("#model").text_content()
    assert "has seen nothing yet" in page.evaluate("() => { doc = { ...doc, checkpoint: '0-12345678' }; return moment(); }")
    page.evaluate("() => { doc = { ...doc, checkpoint: shown.checkpoint }; }")
    monkeypatch.setattr(gan, "training_under_way", lambda run, most: None)
    page.locator("#model").get_by_text("it learns").wait_for(state="detached")


def test_an_untouched_face_drifts(page, server):
    """To others, as one step of undo, until something is touched; a person's own face does not, nor where motion is not
    wanted."""
    page.clock.install()
    page.emulate_media(reduced_motion="reduce")
    for motion, moves in (("reduce", False), ("no-preference", True)):
        page.emulate_media(reduced_motion=motion)
        page.goto("about:blank")
        page.goto(server.url)
        page.locator("#save:not([aria-disabled=true])").wait_for()
        before = page.evaluate("doc.z")
        page.clock.run_for(30_000)
        assert page.evaluate("past.length") == moves
    page.locator("#status", has_text="A touch stops it").wait_for()
    page.locator("#random").focus()
    page.locator("#undo").click()
    assert page.evaluate("[drift, dragging]") == [None, False] and page.evaluate("doc.z") == before
    page.evaluate("place(doc.z.with(1, 1))")
    page.clock.run_for(40_000)
    assert page.evaluate("[past.length, doc.z[1]]") == [1, 1]


# ---- the exported file ----

def test_exported_page(browser, run, tmp_path):
    """It opens from a disk without a server, asks nobody, and makes the server's faces within 3 of 255; parts have
    sliders, names of directions stay in the browser, and what needs a server is not there."""
    settings = gan.ExportSettings(file=str(tmp_path / "faces.html"), run=str(run))
    assert gan.command_export(settings) == 0
    page = open_page(browser, "file:", "blob:", "data:")
    page.goto((tmp_path / "faces.html").as_uri() + link(BASE))
    page.locator("#save:not([aria-disabled=true])").wait_for()
    face = seen(page)
    assert np.abs(face - enlarged(page, run / "last.pt", BASE)).max() <= 3
    assert page.locator("#tools button").all_inner_texts() == ["Touch", "Directions", "Mix"]
    words = page.locator("body").inner_text()
    assert "Connecting" not in words and "Copy link" not in words and "film" not in words and "brush" not in words
    page.locator("#parts button").get_by_text("mouth", exact=True).click()
    page.locator("#touch .strip").nth(2).wait_for()
    push_to_the_end(page, "#touch", 0)
    await_changed(page, BASE)
    page.locator("#undo").click()
    await_changed(page, in_link(page.url))
    page.locator("#tool-directions").click()
    page.locator("#directions .strip").nth(11).wait_for()
    push_to_the_end(page, "#directions", 0)
    await_changed(page, BASE)
    assert not same(seen(page), face)
    page.locator("#tool-mix").click()
    page.locator("#family").click()
    page.locator("#children button").nth(8).wait_for()
    page.locator("#keep").click()
    page.locator("#shelf .drop").wait_for()
    page.locator("#tool-directions").click()
    give_name(page, 3, "smile")
    page.reload()
    page.locator("#tool-directions").click()
    page.locator("#directions .strip").nth(11).wait_for()
    assert names(page) == [""] * 3 + ["smile"] + [""] * 6 and list(kept_names(page)) == ["smile"]
    page.context.close()
    assert page.trouble == []


def test_exported_page_without_webassembly(browser, run, tmp_path):
    """It makes the same face, by plain loops."""
    assert gan.command_export(gan.ExportSettings(file=str(tmp_path / "faces.html"), run=str(run))) == 0
    file = tmp_path / "faces.html"
    file.write_text(file.read_text("utf-8").replace("'wasm-unsafe-eval'", "", 1), "utf-8")  # the policy forbids it
    page = open_page(browser, "file:", "blob:", "data:")
    page.goto(file.as_uri() + link(BASE))
    page.locator("#save:not([aria-disabled=true])").wait_for()
    assert np.abs(seen(page) - enlarged(page, run / "last.pt", BASE)).max() <= 3
    assert page.evaluate("() => { try { new WebAssembly.Module(Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0)); } catch { return 'no'; } }") == "no"
    page.context.close()


# ---- one truth: what is seen belongs to the face shown ----

def test_two_tabs_share_a_shelf(page, server):
    """What one keeps stands on the other's, and neither overwrites it, also not by undo."""
    other = page.context.new_page()
    other.goto(server.url)
    other.locator("#save:not([aria-disabled=true])").wait_for()
    for tab, count in ((page, 1), (other, 2), (page, 3)):
        tab.locator("#random").click()
        tab.locator("#save:not([aria-disabled=true])").wait_for()
        tab.locator("#keep").click()
        for each in (page, other):
            each.wait_for_function("count => document.querySelectorAll('#shelf .drop').length === count", arg=count)
    page.locator("#undo").click()
    other.locator("#undo").click()
    other.wait_for_function("() => document.querySelectorAll('#shelf .drop').length === 1 + 1")
    assert page.evaluate("localStorage.getItem(`faces ${model.run}`)") == other.evaluate("JSON.stringify(doc.shelf)")


def test_labels_belong_to_the_face_shown(page):
    """After undo and a new face: the verdict on a copy, the mix slider, what was brushed and its outline, and the part."""
    page.locator("#tool-copy").click()
    page.locator("#compare").click()
    page.locator("#near").wait_for()
    page.locator("#random").click()
    page.locator("#near").wait_for(state="hidden")
    assert page.locator("#verdict").text_content() == ""
    page.locator("#undo").click()
    page.locator("#near").wait_for()
    page.locator("#tool-mix").click()
    page.locator("#between").fill("0.5")
    page.locator("#undo").click()
    assert page.locator("#between").input_value() == "0"
    page.locator("#redo").click()
    assert page.locator("#between").input_value() == "0.5"
    page.locator("#random").click()
    assert page.locator("#between").input_value() == "0"
    page.locator("#tool-touch").click()
    page.locator("#parts [aria-pressed=true]").wait_for()
    brush_face(page, 0.3, 0.5)
    page.locator("#touched", has_text="What you brushed").wait_for()
    page.wait_for_function("() => stroke === null")
    assert outlined(page) > 0
    page.locator("#random").click()
    assert page.locator("#touched").text_content() == "" and outlined(page) == 0
    page.locator("#parts [aria-pressed=true]", has_text="mouth").wait_for()  # the part that was chosen before
    assert page.locator("#touched").text_content() == "mouth" and outlined(page) > 0
    page.locator("#undo").click()
    assert page.locator("#touched").text_content() == "What you brushed"


def outlined(page) -> int:
    """How many pixels of the overlay are seen."""
    return page.locator("#overlay").evaluate(
        "canvas => canvas.getContext('2d').getImageData(0, 0, 640, 640).data.filter((v, i) => i % 4 === 3 && v > 0).length")


def finger(page, kind, x, y) -> None:
    """An event of a finger on the face, as the browser sends it."""
    page.locator("#overlay").evaluate("""(canvas, [kind, x, y]) => { const box = canvas.getBoundingClientRect();
        canvas.setPointerCapture = () => {};
        canvas.dispatchEvent(new PointerEvent(kind, { pointerId: 7, pointerType: 'touch', isPrimary: true, bubbles: true,
            clientX: box.left + x * box.width, clientY: box.top + y * box.height })); }""", [kind, x, y])


@pytest.mark.parametrize("last", [["pointerup", "lostpointercapture", "pointerleave"], ["pointercancel", "pointerleave"],
                                  ["pointerleave", "pointerup"]], ids=" ".join)
def test_a_stroke_ends_once(page, last):
    """With a finger that is lifted or taken away, or a mouse that leaves: no request has an empty mask, and each stroke is
    one step of undo."""
    page.locator("#tool-paint").click()
    for y in (0.4, 0.7):
        before = in_link(page.url)
        finger(page, "pointerdown", 0.3, y)
        for step in range(4):
            finger(page, "pointermove", 0.3 + step / 10, y)
        for kind in last:
            finger(page, kind, 0.6, y)
        page.wait_for_function("() => stroke === null")
        await_changed(page, before)
    assert page.evaluate("past.length") == 2
    for _ in range(2):
        page.locator("#undo").click()
    await_shown(page, BASE)


def test_a_new_face_is_the_better_of_two(page):
    """The one that the server chose of the two it was asked about, at once; it is asked while nobody touches anything."""
    page.clock.install()
    page.reload()
    await_shown(page, BASE)
    page.locator("#numbers summary").click()
    page.locator("#touch .strip").first.wait_for()
    with page.expect_response("**/api/best") as answered:
        page.clock.run_for(3000)
    two, best = json.loads(answered.value.request.post_data)["vectors"], answered.value.json()["best"]
    page.wait_for_function("() => ahead.seed !== null")
    page.locator("#random").click()
    assert sliders(page) == two[best]
    with page.expect_response("**/api/best"):
        page.clock.run_for(3000)


def test_a_search_that_is_interrupted_says_so(page, server):
    """The face that the person made stays; the search's steps are one of undo, and its photo goes with them."""
    page.route("**/api/photo?*", lambda route: route.fulfill(json=photo_answer(server, "0,0,300,300")))
    answers = []

    def step(route):
        answers.append(0)
        if len(answers) == 3:
            page.locator("#random").evaluate("button => button.click()")
        route.fulfill(json={"values": changed((5, len(answers) / 10)), "distance": 9 - len(answers), "done": False})
    page.route("**/api/invert", step)
    page.locator("#tool-photo").click()
    page.locator("#file").set_input_files(photo_file())
    page.locator("#status", has_text="The search ended, because the face was changed meanwhile").wait_for()
    assert page.evaluate("doc.photo") is None and page.locator("#note").text_content() == ""
    page.locator("#undo").click()
    assert "broken off" in page.locator("#note").text_content() and page.locator("#bare").is_visible()
    page.locator("#undo").click()
    await_shown(page, BASE)
    assert page.locator("#bare").is_hidden()


def test_a_name_of_blanks_is_refused(page):
    """With a word; the name before stays."""
    page.locator("#tool-directions").click()
    page.locator("#directions .strip").nth(11).wait_for()
    give_name(page, 1, "age")
    give_name(page, 1, "   ")
    assert "Blanks are no name" in page.locator("#status.bad").text_content() and names(page)[1] == "age"


def test_arrow_keys_are_one_step(page):
    """As long as the slider has the keyboard; taking it up again begins another one."""
    slider = page.locator("#s5")
    for count in (3, 2):
        page.locator("#s4").focus()
        for _ in range(count):
            slider.press("ArrowRight")
    assert sliders(page)[5] == pytest.approx(BASE[5] + 0.05)
    for value in (BASE[5] + 0.03, BASE[5]):
        page.locator("#undo").click()
        assert sliders(page)[5] == pytest.approx(value)


# ---- any screen ----

SCREENS = {"laptop": (1440, 900), "tablet": (1024, 768), "phone": (390, 844), "small phone": (360, 640),
           "phone on its side": (844, 390),
           "200 %": (720, 450), "400 %": (360, 225)}


@pytest.mark.parametrize("screen", SCREENS)
def test_part_sliders_and_face_are_seen_together(page, screen):
    """On each screen: the whole face, and each of the part's sliders with it when it is scrolled to; nothing is wider than
    the screen, and what is pressed is at least 40 pixels high and wide."""
    width, height = SCREENS[screen]
    page.set_viewport_size({"width": width, "height": height})
    page.locator("#touch .strip").nth(2).wait_for()
    page.evaluate("document.querySelectorAll('*').forEach(one => { one.scrollTop = 0; })")  # the click scrolled

    def inside(locator) -> bool:
        box = locator.bounding_box()
        return box["x"] >= 0 and box["y"] >= 0 and max(box["x"] + box["width"] - width, box["y"] + box["height"] - height) < 1
    assert inside(page.locator("#frame")) and page.locator("#frame").bounding_box()["width"] >= min(height / 2.5, width / 3)
    assert inside(page.locator("#touch .strip input[type=range]").first)  # without scrolling
    assert height < 300 or all(inside(button) for button in page.locator(".stage .row button").all())
    page.evaluate("document.querySelector('aside').scrollTo(0, 9999)")
    scrolled = page.evaluate("document.querySelector('aside').scrollTop")
    press_face(page, 0.5, 0.25)  # what it brings comes into view
    page.wait_for_function("scrolled => document.querySelector('aside').scrollTop < scrolled", arg=scrolled)
    page.locator("#touch .strip").nth(2).wait_for()
    assert inside(page.locator("#touch .strip canvas").first)
    for strip in page.locator("#touch .strip").all():
        strip.scroll_into_view_if_needed()
        assert inside(strip) and inside(page.locator("#frame"))
    assert page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]") == [width, height]
    small = page.evaluate("""[...document.querySelectorAll('button, select, summary, input, a')].filter(one => {
        const box = (one.closest('label') ?? one).getBoundingClientRect();
        return one.checkVisibility() && (box.height < 40 || box.width < 40); }).map(one => one.outerHTML)""")
    assert small == []


def test_keyboard_leads_everywhere(page):
    """Arrow keys walk the tabs; a part that has the keyboard lights up, and it is not lost when what has it goes away."""
    page.locator("#parts button").first.wait_for()
    page.locator("#tool-touch").focus()
    for key, tool in (("ArrowDown", "paint"), ("ArrowRight", "directions"), ("ArrowUp", "paint"), ("ArrowLeft", "touch"),
                      ("ArrowLeft", "copy"), ("ArrowRight", "touch")):
        page.keyboard.press(key)
        assert page.locator(f"#tool-{tool}[aria-selected=true]").evaluate("one => one === document.activeElement")
    before = outlined(page)
    page.locator("#parts button", has_text="hair").focus()
    assert outlined(page) > 10 * before
    page.keyboard.press("Enter")
    page.locator("#parts [aria-pressed=true]", has_text="hair").wait_for()
    page.locator("#keep").focus()
    page.keyboard.press("Enter")
    page.locator("#shelf .drop").focus()
    page.keyboard.press("Enter")
    page.locator("#shelf .drop").wait_for(state="detached")
    assert page.evaluate("document.activeElement !== document.body")
    page.locator("#undo").focus()
    for _ in range(3):
        page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "undo"


def test_a_strips_pictures_stand_over_the_sliders_ends(page):
    """The thumb at either end, and in the middle, is under the middle of a picture; a word says what an end does."""
    page.locator("#touch .strip").first.wait_for()
    canvas, slider = (page.locator(f"#touch .strip {name}").first.bounding_box() for name in ("canvas", "[type=range]"))
    thumb = 16
    for at, picture in ((slider["x"] + thumb / 2, 0.1), (slider["x"] + slider["width"] - thumb / 2, 0.9)):
        assert at == pytest.approx(canvas["x"] + picture * canvas["width"], abs=2)
    told = [sorted(strip.locator(".ends span").all_text_contents()) for strip in page.locator("#touch .strip").all()]
    assert all(words in [sorted(pair) for pair in gan.WORDS] or words == [f"mouth {i}"] for i, words in enumerate(told, 1))
    assert len({*map(tuple, told)}) == len(told)
    labels = page.evaluate("words => titles({ name: 'chin', sliders: words.map(words => ({ words })) }).map(one => one.label)",
                           [["wider", "narrower"], [], ["narrower", "wider"]])
    assert labels == ["chin: wider to narrower", "chin 2", "chin 3"]


def test_a_face_of_a_grid_can_be_worked_on(page, run):
    """A press shows it, by its epoch's network; of an epoch that was not kept, by the one that is shown, which is said."""
    page.locator("#tool-learn").click()
    page.locator("#epoch-text", has_text="Epoch 4").wait_for()
    seed = gan.read_checkpoint(run / "last.pt")["settings"]["seed"]
    for key, epoch, name in ((None, 4, "last"), ("Home", 0, "last")):
        if key:
            page.locator("#epoch").press(key)
        page.wait_for_function("epoch => drawnFrom.grid?.[0] === epoch", arg=epoch)
        box = page.locator("#grid").bounding_box()
        page.locator("#grid").click(position={"x": 0.25 * box["width"], "y": 0.15 * box["height"]})  # the 13th
        expected = [rounded(v) for v in gan.sample_latents(100, seed)[12].tolist()]
        await_shown(page, expected, name)
        assert ("was not kept" in page.locator("#status").text_content()) == (epoch == 0)
        page.locator("#random").click()
    page.locator("#epoch").press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")  # from the 13th, with the keys
    page.wait_for_function("() => Math.min(...$('grid').getContext('2d').getImageData(54, 70, 1, 1).data) > 240")  # its white frame
    assert "Face 22" in page.locator("#grid").get_attribute("aria-label")
    page.keyboard.press("Enter")
    await_shown(page, [rounded(v) for v in gan.sample_latents(100, seed)[21].tolist()], "last")
    assert page.locator("#curves").evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
