"""Keep the best branches of each initial rollout before a batch is made: scored, filtered, then grouped."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from trl.extras.profiling import profiling_context

from ..advantages import GradedTree, token_advantages
from ..grown_tree import GrownTree
from ..paths import advantage_scores, best_paths, keep_paths, pmi_score
from .group_statistics import group_advantages
from .teacher_forcing import teacher_forced


class PathFilter:
    """For a `GRPOTrainer` with an `IBTPOConfig`: `path_filter` and `paths_kept`."""

    def _filter_paths(
        self, whole: Sequence[GrownTree], rewards: np.ndarray, rows: Sequence[dict[str, Any]]
    ) -> tuple[list[GrownTree], list[int]]:
        """The trees of the branches that are kept, and which rows of the batch are theirs.

        Args:
            whole: one tree per question.
            rewards: of all leaves of all trees, `(B, F)`.
            rows: of the dataset, one per leaf.
        """
        rewards_LF = np.split(rewards, np.cumsum([len(each.tree.leaves) for each in whole])[:-1])
        with profiling_context(self, "path_filter"):
            if self.args.path_filter == "advantage":
                scores = [self._scores_by_advantage(*each) for each in zip(whole, rewards_LF, strict=True)]
            else:
                first_rows = [rows[start] for start in range(0, len(rows), len(rows) // len(whole))]
                scores = self._scores_by_answer(whole, [row.get(self.args.answer_column) for row in first_rows])
        grown, kept_rows, start = [], [], 0
        for each, scores_L, given in zip(whole, scores, rewards_LF, strict=True):
            # What no function scored would teach nothing, however well it is thought of.
            scores_L = np.where(np.isnan(given).all(axis=1), np.nan, scores_L)
            kept = best_paths(each.tree, scores_L, self.args.paths_kept)
            grown.append(keep_paths(each, kept, scores_L, given))
            kept_rows += [start + leaf for leaf in kept]
            start += len(each.tree.leaves)
        return grown, kept_rows

    def _scores_by_advantage(self, whole: GrownTree, rewards_LF: np.ndarray) -> np.ndarray:
        """With the advantages that the whole tree would have been trained with."""
        advantage_L, _ = group_advantages(
            torch.from_numpy(rewards_LF),
            [len(rewards_LF)],
            self.reward_weights.cpu(),
            # Of this group alone: what a batch is divided by changes no order.
            scale_rewards="none" if self.scale_rewards == "none" else "group",
            multi_objective_aggregation=self.multi_objective_aggregation,
        )
        advantage_L = advantage_L.double().numpy()
        advantage_L[np.isnan(rewards_LF).all(axis=1)] = np.nan
        graded = GradedTree(whole.tree, whole.scores, advantage_L, self.args.credit_settings, whole.choices)
        found = token_advantages(graded, self._advantage).advantages
        unscorable = np.isnan(advantage_L)
        return advantage_scores(
            whole.tree, [np.full_like(values, np.nan) if unscorable[i] else values for i, values in enumerate(found)]
        )

    def _scores_by_answer(self, whole: Sequence[GrownTree], answers: Sequence[Any]) -> list[np.ndarray]:
        """By what the policy makes of the right answer after each path: two passes a branch and one a question."""
        answer_ids = [self._answer_ids(answer) for answer in answers]
        tokenizer, ends = self._tokenizer, set(self.eos_token_ids)
        # A path on its own comes after what separates texts.
        start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
        leaves = [
            (tree, leaf) for tree, each in enumerate(whole) for leaf in np.flatnonzero(each.tree.rounds).tolist()
        ]
        paths = [whole[tree].tree.trajectory(leaf)[0] for tree, leaf in leaves]
        paths = [path[:-1] if path[-1] in ends else path for path in paths]  # the answer is to come before the end
        scored = [place for place, path in enumerate(paths) if path]
        prompts = [each.tree.prompt_ids for each in whole]
        with self._policy() as model:
            both = self._logps(model, [(prompts[leaves[i][0]], paths[i] + answer_ids[leaves[i][0]]) for i in scored])
            alone = self._logps(model, [(start, paths[i]) for i in scored])
            answer = self._logps(model, list(zip(prompts, answer_ids, strict=True)))
        scores = [np.full(len(each.tree.leaves), np.nan) for each in whole]
        for place, both_T, alone_T in zip(scored, both, alone, strict=True):
            (tree, leaf), length = leaves[place], len(paths[place])
            scores[tree][leaf] = pmi_score(
                self.args.ib_beta,
                answer_after_path=both_T[length:].sum(),
                answer=answer[tree].sum(),
                answer_tokens=len(answer_ids[tree]),
                path_after_question=both_T[:length].sum(),
                path=alone_T.sum(),
                path_tokens=length,
            )
        return scores

    def _logps(self, model: torch.nn.Module, pairs: Sequence[tuple[list[int], list[int]]]) -> list[np.ndarray]:
        return [logps.double().numpy() for logps, _ in teacher_forced(self, model, pairs)]

    def _answer_ids(self, answer: Any) -> list[int]:
        ids = [] if answer is None else self._tokenizer.encode(str(answer), add_special_tokens=False)
        if not ids:
            raise ValueError(
                f"The column '{self.args.answer_column}' of `train_dataset` holds {answer!r}, but `path_filter='pmi'` "
                "asks how likely the right answer is. Drop rows without one, or use `path_filter='advantage'`."
            )
        return ids
