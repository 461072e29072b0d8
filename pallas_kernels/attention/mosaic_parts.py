"""What the kernels of attention on Hopper share: who does what, who waits for whom, and what a query sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._device import multiprocessors
from pallas_kernels._triton import interpreting
from pallas_kernels.attention.tiles import Span, Tiles
from pallas_kernels.attention.xla import Form

# Whose signatures differ between versions of JAX, or which some lack.
from_memory: Any = plgpu.load
interpreter: Any = getattr(plgpu, "InterpretGPUParams", None)
# Warpgroups that compute, each on so many rows; one more loads.
GROUPS, ROWS = 2, 64
LOG2E = math.log2(math.e)
# As in `triton`: finite, and its product with a factor is exact.
MASKED = -(2.0**100)
# Registers of a thread that computes, and of one that loads; there are 65,536 for 384 threads.
_REGISTERS = 240, 24


class Item(NamedTuple):
    """What a program works on at a time: a tile, and the tiles that it has to do with, in `visits` heads each."""

    batch: Array
    tile: Array
    span: Span
    visits: int

    def steps(self) -> Array:
        """How many tiles are visited."""
        return self.visits * (self.span.end - self.span.first)

    def masked(self) -> Array:
        """How many of them are masked: those come first."""
        return self.visits * self.span.masked()

    def at(self, step: Array) -> tuple[Array, Array]:
        """Which of the heads a step visits, and which tile."""
        masked, whole = self.span.masked(), self.span.whole_end - self.span.whole_first
        total = self.masked()
        in_masked = step < total
        step = jnp.where(in_masked, step, step - total)
        head = jnp.int32(0)
        if self.visits > 1:
            count = jnp.where(in_masked, masked, whole)
            head = lax.div(step, count)
            step = step - head * count
        return head, jnp.where(in_masked, self.span.masked_tile(step), self.span.whole_first + step)


def work_items(spans: Array) -> Array:
    """int32 [B * tiles, 6]: an `Item`'s numbers, the items with the most to do first."""
    b, tiles, _ = spans.shape
    batch, tile = (x.reshape(-1, 1).astype(jnp.int32) for x in jnp.indices((b, tiles)))
    flat = spans.reshape(-1, 4)
    return jnp.concatenate([batch, tile, flat], axis=1)[jnp.argsort(flat[:, 0] - flat[:, 3])]


class Work(NamedTuple):
    """One item in one head. before: tiles that the program loaded before it; number: items."""

    item: Item
    head: Array
    before: Array
    number: Array


def each_item(
    items_ref: Any,
    heads: int,
    visits: int,
    load: Callable[[Work], None],
    unload: Callable[[Array], None],
    compute: Callable[[Work], None],
    turns: Any,
) -> None:
    """Deals the items of all heads to the programs, back and forth, so that all have about as much to do, and calls
    `load` for them in the warpgroup that loads, at the end with unload(tiles loaded); `compute` in the others."""
    program, programs = lax.axis_index("program"), lax.axis_size("program")
    warpgroup = lax.axis_index("group")
    rounds, rest = divmod(items_ref.shape[0] * heads, programs)

    def place(number: Array | int) -> Array:
        return jnp.where(number % 2 == 0, program, programs - 1 - program)

    def run(work: Callable[[Work], None]) -> Array:
        def one(number: Array, count: Array) -> Array:
            index = number * programs + place(number)
            fields = [items_ref[lax.div(index, heads), i] for i in range(6)]
            item = Item(fields[0], fields[1], Span(*fields[2:]), visits)
            work(Work(item, lax.rem(index, heads), count, number))
            return count + item.steps()

        return lax.fori_loop(0, rounds + (place(rounds) < rest).astype(jnp.int32), one, jnp.int32(0))

    @pl.when(warpgroup < GROUPS)
    def _() -> None:
        plgpu.set_max_registers(_REGISTERS[0], action="increase")
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turns.at[0]))
        run(compute)
        plgpu.wait_smem_to_gmem(0)
        pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turns.at[0]))

    @pl.when(warpgroup == GROUPS)
    def _() -> None:
        plgpu.set_max_registers(_REGISTERS[1], action="decrease")
        unload(run(load))


