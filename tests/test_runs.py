"""Run directories: a half-written one is recognised, nothing is torn, caches stay inside and go away."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from clinical_nlp import runs
from clinical_nlp.config import RecipeConfig
from clinical_nlp.errors import RunError, UsageError
from clinical_nlp.runs import Estimate, Run, contained_caches, write_atomic, write_json

CONFIG = RecipeConfig(seed=3)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_run_reads_back(tmp_path: Path) -> None:
    with Run.open(tmp_path / "r", CONFIG, recipe="ner") as run:
        run.log(step=1, loss=np.float32(0.5))
        run.record({"test.f1": Estimate(0.5, math.nan, math.nan, 3, 4, note="too few patients")})
        run.note(inputs={"a": 1})
        run.note(inputs={"b": 2}, tokens=7)
    read = Run.load(tmp_path / "r")
    assert read.metrics["test.f1"]["low"] is None
    assert read.manifest["inputs"] == {"a": 1, "b": 2}
    assert (read.manifest["seed"], read.manifest["tokens"], read.manifest["recipe"]) == (3, 7, "ner")
    assert names(tmp_path / "r") == ["config.yaml", "manifest.json", "metrics.json", "metrics.jsonl"]
    assert json.loads((tmp_path / "r" / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}


def fail_after(output: Path, *, produce: bool, resume: bool = False, config: RecipeConfig = CONFIG) -> None:
    with pytest.raises(ZeroDivisionError), Run.open(output, config, recipe="ner", resume=resume) as run:
        if produce:
            run.log(step=1)
        raise ZeroDivisionError


def test_a_half_written_run_is_refused_as_input_and_output_and_can_be_resumed(tmp_path: Path) -> None:
    output = tmp_path / "r"
    fail_after(output, produce=True)
    with pytest.raises(RunError, match="half-written"):
        Run.load(output)
    with pytest.raises(RunError, match="add --resume"), Run.open(output, CONFIG, recipe="ner"):
        pass
    other = RecipeConfig(seed=4)
    with pytest.raises(RunError, match="another config"), Run.open(output, other, recipe="ner", resume=True):
        pass
    with Run.open(output, CONFIG, recipe="ner", resume=True) as run:
        run.log(step=2)
    assert Run.load(output).manifest["recipe"] == "ner"
    with pytest.raises(RunError, match="finished run"), Run.open(output, CONFIG, recipe="ner", resume=True):
        pass


@pytest.mark.parametrize("there", [False, True])
def test_a_mistake_before_anything_was_produced_leaves_the_output_usable(there: bool, tmp_path: Path) -> None:
    output = tmp_path / "r"
    if there:
        output.mkdir()
    fail_after(output, produce=False)
    assert output.exists() is there
    assert not there or names(output) == []
    with Run.open(output, RecipeConfig(seed=9), recipe="ner"):
        pass


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(RunError, match="not empty"), Run.open(tmp_path, CONFIG, recipe="ner"):
        pass
    assert names(tmp_path) == ["thesis.txt"]
    with pytest.raises(UsageError, match="is a file"), Run.open(tmp_path / "thesis.txt", CONFIG, recipe="ner"):
        pass


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    code = f"""
from clinical_nlp.config import RecipeConfig
from clinical_nlp.runs import Run
with Run.open({str(tmp_path / "r")!r}, RecipeConfig(seed=3), recipe="ner", resume=True): pass
"""
    with Run.open(tmp_path / "r", CONFIG, recipe="ner") as run:
        run.log(step=1)
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "in use by another process" in second.stderr
    assert Run.load(tmp_path / "r").manifest["seed"] == 3


KILLED = """
import os, signal, sys
from clinical_nlp.config import RecipeConfig
from clinical_nlp.runs import Run
import tempfile
with Run.open(sys.argv[1], RecipeConfig(seed=3), recipe="ner") as run:
    run.log(step=1)
    open(run.path / "metrics.jsonl", "a").write('{"step": 2, "lo')
    open(os.path.join(tempfile.gettempdir(), "spill"), "w").write("PLANTED-MARKER")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_sigkill_the_run_resumes_without_the_torn_line_and_without_spilt_text(
    tmp_path: Path, files_holding
) -> None:
    output = tmp_path / "deep" / "r"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(output)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    spilt = files_holding("PLANTED-MARKER", tmp_path)
    assert [path.is_relative_to(output / ".cache") for path in spilt] == [True]
    with Run.open(output, CONFIG, recipe="ner", resume=True) as run:
        run.log(step=2)
    assert [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert files_holding("PLANTED-MARKER", tmp_path) == []


def test_a_damaged_manifest_is_one_line(tmp_path: Path) -> None:
    for content in ("{", "[]", ""):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(RunError, match="damaged"):
            Run.load(tmp_path)


def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with Run.open(tmp_path / "r", CONFIG, recipe="ner") as run:
        run.log(step=1)
        run.record({"test.f1": Estimate(0.5, 0.4, 0.6, 30, 40)})
        assert run.metrics["test.f1"]["value"] == 0.5
    assert not (tmp_path / "r").exists() or names(tmp_path / "r") == []
    monkeypatch.setenv("RANK", "0")
    with Run.open(tmp_path / "r", CONFIG, recipe="ner"):
        pass
    assert Run.load(tmp_path / "r")


def test_caches_and_temporary_files_are_inside_the_run_and_given_back(tmp_path: Path) -> None:
    import datasets

    before = (tempfile.gettempdir(), datasets.config.HF_DATASETS_CACHE, os.environ.get("HF_HOME"))
    for name in ("one", "two"):
        # The second run: the library was imported during (or before) the first and has read its environment.
        with Run.open(tmp_path / name, CONFIG, recipe="ner"):
            inside = tmp_path / name / ".cache"
            assert Path(tempfile.gettempdir()).is_relative_to(inside)
            assert Path(datasets.config.HF_DATASETS_CACHE).is_relative_to(inside)
            made = datasets.Dataset.from_generator(lambda: iter([{"text": "PLANTED-MARKER"}]))
            assert all(Path(file["filename"]).is_relative_to(inside) for file in made.cache_files)
        assert not inside.exists()
        assert (tempfile.gettempdir(), os.environ.get("HF_HOME")) == (before[0], before[2])
    assert tmp_path not in Path(datasets.config.HF_DATASETS_CACHE).parents
    with tempfile.TemporaryFile():
        pass


def test_runs_inside_runs_keep_their_own_caches(tmp_path: Path) -> None:
    with Run.open(tmp_path / "outer", CONFIG, recipe="adapt") as outer:
        outer.log(step=1)
        with Run.open(outer.path / "inner", CONFIG, recipe="ner"):
            assert "inner" in tempfile.gettempdir()
        assert Path(tempfile.gettempdir()).is_relative_to(tmp_path / "outer" / ".cache")


def test_workers_can_talk_although_the_run_lies_deep(tmp_path: Path) -> None:
    import multiprocessing.connection

    deep = tmp_path / ("d" * 60) / ("e" * 60) / ".cache"
    # A listener's default address is a socket in the temporary folder, whose path may have 107 bytes.
    with contained_caches(deep), multiprocessing.connection.Listener(family="AF_UNIX"):
        pass


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "f", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_json_holds_what_json_can_hold(tmp_path: Path) -> None:
    write_json(tmp_path / "j.json", {"a": np.arange(2), "b": {"y", "x"}, "c": math.inf, "d": (np.int64(3), tmp_path)})
    assert json.loads((tmp_path / "j.json").read_text()) == {
        "a": [0, 1],
        "b": ["x", "y"],
        "c": None,
        "d": [3, str(tmp_path)],
    }


def test_an_estimate_says_what_it_was_measured_on() -> None:
    assert str(Estimate(0.5, 0.4, 0.6, 30, 40)) == "0.500 (0.400 to 0.600; 30 patients, 40 notes, test)"
    assert "no interval" in str(Estimate(0.5, math.nan, math.nan, 3, 4))
