"""train(): the file to read first. It goes top to bottom: data, model, cache, loop, commit, finished model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit.cache import Noising, Pool, draw_batches, encode_images, encode_prompts, tokenize
from dbkit.checkpoint import commit, find_fault, load_state, rotate, save_state, step_folder
from dbkit.concepts import Concept
from dbkit.errors import DbkitError
from dbkit.examples import first_prompts
from dbkit.files import one_process, require_space, stop_requests
from dbkit.identifier import describe
from dbkit.libraries import choose_device, choose_dtype, quiet
from dbkit.log import Log
from dbkit.losses import add_noise, noise_target, per_sample_loss, prior_preservation_loss, snr_weights
from dbkit.models import (
    Models,
    check_resolution,
    check_zero_terminal_snr,
    load_models,
    save_models,
    with_zero_terminal_snr,
)
from dbkit.optimizers import (
    learning_rates,
    load_optimizer,
    make_optimizer,
    make_scaler,
    out_of_memory_is_a_sentence,
    set_learning_rate,
    state_bytes,
)
from dbkit.order import Order
from dbkit.planning import RunPlan, make_plan
from dbkit.preview import make_preview
from dbkit.sampling import autocast
from dbkit.settings import configured_by, replace
from dbkit.trackers import make_tracker
from dbkit.train_config import TrainConfig
from dbkit.workspace import default_folder

if TYPE_CHECKING:
    import torch


@configured_by(TrainConfig)
def train(config: TrainConfig) -> Path:
    """Fine-tune Stable Diffusion on a few images of a subject (DreamBooth, arXiv:2208.12242), or natively on captions.

    Continues from the newest valid state in output_dir if there is one. Returns the folder of the finished model, in
    diffusers layout. Interrupted, it commits its state and raises KeyboardInterrupt; called again, it goes on.
    """
    method = "dreambooth" if config.with_prior_preservation else "native"
    run = (config.output_dir or default_folder() / "runs" / method).absolute()
    with one_process(run):
        return _train(config, run)


def _train(config: TrainConfig, run: Path) -> Path:
    # 1. Plan: what can be wrong with settings and data is found and shown here, before a model is loaded.
    device = choose_device(config.device)
    dtype = choose_dtype(config.mixed_precision, device)
    plan = make_plan(config, run, device)
    if plan.done >= plan.total and find_fault(run / "model", step=plan.done) is None:
        print(f"{plan.done} steps are done already; to train further, raise max_train_steps above that")
        return run / "model"
    # A run that was stopped beyond a total that is lower now only lacks its finished model.
    done, total = plan.done, max(plan.total, plan.done)
    # Starting over is a choice of one moment: kept in the file, it would move the run aside the next time too.
    replace(config, start_over=False).save(run / "settings.yaml")

    # 2. Model: what is trained is fp32, for the optimizer needs it; the rest is frozen.
    models = _load(config)
    trained = _trained_parts(config, models, device)
    parameters = [parameter for module in trained.values() for parameter in module.parameters()]
    _require_run_space(run, config, models, parameters)
    optimizer = make_optimizer(config, trained, device, plan.library)
    scaler = make_scaler(device, dtype)
    learning_rate = learning_rates(config, total)
    if plan.saved:
        states = load_state(plan.saved, trained)
        load_optimizer(optimizer, states["optimizer"])
        if states["scaler"]:  # empty when the session before did not run in fp16
            scaler.load_state_dict(states["scaler"])
        del states  # as large as the model three times over
    assert all(parameter.dtype.itemsize == 4 for parameter in parameters)

    # 3. Cache: images and frozen text are encoded once; the VAE and a frozen text encoder then leave the device.
    pools = _make_pools(config, models, plan, device)
    commit_of = functools.partial(_commit, run, config, plan.identity, models, trained, optimizer, scaler)
    preview_of = functools.partial(_preview, run, config, plan.previews, models, device, dtype)

    # 4. Loop: one pass is one optimizer step. Commit first, preview after, so that no preview can cost a run.
    if done == 0:
        preview_of(0)
    before = _weight_norms(parameters)
    log = Log(run, done, total, config.log_interval, make_tracker(config, run, done))
    with stop_requests() as stop, out_of_memory_is_a_sentence():
        for step in range(done + 1, total + 1):
            rate = learning_rate(step - 1)
            losses, grad_norm = train_step(models, pools, plan.order, optimizer, scaler, config, dtype, step, rate)
            log.add(step, losses, grad_norm, rate)
            if stop.made:
                print(f"\nstopping: the state of step {step} is being saved; to stop again would lose it")
                commit_of(step)
                log.close()
                raise KeyboardInterrupt(
                    f"stopped after step {step} of {total}; its state is saved, train again to go on"
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
    prompts = ", or: ".join(first_prompts(plan.instance, plan.concepts))
    print(f"{total} of {total} steps are done; to see what was learnt, use the prompt: {prompts}")
    return model


def train_step(
    models: Models,
    pools: list[Pool],
    order: Order,
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
    prediction_type, alphas_cumprod = noise_scheduler.config.prediction_type, noise_scheduler.alphas_cumprod
    noising = Noising(len(alphas_cumprod), config.noise_offset, config.input_perturbation, config.caption_dropout)
    losses = torch.zeros(3, device=unet.device)
    for number in range(passes):
        samples = range(number * size, (number + 1) * size)
        # One batch, or with buckets one for each size among these samples: their losses add up to the mean.
        for batch in draw_batches(pools, order, step, samples, noising):
            noisy_latents = add_noise(batch.latents, batch.input_noise, batch.timesteps, alphas_cumprod)
            target = noise_target(prediction_type, batch.latents, batch.noise, batch.timesteps, alphas_cumprod)
            with autocast(unet.device, dtype):
                text = encode_prompts(text_encoder, batch.prompts) if config.train_text_encoder else batch.prompts
                model_pred = unet(noisy_latents, batch.timesteps, text).sample
            errors = per_sample_loss(model_pred, target, config.loss_type, config.huber_delta)
            if config.min_snr_gamma:
                errors *= snr_weights(batch.timesteps, alphas_cumprod, config.min_snr_gamma, prediction_type)
            parts = prior_preservation_loss(errors, batch.instances, batch.pairs, config.prior_loss_weight)
            scaler.scale(parts[0] / passes).backward()
            losses += torch.stack(parts).detach() / passes
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    set_learning_rate(optimizer, learning_rate)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return losses, grad_norm


def _load(config: TrainConfig) -> Models:
    """The five parts, checked against the settings once more: of a Hugging Face model nothing was known before."""
    models = load_models(
        config.pretrained_model_name_or_path,
        config.revision,
        config.tokenizer_name,
        config.pretrained_vae_name_or_path,
    )
    check_resolution(config.resolution, models.facts)
    check_zero_terminal_snr(config.rescale_zero_terminal_snr, models.facts)
    if config.rescale_zero_terminal_snr:
        with_zero_terminal_snr(models)
    return models


def _trained_parts(config: TrainConfig, models: Models, device: torch.device) -> dict[str, torch.nn.Module]:
    """The parts that are trained, on the device and ready for it, by the name of their folder."""
    trained = {"unet": models.unet}
    if config.train_text_encoder:
        trained["text_encoder"] = models.text_encoder
    for module in trained.values():
        module.requires_grad_(True).train().to(device)
        if config.gradient_checkpointing and hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing()
        elif config.gradient_checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": False})
    return trained


def _require_run_space(run: Path, config: TrainConfig, models: Models, parameters: list[torch.nn.Parameter]) -> None:
    """Raise DbkitError unless the disk holds the states (two, while one replaces the other) and the usable weights."""
    state = sum(4 * p.numel() for p in parameters) + state_bytes(config.chosen_optimizer, parameters)
    everything = (models.unet, models.text_encoder, models.vae)
    weights = sum(p.numel() for module in everything for p in module.parameters())
    usable = weights * (4 if config.save_precision == "fp32" else 2)
    kept = config.checkpoints_total_limit + 1 if config.save_model_every_n_steps else 0
    there = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) if run.exists() else 0
    require_space(run, max(state, 2 * state + (kept + 1) * usable - there), "this run")


def _make_pools(config: TrainConfig, models: Models, plan: RunPlan, device: torch.device) -> list[Pool]:
    """Encode images, and prompts unless their encoder is trained; then free the device of what did it."""
    import torch

    models.noise_scheduler.alphas_cumprod = models.noise_scheduler.alphas_cumprod.to(device)
    models.vae.to(device)
    models.text_encoder.to(device)
    distinct = list(dict.fromkeys(prompt for e in [*plan.instance, *plan.class_set] for prompt in e.prompts))
    distinct += [""] if config.caption_dropout and "" not in distinct else []
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    _say_tokens(models, plan.concepts, distinct)
    prompts = tokenize(models.tokenizer, distinct).to(device)
    if not config.train_text_encoder:
        with torch.no_grad():
            prompts = torch.cat([encode_prompts(models.text_encoder, row[None]) for row in prompts])
        models.text_encoder.to("cpu")
    pools = []
    for role, examples in (("instance", plan.instance), ("class", plan.class_set)):
        if examples:
            latents, places = encode_images(models.vae, examples, device)
            prompt_rows = [[row_of[prompt] for prompt in example.prompts] for example in examples]
            pools.append(Pool(role, latents, places, prompts, prompt_rows, row_of.get("", 0)))
    models.vae.to("cpu")
    return pools


def _say_tokens(models: Models, concepts: list[Concept], prompts: list[str]) -> None:
    """Say how the model reads the prompts: each concept's identifier, and which prompts are cut."""
    with quiet():
        for concept in concepts:
            if concept.instance_prompt and concept.class_prompt:
                print(describe(models.tokenizer, concept.instance_prompt, concept.class_prompt))
        lengths = [len(ids) for ids in models.tokenizer(prompts).input_ids]
    most = min(models.tokenizer.model_max_length, 77)
    print(f"the first prompt has {lengths[0] - 2} tokens; the model reads at most {most - 2}")
    for prompt, length in zip(prompts, lengths):
        if length > most:
            print(f"cut after {most - 2} of {length - 2} tokens: {prompt}")


