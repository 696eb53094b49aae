"""Interrupted is the same as uninterrupted; what is not the same run is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_transfer import TransferTrainer, UserError
from hf_transfer.errors import WorkFailed
from hf_transfer.run_folder import NONFINITE
from hf_transfer.training import checkpoints
from tests import crash, warm
from tests.helpers import arguments, changed, copy_state, images, texts, tiny_bert, tiny_vit

# ---- kills ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "processes"), crash.CHOSEN)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(case, processes, tmp_path):
    """SIGKILL in each stage, in accumulation, evaluation, and at each point of saving, also of one rank of two; SIGTERM
    and SIGINT on one rank: weights, optimizer by name, rates, plateaus, best metric, history, random numbers. And the
    same seed twice gives the same bits."""
    check_kills(tmp_path, {(case, processes): crash.CHOSEN[case, processes]})


@pytest.mark.slow
@pytest.mark.parametrize(("case", "processes"), crash.MORE)
def test_more_chosen_kills(case, processes, tmp_path):
    check_kills(tmp_path, {(case, processes): crash.MORE[case, processes]})


def check_kills(folder, strikes):
    report = crash.strike(folder, crash.listed(strikes))
    chosen = [several for lists in strikes.values() for several in lists]
    assert report["differences"] == []
    assert report["runs"] == len(chosen) and report["kills"] + report["signals"] == sum(map(len, chosen))
    signals = [strike for several in chosen for strike in several if strike.sends != signal.SIGKILL]
    assert report["signals"] == len(signals) and report["repeated"] == len(strikes)


@pytest.mark.slow
def test_two_hundred_random_kills(tmp_path):
    found = crash.strike(tmp_path, crash.random_strikes(0), enough=200)
    assert found["differences"] == [] and found["kills"] >= 200


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def trained(folder, resumed=None, data=None, callbacks=(), **keys):
    model = tiny_bert(layers=1)
    keys = {"strategy": "gradual", "num_train_epochs": 3, "save_strategy": "epoch", **keys}
    trainer = TransferTrainer(
        model, arguments(folder, **keys), train_dataset=data or texts(16), eval_dataset=texts(8),
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


def damage_size(folder):
    with (folder / "optimizer.pt").open("ab") as file:
        file.write(b"x")


def damage_content(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage_missing(folder):
    (folder / "rng_state.pth").unlink()


def damage_manifest(folder):
    (folder / checkpoints.MANIFEST).write_text('{"files": ')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_size, "optimizer.pt has"),
        (damage_content, "model.safetensors does not have the content"),
        (damage_missing, "rng_state.pth is missing"),
        (damage_manifest, "manifest.json cannot be read"),
    ],
)
def test_auto_goes_back_to_the_newest_whole_checkpoint(damage, said, tmp_path, capsys):
    whole = copy_state(trained(tmp_path).model)
    newest, before = checkpoints.checkpoints(tmp_path)[:2]
    damage(newest)
    with pytest.raises(UserError, match=said):
        trained(tmp_path, resumed=str(newest))
    trainer = trained(tmp_path, resumed="auto")
    assert trainer.resumed_at == int(before.name.split("-")[1])
    assert not changed(whole, copy_state(trainer.model))
    told = capsys.readouterr().err
    assert said in told and f"renamed to broken-{newest.name}" in told
    assert (tmp_path / f"broken-{newest.name}").is_dir() and checkpoints.problem(newest) is None  # saved anew


def test_plain_tools_read_a_checkpoint(tmp_path):
    """transformers loads the model, plain Trainer resumes; and ours goes on from plain Trainer's."""
    trained(tmp_path / "ours", strategy=None)
    newest, before = checkpoints.checkpoints(tmp_path / "ours")[:2]
    assert type(tiny_bert()).from_pretrained(newest).config.num_hidden_layers == 1
    ours = trained(tmp_path / "ours", strategy=None, resumed=str(before)).model
    args = TrainingArguments(
        str(tmp_path / "plain"), use_cpu=True, disable_tqdm=True, learning_rate=1e-2, num_train_epochs=3,
        per_device_train_batch_size=4, save_strategy="epoch", report_to="none",
    )  # fmt: skip
    plain = Trainer(tiny_bert(layers=1), args, train_dataset=texts(16))
    plain.train(resume_from_checkpoint=str(before))
    assert not changed(copy_state(ours), copy_state(plain.model))
    from_plain = checkpoints.checkpoints(tmp_path / "plain")[-1]
    assert not (from_plain / checkpoints.MANIFEST).exists()
    again = trained(tmp_path / "again", strategy=None, resumed=str(from_plain))
    assert not changed(copy_state(again.model), copy_state(plain.model))


