"""Who may import whom, read from the source."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sedtrain"

# What a file, or any file of a package, may import of ours; files of one package may import each other.
MAY_IMPORT = {
    "__init__": set(),
    "__main__": {"command_line", "ranks"},
    "command_line": {"config", "jobs", "overrides", "ranks"},
    "jobs": {"batch", "config", "overrides", "ranks", "run_folder", "tasks"},
    # configuration: what a command line means, before anything heavy is imported
    "annotation": set(),
    "definition": {"annotation"},
    "signature": {"annotation", "definition"},
    "config": {"annotation", "definition", "signature"},
    "composition": {"config", "definition"},
    "run_folder": set(),
    "ranks": {"run_folder"},
    "overrides": {"composition", "config", "definition", "run_folder"},
    # the parts, which do not know of each other
    "batch": set(),
    "hub": set(),
    "losses": {"batch"},
    "exact": set(),
    "memory": {"batch"},
    "normalisers": {"batch"},
    "optim": {"batch"},
    "finetune": {"batch", "models", "optim"},
    "lora": {"batch", "finetune", "models"},
    "averaging": {"batch"},
    "tags": {"batch"},
    "text": {"batch"},
    "vocabulary": set(),
    "peak_memory": {"batch"},
    "data": {"batch", "hub", "peak_memory", "ranks", "tags", "text"},
    "models": {"batch", "hub", "losses", "text"},
    # from a model to its scores
    "decoding": {"batch", "models"},
    "evaluation": {"batch", "decoding", "models", "normalisers"},
    "export": {"decoding", "evaluation.results", "models", "run_folder", "tags"},
    "inspection": {"batch", "data", "evaluation.figures", "evaluation.page"},
    # training
    "probe": {"models"},
    "module": {
        "batch",
        "decoding",
        "evaluation.metrics",
        "exact",
        "losses",
        "memory",
        "models",
        "optim",
        "probe",
        "strategies",
    },
    "strategies": {"batch", "models"},
    "guards": {"batch", "exact", "module"},
    "progress": {"batch", "evaluation.results"},
    "metrics_file": {"evaluation.evaluate", "run_folder"},
    "loggers": {"batch", "evaluation.evaluate"},
    "tracking": {"batch", "evaluation.evaluate", "evaluation.results", "models"},
    "random_state": set(),
    "rendezvous": set(),
    "checkpoint_files": {"batch", "run_folder"},
    "checkpoints": {"averaging", "batch", "checkpoint_files", "random_state", "run_folder", "tracking"},
    "interrupts": {"checkpoints", "progress"},
    "validations": set(),
    "resume": {"batch", "checkpoint_files", "data.buckets", "data.sources", "ranks", "run_folder"},
    "run": {
        "averaging",
        "batch",
        "checkpoint_files",
        "checkpoints",
        "data",
        "evaluation.results",
        "export",
        "finetune",
        "interrupts",
        "module",
        "progress",
        "rendezvous",
        "run_folder",
    },
    # the whole
    "search": {"batch", "config", "definition", "evaluation", "pruning", "run_folder"},
    "pruning": {"batch", "tasks"},
    "creation": {"batch", "config"},
    "build": {
        "config",
        "creation",
        "data",
        "decoding",
        "evaluation",
        "export",
        "finetune",
        "losses",
        "models",
        "module",
        "normalisers",
        "progress",
        "run",
        "tags",
        "text",
        "tracking",
        "validations",
        "vocabulary",
    },
    "trial_steps": {"averaging", "batch", "creation", "data", "memory", "module", "peak_memory", "run"},
    "fit_batches": {"batch", "data", "memory", "peak_memory", "run", "trial_steps"},
    "terminal": {"evaluation", "finetune", "fit_batches"},
    "tasks": {
        "batch",
        "build",
        "creation",
        "data",
        "decoding",
        "evaluation",
        "export",
        "fit_batches",
        "inspection",
        "normalisers",
        "resume",
        "run_folder",
        "tags",
        "terminal",
        "tracking",
    },
}
CONFIGURATION = {"hydra", "omegaconf", "yaml"}
# Which of ours may import these of others'; the rest is free.
ONLY_IN = {
    "hydra": {"command_line", "jobs", "config", "composition", "overrides", "creation", "search"},
    "omegaconf": {
        "command_line",
        "jobs",
        "config",
        "composition",
        "overrides",
        "creation",
        "build",
        "fit_batches",
        "tasks",
        "trial_steps",
        "resume",
        "search",
    },
    "lightning": {
        "averaging",
        "strategies",
        "module",
        "memory",
        "guards",
        "data.datamodule",
        "finetune",
        "progress",
        "run",
        "creation",
        "build",
        "checkpoint_files",
        "checkpoints",
        "interrupts",
        "loggers",
        "metrics_file",
        "pruning",
        "tracking",
        "data.workers",
        "rendezvous",
        "trial_steps",
        "validations",
    },
    "datasets": {"data", "hub"},
    "rich": {"data.durations", "inspection.tables", "progress", "search", "terminal"},
    "matplotlib": {"evaluation"},
}
# Imported before the configuration has passed: nothing here may be slow.
LIGHT = {
    "__init__",
    "__main__",
    "annotation",
    "command_line",
    "composition",
    "config",
    "definition",
    "jobs",
    "overrides",
    "ranks",
    "run_folder",
    "signature",
}
# What uses a saved model.
INFERENCE = {"data.collate", "data.sources", "decoding.generate", "evaluation.evaluate", "export"}


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


def within(name, places):
    """Whether a module is one of `places` or inside one that is a package."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def closure(names):
    """The modules that importing `names` brings in."""
    reached, new = set(), set(names)
    while new:
        reached |= new
        new = set().union(*(IMPORTS[name] for name in new)) - reached
    return reached


