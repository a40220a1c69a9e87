"""Latents that steer the branches of a rollout, as in I2B-LPO (arXiv 2601.05870)."""
