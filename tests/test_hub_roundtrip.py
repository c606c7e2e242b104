"""The Hub: what is pushed is what is loaded, by whom it may be, at the revision that was named, and offline.

The client runs in processes of its own, because huggingface_hub reads its settings once, against `loopback_hub`.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file
from stranger import WITHOUT_REGARD, approximately
from transformers import pipeline

from regard.trainers.checkpoints import fault

TOKENS = {"hf_me": "me", "hf_other": "other"}
NOWHERE = "http://127.0.0.1:9"

# Does what it is told, line by line: the imports are done once.
WORKER = """
import contextlib, io, json, os, sys, time, traceback
import huggingface_hub.utils._http, regard, regard_cli
huggingface_hub.utils._http.time.sleep = lambda seconds: None  # before a request is repeated
answers = sys.stdout
for line in sys.stdin:
    script, arguments, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            if script is None:
                code = regard_cli.main(arguments)
            else:
                code = exec(script, {"arguments": arguments}) or 0
        except BaseException:
            traceback.print_exc()
            code = 70
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=answers, flush=True)
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Client:
    """A process with a client of the Hub, and a cache of its own. A context manager."""

    def __init__(self, environment: dict[str, str]):
        command = [sys.executable, "-c", WORKER]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error):
        with self._process:
            self._process.stdin.close()

    def _run(self, script: str | None, arguments: tuple[object, ...], token: str | None) -> Result:
        print(
            json.dumps([script, [str(argument) for argument in arguments], token]), file=self._process.stdin, flush=True
        )
        return Result(*json.loads(self._process.stdout.readline()))

    def python(self, script: str, *arguments: object, token: str | None = "hf_me") -> str:
        """What a script prints, which sees its `arguments`."""
        result = self._run(script, arguments, token)
        assert result.code == 0, result.err
        return result.out

    def regard(self, *arguments: object, token: str | None = "hf_me") -> Result:
        """The command line."""
        return self._run(None, arguments, token)


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(TOKENS) as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub-home")


@pytest.fixture(scope="module")
def client(hub: LoopbackHub, home: Path) -> Iterator[Client]:
    with Client(hub.environment(home)) as client:
        yield client


def files_of(hub: LoopbackHub, repo: str, revision: str = "main") -> dict[str, bytes]:
    return {path: file.content for path, file in hub.repositories[repo].find(revision)[1].items()}


# Pushes with the classes' own `push_to_hub`, changes the reader, pushes again, and loads everything.
PUSH_AND_LOAD = """
import json
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor, pipeline
import regard

read, classify, vqa, count, image = arguments
classes = {
    "me/read": (read, AutoModel, AutoProcessor),
    "me/classify": (classify, AutoModelForImageClassification, AutoImageProcessor),
    "me/vqa": (vqa, AutoModelForVisualQuestionAnswering, AutoProcessor),
    "me/count": (count, AutoModel, AutoProcessor),
}
for repo, (folder, auto_model, auto_processor) in classes.items():
    model, processor = auto_model.from_pretrained(folder), auto_processor.from_pretrained(folder)
    model.push_to_hub(repo)
    commit = processor.push_to_hub(repo)
    loaded = auto_model.from_pretrained(repo)
    assert type(loaded) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    again = auto_processor.from_pretrained(repo)
    assert type(again) is type(processor) and again.to_dict() == processor.to_dict()
    if repo == "me/read":
        pinned, weights = commit.oid, model.state_dict()

model = AutoModel.from_pretrained("me/read")
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.01)
model.push_to_hub("me/read", commit_message="Other weights")
for revision, offset in ((pinned, 0), ("main", 0.01)):
    for name, parameter in AutoModel.from_pretrained("me/read", revision=revision).named_parameters():
        assert torch.equal(parameter, weights[name] + offset), (revision, name)

results = {"pinned": pinned}
for name, repo, revision in (("local", read, None), ("old", "me/read", pinned), ("new", "me/read", None)):
    results[name] = pipeline("text-recognition", model=repo, revision=revision)(image)
print(json.dumps(results))
"""
OFFLINE = """
import json
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForVisualQuestionAnswering
from transformers import AutoProcessor, pipeline

(image,) = arguments
AutoModelForImageClassification.from_pretrained("me/classify")
AutoModelForVisualQuestionAnswering.from_pretrained("me/vqa")
AutoProcessor.from_pretrained("me/vqa")
AutoModel.from_pretrained("me/count")
AutoProcessor.from_pretrained("me/count")
print(json.dumps(pipeline("text-recognition", model="me/read")(image)))
"""


