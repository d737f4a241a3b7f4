"""Llama-shaped models with random weights: as a folder to load from, or made on a device, in 4-bit if wanted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clinical_nlp.models.resolve import resolve_model

SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    # name: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
    "tiny": (64, 176, 2, 2, 1, 4096, True),
    "1m": (128, 352, 2, 2, 2, 4096, True),
    "30m": (512, 1408, 8, 8, 4, 4096, True),
    "0.5b": (896, 4864, 24, 14, 2, 128256, True),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "1.1b": (2048, 5632, 22, 32, 4, 32000, True),
    "1.5b": (1536, 8960, 28, 12, 2, 128256, True),
    "3b": (3072, 8192, 28, 24, 8, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
}
"""1b and 3b are shaped as Llama 3.2, 1.1b as TinyLlama, 8b as Llama 3.1; 0.5b and 1.5b as Qwen 2.5 with Llama's
vocabulary."""


def llama_config(shape: str, *, positions: int = 4096) -> Any:
    """Return the transformers config of a shape."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, key_value_heads, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )


def write_model(folder: Path, shape: str, *, dtype: str = "bfloat16", seed: int = 0, shards: int = 1) -> Path:
    """Write a model in `shards` safetensors files, one tensor in memory at a time and one shard in the file cache.

    The tokenizer is that of builtin:tiny, whose 4,096 tokens every shape has.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(shape)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(folder)
    names = list(_weights(config))
    where, total = {}, 0
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        part = {}
        for number, (name, size) in enumerate(names):
            if number * shards // len(names) != index:
                continue
            part[name] = _random(size, seed + number, torch.device("cpu"), getattr(torch, dtype))
            where[name] = file
            total += part[name].nbytes
        save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": where})
        (folder / "model.safetensors.index.json").write_text(text, "utf-8")
    tokenizer = Path(resolve_model("builtin:tiny").folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


def make_model(shape: str, *, device: str, nf4: bool, attention: str, positions: int, seed: int = 0) -> Any:
    """Make a bf16 model on a device; with `nf4`, each linear layer is made and quantised before the next one is.

    So the memory that making takes is that of the finished model and one layer.
    """
    import torch
    from transformers import LlamaForCausalLM

    config = llama_config(shape, positions=positions)
    config._attn_implementation = attention
    with torch.device("meta"):
        network = LlamaForCausalLM(config).to(torch.bfloat16)
    target = torch.device(device)
    for number, (path, module) in enumerate(list(network.named_modules())):
        if isinstance(module, torch.nn.Linear):
            if path == "lm_head" and config.tie_word_embeddings:
                continue
            weight = _random(tuple(module.weight.shape), seed + number, target, torch.bfloat16)
            if nf4 and path != "lm_head":
                parent, _, name = path.rpartition(".")
                setattr(network.get_submodule(parent), name, _four_bit(weight, target))
            else:
                module.weight = torch.nn.Parameter(weight)
        elif "weight" in module._parameters:
            size = tuple(module.weight.shape)
            module.weight = torch.nn.Parameter(_random(size, seed + number, target, torch.bfloat16))
    with target:  # its frequencies are computed, not loaded
        network.model.rotary_emb = type(network.model.rotary_emb)(config)
    network.tie_weights()
    network.is_loaded_in_4bit = nf4
    return network


def _four_bit(weight: Any, device: Any) -> Any:
    """Return a 4-bit layer as the loader makes it: NF4, double quantisation, bf16 arithmetic."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, columns = weight.shape
    options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    layer = Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, device="meta", **options)
    layer.weight = Params4bit(weight, requires_grad=False, module=layer, **options).to(device)
    layer.support_avx512bf16_for_cpu = False
    return layer


def _random(size: tuple[int, ...], seed: int, device: Any, dtype: Any) -> Any:
    """Return ones for a norm, else small normal numbers."""
    import torch

    if len(size) == 1:
        return torch.ones(size, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(size, device=device, dtype=dtype).normal_(0, 0.02, generator=generator)


def _weights(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every weight of a Llama, in the order of its layers."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
