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


@pytest.mark.parametrize("line", COMMANDS)
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


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z_]+@", README)
