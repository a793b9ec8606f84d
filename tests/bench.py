"""Measure gan.py against plain implementations:  python tests/bench.py train|prepare|serve|studio|scale [--json]

    train     of each GAN, gan.py's minibatches against tests/reference.py's, the same sequence of updates on both
              sides; then a real training process for its memory and for what sampling, logging and checkpoints cost
    prepare   photos to a dataset against one process that decodes and packs float32 with gzip's level 9
    serve     faces over HTTP against a plain server: one client, then 32 at once; how long a touch and a photo take; in
              Chromium, pictures a second while a slider moves, and what an exported page makes (--run for a real run)
    studio    on a real run (--run, --data): do a region's sliders leave the rest alone, do photos find their likeness
    scale     what ranks send one another in an update, measured; and by arithmetic what that means for many GPUs

Both sides take turns, A B A B, so that a noisy machine is noisy for both; medians and spreads (least to most) are
printed. Slow evidence, not collected by pytest: let nothing else run beside it."""
import argparse
import gzip
import http.client
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import reference
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gan  # noqa: E402

TURNS = ["discriminator"] + 5 * ["generator", "discriminator"]  # 55 % discriminator updates, as real runs of critics


def alternate(sides: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's function in each round, after one round that does not count."""
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, function in sides.items():
            started = time.perf_counter()
            function()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: dict[str, list[float]], items: int, unit: str) -> dict:
    """Rates of both sides and their ratio, from the seconds that `items` took in each round."""
    rates = {name: sorted(items / value for value in values) for name, values in seconds.items()}
    found = {name: {f"{unit} a second": round(statistics.median(values), 1),
                    "spread": [round(values[0], 1), round(values[-1], 1)]} for name, values in rates.items()}
    ratios = sorted(plain / ours for plain, ours in zip(*seconds.values(), strict=True))
    return found | {"ratio": round(statistics.median(ratios), 2),
                    "ratio's spread": [round(ratios[0], 2), round(ratios[-1], 2)]}


# ---- train ----

class Scripted:
    """A balance that measures like any other but takes the turns of TURNS."""
    taken = 0

    @property
    def decided(self) -> bool:
        return self.taken % len(TURNS) in range(2, len(TURNS), 2)

    def choose(self, accuracy, _) -> str:
        if not self.decided:
            float(accuracy)  # waits for a GPU as others do
        self.taken += 1
        return TURNS[(self.taken - 1) % len(TURNS)]


class ScriptedReference(reference.Reference):
    """The plain loop on any device, with the accuracies of all pairs at once and the turns of TURNS."""

    def __init__(self, model: str, size: int, device: torch.device):
        super().__init__(model, size)
        self.g.to(device)
        self.d.to(device)
        self.balance = Scripted()

    def accuracies(self, real, fake):
        accuracies = (real[:, None] > fake).float().mean().item(), (fake >= real.mean()).float().mean().item()
        self.discriminator_left = 0
        return (0, 1) if self.balance.choose(*accuracies) == "discriminator" else (1, 0)


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of forty products of 2048×2048 matrices; half of them written as convolutions, which on
    some processors another library multiplies, and faster."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    image = a.view(1, 32, 64, 2048).permute(0, 3, 1, 2)  # channels last: the same memory
    best = 0.0
    for product in 20 * [lambda: a @ b, lambda: torch.nn.functional.conv2d(image, b[:, :, None, None])]:
        started = time.perf_counter()
        product()
        wait(device)
        best = max(best, 2 * 2048 ** 3 / (time.perf_counter() - started))
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bench_train(options) -> dict:
    models = [options.model] if options.model else list(gan.OBJECTIVES)
    return {model: images_a_second(model, options) for model in models} | whole_training(options)


