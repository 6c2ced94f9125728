"""A search by Optuna: what it draws, prunes, finds, and how it goes on where it was killed."""

import csv
import json
import math
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sqlalchemy import event
from sqlalchemy.engine import Engine

from sedtrain.config.overrides import check_command_line
from sedtrain.config.schema import conf_dir, register
from sedtrain.errors import UserError
from sedtrain.search import distribution, search
from sedtrain.training.optuna_report import TrialReport


@pytest.fixture(scope="module", autouse=True)
def unsafe_databases():
    """Has SQLite wait for no disk, as nobody cuts the power here."""

    def hurry(connection, _):
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", hurry)
    yield
    event.remove(Engine, "connect", hurry)


# --- a real one

SHORT = [
    "encoder.tiny.num_hidden_layers=1", "decoder.tiny.num_hidden_layers=1", "decoding.max_new_tokens=5",
    "trainer.max_steps=3", "trainer.val_check_interval=1", "trainer.log_every_n_steps=1", "data.batch_seconds=8",
]  # fmt: skip
LR = "optimizer.lr=tag(log,interval(1e-5,1e-2))"


@pytest.fixture(scope="module")
def swept(sedtrain, corpus, tmp_path_factory):
    """Four trials, judged by val/loss; those that draw `./nowhere` fail."""
    folder = tmp_path_factory.mktemp("search") / "sweep"
    ended = sedtrain(
        "-m", "hydra/sweeper=optuna", "hydra.sweeper.metric=val/loss", "hydra.sweeper.num_trials=5",
        "hydra.sweeper.full_trials=1", "hydra.sweeper.sampler=random", "hydra.sweeper.seed=2", f"hydra.sweep.dir={folder}",
        "data=parquet", f"data.path={corpus}", LR, "encoder.checkpoint=null,./nowhere", *SHORT,
    )  # fmt: skip
    return ended, folder


@pytest.fixture
def trials(swept):
    """Those of the study, as Optuna reads them."""
    study = optuna.load_study(study_name="sedtrain", storage=f"sqlite:///{swept[1]}/study.db")
    return {each.number: each for each in study.trials}


def validations(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]


def numbers(trials, state):
    return [number for number, each in trials.items() if each.state.name == state]


def test_trials_end_complete_pruned_or_failed_and_none_ends_the_search(swept, trials):
    assert len(trials) == 5
    assert all(numbers(trials, state) for state in ("COMPLETE", "PRUNED", "FAIL"))
    nowhere = [number for number, each in trials.items() if each.params["encoder.checkpoint"] == "./nowhere"]
    assert numbers(trials, "FAIL") == nowhere


def test_a_trial_is_worth_the_best_of_its_validations(swept, trials):
    for number in numbers(trials, "COMPLETE"):
        folder = swept[1] / str(number)
        assert trials[number].value == pytest.approx(min(validations(folder)))
        assert (folder / "model/README.md").is_file()


def test_a_trial_is_pruned_at_the_first_validation_at_which_it_was_worse_than_the_others(swept, trials):
    """By Optuna's rule: its best so far above the median of the values that trials before it had at that step."""
    for number in numbers(trials, "PRUNED"):
        before = [trials[each] for each in range(number) if trials[each].intermediate_values]
        for step, value in enumerate(validations(swept[1] / str(number)), start=1):
            others = sorted(each.intermediate_values[step] for each in before if step in each.intermediate_values)
            middle = len(others) // 2
            median = others[middle] if len(others) % 2 else (others[middle - 1] + others[middle]) / 2
            best = min(each for at, each in trials[number].intermediate_values.items() if at <= step)
            assert (best > median) == (step == trials[number].last_step), value
        assert not (swept[1] / f"{number}/model").exists()


def test_jobs_that_failed_are_listed_and_those_that_were_pruned_are_not(swept, trials):
    ended, _ = swept
    assert ended.status == 2
    assert f"jobs of the sweep that failed: {len(numbers(trials, 'FAIL'))}\n" in ended.err
    assert ended.err.count("pruned at step") == len(numbers(trials, "PRUNED"))
    assert "Traceback" not in ended.err


