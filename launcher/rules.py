"""What must hold between settings that are each right by themselves."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from bigbatch.launcher.problems import Problem, meant, shown
from bigbatch.recipes.core.config import RunConfig, Section, TokenizerSection
from bigbatch.recipes.core.engine_config import contradicts_sync


def broken_rules(config: RunConfig) -> list[Problem]:
    """Return every rule between settings that a run document breaks."""
    return [problem for rule in (*_RULES, _without_effect) for problem in rule(config)]


def _schedule_fits(config: RunConfig) -> Iterator[Problem]:
    schedule = config.schedule
    for name in ("warmup_steps", "stop_step", "decay_steps"):
        steps = getattr(schedule, name)
        if steps is not None and steps > schedule.total_steps:
            yield Problem(f"schedule.{name}", f"found {steps}; right is total_steps ({schedule.total_steps}) or less")
    if schedule.name != "wsd" or schedule.warmup_steps > schedule.total_steps:
        return
    room = schedule.total_steps - schedule.warmup_steps
    if schedule.decay_steps is None and room < 1:  # the default shrinks to what the warm-up leaves, at least a step
        found = schedule.warmup_steps
        yield Problem("schedule.warmup_steps", f"found {found}; wsd decays for a step at least: {found - 1} is right")
    elif schedule.decay_steps is not None and room < schedule.decay_steps <= schedule.total_steps:
        yield Problem("schedule.decay_steps", f"found {schedule.decay_steps}; the warm-up leaves {room} steps")


def _ramp_ascends(config: RunConfig) -> Iterator[Problem]:
    before = 0
    for number, stage in enumerate(config.batch.ramp):
        where = f"batch.ramp[{number}].until_step"
        if stage.until_step <= before:
            yield Problem(where, f"found {stage.until_step}; right is more than the stage before ({before})")
        if stage.until_step >= config.schedule.total_steps:
            yield Problem(where, f"found {stage.until_step}; right is less than schedule.total_steps")
        before = stage.until_step


def _tokenizer_is_whole(config: RunConfig) -> Iterator[Problem]:
    data = getattr(config, "data", None)
    tokenizer = getattr(data, "tokenizer", None)
    if not isinstance(data, Section) or not isinstance(tokenizer, TokenizerSection):
        return
    if _starts_from_another(config):
        default = type(data).model_fields["tokenizer"].default
        for name, value in tokenizer:
            if value != getattr(default, name):
                message = f"found {shown(value)}, but model.initialize_from brings its own tokenizer; leave it out"
                yield Problem(f"data.tokenizer.{name}", message)
    elif tokenizer.kind in ("bpe", "wordpiece") and tokenizer.vocabulary_size is None:
        yield Problem("data.tokenizer.vocabulary_size", f"missing; a {tokenizer.kind} needs one, for example 32000")
    elif tokenizer.kind == "pretrained" and tokenizer.path is None:
        yield Problem("data.tokenizer.path", "missing; kind pretrained needs a tokenizer.json or a folder with one")


def _sequence_fits(config: RunConfig) -> Iterator[Problem]:
    length = getattr(getattr(config, "data", None), "sequence_length", 0)
    model = getattr(config, "model", None)
    for path, section in (("model", model), ("model.encoder", getattr(model, "encoder", None))):
        limit = getattr(section, "max_positions", length)
        if length > limit:
            message = f"found {length}; right is {path}.max_positions ({limit}) or less"
            yield Problem("data.sequence_length", message)


def _encoder_is_one(config: RunConfig) -> Iterator[Problem]:
    """A backbone of kind `encoder` has a shape of its own, or comes with one."""
    model: Any = getattr(config, "model", None)
    if getattr(model, "backbone", None) != "encoder":
        return
    shape = model.encoder
    if shape is None and model.initialize_from is None:
        yield Problem("model.encoder", "missing; right is a shape, or a model.initialize_from that brings one")
    elif shape is not None and model.initialize_from is not None:
        message = "found a shape, but model.initialize_from brings its own; leave one of them out"
        yield Problem("model.encoder", message)
    elif shape is not None and shape.initialize_from is not None:
        found = shown(shape.initialize_from)
        yield Problem(
            "model.encoder.initialize_from", f"found {found}; right is model.initialize_from, without a shape"
        )
    elif shape is not None and model.freeze_layers > shape.num_layers:
        message = f"found {model.freeze_layers}; right is model.encoder.num_layers ({shape.num_layers}) or less"
        yield Problem("model.freeze_layers", message)


def _starts_from_another(config: Any) -> bool:
    """Tell whether the tokenizer comes from elsewhere."""
    model = getattr(config, "model", None)
    brings_all = hasattr(model, "backbone") or config.start_brings_tokenizer
    return brings_all and getattr(model, "initialize_from", None) is not None


def _heads_are_even(config: RunConfig) -> Iterator[Problem]:
    """The attention backbone turns pairs of a head's numbers (rotary positions)."""
    model: Any = getattr(config, "model", None)
    if getattr(model, "backbone", None) != "attention" or model.embedding_size % (2 * model.num_heads) == 0:
        return
    multiple = f"a number of which embedding_size ({model.embedding_size}) is an even multiple"
    yield Problem("model.num_heads", f"found {model.num_heads}; right is {multiple}")


