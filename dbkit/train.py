"""train(): the file to read first. It goes top to bottom: data, model, cache, loop, commit, finished model."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit.cache import Pool, draw_batch, encode_images, encode_prompts, tokenize
from dbkit.checkpoint import Checkpoint, commit, find_fault, load_state, newest_valid, rotate, save_state, step_folder
from dbkit.class_images import generate_class_images
from dbkit.config import ClassImagesConfig, TrainConfig
from dbkit.dataset import Example, class_examples, instance_examples
from dbkit.dataset import fingerprint as data_fingerprint
from dbkit.errors import DbkitError
from dbkit.files import move_aside, require_space, stop_requests
from dbkit.log import Log
from dbkit.losses import add_noise, noise_target, per_sample_mse, prior_preservation_loss
from dbkit.models import Models, check_resolution, choose_device, choose_dtype, load_models, model_facts, save_models
from dbkit.models import fingerprint as model_fingerprint
from dbkit.optimizers import learning_rates, make_optimizer, make_scaler, probe_8bit_adam
from dbkit.preview import make_preview, read_prompts
from dbkit.sampling import autocast
from dbkit.settings import configured_by, plain
from dbkit.workspace import default_folder

if TYPE_CHECKING:
    import torch


@configured_by(TrainConfig)
def train(config: TrainConfig) -> Path:
    """Fine-tune Stable Diffusion on a few images of a subject (DreamBooth, arXiv:2208.12242), or natively on captions.

    Continues from the newest valid state in output_dir if there is one. Returns the folder of the finished model, in
    diffusers layout. Interrupted, it commits its state and raises KeyboardInterrupt; called again, it goes on.
    """
    run = config.output_dir or default_folder() / "runs" / (
        "dreambooth" if config.with_prior_preservation else "native"
    )

    # 1. Data and settings: what can be wrong is found here, before a model is loaded.
    check_resolution(config.resolution, model_facts(config.pretrained_model_name_or_path))
    device = choose_device(config.device)
    dtype = choose_dtype(config.mixed_precision, device)
    if config.use_8bit_adam:
        probe_8bit_adam(device)
    instance = instance_examples(config)
    previews = _preview_prompts(config, instance)
    total = _total_steps(config, len(instance))
    if config.start_over and run.exists():
        print(f"the earlier run is moved to {move_aside(run)}")
    saved = _newest_state(run)
    class_set = _class_examples(config)
    identity = _identity(config, instance, class_set)
    done = _check_same_run(saved, identity, run)
    if done >= total and find_fault(run / "model") is None:
        print(f"{done} of {total} steps are done; raise max_train_steps to train further: {run / 'model'}")
        return run / "model"
    config.save(run / "settings.yaml")

    # 2. Model: what is trained is fp32 (the optimizer needs it), the rest is frozen.
    models = load_models(config.pretrained_model_name_or_path, config.revision, config.tokenizer_name)
    check_resolution(config.resolution, models.facts)
    trained = {"unet": models.unet, "text_encoder": models.text_encoder}
    if not config.train_text_encoder:
        del trained["text_encoder"]
    for module in trained.values():
        module.requires_grad_(True).train().to(device)
        if config.gradient_checkpointing:
            _checkpoint_gradients(module)
    parameters = [parameter for module in trained.values() for parameter in module.parameters()]
    _require_run_space(run, config, models, parameters)
    optimizer = make_optimizer(config, parameters, device)
    scaler = make_scaler(device, dtype)
    learning_rate = learning_rates(config, total)
    if saved:
        states = load_state(saved, trained)
        optimizer.load_state_dict(states["optimizer"])
        scaler.load_state_dict(states["scaler"])
    assert all(parameter.dtype.itemsize == 4 for parameter in parameters)

    # 3. Cache: images and frozen text are encoded once; the VAE and a frozen text encoder then leave the device.
    pools = _make_pools(config, models, instance, class_set, device)
    step_of = functools.partial(train_step, models, pools, optimizer, scaler, config, dtype)
    commit_of = functools.partial(_commit, run, models, trained, optimizer, scaler, identity, config)
    preview_of = functools.partial(_preview, run, models, previews, config, device, dtype)
    _say_plan(config, models, instance, class_set, done, total, device, dtype)

    # 4. Loop: one pass is one optimizer step. Commit first, preview after, so that no preview can cost a run.
    if done == 0:
        preview_of(0)
    before = _weight_norms(parameters)
    log = Log(run, done, total, config.log_interval)
    with stop_requests() as stop:
        for step in range(done + 1, total + 1):
            losses, grad_norm = step_of(step, learning_rate(step - 1))
            log.add(step, losses, grad_norm, learning_rate(step - 1))
            if stop.is_set():
                commit_of(step)
                raise KeyboardInterrupt(
                    f"stopped at step {step} of {total}; the state is saved, train again to continue"
                )
            if step < total and config.save_model_every_n_steps and step % config.save_model_every_n_steps == 0:
                commit_of(step)
                preview_of(step)
    log.close()

    # 5. Finished model.
    if done < total and bool((_weight_norms(parameters) == before).all()):
        raise DbkitError(f"{total - done} steps changed no weight; raise learning_rate")
    model = commit_of(total, finished=True)
    preview_of(total)
    print(f"{total} of {total} steps are done: {model}\nto see what was learnt, write: {previews[0]}")
    return model


def train_step(
    models: Models,
    pools: list[Pool],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    dtype: torch.dtype,
    step: int,
    learning_rate: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step: gradient_accumulation_steps forward and backward passes, clip, update.

    Returns (loss, instance loss, class loss) as a tensor of shape (3,) and the gradient norm, both still on the device.
    """
    import torch

    unet, text_encoder, noise_scheduler = models.unet, models.text_encoder, models.noise_scheduler
    size, passes = config.train_batch_size, config.gradient_accumulation_steps
    prediction_type, timesteps = noise_scheduler.config.prediction_type, noise_scheduler.config.num_train_timesteps
    losses = torch.zeros(3, device=unet.device)
    for number in range(passes):
        samples = range(number * size, (number + 1) * size)
        batch = draw_batch(pools, config.seed, step, samples, size * passes, timesteps)
        alphas_cumprod = noise_scheduler.alphas_cumprod
        noisy_latents = add_noise(batch.latents, batch.noise, batch.timesteps, alphas_cumprod)
        target = noise_target(prediction_type, batch.latents, batch.noise, batch.timesteps, alphas_cumprod)
        with autocast(unet.device, dtype):
            text = encode_prompts(text_encoder, batch.prompts) if config.train_text_encoder else batch.prompts
            model_pred = unet(noisy_latents, batch.timesteps, text).sample
        parts = prior_preservation_loss(per_sample_mse(model_pred, target), batch.instances, config.prior_loss_weight)
        scaler.scale(parts[0] / passes).backward()
        losses += torch.stack(parts).detach() / passes
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return losses, grad_norm


