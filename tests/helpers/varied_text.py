"""Text in which tokenizers differ: every script, numbers, runs of whitespace, emoji, code, and what looks special."""

import random
from pathlib import Path

CORPORA = (
    "gsm8k/train.jsonl", "instruct_rasbt/instruction-data.json", "stories/public_domain.txt", "wikisql_mlx/train.jsonl",
    "tinyshakespeare/input.txt", "wikitext2/wikitext2_test_tokenised.txt",
)  # fmt: skip
SPACES = [
    " ", "\n", "\t", "\r", "\r\n", "\v", "\f", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u200b", "\u3000",
    "\ufeff",
]  # fmt: skip
EMOJI = [
    "😀", "👨\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🇩🇪", "👍🏽", "❤\ufe0f", "1\ufe0f\u20e3", "☎\ufe0e",
    "🧑🏿\u200d🚀", "\u200d", "\ufe0f",
]  # fmt: skip
WORDS = [
    "Hello", "naïve", "straße", "ΑΒΓ", "Привет", "שָׁלוֹם", "مرحبا", "हिन्दी", "ไทย", "日本語", "한국어", "e\u0301", "ﬁ",
    "Ⅷ", "½", "²", "x_y", "a.b", "don't", "DON'T", "we'Ll", "I'd've", "'S", "’s", "@", "#", "…", "—", "://", "$", "(",
    "}", "\0",
]  # fmt: skip
CODE = Path(__file__).parents[2] / "src" / "jaxlm"
# Special tokens, and what is nearly one.
SPECIAL = [
    f"<|{name}|>" for name in (
        "begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
        "finetune_right_pad_id", "reserved_special_token_0", "reserved_special_token_1",
    )
]  # fmt: skip
NEARLY = [
    "<|eot_id|", "<|eot_id |>", "< |eot_id|>", "<|EOT_ID|>", "|>", "<||>", "<|reserved_special_token_999|>", "</s>",
    "<|im_start|>", "<s>", "[INST]", "<|\neot_id|>", "<\u200b|eot_id|>",
]  # fmt: skip


def texts(shared: Path | None, corpus: int = 200_000) -> list[str]:
    """Some two million characters, in pieces. corpus: characters of each published text; without `shared` there are
    none."""
    found = [(shared / "corpora" / name).read_text(encoding="utf-8")[:corpus] for name in CORPORA] if shared else []
    found += [path.read_text(encoding="utf-8") for path in sorted(CODE.rglob("*.py"))]
    points = [chr(c) for c in range(0x32000) if not 0xD800 <= c < 0xE000]
    found += ["".join(points[i : i + 500]) for i in range(0, len(points), 500)]
    found += [f" {a}{a}a" for a in points[::53]]
    found += [
        " ".join(str(7 * 10**n // 9)[:n] for n in range(1, 40)),
        "1,234,567.89 -0.5e-10 0x1F 3½ ١٢٣ 1234567890123",
    ]
    found += [space * n + after for space in SPACES for n in (1, 2, 3, 7, 100) for after in ("", "a", "\n", "1")]
    found += ["a" * 5000, " " * 5000, "\n" * 5000, "ab " * 2000, "1" * 3000, "!?" * 3000, "語" * 3000]
    rng = random.Random(0)
    parts = SPACES * 2 + EMOJI + WORDS + NEARLY + [str(n) for n in (0, 12, 345, 6789, 31415)]
    found += ["".join(rng.choice(parts) for _ in range(rng.randrange(1, 40))) for _ in range(4000)]
    found += ["".join(rng.choice(parts + SPECIAL) for _ in range(rng.randrange(1, 40))) for _ in range(1000)]
    found += ["".join(chr(rng.choice((rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))
                      for _ in range(30)) for _ in range(2000)]  # fmt: skip
    return found


CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief.\n\nVery."}, {"role": "user", "content": "What is 1 + 1?"}],
    [
        {"role": "user", "content": "日本語 😀\tx"},
        {"role": "assistant", "content": "Ja,\n```python\nprint( 1 )\n```"},
        {"role": "user", "content": "'S 1234567 ..."},
        {"role": "assistant", "content": "<|eot_id"},
        {"role": "user", "content": "and\n\n\n\nthen"},
    ],
]
