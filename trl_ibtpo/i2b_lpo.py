"""I2B-LPO (arXiv 2601.05870): the fields of `IBTPOConfig` that make it, and which of them go together."""

from typing import Any


def check_paths(args: Any) -> None:
    """Raise where `path_filter` and its fields do not go with the tree.

    Args:
        args: an `IBTPOConfig`.
    """
    if args.path_filter is None:
        if args.paths_kept is not None:
            raise ValueError(
                f"`paths_kept` is {args.paths_kept!r}, but `path_filter` is None, so all branches are kept. Set "
                "`path_filter='advantage'` or 'pmi', or leave `paths_kept` out."
            )
        return
    if args.branching != "entropy_fork":
        raise ValueError(
            f"`path_filter` is {args.path_filter!r}, but `branching` is {args.branching!r}. It compares the "
            "branches of an initial rollout with one another, which only `branching='entropy_fork'` gives it. "
            "Use that, or leave `path_filter` out."
        )
    branches = (args.tree_levels - 1) * args.growth_settings.branches_per_round
    kept = args.paths_kept
    if not isinstance(kept, int) or isinstance(kept, bool) or not 0 < kept < branches:
        rule = f"from 1 to {branches - 1}" if branches > 1 else "for which there are too few"
        raise ValueError(
            f"`paths_kept` is {kept!r}; with `path_filter={args.path_filter!r}` it must be a whole number {rule}: "
            f"each initial rollout has (tree_levels - 1) * tree_nodes_per_level * tree_branches_per_node = "
            f"{branches} branches. Raise `tree_branches_per_node` for more, or leave `path_filter` out to keep all."
        )
    if args.branch_lookahead:
        raise ValueError(
            f"`branch_lookahead` is {args.branch_lookahead}, but `path_filter` compares branches that are whole. "
            "Leave it out."
        )
