"""The vocabulary sharded over real process groups: 2 and 3 ranks with gloo, which stay alive for all tests."""

import contextlib
import datetime
import multiprocessing
import pickle
import traceback

import pytest
import torch
import torch.distributed as dist
from test_extreme_logits import HUGE

import oracle
from abkd_fast import fused_linear_cross_entropy, fused_linear_divergence, parse
from abkd_fast.losses import chunks, vocab_parallel
from oracle import FAMILIES
from row_kernels import ALL, FLOAT32

PATIENCE = 60  # seconds that a rank waits for the others
# Sums over the vocabulary have another order than for whole rows. The oracle's quadrature has an error of its own.
TOLERANCE = {torch.float32: FLOAT32, torch.float64: 1e-12}
FLOAT64_ORACLE = 1e-10
TOKENS, VOCAB = 20, 37
SIZES = {2: [26, 11], 3: [5, 0, 32]}  # rows of each rank's part
OPTIONS = {"temperature": 2.0, "hard_weight": 0.3, "chunk_tokens": 7}
ALPHANET = "alphanet:0.2,0.8,batch"


# ---- ranks


def serve(rank, size, folder, connection):
    """Runs the functions that it receives until the connection closes. Answers with the result or the exception."""
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": size, "timeout": datetime.timedelta(seconds=PATIENCE)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/{size}", **options)
    with contextlib.suppress(EOFError):
        while True:
            function, arguments, keywords = pickle.loads(connection.recv_bytes())
            try:
                answer = function(*arguments, **keywords), None
            except Exception as error:
                answer = error, traceback.format_exc()
            connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


class World:
    def __init__(self, size, folder):
        # All ranks are forks of one process that has done the slow imports.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch.distributed.tensor", "abkd_fast.losses.fused_linear", "pytest", "mpmath"]
        )
        self.connections, self.processes = [], []
        for rank in range(size):
            mine, its = context.Pipe()
            process = context.Process(target=serve, args=(rank, size, folder, its), daemon=True)
            process.start()
            its.close()
            self.connections.append(mine)
            self.processes.append(process)

    def answers(self, function, *arguments, **keywords):
        """The result of function(*arguments, **keywords) on each rank, or its exception and the trace of that."""
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((function, arguments, keywords)))
        assert all(connection.poll(2 * PATIENCE) for connection in self.connections), "a rank does not answer"
        return [pickle.loads(connection.recv_bytes()) for connection in self.connections]

    def __call__(self, function, *arguments, **keywords):
        answers = self.answers(function, *arguments, **keywords)
        for _, trace in answers:
            assert trace is None, trace
        return [result for result, _ in answers]

    def errors(self, function, *arguments, **keywords):
        return [error for error, _ in self.answers(function, *arguments, **keywords)]

    def close(self):
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(PATIENCE)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder, started = tmp_path_factory.mktemp("ranks"), {}
    yield lambda size: started.get(size) or started.setdefault(size, World(size, folder))
    for world in started.values():
        world.close()


# ---- data and expectations


def make(dtype=torch.float64, tokens=TOKENS, vocab=VOCAB, teacher_vocab=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).div(2).to(dtype)

    student = tensor(tokens, 8), tensor(vocab, 8), tensor(vocab)
    teacher = tensor(tokens, 12), tensor(teacher_vocab or vocab, 12), tensor(teacher_vocab or vocab)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[1::3] = -100
    return student, teacher, labels


def part(model, sizes, rank):
    hidden, *projection = model
    return hidden, *(x.split(sizes)[rank] for x in projection)


def loss_of(student, teacher, labels, divergence, **options):
    hidden, weight, bias = student
    if teacher is None:
        return fused_linear_cross_entropy(hidden, weight, labels, student_bias=bias, **options)
    biases = {"student_bias": bias, "teacher_bias": teacher[2]}
    return fused_linear_divergence(hidden, weight, *teacher[:2], parse(divergence), labels, **biases, **options)


def differentiate(student, teacher, labels, divergence, frozen=(), **options):
    """The loss and its gradients by hidden states, projection and bias. Losses per row get different weights."""
    student = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(student)]
    loss = loss_of(student, teacher, labels, divergence, **options)
    loss.backward(
        torch.linspace(-1, 2, len(loss), dtype=loss.dtype) if loss.dim() else torch.tensor(1.7, dtype=loss.dtype)
    )
    return [loss.detach(), *(x.grad for x in student)]


