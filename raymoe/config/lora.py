"""Low-rank adapters in place of full fine-tuning."""

from pathlib import Path

from pydantic import Field, model_validator

from raymoe.config.base import Strict


class LoraConfig(Strict):
    """LoRA (Hu et al., arXiv 2106.09685): weights stay as they are, and a product B A of low rank is trained beside each."""

    rank: int = Field(default=8, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(default=16.0, gt=0)
    """B A is added times alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what enters the adapters of attention; experts' adapters are added to their weights, where nothing can be dropped."""
    attention: bool = True
    """Adapters on the linear modules of attention, or on `target_modules`."""
    experts: bool = True
    """Adapters on every expert's matrices; biases stay as they are."""
    target_modules: list[str] | None = None
    """Linear modules that get adapters in place of attention's, by the ends of their names, e.g. [q_proj, v_proj]."""
    adapter: Path | None = None
    """A peft adapter directory whose adapters are trained on; without it they start from `seed`, as no change at all."""

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    @model_validator(mode="after")
    def _trains_something(self) -> "LoraConfig":
        if not self.attention and not self.experts:
            raise ValueError("attention and experts are both false, which leaves nothing to train; set one to true")
        if self.target_modules is not None and not self.attention:
            raise ValueError("target_modules are given but attention: false takes no modules; leave one of the two out")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty; name modules such as q_proj, or set attention: false")
        if self.adapter is not None and not (self.adapter / "adapter_config.json").is_file():
            raise ValueError(f"adapter: no adapter_config.json in {self.adapter}; give a directory that peft has saved")
        return self
