"""Lines that hold trees, whoever wrote them.

What a reader does not know it keeps, what is missing it names, and what is no tree it refuses in one sentence.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .records import FORMAT, Record, as_part

# What a record of today holds; None where it is not known.
TOP_FIELDS = ("step", "question", "method", "settings", "rounds", "generated_tokens", "trajectory_tokens")
NODE_FIGURES = ("mean_logprob", "density", "confidence", "ib_score", "covariance")
NODE_FIGURES += ("advantage_global", "advantage_local")
NODE_TEXTS = ("text", "role")
NODE_NUMBERS = ("tokens", "end", "round", *NODE_FIGURES)
LEAF_NUMBERS = ("branched_after", "round", "success", "advantage")


class RecordError(ValueError):
    """A line that is no record of a tree; the message says why, in one sentence."""


def parse_record(line: str | bytes) -> Record:
    """The record that a line holds.

    Every field of the format is there afterwards, None where it was not: `missing` names those that no node and no
    leaf had, and `notes` says what else a reader should know. Fields that are not of the format are kept.

    Raises:
        RecordError: where the line is no record.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError("it is not JSON; was it cut off while it was written?") from error
    found = record.get("format") if isinstance(record, dict) else None
    if not isinstance(found, str) or not found.startswith("trl_ibtpo.tree/"):
        raise RecordError(f"its `format` is {str(found)[:60]!r}, not {FORMAT!r}.")
    notes = [] if found == FORMAT else [f"This tree was written as {found[:60]!r} and is read as {FORMAT!r}."]
    nodes = _nodes(record.get("nodes"))
    leaves = _leaves(record.get("leaves"), nodes)
    missing = [name for name in TOP_FIELDS if name not in record]
    for kind, entries, names in (
        ("nodes", record["nodes"], (*NODE_TEXTS, *NODE_NUMBERS)),
        ("leaves", record.get("leaves") or (), ("rewards", "finish_reason", *LEAF_NUMBERS)),
    ):
        missing += [f"{kind}.{name}" for name in names if not any(name in entry for entry in entries)]
    question = record.get("question")
    question = _table({"text": question} if isinstance(question, str) else question)
    step = record.get("step")
    return {
        **record,
        "step": step if _is_index(step) else None,
        "question": {**question, "text": _text(question.get("text")), "messages": _messages(question.get("messages"))},
        "method": _table(record.get("method")),
        "settings": _table(record.get("settings")),
        "nodes": nodes,
        "leaves": leaves,
        "rounds": _rounds(record.get("rounds"), len(nodes)),
        "generated_tokens": _number(record.get("generated_tokens")),
        "trajectory_tokens": _number(record.get("trajectory_tokens")),
        "missing": missing,
        "notes": notes,
    }


def summary(record: Record) -> Record:
    """What a list of trees shows of one, and sorts by."""
    success = np.array([leaf["success"] for leaf in record["leaves"]], dtype=float)
    known = success[~np.isnan(success)]
    text = record["question"]["text"]
    return {
        "step": record["step"],
        "question": " ".join(text[:1000].split())[:160],
        # Trees of one question, in one run or in several, have one key.
        "key": hashlib.sha1(text.encode("utf-8", "replace")).hexdigest()[:12],
        "branching": _text(record["method"].get("branching")),
        "leaves": len(success),
        "right": int((known >= 0.5).sum()),
        "success": float(known.mean()) if len(known) else None,
        "effective": bool(len(known) and known.min() < known.max()),
        "score_spread": _spread([node["ib_score"] for node in record["nodes"][1:]]),
        "advantage_spread": _spread(
            [
                None if node["advantage_global"] is None else node["advantage_global"] + (node["advantage_local"] or 0)
                for node in record["nodes"][1:]
            ]
        ),
        "tokens": record["generated_tokens"],
    }


