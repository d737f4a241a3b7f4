"""The command line as a user meets it: one clear line for every mistake, the right exit code, never note text."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from clinical_nlp import cli
from clinical_nlp.recipe import list_recipes

MARKER = "ZQPLANTEDMARKERQZ"


def call(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clinical_nlp", *map(str, words)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def one_line(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """Assert that a command failed with one line that says these things, and with nothing else."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("clinical-nlp: ")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert MARKER not in done.stderr + done.stdout
    for part in parts:
        assert part in lines[0]


# What is typed wrongly


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["frobnicate"], "command 'frobnicate' is not known"),
        (["extrct"], "did you mean 'extract'?"),
        (["run"], "name the RECIPE right after 'run'"),
        (["run", "nre"], "did you mean 'ner'?"),
        (["run", "./none.py"], "no such file"),
        (["run", "ner"], "--output DIR is needed"),
        (["run", "ner", "--strategy.rnak", "3"], "did you mean 'strategy.rank'?"),
        (["run", "ner", "--ouput", "x"], "did you mean 'output'?"),
        (["run", "ner", "--output", "x", "--seed", "many"], "config key 'seed': input should be a valid integer"),
        (["run", "ner", "--output", "x", "--config", "none.yaml"], "config file none.yaml does not exist"),
        (["run", "ner", "--output", "x", "--corpus", "ncbi_diseases"], "did you mean 'ncbi_disease'?"),
        (["run", "ner", "stray", "--output", "x"], "unrecognized arguments: stray"),
        (["extract", "--format", "text", "--output", "x"], "'source' is required"),
        (["extract", "none", "--format", "text", "--output", "x"], "none"),
        (["extract", ".", "--format", "fihr", "--output", "x"], "did you mean 'fhir'?"),
        (["extract", ".", "--format", "text", "--wrokers", "2", "--output", "x"], "did you mean 'workers'?"),
        (["drift", "none", "--output", "x"], "none"),
        (["evaluate", "nothing", "--output", "x"], "nothing"),
        (["list", "recipe"], "recipes"),
        (["copy", "ner"], "DEST"),
        (["demo", "--seed", "x"], "--seed"),
        (["report", "none"], "is not a run directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(words: list[str], part: str, tmp_path: Path) -> None:
    done = call(*words, cwd=tmp_path)
    one_line(done, 2, part)
    assert not (tmp_path / "x").exists(), "the output stays usable for the corrected command"


def test_a_corpus_that_is_not_there_says_where_to_get_it(tmp_path: Path) -> None:
    done = call("run", "ner", "--corpus", "ncbi_disease", "--corpus.path", "none", "--output", "x", cwd=tmp_path)
    one_line(done, 2, "no such file or folder: none", "http")


def test_an_unreadable_model_is_one_line(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "notes.csv").write_text("note_id,patient_id,institution,text\n1,p,A,fever\n")
    words = ("extract", "notes.csv", "--format", "table", "--output", "x", "--model", "model")
    one_line(call(*words, cwd=tmp_path), 2, "--model model: model is not a run directory")
    (model / "config.yaml").write_text("")
    one_line(call(*words, cwd=tmp_path), 2, "half-written")
    (model / "manifest.json").write_text("{}")
    one_line(call(*words, cwd=tmp_path), 2, "no task.json")
    for told, part in (
        ("coding", "was trained for coding; name an ner or a link run"),
        ("ner", "task.json is damaged"),
    ):
        (model / "task.json").write_text(json.dumps({"task": told}))
        for workers in ("1", "2"):
            one_line(call(*words, "--workers", workers, cwd=tmp_path), 2, part)
    assert not (tmp_path / "x").exists(), "the output stays usable for the corrected command"


def test_a_hub_id_is_refused_offline(tmp_path: Path) -> None:
    rows = [f"{number},p{number},{'AB'[number % 2]},fever and cough" for number in range(80)]
    (tmp_path / "notes.csv").write_text("\n".join(["note_id,patient_id,institution,text", *rows]))
    done = call("drift", "notes.csv", "--model", "some/model", "--output", "x", cwd=tmp_path)
    one_line(done, 2, "some/model", "offline")


# What is asked for


def test_help_comes_before_half_a_second(tmp_path: Path) -> None:
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        done = call("--help", cwd=tmp_path)
        taken.append(time.perf_counter() - begun)
        assert done.returncode == 0
    # The fastest of several: what else the machine does is not the program's.
    assert min(taken) < 0.5
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "clinical_nlp", "--help"], capture_output=True, text=True, check=True
    ).stderr
    for heavy in ("pydantic", "yaml", "numpy", "pyarrow", "torch", "rich"):
        assert not [line for line in imported.splitlines() if line.split("|")[-1].strip().partition(".")[0] == heavy]


