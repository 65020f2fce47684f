"""What only a GPU can show: the copy to pinned host memory, taken while kernels are under way."""

import pytest
import torch

from tests.checkpoint import toys

pytestmark = pytest.mark.gpu


def test_the_copy_holds_the_moment_of_the_start(tmp_path):
    weight = torch.zeros(4096, 4096, device="cuda")
    for _ in range(50):
        weight += 1
    manager = toys.manager(tmp_path, asynchronous=True)
    manager.start({"model.weight": weight}, **toys.about(1))
    weight += 1
    saved = manager.finish()
    assert saved is not None
    assert saved.problems == ()
    loaded = {"model.weight": torch.empty(4096, 4096, device="cuda")}
    manager.load(loaded, manager.latest())
    assert bool((loaded["model.weight"] == 50).all())
    assert manager._staging._host._buffers["model.weight"].is_pinned()
