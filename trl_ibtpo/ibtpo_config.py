"""What a user sets: `GRPOConfig` and the tree."""

from dataclasses import dataclass, field, fields
from typing import Any, get_args

from trl import GRPOConfig

from .advantages import ADVANTAGES, CreditSettings
from .branching import STRATEGIES, uses_rewards
from .config_checks import check_combinations, check_fields, check_leaves, check_whole_trees
from .grown_tree import GrowthSettings
from .i2b_lpo import I2B_LPO, LATENT_MODES
from .training.success import parse_rule
from .values import VALUES
from .weights import SharedTokenWeight


@dataclass
class IBTPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`IBTPOTrainer`].

    This class includes only the parameters that are new or whose default or meaning differs from
    [`~trl.GRPOConfig`]; all others are used as there. Defaults are those of the paper, "Long Live The Balance:
    Information Bottleneck Driven Tree-based Policy Optimization" (arXiv 2605.28109).

    Parameters:
        > Parameters that shape the tree

        tree_initial_rollouts (`int`, *optional*, defaults to `4`):
            Rollouts from the question before any branching. The paper's \( B_0 \).
        tree_levels (`int`, *optional*, defaults to `9`):
            Levels of the tree: the initial rollouts and `tree_levels - 1` rounds of branching. The paper's \( L \).
            `1` grows no tree.
        tree_nodes_per_level (`int`, *optional*, defaults to `1`):
            Steps chosen in each round. The paper's \( K \).
        tree_branches_per_node (`int`, *optional*, defaults to `1`):
            Rollouts that continue each chosen step. The paper's \( B \).
        num_generations (`int`, *optional*):
            Trajectories per question, on average with `adaptive_budget`. Derived: \( G = B_0 + (L - 1) K B \), 12
            with the defaults; with `branching="surprisal"` or `"entropy_fork"`, where every initial rollout has
            rounds of its own, \( B_0 (1 + (L - 1) K B) \); with `path_filter`, \( B_0 (1 + N) \). A different
            value is an error.
        adaptive_budget (`int`, *optional*):
            How many right and how many wrong answers are enough for a question. Questions that have them stop after
            any round and give the rest of their \( G \) trajectories to those that lack an outcome; every question
            keeps its initial rollouts, and a batch as many rows as ever. `1` gives the most questions a signal, larger
            numbers leave more trajectories to those that have one. With `branching="independent"`, rounds are of
            `tree_initial_rollouts` completions: dynamic sampling. `None` gives every question \( G \) trajectories.

        > Parameters that choose where to branch

        branching (`str`, *optional*, defaults to `"ib"`):
            Which steps to branch: `"ib"` (highest IB-Score), `"confidence"` (lowest confidence first, needs no
            reward), `"random"`, `"surprisal"` (TreeRL: the most surprising tokens are sampled again), `"segments"`
            (TreePO: paths are split after every step), `"entropy_fork"` (I2B-LPO: every initial rollout is forked at a
            token drawn from the 5% where the policy was most uncertain), `"pivot"` (DEEP-GRPO: failed rollouts, where
            they can be saved), `"turn_entropy"` (ARPO: after tool results, where the next turn begins uncertain),
            `"contrast"` (where another outcome is likeliest per token; this package's), or `"independent"` (no tree:
            all rollouts start at the question). docs/methods.md has the rule of each, and how to give the trainer a
            function of your own.
        allow_root_branching (`bool`, *optional*, defaults to `False`):
            Whether a round may choose the question itself. Where no other step can be branched, it is chosen anyway.
        allow_repeated_branching (`bool`, *optional*, defaults to `True`):
            Whether a step may be chosen in several rounds.
        branch_lookahead (`int`, *optional*, defaults to `0`):
            How many rollouts of a tree may still run when a round starts. Further rounds start at once until all of
            them have more branches than that; with one branch a round, as many more.
            `0` is the paper exactly: a round is chosen when all earlier rollouts are sampled and scored. A larger
            number keeps the engine fuller and chooses with what is known so far; see docs/performance.md for what
            that costs. `3` is recommended where generation with vLLM is the bottleneck.
        reproducible_rollouts (`bool`, *optional*, defaults to `False`):
            Whether every rollout is sampled from a seed of its own, so that the same seed and data grow the same trees
            whatever else the engine is doing and however many processes share the work. Costs throughput: see
            docs/performance.md.
        ib_beta (`float`, *optional*, defaults to `5.0`):
            Weight of the information about the answer in the IB-Score. The paper's \( \beta \); `beta` remains the
            KL coefficient.
        answer_marker (`list[str]`, *optional*):
            Texts that begin an answer, for example `["answer", "conclusion"]` (TreeRL): nothing is branched after the
            first of them in a completion.
        fork_keeps_token (`bool`, *optional*, defaults to `False`):
            Where `branching` forks tokens: whether branches keep the token that is forked and continue after it, or
            begin by sampling it again.
        fork_entropy (`str`, *optional*, defaults to `"exact"`):
            Where entropies come from with vLLM, which gives no more than 20 log-probabilities a token: `"exact"` is a
            pass of the policy over what was sampled, `"truncated"` the entropy among the 20 likeliest tokens. With
            transformers they are exact and cost no pass.
        path_filter (`str`, *optional*):
            Which branches of each initial rollout are trained on, with `branching="entropy_fork"`: the `paths_kept` of
            highest score. `"advantage"` scores by the mean of advantage times entropy over the tokens after the fork,
            `"pmi"` by what the path says about the answer, less what it says about the question; docs/i2b_lpo.md has
            both. All are rewarded; those that are left out enter no statistics. `None` keeps all.
        paths_kept (`int`, *optional*):
            Branches of each initial rollout that `path_filter` keeps, fewer than there are. A question then has
            \( B_0 (1 + N) \) rows in a batch. \( N \) of I2B-LPO.
        answer_column (`str`, *optional*, defaults to `"solution"`):
            Column of the dataset with the right answer, which `path_filter="pmi"` needs.
        latent_mode (`str`, *optional*, defaults to `"none"`):
            What steers the branches of I2B-LPO: `"psa"`, a random vector `z` for each branch that acts on every layer
            by pseudo self-attention, or `"softmax"`, one that acts on the logits. Initial rollouts and the training
            forward have none; the log-probabilities that branches were sampled with go to TRL's importance sampling
            (`vllm_importance_sampling_correction`), whatever generates. With vLLM, `"psa"` samples branches with
            transformers, and `"softmax"` needs `vllm_mode="colocate"`. docs/i2b_lpo.md has the formulas.
        latent_strength (`float`, *optional*, defaults to `1.0`):
            How strongly the vector acts on the token after the fork; 0 not at all. \( \gamma_0 \).
        latent_decay (`float`, *optional*, defaults to `128.0`):
            Tokens after which that has fallen to \( 1/e \). \( \tau \).
        latent_prior (`str`, *optional*):
            Folder that `trl-ibtpo latents train` has written: the vector then depends on the prefix. `None` draws it
            from \( N(0, I) \).
        step_delimiter (`str` or `list[str]`, *optional*, defaults to `"\n\n"`):
            Text that ends a step, or several of which each does.
        step_min_tokens (`int`, *optional*, defaults to `1`):
            Tokens that a step has at least: a delimiter before that does not end it.
        step_max_tokens (`int`, *optional*):
            Tokens after which a step ends without a delimiter. With the same number as `step_min_tokens`, steps have
            that length whatever the text.
        step_noise (`float`, *optional*, defaults to `0.0`):
            Share of step ends that are moved further on in the text at random, by at most the length of the step. To
            see how much depends on where steps end; the paper reports that 0.1 changes nothing.
        step_confidence (`str`, *optional*, defaults to `"geometric_mean"`):
            Probability of a step under the sampling policy, \( \pi(s) \): `"geometric_mean"` per token or `"joint"`.
        success_reward (`str` or `tuple[str, str, float]`, *optional*):
            What says how right a completion is, its success: the name of a reward function, or a threshold on one,
            `("shaped_reward", ">", 0.5)`, which on a command line is one text, `"shaped_reward > 0.5"`. Defaults to
            the first reward function. Branching and \( A_{IB} \) use it; \( A_{GL} \) uses the full weighted reward.
            A function of all rewards of a completion goes to the trainer, as `success_func`.
        success_range (`list[float]`, *optional*):
            Lowest and highest value of that function, for example `(-1.0, 1.5)`: success is the share of the way from
            the one to the other, clipped to [0, 1]. Left out, values in [0, 1] are used as they are; a tree with a
            value outside [0, 1] scales by its own lowest and highest value.
        reward_timeout (`float`, *optional*):
            Seconds that one call of a reward function may take; a call scores the completions that finished together.
            What is not scored in time counts as `None`, in the metric `rewards/{name}/timeouts` and in a warning; in
            evaluation too. Synchronous functions are interrupted wherever they are (in the main thread, see
            `time_limit.call_within`), asynchronous ones where they await. Reward models are not limited. `None` waits
            as long as it takes.

        > Parameters that control tools and environments

        environment_branching (`str`, *optional*, defaults to `"replay"`):
            How a branch gets an environment without `_snapshot` and `_restore` as it was at the end of its prefix:
            `"replay"` executes the actions of the prefix once more and compares what is observed, `"deepcopy"` keeps
            a copy from the end of every turn.
        tool_timeout (`float`, *optional*):
            Seconds that one call of a tool may take. A tool that takes longer has failed, as the model is told; an
            environment that takes longer ends its trajectory, which is not scored. `None` waits as long as it takes.
        tool_concurrency (`int`, *optional*, defaults to `32`):
            How many trajectories' tools run at the same time, in threads. `1` for tools that are not thread-safe.

        > Parameters that turn the tree into advantages

        advantage (`str`, *optional*, defaults to `"ibtpo"`):
            Advantage of each step: `"ibtpo"` (global plus local term), `"grpo"` (that of the trajectory), `"treerl"`,
            `"treepo"`, `"treepo_size_weighted"`, `"tree_grpo"`, `"segment_value"` (SPO) or `"sibling"` (against other
            leaves, the nearer ones counting more). docs/methods.md has the formulas.
        ib_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the local term \( A_{IB} \) of `"ibtpo"`. The paper's \( \lambda \).
        sibling_kappa (`float`, *optional*, defaults to `16.0`):
            How many leaves the leaves further up the tree are worth in the baseline of `"sibling"`: 0 compares a step
            with its nearest siblings alone, infinity with all other leaves of the question.
        value_estimate (`str`, *optional*, defaults to `"leaf_mean"`):
            Value of a step in `"ibtpo"`'s global term, `"treerl"`, `"segment_value"` and `"sibling"`: `"leaf_mean"`
            over the leaves under it, or `"backup"`, the mean of its children's values, each child one sample.
        selection_correction (`bool`, *optional*, defaults to `False`):
            Whether to take off the value of a branched step what it is expected to owe to being chosen.
        shared_token_weight (`str`, *optional*, defaults to `"per_trajectory"`):
            Weight of a token that several trajectories share in the policy loss: `"per_trajectory"` counts it once
            for each of them, `"once"` once in all, and `"sampled"` as the sample of the policy that it is: the
            initial rollouts weigh alike however often they were branched, and each of `c` continuations of a step
            weighs \( 1/c \) of it. `"sampled"` needs a `branching` that does not look at rewards. `"first"` counts it
            in the trajectory that sampled it and not in its branches. KL and entropy terms always count once per
            trajectory.

        > Parameters that regularize entropy

        ib_regularization_coef (`float`, *optional*, defaults to `0.0`):
            Weight of IBRO's term (arXiv 2507.18391, which uses `0.005`): the mean over tokens of advantage times
            entropy is taken off the loss, so that entropy rises where the advantage is positive and falls where it is
            negative. The \( \alpha \) of that paper.
        ib_regularization_shift (`float`, *optional*, defaults to `0.0`):
            What is added to the advantage in that term; \( \eta \) in that paper.

        > Parameters that control the forward pass

        packed_forward (`bool`, *optional*):
            Whether to compute each token that rows of a micro-batch share only once, forward and backward; the
            gradient is the same. `None` does so where it is exact: full attention in every layer, with `"sdpa"`,
            `"eager"` or `"flex_attention"`, and the same log-probabilities as TRL's forward on a small batch that is
            compared before the first step. `True` makes it an error where it is not. Trees then stay together in a
            micro-batch, so `per_device_train_batch_size` is best a multiple of `num_generations`.

        > Parameters that control what is recorded

        log_trees (`int`, *optional*, defaults to `0`):
            Record trees in `output_dir/trees/` in the first training step and in every so many, to be looked at with
            `trl-ibtpo view`. `0` records none.
        log_trees_count (`int`, *optional*, defaults to `4`):
            How many trees of such a step are recorded: the first ones of the main process.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `per_device_train_batch_size`, `per_device_eval_batch_size`: Default to one group of completions.
    > - `beta`: Defaults to `0.001` instead of `0.0`.
    > - `temperature`, `top_p`, `top_k`: Default to `0.7`, `0.95`, `20` instead of `1.0`, `1.0`, `0`.
    > - `max_completion_length`: Defaults to `2048` instead of `512`.
    > - `loss_type`: Defaults to `"grpo"` instead of `"dapo"`.
    > - `vllm_importance_sampling_mode`: Defaults to `"token_truncate"` instead of `"sequence_mask"`: masking whole
    >   sequences would throw away step-level credit.
    """

    # Parameters whose default values are overridden from GRPOConfig
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions per device and step. Times `steps_per_generation` it must hold whole trees. If "
            "`None`, it is the number of trajectories of one tree."
        },
    )
    per_device_eval_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions per device and evaluation step. If `None`, it is the number of completions per "
            "prompt in evaluation."
        },
    )
    num_generations: int | None = field(
        default=None,
        metadata={
            "help": "Trajectories per question, derived from the shape of the tree: `tree_initial_rollouts + "
            "(tree_levels - 1) * tree_nodes_per_level * tree_branches_per_node`; more where every initial rollout has "
            "rounds of its own. A different value is an error."
        },
    )
    adaptive_budget: int | None = field(
        default=None,
        metadata={
            "help": "How many right and how many wrong answers are enough for a question, which then gives the rest "
            "of its trajectories to questions that lack an outcome. If `None`, every question has `num_generations`."
        },
    )
    beta: float = field(
        default=0.001,
        metadata={
            "help": "KL coefficient. If `0.0`, the reference model is not loaded. Not the paper's beta, which is "
            "`ib_beta`."
        },
    )
    temperature: float = field(
        default=0.7,
        metadata={"help": "Temperature for sampling. The higher the temperature, the more random the completions."},
    )
    top_p: float = field(
        default=0.95,
        metadata={
            "help": "Float that controls the cumulative probability of the top tokens to consider. Must be in (0, 1]. "
            "Set to 1.0 to consider all tokens."
        },
    )
    top_k: int = field(
        default=20,
        metadata={
            "help": "Number of highest probability vocabulary tokens to keep for top-k-filtering. If `0`, "
            "top-k-filtering is disabled and all tokens are considered."
        },
    )
    max_completion_length: int | None = field(
        default=2048,
        metadata={"help": "Maximum length of a trajectory, shared prefix included."},
    )
    loss_type: str = field(
        default="grpo",
        metadata={"help": "Loss formulation, as in GRPOConfig."},
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={"help": "Importance sampling correction for vLLM, as in GRPOConfig."},
    )

    # Parameters that shape the tree
    tree_initial_rollouts: int = field(
        default=4,
        metadata={"help": "Rollouts from the question before any branching. The paper's B0."},
    )
    tree_levels: int = field(
        default=9,
        metadata={"help": "Levels of the tree: the initial rollouts and `tree_levels - 1` rounds. The paper's L."},
    )
    tree_nodes_per_level: int = field(
        default=1,
        metadata={"help": "Steps chosen in each round. The paper's K."},
    )
    tree_branches_per_node: int = field(
        default=1,
        metadata={"help": "Rollouts that continue each chosen step. The paper's B."},
    )

    # Parameters that choose where to branch
    branching: str = field(
        default="ib",
        metadata={"help": "Which steps to branch.", "choices": list(STRATEGIES)},
    )
    allow_root_branching: bool = field(
        default=False,
        metadata={
            "help": "Whether a round may choose the question itself. Where no other step can be branched, it is "
            "chosen anyway."
        },
    )
    allow_repeated_branching: bool = field(
        default=True,
        metadata={"help": "Whether a step may be chosen in several rounds."},
    )
    branch_lookahead: int = field(
        default=0,
        metadata={
            "help": "How many rollouts of a tree may still run when a round starts, and how many more branches start "
            "with it, in whole rounds. 0 is the paper exactly; a larger number keeps the engine fuller and chooses "
            "with what is known so far."
        },
    )
    reproducible_rollouts: bool = field(
        default=False,
        metadata={
            "help": "Whether every rollout is sampled from a seed of its own, so that the same seed and data grow the "
            "same trees whatever else the engine is doing and however many processes share the work. Costs throughput."
        },
    )
    ib_beta: float = field(
        default=5.0,
        metadata={"help": "Weight of the information about the answer in the IB-Score. The paper's beta."},
    )
    answer_marker: list[str] | None = field(
        default=None,
        metadata={"help": "Texts that begin an answer: nothing is branched after the first of them in a completion."},
    )
    fork_keeps_token: bool = field(
        default=False,
        metadata={"help": "Whether branches keep the token that is forked, where tokens are, or sample it again."},
    )
    fork_entropy: str = field(
        default="exact",
        metadata={
            "help": "Where entropies come from with vLLM: a pass of the policy, or the 20 likeliest tokens.",
            "choices": ["exact", "truncated"],
        },
    )
    path_filter: str | None = field(
        default=None,
        metadata={
            "help": "Which branches of each initial rollout are trained on: those of highest score. If `None`, all.",
            "choices": ["advantage", "pmi"],
        },
    )
    paths_kept: int | None = field(
        default=None, metadata={"help": "Branches of each initial rollout that `path_filter` keeps."}
    )
    answer_column: str = field(
        default="solution",
        metadata={"help": "Column of the dataset with the right answer, which the filter 'pmi' needs."},
    )
    latent_mode: str = field(
        default="none",
        metadata={
            "help": "What steers branches: a random vector in every layer, one on the logits, or none.",
            "choices": list(LATENT_MODES),
        },
    )
    latent_strength: float = field(
        default=1.0, metadata={"help": "How strongly that vector acts on the token after the fork; 0 not at all."}
    )
    latent_decay: float = field(default=128.0, metadata={"help": "Tokens after which that has fallen to 1/e."})
    latent_prior: str | None = field(
        default=None,
        metadata={"help": "Folder of trained latents. If `None`, the vector is drawn from a normal distribution."},
    )
    step_delimiter: str = field(  # one on a command line; a list of them in Python and in a YAML file
        default="\n\n",
        metadata={"help": "Text that ends a step, or several of which each does."},
    )
    step_min_tokens: int = field(
        default=1,
        metadata={"help": "Tokens that a step has at least: a delimiter before that does not end it."},
    )
    step_max_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens after which a step ends without a delimiter. If `None`, there is no limit."},
    )
    step_noise: float = field(
        default=0.0,
        metadata={
            "help": "Share of step ends that are moved further on in the text at random, by at most the length of the "
            "step."
        },
    )
    step_confidence: str = field(
        default="geometric_mean",
        metadata={
            "help": "Probability of a step under the sampling policy: per token, or of the whole step.",
            "choices": ["geometric_mean", "joint"],
        },
    )
    success_reward: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function that says how right a completion is, or a threshold on one, such as "
            "'shaped_reward > 0.5'. If `None`, the first reward function."
        },
    )
    success_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "Lowest and highest value of that function, mapped to success 0 and 1. If `None`, values in "
            "[0, 1] are used as they are, and a tree with a value outside scales by its own lowest and highest value."
        },
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that one call of a reward function may take; what is not scored in time counts as None. "
            "Reward models are not limited. If `None`, there is no limit."
        },
    )

    # Parameters that control tools and environments
    environment_branching: str = field(
        default="replay",
        metadata={
            "help": "How a branch gets an environment without `_snapshot` and `_restore` as it was at the end of its "
            "prefix: by executing the actions of the prefix once more, or as a copy from the end of that turn.",
            "choices": ["replay", "deepcopy"],
        },
    )
    tool_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that one call of a tool may take. A tool that takes longer has failed; an environment "
            "that takes longer ends its trajectory. If `None`, there is no limit."
        },
    )
    tool_concurrency: int = field(
        default=32,
        metadata={"help": "How many trajectories' tools run at the same time, in threads."},
    )

    # Parameters that turn the tree into advantages
    advantage: str = field(
        default="ibtpo",
        metadata={"help": "Advantage of each step.", "choices": list(ADVANTAGES)},
    )
    ib_coef: float = field(
        default=0.1,
        metadata={"help": "Weight of the local term of the advantage 'ibtpo'. The paper's lambda."},
    )
    sibling_kappa: float = field(
        default=16.0,
        metadata={
            "help": "How many leaves the leaves further up the tree are worth in the baseline of 'sibling': 0 "
            "compares with the nearest siblings alone, infinity with all other leaves of the question."
        },
    )
    value_estimate: str = field(
        default="leaf_mean",
        metadata={
            "help": "Value of a step: the mean over the leaves under it, or the mean of its children's values.",
            "choices": list(VALUES),
        },
    )
    selection_correction: bool = field(
        default=False,
        metadata={
            "help": "Whether to take off the value of a branched step what it is expected to owe to being chosen."
        },
    )
    shared_token_weight: str = field(
        default="per_trajectory",
        metadata={
            "help": "Weight of a token that several trajectories share in the policy loss: once for each of them, "
            "once in all, as the sample of the policy that it is, or in the first of them alone.",
            "choices": list(get_args(SharedTokenWeight)),
        },
    )

    # Parameters that regularize entropy
    ib_regularization_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of IBRO's term: the mean over tokens of advantage times entropy is taken off the loss."
        },
    )
    ib_regularization_shift: float = field(
        default=0.0,
        metadata={"help": "What is added to the advantage in IBRO's term."},
    )

    # Parameters that control the forward pass
    packed_forward: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to compute each token that rows of a micro-batch share only once. If `None`, where it is "
            "exact; if `True`, it is an error where it is not."
        },
    )

    # Parameters that control what is recorded
    log_trees: int = field(
        default=0,
        metadata={
            "help": "Record trees in `output_dir/trees/` in the first training step and in every so many, to look at "
            "with `trl-ibtpo view`. 0 records none."
        },
    )
    log_trees_count: int = field(
        default=4,
        metadata={"help": "How many trees of such a step are recorded: the first ones of the main process."},
    )

    def __post_init__(self):
        check_fields(self, [each for each in fields(self) if each.name in IBTPOConfig.__annotations__])
        check_leaves(self)
        self.success_reward = parse_rule(self.success_reward)
        if self.success_range is not None:
            self.success_range = tuple(self.success_range)
        check_combinations(self)
        self.num_generations = self.rows_per_question
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = self.num_generations
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.num_generations_eval or self.num_generations
        check_whole_trees(self)
        super().__post_init__()

    @classmethod
    def i2b_lpo(cls, output_dir: str | None = None, **changes: Any) -> "IBTPOConfig":
        """I2B-LPO ("Breaking Homogeneous Reasoning", arXiv 2601.05870) as one configuration.

        Sets the fields in `i2b_lpo.I2B_LPO`: a fork in each of 4 rollouts at an uncertain token, 3 branches of each
        steered by latents, the best 2 of them kept, GRPO's advantages with shared prefixes trained once, IBRO's term,
        and how the released code samples and learns.

        Args:
            output_dir: as ever.
            changes: fields that are set to something else, or in addition.
        """
        values = {**I2B_LPO, **changes}
        if values["path_filter"] is None and "paths_kept" not in changes:
            values["paths_kept"] = None
        return cls(output_dir, **values)

    @property
    def growth_settings(self) -> GrowthSettings:
        """What the growth of a tree depends on."""
        return GrowthSettings(**{each.name: getattr(self, each.name) for each in fields(GrowthSettings)})

    @property
    def rows_per_question(self) -> int:
        """Trajectories of a question that are trained on: all leaves of its tree, or those that a filter keeps."""
        if self.path_filter is None:
            return self.growth_settings.leaves
        return self.tree_initial_rollouts * (1 + self.paths_kept)

    @property
    def step_delimiters(self) -> list[str]:
        """Every text that ends a step."""
        return [self.step_delimiter] if isinstance(self.step_delimiter, str) else list(self.step_delimiter)

    @property
    def credit_settings(self) -> CreditSettings:
        """What the advantages of a tree depend on."""
        return CreditSettings(**{each.name: getattr(self, each.name) for each in fields(CreditSettings)})

    @property
    def branches(self) -> bool:
        """Whether any rollout continues another one."""
        return self.branching != "independent" and self.tree_levels > 1

    @property
    def branches_by_reward(self) -> bool:
        """Whether rewards decide where trees branch."""
        return self.branches and uses_rewards(STRATEGIES[self.branching])

    @property
    def success_steers(self) -> bool:
        """Whether success decides where trees branch, or what their steps are worth."""
        by_reward = self.branches_by_reward or self.adaptive_budget is not None
        return by_reward or (self.advantage == "ibtpo" and self.ib_coef != 0)
