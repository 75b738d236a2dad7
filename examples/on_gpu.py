"""What this project does on a GPU: tests, decisions beside the CPU's, speed of tuning and evaluation, a conversion
without images, the paper's protocol.

Results are written after each section, to a JSON file named after the card. A section that fails is recorded, and the others
run all the same. The real images are CIFAR-10's, as class folders in train/ and val/, with a ResNet-20 that knows them.

python examples/on_gpu.py --data cifar10 --checkpoint resnet20_cifar10.safetensors [--quick] [--only tuning throughput]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import dfs_cli
from dfs_cli.bench.clock import in_turns, quartiles, seconds_of
from dfs_cli.bench.tuning import bench_tuning
from dfs_cli.bench.workload import workload_of_model
from dfs_cli.config import GateKind
from dfs_cli.data.loading import eval_loader
from dfs_cli.data.preprocessing import resolve_preprocessing
from dfs_cli.data.splits import open_validation
from dfs_cli.freeze.batchnorm import fold_norms
from dfs_cli.presets import PRESETS

GPU = torch.device("cuda")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options:
    """What to run on, and how long."""

    data: str
    checkpoint: str
    quick: bool

    @property
    def tuning(self) -> dfs_cli.TuningConfig:
        """The recipe; when quick, a tenth of its steps."""
        workers = min(12, os.cpu_count() or 1)
        return dfs_cli.TuningConfig(steps=35 if self.quick else None, device="cuda", workers=workers)

    def convert(self, budget: float, dynamic: dfs_cli.DynamicConfig | None, spend: bool = False) -> dfs_cli.Converted:
        """The ResNet-20, tuned on the GPU."""
        model = dfs_cli.load_model("resnet20_cifar", checkpoint=Path(self.checkpoint))
        data = dfs_cli.DataConfig(data_dir=self.data)
        return dfs_cli.convert(model, budget, data, dynamic=dynamic, tuning=self.tuning, spend=spend)


def run_tests(options: Options) -> dict[str, Any]:  # noqa: ARG001
    """The tests that need a GPU."""
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-m", "cuda", "-n", "0", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tail = done.stdout.strip().splitlines()[-40:]
    return {"passed": done.returncode == 0, "summary": tail[-1] if tail else done.stderr[-2000:], "tail": tail}


def compare_decisions(options: Options) -> dict[str, Any]:
    """Decisions and answers for the same real images, on the GPU and on the CPU."""
    found = {}
    for gate, budget in (("probe", 0.03), ("rnn", 0.03)):
        dynamic = None if gate == "probe" else dfs_cli.DynamicConfig(gate="rnn")
        began = time.perf_counter()
        network, manifest = options.convert(budget, dynamic)
        seconds = time.perf_counter() - began
        images = open_validation(
            dfs_cli.DataConfig(data_dir=options.data, num_samples=1000), manifest.preprocessing, manifest.class_names
        )
        batches = [batch.images for batch in eval_loader(images, 250, 0)]
        there, here = _outputs(network, batches, GPU), _outputs(network, batches, torch.device("cpu"))
        lone = _outputs(network.to(GPU), [image[None] for image in batches[0]], GPU)
        assert manifest.validation is not None
        found[gate] = {
            "images": len(images),
            "same_decisions": _share(there[1], here[1]),
            "same_answers": _share(there[0].argmax(1), here[0].argmax(1)),
            "alone_and_in_a_batch_same_decisions": _share(there[1][: len(lone[1])], lone[1]),
            "largest_logit_difference": float((there[0] - here[0]).abs().max()),
            "top1": manifest.validation.top1,
            "cost": manifest.validation.cost,
            "budget": budget,
            "original_top1": manifest.source.top1,
            "convert_seconds": seconds,
        }
    return found


@torch.inference_mode()
def _outputs(network: dfs_cli.DynamicResNet, batches: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits (N, classes), and options of all passes (N, P L), -1 where a pass was not run."""
    network = network.to(device)
    outputs = [network.run(batch.to(device)) for batch in batches]
    options = [
        torch.cat([output.decisions.in_pass(i) for i in range(output.decisions.passes)], dim=1).cpu()
        for output in outputs
    ]
    widest = max(o.shape[1] for o in options)
    options = [nn.functional.pad(o, (0, widest - o.shape[1]), value=-1) for o in options]
    return torch.cat([output.logits.cpu() for output in outputs]), torch.cat(options)


def _share(a: Tensor, b: Tensor) -> float:
    """Share of the rows in which two tensors are the same."""
    return float((a == b).reshape(len(a), -1).all(dim=1).double().mean())


def time_tuning(options: Options) -> dict[str, Any]:
    """A tuning step of ResNet-50 at 224 pixels against a dense one."""
    model = timm.create_model("resnet50", pretrained=False)
    preprocessing = resolve_preprocessing(model, 224)
    gates: tuple[GateKind, ...] = ("rnn",) if options.quick else ("rnn", "probe")
    found = {}
    for gate in gates:
        for amp in (False, True):
            for batch in (16, 128):
                tuning = dfs_cli.TuningConfig(batch_size=batch, amp=amp, device="cuda")
                dynamic = dfs_cli.DynamicConfig(gate=gate, mirror=gate == "probe")
                measured = bench_tuning(model, preprocessing, dynamic, 0.03, tuning, 5 if options.quick else 10)
                found[f"{gate}, {'amp' if amp else 'fp32'}, batch {batch}"] = measured.to_dict()
                torch.cuda.empty_cache()
    return found


