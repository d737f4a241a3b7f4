"""The text of sources and reports is in the files of a run that are there to hold it, and nowhere else."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny_models import write_decoder

MARKER = "Zqplantedmarkerqz"
MAY_HOLD = {"generated.parquet", "generated.jsonl", "report.html"}

Search = Callable[[str, Path], list[Path]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of its own: `in/` holds dialogues and a model, everything else is what the commands write."""
    root = tmp_path_factory.mktemp("world")
    for name in ("in/dialogues", "home", "tmp", "work"):
        (root / name).mkdir(parents=True)
    for part, count in (("Training", 12), ("Validation", 4)):
        with open(root / "in" / "dialogues" / f"MTS-Dialog-{part}Set.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["ID", "section_header", "section_text", "dialogue"])
            for number in range(count):
                writer.writerow(
                    [
                        number,
                        "CC",
                        f"{MARKER} has fever. No cough.",
                        f"Doctor: Any pain? Patient: {part} {MARKER} {number}, fever.",
                    ]
                )
    write_decoder(root / "in" / "model", layers=1)
    return root


def run(world: Path, *words: str) -> tuple[int, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_", "TMP"))}
    environment |= {"HOME": str(world / "home"), "TMPDIR": str(world / "tmp")}
    command = [sys.executable, "-m", "clinical_nlp", "run", "report", "--corpus", "mts_dialog", "--corpus.path",
               "../in/dialogues", "--max_steps", "2", "--training.batch_size", "2", "--training.save_steps", "1",
               "--verbose", *words]  # fmt: skip
    done = subprocess.run(
        command, cwd=world / "work", env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def test_only_drafts_and_their_page_hold_text(world: Path, files_holding: Search) -> None:
    first = run(world, "--base_model", "../in/model", "--output", "sft")
    tuned = run(world, "--base_model", "sft", "--preference.pairs", "6", "--preference.own", "3", "--output", "dpo")
    refused = run(world, "--base_model", "../in/model", "--window", "96", "--max_new_tokens", "20", "--output", "no")
    assert [first[0], tuned[0], refused[0]] == [0, 0, 2], first[1] + tuned[1] + refused[1]
    assert MARKER not in first[1] + tuned[1] + refused[1]
    written = {path for path in files_holding(MARKER, world) if not path.is_relative_to(world / "in")}
    written |= {path for path in (world / "work").rglob("*.parquet") if MARKER in str(pq.read_table(path).to_pydict())}
    assert {path.name for path in written} == MAY_HOLD
    assert all(path.parent.parent == world / "work" for path in written)
