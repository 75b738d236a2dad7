"""Train the embedded ResNet-20 on scikit-learn's digits and write the weights that the package ships.

    python examples/train_digits.py --output dfs_cli/models/weights/resnet20_digits.safetensors

Takes about three minutes on two CPU cores. The validation split is used once, at the end; nothing is chosen on it.
"""

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.scheduler import CosineLRScheduler
from torch.nn import functional as F
from torch.utils.data import DataLoader

import dfs_cli.models  # noqa: F401  # registers the CIFAR and digits ResNets
from dfs_cli.data.digits import Digits
from dfs_cli.data.images import Images, UnreadableLog, collate
from dfs_cli.data.loading import eval_loader
from dfs_cli.data.preprocessing import eval_transform, resolve_preprocessing
from dfs_cli.evaluation.evaluate import evaluate_accuracy


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Each image moved by up to one pixel, the border repeated."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    height, width = images.shape[-2:]
    rows, columns = torch.randint(0, 3, (2, len(images))).tolist()
    return torch.stack([p[:, r : r + height, c : c + width] for p, r, c in zip(padded, rows, columns, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("resnet20_digits.safetensors"))
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = timm.create_model("resnet20_digits", pretrained=False)
    transform = eval_transform(resolve_preprocessing(model))
    train = DataLoader(
        Images(Digits("train"), transform), batch_size=64, shuffle=True, drop_last=True, collate_fn=collate
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs, warmup_t=5, warmup_lr_init=0.01)
    for epoch in range(args.epochs):
        scheduler.step(epoch)
        model.train()
        total = 0.0
        for batch in train:
            loss = F.cross_entropy(model(shifted(batch.images)), batch.targets, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss)
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}: loss {total / len(train):.3f}", flush=True)
    model.eval()
    for split in ("calibration", "validation"):
        images = Images(Digits(split), transform)
        top1, _ = evaluate_accuracy(
            model, eval_loader(images, 256, 0), torch.device("cpu"), UnreadableLog(split, len(images))
        )
        print(f"{split} top-1: {top1:.2f}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.output, metadata={"format": "pt"})
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
