"""The server under siege: `python tests/soak.py [--seconds 60]`; slow evidence, not collected by pytest.

It makes a small run, starts `gan.py eval` on it as a process of its own and measures from outside. test_server.py uses
the clients and the generated bad requests of this file."""
import argparse
import http.client
import random
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

PATIENCE = 60  # seconds until a wait counts as a hang
GAN = Path(__file__).resolve().parent.parent / "gan.py"


# ---- clients ----

def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server ends the connection; TimeoutError where it never does."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass  # it ended the connection with some of our bytes unread
    return b"".join(parts)


def talk(port: int, data: bytes) -> bytes:
    """Send bytes, say that there are no more, and read to the end."""
    with connect(port) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except TimeoutError:
            raise
        except OSError:
            pass  # refused before all was sent
        return read_all(connection)


def statuses(answer: bytes) -> list[int]:
    """The status of each HTTP/1.1 answer among these bytes."""
    return [int(code) for code in re.findall(rb"(?:^|(?<=\n))HTTP/1\.1 (\d{3}) ", answer)]


def request(port: int, method="GET", path="/", *headers: str, version="HTTP/1.1", host=None, body=b"") -> bytes:
    """The bytes of one request to this server."""
    lines = [f"{method} {path} {version}", f"Host: {host or f'127.0.0.1:{port}'}", *headers]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n" + body


# ---- bad requests ----

WORDS = ["samples", "0", "log", "..", "%2e%2e", "etc", "gan.py", "last.pt", "%00", "api", "model", "generate", "", "C:", "~", "[::1"]
NUMBERS = ["0", "1.5", "nan", "-inf", "1e999", "1_0", "", "0x1", "%FF", "%00", "9" * 400, "1e-9999"]
SCALES = ["0", "9", "-1", "1.5", "", "%D9%A3", "1e1", "0001" + "0" * 5000]
WHICH = ["../x", "/etc/passwd", "epoch-00002.pt", "-1", "2e0", "9" * 30, "", "%00"]
METHODS = ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", "G@T", "GET\0"]
VERSIONS = ["HTTP/0.9", "HTTP/2.0", "HTTP/1.1.1", "HTTP/", "http/1.1", "HTTP/1.x", "HTTP/-1.1", "HTTP/1.1 y", ""]
LENGTHS = ["-1", "1_0", "9" * 50, "99999", "1e3", " ", "0x10", "\xb2", "5, 5"]
HEADERS = ["Transfer-Encoding: chunked", "Host: 127.0.0.1", "no colon", ": x", "A" * 70_000 + ": b",
           "Expect: 100-continue", " folded", "\0: \0", "Connection: \x7f"]
HEADERS += [f"Content-Length: {length}" for length in LENGTHS]


STUDIO = ["faces", "regions", "region", "paint", "photo", "invert", "neighbours", "film"]
JSONS = ["null", "true", "[]", "{}", "-1", "1e999", "NaN", '"x"', '"data:image/png;base64,AAAA"', "9" * 5000, "[" * 3000,
         str([0] * 127), str([0] * 127 + [101]), str([[0] * 128] * 70)]


def bad_json(rng: random.Random) -> bytes:
    """The body of a POST, one that none of the STUDIO answers with a face."""
    fields = [f'"{name}": {rng.choice(JSONS)}' for name in ("vectors", "values", "mask", "target", "scale")]
    body = "{" + ", ".join(rng.sample(fields, rng.randrange(len(fields)))) + "}"
    return rng.choice([body, body[:-1], rng.choice(JSONS)]).encode() + rng.choice([b"", b"\xff"])


