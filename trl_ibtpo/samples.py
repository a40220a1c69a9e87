"""Records of a long evaluation, appended to a JSONL as they are made, so that a rerun goes on where it was stopped."""

import json
from pathlib import Path
from typing import Any


class SamplesFile:
    """A JSONL whose first line holds the settings and every further line one record with its `index`.

    Use it as a context manager. A last line that a kill left unfinished is taken off again.

    Args:
        path: the file; `None` keeps the records in memory only.
        settings: JSON-ready. A file that was made with other settings is an error.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]):
        self._path = None if path is None else Path(path)
        self._records: dict[int, dict[str, Any]] = {}
        self._file = None
        if self._path is not None and self._path.exists():
            self._read(settings)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            if self._file.tell() == 0:
                self._write({"settings": settings})

    def __enter__(self) -> "SamplesFile":
        return self

    def __exit__(self, *exception) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, index: int) -> bool:
        return index in self._records

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[index]

    def append(self, record: dict[str, Any]) -> None:
        """Keep a record under its `index` and write it out at once."""
        self._records[record["index"]] = record
        if self._file is not None:
            self._write(record)

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def _read(self, settings: dict[str, Any]) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a line counts when its end was written
        try:
            rows = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
            found = rows[0]["settings"] if rows else settings
            self._records = {row["index"]: row for row in rows[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._path} is not a samples file of an evaluation. Give another name.") from error
        differing = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        if differing:
            words = ", ".join(f"{name}: {found.get(name)!r} there, {settings.get(name)!r} now" for name in differing)
            raise ValueError(f"{self._path} was made with other settings ({words}). Give another name, or delete it.")
        if len(whole) < len(content):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
