"""`trl-ibtpo train`: what `trl grpo` does, with IBTPOTrainer and the fields of IBTPOConfig."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .common import HelpFormatter, OneLineErrors, UsageError, load_named, split_of

FIRST = ("model_name_or_path", "dataset_name", "reward_funcs", "output_dir", "use_vllm")  # in the help


def run(argv: Sequence[str]) -> int:
    """Train, save, and push where asked to."""
    import transformers
    import yaml
    from packaging.version import Version
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser, get_peft_config, get_quantization_config
    from trl.scripts.grpo import GRPOScriptArguments

    from ..ibtpo_config import IBTPOConfig

    class TrainParser(OneLineErrors, OwnFieldsFirst, TrlParser):
        own_fields = (*FIRST, *IBTPOConfig.__annotations__)

    parser = TrainParser(
        (GRPOScriptArguments, IBTPOConfig, ModelConfig, DatasetMixtureConfig),
        prog="trl-ibtpo train",
        usage="trl-ibtpo train --model_name_or_path MODEL --dataset_name DATASET --reward_funcs NAME ... --output_dir "
        "FOLDER [--config FILE.yaml] [options]",
        formatter_class=HelpFormatter,
        description="Train with IBTPOTrainer. `--config FILE.yaml` reads arguments from a file; those on the command "
        "line win. Several processes: accelerate launch -m trl_ibtpo train ...",
    )
    if list(argv)[-1:] == ["--config"]:
        raise UsageError("--config needs the name of a YAML file.")
    try:
        script, args, model, mixture = parser.parse_args_and_config(args=argv)
        reward_funcs = _reward_functions(script)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise UsageError(str(error)) from error
    if model.model_name_or_path is None:
        raise UsageError("--model_name_or_path is missing.")

    from ..ibtpo_trainer import IBTPOTrainer

    dataset = _load_dataset(script, mixture)
    if args.eval_strategy != "no" and not isinstance(dataset, dict):
        raise UsageError(
            f"`eval_strategy` is {args.eval_strategy.value!r}, but --dataset_name {script.dataset_name!r} was saved "
            "without splits, so that nothing is left to evaluate on. Save `dataset.train_test_split(0.1)`, which has "
            "the splits train and test, or leave `eval_strategy` at 'no'."
        )
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
        train_dataset=split_of(dataset, script.dataset_train_split),
        eval_dataset=split_of(dataset, script.dataset_test_split) if args.eval_strategy != "no" else None,
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


class OwnFieldsFirst:
    """Mixed into a parser: its help begins with the arguments that matter most, and ends with those of TRL."""

    own_fields: tuple[str, ...] = ()

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        own = sorted(
            (action for action in self._actions if action.dest in self.own_fields),
            key=lambda action: self.own_fields.index(action.dest),
        )
        others = [action for action in self._actions if action.dest not in self.own_fields]
        for title, actions in (("what to train, and trees", own), ("all other arguments, which are TRL's", others)):
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


def _reward_functions(script: Any) -> list[str | Callable]:
    """A reward model, names in trl.rewards and dotted paths; the working directory is searched for modules too."""
    from ..training.reward_checks import named_reward, trl_reward_names

    functions: list[str | Callable] = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    for name in script.reward_funcs or []:
        if "." not in name:
            if name not in trl_reward_names():
                raise UsageError(
                    f"There is no reward function {name!r}: give a dotted path or one of {trl_reward_names()}."
                )
            functions.append(named_reward(name))
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
    """By name on the Hub, a file, or a folder: files that `load_dataset` knows, or what `save_to_disk` wrote."""
    from trl import get_dataset

    if mixture.datasets and script.dataset_name:
        raise UsageError("Both `datasets` and `dataset_name` are given; leave one out.")
    if mixture.datasets:
        return get_dataset(mixture)
    if not script.dataset_name:
        raise UsageError("--dataset_name is missing: a name on the Hub, a folder, or a file such as data.jsonl.")
    return load_named(script.dataset_name, script.dataset_config, script.dataset_streaming)
