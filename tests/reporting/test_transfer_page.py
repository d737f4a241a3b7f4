"""The page of the suite `transfer` says in words what its numbers show, whichever of them there are."""

from __future__ import annotations

import copy
import re

import pytest

from clinical_nlp.reporting.page import Section, Text
from clinical_nlp.reporting.transfer_page import transfer_page

JUDGING = Section("For judging", [Text("asked for")])


def entry(value, low=None, high=None, note="", protocol="strict micro-F1", **more):
    return {
        "value": value,
        "low": low,
        "high": high,
        "n_patients": 30,
        "n_notes": 60,
        "part": "test",
        "note": note,
        "protocol": protocol,
        "split": "random split by patient",
        "selection": "end of training",
        **more,
    }


def found(comparison, state, *numbers, reason=""):
    return {"comparison": comparison, "state": state, "numbers": list(numbers), "reason": reason}


def verdict(state, *findings, rule="Rule in words."):
    return {"state": state, "findings": list(findings), "rule": rule}


RESULTS = {
    "run": {
        "path": "runs/ner",
        "recipe": "ner",
        "base_model": "runs/dapt",
        "strategy": "lora",
        "corpus": "made here",
        "labels": ["problem"],
        "score": 0.61,
    },
    "protocol": {
        "split": "random split by patient",
        "selection": "end of training",
        "seed": 0,
        "metric": "strict micro-F1",
        "limits": "every training as long as the run's own",
        "margins": {"perplexity": 0.05, "task": 0.02, "transfer": 0.0, "gap": 0.05, "labels": 0.01},
        "notes_verified": True,
    },
    "verdicts": {
        "forgetting": verdict(
            "problem",
            found(
                "perplexity",
                "problem",
                *(f"forgetting.perplexity_{key}" for key in ("before", "after", "ratio")),
            ),
            found("task", "not measured", reason="there is no earlier task"),
            rule="Above {perplexity_percent:g} %.",
        ),
        "negative_transfer": verdict(
            "problem",
            found(
                "without_dapt",
                "problem",
                "negative_transfer.without_dapt.f1_strict",
                "negative_transfer.without_dapt.difference",
            ),
            found("head", "not measured", reason="it <b>failed</b>"),
        ),
        "overfitting": verdict(
            "not shown", found("train", "not shown", "overfitting.train", "overfitting.new", "overfitting.gap_train")
        ),
        "learning_curve": verdict(
            "no problem",
            found("last_step", "no problem", "learning_curve.gain_seeds", "learning_curve.gain_patients"),
        ),
    },
    "numbers": {
        "forgetting.perplexity_before": entry(10.0, 9.5, 10.5, protocol="perplexity of held-out source notes"),
        "forgetting.perplexity_after": entry(12.3, 11.0, 13.5, protocol="perplexity of held-out source notes"),
        "forgetting.perplexity_ratio": entry(1.23, 1.15, 1.31, protocol="perplexity of held-out source notes"),
        "negative_transfer.run.f1_strict": entry(0.61, 0.55, 0.66),
        "negative_transfer.without_dapt.f1_strict": entry(0.68, 0.61, 0.73),
        "negative_transfer.without_dapt.difference": entry(0.07, 0.03, 0.11),
        "overfitting.train": entry(1.0, note="every patient scores alike: resampling shows no spread"),
        "overfitting.new": entry(0.61, note="fewer than 20 patients"),
        "overfitting.gap_train": entry(0.39, note="test: fewer than 20 patients"),
        "learning_curve.50": entry(0.6, 0.58, 0.62, n_training_patients=20, scores=[0.59, 0.61]),
        "learning_curve.100": entry(0.605, 0.6, 0.61, n_training_patients=40, scores=[0.6, None]),
        "learning_curve.gain_seeds": entry(0.005, 0.001, 0.009),
        "learning_curve.gain_patients": entry(-0.005, -0.012, 0.002),
        "ranking.0.logme": entry(0.7, 0.6, 0.8),
        "ranking.1.logme": entry(0.6, 0.5, 0.7),
        "ranking.2.logme": entry(0.5, 0.4, 0.6),
        "ranking.0.truth": entry(0.61, 0.55, 0.66),
        "ranking.1.truth": entry(0.68, 0.61, 0.73),
        "ranking.2.truth": entry(0.2, 0.1, 0.3),
        "ranking.logme.regret": entry(0.07, 0.03, 0.11),
    },
    "trainings": [
        {
            "name": "without_dapt",
            "base_model": "builtin:tiny",
            "strategy": "lora",
            "seed": 0,
            "n_training_patients": 40,
            "steps": 30,
            "reason": "",
        }
    ],
    "ranking": {
        "truth": "run",
        "candidates": [
            {"name": "runs/dapt", "arm": "reference", "random": False, "reasons": {"leep": "it has no head"}},
            {"name": "builtin:tiny", "arm": "without_dapt", "random": False, "reasons": {"leep": "it has no head"}},
            {"name": "x/random_model", "arm": "random", "random": True, "reasons": {"leep": "it has no head"}},
        ],
        "agreement": [{"score": "logme", "n_candidates": 3, "tau": 0.33, "smallest_p": 1 / 3, "chosen": 0, "best": 1}],
    },
}


