"""Adapters that go on: from a finished run, from a checkpoint, or replaced by another one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import ViTImageProcessor

from hf_transfer import Predictor, TransferArguments, UserError, fine_tune
from hf_transfer.adapters.attach import attach, make_room
from hf_transfer.adapters.continued import train_head
from hf_transfer.config.arguments.plan import PlanArguments
from hf_transfer.layers.wrappers import plain_names
from hf_transfer.runs import preflight_saving
from hf_transfer.training import adalora, adapter_state
from hf_transfer.training.trainer import TransferTrainer
from tests.adapters.test_adapter_runs import QUICK, STILL, base, data, table
from tests.helpers import small_tokenizer, tiny_bert, tiny_vit

__all__ = ["base", "data"]
P_TUNING = {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8}
TEXTS = ["word1 of yes", "a much longer line, of no"]
LONG = {**QUICK, "num_train_epochs": 3, "save_strategy": "epoch", "save_total_limit": 9}


def tuned(model, data, folder, **keys):
    return fine_tune(model, data, output_dir=str(folder), **{**QUICK, "preflight": False, **keys})


def scores(run):
    return [list(one["scores"].values()) for one in run.predict(TEXTS)]


def weights(run):
    return load_file(run.output_dir / "adapter_model.safetensors")


# ---- checkpoints ---------------------------------------------------------------------------------------------------


BEST = dict(  # the worst by loss, so that it is not the last
    eval_strategy="epoch", metric_for_best_model="loss", greater_is_better=True, load_best_model_at_end=True
)


@pytest.mark.parametrize("adapter", ["adalora", P_TUNING], ids=["adalora", "p_tuning"])
def test_checkpoints_hold_more_than_peft_saves(adapter, base, data, tmp_path):
    """The best model is the one that was evaluated, and a resumed run equals the whole one, bit for bit."""
    whole = tuned(base, data, tmp_path / "a", adapter=adapter, **LONG, **BEST)
    history = [json.loads(line) for line in (tmp_path / "a" / "history.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert whole.metrics["loss"] == pytest.approx(max(losses), abs=1e-6)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "results.json").unlink()
    for last in sorted((tmp_path / "b").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[2:]:
        shutil.rmtree(last)
    again = tuned(base, data, tmp_path / "b", adapter=adapter, resume_from_checkpoint="auto", **LONG, **BEST)
    last = [load_file(sorted((tmp_path / f).glob("checkpoint-9"))[0] / adapter_state.FILE) for f in "ab"]
    assert last[0].keys() == last[1].keys() and all(torch.equal(last[0][k], last[1][k]) for k in last[0])
    ours, theirs = weights(whole), weights(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in "ab"]
    assert configs[0].get("rank_pattern") == configs[1].get("rank_pattern")


# ---- going on from a finished run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    """adapter -> a run with it."""
    runs = {}

    def run(adapter):
        key = json.dumps(adapter)
        if key not in runs:
            runs[key] = tuned(base, data, tmp_path_factory.mktemp("finished") / "o", adapter=adapter)
        return runs[key]

    return run


WHOLE = {"peft_type": "LORA", "r": 2, "bias": "all", "modules_to_save": ["word_embeddings"]}


@pytest.mark.parametrize("adapter", ["adalora", "prompt", P_TUNING], ids=["adalora", "prompt", "p_tuning"])
def test_an_adapter_goes_on_where_it_ended(adapter, finished, data, tmp_path):
    """Where nothing is learned it gives the same answers; adapter and head train."""
    first = finished(adapter)
    run = tuned(str(first.output_dir), data, tmp_path / "a", **STILL)
    for ours, theirs in zip(scores(run), scores(first), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    trained = {plain_names(run.model)[n] for n, p in run.model.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= trained
    assert any("lora_" in n or "prompt_encoder" in n for n in trained)


def test_a_prompt_learns_other_labels(finished, tmp_path):
    labels = table(tmp_path / "b.csv", ("x", "y", "z"))
    run = tuned(str(finished(P_TUNING).output_dir), labels, tmp_path / "o", preflight=True)
    state = run.model.state_dict()
    (head,) = (n for n in state if n.endswith("classifier.modules_to_save.default.bias"))
    assert state[head].abs().min() > 0, "it began at zero"
    assert set(Predictor.load(tmp_path / "o").labels) == {"x", "y", "z"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora_alpha": 64}, "lora with lora_alpha=64 differs from the adapter in the checkpoint .*lora_alpha=16"),
        ({"lora_dropout": 0.5}, "lora with lora_dropout=0.5 differs"),
        (
            {"lora_target_modules": ["query"]},
            r"lora_target_modules: \['query'\] differs .* \(in 13 modules: query, key",
        ),
        ({"adapter": "dora"}, "use_dora=True differs"),
        ({"adapter": {"peft_type": "LORA", "r": 8, "init_lora_weights": "olora"}}, "init_lora_weights=olora differs"),
        ({"adapter": {"peft_type": "LORA", "modules_to_save": ["word_embeddings"]}}, "'word_embeddings' differs"),
        ({"adapter": {"peft_type": "LORA", "target_modules": ["value"]}}, r"lora_target_modules: \['value'\] differs"),
    ],
    ids=str,
)
def test_keys_of_another_adapter_are_refused(keys, said):
    """They would be recorded and have no effect."""
    model = attach(tiny_bert(), PlanArguments(adapter="lora"))
    with pytest.raises(UserError, match=rf"{said}.*restart_adapter=True"):
        attach(model, PlanArguments(**{"adapter": "lora", **keys}))


def test_keys_of_the_same_adapter_are_not():
    targets = ["query", "value"]
    model = attach(tiny_bert(), PlanArguments(adapter="lora", lora_alpha=4, lora_target_modules=targets))
    assert attach(model, PlanArguments(adapter="lora", lora_alpha=4.0, lora_target_modules=targets)) is model
    mapping = {
        "peft_type": "lora",
        "r": 8,
        "lora_alpha": 4,
        "target_modules": targets,
        "modules_to_save": ["classifier"],
    }
    assert attach(model, PlanArguments(adapter=mapping)) is model
    assert attach(model, PlanArguments()) is model


def test_a_head_that_an_adapter_does_not_hold_is_trained_and_saved():
    """As of an adapter that plain peft made, which trains the adapter alone."""
    model = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"], modules_to_save=["pooler"]))
    with torch.no_grad():
        dict(model.named_parameters())["base_model.model.bert.pooler.modules_to_save.default.dense.weight"].fill_(3)
    train_head(model)
    trained = {plain_names(model)[n] for n, p in model.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"} <= trained
    assert model.base_model.model.bert.pooler.modules_to_save["default"].dense.weight.unique().tolist() == [3]
    assert attach(model, PlanArguments()) is model, "all that trains is saved"
    before = model.active_peft_config.modules_to_save
    train_head(model)
    assert model.active_peft_config.modules_to_save == before == ["pooler", "classifier"]


# ---- starting another adapter ----------------------------------------------------------------------------------------


def test_what_an_adapter_trained_of_the_backbone_is_kept_when_it_is_replaced(finished, data, tmp_path, capsys):
    one = finished(WHOLE)
    keys = dict(restart_adapter=True, preflight=True, **STILL)
    run = tuned(str(one.output_dir), data, tmp_path / "o", adapter="lora", **keys)
    own = {plain_names(run.model)[n]: p for n, p in run.model.named_parameters() if ".original_module." not in n}
    theirs = {plain_names(one.model)[n]: p for n, p in one.model.named_parameters() if ".original_module." not in n}
    assert all(torch.allclose(own[n], p, atol=1e-6) for n, p in theirs.items() if "lora_" not in n)
    assert "of the backbone goes on training (bert.embeddings.LayerNorm.bias, " in capsys.readouterr().out
    assert scores(Predictor.load(tmp_path / "o")) == scores(run)
    with pytest.raises(UserError, match=r"restart_adapter: .* trained .*bias and \d+ more of the backbone, which ia3"):
        tuned(str(one.output_dir), data, tmp_path / "p", adapter="ia3", **keys)


# ---- options that cannot work ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (
            {"peft_type": "LORA", "layers_to_transform": [0]},
            r"layers_to_transform: \[0\] would have no effect.*target_mod",
        ),
        ({"peft_type": "LORA", "init_lora_weights": "eva"}, "init_lora_weights: 'eva' would have no effect"),
        ({"peft_type": "LORA", "eva_config": {"rho": 2.0}}, "eva_config.* will be ignored"),
        ({"peft_type": "LORA", "inference_mode": True}, "inference_mode: True would have no effect"),
        ({"peft_type": "LORA", "modules_to_save": ["word_embedding"]}, "no module 'word_embedding'.*'word_embeddings'"),
        ({"peft_type": "LORA", "rank_pattern": {"quary": 2}}, "rank_pattern: 'quary' matches none of the 13 adapted"),
        ({"peft_type": "LORA", "exclude_modules": ["dens"]}, "exclude_modules: 'dens' matches none"),
        ({"peft_type": "ADALORA", "r": 4}, "r: 4 would have no effect. Use init_r"),
        ({"peft_type": "ADALORA", "total_step": 9}, "total_step: 9 would have no effect"),
        (
            {"peft_type": "P_TUNING", "num_virtual_tokens": 2, "encoder_num_layers": 4},
            "`encoder_num_layers` is ignored",
        ),
    ],
    ids=lambda x: str(x)[:45],
)
def test_options_without_effect_are_refused(adapter, said):
    with pytest.raises(UserError, match=said):
        attach(tiny_bert(), PlanArguments(adapter=adapter))


def test_targets_of_a_mapping_and_of_the_key():
    keys = PlanArguments(adapter={"peft_type": "LORA", "target_modules": ["key"]}, lora_target_modules=["query"])
    with pytest.raises(UserError, match=r"lora_target_modules: \['query'\] contradicts target_modules: \['key'\]"):
        attach(tiny_bert(), keys)
    keys = PlanArguments(adapter={"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, lora_target_modules=["query"])
    with pytest.raises(UserError, match="lora_target_modules: PROMPT_TUNING adapts no modules"):
        attach(tiny_bert(), keys)
    model = attach(tiny_bert(), PlanArguments(adapter={"peft_type": "LORA", "rank_pattern": {"layer.0.*query": 2}}))
    ranks = {m.r["default"] for n, m in model.named_modules() if n.endswith("layer.0.attention.self.query")}
    assert ranks == {2}


def test_a_prompt_takes_its_place_from_the_text_or_is_refused(tiny_vit_folder):
    """20 of 16 positions leave a negative number; images have no tokens to stand before."""
    for tokens, read, left in ((4, 16, 12), (13, 16, 3), (20, 16, None), (14, 16, None)):
        tokenizer = small_tokenizer(read)
        keys = PlanArguments(adapter={"peft_type": "PROMPT_TUNING", "num_virtual_tokens": tokens})
        if left is None:
            with pytest.raises(UserError, match=rf"prompt of {tokens} tokens leaves no room .* 16 tokens in all"):
                make_room(tokenizer, keys, tiny_bert())
            continue
        make_room(tokenizer, keys, tiny_bert())
        assert tokenizer.model_max_length == left
        make_room(tokenizer, PlanArguments(adapter="lora"), tiny_bert())
        assert tokenizer.model_max_length == left
    with pytest.raises(UserError, match="a prompt stands before the tokens of a text, and the inputs are images"):
        make_room(ViTImageProcessor.from_pretrained(tiny_vit_folder), PlanArguments(adapter="prompt"), tiny_vit())


@pytest.mark.parametrize(
    ("keys", "steps", "said"),
    [
        ({"adapter": "adalora"}, 2, "needs at least 3 steps .* the run has 2"),
        ({"adapter": {"peft_type": "ADALORA", "tinit": 4, "tfinal": 6}}, 10, "tinit: 4 and tfinal: 6 leave none of 10"),
        ({"adapter": {"peft_type": "ADALORA", "init_r": 4, "target_r": 4}}, 10, "init_r: 4 leaves nothing to allocate"),
    ],
)
def test_a_run_without_room_for_adalora(keys, steps, said):
    model = attach(tiny_bert(), PlanArguments(**keys))
    with pytest.raises(UserError, match=said):
        adalora.check_schedule(model, steps)
    adalora.check_schedule(attach(tiny_bert(), PlanArguments(adapter="lora")), 1)


def test_adalora_where_not_every_layer_trains(tmp_path):
    for keys in ({"strategy": "partial", "unfrozen_groups": 1}, {"strategy": "full", "freeze": ["layer.0"]}):
        args = TransferArguments(str(tmp_path), adapter="adalora", use_cpu=True, **keys)
        with pytest.raises(UserError, match="adalora distributes ranks over all adapted layers"):
            TransferTrainer(tiny_bert(), args, train_dataset=[])


def test_ranks_that_train_again_are_saved():
    model = attach(tiny_bert(), PlanArguments(adapter="adalora", lora_r=2))
    name, values = next((n, p) for n, p in model.base_model.model.named_parameters() if "lora_E" in n)
    with torch.no_grad():
        values.copy_(torch.tensor([[1.0], [0.0], [0.5]]))
    model.active_peft_config.rank_pattern = {name: [True, False, False]}
    adalora.keep_what_acts(model)
    assert model.active_peft_config.rank_pattern == {name: [True, False, True]}


# ---- preflight -------------------------------------------------------------------------------------------------------


def test_a_backbone_too_large_to_load_twice(base, data, tmp_path, monkeypatch):
    """The adapter alone is read again; a parameter that its file lacks is seen."""
    monkeypatch.setattr(
        preflight_saving, "_bytes", lambda tensors: 3e9 * any(t.ndim > 1 and len(t) > 999 for t in tensors)
    )
    keys = dict(adapter=P_TUNING, preflight=True, **STILL)
    assert "saving and loading" in tuned(base, data, tmp_path / "o", **keys).results["preflight"]["checks"]
    held = preflight_saving.load_peft_weights
    monkeypatch.setattr(
        preflight_saving,
        "load_peft_weights",
        lambda *a, **k: {n: t for n, t in held(*a, **k).items() if "pooler" not in n},
    )
    with pytest.raises(UserError, match=r"the model cannot be saved and loaded again \(.*pooler.* would be random\)"):
        tuned(base, data, tmp_path / "p", **keys)
