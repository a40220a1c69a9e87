"""IBTPOConfig: the paper's defaults and derived values. Wrong values: test_wrong_inputs.py."""

import pytest
import tiny
from transformers import HfArgumentParser
from trl import TrlParser

from trl_ibtpo import IBTPOConfig, IBTPOTrainer


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


def test_a_range_from_the_command_line_or_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nsuccess_range: [-1, 1.5]\n"
    )
    flags = f"--output_dir {tmp_path} --success_range -1.0 1.5 --use_cpu --bf16 False".split()
    (by_flags,) = HfArgumentParser(IBTPOConfig).parse_args_into_dataclasses(flags)
    (by_file,) = TrlParser(IBTPOConfig).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])
    assert by_flags.success_range == by_file.success_range == build(success_range=[-1, 1.5]).success_range == (-1, 1.5)


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit, match="0"):
        HfArgumentParser(IBTPOConfig).parse_args(["--help"])
    text = capsys.readouterr().out
    for name in vars(IBTPOConfig)["__annotations__"]:
        assert f"--{name}" in text


def test_every_new_field_is_documented_twice():
    for name, field in IBTPOConfig.__dataclass_fields__.items():
        if name in vars(IBTPOConfig)["__annotations__"]:
            assert field.metadata["help"], name
            assert name in IBTPOConfig.__doc__, name


def test_out_of_range_rewards_work_when_success_is_another_function(model_path, config):
    def unbounded(completions, **kwargs):
        return [3.5] * len(completions)

    args = config(max_steps=1, success_reward="even_length")
    IBTPOTrainer(model_path, [unbounded, tiny.even_length], args, tiny.questions()).train()


def test_several_delimiters_from_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text(
        f'output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nstep_delimiter: ["\\n\\n", "###"]\n'
        'answer_marker: ["answer"]\nstep_max_tokens: 64\n'
    )
    (args,) = TrlParser(IBTPOConfig).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])
    assert (args.step_delimiter, args.step_max_tokens, args.answer_marker) == (["\n\n", "###"], 64, ["answer"])
    for wrong in ("", [], ["\n\n", ""], ["\n\n", 3]):
        with pytest.raises(ValueError, match=r"`step_delimiter` is .* it must be the text that ends a step"):
            build(step_delimiter=wrong)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"step_min_tokens": 9, "step_max_tokens": 8}, "`step_max_tokens` is 8, but `step_min_tokens` is 9"),
        ({"step_min_tokens": 0}, "`step_min_tokens` is 0; it must be a whole number of at least 1"),
        ({"step_noise": 1.5}, "`step_noise` is 1.5; it must be a share between 0 and 1"),
        (
            {"answer_marker": "answer"},
            r"`answer_marker` is 'answer'; it must be a list of texts .*, for example \['ans",
        ),
        ({"branching": "segments", "branch_lookahead": 3}, "`branch_lookahead` is 3, which has no meaning with"),
        ({"branching": "segments", "answer_marker": ["a"]}, "`answer_marker` is .* no meaning with `branching='segm"),
        (
            {"branching": "surprisal", "num_generations": 12},
            r"36 trajectories: tree_initial_rollouts \* \(1 \+ .*\) = 4 \* \(1 \+ \(9 - 1\) \* 1 \* 1\) = 36",
        ),
    ],
)
def test_fields_of_branching_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)
