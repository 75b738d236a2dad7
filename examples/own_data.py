"""Convert a network on your own images: class folders in train/ and val/.

    python examples/own_data.py                                   # digits, written out as image files
    python examples/own_data.py --data DIR --model resnet50 --checkpoint weights.safetensors
    python examples/own_data.py --data cifar10 --model resnet20_cifar --checkpoint resnet20_cifar10.safetensors

It runs ``dfs convert`` and ``dfs eval`` as a shell would, and prints the figures.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


def write_digits(root: Path) -> Path:
    """The embedded digits as PNG files in ImageFolder layout, to stand in for images of your own."""
    from dfs_cli.data.digits import Digits

    for split, parts in (("train", ("train", "calibration")), ("val", ("validation",))):
        for part in parts:
            digits = Digits(part)
            for i in range(len(digits)):
                image, target = digits[i]
                folder = root / split / f"digit_{target}"
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{part}_{i}.png")
    return root


def dfs(*arguments: str) -> str:
    """Run a dfs command; its progress goes to stderr."""
    command = [sys.executable, "-m", "dfs_cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="resnet20_digits")
    parser.add_argument("--checkpoint")
    parser.add_argument("--budget", default="0.1")
    parser.add_argument("--output", type=Path, default=Path("own_data.safetensors"))
    args, others = parser.parse_known_args()

    data = args.data
    if data is None:
        data = write_digits(args.output.parent / "digits_as_files")
        others += ["--hflip", "0", "--batch-size", "64"]
    weights = ["--checkpoint", args.checkpoint] if args.checkpoint else []
    dfs(
        "convert",
        args.model,
        "--budget",
        args.budget,
        "--data",
        str(data),
        *weights,
        "--output",
        str(args.output),
        *others,
    )
    record = json.loads(dfs("eval", str(args.output), "--data", str(data), "--json"))
    print(
        f"top-1 {record['top1']:.2f} % at cost {record['cost']:.4f} (budget {record['budget']}), {record['images']} images"
    )


if __name__ == "__main__":
    main()
