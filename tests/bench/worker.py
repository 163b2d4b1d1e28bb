"""Run one side of a comparison in a process of its own.

It runs as a script, so that `demucs_infer` is the package that this interpreter has installed.
Orders come in on standard input and measurements go out, each as a JSON object on a line.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

TRACK = ExitStack()
"""The context that the engine has around a track, for orders that run only a network."""

PACKAGE = {"ours": "demucs_infer", "upstream": "demucs", "peer": "demucs_infer"}


def network(side: str, order: dict[str, Any]) -> Callable[[], Any]:
    """Prepare a run of one window through one network; ours as the engine runs it."""
    import torch

    load = import_module(f"{PACKAGE[side]}.pretrained").get_model
    member = load(order["model"], repo=Path(order["repo"])).models[0].eval().to(order["device"])
    if side == "ours":
        from demucs_infer.optimized.optimize import optimize

        member = optimize(member, order["precision"], device=order["device"])
        if order["device"] == "cpu":
            TRACK.enter_context(
                import_module("demucs_infer.system.malloc").keep_large_allocations()
            )
    samples = int(order["seconds"] * 44_100)
    window = torch.load(order["track"], weights_only=True)[None, :, :samples].to(order["device"])

    def run() -> Any:
        with torch.inference_mode():
            answer = member(window)
        return answer[0].float().cpu()

    return run


def engine(side: str, order: dict[str, Any]) -> Callable[[], Any]:
    """Prepare a run of a track through upstream's interface, which every side has."""
    import torch

    extra = {}
    if side == "ours":
        extra = {"precision": order["precision"], "stems": order["stems"]}
        NetworkClock.watch()
    separator = import_module(f"{PACKAGE[side]}.api").Separator(
        model=order["model"],
        repo=Path(order["repo"]),
        device=order["device"],
        shifts=0,
        **extra,
    )
    track = torch.load(order["track"], weights_only=True)
    track = track[:, : int(order["seconds"] * 44_100)]
    wanted = order["stems"] or ["drums", "bass", "other", "vocals"]

    def run() -> Any:
        _, stems = separator.separate_tensor(track.clone(), 44_100)
        return torch.stack([stems[name] for name in wanted]).cpu()

    return run


class NetworkClock:
    """The time in which at least one network of ours runs; the engine alone takes the rest."""

    seconds = 0.0
    _num_running = 0
    _started = 0.0
    _lock = Lock()

    @classmethod
    def watch(cls) -> None:
        """Add up the time of the forward passes from now on, once where they run side by side."""
        from demucs_infer.engine.runner import Runner

        forward = Runner._forward

        def run_timed(*args: Any) -> Any:
            with cls.running():
                return forward(*args)

        Runner._forward = run_timed  # type: ignore[method-assign]  # every pass goes through it

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[None]:
        """Count a forward pass, in any thread."""
        with cls._lock:
            if not cls._num_running:
                cls._started = time.perf_counter()
            cls._num_running += 1
        try:
            yield
        finally:
            with cls._lock:
                cls._num_running -= 1
                if not cls._num_running:
                    cls.seconds += time.perf_counter() - cls._started


def peak() -> float:
    """Return the peak memory in MiB; on Linux `ru_maxrss` would start at the parent's peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # macOS: bytes
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024


def measure(run: Callable[[], Any], device: str) -> tuple[dict[str, float], Any]:
    """Run once and return the figures and the result."""
    import torch

    NetworkClock.seconds = 0.0
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    answer = run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    figures = {"seconds": seconds, "cpu": cpu, "peak": peak()}
    if NetworkClock.seconds and device == "cpu":  # elsewhere a forward returns before it is done
        figures["outside"] = 1 - NetworkClock.seconds / seconds
    return figures, answer


def main() -> None:
    """Serve orders until standard input ends."""
    side = sys.argv[1]
    prepare = {"network": network, "engine": engine}
    run: Callable[[], Any] | None = None
    device = "cpu"
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "load":
            import torch

            torch.set_num_threads(order["threads"])
            device = order["device"]
            run = prepare[order["level"]](side, order)
            figures: dict[str, float] = {}
        else:
            assert run is not None
            figures, answer = measure(run, device)
            if order.get("keep"):
                torch.save(answer, order["keep"])
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
