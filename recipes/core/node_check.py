"""Look at every node before the first step: `python -m bigbatch.recipes.core.node_check RUN_DIR`, one process a rank.

Rank 0 gathers what the ranks find over a TCP store, so that a node speaks up whose disk does not, names those that say
nothing within the limit, and judges. All ranks end with the same status: 0 all is fine; 69 a node is bad; 2 the
mistake is the user's, as no node can do it; 1 something is wrong and no node can be blamed. RUN_DIR/node_check.json
tells which node and why, under `bad` and `nodes`.

Longer than other files: what the ranks report and how rank 0 reads it are one protocol.
"""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.recipes.core import node_probes
from bigbatch.recipes.core.arguments import Parser
from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, UserError, one_line
from bigbatch.recipes.core.heartbeat import launch_id
from bigbatch.recipes.core.node_probes import Defect, Needs, Written
from bigbatch.recipes.core.slurm_ranks import join_step

EXIT_BAD_NODE = 69
STATUSES = {"fine": EXIT_DONE, "bad_node": EXIT_BAD_NODE, "user_error": EXIT_USER_ERROR, "unclear": EXIT_FAILED}
RESULT_FILE = "node_check.json"
PHASES = ("begin", "product", "folder", "own", "shared", "clock", "group", "pairs", "all-reduce")
TICK_SECONDS = 0.1
SILENT_SECONDS = 15.0
STILL_SECONDS = 2.0  # without a beat: the process is stopped, or its node gone
LEAVING_SECONDS = 5.0
WITNESS_SECONDS = 15.0
MOST_SKEW_SECONDS, NOTED_SKEW_SECONDS = 30.0, 1.0
SLOW, TOO_SLOW = 0.8, 0.5  # of the median of all nodes
EVERYWHERE = ("device", "folder", "space")
"""Checks that fail on all nodes by what was asked for, not by the nodes."""


class Facts(NamedTuple):
    """This process's place, as its environment says."""

    rank: int
    ranks: int
    ranks_a_node: int
    host: str
    """As Slurm calls the node, where it does."""
    address: str
    port: int


class Limits(NamedTuple):
    """Seconds."""

    arrive: float
    """From rank 0's start to that of the last."""
    check: float
    """For what each does alone, and as long for what all do together."""


class Suspect(NamedTuple):
    """A rank that has not reported."""

    rank: int
    host: str
    phase: str
    """The last that it entered; empty: it never began."""
    is_still: bool
    """It no longer beats."""


def main(arguments: Sequence[str]) -> int:
    """Take part in the check as the rank that the environment says; return the exit status."""
    parser = Parser(prog="node_check", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--arrive-seconds", type=float, default=120.0)
    parser.add_argument("--check-seconds", type=float, default=30.0)
    for name in Needs._fields:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=0)
    options = parser.parse_args(arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a store that is gone is told of here, in a line
    try:
        join_step()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    facts, limits = read_facts(), Limits(options.arrive_seconds, options.check_seconds)
    needs = Needs(*(getattr(options, name) for name in Needs._fields))
    verdict = take_part(options.run_dir, facts, limits, needs)
    if facts.rank == 0 or verdict.get("told_by") == facts.rank:
        print("\n".join(describe(verdict)), file=sys.stderr, flush=True)
    return STATUSES[verdict["status"]]


def read_facts() -> Facts:
    """Read the environment's rank facts; alone where it has none."""
    number = {name: int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))}
    return Facts(
        number["RANK"],
        number["WORLD_SIZE"],
        int(os.environ.get("LOCAL_SIZE", number["WORLD_SIZE"])),
        os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        int(os.environ.get("MASTER_PORT", "29400")),
    )


def take_part(run_dir: Path, facts: Facts, limits: Limits, needs: Needs) -> dict[str, Any]:
    """Check this rank's part and return the verdict on all. Collective: every rank must call it."""
    found: list[dict[str, Any]] = []
    pulse = _Pulse()

    def talk() -> None:
        take = _conduct if facts.rank == 0 else _follow
        with contextlib.suppress(Exception):  # the store has gone: told below
            found.append(take(run_dir, facts, limits, needs, pulse))

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    while thread.is_alive() and not pulse.has_stopped():
        thread.join(TICK_SECONDS)
    with contextlib.suppress(OSError):
        (run_dir / "checkpoints" / f".node_check_{facts.rank}").unlink(missing_ok=True)
    return found[0] if found else _without_rank_0(run_dir, facts)


