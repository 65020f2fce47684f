"""What ranks do in the tests of matrix optimizers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from disttrain.config import OptimConfig
from disttrain.config.matrix_groups import ExchangeConfig, Muon
from disttrain.config.parallel import ParallelConfig
from disttrain.errors import UserError
from disttrain.models import GPT_PLAN
from disttrain.optim import MatrixOptimizer, build_optimizer, matrix_optimizer, set_learning_rate
from disttrain.optim import matrix_exchange as exchange_module
from disttrain.optim.matrix_layout import layout_of, regions_of
from disttrain.optim.matrix_plan import MatrixPlan
from disttrain.optim.sharding import local
from disttrain.testing.collectives import CollectiveCounter
from disttrain.testing.matrix_parity import CASES, LAYOUTS, synthetic_job, synthetic_optim
from disttrain.testing.optimizer_parity import LR_FACTORS, Toys, drawn_gradients
from disttrain.testing.parity import gather_whole, parity_model

CPU = torch.device("cpu")
STACK = {f"layer{n}": (rows, columns) for n, (rows, columns) in enumerate([(6, 6), (9, 4), (4, 9), (6, 6), (1, 7)] * 3)}


CASES_OF_BITS = {
    **CASES,
    "a user's function": {"algorithm": "tests.optim.matrix_functions:Whitened", "lr": 0.01},
    "muon (bf16 on the wire)": {**CASES["muon"], "wire_dtype": "bf16"},
    "muon (computed in bf16, auto on the wire)": {**CASES["muon"], "compute_dtype": "bf16"},
    "muon (computed in bf16, parameter on the wire)": {
        **CASES["muon"],
        "compute_dtype": "bf16",
        "wire_dtype": "parameter",
    },
}


def bits(rank: int, world: int, layout: str, cases: list[str]) -> dict[str, Tensor]:
    """The weights after steps with the same drawn gradients, in fp32, one matrix at a time, as CASE NAME."""
    return {f"{case} {name}": weight for case in cases for name, weight in _bits(world, layout, case).items()}


def _bits(world: int, layout: str, case: str) -> dict[str, Tensor]:
    settings, replicas = LAYOUTS[layout]
    toys = Toys(world, CPU, ParallelConfig(**settings), torch.float32)
    optim = synthetic_optim(CASES_OF_BITS[case], replicas, batched=False)
    optimizer = build_optimizer(toys, optim, GPT_PLAN)
    for step, factor in enumerate(LR_FACTORS):
        toys.set_gradients(drawn_gradients(step))
        set_learning_rate(optimizer, factor)
        optimizer.step()
        optimizer.zero_grad()
    return gather_whole(dict(toys.named_parameters()))


def traffic(rank: int, world: int, layout: str, wire: str) -> tuple[int, int, int, int]:
    """Bytes that this rank sent in a step, what the plan says of it, of all ranks, and the collectives."""
    settings, replicas = LAYOUTS[layout]
    toys = Toys(world, CPU, ParallelConfig(**settings))
    optim = synthetic_optim({**CASES["muon"], "wire_dtype": wire}, replicas)
    [optimizer] = build_optimizer(toys, optim, GPT_PLAN).matrix_optimizers
    [plan] = optimizer.plans
    toys.set_gradients(drawn_gradients(0))
    with CollectiveCounter() as counter:
        optimizer.step()
    replica, shard = divmod(rank, plan.shards)
    calls = sum(counter.calls.values())
    return sum(counter.sent.values()), plan.sent_bytes(replica, shard), plan.total_sent_bytes, calls


class Stack(nn.Module):
    """Enough matrices for several buckets; their rows are multiples of `rows`."""

    def __init__(self, rows: int, place: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (first, second) in STACK.items():
            whole = torch.randn(first * rows, second, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(place(whole)))

    def set_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in self.parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient


def stacked(
    rank: int, world: int, mesh_shape: tuple[int, ...], placements: list[Placement], rows: int = 1, **exchange: Any
) -> Any:
    """Whole weights after three steps on any placement, and how many buckets there were."""
    place: Any = lambda tensor: tensor  # noqa: E731
    if mesh_shape:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=tuple("abc"[: len(mesh_shape)]))
        place = lambda tensor: distribute_tensor(tensor, mesh, placements)  # noqa: E731
    stack = Stack(rows, place)
    settings = ExchangeConfig.model_validate(exchange)
    optimizer = matrix_optimizer("normuon", stack.named_parameters(), lr=0.05, exchange=settings)
    for step in range(3):
        stack.set_gradients(step)
        optimizer.step()
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in stack.named_parameters()}
    return {name: weight.detach() for name, weight in weights.items()}, len(optimizer.plans[0].buckets)


def regions(rank: int, world: int, mesh_shape: tuple[int, ...], placements: list[Placement], rows: int) -> bool:
    """Whether this rank's region, as every rank computes it, is what torch gave to this rank."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=tuple("abc"[: len(mesh_shape)]))
    whole = torch.arange(rows * 4.0).reshape(rows, 4)
    parameter = distribute_tensor(whole, mesh, placements)
    layout = layout_of(parameter)
    seen = [regions_of(parameter, layout)]
    everywhere: list[Any] = [None] * world
    dist.all_gather_object(everywhere, seen[0])
    boxes = [everywhere[peer][layout.shard] for peer in layout.grid[layout.replica]]
    return all(torch.equal(whole[box.slices], local(parameter)) for box in boxes)


