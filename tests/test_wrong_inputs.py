"""What a user may get wrong, and the message that says what is wrong, the value seen and one that works."""

import functools
import math
import types

import agents
import pytest
import tiny
import trl.rewards
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import Qwen3ForCausalLM
from trl import GRPOConfig

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.training import checks, dataset_checks, generation_checks, model_checks
from trl_ibtpo.training.rewards import RewardFunctionError


def test_what_trl_accepts_is_not_refused(config, model_path):
    """Columns that a transform makes, and a function behind a decorator that passes on what that needs."""

    def length(completions, solution):
        return [float(len(text) % 2 == int(each)) for text, each in zip(completions, solution, strict=True)]

    @functools.wraps(length)
    def adapted(completions, **kwargs):
        return length(completions, kwargs["solution"])

    def made(rows):
        return {"prompt": rows["question"], "solution": rows["answer"]}

    rows = Dataset.from_dict({"question": [f"What is {n}?" for n in range(64)], "answer": ["0", "1"] * 32})
    trainer = IBTPOTrainer(model_path, adapted, config(max_steps=1), rows.with_transform(made))
    trainer.train()
    assert trainer.state.global_step == 1
    with pytest.raises(ValueError, match=r"has no column 'prompt' \(it has: question"):
        IBTPOTrainer(model_path, adapted, config(), rows.with_transform(lambda rows: {"question": rows["question"]}))


def test_a_server_may_be_tensor_parallel(config):
    args = config(use_vllm=True, vllm_mode="server", vllm_tensor_parallel_size=2)
    generation_checks.check_vllm_arguments(args)  # TRL ignores the field then


def test_a_template_may_be_the_processors():
    """Of a model that takes images, trained on text."""
    row = {"prompt": [{"role": "user", "content": "What is 3 + 4?"}]}
    tokenizer = tiny.byte_level_tokenizer()
    tokenizer.chat_template = None
    processor = types.SimpleNamespace(tokenizer=tokenizer, chat_template="{{ messages }}")
    model_checks.check_template(processor, row)
    processor.chat_template, tokenizer.chat_template = None, "{{ messages }}"
    with pytest.raises(ValueError, match="no chat template"):
        model_checks.check_template(processor, row)


def raises(completions, **kwargs):
    raise KeyError("solution")


def short(completions, **kwargs):
    return [1.0] * (len(completions) - 1)


def infinite(completions, **kwargs):
    return [math.inf] * len(completions)


def scalar(completions, **kwargs):
    return 1.0


def needs_solution(completions, solution, **kwargs):
    return [1.0] * len(completions)


def needs_prompt(prompt, completions, **kwargs):
    return [1.0] * len(completions)


def takes_completions_only(prompts, completions):
    return [1.0] * len(completions)


def takes_text(text):
    return 1.0


def reads_messages(completions, **kwargs):
    return [float("7" in completion[0]["content"]) for completion in completions]


def reads_text(completions, **kwargs):
    return [float("7" in completion.strip()) for completion in completions]


def returns_nothing(completions, **kwargs):
    sum(len(completion) for completion in completions)


def returns_words(completions, **kwargs):
    return ["right" for _ in completions]


def tool() -> str:
    """A tool."""
    return "x"


def tokenizer(vocab_size: int = 320, **changes):
    changed = tiny.byte_level_tokenizer(vocab_size)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def prompts(*values) -> Dataset:
    return Dataset.from_dict({"prompt": list(values) * 8, "letter": ["a"] * 8 * len(values)})


def streamed(**row) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter([row] * 8))


IMAGE = [{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "What is it?"}]}]
FOR_EXAMPLE = r"for example 'What is 3 \+ 4\?' or \[\{'role': 'user', 'content': 'What is 3 \+ 4\?'\}\]"
GRPO = GRPOConfig("unused", use_cpu=True, bf16=False, report_to="none")

