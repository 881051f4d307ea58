"""Starts `jaxlm serve`, and asks it through the openai client.

    pip install -e '.[server]' openai
    python examples/serve_and_ask.py
    python examples/serve_and_ask.py --model Qwen/Qwen3-0.6B --question "Name three rivers."

The server listens on 127.0.0.1 only, on a free port, and ends with this script. docs/serving.md describes it.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import tyro


def main(
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct", question: str = "Why is the sky blue?", max_tokens: int = 64
) -> tuple[str, str]:
    """Returns the answer as a whole, and the same one as it was streamed.

    Args:
        model: Hub id, folder or .gguf file of a model with a chat template.
        question: What to ask.
        max_tokens: Maximum number of tokens of the answer.
    """
    with serving(model) as url:
        client = openai.OpenAI(base_url=url, api_key="none")
        name = client.models.list().data[0].id
        print(f"{name} at {url}\nuser: {question}")
        messages = [{"role": "user", "content": question}]
        options = {"model": name, "messages": messages, "max_tokens": max_tokens, "temperature": 0}

        answer = client.chat.completions.create(**options)
        print(f"assistant: {answer.choices[0].message.content}")
        print(f"{answer.usage.prompt_tokens} tokens in the prompt, {answer.usage.completion_tokens} in the answer")

        print("the same, streamed: ", end="")
        streamed = ""
        for chunk in client.chat.completions.create(**options, stream=True):
            if chunk.choices and chunk.choices[0].delta.content:
                streamed += chunk.choices[0].delta.content
                print(chunk.choices[0].delta.content, end="", flush=True)
        print()
    return answer.choices[0].message.content, streamed


@contextmanager
def serving(model: str) -> Iterator[str]:
    """Runs the server while the block runs. Yields its address."""
    command = [sys.executable, "-m", "jaxlm", "serve", "-m", model, "--port", "0", "--quiet"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip()  # with --quiet, all that the server prints
        if not url:
            raise SystemExit("The server did not start: its error is above.")
        yield url
    finally:
        server.terminate()  # it finishes the running answers, and ends
        server.communicate()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
