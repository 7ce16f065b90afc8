"""Training and evaluation in PyTorch, in its usual modes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import MODES, Case, Mode
from benchmarks.pytorch_networks import Network, create, orthogonality_penalty

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, PENALTY_WEIGHT = 0.1, 0.9, 5e-4, 10.0


def make_trainer(case: Case, mode: str) -> Trainer:
    """Returns a trainer for the network of `case` in a mode, one of `MODES`.

    Raises:
      UserError: the network is not implemented in PyTorch here.
    """
    network = create(case.network, case.classes, case.stem, case.elements)
    return Trainer(network, MODES[mode], case.batch, case.image_size)


class Trainer:
    """A network with its optimizer and a batch of normalised images on the device."""

    def __init__(self, network: Network, mode: Mode, batch: int, image_size: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True
        layout = torch.channels_last if mode.channels_last else torch.contiguous_format
        self.network = network.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self.autocast = mode.autocast
        self.images = self.random_images(batch, image_size).to(memory_format=layout)
        self.labels = torch.randint(self.network.head.out_features, (batch,), device=self.device)
        self.optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM,
                                         weight_decay=WEIGHT_DECAY)
        self.beginning = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        # Requires compilation of the full graph: partially compiled steps would not be comparable.
        wrap = functools.partial(torch.compile, fullgraph=True, dynamic=False) if mode.compiled else _as_it_is
        self.loss: Callable[[], Tensor] = wrap(self._loss)
        self.score: Callable[[Tensor, Tensor], Tensor] = wrap(self._score)

    def random_images(self, count: int, size: int) -> Tensor:
        """Returns normalised images `[count, 3, size, size]`."""
        return torch.randn(count, 3, size, size, device=self.device)

    def _loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.network(self.images)
        return F.cross_entropy(logits.float(), self.labels) + PENALTY_WEIGHT * orthogonality_penalty(self.network)

    def _score(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.network(images).float()
        top5 = (logits.topk(5).indices == labels[:, None]).any(1).sum()
        return torch.stack([F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum(), top5])

    def step(self) -> None:
        """Performs one update."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def run(self, steps: int) -> float:
        """Returns the seconds per step from the beginning of training, excluding the first step."""
        self.network.load_state_dict(self.beginning)
        self.optimizer.state.clear()
        self.network.train()
        self.step()
        self.synchronise()
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.synchronise()
        return (time.perf_counter() - began) / steps

    def evaluate(self, images: Tensor, labels: Tensor) -> float:
        """Returns the seconds for scoring a batch: cross entropy, top-1 and top-5."""
        self.network.eval()
        began = time.perf_counter()
        with torch.inference_mode():
            self.score(images, labels).cpu()
        return time.perf_counter() - began

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        """Returns the peak memory of the device, if it has its own memory."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def _as_it_is(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def forget_compiled() -> None:
    """Resets `torch.compile`, which counts recompilations per line of code and gives up after a limit."""
    torch._dynamo.reset()
