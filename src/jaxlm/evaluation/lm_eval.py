"""jaxlm's models in EleutherAI's lm-eval harness (the package lm_eval, extra `eval`).

What a task asks is tokenized, cut to the context and scored as the harness' own class for transformers' models (HFLM)
does it, so that figures compare with published ones: BOS wherever the tokenizer adds it, also in front of a text whose
first token is predicted from BOS.
"""

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

from jaxlm.data.documents import added
from jaxlm.evaluation.scoring import ScoreRequest, scores
from jaxlm.inference.generation import stream
from jaxlm.inference.sampling_params import unsupported

if TYPE_CHECKING:
    from jaxlm.model import Model

TOKENS = 256  # of an answer, where a task does not say: HFLM's
RESAMPLED = 1000  # times, for errors of scores that are no means: the harness' 100,000 take up to hours in one process
SEED = 0  # of answers that are drawn: the same every time
SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")


class Harness(TemplateLM):
    """A model as the harness wants it.

    Args:
        length: tokens that the model reads at once; its context when not given.
        batch: rows that are computed together.
    """

    def __init__(self, model: "Model", length: int | None = None, batch: int | None = None):
        super().__init__()
        if model.tokenizer is None:
            raise ValueError(f"{model.source} has no tokenizer: load it with tokenizer=FOLDER (--tokenizer)")
        self.model, self.batch = model, batch
        self.tokenizer: Any = model.tokenizer.hf
        self.max_length = length or model.config.context
        before, after = added(model.tokenizer)  # what BOS and EOS are, where no file names them
        ends = [self.tokenizer.eos_token_id, *after[-1:], *model.tokenizer.eos_ids]
        begins = [self.tokenizer.bos_token_id, *before[:1], *ends]
        self._end, self._begin = (next((i for i in ids if i is not None), None) for ids in (ends, begins))
        if self._end is None or self._begin is None:
            raise ValueError(f"the tokenizer of {model.source} has no EOS, where the harness ends answers: name it in "
                             "its tokenizer_config.json (eos_token)")  # fmt: skip

    @property
    def eot_token_id(self) -> Any:
        return self._end

    @property
    def prefix_token_id(self) -> Any:
        """What a text is predicted from: BOS, or EOS where there is none."""
        return self._begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """With what the tokenizer adds, unless the text begins with BOS already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without its system message where the template refuses that."""
        assert self.model.tokenizer is not None
        how: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.model.tokenizer.render(chat_history, **how)
        except ValueError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            return self.model.tokenizer.render(rest, **how)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(texts, context, continuation) -> the log-probability of each continuation, and whether it is what greedy
        decoding gives. Requests that read the same tokens (answers of one token to one question) are read once."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length or not context:
                raise ValueError(f"a task asks for {len(continuation):,} tokens after {len(context):,}: there must be "
                                 f"one of each, and at most {self.max_length:,} (--length)")  # fmt: skip
            read = (context + continuation)[-self.max_length - 1 : -1]  # cut from the left
            alike.setdefault(tuple(read), []).append(number)
        pieces, groups = [], list(alike.values())
        for read, numbers in alike.items():
            asked = [requests[number][2] for number in numbers]
            at = [np.arange(len(read) - len(tokens), len(read)) for tokens in asked]
            pieces.append(ScoreRequest(np.array(read), np.concatenate(at), np.concatenate(asked)))
        answers: dict[int, tuple[float, bool]] = {}
        with _bar(len(requests), "log-likelihoods", disable_tqdm) as bar:
            for piece, found in scores(self.model, pieces, self.batch):
                begin = 0
                for number in groups[piece]:
                    to = slice(begin, begin + len(requests[number][2]))
                    answers[number] = float(found.logprobs[to].sum(dtype=np.float64)), bool(found.greedy[to].all())
                    begin = to.stop
                bar.update(len(groups[piece]))
        for number, (texts, *_) in enumerate(requests):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[number])
        return [answers[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows that do not overlap."""
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
        """What the model writes after each context, up to a stop string."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers = [""] * len(requests)
        with _bar(len(requests), "answers", disable_tqdm) as bar:
            for numbers in alike.values():
                asked = [requests[number].args for number in numbers]
                for i, text in self._written([context for context, _ in asked], asked[0][1]):
                    answers[numbers[i]] = text
                    self.cache_hook.add_partial("generate_until", asked[i], text)
                    bar.update(1)
        return answers

    def _written(self, contexts: list[str], asked: dict[str, Any]) -> Iterable[tuple[int, str]]:
        """The number and the answer of each context, as they are ready."""
        options = normalize_gen_kwargs(asked, TOKENS)
        most, until = options.pop("max_gen_toks"), [text for text in options.pop("until") if text]
        given = {name: options.pop(name) for name in SAMPLING if name in options}
        temperature = options.pop("temperature", 0.0)
        if unknown := unsupported({**options, "do_sample": None}) + [x for x in ("max_length",) if x in options]:
            raise ValueError(f"a task's generation_kwargs ask for {', '.join(unknown)}, which jaxlm does not do")
        if most >= self.max_length:
            raise ValueError(f"a task asks for answers of {most:,} tokens, and with what they answer there is room for "
                             f"{self.max_length:,}: use another model, or a larger --length")  # fmt: skip
        ids = [self.tok_encode(context)[most - self.max_length :] or [self.prefix_token_id] for context in contexts]
        tokens: list[list[int]] = [[] for _ in ids]
        how = {"max_tokens": most, "temperature": temperature, "stop": until, "seed": SEED, **given}
        for piece in stream(self.model, ids, batch_size=self.batch, **how):
            tokens[piece.index] += piece.tokens
            if piece.finish_reason is not None:  # as HFLM: the answer's tokens as a text of their own
                text = self.tokenizer.decode(tokens[piece.index], skip_special_tokens=True)
                stops = [*until, self.tokenizer.decode([self.eot_token_id])]
                yield piece.index, postprocess_generated_text(text, stops, None)


def _bar(total: int, what: str, disable: bool) -> Any:
    """Progress on stderr, where that is a terminal."""
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
    """The harness' results of these tasks (names, with * and ?).

    folder: where YAML files of more tasks are. shots: examples before each question; as the task says when not given.
    limit: questions of each task. chat: through the chat template. length, batch: see Harness. ValueError for unknown
    tasks.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder: name one with YAML files of tasks (--tasks-folder)")
    if chat and not (model.tokenizer and model.tokenizer.has_template):
        raise ValueError(f"{model.source} has no chat template: leave --chat out")
    adapted = Harness(model, length, batch)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    known = manager.all_tasks
    for name in tasks:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "its YAML file is found by --tasks-folder"
            raise ValueError(f"lm-eval has no task {name!r}: {hint}")
    how = {"num_fewshot": shots, "limit": limit, "apply_chat_template": chat, "bootstrap_iters": RESAMPLED}
    found = simple_evaluate(adapted, tasks=[*manager.match_tasks(list(tasks))], task_manager=manager, **how)
    assert found is not None  # of several processes each has the results
    return dict(found)
