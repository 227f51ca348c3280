"""Python imports this module where its folder is on PYTHONPATH: workers then compute on the CPU, whatever is visible.

So tests of what happens around GPUs, such as their leases, need none.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

DEVICE = "seqmill.embedding.device"


class OnCpu:
    """Finds the module that chooses the device, and replaces the choice once it is loaded."""

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != DEVICE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_replace(module: ModuleType) -> None:
            load(module)
            module.choose_device = lambda device: module.torch.device("cpu")

        spec.loader.exec_module = load_and_replace
        return spec


sys.meta_path.insert(0, OnCpu())
