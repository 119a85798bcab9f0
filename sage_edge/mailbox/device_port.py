"""A focus port whose tensors a device works on: sent when the work is enqueued, received in order with it.

    port = DevicePort(mailbox.focus("features"))               # memory: shm+cuda or vmm in ports.yaml
    with port.loan(shape, "float32") as t:                     # producer
        kernel(t, stream)                                      # t has __cuda_array_interface__ and __dlpack__
        t.send(stream=stream)                                  # returns at once: an event says when it is true
    with port.receive(stream=stream) as item:                  # consumer: `stream` waits for the producer's event
        other_kernel(item, stream)
        item.release(stream=stream)                            # waits for the consumer's own work, then gives the slot back

The payload stays where it was written; the event travels as a token in the descriptor (LAYOUT.md section 5, `event`).
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType
from typing import Any

from sage_edge.errors import InputError
from sage_edge.mailbox import _native, layout
from sage_edge.mailbox.devices import DeviceMemory
from sage_edge.mailbox.errors import StaleError
from sage_edge.mailbox.exchange import EVENT, ask, was_closed
from sage_edge.mailbox.ports import BroadcastPort, FocusPort

HERE = Path(__file__).resolve().parent
NO_STREAM = object()  # "no device work is under way": None means the default stream


class _Tensor:
    """What a loan and an item have in common: what other libraries ask a tensor for, without a copy."""

    def __init__(self, port: DevicePort, slot: _native.Loan | _native.Item) -> None:
        self._port = port
        self._slot: Any = slot

    @property
    def array(self) -> Any:
        """As NumPy sees it; InputError where the CPU cannot (vmm)."""
        return self._slot.array

    @property
    def slot(self) -> int:
        return int(self._slot.slot)

    @property
    def generation(self) -> int:
        return int(self._slot.generation)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        found: dict[str, Any] = self._slot.__cuda_array_interface__
        return found

    def __dlpack_device__(self) -> tuple[int, int]:
        found: tuple[int, int] = self._slot.__dlpack_device__()
        return found


class DeviceLoan(_Tensor):
    """A slot that device work may write. Ends with `send` or `cancel`; leaving the `with` block without send cancels."""

    def __dlpack__(self, *, stream: Any = None, **arguments: Any) -> Any:
        return self._slot.__dlpack__(**arguments)

    def send(self, *, stream: Any = NO_STREAM, **arguments: Any) -> int:
        """Hand the tensor over; returns its generation. stream: where the work that writes it was enqueued (None: the default
        stream); without it, everything is written already. The other arguments are those of `Loan.send`."""
        event = 0
        if stream is not NO_STREAM:
            memory = self._port.memory
            memory.driver.record(memory.event(self.slot), stream)
            event = self.slot + 1
        return int(self._slot.send(event=event, **arguments))

    def cancel(self) -> None:
        self._slot.cancel()

    def __enter__(self) -> DeviceLoan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._slot.__exit__(kind, error, trace)


class DeviceItem(_Tensor):
    """A received tensor. Work that was enqueued on it must be done, or be in the stream given to `release`, before it ends."""

    def __init__(self, port: DevicePort, item: _native.Item, event: Any) -> None:
        super().__init__(port, item)
        self._event = event
        self.item = item

    def wait(self, stream: Any) -> None:
        """Let another stream wait for the producer's work, too."""
        if self._event is not None:
            self._port.memory.driver.wait(self._event, stream)

    def __dlpack__(self, *, stream: Any = None, **arguments: Any) -> Any:
        """stream: the consumer's, as in the array API standard (None and 1: the default stream; -1: it needs no order)."""
        if stream != -1:
            self.wait(None if stream in (None, 1) else stream)
        return self._slot.__dlpack__(**arguments)

    def release(self, *, stream: Any = NO_STREAM) -> bool:
        """Give the slot back, after the work in `stream` if one is given. As `Item.release` otherwise."""
        if stream is not NO_STREAM:
            self._port.memory.driver.synchronize(stream)
        return bool(self._slot.release())

    def __enter__(self) -> DeviceItem:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._slot.release()


