"""Whether a recipe of `examples/recipes` fits a GPU and how long its steps take, without downloading anything.

    python -m benchmarks.recipes [--recipes qwen3_1.7b_ibtpo ...] [--set vllm_gpu_memory_utilization=0.12 ...]

The recipe's own fields are parsed as its script parses them, and train a model of the size that it names, with random
weights and a vocabulary as large, on questions of random words. Random weights seldom stop, so completions are as long
as the recipe allows: the worst case for memory. They write no blank lines, so steps have a fixed number of tokens, and
rewards are drawn from a hash of the completion, so that every question trains.

`batch_seconds` is the time of a generation batch: trees, rewards, and log-probabilities of the reference model where
the recipe has one; `training_seconds` the rest of the optimizer step. `peak_gib` is the most memory that the first
GPU's driver reports while the run goes on, whatever holds it; `training_gib` the peak of torch's allocator after the
last generation, with what vLLM keeps in it. Each recipe runs in a process of its own.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from benchmarks import common

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
QUESTIONS, WORDS = 64, 60
STEP_TOKENS = 64


def random_questions():
    from datasets import Dataset

    rng = random.Random(0)
    texts = [" ".join(str(rng.randrange(100)) for _ in range(WORDS)) for _ in range(QUESTIONS)]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts])


def coin(completions, **kwargs) -> list[float]:
    """1 for half of all completions, as a hash of the text decides."""
    return [float(zlib.crc32(completion[0]["content"].encode()) % 2) for completion in completions]


def parse(recipe: str, settings: list[str], folder: str) -> tuple[Any, Any]:
    """A recipe's `IBTPOConfig` and `ModelConfig`, with what a run of two steps changes."""
    from trl import ModelConfig, ScriptArguments, TrlParser

    from trl_ibtpo import IBTPOConfig

    flags = ["--config", str(RECIPES / f"{recipe}.yaml"), "--output_dir", folder, "--save_strategy", "no"]
    flags += ["--max_steps", "2", "--report_to", "none", "--log_completions", "False"]
    flags += ["--step_min_tokens", str(STEP_TOKENS), "--step_max_tokens", str(STEP_TOKENS)]
    for setting in settings:
        name, value = setting.split("=", 1)
        flags += [f"--{name}", value]
    parser = TrlParser((ScriptArguments, IBTPOConfig, ModelConfig))
    _, args, model_args = parser.parse_args_and_config(flags)
    return args, model_args


def train(recipe: str, settings: list[str], layers: int | None, vocabulary: int) -> dict[str, Any]:
    """Train two optimizer steps of a recipe, and say what the second took."""
    import torch
    from transformers import TrainerCallback
    from trl import get_peft_config, get_quantization_config

    from benchmarks import sizes
    from trl_ibtpo import IBTPOTrainer

    on_gpu = torch.cuda.is_available()

    class Timed(IBTPOTrainer):
        def _generate_and_score_completions(self, inputs):
            begin = time.perf_counter()
            outputs = super()._generate_and_score_completions(inputs)
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.batch_seconds = time.perf_counter() - begin
            return outputs

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.begin = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if on_gpu:
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.begin

    folder = tempfile.mkdtemp()
    args, model_args = parse(recipe, settings, folder)
    if model_args.model_name_or_path not in sizes.SIZES:
        raise SystemExit(
            f"{recipe}.yaml trains {model_args.model_name_or_path}, whose size is not known here. Known: "
            f"{', '.join(sizes.SIZES)}."
        )
    path = sizes.save_random(f"{folder}/model", model_args.model_name_or_path, layers, vocabulary)
    loading = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    args.model_init_kwargs = {**loading, **(args.model_init_kwargs or {})}
    options = {"quantization_config": get_quantization_config(model_args), "peft_config": get_peft_config(model_args)}
    trainer, watch = Timed(path, coin, args, random_questions(), **options), Watch()
    trainer.add_callback(watch)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "tree/generated_tokens" in entry][-1]
    trees = args.generation_batch_size // trainer.num_generations
    return {
        "recipe": recipe,
        "forward": trainer._forward_in_words(),
        "trees": trees,
        "leaves": trainer.num_generations,
        "mean_length": logged["completions/mean_length"],
        "generated_tokens": trees * logged["tree/generated_tokens"],
        "depth": logged["tree/depth"],
        "effective_rate": logged["tree/effective_rate"],
        "grad_norm": logged["grad_norm"],
        "batch_seconds": trainer.batch_seconds,
        "training_seconds": watch.seconds - trainer.batch_seconds,
        "training_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
    }


def watched(command: list[str]) -> float:
    """Run a command to its end; the most memory of the first GPU meanwhile, in GiB, 0 without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception as error:  # no library, no driver or no GPU
        print(f"No GPU to watch ({error}).")
        handle = None
    process, peak = subprocess.Popen(command), 0
    while process.poll() is None:
        if handle is not None:
            peak = max(peak, pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak / 2**30


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--recipes", nargs="+", default=["qwen3_1.7b_ibtpo", "lora_24gb", "qlora_16gb"])
    arguments.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields that differ")
    arguments.add_argument("--layers", type=int, help="of the model, if fewer than it has")
    arguments.add_argument("--vocabulary", type=int, default=151_936, help="of the model")
    arguments.add_argument("--one", type=Path, metavar="FILE", help="train the one recipe here, and write its row")
    args = arguments.parse_args()
    if args.quick:
        args.layers, args.vocabulary = 1, 1024
    if args.one is not None:
        row = train(args.recipes[0], args.set, args.layers, args.vocabulary)
        args.one.write_text(json.dumps(row))
        return
    rows = []
    for recipe in args.recipes:
        found = Path(tempfile.mkdtemp()) / "row.json"
        command = [sys.executable, "-m", "benchmarks.recipes", "--recipes", recipe, "--one", str(found)]
        command += ["--vocabulary", str(args.vocabulary), *(["--layers", str(args.layers)] if args.layers else [])]
        peak = watched([*command, *(["--set", *args.set] if args.set else [])])
        rows.append({**json.loads(found.read_text()), "peak_gib": peak})
    common.report("Two optimizer steps of a recipe, the second measured", rows, args)


if __name__ == "__main__":
    main()
