"""Sample texts of a run: prompts that the current weights continue, or answer if the data are conversations."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jaxlm.inference.prompts import resolve_max_tokens, to_ids
from jaxlm.model import Model

if TYPE_CHECKING:
    from jaxlm.training.setup import Setup


def check(setup: "Setup") -> None:
    """Raises ValueError for a sample prompt that is empty or longer than the context."""
    for prompt in setup.run.samples:
        _limit(setup, setup.model(), _prompt(setup, prompt))  # prompts need no weights


def generate_all(setup: "Setup", weights: Any) -> Iterator[dict[str, Any]]:
    """Yields each sample prompt with the text that continues it, or with the answer if the data are conversations.

    Args:
        setup: The run.
        weights: All weights, layers listed.
    """
    from jaxlm.inference.generation import generate

    run, model = setup.run, setup.model(weights)
    for i, text in enumerate(run.samples):
        prompt = _prompt(setup, text)
        options: dict[str, Any] = {"max_tokens": _limit(setup, model, prompt), "temperature": 0.8}
        options |= {"seed": (run.seed + i) % (1 << 32), "template_args": _template_args(prompt, setup)}
        yield {"prompt": text, "text" if prompt is text else "answer": generate(model, prompt, **options).text}


def _prompt(setup: "Setup", text: str) -> Any:
    """Returns a sample prompt as it is, or as a conversation if the run trains on conversations."""
    is_chat = setup.tokenizer.has_template and not setup.data.are_texts()
    return [{"role": "user", "content": text}] if is_chat and text else text


def _template_args(prompt: Any, setup: "Setup") -> dict[str, Any]:
    return {} if isinstance(prompt, str) else setup.run.data.template_variables


def _limit(setup: "Setup", model: Model, prompt: Any) -> int:
    """Returns the maximum number of tokens of a sample text, within the context."""
    ids = to_ids(model, prompt, _template_args(prompt, setup))
    return min(setup.run.sample_tokens, resolve_max_tokens(model, ids, None))