# Fields of IBTPOConfig or arguments of IBTPOTrainer; the exception; its words.
ROWS = {
    # the shape of the tree
    "no rollouts": (
        {"tree_initial_rollouts": 0},
        ValueError,
        "`tree_initial_rollouts` is 0; it must be a whole number",
    ),
    "negative levels": (
        {"tree_levels": -1},
        ValueError,
        "`tree_levels` is -1; it must be a whole number of at least 1",
    ),
    "no nodes": (
        {"tree_nodes_per_level": 0},
        ValueError,
        "`tree_nodes_per_level` is 0; it must be a whole number of at least 1",
    ),
    "part of a branch": (
        {"tree_branches_per_node": 1.5},
        ValueError,
        "`tree_branches_per_node` is 1.5; it must be a whole number",
    ),
    "one trajectory": (
        {"tree_initial_rollouts": 1, "tree_levels": 1},
        ValueError,
        r"one trajectory \(`tree_initial_rollouts` is 1, `tree_levels` is 1\), but advantages compare at least 2",
    ),
    "another group size": (
        {"num_generations": 8},
        ValueError,
        r"`num_generations` is 8, but the tree has 12 trajectories: .* = 4 \+ \(9 - 1\) \* 1 \* 1 = 12. Leave "
        "`num_generations` out, or change the tree: `tree_levels=5` gives 8 trajectories",
    ),
    "a group smaller than the first rollouts": (
        {"num_generations": 3},
        ValueError,
        "`tree_initial_rollouts=3` with `tree_levels=1` gives 3 trajectories",
    ),
    "a group that wide rounds do not give": (
        {"num_generations": 7, "tree_nodes_per_level": 2},
        ValueError,
        "`num_generations` is 7, .* `tree_initial_rollouts=5` with `tree_levels=2` gives 7 trajectories",
    ),
    "field of another package": ({"tree_depth": 5}, TypeError, "unexpected keyword argument 'tree_depth'"),
    # batches
    "batch without whole trees": (
        {"per_device_train_batch_size": 8},
        ValueError,
        r"8 \* 1 = 8 completions at a time, .* trees of 12 .* `per_device_train_batch_size` = 12, 24, 36, ... with "
        r"`gradient_accumulation_steps` = 1; or `gradient_accumulation_steps` = 3, 6, 9",
    ),
    "steps without whole trees": (
        {"per_device_train_batch_size": 6, "steps_per_generation": 3},
        ValueError,
        r"6 \* 3 = 18 .* `per_device_train_batch_size` = 4, 8, 12, ... with `steps_per_generation` = 3; or "
        r"`steps_per_generation` = 2, 4, 6",
    ),
    "generation batch without whole trees": (
        {"generation_batch_size": 20},
        ValueError,
        "`generation_batch_size` is 20, .* of 12 trajectories. Values that work: 12, 24, 36",
    ),
    "empty batch": (
        {"per_device_train_batch_size": 0},
        ValueError,
        "`per_device_train_batch_size` is 0; it must be a whole number",
    ),
    "no accumulation": (
        {"gradient_accumulation_steps": 0},
        ValueError,
        "`gradient_accumulation_steps` is 0; it must be a whole number",
    ),
    # numbers
    "negative lookahead": (
        {"branch_lookahead": -1},
        ValueError,
        r"`branch_lookahead` is -1; it must be a whole number from 0 \(the paper\)",
    ),
    "lookahead switched on": (
        {"branch_lookahead": True},
        ValueError,
        "`branch_lookahead` is True; it must be a whole number from 0",
    ),
    "adaptive budget switched on": (
        {"adaptive_budget": True},
        ValueError,
        "`adaptive_budget` is True; it must be a whole number of at least 1: so many right and so many wrong answers",
    ),
    "adaptive budget with nothing to give": (
        {"adaptive_budget": 1, "tree_levels": 1, "branching": "independent"},
        ValueError,
        "`adaptive_budget` is 1, but `tree_levels` is 1: .* no others to give away. Use, .*tree_levels=9",
    ),
    "adaptive budget after one rollout": (
        {"adaptive_budget": 1, "tree_initial_rollouts": 1},
        ValueError,
        "`adaptive_budget` is 1, but `tree_initial_rollouts` is 1: .* Use at least 2",
    ),
    "no beta": ({"ib_beta": 0.0}, ValueError, r"`ib_beta` is 0.0; it must be positive \(the paper uses 5\)"),
    "beta as text": ({"ib_beta": "5"}, ValueError, r"`ib_beta` is '5'; it must be positive \(the paper uses 5\)"),
    "lambda unknown": (
        {"ib_coef": math.nan},
        ValueError,
        r"`ib_coef` is nan; it must be a number \(the paper uses 0.1\)",
    ),
    "greedy": (
        {"temperature": 0.0},
        ValueError,
        r"`temperature` is 0.0; it must be positive \(the paper uses 0.7\), or all rollouts",
    ),
    "no length": (
        {"max_completion_length": None},
        ValueError,
        "`max_completion_length` is None; it must be a whole number of at least 1",
    ),
    "no time": (
        {"reward_timeout": 0},
        ValueError,
        "`reward_timeout` is 0; it must be a positive number of seconds, for example 30",
    ),
    "time as text": (
        {"reward_timeout": "30s"},
        ValueError,
        "`reward_timeout` is '30s'; it must be a positive number of seconds",
    ),
    "one end of a range": (
        {"success_range": [1.5]},
        ValueError,
        r"`success_range` is \[1.5\]; it must be the lowest and the highest .*, two finite numbers, .* \(-1.0, 1.5\)",
    ),
    "range upside down": ({"success_range": (1.0, -1.0)}, ValueError, r"`success_range` is \(1.0, -1.0\); it must be"),
    "empty range": ({"success_range": (0.5, 0.5)}, ValueError, r"`success_range` is \(0.5, 0.5\); it must be"),
    "infinite range": ({"success_range": (0.0, math.inf)}, ValueError, r"`success_range` is \(0.0, inf\); it must be"),
    "range as text": ({"success_range": "01"}, ValueError, "`success_range` is '01'; it must be the lowest and the"),
    "top_p in percent": (
        {"top_p": 95},
        ValueError,
        r"`top_p` is 95; it must be a share in \(0, 1\] of the prob",
    ),
    "top_k of vLLM": ({"top_k": -1}, ValueError, "`top_k` is -1; it must be a whole number of tokens, or 0 for all"),
    # success
    "success as a number": ({"success_reward": 0.5}, ValueError, "`success_reward` is 0.5; it must be the name of a"),
    "success compared otherwise": (
        {"success_reward": ("shaped", "==", 1)},
        ValueError,
        r"`success_reward` is \('shaped', '==', 1\); it must be the name .* \('shaped_reward', '>', 0.5\)",
    ),
    "success without a limit": (
        {"success_reward": ["shaped", ">"]},
        ValueError,
        r"`success_reward` is \['shaped', '>'\]; it must be",
    ),
    "success as a lambda": (
        {"success_reward": lambda rewards: True},
        ValueError,
        "`success_reward` is a function without a name, .* give the function to the trainer as `success_func`",
    ),
    "a threshold and a range": (
        {"success_reward": "even_length > 0.5", "success_range": (0, 2)},
        ValueError,
        r"`success_range` is \(0, 2\) and `success_reward` is \('even_length', '>', 0.5\), .* Leave `success_ran",
    ),
    "success of a function that is not in the list": (
        {"success_reward": tiny.text_of},
        ValueError,
        "`success_reward` is 'text_of', which is not a reward function. Available: even_length, has_letter. Add",
    ),
    "threshold on nothing": (
        {"success_reward": "accuracy>0.5"},
        ValueError,
        "`success_reward` is 'accuracy', which is not a reward function",
    ),
    "success function as a name": (
        {"success_func": "even_length"},
        TypeError,
        "`success_func` is 'even_length'; it must be a function of the rewards .* `success_reward`",
    ),
    "two kinds of success": (
        {"success_func": len, "success_reward": "even_length"},
        ValueError,
        r"Both `success_func` and `success_reward` \('even_length'\) say .* Leave one out",
    ),
    "success function with another name inside": (
        {"success_func": lambda rewards: rewards["accuracy"] > 0},
        ValueError,
        r"`success_func` raised KeyError: 'accuracy' for the rewards \{'even_length': ",
    ),
    # choices and text
    "unknown branching": (
        {"branching": "best"},
        ValueError,
        r"`branching` is 'best'; it must be one of \['ib', 'confidence', 'random'",
    ),
    "answer marker that is a special token": (
        {"answer_marker": ["so", "x<eos>"]},
        ValueError,
        "`answer_marker` holds 'x<eos>', but '<eos>' is a special token .* never be found. Give a text",
    ),
    "delimiter that is a special token": (
        {"step_delimiter": "<eos>"},
        ValueError,
        "`step_delimiter` holds '<eos>', but '<eos>' is a special token",
    ),
    "unknown advantage": (
        {"advantage": "none"},
        ValueError,
        r"`advantage` is 'none'; it must be one of \['ibtpo', 'grpo', 'treerl', 'treepo'",
    ),
    "unknown confidence": (
        {"step_confidence": "mean"},
        ValueError,
        r"`step_confidence` is 'mean'; .* \['geometric_mean', 'joint'\]",
    ),
    "unknown weight": (
        {"shared_token_weight": "twice"},
        ValueError,
        r"`shared_token_weight` is 'twice'; .* \['per_trajectory', 'once', 'sampled', 'first'\]",
    ),
    "unknown value": (
        {"value_estimate": "max"},
        ValueError,
        r"`value_estimate` is 'max'; .* \['leaf_mean', 'backup'\]",
    ),
    "negative kappa": (
        {"sibling_kappa": -1},
        ValueError,
        "`sibling_kappa` is -1; it must be a number of leaves from 0",
    ),
    "kappa not a number": ({"sibling_kappa": math.nan}, ValueError, "`sibling_kappa` is nan; it must be"),
    "shared tokens weighed twice": (
        {"advantage": "treerl", "shared_token_weight": "once"},
        ValueError,
        "`shared_token_weight` is 'once', but `advantage='treerl'` weighs .* Use 'per_trajectory'",
    ),
    "gain over parents without branches": (
        {"advantage": "segment_value", "branching": "independent"},
        ValueError,
        "`advantage` is 'segment_value', .* but no rollout continues another",
    ),
    "value that nothing uses": (
        {"advantage": "treepo", "value_estimate": "backup"},
        ValueError,
        "`value_estimate` is 'backup', but `advantage='treepo'` is not made of .* Use 'leaf_mean', or .* ibtpo",
    ),
    "correction that nothing uses": (
        {"advantage": "grpo", "selection_correction": True},
        ValueError,
        "`selection_correction` is True, but `advantage='grpo'`",
    ),
    "correction where nothing is chosen": (
        {"branching": "independent", "selection_correction": True},
        ValueError,
        "`selection_correction` is True, but no step is chosen",
    ),
    "correction where branches are chosen again": (
        {
            **{"branching": "entropy_fork", "tree_levels": 2, "tree_branches_per_node": 3, "tree_initial_rollouts": 4},
            **{"path_filter": "advantage", "paths_kept": 2, "selection_correction": True},
        },
        ValueError,
        "`selection_correction` is True, .* but `path_filter='advantage'` chooses among its branches once more. Leave",
    ),
    "sampled weights and leaves by reward": (
        {"shared_token_weight": "sampled", "branching": "confidence", "adaptive_budget": 1},
        ValueError,
        "`shared_token_weight` is 'sampled', .* `adaptive_budget` is 1: .* Leave `adaptive_budget` out",
    ),
    "negative regularization": (
        {"ib_regularization_coef": -0.1},
        ValueError,
        "`ib_regularization_coef` is -0.1; it must be a number of at least 0",
    ),
    "a shift of nothing": (
        {"ib_regularization_shift": 0.5},
        ValueError,
        "`ib_regularization_shift` is 0.5, but `ib_regularization_coef` is 0",
    ),
    "sampled weights and picks by reward": (
        {"shared_token_weight": "sampled", "branching": "ib"},
        ValueError,
        "`shared_token_weight` is 'sampled', .* `branching` is 'ib', which looks at rewards: .* Use .*'confidence'",
    ),
    "no delimiter": ({"step_delimiter": ""}, ValueError, r"`step_delimiter` is ''; it must be the text .* '\\n\\n'"),
    "delimiter as a number": (
        {"step_delimiter": 10},
        ValueError,
        r"`step_delimiter` is 10; it must be the text .* '\\n\\n'",
    ),
    # what TRL has and a tree cannot use
    "not our config": ({"args": GRPO}, TypeError, "`args` is a GRPOConfig; IBTPOTrainer needs an IBTPOConfig"),
    "a dict as config": ({"args": {"output_dir": "out"}}, TypeError, "`args` is a dict; IBTPOTrainer needs an IBTPO"),
    "tools that the template does not render": (
        {"tools": [tool]},
        ValueError,
        "The provided chat template does not support tool calling",
    ),
    "tools and prompts of text": (
        {"tools": [tool], "processing_class": agents.tokenizer()},
        ValueError,
        "'prompt' of `train_dataset` holds the text 'What is .*', but tools need messages",
    ),
    "environment without reset": (
        {"environment_factory": object, "processing_class": agents.tokenizer()},
        ValueError,
        "must define a callable `reset`",
    ),
    "a budget for all questions together, and tools": (
        {"adaptive_budget": 1, "tools": [tool], "processing_class": agents.tokenizer()},
        ValueError,
        "`adaptive_budget` is 1, which cannot be combined with `tools` .* environment of its own",
    ),
    "no time for tools": (
        {"tool_timeout": 0},
        ValueError,
        "`tool_timeout` is 0; it must be a positive number of seconds, for example 30, or None",
    ),
    "no tools at a time": (
        {"tool_concurrency": 0},
        ValueError,
        "`tool_concurrency` is 0; it must be a whole number of at least 1, for example 32",
    ),
    "unknown way to an environment": (
        {"environment_branching": "fork"},
        ValueError,
        r"`environment_branching` is 'fork'; it must be one of \['replay', 'deepcopy'\]",
    ),
    "rollout function": ({"rollout_func": tool}, ValueError, "`rollout_func` is not supported: .* `tools=`"),
    "continuous batching": (
        {"use_transformers_continuous_batching": True},
        ValueError,
        "`use_transformers_continuous_batching` is not supported: .* Leave it off, or set `use_vllm=True`",
    ),
    "beam search": (
        {"generation_kwargs": {"num_beams": 2}},
        ValueError,
        "`generation_kwargs` sets `num_beams` to 2, which is not supported: .* Sample with temperature, top_k",
    ),
    "unknown mode of vLLM": (
        {"use_vllm": True, "vllm_mode": "colocated"},
        ValueError,
        "`vllm_mode` is 'colocated'; it must be 'colocate' .* or 'server'",
    ),
    "own stops and masked truncation": (
        {"use_vllm": True, "generation_kwargs": {"stop": ["</answer>"]}, "mask_truncated_completions": True},
        ValueError,
        r"`mask_truncated_completions` is True, .* mask all those that `generation_kwargs` \(\{'stop'.* Leave `mask",
    ),
    "tensor parallel": (
        {"use_vllm": True, "vllm_tensor_parallel_size": 2},
        ValueError,
        "`vllm_tensor_parallel_size` is 2, which is not supported: .* Use 1 .* or `vllm_mode='server'`",
    ),
    "structured outputs": (
        {"use_vllm": True, "vllm_structured_outputs_regex": "a+"},
        ValueError,
        r"Structured outputs \(`vllm_structured_outputs_regex`\) are not supported: .* Leave it out",
    ),
    **{
        f"{name} with {'vLLM' if use_vllm else 'transformers'}": (
            {"use_vllm": use_vllm, "generation_kwargs": {name: 3}},
            ValueError,
            f"`generation_kwargs` sets `{name}` to 3, but a tree sets it for each of its rollouts. Leave it out; `max",
        )
        for name in ("max_tokens", "max_new_tokens", "max_length", "seed", "n")
        for use_vllm in (False, True)
    },
    **{
        f"{name} with {'vLLM' if use_vllm else 'transformers'}": (
            {"use_vllm": use_vllm, "generation_kwargs": {name: 3}},
            ValueError,
            f"`generation_kwargs` sets `{name}` to 3, but it counts from where a rollout starts: .* Leave it out",
        )
        for name in ("min_tokens", "min_new_tokens", "min_length", "presence_penalty", "frequency_penalty")
        for use_vllm in (False, True)
    },
    "stop text that begins before a branch": (
        {"use_vllm": True, "step_delimiter": "\n\n", "generation_kwargs": {"stop": ["</answer>", "\n\nQuestion:"]}},
        ValueError,
        r"sets `stop` to \['</answer>', '\\n\\nQuestion:'\], but '\\n\\nQuestion:' may begin with the end of a step",
    ),
    "stop text for transformers": (
        {"generation_kwargs": {"stop_strings": "</answer>"}},
        ValueError,
        "sets `stop_strings` to '</answer>', for which transformers needs a tokenizer .* `use_vllm=True` and",
    ),
    "several samples per request": (
        {"use_vllm": True, "generation_kwargs": {"n": 4}},
        ValueError,
        "`generation_kwargs` sets `n` to 4, but a tree sets it for each of its rollouts. Leave it out",
    ),
    # datasets
    "no dataset": ({"train_dataset": None}, ValueError, "`train_dataset` is required; it must have a column 'prompt'"),
    "a dataset by name": (
        {"train_dataset": "questions.jsonl"},
        TypeError,
        r"`train_dataset` is 'questions.jsonl'; it must be a dataset, .* `load_dataset\('json', data_files=",
    ),
    "all splits": (
        {"train_dataset": DatasetDict({"train": tiny.questions(8), "test": tiny.questions(8)})},
        ValueError,
        r"`train_dataset` is a DatasetDict with the splits train, test. Give one of them, .* `dataset\['train'\]`",
    ),
    "a dict of datasets": (
        {"train_dataset": {"math": tiny.questions(8)}},
        ValueError,
        r"`train_dataset` is a dict with the splits math. Give one of them, for example `dataset\['math'\]`",
    ),
    "no split": ({"train_dataset": DatasetDict()}, ValueError, "is a DatasetDict with the splits none. Give one"),
    "not a dataset": (
        {"train_dataset": [{"prompt": "a"}] * 8},
        TypeError,
        "`train_dataset` must be a `Dataset` or `IterableDataset`, got `list`",
    ),
    "no prompt column": (
        {"train_dataset": Dataset.from_dict({"question": ["a"] * 8})},
        ValueError,
        r"no column 'prompt' \(it has: question\). Rename .* `dataset.rename_column\('question', 'prompt'\)`",
    ),
    "no prompt in the stream": ({"train_dataset": streamed(question="a")}, ValueError, "holds None; .*" + FOR_EXAMPLE),
    "empty dataset": (
        {"train_dataset": prompts()},
        ValueError,
        r"`train_dataset` has 0 rows, but 1 prompts .* \(`generation_batch_size` 12 / 12 trajectories\).* Give more",
    ),
    "fewer rows than prompts": (
        {"train_dataset": prompts("a").select(range(7)), "per_device_train_batch_size": 96},
        ValueError,
        r"`train_dataset` has 7 rows, but 8 prompts .* lower `per_device_train_batch_size` or `steps_per_generation`",
    ),
    "image column": (
        {"train_dataset": prompts("a").add_column("image", ["b"] * 8)},
        ValueError,
        "Images are not supported in training: .* Remove the 'image'/'images' columns, or train .* GRPOTrainer",
    ),
    "image in the stream": (
        {"train_dataset": streamed(prompt="a", image="b")},
        ValueError,
        "Images are not supported",
    ),
    "image in a message": (
        {"train_dataset": prompts(IMAGE)},
        ValueError,
        "Images are not supported in training: .* Remove",
    ),
    **{
        f"column {name}": (
            {"train_dataset": tiny.questions(8).add_column(name, ["b"] * 8)},
            ValueError,
            f"`train_dataset` has a column '{name}', but .* Rename .* `dataset.rename_column\\('{name}', 'dataset_",
        )
        for name in ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
    },
    "column completions in the stream": (
        {"train_dataset": streamed(prompt="a", letter="a", completions="b")},
        ValueError,
        "`train_dataset` has a column 'completions', but reward functions get their `completions` from the trainer",
    ),
    "column completions for evaluation": (
        {"eval_dataset": {"held out": prompts("a").add_column("completions", ["b"] * 8)}, "eval_strategy": "epoch"},
        ValueError,
        "`eval_dataset` has a column 'completions', but reward functions get",
    ),
    "number as a prompt": ({"train_dataset": prompts(7)}, ValueError, "column 'prompt' .* holds 7; .*" + FOR_EXAMPLE),
    "missing prompt": ({"train_dataset": prompts(None)}, ValueError, "'prompt' .* holds None; .*" + FOR_EXAMPLE),
    "list of texts": ({"train_dataset": prompts(["a", "b"])}, ValueError, r"holds \['a', 'b'\]; .*" + FOR_EXAMPLE),
    "no messages": ({"train_dataset": prompts([])}, ValueError, r"'prompt' .* holds \[\]; .*" + FOR_EXAMPLE),
    "other message keys": (
        {"train_dataset": prompts([{"from": "user", "value": "a"}])},
        ValueError,
        r"holds \[\{'from': 'user', 'value': 'a'\}\]; .*" + FOR_EXAMPLE,
    ),
    "empty text": (
        {"train_dataset": prompts("")},
        ValueError,
        r"'prompt' of `train_dataset` is empty: .* `dataset.filter",
    ),
    "prompt beyond the model's positions": (
        {"train_dataset": prompts("x" * 300)},
        ValueError,
        "prompt has 300 tokens, .* `max_position_embeddings` of the model is 256. Drop rows with prompts of 256",
    ),
    "messages without a template": (
        {
            "train_dataset": tiny.questions(8, conversational=True),
            "processing_class": tokenizer(chat_template=None),
        },
        ValueError,
        r"holds chat messages, but the tokenizer \(no name\) has no chat template. Set one, .* `processing_class`; or",
    ),
    # reward functions
    "no reward function": (
        {"reward_funcs": []},
        ValueError,
        "`reward_funcs` is empty, .* `trl.rewards.accuracy_reward`",
    ),
    "reward left out": (
        {"reward_funcs": None},
        ValueError,
        "`reward_funcs` is empty, .* for example `trl.rewards.accuracy_reward`",
    ),
    "reward not callable": (
        {"reward_funcs": [tiny.even_length, 0.5]},
        TypeError,
        "`reward_funcs` holds 0.5, which cannot be called. Give a function, a model, the name of",
    ),
    "unknown reward model": (
        {"reward_funcs": "./no-such-judge"},
        FileNotFoundError,
        "`reward_funcs` names './no-such-judge', which is no folder here .* for example 'Qwen/Qwen3-1.7B-Base'",
    ),
    "unknown success reward": (
        {"success_reward": "accuracy"},
        ValueError,
        "`success_reward` is 'accuracy', which is not a reward function. Available: even_length, has_letter",
    ),
    "reward raises": (
        {"reward_funcs": [raises]},
        RewardFunctionError,
        r"(?s)'raises' raised KeyError: 'solution'.*for the prompt 'What is.*Original traceback.*raise KeyError",
    ),
    "reward needs another column": (
        {"reward_funcs": [needs_solution]},
        ValueError,
        r"'needs_solution' needs `solution`, but `train_dataset` has no such column \(it has: prompt, letter\)",
    ),
    "reward needs a column of the evaluation": (
        {
            "reward_funcs": [needs_solution],
            "train_dataset": tiny.questions(8).rename_column("letter", "solution"),
            "eval_dataset": tiny.questions(8),
            "eval_strategy": "epoch",
        },
        ValueError,
        "'needs_solution' needs `solution`, but `eval_dataset` has no such column",
    ),
    "columns are dropped": (
        {"reward_funcs": [tiny.has_letter], "remove_unused_columns": True},
        ValueError,
        "'has_letter' needs `letter`, which is a column of `train_dataset`, but `remove_unused_columns` is True",
    ),
    "reward needs the prompt": (
        {"reward_funcs": [needs_prompt]},
        ValueError,
        "'needs_prompt' needs `prompt`, but reward functions get lists: call the parameter `prompts`",
    ),
    "reward takes completions only": (
        {"reward_funcs": [takes_completions_only]},
        ValueError,
        r"'takes_completions_only' does not take `completion_ids`, .* `def takes_completions_only\(completions, \*\*",
    ),
    "reward takes a single text": (
        {"reward_funcs": [takes_text]},
        ValueError,
        "'takes_text' does not take `completion_ids`, but it is called with completion_ids, completions, ",
    ),
    "reward by a wrong name": (
        {"reward_funcs": "acuracy_reward"},
        ValueError,
        "`reward_funcs` holds 'acuracy_reward', which is the name of no function in trl.rewards .there are: accuracy_",
    ),
    **{
        f"{name} of TRL on text": (
            {"reward_funcs": [reward], "train_dataset": prompts("a").rename_column("letter", "solution")},
            ValueError,
            f"'{name}' of TRL reads chat messages, but the column 'prompt' holds text, .* `dataset.map",
        )
        for name, reward in (
            ("accuracy_reward", "accuracy_reward"),  # by its name, as on the command line
            ("think_format_reward", trl.rewards.think_format_reward),
            ("cosine_scaled_reward", trl.rewards.get_cosine_scaled_reward(max_len=32)),
        )
    },
    "reward for messages gets text": (
        {"reward_funcs": [reads_messages]},
        RewardFunctionError,
        r"(?s)'reads_messages' raised TypeError: .* Completions are text here, since prompts are: `completion`, not",
    ),
    "reward for text gets messages": (
        {"reward_funcs": [reads_text], "train_dataset": tiny.questions(8, conversational=True)},
        RewardFunctionError,
        r"(?s)'reads_text' raised AttributeError: .* lists of messages here, .*: `completion\[0\]\['content'\]` is",
    ),
    "reward returns nothing": (
        {"reward_funcs": [returns_nothing]},
        RewardFunctionError,
        "'returns_nothing' returned None; it must return a list with one number or None per completion",
    ),
    "reward returns verdicts in words": (
        {"reward_funcs": [returns_words]},
        RewardFunctionError,
        r"'returns_words' returned \['right', .*\]; it must return a list with one number or None per completion",
    ),
    "weights of another number": (
        {"reward_weights": [1.0]},
        ValueError,
        r"Number of reward weights \(1\) must match number of reward functions \(2\)",
    ),
    "reward too short": (
        {"reward_funcs": [short]},
        RewardFunctionError,
        "'short' returned 3 rewards, but 4 were expected: one per completion",
    ),
    "reward not a list": (
        {"reward_funcs": [scalar]},
        RewardFunctionError,
        "'scalar' returned 1.0; it must return a list",
    ),
    "reward infinite": (
        {"reward_funcs": [tiny.even_length, infinite]},
        RewardFunctionError,
        "'infinite' returned inf; a reward must be a finite number, or None where there is none",
    ),
    # models and tokenizers
    "no model": ({"model": None}, TypeError, "`model` is None; give the name of a model .* 'Qwen/Qwen3-1.7B-Base'"),
    "a class as model": (
        {"model": Qwen3ForCausalLM},
        TypeError,
        "`model` is <class '.*Qwen3ForCausalLM'>; give the name of a model on the Hub, .* or a loaded model",
    ),
    "settings of LoRA as a dict": (
        {"peft_config": {"r": 8}},
        TypeError,
        "`peft_config` must be a `peft.PeftConfig` instance .*, got dict",
    ),
    "name of a tokenizer": (
        {"processing_class": "gpt2"},
        TypeError,
        "`processing_class` must be either a `PreTrainedTokenizerBase` or a `ProcessorMixin`",
    ),
    "unknown model": (
        {"model": "/no/such/model"},
        FileNotFoundError,
        "`model` names '/no/such/model', which is no folder here .* for example 'Qwen/Qwen3-1.7B-Base'",
    ),
    "model without a tokenizer": (
        {"model": tiny.tiny_qwen3(tokenizer())},
        ValueError,
        "`model` is a Qwen3ForCausalLM that was not loaded .* Give it as `processing_class`",
    ),
    "model without a reference": (
        {"model": tiny.tiny_qwen3(tokenizer()), "processing_class": tokenizer(), "beta": 0.02},
        ValueError,
        "`beta` is 0.02, which needs a reference model, .* Save the model and give its path, or set `beta=0.0`",
    ),
    "no stop token": (
        {"processing_class": tokenizer(eos_token=None)},
        ValueError,
        "The tokenizer's `eos_token` is None, .* `tokenizer.eos_token = '<.endoftext.>'`, .* as `processing_class`",
    ),
    "neither stop nor padding token": (
        {"processing_class": tokenizer(eos_token=None, pad_token=None)},
        ValueError,
        "The tokenizer's `eos_token` is None, .* `tokenizer.eos_token = '<.endoftext.>'`, .* as `processing_class`",
    ),
    "another model's tokenizer": (
        {"processing_class": tokenizer(600), "train_dataset": prompts("数学")},
        ValueError,
        "A prompt holds the token id 3.., but the model has embeddings for 320 tokens. Give the model's own tokenizer",
    ),
}
ARGUMENTS = (
    "success_func",
    "peft_config",
    "model",
    "args",
    "train_dataset",
    "eval_dataset",
    "reward_funcs",
    "processing_class",
    "tools",
    "environment_factory",
    "rollout_func",
)


