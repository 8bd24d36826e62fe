"""The document that DeepSpeed gets: the user's native one, completed by what the run document owns. No torch."""

from typing import Any

from bigbatch.recipes.core.batch import BatchPlan, check_batch
from bigbatch.recipes.core.config import PrecisionSection, RunConfig
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.plan import Job, make_plan

# The run document's keys that a native document may not state, and what to write instead.
OWNED_KEYS = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size and batch.micro_size (the accumulation follows from them)",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer.name and its settings",
    "scheduler": "schedule.name and its settings",
    "fp16": "precision.dtype",
    "bf16": "precision.dtype",
    "bfloat16": "precision.dtype",
    "torch_autocast": "precision.dtype",
    "amp": "precision.dtype",
    "steps_per_print": "report.every_steps",
}


def zero_stage(config: RunConfig, native: dict[str, Any]) -> int:
    """Return the ZeRO stage: of the run document, else of the DeepSpeed document, else as `parallel.sync` asks."""
    if config.parallel.zero_stage is not None:
        return config.parallel.zero_stage
    return native.get("zero_optimization", {}).get("stage", int(config.parallel.sync in (None, "sharded")))


def contradicts_sync(config: RunConfig, stage: int) -> str:
    """Say what is wrong with a ZeRO stage under `parallel.sync`, or ""."""
    sync = config.parallel.sync
    if sync is None or (stage > 0) == (sync == "sharded"):
        return ""
    return f"found {stage}, and parallel.sync {sync} is stage {'1, 2 or 3' if sync == 'sharded' else '0'}"


def count_data_ranks(config: RunConfig, num_ranks: int) -> int:
    """Return how many of this many ranks share the batch."""
    parallel = config.parallel
    return num_ranks // (parallel.tensor * parallel.pipeline * parallel.sequence)


def complete(config: RunConfig, native: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """Return the full DeepSpeed document for this many ranks (processes).

    Raise UserError where the ranks, the batch or the model do not divide by the plan.
    """
    stage = zero_stage(config, native)
    has_experts = getattr(getattr(config, "model", None), "num_experts", 1) > 1
    if has_experts or config.parallel.expert > 1 or count_data_ranks(config, num_ranks) < num_ranks:
        _check_plan(config, native, num_ranks, stage)
    quantizes = native.get("zero_optimization", {}).get("zero_quantized_gradients")
    if quantizes and "fp16" not in (config.precision.dtype, native.get("communication_data_type")):
        # DeepSpeed 0.19.8 takes the bits of whatever comes for fp16 (csrc/quantization/pt_binding.cpp, swizzle_quant).
        message = f"{config.precision.dtype} does not go with zero_quantized_gradients; right would be fp16"
        raise UserError("precision.dtype", message)
    plan = check_batch(config.batch, count_data_ranks(config, num_ranks))
    return {
        **native,
        "train_batch_size": deepspeed_batch_size(config, plan),
        "train_micro_batch_size_per_gpu": plan.micro_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        # At stage 0 DeepSpeed takes the norm of the low-precision gradients; the engine clips the float32 ones itself.
        "gradient_clipping": (config.optimizer.gradient_clipping or 0.0) if stage else 0.0,
        "zero_optimization": {**native.get("zero_optimization", {}), "stage": stage},
        # Our optimizers are torch's own classes: no extension to compile at first use.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **_precision_blocks(config.precision),
    }


def deepspeed_batch_size(config: RunConfig, plan: BatchPlan) -> int:
    """Return the batch as DeepSpeed counts it: sequence ranks are data ranks to it, under local SGD each rank a run."""
    size = plan.global_size * config.parallel.sequence
    return size // plan.data_ranks if config.parallel.sync == "local_sgd" else size


def _check_plan(config: RunConfig, native: dict[str, Any], num_ranks: int, stage: int) -> None:
    """Refuse a plan that the model does not allow; of the vocabulary, which may not be known yet, the model speaks."""
    model, parallel = getattr(config, "model", None) if config.axes else None, config.parallel
    if parallel.pipeline > 1 and parallel.sync not in (None, "sharded"):
        message = f"{parallel.sync} does not go with parallel.pipeline {parallel.pipeline}, which is at ZeRO stage 1"
        raise UserError("parallel.sync", f"{message}; right would be sharded")
    length = getattr(getattr(config, "data", None), "sequence_length", 1)
    job = Job(model, 0, length, config.batch, config.axes, parallel.tensor_sequence)
    degrees = parallel.tensor, parallel.pipeline, parallel.sequence
    make_plan(job, num_ranks, *degrees, zero_stage=stage, expert=parallel.expert)
    if parallel.pipeline > 1:
        _check_pipeline(config, native)
    if getattr(model, "num_experts", 1) > 1:
        _check_experts(config, native)
    size = native.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if size > 1:  # DeepSpeed lays it over neighbours (utils/groups.py), which hold different weights here
        where = "deepspeed.zero_optimization.zero_hpz_partition_size"
        axis = next(axis for axis in ("tensor", "pipeline", "sequence") if getattr(parallel, axis) > 1)
        raise UserError(where, f"{size} does not go with parallel.{axis} {getattr(parallel, axis)}; right would be 1")


def _check_pipeline(config: RunConfig, native: dict[str, Any]) -> None:
    """Refuse what has not been shown to compute the same in stages as in one piece."""
    pipeline = f"parallel.pipeline {config.parallel.pipeline}"
    if config.precision.dtype == "fp16":
        raise UserError("precision.dtype", f"fp16 does not go with {pipeline}; right would be bf16 or fp32")
    if config.optimizer.name == "adamw_8bit":  # its blocks would round the two copies of a tied embedding differently
        raise UserError("optimizer.name", f"adamw_8bit does not go with {pipeline}; right would be adamw")
    for key in ("offload_optimizer", "offload_param"):
        if key in native.get("zero_optimization", {}):
            raise UserError(f"deepspeed.zero_optimization.{key}", f"does not go with {pipeline}; leave it out")


def _check_experts(config: RunConfig, native: dict[str, Any]) -> None:
    """Refuse settings that DeepSpeed's mixture of experts computes wrongly with, or stops at without a word of why."""
    if config.parallel.sync == "local_sgd":  # DeepSpeed would average the experts of ranks that are to step alone
        raise UserError("parallel.sync", "local_sgd does not go with model.num_experts above 1; right would be sharded")
    for key in ("reduce_scatter", "contiguous_gradients"):
        if native.get("zero_optimization", {}).get(key) is False:
            raise UserError(f"deepspeed.zero_optimization.{key}", "false does not go with experts; leave it out")


def _precision_blocks(precision: PrecisionSection) -> dict[str, Any]:
    if precision.dtype == "fp32":
        return {}
    if precision.dtype == "bf16":
        return {"bf16": {"enabled": True, "check_grad_overflow": True}}  # else a NaN reaches the weights
    return {
        "fp16": {
            "enabled": True,
            "loss_scale": precision.static_loss_scale or 0,  # 0 is dynamic
            "initial_scale_power": precision.initial_scale_power,
            "loss_scale_window": precision.scale_window,
            "hysteresis": 1,  # each overflow halves the scale, as stage 0 always does
        }
    }