def test_the_source_is_read():
    assert len(TREES) > 30
    assert IMPORTS["losses"] == {"batch"}
    assert {"build", "terminal", "batch"} <= IMPORTS["tasks"]
    assert PACKAGES["annotation"] == set()
    assert {"torch", "transformers"} <= PACKAGES["models.encoder"]


@pytest.mark.parametrize("name", TREES)
def test_a_file_imports_only_what_its_layer_may(name):
    layer = name.partition(".")[0]
    assert layer in MAY_IMPORT, "a new file or package has to be given its layer here"
    assert {each for each in IMPORTS[name] if not within(each, {*MAY_IMPORT[layer], layer})} == set()


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_no_layer_may_import_more_than_it_does(layer):
    used = set().union(*(IMPORTS[name] for name in TREES if within(name, [layer])))
    assert {each for each in MAY_IMPORT[layer] if not any(within(name, [each]) for name in used)} == set()


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_framework_stays_where_it_belongs(package):
    assert [n for n in TREES if package in PACKAGES[n] and not within(n, ONLY_IN[package])] == []


@pytest.mark.parametrize("name", ["batch", "losses"])
def test_batches_and_losses_need_torch_alone(name):
    assert PACKAGES[name] == {"torch"}


def test_no_file_imports_itself_over_others():
    assert len(list(TopologicalSorter(IMPORTS).static_order())) == len(TREES)


def test_no_import_hides_from_the_interpreter():
    def names(node):
        return {getattr(node, field, None) for field in ("id", "attr", "name")}

    assert [
        name for name, tree in TREES.items() if any("TYPE_CHECKING" in names(node) for node in ast.walk(tree))
    ] == []


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_what_reads_the_configuration_imports_nothing_heavy(name):
    at_once = [node for node in TREES[name].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert others(at_once) <= CONFIGURATION
    assert ours(at_once) <= LIGHT


def test_a_command_line_is_read_without_torch():
    code = "import sys, sedtrain.command_line; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert set(loaded.stdout.split()) & {"torch", "transformers", "lightning", "datasets", "numpy", "pyarrow"} == set()


def test_a_saved_model_is_used_without_lightning_and_hydra():
    packages = set().union(*(PACKAGES[name] for name in closure(INFERENCE)))
    assert packages & {"lightning", "hydra", "omegaconf"} == set()
