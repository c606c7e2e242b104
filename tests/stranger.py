"""How a process of the tests is kept from importing regard, and how its results compare with those of another."""

from typing import Any

import pytest

WITHOUT_REGARD = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("regard", "regard_cli"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
try:
    import regard
    sys.exit("regard is there")
except ModuleNotFoundError:
    pass
"""


def approximately(value: Any) -> Any:
    """Equal to the same in another process, which may round the last digits of a sum otherwise."""
    if isinstance(value, dict):
        return {name: approximately(part) for name, part in value.items()}
    if isinstance(value, list):
        return [approximately(part) for part in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