def test_a_model_that_is_saved_under_other_names_is_resumed_and_its_best_is_loaded(tmp_path):
    """transformers gives a ViT's weights their hub names in files, which plain Trainer does not find again."""

    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_quality"] = -state.global_step  # the first is the best

    def trainer(folder, **keys):
        keys = {"strategy": "full", "save_strategy": "epoch", "eval_strategy": "epoch", **keys}
        data = images(16)
        return TransferTrainer(
            tiny_vit(layers=1), arguments(folder, **keys), train_dataset=data, eval_dataset=data, callbacks=[Worse()]
        )

    whole = trainer(tmp_path / "a")
    whole.train()
    first = tmp_path / "a" / "checkpoint-4"
    assert not set(load_file(first / "model.safetensors")) <= set(whole.model.state_dict()), "names are the model's now"
    resumed = trainer(tmp_path / "a")
    resumed.train(resume_from_checkpoint=str(first))
    assert not changed(copy_state(whole.model), copy_state(resumed.model))
    best = trainer(tmp_path / "b", load_best_model_at_end=True, metric_for_best_model="quality", greater_is_better=True)
    best.train()
    saved = type(best.model).from_pretrained(first)
    assert not changed(copy_state(saved), copy_state(best.model)) and changed(
        copy_state(saved), copy_state(whole.model)
    )


def test_the_limit_keeps_the_best_and_the_newest(tmp_path):
    class Best(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_quality"] = -state.global_step  # the first is the best

    trainer = trained(
        tmp_path, save_total_limit=2, eval_strategy="epoch", metric_for_best_model="quality", greater_is_better=True,
        load_best_model_at_end=True, num_train_epochs=4, callbacks=[Best()],
    )  # fmt: skip
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-16", "checkpoint-4"]
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-4"
    assert all(checkpoints.problem(p) is None for p in checkpoints.checkpoints(tmp_path))


def test_a_disk_that_fills_up_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys):
    """The second save fails at the manifest, the last at the very first file: the first stays, training goes on."""
    ordinary, calls = checkpoints.seal, []

    def seal(folder):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        ordinary(folder)

    monkeypatch.setattr(checkpoints, "seal", seal)

    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 12:
                monkeypatch.setattr(torch, "save", self.save)

        def save(self, *args, **kwargs):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    trainer = trained(tmp_path, callbacks=[Full()])
    told = capsys.readouterr().err
    assert "checkpoint-8 could not be saved" in told and "No space left on device" in told
    assert "checkpoint-12 could not be saved" in told and "the last checkpoint is checkpoint-4" in told
    assert trainer.state.global_step == 12
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-4"]
    assert checkpoints.problem(tmp_path / "checkpoint-4") is None and not (tmp_path / checkpoints.SAVING).exists()


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    class Vanish(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                shutil.rmtree(tmp_path / "out")

    trained(tmp_path / "out", callbacks=[Vanish()])
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "out")] == ["checkpoint-12", "checkpoint-8"]


def test_what_a_crash_leaves_is_cleared(tmp_path):
    trained(tmp_path)
    (tmp_path / "checkpoint-12").rename(tmp_path / ".old-checkpoint-12")
    (tmp_path / checkpoints.SAVING / "checkpoint-99").mkdir(parents=True)
    (tmp_path / ".gone-checkpoint-1").mkdir()
    checkpoints.clear_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


# ---- the same run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"seed": 7}, "seed: 42 then, 7 now"),
        ({"optim": "sgd"}, "optim: 'adamw_torch_fused' then, 'sgd' now"),
        ({"data": texts(20)}, "training examples: 16 then, 20 now"),
        ({"data": texts(16, seed=1)}, "other content"),
        ({"per_device_train_batch_size": 8}, "examples per optimizer step: 4 then, 8 now"),
        ({"learning_rate": 2e-2}, "learning_rate: 0.01 then, 0.02 now"),
        ({"strategy": "full"}, "stages: head"),
        ({"layer_lr_decay": 0.5}, "learning rates or weight decay"),
        ({"max_grad_norm": 2.0}, "max_grad_norm: 1.0 then, 2.0 now"),
    ],
)
def test_another_run_is_refused_with_the_difference(keys, said, tmp_path):
    trained(tmp_path)
    with pytest.raises(UserError, match=said):
        trained(tmp_path, resumed=str(tmp_path / "checkpoint-8"), **keys)


def test_the_same_examples_per_step_in_another_way_are_the_same_run(tmp_path):
    trained(tmp_path)
    trained(
        tmp_path, resumed=str(tmp_path / "checkpoint-8"), per_device_train_batch_size=2, gradient_accumulation_steps=2
    )


