"""`bigbatch profile new`: a profile of the cluster at hand, from what Slurm says of it; the rest is told as open."""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.launcher import slurm_client
from bigbatch.launcher.cards import card_names
from bigbatch.launcher.documents import read_json
from bigbatch.launcher.problems import meant
from bigbatch.launcher.profiles import OWN, load_profile, parse_profile, profile_files, time_limit_seconds
from bigbatch.launcher.run_dir import write_json
from bigbatch.launcher.slurm_client import NodeGroup, SlurmAwayError
from bigbatch.recipes.core.errors import EXIT_DONE, UserError

USUAL_TIME_LIMIT = "12:00:00"
NODES_ON_FOOT = "found no GPUs on its nodes (sinfo's GRES), so ranks run on CPUs, one a node; change ranks_per_node"
OPEN = {
    "network.interface": "seen only on a node: srun -N1 ip -br address lists them (ib0, hsn0, bond0)",
    "python": "left out, a job takes the Python that submits; it has to lie on storage that the nodes see",
}
CARDS_BY_WORD = {"a100": "A100", "h100": "H100", "h200": "H200", "b200": "B200", "v100": "V100", "mi300": "MI300X"}


class Found(NamedTuple):
    """A profile's document, and what could not be found out: JSON path to what to do."""

    document: dict[str, Any]
    open: dict[str, str]


class Kind(NamedTuple):
    """What nodes that are alike have."""

    cores: int
    memory_mb: int
    gpus: str
    features: str


def new_profile(name: str, partition: str | None, output: Path | None) -> int:
    """Write a profile of this cluster where --profile NAME finds it; say what could not be found out."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError("NAME", f"found {name!r}; right are letters, digits, - and _")
    path = output or OWN.expanduser() / f"{name}.v1.json"
    if path.suffix != ".json":
        raise UserError("--output", f"found {path}; right is a file ending in .json")
    if path.exists():
        raise UserError(str(path), "is there already; give another name, or remove it")
    found = ask_cluster(partition)
    parse_profile(found.document)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found.document)
    print(path)
    for where, advice in found.open.items():
        _say(f"open: {where}: {advice}")
    _say(f"to try it: bigbatch submit gpt/quick --profile {output or name} --dry-run")
    return EXIT_DONE


def ask_cluster(partition: str | None) -> Found:
    """Ask Slurm what nodes there are and how they are asked for; raise UserError where it does not answer."""
    config, partitions = slurm_client.show_config(), slurm_client.show_partitions()
    groups = slurm_client.node_groups()
    if partition is not None and partition not in partitions:
        raise UserError("--partition", f"found {partition!r}; {meant(partition, partitions)}")
    name = partition or _best_partition(groups)
    settings, kind, others = partitions[name], *_usual_kind(groups, name)
    about = {
        "purpose": f"Partition {name} of the cluster {config.get('ClusterName', 'at hand')}.",
        "source": "sinfo and scontrol on a login node (bigbatch profile new)",
    }
    still_open = dict(OPEN)
    if others:
        what = f"{others} nodes of the partition are other than those described ({_described(kind)})"
        still_open["constraint"] = f"{what}; their features: {kind.features or 'none'}"
    document: dict[str, Any] = {"version": 1, "about": about, "partition": name}
    document |= _account(config, settings, still_open)
    document |= _gpus(kind, config, still_open)
    document |= _memory(config)
    document["time_limit"] = _time_limit(settings)
    if scratch := next((variable for variable in ("SCRATCH", "PSCRATCH", "WORK") if os.environ.get(variable)), None):
        document["scratch"] = f"${scratch}/bigbatch"
    else:
        still_open["scratch"] = "no $SCRATCH here; left out, run folders lie under runs/, which the nodes have to see"
    if os.environ.get("MODULESHOME") or os.environ.get("LMOD_CMD"):
        still_open["modules"] = "there are modules here; name those that your Python or NCCL needs"
    return Found(document, still_open)


def list_profiles(*, as_json: bool) -> int:
    """Print name, purpose and file of each profile that --profile finds."""
    rows = []
    for name, path in profile_files().items():
        about = read_json(path).get("about") or {}
        rows.append({"name": name, "purpose": about.get("purpose"), "file": str(path)})
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return EXIT_DONE
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['purpose'] or ''}  ({row['file']})")
    return EXIT_DONE


def show_profile(name: str) -> int:
    """Print a profile with every setting that it leaves to its default."""
    print(json.dumps(load_profile(name).model_dump(mode="json"), indent=2, ensure_ascii=False))
    return EXIT_DONE


def _best_partition(groups: list[NodeGroup]) -> str:
    """Return the default partition, or where it has no GPUs the one with the most of them."""
    gpus: Counter[str] = Counter()
    for group in groups:
        gpus[group.partition] += group.num_nodes * _parsed_gpus(group.gpus)[1] * group.is_up
    default = next((group.partition for group in groups if group.is_default), None)
    if default and (gpus[default] or not any(gpus.values())):
        return default
    if not groups:
        raise UserError("sinfo", "shows no partition; give one that you may use with --partition")
    return gpus.most_common(1)[0][0]


def _usual_kind(groups: list[NodeGroup], partition: str) -> tuple[Kind, int]:
    """Return what most nodes of a partition have, those with GPUs first, and how many have something else."""
    kinds: Counter[Kind] = Counter()
    for group in groups:
        if group.partition == partition:
            kinds[Kind(group.cores, group.memory_mb, group.gpus, group.features)] += group.num_nodes
    if not kinds:
        raise UserError("--partition", f"{partition} has no nodes that sinfo shows")
    usual = max(kinds, key=lambda kind: (_parsed_gpus(kind.gpus)[1] > 0, kinds[kind]))
    return usual, kinds.total() - kinds[usual]


def _parsed_gpus(text: str) -> tuple[str | None, int]:
    """Read Slurm's gpu:h100:4(S:0-1) as type and number; of several types, the first."""
    match = re.search(r"(?:^|,)gpu(?::([^:(,]+))??:(\d+)", text)
    return (match[1], int(match[2])) if match else (None, 0)


