"""The sections of a model card, as lines of Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from hf_transfer.data.labels import MULTI_LABEL, REGRESSION
from hf_transfer.evaluation import logit_adjustment, standing
from hf_transfer.evaluation.by_class import most_confused, pairs
from hf_transfer.evaluation.calibration import describe
from hf_transfer.evaluation.metric_table import LEADING
from hf_transfer.hub import card_average, card_head
from hf_transfer.hub.card_markdown import escape, key_value, link, plain, table
from hf_transfer.objectives.adaptation import outcome
from hf_transfer.run_folder import held_out_by_each, judged_by, refitted
from hf_transfer.settings import keys as all_keys
from hf_transfer.training.arguments import TransferArguments

# Not used when a solver computes the head.
_OF_STEPS = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type", "optim")
_MAX_LABELS = 100  # rows of the label table
_MAX_CLASSES = 12  # classes of a full confusion matrix
_MAX_CONFUSIONS = 10  # most frequent confusions listed if there are more classes
_IMBALANCED = 10
_REFERENCES = {"scratch": "random weights", "linear-probe": "frozen features, the head alone"}
# Keys without a run, whose default for some of them is `auto`.
_WITHOUT_RUN = {f.name: f.default for f in fields(TransferArguments)}


def title(results: Mapping[str, Any]) -> str:
    """The title of the card, which is also the name of the model."""
    base = str(results["card"]["base_model"] or "a local checkpoint").rpartition("/")[2]
    return f"{plain(base)} on {plain(results['card']['dataset_shown'])}"


def head(results: Mapping[str, Any], merged: bool) -> list[str]:
    """Title and summary."""
    own, adapter = results["card"], results["adapter"]
    base = own["base_model"]
    how = {
        "none": "fine-tuned",
        True: f"fine-tuned with an adapter ({escape(adapter)}), which is merged into its weights,",
        False: f"fine-tuned with an adapter ({escape(adapter)})",
    }["none" if adapter == "none" else merged]
    model = link(base, base) if base else "A local checkpoint"
    if results["strategy"] == "scratch":
        model, how = "A model", "trained from scratch"
    what = f"{model} {how} for {results['task'].replace('-', ' ')} on {_dataset(results)} with `hf_transfer`"
    is_average = card_average.is_average(results)
    line = f"{what}. {card_average.summary(results)}" if is_average else f"{what}, strategy `{results['strategy']}`."
    return [f"# {escape(title(results))}", "", line]


def _dataset(results: Mapping[str, Any]) -> str:
    return link(results["card"]["dataset"], results["card"]["dataset_shown"], "datasets/")


# ---- results -------------------------------------------------------------------------------------------------------


def results_table(results: Mapping[str, Any]) -> list[str]:
    """Metrics with confidence intervals, next to a constant baseline."""
    intervals, split, baseline = results["intervals"], results["metrics_split"], _baseline(results)["metrics"]
    kinds = {REGRESSION: "mean of the training set", MULTI_LABEL: "best constant answer"}
    kind = kinds.get(results["problem_type"], "most frequent label")
    rows = [
        (
            f"`{name}`",
            _number(value),
            f"{_number(intervals[name][0])} to {_number(intervals[name][1])}" if name in intervals else "",
            _number(baseline[name]) if name in baseline else "",
        )
        for name, value in results["metrics"].items()
    ]
    count = results.get("num_examples") or results["data_facts"]["splits"][split]["examples"]
    return [
        f"Evaluated on the {count:,} examples of the {split} split. The 95% confidence intervals account for the "
        "sampling of these examples, not for the variation between training seeds. The baseline ignores the input.",
        "",
        *table(
            ("metric", "value", "95% CI", f"baseline ({kind})"),
            rows,
        ),
        *_refit(results),
        *_doubt(results),
        *_calibration(results),
        *_adjustment(results),
    ]


def _refit(results: Mapping[str, Any]) -> list[str]:
    """Which head the metrics are of, where the saved one was solved for on more examples."""
    again = refitted(results)
    if not again or results["metrics_split"] == "test":
        return []
    first = again["examples"] - again["held_out"]
    if count := again.get("trainings"):
        return [
            "",
            f"These metrics are of one training on {first:,} examples. The saved weights are the mean of {count} "
            f"trainings, which held out different ones of all {again['examples']:,}, so that none is left to measure "
            f"it on. On new data it is a little better on average. {held_out_by_each(again)}".rstrip(),
        ]
    return [
        "",
        f"These metrics are of a head that was fitted to the {first:,} training examples. The saved head was fitted "
        f"again to all {again['examples']:,}, those of the validation split included, on which it can no longer be "
        "measured. On new data it is a little better on average.",
    ]


def _calibration(results: Mapping[str, Any]) -> list[str]:
    """How the probabilities were calibrated, and whether the metrics are optimistic because of it."""
    calibration = results.get("calibration")  # older runs have none
    if not calibration:
        return []
    own = results["metrics_split"] != "test"  # of several trainings, that of the metrics has a temperature of its own
    doubt = " Loss and ECE above are of the same examples, and therefore optimistic." if own else ""
    return ["", f"Calibration: {describe(calibration)}. The saved weights include it.{doubt}"]


def _adjustment(results: Mapping[str, Any]) -> list[str]:
    """What was added to the logits for rare classes, and that probabilities are no frequencies because of it."""
    adjustment = results.get("logit_adjustment")  # older runs have none
    if not adjustment or not adjustment["strength"]:
        return []
    return [
        "",
        f"Logit adjustment: {logit_adjustment.describe(adjustment)}. The saved weights include it: rare classes are "
        "predicted more often, and their probabilities are above their frequencies.",
    ]


def _doubt(results: Mapping[str, Any]) -> list[str]:
    """A warning if the model is not significantly better than the baseline."""
    baseline, intervals, together = _baseline(results), results["intervals"], judged_by(results)
    name = baseline["compared_by"]
    own = together["verdict"] if together else standing.verdict(name, baseline["metrics"], intervals)
    if own in (None, standing.BETTER):
        return []
    where = f" on all {together['examples']:,} examples that the trainings held out" if together else ""
    return ["", f"**Not significantly better than the baseline (by the 95% CI of `{name}`{where}).**"]


def _baseline(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The baseline; older runs keep its metrics in what they record for the card."""
    if "baseline" in results:
        return results["baseline"]
    return {"metrics": results["card"]["baseline"], "compared_by": LEADING[results["problem_type"]][0]}


