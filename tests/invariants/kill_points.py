"""Kill training at random moments and resume it; run by test_kill.py in a process of its own.

    python kill_points.py MODEL FOLDER POINTS SEED

The libraries are imported once; each training runs in a fork, which is killed with SIGKILL and begun again.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from tiny_training import fit, tagging

LAST = "checkpoints/checkpoint-12/trainable.safetensors"


def train_in_fork(model: str, run: Path, *, resume: bool) -> int:
    """Start a training and return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(run.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        fit(run, model, resume=resume, save_steps=2, max_steps=12)
        status = 0
    finally:
        os._exit(status)


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has used; unlike wall time, other work does not stretch it."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Print one line a point: the share of the work after which it was killed, and whether the weights are the same."""
    model, folder, points, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    tagging(model)  # imports what a training needs, once for all forks
    from transformers import Trainer

    assert Trainer
    child = train_in_fork(model, folder / "whole", resume=False)
    usage = os.wait4(child, 0)[2]
    whole = usage.ru_utime + usage.ru_stime
    wanted = (folder / "whole" / LAST).read_bytes()
    rng = random.Random(seed)
    for point in range(points):
        run = folder / f"run{point}"
        share = 0.1 + 0.9 * (point + rng.random()) / points
        child = train_in_fork(model, run, resume=False)
        # Every second point is after the first checkpoint, however the machine divided its time.
        late = point % 2 == 1
        while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) and (
            processor_seconds(child) < share * whole or (late and not any(run.glob("checkpoints/checkpoint-*")))
        ):
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps = sorted(int(path.name.partition("-")[2]) for path in (run / "checkpoints").glob("checkpoint-*"))
        if not (run / "manifest.json").is_file():
            os.waitpid(train_in_fork(model, run, resume=(run / "config.yaml").is_file()), 0)
        same = (run / "manifest.json").is_file() and (run / LAST).read_bytes() == wanted
        print(f"{share:.2f} {steps[-1] if steps else 0} {'same' if same else 'different'}", flush=True)
        shutil.rmtree(run, ignore_errors=True)


if __name__ == "__main__":
    main()
