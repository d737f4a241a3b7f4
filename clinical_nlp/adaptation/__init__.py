"""How a base model may move: strategies, and what each is for."""

STRATEGIES = {
    "head": "backbone frozen, only the task head learns; fewest labels (tens), least memory, nothing is forgotten",
    "full": "every weight moves; thousands of labels or a small encoder, most memory, forgets most",
    "lora": "low-rank updates on a frozen base; hundreds of labels, far less memory than full, forgets little",
    "qlora": "lora on a 4-bit NF4 base with double quantisation; for LLMs on one GPU, least memory, slower than lora",
}
"""Strategy name -> what it is for: labels needed, memory, risk of forgetting."""
