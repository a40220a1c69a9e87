"""Rollout engines: `submit` requests, `poll` for finished rollouts."""

from .base import Rollout, RolloutEngine, RolloutRequest

__all__ = ["Rollout", "RolloutEngine", "RolloutRequest"]
