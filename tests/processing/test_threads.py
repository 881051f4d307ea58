"""Threads that share a Tokenizer get the results of a single one."""

import copy
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from helpers.all_tokenizers import KINDS, make
from helpers.tiny_tokenizers import PROSE, SMALL
from processing.test_tokenizer import TEXT

from jaxlm.processing.detokenizer import TextStream
from jaxlm.processing.shared_lock import SharedLock
from jaxlm.processing.template_rendering import write
from jaxlm.processing.tokenizer import Tokenizer

THREADS = 16
TEXTS = [TEXT + PROSE * n for n in (1, 2, 3)] + [f"{n} words of a short text" for n in range(5)]
TEMPLATE = (
    "{{ bos_token or '' }}{% set seen = namespace(count=0) %}"
    "{% for m in messages %}{% set seen.count = seen.count + 1 %}"
    "{{ '<|im_start|>' + m.role + ' ' + seen.count | string + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module", params=[kind for kind in KINDS if not kind.endswith(".model")])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tok = make(request.param, tmp_path_factory.mktemp("tokenizer"))
    tok.hf.chat_template = TEMPLATE
    return tok


@pytest.fixture(scope="module", params=SMALL)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make(request.param, tmp_path_factory.mktemp("small"))


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of functions that run at the same time in threads of their own; exceptions are results."""
    results: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        start.wait()
        try:
            results[i] = jobs[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads)
    return results


def everything(tok: Tokenizer, texts: Sequence[str]) -> list[Any]:
    """What a Tokenizer makes of these texts."""
    out: list[Any] = []
    for text in texts:
        ids = tok.encode(text)
        stream = TextStream(tok, stop="words", skip_special=False)
        turns = [{"role": "user", "content": text[:200]}, {"role": "assistant", "content": text[-50:]}] * 3
        out += [ids, tok.decode(ids), [stream.push(i) for i in ids[:300]], stream.stopped, tok.token_bytes(ids[0])]
        out += [tok.render(turns), write(tok.hf, turns), tok.chat(turns), tok.thinking]
    return out


def test_results_are_those_of_one_thread(tokenizer: Tokenizer) -> None:
    orders = [TEXTS[n % len(TEXTS) :] + TEXTS[: n % len(TEXTS)] for n in range(THREADS)]
    expected = [everything(tokenizer, order) for order in orders]
    fresh = copy.deepcopy(tokenizer)  # caches that are filled later are filled by the threads
    assert at_once([lambda order=order: everything(fresh, order) for order in orders]) == expected


@pytest.mark.parametrize(
    ("options", "length"),
    [({"truncation": True, "max_length": 5}, 5), ({"padding": "max_length", "max_length": 4000}, 4000)],
)
def test_options_of_a_call_stay_in_their_thread(small: Tokenizer, options: dict[str, Any], length: int) -> None:
    """transformers sets truncation and padding on the Rust tokenizer, which all threads share."""
    tok = copy.deepcopy(small)
    tok.hf.pad_token = tok.hf.convert_ids_to_tokens(0)
    text = TEXTS[0]
    ids = tok.encode(text)

    def encode() -> bool:
        return all(tok.encode(text) == ids for _ in range(20))

    def call() -> bool:
        return all(len(tok(text, **options).input_ids) == length for _ in range(20))

    assert at_once([encode, call] * (THREADS // 2)) == [True] * THREADS


def test_tokenizers_of_one_transformers_tokenizer_share_its_lock(small: Tokenizer) -> None:
    other = Tokenizer(small.hf, [1])
    assert other._lock is small._lock
    assert copy.deepcopy(small)._lock is not small._lock


def test_a_used_tokenizer_can_be_pickled(small: Tokenizer) -> None:
    ids = small.encode(TEXT)
    assert pickle.loads(pickle.dumps(small)).encode(TEXT) == ids


def test_a_shared_lock_admits_many_or_one() -> None:
    lock, inside, most, mixed = SharedLock(), [0, 0], [0, 0], []

    def hold(kind: int) -> None:
        for _ in range(10):
            with (lock.shared, lock.exclusive)[kind]():
                inside[kind] += 1
                most[kind] = max(most[kind], inside[kind])
                mixed.append(all(inside))
                time.sleep(1e-3)
                inside[kind] -= 1

    assert at_once([lambda: hold(0)] * 6 + [lambda: hold(1)] * 3) == [None] * 9
    assert not any(mixed)
    assert most[0] > 1
    assert most[1] == 1


def test_a_shared_lock_is_released_by_an_error() -> None:
    lock = SharedLock()

    def fail() -> None:
        for enter in (lock.shared, lock.exclusive, lock.exclusive):
            with pytest.raises(KeyError), enter():
                raise KeyError
        with lock.shared():
            pass

    assert at_once([fail]) == [None]


def test_who_waits_for_the_lock_alone_is_not_passed() -> None:
    """Threads that share the lock in turn would otherwise keep it for ever."""
    lock, done = SharedLock(), threading.Event()

    def share() -> bool:
        end = time.monotonic() + 5
        while not done.is_set() and time.monotonic() < end:
            with lock.shared():
                time.sleep(2e-3)
        return done.is_set()

    def alone() -> None:
        time.sleep(0.02)
        with lock.exclusive():
            done.set()

    assert at_once([share] * 4 + [alone]) == [True] * 4 + [None]