class _Pulse:
    """When rank 0's store has answered last: one whose process is stopped keeps a caller waiting for ever."""

    def __init__(self) -> None:
        self.last = float("inf")

    def beat(self) -> None:
        self.last = time.monotonic()

    def has_stopped(self) -> bool:
        return time.monotonic() - self.last > SILENT_SECONDS


# ------------------------------------------------------------------------------------------------------------ each rank


def _connect(facts: Facts, limits: Limits, is_host: bool = False) -> Any:
    from torch.distributed import TCPStore  # noqa: PLC0415 # pyright: ignore[reportPrivateImportUsage]

    limit = timedelta(seconds=limits.arrive)
    return TCPStore(facts.address, facts.port, None, is_host, limit, wait_for_workers=False)


def _follow(run_dir: Path, facts: Facts, limits: Limits, needs: Needs, pulse: _Pulse) -> dict[str, Any]:
    """Beat until rank 0 has judged."""
    store = _connect(facts, limits)
    _start_examining(run_dir, facts, limits, needs)
    beats = 0
    while not store.check(["verdict"]):
        beats += 1
        pulse.beat()
        store.set(f"beat/{facts.rank}", str(beats))
        time.sleep(TICK_SECONDS)
    verdict = json.loads(store.get("verdict"))
    if verdict["told_by"] == facts.rank:
        _write(run_dir, verdict)
    store.set(f"left/{facts.rank}", "")
    return verdict


def _start_examining(run_dir: Path, facts: Facts, limits: Limits, needs: Needs) -> None:
    store = _connect(facts, limits)  # of its own: one that waits keeps others from talking
    threading.Thread(target=_examine, args=(store, run_dir, facts, limits, needs), daemon=True).start()


def _examine(store: Any, run_dir: Path, facts: Facts, limits: Limits, needs: Needs) -> None:
    """Do all that this rank has to do, and post what it finds: `own`, and when rank 0 says so, `joint`."""
    phase = ""

    def enter(name: str) -> None:
        nonlocal phase
        phase = name
        store.set(f"phase/{facts.rank}", json.dumps([facts.host, name]))

    report: dict[str, Any] = {"rank": facts.rank, "host": facts.host, "defects": []}
    try:
        enter("begin")
        _examine_alone(run_dir, facts, needs, report, enter)
        store.set(f"own/{facts.rank}", json.dumps(report))
        store.wait(["go"], timedelta(seconds=limits.arrive + limits.check))
        go = json.loads(store.get("go"))
        if not go["join"]:
            return
        _examine_together(store, facts, limits, go, report, enter)
    except Exception as error:
        what = one_line(f"{type(error).__name__}: {error}")
        report["defects"].append(Defect("answer", "error", f"rank {facts.rank} failed in {phase}: {what}"))
    with contextlib.suppress(Exception):  # the verdict is out, and rank 0 gone with the store
        kind = "joint" if PHASES.index(phase) > PHASES.index("own") else "own"
        store.set(f"{kind}/{facts.rank}", json.dumps(report))


def _examine_alone(
    run_dir: Path, facts: Facts, needs: Needs, report: dict[str, Any], enter: Callable[[str], None]
) -> None:
    device, report["device_id"], defects = node_probes.find_device()
    report["device"] = device
    if not defects:
        enter("product")
        report["product_rate"], defects = node_probes.multiply(device)
    report["defects"] += defects
    if facts.rank % facts.ranks_a_node == 0:
        enter("folder")
        folder = run_dir / "checkpoints"
        written, defects = node_probes.write_and_read(folder, str(facts.rank))
        report["written"] = written
        report["defects"] += defects + node_probes.find_space(folder, needs)
    enter("own")


def _examine_together(
    store: Any, facts: Facts, limits: Limits, go: dict[str, Any], report: dict[str, Any], enter: Callable[[str], None]
) -> None:
    import torch.distributed as dist  # noqa: PLC0415

    if facts.rank % facts.ranks_a_node == 0:
        enter("shared")
        report["defects"] += node_probes.read_witness(Written(*go["witness"]), min(WITNESS_SECONDS, limits.check / 2))
        enter("clock")
        report["skew"] = node_probes.measure_skew(lambda: float(store.get("clock")))
    if facts.ranks == 1:
        return
    enter("group")
    device = report["device"]
    if device != "cpu":
        import torch  # noqa: PLC0415

        torch.cuda.set_device(device)
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, store=_connect(facts, limits), rank=facts.rank, world_size=facts.ranks)
    enter("pairs")
    report["pair_rates"] = list(node_probes.exchange_in_pairs(device, facts.ranks_a_node))
    enter("all-reduce")
    report["all_reduce_rate"], defects = node_probes.reduce_over_all(device)
    report["defects"] += defects


