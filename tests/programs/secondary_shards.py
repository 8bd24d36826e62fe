"""Train a toy at ZeRO-3 on four ranks without and with hpZ's secondary shards: `secondary_shards.py OUT`.

OUT/result.json gets for both the losses and gradient norms of each step, and how many weights were gathered from groups
of which size in a forward and in a backward pass.
"""

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from engine_cases import own_batches
from forked_ranks import import_everything, run_forked
from toy import Toy, loss, make_config

from bigbatch.recipes.core import runtime
from bigbatch.recipes.core.engine import Engine, partitioned_building
from bigbatch.recipes.core.engine_config import complete

RANKS, STEPS, ZERO = 4, 5, {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}


def train(out: Path, partition_size: int) -> None:
    """Be one rank."""
    from deepspeed.runtime.zero import partition_parameters

    gather, gathered, phase = partition_parameters._dist_allgather_fn, Counter(), ["forward"]

    def spy(source, target, group=None):
        gathered[f"{phase[0]} {dist.get_world_size(group)}"] += target.numel()
        return gather(source, target, group)

    mesh = runtime.start_mesh()
    partition_parameters._dist_allgather_fn = spy
    config = make_config({"parallel": {"zero_stage": 3}, "batch": {"global_size": 8, "micro_size": 1}})
    document = complete(config, {"zero_optimization": {**ZERO, "zero_hpz_partition_size": partition_size}}, RANKS)
    torch.manual_seed(0)
    with partitioned_building(document, mesh):
        model = Toy()
    engine = Engine(model, config, document, mesh)
    gathered.clear()

    def watched(module, batch):
        phase[0] = "forward"
        result = loss(module, batch)
        phase[0] = "backward"
        return result

    steps = []
    for step in range(STEPS):
        batches, num_targets = own_batches(config, mesh, step, 1.0)
        steps.append(engine.train_step(step, batches, watched, num_targets))
    if mesh.is_writer:
        found = {"steps": [[step.loss, step.grad_norm] for step in steps], "gathered": gathered}
        (out / f"{partition_size}.json").write_text(json.dumps(found))
    runtime.leave_mesh(mesh)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    import_everything()
    for size in (1, 2):
        print(run_forked(partial(train, out, size), RANKS, out / f"{size}.txt"))
    result = {size: json.loads((out / f"{size}.json").read_text()) for size in ("1", "2")}
    (out / "result.json").write_text(json.dumps(result))
