"""`trl-ibtpo view` as a user types it, the server of a run that trains, and what trackers get."""

import json
import sys
import threading
import types
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.viewer import sample_record
from trl_ibtpo.cli.main import main
from trl_ibtpo.viewing.library import Library
from trl_ibtpo.viewing.page import page_of
from trl_ibtpo.viewing.records import dump_record
from trl_ibtpo.viewing.server import make_server
from trl_ibtpo.viewing.trackers import show_in_trackers


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    trees = tmp_path / "run" / "trees"
    trees.mkdir(parents=True)
    for step in (1, 2):
        record = sample_record(step, step=step, question=f"Question {step} [bold]\x1b[31m")
        (trees / f"step-{step:06d}.jsonl").write_text(dump_record(record) + "\n")
    (trees / "step-000003.jsonl").write_text('{"format": "trl_ibtpo.tree/1"')
    (trees / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    return tmp_path / "run"


def test_a_page_is_written(run, capsys):
    assert main(["view", "run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("step-000003.jsonl, line 1, is left out: it is not JSON")
    assert said[1].startswith("2 trees, ") and said[1].endswith("Open in a browser: run/trees.html")
    page = (run / "trees.html").read_text()
    assert page.count('<script type="text/plain" id="t') == 2 and "<title>run</title>" in page
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
    capsys.readouterr()
    assert main(["view", "run/trees/step-000001.jsonl", "--out", "one.html"]) == 0
    assert capsys.readouterr().out.startswith("1 tree, ")
    assert Path("one.html").read_text().count('<script type="text/plain" id="t') == 1
    (run / "trees" / "step-000003.jsonl").write_text("{}\n" * 9)
    assert main(["view", "run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 7 and said[5] == "4 more lines are left out."


def test_one_tree_as_text_and_pictures(run, capsys):
    assert main(["view", "run", "--text", "--tree", "2"]) == 0
    printed = capsys.readouterr().out
    assert "Question 2 [bold]" in printed and "\x1b" not in printed and "12 trajectories: " in printed
    for name in ("tree.png", "tree.svg", "tree.pdf"):
        assert main(["view", "run", "--out", name, "--tree", "1"]) == 0
    assert Image.open("tree.png").size[0] > 500
    assert "<svg" in Path("tree.svg").read_text() and Path("tree.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["view"], 2, "the following arguments are required: RUN_OR_FILE"),
        (["view", "nothing"], 1, "There is no 'nothing'."),
        (["view", "empty"], 1, "There are no trees in 'empty'. A run records them with `log_trees=10`"),
        (["view", "run", "--out", "page.txt"], 2, "--out is 'page.txt'; it must end with .html, .png, .svg or .pdf"),
        (["view", "run", "--tree", "1"], 2, "--tree is for --text or for a picture"),
        (["view", "run", "--text", "--tree", "3"], 2, "--tree is 3; there are trees 1 to 2"),
        (["view", "curves", "--text"], 1, "There are no trees in 'curves'"),
        (["view", "trees.html"], 2, "'trees.html' is a file to read and the one to write. Name the folder of a run"),
        (["view", "run", "--follow", "--text"], 2, "--follow serves a page; leave --out and --text out"),
    ],
)
def test_wrong_arguments_are_one_line(run, capsys, arguments, code, message):
    Path("empty").mkdir()
    Path("curves").mkdir()
    for name in ("curves/metrics.jsonl", "metrics.jsonl"):
        Path(name).write_text('{"step": 1, "reward": 0.5}\n')
    Path("trees.html").write_text("<html>\n" * 9)
    try:
        found = main(arguments)
    except SystemExit as exit:
        found = exit.code
    assert Path("trees.html").read_text().startswith("<html>")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-ibtpo")]
    assert found == code and message in line


@pytest.fixture
def served(run):
    """The address of a server of the run."""
    server = make_server(Library([run]))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    assert server.server_address[0] == "127.0.0.1"  # nobody else's machine can ask
    yield "http://{}:{}".format(*server.server_address)
    server.shutdown()
    thread.join()
    server.server_close()


def ask(address: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
        return answer.read()


def test_a_run_is_served_as_it_grows(served, run):
    assert b'"served":true' in ask(f"{served}/")
    news = json.loads(ask(f"{served}/index?version=0&since=1"))
    assert [entry["step"] for entry in news["entries"]] == [2]
    assert json.loads(ask(f"{served}/tree/0/1"))["question"]["text"].startswith("Question 2")
    (run / "trees" / "step-000004.jsonl").write_text(dump_record(sample_record(4, step=4)) + "\n")
    news = json.loads(ask(f"{served}/index?version=0&since=2"))
    assert [entry["step"] for entry in news["entries"]] == [4] and len(news["problems"]) == 1
    # A file that is written anew: everything is listed again, under another version.
    (run / "trees" / "step-000003.jsonl").write_text(dump_record(sample_record(3, step=3)) + "\n")
    news = json.loads(ask(f"{served}/index?version=0&since=3"))
    assert (news["version"], [entry["step"] for entry in news["entries"]]) == (1, [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("path", "headers", "code"),
    [
        ("/tree/0/99", {}, 404),
        ("/tree/7/0", {}, 404),
        ("/../run/trees/metrics.jsonl", {}, 404),
        ("/trees/step-000001.jsonl", {}, 404),
        ("/index?version=0&since=-1", {}, 404),
        ("/", {"Host": "evil.example"}, 403),  # a name of elsewhere that leads here
        ("/tree/0/0", {"Host": "evil.example:80"}, 403),
    ],
)
def test_nothing_else_is_served(served, path, headers, code):
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(served + path, **headers)
    assert error.value.code == code


# ----- trackers ------------------------------------------------------------------------------------------------------


class Writer:
    """What TensorBoard's callback keeps."""

    def __init__(self):
        self.images = []

    def add_image(self, tag, image, step, dataformats):
        self.images.append((tag, image.shape, image.dtype.name, step, dataformats))

    def flush(self):
        pass


@pytest.fixture
def trackers(monkeypatch):
    """Stand-ins for trackers that are not installed, and a trainer that reports to all of them."""
    logged = []
    html = lambda page, inject: ("page", page[:15], inject)  # noqa: E731
    wandb = types.SimpleNamespace(run=object(), Html=html, log=lambda values: logged.append(("wandb", values)))
    trackio = types.SimpleNamespace(Html=html, log=lambda values, step: logged.append(("trackio", values, step)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    writer = Writer()
    callbacks = [
        types.SimpleNamespace(),
        types.SimpleNamespace(tb_writer=None),
        types.SimpleNamespace(tb_writer=writer),
    ]
    return logged, writer, types.SimpleNamespace(callbacks=callbacks), wandb


def test_trackers_get_a_tree(trackers):
    logged, writer, handler, wandb = trackers
    report_to = ["wandb", "trackio", "tensorboard"]
    trainer = types.SimpleNamespace(args=types.SimpleNamespace(report_to=report_to), callback_handler=handler)
    show_in_trackers(trainer, sample_record(1), 7)
    page = ("page", "<!doctype html>", False)
    assert logged == [("wandb", {"tree": page, "train/global_step": 7}), ("trackio", {"tree": page}, 7)]
    ((tag, shape, kind, step, order),) = writer.images
    assert (tag, kind, step, order) == ("tree", "uint8", 7, "HWC") and shape[2] == 3 and min(shape[:2]) > 200
    wandb.run = None  # it was switched off
    trainer.args.report_to = ["wandb"]
    show_in_trackers(trainer, sample_record(1), 8)
    trainer.args.report_to = []
    show_in_trackers(trainer, sample_record(1), 9)
    assert len(logged) == 2 and len(writer.images) == 1


def test_a_page_of_a_few_records_stands_alone():
    page = page_of([sample_record(1)], title="</title><script>")
    assert "<title>&lt;/title&gt;&lt;script&gt;</title>" in page
