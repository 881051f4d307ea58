"""Checks that every name that `jaxlm` exports is completely typed.

    pyright --verifytypes jaxlm --ignoreexternal --outputjson >types.json; python tests/typing/exported.py types.json

Exits with 1 and prints each symbol whose type is not known.
"""

import json
import sys
from pathlib import Path

import jaxlm


def main(report: str) -> int:
    symbols = json.loads(Path(report).read_text())["typeCompleteness"]["symbols"]
    homes = tuple(f"{home}.{name}" for name, home in jaxlm._HOME.items())
    ours = [symbol for symbol in symbols if symbol["name"].startswith(homes)]
    unknown = [symbol for symbol in ours if not symbol["isTypeKnown"]]
    for symbol in unknown:
        print(symbol["name"], *(diagnostic["message"] for diagnostic in symbol["diagnostics"]), sep="\n    ")
    print(f"{len(ours)} symbols exported by jaxlm, {len(unknown)} of them not completely typed")
    return 1 if unknown or len(ours) < len(homes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
