"""Train a CIFAR ResNet on a folder of images, optionally grown from a shallower one's weights.

    python examples/train_cifar.py --model resnet32_cifar --data cifar10/ \\
        --grow resnet20_cifar10.safetensors --epochs 8 --lr 0.03 --output resnet32_cifar10.safetensors

Growing (Chen et al., "Net2Net", ICLR 2016) copies the shallower network's blocks and adds blocks whose residual branch
is zero, so that the deeper network starts by computing what the shallower one does; a few epochs then put the new
blocks to use. The validation split is used once, at the end.
"""

import argparse
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.resnet import BasicBlock
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional as F

import dfs_cli.models  # noqa: F401  # registers the CIFAR and digits ResNets
from dfs_cli.config import DataConfig
from dfs_cli.data.images import UnreadableLog
from dfs_cli.data.loading import EpochSampler, eval_loader, train_loader
from dfs_cli.data.preprocessing import resolve_preprocessing, train_transform
from dfs_cli.data.splits import open_splits
from dfs_cli.evaluation.evaluate import evaluate_accuracy


def grow(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give ``model`` a shallower network's weights, and its further blocks a residual branch of zero."""
    for name, module in model.named_modules():
        if isinstance(module, BasicBlock) and f"{name}.conv1.weight" not in weights:
            nn.init.zeros_(module.get_submodule("bn2").get_parameter("weight"))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or not all(name.startswith("layer") for name in missing):
        raise SystemExit(
            f"the weights do not belong to a shallower network of this kind: {[*unexpected, *missing][:3]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32_cifar")
    parser.add_argument("--data", required=True)
    parser.add_argument("--grow", type=Path, help="weights of a shallower network to start from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = timm.create_model(args.model, pretrained=False)
    if args.grow:
        grow(model, load_file(args.grow))
    preprocessing = resolve_preprocessing(model)
    splits = open_splits(DataConfig(data_dir=args.data), preprocessing, args.seed)
    images = splits.train.with_transform(train_transform(preprocessing, hflip=0.5, min_crop=0.6))
    sampler = EpochSampler(len(images), args.seed)
    loader = train_loader(images, sampler, batch_size=128, workers=2, pin=False)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=args.epochs * len(loader), warmup_t=100, warmup_lr_init=args.lr / 10, t_in_epochs=False
    )
    steps, began = 0, time.monotonic()
    for epoch in range(args.epochs):
        sampler.epoch = epoch
        images.draw = sampler.draw
        model.train()
        correct = seen = 0
        for batch in loader:
            logits = model(batch.images.to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            scheduler.step_update(steps)
            correct += int((logits.argmax(dim=1) == batch.targets).sum())
            seen += len(batch.targets)
        minutes = (time.monotonic() - began) / 60
        print(f"epoch {epoch + 1}: training accuracy {100 * correct / seen:.2f}, {minutes:.1f} min", flush=True)
    model.eval()
    log = UnreadableLog("validation", len(splits.validation))
    top1, _ = evaluate_accuracy(model, eval_loader(splits.validation, 256, 2), torch.device("cpu"), log)
    print(f"validation top-1: {top1:.2f}")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, args.output, metadata={"format": "pt"})
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
