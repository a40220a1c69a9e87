"""A whole optimizer step: generation, rewards and training, of IB-TPO and of TRL's GRPO on the same questions.

    python -m benchmarks.step [--quick] [--json FILE]

Real trainers on one real vLLM engine, with the same model, questions, sampling and number of questions per step; a
micro-batch holds one question. `grpo` is TRL's GRPOTrainer, `ibtpo` the paper's tree (4, 9, 1, 1) without and with
`branch_lookahead`, `ibtpo_unpacked` the same with TRL's forward. The model is random, so that completions end where
chance lets them; rewards cost nothing.
"""

import copy
import os
import random
import tempfile
import time
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks import common
from trl_ibtpo import IBTPOConfig, IBTPOTrainer
from trl_ibtpo.engines.vllm import runs_on_cpu

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29513")


@dataclass
class Method:
    name: str
    group_size: int
    lookahead: int = 0
    packed: bool = True


METHODS = [
    Method("grpo", 8),
    Method("grpo", 12),
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


def save_model(layers: int, hidden: int) -> str:
    import tiny

    path, tokenizer = tempfile.mkdtemp(), tiny.byte_level_tokenizer()
    config = common.qwen3_config(
        layers, hidden, len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_trainers(path: str, questions: int, max_length: int, dataset: Dataset) -> tuple[GRPOTrainer, IBTPOTrainer]:
    """A trainer of either kind; both generate with the engine that the second has started."""
    arguments = {
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": questions,
        "max_steps": 2,
        "max_completion_length": max_length,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "beta": 0.0,
        "loss_type": "grpo",
        "vllm_mode": "colocate",
        "vllm_max_model_length": 128 + max_length,
        "vllm_importance_sampling_mode": "token_truncate",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": runs_on_cpu(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    delimiter = "e"  # random weights write no blank lines
    args = IBTPOConfig(tempfile.mkdtemp(), **arguments, use_vllm=True, step_delimiter=delimiter)
    ibtpo = IBTPOTrainer(path, reward, args, dataset)
    grpo = GRPOTrainer(path, reward, GRPOConfig(tempfile.mkdtemp(), **arguments, num_generations=12), dataset)
    # A second engine would take its share of the memory, and half a minute to start.
    grpo.use_vllm, grpo.vllm_generation = True, copy.copy(ibtpo.vllm_generation)
    grpo.vllm_generation.model, grpo.vllm_generation.accelerator = grpo.model, grpo.accelerator
    return grpo, ibtpo


def run(trainer, method: Method, seed: int) -> dict[str, float]:
    """Two optimizer steps, of which the second is measured."""
    args, questions = trainer.args, trainer.args.gradient_accumulation_steps
    args.seed = seed
    if method.name == "grpo":
        trainer.num_generations = args.num_generations = args.per_device_train_batch_size = method.group_size
        args.generation_batch_size = questions * method.group_size
        trainer._train_batch_size = method.group_size
    else:
        args.branch_lookahead, trainer._packed_forward = method.lookahead, method.packed
    trainer._last_loaded_step = -1  # a new run: the weights are pushed to vLLM again
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
    arguments.add_argument("--max-length", type=int, default=384, help="tokens of a completion")
    args = arguments.parse_args()
    if args.quick:
        os.environ["VLLM_CPU_CI_ENV"] = "1"
        args.repeats, args.questions, args.layers, args.hidden, args.max_length = 1, 2, 1, 128, 24
    rng = random.Random(0)
    dataset = Dataset.from_list(
        [{"prompt": " ".join(f"What is {rng.randint(1, 9)} + {rng.randint(1, 9)}?" for _ in range(4))}] * 64
    )
    path = save_model(args.layers, args.hidden)
    grpo, ibtpo = make_trainers(path, args.questions, args.max_length, dataset)
    runs: list[list[dict]] = [[] for _ in METHODS]
    with tqdm(total=args.repeats * len(METHODS), unit="run") as progress:
        for repeat in range(args.repeats):  # interleaved: every repeat measures every method
            for index, method in enumerate(METHODS):
                progress.set_description(f"{method.name} {method.group_size} {method.lookahead}")
                runs[index].append(run(grpo if method.name == "grpo" else ibtpo, method, seed=repeat))
                progress.update()
    rows = []
    for index, method in enumerate(METHODS):
        row = {"method": method.name, "group_size": method.group_size, "lookahead": method.lookahead}
        row |= {key: float(np.mean([each[key] for each in runs[index]])) for key in runs[index][0]}
        ratios = [
            mine["seconds_per_step"] / base["seconds_per_step"]
            for mine, base in zip(*(runs[index], runs[0]), strict=True)
        ]
        row["ratio_to_grpo8"], row["ratio_to_grpo8_se"] = common.mean_and_error(ratios)
        rows.append(row)
    common.report(f"One optimizer step of {args.questions} questions", rows, args.json)


if __name__ == "__main__":
    main()
