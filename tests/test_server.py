"""The server: the pure function from request to response first, then real sockets around it."""
import base64
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from conftest import CPU, FILES
from forked import Forked
from PIL import Image
from soak import PATIENCE, bombard, connect, faces, read_all, request, statuses, talk

import gan

BASE = [round(v, 2) for v in np.random.default_rng(5).normal(size=128).clip(-3, 3).tolist()]


# ---- helpers, some of them also for test_page.py ----

def oracle(path: Path, values, precision=nullcontext) -> np.ndarray:
    """The face (S, S, 3) of one vector, generated in float32 from the checkpoint file without any of gan.py's code for
    that; strips are made in gan.autocast(CPU), and the gain of `run` would make much of a difference that nobody sees."""
    state = torch.load(path, weights_only=True)
    generator = gan.Generator(state["image_size"], state["settings"]["width"]).eval()
    generator.load_state_dict(state["networks"]["averaged"])
    with torch.no_grad(), precision():
        face = generator(torch.tensor([values], dtype=torch.float32))[0].float()
    return ((face + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy().astype(int)


def picture(body: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(body)) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image).astype(int)


def same(one: np.ndarray, two: np.ndarray, levels: int = 1) -> bool:
    """Equal up to one grey level, which the order of float additions may cost."""
    return one.shape == two.shape and np.abs(one - two).max() <= levels


def changed(i: int, value) -> list:
    return [*BASE[:i], value, *BASE[i + 1:]]


def target(values=BASE, **more) -> str:
    return "/generate?values=" + ",".join(map(str, values)) + "".join(f"&{k}={quote(str(v), '')}" for k, v in more.items())


@contextmanager
def serving(site: gan.Site, host="127.0.0.1"):
    """A server on a free port, in a thread."""
    with gan.Server(site, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(site):
    with serving(site) as server:
        yield server


@pytest.fixture
def client(server):
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)) as connection:
        yield connection


def ask(client, method="GET", path="/", **options) -> tuple[int, bytes, http.client.HTTPMessage]:
    client.request(method, path, **options)
    answer = client.getresponse()
    return answer.status, answer.read(), answer.headers


# ---- the pure function ----

@pytest.mark.parametrize("which", [None, *FILES])
def test_face_is_the_averaged_generators(site, run, which):
    """/generate answers the picture that the averaged weights of the asked checkpoint make, and no other's."""
    answer = site.respond("GET", target() if which is None else target(checkpoint=which))
    assert (answer.status, answer.kind) == (200, "image/png")
    assert [same(picture(answer.body), oracle(run / file, BASE)) for file in FILES.values()] == [
        name == (which or "last") for name in FILES]


@pytest.mark.parametrize("i", [0, 1, 64, 127])
def test_value_i_is_number_i_of_z(site, run, i):
    """Changing value i changes the picture as z[i] does, and as no neighbour does."""
    found = picture(site.respond("GET", target(changed(i, 3))).body)
    assert same(found, oracle(run / "last.pt", changed(i, 3)))
    assert not same(found, oracle(run / "last.pt", BASE))
    assert not same(found, oracle(run / "last.pt", changed((i + 1) % 128, 3)))


@pytest.mark.parametrize("scale", [1, 2, 8])
def test_scale_enlarges_the_same_face(site, run, scale):
    """scale=N is the face in N times its size: shrunk again it is nearly the face."""
    plain, large = oracle(run / "last.pt", BASE), picture(site.respond("GET", target(scale=scale)).body)
    assert large.shape == (32 * scale, 32 * scale, 3)
    shrunk = large.reshape(32, scale, 32, scale, 3).mean((1, 3))
    assert np.corrcoef(shrunk.ravel(), plain.ravel())[0, 1] > 0.97


@pytest.mark.parametrize("text", ["0", "-0", "%2B.5", "5.", "1e-999", "-1E1", "100", "-1e2"])
def test_numbers_in_usual_notation_are_taken(site, run, text):
    """A number may be written with sign, point and exponent."""
    value = float(text.replace("%2B", "+"))
    assert same(picture(site.respond("GET", target(changed(3, text))).body), oracle(run / "last.pt", changed(3, value)))


@pytest.mark.parametrize("i", [0, 57, 127])
@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-Infinity", "1e999", "1e30", "-101", "", "%20", "one", "1_0", "0x1",
                                  "1e", "--1", "1%001", "%D9%A1", "9" * 5000])
