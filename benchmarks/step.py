"""A whole optimizer step: generation, rewards and training, of IB-TPO and of TRL's GRPO on the same questions.

    python -m benchmarks.step [--quick] [--json FILE]

Real trainers on one real vLLM engine, with the same model, questions, sampling and number of questions per step; a
micro-batch holds one question. `grpo` is TRL's GRPOTrainer, `ibtpo` the paper's tree (4, 9, 1, 1) without and with
`branch_lookahead`, `ibtpo_unpacked` the same with TRL's forward. `independent_8_shared` is eight completions without
a tree, as TRL's, and with the prefix-shared forward: `grpo` to it is what sharing saves, and it to `ibtpo` what trees
cost (`ratio_to_independent`; a tree of 12 is to take no longer). The task is the quickstart's with longer sums. The
model was shown worked solutions for long enough to write whole ones of its own, right or wrong; rewards cost nothing.
"""

import os
import random
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import reasoning_gym
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Qwen3ForCausalLM, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from benchmarks import common
from benchmarks.trainer_pair import FLAT, TREE, make_trainers, start_over
from examples import quickstart

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29513")

PROMPT_TOKENS = 160  # of the longest sums, and some more


@dataclass
class Method:
    name: str
    group_size: int
    lookahead: int = 0
    packed: bool = True
    growth: dict | None = None  # settings of the tree that differ from the trainer's


METHODS = [
    Method("grpo", 8),
    Method("grpo", 12),
    Method("independent_8_shared", 8, growth=FLAT),
    Method("ibtpo", 12),
    Method("ibtpo", 12, lookahead=3),
    Method("ibtpo", 12, lookahead=8),
    Method("ibtpo_unpacked", 12, lookahead=3, packed=False),
]


class Stopwatch(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.begin)


def reward(completion_ids, **kwargs) -> list[float]:
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def warm_model(layers: int, hidden: int, entries: list[dict], steps: int) -> str:
    """A model that writes worked solutions, in a folder with its tokenizer."""
    set_seed(0)
    path, rng = tempfile.mkdtemp(), random.Random(0)
    rows = [{"prompt": entry["question"], "completion": quickstart.worked_solution(entry, rng)} for entry in entries]
    tokenizer = quickstart.build_tokenizer([row["prompt"] + row["completion"] for row in rows[:500]])
    config = common.qwen3_config(
        layers, hidden, len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    args = SFTConfig(
        **{**quickstart.PLAIN, "output_dir": tempfile.mkdtemp(), "use_cpu": not torch.cuda.is_available()},
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3 * min(1.0, 256 / hidden),  # a wide model diverges at the rate of a narrow one
        warmup_steps=min(10, steps),
        lr_scheduler_type="cosine",
        logging_steps=50,
    )
    model = Qwen3ForCausalLM(config)
    SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(trainer, method: Method, seed: int) -> dict[str, float]:
    """Two optimizer steps, of which the second is measured."""
    args, questions = trainer.args, trainer.args.gradient_accumulation_steps
    start_over(trainer, method.group_size, seed)
    if method.name != "grpo":
        for name, value in (TREE | (method.growth or {})).items():
            setattr(args, name, value)
        args.branch_lookahead, trainer._packed_forward = method.lookahead, method.packed
    watch = Stopwatch()
    trainer.add_callback(watch)
    trainer.train()
    trainer.remove_callback(watch)
    last = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry][-1]
    trajectory_tokens = last["completions/mean_length"] * method.group_size
    return {
        "seconds_per_step": watch.seconds[-1],
        "generated_tokens": questions * last.get("tree/generated_tokens", trajectory_tokens),
        "trajectory_tokens": questions * trajectory_tokens,
    }


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=4)
    arguments.add_argument("--questions", type=int, default=8, help="per optimizer step")
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--hidden", type=int, default=256)
    names = list(dict.fromkeys(method.name for method in METHODS))
    arguments.add_argument("--methods", nargs="+", choices=names, default=names, help="besides the two rivals")
    arguments.add_argument("--lookahead", type=int, nargs="+", default=[0, 3, 8], help="of `ibtpo`")
    arguments.add_argument("--warm-steps", type=int, default=150, help="supervised steps before the measurement")
    arguments.add_argument("--max-length", type=int, default=384, help="tokens of a completion")
    args = arguments.parse_args()
    if args.quick:
        os.environ["VLLM_CPU_CI_ENV"] = "1"
        args.repeats, args.questions, args.layers, args.hidden, args.max_length = 1, 2, 1, 128, 24
        args.warm_steps = 2
    entries = list(
        reasoning_gym.create_dataset(
            "chain_sum", size=4096, seed=0, min_terms=8, max_terms=24, min_digits=1, max_digits=1
        )
    )
    dataset = Dataset.from_list([{"prompt": entry["question"]} for entry in entries])
    path = warm_model(args.layers, args.hidden, entries, args.warm_steps)
    grpo, ibtpo = make_trainers(
        path,
        reward,
        dataset,
        args.questions,
        max_steps=2,
        max_completion_length=args.max_length,
        vllm_max_model_length=PROMPT_TOKENS + args.max_length,
    )
    rivals = {"ratio_to_grpo8": METHODS[0], "ratio_to_independent": METHODS[2]}
    methods = [method for method in METHODS if method in rivals.values() or method.name in args.methods]
    methods = [method for method in methods if method.name != "ibtpo" or method.lookahead in args.lookahead]
    runs: list[list[dict]] = [[] for _ in methods]
    with tqdm(total=args.repeats * len(methods), unit="run") as progress:
        for repeat in range(args.repeats):  # interleaved: every repeat measures every method
            for index, method in enumerate(methods):
                progress.set_description(f"{method.name} {method.group_size} {method.lookahead}")
                runs[index].append(run(grpo if method.name == "grpo" else ibtpo, method, seed=repeat))
                progress.update()
    rows = []
    for index, method in enumerate(methods):
        row = {"method": method.name, "group_size": method.group_size, "lookahead": method.lookahead}
        row |= {key: float(np.mean([each[key] for each in runs[index]])) for key in runs[index][0]}
        for key, rival in rivals.items():
            ratios = [
                mine["seconds_per_step"] / base["seconds_per_step"]
                for mine, base in zip(runs[index], runs[methods.index(rival)], strict=True)
            ]
            row[key], row[f"{key}_se"] = common.mean_and_error(ratios)
        rows.append(row)
    common.report(f"One optimizer step of {args.questions} questions", rows, args)


if __name__ == "__main__":
    main()
