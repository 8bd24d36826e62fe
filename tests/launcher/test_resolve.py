"""A run document on its way to a resolved run, and every mistake in it told in the document's own terms."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.launcher.problems import InvalidDocumentError
from bigbatch.launcher.resolve import compare, resolve
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.migrations import migrate
from bigbatch.recipes.core.recipe import recipe_names
from bigbatch.recipes.gpt.config import GptConfig

SMALL = {
    "version": 1,
    "recipe": "gpt",
    "data": {"train": ["texts"], "sequence_length": 64, "tokenizer": {"kind": "character"}},
    "batch": {"global_size": 8},
    "optimizer": {"learning_rate": 0.001},
    "schedule": {"total_steps": 100},
}


def write(path: Path, document: object) -> str:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return str(path)


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small.json", SMALL)


def problems_of(run, *overrides):
    with pytest.raises(UserError) as raised:
        resolve(run, overrides)
    return str(raised.value).splitlines()


def test_a_minimal_document_gets_every_default(small):
    resolved = resolve(small)
    assert isinstance(resolved.config, GptConfig)
    assert resolved.document["optimizer"] == {
        "name": "adamw",
        "learning_rate": 0.001,
        "betas": [0.9, 0.95],
        "epsilon": 1e-8,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "gradient_clipping": 1.0,
        "keep_zeros": False,
    }
    assert resolved.deepspeed == {}


def test_a_resolved_document_resolves_to_itself(small, tmp_path):
    first = resolve(small, ["optimizer.name=sgd", "optimizer.momentum=0.9", "data.validation_fraction=0.1"])
    again = resolve(write(tmp_path / "run.json", first.document))
    assert again == first


def test_a_name_means_the_newest_version_and_may_pin_one():
    assert resolve("gpt/quick").document == resolve("gpt/quick.v1").document


def test_an_unknown_name_is_refused_with_the_nearest():
    assert problems_of("gpt/quik") == ["gpt/quik: no document of this name; did you mean 'gpt/quick'?"]


def test_a_missing_file_is_refused_by_its_path(tmp_path):
    assert problems_of(str(tmp_path / "no.json"))[0].endswith(f"there is no file {tmp_path / 'no.json'}")


def test_extends_merges_objects_and_replaces_lists(tmp_path, small):
    child = {"version": 1, "extends": "small.json", "optimizer": {"weight_decay": 0.1}, "data": {"train": ["a", "b"]}}
    config = resolve(write(tmp_path / "child.json", child)).config
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (0.001, 0.1)
    assert config.data.train == ("a", "b")
    assert config.data.sequence_length == 64


def test_extends_is_a_chain_by_name_and_by_path_beside_the_file(tmp_path):
    (tmp_path / "below").mkdir()
    write(tmp_path / "middle.json", {"version": 1, "extends": "gpt/quick", "batch": {"global_size": 16}})
    top = write(tmp_path / "below" / "top.json", {"version": 1, "extends": "../middle.json", "seed": 7})
    config = resolve(top).config
    assert (config.seed, config.batch.global_size) == (7, 16)
    assert config.model == resolve("gpt/quick").config.model


def test_a_circle_of_extends_is_refused(tmp_path):
    write(tmp_path / "a.json", {"version": 1, "extends": "b.json"})
    write(tmp_path / "b.json", {"version": 1, "extends": "a.json"})
    (line,) = problems_of(str(tmp_path / "a.json"))
    assert line.endswith("extends itself: a.json -> b.json -> a.json")


def test_extends_that_is_no_name_is_refused(tmp_path):
    (line,) = problems_of(write(tmp_path / "a.json", {"version": 1, "extends": ["b.json"]}))
    assert line.endswith('a.json extends: found ["b.json"]; right is one name or path')


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=3", "seed", 3),
        ("optimizer.name=lion", "optimizer.name", "lion"),
        ('optimizer.name="lion"', "optimizer.name", "lion"),
        ("optimizer.gradient_clipping=null", "optimizer.gradient_clipping", None),
        ("optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ('data.train=["a.txt", "b=c.txt"]', "data.train", ["a.txt", "b=c.txt"]),
        ("report.tensorboard=false", "report.tensorboard", False),
        ("model.initialize_from=folder=1", "model.initialize_from", "folder=1"),
    ],
)
def test_set_takes_json_and_else_a_string(small, override, path, value):
    found = resolve(small, [override]).document
    for name in path.split("."):
        found = found[name]
    assert found == value


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.hiden_size=3", "--set model.hiden_size: unknown key; did you mean 'hidden_size'?"),
        ("learning_rate=3", "--set learning_rate: unknown key; did you mean 'optimizer.learning_rate'?"),
        ("data.train.0=x", "--set data.train.0: data.train has no keys of its own; replace it whole"),
        ("seed", "--set: 'seed' has no value; right is section.key=value"),
        ("recipe=gtp", f"recipe: there is no recipe 'gtp'; there are: {', '.join(recipe_names())}"),
        ("data.train=x.txt", 'data.train: found "x.txt"; right is a list'),
        ("data.train=[]", "data.train: found []; right is 1 or more elements"),
        ("schedule.total_steps=1e3", "schedule.total_steps: found 1000.0; right is an integer"),
        ("seed=true", "seed: found true; right is an integer"),
        ("seed=-1", "seed: found -1; right is 0 or more"),
        ("optimizer.learning_rate=1e999", 'optimizer.learning_rate: found "1e999"; right is a number'),
        ("optimizer.learning_rate=NaN", 'optimizer.learning_rate: found "NaN"; right is a number'),
        ("optimizer.betas=[0.9,2]", "optimizer.betas[1]: found 2; right is 1.0 or less"),
        ("optimizer.betas=[0.9]", "optimizer.betas[1]: missing; the list is too short"),
        ("batch=8", "batch: found 8; right is an object with keys"),
        ("precision.dtype=fp8", "precision.dtype: found \"fp8\"; right is 'fp32', 'bf16' or 'fp16'"),
        (
            "schedule.name=cosin",
            "schedule.name: found \"cosin\"; right is 'cosine', 'linear', 'constant', 'wsd' or 'polynomial'; "
            "did you mean 'cosine'?",
        ),
        ("report.tensorboard=yes", 'report.tensorboard: found "yes"; right is true or false'),
        ("deepspeed=zeroo2", "deepspeed zeroo2: no document of this name; did you mean 'zero2'?"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(small, override, line):
    assert problems_of(small, override) == [line]


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "x"]), inner, max_size=2),
    max_leaves=4,
)
PATHS = [
    *GptConfig.model_fields,
    *(f"data.{key}" for key in SMALL["data"]),
    *("batch.ramp", "optimizer.betas", "model.num_heads", "data.tokenizer.kind", "schedule.stop_step", "x", "model.x"),
]


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(PATHS), value=ANY_JSON)
def test_whatever_is_set_either_resolves_or_is_a_mistake_in_lines(path, value):
    try:
        resolve("gpt/quick", [f"{path}={json.dumps(value)}"])
    except UserError as error:
        lines = str(error).splitlines()
        assert len(lines) == len(getattr(error, "problems", [error]))
        assert all(": " in line for line in lines)


def test_all_problems_of_a_document_are_told_at_once(tmp_path):
    document = {
        **SMALL,
        "batch": {"global_size": 0, "micro": 1},
        "schedule": {},
        "sede": 1,
        "data": {**SMALL["data"], "clean": {"deduplicat": True}},
        "deepspeed": write(tmp_path / "mine.json", {"zero_optimization": {"stagee": 1}}),
    }
    assert sorted(problems_of(write(tmp_path / "run.json", document))) == [
        "batch.global_size: found 0; right is more than 0",
        "batch.micro: unknown key; did you mean 'micro_size'?",
        "data.clean.deduplicat: unknown key; did you mean 'deduplicate'?",
        "mine.json zero_optimization.stagee: unknown to DeepSpeed 0.19.8; did you mean 'stage'?",
        "schedule.total_steps: missing",
        "sede: unknown key; did you mean 'seed'?",
    ]


def test_the_problems_are_also_there_one_by_one(small):
    with pytest.raises(InvalidDocumentError) as raised:
        resolve(small, ["seed=-1", "batch.global_size=0"])
    assert [problem.where for problem in raised.value.problems] == ["batch.global_size", "seed"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": 1,\n "seed": }', "not JSON at line 2 column 10: Expecting value"),
        ('{"version": 1, "seed": 1, "seed": 2}', "key 'seed' stands twice in one object; keep one"),
        ('{"version": 1, "seed": NaN}', "NaN is not JSON; write a number or null"),
        ('{"version": 1, "seed": 1e999}', "1e999 is too large for a number"),
        ("[1]", "holds no JSON object; a document begins with {"),
        ("", "not JSON at line 1 column 1: Expecting value"),
    ],
)
def test_a_file_that_is_no_document_is_refused_with_its_place(tmp_path, text, message):
    path = write(tmp_path / "run.json", text)
    assert problems_of(path) == [f"{path}: {message}"]


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "run.json").write_bytes(b'{"recipe": "\xff"}')
    assert problems_of(str(tmp_path / "run.json"))[0].endswith("byte 12 is not UTF-8; save the file as UTF-8")


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["schedule.warmup_steps=101"], ["schedule.warmup_steps: found 101; right is total_steps (100) or less"]),
        (["seed=9223372036854775808"], ["seed: found 9223372036854775808; right is less than 9223372036854775808"]),
        (["schedule.stop_step=101"], ["schedule.stop_step: found 101; right is total_steps (100) or less"]),
        (
            ["schedule.name=wsd", "schedule.warmup_steps=60", "schedule.decay_steps=60"],
            ["schedule.decay_steps: found 60; the warm-up leaves 40 steps"],
        ),
        (
            ["schedule.name=wsd", "schedule.warmup_steps=100"],
            ["schedule.warmup_steps: found 100; wsd decays for a step at least: 99 is right"],
        ),
        (
            ['data.text_key="\\ud800"'],
            [r'data.text_key: found "\ud800", which is not Unicode: half a character, or bytes'],
        ),
        (
            ["data.tokenizer.kind=bpe"],
            ["data.tokenizer.vocabulary_size: missing; a bpe needs one, for example 32000"],
        ),
        (
            ["data.tokenizer.kind=pretrained"],
            ["data.tokenizer.path: missing; kind pretrained needs a tokenizer.json or a folder with one"],
        ),
        (["model.num_heads=7"], ["model: hidden_size 768 is not a multiple of num_heads 7"]),
        (
            ["model.family=llama", "model.num_key_value_heads=5"],
            ["model: num_heads 12 is not a multiple of num_key_value_heads 5"],
        ),
        (
            ["model.family=llama", "model.hidden_size=36", "model.num_heads=4"],
            ["model: rotary positions need heads of an even size, not 36 / 4"],
        ),
        (
            ["model.num_key_value_heads=4"],
            ["model: num_key_value_heads is for the llama family: gpt2 has as many as num_heads"],
        ),
        (
            ["data.sequence_length=2000"],
            ["data.sequence_length: found 2000; right is model.max_positions (1024) or less"],
        ),
        (
            ['batch.ramp=[{"until_step":9,"global_size":4},{"until_step":9,"global_size":6}]'],
            ["batch.ramp[1].until_step: found 9; right is more than the stage before (9)"],
        ),
        (
            ['batch.ramp=[{"until_step":100,"global_size":4}]'],
            ["batch.ramp[0].until_step: found 100; right is less than schedule.total_steps"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(small, overrides, lines):
    assert problems_of(small, *overrides) == lines


@pytest.mark.parametrize(
    ("overrides", "path", "cure"),
    [
        (["optimizer.momentum=0.9"], "optimizer.momentum", "optimizer.name=sgd"),
        (["optimizer.name=sgd", "optimizer.betas=[0.9,0.99]"], "optimizer.betas", "optimizer.name=adam"),
        (["optimizer.name=lion", "optimizer.epsilon=1e-6"], "optimizer.epsilon", "optimizer.name=lamb"),
        (["schedule.power=2.0"], "schedule.power", "schedule.name=polynomial"),
        (["schedule.decay_steps=9"], "schedule.decay_steps", "schedule.name=wsd"),
        (["schedule.name=constant", "schedule.final_ratio=0.5"], "schedule.final_ratio", "schedule.name=linear"),
        (["precision.scale_window=5"], "precision.scale_window", "precision.dtype=fp16"),
        (["precision.initial_scale_power=5"], "precision.initial_scale_power", "precision.dtype=fp16"),
        (["precision.static_loss_scale=8"], "precision.static_loss_scale", "precision.dtype=fp16"),
        (["precision.max_skipped_steps=5"], "precision.max_skipped_steps", "precision.on_non_finite=skip"),
        (
            ['data.validation=["v"]', "data.validation_fraction=0.1"],
            "data.validation_fraction",
            "data.validation=[]",
        ),
        (["data.validation_split=tail"], "data.validation_split", "data.validation_fraction=0.1"),
        (["data.tokenizer.vocabulary_size=300"], "data.tokenizer.vocabulary_size", "data.tokenizer.kind=bpe"),
        (["data.tokenizer.path=x"], "data.tokenizer.path", "data.tokenizer.kind=pretrained"),
        (["model.rope_theta=500000.0"], "model.rope_theta", "model.family=llama"),
        (["sample.temperature=0", "sample.top_k=5"], "sample.top_k", "sample.temperature=0.5"),
        (["parallel.local_sgd.every_steps=7"], "parallel.local_sgd.every_steps", "parallel.sync=local_sgd"),
        (
            ["parallel.local_sgd.outer_momentum=0.5", "parallel.local_sgd.every_steps=500", "parallel.sync=ring"],
            "parallel.local_sgd.outer_momentum",
            "parallel.local_sgd.outer_momentum=0.9",
        ),
    ],
)
def test_a_setting_without_effect_is_refused_until_it_has_one(small, overrides, path, cure):
    (line,) = problems_of(small, *overrides)
    assert line.startswith(f"{path}: found ")
    assert "has no effect in this run" in line
    assert resolve(small, [*overrides, cure]).config is not None


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["parallel.sync=sharded", "parallel.zero_stage=0"],
            "parallel.zero_stage: found 0, and parallel.sync sharded is stage 1, 2 or 3",
        ),
        (
            ["parallel.sync=ring", "parallel.zero_stage=1"],
            "parallel.zero_stage: found 1, and parallel.sync ring is stage 0",
        ),
        (
            ["parallel.sync=local_sgd", "parallel.local_sgd.every_steps=101", "schedule.total_steps=100"],
            "parallel.local_sgd.every_steps: found 101; right is schedule.total_steps (100) or less",
        ),
        (
            ["parallel.sync=all_reduce", "deepspeed=zero2"],
            "zero2.v1.json zero_optimization.stage: found 2, and parallel.sync all_reduce is stage 0",
        ),
    ],
)
def test_a_strategy_that_contradicts_the_stage_or_never_meets_is_told_in_one_line(small, overrides, line):
    assert problems_of(small, *overrides) == [line]


@pytest.mark.parametrize(
    ("sync", "stage", "size"),
    [("all_reduce", 0, 8), ("ring", 0, 8), ("sharded", 1, 8), ("local_sgd", 0, 2), (None, 1, 8)],
)
def test_the_strategy_decides_the_stage_where_nothing_else_does(small, sync, stage, size):
    overrides = [f"parallel.sync={json.dumps(sync)}", "schedule.total_steps=500", "batch.global_size=8"]
    resolved = resolve(small, overrides)
    document = complete(resolved.config, resolved.deepspeed, 4)
    assert document["zero_optimization"]["stage"] == stage
    assert document["train_batch_size"] == size


def test_the_default_of_a_setting_without_effect_may_stand_written(small):
    assert resolve(small, ["optimizer.momentum=0.0", "schedule.power=1.0"]).config.optimizer.momentum == 0.0


def test_the_content_id_follows_what_the_weights_depend_on_alone(small, tmp_path):
    first = resolve(small).content_id
    assert len(first) == 12
    assert int(first, 16) >= 0
    for override in ("seed=1", "model.num_layers=2", "schedule.total_steps=99", "batch.micro_size=4"):
        assert resolve(small, [override]).content_id != first
    for override in ("schedule.stop_step=50", "report.every_steps=1", "checkpoint.keep=5", "about=null"):
        assert resolve(small, [override]).content_id == first


def test_the_content_id_follows_the_deepspeed_document_not_its_name(small, tmp_path):
    shipped = resolve(small, ["deepspeed=zero2"])
    copy = write(tmp_path / "copied.json", {"version": 1, **shipped.deepspeed})
    assert resolve(small, [f"deepspeed={copy}"]).content_id == shipped.content_id
    assert shipped.content_id != resolve(small, ["deepspeed=zero3"]).content_id


def test_a_deepspeed_path_in_a_file_is_seen_from_the_file(tmp_path):
    (tmp_path / "below").mkdir()
    write(tmp_path / "below" / "mine.json", {"zero_optimization": {"stage": 2}})
    run = write(tmp_path / "below" / "run.json", {**SMALL, "deepspeed": "mine.json"})
    resolved = resolve(run)
    assert resolved.deepspeed == {"zero_optimization": {"stage": 2}}
    assert resolve(write(tmp_path / "elsewhere.json", resolved.document)).deepspeed == resolved.deepspeed


@pytest.mark.parametrize("version", [None, 0, 2, "1", True, 1.0])
def test_a_version_that_is_not_known_is_refused(tmp_path, version):
    path = write(tmp_path / "run.json", {**SMALL, "version": version})
    (line,) = problems_of(path)
    assert line == f"{path} version: {version!r}; this bigbatch reads 1 to 1, write 1"


def test_a_missing_version_is_refused(tmp_path):
    path = write(tmp_path / "run.json", {"recipe": "gpt"})
    assert problems_of(path) == [f"{path} version: missing; this bigbatch reads 1 to 1, write 1"]


def test_migrations_run_in_order_on_a_copy():
    def migrate_1_to_2(document):
        document["optimizer"]["learning_rate"] = document["optimizer"].pop("lr")
        return document

    def migrate_2_to_3(document):
        return {**document, "seed": document["optimizer"]["learning_rate"] * 2}

    migrations = {1: migrate_1_to_2, 2: migrate_2_to_3}
    old = {"version": 1, "optimizer": {"lr": 4}}
    assert migrate(old, "x.json", 3, migrations) == {"version": 3, "optimizer": {"learning_rate": 4}, "seed": 8}
    assert old == {"version": 1, "optimizer": {"lr": 4}}
    newer = {"version": 2, "optimizer": {"learning_rate": 4}}
    assert migrate(newer, "x.json", 3, migrations) == {"version": 3, "optimizer": {"learning_rate": 4}, "seed": 8}
    assert migrate({"version": 3}, "x.json", 3, migrations) == {"version": 3}


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("model.num_layers=3", "impossible"),
        ("data.sequence_length=32", "impossible"),
        ("seed=5", "impossible"),
        ("data.prepared_dir=elsewhere", "harmless"),
        ("data.shard_tokens=1000", "harmless"),
        ("model.recompute_activations=true", "harmless"),
        ("optimizer.learning_rate=0.1", "changes_optimization"),
        ("schedule.total_steps=200", "changes_optimization"),
        ("schedule.stop_step=50", "harmless"),
        ("precision.dtype=fp32", "changes_optimization"),
        ("precision.on_non_finite=skip", "harmless"),
        ("batch.global_size=16", "changes_optimization"),
        ('batch.ramp=[{"until_step":5,"global_size":4}]', "changes_optimization"),
        ("batch.micro_size=2", "harmless"),
        ("parallel.zero_stage=3", "harmless"),
        ("deepspeed=zero2", "harmless"),
        ("checkpoint.keep=9", "harmless"),
    ],
)
def test_resuming_with_another_setting_is_judged_by_what_it_touches(small, override, kind):
    old, new = resolve(small), resolve(small, [override])
    (change,) = compare(old.document, new.document)
    assert (change.path, change.kind) == (override.partition("=")[0], kind)
    assert change.old != change.new


def test_a_document_compared_with_itself_has_no_changes(small):
    assert compare(resolve(small).document, resolve(small).document) == []


# ------------------------------------------------------------------------------------------------- classification

CLASSIFY = {
    **SMALL,
    "recipe": "classify",
    "model": {"backbone": "attention"},
    "data": {"train": ["rows.csv"], "sequence_length": 64, "tokenizer": {"kind": "wordpiece", "vocabulary_size": 500}},
}
ENCODER = 'model={"backbone":"encoder","encoder":{"max_positions":128}}'
FROM_FOLDER = 'model={"backbone":"encoder","initialize_from":"bert"}'
NO_TOKENIZER = 'data.tokenizer={"kind":"wordpiece"}'


@pytest.fixture
def classify(tmp_path):
    return write(tmp_path / "classify.json", CLASSIFY)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.hiden_size=3", "--set model.hiden_size: unknown key; did you mean 'hidden_size'?"),
        ("model.encoder.num_headz=3", "--set model.encoder.num_headz: unknown key; did you mean 'num_heads'?"),
        ("model.hidden_size=3", "model.hidden_size: unknown key; it belongs to backbone rnn, not to attention"),
        ('model={"backbone":"rnn","hiden_size":3}', "model.hiden_size: unknown key; did you mean 'hidden_size'?"),
        (
            'model={"backbone":"encoder","encoder":{"num_headz":3}}',
            "model.encoder.num_headz: unknown key; did you mean 'num_heads'?",
        ),
        (
            'model={"backbone":"encoder","encoder":{"num_heads":7}}',
            "model.encoder: hidden_size 768 is not a multiple of num_heads 7",
        ),
        (
            "model.backbone=atention",
            "model.backbone: found \"atention\"; right is one of encoder, attention, rnn; did you mean 'attention'?",
        ),
        ("model.backbone=null", "model.backbone: found null; right is one of encoder, attention, rnn"),
        ("model={}", "model.backbone: missing; right is one of encoder, attention, rnn"),
        ("model=3", "model: found 3; right is an object with keys"),
        ("model.num_layers=-1", "model.num_layers: found -1; right is 0 or more"),
        ("data.train=[3]", "data.train[0]: found 3; right is a string, or an object with keys"),
        ("data.train=[]", "data.train: found []; right is 1 or more elements"),
        (
            'data.train=["a.csv",{"path":"b","format":"cvs"}]',
            "data.train[1].format: found \"cvs\"; right is 'txt', 'lines', 'csv', 'tsv', 'jsonl', 'parquet', "
            "'squad', 'slots', 'sgd', 'smart', 'conll' or 'semeval'; "
            "did you mean 'csv'?",
        ),
        ('data.train=[{"path":"b","encodin":"x"}]', "data.train[0].encodin: unknown key; did you mean 'encoding'?"),
        (
            'data.train=[{"path":"b","constants":{"label":1}}]',
            "data.train[0].constants.label: found 1; right is a string",
        ),
        (
            "objective.class_weights=balancd",
            "objective.class_weights: found \"balancd\"; right is 'none' or 'balanced', or an object with keys; "
            "did you mean 'balanced'?",
        ),
        ('objective.class_weights={"ham":0}', "objective.class_weights.ham: found 0; right is more than 0.0"),
    ],
)
def test_a_wrong_setting_of_one_of_several_kinds_is_told_in_one_line(classify, override, line):
    assert problems_of(classify, override) == [line]


def test_a_backbone_is_chosen_and_set_by_name(classify):
    assert resolve(classify, ["model.num_heads=2"]).config.model.num_heads == 2
    model = resolve(classify, ['model={"backbone":"rnn"}', "model.cell=gru"]).config.model
    assert (model.backbone, model.cell) == ("rnn", "gru")


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (
            [ENCODER, "data.sequence_length=129"],
            ["data.sequence_length: found 129; right is model.encoder.max_positions (128) or less"],
        ),
        (
            ['model={"backbone":"encoder"}'],
            ["model.encoder: missing; right is a shape, or a model.initialize_from that brings one"],
        ),
        (
            [ENCODER, "model.initialize_from=bert", NO_TOKENIZER],
            ["model.encoder: found a shape, but model.initialize_from brings its own; leave one of them out"],
        ),
        (
            [ENCODER, "model.encoder.initialize_from=bert"],
            ['model.encoder.initialize_from: found "bert"; right is model.initialize_from, without a shape'],
        ),
        (
            [FROM_FOLDER],
            [
                "data.tokenizer.vocabulary_size: found 500, but model.initialize_from brings its own tokenizer; "
                "leave it out"
            ],
        ),
        ([NO_TOKENIZER], ["data.tokenizer.vocabulary_size: missing; a wordpiece needs one, for example 32000"]),
        (
            [ENCODER, "model.freeze_layers=13"],
            ["model.freeze_layers: found 13; right is model.encoder.num_layers (12) or less"],
        ),
        (
            ["model.num_heads=3"],
            ["model.num_heads: found 3; right is a number of which embedding_size (128) is an even multiple"],
        ),
        (
            ["data.label_column=text"],
            ['data.label_column: found "text", which is one of data.text_columns too'],
        ),
        (['data.labels=["ham"]'], ['data.labels: found ["ham"]; a classifier chooses among two or more']),
        (['data.labels=["ham","spam","ham"]'], ['data.labels: "ham" stands there twice']),
        (
            ['data.labels=["ham","spam"]', 'objective.class_weights={"spm":2}'],
            ["objective.class_weights.spm: no such label; did you mean 'spam'?"],
        ),
    ],
)
def test_settings_of_a_classification_that_contradict_each_other_are_refused(classify, overrides, lines):
    assert problems_of(classify, *overrides) == lines


def test_a_model_to_start_from_needs_no_tokenizer_and_resolves_to_itself(classify, tmp_path):
    first = resolve(classify, [FROM_FOLDER, NO_TOKENIZER, "model.redraw_layers=2", "model.keep_head=true"])
    assert resolve(write(tmp_path / "run.json", first.document)) == first


@pytest.mark.parametrize(
    ("overrides", "path", "cure"),
    [
        (["data.label_separator=;"], "data.label_separator", "data.multi_label=true"),
        (["objective.threshold=0.3"], "objective.threshold", "data.multi_label=true"),
        (['data.test=["t"]', "data.test_fraction=0.1"], "data.test_fraction", "data.test=[]"),
        (['data.validation=["v"]', "data.validation_fraction=0.1"], "data.validation_fraction", "data.validation=[]"),
        (["data.split_seed=3"], "data.split_seed", "data.test_fraction=0.1"),
        (["data.on_leak=drop"], "data.on_leak", 'data.test=["t"]'),
        (["evaluate.best_by=accuracy"], "evaluate.best_by", "data.validation_fraction=0.1"),
        (['model={"backbone":"rnn"}', "data.packing=false"], "data.packing", 'model={"backbone":"attention"}'),
        ([ENCODER, "model.keep_head=true"], "model.keep_head", "model.keep_head=false"),
        ([ENCODER, "model.redraw_layers=1"], "model.redraw_layers", "model.redraw_layers=0"),
        ([ENCODER, "model.encoder.rope_theta=5.0"], "model.encoder.rope_theta", "model.encoder.positions=rotary"),
    ],
)
def test_a_setting_without_effect_on_a_classification_is_refused_until_it_has_one(classify, overrides, path, cure):
    (line,) = problems_of(classify, *overrides)
    assert line.startswith(f"{path}: found ")
    assert "has no effect in this run" in line
    assert resolve(classify, [*overrides, cure]).config is not None