def test_the_best_is_shown_with_its_command_and_kept(swept, trials):
    ended, folder = swept
    found = json.loads((folder / "search.json").read_text())
    best = min((trials[each] for each in numbers(trials, "COMPLETE")), key=lambda each: each.value)
    assert found["best"] == {"number": best.number, "value": best.value, "params": best.params}
    assert [each["state"] for each in found["trials"]] == [trials[each].state.name.lower() for each in sorted(trials)]
    assert f"trial {best.number} was best: {found['command']}\n" in ended.out
    command = shlex.split(found["command"])
    assert command[:3] == ["python", "-m", "sedtrain"]
    assert f"optimizer.lr={best.params['optimizer.lr']}" in check_command_line(command[3:])


# --- with trainings that are made up


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """Optuna's tables without a study, which take longer to make than to fill."""
    file = tmp_path_factory.mktemp("optuna") / "study.db"
    optuna.storages.RDBStorage(f"sqlite:///{file}").engine.dispose()
    return file


@pytest.fixture
def searched(tmp_path, empty_database):
    """A search of trainings whose validations and test scores are functions of the learning rate and the step.

    dying: the number of the trial in whose middle everything ends
    """

    def run(*overrides, arguments=(LR,), validation=lambda lr, step: lr, test=None, dying=None):
        jobs = []

        def launch(batch, initial_job_idx):
            return [train(each, initial_job_idx + place) for place, each in enumerate(batch)]

        def train(job, number):
            jobs.append((number, job))
            given = {each.key_or_group: each.value() for each in OverridesParser.create().parse_overrides(list(job))}
            lr, folder = given["optimizer.lr"], tmp_path / "sweep" / str(number)
            (folder / "model").mkdir(parents=True, exist_ok=True)
            options = given["callbacks.search"]
            assert options.pop("_target_") == "sedtrain.training.optuna_report.TrialReport"
            reporting = TrialReport(**options)
            for step in (1, 2):
                if number == dying and step == 2:
                    raise KeyboardInterrupt
                if reporting.report(validation(lr, step), step):
                    return SimpleNamespace(cfg=SimpleNamespace(run_dir=str(folder)))
            if test:
                (folder / "results.json").write_text(test(lr))
            (folder / "model/README.md").write_text("a card")
            return SimpleNamespace(cfg=SimpleNamespace(run_dir=str(folder)))

        register()
        folder = tmp_path / "sweep"
        folder.mkdir(exist_ok=True)
        if not (folder / "study.db").exists():
            shutil.copy(empty_database, folder)
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            given = ["hydra/sweeper=optuna", f"hydra.sweep.dir={folder}", "hydra.sweeper.num_trials=4", *overrides]
            config = compose("train", given, return_hydra_config=True)
            search(config, list(arguments), launch, GlobalHydra.instance().config_loader())
        return jobs, json.loads((folder / "search.json").read_text())

    return run


def values(found):
    return [each["value"] for each in found["trials"]]


def test_the_main_metric_of_the_validation_is_the_default_and_its_best_counts(searched):
    _, found = searched(validation=lambda lr, step: lr * (1 if step == 1 else 2), arguments=[LR, "seed=3"])
    assert (found["metric"], found["direction"]) == ("val/wer", "minimize")
    assert found["best"]["value"] == pytest.approx(min(values(found)))
    assert found["best"]["value"] == pytest.approx(found["best"]["params"]["optimizer.lr"])


def test_bleu_is_maximized(searched):
    _, found = searched(arguments=[LR, "target=translation"])
    assert (found["metric"], found["direction"]) == ("val/bleu", "maximize")
    rates = [each["params"]["optimizer.lr"] for each in found["trials"] if each["state"] == "complete"]
    assert found["best"]["value"] == pytest.approx(max(rates))


def test_a_score_of_the_test_split_is_read_from_results_json(searched, swept):
    results = json.loads(next(swept[1].glob("*/results.json")).read_text())

    def test(lr):
        return json.dumps({**results, "metrics": {"wer": {"value": 1 - lr, "low": 0.0, "high": 1.0}}})

    _, found = searched("hydra.sweeper.metric=test/wer", "hydra.sweeper.pruner=none", test=test)
    assert [each["state"] for each in found["trials"]] == ["complete"] * 4
    assert values(found) == pytest.approx([1 - each["params"]["optimizer.lr"] for each in found["trials"]])