def words(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_the_page_begins_with_what_is_a_problem_each_with_figure_interval_and_rule():
    text = words(transfer_page(RESULTS, JUDGING))
    begin = text[text.index("What is a problem") : text.index("Forgetting: what was measured")]
    for shown in (
        "A problem: forgetting, negative transfer. Not shown either way: overfitting. No problem within the margin: ",
        "Forgetting: a problem",
        "Perplexity of source notes 10.0 before and 12.3 after: +23.0 % (+15.0 % to +31.0 %), 30 patients.",
        "Source task: not measured, because there is no earlier task.",
        "Forgetting Above 5 %.",
        "Negative transfer: a problem",
        "The same training without dapt: F1 0.680 where the run has 0.610; 0.0700 better than the run (0.0300 to ",
        "Overfitting: not shown either way",
        "0.390 lower (no interval: test: fewer than 20 patients)",
        "Too few labels: no problem within the margin",
        "F1 0.00500 gained (0.00100 to 0.00900) over seeds, 0.00500 lost (−0.00200 to 0.0120) over 30 patients",
    ):
        assert shown in begin, shown


def test_three_candidates_are_said_to_show_nothing_and_a_wrong_choice_is_priced():
    text = words(transfer_page(RESULTS, JUDGING))
    assert "LogME puts runs/dapt first; after training builtin:tiny scored best, 0.0700 more (0.0300 to 0.110)" in text
    assert "With 3 candidates chance alone gives a perfect order in 17 of 100 cases" in text
    assert text.count("LEEP is not measured, because it has no head (runs/dapt, builtin:tiny, random weights).") == 1


def test_nothing_is_loaded_and_everything_is_escaped():
    html = transfer_page(RESULTS, JUDGING)
    assert "<b>failed" not in html
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<link|<script""", html)


@pytest.mark.parametrize("value", [None, 0.0])
def test_a_run_that_learnt_nothing_is_told_first(value):
    results = copy.deepcopy(RESULTS)
    assert "has learnt nothing" not in words(transfer_page(results, JUDGING))
    results["run"]["score"] = value
    assert words(transfer_page(results, JUDGING)).index("has learnt nothing") < words(
        transfer_page(results, JUDGING)
    ).index("Forgetting")


def test_the_page_of_nothing_measured_and_of_undefined_figures():
    results = copy.deepcopy(RESULTS)
    for part in results["verdicts"]:
        results["verdicts"][part] = verdict("not measured", found("", "not measured", reason="it was left out"))
    results |= {"numbers": {}, "trainings": [], "ranking": None}
    text = words(transfer_page(results, JUDGING))
    assert text.count("not measured, because it was left out") == 0
    assert text.count("Not measured, because it was left out.") == 4
    assert "Nothing was trained again." in text
    assert "what was measured" not in text
    results = copy.deepcopy(RESULTS)
    for number in results["numbers"].values():
        number |= {"value": None, "low": None, "high": None, "note": "undefined: nothing to count"}
    results["ranking"]["agreement"][0]["tau"] = None
    assert "undefined" in words(transfer_page(results, JUDGING))


def test_a_dapt_run_is_told_in_perplexity():
    results = copy.deepcopy(RESULTS)
    results["run"] |= {"recipe": "dapt", "score": None}
    results["verdicts"]["overfitting"]["rule"] = "Above {gap:g}."
    results["numbers"]["overfitting.gap_train"] = entry(1.07, 1.02, 1.12, protocol="pseudo-perplexity of the run")
    results["numbers"]["overfitting.train"] = entry(8.0, 7.5, 8.5, protocol="pseudo-perplexity of the run")
    text = words(transfer_page(results, JUDGING))
    assert "learnt nothing" not in text
    assert "Pseudo-perplexity is 8.00 on training" in text
    assert "after / before is 1.07 times as high on new as on training patients" in text
    assert "Forgetting Above 5 %." in text