def test_wrong_number_is_named(site, i, text):
    """A value that is no finite number within the limit is a 400 whose one line says which it is."""
    answer = site.respond("GET", target(changed(i, text)))
    assert answer.status == 400 and re.fullmatch(rf"values: value {i} .{{1,200}}\n", answer.body.decode())


@pytest.mark.parametrize("query, named", [
    ("", "values"), ("?", "values"), ("?values", "values"), ("?values=", "values"), ("?values=1", "values"),
    ("?values=" + ",".join("0" * 127), "values"), ("?values=" + ",".join("0" * 129), "values"),
    ("?value=" + ",".join("0" * 128), "values"), ("?values=" + "," * 10_000, "values"), ("?values=%FF", "address"),
    (target()[9:] + "&values=1", "values"), (target(scale=1)[9:] + "&scale=1", "scale"), ("?" + "a=1&" * 50, "address")])
def test_wrong_query_is_refused(site, query, named):
    """Values absent, repeated, too few, too many or unreadable: 400 and one line that names them."""
    answer = site.respond("GET", "/generate" + query)
    assert answer.status == 400 and re.fullmatch(rf".{{0,20}}{named}.{{1,200}}\n", answer.body.decode())


@pytest.mark.parametrize("scale", ["0", "9", "-1", "1.5", "", "+2", "0x2", "²", "٢", "1e0", "00018", "0001" + "0" * 5000],
                         ids=lambda scale: ascii(scale)[:9])
def test_wrong_scale_is_refused(site, scale):
    """A scale that is no whole number from 1 to 8, however it is written, is a 400 that names it."""
    answer = site.respond("GET", target(scale=scale))
    assert answer.status == 400 and b"scale" in answer.body


@pytest.mark.parametrize("which", ["", "3", "best", "../x", "../run/last", "/etc/passwd", "epoch-00002.pt", "last.pt", "last\0",
                                   "2.0", "²", "-2", "9" * 5000])
def test_unknown_checkpoint_is_refused(site, run, which):
    """Checkpoints are looked up by the names of /api/model; anything else, a true path above all, is a 4xx."""
    for name in (which, run / which if which.isprintable() else which):
        answer = site.respond("GET", target(checkpoint=name))
        assert answer.status in (400, 404) and answer.body.count(b"\n") == 1


@pytest.mark.parametrize("path", [
    "", "*", "/gan.py", "/../gan.py", "/..%2fgan.py", "/%2e%2e/gan.py", "/%67an.py", "/gan_eval.html", "/last.pt", "/config.json",
    "/log.jsonl", "/samples/", "/.git/config", "/etc/passwd", "//etc/passwd", "/generate/../gan.py", "/api", "/api/model/",
    "/generate/", "/\\..\\gan.py", "/%00", "/.", "/..", "file:///etc/passwd", "http://a/gan.py", "//[::1", "/\xff"])
def test_nothing_else_is_reachable(site, path):
    """There are the page, /generate and /api/model; every other address is refused."""
    answer = site.respond("GET", path)
    assert answer.status in (400, 404) and answer.body.count(b"\n") == 1 and len(answer.body) < 200