def test_without_a_pruner_or_before_warm_up_no_trial_is_pruned(searched, tmp_path):
    for each in ("hydra.sweeper.pruner=none", "hydra.sweeper.warmup_steps=3"):
        _, found = searched(each, "hydra.sweeper.full_trials=1", "hydra.sweeper.num_trials=2")
        assert {trial["state"] for trial in found["trials"]} == {"complete"}
        shutil.rmtree(tmp_path / "sweep")
    _, found = searched("hydra.sweeper.full_trials=1")
    assert "pruned" in {trial["state"] for trial in found["trials"]}


def test_validations_that_are_no_number_make_a_trial_fail(searched):
    _, found = searched("hydra.sweeper.num_trials=2", "hydra.sweeper.pruner=none", validation=lambda lr, step: math.nan)
    assert [each["state"] for each in found["trials"]] == ["fail", "fail"]
    assert found["best"] is found["command"] is None


@pytest.mark.parametrize("together", [1, 3])
def test_a_search_that_was_killed_goes_on_with_the_trial_under_way(searched, together):
    parallel = f"hydra.sweeper.num_parallel={together}"
    with pytest.raises(KeyboardInterrupt):
        searched(parallel, "hydra.sweeper.pruner=none", dying=1)
    jobs, found = searched(parallel, "hydra.sweeper.pruner=none")
    again = [number for number, job in jobs if job[-1] == "resume=auto"]
    assert again == ([1] if together == 1 else [0, 1, 2])
    assert [number for number, _ in jobs] == list(range(again[0], 4))
    assert [each["number"] for each in found["trials"]] == list(range(4))
    assert {each["state"] for each in found["trials"]} == {"complete"}
    assert len({each["value"] for each in found["trials"]}) == 4  # none is drawn twice


def test_a_study_by_another_metric_or_of_other_values_is_refused(searched):
    arguments = ["optimizer.lr=0.1,0.2"]
    searched("hydra.sweeper.num_trials=1", arguments=arguments)
    with pytest.raises(UserError, match=r"created for val/wer\n.*write hydra.sweeper.metric=val/wer, or another"):
        searched("hydra.sweeper.metric=val/loss", arguments=arguments)
    with pytest.raises(UserError, match="CategoricalDistribution does not support dynamic value space"):
        searched("hydra.sweeper.num_trials=3", arguments=["optimizer.lr=0.1,0.3"])


@pytest.mark.parametrize(
    ("option", "value"), [("+callbacks.evil", "{_target_:os.getcwd}"), ("optimizer.lr", "{_target_:os.getcwd}")]
)
def test_a_trial_under_way_that_names_other_options_is_refused(searched, empty_database, tmp_path, option, value):
    folder = str(tmp_path / "sweep")
    shutil.copytree(empty_database.parent, folder)
    study = optuna.create_study(study_name="sedtrain", storage=f"sqlite:///{folder}/study.db")
    study.ask({option: CategoricalDistribution([value])}).set_user_attr("folder", folder)
    with pytest.raises(UserError, match="which this search does not draw") as caught:
        searched("hydra.sweeper.pruner=none")
    assert (caught.value.option, caught.value.value) == ("hydra.sweep.dir", folder)


# --- what is searched


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=interval(0.5,2.0)", FloatDistribution(0.5, 2.0)),
        ("a=int(interval(1,8))", IntDistribution(1, 8)),
        ("a=tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("a=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("a=range(2,9,3)", IntDistribution(2, 8, step=3)),
        ("a=range(8,2,-2)", IntDistribution(4, 8, step=2)),
        ("a=range(0.0,1.0,0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("a=bert,gpt2", CategoricalDistribution(["bert", "gpt2"])),
        ("a=null,true,1.5", CategoricalDistribution(["null", "True", "1.5"])),
        ("a=[1,2],[3]", CategoricalDistribution(["[1,2]", "[3]"])),
    ],
)
def test_what_hydra_sweeps_is_what_optuna_draws(text, expected):
    [override] = OverridesParser.create().parse_overrides([text])
    assert distribution(override) == expected


