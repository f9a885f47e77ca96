"""What a user would do without raymoe, under the same memory: accelerate's disk offload, and experts computed from a mapped file.

Each runs in a process and a memory cgroup of its own, as does raymoe's engine beside them: what the page cache holds of the
files counts, and only what fits the limit stays. Where the machine has no cgroups, pages are dropped between steps instead.

    python -m raymoe.benchmarks.inference_rivals SYSTEM MODEL FOLDER BUDGET_BYTES
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteriaList

from raymoe.models import MoELayer, attach_runtime, load_without_experts

SYSTEMS = ("raymoe", "mapped", "accelerate")
_SLACK_BYTES = 16 * 2**20
_CGROUPS = Path("/sys/fs/cgroup")
_THREADS = 2

Generate = Callable[[list[list[int]], int], list[list[int]]]

_dropped_between_steps: list[Path] = []


class MappedExperts:
    """Computes with experts as they lie in the mapped files; the system reads what is touched and drops what it must."""

    def __init__(self, model: Path):
        self._files = [safe_open(path, framework="pt") for path in sorted(model.glob("*.safetensors"))]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 (no mapping)

    def __call__(self, layer: MoELayer, hidden: Tensor, expert_index: Tensor, expert_weight: Tensor) -> Tensor:
        """As `raymoe.models.ExpertsRuntime`, for OLMoE's names."""
        out = torch.zeros_like(hidden)
        for expert in expert_index.unique().tolist():
            rows, place = (expert_index == expert).nonzero(as_tuple=True)
            gate, up, down = (
                self._file_of[name].get_tensor(name)
                for part in ("gate_proj", "up_proj", "down_proj")
                for name in [f"{layer.name}.{expert}.{part}.weight"]
            )
            here = hidden[rows]
            computed = linear(silu(linear(here, gate)) * linear(here, up), down)
            out.index_add_(0, rows, computed * expert_weight[rows, place, None].to(hidden.dtype))
        return out


def measure(system: str, model: Path, prompts: list[list[int]], tokens: int, budget_bytes: int) -> dict[str, Any]:
    """Greedy generation, one prompt after another, in a fresh process under a memory limit.

    Returns:
        {system, tokens_per_s: of each prompt, tokens: of each prompt, limited_by}.

    Raises:
        RuntimeError: the process failed; has its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "asked.json"
        asked.write_text(json.dumps({"prompts": prompts, "tokens": tokens}), encoding="utf-8")
        command = [sys.executable, "-m", __name__, system, str(model), folder, str(budget_bytes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{system} failed: {done.stderr[-2000:]}")
        return json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))


def _main(system: str, model: Path, folder: Path, budget_bytes: int) -> None:
    torch.set_num_threads(_THREADS)
    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    generate, close = _STARTS[system](model, folder, budget_bytes)
    # everything that is no expert has been touched, so that the limit is the experts' alone
    generate([asked["prompts"][0][:4]], 1)
    with _limited([*model.glob("*.safetensors"), *folder.rglob("*.dat")], budget_bytes) as limited_by:
        answers, rates = [], []
        for prompt in asked["prompts"]:
            began_s = time.perf_counter()
            answers += generate([prompt], asked["tokens"])
            rates.append(len(answers[-1]) / (time.perf_counter() - began_s))
    close()
    found = {"system": system, "tokens_per_s": rates, "tokens": answers, "limited_by": limited_by}
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def _raymoe(model: Path, folder: Path, budget_bytes: int) -> tuple[Generate, Callable[[], None]]:
    from raymoe.inference import InferenceEngine, SamplingParams

    engine = InferenceEngine(model, expert_memory=budget_bytes, kv_tokens=512)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        return engine.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0.0, stop_token_ids=()))

    return generate, engine.close


def _mapped(model: Path, folder: Path, budget_bytes: int) -> tuple[Generate, Callable[[], None]]:
    loaded, _ = load_without_experts(model, torch.float32)
    attach_runtime(loaded, MappedExperts(model))
    return _with_generate(loaded), lambda: None


def _accelerate(model: Path, folder: Path, budget_bytes: int) -> tuple[Generate, Callable[[], None]]:
    from accelerate import disk_offload  # pyright: ignore[reportMissingImports]

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    for layer in loaded.model.layers:
        disk_offload(layer.mlp.experts, str(folder / "offload" / str(id(layer))), execution_device=torch.device("cpu"))
    return _with_generate(loaded), lambda: None


_STARTS = {"raymoe": _raymoe, "mapped": _mapped, "accelerate": _accelerate}


def _with_generate(model: PreTrainedModel) -> Generate:
    def drop(ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        for file in _dropped_between_steps:
            _drop(file)
        return torch.zeros(len(ids), dtype=torch.bool)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = model.generate(
            ids,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            attention_mask=torch.ones_like(ids),
            stopping_criteria=StoppingCriteriaList([drop]),
        )
        return out[:, ids.shape[1] :].tolist()

    return generate


@contextmanager
def _limited(files: list[Path], budget_bytes: int) -> Iterator[str]:
    """Lets this process keep what it has, and of what comes from now on, files' pages included, no more than the budget."""
    for file in files:
        _drop(file)
    group = _new_cgroup(budget_bytes + _SLACK_BYTES)
    if group is None:
        _dropped_between_steps.extend(files)
        yield "pages dropped between steps"
        return
    (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    try:
        yield "cgroup"
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
        group.rmdir()


def _new_cgroup(limit_bytes: int) -> Path | None:
    """An empty memory cgroup (version 1 or 2) below this process's own; None where the machine does not let us make one."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, place = line.split(":", 2)
        for mount, kind, limit in (("memory", "memory", "memory.limit_in_bytes"), ("", "", "memory.max")):
            group = _CGROUPS / mount / place.lstrip("/") / f"raymoe-bench-{os.getpid()}"
            if controllers != kind or not group.parent.is_dir():
                continue
            try:
                group.mkdir()
                (group / limit).write_text(str(limit_bytes), encoding="ascii")
            except OSError:
                if group.is_dir():
                    group.rmdir()
                continue
            return group
    return None


def _drop(file: Path) -> None:
    number = os.open(file, os.O_RDONLY)
    try:
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(number)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
