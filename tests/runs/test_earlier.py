"""What a run reads of an earlier task: replay data, a teacher, the Fisher information; end to end on tiny models."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_transfer import UserError, fine_tune
from hf_transfer.objectives.fisher import Fisher
from tests import warm
from tests.helpers import copy_state

WORDS = {"good": ["fine", "great", "nice", "sweet"], "bad": ["poor", "awful", "dull", "sad"]}
QUICK = {
    "strategy": "full",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "label_issues": False,
    "expected_accuracy": False,
    "calibrate": False,
    "log_level": "error",
}


def table(path, labels=("good", "bad"), columns=("text", "label"), rows=24, salt=""):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for i in range(rows):
            label = labels[i % len(labels)]
            words = WORDS.get(label, ["other"])
            writer.writerow([f"{salt} {words[i // 2 % len(words)]} {i}", label])
    return str(path)


@pytest.fixture(scope="module")
def old_run(tmp_path_factory, tiny_bert_folder):
    """A model of the earlier task, with its head."""
    folder = tmp_path_factory.mktemp("old")
    fine_tune(tiny_bert_folder, table(folder / "old.csv"), output_dir=str(folder / "run"), **QUICK)
    return folder


def run(model, data, folder, **keys):
    return fine_tune(model, data, output_dir=str(folder), **{**QUICK, **keys})


# ---- replay ----------------------------------------------------------------------------------------------------------


def test_replayed_examples_come_into_every_batch(tmp_path, tiny_bert_folder):
    """From a table with other columns, and labels in another order."""
    old = table(tmp_path / "old.csv", ("bad", "good"), ("sentence", "class"), salt="old")
    result = run(
        tiny_bert_folder,
        table(tmp_path / "new.csv", salt="new"),
        tmp_path / "run",
        replay_dataset_name=old,
        replay_fraction=0.5,
    )
    trainer, tokenizer = result.trainer, AutoTokenizer.from_pretrained(tmp_path / "run")
    for batch in trainer.get_train_dataloader():
        texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        is_old = ["old" in "".join(text.split()) for text in texts]
        assert abs(sum(is_old) - len(texts) / 2) < 1
        for text, label in zip(texts, batch["labels"].tolist(), strict=True):
            name, squeezed = trainer.model.config.id2label[label], "".join(text.split())
            assert any(word in squeezed for word in WORDS[name]), "labels are mapped by name"
    assert len(trainer.train_dataset) < 24, "the training set itself is as it was"
    assert trainer.state.max_steps == 5  # 19 examples and as many replayed


@pytest.mark.parametrize(
    ("labels", "keys", "said"),
    [
        (("good", "ugly"), {}, r"replay_dataset_name: .*unknown label 'ugly'.*The head of .* \(bad, good\)"),
        (("good", "bad"), {"backbone": True}, r"replay_dataset_name: .*unknown label 'bad'.*has none \(classifier"),
        (("good", "bad"), {"per_device_train_batch_size": 1}, r"replay_fraction: .*per_device_train_batch_size to 2"),
        (("good", "bad"), {"auto_find_batch_size": True}, r"auto_find_batch_size: .*needs batches of 2 or more"),
        (("good", "bad"), {"pooling": "mean"}, r"replay_dataset_name: the head of .* cannot read what"),
        (("good", "bad"), {"strategy": "linear-probe"}, r"replay_dataset_name: the plan trains nothing below the head"),
    ],
)
def test_other_labels_are_those_of_the_checkpoints_head(labels, keys, said, tmp_path, old_run):
    old, new = table(tmp_path / "old.csv", labels), table(tmp_path / "new.csv", ("other", "good"))
    model = str(old_run / "run")
    if keys.pop("backbone", False):
        AutoModel.from_pretrained(model).save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    with pytest.raises(UserError, match=said):
        run(model, new, tmp_path / "run", replay_dataset_name=old, **keys)
    assert not (tmp_path / "run").exists()


def test_the_checkpoints_head_answers_replayed_examples_of_its_task(tmp_path, old_run, capsys):
    new = table(tmp_path / "new.csv", ("other", "good"), salt="new")
    keys = {"replay_dataset_name": str(old_run / "old.csv"), "replay_fraction": 0.25, "log_level": "info"}
    result = run(str(old_run / "run"), new, tmp_path / "run", **keys, forgetting_dataset_name=str(old_run / "old.csv"))
    assert "answered by the head of" in capsys.readouterr().out
    assert sorted(result.model.config.label2id) == ["good", "other"]
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert saved["classifier.weight"].shape[0] == 2 and not any("earlier" in name for name in saved)
    terms = [log["penalty/replay_fraction"] for log in result.trainer.state.log_history if "loss" in log]
    assert terms and terms[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["full", "gradual", "lora"])
def test_a_resumed_run_replays_the_other_task_as_before(strategy, tmp_path, old_run):
    new = table(tmp_path / "new.csv", ("other", "good"), rows=36, salt="new")
    keys = {
        "strategy": strategy,
        "num_train_epochs": 3,
        "replay_dataset_name": str(old_run / "old.csv"),
        "replay_fraction": 0.25,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 9,
    }
    whole = run(str(old_run / "run"), new, tmp_path / "run", **keys)
    interrupted = tmp_path / "interrupted"
    shutil.copytree(tmp_path / "run", interrupted)
    (interrupted / "results.json").unlink()
    for checkpoint in interrupted.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > 6:
            shutil.rmtree(checkpoint)
    resumed = run(str(old_run / "run"), new, interrupted, resume_from_checkpoint="auto", **keys)
    assert resumed.trainer.resumed_at == 6 < whole.trainer.state.global_step
    one, other = copy_state(whole.trainer.model), copy_state(resumed.trainer.model)
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


@pytest.mark.slow
def test_two_processes_replay_the_other_task_as_one(tmp_path, old_run):
    new, old = table(tmp_path / "new.csv", ("other", "good"), rows=40, salt="new"), str(old_run / "old.csv")
    keys = {"replay_dataset_name": old, "replay_fraction": 0.25, "optim": "sgd", "learning_rate": 0.1, "seed": 3}
    keys["dataloader_drop_last"] = True  # two processes fill up the last batch

    def as_rank():
        run(str(old_run / "run"), new, tmp_path / "two", **keys, per_device_train_batch_size=4)

    assert warm.ranks(2, as_rank, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()[-3000:]
    two = load_file(tmp_path / "two" / "model.safetensors")
    one = run(str(old_run / "run"), new, tmp_path / "one", **keys)
    assert all(torch.allclose(tensor, two[name], rtol=0, atol=1e-5) for name, tensor in one.model.state_dict().items())


def test_replay_data_that_is_not_there_is_named_by_its_key(tmp_path, tiny_bert_folder):
    with pytest.raises(UserError, match=r"^replay_dataset_name: ") as caught:
        run(tiny_bert_folder, table(tmp_path / "new.csv"), tmp_path / "run", replay_dataset_name="nowhere.csv")
    assert "dataset_name" not in str(caught.value).replace("replay_dataset_name", "")


def test_replay_data_without_a_text_is_refused(tmp_path, tiny_bert_folder):
    (tmp_path / "old.csv").write_text("a,b,label\n" + "".join(f"{i},{i},good\n" for i in range(9)))
    with pytest.raises(UserError, match=r"^replay_dataset_name: .*text-classification"):
        run(
            tiny_bert_folder,
            table(tmp_path / "new.csv"),
            tmp_path / "run",
            replay_dataset_name=str(tmp_path / "old.csv"),
        )


@pytest.mark.parametrize("drops", [pytest.param(False, marks=pytest.mark.slow), True])
def test_examples_that_are_measured_on_are_not_replayed_unseen(drops, tmp_path, tiny_bert_folder):
    new = table(tmp_path / "new.csv")
    result = run(
        tiny_bert_folder, new, tmp_path / "run", replay_dataset_name=new, drop_leaks=drops, replay_fraction=0.5
    )
    count = len(result.trainer.eval_dataset)
    assert len(result.trainer.replay.dataset) == (24 - count if drops else 24)


@pytest.mark.slow
def test_other_replay_data_is_another_run(tmp_path, tiny_bert_folder):
    new, old = table(tmp_path / "new.csv"), table(tmp_path / "old.csv", salt="old")
    keys = {"replay_dataset_name": old, "num_train_epochs": 2}
    run(tiny_bert_folder, new, tmp_path / "run", **keys)
    table(tmp_path / "old.csv", salt="older")
    (tmp_path / "run" / "results.json").unlink()  # as if it had been killed before its end
    with pytest.raises(UserError, match=r"replayed examples: .* then, .* now"):
        run(tiny_bert_folder, new, tmp_path / "run", resume_from_checkpoint="auto", **keys)


# ---- EWC -------------------------------------------------------------------------------------------------------------


def test_the_fisher_information_is_kept_and_reused(tmp_path, old_run):
    """Of the checkpoint's own head and labels, for a run with others; the file gives the same run."""
    new = table(tmp_path / "new.csv", ("good", "bad", "other"), salt="new")
    model, old = str(old_run / "run"), str(old_run / "old.csv")
    first = run(model, new, tmp_path / "first", ewc_lambda=50.0, ewc_dataset_name=old, ewc_samples=10)
    fisher = Fisher.load(tmp_path / "first" / "fisher.safetensors")
    assert fisher.about["examples"] == 10 and fisher.about["kind"] == "empirical"
    assert fisher.values["classifier.weight"].shape == (2, 8)
    again = run(
        model, new, tmp_path / "again", ewc_lambda=50.0, ewc_fisher_file=str(tmp_path / "first" / "fisher.safetensors")
    )
    one, other = copy_state(first.trainer.model), copy_state(again.trainer.model)
    assert all(torch.equal(one[n], other[n]) for n in one)

    source = AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer, row = AutoTokenizer.from_pretrained(model), {"text": [], "label": []}
    with Path(old).open() as file:
        for entry in csv.DictReader(file):
            row["text"].append(entry["text"])
            row["label"].append(source.config.label2id[entry["label"]])
    import numpy as np

    seed = first.trainer.args.seed
    chosen = np.sort(np.random.default_rng(seed).permutation(len(row["text"]))[:10])
    expected = torch.zeros(2)
    for i in chosen:
        source.zero_grad()
        source(**tokenizer(row["text"][i], return_tensors="pt"), labels=torch.tensor([row["label"][i]])).loss.backward()
        expected += source.classifier.bias.grad.square() / 10
    assert torch.allclose(fisher.values["classifier.bias"], expected, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_hold_the_same_weights_as_one(tmp_path, old_run):
    """Each computes the information of all examples, and a resumed run reads it; the watched task is shared by both."""
    new, old = table(tmp_path / "new.csv", ("good", "bad", "other"), rows=40, salt="new"), str(old_run / "old.csv")
    shown = table(tmp_path / "shown.csv", rows=12, salt="shown")
    keys = {"ewc_lambda": 1e5, "ewc_dataset_name": old, "ewc_fisher": "true", "forgetting_dataset_name": shown}
    keys |= {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 2, "save_strategy": "epoch", "seed": 3}
    model = str(old_run / "run")

    def in_two(folder, **more):
        def as_rank():
            run(model, new, folder, per_device_train_batch_size=4, **keys, **more)

        assert warm.ranks(2, as_rank, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()[-3000:]
        return load_file(folder / "model.safetensors"), json.loads((folder / "results.json").read_text())

    two, results = in_two(tmp_path / "two")
    one = run(model, new, tmp_path / "one", **keys)
    files = [Fisher.load(tmp_path / name / "fisher.safetensors") for name in ("one", "two")]
    assert files[0].about == files[1].about and files[0].about["kind"] == "true"
    assert all(torch.equal(value, files[1].values[name]) for name, value in files[0].values.items())
    assert all(torch.allclose(tensor, two[name], rtol=0, atol=1e-5) for name, tensor in one.model.state_dict().items())
    losses = [found["forgetting"]["metrics"]["loss"] for found in (results, one.results)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)

    saved = sorted((tmp_path / "two").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert len(saved) == 2
    shutil.rmtree(saved[1])
    for name in ("results.json", "model.safetensors"):
        (tmp_path / "two" / name).unlink()
    again, resumed = in_two(tmp_path / "two", resume_from_checkpoint="auto")
    assert all(torch.equal(tensor, two[name]) for name, tensor in again.items())
    assert resumed["forgetting"] == results["forgetting"]


def test_a_checkpoint_without_a_head_has_no_fisher_information(tmp_path, old_run):
    import transformers

    from tests.helpers import TOKENS, tiny_bert

    tiny_bert(vocab_size=TOKENS).bert.save_pretrained(tmp_path / "bare")
    AutoTokenizer.from_pretrained(old_run / "run").save_pretrained(tmp_path / "bare")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "bare").architectures == ["BertModel"]
    with pytest.raises(UserError, match=r"^ewc_dataset_name: .*no trained head .*l2_sp_alpha"):
        run(
            str(tmp_path / "bare"),
            table(tmp_path / "new.csv"),
            tmp_path / "run",
            ewc_lambda=1.0,
            ewc_dataset_name=str(old_run / "old.csv"),
        )


# ---- the teacher -----------------------------------------------------------------------------------------------------


def test_a_teacher_with_these_labels_is_followed(tmp_path, tiny_bert_folder, old_run):
    """The term is logged, and nothing of the teacher is saved."""
    teacher, own = AutoModelForSequenceClassification.from_pretrained(old_run / "run"), str(tmp_path / "teacher")
    with torch.no_grad():
        teacher.classifier.weight.mul_(100)
    teacher.save_pretrained(own)
    AutoTokenizer.from_pretrained(old_run / "run").save_pretrained(own)
    keys = {"teacher_model_name_or_path": own, "distillation_temperature": 4.0}
    result = run(
        tiny_bert_folder, table(tmp_path / "new.csv"), tmp_path / "run", distillation_alpha=1.0, logging_steps=1, **keys
    )
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    terms = [entry["penalty/distillation_alpha"] for entry in history if "penalty/distillation_alpha" in entry]
    assert len(terms) == result.trainer.state.max_steps and min(terms) > 1e-4
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert set(saved.state_dict()) == set(result.trainer.model.state_dict())
    (penalty,) = result.trainer.objective.penalties
    assert all(torch.equal(p, q) for p, q in zip(penalty.module.parameters(), teacher.parameters(), strict=True))


def test_a_teacher_with_other_labels_is_refused(tmp_path, tiny_bert_folder, old_run):
    new = table(tmp_path / "new.csv", ("good", "other"))
    with pytest.raises(UserError, match=r"^teacher_model_name_or_path: the teacher predicts .*bad.* this run .*other"):
        run(
            tiny_bert_folder,
            new,
            tmp_path / "run",
            distillation_alpha=1.0,
            teacher_model_name_or_path=str(old_run / "run"),
        )


def test_a_teacher_without_a_head_is_refused_as_such(tmp_path, tiny_bert_folder, old_run):
    """Its configuration names two labels, which are transformers' defaults."""
    AutoModel.from_pretrained(old_run / "run").save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(old_run / "run").save_pretrained(tmp_path / "teacher")
    keys = {"distillation_alpha": 1.0, "teacher_model_name_or_path": str(tmp_path / "teacher")}
    with pytest.raises(UserError, match=r"^teacher_model_name_or_path: .*holds no trained head: it contains BertModel"):
        run(tiny_bert_folder, table(tmp_path / "new.csv", ("good", "other")), tmp_path / "run", **keys)


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path, tiny_bert_folder, old_run):
    from transformers import BertTokenizer

    vocab = AutoTokenizer.from_pretrained(old_run / "run").get_vocab()
    words = [t for t in sorted(vocab, key=vocab.__getitem__) if not t.startswith("[")]
    turned = dict(zip(words, [vocab[w] for w in reversed(words)], strict=True))
    model = AutoModelForSequenceClassification.from_pretrained(old_run / "run")
    model.save_pretrained(tmp_path / "teacher")
    BertTokenizer(vocab={**vocab, **turned}, model_max_length=16).save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"^teacher_model_name_or_path: the teacher has another tokenizer"):
        run(
            tiny_bert_folder,
            table(tmp_path / "new.csv"),
            tmp_path / "run",
            distillation_alpha=1.0,
            teacher_model_name_or_path=str(tmp_path / "teacher"),
        )


