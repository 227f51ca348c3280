"""The kernel in AMX tiles: its machine code, with the tile instructions emulated (tests/support/amx_emulator.c).

The checks (check_*) run in one separate pytest session with the emulator. On a processor with AMX, the tests of the
other files run the kernel as well, without an emulator.
"""

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_alibi_kernels as biases
import test_attention as rotation
import test_cpu_qk_norm as norms
import test_cpu_relative as relative
import torch
from amx_processor import emulated

from seqmill.model.kernels import compiled, cpu

pytestmark = pytest.mark.skipif(
    bool(compiled.why_not("avx512_bf16")),
    reason="only the tiles are emulated, and the processor has no AVX512-BF16, or there is no C compiler",
)
Attend = Callable[[torch.Tensor, list[int]], torch.Tensor]
LENGTHS = [350, 129, 64, 63, 33, 32, 31, 17, 16, 15, 3, 2, 1]
DISTANT = [600, 65, 33, 16, 1]  # the first is long enough for skipped keys


def rotated(qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return rotation.run("amx", qkv, rotation.make_pack(lengths))


def biased(qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return biases.run("amx", qkv, lengths)


def by_distance(qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return relative.run("amx", qkv, relative.make_biases(qkv.shape[2]), lengths)


def normalized(qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return norms.run("amx", qkv, norms.make_norms(qkv[0, 0].numel()), lengths)


@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
def check_agrees_with_attention_written_out(head_dim: int) -> None:
    pack = rotation.make_pack(LENGTHS)
    qkv = rotation.make_qkv(pack, 2, head_dim, torch.bfloat16)
    found, expected = rotated(qkv, LENGTHS), rotation.written_out(qkv, pack)
    for one, other in zip(found.split(LENGTHS), expected.split(LENGTHS), strict=True):
        assert ((one - other).norm() / other.norm()).item() < 6e-3, len(one)


@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
def check_biases_agree_with_attention_written_out(head_dim: int) -> None:
    qkv = biases.make_qkv(DISTANT, 3, head_dim, torch.bfloat16)
    assert biases.worst_error(biased(qkv, DISTANT), qkv, DISTANT) < 3e-3


@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
def check_relative_biases_agree_with_attention_written_out(head_dim: int) -> None:
    qkv, table = relative.make_qkv(LENGTHS, 2, head_dim, torch.bfloat16, spread=20.0), relative.make_biases(2)
    assert relative.worst_error(by_distance(qkv, LENGTHS), qkv, table, LENGTHS) < 3e-3


def check_all_scores_negative_after_an_overflow_show() -> None:
    relative.check_all_negative_scores_show("amx", torch.bfloat16, 1, 40)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(15, 64), (3, 24)])
def check_norms_agree_with_attention_written_out(num_heads: int, head_dim: int) -> None:
    norms.check_agreement("amx", torch.bfloat16, num_heads, head_dim, LENGTHS)


@pytest.mark.parametrize("scale", [0.1, 4.0])  # the larger the scores, the fewer keys are skipped
def check_biases_agree_whatever_the_scores(scale: float) -> None:
    qkv = biases.make_qkv(DISTANT, 3, 64, torch.bfloat16, scale)
    assert biases.worst_error(biased(qkv, DISTANT), qkv, DISTANT) < 3e-3


def check_a_distant_key_that_outweighs_its_bias_is_not_skipped() -> None:
    """The last of 600 keys adds 1,568 to its score with the first query; its distance takes at most 300 off."""
    qkv = biases.make_qkv([600], 8, 64, torch.bfloat16)
    qkv[0, 0] = qkv[-1, 1] = 14.0
    assert torch.equal(biased(qkv, [600])[0], qkv[-1, 2].flatten())


def check_large_scores_do_not_overflow() -> None:
    qkv = rotation.make_qkv(rotation.make_pack([200, 33]), 2, 16, torch.bfloat16)
    qkv[:, :2] *= 1000
    found, expected = rotated(qkv, [200, 33]), rotation.written_out(qkv, rotation.make_pack([200, 33]))
    assert found.isfinite().all()
    assert ((found - expected).abs() < 0.02).all(-1).double().mean().item() >= 0.93  # rounding may swap near ties


@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
@pytest.mark.parametrize("attend", [rotated, normalized, biased, by_distance])
def check_a_sequence_has_the_same_bits_in_any_pack(attend: Attend, head_dim: int) -> None:
    qkv = biases.make_qkv(LENGTHS, 2, head_dim, torch.bfloat16)
    together = attend(qkv, LENGTHS).split(LENGTHS)
    for sequence, expected in zip(qkv.split(LENGTHS), together, strict=True):
        assert torch.equal(attend(sequence.contiguous(), [len(sequence)]), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("attend", [rotated, normalized, biased, by_distance])
def check_nonfinite_values_affect_their_own_sequence_and_no_other(attend: Attend, part: int, value: float) -> None:
    lengths = [40, 300, 9]
    qkv = biases.make_qkv(lengths, 2, 64, torch.bfloat16)
    qkv[330, part, 0, 3] = value
    first, second, third = attend(qkv, lengths).split(lengths)
    assert first.isfinite().all()
    assert third.isfinite().all()
    rows = second.isfinite().all(dim=1)
    if (
        part == 1 and value == float("inf") and attend in (rotated, biased)
    ):  # its weight is 0 for queries of the other sign, as in PyTorch
        assert not rows.all()
    else:
        assert not rows[290]
        assert rows.any() == (part == 0)  # the query's own row; all rows for a key or a value


def check_threads_shape_their_own_tiles_and_leave_none() -> None:
    emulator = ctypes.CDLL(None)
    emulator.amx_executed.restype = ctypes.c_long
    packs = [biases.make_qkv(LENGTHS, 2, head_dim, torch.bfloat16) for head_dim in (16, 64, 24, 128)]
    alone = [rotated(qkv, LENGTHS) for qkv in packs]

    def work(qkv: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        return rotated(qkv, LENGTHS), emulator.amx_executed(), emulator.amx_configured()

    with ThreadPoolExecutor(len(packs)) as pool:
        for (found, executed, configured), expected in zip(pool.map(work, packs), alone, strict=True):
            assert torch.equal(found, expected)
            assert executed > 1000
            assert not configured


def check_it_is_chosen() -> None:
    assert rotation.choose_kernel(rotation.CPU, torch.bfloat16, 24) == "amx"
    assert biases.choose_kernel(rotation.CPU, torch.bfloat16, 64) == "amx"
    assert not compiled.why_not("amx")


@pytest.mark.full
def test_the_kernel_with_emulated_tiles(tmp_path: Path) -> None:
    plugins = ("-p", "amx_processor", "-p", "no:cacheprovider", "-p", "no:faulthandler")  # it would take SIGILL
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "-o", "python_functions=check_*", __file__]
    done = subprocess.run(command, env=emulated(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d{2} passed(, \d+ warnings?)? in", done.stdout, re.MULTILINE), done.stdout


def test_without_permission_another_kernel_is_used(tmp_path: Path) -> None:
    code = (
        "import logging, amx_processor, torch; logging.basicConfig(); amx_processor.pretend()\n"
        "from seqmill.model import alibi, attention\n"
        "for family in (attention, alibi):\n"
        "    print(family.choose_kernel(torch.device('cpu'), torch.bfloat16, 64))\n"
        "    print(family.why_not('amx', torch.device('cpu'), torch.bfloat16, 64))\n"
    )
    environment = emulated(tmp_path, AMX_REFUSED="22")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    reason = "Linux does not let this process use AMX tiles (Invalid argument)"
    assert done.stdout.splitlines() == ["avx512_bf16", reason] * 2
    assert done.stderr.count(f"attention avx512_bf16 is used instead of amx: {reason}") == 1


# C statements and the emulator's answer. Case 0 has no permission; the answer to the last two is none.
LOAD = "_tile_loadconfig(&shapes);"
CASES = [
    (LOAD, "ldtilecfg: the process has no permission to use tiles"),
    ("_tile_zero(0);", "tilezero: no tiles are configured"),
    (f"shapes.palette = 2; {LOAD}", "ldtilecfg: the palette is neither 0 nor 1"),
    (f"shapes.rows[2] = 17; {LOAD}", "ldtilecfg: a tile has more than 16 rows"),
    (f"shapes.row_bytes[2] = 0; {LOAD}", "ldtilecfg: a tile has rows or bytes but not both"),
    (f"shapes.rows[7] = shapes.row_bytes[7] = 0; {LOAD} _tile_zero(7);", "tilezero: the tile is not configured"),
    (f"shapes.rows[0] = 8; {LOAD} _tile_dpbf16ps(0, 1, 2);", "the sums have not as many rows as the first factor"),
    (f"shapes.row_bytes[1] = 32; {LOAD} _tile_dpbf16ps(0, 1, 2);", "the first factor has not as many pairs as the"),
    (f"shapes.row_bytes[0] = 32; {LOAD} _tile_dpbf16ps(0, 1, 2);", "the sums have not as many columns as the second"),
    (f"{LOAD} _tile_release(); _tile_stored(0, sums, 64);", "tilestored: no tiles are configured"),
    # Even products: 2^24 - 2^24; odd products: 1 + 0. Summed in one order, the 1 would be lost.
    (f"x[0][0] = 0x4b80; x[0][1] = 0x3f80; x[0][2] = 0xcb80; {LOAD} {{multiply}} if (sums[0][5] != 1) return 1;", ""),
    # The products are summed before they are added to 2^24; a denormal number (x[1]) counts as 0, a NaN stays.
    (
        "for (int n = 0; n < 16; n++) sums[0][n] = sums[1][n] = 0x1p24f; x[0][1] = x[0][3] = 0x3f80;"
        f"x[1][0] = 1; y[0][14] = 0x7f7f; x[2][1] = 0x7fc0; {LOAD} {{multiply}}"
        "if (sums[0][5] != 0x1p24f + 2 || sums[1][7] != 0x1p24f || !(sums[2][3] != sums[2][3])) return 1;",
        "",
    ),
]
MULTIPLY = (
    "_tile_loadd(0, sums, 64); _tile_loadd(1, x, 64); _tile_loadd(2, y, 64); _tile_dpbf16ps(0, 1, 2);"
    "_tile_stored(0, sums, 64); _tile_release();"
)
PROGRAM = """
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
struct { uint8_t palette, rest[15]; uint16_t row_bytes[16]; uint8_t rows[16]; } shapes = {.palette = 1};
float sums[16][16];
uint16_t x[16][32], y[16][32];
int main(int count, char **words) {
    int number = atoi(words[count - 1]);
    for (int i = 0; i < 8; i++) shapes.rows[i] = 16, shapes.row_bytes[i] = 64;
    for (int i = 0; i < 512; i++) y[i / 32][i % 32] = 0x3f80;
    if (number > 0 && syscall(SYS_arch_prctl, 0x1023, 18)) return 2;
    switch (number) { CASES }
    return 0;
}
"""


@pytest.fixture(scope="module")
def misuse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A program that executes one of CASES, and its environment with the emulator."""
    folder = tmp_path_factory.mktemp("misuse")
    cases = "".join(
        f"case {number}: {{ {code.replace('{multiply}', MULTIPLY)} break; }}" for number, (code, _) in enumerate(CASES)
    )
    (folder / "misuse.c").write_text(PROGRAM.replace("CASES", cases))
    flags = ("-O0", "-mamx-tile", "-mamx-bf16")  # optimized, stores might come after the tile instructions
    command = [os.environ.get("CC", "cc"), *flags, folder / "misuse.c", "-o", folder / "misuse"]
    subprocess.run(command, check=True)
    return folder / "misuse", emulated(folder)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_emulator_follows_the_manual(misuse: tuple[Path, dict[str, str]], number: int) -> None:
    program, environment = misuse
    done = subprocess.run([program, str(number)], env=environment, capture_output=True, text=True)
    message = CASES[number][1]
    assert (done.returncode == 0) == (message == ""), done
    assert message in done.stderr
