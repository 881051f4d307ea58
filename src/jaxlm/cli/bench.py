"""`jaxlm bench`: the speed of prefill and decoding, of training steps and of loading, beside the limits of the device
and beside other implementations."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxlm.checkpoint.errors import explain_missing_package
from jaxlm.cli.bench_common import integers, own_flags, progress_line
from jaxlm.cli.bench_serve import ServeFlags
from jaxlm.cli.errors import usage
from jaxlm.cli.terminal import compiling, note, print_json

if TYPE_CHECKING:
    from jaxlm.bench.measure import Session
    from jaxlm.model import Model

RIVALS = ("transformers", "llama.cpp")
# Flags that not every mode has, with the modes that have them.
MODES = {"gen": ("generation", "serve"), "depth": ("generation",), "against": ("generation", "serve"),
         "plot": ("generation",), "method": ("train",), "rank": ("train",), "prompt": ("generation", "train", "serve"),
         "batch": ("generation", "train"), "random_weights": ("generation", "train"),
         "kv_dtype": ("generation", "serve"),
         **dict.fromkeys(ServeFlags.__annotations__, ("serve",))}  # fmt: skip


@dataclass(frozen=True)
class Bench(ServeFlags):
    """Measure the speed of a model: prefill and decoding, training steps (train), loading (load) or serving (serve).

    Each line states the limit, which follows from bytes or FLOPs and from the rates of the device measured in the same
    run, and the fraction of it that is reached. Lists are separated by commas.
    """

    action: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[train|load]")]] = None
    """Measure training steps or loading, instead of prefill and decoding."""
    name: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None
    """Hub id, folder or .gguf file; same as -m."""
    random_weights: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE")] = None
    """Measure random weights, without a download: the name of a published model (qwen3-0.6b) or a config.json."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"], metavar="N,N")] = None
    """Prompt lengths in tokens; with train, row lengths; with serve, in words. Default: 512; with serve, 128."""
    gen: Annotated[str | None, tyro.conf.arg(aliases=["-n"], metavar="N,N")] = None
    """Numbers of tokens to generate. Default: 128; with serve, 64."""
    depth: Annotated[str | None, tyro.conf.arg(aliases=["-d"], metavar="N,N")] = None
    """Numbers of tokens that are in the KV cache before. Default: 0."""
    batch: Annotated[str | None, tyro.conf.arg(aliases=["-b"], metavar="N,N")] = None
    """Batch sizes. Default: 1; with train, 8."""
    repetitions: Annotated[int, tyro.conf.arg(aliases=["-r"])] = 5
    """How often to measure each case; with train, the number of steps."""
    against: Annotated[str | None, tyro.conf.arg(metavar="A,B")] = None
    """Rivals to measure in the same run: transformers, llama.cpp; with serve, llama.cpp. They need the extra
    jaxlm[bench]."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """File for a plot of the decoding speed by context and batch size."""
    method: Literal["full", "lora"] = "full"
    """With train: train all weights (full) or a LoRA adapter (lora)."""
    rank: int = 16
    """With train: rank of the LoRA adapter."""
    json: bool = False
    """Print one JSON object."""

    memory_hint = "a smaller -b, shorter -p, -n and -d, --dtype bfloat16, --quantize int8 (or int4) or a smaller model"

    def run(self) -> int:
        mode, name = self._mode()
        self._check(mode, name)
        if not self.is_single_process:
            raise ValueError("bench runs in a single process: start it without --num-processes or a launcher")
        if "transformers" in self._rivals() and "JAX_PLATFORMS" not in os.environ:
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both need the memory of a GPU
        return {"generation": self._run_generation, "train": self._run_train, "load": self._run_load,
                "serve": self._run_serve}[mode](name)  # fmt: skip

    def _mode(self) -> tuple[str, str | None]:
        """What to measure, and the name of the model."""
        if self.action in ("train", "load", "serve"):
            return self.action, self.name or self.model
        if self.name is not None:
            usage(f"unexpected argument {self.name!r}. Usage: jaxlm bench [train|load|serve] MODEL [flags]")
        return "generation", self.action or self.model

    def _check(self, mode: str, name: str | None) -> None:
        """Exits with status 2 for wrong flags."""
        if mode == "serve":
            self.check_serve(name if self.model in (None, name) else None, self._rivals(), self.prompt)
        elif (name is None) == (self.random_weights is None) or (name is not None and self.model not in (None, name)):
            usage("pass one model: a hub id, a folder, a .gguf file or --random-weights NAME (jaxlm bench --help)")
        for field, modes in MODES.items():
            if mode not in modes and getattr(self, field) != getattr(Bench, field):
                usage(f"--{field.replace('_', '-')} does not apply to {mode} (jaxlm bench --help)")
        if mode == "train" and self.method == "full" and self.quantize is not None:
            usage("--quantize needs --method lora: quantized weights are not trained (jaxlm bench --help)")
        if self.repetitions < 1 or self.rank < 1:
            flag, value = ("-r", self.repetitions) if self.repetitions < 1 else ("--rank", self.rank)
            usage(f"{flag} is {value}, but must be at least 1 (jaxlm bench --help)")
        for flag, text in (("-p", self.prompt), ("-n", self.gen), ("-b", self.batch), ("-d", self.depth)):
            integers(flag, text or "1")
        for rival in self._rivals():
            if rival not in RIVALS:
                usage(f"--against must be some of {', '.join(RIVALS)}, not {rival!r} (jaxlm bench --help)")
        if self.plot is not None and (self.plot.suffix != ".png" or not self.plot.absolute().parent.is_dir()):
            usage(f"--plot {self.plot} must be a name that ends in .png, in a folder that exists")

    def _rivals(self) -> list[str]:
        return list(dict.fromkeys(rival.strip() for rival in (self.against or "").split(",") if rival.strip()))

    def load_model(self, name: str | None) -> tuple["Model", dict[str, Any] | None]:
        """The model, and the config.json of one with random weights."""
        if name is not None:
            return replace(self, model=name).load(), None
        self.begin()
        from jaxlm.bench import sources
        from jaxlm.bench.random_model import random_model
        from jaxlm.inference.compilation import on_compile

        note("making random weights …")
        on_compile.set(compiling)
        shape = sources.find(self.source(str(self.random_weights)))
        model = random_model(shape, self.dtype, self.mesh, self.quantize)
        return replace(model, kv_dtype=self.kv_dtype), shape.raw

    def _run_generation(self, name: str | None) -> int:
        self.begin()
        from jaxlm.bench import plots, rivals, tables  # noqa: F401  (what is missing fails before anything is measured)
        from jaxlm.bench.cases import Case
        from jaxlm.bench.measure import Jaxlm, Session
        from jaxlm.bench.rival_files import close_all, start_rivals

        rivals.require(self._rivals())
        if self.plot is not None:
            plots.require_plots()
        lists = {flag: integers(flag, text) for flag, text in
                 (("-p", self.prompt or "512"), ("-n", self.gen or "128"), ("-d", self.depth or "0"),
                  ("-b", self.batch or "1"))}  # fmt: skip
        cases = [
            Case(kind, tokens, depth, batch)
            for depth in lists["-d"]
            for batch in lists["-b"]
            for kind, flag in (("prefill", "-p"), ("decode", "-n"))
            for tokens in lists[flag]
        ]
        model, raw = self.load_model(name)
        session = Session(model, cases, self.repetitions)
        with own_flags():
            for case in cases:
                Jaxlm(model).check(case)
        session.rivals = started = start_rivals(self._rivals(), model, raw, cases, note)
        try:
            with progress_line() as progress:
                session.run(progress)
        finally:  # after an interrupt too: what was measured
            close_all(started)
            self._show_generation(session)
        return 0

    def _show_generation(self, session: "Session") -> None:
        from jaxlm.bench import plots, tables

        names = self._rivals()
        found = tables.records(session, names)
        if not found:
            return
        environment = tables.environment(names)
        lines = [tables.model_line(session.model), *tables.environment_lines(environment, session.rates)]
        self._show(
            lines, tables.generation_table(found, names), session.model.source, environment, session.rates, found
        )
        if self.plot is not None and any(r["kind"] == "decode" for r in found):
            title = f"Decoding, {Path(session.model.source).name}, {session.model.dtype.name}"
            plots.plot_decoding(found, names, self.plot, f"{title}\n{environment['device']}")
            note(f"plot: {self.plot}")

    def _run_train(self, name: str | None) -> int:
        with explain_missing_package("bench train", "jaxlm[train]"):
            import optax  # noqa: F401  (fails before the model is loaded)
        self.begin()
        import jax

        mesh = self.mesh or (f"data={jax.device_count()}" if jax.device_count() > 1 else None)
        from jaxlm.bench import tables
        from jaxlm.bench.train_step import TrainSession

        lengths, batches = integers("-p", self.prompt or "512"), integers("-b", self.batch or "8")
        cases = [(batch, length) for length in lengths for batch in batches]
        model, _ = replace(self, mesh=mesh).load_model(name)
        source, line = model.source, tables.model_line(model)
        session = TrainSession(model, cases, self.repetitions, self.method, self.rank)
        del model  # the session frees its weights
        try:
            with progress_line() as progress:
                session.run(progress)
        finally:
            if found := tables.train_records(session):
                environment = tables.environment()
                trained = "all weights" if self.method == "full" else f"a LoRA adapter of rank {self.rank}"
                lines = [f"{line}; {trained}, computed in {session.dtype}"]
                lines += tables.environment_lines(environment, session.rates)
                self._show(lines, tables.train_table(found), source, environment, session.rates, found)
        return 0

    def _run_load(self, name: str | None) -> int:
        self.begin()
        from jaxlm.bench import tables
        from jaxlm.bench.load_time import LoadSession

        options = {"dtype": self.dtype, "mesh": self.mesh, "quantize": self.quantize}
        session = LoadSession(self.source(name), options, self.repetitions)
        try:
            with progress_line() as progress:
                session.run(progress)
        finally:
            if found := tables.load_records(session):
                environment = tables.environment()
                lines = [f"- {name}", *tables.environment_lines(environment)]
                self._show(lines, tables.load_table(found), str(name), environment, None, found)
        return 0

    def _run_serve(self, name: str | None) -> int:
        with explain_missing_package("bench serve", "jaxlm[bench]"):
            import httpx  # noqa: F401  (fails before a server is started)
        from jaxlm.bench import rivals, serve_tables, tables

        rivals.require(self._rivals())
        session = self.serve_session(self.prompt, self.gen, self.repetitions)
        length = self.length_of(session)
        try:
            with self.servers(name, self._rivals(), length) as session.servers, progress_line() as progress:
                session.run(progress)
        finally:  # after an interrupt too: what was measured
            if found := serve_tables.records(session, self.first_token_limit):
                environment = tables.environment(self._rivals())
                lines = [self.serve_line(name, length), *tables.environment_lines(environment)]
                self._show(lines, serve_tables.text(session, found), str(name or self.url), environment, None, found)
        return 0

    def _show(self, lines: list[str], table: str, model: str, environment: Any, rates: Any, found: Any) -> None:
        """Prints the result on stdout."""
        if self.json:
            measured = rates and {"read_bytes_per_second": rates.read, "matmul_flops_per_second": rates.matmul,
                                  "matmul_dtype": rates.matmul_dtype, "devices": rates.devices}  # fmt: skip
            print_json({"model": model, "environment": environment, "rates": measured, "results": found}, indent=2)
        else:
            print("\n".join([*lines, "", table]), flush=True)