def _total_steps(config: TrainConfig, images: int) -> int:
    """max_train_steps, or enough optimizer steps to show every instance image num_train_epochs times."""
    per_step = config.train_batch_size * config.gradient_accumulation_steps
    total = config.max_train_steps or math.ceil(images * config.num_train_epochs / per_step)
    if config.lr_warmup_steps >= total:
        raise DbkitError(
            f"lr_warmup_steps is {config.lr_warmup_steps} and the run has {total} steps; make the warm-up shorter"
        )
    return total


def _class_examples(config: TrainConfig) -> list[Example]:
    """The class images, generated where they are missing; none without prior preservation."""
    if not config.with_prior_preservation:
        return []
    shared = {field.name for field in dataclasses.fields(ClassImagesConfig)} & {
        f.name for f in dataclasses.fields(config)
    }
    made = generate_class_images(ClassImagesConfig(**{name: getattr(config, name) for name in shared}))
    print(made)
    return class_examples(config, made.folder)


def _preview_prompts(config: TrainConfig, instance: list[Example]) -> list[str]:
    if config.test_prompts_file:
        return read_prompts(config.test_prompts_file)
    if config.test_prompt:
        return [config.test_prompt]
    # The class prompt without the identifier is where an overdone training shows first.
    return [instance[0].prompt, *([config.class_prompt] if config.with_prior_preservation else [])]


def _identity(config: TrainConfig, instance: list[Example], class_set: list[Example]) -> dict[str, Any]:
    """What a run's state belongs to. The model and the data count by what they hold, not by where they lie."""
    fixed = {field.name for field in dataclasses.fields(config) if field.metadata.get("fixed")}
    return {
        "settings": {name: value for name, value in plain(config).items() if name in fixed},
        "pretrained_model_name_or_path": model_fingerprint(config.pretrained_model_name_or_path, config.revision),
        "instance images or captions": data_fingerprint(instance),
        "class images": data_fingerprint(class_set),
    }


def _newest_state(run: Path) -> Checkpoint | None:
    saved, skipped = newest_valid(run / "resume")
    for sentence in skipped:
        print(sentence)
    if skipped and not saved:
        raise DbkitError(f"no saved state in {run / 'resume'} is whole; set start_over to begin again at step 0")
    return saved


def _check_same_run(saved: Checkpoint | None, identity: dict[str, Any], run: Path) -> int:
    """The steps that are done. Raises DbkitError if the state is of other settings, another model or other data."""
    if saved is None:
        return 0
    then, now = saved.facts, identity
    changed = [
        f"{name} was {then['settings'].get(name)!r} and is {value!r}"
        for name, value in now["settings"].items()
        if then["settings"].get(name) != value
    ]
    changed += [f"{name} differ" for name in now if name != "settings" and then.get(name) != now[name]]
    if changed:
        raise DbkitError(
            f"{run} holds a run of {saved.step} steps that these settings do not continue: {', '.join(changed)}; "
            "change that back, choose another output_dir, or set start_over"
        )
    return saved.step


