"""The model card: `README.md`, written by every run from its results and its keys, and never with a local path.

Metadata follow huggingface_hub's `ModelCardData`; metrics stand in the `model-index`. What came from users (labels,
names of data, examples) is escaped. The text depends on nothing but the run, so that it can be made again anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_transfer import hub_client
from hf_transfer.data import bundled
from hf_transfer.data.labels import LABELS, MULTI_LABEL
from hf_transfer.data.load import IN_MEMORY
from hf_transfer.data.splits import Data
from hf_transfer.evaluation import metrics
from hf_transfer.hub.card_markdown import escape, is_hub_id, link, loading, plain, table
from hf_transfer.models import bundled as bundled_models
from hf_transfer.run_folder import CARD, RESULTS, read_results
from hf_transfer.settings import keys as all_keys

# Of a metric: its id among the hub's. Others keep their own name.
METRIC_IDS = {
    "f1_macro": "f1",
    "f1_micro": "f1",
    "precision_macro": "precision",
    "recall_macro": "recall",
    "mcc": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
# Keys that are hyperparameters, by their topic in `--help`; and some of the data's.
_OF_STEPS = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type", "optim")
_LISTED = 100  # labels in a table
_CROSSED = 12  # classes of a whole confusion matrix
_WORST = 10  # confusions that are named where there are more classes
_EXAMPLE = 300  # characters of an example


# ---- what a run notes for its card ---------------------------------------------------------------------------------


def facts(values: Mapping[str, Any], data: Data, base: str | None, split: str) -> dict[str, Any]:
    """What the card needs and nothing else in `results.json` says.

    Args:
        values: the run's keys.
        data: its splits.
        base: what the run's model was loaded from: for an adapter its backbone, None for random weights.
        split: the one that the metrics are of.
    """
    dataset = values["dataset_name"] or values["train_file"]
    on_hub, of_data = hub_name(base), bundled.HUB.get(str(dataset))
    named = of_data.name if of_data else dataset if values["dataset_name"] and not _is_local(dataset) else None
    told = hub_client.card_of(on_hub, "model") if on_hub else {}
    told_of_data = hub_client.card_of(named, "dataset") if named else {}
    shipped = bundled.HUB.get(str(base)) or bundled.HUB.get(bundled_models.named_by(str(base)) or "")
    held_out, train, is_text = data.splits[split], data.train, values["task"] == "text-classification"
    return {
        "base_model": on_hub,
        "dataset": named,
        "dataset_shown": str(dataset) if named or of_data or dataset == IN_MEMORY else Path(str(dataset)).name,
        "license": (shipped and shipped.license) or told.get("license"),
        "language": (of_data and of_data.language) or told_of_data.get("language") or told.get("language"),
        "baseline": metrics.baseline(
            data.labels.problem_type,
            _labels(train),
            _labels(held_out),
            len(data.labels.names),
        ),
        "examples": _examples(held_out, data.inputs, values["card_examples"]) if is_text else [],
    }


def hub_name(model: str | None) -> str | None:
    """The hub id that a model can be had under: bundled ones under their own; None for a local folder's.

    A folder that a run wrote has the base of that run.
    """
    if model is None:
        return None
    name = model if model.startswith("bundled:") else bundled_models.named_by(model)
    if name is not None:
        return bundled.HUB[name].name
    if not _is_local(model):
        return model
    try:
        noted = json.loads((Path(model).expanduser() / RESULTS).read_text(encoding="utf-8"))["card"]["base_model"]
    except (OSError, ValueError, LookupError, TypeError):  # no run's folder
        return None
    return noted if isinstance(noted, str) else None


def _is_local(name: Any) -> bool:
    return Path(str(name)).expanduser().exists() or not (is_hub_id(str(name)) or re.fullmatch(r"[\w.-]+", str(name)))


def _labels(split: Any) -> metrics.Array:
    return split.with_format("numpy", columns=[LABELS])[LABELS][:]


def _examples(split: Any, inputs: Sequence[str], most: int) -> list[str]:
    """Short texts, of different labels as far as there are."""
    if len(inputs) != 1:
        return []
    found: dict[str, str] = {}
    for row in split.select(range(min(len(split), 200))).select_columns([inputs[0], LABELS]):
        found.setdefault(str(row[LABELS]), plain(row[inputs[0]], _EXAMPLE))
        if len(found) >= most:
            break
    return list(found.values())[:most]


# ---- the card ------------------------------------------------------------------------------------------------------


def write(folder: Path) -> Path:
    """Write the card of the finished run in `folder`, beside and renamed."""
    beside = folder / f".{CARD}.new"
    beside.write_text(text(*read_results(folder)), encoding="utf-8")
    return beside.replace(folder / CARD)


def with_id(card: str, hub_model_id: str) -> str:
    """A card whose code loads the model from a hub. What its owner changed in it stays."""
    return re.sub(r'^model_id = "[^"\n]*".*$', f'model_id = "{hub_model_id}"', card, flags=re.MULTILINE)


def text(results: Mapping[str, Any], keys: Mapping[str, Any], merged: bool = False) -> str:
    """The whole card.

    Args:
        results: what `results.json` holds.
        keys: what `run.yaml` holds.
        merged: of the plain model that the adapter is merged into.
    """
    parts = {
        "": _head(results, merged),
        "Results": _metrics(results),
        "How to load": loading(results, keys, merged),
        "Labels": _labels_table(results),
        "Data": _data(results, keys),
        "Training": _training(results, keys),
        "What it confuses": _confusion(results),
        "Cost": _cost(results),
        "Limits": [f"- {line}" for line in _limits(results, keys)],
        "Versions": [", ".join(f"{name} {v}" for name, v in results["versions"].items() if v) + "."],
    }
    body = ["\n".join([*([f"## {title}"] if title else []), *lines]) for title, lines in parts.items() if lines]
    front = metadata(results, keys, merged).to_yaml(line_break="\n")
    return f"---\n{front}\n---\n\n" + "\n\n".join(body) + "\n"


def metadata(results: Mapping[str, Any], keys: Mapping[str, Any], merged: bool = False) -> ModelCardData:
    """What stands above the text, for the hub and for programs."""
    own, adapter = results["card"], "none" if merged else results["adapter"]
    base = own["base_model"] if is_hub_id(own["base_model"]) or _is_bare(own["base_model"]) else None
    tags = ["hf_transfer", "transfer-learning", results["task"], results["strategy"], adapter]
    found = {k: v for k, v in results["metrics"].items() if v is not None}
    shown = plain(own["dataset_shown"])
    is_on_hub = own["dataset"] == own["dataset_shown"]  # of a bundled one the test split is ours, not the hub's
    evaluated = [
        EvalResult(
            task_type=results["task"],
            task_name=results["task"].replace("-", " ").capitalize(),
            dataset_type=own["dataset"] if is_on_hub else re.sub(r"[^\w.-]+", "-", shown).strip("-") or "data",
            dataset_name=shown,
            dataset_config=keys.get("dataset_config_name"),
            dataset_split=results["metrics_split"],
            metric_type=METRIC_IDS.get(name, name),
            metric_name=name,
            metric_value=value,
        )
        for name, value in found.items()
    ]
    more: dict[str, Any] = {"base_model_relation": "adapter" if adapter != "none" else "finetune"} if base else {}
    if own["examples"]:
        more["widget"] = [{"text": plain(example, _EXAMPLE)} for example in own["examples"]]
    return ModelCardData(
        base_model=base,
        library_name="transformers" if adapter == "none" else "peft",
        pipeline_tag=results["task"],
        license=own["license"],
        language=own["language"],
        datasets=[own["dataset"]] if is_hub_id(own["dataset"]) or _is_bare(own["dataset"]) else None,
        metrics=list(dict.fromkeys(METRIC_IDS.get(name, name) for name in found if name != "loss")),
        tags=[tag for tag in tags if tag not in (None, "none", "")],
        model_name=_title(results),
        eval_results=evaluated or None,
        **more,
    )


def _is_bare(name: str | None) -> bool:
    """An id without an owner, such as `bert-base-uncased`."""
    return name is not None and re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) is not None


# ---- its parts -----------------------------------------------------------------------------------------------------


def _title(results: Mapping[str, Any]) -> str:
    base = str(results["card"]["base_model"] or "a local checkpoint").rpartition("/")[2]
    return f"{plain(base)} on {plain(results['card']['dataset_shown'])}"


def _head(results: Mapping[str, Any], merged: bool) -> list[str]:
    own, adapter = results["card"], results["adapter"]
    base = own["base_model"]
    what = {
        "none": "fine-tuned",
        True: f"with an adapter ({escape(adapter)}) that was trained in it and merged into its weights,",
        False: f"with an adapter ({escape(adapter)}),",
    }["none" if adapter == "none" else merged]
    model = link(base, base) if base else "A local checkpoint"
    if results["strategy"] == "scratch":
        model, what = "A model", "trained from random weights"
    return [
        f"# {escape(_title(results))}",
        "",
        f"{model} {what} for {results['task'].replace('-', ' ')} on {_dataset(results)} with `hf_transfer`, strategy "
        f"`{results['strategy']}`.",
    ]


def _dataset(results: Mapping[str, Any]) -> str:
    return link(results["card"]["dataset"], results["card"]["dataset_shown"], "datasets/")


def _metrics(results: Mapping[str, Any]) -> list[str]:
    found, intervals, split = results["metrics"], results["intervals"], results["metrics_split"]
    baseline = results["card"]["baseline"]
    kind = "mean of the training set" if results["problem_type"] == "regression" else "most frequent answer"
    rows = [
        (
            f"`{name}`",
            _number(value),
            f"{_number(intervals[name][0])} to {_number(intervals[name][1])}" if name in intervals else "",
            _number(baseline[name]) if name in baseline else "",
        )
        for name, value in found.items()
    ]
    count = results["data_facts"]["splits"][split]["examples"]
    return [
        f"On the {count:,} examples of the {split} split. Intervals are of 95% over these examples; they say nothing "
        "of the spread between training seeds. The baseline looks at no input.",
        "",
        *table(("metric", "value", "interval", f"baseline: {kind}"), rows),
        *_doubt(results),
    ]


def _doubt(results: Mapping[str, Any]) -> list[str]:
    baseline, intervals = results["card"]["baseline"], results["intervals"]
    name = next((n for n in ("accuracy", "f1_micro") if n in baseline and n in intervals), None)
    if name is None or intervals[name][0] > baseline[name]:
        return []
    return ["", f"**This model is not shown to be better than the baseline: its interval of `{name}` holds it.**"]


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4f}"


def _labels_table(results: Mapping[str, Any]) -> list[str]:
    if results["problem_type"] == "regression":
        return [f"One value, {escape(results['labels'][0])}."]
    splits = results["data_facts"]["splits"]
    rows = [
        (i, escape(name), *(f"{split['classes'].get(name, 0):,}" for split in splits.values()))
        for i, name in enumerate(results["labels"][:_LISTED])
    ]
    more = len(results["labels"]) - len(rows)
    head = ("output", "label", *(f"examples of {name}" for name in splits))
    return table(head, rows) + (["", f"And {more:,} more, in `config.json`."] if more else [])


def _data(results: Mapping[str, Any], keys: Mapping[str, Any]) -> list[str]:
    known = results["data_facts"]
    rows = [
        (name, f"{s['examples']:,}", f"{s['duplicates']['exact']:,} equal, {s['duplicates']['near']:,} nearly")
        for name, s in known["splits"].items()
    ]
    lines = [f"Trained and measured on {_dataset(results)}:", ""]
    lines += [*table(("split", "examples", "duplicates within"), rows), ""]
    if not any(s["examined"] for s in known["splits"].values()):
        lines.append("- Duplicates and leaks were not looked for.")
    elif not known["leaks"]:
        lines.append("- No example of one split was found in another.")
    for leak in known["leaks"]:
        lines.append(
            f"- {leak['exact'] + leak['near']:,} examples of {leak['kept']} were found in {leak['other']} too."
        )
    if known["dropped"]:
        gone = ", ".join(f"{count:,} from {name}" for name, count in known["dropped"].items())
        lines.append(f"- Removed because they were in two splits: {gone}.")
    elif known["leaks"]:
        lines.append("- What was in two splits was left there.")
    if known["bad"]:
        lines.append(f"- {len(known['bad']):,} examples could not be used and were left out.")
    if not keys.get("validation_file") and "test" not in known["splits"]:
        lines.append("- There is no test split: validation is what the metrics are of.")
    return lines


def _training(results: Mapping[str, Any], keys: Mapping[str, Any]) -> list[str]:
    rows = []
    solves = keys.get("probe_solver") == "lbfgs"
    for stage in [] if solves else results["plan"]:
        rates = [r for r in stage["learning_rates"].values() if r]
        span = (
            f"{min(rates):.3g} to {max(rates):.3g}"
            if rates and min(rates) != max(rates)
            else f"{max(rates or [0]):.3g}"
        )
        groups = stage["groups"]
        which = ", ".join(groups) if len(groups) < 4 else f"{len(groups)} groups, {groups[0]} … {groups[-1]}"
        rows.append(
            (escape(stage["name"]), f"{stage['epochs']:g}", escape(which), f"{stage['trainable_parameters']:,}", span)
        )
    lines = table(("stage", "epochs", "trains", "parameters", "learning rates"), rows) if rows else []
    if found := results.get("probe"):
        lines += [""] if lines else []
        lines.append(
            f"{'The head was solved for' if solves else 'The head began as the solution'} on the frozen features, with "
            f"the L2 strength {found['l2']:.2g} (on features of variance 1, of {found['l2_grid'][-1]:.2g} to "
            f"{found['l2_grid'][0]:.2g}), which has the best {escape(found['measure'])} in {found['held_out']}: "
            f"{found['score']:.4f}."
        )
    names = [(n, v) for n, v in _hyperparameters(keys) if not solves or n not in _OF_STEPS]
    return [*lines, "", *table(("key", "value"), [(f"`{n}`", escape(v)) for n, v in names])]


def _hyperparameters(keys: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, entry in all_keys().items():
        if name in keys and entry.about.card != "never":
            value = keys[name]
            if entry.about.card == "always" or value != getattr(entry.default, "value", entry.default):
                yield name, str(value).lower() if isinstance(value, bool) else value


def _confusion(results: Mapping[str, Any]) -> list[str]:
    found, names = results.get("confusion") or [], [escape(name) for name in results["labels"]]
    if not found:
        return []
    if results["problem_type"] == MULTI_LABEL:
        rows = [(name, *counts) for name, counts in zip(names, found, strict=True)]
        return table(("label", "right", "wrong", "missed"), rows[:_LISTED])
    if len(names) <= _CROSSED:
        head = ("true \\ predicted", *names)
        return table(head, [(name, *counts) for name, counts in zip(names, found, strict=True)])
    pairs = [(n, i, j) for i, row in enumerate(found) for j, n in enumerate(row) if i != j and n]
    worst = sorted(pairs, key=lambda p: -p[0])[:_WORST]
    rows = [(names[i], names[j], n, sum(found[i])) for n, i, j in worst]
    return table(("true", "predicted", "times", "of"), rows) if rows else ["Nothing: every answer was right."]


def _cost(results: Mapping[str, Any]) -> list[str]:
    trained, total = results["trainable_parameters"], results["total_parameters"]
    return [
        f"{results['train_seconds']:,.0f} s of training on {escape(results['device'])}, "
        f"{results['cost']['device_hours']:.3g} device hours, {results['train_samples_per_second']:,.1f} examples per "
        f"second; {trained:,} of {total:,} parameters trained ({trained / max(total, 1):.2%})."
    ]


def _limits(results: Mapping[str, Any], keys: Mapping[str, Any]) -> Iterator[str]:
    known, split = results["data_facts"], results["metrics_split"]
    yield f"One run with seed {results['seed']}: another seed gives somewhat other figures."
    if results["problem_type"] != "regression":
        yield "It answers with its labels only, also where none fits, and was measured on data like its training data."
    if split == "validation":
        yield "The metrics are of the validation split, which may have been used to choose settings: they can flatter."
    if known["cut"] and known["cut"][0]:
        share, limit = known["cut"]
        yield f"It reads {limit:,} tokens; {share:.1%} of a sample of the training texts were longer and were cut."
    if known["imbalance"] > 10:
        yield f"The largest class has {known['imbalance']:.0f} times the training examples of the smallest."
    if known["leaks"] and not known["dropped"]:
        yield "Some held-out examples are in the training data too: the metrics flatter."
    if not results["card"]["license"]:
        yield "No licence is known: ask who made the base model and the data."
