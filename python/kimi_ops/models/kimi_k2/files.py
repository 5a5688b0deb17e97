# SPDX-License-Identifier: MIT
"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Staging:
    """Files written beside their place under other names, then renamed together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.staged: dict[str, Path] = {}  # name -> temporary file

    def write(self, name: str, writer: Callable[[Path], None]) -> None:
        """Let `writer` fill a temporary file that will become `name`, and make it durable."""
        descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=self.folder)
        os.close(descriptor)
        self.staged[name] = Path(temporary)
        writer(Path(temporary))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Rename everything, in the order of writing."""
        for name, temporary in list(self.staged.items()):
            temporary.chmod(0o644)
            os.replace(temporary, self.folder / name)
            del self.staged[name]
        sync_folder(self.folder)

    def discard(self) -> None:
        for temporary in self.staged.values():
            temporary.unlink(missing_ok=True)


@contextmanager
def staging(folder: Path) -> Iterator[Staging]:
    """Write files into `folder`; on any error the temporary files vanish and no file changed."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = Staging(folder)
    try:
        yield stage
        stage.commit()
    finally:
        stage.discard()