@pytest.mark.slow
def test_regularizers_need_a_pretrained_model(tmp_path, tiny_bert_folder):
    with pytest.raises(UserError, match="l2_sp_alpha holds the model to its pretrained weights, and from_scratch"):
        run(tiny_bert_folder, table(tmp_path / "new.csv"), tmp_path / "run", l2_sp_alpha=0.1, from_scratch=True)
    with pytest.raises(UserError, match="streaming"):
        run(
            tiny_bert_folder,
            table(tmp_path / "new.csv"),
            tmp_path / "run",
            replay_dataset_name="x",
            streaming=True,
            max_steps=3,
            max_eval_samples=4,
        )


def test_a_head_of_the_checkpoint_is_held_only_where_it_is_kept(tmp_path, old_run):
    kept = run(str(old_run / "run"), table(tmp_path / "new.csv", salt="new"), tmp_path / "kept", l2_sp_alpha=0.1)
    new = run(
        str(old_run / "run"),
        table(tmp_path / "other.csv", ("good", "bad", "other")),
        tmp_path / "new",
        l2_sp_alpha=0.1,
    )
    assert kept.trainer.keeps_head and not new.trainer.keeps_head
    assert float(kept.trainer.objective.values["l2_sp_beta"]) == 0 < float(new.trainer.objective.values["l2_sp_beta"])


