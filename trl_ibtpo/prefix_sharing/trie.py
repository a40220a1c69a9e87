"""The prefix-shared forward: every token that rows of a batch share is computed once.

Trajectories of a tree repeat the prefixes they branched from, and all completions of a question repeat its prompt.
`share_prefixes` lays a batch out as a trie in one row, depth first, so that the tokens under any token are the run
that follows it; each token attends to itself and its ancestors. Where a row branches off, the last shared token is
laid out again at the head of the branch: every position then has one token to predict, as a language-model head wants
it.
Log-probabilities and entropies are gathered back to the rows, and gradients of shared tokens add up, so both equal
those of the batch as it was up to rounding. With dropout, what is shared is dropped once.

The trie is made from the token ids alone: trees, GRPO's flat groups and repeated rows all gain.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # tokens of a block of flex attention


@dataclass(frozen=True)
class Segment:
    """Tokens that follow each other in one row, and the earlier runs of tokens that all of them attend to."""

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]  # (start, stop) runs of positions, from the first token of the row on


@dataclass(frozen=True)
class Sequences:
    """Segments as sequences of unequal lengths, `S` of them, for kernels that compute all in one call.

    The queries of a sequence are the tokens of its segment and the last of its keys: causal from the bottom right.
    """

    keys: torch.Tensor  # (K,): the positions that each segment sees, one segment after the other
    query_offsets: torch.Tensor  # (S + 1,), int32: where the queries of each begin, and their number
    key_offsets: torch.Tensor  # (S + 1,), int32
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class SharedBatch:
    """A batch of `B` rows with `C` completion columns as one row of `L` tokens."""

    input_ids: torch.Tensor  # (1, L)
    position_ids: torch.Tensor  # (1, L): columns in the batch as it was
    shift_labels: torch.Tensor  # (1, L): the token each position predicts, -100 where it is not scored
    subtree_end: np.ndarray  # (L,): one past the last position under each position, its own included
    segments: tuple[Segment, ...]  # cover the positions in order
    gather: torch.Tensor  # (B, C): position that predicts each completion token; 0 where there is none
    scored: torch.Tensor  # (B, C): boolean, whether there is a token
    _indices: dict = field(default_factory=dict, repr=False, compare=False)  # device to those of the segments
    _sequences: dict = field(default_factory=dict, repr=False, compare=False)  # device to `Sequences`
    _masks: dict = field(default_factory=dict, repr=False, compare=False)  # device and dtype to `additive_mask`

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the one row, `(1, L)`, to rows, `(B, C)`; 0 where nothing is scored, as in TRL.

        The head of a model on several devices may be on another one than the batch.
        """
        return values[0].to(self.gather.device)[self.gather].masked_fill(~self.scored, 0)

    def dense_mask(self) -> torch.Tensor:
        """Which position (row) attends to which (column), boolean, `(1, 1, L, L)`."""
        positions = torch.arange(len(self.subtree_end), device=self.input_ids.device)
        end = torch.from_numpy(self.subtree_end).to(positions.device)
        return ((positions[None] <= positions[:, None]) & (positions[:, None] < end[None]))[None, None]

    def additive_mask(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The same as numbers that are added to the scores of attention: one for all layers of a device.

        Its rows begin at multiples of 16 numbers, which kernels would otherwise copy it for.
        """
        if (device, dtype) not in self._masks:
            mask = self.dense_mask().to(device)
            length = mask.shape[-1]
            additive = torch.zeros(1, 1, length, -(-length // 16) * 16, dtype=dtype, device=device)[..., :length]
            self._masks[device, dtype] = additive.masked_fill_(~mask, torch.finfo(dtype).min)
        return self._masks[device, dtype]

    def block_mask(self) -> BlockMask:
        """The same for flex attention, from blocks alone: nothing of size `L x L` is made."""
        device, length = self.input_ids.device, len(self.subtree_end)
        blocks = -(-length // BLOCK)
        first = np.arange(blocks) * BLOCK
        ends = np.zeros(blocks * BLOCK, dtype=np.int64)  # positions beyond L have nothing under them
        ends[:length] = self.subtree_end
        ends = ends.reshape(blocks, BLOCK)
        below = first[:, None] > first[None]  # query block (row) after key block (column)
        some = below & (ends.max(1)[None] > first[:, None]) | np.eye(blocks, dtype=bool)
        full = below & (ends.min(1)[None] >= np.minimum(first + BLOCK, length)[:, None])
        end = torch.from_numpy(ends.reshape(1, -1)).to(device)

        def attends(batch, head, query, key):
            return (key <= query) & (query < end[batch, key])

        return BlockMask.from_kv_blocks(
            *_block_indices(some & ~full, device),
            *_block_indices(full, device),
            BLOCK_SIZE=BLOCK,
            mask_mod=attends,
            seq_lengths=(length, length),
        )

    def segment_indices(self, device: torch.device) -> list[tuple[slice, torch.Tensor | None, torch.Tensor | None]]:
        """Of each segment its positions, the keys they see (None: themselves alone), and which sees which.

        Made once for each device: layers of one model may be on several, and nothing moves what is in this class.
        """
        if device not in self._indices:
            self._indices[device] = [_indices_of(segment, device) for segment in self.segments]
        return self._indices[device]

    def sequences(self, device: torch.device) -> Sequences:
        """The segments for one call of a kernel; made once for each device."""
        if device not in self._sequences:
            runs = [(*segment.ancestors, (segment.start, segment.stop)) for segment in self.segments]
            keys = [np.concatenate([np.arange(*run) for run in each]) for each in runs]
            queries = [segment.stop - segment.start for segment in self.segments]
            self._sequences[device] = Sequences(
                keys=torch.from_numpy(np.concatenate(keys)).to(device),
                query_offsets=_offsets(queries, device),
                key_offsets=_offsets([len(each) for each in keys], device),
                most_queries=max(queries),
                most_keys=max(len(each) for each in keys),
            )
        return self._sequences[device]


def _offsets(counts: list[int], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *counts], dtype=np.int32)).to(device)


def _indices_of(segment: Segment, device: torch.device) -> tuple[slice, torch.Tensor | None, torch.Tensor | None]:
    own = slice(segment.start, segment.stop)
    if not segment.ancestors:
        return own, None, None
    keys = torch.cat([torch.arange(*run, device=device) for run in (*segment.ancestors, (own.start, own.stop))])
    count = own.stop - own.start
    mask = torch.ones(count, len(keys), dtype=torch.bool, device=device).tril(len(keys) - count)
    return own, keys, mask[None, None]


def share_prefixes(input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int) -> SharedBatch | None:
    """Lay out a batch of left-padded prompts and right-padded completions as one row.

    Args:
        input_ids: `(B, T)`.
        attention_mask: `(B, T)`; zeros are padding, or completions that are not scored.
        logits_to_keep: completion columns `C`, the last of `T`.

    Returns:
        None where the rows cannot be laid out so: a row without a prompt token, or padding between tokens.
    """
    ids, mask = input_ids.cpu().numpy(), attention_mask.cpu().numpy().astype(bool)
    width = ids.shape[1] - logits_to_keep
    prompt_lengths, lengths = mask[:, :width].sum(1), mask.sum(1)
    columns = np.arange(ids.shape[1])
    solid = (columns >= width - prompt_lengths[:, None]) & (columns < width + (lengths - prompt_lengths)[:, None])
    if (prompt_lengths == 0).any() or (solid != mask).any():
        return None
    rows = [ids[row, mask[row]] for row in range(len(ids))]
    order = sorted(range(len(rows)), key=lambda row: (tuple(rows[row][: prompt_lengths[row]]), tuple(rows[row])))

    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    paths: dict[int, np.ndarray] = {}  # position of each token of a row, in the one row
    length, previous = 0, None
    for row in order:
        shared = 0
        if previous is not None and prompt_lengths[row] == prompt_lengths[previous]:
            shared = _common_prefix(rows[row], rows[previous])
            if shared < prompt_lengths[row]:
                shared = 0  # another question
            elif shared < len(rows[previous]):
                shared -= 1  # the last shared token predicts another one already
        fresh = np.arange(length, length + len(rows[row]) - shared)
        if len(fresh):
            kept = paths[previous][:shared] if shared else fresh[:0]
            paths[row] = np.concatenate([kept, fresh])
            tokens.append(rows[row][shared:])
            positions.append(np.arange(shared, len(rows[row])) + width - prompt_lengths[row])
            segments.append(Segment(length, length + len(fresh), _runs(kept)))
            length += len(fresh)
        else:  # the same row again
            paths[row] = paths[previous]
        previous = row
    if max(each[-1] for each in positions) < ids.shape[1] - 1:
        # Some rotary embeddings depend on the longest position (dynamic, longrope). A token that nothing attends to
        # and that is not scored keeps it that of the padded batch.
        tokens.append(rows[0][:1])
        positions.append(columns[-1:])
        segments.append(Segment(length, length + 1, ()))
        length += 1

    subtree_end = np.arange(1, length + 1)
    labels = np.full(length, -100)
    gather, scored = np.zeros((len(rows), logits_to_keep), dtype=np.int64), solid[:, width:]
    for row in order:
        path, start = paths[row], prompt_lengths[row]
        subtree_end[path] = np.maximum(subtree_end[path], path[-1] + 1)
        labels[path[start - 1 : -1]] = rows[row][start:]
        gather[row, : len(path) - start] = path[start - 1 : -1]
    device = input_ids.device
    return SharedBatch(
        input_ids=torch.from_numpy(np.concatenate(tokens))[None].to(device),
        position_ids=torch.from_numpy(np.concatenate(positions))[None].to(device),
        shift_labels=torch.from_numpy(labels)[None].to(device),
        subtree_end=subtree_end,
        segments=tuple(segments),
        gather=torch.from_numpy(gather).to(device),
        scored=torch.from_numpy(scored.copy()).to(device),
    )


def _common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    count = min(len(first), len(second))
    differs = np.flatnonzero(first[:count] != second[:count])
    return int(differs[0]) if len(differs) else count


def _runs(positions: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Increasing positions as `(start, stop)` runs of consecutive ones."""
    if not len(positions):
        return ()
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(positions, breaks))


def _block_indices(wanted: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key blocks each query block wants, `(1, 1, Q)`, and which, those first, `(1, 1, Q, K)`."""
    counts = torch.from_numpy(wanted.sum(1).astype(np.int32)).to(device)
    indices = torch.from_numpy(np.argsort(~wanted, axis=1, kind="stable").astype(np.int32)).to(device)
    return counts[None, None], indices[None, None]
