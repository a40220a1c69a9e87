"""IBTPOConfig: the paper's defaults, derived values, and messages that say what would work."""

import subprocess
import sys

import pytest
import tiny
from datasets import Dataset
from transformers import HfArgumentParser

from trl_ibtpo import IBTPOConfig, IBTPOTrainer
from trl_ibtpo.rewards import RewardFunctionError


def build(**overrides) -> IBTPOConfig:
    return IBTPOConfig(**{"output_dir": "unused", "report_to": "none", "use_cpu": True, "bf16": False, **overrides})


def test_defaults_are_the_papers():
    args = build()
    assert (
        args.tree_initial_rollouts,
        args.tree_levels,
        args.tree_nodes_per_level,
        args.tree_branches_per_node,
    ) == (4, 9, 1, 1)
    assert args.num_generations == 12 and args.ib_beta == 5.0 and args.ib_coef == 0.1
    assert (args.learning_rate, args.beta, args.temperature, args.top_p, args.top_k) == (1e-6, 0.001, 0.7, 0.95, 20)
    assert args.max_completion_length == 2048 and args.loss_type == "grpo"
    assert args.vllm_importance_sampling_mode == "token_truncate"
    assert args.step_delimiter == "\n\n" and args.branching == "ib" and args.shared_token_weight == "per_trajectory"


def test_batch_sizes_default_to_one_group():
    args = build(tree_levels=5, num_generations_eval=3)
    assert (args.num_generations, args.per_device_train_batch_size, args.per_device_eval_batch_size) == (8, 8, 3)


def test_given_num_generations_that_agrees_is_accepted():
    assert build(num_generations=12).num_generations == 12


def test_command_line(tmp_path):
    (args,) = HfArgumentParser(IBTPOConfig).parse_args_into_dataclasses(
        f"--output_dir {tmp_path} --tree_levels 3 --branching random --ib_coef 0.5 --use_cpu --bf16 False".split()
    )
    assert (args.num_generations, args.branching, args.ib_coef) == (6, "random", 0.5)


