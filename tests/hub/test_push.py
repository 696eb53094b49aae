"""Push and pull with the real client, over real sockets, against a hub in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hf_transfer.data import bundled
from hf_transfer.models import bundled as bundled_models
from hf_transfer.report import page
from hf_transfer.run_folder import EXAMPLES, SHOWING
from hf_transfer.runs.soup import with_pretrained
from tests.hub_client import READER, ROOT, TOKEN, Client, Hub, XetClient

COMMON = {"tokenizer.json", "tokenizer_config.json", "config.json", "README.md"}
ADAPTER_FILES = COMMON | {"adapter_config.json", "adapter_model.safetensors", "backbone.json"}
WHOLE_FILES = COMMON | {"model.safetensors"}
QUICK = {"num_train_epochs": 1, "save_strategy": "no", "train_val_split": 0.25, "learning_rate": 0.02}


def words(**keys) -> list[str]:
    return [word for name, value in {**QUICK, **keys}.items() for word in (f"--{name}", str(value))]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(place, tiny_bert_folder):
    server = Hub(place / "hub")
    shutil.copytree(tiny_bert_folder, place / "base")
    (place / "base" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n\n# Tiny\n")
    server.seed("acme/tiny-bert", place / "base")
    yield server
    server.process.terminate()
    server.process.wait()


@pytest.fixture(scope="module")
def lfs(hub, place):
    made = Client(hub.endpoint, place / "home")
    yield made
    made.close()


@pytest.fixture(scope="module")
def xet(lfs):
    return XetClient(lfs)


@pytest.fixture(params=["lfs", "xet"])
def client(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def no_faults(hub):
    hub.fail()
    yield
    hub.fail()


@pytest.fixture(scope="module")
def data(place) -> str:
    """Labels that YAML would take for booleans."""
    lines = [f"word{i} of {label} {i % 5},{label}" for i in range(16) for label in ("no", "yes")]
    path = place / "table.csv"
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def run(lfs, place, data) -> Path:
    """An adapter on a backbone of the hub; pushed to alice/recipe by its recipe."""
    (place / "recipe.yaml").write_text("push_to_hub: true\nhub_model_id: alice/recipe\n")
    keys = words(model_name_or_path="acme/tiny-bert", dataset_name=data, strategy="lora", output_dir=place / "run")
    code, out, err = lfs.run("train", "--config", place / "recipe.yaml", *keys)
    assert (code, err) == (0, ""), err
    assert "Pushed 7 files to" in out and "alice/recipe (private)" in out
    return place / "run"


@pytest.fixture(scope="module")
def whole(lfs, place, data, tiny_bert_folder) -> Path:
    keys = words(model_name_or_path=tiny_bert_folder, dataset_name=data, strategy="full", output_dir=place / "whole")
    assert lfs.run("train", *keys)[0] == 0
    return place / "whole"


# ---- push ----------------------------------------------------------------------------------------------------------


def test_the_recipe_pushed_exactly_the_run(hub, run):
    files = hub.files("alice/recipe")
    assert set(files) == ADAPTER_FILES and hub.repo("alice/recipe")["private"]
    assert (run / EXAMPLES).is_file(), "hashes of the examples stay in the run's folder"
    assert files["README.md"] == (run / "README.md").read_bytes()
    assert files["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()
    assert len(hub.commits("alice/recipe")) == 2  # the empty repository, and one commit of everything
    assert "push_to_hub: true" in (run / "run.yaml").read_text()


def test_push_and_push_again(hub, client, run):
    name = f"alice/again-{client.name}"
    code, out, err = client.run("push", run, "--hub_model_id", name)
    assert (code, err) == (0, "") and f"Pushed 7 files to {hub.endpoint}/{name} (private)" in out
    is_xet = "xet" in name
    assert any(("xet-write-token" if is_xet else "PUT /__lfs__/") in line for line in hub.log())
    files, commits = hub.files(name), hub.commits(name)
    assert set(files) == ADAPTER_FILES and (files["adapter_model.safetensors"] is None) == is_xet
    assert files["README.md"] == (run / "README.md").read_bytes()
    code, out, _ = client.run("push", run, "--hub_model_id", name)
    assert code == 0 and "Nothing to push" in out and "already contains this run" in out
    assert hub.commits(name) == commits and len(commits) == 2


def test_the_card_on_the_hub(hub, lfs, run):
    lfs.run("push", run, "--hub_model_id", "alice/card")
    text = hub.files("alice/card")["README.md"].decode()
    meta, results = ModelCard(text).data, json.loads((run / "results.json").read_text())
    assert (meta.base_model, meta.base_model_relation, meta.library_name) == ("acme/tiny-bert", "adapter", "peft")
    assert meta.pipeline_tag == "text-classification" and len(meta.widget) == 2 and "lora" in meta.tags
    assert {r.metric_name: r.metric_value for r in meta.eval_results} == results["metrics"]
    assert {r.dataset_split for r in meta.eval_results} == {"validation"}
    assert (meta.license, meta.language) == ("mit", "en")  # as the base model's own card tells
    assert 'model_id = "alice/card"' in text and "POST /api/validate-yaml" in hub.log()


def test_nothing_local_is_pushed(hub, lfs, run, place):
    lfs.run("push", run, "--hub_model_id", "alice/clean")
    for path, content in hub.files("alice/clean").items():
        assert str(place).encode() not in content and str(Path.home()).encode() + b"/" not in content, path
    config = json.loads(hub.files("alice/clean")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "acme/tiny-bert"
    tokenizer = json.loads(hub.files("alice/clean")["tokenizer_config.json"])
    assert not {"is_local", "local_files_only", "name_or_path"} & set(tokenizer)


def test_what_lies_beside_the_model_stays_here(hub, lfs, run, place):
    """A pickle, a checkpoint, notes and weights of an earlier run in the same folder."""
    for name in ("training_args.bin", "optimizer.pt", "notes.txt", "model.safetensors", "secrets.json"):
        (run / name).write_bytes(b"x")
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "config.json").write_text("{}")
    try:
        assert lfs.run("push", run, "--hub_model_id", "alice/only")[0] == 0
    finally:
        for name in ("training_args.bin", "optimizer.pt", "notes.txt", "model.safetensors", "secrets.json"):
            (run / name).unlink()
        (run / "checkpoint-3" / "config.json").unlink()
        (run / "checkpoint-3").rmdir()
    assert set(hub.files("alice/only")) == ADAPTER_FILES


def test_the_report_is_pushed_only_where_it_is_asked_for(hub, lfs, run):
    """And a later push without it leaves none that is older than the model."""
    page.write(run)
    own = ("push", run, "--hub_model_id", "alice/report")
    code, out, err = lfs.run(*own, "--with_report")
    assert (code, err) == (0, "") and "show examples of your data, and where they are: report.html, errors.csv" in out
    pushed = hub.files("alice/report")
    assert {"report.html", "errors.csv"} <= set(pushed) - ADAPTER_FILES <= set(SHOWING)
    assert pushed["report.html"] == (run / "report.html").read_bytes()
    assert lfs.run(*own)[0] == 0 and set(hub.files("alice/report")) == ADAPTER_FILES
    (run / "report.html").unlink()
    code, _, err = lfs.run(*own, "--with_report")
    assert code == 2 and "has no report.html" in err and "hf-transfer report" in err


def test_merged_to_a_branch_with_a_message(hub, client, run):
    """A plain model takes the place of the adapter, whose files would be loaded too."""
    name = f"alice/merged-{client.name}"
    assert client.run("push", run, "--hub_model_id", name)[0] == 0
    own = ("--revision", "plain", "--commit_message", "Merged, at last")
    code, _, err = client.run("push", run, "--hub_model_id", name, "--merged", *own)
    assert code == 0, err
    assert set(hub.files(name, "plain")) == WHOLE_FILES and set(hub.files(name)) == ADAPTER_FILES
    assert hub.commits(name, "plain")[0] == "Merged, at last"
    meta = ModelCard(hub.files(name, "plain")["README.md"].decode()).data
    assert (meta.library_name, meta.base_model_relation) == ("transformers", "finetune")
    assert client.run("push", run, "--hub_model_id", name, "--merged")[0] == 0
    assert set(hub.files(name)) == WHOLE_FILES
    answers = [
        json.loads(client.run("predict", where, "word1 of yes", fresh=where == name)[1])["scores"]
        for where in (run, name)
    ]
    assert answers[0] == pytest.approx(answers[1], abs=1e-5)


def test_public_and_private(hub, lfs, whole):
    code, out, _ = lfs.run("push", whole, "--hub_model_id", "open", "--public")  # the account's own name before it
    assert code == 0 and "public card shows" in out
    assert not hub.repo("alice/open")["private"] and set(hub.files("alice/open")) == WHOLE_FILES
    assert lfs.run("push", whole, "--hub_model_id", "alice/open", "--public")[0] == 0
    code, _, err = lfs.run("push", whole, "--hub_model_id", "alice/open", "--private")
    assert code == 2 and "already exists and is public" in err
    assert "(public)" in lfs.run("push", whole, "--hub_model_id", "alice/open")[1]
    assert lfs.run("push", whole, "--hub_model_id", "alice/open", "--public", "--private")[0] == 2


def test_an_interpolation_is_pushed_with_its_curve(hub, lfs, whole, place):
    """And what is pushed in its place afterwards has none."""
    with_pretrained(whole, place / "between", [0, 0.5, 1])
    code, out, err = lfs.run("push", place / "between", "--hub_model_id", "alice/between")
    assert (code, err) == (0, "") and f"Pushed {len(WHOLE_FILES) + 1} files" in out
    files = hub.files("alice/between")
    assert set(files) == WHOLE_FILES | {"interpolation.png"}
    assert files["interpolation.png"] == (place / "between" / "interpolation.png").read_bytes()
    text = files["README.md"].decode()
    assert "![Metrics by alpha](interpolation.png)" in text and 'model_id = "alice/between"' in text
    assert "weight-interpolation" in ModelCard(text).data.tags and str(place) not in text
    assert lfs.run("push", whole, "--hub_model_id", "alice/between")[0] == 0
    assert set(hub.files("alice/between")) == WHOLE_FILES


def test_what_its_owner_wrote_into_the_card_stays(hub, lfs, whole):
    card, before = whole / "README.md", (whole / "README.md").read_text()
    assert "model_id = " in before and "alice/edited" not in before
    try:
        card.write_text(before.replace("## Limitations\n", "## Limitations\n- Not for birds.\n"))
        assert lfs.run("push", whole, "--hub_model_id", "alice/edited")[0] == 0
        pushed = hub.files("alice/edited")["README.md"].decode()
        assert "- Not for birds." in pushed and 'model_id = "alice/edited"' in pushed
    finally:
        card.write_text(before)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("--hub_model_id", "a/b/c"), "is not a valid hub id"),
        (("--hub_model_id", "alice/x@v2"), "and --revision v2 for a branch"),
        (("--hub_model_id", "alice/x", "--hub_token", "hf_x"), "so that it ends up in no file"),
        (("--hub_model_idd", "alice/x"), "Did you mean --hub_model_id?"),
    ],
)
def test_wrong_words(keys, said, lfs, run):
    code, _, err = lfs.run("push", run, *keys)
    assert code == 2 and said in err


def test_a_folder_without_a_run_is_refused(lfs, tiny_bert_folder):
    code, _, err = lfs.run("push", tiny_bert_folder, "--hub_model_id", "alice/x")
    assert code == 2 and "does not contain a finished run: results.json, run.yaml is missing" in err


def test_files_that_do_not_answer_as_the_run_are_not_pushed(hub, lfs, run, place):
    """In Python the trained model is there to compare with; here its file is changed behind its back."""
    code = f"""
