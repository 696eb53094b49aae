"""What a run says at its end, and that its commands work."""

from __future__ import annotations

import shlex

import pandas as pd
import pytest

from hf_transfer import fine_tune
from hf_transfer.runs.ending import ending
from hf_transfer.training.best_metric import best_of
from tests import warm

QUICK = dict(
    strategy="linear-probe",
    num_train_epochs=2,
    save_strategy="no",
    preflight=False,
    data_facts=False,
    seed=1,
)


def made(**changes):
    """Results as `results.json` holds them."""
    names = "abcdefghijkl"
    return {
        "metrics": {"accuracy": 0.8, "loss": 0.5},
        "intervals": {"accuracy": [0.7, 0.9]},
        "problem_type": "single_label_classification",
        "baseline": {"predicts": "a", "metrics": {"accuracy": 0.5}, "compared_by": "accuracy", "verdict": "better"},
        "per_class": [
            {"label": n, "precision": 0.5, "recall": i / 10 if i < 10 else None, "support": 10 * (i < 10)}
            for i, n in enumerate(names)
        ],
        "confusions": [{"true": "a", "predicted": "b", "count": 7}],
        "kept": None,
        **changes,
    }


def test_the_result_stands_next_to_the_baseline():
    text = "\n".join(ending(made()))
    assert "accuracy         0.8000   95% CI 0.7000 to 0.9000   baseline 0.5000" in text
    assert "Better than the baseline, which is always predicting 'a': accuracy 0.8000 (95% CI 0.7000 to 0.9000)" in text
    assert "Most frequent errors: a taken for b (7)" in text
    assert "  j  0.9000 (9 of 10)   precision 0.5000" in text and "k" not in text.split("Recall by class:")[1][:80]
    for predicts, kind, words in (
        (["x", "y"], "multi_label_classification", "always predicting x, y:"),
        ([], "multi_label_classification", "always predicting no label:"),
        (3.14159, "regression", "always predicting the mean of the training set, 3.142:"),
    ):
        changes = {"problem_type": kind, "baseline": made()["baseline"] | {"predicts": predicts}, "per_class": []}
        assert words in "\n".join(ending(made(**changes)))


def test_of_many_classes_the_worst_are_shown():
    many = [{"label": f"c{i}", "precision": None, "recall": i / 100, "support": 100} for i in range(100)]
    lines = list(ending(made(per_class=many)))
    at = lines.index("Recall by class, the lowest of 100:")
    assert [line.split()[0] for line in lines[at + 1 : at + 6]] == ["c0", "c1", "c2", "c3", "c4"]
    assert "0.0100 (1 of 100)   never predicted" in lines[at + 2] and not lines[at + 6].startswith("  ")


def test_what_was_saved_is_said():
    last = dict(weights="last", step=8, epoch=2.0, metric="accuracy", value=0.4, is_chosen=False, drop=None)
    last |= dict(best_step=4, best_epoch=1.0, best_value=0.65)
    saved = "Saved: the last weights, after epoch 2, validation accuracy 0.4000"
    assert list(ending(made(kept=last)))[-1] == f"{saved}; the best was 0.6500 after epoch 1"
    assert list(ending(made(kept=last | {"best_step": 8})))[-1] == f"{saved} (the best)"
    drop = dict(metric="accuracy", value=0.4, best=0.65, best_epoch=1.0, examples=100)
    *_, line, warning = ending(made(kept=last | {"drop": drop}))
    assert line.startswith(saved) and warning == (
        "Warning: training made the model worse: validation accuracy fell from 0.6500 at epoch 1.00 to 0.4000, by more "
        "than chance explains on 100 examples. Save the best weights with --load_best_model_at_end "
        "--metric_for_best_model accuracy, or lower learning_rate."
    )
    best = last | {"weights": "best", "step": 5, "epoch": 1.25}
    assert list(ending(made(kept=best)))[-1] == (
        "Saved: the weights of the best evaluation, after step 5, validation accuracy 0.4000"
    )
    logs = [{"step": 1, "eval_loss": 2.0}, {"step": 2, "eval_loss": 1.0}, {"step": 3, "eval_loss": float("nan")}]
    assert best_of(logs, "eval_loss", False)["step"] == 2 and best_of(logs, "eval_loss", True)["step"] == 1
    assert best_of(logs, "eval_mae", False) is None


@pytest.mark.parametrize("kind", ["value", "several", "images", "pair in memory"])
def test_the_next_commands_work_as_printed(kind, tmp_path, tiny_bert_folder, tiny_vit_folder, capsys):
    frame = pd.DataFrame({"a": ["fine", "bad"] * 12, "b": list("klmnopqrstuv") * 2, "label": ["yes", "no"] * 12})
    keys = {**QUICK, "train_file": str(tmp_path / "data.csv")}
    if kind == "value":
        frame = frame.drop(columns="b").assign(label=[i / 7 for i in range(24)])
    elif kind == "several":
        frame = frame.drop(columns="b").assign(label=["x;y", "y", "x", "y;z"] * 6)
        keys["problem_type"] = "multi_label_classification"
    frame.to_csv(tmp_path / "data.csv", index=False)
    model = tiny_bert_folder
    stdin = b"fine\n"
    if kind == "images":
        model = tiny_vit_folder
        keys = QUICK | {"dataset_name": "bundled:digits", "max_train_samples": 20, "max_eval_samples": 20}
        keys["max_predict_samples"] = 20
        stdin = b""
    elif kind == "pair in memory":
        keys = QUICK | {"dataset_name": frame, "text_column_name": ["a", "b"]}
    run = fine_tune(model, **keys, output_dir=str(tmp_path / "out"))
    out = capsys.readouterr().out
    assert run.results["baseline"]["verdict"] and "the baseline, which is always predicting" in out
    assert len(run.results["per_class"]) == {"value": 0, "several": 3, "images": 10}.get(kind, 2)
    file = (tmp_path / "out" / "run.yaml").read_text()
    given, chosen, _ = (part.splitlines() for part in file.split("\n\n")[1:])
    names = {line.partition(":")[0] for line in given[1:] if line[0] != "-"}
    assert names == {*keys, "model_name_or_path", "output_dir"}
    assert any(line.startswith("task: ") and line.endswith("  # found in the data") for line in chosen)
    assert any(line.startswith("logging_steps: ") and line.endswith(" steps") for line in chosen)
    commands = [line.split("   #")[0] for line in out.split("Next:\n")[1].splitlines()]
    verbs = []
    for command in commands:
        _, *argv = shlex.split(command)
        if argv[0] == "-c":
            done = warm.fork(lambda code=argv[1]: exec(code, {}))
            verbs.append("python")
        else:
            argv = argv[2:] if argv[0] == "-m" else argv
            repeats = argv[0] == "train" and kind != "several"  # once is enough; else only as far as its keys
            done = warm.hf_transfer(*argv, *(["--seed", "x"] if repeats else []), stdin=stdin)
            verbs.append(argv[0])
            if repeats:
                assert "seed: 'x'" in done.stderr and done.stderr.count(":") < 5
                continue
        assert done.returncode == 0, (command, done.stderr)
    files = [] if kind == "pair in memory" else ["evaluate", "train"]
    assert verbs == ["python" if kind == "pair in memory" else "predict", *files, "python"]
