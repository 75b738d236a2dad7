"""The library: plan, convert, save, load, evaluate, move to another budget, and use the network as any classifier.

python examples/python_api.py [--steps 100]
"""

import argparse
import tempfile
from pathlib import Path

import torch

import dfs_cli
from dfs_cli.records import StepRecord


class PrintEvery100(dfs_cli.Observer):
    """An observer is told about progress; show as much of it as you like."""

    def step(self, record: StepRecord) -> None:
        if record.step % 100 == 0:
            print(f"step {record.step}: loss {record.loss:.3f}, cost {record.cost:.4f}, target {record.target:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()

    model = dfs_cli.load_model("resnet20_digits")  # or any timm ResNet: timm.create_model("resnet50", pretrained=True)
    dynamic = dfs_cli.DynamicConfig(bits=(0, 2, 4, 8), gate="rnn")
    table = dfs_cli.plan(model, dynamic)
    print(f"{table.dense_macs / 1e6:.2f} MMACs; costs from {table.cheapest:.4f} to {table.dearest:.4f} can be reached")

    converted = dfs_cli.convert(
        model,  # left unchanged
        budget=0.05,
        data=dfs_cli.DataConfig(dataset="digits"),  # DataConfig(data_dir="imagenet") for class folders of your own
        dynamic=dynamic,
        tuning=dfs_cli.TuningConfig(steps=args.steps, batch_size=64, hflip=0.0),
        observer=PrintEvery100(),
    )
    print("budget kept:", converted.keeps_budget)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        dfs_cli.save(converted, path)
        loaded = dfs_cli.load(path)
    evaluation = dfs_cli.evaluate(loaded)
    report = dfs_cli.cost_report(converted)
    print(f"top-1 {report['top1_before']:.2f} -> {evaluation.top1:.2f} %, cost {evaluation.cost:.4f}")

    cheaper = dfs_cli.evaluate(dfs_cli.recalibrate(loaded, budget=0.02))  # without tuning
    print(f"moved to a budget of 0.02: top-1 {cheaper.top1:.2f} %, cost {cheaper.cost:.4f}")

    images = torch.rand(3, *loaded.manifest.preprocessing.input_size)
    with torch.no_grad():
        logits = loaded.network(images)
        decisions = loaded.network.run(images).decisions
    print("classes:", logits.argmax(1).tolist())
    print("bits of the first image:", decisions.bits(dynamic.bits)[0].tolist())
    print("cost of each image:", [round(cost, 4) for cost in loaded.manifest.table.cost(decisions).tolist()])
    for row in dfs_cli.profile(loaded)[:3]:
        print(f"{row['name']}: mean bits {row['mean_bits']:.2f}")


if __name__ == "__main__":
    main()
