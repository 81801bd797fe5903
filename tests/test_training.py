"The loop's other promises: recipes, groups, shares, faults, early stopping. Exact resume and processes have files of their own."

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from product_retrieval import training
from product_retrieval.core import InputError, keep_memory, read_json
from product_retrieval.data.pictures import Batch
from product_retrieval.training import (
    CsvLog,
    MemoryBatches,
    Task,
    TrainConfig,
    checkpoints,
    fit,
    load_recipe,
    make_plan,
    parameter_groups,
    rate_at,
    read_log,
    share_of,
    update_average,
    use_bf16,
)


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"epochs": 3, "learning_rate": 0.01, "device": "cpu", "tensorboard": False, **changes})


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Dropout(0.2), nn.Linear(8, 3))


def data(size: int = 20, batch_size: int = 4) -> MemoryBatches:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 6, generator=generator)
    return MemoryBatches(x, (x[:, 0] > 0).long(), [f"item-{k}" for k in range(size)], batch_size=batch_size)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


# recipes


@dataclass
class Inner:
    rate: float = 0.1
    names: list[str] = field(default_factory=list)
    maybe: int | None = None
    where: Path = Path()


@dataclass
class Recipe:
    title: str
    inner: Inner = field(default_factory=Inner)
    train: TrainConfig = field(default_factory=TrainConfig)


def write(folder: Path, text: str) -> Path:
    (folder / "r.toml").write_text(text, encoding="utf-8")
    return folder / "r.toml"


def test_a_recipe_becomes_nested_dataclasses(tmp_path):
    text = 'title = "x"\n[inner]\nrate = 2\nnames = ["a"]\nmaybe = 3\nwhere = "w"\n'
    text += '[train]\nepochs = 2\n[train.rates]\n"model.0" = 1'
    found = load_recipe(write(tmp_path, text), Recipe)
    assert found.inner == Inner(2.0, ["a"], 3, Path("w")) and isinstance(found.inner.rate, float)
    assert found.train.epochs == 2 and found.train.rates == {"model.0": 1.0}


