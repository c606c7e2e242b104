"""The Hub: what is pushed is what is loaded, by whom it may be, at the revision that was named, and offline.

The client runs in processes of its own, because huggingface_hub reads its settings once, against `loopback_hub`.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file

TOKENS = {"hf_me": "me", "hf_other": "other"}
COMMAND_LINE = "import sys, regard_cli; sys.exit(regard_cli.main(sys.argv[1:]))"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(TOKENS) as hub:
        yield hub


class Client:
    """Runs Python, or the command line, as a user of the Hub with a cache of their own."""

    def __init__(self, hub: LoopbackHub, home: Path, token: str | None = "hf_me"):
        self.hub, self.home, self.token = hub, home, token

    def python(self, script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=280,
            env=self.hub.environment(self.home, self.token, **environment),
        )

    def regard(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.python(COMMAND_LINE, *arguments, **environment)


@pytest.fixture
def client(hub: LoopbackHub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


def files_of(hub: LoopbackHub, repo: str, revision: str = "main") -> dict[str, bytes]:
    return {path: file.content for path, file in hub.repositories[repo].find(revision)[1].items()}


# Pushes with the classes' own `push_to_hub`, changes the reader, pushes again, and loads everything.
PUSH_AND_LOAD = """
import json, sys
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor, pipeline
import regard

read, classify, vqa, image, output = sys.argv[1:]
classes = {
    "me/read": (read, AutoModel, AutoProcessor),
    "me/classify": (classify, AutoModelForImageClassification, AutoImageProcessor),
    "me/vqa": (vqa, AutoModelForVisualQuestionAnswering, AutoProcessor),
}
for repo, (folder, auto_model, auto_processor) in classes.items():
    model, processor = auto_model.from_pretrained(folder), auto_processor.from_pretrained(folder)
    old = model.push_to_hub(repo)
    processor.push_to_hub(repo)
    loaded = auto_model.from_pretrained(repo)
    assert type(loaded) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    again = auto_processor.from_pretrained(repo)
    assert type(again) is type(processor) and again.to_dict() == processor.to_dict()
    if repo == "me/read":
        pinned, weights = old.oid, model.state_dict()

model = AutoModel.from_pretrained("me/read")
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1)
model.push_to_hub("me/read", commit_message="Other weights")
for revision, offset in ((pinned, 0), ("main", 1)):
    for name, parameter in AutoModel.from_pretrained("me/read", revision=revision).named_parameters():
        assert torch.equal(parameter, weights[name] + offset), (revision, name)

