"""The Ray Serve application: an OpenAI API over engines whose experts come through a cache.

`serve run raymoe.serving:build_app model=DIR` and `with raymoe.serving.serving(config) as url:`. Nothing heavy is imported
before one of the two is used.
"""

from raymoe.lazy import lazy_exports

_HOMES = {"build_app": "app", "serving": "run"}

__all__ = list(_HOMES)
__getattr__ = lazy_exports(__name__, _HOMES)