def images_a_second(model: str, options) -> dict:
    """Of gan.py and of the plain loop, and what share of the processor's arithmetic the first uses."""
    device, size = gan.pick_device(options.device), 80
    settings = gan.TrainSettings(model=model, precision=options.precision)
    trainer, plain = gan.Trainer(settings, size, device), ScriptedReference(model, size, device)
    real = torch.rand(20, 3, size, size, device=device) * 2 - 1
    trainer.balance, ours = Scripted(), real.contiguous(memory_format=torch.channels_last)

    def fast_cycle() -> None:
        for _ in TURNS:
            trainer.train_minibatch(ours)
        wait(device)

    def plain_cycle() -> None:
        for _ in TURNS:
            plain.train_minibatch(real, torch.randn(20, 128, device=device), lambda: torch.rand(20, device=device))
        wait(device)

    dtype = torch.bfloat16 if trainer.precision == "bf16" else torch.float32
    found = {"precision": trainer.precision, "threads": torch.get_num_threads(), "torch": torch.__version__,
             "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    seconds = alternate({"plain": plain_cycle, "gan.py": fast_cycle}, options.rounds)
    found |= summary(seconds, 20 * len(TURNS), "images")
    flops = len(TURNS) * flops_of_a_minibatch(settings)
    speed, peak = flops / statistics.median(seconds["gan.py"]), matrix_peak(dtype, device)
    found |= {"GFLOP/s": round(speed / 1e9), "matrix peak GFLOP/s": round(peak / 1e9),
              "share of peak": round(speed / peak, 2)}
    if device.type == "cuda":
        found["peak device MiB of both"] = torch.cuda.max_memory_allocated() >> 20
    return found


def flops_of_a_minibatch(settings: gan.TrainSettings) -> float:
    """FLOPs of 20 faces of 80×80 pixels, the mean over TURNS, counted on the CPU."""
    trainer = gan.Trainer(settings, 80, torch.device("cpu"))
    trainer.balance, real = Scripted(), torch.rand(20, 3, 80, 80).contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        for _ in TURNS:
            trainer.train_minibatch(real)
    return counter.get_total_flops() / len(TURNS)


# A training process that tells when its first minibatch began and its last file was written.
TIMED = """
import sys, time
import gan
real, began = gan.Trainer.train_minibatch, []
def first(trainer, faces):
    began or began.append(time.monotonic())
    real(trainer, faces)
gan.Trainer.train_minibatch = first
code = gan.main(sys.argv[1:])
print(time.monotonic() - began[0])
"""
PEAK = """
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def whole_training(options) -> dict:
    """Memory of a training process beyond torch's own, and the share of its time that is not training."""
    if not options.epochs:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder) / "data"
        if not options.data:
            gan.prepare(gan.PrepareSettings(demo=True, data=str(data)))
        run = Path(folder) / "run"
        arguments = ["train", "--data", data, "--run", run, "--model", options.model or "WGAN-GP", "--epochs", options.epochs,
                     "--precision", options.precision, "--device", options.device]
        bare, = numbers_printed("import torch" + PEAK)
        whole, peak = numbers_printed(TIMED + PEAK, *arguments)
        log = gan.read_log(run)
    training = sum(line["seconds"] for line in log)
    return {"whole training of": options.model or "WGAN-GP", "faces": log[0]["images_seen"],
            "seconds an epoch": [line["seconds"] for line in log],
            "share of time beside training": round(1 - training / whole, 4),
            "peak resident MiB": round(peak / 1024), "of which importing torch": round(bare / 1024)}


