"""A native DeepSpeed document: closed to what the pinned DeepSpeed does not know, or does not do in a run of ours."""

import json
import re
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.launcher.deepspeed_keys import DEEPSPEED_VERSION, TABLE, check_deepspeed
from bigbatch.launcher.documents import document_names
from bigbatch.launcher.resolve import resolve
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.errors import UserError

RUN = {
    "version": 1,
    "recipe": "gpt",
    "data": {"train": ["texts"], "sequence_length": 64, "tokenizer": {"kind": "character"}},
    "batch": {"global_size": 8},
    "optimizer": {"learning_rate": 0.001},
    "schedule": {"total_steps": 100},
}


@pytest.fixture
def run(tmp_path):
    """Resolve a run with this DeepSpeed document, the user's own."""

    def resolve_with(native, *overrides):
        (tmp_path / "mine.json").write_text(json.dumps(native))
        (tmp_path / "run.json").write_text(json.dumps({**RUN, "deepspeed": "mine.json"}))
        return resolve(str(tmp_path / "run.json"), overrides)

    return resolve_with


@pytest.fixture(scope="module")
def deepspeed_config():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepspeed.runtime.config import DeepSpeedConfig
    return DeepSpeedConfig


def problems_of(run, native, *overrides):
    with pytest.raises(UserError) as raised:
        run(native, *overrides)
    return [line.removeprefix("mine.json ") for line in str(raised.value).splitlines()]


def zero(stage, **settings):
    return {"zero_optimization": {"stage": stage, **settings}}


@pytest.mark.parametrize("version", [{}, {"version": 1}])
def test_a_document_of_the_users_own_drops_in_with_or_without_a_version(run, version):
    native = {**zero(2, reduce_bucket_size=5e8, overlap_comm=True), "wall_clock_breakdown": True}
    resolved = run({**version, **native})
    assert resolved.deepspeed == native
    assert type(resolved.deepspeed["zero_optimization"]["reduce_bucket_size"]) is int


def test_a_document_of_a_later_version_is_refused(run):
    assert problems_of(run, {"version": 2}) == ["version: found 2; right is 1, or no version at all"]


@pytest.mark.parametrize(
    ("native", "line"),
    [
        (
            {"zero_optimisation": {}},
            "zero_optimisation: unknown to DeepSpeed 0.19.8; did you mean 'zero_optimization'?",
        ),
        (
            zero(2, overlap_com=True),
            "zero_optimization.overlap_com: unknown to DeepSpeed 0.19.8; did you mean 'overlap_comm'?",
        ),
        (
            zero(2, offload_optimizer={"device": "cpu", "pin_memry": True}),
            "zero_optimization.offload_optimizer.pin_memry: unknown to DeepSpeed 0.19.8; did you mean 'pin_memory'?",
        ),
        ({"eigenvalue": {}}, "eigenvalue: DeepSpeed 0.19.8 has removed this; leave it out"),
        (
            {"elasticity": {}},
            "elasticity: DeepSpeed 0.19.8 has removed this; leave it out: a run goes on with any number of ranks, "
            "bigbatch train RUN_DIR --ranks N",
        ),
        (
            zero(3, mics_shard_size=2),
            "zero_optimization.mics_shard_size: DeepSpeed 0.19.8 has removed this; leave it out: "
            "zero_hpz_partition_size keeps each layer's weights within so many ranks",
        ),
        (
            {"optimizer": {"type": "OneBitAdam"}},
            'optimizer.type: found "OneBitAdam", which DeepSpeed 0.19.8 has removed; '
            "to send less, set parallel.sync to local_sgd, or zero_quantized_gradients on GPUs",
        ),
        (
            {"train_batch_size": 8},
            "train_batch_size: found 8; the run document says this: batch.global_size",
        ),
        (
            {"gradient_clipping": 1.0},
            "gradient_clipping: found 1.0; the run document says this: optimizer.gradient_clipping",
        ),
        ({"bf16": {"enabled": True}}, "bf16.enabled: found true; the run document says this: precision.dtype"),
        ({"amp": {"enabled": True}}, "amp.enabled: found true; the run document says this: precision.dtype"),
        (
            {"fp16": {"enabled": "auto", "loss_scale_window": 500}},
            "fp16.loss_scale_window: found 500; the run document says this: precision.scale_window",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
            'optimizer.type: found "AdamW"; the run document says this: optimizer.name',
        ),
        (
            {"scheduler": {"type": "auto", "params": {"warmup_num_steps": 9}}},
            "scheduler.params.warmup_num_steps: found 9; the run document says this: schedule.warmup_steps",
        ),
        (
            {"checkpoint": {"load_universal": True}},
            "checkpoint: has no effect in a run of bigbatch: checkpoints are bigbatch's own; "
            "see checkpoint.* of the run document; leave it out",
        ),
        (zero(2, overlap_comm="yes"), 'zero_optimization.overlap_comm: found "yes"; right is true or false or null'),
        (zero(2, reduce_bucket_size=0.5), "zero_optimization.reduce_bucket_size: found 0.5; right is an integer"),
        (zero(2, reduce_bucket_size=0), "zero_optimization.reduce_bucket_size: found 0; right is more than 0"),
        (zero(4), "zero_optimization.stage: found 4; right is one of 0, 1, 2, 3"),
        ({"zero_optimization": True}, "zero_optimization: found true; right is an object with keys"),
        (
            zero(2, offload_optimizer={"device": "gpu"}),
            'zero_optimization.offload_optimizer.device: found "gpu"; right is one of "none", "cpu", "nvme"',
        ),
        (
            zero(2, offload_param={"device": "cpu"}),
            "zero_optimization.offload_param: has no effect at ZeRO stage 2, only at 3",
        ),
        (
            zero(1, stage3_prefetch_bucket_size=5),
            "zero_optimization.stage3_prefetch_bucket_size: has no effect at ZeRO stage 1, only at 3",
        ),
        (
            zero(3, round_robin_gradients=True),
            "zero_optimization.round_robin_gradients: has no effect at ZeRO stage 3, only at 1 or 2",
        ),
        (
            zero(0, overlap_comm=True),
            "zero_optimization.overlap_comm: has no effect at ZeRO stage 0, only at 1 or 2 or 3",
        ),
        (
            zero(3, offload_optimizer={"device": "cpu", "nvme_path": "/x"}),
            'zero_optimization.offload_optimizer.nvme_path: has no effect with device "cpu"',
        ),
        (
            zero(3, offload_param={"device": "nvme"}),
            "zero_optimization.offload_param.nvme_path: missing; device nvme needs a folder on the local disk",
        ),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            "activation_checkpointing: has no effect in a run of bigbatch: model.recompute_activations says it; "
            "the recomputation is torch's own; leave it out",
        ),
        (
            {**zero(2), "gradient_predivide_factor": 8.0},
            "gradient_predivide_factor: DeepSpeed refuses it while zero_optimization.reduce_scatter is true, "
            "the default",
        ),
        ({"aio": {"queue_depth": 8}}, 'aio: has no effect unless offload_param or offload_optimizer has device "nvme"'),
    ],
)
def test_a_wrong_key_is_told_in_one_line(run, native, line):
    assert problems_of(run, native) == [line]


