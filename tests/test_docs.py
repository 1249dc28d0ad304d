"""What the pages say is so: recipes run, links lead somewhere, names of settings and quoted sentences are real."""

import ast
import dataclasses
import functools
import importlib.util
import json
import re
import shlex
import shutil
import typing
from pathlib import Path

import pytest

import dbkit
from dbkit import embedded
from dbkit.cli import _parse
from dbkit.config import COMMANDS
from dbkit.settings import field_type

ROOT = Path(__file__).parents[1]
PATHS = [ROOT / "README.md", ROOT / "README.zh-CN.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*/*.md")]
PLACES = {path.relative_to(ROOT / "docs").as_posix() if "docs" in path.parts else path.name: path for path in PATHS}
PAGES = {name: path.read_text(encoding="utf-8") for name, path in PLACES.items()}
# Those that speak of settings to users; architecture.md speaks of functions, settings.md is made from the settings.
FOR_USERS = sorted(PAGES.keys() - {"architecture.md", "settings.md"})
RECIPES = re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", PAGES["custom.md"], re.DOTALL | re.MULTILINE)


TYPES = {field.name: field_type(cls, field.name) for cls in COMMANDS.values() for field in dataclasses.fields(cls)}
# Words that are no settings: fields of results, settings of accelerate's and kohya's, a name that guides get wrong.
OTHERS = {
    "conv_dim",
    "contact_sheet",
    "left_out",
    "class_leak",
    "subject_fidelity",
    "prompt_fidelity",
    "validation_loss",
    "class_loss",
    "fsdp_version",
    "cosine_with_hard_restarts",
}
KNOWN = (
    TYPES.keys() | {value for kind in TYPES.values() for value in typing.get_args(kind)} | OTHERS | set(dbkit.__all__)
)