def _labels_are_sound(config: RunConfig) -> Iterator[Problem]:
    data: Any = getattr(config, "data", None)
    if not hasattr(data, "label_column"):
        return
    if data.label_column in data.text_columns:
        yield Problem("data.label_column", f"found {shown(data.label_column)}, which is one of data.text_columns too")
    if len(data.labels) == 1 and not data.multi_label:
        yield Problem("data.labels", f"found {shown(data.labels)}; a classifier chooses among two or more")
    for name in sorted({name for name in data.labels if data.labels.count(name) > 1}):
        yield Problem("data.labels", f"{shown(name)} stands there twice")
    weights: Any = getattr(getattr(config, "objective", None), "class_weights", None)
    named = set(weights) if isinstance(weights, dict) and data.labels else set()
    for name in sorted(named - set(data.labels)):
        yield Problem(f"objective.class_weights.{name}", f"no such label; {meant(name, data.labels)}")


def _sync_fits(config: RunConfig) -> Iterator[Problem]:
    parallel, total_steps = config.parallel, config.schedule.total_steps
    if parallel.zero_stage is not None and (message := contradicts_sync(config, parallel.zero_stage)):
        yield Problem("parallel.zero_stage", message)
    if parallel.sync != "local_sgd":
        return
    if parallel.local_sgd.every_steps > total_steps:
        message = f"found {parallel.local_sgd.every_steps}; right is schedule.total_steps ({total_steps}) or less"
        yield Problem("parallel.local_sgd.every_steps", message)


_RULES: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    _schedule_fits,
    _sync_fits,
    _ramp_ascends,
    _tokenizer_is_whole,
    _sequence_fits,
    _encoder_is_one,
    _heads_are_even,
    _labels_are_sound,
)


class _Effect(NamedTuple):
    """A setting, when it has an effect, and that condition in words."""

    path: str
    has_effect: Callable[[Any], Any]
    needs: str


def _scales_dynamically(run: RunConfig) -> bool:
    return run.precision.dtype == "fp16" and run.precision.static_loss_scale is None


def _trains_a_tokenizer(run: Any) -> bool:
    return run.data.tokenizer.kind in ("bpe", "wordpiece", "word")


def _has_words(run: Any) -> bool:
    return run.data.tokenizer.kind in ("wordpiece", "word")


def _attends(run: Any) -> bool:
    kinds = (getattr(run.model, "backbone", None), getattr(run.model, "kind", None))
    return not set(kinds) & {"rnn", "words", "ngram"}


def _tags_words(run: Any) -> bool:
    return run.data.task == "entities"


def _relates_pairs(run: Any) -> bool:
    return run.data.task == "relations"


def _has_inner_layers(run: Any) -> bool:
    """Of a recurrent network whose last layer is as wide as its embedding."""
    return getattr(run.model, "kind", None) != "rnn" or run.model.num_layers > 1


