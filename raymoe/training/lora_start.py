"""A model made ready for LoRA, and what a trainer is to put behind its experts."""

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedModel

from raymoe.config.lora import LoraConfig
from raymoe.training.fssdp import SparseExperts
from raymoe.training.lora import add_adapters
from raymoe.training.lora_experts import LoraSparseExperts
from raymoe.training.lora_files import AdapterFiles


def start_lora(model: PreTrainedModel, lora: LoraConfig, seed: int) -> Callable[..., SparseExperts]:
    """Freezes a model of `load_without_experts` and gives it adapters: new ones, or those of `lora.adapter`.

    Returns:
        What `Trainer` calls in place of `SparseExperts`, with the same arguments.

    Raises:
        ValueError: see `add_adapters` and `AdapterFiles`.
    """
    add_adapters(model, lora, seed)
    read = None
    if lora.adapter is not None:
        files = AdapterFiles(lora.adapter, model, lora)
        files.read_dense(model)
        read = files.read_expert
    return partial(LoraSparseExperts, lora=lora, seed=seed, read=read)