# --------------------------------------------------------------------------------------------------------------- rank 0


def _conduct(run_dir: Path, facts: Facts, limits: Limits, needs: Needs, _: _Pulse) -> dict[str, Any]:
    """Gather what all ranks find, judge, and tell them."""
    begin = time.monotonic()
    store = _connect(facts, limits, is_host=True)
    _start_examining(run_dir, facts, limits, needs)
    reports, suspects = _gather(store, facts, limits, "own")
    join = not suspects and not any(_errors(report) for report in reports)
    witness = next((report["written"] for report in reports if report.get("written")), None)
    store.set("go", json.dumps({"join": join, "witness": witness}))
    if join:
        together, suspects = _gather(store, facts, limits, "joint")
        done = {report["rank"] for report in together}
        reports = [*together, *(report for report in reports if report["rank"] not in done)]
    verdict = judge(reports, suspects, facts)
    writers = [report["rank"] for report in reports if report.get("written")] or [0]
    verdict |= {"seconds": round(time.monotonic() - begin, 1), "told_by": min(writers)}
    if verdict["told_by"] == 0:
        _write(run_dir, verdict)
    store.set("verdict", json.dumps(verdict))
    present = {report["rank"] for report in reports} - {0} - {suspect.rank for suspect in suspects}
    end = time.monotonic() + LEAVING_SECONDS
    while present and not store.check([f"left/{rank}" for rank in present]) and time.monotonic() < end:
        time.sleep(TICK_SECONDS)
    return verdict


def _gather(store: Any, facts: Facts, limits: Limits, kind: str) -> tuple[list[dict[str, Any]], list[Suspect]]:
    """Wait for the ranks' reports of a kind; return them, and the ranks from which none came."""
    begin, arrived = time.monotonic(), 0.0
    missing, reports = set(range(facts.ranks)), []
    while missing:
        store.set("clock", repr(time.time()))
        for rank in [rank for rank in missing if store.check([f"{kind}/{rank}"])]:
            reports.append(json.loads(store.get(f"{kind}/{rank}")))
            missing.remove(rank)
        now = time.monotonic()
        if not arrived and all(store.check([f"phase/{rank}"]) for rank in missing):
            arrived = now
        if now > (arrived + limits.check if arrived else begin + limits.arrive):
            break
        time.sleep(TICK_SECONDS)
    reports.sort(key=lambda report: report["rank"])
    return reports, _suspects(store, facts, missing)


def _suspects(store: Any, facts: Facts, missing: set[int]) -> list[Suspect]:
    """Describe the ranks that have not reported, and look whether they still beat."""
    if not missing:
        return []
    before = {rank: _beat(store, rank) for rank in missing}
    time.sleep(STILL_SECONDS)
    hosts = _hosts()
    suspects = []
    for rank in sorted(missing):
        host, phase = json.loads(store.get(f"phase/{rank}")) if store.check([f"phase/{rank}"]) else ("", "")
        node = rank // facts.ranks_a_node
        host = host or (hosts[node] if node < len(hosts) else f"node number {node}")
        suspects.append(Suspect(rank, host, phase, rank != 0 and _beat(store, rank) == before[rank]))
    return suspects


def _beat(store: Any, rank: int) -> bytes:
    return store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else b""


