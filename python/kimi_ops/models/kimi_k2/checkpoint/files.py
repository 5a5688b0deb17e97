# SPDX-License-Identifier: MIT
"""Files that appear whole, and several of them as one change."""

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LEFTOVER = re.compile(r"\.saving-[0-9a-f]{8}")  # the hidden folder of one save


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Staging:
    """Files written in a hidden folder beside their place, then renamed in the order of writing.

    The last one is the one that makes a reader see the others. Before its rename an error takes
    all others back; a process that dies there cannot, so the others need names that no reader
    follows yet, or content that fits what was there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._place = folder / f".saving-{secrets.token_hex(4)}"
        self._place.mkdir()
        probe = self._place / "mode"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        self._mode = probe.stat().st_mode & 0o777  # what the umask leaves
        self._staged: list[str] = []
        self._undo: list[tuple[Path, Path | None]] = []  # (target, copy of what was there)

    def write(self, name: str, writer: Callable[[Path], None]) -> None:
        """Let `writer` make the file that will become `name`, and make it durable."""
        path = self._place / name
        writer(path)
        path.chmod(self._mode)  # some writers make their files private
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        self._staged.append(name)

    def commit(self) -> None:
        """Rename everything; the last only when the names of the others are durable."""
        *others, last = self._staged
        for name in others:
            target, backup = self.folder / name, None
            if target.exists():
                backup = self._place / f"{name}.before"
                shutil.copy2(target, backup)
            self._undo.append((target, backup))
            os.replace(self._place / name, target)
        sync_folder(self.folder)
        os.replace(self._place / last, self.folder / last)
        self._undo.clear()
        sync_folder(self.folder)

    def discard(self) -> None:
        """Remove the hidden folder; take the renames back unless `commit` did the last one."""
        for target, backup in reversed(self._undo):
            if backup is None:
                target.unlink(missing_ok=True)
            else:
                os.replace(backup, target)
        shutil.rmtree(self._place)


@contextmanager
def staging(folder: Path) -> Iterator[Staging]:
    """Write files into `folder` as one change; an error leaves the folder as it was.

    What a process left when it died is removed first: one process at a time may write into a
    folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)
    stage = Staging(folder)
    try:
        yield stage
        stage.commit()
    finally:
        stage.discard()
