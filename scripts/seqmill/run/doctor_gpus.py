"""Examines the machine's GPUs: the driver, and whether the installed torch fits it; imports no torch."""

from seqmill.base.cuda import INSTEAD, installed_torch, is_too_old, too_old_gpus, why_unusable
from seqmill.base.machine import driver_version, visible_gpus
from seqmill.base.words import many


def describe_gpus() -> str:
    """Return a line about the visible GPUs, judged by versions alone; empty without GPUs."""
    gpus = visible_gpus()
    if not gpus:
        return ""
    found, driver = installed_torch(), driver_version()
    visible = f"{many(len(gpus), 'GPU')} visible, driver {driver or 'unknown'}"
    if found is None:
        return f"{visible}; torch is not installed here"
    version, cuda = found
    if not driver or not cuda or is_too_old(driver, cuda):
        return why_unusable(gpus, version, cuda)
    if old := too_old_gpus(cuda):
        remedy = f"install a torch wheel for an older CUDA, or {INSTEAD}"
        return f"{visible}; too old for torch {version} with CUDA {cuda}: {', '.join(old)}; {remedy}"
    return f"{visible}; torch {version} with CUDA {cuda} fits the driver"
