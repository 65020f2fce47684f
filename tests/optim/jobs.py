"""What the rank pool runs for the optimizers."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from disttrain.config import ModelConfig, OptimConfig, ParallelDims
from disttrain.config.clipping import Clip, ClipNorm, NoClip
from disttrain.config.groups import AdamW
from disttrain.config.parallel import ParallelConfig
from disttrain.distributed.mesh import build_mesh
from disttrain.models import GPT_PLAN
from disttrain.optim import GradientNorms, build_optimizer, dist_clip_gradients
from disttrain.train.build import build_model

SHAPES = {"uneven": (7, 3), "few_rows": (3, 5), "one_row": (1, 4), "vector": (6,), "scalar": ()}


def whole_gradients() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in SHAPES.items()}


def mixed_parameters(world: int) -> list[nn.Parameter]:
    """The gradients of `whole_gradients` on every layout that there is: sharded, replicated, both, and plain."""
    gradients = whole_gradients()
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
    layouts: dict[str, Tensor] = {
        "uneven": distribute_tensor(gradients["uneven"], line, [Shard(0)]),
        "few_rows": distribute_tensor(gradients["few_rows"], line, [Shard(0)]),
        "one_row": distribute_tensor(gradients["one_row"], line, [Shard(0)]),
        "vector": distribute_tensor(gradients["vector"], line, [Replicate()]),
        "scalar": gradients["scalar"].clone(),
    }
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
        layouts["uneven"] = distribute_tensor(gradients["uneven"], square, [Replicate(), Shard(0)])
        # FSDP2 over one axis of a larger mesh gives tensors that know that axis alone.
        layouts["few_rows"] = distribute_tensor(gradients["few_rows"], square["dp_shard"], [Shard(0)])
    parameters = []
    for gradient in layouts.values():
        parameters.append(nn.Parameter(torch.zeros_like(gradient)))
        parameters[-1].grad = gradient
    return [*parameters, nn.Parameter(torch.ones(3))]  # the last one has no gradient


def clipped_together(parameters: list[nn.Parameter], clip: Clip | None = None, unscale: float = 1.0) -> GradientNorms:
    """All parameters as one group."""
    group = AdamW(name="all", match=(".*",), clip=clip or NoClip())
    return dist_clip_gradients([{"params": parameters, "config": group}], torch.tensor(unscale))


def clipped_apart(rank: int, world: int, clips: list[Clip], unscale: float) -> tuple[GradientNorms, list[Tensor]]:
    """Every parameter a group of its own; the last, without a gradient, belongs to the first."""
    parameters = mixed_parameters(world)
    members = [[parameters[0], parameters[-1]], *([p] for p in parameters[1:-1])]
    groups = [
        {"params": owned, "config": AdamW(name=f"g{index}", match=(".*",), clip=clip)}
        for index, (owned, clip) in enumerate(zip(members, clips, strict=True))
    ]
    with CommDebugMode() as calls:
        norms = dist_clip_gradients(groups, torch.tensor(unscale))
    assert sum(calls.get_comm_counts().values()) == 1
    return norms, whole_of(parameters)


def whole_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]


def mixed_norm(rank: int, world: int) -> tuple[float, dict[str, int]]:
    """The norm, and how often each collective was called for it."""
    parameters = mixed_parameters(world)
    with CommDebugMode() as calls:
        norm = clipped_together(parameters).total
    assert norm.dtype == torch.float64
    return norm.item(), {str(call): count for call, count in calls.get_comm_counts().items() if count}


def fsdp_norm(rank: int, world: int) -> float:
    """After a backward of FSDP2 that sums over ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    mesh = init_device_mesh("cpu", (world,))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    rows = torch.arange(20.0, dtype=torch.float64).reshape(4, 5).sin().chunk(world)[rank]
    model(rows).square().sum().backward()
    return clipped_together(list(model.parameters())).total.item()


def spoilt_norm(rank: int, world: int, value: float, spoilt_rank: int) -> list[float]:
    """The norm and the clip scale with one bad number on one rank only."""
    parameters = mixed_parameters(world)
    gradient = parameters[0].grad
    assert isinstance(gradient, DTensor)
    if rank == spoilt_rank:
        gradient.to_local()[0, 0] = value
    norms = clipped_together(parameters, ClipNorm(limit=1.0))
    return [norms.total.item(), norms.scales[0].item()]


def nothing_to_norm(rank: int, world: int) -> float:
    return clipped_together([nn.Parameter(torch.ones(3))], ClipNorm(limit=1.0, p="inf")).total.item()


def clipped(rank: int, world: int, max_norm: float) -> tuple[list[Tensor], float]:
    """The whole gradients after clipping, and their norm."""
    parameters = mixed_parameters(world)
    clipped_together(parameters, ClipNorm(limit=max_norm))
    return whole_of(parameters), clipped_together(parameters).total.item()


def scaled_in_place(rank: int, world: int) -> tuple[list[float], torch.dtype, bool]:
    """An fp32 gradient after an unscaling by a quarter; and whether it lies where it lay."""
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = gradient = torch.ones(3)
    clipped_together([parameter, nn.Parameter(torch.ones(2))], unscale=0.25)
    return gradient.tolist(), gradient.dtype, parameter.grad is gradient


def sharded_optimizer(rank: int, world: int, config: ModelConfig, optim: OptimConfig) -> tuple[bool, dict[str, Tensor]]:
    """Whether all state lies as its parameter does, before any step; and the weights after three steps."""
    mesh = build_mesh(ParallelDims(1, world), "cpu")
    cpu = torch.device("cpu")
    gpt, _ = build_model(
        config, max_length=5, mesh=mesh, parallel=ParallelConfig(), seed=0, device=cpu, dtype=torch.float64
    )
    optimizer = build_optimizer(gpt, optim, GPT_PLAN)
    moments = [(p, optimizer.state[p][key]) for p in gpt.parameters() for key in ("exp_avg", "exp_avg_sq")]
    alike = all(m.placements == p.placements and m.dtype == p.dtype for p, m in moments)  # type: ignore[attr-defined]
    for step in range(3):
        for name, parameter in gpt.named_parameters():
            assert isinstance(parameter, DTensor)
            gradient = step_gradient(name, step, parameter.shape)
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        optimizer.step()
    return alike, {name: p.full_tensor().detach() for name, p in gpt.named_parameters()}  # type: ignore[attr-defined]


def step_gradient(name: str, step: int, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(step + sum(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)
