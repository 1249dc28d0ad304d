"""The upload to the Hugging Face Hub, against a stand-in that speaks its HTTP interface to the real client."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import draw_photo
from hub_stand_in import Repository, serve

from dbkit import DbkitError, TrainConfig, train
from dbkit.checkpoint import find_fault
from dbkit.hub import model_card
from dbkit.settings import plain

TOKEN = "hf_writes"


@pytest.fixture
def hub():
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The folder of a finished run with previews, and its settings. Do not change it."""
    folder = tmp_path_factory.mktemp("finished")
    draw_photo(folder / "photos" / "teal.png")
    settings = {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": str(folder / "photos"),
        "instance_prompt": "photo of zwx thing",
        "output_dir": str(folder / "zwx-thing"),
        "resolution": 64,
        "max_train_steps": 2,
        "learning_rate": 1e-4,
        "save_precision": "fp32",
        "device": "cpu",
    }
    train(**settings)
    return folder / "zwx-thing", settings


@pytest.fixture
def python(hub, tmp_path):
    """Run Python with arguments, in a process of its own: the client reads the Hub's address when it is imported."""
    own = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"NO_PROXY": "127.0.0.1", "WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}

    def run(*arguments, **changes):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env={**environment, **changes}, capture_output=True, text=True)

    return run


@pytest.fixture
def check(python, tmp_path):
    """Try the repository of a run that is about to begin; returns what was said, or the sentence of its refusal."""

    def run(environment=None, **settings):
        values = {"pretrained_model_name_or_path": "owner/base", "instance_data_dir": "photos", "push_to_hub": True}
        code = (
            "from dbkit import TrainConfig; from dbkit.hub import require_hub\n"
            f"config = TrainConfig(instance_prompt='zwx', **{ {**values, **settings}!r})\n"
            "require_hub(config, 'zwx-thing')"
        )
        return _said(python("-c", code, **(environment or {})))

    return run


@pytest.fixture
def upload(python, finished):
    """Upload the finished run; returns what was said, or the sentence it was refused with."""
    run, settings = finished

    def upload(**changes):
        code = (
            "import time; time.sleep = lambda seconds: None  # the client waits before it tries again\n"
            "from pathlib import Path; from dbkit import TrainConfig; from dbkit.hub import upload_model\n"
            f"config = TrainConfig(**{ {**settings, 'push_to_hub': True, 'hub_token': TOKEN, **changes}!r})\n"
            f"upload_model(config, Path({str(run)!r}), 2, ['photo of zwx thing'])"
        )
        return _said(python("-c", code))

    return upload


def _said(done):
    """What a process said, or the sentence that it ended with."""
    if done.returncode == 0:
        return done.stdout.strip()
    # The client's bars may come after it.
    said = [line for line in done.stderr.splitlines() if line.startswith("dbkit.errors.DbkitError: ")]
    assert said, done.stderr
    return said[-1].removeprefix("dbkit.errors.DbkitError: ")


