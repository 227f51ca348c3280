# This repository on disk: its package and its settings. Snakemake reads a Snakefile from git file by file, for
# github(...), gh:owner/name@tag, and the like; the package needs its files together.

import io
import os
import sys
import tarfile
import tempfile
from pathlib import Path

import git
from snakemake.exceptions import WorkflowError
from snakemake.sourcecache import HostingProviderFile, LocalGitFile, LocalSourceFile


def unpacked(folder):
    """Return the path of a folder of this repository at its root; a commit in git is unpacked into Snakemake's cache."""
    if isinstance(folder, LocalSourceFile):
        return Path(os.path.normpath(folder.path))
    if isinstance(folder, LocalGitFile):
        repository = git.Repo(folder.repo_path)
    elif isinstance(folder, HostingProviderFile):
        repository = folder.hosted_repo.repo
    else:
        raise WorkflowError(
            f"{folder}: seqmill needs all its files: clone it, or give github(...) or gh:owner/name@tag"
        )
    commit = repository.commit(folder.ref).hexsha
    path = Path(workflow.sourcecache.cache_path, "seqmill", commit)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary, io.BytesIO() as archive:
            repository.archive(archive, commit)
            archive.seek(0)
            with tarfile.open(fileobj=archive) as tar:
                tar.extractall(f"{temporary}/whole", filter="data")
            try:
                os.rename(f"{temporary}/whole", path)
            except OSError:
                if not path.exists():  # else another process was first
                    raise
    return path


REPOSITORY = unpacked(workflow.current_basedir.join(".."))
sys.path.insert(0, str(REPOSITORY / "scripts"))
