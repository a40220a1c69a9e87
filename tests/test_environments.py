"""A branch has the environment as it was at the end of its prefix, and nothing is left of any environment."""

import contextlib
import json
import random
import re
import time

import agents
import pytest
import tiny

TREE = {
    "tree_initial_rollouts": 3,
    "tree_levels": 6,
    "tree_branches_per_node": 2,
    "branching": "random",
    "per_device_train_batch_size": 13,
    "max_completion_length": 600,
    "step_delimiter": "\n\n",
    "temperature": 1.0,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny.save_tiny(tmp_path_factory.mktemp("agent"), agents.tokenizer())


@pytest.fixture(autouse=True)
def none_alive():
    """TRL's own trainer closes none of its environments."""
    agents.Counter.alive.clear()


class Trainer(agents.ScriptedIBTPOTrainer):
    """Scripted in a way that a number decides."""

    salt, engine_class = 0, agents.ScriptedEngine

    def script(self, rng, turns):
        rng = random.Random(f"{self.salt} {rng.random()}")
        if turns and rng.random() < 0.15:
            return f"Enough {rng.random()}."
        calls = [agents.call("add", by=rng.randint(1, 9)), agents.call("multiply", by=rng.randint(2, 9))]
        return f"Move {rng.randint(0, 9)}, then we see.\n\n" + "".join(rng.choices(calls, k=rng.randint(1, 2)))

    def _engine(self):
        return contextlib.nullcontext(self.engine_class(self))


class Recorder:
    """A reward function that remembers what it saw."""

    __name__ = "recorder"

    def __init__(self):
        self.seen = []

    def __call__(self, completions, environments, seed, **kwargs):
        self.seen += [
            (number, completion, environment.value, list(environment.history))
            for number, completion, environment in zip(seed, completions, environments, strict=True)
        ]
        return [float(environment.value % 2) for environment in environments]


def build(path, config, environment, fields=None, trainer_class=Trainer, **kwargs):
    recorder = Recorder()
    args = config(**{**TREE, **(fields or {})})
    trainer = trainer_class(
        path,
        recorder,
        args,
        agents.rows(),
        processing_class=agents.tokenizer(),
        environment_factory=environment,
        **kwargs,
    )
    return trainer, recorder


def afresh(seed: int, completion: list) -> agents.Counter:
    """An environment in which the actions of a completion are taken from the start."""
    environment = agents.Counter()
    agents.Counter.alive.remove(environment)
    environment.reset(seed)
    for message in completion:  # the calls of the last one too, though their results did not fit
        calls = message.get("tool_calls") or []
        for wanted in ("add", "multiply"):  # TRL runs asynchronous functions after the others
            for function in [call["function"] for call in calls if call["function"]["name"] == wanted]:
                by = function["arguments"]["by"]
                environment.history.append((wanted, by))
                environment.value = environment.value + by if wanted == "add" else environment.value * by
    return environment


LADDER = {
    "snapshot": (agents.WithSnapshots, {}, "restored"),
    "deepcopy": (agents.Copied, {"environment_branching": "deepcopy"}, "restored"),
    "replay": (agents.Counter, {}, "replayed"),
}


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("rung", LADDER)
def test_every_branch_has_the_environment_of_its_prefix(path, config, rung, lookahead):
    environment, fields, metric = LADDER[rung]
    trainer, recorder = build(path, config, environment, {**fields, "branch_lookahead": lookahead})
    trainer.engine_class = agents.TickingEngine if lookahead else agents.ScriptedEngine
    hosts = keep_hosts(trainer)

    for trainer.salt in range(5):
        recorder.seen.clear()
        grown = trainer.grow_trees([agents.rows()[trainer.salt]])[0]
        assert len(recorder.seen) == len(grown.tree.leaves) == 13
        for seed, completion, value, history in recorder.seen:
            expected = afresh(seed, completion)
            assert (value, history) == (expected.value, expected.history)
        assert hosts[-1].mismatches == 0
    assert sum(getattr(host, metric) for host in hosts) > 15
    assert not environment.alive


def keep_hosts(trainer) -> list:
    """Where the hosts of all batches to come will be."""
    hosts, grow = [], trainer._grow

    def record(*args, **kwargs):
        result = grow(*args, **kwargs)
        hosts.append(result[2])
        return result

    trainer._grow = record
    return hosts


def test_turn_entropy_branches_after_what_environments_answer(path, config):
    trainer, _ = build(path, config, agents.WithSnapshots, {"branching": "turn_entropy"})
    grown = trainer.grow_trees([agents.rows()[1]])[0]
    steps = [step for choice in grown.choices for step in choice.steps]
    assert len(steps) == 5 and all(grown.tree.observed()[steps] > 0)


class Moody(agents.Counter):
    """Answers the same action in different ways."""

    alive: list[agents.Counter] = []  # noqa: RUF012
    mood = random.Random(0)

    def add(self, by: int) -> str:
        """
        Add to the number.

        Args:
            by: How much.
        """
        super().add(by)
        return f"It is {self.value} now, {self.mood.choice(['well', 'oh'])}."


def test_an_environment_that_answers_differently_starts_at_the_question(path, config):
    trainer, recorder = build(path, config, Moody)
    hosts = keep_hosts(trainer)
    for trainer.salt in range(3):
        grown = trainer.grow_trees([agents.rows()[1]])[0]
        assert len(grown.tree.leaves) == 13
    mismatches = sum(host.mismatches for host in hosts)
    assert 0 < mismatches < sum(host.replayed for host in hosts)
    for seed, completion, value, history in recorder.seen:
        expected = afresh(seed, completion)
        assert (value, history) == (expected.value, expected.history)
    trainer, _ = build(path, config, Moody, {"max_steps": 3})
    trainer.train()
    replayed, mismatched, restored = (
        sum(entry.get(f"tree/{name}", 0) for entry in trainer.state.log_history)
        for name in ("replayed", "replay_mismatch", "restored")
    )
    assert replayed > mismatched > 0 and restored == 0


class Frail(agents.WithSnapshots):
    """Cannot always go back."""

    alive: list[agents.Counter] = []  # noqa: RUF012
    made = 0

    def _restore(self, state):
        super()._restore(state)
        if self.value % 3 == 0:
            raise ConnectionError("the <b>server</b> is gone")


class Stuck(agents.WithSnapshots):
    """Hangs where it goes back to some states."""

    alive: list[agents.Counter] = []  # noqa: RUF012

    def _restore(self, state):
        super()._restore(state)
        while self.value % 3 == 0:
            time.sleep(0.01)


class Slow(agents.Counter):
    """Hangs now and then."""

    alive: list[agents.Counter] = []  # noqa: RUF012

    async def multiply(self, by: int) -> str:
        """
        Multiply the number.

        Args:
            by: With what.
        """
        if by == 4:
            await agents.asyncio.sleep(1000)
        return await super().multiply(by)


@pytest.mark.parametrize(
    ("environment", "words", "fields"),
    [
        (Frail, "_restore of Frail raised ConnectionError: the <b>server</b> is gone", {}),
        (Stuck, "_restore of Stuck did not end within 0.2 seconds", {"tool_timeout": 0.2}),
        (Slow, "multiply did not answer within 0.2 seconds", {"tool_timeout": 0.2}),
    ],
)
def test_an_environment_that_fails_ends_its_trajectory(path, config, environment, words, fields, caplog):
    trainer, recorder = build(path, config, environment, {**fields, "max_steps": 2})
    failed, grow = [], trainer._grow

    def record(*args, **kwargs):
        trees, scorer, host = grow(*args, **kwargs)
        failed.append([(tree_of(trees, row).success[row % 13], scorer.rewards[row]) for row in host.failed_rows()])
        return trees, scorer, host

    def tree_of(trees, row):
        return trees[row // 13].tree

    trainer._grow = record
    with caplog.at_level("WARNING"):
        trainer.train()
    rows = [row for batch in failed for row in batch]
    assert rows and all(success != success and (rewards != rewards).all() for success, rewards in rows)
    assert len(recorder.seen) + len(rows) == 13 * 2
    assert words in caplog.text and "Its trajectory ends there" in caplog.text
    assert not environment.alive
    assert trainer.state.log_history[0]["loss"] is not None


@pytest.mark.parametrize(
    ("environment", "fields"), [(agents.Copied, {"environment_branching": "deepcopy"}), (Frail, {})]
)
def test_environments_are_closed_once_when_training_ends_with_an_error(path, config, environment, fields, caplog):
    trainer, _ = build(path, config, environment, fields)

    def explode(*args, **kwargs):
        raise KeyboardInterrupt

    trainer.reward_funcs[0] = explode
    with pytest.raises(KeyboardInterrupt), caplog.at_level("WARNING"):
        trainer.train()
    assert not environment.alive
    assert "Closing the environment" not in caplog.text  # a second time raises
    assert ("_restore of Frail" in caplog.text) == (environment is Frail)


class Reluctant(agents.Copied):
    """Does not end where it is closed after an action."""

    alive: list[agents.Counter] = []  # noqa: RUF012

    def _close(self):
        super()._close()
        while self.history:
            time.sleep(0.01)


def test_closing_has_a_limit(path, config, caplog):
    fields = {"environment_branching": "deepcopy", "tool_timeout": 0.05, "tree_levels": 2}
    trainer, _ = build(path, config, Reluctant, {**fields, "per_device_train_batch_size": 5})
    with caplog.at_level("WARNING"):
        trainer.grow_trees([agents.rows()[0]])
    assert not Reluctant.alive
    assert "Closing the environment Reluctant took longer than `tool_timeout`." in caplog.text


class Wrapped(agents.Counter):
    """Its action goes by another name than its class has for it."""

    def add(self, by: int) -> str:
        """
        Add to the number.

        Args:
            by: How much.
        """
        return super().add(by)

    add.__name__ = add.__qualname__ = "increase"


def test_actions_are_found_by_their_function(path, config):
    trainer, recorder = build(path, config, Wrapped, {"max_steps": 1})
    trainer.script = lambda rng, turns: "Go.\n\n" + (agents.call("increase", by=2) if not turns else "")
    trainer.train()
    assert all(value == seed + 2 * len(history) > seed for seed, _, value, history in recorder.seen) and recorder.seen


class Judge:
    """Offers no tools."""

    def reset(self, seed: int, **kwargs) -> str:
        self.seed = seed
        return f"Say {seed}."

    def get_reward(self) -> float:
        return self.seed / 10


def test_an_environment_without_tools(path, config):
    fields = {"tree_levels": 2, "max_completion_length": 20, "max_steps": 1, "per_device_train_batch_size": 5}
    args = config(**{**TREE, **fields})
    trainer = Trainer(path, None, args, agents.rows(), processing_class=agents.tokenizer(), environment_factory=Judge)
    for _ in range(2):
        (grown,) = trainer.grow_trees([agents.rows()[3]])
        assert grown.tree.success == pytest.approx([0.3] * 5)
        trainer.train()


class Undecided(agents.Counter):
    def reset(self, **kwargs):
        super().reset(random.randint(0, 10**9))
        return f"The number is {self.value}."


def test_a_row_with_two_prompts_is_refused(path, config):
    trainer, _ = build(path, config, Undecided)
    with pytest.raises(RuntimeError, match=r"`reset` of the environment Undecided gave different prompts for one row"):
        trainer.train()
    assert not Undecided.alive


class Half(agents.Counter):
    def _snapshot(self):
        return None


class Coroutine(agents.WithSnapshots):
    async def _restore(self, state):
        super()._restore(state)


class Locked(agents.Counter):
    def __init__(self):
        super().__init__()
        self.lock = (item for item in [])  # no copy of a generator can be made


@pytest.mark.parametrize(
    ("environment", "fields", "words"),
    [
        (Half, {}, "Half defines `_snapshot` but not `_restore`"),
        (Coroutine, {}, "`_restore` of the environment Coroutine is asynchronous, .* Make it a plain `def`"),
        (Locked, {"environment_branching": "deepcopy"}, "a copy of the environment Locked cannot be made: TypeError"),
    ],
)
def test_environments_that_no_branch_could_have_are_refused(path, config, environment, fields, words):
    with pytest.raises(ValueError, match=words):
        build(path, config, environment, fields)


def test_several_environments_and_tools_beside_them(path, config):
    """TRL's routing of rows to environments; tools without state are not asked again when a prefix is replayed."""
    asked = []

    def note(by: int) -> str:
        """
        Note something.

        Args:
            by: What.
        """
        asked.append(by)
        return f"noted {len(asked)}"

    class Noting(Trainer):
        def script(self, rng, turns):
            if rng.random() < 0.25:
                return f"Enough {rng.random()}."
            return f"{rng.random()} " + agents.call("note", by=1) + agents.call("add", by=rng.randint(1, 9))

    data = agents.rows().map(lambda row, index: {"environment": ["one", "two"][index % 2]}, with_indices=True)
    args = config(**TREE, max_steps=1, gradient_accumulation_steps=2, shuffle_dataset=False)
    factories = {"one": agents.Counter, "two": agents.WithSnapshots}
    trainer = Noting(
        path,
        Recorder(),
        args,
        data,
        processing_class=agents.tokenizer(),
        environment_factory=factories,
        tools=[note],
    )
    hosts = keep_hosts(trainer)
    trainer.train()
    (host,) = hosts
    assert host.replayed and host.restored and not host.mismatches
    conversations = list(host.conversations.values())
    noted = re.findall(r"noted (\d+)", json.dumps([each.messages for each in conversations]))
    assert len(noted) > len(set(noted))  # what was inherited says what it said before
    dropped = sum("tool_calls" in each.messages[-1] for each in conversations)  # results that did not fit
    assert len(asked) == len(set(noted)) + dropped
