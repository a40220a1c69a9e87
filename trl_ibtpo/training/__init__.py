"""What a training step needs besides trees: rollouts in, rewards and metrics out, checkpoints, checks."""
