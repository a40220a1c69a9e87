"""Runs that are killed (SIGKILL) at random moments and resumed, against a run that was not.

    python -m benchmarks.interruptions [--quick] [--steps 60] [--kills 20] [--json FILE]

A checkpoint is written at every step, so that many kills fall into a save. A run that ends before its kill is compared
with the uninterrupted one, and the next kill falls on a new run.
"""

import random
import tempfile
import time
from pathlib import Path

from tqdm.auto import tqdm

from benchmarks import common, interrupted_run, tiny
from trl_ibtpo.training import checkpoints


def largest_differences(reference: Path, folder: Path) -> dict[str, float]:
    (log, weights), (other_log, other_weights) = (interrupted_run.outcome(path) for path in (reference, folder))
    assert [entry["step"] for entry in log] == [entry["step"] for entry in other_log]
    return {
        "loss_diff": max(abs(a["loss"] - b["loss"]) for a, b in zip(log, other_log, strict=True) if "loss" in a),
        "reward_diff": max(abs(a["reward"] - b["reward"]) for a, b in zip(log, other_log, strict=True) if "loss" in a),
        "weight_diff": max(float((weights[name] - other_weights[name]).abs().max()) for name in weights),
    }


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--kills", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    if args.quick:
        args.steps, args.kills = 12, 3
    rng, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=args.kills, unit="kill") as progress:
        root = Path(temporary)
        model_path = tiny.save_tiny(root / "model", tiny.byte_level_tokenizer())

        def finish(folder: Path) -> float:
            start = time.perf_counter()
            process = interrupted_run.start(model_path, folder, max_steps=args.steps)
            process.join()
            assert process.exitcode == 0, (folder / "log").read_text()[-3000:]
            return time.perf_counter() - start

        finish(root / "warm-up")  # the server imports everything
        duration = finish(root / "reference")
        run = 0
        while len(rows) < args.kills:
            run, killed = run + 1, []
            folder = root / f"run-{run}"
            while len(rows) + len(killed) < args.kills:
                process = interrupted_run.start(model_path, folder, max_steps=args.steps)
                process.join(timeout=rng.uniform(0, duration))
                process.kill()
                process.join()
                if process.exitcode == 0:
                    break
                step, whole = interrupted_run.steps_done(folder), checkpoints.last_whole(folder / "output")
                killed.append(
                    {
                        "run": run,
                        "kill": len(rows) + len(killed) + 1,
                        "last_folder": step,
                        "resumed_from": int(whole.name.split("-")[1]) if whole else 0,
                    }
                )
                progress.update()
            if not (folder / "outcome.json").exists():
                finish(folder)
            rows += [{**row, **largest_differences(root / "reference", folder)} for row in killed]
    common.report(f"Killed and resumed, {args.steps} steps", rows, args)


if __name__ == "__main__":
    main()
