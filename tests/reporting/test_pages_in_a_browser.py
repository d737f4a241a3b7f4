"""Pages of the suites in headless Chromium: no console message, nothing fetched, nothing wider than a phone."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest

from clinical_nlp.config import load_config
from clinical_nlp.eval import calibration, debiasing

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Headless Chromium makes no window narrower than 500, so the document is made 400 wide; how far right anything reaches
# that does not scroll by itself is put into the title. For a copy of the page whose policy allows scripts.
_WIDTH = """<style>html { width: 400px; }</style><script>
const all = [...document.querySelectorAll('main, main *')].filter(one => !one.closest('.scroll > *, svg *'));
document.title = 'reaches ' + Math.ceil(Math.max(...all.map(one => one.getBoundingClientRect().right)));
</script>"""


def browse(page, folder):
    """Open a file 400 pixels wide; return the document and what the console said."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--window-size=400,900",
         "--virtual-time-budget=1000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    lines = ["patient_id,institution,probability,gold"]
    for number in range(120):
        p = rng.random()
        lines.append(f"p{number},a hospital of a rather long name number {number % 3},{p},{int(rng.random() < p)}")
    (root / "p.csv").write_text("\n".join(lines), "utf-8")
    config = load_config(calibration.CONFIG, None, {"predictions": str(root / "p.csv")})
    made = [calibration.run(config, root / "calibration")]
    small = {"n_permutations": 19, "n_orders": 1, "dimensions": 8, "probes": ["linear", "quadratic"]}
    options = {"corpus.options": {"institutions": 3, "patients": 24}}
    made.append(debiasing.run(load_config(debiasing.CONFIG, None, {**small, **options}), root / "debiasing"))
    return [run.path / "report.html" for run in made]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_pages_say_nothing_to_the_console_and_fetch_nothing(pages, tmp_path):
    control = tmp_path / "control.html"
    control.write_text(pages[0].read_text("utf-8").replace("</main>", '<img src="http://192.0.2.1/a.png"></main>'))
    assert browse(control, tmp_path)[1], "an image from elsewhere must be refused, and the refusal seen"
    for page in pages:
        document, said = browse(page, tmp_path)
        assert not said, page
        assert "<h1>" in document
        assert not re.search(r"""(src|href|action)\s*=|url\(|@import""", document), page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_pages_are_no_wider_than_a_phone(pages, tmp_path):
    def reaches(text):
        copy = tmp_path / "copy.html"
        text = text.replace("default-src 'none'; style-src 'unsafe-inline'", "")
        copy.write_text(text.replace("</body>", f"{_WIDTH}</body>"), "utf-8")
        return int(re.search(r"<title>reaches (\d+)</title>", browse(copy, tmp_path)[0])[1])

    wide = '<div style="width: 700px"></div></main>'
    assert reaches(pages[0].read_text("utf-8").replace("</main>", wide)) > 700
    for page in pages:
        found = reaches(page.read_text("utf-8"))
        assert 300 < found <= 400, page
