"""A real single-node SLURM cluster on the loopback interface, with fake GPUs, started and stopped by the tests."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ETC = Path("/etc/slurm")  # srun inside a job reads this folder and ignores SLURM_CONF
OURS = "# Written by seqmill's tests"
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scontrol", "pgrep", "setpriv")
GPUS = 4
MEMORY_MB = 64000
KILL_WAIT = 15

SLURM_CONF = """{ours}
ClusterName=seqmill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=300
KillWait={kill_wait}
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory={memory} Gres=gpu:{gpus}
PartitionName=gpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
GRES_CONF = """{ours}
AutoDetect=off
NodeName={host} Name=gpu File=/dev/tty[0-{last_gpu}]
"""


def what_is_missing() -> str:
    """Return why no cluster can be started here, or "" if one can."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge procps util-linux"
    if os.getuid():
        return "a SLURM of one's own needs root"
    if any(_runs(daemon) for daemon in ("slurmctld", "slurmd")):
        return "SLURM runs on this machine already"
    absent = [gpu for gpu in range(GPUS) if not Path(f"/dev/tty{gpu}").exists()]
    if absent:
        return f"the pretend GPUs need /dev/tty{absent[0]}"
    return ""


def _runs(daemon: str) -> bool:
    return subprocess.run(["pgrep", "--exact", daemon], stdout=subprocess.DEVNULL).returncode == 0


class Cluster:
    """The cluster. Its files are in `folder`; its configuration is in /etc/slurm until it is stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().partition(".")[0]
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._kept: dict[Path, bytes | None] = {}

    def start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        values = {
            **{"ours": OURS, "host": self.host, "folder": self.folder, "kill_wait": KILL_WAIT, "gpus": GPUS},
            **{"memory": MEMORY_MB, "last_gpu": GPUS - 1, "controller_port": _free_port(), "node_port": _free_port()},
        }
        self._configure(ETC / "slurm.conf", SLURM_CONF.format(**values))
        self._configure(ETC / "gres.conf", GRES_CONF.format(**values))
        key, munge_socket = self.folder / "munge.key", self.folder / "munge.socket"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge_socket}",
            f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        self.wait_until(munge_socket.exists, "munged has no socket")
        self._daemon("slurmctld", "-D", "-i", "-L", f"{self.folder}/slurmctld.log")
        self._daemon("slurmd", "-D", "-L", f"{self.folder}/slurmd.log")
        self.wait_until(lambda: self.node_state() == "idle", "the node is not idle")

    def stop(self) -> None:
        """Cancel all jobs, stop the daemons, and restore the files in /etc/slurm."""
        with suppress(AssertionError):
            self.cancel_all()
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for path, content in self._kept.items():
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)

    def jobs(self) -> dict[str, str]:
        """Return the states of unfinished jobs by id; the id of an array task is ARRAY_TASK."""
        listed = self.control("squeue", "--array", "--noheader", "--format=%i %T").split()
        return dict(zip(listed[::2], listed[1::2], strict=True))

    def has_job_processes(self) -> bool:
        """Return whether the node still runs a job or cleans up after one."""
        return _runs("slurmstepd")

    def state(self, job: str) -> str:
        return self.control("squeue", "--noheader", "--format=%T", f"--jobs={job}", check=False).strip()

    def cancel_all(self) -> None:
        """Cancel all jobs and wait until none is left."""
        self.control("scancel", "--user=root", check=False)
        self.wait_until(lambda: not self.control("squeue", "--noheader", check=False), "jobs are left")

    def node_state(self) -> str:
        return self.control("sinfo", "--noheader", "--format=%T", check=False).strip()

    def control(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        names = ("munged", "slurmctld", "slurmd")
        texts = {name: self.folder / f"{name}.log" for name in names}
        return "\n".join(f"{name}: {path.read_text()[-1500:]}" for name, path in texts.items() if path.exists())

    def wait_until(self, condition: Callable[[], bool], what_if_not: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what_if_not} after {seconds:.0f} s\n{self.logs()}"
            time.sleep(0.1)

    def _configure(self, path: Path, text: str) -> None:
        content = path.read_bytes() if path.exists() else None
        if content is not None and content.startswith(OURS.encode()):
            content = None  # left by a killed test run
        self._kept[path] = content
        path.write_text(text)

    def _daemon(self, *command: str) -> None:
        # Dies with these tests, even if they are killed.
        command = ("setpriv", "--pdeathsig", "TERM", *command)
        with (self.folder / "daemons.out").open("ab") as output:
            self._daemons.append(subprocess.Popen(command, stdout=output, stderr=output))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
