"""What must hold between settings that are each right by themselves."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from bigbatch.launcher.problems import Problem, shown
from bigbatch.recipes.core.config import RunConfig, TokenDataSection
from bigbatch.recipes.core.models.config import DecoderSection, EncoderSection


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
    if not isinstance(data, TokenDataSection):
        return
    kind = data.tokenizer.kind
    if kind in ("bpe", "wordpiece") and data.tokenizer.vocabulary_size is None:
        yield Problem("data.tokenizer.vocabulary_size", f"missing; a {kind} needs one, for example 32000")
    if data.tokenizer.kind == "pretrained" and data.tokenizer.path is None:
        yield Problem("data.tokenizer.path", "missing; kind pretrained needs a tokenizer.json or a folder with one")


def _sequence_fits(config: RunConfig) -> Iterator[Problem]:
    model, data = getattr(config, "model", None), getattr(config, "data", None)
    if not isinstance(model, DecoderSection | EncoderSection) or not isinstance(data, TokenDataSection):
        return
    if data.sequence_length > model.max_positions:
        found, limit = data.sequence_length, model.max_positions
        yield Problem("data.sequence_length", f"found {found}; right is model.max_positions ({limit}) or less")


_RULES: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    _schedule_fits,
    _ramp_ascends,
    _tokenizer_is_whole,
    _sequence_fits,
)


class _Effect(NamedTuple):
    """A setting, when it has an effect, and that condition in words."""

    path: str
    has_effect: Callable[[Any], bool]
    needs: str


def _scales_dynamically(run: RunConfig) -> bool:
    return run.precision.dtype == "fp16" and run.precision.static_loss_scale is None


def _trains_a_tokenizer(run: Any) -> bool:
    return run.data.tokenizer.kind in ("bpe", "wordpiece")


def _is_rotary(run: Any) -> bool:
    return getattr(run.model, "family", None) == "llama" or getattr(run.model, "positions", None) == "rotary"


_EFFECTS = (
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
    _Effect("data.validation_fraction", lambda run: not run.data.validation, "that data.validation names no sources"),
    _Effect(
        "data.validation_split", lambda run: run.data.validation_fraction > 0, "a data.validation_fraction above 0"
    ),
    _Effect("data.tokenizer.path", lambda run: run.data.tokenizer.kind == "pretrained", "kind pretrained"),
    _Effect("data.tokenizer.vocabulary_size", _trains_a_tokenizer, "kind bpe or wordpiece"),
    _Effect("data.tokenizer.train_characters", _trains_a_tokenizer, "kind bpe or wordpiece"),
    _Effect("data.tokenizer.lowercase", lambda run: run.data.tokenizer.kind == "wordpiece", "kind wordpiece"),
    _Effect("model.rope_theta", _is_rotary, "rotary positions"),
    _Effect("model.initializer_range", lambda run: run.model.initialize_from is None, "weights drawn here"),
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
