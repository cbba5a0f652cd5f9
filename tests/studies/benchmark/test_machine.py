"""What is counted and measured beside the clock: operations, tokens, memory, growth."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alphaedit_peft import hooks
from alphaedit_peft.architecture import describe
from alphaedit_peft.editing.runner import Phases
from alphaedit_peft.studies.benchmark.curves import Grid, System, growth
from alphaedit_peft.studies.benchmark.machine import (
    OperationCounter,
    PeakMemory,
    counting_tokens,
    describe_machine,
    floor_seconds,
    matrix_rate,
)
from tests.conftest import tiny_model

CPU = torch.device("cpu")


def counted(work) -> int:
    with OperationCounter() as counter:
        work()
    return sum(n for counts in counter.by_phase.values() for n in counts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_product_counts_two_for_each_multiply_add(dtype):
    left, right = torch.ones(3, 5, dtype=dtype), torch.ones(5, 7, dtype=dtype)
    with OperationCounter() as counter:
        left @ right
    assert counter.by_phase == {"other": {str(dtype).removeprefix("torch."): 2 * 3 * 5 * 7}}


def test_a_backward_pass_counts_twice_the_forward():
    layer, rows = nn.Linear(8, 16, bias=False), torch.ones(4, 8, requires_grad=True)
    forward = counted(lambda: layer(rows))
    assert forward == 2 * 4 * 8 * 16
    assert counted(lambda: layer(rows).sum().backward()) == 3 * forward


def test_factorisations_count_as_textbooks_have_it():
    n, m = 12, 5
    matrix, right = torch.eye(n, dtype=torch.float64), torch.ones(n, m, dtype=torch.float64)
    assert counted(lambda: torch.linalg.cholesky_ex(matrix)) == n**3 // 3
    assert counted(lambda: torch.cholesky_solve(right, matrix)) == 2 * n * n * m
    assert counted(lambda: torch.linalg.solve(matrix, right)) == 2 * n**3 // 3 + 2 * n * n * m
    triangular = counted(lambda: torch.linalg.solve_triangular(matrix, right, upper=False))
    assert triangular == n * n * m
    assert counted(lambda: torch.linalg.eigh(matrix)) == 9 * n**3


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_a_forward_counts_its_weights_twice_for_each_token_and_attention(family):
    model, tokens = tiny_model(family), 24
    ids = torch.arange(tokens)[None]
    tables = {id(model.get_input_embeddings().weight)}
    tables |= {id(p) for n, p in model.named_parameters() if n.endswith("wpe.weight")}
    head = model.get_output_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    weights = sum(p.numel() for p in matrices)
    weights += head.numel() if id(head) in tables else 0  # tied
    attention = model.config.num_hidden_layers * 4 * tokens * tokens * model.config.hidden_size
    with torch.no_grad():
        found = counted(lambda: model(ids, use_cache=False))
    assert found == pytest.approx(2 * tokens * weights + attention, rel=0.01)


def test_operations_go_to_the_innermost_phase():
    phases, one = Phases(), torch.ones(2, 2)
    counter = OperationCounter(phases)
    with counter:
        one @ one
        with phases.timed("keys"):
            one @ one
            with phases.timed("solve"):
                one.double() @ one.double()
            one @ one
    assert counter.by_phase == {
        "other": {"float32": 16},
        "keys": {"float32": 32},
        "solve": {"float64": 16},
    }
    assert phases.phase is None


def test_tokens_count_in_the_blocks_that_run():
    model = tiny_model("llama")
    architecture = describe(model)
    ids = torch.ones(2, 5, dtype=torch.long)
    with counting_tokens(model, architecture) as seen, torch.no_grad():
        hooks.run_until(model, {"input_ids": ids}, architecture.block_name(1))
    assert dict(seen) == {architecture.block_name(n): 10 for n in (0, 1)}


def test_the_floor_adds_each_dtype_at_its_own_rate():
    rates = {"float32": 50.0, "float64": 10.0}
    assert floor_seconds({"float32": 100, "float64": 30}, rates) == 5
    assert floor_seconds({"float8_e4m3fn": 100}, rates) == 2  # no rate: the highest


def test_the_machine_is_described_without_a_path():
    found = describe_machine(CPU)
    assert found["processor"]
    assert found["versions"]["torch"] == torch.__version__
    assert not [value for value in found.values() if isinstance(value, str) and "/home" in value]
    assert matrix_rate(torch.float32, CPU) > 0


def test_peak_memory_is_what_rose_within_even_if_it_was_given_back():
    with PeakMemory(CPU) as memory:
        held = torch.ones(32 * 2**20, dtype=torch.float32)  # 128 MiB
        del held
    if not memory.exact:
        pytest.skip("this system does not let a process set its peak back")
    assert 120 * 2**20 < memory.above < 200 * 2**20
    with PeakMemory(CPU) as memory:
        torch.ones(10)
    assert memory.above < 60 * 2**20


def test_growth_compares_ways_that_give_the_same_update():
    system = System.drawn(6, 4, 40, 7, CPU)
    solved = system.ours()
    again = system.ours(solved.kept)
    assert torch.equal(solved.delta.B, again.delta.B)
    dense = system.plain(*system.dense())
    assert torch.allclose(solved.delta.dense(), dense, atol=1e-5)
    assert float(dense.norm()) > 0.1


@pytest.mark.slow
def test_growth_has_a_point_for_each_size_and_way():
    grid = Grid((0, 20), (32, 64), 32, 10, 5, 16, (4,), (64,))
    found = growth(grid)
    assert [p.at for p in found.curve("edits", "plain")] == [0, 20]
    assert [p.at for p in found.curve("widths", "anew")] == [32, 64]
    assert found.curve("edits", "ours")[0].state == 0
    states = [p.state for p in found.curve("widths", "plain")]
    assert states[1] == 4 * states[0]
    batch = found.curve("depths", "batch")[0]
    assert batch.floor > 0
    assert set(found.to_json()) == {"grid", "machine", "points"}
