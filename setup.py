"""Adds the compiled C kernels to the wheel; pyproject.toml says everything else about the package.

Editable installs get none: `compiled.load` compiles at first use, from sources that may change.
"""

import platform
import runpy
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FOLDER = "seqmill/model/kernels"
# Not imported: seqmill's dependencies are absent when a wheel is built.
kernels = runpy.run_path(str(Path(__file__).parent / "scripts" / FOLDER / "build.py"))
KERNELS = [name for name, kernel in kernels["KERNELS"].items() if kernel.machine == platform.machine()]


class BuildWithKernels(build_py):
    """Copies the package, then compiles what the compiler can of this machine's kernels."""

    def run(self) -> None:
        """Leave out a kernel that can't be compiled, with a warning: it is compiled at first use if possible."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, FOLDER)
        for stale in folder.glob("*.so"):  # from an earlier build in the same folder
            stale.unlink()
        compiler = kernels["find_compiler"]()
        if compiler is None:
            self.warn("no C compiler found: the wheel has no compiled kernels")
            return
        for name in KERNELS:
            command = kernels["compile_command"](compiler, name, folder / kernels["library_file"](name))
            done = subprocess.run([*command, "-s"], capture_output=True, text=True)
            if done.returncode:
                self.warn(f"the wheel has no {name} kernel, because {compiler} can't compile it: {done.stderr}")


class PlatformWheel(bdist_wheel):
    """Tags a wheel with compiled kernels for its platform, but for no Python version: ctypes loads them."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return ("py3", "none", platform); the platform is "any" without compiled kernels."""
        return (self.python_tag, "none", super().get_tag()[2])


class WithKernels(Distribution):
    """Belongs to one platform if kernels can be compiled for it."""

    def has_ext_modules(self) -> bool:
        """Return whether there are kernels for this machine, and a compiler."""
        return bool(KERNELS) and kernels["find_compiler"]() is not None


setup(distclass=WithKernels, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
