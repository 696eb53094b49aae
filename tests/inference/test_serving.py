"""`hf-transfer serve`: real requests to a real server in a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hf_transfer import HeadBank, Predictor, UserError, fine_tune
from hf_transfer.cli.program import main
from hf_transfer.config.arguments.serving import Limits, ListenArguments, ServeArguments
from hf_transfer.config.extras import EXTRAS, missing_of
from hf_transfer.inference.questions import Refused, of_form, of_json
from hf_transfer.inference.served import Served, task_names
from tests import warm
from tests.helpers import TOKENS, small_tokenizer, tiny_bert

needs_server = pytest.mark.skipif(bool(missing_of("serve")), reason='needs pip install "hf-transfer-toolkit[serve]"')
LIMITS = Limits(max_inputs=6, max_characters=50, max_request_mb=0.05, max_pixels=5_000, max_waiting=16)
PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
WORDS = ("the", "film", "is", "of", "a", "and", "it", "that")
TOLERANCE = 1e-4  # as everywhere: another padding changes the last bits of logits


def save(folder: Path, names: tuple[str, ...], seed: int) -> Predictor:
    """A random text model with these labels, far from chance."""
    model = tiny_bert(vocab_size=TOKENS, labels=len(names))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) if parameter.ndim > 1 else parameter)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.config.problem_type = "single_label_classification"
    model.save_pretrained(folder)
    small_tokenizer(16).save_pretrained(folder)
    return Predictor.load(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_vit_folder) -> Served:
    """Two tasks that read text, one that reads images."""
    folder = tmp_path_factory.mktemp("served")
    mood, topic = save(folder / "mood", ("bad", "good"), 1), save(folder / "topic", ("art", "law", "sport"), 2)
    return Served({"mood": mood, "topic": topic, "shape": Predictor.load(tiny_vit_folder)})


class Server:
    """A server in a fork."""

    def __init__(self, process: warm.Fork, port: int):
        self.process, self.port = process, port

    def ask(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> tuple[int, Any]:
        """(status, the answer)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            body = json.dumps(body) if body is not None and not isinstance(body, str | bytes) else body
            connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def predict(self, **asked: Any) -> tuple[int, Any]:
        return self.ask("POST", "/predict", asked)

    def upload(self, *parts: tuple[str, str | bytes]) -> tuple[int, Any]:
        body = b""
        for name, value in parts:
            file = f'; filename="{len(value)}.png"' if isinstance(value, bytes) else ""
            content = value if isinstance(value, bytes) else value.encode()
            body += (
                f'--edge\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"
            )
        return self.ask("POST", "/predict", body + b"--edge--\r\n", "multipart/form-data; boundary=edge")


@pytest.fixture(scope="module")
def server(served) -> Iterator[Server]:
    from hf_transfer.inference.http_app import make_app, serve

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        process = warm.Fork(lambda: serve(make_app(served, LIMITS, 0.01), listening))
        port = listening.getsockname()[1]
    yield Server(process, port)
    process.send(signal.SIGKILL)
    process.wait()


def png(width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    file = BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(file, "png")
    return file.getvalue()


# ---- answers ---------------------------------------------------------------------------------------------------------


@needs_server
def test_a_request_alone_is_answered_as_predict_does(server, served):
    """To the last digit."""
    texts = ["a film of the", "it", "that is the film and it is of a"]
    for name in ("mood", "topic"):
        assert server.predict(inputs=texts, task=name) == (200, {"answers": served[name].predict(texts)})
    assert server.predict(inputs=texts[0], task="topic", top_k=2) == (
        200,
        {"answers": served["topic"].predict(texts[:1], top_k=2)},
    )
    both = [served["mood"].predict(texts), served["topic"].predict(texts)]
    expected = [{"mood": one, "topic": other} for one, other in zip(*both, strict=True)]
    assert server.predict(inputs=texts, task=["mood", "topic"]) == (200, {"answers": expected})


@needs_server
def test_uploads_are_answered_as_predict_does(server, served):
    images = [png(seed=1), png(20, 50, seed=2)]
    status, answer = server.upload(("task", "shape"), *(("inputs", image) for image in images))
    expected = served["shape"].predict([Image.open(BytesIO(image)) for image in images])
    assert status == 200
    assert [{**a, "input": None} for a in answer["answers"]] == [{**e, "input": None} for e in expected]
    assert [a["input"] for a in answer["answers"]] == [f"{len(image)}.png" for image in images]
    status, answer = server.upload(("inputs", images[0]), ("top_k", "1"), ("task", "shape"))
    assert status == 200 and len(answer["answers"][0]["scores"]) == 1


@needs_server
def test_the_tasks_and_health(server, served):
    status, said = server.ask("GET", "/tasks")
    assert status == 200 and list(said["tasks"]) == ["mood", "topic", "shape"]
    assert said["tasks"]["topic"] == {
        "type": "text-classification",
        "columns": [],
        "problem_type": "single_label_classification",
        "labels": ["art", "law", "sport"],
    }
    assert said["tasks"]["shape"]["type"] == "image-classification"
    status, said = server.ask("GET", "/health")
    assert status == 200 and (said["status"], said["tasks"], said["open"]) == ("ok", 3, 0)
    status, said = server.ask("GET", "/openapi.json")
    assert status == 200 and set(said["paths"]) == {"/predict", "/tasks", "/health"}


@needs_server
def test_the_requests_in_the_documents_are_answered(server):
    """As written; uploads are images of ours, for the task that reads them."""
    asked = [shlex.split(line)[1:] for line in PAGE.read_text().splitlines() if line.startswith("curl ")]
    assert len(asked) == 3
    for address, *words in asked:
        method, path = "POST", address.removeprefix("localhost:8000")
        if words[0] == "--json":
            status, said = server.ask(method, path, words[1])
        else:
            names = [word.partition("=@")[0] for word in words if word != "-F"]
            status, said = server.upload(("task", "shape"), *((name, png()) for name in names))
        assert status == 200 and said["answers"], said


def test_the_documents_name_every_limit_with_its_default():
    text = PAGE.read_text()
    for name, default in vars(Limits()).items():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `--{name}`"))
        assert float(row.split("|")[2].replace(",", "")) == default
    assert all(f"`--{name}" in text for cls in (ServeArguments, ListenArguments) for name in cls.__dataclass_fields__)


def ragged(draw: random.Random) -> list[str]:
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(draw.randint(1, 4))]


