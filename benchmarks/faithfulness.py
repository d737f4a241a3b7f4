"""What the comparison of clinical facts finds and what it flags: planted errors and harmless rewordings, by kind.

    python benchmarks/faithfulness.py --output benchmarks/faithfulness.json

Synthetic impressions, findings and whole notes, changed through the generator's own gold
(`tests/tasks/planted_pairs.py`): one error each, or a rewording that keeps every fact. Phrases of the bank `held_out`
are such that no rule was made for.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from clinical_nlp.runs import package_versions, write_json
from clinical_nlp.tasks.faithfulness import compare_facts

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tasks"))
from planted_pairs import ERRORS, REWORDINGS, load_content, plant, reword, texts


def main() -> None:
    """Compare, count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[501, 502, 503, 504])
    parser.add_argument("--pairs", type=int, default=25, help="of a seed, kind and length, at most")
    options = parser.parse_args()
    began, compared, rows = time.monotonic(), 0, []
    for bank in ("development", "held_out"):
        content = load_content(bank)
        counts: dict[tuple[str, str, str], list[int]] = {}
        for seed in options.seeds:
            random = Random(seed)
            pool = list(texts(bank=bank, seed=seed, patients=30))
            random.shuffle(pool)
            for length in ("short", "note"):
                items = [item for item in pool if (item.where == "note") == (length == "note")]
                for group, kinds, change in (("error", ERRORS, plant), ("rewording", REWORDINGS, reword)):
                    for kind in kinds:
                        found = counts.setdefault((group, kind, length), [0, 0])
                        made = (change(item, kind, content, random) for item in items)
                        pairs = [(new, item.text) for new, item in zip(made, items, strict=True) if new is not None]
                        for new, old in pairs[: options.pairs]:
                            found[0] += bool(compare_facts(new, old).errors)
                            found[1] += 1
                            compared += 1
        for (group, kind, length), (flagged, pairs_of) in counts.items():
            rows.append(
                {"bank": bank, "group": group, "kind": kind, "length": length, "flagged": flagged, "pairs": pairs_of}
            )
        for group in ("error", "rewording"):
            for length in ("short", "note"):
                chosen = [row for row in rows if (row["bank"], row["group"], row["length"]) == (bank, group, length)]
                print(
                    bank,
                    group,
                    length,
                    sum(r["flagged"] for r in chosen),
                    "of",
                    sum(r["pairs"] for r in chosen),
                    flush=True,
                )
    machine: dict[str, Any] = {"system": platform.platform(), "packages": package_versions()}
    result = {"benchmark": "faithfulness", "machine": machine, "seeds": options.seeds, "rows": rows}
    write_json(options.output, result | {"comparisons": compared, "seconds": round(time.monotonic() - began, 1)})


if __name__ == "__main__":
    main()
