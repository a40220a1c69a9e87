"""Train on a math dataset with IB-TPO: the final answer is checked by math-verify.

One GPU, vLLM beside the training in the same process:

    python examples/ibtpo_math.py --config examples/recipes/qwen3_1.7b_ibtpo.yaml

Eight GPUs, each with its own vLLM engine (`multi_gpu.yaml`, `deepspeed_zero2.yaml` and `fsdp2.yaml` go likewise):

    accelerate launch --config_file examples/accelerate_configs/deepspeed_zero3.yaml \
        examples/ibtpo_math.py --config examples/recipes/qwen3_8b_ibtpo.yaml

A vLLM server on one GPU, the training on another:

    CUDA_VISIBLE_DEVICES=0 VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen3-1.7B-Base --max-model-len 4096 \
        --weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs
    CUDA_VISIBLE_DEVICES=1 python examples/ibtpo_math.py --config examples/recipes/qwen3_1.7b_ibtpo.yaml \
        --vllm_mode server

Without a network, from two folders: a saved model, and JSONL or Parquet files with questions and answers:

    python examples/ibtpo_math.py --config examples/recipes/qwen3_1.7b_ibtpo.yaml \
        --model_name_or_path models/qwen3 --dataset_name data/my_math --dataset_config default

Every field of IBTPOConfig, ModelConfig and ScriptArguments is a flag, and a flag wins over the recipe.
"""

import re

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.rewards import accuracy_reward

from trl_ibtpo import IBTPOConfig, IBTPOTrainer

# DAPO-Math-17K, each question once; the original repeats every question about a hundred times.
DAPO_MATH_17K = ("open-r1/DAPO-Math-17k-Processed", "all")
# DAPO's own instruction asks for a last line "Answer: 34", which math-verify does not read as an answer.
DAPO_PROMPT = re.compile(
    r'Solve the following math problem step by step\..*?\n\n(.*)\n\nRemember to put your answer .*"Answer:"\.?', re.S
)
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def to_conversation(row: dict) -> dict:
    r"""One row of any of the usual math datasets to `{"prompt": messages, "solution": text}`.

    The question is `prompt`, `problem` or `question` (text or messages) and gets an instruction to box the answer. The
    answer is `answer`, `solution` or `reward_model["ground_truth"]`; of GSM8K's, what follows `####`. A bare answer is
    boxed, since math-verify reads `3\sqrt{2}` outside of LaTeX as 3. Where it cannot read the answer at all,
    `accuracy_reward` returns None and the question does not train.
    """
    question = next((row[name] for name in ("prompt", "problem", "question") if row.get(name)), None)
    answers = (row.get("answer"), row.get("solution"), (row.get("reward_model") or {}).get("ground_truth"))
    answer = next((str(value) for value in answers if value not in (None, "")), None)
    if question is None or answer is None:
        raise ValueError(
            f"A row has no {'question' if question is None else 'answer'}. Its columns: {', '.join(row)}. Needed: "
            "`prompt`, `problem` or `question`, and `answer`, `solution` or `reward_model` with a `ground_truth`."
        )
    *before, last = [{"role": "user", "content": question}] if isinstance(question, str) else question
    text = last["content"].strip()
    dapo = DAPO_PROMPT.fullmatch(text)
    text = dapo.group(1) if dapo else text
    if "\\boxed" not in text:
        text = f"{text}\n\n{INSTRUCTION}"
    answer = answer.split("####")[-1].strip()
    if not any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\[", "\n")):
        answer = f"\\boxed{{{answer}}}"
    return {"prompt": [*before, {**last, "content": text}], "solution": answer}


def load_math_questions(script_args: ScriptArguments, split: str):
    """A split of `dataset_name`, a name on the Hub or a folder of JSONL or Parquet files, as conversations."""
    name, config = script_args.dataset_name, script_args.dataset_config
    if name is None:
        name, config = DAPO_MATH_17K
    dataset = load_dataset(name, name=config, split=split, streaming=script_args.dataset_streaming)
    return dataset.map(to_conversation, remove_columns=dataset.column_names)


def main(script_args: ScriptArguments, training_args: IBTPOConfig, model_args: ModelConfig) -> None:
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    evaluate = training_args.eval_strategy != "no"
    trainer = IBTPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=accuracy_reward,
        args=training_args,
        train_dataset=load_math_questions(script_args, script_args.dataset_train_split),
        eval_dataset=load_math_questions(script_args, script_args.dataset_test_split) if evaluate else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, IBTPOConfig, ModelConfig)).parse_args_and_config())