@pytest.mark.parametrize(
    "text, said",
    [
        ('titel = "x"', "unknown key 'titel'; did you mean 'title'?"),
        ('title = "x"\n[train]\nlearning_rat = 1', "unknown key 'train.learning_rat'; did you mean 'learning_rate'?"),
        ('title = "x"\n[trian]\nepochs = 1', "unknown key 'trian'; did you mean 'train'?"),
        ("title = 3", "key 'title' is 3, expected text in quotes"),
        ('title = "x"\n[train]\nepochs = 1.5', "key 'train.epochs' is 1.5, expected a whole number"),
        ('title = "x"\n[train]\nepochs = true', "key 'train.epochs' is True, expected a whole number"),
        ('title = "x"\n[train]\ntensorboard = 1', "expected true or false"),
        ('title = "x"\ntrain = 3', "key 'train' is 3, expected a table"),
        ('title = "x"\n[inner]\nnames = ["a", 2]', "key 'inner.names[1]' is 2, expected text in quotes"),
        ('title = "x"\n[inner]\nmaybe = "y"', "key 'inner.maybe' is 'y'"),
        ('title = "x"\n[train.rates]\nmodel = "fast"', "key 'train.rates.model' is 'fast', expected a number"),
        ("[inner]\nrate = 1", "key 'title' is missing"),
        ('title = "x"\n[train]\nepochs = 0', "train.epochs = 0: expected at least 1"),
        ('title = "x"\n[train]\nema = 1.0', "train.ema = 1.0: expected at most"),
        ('title = "x"\n[train]\nprecision = "bf61"', "did you mean 'bf16'?"),
        ("title = ", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_names_file_and_key(tmp_path, text, said):
    with pytest.raises(InputError) as error:
        load_recipe(write(tmp_path, text), Recipe)
    assert said in str(error.value) and "r.toml" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_recipe(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.toml: recipe not found"):
        load_recipe(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_a_rate_that_is_no_rate(value):
    with pytest.raises(InputError, match="learning_rate"):
        TrainConfig(learning_rate=value)


# groups, schedule, average


def test_decay_on_matrices_only_and_rates_by_name():
    task = Task(model(), nn.Linear(3, 3))
    groups = parameter_groups(task, config(rates={"model": 0.1, "model.3": 0.5, "objective": 2.0}, weight_decay=0.3))
    by_name = {name: group for group in groups for name in group["names"]}
    assert len(by_name) == len(list(task.parameters()))
    assert all((by_name[n]["weight_decay"] == 0.3) == (p.ndim >= 2) for n, p in task.named_parameters())
    found = [by_name[name]["factor"] for name in ("model.0.weight", "model.3.bias", "objective.weight")]
    assert found == [0.1, 0.5, 2.0]


def test_rates_that_fit_nothing_are_an_error():
    with pytest.raises(InputError, match=r"begins with 'modle'; did you mean 'model'"):
        parameter_groups(Task(model(), loss), config(rates={"modle": 0.1}))


def test_frozen_parameters_stay_out():
    frozen = model()
    frozen[0].requires_grad_(False)
    names = [n for g in parameter_groups(Task(frozen, loss), config()) for n in g["names"]]
    assert names and not any(n.startswith("model.0") for n in names)


@pytest.mark.parametrize("total, warmup, final", [(1, 0, 0.0), (10, 10, 0.0), (100, 7, 0.1), (5, 1, 1.0)])
def test_schedule_stays_within_bounds_and_peaks_once(total, warmup, final):
    rates = np.array([rate_at(step, total, warmup, final) for step in range(total)])
    assert (rates > 0).all() and (rates <= 1).all() and rates.max() == 1
    assert (np.diff(rates[:warmup]) > 0).all() and (np.diff(rates[warmup:]) <= 0).all()


def test_average_copies_buffers_and_whole_numbers():
    one, two = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    two(torch.randn(8, 3))
    update_average(one, two, 0.5)
    assert torch.equal(one.running_mean, two.running_mean) and one.num_batches_tracked == 1


def test_plan_counts_small_groups():
    plan = make_plan(5, config(epochs=2, accumulate=2, warmup=0.5))
    assert (plan.steps_per_epoch, plan.total, plan.warmup) == (3, 6, 3)
    assert make_plan(5, config(max_steps=4)).total == 4


def test_precision():
    assert use_bf16("bf16", "cpu") and not use_bf16("fp32", "cpu")
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert use_bf16("auto", "cpu") == has_bf16


# batches


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_shares_put_together_are_the_batch(size, processes):
    pixels = torch.randn(size, 3, 2, 2)
    batch = Batch(pixels, [f"t{k}" for k in range(size)], [str(k) for k in range(size)], torch.arange(size), index=3)
    shares = [share_of(batch, k, processes) for k in range(processes)]
    assert sum(count for _, count in shares) == size and all(len(part.item_ids) >= 1 for part, _ in shares)
    assert [i for part, count in shares for i in part.item_ids[:count]] == batch.item_ids
    assert torch.equal(torch.cat([part.pixels[:count] for part, count in shares]), pixels)
    assert all(part.index == 3 for part, _ in shares)


@pytest.mark.parametrize("kind", [dict, tuple, torch.Tensor])
def test_shares_of_other_batches(kind):
    x = torch.arange(4)
    batch = {dict: {"x": x, "scale": 2.0}, tuple: (x, torch.tensor(7.0)), torch.Tensor: x}[kind]
    part, count = share_of(batch, 1, 2)
    first = part["x"] if kind is dict else part[0] if kind is tuple else part
    assert count == 2 and first.tolist() == [2, 3]


def test_batches_that_can_not_resume_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"batches of type DataLoader: expected len\(\), set_epoch"):
        fit(model(), loss, torch.utils.data.DataLoader([1, 2]), config(), tmp_path)
    with pytest.raises(InputError, match="empty"):
        fit(model(), loss, [], config(), tmp_path)


class Numbered(tuple):
    index = -1


def numbered(position: int, size: int = 4) -> Numbered:
    batch = Numbered((torch.full((size, 6), float(position)), torch.zeros(size, dtype=torch.long)))
    batch.index = position
    return batch


class Holes:
    "A loader that found nothing to read in batches 1 and 3 of 4."

    def __len__(self):
        return 4

    def iter_from(self, start):
        return (numbered(k) for k in (0, 2) if k >= start)


def test_a_batch_without_a_readable_picture_keeps_its_place(tmp_path):
    found = [batch if batch is None else batch.index for batch in training.every_batch(Holes(), 0, 0)]
    assert found == [0, None, 2, None]
    assert list(training.every_batch(Holes(), 0, 3)) == [None]
    history = fit(model(), lambda m, b: loss(m, (b[0], b[1])), Holes(), config(epochs=2), tmp_path)
    assert history.steps == 8 and history.train.loss.iloc[1] == 0.0


# the loop


def test_one_value_or_many_and_own_parameters(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.calls = 0

        def forward(self, model, batch):
            value = loss(model, batch) * self.scale.exp()
            return {"loss": value, "other": value.detach() * 2, "constant": 3.0}

        def after_step(self, model):
            self.calls += 1

    own = Own()
    history = fit(model(), own, data(), config(), tmp_path)
    assert list(history.train.columns) == ["loss", "other", "constant", "learning_rate", "gradient_norm"]
    assert np.allclose(history.train.other, 2 * history.train.loss) and (history.train.constant == 3).all()
    assert own.scale.item() != 1 and own.calls == 15
    assert "objective.scale" in load_file(checkpoints(tmp_path)[-1] / "task.safetensors")


def test_the_best_weights_are_handed_over(tmp_path):
    trained, scores, kept = model(), iter([0.1, 0.9, 0.5]), []

    def validate(m):
        kept.append({k: v.clone() for k, v in m.state_dict().items()})
        return {"MAR@10": next(scores), "size": 1.0}

    history = fit(trained, loss, data(), config(), tmp_path, validate)
    assert (history.best, history.best_step) == (0.9, 10)
    assert all(torch.equal(value, kept[1][key]) for key, value in trained.state_dict().items())
    on_disk = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, kept[1][key]) for key, value in on_disk.items())
    assert "best value 0.9000 at step 10" in str(history)


def test_patience_ends_a_run_and_the_same_call_gives_its_result(tmp_path):
    scores = iter([0.5, 0.4, 0.3, 0.2])
    history = fit(model(), loss, data(), config(epochs=9, patience=2), tmp_path, lambda m: next(scores))
    assert history.steps == 15 and history.planned == 45 and history.best_step == 5
    again = model()
    assert fit(again, loss, data(), config(epochs=9, patience=2), tmp_path, lambda m: 1 / 0) == history
    assert list(history.validation.columns) == ["score"]


def test_a_score_that_is_no_number_is_never_the_best(tmp_path):
    scores = iter([float("nan"), 0.2, float("nan")])
    assert fit(model(), loss, data(), config(), tmp_path, lambda m: next(scores)).best == 0.2


def test_an_unknown_metric(tmp_path):
    with pytest.raises(InputError, match=r"metric = 'MAR@1': validation does not give it; did you mean 'MAR@10'"):
        fit(model(), loss, data(), config(metric="MAR@1"), tmp_path, lambda m: {"MAR@10": 0.1})


def test_validation_draws_no_luck_away(tmp_path):
    "Random numbers drawn in validation change nothing in training."
    fit(model(), loss, data(), config(), tmp_path / "a", lambda m: 0.5)
    fit(model(), loss, data(), config(), tmp_path / "b", lambda m: float(torch.rand(())))
    assert (tmp_path / "a/train.csv").read_text() == (tmp_path / "b/train.csv").read_text()


def test_tied_weights_survive(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.into, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.out.weight = self.into.weight

        def forward(self, x):
            return self.out(self.into(x).relu())

    stopped, whole = Tied(), Tied()
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, stop_at(7), data(), config(ema=0.5), tmp_path / "a")
    fit(stopped, loss, data(), config(ema=0.5), tmp_path / "a")
    fit(whole, loss, data(), config(ema=0.5), tmp_path / "b")
    assert same(stopped, whole) and stopped.out.weight is stopped.into.weight


def test_keep_and_max_steps(tmp_path):
    fit(model(), loss, data(), config(max_steps=7, checkpoint_every=2, keep=3), tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000004", "step-00000006", "step-00000007"]


def test_another_recipe_does_not_continue_the_run(tmp_path):
    fit(model(), loss, data(), config(), tmp_path)
    with pytest.raises(InputError, match=r"begun with epochs = 3, now 4; .* or resume=False"):
        fit(model(), loss, data(), config(epochs=4), tmp_path)
    with pytest.raises(InputError, match="steps_per_epoch = 5, now 10"):
        fit(model(), loss, data(batch_size=2), config(), tmp_path)
    history = fit(model(), loss, data(), config(epochs=4), tmp_path, resume=False)
    assert history.steps == 20 and list(history.train.index) == list(range(1, 21))


def test_a_broken_checkpoint_is_named(tmp_path):
    fit(model(), loss, data(), config(), tmp_path)
    path = checkpoints(tmp_path)[-1] / "task.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"task\.safetensors: cannot be loaded .* broken or of another model"):
        fit(model(), loss, data(), config(), tmp_path)


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    fit(model(), loss, data(), config(), tmp_path)
    with pytest.raises(InputError, match=r"task\.safetensors: cannot be loaded into Task"):
        fit(nn.Linear(6, 3), loss, data(), config(), tmp_path)


def test_bf16_trains_as_well(tmp_path):
    one = fit(model(), loss, data(200, 20), config(epochs=10, precision="fp32"), tmp_path / "a").train.loss
    two = fit(model(), loss, data(200, 20), config(epochs=10, precision="bf16"), tmp_path / "b").train.loss
    assert abs(one.iloc[-10:].mean() - two.iloc[-10:].mean()) < 0.05 and not one.equals(two)


def test_tensorboard_shows_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        fit(model(), stop_at(6), data(), config(tensorboard=True), tmp_path, lambda m: 0.5)
    fit(model(), loss, data(), config(tensorboard=True), tmp_path, lambda m: 0.5)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 16))
    assert [e.step for e in events.Scalars("validation/score")] == [5, 10, 15]


# faults


def test_nan_names_the_items_and_spares_the_weights(tmp_path):
    "The loop stops before the step; with repaired data the same run goes on."

    def ill(m, batch):
        return loss(m, batch) * (float("nan") if "item-7" in batch[2] and m.training and ill.armed else 1.0)

    ill.armed = False
    calm = lambda m: setattr(ill, "armed", True) or 0.5
    with pytest.raises(InputError) as error:
        fit(model(), ill, data(), config(), tmp_path, calm)
    said = str(error.value)
    assert "loss is nan" in said and "item-7" in said and "epoch 2" in said and said.count("item-") == 4
    assert "the last good checkpoint is" in said and "step-00000005" in said
    assert all(t.isfinite().all() for t in load_file(checkpoints(tmp_path)[-1] / "task.safetensors").values())
    healed, whole = model(), model()
    fit(healed, loss, data(), config(), tmp_path, lambda m: 0.5)
    fit(whole, loss, data(), config(), tmp_path / "whole", lambda m: 0.5)
    assert same(healed, whole)


def test_an_endless_gradient_stops_too(tmp_path):
    with pytest.raises(InputError, match=r"gradient_norm is (inf|nan)"):
        fit(model(), lambda m, b: (m(b[0]).abs().sum() * 0).sqrt(), data(), config(), tmp_path)


def stop_at(step: int, number: int = signal.SIGINT):
    "An objective that sends this process a signal in the middle of a step."
    calls = [0]

    def objective(m, batch):
        calls[0] += m.training
        if calls[0] == step:
            os.kill(os.getpid(), number)
        return loss(m, batch)

    return objective


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, number):
    before = signal.getsignal(number)
    stopped, whole = model(), model()
    with pytest.raises(KeyboardInterrupt) as stop:
        fit(stopped, stop_at(7, number), data(), config(), tmp_path / "a")
    assert "stopped after step 7 of 15; saved in" in str(stop.value) and "start the same run again" in str(stop.value)
    assert signal.getsignal(number) is before and checkpoints(tmp_path / "a")[-1].name == "step-00000007"
    fit(stopped, loss, data(), config(), tmp_path / "a")
    fit(whole, loss, data(), config(), tmp_path / "b")
    assert same(stopped, whole)
    assert (tmp_path / "a/train.csv").read_text() == (tmp_path / "b/train.csv").read_text()


def test_the_second_ctrl_c_stops_at_once(tmp_path):
    def twice(m, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return loss(m, batch)

    with pytest.raises(KeyboardInterrupt) as stop:
        fit(model(), twice, data(), config(), tmp_path)
    assert "saved" not in str(stop.value) and not checkpoints(tmp_path)


def test_in_a_thread_without_signals(tmp_path):
    result = []
    thread = threading.Thread(target=lambda: result.append(fit(model(), loss, data(), config(), tmp_path)))
    thread.start()
    thread.join()
    assert result[0].steps == 15


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    "The system itself refuses: no file may grow beyond 2 KB from the second epoch on."
    wide = lambda: nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 3))
    former = resource.getrlimit(resource.RLIMIT_FSIZE)

    def tight(m):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, former[1]))
        return 0.5

    scores = iter([lambda m: 0.5, tight])
    torch.manual_seed(0)
    first = wide()
    start = {k: v.clone() for k, v in first.state_dict().items()}
    try:
        with pytest.raises(InputError) as error:
            fit(first, loss, data(), config(), tmp_path / "a", lambda m: next(scores)(m))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    said = str(error.value)
    assert "the disk is full" in said and "step-00000005" in said and "start the same run again" in said
    assert [p.name for p in (tmp_path / "a/checkpoints").iterdir()] == ["step-00000005"]
    second = wide()
    fit(first, loss, data(), config(), tmp_path / "a", lambda m: 0.5)
    second.load_state_dict(start)
    fit(second, loss, data(), config(), tmp_path / "b", lambda m: 0.5)
    assert same(first, second)


