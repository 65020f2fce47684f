"""What was seen on a node, on a way between two nodes, and by a rank. Facts only: what they mean the checks decide.

They travel as JSON, also between nodes that have different versions of this package: unknown keys are left out, and
all but the host's name have a default, so that the versions can still be compared.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Interface(Facts):
    name: str
    up: bool = True
    addresses: tuple[str, ...] = ()
    """IPv4 and IPv6, without the link-local ones."""
    mtu: int = 0
    speed_mbit: int = 0
    """0 where the driver does not say."""


class Route(Facts):
    """How packets would leave for the head."""

    head: str
    address: str | None = None
    """What the head's name resolves to here."""
    source: str | None = None
    """Our own address on that way."""
    interface: str | None = None
    error: str | None = None


class Network(Facts):
    interfaces: tuple[Interface, ...] = ()
    host_name: str = ""
    host_addresses: tuple[str, ...] = ()
    """What the machine's own name resolves to; gloo takes it where no interface is named."""
    host_name_error: str | None = None
    route: Route | None = None
    unresolved: dict[str, str] = {}
    """Names of other hosts that do not resolve here, and why."""
    variables: dict[str, str] = {}
    """GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and TP_SOCKET_IFNAME, those that are set."""
    head_error: str | None = None
    """Why the head's port could not be called; that nobody listens there yet is no reason."""
    port_taken: str | None = None
    """On the head: why the rendezvous port cannot be opened."""
    infiniband: tuple[str, ...] = ()
    """Devices of /sys/class/infiniband."""


class Limits(Facts):
    """None is unlimited; the soft limits, which are what counts."""

    open_files: int | None = None
    locked_bytes: int | None = None
    processes: int | None = None
    processes_used: int | None = None
    """Threads of this user, or of the container, against `processes`; None where nobody counts them."""


class SharedMemory(Facts):
    total_bytes: int | None = None
    """None: there is no /dev/shm."""
    free_bytes: int = 0
    error: str | None = None
    """Why no file can be made there."""


class Disk(Facts):
    folder: str = ""
    """The folder that was tried: the run folder, or the nearest one above it that exists."""
    free_bytes: int | None = None
    free_files: int | None = None
    """Inodes; None where the file system does not count them."""
    error: str | None = None
    """Why nothing can be written there."""
    write_bytes_per_second: float | None = None
    """Of 16 MiB at once, until the disk says that it has them."""
    fsync_seconds: float | None = None
    """Median over a few small files."""


class Gpu(Facts):
    name: str = ""
    uuid: str = ""
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    ecc: bool | None = None
    """None: the card has none, or does not say."""
    uncorrected_errors: int | None = None
    """Since the driver was loaded."""
    repair_pending: bool = False
    """Rows to remap, or pages to retire, at the next reset."""
    repair_failed: bool = False
    slowed_by: tuple[str, ...] = ()
    """Hardware reasons for a lower clock, active now."""


class Gpus(Facts):
    seen: str | None = None
    """Where the machine shows a GPU, in words; None without one."""
    driver: str | None = None
    driver_cuda: str | None = None
    """The newest CUDA that the driver serves."""
    cards: tuple[Gpu, ...] = ()
    error: str | None = None
    """Why nvidia-smi gave nothing; None where it is not installed."""


class Package(Facts):
    """An optional thing that a config asks for."""

    problems: tuple[str, ...] = ()
    """What `disttrain train` would refuse, in its words."""
    wandb_server: str | None = None
    """HOST:PORT where the runs would go; None where W&B does not go online."""
    wandb_error: str | None = None


class Node(Facts):
    host: str
    """As the scheduler calls it, or else the machine itself."""
    nonce: str = ""
    """Drawn anew by each doctor: tells this visit's facts from those that an earlier one left."""
    listens: tuple[str, int] | None = None
    """Address and port where this node answers the others while they look."""
    unix_seconds: float = 0.0
    versions: dict[str, str] = {}
    network: Network = Network()
    limits: Limits = Limits()
    shared_memory: SharedMemory = SharedMemory()
    disk: Disk = Disk()
    gpus: Gpus = Gpus()
    packages: Package = Package()


class Way(Facts):
    """One node has tried to reach another one."""

    source: str
    target: str
    address: str = ""
    connect_seconds: float | None = None
    """Until the answer was there; None where there was none."""
    error: str | None = None
    clock_ahead_seconds: float | None = None
    """How much the target's clock shows more than the source's, from the middle of the round trip."""
    clock_error_seconds: float = 0.0
    """Half of the round trip: what that can be wrong by."""


class Collective(Facts):
    """One collective's result on one rank, compared with what it must be, element by element."""

    name: str
    elements: int = 0
    wrong_elements: int = 0
    max_error: float = 0.0
    wrong_from: tuple[int, ...] = ()
    """Ranks whose part is wrong, where the collective keeps the parts apart."""
    bus_bytes_per_second: float | None = None
    """Bytes through each rank's link, as nccl-tests count them; None where it was not timed."""


class Link(Facts):
    """Messages from one rank to another."""

    sender: int
    receiver: int
    bytes_per_second: float
    latency_seconds: float
    """One way, half of a round trip of one number."""
    wrong_elements: int = 0


class Rank(Facts):
    rank: int
    host: str = ""
    device: str = ""
    backend: str = ""
    compute_seconds: float | None = None
    """Median of a fixed computation that is the same on all ranks."""
    compute_cpu_share: float | None = None
    """CPU time over wall time meanwhile: below 1 somebody else had the core."""
    collectives: tuple[Collective, ...] = ()
    links: tuple[Link, ...] = ()
    """Those that this rank has sent on."""
    failed: str | None = None
    """What it was at when it failed, and how."""


class Record(Facts):
    """All that this visit has seen."""

    here: str
    nodes: dict[str, Node] = {}
    missing_hosts: tuple[str, ...] = ()
    """Hosts that were to come and did not; `host 2 of 3` where nobody gave their names."""
    doubles: tuple[str, ...] = ()
    """Names that two nodes have given themselves."""
    ways: tuple[Way, ...] = ()
    ranks: tuple[Rank, ...] = ()
    missing_ranks: dict[int, str] = {}
    """Ranks of which no result came, with the last thing that they were seen at."""
    head_error: str | None = None
    """Why this node could not reach the head; nothing was exchanged then."""
    not_measured: str | None = None
    """Why there are no figures from ranks although there is a launcher."""
    waited_seconds: float = 0.0