@pytest.mark.parametrize("path", json.loads(TABLE.read_text())["removed"])
def test_what_deepspeed_has_removed_is_refused_here_and_there(run, deepspeed_config, path):
    native = {"enabled": True}
    for name in reversed(path.split(".")):
        native = {name: native}
    with pytest.raises(Exception, match="removed"):
        deepspeed_config({"train_batch_size": 1, **native})
    assert problems_of(run, native)[0].startswith(path)


NAMES = st.sampled_from(["zero_optimization", "stage", "offload_param", "device", "aio", "fp16", "enabled", "stagee"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["auto", "cpu"]) | st.lists(NAMES)
ANY_DOCUMENT = st.dictionaries(
    NAMES, st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, max_size=3), max_leaves=6), max_size=3
)


@settings(max_examples=300, deadline=None)
@given(document=ANY_DOCUMENT, stage=st.sampled_from(["null", "0", "3"]))
def test_any_document_is_taken_or_told_what_is_wrong(document, stage):
    config = resolve("gpt/quick", [f"parallel.zero_stage={stage}"]).config
    native, problems = check_deepspeed(document, "mine.json", config)
    assert problems or set(native) <= set(document)
    if not problems:
        assert check_deepspeed(native, "mine.json", config) == (native, [])


def test_every_problem_is_told_at_once(run):
    native = {"train_batch_size": 8, "nebula": {}, "zero_optimization": {"stag": 1}, "wall_clock_breakdown": 1}
    assert [line.partition(":")[0] for line in problems_of(run, native)] == [
        "train_batch_size",
        "nebula",
        "zero_optimization.stag",
        "wall_clock_breakdown",
    ]


def test_auto_values_are_dropped_as_if_they_were_not_there(run):
    native = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "auto", "params": {"lr": "auto", "betas": "auto"}},
        **zero("auto", reduce_bucket_size="auto", overlap_comm=True),
    }
    assert run(native).deepspeed == {"zero_optimization": {"overlap_comm": True}}


def test_the_zero_stage_is_said_in_one_place(run):
    assert run(zero(2)).deepspeed["zero_optimization"]["stage"] == 2
    (line,) = problems_of(run, zero(2), "parallel.zero_stage=2")
    assert line.startswith("zero_optimization.stage: found 2, and parallel.zero_stage is 2; leave one out")
    # Without a stage of its own, the document is judged by the run's.
    native = {"zero_optimization": {"stage3_prefetch_bucket_size": 5}}
    assert run(native, "parallel.zero_stage=3").deepspeed == native
    assert problems_of(run, native)[0].endswith("has no effect at ZeRO stage 1, only at 3")


