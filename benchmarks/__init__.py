"""Meta-steps of maml_fast and its peers, same data, same run: `python -m benchmarks`."""