def test_help_of_a_recipe_lists_every_key_with_type_default_and_text(tmp_path: Path) -> None:
    from clinical_nlp.config import fields

    for recipe in list_recipes():
        shown = " ".join(call("run", recipe.name, "--help", cwd=tmp_path, COLUMNS="500").stdout.split())
        for key, kind, _, text in fields(recipe.load().CONFIG):
            if kind.startswith("dict"):
                assert f"--{key}.NAME VALUE {text}" in shown
                continue
            _before, found, rest = shown.partition(f" --{key} ")
            assert found, f"{key} is not in the help"
            kind = kind.replace(" or none", "")
            assert rest.startswith((f"{kind} {text} (", f"[{kind}] {text} ("))
            assert re.match(r"(none allowed, )?(required|default )", rest[rest.index(f"{text} (") + len(text) + 2 :])


@pytest.mark.parametrize("recipe", [recipe.name for recipe in list_recipes()])
def test_a_printed_config_is_read_back(recipe: str, tmp_path: Path) -> None:
    first = call("run", recipe, "--seed", "7", "--print-config", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "seed: 7" in first.stdout
    (tmp_path / "c.yaml").write_text(first.stdout)
    again = call("run", recipe, "--config", "c.yaml", "--print-config", cwd=tmp_path)
    assert again.stdout == first.stdout


def test_keys_may_be_written_in_the_usual_ways(tmp_path: Path) -> None:
    words = ["--max-steps", "3", "--strategy", "lora", "--strategy.rank=4", "--corpus.options.patients", "5"]
    shown = call("run", "ner", *words, "--training.gradient_checkpointing", "--print-config", cwd=tmp_path).stdout
    for part in ("max_steps: 3", "name: lora", "rank: 4", "patients: 5", "gradient_checkpointing: true"):
        assert part in shown


@pytest.mark.parametrize("what", ["recipes", "corpora", "suites", "strategies", "objectives"])
def test_lists_have_one_line_an_entry(what: str, tmp_path: Path) -> None:
    done = call("list", what, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(len(line.split(maxsplit=1)) == 2 for line in done.stdout.splitlines())


def test_doctor_finds_nothing_broken(tmp_path: Path) -> None:
    done = call("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    for what in ("gpu", "4-bit", "offline", "packages", "builtin:tiny", "memory", "disk", "spark"):
        assert any(what in line.split()[1] for line in done.stdout.splitlines())
    assert "0 broken" in done.stdout


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m clinical_nlp list recipes | true"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == ""


# What the input does


def fhir_note(number: int, text: str) -> str:
    document = {
        "resourceType": "DocumentReference",
        "id": f"d{number}",
        "status": "current",
        "subject": {"reference": f"Patient/p{number}"},
        "custodian": {"reference": "Organization/A"},
        "content": [
            {"attachment": {"contentType": "text/plain", "data": base64.b64encode(text.encode()).decode("ascii")}}
        ],
    }
    return json.dumps(document)


def test_a_corrupt_line_is_rejected_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    good = fhir_note(1, f"No fever. {MARKER}")
    bad = '{"resourceType": "DocumentReference", "text": "' + MARKER
    (tmp_path / "DocumentReference.ndjson").write_text(f"{good}\n{bad}\n{fhir_note(2, 'He has seizures.')}\n")
    done = call("extract", "DocumentReference.ndjson", "--format", "fhir", "--output", "out", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "3 notes = 2 done + 0 skipped + 1 rejected" in done.stdout
    assert "result: out" in done.stdout
    assert MARKER not in done.stdout + done.stderr
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    assert MARKER not in manifest


def test_a_clean_export_is_done_and_says_so_in_numbers(tmp_path: Path) -> None:
    (tmp_path / "DocumentReference.ndjson").write_text(fhir_note(1, "No fever.") + "\n")
    words = ("extract", "DocumentReference.ndjson", "--format", "fhir", "--output", "out")
    done = call(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 notes = 1 done + 0 skipped + 0 rejected" in done.stdout
    one_line(call(*words, cwd=tmp_path), 1, "finished run")


@pytest.mark.parametrize("content", ["", "\n", "note_id,patient_id,institution,text\n"])
def test_an_empty_export_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text(content)
    done = call("extract", "notes.csv", "--format", "table", "--output", "out", cwd=tmp_path)
    one_line(done, 1, "notes.csv")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_table_without_the_columns_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text(f"id,body\n1,{MARKER}\n")
    one_line(call("extract", "notes.csv", "--format", "table", "--output", "out", cwd=tmp_path), 2, "notes.csv")


# What the code below does

RECIPE = f'''
"""A recipe that fails."""
import logging, os, sys, threading, time, warnings
from pathlib import Path
from clinical_nlp.config import Config
from clinical_nlp.errors import InputError
from clinical_nlp.runs import Run

class FailConfig(Config):
    """Fail."""
    how: str = "value"
    """How."""
    produce: bool = False
    """Write something first."""

CONFIG = FailConfig

def run(config, output, *, resume=False):
    """Fail."""
    with Run.open(output, config, recipe="fail", resume=resume) as run:
        if config.produce:
            run.log(step=1)
        fail(config.how)
        run.note(rejected=4 if config.how == "reject" else 0)
    return run

def fail(how):
    """Fail in one of many ways."""
    text = "{MARKER} of a note"
    if how == "value":
        raise ValueError(text)
    if how == "chain":
        try:
            raise KeyError(text)
        except KeyError as error:
            raise RuntimeError(text) from error
    if how == "full":
        raise OSError(28, "No space left on device", "out/file")
    if how == "known":
        raise InputError("two\\nlines")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "memory":
        raise MemoryError
    if how == "noise":
        logging.getLogger("transformers").error("log %s", text)
        logging.getLogger("other").warning(text)
        warnings.warn(text)
        thread = threading.Thread(target=lambda: [].index(text))
        thread.start()
        thread.join()
    if how == "wait":
        Path("ready").touch()
        time.sleep(60)
    if how == "online":
        print("offline", os.environ["HF_HUB_OFFLINE"])
'''


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    (tmp_path / "failing.py").write_text(RECIPE)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return call("run", "./failing.py", "--output", "out", *words, cwd=tmp_path)

    return run


def test_an_unexpected_exception_shows_its_kind_and_place_and_never_its_message(
    recipe: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, files_holding
) -> None:
    one_line(recipe("--how", "value"), 1, "ValueError", "failing.py:")
    # Nothing was produced, so there is no run; the frames lie beside it.
    assert not (tmp_path / "out").exists()
    assert "in fail" in (tmp_path / "out.error.txt").read_text()
    one_line(recipe("--how", "chain", "--produce"), 1, "RuntimeError", "out/error.txt")
    frames = (tmp_path / "out" / "error.txt").read_text()
    assert "RuntimeError" in frames
    assert "KeyError" in frames
    assert [path.name for path in files_holding(MARKER, tmp_path)] == ["failing.py"]


@pytest.mark.parametrize(
    ("how", "code", "part"),
    [
        ("full", 1, "no space left on device: out/file; free some space, then add --resume"),
        ("known", 1, "two lines"),
        ("interrupt", 130, "interrupted"),
        ("memory", 1, "out of memory"),
    ],
)
def test_every_end_has_its_line_and_code(
    how: str, code: int, part: str, recipe: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    one_line(recipe("--how", how), code, part)


def test_libraries_cannot_print_text(recipe: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = recipe("--how", "noise")
    assert done.returncode == 0, done.stderr
    assert MARKER not in done.stdout + done.stderr
    (tmp_path / "out" / "manifest.json").unlink()
    loud = recipe("--how", "noise", "--verbose")
    assert MARKER not in loud.stdout + loud.stderr
    assert "UserWarning at" in loud.stderr


def test_rejected_records_make_the_exit_code_three(recipe: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = recipe("--how", "reject")
    assert done.returncode == 3, done.stderr
    assert "4 records were rejected" in done.stdout
    assert "result: out" in done.stdout


def test_resuming_a_finished_run_is_no_error(recipe: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert recipe("--how", "nothing").returncode == 0
    again = recipe("--how", "nothing", "--resume")
    assert again.returncode == 0
    assert "already finished" in again.stderr
    one_line(recipe("--how", "nothing"), 1, "finished run")
    one_line(recipe("--how", "other", "--resume"), 1, "finished run")


def test_offline_unless_asked(recipe: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    assert "offline 1" in recipe("--how", "online").stdout
    (tmp_path / "out" / "manifest.json").unlink()
    assert "offline 0" in recipe("--how", "online", "--allow-download").stdout


def test_sigterm_leaves_through_the_cleanup(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(RECIPE)
    command = [sys.executable, "-m", "clinical_nlp", "run", "./failing.py", "--output", "out", "--how", "wait"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / "ready").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=30)
    assert (process.returncode, shown) == (143, "clinical-nlp: terminated\n")
    assert not (tmp_path / "out").exists(), "the caches are removed and the output is free again"


def test_a_recipe_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(f"def run(:\n    '{MARKER}'\n")
    one_line(call("run", "./broken.py", cwd=tmp_path), 1, "broken.py, line 1")
    (tmp_path / "empty.py").write_text("")
    one_line(call("run", "./empty.py", cwd=tmp_path), 2, "has no CONFIG")


def test_a_copied_recipe_in_the_working_folder_is_found_first_with_its_own_yaml(tmp_path: Path) -> None:
    done = call("copy", "ner", "recipes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "copied 5 files" in done.stdout
    assert (tmp_path / "recipes" / "accelerate" / "fsdp_qlora.yaml").is_file()
    config = tmp_path / "recipes" / "ner.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 41"))
    shown = call("run", "ner", "--print-config", cwd=tmp_path)
    assert "seed: 41" in shown.stdout, shown.stderr
    assert "[recipes/ner.py]" in call("list", "recipes", cwd=tmp_path).stdout


def test_a_full_disk_is_named_whatever_the_library_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert "no space left on device" in cli._describe(RuntimeError("PytorchStreamWriter failed"), tmp_path)
    assert not list(tmp_path.iterdir())
