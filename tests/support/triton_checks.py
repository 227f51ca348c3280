"""Ways to test Triton kernels without a GPU: with its interpreter, and with its compiler."""

import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest


def run_in_the_interpreter(test_file: str) -> None:
    """Run the checks (check_*) of a test file in a separate pytest session; at least ten must run, and all must pass.

    The interpreter must be chosen before Triton is imported.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "python_functions=check_*",
        test_file,
    ]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d{2} passed(, \d+ warnings?)? in", done.stdout, re.MULTILINE), done.stdout


def widen_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widen bfloat16 factors: the interpreter would multiply the uint16 that it stores (triton issue 11584)."""
    import triton.language as tl
    from triton.runtime import interpreter

    product = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        return product(builder, widened(a), widened(b), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def compiled(
    kernel: Any, pointers: dict, scalars: dict, constants: dict, capability: int, options: dict | None = None
) -> str:
    """Compile to machine code for a GPU, as a launch with these arguments would; return the PTX."""
    import triton
    from triton.backends.compiler import GPUTarget

    signature = (
        {f"{name}_start": kind for name, kind in pointers.items()} | scalars | dict.fromkeys(constants, "constexpr")
    )
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(list(signature).index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in range(len(pointers))},
    )
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert result.asm["cubin"]
    return result.asm["ptx"]
