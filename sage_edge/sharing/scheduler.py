"""Which plugin's which requests take the next step on the one device: pure functions over plain data.

    state = submit(state, task)                   # a request joins
    decision = schedule(state, now)               # what to do next
    ... the loop (sharing/loop.py) carries it out ...
    state = update(state, decision, outcome)      # what came of it

`sage_edge.scheduler` fills the slots of one engine and steps all of them; this one shares a device among plugins, where a
step given to one is taken from another. How it chooses, in this order:

1. Requests that have halted, or whose deadline has passed, are answered.
2. Nobody starves: who has not had a step for PATIENCE_S goes first, the longest waiting before all others. These steps may
   take a share FLOOR of a period's budget, and always at least one step. So a request that is in flight among n others has
   its next step within PATIENCE_S and n periods, whatever the others are worth (tests/unit/test_sharing.py).
3. Budget: in every period, a share `reserved` of the budget (the profile's L) is promised to the plugins by their trust, with
   a floor of 5 %; a plugin without work passes its share on. As long as what is left covers the others' promises, any plugin
   may go; after that only those to whom something is promised.
4. Worth: the step with the largest expected fall of the loss per ATP (`worth`), times trust, times 2 for each level of
   priority. With deadlines: steps are chosen in that order as long as all that are chosen can be done in time, earliest
   deadline first; of these, the most valuable goes first whose turn now does not make another one late.

For steps of equal length point 4 is the greedy algorithm for unit jobs with deadlines, which is optimal (their feasible sets
are a matroid: Lawler, Combinatorial Optimization, 1976, ch. 7); a request's later steps are never worth more than its
earlier ones here, so their order is kept. For unequal lengths it is a heuristic by density. That a step of an anytime
computation should go where it gains most is Dean and Boddy 1988 (AAAI) and Liu et al. 1991 (IEEE Computer 24(5),
imprecise computations). The other rules in `rules` stand beside it for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sage_edge.errors import InputError, RefusedError
from sage_edge.irp.profiles import PROFILES, Profile
from sage_edge.irp.trust import INITIAL, updated_trust
from sage_edge.irp.worth import WorthTable, learned
from sage_edge.sharing.budget import FLOOR, Budget, reallocated, shares
from sage_edge.sharing.costs import Costs
from sage_edge.sharing.rules import RULES, Candidate, Choice

PATIENCE_S = 1.0
QUANTUM_MS = 2.0
RESCUE = "waited longest"
COHERENCE = 0.5  # mean |contribution| before anything is known


@dataclass(frozen=True)
class Task:
    """What the scheduler knows of a request. energies: normalised, after each step so far. served: when it had its last
    step (first: when it arrived). reason: why it is done, or "" while it goes on. Times in seconds of one clock."""

    id: int
    plugin: str
    arrived: float
    deadline: float | None = None
    priority: int = 0
    energies: tuple[float, ...] = ()
    served: float = 0.0
    spent: float = 0.0
    reason: str = ""

    @property
    def steps(self) -> int:
        return len(self.energies)

    @property
    def energy(self) -> float:
        return self.energies[-1] if self.energies else 1.0


@dataclass(frozen=True)
class Account:
    """One plugin: trust, what a step costs and is worth, and its part of the present period. left: of what is promised."""

    name: str
    max_steps: int
    sizes: tuple[int, ...]
    costs: Costs
    worth: WorthTable
    trust: float = INITIAL
    left: float = 0.0
    spent: float = 0.0


@dataclass(frozen=True)
class Settings:
    """rule: see `rules.RULES`. capacity: how many requests may be in flight or waiting. quantum_ms: steps that take less are
    granted several at a time, so that deciding does not cost more than stepping."""

    profile: Profile = PROFILES["balanced"]
    budget: Budget = field(default_factory=Budget)
    rule: str = "worth"
    capacity: int = 1024
    quantum_ms: float = QUANTUM_MS
    patience_s: float = PATIENCE_S

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, found {self.rule!r}")
        if self.capacity < 1 or self.patience_s <= 0 or self.quantum_ms <= 0:
            raise ValueError("capacity, patience_s and quantum_ms: expected positive numbers")


@dataclass(frozen=True)
class SharingState:
    """All there is to know. tasks in order of arrival. period: when the present one began, None before the first.
    rescued: ATP spent in it on requests that would have starved. coherence: mean |contribution| of recent requests."""

    settings: Settings
    accounts: Mapping[str, Account]
    tasks: tuple[Task, ...] = ()
    period: float | None = None
    rescued: float = 0.0
    coherence: float = COHERENCE

    @property
    def idle(self) -> bool:
        return not self.tasks


@dataclass(frozen=True)
class Decision:
    """What to do now. expire: ids of requests that never had a step and are too late. answer: (id, reason). plugin, step: the
    requests that step together (at most one plugin's). grant: how many steps,
    unless one of them is done before. why: in words. until: nothing can be done before this time,
    None when there is a step or nobody to wait for."""

    expire: tuple[int, ...] = ()
    answer: tuple[tuple[int, str], ...] = ()
    plugin: str = ""
    step: tuple[int, ...] = ()
    grant: int = 1
    why: str = ""
    until: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a decision. started, finished: times around the step. energies: normalised, by id, after each of the
    steps that it got through.
    halted: reasons by id. failed: ids that an error hit. contributions: by id, for those answered. answering:
    milliseconds that answering took, by plugin. atp: what the step cost by a sensor, None to count its time."""

    started: float
    finished: float
    energies: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    halted: Mapping[int, str] = field(default_factory=dict)
    failed: frozenset[int] = frozenset()
    contributions: Mapping[int, float] = field(default_factory=dict)
    answering: Mapping[str, float] = field(default_factory=dict)
    atp: float | None = None


def initial(settings: Settings, accounts: Mapping[str, Account]) -> SharingState:
    return SharingState(settings, dict(accounts))


def submit(state: SharingState, task: Task) -> SharingState:
    """The state with one more request. Raises RefusedError when there are too many, InputError for an unknown plugin."""
    if task.plugin not in state.accounts:
        raise InputError(f"plugin {task.plugin!r}: not loaded; there are {', '.join(state.accounts) or 'none'}")
    if len(state.tasks) >= state.settings.capacity:
        raise RefusedError("queue_full", f"{len(state.tasks)} requests are in flight or waiting; try again later")
    return replace(state, tasks=(*state.tasks, replace(task, served=task.arrived)))


def cancel(state: SharingState, number: int) -> SharingState:
    """The state without that request."""
    return replace(state, tasks=tuple(task for task in state.tasks if task.id != number))


def schedule(state: SharingState, now: float) -> Decision:
    """What to do at `now`."""
    state = _rolled(state, now)
    expire, answer, going = [], [], []
    for task in state.tasks:
        late = task.deadline is not None and now >= task.deadline
        if task.reason or (late and task.steps):
            answer.append((task.id, task.reason or "deadline"))
        elif late:
            expire.append(task.id)
        else:
            going.append(task)
    done = Decision(tuple(expire), tuple(answer))
    if not going:
        return done
    assert state.period is not None
    budget = state.settings.budget
    left = budget.total - sum(account.spent for account in state.accounts.values())
    if left <= 1e-6 * budget.total:  # sums of floats miss zero by a little
        dues = (task.deadline for task in going if task.deadline is not None)
        return replace(done, until=min((*dues, state.period + budget.period_ms / 1e3)))
    guarded = state.settings.rule == "worth"  # the other rules stand for what is usual, without our guarantees
    if guarded and (starving := _starving(state, going, now)):
        return replace(done, plugin=starving.plugin, step=(starving.id,), why=RESCUE)
    allowed = _allowed(state, {task.plugin for task in going}, left) if guarded else None
    choice = RULES[state.settings.rule](_choice(state, going, allowed, now))
    ms = state.accounts[choice.plugin].costs.ms(len(choice.step))
    grant = max(1, min(int(state.settings.quantum_ms / ms), choice.most))
    return replace(done, plugin=choice.plugin, step=choice.step, grant=grant, why=choice.why)


def update(state: SharingState, decision: Decision, outcome: Outcome) -> SharingState:
    """The state after a decision was carried out. Requests cancelled meanwhile are gone and stay so."""
    state = _rolled(state, outcome.started)
    gone = {*decision.expire, *(number for number, _ in decision.answer), *outcome.failed}
    answered = dict(decision.answer)
    for task in state.tasks:
        if task.id in answered and task.id not in outcome.failed and task.id in outcome.contributions:
            state = _credited(state, task, answered[task.id], outcome.contributions[task.id])
    tasks = [task for task in state.tasks if task.id not in gone]
    if state.settings.budget.unit == "ms":
        for name, spent in outcome.answering.items():
            account = state.accounts[name]
            changed = replace(account, spent=account.spent + spent, left=max(0.0, account.left - spent))
            state = replace(state, accounts={**state.accounts, name: changed})
    if decision.step:
        state, each = _charged(state, decision, outcome)
        tasks = [_stepped(task, each, outcome) if task.id in outcome.energies else task for task in tasks]
    working = frozenset(task.plugin for task in tasks if not task.reason)
    left = {name: account.left for name, account in state.accounts.items()}
    trust = {name: account.trust for name, account in state.accounts.items()}
    left = reallocated(left, trust, working)
    accounts = {name: replace(account, left=left[name]) for name, account in state.accounts.items()}
    return replace(state, accounts=accounts, tasks=tuple(tasks))


def _stepped(task: Task, atp: float, outcome: Outcome) -> Task:
    return replace(
        task,
        energies=(*task.energies, *outcome.energies[task.id]),
        served=outcome.finished,
        spent=task.spent + atp,
        reason=outcome.halted.get(task.id, ""),
    )


def _rolled(state: SharingState, now: float) -> SharingState:
    """The state in the period that `now` falls into; a new one begins with promises by trust and nothing spent."""
    budget = state.settings.budget
    length = budget.period_ms / 1e3
    if state.period is not None and now < state.period + length:
        return state
    trust = {name: account.trust for name, account in state.accounts.items()}
    least = FLOOR * budget.total
    amount = max(budget.total * state.settings.profile.reserved, min(budget.total, least * len(trust)))
    promised = shares(trust, amount, least)
    accounts = {name: replace(a, left=promised[name], spent=0.0) for name, a in state.accounts.items()}
    # At least one period on: the quotient may come out a rounding error below a whole number.
    start = now if state.period is None else state.period + length * max(1, int((now - state.period) / length))
    return replace(state, accounts=accounts, period=start, rescued=0.0)


def _starving(state: SharingState, going: list[Task], now: float) -> Task | None:
    """Who must go first, whatever it is worth."""
    if state.rescued >= FLOOR * state.settings.budget.total:
        return None
    oldest = min(going, key=lambda task: (task.served, task.id))
    return oldest if now - oldest.served >= state.settings.patience_s else None


def _allowed(state: SharingState, working: set[str], left: float) -> set[str]:
    """The plugins that may go without breaking a promise to another one."""
    promises = {name: state.accounts[name].left for name in working}
    total = sum(promises.values())
    free = {name for name in working if left - state.accounts[name].costs.atp(1) >= total - promises[name]}
    return free or {name for name in working if promises[name] > 0} or working


def _choice(state: SharingState, going: list[Task], allowed: set[str] | None, now: float) -> Choice:
    """The requests that may go (all, for the rules that know no worth), with what their next steps cost and are worth."""
    profile, budget = state.settings.profile, state.settings.budget
    candidates = []
    for task in going:
        if allowed is not None and task.plugin not in allowed:
            continue
        account = state.accounts[task.plugin]
        weight = account.trust * 2.0**task.priority
        ahead = () if allowed is None else account.worth.ahead(task.steps, task.energy, profile.exploration)
        candidates.append(
            Candidate(
                id=task.id,
                plugin=task.plugin,
                arrived=task.arrived,
                served=task.served,
                deadline=task.deadline,
                ahead=tuple((worth * weight, steps) for worth, steps in ahead),
            )
        )
    accounts = [state.accounts[name] for name in {c.plugin for c in candidates}]
    return Choice(
        candidates=tuple(candidates),
        sizes={account.name: account.sizes for account in accounts},
        costs={account.name: account.costs for account in accounts},
        used={account.name: account.spent / account.trust for account in accounts},
        now=now,
        # With less than the whole device, a step takes longer on the clock than on the device.
        stretch=max(1.0, budget.period_ms / budget.total) if budget.unit == "ms" else 1.0,
    )


def _charged(state: SharingState, decision: Decision, outcome: Outcome) -> tuple[SharingState, float]:
    """The step's cost entered into its plugin's account; and the part of each request."""
    account = state.accounts[decision.plugin]
    spent_ms = (outcome.finished - outcome.started) * 1e3
    atp = spent_ms if outcome.atp is None else outcome.atp
    steps = max((len(path) for path in outcome.energies.values()), default=0)
    costs = account.costs.learned(len(decision.step), spent_ms / steps, atp / steps) if steps else account.costs
    changed = replace(account, costs=costs, spent=account.spent + atp, left=max(0.0, account.left - atp))
    rescued = state.rescued + (atp if decision.why == RESCUE else 0.0)
    return replace(state, accounts={**state.accounts, account.name: changed}, rescued=rescued), atp / len(decision.step)


def _credited(state: SharingState, task: Task, reason: str, contribution: float) -> SharingState:
    """Trust, worth and coherence after one request was answered."""
    account, profile = state.accounts[task.plugin], state.settings.profile
    pairs = list(zip(task.energies, task.energies[1:], strict=False))
    quality = sum(later <= earlier for earlier, later in pairs) / len(pairs) if pairs else None
    most = account.max_steps * account.costs.atp(1)
    trust = updated_trust(
        account.trust, quality, contribution, state.coherence, 1 - task.spent / most, profile.momentum
    )
    worth = learned(account.worth, task.energies, reason != "deadline", profile.adaptation)
    rate = profile.adaptation / 10  # of all plugins together, so slower than that of one
    coherence = max(0.01, (1 - rate) * state.coherence + rate * abs(contribution))
    accounts = {**state.accounts, account.name: replace(account, trust=trust, worth=worth)}
    return replace(state, accounts=accounts, coherence=coherence)
