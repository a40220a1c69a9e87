"""Train a LoRA adapter with IB-TPO on one GPU of 16 to 24 GB; the data and the reward are those of ibtpo_math.py.

LoRA, 24 GB, vLLM in the same process:

    python examples/ibtpo_lora.py --config examples/recipes/lora_24gb.yaml

QLoRA, 16 GB: the base model in 4 bits (bitsandbytes), rollouts with transformers:

    python examples/ibtpo_lora.py --config examples/recipes/qlora_16gb.yaml

Several GPUs, and a vLLM server on a GPU of its own:

    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml --num_processes 2 \
        examples/ibtpo_lora.py --config examples/recipes/lora_24gb.yaml

    CUDA_VISIBLE_DEVICES=0 VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen3-1.7B-Base --max-model-len 4096 \
        --weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs
    CUDA_VISIBLE_DEVICES=1 python examples/ibtpo_lora.py --config examples/recipes/lora_24gb.yaml --vllm_mode server

Use the adapter, or merge it into the base model:

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-1.7B-Base")
    model = PeftModel.from_pretrained(model, "Qwen3-1.7B-IBTPO-LoRA")
    model.merge_and_unload().save_pretrained("Qwen3-1.7B-IBTPO-merged")
    AutoTokenizer.from_pretrained("Qwen3-1.7B-IBTPO-LoRA").save_pretrained("Qwen3-1.7B-IBTPO-merged")

Every field of IBTPOConfig, ModelConfig and ScriptArguments is a flag, and a flag wins over the recipe.
"""

from ibtpo_math import load_math_questions
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.rewards import accuracy_reward

from trl_ibtpo import IBTPOConfig, IBTPOTrainer


def main(script_args: ScriptArguments, training_args: IBTPOConfig, model_args: ModelConfig) -> None:
    if not model_args.use_peft:
        raise ValueError("`use_peft` is False, but this script trains an adapter. Use ibtpo_math.py for full weights.")
    if training_args.use_vllm and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise ValueError(
            "`use_vllm` is True and the base model is quantized. TRL would merge the adapter into the quantized "
            "weights for vLLM, which rounds it (huggingface/trl issues 3466 and 4973). Set `use_vllm` to False, or "
            "`load_in_4bit` and `load_in_8bit` to False."
        )
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
    if trainer.accelerator.is_main_process:
        trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)  # the adapter alone
    trainer.accelerator.print(f"Adapter saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def make_parser() -> TrlParser:
    """Defaults of an adapter: every linear layer, the base model in bfloat16, ten times the paper's learning rate."""
    parser = TrlParser((ScriptArguments, IBTPOConfig, ModelConfig))
    # Dropout would make the policy that is trained another one than the policy that was sampled.
    parser.set_defaults(use_peft=True, lora_target_modules=["all-linear"], lora_dropout=0.0)
    parser.set_defaults(dtype="bfloat16", learning_rate=1e-5)
    return parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
