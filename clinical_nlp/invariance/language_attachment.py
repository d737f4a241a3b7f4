"""Objectives while a language model learns to read or to write: institutions by document, states by a hook.

Rows of a language model hold several documents, of several institutions; each is read as a whole (level pooled: the
mean of its states), or by its tokens. In report writing the source is what is aligned: a report is the task itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clinical_nlp.errors import ConfigError
from clinical_nlp.invariance.attachment import Attached, thinned
from clinical_nlp.invariance.objectives import NEEDS, ObjectiveConfig, Unlabelled, build_objective

if TYPE_CHECKING:
    import pyarrow as pa


class MarkedRows:
    """Training rows with the institution and the patient of each document in them.

    Parameters
    ----------
    examples : rows, indexable; those that hold several documents say `seq_lengths`.
    table : the same rows with columns `institution` and `patient_id`: a name, or a list of one a document.
    counted : rows after the first so many are read along without counting (replayed ones of another corpus).

    Attributes
    ----------
    names : institutions of the rows that count, in sorted order.
    n_patients : of each.
    rows : what the examples are made of.
    balance : institution of each row, where every row is one document and counts; else None.
    """

    def __init__(self, examples: Any, table: pa.Table, *, counted: int | None = None) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self._examples = examples
        self.rows = getattr(examples, "rows", examples)
        columns = {name: table.column(name) for name in ("institution", "patient_id")}
        listed = pa.types.is_list(columns["institution"].type)
        sizes = np.ones(len(examples), dtype=np.int64)
        if listed:
            sizes = pc.list_value_length(columns["institution"]).to_numpy().astype(np.int64)
            columns = {name: pc.list_flatten(column) for name, column in columns.items()}
        self._ends = np.cumsum(sizes)
        rows = len(examples) if counted is None else counted
        last = int(self._ends[rows - 1]) if rows else 0
        self.names = sorted(pc.unique(columns["institution"].slice(0, last)).to_pylist())
        where, who = (
            pc.fill_null(pc.index_in(column, value_set=pa.array(values, column.type)), -1).to_numpy().astype(np.int64)
            for column, values in (
                (columns["institution"], self.names),
                (columns["patient_id"], pc.unique(columns["patient_id"]).to_pylist()),
            )
        ) if last else (np.zeros(0, np.int64), np.zeros(0, np.int64))  # fmt: skip
        where[last:] = -1
        people = np.unique(np.stack([where[:last], who[:last]], 1), axis=0)
        self.n_patients = [int((people[:, 0] == place).sum()) for place in range(len(self.names))]
        # One patient id in two institutions is two patients.
        self._institution, self._patient = where, np.where(where < 0, -1, who * max(1, len(self.names)) + where)
        whole = bool((sizes == 1).all() and (where >= 0).all())
        self.balance: list[int] | None = where.tolist() if whole and len(where) else None

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[Any, list[tuple[int, int, int]]]:
        """Return a row and, for each document in it, its tokens, its institution and its patient."""
        row = self._examples[index]
        last = int(self._ends[index])
        lengths = row.get("seq_lengths") or [len(row["input_ids"])]
        first = last - len(lengths)
        about = zip(lengths, self._institution[first:last].tolist(), self._patient[first:last].tolist(), strict=True)
        return row, list(about)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is read next, where the rows differ by epoch."""
        if hasattr(self._examples, "set_epoch"):
            self._examples.set_epoch(epoch)

    @staticmethod
    def collate(collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
        """Return a collator that adds `institution`, `patient` and `unit` (document) of each token; -1 in padding."""

        def marked(items: list[tuple[Any, list[tuple[int, int, int]]]]) -> dict[str, Any]:
            import torch

            batch = collate([row for row, _ in items])
            about = {key: torch.full(batch["input_ids"].shape, -1) for key in ("institution", "patient", "unit")}
            number = 0
            for place, (_, documents) in enumerate(items):
                begin = 0
                for length, institution, patient in documents:
                    span = slice(begin, begin + length)
                    about["institution"][place, span] = institution
                    about["patient"][place, span] = patient
                    about["unit"][place, span] = number
                    begin, number = begin + length, number + 1
            return batch | about

        return marked


def attach_to_language_model(
    model: Any,
    config: ObjectiveConfig,
    rows: MarkedRows,
    *,
    task: Literal["pretraining", "report"],
    batch_size: int,
    seed: int,
    shift: bool = False,
) -> Attached:
    """Build the objective of a language model and the loss term that reads its states.

    What compares risks (irm, vrex, group_dro) takes the loss of tokens: of a masked language model those that are
    masked, of a causal one at most `attachment.MOST_TOKENS` a batch, drawn anew each step.

    Parameters
    ----------
    model : what is trained: a causal language model, or `tasks.pretraining.masked_language_model`.
    config : an active objective; `check_objective` has passed it.
    rows : what is trained on.
    batch_size : rows a forward pass of one process.
    shift : a masked token is predicted from the state before it.

    Raises
    ------
    TooFewPatientsError : fewer than two institutions.
    ConfigError : rows are single documents, and batches too small to compare institutions in.
    """
    import torch

    if rows.balance is not None and len(rows.names) >= 2 and batch_size < 2 * len(rows.names):
        raise ConfigError(
            f"training.batch_size {batch_size} is too small for objective {config.name!r}: it compares "
            f"{len(rows.names)} institutions within a batch; set at least {2 * len(rows.names)}"
        )
    network = getattr(model, "network", model)
    masked = network is not model
    inner = network.get_base_model() if hasattr(network, "peft_config") else network
    module = build_objective(
        config,
        institutions=rows.names,
        patients=rows.n_patients,
        width=inner.config.get_text_config().hidden_size,
        n_classes=1,
        seed=seed,
    ).to(next(model.parameters()).device)
    states: list[Any] = []
    said: list[Any] = []

    def watch(backbone: Any, given: Any, found: Any) -> None:
        if backbone.training and torch.is_grad_enabled():
            states.append(found.last_hidden_state)

    def listen(_: Any, given: Any, found: Any) -> None:
        if torch.is_grad_enabled():
            said.append(found["logits"])

    inner.base_model.register_forward_hook(watch)
    if masked:
        model.register_forward_hook(listen)
    of_states = NEEDS[config.name].works_on == "representation"

    def term(_: Any, inputs: dict[str, Any]) -> Any:
        hidden, logits = states.pop(), said.pop() if said else None
        states.clear()
        said.clear()
        if of_states:
            found = _read_states(config, hidden, inputs, seed, prompts=task == "report")
        elif logits is not None:
            found = _read_masked(logits, inputs, shift=shift)
        else:
            found = _read_causal(inner.get_output_embeddings(), hidden, inputs, seed)
        return module.penalty(step=inputs["step"], **found)

    return Attached(module, term, rows.balance if config.balanced else None)


def _read_states(
    config: ObjectiveConfig, hidden: Any, inputs: dict[str, Any], seed: int, *, prompts: bool
) -> dict[str, Any]:
    """Mean state of each document, or states of its tokens; with `prompts`, of what is not to be predicted."""
    import torch

    there = inputs["institution"] >= 0
    if prompts:
        there = there & (inputs["labels"] == Unlabelled)
    if config.level == "token":
        there = thinned(there, inputs, seed)
        representation = hidden[there]
        about = {key: inputs[key][there] for key in ("institution", "patient")}
        return {"representation": representation, "label": None, **about}
    documents, owner = torch.unique(inputs["unit"][there], return_inverse=True)
    count = torch.bincount(owner, minlength=len(documents)).unsqueeze(1)
    state = hidden.new_zeros((len(documents), hidden.shape[-1]), dtype=torch.float32)
    state = state.index_add(0, owner, hidden[there].float()) / count
    about = {
        key: torch.zeros_like(documents).index_put((owner,), inputs[key][there]) for key in ("institution", "patient")
    }
    return {"representation": state, "label": None, **about}


def _read_masked(logits: Any, inputs: dict[str, Any], *, shift: bool) -> dict[str, Any]:
    """Predictions of masked tokens and their losses."""
    import torch

    labels = inputs["labels"]
    places = {key: inputs[key] for key in ("institution", "patient")}
    if shift:
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=Unlabelled)
        places = {key: torch.nn.functional.pad(value[:, 1:], (0, 1), value=-1) for key, value in places.items()}
    chosen = labels != Unlabelled
    return _risk(logits, labels[chosen], {key: value[chosen] for key, value in places.items()})


def _read_causal(head: Any, hidden: Any, inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """Predictions of some tokens from the states before them, and their losses."""
    import torch

    labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=Unlabelled)
    chosen = thinned(labels != Unlabelled, inputs, seed)
    about = {key: inputs[key][chosen] for key in ("institution", "patient")}
    return _risk(head(hidden[chosen].to(head.weight.dtype)).float(), labels[chosen], about)


def _risk(logits: Any, label: Any, about: dict[str, Any]) -> dict[str, Any]:
    import torch

    def losses(given: Any) -> Any:
        return torch.nn.functional.cross_entropy(given, label, reduction="none")

    return {"representation": logits[:, :1], "label": label, "logits": logits, "losses": losses, **about}
