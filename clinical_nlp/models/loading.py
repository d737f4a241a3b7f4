"""Load a base model: precision, 4-bit, adapters of earlier runs, tokenizer; and the checks that stop silent faults."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clinical_nlp.errors import ModelError
from clinical_nlp.models.resolve import ResolvedModel, resolve_model

if TYPE_CHECKING:
    import torch

Quantization = Literal["none", "nf4"]
_HEADS = ["score", "classifier", "lm_head", "qa_outputs", "cls", "head"]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base: the network (backbone or causal language model), its tokenizer, and where they came from."""

    network: Any
    tokenizer: Any
    resolved: ResolvedModel
    quantization: Quantization
    is_decoder: bool


def load_base(
    name: str,
    *,
    kind: Literal["backbone", "causal"] = "backbone",
    quantization: Quantization = "none",
    bidirectional: bool = False,
) -> BaseModel:
    """Load a base model with the frozen adapters of the runs it names.

    Parameters
    ----------
    name : see `resolve_model`.
    kind : `backbone` gives hidden states, `causal` has the language-model head.
    quantization : `nf4` loads linear layers in 4-bit NF4 with double quantisation, on GPU and on CPU.
    bidirectional : let a decoder see to the right (`config.is_causal = False`), for tagging.

    Raises
    ------
    ModelError : the weights cannot be read, or a head came out quantised.
    """
    # bitsandbytes reports at import that an optional kernel package is missing, which is not the user's concern.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    resolved = resolve_model(name)
    offline = not resolved.is_hub
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": offline}
    with _clear_errors(name):
        config = AutoConfig.from_pretrained(resolved.folder, **options)
    is_decoder = type(config) in transformers.AutoModelForCausalLM._model_mapping and not getattr(
        config, "is_encoder_decoder", False
    )
    is_decoder = is_decoder and config.model_type not in _ENCODERS
    if kind == "causal" and not is_decoder:
        raise ModelError(f"base_model {name!r} ({config.model_type}) is no causal language model")
    if bidirectional and is_decoder:
        config.is_causal = False
    config.use_cache = False
    options |= {"config": config, "dtype": torch.float32, "use_safetensors": True}
    if quantization == "nf4":
        options |= _four_bit(torch)
    elif torch.cuda.is_available():
        options["dtype"] = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    loader = AutoModelForCausalLM if kind == "causal" else AutoModel
    with _clear_errors(name):
        loaded: Any = loader.from_pretrained(resolved.folder, output_loading_info=True, **options)
    network, found = loaded
    # What the file lacks starts at random and would be trained and reported as if it were the model; only a pooler,
    # which many checkpoints leave out and nothing here reads, may be absent.
    if missing := sorted(key for key in found["missing_keys"] if "pooler" not in key):
        raise ModelError(
            f"base_model {name!r} lacks {len(missing)} of its weights ({missing[0]} first); copy the model again"
        )
    if quantization == "nf4":
        _guard_four_bit(network, name)
    elif torch.cuda.is_available():
        network = network.cuda()
    network = _stack_adapters(network, resolved, kind)
    return BaseModel(network, load_tokenizer(resolved), resolved, quantization, is_decoder)


_ENCODERS = frozenset({"bert", "roberta", "electra", "xlm-roberta", "camembert", "deberta", "deberta-v2", "modernbert"})


@contextlib.contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Turn what a broken model folder raises into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ModelError(f"base_model {name!r} cannot be loaded ({type(error).__name__}: {reason})") from None
    except Exception as error:  # safetensors raises its own class for a damaged file
        if type(error).__module__.startswith("safetensors") or type(error).__name__ == "SafetensorError":
            raise ModelError(f"base_model {name!r} has damaged weights; copy the model again") from None
        raise


def _four_bit(torch: Any) -> dict[str, Any]:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError("4-bit loading needs bitsandbytes, which this platform does not have; use lora") from None
    from transformers import BitsAndBytesConfig

    gpu = torch.cuda.is_available()
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if gpu else torch.float32,
            llm_int8_skip_modules=_HEADS,
        ),
        "device_map": {"": torch.cuda.current_device()} if gpu else {"": "cpu"},
    }


def _guard_four_bit(network: torch.nn.Module, name: str) -> None:
    """Keep 4-bit weights in their training layout, and make sure something was quantised and no head was.

    On a CPU with AVX512-BF16, bitsandbytes repacks a layer at its first forward in eval mode; the backward of every
    later training step then reads the repacked bytes as if they were not, and gradients are silently wrong.
    """
    from bitsandbytes.nn import Linear4bit

    layers = {path: module for path, module in network.named_modules() if isinstance(module, Linear4bit)}
    if not layers:
        raise ModelError(f"base_model {name!r} has no linear layer that 4-bit loading can quantise; use lora")
    for path, module in layers.items():
        if path.rpartition(".")[2] in _HEADS:
            raise ModelError(f"base_model {name!r}: the head {path!r} was quantised, which would corrupt its training")
        module.support_avx512bf16_for_cpu = False


def load_tokenizer(resolved: ResolvedModel) -> Any:
    """Load the tokenizer of a resolved model; a pad token that differs from eos is chosen where there is none."""
    from transformers import AutoTokenizer

    with _clear_errors(f"{resolved.name} (tokenizer)"):
        tokenizer = AutoTokenizer.from_pretrained(
            resolved.folder, trust_remote_code=False, local_files_only=not resolved.is_hub
        )
    if not tokenizer.is_fast:
        raise ModelError(f"base_model {resolved.name!r} has only a slow tokenizer, which reports no offsets")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _stack_adapters(network: Any, resolved: ResolvedModel, kind: str) -> Any:
    """Lay the adapters of earlier runs on the base, innermost first, all frozen and all active."""
    if not resolved.adapters:
        return network
    from peft import PeftModel

    from clinical_nlp.models.adapters import adapter_config, adapter_state, load_state

    model: Any = None
    names = []
    for index, folder in enumerate(resolved.adapters):
        name = f"parent{index}"
        config = adapter_config(folder)
        if model is None:
            model = PeftModel(network, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        load_state(model, adapter_state(folder), name, prefix=backbone_prefix(network) if kind == "causal" else "")
        names.append(name)
    model.base_model.set_adapter(names)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def backbone_prefix(network: Any) -> str:
    """Return the attribute under which a language model holds its backbone, with a dot (`model.`)."""
    prefix = getattr(network, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(network, prefix) else ""


def check_offsets(tokenizer: Any, text: str, offsets: list[tuple[int, int]], ids: list[int]) -> None:
    """Verify that every non-special token covers text; several LLM tokenizers report empty spans.

    Raises
    ------
    ModelError : most tokens have empty spans, or spans run backwards. The text itself is not shown.
    """
    special = set(tokenizer.all_special_ids)
    spans = [span for span, token in zip(offsets, ids, strict=True) if token not in special]
    if not spans:
        return
    empty = sum(1 for start, end in spans if end <= start)
    backwards = any(later[0] < earlier[0] for earlier, later in itertools.pairwise(spans))
    if backwards or empty > len(spans) // 2 or spans[-1][1] > len(text):
        raise ModelError(
            f"the tokenizer of this base model reports unusable character offsets ({empty} of {len(spans)} tokens are "
            "empty); spans cannot be placed with it, choose another base model"
        )


def read_task(folder: Path) -> dict[str, Any]:
    """Read `task.json` of a run: what it was trained to do, with its labels and window."""
    path = folder / "task.json"
    if not path.is_file():
        raise ModelError(f"run {folder} has no task.json; it was not trained for a task")
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except ValueError:
        raise ModelError(f"{path} is damaged; train the run again") from None
