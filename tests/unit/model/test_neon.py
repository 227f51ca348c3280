"""The NEON kernel, cross-compiled and run by an emulator, gives the bits of this machine's float32 kernel."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import SUPPORT
from seqmill.model import alibi
from seqmill.model.kernels import compiled, cpu
from seqmill.model.kernels.build import compile_command

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
LENGTHS = np.array([150, 65, 64, 33, 32, 31, 17, 16, 3, 2, 1])
NATIVE = compiled.of_dtype(torch.float32) or ""
pytestmark = [
    pytest.mark.full,  # each process compiles the kernel for Arm
    pytest.mark.skipif(not NATIVE, reason="no float32 kernel for this processor, or no C compiler"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in (COMPILER, EMULATOR)
    ),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program for 64-bit ARM that calls the NEON library's functions."""
    folder = tmp_path_factory.mktemp("neon")
    library, program = folder / "neon.so", folder / "driver"
    subprocess.run(compile_command(COMPILER, "neon", library), check=True)
    command = [COMPILER, SUPPORT / "neon_driver.c", library, f"-Wl,-rpath,{folder}", "-o", program]
    subprocess.run(command, check=True)
    return program


def run(driver: Path, function: str, arrays: list[torch.Tensor | np.ndarray], *numbers: int) -> torch.Tensor:
    """Return the float32 results of a function, one after the other."""
    system = f"/usr/{COMPILER.removesuffix('-gcc')}"  # the C library for ARM
    command = [EMULATOR, "-L", system, driver, function, *map(str, numbers)]
    given = b"".join(np.asarray(array).tobytes() for array in arrays)
    return torch.frombuffer(
        bytearray(subprocess.run(command, input=given, stdout=-1, check=True).stdout), dtype=torch.float32
    )


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The sign and payload of a NaN may differ: processors choose them."""
    expected = expected.flatten()
    assert len(found) == len(expected)
    assert ((found.view(torch.int32) == expected.view(torch.int32)) | (found.isnan() & expected.isnan())).all()


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_attention(driver: Path, head_dim: int, scale: float) -> None:
    num_heads, num_tokens, longest = 3, int(LENGTHS.sum()), int(LENGTHS.max())
    qkv = random(num_tokens, 3, num_heads, head_dim, scale=scale)
    qkv[LENGTHS[0]] = float("nan")
    qkv[LENGTHS[:2].sum()] = float("inf")
    angles = random(longest, head_dim)
    cos, sin, slopes = angles.cos(), angles.sin(), alibi.slopes(num_heads)
    weights, biases = random(2, num_heads * head_dim), random(num_heads, 2 * 40 + 1, scale=scale)
    given = [LENGTHS.cumsum() - LENGTHS, LENGTHS, qkv]
    numbers = (num_tokens, len(LENGTHS), num_heads, head_dim, longest)
    found = run(driver, "rope_attention", [*given, cos, sin], *numbers)
    assert_same_bits(found, cpu.rope_attention(NATIVE, qkv, cos, sin, LENGTHS))
    assert 0 < found.isnan().sum() < found.numel() / 2
    found = run(driver, "alibi_attention", [*given, slopes], *numbers)
    assert_same_bits(found, cpu.alibi_attention(NATIVE, qkv, slopes, LENGTHS))
    found = run(driver, "normalized_rope_attention", [*given, cos, sin, weights], *numbers)
    assert_same_bits(found, cpu.rope_attention(NATIVE, qkv, cos, sin, LENGTHS, (*weights, 1e-5)))
    found = run(driver, "relative_attention", [*given, biases], *numbers[:-1], 40)
    assert_same_bits(found, cpu.relative_attention(NATIVE, qkv, biases, LENGTHS))


@pytest.mark.parametrize("dim", [16, 320, 1280])
@pytest.mark.parametrize(
    ("post", "centered", "with_bias"), [(False, True, True), (True, True, True), (False, False, False)]
)
def test_add_norm(driver: Path, dim: int, post: bool, centered: bool, with_bias: bool) -> None:
    x, delta, weight, bias = random(9, dim, scale=30.0), random(9, dim, scale=5.0), random(dim), random(dim)
    x[1, 3], x[2, 3] = float("nan"), float("inf")
    given = [x, delta, weight, *([bias] if with_bias else [])]
    found = run(driver, "add_norm", given, 9, dim, int(post), int(centered), int(with_bias))
    y = cpu.add_norm(NATIVE, x, delta, weight, bias if with_bias else None, 1e-5, torch.float32, post, centered)
    assert_same_bits(found, torch.cat((x.flatten(), y.flatten())))


@pytest.mark.parametrize("silu", [False, True])
def test_gate(driver: Path, silu: bool) -> None:
    h = random(40, 2 * 320, scale=3.0)
    h[0, 0], h[1, 0], h[2, 0] = float("nan"), float("inf"), -float("inf")
    h[3, :4] = torch.tensor([3e38, -3e38, -88.5, -180.0])
    assert_same_bits(run(driver, "gate", [h], 40, 320, int(silu)), cpu.gate(NATIVE, h, silu))
