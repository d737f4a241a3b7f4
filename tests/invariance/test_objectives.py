"""Objectives in real training: nothing at weight 0, the same after a resume, under every strategy, or refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_models import write_decoder
from tiny_training import Empty, tagging

from clinical_nlp.adaptation.strategies import StrategyConfig
from clinical_nlp.config import CorpusConfig
from clinical_nlp.errors import ConfigError, InputError, ModelError, TooFewPatientsError
from clinical_nlp.invariance import OBJECTIVES
from clinical_nlp.invariance.attachment import MarkedExamples, attach_objective, read_target
from clinical_nlp.invariance.losses import reversal_strength
from clinical_nlp.invariance.objectives import (
    LARGEST_OUTER,
    NEEDS,
    ObjectiveConfig,
    build_objective,
    check_objective,
)
from clinical_nlp.runs import Run
from clinical_nlp.tasks import ner
from clinical_nlp.training import checkpoints
from clinical_nlp.training.trainer import EpochBatches, TrainingConfig, train, trainable_state

WITHOUT_GOLD = ("mcd", "self_training")
"""Objectives that learn from notes without gold and from nothing else."""
NAMES = sorted({*NEEDS} - {*WITHOUT_GOLD})


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("decoder"))


def fit(
    output,
    model,
    objective=None,
    *,
    strategy="lora",
    resume=False,
    institutions=2,
    max_steps=6,
    blank=False,
    **settings,
):
    """Train a tagger on twelve notes of six patients in two institutions; return weights, without the objective's.

    `blank` takes the gold of the second institution away.
    """
    base, tagger, windows = tagging(model, strategy)
    if blank:
        windows = [
            replace(window, labels=[-100] * len(window.labels)) if window.note % 2 else window for window in windows
        ]
    config = TrainingConfig(**{"epochs": 6, "batch_size": 4, "learning_rate": 1e-3, "save_steps": 3, **settings})
    collate = partial(ner.collate, pad_token_id=0)
    examples, terms, attached = windows, [], None
    if objective is not None:
        where = [f"hospital {window.note % institutions}" for window in windows]
        examples = MarkedExamples(windows, where, [str(window.note // 4) for window in windows])
        attached = attach_objective(tagger, objective, examples, task="ner", batch_size=config.batch_size, seed=0)
        terms, collate = [attached.term], MarkedExamples.collate(collate)
    with Run.open(output, Empty(), recipe="test", resume=resume) as run:
        train(
            tagger,
            examples,
            collate,
            config=config,
            run=run,
            seed=0,
            lengths=[len(window.input_ids) for window in windows],
            tokenizer=base.tokenizer,
            strategy=StrategyConfig(name=strategy, rank=4),
            head="head",
            max_steps=max_steps,
            resume=resume,
            terms=terms,
            objective=None if attached is None else attached.module,
            balance=None if attached is None else attached.balance,
        )
    whole = trainable_state(tagger)
    own = {name for name in whole if name.startswith("objective.")}
    return {name: value for name, value in whole.items() if name not in own}, {name: whole[name] for name in own}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def of(name, **settings):
    level = "token" if name in ("cdan", "mcd") else settings.pop("level", "pooled")
    return ObjectiveConfig(name=name, level=level, **settings)


def test_every_objective_is_listed():
    assert {*OBJECTIVES} == {"erm", *NEEDS}


@pytest.fixture(scope="module")
def erm(tmp_path_factory, decoder):
    return fit(tmp_path_factory.mktemp("erm") / "run", decoder)[0]


@pytest.mark.parametrize("name", NAMES)
def test_with_weight_0_every_objective_is_erm_bit_for_bit(tmp_path, decoder, erm, name):
    # Attached all the same, so that it is the penalty that must be nothing; drawn alike, as the recipes do at weight 0.
    found, _ = fit(tmp_path / "a", decoder, of(name, weight=0.0, balanced=False))
    assert same(found, erm)


@pytest.mark.parametrize("name", NAMES)
def test_with_weight_1_it_is_not(tmp_path, decoder, erm, name):
    found, _ = fit(tmp_path / "a", decoder, of(name, weight=1.0))
    assert not same(found, erm)
    without, _ = fit(tmp_path / "b", decoder, of(name, weight=0.0))
    assert not same(found, without)
    assert all(torch.isfinite(value).all() for value in found.values())


class Killed(Exception):
    """Stands for the process dying."""


@pytest.mark.parametrize(
    ("name", "strategy"), [*((name, "lora") for name in NAMES), ("dann", "qlora"), ("dann", "full")]
)
def test_a_resumed_training_equals_the_uninterrupted_one(tmp_path, decoder, monkeypatch, name, strategy):
    straight = fit(tmp_path / "a", decoder, of(name), strategy=strategy)
    whole = checkpoints.seal

    def seal(folder):
        whole(folder)
        if folder.name == "checkpoint-3":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "seal", seal)
        with pytest.raises(Killed):
            fit(tmp_path / "b", decoder, of(name), strategy=strategy)
    resumed = fit(tmp_path / "b", decoder, of(name), strategy=strategy, resume=True)
    assert same(straight[0], resumed[0])
    assert same(straight[1], resumed[1])
    assert bool(straight[1]) == (name in ("dann", "cdan", "group_dro"))


@pytest.mark.parametrize("strategy", ["lp_ft", "gradual", "full", "lora", "dora", "qlora", "bottleneck", "ia3"])
@pytest.mark.parametrize("name", ["dann", "irm"])
def test_it_trains_under_every_strategy(tmp_path, decoder, name, strategy):
    with_it, _ = fit(tmp_path / "a", decoder, of(name, balanced=False), strategy=strategy)
    without, _ = fit(tmp_path / "b", decoder, strategy=strategy)
    assert with_it.keys() == without.keys()
    assert not same(with_it, without)


@pytest.mark.parametrize("name", WITHOUT_GOLD)
def test_what_learns_from_notes_without_gold_moves_the_model_and_resumes(tmp_path, decoder, monkeypatch, name):
    erm, _ = fit(tmp_path / "erm", decoder, blank=True)
    nothing, _ = fit(tmp_path / "nothing", decoder, of(name, weight=0.0, balanced=False), blank=True)
    assert same(nothing, erm)
    straight = fit(tmp_path / "a", decoder, of(name, balanced=False), blank=True)
    assert not same(straight[0], erm)
    assert bool(straight[1]) == (name == "mcd")
    fit(tmp_path / "b", decoder, of(name, balanced=False), blank=True)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "checkpoint-6")
    (tmp_path / "b" / "manifest.json").unlink()
    resumed = fit(tmp_path / "b", decoder, of(name, balanced=False), blank=True, resume=True)
    assert same(straight[0], resumed[0])
    assert same(straight[1], resumed[1])


def test_the_heads_of_mcd_part_where_there_is_no_gold_and_the_state_closes_the_gap():
    module = build_objective(of("mcd", weight=1.0), institutions="ab", patients=[4, 4], width=3, n_classes=2, seed=1)
    module.n_steps = 10
    state = torch.randn(6, 3, requires_grad=True)
    label = torch.full((6,), -100)
    module.penalty(state, torch.arange(6) % 2, label, 5).backward()
    plain = state.detach().clone().requires_grad_(True)
    first, second = (torch.softmax(head(plain), -1) for head in module.heads)
    asked = [plain, *module.parameters()]
    slopes = torch.autograd.grad((first - second).abs().mean(), asked)
    assert torch.allclose(state.grad, reversal_strength(0.5) * slopes[0], atol=1e-7)
    for value, slope in zip(module.parameters(), slopes[1:], strict=True):
        assert torch.allclose(value.grad, -slope, atol=1e-7)
    module.zero_grad()
    gold = torch.tensor([0, 1, 0, 1, 0, 1])
    found = module.penalty(state, torch.arange(6) % 2, gold, 5)
    wanted = sum(torch.nn.functional.cross_entropy(head(state), gold) for head in module.heads)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_self_training_takes_the_surest_share_of_each_label():
    module = build_objective(of("self_training", warmup=0.0), institutions="ab", patients=[4, 4], width=2, n_classes=2)
    margin = torch.tensor([4.0, 3.0, 2.0, 1.0, -0.2, -0.1, 9.0])
    logits = torch.stack([margin, torch.zeros(7)], 1).requires_grad_(True)
    label = torch.tensor([-100, -100, -100, -100, -100, -100, 0])
    module.penalty(torch.zeros(7, 2), torch.arange(7) % 2, label, 0, logits=logits).backward()
    assert logits.grad.abs().sum(1).gt(0).tolist() == [True, True, False, False, True, False, False]
    several = build_objective(
        of("self_training", warmup=0.0, share=0.25), institutions="ab", patients=[4, 4], width=2, n_classes=2,
        several_labels=True,
    )  # fmt: skip
    logits = torch.tensor([[3.0, -3.0], [1.0, -1.0], [2.0, -2.0], [0.5, -5.0]], requires_grad=True)
    several.penalty(torch.zeros(4, 2), torch.arange(4) % 2, torch.full((4, 2), -100.0), 0, logits=logits).backward()
    assert logits.grad.ne(0).tolist() == [[True, False], [False, False], [False, False], [False, True]]


def test_weights_of_group_dro_follow_the_risks_and_are_in_the_checkpoint(tmp_path, decoder):
    from safetensors.torch import load_file

    _, own = fit(tmp_path / "a", decoder, of("group_dro", adaptation_rate=0.5))
    shares = own["objective.log_share"].exp()
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float((shares[0] - shares[1]).abs()) > 1e-4
    saved = load_file(tmp_path / "a" / "checkpoints" / "checkpoint-6" / "trainable.safetensors")
    assert torch.equal(saved["objective.log_share"], own["objective.log_share"])


def test_group_dro_with_weight_1_is_the_weighted_risk_and_nothing_else():
    module = build_objective(of("group_dro", weight=1.0), institutions="ab", patients=[3, 3], width=2, n_classes=2)
    each = torch.tensor([1.0, 2.0, 6.0])
    given = {"institution": torch.tensor([0, 0, 1]), "label": torch.zeros(3, dtype=torch.long), "step": 0}
    penalty = module.penalty(torch.zeros(3, 2), **given, logits=torch.zeros(3, 2), losses=lambda z: each + z.sum(1))
    shares = module.log_share.detach().exp()
    assert float(each.mean() + penalty.detach()) == pytest.approx(float(shares[0] * 1.5 + shares[1] * 6.0), rel=1e-6)


def two_hospitals(seed, n=128):
    """States whose first axis tells the institution, whose second the label."""
    generator = torch.Generator().manual_seed(seed)
    institution, label = torch.arange(n) % 2, (torch.arange(n) // 2) % 2
    state = torch.randn(n, 6, generator=generator) * 0.3
    state[:, 0] += 1.5 * institution
    state[:, 1] += 2.0 * label
    return state, institution, label


def learn(module, steps=250):
    """Learn the label from a linear map with a little noise after it; return accuracy and that of a fresh probe."""
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(0)
    body, head = torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)
    torch.nn.init.eye_(body.weight)

    def read(state):  # without noise any map that can be inverted hides nothing from a linear probe
        return body(state) + 0.5 * torch.randn(state.shape)

    own = [] if module is None else list(module.parameters())
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters(), *own], lr=0.01)
    for step in range(steps):
        state, institution, label = two_hospitals(step)
        seen = read(state)
        logits = head(seen)
        loss = torch.nn.functional.cross_entropy(logits, label)
        if module is not None:
            module.n_steps = steps
            loss = loss + module.penalty(seen, institution, label, step, logits=logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (state, institution, label), (fresh, other, _) = two_hospitals(9999, 800), two_hospitals(8888, 800)
    with torch.no_grad():
        seen, rows = read(state), read(fresh)
    probe = LogisticRegression().fit(rows, other)
    return float((head(seen).argmax(1) == label).float().mean()), probe.score(seen, institution)


def test_without_an_alignment_a_fresh_probe_reads_the_institution():
    accuracy, probed = learn(None)
    assert accuracy > 0.95
    assert probed > 0.85


@pytest.mark.parametrize(
    ("name", "conditional"), [("dann", False), ("dann", True), ("cdan", False), ("mmd", True), ("coral", False)]
)
def test_an_alignment_takes_the_institution_out_of_the_states_and_leaves_the_label(name, conditional):
    module = build_objective(
        of(name, weight=1.0), institutions="ab", patients=[64, 64], width=6, n_classes=2, conditional=conditional
    )
    accuracy, probed = learn(module)
    assert accuracy > 0.95
    assert probed < 0.65


def test_the_outer_product_of_cdan_is_randomised_above_the_limit():
    common = {"institutions": "ab", "patients": [2, 2], "seed": 3}
    small = build_objective(of("cdan"), width=64, n_classes=LARGEST_OUTER // 64, **common)
    large = build_objective(of("cdan"), width=64, n_classes=LARGEST_OUTER // 64 + 1, **common)
    assert small.of_state is None
    assert small.discriminator[0].in_features == LARGEST_OUTER
    assert large.discriminator[0].in_features == 1024
    # The product of projections keeps inner products on average: <T(f,g), T(f',g')> = <f,f'><g,g'>.
    f, g = torch.randn(2, 64), torch.softmax(torch.randn(2, 65), 1)
    joined = large.joined(f.repeat(1, 1), g)
    wanted = (f[0] @ f[0]) * (g[0] @ g[0])
    assert float(joined[0] @ joined[0]) == pytest.approx(float(wanted), rel=0.5)
    state = torch.randn(4, 64, requires_grad=True)
    logits = torch.randn(4, LARGEST_OUTER // 64, requires_grad=True)
    small.n_steps = 2
    small.penalty(state, torch.tensor([0, 1, 0, 1]), None, 1, logits=logits).backward()
    assert state.grad.abs().sum() > 0
    assert logits.grad is None  # predictions are a condition, not a way out


def test_the_penalty_of_a_discriminator_that_knows_nothing_is_1_whatever_the_number_of_institutions():
    for k in (2, 5):
        module = build_objective(of("dann"), institutions="abcde"[:k], patients=[2] * k, width=4, n_classes=2)
        torch.nn.init.zeros_(module.discriminator[-1].weight)
        torch.nn.init.zeros_(module.discriminator[-1].bias)
        penalty = module.penalty(torch.randn(30, 4), torch.arange(30) % k, None, 0)
        assert float(penalty.detach()) == pytest.approx(1.0, rel=1e-5)


def test_examples_that_do_not_count_and_notes_without_gold():
    state = torch.randn(8, 4)
    institution = torch.tensor([0, 1, 0, 1, -1, -1, -1, -1])
    module = build_objective(of("mmd", warmup=0.0), institutions="ab", patients=[4, 4], width=4, n_classes=2)
    assert torch.equal(module.penalty(state, institution, None, 0), module.penalty(state[:4], institution[:4], None, 0))
    within = build_objective(
        of("mmd", warmup=0.0), institutions="ab", patients=[4, 4], width=4, n_classes=2, conditional=True
    )
    label = torch.tensor([0, 0, 0, 0, -100, -100, -100, -100])
    eight = torch.arange(8) % 2
    assert torch.equal(within.penalty(state, eight, label, 0), within.penalty(state[:4], eight[:4], label[:4], 0))
    nobody = within.penalty(state, torch.full((8,), -1), label, 0)
    assert float(nobody) == 0.0
    with pytest.raises(ModelError, match="knows 2 institutions"):
        module.penalty(state, torch.full((8,), 2), None, 0)


# What goes with what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "strategy", "task", "message"),
    [
        ({"name": "dann"}, "head", "ner", "strategy 'head' leaves it as it is"),
        ({"name": "irm", "target": CorpusConfig()}, "lora", "ner", "notes without gold have none"),
        ({"name": "erm", "target": CorpusConfig()}, "lora", "ner", "erm makes nothing"),
        ({"name": "irm", "conditional": True}, "lora", "ner", "not for irm"),
        ({"name": "dann", "level": "token", "conditional": True, "target": CorpusConfig()}, "lora", "ner", "use cdan"),
        ({"name": "dann", "conditional": True}, "lora", "ner", "objective.level=token"),
        ({"name": "cdan"}, "lora", "ner", "objective.level=token"),
        ({"name": "mmd", "conditional": True}, "lora", "coding", "many codes"),
        ({"name": "cdan", "level": "token"}, "lora", "coding", "level=pooled"),
        ({"name": "mcd"}, "lora", "coding", "name them with objective.target"),
        ({"name": "self_training"}, "lora", "ner", "name them with objective.target"),
        ({"name": "mcd", "target": CorpusConfig()}, "lora", "ner", "objective.level=token"),
        ({"name": "mcd", "target": CorpusConfig(), "level": "token"}, "head", "ner", "strategy 'head' leaves it"),
        ({"name": "self_training", "target": CorpusConfig(), "level": "token"}, "lora", "coding", "level=pooled"),
        ({"name": "dann", "target": CorpusConfig()}, "lora", "pretraining", "put the notes into the corpus"),
        ({"name": "cdan"}, "lora", "report", "use dann, mmd, coral, irm, vrex or group_dro"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(settings, strategy, task, message):
    with pytest.raises(ConfigError, match=message):
        check_objective(ObjectiveConfig(**settings), StrategyConfig(name=strategy), task=task)


@pytest.mark.parametrize(
    ("name", "message"),
    [("adda", "suite cross_institution.*use dann, cdan"), ("tent", "adapt_norms.*use self_training")],
)
def test_what_lives_elsewhere_is_said_with_the_alternatives(name, message):
    from clinical_nlp.config import load_config
    from clinical_nlp.recipes.ner import CONFIG

    with pytest.raises(ConfigError, match=message) as found:
        load_config(CONFIG, None, {"objective.name": name})
    assert "\n" not in str(found.value)
    assert "objective.name" in str(found.value)


@pytest.mark.parametrize(("name", "strategy"), [("group_dro", "lora"), ("dann", "gradual")])
def test_what_several_processes_would_get_wrong_is_refused(name, strategy):
    config, moving = ObjectiveConfig(name=name), StrategyConfig(name=strategy)
    check_objective(config, moving, task="ner")
    with pytest.raises(ConfigError, match="one process"):
        check_objective(config, moving, task="ner", processes=2)


@pytest.mark.parametrize("name", NAMES)
def test_one_institution_is_a_clear_error(tmp_path, decoder, name):
    with pytest.raises(TooFewPatientsError, match=r"compares institutions.*has 1 \('hospital 0'\)"):
        fit(tmp_path / "a", decoder, of(name), institutions=1)
    assert not (tmp_path / "a").exists()


def test_batches_too_small_to_compare_in_are_refused(tmp_path, decoder):
    with pytest.raises(ConfigError, match="set at least 6"):
        fit(tmp_path / "a", decoder, of("mmd"), institutions=3)


def test_a_representation_that_is_not_finite_ends_training(tmp_path, decoder, monkeypatch):
    from clinical_nlp.invariance import losses

    monkeypatch.setattr(losses, "coral_loss", lambda a, b: a.sum() * float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        fit(tmp_path / "a", decoder, of("coral"))


def test_target_notes_of_held_out_patients_are_not_read():
    config = ObjectiveConfig(name="dann", target=CorpusConfig(options={"institutions": 1, "patients": 3}))
    everyone = read_target(config, ())
    names = {note.patient for note in everyone}
    assert len(names) == 3
    rest = read_target(config, {min(names)})
    assert {note.patient for note in rest} == names - {min(names)}
    with pytest.raises(InputError, match="no note of a patient outside"):
        read_target(config, names)


# Balanced batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "accumulation"), [(6, 1), (6, 3), (9, 2)])
def test_every_batch_has_as_many_examples_of_each_institution(batch, accumulation):
    where = [0] * 50 + [1] * 8 + [2] * 21
    batches = EpochBatches([5] * 79, batch=batch, accumulation=accumulation, seed=1, balance=where)
    found = list(batches)
    assert len(found) == len(batches)
    for one in found[:-accumulation]:
        counts = [sum(where[index] == name for index in one) for name in range(3)]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == batch
    small = [index for one in found for index in one if where[index] == 1]
    assert set(small) == set(range(50, 58))
    assert max(small.count(index) for index in set(small)) - min(small.count(index) for index in set(small)) <= 1
    assert list(EpochBatches([5] * 79, batch=batch, accumulation=accumulation, seed=1, balance=where)) == found