def test_a_term_that_overflows_is_found_before_training(tmp_path, tiny_bert_folder):
    with pytest.raises(UserError, match=r"NaN or infinite before the first step.*Lower l2_sp_alpha"):
        run(tiny_bert_folder, table(tmp_path / "new.csv"), tmp_path / "run", l2_sp_alpha=1e39)


def test_no_other_layer_is_chosen_where_the_old_head_has_to_read_it(tmp_path, old_run):
    new = table(tmp_path / "new.csv", ("other", "good"), salt="new")
    keys = {"replay_dataset_name": str(old_run / "old.csv"), "replay_fraction": 0.25, "strategy": "auto"}
    result = run(str(old_run / "run"), new, tmp_path / "run", **keys)
    assert result.trainer.replay.apart and result.results["pooling"] is None
    assert "the head of the replayed task" in result.results["auto"]["pooling"]["why"]


@pytest.mark.slow
@pytest.mark.parametrize("labels", [("good", "bad"), ("other", "good")])
def test_a_range_test_takes_the_steps_of_the_run_with_replayed_examples(labels, tmp_path, old_run):
    """Under the run's own head, and under that of the checkpoint."""
    keys = {"replay_dataset_name": str(old_run / "old.csv"), "replay_fraction": 0.5, "learning_rate": "auto"}
    result = run(str(old_run / "run"), table(tmp_path / "new.csv", labels), tmp_path / "run", **keys)
    assert (tmp_path / "run" / "find_lr.csv").is_file() and result.trainer.state.global_step == 5
    assert result.trainer.replay.apart == ("other" in labels)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["full", "gradual", "auto"])
