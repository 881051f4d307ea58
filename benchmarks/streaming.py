"""Speed of the data loader: from a corpus in the cache, and streamed.

    python benchmarks/streaming.py TOKENIZER FILE... [--batch 8] [--length 512] [--buffer 1000,10000]

Tokens per second of one epoch, padding included. Streaming tokenizes while it is read.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxlm.data.corpus import prepare
from jaxlm.data.documents import DocumentTokenizer
from jaxlm.data.packing import DataLoader
from jaxlm.data.sources import find_sources
from jaxlm.data.streaming import StreamingLoader
from jaxlm.processing.tokenizer import Tokenizer


def report(name: str, loader: Any, steps: int, begin: float) -> None:
    for _, _ in zip(loader.iterate(), range(steps)):
        pass
    speed = steps * loader.B * loader.T / (time.perf_counter() - begin)
    print(f"| {name} | {speed:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--buffer", default="1000,10000")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer)
    assert tokenizer is not None
    print("| | tokens/s |\n| --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        corpus = prepare(args.files, tokenizer, folder=Path(folder))
        print(f"| tokenizing to the cache | {len(corpus.ids) / (time.perf_counter() - begin):,.0f} |")
        loader = DataLoader(corpus, args.batch, args.length)
        steps = loader.rows() // args.batch
        report("from the cache", loader, steps, time.perf_counter())
    for buffer in map(int, args.buffer.split(",")):
        begin = time.perf_counter()
        texts = DocumentTokenizer(tokenizer)
        stream = StreamingLoader(find_sources(args.files), texts, args.batch, args.length, buffer=buffer)
        report(f"streamed, windows of {buffer:,}, the first included", stream, steps, begin)


if __name__ == "__main__":
    main()
