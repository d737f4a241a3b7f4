"""Progress: lines off a terminal, a bar on one, and nothing from the other processes."""

from __future__ import annotations

import io
import os
import sys

import pytest

from clinical_nlp.progress import progress, say


def test_lines_elsewhere_show_count_total_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 3, unit="steps", every=0) as bar:
        bar.advance(loss=0.123456)
        bar.advance(2, loss=0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("train: 1/3 steps")
    assert lines[0].endswith("loss 0.1235")
    assert lines[-1].startswith("train: 3/3 steps")
    assert lines[-1].endswith("done")


def test_a_line_says_how_long_it_will_take(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 60.0, 60.0, 120.0, 120.0, 240.0])
    monkeypatch.setattr("clinical_nlp.progress.time.monotonic", lambda: next(seconds))
    with progress("read", 400, unit="notes", every=0, done=100) as bar:
        bar.advance(100)  # 100 in a minute, 200 to go
        bar.advance(199)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/s")[1].strip() for line in lines] == ["2 min left", "under a minute left", "done"]


def test_what_was_done_already_does_not_count_as_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.0, 60.0, 60.0, 60.0])
    monkeypatch.setattr("clinical_nlp.progress.time.monotonic", lambda: next(seconds))
    with progress("read", 1000, unit="notes", every=0) as bar:
        bar.already(800)
        bar.advance(20)  # in a minute, 180 to go
    assert capsys.readouterr().err.splitlines()[0] == "read: 820/1000 notes  0.3/s  9 min left"


def test_lines_are_rare(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("read", every=60) as bar:
        for _ in range(1000):
            bar.advance()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_block_that_fails_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress("train", 3) as bar:
        bar.advance()
        raise KeyError
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("stopped")
    assert "1/3" in last


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_bar_and_lines_go_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress("outer [1/2]", 2) as bar:
        say("a line [in brackets]")
        with progress("inner", 1) as inner:  # rich allows one live display; this one prints lines
            inner.advance()
        bar.advance(f1=0.5)
    shown = screen.getvalue()
    for part in ("outer [1/2]", "a line [in brackets]", "inner: 1/1", "1/2", "f1 0.5"):
        assert part in shown


def test_only_the_first_rank_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    os.environ.update(WORLD_SIZE="2", RANK="1")
    say("hello")
    with progress("train", 1) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""
    os.environ.update(RANK="0")
    say("hello")
    assert capsys.readouterr().err == "hello\n"
