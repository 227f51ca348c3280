"""Adds the workflow and the compiled C kernels to the wheel; pyproject.toml says everything else about the package.

Editable installs get neither: the workflow is in the repository (`run.workflow_files`), and `compiled.load` compiles at
first use, from sources that may change.
"""

import platform
import runpy
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

REPOSITORY = Path(__file__).absolute().parent
WORKFLOW = ("Snakefile", "config", "envs", "profiles", "report", "rules", "tests/data")  # and the launchers in scripts/
# In the repository the package is next to its launchers. In the wheel this module is, and loads the package that they
# belong to: under --software-deployment-method conda they run with a Python that has no seqmill.
BESIDE_LAUNCHERS = '''"""Loads the package seqmill that these launchers belong to, whatever Python runs them."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

spec = spec_from_file_location("seqmill", Path(__file__).absolute().parents[2] / "__init__.py")
sys.modules["seqmill"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["seqmill"])
'''
FOLDER = "seqmill/model/kernels"
# Not imported: seqmill's dependencies are absent when a wheel is built.
kernels = runpy.run_path(str(REPOSITORY / "scripts" / FOLDER / "build.py"))
HERE = platform.machine() if platform.system() == "Linux" else ""  # the kernels are for Linux alone
KERNELS = [name for name, kernel in kernels["KERNELS"].items() if kernel.machine == HERE]


class BuildAll(build_py):
    """Copies the package and the workflow, then compiles what the compiler can of this machine's kernels."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_workflow(Path(self.build_lib, "seqmill/workflow"))
            self.compile_kernels(Path(self.build_lib, FOLDER))

    def copy_workflow(self, folder: Path) -> None:
        """Copy the workflow's files, with the same paths as in the repository."""
        shutil.rmtree(folder, ignore_errors=True)  # from an earlier build in the same folder
        launchers = [f"scripts/{path.name}" for path in (REPOSITORY / "scripts").glob("*.py")]
        for name in (*WORKFLOW, *launchers):
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy(REPOSITORY / name, folder / name)
        (folder / "scripts/seqmill.py").write_text(BESIDE_LAUNCHERS)

    def compile_kernels(self, folder: Path) -> None:
        """Leave out a kernel that can't be compiled, with a warning: it is compiled at first use if possible."""
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


setup(distclass=WithKernels, cmdclass={"build_py": BuildAll, "bdist_wheel": PlatformWheel})