def test_a_document_that_is_missing_or_broken_is_told_with_the_run(run, tmp_path):
    run({})
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(UserError, match=r"^seed: .*\ndeepspeed .*mine\.json: not JSON at line 1 column 2"):
        resolve(str(tmp_path / "run.json"), ["seed=-1"])
    (tmp_path / "mine.json").unlink()
    with pytest.raises(UserError, match=r"^deepspeed .*mine\.json: there is no file"):
        resolve(str(tmp_path / "run.json"))


@pytest.mark.parametrize("name", document_names("deepspeed"))
def test_deepspeeds_own_parser_takes_every_shipped_document(name, deepspeed_config):
    dtype = "fp16" if "quantized" in name else "bf16"
    resolved = resolve("gpt/quick", ["parallel.zero_stage=null", f"deepspeed={name}", f"precision.dtype={dtype}"])
    document = complete(resolved.config, resolved.deepspeed, 1)
    parsed = deepspeed_config(json.loads(json.dumps(document)))
    assert parsed.train_batch_size == 32
    assert parsed.zero_optimization_stage == int(name[len("zero")])
    offload = parsed.zero_config.offload_optimizer
    assert (offload is not None and offload.device != "none") == ("offload" in name or "nvme" in name)


def test_the_table_is_what_the_installed_deepspeed_says(deepspeed_config):
    from bigbatch.tools.schema import deepspeed_table

    generated = deepspeed_table()
    assert generated["deepspeed"] == DEEPSPEED_VERSION
    assert generated == json.loads(TABLE.read_text()), "run python -m bigbatch.tools.schema"


def test_the_table_knows_every_name_that_deepspeeds_parsers_look_up(deepspeed_config):
    """Read the names out of the parsers' source, which is another way than the table was made."""
    import deepspeed.autotuning.constants
    import deepspeed.profiling.constants
    import deepspeed.runtime.activation_checkpointing.config
    import deepspeed.runtime.constants
    import deepspeed.runtime.data_pipeline.constants
    import deepspeed.runtime.model_checkpointing.constants
    import deepspeed.runtime.swap_tensor.constants

    parsers = {
        "runtime/config.py": deepspeed.runtime.constants,
        "runtime/activation_checkpointing/config.py": deepspeed.runtime.activation_checkpointing.config,
        "runtime/data_pipeline/config.py": deepspeed.runtime.data_pipeline.constants,
        "runtime/model_checkpointing/config.py": deepspeed.runtime.model_checkpointing.constants,
        "runtime/swap_tensor/aio_config.py": deepspeed.runtime.swap_tensor.constants,
        "profiling/config.py": deepspeed.profiling.constants,
        "autotuning/config.py": deepspeed.autotuning.constants,
    }
    looked_up = set()
    for file, constants in parsers.items():
        source = (Path(deepspeed.__file__).parent / file).read_text()
        names = re.findall(r"get_(?:scalar|dict)_param\(\s*[\w\[\]]+,\s*([A-Z0-9_]+)", source)
        names += re.findall(r"([A-Z][A-Z0-9_]+) in \w*param_dict", source)
        looked_up |= {getattr(constants, name) for name in names if hasattr(constants, name)}
    table = json.loads(TABLE.read_text())
    assert len(looked_up) > 80
    # The table leaves the keys of curriculum_learning open, and so does DeepSpeed but for this one.
    assert looked_up - _all_names(table["keys"]) == {"curriculum_metrics"}


def _all_names(keys):
    return set(keys) | {name for node in keys.values() for name in _all_names(node.get("keys", {}))}


@pytest.mark.parametrize(
    "path",
    [
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.zero_hpz_partition_size",
        "zero_optimization.offload_param.max_in_cpu",
        "zero_optimization.offload_optimizer.pipeline_read",
        "activation_checkpointing.partition_activations",
        "flops_profiler.profile_step",
        "comms_logger.prof_ops",
        "tensorboard.output_path",
        "wandb.project",
        "csv_monitor.job_name",
        "comet.workspace",
        "aio.intra_op_parallelism",
        "data_types.grad_accum_dtype",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "disable_allgather",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "timers.throughput.enabled",
        "compile.deepcompile",
        "pipeline.use_reentrant",
        "tensor_parallel.autotp_size",
        "expert_parallel.autoep_size",
        "hybrid_engine.max_out_tokens",
        "autotuning.fast",
        "data_efficiency.data_routing.enabled",
        "data_efficiency.data_sampling.dynamic_batching.max_tokens",
        "checkpoint.writer.io_buffer_size",
        "zero_force_ds_cpu_optimizer",
        "dataloader_drop_last",
        "weight_quantization.quantized_initialization",
        "bfloat16.enabled",
    ],
)
def test_a_key_of_deepspeeds_documentation_is_in_the_table(path):
    keys = json.loads(TABLE.read_text())["keys"]
    for name in path.split("."):
        assert name in keys
        keys = keys[name].get("keys", {})
