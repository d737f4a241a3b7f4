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
from clinical_nlp.models import int8
from clinical_nlp.models.adapters import stack_adapters
from clinical_nlp.models.resolve import ResolvedModel, resolve_model
from clinical_nlp.progress import say

if TYPE_CHECKING:
    import torch

Quantization = Literal["none", "nf4", "int8"]
Precision = Literal["auto", "fp32", "bf16"]
Head = Literal["none", "checkpoint", "run", "fresh"]
HEAD = "head.safetensors"
"""File of a run that holds a head which its base did not have."""
_HEAD_SEED = 0
_HEADS = ["score", "classifier", "lm_head", "qa_outputs", "cls", "head"]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base: the network (backbone or language model), its tokenizer, and where they came from.

    `head` says where the language-model head came from: none (a backbone), the checkpoint, an earlier run, or fresh.
    """

    network: Any
    tokenizer: Any
    resolved: ResolvedModel
    quantization: Quantization
    is_decoder: bool
    head: Head = "none"


def load_base(
    name: str,
    *,
    kind: Literal["backbone", "causal", "masked", "language"] = "backbone",
    quantization: Quantization = "none",
    bidirectional: bool = False,
    dtype: Precision = "auto",
) -> BaseModel:
    """Load a base model with the frozen adapters of the runs it names.

    Parameters
    ----------
    name : see `resolve_model`.
    kind : `backbone` gives hidden states; `causal` and `masked` have the language-model head of a decoder or an
        encoder; `language` is the one of the two that the model is. A masked-LM head that the checkpoint lacks
        (sentence encoders do) is taken from the earlier run that trained one, else made from a fixed seed, its output
        tied to the embeddings as the architecture has it.
    quantization : `nf4` loads linear layers in 4-bit NF4 with double quantisation, on GPU and on CPU; `int8` loads what
        the recipe `quantise` wrote, which only predicts.
    bidirectional : let a decoder see to the right (`config.is_causal = False`).
    dtype : of the weights that are not 4-bit; `auto` is bf16 on a GPU that has it, else fp32.

    Returns
    -------
    BaseModel. No weight is a view on the checkpoint's file any more.

    Raises
    ------
    ModelError : the weights cannot be read, the model is not of this kind, or a head came out quantised.
    """
    # bitsandbytes reports at import that an optional kernel package is missing, which is not the user's concern.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what a checkpoint lacks is judged below
    resolved = resolve_model(name)
    if (Path(resolved.folder) / int8.FILE).is_file():
        if quantization != "int8" or kind != "backbone":
            raise ModelError(f"{name} is 8-bit and only predicts; train or merge the run that it was made from")
        return BaseModel(int8.load_int8(Path(resolved.folder)), load_tokenizer(resolved), resolved, "int8", False)
    offline = not resolved.is_hub
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": offline}
    with _clear_errors(name):
        config = AutoConfig.from_pretrained(resolved.folder, **options)
    two_stacks = bool(getattr(config, "is_encoder_decoder", False))
    is_decoder = _is_decoder(config)
    if kind == "language":
        kind = "causal" if is_decoder else "masked"
    if kind == "causal" and not is_decoder:
        raise ModelError(f"base_model {name!r} ({config.model_type}) is no causal language model")
    masked_models = transformers.AutoModelForMaskedLM._model_mapping
    if kind == "masked" and (is_decoder or two_stacks or type(config) not in masked_models):
        raise ModelError(f"base_model {name!r} ({config.model_type}) is no masked language model")
    if is_decoder and (bidirectional or hasattr(config, "is_causal")):
        config.is_causal = not bidirectional  # an earlier run may have saved the opposite
    config.use_cache = False
    gpu = torch.cuda.is_available()
    half = dtype == "bf16" or (dtype == "auto" and gpu and torch.cuda.is_bf16_supported())
    options |= {"config": config, "dtype": torch.bfloat16 if half else torch.float32, "use_safetensors": True}
    if quantization == "nf4":
        options |= _four_bit(torch, options["dtype"])
    loaders: dict[str, Any] = {"backbone": AutoModel, "causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}
    with _clear_errors(name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_HEAD_SEED)
        loaded: Any = loaders[kind].from_pretrained(resolved.folder, output_loading_info=True, **options)
    network, found = loaded
    release_mapping(network)
    # What the file lacks starts at random and would be trained and reported as if it were the model; only a pooler,
    # which many checkpoints leave out and nothing here reads, may be absent, or a masked-LM head as a whole.
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)
    head: Head = "none" if kind == "backbone" else "checkpoint"
    prefix = backbone_prefix(network)
    only_head = kind == "masked" and bool(missing) and not any(key.startswith(prefix) for key in missing)
    if only_head and set(missing) >= set(head_state(network)):
        head, missing = _restore_head(network, resolved), []
    if missing:
        raise ModelError(
            f"base_model {name!r} lacks {len(missing)} of its weights ({missing[0]} first); copy the model again"
        )
    if quantization == "nf4":
        _guard_four_bit(network, name)
    elif gpu:
        network = network.cuda()
    if not gpu and network.num_parameters() > _LARGE:
        _give_memory_back()
    network = stack_adapters(network, resolved.adapters, prefix="" if kind == "backbone" else prefix)
    return BaseModel(network, load_tokenizer(resolved), resolved, quantization, is_decoder, head)


def can_be_prompted(name: str) -> bool:
    """Say whether a base model is a decoder, which continues a text, from its config alone."""
    from transformers import AutoConfig

    resolved = resolve_model(name)
    with _clear_errors(name):
        config = AutoConfig.from_pretrained(
            resolved.folder, trust_remote_code=False, local_files_only=not resolved.is_hub
        )
    return _is_decoder(config)


def _is_decoder(config: Any) -> bool:
    from transformers import AutoModelForCausalLM

    causal = type(config) in AutoModelForCausalLM._model_mapping and config.model_type not in _ENCODERS
    return causal and not getattr(config, "is_encoder_decoder", False)


_LARGE = 200_000_000
"""Parameters from which a model's memory matters more than the time to ask the system for it."""


