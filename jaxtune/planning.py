"""A run's plan: what it takes of a device, what would fit instead, and the check of both at the start of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxtune.config import MeshConfig, RunConfig
from jaxtune.devices import SHEETS, Device, this_device
from jaxtune.errors import UserError
from jaxtune.estimate import Memory, Model, estimate_memory, largest, measure_model, step_flops, step_seconds
from jaxtune.loading import resolve_dtype
from jaxtune.metrics import format_bytes
from jaxtune.remat import POLICIES
from jaxtune.structure import compile_step, step_bytes
from jaxtune.traffic import scaling, sent_bytes, step_collectives

# An estimate that is this much above what the device has is refused without compiling; closer ones are compiled first.
_SURELY_TOO_MUCH = 1.25
# With `remat: auto` a policy is worth compiling where its estimate is this much above what the device has, at most.
_WORTH_COMPILING = 1.08


@dataclasses.dataclass(frozen=True)
class Reach:
    """How far a device goes with one policy.

    memory: of the run as it is. seconds: of one update. largest_batch: rows at the run's length. longest_row: tokens at
    one row a step. Both are 0 where not even the least fits.
    """

    policy: str
    memory: Memory
    fits: bool
    seconds: float
    largest_batch: int
    longest_row: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would take of a device.

    dtype, policy: what `auto` in the configuration comes to there. candidates: the policies to compile one after
    another until one fits; the run's own where it names one. memory: of a step. steps: of the run, or None where the
    data were not counted. seconds, flops: of one update, estimated. reaches: every policy on this device. cards: every
    policy on common cards. sent: bytes that each device sends in an update, by the axes of the mesh.
    """

    config: RunConfig
    model: Model
    device: Device
    dtype: str
    policy: str
    candidates: tuple[str, ...]
    memory: Memory
    steps: int | None
    seconds: float
    flops: float
    reaches: tuple[Reach, ...]
    cards: dict[str, tuple[Reach, ...]]
    sent: dict[str, float]

    @property
    def fits(self) -> bool:
        """Whether the device has what the run takes."""
        return self.memory.fits(self.device)

    @property
    def useful_flops(self) -> float:
        """Operations of one update without what a policy computes again: what MFU counts."""
        return step_flops(self.config, self.model, "none")

    @property
    def tokens_per_step(self) -> int:
        """Places in the rows of one update."""
        train = self.config.train
        return train.batch_size * train.gradient_accumulation_steps * self.config.data.max_length

    @property
    def mfu_flops(self) -> float | None:
        """What 100 % of MFU is, operations a second of all devices; None on a CPU."""
        mesh = self.config.mesh
        return None if self.device.capability is None else self.device.flops * mesh.devices

    def memory_of(self, policy: str) -> Memory:
        """Of a step under another policy, estimated."""
        return estimate_memory(self.config, self.model, self.device, self.dtype, policy)

    def short(self) -> str:
        """One line, for the start of a run."""
        return (
            f"plan: {format_bytes(self.memory.resident)} of weights and state, about "
            f"{format_bytes(self.memory.peak)} in a step with remat {self.policy}; {self.device.kind} has "
            f"{format_bytes(self.device.usable)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values: bytes, seconds, counts."""

        def reaches(of: Sequence[Reach]) -> dict[str, Any]:
            return {
                reach.policy: {
                    "peak_bytes": reach.memory.peak,
                    "fits": reach.fits,
                    "seconds_per_step": round(reach.seconds, 4),
                    "largest_batch": reach.largest_batch,
                    "longest_row": reach.longest_row,
                }
                for reach in of
            }

        memory = {field.name: getattr(self.memory, field.name) for field in dataclasses.fields(self.memory)}
        return {
            "device": dataclasses.asdict(self.device) | {"usable": self.device.usable},
            "dtype": self.dtype,
            "policy": self.policy,
            "parameters": self.model.parameters,
            "trainable_parameters": self.model.trainable,
            "memory_bytes": memory,
            "estimated_peak_bytes": self.memory.estimate,
            "peak_bytes": self.memory.peak,
            "fits": self.fits,
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "tokens": None if self.steps is None else self.steps * self.tokens_per_step,
            "estimated_seconds_per_step": round(self.seconds, 4),
            "estimated_seconds": None if self.steps is None else round(self.steps * self.seconds, 1),
            "teraflop_per_step": round(self.flops / 1e12, 3),
            "sent_bytes_per_step": {axes: round(size) for axes, size in self.sent.items()},
            "scaling": scaling(self.sent, self.seconds) if self.sent else {},
            "policies": reaches(self.reaches),
            "cards": {name: reaches(of) for name, of in self.cards.items()},
        }


def make_plan(
    config: RunConfig,
    hf_config: dict[str, Any],
    device: Device,
    *,
    compile_here: bool = False,
    survey: bool = True,
    rows: int | None = None,
) -> Plan:
    """Plan one run for one device.

    Args:
        hf_config: of the model, as `loading.find_hf_config` gives it.
        compile_here: compile the step for the device at hand, which `device` then describes.
        survey: also find how far every policy goes, here and on common cards.
        rows: of the packed training data, where they are known.

    Raises:
        UserError: the model's family is not supported, or its config is incomplete.
    """
    device = device.limited(config.train.memory_limit)
    dtype = _dtype(config, device)
    model = measure_model(config, hf_config, dtype)
    candidates = _candidates(config, model, device, dtype)
    fitting = (p for p in candidates if estimate_memory(config, model, device, dtype, p).fits(device))
    policy = next(fitting, candidates[-1])
    memory = estimate_memory(config, model, device, dtype, policy)
    if compile_here:
        compiled = compile_step(config, hf_config, resolve_dtype(dtype), policy)
        memory = dataclasses.replace(memory, compiled=step_bytes(compiled))
    train, steps = config.train, config.train.max_steps
    if steps is None and rows is not None:
        steps = max(1, math.ceil(train.num_train_epochs * rows / train.batch_size / train.gradient_accumulation_steps))
    cards = {name: (card, _dtype(config, card)) for name, card in SHEETS.items()} if survey else {}
    models = {dtype: measure_model(config, hf_config, dtype) for dtype in {dtype for _, dtype in cards.values()}}
    return Plan(
        config=config,
        model=model,
        device=device,
        dtype=dtype,
        policy=policy,
        candidates=candidates,
        memory=memory,
        steps=steps,
        seconds=step_seconds(config, model, device, dtype, policy),
        flops=step_flops(config, model, policy),
        reaches=_reaches(config, model, device, dtype) if survey else (),
        cards={name: _reaches(config, models[dtype], card, dtype) for name, (card, dtype) in cards.items()},
        sent=sent_bytes(step_collectives(config, hf_config, resolve_dtype(dtype), policy), config) if survey else {},
    )


def with_mesh(config: RunConfig, hf_config: dict[str, Any], device: Device, devices: int) -> tuple[RunConfig, str]:
    """The run with a mesh where it says `auto`, and the reason for it.

    Of as many devices the fewest go along fsdp with which the run fits, and neighbours first, the rest along data.

    Raises:
        UserError: as `RunConfig`, above all where `train.batch_size` is no multiple of the devices.
    """
    if not config.mesh.auto:
        return config, ""
    on_one = dataclasses.replace(config, mesh=MeshConfig())
    if devices == 1:
        return on_one, "mesh auto: there is one device"
    for fsdp in (size for size in range(1, devices + 1) if devices % size == 0):
        spread = dataclasses.replace(config, mesh=MeshConfig(data=devices // fsdp, fsdp=fsdp))
        plan = make_plan(spread, hf_config, device, survey=False)
        if plan.fits:
            break
    holds = "all of it" if fsdp == 1 else f"a part of it in {fsdp}"
    verdict = "which fits" if plan.fits else "which does not fit either"
    return spread, (
        f"mesh auto: data {spread.mesh.data}, fsdp {fsdp}, since each device holds {holds}: "
        f"{format_bytes(plan.memory.resident)} of weights and state, about {format_bytes(plan.memory.peak)} in a step, "
        f"{verdict} in {format_bytes(plan.device.usable)}"
    )


def _dtype(config: RunConfig, device: Device) -> str:
    return device.compute_dtype if config.model.dtype == "auto" else config.model.dtype


def _candidates(config: RunConfig, model: Model, device: Device, dtype: str) -> tuple[str, ...]:
    """The run's policy; where it is left open, from fast to lean those that may fit, and the leanest in any case."""
    if config.train.remat != "auto":
        return (config.train.remat,)
    *faster, leanest = POLICIES
    room = _WORTH_COMPILING * device.usable
    return (*(p for p in faster if estimate_memory(config, model, device, dtype, p).peak <= room), leanest)


def _reaches(config: RunConfig, model: Model, device: Device, dtype: str) -> tuple[Reach, ...]:
    reaches = []
    for policy in POLICIES:
        memory = estimate_memory(config, model, device, dtype, policy)
        arguments = config, model, device, dtype, policy
        batch, row = (largest(*arguments, what=what) for what in ("batch_size", "max_length"))
        reaches.append(Reach(policy, memory, memory.fits(device), step_seconds(*arguments), batch, row))
    return tuple(reaches)


def check_plan(config: RunConfig, hf_config: dict[str, Any]) -> Plan:
    """The plan of a run for the device at hand, at its start.

    Raises:
        UserError: what stands between the steps alone does not fit, or the estimate is far beyond the device.
    """
    plan = make_plan(config, hf_config, this_device(), survey=False)
    usable = plan.device.usable
    if plan.memory.resident > usable or plan.memory.peak > _SURELY_TOO_MUCH * usable:
        raise UserError(f"the run cannot fit the device. {plan.short()}. {advice(config, hf_config, plan.device)}")
    return plan


def advice(config: RunConfig, hf_config: dict[str, Any], device: Device) -> str:
    """What to change so that a run that is too large for a device fits."""
    plan = make_plan(config, hf_config, device)
    remedies = [f"train.remat: {reach.policy}" for reach in plan.reaches if reach.fits]
    leanest = min(plan.reaches, key=lambda reach: reach.memory.peak)
    if not remedies and leanest.largest_batch:
        remedies = [f"train.remat: {leanest.policy} with train.batch_size: {leanest.largest_batch}"]
    elif not remedies and leanest.longest_row:
        remedies = [
            f"train.remat: {leanest.policy} with train.batch_size: 1 and data.max_length: {leanest.longest_row}"
        ]
    if not remedies and not config.model.load_in_4bit:
        remedies = ["model.load_in_4bit: true"]
    if not remedies:
        cards = [name for name, reaches in plan.cards.items() if any(reach.longest_row for reach in reaches)]
        larger = f"; of common cards {', '.join(cards)} can hold it" if cards else ""
        return f"Nothing makes it fit but a smaller model or lora.r{larger}"
    return f"To fit, set {' or '.join(remedies)}"
