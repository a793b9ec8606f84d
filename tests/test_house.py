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


def test_functions_are_small():
    """At most 45 lines, but for the drawn face."""
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    large = {node.name for node in functions if node.end_lineno - node.lineno >= 45}
    assert large <= {"draw_face"}


@pytest.mark.parametrize("kind", [ast.FunctionDef, ast.ClassDef])
def test_public_names_say_what_they_are(kind):
    """A docstring each."""
    assert not [node.name for node in ast.parse(SOURCE).body if isinstance(node, kind) and not ast.get_docstring(node)]
