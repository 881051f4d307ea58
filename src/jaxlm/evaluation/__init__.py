"""Evaluation: log-likelihoods, perplexity, bits per byte, and the tasks of lm-eval."""