from hf_transfer import fine_tune, UserError
from safetensors.torch import load_file, save_file
result = fine_tune("acme/tiny-bert", {str(place / "table.csv")!r}, output_dir={str(place / "py")!r}, strategy="lora",
    num_train_epochs=1, save_strategy="no", train_val_split=0.25, log_level="error")
done = result.push_to_hub("alice/python", private=False)
path = {str(place / "py" / "adapter_model.safetensors")!r}
held = load_file(path)
save_file({{k: v + 1 if "classifier" in k else v for k, v in held.items()}}, path)
try:
    result.push_to_hub("alice/python")
    found = [done.is_changed, done.private, "pushed"]
except UserError as error:
    found = [done.is_changed, done.private, str(error)]
"""
    is_changed, private, said = lfs.python(code)
    assert is_changed and not private and "gives different logits than the trained one" in said
    assert len(hub.commits("alice/python")) == 2


# ---- backbones -----------------------------------------------------------------------------------------------------


def test_a_backbone_that_is_a_folder_is_refused(hub, lfs, place, data, tiny_bert_folder):
    keys = dict(model_name_or_path=tiny_bert_folder, dataset_name=data, strategy="lora", output_dir=place / "local")
    code, _, err = lfs.run("train", *words(**keys, push_to_hub=True, hub_model_id="alice/local"))
    assert code == 2 and "is a local folder" in err and not (place / "local" / "results.json").exists()
    assert lfs.run("train", *words(**keys, overwrite_output_dir=True))[0] == 0
    assert "base_model:" not in (place / "local" / "README.md").read_text()
    code, _, err = lfs.run("push", place / "local", "--hub_model_id", "alice/local")
    assert code == 2 and "--merged" in err and "base_model_name_or_path" in err
    assert not any("repos/create" in line for line in hub.log())
    assert lfs.run("push", place / "local", "--hub_model_id", "alice/local", "--merged")[0] == 0
    for path, content in hub.files("alice/local").items():
        assert tiny_bert_folder.encode() not in content, path
    config = place / "local" / "adapter_config.json"  # the other remedy: the backbone is on the hub too
    config.write_text(config.read_text().replace(tiny_bert_folder, "acme/tiny-bert"))
    assert lfs.run("push", place / "local", "--hub_model_id", "alice/mended")[0] == 0
    assert ModelCard(hub.files("alice/mended")["README.md"].decode()).data.base_model == "acme/tiny-bert"


def test_a_bundled_text_backbone_goes_under_its_hub_name(hub, lfs, place, data):
    name = "sentence-transformers/all-MiniLM-L6-v2"
    keys = dict(model_name_or_path="bundled:minilm-l6", dataset_name=data, adapter="lora", output_dir=place / "minilm")
    assert lfs.run("train", *words(**keys, max_steps=1))[0] == 0
    code, out, err = lfs.run("push", place / "minilm", "--hub_model_id", "alice/minilm")
    assert code == 0 and f"loading this adapter requires '{name}'" in out, err
    hub.seed(name, bundled_models.model_path("bundled:minilm-l6"))
    code, out, err = lfs.run("push", place / "minilm", "--hub_model_id", "alice/minilm")
    assert code == 0 and "loading this adapter requires" not in out, err
    config = json.loads(hub.files("alice/minilm")["adapter_config.json"])
    meta = ModelCard(hub.files("alice/minilm")["README.md"].decode()).data
    assert config["base_model_name_or_path"] == meta.base_model == name
    assert (meta.license, meta.base_model_relation) == ("apache-2.0", "adapter")
    local, pulled = (lfs.run("predict", where, "a text")[1] for where in (place / "minilm", "alice/minilm"))
    assert local == pulled and "score" in local


@pytest.mark.slow
def test_a_bundled_image_backbone_is_compared_with_the_hubs(hub, lfs, place):
    """Whose head has 1,000 classes. One with other weights is refused."""
    from transformers import AutoModelForImageClassification

    name = "timm/tf_efficientnet_lite0.in1k"
    folder = bundled_models.plain_folder("bundled:efficientnet-lite0")
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=1000, ignore_mismatched_sizes=True)
    model.save_pretrained(place / "lite0")
    hub.seed(name, place / "lite0")
    keys = dict(model_name_or_path="bundled:efficientnet-lite0", dataset_name="bundled:digits", adapter="lora")
    keys |= dict(max_train_samples=16, max_eval_samples=8, max_predict_samples=8, max_steps=1, image_size=64)
    assert lfs.run("train", *words(**keys, output_dir=place / "digits"))[0] == 0
    code, _, err = lfs.run("push", place / "digits", "--hub_model_id", "alice/digits")
    assert code == 0, err
    files = hub.files("alice/digits")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == name
    assert set(files) == ADAPTER_FILES - {"tokenizer.json", "tokenizer_config.json"}
    bundled.load_dataset("bundled:digits")["test"][0]["image"].convert("RGB").save(place / "photo.jpg")
    ((logits, labels),) = a_stranger(hub, place, "alice/digits")
    answer = json.loads(lfs.run("predict", place / "digits", place / "photo.jpg")[1])
    assert torch.tensor(logits).softmax(0).tolist() == pytest.approx(list(answer["scores"].values()), abs=1e-5)
    assert labels == list(answer["scores"])
    weights = load_file(place / "lite0" / "model.safetensors")
    save_file(
        {k: torch.randn_like(v) if v.ndim > 1 else v for k, v in weights.items()}, place / "lite0" / "model.safetensors"
    )
    hub.seed(name, place / "lite0")
    code, _, err = lfs.run("push", place / "digits", "--hub_model_id", "alice/digits-2", fresh=True)
    assert code == 1 and "gives different logits than the run" in err and "--merged" in err
    assert not (hub.root / "repos" / "alice" / "digits-2.json").exists()


# ---- pull ----------------------------------------------------------------------------------------------------------

STRANGER = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "hf_transfer":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import json
from huggingface_hub import hf_hub_download
for name in sys.argv[1:]:
    name, _, revision = name.partition("@")
    card = open(hf_hub_download(name, "README.md", revision=revision or None)).read()
    exec(card.split("```python\\n")[1].split("```")[0])
    print(json.dumps([logits.tolist(), [model.config.id2label[i] for i in range(len(logits))]]))
"""