def test_a_full_disk_while_logging(tmp_path, monkeypatch):
    def full(self, step, values):
        if step == 8:
            raise OSError(28, "No space left on device")
        write_row(self, step, values)

    write_row = CsvLog.write
    monkeypatch.setattr(CsvLog, "write", full)
    with pytest.raises(InputError, match=r"the disk is full .* the last good checkpoint is .*step-00000005"):
        fit(model(), loss, data(), config(), tmp_path)


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    def broken(m, batch):
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        fit(model(), broken, data(), config(), tmp_path)


def test_log_keeps_its_columns_and_cuts_half_rows(tmp_path):
    log = CsvLog(tmp_path / "l.csv")
    log.write(1, {"a, b": 1.5})
    with pytest.raises(InputError, match=r"l\.csv: a row with columns \['c'\]"):
        log.write(2, {"c": 1.0})
    log.file.write("2,0.")
    log.file.close()
    CsvLog(tmp_path / "l.csv", step=1).file.close()
    assert (tmp_path / "l.csv").read_text() == 'step,"a, b"\n1,1.5\n'
    assert read_log(tmp_path / "nowhere.csv").empty
    assert CsvLog(tmp_path / "l.csv", step=0).columns == []


def test_nothing_is_pickled(tmp_path):
    fit(model(), loss, data(), config(ema=0.9), tmp_path, lambda m: 0.5)
    kinds = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert kinds == {".safetensors", ".json", ".csv"}
    state = read_json(checkpoints(tmp_path)[-1] / "state.json")
    assert state["step"] == 15 and state["done"] and TrainConfig(**state["config"]) == replace(config(), ema=0.9)


