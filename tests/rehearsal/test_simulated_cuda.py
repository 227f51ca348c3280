"""The real runner on a simulated CUDA: same bits as on the CPU in any order of work, with any allocation failing.

The last test tests the others: the runner without any one of its waits, records, or copies does not pass.
"""

import ast
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import pytest

from rehearsed_run import (
    PIECE_TOKENS,
    Case,
    ExactModel,
    make_case,
    make_embed,
    on_cuda,
    require_equal,
    require_overlap,
    run_on,
)
from seqmill.embedding import runner
from seqmill.embedding.embedder import DoesNotFit, PackEmbedder
from simulated_cuda import CUDA, DEVICE, PINNED, SimulatedCuda

SEEDS = {"proteins": 160, "residues": 60, "windows": 30, "contigs": 80}
FEW_PACKS = {"proteins": 3, "residues": 2, "windows": 2, "contigs": 3}
SEEDS_FOR_A_MUTANT = 20
KEYS = [(where, thread) for where in (DEVICE, PINNED) for thread in ("main", "stager")]


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Spare the embedder's garbage collections the objects of torch (a third of a second each), and the log."""
    for name in SEEDS:
        run_on(SimulatedCuda(0), case_of(name), range(2))
    gc.collect()
    gc.freeze()
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    gc.unfreeze()


@cache
def case_of(name: str) -> Case:
    with TemporaryDirectory() as folder:
        return make_case(Path(folder), name)


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.parametrize("part", range(4))
def test_any_order_of_work_gives_the_bits_of_the_cpu(name: str, part: int) -> None:
    """And no copy is on the computing stream, and no wait keeps a core busy."""
    case = case_of(name)
    for seed in range(part, SEEDS[name], 4):
        cuda = SimulatedCuda(seed)
        require_equal(run_on(cuda, case, range(case.index.num_packs)), case.expected)
        require_overlap(cuda, case)


def test_the_cases_have_what_they_are_for() -> None:
    tokens = {name: case_of(name).index.tokens.dtype.name for name in SEEDS}
    assert tokens == {"proteins": "uint8", "residues": "uint8", "windows": "uint8", "contigs": "uint16"}
    assert case_of("windows").index.is_blended
    assert case_of("contigs").index.pack_segments(0) is not None
    for name in SEEDS:
        case = case_of(name)
        packs = [runner.whole_pack(case.index, pack) for pack in range(case.index.num_packs)]
        assert max(len(pack.split(PIECE_TOKENS)) for pack in packs) >= 3
        assert len(case.expected) > runner.STAGED + runner.IN_FLIGHT
        assert (len(case.expected[0][2]) > 0) == (name in {"residues", "windows"})


class Broken(Exception):
    pass


def packs_until(last: int) -> Iterator[int]:
    yield from range(last)
    raise Broken


def embed_until(case: Case, last: int) -> PackEmbedder:
    """Return an embedder that fails after `last` pieces."""

    class Breaking(ExactModel):
        pieces = 0

        def hidden_states(self, *arguments: object) -> Iterator:
            self.pieces += 1
            if self.pieces > last:
                raise Broken
            return super().hidden_states(*arguments)

    return PackEmbedder(Breaking(), case.readout, ExactModel)


@pytest.mark.parametrize("place", range(7))
def test_an_error_ends_the_run_and_its_thread(place: int) -> None:
    """In the stager or on the computing side; what was yielded before is right."""
    case = case_of("proteins")
    for seed in range(6):
        for options in (
            {"packs": packs_until(place)},
            {"packs": range(case.index.num_packs), "embed": embed_until(case, 2 * place)},
        ):
            results: list = []
            with pytest.raises(Broken):
                run_on(SimulatedCuda(seed), case, **options, results=results)
            require_equal(results, case.expected[: len(results)])
            assert not stager_threads()


