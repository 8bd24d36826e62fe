"""A native DeepSpeed document held against every key that the pinned DeepSpeed understands. No DeepSpeed, no torch.

DeepSpeed itself ignores an unknown key of its top level and most settings that have no effect; here both are refused.
"""

import json
import operator
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import bigbatch.ds_configs
from bigbatch.launcher.problems import Problem, meant, shown
from bigbatch.recipes.core.config import DOCUMENT_VERSION, RunConfig
from bigbatch.recipes.core.engine_config import OWNED_KEYS, contradicts_sync, zero_stage

DEEPSPEED_VERSION = "0.19.8"
TABLE = Path(bigbatch.ds_configs.__file__).parent / "schema" / f"deepspeed_{DEEPSPEED_VERSION}.json"

# Finer than the owner of the whole block, where the run document says the same thing in one key.
_OWNED_PARTS = {
    "optimizer.type": "optimizer.name",
    "optimizer.params.lr": "optimizer.learning_rate",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.epsilon",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "optimizer.params.momentum": "optimizer.momentum",
    "scheduler.type": "schedule.name",
    "scheduler.params.warmup_num_steps": "schedule.warmup_steps",
    "scheduler.params.total_num_steps": "schedule.total_steps",
    "fp16.loss_scale": "precision.static_loss_scale",
    "fp16.initial_scale_power": "precision.initial_scale_power",
    "fp16.loss_scale_window": "precision.scale_window",
}

_OWN_OPTIMIZERS = "it needs DeepSpeed's CPUAdam, and the optimizers here are torch's or bigbatch's"

# Understood by DeepSpeed, but what they steer is not DeepSpeed's in a run of ours.
_NO_EFFECT = {
    "activation_checkpointing": "model.recompute_activations says it; the recomputation is torch's own",
    "autotuning": "bigbatch starts the processes itself",
    "checkpoint": "checkpoints are bigbatch's own; see checkpoint.* of the run document",
    "compile": "the engine is not compiled by DeepSpeed",
    "data_efficiency": "samples come from bigbatch's own sampler",
    "dataloader_drop_last": "samples come from bigbatch's own sampler",
    "datastates_ckpt": "checkpoints are bigbatch's own",
    "expert_parallel": "no model here has experts",
    "gradient_allreduce_op": "the shared loop divides the loss by the global number of targets",
    "hybrid_engine": "it serves reinforcement learning",
    "managed_gradient_accumulation": "the shared loop sets it",
    "pipeline": "the stages are those of parallel.pipeline",
    "seq_parallel_communication_data_type": "communication_data_type holds for the ranks of parallel.sequence, too",
    "sequence_parallel_size": "it is that of parallel.sequence",
    "tensor_parallel": "no run is divided inside layers",
    "use_data_before_expert_parallelism": "no model here has experts",
    "vocabulary_size": "the model knows its own",
    "weight_quantization": "it serves inference",
    "zero_allow_untested_optimizer": "the run document's optimizer decides it",
    "zero_force_ds_cpu_optimizer": "the run document's optimizer decides it",
    "zero_optimization.elastic_checkpoint": "checkpoints are bigbatch's own",
    "zero_optimization.load_from_fp32_weights": "checkpoints are bigbatch's own",
    "zero_optimization.pipeline_loading_checkpoint": "checkpoints are bigbatch's own",
    "zero_optimization.gather_16bit_weights_on_model_save": "bigbatch convert gathers the weights itself",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "bigbatch convert gathers the weights itself",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "bigbatch convert gathers the weights itself",
    "zero_optimization.legacy_stage1": "DeepSpeed itself refuses it",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _OWN_OPTIMIZERS,
    "zero_optimization.offload_optimizer.ratio": _OWN_OPTIMIZERS,
    "zero_optimization.offload_optimizer.super_offload": _OWN_OPTIMIZERS,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "there is no Muon here",
    "zero_optimization.zenflow": _OWN_OPTIMIZERS,
}

# Keys that DeepSpeed has removed -> what serves their purpose now.
_INSTEAD = {
    "elasticity": "a run goes on with any number of ranks, bigbatch train RUN_DIR --ranks N",
    "zero_optimization.mics_shard_size": "zero_hpz_partition_size keeps each layer's weights within so many ranks",
    "zero_optimization.mics_hierarchical_params_gather": "zero_hpz_partition_size gathers within a node",
    "zero_optimization.zeropp_loco_param": "zero_quantized_gradients is without it",
}
_COMPRESSED_OPTIMIZERS = ("onebitadam", "onebitlamb", "zerooneadam")