TEXTS = ("word1 of yes", "word2 of no")


@pytest.fixture(scope="module")
def branched(lfs, run, whole) -> str:
    """A repository with a whole model on main and an adapter on a branch."""
    name = "alice/branched"
    assert lfs.run("push", whole, "--hub_model_id", name)[0] == 0
    code, out, err = lfs.run("push", run, "--hub_model_id", name, "--revision", "v2")
    assert code == 0 and f"hf-transfer predict {name}@v2 -" in out, err
    return name


def a_stranger(hub, place, *names):
    """[logits, labels] from each model's card's own code, in a process without this package and with an empty cache."""
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(place / f"stranger-{len(names)}"), "HF_TOKEN": TOKEN}
    own |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    argv = [sys.executable, "-c", STRANGER, *names]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, **own}, cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def test_a_stranger_gets_the_same_logits(hub, lfs, xet, run, whole, branched, place):
    """Through either way of uploading, of an adapter and of a whole model, and of an adapter on a branch."""
    lfs.run("push", run, "--hub_model_id", "alice/by-lfs")
    xet.run("push", run, "--hub_model_id", "alice/by-xet")
    xet.run("push", whole, "--hub_model_id", "alice/by-xet-whole")
    names = ["alice/by-lfs", "alice/by-xet", "alice/by-xet-whole", f"{branched}@v2"]
    answers = a_stranger(hub, place, *names)
    code = "from hf_transfer import Predictor\nfound = Predictor.load({!r}).logits([('some text',)])[0][0].tolist()"
    for (logits, labels), folder in zip(answers, (run, run, whole, run), strict=True):
        assert logits == pytest.approx(lfs.python(code.format(str(folder))), abs=1e-6) and labels == ["no", "yes"]