@pytest.mark.parametrize("code", [code for _, code in RECIPES], ids=[title for title, _ in RECIPES])
def test_a_recipe_runs_as_it_stands(code, tmp_path, monkeypatch):
    shutil.copytree(embedded.data_templates(), tmp_path / "data_templates")
    monkeypatch.setenv("DBKIT_WORKSPACE", str(tmp_path / "not asked for"))
    exec(compile(code, "docs/custom.md", "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} == {"data_templates", "workspace"}


def slugs(page: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", sorted(PAGES))
def test_every_link_of_a_page_leads_somewhere(name):
    folder = PLACES[name].parent
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        place = (folder / path).resolve() if path else folder / name
        assert place.exists(), target
        assert not anchor or anchor in slugs(place.read_text(encoding="utf-8")), target


# The options of other scripts, as their parsers had them in August 2026 (diffusers), 2023 (ShivamShrirao) and February
# 2026 (kohya). Of the second and third, those that the first lacks.
DREAMBOOTH = """
    pretrained_model_name_or_path revision variant tokenizer_name instance_data_dir class_data_dir instance_prompt
    class_prompt with_prior_preservation prior_loss_weight num_class_images output_dir seed resolution center_crop
    train_text_encoder train_batch_size sample_batch_size num_train_epochs max_train_steps checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate
    scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power use_8bit_adam dataloader_num_workers adam_beta1
    adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir
    allow_tf32 report_to validation_prompt num_validation_images validation_steps mixed_precision
    prior_generation_precision local_rank enable_xformers_memory_efficient_attention set_grads_to_none offset_noise
    snr_gamma pre_compute_text_embeddings tokenizer_max_length text_encoder_use_attention_mask
    skip_save_text_encoder validation_images class_labels_conditioning validation_scheduler
"""
TEXT_TO_IMAGE = """
    input_perturbation dataset_name dataset_config_name train_data_dir image_column caption_column max_train_samples
    validation_prompts cache_dir random_flip dream_training dream_detail_preservation use_ema offload_ema
    foreach_ema non_ema_revision prediction_type noise_offset validation_epochs tracker_project_name
    image_interpolation_mode
"""
SHIVAM = """
    pretrained_vae_name_or_path save_sample_prompt save_sample_negative_prompt n_save_sample save_guidance_scale
    save_infer_steps pad_tokens log_interval save_interval save_min_steps not_cache_latents hflip concepts_list
    read_prompts_from_txts
"""
KOHYA = """
    v2 v_parameterization pretrained_model_name_or_path tokenizer_cache_dir optimizer_type use_8bit_adam
    use_lion_optimizer learning_rate max_grad_norm optimizer_args lr_scheduler_type lr_scheduler_args lr_scheduler
    lr_warmup_steps lr_decay_steps lr_scheduler_num_cycles lr_scheduler_power fused_backward_pass
    lr_scheduler_timescale lr_scheduler_min_lr_ratio output_dir output_name huggingface_repo_id
    huggingface_repo_type huggingface_path_in_repo huggingface_token huggingface_repo_visibility
    save_state_to_huggingface resume_from_huggingface async_upload save_precision save_every_n_epochs
    save_every_n_steps save_n_epoch_ratio save_last_n_epochs save_last_n_epochs_state save_last_n_steps
    save_last_n_steps_state save_state save_state_on_train_end resume train_batch_size max_token_length mem_eff_attn
    torch_compile dynamo_backend xformers sdpa vae max_train_steps max_train_epochs max_data_loader_n_workers
    persistent_data_loader_workers seed gradient_checkpointing gradient_accumulation_steps mixed_precision full_fp16
    full_bf16 fp8_base ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph clip_skip logging_dir log_with
    log_prefix log_tracker_name wandb_run_name log_tracker_config wandb_api_key log_config noise_offset
    noise_offset_random_strength multires_noise_iterations ip_noise_gamma ip_noise_gamma_random_strength
    multires_noise_discount adaptive_noise_scale zero_terminal_snr min_timestep max_timestep loss_type
    huber_schedule huber_c huber_scale lowram highvram sample_every_n_steps sample_at_first sample_every_n_epochs
    sample_prompts sample_sampler config_file output_config prior_loss_weight conditioning_data_dir masked_loss
    train_data_dir cache_info shuffle_caption caption_separator caption_extension caption_extention keep_tokens
    keep_tokens_separator secondary_separator enable_wildcard caption_prefix caption_suffix color_aug flip_aug
    face_crop_aug_range random_crop debug_dataset resolution cache_latents vae_batch_size cache_latents_to_disk
    skip_cache_check enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale
    resize_interpolation token_warmup_min token_warmup_step alpha_mask dataset_class caption_dropout_rate
    caption_dropout_every_n_epochs caption_tag_dropout_rate reg_data_dir in_json dataset_repeats save_model_as
    use_safetensors learning_rate_te no_token_padding stop_text_encoder_training no_half_vae diffusers_xformers
    train_text_encoder cpu_offload_checkpointing no_metadata unet_lr text_encoder_lr fp8_base_unet network_weights
    network_module network_dim network_alpha network_dropout network_args network_train_unet_only
    network_train_text_encoder_only training_comment dim_from_weights scale_weight_norms base_weights
    base_weights_multiplier skip_until_initial_step initial_epoch initial_step validation_seed validation_split
    validate_every_n_steps validate_every_n_epochs max_validation_steps min_snr_gamma
    scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss weighted_captions dataset_config
    deepspeed zero_stage offload_optimizer_device offload_optimizer_nvme_path offload_param_device
    offload_param_nvme_path zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients
    console_log_level console_log_file console_log_simple metadata_title metadata_author metadata_description
    metadata_license metadata_tags metadata_usage_hint metadata_thumbnail metadata_merged_from
    metadata_trigger_phrase metadata_preprocessor metadata_is_negative_embedding
"""


@pytest.mark.parametrize("name", FOR_USERS)
def test_settings_that_a_page_names_exist(name):
    # The options of other scripts stand in the first column of their page's tables.
    page = re.sub(r"^\| `--[^|]*\|", "|", re.sub(r"```.*?```", "", PAGES[name], flags=re.DOTALL), flags=re.MULTILINE)
    spans = set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page))
    # A name alone, with its value, or as a flag.
    found = (re.fullmatch(r"(?:--(?:no-)?)?([a-z]+(?:_[a-z0-9]+)+)(?:[ :] ?[\w.,]+)?", span) for span in spans)
    words = {match[1] for match in found if match}
    unknown = words - KNOWN
    assert not unknown
    commands = {span.split()[1] for span in spans if re.match(r"dbkit [a-z]", span)}
    assert commands <= COMMANDS.keys()


def commands_of(page: str) -> list[str]:
    """The command lines of a page's code blocks, but for those that leave something out."""
    blocks = re.findall(r"```\n(.*?)```", page, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"(\S*/)?dbkit ", line) and "…" not in line]