def numbers_printed(code: str, *arguments) -> list[float]:
    """The numbers that a Python process prints at its end, each in a line of its own (PEAK: KiB, on Linux)."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
                          check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return [float(line) for line in done.stdout.splitlines() if line.replace(".", "", 1).isdigit()]


# ---- prepare ----

def bench_prepare(options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        photos = options.data
        if not photos:
            photos = Path(folder) / "photos"
            photos.mkdir()
            for number in range(options.photos):
                picture = gan.cartoon_face(gan.np.random.default_rng(number), 250)
                picture.save(photos / f"{number}.jpg", quality=90)
        settings = gan.PrepareSettings(dataset=str(photos), data=f"{folder}/ours", limit=options.photos, per_person=0)
        manifest = gan.prepare(settings)
        count = manifest["count"] + sum(batch["count"] for batch in manifest["held_out"])
        paths = (path for path in sorted(Path(photos).rglob("*")) if gan.kind_of(path.name, b"") == "photo")
        contents = [path.read_bytes() for path in islice(paths, count)]

        def plain() -> None:
            faces = []
            for content in contents:
                image = Image.open(io.BytesIO(content)).convert("RGB")
                width, height = image.size
                image = image.crop((width // 4, height // 4, width * 3 // 4, height * 3 // 4)).resize((80, 80))
                pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
                faces.append(pixels.view(80, 80, 3).permute(2, 0, 1).float() / 127.5 - 1)
            for number, start in enumerate(range(0, len(faces), 200)):
                buffer = io.BytesIO()
                torch.save(torch.stack(faces[start:start + 200]), buffer)
                Path(folder, f"{number}.gz").write_bytes(gzip.compress(buffer.getvalue(), 9))

        seconds = alternate({"plain": plain, "gan.py": lambda: gan.prepare(settings)}, options.rounds)
    return {"photos": count} | summary(seconds, count, "images")


# ---- serve ----

def plain_server(port: int) -> None:
    """The server as one would write it: a thread a connection, a forward pass a request."""
    network = reference.generator().eval()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            values = parse_qs(urlsplit(self.path).query)["values"][0].split(",")
            with torch.no_grad():
                face = network(torch.tensor([[float(value) for value in values]]))[0]
            picture = Image.fromarray(((face + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            self.send_response(200)
            self.send_header("Content-Length", str(buffer.tell()))
            self.end_headers()
            self.wfile.write(buffer.getvalue())

        def log_message(self, *_) -> None:
            pass
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def ask(port: int, z: torch.Tensor) -> float:
    """Seconds that one face takes, with a connection of its own; an error where it is refused."""
    path = "/generate?values=" + ",".join(f"{value:.4f}" for value in z.tolist())
    started = time.perf_counter()
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    client.request("GET", path)
    answer = client.getresponse()
    body = answer.read()
    client.close()
    assert answer.status == 200 and body.startswith(b"\x89PNG"), answer.status
    return time.perf_counter() - started


def bench_serve(options) -> dict:
    """Each server is a process of its own; the clients are threads of this one."""
    vectors, ports = torch.randn(400, 128), {"plain": 18666, "gan.py": 18667}
    with tempfile.TemporaryDirectory() as folder:
        data, run = f"{folder}/data", options.run or f"{folder}/run"
        if not options.run:
            gan.prepare(gan.PrepareSettings(demo=True, data=data, limit=20))
            gan.train(gan.TrainSettings(data=data, run=run, epochs=1, device="cpu"))
        commands = {"plain": [sys.executable, __file__, "plain-server", str(ports["plain"])],
                    "gan.py": [sys.executable, ROOT / "gan.py", "eval", "--run", run, "--port", str(ports["gan.py"])]}
        servers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands.values()]
        try:
            for port in ports.values():
                patience = threading.Event()
                while True:
                    try:
                        ask(port, vectors[0])
                        break
                    except OSError:
                        patience.wait(0.1)
            latencies = {name: [] for name in ports}

            def one_client(name: str) -> None:
                latencies[name] += [ask(ports[name], z) for z in vectors[:100]]

            def many_clients(name: str) -> None:
                with ThreadPoolExecutor(32) as clients:
                    list(clients.map(lambda z: ask(ports[name], z), vectors))

            alternate({name: lambda name=name: one_client(name) for name in ports}, options.rounds)
            one = {name: {"ms a face, one client": round(1e3 * statistics.median(values), 2),
                          "95 % under": round(1e3 * sorted(values)[int(0.95 * len(values))], 2)}
                   for name, values in latencies.items()}
            seconds = alternate({name: lambda name=name: many_clients(name) for name in ports}, options.rounds)
            studio = studio_seconds(ports["gan.py"], options.rounds)
            studio |= page_figures(ports["gan.py"], run, Path(folder) / "faces.html", options.rounds)
        finally:
            for server in servers:
                server.terminate()
                server.wait()
    return {"one client": one, "32 clients": summary(seconds, len(vectors), "faces")} | studio


def studio_seconds(port: int, rounds: int) -> dict:
    """Seconds that a touch and a photo take over HTTP, each of another face, and what a slider's pictures take meanwhile."""
    def post(path: str, **body) -> dict:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        client.request("POST", path, json.dumps(body))
        answer = client.getresponse()
        found = json.loads(answer.read())
        client.close()
        assert answer.status == 200, found
        return found

    def touch() -> float:
        started = time.perf_counter()
        post("/api/regions", values=torch.randn(128).tolist())
        return time.perf_counter() - started

    def photo() -> float:
        target = gan.data_url(gan.cartoon_face(gan.np.random.default_rng(), 80))
        started, found = time.perf_counter(), {"values": None, "done": False}
        for _ in range(12):
            found = post("/api/invert", target=target, values=found["values"])
            if found["done"]:
                break
        return time.perf_counter() - started

    touch()  # the first one loads what torch needs for it
    touches, photos = [touch() for _ in range(2 * rounds)], [photo() for _ in range(rounds)]
    with ThreadPoolExecutor(1) as other:
        waiting, beside = other.submit(photo), []
        while not waiting.done():
            beside.append(ask(port, torch.randn(128)))
    return {"touch, s": spread(touches), "photo, s": spread(photos),
            "ms a face beside a photo": round(1e3 * statistics.median(beside), 1)}


