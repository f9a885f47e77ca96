"""ExpertFlow's routing-path predictor as a network (arXiv 2410.17954, section on the Routing Path Predictor): a small T5 whose
encoder reads the prompt, and whose decoder says at each decoded token which experts of all MoE layers that token will take.

B sequences, P prompt tokens, S decoded tokens, L MoE layers, E experts, D the network's own width.
"""

import json
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import AutoTokenizer, T5Config, T5Model

from raymoe.telemetry.files import write_bytes, write_text

WEIGHTS_FILE = "path_predictor.safetensors"
FACTS_FILE = "path_predictor.json"

_VERSION = 1
_SMALL_MODEL = 512


@dataclass(frozen=True)
class PathShape:
    """What a path predictor was made for, and its own sizes."""

    num_layers: int
    """MoE layers of the model."""
    num_experts: int
    top_k: int
    vocab_size: int
    vocabulary: str
    """Hash of the tokenizer's tokens and ids; "" where the model's directory has no tokenizer."""
    d_model: int = 32
    d_ff: int = 2048
    d_kv: int = 64
    num_heads: int = 8
    num_blocks: int = 6
    """Of the encoder, and of the decoder."""
    prompt_tokens: int = 256
    """The encoder reads the last so many of a prompt."""
    window: int = 256
    """The decoder looks back on so many decoded tokens, itself included."""

    @staticmethod
    def scaled(hidden_size: int) -> dict[str, int]:
        """The sizes that differ from the paper's for a model of that hidden size: a model of a few million parameters is not
        worth a predictor as large as itself."""
        if hidden_size >= _SMALL_MODEL:
            return {}
        return {"d_ff": 256, "d_kv": 16, "num_heads": 4, "num_blocks": 2}


class PathNetwork(nn.Module):
    """t5-small's layout at `shape`, with one linear head over all (layer, expert) in place of the vocabulary."""

    def __init__(self, shape: PathShape):
        super().__init__()
        self.shape = shape
        config = T5Config(
            vocab_size=shape.vocab_size,
            d_model=shape.d_model,
            d_ff=shape.d_ff,
            d_kv=shape.d_kv,
            num_heads=shape.num_heads,
            num_layers=shape.num_blocks,
            num_decoder_layers=shape.num_blocks,
            dropout_rate=0.1,
            use_cache=False,
        )
        self.t5 = T5Model(config)
        self.head = nn.Linear(shape.d_model, shape.num_layers * shape.num_experts, bias=False)

    def forward(self, prompt: Tensor, decoded: Tensor) -> Tensor:
        """prompt int64 [B, P], decoded int64 [B, S], without padding -> logits float32 [B, S, L, E] of decoded tokens' paths."""
        hidden = self.t5(input_ids=prompt, decoder_input_ids=decoded).last_hidden_state
        return self.head(hidden).unflatten(-1, (self.shape.num_layers, self.shape.num_experts))

    def num_parameters(self) -> int:
        """Of the network, embeddings included."""
        return sum(parameter.numel() for parameter in self.parameters())


def vocabulary_hash(model: Path) -> str:
    """Of the tokens and ids of the tokenizer in a Hugging Face directory; "" if it has none."""
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return ""
    vocabulary = AutoTokenizer.from_pretrained(model, local_files_only=True).get_vocab()
    text = json.dumps(sorted(vocabulary.items(), key=lambda item: item[1]), ensure_ascii=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def save_path_network(network: PathNetwork, folder: Path, facts: dict[str, Any]) -> None:
    """Writes `path_predictor.safetensors`, in bfloat16, and `path_predictor.json` with the shape and `facts` (plain values). The
    json, which names the weights it belongs to, comes last: a reader sees the old pair, the new one, or that they do not fit."""
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in _parameters(network).items()}
    weights = save(tensors, metadata={"format": "pt"})
    content = {"version": _VERSION, "weights": _digest(weights), "shape": asdict(network.shape), "facts": facts}
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_bytes(folder / WEIGHTS_FILE, weights)
    write_text(folder / FACTS_FILE, text)


def load_path_network(
    folder: Path, *, num_layers: int, num_experts: int, top_k: int, vocab_size: int
) -> PathNetwork | None:
    """The path predictor beside a checkpoint, in eval mode and float32; None if there is none.

    Raises:
        ValueError: it was made for another model, or the files are damaged or not of one pair; names file and field.
    """
    facts_file = folder / FACTS_FILE
    if not facts_file.is_file():
        return None
    shape, digest = _read_facts(facts_file)
    model: dict[str, Any] = {
        "num_layers": num_layers,
        "num_experts": num_experts,
        "top_k": top_k,
        "vocab_size": vocab_size,
        "vocabulary": vocabulary_hash(folder),
    }
    for name, wanted in model.items():
        made_for = getattr(shape, name)
        # without a tokenizer nobody can say that it is another one
        if made_for != wanted and not (name == "vocabulary" and "" in (made_for, wanted)):
            raise ValueError(
                f"{facts_file}: {name} is {made_for!r}, but the model's is {wanted!r}: this predictor was made for another model. "
                "Train one with raymoe predictor train, or delete the file."
            )
    weights_file = folder / WEIGHTS_FILE
    if not weights_file.is_file():
        raise ValueError(f"{facts_file}: {WEIGHTS_FILE} is missing beside it; run raymoe predictor train again")
    content = weights_file.read_bytes()
    if _digest(content) != digest:
        raise ValueError(
            f"{weights_file}: damaged, or of another run than {FACTS_FILE}; run raymoe predictor train again"
        )
    network = PathNetwork(shape)
    try:
        tensors = {name: tensor.float() for name, tensor in load(content).items()}
        network.load_state_dict(tensors, strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights_file}: does not hold what {FACTS_FILE} says: {str(error)[:200]}") from None
    missing = _parameters(network).keys() - tensors.keys()
    if missing:
        raise ValueError(f"{weights_file}: {len(missing)} tensors are missing, the first is '{min(missing)}'")
    return network.eval()


def _read_facts(file: Path) -> tuple[PathShape, str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version, shape, digest = content["version"], content["shape"], content["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a path predictor's description: {error!r}") from None
    if version != _VERSION:
        raise ValueError(f"{file}: version is {version!r}, this raymoe reads {_VERSION}; train it again")
    known = get_type_hints(PathShape)
    if not isinstance(shape, dict) or shape.keys() != known.keys():
        raise ValueError(f"{file}: shape must have exactly the fields {', '.join(known)}")
    for name, kind in known.items():
        value = shape[name]
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 1):
            raise ValueError(f"{file}: shape.{name} is {value!r}")
    return PathShape(**shape), digest


def _parameters(network: PathNetwork) -> dict[str, Tensor]:
    """By name, each tensor once: T5 shares its embedding between encoder and decoder."""
    return {name: parameter.data for name, parameter in network.named_parameters()}


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()