def missing(rank: int, world: int, layout: str, ranks: list[int]) -> dict[str, Tensor]:
    """`square` has no gradient on `ranks` in the second of three steps, and a gradient of zero on the others."""
    settings, replicas = LAYOUTS[layout]
    toys = Toys(world, CPU, ParallelConfig(**settings))
    optimizer = build_optimizer(toys, synthetic_optim(CASES["muon"], replicas), GPT_PLAN)
    for step in range(3):
        gradients = drawn_gradients(step)
        if step == 1:
            gradients["square"].zero_()
        toys.set_gradients(gradients)
        if step == 1 and rank in ranks:
            toys.square.grad = None  # type: ignore[assignment]
        set_learning_rate(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return gather_whole(dict(toys.named_parameters()))


def spoilt(rank: int, world: int, mistake: str) -> dict[str, float]:
    """The errors of the table with one `mistake` in the exchange."""
    own = exchange_module.MatrixExchange.dist_give_back

    def wrong(self: Any, bucket: Any, wholes: dict[int, Tensor]) -> Any:
        if mistake == "one owner off by 1e-9" and rank == 0:
            wholes = {unit: whole * (1 + 1e-9) for unit, whole in wholes.items()}
        if mistake == "regions in another order":
            wholes = {unit: whole.flip(0) for unit, whole in wholes.items()}
        return own(self, bucket, wholes)

    exchange_module.MatrixExchange.dist_give_back = wrong  # type: ignore[method-assign]
    try:
        return synthetic_job(rank, world, "cpu", "fsdp")
    finally:
        exchange_module.MatrixExchange.dist_give_back = own  # type: ignore[method-assign]


def differing_plans(rank: int, world: int) -> None:
    """One rank was given another coefficient set."""
    toys = Toys(world, CPU, ParallelConfig(strategy="fsdp"))
    case = {**CASES["muon"], "coefficients": "you5" if rank == 1 else "keller5"}
    build_optimizer(toys, synthetic_optim(case, "auto"), GPT_PLAN)


def differing_on_a_grid(rank: int, world: int) -> str:
    """One rank of two copies of two shards was given another algorithm: what this rank is told."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate(), Shard(0)]))
    try:
        matrix_optimizer("normuon" if rank == 1 else "muon", [("weight", weight)], lr=0.1)
    except UserError as error:
        return str(error)
    return ""


def reloaded(rank: int, world: int, algorithm: str) -> tuple[float, float]:
    """Through torch's state_dict: the distance from a run that goes on, and what a rate of 0 moves afterwards."""
    mesh = init_device_mesh("cpu", (world,))
    through, stopped = (
        nn.Parameter(distribute_tensor(torch.eye(6, 4, dtype=torch.float64), mesh, [Shard(0)])) for _ in range(2)
    )
    first, second = (matrix_optimizer(algorithm, [("w", w)], lr=0.1) for w in (through, stopped))
    _steps(through, mesh, first, range(3))
    with torch.no_grad():
        stopped.copy_(through)
    second.load_state_dict(first.state_dict())
    _steps(through, mesh, first, range(3, 6))
    _steps(stopped, mesh, second, range(3, 6))
    distance = (local(through) - local(stopped)).abs().sum().item()
    second.param_groups[0]["lr"] = 0.0
    before = local(stopped).clone()
    _steps(stopped, mesh, second, range(6, 7))
    return distance, (local(stopped) - before).abs().sum().item()


def _steps(weight: nn.Parameter, mesh: Any, optimizer: MatrixOptimizer, steps: range) -> None:
    for step in steps:
        gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        weight.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        optimizer.step()


def sums_left_undone(rank: int, world: int) -> bool:
    """A gradient whose sum over ranks nobody has taken yet counts as the sum."""
    mesh = init_device_mesh("cpu", (world,))
    weights = [nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])) for _ in range(2)]
    whole = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    weights[0].grad = distribute_tensor(whole, mesh, [Shard(0)])
    weights[1].grad = DTensor.from_local(whole / world, mesh, [Partial()])
    for weight in weights:
        matrix_optimizer("muon", [("weight", weight)], lr=0.1).step()
    return torch.allclose(local(weights[0]), local(weights[1]), rtol=0, atol=1e-5)


