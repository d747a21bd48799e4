"""Count the public parameters whose annotation says nothing: python tests/scripts/anys.py

A parameter says nothing if it has no annotation, or `Any`, `object`, a mapping or sequence of them, or an alias of one.
Public is what has no leading underscore in its module path, class or name, and `__init__`. What an overridden method of
a Trainer or of a callback merely passes on as `*args` or `**kwargs` is not counted.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "hf_guidance"
CONTAINERS = {
    *("dict", "Dict", "Mapping", "MutableMapping", "OrderedDict", "defaultdict", "list", "List", "tuple", "Tuple"),
    *("Sequence", "Iterable", "Iterator", "Collection", "set", "Set", "frozenset", "Optional", "Union", "Annotated"),
    *("Final", "ClassVar", "Required", "NotRequired"),
}
OVERRIDING = ("Trainer", "TrainerCallback", "Mixin", "Behind")  # how the bases end whose methods a class here overrides


@dataclass(frozen=True)
class Parameter:
    place: str
    name: str
    annotation: str
    says_nothing: bool

    @property
    def room(self) -> str:
        return self.place.split(":")[0].split("/")[0].removesuffix(".py")


def parameters(package: Path = PACKAGE) -> list[Parameter]:
    """Collect the parameters of every public function and method of the package."""
    files = [path for path in sorted(package.rglob("*.py")) if _is_public(path.relative_to(package))]
    trees = {path: ast.parse(path.read_text()) for path in files}
    empty = _aliases(list(trees.values()))
    found: list[Parameter] = []
    for path, tree in trees.items():
        for qualified, function, overriding in _functions(tree.body, "", False):
            for name, annotation, passed_on in _named(function):
                if not (passed_on and overriding):
                    place = f"{path.relative_to(package).as_posix()}:{function.lineno} {qualified}"
                    text = "" if annotation is None else ast.unparse(annotation)
                    found.append(Parameter(place, name, text, _says_nothing(annotation, empty)))
    return found


def _is_public(path: Path) -> bool:
    parts = path.with_suffix("").parts
    return all(not part.startswith("_") or part in ("__init__", "__main__") for part in parts)


def _functions(
    body: list[ast.stmt], prefix: str, overriding: bool
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            bases = [ast.unparse(base).split("[")[0] for base in node.bases]
            yield from _functions(node.body, f"{prefix}{node.name}.", any(base.endswith(OVERRIDING) for base in bases))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name == "__init__" or not node.name.startswith("_"):
                yield prefix + node.name, node, overriding
        elif isinstance(node, ast.If | ast.Try):
            yield from _functions(node.body + node.orelse, prefix, overriding)


def _named(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, ast.expr | None, bool]]:
    """Yield name, annotation, and whether it is `*args` or `**kwargs`; `self` and `cls` are left out."""
    places = function.args
    for argument in (*places.posonlyargs, *places.args, *places.kwonlyargs):
        if argument.arg not in ("self", "cls"):
            yield argument.arg, argument.annotation, False
    for star, argument in (("*", places.vararg), ("**", places.kwarg)):
        if argument is not None:
            yield star + argument.arg, argument.annotation, True


def _aliases(trees: list[ast.Module]) -> set[str]:
    """Find names that stand for an annotation that says nothing; an alias of an alias is one too."""
    assigned = [
        (target.id, node.value)
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Name | ast.Subscript | ast.BinOp)
    ]
    found = {"Any", "object"}
    while more := {name for name, value in assigned if _says_nothing(value, found)} - found:
        found |= more
    return found


def _says_nothing(annotation: ast.expr | None, empty: set[str]) -> bool:
    if annotation is None:
        return True
    if isinstance(annotation, ast.Name | ast.Attribute):
        return ast.unparse(annotation).split(".")[-1] in empty
    if isinstance(annotation, ast.BinOp):  # one empty side makes the union empty
        return _says_nothing(annotation.left, empty) or _says_nothing(annotation.right, empty)
    if isinstance(annotation, ast.Subscript):
        if ast.unparse(annotation.value).split(".")[-1] not in CONTAINERS:
            return False
        inner = annotation.slice
        return any(_says_nothing(part, empty) for part in (inner.elts if isinstance(inner, ast.Tuple) else [inner]))
    return False


def main() -> None:
    """Print the count of each room, and the list."""
    found = parameters()
    of_room, empty = Counter(one.room for one in found), Counter(one.room for one in found if one.says_nothing)
    for one in found:
        if one.says_nothing:
            print(f"{one.place}  {one.name}: {one.annotation or '(none)'}")
    for room in sorted(of_room):
        print(f"{room:12} {empty[room]:4} of {of_room[room]:4}")
    print(f"{'all':12} {empty.total():4} of {len(found):4}  {empty.total() / len(found):.1%}")


if __name__ == "__main__":
    main()
