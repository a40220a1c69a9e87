"""What a person sees of the quickstart: its page in a terminal and in a file, and its errors."""

import os
import pty
import re
import subprocess
import sys

import pytest
from test_style import ROOT

NOISE = "this means nothing to a user"
SCRIPT = f"""
import logging, os, sys, pathlib
from stages import Stages
stages = Stages(pathlib.Path(sys.argv[1]))
stages.start("First", 3)
print({NOISE!r})
logging.warning({NOISE!r})
os.system("echo {NOISE}")
for step in range(1, 4):
    stages.update(step, reward=f"0.{{step}}")
    stages.update(step)
stages.start("Second")
if sys.argv[2:]:
    raise ValueError("a real error")
stages.show("The end", {{"Accuracy": "50.0%"}})
"""


def run_in_terminal(command: list[str]) -> str:
    """What the command shows in a terminal."""
    main, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "90", "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(main, 4096)
        except OSError:  # nobody is left to write
            break
        if not piece:
            break
        shown += piece
    os.close(main)
    assert process.wait() == 0
    return shown.decode()


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "examples"))
    return [sys.executable, "-c", SCRIPT, str(tmp_path / "folder" / "log.txt")]


@pytest.mark.parametrize("terminal", [True, False])
def test_only_stages_are_shown(terminal, command):
    if terminal:
        shown = run_in_terminal(command)
        assert "\x1b[" in shown  # moving bars
        shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    else:
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        assert shown.stderr == ""
        shown = shown.stdout
        assert not set(shown) & {"\x1b", "\r"}
        assert len(shown.splitlines()) <= 8  # a line a stage, and the table
    assert re.search(r"✓ First +━+ +3/3 +0:00:\d\d reward 0.3", shown)
    assert re.search(r"✓ Second +━+ +0:00:\d\d", shown)
    assert re.search(r"Accuracy │ 50.0%", shown)
    assert NOISE not in shown
    with open(command[-1]) as log:
        assert log.read().count(NOISE) == 3


def test_errors_are_shown_with_their_traceback(command):
    result = subprocess.run([*command, "fail"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "ValueError: a real error" in result.stderr
    assert f"The log is in {command[-1]}" in result.stderr
    assert NOISE not in result.stdout + result.stderr


def test_quickstart(tmp_path):
    """From end to end, with too few steps to learn anything."""
    arguments = ["--output_dir", "out", "--warm_steps", "2", "--steps", "1"]
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    for stage, figures in {
        "Warm start": "2/2 .*",
        "Accuracy before IB-TPO": r"500/500 .* accuracy \d+\.\d%",
        "IB-TPO": r"1/1 .* reward \d\.\d\d  effective \d\.\d\d",
        "Accuracy after IB-TPO": r"500/500 .* accuracy \d+\.\d%",
    }.items():
        assert sum(bool(re.search(rf"✓ {stage} .*{figures}", line)) for line in lines) == 1, result.stdout
    for name in ("learning_curve.png", "tree.png", "log.txt"):
        assert (tmp_path / "out" / name).stat().st_size > 0
        assert f"out/{name}" in result.stdout
    # The page comes last: it holds the trees of the one step, and the curves.
    assert lines[-1].endswith("Open in a browser: out/trees.html")
    page = (tmp_path / "out" / "trees.html").read_text()
    assert page.count('<script type="text/plain" id="t') == 4 and '"name":"Effective rate"' in page
    assert "tree/effective_rate" in (tmp_path / "out" / "log.txt").read_text()