def _checkpoint_gradients(module: torch.nn.Module) -> None:
    # diffusers and transformers name the same thing differently.
    if hasattr(module, "enable_gradient_checkpointing"):
        module.enable_gradient_checkpointing()
    else:
        module.gradient_checkpointing_enable({"use_reentrant": False})


def _require_run_space(run: Path, config: TrainConfig, models: Models, parameters: list[torch.nn.Parameter]) -> None:
    """Raise DbkitError unless the disk holds the states (two, while one replaces the other) and the usable weights."""
    count = sum(parameter.numel() for parameter in parameters)
    state = count * (4 + (2 if config.use_8bit_adam else 8))
    everything = (models.unet, models.text_encoder, models.vae)
    weights = sum(p.numel() for module in everything for p in module.parameters())
    usable = weights * (4 if config.save_precision == "fp32" else 2)
    kept = config.checkpoints_total_limit + 1 if config.save_model_every_n_steps else 0
    require_space(run, 2 * state + (kept + 1) * usable, "this run")


def _make_pools(
    config: TrainConfig, models: Models, instance: list[Example], class_set: list[Example], device: torch.device
) -> list[Pool]:
    import torch

    models.noise_scheduler.alphas_cumprod = models.noise_scheduler.alphas_cumprod.to(device)
    models.vae.to(device)
    models.text_encoder.to(device)
    distinct = list(dict.fromkeys(example.prompt for example in [*instance, *class_set]))
    prompts = tokenize(models.tokenizer, distinct).to(device)
    if not config.train_text_encoder:
        with torch.no_grad():
            prompts = torch.cat([encode_prompts(models.text_encoder, row[None]) for row in prompts])
        models.text_encoder.to("cpu")
    pools = []
    for role, examples in (("instance", instance), ("class", class_set)):
        if examples:
            latents = encode_images(models.vae, examples, config.resolution, device)
            prompt_of = torch.tensor([distinct.index(example.prompt) for example in examples], device=device)
            pools.append(Pool(role, latents, prompts, prompt_of))
    models.vae.to("cpu")
    return pools


def _commit(
    run: Path,
    models: Models,
    trained: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    identity: dict[str, Any],
    config: TrainConfig,
    step: int,
    finished: bool = False,
) -> Path:
    """Commit the state to resume from, then usable weights: a checkpoint, or the finished model. Returns its folder."""
    for part, module in trained.items():
        if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
            raise DbkitError(
                f"the {part} has weights that are not numbers at step {step}; nothing was saved: lower "
                "learning_rate and "
                "train again, which continues from the last good state"
            )
    others = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    commit(step_folder(run / "resume", step), step, lambda folder: save_state(folder, trained, others), identity)
    rotate(run / "resume", keep=1)
    target = run / "model" if finished else step_folder(run / "checkpoints", step)
    commit(target, step, lambda folder: save_models(models, folder, config.save_precision), identity)
    if not finished:
        rotate(run / "checkpoints", config.checkpoints_total_limit)
    return target


def _preview(
    run: Path,
    models: Models,
    prompts: list[str],
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    step: int,
) -> None:
    """Preview pictures of the live model. Too little memory for them is said, and training goes on."""
    import torch

    if not config.auto_test_model:
        return
    try:
        make_preview(
            models,
            prompts,
            output=run / "previews" / f"step_{step:06d}.png",
            seeds=range(config.test_seed, config.test_seed + config.test_num_per_prompt),
            negative_prompt=config.test_negative_prompt,
            side=config.resolution,
            steps=25,
            batch_size=config.sample_batch_size,
            device=device,
            dtype=dtype,
        )
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        print(f"no preview at step {step}: too little GPU memory; set sample_batch_size to 1 or auto_test_model off")


def _weight_norms(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """One number for each tensor, by which a change shows."""
    import torch

    return torch.stack([parameter.detach().norm() for parameter in parameters])


def _say_plan(config, models, instance, class_set, done, total, device, dtype) -> None:
    """Say what will be trained on what, with the prompts as the model will see them and the arithmetic of the steps."""
    ids = models.tokenizer([instance[0].prompt]).input_ids[0]
    per_step = config.train_batch_size * config.gradient_accumulation_steps
    print(f"{'DreamBooth' if class_set else 'native training'} on {device.type}, {str(dtype).removeprefix('torch.')}")
    print(f"{len(instance)} instance images; the first one's prompt: {instance[0].prompt} ({len(ids) - 2} tokens)")
    if class_set:
        print(f"{len(class_set)} class images; their prompt: {config.class_prompt}")
    print(
        f"{total} steps of {per_step}: each instance image is seen about {total * per_step / len(instance):.0f} times"
    )
    if done:
        print(f"continuing after step {done}")