def _number(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.4f}"


def confusion(results: Mapping[str, Any]) -> list[str]:
    """The confusion matrix, or its largest off-diagonal entries if there are many classes; empty for regression."""
    counts, names = results.get("confusion") or [], [escape(name) for name in results["labels"]]
    if not counts:
        return []
    if results["problem_type"] == MULTI_LABEL:
        rows = [(name, *row) for name, row in zip(names, counts, strict=True)]
        return table(("label", "true positives", "false positives", "false negatives"), rows[:_MAX_LABELS])
    if len(names) <= _MAX_CLASSES:
        columns = ("true \\ predicted", *names)
        return table(columns, [(name, *row) for name, row in zip(names, counts, strict=True)])
    totals: Counter[int] = Counter()
    for i, _, n in pairs(counts):
        totals[i] += n
    rows = [(names[i], names[j], n, totals[i]) for i, j, n in most_confused(counts, _MAX_CONFUSIONS)]
    if not rows:
        return ["All predictions are correct."]
    return ["The most frequent errors:", "", *table(("true", "predicted", "errors", "examples"), rows)]


def transfer(results: Mapping[str, Any]) -> list[str]:
    """Whether pretraining helped, where a comparison asked; empty where none did."""
    rows = [
        (
            _REFERENCES[one["against"]],
            f"`{one['metric']}`",
            *_difference(one["difference"]),
            f"**{one['verdict']}**" + (f" ({escape(one['why_not'])})" if one["why_not"] else ""),
        )
        for one in results.get("transfer") or ()
    ]
    if not rows:
        return []
    return [
        "The same model, data and number of epochs, by seed, on the validation split: what this one has more than",
        "",
        *table(("trained from", "metric", "difference", "95% CI over seeds", "seeds", "pretraining and tuning"), rows),
    ]


