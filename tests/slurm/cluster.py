"""A small Slurm cluster on this machine, from Debian's packages and without systemd: munge, slurmctld, and a slurmd for
each pretend node, all in one folder.

Each slurmd has a hostname and a hosts file of its own (Linux namespaces, so it needs root), and a loopback address.
Its size is pretended as well. Intervals are short, because tests wait for them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

NODES = ("node1", "node2", "node3")
USUAL = "node[1-2]"  # of the partitions that most tests use; `spare` has all
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE"}

_CONF = """
ClusterName=pretended
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/pids/slurmctld
SlurmdPidFile={root}/pids/%n
SlurmctldLogFile={root}/logs/slurmctld
SlurmdLogFile={root}/logs/%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,requeue_setup_env_fail
MinJobAge=600
FirstJobId={first}
KillWait={kill_wait}
BatchStartTimeout=20
SlurmctldTimeout=30
SlurmdTimeout=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


def missing() -> str | None:
    """Why no cluster can be started here; None where one can."""
    # Daemons lie in sbin, which is not on everybody's PATH.
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if absent:
        return (
            f"Slurm is not installed ({', '.join(absent)} missing): apt-get install slurmctld slurmd slurm-client munge"
        )
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "no root: nodes need hostnames of their own (unshare --uts --mount)"
    return None


class Cluster:
    """Use as a context manager.

    Args:
        kill_wait: seconds between TERM and KILL of a job that is ended.

    Attributes:
        root: its folder, removed at the end.
        env: environment of Slurm's commands.
    """

    def __init__(self, kill_wait: int = 30) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="fusemega-slurm-", dir="/tmp"))  # sockets have short names
        self._kill_wait = kill_wait
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.env |= {"SLURM_CONF": str(self.root / "etc" / "slurm.conf"), "PATH": path}

    def __enter__(self) -> Cluster:
        try:
            self._write()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--full", "-u", str(os.getuid()), check=False)
        self._until(lambda: not self.run("squeue", "-h", "-t", "R,CG", check=False), 15)
        pids = [int(path.read_text()) for path in self.root.glob("pids/*") if path.read_text().strip()]
        own = [pid for pid in pids if self._is_own(pid)]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in own:
                if self._is_own(pid):
                    os.kill(pid, number)
            self._until(lambda: not any(map(self._is_own, own)), 10)
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, *command: str, check: bool = True, **more: str) -> str:
        """Runs one of Slurm's commands; `more`: variables of its environment. Returns what it printed.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(command, env=self.env | more, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return (done.stdout + done.stderr).strip() if check else done.stdout.strip()

    def submit(self, *words: str | Path, folder: Path, **variables: str) -> str:
        """`sbatch WORDS` from `folder`, with these variables. Returns the job's id."""
        command = ["sbatch", "--parsable", *map(str, words)]
        done = subprocess.run(command, cwd=folder, env=self.env | variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        shown = self.run("scontrol", "show", "job", "-o", job)
        return next((word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}=")), "")

    def wait_state(self, job: str, *states: str, seconds: float = 180) -> str:
        """Waits until the job is in one of the states (default: has ended). Returns it."""
        wanted = set(states) or ENDED
        self.wait(lambda: self.field(job, "JobState") in wanted, f"job {job} {wanted}", seconds)
        return self.field(job, "JobState")

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        """Waits until the condition holds.

        Raises:
            AssertionError: it does not; with the queue and the ends of the daemons' logs.
        """
        if not self._until(condition, seconds):
            logs = [f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.root.glob("logs/*"))]
            raise AssertionError(f"not within {seconds} s: {what}\n{self.run('squeue')}\n" + "\n".join(logs))

    def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.1)
        return condition()

    def _is_own(self, pid: int) -> bool:
        """Whether the process is a daemon of this cluster, and not another that has taken its number."""
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        except OSError:
            return False
        return bool(words) and str(self.root) in words + variables

    def _write(self) -> None:
        for name in ("etc", "logs", "pids", "state", "munge", "devices", *(f"spool/{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)  # munged refuses a socket that others cannot reach
        key = self.root / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        # Files of the pretend GPUs must be character devices; nothing opens them.
        for gpu in range(8):
            os.mknod(self.root / "devices" / f"gpu{gpu}", 0o600 | 0o020000, os.makedev(1, 3))
        names = "".join(f"127.0.0.{11 + i} {node}\n" for i, node in enumerate(NODES))
        (self.root / "etc" / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        ports = _free_ports(1 + len(NODES))
        user, host = "root" if os.getuid() == 0 else os.environ["USER"], socket.gethostname().split(".")[0]
        # Jobs of two clusters on one machine must not have one number: their ports come from it.
        conf = _CONF.format(
            host=host,
            port=ports[0],
            user=user,
            root=self.root,
            kill_wait=self._kill_wait,
            first=5000 + ports[0] % 20000,
        )
        for i, node in enumerate(NODES):
            conf += (
                f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.{11 + i} Port={ports[1 + i]} CPUs=64 "
                f"RealMemory=1000000 Gres=gpu:8 Weight={1 + i} State=UNKNOWN\n"
            )
        for name, more in (
            ("batch", f"Nodes={USUAL} Default=YES PriorityTier=10 GraceTime=120"),
            ("nograce", f"Nodes={USUAL} PriorityTier=10 GraceTime=0"),
            ("urgent", f"Nodes={USUAL} PriorityTier=100 PreemptMode=off"),
            ("spare", "Nodes=ALL PriorityTier=10 GraceTime=0"),
        ):
            conf += f"PartitionName={name} MaxTime=INFINITE DefaultTime=60 {more}\n"
        (self.root / "etc" / "slurm.conf").write_text(conf)
        gres = f"NodeName=node[1-{len(NODES)}] Name=gpu File={self.root}/devices/gpu[0-7]\n"
        (self.root / "etc" / "gres.conf").write_text(gres)
        (self.root / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _start(self) -> None:
        munge = self.root / "munge"
        self._daemon(
            "munged", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket", "--num-threads=2",
            f"--pid-file={self.root}/pids/munged", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self._daemon("slurmctld")
        for node in NODES:
            self.start_node(node)
        self.wait(
            lambda: self.run("sinfo", "-h", "-p", "spare", "-t", "idle", "-o", "%D", check=False) == str(len(NODES)),
            "nodes",
            30,
        )

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd."""
        inside = f"mount --bind {self.root}/etc/hosts /etc/hosts && hostname {node} && exec slurmd -N {node}"
        self._daemon("unshare", "--uts", "--mount", "bash", "-c", inside)

    def mount_over(self, node: str, path: Path, other: Path) -> None:
        """On this node alone, `path` is `other` from now on."""
        self._in_node(node, "mount", "--bind", str(other), str(path))

    def unmount(self, node: str, path: Path) -> None:
        """Ends `mount_over`."""
        self._in_node(node, "umount", str(path))

    def _in_node(self, node: str, *command: str) -> None:
        self.run("nsenter", "--mount", "--target", (self.root / "pids" / node).read_text().strip(), "--", *command)

    def _daemon(self, *command: str) -> None:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
