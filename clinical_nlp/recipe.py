"""Recipes and suites by name: where they are looked for, how one is run from Python, listed and copied.

A recipe is a module with `CONFIG`, its config class, and `run(config, output, *, resume=False) -> Run`. It is looked
for as a path to a `.py` file, then in the folder `recipes` (`eval` for a suite) of the working directory, then among
those that ship with the package.
"""

from __future__ import annotations

import ast
import importlib
import importlib.resources
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clinical_nlp.errors import ClinicalNlpError, UsageError, nearest

if TYPE_CHECKING:
    from clinical_nlp.config import Config
    from clinical_nlp.runs import Run

Shelf = Literal["recipes", "eval"]
_KIND = {"recipes": "recipe", "eval": "suite"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One recipe (or suite): its name, its file, and whether it ships with the package."""

    name: str
    path: Path
    shelf: Shelf
    packaged: bool

    @property
    def summary(self) -> str:
        """First line of the docstring; the file is read, not imported."""
        return (ast.get_docstring(_parse(self.path)) or "").partition("\n")[0]

    @property
    def config_files(self) -> list[Path]:
        """The YAML files beside the recipe: its own (`ner.yaml`) first, then variants (`ner_NAME.yaml`)."""
        folders = (self.path.parent / "configs", self.path.parent)
        own = [folder / f"{self.name}.yaml" for folder in folders]
        variants = [path for folder in folders for path in sorted(folder.glob(f"{self.name}_*.yaml"))]
        return [path for path in [*own, *variants] if path.is_file()]

    def load(self) -> Any:
        """Import the recipe.

        Raises
        ------
        ClinicalNlpError : the file does not import; the message says in which line.
        UsageError : it has no `CONFIG` or no `run`.
        """
        if self.packaged:
            module: Any = importlib.import_module(f"clinical_nlp.{self.shelf}.{self.name}")
        else:
            module = _import_file(self.path, f"clinical_nlp_{_KIND[self.shelf]}_{self.name}")
        for needed in ("CONFIG", "run"):
            if not hasattr(module, needed):
                raise UsageError(f"{self.path} is no {_KIND[self.shelf]}: it has no {needed}")
        return module

    def config(self, file: Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
        """Return the config: `file` (default the recipe's own YAML), with `overrides` on top."""
        from clinical_nlp.config import load_config

        own = [path for path in self.config_files if path.stem == self.name]
        if file is not None and not file.exists():
            # A variant that ships with the recipe goes by its bare name.
            file = next((path for path in self.config_files if file.name in (path.stem, path.name)), file)
        return load_config(self.load().CONFIG, file or (own[0] if own else None), overrides)


def run(recipe: str | os.PathLike[str], *, output: str | os.PathLike[str], resume: bool = False, **config: Any) -> Run:
    """Run a recipe.

    Parameters
    ----------
    recipe : name, or path of a `.py` file.
    output : the run directory; new or empty, unless `resume`.
    resume : finish an interrupted run.
    config : keys of the recipe's config, `corpus="ncbi_disease"`, `strategy={"name": "lora", "rank": 8}`, or dotted
        as `**{"strategy.rank": 8}`.

    Returns
    -------
    Run, with `.path` and `.metrics`.

    Raises
    ------
    ConfigError : a key is not known (the message names the nearest) or a value does not fit.
    RunError : the output holds something else.
    """
    found = find_recipe(os.fspath(recipe))
    return execute(found, found.config(None, config), output=Path(output), resume=resume)


def execute(recipe: Recipe, config: Config, *, output: Path, resume: bool = False) -> Run:
    """Run a recipe or suite that was found; a finished run with the same config is returned when it is resumed."""
    from clinical_nlp.config import to_yaml
    from clinical_nlp.progress import say
    from clinical_nlp.runs import Run

    if resume and (output / "manifest.json").is_file():
        finished = Run.load(output)
        if (output / "config.yaml").read_bytes() == to_yaml(config).encode("utf-8"):
            say(f"{output} is already finished")
            return finished
    result: Run = recipe.load().run(config, output, resume=resume)
    return result


def find_recipe(name: str, shelf: Shelf = "recipes") -> Recipe:
    """Find a recipe (or suite, with shelf `eval`) by path or name.

    Raises
    ------
    UsageError : there is none; the message names the nearest.
    """
    kind = _KIND[shelf]
    if name.endswith(".py") or os.sep in name:
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"{kind} {name!r}: no such file")
        return _recipe(path, shelf)
    found = {recipe.name: recipe for recipe in list_recipes(shelf)}
    if name not in found:
        raise UsageError(f"{kind} {name!r} is not known{nearest(name, found) if found else '; there is none yet'}")
    return found[name]


def list_recipes(shelf: Shelf = "recipes") -> list[Recipe]:
    """Return every recipe (or suite) that a bare name finds; one in the working directory hides a packaged one."""
    found: dict[str, Recipe] = {}
    for folder in (_packaged(shelf), Path(shelf)):
        for path in sorted(folder.glob("*.py")) if folder.is_dir() else []:
            if not path.name.startswith("_") and _is_recipe(path):
                found[path.stem] = _recipe(path, shelf)
    return [found[name] for name in sorted(found)]


def copy_recipe(name: str, destination: Path) -> list[Path]:
    """Copy a recipe, its YAML and, where it trains, those for `accelerate launch`, to edit; returns the new files.

    Parameters
    ----------
    destination : a folder (made if needed), or a new file name ending in `.py`.

    Raises
    ------
    UsageError : the recipe is not known, or a file of that name is already there.
    """
    recipe = find_recipe(name)
    target = destination if destination.suffix == ".py" else destination / f"{recipe.name}.py"
    pairs = [(recipe.path, target)]
    for source in recipe.config_files:
        pairs.append((source, target.with_name(source.name.replace(recipe.name, target.stem, 1))))
    if "clinical_nlp.training" in recipe.path.read_text("utf-8"):
        pairs += [(source, target.parent / "accelerate" / source.name) for source in _launch_files(recipe)]
    if taken := [str(new) for _, new in pairs if new.exists()]:
        raise UsageError(f"{taken[0]} is already there and is not overwritten; choose another DEST")
    target.parent.mkdir(parents=True, exist_ok=True)
    for old, new in pairs:
        new.parent.mkdir(exist_ok=True)
        shutil.copyfile(old, new)
    return [new for _, new in pairs]


def _launch_files(recipe: Recipe) -> list[Path]:
    return sorted((recipe.path.parent / "configs" / "accelerate").glob("*.yaml"))


def _packaged(shelf: Shelf) -> Path:
    return Path(str(importlib.resources.files(f"clinical_nlp.{shelf}")))


def _recipe(path: Path, shelf: Shelf) -> Recipe:
    """Make the entry of a file; the checkout's own `recipes/ner.py` is the packaged one, whichever way it was named."""
    shipped = _packaged(shelf) / path.name
    packaged = shipped.is_file() and shipped.samefile(path)
    return Recipe(path.stem, shipped if packaged else path, shelf, packaged)


def _is_recipe(path: Path) -> bool:
    """Return whether a file assigns `CONFIG` at its top level; it is read, not imported."""
    for statement in _parse(path).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "CONFIG" for target in targets):
            return True
    return False


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ClinicalNlpError(f"{path}{line} is not valid Python") from None


def _import_file(path: Path, name: str) -> Any:
    _parse(path)
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise UsageError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # pydantic looks annotations up there
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
