"""What a folder's file system still takes: free bytes and inodes, and the user's quota there. No torch."""

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ANSWER_SECONDS = 1.0  # such commands hang while a file server is away


class Room(NamedTuple):
    """What may still be written."""

    free_bytes: float
    free_files: float
    has_quota: bool
    """Whether a quota is known of; where none is, it may be that nothing here can tell it."""


class Mount(NamedTuple):
    """A mounted file system."""

    source: str
    target: str
    kind: str


def find_room(folder: Path) -> Room:
    """Return the room in an existing folder."""
    facts = os.statvfs(folder)
    free_bytes: float = facts.f_bavail * facts.f_frsize
    free_files: float = facts.f_favail if facts.f_files else float("inf")  # some file systems count none
    lines = quota_lines(find_mount(folder))
    for line in lines:
        left = parse_quota(line)
        free_bytes, free_files = min(free_bytes, left[0]), min(free_files, left[1])
    return Room(free_bytes, free_files, bool(lines))


def find_mount(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> Mount:
    """Return the file system that a folder lies on."""
    path = str(folder.resolve())
    found = Mount("", "/", "")
    with mounts.open(encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            source, target, kind = (re.sub(r"\\(\d{3})", _character, word) for word in line.split()[:3])
            if (path == target or path.startswith(target.rstrip("/") + "/")) and len(target) >= len(found.target):
                found = Mount(source, target, kind)
    return found


def quota_lines(mount: Mount) -> list[str]:
    """Ask for the quotas of this user, and on Lustre of the group, on a file system; none where nobody can tell.

    Each line has nine words: file system, KiB used, soft and hard limit, grace; files used, soft and hard limit, grace.
    """
    if mount.kind == "lustre":
        whose = (("-u", pwd.getpwuid(os.getuid()).pw_name), ("-g", str(os.getgid())))
        answers = [_answer(["lfs", "quota", "-q", *one, mount.target]) for one in whose]
        lines = [" ".join(answer.split()) for answer in answers]  # a long path has a line of its own
    else:
        lines = _answer(["quota", "-w", "-p"]).splitlines()  # -p: grace as a number, so that no column is empty
    return [line for line in lines if len(line.split()) == 9 and line.split()[0] in (mount.source, mount.target)]


def parse_quota(line: str) -> tuple[float, float]:
    """Return the bytes and the files that a quota leaves; a limit of 0 is none, a star marks one that is passed."""
    words = [word.strip("*[]") for word in line.split()]

    def left(used: str, soft: str, hard: str) -> float:
        limit = int(hard) or int(soft)
        return max(0, limit - int(used)) if limit else float("inf")

    return 1024 * left(*words[1:4]), left(*words[5:8])


def _answer(command: Sequence[str]) -> str:
    if not shutil.which(command[0]):
        return ""
    try:
        ended = subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ""
    return ended.stdout.decode(errors="replace")  # `quota` ends with 1 where a limit is passed


def _character(match: re.Match[str]) -> str:
    """Return the character that the kernel writes as an octal number."""
    return chr(int(match[1], 8))