@torch.inference_mode()
def time_evaluation(options: Options) -> dict[str, Any]:
    """Images per second of ResNet-50 at 224 pixels, batches of 256: dense, and dynamic with forced decisions."""
    torch.manual_seed(0)
    model = timm.create_model("resnet50", pretrained=False).eval()
    images = torch.randn(256, 3, 224, 224, device=GPU).to(memory_format=torch.channels_last)
    networks: dict[str, nn.Module] = {"dense": model}
    costs = {"dense": 1.0}
    mixes: dict[str, tuple[GateKind, dict[int, float]]] = {
        "rnn 0:0.5,32:0.5": ("rnn", {0: 0.5, 32: 0.5}),
        "rnn 0:0.5,8:0.5": ("rnn", {0: 0.5, 8: 0.5}),
        "rnn 8:1": ("rnn", {8: 1.0}),
        "probe, first pass, 0:0.5,8:0.5": ("probe", {0: 0.5, 8: 0.5}),
    }
    for name, (gate, mix) in mixes.items():
        bits = (0, 8, 32)
        workload = workload_of_model(model, dfs_cli.DynamicConfig(bits=bits, gate=gate), (3, 224, 224), mix)
        networks[name], costs[name] = fold_norms(workload.network), workload.batch_cost
    found: dict[str, Any] = {}
    for amp in (False, True):
        steps = []
        for network in networks.values():
            network.to(GPU).to(memory_format=torch.channels_last)

            def step(network: nn.Module = network, amp: bool = amp) -> None:
                with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp):
                    network(images)

            steps.append(lambda turn, step=step: seconds_of(step, GPU))
        seconds = [quartiles(s) for s in in_turns(steps, 5 if options.quick else 20, 3)]
        for name, timing in zip(networks, seconds, strict=True):
            found[f"{name}, {'amp' if amp else 'fp32'}"] = {
                "images_per_second": len(images) / timing.median,
                "time_over_dense": timing.median / seconds[0].median,
                "cost": costs[name],
            }
    return found


def follow_paper(options: Options) -> dict[str, Any]:
    """The paper's protocol in short: its gate and its options, and the budget itself is to be spent."""
    preset = PRESETS["paper"]
    dynamic = dfs_cli.DynamicConfig(bits=preset.bits, fixed_bits=preset.fixed_bits, gate="rnn")
    found = {}
    for budget in (0.2, 0.6):
        began = time.perf_counter()
        converted = options.convert(budget, dynamic, spend=True)
        report = dfs_cli.cost_report(converted)
        kept = ("top1_before", "top1", "cost", "keeps_budget", "dynamics", "option_shares")
        found[str(budget)] = {key: report[key] for key in kept if key in report}
        found[str(budget)]["seconds"] = time.perf_counter() - began
    return found


def convert_without_images(options: Options) -> dict[str, Any]:
    """ResNet-50 at 224 pixels with random weights: how long a conversion without images takes."""
    model = timm.create_model("resnet50", pretrained=False)
    tuning = dfs_cli.TuningConfig(steps=35 if options.quick else None, device="cuda", workers=options.tuning.workers)
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    converted = dfs_cli.convert(model, 0.4, dfs_cli.SynthesisConfig(), tuning=tuning)
    seconds = time.perf_counter() - began
    made_with = converted.manifest.configuration
    assert made_with is not None and made_with.synthesis is not None
    return {
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "images": made_with.synthesis.images,
        "synthesis_steps": made_with.synthesis.steps,
        "tuning_steps": made_with.steps,
        "bound": converted.manifest.bound,
    }


SECTIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "tests": run_tests,
    "decisions": compare_decisions,
    "tuning": time_tuning,
    "throughput": time_evaluation,
    "data-free": convert_without_images,
    "paper": follow_paper,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/ and val/ of CIFAR-10")
    parser.add_argument("--checkpoint", required=True, help="weights of the ResNet-20")
    parser.add_argument("--output", type=Path, default=ROOT / "examples/results/gpu", help="folder for the JSON")
    parser.add_argument("--quick", action="store_true", help="two minutes instead of eight: figures mean little")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    options = Options(args.data, args.checkpoint, args.quick)
    card = torch.cuda.get_device_name()
    results: dict[str, Any] = {
        "card": card,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "quick": args.quick,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"{card.replace(' ', '_')}{'_quick' if args.quick else ''}.json"
    failed = False
    for name in args.only:
        began = time.perf_counter()
        try:
            found = SECTIONS[name](options)
        except Exception as error:  # recorded; the other sections run all the same
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        failed |= "error" in found or found.get("passed") is False
        results[name] = found | {"section_seconds": round(time.perf_counter() - began, 1)}
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(results[name], indent=1), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
