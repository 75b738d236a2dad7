"""The cost report as Markdown."""

from __future__ import annotations

from typing import Any

from dfs_cli.report.cost import agreement_text


def _percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _accuracy(report: dict[str, Any]) -> list[str]:
    if report["data_free"]:
        same = _percent(report["same_answers"])
        return [f"| same answer as the original (%), {report['images']} synthetic images | 100 | {same} |"]
    return [
        f"| top-1 (%), {report['images']} images | {_percent(report['top1_before'])} | {_percent(report['top1_after'])} |",
        f"| top-5 (%) | {_percent(report['top5_before'])} | {_percent(report['top5_after'])} |",
    ]


def _limit(report: dict[str, Any]) -> str:
    return "" if report["limit"] is None else f", at most {report['limit']:g} whatever is shown"


def _data_free(report: dict[str, Any]) -> list[str]:
    """What is not known without real images."""
    if not report["data_free"]:
        return []
    made = report["configuration"]["synthesis"]
    how = "Gaussian noise" if made["kind"] == "noise" else f"made from the original network in {made['steps']} steps"
    sheet = [f"![the first of them]({report['sheet']})", ""] if report.get("sheet") else []
    return [
        f"**Without real images:** the network was tuned on {made['images']} images, {how}. Its top-1 is not known: "
        "`dfs eval FILE --data DIR` measures it. "
        f"The cost is a bound: no image, whatever it shows, costs more than {report['bound']:.4f}. "
        "Figures below are of the synthetic images. `dfs convert MODEL --data DIR` gives more.",
        "",
        *sheet,
    ]


def _dynamics(report: dict[str, Any]) -> list[str]:
    d = report["dynamics"]
    return [
        f"**How dynamic it is:** {d['policies']} distinct policies over {report['images']} images, "
        f"{d['passes']:.2f} passes per image; the choice of a block has {d['choice_entropy']:.2f} bits of entropy on average, "
        f"and {d['variance_between_images']:.1%} of the variance of block costs lies between images. "
        f"With the most common policy ({d['common_share']:.1%} of the images) for all: "
        f"{'same answers' if report['data_free'] else 'top-1'} {d['common_top1']:.2f} at cost {d['common_cost']:.4f}.",
    ]


def _agreement(report: dict[str, Any]) -> list[str]:
    agreement = report["agreement"]
    names = ", ".join(f"`{name}`" for name in agreement["refitted"]) if agreement else ""
    return [f"**Agreement:** {agreement_text(agreement)}" + (f": {names}." if names else ".")]


def render_markdown(report: dict[str, Any]) -> str:
    """The report of :func:`dfs_cli.report.cost.cost_report` for people."""
    source = report["source"]
    bits = sorted(int(b) for b in report["option_shares"])
    lines = [
        f"# {report['model']} at budget {report['budget']:g}",
        "",
        "| | original | dynamic |",
        "|---|---:|---:|",
        *_accuracy(report),
        f"| cost, fraction of {report['scale']} | 1 | {report['cost']:.4f} |",
        f"| GMACs, bit-weighted | {report['gmacs_dense']:.4g} | {report['gmacs_bitweighted']:.4g} |",
        "",
        f"Cost per image: median {report['cost_p50']:.4f}, 95th percentile {report['cost_p95']:.4f}, "
        f"maximum {report['cost_max']:.4f}{_limit(report)}. "
        f"Reachable: {report['reachable_budgets'][0]:.4f} to {report['reachable_budgets'][1]:.4f}; "
        f"{report['cost_always']:.4f} always runs.",
        "",
        f"**For comparison:** the same network run statically with everything at 8 bits costs "
        f"{report['cost_all_8_bit']:.4f}, and usually loses next to nothing.",
        "",
        *_data_free(report),
        *_dynamics(report),
        "",
        *_agreement(report),
        "",
        f"Weights: {source.get('weights') or 'unknown'}; licence: {source.get('license') or 'unknown'}.",
        *([f"SHA-256 of the network's file: `{digest}`."] if (digest := report.get("file_sha256")) else []),
        "",
        "## Layers",
        "",
        "| layer | MMACs | dense share | "
        + " | ".join(f"{b} bit" for b in bits)
        + " | mean bits | bit-weighted MMACs |",
        "|---|---:|---:|" + "---:|" * len(bits) + "---:|---:|",
    ]
    for row in report["layers"]:
        if row["block"] is None:
            (fixed,) = row["histogram"]
            shares = [f"always {fixed}" if i == 0 else "" for i in range(len(bits))]
        else:
            shares = [f"{row['histogram'].get(b, 0.0):.1%}" for b in bits]
        lines.append(
            f"| {row['name']} | {row['macs'] / 1e6:.3f} | {row['dense_share']:.2%} | {' | '.join(shares)} "
            f"| {row['mean_bits']:.2f} | {row['mean_bitweighted_macs'] / 1e6:.4f} |"
        )
    total = sum(row["mean_bitweighted_macs"] for row in report["layers"]) / 1e6
    lines += [
        f"| **total** | {report['gmacs_dense'] * 1e3:.3f} | 100% |" + " |" * len(bits) + f" | {total:.4f} |",
        "",
        "The total of MMACs is the dense network's, without the gate; that of bit-weighted MMACs includes it.",
        "",
        "## Conventions",
        "",
        *(f"- {line}" for line in report["conventions"]),
        "- Not counted (no multiply-accumulates of a layer): " + (", ".join(report["not_counted"]) or "nothing") + ".",
    ]
    if unreadable := report["unreadable_images"]:
        lines.append(f"- {len(unreadable)} unreadable images were skipped: {', '.join(unreadable[:10])}.")
    return "\n".join(lines) + "\n"
