"""The house rules of gan.py that a reader relies on: a true map at its top, arrows upward, small functions."""
import ast
import re

import pytest

import gan

SOURCE = gan.Path(gan.__file__).read_text("utf-8")
RULE = "# " + "=" * 96
BANNER = re.compile(f"^{RULE}\n# (.*)\n{RULE}$", re.MULTILINE)


def rooms_of(source: str) -> list[tuple[int, str]]:
    """(first line, banner) of each room, in order."""
    return [(source[:match.start()].count("\n") + 1, match[1]) for match in BANNER.finditer(source)]


def arrows_downward(source: str) -> set[tuple[str, str]]:
    """(room, name) of each use of a top-level name that a later room defines. Annotations do not count."""
    starts = [line for line, _ in rooms_of(source)]
    banners = ["header"] + [banner.partition(":")[0] for _, banner in rooms_of(source)]

    def room(line: int) -> int:
        return sum(start <= line for start in starts)

    tree, owners = ast.parse(source), {}
    for node in tree.body:
        targets = getattr(node, "targets", [node])
        owners |= {name: room(node.lineno) for target in targets
                   if (name := getattr(target, "name", None) or getattr(target, "id", None))}
    found = set()

    def visit(node: ast.AST, own: frozenset) -> None:
        if isinstance(node, ast.FunctionDef):
            names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
            own |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
            own |= {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        if isinstance(node, ast.Name) and node.id not in own and owners.get(node.id, 0) > room(node.lineno):
            found.add((banners[room(node.lineno)], node.id))
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child, own)

    visit(tree, frozenset())
    return found


def test_the_map_at_the_top_is_the_banners_in_their_order():
    """Word for word."""
    banners = [banner for _, banner in rooms_of(SOURCE)]
    assert len(banners) >= 11
    assert re.findall(r"^ {4}([A-Z][A-Za-z ]+: .*)$", gan.__doc__, re.MULTILINE) == banners


def test_rooms_use_only_what_stands_above_them():
    """And a use of what stands below is seen."""
    assert arrows_downward(SOURCE) == set()
    wrong = (f"{RULE}\n# A: one\n{RULE}\ndef a(x: B) -> B:\n    return B(x)\n"
             f"{RULE}\n# C: two\n{RULE}\nclass B:\n    pass\n")
    assert arrows_downward(wrong) == {("A", "B")}


def functions(source: str) -> dict[str, ast.FunctionDef]:
    """All functions and methods by name; of those with the same name the longest."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return {node.name: node for node in sorted(found, key=lambda node: node.end_lineno - node.lineno)}


def test_functions_are_small():
    """At most 45 lines, but for the cartoon face; what trains a minibatch can be read at one look."""
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions(SOURCE).items()}
    assert {name for name, length in lengths.items() if length > 45} <= {"cartoon_face"}
    assert lengths["train_minibatch"] <= 30


def test_what_makes_a_gan_stands_in_the_first_quarter():
    """Networks, losses, the balance and the loop that trains end before line 900."""
    assert functions(SOURCE)["training_loop"].end_lineno < 900


def hidden_names(source: str) -> set[tuple[str, str]]:
    """(function, name) of each argument, assigned name and loop variable of a function that hides a module, a function
    or a class of the top level."""
    tree, visible = ast.parse(source), set()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            visible |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            visible.add(node.name)
    found = set()
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]:
        local = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                local.add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) and node is not function:
                local.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                local |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        found |= {(getattr(function, "name", "lambda"), name) for name in local & visible}
    return found


def test_a_name_means_one_thing():
    """No local name hides a module, a function or a class; such a one is seen, and the name of a method or an
    attribute hides nothing."""
    assert hidden_names(SOURCE) == set()
    wrong = ("import time, os.path\nfrom a import b as c\ndef judge(time): pass\nclass Run:\n    def judge(self):\n"
             "        self.c = [Run for Run in self.c]\n        def os(x): pass\ndef f(x):\n    for c, y in x:\n"
             "        with x as judge: pass\n    return lambda *time: 0\n")
    assert hidden_names(wrong) == {("judge", "time"), ("judge", "Run"), ("judge", "os"), ("f", "c"), ("f", "judge"),
                                   ("lambda", "time")}


@pytest.mark.parametrize("kind", [ast.FunctionDef, ast.ClassDef])
def test_public_names_say_what_they_are(kind):
    """A docstring each."""
    assert not [node.name for node in ast.parse(SOURCE).body if isinstance(node, kind) and not ast.get_docstring(node)]
