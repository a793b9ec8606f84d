"""The README is true: each of its commands runs, from top to bottom, on small data, and what it names is there."""
import ast
import inspect
import re
import runpy
import shlex
import zipfile
from dataclasses import replace
from pathlib import Path
from threading import Thread
from urllib.request import urlopen

import pytest
from conftest import ROOT, cartoon_face

import gan

README = (ROOT / "README.md").read_text("utf-8")
SMALL = {  # a command of gan.py that begins with this -> what it is given besides, so that it takes a second or less
    "prepare": "--size 32",
    "train": "--width 4 --epochs 2 --save-every 1 --keep-every 2 --device cpu",
    "judge": "--device cpu",
    "generate": "--device cpu",
    "generate --checkpoint": "--device cpu --checkpoint 2",  # of the two epochs that there are
    "eval": "--port 0",
    "demo": "--port 0"}
NOT_RUN = {  # a command that begins with this -> why no test runs it
    "python3 -m venv": "whoever runs the tests has an environment",
    ".venv/bin/pip install": "installs over the network; .ci/run does it",
    ".venv/bin/python -m pytest": "is what is running now; .ci/run takes it from here",
    "python gan.py invert": "wants a photo of someone; test_studio.py makes one up"}


def longest_prefix(table: dict[str, str], command: str) -> str | None:
    """The key of the table with which the command begins, word by word; None where there is none."""
    return max((key for key in table if f"{command} ".startswith(f"{key} ")), key=len, default=None)


def snippets(readme: str) -> list[tuple[str, str]]:
    """("sh", one command) and ("python", one program) in their order; comments and `&&` are taken off."""
    found = []
    for kind, text in re.findall(r"^```(sh|python)\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL):
        if kind == "python":
            found.append((kind, text))
        else:
            lines = [shlex.join(shlex.split(line, comments=True)) for line in text.splitlines()]
            found += [(kind, command) for line in lines for command in line.split(" '&&' ")]
    return found


def run_snippet(kind: str, text: str) -> None:
    """Run one, small, in the current folder. AssertionError, SystemExit or an error of its own where it fails."""
    if kind == "python":
        Path("readme.py").write_text(text, "utf-8")
        runpy.run_path("readme.py")
    elif not longest_prefix(NOT_RUN, text):
        ours = re.fullmatch(r"(?:\.venv/bin/)?python gan\.py (.*)", text)
        assert ours, f"no test runs {text!r}"
        more = SMALL.get(longest_prefix(SMALL, ours[1]), "")
        assert gan.main(shlex.split(f"{ours[1]} {more}")) == 0, text


SERVE = gan.Server.serve_forever


def ask_once(server: gan.Server) -> None:
    """In the place of serve_forever: answer one request for the page and one for what it shows, and stop."""
    thread = Thread(target=SERVE, args=(server,))
    thread.start()
    try:
        for path in ("", "api/model"):
            with urlopen(server.url + path, timeout=60) as answer:
                assert answer.read()
    finally:
        server.shutdown()
        thread.join()


@pytest.fixture
def someones_folder(tmp_path, monkeypatch):
    """A folder with photos.zip, two photos each of 100 people; datasets are small there, and a server is asked once:
    then the demo's training ends, too."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for index in range(200):
            photo = gan.Image.fromarray(cartoon_face(1, index, 40))
            archive.writestr(f"holiday/person-{index // 2}/{index % 2}.png", gan.png_bytes(photo))
    monkeypatch.setattr(gan.Server, "serve_forever", ask_once)
    prepare = gan.prepare  # the demo calls it, and takes no flags
    monkeypatch.setattr(gan, "prepare", lambda settings: prepare(replace(settings, limit=100)))
    return tmp_path


def test_the_readme_from_top_to_bottom(someones_folder):
    """Each command and the program, in the order in which they stand there; then the files that it says there are."""
    for kind, text in snippets(README):
        run_snippet(kind, text)
    assert (someones_folder / "sixteen.png").exists()
    table = README.partition("## What you get")[2].partition("\n## ")[0]
    names = re.findall(r"`([^`]+)`", "".join(re.findall(r"(?m)^\|[^|]*\|", table)))
    missing = {name for name in names if not list(someones_folder.glob(f"runs/wgan-gp/{name.replace('NNNNN', '*')}"))}
    assert len(names) >= 8 and missing == {"collapse-NNNNN.png"}


@pytest.mark.parametrize("wrong", [
    "python gan.py fly", "python gan.py prepare --data-set photos.zip", "python gan.py prepare --dataset my-photos.zip",
    "python gan.py generate --checkpoint newest --run runs/none", "python tests/nothing.py", "gan.py train"])
def test_a_wrong_command_would_be_noticed(tmp_path, monkeypatch, wrong):
    """A misspelt command, flag, file or run, a program that is not ours, a command that cannot be typed like this."""
    monkeypatch.chdir(tmp_path)
    [(kind, text)] = snippets(f"```sh\n{wrong}    # a comment\n```\n")
    with pytest.raises((AssertionError, SystemExit)):
        run_snippet(kind, text)


def test_every_command_is_shown_and_every_exception_used():
    """Each command of gan.py stands in the README, and nothing is excepted or made small that does not."""
    commands = [text for kind, text in snippets(README) if kind == "sh"]
    ours = [command.partition("gan.py ")[2] for command in commands if "gan.py" in command]
    assert {command.split()[0] for command in ours} == set(gan.COMMANDS)
    assert {longest_prefix(NOT_RUN, command) for command in commands} - {None} == set(NOT_RUN)
    assert {longest_prefix(SMALL, command) for command in ours} - {None} == set(SMALL)


def test_flags_in_the_text_are_flags_of_gan_py():
    """Also those outside of the commands: a renamed flag must not live on in a sentence."""
    flags = {f"--{item.name.replace('_', '-')}" for declaration, _, _ in gan.COMMANDS.values()
             for item in gan.fields(declaration)}
    flags |= {"--help", "--nproc_per_node", "--max-restarts", "--no-deps"}  # the last three are torchrun's and pip's
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= flags


def test_what_it_says_when_something_is_wrong_is_what_gan_py_says():
    """The words of each message in the README's table, without what differs from case to case, are in gan.py."""
    tree = ast.parse((ROOT / "gan.py").read_text("utf-8"))
    words = "\n".join(str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant))
    varies = r"\d+|--width|generator|runs/wgan-gp(?:/last.pt)?|127\.0\.0\.1|dataset/\S*"
    messages = re.findall(r"(?m)^\| `([^`]+)` \|", README.partition("## When something is wrong")[2])
    assert len(messages) >= 8
    for message in messages:
        assert all(part.strip(" ()") in words for part in re.split(varies, message)), message


def test_the_files_that_it_links_to_exist():
    """Pictures, licence and results, in the README and in the results."""
    for page in (ROOT / "README.md", ROOT / "tests" / "RESULTS.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), target


def test_the_line_that_it_links_to_trains_a_minibatch():
    """Where reading shall begin: the line of gan.py in which that method is defined."""
    first = str(inspect.getsourcelines(gan.Trainer.train_minibatch)[1])
    assert set(re.findall(r"\(gan\.py#L(\w+)\)", README)) <= {first}
