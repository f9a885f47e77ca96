"""Which model families an engine takes, and what it reads from their configurations."""

from transformers import PreTrainedConfig

LATENT_FAMILIES = ("deepseek_v2", "deepseek_v3")
"""Families with multi-head latent attention that `raymoe.inference.latent_cache` was made for."""


def refuse_unservable(config: PreTrainedConfig) -> None:
    """Raises: ValueError: a family that no engine can run."""
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise ValueError(
            f"model family '{config.model_type}' is an encoder-decoder; raymoe serves decoder-only MoE models, because "
            "transformers' continuous batching does. `raymoe generate` runs it in static batches"
        )
    if is_latent(text) and text.model_type not in LATENT_FAMILIES:
        raise ValueError(
            f"model family '{config.model_type}' uses multi-head latent attention (kv_lora_rank {text.kv_lora_rank}), which "
            f"raymoe serves for {' and '.join(LATENT_FAMILIES)} only; families that work besides include mixtral, olmoe, "
            "qwen2_moe, qwen3_moe, phimoe and gpt_oss"
        )


def is_latent(config: PreTrainedConfig) -> bool:
    """Whether keys and values are kept compressed: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""
    return bool(getattr(config, "kv_lora_rank", None))


def end_tokens(*candidates: int | list[int] | None) -> tuple[int, ...]:
    """The first of the candidates that says something."""
    for candidate in candidates:
        if candidate is not None:
            return tuple(candidate) if isinstance(candidate, list) else (candidate,)
    return ()
