"""The rules of the house: who imports whom, what is never called, and that public things are documented."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "clinical_nlp"
SHELVES = ("recipes", "corpora", "eval")

ROOMS = (
    "errors",
    "progress",
    "config",
    "runs",
    "notes",
    "language",
    "models",
    "metrics",
    "tasks",
    "adaptation",
    "invariance",
    "training",
    "statistics",
    "extraction",
    "reporting",
    "recipe",
    "demo",
    "doctor",
    "cli",
)
"""From the ground up; a room imports only itself and what stands before it."""

AGREED = {
    ("tasks", "clinical_nlp.statistics.intervals"),
    ("tasks", "clinical_nlp.statistics.calibration"),
    ("metrics", "clinical_nlp.tasks.faithfulness"),
}
"""What a room may import from a later one: scores carry intervals, codes calibrated probabilities, and one metric is
what a task measures."""

HEAVY_AT_THE_TOP = {
    "clinical_nlp/language/components.py",
    *(f"clinical_nlp/metrics/{name}.py" for name in ("rouge", "bertscore", "note_sections", "clinical_facts")),
}
"""spaCy registers a component by a decorator, and a metric is a class of `evaluate`; only who wants one imports it."""


def modules() -> list[Path]:
    """Every module of the package, the shelves at their own place."""
    own = [path for path in PACKAGE.rglob("*.py") if not set(path.relative_to(PACKAGE).parts) & set(SHELVES)]
    return sorted(own + [path for shelf in SHELVES for path in (ROOT / shelf).rglob("*.py")])


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, also inside functions and for type checking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            if node.module == "clinical_nlp":
                yield from ((node.lineno, f"clinical_nlp.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


MODULES = modules()


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_a_room_imports_only_rooms_above(path: Path) -> None:
    tree = ast.parse(path.read_bytes())
    is_shelf = path.relative_to(ROOT).parts[0] in SHELVES
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py") if not is_shelf else ""
    for line, module in imports(tree):
        first, _, rest = module.partition(".")
        assert first not in SHELVES, f"line {line}: {first} is imported as clinical_nlp.{first}"
        if first != "clinical_nlp" or is_shelf or room in ("__init__", "__main__"):
            continue
        target = rest.partition(".")[0]
        if target in ("", "__version__"):
            continue
        assert target not in SHELVES, f"line {line}: the package finds a shelf by name, it does not import {module}"
        assert target in ROOMS, f"line {line}: {module} is in no room"
        assert room in ROOMS, f"{room} is not on the list of rooms"
        allowed = ROOMS.index(target) <= ROOMS.index(room) or (room, module) in AGREED
        assert allowed, f"line {line}: {room} may not import {module}, which stands below it"


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_nothing_unsafe_is_called(path: Path) -> None:
    tree = ast.parse(path.read_bytes())
    relative = str(path.relative_to(ROOT))
    for line, module in imports(tree):
        unsafe = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
        assert module.partition(".")[0] not in unsafe, f"line {line}: {module}"
        parsers = ("xml.etree", "xml.dom", "xml.sax", "lxml")
        assert not module.startswith(parsers), f"line {line}: XML is read through defusedxml, not {module}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}

        def says(keyword: str, value: object, given: dict[str | None, ast.expr] = keywords) -> bool:
            expression = given.get(keyword)
            return isinstance(expression, ast.Constant) and expression.value == value

        where = f"{relative}:{node.lineno}: {name}"
        assert name not in ("eval", "exec", "os.system", "os.popen"), where
        assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), where
        assert not says("shell", True), where
        assert not says("trust_remote_code", True), where
        assert not says("allow_pickle", True), where
        if name == "torch.load":
            assert says("weights_only", True), f"{where} without weights_only=True"


def test_no_room_is_a_drawer() -> None:
    forbidden = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
    assert not [name for path, name in zip(MODULES, names(MODULES), strict=True) if path.stem in forbidden]


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_public_things_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_bytes())
    if path.stem != "__init__" or tree.body:
        assert ast.get_docstring(tree), "the module says what it is for"
    missing = [name for name, node in public(tree.body) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert not missing, f"without docstring: {', '.join(missing)}"


def test_heavy_libraries_wait_for_the_function_that_needs_them() -> None:
    heavy = {"torch", "transformers", "spacy", "pyspark", "pandas", "duckdb", "sklearn", "matplotlib", "trl", "peft"}
    found = []
    for path in MODULES:
        if str(path.relative_to(ROOT)) in HEAVY_AT_THE_TOP:
            continue
        for node in ast.parse(path.read_bytes()).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}:{node.lineno} {name}" for name in modules if name.partition(".")[0] in heavy]
    assert not found


def test_shelves_are_symlinks_with_relative_targets() -> None:
    for shelf in SHELVES:
        link = PACKAGE / shelf
        assert link.is_symlink(), f"{link} must be a committed symlink to ../{shelf}"
        assert str(link.readlink()) == f"../{shelf}"
