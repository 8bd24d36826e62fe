"""A real Slurm cluster of several emulated nodes on this host, private to one caller and gone with it.

Every daemon runs as the calling user, with a munge key, ports and folders of its own; nothing under /etc is touched.
A node is a slurmd in name spaces of its own: it knows itself by its name, and killing its first process is a power
failure of all that runs there. By hand: `python tests/programs/slurm_cluster.py` keeps one until Ctrl-C.
"""

import contextlib
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
ACCOUNTING_DAEMONS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb")
TOOLS = ("unshare", "setpriv", "hostname", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
WAIT_SECONDS = 180.0  # of a host that others load too; every wait ends as soon as its condition holds
CORES, MEMORY_MB, GPUS = 4, 4000, 2  # a node's; config_overrides has Slurm believe them

SETTINGS = """\
ClusterName=emulated
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as its credential lives: 120 s by default, 5 s at least.
AuthInfo=socket={folder}/munge/socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MinJobAge=3600
SlurmdTimeout=10
SlurmctldTimeout=10
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,bf_resolution=1,sched_interval=2,batch_sched_delay=0
AccountingStorageType=accounting_storage/{storage}
{more}
"""
PARTITIONS = """\
PartitionName=main Nodes={nodes} Default=YES MaxTime=1-00:00:00 DefaultTime=60 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=low Nodes={nodes} MaxTime=1-00:00:00 DefaultTime=60 PriorityTier=1 GraceTime=5 State=UP
PartitionName=high Nodes={nodes} MaxTime=1-00:00:00 DefaultTime=60 PriorityTier=100 PreemptMode=OFF State=UP
"""
ACCOUNTING = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""
DATABASE = """\
create database slurm;
create user slurm@'127.0.0.1' identified by 'slurm';
create user slurm@localhost identified by 'slurm';
grant all on slurm.* to slurm@'127.0.0.1';
grant all on slurm.* to slurm@localhost;
"""


@dataclass
class Cluster:
    """A running cluster; its clients find it by `environment`."""

    folder: Path
    nodes: tuple[str, ...]
    accounting: bool
    running: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, without what another Slurm has left in it."""
        clean = {name: value for name, value in os.environ.items() if not _is_of_slurm(name)}
        return clean | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _search_path()}

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands and return what it printed, errors included."""
        ended = subprocess.run(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        if check and ended.returncode:
            raise RuntimeError(f"{' '.join(command)}: {ended.returncode}: {ended.stdout}")
        return ended.stdout

    def submit(self, script: Path, *options: str) -> str:
        """Submit a batch script and return the job's number."""
        return self.run("sbatch", "--parsable", *options, str(script)).strip()

    def state(self, job: str) -> str:
        """Return the state of a job that the controller still knows, as RUNNING."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def wait_for_state(self, job: str, *states: str) -> str:
        """Wait until the job is in one of the states; return which."""
        self.wait_for(lambda: self.state(job) in states, f"job {job} to be {' or '.join(states)}")
        return self.state(job)

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> None:
        """Wait until the condition holds; raise with the ends of the daemons' logs when it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, process in self.running.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"waited for {what} in vain; ended: {ended}\n{self._log_ends()}")
            time.sleep(0.05)

    def power_off(self, node: str) -> None:
        """End all that runs on a node at once, as a power failure does."""
        self._end(f"slurmd-{node}", signal.SIGKILL)

    def power_on(self, node: str) -> None:
        """Start a node that was powered off, and wait until the controller may use it."""
        self._start_node(node)
        # Responding again, whatever it is used for by then; * marks one that does not respond.
        self.wait_for(lambda: self._node_state(node) in ("idle", "mixed", "allocated", "completing"), f"node {node}")

    def run_on(self, node: str, *command: str) -> None:
        """Run a command in what a node sees of the file system."""
        own = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
        process = str(self.running[f"slurmd-{node}"].pid)
        subprocess.run(["nsenter", "--target", process, *own, "--mount", *command], check=True)

    def stop_controller(self) -> None:
        """Take slurmctld away; what runs on the nodes goes on."""
        self._end("slurmctld", signal.SIGTERM)

    def start_controller(self, *options: str) -> None:
        """Start slurmctld, with the state that it left, and wait until it answers."""
        self._spawn("slurmctld", "slurmctld", "-D", *options)
        self.wait_for(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld")

    def _start(self) -> None:
        for name in ("munge", "state", "spool", "log", "gpus", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # the database's own user has to pass
        controller_port, accounting_port, database_port, *node_ports = _free_ports(len(self.nodes) + 3)
        self._configure(controller_port, accounting_port, node_ports)
        self._start_munge()
        if self.accounting:
            self._start_accounting(accounting_port, database_port)
        self.start_controller("-c")
        for node in self.nodes:
            self._start_node(node)
        all_idle = f"{' '.join(['idle'] * len(self.nodes))}"
        self.wait_for(lambda: " ".join(map(self._node_state, self.nodes)) == all_idle, "all nodes")

    def _configure(self, controller_port: int, accounting_port: int, node_ports: Sequence[int]) -> None:
        addresses = {node: f"127.0.0.{number}" for number, node in enumerate(self.nodes, start=2)}
        storage = "slurmdbd" if self.accounting else "none"
        more = [
            f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={port} CPUs={CORES} RealMemory={MEMORY_MB} "
            f"Gres=gpu:{GPUS} State=UNKNOWN"
            for (node, address), port in zip(addresses.items(), node_ports, strict=True)
        ]
        if self.accounting:
            socket_path = self.folder / "munge" / "socket"
            more.append(f"AccountingStorageHost=localhost\nAccountingStoragePort={accounting_port}")
            more.append(f"AccountingStoragePass={socket_path}\nAccountingStorageTRES=gres/gpu")
        settings = SETTINGS.format(
            folder=self.folder, user=_user(), controller_port=controller_port, storage=storage, more="\n".join(more)
        )
        (self.folder / "slurm.conf").write_text(settings + PARTITIONS.format(nodes=",".join(self.nodes)))
        for number in range(GPUS):
            (self.folder / "gpus" / f"gpu{number}").symlink_to(os.devnull)
        gpus = f"{self.folder}/gpus/gpu[0-{GPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={gpus}\n")
        (self.folder / "cgroup.conf").touch()
        hosts = ["127.0.0.1 localhost", f"127.0.0.1 {socket.gethostname()}"]
        hosts += [f"{address} {node}" for node, address in addresses.items()]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        munge.chmod(0o711)  # munged refuses other modes
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {name: f"--{name}-file={munge / name}" for name in ("pid", "log", "seed")}
        socket_path = munge / "socket"
        options = [f"--key-file={key}", f"--socket={socket_path}", *files.values(), "--origin=127.0.0.1"]
        self._spawn("munged", "munged", "-F", *options)
        self.wait_for(socket_path.exists, "munged")

    def _start_accounting(self, port: int, database_port: int) -> None:
        folder = self.folder / "database"
        folder.mkdir()
        user = "mysql" if os.getuid() == 0 else _user()
        if os.getuid() == 0:
            shutil.chown(folder, user, user)
        common = ["--no-defaults", f"--user={user}", f"--datadir={folder}/data", "--innodb-log-file-size=8M"]
        self.run("mariadb-install-db", *common, "--auth-root-authentication-method=normal", "--skip-test-db")
        socket_path = folder / "socket"
        options = [f"--socket={socket_path}", f"--pid-file={folder}/pid", f"--port={database_port}"]
        quick = [
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
            "--innodb-flush-log-at-trx-commit=0",
        ]
        self._spawn("mariadbd", "mariadbd", *common, *options, "--bind-address=127.0.0.1", "--skip-log-bin", *quick)
        client = ["mariadb", "--no-defaults", "--user=root", f"--socket={socket_path}", "--execute"]
        self.wait_for(lambda: self.run(*client, "select 1", check=False).startswith("1"), "mariadbd")
        self.run(*client, DATABASE)
        settings = ACCOUNTING.format(folder=self.folder, port=port, user=_user(), database_port=database_port)
        (self.folder / "slurmdbd.conf").touch(mode=0o600)
        (self.folder / "slurmdbd.conf").write_text(settings)
        self._spawn("slurmdbd", "slurmdbd", "-D")
        self.wait_for(lambda: _answers(port), "slurmdbd")

    def _start_node(self, node: str) -> None:
        own = [] if os.getuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
        spaces = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        # The shell stays as the first process of the node, to bury what its jobs leave.
        inside = 'hostname "$0" && mount --bind "$1" /etc/hosts && { slurmd -D -N "$0" & wait $!; }'
        command = ["unshare", *own, *spaces, "sh", "-c", inside, node, str(self.folder / "hosts")]
        self._spawn(f"slurmd-{node}", *command)

    def _node_state(self, node: str) -> str:
        return self.run("sinfo", "-h", "-N", "-n", node, "-p", "main", "-o", "%T", check=False).strip()

    def _spawn(self, name: str, *command: str) -> None:
        # The kernel ends it with this process, should that be killed before it can end the cluster itself.
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self.running[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.environment,
                start_new_session=True,
            )

    def _end(self, name: str, number: int) -> None:
        process = self.running.pop(name)
        process.send_signal(number)
        try:
            process.wait(WAIT_SECONDS / 3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _stop(self) -> None:
        """Power off the nodes, and with them the jobs; then end the daemons, the last started first."""
        for name in reversed(list(self.running)):
            self._end(name, signal.SIGKILL if name.startswith("slurmd-") else signal.SIGTERM)

    def _log_ends(self) -> str:
        logs = sorted((self.folder / "log").iterdir())
        return "\n".join(f"{log.name}:\n  " + "\n  ".join(_tail(log)) for log in logs)


@contextlib.contextmanager
def start_cluster(num_nodes: int = 4, *, accounting: bool = False) -> Iterator[Cluster]:
    """Start a cluster with node1, node2 and so on; end it and remove its folder afterwards.

    Partitions: `main`, preemptible `low`, preempting `high`. With accounting, sacct answers (some seconds more).
    """
    folder = Path(
        tempfile.mkdtemp(prefix="slurm-")
    )  # a short name: munge's socket may have no more than 107 characters
    cluster = Cluster(folder, tuple(f"node{number}" for number in range(1, num_nodes + 1)), accounting)
    try:
        cluster._start()
        yield cluster
    finally:
        cluster._stop()
        shutil.rmtree(folder, ignore_errors=True)


def why_none(*, accounting: bool = False) -> str | None:
    """Say why no cluster can be started here, or return None."""
    needed = (*DAEMONS, *TOOLS, *(ACCOUNTING_DAEMONS if accounting else ()))
    missing = [name for name in needed if not shutil.which(name, path=_search_path())]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm slurm-client munge slurmdbd mariadb-server)"
    own = [] if os.getuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    command = ["unshare", *own, "--uts", "--mount", "--pid", "--fork", "--mount-proc", "hostname", "node"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"name spaces are not allowed here: {refused.stderr.strip()}" if refused.returncode else None


def _is_of_slurm(name: str) -> bool:
    return name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SINFO_", "SACCT_"))


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # not in an ordinary user's


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    """Return ports that are free now, from below those that the kernel gives to clients."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(10000, 32000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            ports += [port] if port not in ports else []
    return ports


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _tail(log: Path, lines: int = 8) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:]


def _keep(options: Mapping[str, bool]) -> None:
    with start_cluster(**options) as cluster:
        print(f"export SLURM_CONF={cluster.folder / 'slurm.conf'}   (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    _keep({"accounting": "--accounting" in sys.argv})
