"""The workflow's own files: Snakefile, rules, profiles, settings."""

from pathlib import Path

PACKAGE = Path(__file__).absolute().parents[1]


def workflow_folder() -> Path:
    """Return the folder with the Snakefile: seqmill/workflow in a wheel, else the repository."""
    installed = PACKAGE / "workflow"
    return installed if installed.exists() else PACKAGE.parents[1]


def demo_fasta() -> Path:
    """Return the demo's proteins: the 85 of the chloroplast genome of Arabidopsis thaliana (NCBI RefSeq NC_000932)."""
    return workflow_folder() / "tests/data/NC_000932.faa"
