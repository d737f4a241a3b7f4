"""A wheel, installed in a clean environment outside the checkout, lists, runs and copies every recipe."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import write_encoder

from clinical_nlp.recipe import list_recipes

ROOT = Path(__file__).parent.parent
LEFT_OUT = (".venv", ".git", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "demo-output*")
RECIPES = [recipe.name for recipe in list_recipes() if recipe.packaged]
SUITES = [recipe.name for recipe in list_recipes("eval") if recipe.packaged]

Build = Callable[[str, Path], Path]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, since building leaves a `build` folder whose old files get into later wheels."""
    copy = tmp_path_factory.mktemp("checkout") / "clinical_nlp"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return copy


def build(source: Path, kind: str, folder: Path) -> Path:
    """Build a wheel or an sdist with the installed setuptools: no isolation, since that would download."""
    code = f"import setuptools.build_meta as b, sys; print(b.build_{kind}(sys.argv[1]))"
    folder.mkdir(exist_ok=True)
    made = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=source, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return folder / made.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, "wheel", tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that calls the `clinical-nlp` of a clean environment, from a folder that is not the checkout."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home / "venv", with_pip=False)
    python = home / "venv" / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    install = ["-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    # The dependencies are borrowed from this environment, behind what the wheel brought; not its editable finder,
    # which is in a .pth file that is not read from a folder named in another one.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    folder = home / "elsewhere"
    folder.mkdir()
    # The network wall of the tests stays; a path into the checkout would defeat the test.
    path = os.pathsep.join(part for part in os.environ["PYTHONPATH"].split(os.pathsep) if "wall" in part)

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(home / "venv" / "bin" / "clinical-nlp"), *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )

    return call


def test_the_wheel_holds_the_shelves_and_the_data_and_nothing_generic(wheel: Path, checkout: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"clinical_nlp"}
    ignored = (".pyc",)
    there = {
        str(path.relative_to(checkout))
        for top in ("clinical_nlp", "recipes", "corpora", "eval")
        for path in (checkout / top).rglob("*")
        if path.is_file() and not path.name.endswith(ignored) and "__pycache__" not in path.parts
    }
    shelved = {f"clinical_nlp/{name}" if not name.startswith("clinical_nlp/") else name for name in there}
    assert shelved - files == set(), "these files of the checkout are not in the wheel"
    assert not [name for name in files if "__pycache__" in name or name.endswith(".pyc")]


def test_the_built_in_model_keeps_the_wheel_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 20 * 2**20


def test_a_wheel_from_the_sdist_is_the_same(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    archive = build(checkout, "sdist", tmp_path / "sdist")
    with tarfile.open(archive) as handle:
        handle.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.name.startswith("clinical_nlp-"))
    again = build(source, "wheel", tmp_path / "again")

    def modules(file: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(file) as archive:
            return {name: archive.read(name) for name in archive.namelist() if name.startswith("clinical_nlp/")}

    assert modules(again) == modules(wheel)


def test_installed_elsewhere_it_is_not_the_checkout(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    listed = command("list", "recipes")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == RECIPES
    assert str(ROOT) not in listed.stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_resolves_its_config_and_is_copied(
    recipe: str, command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    printed = command("run", recipe, "--print-config")
    assert printed.returncode == 0, printed.stderr
    copied = command("copy", recipe, str(tmp_path / "mine"))
    assert copied.returncode == 0, copied.stderr
    again = command("run", str(tmp_path / "mine" / f"{recipe}.py"), "--print-config")
    assert (again.returncode, again.stdout) == (0, printed.stdout), again.stderr
    refused = command("copy", recipe, str(tmp_path / "mine"))
    assert refused.returncode == 2
    assert "not overwritten" in refused.stderr


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_resolves_its_config(suite: str, command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    printed = command("evaluate", suite, "--print-config")
    assert printed.returncode == 0, printed.stderr


SMALL_CORPUS = ["--corpus.options.institutions", "2", "--corpus.options.patients", "10"]
SMALL = {
    "dapt": [*SMALL_CORPUS, "--max_steps", "1", "--length", "64"],
    "ner": [*SMALL_CORPUS, "--max_steps", "1", "--baseline_notes", "2"],
    "coding": [*SMALL_CORPUS, "--max_steps", "1", "--baseline_documents", "1"],
    "code": ["--model", "runs-coding", "--corpus.path", "export", "--corpus.options.format", "fhir"],
    "distil": [*SMALL_CORPUS, "--teacher", "runs-ner", "--base_model", "encoder", "--max_steps", "1",
               "--timed_notes", "10"],
    "drift": [*SMALL_CORPUS, "--n_permutations", "19"],
    "report": ["--corpus.options.institutions", "1", "--corpus.options.patients", "40", "--max_steps", "1",
               "--zero_shot_notes", "2"],
    "assertion": [*SMALL_CORPUS, "--base_model", "encoder", "--max_steps", "1"],
    "link": [*SMALL_CORPUS, "--base_model", "encoder", "--max_steps", "1", "--pairs", "8", "--spans", "100",
             "--precision", "0.01"],
    "merge": ["--run", "runs-dapt"],
    "quantise": ["--run", "runs-distil", "--timed_notes", "2", "--max_loss", "1"],
    "adapt": [*SMALL_CORPUS, "--source", "export", "--max_steps", "1", "--n_permutations", "19"],
    "tiny": ["--institutions", "1", "--patients", "10", "--vocabulary", "400", "--hidden", "64", "--layers", "1",
             "--max_steps", "1"],
}  # fmt: skip
FIRST = {"merge": "dapt", "code": "coding", "distil": "ner", "quantise": "distil"}
"""Recipes that take a finished run of another one."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_from_the_wheel(
    command: Callable[..., subprocess.CompletedProcess[str]], recipe: str
) -> None:
    from clinical_nlp.corpora.synthetic_hospitals import load
    from clinical_nlp.corpora.synthetic_hospitals.exports import write_fhir

    folder = Path(command("--version").args[0]).parents[2] / "elsewhere"
    if not (folder / "export").exists():
        write_fhir(load(institutions=2, patients=10), folder / "export")
        write_encoder(folder / "encoder")
    needed = [recipe]
    while needed[0] in FIRST:
        needed.insert(0, FIRST[needed[0]])
    for name in needed:
        if not (folder / f"runs-{name}" / "manifest.json").is_file():  # made and checked on the way to another one
            done = command("run", name, *SMALL[name], "--output", f"runs-{name}")
            assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / f"runs-{recipe}" / "manifest.json").is_file()
