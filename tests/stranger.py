"""How a process of the tests is kept from importing regard."""

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
