"""Scoring of texts: perplexity, bits per byte, and the tasks of lm-eval."""
