#!/usr/bin/env python3
"""Say which packages of the campaign are missing, and what is left out then; fail without torch or a GPU."""

import sys
from importlib.util import find_spec

REQUIRED = ("torch", "numpy")
LEFT_OUT = {
    "triton": "our kernels (slower forms run instead)",
    "h5py": "tests/gpu, the runs from FASTA, the asynchronous runner, and the second call",
    "msgspec": "tests/gpu, the runs from FASTA, and the second call",
    "pytest": "tests/gpu",
    "xdist": "nothing, but tests/gpu runs one test after another",
    "tokenizers": "runs of DNABERT-S from FASTA",
    "transformers": "the comparison with transformers",
    "esm": "the comparison with fair-esm",
    "pynvml": "the GPU's utilization and power",
}


def main() -> None:
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        sys.exit(f"nothing can run; not installed: {', '.join(missing)}")
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, what in LEFT_OUT.items():
        if find_spec(name) is None:
            print(f"{name} is not installed. Left out: {what}.")


if __name__ == "__main__":
    main()
