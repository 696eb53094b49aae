"""A head that is solved for: against scikit-learn, by its gradient, on every kind of label, and in a whole run."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from datasets import Dataset
from sklearn.linear_model import LogisticRegression, Ridge
from transformers import AutoModelForSequenceClassification

from hf_transfer import TransferTrainer, UserError, fine_tune
from hf_transfer.errors import UserErrors
from hf_transfer.features.convex_head import MULTI, REGRESSION, SINGLE, STRENGTHS, Problem
from hf_transfer.training import linear_probe
from hf_transfer.training.probe_selection import Measure
from tests.helpers import (
    arguments,
    changed,
    copy_state,
    images,
    texts,
    tiny_bert,
    tiny_timm_resnet,
    tiny_timm_vit,
    tiny_vit,
)

WEIGHTS = torch.tensor([1.0, 3.0, 0.5])


def data(kind: str, count: int = 90, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of very different sizes, correlated, one constant; labels that they predict in part."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, width, generator=g) @ torch.randn(width, width, generator=g)
    x = x * torch.logspace(-2, 2, width) + 5
    x[:, 2] = 3.0
    z = ((x - x.mean(0)) / (x.std(0) + 1e-9)) @ torch.randn(width, 3, generator=g) + torch.randn(count, 3, generator=g)
    return x, {SINGLE: z.argmax(-1), MULTI: (z > 0).float(), REGRESSION: z * 10 + 7}[kind]


def standardised(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    scale = x.std(0, correction=0)
    return (x - x.mean(0)) / torch.where(scale > 1e-9, scale.clamp(min=0.1 * float(scale.median())), 1.0)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_a_softmax_head_is_scikit_learns(strength, weights):
    x, y = data(SINGLE)
    each = torch.ones(90) if weights is None else weights[y]
    found = Problem(SINGLE, x, y, 3, weights).exact(strength).logits(x)
    oracle = LogisticRegression(C=1 / (strength * float(each.sum())), tol=1e-10, max_iter=10000)
    oracle.fit(standardised(x), y, sample_weight=each)
    theirs = torch.from_numpy(oracle.decision_function(standardised(x)))
    centred = [z - z.mean(-1, keepdim=True) for z in (found, theirs)]  # a softmax does not see the mean
    assert (centred[0] - centred[1]).abs().max() < 1e-4 < theirs.abs().max()


def test_a_unit_that_one_example_activates_does_not_decide():
    """Standardized, it would be as large as the others, and a held-out example that activates it a hundred times so."""
    x, y = data(SINGLE)
    x = standardised(x)[:, [0, 1, 3, 4, 5, 6]] / torch.tensor([0.2, 0.7, 1.0, 1.0, 1.0, 1.0])
    quiet = torch.zeros(90, 1)
    quiet[0] = 1e-3
    with_it, without = torch.cat([x, quiet], 1), Problem(SINGLE, x, y, 3).exact(1e-2)
    head = Problem(SINGLE, with_it, y, 3).exact(1e-2)
    active = torch.cat([x[:1], torch.full((1, 1), 0.1)], 1)
    assert (head.logits(active) - without.logits(x[:1])).abs().max() < 0.1
    assert (head.logits(with_it) - without.logits(x)).abs().max() < 1e-3


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_several_labels_are_a_problem_each(weights):
    x, y = data(MULTI)
    found = Problem(MULTI, x, y, 3, weights).exact(1e-2).logits(x)
    for label in range(3):
        truth = y[:, label]
        each = torch.ones(90) if weights is None else torch.where(truth > 0, weights[label], 1.0)
        oracle = LogisticRegression(C=1 / (1e-2 * 90), tol=1e-10, max_iter=10000)
        oracle.fit(standardised(x), truth, sample_weight=each)
        theirs = torch.from_numpy(oracle.decision_function(standardised(x)))
        assert (found[:, label] - theirs).abs().max() < 1e-4


def test_a_regression_is_ridge_also_with_fewer_examples_than_features():
    for count, width in ((90, 7), (6, 40)):  # the second with fewer examples than features
        x, y = data(REGRESSION, count, width)
        found = Problem(REGRESSION, x, y, 3).exact(0.1).logits(x)
        theirs = Ridge(alpha=0.1 * count).fit(standardised(x), y).predict(standardised(x))
        assert (found - torch.from_numpy(theirs)).abs().max() < 1e-7


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_gradient_of_the_objective_is_nothing_at_the_solution(kind, has_bias):
    """By autograd on the features as they are, begun from where a sweep has been."""
    x, y = data(kind)
    problem = Problem(kind, x, y, 3, None if kind == REGRESSION else WEIGHTS, has_bias)
    list(problem.path(STRENGTHS))
    head = problem.exact(1e-2)
    assert (head.bias is None) == (not has_bias)
    weight = head.weight.clone().requires_grad_(True)
    bias = (head.bias if has_bias else torch.zeros(3, dtype=torch.float64)).clone().requires_grad_(True)
    z = x.double() @ weight.T + bias
    loss = {
        SINGLE: lambda: torch.nn.functional.cross_entropy(z, y, WEIGHTS.double()),
        MULTI: lambda: (
            torch.nn.functional.binary_cross_entropy_with_logits(z, y.double(), pos_weight=WEIGHTS.double()) * 3
        ),
        REGRESSION: lambda: (z - y).square().sum() / (2 * len(y)),
    }[kind]()
    (loss + 1e-2 / 2 * (weight * problem.scale).square().sum()).backward()
    own = weight.grad / problem.scale
    if has_bias:  # what moves a weight moves the bias with it
        own = (weight.grad - bias.grad[:, None] * problem.mean) / problem.scale
        assert bias.grad.abs().max() < 1e-6
    assert own.abs().max() < 1e-6


# ---- in a trainer --------------------------------------------------------------------------------------------------


def labelled(kind: str, size: int = 60, seed: int = 0) -> Dataset:
    """Texts whose first words say their labels."""
    made = texts(size, labels=3, seed=seed)
    first = torch.tensor(made["input_ids"][:])[:, :3].float()
    labels = {
        SINGLE: (first.argmax(-1)).tolist(),
        MULTI: (first > 20).float().tolist(),
        REGRESSION: (first[:, 0] / 10).tolist(),
    }[kind]
    return made.remove_columns("labels").add_column("labels", labels)


def model_of(kind: str) -> transformers.BertForSequenceClassification:
    return tiny_bert(labels=1 if kind == REGRESSION else 3, dropout=0.5, problem_type=kind)


def trainer_of(tmp_path, kind: str = SINGLE, model=None, train=None, validation="own", **keys) -> TransferTrainer:
    keys = {"strategy": "linear-probe", "probe_solver": "lbfgs", **keys}
    validation = labelled(kind, 40, seed=1) if isinstance(validation, str) else validation
    return TransferTrainer(
        model or model_of(kind),
        arguments(tmp_path, **keys),
        train_dataset=train or labelled(kind),
        eval_dataset=validation,
    )


def exported(trainer: TransferTrainer, dataset: Dataset) -> torch.Tensor:
    """What enters the classifier, one example at a time."""
    seen: list[torch.Tensor] = []
    handle = trainer.model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.model.eval()
    with torch.no_grad():
        for ids in dataset["input_ids"]:
            trainer.model(input_ids=torch.tensor([ids]))
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
def test_the_head_is_the_best_of_the_grid_and_nothing_else_moved(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(linear_probe, "MOST_FOLDED", 0)  # the validation split chooses
    trainer = trainer_of(tmp_path, kind, **({} if kind == REGRESSION else {"class_weights": {"LABEL_1": 2.5}}))
    before = copy_state(trainer.model)
    output = trainer.train()
    after = copy_state(trainer.model)
    assert changed(before, after) == {"classifier.weight", "classifier.bias"}
    found = trainer.solution
    weights = None if kind == REGRESSION else torch.tensor([1.0, 2.5, 1.0])
    train, validation = labelled(kind), labelled(kind, 40, seed=1)
    x, y, held = exported(trainer, train), torch.tensor(train["labels"]), exported(trainer, validation)
    truth = torch.tensor(validation["labels"])
    y, truth = (y[:, None], truth[:, None]) if kind == REGRESSION else (y, truth)
    problem = Problem(kind, x, y, len(after["classifier.bias"]), weights)
    measure = Measure(kind, 3, None, weights)
    scores = [measure(head.logits(held), truth) for head in problem.path(STRENGTHS[: found.solutions])]
    best = max(range(len(scores)), key=lambda i: (scores[i][1:], -i))
    assert found.l2 == STRENGTHS[best] and found.score == pytest.approx(scores[best][0], abs=1e-6)
    assert found.measure == "loss"
    head = problem.exact(found.l2)
    assert torch.allclose(after["classifier.weight"], head.weight.float(), atol=1e-3 * float(head.weight.abs().max()))
    assert output.global_step == 0 and output.training_loss == found.loss == pytest.approx(problem.loss(head, x))
    (record,) = trainer.stage_records
    assert (record.name, record.start, record.steps, record.loss) == ("head", 0, 0, found.loss)
    assert trainer.state.log_history[0]["probe_l2"] == found.l2
    metric = trainer.evaluate()["eval_loss"]
    assert metric == pytest.approx(Measure(kind, 3, None)(head.logits(held), truth)[0], rel=1e-4), "without weights"


def test_folds_of_the_training_data_choose_and_examples_to_ignore_are_ignored(tmp_path):
    train = labelled(SINGLE)
    noisy = train.add_item({"input_ids": [1] * 6, "labels": -100})
    heads = []
    for one, validation in ((train, None), (noisy, None), (train, "own")):
        trainer = trainer_of(tmp_path, train=one, validation=validation)
        trainer.train()
        assert trainer.solution.held_out == "5-fold cross-validation"
        assert str(trainer.solution).startswith("probe: L2 ") and "of 1e-04 … 1e+02, 5-fold" in str(trainer.solution)
        heads.append(trainer.model.classifier.weight.detach().clone())
    assert torch.allclose(*heads[:2], atol=1e-5)
    assert torch.equal(heads[0], heads[2]), "a validation split is left for what it is"


def test_solving_leaves_the_number_of_threads_as_it_was(monkeypatch):
    threads, used = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    Problem(SINGLE, torch.randn(8, 3), torch.arange(8) % 2, 2).exact(1.0)
    assert used == [1, threads] * 2, "one for a small problem"


def test_metric_for_best_model_chooses(tmp_path):
    trainer = trainer_of(tmp_path, metric_for_best_model="f1_macro")
    trainer.train()
    assert trainer.solution.measure == "f1_macro" and trainer.state.log_history[0]["probe_score"] > 0


@pytest.mark.parametrize("make", [tiny_vit, tiny_timm_vit, tiny_timm_resnet])
def test_images(make, tmp_path):
    model = make()
    before = copy_state(model)
    trainer = trainer_of(tmp_path, model=model, train=images(24), validation=images(12, seed=1))
    trainer.train()
    head = set(trainer.layer_groups[-1].parameters)
    assert changed(before, copy_state(trainer.model)) == head and len(head) == 2


def test_a_decoder_reads_the_last_token_and_has_no_bias(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=1, n_head=2, pad_token_id=0)
    config.num_labels = 3
    train = labelled(SINGLE)
    ragged = [
        {"input_ids": ids[: 3 + i % 4], "labels": y} for i, (ids, y) in enumerate(zip(*train[:].values(), strict=True))
    ]

    def collate(rows):
        size = max(len(row["input_ids"]) for row in rows)
        pad = lambda ids, fill: [*ids, *[fill] * (size - len(ids))]  # noqa: E731
        return {
            "input_ids": torch.tensor([pad([max(i, 1) for i in row["input_ids"]], 0) for row in rows]),
            "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }

    args = arguments(tmp_path, strategy="linear-probe", probe_solver="lbfgs", metric_for_best_model="loss")
    model = transformers.GPT2ForSequenceClassification(config)
    trainer = TransferTrainer(model, args, train_dataset=ragged, eval_dataset=ragged, data_collator=collate)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.solution.loss, rel=1e-4)


class Begun(transformers.TrainerCallback):
    """The weights before the first step."""

    def on_train_begin(self, args, state, control, model=None, **_):
        self.state = copy_state(model)


# ---- heads of several layers -----------------------------------------------------------------------------------------

DENSE = {"classifier.dense"}
SMALL = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
# (model, configuration, the layer that is solved for, the layers before it)
HEADS = {
    "roberta": ("RobertaFor", "RobertaConfig", SMALL, "classifier.out_proj", DENSE),
    "deberta": ("DebertaV2For", "DebertaV2Config", SMALL, "classifier", {"pooler.dense"}),
    "electra": ("ElectraFor", "ElectraConfig", {**SMALL, "embedding_size": 8}, "classifier.out_proj", DENSE),
    "distilbert": (
        "DistilBertFor",
        "DistilBertConfig",
        {"vocab_size": 40, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
        "classifier",
        {"pre_classifier"},
    ),
    "modernbert": (
        "ModernBertFor",
        "ModernBertConfig",
        {**SMALL, "pad_token_id": 0},
        "classifier",
        {"head.dense", "head.norm"},
    ),
}  # fmt: skip


def of_two_layers(name: str, kind: str = SINGLE) -> transformers.PreTrainedModel:
    model, config, keys, _, _ = HEADS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**keys, num_labels=1 if kind == REGRESSION else 3, problem_type=kind)
    return getattr(transformers, f"{model}SequenceClassification")(made)


@pytest.mark.parametrize(
    ("name", "kind"), [(n, SINGLE) for n in HEADS] + [("roberta", MULTI), ("distilbert", REGRESSION)]
)
def test_of_a_head_of_several_layers_the_last_is_solved_for(name, kind, tmp_path):
    """It is the best for what enters it; what precedes it stays, is frozen in the plan, and is free afterwards."""
    layer, below = HEADS[name][3:]
    weights = {} if kind == REGRESSION else {"class_weights": {"LABEL_1": 2.5}}
    trainer = trainer_of(tmp_path, kind, model=of_two_layers(name, kind), **weights)
    assert {n.rpartition(".")[0] for n in trainer.below_solution} == below
    last = trainer.model.get_submodule(layer)
    size = last.weight.numel() + last.bias.numel()
    assert trainer.plan.stages[0].num_trainable == size
    before = copy_state(trainer.model)
    trainer.train()
    assert changed(before, copy_state(trainer.model)) == {f"{layer}.weight", f"{layer}.bias"}
    assert sum(p.numel() for g in trainer.optimizer.param_groups for p in g["params"]) == size
    assert all(p.requires_grad for p in trainer.model.parameters())
    seen: list[torch.Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.model.eval()
    train = labelled(kind)
    with torch.no_grad():
        trainer.model(input_ids=torch.tensor(train["input_ids"][:]))
    handle.remove()
    y = torch.tensor(train["labels"])
    y, each = (y[:, None], None) if kind == REGRESSION else (y, torch.tensor([1.0, 2.5, 1.0]))
    head = Problem(kind, seen[0], y, last.out_features, each).exact(trainer.solution.l2)
    assert torch.allclose(last.weight, head.weight.float(), atol=1e-3 * float(head.weight.abs().max()))


@pytest.mark.parametrize("keys", [{"strategy": "two-phase"}, {"strategy": "gradual", "adapter": "lora"}])
def test_all_layers_of_such_a_head_train_from_the_solution(keys, tmp_path):
    keys = {**keys, "probe_solver": "sgd", "head_init": "probe", "num_train_epochs": 2, "learning_rate": 1e-3}
    begun = Begun()
    trainer = trainer_of(tmp_path, model=of_two_layers("roberta"), **keys)
    start = copy_state(trainer.model)
    trainer.add_callback(begun)
    trainer.train()
    solved = {n for n in trainer.layer_groups[-1].parameters if "out_proj" in n and n in trainer.trainable}
    assert changed(start, begun.state) == solved and len(solved) == 2
    dense = {n for n in trainer.layer_groups[-1].parameters if "dense" in n and n in trainer.trainable}
    assert len(dense) == 2 and dense | solved <= changed(begun.state, copy_state(trainer.model))


def test_a_run_says_which_layers_of_its_head_stay(tmp_path):
    args = arguments(tmp_path, strategy="linear-probe", probe_solver="lbfgs")
    kept = ("classifier.dense.weight", "classifier.dense.bias")
    assert linear_probe.note(args, kept, kept).endswith(
        "That is its last layer; classifier.dense, drawn at random, stays as it is."
    )
    assert linear_probe.note(args, kept).endswith("; classifier.dense stays as it is.")
    args = arguments(tmp_path, strategy="two-phase", head_init="probe")
    wrapped = ("base_model.model.head.modules_to_save.default.dense.weight", "base_model.model.pooler.dense.weight")
    assert linear_probe.note(args, wrapped).endswith("; head.dense and pooler.dense train too.")
    assert linear_probe.note(args).endswith("(head_init: probe).") and not linear_probe.note(arguments(tmp_path))


# ---- the beginning of a longer training ------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{"strategy": "gradual"}, {"strategy": "two-phase", "adapter": "lora"}])
def test_training_begins_with_the_solution(keys, tmp_path):
    """To the bit, and the rest of the run is the one that begins with these weights; a resumed one does not solve."""
    keys = {**keys, "probe_solver": "sgd", "head_init": "probe", "save_strategy": "epoch"}
    begun = Begun()
    trainer = trainer_of(tmp_path / "a", **keys)
    start = copy_state(trainer.model)
    trainer.add_callback(begun)
    trainer.train()
    solved = trainer_of(tmp_path / "b")
    solved.train()
    head = set(trainer.layer_groups[-1].parameters) & set(trainer.trainable)
    assert changed(start, begun.state) == head and len(head) == 2
    for name in head:
        assert torch.equal(begun.state[name], getattr(solved.model.classifier, name.rpartition(".")[2]))
    assert trainer.solution.l2 == solved.solution.l2
    assert [log for log in trainer.state.log_history if "probe_l2" in log] == trainer.state.log_history[:1]
    end = copy_state(trainer.model)
    again = trainer_of(tmp_path / "a", **keys)
    again.train(resume_from_checkpoint=str(next((tmp_path / "a").glob("checkpoint-15"))))
    assert again.solution == trainer.solution and not changed(end, copy_state(again.model))
    assert [log for log in again.state.log_history if "probe_l2" in log] == trainer.state.log_history[:1]


def test_the_order_of_the_examples_is_not_touched(tmp_path):
    """The same steps as a run that is given this head to begin with."""
    keys = {"strategy": "two-phase", "probe_solver": "sgd", "head_epochs": 1.0}
    begins = trainer_of(tmp_path, head_init="probe", **keys)
    begins.train()
    solved = trainer_of(tmp_path)
    solved.train()
    model = model_of(SINGLE)
    model.classifier.load_state_dict(solved.model.classifier.state_dict())
    given = trainer_of(tmp_path, model=model, **keys)
    given.train()
    assert not changed(copy_state(begins.model), copy_state(given.model))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"strategy": "gradual", "probe_solver": "lbfgs"},
            "probe_solver: 'lbfgs' has no effect with strategy: gradual",
        ),
        ({"probe_solver": "lbfgs"}, "no strategy"),
        ({"strategy": "full", "head_init": "probe"}, "head_init: 'probe' has no effect with strategy: full"),
        ({"strategy": "linear-probe", "probe_solver": "lbfgs", "adapter": "lora"}, "an adapter would change"),
        (
            {"strategy": "linear-probe", "probe_solver": "lbfgs", "focal_gamma": 2.0},
            "cannot be combined with focal_gamma",
        ),
        (
            {"strategy": "linear-probe", "probe_solver": "lbfgs", "label_smoothing_factor": 0.1},
            "label_smoothing_factor",
        ),
        ({"strategy": "linear-probe", "probe_solver": "lbfgs", "balanced_sampling": True}, "balanced_sampling"),
        ({"strategy": "linear-probe", "probe_solver": "lbfg"}, "Did you mean 'lbfgs'?"),
    ],
)
def test_keys_that_do_not_go_together(keys, said, tmp_path):
    with pytest.raises(UserErrors, match="1 problem") as error:
        arguments(tmp_path, **keys)
    assert said in str(error.value)


def test_a_runs_data_must_stand_still(tmp_path):
    keys = {"probe_solver": "lbfgs", "strategy": "linear-probe", "augmentation": "basic", "mixup_alpha": 0.2}
    with pytest.raises(UserErrors, match="2 problems") as error:
        fine_tune("m", "d", output_dir=str(tmp_path), **keys)
    assert "augmentation" in str(error.value) and "mixup_alpha" in str(error.value)


def test_a_head_of_layers_side_by_side_is_refused_with_its_parts(tmp_path):
    config = transformers.DeiTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )
    model = transformers.DeiTForImageClassificationWithTeacher(config)
    with pytest.raises(UserError, match=r"cls_classifier \(Linear\), distillation_classifier \(Linear\)") as error:
        trainer_of(tmp_path, model=model, train=images(8), validation=None)
    assert "probe_solver: sgd" in str(error.value)
    model = tiny_bert()
    model.classifier = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.LayerNorm(2))
    with pytest.raises(UserError, match=r"classifier\.0 \(Linear\), classifier\.1 \(LayerNorm\)"):
        trainer_of(tmp_path, model=model)


def test_labels_that_are_shares_and_losses_of_ones_own_are_refused(tmp_path):
    shares = texts(8).remove_columns("labels").add_column("labels", [[0.2, 0.5, 0.3]] * 8)
    with pytest.raises(UserError, match="are soft"):
        trainer_of(tmp_path, train=shares).train()

    class Own(TransferTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(UserError, match="a loss of its own"):
        Own(model_of(SINGLE), arguments(tmp_path, strategy="linear-probe", probe_solver="lbfgs"))


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_is_as_any_linear_probe(tiny_bert_folder, tmp_path, capsys):
    out = tmp_path / "out"
    result = fine_tune(
        tiny_bert_folder,
        "bundled:rotten-tomatoes",
        output_dir=str(out),
        strategy="linear-probe",
        probe_solver="lbfgs",
        max_train_samples=64,
        max_eval_samples=32,
        max_predict_samples=16,
        data_facts=False,
    )
    said = capsys.readouterr().out
    assert "epochs, batch size and learning rates have no effect" in said and "probe: L2 " in said
    results = json.loads((out / "results.json").read_text())
    assert results["stages"][0]["steps"] == 0 and results["probe"]["l2"] in results["probe"]["l2_grid"]
    assert results["trainable_parameters"] == 2 * 8 + 2 and results["plan"][0]["epochs"] == 0
    (line,) = [json.loads(text) for text in (out / "history.jsonl").read_text().splitlines()]
    assert line["step"] == 0 and line["probe_l2"] == results["probe"]["l2"]
    assert (results["probe"]["held_out"], results["probe"]["measure"]) == ("5-fold cross-validation", "loss")
    plain = AutoModelForSequenceClassification.from_pretrained(out).eval()
    ids = torch.randint(5, 1000, (4, 12))
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, result.model.eval()(input_ids=ids).logits)
    card = (out / "README.md").read_text()
    assert "The head was fitted" in card and "`learning_rate`" not in card