def test_choices_are_written_as_they_were_given(searched):
    _, found = searched(
        "hydra.sweeper.num_trials=2",
        arguments=["optimizer.lr=1", "decoder=bert,gpt2", "callbacks=[default,ema],[default]"],
    )
    for each in found["trials"]:
        assert each["params"]["decoder"] in ("bert", "gpt2")
        assert each["params"]["callbacks"] in ("[default,ema]", "[default]")


# --- mistakes


MISTAKES = [
    (
        ["hydra/sweeper=optuna", "optimizer.lr=0.1"],
        "hydra/sweeper = 'optuna'\n    it runs several jobs\n    add --multirun",
    ),
    (["-m", "hydra/sweeper=optuna", "optimizer.lrr=interval(0,1)"], "did you mean 'lr'?"),
    (["-m", "hydra/sweeper=optuna", "seed=interval(0,1.5)"], "seed = 1.5\n    expected a whole number from 0 to"),
    (["-m", "hydra/sweeper=optuna", "seed=1,2", "hydra.sweeper.num_trails=3"], "did you mean 'num_trials'?"),
    (["-m", "hydra/sweeper=optuna", "seed=1,2", "hydra.sweeper.pruner=medan"], "did you mean 'median'?"),
    (["-m", "hydra/sweeper=optuna", "seed=1,2", "hydra.sweeper.num_trials=many"], "write a whole number"),
    (["-m", "optimizer.lr=interval(0,1)"], "add hydra/sweeper=optuna to search it, or list values"),
    (["-m", "hydra/sweeper=optuna", "seed=7"], "no option has several values"),
    (["-m", "hydra/sweeper=optuna", "seed=1,2", "hydra.sweeper.metric=val/werr"], "did you mean 'val/wer'?"),
    (
        ["-m", "hydra/sweeper=optuna", "seed=1,2", "hydra.sweeper.metric=test/loss"],
        "logs other metrics: test/cer, test/wer, val/audio_gain, val/cer, val/loss, val/wer",
    ),
    (["-m", "hydra/sweeper=optuna", "seed=1,2", "hydra.sweeper.num_trials=0"], "expected a whole number of 1 or more"),
    (["-m", "hydra/sweeper=optuna", "seed=1,2", "run_dir=here"], "leave it out, and write hydra.sweep.dir=FOLDER"),
    (
        ["-m", "hydra/sweeper=optuna", "seed=1,2", "task=evaluate", "checkpoint=x"],
        "a search only works with task=train",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_a_mistake_is_told_before_any_trial(sedtrain, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    ended = sedtrain(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert words in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_told_with_the_extra(sedtrain, monkeypatch):
    monkeypatch.setattr("sedtrain.config.overrides.find_spec", lambda name: None)
    ended = sedtrain("-m", "hydra/sweeper=optuna", LR)
    assert ended.status == 2
    assert "it needs packages that are not installed\n    pip install 'sedtrain[optuna]'" in ended.err


def test_a_metric_that_is_not_logged_is_told_with_those_that_are():
    reporting = TrialReport("sqlite://", "study", 0, "val/mine")
    trainer = SimpleNamespace(sanity_checking=False, callback_metrics={"val/wer": 0.5, "train/loss": 1.0})
    with pytest.raises(UserError) as error:
        reporting.on_validation_end(trainer, None)
    assert error.value.args == ("hydra.sweeper.metric", "val/mine", "this run does not log it", "write one of val/wer")


def test_a_metric_of_one_s_own_needs_its_direction(searched):
    with pytest.raises(UserError, match=r"also hydra\.sweeper\.direction"):
        searched("hydra.sweeper.metric=val/mine")
    _, found = searched("hydra.sweeper.metric=val/mine", "hydra.sweeper.direction=maximize")
    assert found["direction"] == "maximize"


def test_hydra_finds_the_sweeper_beside_the_package():
    assert (Path(__file__).parents[1] / "hydra_plugins/sedtrain_optuna.py").is_file()
    assert not (Path(__file__).parents[1] / "hydra_plugins/__init__.py").exists()  # other plugins lie beside it