def test_predict_evaluate_and_bank_take_hub_ids(hub, client, run, place):
    name = f"alice/pull-{client.name}"
    assert client.run("push", run, "--hub_model_id", name)[0] == 0
    texts = ("word1 of yes", "word2 of no")
    code, pulled, err = client.run("predict", name, *texts, fresh=True)
    assert code == 0 and pulled == client.run("predict", run, *texts)[1], err
    new = place / "new.csv"  # the run knows what it was trained on, and the hub does not
    new.write_text(
        "text,label\n" + "\n".join(f"new{i} of {label},{label}" for i in range(16) for label in ("no", "yes"))
    )
    found = [
        json.loads(client.run("evaluate", where, "--test_file", new, "--json", fresh=where == name)[1])["metrics"]
        for where in (name, run)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6)  # in batches of another size
    bank = f"""
from hf_transfer import HeadBank
bank = HeadBank()
bank.add("one", {name!r}).add("two", {str(run)!r})
found = [bank.predict({list(texts)!r}, task=task) for task in bank.list()]
"""
    one, two = client.python(bank, fresh=True)
    assert one == two == [json.loads(line) for line in pulled.splitlines()]


def test_an_export_of_what_was_pulled_answers_as_the_run(hub, lfs, run, place):
    assert lfs.run("push", run, "--hub_model_id", "alice/exported")[0] == 0
    code, out, err = lfs.run("export", "alice/exported", place / "exported", "--format", "pt2", fresh=True)
    assert code == 0 and "no labels differ" in out and "made-up inputs" in out, err
    own, other = (
        [json.loads(line) for line in lfs.run("predict", where, "word1 of yes", "no", *more)[1].splitlines()]
        for where, more in ((run, ()), (place / "exported", ("--allow_pickle",)))
    )
    assert [a["label"] for a in own] == [a["label"] for a in other] and len(own) == 2
    assert [a["score"] for a in own] == pytest.approx([a["score"] for a in other], abs=1e-5)


