"""In what experts are kept, as people write it."""

from dataclasses import dataclass

_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Precision:
    """What a tier holds an expert's weights as; biases stay as they are."""

    kind: str = "native"
    """native (the dtype of the computation, exact) | bf16 | int8 | int4."""
    group: int = 64
    """Of int4: weights along a row that share a scale."""

    @classmethod
    def parse(cls, text: str) -> "Precision":
        """`native`, `bf16`, `int8`, `int4`, or `int4:32` with the size of a group.

        Raises:
            ValueError: none of these.
        """
        kind, colon, group = text.partition(":")
        if kind in ("native", "bf16", "int8") and not colon:
            return cls(kind)
        if kind == "int4" and (not colon or (group.isdigit() and int(group) in _GROUPS)):
            return cls(kind, int(group) if colon else cls.group)
        sizes = ", ".join(f"int4:{size}" for size in _GROUPS)
        raise ValueError(
            f"{text!r} is no precision of experts; use native, bf16, int8, int4, or with the size of a group {sizes}"
        )

    def __str__(self) -> str:
        return f"int4:{self.group}" if self.kind == "int4" else self.kind

    @property
    def is_lossy(self) -> bool:
        """Whether tokens may differ from those of the checkpoint."""
        return self.kind != "native"
