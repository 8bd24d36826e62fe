"""The command line: a table from verb to typed function. What is heavy is imported inside the verb that needs it.

Longer than other files: all verbs and their flags stand in one place.
"""

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import json
import os
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from bigbatch.recipes.core.arguments import Parser
from bigbatch.recipes.core.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    UserError,
    as_user_error,
    one_line,
)
from bigbatch.recipes.core.process import keep_streams_open, quiet_libraries

if TYPE_CHECKING:
    from bigbatch.launcher.resolve import Resolved
    from bigbatch.launcher.run_dir import Resume

EPILOG = """RUN is a name that `bigbatch recipes` lists (gpt/quick) or the path of a run document. Progress goes to
standard error, results to standard output. Exit status: 0 done; 2 a mistake in what was asked, told in one line;
75 stopped and saved, the same command goes on; 1 anything else."""

ENDING_PREPARE = "ending; what is prepared stays"
BENCH_RUNS = {
    "train": "gpt/bench",
    "checkpoint": "gpt/124m",
    "convert": "gpt/124m",
    "comm": "gpt/bench",
    "deploy": None,
}
WITHOUT_DATA = ("checkpoint", "convert")
"""What a bench measures though the run's data are not there."""
# The steps that `bench comm` measures are to have no gradients to send.
ALONE = (
    "deepspeed=null",
    "parallel.zero_stage=null",
    "parallel.sync=local_sgd",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status; a user sees a line, never a bare traceback (unless BIGBATCH_DEBUG=1)."""
    keep_streams_open()
    quiet_libraries()
    try:
        status = _run_verb(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return status
    except UserError as error:
        for line in str(error).splitlines():
            _say(f"error: {line}")
        return EXIT_USER_ERROR
    except BrokenPipeError:  # `bigbatch show gpt/quick | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except Exception as error:
        if os.environ.get("BIGBATCH_DEBUG") == "1":
            raise
        if mistake := as_user_error(error):
            _say(f"error: {mistake}")
            return EXIT_USER_ERROR
        what = one_line(str(error)) or "no reason given"
        _say(f"error: {type(error).__name__}: {what} (traceback: {_keep_traceback()})")
        return EXIT_FAILED


def _keep_traceback() -> str:
    """Write the traceback of the error at hand to a file; return its name."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="bigbatch-failure-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        return file.name
    except OSError:
        return "BIGBATCH_DEBUG=1 shows it"


def quickstart() -> int:
    """Take the whole way once on this machine: train, stop, resume, evaluate, convert, generate, report."""
    from bigbatch.launcher.quickstart import quickstart as run

    return run()


def recipes(as_json: bool) -> int:
    """List the run documents that there are, with what each needs and reaches."""
    from bigbatch.launcher.documents import document_names, load_run

    abouts = {name: load_run(name).get("about", {}) for name in document_names()}
    if as_json:
        _print_json([{"name": name, **about} for name, about in abouts.items()])
        return EXIT_DONE
    for name, about in abouts.items():
        print(f"{name}\n" + "".join(f"    {key}: {text}\n" for key, text in about.items() if text))
    return EXIT_DONE


def show(run: str, overrides: list[str], as_json: bool) -> int:
    """Print a run document with all that it inherits, the DeepSpeed document, and the content id."""
    resolved = _resolve(run, overrides)
    shown = {"content_id": resolved.content_id, "run": resolved.document, "deepspeed": resolved.deepspeed}
    if as_json:
        _print_json(shown)
        return EXIT_DONE
    for line in _flat(shown):
        print(line)
    return EXIT_DONE


def check(
    run: str,
    ranks: int | None,
    profile: str | None,
    nodes: str | None,
    time_limit: str | None,
    overrides: list[str],
    as_json: bool,
) -> int:
    """Find what can be known to be wrong before a run, here or on a cluster; needs no GPU and no torch."""
    from bigbatch.launcher import preflight
    from bigbatch.launcher.local import default_ranks

    if profile is None:
        if nodes or time_limit:
            raise UserError("--nodes" if nodes else "--time", "says nothing without --profile")
        findings = preflight.check_run(_document_of(run), overrides, ranks or default_ranks())
    elif ranks:
        raise UserError("--ranks", "are as many a node as the profile says; --nodes says on how many")
    else:
        from bigbatch.launcher.preflight_cluster import check_run_on

        findings = check_run_on(_document_of(run), overrides, profile, nodes, time_limit)
    print(preflight.to_json(findings) if as_json else preflight.render(findings))
    return EXIT_USER_ERROR if preflight.has_errors(findings) else EXIT_DONE


def plan(run: str, overrides: list[str], as_json: bool, **machine: Any) -> int:
    """List how a run may be divided over GPUs, best first, with memory, time, energy and cost; needs no GPU."""
    from bigbatch.launcher import plan as plans

    return plans.plan(_document_of(run), overrides, as_json=as_json, **machine)


def prepare(run: str, overrides: list[str]) -> int:
    """Turn raw data into cleaned, tokenized, fingerprinted shards; what is done already is not done again."""
    from bigbatch.launcher.local import run_ranks, worker_command
    from bigbatch.launcher.run_dir import RunDir, write

    _need_train_extra()
    resolved = _resolve(run, overrides)
    with _passing_folder("prepare") as folder:
        write(RunDir(folder), resolved.document, resolved.deepspeed, resolved.content_id)
        status = run_ranks(worker_command("prepare", folder), 1, folder, answer=ENDING_PREPARE)
    if status == EXIT_REQUEUE:
        _say("stopped; the same command goes on where it was")
    return status


def bundle(run: str, out: Path, wheels: bool, overrides: list[str]) -> int:
    """Gather all that a run needs, prepared, into a folder or archive for nodes without a network."""
    from bigbatch.launcher import bundle as bundles

    resolved = _resolve(run, overrides)
    if importlib.util.find_spec("torch") is None:
        _say("warning: torch is not here to prepare the data with: the job will")
    elif status := prepare(run, overrides):
        return status
    count = bundles.bundle(resolved, out, wheels)
    _say(f"{out}: {count} files; to train from it: {bundles.how_to_train(out)}")
    return EXIT_DONE


def unbundle(bundle: Path, folder: Path) -> int:
    """Unpack a bundle's archive elsewhere, and compare every file with its hash."""
    from bigbatch.launcher import bundle as bundles

    count = bundles.unbundle(bundle, folder)
    _say(f"{folder}: {count} files, all whole; to train from it: {bundles.how_to_train(folder)}")
    return EXIT_DONE


def train(run: str, ranks: int | None, run_dir: Path | None, overrides: list[str], resume: "Resume") -> int:
    """Train to the end, or go on where a run stopped; data are prepared first."""
    from bigbatch.launcher.begin import refuse_errors, set_up
    from bigbatch.launcher.local import StopSignals, default_ranks, run_ranks, worker_command
    from bigbatch.launcher.run_dir import RunDir, choose, hold
    from bigbatch.recipes.core.engine_config import complete
    from bigbatch.recipes.core.run_home import enter_home

    _need_train_extra()
    if RunDir(Path(run)).exists() and run_dir is None:
        run = str(enter_home(Path(run)))
    resolved = _resolve(run, overrides)
    ranks = ranks or default_ranks()
    refuse_errors(resolved, ranks)
    deepspeed = complete(resolved.config, resolved.deepspeed, ranks)
    folder = choose(run, run_dir)
    with hold(folder), StopSignals() as signals:
        set_up(folder, resolved, deepspeed, resume)
        _say(f"run folder {folder.path}, content id {resolved.content_id}, {ranks} rank{'s' if ranks > 1 else ''}")
        command = worker_command("prepare", folder.path)
        status = run_ranks(command, 1, folder.path, signals=signals, answer=ENDING_PREPARE)
        if status == EXIT_DONE:
            status = run_ranks(worker_command("train", folder.path), ranks, folder.path, signals=signals)
    if status == EXIT_REQUEUE:
        _say(f"stopped; to go on: bigbatch train {shlex.quote(str(folder.path))} --ranks {ranks}")
    return status


def submit(
    run: str,
    profile: str | None,
    nodes: str | None,
    time_limit: str | None,
    run_dir: Path | None,
    overrides: list[str],
    chain: int | None,
    sweep: Path | None,
    dry_run: bool,
    snapshot: bool,
) -> int:
    """Check a run, write its job.sbatch, and put it into Slurm's queue; it goes on by itself until it is done."""
    from bigbatch.launcher.profiles import load_profile
    from bigbatch.launcher.submit import Wanted, submit_sweep
    from bigbatch.launcher.submit import submit as submit_one

    if profile is None:
        raise UserError("--profile", "missing; right is the name of one that `bigbatch profile ls` lists, or a path")
    if sweep and chain:
        raise UserError("--chain", "does not go with --sweep; submit the members one by one")
    wanted = Wanted(nodes, time_limit, run_dir, overrides, chain, dry_run, snapshot)
    if sweep:
        return submit_sweep(run, load_profile(profile), wanted, sweep)
    return submit_one(run, load_profile(profile), wanted)


def evaluate(model: Path, split: str, data_run: str | None) -> int:
    """Evaluate a model on data held out, of a run the best checkpoint, else its newest; prints JSON."""
    from bigbatch.launcher.local import run_ranks, worker_command
    from bigbatch.launcher.run_dir import RunDir
    from bigbatch.recipes.core.run_home import enter_home

    _need_train_extra()
    if not RunDir(model).exists():
        if not (model / "config.json").is_file() and not (model / "manifest.json").is_file():
            raise UserError(str(model), "is no run folder (it has no run.json), no checkpoint and no model folder")
        document = _resolve(data_run, []).document if data_run else None
        path = model.absolute()
        return importlib.import_module("bigbatch.tools.judge").print_figures(enter_home(path), split, document)
    if data_run:
        raise UserError("--run", "goes with a model folder; a run is evaluated on its own data")
    run_dir = enter_home(model)
    with _passing_folder("evaluate") as own:  # logs and failures in the run's own folder are those of its training
        return run_ranks(worker_command(f"evaluate:{split}", run_dir, own), 1, own, answer="ending")


def bench(
    what: str,
    bench_run: str | None,
    ranks: int | None,
    overrides: list[str],
    rounds: int,
    steps: int,
    as_json: bool,
) -> int:
    """Measure training against other trainers, saves against DeepSpeed's, or communication, here and in turns."""
    from bigbatch.launcher.begin import refuse_errors
    from bigbatch.launcher.local import default_ranks, run_ranks, worker_command
    from bigbatch.launcher.run_dir import RunDir, write
    from bigbatch.recipes.core.engine_config import complete

    _need_train_extra()
    if what == "deploy":
        if not bench_run:
            raise UserError("MODEL", "is missing; right is a run folder, a checkpoint or a model folder")
        try:
            return importlib.import_module("bigbatch.tools.bench_deploy").bench_deploy(Path(bench_run), rounds, as_json)
        except ModuleNotFoundError as error:
            raise UserError("bigbatch bench deploy", _missing(error.name or "", "deploy")) from None
    if ranks and what != "comm":
        raise UserError("--ranks", f"found {ranks}; bench {what} takes one rank, only bench comm several")
    if ranks == 1:
        raise UserError("--ranks", "found 1; communication takes 2 or more")
    ranks = ranks or (max(2, default_ranks()) if what == "comm" else 1)
    resolved = _resolve(bench_run or BENCH_RUNS[what], overrides)
    for axis in ("tensor", "pipeline", "sequence", "expert"):
        if (degree := getattr(resolved.config.parallel, axis)) > 1:
            how = "of data ranks alone" if what == "comm" else "on one rank"
            message = f"found {degree}; bench {what} measures a model {how}: --set parallel.{axis}=1 would be right"
            raise UserError(f"parallel.{axis}", message)
    if what == "comm":
        resolved = _resolve(bench_run or BENCH_RUNS[what], [*overrides, *ALONE])
    if what not in WITHOUT_DATA:
        refuse_errors(resolved, ranks)
    with _passing_folder("bench") as run_dir:
        deepspeed = complete(resolved.config, resolved.deepspeed, ranks)
        write(RunDir(run_dir), resolved.document, deepspeed, resolved.content_id)
        if what in WITHOUT_DATA:
            module = importlib.import_module(f"bigbatch.tools.bench_{what}")
            return getattr(module, f"bench_{what}")(run_dir, rounds, as_json)
        status = run_ranks(worker_command("prepare", run_dir), 1, run_dir, answer=ENDING_PREPARE)
        if status != EXIT_DONE:
            return status
        if what == "comm":
            arguments = [str(run_dir), str(rounds), "json" if as_json else "table"]
            command = [sys.executable, "-P", "-m", "bigbatch.tools.bench_comm", *arguments]
            return run_ranks(command, ranks, run_dir, answer="ending")
        return importlib.import_module("bigbatch.tools.bench").bench_train(run_dir, rounds, steps, as_json)


def status(run_dirs: list[Path], as_json: bool) -> int:
    """Tell how runs are: state, step, loss, speed, last checkpoint, restarts; all under runs/ or those named."""
    from bigbatch.launcher import jobs

    statuses = jobs.status(run_dirs)
    if as_json:
        _print_json([own._asdict() for own in statuses])
    else:
        print(jobs.render(statuses))
    return EXIT_DONE


def logs(run_dir: Path, rank: int | None, all_ranks: bool, follow: bool) -> int:
    """Print what a run's job has written, or one rank of it, or all."""
    from bigbatch.launcher import jobs

    return jobs.logs(run_dir, rank, all_ranks=all_ranks, follow=follow)


def cancel(run_dir: Path, now: bool) -> int:
    """Have a submitted run save, end, and not start again."""
    from bigbatch.launcher import jobs

    return jobs.cancel(run_dir, now=now)


def resume(run_dir: Path) -> int:
    """Submit a run again that was submitted before; it goes on from its last checkpoint."""
    from bigbatch.launcher import jobs

    return jobs.resume(run_dir)


def profile(action: str, profile_name: str | None, partition: str | None, output: Path | None, as_json: bool) -> int:
    """Write a profile of this cluster (new NAME), list profiles (ls), or print one with all defaults (show NAME)."""
    from bigbatch.launcher import profile_new

    if action == "ls":
        return profile_new.list_profiles(as_json=as_json)
    if profile_name is None:
        raise UserError(f"bigbatch profile {action}", "takes the name of a profile")
    if action == "show":
        return profile_new.show_profile(profile_name)
    return profile_new.new_profile(profile_name, partition, output)


@contextlib.contextmanager
def _passing_folder(verb: str) -> Iterator[Path]:
    """Give a run folder for the time of a verb; it stays where a failure has left its digest in it."""
    from bigbatch.recipes.core.heartbeat import PASSING_PREFIX

    folder = Path(tempfile.mkdtemp(prefix=f"{PASSING_PREFIX}{verb}-"))
    try:
        yield folder
    finally:
        if not (folder / "failure.json").exists():
            shutil.rmtree(folder, ignore_errors=True)


class Verb(NamedTuple):
    """A verb of our own: its function takes what the flags give, by name."""

    function: Callable[..., int]
    flags: tuple[str, ...]


PLAN_FLAGS = ("--gpus", "--card", "--gpu-memory", "--gpus-per-node", "--network", "--price", "--top")
SUBMIT_FLAGS = ("--nodes", "--time", "--chain", "--sweep", "--snapshot", "--dry-run")
VERBS = {
    "quickstart": Verb(quickstart, ()),
    "recipes": Verb(recipes, ("--json",)),
    "show": Verb(show, ("run", "--set", "--json")),
    "check": Verb(check, ("run", "--ranks", "--profile", "--nodes", "--time", "--set", "--on-error", "--json")),
    "plan": Verb(plan, ("run", *PLAN_FLAGS, "--set", "--json")),
    "prepare": Verb(prepare, ("run", "--set", "--on-error")),
    "bundle": Verb(bundle, ("run", "out", "--wheels", "--set")),
    "unbundle": Verb(unbundle, ("bundle", "folder")),
    "train": Verb(train, ("run", "--ranks", "--run-dir", "--set", "--on-error", "--resume")),
    "status": Verb(status, ("run_dirs", "--json")),
    "logs": Verb(logs, ("run_dir", "--rank", "--all", "-f/--follow")),
    "cancel": Verb(cancel, ("run_dir", "--now")),
    "resume": Verb(resume, ("run_dir",)),
    "submit": Verb(submit, ("run", "--profile", *SUBMIT_FLAGS, "--run-dir", "--set", "--on-error")),
    "profile": Verb(profile, ("action", "profile_name", "--partition", "--output", "--json")),
    "evaluate": Verb(evaluate, ("model", "--split", "--run")),
    "bench": Verb(bench, ("what", "bench_run", "--ranks", "--set", "--rounds", "--steps", "--json")),
}

# verb -> (module whose main(arguments) owns the flags, summary)
TOOLS = {
    "generate": ("generate", "Generate text with a model."),
    "chat": ("chat", "Talk with a model in the terminal."),
    "predict": ("predict", "Tell of which kind texts are: label and probability."),
    "search": ("search", "Find the documents that match a query best."),
    "triples": ("triples", "Find what texts say: subject, relation and object, as JSON lines or N-Triples."),
    "checkpoint": ("inspect", "List (ls), verify, compare (diff) or remove (gc) checkpoints."),
    "convert": ("convert", "Turn a run's checkpoint into a Hugging Face folder, compared before it counts as done."),
    "export": ("export", "Write a model for another engine: ONNX, LiteRT, ExecuTorch or llama.cpp."),
    "quantize": ("quantize", "Store a model in 8 or 4 bits, measured before and after."),
    "prune": ("prune", "Take weights out of a model, and train it on."),
    "import-deepspeed": ("import_deepspeed", "Turn a checkpoint of DeepSpeed's own into a safetensors folder."),
    "bench serve": ("bench_serve", "Measure a server of a model under load."),
    "serve": ("serve", "Answer HTTP requests with a model; as OpenAI's API where it writes text."),
    "report": ("report", "Write one HTML page about one run or several."),
    "doctor": ("doctor", "Say which fused parts are in use on this machine, and why not the others."),
}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; right is a number from 1 on")
    return int(text)


def _on_error(text: str) -> str:
    if text not in ("fail", "skip"):
        raise argparse.ArgumentTypeError(f"found {text!r}; right is fail or skip")
    return f"data.on_error={text}"


def _rank(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}; right is a number from 0 on")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}; right is a number above 0")
    return number