def test_without_a_hub_what_was_pulled_still_works(hub, lfs, run):
    """The hub answers nothing but errors, and the cache has the files."""
    assert lfs.run("push", run, "--hub_model_id", "alice/cached")[0] == 0
    before = lfs.run("predict", "alice/cached", "a text", fresh=True)
    lfs.python("from huggingface_hub import constants\nconstants.HF_HUB_OFFLINE = True\nfound = 1")
    try:
        assert lfs.run("predict", "alice/cached", "a text") == before and before[0] == 0
    finally:
        lfs.python("constants.HF_HUB_OFFLINE = False\nfound = 1")


def test_a_revision_is_read_in_every_way(hub, lfs, branched, run, whole, place):
    main, branch = (lfs.run("predict", folder, *TEXTS)[1] for folder in (whole, run))
    assert lfs.run("predict", branched, *TEXTS, fresh=True) == (0, main, "")
    assert lfs.run("predict", f"{branched}@v2", *TEXTS) == (0, branch, "")
    assert lfs.run("predict", branched, *TEXTS, "--revision", "v2") == (0, branch, "")
    code = f"""
from hf_transfer import HeadBank, Predictor, merge
from hf_transfer.config.arguments.model import ModelArguments
from hf_transfer.models.source import read_config
name, texts = {branched!r}, {list(TEXTS)!r}
merge(name, {str(place / "merged")!r}, model_revision="v2")
found = [
    Predictor.load(name, model_revision="v2").predict(texts),
    HeadBank().add("a", name + "@v2").predict(texts, task="a"),
    Predictor.load({str(place / "merged")!r}).predict(texts),
    [read_config(ModelArguments(name, model_revision=r)).architectures for r in ("main", "v2")],
]
"""
    loaded, banked, merged, _ = lfs.python(code, fresh=True)
    assert loaded == banked == [json.loads(line) for line in branch.splitlines()]
    for one, other in zip(loaded, merged, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)


def test_a_card_on_main_does_not_name_the_branch_of_an_earlier_push(hub, lfs, branched, run):
    card = hub.files(branched, "v2")["README.md"].decode()
    assert f'model_id = snapshot_download("{branched}", revision="v2")' in card
    assert lfs.run("push", run, "--hub_model_id", "alice/on-main")[0] == 0
    text = hub.files("alice/on-main")["README.md"].decode()
    assert "snapshot_download" not in text and 'model_id = "alice/on-main"' in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{name}@v3"], "'alice/branched' on {hub} has no revision 'v3'"),
        (["{name}@v2", "--revision", "main2"], "revision: 'main2' contradicts 'alice/branched@v2'"),
        (["{run}", "--revision", "v2"], "is a local folder, and only models on a hub have revisions"),
        (["alice/plain-data"], "is neither a saved model nor an adapter: it has no config.json, and holds table.csv"),
    ],
)
def test_revisions_and_repositories_that_there_are_not(argv, said, hub, lfs, branched, run, data, place):
    if argv[0] == "alice/plain-data":
        (place / "plain-data").mkdir()
        shutil.copy(data, place / "plain-data")
        hub.seed("alice/plain-data", place / "plain-data")
    words = [word.format(name=branched, run=run) for word in argv]
    code, out, err = lfs.run("predict", words[0], "a text", *words[1:])
    assert (code, out) == (2, "") and said.format(hub=hub.endpoint) in err, err


