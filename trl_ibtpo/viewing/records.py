"""A grown tree as plain data, the form in which trees are stored, drawn, printed and shown: docs/viewer.md.

A record is a dictionary that is one line of JSON. `record_tree` makes it of a `GrownTree`, `record_group` of a flat
group of completions; `reading.parse_record` reads it back.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import accumulate
from typing import Any

import numpy as np

from ..advantages import TokenAdvantages
from ..grown_tree import FilteredPaths, GrownTree
from ..tree import RolloutTree

FORMAT = "trl_ibtpo.tree/1"
Record = dict[str, Any]


def record_tree(
    grown: GrownTree,
    decode: Callable[[list[int]], str],
    *,
    question: str | Sequence[Mapping[str, Any]] = "",
    step: int | None = None,
    rewards: Mapping[str, Sequence[float]] | None = None,
    advantages: TokenAdvantages | None = None,
    method: Mapping[str, Any] | None = None,
    end_ids: Sequence[int] = (),
    decode_token: Callable[[int], str] | None = None,
) -> Record:
    """A grown tree as a record.

    Args:
        grown: the tree, its scores, settings and what its rounds chose.
        decode: token ids to text.
        question: text or chat messages.
        step: of training.
        rewards: of each leaf, `(L,)`, by the name of the reward function; NaN or None where it gave none. Where some
            leaves were filtered out, of those that are left.
        advantages: what each token was given.
        method: further fields of the config that belong to the method.
        end_ids: tokens that end a completion, to tell a finished one from one that ran out of budget.
        decode_token: one token id to text, where that is remembered; default: `decode`.
    """
    filtered = grown.filtered
    if filtered is not None:  # what was left out is shown as well
        grown = filtered.whole
        rewards = {name: filtered.rewards_LF[:, column] for column, name in enumerate(rewards or ())}
        advantages = None if advantages is None else _of_all_leaves(advantages, filtered)
    tree, scores = grown.tree, grown.scores
    one = decode_token or (lambda token_id: decode([token_id]))
    figures = {
        "density": scores.density,
        "confidence": scores.confidence,
        "ib_score": scores.ib_score,
        "covariance": scores.covariance,
        "mean_logprob": np.where(np.isnan(scores.confidence), np.nan, tree.mean_logprobs()),
        **_step_advantages(tree, advantages),
    }
    figures = {name: rounded(values) for name, values in figures.items()}
    rounds = _first_rounds(tree)
    nodes = []
    for index, piece in enumerate(tree.steps):
        text = decode(piece.token_ids) if index else ""
        node = {
            "parent": piece.parent,
            "text": text,
            "tokens": len(piece.token_ids),
            "end": piece.end,
            "role": "assistant" if index else "question",
            "round": rounds[index],
            **{name: values[index] for name, values in figures.items()},
        }
        if index:
            node["logprobs"] = rounded(piece.logprobs, 3)
            pieces = [one(token_id) for token_id in piece.token_ids]
            if "".join(pieces) == text:  # not where a character is written in several tokens
                node["token_ends"] = list(accumulate(map(len, pieces)))
            if piece.observed:
                cut = len(piece.token_ids) - piece.observed
                texts = zip(("assistant", "observation"), (piece.token_ids[:cut], piece.token_ids[cut:]), strict=True)
                node["parts"] = [{"role": role, "text": decode(token_ids)} for role, token_ids in texts]
        nodes.append(node)
    return {
        "format": FORMAT,
        "step": step,
        "question": as_question(question),
        "method": {"branching": grown.settings.branching, **(method or {})},
        "settings": asdict(grown.settings),
        "nodes": nodes,
        "leaves": _leaves(grown, rewards, advantages, set(end_ids), filtered),
        "rounds": [
            {**asdict(choice), "priorities": rounded(choice.priorities)}
            for choice in sorted(grown.choices, key=lambda each: each.round)
        ],
        "generated_tokens": tree.generated_tokens,
        "trajectory_tokens": tree.trajectory_tokens,
    }


def record_group(
    completions: Sequence[str | Sequence[Mapping[str, Any]]],
    *,
    question: str | Sequence[Mapping[str, Any]],
    rewards: Mapping[str, Sequence[float | None]],
    advantages: Sequence[float] | None = None,
    step: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
    method: Mapping[str, Any] | None = None,
) -> Record:
    """A flat group of independent completions as a record: a tree of depth one, with a node for each completion.

    The first reward function says how right a completion is where its values are in [0, 1].

    Args:
        completions: texts, or chat messages, of which each becomes a part with its role.
        question, rewards, step, method: see `record_tree`.
        advantages: of each completion.
        count_tokens: tokens of a text; without it nodes are as long as their texts.
    """
    first = np.array([math.nan if value is None else value for value in next(iter(rewards.values()), ())], dtype=float)
    known = first[~np.isnan(first)]
    success = rounded(first if len(known) and 0 <= known.min() <= known.max() <= 1 else np.full(len(first), np.nan))
    nodes: list[Record] = [{"parent": -1, "text": "", "tokens": 0, "end": 0, "role": "question", "round": 0}]
    leaves = []
    for index, completion in enumerate(completions):
        parts = [] if isinstance(completion, str) else [as_part(message) for message in completion]
        text = completion if isinstance(completion, str) else "\n".join(part["text"] for part in parts)
        tokens = len(text) if count_tokens is None else count_tokens(text)
        advantage = None if advantages is None else rounded(advantages)[index]
        node = {"parent": 0, "text": text, "tokens": tokens, "end": tokens, "role": "assistant", "round": 0}
        node |= {"density": success[index] if success else None, "advantage_global": advantage}
        if len(parts) > 1:
            node["parts"] = parts
        nodes.append(node)
        leaf = {"node": index + 1, "branched_after": 0, "round": 0, "success": success[index] if success else None}
        leaf["rewards"] = {name: rounded(values)[index] for name, values in rewards.items()}
        leaves.append({**leaf, "advantage": advantage, "finish_reason": None})
    nodes[0]["density"] = rounded([known.mean()])[0] if any(value is not None for value in success) else None
    total = sum(node["tokens"] for node in nodes)
    return {
        "format": FORMAT,
        "step": step,
        "question": as_question(question),
        "method": {"branching": "independent", **(method or {})},
        "settings": {},
        "nodes": nodes,
        "leaves": leaves,
        "rounds": [],
        "generated_tokens": total,
        "trajectory_tokens": total,
    }


def as_question(prompt: str | Sequence[Mapping[str, Any]]) -> Record:
    """Its text, which for chat messages is the last one of the user, and the messages."""
    if isinstance(prompt, str):
        return {"text": prompt, "messages": None}
    messages = [{"role": part["role"], "content": part["text"]} for part in map(as_part, prompt)]
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return {"text": asked[-1] if asked else "\n".join(each["content"] for each in messages), "messages": messages}


def dump_record(record: Record) -> str:
    """One line of strict JSON in ASCII, which any text survives, lone surrogates too."""
    try:
        return json.dumps(record, allow_nan=False, separators=(",", ":"))
    except ValueError:  # a field of others with a number that is not finite
        return json.dumps(_finite(record), allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    """With None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_part(message: Mapping[str, Any]) -> Record:
    """Role and text of a chat message; images are left out, tool calls are written as JSON."""
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):  # of a model that also reads images
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    text = content if isinstance(content, str) else ""
    if message.get("tool_calls"):
        text += json.dumps(message["tool_calls"], ensure_ascii=False, default=str)
    return {"role": str(message.get("role", "assistant")), "text": text}


