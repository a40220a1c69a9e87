"""What I2B-LPO's path filter takes of a training step.

    python -m benchmarks.path_filter [--quick] [--vllm] [--json FILE]

Real trainers with the shape of `IBTPOConfig.i2b_lpo`, 4 rollouts and 3 branches of each, of which 2 are kept. The
model is random, so completions are as long as they may be and steps cost the same. `filter_share` is the part of a
step in which branches are scored; `entropy_share` that in which the policy goes over what vLLM has sampled, which
transformers does not need: over the initial rollouts for the forks, and with `advantage` over the branches too.
"""

import os
import tempfile
import time

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Qwen3ForCausalLM, TrainerCallback, set_seed

from benchmarks import common, tiny
from trl_ibtpo import IBTPOConfig, IBTPOTrainer

FILTERS = (None, "advantage", "pmi")


class Timed(IBTPOTrainer):
    """Counts the seconds that scoring and passes for entropies take."""

    filtering = measuring = 0.0

    def _filter_paths(self, *args):
        start = time.perf_counter()
        found = super()._filter_paths(*args)
        self.filtering += time.perf_counter() - start
        return found

    def _token_entropies(self, *args):
        start = time.perf_counter()
        found = super()._token_entropies(*args)
        self.measuring += time.perf_counter() - start
        return found


class Laps(TrainerCallback):
    """The seconds of every step, and of the parts of it that its trainer counts."""

    def __init__(self, trainer: Timed):
        self.trainer, self.laps = trainer, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start, self.trainer.filtering, self.trainer.measuring = time.perf_counter(), 0.0, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.perf_counter() - self.start
        self.laps.append((seconds, self.trainer.filtering / seconds, self.trainer.measuring / seconds))


def make_trainer(path: str, path_filter: str | None, args) -> Timed:
    config = IBTPOConfig.i2b_lpo(
        tempfile.mkdtemp(),
        path_filter=path_filter,
        paths_kept=None if path_filter is None else 2,
        latent_mode="none",
        gradient_accumulation_steps=args.questions,
        max_steps=2,
        max_completion_length=args.max_length,
        step_max_tokens=16,
        use_vllm=args.vllm,
        vllm_max_model_length=64 + args.max_length,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"prompt": f"What is {number} + 4?", "solution": str(number + 4)} for number in range(64)]
    return Timed(path, tiny.even_length, config, Dataset.from_list(rows))


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--vllm", action="store_true", help="generate with vLLM in this process")
    arguments.add_argument("--repeats", type=int, default=4)
    arguments.add_argument("--questions", type=int, default=2, help="per optimizer step")
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--hidden", type=int, default=256)
    arguments.add_argument("--vocabulary", type=int, default=16384)
    arguments.add_argument("--max-length", type=int, default=256, help="tokens of a completion")
    args = arguments.parse_args()
    if args.quick:
        os.environ["VLLM_CPU_CI_ENV"] = "1"
        args.repeats, args.questions, args.layers, args.hidden, args.vocabulary, args.max_length = (
            1,
            1,
            1,
            128,
            512,
            24,
        )
    set_seed(0)
    path, tokenizer = tempfile.mkdtemp(), tiny.byte_level_tokenizer()
    model = common.qwen3_config(
        args.layers,
        args.hidden,
        args.vocabulary,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=4096,
    )
    Qwen3ForCausalLM(model).save_pretrained(path)
    tokenizer.save_pretrained(path)
    trainers = {each: make_trainer(path, each, args) for each in FILTERS[: 2 if args.vllm else 3]}
    laps = {each: Laps(trainer) for each, trainer in trainers.items()}
    for each, trainer in trainers.items():
        trainer.add_callback(laps[each])
    with tqdm(total=args.repeats * len(trainers), unit="run") as progress:
        for _ in range(args.repeats):  # interleaved
            for each, trainer in trainers.items():
                progress.set_description(str(each))
                trainer.train()
                progress.update()
    rows = []
    for each, watch in laps.items():
        seconds, filtering, measuring = zip(*watch.laps[1::2], strict=True)  # the second step of each run
        row = {"filter": each or "none", "engine": "vllm" if args.vllm else "transformers"}
        row |= {"seconds_per_step": sum(seconds) / len(seconds)}
        for name, shares in (("filter_share", filtering), ("entropy_share", measuring)):
            row[name], row[f"{name}_se"] = common.mean_and_error(shares)
        rows.append(row)
    common.report(f"One optimizer step of {args.questions} questions", rows, args)


if __name__ == "__main__":
    main()