def bad_request(rng: random.Random, port: int) -> bytes:
    """One generated request that something is wrong with."""
    def junk(most: int) -> bytes:
        return rng.randbytes(rng.randrange(1, most))

    def one(words: list[str]) -> str:
        return rng.choice([*words, quote(junk(12), safe="/:@?&=+,%[]")])

    kind = rng.randrange(9)
    path = "/" + "/".join(one(WORDS) for _ in range(rng.randrange(1, 6)))
    if kind == 0:
        return request(port, path=path)
    if kind == 1:
        values = ["0"] * rng.choice([1, 127, 128, 128, 128, 129])
        for _ in range(rng.randrange(3)):
            values[rng.randrange(len(values))] = one(NUMBERS)
        more = ["", f"&scale={one(SCALES)}", f"&checkpoint={one(WHICH)}", "&values=1", f"&{one(WORDS)}"]
        return request(port, path=f"/generate?values={','.join(values)}{rng.choice(more)}")
    if kind == 2:
        return request(port, one(METHODS), one(["/", "/generate", path]), body=junk(30))
    if kind == 3:
        hosts = ["evil.example", "127.0.0.1", f"127.0.0.1:{port ^ 1}", ":", "[", f"a@127.0.0.1:{port}"]
        return request(port, host=one(hosts))
    if kind == 4:
        lines = rng.choices(HEADERS, k=3) + ["a: b"] * rng.choice([0, 0, 200])
        return request(port, rng.choice(["GET", "POST"]), "/", *lines, body=junk(30))
    if kind == 5:
        return request(port, path=one(["/", path, "/" + "x" * 70_000]), version=one(VERSIONS))
    if kind == 6:
        return junk(200) + rng.choice([b"", b"\r\n\r\n"])
    if kind == 7:
        body, path = bad_json(rng), f"/api/{rng.choice(STUDIO)}{rng.choice(['', '?box=1,2', '?checkpoint=x', '?box=0,0,1e9,1e9'])}"
        origin = rng.choice(["null", "http://evil.example", f"http://127.0.0.1:{port}", "x" * 99])
        return request(port, "POST", path, f"Content-Length: {len(body)}", f"Origin: {origin}", body=body)
    good = bytearray(request(port, path="/generate?values=" + ",".join("0" * 128)))
    for _ in range(rng.randrange(4)):
        good[rng.randrange(len(good))] = rng.randrange(256)
    return bytes(good[:rng.randrange(1, len(good))])


def bombard(port: int, count: int) -> tuple[list[int], int]:
    """Send `count` bad requests, a connection each, from 4 threads: all statuses answered, and how many hung."""
    def part(worker: int) -> tuple[list[int], int]:
        rng, found, hangs = random.Random(worker), [], 0
        for _ in range(count // 4):
            try:
                found += statuses(talk(port, bad_request(rng, port)))
            except TimeoutError:
                hangs += 1
        return found, hangs
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(part, range(4)))
    return [status for found, _ in parts for status in found], sum(hangs for _, hangs in parts)


# ---- the siege ----

def make_run(folder: Path) -> Path:
    """A run at the full size of a face: one epoch on a few cartoon faces."""
    for line in ("prepare --demo --data data --size 80 --limit 20",
                 "train --data data --run run --epochs 1 --width 64 --device cpu"):
        subprocess.run([sys.executable, GAN, *line.split()], cwd=folder, check=True, capture_output=True)
    return folder / "run"


def memory_mib(process: subprocess.Popen) -> float | None:
    """Resident memory of a process; None where the system does not tell."""
    try:
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024
    except OSError:
        return None


def faces(port: int, number: int, goes_on) -> tuple[list[float], int]:
    """One client that keeps its connection and asks for face after face: seconds of each, and how many were lost."""
    rng, latencies, lost = random.Random(number), [], 0
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    while goes_on(len(latencies) + lost):
        start = time.monotonic()
        try:
            client.request("GET", "/generate?values=" + ",".join(f"{rng.gauss(0, 1):.2f}" for _ in range(128)))
            answer = client.getresponse()
            good = answer.read().startswith(b"\x89PNG") and answer.status == 200
        except (OSError, http.client.HTTPException):
            good = False
            client.close()
        if good:
            latencies.append(time.monotonic() - start)
        else:
            lost += 1
    client.close()
    return latencies, lost


