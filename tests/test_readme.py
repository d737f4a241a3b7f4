"""The README's commands are understood as they stand, and its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from clinical_nlp.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
MAKEFILE = (Path(__file__).parent.parent / "Makefile").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


def test_there_are_commands_for_every_job():
    verbs = {shlex.split(line)[1] for line in COMMANDS if line.startswith("clinical-nlp")}
    assert {"run", "extract", "drift", "evaluate"} <= verbs


@pytest.mark.parametrize("line", [line for line in COMMANDS if " review " not in line])
def test_a_command_is_understood(line, capsys):
    program, *words = shlex.split(line)
    if program == "make":
        assert re.search(rf"^{words[0]}:", MAKEFILE, re.MULTILINE)
        return
    assert program == "clinical-nlp"
    assert main([*words, "--print-config"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "python-ner" / "manifest.json").is_file()


def test_the_queries_and_the_review_run(tmp_path, monkeypatch, capsys):
    import duckdb

    from clinical_nlp import extract

    notes = tmp_path / "notes.csv"
    rows = ["n1,p1,2020-01-02,Hypertension. Shortness of breath and fever.", "n2,p1,2020-02-02,Has hypertension."]
    notes.write_text("\n".join(["note_id,patient_id,written_at,text", *rows]) + "\n", "utf-8")
    extract(notes, format="table", output=tmp_path / "out", institution="here")
    monkeypatch.chdir(tmp_path)
    queries = [query for block in blocks("sql") for query in block.split(";") if query.strip()]
    found = [duckdb.sql(query).fetchall() for query in queries]
    assert [len(rows) for rows in found] == [1, 1, 1]
    for line in (line for line in COMMANDS if " review " in line):
        for reader in Path("review/brat").glob("*/"):
            (reader / "done").touch()
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z_]+@", README)
