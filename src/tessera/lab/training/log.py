"""The log of a run: a line of JSON for every few steps, the same for TensorBoard, and a picture."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from tessera.files import atomic_path


class Log:
    """Lines of a run's ``log.jsonl``, and the same numbers for TensorBoard.

    Args:
        out: the run's directory.
        tensorboard: whether its numbers are written for TensorBoard.
        step: step from which the run continues; TensorBoard's records of later steps are removed.
    """

    def __init__(self, out: Path, tensorboard: bool, step: int) -> None:
        self.path = out / "log.jsonl"
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def __call__(self, record: dict[str, Any]) -> None:
        """Add a line. record: ``step``, and numbers by name."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.writer is not None:
            for name, value in record.items():
                if name != "step":
                    self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close the log."""
        if self.writer is not None:
            self.writer.close()


def read_log(log: Path) -> list[dict[str, Any]]:
    """Return a run's records, without those that a resume from an earlier checkpoint replaced."""
    records: list[dict[str, Any]] = []
    for line in log.read_text().splitlines():
        record = json.loads(line)
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        records.append(record)
    return records


def plot_log(log: Path, target: Path, title: str) -> None:
    """Draw the loss over tokens from a run's ``log.jsonl`` as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_log(log)
    steps = [record for record in records if "loss" in record]
    checks = [record for record in records if "held_out_loss" in record]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    at = [r["tokens"] / 1e6 for r in steps]
    axes.plot(at, [r["loss"] for r in steps], color="#0072B2", lw=0.7, alpha=0.7, label="training batches")
    axes.plot(
        [r["tokens"] / 1e6 for r in checks],
        [r["held_out_loss"] for r in checks],
        color="#D55E00",
        marker="o",
        ms=4,
        label="held-out text",
    )
    longer: str | None = "sequences become longer"
    for before, after in pairwise(steps):
        if before["sequence"] != after["sequence"]:
            x = before["tokens"] / 1e6
            axes.axvline(x, color="0.4", lw=0.8, ls=":", label=longer)
            longer = None
            style = {"transform": axes.get_xaxis_transform(), "va": "top", "ha": "left", "rotation": 90, "fontsize": 9}
            axes.text(x, 0.97, f"{after['sequence']:,} tokens", color="0.35", **style)
    lowest = min((r["loss"] for r in steps), default=1.0)
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)", ylim=(max(0, lowest - 0.2), lowest + 3))
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def summarise_log(log: Path, points: int = 200) -> dict[str, Any]:
    """Return a run's log thinned to about ``points`` training records, with every held-out measurement."""
    records = read_log(log)
    steps = [record for record in records if "loss" in record]
    return {
        "training": steps[:: max(1, len(steps) // points)],
        "held_out": [record for record in records if "held_out_loss" in record],
    }
