"""No test reaches the network, uses more than one core, or leaves the hub on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"
for _variable in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_EVALUATE_OFFLINE", "DO_NOT_TRACK"):
    os.environ[_variable] = "1"
for _variable in ("CLINICAL_NLP_DATA", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(_variable, None)
# Subprocesses of the tests get the same wall, through a sitecustomize that Python imports before anything else.
_WALL = Path(__file__).parent / "wall"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_WALL), os.environ.get("PYTHONPATH", "")]))

import sys  # noqa: E402

import pytest  # noqa: E402

sys.path.insert(0, str(_WALL))
import network_wall  # noqa: E402

network_wall.build()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def _environment_as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a test, or the command line run in this process, does to the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def files_holding() -> Callable[[str | bytes, Path], list[Path]]:
    """Return a function that lists the files below a folder which hold a marker, in their bytes or their names."""

    def search(marker: str | bytes, folder: Path) -> list[Path]:
        needle = marker.encode() if isinstance(marker, str) else marker
        # UTF-16 is how a memory dump or an Arrow-less Windows tool would hold it.
        needles = {needle, needle.decode("utf-8", "surrogateescape").encode("utf-16-le", "surrogatepass")}
        found = []
        for path in sorted(folder.rglob("*")):
            if needle in os.fsencode(path.name) or (
                path.is_file() and not path.is_symlink() and any(part in path.read_bytes() for part in needles)
            ):
                found.append(path)
        return found

    return search
