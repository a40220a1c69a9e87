"""The example scripts, their recipes and TRL's own GRPO script, run as a user runs them: as processes, offline."""

import ast
import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import agents
import pytest
import tiny
import torch
import trl
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser
from trl.rewards import accuracy_reward

from benchmarks import recipes, sizes
from benchmarks.learning_methods import METHODS
from trl_ibtpo import IBTPOConfig
from trl_ibtpo.i2b_lpo import I2B_LPO

EXAMPLES = Path(__file__).parent.parent / "examples"
AGENT_RECIPE = EXAMPLES / "recipes" / "agent_qwen3_0.6b.yaml"
RECIPES = sorted(set((EXAMPLES / "recipes").glob("*.yaml")) - {AGENT_RECIPE})
ACCELERATE_CONFIGS = sorted((EXAMPLES / "accelerate_configs").glob("*.yaml"))


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----- scripts as processes ------------------------------------------------------------------------------------------

SMALL = {**tiny.FAST, "max_steps": 2, "max_completion_length": 24, "per_device_train_batch_size": 12}
SMALL["gradient_accumulation_steps"] = 1
THREE = {**SMALL, "max_steps": 3}
# A recipe, made small enough for a CPU: its own batch sizes, precision and engine do not fit one.
SMALL_RECIPE = {**SMALL, "dataset_config": "default", "use_vllm": False, "log_completions": False}


def run(script: Path, folder: Path, **fields) -> list[dict]:
    """Run a script with its fields as flags; return what it logged each step."""
    return run_and_read(script, folder, **fields)[0]


def run_and_read(script: Path, folder: Path, **fields) -> tuple[list[dict], str]:
    """The same, and what it wrote to standard error."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    quiet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    vllm = {"VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    config = ["--config", str(fields.pop("config"))] if "config" in fields else []
    flags = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    result = subprocess.run(
        [sys.executable, str(script), *config, *flags, "--output_dir", str(folder / "out")],
        cwd=folder,
        env={**os.environ, **quiet, **vllm},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    log = [ast.literal_eval(line) for line in result.stdout.splitlines() if line.startswith("{'loss'")]
    return log, result.stderr


def check_trees(log: list[dict], steps: int) -> None:
    assert len(log) == steps
    for entry in log:
        assert float(entry["tree/generated_tokens"]) < float(entry["tree/trajectory_tokens"])  # prefixes are shared


def changed(folder: Path, model_path: str) -> bool:
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (model_path, folder / "out"))
    return any(not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


@pytest.fixture(scope="module")
def math_folder(tmp_path_factory) -> str:
    """A dataset as GSM8K writes it."""
    folder = tmp_path_factory.mktemp("math")
    rows = [{"question": f"What is {n} + 4?", "answer": f"{n} + 4 = {n + 4}\n#### {n + 4}"} for n in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_math(tmp_path, model_path, math_folder):
    log = run(
        EXAMPLES / "ibtpo_math.py",
        tmp_path,
        config=EXAMPLES / "recipes" / "qwen3_1.7b_ibtpo.yaml",
        model_name_or_path=model_path,
        dataset_name=math_folder,
        **SMALL_RECIPE,
    )
    check_trees(log, steps=2)
    assert "rewards/accuracy_reward/mean" in log[0]
    assert changed(tmp_path, model_path)


def test_i2b_lpo(tmp_path, model_path, math_folder):
    log = run(
        EXAMPLES / "ibtpo_math.py",
        tmp_path,
        config=EXAMPLES / "recipes" / "qwen2.5_7b_i2b_lpo.yaml",
        model_name_or_path=model_path,
        dataset_name=math_folder,
        **SMALL_RECIPE,
    )
    assert len(log) == 2
    assert all(float(entry["tree/filtered"]) == 4 for entry in log)  # 4 (1 + 3) are sampled, 4 (1 + 2) trained
    assert all(float(entry["sampling/importance_sampling_ratio/max"]) > 1 for entry in log)


def test_reasoning_gym(tmp_path, model_path):
    settings = json.dumps({"min_terms": 2, "max_terms": 2})
    log = run(
        EXAMPLES / "ibtpo_gsm.py",
        tmp_path,
        model_name_or_path=model_path,
        task_size=20,
        task_eval_size=12,
        task_settings=settings,
        eval_strategy="steps",
        eval_steps=2,
        **SMALL,
    )
    check_trees(log, steps=2)
    assert "rewards/verifier/mean" in log[0]
    assert changed(tmp_path, model_path)


SHAPED = """
def shaped(completions, **kwargs):
    return [-1 + 1.25 * (len(completion[0]["content"]) % 3) for completion in completions]