def gpt_plan(rank: int, world: int, strategy: dict[str, Any], optim: OptimConfig) -> tuple[list[str], MatrixPlan]:
    """What a run would print."""
    from disttrain.testing.parity import MODELS

    gpt, _ = parity_model(MODELS["modern"], world, CPU, ParallelConfig(**strategy))
    [optimizer] = build_optimizer(gpt, optim, GPT_PLAN).matrix_optimizers
    return optimizer.describe(), optimizer.plans[0]


def owner_state(rank: int, world: int, layout: str) -> dict[str, tuple[tuple[int, ...], int]]:
    """Of each tensor of SOAP's state: the shape that all see, and the elements that this rank holds."""
    settings, replicas = LAYOUTS[layout]
    toys = Toys(world, CPU, ParallelConfig(**settings))
    optimizer = build_optimizer(toys, synthetic_optim(CASES["soap"], replicas), GPT_PLAN)
    return {
        f"{name}.{key}": (tuple(value.shape), local(value).numel())
        for name, p in toys.named_parameters()
        for key, value in optimizer.state[p].items()
        if name != "vector"
    }


def muon_section(**settings: Any) -> Muon:
    return Muon.model_validate({"name": "m", "match": (".*",), "lr": 0.1, **settings})


def of_unlike_types(rank: int, world: int) -> int:
    """Matrices in two types, and one that is whole everywhere, are three plans."""
    mesh = init_device_mesh("cpu", (world,))
    module = nn.Module()
    for name, dtype in (("first", torch.float32), ("second", torch.float64)):
        whole = torch.randn(4, 4, dtype=dtype)
        module.register_parameter(name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))
    module.register_parameter("third", nn.Parameter(torch.ones(3, 3)))
    named = dict(module.named_parameters())
    config = muon_section()
    optimizer = MatrixOptimizer(
        [{"name": "m", "params": list(named.values()), "lr": 0.1, "config": config}],
        {parameter: name for name, parameter in named.items()},
    )
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return len(optimizer.plans)