@pytest.mark.parametrize("path", ["/", "/generate", "/nothing"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", ""])
def test_other_methods_are_refused(site, method, path):
    """Only GET and HEAD are answered, but by what takes a POST; 405 says so in Allow."""
    answer = site.respond(method, path)
    assert answer.status == 405 and dict(answer.headers)["Allow"] == "GET, HEAD"


def test_model_is_described(site, run):
    """/api/model names run, checkpoints with epochs, and sizes."""
    answer = site.respond("GET", "/api/model")
    facts = json.loads(answer.body)
    assert answer.kind == "application/json" and facts["run"] == str(run)
    assert (facts["latent_size"], facts["image_size"], facts["model"], facts["default"]) == (128, 32, "WGAN-GP", "last")
    assert {c["name"]: c["epoch"] for c in facts["checkpoints"]} == {
        "last": 4, "2": 2, "4": 4}
    for one in facts["checkpoints"]:
        assert one["id"] == gan.load_generator(run / FILES[one["name"]], CPU)[1]["id"]
        assert same(picture(site.respond("GET", target(checkpoint=one["id"])).body), oracle(run / FILES[one["name"]], BASE))


def test_the_scores_of_checkpoints_are_told(copied):
    """Those of its epoch in the log; null where nothing was judged."""
    lines = [{"epoch": 3}, {"epoch": 4, "scores": {"distance": 12.5}}]
    (copied / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = json.loads(gan.Site(copied, None, CPU).respond("GET", "/api/model").body)
    assert {c["name"]: c["scores"] for c in facts["checkpoints"]} == {
        "last": {"distance": 12.5}, "2": None, "4": {"distance": 12.5}}


def test_newer_checkpoint_is_picked_up(copied):
    """A last.pt that training replaced makes the next face."""
    site = gan.Site(copied, None, CPU)
    os.replace(copied / "epoch-00002.pt", copied / "last.pt")
    assert same(picture(site.respond("GET", target()).body), oracle(copied / "last.pt", BASE))


def test_requests_beside_saves_are_all_answered(copied):
    """While another thread saves again and again, and best.pt appears."""
    site, state, over = gan.Site(copied, None, CPU), gan.read_checkpoint(copied / "last.pt"), threading.Event()

    def save():
        while not over.is_set():
            gan.save_last(copied, state)
            gan.write_checkpoint(copied / "best.pt", state)
    thread = threading.Thread(target=save)
    thread.start()
    try:
        answers = [site.respond("GET", path).status for path in (target(), "/api/model", "/api/samples") * 20]
    finally:
        over.set()
        thread.join()
    assert answers == [200] * 60


def test_a_checkpoint_that_was_replaced_is_held_while_it_is_used(copied):
    """By its identity, as long as somebody asks for it, were it by asking what there is; then it is a 404."""
    def ids() -> dict[str, str]:
        return {one["name"]: one["id"] for one in json.loads(site.respond("GET", "/api/model").body)["checkpoints"]}
    site, before = gan.Site(copied, None, CPU), oracle(copied / "last.pt", BASE)
    old = ids()["last"]
    assert same(picture(site.respond("GET", target(checkpoint=old)).body), before)
    state = gan.read_checkpoint(copied / "last.pt")
    for epoch in range(5, 25):
        state["progress"]["epoch"] = epoch
        gan.write_checkpoint(copied / "last.pt", state)
        assert ids()["last"].startswith(f"{epoch}-") and site.respond("GET", target()).status == 200
        if epoch < 15:
            assert site.respond("GET", f"/api/model?checkpoint={old}").status == 200
            assert same(picture(site.respond("GET", target(checkpoint=old)).body), before)
    gone = site.respond("GET", target(checkpoint=old))
    assert gone.status == 404 and b"no checkpoint" in gone.body


def test_the_default_follows_the_run(copied):
    """best.pt as soon as there is one; what was asked for by name stays that."""
    sites = {None: gan.Site(copied, None, CPU), "last": gan.Site(copied, "last", CPU)}
    shutil.copy(copied / "epoch-00002.pt", copied / "best.pt")
    for wanted, site in sites.items():
        name = wanted or "best"
        assert json.loads(site.respond("GET", "/api/model").body)["default"] == name
        assert same(picture(site.respond("GET", target()).body), oracle(copied / f"{name}.pt", BASE))


def test_the_first_look_at_training_faces_holds_up_nothing_else(copied, monkeypatch):
    """It may take seconds, and the page asks for it unasked; what else takes a second of all cores goes on."""
    looking, over = threading.Event(), threading.Event()

    def slow(*_):
        looking.set()
        assert over.wait(PATIENCE)
        raise gan.UserError("enough")
    monkeypatch.setattr(gan, "load_known_faces", slow)
    site, answers = gan.Site(copied, None, CPU), []
    body = json.dumps({"values": [0] * 128}).encode()
    thread = threading.Thread(target=lambda: answers.append(site.respond("POST", "/api/neighbours", body).status))
    thread.start()
    assert looking.wait(PATIENCE)
    answers += [site.respond("POST", "/api/average", body).status, site.respond("GET", "/api/average").status,
                site.respond("GET", target()).status]
    over.set()
    thread.join()
    assert answers == [405, 200, 200, 404]


def test_a_damaged_checkpoint_is_not_listed(copied):
    """And costs the others nothing."""
    (copied / "epoch-00002.pt").write_bytes(b"PK" + bytes(5000))
    answer = gan.Site(copied, None, CPU).respond("GET", "/api/model")
    assert [one["name"] for one in json.loads(answer.body)["checkpoints"]] == ["last", "4"]


# ---- sockets ----

@pytest.mark.parametrize("path", ["/api/model", "/samples/4"])
def test_what_is_still_the_same_is_not_sent_again(server, client, path):
    """To who names its ETag: 304 without a body; to who names another, all of it."""
    status, body, headers = ask(client, path=path)
    assert status == 200 and headers["Cache-Control"] == "no-cache"
    assert ask(client, path=path, headers={"If-None-Match": headers["ETag"]})[:2] == (304, b"")
    assert ask(client, path=path, headers={"If-None-Match": '"0"'})[:2] == (200, body)


class Page(HTMLParser):
    """Collects the texts of a page's scripts and styles, and the attributes that its policy would block."""

    def __init__(self, text: str):
        super().__init__()
        self.texts, self.tag, self.blocked = {"script": [], "style": []}, None, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        self.blocked += [name for name, _ in attributes if name.startswith("on") or name in ("src", "style")]

    def handle_data(self, data):
        if self.tag in self.texts:
            self.texts[self.tag].append(data)

    def handle_endtag(self, tag):
        self.tag = None


def test_policy_allows_the_pages_own_script_and_style_only(client):
    """The Content-Security-Policy holds the SHA-256 of the one script and the one style, and nothing wider."""
    status, body, headers = ask(client)
    page, policy = Page(body.decode()), headers["Content-Security-Policy"]
    assert status == 200 and headers["Content-Type"].startswith("text/html") and page.blocked == []
    for tag, texts in page.texts.items():
        digest = base64.b64encode(hashlib.sha256("".join(texts).encode()).digest()).decode()
        assert len(texts) == 1 and f"{tag}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy


@pytest.mark.parametrize("method, path", [("GET", "/"), ("GET", target()), ("GET", "/api/model"), ("GET", "/no"), ("POST", "/")])
def test_every_answer_is_fenced(client, method, path):
    """Every answer forbids sniffing, storing and scripts, and none opens the door to other sites."""
    _, _, headers = ask(client, method, path)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == ("no-cache" if path == "/api/model" else "no-store")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("hosts, good", [
    (["127.0.0.1:{port}"], True), (["LocalHost:{port}"], True), (["evil.example:{port}"], False), (["127.0.0.1"], True),
    (["localhost:1"], True), (["[::1]:8080"], True), (["evil.example:8080"], False), (["127.0.0.1.evil.example"], False), (["localhost.evil.example:{port}"], False), (["a@127.0.0.1:{port}"], False), ([""], False),
    ([":{port}"], False), ([], False)])
def test_host_must_be_our_own(server, hosts, good):
    """A Host header that is absent or not this server's name is refused: DNS rebinding. The names of this machine itself
    may have any port, as behind a tunnel or a container; what is refused is told what to open."""
    lines = "".join(f"Host: {host.format(port=server.port)}\r\n" for host in hosts)
    answer = talk(server.port, f"GET / HTTP/1.1\r\n{lines}\r\n".encode())
    assert statuses(answer) == [200 if good else 403] and (b"<html" in answer) == good
    assert good or f"open http://127.0.0.1:{server.port}/, or begin it with --host".encode() in answer


@pytest.mark.parametrize("host, names", [
    ("127.0.0.1", {"127.0.0.1": True, "10.0.0.5": False, "[::1]": True, "gan.example": False, "{own}": False}),
    ("0.0.0.0", {"127.0.0.1": True, "10.0.0.5": True, "[fe80::1]": True, "gan.example": False, "{own}": True})])
def test_addresses_are_names_only_where_all_are_bound(site, host, names):
    """A server on one address answers to no other; one on all of them to each, at any port as behind a container, and to
    the machine's name at its own."""
    with gan.Server(site, host, 0) as server:
        own = socket.gethostname()
        assert {name: server.is_own_name(f"{name.format(own=own)}:{server.port}") for name in names} == names
        elsewhere = {name: server.is_own_name(f"{name.format(own=own)}:{server.port ^ 1}") for name in names}
        assert elsewhere == names | {"{own}": False} and server.is_own_name(f"127.0.0.1:{server.port ^ 1}")


@pytest.mark.parametrize("origin, good", [
    ("http://127.0.0.1:{port}", True), ("http://localhost:{port}", False), ("http://evil.example", False), ("null", False),
    ("http://127.0.0.1:1", False), ("https://127.0.0.1:{port}", False), ("http://127.0.0.1:{port}.evil.example", False)])
def test_pages_elsewhere_may_not_ask(server, origin, good):
    """A request whose Origin is another page's is refused, whatever it asks: forms and scripts of other sites."""
    body = json.dumps({"vectors": [BASE]}).encode()
    asked = request(server.port, "POST", "/api/faces", f"Origin: {origin.format(port=server.port)}",
                    f"Content-Length: {len(body)}", body=body)
    assert statuses(talk(server.port, asked)) == [200 if good else 403]


def test_a_page_at_another_port_of_this_machine_may_not_ask(server):
    """Through a tunnel the page has the tunnel's port in Host and Origin; what another server here has made has not."""
    for host, origin, status in (("localhost:8080", "http://localhost:8080", 200), ("localhost", "http://localhost", 200),
                                 ("localhost:8080", "http://localhost:8081", 403)):
        answer = talk(server.port, f"GET /api/model HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\n\r\n".encode())
        assert statuses(answer) == [status]
    assert f"only its own page may ask this server: open http://127.0.0.1:{server.port}/".encode() in answer


def test_connection_is_kept(client):
    """Requests of every outcome travel over one connection, each answer in its place, their bodies dropped."""
    client.connect()
    first = client.sock
    for method, path, body, status in [("GET", target(), None, 200), ("GET", "/no", None, 404), ("HEAD", "/", None, 200),
                                       ("POST", "/", b"GET /x HTTP/1.1\r\n\r\n", 405), ("GET", "/generate", bytes(gan.MAX_BODY_BYTES), 400),
                                       ("GET", "/", None, 200)]:
        found, content, headers = ask(client, method, path, body=body)
        assert found == status and client.sock is first
        assert content == b"" if method == "HEAD" else len(content) == int(headers["Content-Length"])


def test_head_is_get_without_body(client):
    """HEAD answers the header of GET."""
    (got, _, headers), (status, body, head) = ask(client, "GET", target()), ask(client, "HEAD", target())
    assert status == got == 200 and body == b"" and head.items() == headers.items()


def test_requests_may_be_sent_before_the_answers_come(server):
    """Each is answered in its turn, what follows the last one that the client announces is not."""
    three = [request(server.port, "HEAD"), request(server.port, "POST", "/no", "Content-Length: 2", body=b"{}"),
             request(server.port, "GET", "/no", "Connection: close")]
    assert statuses(talk(server.port, b"".join(three) + request(server.port))) == [200, 405, 404]


@pytest.mark.parametrize("header", [[], ["Connection: keep-alive"]])
def test_an_http_1_0_client_is_told_whether_the_connection_ends(server, header):
    """It would wait for the end in vain otherwise."""
    with connect(server.port) as client:
        client.sendall(request(server.port, "GET", "/", *header, version="HTTP/1.0"))
        if header:
            client.sendall(request(server.port, version="HTTP/1.0"))
        answer = read_all(client)
    assert statuses(answer) == [200] * (1 + len(header)) and answer.count(b"\r\nConnection: close\r\n") == 1
    assert answer.count(b"\r\nConnection: keep-alive\r\n") == len(header)


def test_an_ipv6_address_is_served(site):
    """In brackets in its URL and in the Host header."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("there is no IPv6 here")
    with serving(site, "::1") as server, urlopen(server.url, timeout=PATIENCE) as answer:
        assert server.url == f"http://[::1]:{server.port}/" and b"<html" in answer.read()


@pytest.mark.parametrize("data, status", [
    ("GET /" + "x" * 65_536, 414), ("GET / HTTP/1.1\nHost: {host}\nX: " + "x" * 65_536, 431),
    ("GET / HTTP/1.1\nHost: {host}\n" + "X: x\n" * 100, 431),
    (f"GET / HTTP/1.1\nHost: {{host}}\nContent-Length: {gan.MAX_BODY_BYTES + 1}\n\n", 413),
    ("GET / HTTP/1.1\nHost: {host}\nContent-Length: " + "9" * 5000 + "\n\n", 413),
    ("GET / HTTP/1.1\nHost: {host}\nContent-Length: -1\n\n", 400), ("GET / HTTP/1.1\nHost: {host}\nContent-Length: 1_0\n\n", 400),
    ("GET / HTTP/1.1\nHost: {host}\nContent-Length: 3\nContent-Length: 4\n\nabc", 400),
    ("GET / HTTP/1.1\nHost: {host}\nContent-Length: 4\n\nabc", 400),
    ("POST / HTTP/1.1\nHost: {host}\nTransfer-Encoding: chunked\n\n0\n\n", 400),
    ("GET / HTTP/2.0\nHost: {host}\n\n", 400), ("GET / HTTP/1.x\nHost: {host}\n\n", 400), ("GET\n\n", 400),
    ("GET / x HTTP/1.1\n\n", 400), ("garbage\n\n", 400), ("\x16\x03\x01\x02\x00\x01\xfc\x03\x03\n\n", 400)],
    ids=["line", "long header", "many headers", "body", "huge body", "negative", "underscore", "two lengths", "cut off", "chunked",
         "HTTP/2", "HTTP/1.x", "no address", "four words", "garbage", "TLS"])
def test_unreadable_request_ends_the_connection(server, data, status):
    """What is too large or no HTTP/1 gets one 4xx with a line of text, and the connection ends."""
    lines = data.replace("{host}", f"127.0.0.1:{server.port}").replace("\n", "\r\n")
    answer = talk(server.port, lines.encode("latin-1"))
    assert statuses(answer) == [status] and b"\r\nConnection: close\r\n" in answer
    assert answer.partition(b"\r\n\r\n")[2].count(b"\n") == 1


def test_client_that_goes_away_leaves_no_trace(site, capfd, monkeypatch):
    """Whenever a client disconnects, nothing is printed and the next one is served."""
    ended, real = threading.Semaphore(0), gan.Server.shutdown_request

    def shutdown_request(self, connection):
        real(self, connection)
        ended.release()
    monkeypatch.setattr(gan.Server, "shutdown_request", shutdown_request)
    with serving(site) as server:
        full = request(server.port, path=target(scale=8))
        half = request(server.port, "POST", "/", "Content-Length: 50", body=b"half")
        for data in (b"", b"GE", full[:60], full[:-2], half, full, full * 30):
            for abruptly in (False, True):
                with connect(server.port) as connection:
                    if abruptly:  # a reset in place of an orderly end
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.sendall(data)
                assert ended.acquire(timeout=PATIENCE)
        assert statuses(talk(server.port, full)) == [200]
    assert capfd.readouterr().err == ""


def test_fault_inside_is_500_without_details(run, monkeypatch, capfd):
    """A fault of ours tells the client nothing and the operator one line; the connection goes on."""
    def fail(self, *_, **fields):
        raise RuntimeError("a secret\nof two lines")
    monkeypatch.setattr(gan.Site, "face", fail)
    with serving(gan.Site(run, None, CPU)) as server:
        answer = talk(server.port, request(server.port, path=target()) + request(server.port))
    assert statuses(answer) == [500, 200] and b"secret" not in answer and b"RuntimeError" not in answer
    assert re.fullmatch(r"gan\.py: GET '/generate.*' failed: RuntimeError: a secret.*\n", capfd.readouterr().err)


def test_damaged_checkpoint_costs_its_own_requests(copied, capfd):
    """A kept checkpoint that is damaged is a 500 for those who ask for it, with one line that names the file."""
    with serving(gan.Site(copied, None, CPU)) as server:
        (copied / "epoch-00002.pt").write_bytes(b"PK" + bytes(5000))
        answer = talk(server.port, request(server.port, path=target(checkpoint=2)) + request(server.port, path=target()))
    assert statuses(answer) == [500, 200] and str(copied).encode() not in answer
    assert re.fullmatch(r".*epoch-00002\.pt.*\n", capfd.readouterr().err)


def test_too_many_connections_are_closed_until_one_ends(site, monkeypatch):
    """Where MAX_THREADS are at work a further connection ends at once; when one of them ends the next is served."""
    for thread in threading.enumerate():
        if "process_request_thread" in thread.name:  # of a client before, which is gone
            thread.join(PATIENCE)
    with serving(site) as server, connect(server.port) as one, connect(server.port) as other:
        for connection in (one, other):
            connection.sendall(request(server.port, "HEAD"))
            assert connection.recv(1)  # it has its thread
        monkeypatch.setattr(gan, "MAX_THREADS", threading.active_count())
        assert [talk(server.port, request(server.port)) for _ in range(3)] == [b""] * 3
        one.shutdown(socket.SHUT_WR)
        assert any(statuses(talk(server.port, request(server.port))) == [200] for _ in range(1000))


def test_silent_client_is_cut_off(run, monkeypatch):
    """A client that sends nothing for Handler.timeout is cut off, wherever it stopped; others are served meanwhile. An
    answer takes as long as it takes."""
    monkeypatch.setattr(gan.Handler, "timeout", 0.5)
    reached, go_on = threading.Event(), threading.Event()

    def slow_face(self, *_, **fields):
        reached.set()
        assert go_on.wait(PATIENCE)
        return gan.Image.new("RGB", (32, 32))
    monkeypatch.setattr(gan.Site, "face", slow_face)
    with serving(gan.Site(run, None, CPU)) as server, ExitStack() as stack:
        half = request(server.port, "POST", "/", "Content-Length: 9999", body=b"half")
        silent = [stack.enter_context(connect(server.port)) for _ in range(5)]
        for connection, length in zip(silent, (0, 8, 30, len(half) - 4, len(half))):
            connection.sendall(half[:length])
        assert statuses(talk(server.port, request(server.port))) == [200]
        kept = stack.enter_context(connect(server.port))
        kept.sendall(request(server.port, "HEAD") + request(server.port, path=target()))
        assert reached.wait(PATIENCE)
        assert [read_all(connection) for connection in silent] == [b""] * 5
        go_on.set()
        kept.shutdown(socket.SHUT_WR)
        assert statuses(read_all(kept)) == [200, 200]


def test_bad_requests_never_fault_or_hang(server, capfd):
    """4,000 generated bad requests get a 4xx, or what they by luck deserve, and an end."""
    found, hangs = bombard(server.port, 4000)
    assert hangs == 0 and max(found) < 500 and capfd.readouterr().err == ""
    assert {400, 403, 404, 405, 413, 414, 431} <= set(found) and len(found) > 3200


# ---- the command ----

def test_busy_port_is_one_line(server, run, capsys):
    """A port in use ends with exit code 1 and a line that says how to choose another."""
    assert gan.main(["eval", "--run", str(run), "--port", str(server.port)]) == 1
    assert re.fullmatch(rf"gan\.py: .*{server.port}.*--port.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("host, warns", [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_other_host_prints_a_warning(run, monkeypatch, capsys, host, warns):
    """Listening to more than this machine prints who can use the server."""
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(gan.Server, "serve_forever", interrupted)
    assert gan.main(["eval", "--run", str(run), "--host", host, "--port", "0"]) == 130
    assert ("warning: anyone who can reach" in capsys.readouterr().out) == warns


def test_a_touch_right_after_the_start_is_answered(run, monkeypatch):
    """While the server still warms up for it: torch's forward-mode differentiation is not for two threads."""
    answers = []

    def touched(self, *_):
        answers.append(self.site.respond("POST", "/api/regions", json.dumps({"values": BASE}).encode()).status)
        raise KeyboardInterrupt
    monkeypatch.setattr(gan.Server, "serve_forever", touched)
    assert gan.main(["eval", "--run", str(run), "--port", "0"]) == 130 and answers == [200]


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"", lambda data: b"x" + data[1:]])
def test_eval_of_a_damaged_run_is_one_line(copied, capsys, damage):
    """A checkpoint that is not whole ends eval with exit code 1 and a line that names it."""
    (copied / "last.pt").write_bytes(damage((copied / "last.pt").read_bytes()))
    assert gan.main(["eval", "--run", str(copied), "--port", "0"]) == 1
    assert re.fullmatch(r"gan\.py: .*last\.pt.*\n", capsys.readouterr().err)


def test_eval_prints_its_url_and_ends_by_ctrl_c(run, tmp_path):
    """eval --port 0 prints where it listens on one line; Ctrl-C in the midst of generating ends it at once with 130."""
    served, over = threading.Semaphore(0), threading.Event()

    def goes_on(asked: int) -> bool:
        if asked:
            served.release()
        return not over.is_set()
    with Forked("eval", "--run", run, "--port=0", cwd=tmp_path) as process:
        url = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        with urlopen(url[0], timeout=PATIENCE) as answer, connect(int(url[1])), ThreadPoolExecutor(8) as pool:
            assert b"<html" in answer.read()
            for number in range(8):
                pool.submit(faces, int(url[1]), number, goes_on)
            try:
                assert all(served.acquire(timeout=PATIENCE) for _ in range(50))
                process.signal(signal.SIGINT)
                assert process.end() == (130, "", "")
            finally:
                over.set()
