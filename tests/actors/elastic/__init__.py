import pytest

pytest.register_assert_rewrite(f"{__name__}.runs", f"{__name__}.leftovers")
