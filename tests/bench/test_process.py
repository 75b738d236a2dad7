import pytest
import torch
from torch import nn

from dfs_cli.bench.process import added_memory, bytes_of, interruptions, peak_bytes, size_of

CPU = torch.device("cpu")
MIB = 1 << 20


def test_peak_memory_by_hand() -> None:
    def step() -> None:
        first = torch.empty(MIB)  # 4 MiB
        second = torch.empty(MIB)
        del first
        third = torch.empty(MIB // 2)
        del second, third

    assert 8 * MIB <= peak_bytes(step, CPU) <= 8 * MIB + 4096


def test_what_was_there_before_is_no_peak() -> None:
    there = torch.ones(MIB)
    assert peak_bytes(lambda: there.add_(1), CPU) <= 4096


def test_sizes_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    # 6 + 2 weights and biases, 2 + 2 scales and shifts, 2 + 2 statistics of 4 bytes each; a count of 8 bytes.
    expected = 4 * 16 + 8
    assert size_of(model) == expected
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    # Two moments of the 12 parameters, and the step count of each of the 4 tensors.
    assert size_of(model, optimizer, torch.zeros(5)) == expected + 4 * (2 * 12 + 4) + 20
    assert bytes_of([torch.zeros(3, dtype=torch.int8), torch.zeros(2, 2, dtype=torch.float64)]) == 3 + 32


def test_the_process_grows_by_what_is_made_and_used() -> None:
    used: list[int] = []

    def use(made: bytearray) -> None:
        more = bytearray(b"1") * (16 * MIB)
        used.append(len(made) + len(more))

    made, grown = added_memory(lambda: bytearray(b"1") * (48 * MIB), use)
    assert len(made) == 48 * MIB and used == [64 * MIB]
    if grown is None:
        pytest.skip("this system does not tell how much memory a process takes")
    assert 60 * MIB <= grown <= 80 * MIB


def test_interruptions_are_counted_and_never_fall() -> None:
    before = interruptions()
    assert 0 <= before <= interruptions()
