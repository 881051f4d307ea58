"""Training: from random weights, full fine-tuning, and LoRA.

config.py            Run: the configuration as Python argument, YAML file and flags
setup.py             from a Run to data loaders, mesh, optimizer and the abstract training state
vocabulary.py        a chat template for a base model, and rows of weights for its new tokens
loaders.py           the data loaders of a run
init_state.py        the first training state: random weights, a checkpoint, or an adapter
loop.py              train(): the training loop, its evaluations and samples
signals.py           Ctrl-C and SIGTERM stop a run after its current step
samples.py           sample texts of the current weights
step.py              the training step: gradient accumulation, mixed precision, FSDP shardings
loss.py              cross-entropy and z-loss over the loss mask, in chunks
optimizers.py        optax optimizers and learning rate schedules
resume.py            checkpoints (Orbax), and the checks before a run resumes
metrics.py           metrics.jsonl, TensorBoard, Weights & Biases, the loss plot
dry_run.py           memory per device, steps, tokens and examples of a run
train_tokenizer.py   new tokenizers

Rows become batches in jaxlm.data.
"""