# Keys of zero_optimization -> the stages in which DeepSpeed reads them; those named stage3_* follow from the name.
_STAGES = {
    "allgather_bucket_size": (0, 1, 2),
    "allgather_sequential": (3,),
    "enable_sanity_checks": (3,),
    "leaf_module": (3,),
    "log_trace_cache_warnings": (3,),
    "max_live_parameters": (3,),
    "max_reuse_distance": (3,),
    "memory_efficient_linear": (3,),
    "model_persistence_threshold": (3,),
    "module_granularity_threshold": (3,),
    "offload_param": (3,),
    "override_module_apply": (3,),
    "param_persistence_threshold": (3,),
    "prefetch_bucket_size": (3,),
    "sub_group_size": (3,),
    "use_all_reduce_for_fetch_params": (3,),
    "zero_hpz_partition_size": (3,),
    "zero_quantized_gradients": (3,),
    "zero_quantized_nontrainable_weights": (3,),
    "zero_quantized_weights": (3,),
    "allgather_partitions": (1, 2),
    "compute_grad_norm": (1, 2),
    "ignore_unused_parameters": (1, 2),
    "parameter_alignment": (1, 2),
    "round_robin_gradients": (1, 2),
    "use_multi_rank_bucket_allreduce": (1, 2),
}
_ONLY_NVME = ("buffer_count", "buffer_size", "fast_init", "max_in_cpu", "nvme_path", "pipeline_read", "pipeline_write")


def check_deepspeed(
    document: dict[str, Any], file: str, config: RunConfig | None
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the native document without `version` and "auto" values, and every problem of it.

    What depends on the run (the ZeRO stage) is checked when the run document is valid.
    """
    version = document.get("version", DOCUMENT_VERSION)
    content = {key: value for key, value in document.items() if key != "version"}
    problems = []
    if version != DOCUMENT_VERSION:
        problems.append(
            Problem("version", f"found {shown(version)}; right is {DOCUMENT_VERSION}, or no version at all")
        )
    native, more = _check_block(content, _table()["keys"], "")
    problems += more
    if config is not None and not problems:
        problems += [problem for rule in _RUN_RULES for problem in rule(native, config)]
    return native, [Problem(f"{file} {problem.where}", problem.message) for problem in problems]


@cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def _check_block(block: dict[str, Any], known: dict[str, Any], parent: str) -> tuple[dict[str, Any], list[Problem]]:
    """Return the block without "auto" values, whole numbers as integers, and its problems."""
    kept, problems = {}, []
    for name, value in block.items():
        path = f"{parent}.{name}" if parent else name
        refusal = _refusal(path, name, known)
        if refusal:
            problems.append(Problem(path, refusal))
        elif not parent and name in OWNED_KEYS:
            problems += _owned(path, value)
        elif value == "auto" and "string" not in known[name].get("type", ()):
            continue  # left to DeepSpeed, as other programs that fill such a document in would
        elif path in _NO_EFFECT:
            problems.append(Problem(path, f"has no effect in a run of bigbatch: {_NO_EFFECT[path]}; leave it out"))
        else:
            kept[name], more = _check_value(value, known[name], path)
            problems += more
    return kept, problems


def _refusal(path: str, name: str, known: dict[str, Any]) -> str | None:
    if path in _table()["removed"] and path not in OWNED_KEYS:
        instead = f": {_INSTEAD[path]}" if path in _INSTEAD else ""
        return f"DeepSpeed {DEEPSPEED_VERSION} has removed this; leave it out{instead}"
    if name not in known and path not in OWNED_KEYS:
        return f"unknown to DeepSpeed {DEEPSPEED_VERSION}; {meant(name, known)}"
    return None


def _owned(path: str, value: Any) -> Iterator[Problem]:
    """Yield a problem for each value of an owned key that is not "auto"."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _owned(f"{path}.{name}", part)
    elif path == "optimizer.type" and str(value).lower() in _COMPRESSED_OPTIMIZERS:
        instead = "to send less, set parallel.sync to local_sgd, or zero_quantized_gradients on GPUs"
        yield Problem(path, f"found {shown(value)}, which DeepSpeed {DEEPSPEED_VERSION} has removed; {instead}")
    elif value != "auto":
        owner = _OWNED_PARTS.get(path) or OWNED_KEYS[path.partition(".")[0]]
        yield Problem(path, f"found {shown(value)}; the run document says this: {owner}")


def _check_value(value: Any, node: dict[str, Any], path: str) -> tuple[Any, list[Problem]]:
    if "keys" in node and isinstance(value, dict):
        return _check_block(value, node["keys"], path)
    types = node.get("type", ())
    if "integer" in types and isinstance(value, float) and value.is_integer():
        value = int(value)  # bucket sizes are often written 5e8
    if types and not any(_is_a(value, name) for name in types):
        right = [" or ".join(_WORDS[name] for name in types)]
    elif "enum" in node and value not in node["enum"]:
        right = [f"one of {', '.join(map(shown, node['enum']))}"]
    else:
        right = [
            words.format(**node)
            for limit, (holds, words) in _LIMITS.items()
            if limit in node and not holds(value, node[limit])
        ]
    return value, [Problem(path, f"found {shown(value)}; right is {words}") for words in right]


_WORDS = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "an integer",
    "null": "null",
    "number": "a number",
    "object": "an object with keys",
    "string": "a string",
}
_CLASSES = {"array": list, "boolean": bool, "integer": int, "number": (int, float), "object": dict, "string": str}
_LIMITS = {
    "minimum": (operator.ge, "{minimum} or more"),
    "exclusiveMinimum": (operator.gt, "more than {exclusiveMinimum}"),
    "maximum": (operator.le, "{maximum} or less"),
    "exclusiveMaximum": (operator.lt, "less than {exclusiveMaximum}"),
}


