"""Train a model to use a calculator with IB-TPO: sums of reasoning-gym, a tool, and trees over turns.

One GPU, vLLM beside the training in the same process (no dataset is downloaded, questions are made on the spot):

    python examples/ibtpo_calculator.py --config examples/recipes/agent_qwen3_0.6b.yaml

Several GPUs, each with its own vLLM engine:

    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/ibtpo_calculator.py \
        --config examples/recipes/agent_qwen3_0.6b.yaml

Every field of IBTPOConfig and ModelConfig is a flag; LoRA is `--use_peft True --lora_target_modules all-linear`. The
model's chat template must render tools, as that of Qwen3 does. docs/agents.md explains what trees do with turns.
"""

import ast
import operator
from dataclasses import dataclass, field

import reasoning_gym
from datasets import Dataset
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_ibtpo import IBTPOConfig, IBTPOTrainer

OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def calculate(expression: str) -> str:
    """
    Calculate the value of an arithmetic expression.

    Args:
        expression: Numbers, parentheses and the operators + - * /, for example "12 * (3 + 4)".
    """
    if len(expression) > 200:
        raise ValueError("the expression is too long")
    value = value_of(ast.parse(expression, mode="eval").body)
    return str(int(value)) if value == int(value) else str(value)


def value_of(node: ast.AST) -> float:
    """The value of a parsed expression. There is no power: one of huge numbers would hold up the whole process."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](value_of(node.left), value_of(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](value_of(node.operand))
    raise ValueError("only numbers, parentheses and + - * / are allowed")


def right_answer(completions, answer, **kwargs) -> list[float]:
    """1 where the last turn ends with the answer."""
    said = [completion[-1]["content"].strip().rstrip(".").split() for completion in completions]
    return [float(bool(words) and words[-1] == right) for words, right in zip(said, answer, strict=True)]


@dataclass
class TaskArguments:
    """How long the sums are."""

    task_size: int = field(default=10_000, metadata={"help": "Training questions."})
    terms: int = field(default=6, metadata={"help": "Terms of a sum."})
    digits: int = field(default=4, metadata={"help": "Digits of a term."})


def main(task_args: TaskArguments, training_args: IBTPOConfig, model_args: ModelConfig) -> None:
    task = reasoning_gym.create_dataset(
        "chain_sum",
        size=task_args.task_size,
        seed=0,
        min_terms=task_args.terms,
        max_terms=task_args.terms,
        min_digits=task_args.digits,
        max_digits=task_args.digits,
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{entry['question']} End with the number alone."}],
            "answer": entry["answer"],
        }
        for entry in task
    ]
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = IBTPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=right_answer,
        args=training_args,
        train_dataset=Dataset.from_list(rows),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        tools=[calculate],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((TaskArguments, IBTPOConfig, ModelConfig)).parse_args_and_config())
