"""What memory an engine takes at its peak, in a process of its own, beside that of one with all experts resident.

    python -m raymoe.benchmarks.inference_memory DIR [BUDGET ...]

Resident memory (VmHWM) grows by the engine's dense weights, its KV cache, what computing takes and its experts; only the last
differ between budgets. The share saved is of what the experts take that the resident engine has read.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 4, 96, 16


def measure(model: Path, budgets: Sequence[str], precision: str = "native") -> list[Row]:
    """A row a budget, the first of them 100%: budget, peak_bytes (growth), expert_bytes (of all), saved_share, touched (experts
    that were in a slot at some time, of the resident engine those that cost it memory).

    Raises:
        subprocess.CalledProcessError: an engine could not be run.
    """
    rows: list[Row] = []
    for budget in ["100%", *(each for each in budgets if each != "100%")]:
        told = subprocess.run(
            [sys.executable, "-m", "raymoe.benchmarks.inference_memory", "--one", str(model), budget, precision],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        rows.append(json.loads(told.splitlines()[-1]))
        held_bytes = rows[0]["expert_bytes"] * rows[0]["touched"] / rows[0]["num_experts"]
        rows[-1]["saved_share"] = (rows[0]["peak_bytes"] - rows[-1]["peak_bytes"]) / held_bytes
    return rows


def _one(model: Path, budget: str, precision: str) -> Row:
    import torch

    from raymoe.inference import InferenceEngine, SamplingParams

    torch.set_num_threads(1)
    before = _resident("VmRSS:")
    with InferenceEngine(
        model, expert_memory=budget, expert_precision=precision, kv_tokens=1024, device="cpu", predictors=()
    ) as engine:
        facts = engine.stats()
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(2, vocab_size, (_PROMPTS, _PROMPT_TOKENS), generator=generator).tolist()
        engine.generate(prompts, SamplingParams(max_tokens=_NEW_TOKENS, temperature=0.0, stop_token_ids=()))
        return {
            "budget": budget,
            "precision": precision,
            "peak_bytes": _resident("VmHWM:") - before,
            "expert_bytes": facts["num_experts"] * facts["expert_bytes"],
            "slots": facts["slots"],
            "num_experts": facts["num_experts"],
            "touched": engine.stats()["resident_experts"],
        }


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Prints a row a budget."""
    if sys.argv[1] == "--one":
        print(json.dumps(_one(Path(sys.argv[2]), *sys.argv[3:5])))
        return
    for row in measure(Path(sys.argv[1]), sys.argv[2:] or ["5%"]):
        print(
            f"{row['budget']:>6}: peak {row['peak_bytes'] / 1e6:.1f} MB, {row['touched']} of {row['num_experts']} experts in "
            f"memory, saved {row['saved_share']:.1%} of {row['expert_bytes'] / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    main()