def _difference(found: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """(mean, interval, number of seeds)."""
    if found is None:
        return "", "", "0"
    low_high = found["interval"]
    shown = f"{low_high[0]:+.4f} to {low_high[1]:+.4f}" if low_high else ""
    return f"{found['mean']:+.4f}", shown, str(found["count"])


# ---- labels and data -----------------------------------------------------------------------------------------------


def labels_table(results: Mapping[str, Any]) -> list[str]:
    """Labels with their output index and number of examples."""
    if results["problem_type"] == REGRESSION:
        return [f"One value, {escape(results['labels'][0])}."]
    splits = results["data_facts"]["splits"]
    rows = [
        (i, escape(name), *(f"{split['classes'].get(name, 0):,}" for split in splits.values()))
        for i, name in enumerate(results["labels"][:_MAX_LABELS])
    ]
    more = len(results["labels"]) - len(rows)
    columns = ("output", "label", *(f"{name} examples" for name in splits))
    return table(columns, rows) + (["", f"And {more:,} more, in `config.json`."] if more else [])


def data(results: Mapping[str, Any], keys: Mapping[str, Any]) -> list[str]:
    """Splits, duplicates, leaks and skipped examples."""
    data_facts = results["data_facts"]
    rows = [
        (name, f"{s['examples']:,}", f"{s['duplicates']['exact']:,}", f"{s['duplicates']['near']:,}")
        for name, s in data_facts["splits"].items()
    ]
    lines = [f"Trained and evaluated on {_dataset(results)}:", ""]
    lines += [*table(("split", "examples", "exact duplicates", "near-duplicates"), rows), ""]
    if not any(s["examined"] for s in data_facts["splits"].values()):
        lines.append("- The data was not checked for duplicates and leaks.")
    elif not data_facts["leaks"]:
        lines.append("- No examples were found in more than one split.")
    for leak in data_facts["leaks"]:
        lines.append(f"- {leak['exact'] + leak['near']:,} {leak['kept']} examples also appeared in {leak['other']}.")
    if data_facts["dropped"]:
        dropped = ", ".join(f"{count:,} from {name}" for name, count in data_facts["dropped"].items())
        lines.append(f"- Removed because they appeared in another split: {dropped}.")
    elif data_facts["leaks"]:
        lines.append("- These examples were not removed.")
    if data_facts["bad"]:
        lines.append(f"- {len(data_facts['bad']):,} unusable examples were left out.")
    if not keys.get("validation_file") and "test" not in data_facts["splits"]:
        lines.append("- There is no test split; the metrics were computed on the validation split.")
    elif results["metrics_split"] == "validation" and "test" in data_facts["splits"]:
        lines.append("- The metrics were computed on the validation split; the test split was left alone.")
    return lines


# ---- training ------------------------------------------------------------------------------------------------------


def training(results: Mapping[str, Any], keys: Mapping[str, Any]) -> list[str]:
    """Stages, solver and hyperparameters; of averaged weights the hyperparameters of the first model."""
    rows = []
    solves, is_average = keys.get("probe_solver") == "lbfgs", card_average.is_average(results)
    for stage in [] if solves or is_average else results["plan"]:
        rates = [r for r in stage["learning_rates"].values() if r]
        span = (
            f"{min(rates):.3g} to {max(rates):.3g}"
            if rates and min(rates) != max(rates)
            else f"{max(rates or [0]):.3g}"
        )
        groups = stage["groups"]
        trained = ", ".join(groups) if len(groups) < 4 else f"{len(groups)} groups, {groups[0]} … {groups[-1]}"
        size = f"{stage['trainable_parameters']:,}"
        rows.append((escape(stage["name"]), _epochs(stage, results), escape(trained), size, span))
    columns = ("stage", "epochs", "trained groups", "trainable parameters", "learning rate")
    lines = table(columns, rows) if rows else []
    if is_average:
        lines = ["Of the first of the models above:" if results.get("soup") else "Of the fine-tuned model:"]
    for paragraph in card_head.paragraphs(results, solves):
        lines += [*([""] if lines else []), paragraph]
    if adaptation := [f"- {escape(line.strip())}." for line in outcome.lines(results)]:
        lines += ["", *adaptation]
    values = [(n, v) for n, v in _hyperparameters(keys) if not solves or n not in _OF_STEPS]
    return [*lines, "", *table(("hyperparameter", "value"), [(f"`{n}`", escape(v)) for n, v in values])]


def _epochs(stage: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The length of a stage; None in the results if plateaus end stages, and the last one takes what is left."""
    if stage["epochs"] is not None:
        return f"{stage['epochs']:g}"
    return "remaining" if stage is results["plan"][-1] else "until a plateau"


def _hyperparameters(keys: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The most important hyperparameters, and all others that differ from their default."""
    for name, entry in all_keys().items():
        if name in keys and entry.about.card != "never":
            value = keys[name]
            is_default = value == getattr(entry.default, "value", entry.default)
            declined = entry.default == "auto" and value == _WITHOUT_RUN.get(name)
            if entry.about.card == "always" or not (is_default or declined):
                yield name, key_value(value)


def cost(results: Mapping[str, Any]) -> list[str]:
    """Time, hardware and throughput; nothing of averaged weights, which were not trained."""
    if card_average.is_average(results):
        return []
    trained, total = results["trainable_parameters"], results["total_parameters"]
    return [
        f"{results['train_seconds']:,.0f} s of training on {escape(results['device'])}, "
        f"{results['cost']['device_hours']:.3g} device hours, {results['train_samples_per_second']:,.1f} examples per "
        f"second; {trained:,} of {total:,} parameters trained ({trained / max(total, 1):.2%})."
    ]


def limitations(results: Mapping[str, Any]) -> Iterator[str]:
    """What to know before relying on the model."""
    data_facts, split = results["data_facts"], results["metrics_split"]
    if card_average.is_average(results):
        yield card_average.limitation(results)
    else:
        yield f"The results are from a single run with seed {results['seed']}; other seeds give different results."
    if results["problem_type"] != REGRESSION:
        yield (
            "The model always predicts among its labels, even if none of them applies, and was only evaluated on data "
            "similar to its training data."
        )
    if split == "validation":
        yield (
            "The metrics were computed on the validation split, which may have been used to choose settings, and may "
            "therefore be optimistic."
        )
    if data_facts["cut"] and data_facts["cut"][0]:
        fraction, limit = data_facts["cut"]
        yield f"Inputs are truncated to {limit:,} tokens, which affected {fraction:.1%} of sampled training texts."
    if data_facts["imbalance"] > _IMBALANCED:
        yield f"The largest class has {data_facts['imbalance']:.0f} times as many training examples as the smallest."
    if data_facts["leaks"] and not data_facts["dropped"]:
        yield "Some held-out examples also appear in the training data, so the metrics are optimistic."
    if not results["card"]["license"]:
        yield "The license is unknown; check the terms of the base model and the dataset."
