"""Generation in batches, sorted by length and padded on the left; and drafts checked against their source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clinical_nlp.errors import ModelError
from clinical_nlp.language.sentences import find_sentences
from clinical_nlp.progress import progress

DRAFT = "draft, unreviewed"
"""How every generated text is marked wherever it is written."""
Verify = Literal["none", "mark", "drop"]


@dataclass(frozen=True, slots=True)
class Generated:
    """The new tokens of one prompt, without the stop, and whether a stop came."""

    tokens: list[int]
    stopped: bool


@dataclass(frozen=True, slots=True)
class Draft:
    """A generated report, unreviewed.

    `unsupported` holds (start, end, reason) of what its source does not bear out; `dropped` counts sentences that were
    taken out for that.
    """

    text: str
    stopped: bool
    tokens: int
    unsupported: tuple[tuple[int, int, str], ...] = ()
    dropped: int = 0
    status: str = DRAFT


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stops: Sequence[int],
    pad_token_id: int,
    batch_size: int = 32,
    num_beams: int = 1,
) -> list[Generated]:
    """Continue prompts until a stop token; what comes out does not depend on what is generated together.

    Parameters
    ----------
    model : causal language model (or peft model around one).
    prompts : n token rows.
    max_new_tokens : most tokens of an answer.
    stops : any of these ends an answer.
    batch_size : prompts a batch.
    num_beams : 1 takes the likeliest token at each step; more searches that many beams.

    Returns
    -------
    n answers, in the order of the prompts.
    """
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops),
        pad_token_id=pad_token_id,
        repetition_penalty=1.0,
        use_cache=True,
    )
    found: dict[int, Generated] = {}
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with progress("generate", len(prompts), unit="reports") as bar, torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            width = len(prompts[batch[0]])
            ids = torch.full((len(batch), width), pad_token_id)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for row, place in enumerate(batch):
                ids[row, width - len(prompts[place]) :] = torch.tensor(prompts[place])
                mask[row, width - len(prompts[place]) :] = 1
            answer = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
            for row, place in enumerate(batch):
                found[place] = _until_stop(answer[row, width:].tolist(), stops)
            bar.advance(len(batch))
    model.train(was_training)
    return [found[place] for place in range(len(prompts))]


def _until_stop(tokens: Sequence[int], stops: Sequence[int]) -> Generated:
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    return Generated(list(tokens[:end]), end is not None)


def drafts(
    made: Sequence[Generated], sources: Sequence[str], tokenizer: Any, *, verify: Verify = "mark"
) -> list[Draft]:
    """Decode what was generated and check it against its sources; see `verified`."""
    texts = [tokenizer.decode(answer.tokens, skip_special_tokens=True).strip() for answer in made]
    found = [Draft(text, answer.stopped, len(answer.tokens)) for text, answer in zip(texts, made, strict=True)]
    if verify == "none":
        return found
    return [verified(draft, source, verify) for draft, source in zip(found, sources, strict=True)]


def verified(draft: Draft, source: str, verify: Verify) -> Draft:
    """Check a draft against its source, by the facts that the package's own extractor reads in both.

    mark : the text stays; `unsupported` says where it states what the source does not, and how it differs.
    drop : sentences with such a statement are taken out as well, and counted. A true statement that the extractor does
        not find in the source goes with them, so this is asked for and never the default.
    """
    from clinical_nlp.tasks.faithfulness import compare_facts

    compared = compare_facts(draft.text, source=source)
    spans = {(fact.start, fact.end): "not in the source" for fact in compared.unsupported}
    spans |= {(fact.start, fact.end): "the source says otherwise" for fact, _ in compared.flipped_source}
    unsupported = tuple((start, end, reason) for (start, end), reason in sorted(spans.items()))
    if verify != "drop" or not unsupported:
        return Draft(draft.text, draft.stopped, draft.tokens, unsupported)
    kept: list[str] = []
    dropped = position = 0
    for start, end in find_sentences(draft.text):
        if any(start < stop and begin < end for begin, stop, _ in unsupported):
            dropped += 1
        else:
            kept.append(draft.text[position:end] if kept else draft.text[start:end])
        position = end
    return Draft("".join(kept).strip(), draft.stopped, draft.tokens, (), dropped)


def vllm_engine(folder: Path) -> Callable[..., list[Generated]]:
    """Return a function that generates as `generate` does, with vLLM.

    Raises
    ------
    ModelError : vLLM is not installed, or beams are asked for.
    """
    try:
        from vllm import LLM, SamplingParams, TokensPrompt
    except ImportError:
        raise ModelError(
            "engine vllm: vLLM is not installed here; pip install vllm, or use engine transformers"
        ) from None
    model = LLM(model=str(folder), trust_remote_code=False)

    def engine(
        prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stops: Sequence[int], num_beams: int = 1
    ) -> list[Generated]:
        if num_beams != 1:
            raise ModelError("engine vllm takes the likeliest token; use engine transformers for num_beams above 1")
        settings = SamplingParams(temperature=0, max_tokens=max_new_tokens, stop_token_ids=list(stops))
        outputs = model.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts], settings, use_tqdm=False
        )
        return [
            Generated([token for token in out.outputs[0].token_ids if token not in stops],
                      out.outputs[0].finish_reason == "stop")
            for out in outputs
        ]  # fmt: skip

    return engine
