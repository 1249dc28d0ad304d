"""Models on the Hugging Face Hub: the upload is tried before work begins, and what arrived is compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit.checkpoint import MANIFEST
from dbkit.embedded import local_folder
from dbkit.errors import DbkitError, Stopped, counted, some
from dbkit.files import size
from dbkit.libraries import hub_errors, status_and_reason
from dbkit.models import LORA_BASE
from dbkit.run_folder import preview_of
from dbkit.settings import read_yaml
from dbkit.train_config import TrainConfig
from dbkit.workspace import colab_secret

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile, RepoUrl

    from dbkit.config import ConvertConfig

_CARD = "README.md"
_PICTURE = "preview.png"
_TOKENS = "https://huggingface.co/settings/tokens"
# Shown on every model card, beside what else of a run's identity is not the default. No paths: they tell of a person.
_SHOWN = (
    "with_prior_preservation",
    "resolution",
    "train_text_encoder",
    "text_encoder_learning_rate",
    "train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "seed",
    "save_precision",
)
_MAY_BE_PATHS = ("pretrained_model_name_or_path", "pretrained_vae_name_or_path", "tokenizer_name")


def require_hub(config: TrainConfig | ConvertConfig, name: str) -> None:
    """Make or find the repository of the upload, if one is asked for, so that work does not fail at its end.

    name is the repository's where hub_model_id gives none.

    Raises DbkitError where the Hub cannot be reached, or the token may not write there.
    """
    if config.push_to_hub:
        url = _open_repository(config, name)[1]
        print(f"the result will be uploaded to {url}{', which is private' if config.hub_private else ''}")


def upload_model(config: TrainConfig, run: Path, step: int, prompts: Sequence[str]) -> None:
    """Upload a run's finished model of that step in one commit, and compare what the Hub then lists. The model stays.

    prompts are those that show what was learnt. Raises DbkitError when the upload fails; KeyboardInterrupt passes.
    """
    if not config.push_to_hub:
        return
    model = run / "model"
    try:
        api, repository = _open_repository(config, run.name)
        files = _files(config, run, step, prompts, repository.repo_id)
        _commit(api, repository, files, f"The model after {step} steps")
    except DbkitError as error:
        raise DbkitError(
            f"the model is whole in {model}, but not on the Hub: {error}; the same command again only uploads"
        ) from error
    except KeyboardInterrupt:
        raise Stopped(f"the model is whole in {model}; train again to upload it") from None


def upload_files(config: ConvertConfig, paths: Sequence[Path]) -> None:
    """Upload finished files under their own names, if that is asked for. Raises DbkitError when it fails."""
    from huggingface_hub import CommitOperationAdd

    if not config.push_to_hub:
        return
    try:
        api, repository = _open_repository(config, paths[0].stem)
        _commit(api, repository, [CommitOperationAdd(path.name, path) for path in paths], f"{paths[0].name} by dbkit")
    except DbkitError as error:
        raise DbkitError(
            f"{paths[0]} is whole, but not on the Hub: {error}; hf upload sends it without converting again"
        ) from error


def _open_repository(config: TrainConfig | ConvertConfig, name: str) -> tuple[HfApi, RepoUrl]:
    """The client, and the repository, made if it is not there. Raises DbkitError unless the token may write to it."""
    from huggingface_hub import CommitOperationAdd, HfApi

    name = _repository_name(config.hub_model_id, name)
    token = config.hub_token or _stored_token()
    if not token:
        raise DbkitError(
            f"push_to_hub needs a token that may write; make one at {_TOKENS} and run hf auth login, or put it in the "
            "environment variable HF_TOKEN, which on Colab is a secret of that name"
        )
    if not re.fullmatch(r"[!-~]+", token):  # such characters would end up in the client's own errors
        raise DbkitError(f"the Hugging Face token has characters that no token has; copy it again from {_TOKENS}")
    api = HfApi(token=token)
    with _hub_errors_are_sentences(name, "check the connection, or leave push_to_hub out and give it later"):
        account = api.whoami()
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise DbkitError(f"the Hugging Face token may only read; make one that may write at {_TOKENS}")
        repository = api.create_repo(
            name if "/" in name else f"{account['name']}/{name}", private=config.hub_private, exist_ok=True
        )
        # All of an upload but its commit, so that nothing shows there: who may read may ask for less than this.
        with _no_bars():
            api.preupload_lfs_files(repository.repo_id, [CommitOperationAdd("try.safetensors", b"dbkit")])
        if config.hub_private and not api.model_info(repository.repo_id).private:
            raise DbkitError(
                f"{repository} is public and hub_private is on; make it private in its settings there, choose another "
                "hub_model_id, or set hub_private off"
            )
    return api, repository


def _stored_token() -> str | None:
    """The token of the environment or the login; on Colab that of its secrets, which may be made meanwhile."""
    from huggingface_hub import get_token

    with warnings.catch_warnings():
        # Refused once, the client does not ask Colab again in this session, and says so.
        warnings.simplefilter("ignore")
        token = get_token()
    return token or colab_secret("HF_TOKEN")


def _repository_name(hub_model_id: str | None, otherwise: str) -> str:
    """The repository's name. Raises DbkitError where the Hub knows no such names."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = hub_model_id or otherwise
    try:
        # The client's check before version 2 takes letters of any script.
        validate_repo_id(name if name.isascii() else "")
    except HFValidationError as error:
        what = f"hub_model_id is {name!r}" if hub_model_id else f"no repository can be called {name!r}"
        raise DbkitError(
            f"{what}; give hub_model_id as owner/name or name, of the letters a to z, digits, and single - _ . between"
        ) from error
    return name


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the client's progress bars off the screen for the time of the block."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


