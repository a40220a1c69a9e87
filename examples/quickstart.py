"""Train on a real task from an empty folder, in a few minutes and without a GPU or a network.

    python examples/quickstart.py          # or: make quickstart

What it does:

1. builds a tokenizer and a small Qwen3 on the spot; the task is `chain_sum` of reasoning-gym;
2. warms the model up with TRL's `SFTTrainer` on worked solutions whose steps are separated by blank lines, half of
   them by a careless writer, so that it is often wrong;
3. trains it with `IBTPOTrainer`: trees of the paper's shape, rewarded by reasoning-gym's own verifier. It finds out
   which way of working pays;
4. prints the accuracy on held-out questions before and after IB-TPO, draws the learning curve and one tree, and writes
   a page to look around in the trees that were grown on the way.

What it leaves out: chat templates, vLLM, LoRA, evaluation and checkpoints during training, several devices. A
pretrained model needs neither step 1 nor step 2.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm_steps", type=int, default=400, help="optimizer steps of the warm start")
    parser.add_argument("--steps", type=int, default=70, help="optimizer steps of IB-TPO")
    return parser.parse_args()


if __name__ == "__main__":  # before libraries are loaded, since what they say belongs into the log
    from stages import Stages

    options = parse_arguments()
    stages = Stages(options.output_dir / "log.txt")
    stages.start("Loading libraries")

import datasets
import reasoning_gym
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from trl_ibtpo import IBTPOConfig, IBTPOTrainer
from trl_ibtpo.viewing.drawing import draw_learning_curve, draw_tree
from trl_ibtpo.viewing.library import Library
from trl_ibtpo.viewing.page import write_page

SLIPS = 0.5  # share of the steps that the careless writer of worked solutions gets wrong
TREES_PER_STEP = 16
MAX_COMPLETION_LENGTH = 64  # five running sums and the answer take 35 to 60 tokens

# What both trainings share: a small model on a CPU, nothing saved, nothing reported.
PLAIN = {
    "output_dir": "outputs/quickstart",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


# ----- the task ------------------------------------------------------------------------------------------------------


def make_task(size: int, seed: int):
    """Sums and differences of 4 to 6 one-digit numbers: {'question', 'answer', 'metadata'} entries and a verifier."""
    return reasoning_gym.create_dataset(
        "chain_sum", size=size, seed=seed, min_terms=4, max_terms=6, min_digits=1, max_digits=1
    )


VERIFIER = make_task(size=1, seed=0)


def make_questions(seed: int) -> tuple[list[dict], list[dict]]:
    """500 held-out and about 25,000 training questions, all different."""
    entries = list({entry["question"]: entry for entry in make_task(size=27_500, seed=seed)}.values())
    return entries[:500], entries[500:]


def worked_solution(entry: dict, rng: random.Random) -> str:
    """One running sum per step, the answer last, by one of two writers: a tidy one, and one who leaves more room
    between the symbols than attention for the sum. A slip is carried on, as a person would."""
    tidy = rng.random() < 0.5
    equation = "{}{}{}={}" if tidy else "{} {} {} = {}"
    first, *rest = entry["metadata"]["expression"].split(" ")
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before, total = total, total + int(sign + term)
        if not tidy and rng.random() < SLIPS:
            total += rng.choice([-2, -1, 1, 2])
        steps.append(equation.format(before, sign, term, total))
    return "\n\n".join([*steps, f"Answer: {total}"])


def is_right(completion: str, entry: dict) -> bool:
    """Ask reasoning-gym. It gives part of the points to an answer that merely contains the right digits; we do not."""
    last_line = completion.strip().rsplit("\n", 1)[-1]
    return VERIFIER.score_answer(last_line.removeprefix("Answer: "), entry) == 1.0


def correctness_reward(completions: list[str], entry: list[str], **kwargs) -> list[float]:
    return [float(is_right(text, json.loads(row))) for text, row in zip(completions, entry, strict=True)]


# ----- the model -----------------------------------------------------------------------------------------------------


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit, and every blank line, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n\n|\d| ?[A-Za-z:]+|."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=512, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.7 million parameters with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,  # the usual 0.02 learns more slowly at this width
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def warm_start(
    entries: list[dict], seed: int, max_steps: int = 400, callbacks: list[TrainerCallback] | None = None
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Supervised training on worked solutions, after which a quarter to a half of the questions go well."""
    set_seed(seed)
    rng = random.Random(seed)
    rows = [{"prompt": entry["question"], "completion": worked_solution(entry, rng)} for entry in entries]
    tokenizer = build_tokenizer([row["prompt"] + row["completion"] for row in rows[:500]])
    model = build_model(tokenizer)
    args = SFTConfig(
        **PLAIN,
        max_steps=max_steps,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=50,
    )
    dataset = Dataset.from_list(rows)
    SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=callbacks).train()
    return model, tokenizer


