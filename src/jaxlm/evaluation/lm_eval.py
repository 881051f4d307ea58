"""jaxlm's models in EleutherAI's lm-eval harness (the package lm_eval, extra `eval`).

Requests are tokenized, truncated to the context and scored as in the harness's class for transformers models (HFLM), so
that results are comparable with published ones. BOS is added whenever the tokenizer adds it, even before a text whose
first token is predicted from BOS.
"""

# pyright: reportMissingImports=false
# lm_eval is optional: types are checked with and without it.

import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from jaxlm.data.documents import boundary_tokens
from jaxlm.evaluation.scoring import ScoreRequest, scores
from jaxlm.inference.generation import stream
from jaxlm.inference.sampling_params import unsupported

if TYPE_CHECKING:
    from jaxlm.model import Model

MAX_TOKENS = 256  # of an answer if the task does not say; HFLM's default
BOOTSTRAP = 1000  # resamplings for standard errors; the harness's 100,000 take up to hours in one process
SEED = 0  # of sampled answers, so that results are reproducible
SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")


class Harness(TemplateLM):
    """A model for the harness.

    Args:
        model: The model.
        length: Maximum number of tokens per sequence. Default: the context length of the model.
        batch: Batch size in rows. The default depends on the platform.
    """

    def __init__(self, model: "Model", length: int | None = None, batch: int | None = None):
        super().__init__()
        if model.tokenizer is None:
            raise ValueError(f"{model.source} has no tokenizer: load it with tokenizer=FOLDER (--tokenizer)")
        self.model, self.batch = model, batch
        self.tokenizer: Any = model.tokenizer.hf
        self.max_length = length or model.config.context
        before, after = boundary_tokens(model.tokenizer)  # BOS and EOS of a tokenizer that does not name them
        ends = [self.tokenizer.eos_token_id, *after[-1:], *model.tokenizer.eos_ids]
        begins = [self.tokenizer.bos_token_id, *before[:1], *ends]
        self._end, self._begin = (next((i for i in ids if i is not None), None) for ids in (ends, begins))
        if self._end is None or self._begin is None:
            raise ValueError(f"the tokenizer of {model.source} has no EOS, which the harness needs: set eos_token in "
                             "its tokenizer_config.json")  # fmt: skip

    @property
    def eot_token_id(self) -> Any:
        return self._end

    @property
    def prefix_token_id(self) -> Any:
        """The token that a text is predicted from: BOS, or EOS without a BOS."""
        return self._begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encodes with the special tokens that the tokenizer adds, unless the text begins with BOS already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation. If the template does not support a system message, it is omitted."""
        assert self.model.tokenizer is not None
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.model.tokenizer.render(chat_history, **options)
        except ValueError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            return self.model.tokenizer.render(rest, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether it is the result of greedy decoding.

        Requests with the same input (answers of one token to the same question) are computed once.

        Args:
            requests: Texts, ids of the context, ids of the continuation.
            disable_tqdm: Whether to hide the progress bar.
            kwargs: Unused.
        """
        same: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length or not context:
                raise ValueError(f"a task has a continuation of {len(continuation):,} tokens after a context of "
                                 f"{len(context):,}: both need at least one token, and the continuation at most "
                                 f"{self.max_length:,} (--length)")  # fmt: skip
            read = (context + continuation)[-self.max_length - 1 : -1]  # truncated on the left
            same.setdefault(tuple(read), []).append(number)
        score_requests, groups = [], list(same.values())
        for read, numbers in same.items():
            continuations = [requests[number][2] for number in numbers]
            positions = [np.arange(len(read) - len(tokens), len(read)) for tokens in continuations]
            score_requests.append(
                ScoreRequest(np.array(read), np.concatenate(positions), np.concatenate(continuations))
            )
        answers: dict[int, tuple[float, bool]] = {}
        with _bar(len(requests), "log-likelihoods", disable_tqdm) as bar:
            for index, score in scores(self.model, score_requests, self.batch):
                begin = 0
                for number in groups[index]:
                    to = slice(begin, begin + len(requests[number][2]))
                    answers[number] = float(score.logprobs[to].sum(dtype=np.float64)), bool(score.greedy[to].all())
                    begin = to.stop
                bar.update(len(groups[index]))
        for number, (texts, *_) in enumerate(requests):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[number])
        return [answers[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text, in disjoint windows."""
        windows: list[Any] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm)):
            sums[number] += logprob
        for request, logprob in zip(requests, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates text after each context, up to a stop string."""
        same: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            same.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers = [""] * len(requests)
        with _bar(len(requests), "answers", disable_tqdm) as bar:
            for numbers in same.values():
                group = [requests[number].args for number in numbers]
                for i, text in self._generate([context for context, _ in group], group[0][1]):
                    answers[numbers[i]] = text
                    self.cache_hook.add_partial("generate_until", group[i], text)
                    bar.update(1)
        return answers

    def _generate(self, contexts: list[str], arguments: dict[str, Any]) -> Iterable[tuple[int, str]]:
        """Yields the index and the answer of each context as they are ready. arguments: the generation_kwargs."""
        options = normalize_gen_kwargs(arguments, MAX_TOKENS)
        max_tokens, until = options.pop("max_gen_toks"), [text for text in options.pop("until") if text]
        sampling: dict[str, Any] = {name: options.pop(name) for name in SAMPLING if name in options}
        temperature = options.pop("temperature", 0.0)
        if unknown := unsupported({**options, "do_sample": None}) + [x for x in ("max_length",) if x in options]:
            raise ValueError(f"a task's generation_kwargs have {', '.join(unknown)}, which jaxlm does not support")
        if max_tokens >= self.max_length:
            raise ValueError(f"a task generates answers of {max_tokens:,} tokens, but the length is "
                             f"{self.max_length:,} with the question: use a larger --length")  # fmt: skip
        ids = [
            self.tok_encode(context)[max_tokens - self.max_length :] or [self.prefix_token_id] for context in contexts
        ]
        tokens: list[list[int]] = [[] for _ in ids]
        sampling |= {"max_tokens": max_tokens, "temperature": temperature, "stop": until, "seed": SEED}
        for piece in stream(self.model, ids, batch_size=self.batch, **sampling):
            tokens[piece.index] += piece.tokens
            if piece.finish_reason is not None:  # as in HFLM, the tokens of the answer are decoded alone
                text = self.tokenizer.decode(tokens[piece.index], skip_special_tokens=True)
                stops = [*until, self.tokenizer.decode([self.eot_token_id])]
                yield piece.index, postprocess_generated_text(text, stops, None)


def _bar(total: int, what: str, disable: bool) -> Any:
    """Returns a progress bar on stderr, shown only on a terminal."""
    return tqdm(total=total, desc=what, disable=disable or not sys.stderr.isatty())


def run(
    model: "Model",
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    length: int | None = None,
    batch: int | None = None,
) -> dict[str, Any]:
    """Runs tasks of the harness, and returns its results.

    Args:
        model: The model.
        tasks: Names of tasks; * and ? are wildcards.
        folder: Folder with YAML files of more tasks.
        shots: Few-shot examples per question. Default: defined by the task.
        limit: Maximum number of questions per task.
        chat: Whether to apply the chat template.
        length, batch: See Harness.

    Raises ValueError for unknown tasks.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: pass one with YAML files of tasks (--tasks-folder)")
    if chat and not (model.tokenizer and model.tokenizer.has_template):
        raise ValueError(f"{model.source} has no chat template: omit --chat")
    harness = Harness(model, length, batch)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    known = manager.all_tasks
    for name in tasks:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, known, n=3)
            hint = (
                f"did you mean {' or '.join(close)}?"
                if close
                else "name the folder of its YAML file with --tasks-folder"
            )
            raise ValueError(f"lm-eval has no task {name!r}: {hint}")
    options = {"num_fewshot": shots, "limit": limit, "apply_chat_template": chat, "bootstrap_iters": BOOTSTRAP}
    results = simple_evaluate(harness, tasks=[*manager.match_tasks(list(tasks))], task_manager=manager, **options)
    assert results is not None  # every process of a distributed run has them
    return dict(results)
