"""Memory, bytes on the wire and time of each strategy, by arithmetic: ``python -m lion_dist.plan --help``.

precision.py    bytes of an element of weights, gradients and state, and of a step over them
strategies.py   what each strategy holds, and what it sends
cluster.py      GPUs and the links between them
timing.py       the time of an iteration
__main__.py     the command

P, S, R and W: number of parameters, of ranks over which FSDP2 shards the model, of replicas of the model, and of all
ranks; W = R S.
"""
