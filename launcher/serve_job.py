"""`bigbatch serve MODEL --sbatch PROFILE`: the batch script of a job that serves a model on one node."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bigbatch.launcher.profiles import NodeRange, Profile, load_profile
from bigbatch.launcher.sbatch import TEMPLATE, JobRequest, directives, environment, fill, modules, quote
from bigbatch.launcher.submit import CARRIED
from bigbatch.recipes.core.arguments import Parser
from bigbatch.recipes.core.errors import EXIT_DONE, UserError

FLAG = "--sbatch"
DRAIN_SECONDS = 90  # before the time limit the server is told to stop
NOT_OURS = ("output=", "open-mode=", "signal=", "requeue", "no-requeue")


def main(arguments: Sequence[str]) -> int:
    """Print the script; the flags beside --sbatch are the server's."""
    parser = Parser(prog="bigbatch serve", add_help=False, allow_abbrev=False)
    parser.add_argument(FLAG, required=True, metavar="PROFILE")
    known, own = parser.parse_known_args(arguments)
    print(render(load_profile(known.sbatch), own), end="")
    return EXIT_DONE


def render(profile: Profile, own: Sequence[str]) -> str:
    """Return the script of a job that runs `bigbatch serve` with these arguments, the model first, on one GPU."""
    if not own or own[0].startswith("-"):
        raise UserError(FLAG, f"takes the model first: bigbatch serve MODEL {FLAG} PROFILE")
    model = Path(own[0]).absolute()
    if not model.is_dir():
        raise UserError(str(model), "there is no such folder; give a run folder, a checkpoint or a model folder")
    if profile.container:
        raise UserError("container", "is of training; give a profile without it, whose python has bigbatch installed")
    gpus = profile.gpus and profile.gpus.model_copy(update={"per_node": 1})
    alone = profile.model_copy(update={"gpus": gpus, "ranks_per_node": None if gpus else 1, "exclusive": False})
    carried = {name: os.environ[name] for name in CARRIED if name in os.environ}
    python, nodes = profile.python or sys.executable, NodeRange(1, 1)
    request = JobRequest(model, Path.cwd(), nodes, profile.time_limit, DRAIN_SECONDS, python, environment=carried)
    told = [one for one in directives(alone, request) if not one.startswith((*NOT_OURS, "job-name="))]
    told += [f"signal=B:TERM@{DRAIN_SECONDS}", "no-requeue", "output=serve-%j.log", "job-name=serve"]
    command = [python, "-P", "-m", "bigbatch.launcher.cli", "serve", str(model)]
    flags = [*_unless(own, "--host", "0.0.0.0"), *_unless(own, "--port", "0")]  # noqa: S104 - it needs the token
    parts = {
        "@DIRECTIVES@": "\n".join(f"#SBATCH --{one}" for one in told),
        "@ENVIRONMENT@": "\n".join(f"export {name}={quote(value)}" for name, value in environment(alone, request)),
        "@MODULES@": modules(profile.modules),
        "@COMMAND@": shlex.join([*command, *flags, *own[1:]]),
    }
    return fill(TEMPLATE.with_name("serve.sbatch"), parts)


def _unless(own: Sequence[str], flag: str, value: str) -> list[str]:
    given = any(one == flag or one.startswith(f"{flag}=") for one in own)
    return [] if given else [flag, value]