@torch.inference_mode()
def accuracy(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    entries: list[dict],
    on_batch: Callable[[int, int], None] = lambda right, asked: None,
) -> float:
    """Share of questions answered right, one sample each from the policy as it is (temperature 1)."""
    model.eval()
    right, batch_size = 0, 100
    for start in range(0, len(entries), batch_size):
        batch = entries[start : start + batch_size]
        inputs = tokenizer([entry["question"] for entry in batch], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_COMPLETION_LENGTH,
            do_sample=True,
            temperature=1.0,
            top_k=0,
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(is_right(text, entry) for text, entry in zip(texts, batch, strict=True))
        on_batch(right, start + len(batch))
    return right / len(entries)


# ----- IB-TPO --------------------------------------------------------------------------------------------------------


def train_ibtpo(
    model, tokenizer, entries: list[dict], seed: int, max_steps: int, callbacks=None, output_dir=PLAIN["output_dir"]
) -> IBTPOTrainer:
    rows = [{"prompt": entry["question"], "entry": json.dumps(entry)} for entry in entries]
    args = IBTPOConfig(  # tree, ib_beta, ib_coef and loss are the paper's defaults
        **{**PLAIN, "output_dir": str(output_dir)},
        max_steps=max_steps,
        per_device_train_batch_size=12 * TREES_PER_STEP,
        max_completion_length=MAX_COMPLETION_LENGTH,
        learning_rate=1e-4,  # the paper's 1e-6 is for billions of parameters
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        temperature=1.0,  # the model is to become sure of itself, so train on what it really says
        top_p=1.0,
        top_k=0,
        beta=0.0,  # no reference model: a warm start of a minute is nothing to stay close to
        logging_steps=1,
        log_trees=5,  # what is recorded can be looked at while it trains: trl-ibtpo view --follow outputs/quickstart
        seed=seed,
    )
    trainer = IBTPOTrainer(
        model=model,
        reward_funcs=correctness_reward,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


class ShowSteps(TrainerCallback):
    """Moves the bar of a stage, and writes logged figures beside it."""

    def __init__(self, stages, **names: str):
        self.stages, self.names = stages, names

    def on_step_end(self, args, state, control, **kwargs):
        self.stages.update(state.global_step)

    def on_log(self, args, state, control, logs, **kwargs):
        if all(key in logs for key in self.names.values()):
            self.stages.update(**{name: f"{logs[key]:.2f}" for name, key in self.names.items()})


def main(options: argparse.Namespace, stages: "Stages") -> None:
    datasets.disable_progress_bars()  # those of single-second preparations

    def show_accuracy(right: int, asked: int) -> None:
        stages.update(asked, accuracy=f"{right / asked:.1%}")

    stages.start("Making questions")
    held_out, entries = make_questions(options.seed)
    stages.start("Warm start", options.warm_steps)
    loss = ShowSteps(stages, loss="loss")
    model, tokenizer = warm_start(entries, options.seed, options.warm_steps, [loss])
    stages.start("Accuracy before IB-TPO", len(held_out))
    before = accuracy(model, tokenizer, held_out, show_accuracy)
    stages.start("IB-TPO", options.steps)
    rates = ShowSteps(stages, reward="reward", effective="tree/effective_rate")
    set_seed(options.seed)
    trainer = train_ibtpo(model, tokenizer, entries, options.seed, options.steps, [rates], options.output_dir)
    stages.start("Accuracy after IB-TPO", len(held_out))
    after = accuracy(model, tokenizer, held_out, show_accuracy)

    stages.start("Pictures")
    curve, picture = options.output_dir / "learning_curve.png", options.output_dir / "tree.png"
    page = options.output_dir / "trees.html"
    write_page(Library([options.output_dir]), page)
    logs = [entry for entry in trainer.state.log_history if "tree/generated_tokens" in entry]
    draw_learning_curve(logs, curve, held_out=(before, after))
    # Of a few trees, the one that shows most: nearest to as many right as wrong answers.
    rows = [{"prompt": entry["question"], "entry": json.dumps(entry)} for entry in held_out[:32]]
    grown, row = min(
        zip(trainer.grow_trees(rows), rows, strict=True), key=lambda pair: abs(sum(pair[0].tree.success) / 12 - 0.5)
    )
    draw_tree(grown, picture, title=row["prompt"], decode=tokenizer.decode)

    generated, trajectories = (
        TREES_PER_STEP * sum(entry[f"tree/{kind}_tokens"] for entry in logs) for kind in ("generated", "trajectory")
    )
    stages.show(
        "What IB-TPO has learned",
        {
            "Held-out accuracy before": f"{before:.1%}",
            "Held-out accuracy after": f"{after:.1%} ({100 * (after - before):+.1f} points)",
            "Tokens generated": f"{generated:,.0f}",
            "Tokens of trajectories": f"{trajectories:,.0f}, a shared prefix counted for each",
            "Time": f"{(time.perf_counter() - stages.begin) / 60:.1f} minutes",
            "Learning curve": str(curve),
            "One tree": str(picture),
            "Log": str(stages.log),
        },
    )
    stages.console.print(f"See where the trees branched, and why. Open in a browser: {page}", soft_wrap=True)


if __name__ == "__main__":
    main(options, stages)