def _commit(
    run: Path,
    config: TrainConfig,
    identity: dict[str, Any],
    models: Models,
    trained: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    step: int,
    finished: bool = False,
) -> Path:
    """Commit the state to resume from, then usable weights: a checkpoint, or the finished model. Returns its folder."""
    for part, module in trained.items():
        if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
            raise DbkitError(
                f"the {part} has weights that are not numbers at step {step}, and nothing was saved; lower "
                "learning_rate and train again, which continues from the last good state"
            )
    others = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    state = step_folder(run / "resume", step)
    # A whole state of this step is the one that was continued from: it stays, for there is no other one.
    if find_fault(state, step=step):
        commit(state, step, lambda folder: save_state(folder, trained, others), identity)
    rotate(run / "resume", step, keep=1)
    if not finished and step < config.save_min_steps:
        return state
    target = run / "model" if finished else step_folder(run / "checkpoints", step)
    commit(target, step, lambda folder: save_models(models, folder, config.save_precision), identity)
    if (run / "checkpoints").exists():
        rotate(run / "checkpoints", step, config.checkpoints_total_limit)
    return target


def _preview(
    run: Path,
    config: TrainConfig,
    prompts: list[str],
    models: Models,
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
            guidance_scales=(config.guidance_scale,),
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
    except DbkitError as error:
        print(f"no preview at step {step}: {error}")


def _weight_norms(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """One number for each tensor, by which a change shows."""
    import torch

    return torch.stack([parameter.detach().norm() for parameter in parameters])
