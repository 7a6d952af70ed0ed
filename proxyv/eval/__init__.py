"""Evaluation on benchmarks: scores of a model with the evidence for each sample."""
