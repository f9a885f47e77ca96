"""The YAML models: what `raymoe train`, `raymoe serve` and a Serve deployment may be told.

One class a component; YAML keys are the field names; an unknown key, a wrong type or an impossible size is an error that
names the dotted key. A component takes its own part, never the whole.
"""

from raymoe.config.base import ConfigError, Strict
from raymoe.config.checkpoint import CheckpointConfig
from raymoe.config.data import DataConfig, TokenizerConfig
from raymoe.config.expert_hosts import ExpertHostsConfig
from raymoe.config.load import load_config, parse_config
from raymoe.config.lora import LoraConfig
from raymoe.config.memory import MemoryLimit, check_fits, memory_limit, parse_memory, total_memory
from raymoe.config.serve import ServeConfig
from raymoe.config.train import ExpertsConfig, ModelConfig, OptimizerConfig, TrainConfig
from raymoe.config.workers import SnapshotConfig, WorkersConfig

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "ExpertHostsConfig",
    "ExpertsConfig",
    "LoraConfig",
    "MemoryLimit",
    "ModelConfig",
    "OptimizerConfig",
    "ServeConfig",
    "SnapshotConfig",
    "Strict",
    "TokenizerConfig",
    "TrainConfig",
    "WorkersConfig",
    "check_fits",
    "load_config",
    "memory_limit",
    "parse_config",
    "parse_memory",
    "total_memory",
]
