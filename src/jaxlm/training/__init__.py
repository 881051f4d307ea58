"""Training: from scratch, fine-tuning, LoRA.

sources.py      what is named (files, folders, globs, hub datasets) -> rows
texts.py        rows -> documents: token ids, and which of them are learned; forms detected and named
turns.py        which part of a rendered conversation is the assistant's, to the character
corpus.py       documents -> arrays on disk (memory-mapped, a cache keyed by contents), counts of what was dropped
batches.py      corpus -> packed rows -> batches: pure functions of (seed, step)
"""