def test_a_resumed_run_has_the_same_reference_and_the_same_batches(strategy, tmp_path, old_run):
    """Bit for bit, with the Fisher information that the interrupted run left, and a head that reads a pooled layer."""
    new = table(tmp_path / "new.csv", ("good", "bad", "other"), rows=36, salt="new")
    keys = {
        "strategy": strategy,
        "num_train_epochs": 3,
        "ewc_lambda": 1e4,
        "ewc_dataset_name": str(old_run / "old.csv"),
        "l2_sp_alpha": 0.1,
        "distillation_alpha": 0.5,
        "replay_dataset_name": str(old_run / "old.csv"),
        "replay_fraction": 0.25,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 9,
    }
    whole = run(str(old_run / "run"), new, tmp_path / "run", **keys)
    assert "ewc_lambda" in {penalty.name for penalty in whole.trainer.objective.penalties}
    folder, interrupted = tmp_path / "run", tmp_path / "interrupted"
    shutil.copytree(folder, interrupted)
    for path in (interrupted / "results.json", interrupted / "model.safetensors"):
        path.unlink()
    for checkpoint in interrupted.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > 6:
            shutil.rmtree(checkpoint)
    resumed = run(str(old_run / "run"), new, interrupted, resume_from_checkpoint="auto", **keys)
    assert resumed.trainer.resumed_at == 6 < whole.trainer.state.global_step
    one, other = copy_state(whole.trainer.model), copy_state(resumed.trainer.model)
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


@pytest.mark.slow
def test_images_are_replayed_and_a_teacher_of_images_is_followed(tmp_path, tiny_vit_folder):
    keys = {**QUICK, "max_train_samples": 40, "max_eval_samples": 20, "max_predict_samples": 20, "strategy": "full"}
    fine_tune(tiny_vit_folder, "bundled:digits", output_dir=str(tmp_path / "old"), **keys)
    result = fine_tune(
        str(tmp_path / "old"),
        "bundled:digits",
        output_dir=str(tmp_path / "new"),
        **keys,
        augmentation="basic",
        replay_dataset_name="bundled:digits",
        replay_fraction=0.5,
        teacher_model_name_or_path=str(tmp_path / "old"),
        distillation_alpha=1.0,
        ewc_lambda=1e3,
        ewc_dataset_name="bundled:digits",
        ewc_samples=4,
        ewc_fisher="true",
    )
    assert result.trainer.keeps_head and result.trainer.state.max_steps == 10
    fisher = Fisher.load(tmp_path / "new" / "fisher.safetensors")
    assert fisher.about["kind"] == "true" and fisher.values["classifier.weight"].shape == (10, 8)
