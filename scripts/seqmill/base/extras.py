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
EXTRA_OF = {module: extra for extra, packages in EXTRAS.items() for module in packages}


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
        if module not in EXTRA_OF:
            raise
        raise SeqmillError(_advice([module])) from None


def require_modules(*names: str) -> None:
    """Raise a SeqmillError that names the extras to install if modules of `EXTRAS` are missing; import none."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise SeqmillError(_advice(missing))


def _advice(modules: list[str]) -> str:
    packages = " and ".join(EXTRAS[EXTRA_OF[module]][module] for module in modules)
    extras = ",".join(sorted({EXTRA_OF[module] for module in modules}))
    return f"this needs {packages}: pip install 'seqmill[{extras}]'"
