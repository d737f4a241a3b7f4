"""SIGKILL at every rename, and at random times, then resume: the same bytes as without."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import tree

from clinical_nlp.extraction import extract

# One process imports everything and forks a child for each kill point, before any library has started a thread.
SWEEP = """
import json, os, signal, sys
from pathlib import Path
import duckdb, pyarrow.parquet
import clinical_nlp.extraction.outputs, clinical_nlp.extraction.engines.local, clinical_nlp.language.mentions
import clinical_nlp.notes.readers.text
from clinical_nlp.extraction import extract

source, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr)
            os._exit(1)
    return os.waitpid(pid, 0)[1]

# A kill after one rename is the kill before the next, with its temporary file not yet in place.
def dying(output, point):
    replace, count = os.replace, 0
    def counted(*arguments):
        nonlocal count
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)
    os.replace = counted
    extract(source, output=output, **options)

points = 0
while True:
    output = folder / str(points)
    status = child(lambda: dying(output, points + 1))
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
    assert child(lambda: extract(source, output=output, resume=True, **options)) == 0, points
    points += 1
print(points)
"""


def test_killed_at_every_rename(export, options, tmp_path):
    options = {**options, "terminology": str(options["terminology"]), "shard_notes": 8}
    extract(export, output=tmp_path / "whole", **options)
    (tmp_path / "killed").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, str(export), str(tmp_path / "killed"), json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    points = int(done.stdout)
    # Plan, three files a shard and one of rejected, two outputs a shard, id map, patients, packets, ledger, manifest.
    assert points >= 1 + 3 * 2 + 1 + 2 * 2 + 1 + 1 + 6 + 1 + 1
    whole = tree(tmp_path / "whole")
    for point in range(points):
        assert tree(tmp_path / "killed" / str(point)) == whole, f"killed at boundary {point}"


RUN = """
import json, sys
from clinical_nlp.extraction import extract
extract(sys.argv[1], output=sys.argv[2], resume=sys.argv[4] == "resume", **json.loads(sys.argv[3]))
"""


@pytest.mark.slow
def test_killed_at_random_times_with_workers(export, options, tmp_path):
    options = {**options, "terminology": str(options["terminology"]), "workers": 2, "shard_notes": 1}
    command = [sys.executable, "-c", RUN, str(export)]
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole"), json.dumps(options), ""], check=True)
    lasts = time.monotonic() - began
    whole = tree(tmp_path / "whole")
    generator = random.Random(0)
    for round_ in range(5):
        output = tmp_path / str(round_)
        for _ in range(2):
            process = subprocess.Popen(
                [*command, str(output), json.dumps(options), "resume" if output.exists() else ""],
                stderr=subprocess.DEVNULL,
            )
            time.sleep(generator.uniform(0.3, 1.0) * lasts)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        if not (output / "manifest.json").exists():
            subprocess.run([*command, str(output), json.dumps(options), "resume"], check=True)
        assert tree(output) == whole, f"round {round_}"