def _is_a(value: Any, name: str) -> bool:
    if name == "null":
        return value is None
    return isinstance(value, _CLASSES[name]) and (name == "boolean" or not isinstance(value, bool))


def _stage_stated_twice(native: dict[str, Any], config: RunConfig) -> Iterator[Problem]:
    stage = native.get("zero_optimization", {}).get("stage")
    if stage is not None and config.parallel.zero_stage is not None:
        yield Problem(
            "zero_optimization.stage",
            f"found {stage}, and parallel.zero_stage is {config.parallel.zero_stage}; leave one out "
            "(--set parallel.zero_stage=null, or --set deepspeed=null)",
        )


def _stage_against_sync(native: dict[str, Any], config: RunConfig) -> Iterator[Problem]:
    stage = native.get("zero_optimization", {}).get("stage")
    if stage is not None and config.parallel.zero_stage is None and (message := contradicts_sync(config, stage)):
        yield Problem("zero_optimization.stage", message)


def _stages_without_effect(native: dict[str, Any], config: RunConfig) -> Iterator[Problem]:
    stage = zero_stage(config, native)
    for name in native.get("zero_optimization", {}):
        stages = (3,) if name.startswith("stage3_") else _STAGES.get(name, (1, 2, 3))
        if name != "stage" and stage not in stages:
            right = " or ".join(map(str, stages))
            yield Problem(f"zero_optimization.{name}", f"has no effect at ZeRO stage {stage}, only at {right}")


def _offload_without_effect(native: dict[str, Any], config: RunConfig) -> Iterator[Problem]:
    devices = []
    for name in ("offload_param", "offload_optimizer"):
        offload = native.get("zero_optimization", {}).get(name) or {}
        device = offload.get("device", "none")
        devices.append(device)
        for key in offload:
            if key != "device" and (device == "none" or (key in _ONLY_NVME and device != "nvme")):
                yield Problem(f"zero_optimization.{name}.{key}", f"has no effect with device {shown(device)}")
        if device == "nvme" and not offload.get("nvme_path"):
            yield Problem(
                f"zero_optimization.{name}.nvme_path", "missing; device nvme needs a folder on the local disk"
            )
    if "aio" in native and "nvme" not in devices:
        yield Problem("aio", 'has no effect unless offload_param or offload_optimizer has device "nvme"')


def _scaling_that_scatter_forbids(native: dict[str, Any], config: RunConfig) -> Iterator[Problem]:
    if not zero_stage(config, native) or not native.get("zero_optimization", {}).get("reduce_scatter", True):
        return
    for name, default in (("gradient_predivide_factor", 1.0), ("prescale_gradients", False)):
        if native.get(name, default) != default:
            yield Problem(name, "DeepSpeed refuses it while zero_optimization.reduce_scatter is true, the default")


_RUN_RULES = (
    _stage_stated_twice,
    _stage_against_sync,
    _stages_without_effect,
    _offload_without_effect,
    _scaling_that_scatter_forbids,
)