@pytest.fixture(scope="module")
def pushed(
    client, tiny_checkpoint, tiny_classifier, tiny_vqa, tiny_counter, tmp_path_factory, make_image
) -> dict[str, Any]:
    """The four models in repositories, loaded from there; the commit of the first weights, and what was read."""
    image = make_image(tmp_path_factory.mktemp("image") / "image.png")
    out = client.python(PUSH_AND_LOAD, tiny_checkpoint, tiny_classifier, tiny_vqa, tiny_counter, image)
    return {"image": image, **json.loads(out.splitlines()[-1])}


def test_large_files_are_stored_whole_and_old_commits_stay(
    hub, pushed, tiny_checkpoint, tiny_classifier, tiny_vqa, tmp_path
):
    assert pushed["old"] == pushed["local"] != pushed["new"]
    # The large files went through LFS, and what is stored is what was read here.
    for repo, checkpoint in (("me/classify", tiny_classifier), ("me/vqa", tiny_vqa)):
        weights = (checkpoint / "model.safetensors").read_bytes()
        assert hub.repositories[repo].objects == {hashlib.sha256(weights).hexdigest(): weights}
        assert files_of(hub, repo)["model.safetensors"] == weights
    assert ("POST", "/me/read.git/info/lfs/objects/batch") in hub.requests
    other = urllib.request.Request(f"{hub.endpoint}/lfs/me/vqa/{'0' * 64}", b"other content", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(other)
    assert len(hub.repositories["me/vqa"].objects) == 1
    old = load_file(tiny_checkpoint / "model.safetensors")
    (tmp_path / "pinned.safetensors").write_bytes(files_of(hub, "me/read", pushed["pinned"])["model.safetensors"])
    assert all(torch.equal(value, old[name]) for name, value in load_file(tmp_path / "pinned.safetensors").items())


def test_offline_the_cache_serves(hub, home, pushed):
    requests = len(hub.requests)
    with Client(hub.environment(home, HF_ENDPOINT=NOWHERE, HF_HUB_OFFLINE="1")) as offline:
        out = offline.python(OFFLINE, pushed["image"])
        assert json.loads(out.splitlines()[-1]) == pushed["new"]
        read = offline.regard("read", "--model", "me/read", pushed["image"])
        assert (read.code, read.out) == (0, pushed["new"]["text"] + "\n")
        result = offline.regard("push", "me/read", "me/new")
        assert (result.code, result.err) == (2, "regard: me/new: HF_HUB_OFFLINE is set; unset it to push\n")
        result = offline.regard("info", "me/absent")
        assert result.code == 2
        assert result.err.startswith("regard: me/absent: cannot be loaded")
    assert len(hub.requests) == requests


def test_the_command_line_pushes_describes_and_exports(hub, client, tiny_checkpoint, tmp_path):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "run")
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A reader\n")
    (checkpoint / "evaluation.json").write_text(json.dumps({"results": {"line": {"cer": 0.25, "images": 1000}}}))
    (checkpoint / "optimizer.pt").touch()
    (checkpoint / "onnx").mkdir()
    for name in ("read.onnx", "read.onnx.data", "sizes.json", "optimizer.pt", "training_args.json"):
        (checkpoint / "onnx" / name).write_bytes(b"of " + name.encode())
    done = client.regard("push", checkpoint, "me/reader", "--private", "--with-code", "--message", "First")
    assert done.code == 0, done.err
    repository = hub.repositories["me/reader"]
    assert done.out == f"{hub.endpoint}/me/reader/commit/{repository.branches['main']}\n"
    assert repository.private
    pushed = files_of(hub, "me/reader")
    assert {"modeling_image_text_slot.py", "README.md", "evaluation.json", "tokenizer.json"} <= pushed.keys()
    assert not any(name.endswith(("optimizer.pt", "training_args.json")) for name in pushed)
    graphs = {name: content for name, content in pushed.items() if name.startswith("onnx/")}
    assert graphs == {f"onnx/{name}": f"of {name}".encode() for name in ("read.onnx", "read.onnx.data", "sizes.json")}
    assert pushed["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()

    done = client.regard("info", "me/reader")
    assert done.code == 0, done.err
    assert "image_text_slot (ImageTextSlotModel)" in done.out
    assert "85,386" in done.out
    assert "line: cer 0.25, images 1,000" in done.out
    assert not [
        path
        for method, path in hub.requests
        if method == "GET" and path.startswith("/me/reader/") and "safetensors" in path
    ]

    done = client.regard("export", "me/reader", tmp_path / "copy")
    assert done.code == 0, done.err
    files = [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    copy = {path.relative_to(tmp_path / "copy").as_posix(): path.read_bytes() for path in files}
    assert copy == {path: content for path, content in pushed.items() if path != ".gitattributes"}

    # Another branch leaves main alone.
    main = repository.branches["main"]
    done = client.regard("push", checkpoint, "me/reader", "--revision", "candidate")
    assert done.code == 0, done.err
    assert repository.branches["main"] == main
    assert "auto_map" not in json.loads(files_of(hub, "me/reader", "candidate")["config.json"])


STRANGER = """
import json
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor, pipeline

model = AutoModelForVisualQuestionAnswering.from_pretrained("me/coded", trust_remote_code=True)
AutoProcessor.from_pretrained("me/coded", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.me.coded.")
ask = pipeline("visual-question-answering", model="me/coded", trust_remote_code=True)
print(json.dumps(ask(image=sys.argv[1], question="is it red?")))
"""


def test_a_stranger_without_regard_asks_a_repository_with_code(hub, client, tiny_vqa, tmp_path, make_image):
    assert client.regard("push", tiny_vqa, "me/coded", "--with-code").code == 0
    image = make_image(tmp_path / "image.png")
    command = [sys.executable, "-I", "-c", WITHOUT_REGARD + STRANGER, image]
    done = subprocess.run(command, capture_output=True, text=True, env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    ask: Any = pipeline
    expected = ask("visual-question-answering", model=str(tiny_vqa))(image=image, question="is it red?")
    assert json.loads(done.stdout.splitlines()[-1]) == approximately(expected)


def test_without_the_right_token_nothing_is_pushed_or_read(hub, client, tiny_classifier, tmp_path):
    assert client.regard("push", tiny_classifier, "me/private", "--private").code == 0
    assert client.regard("push", tiny_classifier, "me/public").code == 0
    before = {repo: dict(repository.branches) for repo, repository in hub.repositories.items()}
    result = client.regard("push", tiny_classifier, "me/public", "--private")
    assert result.code == 2
    assert result.err.startswith("regard: me/public: is public; make it private in its settings")

    for token in (None, "hf_other"):
        for command in (["info", "me/private"], ["export", "me/private", tmp_path / "copy"]):
            result = client.regard(*command, token=token)
            assert result.code == 2
            assert result.err.startswith("regard: me/private: no such Hub repository, or a private one")
            assert "hf auth login" in result.err
        assert client.regard("info", "me/public", token=token).code == 0

    script = "from transformers import AutoModel; AutoModel.from_pretrained('me/private')"
    client.python(script)
    with pytest.raises(AssertionError, match=r"(?s)Repository Not Found.*private.*token"):
        client.python(script, token=None)

    result = client.regard("push", tiny_classifier, "me/new", token=None)
    assert result.code == 2
    assert result.err.startswith("regard: me/new: no token to write with; run `hf auth login`")
    for repo, token in (("me/public", "hf_other"), ("me/new", "hf_other"), ("me/public", "hf_wrong")):
        result = client.regard("push", tiny_classifier, repo, token=token)
        assert result.code == 2
        assert result.err.startswith(f"regard: {repo}: refused (")
        assert "use a token of its owner's" in result.err
    assert {repo: repository.branches for repo, repository in hub.repositories.items()} == before


def test_an_upload_that_is_cut_leaves_the_repository_as_it_was(hub, client, tiny_classifier, tmp_path):
    changed = shutil.copytree(tiny_classifier, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, changed / "model.safetensors", {"format": "pt"})
    assert client.regard("push", tiny_classifier, "me/cut").code == 0
    repository = hub.repositories["me/cut"]
    before, objects = dict(repository.branches), dict(repository.objects)

    hub.cut_uploads_after = 50_000
    result = client.regard("push", changed, "me/cut")
    hub.cut_uploads_after = None
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("regard: me/cut: not pushed (")
    assert result.err.endswith("check the network and repeat the command\n")
    assert (repository.branches, repository.objects) == (before, objects)
    assert files_of(hub, "me/cut")["model.safetensors"] == (tiny_classifier / "model.safetensors").read_bytes()

    assert client.regard("push", changed, "me/cut").code == 0
    assert files_of(hub, "me/cut")["model.safetensors"] == (changed / "model.safetensors").read_bytes()


def test_without_a_network(hub, tiny_classifier, tmp_path):
    with Client(hub.environment(tmp_path, HF_ENDPOINT=NOWHERE)) as cut_off:
        pushed = cut_off.regard("push", tiny_classifier, "me/new")
        info = cut_off.regard("info", "me/new")
    assert pushed.code == info.code == 2
    assert "check the network and repeat" in pushed.err
    assert "me/new: cannot be loaded" in info.err
    assert "Traceback" not in pushed.err + info.err


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", set()),
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-1", "checkpoint-2"}),
    ],
)
def test_a_training_pushes_its_model_and_card_and_no_pickle(hub, client, tmp_path, strategy, folders):
    repo = f"me/trained-{strategy}"
    settings = (
        "--preset tiny --max_steps 2 --per_device_train_batch_size 2 --use_cpu --dataloader_num_workers 0 "
        "--tiers line=1 --save_steps 1 --save_total_limit 2 --eval_strategy no --report_to none "
        f"--push_to_hub true --hub_model_id {repo} --hub_strategy {strategy} --hub_always_push true"
    )
    done = client.regard("train", *settings.split(), "--output_dir", tmp_path / "run")
    assert done.code == 0, done.err
    pushed = files_of(hub, repo)
    assert pushed["model.safetensors"] == (tmp_path / "run/model.safetensors").read_bytes()
    assert "2 steps (" in pushed["README.md"].decode()
    assert "max_steps: 2\n" in pushed["README.md"].decode()
    assert {Path(name).suffix for name in pushed} <= {".json", ".md", ".safetensors", ".gitattributes", ""}
    assert {name.partition("/")[0] for name in pushed if "/" in name} == folders
    states = [files.keys() for files in hub.repositories[repo].commits.values()]
    assert any("config.json" in names and "README.md" not in names for names in states) == (strategy != "end")
    for name in folders:
        for path, content in pushed.items():
            if path.startswith(f"{name}/"):
                (tmp_path / path).parent.mkdir(exist_ok=True)
                (tmp_path / path).write_bytes(content)
        assert fault(tmp_path / name) is None
