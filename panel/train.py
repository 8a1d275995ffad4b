"""Trains the built-in model on the CPU, in three steps.

    python -m panel.dataset --out DATA --shards 40
    python -m panel.train --data DATA --run RUN --step tower --pictures 100000
    python -m panel.train --data DATA --run RUN --step decoder --pictures 34000
    python -m panel.train --data DATA --run RUN --step answers --pictures 43000 --out panel/checkpoint

A step goes on where it stopped, from `RUN/<step>.pt`; each starts from the one before it. `--from panel/checkpoint`
lets the first step start from a trained model instead of from nothing, for another round of all three.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import distributed, multiprocessing, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from panel.dataset import SHARD_LENGTH, Shards
from panel.decoder_step import Packer, answer_loss
from panel.model import IMAGE_TOKENS, build_model, image_features_BTC, pixels_BCHW, save_checkpoint
from panel.tokens import build_tokenizer
from panel.tower_step import Heads, augment, heads_accuracy, heads_loss, labels_of

BATCH = 32
WARM_UP = 1600  # pictures
LEARNING_RATES = {
    "tower": {"tower": 1e-3, "heads": 1e-3},
    # The tower keeps learning from its heads, slowly enough for the decoder to follow.
    "decoder": {"tower": 3e-4, "heads": 3e-4, "decoder": 1e-3},
    # The tower hardly moves, and needs no heads any more.
    "answers": {"tower": 1e-4, "decoder": 6e-4},
}
STARTS_FROM = {"tower": None, "decoder": "tower", "answers": "decoder"}
HEADS_WEIGHT = 0.3  # of the heads' loss in the decoder step
LOG_EVERY = 40  # batches
SAVE_EVERY = 200
RENDEZVOUS = "rendezvous"  # file in the run's folder through which workers find each other


@dataclass
class Run:
    """All that a step trains and resumes."""

    step: str
    tokenizer: PreTrainedTokenizerFast
    model: LlavaForConditionalGeneration
    heads: Heads
    optimizer: torch.optim.Optimizer
    worker: int = 0
    workers: int = 1  # processes that share every batch
    seen: int = 0  # pictures trained on in this step
    seconds: float = 0.0  # spent in this step

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seen": self.seen,
            "seconds": self.seconds,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)


def _optimizer(step: str, model: LlavaForConditionalGeneration, heads: Heads) -> torch.optim.Optimizer:
    """AdamW with a learning rate per part; weight decay on matrices only."""
    inner = model.model
    parts = {
        "tower": inner.vision_tower.parameters(),
        "heads": heads.parameters(),
        "decoder": [*inner.multi_modal_projector.parameters(), *inner.language_model.parameters()],
    }
    groups = []
    for name, rate in LEARNING_RATES[step].items():
        parameters = list(parts[name])
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in parameters if parameter.ndim < 2]
        groups.append({"params": matrices, "weight_decay": 0.05, "peak": rate})
        groups.append({"params": vectors, "weight_decay": 0.0, "peak": rate})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def open_run(folder: Path, step: str, checkpoint: Path | None = None) -> Run:
    """Resume a step, or start it from the step before; the first from the weights of `checkpoint`, if one is given."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    heads = Heads(IMAGE_TOKENS, model.config.vision_config.hidden_size)
    run = Run(step, tokenizer, model, heads, _optimizer(step, model, heads))
    own = folder / f"{step}.pt"
    before = STARTS_FROM[step] and folder / f"{STARTS_FROM[step]}.pt"
    if before and not own.exists() and not before.exists():
        raise FileNotFoundError(f"the step {step} starts from {before}, which is missing: run that step first")
    if own.exists() or before:
        state = torch.load(own if own.exists() else before)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        if own.exists():
            run.optimizer.load_state_dict(state["optimizer"])
            run.seen, run.seconds = state["seen"], state["seconds"]
    elif checkpoint:
        trained = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
    return run


def learning_rate_factor(seen: int, total: int) -> float:
    """Linear warm-up, then a cosine down to zero at `total` pictures."""
    if seen < WARM_UP:
        return (seen + BATCH) / (WARM_UP + BATCH)
    progress = min(1.0, (seen - WARM_UP) / max(1, total - WARM_UP))
    return 0.5 * (1 + math.cos(math.pi * progress))


def draw_batch(shards: Shards, seen: int, share: slice) -> tuple[np.ndarray, np.ndarray]:
    """Indices and uint8 pictures of the batch after `seen` pictures; the first shard is held out."""
    rng = np.random.default_rng(seen)
    indices = rng.integers(SHARD_LENGTH, len(shards), BATCH)[share]
    return indices, shards.images(indices)


