"""Train on a task of reasoning-gym with IB-TPO; the task's own verifier is the reward.

One GPU, vLLM beside the training in the same process (no dataset is downloaded, questions are made on the spot):

    python examples/ibtpo_gsm.py --model_name_or_path Qwen/Qwen3-0.6B-Base --task gsm_symbolic --task_size 10000 \
        --use_vllm True --vllm_max_model_length 4096 --per_device_train_batch_size 12 --gradient_accumulation_steps 16

Several GPUs, each with its own vLLM engine:

    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/ibtpo_gsm.py \
        --model_name_or_path Qwen/Qwen3-0.6B-Base --task gsm_symbolic --use_vllm True --vllm_max_model_length 4096

A vLLM server on one GPU, the training on another:

    CUDA_VISIBLE_DEVICES=0 VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen3-0.6B-Base --max-model-len 4096 \
        --weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs
    CUDA_VISIBLE_DEVICES=1 python examples/ibtpo_gsm.py --model_name_or_path Qwen/Qwen3-0.6B-Base \
        --task gsm_symbolic --use_vllm True --vllm_mode server

A harder task, with settings of its own:

    python examples/ibtpo_gsm.py --model_name_or_path models/qwen3 --task chain_sum \
        --task_settings '{"min_terms": 6, "max_terms": 10, "max_digits": 3}'

Every field of IBTPOConfig and ModelConfig is a flag; LoRA is `--use_peft True --lora_target_modules all-linear`.
"""

import json
from dataclasses import dataclass, field

import reasoning_gym
from datasets import Dataset
from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_ibtpo import IBTPOConfig, IBTPOTrainer


@dataclass
class TaskArguments:
    """A task of reasoning-gym, by name."""

    task: str = field(default="chain_sum", metadata={"help": "Name of a reasoning-gym dataset."})
    task_size: int = field(default=10_000, metadata={"help": "Training questions."})
    task_eval_size: int = field(default=200, metadata={"help": "Further questions, used if `eval_strategy` is set."})
    task_seed: int = field(default=0, metadata={"help": "Seed of the questions."})
    task_settings: dict | str | None = field(
        default=None, metadata={"help": "The task's own settings, as JSON on the command line."}
    )

    def __post_init__(self):
        if isinstance(self.task_settings, str):
            self.task_settings = json.loads(self.task_settings)
        self.task_settings = self.task_settings or {}


def main(task_args: TaskArguments, training_args: IBTPOConfig, model_args: ModelConfig) -> None:
    evaluate = training_args.eval_strategy != "no"
    size = task_args.task_size + (task_args.task_eval_size if evaluate else 0)
    task = reasoning_gym.create_dataset(task_args.task, size=size, seed=task_args.task_seed, **task_args.task_settings)
    entries = [task[index] for index in range(size)]

    def verifier(completions, index, **kwargs) -> list[float]:
        """What the task says of the text between the last <answer> tags: 1 if right, less if partly or not."""
        answers = [extract_answer(completion[0]["content"]) for completion in completions]
        return [task.score_answer(answer, entries[i]) for answer, i in zip(answers, index, strict=True)]

    system = {"role": "system", "content": SYSTEM_PROMPTS["simple"]}
    questions = Dataset.from_dict(
        {
            "prompt": [[system, {"role": "user", "content": entry["question"]}] for entry in entries],
            "index": range(size),
        }
    )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = IBTPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=verifier,
        args=training_args,
        train_dataset=questions.select(range(task_args.task_size)),
        eval_dataset=questions.select(range(task_args.task_size, size)) if evaluate else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*TrlParser((TaskArguments, IBTPOConfig, ModelConfig)).parse_args_and_config())
