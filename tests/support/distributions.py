"""Builds wheels and source distributions from a copy of the sources."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline import REPOSITORY

FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "Snakefile")
FOLDERS = ("config", "envs", "profiles", "report", "rules", "scripts", "tests/data")


def copy_sources(folder: Path) -> Path:
    """Copy what a wheel is built from, without what an earlier build has left."""
    for name in FILES:
        shutil.copy(REPOSITORY / name, folder)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
    return folder


def build_sdist(sources: Path) -> Path:
    command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')"]
    subprocess.run(command, cwd=sources, check=True, capture_output=True)
    (archive,) = (sources / "dist").iterdir()
    return archive


def build_wheel(source: Path, target: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel in `target` from a folder or a source distribution; return it and pip's output."""
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--verbose", "--wheel-dir", target]
    command = [sys.executable, "-m", "pip", "wheel", *options, source]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=-1, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    (wheel,) = target.iterdir()
    return wheel, done.stdout
