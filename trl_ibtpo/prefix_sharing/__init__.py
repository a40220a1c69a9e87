"""The prefix-shared forward: each token that rows of a micro-batch share is computed once."""
