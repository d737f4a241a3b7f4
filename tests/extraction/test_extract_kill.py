"""SIGKILL at every write, fsync and rename, and at random times, then resume: the same bytes as without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

SITE = """
import os, sys
if "KILLED_AT" in os.environ and "engines.worker" in " ".join(sys.orig_argv):
    sys.path.insert(0, {here!r})
    from pathlib import Path
    from killing import arm
    point, once = os.environ["KILLED_AT"].split(" ", 1)
    arm(int(point), Path(once))
"""


def kill(mode, export, options, folder, number, *, workers=1):
    """Run the kills and return (where, committed, reused, same) of each."""
    (folder / "kill").mkdir()
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE.format(here=str(HERE)))
    told = json.dumps({**options, "terminology": str(options["terminology"]), "workers": workers})
    path = os.pathsep.join([str(folder / "site"), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, str(HERE / "killing.py"), mode, str(export), str(folder / "kill"), told, str(number)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert all(row[3] == "same" for row in rows), done.stdout
    return [(where, int(committed), int(reused)) for where, committed, reused, _ in rows]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("workers", "every"),
    [
        (1, 13),
        (2, 7),
        pytest.param(1, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(4, 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_write_fsync_and_rename(export, options, tmp_path, workers, every):
    rows = kill("points", export, {**options, "shard_notes": 8}, tmp_path, every, workers=workers)
    # With workers the shards are written elsewhere: plan, outputs, ledger of outputs and manifest are left.
    assert len(rows) * every >= (60 if workers == 1 else 30)
    # What was committed is never done again, but where the outputs are made and the staged shards are gone.
    assert all(reused in (committed, 0) for _, committed, reused in rows)
    if workers == 1:
        assert any(reused == committed == 1 for _, committed, reused in rows)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_at_any_of_them_costs_nothing(export, options, tmp_path, every):
    rows = kill("workers", export, {**options, "shard_notes": 8}, tmp_path, every, workers=2)
    assert len(rows) * every >= 10


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("workers", "count"), [(1, 120), (2, 50), (4, 30)])
def test_killed_at_random_times(export, options, tmp_path, workers, count):
    rows = kill("random", export, {**options, "shard_notes": 1}, tmp_path, count, workers=workers)
    assert len(rows) == count
    killed = [(committed, reused) for where, committed, reused in rows if where == "killed"]
    assert len(killed) > count / 2
    assert all(reused in (committed, 0) for committed, reused in killed)
    assert sum(0 < reused < 14 for _, reused in killed) > count / 5, rows