def test_no_readable_picture_is_one_clear_error(tmp_path):
    class Nothing:
        def __len__(self):
            return 2

        def iter_from(self, start):
            return iter(())

    with pytest.raises(InputError, match="could be read"):
        fit(torch.nn.Linear(2, 2), lambda model, batch: model(batch).sum(), Nothing(), TrainConfig(epochs=1), tmp_path / "run")


def test_two_runs_in_one_folder(tmp_path):
    "A folder that a living process trains in is refused; the mark of a dead one is not."
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text(str(os.getppid()))
    batches = [torch.ones(2, 2)]
    with pytest.raises(InputError, match="runs a training here"):
        fit(torch.nn.Linear(2, 2), lambda model, batch: model(batch).sum(), batches, TrainConfig(epochs=1), tmp_path / "run")
    (tmp_path / "run" / ".lock").write_text("99999999")
    fit(torch.nn.Linear(2, 2), lambda model, batch: model(batch).sum(), batches, TrainConfig(epochs=1), tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_sentence_about_the_best_validation():
    from product_retrieval.training import History

    assert History(Path("run"), 5, 5).about_best("MAR@10") == ""
    assert History(Path("run"), 5, 5, 0.25, 3).about_best("MAR@10") == " Best validation MAR@10: 0.2500 at step 3."


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_epoch_of_batches_is_begun_once(tmp_path, accumulate):
    "Beginning again at every step would start a loader's worker processes anew each time."
    begun = []

    class Counting(MemoryBatches):
        def iter_from(self, start):
            begun.append((self.epoch, start))
            return super().iter_from(start)

    objective, data = lambda model, batch: model(batch[0]).square().mean(), torch.randn(24, 4)
    plan = config(accumulate=accumulate, max_steps=4)  # stops in the middle of the first or the second epoch
    fit(nn.Linear(4, 1), objective, Counting(data, batch_size=4), plan, tmp_path)
    assert begun == [[(0, 0)], [(0, 0), (1, 0)]][accumulate - 1]
    fit(nn.Linear(4, 1), objective, Counting(data, batch_size=4), replace(plan, max_steps=0), tmp_path / "whole")
    assert begun[-3:] == [(0, 0), (1, 0), (2, 0)]


def test_kept_memory_changes_no_number():
    "The same steps in two processes, one of which keeps freed memory, end in the same weights."
    code = """
import hashlib, platform, sys, torch
from product_retrieval.core import keep_memory
kept = keep_memory() if sys.argv[1] == "keep" else None
assert kept is None or kept == (platform.libc_ver()[0] == "glibc")
torch.manual_seed(0); torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Conv2d(16, 4, 3))
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
for _ in range(3):
    model(torch.randn(8, 3, 64, 64)).square().mean().backward(); optimizer.step(); optimizer.zero_grad()
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
"""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    call = lambda how: subprocess.run([sys.executable, "-c", code, how], env=clean, capture_output=True, text=True)
    kept, given_back = call("keep"), call("no")
    assert kept.stdout and kept.stdout == given_back.stdout, kept.stderr + given_back.stderr


def test_a_user_who_set_the_allocator_is_obeyed(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        with monkeypatch.context() as one:
            one.setenv(name, "1")
            assert keep_memory() is False
