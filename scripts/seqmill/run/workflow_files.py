"""The workflow's own files: Snakefile, rules, profiles, settings."""

from pathlib import Path

from seqmill.errors import SeqmillError

PACKAGE = Path(__file__).absolute().parents[1]


def workflow_folder() -> Path:
    """Return the folder with the Snakefile: seqmill/workflow in a wheel, else the repository."""
    installed = PACKAGE / "workflow"
    return installed if installed.exists() else PACKAGE.parents[1]


def write_profile(folder: Path) -> Path:
    """Write a copy of the SLURM profile, to edit, into a folder; raise a SeqmillError if it has a profile."""
    path = folder / "profile.yaml"
    text = (workflow_folder() / "profiles/slurm/profile.yaml").read_text(encoding="utf-8")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        if not folder.is_dir():
            raise SeqmillError(f"{folder}: no profile can be written there: it is a file") from error
        raise SeqmillError(
            f"{path}: exists already, and may hold your settings: give another folder, or remove it"
        ) from error
    except OSError as error:
        raise SeqmillError(f"{folder}: no profile can be written there: {error.strerror}") from error
    return path


def demo_fasta() -> Path:
    """Return the demo's proteins: the 85 of the chloroplast genome of Arabidopsis thaliana (NCBI RefSeq NC_000932)."""
    return workflow_folder() / "tests/data/NC_000932.faa"
