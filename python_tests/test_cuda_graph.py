"""Nothing on the hot path waits for the device: CUDA graphs of whole training steps, and the source itself."""

import ast
import contextlib
import itertools
from pathlib import Path

import pytest
import torch

import vqkernels as vq
from vqkernels.nn import METHODS, Codebook, ImportanceReplacement, LatentMeans, TwoPhase, build
from vqkernels.nn.quantizers import base as module
from vqkernels.testing import DEVICE

pytestmark = [
    # advice to those who forgot to capture, or to set up what is captured on the same stream
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True"),
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
PACKAGE = Path(vq.__file__).parent
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="it needs VQKERNELS_TEST_DEVICE=cuda and a GPU")
N, K, D = 500, 32, 6


class Training:
    """A module, its optimizer and a batch that stays where it is, as a captured graph wants it.

    What has a schedule is committed by hand, after each step or replay; everything else follows its optimizer.
    """

    def __init__(self, name, *, upkeep=()):
        torch.manual_seed(1)
        self.shift = torch.nn.Parameter(torch.zeros(D, device=DEVICE))
        self.quantizer = build(name, dim=D, num_codes=K, upkeep=upkeep).to(DEVICE)
        for part in self.quantizer.modules():
            if isinstance(part, Codebook) and part.assignable:
                part.assign(torch.randn(K, part.dim, device=DEVICE))
        parameters = [self.shift, *self.quantizer.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=0.01, capturable=DEVICE.type == "cuda")
        self.by_hand = not self.quantizer.idle
        if not self.by_hand:
            self.quantizer.follow(self.optimizer)
        # a direction, for the sum of squares is a constant on the sphere
        self.x, self.weight = torch.randn(N, D, device=DEVICE), torch.linspace(1, 2, D, device=DEVICE)

    def forward(self):
        z = self.quantizer(self.x + self.shift).z.detach()
        if not capturing():
            self.commit()
        return z

    def step(self):
        self.optimizer.zero_grad()
        z, indices, loss = self.quantizer(self.x + self.shift)
        ((z * self.weight).mean() + loss).backward()
        self.optimizer.step()
        if not capturing():
            self.commit()
        return z.detach(), indices

    def commit(self):
        """What the host does after each step, also after each replay."""
        if self.by_hand:
            self.quantizer.commit(self.optimizer)

    def state(self):
        return [
            self.shift.detach().clone(),
            self.quantizer.export(),
            *map(torch.clone, self.quantizer.buffers()),
        ]


def capturing():
    return DEVICE.type == "cuda" and torch.cuda.is_current_stream_capturing()


def capture(run, *, warm_up=3, before=lambda number: None):
    """A graph of one call, after a few calls on the same side stream that were not captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in range(warm_up):
            before(number)
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = run()
    return graph, kept


@contextlib.contextmanager
def no_waiting():
    """Any call of torch that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", list(METHODS))
def test_steps_that_are_not_captured(name):
    """What the graphs below capture, run as it is: two trainings are equal, and go on changing."""
    first, second = Training(name), Training(name)
    for number in range(3):
        before = first.state()
        for training in (first, second):
            torch.manual_seed(number)
            z, indices = training.step()
            assert z.isfinite().all() and indices.min() >= 0
            assert indices.max() < training.quantizer.num_indices
        after = first.state()
        assert not torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
        assert all(torch.equal(a, b) for a, b in zip(after, second.state(), strict=True))


@needs_cuda
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", list(METHODS))
def test_a_training_step_is_captured(name, deterministic, backend, need):
    """Every replay is a step: codes and latents go on changing, and stay finite."""
    need("directional_backward")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if backend == "reference":
        pytest.skip("the reference looks at values on the host")
    with vq.use_backend(backend):
        training = Training(name)
        graph, (z, indices) = capture(training.step)
        seen = [training.state()]
        for _ in range(3):
            graph.replay()
            training.commit()
            seen.append(training.state())
            assert (
                z.isfinite().all()
                and (indices >= 0).all()
                and (indices < training.quantizer.num_indices).all()
            )
    for before, after in itertools.pairwise(seen):
        assert not torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
        assert all(value.isfinite().all() for value in after)


@needs_cuda
@pytest.mark.parametrize("name", list(METHODS))
def test_noise_is_fresh_on_every_replay(name):
    """With equal inputs, outputs differ where there is noise, and only there."""
    training = Training(name)
    training.quantizer.requires_grad_(False)
    graph, z = capture(training.forward)
    found = []
    for _ in range(3):
        graph.replay()
        found.append(z.clone())
    different = [
        not torch.equal(a, b) for a, b in ((found[0], found[1]), (found[1], found[2]), (found[0], found[2]))
    ]
    assert different == [training.quantizer.noisy] * 3


