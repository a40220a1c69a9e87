"""Fixtures shared by all tests: tiny models in folders, as a user would name them, and quiet trainers."""

import os

os.environ.setdefault("CI", "1")  # no telemetry
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed writes to standard output that it found no other
# Of two tests at a time, and of the processes they start: OpenMP's threads spin while they wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="module", autouse=True)
def environment_of_its_own():
    """A colocated vLLM leaves RANK, WORLD_SIZE and its port behind, which processes started later would obey."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    """A tiny Qwen3 with a byte-level tokenizer."""
    import tiny  # here, since it loads transformers and TRL, which not every test needs

    return tiny.save_tiny(tmp_path_factory.mktemp("model"), tiny.byte_level_tokenizer())


@pytest.fixture
def config(tmp_path):
    """Builds an IBTPOConfig that trains a few fast, reproducible steps; fields can be overridden."""
    import tiny

    from trl_ibtpo import IBTPOConfig

    def build(**overrides):
        return IBTPOConfig(**{"output_dir": str(tmp_path / "out"), **tiny.FAST, **overrides})

    return build


@pytest.fixture(scope="module")
def event_loop():
    """An event loop in a thread of its own, as TRL runs asynchronous reward functions."""
    from trl.trainer.utils import shutdown_event_loop_in_daemon, start_event_loop_in_daemon

    thread, loop, ready = start_event_loop_in_daemon()
    ready.wait()
    yield loop
    shutdown_event_loop_in_daemon(thread, loop)
    loop.close()
