"""The model card of a run, and the facts of its manifest and metrics as rows."""

from __future__ import annotations

from typing import Any

import yaml

from clinical_nlp.reporting.page import interval, template
from clinical_nlp.reporting.plots import number
from clinical_nlp.runs import Run


def model_card(run: Run) -> str:
    """Render the model card (Markdown with the front matter that model hubs read)."""
    base = run.manifest.get("base_model")
    return template("model_card.md").render(
        recipe=str(run.manifest.get("recipe")),
        title=run.path.name,
        base_model=base.get("name") if isinstance(base, dict) else base,
        phi=phi_text(run),
        origin=origin(run),
        metrics=[[str(cell).replace("|", "\\|") for cell in row] for row in metric_rows(run, words=True)],
        weights="Weights trained on notes can reproduce them. Share them as you would share the notes."
        if run.manifest.get("outputs_contain_phi", True)
        else "It was trained on no patient's notes.",
        making=making(run),
        config=yaml.safe_dump(run.manifest.get("config", {}), sort_keys=False, allow_unicode=True),
    )


def metric_rows(run: Run, *, words: bool = False) -> list[list[Any]]:
    """One row a metric: name, value, interval, patients, notes, part, remark."""
    rows = []
    for name, entry in run.metrics.items():
        value = entry.get("value")
        rows.append(
            [
                name,
                number(value) if words else value,
                interval(entry.get("low"), entry.get("high")),
                entry.get("n_patients", ""),
                entry.get("n_notes", ""),
                entry.get("part", ""),
                entry.get("note", ""),
            ]
        )
    return rows


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    return str(value)


def origin(run: Run) -> list[tuple[str, str]]:
    """What the run was made from."""
    manifest = run.manifest
    rows = [("base model", _words(manifest["base_model"]))] if manifest.get("base_model") else []
    rows += [("parent run", _words(manifest["parent_run"]))] if manifest.get("parent_run") else []
    inputs = manifest.get("inputs") or {}
    rows += [(f"input {name}", _words(value)) for name, value in list(inputs.items())[:20]]
    if len(inputs) > 20:
        rows.append(("further inputs", f"{len(inputs) - 20}, listed in manifest.json"))
    return rows or [("inputs", "none recorded")]


def making(run: Run) -> list[tuple[str, str]]:
    """How the run was made."""
    manifest = run.manifest
    kept = ("seed", "duration_seconds", "finished_at", "tokens", "steps", "hardware", "packages")
    return [(key.replace("_", " "), _words(manifest[key])) for key in kept if manifest.get(key) is not None]


def phi_text(run: Run) -> str:
    """Say whether the run's files hold note text."""
    if run.manifest.get("outputs_contain_phi", True):
        return "Its files may hold or reproduce note text: keep them where the notes may be."
    return "Its files hold no note text."