def load(server: Server, served: Served, clients: int, requests: int) -> int:
    """Clients that ask at once, each for one task after the other. Returns the number of answers, all of them right."""

    def client(number: int) -> int:
        draw, count = random.Random(number), 0
        for i in range(requests):
            name, texts = ("mood", "topic")[(number + i) % 2], ragged(draw)
            status, said = server.predict(inputs=texts, task=name)
            assert status == 200, said
            for text, answer in zip(texts, said["answers"], strict=True):
                expected = alone[name][text]
                assert answer["input"] == text and answer["label"] == expected["label"]
                assert answer["scores"] == pytest.approx(expected["scores"], abs=TOLERANCE)
                count += 1
        return count

    drawn = (random.Random(number) for number in range(clients))
    every = sorted({text for draw in drawn for _ in range(requests) for text in ragged(draw)})
    alone = {name: dict(zip(every, served[name].predict(every), strict=True)) for name in ("mood", "topic")}
    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(client, range(clients)))


@needs_server
def test_eight_clients_at_once_get_their_answers(server, served):
    """None wrong, none dropped."""
    assert load(server, served, clients=8, requests=12) > 8 * 12
    assert server.ask("GET", "/health")[1]["open"] == 0


# ---- refused ---------------------------------------------------------------------------------------------------------

WRONG: list[tuple[Any, int, str]] = [
    ('{"inputs": ["a"', 400, "The body is not JSON"),
    ('{"inputs": "a", "inputs": "b", "task": "mood"}', 400, "'inputs' was given twice"),
    ("[" * 100_000, 400, "The body is not JSON"),
    (["a"], 422, "not a JSON object"),
    ({"input": ["a"], "task": "mood"}, 422, "Unknown key 'input'"),
    ({"task": "mood"}, 422, "inputs is missing"),
    ({"inputs": []}, 422, "task is missing"),
    ({"inputs": ["a"], "task": "mode"}, 422, "there is no task 'mode'"),
    ({"inputs": ["a"], "task": ["mood", "mood"]}, 422, "'mood' was given twice"),
    ({"inputs": ["a"], "task": 3}, 422, "task: it is not the name"),
    ({"inputs": [], "task": "mood"}, 422, "the list is empty"),
    ({"inputs": ["a", 3], "task": "mood"}, 422, "inputs[1]: it is not a text"),
    ({"inputs": [["a", "b", "c"]], "task": "mood"}, 422, "inputs[0]: it is not a text"),
    ({"inputs": [{"a": "b", "c": "d"}], "task": "mood"}, 422, "does not know its columns"),
    ({"inputs": ["a"], "task": "mood", "top_k": 0}, 422, "top_k: '0' is not a positive whole number"),
    ({"inputs": ["a"], "task": "mood", "top_k": True}, 422, "top_k: 'True'"),
    ({"inputs": ["a"] * 7, "task": "mood"}, 413, "7 inputs exceed the limit of 6 per request"),
    ({"inputs": ["a"] * 4, "task": ["mood", "topic"]}, 413, "4 inputs for 2 tasks exceed the limit of 6"),
    ({"inputs": ["a" * 51], "task": "mood"}, 413, "51 characters exceed the limit of 50 per text"),
    ({"inputs": ["a"], "task": "shape"}, 415, "task 'shape' reads images"),
]


