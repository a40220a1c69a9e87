"""How a latent travels with a request to an engine, whatever is done with it there."""

from contextlib import contextmanager

import pytest
import torch
from test_transformers_engine import PAD, PREFIXES, TOKENIZER, expected_logprobs, generation_config, model  # noqa: F401

from trl_ibtpo.engines.base import Rollout, RolloutRequest
from trl_ibtpo.engines.routed import RoutedEngine
from trl_ibtpo.engines.transformers import TransformersEngine


class Push:
    """Adds a row's latent to the logits of its first tokens of the vocabulary, and remembers what it was asked."""

    def __init__(self):
        self.forks, self.open = None, False

    @contextmanager
    def steer(self, requests, padding):
        shift = torch.zeros(len(requests), len(TOKENIZER))
        for row, request in zip(shift, requests, strict=True):
            if request.latent is not None:
                row[: len(request.latent)] = torch.tensor(request.latent)
        self.forks, self.open = [pad + each.fork for pad, each in zip(padding, requests, strict=True)], True
        try:
            yield [lambda input_ids, scores: scores + shift]
        finally:
            self.open = False


def request(number, latent=None, fork=0):
    return RolloutRequest(number, PREFIXES[number], 12, seed=number, latent=latent, fork=fork)


def test_sampling_logprobs_are_those_with_the_latent(model):  # noqa: F811
    """Row 1 is pushed, row 3 is not; forks are columns of the padded batch; temperature comes after the push."""
    latents = Push()
    engine = TransformersEngine(model, generation_config(temperature=2.0), PAD, latents=latents)
    torch.manual_seed(0)
    engine.submit([request(1, latent=(60.0, -9.0), fork=2), request(3)])
    pushed, plain = engine.poll()
    assert latents.forks == [12 + 2, 0] and not latents.open
    assert plain.logprobs == pytest.approx(
        expected_logprobs(model, PREFIXES[3], plain.token_ids, temperature=2.0), abs=1e-4
    )
    ids = torch.tensor([PREFIXES[1] + pushed.token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(PREFIXES[1]) - 1 : -1]
    logits[:, :2] += torch.tensor([60.0, -9.0])
    expected = torch.log_softmax(logits / 2, -1).gather(1, ids[0, len(PREFIXES[1]) :, None])[:, 0]
    assert pushed.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert 0 in pushed.token_ids


def test_steering_ends_when_generation_fails(model, monkeypatch):  # noqa: F811
    latents = Push()
    engine = TransformersEngine(model, generation_config(), PAD, latents=latents)
    engine.submit([request(1, latent=(1.0,))])
    monkeypatch.setattr(model, "generate", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.poll()
    assert latents.forks == [0] and not latents.open


def test_an_engine_without_latents_refuses_one(model):  # noqa: F811
    engine = TransformersEngine(model, generation_config(), PAD)
    with pytest.raises(ValueError, match=r"request 1 has a latent, but .* leave `latent_mode` at 'none'"):
        engine.submit([request(0), request(1, latent=(1.0,))])
    assert engine.poll() == []  # nothing of it was taken


class Slow:
    """Answers one request a poll, and says of running ones that they have two tokens."""

    clock = "tokens"

    def __init__(self, max_length=None, at_once=False):
        self.max_length, self.at_once, self.queue, self.batches = max_length, at_once, [], []

    def submit(self, requests):
        self.queue += requests

    def poll(self):
        count = len(self.queue) if self.at_once else 1
        done, self.queue = self.queue[:count], self.queue[count:]
        self.batches.append([each.request_id for each in done])
        return [Rollout(each.request_id, [7], [0.0]) for each in done]

    def generated(self, request_id):
        return 2 if any(each.request_id == request_id for each in self.queue) else 0

    def partial(self, request_id, start, stop):
        return [7, 7][start:stop], [0.0, 0.0][start:stop]

    def abort(self):
        self.queue = []


def test_requests_with_latents_go_to_the_engine_that_steers():
    """Two plain requests are answered one a poll; those with latents wait for them and run as one batch."""
    plain, steered = Slow(max_length=40), Slow(at_once=True)
    engine = RoutedEngine(plain, steered)
    assert engine.max_length == 40 and engine.clock == "tokens"
    engine.submit([request(0), request(1, latent=(1.0,)), request(2), request(3, latent=(2.0,))])
    assert engine.generated(0) == 2 and engine.generated(1) == 0
    assert engine.partial(0, 0, 1) == ([7], [0.0])
    answered = []
    for _ in range(3):
        answered += [rollout.request_id for rollout in engine.poll()]
    assert answered == [0, 2, 1, 3]
    assert plain.batches == [[0], [2]] and steered.batches == [[1, 3]]
    engine.submit([request(0), request(1, latent=(1.0,))])
    engine.abort()
    assert engine.poll() == [] and plain.queue == steered.queue == []
