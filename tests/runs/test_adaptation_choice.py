"""`domain_adaptation: auto`: the candidates, the choice, what is kept of an interrupted one, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_transfer import UserError, fine_tune
from hf_transfer.analysis.validators import Scores
from hf_transfer.config.arguments.adaptation import METHODS
from hf_transfer.errors import UserErrors
from hf_transfer.objectives.adaptation import outcome
from hf_transfer.runs import adaptation_choice, run
from hf_transfer.runs.adapted import adapted
from hf_transfer.runs.preview import plan_only
from hf_transfer.settings import Config
from tests.runs.test_target import KEYS, label, write_texts

AUTO = {**KEYS, "domain_adaptation": "auto", "num_train_epochs": 2}


def sources(folder):
    return {
        "dataset_name": write_texts(folder / "source.jsonl", 24, label=label),
        "target_dataset_name": write_texts(folder / "target.jsonl", 9, seed=3),
        "test_file": write_texts(folder / "test.jsonl", 6, seed=4, label=label),
    }


@pytest.fixture(scope="module")
def interrupted(tiny_bert_folder, tmp_path_factory):
    """A run that was killed before its third candidate, and then finished.

    `candidates` is a mapping of those of the first attempt to the time of their results.
    """
    folder = tmp_path_factory.mktemp("auto")
    keys = {**AUTO, **sources(folder), "output_dir": str(folder / "out")}
    data, own = keys.pop("dataset_name"), run.run

    def kill_third(config, among=None):
        if config.training.domain_adaptation == "coral":
            raise KeyboardInterrupt
        return own(config, among)

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(run, "run", kill_third)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(tiny_bert_folder, data, **keys)
    places = folder / "out" / "candidates"
    first = {path.parent.name: path.stat().st_mtime_ns for path in places.glob("*/results.json")}
    with pytest.raises(UserError, match="holds an unfinished run"):
        fine_tune(tiny_bert_folder, data, **keys)
    with pytest.raises(UserError, match=r"this is not the same run\. learning_rate: 5e-05 then, 0.1 now"):
        fine_tune(tiny_bert_folder, data, **keys, learning_rate=0.1, resume_from_checkpoint="auto")
    result = fine_tune(tiny_bert_folder, data, **keys, resume_from_checkpoint="auto")
    return SimpleNamespace(result=result, first=first, folder=folder / "out", keys=keys, data=data)


def test_finished_candidates_are_kept(interrupted):
    assert set(interrupted.first) == {"source-only", "mmd"}
    for name, time in interrupted.first.items():
        assert (interrupted.folder / "candidates" / name / "results.json").stat().st_mtime_ns == time


def test_every_method_is_a_candidate_and_the_choice_is_told(interrupted):
    found = interrupted.result.results["domain_adaptation"]["selection"]
    assert [one["method"] for one in found["candidates"]] == ["none", *METHODS]
    assert [bool(one["why_not"]) for one in found["candidates"]].count(False) == 1
    said = "\n".join(outcome.lines(interrupted.result.results))
    assert "auto compared 5 models without labels of the target, by information" in said
    card = (interrupted.folder / "README.md").read_text()
    assert "compared 5 models" in card and "source only: information" in card


def test_the_run_is_the_chosen_candidate(interrupted):
    results = interrupted.result.results
    chosen = results["domain_adaptation"]["selection"]["chosen"]
    place = interrupted.folder / "candidates" / chosen.replace("none", "source-only")
    one, other = (load_file(folder / "model.safetensors") for folder in (interrupted.folder, place))
    assert all(torch.equal(one[name], other[name]) for name in other)
    candidate = json.loads((place / "results.json").read_text())
    assert candidate["metrics_split"] == "validation" and results["metrics_split"] == "test"
    for name in ("validation_metrics", "plan", "strategy", "num_train_examples", "chosen"):
        assert results.get(name) == candidate.get(name), name
    for name in ("steps", "loss"):
        assert [one[name] for one in results["stages"]] == [one[name] for one in candidate["stages"]]
    own, earlier = results["domain_adaptation"], candidate["domain_adaptation"]
    assert own["validators"] == earlier["validators"] and earlier["selection"] is None
    assert (interrupted.folder / "history.jsonl").read_text() == (place / "history.jsonl").read_text()
    values = yaml.safe_load((interrupted.folder / "run.yaml").read_text())
    assert values["domain_adaptation"] == chosen
    assert (values["target_dataset_name"] is None) == (chosen == "none")


def test_all_candidates_have_the_plan_of_the_run(interrupted):
    """`strategy: auto` would train the head alone without a target."""
    found = [
        json.loads((interrupted.folder / "candidates" / name / "results.json").read_text())
        for name in ("source-only", "mmd", "pseudo-label")
    ]
    assert len({json.dumps(one["plan"]) for one in found}) == 1
    assert found[0]["domain_adaptation"]["method"] == "none" and "rounds" in found[2]["domain_adaptation"]


def test_labels_of_the_target_are_trained_on_by_every_candidate(tiny_bert_folder, tmp_path, monkeypatch, capsys):
    """The one on the source included, which is kept where no other is better; no score reads the labels."""
    given, out = {0: "yes", 3: "no"}, tmp_path / "out"
    target = write_texts(tmp_path / "few.jsonl", 12, seed=3, opinion=lambda i: given.get(i, ""))
    keys = {**AUTO, **sources(tmp_path), "target_dataset_name": target, "target_label_column_name": "opinion"}
    monkeypatch.setattr(adaptation_choice, "CANDIDATES", ("none", "coral"))
    monkeypatch.setattr(adaptation_choice, "MARGIN", 10.0)  # nats: more than there are
    seen = []
    monkeypatch.setattr(run, "adapted", lambda *args: [seen.append(args[0]), adapted(*args)][1])
    result = fine_tune(tiny_bert_folder, keys.pop("dataset_name"), output_dir=out, **keys)
    for name in ("source-only", "coral"):
        found = json.loads((out / "candidates" / name / "results.json").read_text())["domain_adaptation"]
        assert found["target"]["labeled"] == 2
    assert all(len(one.target.unseen().examples) == 10 for one in seen) and len(seen) == 3
    told = capsys.readouterr().out
    assert "1/2  source and target labels only" in told and "Kept: source and target labels only." in told
    said = "\n".join(outcome.lines(result.results))
    assert "all trained on 2 labels of the target, by information on the others, without labels; the model" in said
    values = yaml.safe_load((out / "run.yaml").read_text())
    assert (values["domain_adaptation"], values["target_dataset_name"]) == ("none", target)
    assert values["target_label_column_name"] == "opinion" and len(result.trainer.train_dataset) > 24 * 0.8


def test_data_that_is_refused_leaves_nothing(tiny_bert_folder, tmp_path):
    """The same command with other data is not refused as an unfinished run."""
    (tmp_path / "empty.csv").write_text("text\n")
    keys = {**AUTO, **sources(tmp_path), "target_dataset_name": str(tmp_path / "empty.csv")}
    with pytest.raises(UserError, match="has no examples"):
        fine_tune(tiny_bert_folder, keys.pop("dataset_name"), output_dir=tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()


def scored(information, accuracy):
    scores = Scores(information, 0.5, 1.0, 1.0, accuracy, 0.01).to_dict()
    return {"domain_adaptation": {"validators": scores}}


def test_the_source_alone_is_kept_unless_a_candidate_is_better_by_the_margin():
    results = {"none": scored(1.0, 0.9), "mmd": scored(1.0 + adaptation_choice.MARGIN / 2, 0.9)}
    assert adaptation_choice.decide(results).chosen == "none"
    results["dann"] = scored(1.1 + adaptation_choice.MARGIN, 0.9)
    assert adaptation_choice.decide(results).chosen == "dann"


def test_plan_tells_what_all_of_it_takes(interrupted, tiny_bert_folder, tmp_path, capsys):
    keys = {k: v for k, v in interrupted.keys.items() if k != "output_dir"}
    given = {**keys, "model_name_or_path": tiny_bert_folder, "dataset_name": interrupted.data}
    planned = plan_only(Config.from_sources({}, {**given, "output_dir": str(tmp_path / "out")}))
    (line,) = [note for note in planned.notes if "auto trains 5 models" in note]
    assert line in capsys.readouterr().out and "of training steps in all" in line


# ---- refused -------------------------------------------------------------------------------------------------------


def test_one_checkpoint_is_not_enough_to_go_on_with(interrupted, tiny_bert_folder, tmp_path):
    last = sorted((interrupted.folder / "candidates" / "mmd").glob("checkpoint-*"))[-1]
    keys = {**interrupted.keys, "output_dir": str(tmp_path / "out"), "resume_from_checkpoint": str(last)}
    with pytest.raises(UserError, match="is one checkpoint, and auto trains several models"):
        fine_tune(tiny_bert_folder, interrupted.data, **keys)


def test_a_finished_run_is_not_written_over(interrupted, tiny_bert_folder):
    with pytest.raises(UserError, match="holds a finished run"):
        fine_tune(tiny_bert_folder, interrupted.data, **interrupted.keys)


def test_values_that_are_no_classes(tiny_bert_folder, tmp_path):
    source = write_texts(tmp_path / "source.jsonl", 24, label=lambda i: i + 0.5)
    target = write_texts(tmp_path / "target.jsonl", 9, seed=3)
    with pytest.raises(UserError, match="domain_adaptation: auto: it needs one class per example, and the task is reg"):
        fine_tune(tiny_bert_folder, source, target_dataset_name=target, output_dir=tmp_path / "out", **AUTO)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"domain_adaptation_weight": 0.5}, "each method has its own; name a method"),
        ({"target_dataset_name": None}, "auto needs target_dataset_name"),
        ({"max_hours": 1.0}, "divides the epochs into rounds"),
    ],
)
def test_keys_that_contradict_each_other(keys, said, tmp_path):
    given = {"model_name_or_path": "m", "dataset_name": "d.csv", "target_dataset_name": "t.csv", "output_dir": "o"}
    with pytest.raises(UserErrors, match=said):
        Config.from_sources({}, {**given, "domain_adaptation": "auto", **keys})