def on_a_rank(sizes, student, teacher, labels, divergence, teacher_sizes=None, **options):
    rank = dist.get_rank()
    teacher = None if teacher is None else part(teacher, teacher_sizes or sizes, rank)
    return differentiate(part(student, sizes, rank), teacher, labels, divergence, group=dist.group.WORLD, **options)


def join(answers):
    """Joins loss and gradients of all ranks. What has to be the same on all ranks must be so to the last bit."""
    for answer in answers[1:]:
        assert torch.equal(answer[0], answers[0][0])
        assert answer[1] is None or torch.equal(answer[1], answers[0][1])
    parts = [[answer[i] for answer in answers if answer[i] is not None] for i in (2, 3)]
    return [*answers[0][:2], *(torch.cat(x) if x else None for x in parts)]


def by_oracle(student, teacher, labels, divergence, reduction="mean", temperature=1.0, hard_weight=0.0, chunk_tokens=0):
    hidden, weight, bias = (x.double() for x in student)
    logits, theirs = hidden @ weight.T + bias, teacher[0].double() @ teacher[1].double().T + teacher[2].double()
    losses, gradient = oracle.evaluate(logits, theirs, parse(divergence), labels, temperature, hard_weight)
    if reduction == "none":
        gradient = gradient * torch.linspace(-1, 2, len(losses), dtype=losses.dtype)[:, None]
    else:
        count = (labels != -100).sum() if reduction == "mean" else 1
        losses, gradient = losses.sum() / count, 1.7 * gradient / count
    return [losses, gradient @ weight, gradient.T @ hidden, gradient.sum(0)]


def assert_close(got, expected, bound):
    for mine, exact in zip(got, expected, strict=True):
        if mine is None or exact is None:
            assert mine is exact
            continue
        assert mine.shape == exact.shape
        error = (mine.double() - exact.double()).norm()
        assert error <= bound * exact.double().norm(), (error / exact.double().norm()).item()


# ---- against whole rows


@pytest.mark.parametrize("divergence", ALL)
def test_every_family(worlds, divergence):
    for size, dtype, reduction in ((2, torch.float32, "mean"), (3, torch.float64, "none")):
        case = *make(dtype), divergence
        options = {**OPTIONS, "reduction": reduction}
        got = join(worlds(size)(on_a_rank, SIZES[size], *case, **options))
        assert got[0].dtype == dtype
        assert_close(got, differentiate(*case, **options), TOLERANCE[dtype])
        assert_close(got, by_oracle(*case, **options), FLOAT32 if dtype == torch.float32 else FLOAT64_ORACLE)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(worlds, reduction):
    student, _, labels = make()
    case, options = (student, None, labels, ""), {"reduction": reduction, "chunk_tokens": 7}
    for size in (2, 3):
        got = join(worlds(size)(on_a_rank, SIZES[size], *case, **options))
        assert_close(got, differentiate(*case, **options), TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    ("sizes", "tokens"),
    [([2, 1], 5), ([1, 0], 5), ([1, 1], 1), ([18, 19], 1), ([0, 37], 1), ([36, 1], 0), ([7, 2, 1], 1)],
)
@pytest.mark.parametrize("divergence", ["ab", "akl", "bdkd", ALPHANET])
def test_small_sizes(worlds, divergence, sizes, tokens):
    case = *make(tokens=tokens, vocab=sum(sizes)), divergence
    got = join(worlds(len(sizes))(on_a_rank, sizes, *case, **OPTIONS))
    for mine, whole in zip(got, differentiate(*case, **OPTIONS), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-12, atol=1e-15)  # with one token all probabilities are 1


@pytest.mark.parametrize("divergence", ["ab", "akl", "bdkd", "jsd"])
def test_large_vocabulary(worlds, divergence):
    case, sizes = (*make(torch.float32, tokens=4, vocab=50257), divergence), [25129, 25128]
    got = join(worlds(2)(on_a_rank, sizes, *case))
    assert_close(got, by_oracle(*case), FLOAT32)
    assert_close(got, differentiate(*case), FLOAT32)


@pytest.mark.parametrize("divergence", ["fkl", ALPHANET, "akl", ""])
def test_all_labels_ignored(worlds, divergence):
    student, teacher, labels = make()
    case = student, teacher if divergence else None, labels.fill_(-100), divergence
    loss, *gradients = join(worlds(2)(on_a_rank, SIZES[2], *case))
    assert loss == 0
    assert all(x.eq(0).all() for x in gradients)


