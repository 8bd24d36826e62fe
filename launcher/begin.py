"""How a run begins or goes on in a folder, on this machine or in a batch job."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigbatch.launcher import preflight
from bigbatch.launcher.documents import read_json
from bigbatch.launcher.problems import InvalidDocumentError, Problem
from bigbatch.launcher.resolve import Resolved, compare
from bigbatch.launcher.run_dir import Resume, RunDir, check_resume, write
from bigbatch.recipes.core.errors import UserError


def document_of(run: str) -> str:
    """Return the document that a run folder was started with; a name or path as it is."""
    folder = RunDir(Path(run))
    if not folder.exists() and folder.path.is_dir() and run:
        raise UserError(run, "is a folder without a run.json, so no run folder; give a run document or its name")
    return str(folder.run) if folder.exists() else run


def refuse_errors(resolved: Resolved, ranks: int) -> None:
    """Raise UserError with all that preflight knows to be wrong for a run on this machine; say what it warns of."""
    findings = preflight.check(resolved, ranks)
    refuse(
        [finding._replace(severity="error") if finding.rule == preflight.NEEDS_GPU else finding for finding in findings]
    )


def refuse(findings: Sequence[preflight.Finding]) -> None:
    """Raise UserError with the findings that are errors; say those that are warnings."""
    problems = []
    for finding in findings:
        message = finding.message + (f" -> {finding.advice}" if finding.advice else "")
        if finding.severity == "error":
            problems.append(Problem(finding.path, message))
        elif finding.severity == "warning":
            _say(f"warning: {finding.path}: {message}")
    if problems:
        raise InvalidDocumentError(problems)


def set_up(folder: RunDir, resolved: Resolved, deepspeed: dict[str, Any], resume: Resume) -> None:
    """Write the run folder's documents; when its run has begun, say what changes and refuse what cannot."""
    check_resume(folder, resume)
    if folder.has_checkpoint() and folder.exists():
        problems = []
        for change in compare(read_json(folder.run), resolved.document):
            told = f"{json.dumps(change.old)} -> {json.dumps(change.new)}"
            if change.kind == "impossible":
                problems.append(Problem(change.path, f"{told}, but the run has begun; right is a new --run-dir"))
            else:
                _say(f"changed: {change.path}: {told} ({change.kind.replace('_', ' ')})")
        if problems:
            raise InvalidDocumentError(problems)
    write(folder, resolved.document, deepspeed, resolved.content_id)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