def average_gradients(parameters: list[nn.Parameter], workers: int) -> None:
    """Give every worker the mean of all workers' gradients."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= workers
    for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter)


def train_batch(run: Run, packer: Packer, shards: Shards, total: int) -> dict[str, float]:
    """One optimizer step; returns the losses."""
    share = BATCH // run.workers
    indices, images_BCHW = draw_batch(shards, run.seen, slice(run.worker * share, (run.worker + 1) * share))
    truths = [shards.truths[i] for i in indices]
    rng = random.Random(run.seen + run.worker)
    factor = learning_rate_factor(run.seen, total)
    pixels, motions_B23 = augment(pixels_BCHW(torch.from_numpy(images_BCHW)), rng, strength=min(1.0, 2 * factor))
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * factor

    if run.step == "answers":
        features_BTC = image_features_BTC(run.model, pixels)
        loss = answer_loss(run.model, features_BTC, packer.pack(truths, rng))
        losses = {"answers": loss}
    else:
        features_BTC = image_features_BTC(run.model, pixels)
        labels = labels_of(truths, [shards.landmarks[i] for i in indices], motions_B23)
        losses = heads_loss(run.heads(features_BTC), labels)
        loss = sum(losses.values())
        if run.step == "decoder":
            losses["answers"] = answer_loss(run.model, features_BTC, packer.pack(truths, rng))
            loss = losses["answers"] + HEADS_WEIGHT * loss
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    if run.workers > 1:
        average_gradients(parameters, run.workers)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    run.optimizer.step()
    run.seen += BATCH
    return {name: value.item() for name, value in losses.items()}


@torch.no_grad()
def held_out(run: Run, packer: Packer, shards: Shards, count: int = 256) -> dict[str, object]:
    """Accuracy of both heads, and after the first step the loss of the answers, on pictures of the first shard."""
    truths = shards.truths[:count]
    pixels = pixels_BCHW(torch.from_numpy(shards.images(np.arange(count))))
    features_BTC = image_features_BTC(run.model, pixels)
    labels = labels_of(truths, shards.landmarks[:count], np.tile(np.eye(2, 3), (count, 1, 1)))
    logits = run.heads(features_BTC)
    report: dict[str, object] = {name: heads_accuracy(logits[name], labels) for name in ("all_tokens", "mean_token")}
    if run.step != "tower":
        report["answers"] = round(answer_loss(run.model, features_BTC, packer.pack(truths, random.Random(0))).item(), 4)
    return report


def train(run: Run, data: Path, path: Path, total: int) -> None:
    """Train until `total` pictures were seen in this step; saves to `path` as it goes."""
    packer = Packer(run.tokenizer, run.step)
    shards = Shards(data)
    average: dict[str, float] = {}
    while run.seen < total:
        started = time.monotonic()
        losses = train_batch(run, packer, shards, total)
        run.seconds += time.monotonic() - started
        average = {name: 0.9 * average.get(name, value) + 0.1 * value for name, value in losses.items()}
        batches = run.seen // BATCH
        if run.worker > 0:
            continue
        if batches % LOG_EVERY == 0:
            shown = " ".join(f"{name} {value:.3f}" for name, value in average.items())
            print(f"{run.step} {run.seen}/{total} {run.seen / run.seconds:.1f}/s {shown}", flush=True)
        if batches % SAVE_EVERY == 0 or run.seen >= total:
            run.save(path)
        if batches % (2 * SAVE_EVERY) == 0 or run.seen >= total:
            minutes = run.seconds / 60
            print(f"{run.step} {run.seen} {minutes:.1f} min held out {held_out(run, packer, shards)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the built-in model.")
    parser.add_argument("--data", type=Path, required=True, help="folder of panel.dataset's shards")
    parser.add_argument("--run", type=Path, required=True, help="folder of the resumable state")
    parser.add_argument("--step", choices=tuple(LEARNING_RATES), required=True)
    parser.add_argument("--pictures", type=int, required=True, help="pictures to see in this step")
    parser.add_argument("--from", dest="checkpoint", type=Path, help="trained model for the first step to start from")
    parser.add_argument("--out", type=Path, help="write the model as a checkpoint there when the step is done")
    parser.add_argument("--workers", type=int, default=1, help="processes that share every batch, a thread each")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    if args.workers == 1:
        work(0, args)
    else:
        (args.run / RENDEZVOUS).unlink(missing_ok=True)  # left over from an interrupted run
        multiprocessing.spawn(work, (args,), nprocs=args.workers)


def work(worker: int, args: argparse.Namespace) -> None:
    """One of the processes that train. Each runs on one thread: a step is a thousand small
    operations, and at every one of them two threads would wait for each other."""
    if args.workers > 1:
        torch.set_num_threads(1)
        address = f"file://{(args.run / RENDEZVOUS).resolve()}"
        distributed.init_process_group("gloo", init_method=address, rank=worker, world_size=args.workers)
    run = open_run(args.run, args.step, args.checkpoint)
    run.worker, run.workers = worker, args.workers
    train(run, args.data, args.run / f"{args.step}.pt", args.pictures)
    if args.out and worker == 0:
        save_checkpoint(run.model, run.tokenizer, args.out)


if __name__ == "__main__":
    main()
