"""The pretended GPU refuses what a GPU refuses: without that, tests on it would show nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from tests.pretended_cuda import OnDevice, _State, pretended_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture
def device() -> Iterator[_State]:
    with pretended_cuda() as state:
        yield state


def ramp(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def test_it_is_there_only_while_it_is_pretended() -> None:
    before = torch.cuda.is_available()
    with pretended_cuda():
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        kept = ramp(3).to("cuda")
        assert torch.autocast("cuda", torch.bfloat16) is not None
    assert torch.cuda.is_available() == before
    assert isinstance(kept, OnDevice) and str(kept.device) == "cuda:0"
    with pytest.raises((AssertionError, RuntimeError)):
        ramp(3).to("cuda")


@pytest.mark.usefixtures("device")
class TestRules:
    def test_tensors_arrive_and_return(self) -> None:
        for there in (ramp(3, 4).to("cuda"), ramp(3, 4).cuda(), torch.empty(3, 4, device="cuda").copy_(ramp(3, 4))):
            assert there.is_cuda and there.device == torch.device("cuda", 0)
            assert torch.equal((there * 2).cpu(), ramp(3, 4) * 2) and not there.cpu().is_cuda
            assert there.to("cpu", torch.float64).dtype == torch.float64
            assert there.sum().item() == 66 and there[0].tolist() == [0, 1, 2, 3]
        assert torch.tensor([1, 2], device="cuda").is_cuda and torch.zeros_like(there).is_cuda

    def test_numpy_needs_a_copy(self) -> None:
        with pytest.raises(TypeError, match="copy it to host memory"):
            ramp(3).to("cuda").numpy()

    @pytest.mark.parametrize(
        "mixed",
        [
            lambda here, there: here + there,
            lambda here, there: there @ here,
            lambda here, there: torch.cat([here, there]),
            lambda here, there: there.add_(here),
            lambda here, there: torch.where(there > 1, there, here),
            lambda here, there: here[there.long()[0]],
            lambda here, there: there.index_put_((torch.tensor([0]),), here[:1]),
            lambda here, there: torch.nn.Linear(3, 2)(there),
            lambda here, there: here + there.sum(),
        ],
    )
    def test_operands_of_two_devices_are_refused(self, mixed) -> None:
        with pytest.raises(RuntimeError, match=r"same device|indices should be"):
            mixed(ramp(3, 3), ramp(3, 3).to("cuda"))

    def test_numbers_and_positions_of_the_host_are_taken(self) -> None:
        there = ramp(3, 3).to("cuda")
        assert (there * torch.tensor(2.0)).is_cuda and there[torch.tensor([0, 2])].is_cuda
        there[torch.tensor([1])] = 5
        assert there[1].tolist() == [5, 5, 5]

    def test_what_has_no_kernel_is_refused(self) -> None:
        there = ramp(3, 3).long().to("cuda")
        with pytest.raises(RuntimeError, match="not implemented"):
            there @ there
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device="cuda", generator=torch.Generator())
        with pytest.raises(RuntimeError, match="cannot pin"):
            there.pin_memory()

    def test_a_copy_is_there_when_somebody_waited(self) -> None:
        first = ramp(3).to("cuda").to("cpu", non_blocking=True)
        event = torch.cuda.current_stream().record_event()
        second = ramp(3).to("cuda").to("cpu", non_blocking=True)
        assert first.isnan().all() and second.isnan().all()
        event.synchronize()
        assert first.tolist() == [0, 1, 2] and second.isnan().all()
        torch.cuda.synchronize()
        assert second.tolist() == [0, 1, 2]

    def test_networks_are_trained(self) -> None:
        torch.manual_seed(0)
        networks = [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)) for _ in "ab"]
        networks[1].load_state_dict(networks[0].state_dict())
        found = []
        for network, device in zip(networks, ("cpu", "cuda"), strict=True):
            network.to(device)
            optimiser = torch.optim.Adam(network.parameters(), lr=0.1)
            for _ in range(3):
                optimiser.zero_grad()
                network(ramp(5, 4).to(device)).square().mean().backward()
                optimiser.step()
            assert all(parameter.is_cuda == (device == "cuda") for parameter in network.parameters())
            found.append([parameter.detach().cpu() for parameter in network.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def test_lower_precision_is_lower(self) -> None:
        layer = torch.nn.Linear(4, 3).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            assert layer(ramp(5, 4).to("cuda")).dtype == torch.bfloat16

    def test_other_threads_see_it_too(self) -> None:
        found = []
        thread = threading.Thread(target=lambda: found.append(ramp(3).to("cuda").sum().item()))
        thread.start()
        thread.join()
        assert found == [3]


def test_memory_is_counted_and_ends() -> None:
    with pretended_cuda(10_000) as device:
        begin = device.used
        kept = torch.zeros(1000, device="cuda")
        assert device.used - begin == 4000
        view = kept[10:]
        kept.add_(1)
        assert device.used - begin == 4000
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(2000, device="cuda")
        del kept
        assert device.used - begin == 4000 and view[0].item() == 1
        del view
        assert device.used == begin and device.peak >= begin + 4000
        assert torch.cuda.mem_get_info()[1] == 10_000