def _spread(values: Sequence[float | None]) -> float | None:
    """Standard deviation of those that are known; None where it is too large for a number."""
    known = [value for value in values if value is not None]
    with np.errstate(over="ignore"):
        spread = np.std(known) if known else math.nan
    return float(f"{spread:.4g}") if math.isfinite(spread) else None


def _nodes(nodes: Any) -> list[Record]:
    if not isinstance(nodes, list) or not nodes or not all(isinstance(node, dict) for node in nodes):
        raise RecordError("it has no list of `nodes`.")
    ends, read = [], []
    for index, node in enumerate(nodes):
        parent = node.get("parent")
        if index and not (_is_index(parent) and parent < index):
            raise RecordError(f"the parent of node {index} is {parent!r}, which is no node before it.")
        tokens = _number(node.get("tokens")) or 0
        end = _number(node.get("end"))
        ends.append(end if end is not None else (ends[parent] + tokens if index else 0))
        read.append(
            {
                **node,
                **{name: _number(node.get(name)) for name in NODE_FIGURES},
                "parent": parent if index else -1,
                "text": _text(node.get("text")),
                "role": _text(node.get("role")) or ("assistant" if index else "question"),
                "tokens": tokens,
                "end": ends[-1],
                "round": _number(node.get("round")) or 0,
                "logprobs": _numbers(node.get("logprobs")),
                "token_ends": _numbers(node.get("token_ends")),
                "parts": [as_part({**part, "content": part.get("text")}) for part in _tables(node.get("parts"))],
            }
        )
    return read


def _leaves(leaves: Any, nodes: list[Record]) -> list[Record]:
    if not isinstance(leaves, list) or not all(isinstance(leaf, dict) for leaf in leaves):
        raise RecordError("it has no list of `leaves`.")
    read = []
    for index, leaf in enumerate(leaves):
        if not _is_index(leaf.get("node")) or leaf["node"] >= len(nodes):
            raise RecordError(f"the node of leaf {index} is {leaf.get('node')!r}, but there are {len(nodes)} nodes.")
        rewards = _table(leaf.get("rewards"))
        after = leaf.get("branched_after")
        read.append(
            {
                **leaf,
                "branched_after": after if _is_index(after) and after < len(nodes) else None,
                "round": _number(leaf.get("round")) or 0,
                "success": _number(leaf.get("success")),
                "advantage": _number(leaf.get("advantage")),
                "rewards": {name: _number(value) for name, value in rewards.items()},
                "finish_reason": _text(leaf.get("finish_reason")) or None,
            }
        )
        if "filtered_out" in leaf:
            read[-1] |= {"filtered_out": leaf["filtered_out"] is True, "path_score": _number(leaf.get("path_score"))}
    return read


def _rounds(rounds: Any, nodes: int) -> list[Record]:
    read = []
    for entry in _tables(rounds):
        candidates = [step for step in _list(entry.get("candidates")) if _is_index(step) and step < nodes]
        priorities = [_number(value) for value in _list(entry.get("priorities"))]
        read.append(
            {
                **entry,
                "round": _number(entry.get("round")) or 0,
                "steps": [step for step in _list(entry.get("steps")) if _is_index(step) and step < nodes],
                "candidates": candidates,
                "priorities": (priorities + [None] * len(candidates))[: len(candidates)],
                "deferred": [step for step in _list(entry.get("deferred")) if _is_index(step) and step < nodes],
                "eligible": _number(entry.get("eligible")) or len(candidates),
            }
        )
    return read


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e300 and not math.isnan(value) else None


def _numbers(values: Any) -> list[float | None] | None:
    return [_number(value) for value in values] if isinstance(values, list) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _table(value: Any) -> Record:
    return value if isinstance(value, dict) else {}


def _tables(value: Any) -> list[Record]:
    return [entry for entry in _list(value) if isinstance(entry, dict)]


def _messages(value: Any) -> list[Record] | None:
    if not isinstance(value, list):
        return None
    return [{"role": part["role"], "content": part["text"]} for part in map(as_part, _tables(value))]
