"""Which wing may import which, read from the source."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sedtrain

PACKAGE = Path(__file__).parents[1] / "sedtrain"

# What each wing, and each file beside the wings, may import of ours.
MAY_IMPORT = {
    "__init__": "",
    "__main__": "cli launch",
    "cli": "config console errors job launch",
    "interactive": "build config console errors job training",
    "job": "compare config console errors imports launch run_dir",
    "imports": "tasks transcribe",
    "console": "launch",
    "compare": "errors evaluation run_dir terminal",
    "search": "annotations errors evaluation run_dir terminal",
    "tasks": "build build_saved errors export hub inspection run_dir terminal training",
    "transcribe": "config data decoding devices errors models serving terminal",
    "serving": "annotations data decoding errors ranges text",
    "build": "build_model build_saved config data decoding devices errors evaluation models text training",
    "build_model": "build_saved config data decoding errors models text training",
    "build_saved": "config data decoding devices errors evaluation export models plain run_dir text transcribe",
    "terminal": "evaluation",
    "training": "annotations batch data decoding errors evaluation launch models plain ranges run_dir",
    "inspection": "batch data errors evaluation run_dir",
    "export": "annotations batch data decoding errors evaluation models run_dir text",
    "evaluation": "batch data decoding errors models plain ranges run_dir text",
    "decoding": "annotations batch data errors models ranges run_dir text",
    "models": "annotations batch errors hub plain ranges run_dir text",
    "data": "annotations batch errors hub launch plain ranges run_dir text",
    "text": "annotations batch errors plain ranges",
    "config": "annotations errors plain ranges run_dir",
    "annotations": "errors ranges",
    "launch": "run_dir",
    "run_dir": "errors",
    "devices": "errors",
    "hub": "errors",
    "batch": "",
    "errors": "",
    "plain": "errors",
    "ranges": "",
}
CONFIGURATION = {"filelock", "hydra", "omegaconf", "yaml"}
# The only places that may import these packages; every other package is free.
ONLY_IN = {
    "hydra": "cli config interactive job search",
    "omegaconf": "build build_model build_saved cli config interactive job search tasks transcribe",
    "lightning": "build data.datamodule data.workers training",
    "datasets": "data",
    "rich": "compare data.durations inspection.tables tasks terminal training.progress",
    "matplotlib": "evaluation",
    "starlette": "serving",
    "uvicorn": "serving",
    "prometheus_client": "serving",
    "onnxruntime": "export.onnx",
    "torchao": "export.int8",
    "jax": "models.jax",
    "torchax": "models.jax",
}
# Imported before the configuration has passed: nothing here may be slow.
LIGHT = (
    "__init__ __main__ annotations cli config.check config.hydra_calls config.inherit config.job_check "
    "config.overrides config.rules config.schema config.signatures console errors imports job launch plain "
    "ranges run_dir"
)
# The use of a saved model needs none of these.
NOT_FOR_INFERENCE = {"lightning", "hydra", "omegaconf", "datasets", "pyarrow", "pandas", "jiwer", "sacrebleu"}


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


TREES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(nodes):
    """Dotted names that the import statements among `nodes` name; `from a import b` gives a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(nodes):
    """The modules of the package that `nodes` import, without its name."""
    names = {name.removeprefix("sedtrain.") for name in imported(nodes) if name.startswith("sedtrain.")}
    return {name if name in TREES else name.rpartition(".")[0] for name in names}


def others(nodes):
    """The packages outside the standard library that `nodes` import."""
    return {name.partition(".")[0] for name in imported(nodes)} - sys.stdlib_module_names - {"sedtrain"}


IMPORTS = {name: ours(ast.walk(tree)) for name, tree in TREES.items()}
PACKAGES = {name: others(ast.walk(tree)) for name, tree in TREES.items()}
WINGS = {name: {each for each in TREES if each.partition(".")[0] == name} for name in MAY_IMPORT}


def within(name, places):
    """Whether a module is one of `places`, or inside one that is a package."""
    return any(name == place or name.startswith(f"{place}.") for place in places.split())


def closure(names):
    """The modules that importing `names` brings in."""
    reached, new = set(), set(names)
    while new:
        reached |= new
        new = set().union(*(IMPORTS[name] for name in new)) - reached
    return reached


def test_the_source_is_read():
    assert len(TREES) > 60
    assert IMPORTS["models.losses"] >= {"batch"}
    assert {"build", "terminal", "export.card"} <= IMPORTS["tasks"]
    assert {"torch", "transformers"} <= PACKAGES["models.encoder"]


@pytest.mark.parametrize("wing", MAY_IMPORT)
def test_a_wing_imports_what_it_may_and_no_more_is_allowed(wing):
    used = {each.partition(".")[0] for name in WINGS[wing] for each in IMPORTS[name]} - {wing}
    assert used == set(MAY_IMPORT[wing].split())


def test_each_file_belongs_to_a_wing():
    assert set().union(*WINGS.values()) == set(TREES)


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_framework_stays_where_it_belongs(package):
    assert [n for n in TREES if package in PACKAGES[n] and not within(n, ONLY_IN[package])] == []


def test_batches_need_torch_alone():
    assert PACKAGES["batch"] == {"torch"}


def test_no_file_imports_itself_over_others():
    assert len(list(TopologicalSorter(IMPORTS).static_order())) == len(TREES)


def test_no_import_hides_from_the_interpreter():
    def names(node):
        return {getattr(node, field, None) for field in ("id", "attr", "name")}

    assert [n for n, tree in TREES.items() if any("TYPE_CHECKING" in names(node) for node in ast.walk(tree))] == []


@pytest.mark.parametrize("name", [name for name in TREES if within(name, LIGHT)])
def test_what_reads_the_configuration_imports_nothing_heavy(name):
    at_once = [node for node in TREES[name].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert others(at_once) <= CONFIGURATION
    assert [each for each in ours(at_once) if not within(each, LIGHT)] == []


def test_a_command_line_is_read_without_torch():
    code = "import sys, sedtrain.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert set(loaded.stdout.split()) & {"torch", "transformers", "lightning", "datasets", "numpy", "pyarrow"} == set()


def test_runs_are_compared_without_torch():
    used = closure({"compare"})
    assert "evaluation.comparison" in used
    assert set().union(*(PACKAGES[name] for name in used)) & {"torch", "transformers", *NOT_FOR_INFERENCE} <= {
        "sacrebleu"
    }


def test_recordings_are_transcribed_without_lightning_and_datasets():
    used = closure({"transcribe"})
    assert {"decoding.transcriber", "data.audio_paths", "config.hydra_calls"} <= used
    assert set().union(*(PACKAGES[name] for name in used)) & {"lightning", "datasets", "pyarrow", "pandas"} == set()


def test_a_saved_model_is_used_without_lightning_hydra_and_datasets():
    used = closure(name.removeprefix("sedtrain.") for name in {*sedtrain.FOUND_IN.values()} - {"sedtrain.interactive"})
    assert {"models.speech_encoder_decoder", "data.audio", "decoding.generate"} <= used
    assert set().union(*(PACKAGES[name] for name in used)) & NOT_FOR_INFERENCE == set()
