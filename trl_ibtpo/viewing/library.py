"""Runs on disk: which trees they hold, without holding the trees, and the curves of their logs.

A run is the output folder of a training, whose trees are in `trees/step-000012.jsonl` and whose logs are in
`trees/metrics.jsonl`; a single file of records will do as well.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .reading import RecordError, parse_record, summary
from .records import Record

METRICS = "metrics.jsonl"

# Curves of a run: what a reader sees, and the logged metrics that it is made of, the first that was logged.
CURVES = {
    "Reward": ("reward",),
    "Success": ("tree/average_success",),
    "Effective rate": ("tree/effective_rate", "frac_reward_zero_std"),
    "Covariance": ("ib/covariance",),
    "Entropy": ("entropy",),
    "Tokens a question": ("tree/generated_tokens", "completions/mean_length"),
    "Seconds a step": ("step_time",),
}


class _Place(NamedTuple):
    """Where a record is: one line of a file."""

    path: Path
    offset: int
    length: int


class Library:
    """The trees of one or several runs, listed when it is made and by `refresh`, and read when asked for.

    Args:
        sources: folders of runs, or files of records.

    Raises:
        FileNotFoundError: where a source does not exist.
    """

    def __init__(self, sources: Sequence[str | Path]):
        self.sources = [Path(source) for source in sources]
        for source in self.sources:
            if not source.exists():
                raise FileNotFoundError(f"There is no '{source}'.")
        self.names = _names(self.sources)
        self.version = 0  # changes when what was listed before is no longer so
        self.entries: list[Record] = []  # summaries, with `run`, the index of the source, and `file`
        self.problems: list[str] = []  # a line for each record that cannot be read
        self._places: list[_Place] = []
        self._seen: dict[Path, tuple[int, int]] = {}  # size and time of the files listed so far
        self._curves: dict[int, tuple[Any, list]] = {}  # of each run, and of what file of logs
        self.refresh()

    def refresh(self) -> None:
        """List what has come since; a file that was written anew makes a new list."""
        found = [(run, path) for run, source in enumerate(self.sources) for path in record_files(source)]
        stamps = {path: _stamp(path) for _, path in found}
        if any(stamps.get(path) != stamp for path, stamp in self._seen.items()):
            self.version += 1
            self.entries, self.problems, self._places, self._seen = [], [], [], {}
        for run, path in found:
            if path not in self._seen and stamps[path] is not None:
                self._seen[path] = stamps[path]
                self._list(run, path)

    def record(self, index: int) -> Record:
        """The tree of `entries[index]`."""
        place = self._places[index]
        with place.path.open("rb") as file:
            file.seek(place.offset)
            return parse_record(file.read(place.length))

    def curves(self, run: int) -> list[dict[str, Any]]:
        """Names and `[step, value]` points of the curves that a run has logged."""
        source = self.sources[run]
        stamp = [_stamp(folder / METRICS) for folder in (source / "trees", source, source.parent)]
        if run in self._curves and any(stamp) and self._curves[run][0] == stamp:
            return self._curves[run][1]
        logs = read_logs(source)
        curves = []
        for name, keys in CURVES.items():
            for key in keys:
                points = {log["step"]: log[key] for log in logs if _is_number(log.get(key))}
                if points:
                    flip = key == "frac_reward_zero_std"
                    points = [[step, 1 - value if flip else value] for step, value in sorted(points.items())]
                    curves.append({"name": name, "metric": f"1 - {key}" if flip else key, "points": points})
                    break
        self._curves[run] = stamp, curves
        return curves

    def _list(self, run: int, path: Path) -> None:
        for number, (offset, line) in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            try:
                record = parse_record(line)
            except RecordError as error:
                self.problems.append(f"{path.name}, line {number}, is left out: {error}")
                continue
            self.entries.append({**summary(record), "run": run, "file": path.name})
            self._places.append(_Place(path, offset, len(line)))


def record_files(source: Path) -> list[Path]:
    """The files of records of a run, in order."""
    if source.is_file():
        return [source]
    folder = source / "trees" if (source / "trees").is_dir() else source
    return [path for path in sorted(folder.glob("*.jsonl")) if path.name != METRICS and path.is_file()]


def read_logs(source: Path) -> list[dict[str, Any]]:
    """What a run has logged: its own file, else the newest state that transformers saved."""
    if source.is_file():
        source = source.parent.parent if source.parent.name == "trees" else source.parent
    for folder in (source / "trees", source):
        if (folder / METRICS).is_file():
            logs = [_json(line) for _, line in _lines(folder / METRICS)]
            return [log for log in logs if isinstance(log, dict) and isinstance(log.get("step"), int)]
    states = [source / "trainer_state.json", *source.glob("checkpoint-*/trainer_state.json")]
    states = sorted((path for path in states if path.is_file()), key=lambda path: path.stat().st_mtime)
    state = _json(states[-1].read_bytes()) if states else None
    logs = state.get("log_history") if isinstance(state, dict) else None
    return [log for log in logs or [] if isinstance(log, dict) and isinstance(log.get("step"), int)]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a file and where they begin."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):  # a line that is being written
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:  # it is being replaced
        return None
    return found.st_size, found.st_mtime_ns


def _names(sources: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [source.resolve().parts for source in sources]
    for count in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{names[0]} ({number})" for number in range(1, len(names) + 1)]
