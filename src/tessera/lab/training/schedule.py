"""When to train on what, and how fast: `Phase` and `LoopConfig`."""

from __future__ import annotations

from dataclasses import dataclass

FORWARD_TOKENS = 4096
"""Tokens of a forward pass where no `Phase.micro_batch` is given: enough to keep the cores busy, few enough to fit."""


@dataclass(frozen=True)
class Phase:
    """A phase of training with one shape of batch."""

    until: float
    """Progress at which it ends; the last phase ends at 1."""
    sequence: int
    """Tokens per sequence."""
    batch: int
    """Sequences per optimizer step, over all processes."""
    micro_batch: int | None = None
    """Sequences per forward pass; must divide ``batch`` by the number of processes. None: as many as `FORWARD_TOKENS` allow."""
    segments: int = 1
    """Consecutive sequences of a document that a step learns from one after the other: what the model's window and memory hold
    is kept from each to the next, gradients are not."""

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step, over all processes."""
        return self.batch * self.length

    @property
    def length(self) -> int:
        """Tokens predicted of each document in a step."""
        return self.sequence * self.segments

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"until must lie in (0, 1], got {self.until}")
        for name in ("sequence", "batch", "micro_batch", "segments"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.together()

    def together(self, processes: int = 1) -> int:
        """Return the sequences of a forward pass in each of so many processes.

        Raises:
            ValueError: if the batch cannot be shared out evenly.
        """
        if self.batch % processes:
            raise ValueError(f"a batch of {self.batch} sequences cannot be shared out among {processes} processes")
        share = self.batch // processes
        if self.micro_batch is not None:
            if share % self.micro_batch:
                of = f"batch {self.batch}" if processes == 1 else f"the {share} sequences of each process"
                raise ValueError(f"micro_batch {self.micro_batch} does not divide {of}")
            return self.micro_batch
        return max(n for n in range(1, share + 1) if share % n == 0 and (n == 1 or n * self.sequence <= FORWARD_TOKENS))


@dataclass(frozen=True)
class LoopConfig:
    """Settings of `train`. Exactly one of ``steps`` and ``minutes`` is the budget."""

    phases: tuple[Phase, ...]
    """In order of ``until``; the last must end at 1."""
    steps: int | None = None
    """Optimizer steps in all."""
    minutes: float | None = None
    """Minutes of training in all, pauses between resumed runs not counted."""
    muon_lr: float = 4e-3
    """Peak learning rate of the hidden matrices (Muon, updates scaled to AdamW's RMS)."""
    adamw_lr: float = 3e-3
    """Peak learning rate of everything else: embeddings, norms, biases."""
    gate_lr: float = 2e-2
    """Peak learning rate of gates, decays and write rates, which at the rate of weights would hardly move."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; vectors have none."""
    warmup_steps: int = 50
    """Steps over which the learning rates rise from 0."""
    decay_from: float = 0.6
    """Progress at which the learning rates start to fall linearly to 0; before it they are constant."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.995
    """Decay per step of the averaged weights."""
    seed: int = 0
    """Seed of the data order."""
    mixed_precision: str = "bf16"
    """``bf16`` or ``no``."""
    compile: bool = False
    """Compile the model with `torch.compile`; needs a C++ compiler. A fifth faster here, after a minute per phase."""
    checkpoint_seconds: float = 240.0
    """Seconds between checkpoints."""
    log_every: int = 10
    """Steps per line of the log."""
    tensorboard: bool = False
    """Also write the numbers of the log for TensorBoard, to ``tensorboard`` in the run's directory."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either steps or minutes")
        if (self.steps is not None and self.steps < 1) or (self.minutes is not None and self.minutes <= 0):
            raise ValueError("the budget must be positive")
        ends = [phase.until for phase in self.phases]
        if not ends or ends != sorted(ends) or ends[-1] != 1:
            raise ValueError(f"phases must end at increasing progress, the last at 1, got {ends}")
        if not 0 <= self.decay_from < 1:
            raise ValueError(f"decay_from must lie in [0, 1), got {self.decay_from}")
        if self.mixed_precision not in ("bf16", "no"):
            raise ValueError(f"mixed_precision must be 'bf16' or 'no', got {self.mixed_precision!r}")
        if self.compile and any(phase.segments > 1 for phase in self.phases):
            raise ValueError("a state that is kept between segments cannot be compiled; set compile or segments, not both")

    def progress(self, step: int, seconds: float) -> float:
        """Return how much of the budget is spent, at most 1."""
        done = step / self.steps if self.steps is not None else seconds / (60 * (self.minutes or 1))
        return min(done, 1.0)

    def phase(self, progress: float) -> Phase:
        """Return the phase at this progress."""
        return next((phase for phase in self.phases if progress < phase.until), self.phases[-1])

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate as a fraction of its peak: linear warm-up, constant, linear decay to 0."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warmup * min(1.0, (1 - progress) / (1 - self.decay_from))