class Loaded(NamedTuple):
    """Tiles in shared memory, and barriers that tell of each whether it has come and whether all have read it."""

    barriers: tuple[Any, Any]
    buffers: tuple[Any, ...]

    @property
    def full(self) -> Any:
        """One for each tile: it has come."""
        return self.barriers[0]

    @property
    def free(self) -> Any:
        """One for each tile: all have read it."""
        return self.barriers[1]


class Ring(Loaded):
    """Tiles in flight. buffers: where they lie, stages first."""

    @staticmethod
    def scratch(stages: int, arrays: int) -> tuple[Any, Any]:
        """Barriers of a ring of so many arrays."""
        return (
            plgpu.Barrier(num_arrivals=arrays, num_barriers=stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        )

    def slot(self, count: Array) -> Array:
        return lax.rem(count, jnp.int32(self.buffers[0].shape[0]))

    def fetch(self, count: Array, *sources: Any) -> None:
        """Begins to load the tile of this number."""
        slot, stages = self.slot(count), self.buffers[0].shape[0]
        pl.when(count >= stages)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])

    def await_all(self, count: Array) -> None:
        """Waits until all of `count` tiles have been read."""
        for behind in range(self.buffers[0].shape[0]):
            at = self.free.at[self.slot(count - 1 - behind)]
            pl.when(count > behind)(partial(plgpu.barrier_wait, at))

    def arrived(self, count: Array) -> Array:
        """Waits for a tile and returns its slot."""
        slot = self.slot(count)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, slot: Array) -> None:
        """A warpgroup has read what lies there."""
        plgpu.barrier_arrive(self.free.at[slot])


class Own(Loaded):
    """Rows that each warpgroup keeps for an item; one at a time, loaded while the item before ends."""

    @staticmethod
    def scratch(arrays: int) -> tuple[Any, Any]:
        """Barriers of so many arrays."""
        return plgpu.Barrier(num_arrivals=arrays, num_barriers=GROUPS), plgpu.Barrier(num_barriers=GROUPS)

    def fetch(self, work: Work, head: Array, *sources: Any) -> None:
        """Begins to load an item's rows of arrays [B, T, N, H]."""
        for group in range(GROUPS):
            pl.when(work.number > 0)(partial(plgpu.barrier_wait, self.free.at[group]))
            rows = pl.ds((work.item.tile * GROUPS + group) * ROWS, ROWS)
            for source, buffer in zip(sources, self.buffers, strict=True):
                plgpu.copy_gmem_to_smem(source.at[work.item.batch, rows, head], buffer.at[group], self.full.at[group])

    def await_all(self) -> None:
        """Waits until the last rows have been read."""
        for group in range(GROUPS):
            plgpu.barrier_wait(self.free.at[group])


def loads_of_keys(
    own: Own, keys: Ring, values: Ring, own_refs: Sequence[Any], refs: tuple[Any, Any, Any], group: int, size: int
) -> tuple[Callable[[Work], None], Callable[[Array], None]]:
    """`load` and `unload` of `each_item` where an item is a tile of queries: its rows of own_refs, and one tile of keys
    and values after the other.

    refs: of keys, values and documents (None without). group: heads that share keys. size: keys of a tile.
    """
    k_ref, v_ref, ids_ref = refs

    def load(work: Work) -> None:
        own.fetch(work, work.head, *own_refs)
        batch, kv_head = work.item.batch, lax.div(work.head, group)

        def load_tile(step: Array) -> None:
            rows = pl.ds(work.item.at(step)[1] * size, size)
            documents = () if ids_ref is None else (ids_ref.at[batch, rows],)
            keys.fetch(work.before + step, k_ref.at[batch, rows, kv_head], *documents)
            values.fetch(work.before + step, v_ref.at[batch, rows, kv_head])

        pl.loop(0, work.item.steps())(load_tile)

    def unload(count: Array) -> None:
        own.await_all()
        keys.await_all(count)
        values.await_all(count)

    return load, unload


class Turns(NamedTuple):
    """The two warpgroups give the tensor cores to each other: one multiplies while the other takes exponentials."""

    barriers: Any
    warpgroup: Array

    def take(self) -> None:
        plgpu.barrier_wait(self.barriers.at[self.warpgroup])

    def give(self) -> None:
        plgpu.barrier_arrive(self.barriers.at[1 - self.warpgroup])