@needs_cuda
@pytest.mark.parametrize("name", list(METHODS))
def test_replays_equal_steps(name):
    """From the same state of the generator, replays and eager steps leave the same weights to the bit."""
    eager, replayed = Training(name), Training(name)
    graph, _ = capture(replayed.step, before=torch.cuda.manual_seed)
    for number in range(6):
        torch.cuda.manual_seed(number)
        eager.step()
        if number >= 3:
            torch.cuda.manual_seed(number)
            graph.replay()
            replayed.commit()
    for a, b in zip(eager.state(), replayed.state(), strict=True):
        assert torch.equal(a, b)


@needs_cuda
def test_replacement_is_committed_after_replays():
    """Uses are counted by the graph; the schedule and the replacement are the host's, once per replay."""
    upkeep = ImportanceReplacement(TwoPhase(100, first=4, until=100, stop_before=0), threshold=0.5)
    training = Training("diveq", upkeep=[upkeep])
    graph, _ = capture(training.step)
    far = torch.full((K // 2, D), 1e3, device=DEVICE)
    with torch.no_grad():
        training.quantizer.codebook.weight[: K // 2] = far
    upkeep.counts.zero_()
    for number in range(4, 9):
        graph.replay()
        training.commit()
        moved = training.quantizer.export()[: K // 2].abs().amax(1) < 500
        # due at step 4 and at step 8; all that is far is unused and replaced
        assert moved.all() == (number >= 4) and bool(upkeep.counts.any()) == (number % 4 != 0)


@needs_cuda
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_do_not_wait_for_the_device(dtype, deterministic, backend, need):
    need("directional_backward", dtype, dtype)
    if backend == "reference":
        pytest.skip("the reference looks at values on the host")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    x, codes = torch.randn(N, D, device=DEVICE).to(dtype), torch.randn(K, D, device=DEVICE).to(dtype)
    x.requires_grad_(), codes.requires_grad_()
    seed, grad = torch.tensor(3, device=DEVICE), torch.randn_like(x)

    def run():
        indices = vq.nearest_code(x, codes, backend=backend).indices
        vq.nearest_code(x, codes, exact=False, backend=backend)
        vq.code_sums(x, indices, K, backend=backend)
        for function in (vq.diveq, vq.sf_diveq):
            function(x, codes, backend=backend).z.backward(grad)
            function(x, codes, seed=seed, backend=backend).z.backward(grad)

    # what is compiled and loaded once may wait
    run()
    with no_waiting():
        run()


@needs_cuda
@pytest.mark.parametrize("name", list(METHODS))
def test_steps_do_not_wait_for_the_device(name):
    counted = METHODS[name].upkeep and not METHODS[name].segments
    upkeep = [ImportanceReplacement(TwoPhase(9, 2, stop_before=0))] if counted else []
    training = Training(name, upkeep=upkeep)
    for _ in range(2):
        training.step()
    with no_waiting():
        for _ in range(3):
            training.step()


def test_what_replays_would_not_repeat_is_refused(monkeypatch):
    """A schedule and a warm-up are the host's; a graph that captured them would stop them without a word."""
    monkeypatch.setattr(module, "_capturing", lambda device: True)
    x, optimizer = torch.randn(K, D), torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 0.1)

    def replacing():
        return build("ste", dim=D, num_codes=K, upkeep=[ImportanceReplacement(TwoPhase(9, 2, stop_before=0))])

    by_hand, waiting, followed = replacing(), replacing(), replacing()
    by_hand(x)
    by_hand.commit()
    by_hand(x)
    waiting(x)
    with pytest.raises(RuntimeError, match=r"upkeep must be committed by hand .* got a forward that waits"):
        waiting(x)
    followed.follow(optimizer)
    with pytest.raises(RuntimeError, match=r"got a followed optimizer\. Call quantizer\.commit"):
        followed(x)
    warm = build("sf_diveq", dim=D, num_codes=K, upkeep=[LatentMeans(1, latents_per_code=1)])
    warm.follow(optimizer)
    with pytest.raises(RuntimeError, match="codebook must be initialized to be captured"):
        warm(x)
    monkeypatch.setattr(module, "_capturing", lambda device: False)
    warm(x)
    optimizer.step()
    monkeypatch.setattr(module, "_capturing", lambda device: True)
    # the warm-up is over: nothing is left that has a schedule
    assert warm(x).indices.min() >= 0


# calls that bring a value from the device to the host, or whose result has a size that depends on values
WAITING = {
    *("item", "tolist", "cpu", "numpy", "nonzero", "argwhere"),
    *("unique", "unique_consecutive", "masked_select"),
    *("synchronize", "equal", "allclose", "is_nonzero", "bincount"),
    # a copy from the host, which waits for it
    *("tensor", "as_tensor", "from_numpy"),
}
CASTS = {"int", "float", "bool"}
# between two steps, of state that is on the host, or of numbers that are Python's own
ALLOWED = {
    # measures, where the user asked for it
    ("kernels/_tuning.py", "_times"),
    ("kernels/straight_through_backward.py", "_form"),
    ("nn/metrics.py", "check_data_range"),
    ("nn/quantizers/base.py", "Quantizer.get_extra_state"),
    ("nn/quantizers/base.py", "Quantizer.set_extra_state"),
    ("nn/quantizers/fsq.py", "FSQ.constants"),
    ("nn/upkeep/base.py", "UpkeepReport.to_dict"),
    ("nn/upkeep/base.py", "Upkeep.get_extra_state"),
    ("nn/upkeep/base.py", "Upkeep.set_extra_state"),
    ("nn/upkeep/recent.py", "RecentLatents.in_order"),
}


def functions(tree, prefix=""):
    """Every function of a file by its dotted name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if isinstance(node, ast.FunctionDef):
                yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from functions(node, f"{prefix}{node.name}.")


def cold(found):
    """Bodies of the reference, and what nothing else in their file mentions."""
    named = {
        name: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & set(found) - {name}
        for name, node in found.items()
    }
    known = {name for name in found if name.startswith("_reference")}
    while True:
        callers = {name: {other for other in found if name in named[other]} for name in found}
        more = {name for name in found if callers[name] and callers[name] <= known} - known
        if not more:
            return known
        known |= more


def waits(source, path=""):
    """Names of functions on the hot path of a file that wait for the device, with the call that does."""
    found = dict(functions(ast.parse(source)))
    for name, node in found.items():
        jitted = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        # nothing is captured while a module is made
        made = name.endswith("__init__")
        if name in cold(found) or jitted or made or (path, name) in ALLOWED:
            continue
        for call in (each for each in ast.walk(node) if isinstance(each, ast.Call)):
            function = call.func
            if isinstance(function, ast.Attribute) and function.attr in WAITING:
                yield name, function.attr
            if isinstance(function, ast.Name) and function.id in CASTS and not simple(call):
                yield name, function.id


def simple(call):
    """A cast of a constant, such as float("inf") or int(NUM_FACTS), or of a condition that is Python's own."""
    (argument,) = call.args
    constant = isinstance(argument, ast.Constant) or (
        isinstance(argument, ast.Name) and argument.id.isupper()
    )
    parts = list(ast.walk(argument))
    own = not any(isinstance(part, (ast.Call, ast.Subscript)) for part in parts)
    return constant or (isinstance(argument, (ast.Compare, ast.BoolOp)) and own)


def test_no_call_on_the_hot_path_waits():
    folders, seen = set(), set()
    for folder in ("ops", "kernels", "nn"):
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            name = path.relative_to(PACKAGE).as_posix()
            folders.add(path.parent.name)
            source = path.read_text()
            seen.update((name, function) for function, _ in functions(ast.parse(source)))
            assert list(waits(source, name)) == [], name
    assert {"quantizers", "estimators", "codebooks", "upkeep"} <= folders
    # what is allowed is there: an entry that nobody needs would hide a later one
    assert seen >= ALLOWED


def test_the_search_for_waiting_calls_finds_them():
    bad = """
def _reference(x):
    return _helper(x).nonzero()

def _helper(x):
    return x.tolist()

def _shared(x):
    return x.cpu()

def _reference_backward(x):
    return _shared(x)

def launch(x):
    return _shared(x), float("inf"), int(x.max())

class Module:
    def __init__(self, x):
        self.x = float(x)

    def forward(self, x):
        return x.item() + torch.tensor([1, 2], device=x.device)
"""
    expected = [
        ("Module.forward", "item"),
        ("Module.forward", "tensor"),
        ("_shared", "cpu"),
        ("launch", "int"),
    ]
    assert sorted(waits(bad)) == expected
