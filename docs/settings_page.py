"""Writes docs/settings.md from the settings classes: python docs/settings_page.py"""

import dataclasses
from pathlib import Path
from typing import Any

from dbkit.config import COMMANDS, TrainConfig
from dbkit.settings import Settings, field_type, groups, type_name

_HEAD = """# Settings

Made by `make docs` from `dbkit/config.py`. A setting has one name everywhere: as a flag (`--name`), in YAML, in the
notebooks' forms and as a keyword argument. On the command line a switch is turned on by `--name` and off by
`--no-name`.
"""
# The options of the older DreamBooth scripts, each with the test that shows what it does. tests/test_every_setting.py
# shows of all settings that they do something.
SCRIPTS = dict(
    line.split()
    for line in """
    pretrained_model_name_or_path test_train.py::test_another_model_does_not_continue_a_run
    revision test_models.py::test_a_hugging_face_id_and_its_revision_are_its_fingerprint
    tokenizer_name test_models.py::test_another_tokenizer_can_be_named
    instance_data_dir test_train.py::test_mistakes_are_said_before_the_model_is_loaded
    class_data_dir test_class_images.py::test_the_users_own_images_are_used_as_they_are
    instance_prompt test_train.py::test_the_loss_equals_a_slow_reference
    class_prompt test_train.py::test_the_loss_equals_a_slow_reference
    with_prior_preservation test_objectives.py::test_every_combination_equals_a_slow_reference
    prior_loss_weight test_objectives.py::test_every_combination_equals_a_slow_reference
    num_class_images test_class_images.py::test_there_are_as_many_images_as_asked_for_at_the_asked_size
    output_dir test_train.py::test_a_run_without_a_folder_goes_to_the_workspace
    seed test_cache.py::test_a_batch_is_what_its_generators_draw
    resolution test_models.py::test_a_resolution_that_the_vae_cannot_encode_is_refused_with_the_nearest_one
    center_crop test_every_setting.py::test_every_setting_changes_something
    use_filename_as_label test_train.py::test_native_training_takes_the_prompt_of_each_image
    use_txt_as_label test_train.py::test_native_training_takes_the_prompt_of_each_image
    train_text_encoder test_train.py::test_trained_parts_change_and_frozen_parts_do_not
    train_batch_size test_objectives.py::test_every_combination_equals_a_slow_reference
    sample_batch_size test_class_images.py::test_batch_size_does_not_change_the_pictures
    num_train_epochs test_train.py::test_epochs_give_the_steps_when_no_total_is_set
    max_train_steps test_train.py::test_a_finished_run_is_not_trained_again
    gradient_accumulation_steps test_objectives.py::test_every_combination_equals_a_slow_reference
    gradient_checkpointing test_train.py::test_gradient_checkpointing_gives_the_same_weights
    learning_rate test_optimizers.py::test_twice_the_rate_is_twice_the_step
    scale_lr test_optimizers.py::test_scale_lr_multiplies_by_the_images_of_a_step
    lr_scheduler test_optimizers.py::test_learning_rate_of_every_step_equals_its_formula
    lr_warmup_steps test_optimizers.py::test_learning_rate_of_every_step_equals_its_formula
    use_8bit_adam test_optimizers.py::test_8bit_adam_keeps_its_moments_in_8_bit
    adam_beta1 test_optimizers.py::test_optimizer_step_equals_adamw_written_out
    adam_beta2 test_optimizers.py::test_optimizer_step_equals_adamw_written_out
    adam_weight_decay test_optimizers.py::test_optimizer_step_equals_adamw_written_out
    adam_epsilon test_optimizers.py::test_optimizer_step_equals_adamw_written_out
    max_grad_norm test_every_setting.py::test_every_setting_changes_something
    push_to_hub test_hub.py::test_a_training_with_a_token_uploads_its_model_and_writes_the_token_nowhere
    hub_token test_hub.py::test_a_training_with_a_token_uploads_its_model_and_writes_the_token_nowhere
    hub_model_id test_hub.py::test_a_repository_can_be_public_and_an_organisations
    logging_dir test_trackers.py::test_tensorboard_shows_what_the_log_has_and_steps_that_are_taken_again_once
    log_with test_trackers.py::test_wandb_is_told_the_same_offline_and_one_run_is_one_run_there
    mixed_precision test_train.py::test_bf16_arithmetic_stays_close_and_trains_fp32_weights
    local_rank test_processes.py::test_a_flag_without_a_launcher_is_said_and_leaves_nothing_behind
    save_model_every_n_steps test_train.py::test_checkpoints_come_at_their_steps_and_the_oldest_go
    auto_test_model test_train.py::test_previews_do_not_change_the_training
    test_prompt test_train.py::test_previews_show_the_prompts_that_were_asked_for
    test_prompts_file test_train.py::test_previews_show_the_prompts_that_were_asked_for
    test_negative_prompt test_sampling.py::test_negative_prompt_matters_only_with_guidance
    test_seed test_every_setting.py::test_every_setting_changes_something
    test_num_per_prompt test_every_setting.py::test_every_setting_changes_something
""".strip().splitlines()
)
_SCRIPTS_HEAD = """
## Options of the DreamBooth scripts

Every option of the older scripts has the same name here, written with underscores or dashes. The schedule that some
of them call `cosine_with_hard_restarts` is `cosine_with_restarts`.

| option | its test, in `tests/` |
| :-- | :-- |
"""
_BOUNDS = (("min", "from"), ("above", "above"), ("max", "to"))


def settings_page() -> str:
    """Every setting of every command as Markdown tables."""
    parts = [_HEAD]
    for command, cls in COMMANDS.items():
        parts.append(f"\n## dbkit {command}\n\n{cls.__doc__}\n")
        if issubclass(cls, TrainConfig) and cls is not TrainConfig:
            parts.append("\nIt takes the settings of `dbkit train`.\n")
            continue
        for title, fields in groups(cls):
            parts.append(f"\n### {title.capitalize()}\n\n" if title else "\n")
            parts.append("| setting | type | default | what it does |\n| :-- | :-- | :-- | :-- |\n")
            parts += [_row(cls, field) for field in fields]
    parts += [_SCRIPTS_HEAD, *(f"| `{name}` | `{test}` |\n" for name, test in SCRIPTS.items())]
    return "".join(parts)


def _row(cls: type[Settings], field: dataclasses.Field) -> str:
    facts = field.metadata
    kind = [type_name(field_type(cls, field.name))]
    kind += [f"{word} {facts[key]:,}".replace(",", " ") for key, word in _BOUNDS if key in facts]
    kind += ["or `auto`"] if facts.get("auto") else []
    kind += ["fixed for a run"] if facts.get("fixed") else []
    return f"| `{field.name}` | {', '.join(kind)} | {_default(field.default)} | {facts['help']} |\n"


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if value in (None, "", ()):
        return "empty"
    if isinstance(value, bool):
        return "`on`" if value else "`off`"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(settings_page(), encoding="utf-8", newline="\n")