FLAGS: dict[str, dict[str, Any]] = {
    "run": {"metavar": "RUN | RUN_DIR", "help": "name or path of a run document, or a run folder"},
    "run_dir": {"metavar": "RUN_DIR", "type": Path, "help": "folder of a run"},
    "model": {"metavar": "MODEL", "type": Path, "help": "run folder, checkpoint or model folder"},
    "--run": {"dest": "data_run", "metavar": "RUN", "help": "of a model folder: whose data (default: its own run's)"},
    "run_dirs": {"metavar": "RUN_DIR", "nargs": "*", "type": Path, "help": "default: all under runs/"},
    "--rank": {"type": _rank, "metavar": "N", "help": "what this rank has written (default: the job)"},
    "--all": {"action": "store_true", "dest": "all_ranks", "help": "what each rank has written, with its name"},
    "-f/--follow": {"action": "store_true", "help": "go on with what comes, until the run ends"},
    "--now": {"action": "store_true", "help": "do not wait for the ranks to save"},
    "action": {"choices": ("new", "ls", "show"), "help": "what to do"},
    "profile_name": {"metavar": "NAME", "nargs": "?", "help": "new, show: name of the profile (show: or a path)"},
    "--partition": {"metavar": "P", "help": "new: default: the cluster's own, or the one with the most GPUs"},
    "--output": {"type": Path, "metavar": "FILE", "help": "new: default: ~/.config/bigbatch/profiles/NAME.v1.json"},
    "--ranks": {"type": _positive, "metavar": "N", "help": "processes on this host (default: one a GPU, else 1)"},
    "what": {"choices": tuple(BENCH_RUNS), "help": "what to measure"},
    "bench_run": {
        "metavar": "RUN | MODEL",
        "nargs": "?",
        "help": "default: gpt/bench; for checkpoint and convert gpt/124m; for deploy a run or model folder",
    },
    "--rounds": {"type": _positive, "metavar": "N", "default": 5, "help": "turns of each (default 5)"},
    "--steps": {"type": _positive, "metavar": "N", "default": 4, "help": "train: steps a turn (default 4)"},
    "--gpus": {"type": _positive, "metavar": "N", "required": True, "help": "how many there are in all"},
    "--card": {"metavar": "NAME", "default": "H100", "help": "V100, A100-40, A100, H100, H200, B200, MI300X or CPU"},
    "--gpu-memory": {"type": _above_zero, "metavar": "GIB", "help": "of a card (default: the card's own)"},
    "--gpus-per-node": {"type": _positive, "metavar": "N", "default": 8, "help": "default 8"},
    "--network": {"type": _above_zero, "metavar": "GB_A_SECOND", "help": "of a card to other nodes"},
    "--price": {"type": _above_zero, "metavar": "DOLLARS", "help": "of a card for an hour"},
    "--top": {"type": _positive, "metavar": "N", "default": 10, "help": "show the best so many (default 10)"},
    "out": {"metavar": "OUT", "type": Path, "help": "new folder, or archive: .tar, .tar.gz or .tgz"},
    "bundle": {"metavar": "BUNDLE", "type": Path, "help": "a bundle's archive"},
    "folder": {"metavar": "FOLDER", "type": Path, "help": "new folder"},
    "--wheels": {"action": "store_true", "help": "with the packages, as pip fetches them, and their hashes"},
    "--profile": {"metavar": "P", "help": "name or path of a cluster's profile"},
    "--nodes": {"metavar": "N | MIN-MAX", "help": "how many nodes (default: the profile's)"},
    "--time": {"metavar": "T", "dest": "time_limit", "help": "time limit, as 90 or 12:00:00 (default: the profile's)"},
    "--chain": {"type": _positive, "metavar": "N", "help": "N jobs in a row, where a job may not requeue itself"},
    "--sweep": {"type": Path, "metavar": "FILE", "help": "one array of runs, each with other settings"},
    "--snapshot": {"action": "store_true", "help": "copy the code into the run folder, and run that copy"},
    "--dry-run": {"action": "store_true", "help": "print the batch script and change nothing"},
    "--run-dir": {"type": Path, "metavar": "D", "help": "folder of the run (default: a new one under runs/)"},
    "--set": {
        "action": "append",
        "dest": "overrides",
        "default": [],
        "metavar": "A.B=VALUE",
        "help": "change a setting of the document; may be repeated",
    },
    "--on-error": {
        "action": "append",
        "dest": "overrides",
        "type": _on_error,
        "metavar": "fail|skip",
        "default": argparse.SUPPRESS,  # it adds to what --set gives
        "help": "what to do with a row of data that cannot be taken (default: the document's data.on_error)",
    },
    "--resume": {
        "choices": ("auto", "never", "must"),
        "default": "auto",
        "help": "go on from a checkpoint if there is one (auto); refuse when there is one (never), or none (must)",
    },
    "--split": {"choices": ("validation", "test"), "default": "validation", "help": "default: validation"},
    "--json": {"action": "store_true", "dest": "as_json", "help": "print the result as JSON"},
}