@pytest.mark.parametrize("fault", ["refused", "HTTP 503"])
def test_a_cached_adapter_works_while_the_hub_is_down(fault, hub, lfs, branched, run):
    before = [lfs.run("predict", name, "a text", fresh=name == branched) for name in (branched, f"{branched}@v2")]
    assert [code for code, _, _ in before] == [0, 0]
    if fault == "refused":
        lfs.python("from huggingface_hub import constants\nconstants.ENDPOINT = 'http://127.0.0.1:9'\nfound = 1")
    else:
        hub.fail({"path": "/", "status": 503, "times": -1})
    try:
        assert [lfs.run("predict", name, "a text") for name in (branched, f"{branched}@v2")] == before
        code, _, err = lfs.run("predict", "acme/other", "a text")
        assert code == 1 and ("cannot be reached" if fault == "refused" else "refused the request") in err, err
    finally:
        lfs.python(f"constants.ENDPOINT = {hub.endpoint!r}\nfound = 1")


def test_a_cache_without_the_weights_is_not_blamed_on_the_name(hub, lfs, whole):
    assert lfs.run("push", whole, "--hub_model_id", "alice/partial")[0] == 0
    code = """
from huggingface_hub import constants, hf_hub_download
hf_hub_download("alice/partial", "config.json")
constants.ENDPOINT, found = "http://127.0.0.1:9", 1
"""
    lfs.python(code, fresh=True)
    try:
        code, _, err = lfs.run("predict", "alice/partial", "a text")
    finally:
        lfs.python(f"constants.ENDPOINT = {hub.endpoint!r}\nfound = 1")
    assert code == 1 and "the cache holds only some of its files" in err and "cannot be reached" in err, err


def test_an_invalid_token_is_named(lfs, branched):
    """Also for what is public or in the cache; and what the token has no access to is not blamed on it."""
    wrong = "hf_expiredTHISisNOTaREALtoken"
    try:
        code, _, err = lfs.run("predict", "acme/tiny-bert", "a text", env={"HF_TOKEN": wrong})
        assert code == 2 and "does not accept the token in HF_TOKEN (HTTP 401)" in err and wrong not in err, err
    finally:
        _, _, err = lfs.run("predict", "acme/nothing", "a text", env={"HF_TOKEN": TOKEN})
    assert "has no such model, or it is private" in err and "does not accept" not in err


def test_an_adapter_that_peft_saved_alone(hub, lfs, run, place):
    """Without config.json and tokenizer: the head's size is read from its file, and the backbone has the rest."""
    plain = place / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, plain)
    hub.seed("acme/plain", plain)
    wanted = [list(json.loads(line)["scores"].values()) for line in lfs.run("predict", run, *TEXTS)[1].splitlines()]
    for name in ("acme/plain", plain):
        code, out, err = lfs.run("predict", name, *TEXTS, fresh=name != plain)
        assert (code, err) == (0, "")
        answers = [json.loads(line)["scores"] for line in out.splitlines()]
        assert [list(a) for a in answers] == [["LABEL_0", "LABEL_1"]] * 2
        assert [list(a.values()) for a in answers] == wanted
    tensors = load_file(plain / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "classifier" not in k}, plain / "adapter_model.safetensors")
    hub.seed("acme/headless", plain)
    code, _, err = lfs.run("predict", "acme/headless", "a text")
    assert code == 2 and "'acme/headless'" in err and "classifier.weight" in err, err


WEIGHTS = "/resolve/.*adapter_model.safetensors"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"path": WEIGHTS, "method": "GET", "truncate": True, "times": -1}, "a file arrived incomplete"),
        ({"path": WEIGHTS, "method": "GET", "corrupt": True}, "do not match the hub's hash"),
        ({"path": WEIGHTS, "method": "GET", "drop": True, "times": -1}, "the connection was lost"),
        ({"path": WEIGHTS, "status": 500, "times": -1}, "server error (HTTP 500"),
        ({"path": "/api/models/alice/", "status": 500, "times": -1}, "refused the request for"),
        ({"path": WEIGHTS, "status": 403, "times": -1}, "the token lacks permission (HTTP 403"),
    ],
)
def test_downloads_that_fail(fault, said, hub, lfs, run):
    """Exit code 1 and the cause; the same command works when the fault is gone, with nothing of it in the cache."""
    lfs.run("push", run, "--hub_model_id", "alice/broken")
    hub.fail(fault)
    code, out, err = lfs.run("predict", "alice/broken", "a text", fresh=True)
    assert (code, out) == (1, "") and said in err and "Traceback" not in err, err
    assert "again" in err and hub.endpoint in err
    hub.fail()
    assert lfs.run("predict", "alice/broken", "a text")[1] == lfs.run("predict", run, "a text")[1]


# ---- faults --------------------------------------------------------------------------------------------------------

