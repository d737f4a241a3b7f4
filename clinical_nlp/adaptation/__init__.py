"""How a base model may move: strategies, and what each is for."""

STRATEGIES = {
    "head": "backbone frozen, only the task head learns; tens of labels, least memory, nothing is forgotten",
    "lp_ft": "head first, then every weight, so that a raw head does not bend the backbone; hundreds of labels and new "
    "patients unlike the old, memory of full, forgets less than full",
    "gradual": "unfreezes from the top, lower layers learn more slowly; hundreds of labels, memory of full, forgets "
    "less than full",
    "full": "every weight moves; thousands of labels or a small encoder, most memory, forgets most",
    "lora": "low-rank updates on a frozen base; hundreds of labels, far less memory than full, forgets little",
    "dora": "lora that learns the size of each row apart from its direction; as lora at small ranks, slower",
    "qlora": "lora on a 4-bit NF4 base with double quantisation; for LLMs on one GPU, least memory, slower than lora",
    "bottleneck": "small two-layer networks after attention and feed-forward (Houlsby) or feed-forward alone "
    "(Pfeiffer); hundreds of labels, memory of lora, forgets little; cannot be merged into the weights",
    "ia3": "one scale a channel on keys, values and feed-forward; tens of labels, fewest weights, forgets least",
}
"""Strategy name -> what it is for: labels needed, memory, risk of forgetting."""
