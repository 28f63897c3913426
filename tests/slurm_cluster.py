"""A real Slurm of one node for tests: munged, slurmctld, slurmd with files and ports of their own.

Nothing of it touches another Slurm of the machine: the key, the sockets, the state and the
configuration lie in one directory, which every command finds by ``SLURM_CONF``.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sacct")
"""What must be installed: Debian's packages slurm-wlm and munge."""

NODE = "localhost"
_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
_LOOK_SECONDS = 0.05
_COMMAND_SECONDS = 120.0

_CONFIGURATION = """\
ClusterName=orchestrator-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
# as quick as it can: a site has 3 s and 30 s here
SchedulerParameters=batch_sched_delay=0,bf_interval=1
ReturnToService=2
KillWait=5
MessageTimeout=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
DefMemPerCPU=100
# more processors than the machine has: the jobs of these tests wait more than they compute
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""


def missing_program() -> str | None:
    """Name a program that is not installed, if there is one."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return next((name for name in PROGRAMS if shutil.which(name, path=path) is None), None)


class SlurmCluster:
    """A Slurm that is up; its daemons may be stopped and started again."""

    def __init__(self, directory: Path, cpus: int) -> None:
        self.directory = directory
        self.configuration = directory / "slurm.conf"
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        self.environment = {**os.environ, "SLURM_CONF": str(self.configuration), "PATH": path}
        self._cpus = cpus
        self._old: set[str] = set()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # --- life

    def start(self) -> None:
        """Bring it up; returns when the node takes jobs."""
        self.directory.mkdir(parents=True, exist_ok=True)
        # munged wants a way to its socket that everybody may go
        self.directory.chmod(0o755)
        (self.directory / "state").mkdir()
        (self.directory / "spool").mkdir()
        devices = [self.directory / f"gpu{number}" for number in range(2)]
        for device in devices:
            device.touch()
        (self.directory / "gres.conf").write_text(
            "".join(f"NodeName={NODE} Name=gpu File={device}\n" for device in devices)
        )
        host = socket.gethostname().partition(".")[0]
        controller_port, node_port = _free_ports(2)
        self.configuration.write_text(
            _CONFIGURATION.format(
                host=host,
                controller_port=controller_port,
                node_port=node_port,
                user=getpass.getuser(),
                directory=self.directory,
                node=NODE,
                cpus=self._cpus,
            )
        )
        self._start_munged()
        self.start_controller()
        self._start("slurmd", "-D", "-N", NODE, "-f", str(self.configuration))
        _wait(lambda: self.node_state() == "idle", "the node is idle", self.log)

    def stop(self) -> None:
        """End everything, jobs included; leaves no process."""
        for name in ("slurmctld", "slurmd"):
            self.stop_daemon(name)
        # what slurmd left: the keepers of its jobs, and the jobs
        deadline = time.monotonic() + _STOP_SECONDS
        while leftovers := self.processes():
            for process in leftovers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if time.monotonic() > deadline:
                raise AssertionError(f"processes of Slurm can't be ended: {leftovers}")
            psutil.wait_procs(leftovers, timeout=1)
        self.stop_daemon("munged")

    def processes(self) -> list[psutil.Process]:
        """Return all processes that belong to this Slurm, but for munged and the tests."""
        mark = str(self.configuration)
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                is_ours = process.environ().get("SLURM_CONF") == mark
                if is_ours and process.pid != os.getpid() and process.name() != "munged":
                    found.append(process)
        return found

    def start_controller(self) -> None:
        """Start slurmctld; returns when it answers."""
        self._start("slurmctld", "-D", "-f", str(self.configuration))
        _wait(lambda: self._run("scontrol", "ping").returncode == 0, "slurmctld answers", self.log)

    def stop_controller(self) -> None:
        """End slurmctld in good order, as its service unit does."""
        self.stop_daemon("slurmctld")

    def kill_controller(self) -> None:
        """End slurmctld as a crash would."""
        self._daemons["slurmctld"].kill()
        self.stop_daemon("slurmctld")

    def stop_daemon(self, name: str) -> None:
        """End a daemon and wait for its end; no error if it does not run."""
        process = self._daemons.pop(name, None)
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # --- what tests ask and do

    def command(self, *words: str) -> str:
        """Run one of Slurm's programs; returns what it printed, fails the test if it failed."""
        done = self._run(*words)
        assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
        return done.stdout

    def node_state(self) -> str:
        """Return the node's state in Slurm's word, as ``idle``."""
        return self._run("sinfo", "-h", "-o", "%T").stdout.strip()

    def jobs(self) -> dict[str, str]:
        """Return the state of each job that Slurm remembers, by its name and number."""
        lines = self.command("squeue", "-h", "-t", "all", "-o", "%j %i %T").splitlines()
        return {" ".join(line.split()[:2]): line.split()[2] for line in lines}

    def job_states(self) -> list[str]:
        """Return the states of the jobs of attempts since :meth:`cancel_all`."""
        return [
            state
            for name, state in self.jobs().items()
            if name.startswith("orchestrator-") and name not in self._old
        ]

    def cancel_all(self) -> None:
        """End all jobs, and forget that they were there."""
        self.command("scancel", f"--user={getpass.getuser()}")
        self.resume_node()

        def is_quiet() -> bool:
            return not self.command("squeue", "-h").strip()

        _wait(is_quiet, "no job is left", self.log)
        self._old = set(self.jobs())

    def resume_node(self) -> None:
        """Have the node take jobs again, whatever was done to it."""
        # an error if it never stopped to
        self._run("scontrol", "update", f"nodename={NODE}", "state=resume")
        _wait(lambda: self.node_state() in ("idle", "mixed", "allocated"), "the node", self.log)

    def log(self) -> str:
        """Return the end of what the daemons have logged."""
        texts = []
        for name in ("munged", "slurmctld", "slurmd"):
            path = self.directory / f"{name}.log"
            if path.exists():
                texts.append(f"{name}: {path.read_text(errors='replace')[-2000:]}")
        return "\n".join(texts)

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )

    def _start_munged(self) -> None:
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{name}={self.directory}/munge.{end}" for name, end in files.items()]
        # --force: a temporary directory may be writable by others, which munged would refuse
        self._start("munged", "--foreground", "--force", *options)
        _wait((self.directory / "munge.socket").exists, "munged has its socket", self.log)

    def _start(self, *words: str) -> None:
        with open(self.directory / f"{words[0]}.log", "ab") as log:
            # they end with the tests, also when those are killed
            self._daemons[words[0]] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal is for the tests
            )


@contextlib.contextmanager
def running_slurm(directory: Path, cpus: int = 8) -> Iterator[SlurmCluster]:
    """Bring a Slurm up and leave nothing of it behind."""
    cluster = SlurmCluster(directory, cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _wait(condition: Callable[[], bool], what: str, log: Callable[[], str]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {_START_SECONDS} s: {what}\n{log()}"
        time.sleep(_LOOK_SECONDS)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class StandIn:
    """Programs that stand before Slurm's own on the path, for what a healthy Slurm does not do.

    A script finds the real program as ``$REAL/sbatch``.
    """

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.environment = {**environment, "PATH": f"{directory}:{environment['PATH']}"}
        self._real = environment["PATH"]

    def put(self, name: str, script: str) -> None:
        """Have a program of this name run the lines of a shell script."""
        real = shutil.which(name, path=self._real)
        assert real is not None
        path = self._directory / name
        unfinished = path.with_name(f".{name}.new")
        unfinished.write_text(f"#!/bin/sh\nREAL={Path(real).parent}\n{script}\n")
        unfinished.chmod(0o755)
        unfinished.rename(path)

    def remove(self, name: str) -> None:
        """Let the real program be found again."""
        (self._directory / name).unlink()
