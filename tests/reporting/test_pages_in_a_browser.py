"""Pages in headless Chromium: no console message, nothing fetched, nothing wider than a phone or than paper."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from tiny_models import write_encoder

from clinical_nlp.config import load_config
from clinical_nlp.eval import calibration, cross_institution, debiasing, sparsity
from clinical_nlp.recipes import coding, drift

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = ("calibration", "debiasing", "drift", "drift_over_time", "too_few", "cross_institution", "sparsity")
PHONE, PAPER = 400, 718
"""Pixels; paper is A4 with margins of 1 cm at 96 a inch."""
# Headless Chromium makes no window narrower than 500, so the document is made that wide; how far right anything reaches
# that does not scroll by itself is put into the title. For a copy of the page whose policy allows scripts.
_WIDTH = """<style>html { width: %dpx; }</style><script>
const all = [...document.querySelectorAll('main, main *')].filter(one => !one.closest('%s'));
document.title = 'reaches ' + Math.ceil(Math.max(...all.map(one => one.getBoundingClientRect().right)));
</script>"""


def browse(page, folder, *, width=400):
    """Open a file; return the document and what the console said."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", f"--window-size={width},900",
         "--virtual-time-budget=1000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def export(folder, styles, *, patients=14):
    """A table of notes of a hospital of a rather long name: (name, year, share of another style)."""
    generator = np.random.default_rng(0)
    with (folder / "notes.jsonl").open("w") as file:
        for place, year, style in styles:
            for patient in range(patients if style < 2 else 3):
                for number in range(2):
                    words = generator.choice(["no distress", "denies pain", "lungs clear", "stable"], 12).tolist()
                    lead = "IMPRESSION:\nsee ___\n- " if generator.random() < style else ""
                    row = {"note_id": f"{place}{year}{patient}-{number}", "patient_id": f"{place}{year}{patient}",
                           "institution": f"a hospital of a rather long name, {place}", "note_type": "discharge",
                           "text": lead + ". ".join(words), "written_at": f"{year}-0{1 + number}-15"}  # fmt: skip
                    file.write(json.dumps(row) + "\n")
    return str(folder / "notes.jsonl")


def made(name, root):
    """Make one page as a user would, small."""
    folder = root / name
    folder.mkdir()
    if name == "calibration":
        rng = np.random.default_rng(0)
        lines = ["patient_id,institution,probability,gold"]
        for number in range(120):
            p = rng.random()
            lines.append(f"p{number},a hospital of a rather long name number {number % 3},{p},{int(rng.random() < p)}")
        (folder / "p.csv").write_text("\n".join(lines), "utf-8")
        config = load_config(calibration.CONFIG, None, {"predictions": str(folder / "p.csv")})
        return calibration.run(config, folder / "run")
    if name == "debiasing":
        small = {"n_permutations": 19, "n_orders": 1, "dimensions": 8, "probes": ["linear", "quadratic"]}
        options = {"corpus.options": {"institutions": 3, "patients": 24}}
        return debiasing.run(load_config(debiasing.CONFIG, None, {**small, **options}), folder / "run")
    if name == "cross_institution":
        small = {
            "corpus.options": {"institutions": 3, "patients": 24, "spurious": [0.9, 0.8, 0.1]},
            "features.steps": 10, "features.components": 8, "weights": [1.0], "objectives": ["dann", "mmd"],
            "few_labels": [5], "n_seeds": 2, "n_resamples": 200, "n_permutations": 99,
        }  # fmt: skip
        return cross_institution.run(load_config(cross_institution.CONFIG, None, small), folder / "run")
    if name == "sparsity":
        values = {
            "corpus.options": {"institutions": 1, "patients": 80}, "base_model": str(write_encoder(folder / "encoder")),
            "strategy.name": "full", "max_steps": 4, "chunk": 64, "max_tokens": 256, "training.batch_size": 4,
            "baselines": [],
        }  # fmt: skip
        coded = coding.run(load_config(coding.CONFIG, None, values), folder / "coded")
        config = load_config(sparsity.CONFIG, None, {"run": str(coded.path), "shares": [0.5]})
        return sparsity.run(config, folder / "run")
    styles = [("a", 2019, 0.0), ("b", 2019, 0.9), ("c", 2019, 0.0)]
    if name == "drift_over_time":
        styles = [("a", year, 0.9 * (year > 2020)) for year in range(2018, 2023)]
    elif name == "too_few":
        styles = [("a", 2019, 0.0), ("b", 2019, 2.0)]
    window = "year" if name == "drift_over_time" else "none"
    config = drift.DriftConfig(sources=[export(folder, styles)], window=window, n_permutations=99)
    return drift.run(config, folder / "run")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    root = tmp_path_factory.mktemp("pages")
    return {name: made(name, root).path / "report.html" for name in NAMES}


def reaches(text, folder, width, *, paper=False):
    """How far right the page reaches in pixels: as on a screen, or as printed, where nothing can be scrolled."""
    copy = folder / "copy.html"
    text = text.replace("default-src 'none'; style-src 'unsafe-inline'", "")
    if paper:
        assert "@media print" in text
        text = text.replace("@media print", "@media all").replace("@media screen", "@media speech")
    outside = "svg *" if paper else ".scroll > *"
    copy.write_text(text.replace("</body>", f"{_WIDTH % (width, outside)}</body>"), "utf-8")
    return int(re.search(r"<title>reaches (\d+)</title>", browse(copy, folder, width=width)[0])[1])


def test_the_checks_see_what_they_are_for(pages, tmp_path):
    page = pages["calibration"].read_text("utf-8")
    control = tmp_path / "control.html"
    control.write_text(page.replace("</main>", '<img src="http://192.0.2.1/a.png"></main>'), "utf-8")
    assert browse(control, tmp_path)[1], "an image from elsewhere must be refused, and the refusal seen"
    wide = page.replace("</main>", '<div style="width: 900px"></div></main>')
    assert reaches(wide, tmp_path, PHONE) >= 900
    table = '<div class="scroll"><div style="width: 900px"></div></div></main>'
    assert reaches(page.replace("</main>", table), tmp_path, PHONE) <= PHONE
    assert reaches(page.replace("</main>", table), tmp_path, PAPER, paper=True) >= 900


@pytest.mark.parametrize("name", NAMES)
def test_the_console_is_silent_and_nothing_is_fetched(pages, name, tmp_path):
    document, said = browse(pages[name], tmp_path)
    assert not said
    assert "<h1>" in document
    assert "For judging this evaluation" in document
    assert not re.search(r"""(src|href|action)\s*=|url\(|@import""", document)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wider_than_a_phone_or_than_paper(pages, name, tmp_path):
    text = pages[name].read_text("utf-8")
    assert 300 < reaches(text, tmp_path, PHONE) <= PHONE
    assert 600 < reaches(text, tmp_path, PAPER, paper=True) <= PAPER


@pytest.mark.parametrize("name", NAMES)
def test_it_prints(pages, name, tmp_path):
    file = tmp_path / "page.pdf"
    subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--no-pdf-header-footer",
         f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={file}", pages[name].as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    content = file.read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 2


def test_what_the_pages_say(pages):
    def words(name):
        return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", pages[name].read_text("utf-8").partition("<main>")[2]))

    assert "the notes differ" in words("drift")
    assert "no difference found" in words("drift")
    assert "too few patients to tell" in words("too_few")
    assert "in each institution would find it with 80 %" in words("too_few")
    assert "p, counted per year" in words("drift_over_time")
    assert "alarm" in words("drift_over_time")
    assert "Without a part of the text" in words("sparsity")
    assert "Each institution on each other" in words("cross_institution")