SLIDING = """async milliseconds => {
    const began = performance.now();
    let count = 0, last = shown;
    while (performance.now() - began < milliseconds) {
        place(doc.z.with(3, Math.sin(performance.now() / 500)), {}, true);
        await new Promise(requestAnimationFrame);
        if (shown !== last) count++;
        last = shown;
    }
    endDrag();
    return 1000 * count / milliseconds; }"""
MAKING = """async vectors => {
    const began = performance.now(), faces = [];
    for (const z of vectors) faces.push(paintFace(node('canvas'), await source.face(z, doc.checkpoint), 0, model.image_size));
    const seconds = (performance.now() - began) / 1000, size = model.image_size;
    return { rate: vectors.length / seconds,
             pixels: faces.map(face => [...face.getContext('2d').getImageData(0, 0, size, size).data]) }; }"""


def page_figures(port: int, run: Path | str, exported: Path, rounds: int) -> dict:
    """In Chromium: pictures a second while a slider moves; faces a second of an exported page, one after another, and by
    how many of 255 steps they differ from the server's."""
    from playwright.sync_api import sync_playwright
    gan.command_export(gan.ExportSettings(file=str(exported), run=str(run)))
    vectors = [[round(value, 2) for value in z.clamp(-3, 3).tolist()] for z in gan.sample_latents(20, seed=3)]
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright, playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]) as browser:
        made, slid = [], []
        for address in (f"http://127.0.0.1:{port}/", exported.as_uri()):
            page = browser.new_context(bypass_csp=True).new_page()
            page.goto(address)
            page.locator("#save:enabled").wait_for()
            page.locator(".strip").nth(2).wait_for()
            page.evaluate("() => Promise.all(Object.values(lanes).map(lane => lane.last))")  # strips are shown
            if not made:
                slid = [page.evaluate(SLIDING, 4000) for _ in range(rounds)]
            made.append([page.evaluate(MAKING, vectors) for _ in range(rounds)])
            page.close()
    (ours, *_), theirs = made
    difference = (torch.tensor(ours["pixels"]) - torch.tensor(theirs[0]["pixels"])).abs()
    return {"pictures a second while a slider moves": spread(slid),
            "faces a second of an exported page": spread([one["rate"] for one in theirs]),
            "its difference from the server's, of 255": f"at most {difference.max()}, mean {difference.float().mean():.3f}"}


