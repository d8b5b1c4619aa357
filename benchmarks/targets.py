"""What the project wants to reach: MCUNet 160 px, batch 128, 2 threads, all measured in the same run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.contenders import OURS
from benchmarks.rows import PeerSummary


@dataclass(frozen=True)
class Figures:
    """Summaries, asked by name; `None` where something was not measured.

    Attributes:
        budgeted: numbers of layers whose LANCE ranks were chosen for a memory budget, not by energy.
    """

    summaries: Sequence[PeerSummary]
    budgeted: frozenset[int] = frozenset()

    def ms(
        self,
        contender: str,
        layers: int = 0,
        phase: str = "train",
        cached: bool = False,
        micro_batch: int | None = None,
    ) -> float | None:
        """The median of a phase."""
        found = self._find(contender, layers, phase, cached, micro_batch)
        return None if found is None else found.p50_ms

    def peak_mib(self, contender: str, layers: int) -> float | None:
        """The highest memory of its processes, features not kept."""
        found = self._find(contender, layers, "train", False, None)
        return None if found is None or found.peak_rss_kib is None else found.peak_rss_kib / 1024

    def saved_mib(self, contender: str, layers: int, micro_batch: int) -> float | None:
        """What was alive between forward and backward."""
        found = self._find(contender, layers, "train", False, micro_batch)
        return None if found is None or found.saved_bytes is None else found.saved_bytes / (1 << 20)

    def _find(
        self, contender: str, layers: int, phase: str, cached: bool, micro_batch: int | None
    ) -> PeerSummary | None:
        wanted = (contender, layers, phase, cached)
        for row in self.summaries:
            if (row.contender, row.layers, row.phase, row.cached) == wanted and micro_batch in (
                None,
                row.micro_batch,
            ):
                return row
        return None


Measured = Callable[[Figures], float | None]


@dataclass(frozen=True)
class Target:
    """A figure and the bound that it should keep: `at_most` or at least.

    Attributes:
        bound: `None` for what is no target, but good to know beside one.
        missing: what the table says where nothing was measured.
    """

    figure: str
    bound: float | None
    unit: str
    at_most: bool
    measured: Measured
    missing: str = "not measured"

    @property
    def bound_text(self) -> str:
        """`<= 1.10x`, or `-`."""
        if self.bound is None:
            return "-"
        return f"{'<=' if self.at_most else '>='} {number_text(self.bound, self.unit)}"

    def is_met(self, value: float) -> bool:
        """Whether a value keeps the bound, if there is one."""
        if self.bound is None:
            return True
        return value <= self.bound if self.at_most else value >= self.bound


def number_text(value: float, unit: str) -> str:
    """`1.10x`, `96.3 MiB`, `0.21 s`."""
    return f"{value:.2f}x" if unit == "x" else f"{value:.2f} {unit}"


def ratio(over: float | None, under: float | None) -> float | None:
    """One divided by the other, where both were measured."""
    return None if over is None or not under else over / under


def _step_to_forward(layers: int) -> Measured:
    return lambda f: ratio(f.ms("lance", layers), f.ms("onnxruntime", phase="forward"))


def _faster_than(
    peer: str, layers: int, ours: str = "lance", cached: bool = False, peer_cached: bool = False
) -> Measured:
    return lambda f: ratio(f.ms(peer, layers, cached=peer_cached), f.ms(ours, layers, cached=cached))


def _saved(budgeted: bool) -> Measured:
    """Of LANCE, 4 layers, micro-batch 8, if its ranks were chosen that way."""
    return lambda f: f.saved_mib("lance", 4, 8) if (4 in f.budgeted) == budgeted else None


def _weights(layers: int, micro_batch: int) -> Measured:
    return lambda f: ratio(
        f.ms("weights-bp", layers, "weights", micro_batch=micro_batch),
        f.ms("weights-lance", layers, "weights", micro_batch=micro_batch),
    )


def _worst_against_others(phase: str) -> Measured:
    """LANCE to the best other method, features kept, at the number of layers where that is worst."""

    def measured(figures: Figures) -> float | None:
        ratios = [
            ratio(
                figures.ms("lance", layers, phase, cached=True), figures.ms(method, layers, phase, cached=True)
            )
            for layers in sorted({row.layers for row in figures.summaries if row.contender == "lance"})
            for method in OURS
            if method != "lance"
        ]
        return max((one for one in ratios if one is not None), default=None)

    return measured


def _seconds(contender: str, phase: str) -> Measured:
    def measured(figures: Figures) -> float | None:
        found = [row.p50_ms for row in figures.summaries if (row.contender, row.phase) == (contender, phase)]
        return found[0] / 1000 if found else None

    return measured


PYTORCH = {"eager": "torch-bp", "best-tuned": "torch-tuned"}
NO_CACHE = ", PyTorch without a cache, LANCE with"
ANY = "against any other method, feature cache, worst of the layers measured"

TARGETS: tuple[Target, ...] = (
    *(
        Target(f"LANCE step against ONNX Runtime's forward, {k} layers", 1.10, "x", True, _step_to_forward(k))
        for k in (2, 4)
    ),
    *(
        Target(f"PyTorch BP, {name}, against LANCE step, {k} layers{kept}", bound, "x", False,
               _faster_than(peer, k, cached=bool(kept)))
        for kept, bounds in (("", (5.5, 2.0)), (NO_CACHE, (50.0, 10.0)))
        for (name, peer), bound in zip(PYTORCH.items(), bounds, strict=True)
        for k in (2, 4)
    ),
    *(
        Target(f"for information: PyTorch BP, best-tuned, against LANCE step, {k} layers, both with a cache",
               None, "x", False, _faster_than("torch-tuned", k, cached=True, peer_cached=True))
        for k in (2, 4)
    ),
    Target("PyTorch BP, eager, against our BP step, 4 layers", 4.0, "x", False,
           _faster_than("torch-bp", 4, "bp")),
    *(
        Target(f"BP's weight-gradient work against LANCE's, {k} layers, micro-batch {size}", 3.0, "x", False,
               _weights(k, size))
        for k in (2, 4) for size in (8, 32)
    ),
    Target(f"LANCE backward {ANY}", 1.02, "x", True,
           _worst_against_others("backward")),
    Target(f"LANCE step {ANY}", 1.02, "x", True,
           _worst_against_others("train")),
    Target("peak RSS of lance-device train, JPEG folder, LANCE, 4 layers", 110.0, "MiB", True,
           lambda f: f.peak_mib("train", 4)),
    Target("the same against PyTorch BP, eager", 0.2, "x", True,
           lambda f: ratio(f.peak_mib("train", 4), f.peak_mib("torch-bp", 4))),
    Target("saved bytes, LANCE, 4 layers, micro-batch 8, ranks by energy", 0.75, "MiB", True, _saved(False)),
    Target("the same with budgeted ranks (whose accuracy is not measured here)", 0.25, "MiB", True,
           _saved(True), "not measured here: calibrate with --memory-budget"),
    Target("lance-device --help", 0.3, "s", True, _seconds("help", "start")),
    Target("lance-device train, until the first step", 1.5, "s", True, _seconds("ready", "ready")),
)  # fmt: skip
