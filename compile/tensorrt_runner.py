"""A coder's two graphs as TensorRT engines: `first` and `next` between buffers that stay where they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .footprint import require_room
from .stream import FIRST, NEXT, Coder, States

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger(__name__)
Replay = Callable[[], None]


class TensorRTError(RuntimeError):
    """An engine that cannot be loaded, or a call that said no."""


class Stream(Protocol):
    """Where an engine's work is queued."""

    handle: int

    def section(self) -> AbstractContextManager[None]:
        """What is done inside comes after what was queued before, and before what is queued behind it."""

    def capture(self, work: Callable[[], None]) -> Replay:
        """Record what `work` queues, without doing it; inside a section."""

    def hand_out(self, tensor: Tensor) -> None:
        """Let a tensor that was made in a section be used, and dropped, outside of it."""


class CudaStream:
    """A stream of the engine's own: on the default one TensorRT waits for the device after each call."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self.handle: int = self._stream.cuda_stream

    @contextmanager
    def section(self) -> Iterator[None]:
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)

    def capture(self, work: Callable[[], None]) -> Replay:
        """Of this thread alone: others may allocate meanwhile, which in the default mode would end the capture.

        Not by torch.cuda.graph, which waits for the whole device and empties the allocator's cache.
        """
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        return graph.replay

    def hand_out(self, tensor: Tensor) -> None:
        # Its memory is of this stream's pool: dropped, it would be the next run's, while the other stream reads it.
        tensor.record_stream(torch.cuda.current_stream(self._stream.device))


class Engine:
    """One plan and its context; both graphs' contexts work in the same scratch memory, one after the other."""

    def __init__(self, plan: bytes, runtime: trt.Runtime) -> None:
        import tensorrt as trt

        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise TensorRTError("the plan is of another TensorRT or device, or damaged")
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise TensorRTError("no execution context could be made")
        self._engine, self._context = engine, context
        self.scratch_bytes: int = engine.device_memory_size_v2
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = [name for name in names if is_input[name]]
        self.outputs = [name for name in names if not is_input[name]]

    def dtype(self, name: str) -> str:
        """As TensorRT calls it: FLOAT, HALF, BF16."""
        return str(self._engine.get_tensor_dtype(name).name)

    def lend(self, scratch: Tensor) -> None:
        self._context.set_device_memory(scratch.data_ptr(), scratch.numel())

    def aim(self, tensors: dict[str, Tensor]) -> None:
        """Let the next run read and write these tensors."""
        for name in self.inputs:
            if not self._context.set_input_shape(name, tuple(tensors[name].shape)):
                raise TensorRTError(f"{name} of {list(tensors[name].shape)} is outside the engine's profile")
        if unknown := self._context.infer_shapes():
            raise TensorRTError(f"the shapes of {', '.join(unknown)} are not known")
        for name in (*self.inputs, *self.outputs):
            tensor = tensors[name]
            if tuple(self._context.get_tensor_shape(name)) != tuple(tensor.shape) or not tensor.is_contiguous():
                raise TensorRTError(f"{name} must be {tuple(self._context.get_tensor_shape(name))}, contiguous")
            if not self._context.set_tensor_address(name, tensor.data_ptr()):
                raise TensorRTError(f"the address of {name} was refused")

    def enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise TensorRTError("the engine could not be started")


@dataclass
class Lane:
    """The buffers of one clip: two sets of states, of which one is read while the other is written.

    Nobody but the clip's states holds it, so that it goes with the last of them: 8.1 GiB in bf16 of a clip of 720p.
    """

    states: tuple[States, States]
    inputs: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    outputs: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    replays: dict[tuple[object, ...], Replay | None] = field(default_factory=dict)  # None: has run once, plainly


class LaneStates(list[Tensor]):
    """One set of a lane's states. They hold until the lane's next but one run, which writes over them."""

    def __init__(self, owner: Runner, lane: Lane, parity: int) -> None:
        super().__init__(lane.states[parity])
        self.owner, self.lane, self.parity = owner, lane, parity


