"""avg@k and pass@k of a model, on a file of questions or a benchmark of the harness."""
