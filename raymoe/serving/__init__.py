"""The Ray Serve application: an OpenAI API over engines whose experts come through a cache.

`serve run raymoe.serving:build_app model=DIR` and `with raymoe.serving.serving(config) as url:`. Nothing heavy is imported
before one of the two is used.
"""

from typing import Any

__all__ = ["build_app", "serving"]


def __getattr__(name: str) -> Any:
    if name == "build_app":
        from raymoe.serving.app import build_app

        return build_app
    if name == "serving":
        from raymoe.serving.run import serving

        return serving
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