def _run_verb(arguments: list[str]) -> int:
    if arguments[:2] == ["bench", "serve"]:
        return _run_tool("bench serve", arguments[2:])
    if arguments[:1] == ["serve"] and any(one.partition("=")[0] == "--sbatch" for one in arguments):
        from bigbatch.launcher import serve_job

        return serve_job.main(arguments[1:])
    if arguments and arguments[0] in TOOLS:
        return _run_tool(arguments[0], arguments[1:])
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        raise UserError(f"bigbatch {arguments[0]}", _no_such_verb(arguments[0]))
    options = vars(_parser().parse_args(arguments or ["--help"]))
    return VERBS[options.pop("verb")].function(**options)


def _run_tool(verb: str, arguments: list[str]) -> int:
    try:
        tool = importlib.import_module(f"bigbatch.tools.{TOOLS[verb][0]}")
        return tool.main(arguments)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("bigbatch"):
            raise
        raise UserError(f"bigbatch {verb}", _missing(error.name or "")) from None


def _no_such_verb(verb: str) -> str:
    known = [*VERBS, *TOOLS]
    close = difflib.get_close_matches(verb, known, n=1)
    return f"there is no such verb; did you mean {close[0]}?" if close else f"there is no such verb; {', '.join(known)}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="bigbatch",
        description="DeepSpeed training recipes from raw text to a deployed model.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        summary = (verb.function.__doc__ or "").splitlines()[0]
        subparser = verbs.add_parser(name, help=summary, description=summary, epilog=EPILOG, allow_abbrev=False)
        for flag in verb.flags:
            subparser.add_argument(*flag.split("/"), **FLAGS[flag])
    for name, (_, summary) in TOOLS.items():
        verbs.add_parser(name, help=f"{summary} (bigbatch {name} --help)")
    return parser


class _Version(argparse.Action):
    """Looks the version up only when asked."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"bigbatch {version('bigbatch')}")
        parser.exit()


def _resolve(run: str, overrides: list[str]) -> "Resolved":
    from bigbatch.launcher.resolve import resolve

    return resolve(_document_of(run), overrides)


def _document_of(run: str) -> str:
    from bigbatch.launcher.begin import document_of

    return document_of(run)


def _need_train_extra() -> None:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("deepspeed") is None:
        raise UserError("bigbatch", _missing("torch or deepspeed"))


def _missing(module: str, extra: str = "train") -> str:
    return f"this needs {module}, which is not installed; right is: pip install 'bigbatch[{extra}]'"


def _flat(value: Any, path: str = "") -> list[str]:
    """Return a line a setting: its path, as --set takes it, and its value."""
    if isinstance(value, dict) and value:
        return [line for key, item in value.items() for line in _flat(item, f"{path}.{key}" if path else key)]
    return [f"{path} = {json.dumps(value, ensure_ascii=False)}"]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
