"""Recorded minibatches: CUDA graphs, simulated on the CPU by recording what torch is asked to compute, one operation at a time."""
from contextlib import nullcontext

import pytest
import torch
from test_train import CPU, MODELS, same, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gan


def tensors(value) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Graph:
    """What torch.cuda.CUDAGraph is: the operations, on the tensors that they had. A GPU computes nothing while it records,
    so nothing that was computed then is left before a replay."""

    def __init__(self):
        self.operations = []

    @torch.no_grad()
    def replay(self) -> None:
        for *_, own in self.operations:
            for old in own.values():
                old.fill_(9)
        for operation, given, named, own in self.operations:
            made = tensors(operation(*given, **named))
            for place, old in own.items():
                old.copy_(made[place])


class Record(TorchDispatchMode):
    """What torch.cuda.graph is."""

    def __init__(self, graph: Graph, pool):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        assert "_local_scalar_dense" not in str(operation), "waits for the device"
        made, known = operation(*given, **(named or {})), {storage(tensor) for tensor in tensors((given, named))}
        own = {place: tensor for place, tensor in enumerate(tensors(made)) if storage(tensor) not in known}  # no views
        self.graph.operations.append((operation, given, named or {}, own))
        return made


@pytest.fixture
def simulated(monkeypatch):
    """CUDA's part of a Trainer's minibatches, on the CPU."""
    for name, value in {"CUDAGraph": Graph, "graph": Record, "graph_pool_handle": lambda: None, "Stream": lambda: None,
                        "synchronize": lambda: None, "stream": lambda stream: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, value)


def train(model: str, records: bool, **changes) -> tuple[gan.Trainer, dict]:
    """Sixteen minibatches, of which either network trains on some; what they leave but for BatchNorm's statistics, which
    nothing reads."""
    trainer = gan.Trainer(settings("", "", model=model, width=8, precision="fp32", **changes), 32, CPU)
    trainer.records, faces = records, torch.Generator().manual_seed(2)
    trainer.progress.images_seen = trainer.progress.averaged_at = 25_000
    trainer.balance.enough = 0.6
    for _ in range(16):
        real = torch.rand(10, 3, 32, 32, generator=faces) * 2 - 1
        trainer.train_minibatch(real.contiguous(memory_format=torch.channels_last))
    assert trainer.progress.discriminator_updates and trainer.progress.generator_updates
    state = trainer.state()
    weights = {name: [value.detach() for value in network.parameters()] for name, network in trainer.networks.items()}
    return trainer, {**{key: state[key] for key in ("optimizers", "random", "progress", "stats")}, "weights": weights}


@pytest.mark.parametrize("model", MODELS)
def test_recorded_minibatches_are_those_that_are_not(simulated, model):
    """The same bits: turns, losses, weights, averages, what optimizers remember, and boosted detail that changes."""
    trainer, recorded = train(model, True)
    assert trainer.recorded is not None and trainer.records
    assert same(recorded, train(model, False)[1])


def test_what_is_decided_before_is_recorded_too(simulated):
    """Two updates of the discriminator for each of the generator's."""
    assert same(train("WGAN-GP", True, balance=2)[1], train("WGAN-GP", False, balance=2)[1])


@pytest.mark.parametrize("fault", ["refuses to record", "replays nothing", "replays what was recorded, of other faces"])
def test_where_recording_fails_training_goes_on_without(simulated, monkeypatch, capsys, fault):
    """One line says why, and the run is as one that never recorded."""
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")
    if fault.startswith("refuses"):
        monkeypatch.setattr(torch.cuda, "graph", refuse)
    elif fault == "replays nothing":
        monkeypatch.setattr(Graph, "replay", lambda graph: None)
    else:
        forward = gan.RecordedPasses.forward
        monkeypatch.setattr(gan.RecordedPasses, "forward", lambda passes, real, z: forward(passes, passes.real, passes.z))
    trainer, found = train("WGAN-GP", True)
    assert trainer.recorded is None and not trainer.records
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "without recorded minibatches" in said and ("capturing" in said or "something else" in said)
    assert same(found, train("WGAN-GP", False)[1])
