"""What jaxlm uses of other packages' undocumented surface: the whole list, and that nothing else is used.

pyproject.toml bounds every package in the list from above, for such names change without notice. Where a test fails
here, the message says what has gone and what that breaks: find another way, or follow the change.
"""

import ast
import contextlib
import importlib
import importlib.metadata
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SRC = Path(__file__).parents[1] / "src" / "jaxlm"
FILES = sorted(SRC.rglob("*.py"))
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


class Use(NamedTuple):
    """package: as pyproject.toml names it; takes: parameters by which it is called, or with which it is overridden."""

    package: str
    name: str
    where: str
    breaks: str
    takes: tuple[str, ...] = ()


CODE, NODE = "jinja2.compiler.CodeGenerator", ("node", "frame")
METER, SCORES = "chat templates run without a bound", "figures of lm-eval's tasks are not those of its own classes"
PARALLEL = "fairscale.nn.model_parallel.initialize"
META = "verify cannot compare with Meta's code"
MESHES = Use("jax", "jax.experimental.mesh_utils.create_device_mesh", "devices/topology.py",
    "meshes do not follow the topology of TPUs, where jax.make_mesh refuses a slice that `model` takes a part of",
    ("mesh_shape", "devices", "allow_split_physical_axes"))  # fmt: skip
