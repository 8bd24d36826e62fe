"""Make one HTML page of a run, or of several to compare: it needs no network, no server and no other file."""

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bigbatch.recipes.core.arguments import Parser
from bigbatch.recipes.core.errors import EXIT_DONE, UserError
from bigbatch.tools import report_sections as section
from bigbatch.tools.report_page import page
from bigbatch.tools.report_run import Run, Summary, clock, read_run, summarize


def main(argv: list[str]) -> int:
    """Run `bigbatch report`; the path of the page goes to standard output."""
    parser = Parser(prog="bigbatch report", description=__doc__)
    parser.add_argument("run_dir", nargs="+", type=Path, help="a run folder; several are compared on one page")
    parser.add_argument("--out", type=Path, help="the page (RUN_DIR/report.html; for several: ./comparison.html)")
    arguments = parser.parse_args(argv)
    sys.stdout.write(f"{report(arguments.run_dir, arguments.out)}\n")
    return EXIT_DONE


def report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of these runs and return its path.

    Raises UserError when a folder is no run, or when the page can't be written.
    """
    runs = [read_run(Path(run_dir)) for run_dir in run_dirs]
    if out is None:
        out = Path(run_dirs[0]) / "report.html" if len(runs) == 1 else Path("comparison.html")
    title, body = _one_run(runs[0]) if len(runs) == 1 else _several_runs(runs)
    try:
        _write_atomically(out, page(title, body))
    except OSError as error:
        raise UserError(str(out), f"can't be written: {error.strerror}; name another place with --out") from None
    return out


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _one_run(run: Run) -> tuple[str, str]:
    summary = summarize(run)
    sections = [
        ("overview", "Overview", section.headline(run, summary)),
        ("charts", "Curves", section.curves([run])),
        ("time", "Where the time went", section.time_bar(run)),
        ("samples", "Samples of text", section.text_samples(run)),
        *_background(run),
    ]
    return f"{run.name} - training report", _frame(_header(run, summary), sections)


def _background(run: Run) -> list[tuple[str, str, str]]:
    return [
        ("configuration", "Configuration", section.setting_tree(run.document, "run.json")),
        ("deepspeed", "DeepSpeed document", section.setting_tree(run.deepspeed, "deepspeed.json")),
        ("environment", "Environment", section.setting_tree(run.environment, "environment.json")),
        ("events", "Events", section.event_table(run.metrics.events)),
    ]


def _several_runs(runs: list[Run]) -> tuple[str, str]:
    names = _distinct_names(runs)
    runs = [run._replace(name=name) for run, name in zip(runs, names, strict=True)]
    title = f"{len(runs)} runs compared"
    header = f'<p class="eyebrow">bigbatch training report</p><h1>{title}</h1>'
    header += f'<p class="purpose">{section.escape(", ".join(names))}</p>'
    sections = [
        ("overview", "Overview", section.comparison_table(runs)),
        ("charts", "Curves", section.curves(runs)),
        ("differences", "Settings that differ", section.difference_table(runs)),
    ]
    for number, run in enumerate(runs, start=1):
        parts = [("", "Samples of text", section.text_samples(run)), *_background(run)]
        folded = "".join(f"<details><summary>{heading}</summary>{content}</details>" for _, heading, content in parts)
        sections.append((f"run-{number}", section.escape(run.name), folded))
    return title, _frame(header, sections)


def _distinct_names(runs: list[Run]) -> list[str]:
    names = [run.name for run in runs]
    return [f"{name} ({n})" if names.count(name) > 1 else name for n, name in enumerate(names, start=1)]


def _frame(header: str, sections: list[tuple[str, str, str]]) -> str:
    """Lay out (id, heading, content), all escaped, under the header."""
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in sections)
    blocks = "".join(f'<section id="{key}"><h2>{heading}</h2>{content}</section>' for key, heading, content in sections)
    made = f"<footer>Made by bigbatch report on {clock(datetime.now(UTC).timestamp())}.</footer>"
    return f"<header>{header}</header><nav><div>{links}</div></nav><main>{blocks}{made}</main>"


def _header(run: Run, summary: Summary) -> str:
    recipe = section.escape(run.document.get("recipe", "unknown"))
    about = run.document.get("about") or {}
    purpose = f'<p class="purpose">{section.escape(about["purpose"])}</p>' if about.get("purpose") else ""
    facts = [f'<b class="{summary.mood}">{section.escape(summary.state)}</b>']
    if run.metrics.events:
        last_sign = max(line["time"] for lines in run.metrics for line in lines)
        facts += [f"started {clock(run.metrics.events[0]['time'])}", f"last heard of {clock(last_sign)}"]
    content_id = (run.environment or {}).get("content_id")
    facts += [f"content id <code>{section.escape(content_id)}</code>"] if content_id else []
    return (
        f'<p class="eyebrow">bigbatch training report &middot; {recipe}</p><h1>{section.escape(run.name)}</h1>{purpose}'
        f'<p class="state">{"".join(f"<span>{fact}</span>" for fact in facts)}</p>'
    )