"""

TRL_REWARDS = {
    "right or wrong": ({"reward_funcs": "accuracy_reward"}, None),
    "from -1 to 1.5": ({"reward_funcs": "my_rewards.shaped"}, "'shaped' returned"),
    "reward model": ({"reward_model_name_or_path": "judge"}, "'judge' returned"),
}


@pytest.mark.parametrize("rewards, said", TRL_REWARDS.values(), ids=TRL_REWARDS)
def test_trl_grpo_script_with_two_names_replaced(tmp_path, model_path, rewards, said):
    """Must train, and nothing but `GRPOTrainer` and `GRPOConfig` is replaced."""
    original = (Path(trl.__file__).parent / "scripts" / "grpo.py").read_text()
    script = original
    for name in ("Trainer", "Config"):
        # The one line that is not a plain replacement: the name comes from another package.
        script = re.sub(
            rf"^( *)from trl import (.*)\bGRPO{name}, ",
            rf"\1from trl_ibtpo import IBTPO{name}\n\1from trl import \2",
            script,
            flags=re.MULTILINE,
        )
        script = re.sub(rf"\bGRPO{name}\b", f"IBTPO{name}", script)
    assert not re.search(r"\bGRPO(Trainer|Config)\b", script)
    path = tmp_path / "grpo.py"
    path.write_text(script)
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": [{"role": "user", "content": f"What is {n} + 4?"}], "solution": str(n + 4)} for n in range(20)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(SHAPED)
    tokenizer = tiny.byte_level_tokenizer()
    tiny.tiny_reward_model(tokenizer).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    log, messages = run_and_read(path, tmp_path, model_name_or_path=model_path, dataset_name=data, **rewards, **THREE)
    check_trees(log, steps=3)
    assert changed(tmp_path, model_path)
    warnings = [line for line in messages.splitlines() if "outside [0, 1]" in line]
    if said is None:
        assert warnings == []
    else:  # for three generation batches
        assert len(warnings) == 1 and said in warnings[0] and "`success_range=(" in warnings[0]
        assert any(float(entry["tree/effective_rate"]) > 0 for entry in log)
        assert all(math.isfinite(float(entry["ib/covariance"])) for entry in log)


# ----- adapters ------------------------------------------------------------------------------------------------------

ADAPTERS = {
    "qlora": ("qlora_16gb.yaml", {"max_steps": 3}),
    "lora with vllm": (
        "lora_24gb.yaml",
        {"use_vllm": True, "vllm_max_model_length": 256, "dtype": "float32", "branch_lookahead": 0},
    ),
}


@pytest.mark.parametrize("recipe, fields", ADAPTERS.values(), ids=ADAPTERS)
def test_adapter(tmp_path, model_path, math_folder, recipe, fields):
    """Trains, and the saved adapter loads with peft on the base model, changes it, and generates."""
    fields = {**SMALL_RECIPE, "learning_rate": 0.05, **fields}
    log = run(
        EXAMPLES / "ibtpo_lora.py",
        tmp_path,
        config=EXAMPLES / "recipes" / recipe,
        model_name_or_path=model_path,
        dataset_name=math_folder,
        **fields,
    )
    check_trees(log, steps=fields["max_steps"])
    if fields["use_vllm"]:  # the engine samples from the model with its adapter
        assert all(float(entry["sampling/sampling_logp_difference/mean"]) < 0.05 for entry in log)

    base = AutoModelForCausalLM.from_pretrained(model_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("What is 3 + 4?", return_tensors="pt").input_ids
    with torch.no_grad():
        before = torch.log_softmax(base(ids).logits, -1)
        model = PeftModel.from_pretrained(base, tmp_path / "out")
        after = torch.log_softmax(model(ids).logits, -1)
    assert (after - before).abs().max() > 1e-3
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8)
    assert generated.shape[1] == ids.shape[1] + 8
    assert not (tmp_path / "out" / "model.safetensors").exists()  # the adapter alone
    # TRL keeps the adapter of a quantized model, and of no other, in bfloat16: the base model really had 4 bits.
    dtypes = {weight.dtype for weight in load_file(tmp_path / "out" / "adapter_model.safetensors").values()}
    assert dtypes == {torch.bfloat16 if recipe.startswith("qlora") else torch.float32}


def test_quantized_model_with_vllm_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    script = load_script("ibtpo_lora")
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--bf16", "False"]
    flags += ["--use_vllm", "True", "--load_in_4bit", "True"]
    arguments = script.make_parser().parse_args_and_config(flags)
    with pytest.raises(ValueError, match="`use_vllm` is True and the base model is quantized"):
        script.main(*arguments)


# ----- columns -------------------------------------------------------------------------------------------------------

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\nFind $x$.\n\nRemember to put your answer "
    'on its own line after "Answer:".'
)
ROWS = {
    "DAPO": {"prompt": [{"role": "user", "content": DAPO}], "reward_model": {"ground_truth": "34", "style": "rule"}},
    "DAPO, processed": {"prompt": "Find $x$.", "solution": "34"},
    "MATH": {"problem": "Find $x$.", "solution": "First $x > 2$.\n\nSo $x = 34$ is \\boxed{34}.", "level": "1"},
    "GSM8K": {"question": "Find $x$.", "answer": "30 + 4 = <<30+4=34>>34\n#### 34"},
    "number": {"question": "Find $x$.", "answer": 34},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_columns(row):
    mapped = load_script("ibtpo_math").to_conversation(row)
    text = "Find $x$.\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert mapped["prompt"] == [{"role": "user", "content": text}]
    completions = [[{"role": "assistant", "content": f"So it is \\boxed{{{answer}}}."}] for answer in (34, 35)]
    assert accuracy_reward(completions, [mapped["solution"]] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("answer, wrong", [("3\\sqrt{2}", "3"), ("2^{10}", "2"), ("(1, 2)", "(1, 3)"), ("1,234", "1")])
def test_bare_answers_are_read_as_latex(answer, wrong):
    mapped = load_script("ibtpo_math").to_conversation({"problem": "?", "answer": answer})
    completions = [[{"role": "assistant", "content": f"\\boxed{{{text}}}"}] for text in (answer, wrong)]
    assert accuracy_reward(completions, [mapped["solution"]] * 2) == [1.0, 0.0]


def test_instructions_are_kept():
    """A system message stays, and a question that asks for a box is not asked twice."""
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Find x. Use \\boxed{}."}]
    assert load_script("ibtpo_math").to_conversation({"prompt": prompt, "answer": "3"})["prompt"] == prompt


@pytest.mark.parametrize(
    "row, missing", [({"text": "?", "answer": "3"}, "question"), ({"problem": "?", "label": 3}, "answer")]
)
def test_unknown_columns(row, missing):
    with pytest.raises(ValueError, match=f"A row has no {missing}. Its columns: {', '.join(row)}"):
        load_script("ibtpo_math").to_conversation(row)


# ----- tools and environments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"), [("12 * (3 + 4)", "84"), ("-7 / 2", "-3.5"), ("1 + 2 - 3", "0"), ("6 / 2", "3")]
)
def test_the_calculator_calculates(expression, value):
    assert load_script("ibtpo_calculator").calculate(expression) == value


@pytest.mark.parametrize("expression", ["9 ** 9 ** 9", "open('x')", "'a' * 3", "1 +", "(" * 300, "a.b"])
def test_the_calculator_executes_nothing_else(expression):
    with pytest.raises((ValueError, SyntaxError)):
        load_script("ibtpo_calculator").calculate(expression)


def test_the_last_number_is_the_answer():
    reward = load_script("ibtpo_calculator").right_answer
    turns = [[{"content": "12"}, {"content": said}] for said in ("The sum is 12.", "12, or 13", "")]
    assert reward(turns, ["12", "12", "12"]) == [1.0, 0.0, 0.0]


def test_the_game_goes_back_to_a_board():
    """A board that can be solved by one move, left and found again."""
    script = load_script("ibtpo_game")
    board = "o" * 12 + "ooAAoo" + "o" * 6 + "Booooo" * 2
    first, second = script.RushHour(), script.RushHour()
    assert "..AA.." in first.reset(board=board) and second.reset(board=board)
    assert "...AA." in first.move("A", 1)
    state = first._snapshot()
    assert first.move("A", 1) == "Solved." and first.get_reward() == 1.0
    for environment in (second, first):
        environment._restore(state)
        assert "...AA." in environment.board.board_str() and environment.get_reward() == 0.0
        assert environment.move("A", 4) == "Solved."
    for vehicle, steps in (("x", 1), ("AB", 1), ("Z", 1), ("A", 10**9)):
        with pytest.raises(ValueError, match="vehicle"):
            first.move(vehicle, steps)


def test_agents(tmp_path, capsys):
    """They train, with a template that renders tools: one as a process, the other in this one, to save time."""
    folder = tiny.save_tiny(tmp_path / "model", agents.tokenizer())
    fields = {"model_name_or_path": folder, "task_size": 20, "dtype": "bfloat16", **SMALL}
    logs = run(EXAMPLES / "ibtpo_game.py", tmp_path, **fields)
    assert len(logs) == 2 and all("tools/call_frequency" in entry for entry in logs)
    assert "tree/restored" in logs[0]
    script = load_script("ibtpo_calculator")
    flags = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    parser = TrlParser((script.TaskArguments, IBTPOConfig, ModelConfig))
    script.main(*parser.parse_args_and_config([*flags, "--output_dir", str(tmp_path / "calculator")]))
    written = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{'loss'")]
    assert len(written) == 2 and all("tools/call_frequency" in line for line in written)
    for name in ("out", "calculator"):
        assert {each.dtype for each in load_file(tmp_path / name / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["ibtpo_calculator", "ibtpo_game"])
def test_agent_recipe(tmp_path, name):
    flags = ["--config", str(AGENT_RECIPE), "--use_cpu", "True", "--bf16", "False", "--output_dir", str(tmp_path)]
    parser = TrlParser((load_script(name).TaskArguments, IBTPOConfig, ModelConfig))
    _, args, _ = parser.parse_args_and_config(flags)
    assert args.num_generations == 12 and args.tool_timeout == 10


# ----- recipes and accelerate configs --------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe(recipe, tmp_path):
    """Every key is a field, and trees of the paper's shape fit the batch."""
    flags = ["--config", str(recipe), "--use_cpu", "True", "--bf16", "False", "--output_dir", str(tmp_path)]
    parser = TrlParser((ScriptArguments, IBTPOConfig, ModelConfig))
    script_args, args, model_args = parser.parse_args_and_config(flags)
    assert args.num_generations == 12
    if args.branching == "entropy_fork":
        constructed = IBTPOConfig.i2b_lpo(str(tmp_path), use_cpu=True, bf16=False)
        assert {name: getattr(args, name) for name in I2B_LPO} == I2B_LPO
        assert {name: getattr(constructed, name) for name in I2B_LPO} == I2B_LPO
    else:
        assert (args.beta, args.temperature, args.top_p, args.top_k) == (0.001, 0.7, 0.95, 20)
        measured = METHODS["confidence_sampled"].settings if args.branching == "confidence" else {"ib_coef": 0.1}
        assert {name: getattr(args, name) for name in measured} == measured and args.ib_beta == 5.0
    assert args.num_train_epochs == 1
    assert script_args.dataset_name and model_args.model_name_or_path
    if not model_args.use_peft:
        assert (args.learning_rate, args.max_completion_length) == (1e-6, 2048)