SPLASH, KERNEL = "jax.experimental.pallas.ops.tpu.splash_attention", "attention on TPU is that of plain XLA"
SLOW = "slow clients keep their connections"
USES = [
    Use("jax", f"{SPLASH}.BlockSizes", "nn/attention_tpu.py", KERNEL, ("block_q", "block_kv", "block_q_dkv",
        "block_kv_dkv", "block_q_dq", "block_kv_dq", "use_fused_bwd_kernel")),
    Use("jax", f"{SPLASH}.CausalMask", "nn/attention_tpu.py", KERNEL, ("shape",)),
    Use("jax", f"{SPLASH}.LocalMask", "nn/attention_tpu.py", KERNEL, ("shape", "window_size", "offset")),
    Use("jax", f"{SPLASH}.MultiHeadMask", "nn/attention_tpu.py", KERNEL, ("masks",)),
    Use("jax", f"{SPLASH}.SegmentIds", "nn/attention_tpu.py", KERNEL, ("q", "kv")),
    Use("jax", f"{SPLASH}.make_splash_mha_single_device", "nn/attention_tpu.py", KERNEL),
    Use("uvicorn", "uvicorn.protocols.http.h11_impl.H11Protocol", "server/connections.py",
        SLOW, ("config", "server_state", "app_state", "_loop")),
    *(Use("uvicorn", f"uvicorn.protocols.http.h11_impl.H11Protocol.{name}", "server/connections.py", SLOW)
      for name in ("connection_made", "connection_lost", "pause_writing", "resume_writing")),
    Use("jax", "jax.extend.core.Literal", "activations.py", "activations can be neither captured nor patched"),
    MESHES,
    *(Use("jax", "jax.experimental.topologies.get_topology_desc", f"bench/{name}.py",
          "programs cannot be compiled for devices that are not here", ("platform", "topology_name"))
      for name in ("gpu_targets", "programs")),
    Use("jax", "jax.config.jax_enable_preemption_service", "cli/common.py",
        "one of several processes outlives SIGTERM"),
    Use("jax", "jax.config.jax_enable_preemption_service", "devices/distributed.py",
        "a run of several processes loses the steps since its last checkpoint at SIGTERM"),
    Use("jax", "jax.experimental.multihost_utils.reached_preemption_sync_point", "devices/distributed.py",
        "a run of several processes loses the steps since its last checkpoint at SIGTERM", ("step_id",)),
    Use("jinja2", CODE, "processing/template_sandbox.py", METER),
    Use("jinja2", f"{CODE}.write", "processing/template_sandbox.py", METER, ("x",)),
    Use("jinja2", f"{CODE}.visit", "processing/template_sandbox.py", METER, ("node",)),
    Use("jinja2", f"{CODE}.visit_For", "processing/template_sandbox.py", "steps of loops are not counted", NODE),
    Use("jinja2", f"{CODE}.visit_Output", "processing/template_sandbox.py",
    "output within macros is paid for too late", NODE), Use("jinja2", f"{CODE}.visit_Concat",
    "processing/template_sandbox.py", "`~` makes texts without a bound", NODE), Use("jinja2", f"{CODE}.visit_Getitem",
    "processing/template_sandbox.py", "slices are not paid for", NODE), Use("jinja2", f"{CODE}.visit_Tuple",
    "processing/template_sandbox.py", "tuples are not paid for", NODE), Use("jinja2", f"{CODE}.visit_List",
    "processing/template_sandbox.py", "lists are not paid for", NODE), Use("jinja2", f"{CODE}.visit_Dict",
    "processing/template_sandbox.py", "dicts are not paid for", NODE), Use("jinja2", "jinja2.Environment.concat",
    "processing/template_sandbox.py", "captured text is not paid for"), Use("jinja2",
    "jinja2.filters.do_attr.jinja_pass_arg", "processing/template_sandbox.py",
        "filters take the environment for their value"),
    Use("jinja2", "jinja2.runtime.LoopContext", "processing/template_sandbox.py",
    "steps of recursive loops are not counted"), Use("jinja2", "jinja2.sandbox.SandboxedEnvironment.call",
    "processing/template_sandbox.py", METER), Use("jinja2", "jinja2.utils.Namespace",
    "processing/template_language.py", "templates cannot set attributes of a namespace"), Use("huggingface_hub",
    "huggingface_hub.constants.HF_HUB_CACHE", "checkpoint/hub.py", "errors do not say where"), Use("huggingface_hub",
    "huggingface_hub.errors.HTTPError", "checkpoint/download.py", "no network is a traceback"), Use("huggingface_hub",
    "huggingface_hub.utils.WeakFileLock", "checkpoint/download.py",
        "two programs download one file at a time into the same place", ("lock_file",)),
    Use("datasets", "datasets.packaged_modules.cache.cache.Cache", "data/sources.py",
        "datasets that were downloaded are not found offline",
        ("repo_id", "dataset_name", "config_name", "version", "hash")),
    Use("lm-eval", "lm_eval.api.model.TemplateLM._loglikelihood_tokens", "evaluation/lm_eval.py",
        "lm-eval never asks for log-likelihoods", ("requests",)),
    Use("lm-eval", "lm_eval.models.utils.normalize_gen_kwargs", "evaluation/lm_eval.py", SCORES,
        ("gen_kwargs", "default_max_gen_toks")),
    Use("lm-eval", "lm_eval.models.utils.postprocess_generated_text", "evaluation/lm_eval.py", SCORES,
        ("generation", "stop", "think_end_token")),
    Use("lm-eval", "lm_eval.utils.get_rolling_token_windows", "evaluation/lm_eval.py", SCORES,
        ("token_list", "prefix_token", "max_seq_len", "context_len")),
    Use("lm-eval", "lm_eval.utils.make_disjoint_window", "evaluation/lm_eval.py", SCORES, ("pair",)),
    Use("lm-eval", "lm_eval.utils.make_table", "cli/eval.py", "eval --tasks prints no table", ("result_dict",)),
    Use("llama-models", "llama_models.llama3.model.apply_scaling", "verification/meta_code.py",
        "Llama 3.2 is compared with frequencies stretched by 8 instead of 32 (the function is exchanged)", ("freqs",)),
    Use("llama-models", "llama_models.llama3.model.Transformer", "verification/meta_code.py", META),
    Use("llama-models", "llama_models.llama3.args.ModelArgs", "verification/meta_code.py", META),
    Use("llama-models", "llama_models.llama3.tokenizer.Tokenizer", "verification/meta_code.py", META),
    Use("llama-models", "llama_models.llama3.chat_format.ChatFormat", "verification/meta_code.py", META),
    Use("llama-models", "llama_models.datatypes.RawMessage", "verification/meta_code.py", META),
    Use("fairscale", PARALLEL, "verification/meta_code.py", META),
    Use("fairscale", f"{PARALLEL}.initialize_model_parallel", "verification/meta_code.py", META,
        ("model_parallel_size_",)),
    Use("fairscale", f"{PARALLEL}.destroy_model_parallel", "verification/meta_code.py", META),
]  # fmt: skip
# An attribute of instances: the digest of a hub dataset, by which a run knows its data again.
FINGERPRINT = "._fingerprint"
LISTED = {*(use.name for use in USES), FINGERPRINT}
OPTIONAL = {"lm-eval", "llama-models", "fairscale"}  # the oracle tier has them

