"""Against forgetting: penalties that hold the weights of the base near where they were (EWC, L2-SP)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal

import numpy as np
from pydantic import Field

from clinical_nlp.adaptation.strategies import StrategyConfig
from clinical_nlp.config import CorpusConfig, NamedConfig, SplitConfig
from clinical_nlp.errors import ConfigError, ModelError
from clinical_nlp.notes.corpus import load_corpus
from clinical_nlp.notes.splitting import split_patients
from clinical_nlp.progress import say
from clinical_nlp.tasks.pretraining import LanguageTask


class ForgettingConfig(NamedConfig):
    """What keeps the base from forgetting while its weights move. Replay of notes is a section of its own."""

    name: Literal["none", "ewc", "l2_sp"] = "none"
    """none; l2_sp: distance from where the weights were; ewc: the same, weighted by how much the source notes need each
    weight (diagonal Fisher information)."""
    strength: float = Field(default=1.0, gt=0)
    """Weight of the penalty, half the weighted sum of squared distances. The Fisher weights of ewc are scaled to mean
    one, so that a strength means about the same under both."""
    corpus: CorpusConfig | None = None
    """ewc: the source notes, what the base must not forget."""
    notes: int = Field(default=200, ge=1)
    """ewc: how many source notes, by whole patients, the Fisher information is taken on."""


def check_forgetting(config: ForgettingConfig, strategy: StrategyConfig) -> None:
    """Refuse a penalty that would do nothing.

    Raises
    ------
    ConfigError : the strategy leaves the weights of the base as they are, or ewc has no source notes.
    """
    if config.name == "none":
        return
    if not strategy.moves_base:
        raise ConfigError(
            f"forgetting {config.name!r} holds the weights of the base near where they were, and strategy "
            f"{strategy.name!r} does not move them; use replay, or a strategy that does (full, lp_ft, gradual)"
        )
    if config.name == "ewc" and config.corpus is None:
        raise ConfigError("forgetting 'ewc' needs forgetting.corpus: the notes that the base must not forget")


def diagonal_fisher(
    model: Any, batches: Iterable[tuple[dict[str, Any], float]], *, shifted: bool, seed: int
) -> dict[str, Any]:
    """Return the diagonal Fisher information of a language model on source notes, scaled to mean one.

    F_i is the expected square of the gradient of log p(y | x) by weight i, with y drawn from the model's own
    predictions (Kirkpatrick et al. 2017; with the notes' own words it would be the empirical Fisher, which is another
    matrix: Kunstner et al. 2019).

    Parameters
    ----------
    model : language model; what `requires_grad` is measured.
    batches : one note each, as (inputs of the model with `labels` that are -100 where nothing is predicted, weight of
        the note).
    shifted : labels are those of the same position and predicted from the one before (causal models).
    seed : of the draws.

    Returns
    -------
    Parameter name -> float32 tensor of its shape; weights that no note needs are 0.

    Raises
    ------
    ModelError : no note gave a gradient.
    """
    import torch

    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    fisher = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}
    device = next(iter(parameters.values())).device
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    for inputs, weight in batches:
        inputs = {name: value.to(device) for name, value in inputs.items()}
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        if shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        chosen = labels != -100
        if not bool(chosen.any()):
            continue
        log_probs = torch.log_softmax(logits[chosen].float(), -1)
        drawn = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator).to(device)
        model.zero_grad(set_to_none=True)
        log_probs.gather(1, drawn).sum().backward()
        for name, value in parameters.items():
            if value.grad is not None:
                fisher[name] += weight * value.grad.float().square()
    model.zero_grad(set_to_none=True)
    model.train(training)
    mean = sum(float(value.sum()) for value in fisher.values()) / max(
        1, sum(value.numel() for value in fisher.values())
    )
    if mean == 0:
        raise ModelError("no source note has two tokens, so there is no Fisher information; check forgetting.corpus")
    return {name: value / mean for name, value in fisher.items()}


def source_fisher(network: Any, task: LanguageTask, tokenizer: Any, config: ForgettingConfig, *, seed: int) -> Any:
    """Return the Fisher information of a language model on source notes of training patients, who weigh the same each.

    Parameters
    ----------
    network : causal or masked language model whose weights require gradients.
    task : how it reads notes.
    config : names the corpus and how many notes; whole patients are drawn until there are that many.

    Returns
    -------
    As `diagonal_fisher`.
    """
    assert config.corpus is not None
    corpus = load_corpus(config.corpus.name, config.corpus.path, **config.corpus.options)
    train = split_patients(corpus.notes, SplitConfig(), seed=seed, parts=corpus.parts).train
    patients = corpus.notes["patient_id"].to_pylist()
    of_patient: dict[str, list[int]] = {}
    for row in train:
        of_patient.setdefault(patients[row], []).append(int(row))
    names = sorted(of_patient)
    chosen: dict[str, list[int]] = {}
    for index in np.random.default_rng(seed).permutation(len(names)):
        if sum(map(len, chosen.values())) >= config.notes:
            break
        chosen[names[index]] = of_patient[names[index]]
    say(f"Fisher information on {sum(map(len, chosen.values()))} notes of {len(chosen)} patients of {corpus.card.name}")

    def batches() -> Iterator[tuple[dict[str, Any], float]]:
        for patient, rows in chosen.items():
            for row in rows:
                tokens = task.encode([corpus.notes["text"][row].as_py()], tokenizer)
                table = task.arrange(tokens, [patient], [""])
                if len(table):
                    examples = task.examples([table], seed=seed)
                    yield task.collate([examples[index] for index in range(len(table))]), 1 / len(rows)

    return diagonal_fisher(network, batches(), shifted=task.shift or not task.masked, seed=seed)


def distance_penalty(
    model: Any, strength: float, *, weights: dict[str, Any] | None = None, free: Collection[str] = ()
) -> Callable[[Any, dict[str, Any]], Any]:
    """Return the loss term strength / 2 * sum_i w_i (theta_i - theta0_i)^2, with theta0 the weights as they now are.

    Parameters
    ----------
    model : what will train. The copy costs as much memory as the weights.
    weights : w by parameter name, for EWC (Kirkpatrick et al. 2017); one for all without it: L2-SP (Li et al. 2018).
        Parameters that it does not name are free.
    free : names of further parameters that are: a head that starts from nothing.
    """
    import torch

    start = {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if value.requires_grad and name not in free and (weights is None or name in weights)
    }
    # Taken once: a model that is wrapped for several processes names its parameters differently, but shares them.
    parameters = {name: value for name, value in model.named_parameters() if name in start}

    def term(network: Any, inputs: dict[str, Any]) -> Any:
        total = torch.zeros((), device=next(iter(start.values())).device)
        for name, value in parameters.items():
            squared = (value - start[name]).square()
            total = total + (squared if weights is None else squared * weights[name]).sum()
        return 0.5 * strength * total

    return term