FOR_EVER = {"times": -1}
FAULTS = {
    "whoami-401": ({"path": "whoami", "status": 401, **FOR_EVER}, "the token is not accepted (HTTP 401"),
    "whoami-500": ({"path": "whoami", "status": 500, **FOR_EVER}, "server error (HTTP 500"),
    "create-403": ({"path": "repos/create", "status": 403, **FOR_EVER}, "the token lacks permission (HTTP 403"),
    "commit-404": (
        {"path": "/commit/", "status": 404, "code": "RepoNotFound", **FOR_EVER},
        "no such repository or revision, or it is private (HTTP 404",
    ),
    "preupload-500": ({"path": "preupload", "status": 500, **FOR_EVER}, "server error (HTTP 500"),
    "commit-500": ({"path": "/commit/", "status": 500, **FOR_EVER}, "server error (HTTP 500"),
    "commit-dropped": ({"path": "/commit/", "drop": True, **FOR_EVER}, "the connection was lost"),
    "commit-412": (
        {"path": "/commit/", "status": 412},
        "the repository was changed by someone else in the meantime (HTTP 412",
    ),
    "card-400": ({"path": "validate-yaml", "status": 400, **FOR_EVER}, "made for a test"),
}
OF_LFS = {
    "lfs-hash": (
        {"path": "/__lfs__/", "status": 400, "message": "sha256 mismatch"},
        "refused (HTTP 400: sha256 mismatch",
    ),
    "lfs-500": ({"path": "/__lfs__/", "status": 500, **FOR_EVER}, "server error (HTTP 500"),
    "lfs-dropped": ({"path": "/__lfs__/", "drop": True, **FOR_EVER}, "the connection was lost"),
}
OF_XET = {"xet-403": ({"path": "xet-write-token", "status": 403, **FOR_EVER}, "the token lacks permission (HTTP 403)")}


def fails(hub, client, run, name, fault, said):
    before = digests(run)
    hub.fail(fault)
    code, out, err = client.run("push", run, "--hub_model_id", f"alice/{name}")
    assert (code, out) == (1, "") and said in err and "Traceback" not in err, err
    assert f"Pushing 'alice/{name}' to {hub.endpoint} failed" in err and "Signature" not in err
    assert digests(run) == before
    command = re.search(r"Retry with `hf-transfer (push [^`]*)`", err)
    assert command, err
    assert client.run("predict", run, "a text")[0] == 0
    hub.fail()
    assert client.run(*command[1].split())[0] == 0
    assert set(hub.files(f"alice/{name}")) == ADAPTER_FILES and len(hub.commits(f"alice/{name}")) == 2


@pytest.mark.parametrize("name", [*FAULTS, *OF_LFS])
def test_a_push_that_fails(name, hub, lfs, run):
    fails(hub, lfs, run, f"fails-{name}", *{**FAULTS, **OF_LFS}[name])


@pytest.mark.parametrize("name", ["commit-500", "commit-412", *OF_XET])
def test_a_push_by_xet_that_fails(name, hub, xet, run):
    fails(hub, xet, run, f"fails-xet-{name}", *{**FAULTS, **OF_XET}[name])


STEPS = [
    "whoami",
    "/api/models/alice/.*",
    "repos/create",
    "validate-yaml",
    "preupload",
    "objects/batch",
    "/__lfs__/",
    "/commit/",
]


@pytest.mark.parametrize(
    "kind", [{"status": 500}, pytest.param({"drop": True}, marks=pytest.mark.slow)], ids=["500", "dropped"]
)
def test_a_fault_that_passes_is_not_seen(kind, hub, lfs, run):
    """Once, at every step in turn."""
    for i, step in enumerate(STEPS):
        name = f"alice/once-{kind.get('status', 'dropped')}-{i}"
        hub.fail({"path": step, **kind})
        code, out, err = lfs.run("push", run, "--hub_model_id", name)
        assert (code, err) == (0, "") and "Pushed 7 files" in out, (step, err)
        assert len(hub.commits(name)) == 2


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, client, run):
    name = f"alice/lost-{client.name}"
    hub.fail({"path": "/commit/", "lose": True})
    code, out, err = client.run("push", run, "--hub_model_id", name)
    assert code == 0 and "already contains this run" in out, err
    assert len(hub.commits(name)) == 2 and set(hub.files(name)) == ADAPTER_FILES


def test_a_hub_that_refuses_the_connection(hub, lfs, run):
    lfs.python("from huggingface_hub import constants\nconstants.ENDPOINT = 'http://127.0.0.1:9'\nfound = 1")
    try:
        code, out, err = lfs.run("push", run, "--hub_model_id", "alice/refused")
    finally:
        lfs.python(f"constants.ENDPOINT = {hub.endpoint!r}\nfound = 1")
    assert (
        (code, out) == (1, "")
        and "to http://127.0.0.1:9 failed: the hub cannot be reached" in err
        and "HF_ENDPOINT" in err
    )