@pytest.mark.parametrize("place", range(7))
def test_a_run_that_is_closed_early_ends_its_thread(place: int) -> None:
    case = case_of("proteins")
    for seed in range(6):
        cuda = SimulatedCuda(seed)
        with on_cuda(cuda):
            computed = runner.embed_packs(make_embed(case.readout), case.index, range(7), CUDA, 1)
            results = [next(computed) for _ in range(place)]
            computed.close()
            assert not stager_threads()
        require_equal(results, case.expected[:place])


def stager_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "stager"]


def allocations(name: str) -> dict[tuple[str, str], int]:
    """Return how many allocations of each kind a run of few packs makes."""
    cuda = SimulatedCuda(0)
    run_on(cuda, case_of(name), range(FEW_PACKS[name]))
    return {key: cuda.allocations[key] for key in KEYS}


@pytest.mark.parametrize("name", FEW_PACKS)
@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_a_lack_of_memory_that_passes_changes_no_bit(name: str, key: tuple[str, str]) -> None:
    case, packs = case_of(name), range(FEW_PACKS[name])
    number = allocations(name)[key]
    assert number > 4
    for first in range(number):
        cuda = SimulatedCuda(first, failing(key, first, 1))
        require_equal(run_on(cuda, case, packs), case.expected[: len(packs)])
        assert key[1] == "main" or not cuda.busy_waits


@pytest.mark.parametrize("name", FEW_PACKS)
@pytest.mark.parametrize("key", KEYS[1:], ids="-".join)
def test_neither_pinned_memory_nor_staging_is_needed(name: str, key: tuple[str, str]) -> None:
    case, packs = case_of(name), range(FEW_PACKS[name])
    for first in range(0, allocations(name)[key], 3):
        cuda = SimulatedCuda(first, failing(key, first, 1 << 30))
        require_equal(run_on(cuda, case, packs), case.expected[: len(packs)])


@pytest.mark.parametrize("name", FEW_PACKS)
def test_a_device_that_stays_full_is_named(name: str) -> None:
    case, packs = case_of(name), range(FEW_PACKS[name])
    key = (DEVICE, "main")
    for first in range(0, allocations(name)[key], 5):
        results: list = []
        with pytest.raises(DoesNotFit, match="not enough memory for a sequence of"):
            run_on(SimulatedCuda(first, failing(key, first, 1 << 30)), case, packs, results=results)
        require_equal(results, case.expected[: len(results)])
        assert not stager_threads()


def failing(key: tuple[str, str], first: int, number: int) -> Callable[[tuple[str, str], int], bool]:
    return lambda asked, count: asked == key and first <= count < first + number


@pytest.mark.parametrize("name", FEW_PACKS)
def test_a_small_device_gives_the_same_bits_or_names_a_sequence(name: str) -> None:
    case, packs = case_of(name), range(FEW_PACKS[name])
    cuda = SimulatedCuda(0)
    run_on(cuda, case, packs)
    outcomes = set()
    for share in range(20):
        embed = make_embed(case.readout)
        try:
            results = run_on(SimulatedCuda(share, capacity=cuda.peak * share / 20), case, packs, embed=embed)
        except DoesNotFit:
            outcomes.add("too small")
            continue
        require_equal(results, case.expected[: len(packs)])
        outcomes |= {"in pieces"} if embed.splits else set()
        outcomes |= {"on the CPU"} if embed.on_cpu else set()
    assert "in pieces" in outcomes
    assert "too small" in outcomes


def test_warming_up_leaves_nothing_behind_and_survives_a_lack_of_memory() -> None:
    case = case_of("residues")
    for first in range(-1, 12):
        cuda = SimulatedCuda(first, failing((DEVICE, "main"), first, 1))
        with on_cuda(cuda):
            runner.warm_up(make_embed(case.readout), case.index, 0, CUDA)
        assert first >= 0 or cuda.allocations[DEVICE, "main"] > 12
        assert cuda.live == 0


# The runner's calls on which the order of work depends. A mutant lacks one of them.
STATEMENTS = {"wait_event", "record_stream", "synchronize", "copy_"}
FLAGS = {"non_blocking", "blocking", "pin_memory"}


