"""Cross-entropy of a language-model head in pieces: the logits of a whole batch are never in memory together."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PIECE_BYTES = 8 * 2**20
"""Size of the logits of one piece on a CPU, where they should stay in the cache; 64 times as much on a GPU."""


@functools.cache
def _linear_cross_entropy() -> Any:
    """Make the function once; torch is imported when it is first used."""
    import torch

    class LinearCrossEntropy(torch.autograd.Function):
        """Summed negative log-likelihood of `labels` under `hidden @ weight.T`.

        The gradient is worked out with the loss, piece by piece: nothing is computed twice, backward only scales it.
        """

        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            needs_hidden, needs_weight, _ = ctx.needs_input_grad
            room = PIECE_BYTES * (64 if hidden.is_cuda else 1)
            piece = max(16, room // (4 * weight.shape[0]))
            total = hidden.new_zeros((), dtype=torch.float32)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            for begin in range(0, len(hidden), piece):
                states, wanted = hidden[begin : begin + piece], labels[begin : begin + piece, None]
                logits = torch.log_softmax((states @ weight.T).float(), dim=-1)
                total -= logits.gather(1, wanted).sum()
                slope = logits.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=logits.dtype))
                slope = slope.to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(slope, weight, out=grad_hidden[begin : begin + piece])
                if grad_weight is not None:
                    if slope.dtype == grad_weight.dtype:
                        grad_weight.addmm_(slope.T, states)
                    else:
                        grad_weight += slope.T @ states
            ctx.grads = (grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
            return total

        @staticmethod
        def backward(ctx: Any, slope: torch.Tensor) -> tuple[Any, ...]:
            grad_hidden, grad_weight = ctx.grads
            ctx.grads = None
            if grad_hidden is not None:
                grad_hidden = grad_hidden.mul_(slope.to(grad_hidden.dtype))
            if grad_weight is not None:
                grad_weight = grad_weight.mul_(slope).to(ctx.weight_dtype)
            return grad_hidden, grad_weight, None

    return LinearCrossEntropy


def use_linear_cross_entropy(network: Any) -> bool:
    """Let a causal language model work out its training loss in pieces, where its head is a plain linear layer.

    The forward of the model itself is replaced, for calls with labels, so that whatever wraps it (peft, several
    processes) still calls it. The loss is the mean over targets, or their sum over `num_items_in_batch`, as
    transformers has it.

    Returns
    -------
    Whether it was done: a head that scales or caps its logits, has a bias or is quantised keeps its own loss.
    """
    import torch

    inner = network.get_base_model() if hasattr(network, "get_base_model") else network
    head = inner.get_output_embeddings()
    shaped = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    config = inner.config.get_text_config()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in shaped):
        return False
    original = inner.forward

    @functools.wraps(original)
    def forward(*arguments: Any, labels: Any = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        if labels is None:
            return original(*arguments, **inputs)
        states = inner.base_model(*arguments, **inputs, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:].to(states.device)
        kept = wanted != -100
        states, weight = states[kept], head.weight
        device = states.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            total = _linear_cross_entropy().apply(states.to(half), weight.to(half), wanted[kept])
        count = kept.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=total.device)
        return {"loss": total / count.clamp(min=1)}

    inner.forward = forward
    return True
