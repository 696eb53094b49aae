"""Model cards: what they say, and that what users wrote cannot say anything else."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, root_mean_squared_error

from hf_transfer import fine_tune, hub_client, run_folder
from hf_transfer.cli.program import main
from hf_transfer.config.places import BUNDLED_DATA, BUNDLED_MODELS
from hf_transfer.data import bundled
from hf_transfer.evaluation import metrics
from hf_transfer.hub import card
from hf_transfer.hub.card_markdown import escape, plain
from hf_transfer.models import bundled as bundled_models

EVIL = [
    "<script>alert(1)</script>",
    "a | b | c",
    "[click](http://evil.example)",
    "![x](http://evil.example/x.png)",
    "`code` and *bold* _under_ ~~gone~~",
    "---\nlicense: mit\n---",
    "\n\n# A heading\n\n- a list\n```\ncode",
    "quote \" and ' and \\ backslash: {a: b}, !!python/object",
    "no",
    "2024-01-01",
    "null",
    "&lt;b&gt; &#42;",
    "\u202egnp.exe\u202c\u0000\u200b",
    "  ",
    "日本語 🎉",
    "x" * 1000,
]


@pytest.fixture(scope="module")
def run(tiny_bert_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("card")
    lines = [f"word{i} of {label} {i % 5},{label}" for i in range(16) for label in ("no", "yes", "yes")]
    (place / "my|data.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    (place / "test.csv").write_text("text,label\n" + "\n".join(lines[:10]) + "\n")
    return fine_tune(
        tiny_bert_folder,
        train_file=str(place / "my|data.csv"),
        test_file=str(place / "test.csv"),
        output_dir=str(place / "out"),
        num_train_epochs=1,
        save_strategy="no",
        drop_leaks=True,
        train_val_split=0.1,
    )


@pytest.fixture
def made(run):
    """(results, keys) to change."""
    results, keys = run_folder.read_results(run.output_dir)
    return copy.deepcopy(results), copy.deepcopy(keys)


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text.split("\n---\n", 1)[1])


def test_every_run_writes_its_card(run):
    text = (run.output_dir / "README.md").read_text()
    assert text == card.text(*run_folder.read_results(run.output_dir))
    assert str(run.output_dir.parent) not in text
    page, results = rendered(text), run.results
    for title in (
        "Results",
        "How to use",
        "Labels",
        "Data",
        "Training",
        "Confusion matrix",
        "Training cost",
        "Limitations",
        "Framework versions",
    ):
        assert f"<h2>{title}</h2>" in page
    assert f"{results['metrics']['accuracy']:.4f}" in page and "my|data.csv" in page
    assert f"{results['intervals']['accuracy'][0]:.4f} to {results['intervals']['accuracy'][1]:.4f}" in page
    assert (
        "Removed because they appeared in another split: 13 from train." in page
        and "Evaluated on the 10 examples of the test split" in page
    )
    assert "seed 42" in page and results["versions"]["torch"] in page and results["device"] in page
    for stage in results["plan"]:
        assert f"<td>{stage['trainable_parameters']:,}</td>" in page


def test_metadata_round_trips(run):
    meta = ModelCard((run.output_dir / "README.md").read_text()).data
    assert {r.metric_name: r.metric_value for r in meta.eval_results} == run.metrics
    assert {(r.task_type, r.dataset_split) for r in meta.eval_results} == {("text-classification", "test")}
    assert (meta.library_name, meta.pipeline_tag, meta.base_model) == ("transformers", "text-classification", None)
    assert meta.datasets is None and len(meta.widget) == 2 and meta.metrics[:2] == ["accuracy", "f1"]


def test_the_baseline_is_the_training_sets(run):
    counts = run.results["data_facts"]["splits"]
    largest = max(counts["train"]["classes"], key=counts["train"]["classes"].get)
    expected = counts["test"]["classes"][largest] / counts["test"]["examples"]
    assert run.results["baseline"]["metrics"]["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("evil", EVIL)
def test_users_texts_are_only_texts(evil, made):
    """As labels, names of data and examples, in Markdown and in YAML."""
    results, keys = made
    classes = results["data_facts"]["splits"]
    results["labels"] = [evil, "yes"]
    for split in classes.values():
        split["classes"] = {evil: 1, "yes": 2}
    results["card"] |= {"dataset_shown": evil, "examples": [evil, "b"]}
    keys["layer_learning_rates"] = {evil: 1e-3}
    text = card.text(results, keys)
    meta = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert meta["widget"][0]["text"] == plain(evil, 300) and "license" not in meta
    assert set(ModelCard(text).data.to_dict()) == set(meta)
    page = rendered(text)
    assert page.count("<h1>") == 1 and page.count("<h2>") == 9
    for tag in ("<script", "<img", "<a ", "<em>", "<s>", "<strong>alert"):
        assert tag not in page
    labels = page.split("<h2>Labels</h2>")[1].split("<h2>")[0]
    assert labels.count("<tr>") == 3 and labels.count("<td>") == 2 * (2 + len(classes))
    shown = plain(evil).strip()
    cell = labels.split("<td>")[2].split("</td>")[0]
    assert cell == shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def test_escaping_leaves_plain_words_alone():
    assert escape("Ankle boot (size 9), 50% - it's fine.") == "Ankle boot (size 9), 50% - it's fine."
    assert escape("a_b*c") == "a\\_b\\*c"


def test_other_problem_types_and_many_classes(made):
    results, keys = made
    many = [f"class {i}" for i in range(120)]
    table = np.diag([5] * 120)
    table[3, 7] = 4
    facts = {"train": {"classes": dict.fromkeys(many, 9)}, "test": {"classes": dict.fromkeys(many, 5)}}
    for name, split in facts.items():
        results["data_facts"]["splits"][name] |= split
    page = rendered(card.text({**results, "labels": many, "confusion": table.tolist()}, keys))
    assert "And 20 more, in <code>config.json</code>" in page
    assert "<td>class 3</td>\n<td>class 7</td>\n<td>4</td>\n<td>9</td>" in page
    pairs = [[i, j, int(table[i, j])] for i, j in np.argwhere(table)]
    assert rendered(card.text({**results, "labels": many, "confusion": {"pairs": pairs}}, keys)) == page
    several = {**results, "problem_type": "multi_label_classification", "confusion": [[3, 1, 2], [4, 0, 0]]}
    page = rendered(card.text(several, keys))
    assert "<td>no</td>\n<td>3</td>\n<td>1</td>\n<td>2</td>" in page and "sigmoid()" in page
    value = {**results, "problem_type": "regression", "labels": ["price"], "confusion": []}
    page = rendered(card.text(value, keys))
    assert "One value, price." in page and "logits.item()" in page and "Confusion matrix" not in page


def test_stages_that_end_at_plateaus_have_no_number_of_epochs(made):
    results, keys = made
    head = {**results["plan"][0], "epochs": None}
    page = card.text({**results, "plan": [{**head, "name": "first"}, {**head, "name": "last"}]}, keys)
    assert "| first | until a plateau |" in page and "| last | remaining |" in page


def test_an_adapter_that_peft_does_not_know_says_so(made):
    results, keys = made
    results["adapter"] = "bottleneck"
    assert "from hf_transfer import Predictor" in card.text(results, keys)
    kind = {"peft_type": "BOTTLENECK", "placement": "houlsby"}
    assert "not part of peft" in card.text(results, {**keys, "adapter": kind})
    results["adapter"] = "lora"
    assert "PeftModel.from_pretrained(model, model_id)" in card.text(results, {**keys, "adapter": "lora"})


def test_an_mlp_head_says_what_loads_it(made):
    results, keys = made
    results["head"] = {"type": "mlp"}
    for adapter, merged in (("none", False), ("lora", False), ("lora", True)):
        page = card.text({**results, "adapter": adapter}, keys, merged)
        assert "plain transformers stops with an error" in page and "from hf_transfer import Predictor" in page
        assert "AutoModelForSequenceClassification" not in page
        assert ModelCard(page).data.library_name == "hf_transfer"


def test_a_metric_that_is_no_number_is_said_and_not_indexed(made):
    results, keys = made
    results["metrics"]["loss"] = None
    text = card.text(results, keys)
    assert "| NaN |" in text
    assert "loss" not in {r.metric_name for r in ModelCard(text).data.eval_results}


def test_a_model_that_is_no_better_than_the_baseline_is_called_so(made):
    results, keys = made
    results["intervals"]["accuracy"], results["baseline"]["metrics"]["accuracy"] = [0.6, 0.8], 0.7
    assert "Not significantly better than the baseline" in card.text(results, keys)
    results["baseline"]["metrics"]["accuracy"] = 0.5
    assert "Not significantly better" not in card.text(results, keys)


def test_paths_of_keys_are_left_out(made):
    results, keys = made
    text = card.text(results, {**keys, "replay_dataset_name": "/home/me/secret/old.csv", "replay_fraction": 0.2})
    assert "| `replay_dataset_name` | old.csv |" in text and "secret" not in text
    assert "| `replay_dataset_name` | me/old |" in card.text(results, {**keys, "replay_dataset_name": "me/old"})


def test_what_bundled_names_are_on_the_hub():
    assert card.hub_name("bundled:minilm-l6") == "sentence-transformers/all-MiniLM-L6-v2"
    for name in ("bundled:minilm-l6", "bundled:efficientnet-lite0"):
        assert card.hub_name(str(bundled_models.plain_folder(name))) == card.hub_name(name) is not None
    assert card.hub_name("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    assert set(bundled.HUB) == {*BUNDLED_MODELS, *BUNDLED_DATA}


def test_a_folder_of_a_run_has_the_base_of_that_run(run, tmp_path):
    assert card.hub_name(str(run.output_dir)) is None
    (tmp_path / "results.json").write_text(json.dumps({"card": {"base_model": "acme/base"}}))
    assert card.hub_name(str(tmp_path)) == "acme/base"
    for other in ("[1]", "{", '{"card": null}', '{"card": {"base_model": 3}}'):
        (tmp_path / "results.json").write_text(other)
        assert card.hub_name(str(tmp_path)) is None
    assert card.hub_name(str(tmp_path / "gone")) is None


def test_a_repository_states_license_and_language_or_nothing():
    stated = hub_client.Repository(card={"license": "mit", "language": ["en", "de"], "tags": ["x"]})
    assert stated.origin == {"license": "mit", "language": ["en", "de"]}
    assert hub_client.Repository(card={"license": "other"}).origin == hub_client.Repository().origin == {}


def test_card_examples_can_be_left_out(made, run, tmp_path):
    results, _ = made
    assert len(results["card"]["examples"]) == 2  # one per label
    argv = ["--config", str(run.output_dir / "run.yaml"), "--output_dir", str(tmp_path / "o"), "--card_examples", "0"]
    assert main(["train", *argv, "--quiet"]) == 0
    assert "widget" not in (tmp_path / "o" / "README.md").read_text()
    assert main(["train", *argv, "--card_examples", "-1"]) == 2


def test_the_id_goes_into_the_code(run):
    text = (run.output_dir / "README.md").read_text()
    once = card.with_id(text, "me/one")
    assert once != text and 'model_id = "me/one"' in once
    assert card.with_id(once, "me/two") == card.with_id(text, "me/two")


# ---- the baseline, beside scikit-learn's ---------------------------------------------------------------------------


def test_baselines_are_scikit_learns_dummies():
    rng = np.random.default_rng(0)
    train, held_out = rng.choice(4, 50, p=[0.1, 0.2, 0.6, 0.1]), rng.integers(0, 4, 30)
    dummy = DummyClassifier(strategy="most_frequent").fit(train[:, None], train).predict(held_out[:, None])
    found = metrics.baseline("single_label_classification", train, held_out, 4)
    assert found["accuracy"] == pytest.approx(accuracy_score(held_out, dummy))
    assert found["f1_macro"] == pytest.approx(f1_score(held_out, dummy, average="macro"))
    assert found["mcc"] == 0 and "ece" not in found
    train, held_out = rng.normal(size=50), rng.normal(size=30)
    dummy = DummyRegressor().fit(train[:, None], train).predict(held_out[:, None])
    found = metrics.baseline("regression", train, held_out, 1)
    assert found == pytest.approx(
        {"mae": mean_absolute_error(held_out, dummy), "rmse": root_mean_squared_error(held_out, dummy)}
    )


@pytest.mark.parametrize("shares", [(0.9, 0.5, 0.1), (0.2, 0.15, 0.1), (0.3, 0.0, 0.05)])
def test_the_baseline_of_several_labels_is_the_best_constant_answer(shares):
    rng = np.random.default_rng(0)
    train, held_out = rng.random((50, 3)) < shares, rng.random((30, 3)) < shares
    answers = [np.array(bits, bool) for bits in itertools.product((0, 1), repeat=3)]
    scores = [f1_score(train, np.tile(a, (50, 1)), average="micro", zero_division=0) for a in answers]
    best = answers[int(np.argmax(scores))]
    assert metrics.constant_labels(train).tolist() == best.tolist()
    found = metrics.baseline("multi_label_classification", train, held_out, 3)
    assert found["f1_micro"] == pytest.approx(f1_score(held_out, np.tile(best, (30, 1)), average="micro"))
    assert not metrics.constant_labels(train & False).any()


def test_confusions_are_counted():
    logits, labels = np.array([[2.0, 1], [0, 1], [3, 1]]), np.array([0, 0, 1])
    assert metrics.confusion("single_label_classification", logits, labels) == [[1, 1], [1, 0]]
    marks = np.array([[1, 0], [0, 1], [1, 1]])
    found = metrics.confusion("multi_label_classification", np.array([[1.0, 1], [-1, -1], [1, 1]]), marks)
    assert found == [[2, 0, 0], [1, 1, 1]]
    assert metrics.confusion("regression", logits, labels) == []