def test_a_changed_plan_on_request(tmp_path, capsys):
    """Longer, and with another rate: the new plan's stages and rates from there on, the optimizer's averages kept."""
    first = trained(tmp_path)
    keys = dict(resumed=str(tmp_path / "checkpoint-8"), num_train_epochs=5, learning_rate=5e-3)
    with pytest.raises(UserError, match="allow_changed_plan"):
        trained(tmp_path, **keys)
    begin = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, model, **kwargs):
            if state.global_step == 8:
                names = {id(p): n for n, p in model.named_parameters()}
                begin.update({names[id(p)]: s["exp_avg"].clone() for p, s in optimizer.state.items()})

    trainer = trained(tmp_path, **keys, allow_changed_plan=True, callbacks=[Look()])
    assert "num_train_epochs: 3.0 then, 5.0 now" in capsys.readouterr().err.replace("3 then", "3.0 then").replace(
        "5 now", "5.0 now"
    )
    assert trainer.state.global_step == 20 and begin["classifier.weight"].abs().sum() > 0
    rates = {log["step"]: log["learning_rate"] for log in trainer.state.log_history if "loss" in log}
    assert rates[9] == pytest.approx(5e-3 * (1 - 8 / 20)) and rates[8] == pytest.approx(1e-2 * (1 - 7 / 12))
    assert first.state.global_step == 12


# ---- values that are no numbers ------------------------------------------------------------------------------------


