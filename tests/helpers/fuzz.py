"""Reads hostile files for a while: `python tests/helpers/fuzz.py SECONDS [FILE ...]`, the package on the path.

Prints what was read, and the smallest file of every failure, which belongs into test_hostile.py then.
"""

import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hypothesis import HealthCheck, Phase, given, seed, settings

from helpers.hostile import READERS, Reader, hostile, judge

BATCH = 200


def fuzz(name: str, reader: Reader, until: float, first_seed: int) -> tuple[Counter[str], dict[str, bytes]]:
    """How many files were read, refused and made trouble; and of each trouble the smallest file."""
    counts, failures = Counter[str](), {}
    with tempfile.TemporaryDirectory() as folder:
        reader.write(Path(folder))
        sound = (Path(folder) / reader.file).read_bytes()
        assert judge(reader, Path(folder), sound) == "", name

        def read(data: bytes) -> None:
            try:
                counts["refused" if judge(reader, Path(folder), data) else "read"] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                counts["failed"] += 1
                what = f"{type(error).__name__}: {error}"[:200]
                failures[what] = min(failures.get(what, data), data, key=len)

        while time.monotonic() < until:
            quiet = settings(max_examples=BATCH, deadline=None, database=None, phases=[Phase.generate],
                             suppress_health_check=list(HealthCheck))  # fmt: skip
            seed(first_seed)(quiet(given(hostile(reader.file, sound))(read)))()
            first_seed += 1
    return counts, failures


def main() -> int:
    from jaxlm.processing import template_sandbox

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="transformers.*")
    template_sandbox.SECONDS = 1
    seconds, names = float(sys.argv[1]), sys.argv[2:]
    chosen = {name: reader for name, reader in READERS.items() if not names or any(part in name for part in names)}
    failed = False
    for name, reader in chosen.items():
        counts, failures = fuzz(name, reader, time.monotonic() + seconds / len(chosen), int(time.time()))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{name}: {counts.total():,} files, {dict(counts)}; peak memory {peak / 1e6:.2f} GB", flush=True)
        for what, data in failures.items():
            print(f"    {what}\n        {data[:1000]!r}", flush=True)
        failed |= bool(failures)
    return failed


if __name__ == "__main__":
    sys.exit(main())