reader = pipeline("text-recognition", model="me/read", revision=AutoConfig.from_pretrained("me/read")._commit_hash)
results = {"pinned": pinned, "text": reader(image), "head": pipeline("text-recognition", model="me/read")(image)}
json.dump(results, open(output, "w"))
"""
OFFLINE = """
import json, sys
from transformers import AutoModelForImageClassification, AutoModelForVisualQuestionAnswering, AutoProcessor, pipeline
import regard
image, pinned = sys.argv[1:]
AutoModelForImageClassification.from_pretrained("me/classify")
AutoModelForVisualQuestionAnswering.from_pretrained("me/vqa")
AutoProcessor.from_pretrained("me/vqa")
print(json.dumps(pipeline("text-recognition", model="me/read")(image)))
"""


def test_push_load_pin_and_offline(
    hub, client, tiny_checkpoint, tiny_classifier, tiny_vqa, tmp_path, make_image, monkeypatch
):
    image, output = make_image(tmp_path / "image.png"), tmp_path / "results.json"
    done = client.python(PUSH_AND_LOAD, tiny_checkpoint, tiny_classifier, tiny_vqa, image, output)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["text"] == results["head"]

    # The large files went through LFS, and what is stored is what was read here.
    for repo, checkpoint in (("me/classify", tiny_classifier), ("me/vqa", tiny_vqa)):
        weights = (checkpoint / "model.safetensors").read_bytes()
        assert hub.repositories[repo].objects == {hashlib.sha256(weights).hexdigest(): weights}
        assert files_of(hub, repo)["model.safetensors"] == weights
    assert ("POST", "/me/read.git/info/lfs/objects/batch") in hub.requests
    old = load_file(tiny_checkpoint / "model.safetensors")
    (tmp_path / "pinned.safetensors").write_bytes(files_of(hub, "me/read", results["pinned"])["model.safetensors"])
    assert all(torch.equal(value, old[name]) for name, value in load_file(tmp_path / "pinned.safetensors").items())

    hub.stop()
    done = client.python(OFFLINE, image, results["pinned"], HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == results["head"]
    read = client.regard("read", "--model", "me/read", image, HF_HUB_OFFLINE="1")
    assert read.returncode == 0, read.stderr
    assert read.stdout == results["head"]["text"] + "\n"


def test_the_command_line_pushes_describes_and_exports(hub, client, tiny_checkpoint, tmp_path):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "run")
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A reader\n")
    (checkpoint / "evaluation.json").write_text(json.dumps({"results": {"line": {"cer": 0.25, "images": 1000}}}))
    (checkpoint / "optimizer.pt").touch()
    done = client.regard("push", checkpoint, "me/reader", "--private", "--with-code", "--message", "First")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/reader"]
    assert done.stdout == f"{hub.endpoint}/me/reader/commit/{repository.branches['main']}\n"
    assert repository.private
    pushed = files_of(hub, "me/reader")
    assert {"modeling_image_text_slot.py", "README.md", "evaluation.json", "tokenizer.json"} <= pushed.keys()
    assert "optimizer.pt" not in pushed
    assert pushed["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()

    done = client.regard("info", "me/reader")
    assert done.returncode == 0, done.stderr
    assert "image_text_slot (ImageTextSlotModel)" in done.stdout
    assert "85,386" in done.stdout
    assert "line: cer 0.25, images 1,000" in done.stdout
    assert ("GET", "/me/reader/resolve/main/model.safetensors") not in hub.requests
    assert not any(method == "GET" and path.endswith("model.safetensors") for method, path in hub.requests)

    done = client.regard("export", "me/reader", tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    copy = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert copy == {path: content for path, content in pushed.items() if path != ".gitattributes"}

    # Another branch leaves main alone.
    main = repository.branches["main"]
    done = client.regard("push", checkpoint, "me/reader", "--revision", "candidate")
    assert done.returncode == 0, done.stderr
    assert repository.branches["main"] == main
    assert "auto_map" not in json.loads(files_of(hub, "me/reader", "candidate")["config.json"])


# Several commands in one process, without the waiting between repeated requests: each line is one command.
COMMANDS = """
import contextlib, io, json, sys, time
import huggingface_hub.utils._http
import regard_cli
huggingface_hub.utils._http.time.sleep = lambda seconds: None
for line in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = regard_cli.main(json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def run_each(client: Client, *commands: list[object], **environment: str) -> list[tuple[int, str, str]]:
    lines = [json.dumps([str(argument) for argument in command]) for command in commands]
    done = client.python(COMMANDS, *lines, **environment)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_without_the_right_token_nothing_is_pushed_or_read(hub, client, tiny_classifier, tmp_path):
    (code, _, _), (public, _, _), private = run_each(
        client,
        ["push", tiny_classifier, "me/private", "--private"],
        ["push", tiny_classifier, "me/public"],
        ["push", tiny_classifier, "me/public", "--private"],
    )
    assert (code, public, private[0]) == (0, 0, 2)
    assert "regard: me/public: is public; make it private in its settings" in private[2]
    before = {repo: dict(repository.branches) for repo, repository in hub.repositories.items()}

    nobody = Client(hub, tmp_path / "nobody", token=None)
    read, pushed, public = run_each(
        nobody, ["info", "me/private"], ["push", tiny_classifier, "me/new"], ["info", "me/public"]
    )
    assert read[0] == pushed[0] == 2
    assert read[2].startswith("regard: me/private: no such Hub repository, or a private one")
    assert "hf auth login" in read[2]
    assert pushed[2].startswith("regard: me/new: no token to write with; run `hf auth login`")
    assert public[0] == 0

    other = Client(hub, tmp_path / "other", token="hf_other")
    read, pushed, created = run_each(
        other,
        ["export", "me/private", tmp_path / "copy"],
        ["push", tiny_classifier, "me/public"],
        ["push", tiny_classifier, "me/new"],
    )
    assert read[0] == pushed[0] == created[0] == 2
    assert "no such Hub repository, or a private one" in read[2]
    for result in (pushed, created):
        assert "refused" in result[2]
        assert "use a token of its owner's" in result[2]

    wrong = Client(hub, tmp_path / "wrong", token="hf_wrong")
    ((code, _, error),) = run_each(wrong, ["push", tiny_classifier, "me/public"])
    assert code == 2
    assert "Invalid credentials" in error
    assert {repo: repository.branches for repo, repository in hub.repositories.items()} == before


def test_an_upload_that_is_cut_leaves_the_repository_as_it_was(hub, client, tiny_classifier, tmp_path):
    changed = shutil.copytree(tiny_classifier, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, changed / "model.safetensors", {"format": "pt"})
    ((code, _, _),) = run_each(client, ["push", tiny_classifier, "me/cut"])
    assert code == 0
    before, objects = dict(hub.repositories["me/cut"].branches), dict(hub.repositories["me/cut"].objects)

    hub.cut_uploads_after = 50_000
    ((code, _, error),) = run_each(client, ["push", changed, "me/cut"])
    assert code == 2
    assert error.startswith("regard: me/cut: not pushed (")
    assert error.endswith("check the network and repeat the command\n")
    assert hub.repositories["me/cut"].branches == before
    assert hub.repositories["me/cut"].objects == objects
    assert files_of(hub, "me/cut")["model.safetensors"] == (tiny_classifier / "model.safetensors").read_bytes()

    hub.cut_uploads_after = None
    ((code, _, _),) = run_each(client, ["push", changed, "me/cut"])
    assert code == 0
    assert files_of(hub, "me/cut")["model.safetensors"] == (changed / "model.safetensors").read_bytes()


def test_without_a_network(hub, client, tiny_classifier):
    hub.stop()
    pushed, info = run_each(client, ["push", tiny_classifier, "me/new"], ["info", "me/new"])
    offline, cached = run_each(
        client, ["push", tiny_classifier, "me/new"], ["info", "me/new"], HF_HUB_OFFLINE="1"
    )
    assert pushed[0] == info[0] == offline[0] == cached[0] == 2
    assert "check the network and repeat" in pushed[2]
    assert "me/new: cannot be loaded" in info[2]
    assert "HF_HUB_OFFLINE is set" in offline[2]
    assert "me/new: cannot be loaded" in cached[2]
    for result in (pushed, info, offline, cached):
        assert "Traceback" not in result[2]