class Runner:
    """`coder` by two plans: (x, states or None) -> (y, new states), on the plans' device.

    A clip's states stay in buffers of their own, so nothing is copied between chunks and a run can be recorded once
    a shape and parity and replayed (CUDA graphs). Clips may be interleaved: each has a lane. All buffers are made on
    the engines' stream and used on no other, so that what a clip leaves is the next one's without waiting.
    """

    def __init__(
        self,
        coder: Coder,
        plans: dict[str, bytes],
        device: torch.device,
        dtype: torch.dtype,
        stream: Stream | None = None,
        graphs: bool = True,
        size: tuple[int, int] | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """size: of the latents, where the plans are of one alone. memory_bytes: all that the process may have there.

        NoRoom if the engines' weights, their scratch memory and the states of one clip do not fit.
        """
        import tensorrt as trt

        self.coder, self.device, self.dtype = coder, device, dtype
        count = len(coder.states.shapes)
        self._states_in = [f"state_{index}" for index in range(count)]  # as export.py names them
        self._states_out = [f"new_state_{index}" for index in range(count)]
        self._stream = CudaStream(device) if stream is None else stream
        self._records = graphs
        require_room(device, sum(map(len, plans.values())), "the plans' weights", memory_bytes)  # a plan is little else
        runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engines = {graph: Engine(plans[graph], runtime) for graph in (FIRST, NEXT)}
        scratch_bytes = max(engine.scratch_bytes for engine in self._engines.values())
        for graph, engine in self._engines.items():
            self._check(graph, engine)
        lane_bytes = 2 * coder.states.num_bytes(*size, dtype.itemsize) if size else 0
        require_room(device, scratch_bytes + lane_bytes, "the plans' scratch memory and a clip's states", memory_bytes)
        with self._stream.section():
            self._scratch = torch.empty(max(1, scratch_bytes), dtype=torch.uint8, device=device)
        for engine in self._engines.values():
            engine.lend(self._scratch)

    def __call__(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
        graph = FIRST if states is None else NEXT
        with self._stream.section():
            if isinstance(states, LaneStates) and states.owner is self:
                lane, parity = states.lane, states.parity
            else:
                lane, parity = self._new_lane(x), 1
                for own, given in zip(lane.states[parity], states or (), strict=False):  # of another backend
                    own.copy_(given)
            source = self._buffer(lane.inputs, tuple(x.shape))
            target = self._buffer(lane.outputs, self.coder.output_shape(x.shape, graph))
            source.copy_(x)
            self._run(graph, lane, source, target, parity)
            y = target.clone()  # the buffer is the next chunk's too
        self._stream.hand_out(y)
        return y, LaneStates(self, lane, 1 - parity)

    def _run(self, graph: str, lane: Lane, x: Tensor, y: Tensor, parity: int) -> None:
        """Plainly the first time, in which TensorRT allocates what it needs; then recorded, then replayed."""
        key = graph, tuple(x.shape), parity
        if (replay := lane.replays.get(key)) is not None:
            replay()
            return
        engine = self._engines[graph]
        tensors = {"x": x, "y": y, **dict(zip(self._states_out, lane.states[1 - parity], strict=True))}
        if graph == NEXT:
            tensors |= dict(zip(self._states_in, lane.states[parity], strict=True))
        engine.aim(tensors)
        if self._records and key in lane.replays:
            try:
                lane.replays[key] = replay = self._stream.capture(lambda: engine.enqueue(self._stream.handle))
            except RuntimeError as error:
                self._records = False
                log.warning("TensorRT: no CUDA graphs, each chunk is launched anew (%s)", error)
            else:
                replay()
                return
        engine.enqueue(self._stream.handle)
        lane.replays[key] = None

    def _buffer(self, buffers: dict[tuple[int, ...], Tensor], shape: tuple[int, ...]) -> Tensor:
        if shape not in buffers:
            buffers[shape] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return buffers[shape]

    def _new_lane(self, x: Tensor) -> Lane:
        shapes = self.coder.states.at(*self.coder.latent_size(x.shape))
        first, second = ([torch.zeros(s, dtype=self.dtype, device=self.device) for s in shapes] for _ in range(2))
        return Lane((first, second))

    def _check(self, graph: str, engine: Engine) -> None:
        inputs = {"x", *(self._states_in if graph == NEXT else ())}
        outputs = {"y", *self._states_out}
        if {*engine.inputs} != inputs or {*engine.outputs} != outputs:
            raise TensorRTError(f"the plan of {graph!r} is of another graph")
        expected = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}[self.dtype]
        for name in (*engine.inputs, *engine.outputs):
            if engine.dtype(name) != expected:
                raise TensorRTError(f"{name} of the plan is {engine.dtype(name)}, not {expected}")