def spread(values: list[float]) -> str:
    """Median and, in brackets, least and most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# ---- studio ----

BOXES = {"mouth": (52, 70, 22, 58), "eyes": (26, 40, 14, 66), "hair": (0, 18, 8, 72)}  # of LFW's 80 pixels: rows, columns


def bench_studio(options) -> dict:
    """Of 20 random faces, how much more a step of a grey level or two of each slider changes inside than outside, in the pictures
    (mean square); of held-out photos, to how many of 100 others the face found for it is nearer than to itself."""
    torch.manual_seed(0)
    generator, facts = gan.load_generator(gan.find_checkpoint(options.run, None), torch.device("cpu"))
    size, ratios = facts["image_size"], {name: [] for name in BOXES}
    for z in gan.sample_latents(20, seed=2):
        slopes, face = gan.jacobian(generator, z), generator(z[None])[0]
        for name, edges in BOXES.items():
            top, bottom, left, right = (edge * size // 80 for edge in edges)
            mask = torch.zeros(size, size)
            mask[top:bottom, left:right] = 1
            for slider in gan.describe_sliders(slopes, face, mask)[:3]:
                moved = z + 0.5 * slider["reach"] * torch.tensor(slider["vector"])
                change = (generator(moved[None]) - generator(z[None])).square().mean((0, 1))
                ratios[name].append((change[mask == 1].mean() / change[mask == 0].mean()).item())
    found = {f"{name}, inside over outside": spread(values) for name, values in ratios.items()}
    images = gan.load_faces(options.data, "held_out")[0]
    photos, weights = images[torch.randperm(len(images))[:150]], gan.face_weights(size)
    space, ranks = gan.FeatureSpace(), {"pixels": [], "features": []}
    others = space(photos)
    for number in range(50):
        target = gan.to_face(photos[number])
        *_, (z, _) = gan.fit_photo(generator, target, weights)
        face = gan.sample_images(generator, z[None])
        for name, distances in (("pixels", gan.distances_to(gan.to_face(face[0]), gan.to_face(photos), weights)),
                                ("features", torch.cdist(space(face), others)[0])):
            ranks[name].append((distances[50:] < distances[number]).sum().item())
    return found | {f"of 50 photos, nearer to their own face than 95 of 100 others, by {name}": sum(rank <= 5 for rank in values)
                    for name, values in ranks.items()}


# ---- scale ----

LINKS = {"NVLink": (450e9, 10e-6), "100 Gbit/s": (12.5e9, 30e-6), "25 Gbit/s": (3.125e9, 30e-6)}  # bytes/s, s a hop: assumed
GPU_SPEED = 100e12  # FLOP/s of a GPU in these networks: a tenth of an H100's peak in bf16. Assumed, not measured
LEAST_UPDATE = 4e-3  # s that launching an update's kernels one by one takes: 800 of 5 µs. Assumed, not measured
MACHINE = 8  # GPUs joined by NVLink; one link leads out of a machine


class CountingRanks(gan.Ranks):
    """Two ranks, of which the other one is not there: it counts what they would send."""

    def __init__(self):
        super().__init__(0, 2)
        self.sent: list[int] = []

    def average(self, *tensors) -> None:
        self.sent.append(4 + sum(tensor.numel() * tensor.element_size() for tensor in tensors))  # one number tells of stops


def sent_by(model: str, turn: str) -> list[int]:
    """Bytes of each sum over ranks in one minibatch."""
    trainer = gan.Trainer(gan.TrainSettings(model=model, balance=1), 80, torch.device("cpu"), CountingRanks())
    trainer.balance.discriminator_left = int(turn == "discriminator")
    trainer.train_minibatch(torch.rand(20, 3, 80, 80))
    return trainer.ranks.sent


def seconds_of_sums(sent: list[int], gpus: int, link: str) -> float:
    """Of ring sums among the GPUs of a machine, then among machines over the link; a sum of few bytes takes its hops."""
    machines, total = math.ceil(gpus / MACHINE), 0.0
    for size in sent:
        for members, name in ((min(gpus, MACHINE), "NVLink"), (machines, link)):
            speed, hop = LINKS[name]
            total += 2 * (members - 1) / members * size / speed + 2 * math.log2(members) * hop
    return total


def bench_scale(options) -> dict:
    """Measured: bytes, sums, FLOPs and an update's time here. By arithmetic: the rest, for 20 faces a GPU and for as
    many as keep 80 % of the GPUs' speed; nothing is taken to hide behind the backward pass."""
    model = options.model or "WGAN-GP"
    found, sent = {"model": model}, {turn: sent_by(model, turn) for turn in ("discriminator", "generator")}
    for turn, sums in sent.items():
        found[f"{turn} update"] = {"sums": len(sums), "MB": round(sum(sums) / 1e6, 2)}
    trainer = gan.Trainer(gan.TrainSettings(model=model), 80, torch.device("cpu"))
    real, trainer.balance = torch.rand(20, 3, 80, 80).contiguous(memory_format=torch.channels_last), Scripted()
    seconds = alternate({"": lambda: [trainer.train_minibatch(real) for _ in TURNS]}, options.rounds)[""]
    flops, here = flops_of_a_minibatch(gan.TrainSettings(model=model)) / 20, statistics.median(seconds) / len(TURNS)
    found |= {"GFLOP a face and update": round(flops / 1e9, 2), "ms an update of 20 faces here": round(1e3 * here, 1)}
    share = TURNS.count("discriminator") / len(TURNS)
    for link in ("100 Gbit/s", "25 Gbit/s"):
        for gpus in (8, 64, 256):
            sums = sum(part * seconds_of_sums(sent[turn], gpus, link)
                       for turn, part in (("discriminator", share), ("generator", 1 - share)))
            computing = max(LEAST_UPDATE, 20 * flops / GPU_SPEED)
            enough = max(1, math.ceil(4 * sums * GPU_SPEED / flops)) if 4 * sums > LEAST_UPDATE else 1
            found[f"{gpus} GPUs, {link} between machines of {MACHINE}"] = {
                "ms of sums": round(1e3 * sums, 2), "ms of computing 20 faces each": round(1e3 * computing, 2),
                "efficiency": round(computing / (computing + sums), 2), "80 % from a minibatch of": gpus * enough}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "prepare", "serve", "studio", "scale"):
        command = commands.add_parser(name)
        command.add_argument("--rounds", type=int, default=5)
        command.add_argument("--json", action="store_true", help="one JSON object on standard output")
        source = {"train": "a dataset written by prepare (default: cartoon faces)",
                  "prepare": "photos (default: cartoon faces)", "studio": "the run's dataset"}.get(name, "not used")
        command.add_argument("--data", type=Path, help=source)
        if name in ("train", "scale"):
            command.add_argument("--model", choices=list(gan.OBJECTIVES), help="this one alone")
        if name == "train":
            command.add_argument("--precision", default="auto")
            command.add_argument("--device", default="auto")
            command.add_argument("--epochs", type=int, default=10, help="of the whole training, 0 for none")
        if name in ("serve", "studio"):
            command.add_argument("--run", type=Path, required=name == "studio", help="a trained run")
        if name == "prepare":
            command.add_argument("--photos", type=int, default=400)
    commands.add_parser("plain-server").add_argument("port", type=int)
    options = parser.parse_args()
    if options.command == "plain-server":
        return plain_server(options.port)
    stdout, sys.stdout = sys.stdout, sys.stderr if options.json else sys.stdout
    found = {"train": bench_train, "prepare": bench_prepare, "serve": bench_serve, "studio": bench_studio,
             "scale": bench_scale}[options.command](options)
    if options.json:
        print(json.dumps(found, indent=1), file=stdout)
    else:
        for name, value in found.items():
            print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