def test_a_label_100_rows_before_a_part_is_not_an_ignored_one(worlds):
    student, teacher, labels = make(vocab=300)
    labels[0], labels[2] = 100, 50
    for case in ((student, None, labels, ""), (student, teacher, labels, "ab")):
        options = {} if case[1] is None else OPTIONS
        got = join(worlds(2)(on_a_rank, [150, 150], *case, **options))
        assert_close(got, differentiate(*case, **options), TOLERANCE[torch.float64])


def test_a_label_beyond_the_vocabulary_is_an_infinite_loss(worlds):
    student, _, labels = make()
    labels[0] = VOCAB
    got = join(worlds(2)(on_a_rank, SIZES[2], student, None, labels, "", reduction="none"))
    assert got[0].isinf().nonzero().tolist() == [[0]]


@pytest.mark.parametrize(("size", "sizes", "teacher_sizes"), [(2, [20, 17], [20, 30]), (3, [9, 9, 0], [9, 11, 5])])
def test_padded_vocabularies(worlds, size, sizes, teacher_sizes):
    for swapped in (False, True):
        ours, theirs = (teacher_sizes, sizes) if swapped else (sizes, teacher_sizes)
        student, teacher, labels = make(vocab=sum(ours), teacher_vocab=sum(theirs))
        case = student, teacher, labels % sum(sizes), "ab"
        got = join(worlds(size)(on_a_rank, ours, *case, teacher_sizes=theirs, **OPTIONS))
        assert_close(got, differentiate(*case, **OPTIONS), TOLERANCE[torch.float64])


@pytest.mark.parametrize("frozen", [(0,), (1,), (1, 2), (0, 1)])
def test_frozen_inputs_get_no_gradient(worlds, frozen):
    for reduction in ("mean", "none"):
        case, options = (*make(), "akl"), {**OPTIONS, "reduction": reduction, "frozen": frozen}
        got = join(worlds(2)(on_a_rank, SIZES[2], *case, **options))
        assert [x is None for x in got[1:]] == [i in frozen for i in range(3)]
        assert_close(got, differentiate(*case, **options), TOLERANCE[torch.float64])


def test_16_bit_logits(worlds):
    case, options = (*make(torch.float32), "jsd"), {"logits_dtype": torch.bfloat16}
    got = join(worlds(2)(on_a_rank, SIZES[2], *case, **options))
    # The logits are the same. Their gradient is rounded to 2^-9, and its last float32 bits decide the direction.
    assert_close(got, differentiate(*case, **options), 2**-8)


# ---- extreme rows


@pytest.mark.parametrize("divergence", [*FAMILIES, "ab:1,0", "ab:0,1", "ab:0.5,0.5"])
def test_huge_gaps(worlds, divergence):
    # One row per call, because of AlphaNet. Hidden states times 1 are the logits.
    weight, no_bias = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    same = {"ab:1,0": "fkl", "ab:0,1": "rkl", "ab:0.5,0.5": "hellinger"}
    for rows in zip(*HUGE, strict=True):
        value, gradient = oracle.exact(*rows, parse(same.get(divergence, divergence)))
        student, teacher = ((torch.tensor([x], dtype=torch.float64), weight, no_bias) for x in rows)
        got = join(worlds(2)(on_a_rank, [1, 2], student, teacher, None, divergence, reduction="sum"))
        bound = 1e8 * torch.finfo(torch.float64).eps  # see test_extreme_logits.py
        assert got[0].item() == pytest.approx(value, abs=bound)
        assert got[1][0].div(1.7).tolist() == pytest.approx(gradient, abs=bound)


@pytest.mark.parametrize("divergence", ["jsd:0.5", "sfkl:0.1", "tvd", "hellinger", ALPHANET, "alphanet:0.3,2,token"])
def test_distributions_that_hardly_overlap(worlds, divergence):
    student, teacher = oracle.independent_logits(4, 2001)
    value, gradient = oracle.evaluate(student, teacher, parse(divergence))
    # Hidden states times 1 are the logits.
    heads = [(x, torch.eye(2001), torch.zeros(2001)) for x in (student, teacher)]
    options = {"reduction": "sum", "frozen": (1, 2)}
    got = worlds(3)(on_a_rank, [700, 0, 1301], *heads, None, divergence, **options)
    assert_close(got[0][:2], (value.sum(), 1.7 * gradient), FLOAT32)