# Modules whose documentation, or list of public names, covers what they hold.
PUBLIC = set("""
    datasets filelock flax flax.nnx google.protobuf grain httpx huggingface_hub huggingface_hub.errors
    huggingface_hub.utils jax jax.ad_checkpoint jax.distributed jax.dtypes jax.errors jax.lax jax.nn jax.numpy jax.ops
    jax.random jax.sharding jax.tree jax.tree_util jax.typing jinja2 jinja2.exceptions jinja2.ext jinja2.meta
    jinja2.nodes jinja2.sandbox llguidance lm_eval lm_eval.api.model lm_eval.evaluator lm_eval.tasks matplotlib
    matplotlib.figure matplotlib.ticker ml_dtypes numpy numpy.random optax optax.contrib jaxtyping pyarrow
    pyarrow.ipc pyarrow.parquet optax.tree optax.tree_utils orbax.checkpoint prometheus_client
    prompt_toolkit pydantic starlette.applications starlette.middleware starlette.middleware.cors starlette.requests
    starlette.responses starlette.routing starlette.types uvicorn
    prompt_toolkit.application prompt_toolkit.filters prompt_toolkit.output rich.cells rich.console rich.markup
    rich.progress rich.table rich.text rich.tree safetensors sentencepiece tensorboardX tokenizers
    tokenizers.decoders tokenizers.models tokenizers.normalizers tokenizers.pre_tokenizers tokenizers.processors
    tokenizers.trainers torch torch.distributed tqdm transformers transformers.utils transformers.utils.logging tyro
    tyro.conf tyro.extras wandb yaml
""".split())  # fmt: skip  # noqa: SIM905
# Private by its looks alone.
PUBLIC_NAMES = {"os._exit"}
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # Python's documented interface of named tuples
# Packages that take seconds to import, or are absent from the light tier, and their modules that the source names.
HEAVY = {"torch", "lm_eval", "llama_models", "fairscale", "wandb", "sentencepiece"}
THEIRS = {"llama_models.llama3.model", PARALLEL}