def _hosts() -> list[str]:
    """Return the step's nodes in order; none outside of Slurm."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.split() if nodes else []


# -------------------------------------------------------------------------------------------------------------- verdict


def judge(reports: list[dict[str, Any]], suspects: list[Suspect], facts: Facts) -> dict[str, Any]:
    """Return the verdict on what the ranks report: its status, the bad nodes, and what is known of each node."""
    hosts = dict.fromkeys([*(report["host"] for report in reports), *(suspect.host for suspect in suspects)])
    defects: dict[str, list[Defect]] = {host: [] for host in hosts}
    for report in reports:
        defects[report["host"]] += (Defect(*defect) for defect in report["defects"])
    for host, defect in (*_compare_devices(reports), *_compare_clocks(reports), *_compare_rates(reports)):
        defects[host].append(defect)
    failed = any(defect.check == "answer" for found in defects.values() for defect in found)
    if blamed := _blame(suspects, len(hosts), failed):
        # What others report is the echo of these.
        defects = {host: [defect for defect in found if defect.check != "answer"] for host, found in defects.items()}
        for suspect in blamed:
            defects[suspect.host].append(Defect("answer", "error", _silence(suspect)))
    wrong = {host: [defect for defect in found if defect.severity == "error"] for host, found in defects.items()}
    wrong = {host: found for host, found in wrong.items() if found}
    users = _users_mistakes(wrong, len(hosts))
    echoes = len(wrong) == len(hosts) > 1 and all(found[0].check == "answer" for found in wrong.values())
    unclear = echoes or bool(suspects and not blamed and not failed)
    status = "user_error" if users else "unclear" if unclear else "bad_node" if wrong else "fine"
    rates = [report["all_reduce_rate"] for report in reports if report.get("all_reduce_rate")]
    return {
        "version": 1,
        "launch": launch_id(),
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "restart_count": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "status": status,
        "bad": sorted(wrong) if status == "bad_node" else [],
        "reasons": {host: found[0].message for host, found in wrong.items()},
        "user_error": users,
        "unanswered": [suspect._asdict() for suspect in suspects],
        "ranks": facts.ranks,
        "all_reduce_bytes_per_second": min(rates, default=None),
        "nodes": {host: _node(host, reports, defects[host]) for host in hosts},
    }


def _blame(suspects: list[Suspect], num_hosts: int, failed: bool) -> list[Suspect]:
    """Choose those of the silent ranks that hold up the others: the still ones, else those that came least far.

    Where a rank has `failed` and said so, those that are only late wait for it.
    """
    still = [suspect for suspect in suspects if suspect.is_still or not suspect.phase]
    if still or failed or not suspects:
        return still
    least = min(PHASES.index(suspect.phase) for suspect in suspects)
    behind = [suspect for suspect in suspects if PHASES.index(suspect.phase) == least]
    return behind if num_hosts == 1 or len({suspect.host for suspect in behind}) < num_hosts else []


def _silence(suspect: Suspect) -> str:
    if not suspect.phase:
        return f"rank {suspect.rank} never began"
    state = "has stopped answering" if suspect.is_still else "hangs"
    return f"rank {suspect.rank} {state}, in: {suspect.phase}"


def _users_mistakes(wrong: dict[str, list[Defect]], num_hosts: int) -> list[str]:
    """Return what no node can do; of a folder that is not shared, the node that wrote first knows nothing."""
    messages = []
    for check in (*EVERYWHERE, "shared"):
        found = [defect.message for defects in wrong.values() for defect in defects if defect.check == check]
        number = sum(any(defect.check == check for defect in defects) for defects in wrong.values())
        if found and number >= num_hosts - (check == "shared"):
            messages.append(found[0])
    return messages


def _compare_devices(reports: list[dict[str, Any]]) -> Iterable[tuple[str, Defect]]:
    on_gpu = any(report.get("device", "cpu") != "cpu" for report in reports)
    seen: dict[tuple[str, str], int] = {}
    for report in reports:
        host, rank, device_id = report["host"], report["rank"], report.get("device_id")
        if on_gpu and report.get("device") == "cpu" and not _errors(report):
            yield host, Defect("device", "error", f"rank {rank} sees no GPU, and others do")
        if device_id and seen.setdefault((host, device_id), rank) != rank:
            message = f"ranks {seen[host, device_id]} and {rank} have the same GPU; right is one each"
            yield host, Defect("device", "error", message)


def _compare_clocks(reports: list[dict[str, Any]]) -> Iterable[tuple[str, Defect]]:
    """Judge by the middle of the clocks: where rank 0's own is wrong, all others seem so."""
    skews = {report["host"]: report["skew"] for report in reports if "skew" in report}
    middle = sorted(skews.values(), key=abs)[(len(skews) - 1) // 2] if skews else 0.0
    for host, skew in skews.items():
        if (off := abs(skew - middle)) > NOTED_SKEW_SECONDS:
            severity = "error" if off > MOST_SKEW_SECONDS else "warning"
            yield host, Defect("clock", severity, f"its clock is {skew - middle:+.1f} s off the others'")


def _compare_rates(reports: list[dict[str, Any]]) -> Iterable[tuple[str, Defect]]:
    """Name nodes whose GPUs, or the links to them, are slow beside the others'; CPUs may have other work."""
    if all(report.get("device", "cpu") == "cpu" for report in reports):
        return
    for check, what in (("product", "matrix products"), ("bandwidth", "messages to other nodes")):
        rates = {report["host"]: _rate(check, report["host"], reports) for report in reports}
        known = {host: rate for host, rate in rates.items() if rate}
        middle = statistics.median_high(known.values()) if known else 0.0
        for host, rate in known.items():
            if rate < SLOW * middle:
                severity = "error" if rate < TOO_SLOW * middle else "warning"
                yield host, Defect(check, severity, f"its {what} have {rate / middle:.0%} of the middle node's rate")


def _rate(check: str, host: str, reports: list[dict[str, Any]]) -> float:
    """Return a node's rate by its slowest rank; of its links, by the best: a slow one may be the other node's."""
    mine = [report for report in reports if report["host"] == host]
    if check == "product":
        return min((report.get("product_rate") or 0.0 for report in mine), default=0.0)
    return min((max(report.get("pair_rates") or [0.0]) for report in mine), default=0.0)


def _node(host: str, reports: list[dict[str, Any]], defects: list[Defect]) -> dict[str, Any]:
    mine = [report for report in reports if report["host"] == host]
    written = next((Written(*report["written"]) for report in mine if report.get("written")), None)
    return {
        "ranks": [report["rank"] for report in mine],
        "devices": [report.get("device") for report in mine],
        "defects": [defect._asdict() for defect in defects],
        "product_operations_per_second": _rate("product", host, reports) or None,
        "pair_bytes_per_second": _rate("bandwidth", host, reports) or None,
        "write_bytes_per_second": written and written.write_rate,
        "read_bytes_per_second": written and written.read_rate,
        "clock_skew_seconds": next((report["skew"] for report in mine if "skew" in report), None),
    }


def _errors(report: dict[str, Any]) -> list[Defect]:
    found = (Defect(*defect) for defect in report["defects"])
    return [defect for defect in found if defect.severity == "error"]


def describe(verdict: dict[str, Any]) -> list[str]:
    """Return the verdict as lines: one that sums up, and one for each thing that is wrong."""
    nodes = verdict["nodes"]
    parts = [f"node check: {verdict['status'].replace('_', ' ')}", f"nodes {len(nodes)}", f"ranks {verdict['ranks']}"]
    for key, what, unit in (
        ("product_operations_per_second", "matrix products", "TFLOP/s"),
        ("pair_bytes_per_second", "to a neighbour", "GB/s"),
    ):
        if known := {host: node[key] for host, node in nodes.items() if node[key]}:
            slowest = min(known, key=known.__getitem__)
            parts.append(f"{what} {known[slowest] / (1e12 if unit[0] == 'T' else 1e9):.3g} {unit} (slowest: {slowest})")
    if rate := verdict["all_reduce_bytes_per_second"]:
        parts.append(f"all-reduce {rate / 1e9:.3g} GB/s")
    lines = [", ".join([*parts, f"{verdict.get('seconds', 0)} s"])]
    if verdict["user_error"]:
        return [one_line(line) for line in (*lines, *(f"error: {message}" for message in verdict["user_error"]))]
    for host, node in nodes.items():
        lines += [f"{defect['severity']}: {host}: {defect['message']}" for defect in node["defects"]]
    return [one_line(line) for line in lines]


# -------------------------------------------------------------------------------------------------------------- results


def _write(run_dir: Path, verdict: dict[str, Any]) -> None:
    path = run_dir / RESULT_FILE
    temporary = path.with_name(f".{path.name}.{verdict['told_by']}")
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(verdict, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)


def _without_rank_0(run_dir: Path, facts: Facts) -> dict[str, Any]:
    """Take the verdict that rank 0 has written, where only the way to it is cut; else blame its node."""
    end = time.monotonic() + 2 * LEAVING_SECONDS
    while facts.rank and time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            verdict = json.loads((run_dir / RESULT_FILE).read_text(encoding="utf-8"))
            if verdict["launch"] == launch_id():
                return verdict
        time.sleep(TICK_SECONDS)
    host = (_hosts() or [facts.host if facts.rank == 0 else facts.address])[0]
    verdict = judge([], [Suspect(0, host, "", True)], facts) | {"told_by": facts.rank}
    _write(run_dir, verdict)
    return verdict


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a thread may hang in what it was to find out
