"""Keys of a checkpoint.

Names are those of the unwrapped model: what DDP, FSDP, torch.compile and activation checkpointing put before a name is
left out. The keys are those of ``{"model": ..., "optim": ...}`` in torch's tutorials:

    model.<name>                    a parameter, a persistent buffer, or a module's extra state (get_extra_state())
    optim.state.<name>.exp_avg      the momentum of a parameter, and likewise any other column of its state
    optim.state.<name>.<key>        another entry of the parameter in optimizer.state, which a wrapper keeps there
    optim.beside.<key>              an entry of optimizer.state whose key is not a parameter
    optim.param_groups.<i>.<key>    a value of group i; under "params" a list of names
    scheduler.<i>                   the state of scheduler i
    extra                           the caller's values
    ranks                           number of ranks that saved
    rng.<rank>.<kind>               the state of a random number generator of a rank
    tied.<name>                     the first name of a parameter that has several
    master.<name>                   True for a bfloat16 parameter whose master weights "model.<name>" holds, in float32

A parameter with several names, such as tied weights, is stored under the alphabetically first one. Each of its other
names is stored as a value "tied.<name>", so that a pipeline stage that knows the parameter by another name finds it.

A bfloat16 weight and its remainder are stored as one float32 tensor. An 8-bit momentum is
stored as it is, with its scales in "optim.state.<name>.exp_avg_scale", where the parameter is whole or ShardedLion
shards its state, and row-major. Otherwise it is stored in float32, without scales: FSDP and tensor parallelism cut
parameters within the blocks that share a scale.
"""

from __future__ import annotations

from collections.abc import Container

MODEL = "model."
STATE = "optim.state."
BESIDE = "optim.beside."
GROUPS = "optim.param_groups."
SCHEDULER = "scheduler."
EXTRA = "extra"
RANKS = "ranks"
RNG = "rng."
TIED = "tied."
MASTER = "master."


def split_entry(key: str, names: Container[str]) -> tuple[str, str] | None:
    """Splits "<name>.<entry>" into the name of a parameter and that of an entry of its state.

    Args:
        key: a key without the prefix `STATE`. Names and entries may contain dots.
        names: the names to look for. The longest one that fits is taken.

    Returns:
        The name and the entry; None if the key begins with none of the names.
    """
    at = key.rfind(".")
    while at > 0:
        if key[:at] in names:
            return key[:at], key[at + 1 :]
        at = key.rfind(".", 0, at)
    return None