def resolved(name: str) -> Any:
    """What a dotted name means. ImportError or AttributeError where it means nothing."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if not ".".join(parts[:end]).startswith(error.name or "?"):
                raise
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ImportError(f"there is no {parts[0]}")


def gone(use: Use) -> str:
    """What is no longer as it was, in a sentence; an empty text where all is."""
    try:
        found = resolved(use.name)
    except (ImportError, AttributeError) as error:
        return f"{use.name} is gone ({error})"
    if not use.takes:
        return ""
    missing = [name for name in use.takes if name not in inspect.signature(found).parameters]
    return f"{use.name} takes no {' and no '.join(missing)} any more" if missing else ""


@pytest.mark.parametrize(
    "use", [pytest.param(use, marks=[pytest.mark.oracle] * (use.package in OPTIONAL), id=use.name) for use in USES]
)
def test_what_is_used_is_there(use: Use):
    assert not (what := gone(use)), (
        f"{use.package} {importlib.metadata.version(use.package)}: {what}. src/jaxlm/{use.where} uses it, and without "
        f"it {use.breaks}"
    )


def test_a_name_or_a_parameter_that_goes_is_noticed():
    assert gone(MESHES) == ""
    assert "is gone" in gone(MESHES._replace(name="jax.experimental.mesh_utils.create_mesh"))
    assert "is gone" in gone(MESHES._replace(name="jax.no_such_module.name"))
    assert "takes no other any more" in gone(MESHES._replace(takes=("devices", "other")))


@pytest.mark.parametrize("package", sorted({use.package for use in USES}))
def test_packages_are_bounded_from_above(package):
    assert re.search(rf"\b{package}(==|[^\"\n]*<)\d", PYPROJECT.read_text()), f"{package} has no upper bound"


def test_a_dataset_has_a_fingerprint():
    import datasets

    digests = [datasets.Dataset.from_dict({"text": [text]})._fingerprint for text in "aab"]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.name)
def test_the_list_holds_no_more_than_is_used(use):
    assert use.name.split(".")[-1] in (SRC / use.where).read_text()


# Reading the source


class Scan(ast.NodeVisitor):
    """Collects in `found` the foreign names of a source that are not public, by the line of each."""

    def __init__(self, source: str) -> None:
        self.names: dict[str, str] = {}  # what an imported name stands for
        self.found: dict[str, int] = {}
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imported(node)
        self.visit(tree)

    def imported(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                name = f"{node.module}.{alias.name}"
                self.names[alias.asname or alias.name] = name
                public = node.module in PUBLIC or is_module(name)  # of a module what is used of it counts
            else:
                name = alias.name
                self.names[alias.asname or name.split(".")[0]] = name if alias.asname else name.split(".")[0]
                public = name in PUBLIC
            hidden = any(map(is_private, name.split(".")))
            self.take(name, node, private=is_foreign(name) and (hidden or not public))

    def take(self, name: str, node: ast.AST, private: bool) -> None:
        if private and name not in PUBLIC_NAMES:
            self.found.setdefault(name, getattr(node, "lineno", 0))

    def dotted(self, node: ast.expr) -> str | None:
        """`jax.core.Tracer` for an expression that is an imported name and its attributes."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute) and (before := self.dotted(node.value)):
            return f"{before}.{node.attr}"
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self.dotted(node)
        own = is_own(node.value)
        if name and (is_foreign(name) or name.startswith("os.")):
            dunder = node.attr.startswith("__") and node.attr.endswith("__")
            self.take(name, node, private=is_private(node.attr) or (in_private_module(name) and not dunder))
            if isinstance(node.ctx, ast.Store | ast.Del):
                self.take(name, node, private=is_module(name.rpartition(".")[0]))
        elif not own and not (name or "").startswith("jaxlm."):
            self.take(f".{node.attr}", node, private=is_private(node.attr) and node.attr not in NAMED_TUPLE)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """getattr(x, "_name") and its like."""
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self.take(f".{name.value}", node, private=is_private(name.value))
                changed = self.dotted(node.args[0]) if node.func.id in ("setattr", "delattr") else None
                self.take(f"{changed}.{name.value}", node, private=bool(changed and is_foreign(changed)))
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """What a class overrides of a foreign one, or uses of it through self."""
        named = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        used = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute) and is_own(part.value)}
        for base in filter(None, map(self.dotted, node.bases)):
            if not is_foreign(base) or (base.split(".")[0] in HEAVY and base.split(".")[0] not in sys.modules):
                continue
            of_base = set(dir(resolved(base)))
            hidden = {name for name in (named | used) & of_base if is_private(name)}
            if base.rpartition(".")[0] not in PUBLIC:
                hidden |= {name for name in named & of_base if not name.startswith("__")}
            for name in hidden:
                self.take(f"{base}.{name}", node, private=True)
        self.generic_visit(node)


def is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def is_foreign(name: str) -> bool:
    root = name.split(".")[0]
    return root != "jaxlm" and root not in sys.stdlib_module_names


def is_module(name: str) -> bool:
    if name.split(".")[0] in HEAVY:
        return name in PUBLIC | THEIRS
    with contextlib.suppress(ImportError, AttributeError):
        return is_foreign(name) and isinstance(resolved(name), types.ModuleType)
    return False