@pytest.mark.parametrize("divergence", ["ab", "akl", "bdkd", "tvd"])
@pytest.mark.parametrize("everything", [False, True])
def test_masked_parts(worlds, divergence, everything):
    student, teacher, labels = make()
    for bias in (student[2], teacher[2]):
        bias[0 if everything else 26 :] = -torch.inf
    case, options = (student, teacher, labels % 26, divergence), {"temperature": 2.0}
    got = join(worlds(2)(on_a_rank, SIZES[2], *case, **options))
    if everything:
        assert all(x.isfinite().all() for x in got)
    else:
        assert_close(got, differentiate(*case, **options), TOLERANCE[torch.float64])


def test_a_nan_on_one_rank_is_a_nan_loss(worlds):
    student, teacher, labels = make()
    student[2][30] = torch.nan
    for divergence in ("ab", "akl", "bdkd"):
        for loss, *_ in worlds(2)(on_a_rank, SIZES[2], student, teacher, labels, divergence):
            assert loss.isnan()


# ---- memory and traffic


def with_little_memory(*arguments, **options):
    """The size of a part sets the chunks; the widest part sets from how many logits AKL and BDKD decide at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunks.CHUNK_BYTES, "cpu", 1 << 15)
        patch.setattr(vocab_parallel, "DECIDING_ELEMENTS", 5 * 64)
        return on_a_rank(*arguments, **options)


@pytest.mark.parametrize("divergence", ["akl", "bdkd", ALPHANET])
def test_all_ranks_take_the_same_steps_whatever_their_sizes(worlds, divergence):
    case = *make(tokens=100), divergence
    got = join(worlds(2)(with_little_memory, [36, 1], *case))
    assert_close(got, differentiate(*case), TOLERANCE[torch.float64])


def steps_of(sizes, *case, **options):
    """The number of elements in each operation that moves data between ranks, for a call on this rank."""
    counted = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather"):
            real = getattr(dist, name)

            def counting(first, *rest, real=real, **keywords):
                counted.append(sum(x.numel() for x in first) if isinstance(first, list) else first.numel())
                return real(first, *rest, **keywords)

            patch.setattr(dist, name, counting)
        on_a_rank(sizes, *case, **options)
    return counted


@pytest.mark.parametrize(("divergence", "steps"), [("ab", 2), (ALPHANET, 3), ("bdkd", 3), ("akl", 2 + 1 + 8 + 1)])
def test_a_few_numbers_a_row_are_exchanged(worlds, divergence, steps):
    student, teacher, _ = make(torch.float32)
    for counted in worlds(2)(steps_of, SIZES[2], student, teacher, None, divergence, frozen=(1, 2)):
        sizes, *a_chunk, hidden = counted
        assert sizes == 6
        assert len(a_chunk) == steps
        assert max(a_chunk) <= 15 * TOKENS
        assert hidden == student[0].numel()


def test_no_grad(worlds):
    case = *make(), "ab"
    for loss in worlds(3)(without_gradients, SIZES[3], *case):
        assert not loss.requires_grad
        torch.testing.assert_close(loss, differentiate(*case)[0], rtol=1e-12, atol=0)


def without_gradients(sizes, student, teacher, labels, divergence):
    rank = dist.get_rank()
    student, teacher = (part([y.requires_grad_() for y in x], sizes, rank) for x in (student, teacher))
    with torch.no_grad():
        return loss_of(student, teacher, labels, divergence, group=dist.group.WORLD)


def check_hidden_gradient(sizes, student, teacher, labels, divergence, **options):
    hidden, *projection = part(student, sizes, dist.get_rank())
    teacher = part(teacher, sizes, dist.get_rank())
    group = dist.group.WORLD
    torch.manual_seed(0)  # gradcheck's random direction is the same on all ranks
    return torch.autograd.gradcheck(
        lambda x: loss_of((x, *projection), teacher, labels, divergence, group=group, **options),
        hidden.requires_grad_(),
        fast_mode=True,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_hidden_states(worlds, reduction):
    assert all(worlds(2)(check_hidden_gradient, [3, 2], *make(tokens=4, vocab=5), "ab", reduction=reduction))


# ---- DTensors


def distribute(model, placement=None):
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    return model[0], *(distribute_tensor(x, mesh, [placement or Shard(0)]) for x in model[1:])


def with_dtensors(student, teacher, labels, divergence, **options):
    from torch.distributed.tensor import DTensor

    teacher = None if teacher is None else distribute(teacher)
    loss, hidden, *gradients = differentiate(distribute(student), teacher, labels, divergence, **options)
    assert type(loss) is type(hidden) is torch.Tensor
    assert all(isinstance(x, DTensor) and x.placements[0].is_shard(0) for x in gradients)
    return [loss, hidden, *(x.to_local() for x in gradients)]


@pytest.mark.parametrize(("size", "vocab"), [(2, 37), (3, 4)])  # with 4 rows over 3 ranks the last rank has none
def test_dtensors(worlds, size, vocab):
    student, teacher, labels = make(vocab=vocab)
    for case in ((student, teacher, labels, "ab"), (student, None, labels, "")):
        got = join(worlds(size)(with_dtensors, *case))
        assert_close(got, differentiate(*case), TOLERANCE[torch.float64])


def wrong_dtensors(what, student, teacher, labels, divergence):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    options = {}
    if what == "replicated":
        student = distribute(student, Replicate())
    elif what == "by width":
        student = *distribute((*student[:2], student[1]), Shard(1))[:2], None
    elif what == "two dimensions":
        mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2))
        student = student[0], *(distribute_tensor(x, mesh, [Replicate(), Shard(0)]) for x in student[1:])
    elif what == "hidden":
        student, teacher = (distribute_tensor(student[0], distribute(student)[1].device_mesh), *student[1:]), teacher
    elif what == "another group":
        groups = [dist.new_group([rank]) for rank in range(2)]
        student, teacher, options = distribute(student), distribute(teacher), {"group": groups[dist.get_rank()]}
    elif what == "another order":
        mesh = dist.device_mesh.DeviceMesh("cpu", [1, 0])
        student = student[0], *(distribute_tensor(x, mesh, [Shard(0)]) for x in student[1:])
    elif what == "teacher whole":
        student = distribute(student)
    return loss_of(student, teacher, labels, divergence, **options)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "replicated",
            r"student_weight is a DTensor placed as \(Replicate\(\),\), expected \(Shard\(0\),\).*redistribute",
        ),
        ("by width", r"student_weight is a DTensor placed as \(Shard\(dim=1\),\), expected"),
        ("two dimensions", r"on a mesh of one dimension: redistribute it, or, where FSDP"),
        ("hidden", r"student_hidden is a DTensor, expected a plain tensor.*full_tensor"),
        ("another group", r"student_weight is sharded over ranks \[0, 1\], expected \[\d\], those of the group"),
        ("another order", r"student_weight is sharded over ranks \[1, 0\], expected \[0, 1\], those of the group"),
        ("teacher whole", r"have \[19, 18\] rows of the student's projection and \[37, 37\] of the teacher's"),
    ],
)
def test_wrong_dtensors(worlds, what, message):
    for error in worlds(2).errors(wrong_dtensors, what, *make(), "ab"):
        assert isinstance(error, ValueError), error
        with pytest.raises(ValueError, match=message):
            raise error


# ---- errors


@pytest.mark.parametrize(
    ("sizes", "teacher_sizes", "message"),
    [
        (
            [20, 17],
            [17, 20],
            r"ranks have \[20, 17\] rows of the student's projection and \[17, 20\] of the teacher's: shard",
        ),
        ([20, 17], [22, 17], r"\[20, 17\] rows of the student's projection and \[22, 17\]"),
        ([2000, 37], [20, 17], "the student has 2037 vocabulary entries and the teacher 37"),
    ],
)
def test_parts_that_do_not_fit(worlds, sizes, teacher_sizes, message):
    case = make(vocab=sum(sizes), teacher_vocab=sum(teacher_sizes))
    for error in worlds(2).errors(on_a_rank, sizes, *case, "ab", teacher_sizes=teacher_sizes):
        assert isinstance(error, ValueError), error
        with pytest.raises(ValueError, match=message):
            raise error


def with_other_tokens(sizes, student, teacher, labels, divergence):
    tokens = TOKENS - dist.get_rank()
    student, teacher = ((x[0][:tokens], *x[1:]) for x in (student, teacher))
    return on_a_rank(sizes, student, teacher, labels[:tokens], divergence)


def test_ranks_with_different_tokens(worlds):
    for error in worlds(2).errors(with_other_tokens, SIZES[2], *make(), "ab"):
        assert isinstance(error, ValueError), error
        with pytest.raises(ValueError, match=r"the ranks have \[20, 19\] hidden states, expected the same ones"):
            raise error
