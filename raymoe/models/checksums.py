"""Checksums of a checkpoint's experts in a file beside it, so that corrupt bytes are found when an expert is read."""

import json
from pathlib import Path

from raymoe.models.config_file import one_line

CHECKSUMS = "experts.crc32.json"
_VERSION = 1

Checksums = dict[tuple[str, int | None], int]
"""CRC-32 of the bytes in the file, by (tensor, row along the first dimension); None: of the whole tensor."""


def read_checksums(path: Path) -> Checksums:
    """Those of a Hugging Face directory; none if it has no such file.

    Raises:
        ValueError: the file is not one of ours; names it.
    """
    file = path / CHECKSUMS
    if not file.is_file():
        return {}
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        if held["version"] != _VERSION:
            raise ValueError(f"version {held['version']}")
        found: Checksums = {}
        for name, sums in held["crc32"].items():
            for row, text in enumerate(sums) if isinstance(sums, list) else [(None, sums)]:
                found[name, row] = int(text, 16)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: not checksums that this version of raymoe reads ({one_line(error)}); remove it to read without them"
        ) from None
    return found


def write_checksums(path: Path, checksums: Checksums) -> None:
    """Writes them into a directory; where a tensor has rows, all of them are there."""
    held: dict[str, str | list[str]] = {}
    for (name, row), value in sorted(checksums.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        text = f"{value:08x}"
        if row is None:
            held[name] = text
            continue
        rows = held.setdefault(name, [])
        assert isinstance(rows, list)
        assert len(rows) == row, f"{name}: row {len(rows)} has no checksum"
        rows.append(text)
    (path / CHECKSUMS).write_text(json.dumps({"version": _VERSION, "crc32": held}) + "\n", encoding="utf-8")
