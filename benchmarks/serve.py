"""`jaxlm serve` beside the server of llama.cpp: the figures of docs/performance.md.

    python benchmarks/serve.py CORPORA [--model FILE] [--rounds 3] [--minutes 9]
    python benchmarks/serve.py --render

The model is SmolLM2-135M-Instruct.Q4_1.gguf in the folder that JAXLM_REAL_MODELS names, with float32 and bfloat16
weights in jaxlm and float16 weights in llama.cpp. CORPORA has instruct_rasbt/instruction-data.json (short prompts) and
stories/public_domain.txt (long prompts: the first 1,200 characters of each chapter). Answers have as many tokens as the
real ones have characters divided by 4.

Each round is a record in benchmarks/records/serve.jsonl. A run adds the rounds that are missing, and begins none that
would end after --minutes. The same command continues. Records of another commit of jaxlm are dropped. --render
writes the table into docs/performance.md.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.bench import rival_files, serve_process, serve_tables, tables
from jaxlm.bench.serve_load import Load
from jaxlm.bench.serve_prompts import Prompts, from_lines
from jaxlm.bench.serve_session import Server, ServeSession
from jaxlm.checkpoint.source import ModelSource
from jaxlm.exporting import open_model

ROOT = Path(__file__).parents[1]
RECORDS, PAGE = ROOT / "benchmarks" / "records" / "serve.jsonl", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- serve: begin -->", "<!-- serve: end -->"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("float32", "bfloat16")
CLIENTS = (1, 2, 8, 32)
SLOTS, LENGTH = 8, 512
LONG, LONG_ANSWER = 1200, 128  # characters


def short_prompts(corpora: Path) -> Prompts:
    rows = json.loads((corpora / "instruct_rasbt" / "instruction-data.json").read_text(encoding="utf-8"))
    lines = [(f"{row['instruction']}\n{row['input']}".strip() + "\n", row["output"]) for row in rows if row["output"]]
    return from_lines("short", lines, None)


def long_prompts(corpora: Path) -> Prompts:
    chapters = (corpora / "stories" / "public_domain.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    texts = [text.strip() for text in chapters if len(text.strip()) >= LONG + LONG_ANSWER]
    return from_lines("long", [(text[:LONG], text[LONG : LONG + LONG_ANSWER]) for text in texts], None)


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def same_commit(record: dict[str, Any]) -> bool:
    """Whether a record is of this commit of jaxlm. The file of records itself is a change."""
    return str(record["environment"]["commit"]).partition("+")[0] == str(tables.commit()).partition("+")[0]


def say(text: str, seconds: float | None = None) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(model: str, kinds: Sequence[Prompts], dtype: str, numbers: Sequence[int], until: float) -> None:
    """Adds rounds of a dtype, as many as there is time for, but at least one."""
    file = rival_files.gguf_for_server(open_model(ModelSource(model)), say)
    begin = time.perf_counter()
    jaxlm = serve_process.start_jaxlm(["-m", model, "--dtype", dtype], SLOTS, LENGTH)
    try:
        say(f"{dtype}: jaxlm serve started after {time.perf_counter() - begin:.0f} s")
        llama_cpp = serve_process.start_llama_cpp(file, SLOTS, LENGTH)
        try:
            servers = [Server(each.name, each.url) for each in (jaxlm, llama_cpp)]
            session = ServeSession(servers, kinds, [Load(clients=n) for n in CLIENTS], max(numbers) + 1)
            session.warm_up(say)
            for number in numbers:
                if session.took and time.perf_counter() + session.took > until:
                    break
                session.measured, session.load_averages = {}, []
                session.run_round(number, say)
                add(session, dtype, number)
        finally:
            llama_cpp.close()
    finally:
        jaxlm.close()


def add(session: ServeSession, dtype: str, number: int) -> None:
    """Adds the record of a round."""
    record = {
        "dtype": dtype, "round": number, "slots": SLOTS, "length": LENGTH, "seconds": session.took,
        "load_average": session.load_averages[-1], "environment": tables.environment(["llama.cpp"]),
        "results": serve_tables.records(session, None),
    }  # fmt: skip
    with open(RECORDS, "a") as out:
        out.write(json.dumps(record) + "\n")


def render(found: Sequence[dict[str, Any]]) -> str:
    """The records as a table: medians over the rounds; ratios also with their range."""
    columns = ["dtype", "prompts", "clients", "output tokens/s", "llama.cpp", "ratio", "first token, ms", "llama.cpp",
               "ratio", "p99, ms", "llama.cpp", "equal texts"]  # fmt: skip
    rows = []
    for dtype, kind, clients in itertools.product(DTYPES, ("short+answers", "long+answers"), CLIENTS):
        cases = [r for record in found if record["dtype"] == dtype for r in record["results"]]
        cases = [r for r in cases if (r["test"], r["clients"]) == (kind, clients)]
        ours, theirs = ([r for r in cases if r["server"] == name] for name in ("jaxlm", "llama.cpp"))
        if not ours:
            continue

        def both(name: str, of: str | None = None, ours: Any = ours, theirs: Any = theirs) -> list[str]:
            values = [[r[name] if of is None else r[name][of] for r in each] for each in (ours, theirs)]
            return [tables.number(statistics.median(each)) for each in values]

        beside = [r["llama.cpp"] for r in ours]
        ratios = [serve_tables.ratio([x for each in beside for x in each[f"{name}_ratios"]])
                  for name in ("throughput", "first_token")]  # fmt: skip
        texts = f"{sum(each['equal_texts'] for each in beside)} of {sum(each['texts'] for each in beside)}"
        rows.append([dtype, kind.partition("+")[0], str(clients), *both("output_tokens_per_second"), ratios[0],
                     *both("first_token_ms", "p50"), ratios[1], *both("first_token_ms", "p99"), texts])  # fmt: skip
    environments = [record["environment"] for record in found]
    averages = sorted(record["load_average"] for record in found)
    lines = [*tables.environment_lines(environments[-1])]
    lines.append(f"- {len(found)} rounds; load average at their begin: {averages[0]:.1f} to {averages[-1]:.1f}.")
    return "\n".join([*lines, "", tables.markdown(columns, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path, nargs="?")
    parser.add_argument("--model", default=str(Path(os.environ.get("JAXLM_REAL_MODELS", "")) / MODEL))
    parser.add_argument("--rounds", type=int, default=3, help="of each dtype")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    until = time.perf_counter() + 60 * args.minutes
    if not args.render:
        if args.corpora is None:
            parser.error("pass the folder CORPORA, or --render")
        current = [record for record in records() if same_commit(record)]
        RECORDS.write_text("".join(json.dumps(record) + "\n" for record in current))
        kinds = [short_prompts(args.corpora), long_prompts(args.corpora)]
        needed = 0.0  # seconds of the servers of a dtype and of a round
        for dtype in DTYPES:
            done = {record["round"] for record in current if record["dtype"] == dtype}
            missing = [number for number in range(args.rounds) if number not in done]
            begin = time.perf_counter()
            if missing and begin + needed < until:
                measure(args.model, kinds, dtype, missing, until)
                needed = time.perf_counter() - begin
        left = len(DTYPES) * args.rounds - len(records())
        say(f"{left} rounds are missing: run the same command again" if left else "all rounds are measured")
        print(render(records()))
        return
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{render(records())}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
