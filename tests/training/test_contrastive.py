"""The contrastive stage: what it trains and leaves, parts of a batch, resumed runs, and what is refused."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from datasets import Dataset

from hf_transfer import TransferTrainer, UserError, fine_tune
from hf_transfer.config.arguments.probe import ProbeArguments
from hf_transfer.errors import Interrupted, UserErrors, WorkFailed
from hf_transfer.models.pooling_layer import with_mean_pooling
from hf_transfer.objectives.contrastive import supervised_contrastive
from hf_transfer.runs.preview import plan_only
from hf_transfer.settings import Config
from hf_transfer.training import contrastive
from tests import architectures
from tests.helpers import (
    arguments,
    changed,
    copy_state,
    images,
    soft_texts,
    texts,
    tiny_bert,
    tiny_timm_resnet,
    with_statistics,
)
from tests.runs.test_preflight import words_tokenizer

KEYS = dict(strategy="two-phase", head_epochs=0.0, head_init="probe", contrastive_epochs=2.0, num_train_epochs=1)


def trainer_of(tmp_path, model=None, train=None, **keys):
    train = texts(70, labels=3) if train is None else train
    args = arguments(tmp_path, **{**KEYS, **keys})
    return TransferTrainer(model or tiny_bert(dropout=0.3, labels=3), args, train_dataset=train)


def stage_alone(trainer):
    """(what the stage did, names of what it changed)."""
    before = copy_state(trainer.model)
    done = contrastive.run(trainer)
    return done, changed(before, copy_state(trainer.model))


def separation(trainer):
    """The loss of what the head reads of all training examples, in eval mode."""
    rows, labels = (torch.tensor(trainer.train_dataset[name][:]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        first = trainer.model.eval().bert(input_ids=rows).last_hidden_state[:, 0]
    return float(supervised_contrastive(first, labels))


# ---- what it does ----------------------------------------------------------------------------------------------------


def test_it_draws_together_what_the_head_reads_and_trains_all_below_the_head(tmp_path):
    trainer = trainer_of(tmp_path, contrastive_epochs=6.0)
    before = separation(trainer)
    done, moved = stage_alone(trainer)
    assert separation(trainer) < before - 0.05 and done.last_loss < done.first_loss
    assert (done.steps, done.batch) == (18, 32)
    names = {name for name, _ in trainer.model.named_parameters()}
    # The keys' biases and the unused token type have no influence; all the rest moves.
    assert {n for n in names - moved if not n.endswith("key.bias")} == {"classifier.weight", "classifier.bias"}
    assert all(p.grad is None and p.requires_grad for p in trainer.model.parameters())


def test_only_what_the_plan_trains_moves_at_its_rates(tmp_path):
    trainer = trainer_of(tmp_path, strategy="partial", unfrozen_groups=1, head_epochs=1.0, head_init="random")
    _, moved = stage_alone(trainer)
    assert moved and all("layer.1" in name or "pooler" in name for name in moved)
    still = trainer_of(tmp_path, layer_learning_rates={"embeddings": 0.0})
    _, moved = stage_alone(still)
    assert moved and not any("embeddings" in name for name in moved)


def test_the_head_has_the_strength_that_was_best_before_it(tmp_path):
    """The stage has seen the labels of all folds: any head on its features is as good as perfect in them."""
    without, after = (trainer_of(tmp_path, contrastive_epochs=epochs, learning_rate=1e-3) for epochs in (0.0, 20.0))
    without.train()
    after.train()
    one, other = without.solution, after.solution
    assert (other.l2, other.score, other.held_out) == (one.l2, one.score, one.held_out)
    assert 0 < other.loss < one.loss, "solved for on the new features"


@pytest.mark.parametrize(
    ("name", "token"), [("Roberta", 0), ("DistilBert", 0), ("Electra", 0), ("Llama", -1), ("GPT2", -1)]
)
def test_what_is_drawn_together_is_what_the_head_reads_of_the_last_layer(name, token, tmp_path):
    """Not what the head's own layers make of it, and the last token's where it reads all."""
    model = architectures.hugging_face(f"{name}ForSequenceClassification").eval()
    rows = torch.randint(3, 50, (8, 6), generator=torch.Generator().manual_seed(0))
    train = Dataset.from_dict({"input_ids": rows.tolist(), "labels": [0, 1] * 4})
    args = arguments(tmp_path, strategy="full", contrastive_epochs=2.0, num_train_epochs=1)
    trainer = TransferTrainer(model, args, train_dataset=train)
    found = contrastive._vectors_of(trainer)({"input_ids": rows})
    torch.testing.assert_close(found, model.base_model(input_ids=rows).last_hidden_state[:, token])


def test_with_mean_pooling_it_is_the_mean_as_the_appended_layer_gives_it(tmp_path):
    model = tiny_bert(labels=3)
    with_mean_pooling(model, 2)
    trainer = trainer_of(tmp_path, model.eval())
    rows = torch.tensor(trainer.train_dataset["input_ids"][:8])
    with torch.no_grad():
        found = contrastive._vectors_of(trainer)({"input_ids": rows})
        torch.testing.assert_close(found, model.bert(input_ids=rows).last_hidden_state[:, 0])
        means = model.bert(input_ids=rows, output_hidden_states=True).hidden_states[2].mean(1)
    alike = torch.nn.functional.cosine_similarity(found, means - means.mean(1, keepdim=True))
    assert float(alike.min()) > 0.99


def test_running_statistics_modes_and_random_numbers_are_left(tmp_path):
    model = with_statistics(tiny_timm_resnet(labels=2)).eval()
    trainer = trainer_of(tmp_path, model, images(24), per_device_train_batch_size=32)
    drawn = torch.random.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _, moved = stage_alone(trainer)
    assert moved and not moved & set(buffers) and not any(module.training for module in model.modules())
    assert torch.equal(drawn, torch.random.get_rng_state())


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    """With dropout too: the second pass draws the numbers of the first."""
    model, data = tiny_bert(dropout=0.4).double().train(), texts(12)
    rows = torch.tensor(data["input_ids"][:])
    labels = torch.tensor(data["labels"][:])
    vectors = lambda inputs: model.bert(**inputs).pooler_output  # noqa: E731
    parts = [{"input_ids": part} for part in rows.split(5)]
    loss = contrastive.backward(parts, labels, vectors, seed=3)
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    computed = []
    for i, part in enumerate(parts):
        torch.manual_seed(3 + i)
        computed.append(vectors(part))
    whole = supervised_contrastive(torch.cat(computed), labels)
    whole.backward()
    assert loss == pytest.approx(float(whole.detach()), rel=1e-6) and mine
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_result_does_not_depend_on_batch_size_or_accumulation(tmp_path):
    ends = []
    for size, accumulation in ((32, 1), (4, 2), (7, 3)):
        trainer = trainer_of(
            tmp_path,
            tiny_bert(labels=3),
            learning_rate=1e-3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        stage_alone(trainer)
        ends.append(copy_state(trainer.model))
    for other in ends[1:]:
        for name, value in ends[0].items():
            if not name.endswith("key.bias"):  # their gradient is rounding
                torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4, msg=name)


def test_positives_share_a_label_and_ignored_examples_are_left_out(tmp_path):
    several = (
        texts(40).remove_columns("labels").add_column("labels", [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]] * 10)
    )
    model = tiny_bert(labels=2, problem_type="multi_label_classification")
    done, moved = stage_alone(trainer_of(tmp_path, model, several))
    assert done.steps == 4 and moved
    plain, noisy = texts(30), texts(30).add_item({"input_ids": [1] * 6, "labels": -100})
    ends = []
    for train in (plain, noisy):
        trainer = trainer_of(tmp_path, tiny_bert(), train)
        stage_alone(trainer)
        ends.append(copy_state(trainer.model))
    assert not changed(*ends)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_run_begins_with_it_and_a_resumed_one_equals_it_bit_for_bit(adapter, tmp_path):
    keys = dict(adapter=adapter, num_train_epochs=2, save_strategy="epoch", per_device_train_batch_size=8)
    whole = trainer_of(tmp_path, **keys)
    whole.train()
    first, second = whole.state.log_history[:2]
    assert first["contrastive_steps"] == 6 and "probe_l2" in second
    assert whole.seconds > whole.contrast.seconds
    again = trainer_of(tmp_path, **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert not changed(copy_state(whole.model), copy_state(again.model)) and again.contrast == whole.contrast
    from_start = trainer_of(tmp_path / "b", **keys)
    from_start.train()
    assert not changed(copy_state(whole.model), copy_state(from_start.model))
    with pytest.raises(UserError, match=r"contrastive_epochs: 2\.0 then, 1\.0 now"):
        trainer_of(tmp_path, **keys, contrastive_epochs=1.0).train(resume_from_checkpoint="auto")


def test_a_signal_within_it_ends_the_run_at_once(tmp_path, monkeypatch, capsys):
    calls, backward = [], contrastive.backward

    def struck(*args):
        calls.append(os.kill(os.getpid(), signal.SIGTERM) if len(calls) == 1 else None)
        return backward(*args)

    monkeypatch.setattr(contrastive, "backward", struck)
    with pytest.raises(Interrupted) as ended:
        trainer_of(tmp_path).train()
    assert (ended.value.code, len(calls)) == (143, 2) and not list(tmp_path.glob("checkpoint-*"))
    assert "SIGTERM before the first step: there is nothing to resume, start again." in capsys.readouterr().err


def test_without_it_nothing_changes(tmp_path):
    assert ProbeArguments().contrastive_epochs == 0
    trainer = trainer_of(tmp_path, contrastive_epochs=0.0)
    trainer.train()
    assert trainer.contrast is None and not any("contrastive_steps" in log for log in trainer.state.log_history)
    assert contrastive.note(trainer.args) == ""


# ---- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_bert(layers=2).base_model.save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return str(folder)


def table(tmp_path, values="xy"):
    path = tmp_path / "train.csv"
    rows = [f"{'a ' * (i % 3)}film {i % 5} {'fine' if i % 2 else 'dull'},{values[i % len(values)]}" for i in range(44)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return str(path)


RUN = dict(use_cpu=True, report_to="none", preflight=False, pooling="cls", label_issues=False, contrastive_epochs=2)


def test_a_run_says_and_records_it(model, tmp_path, capsys):
    result = fine_tune(model, train_file=table(tmp_path), output_dir=str(tmp_path / "out"), max_steps=2, **RUN)
    said = capsys.readouterr().out
    assert "(contrastive_epochs: 2, 4 steps of 32 examples)" in said
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["contrastive"]["steps"] == 4 and written["auto"]["strategy"]["value"] == "two-phase"
    assert result.results["probe"]["l2"] > 0, "the head was solved for on the new features"


def test_it_asks_for_more_than_the_head_where_few_examples_would_not(model, tmp_path):
    keys = dict(model_name_or_path=model, train_file=table(tmp_path, "abcdef"), output_dir="o", **RUN)
    for more in ({}, {"effort": "quick"}):
        planned = plan_only(Config.from_sources({}, {**keys, **more, "log_level": "error"}), talks=False)
        assert planned.chosen["strategy"]["value"] == "two-phase"


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"strategy": "linear-probe"}, "has no effect with strategy: linear-probe"),
        ({"strategy": None}, "has no effect with no strategy"),
        ({"contrastive_epochs": -1, "strategy": "full"}, "contrastive_epochs: expected a number at least 0"),
        ({"contrastive_epochs": float("nan"), "strategy": "full"}, "contrastive_epochs: expected"),
    ],
)
def test_keys_that_contradict_it(keys, said, tmp_path):
    with pytest.raises(UserErrors, match=said):
        arguments(tmp_path, **{"contrastive_epochs": 2.0, **keys})


@pytest.mark.parametrize(("key", "value"), [("mixup_alpha", 0.2), ("head", "mlp"), ("streaming", True)])
def test_keys_of_a_run_that_contradict_it(key, value):
    keys = dict(
        model_name_or_path="m", train_file="t.csv", output_dir="o", strategy="full", max_steps=3, max_eval_samples=9
    )
    with pytest.raises(UserErrors, match=f"contrastive_epochs: 2.0 .*{key}"):
        Config.from_sources({}, {**keys, "contrastive_epochs": 2.0, key: value})


def test_models_plans_and_labels_that_have_no_such_stage(tmp_path, model):
    with pytest.raises(UserError, match="contrastive_epochs: a regression has no classes"):
        trainer_of(tmp_path, tiny_bert(labels=1, problem_type="regression"))
    with pytest.raises(UserError, match="contrastive_epochs: the plan trains nothing below the head"):
        trainer_of(tmp_path, strategy="partial", unfrozen_groups=0, head_init="random", head_epochs=1.0)
    with pytest.raises(UserError, match="contrastive_epochs: auto_find_batch_size would begin again"):
        trainer_of(tmp_path, auto_find_batch_size=True)
    with pytest.raises(UserError, match="contrastive_epochs: hard labels are needed"):
        soft = tiny_bert(problem_type="single_label_classification")
        trainer_of(tmp_path, soft, soft_texts(8), strategy="full", head_init="random", head_epochs=1.0).train()
    with pytest.raises(UserError, match="contrastive_epochs: a regression has no classes"):
        numbers = table(tmp_path, ["1.5", "2.25", "3.125"])
        fine_tune(
            model,
            train_file=numbers,
            output_dir=str(tmp_path / "o"),
            log_level="error",
            task="text-classification",
            **RUN,
        )


def test_a_head_that_is_kept_refuses_it(tmp_path):
    kept = tmp_path / "kept"
    trained = tiny_bert(id2label={0: "x", 1: "y"}, label2id={"x": 0, "y": 1})
    trained.save_pretrained(kept)
    words_tokenizer().save_pretrained(kept)
    with pytest.raises(UserError, match="contrastive_epochs: the checkpoint's head is kept"):
        fine_tune(str(kept), train_file=table(tmp_path), output_dir=str(tmp_path / "o"), log_level="error", **RUN)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    model = tiny_bert(labels=3)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.fill_(float("nan"))
    with pytest.raises(WorkFailed, match="NaN or infinite"):
        trainer_of(tmp_path, model).train()