def in_private_module(name: str) -> bool:
    """Whether a name with its attributes leads through a module that is not public."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if is_module(module):
            return module not in PUBLIC and end < len(parts)
    return False


def scanned() -> Iterator[tuple[str, str, int]]:
    for path in FILES:
        for name, line in Scan(path.read_text()).found.items():
            yield str(path.relative_to(SRC)), name, line


def test_nothing_else_is_used():
    unlisted = [f"{where}:{line} {name}" for where, name, line in scanned() if name not in LISTED]
    assert not unlisted, "use what is documented, or list it above and bound its package: " + ", ".join(unlisted)


@pytest.mark.oracle
def test_nothing_else_of_a_heavy_package_is_overridden():
    importlib.import_module("lm_eval.api.model")
    found = Scan((SRC / "evaluation" / "lm_eval.py").read_text()).found
    assert "lm_eval.api.model.TemplateLM._loglikelihood_tokens" in found
    assert found.keys() <= LISTED


PLANTED = {
    "from jax._src import core": "jax._src.core",
    "import jax._src.core as c": "jax._src.core",
    "import jax\ndef f(x): return isinstance(x, jax.core.Tracer)": "jax.core.Tracer",
    "from jax.core import Tracer": "jax.core.Tracer",
    "from jax.experimental import mesh_utils\nmesh_utils.create_hybrid_device_mesh(1)":
        "jax.experimental.mesh_utils.create_hybrid_device_mesh",
    "from transformers.utils.chat_template_utils import render_jinja_template":
        "transformers.utils.chat_template_utils.render_jinja_template",
    "from transformers.utils import chat_template_utils as t\nt._compile_jinja_template = 1":
        "transformers.utils.chat_template_utils._compile_jinja_template",
    "from transformers import utils\nutils.chat_template_utils.Chat": "transformers.utils.chat_template_utils.Chat",
    "from huggingface_hub import constants\nconstants.ENDPOINT": "huggingface_hub.constants.ENDPOINT",
    "import huggingface_hub\nhuggingface_hub.file_download.http_get": "huggingface_hub.file_download.http_get",
    "from huggingface_hub import _CACHED_NO_EXIST": "huggingface_hub._CACHED_NO_EXIST",
    "import torch\ntorch._C": "torch._C",
    "def f(dataset): return dataset._indices": "._indices",
    "def f(x): return getattr(x, '_data')": "._data",
    "from jax import nn\nnn.relu = abs": "jax.nn.relu",
    "import numpy\nsetattr(numpy, 'dot', None)": "numpy.dot",
    "import os\nos._wrap_close": "os._wrap_close",
    "from jinja2.sandbox import SandboxedEnvironment\nclass A(SandboxedEnvironment):\n    def _parse(self): pass":
        "jinja2.sandbox.SandboxedEnvironment._parse",
    "from jinja2 import Environment\nclass A(Environment):\n    def f(self): self._tokenize(1)":
        "jinja2.Environment._tokenize",
    "from jinja2.compiler import CodeGenerator\nclass A(CodeGenerator):\n    def visit_Name(self, node, frame): pass":
        "jinja2.compiler.CodeGenerator.visit_Name",
}  # fmt: skip


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_use_is_found(source):
    assert PLANTED[source] in Scan(source).found
    assert PLANTED[source] not in LISTED


@pytest.mark.parametrize("source", [
    "from jaxlm import mesh\nmesh._axes",
    "import jax\njax.numpy.ones(1)\njax.__version__\njax.sharding.get_abstract_mesh()",
    "import os\nos._exit(1)\ndef f(row): return row._replace(a=1)",
    "from transformers.utils import get_json_schema\nimport transformers\ntransformers.utils.logging.set_verbosity()",
    "class A:\n    def f(self): return self._x",
])  # fmt: skip
def test_what_is_public_is_left_alone(source):
    assert Scan(source).found == {}