class Mutation(ast.NodeTransformer):
    """Finds the places to mutate, and mutates the one with number `target`: drops a statement, a copy, a record of an
    event, or a stream, or inverts a flag.
    """

    def __init__(self, target: int = -1) -> None:
        self.target, self.places = target, []

    def _mutated(self, node: ast.AST, kind: str, mutant: ast.AST) -> ast.AST:
        self.places.append((kind, node))
        return ast.copy_location(mutant, node) if len(self.places) - 1 == self.target else node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        self.generic_visit(node)
        return self._mutated(node, "no", ast.Pass()) if _called(node.value) in STATEMENTS else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if _called(node) == "record_event":
            return self._mutated(node, "not recorded", ast.parse("torch.cuda.Event()", mode="eval").body)
        if _called(node) == "copy":
            return self._mutated(node, "not copied", node.func.value)
        return node

    def visit_withitem(self, node: ast.withitem) -> ast.AST:
        self.generic_visit(node)
        if _called(node.context_expr) == "stream":
            no_stream = ast.parse("suppress()", mode="eval").body
            node.context_expr = self._mutated(node.context_expr, "not in", no_stream)
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        self.generic_visit(node)
        if node.arg in FLAGS:
            node.value = self._mutated(node.value, f"not {node.arg}:", ast.UnaryOp(ast.Not(), node.value))
        return node


def _called(node: ast.AST) -> str:
    return node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""


def mutants() -> Iterator[tuple[str, int]]:
    """Yield each mutant's name and number."""
    source = Path(runner.__file__).read_text()
    (finding := Mutation()).visit(ast.parse(source))
    for number, (kind, node) in enumerate(finding.places):
        yield f"{kind} {ast.get_source_segment(source, node)} (line {node.lineno})", number


def mutated_runner(number: int) -> ModuleType:
    tree = Mutation(number).visit(ast.parse(Path(runner.__file__).read_text()))
    module = ModuleType("mutated_runner")
    exec(compile(ast.fix_missing_locations(tree), f"mutant {number}", "exec"), module.__dict__)
    return module


def rehearse(module: ModuleType, seed: int) -> None:
    """Make runs that need each line of the runner for CUDA; raise an error unless all is right."""
    for name, pieces in (("proteins", PIECE_TOKENS), ("residues", 10 * PIECE_TOKENS)):  # several in a pack, or one
        case, cuda = case_of(name), SimulatedCuda(seed)
        require_equal(run_on(cuda, case, range(case.index.num_packs), module, pieces=pieces), case.expected)
        require_overlap(cuda, case)
    cuda = SimulatedCuda(seed, failing((DEVICE, "stager"), 0, 1 << 30))
    require_equal(run_on(cuda, case, range(2), module), case.expected[:2])
    assert not cuda.busy_waits


@pytest.mark.parametrize("number", [pytest.param(number, id=name) for name, number in mutants()])
def test_a_runner_that_lacks_something_is_caught(number: int) -> None:
    module = mutated_runner(number)
    for seed in range(SEEDS_FOR_A_MUTANT):
        try:
            rehearse(module, seed)
        except Exception as error:
            print(f"caught with seed {seed}: {error!r}"[:300])
            return
    pytest.fail(f"not caught in {SEEDS_FOR_A_MUTANT} seeds")


def test_a_runner_that_lacks_nothing_passes() -> None:
    for seed in range(SEEDS_FOR_A_MUTANT):
        rehearse(mutated_runner(-1), seed)


def test_the_mutants_cover_the_runner() -> None:
    (finding := Mutation()).visit(ast.parse(Path(runner.__file__).read_text()))
    dropped = {_called(node.value) for kind, node in finding.places if kind == "no"}
    assert dropped == STATEMENTS
    assert {kind for kind, _ in finding.places} == {"no", "not recorded", "not copied", "not in"} | {
        f"not {flag}:" for flag in FLAGS
    }
    assert mutated_runner(-1).embed_packs.__code__.co_code == runner.embed_packs.__code__.co_code
