"""Nodes that failed, remembered in the run folder across starts, until each one's time is over. Standard library."""

import json
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

FILE = "bad_nodes.json"


def remember(run_dir: Path, reasons: Mapping[str, str], hours: float) -> None:
    """Note nodes with the reason of each; one that is known already counts from now."""
    now = datetime.now().astimezone().replace(microsecond=0)
    until = (now + timedelta(hours=hours)).isoformat()
    new = {node: {"reason": why, "since": now.isoformat(), "until": until} for node, why in reasons.items()}
    if new:
        temporary = run_dir / f".{FILE}"
        temporary.write_text(json.dumps({**bad_nodes(run_dir), **new}, indent=2) + "\n")
        temporary.replace(run_dir / FILE)


def bad_nodes(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the nodes whose time is not over: reason, since, until."""
    try:
        known = json.loads((run_dir / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return {
        node: about for node, about in known.items() if datetime.fromisoformat(about["until"]).timestamp() > time.time()
    }
