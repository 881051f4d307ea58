"""`jaxlm serve` beside the server of llama.cpp: the figures of docs/performance.md.

    python benchmarks/serve.py CORPORA [--model FILE] [--rounds 3] [--minutes 9]
    python benchmarks/serve.py --render

The model is SmolLM2-135M-Instruct.Q4_1.gguf in the folder that JAXLM_REAL_MODELS names, with float32 and bfloat16
weights in jaxlm and float16 weights in llama.cpp. CORPORA has instruct_rasbt/instruction-data.json (short prompts) and
stories/public_domain.txt (long prompts: the first 1,200 characters of each chapter). Answers have as many tokens as the
real ones have characters divided by 4.

Each case of a round is a record in benchmarks/serve.jsonl. A run adds the records that are missing, and
begins none after --minutes. The same command continues. Records of another commit of jaxlm are dropped. --render
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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jaxlm.bench import rival_files, serve_process, serve_tables, tables
from jaxlm.bench.serve_load import Load
from jaxlm.bench.serve_prompts import Prompts, from_lines
from jaxlm.bench.serve_session import Server, ServeSession
from jaxlm.checkpoint.source import ModelSource
from jaxlm.exporting import open_model

ROOT = Path(__file__).parents[1]
RECORDS, PAGE = ROOT / "benchmarks" / "serve.jsonl", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- serve: begin -->", "<!-- serve: end -->"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("float32", "bfloat16")
LOADS = [Load(clients=count) for count in (1, 2, 8, 32)]
SLOTS, LENGTH = 8, 512
LONG, LONG_ANSWER = 1200, 128  # characters
START = 120.0  # seconds that the servers may need to start


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


def measure(model: str, kinds: Sequence[Prompts], dtype: str, rounds: int, until: float) -> None:
    """Adds the records of a dtype that are missing, as far as there is time."""
    file = rival_files.gguf_for_server(open_model(ModelSource(model)), say)
    session = ServeSession([], kinds, LOADS, rounds)
    with ExitStack() as started:
        servers = []
        for start in (
            lambda: serve_process.start_jaxlm(["-m", model, "--dtype", dtype], SLOTS, LENGTH),
            lambda: serve_process.start_llama_cpp(file, SLOTS, LENGTH),
        ):
            begin = time.perf_counter()
            server = start()
            started.callback(server.close)
            servers.append(Server(server.name, server.url))
            say(f"{dtype}: {server.name} started after {time.perf_counter() - begin:.0f} s")
        session.servers = servers
        session.warm_up(say)
        for number, turn in missing(dtype, rounds, session):
            if time.perf_counter() > until:
                break
            session.measured, average = {}, os.getloadavg()[0]
            session.run_case(number, turn, say)
            record = {
                "dtype": dtype, "round": number, "case": turn, "slots": SLOTS, "length": LENGTH,
                "load_average": average, "environment": tables.environment(["llama.cpp"]),
                "results": serve_tables.records(session, None),
            }  # fmt: skip
            with open(RECORDS, "a") as out:
                out.write(json.dumps(record) + "\n")


def missing(dtype: str, rounds: int, session: ServeSession) -> list[tuple[int, int]]:
    """The rounds and cases of a dtype without a record."""
    done = {(record["round"], record["case"]) for record in records() if record["dtype"] == dtype}
    return [each for each in itertools.product(range(rounds), range(len(session.cases))) if each not in done]


def render(found: Sequence[dict[str, Any]]) -> str:
    """The records as a table: medians over the rounds; ratios also with their range."""
    columns = ["dtype", "prompts", "clients", "output tokens/s", "llama.cpp", "ratio", "first token, ms", "llama.cpp",
               "ratio", "p99, ms", "llama.cpp", "equal texts"]  # fmt: skip
    rows = []
    for dtype, kind, clients in itertools.product(
        DTYPES, ("short+answers", "long+answers"), [load.clients for load in LOADS]
    ):
        cases = [r for record in found if record["dtype"] == dtype for r in record["results"]]
        cases = [r for r in cases if (r["test"], r["clients"]) == (kind, clients)]
        ours, theirs = ([r for r in cases if r["server"] == name] for name in ("jaxlm", "llama.cpp"))
        if not ours:
            continue

        def both(name: str, of: str | None = None, ours: Any = ours, theirs: Any = theirs) -> list[str]:
            values = [[r[name] if of is None else (r[name] or {}).get(of) for r in each] for each in (ours, theirs)]
            known = [[value for value in each if value is not None] for each in values]
            return [tables.number(statistics.median(each) if each else None) for each in known]

        beside = [r["llama.cpp"] for r in ours]
        ratios = [serve_tables.ratio([x for each in beside for x in each[f"{name}_ratios"]])
                  for name in ("throughput", "first_token")]  # fmt: skip
        texts = f"{sum(each['equal_texts'] for each in beside)} of {sum(each['texts'] for each in beside)}"
        rows.append([dtype, kind.partition("+")[0], str(clients), *both("output_tokens_per_second"), ratios[0],
                     *both("first_token_ms", "p50"), ratios[1], *both("first_token_ms", "p99"), texts])  # fmt: skip
    averages = sorted(record["load_average"] for record in found)
    lines = [*tables.environment_lines(found[-1]["environment"])]
    lines.append(f"- Load average at the begin of the cases: {averages[0]:.1f} to {averages[-1]:.1f}.")
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
        session = ServeSession([], kinds, LOADS, args.rounds)
        fresh = True  # nothing was started
        for dtype in DTYPES:
            if missing(dtype, args.rounds, session) and (fresh or time.perf_counter() + START < until):
                fresh = False
                measure(args.model, kinds, dtype, args.rounds, until)
        left = sum(len(missing(dtype, args.rounds, session)) for dtype in DTYPES)
        say(f"{left} records are missing: run the same command again" if left else "all is measured")
        print(render(records()))
        return
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{render(records())}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