class Poison(type(tiny_bert())):  # type: ignore[misc]
    """A BERT whose loss is no number for a batch that holds a certain token at a certain place."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        out = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if out.loss is not None and (input_ids[:, 0] == 39).any():
            out.loss = out.loss * float("nan")
        return out


def poisoned(folder, number=1, **keys):
    data = texts(24)
    rows = data["input_ids"][:]
    bad = [5, 17, 21][:number]
    rows = [[39 if i in bad else min(r[0], 38), *r[1:]] for i, r in enumerate(rows)]
    data = data.remove_columns("input_ids").add_column("input_ids", rows)
    torch.manual_seed(0)
    model = Poison(tiny_bert(layers=1).config)
    args = arguments(
        folder, **{"strategy": "full", "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1, **keys}
    )
    trainer = TransferTrainer(model, args, train_dataset=data, eval_dataset=data)
    return trainer, bad


def test_a_loss_that_is_no_number_stops_the_run_before_it_does_harm(tmp_path):
    trainer, bad = poisoned(tmp_path, on_nonfinite="stop")
    with pytest.raises(WorkFailed, match="NaN or infinite at optimizer step"):
        trainer.train()
    (entry,) = [json.loads(line) for line in (tmp_path / NONFINITE).read_text().splitlines()]
    assert set(bad) <= set(entry["examples"]) and len(entry["examples"]) == 4
    assert entry["step"] == trainer.state.global_step and entry["loss"] == "nan" and entry["action"] == "stop"
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_skipping_passes_by_the_batch_and_tells_the_truth(accumulation, tmp_path):
    trainer, bad = poisoned(tmp_path, on_nonfinite="skip", gradient_accumulation_steps=accumulation, num_train_epochs=2)
    states = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            states.append(copy_state(model))

    trainer.add_callback(Look())
    trainer.train()
    states.append(copy_state(trainer.model))
    entries = [json.loads(line) for line in (tmp_path / NONFINITE).read_text().splitlines()]
    assert len(entries) == 2  # once an epoch
    for entry in entries:
        assert set(bad) <= set(entry["examples"]) and len(entry["examples"]) == 4 * accumulation
        assert not changed(states[entry["step"]], states[entry["step"] + 1])
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    assert {step for step, loss in losses.items() if loss != loss} == {entry["step"] + 1 for entry in entries}
    assert changed(states[0], states[-1]) and all(p.isfinite().all() for p in trainer.model.parameters())


def test_rolling_back_loads_the_newest_checkpoint(tmp_path):
    trainer, _ = poisoned(tmp_path, on_nonfinite="rollback", save_steps=2, save_total_limit=None)
    trainer.train()
    (entry,) = [json.loads(line) for line in (tmp_path / NONFINITE).read_text().splitlines()]
    assert entry["action"] == "rollback" and trainer.state.global_step == 6
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_too_many_stop_all_the_same(tmp_path):
    trainer, _ = poisoned(tmp_path, number=3, on_nonfinite="skip", max_nonfinite=1, per_device_train_batch_size=1)
    with pytest.raises(WorkFailed, match="after 1 such steps"):
        trainer.train()


def test_without_a_policy_it_is_trainer(tmp_path):
    trainer, _ = poisoned(tmp_path, strategy=None)
    trainer.train()
    assert not (tmp_path / NONFINITE).exists() and trainer.args.logging_nan_inf_filter


# ---- signals -------------------------------------------------------------------------------------------------------


class Send(TrainerCallback):
    """Sends these signals to its process before the sixth step, so many seconds apart."""

    def __init__(self, numbers, pause):
        self.numbers, self.pause = numbers, pause

    def on_step_begin(self, args, state, control, **kwargs):
        for number in self.numbers if state.global_step == 5 else ():
            os.kill(os.getpid(), number)
            time.sleep(self.pause)


def signalled(folder, numbers, pause):
    return warm.fork(lambda: trained(folder, callbacks=[Send(numbers, pause)]) and 0)


@pytest.mark.parametrize(("numbers", "code"), [([15, 15], 143), ([2], 130)])
def test_a_signal_ends_the_step_saves_and_exits(numbers, code, tmp_path):
    """Also one that a launcher sends on at once."""
    done = signalled(tmp_path, numbers, 0.01)
    assert done.returncode == code, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "checkpoint-6 was saved" in done.stderr and "resume_from_checkpoint='auto'" in done.stderr
    assert checkpoints.problem(tmp_path / "checkpoint-6") is None
    resumed = copy_state(trained(tmp_path, resumed="auto").model)
    assert not changed(resumed, copy_state(trained(tmp_path / "whole").model))


def test_a_second_signal_stops_at_once(tmp_path):
    done = signalled(tmp_path, [15, 15], 1.1)
    assert done.returncode == -15 and [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-4"]


def test_seconds_add_up_over_resumptions(tmp_path):
    first = trained(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-12")
    state = json.loads((tmp_path / "checkpoint-8" / checkpoints.STATE).read_text())
    again = trained(tmp_path, resumed="auto")
    assert again.seconds > state["seconds"] > 0 and first.seconds > state["seconds"]
    records = again.stage_records
    assert sum(r.seconds for r in records) == pytest.approx(again.seconds, rel=0.2) and len(records) == 3


def test_the_command_is_interrupted_and_goes_on(tiny_bert_folder, tmp_path):
    """SIGTERM to `hf-transfer train`, and the same command again: one run, exit codes 143 and 0."""
    rows = [("good", i) if i % 2 else ("bad", i) for i in range(48)]
    (tmp_path / "train.csv").write_text("label,text\n" + "".join(f"{a},a {a} film number {i}\n" for a, i in rows))
    keys = dict(
        model_name_or_path=tiny_bert_folder, train_file=str(tmp_path / "train.csv"), strategy="gradual",
        num_train_epochs=8, per_device_train_batch_size=4, logging_steps=1, save_strategy="steps", save_steps=20,
        max_seq_length=16, eval_strategy="no",
    )  # fmt: skip
    out = tmp_path / "out"
    command = ["train", "--resume_from_checkpoint", "auto", "--output_dir", out]
    command += [word for key, value in keys.items() for word in (f"--{key}", value)]

    def steps() -> list[int]:
        lines = (out / "history.jsonl").read_text().splitlines() if (out / "history.jsonl").exists() else []
        logs = [json.loads(line) for line in lines if line.endswith("}")]
        return [log["step"] for log in logs if "loss" in log]

    first = warm.start(*command)
    while first.poll() is None and len(steps()) < 10:
        time.sleep(0.05)
    first.send(signal.SIGTERM)
    told = first.wait()
    assert told.returncode == 143, told
    assert "Traceback" not in told.stderr and "--resume_from_checkpoint auto" in told.stderr
    reached = steps()[-1]
    assert checkpoints.problem(out / f"checkpoint-{reached}") is None and not (out / "results.json").exists()
    told = warm.hf_transfer(*command)
    assert told.returncode == 0, told
    results = json.loads((out / "results.json").read_text())
    assert steps() == list(range(1, sum(stage["steps"] for stage in results["stages"]) + 1))
    assert min(steps()) == 1 and reached < len(steps())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora_alpha": 64}, "lora_alpha: 16.* then, 64.* now"),
        ({"lora_dropout": 0.1}, "lora_dropout: 0.0 then, 0.1 now"),
        ({"adapter": "rslora"}, "adapter: 'lora' then, 'rslora' now"),
        ({"freeze": ["query"]}, r"freeze: None then, \['query'\] now.* parameters that train: \d+ then, \d+ now"),
    ],
)
def test_an_adapters_keys_are_the_runs(changed, said, tmp_path):
    keys = {"adapter": "lora", "lora_r": 4, "lora_alpha": 16, "strategy": "full"}
    if not (tmp_path / "checkpoint-4").exists():
        trained(tmp_path, **keys)
    with pytest.raises(UserError, match=said):
        trained(tmp_path, resumed=str(checkpoints.checkpoints(tmp_path)[0]), **{**keys, **changed})
