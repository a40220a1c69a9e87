"""Two processes of `test_hub.py` that talk to the hub at HF_ENDPOINT: one trains and pushes, one loads by name.

    python tests/hub_client.py train FOLDER
    python tests/hub_client.py load FOLDER

FOLDER passes the trained weights from one to the other, so that the hub's can be compared with them.
"""

import json
import sys
from pathlib import Path

import tiny
import torch
from huggingface_hub import ModelCard, snapshot_download
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ibtpo import IBTPOConfig, IBTPOTrainer

BASE, MODEL, ADAPTER, CHECKPOINT = (f"tester/tiny-{name}" for name in ("base", "model", "adapter", "checkpoint"))


def make_trainer(output_dir: Path, **overrides) -> IBTPOTrainer:
    peft_config = overrides.pop("peft_config", None)
    args = {**tiny.FAST, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, **overrides}
    config = IBTPOConfig(str(output_dir), **args)
    return IBTPOTrainer(BASE, tiny.even_length, config, tiny.questions(), peft_config=peft_config)


def push(repo: str, hub_strategy: str, folder: Path, **overrides) -> IBTPOTrainer:
    trainer = make_trainer(
        folder / "runs" / repo,
        push_to_hub=True,
        hub_model_id=repo,
        hub_strategy=hub_strategy,
        hub_always_push=True,  # or a push is left out while the last one is under way
        **overrides,
    )
    trainer.train()
    weights = (
        trainer.model.state_dict() if "peft_config" not in overrides else get_peft_model_state_dict(trainer.model)
    )
    save_file({name: weight.clone() for name, weight in weights.items()}, folder / f"{Path(repo).name}.safetensors")
    return trainer


def train(folder: Path) -> None:
    tokenizer = tiny.byte_level_tokenizer()
    tiny.tiny_qwen3(tokenizer).push_to_hub(BASE)
    tokenizer.push_to_hub(BASE)
    push(MODEL, "every_save", folder)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trained = push(ADAPTER, "every_save", folder, peft_config=lora)
    trained.push_to_hub(dataset_name=str(folder))  # which no card may name
    push(CHECKPOINT, "checkpoint", folder)


def same(weights: dict[str, torch.Tensor], repo: str, folder: Path) -> bool:
    trained = load_file(folder / f"{Path(repo).name}.safetensors")
    return trained.keys() == weights.keys() and all(torch.equal(trained[name], weights[name]) for name in trained)


def load(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(BASE).state_dict()
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    adapted = AutoPeftModelForCausalLM.from_pretrained(ADAPTER)
    kept = AutoModelForCausalLM.from_pretrained(CHECKPOINT, subfolder="last-checkpoint")
    prompt = AutoTokenizer.from_pretrained(ADAPTER)("What is 3 + 4?", return_tensors="pt")
    generated = adapted.generate(**prompt, max_new_tokens=4, do_sample=False)
    last = snapshot_download(CHECKPOINT, allow_patterns="last-checkpoint/*")
    resumed = make_trainer(folder / "resumed", max_steps=3)
    resumed.train(resume_from_checkpoint=f"{last}/last-checkpoint")
    findings = {
        "model": same(model.state_dict(), MODEL, folder),
        "adapter": same(get_peft_model_state_dict(adapted), ADAPTER, folder),
        "checkpoint": same(kept.state_dict(), CHECKPOINT, folder),
        "untrained": same(base, MODEL, folder),
        "generated": generated.shape[1] - prompt["input_ids"].shape[1],
        "resumed": [log["step"] for log in resumed.state.log_history if "loss" in log],
        "cards": {repo: ModelCard.load(repo).data.to_dict() for repo in (MODEL, ADAPTER, CHECKPOINT)},
    }
    (folder / "findings.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    {"train": train, "load": load}[sys.argv[1]](Path(sys.argv[2]))
