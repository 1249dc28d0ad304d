"""train(): the file to read first. It goes top to bottom: data, model, cache, loop, commit, finished model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dbkit import processes, zero
from dbkit.cache import Batch, Noising, Pool, draw_batches, encode_images
from dbkit.encoding import files_near
from dbkit.errors import DbkitError, Stopped, counted
from dbkit.examples import first_prompts
from dbkit.files import stop_requests
from dbkit.hub import upload_model
from dbkit.identifier import how_read
from dbkit.judge import Judge
from dbkit.keeper import Keeper, copy_home
from dbkit.libraries import choose_device, choose_dtype
from dbkit.log import Log
from dbkit.losses import add_noise, noise_target, per_sample_loss, prior_preservation_loss, snr_weights
from dbkit.models import (
    Models,
    check_resolution,
    check_zero_terminal_snr,
    load_base,
)
from dbkit.optimizers import learning_rates, set_learning_rate
from dbkit.order import Order
from dbkit.plan import out_of_memory_is_told, say_estimate, watch
from dbkit.planning import RunPlan, begin
from dbkit.preview import make_preview
from dbkit.processes import on_main
from dbkit.resume import finished_in, locked, was_begun_over
from dbkit.run_folder import preview_of
from dbkit.sampling import autocast, borrowed
from dbkit.saves import Due, Saves
from dbkit.settings import configured_by, replace
from dbkit.state import State, make_state, read_state, rest_text_encoder
from dbkit.text import encode_prompts, own_tokens, tokenize
from dbkit.trackers import make_tracker
from dbkit.train_config import TrainConfig
from dbkit.watch import screen_of
from dbkit.workspace import default_folder, working_folder

if TYPE_CHECKING:
    import torch


# Samples of the fixed-noise losses: less than a step's work at the usual settings of a save every 200 steps.
_FIXED_SAMPLES = 8


@configured_by(TrainConfig)
def train(config: TrainConfig) -> Path:
    """Fine-tune Stable Diffusion on a few images of a subject (DreamBooth, arXiv:2208.12242), or natively on captions.

    Continues from the newest valid state in output_dir if there is one. Returns the folder of the finished model, in
    diffusers layout. Interrupted, it commits its state and raises KeyboardInterrupt; called again, it goes on.
    """
    method = "dreambooth" if config.with_prior_preservation else "native"
    began = time.monotonic()
    home = (config.output_dir or default_folder() / "runs" / method).absolute()
    run = working_folder(home, config.local_dir)
    device = processes.start(choose_device(config.device), config.local_rank)
    with locked(run, home) if processes.rank() == 0 else processes.silent():
        return _train(config, run, home, device, began)


def _train(config: TrainConfig, run: Path, home: Path, device: torch.device, began: float) -> Path:
    # 1. Plan: what can be wrong with settings and data is found and shown here, before a model is loaded.
    dtype = choose_dtype(config.mixed_precision, device, config.memory)
    config, plan = on_main(begin, config, run, home, device, dtype)
    place = on_main(copy_home, config, run, home) if plan.done >= plan.total else run
    if plan.done >= plan.total and (made := on_main(finished_in, run, place, plan.done)):
        print(f"{counted(plan.done, 'step')} done already; to train further, raise max_train_steps above that")
        on_main(upload_model, config, made, plan.done, first_prompts(plan.instance, plan.concepts))
        return made / "model"
    # A run that was stopped beyond a total that is lower now only lacks its finished model.
    done, total = plan.done, max(plan.total, plan.done)
    on_main(_write_settings, config, run, home)
    on_main(say_estimate, config, device, dtype)

    # 2. Model and cache: images are encoded once, and only if their latents are not found, by a VAE that leaves the
    # device before anything else is put there.
    models = _load(config)
    pools = _make_pools(config, models, plan, device, files_near(run, home))

    # 3. State: the trained parts and their optimizer, as the saved state has them if there is one.
    state = make_state(config, models, device, dtype, plan.optimizer_library)
    assert config.memory == "tiny" or all(parameter.dtype.itemsize == 4 for parameter in state.parameters)
    if plan.saved:
        read_state(state, plan.saved)
    judge = Judge(config, run, plan, functools.partial(_fixed_losses, state, pools, plan.order, config, device))
    look = functools.partial(on_main, _look, run, config, plan.previews, state, device, judge)

    # 4. Loop: one pass is one optimizer step. Commit first, look after, so that no preview can cost a run.
    saves = Saves(config, done, total, session=began)
    keeper = Keeper(config, run, home, plan.identity, state, saves)
    before = _weight_norms(state)
    learning_rate = learning_rates(config, total)
    tracker, screen = make_tracker(config, run, done), screen_of(run, home, done, total)
    log = Log(run, done, total, config.log_interval, tracker, plan.order.per_step, screen)
    with (
        screen or contextlib.nullcontext(),
        keeper,
        stop_requests() as stop,
        out_of_memory_is_told(config, state, device),
    ):
        if saves.weights(done):  # a kill may have come before they were saved, or seen
            keeper.save(done, weights=True)
        if done == 0 or saves.weights(done):
            look(done)
        saves.start()
        for step in range(done + 1, total + 1):
            if step > plan.rest_after and pools[0].text_is_trained:
                pools = rest_text_encoder(state, pools)
            rate = learning_rate(step - 1)
            losses, grad_norm = train_step(state, pools, plan.order, config, step, rate)
            log.add(step, losses, grad_norm, rate)
            watch(step - done, config, device, dtype)
            due = keeper.due(step, stop.made)
            if due is Due.STOP:
                print(f"\nstopping: the state of step {step} is being saved; to stop again would lose it")
                keeper.save(step, weights=True, last=True)
                log.close()
                raise Stopped(f"stopped after step {step} of {total}; {keeper.what_is_saved()}")
            if due:
                keeper.save(step, weights=due is Due.WEIGHTS)
            if due is Due.WEIGHTS:
                look(step)
        # 5. Finished model.
        if done < total and not processes.any_of(bool((_weight_norms(state) != before).any())):
            raise DbkitError(f"{counted(total - done, 'step')} changed no weight; raise learning_rate")
        # The model comes last: a run that has it lacks nothing. Until then the state is what counts.
        keeper.save(total, last=True)
        log.close()
        look(total)
        keeper.finish(total)
    made = on_main(finished_in, run, keeper.place, total)
    if made is None:
        raise DbkitError(f"the finished model in {run} has changed since it was written; the disk may be failing")
    prompts = first_prompts(plan.instance, plan.concepts)
    print(f"{total} of {total} steps are done; to see what was learnt, use the prompt: {', or: '.join(prompts)}")
    if processes.any_of(stop.made):  # too late for this training, and in time for what would come after it
        raise Stopped(f"all {total} steps were done already; the model is in {made / 'model'}")
    on_main(upload_model, config, made, total, prompts)
    return made / "model"


def _write_settings(config: TrainConfig, run: Path, home: Path) -> None:
    """Keep the settings with the run, without the place that a launcher gave this process and the session's end."""
    # That start_over began the run is kept, so that the same settings do not move it aside the next time.
    over = config.start_over or was_begun_over(config, run, home)
    replace(config, start_over=over, local_rank=-1, session_minutes=None).save(run / "settings.yaml")