class DevicePort:
    """See the module. Raises InputError when the port's memory is seen by the CPU alone."""

    def __init__(self, port: FocusPort) -> None:
        if not isinstance(port._memory, DeviceMemory):
            raise InputError(
                f"port {port.name}: memory {port.spec.memory}: a device port needs shm+cuda or vmm (ports.yaml)"
            )
        self.port = port
        self.memory: DeviceMemory = port._memory
        # participant -> when it opened the port, and its events by token
        self._events: dict[int, tuple[int, dict[int, Any]]] = {}

    def loan(
        self, shape: Any = None, dtype: Any = None, *, trust: float = 1.0, timeout: float | None = None
    ) -> DeviceLoan:
        """As `FocusPort.loan`."""
        return DeviceLoan(self, self.port.loan(shape, dtype, trust=trust, timeout=timeout))

    def receive(self, timeout: float | None = None, *, stream: Any = NO_STREAM) -> DeviceItem | None:
        """The oldest item, or None after `timeout` seconds. stream: it waits for the producer's work, and this call does not
        (None: the default stream); without it, this call waits until the tensor is written.

        Raises StaleError when the process whose device work writes the tensor is gone: nobody can say whether it was done.
        """
        item = self.port.receive(timeout)
        if item is None:
            return None
        try:
            event = self._event_of(item) if item.event else None
            if event is not None and stream is NO_STREAM:
                self.memory.driver.synchronize_event(event)
            elif event is not None:
                self.memory.driver.wait(event, stream)
        except BaseException:
            item.release()
            raise
        return DeviceItem(self, item, event)

    def _event_of(self, item: _native.Item) -> Any:
        """The event to wait for, or None when its producer has closed the port, after its device work was done."""
        if item.producer == self.memory.index:  # an event cannot be opened in the process that made it, and need not be
            return self.memory.event(item.event - 1)
        identity, opened = _native.participant(self.port, item.producer)
        known_opened, known = self._events.get(item.producer, (0, {}))
        if not identity or item.sent_ns < opened or _native.is_dead(identity):
            if was_closed(self.port.directory, self.port.name, item.producer, item.sent_ns):
                return None
            raise self._gone(item)
        if known_opened != opened:
            known = {}
            self._events[item.producer] = opened, known
        if item.event not in known:
            answer = ask(self.port.directory, self.port.name, item.producer, EVENT, item.event)
            if answer is None or answer.opened != opened:
                if was_closed(self.port.directory, self.port.name, item.producer, item.sent_ns):
                    return None
                raise self._gone(item)
            known[item.event] = self.memory.driver.open_event(answer.handle)
        return known[item.event]

    def _gone(self, item: _native.Item) -> StaleError:
        return StaleError(
            f"port {self.port.name}: item {item.generation}: the process whose device work writes it is gone; it was dropped"
        )

    def kernel_view(self) -> bytes:
        """What a kernel takes as its `sage_edge::mailbox::device::Focus` argument, by value: 48 bytes.

        The kernel acts in the name of this handle, which must do nothing itself meanwhile; call `signal` afterwards.
        Raises InputError where kernels must not change slot words: the device does not see them (vmm), or has no native
        atomics with the CPU.
        """
        facts = self.memory.driver.facts()
        if self.memory.name != "shm+cuda" or not facts.native_atomics:
            why = (
                "has no native atomics with the CPU"
                if self.memory.name == "shm+cuda"
                else "does not see the port's slot words"
            )
            raise InputError(
                f"port {self.port.name}: {facts.name} {why}: loan and receive on the host, around the kernel"
            )
        _, _, payload_offset, index, _, _ = _native.mapping(self.port)
        spec = self.port.spec
        slot_bytes = layout.round_up(spec.slot_bytes, layout.HUGE_PAGE if spec.hugepages else layout.PAGE)
        base = self.port.device_base
        payload = base + payload_offset
        ttl_us = round((spec.ttl_ms or 0) * 1000)
        return struct.pack(
            "<QQQ6I",
            base,
            payload,
            slot_bytes,
            spec.depth,
            index,
            layout.POLICIES[spec.policy],
            spec.per_producer,
            ttl_us,
            0,
        )

    def signal(self) -> None:
        """Wake whoever waits at the port: after a kernel has sent or released something."""
        _native.signal(self.port)

    def close(self) -> None:
        """Close the port, and the events of others. Waits for device work that writes what was sent."""
        for _, events in self._events.values():
            for event in events.values():
                self.memory.driver.close_event(event)
        self._events.clear()
        self.port.close()

    def __enter__(self) -> DevicePort:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def include_directory() -> Path:
    """Where `#include "sage_edge/mailbox/device.cuh"` is found: `nvcc -I DIRECTORY`, or NVRTC's `-I`."""
    installed = HERE / "include"
    return installed if installed.is_dir() else HERE.parents[1] / "mailbox" / "include"


def ring_view(port: BroadcastPort, ring: int, device_base: int) -> bytes:
    """What a kernel takes as its `sage_edge::mailbox::device::Ring` argument, by value: 48 bytes.

    ring: whose records; to write, the one that this process owns (it owns one from its first send on). device_base: where the
    device sees the port's mapping (`Driver.register` of what `_native.mapping` says). Raises InputError for a ring that is none.
    """
    _, _, payload_offset, index, _, _ = _native.mapping(port)
    spec = port.spec
    if not 0 <= ring < spec.producers:
        raise InputError(f"port {port.name}: ring: expected 0..{spec.producers - 1}, found {ring}")
    size = spec.record_dtype.itemsize
    slots, cell = layout.ring_cells(spec.depth), layout.cell_bytes(size)
    head = device_base + layout.TABLE_OFFSET + ring * layout.RING.itemsize + 8
    cells = device_base + payload_offset + ring * slots * cell
    return struct.pack("<QQQQ4I", device_base, head, cells, cell, slots, size, index, 0)
