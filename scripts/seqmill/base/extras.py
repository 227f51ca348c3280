"""Optional packages: `pip install seqmill` reads results; the extras of pyproject.toml bring what the rest needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from seqmill.errors import SeqmillError

# Each extra's modules, with the names of their packages.
EXTRAS = {
    "embed": {
        "esm": "fair-esm",
        "httpx2": "httpx2",
        "huggingface_hub": "huggingface_hub",
        "pynvml": "nvidia-ml-py",
        "safetensors": "safetensors",
        "tokenizers": "tokenizers",
        "torch": "torch",
        "tqdm": "tqdm",
        "zstandard": "zstandard",
    },
    "workflow": {"jsonschema": "jsonschema", "rich": "rich", "snakemake": "snakemake", "yaml": "pyyaml"},
    "slurm": {"snakemake_executor_plugin_slurm": "snakemake-executor-plugin-slurm"},
    "export": {"anndata": "anndata", "faiss": "faiss-cpu", "pyarrow": "pyarrow"},
}


@contextmanager
def optional_packages() -> Iterator[None]:
    """Name the extra to install if the block imports a package of `EXTRAS` that is missing.

    Raises:
        SeqmillError: instead of the import's ModuleNotFoundError, which stays if the module belongs to no extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        for extra, packages in EXTRAS.items():
            if module in packages:
                raise SeqmillError(f"this needs {packages[module]}: pip install 'seqmill[{extra}]'") from error
        raise


def require_module(name: str) -> None:
    """Raise a SeqmillError that names the extra to install if a module of `EXTRAS` is missing; do not import it."""
    with optional_packages():
        if find_spec(name) is None:
            raise ModuleNotFoundError(name=name)