@pytest.mark.parametrize(("body", "status", "error"), WRONG)
def test_a_wrong_question_is_refused(body, status, error, served):
    with pytest.raises(Refused) as refused:
        of_json(body.encode() if isinstance(body, str) else json.dumps(body).encode(), served, LIMITS)
    assert refused.value.status == status and error in refused.value.error


def test_a_wrong_form_is_refused(served):
    shape = [("task", "shape")]
    wrong: list[tuple[list[tuple[str, bytes]], list[tuple[str, str]], int, str]] = [
        ([], shape, 422, "inputs is missing"),
        ([("a.png", png())], [], 422, "task is missing"),
        ([("a.png", png())], [("task", "mood")], 415, "task 'mood' reads text, not files"),
        ([("a.png", png())], [*shape, ("topk", "1")], 422, "Unknown key 'topk'"),
        ([("a.png", png())], [*shape, ("inputs", "text")], 422, "a field of the form is no upload"),
        ([("a.png", png())], [*shape, ("top_k", "-1")], 422, "top_k: '-1' is not a positive"),
        ([("a.png", png())], [*shape, ("top_k", "1"), ("top_k", "2")], 422, "top_k was given twice"),
        ([("a.png", png())] * 7, shape, 413, "7 inputs exceed the limit"),
        ([("a.png", png(100, 51))], shape, 413, "inputs[0] (a.png): 100 × 51 pixels exceed the limit of 5,000"),
        ([("a.png", png()), ("b.png", b"")], shape, 415, "inputs[1] (b.png): the file is empty"),
        ([("a.txt", b"text")], shape, 415, "it is not an image of a supported format"),
        ([("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")], shape, 415, "not an image of a supported"),
    ]
    for files, fields, status, error in wrong:
        with pytest.raises(Refused) as refused:
            of_form(files, fields, served, LIMITS)
        assert refused.value.status == status and error in refused.value.error, (error, refused.value.error)


@needs_server
def test_refusals_are_json_and_say_what_to_do(server):
    text = "application/json"
    for answer, status, error, fix in [
        (server.predict(inputs=["a", "  "], task="mood"), 422, "inputs[1]: empty text.", "None of the inputs"),
        (server.predict(inputs=["\ud800"], task="mood"), 422, "inputs[0]: not valid Unicode.", "None"),
        (server.predict(inputs=["a"], task="mode"), 422, "task: there is no task 'mode'.", "Did you mean 'mood'?"),
        (server.ask("POST", "/predict", "a=1", "application/x-www-form-urlencoded"), 415, "content type", text),
        (server.ask("GET", "/predict"), 405, "GET /predict: method not allowed.", "POST /predict"),
        (server.ask("GET", "/docs"), 404, "GET /docs: not found.", "GET /tasks"),
        (server.upload(("task", "shape"), ("photos", png())), 422, "photos: it is an upload.", "named inputs"),
        (server.upload(("task", "shape"), ("inputs", png()[:200])), 422, "cannot be read as an image", "None"),
        (server.upload(("task", "shape"), *[("inputs", b"")] * 7), 413, "Too many files", ""),
        (server.ask("POST", "/predict", b"x", "multipart/form-data"), 400, "The form cannot be read", ""),
    ]:
        said = answer[1]
        assert answer[0] == status and error in said["error"] and fix in said["fix"], (error, answer)


@needs_server
def test_a_body_beyond_the_limit_is_refused_also_without_a_length(server):
    long = json.dumps({"inputs": ["a" * 90_000], "task": "mood"})
    status, said = server.ask("POST", "/predict", long)
    assert status == 413 and said["error"] == "The request exceeds the limit of 0.05 MB."
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    parts = (b"a" * 10_000 for _ in range(9))
    connection.request("POST", "/predict", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


@needs_server
def test_beyond_so_many_open_requests_others_are_told_to_come_again(server):
    """Requests whose bodies are not there yet are open; when their clients go, they are not."""
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    waiting = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(LIMITS.max_waiting)]
    try:
        for one in waiting:
            one.sendall(head)
        until(server, LIMITS.max_waiting)
        status, said = server.predict(inputs=["a"], task="mood")
        assert (status, said["error"]) == (503, "16 requests are waiting.")
    finally:
        for one in waiting:
            one.close()
    until(server, 0)
    assert server.predict(inputs=["a"], task="mood")[0] == 200


def until(server: Server, count: int) -> None:
    """Wait for so many open requests."""
    for _ in range(500):
        if server.ask("GET", "/health")[1]["open"] == count:
            return
        time.sleep(0.02)
    raise AssertionError(server.ask("GET", "/health"))