def train_step(
    state: State, pools: list[Pool], order: Order, config: TrainConfig, step: int, learning_rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step: gradient_accumulation_steps forward and backward passes, clip, update.

    With memory tiny the last backward pass clips and updates. Returns (loss, instance loss, class loss) as a tensor of
    shape (3,) and the gradient norm, both still on the device.
    """
    import torch

    noise_scheduler, optimizer, scaler = state.models.noise_scheduler, state.optimizer, state.scaler
    size, passes = config.train_batch_size, config.gradient_accumulation_steps
    prediction_type, alphas_cumprod = noise_scheduler.config.prediction_type, noise_scheduler.alphas_cumprod
    noising = Noising(len(alphas_cumprod), config.noise_offset, config.input_perturbation, config.caption_dropout)
    device, world, rank = alphas_cumprod.device, processes.world(), processes.rank()
    losses = torch.zeros(3, device=device)
    set_learning_rate(optimizer, learning_rate)
    for number in range(passes):
        first = (number * world + rank) * size
        # One batch, or with buckets one for each size among these samples: their losses add up to the mean.
        batches = draw_batches(pools, order, step, range(first, first + size), noising)
        for batch in batches:
            errors = _errors(state.models, batch, config, state.dtype)
            if config.min_snr_gamma:
                errors *= snr_weights(batch.timesteps, alphas_cumprod, config.min_snr_gamma, prediction_type)
            parts = prior_preservation_loss(errors, batch.instances, batch.pairs, config.prior_loss_weight)
            last = number == passes - 1 and batch is batches[-1]
            if state.engine:
                zero.backward(state.engine, parts[0] / passes, last)
            else:
                processes.last_backward(state.trained.values(), last)
                if last and config.memory == "tiny":
                    optimizer.begin(step)
                scaler.scale(parts[0] / passes).backward()
            losses += torch.stack(parts).detach() / passes
    if state.engine:
        return processes.mean(losses), zero.step(state.engine)
    if config.memory == "tiny":
        return losses, optimizer.end()
    processes.average_gradients(state.parameters)
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(state.parameters, config.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if state.ema:
        state.ema.update(step)
    return processes.mean(losses), processes.whole(grad_norm)


def _errors(models: Models, batch: Batch, config: TrainConfig, dtype: torch.dtype) -> torch.Tensor:
    """The error of each sample of a batch, shape (B,): what the U-Net sees, what it predicts, and what it should."""
    import torch

    prediction_type = models.noise_scheduler.config.prediction_type
    alphas_cumprod = models.noise_scheduler.alphas_cumprod
    seen = add_noise(batch.latents, batch.input_noise, batch.timesteps, alphas_cumprod)
    if batch.hidden is not None:
        seen = torch.cat([seen, batch.hidden], dim=1)
    target = noise_target(prediction_type, batch.latents, batch.noise, batch.timesteps, alphas_cumprod)
    with autocast(seen.device, dtype):
        # States of a text encoder that rests, or token ids.
        as_states = batch.prompts.is_floating_point()
        text = batch.prompts if as_states else encode_prompts(models.text_encoder, batch.prompts)
        model_pred = models.unet(seen, batch.timesteps, text, encoder_attention_mask=batch.own_tokens).sample
    return per_sample_loss(model_pred, target, config.loss_type, config.huber_delta, batch.weights)


def _load(config: TrainConfig) -> Models:
    """The five parts, checked against the settings once more: of a Hugging Face model nothing was known before."""
    models = load_base(config)
    check_resolution(config.resolution, models.facts)
    check_zero_terminal_snr(config.rescale_zero_terminal_snr, models.facts)
    return models


def _make_pools(
    config: TrainConfig, models: Models, plan: RunPlan, device: torch.device, files: Sequence[Path] = ()
) -> list[Pool]:
    """Encode the images and free the device of the VAE; prompts stay token ids until the text encoder rests."""
    import torch

    models.noise_scheduler.alphas_cumprod = models.noise_scheduler.alphas_cumprod.to(device)
    distinct = list(dict.fromkeys(prompt for e in [*plan.instance, *plan.class_set] for prompt in e.prompts))
    distinct += [""] if config.caption_dropout and "" not in distinct else []
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    print("\n".join(how_read(models.tokenizer, plan.concepts, distinct)))
    prompts = tokenize(models.tokenizer, distinct).to(device)
    own = None if config.pad_tokens else own_tokens(models.tokenizer, distinct).to(device)
    sets = {role: part for role, part in (("instance", plan.instance), ("class", plan.class_set)) if part}
    encoded = encode_images(models, list(sets.values()), config, device, files)
    models.vae.to("cpu")
    torch.cuda.empty_cache()  # blocks of sizes that training does not ask for
    pools = []
    for (role, examples), (latents, places) in zip(sets.items(), encoded):
        prompt_rows = [[row_of[prompt] for prompt in example.prompts] for example in examples]
        pools.append(Pool(role, latents, places, prompts, prompt_rows, row_of.get("", 0), own))
    return pools


def _fixed_losses(
    state: State, pools: list[Pool], order: Order, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """The losses of what would be saved now, at noise and timesteps that are the same whenever this is asked.

    pools are those with token ids, so that a text encoder that rests makes no difference.
    """
    import torch

    models, size = state.shown, min(config.train_batch_size, _FIXED_SAMPLES)
    noising = Noising(len(models.noise_scheduler.alphas_cumprod))
    # Noise that no step is trained with.
    order = dataclasses.replace(order, seed=order.seed ^ 1)
    losses: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    with state.averaged(), borrowed(models, device), torch.no_grad():
        for first in range(0, _FIXED_SAMPLES, size):
            for batch in draw_batches(pools, order, 1, range(first, first + size), noising):
                errors = _errors(models, batch, config, state.dtype)
                losses[0].append(errors[: batch.instances])
                losses[1].append(errors[batch.instances :])
    names = ("validation_loss", "class_loss")[: len(pools)]
    return {name: torch.cat(parts).mean().item() for name, parts in zip(names, losses)}


def _look(
    run: Path,
    config: TrainConfig,
    prompts: list[str],
    state: State,
    device: torch.device,
    judge: Judge,
    step: int,
) -> None:
    """Preview pictures of a step, and what is measured of it."""
    _preview(run, config, prompts, state, device, step)
    judge(step)


def _preview(
    run: Path,
    config: TrainConfig,
    prompts: list[str],
    state: State,
    device: torch.device,
    step: int,
) -> None:
    """Preview pictures of the live model. Too little memory for them is said, and training goes on."""
    import torch

    output = preview_of(run, step)
    # Those of a step from which the run goes on were made already, if no kill came between.
    if not config.auto_test_model:
        return
    try:
        if step and output.exists():
            return
        with state.averaged():
            make_preview(
                state.shown,
                prompts,
                output=output,
                seeds=range(config.test_seed, config.test_seed + config.test_num_per_prompt),
                guidance_scales=(config.guidance_scale,),
                negative_prompt=config.test_negative_prompt,
                side=config.resolution,
                steps=25,
                batch_size=config.sample_batch_size,
                device=device,
                dtype=state.dtype,
            )
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        print(f"no preview at step {step}: too little GPU memory; set sample_batch_size to 1 or auto_test_model off")
    except (DbkitError, OSError) as error:
        print(f"no preview at step {step}: {error}")


def _weight_norms(state: State) -> torch.Tensor:
    """One number for each tensor, by which a change shows."""
    import torch

    own = [p.to_local() if hasattr(p, "to_local") else p for p in state.parameters]
    norm = functools.partial(torch.linalg.vector_norm, dtype=torch.float32)
    return torch.stack([norm(parameter.detach()).cpu() for parameter in own])