def test_help_names_every_field():
    code = (
        "from transformers import HfArgumentParser; from trl_ibtpo import IBTPOConfig; "
        "HfArgumentParser(IBTPOConfig).parse_args(['--help'])"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in vars(IBTPOConfig)["__annotations__"]:
        assert f"--{name}" in text


def test_every_new_field_is_documented_twice():
    for name, field in IBTPOConfig.__dataclass_fields__.items():
        if name in vars(IBTPOConfig)["__annotations__"]:
            assert field.metadata["help"], name
            assert name in IBTPOConfig.__doc__, name


WRONG_CONFIGS = {
    "zero rollouts": ({"tree_initial_rollouts": 0}, "`tree_initial_rollouts` is 0; it must be a whole number"),
    "negative levels": ({"tree_levels": -1}, "`tree_levels` is -1; it must be a whole number of at least 1"),
    "zero nodes": ({"tree_nodes_per_level": 0}, "`tree_nodes_per_level` is 0"),
    "fractional branches": ({"tree_branches_per_node": 1.5}, "`tree_branches_per_node` is 1.5"),
    "negative lookahead": ({"branch_lookahead": -1}, "`branch_lookahead` is -1; it must be a whole number"),
    "one trajectory": ({"tree_initial_rollouts": 1, "tree_levels": 1}, "compare at least 2"),
    "contradicting G": (
        {"num_generations": 8},
        r"`num_generations` is 8, but the tree has 12 trajectories: .* = 4 \+ \(9 - 1\) \* 1 \* 1 = 12",
    ),
    "batch without whole trees": (
        {"per_device_train_batch_size": 8},
        r"8 \* 1 = 8 completions at a time, .* trees of 12 .* `per_device_train_batch_size` = 12, 24, 36, ... with "
        r"`gradient_accumulation_steps` = 1; or `gradient_accumulation_steps` = 3, 6, 9",
    ),
    "steps without whole trees": (
        {"per_device_train_batch_size": 6, "steps_per_generation": 3},
        r"6 \* 3 = 18 .* `per_device_train_batch_size` = 4, 8, 12, ... with `steps_per_generation` = 3; or "
        r"`steps_per_generation` = 2, 4, 6",
    ),
    "generation batch": ({"generation_batch_size": 20}, "`generation_batch_size` is 20, .* 12, 24, 36"),
    "empty delimiter": ({"step_delimiter": ""}, "`step_delimiter` is empty; give the text that ends a step"),
    "unknown branching": ({"branching": "best"}, "`branching` is 'best'; it must be one of .*'ib'"),
    "unknown advantage": ({"advantage": "none"}, "`advantage` is 'none'; it must be one of .*'ibtpo'"),
    "unknown confidence": ({"step_confidence": "mean"}, "`step_confidence` is 'mean'"),
    "unknown weight": ({"shared_token_weight": "twice"}, "`shared_token_weight` is 'twice'"),
    "zero beta": ({"ib_beta": 0.0}, r"`ib_beta` is 0.0; it must be positive \(the paper uses 5\)"),
    "no length": ({"max_completion_length": None}, "`max_completion_length` is None; it must be a whole number"),
}


@pytest.mark.parametrize("overrides, message", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_wrong_config(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(**overrides)


def raises(completions, **kwargs):
    raise KeyError("solution")


def short(completions, **kwargs):
    return [1.0] * (len(completions) - 1)


def unbounded(completions, **kwargs):
    return [3.5] * len(completions)


def scalar(completions, **kwargs):
    return 1.0


def tool() -> str:
    """A tool."""
    return "x"


IMAGES = Dataset.from_dict({"prompt": ["a"] * 12, "image": ["b"] * 12})
WRONG_TRAINERS = {
    "tools": ({"tools": [tool]}, ValueError, "`tools` is not supported: .* Leave it out, or train with TRL's"),
    "environment": ({"environment_factory": object}, ValueError, "`environment_factory` is not supported"),
    "rollout function": ({"rollout_func": tool}, ValueError, "`rollout_func` is not supported"),
    "images": ({"train_dataset": IMAGES}, ValueError, "Images are not supported in training"),
    "no prompt column": (
        {"train_dataset": Dataset.from_dict({"question": ["a"] * 12})},
        ValueError,
        r"no column 'prompt' \(it has: question\). Rename",
    ),
    "no dataset": ({"train_dataset": None}, ValueError, "`train_dataset` is required; it must have a column 'prompt'"),
    "not our config": ({"args": "grpo"}, TypeError, "`args` is a str; IBTPOTrainer needs an IBTPOConfig"),
    "unknown success reward": (
        {"success_reward": "accuracy"},
        ValueError,
        "`success_reward` is 'accuracy', which is not a reward function. Available: even_length, has_letter",
    ),
    "continuous batching": (
        {"use_transformers_continuous_batching": True},
        ValueError,
        "`use_transformers_continuous_batching` is not supported",
    ),
    "reward raises": (
        {"reward_funcs": [raises]},
        RewardFunctionError,
        r"(?s)'raises' raised KeyError: 'solution'.*for the prompt 'What is.*Original traceback.*raise KeyError",
    ),
    "reward too short": ({"reward_funcs": [short]}, RewardFunctionError, "'short' returned 7 rewards, but 8 were"),
    "reward out of range": (
        {"reward_funcs": [unbounded, tiny.even_length]},
        RewardFunctionError,
        r"'unbounded' returned 3.5, .* \[0, 1\].*`success_reward` \(available: unbounded, even_length\)",
    ),
    "reward not a list": ({"reward_funcs": [scalar]}, RewardFunctionError, "'scalar' returned 1.0; it must return a"),
}


@pytest.mark.parametrize("overrides, error, message", WRONG_TRAINERS.values(), ids=WRONG_TRAINERS)
def test_wrong_trainer(model_path, config, overrides, error, message):
    trainer_names = {"tools", "environment_factory", "rollout_func", "train_dataset", "reward_funcs", "args"}
    given = {name: value for name, value in overrides.items() if name in trainer_names}
    fields = {name: value for name, value in overrides.items() if name not in trainer_names}
    arguments = {
        "reward_funcs": [tiny.even_length, tiny.has_letter],
        "args": config(per_device_train_batch_size=24, **fields),
        "train_dataset": tiny.questions(),
        **given,
    }
    with pytest.raises(error, match=message):
        IBTPOTrainer(model_path, **arguments).train()


def test_out_of_range_rewards_work_when_success_is_another_function(model_path, config):
    args = config(max_steps=1, success_reward="even_length")
    IBTPOTrainer(model_path, [unbounded, tiny.even_length], args, tiny.questions()).train()
