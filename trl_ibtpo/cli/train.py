"""`trl-ibtpo train`: what `trl grpo` does, with IBTPOTrainer and the fields of IBTPOConfig."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .common import OneLineErrors, UsageError


def run(argv: Sequence[str]) -> int:
    """Train, save, and push where asked to."""
    import transformers
    from packaging.version import Version
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser, get_peft_config, get_quantization_config
    from trl.scripts.grpo import GRPOScriptArguments

    from ..ibtpo_config import IBTPOConfig

    class TrainParser(OneLineErrors, TrlParser):
        pass

    parser = TrainParser(
        (GRPOScriptArguments, IBTPOConfig, ModelConfig, DatasetMixtureConfig),
        prog="trl-ibtpo train",
        description="Train with IBTPOTrainer. `--config FILE.yaml` reads arguments from a file; those on the command "
        "line win. Several processes: accelerate launch -m trl_ibtpo train ...",
    )
    if list(argv)[-1:] == ["--config"]:
        raise UsageError("--config needs the name of a YAML file.")
    try:
        script, args, model, mixture = parser.parse_args_and_config(args=argv)
        reward_funcs = _reward_functions(script)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    if model.model_name_or_path is None:
        raise UsageError("--model_name_or_path is missing.")

    from ..ibtpo_trainer import IBTPOTrainer

    dataset = _load_dataset(script, mixture)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }
    trainer = IBTPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=_split(dataset, script.dataset_train_split),
        eval_dataset=_split(dataset, script.dataset_test_split) if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Model saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
        trainer.accelerator.print(f"Model pushed to {trainer.hub_model_id}.")
    if Version(transformers.__version__) >= Version("5.18.0"):  # as TRL's script: trackers and process group end
        trainer.end()
    return 0


def _reward_functions(script: Any) -> list[str | Callable]:
    """A reward model, names in trl.rewards and dotted paths; the working directory is searched for modules too."""
    import trl.rewards

    functions: list[str | Callable] = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    for name in script.reward_funcs or []:
        if name == "get_soft_overlong_punishment":  # with the values that TRL's own help gives
            functions.append(trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256))
        elif "." not in name:
            if name.startswith("get_") or not callable(getattr(trl.rewards, name, None)):
                known = [each for each in dir(trl.rewards) if each.endswith("_reward") and not each.startswith("get_")]
                raise UsageError(f"There is no reward function {name!r}: give a dotted path or one of {known}.")
            functions.append(getattr(trl.rewards, name))
        else:
            module_name, function_name = name.rsplit(".", 1)
            if os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())  # for good: a reward function may import when it is called
            try:
                functions.append(getattr(importlib.import_module(module_name), function_name))
            except (ImportError, AttributeError) as error:
                raise UsageError(f"The reward function {name!r} cannot be imported: {error}.") from error
    if not functions:
        raise UsageError("--reward_funcs is missing; for example --reward_funcs accuracy_reward.")
    return functions


def _load_dataset(script: Any, mixture: Any) -> Any:
    """By name on the Hub, or a folder: files that `load_dataset` knows, or what `save_to_disk` wrote."""
    import datasets
    from trl import get_dataset

    if mixture.datasets and script.dataset_name:
        raise UsageError("Both `datasets` and `dataset_name` are given; leave one out.")
    if mixture.datasets:
        return get_dataset(mixture)
    if not script.dataset_name:
        raise UsageError("--dataset_name is missing: a name on the Hub or a folder.")
    folder = Path(script.dataset_name)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return datasets.load_from_disk(script.dataset_name)
    return datasets.load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def _split(dataset: Any, name: str) -> Any:
    if not isinstance(dataset, dict):  # saved to disk without splits
        return dataset
    if name not in dataset:
        raise ValueError(f"The dataset has no split {name!r}; it has: {', '.join(dataset)}.")
    return dataset[name]