def test_somebody_else_commits_meanwhile(hub, lfs, run):
    """A real stale parent: between the look at the branch and our commit, another commit comes."""
    assert lfs.run("push", run, "--hub_model_id", "alice/raced")[0] == 0
    code = f"""
from huggingface_hub import HfApi
from hf_transfer import UserError
from hf_transfer.hub.push import Target, push
own = HfApi.create_commit
def late(self, *args, **kwargs):
    HfApi.create_commit = own
    self.upload_file(path_or_fileobj=b"theirs", path_in_repo="notes.md", repo_id="alice/raced")
    self.upload_file(path_or_fileobj=b"{{}}", path_in_repo="tokenizer_config.json", repo_id="alice/raced")
    return own(self, *args, **kwargs)
HfApi.create_commit = late
try:
    push({str(run)!r}, Target("alice/raced"))
    found = "pushed"
except UserError as error:
    found = str(error)
"""
    said = lfs.python(code)
    assert "the repository was changed by someone else in the meantime (HTTP 412" in said and "Retry with" in said
    assert hub.files("alice/raced")["notes.md"] == b"theirs" and len(hub.commits("alice/raced")) == 4


# ---- accounts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_user(lfs):
    yield lambda token: lfs.python("found = 1", env={"HF_TOKEN": token})
    lfs.python("found = 1", env={"HF_TOKEN": TOKEN})


@pytest.mark.parametrize(
    ("token", "target", "said"),
    [
        ("", "alice/x", "no token is set"),
        ("hf_nobodyKnowsThisOne", "alice/x", "the token is not accepted (HTTP 401"),
        (READER, "alice/x", "is read-only (HTTP 403)"),
        (TOKEN, "bob/x", "has no write access to 'bob' (HTTP 403)"),
    ],
)
def test_accounts_are_checked_before_training(
    token, target, said, hub, lfs, as_user, run, place, data, tiny_bert_folder
):
    as_user(token)
    code, _, err = lfs.run("push", run, "--hub_model_id", target)
    assert code == 1 and said in err and "Retry with" in err
    keys = dict(model_name_or_path=tiny_bert_folder, dataset_name=data, strategy="full", output_dir=place / "never")
    code, out, err = lfs.run("train", *words(**keys, push_to_hub=True, hub_model_id=target))
    assert code == 1 and said in err and "step 1/" not in out and not (place / "never").exists()
    assert not any("repos/create" in line for line in hub.log())


def test_a_hub_that_is_down_costs_no_training(hub, lfs, place, data, tiny_bert_folder):
    hub.fail({"path": "/api/", "status": 503, **FOR_EVER})
    out_dir = place / "down"
    keys = dict(model_name_or_path=tiny_bert_folder, dataset_name=data, strategy="full", output_dir=out_dir)
    code, out, err = lfs.run("train", *words(**keys, push_to_hub=True, hub_model_id="alice/down"))
    assert code == 1 and "Result on validation" in out and "Warning:" in err and "server error (HTTP 503" in err
    assert {"results.json", "README.md", "model.safetensors"} <= {p.name for p in out_dir.iterdir()}
    hub.fail()
    command = re.search(r"Retry with `hf-transfer (push [^`]*)`", err)
    assert lfs.run(*command[1].split())[0] == 0 and set(hub.files("alice/down")) == WHOLE_FILES


def test_in_python_a_hub_that_is_down_is_a_warning(hub, lfs, place, data, tiny_bert_folder):
    hub.fail({"path": "/api/", "drop": True, **FOR_EVER})
    code = f"""
import warnings
from hf_transfer import fine_tune
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = fine_tune({tiny_bert_folder!r}, {data!r}, output_dir={str(place / "warned")!r}, strategy="full",
        num_train_epochs=1, save_strategy="no", train_val_split=0.25, log_level="error", push_to_hub=True,
        hub_model_id="alice/warned")
found = [str(result.push_error), [str(c.message) for c in caught if "failed" in str(c.message)], result.metrics]
"""
    error, warned, metrics = lfs.python(code)
    assert "the connection was lost" in error and len(warned) == 1 and "accuracy" in metrics


def test_a_hub_that_repeats_the_token_is_not_repeated(hub, lfs, run):
    hub.fail({"path": "/commit/", "status": 400, "message": "who is {auth}?", **FOR_EVER})
    code, _, err = lfs.run("push", run, "--hub_model_id", "alice/echo")
    assert code == 1 and "who is Bearer ***?" in err


def test_no_token_anywhere(hub, lfs, place):
    """In nothing that was stored, written or said by all of the above."""
    for said in lfs.said:
        assert TOKEN not in said and READER not in said
    paths = [p for p in place.rglob("*") if p.is_file()]
    assert len(paths) > 100 and any("objects" in p.parts for p in paths)
    for path in paths:
        content = path.read_bytes()
        assert TOKEN.encode() not in content and READER.encode() not in content, path


def test_documents_name_what_there_is():
    text = (ROOT / "docs" / "hub.md").read_text()
    for word in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "push_to_hub", "--merged", "--revision", "card_examples"):
        assert word in text, word
    assert "hub.md" in str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