def crowd(port: int, clients: int, seconds: float) -> tuple[list[float], int]:
    """Many such clients at once for some seconds."""
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(clients) as pool:
        parts = list(pool.map(lambda number: faces(port, number, lambda _: time.monotonic() < end), range(clients)))
    return [seconds for latencies, _ in parts for seconds in latencies], sum(lost for _, lost in parts)


class SlowClients:
    """Clients that send half a request; after it every other one ten more bytes a second, the rest nothing: those are
    cut off and come again."""

    def __init__(self, port: int, count: int):
        self.port, self.over, self.cut_off, self.selector = port, threading.Event(), 0, selectors.DefaultSelector()
        for number in range(count):
            self.come(number % 2 == 0)
        self.thread = threading.Thread(target=self.go_on)

    def come(self, drips: bool) -> None:
        connection = connect(self.port)
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        self.selector.register(connection, selectors.EVENT_READ, drips)

    def go_on(self) -> None:
        while not self.over.wait(0.1):
            gone = {key for key, _ in self.selector.select(0)}
            for key in self.selector.get_map().values():
                try:
                    if key.data:
                        key.fileobj.send(b"x")
                except OSError:
                    gone.add(key)
            for key in gone:
                self.cut_off += 1
                self.selector.unregister(key.fileobj)
                key.fileobj.close()
                self.come(key.data)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()


def ms(latencies: list[float]) -> str:
    return f"median {statistics.median(latencies) * 1000:.1f} ms, worst {max(latencies) * 1000:.1f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    seconds = parser.parse_args().seconds
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & would hand on that it is ignored
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "stderr", "w+") as errors:
        server = subprocess.Popen([sys.executable, GAN, "eval", "--run", make_run(Path(folder)), "--port", "0"],
                                  text=True, stdout=subprocess.PIPE, stderr=errors)
        try:
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", server.stdout.readline())[1])
            start = time.monotonic()
            found, hangs = bombard(port, 10_000)
            faults = sum(status >= 500 for status in found)
            print(f"10,000 bad requests   {faults} answered 5xx, {hangs} hung, {time.monotonic() - start:.0f} s",
                  flush=True)

            crowd(port, 64, min(10, seconds))  # threads and buffers that stay are no growth
            memory, latencies, lost = [memory_mib(server)], [], 0
            for _ in range(2):
                times, failed = crowd(port, 64, seconds / 2)
                latencies, lost, memory = latencies + times, lost + failed, [*memory, memory_mib(server)]
            print(f"64 clients, {seconds:g} s      {len(latencies)} served, {lost} lost, "
                  f"{len(latencies) / seconds:.0f} faces/s, {ms(latencies)}")
            print("  its resident memory ", " -> ".join(f"{one:.0f}" for one in memory)
                  + " MiB (before, at half time, after)" if all(memory) else "n/a", flush=True)

            alone, lost_alone = faces(port, 0, lambda asked: asked < 300)
            with SlowClients(port, 200) as slow:
                end = time.monotonic() + max(seconds / 3, 12)  # so long that silent ones are cut off and come again
                beside, lost_beside = faces(port, 0, lambda _: time.monotonic() < end)
            print(f"one fast client       {len(alone)} served, {lost_alone} lost, {ms(alone)}")
            print(f"  and 200 slow ones   {len(beside)} served, {lost_beside} lost, {ms(beside)}; "
                  f"{slow.cut_off} silent ones cut off")
            server.send_signal(signal.SIGINT)
            code = server.wait(PATIENCE)
        finally:
            server.kill()
        errors.seek(0)
        lines = errors.read().splitlines()
    print(f"the server            printed {len(lines)} error lines, ended with exit code {code}", *lines[:5],
          sep="\n  ")
    return int(bool(faults or hangs or lost or lost_alone or lost_beside or lines or code != 130))


if __name__ == "__main__":
    sys.exit(main())
