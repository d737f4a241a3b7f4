"""The commands of a batch, from extraction to review, as one types them."""

import os
import subprocess
import sys

from conftest import MARKER


def call(*words, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "clinical_nlp", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert MARKER not in done.stdout + done.stderr
    return done


def test_from_extraction_to_review(export, options, tmp_path):
    shared = ("--format", "text", "--terminology", options["terminology"], "--output", "out")
    done = call("extract", "export", *shared, "--evidence", "A/1", "5", cwd=tmp_path)
    assert done.returncode == 3, done.stderr  # two records are rejected
    pages = [line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("evidence: ")]
    assert [(tmp_path / page).name for page in pages] == ["A%2F1.html", "B%2F5.html"]
    assert all("<mark" in (tmp_path / page).read_text("utf-8") for page in pages)
    done = call("extract", "export", *shared, "--retry-rejected", cwd=tmp_path)
    assert "nothing to retry" in done.stderr
    (export / "a4.txt").write_text("No cleft palate.")
    done = call("extract", "export", *shared, "--update", cwd=tmp_path)
    assert "update: 0 notes added, 1 amended, 0 deleted; 1 patients touched" in done.stdout
    assert not (tmp_path / "out" / "evidence").exists()  # those pages were of the old state
    done = call("review", "out", "--export", "review", "--readers", "ann", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "11 notes of 6 patients" in done.stdout
    done = call("review", "out", "--import", "review", cwd=tmp_path)
    assert done.returncode == 1
    assert "nobody has read a note yet" in done.stderr
    (tmp_path / "review" / "brat" / "ann" / "done").touch()
    done = call("review", "out", "--import", "review", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "11 notes read by ann" in done.stdout
    assert "ppv" in done.stdout


def test_wrong_words(export, options, tmp_path):
    shared = ("--format", "text", "--terminology", options["terminology"], "--output", "out")
    done = call("extract", "export", *shared, "--update", cwd=tmp_path)
    assert (done.returncode, "leave --update out" in done.stderr) == (2, True)
    done = call("review", "out", "--export", "r", "--truth", "ann", cwd=tmp_path)
    assert (done.returncode, "--truth goes with --import" in done.stderr) == (2, True)
    done = call("review", "out", "--export", "r", cwd=tmp_path)
    assert (done.returncode, "not a finished extraction" in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