@pytest.mark.parametrize("recipe", ["qwen3_1.7b_ibtpo", "lora_24gb", "qlora_16gb"])
def test_a_recipe_is_measured_as_it_is(recipe, tmp_path):
    """But for a run of two steps, and steps that random weights have too."""
    args, model_args = recipes.parse(recipe, ["use_cpu=True", "bf16=False", "learning_rate=0.5"], str(tmp_path))
    written = yaml.safe_load((EXAMPLES / "recipes" / f"{recipe}.yaml").read_text())
    assert model_args.model_name_or_path == written["model_name_or_path"] in sizes.SIZES
    for name in ("max_completion_length", "per_device_train_batch_size", "gradient_accumulation_steps", "beta"):
        assert getattr(args, name) == written[name]
    assert (args.learning_rate, args.max_steps) == (0.5, 2)
    assert args.step_min_tokens == args.step_max_tokens == recipes.STEP_TOKENS


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.name)
def test_accelerate_config(path):
    config = load_config_from_file(str(path))  # raises where it does not know a key
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    # It does not look into the nested ones, which become arguments of `accelerate launch`.
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for name in ("deepspeed_config", "fsdp_config"):
        for key in yaml.safe_load(path.read_text()).get(name, {}):
            assert key in known, f"accelerate launch has no argument for {key}"


def test_every_kind_is_there():
    assert [path.stem for path in ACCELERATE_CONFIGS] == ["deepspeed_zero2", "deepspeed_zero3", "fsdp2", "multi_gpu"]
    assert len(RECIPES) == 6