def test_a_text_that_names_a_file_is_a_text(served, tmp_path):
    (tmp_path / "a.txt").write_text("line\n" * 3)
    ((shown, raw),) = of_json(
        json.dumps({"inputs": str(tmp_path / "a.txt"), "task": "mood"}).encode(), served, Limits()
    ).inputs["mood"]
    assert [shown] == raw == [str(tmp_path / "a.txt")]


# ---- the command -----------------------------------------------------------------------------------------------------


def started(process: Any, said: Callable[[], str], beginning: str) -> Server:
    """A server that was started as a command, as soon as it says where it is, after a beginning."""
    for _ in range(6000):
        if (line := said()) or process.poll() is not None:
            break
        time.sleep(0.02)
    found = re.fullmatch(rf"{beginning} http://127\.0\.0\.1:(\d+)[.:] .*\n", line)
    assert found, line
    return Server(process, int(found[1]))


@needs_server
def test_the_command_serves_until_it_is_interrupted(served):
    process = warm.start("serve", served["mood"].folder, "--port", 0)
    try:
        server = started(process, lambda: os.pread(process.said[0].fileno(), 10_000, 0).decode(), "Serving mood at")
        assert server.predict(inputs=["a film"]) == (200, {"answers": served["mood"].predict(["a film"])})
        assert main(["serve", str(served["mood"].folder), "--port", str(server.port)]) == 2
    finally:
        process.send(signal.SIGINT)
        done = process.wait()
    assert done.returncode == 130 and done.stderr == "hf-transfer: interrupted.\n"


@needs_server
@pytest.mark.slow
def test_eight_clients_of_a_bank_on_real_weights(tmp_path):
    """A new process that serves two tasks on MiniLM: none wrong, none dropped, and SIGTERM answers what has begun."""
    bank = HeadBank()
    for name, labels in (("mood", ("bad", "good")), ("topic", ("art", "law", "sport"))):
        rows = [f"{WORDS[i % 8]} {labels[i % len(labels)]} {WORDS[i % 5]},{labels[i % len(labels)]}" for i in range(60)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
        keys = dict(adapter="lora", strategy="full", learning_rate=1e-3, num_train_epochs=2, log_level="error")
        fine_tune("bundled:minilm-l6", str(tmp_path / f"{name}.csv"), output_dir=str(tmp_path / name), **keys)
        bank.add(name, tmp_path / name)
    bank.save(tmp_path / "bank")
    command = [sys.executable, "-m", "hf_transfer", "serve", str(tmp_path / "bank"), "--port", "0"]
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file) as process:
        server = started(process, log.read_text, r"Serving 2 tasks \(mood, topic\) at")
        assert load(server, Served(bank.predictors), clients=8, requests=40) > 8 * 40
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(server.predict, inputs=[f"{' '.join(WORDS)} {i}" for i in range(200)], task="mood")
            until(server, 1)
            process.terminate()
            status, said = last.result()
        assert status == 200 and len(said["answers"]) == 200
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "A RUN is needed"),
        (["./nowhere"], "RUN: './nowhere' does not exist"),
        (["x", "--port", "70000"], "port: expected a number at least 0 and at most 65535, got 70000"),
        (["x", "--max_pixels", "0"], "max_pixels: expected a positive number, got 0"),
        (["x", "--coverage", "0.8"], "coverage: it has no effect without --abstain"),
    ],
)
def test_wrong_words_are_told_at_once(words, said, capsys):
    assert main(["serve", *words]) == 2
    assert said in capsys.readouterr().err


@needs_server
def test_a_port_in_use_or_a_foreign_address_is_told_before_anything_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "no/run", "--port", port]) == 2
    assert f"port: {port} is in use on 127.0.0.1.\nStop what uses it" in capsys.readouterr().err
    assert main(["serve", "no/run", "--host", "192.0.2.1"]) == 2
    assert "host: '192.0.2.1' is not an address of this machine" in capsys.readouterr().err


def test_without_its_packages_serve_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(EXTRAS, "serve", ("no_such_module",))
    assert main(["serve", "no/run"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "hf-transfer: serve needs no_such_module, which is not installed.\n"
        'Install with `pip install "hf-transfer-toolkit[serve]"`.\n'
    )


def test_tasks_have_the_names_of_their_runs(tmp_path):
    for name in ("a/out", "b/out"):
        (tmp_path / name).mkdir(parents=True)
    assert task_names([str(tmp_path / "a" / "out" / "."), "me/topic@v2", "topics"]) == ["out", "topic", "topics"]
    with pytest.raises(UserError, match="would both be the task 'out'"):
        task_names([str(tmp_path / "a" / "out"), str(tmp_path / "b" / "out")])