@pytest.mark.parametrize("overrides, error, message", ROWS.values(), ids=ROWS)
def test_wrong_input(model_path, config, overrides, error, message):
    """The config says it when it is made; else the trainer does, in its first step at the latest."""
    given = {name: overrides[name] for name in ARGUMENTS if name in overrides}
    fields = {name: value for name, value in overrides.items() if name not in given}
    with pytest.raises(error, match=message):
        IBTPOTrainer(
            **{
                "model": model_path,
                "reward_funcs": [tiny.even_length, tiny.has_letter],
                "args": config(**fields),
                "train_dataset": tiny.questions(8),
                **given,
            }
        ).train()


@pytest.mark.parametrize(
    "fields",
    [
        {"generation_kwargs": {"stop": ["</answer>", "Question:"]}, "step_delimiter": "\n\n", "use_vllm": True},
        {"generation_kwargs": {"presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0}, "use_vllm": True},
        {"generation_kwargs": {"presence_penalty": 1.0, "stop": "e!"}, "use_vllm": True, "branching": "independent"},
        {"generation_kwargs": {"no_repeat_ngram_size": 3, "repetition_penalty": 1.1}},
    ],
    ids=str,
)
def test_options_that_a_tree_can_use(config, fields):
    checks.refuse_unsupported("a/model", [tiny.even_length], config(**fields), tiny.questions(12), None, None, {})


def test_a_column_that_is_dropped_is_not_refused(config):
    data = tiny.questions(12).add_column("completions", ["b"] * 12)
    args = config(remove_unused_columns=True)
    checks.refuse_unsupported("a/model", [tiny.even_length], args, data, data, None, {})


def test_a_message_with_tool_calls_needs_no_content():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}
    prompt = [
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
    ]
    dataset_checks.check_rows([{"prompt": prompt}])


def test_one_row_is_not_a_list_of_rows():
    with pytest.raises(TypeError, match=r"`rows` is one row \(with prompt, letter\); give a list .* `\[row\]`"):
        dataset_checks.check_rows({"prompt": "What is 3 + 4?", "letter": "a"})
