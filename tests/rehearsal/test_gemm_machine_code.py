"""Machine code of the products with epilogues, by model and kind of GPU; Triton's compiler needs no GPU.

`python tests/rehearsal/test_gemm_machine_code.py` prints the table.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from seqmill.model.kernels import gemm_triton  # noqa: E402
from seqmill.model.kernels.gemm_triton import GELU, NONE, ROTATION  # noqa: E402

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_KILOBYTES = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}  # that one block can have
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
ASYNCHRONOUS_LOADS = {80: "LDGSTS", 86: "LDGSTS", 90: "UTMALDG", 100: "UTMALDG", 120: "UTMALDG"}
# Epilogue, head dimension, columns, depth. A GELU of other models has the code of 650M's, with other bounds.
SHAPES = [
    (ROTATION, 16, 960, 320),
    (ROTATION, 24, 1440, 480),
    (ROTATION, 32, 1920, 640),
    (ROTATION, 64, 3840, 1280),
    (ROTATION, 128, 15360, 5120),
    (GELU, 0, 1920, 480),
    (GELU, 0, 5120, 1280),
    (NONE, 0, 1280, 5120),
]
CASES = [(gpu, *shape) for gpu in SHARED_KILOBYTES for shape in SHAPES[:: 1 if gpu in (80, 90) else 3]]


@dataclass
class Code:
    """Machine code of a kernel, what it needs, and its PTX."""

    sass: str
    registers: int
    shared: int
    ptx: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.sass))

    @property
    def instructions(self) -> int:
        return len(re.findall(r"/\*[0-9a-f]{4,}\*/\s", self.sass))


def signature(epilogue: str, kind: str, constants: dict[str, Any]) -> dict[str, str]:
    """Return Triton's names of the argument types of a launch, as `gemm_triton._launch` makes them."""
    rows, columns, depth = (constants[f"tile_{name}"] for name in ("rows", "columns", "depth"))
    padded = constants["padded"]
    factors = [f"*{kind}", f"*{kind}"]
    if constants["descriptors"]:
        block = f"{columns // padded},{padded},{depth}" if padded else f"{columns},{depth}"
        factors = [f"tensordesc<{kind}[{rows},{depth}]>", f"tensordesc<{kind}[{block}]>"]
    tables = ["*fp32", "*fp32", "*i64"] if epilogue == ROTATION else ["constexpr"] * 3
    kinds = [*factors, f"*{kind}", *tables, f"*{kind}", "i32"]
    return dict(zip(gemm_triton._product.arg_names, kinds, strict=False))


def compile_product(epilogue: str, head_dim: int, columns: int, depth: int, gpu: int, kind: str = "bf16") -> Code:
    constants = gemm_triton._constants(columns, depth, epilogue, head_dim, gpu)
    kinds = signature(epilogue, kind, constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants |= {name: None for name, kind in kinds.items() if kind == "constexpr"}
    names = gemm_triton._product.arg_names
    source = triton.compiler.ASTSource(
        fn=gemm_triton._product,
        signature=kinds | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in kinds.items() if kind[0] == "*"},
    )
    target = triton.backends.compiler.GPUTarget("cuda", gpu, 32)
    done = triton.compile(source, target=target, options=options)
    cubin = Path(triton.knobs.cache.dir) / "product.cubin"
    cubin.write_bytes(done.asm["cubin"])
    usage = dump(cubin, "--dump-resource-usage")
    registers = re.search(r"REG:(\d+)", usage)
    assert registers
    return Code(dump(cubin, "--dump-sass"), int(registers[1]), done.metadata.shared, done.asm["ptx"])


def dump(cubin: Path, what: str) -> str:
    command = [BINARIES / "cuobjdump", what, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


@pytest.mark.parametrize(("capability", "epilogue", "head_dim", "columns", "depth"), CASES)
def test_a_product_fits_the_gpu_and_uses_its_tensor_cores(
    capability: int, epilogue: str, head_dim: int, columns: int, depth: int
) -> None:
    code = compile_product(epilogue, head_dim, columns, depth, capability)
    assert code.shared <= SHARED_KILOBYTES[capability] * 1024
    assert code.count("LDL") == 0  # no register was spilled and read back
    assert code.count(TENSOR_CORES[capability]) > 0
    assert code.count(ASYNCHRONOUS_LOADS[capability]) > 0
    assert "cvt.rn.bf16x2.f32" in code.ptx
    if head_dim != 24:  # 12 columns are 24 bytes
        assert "st.global.v4.b32" in code.ptx or "st.global.v8.b32" in code.ptx


@pytest.mark.parametrize("capability", [80, 90])
def test_float16_uses_tensor_cores_as_well(capability: int) -> None:
    half = compile_product(ROTATION, 64, 3840, 1280, capability, "fp16")
    assert half.count("LDL") == 0
    assert half.count(TENSOR_CORES[capability]) > 0
    assert "cvt.rn.f16x2.f32" in half.ptx


def test_an_epilogue_costs_few_instructions() -> None:
    """It runs while the tensor cores of its tile wait: 128 elements per thread on sm_90. erf would take 32 each."""
    plain, gelu = (compile_product(epilogue, 0, 5120, 1280, 90).instructions for epilogue in (NONE, GELU))
    rotation = compile_product(ROTATION, 64, 3840, 1280, 90).instructions
    assert gelu - plain < 12 * 128
    assert rotation - plain < 3 * 128


def main() -> None:
    print("| GPU | product | tile, warps, stages | registers | shared memory, KB | instructions |")
    print("|---|---|---|---|---|---|")
    for capability, epilogue, head_dim, columns, depth in CASES:
        code = compile_product(epilogue, head_dim, columns, depth, capability)
        tile = gemm_triton._tile(epilogue, capability)
        shape = f"{tile.rows} x {tile.columns} x {tile.depth}, {tile.warps}, {tile.stages}"
        product = f"{columns} x {depth} {epilogue} {head_dim or ''}".strip()
        cells = [f"sm_{capability}", product, shape, code.registers, f"{code.shared / 1024:.1f}", code.instructions]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        main()
