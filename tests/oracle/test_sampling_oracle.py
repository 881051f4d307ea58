"""Processed logits against transformers' processors, in the order its `generate` puts them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.inference import sampling
from jaxlm.inference.sampling_params import SamplingParams

pytestmark = pytest.mark.oracle

V = 53
# With ties only what keeps them whole: transformers cuts through a tie at the edge of top-p, as its sort left it.
TIED = [{"top_k": 5}, {"top_k": V + 9}, {"min_p": 0.1}, {"temperature": 0.6, "top_k": 20, "min_p": 0.05}]
DISTINCT = [
    *TIED,
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_p": 0.9},
    {"top_p": 0.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.3},
    {"temperature": 2.5, "top_k": 30, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 0.7},
]
process = jax.jit(sampling.process)


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )


def oracle(model, x, prompt, pos, bias, options):
    """The logits [B, V] that transformers draws from after `prompt` [B, T], padded on the left where `pos` is -1."""
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(do_sample=True, sequence_bias={(k,): v for k, v in bias.items()} or None, **options)
    processors = model._get_logits_processor(
        settings,
        input_ids_seq_length=prompt.shape[1],
        model_kwargs={"attention_mask": torch.tensor(pos >= 0).long()},
        device="cpu",
    )
    return processors(torch.tensor(prompt), torch.tensor(x)).numpy()


@pytest.mark.parametrize("bias", [{}, {0: 2.5, 7: -100.0}], ids=["plain", "bias"])
@pytest.mark.parametrize(("options", "tied"), [*((o, True) for o in TIED), *((o, False) for o in DISTINCT)], ids=str)
def test_processed_logits_are_transformers(model, options, tied, bias):
    batch, length = 6, 9
    rng = np.random.default_rng(11)
    x = rng.normal(size=(batch, V)).astype(np.float32) * 3
    if tied:
        x = np.round(x)
    prompt = rng.integers(1, V, (batch, length))
    prompt[:, 5] = 0  # token 0 counts where it is a token, and not where it pads
    pos = np.maximum(np.arange(length) - np.array([0, 3, 1, 0, 8, 2])[:, None], -1)
    prompt[pos < 0] = 0
    got = process(
        jnp.asarray(x),
        sampling.Sampling.of([SamplingParams(**{"temperature": 1.0, **options}).resolve({})] * batch),
        sampling.count(jnp.asarray(prompt, jnp.int32), jnp.asarray(pos, jnp.int32), V),
        sampling.bias_of([bias] * batch, V) if bias else None,
    )
    want = oracle(model, x, prompt, pos, bias, {"top_k": 0, "top_p": 1.0, **options})
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert np.isinf(want).any() == (options.get("top_k", V) < V or "top_p" in options or "min_p" in options)