def _gpus(kind: Kind, config: dict[str, str], still_open: dict[str, str]) -> dict[str, Any]:
    name, count = _parsed_gpus(kind.gpus)
    if not count:
        still_open["gpus"] = NODES_ON_FOOT
        return {"ranks_per_node": 1, "cpus_per_rank": kind.cores}
    # Older than --gpus-per-node, which only this plugin knows.
    ask_by = "gpus-per-node" if "cons_tres" in config.get("SelectType", "") else "gres"
    card = next((card for word, card in CARDS_BY_WORD.items() if word in (name or kind.features).lower()), None)
    gpus = {"per_node": count, "ask_by": ask_by} | ({"type": name} if name else {}) | ({"card": card} if card else {})
    if not card:
        still_open["gpus.card"] = (
            f"Slurm does not tell which card it is; one of {', '.join(name for name in card_names() if name != 'CPU')}"
        )
    elif card == "A100":
        still_open["gpus.card"] = "taken as an A100 with 80 GB; one with 40 GB is A100-40"
    return {"gpus": gpus, "cpus_per_rank": max(1, kind.cores // count)}


def _account(config: dict[str, str], settings: dict[str, str], still_open: dict[str, str]) -> dict[str, Any]:
    """Return the account where there is just one; say what else the partition asks for."""
    try:
        accounts = slurm_client.accounts()
    except SlurmAwayError:
        accounts = []
    if settings.get("AllowQos", "ALL") != "ALL":
        still_open["qos"] = f"the partition takes {settings['AllowQos']}"
    if len(accounts) == 1:
        return {"account": accounts[0]}
    if accounts:
        still_open["account"] = f"you have {', '.join(accounts)}; left out, Slurm takes your default one"
    elif "associations" in config.get("AccountingStorageEnforce", ""):
        still_open["account"] = "the cluster wants one, and does not tell yours: sacctmgr show associations user=$USER"
    return {}


def _memory(config: dict[str, str]) -> dict[str, str]:
    """Return all of a node's memory where it is counted: the default there is a share for each core."""
    return {"memory": "0"} if "MEMORY" in config.get("SelectTypeParameters", "").upper() else {}


def _time_limit(settings: dict[str, str]) -> str:
    limit = settings.get("MaxTime", "UNLIMITED")
    if limit == "UNLIMITED" or time_limit_seconds(limit) > time_limit_seconds(USUAL_TIME_LIMIT):
        return USUAL_TIME_LIMIT
    return limit


def _described(kind: Kind) -> str:
    return f"{kind.cores} cores, {kind.memory_mb} MB, {kind.gpus or 'no GPUs'}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