def _first_rounds(tree: RolloutTree) -> list[int]:
    """Round in which each step was first sampled, `(N,)`."""
    rounds = [0] * len(tree)
    for leaf in reversed(range(len(tree.leaves))):  # the earliest rollout through a step sampled it
        for step in tree.path(tree.leaves[leaf]):
            rounds[step] = tree.rounds[leaf]
    return rounds


def _step_advantages(tree: RolloutTree, advantages: TokenAdvantages | None) -> dict[str, np.ndarray]:
    """Both terms of every step, `(N,)`: the mean over the trajectories through it, of its last sampled token."""
    if advantages is None:
        return {name: np.full(len(tree), np.nan) for name in ("advantage_global", "advantage_local")}
    last_N = tree.ends() - tree.observed() - 1  # an observation has no advantage
    sums = {"advantage_global": np.zeros(len(tree)), "advantage_local": np.zeros(len(tree))}
    counts = np.zeros(len(tree))
    for leaf, step in enumerate(tree.leaves):
        path = tree.path(step)
        last = last_N[path]
        if not len(advantages.global_terms[leaf]):  # filtered out
            continue
        counts[path] += 1
        sums["advantage_global"][path] += advantages.global_terms[leaf][last]
        sums["advantage_local"][path] += advantages.local_terms[leaf][last]
    return {
        name: np.divide(total, counts, out=np.full(len(tree), np.nan), where=counts > 0)
        for name, total in sums.items()
    }


def _of_all_leaves(advantages: TokenAdvantages, filtered: FilteredPaths) -> TokenAdvantages:
    """Those of the leaves that were kept, in the places that these have in the whole tree; empty for the others."""
    places = {leaf: place for place, leaf in enumerate(filtered.kept)}

    def spread(values: list[np.ndarray]) -> list[np.ndarray]:
        leaves = range(len(filtered.whole.tree.leaves))
        return [values[places[leaf]] if leaf in places else np.empty(0) for leaf in leaves]

    return TokenAdvantages(**{each.name: spread(getattr(advantages, each.name)) for each in fields(advantages)})


def _leaves(
    grown: GrownTree,
    rewards: Mapping[str, Sequence[float]] | None,
    advantages: TokenAdvantages | None,
    end_ids: set,
    filtered: FilteredPaths | None,
) -> list[Record]:
    tree, budget = grown.tree, grown.settings.max_completion_length
    by_function = {name: rounded(values) for name, values in (rewards or {}).items()}
    success, leaves = rounded(tree.success), []
    given = None
    if advantages is not None:
        means = []
        for leaf, values_T in enumerate(advantages.values):
            sampled_T = values_T[tree.sampled(leaf)] if len(values_T) else values_T
            means.append(sampled_T.mean() if len(sampled_T) else math.nan)
        given = rounded(means)
    path_scores = None if filtered is None else rounded(filtered.scores_L)
    for leaf, node in enumerate(tree.leaves):
        last = tree.steps[node]
        cut = last.end >= budget and not (last.token_ids and last.token_ids[-1] in end_ids)
        leaves.append(
            {
                "node": node,
                "branched_after": tree.branch_steps[leaf],
                "round": tree.rounds[leaf],
                "rewards": {name: values[leaf] for name, values in by_function.items()},
                "success": success[leaf],
                "advantage": None if given is None else given[leaf],
                "finish_reason": "length" if cut else "stop",
            }
        )
        if filtered is not None:
            leaves[-1] |= {"filtered_out": leaf not in filtered.kept, "path_score": path_scores[leaf]}
    return leaves


def rounded(values: Any, digits: int = 9) -> list[float | None]:
    """To so many significant digits; None for what is not a finite number."""
    numbers = [math.nan if value is None else float(value) for value in values]
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in numbers]
