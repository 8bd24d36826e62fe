"""`python -m bigbatch.tools.measure MODEL RESULT`: what a model is worth and what it costs, in a process of its own.

Quality is the recipe's own figure on real data that the run held out; cost is bytes, memory and time. One process a
model, so that the peak of memory is this model's; all are open at once and timed in turns, so that a busy moment of the
machine is the same to all.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigbatch.recipes.core.checkpoint import open_checkpoint
from bigbatch.recipes.core.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from bigbatch.recipes.core.process import die_with_parent, quiet_libraries

BATCHES = (1, 8)
HALVES = 200  # samples of halves that an interval comes from
CONFIDENCE = 0.95
WARM_UP_CALLS = 3
TURNS = 5
LEAST_CALLS, MOST_CALLS, MOST_SECONDS = 3, 40, 0.8  # of a turn, for each size of batch
PROMPT_TOKENS = NEW_TOKENS = 32
GIVEN = ("labels", "lefts", "rights", "rows", "splits")  # arrays that say which sample a row is, or what is right
ANSWERS_FILE, RESULT_FILE = "answers.npz", "measured.json"


class Options(NamedTuple):
    """What a measurement is made on; two are compared only where these are the same."""

    num_samples: int = 1000
    """Of the split, a seeded choice; all where it has no more, and where its samples belong together."""
    seed: int = 0
    split: str | None = None
    """None: test, else validation, else training data."""
    threads: int = 1
    run: str | None = None
    """A run folder whose data are used; None: those of the run that the model comes from."""


class Figure(NamedTuple):
    """The figure that stands for the task, with the interval that holds it with 95 % (None: cannot be told)."""

    name: str
    value: float
    low: float | None
    high: float | None


class Measurement(NamedTuple):
    """What was found; JSON can hold it."""

    figure: Figure
    figures: dict[str, Any]
    split: str
    num_samples: int
    num_bytes: int
    """Of all files of the folder."""
    peak_bytes: int
    """The peak above what the process had before the model was opened: while it was opened, or answered."""
    latency: dict[str, tuple[float, float]]
    """Batch size -> (median, 95th percentile) in milliseconds: of a call, or of a token that is written."""
    latency_of: str
    threads: int


def measure(results: dict[Path, Path], options: Options) -> list[Measurement]:
    """Measure models, each in a fresh process; a model's answers are then in its folder of results, for `agreement`."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for model, result in results.items():
            result.mkdir(parents=True, exist_ok=True)
            own = [sys.executable, "-m", "bigbatch.tools.measure", str(model), str(result)]
            own.append(json.dumps(options._asdict()))
            processes.append(subprocess.Popen(own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            _await(processes[-1], model, result)
        for _ in range(TURNS):
            for process, (model, result) in zip(processes, results.items(), strict=True):
                assert process.stdin
                process.stdin.write("time\n")
                process.stdin.flush()
                _await(process, model, result)
        for process in processes:
            assert process.stdin
            process.stdin.close()  # they judge, all at once
        for process, (model, result) in zip(processes, results.items(), strict=True):
            _await(process, model, result)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe
                pipe.close()
    files = (result / RESULT_FILE for result in results.values())
    return [read_measurement(json.loads(file.read_text(encoding="utf-8"))) for file in files]


def _await(process: subprocess.Popen[str], model: Path, result: Path) -> None:
    """Wait until a process has done its part; raise UserError where it has ended instead."""
    assert process.stdout
    if process.stdout.readline():
        return
    if process.wait() == EXIT_USER_ERROR:
        raise UserError(*json.loads((result / RESULT_FILE).read_text(encoding="utf-8")))
    raise UserError(str(model), f"cannot be measured: the process ended with status {process.returncode}, see above")


def read_measurement(found: dict[str, Any]) -> Measurement:
    """Return a measurement from its JSON."""
    latency = {size: tuple(pair) for size, pair in found["latency"].items()}
    return Measurement(**(found | {"figure": Figure(*found["figure"]), "latency": latency}))


def agreement(before: Path, after: Path) -> float | None:
    """Return the share of answers that are the same; None where they are no choices."""
    with np.load(before / ANSWERS_FILE) as one, np.load(after / ANSWERS_FILE) as other:
        if "choices" not in one or "choices" not in other:
            return None
        return float((one["choices"] == other["choices"]).mean())


def main(argv: list[str]) -> int:
    """Measure one model in this process: open it, time it whenever standard input has a line, judge it at its end."""
    die_with_parent()
    quiet_libraries()
    done = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    model, result, options = Path(argv[0]), Path(argv[1]), Options(**json.loads(argv[2]))

    def turns() -> Iterator[None]:
        print("open", file=done, flush=True)
        for _ in sys.stdin:
            yield
            print("timed", file=done, flush=True)

    try:
        found, answers = _measure(model.absolute(), options, turns())
    except UserError as error:
        (result / RESULT_FILE).write_text(json.dumps([error.where, error.message]), encoding="utf-8")
        return EXIT_USER_ERROR
    np.savez(result / ANSWERS_FILE, allow_pickle=False, **answers)
    (result / RESULT_FILE).write_text(json.dumps(found._asdict()), encoding="utf-8")
    print("judged", file=done, flush=True)
    return EXIT_DONE


def _measure(path: Path, options: Options, turns: Iterable[None]) -> tuple[Measurement, dict[str, np.ndarray]]:
    import torch

    from bigbatch.recipes.core import recipe as recipes
    from bigbatch.recipes.core.foreign import session_of
    from bigbatch.tools.opened import open_model

    torch.set_num_threads(options.threads)
    is_folder = (path / "config.json").is_file()
    recipes.find(recipes.of_folder(path) if is_folder else open_checkpoint(path).manifest["run"]["recipe"])
    before = _memory("VmRSS")  # with what is imported anyway
    opened = open_model(path, options.threads)
    opened.model.eval()
    opening, resident = _memory("VmHWM") - before, _memory("VmRSS") - before
    data, split, samples = open_samples(opened, options)
    ids = _choose(samples.num_samples, options, getattr(opened.recipe, "WHOLE_SPLIT", False))
    with torch.inference_mode():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak, without the data's
        idle = _memory("VmRSS")
        latency, latency_of = _latency(opened, samples, ids, turns)
        peak = max(opening, resident + _memory("VmHWM") - idle)
        judged = _judge(opened, data, samples, ids)
    in_worker = getattr(session_of(opened.model), "peak_bytes", None)
    return Measurement(
        judged.figure,
        judged.figures,
        split,
        len(ids),
        folder_bytes(path),
        in_worker() if in_worker else peak,
        latency,
        latency_of,
        options.threads,
    ), ({"choices": judged.choices} if judged.choices is not None else {})


def open_samples(opened: Any, options: Options) -> tuple[Any, str, Any]:
    """Return the run's data, the split's name and its samples; raise UserError where they are not here."""
    from bigbatch.tools.run_data import open_data

    found = open_data(opened, Path(options.run).absolute() if options.run else None)
    splits = {"test": found.splits.test, "validation": found.splits.validation, "train": found.splits.train}
    name = options.split or next(name for name, samples in splits.items() if samples)
    if not splits[name]:
        raise UserError("--split", f"found {name!r}; there is {', '.join(name for name in splits if splits[name])}")
    return found, name, splits[name]


class Judged(NamedTuple):
    """Quality on some samples."""

    figure: Figure
    figures: dict[str, Any]
    choices: np.ndarray | None


def _judge(opened: Any, data: Any, samples: Any, ids: np.ndarray) -> Judged:
    """Run the model on these samples and let the recipe judge."""
    from bigbatch.recipes.core.recipe import Outputs, further

    recipe, model, config, facts = opened.recipe, opened.model, data.config, data.facts
    outputs = further(recipe, "outputs") or (lambda model, batch: Outputs(recipe.loss(model, batch), {}))
    size = getattr(samples, "evaluation_size", None) or BATCHES[-1]
    losses, arrays, choices = [], {}, []
    for batch in _batches(samples, ids, 1 if not further(recipe, "figures") else size):
        found = outputs(model, batch)
        losses.append((float(found.loss.sum), found.loss.num_targets))
        for name, rows in found.arrays.items():
            arrays.setdefault(name, []).append(rows.cpu().numpy())
        if not found.arrays and "labels" in batch:
            choices.append(_next_tokens(model, batch))
    joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
    if joined:
        figures = recipe.figures(config, facts, joined, False)
        main = (*(further(recipe, "MAIN_FIGURES") or ()), *recipe.figure_names(config, facts))
        name = next(name for name in main if name in figures)
        interval = _interval(len(next(iter(joined.values()))), _figure_of_rows(recipe, config, facts, joined, name))
        return Judged(Figure(name, float(figures[name]), *interval), _numbers(figures), _choices(joined))
    pairs = np.array(losses)

    def of_rows(rows: np.ndarray) -> dict[str, float]:
        loss = float(pairs[rows, 0].sum() / pairs[rows, 1].sum())
        return {**recipe.metrics(loss), "loss": loss}

    figures = of_rows(np.arange(len(pairs)))
    name = next(iter(figures))
    figure = Figure(name, figures[name], *_interval(len(pairs), lambda rows: of_rows(rows)[name]))
    write = further(recipe, "generated_figures")
    if write and not recipe.metrics(1.0):  # a loss alone says little: what is written for the whole split says more
        written = _numbers(write(config, facts, model, samples))
        name = next((name for name in further(recipe, "MAIN_FIGURES") or () if name in written), next(iter(written)))
        figures, figure = {**written, **figures}, Figure(name, written[name], None, None)
    return Judged(figure, figures, np.concatenate(choices) if any(map(len, choices)) else None)


def _choices(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """Return which answers a model has chosen: places and tags as they are, of probabilities the likeliest."""
    own = [rows for name, rows in arrays.items() if name not in GIVEN]
    places = [rows for rows in own if rows.dtype.kind == "i"]
    return next(iter([*places, *(rows.argmax(-1) for rows in own if rows.ndim > 1)]), None)


def _figure_of_rows(recipe: Any, config: Any, facts: Any, arrays: dict[str, np.ndarray], name: str) -> Any:
    """Return a function from rows, of which those of one sample go together, to the figure."""
    groups = np.unique(arrays["rows"], return_inverse=True)[1] if "rows" in arrays else None

    def figure(rows: np.ndarray) -> float:
        if groups is not None:
            rows = np.flatnonzero(np.isin(groups, groups[rows]))
        return float(recipe.figures(config, facts, {key: array[rows] for key, array in arrays.items()}, False)[name])

    return figure


def _interval(count: int, figure: Callable[[np.ndarray], float]) -> tuple[float | None, float | None]:
    """Return the percentiles of the figure of random halves.

    A half drawn without replacement varies about the whole as the whole does about the truth (Shao and Wu 1989, the
    delete-d jackknife at d = n/2), and nothing is drawn twice, which figures of whole documents could not take.
    """
    generator = np.random.default_rng(0)
    try:
        found = [figure(np.sort(generator.permutation(count)[: max(1, count // 2)])) for _ in range(HALVES)]
    except (KeyError, ValueError):  # a ranking needs every document
        return None, None
    low, high = np.percentile(found, (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)))
    return float(low), float(high)


def _next_tokens(model: Any, batch: dict[str, Any]) -> np.ndarray:
    """Return the likeliest token at each place that counts, in order."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"})
    if logits.shape[:-1] != batch["labels"].shape:  # of the last words alone
        return np.zeros(0, np.int64)
    return logits.argmax(-1)[batch["labels"] >= 0].cpu().numpy()


def _latency(
    opened: Any, samples: Any, ids: np.ndarray, turns: Iterable[None]
) -> tuple[dict[str, tuple[float, float]], str]:
    """Time calls of the model, or the writing of tokens, by batch size, as much in each turn."""
    from bigbatch.recipes.core.foreign import ForeignDecoder
    from bigbatch.recipes.core.generate import Sampling, generate
    from bigbatch.recipes.core.models.decoder import Decoder

    writes = isinstance(opened.model, (Decoder, ForeignDecoder))
    calls: dict[int, Callable[[], Any]] = {}
    for size in BATCHES:
        batch = next(iter(_batches(samples, np.resize(ids, size), size)))
        if writes:
            prompt = np.resize(batch["tokens"][0].cpu().numpy(), PROMPT_TOKENS).tolist()
            sampling = Sampling(NEW_TOKENS, temperature=0.0)
            calls[size] = partial(generate, opened.model, [prompt] * size, sampling)
        else:
            calls[size] = partial(getattr(opened.recipe, "outputs", None) or opened.recipe.loss, opened.model, batch)
        for _ in range(WARM_UP_CALLS):
            calls[size]()
    seconds: dict[int, list[float]] = {size: [] for size in BATCHES}
    for _ in turns:
        for size, call in calls.items():
            seconds[size] += _times(call)
    scale = 1000 / NEW_TOKENS if writes else 1000
    ends = {str(size): np.percentile(times, (50, 95)) * scale for size, times in seconds.items()}
    told = f"a token, of {NEW_TOKENS} behind {PROMPT_TOKENS}" if writes else "a call"
    return {size: (float(median), float(most)) for size, (median, most) in ends.items()}, told


def _times(call: Callable[[], Any]) -> list[float]:
    """Return the seconds of a turn's calls."""
    seconds: list[float] = []
    while len(seconds) < LEAST_CALLS or (len(seconds) < MOST_CALLS and sum(seconds) < MOST_SECONDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _batches(samples: Any, ids: np.ndarray, size: int) -> Any:
    """Yield batches of tensors."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for begin in range(0, len(ids), size):
        own = ids[begin : begin + size]
        batch = samples.batch(own, np.zeros_like(own))
        yield {name: torch.from_numpy(array).to(device) for name, array in batch.items()}


def _choose(num_samples: int, options: Options, is_whole: bool) -> np.ndarray:
    ids = np.arange(num_samples, dtype=np.int64)
    if is_whole or num_samples <= options.num_samples:
        return ids
    return np.sort(np.random.default_rng(options.seed).choice(ids, options.num_samples, replace=False))


def folder_bytes(folder: Path) -> int:
    """Add up the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes: VmRSS or VmHWM, its peak; getrusage's has the parent's in it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items() if isinstance(value, (int, float))}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
