"""What was measured of servers, as records for JSON and as Markdown tables."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.bench import tables
from jaxlm.bench.serve_load import Answer, Measured
from jaxlm.bench.serve_session import ServeCase, ServeSession

PERCENTILES = (50, 95, 99)


def succeeded(measured: Measured) -> list[Answer]:
    """The answers without an error."""
    return [answer for answer in measured.answers if not answer.error]


def output_rate(measured: Measured) -> float:
    """Generated tokens per second."""
    return sum(answer.completion_tokens for answer in succeeded(measured)) / measured.seconds


def records(session: ServeSession, first_token_limit: float | None) -> list[dict[str, Any]]:
    """What was measured, for JSON: one record for each case and server that answered.

    Args:
        session: The session.
        first_token_limit: Milliseconds to the first token of a request that counts for the goodput.
    """
    found = []
    cases = [ServeCase(kind.name, load) for kind in session.kinds for load in session.loads]
    for case, server in itertools.product(cases, [server.name for server in session.servers]):
        rounds = session.measured.get((case, server), [])
        answers = [answer for measured in rounds for answer in measured.answers]
        good = [answer for measured in rounds for answer in succeeded(measured)]
        if not answers:
            continue
        seconds = sum(measured.seconds for measured in rounds)
        prompt, completion = sum(a.prompt_tokens for a in good), sum(a.completion_tokens for a in good)
        record: dict[str, Any] = {
            "test": case.prompts, "load": case.load.name, **case.load._asdict(), "server": server,
            "rounds": len(rounds), "requests": len(answers), "failed": len(answers) - len(good),
            "refused": sum(answer.is_refused for answer in answers),
            "errors": sorted({answer.error for answer in answers if answer.error})[:5],
            "prompt_tokens": prompt, "completion_tokens": completion,
            "cached_tokens": sum(answer.cached_tokens for answer in good),
            "seconds": seconds, "requests_per_second": len(good) / seconds,
            "output_tokens_per_second": completion / seconds,
            "total_tokens_per_second": (prompt + completion) / seconds,
            "deviation": statistics.stdev(map(output_rate, rounds)) if len(rounds) > 1 else 0.0,
            "first_token_ms": percentiles([answer.first_token for answer in good]),
            "inter_token_ms": percentiles([gap for answer in good for gap in answer.intervals]),
            "latency_ms": percentiles([answer.end - answer.begin for answer in good]),
            "client_cpu": sum(measured.client_seconds for measured in rounds) / seconds,
        }  # fmt: skip
        if first_token_limit is not None:
            within = sum(answer.first_token * 1e3 <= first_token_limit for answer in good)
            record |= {"first_token_limit_ms": first_token_limit, "goodput": within / seconds}
        if server == session.servers[0].name:
            record |= {each.name: comparison(session, case, each.name) for each in session.servers[1:]}
        found.append(record)
    return found


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """In milliseconds; None without a value."""
    if not seconds:
        return None
    return {f"p{p}": value for p, value in zip(PERCENTILES, (np.percentile(seconds, PERCENTILES) * 1e3).tolist())}


def comparison(session: ServeSession, case: ServeCase, rival: str) -> dict[str, Any]:
    """The first server beside a rival. Ratios are within a round, and above 1 where the first server is faster.

    A round counts if no request failed, and if both servers counted the same tokens for each request.
    """
    pairs = [*zip(session.measured[case, session.servers[0].name], session.measured.get((case, rival), []))]
    equal = [(ours, theirs) for ours, theirs in pairs if work(ours) is not None and work(ours) == work(theirs)]
    texts = [(a.text, b.text) for ours, theirs in equal for a, b in zip(by_number(ours), by_number(theirs))]
    return {
        "rounds": len(pairs), "rounds_with_equal_work": len(equal),
        "throughput_ratios": [output_rate(ours) / output_rate(theirs) for ours, theirs in equal],
        "first_token_ratios": [first_token(theirs) / first_token(ours) for ours, theirs in equal],
        "texts": len(texts), "equal_texts": sum(a == b for a, b in texts),
    }  # fmt: skip


def by_number(measured: Measured) -> list[Answer]:
    """The answers in the order of their prompts."""
    return sorted(measured.answers, key=lambda answer: answer.number)


def work(measured: Measured) -> list[tuple[int, int, int]] | None:
    """Number, prompt tokens and generated tokens of each request; None if one failed."""
    if any(answer.error for answer in measured.answers) or not measured.answers:
        return None
    return [(answer.number, answer.prompt_tokens, answer.completion_tokens) for answer in by_number(measured)]


def first_token(measured: Measured) -> float:
    """The median of the seconds to the first token."""
    return statistics.median(answer.first_token for answer in succeeded(measured))


# Tables


def table(found: Sequence[dict[str, Any]]) -> str:
    """The records of `records` as a Markdown table."""
    columns = ["prompt+answer", "load", "server", "requests", "failed"]
    columns += ["requests/s", "output tokens/s", "total tokens/s"]
    columns += [f"{name} p50, p95, p99, ms" for name in ("first token", "inter-token", "latency")]
    limits = {record["first_token_limit_ms"] for record in found if "goodput" in record}
    columns += [f"goodput, requests/s within {limit:g} ms" for limit in limits]
    rows = []
    for r in found:
        cells = [
            r["test"], r["load"], r["server"], str(r["requests"]), str(r["failed"]),
            tables.number(r["requests_per_second"]),
            tables.with_deviation(r["output_tokens_per_second"], r["deviation"]),
            tables.number(r["total_tokens_per_second"]),
            *(", ".join(map(tables.number, (r[f"{name}_ms"] or {}).values()))
              for name in ("first_token", "inter_token", "latency")),
        ]  # fmt: skip
        rows.append(cells + [tables.number(r["goodput"]) for _ in limits])
    return tables.markdown(columns, rows)


def comparison_table(found: Sequence[dict[str, Any]], rivals: Sequence[str]) -> str:
    """The comparisons as a Markdown table: the medians of the ratios, and their range."""
    columns = ["prompt+answer", "load", "beside", "rounds", "throughput, x", "first token, x", "equal texts"]
    rows = []
    for record in found:
        for rival in rivals:
            if rival in record:
                r = record[rival]
                rows.append([
                    record["test"], record["load"], rival, f"{r['rounds_with_equal_work']} of {r['rounds']}",
                    ratio(r["throughput_ratios"]), ratio(r["first_token_ratios"]),
                    f"{r['equal_texts']} of {r['texts']}",
                ])  # fmt: skip
    return tables.markdown(columns, rows)


def ratio(values: Sequence[float]) -> str:
    """The median and the range; empty without a value."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def text(session: ServeSession, found: Sequence[dict[str, Any]]) -> str:
    """The tables, and what their reader must know: errors, cached tokens and the load of the machine."""
    rivals = [server.name for server in session.servers[1:]]
    cached = {server.name: 0 for server in session.servers}
    lines = []
    for r in found:
        cached[r["server"]] += r["cached_tokens"]
        lines += [f"- {r['server']}, {r['test']}, {r['load']}: {error}" for error in r["errors"]]
    counts = ", ".join(f"{name} {count:,}" for name, count in cached.items())
    averages = ", ".join(f"{value:.1f}" for value in session.load_averages)
    lines += [
        f"- Prompt tokens that were in a cache: {counts}.",
        f"- The load generator used {max(r['client_cpu'] for r in found):.0%} of a core at most.",
        f"- Load average of the machine at the begin of the rounds: {averages}.",
    ]
    return "\n\n".join([table(found), *[comparison_table(found, rivals)] * bool(rivals), "\n".join(lines)])