def _give_memory_back() -> None:
    """Return what loading freed to the system, and later what training frees of large blocks, at once (glibc).

    Its allocator else keeps such blocks in a heap that the dequantised weights of each layer fragment.
    """
    import ctypes
    import gc

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.malloc_trim(0)
        library.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: once set, it no longer grows by itself


def release_mapping(network: torch.nn.Module) -> None:
    """Copy every weight that is a view on a mapped safetensors file, so that the file is let go.

    A mapping that stays keeps the whole checkpoint's pages beside what was made of them, and a file that is replaced
    meanwhile would change the weights.
    """
    maps = Path("/proc/self/maps")
    ranges: list[tuple[int, int]] | None = None
    if maps.is_file():
        lines = (line.split(maxsplit=5) for line in maps.read_text("utf-8", "replace").splitlines())
        files = [fields[0].split("-") for fields in lines if len(fields) == 6 and ".safetensors" in fields[5]]
        ranges = [(int(begin, 16), int(end, 16)) for begin, end in files]
    copies: dict[int, torch.Tensor] = {}
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        address = tensor.data_ptr()
        # Without /proc nobody can say which weights are mapped, so all are copied.
        if tensor.device.type != "cpu" or not (ranges is None or any(begin <= address < end for begin, end in ranges)):
            continue
        if address not in copies:
            copies[address] = tensor.detach().clone()
        tensor.data = copies[address]


def head_state(network: Any) -> dict[str, Any]:
    """Return the weights of a language model's head by name: all that is neither backbone nor tied to it."""
    inner = network.get_base_model() if hasattr(network, "peft_config") else network
    backbone = {id(parameter) for parameter in inner.base_model.parameters()}
    return {name: value for name, value in inner.named_parameters() if id(value) not in backbone}


def _restore_head(network: Any, resolved: ResolvedModel) -> Head:
    """Load the masked-LM head of the newest run below that trained one; else leave the fresh one, and say so."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = head_state(network)
    for parameter in state.values():
        parameter.data = parameter.data.float()
    for run in (adapter.parent for adapter in reversed(resolved.adapters)):
        if not (run / HEAD).is_file() or read_task(run).get("task") != "pretraining":
            continue
        try:
            saved = load_file(run / HEAD)
        except (OSError, SafetensorError):
            raise ModelError(f"{run / HEAD} is damaged; copy the run again") from None
        if {name: value.shape for name, value in saved.items()} != {name: p.shape for name, p in state.items()}:
            raise ModelError(f"{run / HEAD} does not fit base_model {resolved.name!r}; copy the run again")
        with torch.no_grad():
            for name, value in saved.items():
                state[name].copy_(value)
        return "run"
    say(f"base_model {resolved.name} has no masked-LM head: a fresh one is made (seed {_HEAD_SEED}), and trains along")
    return "fresh"


_ENCODERS = frozenset(
    {
        *("bert", "big_bird", "camembert", "data2vec-text", "deberta", "deberta-v2", "electra", "ernie"),
        *("megatron-bert", "modernbert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
        *("xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)
"""Encoders for which transformers also has a causal class."""


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


def _four_bit(torch: Any, dtype: Any) -> dict[str, Any]:
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
            bnb_4bit_compute_dtype=dtype,
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
