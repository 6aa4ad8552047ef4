"""What is finished of long work, kept when a run is killed."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import visible_files


class ProgressLog:
    """What a run that was killed has finished: lines of JSON, a file for each process.

    Args:
        folder: of logs; this one is a folder in it, called by the hash of ``header``.
        header: everything but the names of results that they depend on.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
        self._folder = folder / key
        self._path = self._folder / f"{uuid4().hex}.jsonl"

    def load(self) -> dict[str, Any]:
        """Results by name."""
        done: dict[str, Any] = {}
        for path in visible_files(self._folder, "*.jsonl"):
            for line in path.read_text().split("\n")[:-1]:  # what follows the last line end was cut off
                done |= json.loads(line)
        return done

    def add(self, results: Mapping[str, Any]) -> None:
        """Keep the results of a batch.

        Raises:
            UserError: the file system is full or refuses.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(results) + "\n")
        except OSError as error:
            raise UserError(
                f"'{self._path}' could not be written ({error.strerror}); make room or mend --output_dir and start "
                "again: what is finished is kept"
            ) from error

    def close(self) -> None:
        """Remove this log, and the folder of logs if it was the last."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._folder.parent.rmdir()