def _files(folder):
    """The bytes of a model folder's files by name, without its manifest."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# Before the run.


def test_the_repository_is_made_private_and_empty_and_named_after_the_run(hub, check):
    assert check(hub_token=TOKEN) == (f"the result will be uploaded to {hub.url}/ada/zwx-thing, which is private")
    assert hub.repositories == {"ada/zwx-thing": Repository(private=True)}


def test_a_repository_can_be_public_and_an_organisations(hub, check):
    said = check(hub_token=TOKEN, hub_model_id="engines/thing", hub_private=False)
    assert said == f"the result will be uploaded to {hub.url}/engines/thing"
    assert hub.repositories == {"engines/thing": Repository(private=False)}


def test_a_repository_that_is_there_already_stays_as_it_is(hub, check):
    hub.repositories["ada/thing"] = Repository(private=True, files={"notes.txt": b"mine"})
    assert check(hub_token=TOKEN, hub_model_id="thing").endswith("/ada/thing, which is private")
    assert hub.repositories == {"ada/thing": Repository(private=True, files={"notes.txt": b"mine"})}


def test_the_token_comes_from_the_environment_or_from_the_login(check, tmp_path):
    assert "will be uploaded" in check({"HF_TOKEN": TOKEN})
    (tmp_path / "hf").mkdir(exist_ok=True)
    (tmp_path / "hf" / "token").write_text(TOKEN)
    assert "will be uploaded" in check()
    # A setting goes before both.
    assert "refuses the Hugging Face token" in check({"HF_TOKEN": TOKEN}, hub_token="hf_unknown")


def test_no_token_is_said(check):
    assert check() == (
        "push_to_hub needs a token that may write; make one at https://huggingface.co/settings/tokens and run hf auth "
        "login, or put it in the environment variable HF_TOKEN, which on Colab is a secret of that name"
    )


def test_an_unknown_token_is_said_and_not_shown(check):
    said = check(hub_token="hf_unknown")
    assert said.startswith("the Hub refuses the Hugging Face token (Invalid user token")
    assert said.endswith("); make one at https://huggingface.co/settings/tokens")
    assert "hf_unknown" not in said


def test_a_token_that_may_only_read_is_said(hub, check):
    assert check(hub_token="hf_reads") == (
        "the Hugging Face token may only read; make one that may write at https://huggingface.co/settings/tokens"
    )
    assert not hub.repositories


@pytest.mark.parametrize("token", ["hf_wri tes", "hf_wrïtes", "hf_writes\nhf_writes"])
def test_a_token_that_was_copied_wrongly_is_said_and_not_shown(check, token):
    assert check(hub_token=token) == (
        "the Hugging Face token has characters that no token has; copy it again from "
        "https://huggingface.co/settings/tokens"
    )


@pytest.mark.parametrize("there", [False, True])
def test_a_repository_of_someone_else_is_said(hub, check, there):
    if there:
        hub.repositories["bob/thing"] = Repository(private=False)
    said = check(hub_token=TOKEN, hub_model_id="bob/thing")
    assert said.startswith("the Hugging Face token may not write to bob/thing (403 ")
    assert said.endswith(
        "); choose another hub_model_id, or make a token that may write there at https://huggingface.co/settings/tokens"
    )


def test_a_repository_that_is_public_takes_no_private_upload(hub, check):
    hub.repositories["ada/thing"] = Repository(private=False)
    assert check(hub_token=TOKEN, hub_model_id="thing") == (
        f"{hub.url}/ada/thing is public and hub_private is on; make it private in its settings there, choose another "
        "hub_model_id, or set hub_private off"
    )
    assert "will be uploaded" in check(hub_token=TOKEN, hub_model_id="thing", hub_private=False)


@pytest.mark.parametrize(
    "name", ["a/b/c", "mein hund", "-thing", "a--b", "thing.git", "犬", "https://huggingface.co/a/b"]
)
def test_a_name_that_the_hub_does_not_know_is_said(check, name):
    assert check(hub_token=TOKEN, hub_model_id=name) == (
        f"hub_model_id is {name!r}; give hub_model_id as owner/name or name, of the letters a to z, digits, and single "
        "- _ . between"
    )


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"HF_ENDPOINT": "http://127.0.0.1:1"}, "onnection"), ({"HF_HUB_OFFLINE": "1"}, "offline mode is enabled")],
)
def test_a_hub_that_cannot_be_reached_is_said(check, environment, reason):
    said = check(environment, hub_token=TOKEN)
    assert said.startswith("the upload to the Hugging Face Hub is not possible (") and reason in said
    assert said.endswith("); check the connection, or leave push_to_hub out and give it later")


# The upload.


def test_the_model_is_uploaded_as_it_is_with_its_card_and_its_preview_in_one_commit(hub, upload, finished):
    run, _ = finished
    model = _files(run / "model")
    assert upload().startswith(f"{len(model) + 2} files, ")
    repository = hub.repositories["ada/zwx-thing"]
    assert repository.commits == 2 and repository.private
    sent = dict(repository.files)
    assert b"photo of zwx thing" in sent.pop("README.md")
    assert sent.pop("preview.png") == (run / "previews" / "step_000002.png").read_bytes()
    assert sent == model


def test_what_is_on_the_hub_already_is_not_uploaded_again(hub, upload):
    upload()
    puts = []
    hub.fail = lambda method, path: puts.append(path) if method == "PUT" else None
    assert "are uploaded" in upload()
    assert not puts
    del hub.repositories["ada/zwx-thing"].files["unet/config.json"]
    assert "are uploaded" in upload()
    assert "unet/config.json" in hub.repositories["ada/zwx-thing"].files


@pytest.mark.parametrize(
    ("method", "end", "status"),
    [("PUT", "", 503), ("PUT", "", 0), ("POST", "/commit/main", 500), ("POST", "/commit/main", 0), ("GET", "", 502)],
)
def test_an_upload_that_breaks_off_is_said_and_the_same_command_uploads(hub, upload, finished, method, end, status):
    run, _ = finished
    # The repository is there, and what its trial sends; the model is not.
    upload(hub_model_id="other")
    del hub.objects[max(hub.objects, key=lambda oid: len(hub.objects[oid]))]
    place = "/tree/" if method == "GET" else end
    hub.fail = lambda asked, path: status if asked == method and place in path else None
    said = upload()
    assert said.startswith(f"the model is whole in {run / 'model'}, but not on the Hub: the upload to the Hugging Face")
    assert said.endswith("; the same command again only uploads")
    assert "signed" not in said and TOKEN not in said
    assert find_fault(run / "model", step=2) is None
    hub.fail = lambda asked, path: None
    assert "are uploaded" in upload()
    assert _files(run / "model").items() <= hub.repositories["ada/zwx-thing"].files.items()


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json"])
def test_a_file_that_arrives_otherwise_than_it_was_sent_is_said(hub, upload, name):
    hub.keep = lambda path, content: content[::-1] if path == name else content
    assert f"the Hub does not hold {name} as sent" in upload()


def test_a_token_that_was_withdrawn_during_the_run_is_said(hub, upload, finished):
    hub.roles.clear()
    said = upload()
    assert said.startswith(f"the model is whole in {finished[0] / 'model'}, but not on the Hub: the Hub refuses the ")


def test_a_stop_during_the_upload_says_where_the_model_is(hub, python, finished):
    run, settings = finished
    code = (
        "from pathlib import Path; from dbkit import TrainConfig; from dbkit import hub; import huggingface_hub\n"
        "def stop(*_, **__): raise KeyboardInterrupt\n"
        "huggingface_hub.HfApi.whoami = stop\n"
        f"config = TrainConfig(**{ {**settings, 'push_to_hub': True, 'hub_token': TOKEN}!r})\n"
        f"hub.upload_model(config, Path({str(run)!r}), 2, ['photo of zwx thing'])"
    )
    last = python("-c", code).stderr.strip().splitlines()[-1]
    assert last == f"dbkit.errors.Stopped: the model is whole in {run / 'model'}; train again to upload it"


# The whole command, and the token.


def test_a_training_with_a_token_uploads_its_model_and_writes_the_token_nowhere(hub, python, config, tmp_path):
    path = config.save(tmp_path / "train.yaml")
    tracker = "wandb" if importlib.util.find_spec("wandb") else "none"
    options = ["--push_to_hub", "--hub_token", TOKEN, "--log_with", tracker]
    done = python("-m", "dbkit", "train", "--config", path, *options)
    assert done.returncode == 0, done.stderr
    assert f"are uploaded to {hub.url}/ada/run" in done.stdout
    files = hub.repositories["ada/run"].files
    assert _files(config.output_dir / "model").items() <= files.items()
    # Nor is there a path of this machine in what was uploaded.
    for name, content in files.items():
        assert str(tmp_path.parent).encode() not in content, name
    said = done.stdout + done.stderr + "".join(content.decode("utf-8", "replace") for content in files.values())
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert config.output_dir / "settings.yaml" in written
    assert TOKEN not in said
    assert not [path for path, content in written.items() if TOKEN.encode() in content]


def test_a_finished_run_is_uploaded_by_the_same_command_with_a_token_from_its_file(hub, python, finished, tmp_path):
    run, settings = finished
    copy = shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({**settings, "output_dir": str(copy), "push_to_hub": True, "hub_token": TOKEN}))
    done = python("-m", "dbkit", "train", "--config", path)
    assert done.returncode == 0, done.stderr
    assert "2 steps done already" in done.stdout and f"are uploaded to {hub.url}/ada/run" in done.stdout
    assert _files(run / "model").items() <= hub.repositories["ada/run"].files.items()


def test_a_wrong_token_is_said_before_a_model_is_loaded(python, config, tmp_path):
    path = config.save(tmp_path / "train.yaml")
    done = python("-m", "dbkit", "train", "--config", path, "--push_to_hub", "--hub_token=hf_unknown")
    assert done.returncode == 2
    assert done.stderr.startswith("dbkit: the Hub refuses the Hugging Face token (") and "hf_unknown" not in done.stderr
    assert not config.output_dir.exists()


@pytest.mark.parametrize(("name", "value"), [("hub_token", TOKEN), ("hub_model_id", "thing"), ("hub_private", False)])
def test_what_belongs_to_the_upload_is_refused_without_it(config, name, value):
    sentence = f"^{name} has no effect without push_to_hub; turn that on or leave {name} out$"
    with pytest.raises(DbkitError, match=sentence):
        train(config, **{name: value})


# The model card.


def _card(config, prompts=("photo of zwx thing",), **changes):
    """The header and the text of a model card."""
    values = {"ran": plain(config), "repo_id": "ada/thing", "step": 3, "picture": False, **changes}
    _, header, text = model_card(config, prompts=prompts, **values).split("---\n", 2)
    return yaml.safe_load(header), text


def _made(**changes):
    values = {"pretrained_model_name_or_path": "owner/base", "instance_data_dir": "/secret/photos"}
    return TrainConfig(**{**values, "instance_prompt": "photo of zwx thing", **changes})


def test_the_header_says_what_the_hub_wants_to_know():
    config = _made(with_prior_preservation=True, class_prompt="photo of a thing", class_data_dir="/secret/class")
    header, text = _card(config)
    assert header == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "owner/base",
        "tags": ["stable-diffusion", "text-to-image", "diffusers", "dreambooth"],
        "instance_prompt": "photo of zwx thing",
    }
    assert "owner/base, taught a subject by [DreamBooth](https://arxiv.org/abs/2208.12242) in 3 steps" in text
    assert "The licence of the base model, owner/base, applies to this model too." in text
    assert "secret" not in text
    header, text = _card(_made())
    assert header["tags"][-1] == "native" and "owner/base, fine-tuned on pictures and their prompts in 3 steps" in text


def test_the_card_of_a_lora_says_how_it_is_put_on_its_base():
    header, text = _card(_made(adapter="lora"))
    assert header["tags"][-1] == "lora" and header["base_model"] == "owner/base"
    assert "A LoRA for owner/base, fine-tuned" in text
    assert 'from_pretrained("owner/base", ' in text and 'pipeline.load_lora_weights("' in text
    _, text = _card(_made(adapter="lora", pretrained_model_name_or_path="tiny-sd"))
    assert "A LoRA for the base model, fine-tuned" in text and "tiny-sd" not in text


@pytest.mark.parametrize("local", ["models/base", "tiny-sd", "/secret/base"])
def test_a_model_of_this_machine_is_not_named(local, tmp_path):
    (tmp_path / "models" / "base").mkdir(parents=True)
    header, text = _card(_made(pretrained_model_name_or_path=local))
    assert "base_model" not in header and local not in text
    assert "A Stable Diffusion model, fine-tuned" in text and "The licence of the base model applies" in text


def test_the_table_shows_the_settings_that_matter_and_no_path():
    config = _made(
        pretrained_vae_name_or_path="/secret/vae",
        tokenizer_name="/secret/tokenizer",
        output_dir="/secret/run",
        learning_rate=2e-6,
        hflip=True,
        push_to_hub=True,
        hub_token="hf_secret",
    )
    _, text = _card(config)
    rows = dict(line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| "))
    assert rows["steps"] == "3" and rows["learning_rate"] == "2e-06" and rows["resolution"] == "512"
    assert rows["hflip"] == "True" and rows["instance_prompt"] == "photo of zwx thing"
    assert "min_snr_gamma" not in rows and "secret" not in text


def test_the_settings_are_those_that_the_run_had():
    _, text = _card(_made(learning_rate=1e-3), ran=plain(_made(learning_rate=1e-6)))
    assert "| learning_rate | 1e-06 |" in text


def test_a_prompt_of_any_kind_keeps_the_card_whole():
    prompt = 'a: "zwx" | <b>\\n\' 犬 --- #'
    header, text = _card(_made(instance_prompt=prompt), prompts=[prompt])
    assert header["instance_prompt"] == prompt
    assert '| instance_prompt | a: "zwx" \\| &lt;b>' in text
    code = text.partition("```python\n")[2].partition("```")[0]
    assert json.dumps(prompt, ensure_ascii=False) in code
    compile(code, "card", "exec")


def test_the_picture_is_shown_where_there_is_one():
    assert "preview.png" not in _card(_made())[1]
    assert "![Pictures of this model](preview.png)" in _card(_made(), picture=True)[1]


def test_the_code_of_the_card_draws_a_picture_with_what_was_uploaded(hub, upload, tmp_path):
    upload()
    for name, content in hub.repositories["ada/zwx-thing"].files.items():
        path = tmp_path / "ada" / "zwx-thing" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    text = (tmp_path / "ada" / "zwx-thing" / "README.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    found = {}
    # The current folder has it under its name.
    exec(code.replace("cuda", "cpu"), found)
    assert found["image"].size == (64, 64)


def test_an_exported_file_is_uploaded_with_its_yaml(hub, python, sd2_v_model, tmp_path):
    # The settings page and forms keep tokens out; the command line takes one.
    where = tmp_path / "mine.safetensors"
    done = python("-m", "dbkit", "convert", sd2_v_model, where, "--push_to_hub", "--hub_token", TOKEN)
    assert "2 files, " in _said(done)
    assert hub.repositories["ada/mine"].private
    assert dict(hub.repositories["ada/mine"].files) == {
        name: where.with_suffix(suffix).read_bytes()
        for name, suffix in (("mine.safetensors", ".safetensors"), ("mine.yaml", ".yaml"))
    }


def test_an_export_that_cannot_be_uploaded_is_refused_before_it_is_made(python, model, tmp_path):
    done = python("-m", "dbkit", "convert", model, tmp_path / "mine.safetensors", "--push_to_hub")
    assert done.stderr.startswith("dbkit: push_to_hub needs a token") and not (tmp_path / "mine.safetensors").exists()
