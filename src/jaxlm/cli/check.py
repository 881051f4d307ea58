"""`jaxlm check`: runs or compiles models on a device, and writes what happened as records for the hardware matrix."""

import logging
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxlm.cli.errors import usage
from jaxlm.cli.terminal import note

if TYPE_CHECKING:
    from jaxlm.bench.matrix import Device, Settings, Subject

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """Check which models run on a device, and write one record per model.

    On the device at hand, each model whose weights are in the Hugging Face cache is loaded, timed and verified. With
    --device, its programs are compiled for that device, which need not be there. A device without a compiler is checked
    by arithmetic. The records are JSON lines, one file per device. Running a command again continues where it stopped.
    """

    models: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[MODEL...]")]] = ()
    """Hub ids, folders or .gguf files. Default: all published models of the supported families."""
    device: Annotated[str | None, tyro.conf.arg(metavar="DEVICE")] = None
    """Device to compile for, such as v6e-8, H100 or cpu. Default: run on the device at hand."""
    batch: int = 8
    """Number of rows that are decoded together."""
    context: int = 4096
    """Number of tokens per row in the KV cache of compiled programs."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Data type of the weights."""
    quantize: Literal["int8", "int8-weights", "int4", "fp8"] | None = None
    """Quantize the weights."""
    random_weights: bool = False
    """Measure the speed with random weights, without a checkpoint."""
    listed_as: Annotated[str | None, tyro.conf.arg(aliases=["--as"], metavar="NAME")] = None
    """Hub id of the published model that a folder or .gguf file holds, or another name or URL for it."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, if it is not stored with the weights."""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Name of the device at hand in the table. Default: that of the device; cpu for a CPU."""
    again: bool = False
    """Check again what has a record already."""
    out: Path = Path("compat")
    """Folder of the records."""
    page: Path | None = None
    """Markdown file to write the table of all records to. With this flag alone, nothing is checked."""
    quiet: bool = False
    """Print results and errors only: no notices."""
    debug: bool = False
    """Show the traceback of an error."""

    @property
    def is_single_process(self) -> bool:
        return True

    def run(self) -> int:
        if self.listed_as is not None and len(self.models) != 1:
            usage("--as names one model: pass one folder or .gguf file")
        if self.batch < 1 or self.context < 1:
            usage("--batch and --context must be at least 1")
        if self.device is not None and (self.random_weights or self.name is not None):
            usage("--random-weights and --name are for the device at hand: leave out --device")
        failed = 0
        if self.page is None or self.models or self.device or self.random_weights or self.again:
            failed = self.check()
        if self.page is not None:
            from jaxlm.bench import hardware_page, records
            from jaxlm.checkpoint.atomic import write_atomically

            found = records.read(self.out)
            if not found:
                raise ValueError(f"there are no records in {self.out}: check a model first, or pass --out")
            write_atomically(self.page, hardware_page.render(found))
            note(f"wrote {self.page}: {len(found):,} records")
        return 1 if failed else 0

    def check(self) -> int:
        """Checks the models. Returns the number of those that failed."""
        if self.device is not None:  # programs are compiled for it: no accelerator is used
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from jaxlm.bench import matrix
        from jaxlm.cli.common import set_up_process

        if self.device is None:
            set_up_process()  # the cache on disk does not take programs for devices that are not here
        settings = matrix.Settings(self.batch, self.context, self.dtype, self.quantize)
        device = matrix.named(self.device) if self.device is not None else matrix.at_hand(self.name)
        if self.quantize is not None:  # a column of its own: a file has one record of a model
            device = device._replace(name=f"{device.name} {self.quantize}")
        if self.models:
            subjects = [matrix.subject_of(name, self.listed_as, self.tokenizer) for name in self.models]
        else:
            subjects = matrix.published()
        return Checks(self, device, settings).run(subjects)

    def command(self, subject: "Subject") -> str:
        """The command that repeats the check of a model. Of a path, only the last part."""
        if subject.source is None:
            words = [subject.name]
        else:
            words = [Path(subject.source.name).name, *(["--as", str(self.listed_as)] if self.listed_as else [])]
        words += ["--tokenizer", self.tokenizer.name] if self.tokenizer is not None else []
        words += ["--device", self.device] if self.device is not None else []
        words += ["--name", self.name] if self.name is not None else []
        words += ["--random-weights"] if self.random_weights else []
        words += ["--batch", str(self.batch), "--context", str(self.context), "--dtype", self.dtype]
        words += ["--quantize", self.quantize] if self.quantize is not None else []
        return shlex.join(["jaxlm", "check", *words])


class Checks:
    """The checks of a call."""

    def __init__(self, flags: Check, device: "Device", settings: "Settings"):
        from jaxlm.bench import checking

        self.flags, self.device, self.settings = flags, device, settings
        self.on, self.reason = checking.compiler_devices(device) if flags.device is not None else ([], "")
        if self.reason:
            note(f"{device.name} is checked by arithmetic: {self.reason}")
        self.spent = self.done = 0.0  # seconds, and the work that took them

    @property
    def method(self) -> str:
        if self.flags.device is None:
            return "run with random weights" if self.flags.random_weights else "run"
        return "compile" if self.on else "arithmetic"

    def run(self, subjects: list["Subject"]) -> int:
        """Checks models. Returns the number of those that failed."""
        from jaxlm.bench import hardware_page, matrix, records

        path, work = records.file_of(self.flags.out, self.device.name), []
        failed = absent = 0
        known = {record["model"]: record for record in records.read_file(path)}
        machines = [record["machine"] for record in known.values() if record["machine"] and self.flags.device is None]
        if machines and machines[0]["processor"] != (self.device.machine or {}).get("processor"):
            raise ValueError(f"{path} is of another machine ({machines[0]['processor']}): name yours with --name")
        for subject in subjects:
            record = matrix.blank(subject, self.device, self.settings, self.method, self.flags.command(subject))
            old = known.get(subject.name)
            if old is None or self.flags.again or not records.keeps(old, record):
                work.append((subject, record))
        if len(work) < len(subjects):
            note(f"{len(subjects) - len(work)} of {len(subjects)} models are in {path} (--again checks them again)")
        for i, (subject, record) in enumerate(work):
            left = sum(self.work(subject) for subject, _ in work[i:])
            title = f"[{i + 1}/{len(work)}] {subject.name} on {self.device.name}"
            result = self.result(subject, record, list(known.values()), f"{title}{self.remaining(left)}")
            if result is None:
                absent += 1
                continue
            old = known.get(subject.name)
            if old is not None and not self.flags.again and records.is_stronger(old, result):
                note(f"  {hardware_page.describe(record | result)}. The record stays: it rests on more")
                continue
            known[subject.name] = record | result
            records.write(self.flags.out, known[subject.name])
            print(line(known[subject.name]), flush=True)
            failed += known[subject.name]["status"] == "fails"
        if absent:
            note(f"{absent} of {len(work)} models are not in the Hugging Face cache. Name one to download it, or pass "
                 "--random-weights")  # fmt: skip
        return failed

    def result(
        self, subject: "Subject", record: dict[str, Any], known: list[dict[str, Any]], title: str
    ) -> dict[str, Any] | None:
        """The result of one check; None if the weights are not at hand."""
        from jaxlm.bench import checking, records

        begin = time.perf_counter()
        shares = self.method in ("compile", "run with random weights") and not self.flags.again
        old = records.twin(known, record) if shares else None
        if old is not None:
            return checking.result_of(old) | {"same_as": old["model"]}
        note(title)
        if self.flags.device is not None:
            result = checking.without_running(subject, self.device, self.settings, self.on, self.reason)
        else:
            try:
                result = checking.running(
                    subject, self.device, self.settings, self.source(subject), lambda what: note(f"  {what}")
                )
            except OSError as error:
                if self.flags.models:
                    raise
                logger.debug("%s is not checked: %s", subject.name, error)
                return None
        if result["method"] != "arithmetic":
            self.spent += time.perf_counter() - begin
            self.done += self.work(subject)
        return result

    def source(self, subject: "Subject") -> Any:
        """Where the weights are; None for random weights. Only models that are named are downloaded."""
        from jaxlm.checkpoint.source import ModelSource

        if self.flags.random_weights:
            return None
        return subject.source or ModelSource(subject.name, offline=not self.flags.models)

    def work(self, subject: "Subject") -> float:
        """How long a check takes, in any unit: programs by layers, runs by parameters."""
        return subject.parameters if self.flags.device is None else subject.cfg.L

    def remaining(self, work: float) -> str:
        """The time that the rest of the work takes at most, from that of the work that is done."""
        if not self.done or not work:
            return ""
        return f" (at most {self.spent / self.done * work / 60:.0f} min left)"


def line(record: dict[str, Any]) -> str:
    """The result of a check for the terminal."""
    from jaxlm.bench import hardware_page

    return f"{record['model']}  {record['device']}  {hardware_page.describe(record)}"
