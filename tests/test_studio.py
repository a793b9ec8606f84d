"""The studio's requests: what each answers, what each refuses, and that long ones keep nobody waiting."""
import base64
import io
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection

import numpy as np
import pytest
import torch
from conftest import CPU, FILES
from PIL import Image
from soak import PATIENCE, connect, read_all, request, statuses, talk
from test_server import BASE, ask, changed, oracle, picture, same, serving, target

import gan

SIZE = 32
MASK = [1.0] * (SIZE * SIZE // 2) + [0.0] * (SIZE * SIZE // 2)


def post(site, path, body=None, **more):
    """The answer to a POST: JSON where it is that, else the Response."""
    response = site.respond("POST", path, body if isinstance(body, bytes) else json.dumps(more).encode())
    return json.loads(response.body) if response.kind == "application/json" else response


def get(site, path):
    response = site.respond("GET", path)
    return json.loads(response.body) if response.kind == "application/json" else response


def png_url(image: np.ndarray | Image.Image) -> str:
    return gan.data_url(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, np.uint8)))


def image_of(url: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def blurred(image: np.ndarray) -> np.ndarray:
    """Grey, in fields of 8×8 pixels: what a film's compression leaves as it was."""
    return image.mean(2).reshape(SIZE // 8, 8, SIZE // 8, 8).mean((1, 3))


def photo(width=60, height=40) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


# ---- what is answered ----

def test_faces_stand_side_by_side(site, run, auto):
    """Each as /generate makes it, of the asked checkpoint."""
    vectors = [changed(i, 3) for i in range(5)]
    for which in ("last", "2"):
        strip = picture(post(site, "/api/faces", vectors=vectors, checkpoint=which).body)
        file = {"last": "last.pt", "2": "epoch-00002.pt"}[which]
        assert strip.shape == (SIZE, 5 * SIZE, 3)
        assert all(same(strip[:, i * SIZE:(i + 1) * SIZE], oracle(run / file, z, gan.autocast(CPU)))
                   for i, z in enumerate(vectors))
    assert picture(post(site, "/api/faces", vectors=vectors, scale=3).body).shape == (3 * SIZE, 15 * SIZE, 3)


def test_directions_are_told_names_first(site):
    """Twelve unit vectors: those with a name, words and effect, then the strongest others, at right angles, strongest first."""
    found = get(site, "/api/directions")["directions"]
    others = [one for one in found if "name" not in one]
    assert len(found) == 12 and found[12 - len(others):] == others
    assert all(len(one["words"]) == 2 and one["effect"] > 0 and one["name"] in gan.NAMES for one in found if "name" in one)
    vectors, strengths = np.array([one["vector"] for one in others]), [one["strength"] for one in others]
    assert strengths == sorted(strengths, reverse=True) and abs(vectors @ vectors.T - np.eye(len(others))).max() < 1e-3


def test_regions_cover_the_face_with_sliders(site):
    """A number for each pixel, and for each part its numbers and three to five sliders, which change it more than the
    rest; both eyes are a part, and each is."""
    found = post(site, "/api/regions", values=BASE)
    regions, parts = np.array(found["map"]), {one["name"]: one for one in found["regions"]}
    assert parts.keys() == {*gan.PARTS, "eyes"} and len(found["map"]) == SIZE * SIZE
    assert sorted(parts["eyes"]["numbers"]) == sorted(parts["left eye"]["numbers"] + parts["right eye"]["numbers"])
    for part in parts.values():
        assert 3 <= len(part["sliders"]) <= 5 and all(len(one["words"]) in (0, 2) for one in part["sliders"])
        assert np.isin(regions, part["numbers"]).sum() >= 8
        assert part["sliders"][0]["inside"] > 1.5 * part["sliders"][0]["outside"]


def test_the_average_face_is_told(site):
    """A vector that can be asked for."""
    values = get(site, "/api/average?checkpoint=last")["values"]
    assert site.respond("GET", target(values)).status == 200


def test_a_region_slider_moves_its_region(site, run, auto):
    """In the pictures themselves, not by what is said of it."""
    slider = post(site, "/api/region", values=BASE, mask=MASK)["sliders"][0]
    moved = np.array(BASE) + 0.5 * np.array(slider["vector"])
    change = (oracle(run / "last.pt", moved.tolist()) - oracle(run / "last.pt", BASE)) ** 2
    assert change[:SIZE // 2].mean() > 3 * change[SIZE // 2:].mean()


def test_paint_brings_the_face_nearer_to_the_painted(site, run, auto):
    """Where the mask is, and the rest stays nearer to what it was than another face is."""
    face, other = oracle(run / "last.pt", BASE), oracle(run / "last.pt", changed(0, 3)[::-1])
    painted = face.copy()
    painted[:SIZE // 2] = other[:SIZE // 2]
    found = post(site, "/api/paint", values=BASE, target=png_url(painted), mask=MASK)
    after = oracle(run / "last.pt", found["values"])
    weights = np.array(MASK).reshape(SIZE, SIZE, 1) + 0.25  # the rest counts a quarter
    distance = np.sqrt((weights * (after - painted) ** 2).sum() / (3 * weights.sum()))
    assert found["distance"] == pytest.approx(distance, abs=0.5)  # the picture is rounded
    assert (abs(after - painted)[:SIZE // 2]).mean() < 0.8 * (abs(face - painted)[:SIZE // 2]).mean()
    assert (abs(after - face)[SIZE // 2:]).mean() < (abs(other - face)[SIZE // 2:]).mean()


def test_a_photo_is_cut_where_the_box_is(site):
    """A box inside is resized, one that hangs over is mirrored, and the size of the upright photo is told."""
    image = Image.open(io.BytesIO(photo()))
    found = post(site, "/api/photo?box=4,4,36,36", photo())
    assert (found["width"], found["height"]) == (60, 40) and len(found["faces"]) == 1
    assert found["faces"][0]["box"] == [4, 4, 36, 36] and image_of(found["picture"]).shape == (40, 60, 3)
    assert (image_of(found["faces"][0]["target"]) == np.asarray(image.crop((4, 4, 36, 36)))).all()
    widest = post(site, "/api/photo?box=-30,-40,90,80", photo())["faces"]  # twice the photo's longer side
    assert image_of(widest[0]["target"]).shape == (SIZE, SIZE, 3)
    over = image_of(post(site, "/api/photo?box=-10,0,22,32", photo())["faces"][0]["target"])
    assert (over[:, 9] == over[:, 10]).all() and (over[:, 0] == over[:, 19]).all()


@pytest.mark.parametrize("boxes, note", [([], "no face"), ([(0, 0, 30, 30), (20.5, 5, 45.5, 30)], ""), (None, "pip install")])
def test_faces_of_a_photo_are_found(site, monkeypatch, boxes, note):
    """Each found one as a target; none found or no detector there: a note says what to do."""
    def find(image):
        if boxes is None:
            raise gan.UserError("finding faces needs: pip install it")
        return [(box, 20.0) for box in boxes]
    monkeypatch.setattr(gan, "find_faces", find)
    found = post(site, "/api/photo", photo())
    assert [tuple(one["box"]) for one in found["faces"]] == (boxes or []) and note in found["note"]
    assert all(image_of(one["target"]).shape == (SIZE, SIZE, 3) for one in found["faces"])


def test_a_photo_becomes_a_face_step_by_step(site, run, auto):
    """Each answer is nearer than the one before until it says done; a face of the network is found nearly again."""
    url, values, distances = png_url(oracle(run / FILES["4"], BASE)), None, []
    for _ in range(40):
        found = post(site, "/api/invert", target=url, values=values, checkpoint="4")
        values = found["values"]
        distances.append(found["distance"])
        if found["done"]:
            break
    assert found["done"] and distances == sorted(distances, reverse=True) and distances[-1] < 0.6 * distances[0]


def test_the_grids_and_the_curves_of_a_run_are_told(copied):
    """As they lie there, also those that came after the server began."""
    site = gan.Site(copied, None, CPU)
    epochs = get(site, "/api/samples")["epochs"]
    assert epochs[0] == 0 and epochs[-1] == 4 and get(site, "/api/samples")["tile"] == SIZE
    (copied / "samples" / "epoch-00007.png").write_bytes((copied / "samples" / "epoch-00004.png").read_bytes())
    assert get(site, "/api/samples")["epochs"] == [*epochs, 7]
    assert get(site, "/samples/7").body == (copied / "samples" / "epoch-00004.png").read_bytes()
    assert get(site, "/curves.png").body == (copied / "curves.png").read_bytes() and get(site, "/api/samples")["curves"]


def test_a_run_is_a_film(copied):
    """A frame a grid: of one face, of all."""
    for epoch, grid in enumerate(sorted((copied / "samples").glob("epoch-*.png"))):  # equal frames would be merged
        grid.write_bytes(gan.grid_png(torch.full((100, 3, SIZE, SIZE), 40 * epoch, dtype=torch.uint8)))
    site = gan.Site(copied, None, CPU)
    for path, side in (("/api/timelapse?face=11", 3 * SIZE), ("/api/timelapse", (10 * (SIZE + 2) + 2) // 2)):
        response = get(site, path)
        with Image.open(io.BytesIO(response.body)) as film:
            assert (response.status, response.kind, film.size) == (200, "image/webp", (side, side))
            film.load()  # tells how many milliseconds its first frame lasts
            assert film.n_frames == len(get(site, "/api/samples")["epochs"]) and film.info["duration"] == 100
    for grid in site.grids().values():
        grid.unlink()
    assert get(site, "/api/timelapse").status == 404 and get(site, "/api/samples")["epochs"] == []


def test_a_film_passes_through_the_faces(site, run):
    """It starts and ends at the faces given, and a loop ends before it comes round."""
    vectors = [BASE, changed(5, 3)[::-1]]
    for loop, count in ((False, 25), (True, 48)):
        response = post(site, "/api/film", vectors=vectors, scale=1, loop=loop)
        with Image.open(io.BytesIO(response.body)) as film:
            assert film.format == "WEBP" and film.size == (SIZE, SIZE) and film.n_frames == count
            film.seek(24)
            there = blurred(np.asarray(film.convert("RGB")))
        last, first = (abs(there - blurred(oracle(run / "last.pt", z))).mean() for z in (vectors[1], BASE))
        assert last < first / 2


def test_neighbours_are_the_most_alike(site, run, dataset, monkeypatch):
    """A training face has itself for nearest, at no distance; the rest are farther in order."""
    images = gan.load_faces(dataset)[0]
    monkeypatch.setattr(gan, "sample_images", lambda generator, z: images[7:8])
    found = post(gan.Site(run, None, CPU), "/api/neighbours", values=BASE)
    assert found["distances"] == sorted(found["distances"]) and found["distances"][0] == pytest.approx(0, abs=0.05)
    assert (image_of(found["picture"])[:, :SIZE] == images[7].permute(1, 2, 0).numpy()).all()


def test_of_some_faces_the_most_realistic_is_told(site, run, dataset, monkeypatch):
    """A training face of many like it is more realistic than noise, wherever it stands."""
    images = gan.load_faces(dataset)[0][:2].clone()
    images[1] = torch.randint(0, 256, images[1].shape, generator=torch.Generator().manual_seed(0))
    for order, best in ([[0, 1, 1], 0], [[1, 1, 0], 2]):
        monkeypatch.setattr(gan, "sample_images", lambda generator, z, order=order: images[order])
        assert post(gan.Site(run, None, CPU), "/api/best", vectors=[BASE] * 3) == {"best": best}


def test_neighbours_among_other_faces_than_the_networks_are_a_404(copied, tmp_path):
    """Where another dataset has taken the place of its own."""
    gan.prepare(gan.PrepareSettings(demo=True, data=str(tmp_path / "data"), size=SIZE, limit=20))
    state = gan.read_checkpoint(copied / "last.pt")
    state["settings"]["data"] = str(tmp_path / "data")
    gan.write_checkpoint(copied / "last.pt", state)
    response = post(gan.Site(copied, None, CPU), "/api/neighbours", values=BASE)
    assert response.status == 404 and b"does not hold the faces that this network was trained on" in response.body


def test_grids_of_any_epoch_are_shown(trained, tmp_path):
    """A run may have ten million epochs: all that are listed, in their order."""
    run = gan.shutil.copytree(trained, tmp_path / "run")
    for epoch in (9_999, 10_000, 10 ** 7):
        grid = gan.grid_png(torch.full((4, 3, 32, 32), epoch % 250, dtype=torch.uint8))
        (run / "samples" / f"epoch-{epoch:05d}.png").write_bytes(grid)
    site = gan.Site(run, None, CPU)
    assert get(site, "/api/samples")["epochs"] == [0, 1, 2, 3, 4, 9_999, 10_000, 10 ** 7]
    for epoch in (4, 9_999, 10_000, 10 ** 7):
        answer = site.respond("GET", f"/samples/{epoch}")
        assert (answer.status, answer.body) == (200, (run / "samples" / f"epoch-{epoch:05d}.png").read_bytes())
    assert [site.respond("GET", f"/samples/{epoch}").status for epoch in (10_001, 10 ** 7 + 1)] == [404, 400]


def test_without_the_dataset_neighbours_are_a_404(copied, tmp_path, monkeypatch):
    """With a line that says so."""
    monkeypatch.chdir(tmp_path)  # where no other dataset is called data
    state = gan.read_checkpoint(copied / "last.pt")
    state["settings"]["data"] = "gone"
    gan.write_checkpoint(copied / "last.pt", state)
    site = gan.Site(copied, None, CPU)
    for response in (post(site, "/api/neighbours", values=BASE), post(site, "/api/best", vectors=[BASE] * 2)):
        assert response.status == 404 and b"training faces" in response.body
    assert not get(site, "/api/model")["dataset"]


# ---- what is refused ----

@pytest.mark.parametrize("path, body, named", [
    ("/api/faces", {}, "vectors"), ("/api/faces", {"vectors": []}, "vectors"), ("/api/faces", {"vectors": [BASE] * 65}, "vectors"),
    ("/api/faces", {"vectors": [BASE[1:]]}, "128 numbers"), ("/api/faces", {"vectors": [BASE, changed(3, "1")]}, "value 3"),
    ("/api/faces", {"vectors": [changed(9, 101)]}, "value 9"), ("/api/faces", {"vectors": [changed(9, True)]}, "value 9"),
    ("/api/faces", {"vectors": [changed(9, float("nan"))]}, "value 9"), ("/api/faces", {"vectors": [changed(9, 10 ** 400)]}, "value 9"),
    ("/api/faces", {"vectors": [BASE] * 64, "scale": 8}, "too large"), ("/api/faces", {"vectors": [BASE], "scale": 1.5}, "scale"),
    ("/api/faces", {"vectors": [BASE], "checkpoint": "../x"}, "checkpoint"), ("/api/faces", {"vectors": [BASE], "checkpoint": 2}, "checkpoint"),
    ("/api/faces", {"vectors": [BASE], "checkpoint": ["2"]}, "checkpoint"), ("/api/regions", {}, "values"),
    ("/api/regions", {"values": "1,2"}, "values"), ("/api/region", {"values": BASE}, "mask"),
    ("/api/region", {"values": BASE, "mask": [0] * SIZE * SIZE}, "mask: nothing"), ("/api/region", {"values": BASE, "mask": MASK[1:]}, "mask"),
    ("/api/region", {"values": BASE, "mask": [*MASK[1:], 1.1]}, "mask"), ("/api/paint", {"values": BASE, "mask": MASK}, "target"),
    ("/api/paint", {"values": BASE, "mask": MASK, "target": "x"}, "target"), ("/api/invert", {"target": None}, "target"),
    ("/api/invert", {"target": "data:image/png;base64,AAAA"}, "target"), ("/api/invert", {"target": {"a": 1}}, "target"),
    ("/api/invert", {"target": png_url(np.zeros((31, 32, 3)))}, "target"), ("/api/invert", {"target": png_url(np.zeros((32, 32, 3))), "values": [1]}, "values"),
    ("/api/film", {"vectors": [BASE]}, "vectors"),
    ("/api/film", {"vectors": [BASE] * 33}, "vectors"), ("/api/film", {"vectors": [BASE] * 2, "scale": 5}, "scale"),
    ("/api/neighbours", {"values": None}, "values")])
def test_wrong_question_is_named(site, path, body, named):
    """A 4xx whose one line names what is wrong."""
    response = site.respond("POST", path, json.dumps(body).encode())
    assert response.status in (400, 404) and named in response.body.decode() and response.body.count(b"\n") == 1


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000, b'"x"', b"null"])
def test_a_body_that_is_no_object_is_refused(site, body):
    """Whatever else it is."""
    response = site.respond("POST", "/api/faces", body)
    assert response.status == 400 and b"JSON" in response.body


@pytest.mark.parametrize("query, body", [
    ("", b""), ("", b"no photo"), ("", b"GIF89a"), ("?box=1,2,3", photo()), ("?box=a,b,c,d", photo()), ("?box=0,0,4,4", photo()),
    ("?box=0,0,20,30", photo()), ("?box=100,0,130,30", photo()), ("?box=-300,-300,300,300", photo()), ("?box=1e9,0,1e9,0", photo()),
    ("?box=-30.5,-40.5,90.5,80.5", photo()), ("?box=nan,0,1,1", photo())])
def test_a_hostile_photo_or_box_gets_one_line(site, query, body):
    """And nothing else happens."""
    response = site.respond("POST", "/api/photo" + query, body)
    assert response.status == 400 and response.body.count(b"\n") == 1 and b"0x" not in response.body


@pytest.mark.parametrize("path", ["/samples/", "/samples/99", "/samples/..", "/samples/../last.pt", "/samples/0/", "/samples/%30",
                                  "/samples/-1", "/samples/real", "/samples/٣", "/samples/999999999"])
def test_other_grids_are_not_reachable(site, path):
    """Only those in the list."""
    assert site.respond("GET", path).status in (400, 404)


def test_get_and_post_are_not_the_same(site):
    """Each address takes one of them, and says which."""
    assert dict(site.respond("GET", "/api/faces").headers)["Allow"] == "POST"
    assert dict(site.respond("POST", "/api/directions").headers)["Allow"] == "GET, HEAD"


# ---- sockets ----

@pytest.mark.parametrize("path", ["/api/photo?box=4,4,36,36", "/api/invert", "/api/regions"])
def test_a_long_request_keeps_no_slider_waiting(run, monkeypatch, path):
    """While a photo or a touch of one client is being worked on, and another one's touch waits behind it, both get
    faces: the client that waits, over a second connection, and the other."""
    body = photo() if "photo" in path else json.dumps(
        {"values": BASE, "target": png_url(np.zeros((SIZE, SIZE, 3)))}).encode()
    touch = json.dumps({"values": BASE, "mask": MASK}).encode()
    working, go_on, answers = threading.Event(), threading.Event(), []
    name = {"photo": "crop_square", "invert": "fit_step", "regions": "find_regions"}[path.partition("?")[0][5:]]
    real = getattr(gan, name)

    def held(*arguments):
        working.set()
        assert go_on.wait(PATIENCE)
        return real(*arguments)
    monkeypatch.setattr(gan, name, held)

    def ask_for(port, path, body):
        answers.append(statuses(talk(port, request(port, "POST", path, f"Content-Length: {len(body)}", body=body))))
    with serving(gan.Site(run, None, CPU)) as server:
        first = threading.Thread(target=ask_for, args=(server.port, path, body))
        second = threading.Thread(target=ask_for, args=(server.port, "/api/region", touch))
        first.start()
        assert working.wait(PATIENCE)
        second.start()
        with ThreadPoolExecutor(2) as clients:  # each drags a slider
            found = list(clients.map(lambda client: [talk(server.port, request(server.port, path=target(changed(client, i / 5))))
                                                     for i in range(10)], range(2)))
        assert answers == []  # both still wait
        for client, faces in enumerate(found):
            assert all(same(picture(answer.partition(b"\r\n\r\n")[2]), oracle(run / "last.pt", changed(client, i / 5)))
                       for i, answer in enumerate(faces))
        go_on.set()
        first.join(PATIENCE)
        second.join(PATIENCE)
    assert answers == [[200], [200]]


def test_a_photo_may_be_large_and_nothing_else(run):
    """A photo of several MB is taken; JSON of the size, and a photo beyond its limit, are refused before they are read."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)).save(buffer, "PNG")
    with serving(gan.Site(run, None, CPU)) as server:
        for path, length, body, status in [
                ("/api/photo?box=0,0,900,900", len(buffer.getvalue()), buffer.getvalue(), 200),
                ("/api/faces", gan.MAX_BODY_BYTES + 1, b"", 413), ("/api/photo", gan.MAX_PHOTO_BYTES + 1, b"", 413)]:
            answer = talk(server.port, request(server.port, "POST", path, f"Content-Length: {length}", body=body))
            assert statuses(answer) == [status]


def test_curl_waits_for_100_continue(run):
    """It asks before it sends a large body, and would wait a second for the word."""
    with serving(gan.Site(run, None, CPU)) as server, connect(server.port) as client:
        body = json.dumps({"vectors": [BASE]}).encode()
        client.sendall(request(server.port, "POST", "/api/faces", "Expect: 100-continue", "Connection: close",
                               f"Content-Length: {len(body)}"))
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert statuses(read_all(client)) == [200]


def test_a_client_that_still_sends_reads_why_it_is_refused(run):
    """The line of a 413 arrives although megabytes of the body are on their way."""
    with serving(gan.Site(run, None, CPU)) as server, closing(
            HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)) as client:
        status, line, _ = ask(client, "POST", "/api/faces", body=bytes(5_000_000))
        assert status == 413 and b"too large" in line


# ---- files to give away ----

def kernel() -> bytes:
    """The WebAssembly module of the exported page, from its instructions. For each input in turn, four numbers of A and
    eight weights of B are multiplied and added up in eight registers; at the end these are stored."""
    get, set_, a, b, end, to, sums, weights, number = 0x20, 0x21, 0, 1, 2, 3, 4, 12, 14  # locals; v128 from `sums` on

    def sized(content: list[int]) -> list[int]:
        return [len(content) & 127 | 128, len(content) >> 7, *content]  # LEB128

    def name(text: str) -> list[int]:
        return [len(text), *text.encode()]
    code = [1, 11, 0x7B, 0x03, 0x40]  # eleven locals of type v128; loop
    for half in range(2):
        code += [get, b, 0xFD, 0x00, 0, 16 * half, set_, weights + half]  # v128.load
    for row in range(4):
        code += [get, a, 0xFD, 0x09, 0, 4 * row, set_, number]  # v128.load32_splat
        for half in range(2):
            code += [get, sums + 2 * row + half, get, number, get, weights + half, 0xFD, 0xE6, 1, 0xFD, 0xE4, 1,
                     set_, sums + 2 * row + half]  # f32x4.mul, f32x4.add
    code += [get, a, 0x41, 16, 0x6A, set_, a, get, b, 0x41, 32, 0x6A, set_, b]  # a += 16, b += 32
    code += [get, b, get, end, 0x49, 0x0D, 0, 0x0B]  # i32.lt_u, br_if the loop, end
    for register in range(8):
        code += [get, to, get, sums + register, 0xFD, 0x0B, 0, 16 * register]  # v128.store
    return bytes([0, *b"asm", 1, 0, 0, 0, 1, *sized([1, 0x60, 4, *[0x7F] * 4, 0]),  # a type: four i32, nothing returned
                  2, *sized([1, *name("m"), *name("memory"), 2, 0, 1]), 3, *sized([1, 0]),
                  7, *sized([1, *name("tile"), 0, 0]), 10, *sized([1, *sized([*code, 0x0B])])])


def test_the_exported_pages_kernel_is_its_source():
    """The one that it multiplies matrices with."""
    page = (gan.Path(gan.__file__).parent / "gan_eval.html").read_text("utf-8")
    held = "".join(re.findall(r"'([\w+/=]*)'", page.partition("const wasm = ")[2].partition(";")[0]))
    assert base64.b64decode(held) == kernel()


def test_the_exported_page_has_the_network_and_its_parts(run, tmp_path):
    """And sliders of these, which change each more than the rest of a face that they were not fitted to; its policy lets in
    its own script and style and no network. (test_page.py sees that its faces are the server's.)"""
    assert gan.main(["export", str(tmp_path / "faces.html"), "--run", str(run)]) == 0
    page = (tmp_path / "faces.html").read_text("utf-8")
    network = json.loads(page.partition('id="network">')[2].partition("</script>")[0])
    assert (network["image_size"], network["latent_size"], network["epoch"], len(network["directions"])) == (32, 128, 4, 12)
    generator, _ = gan.load_generator(run / "last.pt", CPU)
    z, parts = gan.sample_latents(1, seed=9)[0], np.array(network["map"]).reshape(32, 32)
    moved, beside = np.zeros(2), np.zeros(2)
    for part in network["regions"]:
        inside = torch.from_numpy(np.isin(parts, part["numbers"]))
        step = torch.tensor(part["sliders"][0]["vector"])
        change = (generator((z + step)[None]) - generator((z - step)[None]))[0].square().mean(0)
        moved += change[inside].sum().item(), inside.sum().item()
        beside += change[~inside].sum().item(), (~inside).sum().item()
    assert moved[0] / moved[1] > 2 * beside[0] / beside[1]
    policy = page.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    assert policy.startswith("default-src 'none'") and "worker-src blob:" in policy and "connect" not in policy
    original = (gan.Path(gan.__file__).parent / "gan_eval.html").read_text("utf-8")
    script = original.partition("<script>")[2].partition("</script>")[0]
    assert f"<script>{script}</script>" in page and page.count("<script") == 2


def test_the_exported_onnx_network_makes_the_same_faces(run, tmp_path):
    """As another implementation evaluates it, for any number of vectors."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator
    assert gan.main(["export", str(tmp_path / "faces.onnx"), "--run", str(run)]) == 0
    onnx.checker.check_model(str(tmp_path / "faces.onnx"), full_check=True)
    generator, _ = gan.load_generator(run / "last.pt", CPU)
    z = gan.sample_latents(3, seed=5)
    found, = ReferenceEvaluator(str(tmp_path / "faces.onnx")).run(None, {"z": z.numpy()})
    assert np.abs(found - generator(z).numpy()).max() < 1e-4


@pytest.mark.parametrize("name", ["faces.txt", "faces"])
def test_another_kind_of_export_is_one_line(trained, capsys, name):
    """Naming the two that there are."""
    assert gan.main(["export", name, "--run", str(trained)]) == 1
    error = capsys.readouterr().err
    assert "neither in .html nor in .onnx" in error and error.count("\n") == 1


def test_invert_writes_the_face_of_a_photo(trained, tmp_path, monkeypatch, capsys):
    """As PNG or as numbers; no face in the photo, no photo: one line and no file."""
    (tmp_path / "photo.png").write_bytes(photo())
    monkeypatch.setattr(gan, "find_faces", lambda image: [((4.0, 4.0, 36.0, 36.0), 0.0)])
    for name in ("face.png", "face.json"):
        assert gan.main(["invert", str(tmp_path / "photo.png"), "--run", str(trained), "--out", str(tmp_path / name)]) == 0
    z = json.loads((tmp_path / "face.json").read_text())
    generator, _ = gan.load_generator(trained / "last.pt", CPU)
    expected = gan.sample_images(generator, torch.tensor([z]), precision="fp32")[0].permute(1, 2, 0).numpy().astype(int)
    assert len(z) == 128 and same(picture((tmp_path / "face.png").read_bytes()), expected)
    monkeypatch.setattr(gan, "find_faces", lambda image: [])
    for file in ("photo.png", "absent.png", "face.json"):
        capsys.readouterr()
        assert gan.main(["invert", str(tmp_path / file), "--run", str(trained), "--out", str(tmp_path / "no.png")]) == 1
        error = capsys.readouterr().err
        assert file in error and error.count("\n") == 1 and not (tmp_path / "no.png").exists()


def test_the_way_between_faces_is_spherical():
    """Lengths change evenly, the angle too, and each given vector is passed; a straight line would cut the middle short."""
    a, b = torch.eye(128)[:2] * torch.tensor([[10.0], [12.0]])
    way = gan.interpolate(torch.stack([a, b]), frames=10)
    assert len(way) == 11 and torch.allclose(way[0], a) and torch.allclose(way[-1], b)
    assert torch.allclose(way.norm(dim=1), torch.linspace(10, 12, 11), atol=1e-3)
    assert torch.allclose(torch.atan2(way[:, 1], way[:, 0]), torch.linspace(0, torch.pi / 2, 11), atol=1e-4)
    assert way[5].norm() > ((a + b) / 2).norm() * 1.3
    assert torch.allclose(gan.interpolate(torch.stack([a, a * 2]), frames=2), torch.stack([a, a * 1.5, a * 2]))
    assert gan.interpolate(torch.stack([a, -a])).isfinite().all() and gan.interpolate(torch.zeros(2, 128)).isfinite().all()
