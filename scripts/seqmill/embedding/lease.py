"""GPU leases: each worker on a machine takes a visible GPU that no other worker has."""

import errno
import logging
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from seqmill.base.locks import try_lock
from seqmill.base.machine import listed_gpus, visible_gpus
from seqmill.errors import SeqmillError

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.5
OTHERS = 0o077  # mode bits


@contextmanager
def leased_gpu() -> Iterator[str | None]:
    """Hold one of the visible GPUs and make it the only visible one; call this before torch is imported.

    Yield its index or UUID, or None without GPUs. Wait while all GPUs are taken.

    A lease locks a file below the temporary folder and, if it is set, one below XDG_RUNTIME_DIR; the kernel frees the
    lock however the process ends. Two workers of a user see each other's leases if they share either folder, like a
    login shell and a cron job that share /tmp; they do not if each has its own TMPDIR and one has no XDG_RUNTIME_DIR.
    Raise a SeqmillError if there is no XDG_RUNTIME_DIR and the folder belongs to another user or is open to others. A
    worker with one visible GPU has no choice, so it then uses that GPU without a lease.
    """
    gpus = visible_gpus()
    if not gpus:
        yield None
        return
    with ExitStack() as lease:
        try:
            gpu = _leased(gpus, lease)
        except (SeqmillError, OSError) as error:
            if len(gpus) > 1:
                raise
            log.warning("%s; GPU %s is used without a lease: other workers may share it", error, gpu := gpus[0])
        if len(gpus) == 1:
            log.info("GPU %s, the only one visible", gpu)
        else:
            if "CUDA_VISIBLE_DEVICES" not in os.environ:
                os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the index is in nvidia-smi's order
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            log.info("GPU %s of %s", gpu, ", ".join(gpus))
        try:
            yield gpu
        finally:
            log.info("GPU %s is free again", gpu)


def _leased(gpus: list[str], lease: ExitStack) -> str:
    """Return a GPU whose locks are held until `lease` ends."""
    folders, names = _folders(lease), _lock_names(gpus)
    if (gpu := _first_free(names, folders, lease)) is None:
        taken = f"all {len(gpus)} GPUs are" if len(gpus) > 1 else f"GPU {gpus[0]} is"
        log.info("%s taken (%s); waiting", taken, ", ".join(map(str, folders)))
        while (gpu := _first_free(names, folders, lease)) is None:
            time.sleep(WAIT_SECONDS)
    return gpu


def _lock_names(gpus: list[str]) -> dict[str, str]:
    """Return the name of each GPU's lock: its UUID if nvidia-smi tells it, else the GPU as CUDA_VISIBLE_DEVICES has it.

    An index alone would not do: each step of a SLURM job and each container may count its own GPU as 0.
    """
    listed = listed_gpus() if any(not gpu.startswith("MIG-") for gpu in gpus) else []
    names = {}
    for gpu in gpus:
        uuids = (
            listed[int(gpu) : int(gpu) + 1] if gpu.isdecimal() else [uuid for uuid in listed if uuid.startswith(gpu)]
        )
        name = uuids[0] if len(uuids) == 1 and uuids[0] else gpu
        names[gpu] = f"{name.replace('/', '_')}.lock"
    return names


def _folders(lease: ExitStack) -> dict[Path, int]:
    """Open the folders of the locks until `lease` ends; return their descriptors."""
    # GPU indices are specific to a machine, and under SLURM to a job.
    owner = f"{os.getuid()}-{socket.gethostname()}-{os.environ.get('SLURM_JOB_ID', '')}".rstrip("-")
    name, folders = f"seqmill-gpus-{owner}", {}
    # Under sudo and SLURM the variable may name a folder that is absent or belongs to another user.
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if runtime.is_absolute() and _is_private(runtime):
        folders = _opened(runtime / name, lease)
    try:
        folders |= _opened(Path(tempfile.gettempdir(), name), lease)
    except SeqmillError as error:
        if not folders:
            raise
        log.warning("%s; GPU leases use only %s", error, runtime)
    return folders


def _is_private(folder: Path) -> bool:
    try:
        state = folder.stat()
    except OSError:
        return False
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & OTHERS


def _opened(folder: Path, lease: ExitStack) -> dict[Path, int]:
    """Make the folder if it is absent, and open it; another user may have made it, as its name is predictable."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        lease.callback(os.close, descriptor)
        state = os.fstat(descriptor)
        if state.st_uid == os.getuid() and not state.st_mode & OTHERS:
            return {folder: descriptor}
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EACCES):
            raise
    raise SeqmillError(
        f"{folder}: is not a folder of your own that is closed to others (mode 0700), so its locks can't be trusted; "
        "remove it, or set TMPDIR to a folder of your own for all workers"
    )


def _first_free(names: dict[str, str], folders: dict[Path, int], lease: ExitStack) -> str | None:
    """Return the first GPU whose locks, of these names, are free; they are held until `lease` ends."""
    gpus = list(names)
    for gpu, name in names.items():
        with ExitStack() as locks:
            for folder, descriptor in folders.items():
                locked = try_lock(_opened_lock(folder, descriptor, name, locks))
                if locked is None:
                    log.warning(
                        "%s: the file system has no locks: workers may share a GPU; set TMPDIR elsewhere", folder
                    )
                    return gpus[os.getpid() % len(gpus)]  # workers that start together take different GPUs
                if not locked:
                    break
            else:
                lease.push(locks.pop_all())
                return gpu
    return None


def _opened_lock(folder: Path, descriptor: int, name: str, locks: ExitStack) -> int:
    try:
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=descriptor)
    except OSError as error:
        raise SeqmillError(f"{folder / name}: cannot be opened as a lock: {error.strerror}; remove it") from error
    locks.callback(os.close, file)
    return file