def _is_rotary(model: Any) -> bool:
    return getattr(model, "family", None) == "llama" or getattr(model, "positions", None) == "rotary"


def _has_validation(run: Any) -> bool:
    data = getattr(run, "data", None)
    return bool(getattr(data, "validation", None) or getattr(data, "validation_fraction", 1))


def _has_held_out(run: Any) -> bool:
    return bool(run.data.validation or run.data.validation_fraction or run.data.test or run.data.test_fraction)


def _trains_alone(run: RunConfig) -> bool:
    return run.parallel.sync == "local_sgd"


def _has_experts(run: Any) -> bool:
    return getattr(run.model, "num_experts", 1) > 1


def _compares(run: Any) -> bool:
    return run.objective.loss in ("contrastive", "ranking")


def _pools_texts(run: Any) -> bool:
    return run.model.kind == "bi" and run.model.backbone == "encoder"


def _writes(run: Any) -> bool:
    return getattr(run.model, "head", None) != "quality"


def _in_match(has_effect: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a condition on runs of the recipe match: in others settings of the same name have effects of their own."""
    return lambda run: run.recipe != "match" or has_effect(run)


_EFFECTS = (
    _Effect("model.experts_per_token", _has_experts, "model.num_experts above 1"),
    _Effect("model.expert_interval", _has_experts, "model.num_experts above 1"),
    _Effect("model.capacity_factor", _has_experts, "model.num_experts above 1"),
    _Effect("model.auxiliary_loss_coefficient", _has_experts, "model.num_experts above 1"),
    _Effect("parallel.local_sgd.every_steps", _trains_alone, "parallel.sync local_sgd"),
    _Effect("parallel.local_sgd.outer_learning_rate", _trains_alone, "parallel.sync local_sgd"),
    _Effect("parallel.local_sgd.outer_momentum", _trains_alone, "parallel.sync local_sgd"),
    _Effect("optimizer.momentum", lambda run: run.optimizer.name == "sgd", "optimizer.name sgd"),
    _Effect("optimizer.betas", lambda run: run.optimizer.name not in ("sgd", "adagrad"), "an optimizer with moments"),
    _Effect("optimizer.epsilon", lambda run: run.optimizer.name not in ("sgd", "lion"), "an optimizer that divides"),
    _Effect("schedule.power", lambda run: run.schedule.name == "polynomial", "schedule.name polynomial"),
    _Effect("schedule.decay_steps", lambda run: run.schedule.name == "wsd", "schedule.name wsd"),
    _Effect("schedule.final_ratio", lambda run: run.schedule.name != "constant", "a schedule that decays"),
    _Effect("precision.initial_scale_power", _scales_dynamically, "dtype fp16 with a dynamic scale"),
    _Effect("precision.scale_window", _scales_dynamically, "dtype fp16 with a dynamic scale"),
    _Effect("precision.static_loss_scale", lambda run: run.precision.dtype == "fp16", "precision.dtype fp16"),
    _Effect("precision.max_skipped_steps", lambda run: run.precision.on_non_finite == "skip", "on_non_finite skip"),
    _Effect("evaluate.best_by", _has_validation, "data.validation or a data.validation_fraction above 0"),
    _Effect("data.validation_fraction", lambda run: not run.data.validation, "that data.validation names no sources"),
    _Effect(
        "data.validation_split", lambda run: run.data.validation_fraction > 0, "a data.validation_fraction above 0"
    ),
    _Effect("data.tokenizer.path", lambda run: run.data.tokenizer.kind == "pretrained", "kind pretrained"),
    _Effect("data.tokenizer.vocabulary_size", _trains_a_tokenizer, "kind bpe, wordpiece or word"),
    _Effect("data.tokenizer.train_characters", _trains_a_tokenizer, "kind bpe, wordpiece or word"),
    _Effect("data.tokenizer.lowercase", _has_words, "kind wordpiece or word"),
    _Effect("data.tokenizer.words", lambda run: run.data.tokenizer.kind == "word", "kind word"),
    _Effect("data.context_length", lambda run: run.model.kind == "rnn", "model.kind rnn"),
    _Effect("model.hidden_size", _has_inner_layers, "a num_layers above 1"),
    _Effect("model.hidden_dropout", _has_inner_layers, "a num_layers above 1"),
    _Effect("model.rope_theta", lambda run: _is_rotary(run.model), "rotary positions"),
    _Effect("model.encoder.rope_theta", lambda run: _is_rotary(run.model.encoder), "rotary positions"),
    _Effect("model.initializer_range", lambda run: run.model.initialize_from is None, "weights drawn here"),
    _Effect("data.test_fraction", lambda run: not run.data.test, "that data.test names no sources"),
    _Effect(
        "data.split_seed",
        lambda run: run.data.validation_fraction > 0 or run.data.test_fraction > 0,
        "a data.validation_fraction or data.test_fraction above 0",
    ),
    _Effect("data.on_leak", _has_held_out, "validation or test rows"),
    _Effect("data.label_separator", lambda run: run.data.multi_label, "data.multi_label"),
    _Effect("objective.threshold", lambda run: run.data.multi_label, "data.multi_label"),
    _Effect("objective.temperature", _in_match(_compares), "a loss that compares pairs"),
    _Effect("objective.symmetric", lambda run: run.objective.loss == "contrastive", "objective.loss contrastive"),
    _Effect("objective.popularity", lambda run: run.objective.loss == "contrastive", "objective.loss contrastive"),
    _Effect("search.bm25_weight", lambda run: run.search.fusion == "sum", "search.fusion sum"),
    _Effect("data.rerank", lambda run: run.model.kind == "cross", "model.kind cross"),
    _Effect("model.pooling", _in_match(_pools_texts), "a bi-encoder of kind encoder"),
    _Effect("model.embedding_size", _in_match(lambda run: run.model.backbone == "words"), "model.backbone words"),
    *(
        _Effect(path, _writes, "model.head translation")
        for path in ("objective.label_smoothing", "search.num_beams", "search.length_penalty", "search.max_new_tokens")
    ),
    _Effect("data.packing", _attends, "a model that attends"),
    *(_Effect(name, _tags_words, "data.task entities") for name in ("model.crf", "data.scheme", "data.tokens_column")),
    _Effect("data.tags_column", lambda run: run.data.tokens_column, "data.tokens_column"),
    _Effect("model.position_size", _relates_pairs, "data.task relations"),
    *(_Effect(f"data.{name}", _relates_pairs, "data.task relations") for name in ("relation_column", "no_relation")),
    _Effect("model.feature_dropout", lambda run: run.model.feature_buckets > 0, "model.feature_buckets above 0"),
    _Effect("model.character_filters", lambda run: run.model.character_size > 0, "model.character_size above 0"),
    _Effect("model.keep_head", _starts_from_another, "model.initialize_from"),
    _Effect("model.redraw_layers", _starts_from_another, "model.initialize_from"),
    _Effect("augment.magnitude", lambda run: run.augment.random_operations > 0, "augment.random_operations above 0"),
    _Effect("augment.operations", lambda run: run.augment.random_operations > 0, "augment.random_operations above 0"),
    _Effect("sample.top_k", lambda run: run.sample.temperature > 0, "a sample.temperature above 0"),
    _Effect("sample.top_p", lambda run: run.sample.temperature > 0, "a sample.temperature above 0"),
)


def _without_effect(config: RunConfig) -> Iterator[Problem]:
    for path, has_effect, needs in _EFFECTS:
        *parents, name = path.split(".")
        section = _section(config, parents)
        if section is None or name not in section.model_fields_set:
            continue
        value, default = getattr(section, name), type(section).model_fields[name].get_default(call_default_factory=True)
        # A default is no mistake even where it stands written: a resolved document states every one.
        if value != default and not has_effect(config):
            message = f"found {shown(value)}, which has no effect in this run: it needs {needs}"
            yield Problem(path, f"{message}; leave it out or at its default ({shown(default)})")


def _section(config: Any, names: list[str]) -> Any:
    for name in names:
        config = getattr(config, name, None)
    return config
