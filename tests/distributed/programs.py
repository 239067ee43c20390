"""Random training programs: what every rank does, as data, within the documented rules of ShardedLion.

An *interval* is the time between two steps (or clippings). A pass *misses* a rank if it reaches no parameter there. A
rank that a pass missed may only make further passes, clip or step next; so programs do nothing else then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

SHAPES: list[tuple[int, ...]] = [
    (), (1,), (0, 3), (2,), (127,), (129,), (30,), (300,), (24, 48), (13, 20), (8, 6, 3, 3), (900,),
]  # fmt: skip
DTYPES = ["float32", "bfloat16", "float16"]
# Bytes a bucket: a parameter each, a few, all in one.
BUCKET_MB = [1 / 2**20, 3000 / 2**20, 64.0]
# How often a parameter may be used between two zeroings, so that the sums are exact in bfloat16; see `gradient`.
MOST_USES = 20


@dataclass
class Param:
    shape: tuple[int, ...]
    dtype: str
    trainable: bool


@dataclass
class Group:
    params: list[Param]
    options: dict[str, object]


@dataclass
class Program:
    """Operations, in order, as tuples:

    ("pass", number, how, sync, uses): a backward. Rank r uses the parameters ``uses[r]``, in this order; ``number``
        tells its gradients from others'; ``how`` is "plain", "checkpoint" or "reentrant".
    ("hand", number, i): every rank puts a gradient into p.grad of parameter i.
    ("freeze", i), ("unfreeze", i), ("lr", group, lr)
    ("clip", factor): to ``factor`` times the norm.
    ("step",)
    ("zero", how): see `ZEROING`.
    ("add", group)
    ("reload", how): the state goes out of the optimizer and into it, or into a new one.
    ("check",): check_replicas.
    ("error", kind, number, uses): a backward, and a call that raises on every rank and changes nothing. The gradients
        are dropped.
    """

    seed: int
    world_size: int
    stage: int
    param_sync: str
    bucket_mb: float
    shard_numel: int
    momentum_dtype: str | None
    reduce_dtype: str | None
    groups: list[Group]
    ops: list[tuple] = field(default_factory=list)

    def __str__(self) -> str:
        head = {name: value for name, value in vars(self).items() if name not in ("groups", "ops")}
        params = [f"  parameter: {p}" for group in self.groups for p in group.params]
        return "\n".join([str(head), *params, *(f"  {op}" for op in self.ops)])


# "nothing": gradients add up over steps. "zeros": zero_grad(set_to_none=False), after which zeros count as gradients.
ZEROING = ["optimizer", "zeros", "model", "p.grad = None", "nothing"]


class _Writer:
    """Writes a program, and keeps the books that its rules need."""

    def __init__(self, seed: int, world_size: int) -> None:
        random = self.random = Random(seed)
        self.seed, self.world_size = seed, world_size
        self.stage = random.choice([1, 2, 2, 2])
        # One dtype, or any; and which norms to clip to, for the coefficients to be exact in 16 bits.
        self.dtypes = random.choice([DTYPES[:1], DTYPES[:1], DTYPES[1:2], DTYPES])
        self.trainable: list[bool] = []
        self.adopted: set[int] = set()  # by the optimizer: those that have been trainable in a step
        self.hooked: set[int] = set()
        self.uses: dict[int, int] = {}  # since the last zeroing
        self.pending: set[int] = set()  # with a gradient that no step or clipping has seen
        self.stepped: set[int] = set()  # those of which `Lion` has a momentum
        self.unseen_zeroing = False
        self.numbers = 0
        groups = [self.group() for _ in range(random.choice([1, 1, 2, 3]))]
        self.program = Program(
            seed,
            world_size,
            self.stage,
            random.choice(["signs", "params"]),
            random.choice(BUCKET_MB),
            random.choice([2000, 1 << 60]),
            random.choice([None, None, "bfloat16", "float32"]),
            self.reduce_dtype(),
            groups,
        )
        self.begin_interval()
        self.hook_anew()

    def write(self, *op: object) -> None:
        self.program.ops.append(op)

    def group(self) -> Group:
        random = self.random
        params = [
            Param(random.choice(SHAPES), random.choice(self.dtypes), random.random() < 0.8)
            for _ in range(random.randint(1, 4))
        ]
        if not any(self.trainable):
            params[0].trainable = True
        self.adopted |= {len(self.trainable) + i for i, p in enumerate(params) if p.trainable}
        self.trainable += [p.trainable for p in params]
        options = {
            "lr": random.choice([0.25, 0.01, 1e-3]),
            "betas": random.choice([(0.9, 0.99), (0.95, 0.98)]),
            "weight_decay": random.choice([0.0, 0.1, 1.0]),
            "maximize": random.random() < 0.2,
        }
        return Group(params, {**options, **self.precision(params)})

    def precision(self, params: list[Param]) -> dict[str, object]:
        """Options of a group, drawn by themselves, so that the rest of a seed's program is what it was without them."""
        random = Random(1000 * self.seed + len(self.trainable))
        options: dict[str, object] = {"momentum_dtype": "int8"} if random.random() < 0.3 else {}
        if random.random() < 0.5 and all(p.dtype != "float16" for p in params):
            options["master_weights"] = True
        return options

    def reduce_dtype(self) -> str | None:
        """Drawn by itself, as `precision` is."""
        return "bfloat16" if self.stage == 2 and Random(1000 * self.seed + 999).random() < 0.4 else None

    # Books --------------------------------------------------------------------------------------

    def begin_interval(self) -> None:
        self.missed = False  # a pass reached some ranks only, and the others may not know of it
        self.rounds = self.dropped = False

    def hook_anew(self) -> None:
        """Shards are made: frozen parameters lose their hooks."""
        self.hooked = {i for i in self.adopted if self.trainable[i]}

    def end_interval(self) -> None:
        """A step, or a clipping."""
        self.unseen_zeroing = False
        unfrozen = {i for i, trainable in enumerate(self.trainable) if trainable} | self.pending
        if not unfrozen <= self.adopted:
            self.adopted |= unfrozen
            self.hook_anew()
        self.hooked |= {i for i in self.adopted if self.trainable[i]}
        self.pending = set()
        self.begin_interval()

    def usable(self) -> list[int]:
        return [i for i, t in enumerate(self.trainable) if t and self.uses.get(i, 0) < MOST_USES]

    # Operations ---------------------------------------------------------------------------------

    def draw_uses(self, of: list[int]) -> list[list[int]]:
        return [self.random.sample(of, self.random.randint(1, len(of))) for _ in range(self.world_size)]

    def a_pass(self) -> None:
        """A backward, or nothing where all parameters have been used often enough."""
        random, usable = self.random, self.usable()
        if not usable:
            return
        uses = self.draw_uses(usable)
        if random.random() < 0.3:
            for rank in random.sample(range(self.world_size), random.randint(1, self.world_size)):
                uses[rank] = []
        sync = self.stage == 1 or random.random() < 0.75
        how = random.choices(["plain", "checkpoint", "reentrant"], [8, 1, 1])[0]
        self.numbers += 1
        self.write("pass", self.numbers, how, sync, uses)
        touched = {i for of_rank in uses for i in of_rank}
        for i in touched:
            self.uses[i] = self.uses.get(i, 0) + 1
        self.pending |= touched
        if self.stage == 2 and sync and not self.dropped:
            reached = {rank for rank, of_rank in enumerate(uses) if self.hooked & set(of_rank)}
            self.rounds = self.rounds or bool(reached)
            self.missed = self.missed or 0 < len(reached) < self.world_size

    def by_hand(self) -> None:
        """A gradient for a parameter that has none; not right after zeroing without the optimizer, which has not seen
        it yet."""
        free = [i for i in range(len(self.trainable)) if i not in self.uses]
        if free and not self.unseen_zeroing:
            i = self.random.choice(free)
            self.numbers += 1
            self.write("hand", self.numbers, i)
            self.uses[i] = 1
            self.pending.add(i)

    def freeze_or_unfreeze(self) -> None:
        random = self.random
        i = random.randrange(len(self.trainable))
        if not self.trainable[i]:
            self.write("unfreeze", i)
        elif sum(self.trainable) > 1:
            self.write("freeze", i)
        else:
            return
        self.trainable[i] = not self.trainable[i]

    def zero(self, how: str) -> None:
        self.write("zero", how)
        if how == "zeros":
            self.uses = {i: 1 for i in self.uses}
        elif how != "nothing":
            self.uses = {}
        if how != "nothing":
            self.unseen_zeroing = how in ("model", "p.grad = None")
        if how != "nothing":
            self.dropped = self.dropped or self.rounds
        if how not in ("nothing", "zeros"):
            self.pending = set()

    def other_call(self) -> None:
        """A collective call between steps, or between a backward and its step."""
        random = self.random
        kind = random.choice(["add", "reload", "reload", "check", "error"])
        if self.missed:
            return
        fresh = not self.uses  # no gradients anywhere
        if kind == "add":
            if len(self.trainable) > 12:
                return
            self.write("add", self.group())
            self.begin_interval()
            self.hook_anew()
        elif kind == "reload":
            if any(t and i not in self.adopted for i, t in enumerate(self.trainable)):
                return  # an unfrozen parameter has no momentum yet
            how = random.choice(["itself", "itself, sharded", "Lion", "new", "new", "new from Lion"])
            if how.startswith("new") and not (fresh and all(self.trainable[i] for i in self.adopted)):
                return
            if how.endswith("Lion") and not self.adopted <= self.stepped:
                return
            self.write("reload", how)
            self.begin_interval()
            self.hook_anew()
        elif kind == "check":
            self.write("check")
            self.begin_interval()
        elif kind == "error" and fresh and not self.dropped:
            hooked = sorted(self.hooked & set(self.usable()))
            if not hooked:
                return
            kinds = ["clip to 0", "pass after clip"]
            if self.stage == 2:
                kinds += ["hand", "model to zeros", "torch clip"]
            self.numbers += 1
            refused = random.choice(kinds)
            self.write("error", refused, self.numbers, self.draw_uses(hooked))
            self.begin_interval()
            # Clipping has ended the round of the first backward, and a pass after it begins none.
            self.dropped = self.stage == 2 and refused != "pass after clip"

    def interval(self) -> None:
        random = self.random
        for _ in range(random.choice([0, 1, 1, 1, 2, 2, 3, 4])):
            what = random.random()
            if what < 0.7:
                self.a_pass()
            elif what < 0.8:
                self.by_hand()
            elif what < 0.9:
                self.freeze_or_unfreeze()
            else:
                self.other_call()
            if random.random() < 0.1 and not self.missed:
                self.zero(random.choice(ZEROING[:4]))
        if random.random() < 0.1:
            self.freeze_or_unfreeze()
        if random.random() < 0.3:
            self.write(
                "clip", random.choice([0.5, 0.25, 2.0]) if self.dtypes != DTYPES[:1] else random.uniform(0.1, 1.5)
            )
            self.end_interval()
            what = random.random()
            if what < 0.2:  # clipped in vain
                self.zero(random.choice(ZEROING[:2]))  # the others leave the clipping, of gradients that were dropped
                return
            if what < 0.4 and self.stage == 2:  # clipped, more gradients on some ranks, and clipped anew
                for _ in range(random.randint(1, 2)):
                    self.a_pass()
                    self.missed = False  # nothing is under way: they wait
                if self.pending:  # else the norm would be of what is clipped already
                    self.write("clip", 0.5)
                self.end_interval()
        self.write("step")
        self.stepped |= {i for i, trainable in enumerate(self.trainable) if trainable} | self.uses.keys()
        self.end_interval()
        if random.random() < 0.2:
            self.write("lr", random.randrange(len(self.program.groups)), random.choice([0.125, 0.02, 0.0]))
        full = any(n >= MOST_USES - 5 for n in self.uses.values())
        self.zero(random.choice(ZEROING[:4] if full else ZEROING))
        if random.random() < 0.3:
            self.other_call()


def write_program(seed: int, world_size: int, intervals: int = 8) -> Program:
    """The program of a seed."""
    writer = _Writer(seed, world_size)
    for _ in range(intervals):
        writer.interval()
    writer.write("step")
    return writer.program