def seen_of(
    form: Form, shape: tuple[int, ...], query: Array, key: Array, documents: tuple[Array, Any] | None, query_axis: int
) -> Array:
    """Which scores of a tile count.

    query, key: the tile's first. query_axis: of the scores. documents: of the rows, in their layout, and a reference
    to those of the columns.
    """
    layout = plgpu.Layout.WGMMA
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, (shape[axis],), 0, layout=layout.reduce(1 - axis)) for axis in (0, 1)
    )
    row, column = (row + (query - key), column) if query_axis == 0 else (row + (key - query), column)
    row, column = along_rows(row, shape), lax.broadcast_in_dim(column, shape, [1])
    # How far a key is behind a query.
    seen = column <= row if query_axis == 0 else row <= column
    if form.window is not None:
        seen &= (row - column if query_axis == 0 else column - row) < form.window
    if documents is not None:
        columns = from_memory(documents[1], layout=layout.reduce(0))
        seen &= lax.broadcast_in_dim(documents[0], shape, [0]) == lax.broadcast_in_dim(columns, shape, [1])
    return seen


def row_numbers(ref: Any) -> Array:
    """Numbers of a warpgroup's rows, from global memory, as they belong to the rows of products."""
    return from_memory(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def scores_of(products: Array, form: Form) -> tuple[Array, float]:
    """As `triton` makes scores of products, unmasked, and the factor that makes their unit log 2."""
    factor = form.scale * LOG2E
    if form.cap is not None:
        # One instruction, off by 2**-11 of its result at most.
        return jnp.tanh(products * (form.scale / form.cap)), form.cap * LOG2E
    return (products, factor) if factor > 0 else (products * factor, 1.0)


def constant(value: float, *shape: int) -> Array:
    """An array of this number, as rows of products or products lie in registers."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along_rows(numbers: Array, shape: tuple[int, ...]) -> Array:
    """A number for each row, in all columns."""
    return lax.broadcast_in_dim(numbers, shape, [0])


def accumulator(columns: int) -> Any:
    """What `multiply` adds to, for `pl.run_scoped`."""
    # The interpreter's accumulators can't be written, nor its wgmma read registers.
    return (plgpu.REGS if interpreting() else plgpu.ACC)((ROWS, columns), jnp.float32)


def multiply(sums: Any, a: Any, b: Any) -> None:
    """Begins to add a b to an accumulator; a may be in registers."""
    if interpreting():
        sums[...] += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
    else:
        plgpu.wgmma(sums, a, b)


def finished(sums: Any, behind: int = 0) -> Array:
    """What an accumulator holds after all products but the last `behind` ones."""
    return sums[...] if interpreting() else plgpu.wgmma_accumulator_load(sums, wait_n=behind)


def multiplied(sums: Array, a: Any, b: Any) -> Array:
    """sums + a b."""

    def run(acc: Any) -> Array:
        acc[...] = sums
        multiply(acc, a, b)
        return finished(acc)

    return pl.run_scoped(run, accumulator(sums.shape[1]))


def padded_ids(segment_ids: Array | None, tiles: Tiles) -> Array | None:
    """Documents of rows filled up to whole tiles, as what is loaded by tiles must be."""
    if segment_ids is None:
        return None
    size = max(tiles.queries, tiles.keys)
    return jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, -segment_ids.shape[1] % size)))


def call(
    name: str,
    kernel: Callable[..., None],
    shapes: list[jax.ShapeDtypeStruct],
    matrices: Mapping[str, tuple[int, ...]],
    others: Mapping[str, Any],
    heads: int,
    *operands: Array | None,
    stay: bool = True,
) -> Any:
    """Runs a kernel. matrices: shapes of what wgmma reads, in shared memory; others: more of what it has there. stay:
    with as many programs as there are multiprocessors, not one for each item of each head."""
    given = [x for x in operands if x is not None]
    programs = given[0].shape[0] * heads
    dtype = shapes[0].dtype
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    scratch = {key: plgpu.SMEM(shape, dtype, transforms=transforms) for key, shape in matrices.items()}
    return plgpu.kernel(
        kernel,
        out_type=shapes,
        grid=(min(multiprocessors(), programs) if stay else programs,),
        grid_names=("program",),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types=scratch | dict(others) | {"turns": plgpu.Barrier(num_barriers=GROUPS)},
        interpret=interpreter() if interpreting() else False,
    )(*given)
