"""Every model, precision, and kernel with tensors without values: shapes, dtypes, devices, and no waiting."""

import numpy as np
import pytest
import torch

from fake_cuda import DEVICE, Counted, HostWaits, fake_cuda, launched_kernels
from fake_models import Way, all_ways, fake_pack
from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.readout import Vectors
from seqmill.model.elementwise import TRITON
from seqmill.model.pack import Windows
from seqmill.spec.outputs import Outputs

SMALLEST = ("esm2_t6_8M_UR50D", "esmc_300m", "prott5_xl_u50", "dnabert_s")  # of each family
LENGTHS = [1024, 700, 350, 350, 129, 64, 3]
OUTPUTS = [
    Outputs((2,)),
    Outputs((1, 2), ("mean", "std"), "float16"),
    Outputs((2,), ("mean",), "float32"),
]


def check_all_outputs(way: Way) -> None:
    """Compute a pack with each kind of output, and windows that are blended: by the smallest models, as any would."""
    ends = way.family.before + way.family.after
    for outputs in (way.all_outputs, *OUTPUTS):
        if outputs.per_residue and not way.family.is_protein:
            continue
        embed = way.embedder(outputs, num_layers=2)
        check(embed(fake_pack(LENGTHS)), len(LENGTHS), sum(LENGTHS) - ends * len(LENGTHS), outputs, embed)
        if way.model in SMALLEST and way.family.is_protein and way.attention != "sdpa":
            windows = Windows(np.array([0, 3, 4, 7]), 150)
            found = embed(fake_pack([length + ends for length in (300, 300, 248, 300, 300, 300, 198)], windows))
            check(found, 3, 548 + 300 + 498, outputs, embed)


def check(found: Vectors, num_rows: int, num_residues: int, outputs: Outputs, embed: PackEmbedder) -> None:
    dim = embed.architecture.hidden_dim
    widths = {"std": 2}
    assert found.rows.shape == (num_rows, len(outputs.layers) * dim * sum(widths.get(p, 1) for p in outputs.poolings))
    assert found.rows.dtype == torch.float32
    assert found.rows.device == DEVICE
    if outputs.per_residue:
        assert found.residues.shape == (num_residues, len(outputs.layers) * dim)
        assert found.residues.dtype == getattr(torch, outputs.per_residue)
        assert found.residues.device == DEVICE


@pytest.mark.parametrize("way", all_ways(), ids=str)
def test_a_way_to_compute_has_the_right_shapes_and_never_waits(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch):
        check_all_outputs(way)


def test_every_kernel_of_the_package_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as counted:
        for way in all_ways():
            if way.model in SMALLEST and way.elementwise == TRITON:
                check_all_outputs(way)
    assert {f"{launch.module}.{launch.kernel}" for launch in counted.triton} == launched_kernels()


def test_waiting_and_mixed_devices_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the tests above."""
    with fake_cuda(monkeypatch):
        x = torch.empty(4, 4, device=DEVICE)
        for wait in (
            lambda: x.cpu(),
            lambda: x.sum().item(),
            lambda: bool(x.any()),
            lambda: x.nonzero(),
            lambda: torch.empty(4).to(DEVICE),
            lambda: x.tolist(),
            lambda: x + torch.empty(4, 4),
            lambda: torch.repeat_interleave(x, torch.empty(4, dtype=torch.int64, device=DEVICE), dim=0),
        ):
            with pytest.raises((HostWaits, RuntimeError, ValueError)):
                wait()


def test_launches_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as counted:
        x = torch.empty(8, 4, device=DEVICE)
        y = (x @ x.t()).relu_()
        y[1:3].view(-1)
    assert counted == Counted(counted.launches, counted.bytes, 2 * 8 * 8 * 4, [])
    assert dict(counted.launches) == {"mm": 1, "relu_": 1}
    assert counted.bytes == {"mm": 4 * (2 * 32 + 64), "relu_": 4 * 2 * 64}
