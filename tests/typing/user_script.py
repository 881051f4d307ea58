"""What a user may write, for pyright in strict mode. It is never run."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from collections.abc import Sequence
from typing import assert_type

import jaxlm
from jaxlm.inference.generation import Completion, CompletionChunk

model = jaxlm.load("org/name", dtype="bfloat16", revision="main")
weights, forward, init_kv, tokenizer, config = model

text = jaxlm.generate(model, "Once upon a time", max_tokens=64)
assert_type(text, Completion)
print(text.upper(), text.tokens, text.finish_reason, text.tokens_per_second)

chat = jaxlm.generate(model, [{"role": "user", "content": "Hello"}], temperature=0.7, seed=1)
assert_type(chat, Completion)

continued = jaxlm.generate(model, [1, 2, 3], stop="\n")
assert_type(continued, Completion)

batch = jaxlm.generate(model, ["a", "b"], batch_size=2)
assert_type(batch, list[Completion])

ids: list[list[int]] = [[1, 2], [3]]
assert_type(jaxlm.generate(model, ids), list[Completion])

for chunk in jaxlm.stream(model, "Once", top_p=0.9, logprobs=3):
    assert_type(chunk, CompletionChunk)
    print(chunk, chunk.index)

logits, kv = model.forward([[1, 2, 3]], model.weights, model.init_kv(1, 8), 0)
print(logits.shape, kv)

logits, acts = model.activations([[1, 2, 3]], ["layers.*.mlp"], patch={"embedding": lambda x: x, "layers.0.mlp": 0.0})
print(logits.shape, acts["layers.1.mlp"].shape, model.activation_names)
logits, acts, kv = model.activations([[1]], "embedding", kv=model.init_kv(1, 8))
print(kv.length)

if tokenizer is not None:
    print(tokenizer.token_text(1), tokenizer.token_bytes(1).hex())

conversation = jaxlm.Conversation(model, system="Be brief.", temperature=0.7)
for chunk in conversation.send("Why is the sky blue?"):
    print(chunk)

prompts: Sequence[str] = ("a", "b")
print(len(jaxlm.generate(model, prompts)))

# A misspelled option, and a wrong type, are errors.
jaxlm.generate(model, "a", temprature=1.0)  # pyright: ignore[reportCallIssue]
jaxlm.generate(model, "a", max_tokens="many")  # pyright: ignore[reportCallIssue, reportArgumentType]
