"""The places that a run could go: this machine's cards or its CPU, and Modal's cards."""

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from composer_replication.errors import ConfigError
from composer_replication.planner.candidate import Place
from composer_replication.planner.hardware import GPUS, GpuRequest
from composer_replication.planner.local_machine import LocalMachine
from composer_replication.planner.throughput import cpu_speed

On = Literal["local", "modal", "all"]

_COUNTS = (2, 4, 8)


def places(machine: LocalMachine, on: On, gpu: GpuRequest | None) -> list[Place]:
    """Every place to look at, one card each; `more_cards` gives the others.

    Args:
        machine: this one.
        on: local, Modal, or both.
        gpu: the only card to look at; None: all.

    Raises:
        ConfigError: a card that is not where it was asked for, or none that is known.
    """
    found: list[Place] = []
    if on in ("local", "all"):
        found += _local(machine, on, gpu)
    if on in ("modal", "all"):
        found += _modal(on, gpu)
    if not found:
        named = ", ".join(card.name for card in machine.cards)
        raise ConfigError(
            f"This machine has {named}, which is not in the table of cards, so neither its memory "
            "nor its speed is planned with. Run it and see, or plan for another card with --gpu or "
            "--on modal."
        )
    return found


def more_cards(place: Place) -> Iterator[Place]:
    """The same card in machines with 2, 4 and 8 of it."""
    if place.gpu is None or place.where == "local":
        return
    for num_gpus in _COUNTS:
        if place.num_gpus < num_gpus <= place.gpu.max_count:
            yield Place(place.where, place.name, place.gpu, num_gpus, place.capacity_gib)


def cpu_place(machine: LocalMachine) -> Place:
    """This machine without a card."""
    speed = cpu_speed(machine.num_threads, machine.cpu_flags)
    return Place("local", "cpu", None, 0, machine.memory_gib, speed)


def _local(machine: LocalMachine, on: On, gpu: GpuRequest | None) -> Iterator[Place]:
    known = [(card.gpu, card) for card in machine.cards]
    numbers = Counter(found.name for found, _ in known if found is not None)
    capacity = {found.name: card.capacity_gib for found, card in known if found is not None}
    if gpu is None:
        for name, number in numbers.items():
            for num_gpus in sorted({1, number}):
                yield Place("local", name, GPUS[name], num_gpus, capacity[name])
        if not machine.cards:
            yield cpu_place(machine)
        return
    name = gpu.gpu.name
    if numbers[name] >= gpu.num_gpus:
        yield Place("local", name, gpu.gpu, gpu.num_gpus, capacity[name])
    elif on == "local" or not gpu.gpu.is_on_modal:
        # Planning for a machine that is not this one is a fair question, and said to be.
        yield Place("local", name, gpu.gpu, gpu.num_gpus, gpu.gpu.capacity_gib, is_assumed=True)


def _modal(on: On, gpu: GpuRequest | None) -> Iterator[Place]:
    if gpu is not None:
        if gpu.gpu.is_on_modal:
            yield Place("modal", gpu.gpu.name, gpu.gpu, gpu.num_gpus, gpu.gpu.capacity_gib)
        elif on == "modal":
            rented = ", ".join(card.name for card in GPUS.values() if card.is_on_modal)
            raise ConfigError(
                f"--gpu is {gpu.gpu.name}, which Modal does not rent. It has {rented}. Leave --on "
                "modal out for a card of your own."
            )
        return
    for card in GPUS.values():
        if card.is_on_modal:
            yield Place("modal", card.name, card, 1, card.capacity_gib)
