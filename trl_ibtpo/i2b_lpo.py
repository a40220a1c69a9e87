"""I2B-LPO (arXiv 2601.05870): the fields of `IBTPOConfig` that make it, and which of them go together."""

from os.path import isdir
from typing import Any

LATENT_MODES = ("none", "psa", "softmax")

# What `IBTPOConfig.i2b_lpo` sets. docs/i2b_lpo.md says which are the paper's, which its code's and which ours.
I2B_LPO: dict[str, Any] = {
    "branching": "entropy_fork",
    "tree_initial_rollouts": 4,  # M
    "tree_levels": 2,
    "tree_nodes_per_level": 1,
    "tree_branches_per_node": 3,  # K
    "latent_mode": "psa",
    "path_filter": "advantage",
    "paths_kept": 2,  # N
    "advantage": "grpo",
    "shared_token_weight": "first",
    "ib_regularization_coef": 0.005,
    "temperature": 0.9,
    "top_p": 0.9,
    "top_k": 0,
    "beta": 0.0,
    "learning_rate": 1e-6,
}


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
    if args.shared_token_weight == "sampled":
        raise ValueError(
            "`shared_token_weight` is 'sampled', which takes the children of a step for equal samples of the policy, "
            f"but `path_filter` is {args.path_filter!r}: it keeps the branches that are better than others. Use "
            "`shared_token_weight='first'` or 'once', or leave `path_filter` out."
        )
    if args.branch_lookahead:
        raise ValueError(
            f"`branch_lookahead` is {args.branch_lookahead}, but `path_filter` compares branches that are whole. "
            "Leave it out."
        )


def check_latents(args: Any) -> None:
    """Raise where `latent_mode` and its fields do not go together, or not with the engine.

    Args:
        args: an `IBTPOConfig`.
    """
    if args.latent_mode == "none":
        for name, default in (("latent_strength", 1.0), ("latent_decay", 128.0), ("latent_prior", None)):
            if getattr(args, name) != default:
                raise ValueError(
                    f"`{name}` is {getattr(args, name)!r}, but `latent_mode` is 'none', so that there is no latent. "
                    "Set `latent_mode='psa'` or 'softmax', or leave it out."
                )
        return
    mode = f"`latent_mode` is {args.latent_mode!r}"
    if not args.branches:
        raise ValueError(
            f"{mode}, but no rollout continues another one, and latents steer branches. Use "
            "`branching='entropy_fork'` with `tree_levels=2`, or `latent_mode='none'`."
        )
    if args.latent_prior is not None and not isdir(args.latent_prior):
        raise FileNotFoundError(
            f"`latent_prior` names {args.latent_prior!r}, which is no folder here. Give one that `trl-ibtpo latents "
            "train` has written, or leave it out for vectors from a normal distribution."
        )
    if args.use_vllm and args.latent_mode == "softmax" and args.vllm_mode != "colocate":
        raise ValueError(
            f"{mode} and `vllm_mode` is {args.vllm_mode!r}, but a vLLM server takes no latents. Use "
            "`vllm_mode='colocate'`, or `latent_mode='psa'`, which samples branches with transformers."
        )
    if args.use_vllm and args.latent_mode == "psa" and args.generation_kwargs:
        raise ValueError(
            f"{mode}, so that vLLM samples initial rollouts and transformers their branches, but `generation_kwargs` "
            f"({args.generation_kwargs}) holds arguments of vLLM's alone. Leave it out, or use "
            "`latent_mode='softmax'`."
        )