@pytest.mark.parametrize("line", [line for name in FOR_USERS for line in commands_of(PAGES[name])])
def test_a_command_of_a_page_is_understood(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    _parse(shlex.split(line)[1:])


def options_in(*headings: str) -> set[str]:
    """The options in the first columns of the tables below these headings of coming_from.md."""
    parts = re.split(r"^#+ (.+)$", PAGES["coming_from.md"], flags=re.MULTILINE)
    below = dict(zip(parts[1::2], parts[2::2]))
    rows = re.findall(r"^\| (`--[^|]*) \|", "".join(below[heading] for heading in headings), re.MULTILINE)
    return {option for row in rows for option in re.findall(r"`--(\w+)`", row)}


@pytest.mark.parametrize(
    ("options", "headings"),
    [
        (DREAMBOOTH, ["train_dreambooth.py"]),
        (TEXT_TO_IMAGE, ["train_text_to_image.py"]),
        (SHIVAM, ["From ShivamShrirao"]),
        (KOHYA, ["Model and files", "Pictures and captions", "Training", "Saving, previews and logs", "LoRA"]),
    ],
    ids=["diffusers", "text_to_image", "ShivamShrirao", "kohya"],
)
def test_each_option_of_another_script_has_its_row(options, headings):
    assert not set(options.split()) - options_in(*headings)


@functools.cache
def sentences() -> list[str]:
    """Every text in dbkit's source, with an ellipsis for each part that is put in when it runs."""
    found = []
    for path in (ROOT / "dbkit").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


QUOTED = re.findall(r"^> (.+)$", PAGES["troubleshooting.md"], re.MULTILINE)


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_sentence_is_dbkits_own(quoted):
    parts = [part.strip() for part in quoted.split("…")]
    assert len("".join(parts)) > 10
    pattern = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
    assert any(pattern.search(text) for text in sentences())


def blocks(page: str) -> list[str]:
    """Its code, but for what is a picture of folders."""
    return [
        code for code in re.findall(r"^```\w*\n(.*?)```", page, re.DOTALL | re.MULTILINE) if "settings.yaml" not in code
    ]


def test_the_chinese_readme_has_the_same_commands():
    assert blocks(PAGES["README.zh-CN.md"]) == blocks(PAGES["README.md"])


def figures(page: str) -> list[tuple[str, list[str]]]:
    """The script and the numbers of each row of a table of what was measured."""
    rows = re.findall(r"^\|[^|]*\|([^|]*)\| `benchmarks/(\w+\.py)` \|$", page, re.MULTILINE)
    return [(script, re.findall(r"\d+(?:\.\d+)?", measured)) for measured, script in rows]


def test_the_figures_of_the_readme_are_those_of_the_last_results():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    found = figures(PAGES["README.md"])
    assert len(found) > 5
    for script, numbers in found:
        rows = [re.findall(r"\d+(?:\.\d+)?", row) for row in results if f"`{script}" in row]
        assert any(set(numbers) <= set(row) for row in rows), (script, numbers)


def test_the_chinese_readme_has_the_same_figures():
    chinese = figures(PAGES["README.zh-CN.md"])
    assert [(script, sorted(numbers)) for script, numbers in chinese] == [
        (script, sorted(numbers)) for script, numbers in figures(PAGES["README.md"])
    ]


def test_badges_open_each_notebook_where_the_folder_is_public_and_are_changed_by_another_place():
    spec = importlib.util.spec_from_file_location("badges", ROOT / "docs" / "badges.py")
    badges = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(badges)
    for name in ("README.md", "README.zh-CN.md"):
        once = badges.with_badges(PAGES[name], "someone/dbkit")
        for path in (ROOT / "notebooks").glob("*.ipynb"):
            address = f"https://colab.research.google.com/github/someone/dbkit/blob/main/notebooks/{path.name}"
            assert once.count(address) == 1
        assert badges.with_badges(once, "other/name") == badges.with_badges(PAGES[name], "other/name") != once


def test_the_chinese_words_of_the_notebooks_cover_each_heading():
    page = PAGES["zh-CN/notebooks.md"]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        title, *headings = re.findall(r"^#+ (.+)$", "\n".join(texts), re.MULTILINE)
        own = page.partition(f"## {title}（")[2].partition("\n## ")[0]
        # What needs no words of its own in either language.
        missing = [heading for heading in headings if f"### {heading}（" not in own and heading != "Look"]
        assert own and not missing, (path.name, missing)
