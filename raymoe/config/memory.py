"""Memory budgets as people write them."""

import re

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_memory(value: str | int, total_bytes: int) -> int:
    """Bytes that a budget stands for: "50%" of `total_bytes`, "512MiB", "1.5GB", or a number of bytes.

    Raises:
        ValueError: not such a budget, or not above 0, or above 100 %.
    """
    text = str(value).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMG]?i?B)?", text, flags=re.IGNORECASE)
    if not match or float(match[1]) <= 0 or (match[2] == "%" and float(match[1]) > 100):
        raise ValueError(
            f"{text!r} is not a memory budget; write a share such as '50%' (up to 100%) or bytes such as '512MiB'"
        )
    number, unit = float(match[1]), match[2]
    return int(total_bytes * number / 100) if unit == "%" else int(number * _UNITS[(unit or "B").upper()])