@contextmanager
def _hub_errors_are_sentences(name: str, advice: str) -> Iterator[None]:
    """Say in one sentence why the Hub refuses, or that it cannot be reached."""
    try:
        yield
    except hub_errors() as error:
        status, reason = status_and_reason(error)
        if status == 401:
            raise DbkitError(f"the Hub refuses the Hugging Face token ({reason}); make one at {_TOKENS}") from error
        if status == 403:
            raise DbkitError(
                f"the Hugging Face token may not write to {name} ({reason}); choose another hub_model_id, or make a "
                f"token that may write there at {_TOKENS}"
            ) from error
        raise DbkitError(f"the upload to the Hugging Face Hub is not possible ({reason}); {advice}") from error


def _files(config: TrainConfig, run: Path, step: int, prompts: Sequence[str], repo_id: str) -> list[CommitOperationAdd]:
    """What is uploaded: the files that the model's manifest lists, the preview of its step, and the card."""
    from huggingface_hub import CommitOperationAdd

    listed = json.loads((run / "model" / MANIFEST).read_text(encoding="utf-8"))["files"]
    # The note beside a LoRA says where its base lies on this machine.
    files = [CommitOperationAdd(name, run / "model" / name) for name in listed if name != LORA_BASE]
    picture = preview_of(run, step)
    if picture.is_file():
        files.append(CommitOperationAdd(_PICTURE, picture))
    # Of a run that was finished before, the settings that it ran with are in its folder.
    card = model_card(config, read_yaml(run / "settings.yaml"), repo_id, step, prompts, picture.is_file())
    return [*files, CommitOperationAdd(_CARD, card.encode())]


def _commit(api: HfApi, repository: RepoUrl, files: list[CommitOperationAdd], message: str) -> None:
    """Put the files on the Hub in one commit. Raises DbkitError unless it then holds each of them as it is here."""
    repo_id = repository.repo_id
    with _hub_errors_are_sentences(repo_id, "check the connection"):
        commit = api.create_commit(repo_id, files, commit_message=message)
        listed = {entry.path: entry for entry in api.list_repo_tree(repo_id, recursive=True, revision=commit.oid)}
    wrong = [file.path_in_repo for file in files if not _has_arrived(file, listed.get(file.path_in_repo))]
    if wrong:
        raise DbkitError(f"the Hub does not hold {some(wrong)} as sent")
    total = sum(file.upload_info.size for file in files)
    print(f"{counted(len(files), 'file')}, {size(total)}, {'are' if len(files) > 1 else 'is'} uploaded to {repository}")


def _has_arrived(sent: CommitOperationAdd, there: RepoFile | None) -> bool:
    """Whether the Hub holds a file as it was sent: by the SHA-256 of a large one, by git's own hash of a small one."""
    if there is None or there.size != sent.upload_info.size:
        return False
    if there.lfs:
        return there.lfs.sha256 == sent.upload_info.sha256.hex()
    with sent.as_file() as file:
        content = file.read()
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def model_card(
    config: TrainConfig, ran: dict[str, Any], repo_id: str, step: int, prompts: Sequence[str], picture: bool
) -> str:
    """The model card as Markdown: what the model is, how to load it, how it was trained. No path and no secret.

    ran is the run's settings.yaml.
    """
    import yaml

    base = _public_name(config.pretrained_model_name_or_path)
    method = "dreambooth" if config.with_prior_preservation else "native"
    header = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    header |= {"base_model": base} if base else {}
    lora = config.adapter == "lora"
    tags = ["stable-diffusion", "text-to-image", "diffusers", method] + (["lora"] if lora else [])
    header |= {"tags": tags, "instance_prompt": prompts[0]}
    dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[ran["save_precision"]]
    rows = [f"| {name} | {_cell(value)} |" for name, value in (("steps", step), *_shown(ran).items())]
    how = "fine-tuned on pictures and their prompts"
    if method == "dreambooth":
        how = "taught a subject by [DreamBooth](https://arxiv.org/abs/2208.12242)"
    # A LoRA is put on its base; which folder that was here says nothing to others.
    loaded = (base or "the base model") if lora else repo_id
    subject = f"A LoRA for {loaded}" if lora else base or "A Stable Diffusion model"
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(header, allow_unicode=True, sort_keys=False, width=10**6)}---\n",
            f"# {repo_id.partition('/')[2]}\n",
            f"{subject}, {how} in {step} steps with dbkit.\n",
            *([f"![Pictures of this model]({_PICTURE})\n"] if picture else []),
            "```python\nimport torch\nfrom diffusers import DiffusionPipeline\n",
            f'pipeline = DiffusionPipeline.from_pretrained("{loaded}", torch_dtype=torch.{dtype}).to("cuda")',
            *([f'pipeline.load_lora_weights("{repo_id}")'] if lora else []),
            f"image = pipeline({json.dumps(prompts[0], ensure_ascii=False)}).images[0]\n```\n",
            "| setting | value |\n| :-- | :-- |",
            *rows,
            f"\nThe licence of the base model{f', {base},' if base else ''} applies to this model too.\n",
        ]
    )


def _public_name(name: str) -> str | None:
    """A model's Hugging Face id; None for a folder of this machine, and for the embedded model."""
    return None if local_folder(name).exists() or name.count("/") != 1 else name


def _shown(ran: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that its model card shows."""
    fields = [field for field in dataclasses.fields(TrainConfig) if field.name not in _MAY_BE_PATHS]
    return {
        field.name: ran[field.name]
        for field in fields
        if ran.get(field.name) is not None
        and (field.name in _SHOWN or (field.metadata.get("fixed") and ran[field.name] != field.default))
    }


def _cell(value: Any) -> str:
    """A value in a table of Markdown, which a bar or a line end would break."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
